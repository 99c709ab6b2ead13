"""Where a job that hangs is ended, its last collectives are on the disk, and the message says where."""

from __future__ import annotations

import os
import pickletools

import pytest

from megatron_ssft.parallel.watch.flight_recorder import dump_prefix, remark
from tests.helpers.struck_ranks import run_struck
from tests.helpers.training_runs import BASE, flags, make_rows, write_rows

ON = {"TORCH_FR_BUFFER_SIZE": "2000"}
OLD = {"TORCH_NCCL_TRACE_BUFFER_SIZE": "2000", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE": "/run/flight/old-rank"}


@pytest.mark.parametrize(
    ("environment", "prefix"),
    [
        ({}, None),
        (ON, None),
        ({"TORCH_FR_DUMP_TEMP_FILE": "/x"}, None),
        (ON | {"TORCH_FR_BUFFER_SIZE": "0", "TORCH_FR_DUMP_TEMP_FILE": "/x"}, None),
        (ON | {"TORCH_FR_DUMP_TEMP_FILE": "/run/flight/7.1-rank"}, "/run/flight/7.1-rank"),
        (OLD, "/run/flight/old-rank"),
        (OLD | {"TORCH_FR_DUMP_TEMP_FILE": "/new"}, "/new"),
    ],
)
def test_files_are_named_only_where_there_will_be_some(environment, prefix):
    assert dump_prefix(environment) == prefix
    assert (f"{prefix}*" in remark(environment)) if prefix else remark(environment) == ""


@pytest.mark.slow
@pytest.mark.parametrize("is_on", [True, False])
def test_hang_leaves_the_recorders_of_all_ranks(tmp_path, monkeypatch, is_on):
    prefix = tmp_path / "flight" / "7.1-rank"
    if is_on:
        # Read by torch when it first records, in a process of its own.
        monkeypatch.setenv("TORCH_FR_BUFFER_SIZE", "100")
        monkeypatch.setenv("TORCH_FR_DUMP_TEMP_FILE", str(prefix))
    variables = {name: value for name, value in os.environ.items() if name.startswith("TORCH_FR_")}
    data = write_rows(tmp_path / "train.jsonl", make_rows())
    words = flags(BASE | {"data_path": data, "tensor_model_parallel_size": 2, "distributed_timeout_minutes": 0.1})
    ended = run_struck(tmp_path, 2, words, "training", rank=1, number=0, variables=variables)
    text = "".join((tmp_path / f"rank{rank}.txt").read_text() for rank in range(2))
    assert ended[0].status == 75 and text.count("no progress for 6 s") == 1
    assert text.count(f"{prefix}*") == is_on and prefix.parent.exists() == is_on
    if is_on:
        for rank in range(2):
            strings = {
                value for _, value, _ in pickletools.genops((tmp_path / "flight" / f"7.1-rank{rank}").read_bytes())
            }
            assert "gloo:all_reduce" in strings
