"""plots.py: what is in a picture, and what is written: python -m pytest tests/test_plots.py"""

import builtins

import pytest

from experiments import plots


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
            colours.setdefault(line.get_label(), set()).add(line.get_color())
    assert len(colours["TABOM"]) == len(colours["SFT-SD"]) == 1
    assert colours["TABOM"] != colours["SFT-SD"]
    assert len(set(plots.colours(map(str, range(15))).values())) == 15


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
        rows.append(dict(measure=measure, row=row, mean=mean, low=mean - 1, high=mean + 2))
    inside, far = plots.draw_differences(rows, "SFT-SD").axes
    found = [(list(line.get_xdata()), line.get_ydata()[0]) for line in inside.get_lines()[1::2]]
    assert found == [([-3.0, 0.0], 0), ([0.0, 3.0], 1)]  # a row has the same line in both panels
    assert [list(line.get_ydata()) for line in far.get_lines()[1:]] == [[1, 1], [1]]
    assert inside.get_xlabel() == "in %, less SFT-SD's"


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
