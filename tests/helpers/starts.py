"""Starts of `train` through its own entry, several in one process, with what each printed."""

from __future__ import annotations

import json

from tests.helpers.bad_input import flags, start


def data_file(path, rows):
    """Write questions as JSONL: each row is (prompt field, its value, texts or traces)."""
    lines = []
    for number, (field, value, traces) in enumerate(rows):
        whole = [trace if isinstance(trace, dict) else {"text": trace} for trace in traces]
        lines.append(json.dumps({"id": f"q{number}", field: value, "traces": whole}))
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def starts(folder, cases):
    """Name -> (status, stdout, stderr) of `flags(folder, **changes)`, one after the other; for `run_ranks`."""
    import torch.distributed as dist

    from megatron_ssft.parallel.topology import destroy_topology

    results = {}
    for name, changes in cases.items():
        changes = dict(changes)
        folder_of_case = changes.pop("folder", folder)
        results[name] = start(flags(folder_of_case, **changes))
        if dist.is_initialized():
            destroy_topology()
    return results


def metrics_of(run):
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def assignments_of(run):
    """The lines of assignments.jsonl."""
    return [json.loads(line) for line in (run / "assignments.jsonl").read_text().splitlines()]
