"""Steps of every kind of run on a simulated GPU: which ranks of which jobs, where the host may wait, peaks of memory.

python -m tests.helpers.simulated_layouts        # writes the peaks anew, for tests/parallel/simulated/peaks.json
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.helpers.paths import ROOT
from tests.helpers.simulated_steps import VALUES, simulate_ranks, write_policy, write_sets

RECORD = ROOT / "tests" / "parallel" / "simulated" / "peaks.json"
"""{job: {rank: bytes at the peak of the step, of all and by part}}"""
TP2, PP2 = {"tensor_model_parallel_size": 2}, {"pipeline_model_parallel_size": 2}
SP, VPP = TP2 | {"sequence_parallel": True}, PP2 | {"num_layers_per_virtual_pipeline_stage": 1}
DIST, FULL, BF16 = {"use_distributed_optimizer": True}, {"recompute_granularity": "full"}, {"bf16": True}
UNTIED = {"untie_embeddings_and_output_weights": True}
PADDED = {"sequence_layout": "padded", "micro_batch_size": 2}
GFPO = {"objective": "gfpo-exact", "anchor": "kl", "anchor_completions": 6}
GRPO = {"objective": "grpo", "anchor": "none"}
JOBS = {
    "ssft": (1, BF16, (0,)),
    "ssft, float32": (1, {}, (0,)),
    "ssft, recomputed": (1, BF16 | FULL, (0,)),
    "ssft, concatenated, untied": (1, BF16 | UNTIED | {"sequence_layout": "concatenated"}, (0,)),
    "ssft, padded, stages": (2, BF16 | PADDED | PP2 | FULL, (0, 1)),
    "ssft, stages, sequence parallel": (4, BF16 | PP2 | SP, (0, 3)),
    "ssft, interleaved, untied": (2, BF16 | VPP | UNTIED, (0, 1)),
    "ssft, distributed optimizer": (2, BF16 | DIST | {"overlap_grad_reduce": True}, (0, 1)),
    "gfpo": (1, BF16 | GFPO, (0,)),
    "gfpo, all of it": (8, BF16 | GFPO | PP2 | SP | FULL | DIST, (0, 7)),
    "gfpo, padded": (2, BF16 | GFPO | PADDED | TP2, (0, 1)),
    "gfpo, sampled": (2, BF16 | {"objective": "gfpo-sampled", "anchor": "none"} | PP2, (0, 1)),
    "grpo, stages, tensors": (4, BF16 | GRPO | PP2 | TP2, (0, 3)),
    "grpo, distributed optimizer": (2, BF16 | GRPO | DIST, (0, 1)),
}
"""Name -> (ranks of the job, changes, ranks that are simulated: the first and the last, where they differ)."""
LARGE_MODEL = "32b-pp4-first"
"""A row of benchmarks/simulated_step.py, recorded too."""
PLACES = {
    ("megatron_ssft/parallel/engine.py", "_forward_only"): 2,
    ("megatron_ssft/parallel/collectives.py", "sum_over_ranks"): 2,
    ("megatron_ssft/parallel/finite.py", "all_finite"): 1,
    ("megatron/core/optimizer/clip_grads.py", "get_grad_norm_fp32"): 2,
    ("megatron/core/distributed/finalize_model_grads.py", "finalize_model_grads"): 2,
}
"""Where the host waits in a step, and how often in a section at most: scores, the step's sums, the norm of the
gradient, whether the new weights are finite, and whether there are tokens to divide by (once for each chunk of the
model). None is in a layer or a microbatch."""


def waits_of(step):
    """Places where the host waits more often, or elsewhere, than a step has to."""
    return {
        f"{wait.what} at {wait.site} in {wait.site.function}, {wait.count} times"
        for section in step.sections
        for wait in section.waits
        if wait.count > PLACES.get((wait.site.file, wait.site.function), 0)
    }


def values_of(folder):
    """{job: values of the run}, with the files that they name."""
    ssft, policy = VALUES | write_sets(folder, letters=60) | {"matching": "random"}, write_policy(folder)
    runs = {}
    for name, (_, changes, _) in JOBS.items():
        runs[name] = (policy if "objective" in changes else ssft) | changes
        if "sequence_layout" in changes and "objective" in changes:
            runs[name].pop("max_tokens_per_microbatch")
    return runs


def simulate_jobs(runs, names=tuple(JOBS)):
    """{job: [step of each rank that is looked at]}, one after the other in this process."""
    told = {}
    for name in names:
        world_size, _, ranks = JOBS[name]
        told[name] = simulate_ranks([(runs[name], world_size, rank) for rank in ranks])
    return told


def simulate_large_model():
    """{part: bytes at the peak of the step} of a rank of 64 of a model with 32 billion parameters. Takes a minute."""
    script = ROOT / "benchmarks" / "simulated_step.py"
    command = [sys.executable, "-W", "ignore", str(script), "--row", LARGE_MODEL, "--sites"]
    step = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    memory = max((section["memory"] for section in step["sections"]), key=lambda each: each["peak"])
    return memory["peak_parts"] | {"all": memory["peak"]}


def peak_of(step):
    """{part: bytes at the peak of the step}, with all of them as `all`."""
    memory = max((section.memory for section in step.sections), key=lambda each: each.peak)
    return memory.peak_parts | {"all": memory.peak}


def differences(job, rank, peak, record):
    """What of a peak is off the record by more than 3% of the whole."""
    recorded = record.get(job, {}).get(str(rank), {})
    allowed = 0.03 * recorded.get("all", 0)
    return [
        f"{job}, rank {rank}: {part}: {peak.get(part, 0):,} bytes, recorded are {recorded.get(part, 0):,}"
        for part in sorted(peak | recorded)
        if abs(peak.get(part, 0) - recorded.get(part, 0)) > allowed
    ]


def main():
    with tempfile.TemporaryDirectory() as folder:
        steps = simulate_jobs(values_of(Path(folder)))
    record = {job: {str(step.rank): peak_of(step) for step in steps_of_job} for job, steps_of_job in steps.items()} | {
        LARGE_MODEL: {"0": simulate_large_model()}
    }
    RECORD.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"{RECORD.relative_to(ROOT)}: {len(record)} jobs")


if __name__ == "__main__":
    main()
