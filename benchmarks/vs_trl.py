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
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from rich.console import Console
from rich.table import Table

from megatron_ssft.cli.entry import run_command
from megatron_ssft.errors import UserError
from megatron_ssft.records import ForkingTokens, TokenizedSet

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
IGNORED = -100
"""Label of a token without loss, as Hugging Face has it."""
TRL_LENGTH, TRL_BATCH = 1024, 8
"""SFTConfig's default max_length and per_device_train_batch_size."""

Rows = list[dict[str, list[int]]]
"""Sequences or packed rows: `input_ids`, `labels`, and `seq_lengths` where packed."""


@dataclass(frozen=True)
class Row:
    """A line of the table: one way of training."""

    side: str
    """`ours` or `trl`."""
    about: str
    settings: dict[str, object] = field(default_factory=dict)
    """Ours: keys of the configuration. TRL: arguments of SFTConfig."""
    sort: bool = False
    """TRL: a step's sequences by length, so that its microbatches have little padding."""
    streams: int | None = None
    """TRL with packing: this many packed rows a step, of nearly equal length; None: rows of max_length."""
    head: str = "all"
    """TRL: `all` is its path on a CPU (every position goes through the output head), `scored` its path on a GPU (those
    with a label), switched on by a patch; `logits` is the loss of transformers' own Trainer instead of TRL's."""


def _trl(about: str, batch: int, head: str = "all", streams: int | None = None) -> Row:
    settings = {"per_device_train_batch_size": batch, "gradient_checkpointing": False, "packing": streams is not None}
    return Row("trl", about, settings, sort=streams is None, streams=streams, head=head)


ROWS = {
    "trl-default": Row("trl", "TRL, defaults"),
    "trl-packing": Row("trl", "TRL, packing=True", {"packing": True}),
    "trl-best": _trl("TRL, best found", 1),
    "trl-patched": _trl("TRL, patched", 2, "scored"),
    "ours-single": Row("ours", "ours, single", {"matching": "single"}),
    "ours-random": Row("ours", "ours, random", {"matching": "random"}),
    "ours-optimal": Row("ours", "ours, optimal", {"matching": "optimal"}),
}
MORE_ROWS = {
    f"trl-{layout}-{head}-{n}": _trl(
        f"TRL, {layout}, {head}, {n}", *((n, head) if layout == "padded" else (1, head, n))
    )
    for layout in ("padded", "packed")
    for head in ("all", "scored", "logits")
    for n in (1, 2, 4, 8)
} | {
    f"ours-padded-{matching}": Row("ours", f"padded, {matching}", {"matching": matching, "sequence_layout": "padded"})
    for matching in ("single", "random", "optimal")
}
"""For --rows. `best found` and `patched` are the fastest of these, by sequences a microbatch or packed rows a step."""


# -- the data ----------------------------------------------------------------------------------------------------------


def choose_questions(lines: Sequence[str], questions: int, traces: int) -> list[dict]:
    """The first `questions` questions that have `traces` different traces, cut to those. Raises UserError."""
    chosen: list[dict] = []
    for line in lines:
        row = json.loads(line)
        different = list({trace["text"]: trace for trace in row["traces"]}.values())
        if len(different) >= traces and len(chosen) < questions:
            chosen.append(row | {"traces": different[:traces]})
    if len(chosen) < questions:
        raise UserError(f"--data has {len(chosen)} questions of {traces} traces, {questions} are needed")
    return chosen


def sequences_of(sets: Sequence[TokenizedSet], tags_of: Sequence[Sequence[int]], tags: ForkingTokens) -> Rows:
    """Prompt, tag and completion of every trace; `labels` are IGNORED before the completion.

    `tags_of[q][j]` is the 0-based tag of trace j of question q.
    """
    sequences = []
    for tokenized, chosen in zip(sets, tags_of, strict=True):
        for completion, tag in zip(tokenized.completion_ids, chosen, strict=True):
            start = [*tokenized.prompt_ids.tolist(), *tags.ids[tag]]
            ids = completion.tolist()
            sequences.append({"input_ids": start + ids, "labels": [IGNORED] * len(start) + ids})
    return sequences


def count(sequences: Rows) -> tuple[int, int]:
    """(tokens, tokens with loss)."""
    tokens = sum(len(s["input_ids"]) for s in sequences)
    return tokens, sum(label != IGNORED for s in sequences for label in s["labels"])


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Positions packed into rows of at most `capacity` tokens by best fit decreasing, as TRL's `bfd` does.

    Raises UserError where one is longer than a row: TRL would cut it, and then not train the same tokens.
    """
    if max(lengths) > capacity:
        raise UserError(f"a sequence of {max(lengths)} tokens does not fit a packed row of {capacity}")
    rows: list[list[int]] = []
    room: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fitting = [r for r in range(len(rows)) if room[r] >= lengths[i]]
        if not fitting:
            rows.append([])
            room.append(capacity)
        best = min(fitting, key=lambda r: room[r], default=len(rows) - 1)
        rows[best].append(i)
        room[best] -= lengths[i]
    return rows


def pack_into(lengths: Sequence[int], rows: int) -> list[list[int]]:
    """`pack` with the least capacity that needs no more than `rows` rows; exactly so many, where there are enough."""
    capacity = max(max(lengths), -(-sum(lengths) // rows))
    while len(packed := pack(lengths, capacity)) > rows:
        capacity += 1
    while len(packed) < min(rows, len(lengths)):
        longest = max((r for r in packed if len(r) > 1), key=lambda r: sum(lengths[i] for i in r))
        packed.append([longest.pop()])
    return packed


def microbatches(sequences: Rows, row: Row) -> list[Rows]:
    """The sequences of a step as TRL's collator gets them under the settings of `row`."""
    if row.settings.get("packing"):
        lengths = [len(s["input_ids"]) for s in sequences]
        capacity = row.settings.get("max_length", TRL_LENGTH)
        packed = pack(lengths, capacity) if row.streams is None else pack_into(lengths, row.streams)
        sequences = [
            {key: [value for i in chosen for value in sequences[i][key]] for key in ("input_ids", "labels")}
            | {"seq_lengths": [lengths[i] for i in chosen]}
            for chosen in packed
        ]
    elif row.sort:
        sequences = sorted(sequences, key=lambda s: -len(s["input_ids"]))
    size = row.settings.get("per_device_train_batch_size", TRL_BATCH)
    return [sequences[k : k + size] for k in range(0, len(sequences), size)]


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
        config = build_config(complete_values(self._values(ROWS["ours-single"])))
        vocabulary = build_vocabulary(config)
        dataset = SetDataset.open(prepare_data(config, vocabulary)["train"])
        queue = build_queue(config, dataset)
        self.tags = vocabulary.tags
        self.batches = [[dataset[visit.index] for visit in queue.next_batch()] for _ in range(self.steps)]
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
        """By row, what the loss of the first step must be: transformers on the same ids, under the same tags."""
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
        return {
            "load": str(self.start),
            "data_path": [str(self.work / "data.jsonl")],
            "data_cache_path": str(self.work / "cache"),
            "num_forking_tokens": a.num_forking_tokens,
            "matching_tokens": a.matching_tokens,
            "global_batch_size": a.questions * a.traces,
            "train_iters": self.steps,
            "lr": a.lr,
            "bf16": a.dtype == "bf16",
            **OURS,
            **dict(a.set),
            **row.settings,
        }

    def _write_data(self) -> None:
        """The questions of this run, all with the same number of traces: a step is full with any of them."""
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
    parser.add_argument("--questions", type=int, default=2, help="a step")
    parser.add_argument("--traces", type=int, default=4, help="a question")
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
        f"{arguments.questions} questions x {arguments.traces} traces a step, {tokens:.0f} tokens on average, "
        f"{scored:.0f} of them with loss; {arguments.dtype}, {arguments.threads} threads, "
        f"{arguments.rounds} x {arguments.timed} steps timed",
        highlight=False,
    )
    if arguments.json is not None:
        given = {key: str(value) if isinstance(value, Path) else value for key, value in vars(arguments).items()}
        everything = {"arguments": given, "counts": bench.counts, "rows": results}
        arguments.json.write_text(json.dumps(everything, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(run_command(main))
