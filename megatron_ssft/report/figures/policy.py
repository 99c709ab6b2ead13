"""Pictures of the forking policy over its training: reward, probability inside the tags, erosion, the tags chosen."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, PercentFormatter

from megatron_ssft.evaluation.policy_choices import entropies
from megatron_ssft.evaluation.tables import counted
from megatron_ssft.formats.policy import PolicyRow
from megatron_ssft.report.exhibits import (
    Exhibit,
    Section,
    TableData,
    clean,
    join,
    number,
    percent,
    short_names,
    slugs,
    tag_name,
)
from megatron_ssft.report.figures.line_charts import Chart, draw_curves, points_of
from megatron_ssft.report.figures.style import OKABE_ITO, heat_map, house_style, new_figure, render
from megatron_ssft.report.read.policy_runs import PolicyRun

BEFORE_AFTER = (OKABE_ITO[4], OKABE_ITO[0])
"""Colours of what was before and after the training."""
MOST, MOST_COLUMNS = 16, 12
"""Rows or bars, and columns of a heat map, that a picture has room for; the table has more."""
MOST_ROWS = 64
_INTRO = (
    "The policy is the model's own probability of each tag after the prompt, taken among the tags. In this part g* is "
    "the tag of highest mean reward, whichever the matchings chose."
)
_OF_TAGS = "gfpo"
"""Objectives that begin so have a policy over tags; others train whole completions."""


def policy_section(runs: Sequence[PolicyRun], groups: Mapping[str, str] | None, known: Sequence[str]) -> Section:
    """All pictures of the policies in `runs`.

    Args:
        groups: question's id -> its group, where known.
        known: names of all runs of the report, for the same colours everywhere.
    """
    section = Section("policy", "Choosing the tag (GFPO)", _INTRO)
    for run in runs:
        _add_reward(section, run, slugs([run.name for run in runs])[run.name])
    of_tags = [run for run in runs if run.objective.startswith(_OF_TAGS)]
    if len(of_tags) > 1:
        chart = Chart("policy_reward", "Reward of the policies", "reward of the policy", "mean reward", known=known)
        _add_curves(section, chart, of_tags, "reward")
    for key, column, title, what, label, note in _CHARTS:
        share = label.startswith("share")
        chart = Chart(key, title, what, label, share=share, known=known, note=note)
        _add_curves(section, chart, of_tags if key in ("policy_mass", "policy_entropy") else runs, column)
    for run in runs:
        _add_choices(section, run, groups, slugs([run.name for run in runs])[run.name])
    return section


_CHARTS = (
    ("policy_mass", "mass", "Probability inside the tags", "probability that a tag is written", "share inside the tags",
     "The rest goes to answers that begin without a tag."),
    ("policy_entropy", "entropy", "Entropy of the policy", "entropy of the policy", "entropy (nats)",
     "Mean over a step's questions; 0 where one tag is certain, the logarithm of the number of tags where all are "
     "equally likely."),
    ("policy_kl", "kl", "KL to the reference", "KL divergence to the reference", "KL (nats)",
     "Under gfpo that of the tag's choice, under grpo that of tokens: these two do not compare."),
    ("completion_nll_shift", "completion_nll_shift", "NLL shift of stored completions",
     "rise of the stored completions' NLL", "NLL shift (nats per token)",
     "Above 0 the answers that the rewards were measured on become less likely under their own tags: what the tags "
     "stand for erodes."),
    ("rescored_nll_shift", "rescored_nll_shift", "NLL shift at a rescoring", "rise of the rescored completions' NLL",
     "NLL shift (nats per token)", ""),
    ("anchor_kl", "anchor_kl", "KL of the anchor", "KL to the reference on stored completions", "KL (nats per token)",
     "How far the answers under a tag have moved from the reference's."),
    ("effective_sample_size", "effective_sample_size", "Effective sample size of the rewards",
     "effective sample size of the stored completions", "share of the samples",
     "Of the importance weights; far below 1 the rewards no longer belong to these weights."),
    ("clip_fraction", "clip_fraction", "Share of ratios clipped", "share of ratios clipped", "share of the ratios", ""),
)  # fmt: skip


def _add_reward(section: Section, run: PolicyRun, slug: str) -> None:
    """The policy's reward beside what it has to beat on the same questions."""
    of_tags, metrics = run.objective.startswith(_OF_TAGS), run.metrics
    names = {"policy": "reward"} if of_tags else {"stored samples of the step": "reward_stored"}
    names |= {"best fixed tag": "reward_best_fixed", "uniform tags": "reward_uniform"}
    note = "Means over a step's questions, with the weights before the step; the best fixed tag is that of the step."
    note = note if of_tags else "Mean of the stored samples of a step: what they are worth, not what was learned."
    chart = Chart(
        f"policy_reward_{slug}", f"Reward over the training: {clean(run.name)}", "mean reward", "mean reward", note=note
    )
    exhibit = draw_curves(chart, {name: (metrics["iteration"], metrics[key]) for name, key in names.items()})
    if exhibit is not None:
        section.exhibits.append(exhibit)
    else:
        section.remarks.append(f"The reward of {clean(run.name)} is not drawn: the log has no value of it.")


def _add_curves(section: Section, chart: Chart, runs: Sequence[PolicyRun], column: str) -> None:
    """The runs that have the value; a sentence on the others where some have it. Few logs have every value."""
    curves = {run.name: (run.metrics["iteration"], run.metrics[column]) for run in runs}
    exhibit = draw_curves(chart, curves)
    if exhibit is not None:
        section.exhibits.append(exhibit)
        empty = [clean(name) for name, curve in curves.items() if not len(points_of(curve)[0])]
        if empty:
            section.remarks.append(f"{chart.title} is not drawn for {join(empty)}: the log has no value of it.")


def run_sentence(run: PolicyRun) -> str:
    """A sentence on the result of the training."""
    name, metrics = clean(run.name), run.metrics
    if not len(metrics):
        return f"{name} has not trained a step of its policy yet."
    parts = [f"{name}: {counted(len(metrics), 'step')} of {clean(run.objective)}"]
    for column, what, shown in (
        ("reward", "reward", number),
        ("mass", "probability inside the tags", percent),
        ("entropy", "entropy", number),
    ):
        values = points_of((metrics["iteration"], metrics[column]))[1]
        if len(values):
            parts.append(f"{what} {shown(values[0])} at first and {shown(values[-1])} in the end")
    shift = points_of((metrics["iteration"], metrics["completion_nll_shift"]))[1]
    if len(shift):
        parts.append(f"NLL of stored completions {shift[-1]:+.3g} nats per token")
    if run.finished is not None and run.finished != "done":
        parts.append(f"ended because of {clean(run.finished)}")
    return ", ".join(parts) + "."


# -- which tags ------------------------------------------------------------------------------------------------------


def _add_choices(section: Section, run: PolicyRun, groups: Mapping[str, str] | None, slug: str) -> None:
    """Tags by group, or on the average, first and last; how peaked."""
    snapshots, name = run.snapshots(), clean(run.name)
    if not snapshots:
        if run.objective.startswith(_OF_TAGS):
            section.remarks.append(f"The tags chosen by {name} are not drawn: it has no policy.jsonl, or an empty one.")
        return
    if len(snapshots) == 1:
        section.remarks.append(f"{name} has written its policy at step {snapshots[0][0]} alone; there is no after yet.")
    group_of = groups or {}
    known = {id for _, rows in snapshots for id in rows if id in group_of}
    if known:
        tables = [_by_group({id: row for id, row in rows.items() if id in known}, group_of) for _, rows in snapshots]
        for state, (step, _), table in zip(("before", "after"), snapshots, tables):
            section.exhibits.append(draw_groups(run, step, table, tables, f"policy_tags_{state}_{slug}"))
        missing = max(len(rows.keys() - known) for _, rows in snapshots)
        if missing:
            section.remarks.append(f"{counted(missing, 'question')} of the policy of {name} have no known group.")
    else:
        if groups is not None:
            section.remarks.append(f"No question of the policy of {name} has a known group; it is shown over all.")
        section.exhibits.append(draw_mean(run, snapshots, f"policy_mean_{slug}"))
    section.exhibits.append(draw_entropies(run, snapshots, f"policy_entropies_{slug}"))


def _questions(run: PolicyRun) -> str:
    return "held-out" if run.split == "eval" else "training"


@dataclass(frozen=True)
class GroupTable:
    """The policy by groups of questions; at least one."""

    sizes: Counter[str]
    names: list[str]
    """G groups in alphabetical order."""
    mean_GN: np.ndarray
    """float64 [G, N]: mean probability of each tag."""


def _by_group(rows: Mapping[str, PolicyRow], groups: Mapping[str, str]) -> GroupTable:
    of: dict[str, list[np.ndarray]] = defaultdict(list)
    for id, row in rows.items():
        of[groups[id]].append(row.policy_N)
    names = sorted(of)
    return GroupTable(
        Counter({name: len(of[name]) for name in names}), names, np.array([np.mean(of[name], 0) for name in names])
    )


@house_style
def draw_groups(run: PolicyRun, step: int, by_group: GroupTable, all_steps: Sequence[GroupTable], key: str) -> Exhibit:
    """Mean probability of each tag in each group of questions: a heat map with numbers.

    Pictures of `all_steps` show the same tags in the same colours.
    """
    sizes, names, table = by_group.sizes, by_group.names, by_group.mean_GN
    chosen = sorted(sorted(range(len(names)), key=lambda k: (-sizes[names[k]], k))[:MOST])
    likeliest = np.max([other.mean_GN.max(0) for other in all_steps], 0)
    tags = sorted(np.argsort(-likeliest, kind="stable")[:MOST_COLUMNS].tolist())
    shown = table[np.ix_(chosen, tags)]
    figure, axes = new_figure(1.15 + 0.33 * len(chosen))
    texts = [[f"{v:.2f}" for v in row] for row in shown] if len(tags) <= 8 else None
    mesh = heat_map(axes, shown, texts=texts, highest=float(likeliest.max()))
    axes.set_xticks(range(len(tags)), [str(t + 1) for t in tags])
    axes.set_yticks(range(len(chosen)), short_names([names[k] for k in chosen]))
    axes.set_xlabel("tag (number of its <think>)")
    figure.colorbar(mesh, ax=axes, format=PercentFormatter(1), pad=0.02, aspect=14).ax.tick_params(length=0)
    main = [f"{clean(n, 24)} {tag_name(int(row.argmax()))} ({row.max():.0%})" for n, row in zip(names[:8], table)]
    parts = f"{join(main)}{', ...' if len(names) > 8 else ''}"
    text = (
        f"Mean probability of each tag at step {step:,}, over {counted(sizes.total(), f'{_questions(run)} question')}. "
        "A row with one bright cell is a group that settled on a tag.\n"
    )
    text += f"Likeliest tag: {parts}.{_room(len(chosen), len(names), 'groups')}"
    text += _room(len(tags), table.shape[1], "tags")
    title = f"Tags by group, step {step:,}: {clean(run.name)}"
    header = ["group", "questions", *(tag_name(t) for t in range(min(table.shape[1], MOST_ROWS)))]
    cells = [[clean(n), f"{sizes[n]:,}", *(f"{v:.3f}" for v in row[:MOST_ROWS])] for n, row in zip(names, table)]
    alt = f"Heat map: probability of each tag (columns) in each group of questions (rows). Likeliest: {parts}."
    return Exhibit(key, title, render(figure), alt, text, (TableData(title, header, cells[:MOST_ROWS]),))


def _room(shown: int, there: int, what: str) -> str:
    return f" The picture has room for {shown} of {there:,} {what}." if shown < there else ""


@house_style
def draw_mean(run: PolicyRun, snapshots: Sequence[tuple[int, Mapping[str, PolicyRow]]], key: str) -> Exhibit:
    """Mean probability of each tag over all questions, first and last: bars."""
    means = [np.mean([row.policy_N for row in rows.values()], 0) for _, rows in snapshots]
    tags = sorted(np.argsort(-np.max(means, 0), kind="stable")[:MOST].tolist())
    figure, axes = new_figure(2.9)
    width = 0.8 / len(means)
    for place, ((step, _), mean) in enumerate(zip(snapshots, means)):
        left = np.arange(len(tags)) - 0.4 + width * place
        axes.bar(left, mean[tags], width, align="edge", color=BEFORE_AFTER[place], label=f"step {step:,}")
    axes.set_xticks(range(len(tags)), [str(t + 1) for t in tags])
    axes.set_xlabel("tag (number of its <think>)")
    axes.set_ylabel("mean probability")
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.grid(axis="x", visible=False)
    _legend(axes)
    likeliest = [f"{tag_name(int(m.argmax()))} {m.max():.1%} at step {s:,}" for (s, _), m in zip(snapshots, means)]
    size = counted(len(snapshots[-1][1]), f"{_questions(run)} question")
    text = "Mean probability of each tag, first and last. A tall bar is a tag that the policy prefers.\n"
    text += f"Means over {size}. Likeliest tag: {', '.join(likeliest)}.{_room(len(tags), len(means[0]), 'tags')}"
    title = f"Tags chosen: {clean(run.name)}"
    rows = [[tag_name(t), *(f"{m[t]:.3f}" for m in means)] for t in range(min(len(means[0]), MOST_ROWS))]
    table = TableData(title, ["tag", *(f"step {step:,}" for step, _ in snapshots)], rows)
    alt = f"Bar chart: mean probability of each tag, first and last. Likeliest: {join(likeliest)}."
    return Exhibit(key, title, render(figure), alt, text, (table,))


@house_style
def draw_entropies(run: PolicyRun, snapshots: Sequence[tuple[int, Mapping[str, PolicyRow]]], key: str) -> Exhibit:
    """How peaked the policy is: a histogram of the questions' entropies, first and last."""
    entropies_by_step = [entropies(np.array([row.policy_N for row in rows.values()])) for _, rows in snapshots]
    num_tags = len(next(iter(snapshots[0][1].values())).policy_N)
    highest = max(float(np.log(num_tags)), 1e-3)
    edges = np.linspace(0, highest, 15)
    figure, axes = new_figure(2.8)
    for place, ((step, _), values) in enumerate(zip(snapshots, entropies_by_step)):
        counts = np.histogram(np.clip(values, 0, highest), edges)[0]
        label, color = f"step {step:,}", BEFORE_AFTER[place]
        if place == 0:
            axes.stairs(counts, edges, label=label, color=color, fill=True)
        else:
            axes.stairs(counts, edges, label=label, color=color, linewidth=2.5)
    axes.set_xlabel(f"entropy of a question's policy (nats; at most {highest:.2f})")
    axes.set_ylabel("questions")
    axes.set_xlim(0, highest)
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    _legend(axes)
    certain = [np.mean([row.policy_N.max() > 0.9 for row in rows.values()]) for _, rows in snapshots]
    parts = [
        f"at step {step:,} mean {number(float(values.mean()))} nats, one tag above 90% in {share:.0%} of the questions"
        for (step, _), values, share in zip(snapshots, entropies_by_step, certain)
    ]
    title = f"How peaked the policy is: {clean(run.name)}"
    levels = (0, 10, 25, 50, 75, 90, 100)
    rows = [[f"{level}%", *(f"{np.percentile(values, level):.3f}" for values in entropies_by_step)] for level in levels]
    table = TableData(title, ["percentile", *(f"step {step:,}" for step, _ in snapshots)], rows, "entropy in nats")
    text = (
        f"Questions by the entropy of their policy, in nats, over the {_questions(run)} questions. Near 0 one tag is "
    )
    text += f"certain; at the right end all tags are equally likely.\nEntropy {'; '.join(parts)}."
    alt = f"Histogram: entropy of the questions' policies, first and last. {'; '.join(parts)}."
    return Exhibit(key, title, render(figure), alt, text, (table,))


def _legend(axes: Axes) -> None:
    """Above the picture, where it covers no data."""
    if len(axes.get_legend_handles_labels()[0]) > 1:
        axes.figure.legend(loc="outside upper left", ncols=2, handlelength=1.6, borderpad=0.0, columnspacing=1.4)
