"""What the demo promises of the learned choice of a tag, from policy_evaluation.json."""

from __future__ import annotations

from rich import box
from rich.table import Table

from megatron_ssft.evaluation.policy_tables import show

_ROWS = ("own", "own_greedy", "fixed", "uniform", "group")


def check_policy(record: dict[str, object]) -> list[tuple[bool, str]]:
    """What the demo promises: (met, the promise with the measured value)."""
    gain, moved = (_value(record["differences"], key) for key in ("own-fixed_before", "uniform-uniform_before"))
    recovered = _value(record["headroom_recovered"], "group_before")
    return [
        (gain >= 0.25, f"GFPO: own choice {gain:+.3f} against the best fixed tag, at least +.250"),
        (recovered >= 0.80, f"GFPO: {recovered:.0%} of the way to the best tag of each operation, at least 80%"),
        (abs(moved) <= 0.02, f"GFPO: uniform choice {moved:+.3f} against before, within .020: the modes are intact"),
    ]


def policy_table(record: dict[str, object]) -> Table:
    """Ways to choose the tag, before and after, with standard errors over the questions."""
    table = Table(title="Choosing the tag: pass@1 on held-out questions", box=box.SIMPLE_HEAD, show_edge=False)
    table.add_column("tag", no_wrap=True)
    for header in ("before GFPO", "after"):
        table.add_column(header, justify="right", no_wrap=True)
    rows = {row["key"]: row for row in record["rows"]}
    for row in (rows[key] for key in _ROWS if key in rows):
        table.add_row(row["name"], *(show(row.get(when)) for when in ("before", "after")))
    return table


def _value(entries: list[dict[str, object]], key: str) -> float:
    return next(float(entry["value"]) for entry in entries if entry["key"] == key)
