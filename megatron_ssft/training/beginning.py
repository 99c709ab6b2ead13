"""How a run begins, or goes on from a checkpoint: the weights, and the state of all that decides its future."""

from __future__ import annotations

import functools
from pathlib import Path

from megatron_ssft.config import TrainingRun
from megatron_ssft.formats.run_folder import ASSETS, checkpoint_folder
from megatron_ssft.formats.train_state import RunState
from megatron_ssft.hf.folder import is_hf_folder
from megatron_ssft.objectives.objective import Objective
from megatron_ssft.parallel.checkpoint.choice import CheckpointChoice
from megatron_ssft.parallel.checkpoint.loading import load_checkpoint, read_state_everywhere
from megatron_ssft.parallel.collectives import on_first_rank
from megatron_ssft.parallel.engine import Engine
from megatron_ssft.parallel.model.initialization import initialize_forking_rows, initialize_weights
from megatron_ssft.tokenizers.vocabulary import Vocabulary
from megatron_ssft.training.changes import resume_remarks
from megatron_ssft.training.resume import (
    refuse_missing_optimizer,
    refuse_other_model,
    refuse_other_run,
    refuse_past_end,
    refuse_short_logs,
    whole_state,
)
from megatron_ssft.training.weights import take_checkpoint, take_weights


def look_at_source(config: TrainingRun, objective: Objective, choice: CheckpointChoice) -> None:
    """Choose and check what --load names, before there is a model. Collective. Raises UserError."""
    checkpoint = config.run.checkpoint
    if checkpoint.load is None:
        return
    source = Path(checkpoint.load)
    export = source if is_hf_folder(source) else checkpoint_folder(source, choice.of(source)) / ASSETS
    if not checkpoint.continues_in_place:
        objective.check_source(export)


class Beginning:
    """The start of one run on one rank. Collective throughout."""

    def __init__(
        self,
        config: TrainingRun,
        vocabulary: Vocabulary,
        objective: Objective,
        engine: Engine,
        choice: CheckpointChoice,
    ) -> None:
        """`choice`: which checkpoint is taken of a run."""
        self.config = config
        self.vocabulary = vocabulary
        self.objective = objective
        self.engine = engine
        self.topology = engine.topology
        self.choice = choice
        self.resumed_at: int | None = None
        """The step of the checkpoint that the run goes on from; None: it begins."""
        self.changes: list[str] = []
        """What is different from when that checkpoint was trained, in words."""

    def start_or_resume(self) -> int | None:
        """Put weights into the model: new ones, loaded ones, or those of a run that goes on, with all its state.

        Returns the step that the run goes on from; None: it begins. Raises UserError.
        """
        load = self.config.run.checkpoint.load
        if load is None:
            initialize_weights(self.engine.chunks, self.config.run)
            seed = self.config.run.training.seed
            initialize_forking_rows(self.engine.chunks, self.vocabulary, self.config.start, seed)
            self.engine.start(self.objective.last_layers)
            return None
        self.engine.start(self.objective.last_layers)
        run = Path(load)
        if is_hf_folder(run):
            self.load_weights(run, "--load")
            return None
        return self.choice.load(run, lambda iteration: self._take(run, iteration))

    def _take(self, run: Path, iteration: int) -> int | None:
        """Go on from this checkpoint, or begin with its weights. Raises DamagedCheckpoint and other UserErrors."""
        if self._goes_on(run, iteration):
            return self.resume(run, iteration)
        self.objective.check_source(checkpoint_folder(run, iteration) / ASSETS)
        may_untie = self.objective.may_untie
        take_checkpoint(self.engine, self.vocabulary, run, iteration, "--load", may_untie=may_untie)
        return None

    def load_weights(self, source: Path, flag: str) -> None:
        """Fill the model with the weights of a run or a Hugging Face folder, given by `flag`. Raises UserError."""
        take_weights(
            self.engine,
            self.vocabulary,
            self.config.start,
            source,
            flag,
            may_untie=self.objective.may_untie,
            choice=self.choice,
        )

    def _goes_on(self, run: Path, iteration: int) -> bool:
        """Whether the run in this folder is continued at a checkpoint, rather than its weights taken to start from."""
        checkpoint = self.config.run.checkpoint
        if self.config.start.finetune:
            return False
        if not self.objective.continues_elsewhere:
            return checkpoint.continues_in_place
        return isinstance(read_state_everywhere(run, iteration, self.topology), RunState)

    def resume(self, run: Path, iteration: int) -> int:
        """Go on where this checkpoint was taken. Raises UserError where it and this run contradict each other."""
        state = read_state_everywhere(run, iteration, self.topology)
        self.objective.check_state(run, state)
        assert isinstance(state, RunState)
        own = whole_state(self.config, self.vocabulary, self.objective, 0)
        refuse_other_model(run, state, own)
        otherwise = "start from the weights alone with --finetune"
        if not self.objective.continues_elsewhere:
            otherwise = "start again with another --save"
        refuse_other_run(run, state, own, otherwise)
        refuse_missing_optimizer(self.config.run.checkpoint, run, state, otherwise)
        refuse_past_end(self.config.run, run, iteration)
        if self.config.run.checkpoint.continues_in_place and iteration:
            on_first_rank(lambda: refuse_short_logs(run, self.objective.log_files, iteration), self.topology)
        takes_optimizer = self.config.run.checkpoint.load_optim
        load_checkpoint(self.engine, run, iteration, weights_only=not takes_optimizer)
        self.objective.load_state(state)
        self.resumed_at = iteration
        total = self.objective.train_iters(iteration)

        def changes() -> list[str]:
            planned = functools.partial(self.objective.train_iters_under, state=state)
            return resume_remarks(run, iteration, self.config, total, planned)

        self.changes = on_first_rank(changes, self.topology)
        if not takes_optimizer:
            self.changes.append(f"the optimizer starts anew at step {iteration + 1} (--no-load-optim)")
        return iteration
