"""Pictures of how the matching develops: its costs and gap, information between tag and source, different matchings."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.ticker import MaxNLocator

from megatron_ssft.matching.statistics import mutual_information_bits, tag_source_counts
from megatron_ssft.report.exhibits import Exhibit, Section, TableData, clean, join, number, slugs, thin
from megatron_ssft.report.figures.line_charts import Chart, draw_curves
from megatron_ssft.report.figures.style import DASHES, MARKERS, OKABE_ITO, house_style, legend, new_figure, render
from megatron_ssft.report.figures.training import add_curves
from megatron_ssft.report.read.run_facts import MatchingCosts, RunFacts

NOT_MATCHED = "all its traces were trained under one tag, so nothing was matched"


def dynamics_section(runs: Sequence[RunFacts], known: Sequence[str]) -> Section:
    """Every curve of the matching that the logs have."""
    section = Section(
        "matching",
        "Matching over the training",
        "Matching costs are in nats per question (equations 3-4). A trace costs the mean negative log-likelihood of "
        "its first tokens under its tag. A question costs the sum over its traces; a point is the mean over a step's "
        "questions.",
    )
    matched = [facts for facts in runs if not facts.is_single]
    section.remarks += [f"{clean(f.name)} has no pictures of its matching: {NOT_MATCHED}." for f in runs if f.is_single]
    slug = slugs([facts.name for facts in runs])
    for facts in matched:
        _add_costs(section, facts, f"matching_costs_{slug[facts.name]}")
    chart = Chart(
        "matching_gap", "Matching gap", "matching gap", "gap (nats per question)", log=True, known=known,
        note="It is the mean cost of a random matching minus the cost of the optimal one. A gap near 0 means that tags "
        "are interchangeable; it grows as they come to differ.",
    )  # fmt: skip
    _add(section, chart, matched, "matching_gap", "no matching costs were evaluated")
    chart = Chart(
        "tag_source_information", "Information between tag and source",
        "normalised mutual information between tag and source", "information (0 to 1)", known=known,
        note="It is taken over a sliding window of steps and corrected for chance. About 0 means that the matching "
        "ignores the sources, 1 that tag and source follow from each other.",
    )  # fmt: skip
    _add(section, chart, matched, "tag_source_information", "the log has no value of it")
    chart = Chart(
        "matching_margin", "Second-best margin", "cost of the second-best matching minus cost of the optimal one",
        "margin (nats per question)", log=True,
        known=known, note="It is the median over a step's questions; near 0 where some tags are copies.",
    )  # fmt: skip
    _add(
        section, chart, [f for f in matched if f.matching != "random"], "matching_margin", "the log has no value of it"
    )
    _add_unmatched(section, matched, known)
    _add_distinct(section, matched, known)
    _add_regret(section, runs, known)
    return section


def _add(section: Section, chart: Chart, runs: Sequence[RunFacts], column: str, reason: str) -> None:
    add_curves(section, chart, runs, lambda facts: facts.run.metrics[column], reason)


def _add_costs(section: Section, facts: RunFacts, key: str) -> None:
    if facts.costs is None:
        name = clean(facts.name)
        section.remarks.append(
            f"The matching costs of {name} are not drawn: none were evaluated"
            + (" (--log-matching-interval evaluates them now and then)." if facts.matching == "random" else ".")
        )
    else:
        section.exhibits.append(draw_costs(facts, facts.costs, key))


@house_style
def draw_costs(facts: RunFacts, costs: MatchingCosts, key: str) -> Exhibit:
    """Optimal, random and mean cost of one run over its steps; of other than optimal tags also what was trained."""
    curves = {"optimal": costs.optimal, "random": costs.random, "mean": costs.mean}
    if not np.allclose(costs.optimal, costs.chosen, atol=1e-4):
        curves["trained"] = costs.chosen
    figure, axes = new_figure(3.1)
    for slot, (label, values) in enumerate(curves.items()):
        x, y, run = thin(costs.iteration, values)
        every = max(1, len(x) // 8)
        axes.plot(
            x, y, color=OKABE_ITO[slot], linestyle=DASHES[slot], marker=MARKERS[slot], markevery=every, label=label
        )
    axes.set_xlabel("training step")
    axes.set_ylabel("cost (nats per question)")
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.set_ylim(bottom=0 if min(costs.optimal) >= 0 else None)
    legend(axes, list(curves))
    name = clean(facts.name)
    first, last = costs.iteration[0], costs.iteration[-1]
    ends = [f"{label} {number(values[0])} and {number(values[-1])}" for label, values in curves.items()]
    text = (
        "Matching cost by training step, in nats per question. Random is one assignment drawn for each question, mean "
    )
    text += "the average over all assignments."
    text += " Trained is the cost of the tags that the run gave out." if "trained" in curves else ""
    text += f" A point of the picture is the mean of {run} steps." if run > 1 else ""
    text += f"\nAt steps {first:,.0f} and {last:,.0f}: {', '.join(ends)}. At the end the optimal assignment is "
    text += f"{number((costs.mean - costs.optimal)[-1])} nats below the mean: the matching gap."
    alt = f"Line chart: matching cost of {name} over training steps, at the first and the last: {', '.join(ends)}."
    picks = np.unique(np.linspace(0, len(costs.iteration) - 1, 9).astype(int))
    rows = [[f"{costs.iteration[k]:,.0f}", *(number(values[k]) for values in curves.values())] for k in picks]
    table = TableData(f"Matching cost of {name}, nats per question", ["training step", *curves], rows)
    return Exhibit(key, f"Matching cost: {name}", render(figure), alt, text, (table,))


def _add_unmatched(section: Section, runs: Sequence[RunFacts], known: Sequence[str]) -> None:
    """Only where some tag was unmatched at some time: a line at 0 needs no picture."""
    logged = {
        f.name: f.run.metrics["unmatched_tags"] for f in runs if np.isfinite(f.run.metrics["unmatched_tags"]).any()
    }
    if not logged:
        return
    if all(np.nanmax(values) == 0 for values in logged.values()):
        section.remarks.append(f"No tag ever stayed unmatched in {join(map(clean, logged))}: nothing to draw.")
        return
    chart = Chart(
        "unmatched_tags", "Tags without a trace", "tags that no trace was matched to", "tags", known=known,
        note="It is taken over a sliding window of steps.",
    )  # fmt: skip
    _add(section, chart, [f for f in runs if f.name in logged], "unmatched_tags", "")


def _add_distinct(section: Section, runs: Sequence[RunFacts], known: Sequence[str]) -> None:
    """Different configurations by epoch."""
    enough = [facts for facts in runs if len(facts.epochs) > 1]
    for facts in runs:
        if facts not in enough:
            epochs = "no epoch is complete" if not facts.epochs else "only one epoch is complete"
            section.remarks.append(f"Matchings by epoch are not drawn for {clean(facts.name)}: {epochs}.")
    curves = {f.name: (np.array(f.epochs) + 1, np.array([len(f.counts[e]) for e in f.epochs])) for f in enough}
    chart = Chart(
        "distinct_matchings", "Different matchings in an epoch", "different matchings", "matchings (count)", log=True,
        known=known, x_label="epoch",
    )  # fmt: skip
    exhibit = draw_curves(chart, curves)
    if exhibit is None:
        return
    counts = [
        f"{clean(f.name)}: {len(f.counts[f.epochs[0]]):,} in epoch {f.epochs[0] + 1}, "
        f"{len(f.counts[f.epochs[-1]]):,} in epoch {f.epochs[-1] + 1}."
        for f in enough
    ]
    text = "Different matchings by epoch: sets of edges between tags and sources. A falling count means that questions "
    text += "settle on the same matchings. Counts ignore by how much one matching is better than another: read them "
    text += "beside the matching gap.\n" + "\n".join(counts)
    tables = (*exhibit.tables, _information_table(enough))
    section.exhibits.append(Exhibit(exhibit.key, exhibit.title, exhibit.picture, exhibit.alt, text, tables))


def _information_table(runs: Sequence[RunFacts]) -> TableData:
    """Mutual information by epoch, of all visits and uncorrected."""
    epochs = sorted({epoch for facts in runs for epoch in facts.epochs})

    def bits(facts: RunFacts, epoch: int) -> str:
        if epoch not in facts.epochs:
            return "-"
        return f"{mutual_information_bits(tag_source_counts(facts.run.visits, epoch, facts.num_tags)[0]):.2f}"

    rows = [[str(epoch + 1), *(bits(facts, epoch) for facts in runs)] for epoch in epochs]
    return TableData(
        "Mutual information between tag and source, in bits", ["epoch", *(clean(f.name) for f in runs)], rows
    )


def _add_regret(section: Section, runs: Sequence[RunFacts], known: Sequence[str]) -> None:
    """Add the loss of the approximated matchings; nothing is said where none was approximated."""
    approximated = [f for f in runs if np.isfinite(f.run.metrics["matching_regret"]).any()]
    chart = Chart(
        "matching_regret", "Regret of the approximated matching",
        "cost of the approximated matching minus cost of the optimal one",
        "regret (nats per question)", known=known, note=join(map(_saved, approximated)) + ".",
    )  # fmt: skip
    if approximated:
        _add(section, chart, approximated, "matching_regret", "")


def _saved(facts: RunFacts) -> str:
    metrics = facts.run.metrics
    seconds = metrics["exact_matching_seconds"], metrics["matching_seconds"]
    measured = np.isfinite(seconds[0]) & np.isfinite(seconds[1])
    if not measured.any():
        return f"For {clean(facts.name)} the log has no times of the exact matching"
    exact, taken = (float(values[measured].mean()) for values in seconds)
    return f"{clean(facts.name)} took {taken:.3g} s per step where the exact matching takes {exact:.3g} s"
