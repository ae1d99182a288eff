"""plots.py: what is in a picture, and what is written: python -m pytest tests/test_plots.py"""

import builtins

import matplotlib
import pytest

from experiments import plots


def tds_rows(models, steps=3):
    rows = []
    for i, model in enumerate(models):
        for step in range(steps):
            rows.append(dict(model=model, step=step, base_models=4 + i, tds=0.1 * step + i, tds_se=None if i else 0.05))
    return rows


def frontier_point(row, gain, loss, gain_se=None, loss_se=None):
    return dict(row=row, rate=1e-4, epoch=1, gain=gain, loss=loss, gain_se=gain_se, loss_se=loss_se)


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
    gains = [frontier_point(model, 1.0, 2.0) for model in models[1:]]
    colours = {}
    for drawing in (plots.draw_tds(tds_rows(models), models), plots.draw_frontier(gains)):
        for line in drawing.axes[0].get_legend().get_lines():
            colours.setdefault(line.get_label().split(" ")[0], set()).add(line.get_color())
    assert colours["TABOM"] == {plots.STRONG} and colours["base"] == {plots.GREY}
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
    assert plots.apart(dict(a=1, b=3, c=5, far=-70)) == ["far"]
    assert plots.apart(dict(a=1, b=3, c=5)) == []
    assert plots.apart(dict(a=1, b=91)) == []  # which of two is it


def test_a_band_is_one_standard_error_and_a_missing_value_no_point():
    rows = tds_rows(["base"])
    rows[1]["tds"] = None
    axes = plots.draw_tds(rows).axes[0]
    (line,) = axes.get_lines()
    assert list(line.get_xdata()) == [0, 2]
    heights = axes.collections[0].get_paths()[0].vertices[:, 1]
    assert min(heights) == pytest.approx(-0.05) and max(heights) == pytest.approx(0.25)


def named(axes):
    """The lines of the legend: name -> its line in the axes."""
    return {line.get_label(): line for line in axes.get_lines() if not line.get_label().startswith("_")}


def test_a_frontier_goes_from_the_base_model_through_the_points_of_a_row():
    found = [frontier_point("TABOM", 5, 2, 0.5, 0.25), frontier_point("TABOM", 3, 1), frontier_point("SFT-SD", 4, 6)]
    faint = [("TABOM", 4.0, 3.0), ("SFT-SD", 2.0, 8.0), ("SFT-SD", 3.0, 9.0), ("SFT-GT", 1.0, 1.0)]
    (axes,) = plots.draw_frontier(found, faint, "Title").axes
    lines = named(axes)
    assert list(lines) == ["base", "TABOM", "SFT-SD"] and lines["base"].get_xydata().tolist() == [[0, 0]]
    assert lines["TABOM"].get_xydata().tolist() == [[0, 0], [3, 1], [5, 2]]
    assert lines["SFT-SD"].get_xydata().tolist() == [[0, 0], [4, 6]]
    assert lines["TABOM"].get_color() == plots.STRONG != lines["SFT-SD"].get_color()
    across, up = (bars.get_segments()[0].tolist() for bars in axes.collections)  # of the only point with errors
    assert across == [[4.5, 2], [5.5, 2]] and up == [[5, 1.75], [5, 2.25]]
    dots = [line for line in axes.get_lines() if line.get_alpha()]
    assert [dot.get_xydata().tolist() for dot in dots] == [[[4, 3]], [[2, 8]], [[3, 9]]]
    assert dots[0].get_color() == plots.STRONG and dots[1].get_color() == lines["SFT-SD"].get_color()
    assert axes.get_xlabel() == "gain in-domain (points)" and axes.get_ylabel() == "loss near and far (points)"
    assert axes.get_title() == "Title"


def test_a_frontier_of_many_rows_has_panels_with_the_same_limits():
    found = [frontier_point(row, 3 * i, -i) for i, row in enumerate(["TABOM", *map(str, range(12))])]
    panels = plots.draw_frontier(found).axes
    assert len(panels) > 1 and all("TABOM" in named(axes) and len(named(axes)) <= 1 + plots.MOST for axes in panels)
    assert len({(axes.get_xlim(), axes.get_ylim()) for axes in panels}) == 1
    assert panels[0].get_xlim()[1] > 36 and panels[0].get_ylim()[0] < -12


def test_pictures_have_the_width_of_a_column_and_leave_the_settings_alone():
    before = dict(matplotlib.rcParams)
    for drawing in (plots.draw_tds(tds_rows(["base"])), plots.draw_training({"R": [dict(step=1, loss=1.0)]})):
        assert drawing.get_size_inches()[0] == plots.COLUMN
        for axes in drawing.axes:
            assert min(text.get_fontsize() for text in (axes.title, axes.xaxis.label, *axes.get_xticklabels())) >= 6
    assert dict(matplotlib.rcParams) == before


def test_no_rows_make_an_empty_picture():
    assert list(named(plots.draw_frontier([]).axes[0])) == ["base"]
    assert not plots.draw_tds([]).axes[0].get_lines()
    assert not plots.draw_loss([]).axes[0].get_lines()
    assert not plots.draw_training({"R": [dict(step=1)]}).axes[0].get_lines()


def test_a_long_training_curve_is_smoothed_and_a_short_one_is_not():
    def metrics(count):
        return [dict(step=i + 1, loss=float(i % 2), ranking=0.5, in_order=None) for i in range(count)]

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


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch):
    real = builtins.__import__

    def without(name, *rest, **more):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        plots.draw_tds([])
