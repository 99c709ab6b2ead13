"""One cluster and one set of inputs for all jobs."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from tests.helpers.hf_models import random_model
from tests.helpers.teacher_sets import EXAMPLE
from tests.slurm.cluster import Cluster, missing_programs

RECIPE = {
    "tensor_model_parallel_size": 2,
    "num_forking_tokens": 4,
    "matching_tokens": 16,
    "trace_filter": "correct=true",
    "seq_length": 512,
    "max_tokens_per_microbatch": 4096,
    "global_batch_size": 8,
    "train_iters": 12,
    "lr": 1e-3,
    "lr_warmup_iters": 2,
    "save_interval": 4,
    "seed": 1,
}


@dataclass(frozen=True)
class Inputs:
    """What a job needs, all small."""

    model: Path
    data: Path
    recipe: Path
    python: Path

    def environment(self, run_dir: Path) -> dict[str, str]:
        paths = {
            "MODEL": self.model,
            "DATA": self.data,
            "RECIPE": self.recipe,
            "RUN_DIR": run_dir,
            "PYTHON": self.python,
        }
        return {name: str(path) for name, path in paths.items()}


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
    model = random_model(folder / "model", "qwen2", tied=False)
    import sys

    return Inputs(model, EXAMPLE, recipe, Path(sys.executable))
