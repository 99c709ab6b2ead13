"""Generation with transformers' forward pass and a sampling loop of our own, on the CPU or one GPU.

The prompt of a question is computed once for all its tags and samples. Prompts of several questions go through the
model together; their keys and values are copied to one row per sample. The tags follow as a second short block; then
all rows are decoded together. Rows that are done leave the batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import psutil
import torch

from megatron_ssft.errors import UserError
from megatron_ssft.generation.backend import Until
from megatron_ssft.generation.kv_rows import KVRows
from megatron_ssft.generation.requests import FinishReason, Generated, Origin, Request, Sampling
from megatron_ssft.generation.sampling import pick, uniforms

MAX_DEFAULT_ROWS = 512
MAX_PREFILL_TOKENS = 65536
"""Prompt tokens that go through the model at once, padding included."""
DTYPES = ("float32", "bfloat16", "float16")


class _Config(Protocol):
    """The part of transformers' configuration that every model has and that is used here."""

    num_hidden_layers: int
    num_attention_heads: int
    hidden_size: int


class HFBackend:
    """Loads the model at the first request."""

    def __init__(
        self,
        folder: Path,
        sampling: Sampling,
        stop_ids: frozenset[int],
        *,
        device: str | None = None,
        dtype: str | None = None,
        batch_size: int | None = None,
        share_prompt: bool = True,
    ) -> None:
        """`batch_size`: rows decoded together; None: as many as a part of the free memory holds.

        `dtype`: one of DTYPES; None: float32 on the CPU, elsewhere the checkpoint's. Raises UserError.
        """
        self._folder, self._sampling, self._stop_ids = folder, sampling, stop_ids
        self._device = _device(device)
        self._config = _config(folder)
        self._dtype = _dtype(dtype, self._device, self._config)
        self._batch_size, self._share_prompt = batch_size, share_prompt
        self._model: torch.nn.Module | None = None

    @property
    def origin(self) -> Origin:
        """Name what shapes the samples besides the sampling settings."""
        return {"backend": "hf", "dtype": str(self._dtype).removeprefix("torch.")}

    @property
    def chunk_size(self) -> int:
        """Questions that are worth handing over together."""
        return self._batch_size or MAX_DEFAULT_ROWS

    def load(self) -> None:
        """Read the weights, once. Raises UserError."""
        self._loaded_model()

    def _loaded_model(self) -> torch.nn.Module:
        if self._model is None:
            self._model = _load_model(self._folder, self._dtype, self._device).eval()
        return self._model

    def generate(self, requests: Sequence[Request]) -> Iterator[Generated]:
        """Yield the samples in the order in which they get done. Raises UserError."""
        for batch in self._batches(requests):
            try:
                rows = self._begin(batch)
                for place, ids, reason in self._decode(rows, batch, self._sampling.temperature, None):
                    yield Generated(batch[place], tuple(ids), reason)
            except torch.OutOfMemoryError as error:
                raise self._out_of_memory(batch) from error

    def greedy(self, requests: Sequence[Request], until: Until) -> dict[str, tuple[int, ...]]:
        """Map questions to greedy tokens up to where `until` became true of them."""
        starts = {}
        for batch in self._batches(requests):
            try:
                for place, ids, _ in self._decode(self._begin(batch), batch, 0.0, until):
                    if until(ids):
                        starts[batch[place].id] = tuple(ids)
            except torch.OutOfMemoryError as error:
                raise self._out_of_memory(batch) from error
        return starts

    def _begin(self, batch: Sequence[Request]) -> KVRows:
        """Make one row per request, prompts and starts computed."""
        model = self._loaded_model()
        if not self._share_prompt:
            rows = KVRows(model, len(batch))
            rows.feed([request.prompt + request.start for request in batch])
            return rows
        prompts = list({request.id: request.prompt for request in batch}.values())
        row_of_question = {name: row for row, name in enumerate(dict.fromkeys(request.id for request in batch))}
        rows = KVRows(model, len(prompts))
        rows.feed(prompts)
        rows.select([row_of_question[request.id] for request in batch])
        rows.feed([request.start for request in batch])
        return rows

    def _decode(
        self, rows: KVRows, batch: Sequence[Request], temperature: float, until: Until | None
    ) -> Iterator[tuple[int, list[int], FinishReason]]:
        """Yield (place in `batch`, its tokens, finish reason) of each row as it gets done."""
        alive = list(range(len(batch)))
        written: list[list[int]] = [[] for _ in batch]
        seeds = np.array([request.seed for request in batch], dtype=np.uint64)
        for step in range(max(request.limit for request in batch)):
            uniform = uniforms(seeds[alive], step)
            tokens = pick(rows.logits, uniform, temperature, self._sampling.top_p, self._sampling.top_k)
            rows_left = []
            for row, (place, token) in enumerate(zip(alive, tokens.tolist())):
                ids = written[place]
                ids.append(token)
                if token in self._stop_ids:
                    yield place, ids, "stop"
                elif len(ids) == batch[place].limit or (until is not None and until(ids)):
                    yield place, ids, "length"
                else:
                    rows_left.append(row)
            if not rows_left:
                return
            if len(rows_left) < len(alive):
                alive = [alive[row] for row in rows_left]
                rows.select(rows_left)
                tokens = tokens[torch.tensor(rows_left, device=tokens.device)]
            rows.append(tokens)

    def _batches(self, requests: Sequence[Request]) -> Iterator[list[Request]]:
        """Group the requests that are decoded together: prompts of similar lengths, the longest first.

        A question is divided only if it does not fit into a batch of its own; prompts are limited in their sum too.
        """
        groups: dict[str, list[Request]] = {}
        for request in requests:
            groups.setdefault(request.id, []).append(request)
        self.load()
        size = self._batch_size or self._rows_that_fit(requests)
        batch: list[Request] = []
        prompts = 0
        for group in sorted(groups.values(), key=lambda group: len(group[0].prompt), reverse=True):
            prefill = prompts + (1 if self._share_prompt else len(group))
            too_long = batch and prefill * len(batch[0].prompt) > MAX_PREFILL_TOKENS
            if batch and (too_long or len(batch) + len(group) > size):
                yield batch
                batch, prefill = [], prefill - prompts
            while len(group) > size:
                yield group[:size]
                group = group[size:]
            batch, prompts = batch + group, prefill
        if batch:
            yield batch

    def _rows_that_fit(self, requests: Sequence[Request]) -> int:
        """Count the rows whose keys and values at full length take an eighth of the free memory.

        They are copied as they grow, so several times that is in use.
        """
        config = self._config
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        bytes_per_token = 2 * config.num_hidden_layers * heads * width * self._dtype.itemsize
        longest = max(len(request.prompt) + len(request.start) + request.limit for request in requests)
        if self._device.type == "cuda":
            free = torch.cuda.mem_get_info(self._device)[0]
        else:
            free = psutil.virtual_memory().available
        return max(1, min(MAX_DEFAULT_ROWS, int(free / 8 / (bytes_per_token * longest))))

    def _out_of_memory(self, batch: Sequence[Request]) -> UserError:
        return UserError(f"{self._device}: out of memory with {len(batch)} rows; give a smaller --batch-size")


def _load_model(folder: Path, dtype: torch.dtype, device: torch.device) -> torch.nn.Module:
    """Read the weights onto the device. Raises UserError."""
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, local_files_only=True, trust_remote_code=False
        )
        return torch.nn.Module.to(model, device)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        raise UserError(f"{folder}: cannot load the model: {_first_line(error)}") from error


def _config(folder: Path) -> _Config:
    """Read transformers' configuration of the folder. Raises UserError."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{folder}: cannot read config.json: {_first_line(error)}") from error


def _device(name: str | None) -> torch.device:
    """Raises UserError."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise UserError(f"--device {name}: torch knows no such device; give cpu or cuda") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"--device {name}: torch sees no GPU here; give cpu")
    return device


def _dtype(name: str | None, device: torch.device, config: _Config) -> torch.dtype:
    """Raises UserError."""
    if name is not None:
        if name not in DTYPES:
            raise UserError(f"--dtype {name}: choose {', '.join(DTYPES)}")
        return getattr(torch, name)
    if device.type == "cpu":
        return torch.float32
    stored = getattr(config, "dtype", None) or getattr(config, "torch_dtype", None)
    return stored if isinstance(stored, torch.dtype) else torch.float32


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
