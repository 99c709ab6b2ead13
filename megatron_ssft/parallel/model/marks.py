"""Marks on parameters, as attributes: megatron-core reads them off, and so does our optimizer."""

from __future__ import annotations

from typing import Literal

from torch import nn

Mark = Literal[
    "sequence_parallel",  # under sequence parallelism: gradients are summed over tensor-parallel ranks
    "shared_embedding",  # held by first and last pipeline stage, in a gradient bucket of its own
    "shared",  # a copy, which the gradient norm leaves out
    "only_tag_rows",  # trains in the tags' rows only, so it must not decay either
]


def mark(parameter: nn.Parameter, name: Mark, value: bool = True) -> None:
    """Set a mark on a parameter."""
    setattr(parameter, name, value)
