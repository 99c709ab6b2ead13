"""What the ranks tell each other through the store."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from threading import Barrier

import torch.distributed as dist

from megatron_ssft.parallel.watch.board import Board
from megatron_ssft.parallel.watch.judgement import Place
from tests.helpers.distributed import free_port

RANKS = 4


def boards():
    """One board a rank, each with a connection of its own; the store's process first."""
    port = free_port()
    stores = [dist.TCPStore("127.0.0.1", port, None, rank == 0, timedelta(seconds=20), False) for rank in range(RANKS)]
    found = [Board(store, rank, RANKS) for rank, store in enumerate(stores)]
    with ThreadPoolExecutor(RANKS) as ranks:
        assert list(ranks.map(lambda board: board.join(Place(host="h", pid=board.rank), {}), found)) == [""] * RANKS
    return found


def test_of_ranks_that_find_the_same_at_once_one_says_it():
    """Even in the same words; the others read whose they are."""
    for _ in range(5):
        found, together = boards(), Barrier(RANKS)

        def say(board, together=together):
            together.wait(20)
            return board.is_first_to_tell("rank 9 is gone")

        with ThreadPoolExecutor(RANKS) as ranks:
            first = list(ranks.map(say, found))
        assert sum(first) == 1
        assert {board.read([0])[1] for board in found} == {f"[rank {first.index(True)}] rank 9 is gone"}
        assert not found[0].is_first_to_tell("something else")


class Gone(dist.Store):
    """A store whose process has ended."""

    def compare_set(self, key, expected, desired):
        raise RuntimeError("Connection reset by peer")


def test_without_the_store_every_rank_may_say_it():
    assert Board(Gone(), 1, RANKS).is_first_to_tell("rank 0 is gone")
