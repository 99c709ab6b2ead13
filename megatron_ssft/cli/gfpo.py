"""Learn which tag (forking token) to choose, by rewards that are known for every question and tag.

    torchrun --nproc-per-node 2 -m megatron_ssft.cli gfpo --load RUN --rewards REWARDS.jsonl --data Q.jsonl \\
        --save RUN_GFPO --objective gfpo-exact --train-iters 20 --lr 1e-4

Model, tokenizer, tags and parallel layout come from RUN; REWARDS.jsonl from `generate` and `score --rewards`.
docs/gfpo.md has the objectives. With --load RUN_GFPO --save RUN_GFPO a run goes on where it was stopped.
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron_ssft.config import GFPOConfig
from megatron_ssft.config.flags import parse_arguments
from megatron_ssft.training.startup import complete_policy_values


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Parse, build, train, close."""
    config, dry_run = parse_arguments(str(__doc__), GFPOConfig, argv, complete_policy_values, prog)
    if dry_run:
        from megatron_ssft.training.describe import describe_on_first_rank
        from megatron_ssft.training.describe_policy import describe

        describe_on_first_rank(lambda: describe(config))
        return
    from megatron_ssft.cli.run_training import run_training

    run_training(config)
