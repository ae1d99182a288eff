"""The demo: python -m pytest tests/test_demo.py"""

import io
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from helpers import ROOT, flags, last_json, shell
from tqdm import tqdm

import data
import distill
import tabom
from experiments import demo
from runs import loading


def test_the_table_of_before_and_after():
    rows = dict(
        before=dict(in_domain=0.5, out_of_domain=0.0, tds=None), after=dict(in_domain=0.75, out_of_domain=1, tds=0.25)
    )
    *_, before, after = demo.before_and_after(rows, 100).splitlines()
    assert before == "| before | 50.0 ± 5.0 | 0.0 ± 0.0 | - |"
    assert after == "| after | 75.0 ± 4.3 | 100.0 ± 0.0 | 0.250 |"  # 100 sqrt(0.75 * 0.25 / 100) = 4.33


def test_stages_say_which_one_begins_and_how_long_is_left(capsys):
    now = SimpleNamespace(time=0.0)
    stages = demo.Stages({"first": 10, "second": 20, "third": 60}, clock=lambda: now.time)
    stages.begin("first")
    now.time += 20  # twice as slow as the reference
    stages.begin("second")
    now.time += 0.1  # an earlier run had finished it: this says nothing about the pace
    stages.begin("third")
    stages.end()
    assert capsys.readouterr().err.splitlines() == [
        "stage 1 of 3: first, about 2 min left",
        "stage 2 of 3: second, about 3 min left",
        "stage 3 of 3: third, about 2 min left",
    ]
    assert demo.Stages({"a": 10, "b": 30}, share=0.1).expected == [1.0, 3.0]
    demo.Stages({"a": 10}, shows=False).begin("a")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("seconds, text", [(0.2, "1 s"), (40, "40 s"), (89, "89 s"), (100, "2 min"), (3600, "60 min")])
def test_durations(seconds, text):
    assert demo.duration(seconds) == text


def test_a_small_model_uses_one_thread_unless_told_otherwise(monkeypatch):
    small, large = torch.nn.Linear(10, 10), torch.nn.Linear(10_000, 10_000, device="meta")
    threads = []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    loading.one_thread_if_small(large)
    assert threads == []
    loading.one_thread_if_small(small)
    assert threads == [1]
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    loading.one_thread_if_small(small)
    assert threads == [1]


def test_only_the_datasets(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(demo.puzzles, "write_datasets", lambda out, seed: (out, seed))
    assert tabom.main(["demo", *flags(data_only=tmp_path / "P", seed=5)]) == 0
    assert last_json(capsys.readouterr().out) == dict(datasets=[str(tmp_path / "P"), "5"])


def test_the_folder_of_a_stranger_is_refused(tmp_path, capsys):
    file = tmp_path / "demo" / "quick-0" / "data" / "train.jsonl"
    file.parent.mkdir(parents=True)
    file.write_text("mine")
    assert tabom.main(["demo", "--quick", *flags(out=tmp_path / "demo")]) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: ") and "train.jsonl" in last
    assert file.read_text() == "mine"


@pytest.mark.slow
def test_the_quick_demo_prints_a_table_and_json(tmp_path):
    words = [sys.executable, str(ROOT / "tabom.py"), "demo", "--quick", "--out", str(tmp_path / "demo")]
    env = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}  # as a user runs it
    done = subprocess.run(words, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    *_, header, _, before, after, last = done.stdout.strip().splitlines()
    result = json.loads(last)
    assert "in-domain" in header and before.startswith("| before") and after.startswith("| after")
    for line, row in ((before, result["before"]), (after, result["after"])):
        assert f"{100 * row['in_domain']:.1f}" in line and f"{row['tds']:.3f}" in line
    said = [line for line in done.stderr.splitlines() if line.startswith("stage ")]
    assert len(said) == 6 and said[2].startswith("stage 3 of 6: train, about ")
    records = data.read_trajectories(tmp_path / "demo" / "quick-0" / "before-test_in")
    assert result["before"]["in_domain"] == sum(r["correct"] for r in records) / len(records)
    again = subprocess.run(words, capture_output=True, text=True, env=env)  # everything is there already
    assert json.loads(again.stdout.strip().splitlines()[-1]) == result


@pytest.mark.slow
def test_the_demo_on_two_processes_says_the_same(tmp_path):
    said = []
    for processes in (1, 2):
        done = shell("demo", "--quick", "--out", str(tmp_path / str(processes)), processes=processes)
        assert done.returncode == 0, done.stderr
        said.append(last_json(done.stdout))
    assert said[0]["before"] == pytest.approx(said[1]["before"]) and said[0]["steps"] == said[1]["steps"]


def test_the_bar_moves_while_prompts_are_answered():
    bar = tqdm(total=20, disable=False, file=io.StringIO())
    progress = distill.Progress(bar, dict(max_new_tokens=4, steps=4))
    progress.seen, places = 5, []
    for step in range(4):  # ten rows
        progress.decoded(torch.full((10,), step))
        places.append(bar.n)
    assert places == [7, 10, 12, 15]
    progress.decoded(torch.full((10,), 7))  # more steps than expected, with a threshold
    assert bar.n == 15


def test_the_bar_says_the_speed_and_the_whole_time(monkeypatch):
    bar = tqdm(total=12_000, disable=False, file=io.StringIO())
    progress = distill.Progress(bar, dict(max_new_tokens=256, tokens_per_step=2))
    progress.seen, progress.kept = 90, 45
    monkeypatch.setattr(distill.time, "perf_counter", lambda: progress.begun + 360)
    progress.decoded(torch.tensor([63] * 20))  # half of 20 prompts: 100 in 6 minutes
    assert bar.postfix == "71 tokens/s, 12:00:00 in all, kept 50%"
    progress.masks = 90 * 255  # responses that ended with their first token
    progress.decoded(torch.tensor([63] * 20))
    assert bar.postfix == "7 tokens/s, 12:00:00 in all, kept 50%"
