"""Files nested a hundred thousand deep, or nearly as deep as Python goes: one line that names the file."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_ssft.config.flags import read_config_file
from megatron_ssft.errors import UserError
from megatron_ssft.evaluation.tag_selection import num_questions
from megatron_ssft.formats.documents import read_document
from megatron_ssft.formats.hf_json import read_json
from megatron_ssft.formats.lease import LEASE, acquire
from megatron_ssft.formats.log_cut import cut_log
from megatron_ssft.formats.metrics import load_metrics
from megatron_ssft.formats.policy import read_policy
from megatron_ssft.formats.train_state import read_train_state
from megatron_ssft.hf.folder import read_hf_config
from megatron_ssft.hf.safetensors_io import HFWeights
from megatron_ssft.objectives.policy.reference import stored_index
from megatron_ssft.report.read.run_facts import _settings
from megatron_ssft.rounds.commands import _model_parallel_size
from megatron_ssft.rounds.stages import read_json as read_stage

READERS = {
    "config.yaml": lambda path: read_config_file(str(path)),
    "config.yaml of a report": lambda path: _settings(path.parent),
    "config.yaml of rounds": _model_parallel_size,
    "config.json": lambda path: read_hf_config(path.parent),
    "tokenizer_config.json": read_json,
    "model.safetensors.index.json": lambda path: HFWeights(path.parent).__enter__(),
    "train_state.json": read_train_state,
    "evaluation.json": lambda path: read_document(path, dict, lambda _: None, unreadable="it; make it", program="x"),
    "metrics.jsonl": lambda path: load_metrics(path.parent),
    "policy.jsonl": read_policy,
    "reference/index.json": lambda path: stored_index(path.parents[1]),
    "stage.json": read_stage,
}
CONTENTS = {
    "100,000 lists": "[" * 100_000 + "]" * 100_000,
    "100,000 lists without an end": "[" * 100_000,
    "100,000 objects": '{"a":' * 100_000 + "1" + "}" * 100_000,
}


@pytest.mark.parametrize("content", CONTENTS)
@pytest.mark.parametrize("name", READERS)
def test_a_nested_file_is_one_line(tmp_path, name, content):
    path = tmp_path / name.split()[0]
    path.parent.mkdir(exist_ok=True)
    path.write_text(CONTENTS[content] + "\n")
    with pytest.raises(UserError) as caught:
        READERS[name](path)
    assert str(caught.value).startswith(f"{path}") and len(str(caught.value)) < 500
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("depth", [300, 700, 900, 950, 990, 1100])
def test_a_document_nearly_as_deep_as_python_goes_is_read_or_refused(tmp_path, depth):
    path = tmp_path / "evaluation.json"
    path.write_text('{"a":' * depth + "1" + "}" * depth)
    try:
        read_document(path, dict, lambda _: None, unreadable="it; make it", program="x")
    except UserError as error:
        assert str(error).startswith(f"{path}: ")


def test_others_are_passed_over(tmp_path):
    (tmp_path / "iter_0000001").mkdir()
    (tmp_path / "iter_0000001" / "train_state.json").write_text("[" * 100_000)
    assert num_questions(tmp_path) is None
    (tmp_path / "metrics.jsonl").write_text("[" * 100_000 + "\n")
    assert len(cut_log(tmp_path / "metrics.jsonl", 2)) == 1
    (Path(tmp_path) / LEASE).write_text("[" * 100_000)
    acquire(tmp_path, silence_seconds=0.1).release()
