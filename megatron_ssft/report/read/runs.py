"""What the report reads off a run's metrics. The files are read by formats/run_logs.py."""

from __future__ import annotations

import numpy as np

from megatron_ssft.formats.metrics import Metrics


def gap_by_iteration(metrics: Metrics) -> tuple[np.ndarray, np.ndarray]:
    """Iterations (int64) at which the matching gap was evaluated, and the gaps in nats per question (float64).

    The matching gap is the mean cost over all assignments minus that of the optimal one (equations 3-4), averaged over
    the step's questions.
    """
    gaps = metrics["matching_gap"]
    evaluated = np.isfinite(gaps)
    return metrics["iteration"][evaluated].astype(np.int64), gaps[evaluated]


def final_mean(values: np.ndarray, last: int = 16) -> float:
    """Mean of the last `last` finite values; NaN if there are none."""
    finite = values[np.isfinite(values)]
    return float(finite[-last:].mean()) if len(finite) else float("nan")
