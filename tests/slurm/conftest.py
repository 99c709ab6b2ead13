"""One cluster and one set of inputs for all jobs."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from tests.helpers.hf_models import random_model
from tests.helpers.teacher_sets import EXAMPLE
from tests.slurm.cluster import Cluster, missing_programs

STEPS = 12
SAVED_EVERY = 4
RECIPE = {
    "tensor_model_parallel_size": 2,
    "num_forking_tokens": 4,
    "matching_tokens": 16,
    "trace_filter": "correct=true",
    "seq_length": 512,
    "max_tokens_per_microbatch": 4096,
    "global_batch_size": 8,
    "train_iters": STEPS,
    "lr": 1e-3,
    "lr_warmup_iters": 2,
    "save_interval": SAVED_EVERY,
    "export_hf_at_save": True,
    "device": "cpu",
    "seed": 1,
}
ONE_NODE = ("--ntasks-per-node=2", "--cpus-per-task=1")
TWO_NODES = ("--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1")


@dataclass(frozen=True)
class Inputs:
    """What the jobs need, all small."""

    model: Path
    data: Path
    recipe: Path

    def environment(self, run_dir: Path, **further: object) -> dict[str, str]:
        """Variables of a training job; `further` ones for tests/slurm/troubled_python.py."""
        values = {
            "MODEL": self.model,
            "DATA": self.data,
            "RECIPE": self.recipe,
            "RUN_DIR": run_dir,
            "PYTHON": sys.executable,
            "OMP_NUM_THREADS": 1,
        }
        return {name: str(value) for name, value in (values | further).items()}


@pytest.fixture(scope="session")
def cluster(tmp_path_factory):
    missing = missing_programs()
    if missing:
        assert not os.environ.get("CI"), f"CI runs these tests; missing: {missing} (tests/slurm/install.sh)"
        pytest.skip(f"missing: {', '.join(missing)} (tests/slurm/install.sh)")
    with Cluster(tmp_path_factory.mktemp("cluster")) as running:
        yield running


@pytest.fixture(scope="session")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(RECIPE))
    return Inputs(random_model(folder / "model", "qwen2", tied=False), EXAMPLE, recipe)
