"""The record of a policy's evaluation as tables for people, at most 100 columns wide."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_ssft.evaluation.tables import ERROR, TableData, tag_name
from megatron_ssft.formats.evaluation import MaybeEstimate
from megatron_ssft.formats.policy_evaluation import STATES, Choice, ChoiceOfGroup, Difference, PolicyEvaluationRecord

_SOURCES = {"policy": "policy", "own": "samples", "own_greedy": "greedy samples"}
MOST_NAMED = 3
"""Tags named in a cell."""


def policy_tables(record: PolicyEvaluationRecord) -> list[TableData]:
    """Accuracy before and after, what is gained, what is chosen."""
    tables = [accuracy_table(record), difference_table(record)]
    return tables + ([choice_table(record)] if record["choices"] else [])


def accuracy_table(record: PolicyEvaluationRecord) -> TableData:
    """A row for every way to choose the tag."""
    rows = [[row["name"], *(show(row[state]) for state in STATES), row["note"]] for row in record["rows"]]
    rule = f"share of correct samples, mean over {record['questions']:,} held-out questions; {ERROR}; a tag chosen on "
    rule += "the samples that it is measured on has too good a figure, one chosen on half of them rather too low a one"
    return TableData("Choosing the tag", rule, ["tag", *STATES, "chosen"], rows)


def difference_table(record: PolicyEvaluationRecord) -> TableData:
    """Paired differences and the headroom recovered."""
    rows = [[entry["name"], show(entry, signed=True), ""] for entry in record["differences"]]
    for ratio in record["headroom_recovered"]:
        parts = f"{ratio['gain']:+.3f} of {ratio['headroom']:+.3f}"
        value = f"{ratio['value']:.0%}" if ratio["value"] is not None else "no headroom"
        error = f" ±{ratio['stderr']:.0%}" if ratio["stderr"] is not None else ""
        rows.append([f"recovered {ratio['name']}", value + error, parts])
    rule = "of the model after, unless it says before; question by question, ± standard error of the paired differences"
    if record["headroom_recovered"]:
        rule += f"; recovered: (own choice after - g*) / (best tag per {record['group_by']} - g*)"
    return TableData("What the choice is worth", rule, ["difference", "value", "of which"], rows)


def choice_table(record: PolicyEvaluationRecord) -> TableData:
    """The tags chosen most; of the first source by group as well, where there are groups."""
    rows = []
    states: dict[str, dict[str, Choice]] = {}
    for entry in record["choices"]:
        states.setdefault(entry["source"], {})[entry["state"]] = entry
    for source, of in states.items():
        groups = next(iter(of.values()))["groups"]
        for place, group in enumerate(groups if source == next(iter(states)) else groups[:1]):
            cells = [_chosen(of[s]["groups"][place], record["tags"]) if s in of else "-" for s in STATES]
            name = "all" if group["group"] is None else group["group"]
            rows.append([_SOURCES[source], name, str(group["questions"]), *cells])
    rule = "shares among the tags; 'none': share of the answers, or of the probability, without any tag"
    return TableData("What is chosen", rule, ["from", record["group_by"] or "questions", "n", *STATES], rows)


def _chosen(group: ChoiceOfGroup, tags: Sequence[int]) -> str:
    """`<think1> 60%, <think3> 30%, none 1%`."""
    share = group["share"] or []
    order = sorted(range(len(share)), key=lambda i: (-share[i], i))[:MOST_NAMED]
    names = [f"{tag_name(tags[i])} {share[i]:.0%}" for i in order if share[i] >= 0.005]
    return ", ".join([*names, f"none {group['outside']:.1%}"])


def show(figure: MaybeEstimate | Difference, signed: bool = False) -> str:
    """`0.512 ±0.020`, or `-`."""
    if figure is None:
        return "-"
    error = "" if figure["stderr"] is None else f" ±{figure['stderr']:.3f}"
    return (f"{figure['value']:+.3f}" if signed else f"{figure['value']:.3f}") + error
