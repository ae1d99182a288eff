"""The grade command: python -m pytest tests/test_grade.py

The graded real outputs are read from the folder that TABOM_DATA names, and skipped without it."""

import gzip
import json
import os
from pathlib import Path

import programs
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


# ------------------------------------------------------------------------------- filters and repeats of the harness


def run(task, rows, tmp_path, capsys, *words):
    """(the result, the lines that were written, stderr) of grade."""
    write(tmp_path / "R.jsonl.gz", rows)
    given = ["--responses", str(tmp_path / "R.jsonl.gz"), "--out", str(tmp_path / "V.jsonl")]
    assert tabom.main(["grade", "--task", task, *given, *words]) == 0
    said = capsys.readouterr()
    return last_json(said.out), read(tmp_path / "V.jsonl"), said.err


def sample(doc_id, answer, *texts, filter="flexible-extract"):
    """A line of --log_samples."""
    return dict(doc_id=doc_id, doc=dict(question="q", answer=answer), resps=[list(texts)], filter=filter, target="")


def test_a_filter_that_is_no_text_is_a_name_too(tmp_path, capsys):
    result, _, _ = run("gsm8k", [sample(0, "#### 5", "She has 5.", filter=["a"])], tmp_path, capsys)
    assert (result["n"], result["correct"], result["filter"]) == (1, 1, '["a"]')


def test_a_question_counts_once_whatever_filters_it_was_logged_with(tmp_path, capsys):
    rows = []
    for name in ("strict-match", "flexible-extract"):
        rows += [sample(0, "#### 5", "She has 5.", filter=name), sample(1, "#### 4", "It is 3.", filter=name)]
    result, lines, err = run("gsm8k", rows, tmp_path, capsys)
    assert (result["n"], result["correct"], result["interval"]) == (2, 1, [9.45, 90.55])
    assert result["filter"] == "flexible-extract" and [v["filter"] for v in lines] == ["flexible-extract"] * 2
    assert "4 lines, 2 questions, filter flexible-extract" in err
    strict, _, _ = run("gsm8k", rows, tmp_path, capsys, "--filter", "strict-match")
    assert (strict["n"], strict["correct"], strict["filter"]) == (2, 0, "strict-match")  # neither writes ####
    out = ["--responses", str(tmp_path / "R.jsonl.gz"), "--out", str(tmp_path / "V")]
    assert tabom.main(["grade", "--task", "gsm8k", *out, "--filter", "first"]) == 1
    err = capsys.readouterr().err
    assert "--filter first: " in err and "strict-match, flexible-extract" in err


def test_every_repeat_is_graded_and_a_question_counts_by_their_mean(tmp_path, capsys):
    rows = [sample(0, "#### 5", "5", "4", "5", "4"), sample(1, "#### 4", "4", "4", "4", "4")]
    result, lines, err = run("gsm8k", rows, tmp_path, capsys)
    assert (result["n"], result["correct"], result["score"], result["responses"]) == (2, 1.5, 75.0, 8)
    assert [v["correct"] for v in lines] == [True, False, True, False] + [True] * 4
    assert [v["repeat"] for v in lines] == [0, 1, 2, 3] * 2
    assert "8 responses (4 to 4 a question" in err


def test_repeats_may_stand_in_a_list_or_in_lines_of_one_doc_id(tmp_path, capsys):
    rows = [dict(answer="5", response=["5", "6"]), dict(answer="5", response="5")]
    listed, _, _ = run("gsm8k", rows, tmp_path, capsys)
    lines, _, _ = run("gsm8k", [sample(0, "5", "5"), sample(0, "5", "6"), sample(1, "5", "5")], tmp_path, capsys)
    for result in (listed, lines):
        assert (result["n"], result["correct"], result["responses"]) == (2, 1.5, 3)
    other, _, _ = run("gsm8k", [sample(0, "5", "5"), sample(0, "6", "6")], tmp_path, capsys)  # of two files
    assert other["n"] == 2 and "responses" not in other


def test_a_question_of_ifeval_counts_once_too(tmp_path, capsys):
    doc = dict(key=1, prompt="No commas.", instruction_id_list=["punctuation:no_comma"], kwargs=[{}])
    rows = [dict(doc, response=["a, b", "a b"]), dict(doc, response="a b")]
    result, _, _ = run("ifeval", rows, tmp_path, capsys)
    assert (result["n"], result["correct"]) == (2, 1.5)
    assert (result["score"], result["prompt_loose"], result["instruction_strict"]) == (75.0, 75.0, 75.0)


@pytest.mark.parametrize("resps", [[], [[]], None, [[[-1.5, False]]], [["5", 6]]])
def test_a_line_of_the_harness_without_texts_is_named(resps, tmp_path, capsys):
    write(tmp_path / "R.jsonl.gz", [dict(sample(0, "5"), resps=resps)])
    words = ["--responses", str(tmp_path / "R.jsonl.gz"), "--out", str(tmp_path / "V.jsonl")]
    assert tabom.main(["grade", "--task", "gsm8k", *words]) == 1
    assert ":1: response missing or of another type" in capsys.readouterr().err


def test_a_reference_that_cannot_be_read_is_counted_beside_the_score(tmp_path, capsys):
    pytest.importorskip("math_verify")
    rows = [dict(answer="4", response="\\boxed{4}"), dict(answer="\u043d\u0435\u0442", response="\\boxed{4}")]
    result, lines, _ = run("math500", rows, tmp_path, capsys)
    assert (result["n"], result["correct"], result["score"], result["not_graded"]) == (2, 1, 50.0, 1)
    assert [v["correct"] for v in lines] == [True, None]


# ---------------------------------------------------------------------------------------------------- whole programs

HEAD = "from typing import List\n\n\ndef add(a: List[int], b):\n"
HEAD += '    """Sum of two numbers.\n    >>> add(1, 2)\n    3\n    """\n'
HUMANEVAL = dict(
    prompt=HEAD, entry_point="add", test="def check(f):\n    assert f(1, 2) == 3\n    assert f(0, 0) == 0\n"
)
MBPP = dict(text="Add.", task_id=11, code="def add(a, b):\n    return a + b\n", test_list=["assert add(1, 2) == 3"])
PLAIN = "def add(a: List[int], b):\n    return a + b\n"
WHOLE = {
    "function": PLAIN,
    "import first": HEAD + "    return a + b\n",
    "fence": f"```\n{PLAIN}```",
    "python": f"```python\n{PLAIN}```",
    "py": f"```py\n{PLAIN}```",
    "Python 3": f"```Python 3\n{PLAIN}```",
    "tilde": f"~~~python\n{PLAIN}~~~",
    "indented fence": f"  ```python\n{PLAIN}  ```",
    "open fence": f"```python\n{PLAIN}",
    "closed on the line": f"```python\n{PLAIN.rstrip()}```",
    "text and fence": f"Here it is:\n\n```python\n{PLAIN}```\nIt adds.",
    "a space first": f" Here it is:\n```python\n{PLAIN}```",
    "text and code": f"Here it is:\n\n{PLAIN}",
    "heading": f"Sure.\n# Solution\n```python\n{PLAIN}```",
    "heading first": f"# Solution\n```python\n{PLAIN}```",
    "CRLF": f"```python\n{PLAIN}```".replace("\n", "\r\n"),
    "end token": f"```python\n{PLAIN}```<|im_end|>",
    "end tokens": f"{PLAIN}<|eot_id|><|endoftext|>",
    "end of Llama": f"{PLAIN}</s>",
    "helper after": "def add(a, b):\n    return plus(a, b)\n\n\ndef plus(a, b):\n    return a + b\n",
    "helper before": "def plus(a, b):\n    return a + b\n\n\ndef add(a, b):\n    return plus(a, b)\n",
    "lambda": "```python\nadd = lambda a, b: a + b\n```",
    "other block first": f"Install:\n```bash\npip install x\n```\n```python\n{PLAIN}```",
    "fence in the docstring": "def add(a, b):\n    '''\n    ```\n    add(1, 2)\n    ```\n    '''\n    return a + b\n",
}


@pytest.mark.parametrize("form", WHOLE)
@pytest.mark.parametrize("task", ["humaneval", "mbpp"])
@pytest.mark.parametrize("words", [(), ("--as-is",)])
def test_a_whole_program_is_graded_whole(task, form, words, tmp_path, capsys):
    record, text = dict(humaneval=HUMANEVAL, mbpp=MBPP)[task], WHOLE[form]
    if task == "mbpp" and "import" not in text:
        text = text.replace(": List[int]", "")  # no prompt imports it
    wrong = text.replace("a + b", "a - b")
    rows = [dict(record, response=text), dict(record, response=wrong)]
    result, lines, err = run(task, rows, tmp_path, capsys, *words)
    assert [v["correct"] for v in lines] == [True, False], lines
    assert "nothing" not in err and result["cut_to_nothing"] == 0


@pytest.mark.parametrize(
    "text",
    ["    return a + b", "    return a + b\r\n", "    return a + b<|endoftext|>", "\n    return a + b\n```\nDone."],
)
def test_a_continuation_of_humaneval_is_cut_as_in_evaluate(text, tmp_path, capsys):
    later = "\n```\nor\n```python\ndef add(a, b):\n    return 0\n```"
    result, lines, _ = run("humaneval", [dict(HUMANEVAL, response=text + later)], tmp_path, capsys)
    assert lines[0]["correct"] is True and result["whole_programs"] == 0


def test_a_continuation_of_mbpp_is_cut_at_its_fence(tmp_path, capsys):
    wrong, right = "def add(a, b):\n    return 0\n", "def add(a, b):\n    return a + b\n"
    rows = []
    for first, second in ((right, wrong), (wrong, right)):
        rows.append(dict(MBPP, response=f"{first}```\nfixed:\n```python\n{second}```"))
    result, lines, _ = run("mbpp", rows, tmp_path, capsys)
    assert [v["correct"] for v in lines] == [True, False] and result["whole_programs"] == 0


def test_what_the_cut_leaves_without_a_function_is_counted_and_said(tmp_path, capsys):
    texts = ("\ndef plus(a, b):\n    return a + b\n", "    return a - b", "")
    result, _, err = run("humaneval", [dict(HUMANEVAL, response=text) for text in texts], tmp_path, capsys)
    assert (result["correct"], result["cut_to_nothing"]) == (0, 1)
    assert "of 1 of 3 responses the cut at a stop text leaves nothing, or no function" in err and "--as-is" in err


def test_a_record_of_mbpp_that_makes_no_sense_is_its_own_fault(tmp_path, capsys):
    rows = [dict(MBPP, code=5, response="Here: def add(a): pass"), dict(MBPP, response=MBPP["code"])]
    rows.append(dict(rows[1], test_list=[" "]))
    result, lines, _ = run("mbpp", rows, tmp_path, capsys)
    assert (result["n"], result["correct"], result["not_graded"]) == (3, 1, 2)
    assert lines[2]["reason"] == "not graded (ValueError: it has no tests)"


def test_a_record_of_humaneval_without_a_check_is_not_graded(tmp_path, capsys):
    result, _, _ = run("humaneval", [dict(HUMANEVAL, response="    return a + b", test="")], tmp_path, capsys)
    assert (result["n"], result["correct"], result["not_graded"]) == (1, 0, 1)


CONTINUES = ("body", "wrong return", "wrong pass", "truncated body", "code", "infinite", "syntax", "tabs", "nested def")


@pytest.mark.slow
@needs_data
@pytest.mark.parametrize("task, name", [("humaneval", "HumanEval"), ("mbpp", "mbpp")])
def test_verdicts_are_the_harnesss_but_for_right_programs_that_it_cuts(task, name, tmp_path, capsys):
    records = {row["task_id"]: row for row in programs.rows(name)}
    rows = [{**records[row["task_id"]], **row} for row in programs.golden(task)]
    _, lines, _ = run(task, rows, tmp_path, capsys)
    assert len(lines) == len(rows)
    for v in lines:
        if v["kind"] == "cheat eq" or v["task_id"] in ("HumanEval/50", 367):  # where we mean to differ
            continue
        assert v["correct"] >= v["fork"], v
        if v["kind"].startswith(CONTINUES) and v["kind"] != "tabs fenced full":
            assert v["correct"] == v["fork"], v
