"""plots.py: what is in a picture, and what is written: python -m pytest tests/test_plots.py"""

import builtins

import matplotlib
import pytest
from PIL import Image

import tokenizer
from experiments import plots
from experiments import tiny as tiny_model


def tds_rows(models, steps=3):
    rows = []
    for i, model in enumerate(models):
        for step in range(steps):
            rows.append(dict(model=model, step=step, base_models=4 + i, tds=0.1 * step + i, tds_se=None if i else 0.05))
    return rows


def test_a_picture_is_saved_as_png_and_pdf_without_a_date(tmp_path):
    for name in ("a", "b"):
        plots.save(plots.draw_tds(tds_rows(["base"])), tmp_path / f"{name}.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "a.pdf").read_bytes().startswith(b"%PDF")
    assert (tmp_path / "a.pdf").read_bytes() == (tmp_path / "b.pdf").read_bytes()
    assert b"CreationDate" not in (tmp_path / "a.pdf").read_bytes()


def test_a_title_says_what_the_bands_are_and_over_how_many():
    axes = plots.draw_tds(tds_rows(["base", "out/R/epoch-1"])).axes[0]
    assert axes.get_title().startswith("Trajectory Discrimination Score")
    assert axes.get_title().endswith("mean ± 1 standard error, n = 4 to 5 base models")
    assert "nats²" in axes.get_ylabel()
    assert plots.caption([dict(trajectories=9)], "X") == "X\nmean ± 1 standard error, n = 9 trajectories"
    assert plots.caption([dict(step=9)], "X") == plots.caption([], "X") + "" == "X"


def test_colour_is_the_model_and_dash_the_dataset():
    rows = []
    for model in ("base", "R"):
        for dataset in ("T", "answers"):
            for ratio in (0.5, 1.0):
                rows.append(dict(model=model, data=dataset, mask_ratio=ratio, loss=ratio, loss_se=0.1, responses=7))
    lines = plots.draw_loss(rows).axes[0].get_lines()
    assert [line.get_label() for line in lines] == ["base on T", "base on answers", "R on T", "R on answers"]
    assert lines[0].get_color() == lines[1].get_color() != lines[2].get_color() == lines[3].get_color()
    assert lines[0].get_linestyle() == lines[2].get_linestyle() != lines[1].get_linestyle()


def test_a_model_has_one_colour_in_all_pictures():
    models = ["base", "SFT-SD", "TABOM"]
    gains = []
    for model in models[1:]:
        gains.append(dict(row=model, x=0.9, y=1.0))
    colours = {}
    for drawing in (plots.draw_tds(tds_rows(models), models), plots.draw_scatter(gains, "x", "y", models)):
        for line in drawing.axes[0].get_lines():
            colours.setdefault(line.get_label().split(" ")[0], set()).add(line.get_color())
    assert colours["TABOM"] == {plots.STRONG}
    assert len(colours["SFT-SD"]) == 1 and not colours["SFT-SD"] & {plots.STRONG, plots.GREY}
    found = plots.looks(map(str, range(15)))
    assert len({(look["color"], look["linestyle"]) for look in found.values()}) == 15


def test_tabom_has_the_strong_colour_and_nothing_else_has():
    names = ["base", "TABOM", "TABOM, no ranking", "SFT-SD", "S/objective=tabom+seed=0", "S/objective=nelbo+seed=0"]
    strong = [name for name, look in plots.looks(names).items() if look["color"] == plots.STRONG]
    assert strong == ["TABOM", "S/objective=tabom+seed=0"]
    assert plots.looks(names)["base"]["color"] == plots.GREY
    assert plots.looks(["base", "out/R/epoch-2"])["out/R/epoch-2"]["color"] == plots.STRONG  # the only one there is


def test_a_panel_has_at_most_seven_lines():
    names = ["base", "TABOM", *map(str, range(12))]
    panels = plots.panels_of(names)
    assert all(len(panel) <= 7 and panel[:2] == ["base", "TABOM"] for panel in panels)
    assert sorted(set(sum(panels, []))) == sorted(names)
    assert plots.panels_of(names[:7]) == [names[:7]]
    axes = plots.draw_tds(tds_rows(names)).axes
    assert all(len(one.get_lines()) <= 7 for one in axes)
    metrics = {name: [dict(step=1, loss=1.0), dict(step=2, loss=0.5)] for name in names}
    assert all(len(one.get_lines()) <= 7 for one in plots.draw_training(metrics).axes)


def test_a_step_that_few_base_models_have_is_left_out():
    rows = [dict(model="TABOM", step=i, base_models=n, tds=0.1, tds_se=None) for i, n in enumerate((12, 6, 5))]
    (line,) = plots.draw_tds(rows).axes[0].get_lines()
    assert list(line.get_xdata()) == [0, 1] and line.get_label() == "TABOM (12)"


def test_what_lies_apart_is_found():
    spans = dict(a=(-3, 1), b=(-2, 4), c=(0, 5), far=(-90, -70))
    assert plots.without_outliers(spans) == ((-3, 5), ["far"])
    assert plots.without_outliers(dict(a=(0, 1), b=(2, 3), c=(4, 5)))[1] == []
    assert plots.without_outliers(dict(a=(0, 1), b=(90, 91)))[1] == []  # which of two is it


def test_a_band_is_one_standard_error_and_a_missing_value_no_point():
    rows = tds_rows(["base"])
    rows[1]["tds"] = None
    axes = plots.draw_tds(rows).axes[0]
    (line,) = axes.get_lines()
    assert list(line.get_xdata()) == [0, 2]
    heights = axes.collections[0].get_paths()[0].vertices[:, 1]
    assert min(heights) == pytest.approx(-0.05) and max(heights) == pytest.approx(0.25)


def test_differences_are_intervals_in_a_panel_for_each_measure():
    rows = []
    for measure, row, mean in (("in %", "base", -2.0), ("in %", "TABOM", 1.0), ("far %", "TABOM", 0.0)):
        rows.append(dict(measure=measure, row=row, mean=mean, low=mean - 1, high=mean + 2, bases=dict(a=1, b=2)))
    inside, far = plots.draw_differences(rows, "SFT-SD").axes
    found = [(list(line.get_xdata()), line.get_ydata()[0]) for line in inside.get_lines()[1::2]]
    assert found == [([-3.0, 0.0], 0), ([0.0, 3.0], 1)]  # a row has the same line in both panels
    assert [list(line.get_ydata()) for line in far.get_lines()[1:]] == [[1, 1], [1]]
    assert inside.get_xlabel() == "in %, less SFT-SD's"
    assert [label.get_text() for label in inside.get_yticklabels()] == ["base (2)", "TABOM (2)"]


def test_a_difference_far_off_is_marked_at_the_edge_with_its_value():
    rows = []
    for row, mean in (("a", -2.0), ("b", 1.0), ("c", 3.0), ("far", -80.0)):
        rows.append(dict(measure="in %", row=row, mean=mean, low=mean - 1, high=mean + 1))
    (axes,) = plots.draw_differences(rows, "SFT-SD").axes
    assert axes.get_xlim()[0] > -4
    assert [text.get_text() for text in axes.texts] == ["-80.0 [-81.0, -79.0]"]


def test_pictures_have_the_width_of_a_column_and_leave_the_settings_alone():
    before = dict(matplotlib.rcParams)
    for drawing in (plots.draw_tds(tds_rows(["base"])), plots.draw_training({"R": [dict(step=1, loss=1.0)]})):
        assert drawing.get_size_inches()[0] == plots.COLUMN
        for axes in drawing.axes:
            assert min(text.get_fontsize() for text in (axes.title, axes.xaxis.label, *axes.get_xticklabels())) >= 6
    assert dict(matplotlib.rcParams) == before


PUZZLE = "L12..5" + "." * 20  # 5x5


def puzzle_record(tok):
    ids = tok.encode("1234512345") + [tok.eos_id] * 21
    steps = [*range(21, 31), *range(21)]
    entropy = [0.01 * (i + 1) for i in range(31)]
    return dict(prompt=PUZZLE, response_ids=ids, order=steps, step=steps, entropy=entropy)


def test_a_puzzle_is_drawn_as_its_grid():
    tok = tokenizer.load(tiny_model.TINY5)
    axes = plots.draw_trajectory(tok, puzzle_record(tok)).axes[0]
    assert [patch.get_xy() for patch in axes.patches][1] == (1.04, 0.04)  # given: framed, a little smaller
    assert [patch.get_xy() for patch in axes.patches][5:7] == [(0, 1), (1, 1)]
    shown = [text.get_text() for text in axes.texts]
    assert shown[:4] == ["1", "21", "2", "22"] and shown[-2:] == ["end", "20"]


def test_an_animation_has_a_picture_for_each_step_and_holds_the_last(tmp_path):
    tok = tokenizer.load(tiny_model.TINY5)
    record = puzzle_record(tok)
    plots.save_frames(tok, record, tmp_path / "a.gif")
    with Image.open(tmp_path / "a.gif") as drawn:
        assert drawn.n_frames == 1 + 31 or drawn.n_frames == 2 + 31  # nothing yet, each step; equal ones may be one
        drawn.seek(drawn.n_frames - 1)
        assert drawn.info["duration"] >= plots.HELD
    assert (tmp_path / "a.gif").stat().st_size < 300_000
    text = dict(record, prompt="a question", order=[*range(30), -1], step=[*range(30), 31])  # one was never decoded
    plots.save_frames(tok, text, tmp_path / "b.gif")
    assert (tmp_path / "b.gif").stat().st_size > 1000


def test_no_rows_make_an_empty_picture():
    assert not plots.draw_scatter([], "x", "y").axes[0].get_lines()[1:]
    assert not plots.draw_differences([], "SFT-SD").axes[0].get_lines()
    assert not plots.draw_tds([]).axes[0].get_lines()
    assert not plots.draw_loss([]).axes[0].get_lines()
    assert not plots.draw_training({"R": [dict(step=1)]}).axes[0].get_lines()


def test_a_long_training_curve_is_smoothed_and_a_short_one_is_not():
    def metrics(count):
        return [dict(step=i + 1, loss=float(i % 2), rank=0.5, in_order=None) for i in range(count)]

    drawing = plots.draw_training({"R": metrics(10)})
    assert [axes.get_title() for axes in drawing.axes if axes.get_lines()] == ["loss", "ranking"]
    assert drawing.axes[0].get_ylabel() == "nats"
    assert len(drawing.axes[0].get_lines()) == 1
    raw, smooth = plots.draw_training({"R": metrics(100)}).axes[0].get_lines()
    assert smooth.get_label() == "R (mean of 11 steps)"
    assert max(raw.get_ydata()) == 1 and max(smooth.get_ydata()[5:-5]) < 0.6


def test_a_running_mean_is_over_what_is_near():
    assert plots.running_mean([1.0, 2.0, 6.0, 7.0], 1) == [1.5, 3.0, 5.0, 6.5]
    assert plots.running_mean([1.0, 2.0], 0) == [1.0, 2.0]


def test_invisible_characters_are_made_visible():
    assert plots.visible_text("a\n") == ("a↵", 2)
    assert plots.visible_text("\t\x00") == ("→·", 2)
    assert plots.visible_text("数") == ("数", 2)
    assert plots.visible_text("") == ("", 1)


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch):
    real = builtins.__import__

    def without(name, *rest, **more):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        plots.draw_tds([])
