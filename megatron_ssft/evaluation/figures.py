"""All figures of scored files, as the document that evaluation.json holds (formats/evaluation.py has its schema)."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from megatron_ssft.errors import UserError
from megatron_ssft.evaluation import metrics, published_protocol, side_by_side, voting
from megatron_ssft.evaluation.metrics import estimate_record, number
from megatron_ssft.evaluation.scored_runs import Question, ScoredRun
from megatron_ssft.formats.evaluation import (
    BestTag,
    ComparedFigure,
    EvaluatedRun,
    EvaluationRecord,
    Groups,
    LengthsRecord,
    MaybeEstimate,
    OurFigures,
    PublishedFigures,
    TagFigures,
    TagList,
)

PROTOCOLS = ("ours", "published", "both")
OUR_RULE = "ours: ties by expectation, failed extractions do not vote"
Figure = Callable[["Votes"], float]


@dataclass(frozen=True)
class Options:
    """The user's wishes."""

    protocol: str = "both"
    """One of PROTOCOLS."""
    ks: tuple[int, ...] | None = None
    """k of pass@k and cons@k; None: powers of two and the numbers of tags, as far as the samples go."""
    answers: str = "string"
    """How our votes compare answers: `string`, or `math` by `equivalent`."""
    equivalent: voting.Equivalent | None = None
    judge: published_protocol.Judge = field(default_factory=published_protocol.Judge)
    """Labels and verdicts of the published rules."""
    pass_tag: int = 0
    """Tag of the published pass@1, 0-based; not for runs of one tag, nor where the model chose the tags."""
    group_by: str | None = None
    """Name of the field that `groups` come from."""
    groups: Mapping[str, str] | None = None
    """Question's id -> its group."""


@dataclass(frozen=True)
class Votes:
    """One question as the votes see it: answers, one string for all that mean the same, and verdicts."""

    question: Question
    answers: tuple[str | None, ...]
    """Of `question.pooled`."""
    answers_by_tag: tuple[tuple[str | None, ...], ...]

    @property
    def correct(self) -> list[bool]:
        return [row.correct for row in self.question.pooled]

    @property
    def correct_by_tag(self) -> list[list[bool]]:
        return [[row.correct for row in rows] for rows in self.question.by_tag]


def evaluate(runs: Sequence[ScoredRun], options: Options) -> EvaluationRecord:
    """Compute the figures of all runs. Raises UserError where a question has no group."""
    edges = metrics.histogram_edges(max(row.num_tokens for run in runs for row in run.rows))
    return {
        "protocol": options.protocol,
        "answers": options.answers,
        "group_by": options.group_by,
        "runs": [_evaluate_run(run, options, _ks(runs, options), edges) for run in runs],
    }


def _ks(runs: Sequence[ScoredRun], options: Options) -> list[int]:
    if options.ks is not None:
        return sorted(set(options.ks))
    most = max(len(question.pooled) for run in runs for question in run.questions)
    candidates = {2**i for i in range(most.bit_length())} | {len(run.tags) for run in runs}
    return sorted(k for k in candidates if k <= most)


def _evaluate_run(run: ScoredRun, options: Options, ks: Sequence[int], edges: list[int]) -> EvaluatedRun:
    votes = [_votes(question, options.equivalent) for question in run.questions]
    tag_lengths = [[row.num_tokens for row in run.rows if row.tag == tag] for tag in run.tags]
    agreement = metrics.agreement([own.answers_by_tag for own in votes])
    return {
        "name": run.name,
        "file": run.file,
        "model": run.rows[0].model,
        "tokenizer": run.rows[0].tokenizer,
        "sampling": dict(run.rows[0].sampling),
        "verifiers": sorted({row.verifier for row in run.rows}),
        "questions": len(run.questions),
        "samples": len(run.rows),
        "samples_per_question": _range(len(question.pooled) for question in run.questions),
        "tags": list(run.tags),
        "incomplete": _incomplete(run),
        "ours": None if options.protocol == "published" else _ours(run, votes, ks, options),
        "published": None if options.protocol == "ours" else _published(run, options),
        "side_by_side": None if options.protocol == "ours" else _side_by_side(run, votes, options),
        "per_tag": [_tag(run, place) for place in range(len(run.tags))],
        "length_histogram": {"edges": edges, "counts": [_histogram(tokens, edges) for tokens in tag_lengths]},
        "agreement": {"share": _table(agreement.share), "chance_corrected": _table(agreement.chance_corrected)},
        "best_tag": _best_tag(run),
        "groups": None if options.groups is None else _groups(run, options.groups, str(options.group_by)),
        "verdicts": dict(Counter(row.verdict for row in run.rows).most_common()),
    }


def _incomplete(run: ScoredRun) -> list[str]:
    """Ids of questions with too few samples. Where the model chose the tags, only a question's total can be too few."""
    sizes = [[len(q.pooled)] if run.own_tags else list(map(len, q.by_tag)) for q in run.questions]
    most = list(map(max, zip(*sizes)))
    return [question.id for question, own in zip(run.questions, sizes) if own != most]


def _votes(question: Question, equivalent: voting.Equivalent | None) -> Votes:
    """The alphabetically first of the answers that mean the same stands for all of them, in every question alike."""
    texts = sorted({row.answer for row in question.pooled if row.answer is not None})
    labels = voting.answer_labels(texts, equivalent)
    representative = {text: texts[label] for text, label in zip(texts, labels) if label is not None}

    def vote(answer: str | None) -> str | None:
        return None if answer is None else representative[answer]

    by_tag = tuple(tuple(vote(row.answer) for row in rows) for rows in question.by_tag)
    return Votes(question, tuple(vote(row.answer) for row in question.pooled), by_tag)


def _ours(run: ScoredRun, votes: Sequence[Votes], ks: Sequence[int], options: Options) -> OurFigures:
    """Figures over a set of tags only where the tags were ours to choose and there are several."""

    def mean(figure: Figure, tagged: bool = False) -> MaybeEstimate:
        if tagged and not _by_design(run):
            return None
        return estimate_record(metrics.estimate([figure(own) for own in votes]))

    return {
        "rule": f"{OUR_RULE}, answers compared as {options.answers}",
        "pass@1": mean(_pass(1)),
        "pass@k": [{"k": k, "pooled": mean(_pass(k)), "stratified": mean(_stratified(k), True)} for k in ks],
        "native_cons": mean(_native, True),
        "native_votes": _range(min(map(len, q.by_tag)) for q in run.questions) if _by_design(run) else None,
        "cons@k": [
            {
                "k": k,
                "sets": mean(_cons_sets(k)),
                "first_grouped": mean(_cons_first(k, grouped=True), True),
                "first_interleaved": mean(_cons_first(k)),
            }
            for k in ks
        ],
    }


def _by_design(run: ScoredRun) -> bool:
    return len(run.tags) > 1 and not run.own_tags


def _pass(k: int) -> Figure:
    return lambda own: metrics.pass_at_k(len(own.correct), sum(own.correct), k) if k <= len(own.correct) else math.nan


def _stratified(k: int) -> Figure:
    def figure(own: Votes) -> float:
        sizes = list(map(len, own.correct_by_tag))
        if -(-k // len(sizes)) > min(sizes):
            return math.nan
        return metrics.stratified_pass_at_k(sizes, list(map(sum, own.correct_by_tag)), k)

    return figure


def _native(own: Votes) -> float:
    return _mean(voting.native_cons(own.answers_by_tag, own.correct_by_tag, voting.majority_vote))


def _cons_sets(k: int) -> Figure:
    return lambda own: _mean(voting.cons_over_sets(own.answers, own.correct, k, voting.majority_vote))


def _cons_first(k: int, grouped: bool = False) -> Figure:
    def figure(own: Votes) -> float:
        answers: Sequence[str | None] = voting.grouped(own.answers_by_tag) if grouped else own.answers
        correct = voting.grouped(own.correct_by_tag) if grouped else own.correct
        return voting.cons_at_k(answers, correct, k, voting.majority_vote) if k <= len(answers) else math.nan

    return figure


def _published(run: ScoredRun, options: Options) -> PublishedFigures:
    """The protocol's figures; a file of one tag serves its pass@1 whatever the tag is."""
    place = 0 if len(run.tags) == 1 else run.tags.index(options.pass_tag) if options.pass_tag in run.tags else None
    place = None if run.own_tags else place
    judge = options.judge
    figures = []
    for question in run.questions:
        accepted = [[judge.accepts(row) for row in rows] for rows in question.by_tag]
        if run.own_tags:
            pooled = [judge.accepts(row) for row in question.pooled]
            figures.append(published_protocol.own_tag_figures(pooled))
            continue
        labels = [[judge.label(row) for row in rows] for rows in question.by_tag]
        winners = [[judge.accepts_winner(row) for row in rows] for rows in question.by_tag]
        of_question = published_protocol.published_figures(labels, accepted, pass_tag=place, winners_by_tag=winners)
        if any(None in own for own in labels):  # whole completions that the scores do not tell apart
            of_question = replace(of_question, native_cons=None, cons_grouped=None, cons_interleaved=None)
        figures.append(of_question)

    def mean(values: Iterable[float | None]) -> MaybeEstimate:
        return estimate_record(metrics.estimate([math.nan if value is None else value for value in values]))

    design = _by_design(run)
    return {
        "rule": judge.rule(run.rows[0].verifier),
        "pass_tag": None if place is None else run.tags[place],
        "pass@1": mean(figure.pass_at_1 for figure in figures),
        "pass_samples": _range(figure.pass_samples for figure in figures),
        "native_cons": mean(figure.native_cons for figure in figures) if design else None,
        "native_votes": _range(figure.native_votes for figure in figures) if design else None,
        "cons_grouped": mean(figure.cons_grouped for figure in figures),
        "cons_interleaved": mean(figure.cons_interleaved for figure in figures),
    }


def _side_by_side(run: ScoredRun, votes: Sequence[Votes], options: Options) -> list[ComparedFigure]:
    listed = []
    for own in votes:
        rows = own.question.pooled if run.own_tags else voting.grouped(own.question.by_tag)
        listed.append(side_by_side.Listed(rows, own.answers if run.own_tags else voting.grouped(own.answers_by_tag)))
    return side_by_side.compare(listed, None if run.own_tags else len(run.tags), options.judge)


def _tag(run: ScoredRun, place: int) -> TagFigures:
    rows = [row for row in run.rows if row.tag == run.tags[place]]
    accuracy = estimate_record(metrics.estimate([question.accuracy_N[place] for question in run.questions]))
    tokens = metrics.lengths([row.num_tokens for row in rows])
    assert accuracy is not None and tokens is not None, "a tag in use has samples"
    lengths: LengthsRecord = {"mean": tokens.mean, "median": tokens.median, "samples": tokens.samples}
    return {
        "tag": run.tags[place],
        "samples": len(rows),
        "accuracy": accuracy,
        "tokens": lengths,
        "truncated": _mean([row.truncated for row in rows]),
        "no_answer": _mean([row.answer is None for row in rows]),
    }


def _best_tag(run: ScoredRun) -> BestTag:
    complete = [question for question in run.questions if all(question.by_tag)]
    by_others = [[[row.correct for row in rows] for rows in question.by_tag] for question in complete]
    oracle = metrics.estimate([question.accuracy_N.max() for question in complete])
    other_samples = metrics.estimate([metrics.best_tag_by_other_samples(correct) for correct in by_others])
    return {
        "oracle": estimate_record(oracle),
        "other_samples": estimate_record(other_samples),
        "per_question": [
            {"id": q.id, "accuracy": _row(q.accuracy_N), "best": _best(run, q.accuracy_N)} for q in run.questions
        ],
    }


def _best(run: ScoredRun, accuracy_N: np.ndarray) -> TagList:
    return [tag for tag, value in zip(run.tags, accuracy_N) if value >= np.nanmax(accuracy_N) - 1e-12]


def _groups(run: ScoredRun, groups: Mapping[str, str], field: str) -> Groups:
    ids = [question.id for question in run.questions]
    missing = [id for id in ids if id not in groups]
    if missing:
        raise UserError(f"{run.file}: question {missing[0]!r} is not in --data; give the file it was generated from")
    accuracy_QN = np.array([question.accuracy_N for question in run.questions])
    figures = metrics.group_figures(accuracy_QN, ids, [groups[id] for id in ids])
    return {
        "field": field,
        "best_same": number(metrics.over_groups([figure.best_same for figure in figures], figures)),
        "best_held_out": number(metrics.over_groups([figure.best_held_out for figure in figures], figures)),
        "groups": [
            {
                "group": f.group,
                "questions": f.questions,
                "accuracy_N": _row(f.accuracy_N),
                "best_same": number(f.best_same),
                "best_held_out": number(f.best_held_out),
                "best": _best(run, f.accuracy_N),
            }
            for f in figures
        ],
    }


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if len(values) else math.nan


def _range(values: Iterable[int]) -> list[int]:
    """Least and most."""
    sizes = list(values)
    return [min(sizes), max(sizes)]


def _histogram(values: Sequence[int], edges: Sequence[int]) -> list[int]:
    return [int(count) for count in np.histogram(values, edges)[0]]


def _row(values: np.ndarray) -> list[float | None]:
    return [number(value) for value in values.tolist()]


def _table(values: np.ndarray) -> list[list[float | None]]:
    return [_row(row) for row in values]
