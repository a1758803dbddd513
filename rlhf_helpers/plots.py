"""The look of every figure in the course, and `show`, which gives a figure its text alternative."""

import io
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
from IPython.display import DisplayHandle, display
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from rlhf_helpers.validation import checked

# Okabe and Ito's palette, safe for colour-blind readers; "line" styles keep it readable in grey.
_NAMES = ("black", "orange", "sky", "green", "yellow", "blue", "red", "pink")
_CODES = "#000000 #E69F00 #56B4E9 #009E73 #F0E442 #0072B2 #D55E00 #CC79A7".split()
COLOURS = dict(zip(_NAMES, _CODES, strict=True))
_STYLE = {
    "figure.dpi": 110,
    "figure.constrained_layout.use": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "font.size": 10,
    "legend.frameon": False,
    "axes.prop_cycle": mpl.cycler(color=[COLOURS[c] for c in ("blue", "red", "green", "pink")])
    + mpl.cycler(linestyle=["-", "--", "-.", ":"]),
}


def use_style() -> None:
    """Set the course's style for all figures that follow."""
    mpl.rcParams.update(_STYLE)


def show(fig: Figure, alt: str) -> None:
    """Show a figure once, with a text that says what it shows to those who cannot see it.

    Args:
        fig: the figure; it is closed afterwards, so that it is not shown a second time.
        alt: one or two sentences: what is drawn and what to see in it.

    Raises:
        ValueError: if `alt` is empty or only blanks.
    """
    redraw(fig, alt)


@checked
def redraw(fig: Figure, alt: str, handle: DisplayHandle | None = None) -> DisplayHandle:
    """`show` for a figure that grows in a loop: each call replaces the one before.

    Args:
        handle: what the call before returned; None for the first.
    """
    if not (alt and alt.strip()):
        raise ValueError("alt is empty: say in a sentence what the figure shows")
    buffer = io.BytesIO()
    fig.savefig(buffer, format="png")
    plt.close(fig)
    data = {"image/png": buffer.getvalue(), "text/plain": f"Figure: {alt}"}
    update, handle = handle is not None, handle or DisplayHandle()
    metadata = {"image/png": {"alt": alt}}
    display(data, metadata=metadata, raw=True, display_id=handle.display_id, update=update)
    return handle


@checked
def explore(draw: Callable[..., Figure], alt: str, **choices: Sequence) -> None:
    """A figure with a slider for each of its settings.

    Without ipywidgets, and where no kernel runs, there is the figure of the first choices alone.

    Args:
        draw: makes the figure of some settings.
        alt: what the figure shows; `{name}` in it stands for a setting.
        **choices: for each setting the values that it can take, the one to begin with first.
    """
    settings = {name: values[0] for name, values in choices.items()}
    handle = redraw(draw(**settings), alt.format(**settings))
    try:
        from ipywidgets import HBox, SelectionSlider
    except ImportError:
        return

    def moved(change: Mapping) -> None:
        settings[change["owner"].description] = change["new"]
        redraw(draw(**settings), alt.format(**settings), handle)

    sliders = [
        SelectionSlider(options=sorted(values), value=values[0], description=name)
        for name, values in choices.items()
    ]
    for slider in sliders:
        slider.observe(moved, "value")
    display(HBox(sliders))


def bars(labels: Sequence[str], values: Sequence[float], quantity: str) -> Figure:
    """Horizontal bars with the value at each end, the first label on top.

    Args:
        labels: one for each bar.
        values: one for each bar, not negative.
        quantity: what the bars measure, with its unit; the label of the axis.

    Raises:
        ValueError: if there are not as many labels as values.
    """
    fig, ax = _rows_of_bars(labels, {quantity: values}, quantity, 0.6 + 0.34 * len(labels))
    drawn = ax.barh(range(len(labels) - 1, -1, -1), values, color=COLOURS["blue"], height=0.65)
    ax.bar_label(drawn, fmt="{:.2f}", padding=3)
    return fig


@checked
def grouped_bars(
    labels: Sequence[str], groups: Mapping[str, Sequence[float]], quantity: str
) -> Figure:
    """Horizontal bars, for each label one from each named group; the first label on top.

    Args:
        labels: one for each row.
        groups: name to values, one for each label; up to four groups.
        quantity: what the bars measure, with its unit; the label of the axis.

    Raises:
        ValueError: for no group or more than four, or if one has not as many values as there are
            labels.
    """
    _check_groups(groups, 4)
    size = 0.8 + 0.24 * len(labels) * len(groups)
    fig, ax = _rows_of_bars(labels, groups, quantity, size)
    height = 0.8 / len(groups)
    looks = zip(("sky", "blue", "orange", "black"), ("", "", "///", ""), strict=True)
    for i, ((name, values), (colour, hatch)) in enumerate(zip(groups.items(), looks, strict=False)):
        rows = [len(labels) - 1 - row + 0.4 - height * (i + 0.5) for row in range(len(labels))]
        drawn = ax.barh(
            rows, values, height=height * 0.9, label=name, color=COLOURS[colour], hatch=hatch
        )
        ax.bar_label(drawn, fmt="{:.2f}", padding=3, fontsize=8)
    ax.axvline(0, color=COLOURS["black"], lw=0.8)
    ax.legend(loc="best")
    return fig


def _rows_of_bars(labels: Sequence[str], groups: Mapping, quantity: str, height: float):
    """A figure for horizontal bars, its rows labelled from the top."""
    for name, values in groups.items():
        if len(labels) != len(values):
            counts = f"{len(labels)} labels for {len(values)} values of {name!r}"
            raise ValueError(f"{counts}; give one for each")
    fig, ax = plt.subplots(figsize=(7, height))
    ax.set_yticks(range(len(labels) - 1, -1, -1), labels)
    ax.set_xlabel(quantity)
    ax.margins(x=0.12)
    ax.grid(visible=False, axis="y")
    return fig, ax


@checked
def lines(series: Mapping[str, Sequence[float] | Mapping[float, float]], x: str, y: str) -> Figure:
    """One line for each named series, told apart by colour and by dashes.

    Args:
        series: name to values, drawn against their index, or to a mapping from x to y.
        x, y: axis labels, with units.
    """
    _check_groups(series)
    fig, ax = plt.subplots(figsize=(7, 2.8))
    for name, values in series.items():
        points = values if isinstance(values, Mapping) else dict(enumerate(values))
        marker = "o" if len(points) <= 20 else None  # few points: show where they are
        ax.plot(list(points), list(points.values()), label=name, marker=marker, markersize=4)
    ax.set(xlabel=x, ylabel=y)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    ax.legend()
    return fig


@checked
def panels(
    series: Mapping[str, Sequence[float] | Mapping[str, Sequence[float]]],
    x: str,
    bands: Mapping[str, tuple[float, float]],
) -> Figure:
    """A small figure for each named series, four in a row, its healthy band shaded.

    Args:
        series: name with unit, to values at 1, 2, …; or to several named lines of such values,
            whose legend stands above.
        x: what is counted there.
        bands: for some of the names the lowest and the highest value that is no cause for worry.
    """
    _check_groups(series)
    rows = -(-len(series) // 4)
    height = 1.9 if rows > 1 else 2.5
    fig, axes = plt.subplots(rows, 4, figsize=(10, height * rows), sharex=True, squeeze=False)
    for ax, (name, values) in zip(axes.flat, series.items(), strict=False):
        curves = values if isinstance(values, Mapping) else {"": values}
        for label, curve in curves.items():
            ax.plot(range(1, len(curve) + 1), curve, label=label or None, lw=1.4)
        if name in bands:
            ax.axhspan(*bands[name], color=COLOURS["green"], alpha=0.15, lw=0)
        ax.set_title(name, fontsize=9)
        ax.tick_params(labelsize=8)
    handles, labels = axes.flat[0].get_legend_handles_labels()
    if labels:
        fig.legend(handles, labels, loc="outside upper center", ncols=len(labels), fontsize=8)
    for ax in axes.flat[len(series) :]:
        ax.axis("off")
    for ax in axes.flat[max(0, len(series) - 4) : len(series)]:
        ax.tick_params(labelbottom=True)
        ax.set_xlabel(x, fontsize=8)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
    return fig


Points = Sequence[tuple[float, float]]


@checked
def trajectories(groups: Mapping[str, Sequence[Points]], x: str, y: str) -> Figure:
    """Thin curves of several runs in each group, one look for a group: the spread is the message.

    Args:
        groups: name to curves, each a list of points (x, y) in the order of the run.
        x, y: axis labels, with units.

    Raises:
        ValueError: for no group, or more than there are looks in the style.
    """
    looks = mpl.rcParams["axes.prop_cycle"]
    _check_groups(groups, len(looks))
    fig, ax = plt.subplots(figsize=(7, 3.2))
    for (name, curves), look in zip(groups.items(), looks, strict=False):
        for i, curve in enumerate(curves):
            ax.plot(*zip(*curve, strict=True), lw=1, label=None if i else name, **look)
    ax.set(xlabel=x, ylabel=y)
    ax.legend()
    return fig


@checked
def scatter(
    groups: Mapping[str, Points],
    x: str,
    y: str,
    joined: Sequence[str] = (),
    hulls: bool = False,
) -> Figure:
    """Points of up to eight groups, told apart by colour and by shape.

    Args:
        groups: name to points (x, y).
        x, y: axis labels, with units.
        joined: the groups whose points are one curve.
        hulls: whether the area of each other group is shaded, from its outermost points.

    Raises:
        ValueError: for no group, or more than eight.
    """
    colours, shapes = [c for c in COLOURS if c != "yellow"], "osD^v<>P"
    _check_groups(groups, len(shapes))
    fig, ax = plt.subplots(figsize=(7, 3.4))
    for i, (name, points) in enumerate(groups.items()):
        colour = COLOURS[colours[i % len(colours)]]
        look = {"ls": "-" if name in joined else "none", "marker": shapes[i], "ms": 5}
        face = "none" if i >= len(colours) else colour
        ax.plot(*zip(*points, strict=True), **look, color=colour, mfc=face, label=name)
        if hulls and name not in joined:
            ax.fill(*zip(*hull(points), strict=True), color=colour, alpha=0.15, lw=0)
    ax.set(xlabel=x, ylabel=y)
    ax.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return fig


def hull(points: Points) -> list[tuple[float, float]]:
    """The corners of the smallest convex area that holds all points, against the clock.

    Example:
        >>> hull([(0, 0), (2, 0), (1, 1), (2, 2), (0, 2)])
        [(0, 0), (2, 0), (2, 2), (0, 2)]
    """

    def half(ordered: Points) -> list[tuple[float, float]]:
        kept: list[tuple[float, float]] = []
        for point in ordered:
            while len(kept) > 1 and not _left_turn(*kept[-2:], point):
                kept.pop()
            kept.append(point)
        return kept

    ordered = sorted(set(points))
    if len(ordered) < 3:
        return ordered
    return half(ordered)[:-1] + half(ordered[::-1])[:-1]


def _left_turn(a: tuple, b: tuple, c: tuple) -> bool:
    return (b[0] - a[0]) * (c[1] - a[1]) > (b[1] - a[1]) * (c[0] - a[0])


def heat_map(
    matrix: Sequence[Sequence[float]], columns: Sequence[str], rows: Sequence[str], quantity: str
) -> Figure:
    """A table of numbers on coloured cells: blue above 0, orange below, NaN left blank.

    Args:
        matrix: a list of numbers for each row.
        columns, rows: their names.
        quantity: what the colours measure, with its unit; the label of the bar.

    Raises:
        ValueError: if the names are not as many as the rows and columns.
    """
    values = np.array(matrix, dtype=float)
    if values.shape != (len(rows), len(columns)):
        names = f"{len(rows)} row names and {len(columns)} column names"
        raise ValueError(f"a matrix of shape {values.shape} has {names}; give one for each")
    top = np.nanmax(np.abs(values)) or 1.0
    shades = [COLOURS["orange"], "#FFFFFF", COLOURS["sky"]]
    colours = mpl.colors.LinearSegmentedColormap.from_list("signed", shades)
    fig, ax = plt.subplots(figsize=(max(4.5, 1.6 + 0.62 * len(columns)), 1.1 + 0.42 * len(rows)))
    image = ax.imshow(values, cmap=colours, vmin=-top, vmax=top, aspect="auto")
    ax.set_xticks(range(len(columns)), columns, rotation=30, ha="right", rotation_mode="anchor")
    ax.set_yticks(range(len(rows)), rows)
    ax.grid(visible=False)
    for (row, column), value in np.ndenumerate(values):
        if np.isfinite(value):
            ax.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=8)
    bar = fig.colorbar(image)
    bar.set_label(quantity, fontsize=8)
    if np.nanmin(values) >= 0:
        bar.ax.set_ylim(0, top)  # no colours that stand for nothing
    return fig


def pipeline() -> Figure:
    """The three steps of RLHF: what enters each box, and what it hands on."""
    steps = (
        ("base model", "continues text", "web text"),
        ("SFT", "answers like\nthe examples", "demonstrations"),
        ("reward model", "scores like\nthe people", "comparisons"),
        ("PPO", "raises the score", "prompts"),
    )
    fig, ax = plt.subplots(figsize=(8.6, 2.9))
    ax.set(xlim=(0, 8.6), ylim=(-0.75, 2.3))
    ax.axis("off")
    write = partial(ax.text, ha="center", va="center")
    for i, (title, does, eats) in enumerate(steps):
        left, middle = 0.2 + 2.15 * i, 0.2 + 2.15 * i + 0.8
        box = plt.Rectangle((left, 0), 1.6, 1.15, fc="#EAF2F8", ec=COLOURS["blue"], lw=1.5)
        ax.add_patch(box)
        write(middle, 0.85, title, weight="bold")
        write(middle, 0.35, does, fontsize=9)
        write(middle, 2.1, eats, fontsize=9, style="italic")
        _arrow(ax, (middle, 1.95), (middle, 1.2))
        if i < len(steps) - 1:
            _arrow(ax, (left + 1.65, 0.57), (left + 2.1, 0.57))
    _arrow(ax, (7.45, -0.05), (3.15, -0.05), style="<->", linestyle="--", bend=-0.16)
    write(5.3, -0.66, "PPO starts as a copy of SFT; the KL penalty is its leash", fontsize=9)
    return fig


def _check_groups(groups: Mapping, most: int | None = None) -> None:
    if not 1 <= len(groups) <= (most or len(groups)):
        limits = f"1 to {most}" if most else "1 or more"
        raise ValueError(f"{len(groups)} groups; give {limits}, as many as can be told apart")


def _arrow(ax, start, end, style="->", linestyle="-", bend=0.0) -> None:
    look = {"arrowstyle": style, "linestyle": linestyle, "lw": 1.4, "color": COLOURS["black"]}
    look["connectionstyle"] = f"arc3,rad={bend}"
    ax.annotate("", xy=end, xytext=start, arrowprops=look)
