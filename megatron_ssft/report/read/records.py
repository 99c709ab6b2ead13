"""Records of the evaluations that the report shows, with the names of their JSON files.

`@` in a key is `_at_` in a name. Keys that no picture needs are left out.
"""

from __future__ import annotations

import msgspec

from megatron_ssft.formats.rollouts import OWN_MODES


class Estimate(msgspec.Struct, frozen=True):
    """A mean over questions with its standard error."""

    value: float
    stderr: float | None
    questions: int


class PassEntry(msgspec.Struct, frozen=True):
    """pass@k for one k."""

    k: int
    pooled: Estimate | None
    stratified: Estimate | None


class ConsEntry(msgspec.Struct, frozen=True):
    """cons@k for one k."""

    k: int
    sets: Estimate | None


class OurFigures(msgspec.Struct, frozen=True, kw_only=True):
    """Figures under the project's own protocol."""

    rule: str
    pass_at_1: Estimate | None = msgspec.field(name="pass@1")
    pass_at_k: list[PassEntry] = msgspec.field(name="pass@k")
    cons_at_k: list[ConsEntry] = msgspec.field(name="cons@k")
    native_cons: Estimate | None
    native_votes: list[int] | None


class PublishedFigures(msgspec.Struct, frozen=True, kw_only=True):
    """Figures under the published protocol."""

    pass_tag: int | None
    pass_at_1: Estimate | None = msgspec.field(name="pass@1")
    native_cons: Estimate | None
    native_votes: list[int] | None
    cons_grouped: Estimate | None


class TokenCounts(msgspec.Struct, frozen=True):
    """Lengths of the samples under one tag, in tokens."""

    mean: float
    median: float


class TagFigures(msgspec.Struct, frozen=True):
    """Figures of the samples under one tag."""

    tag: int | None
    samples: int
    accuracy: Estimate
    tokens: TokenCounts
    truncated: float


class LengthHistogram(msgspec.Struct, frozen=True):
    """Counts of samples by length: a row per tag, a column per bin."""

    edges: list[float]
    counts: list[list[int]]


class Agreement(msgspec.Struct, frozen=True):
    """How often samples of two tags give the same answer: a row and a column per tag."""

    share: list[list[float | None]]
    chance_corrected: list[list[float | None]]


class BestTag(msgspec.Struct, frozen=True):
    """Accuracy under the best tag of each question."""

    oracle: Estimate | None
    other_samples: Estimate | None


class GroupFigures(msgspec.Struct, frozen=True):
    """Figures of one group of questions."""

    accuracy_N: list[float | None]


class Groups(msgspec.Struct, frozen=True):
    """The best tag of each group of questions."""

    field: str
    best_same: float | None
    best_held_out: float | None
    groups: list[GroupFigures]


class EvaluatedRun(msgspec.Struct, frozen=True):
    """Everything evaluation.json says of one run."""

    name: str
    questions: int
    samples: int
    sampling: dict[str, object]
    verifiers: list[str]
    tags: list[int | None]
    ours: OurFigures | None
    published: PublishedFigures | None
    per_tag: list[TagFigures]
    length_histogram: LengthHistogram
    agreement: Agreement
    best_tag: BestTag
    groups: Groups | None


class EvaluationRecord(msgspec.Struct, frozen=True):
    """evaluation.json."""

    answers: str
    runs: list[EvaluatedRun]
    source: dict[str, object] = msgspec.field(default_factory=dict)
    """The file's whole content, from which evaluation/tables.py makes its tables."""


def own_tags(run: EvaluatedRun) -> bool:
    """Whether the model chose the tags: each tag's accuracy is over other questions, so that tags do not compare."""
    return run.sampling.get("mode") in OWN_MODES


class PolicyWay(msgspec.Struct, frozen=True):
    """One way to choose the tag, with its accuracy before and after the training of the policy."""

    key: str
    name: str
    before: Estimate | None
    after: Estimate | None


class PolicyDifference(msgspec.Struct, frozen=True):
    """A paired difference between two ways."""

    key: str
    value: float
    stderr: float | None


class PolicyRecovery(msgspec.Struct, frozen=True):
    """Which share of the headroom over the best fixed tag the own choice recovers."""

    key: str
    name: str
    value: float | None
    stderr: float | None
    gain: float
    headroom: float


class SampleRanges(msgspec.Struct, frozen=True):
    """[least, most] samples of a question under a tag."""

    before: list[int]
    after: list[int]


class FixedTag(msgspec.Struct, frozen=True):
    """The tag of highest mean reward."""

    tag: int


class ChosenTags(msgspec.Struct, frozen=True):
    """Shares of the tags in one group of questions; `group` None: in all questions."""

    group: str | None
    share: list[float] | None


class PolicyChoices(msgspec.Struct, frozen=True):
    """Which tags one model chooses: shares over all questions, then over each group's."""

    source: str
    state: str
    groups: list[ChosenTags]


class PolicyEvaluation(msgspec.Struct, frozen=True):
    """policy_evaluation.json."""

    questions: int
    tags: list[int]
    samples_per_tag: SampleRanges
    fixed_tag: FixedTag
    group_by: str | None
    rows: list[PolicyWay]
    differences: list[PolicyDifference]
    headroom_recovered: list[PolicyRecovery]
    choices: list[PolicyChoices]
    remarks: list[str]
    source: dict[str, object] = msgspec.field(default_factory=dict)
    """The file's whole content, from which evaluation/policy_tables.py makes its tables."""
