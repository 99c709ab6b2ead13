"""The console program `megatron-ssft`: finds the module of a command and runs its `main`."""

from __future__ import annotations

import difflib
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron_ssft import __version__
from megatron_ssft.cli.entry import run_command
from megatron_ssft.cli.memory import enough_memory
from megatron_ssft.errors import UserError

ABOUT = "Set Supervised Fine-Tuning (arXiv 2510.05132) on megatron-core."


@dataclass(frozen=True)
class Command:
    """Module and summary of a command, known without importing it."""

    module: str
    """Name of its module in megatron_ssft.cli."""
    summary: str
    """Its line in --help."""

    def load(self) -> Callable[[Sequence[str], str], int | None]:
        """The command's `main`, which takes the words after its name and what the user called it by."""
        return importlib.import_module(f"megatron_ssft.cli.{self.module}").main


COMMANDS = {
    "demo": Command("demo", "all of the below on synthetic data, in minutes, on two CPU processes"),
    "demo-data": Command("demo_data", "only the demo's training set and held-out questions"),
    "prepare-data": Command("prepare_data", "public data sets to questions and training sets; held-out splits"),
    "convert": Command("convert", "Hugging Face folders to checkpoints and back, verified"),
    "train": Command("train", "SSFT: match traces to tags and train on them"),
    "status": Command("status", "whether a training run lives, is stuck, done or failed"),
    "select-tag": Command("select_tag", "which tag to use for single answers (g*)"),
    "generate": Command("generate", "samples under the tags of a trained model"),
    "score": Command("score", "judge samples by gold answers or tests"),
    "evaluate": Command("evaluate", "pass@k, votes and tags from scored samples"),
    "gfpo": Command("gfpo", "learn which tag to choose, from rewards"),
    "gfpo-rounds": Command("gfpo_rounds", "GFPO online: rounds of generate, score and gfpo"),
    "evaluate-policy": Command("evaluate_policy", "how well a model chooses its own tag, before and after GFPO"),
    "report": Command("report", "training runs and evaluations as one HTML page"),
}
"""All commands, in the order of their use."""


def main() -> int:
    """Run the command that this process was started with; returns the exit status."""
    return run_command(lambda: dispatch(sys.argv[1:], program_name(sys.argv[0])))


def dispatch(words: Sequence[str], program: str) -> int | None:
    """Run the command that `words` begin with. Raises UserError, SystemExit."""
    if not words:
        raise UserError(f"{program}: give a command; {program} --help lists them")
    name, *arguments = words
    if name in ("-h", "--help"):
        print(overview(program))
        return 0
    if name == "--version":
        print(f"megatron-ssft {__version__}")
        return 0
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise UserError(f"{program} {name}: no such command; {hint}{program} --help lists them")
    with enough_memory(name):
        return COMMANDS[name].load()(arguments, f"{program} {name}")


def overview(program: str) -> str:
    """Text of --help: the commands in the order of their use, a line each."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            f"usage: {program} [--help] [--version] COMMAND ...\n",
            f"{ABOUT}\n",
            "commands, in the order of their use:",
            *lines,
            f"\n{program} COMMAND --help explains a command.",
        ]
    )


def program_name(script: str) -> str:
    """Name that the user called this program by, from the path of the script that Python runs."""
    name = os.path.basename(script)
    return "python -m megatron_ssft.cli" if name == "__main__.py" else name
