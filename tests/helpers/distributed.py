"""Run a test body on k gloo ranks. The failing rank's traceback reaches the test, and nothing ever hangs."""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import random
import signal
import socket
import subprocess
import time
import traceback

_context = multiprocessing.get_context("forkserver")
# Children are forked from a process that has done the slow imports once.
_context.set_forkserver_preload(
    ["megatron_ssft.training.trainer", "tests.helpers.distributed"]
    + [f"transformers.models.{family}.modeling_{family}" for family in ("llama", "mistral", "qwen2", "qwen3")]
)


class RankFailure(AssertionError):
    """A rank raised, died or outlived the timeout; the text holds its traceback."""


def run_ranks(world_size, body, *args, timeout=120.0):
    """Call `body(*args)` in `world_size` processes with RANK, WORLD_SIZE, ... set; return their results by rank.

    `body` must be importable (a module-level function) and its arguments and result picklable. As soon as one rank
    fails the others are killed.
    """
    port = free_port()
    pipes, processes = [], []
    for rank in range(world_size):
        receiver, sender = _context.Pipe(duplex=False)
        process = _context.Process(target=_run, args=(sender, rank, world_size, port, body, args), daemon=False)
        process.start()
        sender.close()
        pipes.append(receiver)
        processes.append(process)
    with no_survivors(processes):
        return _collect(pipes, processes, time.monotonic() + timeout, timeout)


@contextlib.contextmanager
def no_survivors(processes):
    """Kill what is left of started processes and of their children after the `with` block.

    Each must call `lead_group` first. So do they end where the test's own process is killed in the block: a shell waits
    for its end, as a rank that is stopped can do nothing itself.
    """
    groups = " ".join(f"-{process.pid} {process.pid}" for process in processes)
    guard = subprocess.Popen(
        ["sh", "-c", f"cat >/dev/null; for each in {groups}; do kill -s KILL -- $each 2>/dev/null; done"],
        stdin=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        yield
    finally:
        guard.kill()
        guard.wait()
        guard.stdin.close()
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            if process.is_alive():  # not yet the leader of its group
                process.kill()
            process.join()


def lead_group():
    """Begin a process group of which everything that this process starts is part."""
    os.setpgid(0, 0)


def _collect(pipes, processes, deadline, timeout):
    results = {}
    while len(results) < len(pipes):
        waiting = [pipe for rank, pipe in enumerate(pipes) if rank not in results]
        ready = multiprocessing.connection.wait(waiting, timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            missing = [rank for rank in range(len(pipes)) if rank not in results]
            raise RankFailure(f"ranks {missing} did not finish within {timeout} s")
        for pipe in ready:
            rank = pipes.index(pipe)
            try:
                ok, value = pipe.recv()
            except EOFError:
                processes[rank].join(5.0)
                raise RankFailure(f"rank {rank} died with exit code {processes[rank].exitcode}") from None
            if not ok:
                raise RankFailure(f"rank {rank} failed:\n{value}")
            results[rank] = value
    return [results[rank] for rank in range(len(pipes))]


def _run(sender, rank, world_size, port, body, args):
    become_rank(rank, world_size, port)
    import torch

    torch.set_num_threads(1)
    try:
        outcome = (True, body(*args))
    except BaseException:  # noqa: BLE001 - whatever ended the rank is what the test must show
        outcome = (False, traceback.format_exc())
    sender.send(outcome)
    sender.close()


def become_rank(rank, world_size, port):
    """Let this process be a rank, as a launcher would, in a process group of its own."""
    lead_group()
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_RANK": str(rank),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def free_port():
    """A port nobody listens on right now.

    It lies below those that the system gives to outgoing connections, and is drawn, so that tests at the same time
    hardly meet.
    """
    while True:
        with socket.socket() as listening, contextlib.suppress(OSError):
            port = random.SystemRandom().randrange(10000, 30000)
            listening.bind(("127.0.0.1", port))
            return port
