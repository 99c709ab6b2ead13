"""evaluation.json: all figures of scored files, run by run.

null stands for whatever the samples do not allow; `ours` and `published` are null where they were not asked for. What a
figure means is said where it is computed: evaluation/metrics.py, voting.py, published_protocol.py. N is the number of
tags in use, B that of the histogram's bins.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, TypedDict

from msgspec import Meta

from megatron_ssft.formats.documents import read_document
from megatron_ssft.formats.jsonl import Count
from megatron_ssft.formats.rollouts import OWN_MODES

EVALUATION = "evaluation.json"
Stderr = Annotated[float, Meta(ge=0)]
Pair = Annotated[list[Count], Meta(min_length=2, max_length=2)]
"""[least, most]"""
TagList = list[Count | None]
"""0-based; null stands for samples in which the model wrote none."""
Shares = list[list[float | None]]
"""[N][N]"""


class EstimateRecord(TypedDict):
    """A mean over the questions that allow the figure, their number with it."""

    value: float
    stderr: Stderr | None
    """Null for a single question."""
    questions: Count


MaybeEstimate = EstimateRecord | None


class PassAtK(TypedDict):
    """pass@k for one k."""

    k: Count
    pooled: MaybeEstimate
    stratified: MaybeEstimate
    """The k samples spread over the tags."""


class ConsAtK(TypedDict):
    """cons@k for one k."""

    k: Count
    sets: MaybeEstimate
    """Mean over disjoint sets of k neighbours of the list interleaved by tag (own tags: in the order drawn)."""
    first_grouped: MaybeEstimate
    """One vote over the first k of the list grouped by tag."""
    first_interleaved: MaybeEstimate
    """One vote over the first k of the list interleaved by tag."""


OurFigures = TypedDict(
    "OurFigures",
    {
        "rule": str,
        "pass@1": MaybeEstimate,
        "pass@k": Annotated[list[PassAtK], Meta(min_length=1)],
        "native_cons": MaybeEstimate,
        "native_votes": Pair | None,
        "cons@k": Annotated[list[ConsAtK], Meta(min_length=1)],
    },
)
"""Figures under our rule. `native_votes`: how many votes the mean of `native_cons` is over."""

PublishedFigures = TypedDict(
    "PublishedFigures",
    {
        "rule": str,
        "pass_tag": Count | None,
        "pass@1": MaybeEstimate,
        "pass_samples": Pair,
        "native_cons": MaybeEstimate,
        "native_votes": Pair | None,
        "cons_grouped": MaybeEstimate,
        "cons_interleaved": MaybeEstimate,
    },
)
"""Figures under the published rule. `pass_tag` null: the model's own tags, then nothing but pass@1 is defined, or no
such tag, then pass@1 is null."""


class ComparedFigure(TypedDict):
    """A figure of the paper's evaluation code, and ours on the same samples."""

    metric: str
    """Its name there."""
    published: MaybeEstimate
    ours: MaybeEstimate
    why: str
    """Why the two differ."""


class LengthsRecord(TypedDict):
    """Tokens per sample."""

    mean: float
    median: float
    samples: Count


class TagFigures(TypedDict):
    """One tag; `truncated` and `no_answer` are shares of its samples."""

    tag: Count | None
    samples: Count
    accuracy: EstimateRecord
    tokens: LengthsRecord
    truncated: float
    no_answer: float


class LengthHistogram(TypedDict):
    """Tokens per sample; the edges are common to all runs."""

    edges: Annotated[list[Count], Meta(min_length=2)]
    """[B+1]"""
    counts: Annotated[list[Annotated[list[Count], Meta(min_length=1)]], Meta(min_length=1)]
    """[N][B]"""


class AgreementRecord(TypedDict):
    """Share of sample pairs of two tags with the same answer."""

    share: Shares
    chance_corrected: Shares


class BestTagOfQuestion(TypedDict):
    """The most accurate tags of one question."""

    id: str
    accuracy: list[float | None]
    """[N]"""
    best: TagList
    """Several where they tie."""


class BestTag(TypedDict):
    """The best tag of each question."""

    oracle: MaybeEstimate
    """Chosen and measured on the same samples."""
    other_samples: MaybeEstimate
    per_question: list[BestTagOfQuestion]


class GroupRecord(TypedDict):
    """The best tag within one group of questions."""

    group: str
    questions: Count
    accuracy_N: list[float | None]
    best_same: float | None
    best_held_out: float | None
    best: TagList


class Groups(TypedDict):
    """The best tag of each group of questions."""

    field: str
    best_same: float | None
    best_held_out: float | None
    groups: list[GroupRecord]


class EvaluatedRun(TypedDict):
    """One scored file."""

    name: str
    file: str
    model: str
    tokenizer: str
    sampling: dict[str, object]
    verifiers: list[str]
    questions: Count
    samples: Count
    samples_per_question: Pair
    tags: Annotated[TagList, Meta(min_length=1)]
    """[N]"""
    incomplete: list[str]
    """Ids of questions with fewer samples than others: under some tag, or in all where the model chose the tags."""
    ours: OurFigures | None
    published: PublishedFigures | None
    side_by_side: list[ComparedFigure] | None
    """Null where the published figures are."""
    per_tag: Annotated[list[TagFigures], Meta(min_length=1)]
    """[N]"""
    length_histogram: LengthHistogram
    agreement: AgreementRecord
    best_tag: BestTag
    groups: Groups | None
    verdicts: dict[str, Count]
    """Verdict -> samples."""


class EvaluationRecord(TypedDict):
    """The whole file."""

    protocol: str
    answers: str
    """How our votes compare answers."""
    group_by: str | None
    runs: Annotated[list[EvaluatedRun], Meta(min_length=1)]


def load_evaluation(folder: str | Path) -> EvaluationRecord:
    """Read `folder`/evaluation.json. Raises UserError."""
    return read_document(
        Path(folder) / EVALUATION,
        EvaluationRecord,
        _contradiction,
        unreadable="the evaluation; give the --output folder of megatron-ssft evaluate",
        program="megatron-ssft evaluate",
    )


def own_tags(run: EvaluatedRun) -> bool:
    """True where the model chose the tags: each tag's accuracy is then over other questions, so tags do not compare."""
    return run["sampling"].get("mode") in OWN_MODES


def _contradiction(record: EvaluationRecord) -> str | None:
    """A contradiction between parts that are each of the right shape; None without one."""
    first = record["runs"][0]
    problems = (_wrong_size(run) or _wrong_entries(run) or _unlike(run, first) for run in record["runs"])
    return next(filter(None, problems), None)


def _wrong_size(run: EvaluatedRun) -> str | None:
    """Lists that belong to the tags must be as long as those."""
    num_tags, bins = len(run["tags"]), len(run["length_histogram"]["edges"]) - 1
    square = [run["agreement"]["share"], run["agreement"]["chance_corrected"]]
    sizes = {
        "per_tag": [len(run["per_tag"])],
        "length_histogram.counts": [len(run["length_histogram"]["counts"])],
        "agreement": [len(table) for table in square] + [len(row) for table in square for row in table],
        "groups": [len(entry["accuracy_N"]) for entry in run["groups"]["groups"]] if run["groups"] else [],
    }
    for name, lengths in sizes.items():
        if any(length != num_tags for length in lengths):
            return f"{name} of run {run['name']!r} does not have an entry for each of its {num_tags} tags"
    if any(len(row) != bins for row in run["length_histogram"]["counts"]):
        return f"length_histogram of run {run['name']!r} does not have a count for each bin"
    return None


def _wrong_entries(run: EvaluatedRun) -> str | None:
    """Entries must be of the tags that they stand for."""
    if [entry["tag"] for entry in run["per_tag"]] != run["tags"]:
        return f"per_tag of run {run['name']!r} is not of its tags"
    for figures in (run["ours"], run["published"]):
        if figures and figures["native_cons"] and figures["native_votes"] is None:
            return f"run {run['name']!r} has a native_cons without native_votes"
    if run["published"] and own_tags(run) and run["published"]["pass_tag"] is not None:
        return f"run {run['name']!r} has a pass_tag though the model chose its tags"
    return None


def _unlike(run: EvaluatedRun, first: EvaluatedRun) -> str | None:
    """All runs must have the same parts and the same k."""
    for rule, own, other in (
        ("ours", run["ours"], first["ours"]),
        ("published", run["published"], first["published"]),
    ):
        if (own is None) != (other is None):
            return f"{rule!r} is there for some runs only"
    parts = [figures for figures in (run["ours"], first["ours"]) if figures is not None]
    ks = [[entry["k"] for entry in entries] for figures in parts for entries in (figures["pass@k"], figures["cons@k"])]
    if any(own != ks[0] for own in ks):
        return f"pass@k and cons@k of run {run['name']!r} are not of the same k as others"
    return None
