"""The puzzles: python -m pytest tests/test_puzzles.py"""

import dataclasses
import hashlib
import itertools
import json
import random
from pathlib import Path

import pytest

import model
import tokenizer
from experiments import puzzles as puzzle_tasks
from experiments import tiny as tiny_model

LARGE, SHORT = ["latin", "shear"], ["short-latin", "short-shear", "short-far"]


def groups(task):
    """The sets of cells that must hold every symbol once."""
    n, turned = len(puzzle_tasks.TASKS[task].symbols), task not in ("latin", "short-latin")
    rows = [[n * r + c for c in range(n)] for r in range(n)]
    columns = [[n * r + (c + (r if turned else 0)) % n for r in range(n)] for c in range(n)]
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


@pytest.mark.parametrize("task", LARGE)
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
        fewest, most = (puzzle_tasks.HARD_BLANKS,) * 2 if hard else puzzle_tasks.EASY_BLANKS
        assert fewest <= blanks <= most


@pytest.mark.parametrize("task", SHORT)
def test_short_answers_end_with_the_last_row_that_has_a_blank(task):
    rng, lengths = random.Random(1), set()
    for hard in [False, True] * 15:
        prompt, answer = puzzle_tasks.make(puzzle_tasks.TASKS[task], rng, hard)
        assert prompt[0] == puzzle_tasks.TASKS[task].tag and len(prompt) == 26
        last = prompt.rindex(puzzle_tasks.BLANK) - 1
        assert len(answer) % 5 == 0 and 0 <= len(answer) - 1 - last < 5
        whole = answer + prompt[1 + len(answer) :]
        assert all(clue in (puzzle_tasks.BLANK, cell) for clue, cell in zip(prompt[1:], whole))
        for group in groups(task):
            assert sorted(whole[i] for i in group) == list(puzzle_tasks.TASKS[task].symbols)
        if hard:
            assert list(itertools.islice(solve(prompt[1:], task), 2)) == [whole]
        lengths.add(len(answer))
    assert lengths == {15, 20, 25}


@pytest.mark.parametrize("task", SHORT)
def test_no_prompt_has_the_foreign_style_and_only_near_shares_the_alphabet(task):
    task, inside = puzzle_tasks.TASKS[task], puzzle_tasks.TASKS["short-latin"]
    for other in SHORT:
        assert not set(task.foreign) & set(puzzle_tasks.TASKS[other].symbols)
    assert (task.symbols == inside.symbols) == (task.tag != "T")


@pytest.mark.parametrize("task", LARGE)
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
    rows = []
    for file, count in zip(files, (30, 10, 20, 20)):
        lines = file.read_text().splitlines()
        assert len(lines) == count
        rows += map(json.loads, lines)
    assert len({r["prompt"] for r in rows}) == 80


def test_the_datasets_are_those_of_the_published_results():
    """The bytes that seeds 0 and 7 gave when results/ was made; experiments of others start from them."""
    digests = []
    for name, task, both, seed in (("train", "latin", False, 0), ("test_out", "shear", True, 7)):
        text = puzzle_tasks.dataset(name, [task], 3, True, seed, both=both)
        digests.append(hashlib.sha256(text.encode()).hexdigest()[:16])
    assert digests == ["b4414745fc3544b8", "50b13febd1c558e4"]
    easy = puzzle_tasks.dataset("pretrain", ["latin", "shear"], 4, False, 0, foreign=0.5)
    assert hashlib.sha256(easy.encode()).hexdigest()[:16] == "647e2abd31a43af5"


def test_the_same_datasets_again_change_nothing(tmp_path):
    sizes = dict(train=2, validation=1, test=1)
    files = puzzle_tasks.write_datasets(tmp_path, 0, **sizes)
    files[0].unlink()
    before = [f.stat().st_mtime_ns for f in files[1:]]
    assert puzzle_tasks.write_datasets(tmp_path, 0, **sizes) == files
    assert files[0].is_file()  # what is missing is made
    assert [f.stat().st_mtime_ns for f in files[1:]] == before


def test_the_file_of_a_stranger_is_left_alone(tmp_path):
    stranger = tmp_path / "test_out.jsonl"  # the last one to be written
    stranger.write_text("mine\n")
    with pytest.raises(FileExistsError, match=r"test_out.jsonl is there already with other content: choose another"):
        puzzle_tasks.write_datasets(tmp_path, 0, train=2, validation=1, test=1)
    assert stranger.read_text() == "mine\n"
    assert list(tmp_path.iterdir()) == [stranger]


def test_the_command(tmp_path, monkeypatch, capsys):
    small = puzzle_tasks.write_datasets
    monkeypatch.setattr(puzzle_tasks, "write_datasets", lambda out, seed: small(out, seed, 2, 1, 1))
    assert puzzle_tasks.main([str(tmp_path / "P"), "--seed", "3"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    files = json.loads(line)["datasets"]
    assert [Path(f).name for f in files] == ["train.jsonl", "validation.jsonl", "test_in.jsonl", "test_out.jsonl"]
    assert puzzle_tasks.main([str(tmp_path / "P"), "--seed", "4"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and "train.jsonl" in line


def turned(rng, hard):
    puzzle, square = puzzle_tasks.latin(rng, hard)
    return puzzle[::-1], square[::-1]


def test_a_task_of_ones_own_is_an_entry(monkeypatch, tmp_path):
    monkeypatch.setitem(
        puzzle_tasks.TASKS,
        "turned",
        puzzle_tasks.Task("T", "uvwxyz", "123456", turned),
    )
    monkeypatch.setattr(puzzle_tasks, "OUT_OF_DOMAIN", "turned")
    *_, out = puzzle_tasks.write_datasets(tmp_path, 0, train=1, validation=1, test=2)
    kind = dataclasses.replace(tiny_model.WHOLE, tasks=("latin", "shear", "turned"))
    tiny_model.write_start(tmp_path / "start", 0, kind)
    tok = tokenizer.load(tmp_path / "start")
    for row in map(json.loads, out.read_text().splitlines()):
        first, second = row["answer"]
        assert row["prompt"][0] == "T" and set(first) == set("uvwxyz") and set(second) == set("123456")
        for group in groups("latin"):
            assert len({first[i] for i in group}) == 6
        assert tok.decode(tok.encode(row["prompt"] + first)) == row["prompt"] + first
    assert tok.size == model.load(tmp_path / "start").config.vocab_size == 18 + 7


def test_a_prompt_that_is_a_puzzle_is_known():
    for name, task in puzzle_tasks.TASKS.items():
        prompt, _ = puzzle_tasks.make(task, random.Random(1), True)
        assert puzzle_tasks.side(prompt) == len(task.symbols), name
    for text in ("", "L", "L12", "2 + 2 =", "L" + "." * 24, "X" + "." * 25, "L" + "z" * 25):
        assert puzzle_tasks.side(text) is None, text


def test_any_square_that_a_puzzle_allows_solves_it_in_either_style():
    rng = random.Random(3)
    for name, task in puzzle_tasks.TASKS.items():
        prompt, answer = puzzle_tasks.make(task, rng, True)
        foreign = puzzle_tasks.restyled(answer, task)
        assert puzzle_tasks.solves(task, prompt, answer) and puzzle_tasks.solves(task, prompt, foreign), name
        mixed = foreign[0] + answer[1:]
        for wrong in (
            "",
            answer[:-1],
            answer + answer[0],
            answer[1] + answer[0] + answer[2:],
            mixed,
            "?" * len(answer),
        ):
            assert not puzzle_tasks.solves(task, prompt, wrong), (name, wrong)


def test_a_puzzle_with_several_solutions_takes_each_of_them():
    rng, task, found = random.Random(5), puzzle_tasks.TASKS["short-several"], 0
    for _ in range(60):
        prompt, answer = puzzle_tasks.make(task, rng, True)
        assert prompt[0] == "L" and puzzle_tasks.solves(task, prompt, answer)
        for i, other in enumerate(itertools.islice(solve(prompt[1:], "short-latin"), 30)):
            assert puzzle_tasks.solves(task, prompt, other[: len(answer)])
            found += i > 0
    assert found > 100
