"""Figures: shown once, with a text alternative."""

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


def test_bars_need_a_label_each():
    with pytest.raises(ValueError, match="2 labels for 1 values"):
        plots.bars(["a", "b"], [1.0], "share")


def test_lines_can_be_told_apart_without_colour():
    plots.use_style()
    fig = plots.lines({str(i): [0, i] for i in range(4)}, "step", "nats")
    styles = {line.get_linestyle() for line in fig.axes[0].lines}
    assert len(styles) == 4
    plt.close(fig)
