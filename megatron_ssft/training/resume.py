"""What a checkpoint stores besides weights and optimizer, and when a run may go on from it."""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from msgspec import structs

from megatron_ssft.config import CheckpointConfig, RunConfig, SSFTConfig, TrainingRun
from megatron_ssft.config.flags import with_absolute_paths
from megatron_ssft.errors import UserError
from megatron_ssft.formats.assignments import ASSIGNMENTS
from megatron_ssft.formats.log_cut import refuse_short_log
from megatron_ssft.formats.metrics import METRICS
from megatron_ssft.formats.run_folder import ASSETS, REMOVE_ADVICE
from megatron_ssft.formats.train_state import STATE_FORMAT, RunState, TagState, WeightsState
from megatron_ssft.hf.assets import copy_assets, extend_positions
from megatron_ssft.hf.folder import is_hf_folder
from megatron_ssft.hf.scratch_assets import NotExpressible, check_assets, write_scratch_assets
from megatron_ssft.objectives.objective import Objective
from megatron_ssft.tokenizers.tokenizer import build_tokenizer
from megatron_ssft.tokenizers.vocabulary import Vocabulary, build_vocabulary
from megatron_ssft.training.origin import Origin


def run_state(config: RunConfig, vocabulary: Vocabulary, iteration: int, data: str) -> RunState:
    """What decides the future of a run besides weights, optimizer and the objective's own state.

    Args:
        data: the fingerprint of what it is trained on.
    """
    weights = structs.asdict(weights_state(config, vocabulary)) | {"iteration": iteration, "has_optimizer": True}
    return RunState(**weights, data=data, use_distributed_optimizer=config.parallel.use_distributed_optimizer)


def whole_state(config: TrainingRun, vocabulary: Vocabulary, objective: Objective, iteration: int) -> RunState:
    """What a checkpoint stores besides weights and optimizer: the run's state with that of the objective."""
    return objective.complete_state(run_state(config.run, vocabulary, iteration, objective.fingerprint))


def weights_state(config: RunConfig, vocabulary: Vocabulary) -> WeightsState:
    """What a checkpoint of weights alone says of itself."""
    return WeightsState(
        format=STATE_FORMAT,
        iteration=0,
        has_optimizer=False,
        model=dataclasses.asdict(config.model),
        vocab_size=vocabulary.size,
        forking_tokens=TagState(
            format=vocabulary.tags.format,
            strings=list(vocabulary.tags.strings),
            ids=[list(ids) for ids in vocabulary.tags.ids],
        ),
        bf16=config.parallel.bf16,
    )


def refuse_other_model(run: Path, stored: WeightsState, ours: WeightsState, flag: str = "--load") -> None:
    """Raise UserError where the weights of a checkpoint do not fit this run.

    Args:
        run: the folder of the checkpoint.
        stored, ours: states of the checkpoint and of this run.
        flag: by which `run` was given.
    """
    for name in {**ours.model, **stored.model}:
        if name not in stored.model:
            raise UserError(f"{flag} {run}: the checkpoint does not say its {name}; {REMOVE_ADVICE}")
        value = stored.model[name]
        if name != "transformer_impl" and (name not in ours.model or ours.model[name] != value):
            raise UserError(
                f"{flag} {run}: the checkpoint has {name} {value}, this run {ours.model.get(name)}; "
                f"--config {run}/config.yaml takes the checkpoint's settings"
            )
    if not stored.forking_tokens.ids:
        raise UserError(f"{flag} {run}: was imported without tags; import it again with --num-forking-tokens N")
    for name in ("vocab_size", "forking_tokens"):
        if getattr(stored, name) != getattr(ours, name):
            raise UserError(f"{flag} {run}: tokenizer or forking tokens differ from the checkpoint's ({name})")


def refuse_other_run(run: Path, stored: RunState, ours: RunState, otherwise: str) -> None:
    """Raise UserError where a run cannot go on from a checkpoint whose weights fit it.

    Args:
        otherwise: what to do instead of resuming.
    """
    for name in ("use_distributed_optimizer", "bf16"):
        if getattr(stored, name) != getattr(ours, name):
            raise UserError(
                f"--load {run}: saved {'with' if getattr(stored, name) else 'without'} --{name.replace('_', '-')}; "
                f"resume the same way, or {otherwise}"
            )
    if stored.data != ours.data:
        raise UserError(
            f"--load {run}: data, tokenizer or data settings differ from the checkpoint's, so its place in the "
            f"data means nothing; resume with the same, or {otherwise}"
        )


def refuse_missing_optimizer(checkpoint: CheckpointConfig, run: Path, stored: RunState, otherwise: str) -> None:
    """Raise UserError where a run is to go on with the optimizer of a checkpoint that holds none.

    Args:
        otherwise: what to do instead of resuming.
    """
    if checkpoint.load_optim and not stored.has_optimizer:
        raise UserError(
            f"--load {run}: the checkpoint of step {stored.iteration} holds no optimizer (--no-save-optim); go on with "
            f"a new one by --no-load-optim, or {otherwise}"
        )


def refuse_short_logs(run: Path, files: Sequence[str], iteration: int) -> None:
    """Raise UserError where one of a run's logs ends before the checkpoint that it goes on from. Raises OSError."""
    for name in files:
        if name in (METRICS, ASSIGNMENTS):  # the others have no lines at most steps
            refuse_short_log(run / name, iteration)


def refuse_past_end(config: RunConfig, run: Path, iteration: int) -> None:
    """Raise UserError where a run is to end before the checkpoint that it goes on from."""
    planned = config.training.train_iters
    if planned is not None and planned < iteration:
        raise UserError(
            f"--train-iters {planned}: the checkpoint in {run} is of step {iteration}, past that end; give at least "
            f"{iteration}, or another --load"
        )


def resumable(config: TrainingRun, origin: Origin) -> TrainingRun:
    """The configuration as a later start needs it, from any working directory.

    How this one was started (--load, --finetune) is left out; where its weights came from stands in it.
    """
    checkpoint = dataclasses.replace(
        config.run.checkpoint,
        load=None,
        verify_checkpoint=True,
        on_damaged_checkpoint="refuse",
        load_optim=True,
        origin=origin.folder,
        origin_fingerprint=origin.fingerprint,
    )
    run = dataclasses.replace(config.run, checkpoint=checkpoint)
    if isinstance(config, SSFTConfig):
        start = dataclasses.replace(config.start, finetune=False)
        return with_absolute_paths(dataclasses.replace(config, run=run, start=start))
    return with_absolute_paths(dataclasses.replace(config, run=run))


def check_writable(config: TrainingRun) -> None:
    """Write where the --save folder is or will be, before anything expensive, and leave nothing. Raises OSError."""
    if config.run.checkpoint.save is not None:
        folder = Path(config.run.checkpoint.save).absolute()
        while not folder.exists():
            folder = folder.parent
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"x")


def keep_assets(config: TrainingRun) -> None:
    """Put the Hugging Face files that an export needs besides weights into the run, where the model has such files.

    They come from what the run is loaded from, else they are made for its model and tokenizer. Raises UserError, for
    --export-hf-at-save also where there are none, and OSError.
    """
    if config.run.checkpoint.save is None:
        return
    target, exporting = Path(config.run.checkpoint.save) / ASSETS, config.run.checkpoint.export_hf_at_save
    try:
        if not config.run.checkpoint.continues_in_place or (exporting and not target.is_dir()):
            _place_assets(config, target)
        extend_positions(target, config.run.tokenizer.max_position_embeddings)
        if exporting:  # found out before the training rather than after it
            settings = config.run.tokenizer
            check_assets(target, build_tokenizer(settings.tokenizer_type, settings.tokenizer_model))
    except NotExpressible as error:
        if exporting:
            raise UserError(f"--export-hf-at-save: {error}") from error
        shutil.rmtree(target, ignore_errors=True)  # of another model, left by a start that came to nothing


def _place_assets(config: TrainingRun, target: Path) -> None:
    if config.run.checkpoint.load is not None:
        source = Path(config.run.checkpoint.load)
        source = source if is_hf_folder(source) else source / ASSETS
        if source.is_dir():
            copy_assets(source, target, _own_tokenizer(config))
            return
    vocabulary = build_vocabulary(config.run, config.start)
    write_scratch_assets(config.run, vocabulary.tokenizer, vocabulary.size, target)


def _own_tokenizer(config: TrainingRun) -> Path | None:
    """The folder of the run's Hugging Face tokenizer, where it has one."""
    settings = config.run.tokenizer
    if settings.tokenizer_type != "HuggingFaceTokenizer" or settings.tokenizer_model is None:
        return None
    return Path(settings.tokenizer_model)


def refuse_occupied_folder(config: TrainingRun) -> None:
    """A new run must not write over another one's checkpoints. Raises UserError."""
    save = config.run.checkpoint.save
    if save is not None and Path(save).exists() and not Path(save).is_dir():
        raise UserError(f"--save {save}: is a file; name a folder")
    if save is None or (config.run.checkpoint.continues_in_place and not config.start.finetune):
        return
    folders = sorted(Path(save).glob("iter_*")) if Path(save).is_dir() else []
    if folders:
        raise UserError(
            f"--save {save}: already holds {folders[-1].name}; continue that run with --load {save} "
            f"{'--no-finetune' if config.start.finetune else ''}".rstrip()
            + ", or choose another folder"
        )
