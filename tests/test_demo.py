"""The demo: python -m pytest tests/test_demo.py"""

import io
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from helpers import ROOT, flags, last_json, shell, write_lines
from tqdm import tqdm

import data
import distill
import tabom
import tokenizer
from experiments import demo
from runs import loading


def test_the_table_of_before_and_after():
    before = dict(in_domain=0.5, two_a_step=0.25, near=0.0, far=1, tds=None)
    after = dict(before, in_domain=0.75, tds=0.25, gain=0.25, gain_se=0.0512)
    sizes = dict(test_in=100, test_near=50, test_far=25)
    head, _, before, after = demo.table(dict(before=before, TABOM=after), sizes).splitlines()
    assert head == "| 100 puzzles | in-domain % | - before | two a step % | near % | far % | TDS |"
    assert before == "| before | 50.0 ± 5.0 |  | 25.0 ± 4.3 | 0.0 ± 0.0 | 100.0 ± 0.0 | - |"
    assert after.startswith("| TABOM | 75.0 ± 4.3 | +25.0 ± 5.1 |")  # 100 sqrt(0.75 * 0.25 / 100) = 4.33
    assert after.endswith("| 0.250 |")
    assert "chosen after looking" in demo.ON_THIS_BASE


def test_a_gain_is_paired_over_the_same_puzzles(tmp_path, monkeypatch):
    before, after = [True, True, False, False, True], [True, False, True, True, True]
    for row, right in (("before", before), ("TABOM", after)):
        (tmp_path / f"{row}-in").mkdir()
        records = [dict(id=i, prompt_ids=[1], response_ids=[2], order=[0], correct=c) for i, c in enumerate(right)]
        write_lines(tmp_path / f"{row}-in" / "trajectories-00000.jsonl", reversed(records))
    monkeypatch.setattr(demo, "decode_and_check", lambda *_, **__: dict(correct=1, trajectories=2))
    found = demo.test({}, tmp_path, "TABOM", "adapter")
    differences = torch.tensor([0.0, -1, 1, 1, 0])
    assert found["gain"] == pytest.approx(differences.mean().item())
    assert found["gain_se"] == pytest.approx(differences.std().item() / 5**0.5)
    assert "gain" not in demo.test({}, tmp_path, "before")


def test_one_puzzle_is_shown_before_and_after_with_its_steps():
    tok = tokenizer.load(demo.TINY5)
    ids, eos = tok.encode("1234551234"), [tok.eos_id] * 21
    right = dict(prompt="L1.3455.234" + "." * 15, answer=["1234551234", "x"], response_ids=ids + eos, correct=True)
    right["step"] = [*range(21, 31), *range(21)]
    wrong = dict(right, response_ids=tok.encode("1134551234") + eos, correct=False)
    told, _, titles, first, *rows = demo.before_and_after(dict(before=wrong, TABOM=right)).splitlines()
    assert told.startswith("the first test puzzle that only the trained model solves")
    assert titles.split() == ["the", "puzzle", "before", "at", "step", "TABOM", "at", "step"]
    assert first.split() == [*"1.345", *"1", "!1", *"345", *map(str, range(21, 26)), *"12345", *map(str, range(21, 26))]
    assert rows[-1].split()[5:10] == ["-"] * 5  # the answer has ended
    assert len({len(row) for row in rows}) == 1 and "!" not in "".join(rows)
    assert demo.before_and_after(dict(before=right, TABOM=right)).startswith("a test puzzle")


def test_stages_say_which_one_begins_and_how_long_is_left(capsys):
    now = SimpleNamespace(time=0.0)
    stages = demo.Stages({"first": 10, "second": 20, "third": 60}, clock=lambda: now.time)
    stages.begin("first")
    now.time += 5  # twice as fast as the reference
    stages.begin("second")
    now.time += 0.1  # an earlier run had finished it: this says nothing about the pace
    stages.begin("third")
    now.time += 600  # what is said never goes up
    stages.begin("third")
    stages.end()
    assert capsys.readouterr().err.splitlines() == [
        "stage 1 of 3: first",
        "stage 2 of 3: second, about 40 s left",
        "stage 3 of 3: third, about 30 s left",
        "stage 3 of 3: third, about 30 s left",
    ]
    assert demo.Stages({"a": 10, "b": 30}, share=0.1).expected == [1.0, 3.0]
    demo.Stages({"a": 10}, shows=False).begin("a")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("seconds, text", [(0.2, "1 s"), (40, "40 s"), (59.6, "1 min 00 s"), (100, "1 min 40 s")])
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
    monkeypatch.setattr(demo, "WHOLE", dict(train=3, test_in=2, test_near=2, test_far=2))
    assert tabom.main(["demo", *flags(data_only=tmp_path / "P", seed=5)]) == 0
    files = [tmp_path / "P" / f"{name}.jsonl" for name in ("train", "test_in", "test_near", "test_far")]
    assert last_json(capsys.readouterr().out) == dict(datasets=list(map(str, files)))
    tags = [{json.loads(line)["prompt"][0] for line in file.read_text().splitlines()} for file in files]
    assert tags == [{"L"}, {"L"}, {"S"}, {"T"}]


def test_the_folder_of_a_stranger_is_refused(tmp_path, capsys):
    file = tmp_path / "demo" / "quick-0" / "data" / "train.jsonl"
    file.parent.mkdir(parents=True)
    file.write_text("mine")
    assert tabom.main(["demo", "--quick", *flags(out=tmp_path / "demo")]) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: ") and "train.jsonl" in last
    assert file.read_text() == "mine"


@pytest.mark.slow
def test_the_quick_demo_prints_a_puzzle_a_table_and_json(tmp_path):
    words = [sys.executable, str(ROOT / "tabom.py"), "demo", "--quick", "--watch", "--out", str(tmp_path / "demo")]
    env = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}  # as a user runs it
    done = subprocess.run(words, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.strip().splitlines()
    result = json.loads(lines[-1])
    for row in ("before", "TABOM", "SFT-SD"):
        (line,) = [line for line in lines if line.startswith(f"| {row} |")]
        assert f"{100 * result[row]['in_domain']:.1f}" in line and f"{result[row]['tds']:.3f}" in line
    assert any(line.startswith("the puzzle   before") for line in lines)
    (pictures,) = [line for line in lines if line.startswith("pictures: ")]
    folder = tmp_path / "demo" / "quick-0" / "pictures"
    assert str(folder) in pictures
    assert {"decoding.gif", "puzzle.png", "tds.png", "training.png"} <= {file.name for file in folder.iterdir()}
    said = [line for line in done.stderr.splitlines() if line.startswith("stage ")]
    assert len(said) == 8 and said[3].startswith("stage 4 of 8: train TABOM, about ")
    assert done.stderr.count("31 steps, 1.0 tokens a step") == 2  # --watch: before and after
    records = data.read_trajectories(tmp_path / "demo" / "quick-0" / "before-in")
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
