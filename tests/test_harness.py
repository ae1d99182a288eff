"""Our model of lm-evaluation-harness: python -m pytest tests/test_harness.py

What the harness calls is tested without it; two slow tests run its own command line where it is installed."""

import gzip
import importlib.util
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
from helpers import ROOT, flags

import data
import distill
import tabom
import tokenizer
from runs import loading
from tools import harness

QUESTIONS = ["What is 1+1?", "Name a colour.", "How many legs have three spiders and a cat?", "?", "Spell it: cat."]
STOPS = ["++", "G"]  # of what the random model writes
needs_lm_eval = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm_eval is not installed")


def answers(folder, **model_args):
    """The model as the harness makes it, but for the base class; what it adds to a cache is in `added`."""
    lm = harness.Answers(device="cpu", pretrained=str(folder), **model_args)
    lm.added = []
    lm.cache_hook = SimpleNamespace(add_partial=lambda *what: lm.added.append(what))
    return lm


def requests(prompts, **kwargs):
    found = []
    for i, prompt in enumerate(prompts):
        found.append(SimpleNamespace(args=(prompt, kwargs), task_name="sums", doc_id=i, idx=0))
    return found


def command(*words, processes=1, **environment):
    """Run harness.py as a user does -> the finished process."""
    start = [sys.executable]
    if processes > 1:
        start += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **environment}
    words = [*start, "-m", "tools.harness", *map(str, words)]
    return subprocess.run(words, capture_output=True, text=True, env=env, cwd=ROOT, timeout=300)


# ------------------------------------------------------------------------------------------ what the harness calls


def test_a_text_is_cut_at_the_first_stop():
    assert harness.cut("a\nQ: b\nclass", ["class", "Q:"]) == "a\n"
    assert harness.cut("abc", ["x", ""]) == "abc"
    assert harness.cut("Q:", ["Q:"]) == ""


@pytest.mark.parametrize("batch_size", [1, 3])
def test_the_texts_are_those_of_answer(bytes_model, batch_size):
    lm = answers(bytes_model, batch_size=batch_size, block_length=8, temperature=1.0, seed=3)
    prompts = [lm.apply_chat_template([tokenizer.message("user", q)]) for q in QUESTIONS]
    asked = requests(prompts, until=STOPS, max_gen_toks=16)
    settings = dict(loading.DECODERS["llada"], block_length=8, temperature=1.0, max_new_tokens=16, steps=16)
    texts, _ = distill.answer(lm.loaded.m, lm.loaded.tok, prompts, settings, seed=3)
    found = lm.generate_until(asked)
    assert found == [harness.cut(text, STOPS) for text in texts]
    assert len(set(found)) > 1
    assert found != texts  # something was cut
    kept = {}
    for name, arguments, text in lm.added:
        assert name == "generate_until"
        kept[arguments[0]] = text
    assert kept == dict(zip(prompts, found))


def test_every_task_has_its_own_length_and_stops(bytes_model):
    lm = answers(bytes_model, batch_size=8, block_length=4)
    one, other = requests(["x"], max_gen_toks=8), requests(["x"], max_gen_toks=16, until="a", temperature=0.7)
    long, short, again = lm.generate_until([*other, *one, *other])
    alone = [lm.generate_until(asked)[0] for asked in (other, one)]
    assert [long, short] == alone
    settings, stops = lm.settings(until="a", max_gen_toks=16, temperature=0.7, do_sample=True)
    assert (settings["max_new_tokens"], settings["steps"], settings["temperature"]) == (16, 16, 0.0)
    assert list(stops) == ["a"]
    assert list(lm.settings(until=None)[1]) == []
    assert lm.settings()[0]["max_new_tokens"] == 256
    assert answers(bytes_model, max_new_tokens=32).settings(max_gen_toks=64)[0]["max_new_tokens"] == 32
    assert again == long  # at temperature 0 a repeated question has the same answer


def test_settings_that_do_not_fit_are_found_before_anything_is_decoded(bytes_model):
    lm = answers(bytes_model, block_length=8)
    with pytest.raises(ValueError, match="block_length 8 does not divide max_new_tokens 12"):
        lm.generate_until([*requests(["x"], max_gen_toks=16), *requests(["x"], max_gen_toks=12)])
    assert not lm.added


def test_a_repeated_question_is_drawn_anew(bytes_model):
    lm = answers(bytes_model, batch_size=4, block_length=8, temperature=1.0, max_new_tokens=16)
    first, *others = lm.generate_until(requests(["What?"]) * 4)
    assert len({first, *others}) == 4
    assert lm.generate_until(requests(["What?"])) == [first]


def test_prompts_are_cut_on_the_left_with_one_warning(bytes_model, capsys, monkeypatch):
    lm, seen = answers(bytes_model, prompt_tokens=5, block_length=8, max_new_tokens=8), []

    def nothing(loaded, examples, *rest):
        seen.extend(loaded.tok.decode(e["prompt_ids"]) for e in examples)
        return ()

    monkeypatch.setattr(distill, "answers", nothing)
    lm.generate_until(requests(["1234567", "12345", "abcdefg"]))
    assert sorted(seen) == ["12345", "34567", "cdefg"]
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("warning")]
    assert "2 of 3 prompts have up to 7 tokens, and lose all but the last 5" in line


def test_the_chat_template_continues_the_assistants_turn(bytes_model):
    lm = answers(bytes_model)
    talk = [tokenizer.message("user", "Add."), tokenizer.message("assistant", "```python\n")]
    assert lm.apply_chat_template(talk[:1]) == "user: Add.\n"
    assert lm.apply_chat_template(talk, add_generation_prompt=False) == "user: Add.\nassistant: ```python\n"
    assert "m.role" in lm.chat_template(True)
    assert "/" not in lm.tokenizer_name
    with pytest.raises(ValueError, match="takes no name"):
        lm.chat_template("default")


def test_likelihoods_are_one_clear_error(bytes_model):
    lm = answers(bytes_model)
    for ask in (lm.loglikelihood, lm.loglikelihood_rolling):
        with pytest.raises(ValueError, match="no left-to-right likelihood"):
            ask(requests(["x"]))


def test_model_args_are_flags():
    given = dict(pretrained="M", adapter="A", max_new_tokens=64, top_p=1, greedy=True, sample=False, device="cpu")
    c = harness.read_options(given)
    assert (c.model, c.adapter, c.max_new_tokens, c.top_p, c.greedy, c.sample) == ("M", "A", 64, 1.0, True, False)
    assert (c.batch_size, c.prompt_tokens, c.steps) == (1, 1024, None)
    assert harness.read_options(dict(pretrained="M", adapter=None, batch_size=None)).batch_size == 1


def test_what_the_harness_sets_beside_model_args_gives_way(bytes_model):
    given, others = dict(pretrained=bytes_model, batch_size=4, device="cpu"), dict(batch_size=1, device="cuda:0")
    c = harness.Answers.create_from_arg_obj(given, dict(others, max_batch_size=None)).c
    assert (c.batch_size, c.device) == (4, "cpu")
    c = harness.Answers.create_from_arg_obj(dict(pretrained=bytes_model), others).c
    assert (c.batch_size, c.device) == (1, "auto")  # without --device it says cuda:0, whatever is there


@pytest.mark.parametrize(
    "given, message",
    [
        (dict(adapter="A"), "needs pretrained=M"),
        (dict(pretrained="M", max_length=5), "--model_args max_length: known are max_new_tokens, steps"),
        (dict(pretrained="M", greedy=2), "greedy=2: must be True or False"),
        (dict(pretrained="M", steps=0.5), "--steps '0.5': must be int"),
        (dict(pretrained="M", strategy="best"), "--strategy 'best': must be one of entropy"),
        (dict(pretrained="M", batch_size="auto"), "--batch-size 'auto': must be int"),
        (dict(pretrained="M", prompt_tokens=0), "--prompt-tokens 0: must be a number of at least 1"),
    ],
)
def test_wrong_model_args_are_named(given, message):
    with pytest.raises(ValueError) as e:
        harness.read_options(given)
    assert message in str(e.value)


# ------------------------------------------------------------------------------------------------- the command line


def test_without_the_harness_one_line_says_what_to_install(tmp_path):
    (tmp_path / "lm_eval.py").write_text("raise ImportError('there is none')\n")
    done = command("run", "--model", "tabom", PYTHONPATH=str(tmp_path))
    assert done.returncode == 1
    assert done.stderr == "error: tools/harness.py needs lm-evaluation-harness: pip install lm_eval (there is none)\n"


def test_the_harness_finds_the_package_evaluate(tmp_path):
    """A stand-in for the harness, which imports `evaluate` as its tasks do, and for that package."""
    api = tmp_path / "lm_eval" / "api"
    api.mkdir(parents=True)
    (tmp_path / "evaluate.py").write_text("NAME = 'the package'\n")
    (tmp_path / "lm_eval" / "__init__.py").touch()
    (api / "__init__.py").touch()
    (api / "model.py").write_text("class LM:\n    pass\n")
    registry = "KNOWN = {}\n\ndef register_model(name):\n    return lambda cls: KNOWN.update({name: cls})\n"
    (api / "registry.py").write_text(registry)
    main = "from lm_eval.api.registry import KNOWN\n\ndef cli_evaluate():\n    import evaluate\n    import data\n"
    main += "    print(evaluate.NAME, list(KNOWN), [c.__name__ for c in KNOWN['tabom'].__bases__])\n"
    (tmp_path / "lm_eval" / "__main__.py").write_text(main)
    done = command(PYTHONPATH=str(tmp_path))
    assert done.stdout == "the package ['tabom'] ['Answers', 'LM']\n", done.stderr


TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
output_type: generate_until
test_split: test
doc_to_text: "Q: {{{{question}}}}\\nA:"
doc_to_target: "{{{{answer}}}}"
generation_kwargs:
  until: ["Q:", "</s>", "<|im_end|>"]
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
"""


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A folder with two tasks, one of which begins the assistant's answer, and with the questions as GSM8K's file."""
    folder = tmp_path_factory.mktemp("tasks")
    lines = [json.dumps(dict(question=q, answer=f"#### {i}")) for i, q in enumerate(QUESTIONS)]
    file = folder / "gsm8k_test.jsonl.gz"
    file.write_bytes(gzip.compress("\n".join(lines).encode()))
    task = TASK.format(name="plain", file=file)
    (folder / "plain.yaml").write_text(task)
    begun = task.replace("task: plain", "task: begun") + 'gen_prefix: "Well,"\n'
    (folder / "begun.yaml").write_text(begun + "process_docs: !function begun.same\n")
    # As the harness's own code tasks do: the package must be found, not evaluate.py of this project.
    (folder / "begun.py").write_text("import evaluate\n\nevaluate.load\n\ndef same(docs):\n    return docs\n")
    return folder


def samples(out, task):
    """The texts and the prompts that the harness logged, in the order of the questions."""
    (file,) = out.rglob(f"samples_{task}_*.jsonl")
    rows = sorted(map(json.loads, file.read_text().splitlines()), key=lambda row: row["doc_id"])
    return [row["resps"][0][0] for row in rows], [row["arguments"]["gen_args_0"]["arg_0"] for row in rows]


@needs_lm_eval
@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_the_real_harness_gets_the_texts_of_evaluate(bytes_model, tasks, tmp_path, processes):
    args = dict(max_new_tokens=16, block_length=8, temperature=1.0, seed=5)
    written = [f"{name}={value}" for name, value in dict(args, pretrained=bytes_model).items()]
    words = ["run", "--model", "tabom", "--model_args", ",".join(written), "--tasks", "plain,begun", "--device", "cpu"]
    words += ["--include_path", tasks, "--apply_chat_template", "--batch_size", "2", "--log_samples"]
    done = command(*words, "--output_path", tmp_path / "H", processes=processes, HF_HOME=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("|exact_match") == 2  # one table, also from two processes
    texts, prompts = samples(tmp_path / "H", "plain")
    ours = flags(model=bytes_model, data=tasks, out=tmp_path / "E", tasks="gsm8k", device="cpu", batch_size=2, **args)
    assert tabom.main(["evaluate", *ours]) == 0
    records = sorted(data.read_trajectories(tmp_path / "E" / "gsm8k"), key=lambda r: r["id"])
    assert texts == [r["response"] for r in records]
    tok = tokenizer.load(bytes_model)
    assert list(map(tok.encode, prompts)) == [r["prompt_ids"] for r in records]
    assert set(texts) != set(samples(tmp_path / "H", "begun")[0])
    assert samples(tmp_path / "H", "begun")[1] == [prompt + "assistant: Well," for prompt in prompts]


@needs_lm_eval
@pytest.mark.slow
def test_the_real_harness_shows_an_error_as_one_line(bytes_model, tasks):
    task = (tasks / "plain.yaml").read_text().replace("generate_until", "loglikelihood_rolling")
    (tasks / "likelihood.yaml").write_text(task.replace("task: plain", "task: likelihood").split("generation_kw")[0])
    words = ["run", "--model", "tabom", "--model_args", f"pretrained={bytes_model}", "--tasks", "likelihood"]
    done = command(*words, "--include_path", tasks, HF_HOME=str(tasks / "cache"))
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith("error: a masked diffusion model has no left-to-right")
    assert "Traceback" not in done.stderr
