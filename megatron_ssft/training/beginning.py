"""How a run begins, or goes on from a checkpoint: the weights, and the state of all that decides its future."""

from __future__ import annotations

import functools
from pathlib import Path

from megatron_ssft.config import TrainingRun
from megatron_ssft.formats.train_state import RunState
from megatron_ssft.hf.folder import is_hf_folder
from megatron_ssft.objectives.objective import Objective
from megatron_ssft.parallel.checkpoint.choice import choose_checkpoint
from megatron_ssft.parallel.checkpoint.run_checkpoint import load_checkpoint, read_state_everywhere
from megatron_ssft.parallel.collectives import on_first_rank
from megatron_ssft.parallel.engine import Engine
from megatron_ssft.parallel.model.initialization import initialize_forking_rows, initialize_weights
from megatron_ssft.tokenizers.vocabulary import Vocabulary
from megatron_ssft.training.changes import resume_remarks
from megatron_ssft.training.resume import (
    refuse_other_model,
    refuse_other_run,
    refuse_past_end,
    refuse_short_logs,
    whole_state,
)
from megatron_ssft.training.weights import take_weights


class Beginning:
    """The start of one run on one rank. Collective throughout."""

    def __init__(self, config: TrainingRun, vocabulary: Vocabulary, objective: Objective, engine: Engine) -> None:
        self.config = config
        self.vocabulary = vocabulary
        self.objective = objective
        self.engine = engine
        self.topology = engine.topology
        self.resumed_at: int | None = None
        """The step of the checkpoint that the run goes on from; None: it begins."""
        self.changes: list[str] = []
        """What is different from when that checkpoint was trained, in words."""
        self._chosen: dict[Path, int] = {}

    def start_or_resume(self) -> int | None:
        """Put weights into the model: new ones, loaded ones, or those of a run that goes on, with all its state.

        Returns the step that the run goes on from; None: it begins. Raises UserError.
        """
        load = self.config.run.checkpoint.load
        if load is None:
            run = self.config.run
            initialize_weights(self.engine.chunks, run)
            initialize_forking_rows(self.engine.chunks, self.vocabulary, self.config.start, run.training.seed)
            self.engine.start(self.objective.last_layers)
            return None
        self.engine.start(self.objective.last_layers)
        if self._goes_on(Path(load)):
            return self.resume(Path(load))
        self.load_weights(Path(load), "--load")
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
            newest=self.latest,
        )

    def latest(self, run: Path) -> int:
        """The iteration of the checkpoint to take of a run, looked at once. Raises UserError."""
        if run not in self._chosen:
            self._chosen[run] = choose_checkpoint(run, self.config.run.checkpoint, self.topology)
        return self._chosen[run]

    def taken_of(self, run: Path) -> int | None:
        """The iteration of the checkpoint that was taken of a run; None: none was looked at."""
        return self._chosen.get(run)

    def _goes_on(self, run: Path) -> bool:
        """Whether the run in this folder is continued, rather than its weights taken to start from."""
        checkpoint = self.config.run.checkpoint
        if is_hf_folder(run) or self.config.start.finetune:
            return False
        if not self.objective.continues_elsewhere:
            return checkpoint.continues_in_place
        return read_state_everywhere(run, self.latest(run), self.topology).has_optimizer

    def resume(self, run: Path) -> int:
        """Go on where the newest checkpoint was taken. Raises UserError where it and this run contradict each other."""
        iteration = self.latest(run)
        state = read_state_everywhere(run, iteration, self.topology)
        self.objective.check_state(run, state)
        assert isinstance(state, RunState)
        own = whole_state(self.config, self.vocabulary, self.objective, 0)
        refuse_other_model(run, state, own)
        otherwise = "start from the weights alone with --finetune"
        if not self.objective.continues_elsewhere:
            otherwise = "start again with another --save"
        refuse_other_run(run, state, own, otherwise)
        refuse_past_end(self.config.run, run, iteration)
        if self.config.run.checkpoint.continues_in_place and iteration:
            on_first_rank(lambda: refuse_short_logs(run, self.objective.log_files, iteration), self.topology)
        load_checkpoint(self.engine, run, iteration)
        self.objective.load_state(state)
        self.resumed_at = iteration
        total = self.objective.train_iters(iteration)

        def changes() -> list[str]:
            planned = functools.partial(self.objective.train_iters_under, state=state)
            return resume_remarks(run, iteration, self.config, total, planned)

        self.changes = on_first_rank(changes, self.topology)
        return iteration
