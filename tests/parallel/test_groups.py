"""How many process groups a large job makes, and how many connections a rank holds."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_ssft.config import SSFTConfig
from megatron_ssft.config.flags import build_config
from megatron_ssft.parallel import control_group
from megatron_ssft.parallel.control_group import ControlGroup, block_size
from megatron_ssft.parallel.groups import UnusedGroup, initialize_model_parallel
from megatron_ssft.parallel.topology import first_replica
from tests.helpers.distributed import run_ranks
from tests.helpers.training_runs import BASE


def run_config(tp, pp, **changes):
    shape = {"num_layers": pp * 2, "num_attention_heads": 8, "num_query_groups": 8, "ffn_hidden_size": 64}
    layout = {"tensor_model_parallel_size": tp, "pipeline_model_parallel_size": pp}
    return build_config(BASE | shape | layout | {"data_path": ["x.jsonl"]} | changes, SSFTConfig).run


def pretend(world_size, tp, pp, ranks):
    """Calls of new_group, and sizes of the gloo groups that a rank of such a job is in; each rank in turn."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    config, found = run_config(tp, pp), []
    real = dist.new_group
    for rank in ranks:
        calls, gloo = [], []

        def counting(ranks=None, timeout=None, backend=None, calls=calls, gloo=gloo, rank=rank, **kwargs):
            calls.append(tuple(ranks))
            if backend == "gloo" and rank in ranks:
                gloo.append(len(ranks))
            return real(ranks, timeout, "fake", **kwargs)

        dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
        dist.new_group = counting
        try:
            initialize_model_parallel(config, 1.0)
            ControlGroup(rank, world_size, first_replica(config.parallel, world_size), timedelta(minutes=1))
        finally:
            dist.new_group = real
        own = [each for each in calls if rank in each]
        mp = dist.get_process_group_ranks(parallel_state.get_model_parallel_group())
        assert rank > 0 or mp == first_replica(config.parallel, world_size)
        unused = isinstance(parallel_state.get_tensor_and_data_parallel_group(), UnusedGroup)
        found.append((len(calls), len(own), gloo, unused))
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
    return found


@pytest.mark.parametrize(("tp", "pp", "most_calls"), [(8, 4, 800), (8, 1, 400), (4, 8, 1250)])
def test_a_thousand_ranks_make_few_groups(tp, pp, most_calls):
    """megatron-core alone makes 3,594 at TP8 PP4, and gloo among all 1,024."""
    for calls, own, gloo, unused in run_ranks(1, pretend, 1024, tp, pp, [0, 31, 32, 500, 1023])[0]:
        assert calls <= most_calls
        assert own <= 10
        assert sum(size - 1 for size in gloo) <= 100
        assert unused


@pytest.mark.parametrize(("world_size", "size"), [(1, 1), (8, 8), (64, 64), (65, 8), (1024, 32), (4096, 64)])
def test_blocks(world_size, size):
    assert block_size(world_size) == size


def test_a_group_that_was_not_made_is_not_all_ranks():
    with pytest.raises(AttributeError, match="TENSOR_AND_DATA"):
        UnusedGroup("TENSOR_AND_DATA_PARALLEL_GROUP").size()


def connections():
    """Sockets to other processes that this process holds."""
    links = [os.readlink(path) for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
    return sum(link.startswith("socket:") for link in links)


def talk(block):
    """What each operation gives on this rank, in blocks of this many ranks."""
    control_group.block_size = lambda world_size: min(block, world_size)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    rank, world_size = dist.get_rank(), dist.get_world_size()
    before = connections()
    group = ControlGroup(rank, world_size, [0, 1, world_size - 1], timedelta(seconds=60))
    after = connections()
    texts = [group.broadcast(f"from {rank}".encode() * source, source) for source in range(world_size)]
    gathered = group.all_gather(b"x" * rank)
    numbers = torch.tensor([rank, -rank])
    group.all_reduce(numbers, dist.ReduceOp.MAX)
    least = torch.tensor([rank + 5])
    group.all_reduce(least, dist.ReduceOp.MIN)
    received = torch.zeros(3)
    if rank == world_size - 1:
        group.send(torch.tensor([1.0, 2.0, 3.0]), 0)
    if rank == 0:
        group.receive(received, world_size - 1)
    group.barrier()
    dist.destroy_process_group()
    return texts, gathered, numbers.tolist(), least.tolist(), received.sum().item(), after - before


@pytest.mark.slow
@pytest.mark.parametrize(("world_size", "block"), [(4, 4), (8, 3), (8, 2), (5, 1)])
def test_all_ranks_hear_the_same(world_size, block):
    results = run_ranks(world_size, talk, block)
    for rank, (texts, gathered, numbers, least, received, _) in enumerate(results):
        assert texts == [f"from {source}".encode() * source for source in range(world_size)]
        assert gathered == [b"x" * each for each in range(world_size)]
        assert (numbers, least) == ([world_size - 1, 0], [5])
        assert received == (6.0 if rank == 0 else 0.0)


@pytest.mark.slow
def test_ranks_in_blocks_hold_fewer_connections():
    """A member of a block of two that leads none is connected with one other, and not with seven."""
    together, in_blocks = ([result[-1] for result in run_ranks(8, talk, block)] for block in (8, 2))
    assert in_blocks[3] <= together[3] - 5
