"""The packed layout: a microbatch as one stream of tokens, in which what sequences have in common stands once.

The sequences `prompt + tag + completion` of a question form a tree: the prompt, under it the tags, under a tag its
completions. Each node stands once in the stream and is seen by all that follows from it, so its hidden states are
computed once; as no token sees anything but its own sequence, every sequence gets the likelihoods it would get
alone. The same for gradients: a shared node sums up those of its sequences.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megatron_ssft.records import (
    ForkingTokens,
    Microbatch,
    ModelInput,
    QuestionBatch,
    Segment,
    SequenceSpec,
    Size,
)


def stream_size(
    batch: QuestionBatch, sequences: Sequence[SequenceSpec], tags: ForkingTokens, share_prompt: bool = True
) -> Size:
    """Size of the sequences as one stream; PAD sequences are a token each."""
    if len(sequences) == 1:  # most streams of long traces
        return _alone(sequences[0])
    tokens = pairs = scored = 0
    nodes: set[tuple[int, int]] = set()
    for spec in sequences:
        alone = _alone(spec)
        tokens += alone.tokens
        pairs += alone.pairs
        scored += alone.scored
        if spec.is_pad or not share_prompt:
            continue
        prompt = len(batch.sets[spec.question].prompt_ids)
        shared = 0  # leading tokens that stand in the stream already
        if (spec.question, spec.tag) in nodes:
            shared = prompt + len(tags.ids[spec.tag])
        elif (spec.question, -1) in nodes:
            shared = prompt
        nodes.add((spec.question, -1))
        nodes.add((spec.question, spec.tag))
        tokens -= shared
        pairs -= shared * (shared + 1) // 2
    return Size(tokens, pairs, scored)


def _alone(spec: SequenceSpec) -> Size:
    return Size(spec.num_tokens, spec.num_tokens * (spec.num_tokens + 1) // 2, spec.num_scored)


def stream_microbatch(
    batch: QuestionBatch, sequences: Sequence[SequenceSpec], tags: ForkingTokens, share_prompt: bool = True
) -> Microbatch:
    """The sequences as a microbatch in the packed (or unshared) layout."""
    return Microbatch(tuple(sequences), stream_size(batch, sequences, tags, share_prompt))


def build_stream(
    batch: QuestionBatch,
    microbatch: Microbatch,
    tags: ForkingTokens,
    *,
    max_completion_tokens: int | None,
    train_forking_token: bool,
    loss_normalization: str,
    pad_to_multiple: int,
    share_prompt: bool = True,
) -> ModelInput:
    """A microbatch as one stream, [1, T].

    Positions count along each sequence, from its prompt. PAD sequences are a token without loss; T is filled up with
    such tokens to a multiple of `pad_to_multiple`. Arguments as in `collate`.
    """
    writer = _Writer()
    for owner, spec in enumerate(microbatch.sequences):
        if spec.is_pad:
            writer.node((), np.zeros(1, dtype=np.int32), key=("pad", owner))
            continue
        example, tag_ids = batch.sets[spec.question], np.asarray(tags.ids[spec.tag], dtype=np.int32)
        completion = example.completion_ids[spec.trace][:max_completion_tokens]
        prompt = len(example.prompt_ids)
        assert prompt + len(tag_ids) + len(completion) - 1 == spec.num_tokens, "plan and batch differ"
        own = () if share_prompt else (owner,)
        path = writer.node((), example.prompt_ids, key=("prompt", spec.question, *own))
        path = writer.node(path, tag_ids, key=("tag", spec.question, spec.tag, *own))
        path = writer.node(path, completion[:-1], key=("trace", owner))
        first = prompt if train_forking_token else prompt + len(tag_ids)
        targets = np.concatenate([tag_ids[max(0, first - prompt) :], completion])
        if first == 0:  # nothing predicts the first token of a sequence
            targets = targets[1:]
        writer.score(path, targets, owner, 1.0 / len(targets) if loss_normalization == "sequence" else 1.0)
    return writer.finish(pad_to_multiple)


class _Writer:
    """Lays nodes into a stream, each once, and turns them into segments."""

    def __init__(self) -> None:
        self.length = 0
        self.pieces: list[np.ndarray] = []
        self.positions: list[np.ndarray] = []
        self.places: dict[tuple, tuple[tuple[int, int], ...]] = {}  # node -> ranges from the root to it
        self.segments: list[Segment] = []
        self.places_scored: list[np.ndarray] = []
        self.scores: list[tuple[np.ndarray, int, float]] = []  # targets, owner, weight of each

    def node(self, path: tuple[tuple[int, int], ...], ids: np.ndarray, key: tuple) -> tuple[tuple[int, int], ...]:
        """Ranges from the root to this node, which is written if it is new; an empty node adds nothing."""
        if key in self.places:
            return self.places[key]
        if len(ids):
            self.segments.append(Segment(self.length, len(ids), path))
            depth = sum(length for _, length in path)
            self.pieces.append(ids)
            self.positions.append(np.arange(depth, depth + len(ids)))
            path = (*path, (self.length, len(ids)))
            self.length += len(ids)
        self.places[key] = path
        return path

    def score(self, path: tuple[tuple[int, int], ...], targets: np.ndarray, owner: int, weight: float) -> None:
        """Ask for `targets` at the last places of a sequence."""
        missing, places = len(targets), []
        for start, length in reversed(path):
            count = min(length, missing)
            places.append(np.arange(start + length - count, start + length))
            missing -= count
            if not missing:
                break
        self.places_scored += places[::-1]
        self.scores.append((targets, owner, weight))

    def finish(self, multiple: int) -> ModelInput:
        filling = -self.length % multiple
        if filling:
            self.node((), np.zeros(filling, dtype=np.int32), key=("filling",))
        counts = [len(targets) for targets, _, _ in self.scores]
        return ModelInput(
            tokens=_join(self.pieces)[None],
            position_ids=_join(self.positions)[None],
            scored=_join(self.places_scored),
            targets=_join([targets for targets, _, _ in self.scores]),
            weights=np.repeat(np.array([w for *_, w in self.scores], dtype=np.float32), counts),
            owner=np.repeat(np.array([owner for _, owner, _ in self.scores], dtype=np.int64), counts),
            segments=tuple(_joined_chains(self.segments)),
        )


def _join(arrays: list[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.zeros(0, dtype=np.int64), *arrays]).astype(np.int64)


def _joined_chains(segments: list[Segment]) -> list[Segment]:
    """Join a segment to the one whose end it directly follows, where that is its only context; attention is the same.

    A node is joined to its parent where it is the first of its children and stands right behind it. What else
    sees the parent is not affected, as contexts are ranges of the stream, not segments.
    """
    joined: list[Segment] = []
    for segment in segments:
        last = joined[-1] if joined else None
        follows = bool(segment.context) and sum(segment.context[-1]) == segment.start
        if follows and last is not None and last.start + last.length == segment.start:
            joined[-1] = Segment(last.start, last.length + segment.length, last.context)
        else:
            joined.append(segment)
    return joined
