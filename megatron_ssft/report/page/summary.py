"""The top of the report: runs, model, data, g* with its reason, and the evaluation's main figures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import PurePath

import numpy as np

from megatron_ssft.evaluation.tables import OWN_PASS, counted
from megatron_ssft.formats.evaluation import EvaluatedRun, EvaluationRecord, MaybeEstimate, own_tags
from megatron_ssft.formats.policy_evaluation import PolicyEvaluationRecord
from megatron_ssft.matching.statistics import mutual_information_bits, tag_source_counts
from megatron_ssft.report.exhibits import Section, TableData, clean, join, number, tag_name
from megatron_ssft.report.figures.evaluation import BEST_TAG, common_k, votes_of
from megatron_ssft.report.figures.policy import run_sentence
from megatron_ssft.report.figures.policy_evaluation import evaluation_sentences
from megatron_ssft.report.read.policy_runs import PolicyRun
from megatron_ssft.report.read.run_facts import RunFacts
from megatron_ssft.report.read.runs import final_mean, gap_by_iteration


def summary_section(
    runs: Sequence[RunFacts],
    record: EvaluationRecord | None,
    policies: Sequence[PolicyRun] = (),
    policy_record: PolicyEvaluationRecord | None = None,
) -> Section:
    """Sentences on each run, and a table of what they were made with."""
    section = Section("summary", "Summary")
    if runs:
        section.tables.append(_facts_table(runs))
    for facts in runs:
        section.remarks += [_run_sentence(facts), _choice(facts)]
    if record is not None:
        k = common_k(record["runs"])
        section.remarks += [_evaluation_sentence(run, k) for run in record["runs"]]
        section.remarks += _accuracy_of_choice(runs, record)
    section.remarks += map(run_sentence, policies)
    section.remarks += evaluation_sentences(policy_record) if policy_record is not None else []
    return section


def _run_sentence(facts: RunFacts) -> str:
    metrics, name = facts.run.metrics, clean(facts.name)
    if not facts.steps:
        return f"{name} has not trained a step yet."
    gaps = gap_by_iteration(metrics)[1]
    text = f"{name}: {counted(facts.steps, 'step')}, training loss {number(final_mean(metrics['loss']))} nats per token"
    if len(gaps):
        text += f", matching gap {number(gaps[0])} nats per question at first and {number(final_mean(gaps))} in the end"
    bits = _bits(facts)
    return text + (f", mutual information between tag and source {bits} bits." if bits != "-" else ".")


def _bits(facts: RunFacts) -> str:
    """Mutual information between tag and source in the last complete epoch."""
    if facts.is_single or not facts.epochs:
        return "-"
    return f"{mutual_information_bits(tag_source_counts(facts.run.visits, facts.epochs[-1], facts.num_tags)[0]):.2f}"


def _choice(facts: RunFacts) -> str:
    """g* of the run, and why."""
    if not facts.ranking:
        return f"{clean(facts.name)} has no g*: {facts.why_no_choice}."
    best = facts.ranking[0]
    text = f"g* of {clean(facts.name)} is {tag_name(best.tag)}: {best.reason} (epoch {facts.epochs[-1] + 1})."
    if facts.matching in ("random", "fixed"):
        text += f" With {facts.matching} matching the tags were given out blindly, so this means nothing."
    return text


def _evaluation_sentence(run: EvaluatedRun, k: int) -> str:
    figures: list[tuple[str, MaybeEstimate]] = []
    if run["ours"]:
        marked = {BEST_TAG: f"{BEST_TAG} (chosen on the same samples)"}
        figures = [(marked.get(label, label), estimate) for label, estimate in votes_of(run, k)]
    elif run["published"]:
        figures = [
            (OWN_PASS if own_tags(run) else "pass@1", run["published"]["pass@1"]),
            ("native cons", run["published"]["native_cons"]),
            ("cons@32 grouped", run["published"]["cons_grouped"]),
        ]
    results = join(f"{label} {estimate['value']:.3f}" for label, estimate in figures if estimate is not None)
    questions = counted(run["questions"], "question")
    return f"Answers of {clean(run['name'])} to {questions}: {results or 'too few samples for any figure'}."


def _accuracy_of_choice(runs: Sequence[RunFacts], record: EvaluationRecord) -> list[str]:
    """How right g* is, where a training run and an evaluated one have the same name."""
    sentences = []
    evaluated = {run["name"]: run for run in record["runs"]}
    for facts in runs:
        if not facts.ranking or facts.name not in evaluated:
            continue
        choice = facts.ranking[0].tag
        accuracy = {entry["tag"]: entry["accuracy"]["value"] for entry in evaluated[facts.name]["per_tag"]}
        if choice not in accuracy:
            continue
        best = max(accuracy, key=lambda tag: accuracy[tag])
        comparison = "it is the most accurate tag"
        if best != choice:
            comparison = f"the most accurate tag, {tag_name(best)}, has {accuracy[best]:.3f}"
        sentences.append(
            f"Accuracy of g* of {clean(facts.name)}, {tag_name(choice)}: {accuracy[choice]:.3f}; {comparison}."
        )
    return sentences


def _facts_table(runs: Sequence[RunFacts]) -> TableData:
    rows = {
        "matching": [clean(f.matching or "-") for f in runs],
        "model": [_model(f) for f in runs],
        "tags": [_tags(f) for f in runs],
        "data": [_data(f) for f in runs],
        "traces per question": [_traces(f) for f in runs],
        "tokens compared (T_r)": [_setting(f, "matching_tokens") for f in runs],
        "traces per step": [_setting(f, "global_batch_size") for f in runs],
        "highest learning rate": [number(float(np.nanmax(f.run.metrics["lr"]))) if _has_lr(f) else "-" for f in runs],
        "steps": [f"{f.steps:,}" for f in runs],
        "epochs completed": [f"{len(f.epochs)}" if f.run.visits else "-" for f in runs],
        "loss at the end (nats per token)": [number(final_mean(f.run.metrics["loss"])) for f in runs],
        "matching gap at the end (nats per question)": [
            number(final_mean(gap_by_iteration(f.run.metrics)[1])) for f in runs
        ],
        "mutual information between tag and source (bits)": [_bits(f) for f in runs],
        "seconds in all": [number(float(np.nansum(f.run.metrics["seconds"]))) for f in runs],
    }
    title = "The runs"
    rule = "at the end: mean over the last 16 values; mutual information: in the last complete epoch"
    return TableData(
        title, ["", *(clean(f.name) for f in runs)], [[k, *v] for k, v in rows.items()], rule, numeric=False
    )


def _has_lr(facts: RunFacts) -> bool:
    return bool(np.isfinite(facts.run.metrics["lr"]).any())


def _setting(facts: RunFacts, key: str) -> str:
    return clean(facts.settings[key]) if facts.settings.get(key) is not None else "-"


def _model(facts: RunFacts) -> str:
    load = facts.settings.get("load")
    shape = [
        f"{_setting(facts, key)} {what}"
        for key, what in (("num_layers", "layers"), ("hidden_size", "wide"), ("num_attention_heads", "heads"))
        if key in facts.settings
    ]
    start = (
        f" from {clean(PurePath(load).name)}" if isinstance(load, str) and load != facts.settings.get("save") else ""
    )
    return (", ".join(shape) or "-") + start


def _tags(facts: RunFacts) -> str:
    kind = _setting(facts, "forking_token_format")
    return f"{facts.num_tags}" + (f", {kind}" if kind != "-" else "")


def _data(facts: RunFacts) -> str:
    """File names without their folders, which mean nothing elsewhere."""
    paths = facts.settings.get("data_path")
    names = [clean(PurePath(str(path)).name) for path in paths] if isinstance(paths, list) else []
    questions = f"{facts.num_questions:,} questions" if facts.num_questions is not None else ""
    return ": ".join(part for part in (", ".join(names), questions) if part) or "-"


def _traces(facts: RunFacts) -> str:
    sizes = sorted({len(visit.tags) for visit in facts.run.visits})
    return "-" if not sizes else f"{sizes[0]}" if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"
