"""FLOPs of torch's operators: matrix products and core attention, at the shapes and masks they are called with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten

Values = Callable[[Tensor], "list[int] | None"]
"""(a small tensor of whole numbers) -> its values, where the host knows them."""


def _mm(left: Tensor, right: Tensor, *_: object, **__: object) -> float:
    return 2.0 * left.size(0) * left.size(1) * right.size(1)


def _bmm(left: Tensor, right: Tensor, *_: object, **__: object) -> float:
    return 2.0 * left.size(0) * left.size(1) * left.size(2) * right.size(2)


_PRODUCTS: Mapping[Any, Callable[..., float]] = {
    aten.mm: _mm,
    aten.bmm: _bmm,
    aten.addmm: lambda bias, left, right, *_, **__: _mm(left, right),
    aten.baddbmm: lambda bias, left, right, *_, **__: _bmm(left, right),
}
_ROWS = (
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_flash_attention_for_cpu",
)
"""Kernels of F.scaled_dot_product_attention: query, key and value first, backward with the gradient before them."""
_VARLEN = "_varlen_attn"


def flops_of(func: Any, args: tuple, kwargs: Mapping[str, Any], values: Values) -> float:
    """FLOPs of one call; 0 for an operator that is no matrix product."""
    product = _PRODUCTS.get(func.overloadpacket)
    if product is not None:
        return product(*args, **kwargs)
    name = func.overloadpacket.__name__
    if name.startswith(_ROWS) or name.startswith(_VARLEN):
        is_backward = name.endswith("_backward")
        given = dict(zip((argument.name for argument in func._schema.arguments), args)) | dict(kwargs)
        pairs = _varlen_pairs(given, values) if name.startswith(_VARLEN) else _row_pairs(given)
        query = given["query"]
        heads = query.size(1)  # [T, n, d] and [b, n, s, d]
        # Scores and values are a product each; the gradient has two for each, and what it recomputes is no work.
        return (2.0 if is_backward else 1.0) * 4.0 * pairs * heads * query.size(-1)
    return 0.0


def _row_pairs(given: Mapping[str, Any]) -> int:
    """Pairs of query and key that one head computes, over all rows."""
    rows, queries, keys = given["query"].size(0), given["query"].size(2), given["key"].size(2)
    if given.get("is_causal"):
        return rows * (queries * keys - queries * (queries - 1) // 2)
    return rows * queries * keys


def _varlen_pairs(given: Mapping[str, Any], values: Values) -> int:
    queries, keys = values(given["cu_seq_q"]), values(given["cu_seq_k"])
    assert queries is not None and keys is not None, "lengths of segments come from the host"
    pairs = 0
    for start_q, end_q, start_k, end_k in zip(queries, queries[1:], keys, keys[1:]):
        q, k = end_q - start_q, end_k - start_k
        pairs += q * (k - q) + q * (q + 1) // 2  # the mask is aligned at the bottom right
    return pairs
