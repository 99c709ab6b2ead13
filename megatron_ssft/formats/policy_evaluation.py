"""policy_evaluation.json: how well a model chooses its own tag, before and after its forking policy was trained.

null stands for what was not given or cannot be computed. N is the number of tags.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, TypedDict

from msgspec import Meta

from megatron_ssft.formats.documents import read_document
from megatron_ssft.formats.evaluation import EstimateRecord, MaybeEstimate, Pair, Stderr
from megatron_ssft.formats.jsonl import Count

POLICY_EVALUATION = "policy_evaluation.json"
State = Literal["before", "after"]
"""Of the policy's training."""
Source = Literal["policy", "own", "own_greedy"]
"""The policy itself, and samples that the model began by itself."""
STATES: tuple[State, State] = ("before", "after")


class FileRecord(TypedDict):
    """A scored file."""

    file: str
    model: str
    mode: str
    samples: Count
    samples_per_question: Pair


class RewardsRecord(TypedDict):
    """The rewards that g* is chosen on."""

    file: str
    model: str
    questions: Count


class SamplesPerTag(TypedDict):
    """Least and most samples per question and tag."""

    before: Pair
    after: Pair


class FixedTag(TypedDict):
    """g*: the tag of highest mean reward, the least of several."""

    tag: Count
    mean_reward: list[float]
    """[N]"""


class GroupTags(TypedDict):
    before: dict[str, list[Count]] | None
    rewards: dict[str, list[Count]] | None


"""Group -> tags that are best in it, several where they tie: by the held-out samples before, and by the rewards (null
without groups of their questions)."""


class RowRecord(TypedDict):
    """One way to choose the tag.

    Keys: own, own_greedy, expected, fixed, uniform, group, group_rewards, oracle, other_samples, grpo.
    """

    key: str
    name: str
    before: MaybeEstimate
    after: MaybeEstimate
    note: str


class Difference(EstimateRecord):
    """A paired difference, question by question."""

    key: str
    name: str


class Ratio(TypedDict):
    """value = gain / headroom, null where there is no headroom; the error is that of a ratio of two means."""

    key: str
    name: str
    value: float | None
    stderr: Stderr | None
    questions: Count
    gain: float
    headroom: float


class BeforeAfter(TypedDict):
    """One figure in both states."""

    before: MaybeEstimate
    after: MaybeEstimate


class PolicyFigures(TypedDict):
    """The policy itself; entropy in nats."""

    iterations: Pair
    """First and last."""
    entropy: BeforeAfter
    mass: BeforeAfter


class ChoiceOfGroup(TypedDict):
    """Shares of the tags chosen within a group of questions; group null is all questions."""

    group: str | None
    questions: Count
    share: list[float] | None
    """[N], sums to 1 over the tags; null if none was ever written."""
    outside: float
    """Share of no tag."""


class Choice(TypedDict):
    """Tags that one source chooses; the first group is all questions."""

    source: Source
    state: State
    groups: list[ChoiceOfGroup]


class PolicyEvaluationRecord(TypedDict):
    """The whole file."""

    files: dict[str, FileRecord]
    """By role: before, after, own, own_greedy, ..."""
    rewards: RewardsRecord
    questions: Count
    tags: Annotated[list[Count], Meta(min_length=1)]
    """[N], 0-based."""
    samples_per_tag: SamplesPerTag
    fixed_tag: FixedTag
    group_by: str | None
    """Name of the field."""
    group_tags: GroupTags | None
    rows: Annotated[list[RowRecord], Meta(min_length=1)]
    differences: list[Difference]
    headroom_recovered: list[Ratio]
    policy: PolicyFigures | None
    choices: list[Choice]
    groups: dict[str, str] | None
    """Question's id -> its group."""
    remarks: list[str]
    """Sentences."""


def load_policy_evaluation(folder: str | Path) -> PolicyEvaluationRecord:
    """Read `folder`/policy_evaluation.json. Raises UserError."""
    return read_document(
        Path(folder) / POLICY_EVALUATION,
        PolicyEvaluationRecord,
        _contradiction,
        unreadable="it; give the --output folder made with megatron-ssft evaluate-policy",
        program="megatron-ssft evaluate-policy",
    )


def _contradiction(record: PolicyEvaluationRecord) -> str | None:
    """A contradiction between parts that are each of the right shape; None without one."""
    of = {(entry["source"], entry["state"]): entry["groups"] for entry in record["choices"]}
    names = [[group["group"] for group in groups] for groups in of.values()]
    if any(own != names[0] or own[:1] != [None] for own in names) or len(of) != len(record["choices"]):
        return "the choices are not all of the same groups"
    shares = [group["share"] for groups in of.values() for group in groups]
    if any(share is not None and len(share) != len(record["tags"]) for share in shares):
        return "the choices are not of the tags"
    return None
