"""Which parameters train: all, the last layers, or the tags' rows of the output head alone. The rest is frozen.

Frozen parameters have neither gradient buffers nor optimizer state. The output head of an untied model is one tensor,
of which only the tags' rows are to move: the gradient of the others is taken out before anything adds it up.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from megatron_ssft.parallel.model.gpt import SetGPTModel
from megatron_ssft.parallel.model.loss_head import VocabParallelHead
from megatron_ssft.parallel.model.marks import mark


def freeze(chunks: list[SetGPTModel], num_layers: int, last_layers: int | None) -> None:
    """Leave the last layers and the final norm trainable (None: all layers and everything else), and the tags' rows.

    Called before data parallelism is wrapped around the model, which lays out buffers for what trains. With tied
    embeddings the tags' rows of the head are their input rows.
    """
    if last_layers is None:
        return
    for chunk in chunks:
        for parameter in chunk.parameters():
            parameter.requires_grad = False
        for layer in chunk.decoder.layers:
            if layer.layer_number > num_layers - last_layers:
                layer.requires_grad_(True)
        if last_layers and chunk.decoder.final_layernorm is not None:
            chunk.decoder.final_layernorm.requires_grad_(True)
        in_layers = any(parameter.requires_grad for parameter in chunk.decoder.parameters())
        chunk.needs_input_gradient = in_layers and chunk.config.recompute_granularity is not None
        _train_tag_rows(chunk)


def _train_tag_rows(chunk: SetGPTModel) -> None:
    if chunk.share_embeddings_and_output_weights:
        if chunk.forking_rows is not None:
            chunk.forking_rows.weight.requires_grad = True
    elif chunk.post_process and chunk.head.row_ids:
        weight = chunk.output_layer.weight
        weight.requires_grad = True
        mark(weight, "only_tag_rows")
        weight.register_hook(partial(_only_tag_rows, chunk.head))


def _only_tag_rows(head: VocabParallelHead, grad: Tensor) -> Tensor:
    """The gradient with all but the tags' rows set to zero."""
    head.move_to(grad.device)
    rows = head.tag_columns
    return torch.zeros_like(grad).index_copy_(0, rows, grad.index_select(0, rows))
