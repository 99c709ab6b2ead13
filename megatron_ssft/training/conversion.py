"""What megatron-ssft convert does: import, export, verify, at the layout it is started in."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml

from megatron_ssft.config import ConversionConfig, RunConfig
from megatron_ssft.config.flags import build_config, read_config_file
from megatron_ssft.errors import UserError
from megatron_ssft.formats.files import write_durably
from megatron_ssft.formats.run_folder import (
    ASSETS,
    IMPORTING,
    begin_import,
    checkpoint_folder,
    checkpoints_from_newest,
    clear_leftovers,
    end_import,
    is_imported,
)
from megatron_ssft.hf.assets import copy_assets
from megatron_ssft.hf.folder import is_hf_folder, read_hf_config
from megatron_ssft.hf.safetensors_io import HFWeights
from megatron_ssft.hf.scratch_assets import NotExpressible, write_scratch_assets
from megatron_ssft.launch import this_launch
from megatron_ssft.parallel.checkpoint.choice import CheckpointChoice
from megatron_ssft.parallel.checkpoint.hf import compare_hf_weights, load_hf_weights
from megatron_ssft.parallel.checkpoint.loading import load_checkpoint, load_folder, read_state
from megatron_ssft.parallel.checkpoint.run_checkpoint import save_checkpoint
from megatron_ssft.parallel.collectives import on_first_rank
from megatron_ssft.parallel.engine import Engine
from megatron_ssft.parallel.model.initialization import initialize_forking_rows
from megatron_ssft.parallel.topology import Topology, destroy_topology, initialize_topology
from megatron_ssft.tokenizers.vocabulary import Vocabulary, build_vocabulary
from megatron_ssft.training.agreement import facts_of
from megatron_ssft.training.export import export_hf, verify_folder
from megatron_ssft.training.folder_lease import hold_folder
from megatron_ssft.training.origin import fingerprint_of
from megatron_ssft.training.resume import weights_state
from megatron_ssft.training.startup import complete_values
from megatron_ssft.training.weights import refuse_other_shape, rows_remark


def import_hf(source: Path, target: Path, options: dict[str, Any]) -> None:
    """A Hugging Face folder to a run folder with a checkpoint 0 of weights only, without tags unless asked for."""
    verify, origin = not options.pop("no_verify", False), _origin(source, options)
    if is_imported(target, origin):  # a kill may come between the end of the work and that of the program
        if this_launch().is_first:
            print(f"{target}: already holds this import of {source}", flush=True)
        return
    if not (target / IMPORTING).exists():  # of a killed import nothing counts
        _refuse_occupied(target)
    with HFWeights(source) as weights:
        bf16 = torch.bfloat16 in weights.dtypes.values()
    config, topology, vocabulary, engine = _start(source, {"bf16": bf16} | options)
    load_hf_weights(engine, source)
    initialize_forking_rows(engine.chunks, vocabulary, config.start, config.run.training.seed)
    remark = rows_remark(vocabulary, source)
    if remark is not None:
        _say(topology, remark)
    with hold_folder(target, topology):
        on_first_rank(lambda: _refuse_occupied(target), topology)
        with _whole_import(target, origin, topology):
            on_first_rank(lambda: copy_assets(source, target / ASSETS), topology)
            folder = save_checkpoint(engine, target, 0, weights_state(config.run, vocabulary))
            on_first_rank(lambda: _write_config(target, config.run, source), topology)
            if verify:
                load_folder(engine, folder)  # what is compared is what stands on the disk
                _verify(config.run, engine, vocabulary, source, folder)
        _say(topology, f"imported {source} to {folder}")
    destroy_topology()


def _origin(source: Path, options: dict[str, Any]) -> str:
    """What an import is made of, as JSON: the folder, the sizes and times of its files, the tags."""
    layout = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "device")  # makes the same checkpoint
    status = {path.name: path.stat() for path in sorted(source.glob("*")) if path.is_file()}
    files = {name: [stat.st_size, stat.st_mtime_ns] for name, stat in status.items()}
    settings = {name: value for name, value in sorted(options.items()) if name not in layout}
    return json.dumps({"source": str(source.resolve()), "files": files, "settings": settings}, indent=1) + "\n"


def _refuse_occupied(target: Path) -> None:
    if is_hf_folder(target) or (target.exists() and any(target.glob("iter_*"))):
        raise UserError(f"{target}: already holds a checkpoint; choose another folder")


@contextlib.contextmanager
def _whole_import(target: Path, origin: str, topology: Topology) -> Iterator[None]:
    """Fill a folder inside the `with` block: whole, or nothing of it is left. Collective.

    A kill leaves a mark, by which the next start knows what to remove.
    """
    on_first_rank(lambda: begin_import(target, origin), topology)
    try:
        yield
    except UserError:  # on all ranks alike
        if topology.is_first_rank:
            clear_leftovers(target)
        raise
    on_first_rank(lambda: end_import(target), topology)


def export_run(source: Path, target: Path, options: dict[str, Any]) -> None:
    """The newest checkpoint of a run folder to a Hugging Face folder."""
    verify = not options.pop("no_verify", False)
    if target.exists():
        raise UserError(f"{target}: exists; choose another folder")
    config, topology, vocabulary, engine = _start(source, _precision(source) | options)
    with _assets_of(source, config.run, vocabulary, topology) as assets:
        folder = checkpoint_folder(source, _load(engine, source))
        report = export_hf(engine, config.run, vocabulary, assets, target, folder if verify else None)
    _say(topology, f"exported {folder} to {target}" + (f"; verified: {report}" if report else "; not verified"))
    destroy_topology()


def verify(source: Path, target: Path, options: dict[str, Any]) -> None:
    """Whether a Hugging Face folder and the newest checkpoint of a run folder are the same model."""
    config, _, vocabulary, engine = _start(target, _precision(target) | options)
    folder = checkpoint_folder(target, _load(engine, target))
    _verify(config.run, engine, vocabulary, source, folder)
    destroy_topology()


def _start(folder: Path, options: dict[str, Any]) -> tuple[ConversionConfig, Topology, Vocabulary, Engine]:
    values = complete_values({"load": str(folder)} | options)
    config = build_config(values, ConversionConfig)
    topology = initialize_topology(config.run, facts_of(config))
    on_first_rank(lambda: refuse_other_shape(str(folder), config.run.model), topology)
    vocabulary = build_vocabulary(config.run, config.start)
    return config, topology, vocabulary, Engine(config.run, topology, vocabulary.size, vocabulary.tags.row_ids)


@contextlib.contextmanager
def _assets_of(run: Path, config: RunConfig, vocabulary: Vocabulary, topology: Topology) -> Iterator[Path]:
    """The folder of a run's Hugging Face files, made for the occasion where the run has none. Collective."""
    with tempfile.TemporaryDirectory() as parent:
        assets = Path(parent) / ASSETS

        def find() -> bool:
            if (run / ASSETS).is_dir():
                return True
            trained = read_config_file(str(run / "config.yaml"))
            tokenizer = dataclasses.replace(
                config.tokenizer,
                seq_length=trained.get("seq_length", config.tokenizer.seq_length),
                max_position_embeddings=trained.get("max_position_embeddings"),
            )
            try:
                write_scratch_assets(
                    dataclasses.replace(config, tokenizer=tokenizer), vocabulary.tokenizer, vocabulary.size, assets
                )
            except NotExpressible as error:
                raise UserError(f"{run}: cannot be exported: {error}") from error
            return False

        yield run / ASSETS if on_first_rank(find, topology) else assets


def _precision(run: Path) -> dict[str, Any]:
    """The precision of a run's weights, the same in all its checkpoints: from the newest state that can be read."""
    problems = []
    for iteration in checkpoints_from_newest(run):
        try:
            return {"bf16": read_state(run, iteration).bf16}
        except UserError as error:  # `CheckpointChoice` decides whether it may be passed over
            problems.append(error)
    raise problems[0]


def _load(engine: Engine, run: Path) -> int:
    """The iteration of the checkpoint whose weights were loaded. Raises UserError."""
    with CheckpointChoice(engine.config.checkpoint, engine.topology) as choice:
        choice.load(run, lambda iteration: load_checkpoint(engine, run, iteration, weights_only=True))
        return choice.of(run)


def _verify(config: RunConfig, engine: Engine, vocabulary: Vocabulary, hf: Path, checkpoint: Path) -> None:
    """Both proofs, printed. A folder without the tags is compared without their rows."""
    rows = int(read_hf_config(hf)["vocab_size"])
    stored = rows if _knows_tags(hf, vocabulary) else min(rows, vocabulary.known_rows)
    new_rows = tuple(i for i in vocabulary.tags.row_ids if i >= stored)
    compare_hf_weights(engine, hf, new_rows)
    _say(engine.topology, f"every tensor of {hf} is bitwise what {checkpoint} holds")
    report = verify_folder(config, engine, vocabulary, hf, checkpoint, new_rows)
    _say(engine.topology, f"verified: {report}")


def _knows_tags(hf: Path, vocabulary: Vocabulary) -> bool:
    """Whether the folder's tokenizer has the tags; text tags are ordinary tokens anyway."""
    path = hf / "tokenizer.json"
    if not vocabulary.tags.row_ids or not path.is_file():
        return not vocabulary.tags.row_ids
    added = json.loads(path.read_text(encoding="utf-8")).get("added_tokens", [])
    return set(vocabulary.tags.strings) <= {str(token.get("content")) for token in added}


def _write_config(target: Path, config: RunConfig, source: Path | None = None) -> None:
    """The shape, tokenizer and tags, for whoever loads the folder; how to train is not decided here.

    `source`: the Hugging Face folder that the weights come from, which is recorded.
    """
    values = dataclasses.asdict(config.model)
    values |= {name: getattr(config.forking, name) for name in ("num_forking_tokens", "forking_token_format")}
    values["forking_token_template"] = config.forking.forking_token_template
    values["tokenizer_type"] = config.tokenizer.tokenizer_type
    values["tokenizer_model"] = str((target / ASSETS).resolve())
    if source is not None:
        values |= {"origin": str(source.absolute()), "origin_fingerprint": fingerprint_of(source)}
    write_durably(target / "config.yaml", yaml.safe_dump(values, sort_keys=False))


def _say(topology: Topology, text: str) -> None:
    if topology.is_first_rank:
        print(text, flush=True)
