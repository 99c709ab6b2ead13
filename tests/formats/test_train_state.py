"""train_state.json: records of each kind of run, written as before, and damaged files."""

from __future__ import annotations

import json

import pytest

from megatron_ssft.errors import UserError
from megatron_ssft.formats.train_state import (
    ObjectiveState,
    PolicyState,
    SSFTState,
    WeightsState,
    decode_state,
    encode_state,
    read_train_state,
)

WEIGHTS = {
    "format": 1,
    "iteration": 4,
    "has_optimizer": False,
    "model": {"num_layers": 4, "norm_epsilon": 1e-05, "activation": None},
    "vocab_size": 264,
    "forking_tokens": {"format": "special", "strings": ["<think1>"], "ids": [[257]]},
    "bf16": False,
}
SSFT = {
    **WEIGHTS,
    "has_optimizer": True,
    "data": "ab12",
    "use_distributed_optimizer": True,
    "queue": {"num_questions": 9, "seed": 1234, "epoch": 1, "cursor": 3, "waiting": [[7, 0], [2, 1]]},
    "reused_assignments": {"assignments": {"0": {"0,2,1": "AAEC"}}},
    "collapse_watch": {
        "steps": 2,
        "window": [[[[0, 1], [2, 0]], [["a", None], ["b", "c"]]]],
        "gaps": [0.25],
        "margins": [None, 0.5],
        "known_sources": True,
        "was_informative": False,
        "told": [],
    },
}
POLICY = {
    **WEIGHTS,
    "has_optimizer": True,
    "data": "ab12",
    "use_distributed_optimizer": False,
    "policy": {"objective": "gfpo-sampled", "anchor_top_k": 64},
    "objective": {"old_logp": [[-0.5, -1.25]]},
    "stale": False,
}


@pytest.mark.parametrize(
    ("state", "kind"),
    [
        (WEIGHTS, WeightsState),
        (SSFT, SSFTState),
        (POLICY, PolicyState),
        (POLICY | {"objective": {}}, PolicyState),
        (POLICY | {"objective": {"old_logp": None}}, PolicyState),
    ],
)
def test_states_are_written_as_they_were_read(tmp_path, state, kind):
    path = tmp_path / "train_state.json"
    path.write_text(json.dumps(state, indent=1))
    record = read_train_state(path)
    assert type(record) is kind and record.iteration == 4
    assert encode_state(record) == path.read_text()


def test_an_objective_without_state_writes_none():
    assert json.loads(encode_state(decode_state(json.dumps(POLICY | {"objective": {}}), "f")))["objective"] == {}
    assert ObjectiveState() == ObjectiveState()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "cannot be read"),
        ("[]", "holds no state of a run"),
        ("{}", "holds no state of a run"),
        (json.dumps(WEIGHTS | {"format": 2}), "checkpoint format 2, this version reads 1"),
        (json.dumps({k: v for k, v in WEIGHTS.items() if k != "vocab_size"}), "'vocab_size' is missing"),
        (json.dumps(SSFT | {"queue": {**SSFT["queue"], "cursor": -1}}), "'queue.cursor': expected `int` >= 0"),
        (json.dumps(POLICY | {"stale": "no"}), "'stale': expected `bool`, got `str`"),
    ],
)
def test_damaged_states_are_one_line(tmp_path, text, said):
    path = tmp_path / "train_state.json"
    path.write_text(text)
    with pytest.raises(UserError) as error:
        read_train_state(path)
    assert str(error.value).startswith(f"{path}: ") and said in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(UserError, match="cannot be read"):
        read_train_state(tmp_path / "absent.json")


def test_a_run_may_have_saved_its_weights_alone(tmp_path):
    path = tmp_path / "train_state.json"
    path.write_text(json.dumps(SSFT | {"has_optimizer": False}))
    assert type(read_train_state(path)) is SSFTState and not read_train_state(path).has_optimizer
