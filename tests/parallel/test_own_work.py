"""A rank that works while the others wait is told apart from them, whatever it is that they wait in."""

from __future__ import annotations

import time

import pytest
import torch
import torch.distributed as dist

from megatron_ssft.parallel.own_work import HostMarks, OwnWork, StreamMarks
from tests.helpers.distributed import run_ranks

CPU = torch.device("cpu")


def _waits():
    ones, later = torch.ones(4), dist.new_group([0, 1])

    def send_and_receive():
        if dist.get_rank() == 0:
            dist.recv(ones, 1)
        else:
            dist.send(ones, 0)

    def both_ways():
        other = 1 - dist.get_rank()
        operations = [dist.P2POp(dist.irecv, torch.ones(4), other), dist.P2POp(dist.isend, ones, other)]
        for request in dist.batch_isend_irecv(operations):
            request.wait()

    return {
        "all-reduce": lambda: dist.all_reduce(ones),
        "in the background": lambda: dist.all_reduce(ones, async_op=True).wait(),
        "of a group made later": lambda: dist.all_reduce(ones, group=later),
        "broadcast": lambda: dist.broadcast(ones, 1),
        "all-gather": lambda: dist.all_gather_into_tensor(torch.ones(8), ones),
        "reduce-scatter": lambda: dist.reduce_scatter_tensor(torch.ones(2), ones),
        "barrier": dist.barrier,
        "at a pipeline's border": both_ways,
        "receiving": send_and_receive,
    }


def _work_of_both():
    dist.init_process_group("gloo")
    seconds = {}
    for name, wait in _waits().items():
        own = OwnWork(CPU)
        own.start()
        dist.barrier()
        with own.counting():
            time.sleep(0.3 if dist.get_rank() == 1 else 0.0)
            wait()
        time.sleep(0.1)  # outside
        seconds[name] = own.take()
        assert own.collectives > 0 and own.take() == 0.0
    dist.destroy_process_group()
    return seconds


def test_waiting_in_a_collective_is_no_work():
    waiting, working = run_ranks(2, _work_of_both)
    for name, seconds in working.items():
        assert 0.3 <= seconds < 0.4, name
        assert waiting[name] < 0.15, name


class Event:
    """A CUDA event on a stream that is simulated."""

    stream = 0.0
    made = 0

    def __init__(self):
        Event.made += 1
        self.at = None

    def record(self):
        self.at = Event.stream

    def synchronize(self):
        assert self.at is not None

    def elapsed_time(self, end):
        return 1e3 * (end.at - self.at)


def test_on_a_gpu_the_stream_is_measured():
    """Events used again in the next step; a stream that stands still for a collective is no work."""
    Event.stream, Event.made = 0.0, 0
    own = OwnWork(CPU, StreamMarks(Event))
    with own.counting():
        pass
    assert Event.made == 0  # nothing is kept before the start
    own.start()

    def collective():
        Event.stream += 5.0

    for _ in range(3):
        for _ in range(2):
            with own.counting():
                Event.stream += 2.0
                own.timed(collective)
                Event.stream += 1.0
                own.timed(collective)
            Event.stream += 100.0
        assert own.take() == pytest.approx(6.0)
        assert own.take() == 0.0
    assert Event.made == 2 * (2 + 4)


def test_marks_of_the_host():
    marks = HostMarks()
    begin = marks.mark()
    time.sleep(0.01)
    assert 0.01 <= marks.seconds([(begin, marks.mark())]) < 1.0
