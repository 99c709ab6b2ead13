"""GFPO beside fixed and uniform tags, its own ablations, and GRPO from mixed SFT: the demo's data, several seeds.

    python benchmarks/gfpo.py --work DIR --seeds 1 2 3 [--variants "gfpo-exact" "natural" ...] [--ablations]

Per seed: SSFT and single-target SFT on all questions; rewards of the first 256 of them, 6 tags x 2 samples (GFPO) or 12
samples (GRPO: the same number of verified completions); training; then samples on the 256 held-out questions. What a
stage has written is not made again, so the command can be stopped and started. Prints the tables of docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from megatron_ssft.cli.demo import CONSOLE, GFPO, SAMPLING, TAGS, launcher, tool, training_command  # noqa: E402
from megatron_ssft.demo.data import write_demo_data  # noqa: E402

QUESTIONS, SAMPLES_PER_TAG, HELD_OUT_SAMPLES = 256, 2, 4
PLAIN = GFPO[: GFPO.index("--entropy-coef")]
"""The demo's flags without its entropy bonus."""
NATURAL = [*PLAIN, "--policy-gradient", "natural"]
VARIANTS: dict[str, Sequence[str]] = {
    "gfpo-exact": PLAIN,
    "entropy .05": GFPO,
    "KL .02": [*PLAIN, "--kl-coef", "0.02"],
    "natural": NATURAL,
    "natural, entropy .02": [*NATURAL, "--entropy-coef", "0.02"],
    "gfpo-sampled": [*PLAIN, "--objective", "gfpo-sampled"],
    "last layer": [*PLAIN, "--trainable", "last-1"],
    "tag rows": [*PLAIN, "--trainable", "tag-rows", "--lr", "5e-3"],
    "tag rows, no anchor": [*PLAIN, "--trainable", "tag-rows", "--lr", "5e-3", "--anchor", "none"],
    "no anchor": [*PLAIN, "--anchor", "none"],
}
GRPO = ["--objective", "grpo", "--lr", "1e-3", "--questions-per-step", "64"]
GRPO_STEPS, GRPO_ROUNDS = 60, 4


class Seed:
    """The stages of one seed, each in a folder or file of its own."""

    def __init__(self, folder: Path, seed: int, nproc: int) -> None:
        self.folder, self.seed, self.nproc = folder, seed, nproc
        self.train, self.held_out = folder.parent / "data" / "train.jsonl", folder.parent / "data" / "heldout.jsonl"
        self.first = folder.parent / "data" / "first.jsonl"
        folder.mkdir(parents=True, exist_ok=True)

    def sft(self, matching: str) -> Path:
        """The run of a matching mode."""
        run = self.folder / matching
        command = training_command(self.folder, matching, self.nproc, 512, self.train, self.held_out)
        command[command.index("--seed") + 1] = str(self.seed)
        self._make(run / "iter_0000512" / "hf", command)
        return run

    def samples(self, model: Path, name: str, data: Path, *tags: object, seed: int = 1) -> Path:
        """Scored samples of an exported model, and their rewards beside them; returns the scores."""
        rollouts, scores, rewards = (self.folder / f"{name}{kind}.jsonl" for kind in ("", ".scores", ".rewards"))
        if not rewards.is_file():  # written last
            run(tool("generate", "--model", model, "--data", data, "--output", rollouts, "--tags", *tags,
                     *SAMPLING[:-1], seed))  # fmt: skip
            run(tool("score", rollouts, "--data", data, "--verifier", "exact", "--output", scores, "--rewards", rewards,
                     "--workers", 1))  # fmt: skip
        return scores

    def learn(self, start: Path, name: str, flags: Sequence[str], rewards: str) -> Path:
        """A run of policy learning from `start`; returns its exported model."""
        save = self.folder / name
        command = [*launcher(self.nproc), *CONSOLE, "gfpo", "--load", start, "--save", save,
                   "--data", self.first, "--rewards", self.folder / f"{rewards}.rewards.jsonl",
                   "--export-hf-at-save", "--seed", self.seed, *flags]  # fmt: skip
        if "--questions-per-step" not in flags:
            command += ["--eval-data", self.held_out]
        self._make(save / "finished.json", list(map(str, command)))
        return newest(save)

    def _make(self, made: Path, command: list[str]) -> None:
        if not made.exists():
            run(command)
        assert made.exists(), made


def run(command: list[str]) -> None:
    """Run a command quietly; its output is shown if it fails."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        sys.exit(f"{done.stdout}\nexit status {done.returncode}: {' '.join(command)}")


def newest(folder: Path) -> Path:
    """The newest exported model of a run."""
    return max(folder.glob("iter_*/hf"))


def gfpo(seed: Seed, names: list[str]) -> dict[str, dict]:
    """Train and evaluate every variant; returns the policy_evaluation.json of each."""
    start = seed.sft("optimal")
    each = ("each", "--samples-per-tag", HELD_OUT_SAMPLES)
    before = seed.samples(newest(start), "before", seed.held_out, *each)
    seed.samples(newest(start), "train", seed.first, "each", "--samples-per-tag", SAMPLES_PER_TAG)
    records = {}
    for name in names:
        folder = name.replace(",", "").replace(" ", "_")
        model = seed.learn(start, folder, VARIANTS[name], "train")
        after = seed.samples(model, f"{folder}.each", seed.held_out, *each)
        own = seed.samples(model, f"{folder}.own", seed.held_out, "own", "--samples", HELD_OUT_SAMPLES)
        greedy = seed.samples(model, f"{folder}.greedy", seed.held_out, "own-greedy", "--samples", HELD_OUT_SAMPLES)
        record = seed.folder / f"{folder}.evaluation"
        run(tool("evaluate-policy", "--before", before, "--after", after, "--own", own, "--own-greedy", greedy,
                 "--rewards", seed.folder / "train.rewards.jsonl", "--policy", seed.folder / folder / "policy.jsonl",
                 "--data", seed.held_out, "--group-by", "operation", "--output", record))  # fmt: skip
        records[name] = json.loads((record / "policy_evaluation.json").read_text())
    return records


def grpo(seed: Seed) -> dict[str, float]:
    """pass@1 of mixed SFT, and of GRPO from there: on one set of completions, and on sets drawn anew in rounds."""
    start, budget = seed.sft("single"), TAGS * SAMPLES_PER_TAG
    fixed = ("fixed", "--tag", 0, "--samples")
    accuracy = {
        "before": pass_at_1(seed.samples(newest(start), "mixed", seed.held_out, *fixed, TAGS * HELD_OUT_SAMPLES))
    }
    seed.samples(newest(start), "grpo0", seed.first, *fixed, budget)
    model = seed.learn(start, "grpo_run", [*GRPO, "--train-iters", str(GRPO_STEPS)], "grpo0")
    after = seed.samples(model, "grpo_run.held_out", seed.held_out, *fixed, TAGS * HELD_OUT_SAMPLES)
    accuracy["one set"] = pass_at_1(after)
    source = start
    for number in range(GRPO_ROUNDS):
        name = f"grpo_round{number}"
        seed.samples(newest(source), f"{name}.train", seed.first, *fixed, budget // GRPO_ROUNDS, seed=2 + number)
        flags = [*GRPO, "--train-iters", str(GRPO_STEPS // GRPO_ROUNDS)]
        seed.learn(source, name, flags, f"{name}.train")
        source = seed.folder / name
    after = seed.samples(newest(source), "grpo_rounds.held_out", seed.held_out, *fixed, TAGS * HELD_OUT_SAMPLES)
    accuracy[f"{GRPO_ROUNDS} rounds"] = pass_at_1(after)
    return accuracy


def pass_at_1(scores: Path) -> float:
    """Share of correct samples."""
    with open(scores, encoding="utf-8") as file:
        return statistics.fmean(json.loads(line)["correct"] for line in file)


def over_seeds(values: list[float], digits: int = 3) -> str:
    """Mean and its standard error over seeds."""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return f"{statistics.fmean(values):.{digits}f} ± {error:.{digits}f}"


def row_of(record: dict, key: str, when: str) -> float:
    return next(row[when]["value"] for row in record["rows"] if row["key"] == key)


def by_key(record: dict, what: str, key: str) -> float:
    return next(entry["value"] for entry in record[what] if entry["key"] == key)


FIGURES: dict[str, Callable[[dict], float]] = {
    "own choice, sampled": lambda r: row_of(r, "own", "after"),
    "own choice, greedy": lambda r: row_of(r, "own_greedy", "after"),
    "own choice, expected by policy.jsonl": lambda r: row_of(r, "expected", "after"),
    "best fixed tag g*, before": lambda r: row_of(r, "fixed", "before"),
    "uniform tags, before": lambda r: row_of(r, "uniform", "before"),
    "uniform tags, after": lambda r: row_of(r, "uniform", "after"),
    "best tag per operation, before": lambda r: row_of(r, "group", "before"),
    "best tag per operation, after": lambda r: row_of(r, "group", "after"),
    "own - g* before": lambda r: by_key(r, "differences", "own-fixed_before"),
    "own - uniform": lambda r: by_key(r, "differences", "own-uniform"),
    "uniform, after - before": lambda r: by_key(r, "differences", "uniform-uniform_before"),
    "recovered headroom": lambda r: by_key(r, "headroom_recovered", "group_before"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, metavar="DIR", help="where everything is kept")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--nproc", type=int, default=2, help="tensor-parallel ranks [%(default)s]")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=["gfpo-exact"], metavar="NAME",
                        help=f"of GFPO: {', '.join(VARIANTS)} [gfpo-exact]")  # fmt: skip
    parser.add_argument("--ablations", action="store_true", help="all variants of GFPO")
    parser.add_argument("--no-grpo", action="store_true", help="without the runs of GRPO")
    args = parser.parse_args()
    train, _ = write_demo_data(args.work / "data")
    with open(train, encoding="utf-8") as file:
        first = list(itertools.islice(file, QUESTIONS))
    (args.work / "data" / "first.jsonl").write_text("".join(first), encoding="utf-8")
    names = list(VARIANTS) if args.ablations else args.variants
    seeds = [Seed(args.work / f"seed_{seed}", seed, args.nproc) for seed in args.seeds]
    evaluated = [gfpo(seed, names) for seed in seeds]
    compared = [{} if args.no_grpo else grpo(seed) for seed in seeds]
    console = Console(width=120)
    table = Table("pass@1 on 256 held-out questions", *names, box=box.SIMPLE, title=f"{len(seeds)} seeds, mean ± SE")
    for title, figure in FIGURES.items():
        table.add_row(title, *(over_seeds([figure(of[name]) for of in evaluated]) for name in names))
    for key in compared[0]:
        title = "mixed SFT" if key == "before" else f"GRPO from mixed SFT, {key}"
        table.add_row(title, over_seeds([of[key] for of in compared]), *[""] * (len(names) - 1))
    console.print(table)
    figures = {name: [{t: f(of[name]) for t, f in FIGURES.items()} for of in evaluated] for name in names}
    (args.work / "gfpo.json").write_text(json.dumps({"gfpo": figures, "grpo": compared}, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
