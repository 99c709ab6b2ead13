"""Policy learning: what the layout must not change, what the gradient must be, and which weights may move."""

from __future__ import annotations

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
from tests.helpers.policy_runs import (
    build_trainer,
    gradients_of,
    next_gradients,
    relative_error,
    run_and_tell,
    run_values,
    write_inputs,
    write_models,
)
from tests.helpers.training_runs import MODEL, assemble, weight_shards

TP2, PP2 = {"tensor_model_parallel_size": 2}, {"pipeline_model_parallel_size": 2}
SP, VPP = TP2 | {"sequence_parallel": True}, PP2 | {"num_layers_per_virtual_pipeline_stage": 1}
DIST, FULL = {"use_distributed_optimizer": True}, {"recompute_granularity": "full"}
PADDED, CONCATENATED = {"sequence_layout": "padded"}, {"sequence_layout": "concatenated"}
SMALL = {"max_tokens_per_microbatch": 20}
"""Hardly more than a sequence: the tags of a question come to stand in different streams."""

EXACT, SAMPLED, GRPO = {"objective": "gfpo-exact"}, {"objective": "gfpo-sampled"}, {"objective": "grpo"}
NO_ANCHOR = {"anchor": "none", "rescore_interval": 0}
OTHER = "another reference"
"""Stands for --reference: the second model of the kind."""
CASES = {
    "exact, anchor": ("tied special", EXACT | {OTHER: True, "anchor_completions": 20, "kl_coef": 0.1}),
    "exact, text": (
        "untied text",
        EXACT | {"anchor_completions": 20, "entropy_coef": 0.1, "group_normalization": True},
    ),
    "sampled": ("untied special", SAMPLED | NO_ANCHOR | {"policy_epochs": 2, "kl_coef": 0.1}),
    "sampled, text": ("tied text", SAMPLED | {OTHER: True, "policy_epochs": 2, "anchor_completions": 9}),
    "grpo": ("untied special", GRPO | {OTHER: True, "kl_coef": 0.1}),
    "grpo, sequences": ("tied text", GRPO | {OTHER: True, "kl_coef": 0.1, "token_normalization": "sequence"}),
    "one of each": ("tied special", EXACT | {OTHER: True, "questions_per_step": 1, "anchor_completions": 1}),
    "last layer": ("untied special", EXACT | {OTHER: True, "trainable": "last-1"}),
    "tag rows": ("untied special", EXACT | {"trainable": "tag-rows", "rescore_interval": 0}),
    "tied tag rows": ("tied special", EXACT | {"trainable": "tag-rows", "anchor": "kl", OTHER: True}),
}
LAYOUTS = {
    "one process": (1, [{}, FULL, SMALL, PADDED, CONCATENATED, DIST | PADDED | FULL]),
    "DP2": (2, [{}, SMALL | DIST, PADDED, CONCATENATED | {"overlap_grad_reduce": True}]),
    "TP2": (2, [TP2, SP | SMALL, SP | FULL | DIST, SP | PADDED]),
    "PP2": (2, [PP2, PP2 | FULL | SMALL, PP2 | PADDED | DIST]),
    "VPP": (2, [VPP, VPP | SMALL, VPP | PADDED]),
    "TP2 x PP2": (4, [SP | PP2, TP2 | PP2 | DIST | FULL]),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    run_ranks(1, write_models, str(folder))
    return folder


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("inputs"))


def values_of(case, models, inputs, save, **overrides):
    kind, values = case
    values = dict(values)
    if values.pop(OTHER, False):
        values["reference"] = str(models / f"{kind} 1")
    return run_values(models, kind, inputs, save, **values, **overrides)


def in_turn(cases, variants, first):
    """(case, variant) of every case: variants take turns, and start elsewhere in every layout."""
    return [(case, variants[(first + i) % len(variants)]) for i, case in enumerate(cases)]


# -- the layout changes nothing ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def alone(models, inputs, tmp_path_factory):
    """What one process tells of every case, from rows."""
    folder = tmp_path_factory.mktemp("alone")
    rows = PADDED | {"micro_batch_size": 4}
    cases = [values_of(case, models, inputs, folder / name, **rows) for name, case in CASES.items()]
    (told,) = run_ranks(1, run_and_tell, cases)
    return dict(zip(CASES, told))


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_changes_nothing(alone, models, inputs, tmp_path, layout):
    ranks, variants = LAYOUTS[layout]
    runs = in_turn(CASES, variants, list(LAYOUTS).index(layout))
    cases = [values_of(CASES[c], models, inputs, tmp_path / str(i), **o) for i, (c, o) in enumerate(runs)]
    results = run_ranks(ranks, run_and_tell, cases, timeout=300)
    for (case, overrides), *told in zip(runs, *results):
        assert_same(alone[case], told, f"{case}, {layout}, {overrides}")


def assert_same(expected, told, where):
    for a, *rows in zip(expected["rows"], *(t["rows"] for t in told), strict=True):
        for row in rows:
            assert numbers(row) == numbers(rows[0]), where  # the same on all ranks
        got, wanted = numbers(rows[0]), numbers(a)
        assert got.keys() == wanted.keys()
        for name, value in wanted.items():
            rel = 1e-4 if name == "grad_norm" else 2e-5
            assert got[name] == pytest.approx(value, rel=rel, abs=2e-6), (where, name, a["iteration"])
    if expected["fork"] is not None:
        np.testing.assert_allclose(told[0]["fork"], expected["fork"], rtol=2e-4, atol=2e-4, err_msg=where)
    if gradients_of(told) is not None:
        gradients_a, gradients_b = assemble(gradients_of([expected])), assemble(gradients_of(told))
        assert gradients_a.keys() == gradients_b.keys()
        largest = max(np.linalg.norm(g) for g in gradients_a.values())
        assert largest > 1e-3
        for name, a in gradients_a.items():
            error = np.linalg.norm(gradients_b[name] - a)
            assert error <= 1e-5 * max(np.linalg.norm(a), 1e-2 * largest), (where, name, error / np.linalg.norm(a))
    weights_a, weights_b = assemble([expected]), assemble(told)
    assert weights_a.keys() == weights_b.keys()
    for name, value in weights_a.items():
        np.testing.assert_allclose(weights_b[name], value, rtol=1e-4, atol=1e-4, err_msg=f"{where}: {name}")


PLANNED = ("seconds", "pad_sequences", "makespan_over_bound", "training_flops", "scoring_flops")
"""What the plan decides."""


def numbers(row):
    return {name: v for name, v in row.items() if name not in PLANNED and not isinstance(v, str)}


# -- the gradient is the objective's -------------------------------------------------------------------------------


def plain_logp(plain, vocabulary, question):
    """[N]: log-probability of each tag's ids behind the prompt, every tag a sequence of its own."""
    prompt, found = question.prompt_ids.tolist(), []
    for tag in vocabulary.tags.ids:
        log_p = plain.logits(prompt + list(tag[:-1]), vocabulary.size).log_softmax(-1)
        found.append(sum(log_p[len(prompt) - 1 + i, token] for i, token in enumerate(tag)))
    return torch.stack(found)


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


def fork_loss(models, trainer):
    """The whole objective of GFPO, minus, with the anchor."""
    plain, start, frozen = models
    policy, inputs, vocabulary = trainer.config.policy, trainer.objective.inputs, trainer.vocabulary
    logp_QN = torch.stack([plain_logp(plain, vocabulary, q) for q in inputs.questions])
    with torch.no_grad():
        old_QN = torch.stack([plain_logp(start, vocabulary, q) for q in inputs.questions])
        reference_QN = torch.stack([plain_logp(frozen, vocabulary, q) for q in inputs.questions]).log_softmax(-1)
    exact = policy.objective == "gfpo-exact"
    value_Q = expected_rewards(logp_QN, trainer) if exact else sampled_rewards(logp_QN, old_QN, trainer)
    log_pi_QN = logp_QN.log_softmax(-1)
    kl_Q = (log_pi_QN.exp() * (log_pi_QN - reference_QN)).sum(-1)
    entropy_Q = -(log_pi_QN.exp() * log_pi_QN).sum(-1)
    value_Q = value_Q - policy.kl_coef * kl_Q + policy.entropy_coef * entropy_Q
    value_Q = value_Q + policy.outside_mass_coef * logp_QN.exp().sum(-1).log()
    loss = -value_Q.mean()
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
    "normalised": ("untied text", EXACT | EVERYTHING | {"group_normalization": True}),
    "sampled": ("tied text", SAMPLED | NO_ANCHOR | {"questions_per_step": 99, OTHER: True, "kl_coef": 0.2}),
    "sampled, anchor": ("untied special", SAMPLED | EVERYTHING | {"clip_eps": 0.1, "clip_eps_high": 0.15}),
    "grpo": ("tied special", GRPO | {"questions_per_step": 99, OTHER: True, "kl_coef": 0.1}),
    "grpo, sequences": ("untied text", GRPO | {"questions_per_step": 99, "token_normalization": "sequence"}),
}


def test_gradient_is_that_of_the_objective(models, inputs, tmp_path):
    """The third step, whose weights are neither those of the start nor those of the reference, and clips something."""
    cases = [values_of(c, models, inputs, tmp_path / n, lr=1e-3) for n, c in PLAIN_CASES.items()]
    (found,) = run_ranks(1, against_autograd, cases)
    for name, (row, plain_loss, errors) in zip(PLAIN_CASES, found):
        assert row["loss"] == pytest.approx(plain_loss, rel=1e-5, abs=1e-6), name
        assert row["kl"] > 1e-4 and row.get("anchor_kl", 1.0) > 1e-4 and row.get("clip_fraction", 1.0) > 0, name
        assert max(errors.values()) < 2e-5, (name, errors)


# -- what trains, and what stays -----------------------------------------------------------------------------------


def start_and_end(cases):
    """For each case: weights before the first and after the last step, the log's rows. Runs on every rank."""
    topology = initialize_topology(build_config(cases[0], GFPOConfig).run)
    told = []
    for values in cases:
        trainer = build_trainer(values, topology)
        before = weight_shards(trainer.engine)
        rows = [trainer.train_step()[1] for _ in range(values["train_iters"])]
        told.append({"before": before, "after": weight_shards(trainer.engine), "rows": rows})
    destroy_topology()
    return told


def changed_rows(results):
    """Name of a tensor -> indices of the rows that a run has changed, of those that it has changed any of."""
    before, after = (assemble([{"shards": result[when]} for result in results]) for when in ("before", "after"))
    rows = {name: (was != after[name]).reshape(len(was), -1).any(axis=1) for name, was in before.items()}
    return {name: set(np.flatnonzero(which).tolist()) for name, which in rows.items() if which.any()}


TAG_IDS = {257, 258, 259, 260}
LAST = {
    "decoder.layers.self_attention.linear_qkv.layer_norm_weight",
    "decoder.layers.self_attention.linear_proj.weight",
    "decoder.layers.self_attention.linear_qkv.weight",
    "decoder.layers.mlp.linear_fc1.layer_norm_weight",
    "decoder.layers.mlp.linear_fc1.weight",
    "decoder.layers.mlp.linear_fc2.weight",
}
DECAY = {"weight_decay": 0.1, "lr": 1e-2}
FEW = {
    "rows": ("untied special", EXACT | DECAY | {"trainable": "tag-rows"}),
    "rows, anchor": ("untied special", SAMPLED | DECAY | {"trainable": "tag-rows", "anchor": "kl", OTHER: True}),
    "tied rows": ("tied special", EXACT | DECAY | {"trainable": "tag-rows"}),
    "last": ("untied special", EXACT | DECAY | {"trainable": "last-1", OTHER: True}),
    "tied last": ("tied special", SAMPLED | DECAY | {"trainable": "last-1", OTHER: True}),
    "grpo": ("untied special", GRPO | DECAY | {"trainable": "last-2", "kl_coef": 0.1}),
    "last, text": ("tied text", EXACT | DECAY | {"trainable": "last-1"}),
}
HOLDERS = {
    "one process": (1, [{}, FULL, DIST, {"bf16": True}]),
    "TP2": (2, [TP2, SP | DIST | {"bf16": True}, TP2 | FULL]),
    "PP2": (2, [PP2, PP2 | DIST, PP2 | FULL | {"bf16": True}]),
    "DP2": (2, [{}, DIST | {"overlap_grad_reduce": True}, DIST | {"bf16": True}]),
}


@pytest.mark.slow
@pytest.mark.parametrize("layout", HOLDERS)
def test_only_what_is_trainable_moves(models, inputs, tmp_path, layout):
    ranks, variants = HOLDERS[layout]
    runs = in_turn(FEW, variants, list(HOLDERS).index(layout))
    cases = [values_of(FEW[n], models, inputs, tmp_path / str(i), **o) for i, (n, o) in enumerate(runs)]
    for (name, overrides), *told in zip(runs, *run_ranks(ranks, start_and_end, cases, timeout=300)):
        changed, where = changed_rows(told), (name, overrides)
        kind, values = FEW[name]
        layers = MODEL["num_layers"]
        count = {"tag-rows": 0, "last-1": 1, "last-2": 2}[values["trainable"]]
        wanted = {f"{part}/{layer}" for part in LAST for layer in range(layers - count, layers)}
        wanted |= {"decoder.final_layernorm.weight"} if count else set()
        table = "output_layer.weight" if "untied" in kind else "embedding.word_embeddings.weight"
        wanted |= {table} if "special" in kind else set()
        assert changed.keys() == wanted, where
        if "special" in kind:
            assert changed[table] == TAG_IDS, where


def gradients_with_and_without(pairs):
    """For each pair of runs their first gradients as assembled tensors. Runs on one rank."""
    topology = initialize_topology(build_config(pairs[0][0], GFPOConfig).run)
    found = []
    for pair in pairs:
        shards = [next_gradients(build_trainer(values, topology))[1] for values in pair]
        found.append([assemble([{"shards": each}]) for each in shards])
    destroy_topology()
    return found


def test_the_anchor_is_silent_at_its_reference(models, inputs, tmp_path):
    """At the first step, when the model is the reference, only the policy's term moves it."""
    pairs = []
    for kind in ("tied special", "untied text"):
        for top_k in (4, 999):
            values = {"objective": "gfpo-exact", "anchor_completions": 20, "anchor_coef": 100.0, "anchor_top_k": top_k}
            without = {"objective": "gfpo-exact", "anchor": "none"}
            folders = [tmp_path / f"{kind} {top_k} {i}" for i in range(2)]
            pairs.append([run_values(models, kind, inputs, f, **v) for f, v in zip(folders, (values, without))])
    (found,) = run_ranks(1, gradients_with_and_without, pairs)
    for with_anchor, without in found:
        scale = max(np.linalg.norm(g) for g in without.values())
        assert scale > 0.1
        for name, gradient in without.items():
            assert np.linalg.norm(with_anchor[name] - gradient) < 1e-5 * 100.0 * scale, name


def test_fewer_trainable_weights_have_the_same_gradients(models, inputs, tmp_path):
    pairs = []
    for kind, trainable in (("untied special", "last-2"), ("tied special", "tag-rows"), ("untied special", "tag-rows")):
        values = {"objective": "gfpo-exact", "anchor": "kl", "reference": str(models / f"{kind} 1"), "clip_grad": 0.0}
        pairs.append(
            [
                run_values(models, kind, inputs, tmp_path / f"{kind} {trainable} {which}", **values, trainable=which)
                for which in ("all", trainable)
            ]
        )
    (found,) = run_ranks(1, gradients_with_and_without, pairs)
    for whole, part in found:
        moving = {name for name, gradient in part.items() if np.abs(gradient).max() > 0}
        assert moving and moving != whole.keys()
        for name in moving:
            rows = sorted(TAG_IDS) if "output_layer" in name or "embedding" in name else slice(None)
            np.testing.assert_allclose(part[name][rows], whole[name][rows], rtol=1e-6, atol=1e-7)


# -- how old the rewards are ---------------------------------------------------------------------------------------


def drift_of(cases):
    """What `rescore` says before and after the steps of each case. Runs on every rank."""
    topology = initialize_topology(build_config(cases[0], GFPOConfig).run)
    told = []
    for values in cases:
        trainer = build_trainer(values, topology)
        before = trainer.objective.rescore(trainer.context())
        for _ in range(values["train_iters"]):
            trainer.train_step()
        told.append((before, trainer.objective.rescore(trainer.context()), trainer.objective.stale))
    destroy_topology()
    return told


@pytest.mark.parametrize("overrides", [{}, PP2 | SMALL | {"micro_batch_size": 1}], ids=["one process", "PP2"])
def test_drift_is_seen(models, inputs, tmp_path, overrides):
    def case(save, kind="tied special", **values):
        return run_values(models, kind, inputs, tmp_path / save, **EXACT, **values, **overrides)

    cases = [
        case("still", lr=1e-9),
        case("moving", lr=3e-2, anchor="none"),
        case("tied", kind="untied text", lr=3e-2, anchor="none"),
        case("other", lr=1e-9, reference=str(models / "tied special 1")),
    ]
    results = run_ranks(2 if overrides else 1, drift_of, cases)
    for told in results:
        assert told == results[0]
        for before, *_ in told:
            assert before["effective_sample_size"] == pytest.approx(1.0, abs=1e-6)
            assert before["rescored_nll_shift"] == pytest.approx(0.0, abs=1e-6)
        for _, after, stale in (told[0], told[3]):  # drift is from the start, wherever the reference is
            assert after["effective_sample_size"] > 0.999 and abs(after["rescored_nll_shift"]) < 1e-4 and not stale
        for _, after, stale in told[1:3]:
            assert after["effective_sample_size"] < 0.5 and abs(after["rescored_nll_shift"]) > 0.01 and stale


def untied_start(cases):
    """First rows of runs, the head and the embedding that a tied model's weights became, and both after the steps."""
    topology = initialize_topology(build_config(cases[0], GFPOConfig).run)
    told = []
    for values in cases:
        trainer = build_trainer(values, topology)
        before = weight_shards(trainer.engine)
        rows = [trainer.train_step()[1] for _ in range(values["train_iters"])]
        told.append({"rows": rows, "before": before, "shards": weight_shards(trainer.engine)})
    destroy_topology()
    return told


@pytest.mark.slow
@pytest.mark.parametrize("layout", [{}, {"tensor_model_parallel_size": 2}, {"pipeline_model_parallel_size": 2}])
def test_tag_rows_of_a_tied_model_get_a_head_of_their_own(models, inputs, tmp_path, layout):
    """The policy is that of the tied model, and the tags' input rows, which also start the answers, stay."""
    common = {"objective": "gfpo-exact", "anchor": "none", "rescore_interval": 0, **layout}
    tied = run_values(models, "tied special", inputs, tmp_path / "tied", **common)
    rows_only = {"trainable": "tag-rows", "untie_embeddings_and_output_weights": True}
    untied = run_values(models, "tied special", inputs, tmp_path / "untied", **common, **rows_only)
    results = run_ranks(2 if layout else 1, untied_start, [tied, untied])
    first, second = (results[0][case]["rows"][0] for case in range(2))
    for name in ("reward", "mass", "entropy", "loss"):
        assert first[name] == pytest.approx(second[name], rel=1e-6), name
    before = assemble([{"shards": result[1]["before"]} for result in results])
    after = assemble([{"shards": result[1]["shards"]} for result in results])
    head, embedding = "output_layer.weight", "embedding.word_embeddings.weight"
    np.testing.assert_array_equal(before[head], before[embedding])
    moved = {
        name: np.flatnonzero((before[name] != after[name]).reshape(len(before[name]), -1).any(1)) for name in before
    }
    assert {name for name, rows in moved.items() if len(rows)} == {head}
    assert set(moved[head].tolist()) == TAG_IDS
