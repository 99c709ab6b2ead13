"""Pictures of the matching dynamics: does the matching settle, on what, and by what margin.

Every function takes loaded runs and an output folder, writes one PNG there and returns its path. Figures are at least
1200 pixels wide; colours are those of Okabe and Ito, told apart with colour-blind eyes too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from megatron_ssft.report.runs import (
    Configuration,
    Run,
    configuration_counts,
    gap_by_iteration,
    mutual_information_bits,
    tag_source_counts,
    whole_epochs,
)

OKABE_ITO = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442", "#000000")
_MARKERS = "osD^vP*X"
_NAMED = ("optimal", "random", "single", "fixed")
"""Runs of these names always wear the same colour, whichever of them are drawn."""
_WIDTH = 10.0
_DPI = 120


def draw_all(runs: Sequence[Run], folder: str | Path) -> list[Path]:
    """Every picture the runs have data for, in reading order."""
    gapped = [r for r in runs if len(gap_by_iteration(r.metrics)[0])]
    matched = [r for r in runs if r.num_tags > 1]
    paths = []
    if gapped:
        paths.append(draw_gap(gapped, folder))
    if matched:
        paths += [draw_distinct(matched, folder), draw_tag_sources(matched, folder)]
    paths += [draw_configurations(r, folder) for r in matched if r.name == "optimal"]
    return paths


def draw_gap(runs: Sequence[Run], folder: str | Path) -> Path:
    """matching_gap.png: mean over assignments minus optimal cost, nats on a log scale, over iterations.

    Gaps at or below 0 (rounding) cannot stand on a log scale and are left out.
    """
    figure, axes = _figure(5.0)
    for run, (color, marker) in zip(runs, _styles(runs)):
        iterations, gaps = gap_by_iteration(run.metrics)
        shown = np.where(gaps > 0, gaps, np.nan)
        sparse = len(gaps) <= 64
        axes.plot(iterations, shown, color=color, label=run.name, marker=marker if sparse else None, markersize=4)
    axes.set_yscale("log")
    axes.set_xlabel("iteration (optimizer steps)")
    axes.set_ylabel("mean over assignments minus optimal (nats)")
    axes.set_title("Matching gap: how much the choice of tags matters to the model")
    axes.grid(True, which="both", alpha=0.25)
    _legend(axes, "matching")
    return _save(figure, folder, "matching_gap.png")


def draw_distinct(runs: Sequence[Run], folder: str | Path) -> Path:
    """distinct_matchings.png: different configurations (sets of edges tag <-> source) chosen in each whole epoch."""
    figure, axes = _figure(5.0)
    for run, (color, marker) in zip(runs, _styles(runs)):
        epochs = whole_epochs(run.visits)
        counts = configuration_counts(run.visits)
        values = [len(counts[e]) for e in epochs]
        positions = [e + 1 for e in epochs]
        axes.plot(positions, values, color=color, label=run.name, marker=marker)
        for x, y in zip(positions, values):
            axes.annotate(f"{y:,}", (x, y), xytext=(0, 7), textcoords="offset points", ha="center", color=color)
    axes.set_yscale("log")
    axes.margins(x=0.06, y=0.12)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("epoch")
    axes.set_ylabel("different matchings (count)")
    axes.set_title("Different matchings of tags with teachers chosen in an epoch")
    axes.grid(True, which="both", alpha=0.25)
    _legend(axes, "matching")
    return _save(figure, folder, "distinct_matchings.png")


def draw_tag_sources(runs: Sequence[Run], folder: str | Path) -> Path:
    """tag_sources.png: how often each tag got each source in the last whole epoch; a heat map a run, one scale."""
    last = [whole_epochs(r.visits)[-1] for r in runs]
    tables = [tag_source_counts(r.visits, epoch, r.num_tags) for r, epoch in zip(runs, last)]
    highest = max(int(counts.max()) for counts, _ in tables)
    num_tags = max(r.num_tags for r in runs)
    figure = Figure(figsize=(_WIDTH, (1.5 + 0.4 * num_tags) * len(runs)), dpi=_DPI, layout="constrained")
    panels = figure.subplots(len(runs), 1, squeeze=False)[:, 0]
    for run, epoch, (counts, names), axes in zip(runs, last, tables, panels):
        image = axes.imshow(counts, cmap="cividis", aspect="auto", vmin=0, vmax=highest)
        _write_cells(axes, counts, [[f"{v:,}" for v in row] for row in counts], highest)
        axes.set_xticks(range(len(names)), names, rotation=30 if sum(map(len, names)) > 75 else 0)
        axes.set_yticks(range(run.num_tags), [f"tag {i + 1}" for i in range(run.num_tags)])
        axes.set_xlabel("teacher (source of the trace)")
        axes.set_ylabel("forking token")
        bits = mutual_information_bits(counts)
        axes.set_title(f"{run.name} matching, epoch {epoch + 1}: {bits:.2f} bits between tag and teacher")
        figure.colorbar(image, ax=axes, label="traces (count)", pad=0.015)
    return _save(figure, folder, "tag_sources.png")


def draw_configurations(run: Run, folder: str | Path, top: int = 20) -> Path:
    """matchings_over_epochs.png: share of visits of the `top` configurations of the last whole epoch, epoch by epoch.

    A row's label gives each edge as tag:source; a last row holds all other configurations together.
    """
    epochs = whole_epochs(run.visits)
    counts = configuration_counts(run.visits)
    overall = sum((counts[e] for e in epochs), Counter())
    order = sorted(overall, key=lambda c: (-counts[epochs[-1]][c], -overall[c], c))[:top]
    share = np.array([[counts[e][c] / counts[e].total() for e in epochs] for c in order])
    highest = share.max()
    share = np.vstack([share, np.clip(1 - share.sum(0), 0, 1)])
    labels = _edge_labels(order)
    label_width = 8 * 0.6 / 72 * len(labels[0])  # inches: 8 points, a fixed-width letter is 0.6 of them wide
    figure, axes = _figure(1.7 + 0.27 * len(share), width=label_width + 2 + 0.55 * len(epochs))
    image = axes.imshow(share, cmap="cividis", aspect="auto", vmin=0, vmax=highest)
    _write_cells(axes, share, [[f"{v:.1%}" for v in row] for row in share], highest, fontsize=8)
    axes.axhline(len(order) - 0.5, color="white", linewidth=2)
    axes.set_xticks(range(len(epochs)), [str(e + 1) for e in epochs])
    axes.set_yticks(range(len(share)), [*labels, "all others"], family="monospace", fontsize=8)
    axes.set_xlabel("epoch")
    axes.set_ylabel("matching (tag:teacher of each trace)")
    figure.suptitle(f"{run.name}: share of the most frequent matchings of the last epoch")
    figure.colorbar(image, ax=axes, label="share of questions", format=PercentFormatter(1), pad=0.015)
    return _save(figure, folder, "matchings_over_epochs.png")


def _edge_labels(configurations: Sequence[Configuration]) -> list[str]:
    """Each configuration as `tag:source` edges, a column a tag, for a fixed-width font. Tags count from 1."""
    columns = []
    for tag in sorted({tag for c in configurations for tag, _ in c}):
        cells = [" ".join(f"{t + 1}:{source}" for t, source in c if t == tag) for c in configurations]
        width = max(map(len, cells))
        columns.append([cell.ljust(width) for cell in cells])
    return ["  ".join(row) for row in zip(*columns)]


def _figure(height: float, width: float = _WIDTH) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(max(width, _WIDTH), height), dpi=_DPI, layout="constrained")
    return figure, figure.subplots()


def _styles(runs: Sequence[Run]) -> list[tuple[str, str]]:
    """Colour and marker of each run."""
    others = [r.name for r in runs if r.name not in _NAMED]
    slots = [_NAMED.index(r.name) if r.name in _NAMED else len(_NAMED) + others.index(r.name) for r in runs]
    return [(OKABE_ITO[k % len(OKABE_ITO)], _MARKERS[k % len(_MARKERS)]) for k in slots]


def _legend(axes: Axes, title: str) -> None:
    """Beside the axes, where it covers no data."""
    axes.legend(title=title, loc="upper left", bbox_to_anchor=(1.01, 1.0), frameon=False)


def _write_cells(axes: Axes, values: np.ndarray, texts: list[list[str]], highest: float, fontsize: float = 9) -> None:
    """`texts` into the cells of an image of `values` scaled to 0..`highest`, light on dark and dark on light."""
    for (row, col), value in np.ndenumerate(values):
        color = "black" if value > highest / 2 else "white"
        axes.text(col, row, texts[row][col], ha="center", va="center", color=color, fontsize=fontsize)


def _save(figure: Figure, folder: str | Path, name: str) -> Path:
    """Write `figure` without the pyplot state, so nothing depends on a display or stays in memory."""
    path = Path(folder) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure).print_png(path)
    return path
