"""Runs and imported models to Hugging Face folders, whole or not at all, with the proof that nothing was lost."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

from megatron_ssft.config import RunConfig
from megatron_ssft.errors import UserError
from megatron_ssft.formats.files import publish_new_folder
from megatron_ssft.hf.assets import write_assets
from megatron_ssft.hf.folder import read_hf_config
from megatron_ssft.hf.scratch_assets import check_tokenizer
from megatron_ssft.parallel.checkpoint.hf import compare_hf_weights, export_hf_weights
from megatron_ssft.parallel.checkpoint.hf_verification import LogitReport, verify_logits
from megatron_ssft.parallel.checkpoint.loading import load_folder
from megatron_ssft.parallel.collectives import barrier, on_first_rank
from megatron_ssft.parallel.engine import Engine
from megatron_ssft.tokenizers.vocabulary import Vocabulary

SAMPLE = (
    "A farmer has 17 sheep; all but 9 run away. How many are left? Let us think: 17 - 9 = 8 ran, so 9 are left.\n"
    "def f(x):\n    return x ** 2 + 1\n"
    "Die Straße ist naß, el niño duerme, 東京は雨です. \\int_0^1 x^2 dx = \\frac{1}{3} and e^{i\\pi} = -1.\n"
    "The list [3, 1, 2] sorted in ascending order is [1, 2, 3]; its reverse is [3, 2, 1].\n"
)


def export_hf(
    engine: Engine, config: RunConfig, vocabulary: Vocabulary, assets: Path, target: Path, verify_with: Path | None
) -> LogitReport | None:
    """Write `target` from the engine's weights and the files in `assets`. Collective.

    Args:
        verify_with: checkpoint folder of the same weights; the export is compared with it and with transformers.

    Raises:
        UserError: it cannot be written, or is not the same model; then nothing appears under `target`.
    """
    topology = engine.topology
    partial = target.with_name(f".{target.name}.partial")
    dtype = "bfloat16" if config.parallel.bf16 else "float32"

    def prepare() -> None:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        tags = vocabulary.tags if vocabulary.tags.num_tags else None
        tied = not config.model.untie_embeddings_and_output_weights
        write_assets(assets, partial, tags, engine.vocab_size, dtype, tied, vocabulary.tokenizer.eos_id)
        check_tokenizer(partial, vocabulary.tokenizer)

    on_first_rank(prepare, topology)
    report = None
    try:
        export_hf_weights(engine, partial)
        barrier(topology)
        if verify_with is not None:
            compare_hf_weights(engine, partial)
            report = verify_folder(config, engine, vocabulary, partial, verify_with)
    except UserError:
        if topology.is_first_rank:  # a full disk should not stay full
            shutil.rmtree(partial, ignore_errors=True)
        raise
    on_first_rank(lambda: publish_new_folder(partial, target), topology)
    return report


def verify_folder(
    config: RunConfig,
    engine: Engine,
    vocabulary: Vocabulary,
    folder: Path,
    checkpoint: Path,
    new_rows: tuple[int, ...] = (),
) -> LogitReport:
    """Compare the logits of a Hugging Face folder with those of a checkpoint, in float32. Raises UserError.

    `new_rows`: vocabulary rows of tags that the folder does not have yet; where there are none, every tag is part of
    the sample.
    """
    rows = int(read_hf_config(folder)["vocab_size"])  # a tokenizer may know more tokens
    # A run from random weights has no size of the vocabulary in its configuration.
    model = dataclasses.replace(config.model, vocab_size=config.model.vocab_size or engine.vocab_size)
    return verify_logits(
        dataclasses.replace(config, model=model),
        engine.topology,
        vocabulary.tags,
        engine.vocab_size,
        folder,
        lambda fresh: load_folder(fresh, checkpoint),
        [i for i in sample_ids(vocabulary, with_tags=not new_rows) if i < rows],
        new_rows,
    )


def sample_ids(vocabulary: Vocabulary, with_tags: bool) -> list[int]:
    """Token ids of the verification's text, about a hundred, every tag among them where the model has them."""
    text = vocabulary.tokenizer.encode(SAMPLE)
    tags = [i for ids in vocabulary.tags.ids for i in ids] if with_tags else []
    return text[:64] + tags + text[64:128]
