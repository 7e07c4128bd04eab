"""Curves as SVG to stand inside a page: the same bytes for the same run, colours that follow the page."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from potluck.errors import MissingExtra

# Okabe and Ito's colours, which colour-blind readers tell apart; yellow and black are left out.
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#7b6bd6")
STRONG = "#0b86d0"
RIVAL = "#e0701a"
_INK = "#7f8081"  # becomes the page's text colour
_GREY = "#8c8c8c"
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10,
    "text.parse_math": False,  # a name is a name
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "axes.titlecolor": _INK,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": _GREY,
    "grid.alpha": 0.22,
    "grid.linewidth": 0.6,
    "text.color": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "legend.frameon": False,
}


@dataclass(frozen=True, kw_only=True)
class Line:
    """One curve; a point without a value is left out. ``width`` is in points."""

    label: str
    points: Sequence[tuple[float, float | None]]
    colour: str = _GREY
    width: float = 1.3
    dash: str = "-"


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One pair of axes."""

    title: str
    lines: Sequence[Line]


def draw_svg(
    panels: Sequence[Panel],
    columns: int,
    x_label: str,
    y_label: str,
    size: tuple[float, float],
    legend: Literal["outside right upper", "outside upper left"] = "outside right upper",
) -> str:
    """Draw panels side by side on common scales, with one legend.

    Args:
        panels: The first one's lines name the legend.
        columns: Panels in a row, at most.
        x_label: A ``%`` in it leaves numbers as they are; else they are counts, as in ``1.5M``.
        y_label: For all panels.
        size: Width and height of one panel in inches.
        legend: Where it stands; above or below, it is as wide as the figure allows.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingExtra("the report's curves need matplotlib", "pip install 'potluck[report]'") from None
    columns = min(columns, len(panels))
    rows = -(-len(panels) // columns)
    across = size[0] * columns
    with rc_context({**_STYLE, "svg.hashsalt": f"{across} {y_label}"}):  # ids: one page has several sizes
        figure = Figure(figsize=(across, size[1] * rows), layout="constrained")
        grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
        for number, axes in enumerate(grid.flat):
            if number < len(panels):
                _fill_axes(axes, panels[number], x_label)
                axes.xaxis.set_tick_params(labelbottom=number + columns >= len(panels))
            else:
                axes.remove()
        figure.supylabel(y_label, fontsize=10)
        figure.supxlabel(x_label, fontsize=10)
        handles, labels = grid.flat[0].get_legend_handles_labels()
        if len(labels) > 1:
            beside = "right" in legend
            figure.legend(handles, labels, loc=legend, ncols=1 if beside else min(len(labels), max(2, int(across / 2))))
        text = io.StringIO()
        nothing = {"Date": None, "Creator": None, "Format": None, "Type": None}
        figure.savefig(text, format="svg", transparent=True, metadata=nothing)
    return _inline(text.getvalue())


def _fill_axes(axes: Any, panel: Panel, x_label: str) -> None:
    from matplotlib.ticker import EngFormatter, MaxNLocator

    for line in panel.lines:
        points = [(x, y) for x, y in line.points if y is not None]
        axes.plot(
            [x for x, _ in points], [y for _, y in points], line.dash, color=line.colour, linewidth=line.width,
            label=line.label, marker="o" if len(points) < 2 else "", markersize=3.5, solid_capstyle="round",
        )  # fmt: skip
    axes.set_title(panel.title, loc="left")
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    if "%" not in x_label:
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.tick_params(length=0)


def _inline(svg: str) -> str:
    """Only the ``svg`` element, without ids that nothing refers to, in the page's own ink."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    used = set(re.findall(r"[(\"]#([^)\"]+)", svg))
    svg = re.sub(r' id="([^"]*)"', lambda found: found[0] if found[1] in used else "", svg)
    svg = re.sub(r'(<svg [^>]*?)width="[^"]*"', r'\1class="chart"', svg, count=1)
    svg = re.sub(r'(<svg [^>]*?) height="[^"]*"', r"\1", svg, count=1)
    return svg.replace(_INK, "currentColor").strip()
