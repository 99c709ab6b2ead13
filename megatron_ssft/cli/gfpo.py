"""Learn which forking token to choose, by rewards that are known for every question and token.

    torchrun --nproc-per-node 2 tools/train_gfpo.py --load RUN --rewards REWARDS.jsonl --data Q.jsonl --save RUN_GFPO \\
        --objective gfpo-exact --train-iters 20 --lr 1e-4

Model, tokenizer, tags and layout come from RUN; REWARDS.jsonl from generate.py and score.py --rewards. docs/gfpo.md has
the objectives. With --load RUN_GFPO --save RUN_GFPO a run goes on where it was stopped.
"""

from __future__ import annotations

import sys

from megatron_ssft.cli.entry import run_command
from megatron_ssft.config.flags import parse_arguments
from megatron_ssft.training.startup import POLICY_PROGRAM, complete_policy_values


def main() -> None:
    """Parse, build, train, close."""
    config, dry_run = parse_arguments(__doc__, complete=complete_policy_values, program=POLICY_PROGRAM)
    if dry_run:
        from megatron_ssft.training.describe import print_description
        from megatron_ssft.training.policy.describe import describe

        print_description(config, describe)
        return
    from megatron_ssft.parallel.topology import destroy_topology, initialize_topology
    from megatron_ssft.training.policy.trainer import PolicyTrainer
    from megatron_ssft.training.signals import StopSignal

    stop = StopSignal()
    topology = initialize_topology(config)
    trainer = PolicyTrainer(config, topology)
    trainer.run(stop)
    destroy_topology()
