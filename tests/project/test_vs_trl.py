"""benchmarks/vs_trl.py: both sides get the same tokens and targets in every arrangement; counts and the table."""

from __future__ import annotations

import io
import json
from collections import Counter

import numpy as np
import pytest
import vs_trl
import vs_trl_rows
from rich.console import Console

from megatron_ssft.errors import UserError
from megatron_ssft.layouts.padded import collate, loss_denominator
from megatron_ssft.records import Assignment, Microbatch, SequenceSpec, Size
from tests.layouts.test_padded import SPECIAL, TEXT, make_batch

TRL_ROWS = {name: row for name, row in (vs_trl_rows.ROWS | vs_trl_rows.MORE_ROWS).items() if row.side == "trl"}


def draw_tags(batch, tags):
    """Different tags for the traces of a question, as matching gives them."""
    rng = np.random.default_rng(0)
    return [tuple(rng.permutation(tags.num_tags)[: s.num_traces].tolist()) for s in batch.sets]


def sequences_of(batch, tags=SPECIAL):
    return vs_trl_rows.sequences_of(batch.sets, draw_tags(batch, tags), tags)


def unpacked(rows):
    """(input ids, labels) of every sequence in plain or packed rows."""
    found = Counter()
    for row in rows:
        lengths = row.get("seq_lengths", [len(row["input_ids"])])
        assert sum(lengths) == len(row["input_ids"]) == len(row["labels"])
        for end, length in zip(np.cumsum(lengths).tolist(), lengths):
            piece = slice(end - length, end)
            found[tuple(row["input_ids"][piece]), tuple(row["labels"][piece])] += 1
    return found


@pytest.mark.parametrize("tags", [SPECIAL, TEXT], ids=["special", "text"])
def test_both_sides_see_the_same_tokens_and_targets(tags):
    """Hugging Face shifts the labels by one; ours puts the target at the token before it."""
    batch = make_batch()
    tags_of = draw_tags(batch, tags)
    specs = [
        SequenceSpec(q, j, tag, len(s.prompt_ids) + len(tags.ids[tag]) + len(s.completion_ids[j]) - 1, 0)
        for q, s in enumerate(batch.sets)
        for j, tag in enumerate(tags_of[q])
    ]
    ours = collate(
        batch,
        Microbatch(tuple(specs), Size(0, 0, 0)),
        tags,
        max_completion_tokens=None,
        train_forking_token=False,
        loss_normalization="token",
        pad_to_multiple=1,
    )
    theirs = vs_trl_rows.sequences_of(batch.sets, tags_of, tags)
    assert len(theirs) == len(specs)
    for row, (spec, sequence) in enumerate(zip(specs, theirs)):
        ids, labels = sequence["input_ids"], np.array(sequence["labels"][1:])
        assert ours.tokens[row, : spec.num_tokens].tolist() == ids[:-1]
        weights = ours.weights[row, : spec.num_tokens]
        assert (weights > 0).tolist() == (labels != -100).tolist()
        assert ours.targets[row, : spec.num_tokens][weights > 0].tolist() == labels[labels != -100].tolist()
        assert not ours.weights[row, spec.num_tokens :].any()
    denominator = loss_denominator(
        batch, [Assignment(t) for t in tags_of], tags, train_forking_token=False, loss_normalization="token"
    )
    tokens = sum(len(s.prompt_ids) + len(tags.ids[t]) + len(s.completion_ids[j])
                 for s, chosen in zip(batch.sets, tags_of) for j, t in enumerate(chosen))  # fmt: skip
    assert vs_trl_rows.count(theirs) == (tokens, denominator)


@pytest.mark.parametrize("name", TRL_ROWS)
def test_every_row_trains_every_sequence_once(name):
    row = TRL_ROWS[name]
    size = row.settings.get("per_device_train_batch_size", 8)
    for seed in range(3):
        sequences = sequences_of(make_batch(seed, questions=8))
        made = vs_trl_rows.microbatches(sequences, row)
        assert unpacked(r for microbatch in made for r in microbatch) == unpacked(sequences)
        assert all(1 <= len(microbatch) <= size for microbatch in made)
        packed = [r for microbatch in made for r in microbatch]
        assert all(("seq_lengths" in r) == bool(row.settings.get("packing")) for r in packed)
        if row.streams is not None:
            assert len(packed) == min(row.streams, len(sequences))


def test_sorting_puts_like_lengths_together():
    sequences = sequences_of(make_batch(1, questions=12))
    row = vs_trl_rows.Row("trl", "", {"per_device_train_batch_size": 4}, sort=True)
    lengths = [len(r["input_ids"]) for microbatch in vs_trl_rows.microbatches(sequences, row) for r in microbatch]
    assert lengths == sorted(lengths, reverse=True)
    assert lengths != [len(s["input_ids"]) for s in sequences]


def test_packing_is_best_fit_decreasing():
    assert vs_trl_rows.pack([2, 5, 6, 3, 1], 8) == [[2, 0], [1, 3], [4]]
    assert vs_trl_rows.pack([2, 5, 6], 8) == [[2, 0], [1]]
    rng = np.random.default_rng(0)
    for _ in range(50):
        lengths = rng.integers(1, 60, rng.integers(1, 30)).tolist()
        bins = vs_trl_rows.pack(lengths, 64)
        assert sorted(i for chosen in bins for i in chosen) == list(range(len(lengths)))
        assert max(sum(lengths[i] for i in chosen) for chosen in bins) <= 64
        rows = int(rng.integers(1, 6))
        tight = vs_trl_rows.pack_into(lengths, rows)
        capacity = max(sum(lengths[i] for i in chosen) for chosen in tight)
        assert len(tight) == min(rows, len(lengths))
        smaller = range(max(max(lengths), -(-sum(lengths) // rows)), capacity)
        assert all(len(vs_trl_rows.pack(lengths, c)) > rows for c in smaller)
    with pytest.raises(UserError, match="65 tokens does not fit"):
        vs_trl_rows.pack([3, 65], 64)


def test_questions_have_the_same_number_of_different_traces():
    def line(name, *texts):
        return json.dumps({"id": name, "traces": [{"text": text} for text in texts]})

    lines = [line("a", "1", "2", "1", "3"), line("b", "1", "1", "1"), line("c", "7", "8", "9"), line("d", "1", "2")]
    chosen = vs_trl_rows.choose_questions(lines, 2, 2)
    assert [(row["id"], [t["text"] for t in row["traces"]]) for row in chosen] == [("a", ["1", "2"]), ("c", ["7", "8"])]
    with pytest.raises(UserError, match="2 questions of 3 traces, 3 are needed"):
        vs_trl_rows.choose_questions(lines, 3, 3)


def visit(seconds, loss, peak=2.0):
    return {"steps": [{"seconds": s, "cpu_seconds": 2 * s, "loss": loss} for s in seconds], "peak_gib": peak}


def test_speeds_are_medians_of_timed_steps():
    counts = [(1000, 100), (100, 40), (300, 90), (200, 20)]
    visits = [visit([1.0, 1.0, 1.0, 1.0], 2.0), visit([9.0, 2.0, 1.0, 4.0], 2.5, peak=3.0)]
    result = vs_trl.summarise(visits, counts, 1, reference=2.1)
    assert result["tokens_per_second"] == np.median([100, 300, 200, 50, 300, 50])
    assert (result["slowest"], result["fastest"]) == (50, 300)
    assert result["completion_tokens_per_second"] == np.median([40, 90, 20, 20, 90, 5])
    assert result["tokens_per_cpu_second"] == result["tokens_per_second"] / 2
    assert result["peak_gib"] == 3.0
    assert result["off"] == pytest.approx(0.4)  # the worst visit counts


def rendered(results):
    out = io.StringIO()
    Console(file=out, width=80).print(vs_trl.make_table(results, 1e-3))
    return out.getvalue().splitlines()


def test_table_compares_with_the_fastest_correct_row_of_released_trl():
    def result(row, speed, loss):
        figures = vs_trl.summarise([visit([1.0, 1.0], loss)], [(1, 1), (speed, speed // 2)], 1, reference=1.5)
        return {"about": row.about, "released_trl": row.side == "trl" and row.head == "all", **figures}

    rows = vs_trl_rows.ROWS
    speeds = {"trl-default": 1000, "trl-packing": 9000, "trl-best": 2000, "trl-patched": 3000, "ours-optimal": 12345}
    losses = {"trl-packing": 1.6}
    lines = rendered({name: result(rows[name], speed, losses.get(name, 1.5)) for name, speed in speeds.items()})
    assert max(map(len, lines)) <= 80
    assert len(lines) == 1 + len(speeds), "no line is broken"
    (packing,) = [line for line in lines if "WRONG" in line]
    assert packing.startswith("TRL, packing=True")
    assert [f"{speed / 2000:.2f}" in line.split() for line, speed in zip(lines[1:], speeds.values())] == [True] * 5
    without_trl = rendered({"ours-single": result(rows["ours-single"], 100, 1.5)})
    assert " - " in without_trl[1]


def test_command_line():
    needed = ["--model", "M", "--data", "D"]
    given = vs_trl.parse([*needed, "--set", "sequence-layout=packed", "--set", "lr=0.5", "--rows", "ours-single"])
    assert dict(given.set) == {"sequence_layout": "packed", "lr": 0.5}
    assert given.names == ["ours-single"]
    assert vs_trl.parse(needed).names == list(vs_trl_rows.ROWS)
    with pytest.raises(UserError, match="--rows: there is no nothing"):
        vs_trl.parse([*needed, "--rows", "ours-single,nothing"])


def test_missing_trl_is_one_line(monkeypatch):
    monkeypatch.setattr(vs_trl.sys, "argv", ["vs_trl.py", "--model", "M", "--data", "D"])
    monkeypatch.setattr(vs_trl.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"trl is not installed: pip install -r benchmarks/requirements\.txt"):
        vs_trl.main()
