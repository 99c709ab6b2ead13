"""The loop's flags, the places of a round's files, and the command lines of its stages."""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

import yaml

from megatron_ssft.errors import UserError
from megatron_ssft.formats.run_folder import FINISHED
from megatron_ssft.rounds.server import server_command

SEEDS_BETWEEN_ROUNDS = 1000
_OWN_FLAGS = {
    "generate": "--model --data --output --limit --tags --samples-per-tag --samples --seed --backend --base-url",
    "score": "--data --verifier --output --rewards",
    "train": "--load --reference --rewards --data --eval-data --save --train-iters --lr --seed --dry-run",
    "export": "",
}
"""Flags that the loop itself gives to the programs; --generate-args and the like may not."""


@dataclass(frozen=True)
class Tools:
    """The programs of the stages: what stands between the interpreter and their arguments."""

    export: tuple[str, ...]
    generate: tuple[str, ...]
    score: tuple[str, ...]
    train: tuple[str, ...]

    @classmethod
    def of_project(cls) -> Tools:
        """The project's own commands, wherever it is installed."""
        console = ("-m", "megatron_ssft.cli")
        return cls(
            export=(*console, "convert", "export"),
            generate=(*console, "generate"),
            score=(*console, "score"),
            train=(*console, "gfpo"),
        )


@dataclass(frozen=True)
class ChoiceOfCheckpoint:
    """How the training chooses the checkpoint to begin with."""

    by_content: bool
    """Every file is hashed."""
    may_pass_over: bool
    """An older one is taken where the newest is damaged."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the loop is to do; names are those of the flags of `megatron-ssft gfpo-rounds`."""

    load: Path
    data: Path
    save: Path
    rounds: int
    train_iters: int
    lr: str
    verifier: str
    samples_per_tag: int = 1
    questions_per_round: int | None = None
    eval_data: Path | None = None
    seed: int = 1234
    backend: str = "hf"
    base_url: tuple[str, ...] = ()
    serve: str | None = None
    serve_timeout: float = 1800.0
    nproc: int | None = None
    launcher: str | None = None
    stop_launched: str | None = None
    generate_args: str = ""
    score_args: str = ""
    train_args: str = ""
    export_args: str = ""

    def __post_init__(self) -> None:
        """Raises UserError."""
        for name in ("rounds", "train_iters", "samples_per_tag", "questions_per_round", "serve_timeout", "nproc"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UserError(f"--{name.replace('_', '-')} {value}: must be positive")
        if self.seed < 0:
            raise UserError(f"--seed {self.seed}: must not be negative")
        if bool(self.base_url) != (self.backend == "openai"):
            raise UserError("--backend openai and --base-url go together; give both or neither")
        if self.serve is not None:
            if self.backend != "openai":
                raise UserError("--serve: needs --backend openai and the --base-url of the server")
            server_command(self.serve, self.load)
        if self.launcher is not None and self.nproc is not None:
            raise UserError("--nproc and --launcher: give one, the launcher decides how many processes there are")
        if self.stop_launched is not None and self.launcher is None:
            raise UserError("--stop-launched: is for --launcher")
        for name in ("launcher", "stop_launched"):
            if getattr(self, name) is not None and not _split(f"--{name.replace('_', '-')}", getattr(self, name)):
                raise UserError(f"--{name.replace('_', '-')}: is empty; give a command")
        for stage in _OWN_FLAGS:
            self.further(stage)

    @property
    def checkpoint_choice(self) -> ChoiceOfCheckpoint:
        """What --train-args says of it."""
        words = " ".join(self.further("train")).replace("=", " ").split()
        settings = [following for word, following in zip(words, words[1:]) if word == "--on-damaged-checkpoint"]
        hurried = [word for word in words if word in ("--verify-checkpoint", "--no-verify-checkpoint")]
        return ChoiceOfCheckpoint(hurried[-1:] != ["--no-verify-checkpoint"], settings[-1:] == ["older"])

    def further(self, stage: str) -> list[str]:
        """The words of --<stage>-args. Raises UserError where one is the loop's own to give."""
        words = _split(f"--{stage}-args", getattr(self, f"{stage}_args"))
        for word in words:
            if word.partition("=")[0] in _OWN_FLAGS[stage].split():
                raise UserError(f"--{stage}-args {word}: is given by the loop itself; leave it out")
        return words


@dataclass(frozen=True)
class Round:
    """The places of one round's files."""

    number: int
    folder: Path

    @property
    def questions(self) -> Path:
        return self.folder / "questions.jsonl"

    @property
    def rewards(self) -> Path:
        return self.folder / "rewards.jsonl"

    @property
    def run(self) -> Path:
        """Folder of the training; the next round starts from it."""
        return self.folder / "run"

    @property
    def is_done(self) -> bool:
        return (self.run / FINISHED).is_file()


@dataclass(frozen=True)
class Commands:
    """Command lines of the stages. Arguments are paths where they mean files, and leave out what shapes no outcome."""

    options: Options
    tools: Tools

    def round(self, number: int) -> Round:
        """Round `number`, from 0."""
        return Round(number, self.options.save / f"round_{number:03d}")

    def run_before(self, round_: Round) -> Path:
        """The run whose weights a round starts from."""
        return self.round(round_.number - 1).run if round_.number else self.options.load

    def launcher(self) -> list[str]:
        """Words that stand before a program of several ranks."""
        if self.options.launcher is not None:
            return shlex.split(self.options.launcher)
        ranks = self.options.nproc or _model_parallel_size(self.options.load / "config.yaml")
        if ranks == 1:
            return [sys.executable]
        return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]

    def export_command(self, run: Path, target: Path) -> list[str]:
        """The export of a run: with --export-args on all ranks, otherwise in one process.

        It takes the checkpoint that the training takes.
        """
        further = self.options.further("export")
        start = self.launcher() if further else [sys.executable]
        choice = self.options.checkpoint_choice
        own = (
            *(() if choice.by_content else ("--no-verify-checkpoint",)),
            *(("--on-damaged-checkpoint", "older") if choice.may_pass_over else ()),
        )
        return [*start, *self.tools.export, str(run), str(target), *own, *further]

    @property
    def chooses_tags(self) -> bool:
        """Whether --train-args leave the objective to be one of the tags' choice."""
        words = " ".join(self.options.further("train")).replace("=", " ").split()
        return [after for word, after in zip(words, words[1:]) if word == "--objective"][-1:] != ["grpo"]

    def seed(self, round_: Round) -> int:
        """Seed of a round: its samples and steps are independent of those of other rounds."""
        return self.options.seed + SEEDS_BETWEEN_ROUNDS * round_.number

    def generate_arguments(self, round_: Round, model: Path) -> list[object]:
        """Arguments of the generation that shape its outcome: the server's address does not."""
        options = self.options
        return [
            "--model", model, "--data", round_.questions, "--output", round_.folder / "rollouts.jsonl",
            "--tags", "each", "--samples-per-tag", options.samples_per_tag, "--seed", self.seed(round_),
            "--backend", options.backend, *options.further("generate"),
        ]  # fmt: skip

    def score_arguments(self, round_: Round) -> list[object]:
        return [
            round_.folder / "rollouts.jsonl", "--data", round_.questions, "--verifier", self.options.verifier,
            "--output", round_.folder / "scores.jsonl", "--rewards", round_.rewards, *self.options.further("score"),
        ]  # fmt: skip

    def train_arguments(self, round_: Round) -> list[object]:
        options = self.options
        held_out = [] if options.eval_data is None else ["--eval-data", options.eval_data]
        return [
            "--load", self.run_before(round_), "--reference", options.load, "--rewards", round_.rewards,
            "--data", round_.questions, *held_out, "--save", round_.run, "--train-iters", options.train_iters,
            "--lr", options.lr, "--seed", self.seed(round_), "--export-hf-at-save", "--on-stale-rewards", "stop",
            *options.further("train"),
        ]  # fmt: skip

    def generate_command(self, round_: Round, model: Path) -> list[str]:
        server = ["--base-url", *self.options.base_url] if self.options.base_url else []
        return _words(sys.executable, *self.tools.generate, *self.generate_arguments(round_, model), *server)

    def score_command(self, round_: Round) -> list[str]:
        return _words(sys.executable, *self.tools.score, *self.score_arguments(round_))

    def train_command(self, round_: Round, resumed: bool) -> list[str]:
        """The training of a round; `resumed`: from the newest checkpoint of the round's own run."""
        arguments = self.train_arguments(round_)
        if resumed:
            arguments[arguments.index("--load") + 1] = round_.run
            place = arguments.index("--reference")  # its answers are stored by now, and it may have been moved
            del arguments[place : place + 2]
        return _words(*self.launcher(), *self.tools.train, *arguments)


def _split(flag: str, text: str) -> list[str]:
    """The words of a flag's value. Raises UserError."""
    try:
        return shlex.split(text)
    except ValueError as error:
        raise UserError(f"{flag} {text}: {str(error).lower()}; check the quotes") from error


def _words(*arguments: object) -> list[str]:
    return [str(argument) for argument in arguments]


def _model_parallel_size(config: Path) -> int:
    """Ranks of one copy of the model, from a run's configuration. Raises UserError."""
    try:
        values = yaml.safe_load(config.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise UserError(f"{config}: cannot be read; give --nproc, or the folder of a run") from error
    names = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size")
    size = 1
    for name in names:
        value = values.get(name, 1) if isinstance(values, dict) else 1
        size *= value if isinstance(value, int) else 1
    return size
