"""Each place that does something else on a GPU runs there in a test: on the simulated one, or in a test of its own."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from megatron_ssft.errors import UserError
from megatron_ssft.generation import hf_backend
from megatron_ssft.parallel.checkpoint import hf_verification
from megatron_ssft.parallel.device import choose_device
from megatron_ssft.parallel.topology import job_peak_flops
from tests.helpers.cuda_branches import executed_lines, find_branches
from tests.helpers.distributed import run_ranks
from tests.helpers.paths import ROOT
from tests.helpers.simulated_steps import VALUES, config_of

P = "megatron_ssft/parallel/"
SIMULATED = {
    (P + "attention/choice.py", "_needs"): 'return "needs --bf16" if dtype not in',
    (P + "attention/choice.py", "_capability"): "return torch.cuda.get_device_capability(",
    (P + "attention/kernels.py", "SdpaAttend.__call__"): "key, value = (t.repeat_interleave(n // g, dim=1)",
    (P + "checkpoint/writer.py", "_copy_on_host"): "return tensor.cpu() if is_gpu(tensor.device)",
    (P + "checkpoint/writer.py", "on_host"): "return tensor if is_alone else _copy_on_host(tensor)",
    (P + "memory.py", "memory_figures"): "torch.cuda.reset_peak_memory_stats(device)",
    (P + "model/gpt.py", "transformer_config"): "on_cuda = torch.cuda.is_available()",
    (P + "model/loss_head.py", "_product"): "return torch.mm(hidden.bfloat16(), weight.bfloat16().t(), out_dtype=",
    (P + "own_work.py", "OwnWork.__init__"): "self._events[self._used - 1].synchronize()",
    (P + "engine.py", "Engine.__init__"): "self.config = config = decided(config",
    (P + "engine.py", "Engine._forward_only"): "with torch.no_grad(), torch.autocast(device",
    (P + "device.py", "is_gpu"): 'return device.type != "cpu"',
    (P + "device.py", "to_device"): "return tensor.pin_memory().to(device, non_blocking=True)",
    (P + "device.py", "autocast_type"): 'return "cpu" if device.type == "meta"',
    (P + "cuda_calls.py", "CudaCalls.__init__"): "self._type_names = ",
    (P + "cuda_calls.py", "_is_cuda"): "return (isinstance(device, str)",
}
"""(file, function) -> the beginning of a line that only a GPU gets to, or that asks."""
ELSEWHERE = {
    ("megatron_ssft/generation/hf_backend.py", "HFBackend._rows_that_fit"): "test_rows_of_a_batch_fit_into_a_gpu",
    ("megatron_ssft/generation/hf_backend.py", "_device"): "test_generation_takes_the_gpu_and_the_stored_type",
    ("megatron_ssft/generation/hf_backend.py", "_dtype"): "test_generation_takes_the_gpu_and_the_stored_type",
    (P + "checkpoint/hf_verification.py", "_layers_that_fit"): "test_layers_to_compare_fit_into_a_gpu",
    (P + "device.py", "choose_device"): "test_each_rank_takes_its_gpu",
    (P + "determinism.py", "determinism_line"): "tests/parallel/test_determinism.py",
    (P + "device_defaults.py", "refuse_fusions"): "tests/parallel/test_device_defaults.py",
    (P + "device_defaults.py", "device_line"): "tests/parallel/test_device_defaults.py",
    (P + "topology.py", "initialize_topology"): "test_ranks_with_a_gpu_talk_by_nccl",
    (P + "topology.py", "job_peak_flops"): "test_the_peak_of_a_gpu_is_known_by_its_name",
    (P + "model/gpt.py", "_transformer_engine_spec"): "test_transformer_engine_is_refused",
    (P + "cpu_backend.py", "install_cpu_backend"): "tests/parallel/test_cpu_backend.py",
    ("megatron_ssft/training/packages.py", "refuse_missing"): "tests/training/test_packages.py",
    ("megatron_ssft/training/packages.py", "kernels_remark"): "tests/training/test_packages.py",
}
"""(file, function) -> what runs its GPU side: a test below, or a file of tests. They choose or describe a GPU, or are
of generation, so nothing of them is in a step."""
PADDED_CP = {"context_parallel_size": 2, "sequence_layout": "padded"}
OF_THE_SIMULATION = P + "simulated/"


def test_every_branch_is_listed():
    found = {branch for branch in find_branches(ROOT) if not branch[0].startswith(OF_THE_SIMULATION)}
    assert found == SIMULATED.keys() | ELSEWHERE.keys()


PLANTED = [
    "def f(x):\n    if x.device.type == 'cuda':\n        return 1",
    "def f(x):\n    return x.is_cuda",
    "def f():\n    return 1 if torch.cuda.is_available() else 2",
    "def f(device):\n    if is_gpu(device):\n        return 1",
    "def f(device):\n    if 'cpu' != device.type:\n        return 1",
]


@pytest.mark.parametrize("source", PLANTED)
def test_a_new_branch_is_found(tmp_path, source):
    path = tmp_path / "megatron_ssft" / "x.py"
    path.parent.mkdir()
    path.write_text(source)
    assert find_branches(tmp_path) == {("megatron_ssft/x.py", "f")}


def test_other_comparisons_are_none(tmp_path):
    path = tmp_path / "megatron_ssft" / "x.py"
    path.parent.mkdir()
    path.write_text("def f(x, kind):\n    return kind == 'cpu' or x == 'cuda' or accelerator.is_available()")
    assert find_branches(tmp_path) == set()


@pytest.mark.slow
def test_the_simulated_gpu_gets_to_them(tmp_path):
    lines = run_ranks(1, executed_lines, sorted({file for file, _ in SIMULATED}), tmp_path, timeout=300)[0]
    missed = [
        f"{file}, {function}: {begin}"
        for (file, function), begin in SIMULATED.items()
        if not any(line.startswith(begin) for line in lines[file])
    ]
    assert missed == []


def test_the_other_tests_are_there():
    for name in ELSEWHERE.values():
        assert (ROOT / name).is_file() if "/" in name else name in globals()


# -- what no step gets to --------------------------------------------------------------------------------------------


@pytest.fixture
def gpus(monkeypatch):
    """Torch says that there are two GPUs, of which 8 GB are free each."""
    chosen = []
    for name, answer in {
        "is_available": lambda: True,
        "device_count": lambda: 2,
        "set_device": chosen.append,
        "mem_get_info": lambda device=None: (8 * 10**9, 80 * 10**9),
        "get_device_name": lambda device=None: "NVIDIA H100 80GB HBM3",
    }.items():
        monkeypatch.setattr(torch.cuda, name, answer)
    return chosen


def test_each_rank_takes_its_gpu(gpus, monkeypatch):
    assert [str(choose_device(requested, rank)) for requested, rank in (("auto", 0), ("cuda", 1))] == [
        "cuda:0",
        "cuda:1",
    ]
    assert list(map(str, gpus)) == ["cuda:0", "cuda:1"]
    with pytest.raises(UserError, match="^local rank 2 has no GPU, 2 are visible"):
        choose_device("auto", 2)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)  # SLURM shows each task its own
    assert str(choose_device("auto", 3)) == "cuda:0"


def test_the_peak_of_a_gpu_is_known_by_its_name(gpus):
    topology = SimpleNamespace(device=torch.device("cuda"), world_size=16)
    config = config_of(VALUES | {"data_path": ["unused"], "bf16": True}).run
    assert job_peak_flops(config, topology) == 16 * 989e12
    assert job_peak_flops(config_of(VALUES | {"data_path": ["unused"]}).run, topology) is None


def backend_of_groups():
    """What process groups are asked for where the rank has a GPU."""
    import torch.distributed as dist

    from megatron_ssft.parallel import topology

    class Asked(Exception):
        pass

    def ask(backend, **kwargs):
        raise Asked(backend)

    topology.choose_device = lambda requested, local_rank: torch.device("cuda")
    dist.init_process_group = ask
    try:
        topology.initialize_topology(config_of(VALUES | {"data_path": ["unused"]}).run)
    except Asked as asked:
        return str(asked)


def test_ranks_with_a_gpu_talk_by_nccl():
    assert run_ranks(1, backend_of_groups) == ["nccl"]


def test_layers_to_compare_fit_into_a_gpu(gpus):
    shape = {"num_layers": 64, "hidden_size": 5120, "ffn_hidden_size": 27648, "num_attention_heads": 40,
             "num_query_groups": 8, "vocab_size": 152064}  # fmt: skip
    config = config_of(VALUES | {"data_path": ["unused"]} | shape).run
    one = hf_verification._layers_that_fit(config)
    torch.cuda.mem_get_info = lambda device=None: (64 * 10**9, 80 * 10**9)
    host = hf_verification.psutil.virtual_memory().available
    assert 1 <= one <= 3  # a layer takes 2 GB in float32
    assert host < 20e9 or hf_verification._layers_that_fit(config) > one


def test_rows_of_a_batch_fit_into_a_gpu(gpus):
    shape = SimpleNamespace(num_key_value_heads=8, head_dim=128, num_hidden_layers=64, num_attention_heads=40)
    own = SimpleNamespace(_config=shape, _dtype=torch.bfloat16, _device=torch.device("cuda"))
    request = SimpleNamespace(prompt=[0] * 100, start=[0], limit=923)
    # 8 GB are free, an eighth of it is used: 262,144 bytes a token.
    assert hf_backend.HFBackend._rows_that_fit(own, [request]) == int(8e9 / 8 / (2 * 64 * 8 * 128 * 2 * 1024))


def test_generation_takes_the_gpu_and_the_stored_type(gpus, monkeypatch):
    device = hf_backend._device(None)
    assert device.type == "cuda"
    assert hf_backend._dtype(None, device, SimpleNamespace(dtype=torch.bfloat16)) == torch.bfloat16
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert hf_backend._device(None).type == "cpu"
    with pytest.raises(UserError, match="^--device cuda: torch sees no GPU here; give cpu"):
        hf_backend._device("cuda")


def refused(values):
    """Why these runs are not simulated."""
    from megatron_ssft.training.rehearsal import simulate_run

    told = []
    for changes in values:
        try:
            simulate_run(config_of(changes), changes.get("tensor_model_parallel_size", 1), 0)
        except UserError as error:
            told.append(str(error))
    return told


def test_transformer_engine_is_refused():
    values = VALUES | {"data_path": ["unused"]}
    te = {"transformer_impl": "transformer_engine"}
    reasons = run_ranks(1, refused, [values | te, values | te | PADDED_CP])[0]
    assert len(reasons) == 2
    begin = "--transformer-impl transformer_engine: its kernels cannot be simulated"
    assert [reason[: len(begin)] for reason in reasons] == [begin] * 2


def test_autocast_is_refused():
    (reason,) = run_ranks(1, refused, [VALUES | {"data_path": ["unused"], "matching_precision": "bf16"}])[0]
    assert reason.startswith("--matching-precision bf16: ") and reason.endswith("or --bf16")


def imported_without_a_part():
    """What importing the simulation says where torch has lost something that it is built on."""
    import sys

    for name in [name for name in sys.modules if "parallel.simulated" in name]:
        del sys.modules[name]
    sys.modules["torch.testing._internal.distributed.fake_pg"] = None
    torch.__version__ = "9.9.0"
    try:
        __import__("megatron_ssft.parallel.simulated.simulate")
    except UserError as error:
        return str(error)


def test_another_torch_is_named_in_one_line():
    (told,) = run_ranks(1, imported_without_a_part)
    assert told.startswith("the simulated GPU does not work with torch 9.9.0 (") and "\n" not in told
