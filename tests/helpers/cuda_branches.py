"""Places in the code that do one thing on a GPU and another on the CPU, and which lines ran."""

from __future__ import annotations

import ast
import sys
from collections import defaultdict

from megatron_ssft.parallel.memory import memory_figures
from megatron_ssft.parallel.simulated.simulate import simulated_rank
from megatron_ssft.tokenizers.vocabulary import build_vocabulary
from megatron_ssft.training.rehearsal import simulate_run
from tests.helpers.paths import ROOT
from tests.helpers.simulated_steps import VALUES, config_of, write_sets

_TYPES = {"cuda", "cpu", "meta"}
_ATTRIBUTES = {"is_cuda", "is_cpu", "is_meta"}
_CALLS = {"is_gpu", "autocast_type", "sums_stay_float32", "is_bf16_supported"}


def find_branches(root):
    """{(file, function)} of the package under `root` that ask what device something is on, or whether CUDA is there."""
    found = set()
    for path in sorted((root / "megatron_ssft").rglob("*.py")):
        _walk(ast.parse(path.read_text(encoding="utf-8")), path.relative_to(root).as_posix(), "", found)
    return found


def _walk(node, file, function, found):
    for child in ast.iter_child_nodes(node):
        name = child.name if isinstance(child, ast.FunctionDef | ast.ClassDef) else None
        if _asks(child):
            found.add((file, function))
        _walk(child, file, f"{function}.{name}".strip(".") if name else function, found)


def _asks(node):
    if isinstance(node, ast.Compare):
        texts = [ast.unparse(side) for side in (node.left, *node.comparators)]
        spelled = any(text.strip("'\"") in _TYPES for text in texts)
        return spelled and any("type" in text or "device" in text or "requested" in text for text in texts)
    if isinstance(node, ast.Attribute):
        return node.attr in _ATTRIBUTES
    if isinstance(node, ast.Call):
        text = ast.unparse(node.func)
        return text.split(".")[-1] in _CALLS or text.endswith("cuda.is_available")
    return False


def executed_lines(files, folder):
    """{file: [text of each line that ran]} in a simulated step in float32, and in one in bfloat16 with a checkpoint.

    In this process; `files`: where to look.
    """
    numbers, watched = defaultdict(set), {str(ROOT / file): file for file in files}

    def line(frame, event, arg):
        if event == "line":
            numbers[frame.f_code.co_filename].add(frame.f_lineno)
        return line

    ssft = VALUES | write_sets(folder, questions=1, letters=20) | {"num_layers": 1, "global_batch_size": 4}
    sys.settrace(lambda frame, event, arg: line if frame.f_code.co_filename in watched else None)
    try:
        simulate_run(config_of(ssft), 1, 0)
        simulate_run(config_of(ssft | {"bf16": True}), 1, 0, with_checkpoint=True)
        _look_at_device(config_of(ssft))
    finally:
        sys.settrace(None)
    told = {}
    for path, file in watched.items():
        text = (ROOT / file).read_text(encoding="utf-8").splitlines()
        told[file] = [text[number - 1].strip() for number in sorted(numbers[path])]
    return told


def _look_at_device(config):
    """What the trainer asks of a rank's GPU after each step."""
    with simulated_rank(config.run, 1, 0) as simulated:
        vocabulary = build_vocabulary(config.run, config.start)
        engine = simulated.engine(vocabulary.size, vocabulary.tags.row_ids)
        engine.start()
        with engine.own_work.counting():
            pass
        assert engine.own_work.take() == 0.0
        figures = memory_figures(simulated.topology.device)
        assert figures["peak_allocated_bytes"] == simulated.gpu.memory.peak > 0
