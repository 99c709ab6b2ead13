"""The record of an evaluation as tables for people; each says which rule its figures follow. At most 100 columns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from rich import box
from rich.table import Table
from rich.text import Text

from megatron_ssft.evaluation.published_protocol import SAMPLES
from megatron_ssft.formats.evaluation import (
    ComparedFigure,
    EvaluatedRun,
    EvaluationRecord,
    Groups,
    MaybeEstimate,
    OurFigures,
    PublishedFigures,
    own_tags,
)

ERROR = "± standard error over questions"
UNEVEN = "needs as many samples under every tag"
OWN_PASS = "pass@1, the model's own tags"
WHY = "why they differ"
WIDEST_MATRIX = 6
"""More tags than this do not fit beside each other; their matrix is in evaluation.json alone."""


@dataclass(frozen=True)
class TableData:
    """A table without its looks."""

    title: str
    rule: str
    """Which rule the figures follow."""
    header: Sequence[str]
    rows: list[list[str]] = field(default_factory=list)


def all_tables(record: EvaluationRecord) -> list[TableData]:
    """The tables of `record`: first all runs together, then run by run."""
    runs = record["runs"]
    tables = []
    if len(runs) > 1:
        tables += [_compare_ours(runs)] if runs[0]["ours"] else []
        tables += [_compare_published(runs)] if runs[0]["published"] else []
    for run in runs:
        tables += [_ours(run, run["ours"])] if run["ours"] else []
        tables += [_published(run, run["published"])] if run["published"] else []
        tables += [_side_by_side(run, run["side_by_side"])] if run["side_by_side"] else []
        tables.append(_tags(run))
        if len(run["tags"]) > 1:
            tables.append(_best_tags(run))
            tables += [_agreement(run, record["answers"])] if len(run["tags"]) <= WIDEST_MATRIX else []
        tables += [_groups(run, run["groups"])] if run["groups"] else []
    return tables


def warnings(record: EvaluationRecord) -> list[str]:
    """A line for each run in which questions lack samples."""
    lines = []
    for run in record["runs"]:
        if run["incomplete"]:
            lack = f"{counted(len(run['incomplete']), 'question')} {'lacks' if len(run['incomplete']) == 1 else 'lack'}"
            where = "" if own_tags(run) else " under some tag"
            name = f"{run['name']}: " if len(record["runs"]) > 1 else ""
            lines.append(f"{name}incomplete: {lack} samples{where}; pooled figures are biased")
    return lines


def counted(number: int, noun: str) -> str:
    """`1 vote`, `2 votes`."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def to_rich(data: TableData) -> Table:
    """A table for the terminal. The first column is text, the others are figures."""
    table = Table(
        title=Text(data.title, "bold"),
        caption=Text(data.rule),
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        title_justify="left",
        caption_justify="left",
    )
    for place, header in enumerate(data.header):
        table.add_column(Text(header), justify="right" if place and header != WHY else "left", overflow="fold")
    for row in data.rows:
        table.add_row(*map(Text, row))
    return table


def to_markdown(tables: Sequence[TableData], remarks: Sequence[str] = ()) -> str:
    """One file with all tables, below `remarks`."""
    parts = [f"{_cell(remark)}\n" for remark in remarks]
    for table in tables:
        lines = [table.header, [":--" if place == 0 else "--:" for place in range(len(table.header))], *table.rows]
        text = "\n".join("| " + " | ".join(map(_cell, line)) + " |" for line in lines)
        parts.append(f"## {_cell(table.title)}\n\n{text}\n\n{_cell(table.rule)}\n")
    return "\n".join(parts)


def _cell(text: str) -> str:
    """Without what Markdown would read as a column or as HTML."""
    return text.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")


def tag_name(tag: int | None) -> str:
    """Name of a 0-based tag for people."""
    return "no tag" if tag is None else f"<think{tag + 1}>"


def _compare_ours(runs: Sequence[EvaluatedRun]) -> TableData:
    parts = [(run, run["ours"]) for run in runs if run["ours"]]
    first = parts[0][1]
    ks = [entry["k"] for entry in first["cons@k"]]
    most = max(len(run["tags"]) for run in runs)
    k = most if most > 1 and most in ks else max(ks)
    groups = [run["groups"] for run in runs if run["groups"]]
    by_group = len(groups) == len(runs)
    header = ["run", "samples", "pass@1", "best tag's", f"pass@{k}", f"cons@{k}"]
    header += [f"best tag of {groups[0]['field']}"] if by_group else []
    rows = []
    for place, (run, ours) in enumerate(parts):
        figures = [ours["pass@1"], best_tag(run), _pass_at(ours, k), _cons_at(ours, k)]
        row = [run["name"], _samples(run), *(_show(figure, run) for figure in figures)]
        rows.append([*row, _number(groups[place]["best_same"])] if by_group else row)
    rule = f"{first['rule']}; {ERROR}; pass@{k}: by tag where tags were asked for, else pooled; "
    rule += "best tags are chosen on the same samples"
    return TableData("Runs", rule + _other_questions(runs), header, rows)


def best_tag(run: EvaluatedRun) -> MaybeEstimate:
    """The most accurate tag's accuracy, None where the model chose the tags."""
    return None if own_tags(run) else max((e["accuracy"] for e in run["per_tag"]), key=lambda e: e["value"])


def _other_questions(runs: Sequence[EvaluatedRun]) -> str:
    """A warning where the runs cannot be compared."""
    ids = [{entry["id"] for entry in run["best_tag"]["per_question"]} for run in runs]
    return "" if all(own == ids[0] for own in ids) else "; NOT THE SAME QUESTIONS in all runs"


def _compare_published(runs: Sequence[EvaluatedRun]) -> TableData:
    parts = [(run, run["published"]) for run in runs if run["published"]]
    rows = []
    for run, published in parts:
        figures = [published["pass@1"], published["native_cons"], published["cons_grouped"]]
        figures.append(published["cons_interleaved"])
        rows.append([run["name"], _samples(run), *(_show(figure, run) for figure in figures)])
    header = ["run", "samples", "pass@1", "native cons", "cons@32 grouped", "interleaved"]
    rule = f"{parts[0][1]['rule']}; {ERROR}"
    if any(map(own_tags, runs)):
        rule += f"; of {', '.join(run['name'] for run in runs if own_tags(run))}: {OWN_PASS}"
    return TableData("Runs", rule + _other_questions(runs), header, rows)


def _ours(run: EvaluatedRun, ours: OurFigures) -> TableData:
    rows = []
    for passed, cons in zip(ours["pass@k"], ours["cons@k"], strict=True):
        figures = [passed["pooled"], passed["stratified"], cons["sets"], cons["first_interleaved"]]
        figures.append(cons["first_grouped"])
        rows.append([str(passed["k"]), *(_show(figure, run) for figure in figures)])
    rule = (
        f"{ours['rule']}; cons@k: mean over disjoint sets of k samples, one vote over the first k in turn by tag, over "
    )
    rule += "the first k tag after tag"
    if ours["native_cons"] and ours["native_votes"]:
        rows.append(["native", "-", "-", _show(ours["native_cons"], run), "-", "-"])
        votes = _counted_span(ours["native_votes"], "vote")
        rule += f"; native cons@{len(run['tags'])}: mean of {votes} of one sample per tag"
    header = ["k", "pass@k pooled", "pass@k by tag", "cons@k sets", "first k", "first k grouped"]
    return TableData(f"{run['name']}: pass@k and votes, {_samples(run)}", _rule(run, rule), header, rows)


def _published(run: EvaluatedRun, published: PublishedFigures) -> TableData:
    tag = "its tag" if published["pass@1"] is None else tag_name(published["pass_tag"])
    label = OWN_PASS if own_tags(run) else f"pass@1 under {tag}"
    rows = [[label, _counted_span(published["pass_samples"], "sample"), _show(published["pass@1"], run)]]
    if not own_tags(run):
        if len(run["tags"]) > 1:
            votes = published["native_votes"] if published["native_cons"] else None
            native = _counted_span(votes, "vote") if votes else UNEVEN
            rows.append([f"native cons@{len(run['tags'])}", native, _show(published["native_cons"], run)])
        for form, figure in (
            ("grouped", published["cons_grouped"]),
            ("interleaved", published["cons_interleaved"]),
        ):
            over = "1 vote" if figure else _no_cons(run)
            rows.append([f"cons@{SAMPLES}, {form} by tag", over, _show(figure, run)])
    title = f"{run['name']}: published protocol, {_samples(run)}"
    return TableData(title, _rule(run, published["rule"]), ["figure", "over", "value"], rows)


def _side_by_side(run: EvaluatedRun, figures: Sequence[ComparedFigure]) -> TableData:
    rows = [[f["metric"], _show(f["published"], run), _show(f["ours"], run), f["why"]] for f in figures]
    rule = "theirs: published rule, under the names of the paper's code; ours: our rule, answers compared as "
    rule += "for our votes, ties by expectation, failed extractions do not vote"
    title = f"{run['name']}: beside the paper's code"
    return TableData(title, _rule(run, rule), ["metric", "theirs", "ours", WHY], rows)


def _no_cons(run: EvaluatedRun) -> str:
    """Why there is no cons@32."""
    most = run["samples_per_question"][1]
    there = f"there {'is' if most == 1 else 'are'} {_span(run['samples_per_question'])}"
    return f"needs {SAMPLES} samples, {there}" if most < SAMPLES else UNEVEN


def _tags(run: EvaluatedRun) -> TableData:
    rows = [
        [
            tag_name(entry["tag"]),
            str(entry["samples"]),
            _show(entry["accuracy"], run),
            f"{entry['tokens']['mean']:.1f}",
            f"{entry['tokens']['median']:g}",
            f"{entry['truncated']:.1%}",
            f"{entry['no_answer']:.1%}",
        ]
        for entry in run["per_tag"]
    ]
    header = ["tag", "samples", "accuracy", "mean tokens", "median", "truncated", "no answer"]
    rule = "accuracy: mean over questions of the share of correct samples; no votes, so the same under either rule"
    return TableData(f"{run['name']}: tags", _rule(run, rule), header, rows)


def _best_tags(run: EvaluatedRun) -> TableData:
    best = run["best_tag"]
    rows = [
        ["oracle: chosen and measured on the same samples", _show(best["oracle"], run)],
        ["chosen on every other sample, measured on the rest", _show(best["other_samples"], run)],
    ]
    rule = "no votes, so the same under either rule; the first figure is too high by its own luck"
    return TableData(f"{run['name']}: best tag of each question", _rule(run, rule), ["best tag", "accuracy"], rows)


def _agreement(run: EvaluatedRun, answers: str) -> TableData:
    names = [tag_name(tag) for tag in run["tags"]]
    share, corrected = run["agreement"]["share"], run["agreement"]["chance_corrected"]
    rows = []
    for place, name in enumerate(names):
        pairs = zip(share[place], corrected[place])
        rows.append([name, *("-" if s is None else f"{s:.2f}" + _optional(c) for s, c in pairs)])
    rule = "share of sample pairs of one question with the same answer (corrected for chance); answers compared as "
    rule += f"{answers}, a failed extraction agrees with nothing"
    return TableData(f"{run['name']}: agreement between tags", rule, ["tag", *names], rows)


def _optional(corrected: float | None) -> str:
    return "" if corrected is None else f" ({corrected:.2f})"


def _groups(run: EvaluatedRun, groups: Groups) -> TableData:
    rows = [
        [
            entry["group"],
            str(entry["questions"]),
            " ".join(map(tag_name, entry["best"])),
            _number(entry["best_same"]),
            _number(entry["best_held_out"]),
        ]
        for entry in groups["groups"]
    ]
    rows.append(["all", str(run["questions"]), "-", _number(groups["best_same"]), _number(groups["best_held_out"])])
    header = [groups["field"], "questions", "best tag", "its accuracy", "chosen on the other half"]
    rule = "no votes, so the same under either rule; `all` weights groups by questions"
    return TableData(f"{run['name']}: best tag of each {groups['field']}", rule, header, rows)


def _rule(run: EvaluatedRun, rule: str) -> str:
    """With a word on questions that had to be left out of some figures."""
    if run["incomplete"] or any(entry["accuracy"]["questions"] != run["questions"] for entry in run["per_tag"]):
        rule += "; [n]: over n questions, the others lack samples for it"
    return f"{rule}; {ERROR}"


def _samples(run: EvaluatedRun) -> str:
    return f"{run['questions']} x {_span(run['samples_per_question'])}"


def _span(least_most: Sequence[int]) -> str:
    return "-".join(map(str, sorted(set(least_most))))


def _counted_span(least_most: Sequence[int], noun: str) -> str:
    return _span(least_most) + (f" {noun}" if set(least_most) == {1} else f" {noun}s")


def _pass_at(ours: OurFigures, k: int) -> MaybeEstimate:
    """pass@k by tag where there is one, else pooled."""
    return next((entry["stratified"] or entry["pooled"] for entry in ours["pass@k"] if entry["k"] == k), None)


def _cons_at(ours: OurFigures, k: int) -> MaybeEstimate:
    return next((entry["sets"] for entry in ours["cons@k"] if entry["k"] == k), None)


def _show(figure: MaybeEstimate, run: EvaluatedRun) -> str:
    if figure is None:
        return "-"
    error = "" if figure["stderr"] is None else f" ±{figure['stderr']:.3f}"
    left_out = "" if figure["questions"] == run["questions"] else f" [{figure['questions']}]"
    return f"{figure['value']:.3f}{error}{left_out}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
