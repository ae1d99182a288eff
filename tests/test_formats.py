"""Datasets in other forms, and special tokens that a text only quotes: python -m pytest tests/test_formats.py

The real benchmarks are read from the folder that TABOM_DATA names, and skipped without it.
"""

import json

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from letters import CHATML, HI, LETTERS, NAMES, REAL, column, needs_data, special_ids, write, write_bytes_tokenizer

import data
import tokenizer


@pytest.fixture
def letters(tmp_path):
    return tokenizer.load(write_bytes_tokenizer(tmp_path / "letters"))


def test_a_token_stays_as_it_was_added_when_it_is_known_to_be_special(letters):
    backend = letters.backend
    backend.add_tokens([tokenizers.AddedToken("<|eot_id|>", lstrip=True), tokenizers.AddedToken("<think>")])
    tok = tokenizer.Tokenizer(backend, letters.special, CHATML, eos_id=262)
    assert tok.encode("a  <|eot_id|>") == [*tok.encode("a"), 261]  # it takes the space before it
    assert tok.stop_ids == {256, 258, 261, 262}
    assert max(tok.encode_text("<|eot_id|><think>")) < 256


@pytest.mark.parametrize("name", NAMES)
def test_a_quoted_special_token_is_text_in_prompts_and_answers(letters, name):
    messages = [dict(role="user", content=f"What is {name}?")]
    prompt = tokenizer.encode_prompt(letters, messages)
    assert letters.decode(prompt) == letters.chat(messages)
    assert special_ids(prompt) == [257, 258, 257]  # the template's own, and no other
    answer = tokenizer.encode_answer(letters, messages, f" {name} is one{name}")
    assert letters.decode(answer) == f" {name} is one{name}<|im_end|><|endoftext|>"
    assert special_ids(answer) == [258, 256] == answer[-2:]
    assert max(tokenizer.encode_prompt(letters, messages, raw=True)) < 256
    assert tokenizer.encode_answer(letters, messages, name, raw=True)[:-1] == letters.encode_text(name)
    assert letters.encode(name) == [256 + NAMES.index(name)]  # what is not quoted is the token itself


@settings(deadline=None)
@given(st.lists(st.sampled_from([*NAMES, "a", " ", "<|", "|>", "im_end", "\n", "é", "\ufdd0"]), max_size=8))
def test_no_content_becomes_a_special_token(parts):
    content = "".join(parts)
    text, quoted = LETTERS().render([dict(role="user", content=content)])
    ids = LETTERS().encode(text, quoted)
    assert text == f"<|im_start|>user\n{content}<|im_end|>\n<|im_start|>assistant\n"
    assert LETTERS().decode(ids) == text and special_ids(ids) == [257, 258, 257]


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
    (dict(instruction="double", input=21, output="42"), "double\n21", "42"),
    (dict(question="q", context="c", answers=dict(text=["a", "b"], answer_start=[1, 2])), "c\n\nq", ["a", "b"]),
    (dict(question="q", context=["c", "d"], answer=["a", "b"]), "c\nd\n\nq", ["a", "b"]),
    (dict(question="q", answer=18), "q", "18"),
    (dict(question="q", answer=0.5), "q", "0.5"),
    (dict(question="q", context=1e16, answer=0.00005), "10000000000000000\n\nq", "0.00005"),
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
    (dict(question="q", options=dict(A="x", B="y", C=None), answer="B"), "q\nA. x\nB. y", "B"),  # of a table
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


def test_an_answer_beside_that_of_a_conversation_is_said(tmp_path):
    row, said = dict(messages=[*HI, dict(role="assistant", content="4")], answer="5"), []
    file = write(tmp_path / "d.jsonl", row, row, dict(row, answer="4"))
    assert column(data.read_examples(file, warn=said.append), "answer") == ["4", "4", "4"]
    assert len(said) == 1 and "the column 'answer' is not used: the conversation ends with an answer" in said[0]
    said.clear()
    assert column(data.read_examples(file, answer_field="answer", warn=said.append), "answer") == ["5", "5", "4"]
    assert said == []


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


@needs_data
@pytest.mark.parametrize(
    "name, count",
    [("gsm8k_test", 1319), ("math500", 500), ("HumanEval", 164), ("mbpp", 974), ("ifeval", 541)],
)
def test_real_benchmarks_are_recognised(name, count):
    examples = data.read_examples(REAL / f"{name}.jsonl.gz")
    assert len(examples) == count == len(set(column(examples, "id")))


def test_a_question_without_an_answer_is_a_row_like_any_other(tmp_path):
    rows = [
        dict(question="Who?", context="Ann.", answers=dict(text=["Ann"])),
        dict(question="Why?", answers=dict(text=[])),
    ]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    answers = [e["answer"] for e in data.read_examples(tmp_path / "d.jsonl", warn=lambda line: None)]
    assert answers == [["Ann"], None]


# --------------------------------------------------------------------------------------------- parts of a conversation


def say(role, content="x", **more):
    return dict(role=role, content=content, **more)


CALL = [dict(id="c", type="function", function=dict(name="f", arguments="{}"))]


@pytest.mark.parametrize("part", ["tool_calls", "function_call", "reasoning_content"])
def test_parts_of_a_message_that_are_not_used_are_said_once_per_kind(tmp_path, part):
    said, row = [], dict(messages=[say("user"), say("assistant", "a", **{part: CALL})])
    middle = dict(messages=[say("user"), say("assistant", "b", **{part: "t"}), say("user")], answer="c")
    examples = data.read_examples(write(tmp_path / "d.jsonl", row, row, middle), warn=said.append)
    assert column(examples, "answer") == ["a", "a", "c"]
    assert said == [f"{tmp_path}/d.jsonl:1: {part} of a message is not used"]
    said.clear()
    empty = dict(messages=[say("user"), say("assistant", "a", **{part: None})])
    data.read_examples(write(tmp_path / "e.jsonl", empty), warn=said.append)
    assert said == []


@pytest.mark.parametrize("content", ["", " \n", None, [dict(type="text", text="")]])
@pytest.mark.parametrize("more", [{}, dict(tool_calls=CALL), dict(function_call=CALL[0])])
@pytest.mark.parametrize("after", [[], [say("user")]])
def test_an_assistant_that_says_nothing_is_an_error_of_its_row(tmp_path, content, more, after):
    good, bad = [say("user"), say("assistant")], [say("user"), say("assistant", content, **more), *after]
    file = write(tmp_path / "d.jsonl", dict(messages=good), dict(messages=bad))
    with pytest.raises(ValueError, match=r"d\.jsonl:2: a turn of the assistant has no content: {'role': 'assistant'"):
        data.read_examples(file)


def test_a_turn_of_weight_0_is_no_answer(tmp_path, letters):
    said, talk = [], [say("user", "q"), say("assistant", "a", weight=0)]
    examples = data.read_examples(write(tmp_path / "d.jsonl", dict(messages=talk)), warn=said.append)
    assert examples[0]["answer"] is None and examples[0]["messages"] == [say("user", "q")]
    assert said == [f"{tmp_path}/d.jsonl:1: an answer of weight 0 is not trained on, and is no answer"]
    with pytest.raises(ValueError, match=r"d\.jsonl:1: the row has no answer to train on"):
        tokenizer.encode_examples(letters, examples, answers=True)
    said.clear()
    whole = [*talk, say("user", "r"), say("assistant", "b", weight=1)]  # what comes before is only read
    (example,) = data.read_examples(write(tmp_path / "e.jsonl", dict(messages=whole)), warn=said.append)
    assert (example["answer"], said) == ("b", []) and len(example["messages"]) == 3
    prompt = dict(prompt=[say("user", "q")], completion=talk[1:])
    assert data.read_examples(write(tmp_path / "f.jsonl", prompt), warn=said.append)[0]["answer"] is None
    assert len(said) == 1


FOREIGN = [
    (dict(prompt=[say("user", "q")], completion=[say("assistant", "a")]), "q", "a"),
    (dict(prompt=[say("system", "s"), say("user", "q")], chosen=[say("user", "q"), say("assistant", "a")]), "q", None),
    (dict(prompt=[say("user", "q")], chosen=[say("user", "q"), say("assistant", "a")], rejected=[]), "q", "a"),
    (dict(prompt="q", completion=[say("assistant", "a")]), "q", "a"),
    (dict(messages=[say("developer", "d"), say("user", "q")]), "q", None),
    (dict(messages=[say("HUMAN", "q"), say("ASSISTANT", "a")]), "q", "a"),
    (dict(conversations=[dict(human="q", assistant="a")]), "q", "a"),
    (dict(Question="q", Answer="a"), "q", "a"),
    (dict(HUMAN="q", ASSISTANT="a"), "q", "a"),
    (dict(QUESTION="q", Choices=["x", "y"], answerkey="B"), "q\nA. x\nB. y", "B"),
    (dict(question="q", answer=["", ""]), "q", None),
    (dict(question="q", answer=["", "a"]), "q", ["a"]),
    (dict(question="q", answer=" "), "q", None),
    (dict(question="q", answers=dict(text=[""])), "q", None),
]


@pytest.mark.parametrize("row, prompt, answer", FOREIGN)
def test_what_other_tools_write_is_read(tmp_path, row, prompt, answer):
    file, said = write(tmp_path / "d.jsonl", row), []
    if answer is None and "chosen" in row:  # the answer has a prompt of its own
        with pytest.raises(ValueError, match=r"d\.jsonl:1: an answer must be one turn of the assistant"):
            data.read_examples(file)
        return
    (example,) = data.read_examples(file, warn=said.append)
    assert (example["prompt"], example["answer"], said) == (prompt, answer, [])
    assert set(column(example["messages"], "role")) <= {"system", "user"}


def test_an_answer_field_may_lie_inside_a_column(tmp_path):
    row = dict(prompt=[say("user", "q")], reward_model=dict(ground_truth="4", style="rule"), data_source="x")
    file, said = write(tmp_path / "d.jsonl", row), []
    (example,) = data.read_examples(file, answer_field="reward_model.ground_truth", warn=said.append)
    assert (example["prompt"], example["answer"], said) == ("q", "4", [])
    dotted = write(tmp_path / "e.jsonl", {"a.b": "column", "a": {"b": "inside"}, "extra": {"ask": "q"}})
    (example,) = data.read_examples(dotted, "extra.ask", "a.b", warn=said.append)
    assert (example["prompt"], example["answer"]) == ("q", "column")
    with pytest.raises(ValueError, match=r"d\.jsonl:1: field 'reward_model\.truth' is missing"):
        data.read_examples(file, answer_field="reward_model.truth")
    kept = write(tmp_path / "f.jsonl", dict(Question="q", Answer="a"))
    assert data.read_examples(kept, "Question", "Answer")[0]["answer"] == "a"
