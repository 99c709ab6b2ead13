"""Train a GPT by Set Supervised Fine-Tuning (SSFT). `--dry-run` shows what the flags amount to.

    torchrun --nproc-per-node 2 -m megatron_ssft.cli train --data-path train.jsonl --save RUN --load HF_DIR \\
        --tensor-model-parallel-size 2 --num-forking-tokens 6 --train-epochs 4

Started again with --load RUN --save RUN it goes on from the newest checkpoint. SIGTERM saves one and ends the run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from megatron_ssft.config import SSFTConfig
from megatron_ssft.config.dry_run import DryRun
from megatron_ssft.config.flags import parse_arguments
from megatron_ssft.training.startup import complete_values

if TYPE_CHECKING:
    from megatron_ssft.training.describe import Further


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Parse, build, train, close."""
    config, asked = parse_arguments(str(__doc__), SSFTConfig, argv, complete_values, prog)
    if asked is not None:
        from megatron_ssft.training.describe import describe, describe_on_first_rank

        describe_on_first_rank(lambda: describe(config, asked.world_size, _answers(config, asked)))
        return
    from megatron_ssft.cli.run_training import run_training

    run_training(config)


def _answers(config: SSFTConfig, asked: DryRun) -> Further | None:
    """What there is to tell beyond the configuration, if anything is asked; that needs a torch that can simulate."""
    if not asked.simulates:
        return None
    from megatron_ssft.booking.answers import answer, check

    check(config.run, asked)
    return lambda dataset, vocabulary: answer(config, asked, dataset, vocabulary)
