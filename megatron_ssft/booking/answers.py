"""What --dry-run prints of a job of a given size, and writes as JSON."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from megatron_ssft.booking.advise import Adviser, Candidate
from megatron_ssft.booking.book import book, complete
from megatron_ssft.booking.policy import book_policy
from megatron_ssft.booking.records import Booking
from megatron_ssft.booking.tables import advice_lines, booking_lines
from megatron_ssft.config import GFPOConfig, RunConfig, SSFTConfig
from megatron_ssft.config.checks import require
from megatron_ssft.config.dry_run import DryRun
from megatron_ssft.data.cache import SetDataset
from megatron_ssft.errors import UserError, reason_of
from megatron_ssft.formats.files import whole_file
from megatron_ssft.tokenizers.vocabulary import Vocabulary


def check(run: RunConfig, asked: DryRun) -> None:
    """Raise UserError for what could not be answered, before any long work."""
    if asked.gpu is not None:
        require(run.parallel.bf16, f"--gpu {asked.gpu}: is known for bfloat16 alone; give --bf16")
    if asked.json is not None:
        require(asked.json.parent.is_dir(), f"--json {asked.json}: there is no folder {asked.json.parent}")
    if asked.simulates:
        require(run.model.transformer_impl == "local", "--transformer-impl transformer_engine: cannot be simulated")


def answer(config: SSFTConfig, asked: DryRun, dataset: SetDataset, vocabulary: Vocabulary) -> list[str]:
    """The lines; nothing where nothing is asked. Raises UserError."""
    if not asked.simulates:
        return []
    if asked.advise:
        advice = Adviser(config, asked, dataset, vocabulary).advise()
        first = advice.best
        best = complete(first.booking, first.config, asked, dataset, vocabulary, first.planned)
        if asked.json is not None:
            write_json(asked.json, {"layouts": [spelled_candidate(candidate) for candidate in advice.candidates]})
        return [*advice_lines(advice), *booking_lines(best)]
    assert asked.world_size is not None
    booking = book(config, asked.world_size, asked, dataset, vocabulary)
    if asked.json is not None:
        write_json(asked.json, spelled(booking))
    return booking_lines(booking)


def answer_policy(config: GFPOConfig, asked: DryRun, vocabulary: Vocabulary) -> list[str]:
    """The lines for policy learning; nothing where nothing is asked. Raises UserError."""
    require(
        not asked.advise, "--advise: is for train; the layout of the SSFT run suits policy learning, which is lighter"
    )
    if asked.world_size is None:
        return []
    booking = book_policy(config, asked.world_size, asked, vocabulary)
    if asked.json is not None:
        write_json(asked.json, spelled(booking))
    return booking_lines(booking)


def write_json(path: Path, figures: dict[str, object]) -> None:
    """Raises UserError."""
    try:
        with whole_file(path) as file:
            json.dump(figures, file, indent=1)
            file.write("\n")
    except OSError as error:
        raise UserError(f"--json {path}: cannot be written: {reason_of(error)}") from error


def spelled(booking: Booking) -> dict[str, object]:
    """All figures, those that follow from others too."""
    figures: dict[str, object] = dataclasses.asdict(booking)
    figures["fits"] = booking.fits
    figures["memory"] = [dataclasses.asdict(memory) | {"margin": memory.margin} for memory in booking.memory]
    return figures


def spelled_candidate(candidate: Candidate) -> dict[str, object]:
    """A layout with its flags."""
    by = "simulation" if candidate.is_simulated else "formula"
    return {"flags": candidate.flags, "by": by} | spelled(candidate.booking)
