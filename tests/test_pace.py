"""runs/pace.py and what evaluate says of speed: python -m pytest tests/test_pace.py"""

import gzip
import json
from types import SimpleNamespace

import pytest
from helpers import run

import data
import evaluate
import tokenizer
from runs import pace

ANSWERS = [  # 9 ends a response
    dict(response_ids=[1, 2, 3, 9, 9, 9], step=[0, 0, 1, 1, 2, 2], order=[0, 1, 2, 3, 4, 5]),
    dict(response_ids=[1, 1, 1, 1, 1, 1], step=[5, 0, 4, 1, 2, 3], order=[5, 0, 4, 1, 2, 3]),  # none does
    dict(response_ids=[9, 1, 1, 1, 1, 1], step=[3, 0, 0, 1, 1, 2], order=[5, 0, 1, 2, 3, 4]),  # empty
    dict(response_ids=[1, 0, 9, 0, 0, 0], step=[1, 6, 0, 6, 6, 6], order=[1, -1, 0, -1, -1, -1]),  # 0 is the mask
]


def test_length_and_steps_end_with_the_stop():
    assert [pace.length_and_steps(record, {9}) for record in ANSWERS] == [(4, 2), (6, 6), (1, 1), (2, 2)]
    assert pace.pace(ANSWERS, {9}) == dict(mean_length=3.25, mean_steps=2.75, tokens_per_pass=1.182)


def test_the_clock_stands_while_answers_are_graded(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(pace.time, "perf_counter", lambda: now[0])
    watch = pace.Stopwatch({9})
    for decoding, grading, records in ((2, 100, ANSWERS[:1]), (3, 50, ANSWERS[1:2])):
        now[0] += decoding
        watch.stop(records)
        now[0] += grading
        watch.go_on()
    now[0] += 1000  # others are waited for
    alone = SimpleNamespace(count=1, sum=lambda values: values)
    assert watch.speed(alone) == dict(tokens_per_second=2.0, timed=2)
    three = SimpleNamespace(count=3, sum=lambda values: [3 * value for value in values])
    assert watch.speed(three) == dict(tokens_per_second=6.0, timed=6)  # at the same time
    assert pace.Stopwatch({9}).speed(alone) == dict(tokens_per_second=None, timed=0)


def test_evaluate_says_how_fast_its_answers_are(bytes_model, tmp_path, capsys):
    folder = tmp_path / "data"
    folder.mkdir()
    with gzip.open(folder / "gsm8k_test.jsonl.gz", "wt") as f:
        f.writelines(json.dumps(dict(question=f"What is {i}?", answer=f"#### {i}")) + "\n" for i in range(5))
    options = dict(model=bytes_model, data=folder, max_new_tokens=8, block_length=8, tokens_per_step=2)
    (first,) = run(capsys, "evaluate", **options, limit=2, out=tmp_path / "E")[0]["scores"]
    assert first["timed"] == first["n"] == 2 and first["tokens_per_second"] > 0
    (score,) = run(capsys, "evaluate", **options, out=tmp_path / "E")[0]["scores"]
    assert (score["timed"], score["n"]) == (3, 5)  # two were there
    records, ends = data.read_trajectories(tmp_path / "E" / "gsm8k"), tokenizer.load(bytes_model).stop_ids
    assert pace.pace(records, ends).items() <= score.items()
    (saved,) = json.loads((tmp_path / "E" / "results.json").read_text())["scores"]
    assert saved == score
    assert "gsm8k: tokens/s is of the 3 of 5 answers that this call decoded" in evaluate.score_table([score])
    (again,) = run(capsys, "evaluate", **options, out=tmp_path / "E")[0]["scores"]
    assert (again["tokens_per_second"], again["timed"]) == (None, 0)
    head, _, row, *_ = evaluate.score_table([again]).splitlines()
    shown = dict(zip(head.strip("| ").split(" | "), row.strip("| ").split(" | ")))
    assert shown["tokens/s"] == "-" and shown["tokens per pass"] == str(again["tokens_per_pass"])


@pytest.mark.parametrize("steps, per_pass", [(8, 1.0), (4, 2.0)])
def test_tokens_per_pass_is_the_schedules_where_nothing_ends(bytes_model, tmp_path, capsys, steps, per_pass):
    folder = tmp_path / "data"
    folder.mkdir()
    with gzip.open(folder / "gsm8k_test.jsonl.gz", "wt") as f:
        f.write(json.dumps(dict(question="What?", answer="#### 1")) + "\n")
    options = dict(model=bytes_model, data=folder, max_new_tokens=8, block_length=8, steps=steps, suppress_eos=True)
    (score,) = run(capsys, "evaluate", **options, out=tmp_path / "E")[0]["scores"]
    assert (score["mean_length"], score["tokens_per_pass"]) == (8.0, per_pass)
