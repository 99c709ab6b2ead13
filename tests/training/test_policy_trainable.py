"""Policy learning: which weights may move, and how old the rewards are."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_ssft.config import GFPOConfig
from megatron_ssft.config.flags import build_config
from megatron_ssft.parallel.topology import destroy_topology, initialize_topology
from tests.helpers.distributed import run_ranks
from tests.helpers.policy_cases import (
    DIST,
    EXACT,
    FULL,
    GRPO,
    OTHER,
    PP2,
    SAMPLED,
    SMALL,
    SP,
    TP2,
    in_turn,
    values_of,
)
from tests.helpers.policy_runs import (
    build_trainer,
    next_gradients,
    run_values,
)
from tests.helpers.training_runs import MODEL, assemble, weight_shards

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
