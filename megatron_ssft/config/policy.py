"""Learning which tag to choose: GFPO, and GRPO to compare with."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from megatron_ssft.config.checks import choice, derived, only_where, positive, require, required
from megatron_ssft.config.fields import PathText

OBJECTIVES = ("gfpo-exact", "gfpo-sampled", "grpo")
_OF_SAMPLES = ("gfpo-sampled", "grpo")


@dataclass
class PolicyConfig:
    """What the policy is rewarded for, what keeps it near the model it came from, and which weights move."""

    data: PathText = required()
    """JSONL file of questions, as for megatron-ssft generate; those without a line in --rewards are left out."""
    eval_data: PathText | None = None
    """Held-out questions whose tag probabilities are written to policy.jsonl too."""
    rewards: PathText | None = None
    """Counts of right answers for every question and tag, from megatron-ssft score --rewards."""
    rollouts: PathText | None = None
    """Stored completions, from megatron-ssft generate; default: the file that --rewards names."""
    scores: PathText | None = None
    """Scored completions, from megatron-ssft score (grpo only); default: the file that --rewards names."""
    reference: PathText | None = None
    """Run whose weights are the reference of KL and anchor; default: --load."""
    objective: str = "gfpo-exact"
    """gfpo-exact (expected policy gradient over all tags, from their mean rewards), gfpo-sampled (GRPO at the forking
    token, on tags drawn from the policy) or grpo (GRPO on every token of stored completions)."""
    policy_gradient: str | None = None
    """plain (the derivative, which dies as the policy becomes certain) or natural (through the inverse Fisher matrix of
    the N tags: mirror descent) (gfpo-exact); default plain."""
    questions_per_step: int = 256
    """Questions in an optimizer step; never more than there are. Those whose tags all have one reward only help to
    raise the tags' joint probability (gfpo)."""
    group_normalization: bool = derived()
    """Divide advantages by the standard deviation of a question's rewards; default: with gfpo-sampled and grpo."""
    kl_coef: float = 0.0
    """Weight of the KL divergence from the reference: exact over the tags (gfpo), estimated token by token (grpo)."""
    entropy_coef: float = 0.0
    """Weight of the entropy of the tag distribution, which is rewarded (gfpo)."""
    outside_mass_coef: float | None = None
    """Weight of -log(probability of all tags together), which is penalised without a say in the choice among them
    (gfpo); default 0.1."""
    clip_eps: float | None = None
    """Ratios of probabilities are clipped at 1 - this (gfpo-sampled, grpo); default 0.2."""
    clip_eps_high: float | None = None
    """Ratios of probabilities are clipped at 1 + this (gfpo-sampled, grpo); default: as --clip-eps."""
    samples_per_question: int | None = None
    """Tags drawn per question (gfpo-sampled); default 16."""
    policy_epochs: int | None = None
    """Steps on one set of drawn tags (gfpo-sampled); default 4."""
    token_normalization: str | None = None
    """What a step's tokens are averaged over (grpo): token (all tokens alike) or sequence (the mean of each
    completion's mean); default token."""
    trainable: str = "all"
    """all, last-K (K last layers, final norm and the tags' rows of the output head) or tag-rows (these rows alone;
    special tags only)."""
    anchor: str = derived()
    """kl (token-level KL to the reference on stored completions keeps what follows a tag as it is) or none; default kl,
    for grpo none."""
    anchor_coef: float = derived()
    """Weight of that KL, a mean over tokens; default 1."""
    anchor_completions: int = derived()
    """Stored completions per step; default 64."""
    anchor_top_k: int = derived()
    """The reference's most probable tokens that are kept for every place; the others are one bucket; default 32."""
    rescore_interval: int = 5
    """Every this many steps stored completions are scored under the current weights, to see how stale the rewards are;
    0: never."""
    rescore_completions: int = 256
    """Completions that are scored again."""
    min_effective_sample_size: float = 0.5
    """Rewards are stale when the effective sample size of the stored completions falls below this share."""
    on_stale_rewards: str = "warn"
    """warn, or stop (save and end the run, so that new completions can be generated)."""
    policy_interval: int | None = None
    """Steps between lines of policy.jsonl; it always has those of the start and the end (gfpo)."""

    def __post_init__(self) -> None:
        choice(self.objective, "objective", *OBJECTIVES)
        require(self.data is not None, "--data is required: the questions")
        self._check_objective()
        self._check_anchor()
        choice(self.on_stale_rewards, "on-stale-rewards", "warn", "stop")
        positive(self, "questions_per_step", "policy_interval", "rescore_completions", "min_effective_sample_size")
        require(self.rescore_interval >= 0, "--rescore-interval must not be negative")
        require(self.min_effective_sample_size <= 1, "--min-effective-sample-size is a share, at most 1")
        rescored = ("rescore_completions", "min_effective_sample_size")
        only_where(self, self.rescore_interval > 0, "with --rescore-interval 0", *rescored)
        require(
            self.on_stale_rewards == "warn" or self.rescore_interval > 0,
            "--on-stale-rewards stop needs --rescore-interval",
        )
        for name in ("kl_coef", "entropy_coef", "outside_mass_coef"):
            value = getattr(self, name)
            ok = value is None or 0 <= value < math.inf
            require(ok, f"--{name.replace('_', '-')} {value}: must be a finite number that is not negative")

    def _check_objective(self) -> None:
        """Fill in what depends on the objective, and refuse what it has no use for."""
        grpo = self.objective == "grpo"
        here = f"--objective {self.objective}"
        self._only_with("clip_eps", self.objective in _OF_SAMPLES, 0.2, here)
        self._only_with("clip_eps_high", self.objective in _OF_SAMPLES, self.clip_eps, here)
        self._only_with("samples_per_question", self.objective == "gfpo-sampled", 16, here)
        self._only_with("policy_epochs", self.objective == "gfpo-sampled", 4, here)
        self._only_with("token_normalization", grpo, "token", here)
        self._only_with("outside_mass_coef", not grpo, 0.1, here)
        self._only_with("policy_gradient", self.objective == "gfpo-exact", "plain", here)
        if self.policy_gradient is not None:
            choice(self.policy_gradient, "policy-gradient", "plain", "natural")
        if self.group_normalization is None:
            self.group_normalization = self.objective in _OF_SAMPLES
        if grpo:
            choice(self.token_normalization, "token-normalization", "token", "sequence")
            require(self.entropy_coef == 0, "--entropy-coef is for the tag distribution, which grpo does not see")
            require(self.policy_interval is None, "--policy-interval is for the tag distribution, not for grpo")
            require(self.eval_data is None, "--eval-data is for the tag distribution, not for grpo")
            require(self.trainable != "tag-rows", "--trainable tag-rows cannot learn what follows a tag: not for grpo")
            require(
                (self.rewards is not None) or (self.rollouts is not None and self.scores is not None),
                "--objective grpo needs --rewards, or --rollouts and --scores",
            )
        else:
            require(
                self.rewards is not None,
                f"--objective {self.objective} needs --rewards (megatron-ssft score --rewards)",
            )
            require(self.scores is None, "--scores is for grpo; the tags' rewards stand in --rewards")
        positive(self, "clip_eps", "clip_eps_high", "samples_per_question", "policy_epochs")
        require(self.clip_eps is None or self.clip_eps < 1, f"--clip-eps {self.clip_eps} must be below 1")
        require(
            self.samples_per_question is None or self.samples_per_question > 1,
            "--samples-per-question 1: a sample is compared with the others of its question; draw at least 2",
        )

    def _check_anchor(self) -> None:
        require(
            self.trainable in ("all", "tag-rows") or re.fullmatch(r"last-[1-9]\d*", self.trainable) is not None,
            f"--trainable {self.trainable}: choose all, tag-rows or last-K, such as last-4",
        )
        grpo = self.objective == "grpo"
        if self.anchor is None:
            self.anchor = "none" if grpo else "kl"
        choice(self.anchor, "anchor", "kl", "none")
        require(self.anchor == "none" or not grpo, "--anchor kl: grpo has its own KL on every token, --kl-coef")
        here = f"--anchor {self.anchor}"
        self._only_with("anchor_coef", self.anchor == "kl", 1.0, here)
        self._only_with("anchor_completions", self.anchor == "kl", 64, here)
        self._only_with("anchor_top_k", self.anchor == "kl", 32, here)
        require(
            self.rollouts is None or grpo or self.anchor == "kl" or self.rescore_interval > 0,
            "--rollouts has no use with --anchor none and --rescore-interval 0",
        )
        positive(self, "anchor_coef", "anchor_completions", "anchor_top_k")

    def _only_with(self, name: str, applies: bool, default: object, here: str) -> None:
        """Fill in the default where a field applies; refuse a value where it does not, which is `here`."""
        value = getattr(self, name)
        require(applies or value is None, f"--{name.replace('_', '-')} has no use with {here}; leave it out")
        if applies and value is None:
            setattr(self, name, default)

    @property
    def last_layers(self) -> int | None:
        """How many of the last layers train; None: everything."""
        if self.trainable == "all":
            return None
        return int(self.trainable.removeprefix("last-")) if self.trainable != "tag-rows" else 0
