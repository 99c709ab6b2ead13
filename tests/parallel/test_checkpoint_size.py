"""How large a checkpoint is said to be, against its tensors; and what is read of it, by whom."""

from __future__ import annotations

import collections
import math
from pathlib import Path

import pytest

from megatron_ssft.config import CheckpointConfig
from megatron_ssft.parallel.checkpoint.checkpoint_size import CheckpointSize, shown, space_line
from megatron_ssft.parallel.checkpoint.run_checkpoint import save_checkpoint
from tests.helpers.checkpoints import TP2_PP2, build, load, metadata, same_state, train_and_save
from tests.helpers.distributed import run_ranks


def size_and_save(values, run):
    """(bytes by the shape, bytes by the model, each of weights and optimizer) of a trainer that also saves."""
    from megatron_ssft.parallel.checkpoint.checkpoint_size import estimate_size, measure_size

    trainer = build(values)
    trainer.train_step()
    save_checkpoint(trainer.engine, Path(run), 1, trainer.state())
    tags = trainer.vocabulary.tags
    sizes = estimate_size(trainer.config.run, trainer.vocabulary.size, len(tags.row_ids)), measure_size(trainer.engine)
    return [(size.weights, size.optimizer) for size in sizes]


def stored(folder):
    """Bytes of the weights and of the optimizer's tensors."""
    totals = collections.Counter()
    for name, entry in metadata(folder).state_dict_metadata.items():
        totals[name.startswith("optimizer")] += math.prod(entry.size) * entry.properties.dtype.itemsize
    return totals[False], totals[True]


@pytest.mark.parametrize(
    ("ranks", "more"),
    [
        (1, {}),
        (1, {"normalization": "LayerNorm", "add_bias_linear": True, "swiglu": False, "bf16": True}),
        (1, {"qk_layernorm": True, "untie_embeddings_and_output_weights": True, "use_distributed_optimizer": True}),
        (1, {"add_qkv_bias": True, "forking_token_format": "text"}),
        pytest.param(4, TP2_PP2 | {"bf16": True, "qk_layernorm": True}, marks=pytest.mark.slow),
        pytest.param(2, {"bf16": True, "use_distributed_optimizer": True}, marks=pytest.mark.slow),
    ],
)
def test_the_size_is_that_of_the_tensors(values, tmp_path, ranks, more):
    results = run_ranks(ranks, size_and_save, values | more, str(tmp_path / "run"))
    expected = stored(tmp_path / "run" / "iter_0000001")
    assert all(sizes == [expected, expected] for sizes in results), (results, expected)


def sizes_with_frozen_layers(values, last_layers):
    """(bytes by the shape, bytes by the model) where only the last layers train."""
    from megatron_ssft.config import SSFTConfig
    from megatron_ssft.config.flags import build_config
    from megatron_ssft.parallel.checkpoint.checkpoint_size import estimate_size, measure_size
    from megatron_ssft.parallel.engine import Engine
    from megatron_ssft.parallel.topology import initialize_topology
    from megatron_ssft.tokenizers.vocabulary import build_vocabulary

    config = build_config(values, SSFTConfig)
    vocabulary = build_vocabulary(config.run, config.start)
    rows = vocabulary.tags.row_ids
    engine = Engine(config.run, initialize_topology(config.run), vocabulary.size, rows)
    engine.start(last_layers)
    sizes = estimate_size(config.run, vocabulary.size, len(rows), last_layers), measure_size(engine)
    return [(size.weights, size.optimizer) for size in sizes]


@pytest.mark.parametrize("last_layers", [0, 1, 3, 9])
@pytest.mark.parametrize(
    ("ranks", "more"),
    [
        (1, {}),
        (1, {"untie_embeddings_and_output_weights": True, "normalization": "LayerNorm", "bf16": True}),
        (1, {"untie_embeddings_and_output_weights": True, "forking_token_format": "text"}),
        pytest.param(4, TP2_PP2 | {"untie_embeddings_and_output_weights": True}, marks=pytest.mark.slow),
        pytest.param(4, TP2_PP2, marks=pytest.mark.slow),
    ],
)
def test_frozen_parameters_have_no_optimizer_state(values, ranks, more, last_layers):
    if last_layers == 0 and more.get("forking_token_format") == "text":
        pytest.skip("nothing would train")
    for told, measured in run_ranks(ranks, sizes_with_frozen_layers, values | more, last_layers):
        assert told == measured


SIZE = CheckpointSize(weights=66 * 10**9, optimizer=393 * 10**9)


@pytest.mark.parametrize(
    ("flags", "iteration", "told"),
    [
        ({}, 0, "1 to be written, all stay: 459 GB, 2 TB are free"),
        ({"save_interval": 10}, 0, "10 to be written, all stay: 4.59 TB, 2 TB are free: NOT ENOUGH"),
        ({"save_interval": 10}, 70, "3 to be written, all stay: 1.38 TB, 2 TB are free"),
        ({"save_interval": 10, "keep_last": 2}, 0, "the last 2 stay, 3 at once while the newest is written: 1.38 TB"),
        ({"save_interval": 30, "keep_last": 9}, 0, "4 to be written, the last 9 stay: 1.84 TB, 2 TB are free"),
        (
            {"save_interval": 10, "keep_last": 1, "keep_every": 50},
            0,
            "the last 1 stay and those of every 50 steps, 4 at once while the newest is written: 1.84 TB",
        ),
        ({"save_interval": 10, "save_optim": False}, 0, "66 GB each (weights 66 GB); 10 to be written"),
        ({"export_hf_at_save": True}, 0, "525 GB each (weights 66 GB, optimizer 393 GB, export 66 GB); 1 to be"),
    ],
)
def test_what_a_run_needs_in_words(flags, iteration, told):
    line = space_line(CheckpointConfig(save="run", **flags), SIZE, iteration, 100, 2 * 10**12)
    assert line.startswith("checkpoints: ") and told in line


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (459_222_000_000, "459 GB"), (17e12, "17 TB")]
)
def test_bytes_for_a_person(count, text):
    assert shown(count) == text


def load_and_count(values):
    """The state after loading, and (chunk, bytes) of what this rank read of the files."""
    from megatron_ssft.parallel.checkpoint.reader import _ChunkReader

    real, read = _ChunkReader._chunk, []

    def chunk(reader, item):
        place = reader.storage_data[item.storage_index]
        read.append(((place.relative_path, place.offset), place.length))
        return real(reader, item)

    _ChunkReader._chunk = chunk
    return load(values) | {"read": read}


@pytest.mark.slow
@pytest.mark.parametrize("more", [{}, {"use_distributed_optimizer": True, "bf16": True}], ids=["plain", "distributed"])
def test_replicas_share_the_reading(values, tmp_path, more):
    """Each chunk is read once, by one of two replicas, and both hold the same in the end."""
    trained = run_ranks(2, train_and_save, values | more, str(tmp_path / "run"), 2)
    loaded = run_ranks(2, load_and_count, values | more | {"load": str(tmp_path / "run")})
    same_state(trained, loaded)
    counts = collections.Counter(chunk for result in loaded for chunk, _ in result["read"])
    assert set(counts.values()) == {1}
    assert len(counts) == len(metadata(tmp_path / "run" / "iter_0000002").storage_data)
    shares = [sum(length for _, length in result["read"]) for result in loaded]
    assert max(shares) < 0.6 * sum(shares)
