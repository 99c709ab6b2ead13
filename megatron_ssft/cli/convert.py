"""Convert between Hugging Face folders and Megatron checkpoints, and prove that they are the same model.

    python tools/convert_hf.py import HF_DIR MEGATRON_DIR --num-forking-tokens 6
    torchrun --nproc-per-node 4 tools/convert_hf.py export MEGATRON_DIR HF_DIR --tensor-model-parallel-size 4
    python tools/convert_hf.py verify HF_DIR MEGATRON_DIR

Alone or under torchrun at any layout. MEGATRON_DIR is a run folder: pretrain_ssft.py --load takes it as it is.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from megatron_ssft.cli.entry import run_command


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Command, folders, layout and, for import, the tags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, first, second in (
        ("import", "HF_DIR", "MEGATRON_DIR"),
        ("export", "MEGATRON_DIR", "HF_DIR"),
        ("verify", "HF_DIR", "MEGATRON_DIR"),
    ):
        command = commands.add_parser(name, argument_default=argparse.SUPPRESS)
        command.add_argument("source", metavar=first, type=Path)
        command.add_argument("target", metavar=second, type=Path)
        command.add_argument("--tensor-model-parallel-size", type=int)
        command.add_argument("--pipeline-model-parallel-size", type=int)
        if name != "verify":
            command.add_argument("--no-verify", action="store_true", help="do not compare with transformers")
        if name == "import":
            command.add_argument("--num-forking-tokens", type=int)
            command.add_argument("--forking-token-format")
            command.add_argument("--forking-token-template")
            command.add_argument("--forking-token-init")
            command.add_argument("--forking-token-noise", type=float)
            command.add_argument("--seed", type=int)
    return parser.parse_args(argv)


def main() -> None:
    """Parse, convert, close."""
    arguments = vars(parse())
    from megatron_ssft.training import conversion

    command = {
        "import": conversion.import_hf,
        "export": conversion.export_run,
        "verify": conversion.verify,
    }[arguments.pop("command")]
    command(arguments.pop("source"), arguments.pop("target"), arguments)
