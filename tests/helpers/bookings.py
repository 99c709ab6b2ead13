"""What a booking starts from: a small run with its data, tokenized."""

from __future__ import annotations

from pathlib import Path

from megatron_ssft.config import SSFTConfig
from megatron_ssft.config.dry_run import DryRun
from megatron_ssft.config.flags import build_config
from megatron_ssft.data.cache import SetDataset
from megatron_ssft.objectives.sets import prepare_data
from megatron_ssft.parallel.simulated.records import Copies, Flops, Memory, Section
from megatron_ssft.tokenizers.vocabulary import build_vocabulary
from tests.helpers.simulated_steps import VALUES, write_sets

GPU_RUN = {"bf16": True, "use_distributed_optimizer": True, "untie_embeddings_and_output_weights": True}
ASKED = DryRun(world_size=8, gpu="H100-80GB")


def prepared(folder, questions=12, letters=160, **changes):
    """(configuration, data set, vocabulary) of a run in bfloat16."""
    config = build_config(VALUES | write_sets(folder, questions, letters) | GPU_RUN | changes, SSFTConfig)
    vocabulary = build_vocabulary(config.run, config.start)
    dataset = SetDataset.open(Path(prepare_data(config, vocabulary)["train"]), config.data.data_path)
    return config, dataset, vocabulary


def section(name, messages=(), flops=0.0, memory=None):
    """A part of a simulated step that did so much."""
    nothing = Copies(0, 0, 0)
    memory = memory or Memory(0, 0, {}, {}, ())
    return Section(name, memory, Flops(flops, 0, 0), tuple(messages), nothing, nothing, 0, (), 1, 0.0)
