"""Pictures of what each tag stands for: matchings over the training, learned matchings as a graph, sources by tag."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, PercentFormatter

from megatron_ssft.evaluation.tables import counted
from megatron_ssft.matching.coverage import Configuration, TagCoverage
from megatron_ssft.matching.statistics import mutual_information_bits, tag_source_counts
from megatron_ssft.report.exhibits import (
    Exhibit,
    Section,
    TableData,
    clean,
    join,
    percent,
    short_names,
    slugs,
    tag_name,
)
from megatron_ssft.report.figures.matching import NOT_MATCHED
from megatron_ssft.report.figures.style import heat_map, house_style, new_figure, render, tag_color
from megatron_ssft.report.read.run_facts import ConfigurationShares, RunFacts, configuration_shares

MOST = 16
"""Tags or sources that a picture has room for; the table has all, up to MOST_ROWS."""
MOST_ROWS = 64
LEAST_SCALE = 0.05
"""Share of the questions at the bright end of the scale, where no matching has more: noise should look like noise."""


def tags_section(runs: Sequence[RunFacts]) -> Section:
    """Three pictures per run that was matched."""
    section = Section("tags", "Tags and sources")
    if all(s is None for f in runs for v in f.run.visits for s in v.sources):
        section.intro = (
            "The data names no sources. A trace's place among the traces of its question stands in: trace 1, trace 2, "
            "... It means something only where each place has a teacher of its own."
        )
    slug = slugs([facts.name for facts in runs])
    for facts in runs:
        name, key = clean(facts.name), slug[facts.name]
        if facts.is_single or not facts.run.visits:
            reason = NOT_MATCHED if facts.is_single else "no question was visited"
            section.remarks.append(f"{name} has no pictures of tags and sources: {reason}.")
            continue
        shares = configuration_shares(facts.run)
        if shares is None:
            count = f"{len(facts.run.visits):,} visits of questions are too few to show a development"
            section.remarks.append(f"Matchings over the training are not drawn for {name}: {count}.")
        else:
            section.exhibits.append(draw_configurations(facts, shares, f"matchings_{key}"))
        if facts.ranking:
            section.exhibits.append(draw_graph(facts, f"learned_matchings_{key}"))
        else:
            section.remarks.append(f"The learned matchings of {name} are not drawn: {facts.why_no_choice}.")
        section.exhibits.append(draw_sources(facts, f"tag_sources_{key}"))
    return section


@house_style
def draw_configurations(facts: RunFacts, shares: ConfigurationShares, key: str) -> Exhibit:
    """A heat map: share of each frequent configuration in successive stretches of the training."""
    rows, stretches = shares.shares.shape
    figure, axes = new_figure(1.1 + 0.22 * rows)
    mesh = heat_map(axes, shares.shares, x_edges=shares.edges, highest=max(LEAST_SCALE, shares.shares.max()))
    axes.set_yticks(range(rows), [f"#{k + 1}" for k in range(rows)])
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.set_xlabel("training step")
    figure.colorbar(mesh, ax=axes, format=PercentFormatter(1), pad=0.02, aspect=14).ax.tick_params(length=0)
    name, last = clean(facts.name), facts.last_epoch
    first_row = f"#1 ({edges_text(shares.configurations[0])}) went from {percent(shares.shares[0, 0])} to "
    text = (
        f"Share of the questions that chose each matching, over {stretches} stretches of the training. A bright row is "
        f"a matching that many questions settled on.\nRows shown: {rows}, together {percent(shares.covered)} of the "
        f"last stretch. Epoch {last + 1} had {counted(len(facts.counts[last]), 'different matching')}. "
        f"{first_row}{percent(shares.shares[0, -1])}. The table says which matching each row is."
    )
    alt = f"Heat map: share of the {rows} most frequent matchings of {name} over the training. {first_row}"
    alt += f"{percent(shares.shares[0, -1])}."
    middle = stretches // 2
    table = TableData(
        f"Matchings of {name}: share of a stretch's questions",
        ["row", "edges", "first", "middle", "last"],
        [
            [f"#{k + 1}", edges_text(c), *(percent(shares.shares[k, j]) for j in (0, middle, -1))]
            for k, c in enumerate(shares.configurations)
        ],
    )
    return Exhibit(key, f"Matchings over the training: {name}", render(figure), alt, text, (table,))


def edges_text(configuration: Configuration) -> str:
    """`1 left_fold, 2 code`: each edge as the tag's number, from 1, and its source."""
    return ", ".join(f"{tag + 1} {clean(source, 24)}" for tag, source in configuration)


@house_style
def draw_graph(facts: RunFacts, key: str) -> Exhibit:
    """The bipartite graph of the learned matchings: tags left, sources right, the line's width its weight."""
    ranking, name = facts.ranking, clean(facts.name)
    weights, sources = _weights(ranking)
    tags, columns = _heaviest(weights)
    shown = weights[np.ix_(tags, columns)]
    centre = (shown * np.arange(len(tags))[:, None]).sum(0) / np.maximum(shown.sum(0), 1)
    order = np.argsort(centre, kind="stable")  # sources beside their tags, so that few lines cross
    columns, shown = [columns[k] for k in order], shown[:, order]
    figure, axes = new_figure(0.5 + 0.36 * max(len(tags), len(columns)))
    _draw_edges(axes, shown)
    _label_sides(axes, [_left_label(t, ranking[0].tag) for t in tags], short_names([sources[k] for k in columns]))
    text = f"{_graph_text(facts, len(sources))}\n{_strongest(ranking)} {_cut(tags, columns, weights)}".strip()
    alt = f"Graph: tags of {name} left, sources right, wider lines for more matches. {_strongest(ranking)}"
    return Exhibit(key, f"Learned matchings: {name}", render(figure), alt, text, (_graph_table(ranking, name),))


def _graph_text(facts: RunFacts, num_sources: int) -> str:
    """Size of the graph, what it was counted from, and g*."""
    best, epoch = facts.ranking[0], facts.epochs[-1]
    edges = sum(tag.degree for tag in facts.ranking)
    origin = f"{len(facts.persistent):,} matchings of epoch {epoch + 1}, the only complete one"
    if len(facts.epochs) > 1:
        origin = f"{len(facts.persistent):,} of {len(facts.counts[epoch]):,} matchings of epoch {epoch + 1} that have "
        origin += "not lost their share since the one before"
    return (
        "Learned matchings between tags (left) and sources (right); a wider line is matched more often. A tag with one "
        "wide line stands for that source.\n"
        f"{edges:,} edges between {facts.num_tags} tags and {num_sources:,} sources, from the {origin}.\n"
        f"g* is {tag_name(best.tag)}: {best.reason}."
    )


def _graph_table(ranking: Sequence[TagCoverage], name: str) -> TableData:
    total = sum(tag.weighted_degree for tag in ranking)
    rows = [
        [
            tag_name(t.tag) + (" (g*)" if t is ranking[0] else ""),
            f"{t.degree:,}",
            f"{t.weighted_degree:,}",
            percent(t.weighted_degree / total),
            ", ".join(f"{clean(s, 24)} {w / t.weighted_degree:.0%}" for s, w in list(t.sources.items())[:12]) or "-",
        ]
        for t in ranking[:MOST_ROWS]
    ]
    header = ["tag", "sources", "matches", "share of all", "of which"]
    return TableData(f"Learned matchings of {name}, from g* down", header, rows)


def _weights(ranking: Sequence[TagCoverage]) -> tuple[np.ndarray, list[str]]:
    """int64 [N, sources] of the learned matchings, and the sources in alphabetical order."""
    sources = sorted({source for tag in ranking for source in tag.sources})
    column = {source: k for k, source in enumerate(sources)}
    weights = np.zeros((len(ranking), len(sources)), np.int64)
    for tag in ranking:
        for source, weight in tag.sources.items():
            weights[tag.tag, column[source]] = weight
    return weights, sources


def _heaviest(weights: np.ndarray) -> tuple[list[int], list[int]]:
    """The rows and columns that a picture has room for, in their order: those with most weight."""

    def pick(totals: np.ndarray) -> list[int]:
        return sorted(np.argsort(-totals, kind="stable")[:MOST].tolist())

    return pick(weights.sum(1)), pick(weights.sum(0))


def _cut(tags: Sequence[int], columns: Sequence[int], weights: np.ndarray) -> str:
    """A sentence on what is not in the picture."""
    parts = [
        f"{len(kept)} of {size:,} {what}"
        for kept, size, what in ((tags, len(weights), "tags"), (columns, weights.shape[1], "sources"))
        if len(kept) < size
    ]
    return f"The picture has room for the {join(parts)} with most matches." if parts else ""


def _draw_edges(axes: Axes, weights: np.ndarray) -> None:
    left, right = _places(len(weights)), _places(weights.shape[1])
    bend = np.linspace(0, 1, 24)
    curve = bend**2 * (3 - 2 * bend)
    heaviest = weights.max()
    for tag, column in sorted(np.argwhere(weights).tolist(), key=lambda edge: weights[tuple(edge)]):
        width = max(0.6, 9 * weights[tag, column] / heaviest)
        axes.plot(
            bend, left[tag] + (right[column] - left[tag]) * curve, color=tag_color(tag), linewidth=width,
            solid_capstyle="butt", alpha=0.85,
        )  # fmt: skip


def _label_sides(axes: Axes, left: Sequence[str], right: Sequence[str]) -> None:
    for names, x, side in ((left, -0.03, "right"), (right, 1.03, "left")):
        for y, name in zip(_places(len(names)), names):
            axes.text(x, y, name, ha=side, va="center", fontsize=10)
    axes.set_xlim(0, 1)
    axes.set_ylim(1.04, -0.04)
    axes.axis("off")


def _places(count: int) -> np.ndarray:
    return (np.arange(count) + 0.5) / count


def _left_label(tag: int, best: int) -> str:
    return f"g* {tag_name(tag)}" if tag == best else tag_name(tag)


def _strongest(ranking: Sequence[TagCoverage]) -> str:
    """The main source of each of the first tags, by number."""
    matched = [t for t in sorted(ranking, key=lambda t: t.tag) if t.sources]
    parts = []
    for tag in matched[:8]:
        (source, weight), total = next(iter(tag.sources.items())), tag.weighted_degree
        parts.append(f"{tag_name(tag.tag)} {clean(source, 24)} ({weight / total:.0%} of its {total:,})")
    return f"Main source of each tag: {join(parts)}{', ...' if len(matched) > 8 else ''}."


@house_style
def draw_sources(facts: RunFacts, key: str) -> Exhibit:
    """How often each tag got each source in the last complete epoch: a heat map with numbers."""
    epoch, name = facts.last_epoch, clean(facts.name)
    counts, sources = tag_source_counts(facts.run.visits, epoch, facts.num_tags)
    tags, columns = _heaviest(counts)
    shown = counts[np.ix_(tags, columns)]
    figure, axes = new_figure(1.15 + 0.33 * len(columns))
    small = len(tags) <= 8 and counts.max() < 100_000
    heat_map(axes, shown.T.astype(float), texts=[[f"{v:,}" for v in row] for row in shown.T] if small else None)
    axes.set_xticks(range(len(tags)), [str(t + 1) for t in tags])
    axes.set_yticks(range(len(columns)), short_names([sources[k] for k in columns]))
    axes.set_xlabel("tag (number of its <think>)")
    bits = mutual_information_bits(counts)
    most = np.log2(min(facts.num_tags, len(sources)))
    part = "" if epoch in facts.epochs else ", which is not complete"
    by_source = [_main_tag(sources[k], counts[:, k]) for k in columns[:8] if counts[:, k].sum()]
    text = (
        f"Traces of each source under each tag in epoch {epoch + 1}{part}. One bright cell per row means that the tag "
        f"tells the source.\nMutual information between tag and source: {bits:.2f} of at most {most:.2f} bits. Main "
        f"tag of each source: {join(by_source)}{', ...' if len(columns) > 8 else ''}. "
        f"{_cut(tags, columns, counts)}"
    ).strip()
    alt = f"Heat map: traces of each source (rows) under each tag (columns) of {name}. Main tags: {join(by_source)}."
    rows = [
        [clean(source), *(f"{v:,}" for v in counts[:MOST_ROWS, k]), f"{counts[:, k].sum():,}"]
        for k, source in list(enumerate(sources))[:MOST_ROWS]
    ]
    header = ["source", *(tag_name(t) for t in range(min(len(counts), MOST_ROWS))), "all"]
    table = TableData(f"Traces by source and tag of {name}, epoch {epoch + 1}", header, rows)
    return Exhibit(key, f"Sources by tag: {name}", render(figure), alt, text, (table,))


def _main_tag(source: str, counts_N: np.ndarray) -> str:
    return f"{clean(source, 24)} {tag_name(int(counts_N.argmax()))} ({counts_N.max() / counts_N.sum():.0%})"
