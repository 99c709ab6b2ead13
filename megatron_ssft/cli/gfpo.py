"""Learn which tag (forking token) to choose, by rewards that are known for every question and tag.

    torchrun --nproc-per-node 2 -m megatron_ssft.cli gfpo --load RUN --rewards REWARDS.jsonl --data Q.jsonl \\
        --save RUN_GFPO --objective gfpo-exact --train-iters 20 --lr 1e-4

Model, tokenizer, tags and parallel layout come from RUN; REWARDS.jsonl from `generate` and `score --rewards`.
docs/gfpo.md has the objectives. With --load RUN_GFPO --save RUN_GFPO a run goes on where it was stopped.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from megatron_ssft.config import GFPOConfig
from megatron_ssft.config.dry_run import DryRun
from megatron_ssft.config.flags import parse_arguments
from megatron_ssft.training.startup import complete_policy_values

if TYPE_CHECKING:
    from megatron_ssft.training.describe_policy import Further


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Parse, build, train, close."""
    config, asked = parse_arguments(str(__doc__), GFPOConfig, argv, complete_policy_values, prog)
    if asked is not None:
        from megatron_ssft.training.describe import describe_on_first_rank
        from megatron_ssft.training.describe_policy import describe

        describe_on_first_rank(lambda: describe(config, asked.world_size, _answers(config, asked)))
        return
    from megatron_ssft.cli.run_training import run_training

    run_training(config)


def _answers(config: GFPOConfig, asked: DryRun) -> Further | None:
    """What there is to tell beyond the configuration, if anything is asked; that needs a torch that can simulate."""
    if not asked.simulates:
        return None
    from megatron_ssft.booking.answers import answer_policy, check

    check(config.run, asked)
    return lambda vocabulary: answer_policy(config, asked, vocabulary)
