"""release/rows.py: what the rows of the tables are, and how a run is recognised.

python -m pytest tests/test_rows.py"""

import json
import os
from pathlib import Path

import pytest
from helpers import meta

import train
from release import recipes, rows
from runs import objective_options

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
