"""Raise the probability that an answer begins with a tag, and leave the choice among the tags where it is.

With mass = sum_i exp(logp_i), the gradient of log(mass) is d log(mass) / d logp_j = pi_j: it raises the likeliest tag
most. Where nothing else speaks for a tag, it alone drives the policy into one. So another direction is taken, which
raises log(mass) as well. Of tags of one token it weights the tags' log-probabilities by

    (1 - mass) / N + exp(logp_j)

In a table of logits this raises the logits of all tags by the same (1 - mass) / N, and lowers those of all other tokens
v by p_v, as the gradient of log(mass) does. So pi stays, and along any move of all tags together the slope is that of
log(mass).

Tags of several tokens form a tree of prefixes. At prefix n let the tags go on with k of the vocabulary's tokens, of
joint probability Q_n. The same rule holds at each prefix, for the share r_n of the tags that have this prefix:

    weight of token c after n:   r_n ((1 - Q_n) / k + p(c | n))

Prefixes that all tags share have r_n = 1. What tags have to themselves, after they part, is raised at one weight for
all. There the choice moves as far as one tag's rest was less certain than another's, and no further.

A network shares weights between tags, and there the choice moves although the logits are pushed alike: on the demo's
model 60 steps without any signal took its entropy from .83 to 1.69 nats. So questions whose rewards say nothing are
held: beside the push they get `HOLD` times its weight of

    -(1 - mass) KL(pi_ref || pi),      derivative by logp_j, mass held:  (1 - mass) (pi_ref,j - pi_j)

Where pi is pi_ref this is 0. It ends with the push: once the mass is there, what the model learns of questions with
signal may carry over to the others.

Shapes: Q questions, N tags, T tokens of the longest tag. All arrays are float64, logarithms are in nats.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_ssft.objectives.formulas.forking_policy import log_policy

HOLD = 10.0
"""How much a nat of KL(pi_ref || pi) weighs beside a nat of log(mass), for questions without signal."""


def hold(logp_QN: np.ndarray, reference_logp_QN: np.ndarray, held_Q: np.ndarray) -> np.ndarray:
    """What keeps the choice of the held questions at the reference's while their mass is raised, [Q, N].

    Args:
        logp_QN: log-probability of each tag under the weights that are trained.
        reference_logp_QN: the same under the frozen weights.
        held_Q: bool; the other questions get zeros.

    Raises:
        ValueError: a value is NaN or infinite.
    """
    (log_pi_QN, log_mass_Q), (reference_QN, _) = log_policy(logp_QN), log_policy(reference_logp_QN)
    outside_Q = np.where(held_Q, np.maximum(0.0, -np.expm1(log_mass_Q)), 0.0)
    return HOLD * outside_Q[:, None] * (np.exp(reference_QN) - np.exp(log_pi_QN))


@dataclass(frozen=True)
class _Edge:
    """A token after a prefix."""

    siblings: tuple[tuple[int, int], ...]
    """(tag, place) of one copy of each token that tags have after this prefix."""
    share: float
    """Share of the tags that have this prefix."""
    copies: int
    """Tags that have this token after it: each carries an equal part of its weight."""


class TagTree:
    """The tags' tokens as a tree of prefixes."""

    def __init__(self, tag_ids: Sequence[Sequence[int]]) -> None:
        """`tag_ids`: token ids of each tag; none is the beginning of another."""
        ids = [tuple(tag) for tag in tag_ids]
        self.num_tags, self.length = len(ids), max(map(len, ids))
        self._edges: dict[tuple[int, int], _Edge] = {}
        for tag, sequence in enumerate(ids):
            for place in range(len(sequence)):
                below = [other for other, of in enumerate(ids) if of[:place] == sequence[:place]]
                firsts = {ids[other][place]: other for other in reversed(below)}
                copies = sum(ids[other][place] == sequence[place] for other in below)
                siblings = tuple((other, place) for other in firsts.values())
                self._edges[tag, place] = _Edge(siblings, len(below) / len(ids), copies)

    def push(self, logp_QNT: np.ndarray) -> np.ndarray:
        """The weights of the tags' log-probabilities, [Q, N, T]; 0 behind a tag's end.

        Args:
            logp_QNT: log-probability of each token of each tag, given what is before it; tags that share a prefix have
                copies of it.
        """
        assert logp_QNT.ndim == 3 and logp_QNT.shape[1:] == (self.num_tags, self.length), logp_QNT.shape
        p_QNT, weight_QNT = np.exp(logp_QNT), np.zeros(logp_QNT.shape)
        for (tag, place), edge in self._edges.items():
            inside_Q = sum(p_QNT[:, sibling, at] for sibling, at in edge.siblings)
            outside_Q = np.maximum(0.0, 1.0 - inside_Q)  # rounding may bring the sum above 1
            weight_Q = outside_Q / len(edge.siblings) + p_QNT[:, tag, place]
            weight_QNT[:, tag, place] = edge.share * weight_Q / edge.copies
        return weight_QNT
