"""Parts of torch that the simulation is built on and that torch does not promise to keep, in one place."""

from __future__ import annotations

import torch

from megatron_ssft.errors import UserError

try:
    from torch._C._distributed_c10d import FakeWork
    from torch._functorch import config as _functorch_config
    from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensor, FakeTensorMode
    from torch.testing._internal.distributed.fake_pg import FakeStore, _create_fake_pg
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves
    from torch.utils.weak import WeakIdKeyDictionary

    may_stand_for_a_gpu = _functorch_config.patch
    graph_task = torch._C._current_graph_task_id
    choose_kernel = torch._fused_sdp_choice
    make_fake_group = _create_fake_pg
except (ImportError, AttributeError) as error:
    raise UserError(
        f"the simulated GPU does not work with torch {torch.__version__} ({error}); it was tried with torch 2.13"
    ) from error

__all__ = [
    "DynamicOutputShapeException",
    "FakeStore",
    "FakeTensor",
    "FakeTensorMode",
    "FakeWork",
    "TorchDispatchMode",
    "WeakIdKeyDictionary",
    "choose_kernel",
    "graph_task",
    "make_fake_group",
    "may_stand_for_a_gpu",
    "tree_leaves",
]
