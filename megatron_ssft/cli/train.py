"""Train a GPT by Set Supervised Fine-Tuning (SSFT). `--dry-run` shows what the flags amount to.

    torchrun --nproc-per-node 2 -m megatron_ssft.cli train --data-path train.jsonl --save RUN --load HF_DIR \\
        --tensor-model-parallel-size 2 --num-forking-tokens 6 --train-epochs 4

Started again with --load RUN --save RUN it goes on from the newest checkpoint. SIGTERM saves one and ends the run.
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron_ssft.config import SSFTConfig
from megatron_ssft.config.flags import parse_arguments
from megatron_ssft.training.startup import complete_values


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Parse, build, train, close."""
    config, dry_run = parse_arguments(str(__doc__), SSFTConfig, argv, complete_values, prog)
    if dry_run:
        from megatron_ssft.training.describe import describe, describe_on_first_rank

        describe_on_first_rank(lambda: describe(config))
        return
    from megatron_ssft.cli.run_training import run_training

    run_training(config)
