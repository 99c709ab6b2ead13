"""GFPO online: rounds of generating, scoring and training, each on rewards of the weights it starts from.

    python tools/run_gfpo.py --load RUN --data Q.jsonl --save WORK --rounds 3 --train-iters 10 --lr 1e-4 \\
        --verifier exact --samples-per-tag 2 --train-args "--objective gfpo-exact --trainable tag-rows"
    python tools/run_gfpo.py ... --backend openai --base-url http://localhost:8000/v1 \\
        --serve "vllm serve {model} --port 8000 --tensor-parallel-size 8"

Started again after a kill or a SIGTERM, the same command goes on where it stopped; a larger --rounds adds rounds.
WORK/round_000 and so on hold what the stages make, WORK/rounds.jsonl a line a round, and at the end WORK/finished.json
names the final run and its Hugging Face folder. Exit status: 0 when all rounds are done, 2 for wrong input, 143 after a
SIGTERM, else that of the program that failed.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from megatron_ssft.cli.entry import run_command
from megatron_ssft.errors import UserError

if TYPE_CHECKING:
    from megatron_ssft.rounds.commands import Commands, Tools

ROOT = Path(__file__).resolve().parent.parent


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """All flags."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--load", type=Path, required=True, metavar="RUN", help="run to start from, and the reference")
    parser.add_argument("--data", type=Path, required=True, metavar="Q.jsonl", help="questions with gold answers")
    parser.add_argument("--save", type=Path, required=True, metavar="WORK", help="folder of the loop")
    parser.add_argument("--rounds", type=int, required=True, metavar="R", help="in all, with those done already")
    parser.add_argument("--questions-per-round", type=int, metavar="K", help="drawn without repetition [all]")
    parser.add_argument("--eval-data", type=Path, metavar="H.jsonl", help="held-out questions, for training's log")
    parser.add_argument("--seed", type=int, default=1234, help="of questions, samples and steps [%(default)s]")
    parser.add_argument("--dry-run", action="store_true", help="print the command lines to come, and stop")

    measuring = parser.add_argument_group("measuring rewards")
    measuring.add_argument("--verifier", choices=("exact", "math", "choice", "code"), required=True)
    measuring.add_argument("--samples-per-tag", type=int, default=1, metavar="K", help="[%(default)s]")
    measuring.add_argument("--backend", choices=("hf", "openai", "vllm"), default="hf", help="[%(default)s]")
    measuring.add_argument("--base-url", metavar="URL", help="openai: the server, e.g. http://localhost:8000/v1")
    measuring.add_argument("--serve", metavar="COMMAND", help="starts the server; {model} stands for the folder")
    measuring.add_argument(
        "--serve-timeout", type=float, default=1800, metavar="SECONDS", help="until it answers [%(default)s]"
    )
    measuring.add_argument(
        "--generate-args", default="", metavar="FLAGS", help="further flags of generate.py; with = if it is one word"
    )
    measuring.add_argument("--score-args", default="", metavar="FLAGS", help="further flags of score.py")

    training = parser.add_argument_group("training")
    training.add_argument("--train-iters", type=int, required=True, metavar="N", help="steps a round")
    training.add_argument("--lr", required=True, help="learning rate")
    training.add_argument(
        "--nproc", type=int, metavar="P", help="processes here [as many as one copy of the model has]"
    )
    training.add_argument("--launcher", metavar="COMMAND", help='instead of --nproc: "srun --ntasks=16 python"')
    training.add_argument(
        "--stop-launched", metavar="COMMAND", help="asks the launcher's ranks to save and end [SIGTERM to the launcher]"
    )
    training.add_argument("--train-args", default="", metavar="FLAGS", help="further flags of train_gfpo.py")
    training.add_argument(
        "--export-args", default="", metavar="FLAGS", help="convert_hf.py: run it by the launcher, with these flags"
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None, tools: Tools | None = None) -> None:
    """Parse, run the rounds, print. Raises UserError, SystemExit."""
    arguments = vars(parse(argv))
    from rich.console import Console

    from megatron_ssft.rounds.commands import Commands, Options, Tools
    from megatron_ssft.rounds.gfpo_rounds import Loop
    from megatron_ssft.rounds.processes import Children, StageFailure, Stopped, StopSignals
    from megatron_ssft.rounds.round_table import rounds_table

    dry_run = arguments.pop("dry_run")
    options = Options(**arguments)
    commands = Commands(options, tools or Tools.of_project(ROOT))
    loop = Loop(commands, Children(options.save, StopSignals()))
    if tools is None:
        check_flags(commands)
    if dry_run:
        for line in loop.plan():
            print(line)
        return
    try:
        rows = loop.run()
    except (StageFailure, Stopped) as error:
        print(error, file=sys.stderr)
        sys.exit(error.status)
    Console().print(rounds_table(rows))
    print((options.save / "finished.json").read_text(encoding="utf-8"), end="")


def check_flags(commands: Commands) -> None:
    """Let the programs of the first round look at their flags, before there is an hour of work behind them.

    Raises UserError.
    """
    from megatron_ssft.config.flags import parse_arguments
    from megatron_ssft.training.startup import POLICY_PROGRAM, complete_policy_values

    def check_train(flags: list[str]) -> None:
        parse_arguments("", flags, complete=complete_policy_values, program=POLICY_PROGRAM)

    first = commands.round(0)
    _check("--generate-args", load_tool("generate").parse, commands.generate_arguments(first, commands.options.load))
    _check("--score-args", load_tool("score").parse, commands.score_arguments(first))
    _check("--train-args", check_train, commands.train_arguments(first))


def load_tool(name: str) -> ModuleType:
    """Another program beside this one, as a module."""
    spec = importlib.util.spec_from_file_location(f"{name}_program", ROOT / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _check(flag: str, parse_flags: Callable[[list[str]], object], arguments: list[object]) -> None:
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            parse_flags([str(argument) for argument in arguments])
    except UserError as error:
        raise UserError(f"{flag}: {error}") from error
    except SystemExit as error:
        reason = said.getvalue().rstrip().rpartition("error: ")[2]
        raise UserError(f"{flag}: {reason}; --help of the program lists its flags") from error
