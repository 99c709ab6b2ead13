"""`train` on several ranks without a launcher, one of which a signal strikes at a chosen place."""

from __future__ import annotations

import importlib
import os
import signal
import time
from dataclasses import dataclass

from tests.helpers.distributed import _context, become_rank, free_port, no_survivors

PLACES = {
    "meeting": ("megatron_ssft.parallel.watch.board", "Board.join"),
    "joining the groups": ("megatron_ssft.parallel.topology", "_build_groups"),
    "reading the data": ("megatron_ssft.objectives.sets", "prepare_data"),
    "opening the data": ("megatron_ssft.objectives.sets", "open_everywhere"),
    "building the model": ("megatron_ssft.training.trainer", "Engine.__init__"),
    "between steps": ("megatron_ssft.training.trainer", "any_rank"),
    "scoring": ("megatron_ssft.parallel.engine", "Engine._forward"),
    "training": ("megatron_ssft.parallel.engine", "set_hyperparameters"),
    "writing the log": ("megatron_ssft.training.run_log", "RunLog.step"),
    "saving": ("megatron_ssft.parallel.checkpoint.run_checkpoint", "_write_shards"),
    "publishing": ("megatron_ssft.parallel.checkpoint.run_checkpoint", "publish_folder"),
    "ending": ("megatron_ssft.parallel.topology", "_wait_for_all"),
}
"""Place -> (module, function) that is struck in it."""


@dataclass(frozen=True)
class Ended:
    """How a rank ended."""

    status: int | None
    """None: it was still there at the deadline."""
    output: str
    seconds: float
    """From the strike."""


def run_struck(folder, world_size, words, place, rank, number, nth=1, deadline=60.0, variables=None):
    """Run `train` with this command line; Ended by rank, without the struck one.

    Args:
        number: the signal that rank `rank` sends itself at its `nth` call of the place's function; 0: it sleeps there,
            while its threads go on.
        deadline: seconds after the strike, when everybody who is left is killed.
        variables: of the environment, for all ranks.
    """
    port, struck = free_port(), folder / "struck"
    processes = []
    for each in range(world_size):
        strike = (place, number, nth, str(struck)) if each == rank else None
        arguments = (each, world_size, port, str(folder / f"rank{each}.txt"), words, strike, variables)
        processes.append(_context.Process(target=_run, args=arguments))
        processes[-1].start()
    with no_survivors(processes):
        _wait_until(lambda: struck.exists() or not any(p.is_alive() for p in processes), 120.0)
        began = time.monotonic()
        ended = {}

        def all_ended():
            for each, process in enumerate(processes):
                if each != rank and each not in ended and not process.is_alive():
                    ended[each] = time.monotonic() - began
            return len(ended) == world_size - 1

        _wait_until(all_ended, deadline)
    assert struck.exists(), (folder / f"rank{rank}.txt").read_text()
    return {
        each: Ended(
            process.exitcode if each in ended else None,
            (folder / f"rank{each}.txt").read_text(),
            ended.get(each, deadline),
        )
        for each, process in enumerate(processes)
        if each != rank
    }


def slow_down(place, seconds):
    """From now on every call of the place's function takes so much longer in this process."""
    _wrap(place, lambda: time.sleep(seconds))


def _wait_until(condition, seconds):
    limit = time.monotonic() + seconds
    while not condition() and time.monotonic() < limit:
        time.sleep(0.02)


def _run(rank, world_size, port, output, words, strike, variables=None):
    become_rank(rank, world_size, port)
    os.environ |= variables or {}
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    import torch

    torch.set_num_threads(1)
    from megatron_ssft.cli import train
    from megatron_ssft.cli.entry import run_command

    if strike is not None:
        _arm(*strike)
    raise SystemExit(run_command(lambda: train.main(words)))


def _arm(place, number, nth, struck):
    calls = []

    def strike():
        calls.append(None)
        if len(calls) == nth:
            with open(struck, "w", encoding="utf-8"):
                pass
            time.sleep(0.3)  # a sign of life from here
            if number:
                os.kill(os.getpid(), signal.Signals(number))
            time.sleep(600.0)  # also where the signal stops this thread a moment later

    _wrap(place, strike)


def _wrap(place, before):
    """Call `before` before each call of the place's function."""
    module, path = PLACES[place]
    owner = importlib.import_module(module)
    *owners, name = path.split(".")
    for part in owners:
        owner = getattr(owner, part)
    function = getattr(owner, name)

    def wrapped(*args, **kwargs):
        before()
        return function(*args, **kwargs)

    setattr(owner, name, wrapped)
