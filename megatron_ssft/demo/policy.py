"""The demo's learned choice of a tag: a table of it, and the bars it must meet."""

from __future__ import annotations

import math

from rich import box
from rich.table import Table

from megatron_ssft.evaluation.policy_tables import show
from megatron_ssft.formats.policy_evaluation import PolicyEvaluationRecord

_ROWS = ("own", "own_greedy", "fixed", "uniform", "group")


def check_policy(record: PolicyEvaluationRecord) -> list[tuple[bool, str]]:
    """The bars of the policy: (met, the promise with the measured value). A figure that is missing meets no bar."""
    differences = {entry["key"]: entry["value"] for entry in record["differences"]}
    gain, drift = (differences.get(key, math.nan) for key in ("own-fixed_before", "uniform-uniform_before"))
    shares = {entry["key"]: entry["value"] for entry in record["headroom_recovered"] if entry["value"] is not None}
    recovered = shares.get("group_before", math.nan)
    return [
        (gain >= 0.25, f"GFPO: own choice {gain:+.3f} against the best fixed tag, at least +.250"),
        (recovered >= 0.80, f"GFPO: {recovered:.0%} of the way to the best tag of each operation, at least 80%"),
        (abs(drift) <= 0.02, f"GFPO: uniform choice {drift:+.3f} against before, within .020: the modes are intact"),
    ]


def policy_table(record: PolicyEvaluationRecord) -> Table:
    """A row per way to choose the tag, before and after, with standard errors over the questions."""
    table = Table(title="Choosing the tag: pass@1 on held-out questions", box=box.SIMPLE_HEAD, show_edge=False)
    table.add_column("tag", no_wrap=True)
    for header in ("before GFPO", "after"):
        table.add_column(header, justify="right", no_wrap=True)
    rows = {row["key"]: row for row in record["rows"]}
    for row in (rows[key] for key in _ROWS if key in rows):
        table.add_row(row["name"], show(row["before"]), show(row["after"]))
    return table
