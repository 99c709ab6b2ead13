"""--deterministic-mode: the same bits on a GPU each time, at the same parallel layout on the same kind of GPUs.

PyTorch, cuBLAS, NCCL and TransformerEngine each have a switch of their own.
"""

from __future__ import annotations

import os
from collections.abc import Callable, MutableMapping

import torch
import torch.utils.deterministic

from megatron_ssft.errors import UserError

_ENVIRONMENT: dict[str, tuple[str, Callable[[str], bool], str]] = {
    "CUBLAS_WORKSPACE_CONFIG": (":4096:8", lambda value: value in (":4096:8", ":16:8"), ":4096:8 or :16:8"),
    "NCCL_ALGO": (
        "^NVLS",
        lambda value: value != "" and value.startswith("^") == ("NVLS" in value.upper()),
        "^NVLS, or Ring, Tree or another one without NVLS",
    ),
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO": ("0", lambda value: value == "0", "0"),
}
"""Variable -> (value where there is none, whether a value will do, which will do). They are those that Megatron-LM's
flag of this name asks for; NVSwitches that add up (NVLS) do it in any order."""


def make_deterministic(environment: MutableMapping[str, str] | None = None) -> None:
    """Let the kernels of this process be deterministic from now on. Called before it first uses a GPU.

    Raises:
        UserError: a variable of the environment asks for the contrary.
    """
    environment = os.environ if environment is None else environment
    for name, (value, will_do, which) in _ENVIRONMENT.items():
        if not will_do(environment.setdefault(name, value)):
            raise UserError(
                f"--deterministic-mode: {name}={environment[name]} is against it; unset it, or give {which}"
            )
    torch.use_deterministic_algorithms(True)
    # An aid for finding faults, which takes time. It is a property of the module.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def determinism_line(is_asked_for: bool, device: torch.device) -> str | None:
    """What can be said of two runs of the same on this device, for the log; None where there is nothing to say."""
    if device.type == "cpu":
        return (
            "--deterministic-mode changes nothing on the CPU: its kernels are deterministic" if is_asked_for else None
        )
    if is_asked_for:
        return "deterministic: a run that is resumed at the same layout on the same GPUs has the same bits"
    return "not deterministic: a run that is resumed equals one that is not up to rounding (--deterministic-mode)"
