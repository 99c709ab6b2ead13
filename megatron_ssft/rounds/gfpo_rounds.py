"""The online loop of GFPO: each round measures the rewards of the current weights and trains on them.

A round is a folder; its stages are programs of the project, and each leaves files that are whole, absent, or gone on
with by the program itself. So the loop has no state but these files and the record of its stages (stages.json): started
again it walks over what is done and goes on with the first stage that is not.
"""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TextIO

import msgspec

from megatron_ssft.data.questions import read_questions
from megatron_ssft.data.sampler import epoch_permutation
from megatron_ssft.errors import UserError
from megatron_ssft.formats.checkpoint_damage import sound_checkpoint
from megatron_ssft.formats.failed_samples import FAILED_SAMPLES
from megatron_ssft.formats.files import remove_parts, write_durably
from megatron_ssft.formats.rewards import read_reward_lines, without_signal
from megatron_ssft.formats.run_folder import checkpoint_folder
from megatron_ssft.objectives.formulas.forking_policy import has_signal
from megatron_ssft.rounds.commands import Commands, Round
from megatron_ssft.rounds.processes import (
    Ask,
    Children,
    StageFailure,
    Stopped,
    asking_by,
    raise_if_stopped,
    terminate_ranks,
)
from megatron_ssft.rounds.round_table import RoundRow, round_row
from megatron_ssft.rounds.server import server_command, serving
from megatron_ssft.rounds.stages import StageFile, newest_checkpoint, only_one, read_json

GENERATE_TRIES = 3
"""How often samples are asked for that a server does not give."""


class Loop:
    """The rounds of one call of the program."""

    def __init__(self, commands: Commands, children: Children) -> None:
        self.commands, self.options, self.children = commands, commands.options, children
        self.work = commands.options.save

    def run(self) -> list[RoundRow]:
        """Play the rounds that are not done yet; returns a row for each round that is done then.

        Raises:
            UserError: wrong flags or files, or another loop in the same folder.
            StageFailure: a program failed.
            Stopped: a signal came, or training ended before its end.
        """
        self._check_start()
        with only_one(self.work):
            self.children.sweep()
            for folder in (self.work, *self.work.glob("round_*")):
                remove_parts(folder)
            self._check_folder()
            for number in range(self.options.rounds):
                round_ = self.commands.round(number)
                if not round_.is_done:
                    (self.work / "finished.json").unlink(missing_ok=True)
                    self._play(round_)
            return self._finish()

    def plan(self) -> Iterator[str]:
        """The command lines of the rounds to come; where a checkpoint is still to be made, its name is a pattern."""
        self._check_start()
        commands = self.commands
        for number in range(self.done(), self.options.rounds):
            round_ = commands.round(number)
            before = commands.run_before(round_)
            checkpoint = self._sound_checkpoint(before, sys.stderr)  # the output is command lines alone
            model = (checkpoint or before / "iter_*") / "hf"
            if checkpoint is not None and not model.is_dir():
                model = round_.folder / "hf"
                yield shlex.join(commands.export_command(before, model))
            if self.options.serve is not None:
                yield shlex.join(server_command(self.options.serve, model))
            yield shlex.join(commands.generate_command(round_, model))
            yield shlex.join(commands.score_command(round_))
            yield shlex.join(commands.train_command(round_, resumed=False))

    def done(self) -> int:
        """How many rounds are done."""
        number = 0
        while self.commands.round(number).is_done:
            number += 1
        return number

    def _check_start(self) -> None:
        """Raises UserError."""
        if newest_checkpoint(self.options.load) is None:
            raise UserError(f"--load {self.options.load}: holds no checkpoint (iter_*); give the folder of a run")
        questions_of_round(len(read_questions(self.options.data)), self.options.questions_per_round, 0, 0)
        if self.options.backend == "openai" and self.options.serve is None and self.options.rounds - self.done() > 1:
            raise UserError(
                "--backend openai without --serve: a server that runs already keeps its weights over the rounds; give "
                "--serve, or one more round at a time"
            )

    def _check_folder(self) -> None:
        """A folder belongs to the run it was started from. Raises UserError."""
        origin, load = self.work / "loop.json", str(self.options.load.resolve())
        if not origin.exists():
            write_durably(origin, json.dumps({"load": load}) + "\n")
        if read_json(origin).get("load") != load:
            first_load = read_json(origin).get("load")
            raise UserError(f"--save {self.work}: was started with --load {first_load}; give that, or another folder")

    # -- a round -------------------------------------------------------------------------------------------------

    def _play(self, round_: Round) -> None:
        round_.folder.mkdir(parents=True, exist_ok=True)
        stages = StageFile(round_.folder / "stages.json", self.work)
        self._choose_questions(round_, stages)
        model = self._export(round_, stages)
        is_absent = {name: not (round_.folder / f"{name}.jsonl").exists() for name in ("rollouts", "scores")}
        if stages.begin("generate", self.commands.generate_arguments(round_, model), is_absent["rollouts"]):
            self._generate(round_, stages, model)
        if stages.begin("score", self.commands.score_arguments(round_), is_absent["scores"]):
            self._run("score", round_, stages, self.commands.score_command(round_))
        self._refuse_without_signal(round_)
        has_checkpoint = newest_checkpoint(round_.run) is not None
        if stages.begin("train", self.commands.train_arguments(round_), left_nothing=not has_checkpoint):
            command = self.commands.train_command(round_, has_checkpoint)
            ask = terminate_ranks if self.options.stop_launched is None else asking_by(self.options.stop_launched)
            self._run("train", round_, stages, command, ask)
        self._write_rows()

    def _refuse_without_signal(self, round_: Round) -> None:
        """Raise UserError where the round's rewards say nothing about the choice of a tag, before ranks are started.

        With grpo it is the completions that must differ, which its training sees to.
        """
        rows = read_reward_lines(round_.rewards).values() if self.commands.chooses_tags else []
        if rows and not any(has_signal(row.mean_N[None])[0] for row in rows):
            before = "" if not round_.number else f"; the weights of the rounds before are in {self.work}"
            raise UserError(f"round {round_.number}: {without_signal(round_.rewards, len(rows))}{before}")

    def _choose_questions(self, round_: Round, stages: StageFile) -> None:
        """Write questions.jsonl: this round's lines of the data, in their order there."""
        data, size, seed = self.options.data, self.options.questions_per_round, self.options.seed
        if not stages.begin("questions", [data, *(() if size is None else (size, seed))]):
            return
        count = len(read_questions(data))
        with open(data, "rb") as file:
            lines = [raw for raw in file.read().removeprefix(b"\xef\xbb\xbf").split(b"\n") if raw.strip()]
        assert len(lines) == count
        places = questions_of_round(count, size, seed, round_.number)
        write_durably(round_.questions, "".join(lines[i].decode("utf-8") + "\n" for i in places))
        stages.finish("questions")

    def _export(self, round_: Round, stages: StageFile) -> Path:
        """The Hugging Face folder of the weights that the round starts from."""
        run = self.commands.run_before(round_)
        checkpoint = self._sound_checkpoint(run)
        if checkpoint is None:
            raise UserError(f"{run}: holds no checkpoint (iter_*); remove {run.parent} to begin its round again")
        model = checkpoint / "hf" if (checkpoint / "hf").is_dir() else round_.folder / "hf"
        if stages.begin("export", [checkpoint, model, *self.options.further("export")]):
            if model.is_dir():  # made by training, or before a kill came between making and noting it
                stages.finish("export")
            else:
                self._run("export", round_, stages, self.commands.export_command(run, model))
        return model

    def _sound_checkpoint(self, run: Path, remarks: TextIO | None = None) -> Path | None:
        """The folder of the checkpoint that the training takes of a run, verified; None without any.

        `remarks`: where to say what was passed over; default: standard output. Raises UserError where it is damaged and
        no older one is to be taken.
        """
        if newest_checkpoint(run) is None:
            return None
        choice = self.options.checkpoint_choice
        iteration = sound_checkpoint(
            run,
            by_content=choice.by_content,
            may_pass_over=choice.may_pass_over,
            say=lambda text: print(text, file=remarks, flush=True),
        )
        return checkpoint_folder(run, iteration)

    def _generate(self, round_: Round, stages: StageFile, model: Path) -> None:
        """Generate; what a server does not give is tried GENERATE_TRIES times in all, then done without.

        score leaves out of the rewards the questions that lack all samples of a tag.
        """
        command, options = self.commands.generate_command(round_, model), self.options
        if options.serve is None:
            self._generate_by(command, round_, stages, None)
            return
        server = server_command(options.serve, model)
        log = round_.folder / "server.log"
        _say(round_, "server", server)
        try:
            with serving(self.children, server, options.base_url, log, options.serve_timeout) as watch:
                self._generate_by(command, round_, stages, watch)
        finally:
            self.children.sweep()

    def _generate_by(
        self, command: list[str], round_: Round, stages: StageFile, watch: Callable[[], None] | None
    ) -> None:
        begin = time.monotonic()
        for number in range(1, GENERATE_TRIES + 1):
            if self._run("generate", round_, stages, command, watch=watch, partly_done=FAILED_SAMPLES) == 0:
                return
            name = f"round {round_.number}, generate: "
            if number < GENERATE_TRIES:
                print(f"{name}some samples failed; trying them again, {number} of {GENERATE_TRIES - 1}", flush=True)
            else:
                print(f"{name}some samples failed in {number} tries; going on without them", flush=True)
        stages.finish("generate", time.monotonic() - begin)

    def _run(
        self,
        stage: str,
        round_: Round,
        stages: StageFile,
        command: list[str],
        ask: Ask | None = None,
        watch: Callable[[], None] | None = None,
        partly_done: int = 0,
    ) -> int:
        """Run a stage's program to its end and note it; returns its exit status, 0 or `partly_done`.

        With `partly_done` nothing is noted. Raises StageFailure, Stopped.
        """
        stop, name = self.children.stop, f"round {round_.number}, {stage}"
        raise_if_stopped(stop, f"before {name}")
        _say(round_, stage, command)
        begin = time.monotonic()
        try:
            status = self.children.run(command, ask, watch)
        finally:
            if watch is None:  # the server is still to run
                self.children.sweep()
        if status not in (0, partly_done):
            raise_if_stopped(stop, f"in {name}")
            if watch is not None:
                watch()  # the reason, where the server has ended
            raise StageFailure(f"exit status {status}: {shlex.join(command)}", status)
        if stage == "train" and not round_.is_done:
            raise_if_stopped(stop, f"in {name}")
            raise Stopped(f"{name}: was told to stop before its end", 143)
        if status == 0:
            stages.finish(stage, time.monotonic() - begin)
        raise_if_stopped(stop, f"after {name}")
        return status

    # -- the end -------------------------------------------------------------------------------------------------

    def _write_rows(self) -> list[RoundRow]:
        """Write rounds.jsonl, a line per round that is done."""
        rows = [round_row(round_.number, round_.folder) for round_ in map(self.commands.round, range(self.done()))]
        write_durably(self.work / "rounds.jsonl", "".join(json.dumps(msgspec.to_builtins(row)) + "\n" for row in rows))
        return rows

    def _finish(self) -> list[RoundRow]:
        """Write finished.json: the last run and its Hugging Face folder, relative to the loop's folder."""
        rows = self._write_rows()
        following = self.commands.round(len(rows))
        run = self.commands.run_before(following)
        model = (self._sound_checkpoint(run) or run) / "hf"
        if not model.is_dir():  # with --no-export-hf-at-save; the next round, if there is to be one, needs it too
            following.folder.mkdir(exist_ok=True)
            model = self._export(following, StageFile(following.folder / "stages.json", self.work))
        summary = {"rounds": len(rows), "run": str(run.relative_to(self.work)), "hf": str(model.relative_to(self.work))}
        write_durably(self.work / "finished.json", json.dumps(summary) + "\n")
        return rows


def questions_of_round(count: int, size: int | None, seed: int, number: int) -> list[int]:
    """Places among `count` of the questions of round `number`, ascending; a pure function of its arguments.

    An epoch is a permutation from which each of its rounds takes the next `size` questions; what is left over is for
    the next epoch's permutation to give out. Raises UserError if there are not as many.
    """
    if size is None:
        return list(range(count))
    if size > count:
        raise UserError(f"--questions-per-round {size}: there are only {count} questions")
    epoch, place = divmod(number, count // size)
    return sorted(epoch_permutation(count, seed, epoch)[place * size : (place + 1) * size].tolist())


def _say(round_: Round, stage: str, command: Sequence[str]) -> None:
    print(f"round {round_.number}, {stage}: {shlex.join(command)}", flush=True)
