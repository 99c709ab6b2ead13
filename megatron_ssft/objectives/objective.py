"""What an objective is: it decides what every step trains, from a small context, and never sees the trainer.

A new objective is one class in one file: `decide` is all that it must have. The trainer (`training/trainer.py`) builds
it before the model, so that wrong input ends a run early, and then calls, in this order:

    begin                  once, when the weights to start from are in place; or load_state, when a run goes on
    before_step            at every step
    decide                 at every step: loss terms for the engine, figures for the log
    after_step             at every step, after the optimizer's
    end                    once
"""

from __future__ import annotations

import abc
import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from msgspec import Struct

from megatron_ssft.config import TrainingRun
from megatron_ssft.errors import UserError
from megatron_ssft.formats.metrics import METRICS
from megatron_ssft.formats.train_state import RunState, WeightsState
from megatron_ssft.parallel.collectives import on_first_rank
from megatron_ssft.parallel.engine import Engine
from megatron_ssft.parallel.loss_terms import LossTerm
from megatron_ssft.parallel.scores import Scores
from megatron_ssft.parallel.topology import Topology
from megatron_ssft.records import PlannedBatch
from megatron_ssft.scheduling.accounting import FlopAccountant
from megatron_ssft.scheduling.planner import Planner
from megatron_ssft.tokenizers.vocabulary import Vocabulary

Figures = dict[str, Any]
"""Values of one line of metrics.jsonl, by name."""
LoadWeights = Callable[[Path, str], None]
"""(run or Hugging Face folder, flag that named it): fill the model with its weights. Collective."""


class StepContext:
    """What an objective may use at a step. The same on every rank but for the model's shards."""

    def __init__(self, iteration: int, train_iters: int, engine: Engine, planner: Planner) -> None:
        self.iteration = iteration
        """Optimizer steps done."""
        self.train_iters = train_iters
        """Optimizer steps of the whole run."""
        self.planner = planner
        self.accountant = FlopAccountant(planner.flops)
        self._engine = engine

    def score(self, planned: PlannedBatch, *, top_k: int | None = None, low_precision: bool = False) -> Scores:
        """Likelihoods under the present weights, without a gradient; see `Engine.score`. Collective."""
        return self._engine.score(planned, top_k=top_k, low_precision=low_precision)

    def part(self, name: str) -> contextlib.AbstractContextManager[None]:
        """Count the time inside the `with` block as that of a part of the step, NAME_seconds in metrics.jsonl."""
        return self._engine.clock.part(name)

    @property
    def is_first_rank(self) -> bool:
        """Whether this rank writes the log."""
        return self._engine.topology.is_first_rank

    def once(self, work: Callable[[], Any]) -> Any:
        """Run `work` on the first rank and give its JSON-able result to all. Collective."""
        return on_first_rank(work, self._engine.topology)


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What a step trains, and what finding that out has cost."""

    terms: Sequence[LossTerm]
    figures: Callable[[Mapping[str, float]], Figures]
    """Sums that the loss terms report -> figures of the log."""
    questions: int
    scoring_flops: float = 0.0
    """Model FLOPs of the forward passes behind the decision."""
    aside_seconds: float = 0.0
    """Time spent for the log alone, which is not the step's."""


@dataclass
class Report:
    """What an objective has to say before or after a step; read on the first rank alone."""

    figures: Figures = field(default_factory=dict)
    """After a step: more figures for its line in metrics.jsonl."""
    rows: list[tuple[str, Sequence[Struct]]] = field(default_factory=list)
    """(one of `log_files`, records of its lines)"""
    remarks: list[str] = field(default_factory=list)
    """Lines for a person."""


ConfigT = TypeVar("ConfigT", bound=TrainingRun)
DecisionT = TypeVar("DecisionT", bound=Decision)


class Objective(abc.ABC, Generic[ConfigT, DecisionT]):
    """Decides what every step trains. Collective throughout: all ranks call the same methods in the same order."""

    log_files: ClassVar[tuple[str, ...]] = (METRICS,)
    """JSONL files that it writes into the run's folder; each line has the `iteration` that it belongs to."""
    metrics: ClassVar[type[Struct] | None] = None
    """Record of a line of metrics.jsonl (formats/metrics.py); None: whatever figures there are."""
    continues_elsewhere: ClassVar[bool] = True
    """Whether a run may go on in another --save folder than the one it is loaded from."""
    may_untie: ClassVar[bool] = False
    """Whether an output head of its own may start as a copy of the embedding of a model that ties the two."""
    last_layers: int | None = None
    """How many of the last layers train, beside the tags' rows; None: everything."""

    def __init__(self, config: ConfigT, vocabulary: Vocabulary, topology: Topology) -> None:
        """Read and check all input. There is no model yet. Raises UserError."""
        self.config = config
        self.vocabulary = vocabulary
        self.topology = topology

    @abc.abstractmethod
    def decide(self, step: StepContext) -> DecisionT:
        """What this step trains."""

    def check_source(self, export: Path) -> None:
        """Raise UserError where a run cannot begin with these weights. Called before there is a model.

        Called again where it turns out to begin with others, as a checkpoint was damaged.

        Args:
            export: the Hugging Face folder that --load names, or that the checkpoint to begin with may have.
        """

    # -- a run's length and end ----------------------------------------------------------------------------------

    def train_iters(self, iteration: int) -> int:
        """Optimizer steps of the whole run, `iteration` of them done."""
        assert self.config.run.training.train_iters is not None, "an objective that counts epochs says how many steps"
        return self.config.run.training.train_iters

    def train_iters_under(self, config: ConfigT, state: RunState) -> int:
        """Optimizer steps of the whole run if it had gone on from `state` with this configuration."""
        assert config.run.training.train_iters is not None, "an objective that counts epochs says how many steps"
        return config.run.training.train_iters

    def is_over(self) -> bool:
        """Whether the run is to end before its last step; the same answer on every rank."""
        return False

    def end(self, step: StepContext) -> None:
        """Called when the run ends or is stopped; the last checkpoint is there."""

    # -- around a step -------------------------------------------------------------------------------------------

    def begin(self, step: StepContext, load_weights: LoadWeights) -> None:
        """Called once in a run that does not go on from a checkpoint, with the weights to start from in place.

        With `load_weights` others can be looked at; the last ones loaded are trained.
        """

    def suppose_begun(self) -> None:
        """Take made-up answers for those that `begin` would ask the model for: the run is only rehearsed."""

    def pass_over(self, steps: int) -> None:
        """Leave out so many steps' data, where steps have their own: the run is only rehearsed."""

    def before_step(self, step: StepContext) -> Report:
        """Called before `decide`."""
        return Report()

    def after_step(self, step: StepContext, decision: DecisionT) -> Report:
        """Called after the optimizer's step, which `step.iteration` counts."""
        return Report()

    # -- checkpoints ---------------------------------------------------------------------------------------------

    @property
    def fingerprint(self) -> str:
        """Digest of the data; a run goes on only with the same."""
        return ""

    def complete_state(self, state: RunState) -> RunState:
        """The state of a checkpoint with what this objective stores in it.

        A record of its own stands in formats/train_state.py, where `_kind_of` has to know it.
        """
        return state

    def check_state(self, run: Path, state: WeightsState) -> None:
        """Raise UserError if the checkpoint of `run` is not one of this objective. Nothing is loaded yet."""
        if not isinstance(state, RunState):
            raise UserError(f"--load {run}: holds weights alone; start from them with --finetune")

    def load_state(self, state: RunState) -> None:
        """Go on where `state` was taken."""

    # -- words ---------------------------------------------------------------------------------------------------

    def introduction(self) -> str:
        """What is trained on what, for the first line of the log."""
        return type(self).__name__

    def notes(self) -> Sequence[str]:
        """Further first lines: what was left out, what is unusual."""
        return ()

    def line(self, row: Mapping[str, Any]) -> str:
        """A step for a person."""
        return f"step {row['iteration']:>6} | loss {row['loss']:.4f} | lr {row['lr']:.3e} | {row['seconds']:.2f} s"
