"""Tokens: the tokenizer, the global forking tokens (tags) in it, and how their rows begin."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_ssft.config.checks import choice, is_date, only_where, positive, require
from megatron_ssft.config.fields import PathText


@dataclass
class TokenizerConfig:
    """Text to tokens, and how many of them a sequence may have."""

    tokenizer_type: str = "HuggingFaceTokenizer"
    """CharTokenizer, SentencePieceTokenizer or HuggingFaceTokenizer."""
    tokenizer_model: PathText | None = None
    """SentencePiece model file or Hugging Face folder."""
    seq_length: int = 2048
    """Longest sequence (prompt, tag and completion) in tokens."""
    max_position_embeddings: int | None = None
    """Longest sequence that the model is for, written into its exports; default: as the loaded model's config.json
    says, else --seq-length. --seq-length must not be longer: a larger number asks for that."""
    max_truncated_share: float = 0.5
    """Refuse data of which more than this share of the traces (of the stored completions, in policy learning) lost its
    end to a limit of length; 1: never."""
    template_date: str | None = None
    """YYYY-MM-DD: today, to a chat template that writes the date; without it such a template is refused."""
    prompt_control_tokens: str = "refuse"
    """What a control token is that a verbatim prompt spells: control (itself), text (its characters), or refuse."""

    def __post_init__(self) -> None:
        choice(
            self.tokenizer_type,
            "tokenizer-type",
            "CharTokenizer",
            "SentencePieceTokenizer",
            "HuggingFaceTokenizer",
        )
        require(
            self.tokenizer_type == "CharTokenizer" or self.tokenizer_model is not None,
            f"--tokenizer-type {self.tokenizer_type} needs --tokenizer-model",
        )
        own = self.tokenizer_type == "CharTokenizer"
        only_where(self, not own, "with --tokenizer-type CharTokenizer", "tokenizer_model")
        positive(self, "seq_length", "max_position_embeddings")
        share = self.max_truncated_share
        require(0 <= share <= 1, f"--max-truncated-share {share}: is a share, between 0 and 1")
        choice(self.prompt_control_tokens, "prompt-control-tokens", "refuse", "control", "text")
        hugging_face = self.tokenizer_type == "HuggingFaceTokenizer"
        here = f"with --tokenizer-type {self.tokenizer_type}"
        only_where(self, hugging_face, here, "template_date", "prompt_control_tokens")
        require(
            self.template_date is None or is_date(self.template_date),
            f"--template-date {self.template_date}: give a day as YYYY-MM-DD",
        )


@dataclass
class ForkingTokenConfig:
    """The global forking tokens (tags) that start the reasoning."""

    num_forking_tokens: int = 6
    """N, the number of tags; 0 only for converting a model without any."""
    forking_token_format: str = "special"
    """special (one added vocabulary entry each) or text (ordinary tokens, the published checkpoint's form)."""
    forking_token_template: str | None = None
    """Text of a tag, {i} counting from 1; default <think{i}>, for text <|im_start|><think{i}>\\n where the
    tokenizer knows <|im_start|>. A single tag needs no {i}."""
    forking_token_lr_mult: float = 1.0
    """Learning rate of the tags' own input rows, as a multiple of --lr (special only)."""

    def __post_init__(self) -> None:
        require(self.num_forking_tokens >= 0, "--num-forking-tokens must not be negative")
        positive(self, "forking_token_lr_mult")
        choice(self.forking_token_format, "forking-token-format", "special", "text")
        require(
            self.forking_token_lr_mult == 1.0 or self.forking_token_format == "special",
            "--forking-token-lr-mult needs --forking-token-format special: text tags share ordinary tokens, "
            "so they have no rows of their own",
        )
        template = self.forking_token_template
        require(
            template is None or "{i}" in template or self.num_forking_tokens == 1,
            "--forking-token-template must contain {i}, which tells several tags apart",
        )


@dataclass
class StartConfig:
    """What the first step starts from."""

    forking_token_init: str = "noise"
    """Initial input rows: mean (of all embedding rows), noise (mean + seeded noise) or copy:<token>."""
    forking_token_noise: float = 1.0
    """Standard deviation of the noise (noise, copy), relative to the RMS of the embedding rows."""
    finetune: bool = False
    """Load only the weights: start at step 0 with a fresh optimizer."""

    def __post_init__(self) -> None:
        require(
            self.forking_token_init in ("mean", "noise") or self.forking_token_init.startswith("copy:"),
            f"--forking-token-init {self.forking_token_init}: choose mean, noise or copy:<token>",
        )
        only_where(self, self.forking_token_init != "mean", "with --forking-token-init mean", "forking_token_noise")
        require(self.forking_token_noise >= 0, "--forking-token-noise must not be negative")
