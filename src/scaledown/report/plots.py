"""Plots as SVG for a page. They use the page's colours and font, light or dark, and need no script."""

import io
import itertools
import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final, NamedTuple

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_WIDTH, _HEIGHT = 4.6, 2.9  # inches: narrow enough that a phone shows the font at its 9 points
# matplotlib draws with these placeholders; colours of the style sheet replace them.
_INK: Final = "#0a0a01"
_GRID: Final = "#0a0a02"
SERIES: Final = ("#0a0a11", "#0a0a12", "#0a0a13", "#0a0a14", "#0a0a15", "#0a0a16")
_NAME_LENGTH: Final = 28
_MOST_STEPS: Final = 40  # of three points each, to move a name that overlaps another
_MARKERS: Final = "osD^vP"
_COLOURS: Final = {
    _INK: "var(--ink)",
    _GRID: "var(--line)",
    **{colour: f"var(--series-{number})" for number, colour in enumerate(SERIES, 1)},
}
_STYLE: Final = {
    "svg.fonttype": "none",  # text stays text: searchable, and in the page's font
    "text.parse_math": False,  # a dollar in a name is a dollar
    "font.size": 9,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _GRID,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.prop_cycle": f"cycler('color', {list(SERIES)})",
    "grid.color": _GRID,
    "grid.linewidth": 0.6,
    "xtick.color": _GRID,
    "ytick.color": _GRID,
    "xtick.labelcolor": _INK,
    "ytick.labelcolor": _INK,
    "legend.frameon": False,
}


class Point(NamedTuple):
    """A named point in a plane."""

    name: str
    x: float
    y: float
    low: float = float("nan")
    """The lower end of the interval of y; NaN if it is not known."""
    high: float = float("nan")
    """The upper end of the interval of y; NaN if it is not known."""


def bars(names: Sequence[str], values: Sequence[float], y: str) -> str:
    """Draw a bar for each name, with its value above.

    Args:
        names: The labels of the bars.
        values: Their heights.
        y: The label of the y axis.

    Returns:
        SVG.
    """
    with _figure() as (axes, drawn):
        found = axes.bar(range(len(names)), values, color=SERIES[0])
        axes.bar_label(found, [f"{value:,.4g}" for value in values], padding=2, fontsize=8)
        slanted = sum(map(len, names)) > 40
        names = list(map(_shortened, names))
        axes.set_xticks(range(len(names)), names, rotation=30 * slanted, ha="right" if slanted else "center")
        axes.set_ylabel(y)
        axes.grid(visible=False, axis="x")
        axes.margins(y=0.12)
        axes.locator_params("y", integer=all(isinstance(value, int) for value in values))
    return drawn[0]


def histogram(edges: Sequence[float], counts: Sequence[int], x: str, y: str) -> str:
    """Draw a histogram.

    Args:
        edges: The edges of the bins, ascending; one more than there are counts.
        counts: The number of values in each bin.
        x: The label of the x axis.
        y: The label of the y axis.

    Returns:
        SVG.
    """
    with _figure() as (axes, drawn):
        widths = [high - low for low, high in itertools.pairwise(edges)]
        axes.bar(edges[:-1], counts, width=widths, align="edge", color=SERIES[0], linewidth=0)
        axes.set(xlabel=x, ylabel=y)
        axes.grid(visible=False, axis="x")
        axes.locator_params("y", integer=True)
    return drawn[0]


def curves(lines: Mapping[str, Sequence[float]], xs: Sequence[float], x: str, y: str) -> str:
    """Draw lines over the same positions.

    Args:
        lines: The values of each line, by its name in the legend.
        xs: The positions of the values.
        x: The label of the x axis.
        y: The label of the y axis.

    Returns:
        SVG.
    """
    with _figure() as (axes, drawn):
        for number, (name, values) in enumerate(lines.items()):
            axes.plot(
                xs, values, marker=_MARKERS[number % len(_MARKERS)], markersize=4, label=_shortened(name)
            )
        axes.set(xlabel=x, ylabel=y)
        axes.locator_params("x", integer=all(value == int(value) for value in xs))
        if len(lines) > 1:
            axes.legend(fontsize=8)
    return drawn[0]


def intervals(names: Sequence[str], values: Sequence[tuple[float, float, float]], x: str) -> str:
    """Draw an interval for each name, the first on top.

    Args:
        names: The labels of the intervals.
        values: For each name (mean, low, high).
        x: The label of the x axis.

    Returns:
        SVG.
    """
    with _figure() as (axes, drawn):
        places = range(len(names), 0, -1)  # the first on top
        means = [mean for mean, _, _ in values]
        spread = [[mean - low for mean, low, _ in values], [high - mean for mean, _, high in values]]
        axes.errorbar(means, places, xerr=spread, fmt="o", color=SERIES[0], capsize=3)
        axes.set_yticks(places, list(map(_shortened, names)))
        axes.set_ylim(0.4, len(names) + 0.6)
        axes.set_xlabel(x)
        axes.grid(visible=False, axis="y")
    return drawn[0]


def plane(points: Mapping[str, Sequence[Point]], x: str, y: str, *, logarithmic: bool = False) -> str:
    """Draw named points in a plane, with a colour and a marker for each series.

    Args:
        points: The points of each series, by its name in the legend. A series has error bars if all its
            points have intervals.
        x: The label of the x axis.
        y: The label of the y axis.
        logarithmic: Whether the x axis is logarithmic.

    Returns:
        SVG.
    """
    with _figure() as (axes, drawn):
        names = []
        for number, (name, series) in enumerate(points.items()):
            spread = [[p.y - p.low for p in series], [p.high - p.y for p in series]]
            axes.errorbar(
                [point.x for point in series],
                [point.y for point in series],
                yerr=None if any(math.isnan(value) for side in spread for value in side) else spread,
                fmt=_MARKERS[number % len(_MARKERS)],
                color=SERIES[number % len(SERIES)],
                capsize=2,
                elinewidth=0.8,
                label=_shortened(name),
            )
            for point in series:
                place: dict[str, Any] = {"xytext": (5, 4), "textcoords": "offset points", "fontsize": 7.5}
                place["annotation_clip"] = False  # otherwise a name at the edge has no extent
                names.append(axes.annotate(_shortened(point.name), (point.x, point.y), **place))
        axes.set(xlabel=x, ylabel=y)
        if logarithmic:
            _make_logarithmic(axes, [point.x for series in points.values() for point in series])
        axes.margins(0.15)
        figure: Any = axes.figure
        figure.draw_without_rendering()  # the positions of the points are known only after this
        _move_apart(names)
        if len(points) > 1:
            axes.legend(fontsize=8)
    return drawn[0]


def _move_apart(names: Sequence[Any]) -> None:
    """Move each name up until it overlaps no other name, or is too far from its point."""
    placed: list[Any] = []
    for name in names:
        box = name.get_window_extent()
        for _ in range(_MOST_STEPS):
            if not any(box.overlaps(other) for other in placed):
                break
            across, up = name.get_position()
            name.set_position((across, up + 3))
            box = name.get_window_extent()
        placed.append(box)


def _make_logarithmic(axes: "Axes", xs: Sequence[float]) -> None:
    """Make the x axis logarithmic, with as many ticks as fit, written as plain numbers."""
    from matplotlib import ticker

    axes.set_xscale("log")
    decades = math.log10(max(xs) / min(xs)) if min(xs) > 0 else 0.0
    steps = (1.0,) if decades > 2 else (1.0, 2.0, 5.0) if decades > 0.7 else None
    axes.xaxis.set_major_locator(ticker.LogLocator(subs=steps) if steps else ticker.MaxNLocator(5))
    axes.xaxis.set_minor_locator(ticker.NullLocator())
    axes.xaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:,.4g}"))


@contextmanager
def _figure() -> Iterator[tuple["Axes", list[str]]]:
    """Yield axes to draw on, and a list that holds the SVG after the block."""
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    drawn: list[str] = []
    settings: dict[str, Any] = _STYLE
    with mpl.rc_context(settings), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph", UserWarning)  # the page's font may have the glyph
        figure = Figure(figsize=(_WIDTH, _HEIGHT), layout="constrained")
        FigureCanvasSVG(figure)
        yield figure.subplots(), drawn
        file = io.StringIO()
        with mpl.rc_context({"svg.hashsalt": "scaledown"}):  # the same bytes for the same numbers
            figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    drawn.append(_for_a_page(file.getvalue()))


def _shortened(name: str) -> str:
    return name if len(name) <= _NAME_LENGTH else name[: _NAME_LENGTH - 1] + "…"


def _for_a_page(svg: str) -> str:
    """Return the SVG element alone, in the page's colours and font, without ids that other plots share."""
    svg = svg[svg.index("<svg") :].replace("<svg", '<svg aria-hidden="true"', 1)
    svg = re.sub(r"<(metadata|style)\b.*?</\1>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' id="[A-Za-z0-9.]+_\d+"', "", svg)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", svg)
    for placeholder, colour in _COLOURS.items():
        svg = svg.replace(placeholder, colour)
    return svg
