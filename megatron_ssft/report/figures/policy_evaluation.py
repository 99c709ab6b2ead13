"""Picture and tables of policy_evaluation.json: the accuracy of every way to choose the tag."""

from __future__ import annotations

import textwrap

import numpy as np

from megatron_ssft.evaluation.policy_tables import policy_tables, show
from megatron_ssft.formats.policy_evaluation import STATES, PolicyEvaluationRecord
from megatron_ssft.report.exhibits import Exhibit, Section, TableData, clean, join, tag_name
from megatron_ssft.report.figures.policy import BEFORE_AFTER
from megatron_ssft.report.figures.style import INK, house_style, new_figure, render

_NAMED = ("own", "fixed", "uniform", "group", "other_samples", "oracle", "grpo")
"""Rows whose figures stand under the picture."""


def add_evaluation(section: Section, record: PolicyEvaluationRecord) -> None:
    """Add the picture, and the tables of megatron-ssft evaluate-policy."""
    section.exhibits.append(draw_rows(record))
    for table in policy_tables(record):
        header, rows = [clean(cell) for cell in table.header], [[clean(cell) for cell in row] for row in table.rows]
        section.tables.append(TableData(clean(table.title), header, rows, clean(table.rule, 400)))
    section.remarks += [clean(line, 200) for line in record["remarks"]]


def evaluation_sentences(record: PolicyEvaluationRecord) -> list[str]:
    """The result in words: what was gained over g*, what of the headroom, whether the modes are intact."""
    rows = {row["key"]: row for row in record["rows"]}
    ways = [rows[key] for key in _NAMED[:4] if key in rows]
    results = [f"{clean(way['name'])} {show(way['after'])}" for way in ways if way["after"]]
    lines = [f"After GFPO, on {record['questions']:,} held-out questions: {join(results)}."] if results else []
    differences = {entry["key"]: entry for entry in record["differences"]}
    gains = [
        f"{show(differences[key], signed=True)} {what}"
        for key, what in (
            ("own-fixed", "over the best fixed tag"),
            ("own-uniform", "over uniform tags"),
            ("own-grpo", "over GRPO"),
        )
        if key in differences
    ]
    lines += [f"The model's own choice gains {join(gains)}."] if gains else []
    drift = differences.get("uniform-uniform_before")
    if drift:
        lines.append(f"Uniform choice moved by {show(drift, signed=True)}, which says whether the modes are intact.")
    for entry in record["headroom_recovered"]:
        if entry["value"] is not None:
            lines.append(f"Recovered {clean(entry['name'])}: {entry['value']:.0%} of {entry['headroom']:+.3f}.")
    return lines


@house_style
def draw_rows(record: PolicyEvaluationRecord) -> Exhibit:
    """Accuracy of every way to choose the tag, before and after: bars with standard errors."""
    rows = [row for row in record["rows"] if row["before"] or row["after"]]
    figure, axes = new_figure(1.0 + 0.42 * len(rows))
    for state, color, shift in zip(STATES, BEFORE_AFTER, (-0.19, 0.19)):
        bars = [(y + shift, e) for y, e in enumerate(row[state] for row in rows) if e is not None]
        axes.barh(
            [y for y, _ in bars], [e["value"] for _, e in bars], 0.36, color=color, label=state,
            xerr=[e["stderr"] or 0.0 for _, e in bars], error_kw={"ecolor": INK, "elinewidth": 1.5, "capsize": 2.5},
        )  # fmt: skip
    axes.set_yticks(range(len(rows)), [textwrap.fill(clean(row["name"], 40), 22) for row in rows])
    axes.set_ylim(len(rows) - 0.45, -0.55)
    axes.set_xlim(0, 1.02)
    axes.set_xticks(np.linspace(0, 1, 6))
    axes.set_xlabel("share of correct answers")
    axes.grid(axis="y", visible=False)
    figure.legend(loc="outside upper left", ncols=2, handlelength=1.6, borderpad=0.0, columnspacing=1.4)
    parts = join(
        f"{clean(row['name'])} {show(row['before'])} and {show(row['after'])}" for row in rows if row["key"] in _NAMED
    )
    text = "Share of correct answers by how the tag is chosen, before and after the training of the policy. The "
    text += "model's own choice should rise from uniform tags towards the best tag per question.\n"
    text += f"Before and after: {parts}."
    text += f"\ng* is {tag_name(record['fixed_tag']['tag'])}, chosen on the rewards of the training questions."
    sizes = (record["samples_per_tag"]["before"], record["samples_per_tag"]["after"])
    least, most = min(least for least, _ in sizes), max(most for _, most in sizes)
    count = f"{least}" if least == most else f"{least} to {most}"
    text += f" The best tag per question is chosen on {count} samples per tag and measured on the same "
    text += "samples: too high. `halves` chooses on half of them and measures on the other half."
    if record["group_by"]:
        text += f" The best tag per {clean(record['group_by'])} is an oracle: chosen on the held-out samples before."
    alt = f"Bar chart: accuracy before and after, by how the tag is chosen. {parts}."
    return Exhibit("policy_evaluation", "Own choice, fixed tag, oracles", render(figure), alt, text)
