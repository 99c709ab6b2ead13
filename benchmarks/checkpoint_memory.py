"""Host memory of saving and loading a checkpoint, one line per rank: the peak above what the run holds anyway.

torchrun --nproc-per-node 4 benchmarks/checkpoint_memory.py --tensor-model-parallel-size 2 --folder DIR

Figures are bytes per parameter of the rank's own shard of the model. Weights, gradients and optimizer state stand in
the same memory on the CPU; they are there before and after, and left out.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_ssft.cli.entry import run_command

SHAPE: dict[str, object] = {
    "num_layers": 8, "hidden_size": 1024, "ffn_hidden_size": 4096, "num_attention_heads": 8,
    "num_forking_tokens": 2, "seq_length": 64, "train_iters": 9, "global_batch_size": 4,
    "use_distributed_optimizer": True, "bf16": True,
}  # fmt: skip
"""134 million parameters."""
LOOK_SECONDS = 0.002


def resident() -> int:
    """Resident memory of this process in bytes, files that are mapped left out."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith("RssAnon")))


@contextmanager
def watched() -> Iterator[Callable[[], int]]:
    """Gives the highest resident memory inside the `with` block above that at its beginning, in bytes."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what malloc keeps for later would hide the peak
    before, highest, ended = resident(), [0], threading.Event()

    def look() -> None:
        while not ended.is_set():
            highest[0] = max(highest[0], resident() - before)
            time.sleep(LOOK_SECONDS)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield lambda: highest[0]
    finally:
        ended.set()
        thread.join()


def main() -> None:
    """Train one step, save, load, and print the peaks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where to save; the default is the system's temporary folder")
    parser.add_argument("--tensor-model-parallel-size", type=int, default=1)
    arguments = parser.parse_args()
    from megatron_ssft.config import SSFTConfig
    from megatron_ssft.config.flags import build_config
    from megatron_ssft.parallel.checkpoint import loading, run_checkpoint
    from megatron_ssft.parallel.collectives import barrier, broadcast_json, gather_json
    from megatron_ssft.parallel.topology import destroy_topology, initialize_topology
    from megatron_ssft.training.startup import complete_values
    from megatron_ssft.training.trainer import Trainer

    values: dict[str, object] = {"tensor_model_parallel_size": arguments.tensor_model_parallel_size} | SHAPE
    probe = build_config(complete_values(values | {"data_path": ["-"], "tokenizer_type": "CharTokenizer"}), SSFTConfig)
    topology = initialize_topology(probe.run)
    made = tempfile.mkdtemp(dir=arguments.folder) if topology.is_first_rank else ""
    folder = Path(broadcast_json(made, topology))
    if topology.is_first_rank:
        row = {"question": "?", "traces": [{"text": "a"}, {"text": "b"}]}
        text = "".join(json.dumps(row | {"id": str(i)}) + "\n" for i in range(64))
        (folder / "data.jsonl").write_text(text, encoding="utf-8")
    barrier(topology)
    values |= {"data_path": [str(folder / "data.jsonl")], "data_cache_path": str(folder), "seed": 1}
    trainer = Trainer(build_config(complete_values(values | {"tokenizer_type": "CharTokenizer"}), SSFTConfig), topology)
    trainer.train_step()
    parameters = trainer.engine.num_parameters
    peaks = {}
    # Once beforehand: what is allocated once for the whole process is not the save's.
    for _ in range(2):
        with watched() as peak:
            run_checkpoint.save_checkpoint(trainer.engine, folder / "run", trainer.iteration, trainer.state())
        peaks["saving"] = peak() / parameters
    for _ in range(2):
        with watched() as peak:
            run_checkpoint.begin_save(
                trainer.engine, folder / "run", trainer.iteration, trainer.state(), in_background=True
            ).finish()
        peaks["saving in the background"] = peak() / parameters
    for _ in range(2):
        with watched() as peak:
            loading.load_checkpoint(trainer.engine, folder / "run", trainer.iteration)
        peaks["loading"] = peak() / parameters
    for rank, (count, told) in enumerate(gather_json((parameters, peaks), topology)):
        if topology.is_first_rank:
            figures = ", ".join(f"{name} {bytes_:.1f}" for name, bytes_ in told.items())
            print(f"rank {rank}: shard of {count / 1e6:.1f} M parameters; peak bytes per parameter: {figures}")
    if topology.is_first_rank:
        shutil.rmtree(folder)
    destroy_topology()


if __name__ == "__main__":
    sys.exit(run_command(main))
