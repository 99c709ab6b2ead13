"""Run all measurements on one CUDA GPU, in under eight minutes: kernels, cost pass, layouts, matching overhead, MFU.

python benchmarks/gpu.py                                # Qwen2.5-1.5B's shape, random weights, bf16
python benchmarks/gpu.py --shape qwen2.5-7b --layers 14 # whole it takes 18 bytes per parameter, 137 GB, and activations
python benchmarks/gpu.py --rehearse                     # a toy, on any machine: does the code run?

TransformerEngine and flash-attn are compared where they are installed; neither is needed.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import layouts
import matching_overhead
import numpy as np
import torch
from harness import (
    SHAPES,
    interleaved,
    made_up_batch,
    matching_costs,
    mean_loss,
    peak_memory,
    ratio,
    report,
    start_trainer,
)

from megatron_ssft.errors import UserError
from megatron_ssft.layouts.cut import cut_microbatch
from megatron_ssft.parallel.attention.choice import AttentionBackend, choose_backend
from megatron_ssft.parallel.attention.kernels import VARLEN_KERNELS, Attend
from megatron_ssft.parallel.topology import job_peak_flops
from megatron_ssft.records import Assignment
from megatron_ssft.training.trainer import Trainer

LAST_START = 360
"""Seconds after which no further part is begun, so that the whole ends within eight minutes."""


def available_backends(trainer: Trainer) -> dict[str, AttentionBackend]:
    """Find every kernel that works here, and print a line for those that do not."""
    model = trainer.config.run.model
    backends = {}
    for name in (*VARLEN_KERNELS, "sdpa"):
        try:
            backends[name] = choose_backend(
                name,
                model.num_attention_heads,
                model.num_query_groups,
                model.kv_channels,
                torch.bfloat16 if trainer.config.run.parallel.bf16 else torch.float32,
                trainer.topology.device,
            )
        except UserError as error:
            print(error)
    return backends


def kernels(trainer: Trainer, args: argparse.Namespace) -> list[dict[str, object]]:
    """Time attention alone, forward and backward, on a training stream and on a stream of the cost pass."""
    model, tags = trainer.config.run.model, trainer.vocabulary.tags
    device, backends = trainer.topology.device, available_backends(trainer)
    rng = np.random.default_rng(0)
    batch = made_up_batch(rng, [args.prompt] * args.questions, [[args.trace_tokens] * 4] * args.questions, 256)
    planner = layouts.planner_for(trainer, "packed", args.tokens)
    assignments = [Assignment((0, 1, 2, 3))] * args.questions
    streams = {
        "training": planner.plan_sequences(batch, assignments, tags),
        "cost pass": planner.plan_costs(batch, tags, args.matching_tokens[-1]),
    }
    rows = []
    for kind, planned in streams.items():
        stream = cut_microbatch(planned, planned.plan.ranks[0][0], pad_to_multiple=1)
        assert stream.segments is not None, "a packed layout has segments"
        length = stream.tokens.size
        heads = (model.num_attention_heads, model.num_query_groups, model.num_query_groups)
        dtype = next(iter(backends.values())).dtype
        inputs = [torch.randn(length, h, model.kv_channels, device=device, dtype=dtype).requires_grad_() for h in heads]
        actions = {}
        for name, backend in backends.items():
            attend = backend.stream(stream.segments, length).attend
            actions[name] = functools.partial(_forward_and_backward, attend, inputs)
        seconds = interleaved(actions, args.rounds, warmup=2)
        pairs = sum(s.pairs for s in stream.segments)
        flops = 3 * 4 * pairs * model.num_attention_heads * model.kv_channels
        rows += [
            {
                "stream": kind,
                "kernel": name,
                "tokens": length,
                "segments": len(stream.segments),
                "ms": 1e3 * statistics.median(seconds[name]),
                "over_sdpa": ratio(seconds[name], seconds["sdpa"]),
                "TFLOP/s": flops / statistics.median(seconds[name]) / 1e12,
            }
            for name in actions
        ]
    return rows


def _forward_and_backward(attend: Attend, inputs: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    query, key, value = inputs
    return torch.autograd.grad(attend(query, key, value, None).float().sum(), inputs)


def utilisation(trainer: Trainer, args: argparse.Namespace) -> list[dict[str, object]]:
    """Time whole optimizer steps on traces of several lengths: tokens per second and model FLOPs utilisation."""
    peak = job_peak_flops(trainer.config.run, trainer.topology)
    rows = []
    for mean in (args.trace_tokens // 4, args.trace_tokens, 4 * args.trace_tokens):
        rng = np.random.default_rng(mean)
        lengths = rng.integers(mean // 2, mean + mean // 2, (args.questions, 4)).tolist()
        batch = made_up_batch(rng, [args.prompt] * args.questions, lengths, 256)
        assignments = [Assignment((0, 1, 2, 3))] * args.questions
        planner, cut = layouts.planner_for(trainer, "packed", args.tokens), args.matching_tokens[-1]
        planned = planner.plan_sequences(batch, assignments, trainer.vocabulary.tags)
        costs, plan = planner.plan_costs(batch, trainer.vocabulary.tags, cut), planned.plan
        measured = interleaved(
            {
                "step": functools.partial(trainer.engine.train, [mean_loss(planned, 1000.0)], lr=0.0),
                "costs": functools.partial(matching_costs, trainer, costs),
            },
            args.rounds,
        )
        seconds, cost_seconds = measured["step"], measured["costs"]
        flops = trainer.accountant.training(plan)
        cost_flops = trainer.accountant.forward(costs.plan)
        rows.append(
            {
                "mean_trace": mean,
                "stream_tokens": plan.size.tokens,
                "seconds": statistics.median(seconds),
                "tokens/s": sum(s.num_tokens for s in plan.sequences) / statistics.median(seconds),
                "TFLOP/s": flops / statistics.median(seconds) / 1e12,
                "MFU": peak and flops / statistics.median(seconds) / peak,
                "cost_pass_s": statistics.median(cost_seconds),
                "cost_pass_MFU": peak and cost_flops / statistics.median(cost_seconds) / peak,
                "matching_over_training": statistics.median(cost_seconds) / statistics.median(seconds),
                "FLOP_ratio": cost_flops / flops,
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="qwen2.5-1.5b")
    parser.add_argument("--layers", type=int, help="fewer layers of that shape")
    parser.add_argument("--rehearse", action="store_true", help="run a toy in a few seconds, without a GPU as well")
    parser.add_argument("--tokens", type=int, default=16384, help="tokens in a microbatch [%(default)s]")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="folder for the figures")
    args = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    if not on_gpu and not args.rehearse:
        parser.error("needs a CUDA GPU; --rehearse runs a toy anywhere")
    scale = 1 if not args.rehearse else 32
    args.shape = "toy" if args.rehearse else args.shape
    args.tokens //= scale
    shared = {"prompt": 512 // scale, "questions": 4, "traces": 4, "trace_tokens": 2048 // scale}
    args = argparse.Namespace(**vars(args) | shared | {"matching_tokens": [1024 // scale], "data": None})
    trainer = start_trainer(
        SHAPES[args.shape]
        | ({"num_layers": args.layers} if args.layers else {})
        | {
            "bf16": on_gpu,
            "recompute_granularity": "full",
            "seq_length": args.tokens,
            "matching_tokens": args.matching_tokens[-1],
        }
    )
    begin = time.monotonic()

    def write(title: str, name: str, measure: Callable[[], list[dict[str, object]]]) -> None:
        if time.monotonic() - begin > LAST_START:
            print(f"{title}: left out, {LAST_START} s are over")
            return
        report(title, measure(), args.json and args.json / f"{name}.json")
        print(f"{time.monotonic() - begin:.0f} s so far\n", flush=True)

    if args.json:
        args.json.mkdir(parents=True, exist_ok=True)
    where = torch.cuda.get_device_name() if on_gpu else "CPU"
    print(f"{args.shape} on {where}, torch {torch.__version__}, streams through {trainer.engine.attention}")
    write("Attention kernels, forward and backward", "kernels", lambda: kernels(trainer, args))
    prompts, cut = (256 // scale, 1024 // scale), args.matching_tokens[-1]
    write(
        "Cost pass, 6 tags x 4 traces per question",
        "cost_pass",
        lambda: [layouts.cost_pass(trainer, prompt, cut, args) for prompt in prompts],
    )
    write("Training step by layout", "layouts", lambda: layouts.training(trainer, args))
    write("Optimizer steps", "utilisation", lambda: utilisation(trainer, args))
    args.seq_length = args.tokens
    write("A step with and without matching", "matching_overhead", lambda: matching_overhead.run(trainer, args))
    peak = peak_memory(lambda: None)
    print(f"memory held between steps: {peak / 2**30:.1f} GiB")


if __name__ == "__main__":
    main()
