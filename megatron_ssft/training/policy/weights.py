"""The weights that policy learning starts from, or refers to."""

from __future__ import annotations

from pathlib import Path

from megatron_ssft.config import GFPOConfig
from megatron_ssft.errors import UserError
from megatron_ssft.formats.run_folder import ASSETS, checkpoint_folder, find_latest
from megatron_ssft.hf.families import model_values
from megatron_ssft.hf.fingerprints import model_fingerprint
from megatron_ssft.parallel.checkpoint.hf import load_hf_weights
from megatron_ssft.parallel.checkpoint.run_checkpoint import load_checkpoint, read_state
from megatron_ssft.parallel.collectives import on_first_rank
from megatron_ssft.parallel.engine import Engine
from megatron_ssft.parallel.model.initialization import initialize_forking_rows
from megatron_ssft.training.resume import refuse_contradictions, weights_state
from megatron_ssft.training.setup import Vocabulary
from megatron_ssft.training.startup import is_hf_folder, read_hf_config

_UNTIED = "untie_embeddings_and_output_weights"


def take_weights(engine: Engine, vocabulary: Vocabulary, source: Path, flag: str) -> None:
    """Fill a started engine with the newest weights of a run, or those of a Hugging Face folder. Collective.

    Where the engine's output head is its own and the source's is tied, it becomes a copy of the embedding.

    Args:
        flag: by which `source` was given, for messages.

    Raises:
        UserError: it is no such folder, or does not fit the engine.
    """
    config, topology = engine.config, engine.topology
    own_head = config.model.untie_embeddings_and_output_weights
    if is_hf_folder(source):
        stored_own = model_values(read_hf_config(source), str(source / "config.json"))[_UNTIED]
        load_hf_weights(engine, source, untie=own_head and not stored_own)
        initialize_forking_rows(engine.chunks, vocabulary.tags, vocabulary.known_rows, vocabulary.copy_id, config)
        engine.optimizer.reload_model_params()
        return
    iteration = int(on_first_rank(lambda: find_latest(source), topology))
    state = on_first_rank(lambda: read_state(source, iteration), topology)
    untie = own_head and not state.get("model", {}).get(_UNTIED, True)
    if untie:
        state["model"][_UNTIED] = True
    refuse_contradictions(source, state, weights_state(config, vocabulary), finetune=True, flag=flag)
    load_checkpoint(engine, source, iteration, weights_only=True, untie=untie)


def check_rewards_model(config: GFPOConfig, model: str | None) -> str | None:
    """Refuse rewards of another model than the run starts from.

    Args:
        model: fingerprint of the model that made the samples.

    Returns:
        A remark where nothing tells: the run has no export beside its weights.

    Raises:
        UserError: they are of another model.
    """
    source = Path(config.checkpoint.load)
    folder = source if is_hf_folder(source) else checkpoint_folder(source, find_latest(source)) / ASSETS
    if model is None or not is_hf_folder(folder):
        return "no exported model beside the weights: whether the rewards are theirs is not checked"
    found = model_fingerprint(folder)
    if found != model:
        raise UserError(
            f"{config.policy.rewards or config.policy.scores}: measured under another model ({model[:12]}) than "
            f"{folder} ({found[:12]}); generate and score with this one"
        )
    return None
