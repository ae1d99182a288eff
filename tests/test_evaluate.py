"""Is an answer right, and the evaluate and grade commands: python -m pytest tests/test_evaluate.py

The benchmarks and the graded real outputs are read from the folder that TABOM_DATA names, and skipped without it."""

import gzip
import json
import os
import re
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers import last_json, run
from hypothesis import given, settings
from hypothesis import strategies as st

import data
import distill
import evaluate
import model
import tabom
import tokenizer
from benchmarks import answers, gsm8k
from runs import loading

REAL = Path(os.environ.get("TABOM_DATA", "no-such-folder"))
needs_data = pytest.mark.skipif(not REAL.is_dir(), reason="TABOM_DATA names no folder")


def write(path, rows):
    with gzip.open(path, "wt", encoding="utf-8") as f:
        f.writelines(json.dumps(row) + "\n" for row in rows)
    return path


def read(path):
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8") as f:
        return [json.loads(line) for line in f]


# --------------------------------------------------------------------------------------------- is an answer right?


@pytest.mark.parametrize(
    "response, answer, verdict",
    [
        ("The answer is 72.", "... #### 72", True),
        ("#### 1,234", "#### 1234", True),
        ("so $18.00 a day", "9 * 2 = <<9*2=18>>18\n#### 18", True),
        ("first 5, then \\boxed{-3}", "\\boxed{-3}", True),
        ("it is \\(18\\).", "18", True),
        ("18 km", "18", True),
        ("x = \u22125", "-5", True),  # the minus sign of typography
        ("\\boxed{1{,}000}", "1000", True),
        ("x = 5-3", "3", True),
        ("12 apples and 7", "12", False),
        ("no number", "12", False),
        ("\\boxed{\\frac{3}{4}}", "3", False),
        ("\\boxed{3\\sqrt{2}}", "2", False),
        ("The chance is 1/2.", "2", False),
        ("10^2", "2", False),
        ("so 3x", "3", False),
        ("at 10:30", "30", False),
        ("anything", "no number either", None),
        ("3/4", "\\boxed{\\frac{3}{4}}", None),  # not one number
        ("72", "72 apples", None),
        ("72", None, None),
        ("\\boxed{12\\%}", "12", True),
        ("\\boxed{12}", "\\boxed{12\\%}", True),
        ("It rose by 12 %.", "12%", True),
        ("12% of 50 is 6", "6", True),
        ("\\boxed{12\\%}", "13\\%", False),
        ("\\boxed{\\frac{1}{2}\\%}", "2", False),
        ("50%", "half, 50%", None),
    ],
)
def test_number_check(response, answer, verdict):
    assert evaluate.check("number", response, answer) is verdict


@pytest.mark.parametrize(
    "response, answer, verdict",
    [
        ("\\boxed{4}", "4", True),
        ("\\boxed{\\frac{6}{8}}", "\\frac{3}{4}", True),
        ("4", "\\frac{3}{4}", False),
        ("\\boxed{\\frac{8}{2}}", "4", True),  # no plain number, but one that math-verify can compare
        ("\\boxed{(1, 2)}", "(1,2)", True),
        ("Paris", "The capital of France is Paris", None),
        ("\\boxed{12\\%}", "12", True),
        ("\\boxed{12}", "12\\%", True),
    ],
)
def test_auto_check_takes_what_can_tell(response, answer, verdict):
    assert evaluate.check("auto", response, answer) is verdict


def test_exact_and_no_check():
    assert evaluate.check("exact", " abc\n", "abc") is True
    assert evaluate.check("exact", "abd", "abc") is False
    assert evaluate.check("exact", "abc", ["x", " abc"]) is True
    assert evaluate.check("exact", "abc", ["x", "y"]) is False
    assert evaluate.check("number", "so 7", ["x", "7"]) is True
    assert evaluate.check("number", "7", ["x", "8"]) is None
    assert evaluate.check("none", "abc", "abc") is None
    with pytest.raises(ValueError, match="check 'fuzzy' is not one of"):
        evaluate.check("fuzzy", "a", "a")


@settings(deadline=None)
@given(
    st.integers(-(10**40), 10**40),
    st.sampled_from(["{}", "{:,}", "so it is {:,}.", "#### {:,}", "\\boxed{{{}}}", "it costs ${:,}"]),
)
def test_a_number_is_found_however_it_is_written(n, form):
    if n < 0 and "$" in form:
        return  # $-5 is not how anyone writes it
    assert answers.final_number(form.format(n)) == Decimal(n)


@needs_data
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["math", "auto"])
def test_checks_agree_with_math_verify_on_real_answers(kind):
    rows = read(REAL / "math500_llada8b_graded.jsonl.gz")
    same = 0
    for row in rows:
        verdict = evaluate.check(kind, row["response"], row["answer"])
        assert verdict is not None  # nothing is kept as unchecked
        same += verdict == row["math_verify"]
    assert same >= 0.99 * len(rows)


# --------------------------------------------------------------------------------------------- prompts and settings


def of_family(family, folder):
    """A Loaded that only knows its family and folder."""
    return loading.Loaded(SimpleNamespace(config=SimpleNamespace(family=family, raw={})), None, folder)


def settings_of(task, family, folder, **flags):
    return evaluate.task_settings(evaluate.EvaluateOptions(**flags), task, of_family(family, folder))


def test_settings_are_those_of_table_8(tmp_path):
    dream = settings_of("humaneval", "dream", tmp_path)
    wanted = dict(max_new_tokens=768, steps=768, temperature=0.1, top_p=0.9, strategy="entropy", block_length=None)
    assert {**dream, **wanted} == dream and dream["greedy"]
    llada = settings_of("math500", "llada", tmp_path)
    wanted = dict(max_new_tokens=512, steps=512, temperature=0.0, strategy="confidence", block_length=64)
    assert {**llada, **wanted} == llada
    assert settings_of("humaneval", "llada", tmp_path)["suppress_eos"]
    assert settings_of("mbpp", "llada", tmp_path)["eos_last"]
    assert not settings_of("gsm8k", "dream", tmp_path, sample=True)["greedy"]
    assert settings_of("gsm8k", "llada", tmp_path, protocol="release")["max_new_tokens"] == 256
    faster = settings_of("gsm8k", "dream", tmp_path, tokens_per_step=3)
    assert faster["tokens_per_step"] == 3 and "steps" not in faster
    with pytest.raises(ValueError, match="tokens_per_step 2 and steps 8: give one"):
        settings_of("gsm8k", "dream", tmp_path, tokens_per_step=2, steps=8)


@pytest.mark.parametrize(
    "own, given, wanted",
    [
        (dict(max_new_tokens=36), {}, (36, 36, None)),  # not the preset's steps for another length
        (dict(tokens_per_step=2), {}, (256, None, 2)),
        (dict(tokens_per_step=2), dict(steps=64), (256, 64, None)),
        (dict(tokens_per_step=2), dict(max_new_tokens=64), (64, None, 2)),
        (dict(max_new_tokens=64, steps=16), dict(tokens_per_step=2), (64, None, 2)),
        (dict(temperature=0, top_p=1), {}, (256, 256, None)),  # JSON's numbers
    ],
)
def test_the_number_of_steps_is_that_of_the_last_who_speaks_of_it(tmp_path, own, given, wanted):
    (tmp_path / "generation_config.json").write_text(json.dumps(dict(tabom=own)))
    found = settings_of("gsm8k", "dream", tmp_path, **given)
    assert (found["max_new_tokens"], found.get("steps"), found.get("tokens_per_step")) == wanted


def test_wilson_interval():
    low, high = evaluate.wilson(50, 100)
    assert (low, high) == (pytest.approx(0.4038, abs=1e-4), pytest.approx(0.5962, abs=1e-4))
    assert evaluate.wilson(0, 10)[0] == 0 and evaluate.wilson(10, 10)[1] == pytest.approx(1)


@pytest.mark.parametrize(
    "layers, n, options, shown",
    [
        (32, 1319, {}, "76.1 / 78.6 / 77.3"),
        (32, 1319, dict(protocol="release"), "76.1 / 78.6 / 77.3"),
        (32, 1319, dict(steps=512, seed=3), "76.1 / 78.6 / 77.3"),  # what the benchmark has anyway
        (32, 1319, dict(model="here/LLaDA-8B-Instruct/"), "76.1 / 78.6 / 77.3"),
        (32, 1319, dict(protocol="official"), "-"),
        (32, 1319, dict(tokens_per_step=2), "-"),
        (32, 1319, dict(shots="shots.json"), "-"),
        (32, 5, dict(limit=5), "-"),
        (32, 2, {}, "-"),  # a file of two questions
        (2, 1319, {}, "-"),  # a name is not enough
        (32, 1319, dict(model="GSAI-ML/LLaDA-1.5"), "-"),
        (32, 1319, dict(model="GSAI-ML/LLaDA-8B-Base"), "-"),
    ],
)
def test_the_papers_score_stands_beside_the_same_checkpoint_and_questions(layers, n, options, shown, tmp_path):
    loaded = of_family("llada", tmp_path)
    loaded.m.config.vocab_size, loaded.m.config.width, loaded.m.config.layers = 126464, 4096, layers
    c = evaluate.EvaluateOptions(**{"model": "GSAI-ML/LLaDA-8B-Instruct", **options})
    about = dict(decoder=evaluate.task_settings(c, "gsm8k", loaded), finished=100.0)
    about.update(protocol=c.protocol, shots=0, seed=0)
    paper = evaluate.paper_scores(c, loaded, "gsm8k", about["decoder"], n)
    score = dict(evaluate.score("gsm8k", [dict(correct=True)]), **about, **paper)
    head, _, row, *legend = evaluate.score_table([score]).splitlines()
    assert row.split(" | ")[head.split(" | ").index("paper %")] == shown
    assert bool(legend) == (shown != "-")


# --------------------------------------------------------------------------------------------------------- evaluate


def test_a_prompt_that_is_cut_is_said_and_shots_are_counted_as_examples(bytes_model, tmp_path, capsys):
    folder = tmp_path / "data"
    folder.mkdir()
    write(folder / "gsm8k_test.jsonl.gz", [dict(question=f"What is {i}?", answer=f"#### {i}") for i in range(2)])
    turns = [dict(role="user", content="x" * 900), dict(role="assistant", content="#### 1")] * 2
    (tmp_path / "shots.json").write_text(json.dumps(turns))
    options = dict(model=bytes_model, data=folder, shots=tmp_path / "shots.json", max_new_tokens=8, block_length=8)
    result, err = run(capsys, "evaluate", **options, out=tmp_path / "E")
    assert re.search(r"gsm8k: 2 of 2 prompts have up to \d{4} tokens, and lose all but the last 1024", err)
    assert result["scores"][0]["shots"] == 2
    assert {len(r["prompt_ids"]) for r in data.read_trajectories(tmp_path / "E" / "gsm8k")} == {1024}
    result, err = run(capsys, "evaluate", **options, prompt_tokens=4096, out=tmp_path / "whole")
    assert "prompts have up to" not in err
    assert min(len(r["prompt_ids"]) for r in data.read_trajectories(tmp_path / "whole" / "gsm8k")) > 1800


def test_the_settings_of_another_checkpoint_are_named(bytes_model, tmp_path, capsys):
    folder = tmp_path / "data"
    folder.mkdir()
    write(folder / "gsm8k_test.jsonl.gz", [dict(question="What is 1?", answer="#### 1")])
    options = dict(model=bytes_model, data=folder, max_new_tokens=8, block_length=8, out=tmp_path / "E")
    _, err = run(capsys, "evaluate", **options)
    assert f"--protocol paper has the lengths and steps of LLaDA-8B-Instruct; {bytes_model} is another model" in err


def test_evaluate_answers_grades_and_continues(bytes_model, tmp_path, capsys, monkeypatch):
    folder = tmp_path / "data"
    folder.mkdir()
    write(folder / "gsm8k_test.jsonl.gz", [dict(question=f"What is {i}?", answer=f"#### {i}") for i in range(5)])
    kinds = dict(instruction_id_list=["punctuation:no_comma"], kwargs=[{}])
    write(folder / "ifeval.jsonl.gz", [dict(key=i, prompt="No commas.", **kinds) for i in range(3)])
    words = ["evaluate", "--model", str(bytes_model), "--data", str(folder), "--out", str(tmp_path / "E")]
    words += ["--tasks", "gsm8k, ifeval, gsm8k", "--max-new-tokens", "8", "--block-length", "8"]
    words += ["--tokens-per-step", "2"]
    assert tabom.main([*words, "--limit", "2"]) == 0
    assert tabom.main(words) == 0
    out = capsys.readouterr().out
    result = last_json(out)
    assert [s["n"] for s in result["scores"]] == [5, 3] and "| gsm8k | 5 |" in out
    records = data.read_trajectories(tmp_path / "E" / "gsm8k")
    assert sorted(r["id"] for r in records) == [0, 1, 2, 3, 4]
    for r in records:
        assert r["correct"] == gsm8k.grade(dict(answer=r["answer"]), r["response"])["correct"]
        assert max(r["step"]) == 3  # 8 tokens, 2 a step
    monkeypatch.chdir(tmp_path)  # without --out, a folder named by the model
    assert tabom.main([*words[:5], *words[7:], "--limit", "1"]) == 0
    out = last_json(capsys.readouterr().out)["out"]
    assert out.startswith("out/evaluate-") and len(data.read_trajectories(tmp_path / out / "ifeval")) == 1
    saved = json.loads((tmp_path / "E" / "results.json").read_text())
    assert saved["scores"] == result["scores"] and saved["command"]["tokens_per_step"] == 2
    for name, message in (("fly", "--tasks fly: unknown; choose among"), ("math500", "no dataset file")):
        assert tabom.main([*words[:7], "--tasks", name]) == 1
        assert message in capsys.readouterr().err
    write(folder / "gsm8k_test.jsonl.gz", [dict(question=f"What is {i}?", answer=f"#### {i + 1}") for i in range(5)])
    assert tabom.main(words) == 1
    assert "holds another run: questions_sha256 was" in capsys.readouterr().err
    write(folder / "gsm8k_test.jsonl.gz", [dict(question="What?", answer="#### 1"), dict(answer=7)])
    assert tabom.main(words) == 1
    assert "gsm8k_test.jsonl.gz:2: answer, question missing or of another type" in capsys.readouterr().err


def test_a_folder_of_another_command_is_refused(bytes_model, tmp_path, capsys):
    write(tmp_path / "gsm8k_test.jsonl.gz", [dict(question="What?", answer="#### 1")])
    (tmp_path / "meta.json").write_text('{"command": "distill"}')
    words = [
        "evaluate",
        "--model",
        str(bytes_model),
        "--data",
        str(tmp_path),
        "--tasks",
        "gsm8k",
        "--out",
        str(tmp_path),
    ]
    assert tabom.main([*words, "--steps", "8", "--max-new-tokens", "8"]) == 1
    assert "holds a run of distill: choose another --out" in capsys.readouterr().err
    assert not (tmp_path / "gsm8k").exists()


@pytest.mark.parametrize(
    "turn", [dict(role="user", content=1), dict(role="user", content=None), dict(role=5, content="x")]
)
def test_shots_are_texts(turn, tmp_path):
    (tmp_path / "shots.json").write_text(json.dumps([turn]))
    with pytest.raises(ValueError, match="shots.json: an earlier turn must have a role and a text content, found"):
        evaluate.read_shots(tmp_path / "shots.json", "gsm8k")


def test_shots_come_before_the_question(bytes_model, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    write(folder / "gsm8k_test.jsonl.gz", [dict(question="What?", answer="#### 1")])
    turns = [dict(role="user", content="one"), dict(role="assistant", content="two")]
    (tmp_path / "shots.json").write_text(json.dumps(dict(gsm8k=turns)))
    words = [
        "evaluate",
        "--model",
        str(bytes_model),
        "--data",
        str(folder),
        "--out",
        str(tmp_path / "E"),
        "--steps",
        "8",
    ]
    words += ["--max-new-tokens", "8", "--shots", str(tmp_path / "shots.json")]
    assert tabom.main(words) == 0
    (record,) = data.read_trajectories(tmp_path / "E" / "gsm8k")
    text = tokenizer.load(bytes_model).decode(record["prompt_ids"])
    assert text.startswith("user: one\nassistant: two\nuser: Q: What?")


def test_what_was_never_decoded_has_the_order_minus_one(bytes_model):
    m, tok = model.load(bytes_model), tokenizer.load(bytes_model)
    settings = dict(max_new_tokens=8, steps=2, threshold=1.0)
    texts, (record,) = distill.answer(m, tok, ["one"], settings)
    masks = [r for r, token in enumerate(record["response_ids"]) if token == m.config.mask_id]
    assert len(masks) == 6
    for r in range(8):
        assert (record["order"][r] == -1) == (r in masks)
    assert sorted(record["order"])[6:] == [0, 1]
    data.check_record(record, m.config.vocab_size, m.config.mask_id)
    assert texts == [record["text"]]


# ------------------------------------------------------------------------------------------------------------ grade


@needs_data
@pytest.mark.parametrize(
    "task, name, key",
    [("gsm8k", "gsm8k_llada8b_graded", "flexible_correct"), ("math500", "math500_llada8b_graded", "math_verify")],
)
def test_grade_agrees_with_the_reference_verdicts(task, name, key, tmp_path, capsys):
    out = tmp_path / "V.jsonl"
    assert tabom.main(["grade", "--task", task, "--responses", str(REAL / f"{name}.jsonl.gz"), "--out", str(out)]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    result = last_json(capsys.readouterr().out)
    low, high = result["interval"]
    assert result["n"] == len(rows) and low < result["score"] < high < 100  # all three in percent
    assert sum(row["correct"] == bool(row[key]) for row in rows) >= 0.995 * len(rows)


def test_grade_runs_programs_and_writes_every_line_back(tmp_path, capsys):
    check = "def check(f):\n    assert f(1) == 2\n"
    rows = [
        dict(
            prompt="def f(x):\n",
            entry_point="f",
            test=check,
            response="    return x + 1\n```",
            mine=1,
        ),
        dict(
            prompt="def f(x):\n",
            entry_point="f",
            test=check,
            response="    return x\n```",
            mine=2,
        ),
    ]
    write(tmp_path / "R.jsonl.gz", rows)
    words = [
        "grade",
        "--task",
        "humaneval",
        "--responses",
        str(tmp_path / "R.jsonl.gz"),
        "--out",
        str(tmp_path / "V.jsonl"),
    ]
    assert tabom.main(words) == 0
    result = last_json(capsys.readouterr().out)
    assert (result["correct"], result["score"], result["interval"]) == (1, 50.0, [9.45, 90.55])
    found = [json.loads(line) for line in (tmp_path / "V.jsonl").read_text().splitlines()]
    assert [(v["mine"], v["correct"]) for v in found] == [(1, True), (2, False)]
    assert all(row.items() <= v.items() for row, v in zip(rows, found))


def test_a_bad_record_is_its_own_fault(tmp_path, capsys):
    """Faults of records and of responses, among 100 that are fine: 100 verdicts."""
    good = dict(prompt="def f(x):\n", entry_point="f", test="def check(f):\n    assert f(1) == 2\n")
    answer = "    return x + 1\n```"
    rows = [dict(good, response=answer) for _ in range(4)]
    rows += [dict(good, test="def check(f:", response=answer)]  # no Python
    rows += [dict(good, response="    return " + " + ".join("1" * 330) + "\n```")]
    rows += [dict(good, response="    return " + "-" * 326 + "1\n```")]
    rows += [dict(good, response=answer + "\ud800")]
    rows += [dict(good, response="    raise ValueError('\\ud800')\n```")]
    source, out = tmp_path / "R.jsonl", tmp_path / "V.jsonl.gz"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert tabom.main(["grade", "--task", "humaneval", "--responses", str(source), "--out", str(out)]) == 0
    found = [row["correct"] for row in read(out)]  # compressed, as its name says
    assert found == [True] * 4 + [False] * 3 + [True, False]
    result = last_json(capsys.readouterr().out)
    assert (result["n"], result["not_graded"]) == (9, 1)


def test_grade_trims_as_evaluate_does_and_reads_the_harness(tmp_path, capsys):
    record = dict(prompt="def f(x):\n", entry_point="f", test="def check(f):\n    assert f(1) == 2\n")
    response = "def f(x):\n    return x + 1\n\nprint(f(2)\n"
    write(tmp_path / "R.jsonl.gz", [dict(doc=record, resps=[[response]], target="")])
    words = ["grade", "--task", "humaneval", "--responses", str(tmp_path / "R.jsonl.gz"), "--out"]
    assert tabom.main([*words, str(tmp_path / "V.jsonl")]) == 0
    (row,) = read(tmp_path / "V.jsonl")
    assert row["doc"] == record
    assert "not graded" not in row["reason"]
    assert tabom.main([*words, str(tmp_path / "R.jsonl.gz")]) == 1
    assert "is the file with the responses" in capsys.readouterr().err


def test_the_gold_answer_of_mathematics_may_be_raw(tmp_path, capsys):
    (tmp_path / "R.jsonl").write_text(json.dumps(dict(answer="2\\frac{1}{2}", response="$2\\frac{1}{2}$")) + "\n")
    words = ["grade", "--task", "math500", "--responses", str(tmp_path / "R.jsonl"), "--out", str(tmp_path / "V")]
    right = []
    for gold in ("latex", "raw"):
        assert tabom.main([*words, "--math-gold", gold]) == 0
        right.append(last_json(capsys.readouterr().out)["correct"])
    assert right == [1, 0]


@pytest.mark.parametrize(
    "line, message",
    [
        ('{"answer": "5"}', "R.jsonl:1: response missing"),
        ('{"answer": 5, "response": "5"}', "R.jsonl:1: answer missing or of another type"),
        ("[]", "R.jsonl:1: answer, response missing"),
        ("{", "R.jsonl:1: not valid JSON"),
        ("", "no responses to grade"),
    ],
)
def test_grade_names_what_is_wrong(line, message, tmp_path, capsys):
    (tmp_path / "R.jsonl").write_text(line + "\n")
    words = ["grade", "--task", "gsm8k", "--responses", str(tmp_path / "R.jsonl"), "--out", str(tmp_path / "V.jsonl")]
    assert tabom.main(words) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "V.jsonl").exists()
