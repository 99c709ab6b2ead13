"""What a folder given as --load decides: the shape of the model, the tokenizer, the tags."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_ssft.config import GFPOConfig, ModelConfig, ParallelConfig, StartConfig
from megatron_ssft.config.flags import read_config_file
from megatron_ssft.errors import UserError
from megatron_ssft.formats.forking_tokens import FORKING_TOKENS
from megatron_ssft.formats.run_folder import ASSETS
from megatron_ssft.hf.assets import find_tokenizer
from megatron_ssft.hf.families import max_positions, model_values
from megatron_ssft.hf.folder import is_hf_folder, read_hf_config
from megatron_ssft.tokenizers.exported_tags import read_forking_tokens

_IMPLEMENTATION = "transformer_impl"
"""The one setting of the model that a later run may change."""
_TAGS = ("num_forking_tokens", "forking_token_format", "forking_token_template")
_TOKENIZER = ("tokenizer_type", "tokenizer_model", "template_date", "prompt_control_tokens")
_BEGINNINGS = ("forking_token_init", "forking_token_noise")
_ORIGIN = ("origin", "origin_fingerprint")
_LAYOUT = (
    *(field.name for field in dataclasses.fields(ParallelConfig) if field.name != "device"),
    *("seq_length", "sequence_layout", "share_prompt", "micro_batch_size", "max_tokens_per_microbatch"),
    _IMPLEMENTATION,
)


def complete_values(values: dict[str, Any]) -> dict[str, Any]:
    """The given configuration values, completed by what the folder named by `load` fixes.

    Without `load` that is the recorded origin of the weights, if there is one. A Hugging Face folder fixes the model's
    shape (a value that contradicts it is refused) and proposes its tokenizer; a run of ours proposes shape, tokenizer
    and tags as its config.yaml has them. Raises UserError.
    """
    values = _from_origin(values)
    load = values.get("load")
    if load is not None and load == values.get("origin") and not is_hf_folder(Path(str(load))):
        values = values | {"finetune": True}  # its weights alone, as then
    return _complete(values)


def _from_origin(values: dict[str, Any]) -> dict[str, Any]:
    """The values with the recorded origin as `load`, where there is no other.

    Raises UserError where there are both, or the origin is gone.
    """
    origin, load = values.get("origin"), values.get("load")
    if load is not None:
        for name in _ORIGIN:
            if values.get(name) is not None:
                raise UserError(
                    f"--{name.replace('_', '-')} {values[name]}: has no use beside --load {load}, which says where the "
                    "weights come from; leave one of them out"
                )
        return values
    if origin is None:
        return values
    if not Path(str(origin)).is_dir():
        raise UserError(
            f"--origin {origin}: no such folder, and the weights of this configuration come from there; put it back, "
            "or name other weights with --load"
        )
    return values | {"load": origin}


def _complete(values: dict[str, Any]) -> dict[str, Any]:
    """The values, completed by the folder that is loaded. Raises UserError."""
    if values.get("load") is None:
        return values
    folder = Path(str(values["load"]))
    if not folder.is_dir():
        raise UserError(f"--load {folder}: no such folder")
    if is_hf_folder(folder):
        hf_config = read_hf_config(folder)
        shape = model_values(hf_config, str(folder / "config.json"))
        for name, value in shape.items():
            given = values.get(name)
            if given is not None and given != value:
                raise UserError(
                    f"--{name.replace('_', '-')} {given} contradicts {folder / 'config.json'}, which has {value}; "
                    "the shape comes from there, drop the flag"
                )
        values = {k: v for k, v in values.items() if v is not None}
        values = {k: v for k, v in shape.items() if v is not None} | positions_of(hf_config, folder) | values
        if "tokenizer_type" not in values and "tokenizer_model" not in values:
            kind, path = find_tokenizer(folder)
            values |= {"tokenizer_type": kind, "tokenizer_model": str(path)}
        return values
    _refuse_no_model(folder)
    stored = folder / "config.yaml"
    proposed = read_config_file(str(stored)) if stored.is_file() else {}
    _refuse_rows_begun(values, proposed, folder)
    if proposed:
        of_model = {field.name for field in dataclasses.fields(ModelConfig)} - {_IMPLEMENTATION}
        shape = {k: v for k, v in proposed.items() if k in of_model or k in _TAGS or k in _TOKENIZER}
        if not values.get("finetune"):  # it may go on, and then began where the run did
            shape |= {k: v for k, v in proposed.items() if k in _ORIGIN}
        values = shape | _positions_of_run(folder, proposed, values) | values
    tokenizer, own = values.get("tokenizer_model"), folder / ASSETS
    if values.get("tokenizer_type") == "HuggingFaceTokenizer" and own.is_dir() and not Path(str(tokenizer)).exists():
        values = values | {"tokenizer_model": str(own)}  # the run was moved, or what it started from is gone
    return values


def positions_of(hf_config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The value of --max-position-embeddings that the config.json of a folder proposes. Raises UserError."""
    return {"max_position_embeddings": max_positions(hf_config, str(folder / "config.json"))}


def _positions_of_run(folder: Path, proposed: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """The same of a run: what its config.yaml says; else, for another run than itself, what it was trained for."""
    if proposed.get("max_position_embeddings") is not None:
        return {"max_position_embeddings": proposed["max_position_embeddings"]}
    save = values.get("save")
    if save is not None and Path(str(save)).resolve() == folder.resolve():
        return {}
    if is_hf_folder(folder / ASSETS):
        return positions_of(read_hf_config(folder / ASSETS), folder / ASSETS)
    return {"max_position_embeddings": proposed["seq_length"]} if "seq_length" in proposed else {}


def _refuse_rows_begun(values: dict[str, Any], proposed: dict[str, Any], folder: Path) -> None:
    """Raise UserError where the tags of a run are to begin otherwise than they did: their rows are in its checkpoint.

    Args:
        proposed: the run's own configuration, whose values may be given again.
    """
    for name in _BEGINNINGS:
        default = getattr(StartConfig, name)
        if values.get(name) not in (None, default, proposed.get(name)):
            raise UserError(
                f"--{name.replace('_', '-')} {values[name]} has no use with --load {folder}, whose checkpoint holds "
                "the rows of the tags; leave it out"
            )


def _refuse_no_model(folder: Path) -> None:
    """Raise UserError for a folder that holds neither a Hugging Face model nor a run."""
    if (folder / "adapter_config.json").exists():
        raise UserError(
            f"--load {folder}: is an adapter without its model; merge it into its base model, save that, and give that "
            "folder"
        )
    if not any(folder.iterdir()):
        raise UserError(f"--load {folder}: is empty; give a run folder (iter_*) or a Hugging Face folder (config.json)")
    if not (folder / "config.yaml").exists() and not any(folder.glob("iter_*")):
        raise UserError(
            f"--load {folder}: neither a run (config.yaml, iter_*) nor a Hugging Face folder (config.json); check the "
            "path"
        )


def complete_policy_values(values: dict[str, Any]) -> dict[str, Any]:
    """Complete the values for policy learning: it takes a run's parallel layout over as well, and an export's tags.

    Raises UserError.
    """
    values = _from_origin(values)
    if values.get("load") is None:
        raise UserError("--load is required: the run whose tags are to be chosen")
    if values.get("train_iters") is None:
        raise UserError("--train-iters is required: the number of optimizer steps")
    load = Path(str(values["load"]))
    values = _complete(values)
    if is_hf_folder(load):
        values = _complete_tags(values, load)
        proposed = {}
    else:
        _check_run(load)
        proposed = read_config_file(str(load / "config.yaml"))
    _check_neighbours(values, load, started_here="objective" in proposed)
    values = {name: value for name, value in proposed.items() if name in _LAYOUT} | values
    most = values.get("max_position_embeddings")
    if values.get("seq_length") is None and most is not None and most < GFPOConfig.defaults["seq_length"]:
        values["seq_length"] = most  # a limit that nothing is cut to: what is longer is refused by name
    return values


def _check_run(folder: Path) -> None:
    """Raise UserError for a folder that is no run, or one without a checkpoint."""
    if not (folder / "config.yaml").is_file():
        raise UserError(
            f"--load {folder}: neither a run (config.yaml, iter_*) nor a Hugging Face folder (config.json); give the "
            "folder that was --save of megatron-ssft train"
        )
    if not any(folder.glob("iter_*")):
        raise UserError(f"--load {folder}: holds no checkpoint (iter_*); give the run that it was to start from")


def _check_neighbours(values: dict[str, Any], load: Path, started_here: bool) -> None:
    """Raise UserError where --save or --reference cannot be; `started_here`: --load is a run of this program."""
    save, reference = values.get("save"), values.get("reference")
    continues = save is not None and Path(str(save)).resolve() == load.resolve()
    if continues and not started_here:
        raise UserError(f"--save {save}: is what to start from (--load); give another folder")
    if reference is not None and not continues and not Path(str(reference)).is_dir():
        raise UserError(f"--reference {reference}: no such folder")


def _complete_tags(values: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The values with the tags that an export names; others are refused. Raises UserError."""
    path = folder / FORKING_TOKENS
    if not path.is_file():
        if values.get("num_forking_tokens") is None:
            raise UserError(f"--load {folder}: has no {FORKING_TOKENS}, so its tags are unknown; load the run instead")
        return values
    tags = read_forking_tokens(folder)
    template = tag_template(tags.strings)
    if template is None:
        raise UserError(f"{path}: its tags do not differ in a number that counts from 1; load the run instead")
    for name, value in zip(_TAGS, (tags.num_tags, tags.format, template)):
        if values.get(name) not in (None, value):
            raise UserError(
                f"--{name.replace('_', '-')} {values[name]} contradicts {path}, which has {value!r}; drop the flag"
            )
        values = values | {name: value}
    return values


def tag_template(strings: Sequence[str]) -> str | None:
    """The text with {i} that gives `strings` for i = 1, 2, ...; None if there is none."""
    # The first two are of one length and differ exactly where the number stands.
    first, second = strings[0], strings[1] if len(strings) > 1 else strings[0].replace("1", "2", 1)
    template = "".join("{i}" if (a, b) == ("1", "2") else a for a, b in zip(first, second))
    spelled = [template.replace("{i}", str(i)) for i in range(1, len(strings) + 1)]
    return template if spelled == list(strings) and "{i}" in template else None
