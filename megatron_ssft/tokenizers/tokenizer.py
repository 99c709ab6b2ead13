"""Text to token ids and back: one small interface, three tokenizers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

from megatron_ssft.errors import UserError
from megatron_ssft.formats.forking_tokens import FORKING_TOKENS, parse_forking_tokens
from megatron_ssft.records import Json, Message
from megatron_ssft.tokenizers.data_text import DEFAULT_RULES, Conversations, DataText, PromptRules
from megatron_ssft.tokenizers.hf_folder import open_tokenizer


class Tokenizer(Protocol):
    """Interface of a tokenizer, as far as this project needs it."""

    vocab_size: int
    """Entries before any forking tokens: every id of `encode` and every special id is smaller."""
    eos_id: int
    """Ends a turn; it is trained at the end of every completion."""
    bos_id: int | None
    """Begins prompts that no chat template renders, where the tokenizer's own convention adds one."""
    has_template: bool
    """Whether there is a chat template."""
    remarks: tuple[str, ...]
    """What a run says of the tokenizer at its start; nothing in general."""

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, nothing added at the ends; what spells a control token may become one."""
        ...

    def encode_text(self, text: str) -> list[int]:
        """Ids of a text of the data: no text becomes a control token. Raises UserError for unusable characters."""
        ...

    def encode_verbatim(self, text: str) -> list[int]:
        """Ids of a verbatim prompt. Raises UserError where it spells control tokens and nothing says what they are."""
        ...

    def control_tokens_in(self, text: str) -> int:
        """How many control tokens a text of the data spells."""
        ...

    def control_tokens_in_chat(self, messages: Sequence[Message], tools: Sequence[Json] | None = None) -> int:
        """How many control tokens a conversation spells. Raises UserError as `render_chat`."""
        ...

    def reserve(self, tags: Iterable[str]) -> None:
        """Take `tags` for control tokens from now on, where the vocabulary has them as entries."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`, special tokens spelled out; ids from `vocab_size` on (forking tokens) are left out."""
        ...

    def decode_without_special(self, ids: Iterable[int]) -> str:
        """Text of `ids` as servers give it in general: special tokens are left out."""
        ...

    def token_to_id(self, token: str) -> int | None:
        """Id of the vocabulary entry spelled `token`, None if there is none."""
        ...

    def render_chat(self, messages: Sequence[Message], tools: Sequence[Json] | None = None) -> list[int] | None:
        """Ids of the chat template with generation prompt; None without a template.

        Raises UserError where the template refuses, or does not render a part of the conversation.
        """
        ...

    def fingerprint(self) -> str:
        """sha256 hex digest that changes whenever tokenization or the template changes."""
        ...


def build_tokenizer(tokenizer_type: str, tokenizer_model: str | None, rules: PromptRules = DEFAULT_RULES) -> Tokenizer:
    """The tokenizer that the flags name. Raises UserError, led by `--tokenizer-model PATH:`, for unusable files."""
    if tokenizer_type == "CharTokenizer":
        return CharTokenizer()
    if tokenizer_type not in ("SentencePieceTokenizer", "HuggingFaceTokenizer"):
        raise UserError(
            f"--tokenizer-type {tokenizer_type}: choose CharTokenizer, SentencePieceTokenizer or HuggingFaceTokenizer"
        )
    if tokenizer_model is None:
        raise UserError(f"--tokenizer-type {tokenizer_type} needs --tokenizer-model")
    if tokenizer_type == "SentencePieceTokenizer":
        return SentencePieceTokenizer(tokenizer_model)
    return HuggingFaceTokenizer(tokenizer_model, rules)


def _digest(*parts: str | bytes) -> str:
    """sha256 over the parts and their boundaries."""
    total = hashlib.sha256()
    for part in parts:
        data = part.encode("utf-8", "surrogatepass") if isinstance(part, str) else part
        total.update(len(data).to_bytes(8, "little") + data)
    return total.hexdigest()


class _WithoutControlTokens:
    """What the tokenizers have in common that make no control token of any text, and have no chat template."""

    def encode_text(self: Tokenizer, text: str) -> list[int]:
        return self.encode(text)

    def encode_verbatim(self: Tokenizer, text: str) -> list[int]:
        return self.encode(text)

    def control_tokens_in(self, text: str) -> int:
        return 0

    def control_tokens_in_chat(self, messages: Sequence[Message], tools: Sequence[Json] | None = None) -> int:
        return 0

    def reserve(self, tags: Iterable[str]) -> None:
        """Nothing: tags are no entries of the vocabulary."""

    def render_chat(self, messages: Sequence[Message], tools: Sequence[Json] | None = None) -> list[int] | None:
        return None


class CharTokenizer(_WithoutControlTokens):
    """The bytes of UTF-8 as ids 0..255 (so one token an ASCII character, nothing unknown), then end of text."""

    _EOS = "<|endoftext|>"

    def __init__(self) -> None:
        self.eos_id = 256
        self.bos_id: int | None = None
        self.has_template = False
        self.remarks: tuple[str, ...] = ()
        self.vocab_size = 257

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8"))

    def decode(self, ids: Iterable[int]) -> str:
        pieces = (self._EOS.encode() if i == self.eos_id else bytes([i]) for i in ids if i < self.vocab_size)
        return b"".join(pieces).decode("utf-8", errors="replace")

    def decode_without_special(self, ids: Iterable[int]) -> str:
        return self.decode(i for i in ids if i != self.eos_id)

    def token_to_id(self, token: str) -> int | None:
        if token == self._EOS:
            return self.eos_id
        return ord(token) if len(token) == 1 and token.isascii() else None

    def fingerprint(self) -> str:
        return _digest("CharTokenizer", self._EOS)


class SentencePieceTokenizer(_WithoutControlTokens):
    """A SentencePiece `.model` file."""

    def __init__(self, path: str) -> None:
        import sentencepiece  # here: importing this module stays fast

        try:
            model = Path(path).read_bytes()
        except OSError as error:
            raise UserError(
                f"--tokenizer-model {path}: cannot read the SentencePiece model: {error.strerror}"
            ) from error
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            loaded = self._processor.LoadFromSerializedProto(model)
        except RuntimeError as error:
            raise UserError(f"--tokenizer-model {path}: not a SentencePiece model") from error
        if not loaded or self._processor.get_piece_size() == 0:
            raise UserError(f"--tokenizer-model {path}: not a SentencePiece model")
        self.vocab_size = self._processor.get_piece_size()
        self.eos_id = self._processor.eos_id()
        if self.eos_id < 0:
            raise UserError(f"--tokenizer-model {path}: the model has no end-of-sentence piece, which ends every trace")
        bos = self._processor.bos_id()
        self.bos_id = bos if bos >= 0 else None
        self.has_template = False
        self.remarks: tuple[str, ...] = ()
        self._fingerprint = _digest("SentencePieceTokenizer", model)

    def encode(self, text: str) -> list[int]:
        return self._processor.encode(text, out_type=int)

    def decode(self, ids: Iterable[int]) -> str:
        # The library drops control pieces; spell them, so that a decoded text shows where a turn ended.
        text = ""
        ordinary: list[int] = []
        for i in (int(i) for i in ids if i < self.vocab_size):
            if self._processor.is_control(i):
                text += self._processor.decode(ordinary) + self._processor.id_to_piece(i)
                ordinary = []
            else:
                ordinary.append(i)
        return text + self._processor.decode(ordinary)

    def decode_without_special(self, ids: Iterable[int]) -> str:
        return self._processor.decode([int(i) for i in ids if i < self.vocab_size])

    def token_to_id(self, token: str) -> int | None:
        piece_id = self._processor.piece_to_id(token)  # the unknown piece for a stranger
        return piece_id if self._processor.id_to_piece(piece_id) == token else None

    def fingerprint(self) -> str:
        return self._fingerprint


class HuggingFaceTokenizer:
    """A local Hugging Face folder, read by transformers without network and without code from the folder."""

    def __init__(self, path: str, rules: PromptRules = DEFAULT_RULES) -> None:
        if not Path(path).is_dir():
            raise UserError(f"--tokenizer-model {path}: no such folder; give a local Hugging Face tokenizer folder")
        opened = open_tokenizer(Path(path), Path(path), flag="--tokenizer-model ")
        self._tokenizer = opened.tokenizer
        self.remarks: tuple[str, ...] = ()
        if opened.overruled is not None:
            self.remarks = (f"{path}: ids are those of tokenizer.json as it stands; {opened.overruled}",)
        vocabulary = self._tokenizer.get_vocab()
        # Without vocabulary files some tokenizer classes come up with nothing but their special tokens.
        if not set(vocabulary.values()) - set(self._tokenizer.added_tokens_decoder):
            raise UserError(f"--tokenizer-model {path}: no usable tokenizer: the folder holds no vocabulary")
        # Ids may have holes, so that the number of entries is not always a bound.
        self.vocab_size = max(len(self._tokenizer), 1 + max(vocabulary.values()))
        if self._tokenizer.eos_token_id is None:
            raise UserError(f"--tokenizer-model {path}: the tokenizer has no eos_token, which ends every trace")
        self.eos_id: int = self._tokenizer.eos_token_id
        bos = self._tokenizer.bos_token_id
        adds_bos = bos is not None and self._tokenizer("a", verbose=False)["input_ids"][:1] == [bos]
        self.bos_id: int | None = bos if adds_bos else None
        self.has_template = self._tokenizer.chat_template is not None
        self._rules = rules
        own_tags = parse_forking_tokens(Path(path)).strings if (Path(path) / FORKING_TOKENS).is_file() else ()
        self._text = DataText(self._tokenizer, own_tags)
        self._conversations = Conversations(self._tokenizer, self._text, rules.template_date)
        if rules.template_date is not None and not self._conversations.asks_for_the_date:
            raise UserError(
                f"--template-date {rules.template_date} has no use: no chat template of {path} writes a date; "
                "leave it out"
            )
        self._vocabulary, self._folder = vocabulary, Path(path)

    def reserve(self, tags: Iterable[str]) -> None:
        entries = {tag for tag in tags if tag in self._tokenizer.added_tokens_encoder}
        if entries <= {*self._text.control.tokens}:
            return
        self._text = DataText(self._tokenizer, {*self._text.control.tokens, *entries})
        self._conversations = Conversations(self._tokenizer, self._text, self._rules.template_date)

    def encode(self, text: str) -> list[int]:
        return self._text.encode_as_is(text)

    def encode_text(self, text: str) -> list[int]:
        return self._text.encode(text)

    def encode_verbatim(self, text: str) -> list[int]:
        spelled = self._text.control.find(text)
        if spelled and self._rules.control_tokens == "refuse":
            raise UserError(
                f"'prompt' spells the control token {spelled[0]!r}; say what it is there with "
                "--prompt-control-tokens control or --prompt-control-tokens text"
            )
        return self.encode(text) if self._rules.control_tokens == "control" else self.encode_text(text)

    def control_tokens_in(self, text: str) -> int:
        return len(self._text.control.find(text))

    def control_tokens_in_chat(self, messages: Sequence[Message], tools: Sequence[Json] | None = None) -> int:
        return self._conversations.spelled(messages, tools)

    def decode(self, ids: Iterable[int]) -> str:
        return self._decode(ids, skip_special_tokens=False)

    def decode_without_special(self, ids: Iterable[int]) -> str:
        return self._decode(ids, skip_special_tokens=True)

    def _decode(self, ids: Iterable[int], *, skip_special_tokens: bool) -> str:
        own = [int(i) for i in ids if i < self.vocab_size]
        text = self._tokenizer.decode(own, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False)
        assert isinstance(text, str), "ids of one text make one text"
        return text

    def token_to_id(self, token: str) -> int | None:
        token_id = self._tokenizer.convert_tokens_to_ids(token)
        assert token_id is None or isinstance(token_id, int), "one token has one id"
        is_unknown = token_id == self._tokenizer.unk_token_id and token != self._tokenizer.unk_token
        return None if is_unknown else token_id

    def render_chat(self, messages: Sequence[Message], tools: Sequence[Json] | None = None) -> list[int] | None:
        return self._conversations.render(messages, tools)

    def fingerprint(self) -> str:
        tokenizer, folder = self._tokenizer, self._folder
        settings = {
            "class": type(tokenizer).__name__,
            "vocabulary": sorted(self._vocabulary.items()),
            "control": self._text.control.tokens,
            "prompts": [self._rules.template_date, self._rules.control_tokens],
            "added": sorted((i, repr(token)) for i, token in tokenizer.added_tokens_decoder.items()),
            "special": [self.eos_id, self.bos_id, getattr(tokenizer, "split_special_tokens", False)],
            "chat_template": tokenizer.chat_template,
        }
        parts: list[str | bytes] = [json.dumps(settings, sort_keys=True)]
        if tokenizer.is_fast:
            parts.append(tokenizer.backend_tokenizer.to_str())
        else:  # the rules are in the files
            names = {*tokenizer.vocab_files_names.values(), "tokenizer_config.json"}
            parts += [(folder / name).read_bytes() for name in sorted(names) if (folder / name).is_file()]
        return _digest("HuggingFaceTokenizer", *parts)
