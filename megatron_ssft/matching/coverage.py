"""Coverage of the learned matchings, and the forking token g* that covers most sources (equation 6).

Follows the paper's sections 2.3 and A.2; `select_forking_token` is equation 6.

A *configuration* is the set of edges (tag, source) chosen for one visit of a question. Where a trace has no source, its
slot stands in: its place, from 1, among the traces of the question as the run uses them, in the order of the data
file. Edges to sources do not depend on that order; edges to slots mean something across questions only if the file
lists the same teacher at the same place throughout.

Tags are 0-based integers. Sources are for reports: the model never sees them. Counts ignore scale, since some
assignment is the cheapest however small its margin: read them beside the matching gap in nats.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from megatron_ssft.formats.assignments import source_labels

Edge = tuple[int, str]
"""(tag, source)"""
Configuration = tuple[Edge, ...]
"""Edges, sorted; one per trace."""
Counts = dict[int, Counter[Configuration]]
"""Epoch (0-based, ascending) -> how often each configuration was chosen in it."""


class MatchedVisit(Protocol):
    """One use of one question, as far as its matching goes: a row of assignments.jsonl, for instance."""

    @property
    def epoch(self) -> int:
        """0-based."""

    @property
    def tags(self) -> Sequence[int]:
        """0-based tag of each of the M traces."""

    @property
    def sources(self) -> Sequence[str | None]:
        """Source of each trace."""


def make_configuration(tags: Sequence[int], sources: Sequence[str | None]) -> Configuration:
    """The edges of one question, sorted by tag. Permuting known sources along with their tags changes nothing."""
    assert len(tags) == len(sources), (tags, sources)
    return tuple(sorted(zip(map(int, tags), source_labels(sources))))


def count_configurations(visits: Iterable[MatchedVisit]) -> Counts:
    """How often each configuration was chosen, epoch by epoch, over the whole training."""
    counts: Counts = {}
    for visit in visits:
        counts.setdefault(visit.epoch, Counter())[make_configuration(visit.tags, visit.sources)] += 1
    return {epoch: counts[epoch] for epoch in sorted(counts)}


def complete_epochs(counts: Mapping[int, Counter[Configuration]], num_questions: int | None = None) -> list[int]:
    """Epochs in which every question was used, ascending.

    Args:
        num_questions: in the data. Where it is unknown, the fullest epochs are taken to be complete, except a single
            one with nothing after it, which may have been cut off.
    """
    sizes = {epoch: counter.total() for epoch, counter in counts.items() if counter.total() > 0}
    if not sizes:
        return []
    if num_questions is not None:
        return sorted(epoch for epoch, size in sizes.items() if size >= num_questions)
    fullest = sorted(epoch for epoch, size in sizes.items() if size == max(sizes.values()))
    return [] if fullest == [max(sizes)] else fullest


def persistent_configurations(
    counts: Mapping[int, Counter[Configuration]],
    num_questions: int | None = None,
    *,
    tolerance: float = 2.0,
    min_count: int = 1,
) -> Counter[Configuration]:
    """Omega*: the configurations still gaining mass in the last complete epoch, with their counts in it.

    A configuration gains mass if it was chosen at least `min_count` times in the last complete epoch, and its share of
    that epoch's questions is not lower than in the complete epoch before by more than `tolerance` standard deviations
    of such a difference. Without a tolerance, a configuration that has settled would be dropped as soon as one
    question of a thousand left it, that is about every second time. The deviation, sqrt(n + n_before) in counts, is
    that of independent draws; the same questions come again in every epoch, so the true one is smaller, and
    configurations are rather kept than dropped.

    Args:
        num_questions: as `complete_epochs`.
        tolerance: 0 drops whatever has fallen at all; math.inf keeps everything chosen in the last complete epoch.
        min_count: >= 1; more than 1 leaves out what few questions ended in by chance.

    Returns:
        Empty if there is no complete epoch. After only one, all of its configurations with `min_count`.
    """
    if tolerance < 0 or min_count < 1:
        raise ValueError(f"tolerance {tolerance} must not be negative, min_count {min_count} must be at least 1")
    epochs = complete_epochs(counts, num_questions)
    if not epochs:
        return Counter()
    last = counts[epochs[-1]]
    before = counts[epochs[-2]] if len(epochs) > 1 else Counter()
    # Shares of two epochs of (all but) equal size, scaled to counts in the last one.
    scale = last.total() / before.total() if before else 1.0

    def holds(chosen: int, earlier: int) -> bool:
        return earlier * scale - chosen <= tolerance * math.sqrt(chosen + earlier * scale**2)

    return Counter({c: n for c, n in last.items() if n >= min_count and holds(n, before[c])})


def learned_matchings(persistent: Mapping[Configuration, int]) -> Counter[Edge]:
    """The union of the edges of Omega*, each weighted by how often its configurations used it in the last epoch."""
    edges: Counter[Edge] = Counter()
    for configuration, count in persistent.items():
        for edge in configuration:
            edges[edge] += count
    return edges


@dataclass(frozen=True)
class TagCoverage:
    """A tag in the bipartite graph of the learned matchings."""

    tag: int
    """0-based."""
    sources: dict[str, int]
    """Source -> weight of the edge, heaviest first."""
    reason: str
    """Why it stands where it does in the ranking."""

    @property
    def degree(self) -> int:
        """Distinct sources it is matched to."""
        return len(self.sources)

    @property
    def weighted_degree(self) -> int:
        """Traces it was matched to in the last complete epoch, in configurations of Omega*."""
        return sum(self.sources.values())


def select_forking_token(edges: Mapping[Edge, int], num_tags: int) -> list[TagCoverage]:
    """The N tags from best to worst; the first is g*, the tag of equation 6.

    g* is matched to the most distinct sources; ties go to the higher weighted degree, then to the lower tag. Tags
    without an edge come last. Note what this rewards: a tag that is matched to everything.
    """
    assert all(0 <= tag < num_tags and weight > 0 for (tag, _), weight in edges.items())
    of_tag: dict[int, dict[str, int]] = {tag: {} for tag in range(num_tags)}
    for (tag, source), weight in sorted(edges.items(), key=lambda item: (-item[1], item[0])):
        of_tag[tag][source] = weight
    keys = {tag: (len(sources), sum(sources.values())) for tag, sources in of_tag.items()}
    order = sorted(of_tag, key=lambda tag: (-keys[tag][0], -keys[tag][1], tag))
    reasons = [_reason(keys[a], keys[b], b + 1) for a, b in itertools.pairwise(order)]
    first = "it is the only tag" if num_tags == 1 else _lead(keys[order[0]], keys[order[1]], order[1] + 1)
    return [TagCoverage(tag, of_tag[tag], reason) for tag, reason in zip(order, [first, *reasons])]


def _lead(first: tuple[int, int], second: tuple[int, int], name: int) -> str:
    """Why the first tag stands above the second one, `<think{name}>`. Keys are (degree, weighted degree)."""
    sources, matches = first
    if sources != second[0]:
        return f"most distinct sources: {sources:,}, <think{name}> has {second[0]:,}"
    if matches != second[1]:
        more_often = f"{matches:,} to {second[1]:,}"
        return f"as many distinct sources as <think{name}> ({sources:,}), matched more often: {more_often}"
    return f"tied with <think{name}> in distinct sources ({sources:,}) and in matches ({matches:,}), and the lower tag"


def _reason(above: tuple[int, int], below: tuple[int, int], name: int) -> str:
    """Why `<think{name}>` stands below the tag before it."""
    sources, matches = below
    if sources != above[0]:
        return f"{sources:,} distinct sources, {above[0]:,} above" if sources else "matched to nothing"
    if matches != above[1]:
        return f"as many distinct sources ({sources:,}), matched less often: {matches:,} to {above[1]:,}"
    return f"<think{name}> is tied with the tag above and the higher tag"


@dataclass(frozen=True)
class AccuracyDifference:
    """Accuracy of one tag minus that of another on the questions that both have answered."""

    value: float
    stderr: float
    """Standard error of the paired difference over questions; NaN for a single question."""
    questions: int
    p_value: float
    """Chance of a difference as large as this if the tags were equal; corrected for the number of comparisons."""

    @property
    def is_noise(self) -> bool:
        return self.p_value > 0.05


def accuracy_difference(
    first: Mapping[str, float], second: Mapping[str, float], comparisons: int = 1
) -> AccuracyDifference | None:
    """Compare two tags on their common questions; None without any.

    If the tags were equal, each question's difference would be as likely as its opposite: the p value is the share of
    random flips of the signs (1,999 of them and the real one) with a mean as far from 0. That holds for any number of
    questions: with fewer than six nothing can come out significant. Bonferroni's correction is for the choice of a
    best one among several.

    Args:
        first, second: question's id -> share of its samples that are correct.
        comparisons: how many pairs are being looked at, >= 1.
    """
    common = sorted(first.keys() & second.keys())
    if not common:
        return None
    differences = np.array([first[id] - second[id] for id in common])
    signs = np.random.Generator(np.random.Philox(key=0)).integers(0, 2, (1999, len(common)), dtype=np.int8) * 2 - 1
    flipped = np.abs([float(row @ differences) for row in signs])
    as_far = 1 + int((flipped >= abs(differences.sum()) - 1e-9).sum())
    stderr = float(differences.std(ddof=1) / math.sqrt(len(common))) if len(common) > 1 else math.nan
    return AccuracyDifference(
        float(differences.mean()), stderr, len(common), min(1.0, comparisons * as_far / (len(signs) + 1))
    )
