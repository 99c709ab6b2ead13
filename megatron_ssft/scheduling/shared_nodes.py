"""Shared nodes: tokens and work of the prompts and tags that sequences of a token stream have in common.

A stream holds the prompt of a question once and each of its tags once, so the size of a stream is the sum over the
distinct nodes in it and what a sequence adds depends on what stands there already. Planners move sequences about by
these sums and never count a stream anew.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_ssft.records import ForkingTokens, QuestionBatch, SequenceSpec
from megatron_ssft.scheduling.balance import UNITS
from megatron_ssft.scheduling.work import WorkModel

OPEN_PARTS = 32
"""Parts or streams of a question into which the next of its items may go: the latest, so that planning stays linear."""


@dataclass(frozen=True)
class StreamNodes:
    """The three nodes of each of S sequences; work in integer units, `UNITS` for all of them; arrays int64 [S].

    Without sharing, prompt and tag belong to the sequence's own node.
    """

    question: np.ndarray
    tag: np.ndarray
    prompt_tokens: np.ndarray
    tag_tokens: np.ndarray
    own_tokens: np.ndarray
    prompt_work: np.ndarray
    tag_work: np.ndarray
    own_work: np.ndarray
    flops_per_unit: float

    @property
    def alone_tokens(self) -> np.ndarray:
        """Tokens of each sequence as a stream of its own."""
        return self.prompt_tokens + self.tag_tokens + self.own_tokens

    @property
    def alone_work(self) -> np.ndarray:
        """Work of each sequence as a stream of its own."""
        return self.prompt_work + self.tag_work + self.own_work

    @property
    def shared_once(self) -> int:
        """Work with every prompt and every tag of a question once: less than any plan has."""
        _, prompts = np.unique(self.question, return_index=True)
        tagged = self.question * (int(self.tag.max()) + 1) + self.tag
        _, tags = np.unique(tagged, return_index=True)
        return int(self.own_work.sum() + self.prompt_work[prompts].sum() + self.tag_work[tags].sum())


def stream_nodes(
    batch: QuestionBatch, sequences: Sequence[SequenceSpec], tags: ForkingTokens, work: WorkModel, share_prompt: bool
) -> StreamNodes:
    """Nodes of sequences without PADs, in their order."""
    question, tag, length, scored = (
        np.array([getattr(s, name) for s in sequences], dtype=np.int64)
        for name in ("question", "tag", "num_tokens", "num_scored")
    )
    prompt = np.array([len(example.prompt_ids) for example in batch.sets], dtype=np.int64)[question]
    tagged = prompt + np.array([len(ids) for ids in tags.ids], dtype=np.int64)[tag]
    if not share_prompt:
        prompt, tagged = np.zeros_like(prompt), np.zeros_like(tagged)

    def flops(start: np.ndarray, end: np.ndarray) -> np.ndarray:
        return work.token * (end - start) + work.pair * ((end * (end + 1) - start * (start + 1)) // 2)

    prompt_work, tag_work = flops(np.zeros_like(prompt), prompt), flops(prompt, tagged)
    own_work = flops(tagged, length) + work.scored * scored
    total = math.fsum((prompt_work + tag_work + own_work).tolist())
    scale = UNITS / total if total > 0 else 1.0

    def in_units(part: np.ndarray) -> np.ndarray:
        return np.rint(part * scale).astype(np.int64)

    return StreamNodes(
        question,
        tag,
        prompt_tokens=prompt,
        tag_tokens=tagged - prompt,
        own_tokens=length - tagged,
        prompt_work=in_units(prompt_work),
        tag_work=in_units(tag_work),
        own_work=in_units(own_work),
        flops_per_unit=1 / scale,
    )


@dataclass(frozen=True)
class ItemNodes:
    """StreamNodes as lists, for planners that take one sequence at a time. Positions are called items."""

    question: list[int]
    tag: list[int]
    prompt_tokens: list[int]
    tag_tokens: list[int]
    own_tokens: list[int]
    prompt_work: list[int]
    tag_work: list[int]
    own_work: list[int]
    alone_tokens: list[int]
    alone_work: list[int]

    @classmethod
    def of(cls, nodes: StreamNodes) -> ItemNodes:
        return cls(**{name: getattr(nodes, name).tolist() for name in cls.__dataclass_fields__})

    def work(self, items: Sequence[int]) -> int:
        """Work of a stream of these items."""
        if len(items) == 1:
            return self.alone_work[items[0]]
        return self._sum(items, self.prompt_work, self.tag_work, self.own_work)

    def tokens(self, items: Sequence[int]) -> int:
        """Tokens of a stream of these items."""
        return self._sum(items, self.prompt_tokens, self.tag_tokens, self.own_tokens)

    def _sum(self, items: Sequence[int], prompt: list[int], tag: list[int], own: list[int]) -> int:
        """Every item's own, with the prompt of each question and each of its tags once."""
        total = 0
        seen: set[tuple[int, int]] = set()
        for item in items:
            question = self.question[item]
            total += own[item]
            if (question, -1) not in seen:
                seen.add((question, -1))
                total += prompt[item]
            if (question, self.tag[item]) not in seen:
                seen.add((question, self.tag[item]))
                total += tag[item]
        return total


class Part:
    """Sequences of one question that are to stand in one stream, with their size."""

    __slots__ = ("items", "nodes", "question", "tags", "tokens", "work")

    def __init__(self, nodes: ItemNodes, item: int) -> None:
        self.nodes = nodes
        self.question = nodes.question[item]
        self.items = [item]
        self.tags = {nodes.tag[item]: 1}
        self.tokens = nodes.alone_tokens[item]
        self.work = nodes.alone_work[item]

    def added_tokens(self, item: int) -> int:
        """Tokens that another item of the question would add."""
        nodes = self.nodes
        return nodes.own_tokens[item] + (0 if nodes.tag[item] in self.tags else nodes.tag_tokens[item])

    def joined_tokens(self, other: Part) -> int:
        """Tokens together with another part of the question."""
        nodes = self.nodes
        both = {nodes.tag[item]: nodes.tag_tokens[item] for item in other.items if nodes.tag[item] in self.tags}
        return self.tokens + other.tokens - nodes.prompt_tokens[self.items[0]] - sum(both.values())

    def own_gain(self, item: int) -> int:
        """Work that goes away with one of several items."""
        nodes = self.nodes
        return nodes.own_work[item] + (nodes.tag_work[item] if self.tags[nodes.tag[item]] == 1 else 0)

    def add(self, item: int) -> None:
        """Take in another item of the question."""
        nodes, tag = self.nodes, self.nodes.tag[item]
        self.tokens += nodes.own_tokens[item]
        self.work += nodes.own_work[item]
        if tag not in self.tags:
            self.tags[tag] = 0
            self.tokens += nodes.tag_tokens[item]
            self.work += nodes.tag_work[item]
        self.tags[tag] += 1
        self.items.append(item)

    def remove(self, item: int) -> None:
        """Give away one of several items."""
        nodes, tag = self.nodes, self.nodes.tag[item]
        self.items.remove(item)
        self.tokens -= nodes.own_tokens[item]
        self.work -= nodes.own_work[item]
        self.tags[tag] -= 1
        if self.tags[tag] == 0:
            del self.tags[tag]
            self.tokens -= nodes.tag_tokens[item]
            self.work -= nodes.tag_work[item]


def question_parts(nodes: ItemNodes, max_tokens: int, max_work: int) -> list[Part]:
    """Each question in as few parts within both limits as first-fit finds; a part of one item may exceed them.

    Items have to be sorted, longest first.
    """
    parts_of: dict[int, list[Part]] = {}
    for item, question in enumerate(nodes.question):
        parts = parts_of.setdefault(question, [])
        for part in parts[-OPEN_PARTS:]:
            if part.tokens + part.added_tokens(item) <= max_tokens and part.work + nodes.own_work[item] <= max_work:
                part.add(item)
                break
        else:
            parts.append(Part(nodes, item))
    return [part for question in sorted(parts_of) for part in parts_of[question]]
