"""The authors' trajectory files, read and written: python -m pytest tests/test_release_files.py"""

import json

import pytest
from helpers import FOLDER
from letters import HI, column, write, write_bytes_tokenizer

import data
import tokenizer
from release.files import to_release_format


@pytest.fixture
def letters(tmp_path):
    return tokenizer.load(write_bytes_tokenizer(tmp_path / "letters"))


RECORD = dict(id=0, prompt_ids=[5, 6], response_ids=[7, 8, 1, 1], order=[2, 0, 3, 1], finished=True, correct=None)
AUTHORS = dict(
    method="entropy",
    question="What is 2 + 2?",
    answer="4",
    gen_text="Four.",
    response_token_ids=[51, 86, 258, 256],
    decoding_order=[2, 0, 1, 1],
    non_ltr_positions=[0],
    data_source=" made up ",
)


def test_the_authors_rows_are_read_as_records(letters, tmp_path):
    file = write(tmp_path / "d.jsonl", AUTHORS)
    assert data.holds_trajectories(file)
    (record,) = data.read_trajectories(file, vocab_size=264, tok=letters, mask_id=259)
    assert record["prompt_ids"] == letters.encode_chat([dict(role="user", content="What is 2 + 2?")])
    assert (record["response_ids"], record["order"]) == ([51, 86, 258, 256], [2, 0, 1, 1])
    assert (record["id"], record["text"], record["data_source"], record["non_ltr"]) == (0, "Four.", "made up", [0])
    assert record["finished"] is True and record["correct"] is None and data.usable(record)
    short = data.read_trajectories(file, tok=letters, max_prompt_tokens=30)[0]["prompt_ids"]
    assert len(short) == 29 and letters.decode(short).endswith("<|im_end|>\n<|im_start|>assistant\n")
    with pytest.raises(ValueError, match=r"d\.jsonl:1: .*need the model's tokenizer"):
        data.read_trajectories(file)


def test_raw_is_honoured_for_the_authors_rows(letters, tmp_path):
    file = write(tmp_path / "d.jsonl", dict(question="What is 2 + 2?", gen_text="Four."))
    (record,) = data.read_trajectories(file, tok=letters, raw=True)
    assert letters.decode(record["prompt_ids"]) == "What is 2 + 2?"
    assert letters.decode(record["response_ids"]) == "Four.<|endoftext|>"
    bare = tokenizer.Tokenizer(letters.backend, letters.special, None)
    assert data.read_trajectories(file, tok=bare, raw=True)[0] == record
    with pytest.raises(ValueError, match=r"d\.jsonl:1: the tokenizer has no chat_template"):
        data.read_trajectories(file, tok=bare)


def test_the_authors_rows_without_ids_or_with_a_short_order(letters, tmp_path):
    text = dict(question="What is 2 + 2?", answer="4", gen_text="Four.")
    file = write(tmp_path / "d.jsonl", text, {**AUTHORS, "decoding_order": [1, 0]}, {**AUTHORS, "decoding_order": None})
    first, *others = data.read_trajectories(file, tok=letters)
    assert letters.decode(first["response_ids"]) == "Four.<|im_end|><|endoftext|>"  # and not the answer "4"
    assert first["order"] == list(range(7)) and first["non_ltr"] is None
    assert column(others, "order") == [[0, 1, 2, 3]] * 2  # counts as decoded from left to right
    order = list(range(9, -1, -1))  # of ten positions: the text's seven tokens, and EOS behind them
    row = {**text, "decoding_order": order, "non_ltr_positions": [3, 9]}
    ids = {**AUTHORS, "decoding_order": [3, 2, 1, 0, 4], "non_ltr_positions": [0, 4]}  # one without a token
    long, cut = data.read_trajectories(write(tmp_path / "e.jsonl", row, ids), tok=letters)
    assert long["response_ids"] == first["response_ids"] + [letters.eos_id] * 3
    assert (long["order"], long["non_ltr"]) == (order, [3, 9])
    assert (cut["order"], cut["non_ltr"]) == ([3, 2, 1, 0], [0])


def test_the_authors_rows_that_cannot_be_used_say_why(letters, tmp_path):
    said, none = [], dict(method="entropy", question="What?")
    file = write(tmp_path / "e.jsonl", AUTHORS, none, {"method": "credit"}, {**AUTHORS, "method": "credit"})
    assert len(data.read_trajectories(file, tok=letters, methods={"entropy"}, warn=said.append)) == 1
    assert len(data.read_trajectories(file, tok=letters, warn=said.append)) == 2
    assert said == [
        f"{file}:2: not used, it has no response; the row has method, question",
        f"{file}:2: not used, it has no response; the row has method, question",
        f"{file}:3: not used, it has no prompt; the row has method",
    ]
    said.clear()
    bare, never = dict(question="q", answer="a"), dict(AUTHORS, decoding_order=[-1] * 4)
    file = write(tmp_path / "f.jsonl", AUTHORS, bare, never)
    assert data.read_trajectories(file, tok=letters, methods={"credit"}) == []
    assert len(data.read_trajectories(file, tok=letters, warn=said.append)) == 2
    assert said == [f"{file}:3: not used, none of its tokens was ever decoded"]


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(response_token_ids=[[1]]), "response_token_ids must be a list of ids"),
        (dict(response_token_ids="abc"), "response_token_ids must be a list of ids"),
        (dict(response_token_ids=[51, 86, 258, 999]), "token id 999, but the model has 264"),
        (dict(response_token_ids=[51, 259, 258, 256]), "response token 1 is the mask token 259"),
        (dict(decoding_order=[0, 1, 2, "x"]), "order must give each of the 4"),
        (dict(non_ltr_positions=[-1]), "non-left-to-right positions"),
    ],
)
def test_bad_rows_of_the_authors_are_named_by_line(letters, tmp_path, change, message):
    file = write(tmp_path / "d.jsonl", AUTHORS, {**AUTHORS, **change})
    with pytest.raises(ValueError, match=rf"d\.jsonl:2: .*{message}"):
        data.read_trajectories(file, vocab_size=264, tok=letters, mask_id=259)


def release_methods(family, method):
    """The methods whose rows the release trains on, or None for all of them. method: its filter, None = its default."""
    if method == "all":
        return None
    if family == "llada" and method in (None, "entropy"):  # for LLaDA "entropy" stands for three
        return {"entropy", "default", "credit"}
    return {method or "entropy"}


def test_the_authors_loader_takes_the_same_rows(letters, tmp_path):
    golden = json.loads((FOLDER / "release" / "loader.json").read_text())
    file, said = write(tmp_path / "d.jsonl", *golden["rows"]), []
    for case in golden["cases"]:
        methods = release_methods(case["family"], case["method"])
        records = data.read_trajectories(file, tok=letters, methods=methods, warn=said.append)
        assert len(records) == len(case["items"])
        for record, (prompt, text, ids, non_ltr, order, source) in zip(records, case["items"]):
            assert (record["prompt"], record["text"], record["non_ltr"]) == (prompt, text, non_ltr)
            assert record["data_source"] == source
            if ids is not None:
                assert (record["response_ids"], record["order"]) == (ids, order)
    assert set(said) == {f"{file}:8: not used, it has no prompt; the row has text, method"}


def test_our_records_can_be_written_in_the_authors_format(letters, tmp_path):
    prompt = tokenizer.encode_prompt(letters, HI)
    ours = dict(RECORD, prompt="Hi", prompt_ids=prompt, text="x", step=[3, 0, 4, 1])
    row = to_release_format(ours, pad_id=256)
    assert len(row["response_token_ids"]) == len(row["decoding_order"]) == 256
    assert row["decoding_order"][:5] == [3, 0, 4, 1, -1] and row["non_ltr_positions"] == [0, 1, 2, 3]
    (record,) = data.read_trajectories(write(tmp_path / "d.jsonl", row), tok=letters)
    assert record["prompt_ids"] == prompt and record["response_ids"][:4] == RECORD["response_ids"]
    # beside rows of ours, of which one has its number, it has the next that is free: draws depend on the id
    write_both = [json.dumps(dict(RECORD, id=key)) for key in (4, 0)] + [json.dumps({**row, "id": None})]
    (tmp_path / "both.jsonl").write_text("\n".join(write_both) + "\n")
    assert [r["id"] for r in data.read_trajectories(tmp_path / "both.jsonl", tok=letters)] == [0, 4, 5]
    # what pads an answer without an end, or stands behind a mask, does not end it
    cut = to_release_format(dict(ours, response_ids=[7, 8, 9, 10], finished=False), pad_id=256)
    masked = dict(AUTHORS, decoding_order=[2, -1, 1, 0])
    for row, finished in ((cut, False), (masked, False), (AUTHORS, True)):
        assert data.read_trajectories(write(tmp_path / "f.jsonl", row), tok=letters)[0]["finished"] is finished
    row = to_release_format(dict(ours, order=[0, 1, -1, -1], step=[0, 1, 12, 12]), pad_id=256)
    assert row["decoding_order"][:4] == [0, 1, -1, -1] and row["non_ltr_positions"] == []
