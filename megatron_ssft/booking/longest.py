"""The longest sequences that fit: what a stage keeps is linear in their tokens, so two lengths tell all."""

from __future__ import annotations

from megatron_ssft.booking.memory import StageMemory, room_to_grow
from megatron_ssft.booking.simulations import run_all
from megatron_ssft.booking.slices import SliceJob
from megatron_ssft.config import SSFTConfig
from megatron_ssft.tokenizers.vocabulary import Vocabulary

SHORTEST = 64
"""Tokens of a sequence that is worth a look."""
LONGEST = 65536
"""Tokens of a sequence that is simulated: longer ones take long, and keep as much for a token."""


def longest_that_fits(
    config: SSFTConfig, nodes_of: int, vocabulary: Vocabulary, memory: StageMemory, longest: int
) -> int:
    """Tokens of a microbatch with which a stage is full, if all that it holds at once are as long.

    The lengths that are simulated lie where the answer is about to be: for short sequences the loss head, whose memory
    does not grow with them, may take more than the layers.

    Args:
        memory: of the stage, on a GPU that is known.
        longest: tokens of the microbatch that it was counted with.
    """
    parallel, model = config.run.parallel, config.run.model
    assert model.num_layers, "a configuration has its defaults filled in"
    room = room_to_grow(memory)
    guess = int(room / (memory.peak - memory.state) * longest)
    if guess < SHORTEST:
        return 0
    held = model.num_layers // parallel.pipeline_model_parallel_size * parallel.pipeline_model_parallel_size
    length = min(guess, LONGEST)
    lengths = length, length * 5 // 4
    rows = vocabulary.tags.row_ids
    cut = run_all([SliceJob(config, nodes_of, tokens, vocabulary.size, rows) for tokens in lengths])
    shorter, longer = (slices.growing.of(held) for slices in cut)
    return max(0, int(lengths[0] + (room - shorter) / (longer - shorter) * (lengths[1] - lengths[0])))
