"""Plain records that travel between the layers. No logic beyond sizes and validation.

Shape legend used throughout: Q questions, N forking tokens (tags), M traces of one question, S sequences,
b micro-batch size, s padded sequence length, T tokens, R data-parallel ranks, K microbatches per rank.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Literal, NotRequired, TypeAlias, TypedDict

import numpy as np


@dataclass(frozen=True)
class Trace:
    """One reasoning trace of a question, as it stands in the JSONL file."""

    text: str
    """The reasoning."""
    source: str | None = None
    """Which teacher wrote it. Used for reports only; the model never sees it."""
    correct: bool | None = None
    """Whether its final answer is right, where known."""
    answer: str | None = None
    """Final response that follows the reasoning in the completion, where the data keeps it apart."""


Json: TypeAlias = "None | bool | int | float | str | list[Json] | dict[str, Json]"
"""A value that JSON can spell."""


class Message(TypedDict):
    """A turn of a conversation, as chat templates take it."""

    role: str
    content: NotRequired[str]
    """Absent in a turn that only calls tools."""
    reasoning_content: NotRequired[str]
    """What an assistant thought before it answered."""
    tool_calls: NotRequired[list[Json]]
    tool_call_id: NotRequired[str]
    name: NotRequired[str]


@dataclass(frozen=True)
class SetExample:
    """One validated JSONL row: a question and its set of traces."""

    id: str
    file: str
    line: int
    """1-based line in `file`."""
    traces: tuple[Trace, ...]
    prompt: str | None = None
    """Prompt text to be used verbatim, without the chat template."""
    messages: tuple[Message, ...] | None = None
    """Chat turns to be rendered by the chat template; a `question` becomes one user turn."""
    tools: tuple[Json, ...] | None = None
    """Descriptions of tools, for the chat template."""
    answer: str | None = None
    """Gold answer, for verifiers; never trained on."""


@dataclass(frozen=True)
class TokenizedSet:
    """One question in token ids. The tag is not part of it: which tag a trace gets is decided every step."""

    id: str
    file: str
    line: int
    prompt_ids: np.ndarray
    """int32 [P]: up to and including the generation prompt; the tag follows."""
    completion_ids: tuple[np.ndarray, ...]
    """M arrays int32 [L_j]: trace, answer where given, end-of-turn token (absent where truncated)."""
    sources: tuple[str | None, ...]
    """M teacher names, for reports."""
    truncated: int = 0
    """How many of the traces lost their end to --seq-length."""

    @property
    def num_traces(self) -> int:
        return len(self.completion_ids)

    @property
    def where(self) -> str:
        """`file:line`, to lead an error message."""
        return f"{self.file}:{self.line}"


@dataclass(frozen=True)
class ForkingTokens:
    """The N tags as token-id sequences. Everything downstream works from `ids`."""

    strings: tuple[str, ...]
    """N texts, e.g. `<think1>`."""
    ids: tuple[tuple[int, ...], ...]
    """N id sequences: length 1 each for `special`, any length for `text`."""
    format: str
    """`special` (one vocabulary entry each) or `text` (ordinary tokens)."""

    @property
    def num_tags(self) -> int:
        return len(self.ids)

    @property
    def row_ids(self) -> tuple[int, ...]:
        """The N vocabulary rows owned by the tags; empty for `text`, which shares ordinary tokens."""
        return tuple(ids[0] for ids in self.ids) if self.format == "special" else ()


@dataclass(frozen=True)
class QuestionVisit:
    """One use of a question: which one, and in which pass over the data."""

    index: int
    """Position in the data set."""
    epoch: int
    """0-based."""


@dataclass(frozen=True)
class QuestionBatch:
    """The questions of one optimizer step, in the order the queue gave them out."""

    visits: tuple[QuestionVisit, ...]
    sets: tuple[TokenizedSet, ...]

    @property
    def num_traces(self) -> int:
        return sum(s.num_traces for s in self.sets)


@dataclass(frozen=True)
class Assignment:
    """Which tag each trace of one question is trained under.

    `tags[j]` is the 0-based tag of trace j. `cost_NM` is float64 [N, M], the mean NLL of trace j's first T_r
    tokens under tag i (paper, section 2.2), or None where it was not evaluated.
    """

    tags: tuple[int, ...]
    cost_NM: np.ndarray | None = None

    @property
    def cost(self) -> float | None:
        """Total cost in nats, summed over the traces."""
        if self.cost_NM is None:
            return None
        return float(sum(self.cost_NM[i, j] for j, i in enumerate(self.tags)))


@dataclass(frozen=True)
class SequenceSpec:
    """One sequence `prompt + tag + completion` by reference into a QuestionBatch."""

    question: int
    """Position in the batch; -1 for a PAD sequence."""
    trace: int
    tag: int
    num_tokens: int
    """Tokens fed to the model where it stands alone (the last target is not an input)."""
    num_scored: int
    """Completion tokens whose negative log-likelihood is asked for."""

    @property
    def is_pad(self) -> bool:
        return self.question < 0


PAD = SequenceSpec(question=-1, trace=-1, tag=-1, num_tokens=1, num_scored=0)
"""A sequence without loss weight that only fills a microbatch, of the least possible length."""


@dataclass(frozen=True)
class Size:
    """What a forward pass of the whole model has to do, in counts. Sizes add up."""

    tokens: int
    """Tokens that go through the layers."""
    pairs: int
    """Pairs (query token, key token it may see) in core attention."""
    scored: int
    """Positions that go through the output head."""

    def __add__(self, other: Size) -> Size:
        return Size(self.tokens + other.tokens, self.pairs + other.pairs, self.scored + other.scored)


@dataclass(frozen=True)
class Microbatch:
    """Sequences that go through the pipeline together. How they stand in it is the plan's `layout`."""

    sequences: tuple[SequenceSpec, ...]
    size: Size
    """Of the whole microbatch in that layout, padding included."""


PlanLayout = Literal["padded", "packed", "unshared"]
"""How the sequences of a microbatch stand in the model's input.

`padded`: one sequence per row, filled up to the longest. `packed`: one token stream, in which sequences of a question
share its prompt. `unshared`: one token stream, every sequence with a prompt of its own."""


@dataclass(frozen=True)
class MicrobatchPlan:
    """Who runs what: `ranks[r][k]` is microbatch k of data-parallel rank r.

    A plan is plain data, the same on every rank; an engine executes it without further decisions.
    """

    ranks: tuple[tuple[Microbatch, ...], ...]
    pad_sequences: int
    """PAD sequences in the plan."""
    pad_lower_bound: int
    """No plan of this layout and these counts has fewer; see `scheduling.pad_bound`."""
    makespan: float
    """Estimated work of the busiest rank, in FLOPs of a forward pass."""
    makespan_lower_bound: float
    """No plan can have a smaller makespan: max(total work / R, heaviest part that cannot be divided)."""
    layout: PlanLayout = "padded"
    idle_share: float = 0.0
    """Estimated share of the pipeline stages' time, on all ranks, in which they wait for each other (the bubble) or for
    the rank that takes longest; 0 without pipeline stages."""

    @property
    def sequences(self) -> list[SequenceSpec]:
        """Every non-PAD sequence, rank by rank."""
        return [s for rank in self.ranks for mb in rank for s in mb.sequences if not s.is_pad]

    @property
    def size(self) -> Size:
        """Sum over all microbatches of all ranks."""
        return sum((mb.size for rank in self.ranks for mb in rank), Size(0, 0, 0))


@dataclass(frozen=True)
class SequenceCut:
    """Which tokens of `prompt + tag + completion` are scored, and how they weigh."""

    max_completion_tokens: int | None = None
    """Completions are cut to their first this many tokens (T_r in the cost pass); None: whole."""
    train_forking_token: bool = False
    """Score the tag's own tokens too."""
    loss_normalization: str = "token"
    """`token`: weight 1 for every scored token; `sequence`: 1 / the number of scored tokens of the sequence."""


WHOLE = SequenceCut()
"""Whole completions are scored, and nothing else."""


@dataclass(frozen=True)
class PlannedBatch:
    """Sequences of a batch, where each of them runs, and how it is cut: all that an engine needs to execute them."""

    batch: QuestionBatch
    plan: MicrobatchPlan
    tags: ForkingTokens
    """What stands between a prompt and its completions."""
    cut: SequenceCut = WHOLE
    scored_as: tuple[tuple[int, ...], ...] | None = None
    """Cost pass only. Q tuples of M traces: the trace that is scored in the place of each, the first of those that are
    alike in their first T_r tokens."""


@dataclass(frozen=True)
class TokenArrays:
    """One microbatch in the padded layout, all of shape [b, s].

    Position, target and weight stand explicitly at every token; nothing is inferred from padding.
    """

    tokens: np.ndarray
    """int64"""
    position_ids: np.ndarray
    """int64"""
    targets: np.ndarray
    """int64; 0 where the weight is 0"""
    weights: np.ndarray
    """float32: loss weight of the target; 0 for prompt, tag (unless trained) and padding"""


@dataclass(frozen=True)
class Segment:
    """A run of tokens of a stream. Each sees itself, what stands before it in the segment, and all of `context`."""

    start: int
    """Place of its first token in the stream."""
    length: int
    context: tuple[tuple[int, int], ...]
    """Ranges (start, length) of the stream, in order of position: what precedes the segment in its sequences."""

    @functools.cached_property
    def num_context(self) -> int:
        return sum(length for _, length in self.context)

    @property
    def pairs(self) -> int:
        """Pairs of query and key."""
        return self.length * self.num_context + self.length * (self.length + 1) // 2


@dataclass(frozen=True)
class ModelInput:
    """What a forward pass needs and nothing else, whatever the layout; n scored targets.

    A place may be scored more than once: the first tokens of all traces of one tag follow the same token.
    """

    tokens: np.ndarray
    """int64 [b, s]"""
    position_ids: np.ndarray
    """int64 [b, s]"""
    scored: np.ndarray
    """int64 [n]: where the scored tokens stand, in sequence-major order (s index * b + b index)"""
    targets: np.ndarray
    """int64 [n], or [n, k]: several tokens of interest at each place"""
    weights: np.ndarray
    """float32 [n], all greater than 0: loss weights of ordinary training"""
    owner: np.ndarray
    """int64 [n]: which sequence of the microbatch the target belongs to"""
    segments: tuple[Segment, ...] | None
    """Who sees whom in a stream (b = 1); None: every row is causal."""


NO_TAG = ForkingTokens(strings=("",), ids=((),), format="text")
"""For sequences without a tag between prompt and completion, such as a prompt followed by the tag itself."""


@dataclass
class StepMetrics:
    """What one optimizer step reports; the same on every rank."""

    loss: float
    grad_norm: float
    trained_sequences: int
    trained_tokens: int
    """Scored places."""
    figures: dict[str, float] = field(default_factory=dict)
    """What the loss terms report besides, summed over the step."""
