"""train_state.json: what a checkpoint stores besides weights and optimizer.

There is no random state: every draw is a function of the seed, the epoch and the question. Nor is there one of the
learning rate, a function of the step.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, TypedDict

from msgspec import UNSET, Meta, Struct, UnsetType

from megatron_ssft.errors import UserError
from megatron_ssft.formats.jsonl import Count, Name, RowError, convert_row, to_object
from megatron_ssft.formats.run_folder import REMOVE_ADVICE

STATE_FORMAT = 1
"""The version that this code writes and reads."""


Iteration = Annotated[int, Meta(ge=0, lt=10**18, description="a number of steps")]


class TagState(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The tags; `ids` are empty in a model that was imported without any."""

    format: str
    strings: list[str]
    ids: list[list[int]]


class WeightsState(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The state of a checkpoint of weights alone; other states extend it."""

    format: int
    iteration: Iteration
    """Optimizer steps done."""
    has_optimizer: bool = True
    """False: an import, or a run with --no-save-optim."""
    model: dict[str, bool | int | float | str | None]
    """The model's section of the configuration."""
    vocab_size: Annotated[int, Meta(ge=1, description="a number of tokens")]
    forking_tokens: TagState
    bf16: bool
    has_manifest: bool | UnsetType = UNSET
    """Whether a manifest stands beside it; UNSET in checkpoints of versions that wrote none."""


class QueueState(TypedDict):
    """Where a run stands in its data; a few visits, whatever the data's size."""

    num_questions: Count
    seed: int
    epoch: Count
    cursor: Count
    """Place in the epoch's permutation of the next question to enter the window."""
    waiting: list[list[int]]
    """[index, epoch] of the visits in the window, in stream order."""


class ReusedAssignments(TypedDict):
    """Assignments that later visits may still use."""

    assignments: dict[str, dict[str, str]]
    """Epoch made -> tags, joined by commas -> the questions' keys, joined and in base64."""


class CollapseWatchState(TypedDict):
    """Memory of the watch for a collapse of the matching."""

    steps: Count
    window: list[tuple[list[list[int]], list[list[str | None]]]]
    """The window's steps: the tags of each question, the sources of each question."""
    gaps: list[float]
    margins: list[float | None]
    """null stands for infinity."""
    known_sources: bool
    was_informative: bool
    told: list[str]
    """Warnings already given."""


class RunState(WeightsState, frozen=True, kw_only=True):
    """A run that can go on; what its objective adds stands in the records below."""

    data: Name
    """Fingerprint of what it is trained on."""
    use_distributed_optimizer: bool


class SSFTState(RunState, frozen=True, kw_only=True):
    """A run of Set Supervised Fine-Tuning."""

    queue: QueueState
    reused_assignments: ReusedAssignments | UnsetType = UNSET
    collapse_watch: CollapseWatchState | UnsetType = UNSET


class ObjectiveState(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The objective's own part."""

    old_logp: list[list[float]] | None | UnsetType = UNSET
    """gfpo-sampled: what the tags of the present set of rollouts were drawn from, [Q][N]. UNSET with grpo."""


class PolicyState(RunState, frozen=True, kw_only=True):
    """A run of policy learning."""

    policy: dict[str, object]
    """Settings that a resumed run must share."""
    objective: ObjectiveState
    stale: bool
    """The rewards were too old at the last look."""


def encode_state(state: WeightsState) -> str:
    """The text of the file."""
    return json.dumps(_plain(state), indent=1)


def decode_state(text: str, path: Path) -> WeightsState:
    """The record of a file. Raises UserError for a damaged file and for another version's."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read ({error}); {REMOVE_ADVICE}") from error
    if not isinstance(value, dict) or "format" not in value:
        raise UserError(f"{path}: holds no state of a run; {REMOVE_ADVICE}")
    if value["format"] != STATE_FORMAT:
        raise UserError(f"{path}: checkpoint format {value['format']}, this version reads {STATE_FORMAT}")
    kind = _kind_of(value)
    try:
        state = convert_row(value, kind)
    except RowError as error:
        raise UserError(f"{path}: {error}; {REMOVE_ADVICE}") from error
    absent = sorted(set(kind.__struct_fields__) - value.keys()) if state.has_manifest is True else []
    problem = f"{absent[0]!r} is missing" if absent else _contradiction(state)
    if problem is not None:
        raise UserError(f"{path}: {problem}; {REMOVE_ADVICE}")
    return state


def read_train_state(path: Path) -> WeightsState:
    """Read train_state.json. Raises UserError."""
    if path.exists() and not path.is_file():  # a pipe would be waited on for ever
        raise UserError(f"{path}: is no regular file; {REMOVE_ADVICE}")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); {REMOVE_ADVICE}") from error
    return decode_state(text, path)


def _kind_of(value: Mapping[str, object]) -> type[WeightsState]:
    """The record of a state, told by a field that the others lack."""
    if "policy" in value:
        return PolicyState
    if "queue" in value:
        return SSFTState
    return RunState if "data" in value else WeightsState


def _contradiction(state: WeightsState) -> str | None:
    """What of a state cannot be, although each value has the right type."""
    tags = state.forking_tokens
    ids = [i for sequence in tags.ids for i in sequence]
    if tags.format not in ("special", "text"):
        return f"'forking_tokens.format': {tags.format[:40]!r} is neither special nor text"
    if (tags.ids and len(tags.ids) != len(tags.strings)) or not all(tags.ids):
        return "'forking_tokens': every tag needs a text and token ids"
    if any(not 0 <= i < state.vocab_size for i in ids):
        return f"'forking_tokens': an id is outside the vocabulary of {state.vocab_size}"
    if len(set(map(tuple, tags.ids))) < len(tags.ids) or len(set(tags.strings)) < len(tags.strings):
        return "'forking_tokens': two tags are the same"
    return _wrong_queue(state.queue) if isinstance(state, SSFTState) else None


def _wrong_queue(queue: QueueState) -> str | None:
    if queue["cursor"] > queue["num_questions"]:
        return f"'queue.cursor': {queue['cursor']} is behind the last of {queue['num_questions']} questions"
    for visit in queue["waiting"]:
        if len(visit) != 2 or not (0 <= visit[0] < queue["num_questions"] and 0 <= visit[1] <= queue["epoch"]):
            return f"'queue.waiting': {visit} is no question and epoch that may wait"
    if len(set(map(tuple, queue["waiting"]))) < len(queue["waiting"]):
        return "'queue.waiting': a question waits twice"
    return None


def _plain(value: object) -> object:
    """JSON values; unset fields are left out."""
    if isinstance(value, Struct):
        return {name: _plain(item) for name, item in to_object(value).items()}
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
