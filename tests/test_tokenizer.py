"""Tokenizers, chat templates, prompts and answers: python -m pytest tests/test_tokenizer.py

The real vocabulary is read from beside the folder that TABOM_DATA names, and skipped without it.
"""

import json
import os
import shutil
import subprocess
import sys

import pytest
import tokenizers
from helpers import ROOT
from letters import CHATML, HI, NAMES, REAL, SPECIAL, TRIMMED, VOCABULARY, column, rows_of, write, write_bytes_tokenizer

import data
import tokenizer
from experiments import tiny as tiny_model


@pytest.fixture(scope="module")
def dream():
    if not VOCABULARY.is_dir():
        pytest.skip("TABOM_DATA has no Dream vocabulary beside it")
    return tokenizer.load(VOCABULARY)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    tiny_model.write_start(folder, 0)
    return folder


@pytest.fixture
def letters(tmp_path):
    return tokenizer.load(write_bytes_tokenizer(tmp_path / "letters"))


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
    ids = tokenizer.encode_answer(dream, [{"role": "user", "content": "Hi"}], "Hello")
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
    tok = tokenizer.Tokenizer(dream.backend, dream.special, LLADA)
    assert tokenizer.encode_answer(tok, [{"role": "user", "content": "Hi"}], "Hello") == [9707, 151645, 151643]
    assert tokenizer.encode_answer(dream, [{"role": "user", "content": "Hi"}], "Hello", raw=True) == [9707, 151643]
    with pytest.raises(ValueError, match="an empty prompt"):
        tokenizer.encode_prompt(dream, [{"role": "user", "content": ""}], raw=True)


def test_tiny_tokenizer_round_trips_and_refuses_what_it_cannot_spell(tiny):
    tok = tokenizer.load(tiny)
    text = "L12..ab"
    assert tok.decode(tok.encode(text)) == text
    assert tok.encode("1<|mask|>") == [tok.ids["1"], tok.ids["<|mask|>"]]
    assert tokenizer.encode_answer(tok, [{"role": "user", "content": "L."}], "12") == [
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
    assert [len(tokenizer.load(tmp_path / "M").encode("1" * n)) for n in (3, 20)] == [3, 20]


def test_chat_template_is_sandboxed_and_its_errors_are_ours(tiny):
    tok = tokenizer.load(tiny)
    for template in (
        "{{ ''.__class__.__mro__ }}",
        "{{ raise_exception('no') }}",
        "{% for",
        "{{ messages[9].content }}",
    ):
        bad = tokenizer.Tokenizer(tok.backend, tok.special, template)
        with pytest.raises(ValueError, match="chat template cannot render"):
            bad.chat([{"role": "user", "content": "x"}])
    with pytest.raises(ValueError, match="no chat_template"):
        tokenizer.Tokenizer(tok.backend, tok.special, None).chat([])


def test_chat_template_file_wins_and_sees_special_tokens(tiny, tmp_path):
    for file in tiny.glob("tokenizer*.json"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "chat_template.jinja").write_text("{{ eos_token }}{% if add_generation_prompt %}L{% endif %}")
    tok = tokenizer.load(tmp_path)
    assert (tok.chat([]), tok.chat([], add_generation_prompt=False)) == ("<|endoftext|>L", "<|endoftext|>")


def test_tokenizer_errors(tiny, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no tokenizer\.json"):
        tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="cannot be read"):
        tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes((tiny / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(dict(added_tokens_decoder={"99": {"content": "<x>"}})))
    with pytest.raises(ValueError, match="<x> should have id 99, the vocabulary puts it at 18"):
        tokenizer.load(tmp_path)


def test_every_token_that_ends_a_response_is_in_one_set(tmp_path):
    folder = write_bytes_tokenizer(tmp_path / "M", {**SPECIAL, "pad_token": "<|pad|>"})
    tok = tokenizer.load(folder, eos_id=70, mask_id=259)
    assert tok.stop_ids == {256, 258, 260, 70}
    assert (tok.eos_id, tok.pad_id, tok.mask_id) == (256, 260, 259)
    answer = tok.encode("4") + [258, 260, 260]  # the end of the turn, and then padding
    assert tokenizer.first_end(answer, tok.stop_ids) == 1 and tok.response_text(answer) == "4"
    assert tokenizer.first_end(answer[:1], tok.stop_ids) == 1  # nothing ends it: its length
    folder = write_bytes_tokenizer(tmp_path / "N", dict(pad_token="<|mask|>"))
    tok = tokenizer.load(folder, eos_id=256, mask_id=259)
    assert tok.stop_ids == {256, 258} and tok.eos_id == 256  # a mask never ends anything; the config has the EOS
    assert tokenizer.encode_answer(tok, HI, "4")[-2:] == [258, 256]


def test_what_cannot_be_spelled_as_text_is_an_error(tiny, tmp_path):
    tok = tokenizer.load(tiny)
    file = write(tmp_path / "d.jsonl", dict(prompt="L.", answer="1"), dict(prompt="L.", answer="1<|mask|>"))
    examples = data.read_examples(file)
    with pytest.raises(ValueError, match=r"d\.jsonl:2: the tokenizer cannot encode"):
        tokenizer.encode_examples(tok, examples, answers=True)
    tokenizer.encode_examples(tok, examples)
    assert examples[1]["prompt_ids"] == tok.encode("L.") and "response_ids" not in examples[1]
    with pytest.raises(ValueError, match=r"e\.jsonl:1: the row has no answer"):
        tokenizer.encode_examples(tok, data.read_examples(write(tmp_path / "e.jsonl", dict(prompt="L."))), answers=True)


def test_the_end_of_the_turn_is_trained_where_the_template_does_not_repeat_its_prompt(tmp_path):
    think = CHATML.replace("assistant\n{% endif", "assistant\n<think>\n\n</think>\n\n{% endif")
    tok = tokenizer.load(write_bytes_tokenizer(tmp_path / "M", template=think))
    assert tok.decode(tokenizer.encode_answer(tok, HI, "Hello")) == "Hello<|im_end|><|endoftext|>"
    quoting = tokenizer.encode_answer(tok, HI, "a<|im_end|>b")
    assert tok.decode(quoting) == "a<|im_end|>b<|im_end|><|endoftext|>" and quoting[-2:] == [258, 256]


def test_the_start_of_an_answer_is_continued(letters, tmp_path):
    assert letters.chat(HI, prefix="Code:\n") == letters.chat(HI) + "Code:\n"
    assert letters.chat(HI, prefix=" \n") == letters.chat(HI) + " \n"
    assert letters.chat(HI, prefix="|>") == letters.chat(HI) + "|>"  # and not the |> that ends the turn
    ids = tokenizer.encode_prompt(letters, HI, prefix="<|mask|>")
    assert letters.decode(ids) == letters.chat(HI) + "<|mask|>" and 259 not in ids
    for template in (TRIMMED, TRIMMED.replace("{% if add_generation_prompt %}", "").removesuffix("{% endif %}")):
        trimmed = tokenizer.Tokenizer(letters.backend, dict(bos_token="<s>"), template)
        start = (
            "<s><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|><|start_header_id|>assistant<|end_header_id|>"
        )
        assert trimmed.chat(HI, prefix="Code:\n") == f"{start}\n\nCode:"
    deaf = tokenizer.Tokenizer(letters.backend, {}, "{{ messages[0].content }}")
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
    llada = tokenizer.Tokenizer(dream.backend, {**dream.special, "bos_token": "<|startoftext|>"}, TRIMMED)
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
    ids = tokenizer.encode_prompt(letters, messages, max_tokens=around + 5)
    assert letters.decode(ids).endswith("user\n0123<|im_end|>\n<|im_start|>assistant\n")  # one less than would fit
    assert tokenizer.encode_prompt(letters, messages, max_tokens=around + 11) == whole
    assert len(tokenizer.encode_prompt(letters, messages, raw=True, max_tokens=3)) == 3
    with pytest.raises(ValueError, match=f"takes {around} of at most"):
        tokenizer.encode_prompt(letters, messages, max_tokens=around + 1)
    robots = [dict(role="user", content="🤖" * 5)]  # four bytes each: none is cut in two
    text = letters.decode(tokenizer.encode_prompt(letters, robots, max_tokens=len(letters.encode_chat(robots)) - 5))
    assert text.count("🤖") == 3 and "\ufffd" not in text


def test_templates_may_call_what_transformers_gives_them(letters):
    def render(template, messages=HI):
        return tokenizer.Tokenizer(letters.backend, letters.special, template).chat(messages)

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


def test_a_copy_of_the_file_alone_encodes_prompts_and_says_what_quotes_need(tmp_path):
    write_bytes_tokenizer(tmp_path / "M")
    shutil.copyfile(ROOT / "tokenizer.py", tmp_path / "tokenizer.py")
    program = (
        "import tokenizer\n"
        "tok, said = tokenizer.load('M'), ['Hi', 'What is <|im_end|>?']\n"
        "for text in said:\n"
        "    try:\n"
        "        messages = [tokenizer.message('user', text)]\n"
        "        ids = tokenizer.encode_prompt(tok, messages)\n"
        "        print(len(ids), tok.decode(tokenizer.encode_answer(tok, messages, 'Hello', raw=True)))\n"
        "    except ValueError as e:\n"
        "        print('error:', e)\n"
    )
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    tok = tokenizer.load(tmp_path / "M")
    length = len(tokenizer.encode_prompt(tok, HI))
    assert done.stdout.splitlines() == [
        f"{length} Hello<|endoftext|>",
        "error: a text quotes a special token: spelling it needs formats/ beside tokenizer.py",
    ]


def test_named_templates_and_other_files_are_read(tmp_path):
    named = [dict(name="tool_use", template="t"), dict(name="default", template="d")]
    folder = write_bytes_tokenizer(tmp_path / "M", template=named)
    assert tokenizer.load(folder).chat(HI) == "d"
    folder = write_bytes_tokenizer(tmp_path / "N", {}, added=False, template=None)
    (folder / "added_tokens.json").write_text(json.dumps(dict(zip(NAMES, range(256, 261)))))
    as_dict = dict(SPECIAL, eos_token=dict(content="<|endoftext|>"))
    (folder / "special_tokens_map.json").write_text(json.dumps(as_dict))
    (folder / "chat_template.json").write_text(json.dumps(dict(chat_template="j")))
    tok = tokenizer.load(folder)
    assert (tok.eos_id, tok.mask_id, tok.encode("<|im_start|>")) == (256, 259, [257])
    assert tok.chat(HI) == "j" and max(tok.encode_text("<|im_end|>")) < 256
    (folder / "added_tokens.json").write_text(json.dumps({"<|x|>": 300}))
    with pytest.raises(ValueError, match=r"added_tokens\.json: <\|x\|> should have id 300"):
        tokenizer.load(folder)


def test_two_tokens_with_one_id_are_refused(tmp_path):
    folder = write_bytes_tokenizer(tmp_path / "M")
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text())
    content["model"]["vocab"]["two"] = 65
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"M: .*'two'.* have one id, 65"):
        tokenizer.load(folder)
    folder = write_bytes_tokenizer(tmp_path / "N")
    (folder / "added_tokens.json").write_text(json.dumps({"<a>": 261, "<b>": 261}))
    with pytest.raises(ValueError, match=r"added_tokens\.json: '<a>' and '<b>' have one id, 261"):
        tokenizer.load(folder)


def test_a_template_that_leaves_out_what_the_user_says_is_refused(letters):
    def encode(template, messages=HI):
        tok = tokenizer.Tokenizer(letters.backend, letters.special, template)
        return tok.decode(tokenizer.encode_prompt(tok, messages))

    talk = [dict(role="user", content="first"), dict(role="assistant", content="yes"), dict(role="user", content="Hi")]
    with pytest.raises(ValueError, match="leaves out what the user says: 'Hi'"):
        encode("{% for m in messages %}{{ m.role }}{% endfor %}")
    with pytest.raises(ValueError, match="leaves out what the user says: 'first'"):
        encode("{{ messages[-1].content }}", talk)
    with pytest.raises(ValueError, match="leaves out what the user says"):
        encode("{{ messages[0].text }}x")
    assert encode("{{ messages[0].content | upper }}") == "HI"  # written in another way
    assert encode(TRIMMED.replace("bos_token", "''"), [dict(role="user", content=" Hi ")]).count("Hi") == 1


def test_a_declared_token_must_be_in_the_vocabulary(tmp_path):
    folder = write_bytes_tokenizer(tmp_path / "M", added=False)
    with pytest.raises(ValueError, match="eos_token '<|endoftext|>' is not in the tokenizer's vocabulary"):
        tokenizer.load(folder)
    config = dict(additional_special_tokens=["<|MASK|>"])  # Dream lists one that it lacks, and never uses it
    assert tokenizer.load(write_bytes_tokenizer(tmp_path / "N", config)).eos_id is None


def test_byte_order_marks_are_no_text(tmp_path):
    folder = write_bytes_tokenizer(tmp_path / "M")
    (folder / "chat_template.jinja").write_text("j")
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    (tmp_path / "Q").mkdir()
    (tmp_path / "Q" / "vocab.json").write_text(json.dumps(dict(zip([*letters, "ab"], range(257)))))
    (tmp_path / "Q" / "merges.txt").write_text("#version: 0.2\na b\n")
    for file in [*folder.iterdir(), *(tmp_path / "Q").iterdir()]:
        file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert tokenizer.load(folder).chat(HI) == "j"
    assert tokenizer.load(tmp_path / "Q").encode("abc") == [256, letters.index("c")]
    for name in ("d.jsonl", "d.json"):
        (tmp_path / name).write_bytes(b'\xef\xbb\xbf{"prompt": "a"}\n{"prompt": "b"}\n')
        assert column(data.read_examples(tmp_path / name), "prompt") == ["a", "b"]
    (tmp_path / "list.json").write_bytes(b'\xef\xbb\xbf[{"prompt": "a"}]')
    assert len(data.read_examples(tmp_path / "list.json")) == 1


@pytest.mark.parametrize(
    "response, order, finished",
    [
        ([5, 1, 1], [0, 1, 2], True),
        ([5, 6, 7], [0, 1, 2], False),
        ([5, 1, 1], [0, 1, -1], True),
        ([5, 9, 1], [0, -1, 1], False),  # behind a mask
        ([5, 6, 1], [0, 1, -1], False),  # padding
    ],
)
def test_what_finishes_a_response_was_decoded_with_no_mask_before_it(response, order, finished):
    assert tokenizer.is_finished(response, order, {1}) is finished
