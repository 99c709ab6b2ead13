"""The search for a layout: closed formulas for all of them, the simulation for the best few."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megatron_ssft.booking.book import account, jobs_of
from megatron_ssft.booking.memory import with_allowance
from megatron_ssft.booking.records import Booking
from megatron_ssft.booking.simulations import Job, run_all
from megatron_ssft.booking.slices import SliceJob, Slices, estimate, least_peak
from megatron_ssft.booking.survey import Epoch, Survey, cut_epoch, survey
from megatron_ssft.config import SSFTConfig
from megatron_ssft.config.dry_run import DryRun
from megatron_ssft.config.flags import with_values
from megatron_ssft.data.cache import SetDataset
from megatron_ssft.errors import UserError
from megatron_ssft.parallel.simulated.records import SimulatedStep
from megatron_ssft.parallel.topology import check_world_size
from megatron_ssft.tokenizers.vocabulary import Vocabulary

SIMULATED = 2
"""Layouts whose heaviest step is simulated; as many again where none of them fits after all."""
_ROUNDS = 2
NEAR = 0.01
"""Steps that take longer by at most this share are no reason to change --max-tokens-per-microbatch."""
_SHARE = 3
"""The formulas look at one in so many of the steps that stand for all."""
SHOWN = 8
"""Layouts that are shown."""
MOST_NODES = 64
"""That are looked at for the fewest that hold the run."""
_RECOMPUTE = (None, "selective", "full")
_BUDGETS = (0.5, 1.0, 2.0)
"""Times --max-tokens-per-microbatch."""


@dataclass(frozen=True)
class Candidate:
    """A layout and what it takes."""

    config: SSFTConfig
    planned: Survey
    booking: Booking
    is_simulated: bool
    without_recompute: int | None
    """Bytes that would be needed if nothing were recomputed; None where nothing is."""

    @property
    def flags(self) -> str:
        """To paste."""
        parallel, training = self.config.run.parallel, self.config.run.training
        words = [
            f"--tensor-model-parallel-size {parallel.tensor_model_parallel_size}",
            f"--pipeline-model-parallel-size {parallel.pipeline_model_parallel_size}",
            "--sequence-parallel" if parallel.sequence_parallel else "--no-sequence-parallel",
            "--use-distributed-optimizer",
        ]
        if parallel.recompute_granularity is not None:
            words.append(f"--recompute-granularity {parallel.recompute_granularity}")
        if training.max_tokens_per_microbatch is not None:
            words.append(f"--max-tokens-per-microbatch {training.max_tokens_per_microbatch}")
        return " ".join(words)

    @property
    def seconds(self) -> float:
        """Of an average step."""
        assert self.booking.time is not None, "advice is about a GPU"
        return self.booking.time.total

    @property
    def rank(self) -> tuple[bool, float, float]:
        """The best first: what fits, then what is fast, then what has room."""
        return not self.booking.fits, self.seconds, self.booking.fullest.needed


@dataclass(frozen=True)
class Advice:
    """Layouts, the best first."""

    world_size: int
    candidates: tuple[Candidate, ...]
    looked_at: int
    """Layouts whose step was planned."""
    too_large: int
    """Layouts that were left out since they cannot fit."""

    @property
    def best(self) -> Candidate:
        """The best one that was simulated and fits; without any, the first one."""
        proven = (each for each in self.candidates if each.is_simulated and each.booking.fits)
        return next(proven, self.candidates[0])


class Adviser:
    """Searches for one run."""

    def __init__(self, config: SSFTConfig, asked: DryRun, dataset: SetDataset, vocabulary: Vocabulary) -> None:
        """Simulates the slices. Raises UserError."""
        self._config, self._asked = config, asked
        self._dataset, self._vocabulary = dataset, vocabulary
        self._epoch: Epoch = cut_epoch(config, dataset)
        self._slices = self._cut_slices()
        self._surveys: dict[tuple[int, int, int | None], Survey] = {}

    def advise(self) -> Advice:
        """Layouts for --world-size, or for the fewest GPUs that hold the run. Raises UserError where none do."""
        worlds = [self._asked.world_size] if self._asked.world_size else list(_worlds(self._asked.nodes_of))
        advice = None
        for world_size in worlds:
            advice = self._search(world_size)
            if advice.candidates and advice.best.booking.fits and advice.best.is_simulated:
                return advice
        if advice is None or not advice.candidates:
            raise UserError(
                f"--advise: no layout of {worlds[-1]} GPUs holds this run; more of them, or a shorter --seq-length"
            )
        return advice

    # -- one world size ----------------------------------------------------------------------------------------------

    def _search(self, world_size: int) -> Advice:
        layouts = list(self._layouts(world_size))
        small = [layout for layout in layouts if self._may_fit(layout, world_size)]
        candidates = sorted(self._best_budgets([self._estimated(layout, world_size) for layout in small]), key=_rank)
        candidates = candidates[:SHOWN]
        for _ in range(_ROUNDS):
            unsure = [each for each in candidates if not each.is_simulated and each.booking.fits][:SIMULATED]
            if any(each.is_simulated and each.booking.fits for each in candidates) or not unsure:
                break
            candidates = sorted([*self._simulated(unsure), *(c for c in candidates if c not in unsure)], key=_rank)
        return Advice(world_size, tuple(candidates), len(small), len(layouts) - len(small))

    def _best_budgets(self, candidates: Sequence[Candidate]) -> list[Candidate]:
        """One for each layout: with the run's own --max-tokens-per-microbatch, unless another is clearly better."""
        groups: dict[tuple[object, ...], list[Candidate]] = {}
        for candidate in candidates:
            parallel = candidate.config.run.parallel
            layout = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
            groups.setdefault((*layout, parallel.recompute_granularity), []).append(candidate)
        own = self._config.run.train_tokens_per_microbatch

        def key(candidate: Candidate) -> tuple[bool, float]:
            is_own = candidate.config.run.train_tokens_per_microbatch == own
            return not candidate.booking.fits, candidate.seconds * (1 if is_own else 1 + NEAR)

        return [min(group, key=key) for group in groups.values()]

    def _layouts(self, world_size: int) -> Iterator[SSFTConfig]:
        """All that the model and the GPUs allow."""
        run = self._config.run
        budget = run.train_tokens_per_microbatch
        budgets = [int(budget * times) for times in _BUDGETS] if run.training.sequence_layout != "padded" else [None]
        sizes = [2**i for i in range(11)]
        for tp, pp, recompute, tokens in itertools.product(self._tensor_sizes(), sizes, _RECOMPUTE, budgets):
            changes = _changes(tp, pp, recompute) | {"max_tokens_per_microbatch": tokens}
            try:
                config = with_values(self._config, changes)
                check_world_size(config.run, world_size)
            except UserError:  # heads, layers or GPUs cannot be divided so
                continue
            if world_size // (tp * pp) <= self._config.batches.global_batch_size:
                yield config

    def _tensor_sizes(self) -> list[int]:
        return [size for size in (1, 2, 4, 8, 16) if size <= self._asked.nodes_of]

    def _cut_slices(self) -> dict[tuple[int, str | None], Slices]:
        """Slices of every tensor-parallel size and way of recomputing, with the longest sequence of the data."""
        tokens = int(self._epoch.longest.max())
        jobs = {}
        for tp, recompute in itertools.product(self._tensor_sizes(), _RECOMPUTE):
            try:
                config = with_values(self._config, _changes(tp, 1, recompute))
            except UserError:
                continue
            rows = self._vocabulary.tags.row_ids
            jobs[tp, recompute] = SliceJob(config, self._asked.nodes_of, tokens, self._vocabulary.size, rows)
        return dict(zip(jobs, run_all(list(jobs.values())), strict=True))

    def _slices_of(self, config: SSFTConfig) -> Slices:
        parallel = config.run.parallel
        return self._slices[parallel.tensor_model_parallel_size, parallel.recompute_granularity]

    def _may_fit(self, config: SSFTConfig, world_size: int) -> bool:
        """Whether the state and one microbatch of the longest sequence leave the GPU's memory unfilled."""
        assert self._asked.hardware is not None
        least = least_peak(config.run, world_size, self._slices_of(config))
        return with_allowance(least) <= 1.05 * self._asked.hardware.bytes

    def _survey(self, config: SSFTConfig, world_size: int) -> Survey:
        parallel = config.run.parallel
        dp, pp = world_size // parallel.model_parallel_size, parallel.pipeline_model_parallel_size
        key = dp, pp, config.run.training.max_tokens_per_microbatch
        if key not in self._surveys:
            self._surveys[key] = survey(config, self._dataset, self._vocabulary, self._epoch, dp, _SHARE)
        return self._surveys[key]

    def _estimated(self, config: SSFTConfig, world_size: int) -> Candidate:
        planned = self._survey(config, world_size)
        step = estimate(config.run, world_size, self._asked.nodes_of, planned, self._slices_of(config))
        return self._candidate(config, planned, [Job(config, world_size, self._asked.nodes_of, 0)], [step], False)

    def _simulated(self, candidates: Sequence[Candidate]) -> list[Candidate]:
        planned = [self._whole_survey(candidate) for candidate in candidates]
        jobs = []
        for candidate, steps in zip(candidates, planned, strict=True):
            layout = candidate.booking.layout
            ends = sorted({0, layout.pipeline - 1})  # the first stage keeps the most, the last does the most
            jobs.append(jobs_of(candidate.config, layout.world_size, self._asked, steps, ends))
        results = iter(run_all([job for of_candidate in jobs for job in of_candidate]))
        return [
            self._candidate(candidate.config, steps, of_candidate, [next(results) for _ in of_candidate], True)
            for candidate, steps, of_candidate in zip(candidates, planned, jobs, strict=True)
        ]

    def _whole_survey(self, candidate: Candidate) -> Survey:
        dp = candidate.booking.layout.data
        return survey(candidate.config, self._dataset, self._vocabulary, self._epoch, dp)

    def _candidate(
        self, config: SSFTConfig, planned: Survey, jobs: list[Job], steps: list[SimulatedStep], simulated: bool
    ) -> Candidate:
        asked = self._asked
        booking = account(config, asked, self._vocabulary, self._epoch, planned, jobs, steps)
        parallel, world_size = config.run.parallel, booking.layout.world_size
        kept = None
        if parallel.recompute_granularity is not None:
            slices = self._slices[parallel.tensor_model_parallel_size, None]
            step = estimate(config.run, world_size, asked.nodes_of, planned, slices)
            kept = with_allowance(step.peak)
        return Candidate(config, planned, booking, simulated, kept)


def _rank(candidate: Candidate) -> tuple[bool, float, float]:
    return candidate.rank


def _changes(tp: int, pp: int, recompute: str | None) -> dict[str, object]:
    """A layout as the search tries it."""
    changes: dict[str, object] = {
        "tensor_model_parallel_size": tp,
        "pipeline_model_parallel_size": pp,
        "num_layers_per_virtual_pipeline_stage": None,
        "context_parallel_size": 1,
        "sequence_parallel": tp > 1,
        "use_distributed_optimizer": True,
        "recompute_granularity": recompute,
    }
    if recompute != "full":
        changes |= {"recompute_method": "uniform", "recompute_num_layers": 1}
    return changes


def _worlds(nodes_of: int) -> Iterator[int]:
    """Parts of a node, then whole nodes, each twice as many as before."""
    gpus = 1
    while gpus < nodes_of:
        yield gpus
        gpus *= 2
    nodes = 1
    while nodes <= MOST_NODES:
        yield nodes * nodes_of
        nodes *= 2
