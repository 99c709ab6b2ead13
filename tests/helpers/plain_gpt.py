"""A GPT and ordinary SFT in plain PyTorch, written from the definitions: what the engine is measured against.

Nothing of the package is used: not its tokenizer, not its collation, not its attention. One sequence at a time, full
logits, no padding.
"""

from __future__ import annotations

import math

import torch

END_OF_TEXT, FIRST_TAG = 256, 257  # bytes come first in the character tokenizer


def encode(question, tag, trace):
    """Token ids of a whole sequence and the position of its first completion token."""
    prompt = list((question + "\n").encode())
    completion = [*trace.encode(), END_OF_TEXT]
    return prompt + [FIRST_TAG + tag] + completion, len(prompt) + 1


def rotate(x, base=10000.0):
    """Rotary position embedding of [tokens, heads, d]: channel i is paired with i + d / 2."""
    tokens, _, d = x.shape
    angle = torch.arange(tokens)[:, None] * base ** (-2 * torch.arange(d // 2) / d)[None, :]
    cos, sin = angle.cos()[:, None, :], angle.sin()[:, None, :]
    first, second = x[..., : d // 2], x[..., d // 2 :]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def rms_norm(x, weight, eps=1e-5):
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight


class PlainGPT:
    """Llama's architecture over weights named as in the engine's checkpoints: `name` or `name/layer`."""

    def __init__(self, weights, layers, heads, groups):
        self.weights = {name: torch.tensor(value, requires_grad=True) for name, value in weights.items()}
        self.layers, self.heads, self.groups = layers, heads, groups

    def logits(self, ids, vocab_size):
        """[tokens, vocab_size] for one sequence."""
        w = self.weights
        table = w["embedding.word_embeddings.weight"]
        x = table[torch.tensor(ids)]
        for i in range(self.layers):
            x = x + self.attention(x, i)
            h = rms_norm(x, w[f"decoder.layers.mlp.linear_fc1.layer_norm_weight/{i}"])
            gate, up = (h @ w[f"decoder.layers.mlp.linear_fc1.weight/{i}"].T).chunk(2, dim=-1)
            x = x + (torch.nn.functional.silu(gate) * up) @ w[f"decoder.layers.mlp.linear_fc2.weight/{i}"].T
        head = w.get("output_layer.weight", table)  # tied unless there is one
        return rms_norm(x, w["decoder.final_layernorm.weight"]) @ head[:vocab_size].T

    def attention(self, x, i):
        w = self.weights
        h = rms_norm(x, w[f"decoder.layers.self_attention.linear_qkv.layer_norm_weight/{i}"])
        qkv = h @ w[f"decoder.layers.self_attention.linear_qkv.weight/{i}"].T
        per_group = self.heads // self.groups
        qkv = qkv.view(len(x), self.groups, per_group + 2, -1)  # queries of a group, its key, its value
        q = rotate(qkv[:, :, :per_group].flatten(1, 2))
        k, v = rotate(qkv[:, :, per_group]), qkv[:, :, per_group + 1]
        future = torch.ones(len(x), len(x), dtype=torch.bool).triu(1)
        out = []
        for head in range(self.heads):
            group = head // per_group
            scores = q[:, head] @ k[:, group].T / math.sqrt(q.size(-1))
            out.append(scores.masked_fill(future, -math.inf).softmax(-1) @ v[:, group])
        return torch.cat(out, dim=-1) @ w[f"decoder.layers.self_attention.linear_proj.weight/{i}"].T

    def completion_nll(self, question, tag, trace, vocab_size):
        """[completion tokens] -log p of each, end of text included."""
        ids, start = encode(question, tag, trace)
        log_p = self.logits(ids[:-1], vocab_size).log_softmax(-1)
        return -log_p[range(start - 1, len(ids) - 1), ids[start:]]


class PlainAdamW:
    """Decoupled weight decay (Loshchilov and Hutter, 2019), matrices only, after clipping by the global norm."""

    def __init__(self, weights, decay, betas=(0.9, 0.95), eps=1e-8, clip=1.0):
        self.weights, self.decay, self.betas, self.eps, self.clip = weights, decay, betas, eps, clip
        self.state = {name: (torch.zeros_like(w), torch.zeros_like(w)) for name, w in weights.items()}
        self.t = 0

    @torch.no_grad()
    def step(self, lr):
        self.t += 1
        norm = math.sqrt(sum(float(w.grad.pow(2).sum()) for w in self.weights.values()))
        scale = min(1.0, self.clip / (norm + 1e-6))
        for name, w in self.weights.items():
            mean, square = self.state[name]
            g = w.grad * scale
            mean.mul_(self.betas[0]).add_(g, alpha=1 - self.betas[0])
            square.mul_(self.betas[1]).add_(g * g, alpha=1 - self.betas[1])
            if w.dim() > 1:
                w.mul_(1 - lr * self.decay)
            m = mean / (1 - self.betas[0] ** self.t)
            v = square / (1 - self.betas[1] ** self.t)
            w.sub_(lr * m / (v.sqrt() + self.eps))
            w.grad = None
        return norm
