"""GFPO online: rounds of generating, scoring and training, each on rewards of the weights it starts from.

    megatron-ssft gfpo-rounds --load RUN --data Q.jsonl --save WORK --rounds 3 --train-iters 10 --lr 1e-4 \\
        --verifier exact --samples-per-tag 2 --train-args "--objective gfpo-exact --trainable tag-rows"
    megatron-ssft gfpo-rounds ... --backend openai --base-url http://localhost:8000/v1 \\
        --serve "vllm serve {model} --port 8000 --tensor-parallel-size 8"

Started again after a kill or a SIGTERM, the same command goes on where it stopped; a larger --rounds adds rounds.
WORK/round_000 and so on hold what the stages make, WORK/rounds.jsonl a line for each round. At the end
WORK/finished.json names the final run and its Hugging Face folder. Exit status: 0 when all rounds are done, 2 for wrong
input, 143 after a SIGTERM, else that of the program that failed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from megatron_ssft.cli.generate import GenerateFlags
from megatron_ssft.cli.options import parse_options
from megatron_ssft.cli.score import ScoreFlags
from megatron_ssft.config.fields import Flag
from megatron_ssft.errors import UserError

if TYPE_CHECKING:
    from megatron_ssft.rounds.commands import Commands, Options, Tools

MEASURING, TRAINING = "measuring rewards", "training"
"""Headings in --help."""


@dataclass(frozen=True, kw_only=True)
class GfpoRoundsFlags:
    """Start and folder of the loop, and arguments of its stages."""

    load: Annotated[Path, Flag(metavar="RUN")]
    """Run to start from, and the reference."""
    data: Annotated[Path, Flag(metavar="Q.jsonl")]
    """Questions with gold answers."""
    save: Annotated[Path, Flag(metavar="WORK")]
    """Folder of the loop."""
    rounds: Annotated[int, Flag(metavar="R")]
    """Rounds in all, with those done already."""
    questions_per_round: Annotated[int | None, Flag(metavar="K")] = None
    """Questions per round, drawn without repetition; default: all."""
    eval_data: Annotated[Path | None, Flag(metavar="H.jsonl")] = None
    """Held-out questions, for training's log."""
    seed: int = 1234
    """Decides questions, samples and steps."""
    dry_run: bool = False
    """Print the command lines to come, and stop."""

    verifier: Annotated[Literal["exact", "math", "choice", "code"], Flag(group=MEASURING)]
    """Verifier of the answers, as for `score`."""
    samples_per_tag: Annotated[int, Flag(metavar="K", group=MEASURING)] = 1
    """Samples per question and tag."""
    backend: Annotated[Literal["hf", "openai", "vllm"], Flag(group=MEASURING)] = "hf"
    """Backend of the generation, as for `generate`."""
    base_url: Annotated[tuple[str, ...], Flag(metavar="URL", group=MEASURING)] = ()
    """openai: the server, such as http://localhost:8000/v1, or several, which share the questions."""
    serve: Annotated[str | None, Flag(metavar="COMMAND", group=MEASURING)] = None
    """Starts the server or all of them; {model} stands for the folder."""
    serve_timeout: Annotated[float, Flag(metavar="SECONDS", group=MEASURING)] = 1800.0
    """Seconds until every server answers."""
    generate_args: Annotated[str, Flag(metavar="FLAGS", group=MEASURING)] = ""
    """Further flags of `generate`; with = if it is one word."""
    score_args: Annotated[str, Flag(metavar="FLAGS", group=MEASURING)] = ""
    """Further flags of `score`."""

    train_iters: Annotated[int, Flag(metavar="N", group=TRAINING)]
    """Steps per round."""
    lr: Annotated[str, Flag(group=TRAINING)]
    """Learning rate."""
    nproc: Annotated[int | None, Flag(metavar="P", group=TRAINING)] = None
    """Processes here; default: as many as one copy of the model has."""
    launcher: Annotated[str | None, Flag(metavar="COMMAND", group=TRAINING)] = None
    """Instead of --nproc: "srun --ntasks=16 python"."""
    stop_launched: Annotated[str | None, Flag(metavar="COMMAND", group=TRAINING)] = None
    """Asks the launcher's ranks to save and end; default: SIGTERM to the launcher."""
    train_args: Annotated[str, Flag(metavar="FLAGS", group=TRAINING)] = ""
    """Further flags of `gfpo`."""
    export_args: Annotated[str, Flag(metavar="FLAGS", group=TRAINING)] = ""
    """Run `convert export` by the launcher, with these flags."""

    def options(self) -> Options:
        """Options of the loop. Raises UserError."""
        from megatron_ssft.rounds.commands import Options

        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        del values["dry_run"]
        return Options(**values)


def main(argv: Sequence[str] | None = None, prog: str | None = None, tools: Tools | None = None) -> int:
    """Parse, run the rounds, print; returns the exit status. Raises UserError.

    `tools`: programs of the stages, default the project's own.
    """
    flags = parse_options(GfpoRoundsFlags, __doc__, argv, prog)
    from rich.console import Console

    from megatron_ssft.rounds.commands import Commands, Tools
    from megatron_ssft.rounds.gfpo_rounds import Loop
    from megatron_ssft.rounds.processes import Children, StageFailure, Stopped
    from megatron_ssft.rounds.round_table import rounds_table
    from megatron_ssft.signals import StopSignal

    options = flags.options()
    commands = Commands(options, tools or Tools.of_project())
    loop = Loop(commands, Children(options.save, StopSignal(signal.SIGTERM, signal.SIGINT)))
    if tools is None:
        check_flags(commands)
    if flags.dry_run:
        for line in loop.plan():
            print(line)
        return 0
    try:
        rows = loop.run()
    except (StageFailure, Stopped) as error:
        print(error, file=sys.stderr)
        return error.status
    Console().print(rounds_table(rows))
    print((options.save / "finished.json").read_text(encoding="utf-8"), end="")
    return 0


def check_flags(commands: Commands) -> None:
    """Let the programs of the first round look at their flags, before there is an hour of work behind them.

    Raises UserError.
    """
    from megatron_ssft.config import GFPOConfig
    from megatron_ssft.config.flags import parse_arguments
    from megatron_ssft.training.startup import complete_policy_values

    def check_train(words: list[str]) -> None:
        parse_arguments("", GFPOConfig, words, complete_policy_values)

    def check_generate(words: list[str]) -> None:
        parse_options(GenerateFlags, None, words)

    def check_score(words: list[str]) -> None:
        parse_options(ScoreFlags, None, words)

    first = commands.round(0)
    _check("--generate-args", check_generate, commands.generate_arguments(first, commands.options.load))
    _check("--score-args", check_score, commands.score_arguments(first))
    _check("--train-args", check_train, commands.train_arguments(first))


def _check(flag: str, parse_flags: Callable[[list[str]], None], arguments: Sequence[object]) -> None:
    stderr = io.StringIO()
    try:
        with contextlib.redirect_stderr(stderr):
            parse_flags([str(argument) for argument in arguments])
    except UserError as error:
        raise UserError(f"{flag}: {error}") from error
    except SystemExit as error:
        reason = stderr.getvalue().rstrip().rpartition("error: ")[2]
        raise UserError(f"{flag}: {reason}; --help of the program lists its flags") from error
