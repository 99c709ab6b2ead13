"""Cases of policy learning: objectives, models and parallel layouts that the tests train."""

from __future__ import annotations

from tests.helpers.policy_runs import (
    run_values,
)

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
    "natural, text": ("tied text", EXACT | {"policy_gradient": "natural", "kl_coef": 0.1, "anchor_completions": 20}),
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


def values_of(case, models, inputs, save, **overrides):
    kind, values = case
    values = dict(values)
    if values.pop(OTHER, False):
        values["reference"] = str(models / f"{kind} 1")
    return run_values(models, kind, inputs, save, **values, **overrides)


def in_turn(cases, variants, first):
    """(case, variant) of every case: variants take turns, and start elsewhere in every layout."""
    return [(case, variants[(first + i) % len(variants)]) for i, case in enumerate(cases)]
