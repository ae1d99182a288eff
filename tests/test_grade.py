"""The grade command: python -m pytest tests/test_grade.py

The graded real outputs are read from the folder that TABOM_DATA names, and skipped without it."""

import gzip
import json
import os
from pathlib import Path

import pytest
from helpers import last_json

import tabom

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
