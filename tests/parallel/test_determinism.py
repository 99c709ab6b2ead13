"""--deterministic-mode: which switches it turns, what of the environment is against it, and what the log says."""

from __future__ import annotations

import pytest
import torch

from megatron_ssft.errors import UserError
from megatron_ssft.parallel.determinism import determinism_line, make_deterministic

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
NAMES = ("CUBLAS_WORKSPACE_CONFIG", "NCCL_ALGO", "NVTE_ALLOW_NONDETERMINISTIC_ALGO")


@pytest.fixture(autouse=True)
def put_back():
    fills = torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = fills


def test_every_library_is_told():
    environment = {}
    make_deterministic(environment)
    assert environment == {
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
        "NCCL_ALGO": "^NVLS",
        "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0",
    }
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.is_deterministic_algorithms_warn_only_enabled(), "then flash attention would not be"


GOOD = [":16:8", "Ring", "Tree", "^NVLS", "CollnetChain"]
BAD = {
    "CUBLAS_WORKSPACE_CONFIG": [":0:0", ""],
    "NCCL_ALGO": ["NVLS", "NVLSTree", "Ring,NVLS", "^Ring", ""],
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO": ["1", ""],
}


@pytest.mark.parametrize("value", GOOD)
def test_what_is_set_and_will_do_stays(value):
    name = NAMES[0] if value.startswith(":") else NAMES[1]
    environment = {name: value}
    make_deterministic(environment)
    assert environment[name] == value and set(environment) == set(NAMES)


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in BAD.items() for value in values])
def test_an_environment_that_is_against_it_is_refused(name, value):
    with pytest.raises(UserError) as refusal:
        make_deterministic({name: value})
    assert str(refusal.value).startswith(f"--deterministic-mode: {name}={value} is against it; unset it, or give ")


def test_the_log_says_what_holds():
    assert determinism_line(False, CPU) is None
    assert "changes nothing on the CPU" in determinism_line(True, CPU)
    assert "up to rounding (--deterministic-mode)" in determinism_line(False, GPU)
    assert "same bits" in determinism_line(True, GPU)
