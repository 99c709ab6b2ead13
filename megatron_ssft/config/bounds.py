"""The largest value of each number that can be meant.

Beyond it a run does not fail where it could say why: it overflows in a kernel, never fills its first batch, or asks for
more memory than there is in the world.
"""

from __future__ import annotations

from megatron_ssft.config.checks import require

LARGEST: dict[str, float] = {
    # model
    "num_layers": 10_000,
    "hidden_size": 1_000_000,
    "ffn_hidden_size": 10_000_000,
    "num_attention_heads": 100_000,
    "num_query_groups": 100_000,
    "kv_channels": 100_000,
    "vocab_size": 100_000_000,
    "make_vocab_size_divisible_by": 1_000_000,
    "init_method_std": 100.0,
    "norm_epsilon": 10.0,
    "rotary_base": 1e12,
    # tokens and batches
    "seq_length": 100_000_000,
    "max_tokens_per_microbatch": 1_000_000_000,
    "matching_tokens_per_microbatch": 1_000_000_000,
    "matching_tokens": 100_000_000,
    "micro_batch_size": 1_000_000,
    "global_batch_size": 1_000_000,
    "question_lookahead": 100_000,
    "train_iters": 1_000_000_000,
    "num_forking_tokens": 10_000,
    "seed": 2**63 - 1,
    # optimizer
    "lr": 10.0,
    "forking_token_lr_mult": 1_000_000.0,
    "forking_token_noise": 1000.0,
    "weight_decay": 1000.0,
    "adam_eps": 10.0,
}
"""Field -> value. All are far above what anybody trains with."""
_SIGNED = ("seed",)
"""Numbers that may be negative; the others are checked where they are declared."""


def within_bounds(section: object) -> None:
    """Raises UserError for a field of a dataclass that is larger than can be meant."""
    for name, value in vars(section).items():
        largest = LARGEST.get(name)
        if largest is None or not isinstance(value, int | float):
            continue
        size = abs(value) if name in _SIGNED else value
        require(size <= largest, f"--{name.replace('_', '-')} {value}: can be at most {largest:,}")
    deviation = vars(section).get("init_method_std")
    require(deviation is None or deviation >= 0, f"--init-method-std {deviation}: must not be negative")
