"""Figures: shown once, with a text alternative."""

import sys

import matplotlib.pyplot as plt
import pytest

from rlhf_helpers import plots


@pytest.fixture
def displayed(monkeypatch):
    calls = []
    monkeypatch.setattr(plots, "display", lambda data, **options: calls.append((data, options)))
    return calls


@pytest.mark.parametrize(
    "make",
    [
        plots.pipeline,
        lambda: plots.bars(["a", "b"], [0.2, 0.8], "share"),
        lambda: plots.heat_map([[1.0, float("nan")]], ["a", "b"], ["row"], "nats"),
        lambda: plots.lines({"one": [1, 2], "two": [2, 1]}, "step", "nats"),
    ],
)
def test_a_figure_is_shown_once_with_its_alt_text(displayed, make):
    plots.use_style()
    plots.show(make(), alt="what it shows")
    ((data, options),) = displayed
    assert data["image/png"].startswith(b"\x89PNG")
    assert data["text/plain"] == "Figure: what it shows"
    assert options["metadata"]["image/png"]["alt"] == "what it shows"
    assert plt.get_fignums() == []


def test_an_empty_alt_text_is_refused(displayed):
    with pytest.raises(ValueError, match="alt is empty"):
        plots.show(plots.pipeline(), alt="  ")
    plt.close("all")
    assert displayed == []


def test_bars_stand_in_the_order_given_and_name_the_quantity():
    fig = plots.bars(["first", "second"], [0.25, 0.5], "share of responses")
    (ax,) = fig.axes
    names = {label.get_position()[1]: label.get_text() for label in ax.get_yticklabels()}
    widths = {bar.get_y() + bar.get_height() / 2: bar.get_width() for bar in ax.patches}
    assert names == {1: "first", 0: "second"}
    assert widths == pytest.approx({1: 0.25, 0: 0.5})
    assert ax.get_xlabel() == "share of responses"
    plt.close(fig)


def test_lines_can_be_told_apart_without_colour():
    plots.use_style()
    fig = plots.lines({str(i): [0, i] for i in range(4)}, "step", "nats")
    styles = {line.get_linestyle() for line in fig.axes[0].lines}
    assert len(styles) == 4
    plt.close(fig)


def test_lines_take_their_own_x():
    fig = plots.lines({"batch": {1: 0.9, 2: 0.8}, "held-out": {0: 1.0, 25: 0.5}}, "update", "nats")
    assert [list(line.get_xdata()) for line in fig.axes[0].lines] == [[1, 2], [0, 25]]


def test_a_figure_that_grows_is_shown_in_one_place(displayed):
    first = plots.redraw(plots.lines({"loss": [1.0]}, "update", "nats"), alt="a point")
    again = plots.redraw(plots.lines({"loss": [1.0, 0.5]}, "update", "nats"), "a line", first)
    assert again is first
    (_, one), (_, two) = displayed
    assert one["display_id"] == two["display_id"]
    assert (one["update"], two["update"]) == (False, True)


def test_grouped_bars_draw_each_group_in_each_row():
    groups = {"before": [0.1, -0.2], "after": [0.3, 0.4]}
    fig = plots.grouped_bars(["correct", "rude"], groups, "points")
    containers = fig.axes[0].containers
    assert [[bar.get_width() for bar in group] for group in containers] == list(groups.values())
    tops = [[bar.get_y() for bar in group] for group in containers]
    assert tops[0][0] > tops[1][0] > tops[0][1] > tops[1][1]  # first label, first group on top
    assert [t.get_text() for t in fig.axes[0].get_legend().get_texts()] == list(groups)


def test_a_heat_map_writes_its_numbers_and_leaves_nan_blank():
    fig = plots.heat_map([[1.0, float("nan")], [-0.5, 0.25]], ["x", "y"], ["a", "b"], "nats")
    texts = {text.get_position(): text.get_text() for text in fig.axes[0].texts}
    assert texts == {(0, 0): "1.00", (0, 1): "-0.50", (1, 1): "0.25"}
    plt.close(fig)


def test_panels_take_one_curve_or_several():
    fig = plots.panels(
        {"score": {"a": [1, 2], "b": [2, 1]}, "KL": [0, 3, 1]}, "updates", {"KL": (0, 2)}
    )
    first, second, *rest = fig.axes
    assert [line.get_label() for line in first.lines] == ["a", "b"]
    assert [text.get_text() for text in fig.legends[0].get_texts()] == ["a", "b"]
    assert list(second.lines[0].get_xdata()) == [1, 2, 3]
    assert len(second.patches) == 1 and not first.patches  # the healthy band
    assert not any(ax.axison for ax in rest)
    plt.close(fig)


def test_all_runs_of_a_group_look_alike_and_are_named_once():
    runs = {"proxy": [[(0, 1), (2, 3)], [(0, 0), (1, 1)]], "gold": [[(0, 1), (2, 0)]]}
    fig = plots.trajectories(runs, "√KL", "reward")
    lines = fig.axes[0].lines
    assert [list(line.get_ydata()) for line in lines] == [[1, 3], [0, 1], [1, 0]]
    looks = [(line.get_color(), line.get_linestyle()) for line in lines]
    assert looks[0] == looks[1] != looks[2]
    assert [t.get_text() for t in fig.axes[0].get_legend().get_texts()] == ["proxy", "gold"]
    plt.close(fig)


def test_groups_of_points_differ_in_shape_and_only_joined_ones_are_a_curve():
    groups = {f"group {i}": [(i, 0), (i, 1)] for i in range(8)}
    fig = plots.scatter(groups, "√KL", "gold", joined=("group 1",))
    lines = fig.axes[0].lines
    assert len({line.get_marker() for line in lines}) == 8
    assert [line.get_linestyle() == "-" for line in lines] == [i == 1 for i in range(8)]
    plt.close(fig)


def test_a_slider_draws_the_figure_anew_in_its_place(monkeypatch):
    shown, sliders = [], []
    monkeypatch.setattr(plots, "redraw", lambda fig, alt, handle=None: shown.append((alt, handle)))
    monkeypatch.setattr(plots, "display", lambda box: sliders.extend(box.children))
    drawn = []
    plots.explore(lambda ε, A: drawn.append((ε, A)), "ε = {ε}", ε=[0.2, 0.1], A=[1, -1])
    assert drawn == [(0.2, 1)] and shown == [("ε = 0.2", None)]
    assert [slider.options for slider in sliders] == [(0.1, 0.2), (-1, 1)]
    sliders[0].value = 0.1
    assert drawn[1:] == [(0.1, 1)] and shown[1][0] == "ε = 0.1"


def test_without_ipywidgets_there_is_one_figure(monkeypatch):
    shown = []
    monkeypatch.setattr(plots, "redraw", lambda fig, alt, handle=None: shown.append(alt))
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    plots.explore(lambda ε: None, "ε = {ε}", ε=[0.2, 0.1])
    assert shown == ["ε = 0.2"]
