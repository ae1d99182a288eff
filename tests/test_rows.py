"""release/rows.py: what the rows of the tables are, and how a run is recognised.

python -m pytest tests/test_rows.py"""

import contextlib
import io
import json
import os
import re
import shlex
import tempfile
from pathlib import Path

import pytest
from helpers import ROOT, meta

import evaluate
import tabom
import train
from experiments import sweep
from release import recipes, rows
from runs import objective_options
from runs.options import check_values, parse

PAPER = Path(os.environ.get("TABOM_DATA", "no-such-folder")) / "paper.json"


@pytest.mark.parametrize("name", list(rows.ROWS)[1:])
def test_a_row_is_what_train_takes_and_is_recognised(name):
    """With every recipe: none of them sets what excludes a row's options, or puts itself in their place."""
    settings = rows.ROWS[name]
    objective = settings["objective"].replace(rows.GROUND_TRUTH, "nelbo")
    for recipe in (None, *recipes.RECIPES):
        c = train.TrainOptions(**{**settings, "objective": objective}, recipe=recipe)
        parameters, _ = objective_options.chosen(c)
        for option, value in settings.items():
            assert option == "objective" or parameters.get(option, getattr(c, option)) == value
        assert rows.name_of({**vars(c), **parameters, **settings}) == name  # as a meta.json has it
    assert rows.name_of(dict(settings, seed=3)) == name


def test_what_is_no_row_has_its_objectives_name():
    assert rows.name_of(dict(objective="another", weight=0.0)) == "another"
    assert rows.name_of(dict(objective="tabom", window=16)) == "TABOM"


def test_a_run_is_recognised_by_its_meta(trained):
    about = meta(trained)
    assert isinstance(about["lora_targets"], list) and rows.name_of(about) == "TABOM"


def test_rows_by_name():
    assert rows.named(("dInfer", "No-SFT")) == {
        "dInfer": dict(objective="transition"),
        "No-SFT": dict(objective="base"),
    }
    with pytest.raises(ValueError, match="--rows dinfer: none of No-SFT; SFT-GT; SFT-SD; "):
        rows.named(("TABOM", "dinfer"))


@pytest.mark.skipif(not PAPER.is_file(), reason="no paper.json in TABOM_DATA")
def test_every_row_of_the_papers_tables_has_its_name():
    paper = json.loads(PAPER.read_text())
    for number in (2, 3, 4, 6):
        for of_model in paper[f"table{number}"]["rows"].values():
            assert of_model.keys() <= rows.ROWS.keys()
    for name in paper["table5"]["rows"]["Dream"]:
        assert {name, f"TABOM, {name}"} & rows.ROWS.keys()


# ---------------------------------------------------------------------------- docs/recipes.md, and what tables prints

MODELS = {"dream": "Dream-org/Dream-v0-Instruct-7B", "llada": "GSAI-ML/LLaDA-8B-Instruct"}
DATA = {"prm12k": "prm12k.parquet", "ling-coder": "ling_coder.parquet"}


def printed_commands():
    """What `tables` prints of a folder without any run."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()) as out:
        assert tabom.main(["tables", folder]) == 0
    return out.getvalue()


def commands():
    """(command, its options) of every line of the page that calls tabom.py and of what tables prints, as the command
    line makes them; those of both once."""
    found, page = [], (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    for line in dict.fromkeys((page + printed_commands()).splitlines()):
        if "tabom.py " in line and line.startswith(("python", "torchrun")):
            command, _, cls, given = parse(tabom.COMMANDS, "", argv=shlex.split(line.split("tabom.py", 1)[1]))
            c = cls(**given)
            check_values(c)
            found.append((command, c))
    return found


COMMANDS = commands()
OF = {name: [c for command, c in COMMANDS if command == name] for name in tabom.COMMANDS}
TRAINED = {c.out: c for c in OF["train"]}


def row_of(c):
    """The row that a command of train makes."""
    parameters, unused = objective_options.chosen(c)
    assert not unused, (c.out, unused)
    objective = rows.GROUND_TRUTH if c.data in DATA.values() else c.objective
    return rows.name_of({**vars(c), **parameters, "objective": objective})


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("domain", DATA)
def test_every_row_of_tables_2_and_3_has_a_command_and_is_evaluated(family, domain):
    folder, evaluated = f"out/{family}-{domain}", {}
    for c in OF["evaluate"]:
        trained, _, epoch = (c.adapter or "").rpartition("/epoch-")
        if c.model != MODELS[family] or c.protocol != "paper" or len(c.tasks) < 5:
            continue
        if c.adapter is None:
            evaluated["No-SFT"] = c
        elif trained in TRAINED and trained.startswith(f"{folder}/"):
            made = TRAINED[trained]
            assert made.model == c.model and 1 <= int(epoch) <= made.epochs == 5
            assert made.data in (DATA[domain], f"{folder}/T") or made.data.startswith(f"{folder}/T/release.jsonl,")
            assert made.global_batch == 32 or made.recipe == f"{family}-{domain}"  # whatever the number of GPUs
            evaluated[row_of(made)] = c
    assert set(evaluated) == {"No-SFT", "SFT-GT", "SFT-SD", "dInfer", "T3D", "TABOM"}
    assert len({c.out for c in evaluated.values()}) == 6


def test_the_other_tables_have_their_rows():
    table4 = [c.adapter for c in OF["evaluate"] if c.tokens_per_step == 2 and c.model == MODELS["dream"]]
    made = {adapter and row_of(TRAINED[adapter.rpartition("/")[0]]) for adapter in table4}
    assert made == {None, "SFT-GT", "SFT-SD", "dInfer", "T3D", "TABOM"}
    table5 = {"TABOM, no ranking", "TABOM, global window", "TABOM, global window, no ranking"}
    assert table5 <= {row_of(c) for c in OF["train"]}
    grids = {Path(c.out).name: sweep.expand(c) for c in OF["sweep"]}
    cells = {(s["weight"], s["margin"]) for s in grids["S-table7"].values()}
    assert cells == {(weight, margin) for weight in (1.0, 2.0) for margin in (0.1, 0.2, 0.3)}
    assert [s["window"] for s in grids["S-table9"].values()] == [16, 32, 48, 64, 256]
    for c in (*OF["sweep"], *OF["claims"]):
        rows.named(c.rows)
        assert {*(c.in_domain or ()), *(c.best_of_epochs or ())} <= set(c.test)


def test_what_a_command_reads_another_has_made():
    """Of a folder below out/: the trajectories of distill, the answers of evaluate, the checkpoints of train."""
    made = {c.out for _, c in COMMANDS}
    for command, c in COMMANDS:
        for path in (*(c.data or "").split(","), getattr(c, "adapter", None), *getattr(c, "checkpoints", ())):
            if path and path.startswith("out/"):
                assert re.sub(rf"/(epoch-\d|{'|'.join(evaluate.TASKS)}|release.jsonl)$", "", path) in made, (
                    command,
                    path,
                )


def test_table_6_and_the_figures_replay_what_each_model_decoded():
    table6 = [c for c in OF["diagnose"] if c.data.endswith("/gsm8k")]
    assert len(table6) == 6
    for c in table6:
        (answered,) = [e for e in OF["evaluate"] if e.out == c.data.removesuffix("/gsm8k")]
        assert (c.model, "".join(c.checkpoints) or None) == (answered.model, answered.adapter)
    figures = [c for c in OF["diagnose"] if c.ground_truth]
    assert {c.model for c in figures} == set(MODELS.values()) and {c.limit for c in figures} == {64}
