"""Mistakes that a GPU would be the first to show, put into a small model's step one at a time."""

from __future__ import annotations

import contextlib

import torch
import torch.nn.functional as F

from megatron_ssft.parallel.attention.kernels import CoreAttention, VarlenAttend
from megatron_ssft.parallel.model.forking_rows import ForkingRows
from megatron_ssft.parallel.model.gpt import SetGPTModel
from megatron_ssft.parallel.model.loss_head import VocabParallelHead
from megatron_ssft.parallel.model.norm import Norm

_kept, _changed = [], []


@contextlib.contextmanager
def planted(fault):
    """The fault is there inside the `with` block. None: there is none."""
    try:
        if fault is not None:
            fault()
        yield
    finally:
        for owner, name, real in _changed:
            setattr(owner, name, real)
        _changed.clear()
        _kept.clear()


def _around(owner, name, change):
    """Let a method be `change(its function, self, *args)`."""
    real = getattr(owner, name)
    _changed.append((owner, name, real))
    setattr(owner, name, lambda self, *args, **kwargs: change(real, self, *args, **kwargs))


def index_on_the_host():
    def change(real, self, hidden, weight, targets, *rest):
        return real(self, hidden.index_select(0, torch.arange(hidden.size(0))), weight, targets, *rest)

    _around(VocabParallelHead, "nll", change)


def rows_on_the_host():
    def change(real, self, embeddings, ids):
        self.ids = torch.tensor(self.row_ids)
        return real(self, embeddings, ids)

    _around(ForkingRows, "forward", change)


def indexed_by_the_host():
    _around(Norm, "forward", lambda real, self, x: real(self, x)[torch.arange(x.size(0))])


def lookup_from_the_host():
    def change(real, self, *args):
        device, self.keys = self.keys.device, torch.arange(self.keys.numel())
        out = real(self, *args)
        assert device.type != "cpu"
        return out

    _around(VarlenAttend, "__call__", change)


def mask_on_the_host():
    def change(real, self, query, *args, **kwargs):
        return real(self, query, *args, **kwargs) * torch.ones(query.size(0), 1, 1)

    _around(CoreAttention, "forward", change)


def item_in_the_norm():
    def change(real, self, x):
        if x.abs().max().item() > 1e9:
            raise OverflowError
        return real(self, x)

    _around(Norm, "forward", change)


def truth_of_a_tensor():
    def change(real, self, x):
        assert x.isfinite().all()
        return real(self, x)

    _around(Norm, "forward", change)


def values_as_a_list():
    def change(real, self, hidden, weight, targets, *rest):
        assert len(targets.tolist()) == len(targets)
        return real(self, hidden, weight, targets, *rest)

    _around(VocabParallelHead, "nll", change)


def copied_to_the_host():
    def change(real, self, *args):
        nll = real(self, *args)
        _kept.append(nll.detach().cpu())
        return nll

    _around(VocabParallelHead, "nll", change)


def synchronized():
    def change(real, self, *args, **kwargs):
        torch.cuda.synchronize()
        return real(self, *args, **kwargs)

    _around(SetGPTModel, "forward", change)


def stream_synchronized():
    def change(real, self, *args, **kwargs):
        torch.cuda.current_stream().synchronize()
        return real(self, *args, **kwargs)

    _around(SetGPTModel, "forward", change)


def blocking_copy():
    def change(real, self, x):
        return real(self, x) + torch.zeros(x.shape[-1]).to(x.device, x.dtype)

    _around(Norm, "forward", change)


def copy_from_pageable_memory():
    def change(real, self, x):
        return real(self, x) + torch.zeros(x.shape[-1], dtype=x.dtype).to(x.device, non_blocking=True)

    _around(Norm, "forward", change)


def constant_from_the_host():
    def change(real, self, x):
        return real(self, x) * torch.tensor([1.0], device="cuda", dtype=x.dtype)

    _around(Norm, "forward", change)


def selected_by_a_mask():
    def change(real, self, x):
        return real(self, x) + x[x > 0].sum()

    _around(Norm, "forward", change)


def whole_logits():
    def change(real, self, hidden, weight, targets, *rest):
        logits = (hidden @ weight.t()).float()
        return real(self, hidden, weight, targets, *rest) + 0 * logits.logsumexp(-1)

    _around(VocabParallelHead, "nll", change)


def square_mask():
    def change(real, self, query, *args, **kwargs):
        length = query.size(0)
        _kept[:] = [torch.zeros(length, length, device=query.device)]  # until the next layer makes its own
        return real(self, query, *args, **kwargs)

    _around(CoreAttention, "forward", change)


def float32_activations():
    _around(Norm, "forward", lambda real, self, x: (F.silu(real(self, x).float()) ** 2).to(x.dtype))


def kept_alive():
    def change(real, self, *args, **kwargs):
        out = real(self, *args, **kwargs)
        _kept.append(out)
        return out

    _around(CoreAttention, "forward", change)


def input_of_the_head_kept_alive():
    def change(real, self, hidden, *rest):
        _kept.append(hidden.detach())
        return real(self, hidden, *rest)

    _around(VocabParallelHead, "nll", change)


def second_copy_of_the_weights():
    def change(real, self, *args, **kwargs):
        if not _kept:
            _kept.extend(p.detach().clone() for p in self.parameters())
        return real(self, *args, **kwargs)

    _around(SetGPTModel, "forward", change)


MIXED = (index_on_the_host, rows_on_the_host, indexed_by_the_host, lookup_from_the_host, mask_on_the_host)
"""Tensors of the host beside tensors of the GPU."""
WAITS = (
    item_in_the_norm,
    truth_of_a_tensor,
    values_as_a_list,
    copied_to_the_host,
    synchronized,
    stream_synchronized,
    blocking_copy,
    copy_from_pageable_memory,
    constant_from_the_host,
)
"""The host waits for the GPU."""
SIZES = (selected_by_a_mask,)
"""How many values there are is known only when they are there."""
MEMORY = (
    whole_logits,
    square_mask,
    float32_activations,
    kept_alive,
    input_of_the_head_kept_alive,
    second_copy_of_the_weights,
)
"""More memory than the step takes."""
