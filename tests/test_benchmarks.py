"""Prompts, presets, and the evaluate and grade commands: python -m pytest tests/test_benchmarks.py

The benchmarks and the graded real outputs are read from the folder that TABOM_DATA names, and skipped without it."""

import gzip
import json
import os
from pathlib import Path

import pytest

import benchmarks
import data
import evaluate
import options
import tabom

REAL = Path(os.environ.get("TABOM_DATA", "no-such-folder"))
needs_data = pytest.mark.skipif(not REAL.is_dir(), reason="TABOM_DATA names no folder")


def write(path, rows):
    with gzip.open(path, "wt", encoding="utf-8") as f:
        f.writelines(json.dumps(row) + "\n" for row in rows)
    return path


def last_json(text):
    return json.loads(text.strip().splitlines()[-1])


# --------------------------------------------------------------------------------------------- prompts and settings

CODE = dict(
    prompt="def f(x):\n", text="Add one.", test_list=["assert f(1) == 2", "assert f(2) == 3", "assert f(3) == 4"]
)


def test_prompts_are_worded_as_in_the_official_evaluations():
    assert benchmarks.ask("gsm8k", "dream", dict(question="How many?")) == ("Q: How many?\nA:", "")
    assert benchmarks.ask("gsm8k", "llada", dict(question="How many?"))[0] == (
        "Question: How many?\nLet's think step by step\nAnswer:"
    )
    assert benchmarks.ask("math500", "dream", dict(problem="1+1"))[0] == "Problem:\n1+1\n\nSolution:"
    assert benchmarks.ask("math500", "llada", dict(problem="1+1"))[0].endswith(
        "put your final answer within \\boxed{}."
    )
    text, start = benchmarks.ask("humaneval", "dream", CODE)
    assert text.endswith("passes the tests:\n```def f(x):\n")
    assert start == "Here is the completed function:\n```python\ndef f(x):\n\n"
    assert benchmarks.ask("humaneval", "llada", CODE) == ("Complete the following python code:\ndef f(x):\n", "")
    text, start = benchmarks.ask("mbpp", "dream", CODE)
    assert text.endswith("pass these tests:\n\nassert f(1) == 2\nassert f(2) == 3\nassert f(3) == 4")
    assert start == "Here is the completed function:\n```python\n"
    assert benchmarks.ask("mbpp", "llada", CODE)[0].endswith(f"tests:\n\n {CODE['test_list']}  \n")
    assert benchmarks.ask("ifeval", "llada", dict(prompt="Write.")) == ("Write.", "")


def test_responses_end_at_the_first_stop_of_dreams_evaluation():
    assert benchmarks.trim("gsm8k", "dream", " 5\nQ: next") == " 5\n"
    assert benchmarks.trim("mbpp", "dream", "a = 1\n```\nmore ```") == "a = 1\n"
    assert benchmarks.trim("humaneval", "dream", "  return 1\ndef g():\nprint") == "  return 1"
    assert benchmarks.trim("gsm8k", "llada", " 5\nQ: next") == " 5\nQ: next"
    assert benchmarks.trim("ifeval", "dream", "all of it") == "all of it"


def test_settings_are_those_of_table_8(tmp_path):
    plain = options.EvaluateOptions()
    dream = benchmarks.decoder(plain, "humaneval", "dream", tmp_path)
    wanted = dict(max_new_tokens=768, steps=768, temperature=0.1, top_p=0.9, strategy="entropy", block_length=None)
    assert {k: dream[k] for k in wanted} == wanted
    llada = benchmarks.decoder(plain, "math500", "llada", tmp_path)
    wanted = dict(max_new_tokens=512, steps=512, temperature=0.0, strategy="confidence", block_length=64)
    assert {k: llada[k] for k in wanted} == wanted
    assert benchmarks.decoder(options.EvaluateOptions(tokens_per_step=2), "gsm8k", "llada", tmp_path)["steps"] == 256
    assert benchmarks.decoder(options.EvaluateOptions(tokens_per_step=3), "gsm8k", "dream", tmp_path)["steps"] == 86
    with pytest.raises(ValueError, match="--tokens-per-step 2 and --steps 8: give one"):
        benchmarks.decoder(options.EvaluateOptions(tokens_per_step=2, steps=8), "gsm8k", "dream", tmp_path)


@pytest.mark.parametrize(
    "own, given, tokens, steps",
    [
        (dict(max_new_tokens=36), {}, 36, 36),  # not the preset's steps for another length
        (dict(tokens_per_step=2), {}, 256, 128),
        (dict(tokens_per_step=2), dict(steps=64), 256, 64),
        (dict(tokens_per_step=2), dict(max_new_tokens=64), 64, 32),
        (dict(max_new_tokens=64, steps=16), dict(tokens_per_step=2), 64, 32),
        (dict(temperature=0, top_p=1), {}, 256, 256),  # JSON's numbers
    ],
)
def test_the_number_of_steps_is_that_of_the_last_who_speaks_of_it(tmp_path, own, given, tokens, steps):
    (tmp_path / "generation_config.json").write_text(json.dumps(dict(tabom=own)))
    found = benchmarks.decoder(options.EvaluateOptions(**given), "gsm8k", "dream", tmp_path)
    assert (found["max_new_tokens"], found["steps"]) == (tokens, steps) and "tokens_per_step" not in found


def test_wilson_interval():
    low, high = evaluate.wilson(50, 100)
    assert (low, high) == (pytest.approx(0.4038, abs=1e-4), pytest.approx(0.5962, abs=1e-4))
    assert evaluate.wilson(0, 10)[0] == 0 and evaluate.wilson(10, 10)[1] == pytest.approx(1)


# --------------------------------------------------------------------------------------------------------- evaluate


def test_evaluate_answers_grades_and_continues(bytes_model, tmp_path, capsys, monkeypatch):
    folder = tmp_path / "data"
    folder.mkdir()
    write(folder / "gsm8k_test.jsonl.gz", [dict(question=f"What is {i}?", answer=f"#### {i}") for i in range(5)])
    kinds = dict(instruction_id_list=["punctuation:no_comma"], kwargs=[{}])
    write(folder / "ifeval.jsonl.gz", [dict(key=i, prompt="No commas.", **kinds) for i in range(3)])
    words = ["evaluate", "--model", str(bytes_model), "--data", str(folder), "--out", str(tmp_path / "E")]
    words += ["--tasks", "gsm8k,ifeval", "--max-new-tokens", "8", "--block-length", "8", "--tokens-per-step", "2"]
    assert tabom.main([*words, "--limit", "2"]) == 0
    assert tabom.main(words) == 0
    out = capsys.readouterr().out
    result = last_json(out)
    assert [s["n"] for s in result["scores"]] == [5, 3] and "| gsm8k | 5 |" in out
    records = data.read_trajectories(tmp_path / "E" / "gsm8k")
    assert sorted(r["id"] for r in records) == [0, 1, 2, 3, 4]
    for r in records:
        assert r["correct"] == evaluate.gsm8k(dict(answer=r["answer"]), r["response"])["correct"]
        assert max(r["step"]) == 3  # 8 tokens, 2 a step
    monkeypatch.chdir(tmp_path)  # without --out, a folder named by the model
    assert tabom.main([*words[:5], *words[7:], "--limit", "1"]) == 0
    out = last_json(capsys.readouterr().out)["out"]
    assert out.startswith("out/evaluate-") and len(data.read_trajectories(tmp_path / out / "ifeval")) == 1
    saved = json.loads((tmp_path / "E" / "results.json").read_text())
    assert saved["scores"] == result["scores"] and saved["command"]["tokens_per_step"] == 2
    for name, message in (("fly", "--tasks fly: known are"), ("math500", "no dataset file")):
        assert tabom.main([*words[:7], "--tasks", name]) == 1
        assert message in capsys.readouterr().err
    write(folder / "gsm8k_test.jsonl.gz", [dict(question=f"What is {i}?", answer=f"#### {i + 1}") for i in range(5)])
    assert tabom.main(words) == 1
    assert "holds another run: questions_sha256 was" in capsys.readouterr().err
    write(folder / "gsm8k_test.jsonl.gz", [dict(question="What?", answer="#### 1"), dict(answer=7)])
    assert tabom.main(words) == 1
    assert "gsm8k_test.jsonl.gz:2: answer, question missing or of another type" in capsys.readouterr().err


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
    text = data.load_tokenizer(bytes_model).decode(record["prompt_ids"])
    assert text.startswith("user: one\nassistant: two\nuser: Question: What?")


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
    assert last_json(capsys.readouterr().out)["n"] == len(rows)
    assert sum(row["correct"] == bool(row[key]) for row in rows) >= 0.995 * len(rows)


def test_grade_runs_programs_and_writes_every_line_back(tmp_path, capsys):
    check = "def check(f):\n    assert f(1) == 2\n"
    rows = [
        dict(
            prompt="def f(x):\n",
            entry_point="f",
            test=check,
            response="```python\ndef f(x):\n    return x + 1\n```",
            mine=1,
        ),
        dict(
            prompt="def f(x):\n",
            entry_point="f",
            test=check,
            response="```python\ndef f(x):\n    return x\n```",
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
    assert last_json(capsys.readouterr().out)["correct"] == 1
    found = [json.loads(line) for line in (tmp_path / "V.jsonl").read_text().splitlines()]
    assert [(v["mine"], v["correct"]) for v in found] == [(1, True), (2, False)]
    assert all(row.items() <= v.items() for row, v in zip(rows, found))


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
