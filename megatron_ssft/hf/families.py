"""The model families that can be loaded, and the model shape that a `config.json` fixes.

All of them are Llama's architecture with small differences; `FAMILIES` holds the differences. What cannot be expressed
is refused by name: a model that computes something else would load without complaint and answer nonsense.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_ssft.errors import UserError


@dataclass(frozen=True)
class Family:
    """Differences of one architecture from the others, as transformers implements it."""

    model_type: str
    """Its `model_type`, by which transformers chooses the class."""
    default_positions: int
    """`max_position_embeddings` where config.json has none."""
    add_qkv_bias: bool = False
    """Biases on the query, key and value projections, and nowhere else."""
    qk_layernorm: bool = False
    """Queries and keys are normalised per head."""
    bias_switches: tuple[str, ...] = ()
    """Keys of config.json that would add biases to the output projection or the MLP as well."""
    required: tuple[str, ...] = ()
    """Keys whose default, where they are absent, is a number of one particular model size."""
    sliding_window: str = "ignored"
    """ignored, always (wherever `sliding_window` is a number) or switched (by `use_sliding_window`, from layer
    `max_window_layers` on)."""


FAMILIES: dict[str, Family] = {
    "LlamaForCausalLM": Family("llama", 2048, bias_switches=("attention_bias", "mlp_bias")),
    "MistralForCausalLM": Family(
        "mistral",
        131072,
        bias_switches=("attention_bias", "mlp_bias"),
        required=("num_key_value_heads", "sliding_window"),
        sliding_window="always",
    ),
    "Qwen2ForCausalLM": Family(
        "qwen2", 32768, add_qkv_bias=True, required=("num_key_value_heads",), sliding_window="switched"
    ),
    "Qwen3ForCausalLM": Family(
        "qwen3",
        32768,
        qk_layernorm=True,
        bias_switches=("attention_bias",),
        required=("num_key_value_heads", "head_dim"),
        sliding_window="switched",
    ),
}
"""By the architecture that config.json names."""

_DEFAULT_THETA = 10000.0  # of every family, where config.json gives none
_DEFAULT_MAX_WINDOW_LAYERS = 28
_LARGEST = {
    "num_hidden_layers": 10_000,
    "hidden_size": 1_000_000,
    "intermediate_size": 10_000_000,
    "num_attention_heads": 100_000,
    "num_key_value_heads": 100_000,
    "head_dim": 100_000,
    "vocab_size": 100_000_000,
    "max_position_embeddings": 1_000_000_000,
}
"""No model comes near these; a file that says more is damaged, and the model would be built before that shows."""
_SHOWN = 40  # characters of a wrong value
_ROPE_KEYS = ("rope_parameters", "rope_scaling")  # since transformers 5, and before


def model_values(hf_config: dict[str, object], where: str) -> dict[str, object]:
    """The fields of ModelConfig that a `config.json` fixes, by name.

    Args:
        hf_config: the parsed file.
        where: path of the file, to lead the message of an error.

    Raises:
        UserError: the architecture is unknown, a key is missing or malformed, or the model has something that cannot
            be expressed (scaled rotary positions, sliding windows, other activations, other biases, quantization).
    """
    family = _family(hf_config, where)
    _refuse_inexpressible(hf_config, family, where)
    hidden_size = _integer(hf_config, "hidden_size", where)
    heads = _integer(hf_config, "num_attention_heads", where)
    return {
        "num_layers": _integer(hf_config, "num_hidden_layers", where),
        "hidden_size": hidden_size,
        "ffn_hidden_size": _integer(hf_config, "intermediate_size", where),
        "num_attention_heads": heads,
        "num_query_groups": _groups(hf_config, heads, where),
        "kv_channels": _head_dim(hf_config, hidden_size, heads, where),
        "normalization": "RMSNorm",
        "norm_epsilon": _number(hf_config, "rms_norm_eps", where),
        "swiglu": True,
        "add_bias_linear": False,
        "add_qkv_bias": family.add_qkv_bias,
        "qk_layernorm": family.qk_layernorm,
        "untie_embeddings_and_output_weights": not _switch(hf_config, "tie_word_embeddings", where),
        "rotary_base": _rotary_base(hf_config, where),
        "rotary_percent": 1.0,
        "vocab_size": _integer(hf_config, "vocab_size", where),
    }


def max_positions(hf_config: dict[str, object], where: str) -> int:
    """The longest sequence that a model is for, in tokens. Raises UserError."""
    stored = hf_config.get("max_position_embeddings")
    return (
        _family(hf_config, where).default_positions
        if stored is None
        else _whole("max_position_embeddings", stored, where)
    )


def _family(hf_config: dict[str, object], where: str) -> Family:
    names = hf_config.get("architectures")
    advice = f"known are {', '.join(FAMILIES)}"
    if not isinstance(names, list) or len(names) != 1 or not isinstance(names[0], str):
        raise UserError(f'{where}: "architectures" must name exactly one architecture, not {names!r}; {advice}')
    family = FAMILIES.get(names[0])
    if family is None:
        raise UserError(f"{where}: the architecture {names[0]} is not supported; {advice}")
    model_type = hf_config.get("model_type", family.model_type)
    if model_type != family.model_type:
        raise UserError(
            f'{where}: "model_type" {model_type!r} contradicts the architecture {names[0]}, which is '
            f"{family.model_type!r}; correct the one that is wrong"
        )
    for key in family.required:
        if key not in hf_config:
            raise UserError(
                f'{where}: "{key}" is missing, and the default of {names[0]} is that of one model only; '
                "add the right value"
            )
    return family


def _refuse_inexpressible(hf_config: dict[str, object], family: Family, where: str) -> None:
    quantization = hf_config.get("quantization_config")
    if quantization is not None:
        method = quantization.get("quant_method", "unknown") if isinstance(quantization, dict) else quantization
        raise UserError(f"{where}: the weights are quantized ({method}); use the checkpoint before quantization")
    activation = hf_config.get("hidden_act", "silu")
    if activation != "silu":
        raise UserError(f'{where}: "hidden_act" {activation!r} is not supported, only "silu"')
    for key in family.bias_switches:
        if _switch(hf_config, key, where):
            raise UserError(
                f'{where}: "{key}" true is not supported: it adds biases beyond those of query, key and value'
            )
    _refuse_sliding_window(hf_config, family, where)


def _refuse_sliding_window(hf_config: dict[str, object], family: Family, where: str) -> None:
    """Every layer must attend to all earlier tokens."""
    kinds = hf_config.get("layer_types") or []
    if not isinstance(kinds, list):
        raise UserError(f'{where}: "layer_types" must be a list, not {kinds!r}')
    other_kinds = [kind for kind in kinds if kind != "full_attention"]
    if other_kinds:
        raise UserError(f'{where}: "layer_types" with {other_kinds[0]!r} is not supported, only "full_attention"')
    window = hf_config.get("sliding_window", 4096)
    if family.sliding_window == "ignored" or window is None:
        return
    advice = f'set "sliding_window" to null if sequences stay within {window} tokens'
    if family.sliding_window == "always":
        raise UserError(f'{where}: sliding-window attention ("sliding_window" {window}) is not supported; {advice}')
    if not _switch(hf_config, "use_sliding_window", where) or kinds:
        return
    first = hf_config.get("max_window_layers", _DEFAULT_MAX_WINDOW_LAYERS)
    if not isinstance(first, int) or first < _integer(hf_config, "num_hidden_layers", where):
        raise UserError(
            f'{where}: sliding-window attention ("use_sliding_window" true, "sliding_window" {window} from layer '
            f"{first} on) is not supported; {advice}"
        )


def _rotary_base(hf_config: dict[str, object], where: str) -> float:
    """Base of plain rotary positions; everything else is refused."""
    bases: dict[str, float] = {}
    if hf_config.get("rope_theta") is not None:
        bases["rope_theta"] = _number(hf_config, "rope_theta", where)
    _refuse_partial_rotation(hf_config, where)
    for key in _ROPE_KEYS:
        rope = hf_config.get(key)
        if rope is None:
            continue
        if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()):
            raise UserError(f'{where}: "{key}" must be one set of rotary parameters for all layers, not {rope!r}')
        kind = rope.get("rope_type", rope.get("type")) or "default"
        if kind != "default":
            raise UserError(f'{where}: rope scaling of type {kind!r} ("{key}") is not supported, only plain RoPE')
        _refuse_partial_rotation(rope, where)
        if rope.get("rope_theta") is not None:
            bases[f"{key}.rope_theta"] = _number(rope, "rope_theta", where)
    if len(set(bases.values())) > 1:
        both = " and ".join(f"{key} {value:g}" for key, value in bases.items())
        raise UserError(f"{where}: {both} contradict each other; leave the right one")
    return next(iter(bases.values()), _DEFAULT_THETA)


def _refuse_partial_rotation(values: dict[str, object], where: str) -> None:
    """These architectures rotate whole heads whatever the key says, or fail on it."""
    if values.get("partial_rotary_factor") not in (None, 1):
        raise UserError(
            f'{where}: "partial_rotary_factor" {values["partial_rotary_factor"]!r} is not supported, only 1'
        )


def _groups(hf_config: dict[str, object], heads: int, where: str) -> int:
    if hf_config.get("num_key_value_heads") is None:
        return heads
    groups = _integer(hf_config, "num_key_value_heads", where)
    if heads % groups:
        raise UserError(f'{where}: "num_attention_heads" {heads} is not a multiple of "num_key_value_heads" {groups}')
    return groups


def _head_dim(hf_config: dict[str, object], hidden_size: int, heads: int, where: str) -> int:
    if hf_config.get("head_dim") is not None:
        return _integer(hf_config, "head_dim", where)
    if hidden_size % heads:
        raise UserError(
            f'{where}: "hidden_size" {hidden_size} is not a multiple of "num_attention_heads" {heads}, '
            f'and there is no "head_dim"'
        )
    return hidden_size // heads


def _given(values: dict[str, object], key: str, where: str) -> object:
    if values.get(key) is None:
        raise UserError(f'{where}: "{key}" is missing; take config.json from the original folder')
    return values[key]


def _integer(values: dict[str, object], key: str, where: str) -> int:
    return _whole(key, _given(values, key, where), where)


def _whole(key: str, value: object, where: str) -> int:
    if type(value) is not int or not 0 < value <= _LARGEST[key]:
        shown = str(value)[:_SHOWN] if type(value) is not int or abs(value) < 10**_SHOWN else "a longer one"
        raise UserError(f'{where}: "{key}" must be an integer from 1 to {_LARGEST[key]}, not {shown!r}')
    return value


def _number(values: dict[str, object], key: str, where: str) -> float:
    value = _given(values, key, where)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise UserError(f'{where}: "{key}" must be a positive number, not {value!r}')
    return float(value)


def _switch(values: dict[str, object], key: str, where: str) -> bool:
    """A true/false key; every family's default is false."""
    value = values.get(key)
    if value is not None and type(value) is not bool:
        raise UserError(f'{where}: "{key}" must be true or false, not {value!r}')
    return bool(value)
