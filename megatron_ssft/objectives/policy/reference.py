"""What the model said before the first step: of the tags of every question, and of every stored completion in use.

The reference of KL and anchor is a model that stands still, so its answers are asked for once, by the engine that is
going to train, while it holds the reference's weights: no second copy of them is ever in memory, however large the
model. The whole distribution at every token would be (vocabulary x 4 bytes) per token; kept are the k most probable
tokens. The likelihoods under the weights that made the completions are measured on the same occasion.

    SAVE/reference/index.json      fingerprint of the inputs, planned steps, noise of likelihoods, who wrote what
                   fork.npy        float64 [Q, N]  log-probability of each tag under the reference (gfpo)
                   R_places.npy    int64 [c, 3]    completions that data-parallel rank R has: number, start, length
                   R_nll.npy       float32 [T]     NLL of their tokens under the weights that the run starts from
                   R_reference.npy float32 [T]     NLL under the reference, where that is another model (grpo)
                   R_ids.npy, R_logp.npy  int32, float32 [T, k]  the reference's most probable tokens (anchor)

The folder appears under its name complete or not at all, and is read memory-mapped.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np

from megatron_ssft.errors import UserError
from megatron_ssft.formats.files import naming, publish_folder, sync_file, write_durably
from megatron_ssft.objectives.policy.completion_scoring import Answers
from megatron_ssft.parallel.collectives import barrier, gather_json, on_first_rank
from megatron_ssft.parallel.topology import Topology

FOLDER = "reference"
_INDEX = "index.json"


class ReferenceIndex(msgspec.Struct, frozen=True):
    """index.json: what the answers belong to, and which files hold them."""

    fingerprint: str
    """Digest of the run's input."""
    planned_iters: int
    """Steps that the run was started for."""
    reference: str
    """Folder whose weights answered."""
    noise: float
    """nats^2: variance of log-likelihoods of whole completions between two measurements of the same weights."""
    ranks: tuple[int, ...] = ()
    """Ranks that wrote files."""
    kinds: tuple[str, ...] = ()
    """Which files each of them wrote."""
    fork: bool = False
    """Whether there is fork.npy."""


def stored_index(save: Path) -> ReferenceIndex:
    """The index of a run's reference. Raises UserError if it is not there."""
    path = save / FOLDER / _INDEX
    try:
        return msgspec.convert(json.loads(path.read_bytes()), ReferenceIndex)
    except (OSError, ValueError, RecursionError) as error:  # msgspec's errors are ValueErrors
        raise UserError(
            f"{path}: cannot be read ({error}), and the weights have moved since: start again with another --save"
        ) from error


def refuse_other_inputs(save: Path, index: ReferenceIndex, fingerprint: str, reference: str | None) -> None:
    """Raise UserError if a run was started with other input than it goes on with, or another reference."""
    if reference is not None and str(Path(reference).resolve()) != index.reference:
        raise UserError(
            f"--reference {reference}: the run was started with {index.reference}, whose answers are stored; "
            "leave the flag out, or start again with another --save"
        )
    if index.fingerprint != fingerprint:
        raise UserError(
            f"{save / FOLDER}: belongs to other questions, rewards, completions or settings of them; resume with the "
            "same, or start again with another --save"
        )


def write_reference(
    save: Path,
    topology: Topology,
    index: ReferenceIndex,
    fork_QN: np.ndarray | None,
    start: Answers,
    reference: Answers | None,
) -> None:
    """Write the folder. Collective.

    Args:
        index: what the answers belong to; which files there are is added here.
        fork_QN: log-probabilities of the tags under the reference.
        start: answers under the weights that the run starts from.
        reference: those of the reference, None where it is the same; the most probable tokens are taken from here.
    """
    partial = save / f".{FOLDER}.partial"

    def prepare() -> None:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)

    on_first_rank(prepare, topology)
    top = (reference or start).top
    has_top = bool(top)

    def at(kind: str) -> Path:
        return partial / f"{topology.rank}_{kind}.npy"

    kinds = ["places", "nll", *(["reference"] if reference else []), *(["ids", "logp"] if has_top else [])]
    if start.nll:
        numbers = sorted(start.nll)
        lengths = np.array([len(start.nll[number]) for number in numbers])
        _save(at("places"), np.stack([np.array(numbers), np.cumsum(lengths) - lengths, lengths], axis=1))
        _save(at("nll"), np.concatenate([start.nll[number] for number in numbers]))
        if reference is not None:
            _save(at("reference"), np.concatenate([reference.nll[number] for number in numbers]))
        if has_top:
            _save(at("ids"), np.concatenate([top[number][0] for number in numbers]))
            _save(at("logp"), np.concatenate([top[number][1] for number in numbers]))
    kinds_of = gather_json(kinds if start.nll else [], topology)
    wrote = [rank for rank, has in enumerate(kinds_of) if has]

    def publish() -> None:
        if fork_QN is not None:
            _save(partial / "fork.npy", fork_QN)
        written = msgspec.structs.replace(
            index, ranks=tuple(wrote), kinds=tuple(kinds_of[wrote[0]]) if wrote else (), fork=fork_QN is not None
        )
        write_durably(partial / _INDEX, json.dumps(msgspec.to_builtins(written)))  # a path may be no UTF-8
        publish_folder(partial, save / FOLDER)

    barrier(topology)
    on_first_rank(publish, topology)


def _save(path: Path, array: np.ndarray) -> None:
    with naming(path), open(path, "wb") as file:
        np.save(file, array, allow_pickle=False)
        sync_file(file)


class Reference:
    """The stored answers."""

    def __init__(self, save: Path) -> None:
        """Open them. Raises UserError if they are missing or damaged."""
        folder = save / FOLDER
        index = stored_index(save)
        try:
            self.noise = index.noise
            """nats^2: variance of log-likelihoods of whole completions between two measurements of the same weights."""
            self.fork_QN = np.load(folder / "fork.npy", allow_pickle=False) if index.fork else None
            self._files = {rank: self._open(folder, rank, index.kinds) for rank in index.ranks}
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"{folder}: damaged ({error}); start again with another --save") from error
        self._where = {
            int(number): (rank, slice(int(start), int(start + length)))
            for rank, files in self._files.items()
            for number, start, length in files["places"]
        }

    @staticmethod
    def _open(folder: Path, rank: int, kinds: Sequence[str]) -> dict[str, np.ndarray]:
        paths = {kind: folder / f"{rank}_{kind}.npy" for kind in kinds}
        return {kind: np.load(path, mmap_mode="r", allow_pickle=False) for kind, path in paths.items()}

    def nll(self, completion: int) -> np.ndarray:
        """float32 [L] under the weights that the run started from."""
        return self._get(completion, "nll")

    def nll_sum(self, completion: int) -> float:
        """`nll`, summed over the tokens."""
        return float(self.nll(completion).sum(dtype=np.float64))

    def reference_nll(self, completion: int) -> np.ndarray:
        """float32 [L] under the reference."""
        rank, _ = self._where[completion]
        return self._get(completion, "reference" if "reference" in self._files[rank] else "nll")

    def top(self, completion: int) -> tuple[np.ndarray, np.ndarray]:
        """int32 and float32 [L, k]: the reference's most probable tokens and their log-probabilities."""
        return self._get(completion, "ids"), self._get(completion, "logp")

    @property
    def no_top(self) -> tuple[np.ndarray, np.ndarray]:
        """`top` of no tokens."""
        files = next(iter(self._files.values()))
        return files["ids"][:0], files["logp"][:0]

    def _get(self, completion: int, name: str) -> np.ndarray:
        """One of `nll`, `reference`, `ids` and `logp` of a completion."""
        rank, place = self._where[completion]
        return self._files[rank][name][place]


class MadeUpReference(Reference):
    """Answers of the right shapes that no model gave, for a run that is only rehearsed."""

    def __init__(self, lengths: Sequence[int], fork_shape: tuple[int, int], top_k: int) -> None:
        """
        Args:
            lengths: tokens of every completion.
            fork_shape: questions and tags.
            top_k: tokens that are kept of each distribution.
        """
        self.noise = 0.0
        self._lengths, self._top_k = lengths, top_k
        self.fork_QN = np.full(fork_shape, -np.log(2.0 * fork_shape[1]))

    def reference_nll(self, completion: int) -> np.ndarray:
        return self.nll(completion)

    @property
    def no_top(self) -> tuple[np.ndarray, np.ndarray]:
        return np.zeros((0, self._top_k), dtype=np.int32), np.zeros((0, self._top_k), dtype=np.float32)

    def _get(self, completion: int, name: str) -> np.ndarray:
        length, shape = self._lengths[completion], (self._lengths[completion], self._top_k)
        if name == "ids":
            return np.tile(np.arange(self._top_k, dtype=np.int32), (length, 1))
        value = -np.log(2.0 * self._top_k) if name == "logp" else 1.0
        return np.full(shape if name == "logp" else length, value, dtype=np.float32)
