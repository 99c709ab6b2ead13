"""A step's line of metrics.jsonl in words, for a person who watches the log."""

from __future__ import annotations

from collections.abc import Mapping

_PIPELINE = "pipeline idle {:.0%}"


def step_line(fields: Mapping[str, object]) -> str:
    """One step for a person; the fields are those of `SSFTMetrics`."""

    def number(name: str) -> float:
        return _number(fields, name)

    parts = [f"step {number('iteration'):>6}", f"loss {number('loss'):.4f}", f"lr {number('lr'):.3e}"]
    parts.append(f"grad norm {number('grad_norm'):.3f}")
    if fields.get("matching_cost") is not None:
        parts.append(f"matching cost {number('matching_cost'):.4f} gap {number('matching_gap'):.4f}")
    if fields.get("eval_loss") is not None:
        parts.append(f"eval loss {number('eval_loss'):.4f}")
    if fields.get("matching_regret") is not None:
        saved = number("exact_matching_seconds") - number("matching_seconds")
        parts.append(f"regret {number('matching_regret'):.4f} per question, saving {saved:.2f} s")
    seconds = number("seconds")
    share = number("matching_seconds") / seconds if seconds else 0.0
    pads = f"PAD {number('pad_sequences')}/{number('pad_lower_bound')}"
    parts.append(f"{pads} makespan {number('makespan_over_bound'):.3f}")
    if "pipeline_idle_share" in fields:
        parts.append(_PIPELINE.format(number("pipeline_idle_share")))
    parts.append(f"{seconds:.2f} s ({share:.0%} matching)")
    parts.append(f"{number('sequence_tokens') / max(seconds, 1e-9):.0f} tokens/s")
    if fields.get("mfu") is not None:
        parts.append(f"MFU {number('mfu'):.1%}")
    return " | ".join(parts)


def policy_line(fields: Mapping[str, object]) -> str:
    """One step of policy learning for a person; the fields are those of `GFPOMetrics` or `GRPOMetrics`."""

    def number(name: str) -> float:
        return _number(fields, name)

    parts = [f"step {number('iteration'):>4}", f"loss {number('loss'):.4f}", f"lr {number('lr'):.2e}"]
    parts.append(f"grad norm {number('grad_norm'):.3f}")
    if "reward_uniform" in fields:
        others = f"(uniform {number('reward_uniform'):.4f}, best tag {number('reward_best_fixed'):.4f})"
        parts.append(f"reward {number('reward'):.4f} {others}")
        if "signal_questions" in fields:
            parts.append(f"signal in {number('signal_questions')} of {number('questions')}")
        parts.append(f"entropy {number('entropy'):.3f} kl {number('kl'):.3f} mass {number('mass'):.2g}")
    elif "reward_stored" in fields:
        parts.append(f"reward of the stored samples {number('reward_stored'):.4f} kl {number('kl'):.4f}")
    shift = "completion_nll_shift" if "completion_nll_shift" in fields else "rescored_nll_shift"
    for name, text in (
        ("clip_fraction", "clipped {:.1%}"),
        ("anchor_kl", "anchor kl {:.4f}"),
        (shift, "NLL of completions {:+.4f}"),
        ("effective_sample_size", "effective samples {:.0%}"),
        ("pipeline_idle_share", _PIPELINE),
        ("mfu", "MFU {:.1%}"),
    ):
        if name in fields:
            parts.append(text.format(number(name)))
    return " | ".join([*parts, f"{number('seconds'):.2f} s"])


def _number(fields: Mapping[str, object], name: str) -> float:
    value = fields[name]
    assert isinstance(value, int | float), f"{name} is {value!r}"
    return value
