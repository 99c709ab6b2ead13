"""Global Forking Policy Optimization: policy gradients at the forking token alone, and an anchor for what follows it.

A step asks for the tags' probabilities, takes the objective's derivative by them outside the model
(`formulas/forking_policy.py`), and trains each tag as a completion of its prompt, weighted by that derivative.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from megatron_ssft.config import GFPOConfig
from megatron_ssft.errors import UserError
from megatron_ssft.formats.metrics import GFPOMetrics
from megatron_ssft.formats.train_state import ObjectiveState
from megatron_ssft.objectives.formulas.forking_policy import (
    ForkCoefficients,
    ForkObjective,
    exact_objective,
    has_signal,
    log_policy,
    sample_tags,
    sampled_objective,
)
from megatron_ssft.objectives.formulas.outside_mass import hold
from megatron_ssft.objectives.objective import Decision, Figures, Report, StepContext
from megatron_ssft.objectives.policy.anchor_term import anchor_term
from megatron_ssft.objectives.policy.draws import generator, nth_batch
from megatron_ssft.objectives.policy.forks import fork_term
from megatron_ssft.objectives.policy.objective import PolicyObjective
from megatron_ssft.parallel.topology import Topology
from megatron_ssft.tokenizers.vocabulary import Vocabulary


class GFPO(PolicyObjective):
    """The policy over the tags, exact or from drawn tags (--objective gfpo-exact, gfpo-sampled)."""

    metrics = GFPOMetrics

    def __init__(self, config: GFPOConfig, vocabulary: Vocabulary, topology: Topology) -> None:
        super().__init__(config, vocabulary, topology)
        policy = config.policy
        self.is_exact = policy.objective == "gfpo-exact"
        self.coefficients = ForkCoefficients(
            kl=policy.kl_coef,
            entropy=policy.entropy_coef,
            natural=policy.policy_gradient == "natural",
            group_normalization=bool(policy.group_normalization),
            clip_low=policy.clip_eps or 0.0,
            clip_high=policy.clip_eps_high or 0.0,
        )
        self.old_logp_QN: np.ndarray | None = None
        """gfpo-sampled: what the tags of the present rollout set were drawn from."""

    def decide(self, step: StepContext) -> Decision:
        """Ask for the tags' probabilities, take the objective's gradient, weight the tags by it."""
        policy, seed = self.policy, self.config.run.training.seed
        number = step.iteration if self.is_exact else step.iteration // self._epochs_per_set
        questions = nth_batch(len(self.inputs.questions), policy.questions_per_step, number, seed, "questions")
        planned = self.forks.plan(step, [self.inputs.questions[q] for q in questions])
        with step.part("scoring"):
            logp_QNT = self.forks.planned_logp(step, planned)
        logp_QN = logp_QNT.sum(axis=2)
        objective = self._objective(step.iteration, questions, logp_QN)
        mass_QNT, mass_value = self._outside_mass(questions, logp_QNT)
        terms = [fork_term(planned, objective.gradient_QN[:, :, None] + mass_QNT)]
        anchored: list[int] = []
        if policy.anchor == "kl":
            anchors = self.inputs.anchors
            places = nth_batch(len(anchors), policy.anchor_completions, step.iteration, seed, "anchor")
            anchored = [anchors[i] for i in places]
            terms.append(anchor_term(step, self.scorer, self.reference, anchored, policy.anchor_coef))

        def figures(sums: Mapping[str, float]) -> Figures:
            row = dict(objective.figures) | self._rewards(logp_QN, questions)
            row |= {"loss": -objective.value - mass_value}
            if anchored:
                row |= self._anchor_figures(sums, anchored)
                row["loss"] += policy.anchor_coef * row["anchor_kl"]
            row["truncated_share"] = self.inputs.truncated_share(questions)
            return row | self.common_figures(step.accountant.forward(planned.plan))

        return Decision(
            terms=terms,
            figures=figures,
            questions=len(questions),
            scoring_flops=step.accountant.forward(planned.plan),
        )

    @property
    def _epochs_per_set(self) -> int:
        assert self.policy.policy_epochs is not None, "gfpo-sampled has a number of steps per set of drawn tags"
        return self.policy.policy_epochs

    def _objective(self, iteration: int, chosen: Sequence[int], logp_QN: np.ndarray) -> ForkObjective:
        """What is maximised and its derivative by `logp_QN`, for the chosen questions."""
        inputs, seed = self.inputs, self.config.run.training.seed
        assert self.reference.fork_QN is not None
        reference_QN = self.reference.fork_QN[chosen]
        if self.is_exact:
            return exact_objective(logp_QN, inputs.reward_QN[chosen], reference_QN, self.coefficients)
        rollout_set, epoch = divmod(iteration, self._epochs_per_set)
        if epoch == 0:
            self.old_logp_QN = logp_QN
        if self.old_logp_QN is None:
            raise UserError(
                f"--load: the checkpoint holds no old_logp, and step {iteration + 1} goes on with tags drawn from it; "
                "load another one"
            )
        rngs = [generator(seed, "tags", rollout_set, inputs.questions[q].id) for q in chosen]
        n_QN, sum_QN = inputs.n_QN[chosen], inputs.sum_QN[chosen]
        assert self.policy.samples_per_question is not None
        tags_QG, reward_QG = sample_tags(self.old_logp_QN, n_QN, sum_QN, self.policy.samples_per_question, rngs)
        signal_Q = has_signal(inputs.reward_QN[chosen])
        return sampled_objective(
            logp_QN, self.old_logp_QN, tags_QG, reward_QG, reference_QN, self.coefficients, signal_Q
        )

    def _outside_mass(self, chosen: Sequence[int], logp_QNT: np.ndarray) -> tuple[np.ndarray, float]:
        """[Q, N, T]: what raises the tags' joint probability, of every question; and how much that is worth now."""
        coef, logp_QN = self.policy.outside_mass_coef, logp_QNT.sum(axis=2)
        assert coef is not None and self.reference.fork_QN is not None
        held_Q = ~has_signal(self.inputs.reward_QN[chosen])
        hold_QN = hold(logp_QN, self.reference.fork_QN[chosen], held_Q)
        weight_QNT = self.forks.tree.push(logp_QNT) + hold_QN[:, :, None]
        return coef * weight_QNT / len(logp_QN), coef * float(log_policy(logp_QN)[1].mean())

    def _anchor_figures(self, sums: Mapping[str, float], anchored: Sequence[int]) -> Figures:
        """How far the stored completions have moved, in nats per token."""
        tokens = sums["completion_tokens"]
        before = sum(float(self.reference.reference_nll(c).sum(dtype=np.float64)) for c in anchored)
        return {
            "anchor_kl": sums["anchor_kl"] / tokens,
            "completion_nll": sums["completion_nll"] / tokens,
            "completion_nll_shift": (sums["completion_nll"] - before) / tokens,
        }

    def _rewards(self, logp_QN: np.ndarray, chosen: Sequence[int]) -> Figures:
        """Expected reward of the policy before the step, of uniform choice, of the best single tag; who has signal."""
        reward_QN = self.inputs.reward_QN[chosen]
        pi_QN = np.exp(log_policy(logp_QN)[0])
        return {
            "reward": float((pi_QN * reward_QN).sum(axis=1).mean()),
            "reward_uniform": float(reward_QN.mean()),
            "reward_best_fixed": float(reward_QN.mean(axis=0).max()),
            "signal_questions": int(has_signal(reward_QN).sum()),
        }

    # -- the tags' probabilities ---------------------------------------------------------------------------------

    def before_step(self, step: StepContext) -> Report:
        """The policy before anything has moved."""
        return self.policy_report(step) if step.iteration == 0 else Report()

    def reference_fork(self, step: StepContext) -> np.ndarray:
        return self.forks.logp(step, self.inputs.questions)

    # -- checkpoints ---------------------------------------------------------------------------------------------

    @property
    def settled(self) -> tuple[str, ...]:
        """A set of drawn tags may be in the middle of its steps."""
        by_sets = ("questions_per_step", "policy_epochs", "samples_per_question")
        return super().settled + (() if self.is_exact else by_sets)

    def own_state(self) -> ObjectiveState:
        return ObjectiveState(old_logp=None if self.old_logp_QN is None else self.old_logp_QN.tolist())

    def load_own_state(self, state: ObjectiveState) -> None:
        if isinstance(state.old_logp, list):
            self.old_logp_QN = np.array(state.old_logp)
