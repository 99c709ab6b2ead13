"""What GFPO and GRPO have in common: rewards that were measured before, a frozen reference, and how far one may drift.

The reference is asked once, before the first step, by the engine itself; its answers are stored in the run's folder.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec
import numpy as np
from msgspec import structs

from megatron_ssft.config import GFPOConfig
from megatron_ssft.errors import UserError, shared_error
from megatron_ssft.formats.files import write_durably
from megatron_ssft.formats.metrics import METRICS
from megatron_ssft.formats.policy import PolicyLine, Split, policy_lines
from megatron_ssft.formats.run_folder import FINISHED, POLICY
from megatron_ssft.formats.train_state import ObjectiveState, PolicyState, RunState, WeightsState
from megatron_ssft.objectives.formulas.drift import measure_drift
from megatron_ssft.objectives.formulas.forking_policy import log_policy
from megatron_ssft.objectives.objective import Decision, Figures, LoadWeights, Objective, Report, StepContext
from megatron_ssft.objectives.policy.completion_scoring import CompletionScorer
from megatron_ssft.objectives.policy.forks import Forks
from megatron_ssft.objectives.policy.inputs import PolicyInputs, check_rewards_model, read_inputs
from megatron_ssft.objectives.policy.reference import (
    MadeUpReference,
    Reference,
    ReferenceIndex,
    refuse_other_inputs,
    stored_index,
    write_reference,
)
from megatron_ssft.objectives.step_lines import policy_line
from megatron_ssft.parallel.collectives import gather_json, on_first_rank
from megatron_ssft.parallel.topology import Topology
from megatron_ssft.records import TokenizedSet
from megatron_ssft.tokenizers.vocabulary import Vocabulary

_ENOUGH_MASS = 0.9
"""Below this the run's end says how seldom the model begins with a tag."""


class PolicyObjective(Objective[GFPOConfig, Decision]):
    """Learns from stored rewards. Subclasses decide what a step trains."""

    log_files = (METRICS, POLICY)
    continues_elsewhere = False  # the reference's answers stand in the --save folder
    may_untie = True
    reference: Reference
    """Opened when the run has begun or goes on."""

    def __init__(self, config: GFPOConfig, vocabulary: Vocabulary, topology: Topology) -> None:
        super().__init__(config, vocabulary, topology)
        assert config.run.checkpoint.save is not None
        self.policy, self.save = config.policy, Path(config.run.checkpoint.save)
        self.last_layers = config.policy.last_layers
        self.stale = False
        """Whether the stored rewards no longer describe the model."""
        self.mass = 1.0
        """How probable it is that an answer begins with a tag, when the policy was last asked."""
        self._remark: str | None = None
        self._checked: Path | None = None
        resuming = config.run.checkpoint.continues_in_place
        index = self._stored_index() if resuming else None
        self.planned_iters = config.train_iters if index is None else index.planned_iters
        self.inputs = self._read_inputs()
        if index is not None:
            refuse_other_inputs(self.save, index, self.inputs.fingerprint, config.policy.reference)
        self.forks = Forks(vocabulary.tags)
        self.scorer = CompletionScorer(self.inputs, vocabulary.tags)

    def check_source(self, export: Path) -> None:
        if export != self._checked:  # looked at once, as all of it is read
            self._remark = on_first_rank(
                lambda: check_rewards_model(self.policy, export, self.inputs.model), self.topology
            )
            self._checked = export

    def _stored_index(self) -> ReferenceIndex:
        """Read by the first rank, whose errors all ranks share."""
        index = on_first_rank(lambda: msgspec.to_builtins(stored_index(self.save)), self.topology)
        return msgspec.convert(index, ReferenceIndex)

    def _read_inputs(self) -> PolicyInputs:
        """Read by the first rank, whose errors all ranks share, and then by the others."""
        inputs: list[PolicyInputs] = []

        def read() -> None:
            inputs.append(read_inputs(self.config, self.vocabulary, self.planned_iters))

        on_first_rank(read, self.topology)
        if not inputs:
            read()
        if len(set(gather_json(inputs[0].fingerprint, self.topology))) > 1:
            # On another node, or a file that is still being written.
            raise shared_error(f"--data {self.policy.data}: not all ranks read the same input; start again")
        return inputs[0]

    # -- the reference -------------------------------------------------------------------------------------------

    def begin(self, step: StepContext, load_weights: LoadWeights) -> None:
        """Ask the reference before anything moves. Raises UserError."""
        assert self.config.run.checkpoint.load is not None
        on_first_rank(lambda: (self.save / FINISHED).unlink(missing_ok=True), self.topology)
        policy, start = self.policy, Path(self.config.run.checkpoint.load)
        top_k = None if policy.anchor == "none" else min(policy.anchor_top_k, self.vocabulary.size)
        reference = start if policy.reference is None else Path(policy.reference)
        other = fork_QN = None
        if reference.resolve() != start.resolve():
            load_weights(reference, "--reference")
            other, fork_QN = self.scorer.measure(step, top_k), self.reference_fork(step)
            load_weights(start, "--load")
        answers = self.scorer.measure(step, top_k if other is None else None)
        if other is None:
            fork_QN = self.reference_fork(step)
        index = ReferenceIndex(self.inputs.fingerprint, self.planned_iters, str(reference.resolve()), self._noise(step))
        write_reference(self.save, self.topology, index, fork_QN, answers, other)
        self.reference = Reference(self.save)

    def suppose_begun(self) -> None:
        lengths = [len(completion.ids) for completion in self.inputs.completions]
        shape = (len(self.inputs.questions), self.vocabulary.tags.num_tags)
        top_k = 0 if self.policy.anchor == "none" else min(self.policy.anchor_top_k, self.vocabulary.size)
        self.reference = MadeUpReference(lengths, shape, top_k)

    def reference_fork(self, step: StepContext) -> np.ndarray | None:
        """float64 [Q, N]: log-probabilities of the tags under the weights in place, where the objective needs them."""
        return None

    def _noise(self, step: StepContext) -> float:
        """nats^2: how much the likelihood of a completion varies with its neighbours in a microbatch. Collective.

        Nothing of it is drift: the weights are the same. In bfloat16 it grows with the length.
        """
        which = range(self.inputs.rescored)
        if len(which) < 2:
            return 0.0
        whole, half = self.scorer.sums(step, which), len(which) // 2
        halves = [self.scorer.sums(step, part) for part in (which[:half], which[half:])]
        return float(np.var(whole - np.concatenate(halves)))

    # -- after a step --------------------------------------------------------------------------------------------

    def after_step(self, step: StepContext, decision: Decision) -> Report:
        """How stale the rewards are, and the tags' probabilities, where they are due."""
        policy, is_last = self.policy, step.iteration == step.train_iters
        report = Report()
        if self.inputs.rescored and (is_last or step.iteration % policy.rescore_interval == 0):
            report.figures = self.rescore(step)
            if self.stale:
                report.remarks.append(self._stale_remark(report.figures))
        every = policy.policy_interval
        if is_last or self.is_over() or (every and step.iteration % every == 0):
            report.rows = self.policy_report(step).rows
        return report

    def rescore(self, step: StepContext) -> Figures:
        """How far the model has moved on stored completions since it made them. Collective."""
        which = range(self.inputs.rescored)
        before = np.array([self.reference.nll_sum(number) for number in which])
        lengths = np.array([len(self.inputs.completions[number].ids) for number in which])
        drift = measure_drift(self.scorer.sums(step, which), before, lengths, self.reference.noise)
        self.stale = drift.effective_sample_size < self.policy.min_effective_sample_size
        return {"effective_sample_size": drift.effective_sample_size, "rescored_nll_shift": drift.nll_shift}

    def _stale_remark(self, figures: Figures) -> str:
        return (
            f"stale rewards: the stored completions are worth {figures['effective_sample_size']:.0%} of as many new "
            f"ones (--min-effective-sample-size {self.policy.min_effective_sample_size:g}), their NLL moved by "
            f"{figures['rescored_nll_shift']:+.4f} nats per token; generate and score new ones"
        )

    def is_over(self) -> bool:
        """Whether the rewards are too old to go on with."""
        return self.stale and self.policy.on_stale_rewards == "stop"

    def policy_report(self, step: StepContext) -> Report:
        """Lines of policy.jsonl: the probability of every tag for every question. Collective."""
        if self.policy.objective == "grpo":
            return Report()
        rows: list[PolicyLine] = []
        splits: tuple[tuple[Split, Sequence[TokenizedSet]], ...] = (
            ("train", self.inputs.questions),
            ("eval", self.inputs.held_out),
        )
        for split, questions in splits:
            if not questions:
                continue
            log_pi_QN, log_mass_Q = log_policy(self.forks.logp(step, questions))
            if split == "train" and step.iteration:
                self.mass = float(np.exp(log_mass_Q).mean())
            mass_Q = np.exp(log_mass_Q).tolist()
            rows += policy_lines(step.iteration, split, questions, np.exp(log_pi_QN), mass_Q, self.inputs.model)
        return Report(rows=[(POLICY, rows)])

    def common_figures(self, scoring_flops: float) -> Figures:
        """The objective's name, and FLOPs of scoring; those of a partly frozen model are not counted."""
        name = {"objective": self.policy.objective}
        return name if self.last_layers is not None else name | {"scoring_flops": scoring_flops}

    def end(self, step: StepContext) -> None:
        """Say how seldom the model begins with a tag, and that the run is finished, if it is."""
        if not step.is_first_rank:
            return
        if self.mass < _ENOUGH_MASS:
            print(
                f"the model begins an answer with a tag in only {self.mass:.1%} of the cases, and the reward is that "
                "of these: take more steps, a higher --lr or --outside-mass-coef, or start from SSFT with "
                "--train-forking-token",
                flush=True,
            )
        if step.iteration >= step.train_iters or self.is_over():
            reason = "done" if step.iteration >= step.train_iters else "stale rewards"
            write_durably(self.save / FINISHED, json.dumps({"iteration": step.iteration, "reason": reason}))

    # -- checkpoints ---------------------------------------------------------------------------------------------

    @property
    def fingerprint(self) -> str:
        return self.inputs.fingerprint

    @property
    def settled(self) -> tuple[str, ...]:
        """Settings that a run keeps: what its optimizer's state and its reference are made for."""
        return ("objective", "trainable", "anchor", "anchor_top_k")

    def own_state(self) -> ObjectiveState:
        """What the subclass stores in a checkpoint."""
        return ObjectiveState()

    def load_own_state(self, state: ObjectiveState) -> None:
        """Take `own_state` up again."""

    def complete_state(self, state: RunState) -> RunState:
        return PolicyState(
            **structs.asdict(state),
            policy={name: getattr(self.policy, name) for name in self.settled},
            objective=self.own_state(),
            stale=self.stale,
        )

    def check_state(self, run: Path, state: WeightsState) -> None:
        if not isinstance(state, PolicyState):
            raise UserError(f"--load {run}: is no run of this program; give another --save to start one from it")
        for name, value in state.policy.items():
            if not hasattr(self.policy, name) or getattr(self.policy, name) != value:
                flag = name.replace("_", "-")
                raise UserError(f"--load {run}: was started with --{flag} {value}; resume the same way")

    def load_state(self, state: RunState) -> None:
        assert isinstance(state, PolicyState)
        on_first_rank(lambda: (self.save / FINISHED).unlink(missing_ok=True), self.topology)
        self.stale = state.stale
        self.load_own_state(state.objective)
        self.reference = Reference(self.save)

    # -- words ---------------------------------------------------------------------------------------------------

    def introduction(self) -> str:
        return (
            f"{self.policy.objective} | {len(self.inputs.questions)} questions, {len(self.inputs.completions)} stored "
            f"completions in use | trainable: {self.policy.trainable}, anchor: {self.policy.anchor}"
        )

    def notes(self) -> Sequence[str]:
        return (*self.inputs.notes, *([self._remark] if self._remark else []))

    def line(self, row: Mapping[str, object]) -> str:
        return policy_line(row)
