"""The weights that a run starts from, or refers to."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from msgspec import structs

from megatron_ssft.config import ModelConfig, StartConfig, TrainingRun
from megatron_ssft.config.checks import only_where
from megatron_ssft.hf.families import model_values
from megatron_ssft.hf.folder import is_hf_folder, read_hf_config
from megatron_ssft.parallel.checkpoint.choice import CheckpointChoice
from megatron_ssft.parallel.checkpoint.hf import check_hf_names, load_hf_weights
from megatron_ssft.parallel.checkpoint.loading import load_checkpoint, read_state_everywhere
from megatron_ssft.parallel.engine import Engine
from megatron_ssft.parallel.model.initialization import initialize_forking_rows
from megatron_ssft.tokenizers.vocabulary import Vocabulary
from megatron_ssft.training.resume import refuse_other_model, weights_state

_UNTIED = "untie_embeddings_and_output_weights"


def refuse_other_shape(folder: str | None, model: ModelConfig) -> None:
    """Raise UserError where a Hugging Face folder's weights are not those that its config.json describes.

    Only headers are read. Called before a model of that shape takes memory.
    """
    if folder is not None and is_hf_folder(Path(folder)):
        path = Path(folder) / "config.json"
        shape = model_values(read_hf_config(Path(folder)), str(path))
        check_hf_names(Path(folder), dataclasses.replace(model, **shape))  # type: ignore[arg-type]  # by name


def refuse_start_of_known_tags(config: TrainingRun, vocabulary: Vocabulary) -> None:
    """Raise UserError where tags are to begin in some way, and the Hugging Face folder has the rows of all of them."""
    load = config.run.checkpoint.load
    if load is None or not is_hf_folder(Path(load)):
        return
    new = not vocabulary.tags.row_ids or max(vocabulary.tags.row_ids) >= vocabulary.known_rows
    here = f"with --load {load}, which holds the rows of the tags"
    only_where(config.start, new, here, "forking_token_init", "forking_token_noise")


def take_weights(
    engine: Engine,
    vocabulary: Vocabulary,
    start: StartConfig,
    source: Path,
    flag: str,
    *,
    may_untie: bool,
    choice: CheckpointChoice,
) -> None:
    """Fill a started engine with the newest weights of a run, or those of a Hugging Face folder. Collective.

    Args:
        start: how rows of tags that the source does not know begin.
        flag: by which `source` was given, for messages.
        may_untie: an output head of its own starts as a copy of the embedding where the source ties them; without this
            that is refused.
        choice: which checkpoint is taken of a run.

    Raises:
        UserError: it is no such folder, or does not fit the engine.
    """
    config = engine.config
    if is_hf_folder(source):
        own_head = config.model.untie_embeddings_and_output_weights
        stored_own = model_values(read_hf_config(source), str(source / "config.json"))[_UNTIED]
        load_hf_weights(engine, source, untie=may_untie and own_head and not stored_own)
        initialize_forking_rows(engine.chunks, vocabulary, start, config.training.seed)
        engine.optimizer.reload_model_params()
        return
    choice.load(source, lambda i: take_checkpoint(engine, vocabulary, source, i, flag, may_untie=may_untie))


def take_checkpoint(
    engine: Engine, vocabulary: Vocabulary, run: Path, iteration: int, flag: str, *, may_untie: bool
) -> None:
    """Fill a started engine with the weights of one checkpoint of a run; otherwise as `take_weights`. Collective."""
    config = engine.config
    state = read_state_everywhere(run, iteration, engine.topology)
    own_head = config.model.untie_embeddings_and_output_weights
    untie = may_untie and own_head and not state.model.get(_UNTIED, True)
    if untie:
        state = structs.replace(state, model=state.model | {_UNTIED: True})
    refuse_other_model(run, state, weights_state(config, vocabulary), flag)
    load_checkpoint(engine, run, iteration, weights_only=True, untie=untie)


def rows_remark(vocabulary: Vocabulary, source: Path) -> str | None:
    """A line of the log on tokens for which a Hugging Face folder has no row; None where there are none."""
    ids = vocabulary.ids_without_row
    if not ids:
        return None
    end = "the end of turn among them, " if vocabulary.tokenizer.eos_id in ids else ""
    return (
        f"{len(ids)} of {vocabulary.tokenizer.vocab_size} tokens of the tokenizer have no row in {source}, which has "
        f"{vocabulary.known_rows}: {end}they start at the mean row with noise, as tags do"
    )
