"""The rows of vs_trl.py's table: ways to train, and how TRL's packing or padding arranges the same sequences."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NotRequired, TypedDict

from megatron_ssft.errors import UserError
from megatron_ssft.records import ForkingTokens, TokenizedSet

IGNORED = -100
"""Label of a token without loss, as Hugging Face has it."""
TRL_LENGTH, TRL_BATCH = 1024, 8
"""SFTConfig's default max_length and per_device_train_batch_size."""


class Tokens(TypedDict):
    """A sequence, or several packed into one."""

    input_ids: list[int]
    labels: list[int]
    seq_lengths: NotRequired[list[int]]
    """Where packed."""


Rows = list[Tokens]


class Settings(TypedDict, total=False):
    """Settings of one way of training; everything else keeps its default."""

    # Keys of our configuration
    matching: str
    sequence_layout: str
    # Arguments of TRL's SFTConfig
    per_device_train_batch_size: int
    gradient_checkpointing: bool
    packing: bool
    max_length: int


@dataclass(frozen=True)
class Row:
    """A line of the table: one way of training."""

    side: str
    """`ours` or `trl`."""
    about: str
    settings: Settings = field(default_factory=Settings)
    sort: bool = False
    """TRL: sort the sequences of a step by length, so that its microbatches have little padding."""
    streams: int | None = None
    """TRL with packing: this many packed rows per step, of nearly equal length; None: rows of max_length."""
    head: str = "all"
    """TRL: `all` is its path on a CPU (every position goes through the output head), `scored` its path on a GPU (those
    with a label), switched on by a patch; `logits` is the loss of transformers' own Trainer instead of TRL's."""


def _trl(about: str, batch: int, head: str = "all", streams: int | None = None) -> Row:
    settings = Settings(per_device_train_batch_size=batch, gradient_checkpointing=False, packing=streams is not None)
    return Row("trl", about, settings, sort=streams is None, streams=streams, head=head)


ROWS = {
    "trl-default": Row("trl", "TRL, defaults"),
    "trl-packing": Row("trl", "TRL, packing=True", {"packing": True}),
    "trl-best": _trl("TRL, best found", 1),
    "trl-patched": _trl("TRL, patched", 2, "scored"),
    "ours-single": Row("ours", "ours, single", {"matching": "single"}),
    "ours-random": Row("ours", "ours, random", {"matching": "random"}),
    "ours-optimal": Row("ours", "ours, optimal", {"matching": "optimal"}),
}
MORE_ROWS = {
    f"trl-{layout}-{head}-{n}": _trl(
        f"TRL, {layout}, {head}, {n}",
        n if layout == "padded" else 1,
        head,
        streams=None if layout == "padded" else n,
    )
    for layout in ("padded", "packed")
    for head in ("all", "scored", "logits")
    for n in (1, 2, 4, 8)
} | {
    f"ours-padded-{matching}": Row("ours", f"padded, {matching}", {"matching": matching, "sequence_layout": "padded"})
    for matching in ("single", "random", "optimal")
}
"""For --rows. `best found` and `patched` are the fastest of these.

The number counts sequences per microbatch, or packed rows per step.
"""


# -- the data ----------------------------------------------------------------------------------------------------------


def choose_questions(lines: Sequence[str], questions: int, traces: int) -> list[dict]:
    """Take the first `questions` questions that have `traces` different traces, cut to those. Raises UserError."""
    rows: list[dict] = []
    for line in lines:
        row = json.loads(line)
        different = list({trace["text"]: trace for trace in row["traces"]}.values())
        if len(different) >= traces and len(rows) < questions:
            rows.append(row | {"traces": different[:traces]})
    if len(rows) < questions:
        raise UserError(f"--data has {len(rows)} questions of {traces} traces, {questions} are needed")
    return rows


def sequences_of(sets: Sequence[TokenizedSet], tags_of: Sequence[Sequence[int]], tags: ForkingTokens) -> Rows:
    """Join prompt, tag and completion of every trace; `labels` are IGNORED before the completion.

    `tags_of[q][j]` is the 0-based tag of trace j of question q.
    """
    sequences: Rows = []
    for tokenized, own_tags in zip(sets, tags_of, strict=True):
        for completion, tag in zip(tokenized.completion_ids, own_tags, strict=True):
            start = [*tokenized.prompt_ids.tolist(), *tags.ids[tag]]
            ids = completion.tolist()
            sequences.append({"input_ids": start + ids, "labels": [IGNORED] * len(start) + ids})
    return sequences


def count(sequences: Rows) -> tuple[int, int]:
    """Count (tokens, tokens with loss)."""
    tokens = sum(len(s["input_ids"]) for s in sequences)
    return tokens, sum(label != IGNORED for s in sequences for label in s["labels"])


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Pack positions into rows of at most `capacity` tokens by best fit decreasing, as TRL's `bfd` does.

    Raises UserError where one is longer than a row: TRL would cut it, and then not train the same tokens.
    """
    if max(lengths) > capacity:
        raise UserError(f"a sequence of {max(lengths)} tokens does not fit a packed row of {capacity}")
    rows: list[list[int]] = []
    room: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fitting = [r for r in range(len(rows)) if room[r] >= lengths[i]]
        if not fitting:
            rows.append([])
            room.append(capacity)
        best = min(fitting, key=lambda r: room[r], default=len(rows) - 1)
        rows[best].append(i)
        room[best] -= lengths[i]
    return rows


def pack_into(lengths: Sequence[int], rows: int) -> list[list[int]]:
    """Pack with the least capacity that needs no more than `rows` rows; exactly so many, where there are enough."""
    capacity = max(max(lengths), -(-sum(lengths) // rows))
    while len(packed := pack(lengths, capacity)) > rows:
        capacity += 1
    while len(packed) < min(rows, len(lengths)):
        longest = max((r for r in packed if len(r) > 1), key=lambda r: sum(lengths[i] for i in r))
        packed.append([longest.pop()])
    return packed


def microbatches(sequences: Rows, row: Row) -> list[Rows]:
    """Arrange the sequences of a step as TRL's collator gets them under the settings of `row`."""
    if row.settings.get("packing"):
        lengths = [len(s["input_ids"]) for s in sequences]
        capacity = row.settings.get("max_length", TRL_LENGTH)
        packed = pack(lengths, capacity) if row.streams is None else pack_into(lengths, row.streams)
        sequences = [
            Tokens(
                input_ids=[token for i in chosen for token in sequences[i]["input_ids"]],
                labels=[label for i in chosen for label in sequences[i]["labels"]],
                seq_lengths=[lengths[i] for i in chosen],
            )
            for chosen in packed
        ]
    elif row.sort:
        sequences = sorted(sequences, key=lambda s: -len(s["input_ids"]))
    size = row.settings.get("per_device_train_batch_size", TRL_BATCH)
    return [sequences[k : k + size] for k in range(0, len(sequences), size)]
