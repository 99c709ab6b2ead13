"""Shared parts of the benchmarks: a trainer on random or real weights, interleaved timing, peak memory, tables."""

from __future__ import annotations

import ctypes
import gc
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from rich import box
from rich.console import Console
from rich.table import Table

from megatron_ssft.config import SSFTConfig
from megatron_ssft.config.flags import build_config
from megatron_ssft.objectives.set_matching import cost_matrices
from megatron_ssft.objectives.ssft import SSFT
from megatron_ssft.parallel.loss_terms import LossTerm, Prepared, weighted_nll
from megatron_ssft.parallel.topology import Topology, initialize_topology
from megatron_ssft.records import Microbatch, ModelInput, PlannedBatch, QuestionBatch, QuestionVisit, TokenizedSet
from megatron_ssft.training.startup import complete_values
from megatron_ssft.training.trainer import Trainer

SHAPES: dict[str, dict[str, object]] = {
    "toy": {
        "num_layers": 2, "hidden_size": 64, "ffn_hidden_size": 192, "num_attention_heads": 4, "vocab_size": 300,
    },
    "smollm2-135m": {
        "num_layers": 30, "hidden_size": 576, "ffn_hidden_size": 1536, "num_attention_heads": 9, "num_query_groups": 3,
        "vocab_size": 49280,
    },
    "qwen2.5-1.5b": {
        "num_layers": 28, "hidden_size": 1536, "ffn_hidden_size": 8960, "num_attention_heads": 12,
        "num_query_groups": 2, "add_qkv_bias": True, "vocab_size": 151936,
    },
    "qwen2.5-7b": {
        "num_layers": 28, "hidden_size": 3584, "ffn_hidden_size": 18944, "num_attention_heads": 28,
        "num_query_groups": 4, "add_qkv_bias": True, "untie_embeddings_and_output_weights": True, "vocab_size": 152064,
    },
    "qwen2.5-32b": {
        "num_layers": 64, "hidden_size": 5120, "ffn_hidden_size": 27648, "num_attention_heads": 40,
        "num_query_groups": 8, "add_qkv_bias": True, "untie_embeddings_and_output_weights": True, "vocab_size": 152064,
    },
}  # fmt: skip
"""Shapes of well-known models, for random weights: speed does not depend on their values."""


def start_trainer(values: dict[str, object], data: str | None = None) -> Trainer:
    """Start a trainer on a single rank, in this process; without `data` on a few rows, for made-up batches."""
    with tempfile.TemporaryDirectory() as folder:
        if data is None:
            data = str(Path(folder) / "data.jsonl")
            row = {"question": "?", "traces": [{"text": "a"}, {"text": "b"}]}
            Path(data).write_text("".join(json.dumps(row | {"id": str(i)}) + "\n" for i in range(64)))
        defaults = {"train_iters": 1, "seed": 1, "data_path": [data], "data_cache_path": folder}
        if "load" not in values:
            defaults["tokenizer_type"] = "CharTokenizer"
        config = build_config(complete_values(defaults | values), SSFTConfig)
        topology: Topology = initialize_topology(config.run)
        return Trainer(config, topology)


def objective_of(trainer: Trainer) -> SSFT:
    """The trainer's objective, which is SSFT here."""
    assert isinstance(trainer.objective, SSFT)
    return trainer.objective


def matching_costs(trainer: Trainer, planned: PlannedBatch) -> list[np.ndarray]:
    """The cost matrices of a planned cost pass."""
    return cost_matrices(planned, trainer.engine.score(planned).nll_sums())


def mean_loss(planned: PlannedBatch, denominator: float) -> LossTerm:
    """The training loss of planned sequences, divided by `denominator`."""

    def prepare(microbatch: Microbatch, model_input: ModelInput) -> Prepared:
        return model_input, (model_input.weights / np.float32(denominator),)

    return LossTerm(planned, prepare, weighted_nll)


def made_up_batch(
    rng: np.random.Generator, prompts: list[int], traces: list[list[int]], vocab_size: int
) -> QuestionBatch:
    """Make up questions of random tokens from prompt lengths, and a list of trace lengths for each."""
    sets = tuple(
        TokenizedSet(
            id=f"q{k}",
            file="made up",
            line=k + 1,
            prompt_ids=rng.integers(0, vocab_size, prompt).astype(np.int32),
            completion_ids=tuple(rng.integers(0, vocab_size, n).astype(np.int32) for n in lengths),
            sources=(None,) * len(lengths),
        )
        for k, (prompt, lengths) in enumerate(zip(prompts, traces, strict=True))
    )
    return QuestionBatch(tuple(QuestionVisit(k, 0) for k in range(len(sets))), sets)


def interleaved(actions: Mapping[str, Callable[[], object]], rounds: int, warmup: int = 1) -> dict[str, list[float]]:
    """Time every action in seconds, round by round: ABC ABC ..., so that other work on the machine hits all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    for number in range(-warmup, rounds):
        for name, action in actions.items():
            _synchronize()
            begin = time.perf_counter()
            action()
            _synchronize()
            if number >= 0:
                seconds[name].append(time.perf_counter() - begin)
    return seconds


def ratio(over: list[float], under: list[float]) -> float:
    """Median of the rounds' ratios."""
    return statistics.median(a / b for a, b in zip(over, under, strict=True))


def peak_memory(action: Callable[[], object]) -> int:
    """Measure the bytes at the peak of `action`: of the GPU, or resident memory of this process on the CPU."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        action()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()
    ctypes.CDLL(None).malloc_trim(0)  # what malloc keeps for later would hide the peak
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    action()
    status = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in status if line.startswith("VmHWM")))


def report(title: str, rows: list[dict[str, object]], path: Path | None) -> None:
    """Print rows (all with the same keys) as a table and write them as JSON."""
    table = Table(title=title, box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for key in rows[0]:
        table.add_column(key.replace("_", "\n"), justify="left" if isinstance(rows[0][key], str) else "right")
    for row in rows:
        table.add_row(*(_show(value) for value in row.values()))
    Console(width=max(80, Console().width) if sys.stdout.isatty() else 110).print(table)
    if path is not None:
        path.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def _show(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
