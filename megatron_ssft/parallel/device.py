"""The device of this rank, for --device: a job that has GPUs never runs on the CPU without being told to."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from megatron_ssft.errors import UserError
from megatron_ssft.parallel.cpu_backend import install_cpu_backend

_SLURM_GPUS = (
    *("SLURM_GPUS_ON_NODE", "SLURM_STEP_GPUS", "SLURM_JOB_GPUS", "SLURM_GPUS"),
    *("SLURM_GPUS_PER_NODE", "SLURM_GPUS_PER_TASK", "SLURM_GPUS_PER_SOCKET"),
)
_NO_GPUS = ("", "-1", "NoDevFiles", "none", "void")
"""Values of CUDA_VISIBLE_DEVICES that hide all GPUs, the third of them SLURM's for a job without any."""
_DEVICE_FILES = ("dev/nvidiactl", "dev/nvidia[0-9]*", "proc/driver/nvidia/gpus/*")
"""Patterns under the root folder of files that only a machine with a GPU and its driver has."""


def choose_device(requested: str, local_rank: int) -> torch.device:
    """This rank's GPU, or the CPU with megatron-core's CUDA calls mapped to it.

    Args:
        requested: auto (the GPU where there is one), cuda or cpu.

    Raises:
        UserError: there is no GPU for this rank, or one that cannot be used and nobody has asked for the CPU.
    """
    if requested == "cpu":
        # Before anything asks for a GPU in this process, and for the programs that it starts.
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        install_cpu_backend(hide_cuda=True)
        return torch.device("cpu")
    if torch.cuda.is_available():
        visible = torch.cuda.device_count()
        if visible > 1 and local_rank >= visible:
            raise UserError(f"local rank {local_rank} has no GPU, {visible} are visible: start one process per GPU")
        device = torch.device("cuda", local_rank if visible > 1 else 0)  # SLURM may show each task its own GPU only
        torch.cuda.set_device(device)
        return device
    problem = why_no_cuda()
    if requested == "cuda":
        raise UserError(f"--device cuda: {problem}")
    sign = sign_of_gpus(os.environ)
    if sign is not None:
        raise UserError(f"this job has GPUs ({sign}), but {problem}; --device cpu runs it on the CPU all the same")
    install_cpu_backend()
    return torch.device("cpu")


def is_gpu(device: torch.device) -> bool:
    """Whether this is a GPU, a simulated one (simulated/) included."""
    return device.type != "cpu"


def to_device(values: np.ndarray | Tensor, device: torch.device) -> Tensor:
    """The host's values on the device, same shape and type. The host does not wait for the copy.

    CUDA copies in the background from page-locked memory only; from any other the host waits, whatever `non_blocking`
    says. torch keeps the page-locked copy until the GPU has read it. On the CPU nothing is copied: the tensor shares
    the array's memory.
    """
    tensor = torch.from_numpy(values) if isinstance(values, np.ndarray) else values
    if not is_gpu(device) or is_gpu(tensor.device):
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def autocast_type(device: torch.device) -> str:
    """What torch.autocast knows the device by; a simulated GPU has no type of its own there."""
    return "cpu" if device.type == "meta" else device.type


def why_no_cuda() -> str:
    """Why torch has no GPU here, and what to do."""
    if not torch.backends.cuda.is_built():
        return f"the installed torch {torch.__version__} is built without CUDA; install one with it"
    return f"CUDA does not work with torch {torch.__version__}; check driver, container and CUDA_VISIBLE_DEVICES"


def sign_of_gpus(environment: Mapping[str, str], root: Path = Path("/")) -> str | None:
    """By what this job is seen to have a GPU; None: by nothing.

    GPUs of the machine do not count where CUDA_VISIBLE_DEVICES hides them, those that SLURM gave to the job do.
    """
    for name in _SLURM_GPUS:
        value = environment.get(name, "")
        if value.strip() not in ("", "0"):
            return f"{name}={value}"
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return None if visible.strip() in _NO_GPUS else f"CUDA_VISIBLE_DEVICES={visible}"
    files = (path for pattern in _DEVICE_FILES for path in sorted(root.glob(pattern)))
    found = next(files, None)
    return None if found is None else str(found)
