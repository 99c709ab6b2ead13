"""How the report's pictures look: colours told apart by colour-blind eyes, large letters, light and dark.

A picture is WIDTH inches wide and may be shown 358 pixels wide on a phone, which makes a point a little more than a
pixel: so one chart a picture, and no letter below 9 points. Colours are those of Okabe and Ito, each with a marker and
a line style of its own; heat maps wear cividis. In the SVG, ink, grid and background are recognisable by their colours
alone and are exchanged by a style sheet inside of it where the reader prefers dark.
"""

from __future__ import annotations

import functools
import io
import logging
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ParamSpec, TypeVar

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.collections import QuadMesh
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

from megatron_ssft.report.exhibits import Picture, short_names

if TYPE_CHECKING:
    from matplotlib.typing import RcKeyType

OKABE_ITO = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442", "#000000")
NAMED = ("optimal", "random", "single", "fixed")
"""Runs of these names always wear the same colour, whichever of them are drawn."""
MARKERS = "osD^vP*X"
Dash = str | tuple[int, tuple[int, ...]]
DASHES: tuple[Dash, ...] = ("-", "--", "-.", ":", (0, (5, 1)), (0, (1, 1)), (0, (3, 1, 1, 1, 1, 1)), (0, (7, 2)))
INK, GRID, PAPER = "#1f2328", "#d1d9e0", "#fffffe"
DARK = {INK: "#e6edf3", GRID: "#3d444d", PAPER: "#161b22"}
WIDTH = 4.3
MAP = "cividis"

_RC: dict[RcKeyType, object] = {
    "font.size": 10,
    "font.family": ["DejaVu Sans"],  # comes with matplotlib, so pictures are the same on every machine
    "axes.titlesize": 10,
    "axes.labelsize": 10,
    "xtick.labelsize": 9.5,
    "ytick.labelsize": 9.5,
    "legend.fontsize": 9.5,
    "lines.linewidth": 2.0,
    "lines.markersize": 5.5,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": GRID,
    "figure.facecolor": PAPER,
    "axes.facecolor": PAPER,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.unicode_minus": True,
    "text.parse_math": False,  # names may hold dollar signs
    "svg.fonttype": "path",
    "svg.hashsalt": "megatron-ssft",
    "path.simplify": True,
}
_P = ParamSpec("_P")
_T = TypeVar("_T")


def house_style(function: Callable[_P, _T]) -> Callable[_P, _T]:
    """Run `function` under these looks, whatever the user's own matplotlib settings are."""

    @functools.wraps(function)
    def styled(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        with matplotlib.rc_context(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Glyph .* missing from")  # the tables have the name in full
            matplotlib.rcdefaults()
            matplotlib.rcParams.update(_RC)
            return function(*args, **kwargs)

    return styled


@dataclass(frozen=True)
class LineStyle:
    """How one run is drawn in every picture."""

    color: str
    marker: str
    dash: Dash


def line_styles(names: Sequence[str], known: Sequence[str] = ()) -> dict[str, LineStyle]:
    """A style for each name; `known` lists all names of the report, so that a run looks alike in every picture."""
    everything = list(dict.fromkeys([*(known or names), *names]))
    others = [name for name in everything if name not in NAMED]
    free = [k for k in range(len(OKABE_ITO) - 2) if not (k < len(NAMED) and NAMED[k] in everything)]
    place = {name: NAMED.index(name) for name in everything if name in NAMED}
    place |= {name: (free or range(6))[i % len(free or range(6))] for i, name in enumerate(others)}
    round_of = {name: i // max(1, len(free)) for i, name in enumerate(others)}
    return {
        name: LineStyle(OKABE_ITO[k], MARKERS[k], DASHES[(k + 3 * round_of.get(name, 0)) % len(DASHES)])
        for name, k in place.items()
    }


def tag_color(place: int) -> str:
    """Colour of the tag at `place` among the tags."""
    return OKABE_ITO[place % 6]


def new_figure(height: float) -> tuple[Figure, Axes]:
    """A figure WIDTH inches wide and one pair of axes."""
    figure = Figure(figsize=(WIDTH, height), dpi=72, layout="constrained")
    return figure, figure.subplots()


def line_label(name: str) -> str:
    """Label of a run's line: matplotlib hides labels that begin with an underscore."""
    return f" {name}"


def legend(axes: Axes, names: Sequence[str]) -> None:
    """Above the picture, where it covers no data; only for several lines."""
    if len(names) < 2:
        return
    labels = [line_label(name) for name in short_names(names, 24)]
    fit = max(1, 46 // (max(map(len, labels)) + 5))
    rows = -(-len(labels) // fit)
    axes.figure.legend(
        axes.get_legend_handles_labels()[0],
        labels,
        loc="outside upper left",
        ncols=-(-len(labels) // rows),
        columnspacing=1.0,
        handlelength=2.4,
        handletextpad=0.4,
        borderpad=0.0,
    )


def log_axis(axes: Axes) -> None:
    """A logarithmic vertical axis with plain numbers at it; more of them where it spans little."""
    low, high = axes.dataLim.intervaly
    decades = np.log10(high / low)
    axes.set_yscale("log")
    if decades < 0.7:
        axes.set_ylim(low / 1.3, high * 1.3)
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.yaxis.set_minor_locator(NullLocator())
    else:
        axes.set_ymargin(0.08)
        axes.yaxis.set_major_locator(LogLocator(subs=(1,) if decades > 2.5 else (1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}" if value >= 100 else f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def heat_map(
    axes: Axes,
    values: np.ndarray,
    *,
    texts: Sequence[Sequence[str]] | None = None,
    lowest: float = 0.0,
    highest: float | None = None,
    x_edges: np.ndarray | None = None,
    size: float = 9.0,
) -> QuadMesh:
    """`values` [rows, columns] as colours, row 0 on top; NaN stays paper. `texts` are written into the cells."""
    rows, columns = values.shape
    edges = np.arange(columns + 1) - 0.5 if x_edges is None else x_edges
    highest = max(np.nanmax(values, initial=0.0), lowest + 1e-12) if highest is None else highest
    mesh = axes.pcolormesh(
        edges, np.arange(rows + 1) - 0.5, np.ma.masked_invalid(values), cmap=MAP, vmin=lowest, vmax=highest,
        edgecolors=PAPER if columns <= 32 else "none", linewidth=0.8,
    )  # fmt: skip
    axes.set_ylim(rows - 0.5, -0.5)
    axes.set_xlim(edges[0], edges[-1])
    axes.grid(False)
    for side in axes.spines.values():
        side.set_visible(False)
    axes.tick_params(length=0)
    for row, line in enumerate(texts or ()):
        for column, text in enumerate(line):
            value = values[row, column]
            color = INK if np.isnan(value) else _readable_on(mesh.to_rgba(value))
            axes.text(column, row, text, ha="center", va="center", color=color, fontsize=size)
    return mesh


def _readable_on(rgba: np.ndarray) -> str:
    """Black or white, whichever has more contrast (relative luminance of WCAG 2)."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in rgba[:3]]
    return "#000000" if np.dot(linear, (0.2126, 0.7152, 0.0722)) > 0.179 else "#ffffff"


def render(figure: Figure) -> Picture:
    """Draw `figure` as SVG and PNG; the same bytes for the same figure."""
    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)
    svg, png = io.StringIO(), io.BytesIO()
    FigureCanvasSVG(figure).print_svg(svg, metadata={"Date": None, "Creator": None})
    figure.set_layout_engine("none")  # the layout stands; working it out again takes longer than drawing
    figure.set_dpi(290)
    FigureCanvasAgg(figure).print_png(png, metadata={"Software": None})
    return Picture(_adapt(svg.getvalue()).encode("utf-8"), png.getvalue())


def _adapt(svg: str) -> str:
    """The SVG without its prolog and with a style sheet for dark mode."""
    rules = "".join(
        f'[style*="{what}: {light}"]{{{what}:{dark}!important}}'
        for light, dark in DARK.items()
        for what in ("fill", "stroke")
    )
    svg = svg[svg.index("<svg") :]
    end = svg.index(">") + 1
    return f"{svg[:end]}<style>@media (prefers-color-scheme:dark){{{rules}}}</style>{svg[end:]}"
