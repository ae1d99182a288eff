"""Tokenizers, chat templates, datasets, trajectory files and batches: python -m pytest tests/test_data.py

The real vocabulary and the real benchmarks are read from the folder that TABOM_DATA names, and skipped without it.
"""

import functools
import gzip
import json
import operator
import os
import shutil
import tempfile
from pathlib import Path

import pytest
import tokenizers
import torch
from helpers import FOLDER
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
    """A file of lines: a text as it is, anything else as JSON."""
    with open(path, "w") as f:
        for row in rows:
            f.write((row if isinstance(row, str) else json.dumps(row)) + "\n")
    return path


def column(rows, key):
    return list(map(operator.itemgetter(key), rows))


def rows_of(path):
    return column(data.read_rows(path), 1)


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
    with pytest.raises(ValueError, match="151667 is outside the tokenizer of"):
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


# ---------------------------------------------------------------------------------------- a tokenizer of single bytes

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TRIMMED = (  # LLaDA's manner: every message is trimmed
    "{% for m in messages %}{{ bos_token if loop.first }}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
NAMES = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|mask|>", "<|pad|>"]  # ids 256 to 260
SPECIAL = dict(eos_token="<|endoftext|>", pad_token="<|endoftext|>", mask_token="<|mask|>")
HI = [dict(role="user", content="Hi")]


def write_bytes_tokenizer(folder, config=None, added=True, template=CHATML):
    """A byte-level BPE without merges, so that a text has as many tokens as bytes."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(dict(zip(alphabet, range(256))), []))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    if added:
        backend.add_special_tokens(NAMES)
    folder.mkdir(exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    content = {**(SPECIAL if config is None else config), "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(content))
    return folder


def special_ids(ids):
    return list(filter(lambda i: i >= 256, ids))


@pytest.fixture
def letters(tmp_path):
    return data.load_tokenizer(write_bytes_tokenizer(tmp_path / "letters"))


def test_every_token_that_ends_a_response_is_in_one_set(tmp_path):
    folder = write_bytes_tokenizer(tmp_path / "M", {**SPECIAL, "pad_token": "<|pad|>"})
    tok = data.load_tokenizer(folder, eos_id=70, mask_id=259)
    assert tok.stop_ids == {256, 258, 260, 70}
    assert (tok.eos_id, tok.pad_id, tok.mask_id) == (256, 260, 259)
    answer = tok.encode("4") + [258, 260, 260]  # the end of the turn, and then padding
    assert data.first_end(answer, tok.stop_ids) == 1 and tok.response_text(answer) == "4"
    assert data.first_end(answer[:1], tok.stop_ids) == 1  # nothing ends it: its length
    folder = write_bytes_tokenizer(tmp_path / "N", dict(pad_token="<|mask|>"))
    tok = data.load_tokenizer(folder, eos_id=256, mask_id=259)
    assert tok.stop_ids == {256, 258} and tok.eos_id == 256  # a mask never ends anything; the config has the EOS
    assert data.encode_answer(tok, HI, "4")[-2:] == [258, 256]


def test_a_token_stays_as_it_was_added_when_it_is_known_to_be_special(letters):
    backend = letters.backend
    backend.add_tokens([tokenizers.AddedToken("<|eot_id|>", lstrip=True), tokenizers.AddedToken("<think>")])
    tok = data.Tokenizer(backend, letters.special, CHATML, eos_id=262)
    assert tok.encode("a  <|eot_id|>") == [*tok.encode("a"), 261]  # it takes the space before it
    assert tok.stop_ids == {256, 258, 261, 262}
    assert max(tok.encode_text("<|eot_id|><think>")) < 256


@pytest.mark.parametrize("name", NAMES)
def test_a_quoted_special_token_is_text_in_prompts_and_answers(letters, name):
    messages = [dict(role="user", content=f"What is {name}?")]
    prompt = data.encode_prompt(letters, messages)
    assert letters.decode(prompt) == letters.chat(messages)
    assert special_ids(prompt) == [257, 258, 257]  # the template's own, and no other
    answer = data.encode_answer(letters, messages, f" {name} is one{name}")
    assert letters.decode(answer) == f" {name} is one{name}<|im_end|><|endoftext|>"
    assert special_ids(answer) == [258, 256] == answer[-2:]
    assert max(data.encode_prompt(letters, messages, raw=True)) < 256
    assert data.encode_answer(letters, messages, name, raw=True)[:-1] == letters.encode_text(name)
    assert letters.encode(name) == [256 + NAMES.index(name)]  # what is not quoted is the token itself


@settings(deadline=None)
@given(st.lists(st.sampled_from([*NAMES, "a", " ", "<|", "|>", "im_end", "\n", "é", "\ufdd0"]), max_size=8))
def test_no_content_becomes_a_special_token(parts):
    content = "".join(parts)
    text, quoted = LETTERS().render([dict(role="user", content=content)])
    ids = LETTERS().encode(text, quoted)
    assert text == f"<|im_start|>user\n{content}<|im_end|>\n<|im_start|>assistant\n"
    assert LETTERS().decode(ids) == text and special_ids(ids) == [257, 258, 257]


@functools.cache
def LETTERS():
    with tempfile.TemporaryDirectory() as folder:
        return data.load_tokenizer(write_bytes_tokenizer(Path(folder) / "letters"))


def test_what_cannot_be_spelled_as_text_is_an_error(tiny, tmp_path):
    tok = data.load_tokenizer(tiny)
    file = write(tmp_path / "d.jsonl", dict(prompt="L.", answer="1"), dict(prompt="L.", answer="1<|mask|>"))
    examples = data.read_examples(file)
    with pytest.raises(ValueError, match=r"d\.jsonl:2: the tokenizer cannot encode"):
        data.encode_examples(tok, examples, answers=True)
    data.encode_examples(tok, examples)
    assert examples[1]["prompt_ids"] == tok.encode("L.") and "response_ids" not in examples[1]
    with pytest.raises(ValueError, match=r"e\.jsonl:1: the row has no answer"):
        data.encode_examples(tok, data.read_examples(write(tmp_path / "e.jsonl", dict(prompt="L."))), answers=True)


def test_the_end_of_the_turn_is_trained_where_the_template_does_not_repeat_its_prompt(tmp_path):
    think = CHATML.replace("assistant\n{% endif", "assistant\n<think>\n\n</think>\n\n{% endif")
    tok = data.load_tokenizer(write_bytes_tokenizer(tmp_path / "M", template=think))
    assert tok.decode(data.encode_answer(tok, HI, "Hello")) == "Hello<|im_end|><|endoftext|>"
    quoting = data.encode_answer(tok, HI, "a<|im_end|>b")
    assert tok.decode(quoting) == "a<|im_end|>b<|im_end|><|endoftext|>" and quoting[-2:] == [258, 256]


def test_the_start_of_an_answer_is_continued(letters, tmp_path):
    assert letters.chat(HI, prefix="Code:\n") == letters.chat(HI) + "Code:\n"
    assert letters.chat(HI, prefix=" \n") == letters.chat(HI) + " \n"
    assert letters.chat(HI, prefix="|>") == letters.chat(HI) + "|>"  # and not the |> that ends the turn
    ids = data.encode_prompt(letters, HI, prefix="<|mask|>")
    assert letters.decode(ids) == letters.chat(HI) + "<|mask|>" and 259 not in ids
    for template in (TRIMMED, TRIMMED.replace("{% if add_generation_prompt %}", "").removesuffix("{% endif %}")):
        trimmed = data.Tokenizer(letters.backend, dict(bos_token="<s>"), template)
        start = (
            "<s><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|><|start_header_id|>assistant<|end_header_id|>"
        )
        assert trimmed.chat(HI, prefix="Code:\n") == f"{start}\n\nCode:"
    deaf = data.Tokenizer(letters.backend, {}, "{{ messages[0].content }}")
    with pytest.raises(ValueError, match="leaves out what the assistant says"):
        deaf.chat(HI, prefix="x")


def harness_rows(name):
    folder = REAL.parent / "golden" / "harness"
    if not folder.is_dir():
        pytest.skip("TABOM_DATA has no prompts of lm-evaluation-harness beside it")
    return rows_of(folder / name)


COMPLETED = "Here is the completed function:\n```python\n"
WRITE = "Write a solution to the following problem and make sure that it passes the tests:\n```"


def test_prefixes_give_the_prompts_of_the_harness(dream):
    llada = data.Tokenizer(dream.backend, {**dream.special, "bos_token": "<|startoftext|>"}, TRIMMED)
    programs = rows_of(REAL / "HumanEval.jsonl.gz")

    def ask(tok, row):
        program = programs[row]["prompt"]
        return tok.chat([dict(role="user", content=WRITE + program)], prefix=COMPLETED + program + "\n")

    def asked(prompt, start, end):  # the user's text within a prompt
        return [dict(role="user", content=prompt.split(start)[1].split(end)[0])]

    for row in harness_rows("prompts_dream.jsonl"):
        prompt = row["fork_transformers_4_47_or_newer"]
        if row["task"] == "humaneval":
            assert ask(dream, row["row"]) == prompt
        else:
            messages = asked(prompt, "<|im_start|>user\n", "<|im_end|>")
            prefix = COMPLETED if row["task"] == "mbpp" else ""
            assert dream.chat(messages, prefix=prefix) == prompt
    for row in harness_rows("prompts_llada_humaneval.jsonl"):
        assert ask(llada, row["row"]) == row["prompt"]
    for task, prefix in (("gsm8k", ""), ("math500", ""), ("ifeval", ""), ("mbpp", COMPLETED)):
        for row in harness_rows(f"prompts_llada_{task}.jsonl"):
            messages = asked(row["prompt"], "user<|end_header_id|>\n\n", "<|eot_id|>")
            assert llada.chat(messages, prefix=prefix) == row["prompt"]


def test_a_prompt_is_cut_on_the_right_and_keeps_the_end_of_the_template(letters):
    messages = [dict(role="system", content="s"), dict(role="user", content="0123456789")]
    whole = letters.encode_chat(messages)
    around = len(whole) - 10
    ids = data.encode_prompt(letters, messages, max_tokens=around + 5)
    assert letters.decode(ids).endswith("user\n0123<|im_end|>\n<|im_start|>assistant\n")  # one less than would fit
    assert data.encode_prompt(letters, messages, max_tokens=around + 11) == whole
    assert len(data.encode_prompt(letters, messages, raw=True, max_tokens=3)) == 3
    with pytest.raises(ValueError, match=f"takes {around} of at most"):
        data.encode_prompt(letters, messages, max_tokens=around + 1)
    robots = [dict(role="user", content="🤖" * 5)]  # four bytes each: none is cut in two
    text = letters.decode(data.encode_prompt(letters, robots, max_tokens=len(letters.encode_chat(robots)) - 5))
    assert text.count("🤖") == 3 and "\ufffd" not in text


# ------------------------------------------------------------------------------------------------ a tokenizer's files


def test_templates_may_call_what_transformers_gives_them(letters):
    def render(template, messages=HI):
        return data.Tokenizer(letters.backend, letters.special, template).chat(messages)

    assert render("a{% generation %}{{ messages[0].content }}{% endgeneration %}b") == "aHib"
    assert render("{{ strftime_now('%Y') }}").isdigit()
    messages = [dict(role="user", content="é", b=1, a=2)]
    assert render("{{ messages[0].content | tojson }}", messages) == '"é"'
    assert render("{{ messages[0].content | tojson(ensure_ascii=True) }}", messages) == '"\\u00e9"'
    assert render("{{ {'b': 1, 'a': 2} | tojson(sort_keys=True, separators=(',', ':')) }}") == '{"a":2,"b":1}'
    assert render("{{ {'b': 1} | tojson(indent=1) }}") == '{\n "b": 1\n}'
    assert render("{% if tools is none and documents is none %}none{% endif %}") == "none"
    assert render({"default": "d", "rag": "r"}) == "d" and render({"rag": "r"}) == "r"
    with pytest.raises(ValueError, match="chat templates are rag, tool_use; none of them is called default"):
        render({"rag": "r", "tool_use": "t"})


def test_named_templates_and_other_files_are_read(tmp_path):
    named = [dict(name="tool_use", template="t"), dict(name="default", template="d")]
    folder = write_bytes_tokenizer(tmp_path / "M", template=named)
    assert data.load_tokenizer(folder).chat(HI) == "d"
    folder = write_bytes_tokenizer(tmp_path / "N", {}, added=False, template=None)
    (folder / "added_tokens.json").write_text(json.dumps(dict(zip(NAMES, range(256, 261)))))
    as_dict = dict(SPECIAL, eos_token=dict(content="<|endoftext|>"))
    (folder / "special_tokens_map.json").write_text(json.dumps(as_dict))
    (folder / "chat_template.json").write_text(json.dumps(dict(chat_template="j")))
    tok = data.load_tokenizer(folder)
    assert (tok.eos_id, tok.mask_id, tok.encode("<|im_start|>")) == (256, 259, [257])
    assert tok.chat(HI) == "j" and max(tok.encode_text("<|im_end|>")) < 256
    (folder / "added_tokens.json").write_text(json.dumps({"<|x|>": 300}))
    with pytest.raises(ValueError, match=r"added_tokens\.json: <\|x\|> should have id 300"):
        data.load_tokenizer(folder)


def test_a_declared_token_must_be_in_the_vocabulary(tmp_path):
    folder = write_bytes_tokenizer(tmp_path / "M", added=False)
    with pytest.raises(ValueError, match="eos_token '<|endoftext|>' is not in the tokenizer's vocabulary"):
        data.load_tokenizer(folder)
    config = dict(additional_special_tokens=["<|MASK|>"])  # Dream lists one that it lacks, and never uses it
    assert data.load_tokenizer(write_bytes_tokenizer(tmp_path / "N", config)).eos_id is None


def test_byte_order_marks_are_no_text(tmp_path):
    folder = write_bytes_tokenizer(tmp_path / "M")
    (folder / "chat_template.jinja").write_text("j")
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    (tmp_path / "Q").mkdir()
    (tmp_path / "Q" / "vocab.json").write_text(json.dumps(dict(zip([*letters, "ab"], range(257)))))
    (tmp_path / "Q" / "merges.txt").write_text("#version: 0.2\na b\n")
    for file in [*folder.iterdir(), *(tmp_path / "Q").iterdir()]:
        file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert data.load_tokenizer(folder).chat(HI) == "j"
    assert data.load_tokenizer(tmp_path / "Q").encode("abc") == [256, letters.index("c")]
    for name in ("d.jsonl", "d.json"):
        (tmp_path / name).write_bytes(b'\xef\xbb\xbf{"prompt": "a"}\n{"prompt": "b"}\n')
        assert column(data.read_examples(tmp_path / name), "prompt") == ["a", "b"]
    (tmp_path / "list.json").write_bytes(b'\xef\xbb\xbf[{"prompt": "a"}]')
    assert len(data.read_examples(tmp_path / "list.json")) == 1


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
    (dict(messages=[dict(role="user", content=[dict(type="text", text="q")])]), "q", None),
    (dict(prompt=[dict(role="user", content="q")], answer="a"), "q", "a"),
    (dict(instruction="do", context="this", response="a"), "do\n\nthis", "a"),
    (dict(question="q", context="c", answers=dict(text=["a", "b"], answer_start=[1, 2])), "c\n\nq", ["a", "b"]),
    (dict(question="q", context=["c", "d"], answer=["a", "b"]), "c\nd\n\nq", ["a", "b"]),
    (dict(question="q", answer=18), "q", "18"),
    (dict(question="q", answer=0.5), "q", "0.5"),
    (dict(question="q", answer="", solution="s"), "q", "s"),
    (dict(prompt="q", code="def f(): pass", test_list=["assert f()"]), "q", "def f(): pass"),
    (dict(problem="q", generated_solution="s", expected_answer="4"), "q", "s"),
    (dict(question="q", generated_solution="s", expected_answer="4"), "q", "s"),
    (dict(prompt="q", output="a"), "q", "a"),
    (dict(question="q", solutions='["a", "b"]', input_output="{}"), "q", ["a", "b"]),
    (dict(question="q", solutions="[]"), "q", None),
    (dict(input="q", output="a"), "q", "a"),
    (dict(question="q", choices=["x", "y"], answer=1, subject="s"), "q\nA. x\nB. y", "B"),
    (dict(question="q", choices=["x", "y"], answer="x"), "q\nA. x\nB. y", "A"),
    (dict(question="q", choices=dict(text=["x", "y"], label=["1", "2"]), answerKey="2"), "q\n1. x\n2. y", "2"),
    (dict(question="q", options=dict(A="x", B="y"), answer="y"), "q\nA. x\nB. y", "B"),
    (dict(question="q", options=["A)x", "B)y"], answer="A"), "q\nA)x\nB)y", "A"),
    (dict(question="q", choices=[3, 4], answer=0), "q\nA. 3\nB. 4", "A"),
]


@pytest.mark.parametrize("row, prompt, answer", ROWS)
def test_usual_fields_are_recognised(tmp_path, row, prompt, answer):
    said = []
    (example,) = data.read_examples(write(tmp_path / "d.jsonl", row), warn=said.append)
    assert (example["id"], example["prompt"], example["answer"]) == (0, prompt, answer)
    assert example["messages"][-1] == dict(role="user", content=prompt)
    assert said == []


@pytest.mark.parametrize(
    "row, before",
    [
        (dict(system_prompt="s", question="q"), [("system", "s")]),
        (dict(system="s", conversations=[{"from": "human", "value": "q"}]), [("system", "s")]),
        (dict(system="", instruction="q", history=None), []),
        (dict(system="s", instruction="q", history=[["u", "a"]]), [("system", "s"), ("user", "u"), ("assistant", "a")]),
        (
            dict(history=[{"role": "user", "content": "u"}, {"from": "gpt", "value": "a"}], prompt="q"),
            [("user", "u"), ("assistant", "a")],
        ),
    ],
)
def test_system_and_history_come_before_the_prompt(tmp_path, row, before):
    said = []
    (example,) = data.read_examples(write(tmp_path / "d.jsonl", row), warn=said.append)
    roles, contents = zip(*before, ("user", "q"))
    assert column(example["messages"], "role") == list(roles)
    assert column(example["messages"], "content") == list(contents)
    assert said == []


def test_what_looks_like_input_and_is_not_used_is_named_once(tmp_path):
    row = dict(prompt="q", passage="short", remark="three words here", colour="red", tools="[]", source="a b c d")
    said = []
    data.read_examples(write(tmp_path / "d.jsonl", row, row), warn=said.append)
    where = f"{tmp_path}/d.jsonl:1"
    assert said == [
        f"{where}: the column 'passage' looks like input, and is not used",
        f"{where}: the column 'remark' looks like input, and is not used",
        f"{where}: no answer column is known among remark, colour; name yours",
    ]
    with pytest.warns(UserWarning, match="'passage' looks like input"):
        data.read_examples(write(tmp_path / "e.jsonl", dict(prompt="q", passage="p", answer="a")))
    said.clear()
    two = dict(question="q", instruction="Be brief.", answer="a")
    data.read_examples(write(tmp_path / "g.jsonl", two), warn=said.append)
    assert "the column 'instruction' looks like input" in said.pop() and said == []
    system = dict(messages=[dict(role="system", content="s"), *HI], system="t")
    data.read_examples(write(tmp_path / "f.jsonl", system), warn=said.append)
    assert "the column 'system' looks like input" in said[0]


def test_no_more_rows_are_read_than_the_limit(tmp_path):
    file = write(tmp_path / "d.jsonl", dict(prompt="a"), "{", dict(foo=1))
    assert column(data.read_examples(file, limit=1), "prompt") == ["a"]
    with pytest.raises(ValueError, match=r"d\.jsonl:2: not valid JSON"):
        data.read_examples(file, limit=2)


def test_a_json_file_may_hold_json_lines_or_one_row(tmp_path):
    lines = write(tmp_path / "a.json", dict(prompt="a"), "", dict(prompt="b"))
    assert column(data.read_examples(lines), "where") == [f"{lines}:1", f"{lines}:3"]
    assert len(data.read_examples(write(tmp_path / "b.json", dict(prompt="a")))) == 1
    (tmp_path / "c.json").write_text(json.dumps([dict(prompt="a"), dict(prompt="b")], indent=1))
    assert column(data.read_examples(tmp_path / "c.json"), "where") == [
        f"{tmp_path}/c.json: row 1",
        f"{tmp_path}/c.json: row 2",
    ]
    with pytest.raises(ValueError, match=r"d\.json:2: not valid JSON"):
        data.read_examples(write(tmp_path / "d.json", dict(prompt="a"), "{"))


def test_every_format_reads_the_same(tmp_path):
    rows = [dict(question=f"q{i}", answer=str(i)) for i in range(3)]
    lines = write(tmp_path / "a.jsonl", *rows).read_text()
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
    assert column(first, "prompt") == ["q0", "q1", "q2"]
    for other in others:
        for example, expected in zip(other, first, strict=True):
            assert {**example, "where": expected["where"]} == expected
    assert data.read_examples(tmp_path / "a.jsonl", limit=2) == first[:2]


def test_named_fields_and_own_ids(tmp_path):
    file = write(
        tmp_path / "d.jsonl", dict(task_id="t/1", frage="q", antwort=7), dict(task_id="t/2", frage="p", antwort=8)
    )
    examples = data.read_examples(file, prompt_field="frage", answer_field="antwort")
    assert column(examples, "id") == ["t/1", "t/2"] and column(examples, "prompt") == ["q", "p"]
    assert column(examples, "answer") == ["7", "8"]
    repeated = write(tmp_path / "e.jsonl", dict(id=5, prompt="a"), dict(id=5, prompt="b"))
    assert column(data.read_examples(repeated), "id") == [0, 1]
    assert column(data.read_examples(repeated, limit=1), "id") == [5]  # of the rows read, each is there once


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
        ([dict(question="q", answer=dict(value="4"))], r"d\.jsonl:1: field 'answer' must be text, .* found {'value'"),
        ([dict(question="q", answer=[2, 3])], r"d\.jsonl:1: field 'answer' must be text"),
        ([dict(question="q", answer=[])], r"d\.jsonl:1: field 'answer' must be text"),
        ([dict(question="q", answer=True)], r"d\.jsonl:1: field 'answer' must be text"),
        (
            [dict(question="q", choices=["a", "b"], answer=2)],
            r"d\.jsonl:1: field 'answer' is 2: none of the 2 choices",
        ),
        ([dict(question="q", history=["u"])], r"d\.jsonl:1: history must hold pairs"),
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
    assert len(examples) == count == len(set(column(examples, "id")))


# ----------------------------------------------------------------------------------------------------- trajectories

RECORD = dict(id=0, prompt_ids=[5, 6], response_ids=[7, 8, 1, 1], order=[2, 0, 3, 1], finished=True, correct=None)


def test_trajectories_of_several_files_are_sorted_by_id(tmp_path):
    write(tmp_path / "trajectories-00001.jsonl", {**RECORD, "id": 1})
    write(tmp_path / "trajectories-00000.jsonl", {**RECORD, "id": "a"}, {**RECORD, "id": 2})
    assert column(data.read_trajectories(tmp_path), "id") == [1, 2, "a"]
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
        (dict(response_ids=[7, 8, 1, -1]), "lists of ids"),
        (dict(step=[0], entropy=[], confidence=[0.5] * 4), "step must be a list of 4"),
        (dict(response_ids=[7, 8, 1, 99]), "token id 99, but the model has 18: trajectories of another model"),
        (dict(entropy=[0.5, None, 0, 0]), "entropy must be a list of 4 numbers"),
        (dict(correct="false"), "correct must be true, false or null, found 'false'"),
        (dict(finished=1), "finished must be true, false or null, found 1"),
        (dict(non_ltr=[4]), "non-left-to-right positions must be among 0 to 3"),
        (dict(response_ids=[7, 9, 1, 1]), "response token 1 is the mask token 9"),
        (dict(id=0), "id 0 appears twice, first at .*trajectories.jsonl:1"),
    ],
)
def test_bad_trajectories_are_named_by_line(tmp_path, change, message):
    write(tmp_path / "trajectories.jsonl", RECORD, {**RECORD, "id": 1, **change})
    with pytest.raises(ValueError, match=rf"trajectories\.jsonl:2: .*{message}"):
        data.read_trajectories(tmp_path, vocab_size=18, mask_id=9)
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
    for keep in ("correct", "finished", "all"):
        assert data.usable(record, keep) == (keep in kept)


def test_cut_at_eos_keeps_the_first_eos_and_numbers_the_order_anew():
    cut = data.cut_at_eos(RECORD, {1})
    assert (cut["response_ids"], cut["order"]) == ([7, 8, 1], [1, 0, 2])
    assert data.cut_at_eos(RECORD, {9}) is RECORD


def test_cut_at_eos_keeps_ties_and_cuts_what_belongs_to_tokens():
    record = dict(RECORD, response_ids=[7, 8, 5, 1, 1], order=[4, 4, -1, 2, 0], step=[4, 4, -1, 2, 0])
    record.update(entropy=[0.1, 0.2, 0.0, 0.3, 0.4], non_ltr=[1, 4])
    cut = data.cut_at_eos(record, {1, 5, 6})
    assert (cut["response_ids"], cut["order"]) == ([7, 8, 5], [0, 0, -1])
    assert (cut["step"], cut["entropy"], cut["non_ltr"]) == ([4, 4, -1], [0.1, 0.2, 0.0], [1])


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


def test_steps_with_ties_and_tokens_never_decoded_are_an_order(tmp_path):
    record = {**RECORD, "response_ids": [7, 8, 9, 1], "order": [3, 3, -1, 0]}
    (read,) = data.read_trajectories(write(tmp_path / "a.jsonl", record), mask_id=9)  # a mask that stayed is none
    assert read["order"] == [3, 3, -1, 0]


# -------------------------------------------------------------------------------------------------- the authors' files

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


def test_the_authors_rows_without_ids_or_with_a_short_order(letters, tmp_path):
    text = dict(question="What is 2 + 2?", answer="4", gen_text="Four.")
    file = write(tmp_path / "d.jsonl", text, {**AUTHORS, "decoding_order": [1, 0]}, {**AUTHORS, "decoding_order": None})
    first, *others = data.read_trajectories(file, tok=letters)
    assert letters.decode(first["response_ids"]) == "Four.<|im_end|><|endoftext|>"  # and not the answer "4"
    assert first["order"] == list(range(7)) and first["non_ltr"] is None
    assert column(others, "order") == [[0, 1, 2, 3]] * 2  # counts as decoded from left to right


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
    prompt = data.encode_prompt(letters, HI)
    ours = dict(RECORD, prompt="Hi", prompt_ids=prompt, text="x", step=[3, 0, 4, 1])
    row = data.to_release_format(ours, pad_id=256)
    assert len(row["response_token_ids"]) == len(row["decoding_order"]) == 256
    assert row["decoding_order"][:5] == [3, 0, 4, 1, -1] and row["non_ltr_positions"] == [0, 1, 2, 3]
    (record,) = data.read_trajectories(write(tmp_path / "d.jsonl", row), tok=letters)
    assert record["prompt_ids"] == prompt and record["response_ids"][:4] == RECORD["response_ids"]


def test_positions_that_were_not_decoded_after_their_left_neighbour():
    assert data.non_ltr_positions([0, 1, 2]) == []
    assert data.non_ltr_positions([2, 0, 1, 3]) == [0, 1, 3]
    assert data.non_ltr_positions([0, 0, 1]) == [1]  # together is not after
    assert data.non_ltr_positions([3, -1, 0]) == [0, 2]  # what was never decoded has no part, as a neighbour either


# ---------------------------------------------------------------------------------------------------------- batches


def test_collate_pads_prompts_left_and_responses_right():
    other = dict(prompt_ids=[4], response_ids=[9])  # an answer without an order counts as left to right
    batch = data.collate([RECORD, other], pad_id=2)
    assert batch["prompt_ids"].tolist() == [[5, 6], [2, 4]]
    assert batch["prompt_mask"].tolist() == [[1, 1], [0, 1]]
    assert batch["response_ids"].tolist() == [[7, 8, 1, 1], [9, 2, 2, 2]]
    assert batch["order"].tolist() == [[2, 0, 3, 1], [0, -1, -1, -1]]
    assert batch["length"].tolist() == [4, 1]


def test_collate_carries_entropies_of_all_and_positions_of_any():
    one = dict(RECORD, entropy=[0.5, 1.0, 1.5, 2.0], non_ltr=[0, 3])
    two = dict(prompt_ids=[4], response_ids=[9, 8], order=[1, -1])
    batch = data.collate([one, two], pad_id=2)
    assert batch["order"].tolist() == [[2, 0, 3, 1], [1, -1, -1, -1]] and "entropy" not in batch
    assert batch["non_ltr"].tolist() == [[True, False, False, True], [True, False, False, False]]
    batch = data.collate([one, dict(two, entropy=[1, 2])], pad_id=2)
    assert batch["entropy"].tolist() == [[0.5, 1.0, 1.5, 2.0], [1.0, 2.0, 0.0, 0.0]]
    assert "non_ltr" not in data.collate([RECORD, two], pad_id=2)


def test_orders_and_generators_follow_from_their_keys_alone():
    assert data.epoch_order(50, 0, 1) == data.epoch_order(50, 0, 1)
    assert sorted(data.epoch_order(50, 0, 1)) == list(range(50))
    assert data.epoch_order(50, 0, 1) != data.epoch_order(50, 0, 2) != data.epoch_order(50, 1, 2)
    torch.manual_seed(1)
    a = torch.rand(4, generator=data.generator(0, 1, "x"))
    torch.manual_seed(2)
    assert torch.equal(a, torch.rand(4, generator=data.generator(0, 1, "x")))
    assert not torch.equal(a, torch.rand(4, generator=data.generator(0, 1, "y")))


def test_a_question_without_an_answer_is_a_row_like_any_other(tmp_path):
    rows = [
        dict(question="Who?", context="Ann.", answers=dict(text=["Ann"])),
        dict(question="Why?", answers=dict(text=[])),
    ]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    answers = [e["answer"] for e in data.read_examples(tmp_path / "d.jsonl", warn=lambda line: None)]
    assert answers == [["Ann"], None]
