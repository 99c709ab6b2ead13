"""config.json and tokenizer for a run that did not start from a Hugging Face folder.

Which family stands for a model follows from its ModelConfig, the other way round than in families.py; the tokenizer is
written so that transformers gives the ids that the run was trained with.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from megatron_ssft.config import ModelConfig, RunConfig
from megatron_ssft.errors import UserError
from megatron_ssft.formats.files import new_folder
from megatron_ssft.formats.hf_json import read_json, write_json
from megatron_ssft.hf.assets import copy_files
from megatron_ssft.hf.families import FAMILIES
from megatron_ssft.tokenizers.hf_folder import (
    OtherRules,
    ensure_tokenizer_json,
    load_tokenizer,
    open_tokenizer,
    pin_tokenizer_json,
)
from megatron_ssft.tokenizers.sentencepiece_conversion import PROBES, convert_sentencepiece, piece_names
from megatron_ssft.tokenizers.tokenizer import HuggingFaceTokenizer, Tokenizer

_PROBES = (*PROBES, "e\u0301 ﬁ \u00a0\r\n\t 1234567", "a<|endoftext|>b")
"""More than what is compared elsewhere: letters in two parts, and a text that looks like a special token."""


class NotExpressible(UserError):
    """No Hugging Face folder can say what this model or this tokenizer is."""


def architecture_of(model: ModelConfig) -> str:
    """The architecture, a key of FAMILIES, that computes what this model computes. Raises NotExpressible."""
    unsupported = {
        "--normalization LayerNorm": model.normalization != "RMSNorm",
        "--no-swiglu": not model.swiglu,
        "--add-bias-linear": model.add_bias_linear,
        f"--rotary-percent {model.rotary_percent}": model.rotary_percent != 1,
        "--add-qkv-bias together with --qk-layernorm": model.add_qkv_bias and model.qk_layernorm,
    }
    flags = [flag for flag, present in unsupported.items() if present]
    if flags:
        raise NotExpressible(
            f"none of the Hugging Face architectures {', '.join(FAMILIES)} has {', '.join(flags)}; "
            "a model that shall be exported must be trained without"
        )
    if model.add_qkv_bias:
        return "Qwen2ForCausalLM"
    if model.qk_layernorm:
        return "Qwen3ForCausalLM"
    assert model.hidden_size is not None and model.num_attention_heads is not None, "demanded of every run"
    # The same layers; but transformers refuses a Llama whose width is no multiple of its heads, even with head_dim.
    return "MistralForCausalLM" if model.hidden_size % model.num_attention_heads else "LlamaForCausalLM"


def hf_config(model: ModelConfig, vocab_size: int, max_positions: int, torch_dtype: str) -> dict[str, object]:
    """config.json of the model, special tokens left out. `families.model_values` of it gives `model` back.

    Args:
        vocab_size: rows of the embedding in use.
        max_positions: longest sequence that the model is for.
        torch_dtype: of the weights, e.g. `bfloat16`.

    Raises:
        NotExpressible: no family computes what the model computes.
    """
    architecture = architecture_of(model)
    extra_keys: dict[str, dict[str, object]] = {
        "LlamaForCausalLM": {"attention_bias": False, "mlp_bias": False},
        "MistralForCausalLM": {"sliding_window": None},
        "Qwen2ForCausalLM": {"use_sliding_window": False, "sliding_window": None},
        "Qwen3ForCausalLM": {"attention_bias": False, "use_sliding_window": False, "sliding_window": None},
    }
    return {
        "architectures": [architecture],
        "model_type": FAMILIES[architecture].model_type,
        "attention_dropout": 0.0,
        "head_dim": model.kv_channels,
        "hidden_act": "silu",
        "hidden_size": model.hidden_size,
        "initializer_range": model.init_method_std,
        "intermediate_size": model.ffn_hidden_size,
        "max_position_embeddings": max_positions,
        "num_attention_heads": model.num_attention_heads,
        "num_hidden_layers": model.num_layers,
        "num_key_value_heads": model.num_query_groups,
        "rms_norm_eps": model.norm_epsilon,
        "rope_scaling": None,
        "rope_theta": model.rotary_base,
        "tie_word_embeddings": not model.untie_embeddings_and_output_weights,
        "torch_dtype": torch_dtype,
        "use_cache": True,
        "vocab_size": vocab_size,
        **extra_keys[architecture],
    }


def write_scratch_assets(config: RunConfig, tokenizer: Tokenizer, vocab_size: int, target: Path) -> None:
    """Replace folder `target` by the Hugging Face files, weights and tags left out, of a run from random weights.

    Args:
        config: of the run.
        tokenizer: the run's, without tags.
        vocab_size: rows of the embedding in use, tags included.

    Raises:
        NotExpressible: there are no such files for the model or the tokenizer. `target` is unchanged then.
        OSError: they cannot be written.
    """
    dtype = "bfloat16" if config.parallel.bf16 else "float32"
    positions = config.tokenizer.max_position_embeddings or config.tokenizer.seq_length
    settings = hf_config(config.model, vocab_size, positions, dtype)
    kind, source = config.tokenizer.tokenizer_type, Path(config.tokenizer.tokenizer_model or "")
    with new_folder(Path(target)) as fresh:
        # How transformers reads a tokenizer depends on the model it belongs to.
        write_json(fresh / "config.json", settings)
        if kind == "CharTokenizer":
            pad = _write_bytes_tokenizer(fresh, tokenizer)
        elif kind == "SentencePieceTokenizer":
            pad = _write_sentencepiece(fresh, source)
        else:
            pad = _write_hf_tokenizer(fresh, source, tokenizer)
        # Padding named in config.json has a row that transformers does not train, which end of text needs.
        ends = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
        settings |= ends | {"pad_token_id": None if pad == tokenizer.eos_id else pad}
        write_json(fresh / "config.json", dict(sorted(settings.items())))
        generation = {name: token for name, token in ends.items() if token is not None}
        write_json(fresh / "generation_config.json", generation | {"pad_token_id": pad})


def check_tokenizer(folder: Path, tokenizer: Tokenizer) -> None:
    """Raise NotExpressible where transformers makes other ids with the folder's tokenizer than the run's.

    The folder may know more entries: the tags.
    """
    difference = open_tokenizer(folder, folder).overruled
    if difference is None:
        difference = _difference(HuggingFaceTokenizer(str(folder)), tokenizer)
    if difference is not None:
        raise NotExpressible(_refusal(folder, difference))


def check_assets(folder: Path, tokenizer: Tokenizer) -> None:
    """`check_tokenizer` of what an export will make of the assets in `folder`, which stay as they are.

    Raises NotExpressible, and UserError for files that cannot be used.
    """
    with tempfile.TemporaryDirectory() as parent:
        copy = Path(parent) / "hf"
        copy.mkdir()
        copy_files(folder, copy)
        try:
            pin_tokenizer_json(copy, folder)
        except OtherRules as error:
            raise NotExpressible(_refusal(folder, error.rules)) from error
        check_tokenizer(copy, tokenizer)


def _difference(read: Tokenizer, tokenizer: Tokenizer) -> str | None:
    """The first thing in which `read` is not `tokenizer`."""
    for name in ("eos_id", "bos_id"):
        if getattr(read, name) != getattr(tokenizer, name):
            return f"its {name} is {getattr(read, name)} instead of {getattr(tokenizer, name)}"
    for text in _PROBES:
        if read.encode(text) != tokenizer.encode(text):
            return f"it encodes {text!r} otherwise than in training"
    return None


def _refusal(folder: Path, difference: str) -> str:
    family = read_json(Path(folder) / "config.json").get("model_type")
    return (
        f"transformers reads the tokenizer of a {family} model by rules of its own, and then {difference}; "
        "a model that shall be exported needs another tokenizer or architecture"
    )


# -- the three tokenizers: each function writes its files and returns the id to pad with ------------------------------


def _write_bytes_tokenizer(folder: Path, tokenizer: Tokenizer) -> int:
    """CharTokenizer as byte-level BPE without merges, in which the letter of each byte has the byte as its id."""
    import tokenizers

    eos = tokenizer.decode([tokenizer.eos_id])
    vocabulary = {letter: byte for byte, letter in enumerate(_byte_letters())}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens([tokenizers.AddedToken(eos, normalized=False, special=True)])
    assert backend.token_to_id(eos) == tokenizer.eos_id and backend.get_vocab_size() == tokenizer.vocab_size
    (folder / "tokenizer.json").write_text(backend.to_str(), encoding="utf-8")
    write_json(
        folder / "tokenizer_config.json",
        {
            "add_prefix_space": False,
            "bos_token": None,
            "clean_up_tokenization_spaces": False,
            "eos_token": eos,
            "pad_token": eos,
            "split_special_tokens": True,  # spelled in a text, end of text is ordinary bytes
            "tokenizer_class": "PreTrainedTokenizerFast",
        },
    )
    return tokenizer.eos_id


def _byte_letters() -> list[str]:
    """The printable letter that stands for each byte in byte-level BPE: itself, or the next one from U+0100 on."""
    printable = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def _write_sentencepiece(folder: Path, model: Path) -> int:
    """tokenizer.model, and a tokenizer.json of the same ids.

    One difference stays: a unigram model in tokenizer.json makes control pieces of a text that spells them.
    """
    import sentencepiece

    try:
        converted = convert_sentencepiece(model, add_bos=True, legacy=True, where=model)
    except UserError as error:
        problem = str(error).rpartition("; ")[0]
        raise NotExpressible(
            f"--tokenizer-model {problem}; a model that shall be exported needs another tokenizer"
        ) from error
    (folder / "tokenizer.model").write_bytes(model.read_bytes())
    (folder / "tokenizer.json").write_text(converted.to_str(), encoding="utf-8")
    processor = sentencepiece.SentencePieceProcessor(str(model))
    pad = processor.pad_id() if processor.pad_id() >= 0 else processor.eos_id()
    write_json(
        folder / "tokenizer_config.json",
        {
            "bos_token": None,
            "clean_up_tokenization_spaces": False,
            "pad_token": processor.id_to_piece(pad),
            "split_special_tokens": True,  # spelled in a text, control pieces are ordinary text
            "tokenizer_class": "PreTrainedTokenizerFast",
            **piece_names(model),
        },
    )
    return pad


def _write_hf_tokenizer(folder: Path, source: Path, tokenizer: Tokenizer) -> int:
    """The files of folder `source`, changed only where they would mean something else beside our config.json."""
    copy_files(source, folder, leave_out=("config.json", "generation_config.json"))
    if not _reads_alike(folder, source, tokenizer):
        _pin_tokenizer(folder, source)
        check_tokenizer(folder, tokenizer)
        size = HuggingFaceTokenizer(str(folder)).vocab_size
        if size != tokenizer.vocab_size:
            raise NotExpressible(_refusal(folder, f"it has {size} entries instead of {tokenizer.vocab_size}"))
    pad = load_tokenizer(folder, source).pad_token_id
    return tokenizer.eos_id if pad is None else pad


def _reads_alike(folder: Path, source: Path, tokenizer: Tokenizer) -> bool:
    try:
        ensure_tokenizer_json(folder, source)
        pin_tokenizer_json(folder, source)
        reader = HuggingFaceTokenizer(str(folder))
    except UserError:  # to a class chosen by another config.json the files may be unusable
        return False
    return reader.vocab_size == tokenizer.vocab_size and _difference(reader, tokenizer) is None


def _pin_tokenizer(folder: Path, source: Path) -> None:
    """Write the tokenizer as transformers reads it in `source`, to be used as it stands. Raises NotExpressible."""
    original = load_tokenizer(source, source)
    if not original.is_fast:
        raise NotExpressible(f"--tokenizer-model {source}: cannot be written as tokenizer.json; add one to the folder")
    (folder / "tokenizer.json").write_text(original.backend_tokenizer.to_str(), encoding="utf-8")
    path = folder / "tokenizer_config.json"
    settings = read_json(path) if path.is_file() else {}
    for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
        settings[name] = getattr(original, name)
    write_json(path, settings | {"tokenizer_class": "PreTrainedTokenizerFast"})
