"""Lines of a run's logs: written as before the records, byte by byte, and read back."""

from __future__ import annotations

import json

import numpy as np
import pytest
from msgspec import UNSET

from megatron_ssft.errors import UserError
from megatron_ssft.formats.assignments import load_assignments
from megatron_ssft.formats.jsonl import RowError, convert_row, to_line
from megatron_ssft.formats.metrics import GFPOMetrics, GRPOMetrics, SSFTMetrics, load_metrics
from megatron_ssft.formats.policy import PolicyLine, policy_lines
from megatron_ssft.formats.rollouts import mark
from megatron_ssft.formats.run_logs import load_run
from megatron_ssft.records import TokenizedSet

SSFT = (
    '{"iteration": 1, "loss": 5.587, "lr": 0.01, "grad_norm": 3.495, "matching_cost": 16.8538, "matching_gap": null, '
    '"pad_sequences": 0, "pad_lower_bound": 0, "makespan_over_bound": 1.0, "questions": 4, "trained_sequences": 12, '
    '"trained_tokens": 161, "sequence_tokens": 221, "epoch": 0, "seconds": 0.2443, "matching_seconds": 0.0878, '
    '"solving_seconds": 0.0029, "training_flops": 52641408.0, "matching_flops": 63882880.0, "matching_reused": 0, '
    '"matching_certain": 1, "matching_regret": 0.0, "exact_matching_seconds": 0.0303, "matching_same": 4, "mfu": 0.4, '
    '"eval_loss": 0.5, "eval_matching_cost": 1.5, "eval_matching_gap": 0.25, "matching_margin": 0.0118, '
    '"tag_source_information": 0.1114, "unmatched_tags": 0}\n'
)
GFPO = (
    '{"iteration": 1, "objective": "gfpo-sampled", "loss": 0.383, "lr": 0.003, "grad_norm": 0.8755, "reward": 0.5479, '
    '"clip_fraction": 0.0, "entropy": 0.794, "kl": 0.0, "mass": 0.0285, "reward_uniform": 0.5, '
    '"reward_best_fixed": 0.75, "anchor_kl": 0.0, "completion_nll": 7.248, "completion_nll_shift": 0.0, '
    '"questions": 4, "pad_sequences": 0, "makespan_over_bound": 1.0, "trained_sequences": 26, "trained_tokens": 76, '
    '"seconds": 0.1787, "training_flops": 1.0, "scoring_flops": 2.0, "mfu": 0.4, "effective_sample_size": 0.9, '
    '"rescored_nll_shift": 0.1}\n'
)
GRPO = (
    '{"iteration": 1, "objective": "grpo", "loss": 0.383, "lr": 0.003, "grad_norm": 0.8755, "reward_stored": 0.5, '
    '"kl": 0.0, "clip_fraction": 0.0, "completion_nll": 7.248, "completion_nll_shift": 0.0, "questions": 4, '
    '"pad_sequences": 0, "makespan_over_bound": 1.0, "trained_sequences": 26, "trained_tokens": 76, '
    '"seconds": 0.1787}\n'
)
ASSIGNMENT = (
    '{"iteration": 1, "epoch": 0, "id": "Fr\\u00e4ge", "tags": [2, 0], "sources": ["a", null], '
    '"cost": [[0.5, 1.0], [1.5, 2.0], [0.0, 0.333333]]}\n'
)
POLICY = '{"iteration": 4, "split": "eval", "id": "a", "policy": [0.25, 0.75], "mass": 0.5}\n'


@pytest.mark.parametrize(("line", "kind"), [(SSFT, SSFTMetrics), (GFPO, GFPOMetrics), (GRPO, GRPOMetrics)])
def test_lines_of_metrics_are_those_of_before(line, kind):
    assert to_line(convert_row(json.loads(line), kind)) == line
    for name in ("mfu", "eval_loss", "clip_fraction"):
        fields = {key: value for key, value in json.loads(line).items() if key != name}
        if not (kind is GRPOMetrics and name == "clip_fraction"):
            assert json.loads(to_line(convert_row(fields, kind))) == fields  # what is not measured is not written
    with pytest.raises(RowError, match="'loss' is missing"):
        convert_row({key: value for key, value in json.loads(line).items() if key != "loss"}, kind)


def test_lines_of_policies_are_those_of_before():
    question = TokenizedSet("a", "Q", 1, np.array([7, 8], np.int32), (), ())
    (line,) = policy_lines(4, "eval", [question], np.array([[0.25, 0.75]]), np.array([0.5]), "m")
    fields = json.loads(to_line(line))
    assert (fields.pop("prompt"), fields.pop("model")) == (mark([7, 8]), "m")  # what earlier versions did not write
    assert fields == json.loads(POLICY)
    before = convert_row(json.loads(POLICY), PolicyLine)
    assert to_line(before) == POLICY and (before.prompt, before.model) == (UNSET, UNSET)


def test_a_run_is_read_back(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(SSFT + GFPO)
    (tmp_path / "assignments.jsonl").write_text(ASSIGNMENT)
    run = load_run(tmp_path, "one")
    assert (run.name, run.num_tags, len(run.metrics)) == ("one", 3, 2)
    np.testing.assert_array_equal(run.metrics["mfu"], [0.4, 0.4])
    np.testing.assert_array_equal(run.metrics["matching_gap"], [np.nan, np.nan])
    assert run.visits[0].labels == ("a", "trace 2") and run.visits[0].cost_NM.shape == (3, 2)
    assert run.metrics.objective == "gfpo-sampled"
    (tmp_path / "metrics.jsonl").write_text(SSFT)
    assert load_metrics(tmp_path).objective is None


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"cost": [[0.5, 1.0]]}, "'cost' must be a matrix"),
        ({"cost": [[0.5], [1.0], [2.0]]}, "'cost' must be a matrix"),
        ({"sources": ["a"]}, "'sources' must hold a name or null for each tag"),
        ({"tags": []}, "'tags' must be a list of whole numbers from 0"),
        ({"epoch": True}, "'epoch' must be a whole number from 0, not true"),
        ({"id": 5}, "'id' must be a string, not 5"),
    ],
)
def test_the_wrong_field_and_its_line_are_named(tmp_path, change, said):
    path = tmp_path / "assignments.jsonl"
    path.write_text(ASSIGNMENT + json.dumps(json.loads(ASSIGNMENT) | change) + "\n" + ASSIGNMENT)
    with pytest.raises(UserError) as error:
        load_assignments(tmp_path)
    assert str(error.value).startswith(f"{path}:2: {said}") and "\n" not in str(error.value)
    (tmp_path / "metrics.jsonl").write_text(SSFT + '{"iteration": -1}\n')
    with pytest.raises(UserError, match=r"metrics.jsonl:2: 'iteration' must be a whole number from 0, not -1; repair"):
        load_metrics(tmp_path)


@pytest.mark.parametrize(("line", "record"), [(SSFT, SSFTMetrics), (GFPO, GFPOMetrics)], ids=["ssft", "gfpo"])
def test_a_figure_without_a_field_is_not_lost_in_silence(line, record):
    with pytest.raises(RowError, match="los"):
        convert_row(json.loads(line) | {"los": 1.0}, record)
