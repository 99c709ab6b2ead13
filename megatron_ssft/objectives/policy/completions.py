"""Stored completions for policy learning: a rollout file, its scores, and where they fit the questions.

A rollout file may be much larger than memory. It is read twice: first for what there is (`Place`), all of it checked;
then, when it is known which completions a run takes, for the token ids of these.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from megatron_ssft.errors import UserError
from megatron_ssft.formats.rollouts import (
    OWN_MODES,
    Rollout,
    Sample,
    differences,
    mark,
    read_rollouts,
    read_scored,
    sample_origin,
)
from megatron_ssft.records import TokenizedSet
from megatron_ssft.tokenizers.vocabulary import Vocabulary


@dataclass(frozen=True)
class Completion:
    """One stored completion."""

    question: int
    """Position among the questions."""
    tag: int
    """0-based; 0 for a model without tags."""
    ids: np.ndarray
    """int32 [L], the stop token included."""
    reward: float
    """grpo: 1 if its answer is right, else 0."""
    truncated: bool = False
    """It ended at its token limit."""


class Place(NamedTuple):
    """Which completion it is. In this order completions are numbered, whatever their order in the file."""

    question: int
    """Position among the questions."""
    tag: int
    """0-based; 0 for a completion without tag."""
    sample: int


class _Made(NamedTuple):
    """How a completion was made, as far as its score says it too."""

    seed: int
    tokens: int
    finish_reason: str
    prompt: str | None

    def differs(self, other: _Made) -> bool:
        """Prompts are compared where both are known."""
        prompts = {self.prompt, other.prompt} - {None}
        return self[:3] != other[:3] or len(prompts) > 1


class StoredCompletions:
    """A rollout file, as far as it is about the given questions."""

    path: Path
    places: list[Place]
    """Completions that can be trained on, ascending."""
    left_out: int
    """Completions without tokens."""
    unmarked: int
    """Completions that do not say from which prompt they were made."""
    truncated: set[Place]
    """Completions that ended at their token limit."""
    tagged: bool
    """Whether completions follow a tag."""
    model: str
    """Fingerprint of the model that made them."""

    def __init__(self, path: Path, questions: Sequence[TokenizedSet], vocabulary: Vocabulary, seq_length: int) -> None:
        """Read and check everything but keep no tokens. Raises UserError."""
        self.path, self._vocabulary = path, vocabulary
        self._number = {question.id: i for i, question in enumerate(questions)}
        marks = [mark(question.prompt_ids.tolist()) for question in questions]
        self.places, self.left_out, self.unmarked, self.truncated = [], 0, 0, set()
        self._made: dict[Place, _Made] = {}
        longest, first = 0, None
        for rollout in read_rollouts(path):
            if first is None:  # the others are of the same origin
                first = rollout
                self._set_origin(first)
            number = self._number.get(rollout.id)
            if number is None:
                continue
            if not rollout.token_ids:
                self.left_out += 1
                continue
            self._check(rollout, marks[number])
            place = self._place(rollout)
            tag_ids = vocabulary.tags.ids[place.tag] if self.tagged else ()
            longest = max(longest, len(questions[number].prompt_ids) + len(tag_ids) + len(rollout.token_ids))
            self.places.append(place)
            self.unmarked += rollout.prompt is None
            self._made[place] = _Made(rollout.seed, len(rollout.token_ids), rollout.finish_reason, rollout.prompt)
            if rollout.finish_reason == "length":
                self.truncated.add(place)
        if not self.places:
            raise UserError(f"{path}: holds no completion of the questions to train on; give the file made from --data")
        if longest > seq_length:
            raise UserError(
                f"{path}: its longest completion needs --seq-length {longest}, not {seq_length}; raise it, or generate "
                "with fewer --max-new-tokens"
            )
        self.places.sort()

    def rewards(self, scores: Path) -> np.ndarray:
        """float64 [C], the reward of each of `places` from a scored file. Raises UserError."""
        rows = read_scored(scores)
        difference = differences(sample_origin(rows[0]), self._origin)
        if difference:
            raise UserError(f"{scores}: not the scores of {self.path}: {difference} there; score that file")
        reward = {}
        for row in rows:
            if row.id not in self._number:
                continue
            made, scored = (
                self._made.get(self._place(row)),
                _Made(row.seed, row.num_tokens, row.finish_reason, row.prompt),
            )
            if made is not None and made.differs(scored):
                raise UserError(
                    f"{scores}: id {row.id!r}, tag {row.tag}, sample {row.sample}: scored for another completion than "
                    f"{self.path} holds there; score that file"
                )
            reward[self._place(row)] = float(row.correct)
        missing = sum(place not in reward for place in self.places)
        if missing:
            raise UserError(
                f"{scores}: {missing} of {len(self.places)} completions in {self.path} have no score; finish "
                "megatron-ssft score"
            )
        return np.array([reward[place] for place in self.places])

    def token_ids(self, chosen: Sequence[Place]) -> list[np.ndarray]:
        """int32 [L] of each. Raises UserError."""
        places, ids = set(chosen), {}
        for rollout in read_rollouts(self.path):
            if rollout.id in self._number and (place := self._place(rollout)) in places:
                ids[place] = np.asarray(rollout.token_ids, dtype=np.int32)
        if len(ids) < len(places):
            raise UserError(f"{self.path}: changed while it was read; start again when it is finished")
        return [ids[place] for place in chosen]

    def _place(self, sample: Sample) -> Place:
        return Place(self._number[sample.id], sample.tag or 0, sample.sample)

    def _set_origin(self, first: Rollout) -> None:
        mode = first.sampling["mode"]
        if mode in OWN_MODES:
            raise UserError(
                f"{self.path}: in mode {mode} the model wrote its tag itself, and what it wrote before is not stored; "
                "generate with --tags each"
            )
        self._origin, self.model, self.tagged = sample_origin(first), first.model, mode != "none"

    def _check(self, rollout: Rollout, prompt: str) -> None:
        """Raise UserError for a completion of another question, or one that the model could not have made."""
        name = f"{self.path}: id {rollout.id!r}, tag {rollout.tag}, sample {rollout.sample}"
        if rollout.prompt not in (None, prompt):
            raise UserError(f"{name}: made from another prompt than --data gives; generate again")
        num_tags, size = self._vocabulary.tags.num_tags, self._vocabulary.size
        if (rollout.tag is None) == self.tagged or (rollout.tag or 0) >= max(num_tags, 1):
            raise UserError(f"{name}: not one of the model's {num_tags} tags (0-based); these are another model's")
        if max(rollout.token_ids) >= size:
            raise UserError(
                f"{name}: token {max(rollout.token_ids)}, the vocabulary has {size} entries; these are another model's"
            )
