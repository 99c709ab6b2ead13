"""Pictures of the generated answers: pass@k, votes, accuracy and length by tag, agreement between tags."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import numpy as np

from megatron_ssft.evaluation import tables as evaluation_tables
from megatron_ssft.evaluation.policy_tables import show
from megatron_ssft.evaluation.tables import best_tag, counted
from megatron_ssft.formats.evaluation import (
    EstimateRecord,
    EvaluatedRun,
    EvaluationRecord,
    MaybeEstimate,
    PassAtK,
    own_tags,
)
from megatron_ssft.report.exhibits import Exhibit, Section, TableData, clean, join, slugs, tag_name
from megatron_ssft.report.figures.answers import MOST_TAGS, draw_agreement, draw_lengths, room
from megatron_ssft.report.figures.style import (
    house_style,
    legend,
    line_label,
    line_styles,
    new_figure,
    render,
)

Figure = tuple[str, MaybeEstimate]
BEST_TAG = "best tag's pass@1"
"""Chosen on the samples that it is measured on."""
BEST_PER_QUESTION = "best tag per question, chosen on other samples"


def evaluation_section(record: EvaluationRecord, known: Sequence[str]) -> Section:
    """All pictures and tables of evaluation.json."""
    runs = record["runs"]
    section = Section("evaluation", "Generated answers", _intro(runs))
    if all(run["ours"] for run in runs):
        some = [run for run in runs if pass_points(run)]
        section.exhibits += [draw_pass(some, known)] if some else []
        section.exhibits.append(draw_votes(runs, known))
        if not some:
            section.remarks.append("pass@k is not drawn: no question has as many samples as the least k asked for.")
    else:
        section.remarks.append(
            "pass@k and votes are not drawn: the evaluation was made with --protocol published only."
        )
    section.exhibits.append(draw_accuracy(runs, known))
    slug = slugs([run["name"] for run in runs])
    section.exhibits += [draw_lengths(run, f"lengths_{slug[run['name']]}") for run in runs]
    for run in runs:
        if len(run["tags"]) > 1:
            section.exhibits.append(draw_agreement(run, record["answers"], f"agreement_{slug[run['name']]}"))
        else:
            section.remarks.append(
                f"Agreement between tags is not drawn for {clean(run['name'])}: it has one tag only."
            )
    _add_tables(section, record)
    section.remarks += [clean(line, 200) for line in evaluation_tables.warnings(record)]
    if not any(run["groups"] for run in runs):
        section.remarks.append(
            "There is no table of the best tag of each group of questions: the evaluation was made without --group-by."
        )
    return section


def _add_tables(section: Section, record: EvaluationRecord) -> None:
    """Add the tables of megatron-ssft evaluate: comparisons and groups of questions in sight, the others folded up."""
    fields = {run["groups"]["field"] for run in record["runs"] if run["groups"]}
    for t in evaluation_tables.all_tables(record):
        header, rows = [clean(cell) for cell in t.header], [[clean(cell) for cell in row] for row in t.rows]
        in_sight = len(record["runs"]) == 1 or t.title == "Runs" or t.header[0] in fields
        (section.tables if in_sight else section.folded).append(TableData(clean(t.title, 160), header, rows, t.rule))


def _intro(runs: Sequence[EvaluatedRun]) -> str:
    parts = []
    for run in runs:
        sampling = run["sampling"]
        how = [f"{key.replace('_', ' ')} {clean(sampling[key])}" for key in ("temperature", "top_p") if key in sampling]
        how += [f"tags: {clean(sampling['mode'])}"] if "mode" in sampling else []
        samples = f"{counted(run['samples'], 'sample')} of {counted(run['questions'], 'question')}"
        parts.append(
            f"{clean(run['name'])}: {samples} ({', '.join([*how, 'judged by ' + join(map(clean, run['verifiers']))])})."
        )
    return " ".join([*parts, "± is the standard error over questions."])


def best_pass(entry: PassAtK) -> MaybeEstimate:
    """pass@k by tag where tags were asked for, else that of the pooled samples: what the tables compare too."""
    return entry["stratified"] or entry["pooled"]


def pass_points(run: EvaluatedRun) -> dict[int, EstimateRecord]:
    """k -> pass@k, for every k that the samples allow."""
    pairs = [(entry["k"], best_pass(entry)) for entry in run["ours"]["pass@k"]] if run["ours"] else []
    return {k: estimate for k, estimate in pairs if estimate is not None}


def _rule(run: EvaluatedRun) -> str:
    return clean(run["ours"]["rule"], 200) if run["ours"] else ""


@house_style
def draw_pass(runs: Sequence[EvaluatedRun], known: Sequence[str]) -> Exhibit:
    """pass@k over k, with standard errors; every run must have a pass@k."""
    figure, axes = new_figure(3.2)
    styles, parts = line_styles([run["name"] for run in runs], known), []
    points_of_run = {run["name"]: pass_points(run) for run in runs}
    ks = sorted({k for points in points_of_run.values() for k in points})
    for name, by_k in points_of_run.items():
        points, style = list(by_k.items()), styles[name]
        axes.errorbar(
            [k for k, _ in points], [e["value"] for _, e in points], [e["stderr"] or 0.0 for _, e in points],
            color=style.color, linestyle=style.dash, marker=style.marker, capsize=3, label=line_label(name),
        )  # fmt: skip
        shown = [points[0], points[-1]] if len(points) > 1 else points
        parts.append(f"{clean(name)} " + join(f"{show(e)} at k = {k}" for k, e in shown))
    axes.set_xscale("log", base=2)
    axes.set_xticks(ks, [str(k) for k in ks])
    axes.minorticks_off()
    axes.set_ylim(0, 1.02)
    axes.set_xlabel("k (samples per question)")
    axes.set_ylabel("pass@k")
    legend(axes, [run["name"] for run in runs])
    text = (
        "pass@k by k: the share of questions with a right answer among k samples. Samples are spread over the tags as "
    )
    text += "evenly as possible where tags were asked for; elsewhere they are drawn from all samples. A steeper curve "
    text += "means more different answers.\n" + ".\n".join(parts) + "."
    rows = [[str(k), *(show(points.get(k)) for points in points_of_run.values())] for k in ks]
    table = TableData("pass@k", ["k", *map(clean, points_of_run)], rows, _rule(runs[0]))
    return Exhibit(
        "pass_at_k", "pass@k", render(figure), f"Line chart: pass@k over k. {'; '.join(parts)}.", text, (table,)
    )


def common_k(runs: Sequence[EvaluatedRun]) -> int:
    """The k that runs with `ours` are compared at: one sample a tag where any run has several tags."""
    ks = [entry["k"] for entry in runs[0]["ours"]["cons@k"]] if runs[0]["ours"] else []
    tags = max(len(run["tags"]) for run in runs)
    return tags if tags > 1 and tags in ks else max(ks, default=0)


def votes_of(run: EvaluatedRun, k: int) -> list[Figure]:
    """One sample, a vote, any of k, the best tag: names and estimates in the order of reading; `run` has `ours`."""
    assert run["ours"] is not None
    return [
        ("pass@1", run["ours"]["pass@1"]),
        (BEST_TAG, best_tag(run)),
        (f"cons@{k}", next((entry["sets"] for entry in run["ours"]["cons@k"] if entry["k"] == k), None)),
        (f"pass@{k}", pass_points(run).get(k)),
        (BEST_PER_QUESTION, run["best_tag"]["other_samples"]),
    ]


@house_style
def draw_votes(runs: Sequence[EvaluatedRun], known: Sequence[str]) -> Exhibit:
    """A dot per run for pass@1, vote, pass@k and the best tag."""
    k = common_k(runs)
    figures = {run["name"]: dict(votes_of(run, k)) for run in runs}
    labels = list(next(iter(figures.values())))
    figure, axes = new_figure(1.3 + len(labels) * (0.2 + 0.14 * len(runs)))
    styles = line_styles([run["name"] for run in runs], known)
    shift = np.linspace(-0.28, 0.28, len(runs)) if len(runs) > 1 else np.zeros(1)
    for run, offset in zip(runs, shift):
        style, estimates = styles[run["name"]], figures[run["name"]]
        shown = [(y + offset, e) for y, e in enumerate(estimates.values()) if e is not None]
        axes.errorbar(
            [e["value"] for _, e in shown], [y for y, _ in shown], xerr=[e["stderr"] or 0.0 for _, e in shown],
            color=style.color, linestyle="none", marker=style.marker, capsize=3, markersize=7,
            label=line_label(run["name"]),
        )  # fmt: skip
    axes.set_yticks(range(len(labels)), [textwrap.fill(label, 20) for label in labels])
    axes.set_ylim(len(labels) - 0.45, -0.55)
    axes.set_xlim(0, 1.02)
    axes.set_xlabel("share of questions answered correctly")
    legend(axes, [run["name"] for run in runs])
    parts = [
        f"{clean(name)}: {join(f'{label} {show(e)}' for label, e in estimates.items())}"
        for name, estimates in figures.items()
    ]
    text = f"Share of questions answered correctly: by one sample (pass@1), by a vote of {k} (cons@{k}), by any of {k} "
    text += f"(pass@{k}), and under the best tag. The vote is over sets of {k} samples, spread over the tags where "
    text += "tags were asked for. The best tag is chosen on the same samples. The best tag per question is chosen on "
    text += "every other sample and measured on the rest, where there are samples enough."
    if any(map(own_tags, runs)):
        text += " Where the model chose its tags, they do not compare: each was measured on other questions."
    text += "\n" + ".\n".join(parts) + "."
    rows = [[label, *(show(estimates[label]) for estimates in figures.values())] for label in labels]
    table = TableData("One sample, votes, any of k", ["figure", *map(clean, figures)], rows, _rule(runs[0]))
    alt = f"Dot plot of pass@1, vote, pass@k and the best tag. {'. '.join(parts)}."
    return Exhibit("votes", "One sample, a vote, any of k", render(figure), alt, text, (table,))


@house_style
def draw_accuracy(runs: Sequence[EvaluatedRun], known: Sequence[str]) -> Exhibit:
    """Accuracy of each tag, a marker per run, with standard errors."""
    tags = sorted({tag for run in runs for tag in run["tags"]}, key=lambda tag: (tag is None, tag))
    place = {tag: k for k, tag in enumerate(tags)}
    figure, axes = new_figure(3.0)
    styles = line_styles([run["name"] for run in runs], known)
    shift = np.linspace(-0.25, 0.25, len(runs)) if len(runs) > 1 else np.zeros(1)
    for run, offset in zip(runs, shift):
        style = styles[run["name"]]
        entries = [e for e in run["per_tag"] if place[e["tag"]] < MOST_TAGS]
        axes.errorbar(
            [place[e["tag"]] + offset for e in entries], [e["accuracy"]["value"] for e in entries],
            [e["accuracy"]["stderr"] or 0.0 for e in entries],
            color=style.color, linestyle="none", marker=style.marker, capsize=2.5, markersize=7,
            label=line_label(run["name"]),
        )  # fmt: skip
    shown = tags[:MOST_TAGS]
    axes.set_xticks(range(len(shown)), ["none" if tag is None else str(tag + 1) for tag in shown])
    axes.set_xlim(-0.6, len(shown) - 0.4)
    axes.set_ylim(0, 1.02)
    axes.set_xlabel("tag (number of its <think>)")
    axes.set_ylabel("accuracy")
    legend(axes, [run["name"] for run in runs])
    parts = [_extremes(run) for run in runs]
    text = (
        "Accuracy of the samples under each tag; bars are standard errors over questions. Tags far apart mean that the "
    )
    text += "choice of the tag matters." + room(tags) + "\n" + "\n".join(parts)
    accuracy = [{e["tag"]: e["accuracy"] for e in run["per_tag"]} for run in runs]
    rows = [[tag_name(tag), *(show(by_tag.get(tag)) for by_tag in accuracy)] for tag in tags]
    table = TableData("Accuracy by tag", ["tag", *(clean(run["name"]) for run in runs)], rows)
    alt = f"Dot plot: accuracy of each tag. {' '.join(parts)}"
    return Exhibit("tag_accuracy", "Accuracy by tag", render(figure), alt, text, (table,))


def _extremes(run: EvaluatedRun) -> str:
    entries = sorted(run["per_tag"], key=lambda e: -e["accuracy"]["value"])
    first, last = entries[0], entries[-1]
    best = f"{tag_name(first['tag'])} {show(first['accuracy'])}"
    if len(entries) == 1:
        return f"{clean(run['name'])}: {best}, its only tag."
    return f"{clean(run['name'])}: best {best}, worst {tag_name(last['tag'])} {show(last['accuracy'])}."
