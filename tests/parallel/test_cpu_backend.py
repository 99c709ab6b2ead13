"""The stand-in for CUDA: what it maps to the CPU, and that it keeps away from machines with a GPU.

Installing it changes a process for good, so every test does it in a process of its own.
"""

from __future__ import annotations

import pytest
import torch

from tests.helpers.distributed import run_ranks

needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="it refuses to work beside CUDA, as it should")


def in_own_process(body, *args):
    return run_ranks(1, body, *args)[0]


def modes():
    return len(torch.overrides._get_current_function_mode_stack())


# -- beside CUDA -----------------------------------------------------------------------------------------------------


def install_beside_cuda():
    from megatron_ssft.parallel.cpu_backend import install_cpu_backend

    torch.cuda.is_available = lambda: True
    before = dict(vars(torch.cuda)), modes()
    try:
        install_cpu_backend()
    except RuntimeError as error:
        return str(error), (dict(vars(torch.cuda)), modes()) == before
    return None, None


def test_refuses_where_cuda_is_available_and_leaves_everything_as_it_was():
    message, untouched = in_own_process(install_beside_cuda)
    assert message is not None and "CUDA" in message
    assert untouched


def import_everything():
    import megatron_ssft.training.trainer  # noqa: F401
    import pretrain_ssft  # noqa: F401

    return modes(), torch.cuda.current_device.__module__


def test_importing_the_project_installs_nothing():
    assert in_own_process(import_everything) == (0, "torch.cuda")


# -- without CUDA ----------------------------------------------------------------------------------------------------


def install_twice():
    from megatron_ssft.parallel.cpu_backend import install_cpu_backend

    install_cpu_backend()
    first = dict(vars(torch.cuda)), modes()
    install_cpu_backend()
    return modes(), (dict(vars(torch.cuda)), modes()) == first


@needs_no_gpu
def test_installing_twice_is_installing_once():
    assert in_own_process(install_twice) == (1, True)


MAKERS = {
    "zeros": lambda: torch.zeros(1, device="cuda"),
    "indexed": lambda: torch.zeros(1, device="cuda:0"),
    "device object": lambda: torch.empty(2, 3, device=torch.device("cuda")),
    "current device": lambda: torch.ones(1, device=torch.cuda.current_device()),
    "tensor": lambda: torch.tensor([1, 2], device="cuda"),
    "arange": lambda: torch.arange(3, device="cuda"),
    "full": lambda: torch.full((2,), 7.0, device="cuda"),
    "rand": lambda: torch.rand(2, device="cuda"),
    "like": lambda: torch.zeros_like(torch.ones(2), device="cuda"),
    "new_zeros": lambda: torch.ones(2).new_zeros(3, device="cuda"),
    ".cuda()": lambda: torch.zeros(1).cuda(),
    ".cuda(0)": lambda: torch.zeros(1).cuda(0),
    ".to(str)": lambda: torch.zeros(1).to("cuda"),
    ".to(device, dtype)": lambda: torch.zeros(1).to(torch.device("cuda", 0), torch.bfloat16),
    ".to(device=)": lambda: torch.zeros(1).to(device="cuda", non_blocking=True),
    "module.cuda()": lambda: torch.nn.Linear(2, 2).cuda().weight,
    "module.to()": lambda: torch.nn.Linear(2, 2).to("cuda").weight,
}


def made_devices():
    from megatron_ssft.parallel.cpu_backend import install_cpu_backend

    install_cpu_backend()
    found = {name: make().device.type for name, make in MAKERS.items()}
    assert torch.zeros(1).to("cuda", torch.float64).dtype == torch.float64
    assert torch.zeros(2).to(torch.int32).dtype == torch.int32
    kept = torch.ones(1)
    assert kept.cuda() is kept
    assert torch.zeros(1, device="cpu").device.type == "cpu"
    assert torch.zeros(1, device="meta").device.type == "meta"
    return found


@needs_no_gpu
def test_tensors_for_cuda_land_on_the_cpu():
    assert in_own_process(made_devices) == dict.fromkeys(MAKERS, "cpu")


def reported_types():
    from megatron_ssft.parallel.cpu_backend import install_cpu_backend

    install_cpu_backend()
    assert torch.zeros(1).type(torch.float16).dtype == torch.float16  # with an argument it converts, as ever
    return torch.zeros(1).type(), torch.zeros(1, dtype=torch.bfloat16).type()


@needs_no_gpu
def test_types_read_as_cuda_types():
    """Mixed-precision optimizers sort parameters by these names."""
    assert in_own_process(reported_types) == ("torch.cuda.FloatTensor", "torch.cuda.BFloat16Tensor")


def use_streams_and_random_states():
    from megatron_ssft.parallel.cpu_backend import install_cpu_backend

    install_cpu_backend()
    torch.cuda.set_device(0)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        state = torch.cuda.get_rng_state()
        first = torch.rand(4)
        torch.cuda.set_rng_state(state)
        second = torch.rand(4)
    return torch.cuda.is_available(), torch.equal(first, second), torch.cuda.memory_allocated()


@needs_no_gpu
def test_streams_and_random_states_work_and_nothing_claims_that_there_is_a_gpu():
    assert in_own_process(use_streams_and_random_states) == (False, True, 0)


def gradient_through_it():
    from megatron_ssft.parallel.cpu_backend import install_cpu_backend

    install_cpu_backend()
    weight = torch.ones(3, device="cuda", requires_grad=True)
    (weight.cuda().to("cuda") * torch.arange(3.0, device="cuda")).sum().backward()
    return weight.grad.tolist()


@needs_no_gpu
def test_gradients_pass_through():
    assert in_own_process(gradient_through_it) == [0.0, 1.0, 2.0]
