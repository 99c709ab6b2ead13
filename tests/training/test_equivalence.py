"""Layout, packing, accumulation and trace order change nothing: costs, assignments, losses and weights stay the same.

Everything is compared with one process that trains with one padded sequence a microbatch. The weights after 5 steps
at a high learning rate are the sharpest check: a gradient that misses one term anywhere shows there.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
import pytest

from megatron_ssft.config import SSFTConfig
from megatron_ssft.config.flags import build_config
from megatron_ssft.matching.assignment import assignment_gap
from megatron_ssft.parallel.topology import destroy_topology, initialize_topology
from megatron_ssft.scheduling import StreamLimits, planner
from megatron_ssft.training.trainer import Trainer
from tests.helpers.distributed import run_ranks
from tests.helpers.training_runs import BASE, assemble, make_rows, train_and_tell, write_rows

OTHER_MODEL = {
    "normalization": "LayerNorm",
    "swiglu": False,
    "add_bias_linear": True,
    "untie_embeddings_and_output_weights": True,
}
# Not with biases: a bias on unrotated key channels adds the same to all scores of a query, so its gradient is
# nothing but rounding, which AdamW then turns into steps of full size.
QK_NORM_MODEL = {"qk_layernorm": True, "rotary_percent": 0.5, "kv_channels": 16, "num_query_groups": 4}
VARIANTS = {
    "tied": {},
    "other": OTHER_MODEL | {"train_forking_token": True, "loss_normalization": "sequence"},
    "qk-norm": QK_NORM_MODEL,
    "qkv-bias": {"add_qkv_bias": True, "untie_embeddings_and_output_weights": True},
    "text": {"forking_token_format": "text", "untie_embeddings_and_output_weights": True},
    "multiplier": {"forking_token_lr_mult": 10.0},
}
TP2 = {"tensor_model_parallel_size": 2}
PP2 = {"pipeline_model_parallel_size": 2}
VPP = PP2 | {"num_layers_per_virtual_pipeline_stage": 1}
SP = TP2 | {"sequence_parallel": True}
DIST = {"use_distributed_optimizer": True}
GATHER = DIST | {"overlap_param_gather": True}
"""Gradients are reduced during the backward pass, too."""
FULL = {"recompute_granularity": "full"}
SELECTIVE = {"recompute_granularity": "selective"}
PADDED = {"sequence_layout": "padded"}
CONCATENATED = {"sequence_layout": "concatenated"}
UNSHARED = {"share_prompt": False}

ALONE = {"sequence_layout": "padded", "micro_batch_size": 1}
"""The reference: every sequence goes through the model by itself."""

CASES = [
    ("tied", 1, {"micro_batch_size": 12}),
    ("tied", 1, {"max_tokens_per_microbatch": 50, "matching_tokens_per_microbatch": 37}),
    ("tied", 1, PADDED | {"micro_batch_size": 12}),
    ("tied", 1, PADDED | {"micro_batch_size": 5, "matching_tokens_per_microbatch": 37}),
    ("tied", 1, CONCATENATED),
    ("tied", 1, UNSHARED),
    ("tied", 1, CONCATENATED | FULL),
    ("tied", 1, FULL),
    ("tied", 1, FULL | {"recompute_method": "block", "recompute_num_layers": 3}),
    ("tied", 1, SELECTIVE),
    ("tied", 1, DIST),
    ("tied", 2, TP2),
    ("tied", 2, SP),
    ("tied", 2, SP | FULL),
    ("tied", 2, PP2),
    ("tied", 2, VPP),
    ("tied", 2, {}),
    ("tied", 2, DIST),
    ("tied", 2, {"overlap_grad_reduce": True}),
    ("tied", 2, DIST | {"overlap_grad_reduce": True, "micro_batch_size": 1}),
    ("tied", 2, GATHER),
    ("other", 2, GATHER | FULL | {"micro_batch_size": 1}),
    ("tied", 4, TP2 | PP2),
    ("tied", 4, SP | PP2 | FULL),
    ("tied", 4, PP2 | GATHER),
    ("other", 4, VPP | GATHER),
    ("tied", 4, SP | DIST),
    ("tied", 4, PP2 | DIST),
    ("tied", 4, TP2 | VPP),
    ("other", 2, TP2),
    ("other", 2, PP2),
    ("other", 4, SP | VPP | FULL),
    ("other", 4, TP2 | DIST),
    ("qk-norm", 2, TP2),
    ("qk-norm", 4, SP | PP2 | DIST),
    ("qkv-bias", 4, TP2 | PP2),
    ("text", 4, TP2 | PP2),
    ("tied", 2, PADDED | SP),
    ("tied", 2, PADDED | VPP),
    ("tied", 2, PADDED | DIST | {"overlap_grad_reduce": True, "micro_batch_size": 1}),
    ("tied", 2, CONCATENATED | TP2 | SELECTIVE),
    ("tied", 2, CONCATENATED | PP2),
    ("tied", 2, CONCATENATED | VPP),
    ("tied", 2, CONCATENATED),
    ("tied", 4, PADDED | TP2 | PP2 | FULL),
    ("tied", 4, CONCATENATED | TP2 | PP2),
    ("tied", 4, UNSHARED | SP | PP2),
    ("other", 4, CONCATENATED | SP | PP2),
    ("text", 2, UNSHARED),
    ("multiplier", 4, SP | PP2),
    ("multiplier", 4, TP2 | DIST),
]


def _name(overrides):
    return "-".join(value if isinstance(value, str) else key for key, value in overrides.items())


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("equivalence")
    return {"data_path": [write_rows(folder / "train.jsonl", make_rows())], "data_cache_path": str(folder / "cache")}


@pytest.fixture(scope="module")
def references(data):
    """Runs of one process, made once a variant."""
    known = {}

    def reference(variant):
        if variant not in known:
            values = BASE | data | VARIANTS[variant] | ALONE
            known[variant] = run_ranks(1, train_and_tell, values)
        return known[variant]

    return reference


@pytest.mark.slow
@pytest.mark.parametrize(("variant", "ranks", "overrides"), CASES, ids=[f"{v}-{r}-{_name(o)}" for v, r, o in CASES])
def test_layout_changes_nothing(references, data, variant, ranks, overrides):
    results = run_ranks(ranks, train_and_tell, BASE | data | VARIANTS[variant] | overrides)
    for other in results[1:]:
        assert [s["loss"] for s in other["history"]] == [s["loss"] for s in results[0]["history"]]
    assert_same_training(references(variant), results)


def train_with_small_streams(values):
    """`train_and_tell` where streams may be split into the smallest of pieces, as those of long traces are."""
    planner.StreamLimits = functools.partial(StreamLimits, smallest_stream=1)  # the rank ends with this function
    counts = []
    plan_train_streams = planner.plan_train_streams

    def counting(*arguments):
        plan = plan_train_streams(*arguments)
        counts.append(max(map(len, plan.ranks)))
        return plan

    planner.plan_train_streams = counting
    return train_and_tell(values) | {"counts": counts}


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "overrides"), [(2, PP2), (4, PP2 | FULL), (2, VPP)], ids=["pp2", "pp2-dp2", "vpp"])
def test_streams_that_are_split_for_a_pipeline_change_nothing(references, data, ranks, overrides):
    roomy = {"max_tokens_per_microbatch": 4096}
    plain = run_ranks(ranks, train_and_tell, BASE | data | roomy | overrides)
    split = run_ranks(ranks, train_with_small_streams, BASE | data | roomy | overrides)
    assert min(split[0]["counts"]) > 2, split[0]["counts"]
    for results in (plain, split):
        assert_same_training(references("tied"), results)
    shares = [[step["pipeline_idle_share"] for step in results[0]["history"]] for results in (split, plain)]
    assert all(0 < less < more < 1 for less, more in zip(*shares, strict=True))


def assert_same_training(expected, got):
    for step, (a, b) in enumerate(zip(expected[0]["history"], got[0]["history"], strict=True), start=1):
        assert a["ids"] == b["ids"]
        assert a["tokens"] == b["tokens"]
        for cost_a, cost_b, tags_a, tags_b in zip(a["costs"], b["costs"], a["tags"], b["tags"], strict=True):
            np.testing.assert_allclose(cost_b, cost_a, rtol=1e-5)
            if tags_a != tags_b:  # only where rounding decides
                regret = sum(cost_a[t, j] for j, t in enumerate(tags_b)) - sum(
                    cost_a[t, j] for j, t in enumerate(tags_a)
                )
                assert abs(regret) < 1e-4, f"step {step}: tags {tags_b} instead of {tags_a}"
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-5)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-4)
    weights_a, weights_b = assemble(expected), assemble(got)
    assert weights_a.keys() == weights_b.keys()
    for name, value in weights_a.items():
        np.testing.assert_allclose(weights_b[name], value, rtol=1e-4, atol=1e-4, err_msg=name)


def test_the_reference_run_is_worth_comparing_with(references):
    """Costs tell tags apart, the model learns, and every rank of the comparison sees several steps."""
    for variant in VARIANTS:
        history = references(variant)[0]["history"]
        assert history[-1]["loss"] < 0.95 * history[0]["loss"]
        gaps = [assignment_gap(cost) for cost in history[0]["costs"]]
        assert max(gaps) > 1e-2
        assert len({tag for tags in history[0]["tags"] for tag in tags}) > 1


def test_order_of_traces_changes_nothing_else(data, tmp_path, references):
    rows = make_rows()
    for i, row in enumerate(rows):
        row["traces"] = row["traces"][i % 5 :] + row["traces"][: i % 5]
        row["traces"].reverse()
    permuted = BASE | ALONE | {"data_path": [write_rows(tmp_path / "permuted.jsonl", rows)]}
    got = run_ranks(1, train_and_tell, permuted | {"data_cache_path": str(tmp_path / "cache")})
    for a, b in zip(references("tied")[0]["history"], got[0]["history"], strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-5)
        for id_, tags_a, tags_b, cost_a, cost_b in zip(a["ids"], a["tags"], b["tags"], a["costs"], b["costs"]):
            original = [t["text"] for t in make_rows()[int(id_[1:])]["traces"]]
            moved = [t["text"] for t in rows[int(id_[1:])]["traces"]]
            order = [original.index(text) for text in moved]
            assert tuple(tags_a[j] for j in order) == tuple(tags_b)
            np.testing.assert_allclose(cost_b, cost_a[:, order], rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("overrides", [{}, DIST, TP2 | DIST], ids=["plain", "distributed", "tp2-distributed"])
def test_bf16_follows_fp32(references, data, overrides):
    ranks = 2 * overrides.get("tensor_model_parallel_size", 1)
    results = run_ranks(ranks, train_and_tell, BASE | data | overrides | {"bf16": True})
    for a, b in zip(references("tied")[0]["history"], results[0]["history"], strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=0.03)


def costs_after(values, changed):
    """Costs of the first batch, and again with one token of one question's prompt changed. Runs on every rank."""
    config = build_config(values, SSFTConfig)
    topology = initialize_topology(config.run)
    trainer = Trainer(config, topology)
    batch = trainer.objective.sets.next_batch()
    before = [a.cost_NM for a in trainer.objective.matching.optimal(trainer.context(), batch)]
    sets = list(batch.sets)
    prompt = sets[changed].prompt_ids.copy()
    prompt[1] += 1
    sets[changed] = dataclasses.replace(sets[changed], prompt_ids=prompt)
    after = [
        a.cost_NM
        for a in trainer.objective.matching.optimal(trainer.context(), dataclasses.replace(batch, sets=tuple(sets)))
    ]
    destroy_topology()
    return before, after


@pytest.mark.parametrize("overrides", [{}, {"matching_tokens_per_microbatch": 40}], ids=["one stream", "many streams"])
def test_a_token_of_a_prompt_changes_its_own_question_only(data, overrides):
    ((before, after),) = run_ranks(1, costs_after, BASE | data | overrides, 1)
    assert len(before) > 2
    for question, (a, b) in enumerate(zip(before, after)):
        if question == 1:
            assert (abs(a - b) > 1e-4).all()
        else:
            np.testing.assert_allclose(a, b, rtol=1e-6)
