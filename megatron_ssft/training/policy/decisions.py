"""What a step trains on, for each objective: from the state of the policy to loss terms."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from megatron_ssft.objectives.forking_policy import (
    ForkCoefficients,
    ForkObjective,
    exact_objective,
    log_policy,
    sample_tags,
    sampled_objective,
)
from megatron_ssft.objectives.token_policy import group_advantages
from megatron_ssft.parallel.loss_terms import LossTerm
from megatron_ssft.training.policy.draws import generator, nth_batch
from megatron_ssft.training.policy.terms import anchor_term, fork_term, grpo_term

if TYPE_CHECKING:
    from megatron_ssft.training.policy.trainer import PolicyTrainer


@dataclass(frozen=True)
class Decision:
    """What a step trains on, and what it has found out for that."""

    terms: Sequence[LossTerm]
    questions: int
    scoring_flops: float
    report: Callable[[dict[str, float]], dict[str, object]]
    """Sums that the terms report -> figures of the log, `loss` among them."""


class Objective(Protocol):
    """Decides every step."""

    def decide(self, iteration: int) -> Decision: ...

    def state(self) -> dict[str, object]: ...


def build_objective(run: PolicyTrainer) -> Objective:
    """The objective that the configuration asks for, at the place where the run goes on."""
    return TokenObjective(run) if run.config.policy.objective == "grpo" else ForkingObjective(run)


class ForkingObjective:
    """GFPO: the policy over the tags, exact or from drawn tags, and the anchor that keeps what follows them."""

    def __init__(self, run: PolicyTrainer) -> None:
        self.run, policy = run, run.config.policy
        self.coefficients = ForkCoefficients(
            kl=policy.kl_coef,
            entropy=policy.entropy_coef,
            outside_mass=policy.outside_mass_coef,
            group_normalization=policy.group_normalization,
            clip_low=policy.clip_eps or 0.0,
            clip_high=policy.clip_eps_high or 0.0,
        )
        self.old_logp_QN: np.ndarray | None = None
        """gfpo-sampled: what the tags of the present rollout set were drawn from."""
        if run.restored is not None and run.restored.get("old_logp") is not None:
            self.old_logp_QN = np.array(run.restored["old_logp"])

    def state(self) -> dict[str, object]:
        """For the checkpoint."""
        return {"old_logp": None if self.old_logp_QN is None else self.old_logp_QN.tolist()}

    def decide(self, iteration: int) -> Decision:
        """Ask for the tags' probabilities, take the objective's gradient, weight the tags by it."""
        run, policy, inputs = self.run, self.run.config.policy, self.run.inputs
        exact = policy.objective == "gfpo-exact"
        number = iteration if exact else iteration // policy.policy_epochs
        chosen = nth_batch(
            len(inputs.questions), policy.questions_per_step, number, run.config.training.seed, "questions"
        )
        batch, plan = run.forks.plan([inputs.questions[q] for q in chosen])
        logp_QN = run.forks.planned_logp(batch, plan)
        found = self._objective(iteration, chosen, logp_QN, exact)
        terms = [fork_term(batch, plan, found.gradient_QN)]
        if policy.anchor == "kl":
            anchors, seed = inputs.anchors, run.config.training.seed
            which = [anchors[i] for i in nth_batch(len(anchors), policy.anchor_completions, iteration, seed, "anchor")]
            terms.append(anchor_term(run.scorer, run.reference, which, policy.anchor_coef))

        def report(sums: dict[str, float]) -> dict[str, object]:
            figures = dict(found.figures) | self._rewards(logp_QN, chosen) | {"loss": -found.value}
            if policy.anchor == "kl":
                tokens = sums["completion_tokens"]
                before = sum(float(run.reference.reference_nll(c).sum(dtype=np.float64)) for c in which)
                figures["anchor_kl"] = sums["anchor_kl"] / tokens
                figures["completion_nll"] = sums["completion_nll"] / tokens
                figures["completion_nll_shift"] = (sums["completion_nll"] - before) / tokens
                figures["loss"] += policy.anchor_coef * figures["anchor_kl"]
            return figures

        return Decision(terms, len(chosen), run.accountant.forward(plan), report)

    def _objective(self, iteration: int, chosen: list[int], logp_QN: np.ndarray, exact: bool) -> ForkObjective:
        inputs, reference_QN = self.run.inputs, self.run.reference.fork_QN[chosen]
        if exact:
            return exact_objective(logp_QN, inputs.reward_QN[chosen], reference_QN, self.coefficients)
        policy, seed = self.run.config.policy, self.run.config.training.seed
        rollout_set, epoch = divmod(iteration, policy.policy_epochs)
        if epoch == 0:
            self.old_logp_QN = logp_QN
        rngs = [generator(seed, "tags", rollout_set, inputs.questions[q].id) for q in chosen]
        n_QN, sum_QN = inputs.n_QN[chosen], inputs.sum_QN[chosen]
        tags_QG, reward_QG = sample_tags(self.old_logp_QN, n_QN, sum_QN, policy.samples_per_question, rngs)
        return sampled_objective(logp_QN, self.old_logp_QN, tags_QG, reward_QG, reference_QN, self.coefficients)

    def _rewards(self, logp_QN: np.ndarray, chosen: list[int]) -> dict[str, float]:
        """Expected reward of the policy before the step, of uniform choice, and of the best single tag."""
        reward_QN = self.run.inputs.reward_QN[chosen]
        pi_QN = np.exp(log_policy(logp_QN)[0])
        return {
            "reward": float((pi_QN * reward_QN).sum(axis=1).mean()),
            "reward_uniform": float(reward_QN.mean()),
            "reward_best_fixed": float(reward_QN.mean(axis=0).max()),
        }


class TokenObjective:
    """GRPO on every token of stored completions."""

    def __init__(self, run: PolicyTrainer) -> None:
        self.run = run
        self.of_question: list[list[int]] = [[] for _ in run.inputs.questions]
        for number, completion in enumerate(run.inputs.completions):
            self.of_question[completion.question].append(number)
        rewards = [np.array([run.inputs.completions[n].reward for n in group]) for group in self.of_question]
        advantages = group_advantages(rewards, run.config.policy.group_normalization)
        self.advantages = {n: a for group, of in zip(self.of_question, advantages) for n, a in zip(group, of)}

    def state(self) -> dict[str, object]:
        """Nothing: stored likelihoods are of the start, and all draws are functions of the step."""
        return {}

    def decide(self, iteration: int) -> Decision:
        """All completions of the step's questions."""
        run, policy, inputs = self.run, self.run.config.policy, self.run.inputs
        chosen = nth_batch(
            len(inputs.questions), policy.questions_per_step, iteration, run.config.training.seed, "questions"
        )
        chosen = list(dict.fromkeys(chosen))  # over the border of an epoch a question may come twice
        which = [number for q in chosen for number in self.of_question[q]]
        term = grpo_term(run.scorer, run.reference, which, self.advantages, policy)
        rewards = [inputs.completions[number].reward for number in which]

        def report(sums: dict[str, float]) -> dict[str, object]:
            tokens = sums["completion_tokens"]
            before = sum(map(run.reference.nll_sum, which))
            return {
                "reward_stored": float(np.mean(rewards)),
                "kl": sums["kl"],
                "clip_fraction": sums["clipped"] / tokens,
                "completion_nll": sums["completion_nll"] / tokens,
                "completion_nll_shift": (sums["completion_nll"] - before) / tokens,
            }

        return Decision([term], len(chosen), 0.0, report)
