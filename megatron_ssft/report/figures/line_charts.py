"""Curves of several runs over training steps, with their numbers in words and in a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, PercentFormatter

from megatron_ssft.report.exhibits import Exhibit, TableData, clean, number, percent, thin
from megatron_ssft.report.figures.style import (
    LineStyle,
    house_style,
    legend,
    line_label,
    line_styles,
    log_axis,
    new_figure,
    render,
)
from megatron_ssft.report.read.runs import final_mean

Curve = tuple[np.ndarray, np.ndarray]
"""Steps and values, float64; values that are not finite are no points."""
FEW_POINTS = 24
"""A curve of at most so many points shows each of them."""
_ROWS = 9


@dataclass(frozen=True)
class Chart:
    """The subject of a chart of curves."""

    key: str
    title: str
    what: str
    """The quantity in words; the caption and its alternative text begin with it."""
    label: str
    """Label of the vertical axis, with its unit."""
    log: bool = False
    share: bool = False
    """Values are shares of 1."""
    known: Sequence[str] = ()
    """All names of the report, for the same colours everywhere."""
    note: str = ""
    """Sentences on what to see in it."""
    x_label: str = "training step"
    mean: bool = True
    """Whether the mean of the last values says more than the last one."""
    points: int = 160
    """A curve of more is drawn as means over neighbours."""

    def show(self, value: float) -> str:
        return percent(value) if self.share else number(value)


def points_of(curve: Curve, log: bool = False) -> Curve:
    """The points of a curve; on a log scale those above 0."""
    x, y = (np.asarray(values, np.float64) for values in curve)
    shown = np.isfinite(x) & np.isfinite(y)
    shown &= (y > 0) | (not log)
    return x[shown], y[shown]


@house_style
def draw_curves(chart: Chart, curves: Mapping[str, Curve]) -> Exhibit | None:
    """The curves that have points, in one chart; None if none has any (on a log scale: any above 0)."""
    curves = {name: points_of(curve, chart.log) for name, curve in curves.items()}
    curves = {name: curve for name, curve in curves.items() if len(curve[0])}
    if not curves:
        return None
    figure, axes = new_figure(3.1)
    styles, run = line_styles(list(curves), chart.known), 1
    for name, (x, y) in curves.items():
        run = max(run, _draw(axes, *thin(x, y, chart.points), styles[name], name))
    axes.set_xlabel(chart.x_label)
    axes.set_ylabel(chart.label)
    axes.set_xmargin(0.03)
    if chart.log:
        log_axis(axes)
    elif chart.share:
        axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    legend(axes, list(curves))
    lines = [_sentence(chart, name, *curve) for name, curve in curves.items()]
    plotted = f"{chart.what[0].upper()}{chart.what[1:]} by {chart.x_label}."
    thinned = f"A point of the picture is the mean of up to {run} steps." if run > 1 else ""
    text = "\n".join([" ".join(filter(None, [plotted, chart.note, thinned])), *lines])
    alt = f"Line chart: {chart.what} by {chart.x_label}. " + " ".join(_brief(chart, n, *c) for n, c in curves.items())
    return Exhibit(chart.key, chart.title, render(figure), alt, text, (_table(chart, curves),))


def _draw(axes: Axes, x: np.ndarray, y: np.ndarray, run: int, style: LineStyle, name: str) -> int:
    """One curve; `run`, the steps that a point of it stands for, is handed back."""
    every = 1 if len(x) <= FEW_POINTS else max(1, len(x) // 8)
    axes.plot(
        x, y, color=style.color, linestyle=style.dash, marker=style.marker, markevery=every, label=line_label(name)
    )
    return run


def _sentence(chart: Chart, name: str, x: np.ndarray, y: np.ndarray) -> str:
    name = clean(name)
    if len(y) == 1:
        return f"{name}: {chart.show(y[0])} at step {x[0]:,.0f}, its only value."
    if y.min() == y.max():
        return f"{name}: {chart.show(y[0])} throughout, steps {x[0]:,.0f} to {x[-1]:,.0f}."
    points = [f"{chart.show(y[0])} at step {x[0]:,.0f}"]
    between = {"least": int(y.argmin()), "greatest": int(y.argmax())}
    ends = (chart.show(y[0]), chart.show(y[-1]))
    points += [
        f"{word} {chart.show(y[k])} at step {x[k]:,.0f}" for word, k in between.items() if chart.show(y[k]) not in ends
    ]
    points.append(f"{chart.show(y[-1])} at step {x[-1]:,.0f}")
    points += [f"mean of the last 16 values {chart.show(final_mean(y))}"] if chart.mean and len(y) > 32 else []
    return f"{name}: {', '.join(points)}."


def _brief(chart: Chart, name: str, x: np.ndarray, y: np.ndarray) -> str:
    return f"{clean(name)} from {chart.show(y[0])} to {chart.show(y[-1])}."


def _table(chart: Chart, curves: Mapping[str, Curve]) -> TableData:
    """Values at a few steps; a run without a value near a step has `-` there."""
    first, last = min(x[0] for x, _ in curves.values()), max(x[-1] for x, _ in curves.values())
    every = np.unique(np.concatenate([x for x, _ in curves.values()]))
    grid = every if len(every) <= 2 * _ROWS else np.unique(np.rint(np.linspace(first, last, _ROWS)))
    reach = np.diff(grid).min() / 2 if len(grid) > 1 else 0.5
    rows = [[f"{step:,.0f}", *(_near(chart, curve, step, reach) for curve in curves.values())] for step in grid]
    rule = f"{chart.label}; each at its {chart.x_label} alone, no means of neighbours"
    return TableData(chart.title, [chart.x_label, *map(clean, curves)], rows, rule)


def _near(chart: Chart, curve: Curve, step: float, reach: float) -> str:
    place = int(np.abs(curve[0] - step).argmin())
    return chart.show(curve[1][place]) if abs(curve[0][place] - step) <= reach else "-"
