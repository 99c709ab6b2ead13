"""Policy learning: its config.yaml starts at the same weights again, and a run that goes on says what is different."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

import pytest
import yaml

from megatron_ssft.config import GFPOConfig
from megatron_ssft.config.flags import read_config_file
from megatron_ssft.errors import UserError
from megatron_ssft.parallel.topology import destroy_topology, initialize_topology
from megatron_ssft.signals import StopSignal
from megatron_ssft.training.startup import complete_policy_values
from tests.helpers.distributed import run_ranks
from tests.helpers.policy_runs import build_trainer, policy_config, run_values
from tests.helpers.starts import metrics_of

ROWS = {"sequence_layout": "padded", "micro_batch_size": 4, "train_iters": 2, "objective": "gfpo-exact"}


def tell(values):
    """What each start printed, or why it was refused."""
    run, topology = Path(values["save"]), initialize_topology(policy_config(values).run)
    config = run / "config.yaml"

    def start(given):
        with contextlib.redirect_stdout(io.StringIO()) as output:
            try:
                build_trainer(given, topology).run(StopSignal())
            except UserError as error:
                return f"refused: {error}"
        return output.getvalue()

    def again(**changes):
        recorded = read_config_file(str(config), GFPOConfig)
        if "load" in changes:  # as a flag does
            recorded = {name: value for name, value in recorded.items() if not name.startswith("origin")}
        return start(complete_policy_values(recorded | changes))

    told = {"first": start(values)}
    told["again"] = again(save=str(run.with_name("again")))
    told["shorter"] = again(load=str(run), train_iters=1)
    told["longer"] = again(load=str(run), train_iters=3, lr=1e-4)
    destroy_topology()
    return told


@pytest.mark.slow
def test_starts_of_policy_learning(models, inputs, tmp_path):
    values = run_values(models, "tied special", inputs, tmp_path / "run", **ROWS)
    (told,) = run_ranks(1, tell, values)
    source = models / "tied special 0"
    first = told["first"].splitlines()[0]
    assert first.startswith(f"weights: from the checkpoint {source}/iter_0000000 (fingerprint ")
    assert told["again"].splitlines()[0] == first
    rows = [[(r["loss"], r["kl"]) for r in metrics_of(tmp_path / run)[:2]] for run in ("run", "again")]
    assert rows[0] == rows[1] and len(rows[0]) == 2
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["origin"] == str(source)
    assert told["shorter"].startswith("refused: --train-iters 1:") and "step 2" in told["shorter"]
    lines = told["longer"].splitlines()
    assert lines[0] == f"weights: resumed from {tmp_path}/run/iter_0000002"
    assert lines[1] == "changed since step 2 was trained: --train-iters 2 -> 3, --lr 0.003 -> 0.0001"
    assert lines[2] == "learning rate of step 3: 3.000e-03 -> 1.000e-04"
