"""Starts of `train` through its own entry, several in one process, with what each printed."""

from __future__ import annotations

import json
import os

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
        words = flags(changes.pop("folder", folder), **changes)
        results[name] = start(words)
        if dist.is_initialized():
            destroy_topology()
    return results


def start_again(config, **changes):
    """(status, stdout, stderr) of `train --config FILE` with more flags; in the folder `cwd`, if given."""
    import torch.distributed as dist

    from megatron_ssft.parallel.topology import destroy_topology

    before, cwd = os.getcwd(), changes.pop("cwd", None)
    words = [] if config is None else ["--config", str(config)]
    for name, value in changes.items():
        words += ["--" + name.replace("_", "-"), *([] if value is True else [str(value)])]
    try:
        os.chdir(cwd or before)
        result = start(words)
    finally:
        os.chdir(before)
    if dist.is_initialized():
        destroy_topology()
    return result


def metrics_of(run):
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def assignments_of(run):
    """The lines of assignments.jsonl."""
    return [json.loads(line) for line in (run / "assignments.jsonl").read_text().splitlines()]
