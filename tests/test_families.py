"""SDAR's and A2D's tokenizers, benchmarks, and the whole method on tiny models: python -m pytest tests/test_families.py

Tests on the real vocabulary read the folder beside TABOM_DATA, and skip without it."""

import functools
import gzip
import itertools
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers import FOLDER, decoded, meta, run, weights, write_lines

import data
import evaluate
import tokenizer
from benchmarks import gsm8k, humaneval, math500, mbpp
from release import published
from runs import loading

BESIDE = Path(os.environ.get("TABOM_DATA", "no-such-folder")).parent / "golden"

# Written with the logic of Qwen3's template, without its tools: thoughts of earlier turns are dropped, the last turn
# of the assistant always shows one, and enable_thinking = false closes it in the prompt.
QWEN3 = """{%- set ns = namespace(last=-1) %}
{%- for m in messages %}{%- if m.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}
{%- for m in messages %}
    {%- set content = m.content %}
    {%- if m.role == 'assistant' %}
        {%- set thought = '' %}
        {%- if '</think>' in content %}
            {%- set thought = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last and (loop.last or thought) %}
            {%- set content = '<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') %}
        {%- endif %}
    {%- endif %}
    {{- '<|im_start|>' + m.role + '\\n' + content + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}"""
ADDED = """<|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|> <|box_start|> <|box_end|>
    <|quad_start|> <|quad_end|> <|vision_start|> <|vision_end|> <|vision_pad|> <|image_pad|> <|video_pad|> <tool_call>
    </tool_call> <|fim_prefix|> <|fim_middle|> <|fim_suffix|> <|fim_pad|> <|repo_name|> <|file_sep|> <tool_response>
    </tool_response> <think> </think>""".split()  # from 151643 on
PLAIN = {"<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>"}
HI = [dict(role="user", content="Hi")]


def write_qwen3(folder, family):
    """A folder with the files of SDAR's or A2D's tokenizer, and what else of the Hub's it reads."""
    source = BESIDE / "dream-tokenizer"
    if not source.is_dir():
        pytest.skip("TABOM_DATA has no vocabulary of Qwen2 beside it")
    folder.mkdir()
    for name in ("vocab.json", "merges.txt"):
        shutil.copyfile(source / name, folder / name)
    mask = {"sdar": "<|MASK|>", "a2d-qwen3": "<|mask|>"}[family]
    decoder = {}
    for i, token in enumerate([*ADDED, mask], 151643):
        decoder[str(i)] = dict(content=token, special=token not in PLAIN, normalized=False)
    tokenizer = dict(added_tokens_decoder=decoder, mask_token=mask, pad_token="<|endoftext|>", chat_template=QWEN3)
    tokenizer["eos_token"] = {"sdar": "<|endoftext|>", "a2d-qwen3": "<|im_end|>"}[family]
    old = dict(mask_token="<MASK>") if family == "sdar" else {}  # as SDAR's other files call it
    added = {**dict(zip(ADDED, range(151643, 151669))), old.get("mask_token", mask): 151669}
    files = {"tokenizer_config": tokenizer, "special_tokens_map": old, "added_tokens": added}
    files["config"] = dict(model_type=family)
    if family == "sdar":
        files["generation_config"] = dict(eos_token_id=[151645, 151643], temperature=0.6)
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """model_type -> tokenizer, of a folder alone."""
    found, folder = {}, tmp_path_factory.mktemp("tokenizers")
    for family in ("sdar", "a2d-qwen3"):
        found[family] = tokenizer.load(write_qwen3(folder / family, family))
    return found


# --------------------------------------------------------------------------------------------------- tokenizers, chats

THOUGHT = [151667, 271, 151668, 271]  # <think>, a blank line, </think>, a blank line
PROMPT = [151644, 872, 198, 13048, 151645, 198, 151644, 77091, 198]


def test_special_ids(tokenizers):
    sdar, a2d = tokenizers["sdar"], tokenizers["a2d-qwen3"]
    assert (sdar.eos_id, sdar.pad_id, sdar.mask_id) == (151643, 151643, 151669)
    assert (a2d.eos_id, a2d.pad_id, a2d.mask_id) == (151645, 151643, 151669)
    for tok in (sdar, a2d):
        assert tok.stop_ids == {151643, 151645} and tok.size == 151670
        assert tok.unused_ids(151936) == list(range(151670, 151936))
    assert sdar.encode("<|MASK|>") == [151669] and 151669 not in sdar.encode("<MASK>")


def test_only_the_prompts_of_a2d_end_with_an_empty_thought(tokenizers):
    assert tokenizer.encode_prompt(tokenizers["sdar"], HI) == PROMPT
    assert tokenizer.encode_prompt(tokenizers["a2d-qwen3"], HI) == PROMPT + THOUGHT
    code = "```python\n"
    for tok in tokenizers.values():
        assert tok.chat(HI, prefix=code) == tok.chat(HI) + code  # nor does it come before a given start


def test_an_answer_has_no_empty_thought(tokenizers):
    talk = [*HI, dict(role="assistant", content="Hello"), *HI]
    for tok in tokenizers.values():
        for messages in (HI, talk):
            assert tokenizer.encode_answer(tok, messages, "Hello") == [9707, 151645]
        assert tok.chat(talk).count("<think>") == tok.chat(HI).count("<think>")
        quoting = tokenizer.encode_answer(tok, HI, "a<|im_end|>b")
        assert tok.decode(quoting) == "a<|im_end|>b<|im_end|>" and quoting.count(151645) == 1
    own = "<think>\nwell\n</think>\n\nHello"  # a thought that the dataset has stays
    assert tokenizers["sdar"].decode(tokenizer.encode_answer(tokenizers["sdar"], HI, own)) == own + "<|im_end|>"


def test_a_list_of_ends_in_generation_config(tmp_path):
    folder = write_qwen3(tmp_path / "M", "sdar")
    (folder / "generation_config.json").write_text(json.dumps(dict(eos_token_id=[151662, 151643, 999999])))
    assert tokenizer.load(folder).stop_ids == {151643, 151645, 151662}  # the last one is no token
    (folder / "generation_config.json").write_text(json.dumps(dict(eos_token_id=2)))  # one id is the config's affair
    assert tokenizer.load(folder).stop_ids == {151643, 151645}


def test_the_prompts_that_the_real_model_was_given(tokenizers):
    file = BESIDE / "a2d-tiny" / "real.json"
    if not file.is_file():
        pytest.skip("TABOM_DATA has no real.json of A2D beside it")
    cases = json.loads(file.read_text())["cases"]
    assert len(cases) == 6
    for case in cases:
        assert tokenizer.encode_prompt(tokenizers["a2d-qwen3"], case["messages"]) == case["prompt_ids"]


# ----------------------------------------------------------------------------------------------------------- benchmarks


def preset(task, family, blocks, folder, **flags):
    config = SimpleNamespace(family=family, block_length=blocks)
    loaded = loading.Loaded(SimpleNamespace(config=config), None, folder)
    found = evaluate.task_settings(evaluate.EvaluateOptions(**flags), task, loaded)
    return [found[name] for name in ("schedule", "temperature", "max_new_tokens", "steps", "block_length")]


@pytest.mark.parametrize("task", evaluate.TASKS)
def test_settings_of_each_family(task, tmp_path):
    for protocol in ("paper", "official"):
        of_dllm = functools.partial(preset, task, "a2d", folder=tmp_path, protocol=protocol)
        assert of_dllm(None) == ["a2d", 0.0, 256, 256, 256]
        assert of_dllm(32) == ["a2d", 0.0, 256, 256, 32]
        assert of_dllm(None, block_length=64) == ["a2d", 0.0, 256, 256, 64]
    official = preset(task, "sdar", 4, tmp_path, protocol="official")
    assert official == ["sdar", 0.0, 4096, 4096, 4]
    dream = evaluate.TASKS[task].settings("dream")["max_new_tokens"]  # the paper has no SDAR: Dream's lengths
    assert preset(task, "sdar", 8, tmp_path) == ["sdar", 0.0, dream, dream, 8]


def test_the_authors_code_has_no_such_family():
    loaded = SimpleNamespace(m=SimpleNamespace(config=SimpleNamespace(family="sdar", raw={})))
    wanted = "--protocol release: the authors' code has LLaDA-8B-Instruct and Dream-v0-Instruct-7B, no sdar model"
    with pytest.raises(ValueError, match=wanted):
        published.check_model(evaluate.EvaluateOptions(model="M", protocol="release"), loaded, print)


def test_t3d_asks_for_a_box_and_grades_it():
    question = "How many?\nPlease reason step by step, and put your final answer within \\boxed{}."
    assert gsm8k.ask(dict(question="How many?"), "sdar", "official") == (question, "")
    assert math500.ask(dict(problem="How many?"), "sdar", "official") == (question, "")
    for response, correct in ((r"so \boxed{1,072}. Or 3", True), (r"\boxed{3}, \boxed{1072}", True), ("1072", False)):
        assert gsm8k.grade(dict(answer="#### 1072"), response, "sdar", "official")["correct"] is correct
    for box in (r"\text{1072 dollars}", "1{,}072", r"x = 1072", r"1072\ \text{km}^2"):  # braces in braces, units
        assert gsm8k.grade(dict(answer="#### 1072"), rf"\boxed{{3}} \boxed{{{box}}}", "sdar", "official")["correct"]
    assert not gsm8k.grade(dict(answer="#### 1072"), r"\boxed{1072", "sdar", "official")["correct"]  # cut short
    for box, correct in (
        (r"\frac{36}{2}", True),
        ("18.0", True),
        ("10 + 8", True),
        (r"\frac{18}{4}", False),
        ("18 - x", False),
    ):
        assert gsm8k.grade(dict(answer="#### 18"), rf"\boxed{{{box}}}", "sdar", "official")["correct"] is correct, box
    assert gsm8k.grade(dict(answer="#### 1072"), "1072", "sdar")["correct"]
    assert math500.trim("a Problem: b", "sdar", "official") == "a Problem: b"


def test_t3d_asks_for_a_block_of_code_and_runs_the_last():
    head = 'def one(x):\n    """One."""\n'
    record = dict(prompt=head, entry_point="one", test="def check(f):\n    assert f(2) == 1\n")
    text, start = humaneval.ask(record, "sdar", "official")
    asked = "Place your code within a single Python code block ```python ```. Do not include more than one code block. "
    assert (text, start) == (f"This is the problem:\n{head}\n{asked}", f"```python\n{head}")
    assert humaneval.program(record, "    return 1\n```\nDone.", "sdar", "official")[0] == head + "    return 1\n"
    again = "    return 2\n```\nNo:\n```python\ndef one(x):\n    return 1\n```"
    assert humaneval.program(record, again, "sdar", "official")[0] == "def one(x):\n    return 1\n"

    code = "import re\ndef half(x):\n    return x\ndef one(x, y):\n    return 1"
    record = dict(text="Give one.", test_list=["assert one(2, 3) == 1"], code=code)
    text, start = mbpp.ask({**record, "task_id": 11}, "sdar", "official")
    assert (text, start) == (f"This is the problem:\nGive one.\n{asked}", "```python\ndef one(x, y):\n")
    assert mbpp.program(record, "    return 1\n```", "sdar", "official")[0] == "def one(x, y):\n    return 1\n"
    assert mbpp.ask({**record, "code": None}, "sdar", "official")[1] == "```python\n"
    assert mbpp.function_head({**record, "code": "def one (x) : \n    return 1"}) == "def one (x) :\n"


# ----------------------------------------------------------------------------------------------------- the whole method


def write_model(folder, family):
    """The golden checkpoint of a family with a tokenizer of bytes under its special ids, and Qwen3's template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    shutil.copytree(
        FOLDER / f"{family}-tiny", folder, ignore=shutil.ignore_patterns("expected*", "objective*", "real*")
    )
    ids = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab=ids, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    names = {
        300: "<|endoftext|>",
        301: "<|im_start|>",
        302: "<|im_end|>",
        303: "<think>",
        304: "</think>",
        305: "<|M|>",
    }
    backend.add_special_tokens([names.get(i, f"<|{i}|>") for i in range(256, 306)])
    backend.save(str(folder / "tokenizer.json"))
    special = dict(eos_token="<|endoftext|>" if family == "sdar" else "<|im_end|>", pad_token="<|endoftext|>")
    special.update(mask_token="<|M|>", chat_template=QWEN3)
    (folder / "tokenizer_config.json").write_text(json.dumps(special))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("family, block", [("a2d", None), ("a2d", 8), ("sdar", None)], ids=["mdlm", "bd3lm", "sdar"])
def test_distill_train_evaluate_diagnose_merge(family, block, tmp_path, capsys):
    own = dict(model=write_model(tmp_path / "model", family))
    if block is not None:
        own["block_causal"] = block
    data_folder = tmp_path / "data"
    data_folder.mkdir()
    rows = [dict(question=f"What is {i} + {i}?", answer=f"#### {2 * i}") for i in range(6)]
    questions = write_lines(data_folder / "questions.jsonl", rows)
    with gzip.open(data_folder / gsm8k.FILE, "wt") as f:
        f.write(questions.read_text())

    out, budget = tmp_path / "T", dict(max_new_tokens=24)
    assert run(capsys, "distill", **own, data=questions, out=out, **budget)[0]["trajectories"] == 6
    decoder = meta(out)["decoder"]
    assert (decoder["schedule"], decoder["block_length"]) == (family, block or {"a2d": 32, "sdar": 4}[family])
    ended = "</think>\n\n" if family == "a2d" else "assistant\n"
    tok = tokenizer.load(own["model"])
    for record in data.read_trajectories(out):
        assert tok.decode(record["prompt_ids"]).endswith(ended)
        assert max(record["response_ids"]) < 305  # neither the mask nor a row without a token

    training = dict(data=out, keep="all", window=8, epochs=2, global_batch=3, batch_size=2, lr=1e-2, warmup=0)
    run(capsys, "train", **own, **training, out=tmp_path / "R")
    adapter = tmp_path / "R" / "epoch-2"
    layers = itertools.product(range(3), ("q_proj", "v_proj"), "AB")
    official = {f"base_model.model.model.layers.{i}.self_attn.{p}.lora_{x}.weight" for i, p, x in layers}
    assert set(weights(adapter)) == official  # PEFT's names for SDARForCausalLM and A2DQwen3LMHeadModel

    asked = dict(tasks="gsm8k", data=data_folder, **budget)
    scores = run(capsys, "evaluate", **own, **asked, adapter=adapter, out=tmp_path / "E")[0]["scores"]
    assert scores[0]["n"] == 6
    assert scores[0]["decoder"]["block_length"] == (block or {"a2d": 256, "sdar": 4}[family])
    measured = dict(data=out, limit=3, window=8, runs=tmp_path / "R", out=tmp_path / "D")
    summary = run(capsys, "diagnose", **own, **measured)[0]
    assert len(summary["models"]) == 1 and summary["models"][0]["tds"] >= 0
    assert (tmp_path / "D" / "tds.jsonl").is_file()

    run(capsys, "merge", model=own["model"], adapter=adapter, out=tmp_path / "M")
    merged = dict(own, model=tmp_path / "M")
    run(capsys, "evaluate", **merged, **asked, out=tmp_path / "E2")
    assert tokenizer.load(tmp_path / "M").chat(HI) == tok.chat(HI)
    assert decoded(tmp_path / "E2" / "gsm8k").keys() == decoded(tmp_path / "E" / "gsm8k").keys()
