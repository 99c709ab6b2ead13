"""Time saves with and without what guards them: hashes of every file, and the search for NaN in all that is saved.

python benchmarks/checksums.py --folder DIR          # about 1 GB at a time, on the disk of DIR

Both sides save the same state in one process, in turn. Verifying and loading are timed beside.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from unittest import mock

from harness import interleaved, ratio, report, start_trainer

from megatron_ssft.formats.manifest import FileRecord
from megatron_ssft.parallel.checkpoint import loading, run_checkpoint, writer
from megatron_ssft.parallel.checkpoint.choice import find_damage
from megatron_ssft.training.trainer import Trainer

SHAPE: dict[str, object] = {
    "num_layers": 5, "hidden_size": 1024, "ffn_hidden_size": 4096, "num_attention_heads": 8,
    "num_forking_tokens": 2, "seq_length": 64, "train_iters": 9,
}  # fmt: skip
"""84 million parameters, of 12 bytes each with the state of Adam."""


def size_only(path: Path) -> FileRecord:
    """Stand in for `record_of`, which reads the file."""
    return FileRecord(size=path.stat().st_size, sha256="0" * 64)


def save_unguarded(trainer: Trainer, run: Path) -> None:
    """Save as it would be without checksums and without the search for NaN."""
    with (
        mock.patch.object(writer, "record_of", size_only),
        mock.patch.object(run_checkpoint, "find_nonfinite", lambda engine: None),
    ):
        save(trainer, run)


def save(trainer: Trainer, run: Path) -> None:
    """Save the trainer's state."""
    run_checkpoint.save_checkpoint(trainer.engine, run, trainer.iteration, trainer.state())


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where to save; the default is the system's temporary folder")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    trainer = start_trainer(SHAPE)
    trainer.train_step()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        guarded, unguarded = Path(folder) / "guarded", Path(folder) / "unguarded"
        saves = interleaved(
            {
                "unguarded": lambda: save_unguarded(trainer, unguarded),
                "guarded": lambda: save(trainer, guarded),
            },
            args.rounds,
        )
        (checkpoint,) = guarded.glob("iter_*")
        loads = interleaved(
            {
                "verify": lambda: find_damage(checkpoint, trainer.topology, by_content=True),
                "load": lambda: loading.load_checkpoint(trainer.engine, guarded, trainer.iteration),
            },
            args.rounds,
        )
        gigabytes = sum(path.stat().st_size for path in checkpoint.iterdir()) / 1e9
    seconds = saves | loads
    rows: list[dict[str, object]] = [
        {"action": name, "fastest_s": min(times), "median_s": sorted(times)[len(times) // 2]}
        for name, times in seconds.items()
    ]
    over = ratio(saves["guarded"], saves["unguarded"])
    report(f"{gigabytes:.2f} GB: guarded / unguarded {over:.3f} (median of {args.rounds} rounds)", rows, args.json)


if __name__ == "__main__":
    main()
