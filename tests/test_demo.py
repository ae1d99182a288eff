"""The puzzles, the tiny model and the demo: python -m pytest tests/test_demo.py"""

import itertools
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import last_json, shell
from safetensors import safe_open

import data
import decode
import model
import runs
from experiments import puzzles as puzzle_tasks
from experiments import tiny as tiny_model

ROOT = Path(__file__).parent.parent


def groups(task):
    """The sets of cells that must hold every symbol once."""
    rows = [[6 * r + c for c in range(6)] for r in range(6)]
    columns = [[6 * r + (c + (r if task == "shear" else 0)) % 6 for r in range(6)] for c in range(6)]
    return rows + columns


def solve(puzzle, task):
    """Every solution of a puzzle, by plain search: cell by cell, left to right."""
    blanks = [i for i, c in enumerate(puzzle) if c == puzzle_tasks.BLANK]
    if not blanks:
        yield puzzle
        return
    i = blanks[0]
    taken = {puzzle[j] for group in groups(task) if i in group for j in group}
    for symbol in puzzle_tasks.TASKS[task].symbols:
        if symbol not in taken:
            yield from solve(puzzle[:i] + symbol + puzzle[i + 1 :], task)


@pytest.mark.parametrize("task", ["latin", "shear"])
@pytest.mark.parametrize("hard", [False, True])
def test_answers_solve_their_puzzles(task, hard):
    rng = random.Random(1)
    for _ in range(20):
        prompt, answer = puzzle_tasks.make(puzzle_tasks.TASKS[task], rng, hard)
        assert prompt[0] == puzzle_tasks.TASKS[task].tag and len(prompt) == 37 and len(answer) == 36
        assert all(clue in (puzzle_tasks.BLANK, cell) for clue, cell in zip(prompt[1:], answer))
        for group in groups(task):
            assert sorted(answer[i] for i in group) == list(puzzle_tasks.TASKS[task].symbols)
        blanks = prompt.count(puzzle_tasks.BLANK)
        assert (
            blanks == puzzle_tasks.HARD_BLANKS
            if hard
            else puzzle_tasks.EASY_BLANKS[0] <= blanks <= puzzle_tasks.EASY_BLANKS[1]
        )


@pytest.mark.parametrize("task", ["latin", "shear"])
def test_hard_puzzles_have_one_solution_and_singles_get_stuck(task):
    rng = random.Random(2)
    for _ in range(10):
        prompt, answer = puzzle_tasks.make(puzzle_tasks.TASKS[task], rng, True)
        assert list(itertools.islice(solve(prompt[1:], task), 2)) == [answer]
        cells, progress = prompt[1:], True
        while progress:
            progress = False
            for i, c in enumerate(cells):
                taken = {cells[j] for group in groups(task) if i in group for j in group}
                left = [s for s in puzzle_tasks.TASKS[task].symbols if s not in taken]
                if c == puzzle_tasks.BLANK and len(left) == 1:
                    cells, progress = cells[:i] + left[0] + cells[i + 1 :], True
        assert puzzle_tasks.BLANK in cells


def test_datasets_follow_from_the_seed_and_do_not_overlap(tmp_path):
    sizes = dict(train=30, validation=10, test=20)
    files = puzzle_tasks.write_datasets(tmp_path / "a", 0, **sizes)
    again = puzzle_tasks.write_datasets(tmp_path / "b", 0, **sizes)
    other = puzzle_tasks.write_datasets(tmp_path / "c", 1, **sizes)
    assert [f.read_text() for f in files] == [f.read_text() for f in again] != [f.read_text() for f in other]
    rows = [[json.loads(line) for line in f.read_text().splitlines()] for f in files]
    assert [len(r) for r in rows] == [30, 10, 20, 20]
    prompts = [r["prompt"] for r in itertools.chain(*rows)]
    assert len(set(prompts)) == 80


def test_the_tiny_model_is_small_and_of_the_configuration_that_retrain_builds():
    m, tok = model.load(tiny_model.TINY), data.load_tokenizer(tiny_model.TINY)
    assert (tiny_model.TINY / "model.safetensors").stat().st_size < 4e6
    assert m.config.raw == tiny_model.config()
    assert tok.size == m.config.vocab_size == len(tiny_model.vocabulary())
    assert (tok.eos_id, tok.ids[tiny_model.MASK]) == (m.config.eos_id, m.config.mask_id)


def test_the_tiny_model_solves_what_it_was_trained_on():
    """Easy puzzles with few blanks: most are right, whatever the processor's rounding."""
    m, tok = model.load(tiny_model.TINY), data.load_tokenizer(tiny_model.TINY)
    rng, right = random.Random(3), 0
    for _ in range(10):
        prompt, answer = puzzle_tasks.make(puzzle_tasks.TASKS["latin"], rng, False)
        shown = "".join(a if c == puzzle_tasks.BLANK and rng.random() < 0.6 else c for c, a in zip(prompt[1:], answer))
        settings = runs.decoder_settings(runs.DecodeOptions(), runs.Loaded(m, tok, tiny_model.TINY))
        t = decode.generate(m, torch.tensor([tok.encode("L" + shown)]), **settings)
        right += tok.response_text(t.response[0].tolist()) == answer
    assert right >= 8


def test_retrain_builds_a_model_folder(tmp_path):
    result = tiny_model.retrain(tmp_path, count=128, epochs=1)
    folder = Path(result["tiny"])
    assert {f.name for f in folder.iterdir()} == {f.name for f in tiny_model.TINY.iterdir()}
    with (
        safe_open(folder / "model.safetensors", "pt") as ours,
        safe_open(tiny_model.TINY / "model.safetensors", "pt") as tiny,
    ):
        assert set(ours.keys()) == set(tiny.keys())
    assert result["steps"] == 2


@pytest.mark.slow
def test_the_quick_demo_prints_a_table_and_json(tmp_path):
    words = [sys.executable, str(ROOT / "tabom.py"), "demo", "--quick", "--out", str(tmp_path / "demo")]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    *_, header, _, before, after, last = done.stdout.strip().splitlines()
    result = json.loads(last)
    assert "in-domain" in header and before.startswith("| before") and after.startswith("| after")
    for line, row in ((before, result["before"]), (after, result["after"])):
        assert f"{100 * row['in_domain']:.1f}" in line and f"{row['tds']:.3f}" in line
    records = data.read_trajectories(tmp_path / "demo" / "quick-0" / "before-test_in")
    assert result["before"]["in_domain"] == sum(r["correct"] for r in records) / len(records)
    again = subprocess.run(words, capture_output=True, text=True)  # everything is there already
    assert json.loads(again.stdout.strip().splitlines()[-1]) == result


def test_a_task_of_ones_own_is_an_entry(monkeypatch, tmp_path):
    monkeypatch.setitem(
        puzzle_tasks.TASKS,
        "turned",
        puzzle_tasks.Task("T", "uvwxyz", "123456", lambda *a: [c[::-1] for c in puzzle_tasks.latin(*a)]),
    )
    monkeypatch.setattr(puzzle_tasks, "OUT_OF_DOMAIN", "turned")
    *_, out = puzzle_tasks.write_datasets(tmp_path, 0, train=1, validation=1, test=2)
    tiny_model.write_start(tmp_path / "start", 0)
    tok = data.load_tokenizer(tmp_path / "start")
    for row in map(json.loads, out.read_text().splitlines()):
        first, second = row["answer"]
        assert row["prompt"][0] == "T" and set(first) == set("uvwxyz") and set(second) == set("123456")
        for group in groups("latin"):
            assert len({first[i] for i in group}) == 6
        assert tok.decode(tok.encode(row["prompt"] + first)) == row["prompt"] + first
    assert tok.size == model.load(tmp_path / "start").config.vocab_size == 18 + 7


def test_the_model_may_be_an_earlier_checkpoint(tmp_path):
    result = tiny_model.retrain(tmp_path, puzzles=64, epochs=2, taken=1)
    weights = Path(result["tiny"]) / "model.safetensors"
    assert weights.read_bytes() == (tmp_path / "run" / "epoch-1" / "model.safetensors").read_bytes()
    assert result["steps"] == 1 and not (tmp_path / "run" / "epoch-2").exists()


@pytest.mark.slow
def test_the_demo_on_two_processes_says_the_same(tmp_path):
    said = []
    for processes in (1, 2):
        done = shell("demo", "--quick", "--out", str(tmp_path / str(processes)), processes=processes)
        assert done.returncode == 0, done.stderr
        said.append(last_json(done.stdout))
    assert said[0]["before"] == pytest.approx(said[1]["before"]) and said[0]["steps"] == said[1]["steps"]
