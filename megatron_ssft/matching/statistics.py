"""Statistics of a run's matchings.

A *configuration* is the set of edges tag <-> source chosen for one visit of a question. Counts of configurations
ignore scale, since some assignment is the cheapest however small its margin: read them beside the matching gap in nats.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from megatron_ssft.formats.assignments import Visit
from megatron_ssft.matching.coverage import Configuration, count_configurations, make_configuration


def configuration(visit: Visit) -> Configuration:
    """The edges tag <-> source of one visit, sorted by tag; the order of the traces does not matter."""
    return make_configuration(visit.tags, visit.sources)


def whole_epochs(visits: Sequence[Visit]) -> list[int]:
    """Epochs with as many visits as the fullest one, ascending; counts in a part of an epoch do not compare."""
    sizes = Counter(v.epoch for v in visits)
    return sorted(epoch for epoch, size in sizes.items() if size == max(sizes.values()))


def configuration_counts(visits: Sequence[Visit]) -> dict[int, Counter[Configuration]]:
    """Epoch (ascending) -> how often each configuration was chosen in it."""
    return count_configurations(visits)


def distinct_configurations(visits: Sequence[Visit]) -> dict[int, int]:
    """Epoch (ascending) -> number of different configurations chosen in it."""
    return {epoch: len(counts) for epoch, counts in configuration_counts(visits).items()}


def tag_source_counts(
    visits: Sequence[Visit], epoch: int, num_tags: int | None = None
) -> tuple[np.ndarray, tuple[str, ...]]:
    """How often each tag got each source in `epoch`: int64 [N, sources], and the sources' names.

    Sources come in alphabetical order and are those of all epochs, so tables of different epochs line up.
    """
    names = tuple(sorted({label for v in visits for label in v.labels}))
    column = {name: k for k, name in enumerate(names)}
    rows = max((max(v.tags) + 1 for v in visits), default=0) if num_tags is None else num_tags
    counts = np.zeros((rows, len(names)), np.int64)
    for visit in visits:
        if visit.epoch == epoch:
            for tag, label in zip(visit.tags, visit.labels):
                counts[tag, column[label]] += 1
    return counts, names


def mutual_information_bits(counts: np.ndarray) -> float:
    """I(row; column) in bits of the joint frequencies `counts` [rows, columns]; NaN if there are none.

    0 when the tag says nothing about the source, at most log2(min(rows, columns)).
    """
    total = counts.sum()
    if total == 0:
        return float("nan")
    joint = counts / total
    independent = joint.sum(1, keepdims=True) * joint.sum(0, keepdims=True)
    seen = joint > 0
    return float((joint[seen] * np.log2(joint[seen] / independent[seen])).sum())
