"""Tokenizers, chat templates, datasets, trajectory files and batches: python -m pytest tests/test_data.py

The real vocabulary and the real benchmarks are read from the folder that TABOM_DATA names, and skipped without it.
"""

import gzip
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import data
from experiments import tiny as tiny_model

REAL = Path(os.environ.get("TABOM_DATA", "no-such-folder"))
needs_data = pytest.mark.skipif(not REAL.is_dir(), reason="TABOM_DATA names no folder")
VOCABULARY = REAL.parent / "golden" / "dream-tokenizer"


@pytest.fixture(scope="module")
def dream():
    if not VOCABULARY.is_dir():
        pytest.skip("TABOM_DATA has no Dream vocabulary beside it")
    return data.load_tokenizer(VOCABULARY)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    tiny_model.write_start(folder, 0)
    return folder


def write(path, *rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


# -------------------------------------------------------------------------------------------------------- tokenizer


def test_dream_vocabulary_gives_the_expected_ids_and_texts(dream):
    for case in json.loads((VOCABULARY / "expected.json").read_text())["encode"]:
        assert dream.encode(case["text"]) == case["ids"]
        assert dream.decode(case["ids"]) == case["decoded"]


def test_dream_chat_template(dream):
    for case in json.loads((VOCABULARY / "expected.json").read_text())["chat"]:
        assert dream.chat(case["messages"]) == case["text"]
        assert dream.encode(dream.chat(case["messages"])) == case["ids"]


def test_dream_special_ids_and_rows_without_a_token(dream):
    assert (dream.size, dream.eos_id, dream.stop_ids) == (151667, 151643, {151643, 151645})
    assert dream.unused_ids(152064) == list(range(151667, 152064))
    with pytest.raises(ValueError, match="151667 is outside the tokenizer"):
        dream.decode([9707, 151667])


def test_an_answer_is_encoded_as_the_model_would_write_it(dream):
    ids = data.encode_answer(dream, [{"role": "user", "content": "Hi"}], "Hello")
    assert ids == [9707, 151645, 151643]  # Hello<|im_end|><|endoftext|>
    assert dream.response_text(ids + [151643] * 3) == "Hello"


def test_pieces_join_the_tokens_of_a_character(dream):
    text = "naïve 🤖日本 $24\n"
    ids = dream.encode(text)
    pieces = dream.pieces(ids)
    assert "".join(piece for piece, _ in pieces) == text
    assert [i for _, places in pieces for i in places] == list(range(len(ids))) and len(pieces) < len(ids)
    half = ids.index(next(i for i in ids if dream.decode([i]).endswith("\ufffd"))) + 1
    masked = dream.pieces([*ids[:half], 151666, *ids[half:]], mask_id=151666)  # a mask inside a character
    assert (None, [half]) in masked and [i for _, places in masked for i in places] == list(range(len(ids) + 1))


LLADA = (  # in the manner of LLaDA-8B-Instruct's template, which opens an answer whether asked to or not
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' }}{% endfor %}"
    "{{ '<|im_start|>assistant\n' }}"
)


def test_an_answer_ends_with_its_turn_whatever_the_template_writes_behind(dream):
    tok = data.Tokenizer(dream.backend, dream.special, LLADA)
    assert data.encode_answer(tok, [{"role": "user", "content": "Hi"}], "Hello") == [9707, 151645, 151643]
    assert data.encode_answer(dream, [{"role": "user", "content": "Hi"}], "Hello", raw=True) == [9707, 151643]
    with pytest.raises(ValueError, match="an empty prompt"):
        data.encode_prompt(dream, [{"role": "user", "content": ""}], raw=True)


def test_tiny_tokenizer_round_trips_and_refuses_what_it_cannot_spell(tiny):
    tok = data.load_tokenizer(tiny)
    text = "L12..ab"
    assert tok.decode(tok.encode(text)) == text
    assert tok.encode("1<|mask|>") == [tok.ids["1"], tok.ids["<|mask|>"]]
    assert data.encode_answer(tok, [{"role": "user", "content": "L."}], "12") == [
        tok.ids["1"],
        tok.ids["2"],
        tok.eos_id,
    ]
    with pytest.raises(ValueError, match="cannot encode 'hello'"):
        tok.encode("hello")


def test_a_tokenizer_file_cannot_cut_or_pad_what_is_encoded(tiny, tmp_path):
    shutil.copytree(tiny, tmp_path / "M")
    file = tmp_path / "M" / "tokenizer.json"
    padding = dict(strategy={"Fixed": 9}, direction="Right", pad_id=2, pad_type_id=0, pad_token="<|pad|>")
    padding.update(pad_to_multiple_of=None)
    truncation = dict(max_length=5, strategy="LongestFirst", stride=0, direction="Right")
    file.write_text(json.dumps(data.read_json(file) | dict(truncation=truncation, padding=padding)))
    assert [len(data.load_tokenizer(tmp_path / "M").encode("1" * n)) for n in (3, 20)] == [3, 20]


def test_chat_template_is_sandboxed_and_its_errors_are_ours(tiny):
    tok = data.load_tokenizer(tiny)
    for template in (
        "{{ ''.__class__.__mro__ }}",
        "{{ raise_exception('no') }}",
        "{% for",
        "{{ messages[9].content }}",
    ):
        bad = data.Tokenizer(tok.backend, tok.special, template)
        with pytest.raises(ValueError, match="chat template cannot render"):
            bad.chat([{"role": "user", "content": "x"}])
    with pytest.raises(ValueError, match="no chat_template"):
        data.Tokenizer(tok.backend, tok.special, None).chat([])


def test_chat_template_file_wins_and_sees_special_tokens(tiny, tmp_path):
    for file in tiny.glob("tokenizer*.json"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "chat_template.jinja").write_text("{{ eos_token }}{% if add_generation_prompt %}L{% endif %}")
    tok = data.load_tokenizer(tmp_path)
    assert (tok.chat([]), tok.chat([], add_generation_prompt=False)) == ("<|endoftext|>L", "<|endoftext|>")


def test_tokenizer_errors(tiny, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no tokenizer\.json"):
        data.load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="cannot be read"):
        data.load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes((tiny / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(dict(added_tokens_decoder={"99": {"content": "<x>"}})))
    with pytest.raises(ValueError, match="<x> should have id 99, the vocabulary puts it at 18"):
        data.load_tokenizer(tmp_path)


# --------------------------------------------------------------------------------------------------------- datasets

ROWS = [
    (dict(question="q", answer="a"), "q", "a"),
    (dict(problem="q", solution="s", answer="a"), "q", "s"),
    (dict(prompt="q", response="a"), "q", "a"),
    (dict(prompt="q"), "q", None),
    (dict(instruction="do", input="this", output="a"), "do\nthis", "a"),
    (dict(messages=[dict(role="user", content="q"), dict(role="assistant", content="a")]), "q", "a"),
    (dict(conversations=[{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]), "q", "a"),
    (dict(messages=[dict(role="system", content="s"), dict(role="user", content="q")]), "q", None),
]


@pytest.mark.parametrize("row, prompt, answer", ROWS)
def test_usual_fields_are_recognised(tmp_path, row, prompt, answer):
    (example,) = data.read_examples(write(tmp_path / "d.jsonl", row))
    assert (example["id"], example["prompt"], example["answer"]) == (0, prompt, answer)
    assert example["messages"][-1] == dict(role="user", content=prompt)


def test_every_format_reads_the_same(tmp_path):
    rows = [dict(question=f"q{i}", answer=str(i)) for i in range(3)]
    lines = "".join(json.dumps(r) + "\n" for r in rows)
    (tmp_path / "a.jsonl").write_text(lines)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "c.json").write_text(json.dumps(dict(data=rows)))
    files = ["a.jsonl", "b.jsonl.gz", "c.json"]
    try:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "d.parquet")
        files.append("d.parquet")
    except ImportError:
        pass
    first, *others = [data.read_examples(tmp_path / f) for f in files]
    assert [e["prompt"] for e in first] == ["q0", "q1", "q2"]
    for other in others:
        for example, expected in zip(other, first, strict=True):
            assert {**example, "where": expected["where"]} == expected
    assert data.read_examples(tmp_path / "a.jsonl", limit=2) == first[:2]


def test_named_fields_and_own_ids(tmp_path):
    file = write(
        tmp_path / "d.jsonl", dict(task_id="t/1", frage="q", antwort=7), dict(task_id="t/2", frage="p", antwort=8)
    )
    examples = data.read_examples(file, prompt_field="frage", answer_field="antwort")
    assert [(e["id"], e["prompt"], e["answer"]) for e in examples] == [("t/1", "q", "7"), ("t/2", "p", "8")]
    repeated = write(tmp_path / "e.jsonl", dict(id=5, prompt="a"), dict(id=5, prompt="b"))
    assert [e["id"] for e in data.read_examples(repeated)] == [0, 1]
    assert [e["id"] for e in data.read_examples(repeated, limit=1)] == [5]  # of the rows read, each is there once


@pytest.mark.parametrize(
    "lines, message",
    [
        ([], "the dataset is empty"),
        ([dict(prompt="a"), '{"prompt": '], r"d\.jsonl:2: not valid JSON"),
        ([dict(prompt="a"), "", dict(foo=1)], r"d\.jsonl:3: no known prompt field .* among foo"),
        (["[1]"], r"d\.jsonl:1: expected an object"),
        ([dict(messages=[dict(role="robot", content="x")])], r"d\.jsonl:1: a message needs a role"),
        ([dict(messages=[dict(role="assistant", content="x")])], r"d\.jsonl:1: the conversation has no user turn"),
        ([dict(messages=[dict(role="user", content=3)])], r"d\.jsonl:1: a message needs"),
    ],
)
def test_bad_rows_are_named_by_line(tmp_path, lines, message):
    with pytest.raises(ValueError, match=message):
        data.read_examples(write(tmp_path / "d.jsonl", *lines))


def test_bad_files(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="no dataset file"):
        data.read_examples(tmp_path / "none.jsonl")
    with pytest.raises(ValueError, match="unknown format '.csv'"):
        data.read_examples(write(tmp_path / "d.csv", "a,b"))
    (tmp_path / "d.jsonl.gz").write_bytes(gzip.compress(b'{"prompt": "a"}\n' * 100)[:-20])
    with pytest.raises(ValueError, match="damaged gzip"):
        data.read_examples(tmp_path / "d.jsonl.gz")
    (tmp_path / "d.jsonl").write_bytes(b'{"prompt": "\xff"}\n')
    with pytest.raises(ValueError, match="d.jsonl:1: not valid JSON"):
        data.read_examples(tmp_path / "d.jsonl")
    (tmp_path / "d.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match="parquet"):
        data.read_examples(tmp_path / "d.parquet")
    monkeypatch.setattr(data, "MAX_LINE", 100)
    with pytest.raises(ValueError, match="d.jsonl:2: the line is longer than 100 bytes"):
        data.read_examples(write(tmp_path / "d.jsonl", dict(prompt="a"), dict(prompt="a" * 200)))


@needs_data
@pytest.mark.parametrize(
    "name, count",
    [("gsm8k_test", 1319), ("math500", 500), ("HumanEval", 164), ("mbpp", 974), ("ifeval", 541)],
)
def test_real_benchmarks_are_recognised(name, count):
    examples = data.read_examples(REAL / f"{name}.jsonl.gz")
    assert len(examples) == count == len({e["id"] for e in examples})


# ----------------------------------------------------------------------------------------------------- trajectories

RECORD = dict(id=0, prompt_ids=[5, 6], response_ids=[7, 8, 1, 1], order=[2, 0, 3, 1], finished=True, correct=None)


def test_trajectories_of_several_files_are_sorted_by_id(tmp_path):
    write(tmp_path / "trajectories-00001.jsonl", {**RECORD, "id": 1})
    write(tmp_path / "trajectories-00000.jsonl", {**RECORD, "id": "a"}, {**RECORD, "id": 2})
    assert [r["id"] for r in data.read_trajectories(tmp_path)] == [1, 2, "a"]
    assert len(data.read_trajectories(tmp_path / "trajectories-00001.jsonl")) == 1


def test_what_holds_trajectories(tmp_path):
    write(tmp_path / "trajectories-00000.jsonl", RECORD)
    write(tmp_path / "prompts.jsonl", {"prompt": "a", "answer": "b"})
    (tmp_path / "empty.jsonl").touch()
    assert data.holds_trajectories(tmp_path) and data.holds_trajectories(tmp_path / "trajectories-00000.jsonl")
    assert not data.holds_trajectories(tmp_path / "prompts.jsonl")
    assert not data.holds_trajectories(tmp_path / "empty.jsonl")
    with pytest.raises(FileNotFoundError, match="no trajectories and no dataset at"):
        data.holds_trajectories(tmp_path / "none")


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(order=[0, 1, 2]), "order must give each of the 4"),
        (dict(order=[-1] * 4), "order must give each of the 4"),
        (dict(order=None), "order missing"),
        (dict(response_ids=[], order=[]), "not empty"),
        (dict(response_ids=[7, 8, 1, -1]), "token ids"),
        (dict(step=[0], entropy=[], confidence=[0.5] * 4), "step must be a list of 4"),
        (dict(response_ids=[7, 8, 1, 99]), "token id 99, but the model has 18: trajectories of another model"),
    ],
)
def test_bad_trajectories_are_named_by_line(tmp_path, change, message):
    write(tmp_path / "trajectories.jsonl", RECORD, {**RECORD, **change})
    with pytest.raises(ValueError, match=rf"trajectories\.jsonl:2: .*{message}"):
        data.read_trajectories(tmp_path, vocab_size=18)
    with pytest.raises(FileNotFoundError, match="no trajectories"):
        data.read_trajectories(tmp_path / "empty")


@pytest.mark.parametrize(
    "finished, correct, kept",
    [
        (True, True, {"correct", "finished", "all"}),
        (True, None, {"correct", "finished", "all"}),
        (True, False, {"finished", "all"}),
        (False, True, {"all"}),
    ],
)
def test_which_trajectories_are_usable(finished, correct, kept):
    record = dict(finished=finished, correct=correct)
    assert {keep for keep in ("correct", "finished", "all") if data.usable(record, keep)} == kept


def test_cut_at_eos_keeps_the_first_eos_and_numbers_the_order_anew():
    cut = data.cut_at_eos(RECORD, {1})
    assert (cut["response_ids"], cut["order"]) == ([7, 8, 1], [1, 0, 2])
    assert data.cut_at_eos(RECORD, {9}) is RECORD


@settings(deadline=None)
@given(st.permutations(range(8)), st.integers(0, 7))
def test_cut_at_eos_keeps_the_relative_order(order, end):
    response = [3] * 8
    response[end] = 1
    cut = data.cut_at_eos(dict(response_ids=response, order=list(order)), {1})
    assert sorted(cut["order"]) == list(range(end + 1))
    for a in range(end + 1):
        for b in range(end + 1):
            assert (order[a] < order[b]) == (cut["order"][a] < cut["order"][b])


# ---------------------------------------------------------------------------------------------------------- batches


def test_collate_pads_prompts_left_and_responses_right():
    other = dict(prompt_ids=[4], response_ids=[9])  # an answer without an order counts as left to right
    batch = data.collate([RECORD, other], pad_id=2)
    assert batch["prompt_ids"].tolist() == [[5, 6], [2, 4]]
    assert batch["prompt_mask"].tolist() == [[1, 1], [0, 1]]
    assert batch["response_ids"].tolist() == [[7, 8, 1, 1], [9, 2, 2, 2]]
    assert batch["order"].tolist() == [[2, 0, 3, 1], [0, -1, -1, -1]]
    assert batch["length"].tolist() == [4, 1]


def test_orders_and_generators_follow_from_their_keys_alone():
    assert data.epoch_order(50, 0, 1) == data.epoch_order(50, 0, 1)
    assert sorted(data.epoch_order(50, 0, 1)) == list(range(50))
    assert data.epoch_order(50, 0, 1) != data.epoch_order(50, 0, 2) != data.epoch_order(50, 1, 2)
    torch.manual_seed(1)
    a = torch.rand(4, generator=data.generator(0, 1, "x"))
    torch.manual_seed(2)
    assert torch.equal(a, torch.rand(4, generator=data.generator(0, 1, "x")))
    assert not torch.equal(a, torch.rand(4, generator=data.generator(0, 1, "y")))
