"""Saving, loading and exporting on simulated ranks: what goes to the host and back, and what no rank gathers."""

from __future__ import annotations

import pytest

from megatron_ssft.parallel.model.gpt import padded_vocab_size
from megatron_ssft.tokenizers.vocabulary import build_vocabulary
from megatron_ssft.training.rehearsal import simulate_run
from tests.helpers.distributed import run_ranks
from tests.helpers.simulated_steps import VALUES, config_of, count_saved, write_sets

TP2, PP2 = {"tensor_model_parallel_size": 2}, {"pipeline_model_parallel_size": 2}
SP, DIST, BF16 = TP2 | {"sequence_parallel": True}, {"use_distributed_optimizer": True}, {"bf16": True}
UNTIED = {"untie_embeddings_and_output_weights": True}
LAYOUTS = {
    "one rank": (1, BF16),
    "replicas": (2, BF16),
    "distributed optimizer": (2, BF16 | DIST),
    "float32, distributed optimizer": (2, DIST),
    "stages, untied": (2, PP2 | BF16 | UNTIED),
    "interleaved": (2, PP2 | BF16 | {"num_layers_per_virtual_pipeline_stage": 1, "num_layers": 4}),
    "tensor": (4, SP | BF16 | DIST),
}
SECTIONS = "saving", "saving in the background", "exporting"
PLACES = {
    ("megatron_ssft/parallel/checkpoint/writer.py", "_copy_on_host"),
    ("megatron_ssft/parallel/checkpoint/hf.py", "piece_of"),
    ("megatron_ssft/parallel/simulated/checkpoints.py", "read"),
    ("megatron_ssft/parallel/checkpoint/reader.py", "load"),
    ("megatron_ssft/parallel/finite.py", "all_finite"),
    ("megatron_ssft/parallel/optimizer.py", "sharded_optimizer_state"),
}
"""Where the host waits: each tensor on its way to the disk or from it, whether all is finite, the count of steps."""


def simulate_checkpoints(runs):
    """The steps of all ranks of each (values, world size), in this process."""
    return [
        [simulate_run(config_of(values), world_size, rank, with_checkpoint=True) for rank in range(world_size)]
        for values, world_size in runs
    ]


@pytest.fixture(scope="module")
def values(tmp_path_factory):
    sets = write_sets(tmp_path_factory.mktemp("data"), questions=2, letters=20)
    return VALUES | sets | {"matching": "random", "num_layers": 2, "global_batch_size": 8}


@pytest.fixture(scope="module")
def steps(values):
    """{layout: [step of each rank]}"""
    runs = [(values | changes, world_size) for world_size, changes in LAYOUTS.values()]
    return dict(zip(LAYOUTS, run_ranks(1, simulate_checkpoints, runs, timeout=300)[0]))


@pytest.fixture(scope="module")
def real(values):
    """{layout: [(bytes that a rank's files hold, bytes of the whole checkpoint) of each rank]}, for up to 2 ranks."""
    told = {}
    for ranks in (1, 2):
        names = [name for name, (world_size, _) in LAYOUTS.items() if world_size == ranks]
        by_rank = run_ranks(ranks, count_saved, [values | LAYOUTS[name][1] for name in names], timeout=300)
        told |= {name: [by_rank[rank][i] for rank in range(ranks)] for i, name in enumerate(names)}
    return told


def largest_on(values):
    """Bytes of the largest tensor of a checkpoint: a float32 copy of a whole weight."""
    config = config_of(values)
    rows = padded_vocab_size(build_vocabulary(config.run, config.start).size, config.run)
    return 4 * values["hidden_size"] * max(values["ffn_hidden_size"], 2 * values["hidden_size"], rows)


@pytest.mark.slow
@pytest.mark.parametrize("layout", [name for name, (ranks, _) in LAYOUTS.items() if ranks <= 2])
def test_a_rank_saves_what_a_real_one_writes(steps, real, layout):
    saved = [step.section("saving").copies_to_host.bytes for step in steps[layout]]
    written, whole = zip(*real[layout])
    assert sum(saved) == sum(written) == whole[0]
    if "optimizer" in layout:  # ranges of the state differ a little between replicas, and the rest is evened out by it
        assert saved == pytest.approx(written, rel=0.1)
    else:
        assert saved == list(written)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_little_stands_in_host_memory_but_in_the_background(steps, values, layout):
    for step in steps[layout]:
        now, later = step.section("saving"), step.section("saving in the background")
        assert later.copies_to_host == now.copies_to_host
        assert later.staged == pytest.approx(later.copies_to_host.bytes, rel=0.01)
        assert 0 < now.staged <= 2 * largest_on(values)  # two threads
        assert 0 < step.section("loading").staged <= largest_on(values)
        exporting = step.section("exporting")
        assert exporting.staged <= largest_on(values) and exporting.copies_to_host.bytes <= 4 * step.parameters


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_memory_of_the_gpu_hardly_grows(steps, values, layout):
    """Saving: a sum of each tensor, in blocks of 512 bytes. Loading: gate and up projection once more, put together."""
    changes = values | LAYOUTS[layout][1]
    shares = changes.get("tensor_model_parallel_size", 1) * changes.get("pipeline_model_parallel_size", 1)
    projections = changes["num_layers"] * 2 * changes["hidden_size"] * changes["ffn_hidden_size"] // shares
    # Without the distributed optimizer its state of them as well: two averages, and float32 weights beside bfloat16.
    size = 2 if "bf16" in changes else 4
    size += 0 if "use_distributed_optimizer" in changes else 12
    for step in steps[layout]:
        for name in SECTIONS:
            section = step.section(name)
            assert section.memory.peak <= step.between_steps + 3 * 512 * section.operations
            assert section.memory.peak < 1.02 * step.between_steps
        loading = step.section("loading").memory
        assert loading.after == pytest.approx(step.between_steps, rel=0.01)
        assert loading.peak <= step.between_steps + size * projections + 0.15 * step.between_steps


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_nobody_gathers_the_optimizer(steps, layout):
    for step in steps[layout]:
        for name in SECTIONS:
            assert sum(message.bytes for message in step.section(name).collectives) <= 8  # the count of steps
        size = 2 if "bf16" in LAYOUTS[layout][1] else 4
        if "use_distributed_optimizer" not in LAYOUTS[layout][1]:
            size += 12  # replicas hold the same state, and one of them reads it
        loading = step.section("loading")
        assert sum(message.bytes for message in loading.collectives) <= size * step.parameters + 4096
        assert {message.kind for message in loading.collectives} <= {"broadcast", "all_reduce"}


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_all_is_read_once_by_the_replicas(steps, layout):
    """What is read and what was written differ by what stages share, and by what tensor-parallel ranks all hold."""
    read = sum(step.section("loading").copies.bytes for step in steps[layout])
    written = sum(step.section("saving").copies_to_host.bytes for step in steps[layout])
    assert written <= read <= 1.25 * written
    if layout in ("one rank", "distributed optimizer", "float32, distributed optimizer"):
        assert read == pytest.approx(written, abs=8 * len(steps[layout]))


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_host_waits_at_named_places(steps, layout):
    for step in steps[layout]:
        for section in step.checkpoint:
            assert {(wait.site.file, wait.site.function) for wait in section.waits} <= PLACES
            copies = section.copies.count + section.copies_to_host.count
            assert sum(wait.count for wait in section.waits) <= copies + 2


def test_a_step_alone_saves_nothing(values):
    (step,) = run_ranks(1, simulate_alone, values)
    assert step.checkpoint == () and step.section("training")


def simulate_alone(values):
    return simulate_run(config_of(values), 1, 0)


def simulate_gathered(values):
    """A save in which every rank gathers the optimizer's state, and one that keeps a copy on the GPU."""
    import torch
    import torch.distributed as dist

    from megatron_ssft.parallel import optimizer
    from megatron_ssft.parallel.checkpoint import writer

    states, copy = optimizer.sharded_flat_states, writer._copy_on_host
    kept = []

    def gathering(distributed, model):
        for _, _, held in optimizer.flat_states(distributed):
            for part in held.values():
                dist.all_gather([torch.empty_like(part) for _ in range(2)], part)
        return states(distributed, model)

    def keeping(tensor):
        kept.append(tensor.clone())
        return copy(tensor)

    told = []
    for owner, name, fault in ((optimizer, "sharded_flat_states", gathering), (writer, "_copy_on_host", keeping)):
        real = getattr(owner, name)
        setattr(owner, name, fault)
        told.append(simulate_run(config_of(values), 2, 0, with_checkpoint=True))
        setattr(owner, name, real)
        kept.clear()
    return told


@pytest.mark.slow
def test_a_gathered_optimizer_and_a_copy_on_the_gpu_are_seen(values):
    gathered, kept = run_ranks(1, simulate_gathered, values | BF16 | DIST)[0]
    assert sum(message.bytes for message in gathered.section("saving").collectives) > 12 * gathered.parameters
    assert kept.section("saving").memory.peak > 1.3 * kept.between_steps
