"""Tokenize a training set before the GPUs are there, with the flags of `train`.

    megatron-ssft prepare-data tokenize --data-path sets.jsonl --load HF_DIR --num-forking-tokens 6 \\
        --seq-length 32768 --train-epochs 6 --save RUN --tokenizing-workers 16

Give the flags that `train` will get. It finds the tokens in the same cache, wherever the files lie by then. What is
read is never in memory as a whole. A killed job goes on where it was.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron_ssft.config import SSFTConfig
from megatron_ssft.config.checks import require
from megatron_ssft.config.flags import parse_arguments
from megatron_ssft.launch import this_launch
from megatron_ssft.training.startup import complete_values


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Parse, tokenize, say what was made. Raises UserError."""
    config, dry_run = parse_arguments(str(__doc__), SSFTConfig, argv, complete_values, prog)
    require(dry_run is None, "--dry-run: describes a run; give it to train")
    if not this_launch().is_first:
        return
    from megatron_ssft.data.cache import SetDataset
    from megatron_ssft.objectives.sets import prepare_data
    from megatron_ssft.tokenizers.vocabulary import build_vocabulary

    for name, folder in prepare_data(config, build_vocabulary(config.run, config.start)).items():
        summary = SetDataset.open(Path(folder)).summary
        print(
            f"{name}: {summary.questions} questions, {summary.traces} traces, {summary.total_tokens} tokens: {folder}"
        )
