"""--device: which jobs run on the CPU, and which are refused rather than run there unasked."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megatron_ssft.config import ParallelConfig
from megatron_ssft.errors import UserError
from megatron_ssft.parallel import device
from megatron_ssft.parallel.device import choose_device, sign_of_gpus, to_device
from tests.helpers.distributed import run_ranks
from tests.helpers.paths import ROOT

CPU = torch.device("cpu")
needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="for machines whose torch has no GPU")
SIGNS = {
    "a SLURM job with GPUs": ({"SLURM_GPUS_ON_NODE": "8"}, (), "SLURM_GPUS_ON_NODE=8"),
    "named GPUs per node": ({"SLURM_GPUS_PER_NODE": "h100:8"}, (), "SLURM_GPUS_PER_NODE=h100:8"),
    "a SLURM job whose GPUs are hidden": ({"SLURM_JOB_GPUS": "0,1", "CUDA_VISIBLE_DEVICES": ""}, (), "SLURM_JOB_GPUS"),
    "visible devices": ({"CUDA_VISIBLE_DEVICES": "0,1"}, (), "CUDA_VISIBLE_DEVICES=0,1"),
    "a device by its name": ({"CUDA_VISIBLE_DEVICES": "GPU-8932f937"}, (), "CUDA_VISIBLE_DEVICES=GPU-8932f937"),
    "a driver": ({}, ("dev/nvidiactl",), "dev/nvidiactl"),
    "a card": ({"SLURM_GPUS_ON_NODE": "0"}, ("dev/nvidia3",), "dev/nvidia3"),
    "a card the driver knows": ({}, ("proc/driver/nvidia/gpus/0000:01:00.0",), "0000:01:00.0"),
    "a laptop": ({}, (), None),
    "a laptop with other devices": ({}, ("dev/null", "dev/nvram"), None),
    "a card that is hidden": ({"CUDA_VISIBLE_DEVICES": ""}, ("dev/nvidia0", "dev/nvidiactl"), None),
    "a card that is hidden by a number": ({"CUDA_VISIBLE_DEVICES": "-1"}, ("dev/nvidia0",), None),
    "a CPU job on a node with cards": ({"CUDA_VISIBLE_DEVICES": "NoDevFiles"}, ("dev/nvidia0",), None),
}


@pytest.mark.parametrize("name", SIGNS)
def test_signs_of_a_gpu(name, tmp_path):
    environment, files, expected = SIGNS[name]
    for file in files:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
    sign = sign_of_gpus(environment, tmp_path)
    assert (sign is None) == (expected is None)
    assert expected is None or expected in sign


def test_an_unknown_device_is_refused():
    with pytest.raises(UserError, match="^--device gpu: choose one of auto, cuda, cpu"):
        ParallelConfig(device="gpu")


@needs_no_gpu
def test_a_gpu_job_does_not_run_on_the_cpu_unasked(monkeypatch):
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "8")
    with pytest.raises(UserError, match="SLURM_GPUS_ON_NODE=8.*torch.*--device cpu"):
        choose_device("auto", 0)


@needs_no_gpu
def test_a_gpu_that_is_asked_for_has_to_be_there(monkeypatch):
    monkeypatch.setattr(device, "sign_of_gpus", lambda *_: None)
    with pytest.raises(UserError, match="^--device cuda: "):
        choose_device("cuda", 0)


def choose(requested, variables, has_cuda):
    import os

    os.environ |= variables
    if has_cuda:
        torch.cuda.is_available = lambda: True
    chosen = choose_device(requested, 0)
    made = torch.zeros(2, device="cuda")  # what megatron-core would do
    return str(chosen), torch.cuda.is_available(), str(made.device)


@pytest.mark.parametrize(
    ("requested", "variables", "has_cuda"),
    [
        pytest.param("auto", {"CUDA_VISIBLE_DEVICES": ""}, False, marks=needs_no_gpu),
        ("cpu", {"SLURM_GPUS_ON_NODE": "8"}, False),
        ("cpu", {"SLURM_GPUS_ON_NODE": "8"}, True),
    ],
)
def test_the_cpu_where_it_is_asked_for_or_all_there_is(requested, variables, has_cuda):
    assert run_ranks(1, choose, requested, variables, has_cuda)[0] == ("cpu", False, "cpu")


class Recorder:
    """Stands for a tensor of the host that is to be copied to a GPU, which is not there."""

    device = CPU

    def __init__(self, calls):
        self.calls = calls

    def pin_memory(self):
        self.calls.append("pinned")
        return self

    def to(self, device, non_blocking=False):
        self.calls.append((device.type, non_blocking))
        return self


def test_copies_to_a_gpu_are_from_page_locked_memory():
    """From any other the host waits."""
    calls = []
    to_device(Recorder(calls), torch.device("cuda", 0))
    assert calls == ["pinned", ("cuda", True)]


@pytest.mark.parametrize("dtype", [np.int64, np.float32, np.int32, np.float64])
def test_nothing_is_copied_on_the_cpu(dtype):
    values = np.arange(6, dtype=dtype).reshape(2, 3)
    tensor = to_device(values, CPU)
    values[1, 2] = 50
    assert tensor[1, 2] == 50 and tensor.shape == (2, 3) and tensor.numpy().dtype == dtype
    assert to_device(tensor, CPU) is tensor


def test_there_is_one_door_to_the_device():
    """A copy made elsewhere would not be from page-locked memory, and nobody would notice."""
    package = ROOT / "megatron_ssft"
    files = [file for file in package.rglob("*.py") if "non_blocking" in file.read_text(encoding="utf-8")]
    assert {file.relative_to(package).as_posix() for file in files} == {
        "parallel/device.py",
        "parallel/simulated/gpu.py",
    }
