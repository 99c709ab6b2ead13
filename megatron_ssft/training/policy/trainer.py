"""Learning which tag to choose. A step asks for the tags' probabilities, decides, and trains, as an SSFT step does."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megatron_ssft.config import GFPOConfig
from megatron_ssft.config.flags import to_yaml
from megatron_ssft.errors import UserError, shared_error
from megatron_ssft.formats.files import write_durably
from megatron_ssft.formats.run_folder import FINISHED, POLICY, find_latest
from megatron_ssft.objectives.drift import Drift, measure_drift
from megatron_ssft.objectives.forking_policy import log_policy
from megatron_ssft.parallel.checkpoint.run_checkpoint import load_checkpoint, read_state
from megatron_ssft.parallel.collectives import gather_json, on_first_rank
from megatron_ssft.parallel.engine import Engine
from megatron_ssft.parallel.topology import Topology, job_peak_flops
from megatron_ssft.records import MicrobatchPlan
from megatron_ssft.scheduling.accounting import FlopAccountant
from megatron_ssft.training.loop import TrainingLoop
from megatron_ssft.training.policy.completion_scoring import CompletionScorer, planner_for
from megatron_ssft.training.policy.decisions import Decision, build_objective
from megatron_ssft.training.policy.forks import Forks
from megatron_ssft.training.policy.inputs import PolicyInputs, read_inputs
from megatron_ssft.training.policy.reference import (
    Reference,
    refuse_other_inputs,
    stored_index,
    write_reference,
)
from megatron_ssft.training.policy.weights import check_rewards_model, take_weights
from megatron_ssft.training.resume import (
    check_writable,
    continues_in_place,
    keep_assets,
    refuse_contradictions,
    refuse_occupied_folder,
    resumable,
    weights_state,
)
from megatron_ssft.training.run_log import METRICS, NoLog, RunLog, policy_line, truncate_from
from megatron_ssft.training.setup import build_vocabulary
from megatron_ssft.training.signals import StopSignal
from megatron_ssft.training.startup import POLICY_PROGRAM

_KEPT = ("objective", "trainable", "anchor", "anchor_top_k")
"""Settings that a run keeps: what its optimizer's state and its reference are made for."""
_KEPT_BY_SETS = ("questions_per_step", "policy_epochs", "samples_per_question")
"""And these, where a set of drawn tags may be in the middle of its steps."""


_ENOUGH_MASS = 0.9
"""Below this the run's end says how seldom the model begins with a tag."""


def _settled(objective: str) -> tuple[str, ...]:
    """Settings that a resumed run must have in common with its beginning."""
    return _KEPT + (_KEPT_BY_SETS if objective == "gfpo-sampled" else ())


class PolicyTrainer(TrainingLoop):
    """One run of policy learning on one rank. Everything but the model's shards is the same on every rank."""

    def __init__(self, config: GFPOConfig, topology: Topology) -> None:
        """Check all input, build the model, load it, and ask the reference. Raises UserError."""
        self.config, self.topology = config, topology
        self.train_iters = config.training.train_iters
        self.stale = False
        refuse_occupied_folder(config)
        on_first_rank(lambda: check_writable(config), topology)
        self.vocabulary = build_vocabulary(config)
        self.save = Path(config.checkpoint.save)
        resuming = continues_in_place(config)
        index = on_first_rank(lambda: stored_index(self.save) if resuming else {}, topology)
        self.planned_iters = int(index.get("planned_iters", self.train_iters))
        self.inputs = self._read_inputs()
        if resuming:
            refuse_other_inputs(self.save, index, self.inputs.fingerprint, config.policy.reference)
        else:
            self.remark = on_first_rank(lambda: check_rewards_model(config, self.inputs.model), topology)
        on_first_rank(lambda: keep_assets(config), topology)
        tags, size = self.vocabulary.tags, self.vocabulary.size
        self.engine = Engine(config, topology, tags, size)
        untagged = planner_for(self.engine, None, topology.dp_size)
        tagged = planner_for(self.engine, tags if self.inputs.tagged else None, topology.dp_size)
        self.forks = Forks(self.engine, untagged)
        self.scorer = CompletionScorer(self.engine, tagged, self.inputs)
        self.accountant = FlopAccountant(untagged.flops)
        self.peak_flops = job_peak_flops(config, topology)
        self.engine.start(config.policy.last_layers)
        if resuming:
            self._resume()
        else:
            self._begin()
        self.reference = Reference(self.save)
        self.objective = build_objective(self)

    # -- one step ------------------------------------------------------------------------------------------------

    def train_step(self) -> dict[str, object]:
        """Score, decide, train; the row of metrics.jsonl."""
        begin = time.perf_counter()
        decision: Decision = self.objective.decide(self.iteration)
        metrics = self.engine.train_terms(decision.terms, self.learning_rate())
        figures = decision.report(metrics.figures)
        plans = [term.plan for term in decision.terms]
        row = {
            "iteration": self.iteration + 1,
            "objective": self.config.policy.objective,
            "loss": figures.pop("loss", metrics.loss),
            "lr": self.learning_rate(),
            "grad_norm": metrics.grad_norm,
            **figures,
            "questions": decision.questions,
            "pad_sequences": sum(plan.pad_sequences for plan in plans),
            "makespan_over_bound": max(plan.makespan / plan.makespan_lower_bound for plan in plans),
            "trained_sequences": metrics.trained_sequences,
            "trained_tokens": metrics.trained_tokens,
        }
        self.iteration += 1
        row["seconds"] = time.perf_counter() - begin
        return row | self._flops(plans, decision.scoring_flops, row["seconds"])

    def _flops(self, plans: Sequence[MicrobatchPlan], scoring: float, seconds: float) -> dict[str, float]:
        """FLOPs of the step, and its MFU where the GPU is known; those of a partly frozen model are not counted."""
        if self.engine.last_layers is not None:
            return {}
        training = sum(self.accountant.training(plan) for plan in plans)
        figures = {"training_flops": training, "scoring_flops": scoring}
        if self.peak_flops is not None:
            figures["mfu"] = (training + scoring) / (seconds * self.peak_flops)
        return figures

    def advance(self, log: RunLog | None) -> None:
        """A step, the checks that are due after it, and their lines."""
        if self.iteration == 0:
            self._tell_policy(log)
        row = self.train_step()
        policy = self.config.policy
        last = self.iteration == self.train_iters
        if self.inputs.rescored and (last or self.iteration % policy.rescore_interval == 0):
            row |= self.rescore()
        every = policy.policy_interval
        if last or self.is_over() or (every and self.iteration % every == 0):
            self._tell_policy(log)
        if log is None:
            return
        log.step(row)
        share = row.get("effective_sample_size")
        if share is not None and share < policy.min_effective_sample_size:
            log.say(
                f"stale rewards: the stored completions are worth {share:.0%} of as many new ones "
                f"(--min-effective-sample-size {policy.min_effective_sample_size:g}), their NLL moved by "
                f"{row['rescored_nll_shift']:+.4f} nats a token; generate and score new ones"
            )

    def is_over(self) -> bool:
        """Whether the rewards are too old to go on with."""
        return self.stale and self.config.policy.on_stale_rewards == "stop"

    def rescore(self) -> dict[str, float]:
        """How far the model has moved on stored completions since it made them. Collective."""
        which = range(self.inputs.rescored)
        then = np.array([self.reference.nll_sum(number) for number in which])
        lengths = np.array([len(self.inputs.completions[number].ids) for number in which])
        drift: Drift = measure_drift(self.scorer.sums(which), then, lengths, self.reference.noise)
        self.stale = drift.effective_sample_size < self.config.policy.min_effective_sample_size
        return {"effective_sample_size": drift.effective_sample_size, "rescored_nll_shift": drift.nll_shift}

    # -- the tags' probabilities ---------------------------------------------------------------------------------

    def _tell_policy(self, log: RunLog | None) -> None:
        """Lines of policy.jsonl. Collective."""
        if self.config.policy.objective == "grpo":
            return
        for split, questions in (("train", self.inputs.questions), ("eval", self.inputs.held_out)):
            if not questions:
                continue
            log_pi, log_mass = log_policy(self.forks.logp(questions))
            if split == "train" and self.iteration:
                self.mass = float(np.exp(log_mass).mean())
            if log is not None:
                log.rows(
                    POLICY,
                    [
                        {"iteration": self.iteration, "split": split, "id": q.id, "policy": pi.tolist(), "mass": mass}
                        for q, pi, mass in zip(questions, np.exp(log_pi), np.exp(log_mass).tolist())
                    ],
                )

    # -- start, resume, end --------------------------------------------------------------------------------------

    def run(self, stop: StopSignal) -> None:
        """Train to the end, to a SIGTERM, or until the rewards are stale. Raises UserError."""
        on_first_rank(lambda: (self.save / FINISHED).unlink(missing_ok=True), self.topology)
        super().run(stop)
        if self.topology.is_first_rank and self.mass < _ENOUGH_MASS:
            print(
                f"the model begins an answer with a tag in only {self.mass:.1%} of the cases, and the reward is that "
                "of these: take more steps, a higher --lr or --outside-mass-coef, or start from SSFT with "
                "--train-forking-token",
                flush=True,
            )
        if self.topology.is_first_rank and (self.iteration >= self.train_iters or self.is_over()):
            reason = "done" if self.iteration >= self.train_iters else "stale rewards"
            write_durably(self.save / FINISHED, json.dumps({"iteration": self.iteration, "reason": reason}))

    def state(self) -> dict[str, object]:
        """What a checkpoint stores besides weights and optimizer, as JSON."""
        return weights_state(self.config, self.vocabulary) | {
            "iteration": self.iteration,
            "has_optimizer": True,
            "use_distributed_optimizer": self.config.parallel.use_distributed_optimizer,
            "data": self.inputs.fingerprint,
            "policy": {name: getattr(self.config.policy, name) for name in _settled(self.config.policy.objective)},
            "objective": self.objective.state(),
            "stale": self.stale,
        }

    def _read_inputs(self) -> PolicyInputs:
        """Read by the first rank, whose errors all ranks share, and then by the others."""
        kept: list[PolicyInputs] = []

        def read() -> None:
            kept.append(read_inputs(self.config, self.vocabulary, self.planned_iters))

        on_first_rank(read, self.topology)
        if not kept:
            read()
        prints = gather_json(kept[0].fingerprint, self.topology)
        if len(set(prints)) > 1:  # on another node, or a file that is still being written
            raise shared_error(f"--data {self.config.policy.data}: not all ranks read the same input; start again")
        return kept[0]

    def _begin(self) -> None:
        """Load the weights to start from, and ask the reference before anything moves. Raises UserError."""
        policy, start = self.config.policy, Path(self.config.checkpoint.load)
        top_k = None if policy.anchor == "none" else min(policy.anchor_top_k, self.vocabulary.size)
        stays = start if policy.reference is None else Path(policy.reference)
        other = fork = None
        if stays.resolve() != start.resolve():
            take_weights(self.engine, self.vocabulary, stays, "--reference")
            other, fork = self.scorer.measure(top_k), self._reference_fork()
        take_weights(self.engine, self.vocabulary, start, "--load")
        here = self.scorer.measure(top_k if other is None else None)
        if other is None:
            fork = self._reference_fork()
        index = {
            "fingerprint": self.inputs.fingerprint,
            "planned_iters": self.planned_iters,
            "reference": str(stays.resolve()),
            "noise": self._noise(),
        }
        write_reference(self.save, self.engine, index, fork, here, other)

    def _noise(self) -> float:
        """nats^2: how much the likelihood of a completion varies with its neighbours in a microbatch. Collective.

        Nothing of it is drift: the weights are the same. In bfloat16 it grows with the length.
        """
        which = range(self.inputs.rescored)
        if len(which) < 2:
            return 0.0
        whole, half = self.scorer.sums(which), len(which) // 2
        halves = [self.scorer.sums(part) for part in (which[:half], which[half:])]
        return float(np.var(whole - np.concatenate(halves)))

    def _reference_fork(self) -> np.ndarray | None:
        return None if self.config.policy.objective == "grpo" else self.forks.logp(self.inputs.questions)

    def _resume(self) -> None:
        """Go on where the newest checkpoint of this run was. Raises UserError."""
        run = self.save
        iteration = int(on_first_rank(lambda: find_latest(run), self.topology))
        state = on_first_rank(lambda: read_state(run, iteration), self.topology)
        mine = weights_state(self.config, self.vocabulary) | {
            "data": self.inputs.fingerprint,
            "use_distributed_optimizer": self.config.parallel.use_distributed_optimizer,
        }
        if "policy" not in state:
            raise UserError(f"--load {run}: is no run of this program; give another --save to start one from it")
        refuse_contradictions(run, state, mine, finetune=False, otherwise="start again with another --save")
        for name, value in state["policy"].items():
            if getattr(self.config.policy, name) != value:
                flag = name.replace("_", "-")
                raise UserError(f"--load {run}: was started with --{flag} {value}; resume the same way")
        load_checkpoint(self.engine, run, iteration)
        self.iteration, self.stale = iteration, bool(state["stale"])
        self.restored = state["objective"]

    restored: dict[str, object] | None = None
    """The objective's part of the checkpoint that the run goes on from."""

    remark: str | None = None
    """About what could not be checked."""
    mass: float = 1.0
    """gfpo: how probable it is that an answer begins with a tag, when the policy was last asked."""

    # -- log -----------------------------------------------------------------------------------------------------

    def open_log(self, folder: Path | None) -> RunLog | NoLog:
        """JSONL files, trackers and progress."""
        if not self.topology.is_first_rank:
            return NoLog()
        if self.iteration == 0:  # a start that came to nothing may have left its line of iteration 0
            truncate_from(folder / POLICY, 0)
        return RunLog(
            folder, self.config.logging, self.iteration + 1, self.train_iters, files=(METRICS, POLICY), line=policy_line
        )

    def greet(self, log: RunLog, folder: Path | None) -> None:
        """What is trained, on what, how."""
        write_durably(folder / "config.yaml", to_yaml(resumable(self.config), POLICY_PROGRAM))
        policy = self.config.policy
        log.say(
            f"{policy.objective} | {len(self.inputs.questions)} questions, {len(self.inputs.completions)} stored "
            f"completions in use | trainable: {policy.trainable}, anchor: {policy.anchor} | {self.describe_job()}"
        )
        log.say(self.describe_layout())
        for note in (*self.inputs.notes, *([self.remark] if self.remark else [])):
            log.say(note)
