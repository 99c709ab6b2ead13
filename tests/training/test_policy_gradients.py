"""Policy learning: the gradient is the objective's, compared with plain autograd."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_ssft.config import GFPOConfig
from megatron_ssft.config.flags import build_config
from megatron_ssft.objectives.formulas.forking_policy import sample_tags
from megatron_ssft.objectives.policy.draws import generator
from megatron_ssft.parallel.topology import destroy_topology, initialize_topology
from tests.helpers.distributed import run_ranks
from tests.helpers.plain_gpt import PlainGPT
from tests.helpers.policy_cases import (
    EXACT,
    GRPO,
    NO_ANCHOR,
    OTHER,
    SAMPLED,
    values_of,
)
from tests.helpers.policy_runs import (
    build_trainer,
    next_gradients,
    relative_error,
)
from tests.helpers.training_runs import MODEL, assemble, weight_shards


def plain_logits(plain, vocabulary, question):
    """Per tag [its tokens, vocabulary]: what the model says at each of its tokens, every tag a sequence of its own."""
    prompt = question.prompt_ids.tolist()
    return [plain.logits(prompt + list(tag[:-1]), vocabulary.size)[len(prompt) - 1 :] for tag in vocabulary.tags.ids]


def logp_of(logits, vocabulary):
    """[N]: log-probability of each tag's ids."""
    tags = vocabulary.tags.ids
    return torch.stack([of.log_softmax(-1)[range(len(tag)), tag].sum() for of, tag in zip(logits, tags)])


def plain_logp(plain, vocabulary, question):
    """[N]: log-probability of each tag's ids behind the prompt."""
    return logp_of(plain_logits(plain, vocabulary, question), vocabulary)


def plain_completion(plain, vocabulary, question, completion):
    """Log-probabilities [L, vocabulary] at the places of a completion, and the completion's ids [L]."""
    before = question.prompt_ids.tolist() + list(vocabulary.tags.ids[completion.tag])
    ids = completion.ids.tolist()
    log_p = plain.logits(before + ids[:-1], vocabulary.size).log_softmax(-1)
    return log_p[len(before) - 1 :], ids


def expected_rewards(logp_QN, trainer):
    """J of every question; its gradient with group normalisation is that of J / sigma, sigma held."""
    j_Q = (logp_QN.softmax(-1) * torch.tensor(trainer.objective.inputs.reward_QN)).sum(-1)
    if not trainer.config.policy.group_normalization:
        return j_Q
    held = j_Q.detach()
    return (j_Q - held) / ((held * (1 - held)).sqrt() + 1e-4)


def sampled_rewards(logp_QN, old_QN, trainer):
    """PPO's clipped surrogate over the tags that were drawn for the first steps."""
    policy, inputs = trainer.config.policy, trainer.objective.inputs
    rngs = [generator(trainer.config.run.training.seed, "tags", 0, question.id) for question in inputs.questions]
    drawn = sample_tags(old_QN.numpy(), inputs.n_QN, inputs.sum_QN, policy.samples_per_question, rngs)
    tags_QG, r_QG = map(torch.tensor, drawn)
    advantage_QG = (r_QG - r_QG.mean(-1, keepdim=True)) / (r_QG.std(-1, keepdim=True) + 1e-4)
    ratio_QG = (logp_QN.log_softmax(-1) - old_QN.log_softmax(-1)).exp().gather(1, tags_QG)
    clipped_QG = ratio_QG.clamp(1 - policy.clip_eps, 1 + policy.clip_eps_high)
    return torch.minimum(ratio_QG * advantage_QG, clipped_QG * advantage_QG).mean(-1)


def way_to_optimum(log_pi_QN, reference_QN, trainer):
    """[Q], 0 in value: minus the variance over the tags of R - kl log(pi / pi_ref) - entropy log pi, which is 0 at the
    optimum, scaled so that its derivative by log pi is the natural gradient over N."""
    policy = trainer.config.policy
    reward_QN = torch.tensor(trainer.objective.inputs.reward_QN)
    worth_QN = reward_QN - policy.kl_coef * (log_pi_QN - reference_QN) - policy.entropy_coef * log_pi_QN
    variance_Q = worth_QN.var(-1, correction=0) / (2 * (policy.kl_coef + policy.entropy_coef))
    return variance_Q.detach() - variance_Q


def held_log_mass(logits_of_tags, vocabulary):
    """log(mass) of a question's tags, whose gradient moves the logits of a prefix's tokens together.

    Under every prefix of the tags: the log-probability of all tokens that tags have there, with its gradient by their
    logits averaged over them, times the share of the tags that have the prefix.
    """
    tags = vocabulary.tags.ids
    log_mass = torch.logsumexp(logp_of(logits_of_tags, vocabulary), 0).detach()
    held = 0.0
    for prefix in sorted({tag[:place] for tag in tags for place in range(len(tag))}):
        below = [tag for tag in tags if tag[: len(prefix)] == prefix]
        tokens = sorted({tag[len(prefix)] for tag in below})
        logits = logits_of_tags[tags.index(below[0])][len(prefix)]
        together = logits.detach()[tokens] + (logits[tokens] - logits[tokens].detach()).mean()
        logits = logits.index_put((torch.tensor(tokens),), together)
        log_q = torch.logsumexp(logits[tokens], 0) - torch.logsumexp(logits, 0)
        held = held + len(below) / len(tags) * log_q
    return log_mass + held - held.detach()


def fork_loss(models, trainer):
    """The whole objective of GFPO, minus, with the anchor."""
    plain, start, frozen = models
    policy, inputs, vocabulary = trainer.config.policy, trainer.objective.inputs, trainer.vocabulary
    logits = [plain_logits(plain, vocabulary, q) for q in inputs.questions]
    logp_QN = torch.stack([logp_of(of, vocabulary) for of in logits])
    with torch.no_grad():
        old_QN = torch.stack([plain_logp(start, vocabulary, q) for q in inputs.questions])
        reference_QN = torch.stack([plain_logp(frozen, vocabulary, q) for q in inputs.questions]).log_softmax(-1)
    exact = policy.objective == "gfpo-exact"
    value_Q = expected_rewards(logp_QN, trainer) if exact else sampled_rewards(logp_QN, old_QN, trainer)
    log_pi_QN = logp_QN.log_softmax(-1)
    kl_Q = (log_pi_QN.exp() * (log_pi_QN - reference_QN)).sum(-1)
    entropy_Q = -(log_pi_QN.exp() * log_pi_QN).sum(-1)
    value_Q = value_Q - policy.kl_coef * kl_Q + policy.entropy_coef * entropy_Q
    if policy.policy_gradient == "natural":
        value_Q = value_Q.detach() + way_to_optimum(log_pi_QN, reference_QN, trainer)
    signal_Q = torch.tensor(np.ptp(inputs.reward_QN, axis=1) > 0)
    mass_Q = torch.stack([held_log_mass(of, vocabulary) for of in logits])
    divergence_Q = (reference_QN.exp() * (reference_QN - log_pi_QN)).sum(-1)
    held_Q = 10 * (1 - logp_QN.detach().exp().sum(-1)) * ~signal_Q * (divergence_Q.detach() - divergence_Q)
    loss = -value_Q[signal_Q].mean() - policy.outside_mass_coef * (mass_Q + held_Q).mean()
    if policy.anchor == "kl":
        kl = []
        for completion in inputs.completions:
            question = inputs.questions[completion.question]
            log_q, _ = plain_completion(plain, vocabulary, question, completion)
            with torch.no_grad():
                log_p, _ = plain_completion(frozen, vocabulary, question, completion)
            kl.append((log_p.exp() * (log_p - log_q)).sum(-1))
        loss = loss + policy.anchor_coef * torch.cat(kl).mean()
    return loss


def token_loss(models, trainer):
    """GRPO over all completions."""
    plain, start, frozen = models
    policy, inputs, vocabulary = trainer.config.policy, trainer.objective.inputs, trainer.vocabulary
    losses = []
    for number, question in enumerate(inputs.questions):
        group = [c for c in inputs.completions if c.question == number]
        rewards = torch.tensor([c.reward for c in group], dtype=torch.float64)
        advantages = (rewards - rewards.mean()) / (rewards.std() + 1e-4)
        for completion, advantage in zip(group, advantages):
            log_p, ids = plain_completion(plain, vocabulary, question, completion)
            now = log_p[range(len(ids)), ids]
            with torch.no_grad():
                old = plain_completion(start, vocabulary, question, completion)[0][range(len(ids)), ids]
                reference = plain_completion(frozen, vocabulary, question, completion)[0][range(len(ids)), ids]
            ratio = (now - old).exp()
            clipped = ratio.clamp(1 - policy.clip_eps, 1 + policy.clip_eps_high)
            k3 = (reference - now).exp() - (reference - now) - 1
            losses.append(policy.kl_coef * k3 - torch.minimum(ratio * advantage, clipped * advantage))
    if policy.token_normalization == "token":
        return torch.cat(losses).mean()
    return torch.stack([each.mean() for each in losses]).mean()


def against_autograd(cases):
    """(row of the log, plain loss, relative error of every weight's gradient) of the third step. Runs on one rank."""
    topology = initialize_topology(build_config(cases[0], GFPOConfig).run)
    found = []
    for values in cases:
        trainer = build_trainer(values, topology)
        config = trainer.config
        start = plain_model(trainer.engine, config)
        moving = trainer.train_step()[1]["grad_norm"], trainer.train_step()[1]["grad_norm"]
        assert min(moving) > 1e-3
        plain = plain_model(trainer.engine, config)
        row, shards = next_gradients(trainer)
        gradients = assemble([{"shards": shards}])
        frozen = start
        if config.policy.reference:
            other = {"load": config.policy.reference, "reference": None, "save": values["save"] + " other"}
            frozen = plain_model(build_trainer(values | other, topology).engine, config)
        loss = token_loss if config.policy.objective == "grpo" else fork_loss
        loss = loss((plain, start, frozen), trainer)
        loss.backward()
        errors = {
            name: relative_error(np.zeros_like(gradients[name]) if w.grad is None else w.grad.numpy(), gradients[name])
            for name, w in plain.weights.items()
        }
        found.append((row, float(loss.detach()), errors))
    destroy_topology()
    return found


def plain_model(engine, config):
    """In float64, with the weights of the engine."""
    weights = assemble([{"shards": weight_shards(engine)}])
    weights = {name: value.astype(np.float64) for name, value in weights.items()}
    return PlainGPT(weights, MODEL["num_layers"], MODEL["num_attention_heads"], MODEL["num_query_groups"])


EVERYTHING = {"questions_per_step": 99, "anchor_completions": 999, "anchor_top_k": 999}
PLAIN_CASES = {
    "exact": ("tied special", EXACT | EVERYTHING | {OTHER: True, "kl_coef": 0.2, "entropy_coef": 0.1}),
    "natural": (
        "untied special",
        EXACT | EVERYTHING | {"policy_gradient": "natural", OTHER: True, "kl_coef": 0.2, "entropy_coef": 0.1},
    ),
    "natural, text": ("tied text", EXACT | EVERYTHING | {"policy_gradient": "natural", "entropy_coef": 0.2}),
    "normalised": ("untied text", EXACT | EVERYTHING | {"group_normalization": True}),
    "sampled": ("tied text", SAMPLED | NO_ANCHOR | {"questions_per_step": 99, OTHER: True, "kl_coef": 0.2}),
    "sampled, anchor": ("untied special", SAMPLED | EVERYTHING | {"clip_eps": 0.1, "clip_eps_high": 0.15}),
    "grpo": ("tied special", GRPO | {"questions_per_step": 99, OTHER: True, "kl_coef": 0.1}),
    "grpo, sequences": ("untied text", GRPO | {"questions_per_step": 99, "token_normalization": "sequence"}),
}


def without_signal(rewards, ids):
    """Another rewards file beside `rewards`, in which these questions have one reward under all tags."""
    rows = [json.loads(line) for line in rewards.read_text().splitlines()]
    rows = [row | {"sum": [1] * len(row["sum"])} if row["id"] in ids else row for row in rows]
    path = rewards.with_name("SOME_EQUAL.jsonl")
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_gradient_is_that_of_the_objective(models, inputs, tmp_path):
    """The third step, whose weights are neither those of the start nor those of the reference, and clips something."""
    inputs = inputs | {"rewards": str(without_signal(Path(inputs["rewards"]), ("q1", "q4")))}
    cases = [values_of(c, models, inputs, tmp_path / n, lr=1e-3) for n, c in PLAIN_CASES.items()]
    (found,) = run_ranks(1, against_autograd, cases)
    for name, (row, plain_loss, errors) in zip(PLAIN_CASES, found):
        assert row["loss"] == pytest.approx(plain_loss, rel=1e-5, abs=1e-6), name
        assert row["kl"] > 1e-4 and row.get("anchor_kl", 1.0) > 1e-4 and row.get("clip_fraction", 1.0) > 0, name
        assert max(errors.values()) < 2e-5, (name, errors)
