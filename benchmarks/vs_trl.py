"""Training speed beside TRL's SFTTrainer: same model, questions, token ids, loss and AdamW, on the CPU.

    pip install -r benchmarks/requirements.txt
    python -c "from tests.helpers.hf_models import smollm2; smollm2('SmolLM2')"       # SmolLM2-135M-Instruct, once
    python benchmarks/vs_trl.py --model SmolLM2 --data gsm8k_teachers.jsonl --json vs_trl.json

Every row trains the same first steps from the same weights, in a new process each round; rows take turns. The first
step of a process warms up and is not timed. Tokens are those of prompt, tag and completion of every sequence, without
padding, counted from the data for all rows alike. The first loss of every row is compared with transformers on one
sequence at a time. TRL runs as released, except for: CPU, float32 like ours (--dtype bf16 leaves it its default), a
constant learning rate, the order of the data, no logs, no checkpoints; ids and labels are made before.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import yaml
from rich.console import Console
from rich.table import Table
from vs_trl_rows import MORE_ROWS, ROWS, Row, Rows, choose_questions, count, microbatches, sequences_of

from megatron_ssft.cli.entry import run_command
from megatron_ssft.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
TOLERANCE = {"float32": 1e-3, "bf16": 3e-2}
OURS = {
    "seq_length": 1024,
    "micro_batch_size": 4,
    "lr_decay_style": "constant",
    "seed": 1,
    "adam_beta1": 0.9,  # TRL's defaults, as the next two
    "adam_beta2": 0.999,
    "weight_decay": 0.0,
}
"""Configuration of all our rows; --set KEY=VALUE adds to it or replaces."""


# -- the table ---------------------------------------------------------------------------------------------------------


def summarise(visits: list[dict], counts: Sequence[tuple[int, int]], warm_up: int, reference: float) -> dict:
    """The figures of a row, medians over the timed steps of all visits.

    Args:
        visits: what the row's processes measured.
        counts: (tokens, tokens with loss) of every step.
        reference: what the loss of the first step must be.
    """
    timed = [(counts[k], visit["steps"][k]) for visit in visits for k in range(warm_up, len(counts))]
    speeds = [tokens / step["seconds"] for (tokens, _), step in timed]
    return {
        "tokens_per_second": statistics.median(speeds),
        "slowest": min(speeds),
        "fastest": max(speeds),
        "completion_tokens_per_second": statistics.median(scored / step["seconds"] for (_, scored), step in timed),
        "tokens_per_cpu_second": statistics.median(tokens / step["cpu_seconds"] for (tokens, _), step in timed),
        "seconds_per_step": statistics.median(step["seconds"] for _, step in timed),
        "peak_gib": max(visit["peak_gib"] for visit in visits),
        "loss": visits[0]["steps"][0]["loss"],
        "last_loss": visits[0]["steps"][-1]["loss"],
        "reference_loss": reference,
        "off": max(abs(visit["steps"][0]["loss"] - reference) for visit in visits),
    }


def make_table(results: dict[str, dict], tolerance: float) -> Table:
    """80 columns. +-: half of what lies between the slowest and the fastest step; x TRL: speed over that of the fastest
    correct row of TRL as released; compl.: tokens with loss; /CPU s: tokens per second of computing, which other work
    on the machine disturbs less; GiB: the process's peak."""
    released = [r["tokens_per_second"] for r in results.values() if r["released_trl"] and r["off"] <= tolerance]
    table = Table(box=None, pad_edge=False)
    table.add_column("", no_wrap=True)
    for title in ("tokens/s", "+-", "x TRL", "compl./s", "/CPU s", "GiB", "1st loss", "off by"):
        table.add_column(title, justify="right", no_wrap=True)
    for result in results.values():
        speed = result["tokens_per_second"]
        table.add_row(
            result["about"],
            f"{speed:.0f}",
            f"{50 * (result['fastest'] - result['slowest']) / speed:.0f}%",
            f"{speed / max(released):.2f}" if released else "-",
            f"{result['completion_tokens_per_second']:.0f}",
            f"{result['tokens_per_cpu_second']:.0f}",
            f"{result['peak_gib']:.1f}",
            f"{result['loss']:.4f}",
            "WRONG" if result["off"] > tolerance else f"{result['off']:.0e}",
        )
    return table


# -- the run -----------------------------------------------------------------------------------------------------------


class Bench:
    """The data of every step, and the processes."""

    def __init__(self, arguments: argparse.Namespace, work: Path) -> None:
        from megatron_ssft.config import SSFTConfig
        from megatron_ssft.config.flags import build_config
        from megatron_ssft.data.cache import SetDataset
        from megatron_ssft.objectives.sets import build_queue, prepare_data
        from megatron_ssft.tokenizers.vocabulary import build_vocabulary
        from megatron_ssft.training.startup import complete_values

        self.arguments = arguments
        self.work = work
        self.steps = arguments.warm_up + arguments.timed
        self._write_data()
        self.start = self._model_with_tags()
        config = build_config(complete_values(self._values(ROWS["ours-single"])), SSFTConfig)
        vocabulary = build_vocabulary(config.run)
        dataset = SetDataset.open(Path(prepare_data(config, vocabulary)["train"]))
        queue = build_queue(config, dataset)
        self.tags = vocabulary.tags
        self.batches = []
        for _ in range(self.steps):
            visits = queue.next_batch()
            assert visits is not None, "there are as many questions as the steps need"
            self.batches.append([dataset[visit.index] for visit in visits])
        self.single = [sequences_of(sets, [[0] * s.num_traces for s in sets], self.tags) for sets in self.batches]
        self.counts = [count(sequences) for sequences in self.single]

    def visit(self, row: Row) -> dict:
        """Train a row once, in a new process."""
        if row.side == "ours":
            result = self._run({"side": "ours", "values": self._values(row)})
            seen = [step["ids"] for step in result["steps"]]
            assert seen == [[s.id for s in sets] for sets in self.batches], "the sides must train the same questions"
            return result
        settings = {"bf16": self.arguments.dtype == "bf16", "learning_rate": self.arguments.lr} | row.settings
        spec = {"side": "trl", "model": str(self.start), "output_dir": str(self.work / "trl"), "head": row.head}
        steps = [microbatches(sequences, row) for sequences in self.single]
        if len({len(step) for step in steps}) > 1:
            raise UserError(f"{row.about}: steps of unequal numbers of microbatches; choose another --questions")
        return self._run(spec | {"arguments": settings, "steps": steps})

    def references(self, visits: dict[str, list[dict]]) -> dict[str, float]:
        """Compute each row's loss of the first step with transformers, on the same ids under the same tags."""
        first = {}
        for name, (visit, *_) in visits.items():
            tags_of = visit["steps"][0].get("tags")
            first[name] = sequences_of(self.batches[0], tags_of, self.tags) if tags_of else self.single[0]
        different: list[Rows] = []
        for sequences in first.values():
            if sequences not in different:
                different.append(sequences)
        losses = self._run({"side": "reference", "model": str(self.start), "batches": different})["losses"]
        return {name: losses[different.index(sequences)] for name, sequences in first.items()}

    def _values(self, row: Row) -> dict[str, object]:
        a = self.arguments
        scored = {} if row.settings.get("matching") == "single" else {"matching_tokens": a.matching_tokens}
        return {
            "load": str(self.start),
            "data_path": [str(self.work / "data.jsonl")],
            "data_cache_path": str(self.work / "cache"),
            "num_forking_tokens": a.num_forking_tokens,
            **scored,
            "global_batch_size": a.questions * a.traces,
            "train_iters": self.steps,
            "lr": a.lr,
            "bf16": a.dtype == "bf16",
            **OURS,
            **dict(a.set),
            **row.settings,
        }

    def _write_data(self) -> None:
        """The questions of this run, all with the same number of traces: any of them fill a step."""
        a = self.arguments
        rows = choose_questions(a.data.read_text(encoding="utf-8").splitlines(), self.steps * a.questions, a.traces)
        (self.work / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    def _model_with_tags(self) -> Path:
        """The model with the tags in its vocabulary, so that both sides start from the same rows; made once."""
        folder, run = self.work / "model_with_tags", self.work / "imported"
        if not folder.is_dir():
            tags = ["--num-forking-tokens", str(self.arguments.num_forking_tokens), "--seed", "1"]
            self._call("tools/convert_hf.py", "import", self.arguments.model, run, "--no-verify", *tags)
            self._call("tools/convert_hf.py", "export", run, folder, "--no-verify")
        return folder

    def _run(self, spec: dict) -> dict:
        source, target = self.work / "spec.json", self.work / "result.json"
        source.write_text(json.dumps(spec), encoding="utf-8")
        self._call("benchmarks/vs_trl_sides.py", source, target)
        result = json.loads(target.read_text(encoding="utf-8"))
        assert result["threads"] == self.arguments.threads, "the sides must have the same number of threads"
        return result

    def _call(self, program: str, *arguments: object) -> None:
        """Run a program of the project. Raises RuntimeError with what it said if it fails."""
        environment = os.environ | {
            "OMP_NUM_THREADS": str(self.arguments.threads),
            "CUDA_VISIBLE_DEVICES": "",
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        command = [sys.executable, str(ROOT / program), *map(str, arguments)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=3600)
        if done.returncode != 0:
            raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}{done.stderr}")


def measure(bench: Bench, names: Sequence[str], console: Console) -> dict[str, dict]:
    """Every row in turn, round after round; then what their first loss must have been."""
    rows = ROWS | MORE_ROWS
    visits: dict[str, list[dict]] = {name: [] for name in names}
    for turn in range(1, bench.arguments.rounds + 1):
        for name in names:
            visits[name].append(bench.visit(rows[name]))
            seconds = ", ".join(f"{step['seconds']:.1f}" for step in visits[name][-1]["steps"])
            console.print(f"round {turn}, {name}: {seconds} s", highlight=False)
    references = bench.references(visits)
    return {
        name: {
            "about": rows[name].about,
            "released_trl": rows[name].side == "trl" and rows[name].head == "all",
            **summarise(visits[name], bench.counts, bench.arguments.warm_up, references[name]),
            "visits": visits[name],
        }
        for name in names
    }


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Model, data, and how much of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="Hugging Face folder")
    parser.add_argument("--data", type=Path, required=True, help="JSONL of questions with their traces")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything measured here")
    parser.add_argument("--rows", default=",".join(ROWS), metavar="NAMES", help=f"also: {', '.join(MORE_ROWS)}")
    parser.add_argument("--set", action="append", default=[], type=_setting, metavar="KEY=VALUE", help="for our rows")
    parser.add_argument("--dtype", choices=TOLERANCE, default="float32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--questions", type=int, default=2, help="per step")
    parser.add_argument("--traces", type=int, default=4, help="per question")
    parser.add_argument("--num-forking-tokens", type=int, default=6)
    parser.add_argument("--matching-tokens", type=int, default=128)
    parser.add_argument("--lr", type=float, default=2e-5)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--warm-up", type=int, default=1, help="steps of a process that are not timed")
    parser.add_argument("--timed", type=int, default=2, help="steps of a process that are")
    parser.add_argument("--work", type=Path, metavar="DIR", help="keep the model with tags and the data here")
    arguments = parser.parse_args(argv)
    arguments.names = arguments.rows.split(",")
    if unknown := sorted(set(arguments.names) - set(ROWS | MORE_ROWS)):
        raise UserError(f"--rows: there is no {', '.join(unknown)}")
    return arguments


def _setting(text: str) -> tuple[str, object]:
    key, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r}: expected KEY=VALUE")
    return key.replace("-", "_"), yaml.safe_load(value)


def main() -> None:
    """Measure and print."""
    arguments = parse()
    if any(name.startswith("trl") for name in arguments.names) and importlib.util.find_spec("trl") is None:
        raise UserError("trl is not installed: pip install -r benchmarks/requirements.txt")
    console = Console(width=80)
    with tempfile.TemporaryDirectory() as temporary:
        work = arguments.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        bench = Bench(arguments, work)
        results = measure(bench, arguments.names, console)
    tokens, scored = (statistics.mean(c[i] for c in bench.counts) for i in range(2))
    console.print(make_table(results, TOLERANCE[arguments.dtype]), highlight=False)
    console.print(
        f"{arguments.questions} questions x {arguments.traces} traces per step, {tokens:.0f} tokens on average, "
        f"{scored:.0f} of them with loss; {arguments.dtype}, {arguments.threads} threads, "
        f"{arguments.rounds} x {arguments.timed} steps timed",
        highlight=False,
    )
    if arguments.json is not None:
        settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(arguments).items()}
        everything = {"arguments": settings, "counts": bench.counts, "rows": results}
        arguments.json.write_text(json.dumps(everything, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(run_command(main))
