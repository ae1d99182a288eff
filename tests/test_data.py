"""Datasets, trajectory files and batches: python -m pytest tests/test_data.py"""

import gzip
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from helpers import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from letters import column, write

import data
from formats import columns

PLAIN = [
    dict(prompt="q", answer="a"),
    dict(prompt="q", answer=None, id="x"),
    dict(prompt=""),
    dict(messages=[dict(role="system", content="s"), dict(role="user", content="q")], answer="b"),
    dict(messages=[dict(role="user", content="q"), dict(role="assistant", content="a")], id=3),
    dict(messages=[dict(role="assistant", content="a"), dict(role="user", content="q")]),
]


@pytest.mark.parametrize("row", PLAIN)
def test_a_plain_row_is_read_here_as_the_reader_of_all_forms_reads_it(row):
    assert data.is_plain(row)
    plain, lines = columns.to_plain(row)
    assert data.to_example(row) == data.to_example(plain) and lines == []


@pytest.mark.parametrize(
    "row",
    [
        dict(prompt="q", answer=""),
        dict(prompt="q", answer=3),
        dict(prompt="q", source="x"),
        dict(prompt="q", messages=[dict(role="user", content="q")]),
        dict(prompt=[dict(role="user", content="q")]),
        dict(messages=[]),
        dict(messages=[dict(role="human", content="q")]),
        dict(messages=[dict(role="user", content="q", name="x")]),
        dict(messages=[dict(role="user", content="q"), dict(role="assistant", content=" ")]),
        dict(messages=[dict(role="user", content="q"), dict(role="assistant", content="a")], answer="b"),
        dict(answer="a"),
        [1],
    ],
)
def test_a_row_that_says_more_is_not_plain(row):
    assert not data.is_plain(row)


def test_ids_that_are_not_unique_are_replaced_and_it_is_said(tmp_path):
    rows, said = [dict(prompt="q", id=key) for key in ("a", "b", "a")], []
    found = data.read_examples(write(tmp_path / "d.jsonl", *rows), warn=said.append)
    assert column(found, "id") == [0, 1, 2]
    assert len(said) == 1 and "1 of 3 rows have an id that another row has" in said[0]


ALONE = """
import json, sys
import {name} as file
def read(what, *arguments):
    try:
        print(json.dumps(what(*arguments)))
    except ValueError as e:
        print("error:", e)
"""


def alone(tmp_path, name, program):
    """The lines that a program prints which has only one file of ours, and calls it `file`."""
    shutil.copyfile(ROOT / f"{name}.py", tmp_path / f"{name}.py")
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    command = [sys.executable, "-c", ALONE.format(name=name) + program]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_a_copy_of_the_file_alone_reads_plain_rows_and_says_what_the_others_need(tmp_path):
    write(tmp_path / "a.jsonl", *PLAIN)
    write(tmp_path / "b.jsonl", dict(question="q", answer="a"))
    write(tmp_path / "c.jsonl", RECORD)
    write(tmp_path / "d.jsonl", dict(question="q", gen_text="a"))
    program = (
        "print(len(file.read_examples('a.jsonl')))\n"
        "read(file.read_examples, 'b.jsonl')\n"
        "read(file.read_trajectories, 'c.jsonl')\n"
        "read(file.read_trajectories, 'd.jsonl')\n"
        "read(file.holds_trajectories, 'b.jsonl')\n"
    )
    count, refused, records, unknown, holds = alone(tmp_path, "data", program)
    assert (count, json.loads(records), holds) == (str(len(PLAIN)), [RECORD], "false")
    assert refused.startswith("error: b.jsonl:1: ") and refused.endswith("data.py needs formats.columns")
    assert unknown.startswith("error: d.jsonl:1: ") and unknown.endswith("need release.files beside data.py")


def test_no_more_rows_are_read_than_the_limit(tmp_path):
    file = write(tmp_path / "d.jsonl", dict(prompt="a"), "{", dict(foo=1))
    assert column(data.read_examples(file, limit=1), "prompt") == ["a"]
    with pytest.raises(ValueError, match=r"d\.jsonl:2: not valid JSON"):
        data.read_examples(file, limit=2)


def test_a_json_file_may_hold_json_lines_or_one_row(tmp_path):
    lines = write(tmp_path / "a.json", dict(prompt="a"), "", dict(prompt="b"))
    assert column(data.read_examples(lines), "where") == [f"{lines}:1", f"{lines}:3"]
    assert len(data.read_examples(write(tmp_path / "b.json", dict(prompt="a")))) == 1
    (tmp_path / "c.json").write_text(json.dumps([dict(prompt="a"), dict(prompt="b")], indent=1))
    assert column(data.read_examples(tmp_path / "c.json"), "where") == [
        f"{tmp_path}/c.json: row 1",
        f"{tmp_path}/c.json: row 2",
    ]
    with pytest.raises(ValueError, match=r"d\.json:2: not valid JSON"):
        data.read_examples(write(tmp_path / "d.json", dict(prompt="a"), "{"))


def test_several_files_and_a_folder_are_one_dataset(tmp_path):
    a, b = write(tmp_path / "a.jsonl", dict(prompt="a")), write(tmp_path / "b.jsonl", dict(prompt="b"))
    (tmp_path / "info.json").write_text("{}")  # lies beside rows, and is none
    assert column(data.read_examples(f"{a}, {b}"), "where") == [f"{a}:1", f"{b}:1"]
    said = []
    assert column(data.read_examples(tmp_path, warn=said.append), "prompt") == ["a", "b"]
    assert said == [f"{tmp_path}: read as one dataset are a.jsonl, b.jsonl"]
    assert not data.holds_trajectories(tmp_path) and not data.holds_trajectories(f"{b},{a}")
    comma = write(tmp_path / "c,d.jsonl", dict(prompt="c"))
    assert column(data.read_examples(comma), "prompt") == ["c"]
    with pytest.raises(FileNotFoundError, match=r"no dataset file .*none\.jsonl"):
        data.read_examples(f"{a},{tmp_path}/none.jsonl")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="no trajectories and no dataset in the folder .*empty"):
        data.read_examples(tmp_path / "empty")
    (tmp_path / "json").mkdir()
    (tmp_path / "json" / "rows.json").write_text(json.dumps([dict(prompt="j")]))
    assert column(data.read_examples(tmp_path / "json", warn=said.append), "prompt") == ["j"]


def test_a_folder_of_trajectories_has_nothing_else_that_is_read(tmp_path):
    for name in ("S", "T"):
        (tmp_path / name).mkdir()
        write(tmp_path / name / "trajectories-00000.jsonl", {**RECORD, "id": name})
        write(tmp_path / name / "release.jsonl", dict(question="q", gen_text="a"))
    (tmp_path / "T" / "trajectories-00001.jsonl").touch()
    assert data.holds_trajectories(tmp_path / "T") and column(data.read_trajectories(tmp_path / "T"), "id") == ["T"]
    both = f"{tmp_path}/T,{tmp_path}/S"
    assert data.holds_trajectories(both) and column(data.read_trajectories(both), "id") == ["S", "T"]


def test_every_format_reads_the_same(tmp_path):
    rows = [dict(question=f"q{i}", answer=str(i)) for i in range(3)]
    lines = write(tmp_path / "a.jsonl", *rows).read_text()
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "c.json").write_text(json.dumps(dict(data=rows)))
    files = ["a.jsonl", "b.jsonl.gz", "c.json"]
    try:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "d.parquet")
        files.append("d.parquet")
    except ImportError:
        pass
    first, *others = [data.read_examples(tmp_path / f) for f in files]
    assert column(first, "prompt") == ["q0", "q1", "q2"]
    for other in others:
        for example, expected in zip(other, first, strict=True):
            assert {**example, "where": expected["where"]} == expected
    assert data.read_examples(tmp_path / "a.jsonl", limit=2) == first[:2]


def test_bad_files(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="no dataset file"):
        data.read_examples(tmp_path / "none.jsonl")
    with pytest.raises(ValueError, match="unknown format '.csv'"):
        data.read_examples(write(tmp_path / "d.csv", "a,b"))
    (tmp_path / "d.jsonl.gz").write_bytes(gzip.compress(b'{"prompt": "a"}\n' * 100)[:-20])
    with pytest.raises(ValueError, match="damaged gzip"):
        data.read_examples(tmp_path / "d.jsonl.gz")
    (tmp_path / "d.jsonl").write_bytes(b'{"prompt": "\xff"}\n')
    with pytest.raises(ValueError, match="d.jsonl:1: not valid JSON"):
        data.read_examples(tmp_path / "d.jsonl")
    (tmp_path / "d.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match="parquet"):
        data.read_examples(tmp_path / "d.parquet")
    monkeypatch.setattr(data, "MAX_LINE", 100)
    with pytest.raises(ValueError, match="d.jsonl:2: the line is longer than 100 bytes"):
        data.read_examples(write(tmp_path / "d.jsonl", dict(prompt="a"), dict(prompt="a" * 200)))


RECORD = dict(id=0, prompt_ids=[5, 6], response_ids=[7, 8, 1, 1], order=[2, 0, 3, 1], finished=True, correct=None)


def test_trajectories_of_several_files_are_sorted_by_id(tmp_path):
    write(tmp_path / "trajectories-00001.jsonl", {**RECORD, "id": 1})
    write(tmp_path / "trajectories-00000.jsonl", {**RECORD, "id": "a"}, {**RECORD, "id": 2})
    assert column(data.read_trajectories(tmp_path), "id") == [1, 2, "a"]
    assert len(data.read_trajectories(tmp_path / "trajectories-00001.jsonl")) == 1


def test_a_name_that_is_empty_or_there_twice_is_refused(tmp_path, monkeypatch):
    """An empty one would be the current folder."""
    write(tmp_path / "a.jsonl", {"prompt": "a", "answer": "b"})
    monkeypatch.chdir(tmp_path)
    for name in ("", "a.jsonl,", "a.jsonl,,a.jsonl", "a.jsonl, a.jsonl"):
        with pytest.raises(ValueError, match="a name is empty or there twice"):
            data.read_examples(name)


def test_what_holds_trajectories(tmp_path):
    write(tmp_path / "trajectories-00000.jsonl", RECORD)
    write(tmp_path / "prompts.jsonl", {"prompt": "a", "answer": "b"})
    (tmp_path / "empty.jsonl").touch()
    assert data.holds_trajectories(tmp_path) and data.holds_trajectories(tmp_path / "trajectories-00000.jsonl")
    assert not data.holds_trajectories(tmp_path / "prompts.jsonl")
    assert not data.holds_trajectories(tmp_path / "empty.jsonl")
    with pytest.raises(FileNotFoundError, match="no dataset file"):
        data.holds_trajectories(tmp_path / "none")


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(order=[0, 1, 2]), "order must give each of the 4"),
        (dict(order=[-1] * 4), "order must give each of the 4"),
        (dict(order=None), "order missing"),
        (dict(response_ids=[], order=[]), "not empty"),
        (dict(response_ids=[7, 8, 1, -1]), "lists of ids"),
        (dict(step=[0], entropy=[], confidence=[0.5] * 4), "step must be a list of 4"),
        (dict(response_ids=[7, 8, 1, 99]), "token id 99, but the model has 18: trajectories of another model"),
        (dict(entropy=[0.5, None, 0, 0]), "entropy must be a list of 4 numbers"),
        (dict(correct="false"), "correct must be true, false or null, found 'false'"),
        (dict(finished=1), "finished must be true, false or null, found 1"),
        (dict(non_ltr=[4]), "non-left-to-right positions must be among 0 to 3"),
        (dict(response_ids=[7, 9, 1, 1]), "response token 1 is the mask token 9"),
        (dict(id=0), "id 0 appears twice, first at .*trajectories.jsonl:1"),
    ],
)
def test_bad_trajectories_are_named_by_line(tmp_path, change, message):
    write(tmp_path / "trajectories.jsonl", RECORD, {**RECORD, "id": 1, **change})
    with pytest.raises(ValueError, match=rf"trajectories\.jsonl:2: .*{message}"):
        data.read_trajectories(tmp_path, vocab_size=18, mask_id=9)
    with pytest.raises(FileNotFoundError, match="no trajectories"):
        data.read_trajectories(tmp_path / "empty")


@pytest.mark.parametrize(
    "finished, correct, kept",
    [
        (True, True, {"correct", "finished", "all"}),
        (True, None, {"correct", "finished", "all"}),
        (True, False, {"finished", "all"}),
        (False, True, {"all"}),
    ],
)
def test_which_trajectories_are_usable(finished, correct, kept):
    record = dict(finished=finished, correct=correct)
    for keep in ("correct", "finished", "all"):
        assert data.usable(record, keep) == (keep in kept)


def test_cut_at_eos_keeps_the_first_eos_and_numbers_the_order_anew():
    cut = data.cut_at_eos(RECORD, {1})
    assert (cut["response_ids"], cut["order"]) == ([7, 8, 1], [1, 0, 2])
    assert data.cut_at_eos(RECORD, {9}) is RECORD


def test_cut_at_eos_keeps_ties_and_cuts_what_belongs_to_tokens():
    record = dict(RECORD, response_ids=[7, 8, 5, 1, 1], order=[4, 4, -1, 2, 0], step=[4, 4, -1, 2, 0])
    record.update(entropy=[0.1, 0.2, 0.0, 0.3, 0.4], non_ltr=[1, 4])
    cut = data.cut_at_eos(record, {1, 5, 6})
    assert (cut["response_ids"], cut["order"]) == ([7, 8, 5], [0, 0, -1])
    assert (cut["step"], cut["entropy"], cut["non_ltr"]) == ([4, 4, -1], [0.1, 0.2, 0.0], [1])


@settings(deadline=None)
@given(st.permutations(range(8)), st.integers(0, 7))
def test_cut_at_eos_keeps_the_relative_order(order, end):
    response = [3] * 8
    response[end] = 1
    cut = data.cut_at_eos(dict(response_ids=response, order=list(order)), {1})
    assert sorted(cut["order"]) == list(range(end + 1))
    for a in range(end + 1):
        for b in range(end + 1):
            assert (order[a] < order[b]) == (cut["order"][a] < cut["order"][b])


def test_steps_with_ties_and_tokens_never_decoded_are_an_order(tmp_path):
    record = {**RECORD, "response_ids": [7, 8, 9, 1], "order": [3, 3, -1, 0]}
    (read,) = data.read_trajectories(write(tmp_path / "a.jsonl", record), mask_id=9)  # a mask that stayed is none
    assert read["order"] == [3, 3, -1, 0]


def test_positions_that_were_not_decoded_after_their_left_neighbour():
    assert data.non_ltr_positions([0, 1, 2]) == []
    assert data.non_ltr_positions([2, 0, 1, 3]) == [0, 1, 3]
    assert data.non_ltr_positions([0, 0, 1]) == [1]  # together is not after
    assert data.non_ltr_positions([3, -1, 0]) == [0, 2]  # what was never decoded has no part, as a neighbour either


def test_collate_pads_prompts_left_and_responses_right():
    other = dict(prompt_ids=[4], response_ids=[9])  # an answer without an order counts as left to right
    batch = data.collate([RECORD, other], pad_id=2)
    assert batch["prompt_ids"].tolist() == [[5, 6], [2, 4]]
    assert batch["prompt_mask"].tolist() == [[1, 1], [0, 1]]
    assert batch["response_ids"].tolist() == [[7, 8, 1, 1], [9, 2, 2, 2]]
    assert batch["order"].tolist() == [[2, 0, 3, 1], [0, -1, -1, -1]]
    assert batch["length"].tolist() == [4, 1]


def test_collate_carries_entropies_of_all_and_positions_of_any():
    one = dict(RECORD, entropy=[0.5, 1.0, 1.5, 2.0], non_ltr=[0, 3])
    two = dict(prompt_ids=[4], response_ids=[9, 8], order=[1, -1])
    batch = data.collate([one, two], pad_id=2)
    assert batch["order"].tolist() == [[2, 0, 3, 1], [1, -1, -1, -1]] and "entropy" not in batch
    assert batch["non_ltr"].tolist() == [[True, False, False, True], [True, False, False, False]]
    batch = data.collate([one, dict(two, entropy=[1, 2])], pad_id=2)
    assert batch["entropy"].tolist() == [[0.5, 1.0, 1.5, 2.0], [1.0, 2.0, 0.0, 0.0]]
    assert "non_ltr" not in data.collate([RECORD, two], pad_id=2)


def test_orders_and_generators_follow_from_their_keys_alone():
    assert data.epoch_order(50, 0, 1) == data.epoch_order(50, 0, 1)
    assert sorted(data.epoch_order(50, 0, 1)) == list(range(50))
    assert data.epoch_order(50, 0, 1) != data.epoch_order(50, 0, 2) != data.epoch_order(50, 1, 2)
    torch.manual_seed(1)
    a = torch.rand(4, generator=data.generator(0, 1, "x"))
    torch.manual_seed(2)
    assert torch.equal(a, torch.rand(4, generator=data.generator(0, 1, "x")))
    assert not torch.equal(a, torch.rand(4, generator=data.generator(0, 1, "y")))
