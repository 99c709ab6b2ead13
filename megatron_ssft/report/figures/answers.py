"""Pictures of the answers tag by tag: how long they are, and how often two tags give the same one."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.ticker import PercentFormatter

from megatron_ssft.formats.evaluation import EvaluatedRun
from megatron_ssft.report.exhibits import Exhibit, TableData, clean, join, tag_name
from megatron_ssft.report.figures.style import INK, heat_map, house_style, new_figure, render, tag_color

MOST_TAGS = 24
"""Tags that a picture has room for."""


@house_style
def draw_lengths(run: EvaluatedRun, key: str) -> Exhibit:
    """Distribution of the samples' lengths, a row per tag, with the mean of each."""
    entries, name = run["per_tag"][:MOST_TAGS], clean(run["name"])
    edges = np.array(run["length_histogram"]["edges"], float)
    figure, axes = new_figure(1.0 + 0.42 * len(entries))
    for row, (entry, counts) in enumerate(zip(entries, run["length_histogram"]["counts"])):
        share = np.array(counts, float) / max(1, max(counts))
        axes.stairs(row + 0.4 - 0.8 * share, edges, baseline=row + 0.4, fill=True, color=tag_color(row))
        axes.plot([entry["tokens"]["mean"]] * 2, [row - 0.42, row + 0.42], color=INK, linewidth=2)
    axes.set_yticks(range(len(entries)), [tag_name(e["tag"]) for e in entries])
    axes.set_ylim(len(entries) - 0.5, -0.5)
    used = np.flatnonzero(np.sum(run["length_histogram"]["counts"], axis=0))
    axes.set_xlim(0, edges[used[-1] + 1] if len(used) else edges[-1])
    axes.set_xlabel("tokens per sample")
    axes.grid(axis="y", visible=False)
    ordered = sorted(run["per_tag"], key=lambda e: e["tokens"]["mean"])
    means = [
        f"{tag_name(e['tag'])} {e['tokens']['mean']:,.1f}"
        for e in (ordered if len(ordered) <= 8 else ordered[:: len(ordered) - 1])
    ]
    cut = sum(e["truncated"] * e["samples"] for e in run["per_tag"]) / max(1, run["samples"])
    text = "Samples by their number of tokens, a row per tag. Upright lines are means; each row is scaled to its own "
    text += f"fullest bin.\nMean tokens, shortest first: {join(means)}. {cut:.1%} of the samples ran into their token "
    text += f"limit.{room(run['tags'])}"
    rows = [
        [tag_name(e["tag"]), f"{e['tokens']['mean']:,.1f}", f"{e['tokens']['median']:,g}", f"{e['truncated']:.1%}"]
        for e in run["per_tag"]
    ]
    table = TableData(f"Tokens per sample of {name}", ["tag", "mean", "median", "truncated"], rows)
    alt = f"Histograms of the samples' lengths by tag of {name}. Mean tokens: {join(means)}."
    return Exhibit(key, f"Lengths by tag: {name}", render(figure), alt, text, (table,))


@house_style
def draw_agreement(run: EvaluatedRun, answers: str, key: str) -> Exhibit:
    """How often samples of two tags give the same answer: a heat map, with numbers where they fit."""
    name, tags = clean(run["name"]), run["tags"]
    share = np.array([[np.nan if v is None else v for v in row] for row in run["agreement"]["share"]], float)
    texts = [["–" if np.isnan(v) else f"{v:.2f}" for v in row] for row in share] if len(tags) <= 8 else None
    figure, axes = new_figure(1.0 + min(3.4, 0.45 * len(tags)))
    mesh = heat_map(axes, share, texts=texts, highest=1.0)
    short = ["none" if tag is None else str(tag + 1) for tag in tags]
    every = -(-len(tags) // 16)
    axes.set_xticks(range(0, len(tags), every), short[::every])
    axes.set_yticks(range(0, len(tags), every), short[::every])
    axes.set_xlabel("tag (number of its <think>)")
    axes.set_ylabel("tag")
    figure.colorbar(mesh, ax=axes, format=PercentFormatter(1), pad=0.02, aspect=14).ax.tick_params(length=0)
    text = (
        "Share of pairs of samples of one question that give the same answer, by their tags. On the diagonal are pairs "
    )
    text += "under one tag. A dark cell off the diagonal means that two tags answer differently.\n"
    text += f"{_pairs(share, tags)} Answers are compared as {clean(answers)}; a failed extraction agrees with nothing."
    alt = f"Heat map: agreement between the tags of {name}. {_pairs(share, tags)}"
    names = [tag_name(tag) for tag in tags]
    rows = [[n, *("-" if np.isnan(v) else f"{v:.2f}" for v in row)] for n, row in zip(names, share)]
    tables = (TableData(f"Agreement of {name}", ["tag", *names], rows),)
    return Exhibit(key, f"Agreement between tags: {name}", render(figure), alt, text, tables)


def _pairs(share: np.ndarray, tags: Sequence[int | None]) -> str:
    """The tags that agree most and least."""
    upper = [
        (share[i, j], i, j) for i in range(len(tags)) for j in range(i + 1, len(tags)) if not np.isnan(share[i, j])
    ]
    if not upper:
        return "No question has samples under two tags."
    (low, a, b), (high, c, d) = min(upper), max(upper)
    within = np.diagonal(share)
    own = f" Samples of one tag agree in {np.nanmean(within):.0%}." if not np.isnan(within).all() else ""
    pair = f"{tag_name(tags[c])} and {tag_name(tags[d])} agree most ({high:.0%})"
    return f"{pair}, {tag_name(tags[a])} and {tag_name(tags[b])} least ({low:.0%}).{own}"


def room(tags: Sequence[int | None]) -> str:
    """A sentence on the tags that are not in the picture."""
    return f" The picture has room for the first {MOST_TAGS} of {len(tags)} tags." if len(tags) > MOST_TAGS else ""
