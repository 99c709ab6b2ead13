"""Matching, batches and optimization."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_ssft.config.checks import choice, only_where, positive, require


@dataclass
class MatchingConfig:
    """Which trace is trained under which tag."""

    matching: str = "optimal"
    """optimal (minimum-cost bipartite matching, the paper), random (its ablation), fixed (trace j under tag j),
    single (all traces under the first tag: SFT on the mixed data)."""
    matching_tokens: int = 1000
    """T_r: the cost looks at the first this many tokens of a trace."""
    matching_tokens_per_microbatch: int | None = None
    """Tokens in one forward-only microbatch of the cost pass; default: what a training microbatch may hold."""
    matching_precision: str = "model"
    """Precision of the cost pass: model (that of training) or bf16 (matrix products in bfloat16 while training in
    float32)."""
    matching_interval: int = 1
    """Approximation: score a question every this many epochs only and reuse its assignment in between; 1: always."""
    matching_first_tokens: int | None = None
    """Approximation: score the first this many tokens of each trace, and --matching-tokens of them only for questions
    whose assignment is not certain by then; needs --matching-certainty."""
    matching_certainty: float | None = None
    """How much, in nats per token, the tokens after --matching-first-tokens are taken to differ between tags at most;
    an assignment that no such difference can change is certain."""
    regret_interval: int = 20
    """With an approximation: every this many steps the exact costs are evaluated too, and the log says what the
    approximation loses (matching_regret); 0: never."""
    log_matching_interval: int = 0
    """With random, fixed: evaluate the cost matrix every this many steps for the log only; 0: never."""

    def __post_init__(self) -> None:
        choice(self.matching, "matching", "optimal", "random", "fixed", "single")
        choice(self.matching_precision, "matching-precision", "model", "bf16")
        positive(
            self,
            "matching_tokens",
            "matching_tokens_per_microbatch",
            "matching_interval",
            "matching_first_tokens",
            "matching_certainty",
        )
        require(self.log_matching_interval >= 0, "--log-matching-interval must not be negative")
        require(self.regret_interval >= 0, "--regret-interval must not be negative")
        require(
            (self.matching_first_tokens is None) == (self.matching_certainty is None),
            "--matching-first-tokens and --matching-certainty go together",
        )
        require(
            self.matching_first_tokens is None or self.matching_first_tokens < self.matching_tokens,
            f"--matching-first-tokens {self.matching_first_tokens} must be less than --matching-tokens "
            f"{self.matching_tokens}",
        )
        here = f"with --matching {self.matching}"
        scored = ("matching_tokens", "matching_tokens_per_microbatch", "matching_precision")
        only_where(self, self.matching != "single", f"{here}, which scores nothing", *scored)
        only_where(self, self.matching in ("random", "fixed"), here, "log_matching_interval")
        only_where(self, self.approximates, "without an approximation of the matching", "regret_interval")
        require(
            not self.approximates or self.matching == "optimal",
            f"--matching-interval and --matching-first-tokens approximate --matching optimal, not {self.matching}",
        )

    @property
    def approximates(self) -> bool:
        """Whether assignments may differ from the optimal ones under the current weights."""
        return self.matching_interval > 1 or self.matching_first_tokens is not None


@dataclass
class BatchConfig:
    """How questions fill the optimizer steps, and how a step averages their losses."""

    global_batch_size: int = 32
    """Traces in one optimizer step (the paper: 32 = 8 questions x 4 traces)."""
    train_epochs: int | None = None
    """Passes over the data; give this or --train-iters."""
    question_lookahead: int = 64
    """Questions the queue may look ahead to fill a global batch when the number of traces varies."""
    loss_normalization: str = "token"
    """token (mean over all completion tokens of the global batch) or sequence (mean over traces of their mean)."""

    def __post_init__(self) -> None:
        positive(self, "global_batch_size", "train_epochs", "question_lookahead")
        choice(self.loss_normalization, "loss-normalization", "token", "sequence")


@dataclass
class TrainingConfig:
    """Microbatches, optimizer, learning rate."""

    sequence_layout: str = "packed"
    """packed (streams of tokens in which the traces of a question share its prompt), concatenated (the same, one
    question a stream; the paper's appendix A.5) or padded (a sequence a row, filled up to the longest)."""
    share_prompt: bool = True
    """In the packed layouts a question's prompt stands once in a stream; --no-share-prompt repeats it every time."""
    micro_batch_size: int = 1
    """Sequences in one microbatch of the padded layout; for the others see --max-tokens-per-microbatch."""
    max_tokens_per_microbatch: int | None = None
    """Tokens in one microbatch of the packed layouts; default --micro-batch-size x --seq-length."""
    train_iters: int | None = None
    """Optimizer steps; SSFT may have --train-epochs instead."""
    seed: int = 1234
    """Decides initial weights, data order and every random choice."""
    lr: float = 1e-5
    """Peak learning rate."""
    min_lr: float = 0.0
    """Learning rate at the end of the decay."""
    lr_decay_style: str = "cosine"
    """cosine, linear or constant."""
    lr_decay_iters: int | None = None
    """Steps until --min-lr is reached; default: the whole run."""
    lr_warmup_iters: int = 0
    """Steps of linear warm-up."""
    lr_warmup_fraction: float | None = None
    """Warm-up as a share of the decay steps, instead of --lr-warmup-iters."""
    weight_decay: float = 0.01
    """AdamW weight decay; norms and biases are exempt."""
    adam_beta1: float = 0.9
    """AdamW beta 1."""
    adam_beta2: float = 0.95
    """AdamW beta 2."""
    adam_eps: float = 1e-8
    """AdamW epsilon."""
    clip_grad: float = 1.0
    """Global gradient norm above which gradients are scaled down; 0: no clipping."""

    def __post_init__(self) -> None:
        positive(
            self,
            "micro_batch_size",
            "max_tokens_per_microbatch",
            "train_iters",
            "lr",
            "lr_decay_iters",
            "adam_eps",
        )
        choice(self.sequence_layout, "sequence-layout", "packed", "concatenated", "padded")
        require(
            self.sequence_layout != "padded" or (self.share_prompt and self.max_tokens_per_microbatch is None),
            "--no-share-prompt and --max-tokens-per-microbatch need --sequence-layout packed or concatenated",
        )
        choice(self.lr_decay_style, "lr-decay-style", "cosine", "linear", "constant")
        constant = self.lr_decay_style == "constant"
        only_where(self, not constant, "with --lr-decay-style constant", "min_lr")
        no_decay = constant and self.lr_warmup_fraction is None  # which is a share of the decay's steps
        only_where(self, not no_decay, "with --lr-decay-style constant", "lr_decay_iters")
        require(0 <= self.min_lr <= self.lr, f"--min-lr {self.min_lr} must lie between 0 and --lr {self.lr}")
        require(self.lr_warmup_iters >= 0, "--lr-warmup-iters must not be negative")
        require(
            self.lr_warmup_fraction is None or 0 <= self.lr_warmup_fraction <= 1,
            "--lr-warmup-fraction must lie between 0 and 1",
        )
        require(
            self.lr_warmup_fraction is None or self.lr_warmup_iters == 0,
            "give at most one of --lr-warmup-iters and --lr-warmup-fraction",
        )
        require(self.weight_decay >= 0, "--weight-decay must not be negative")
        require(self.clip_grad >= 0, "--clip-grad must not be negative")
        for name in ("adam_beta1", "adam_beta2"):
            require(0 <= getattr(self, name) < 1, f"--{name.replace('_', '-')} must lie in [0, 1)")
