"""Text of the data in a Hugging Face tokenizer's ids: plain text, and conversations through the chat template."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from megatron_ssft.errors import UserError
from megatron_ssft.records import Json, Message
from megatron_ssft.tokenizers.chat_template import ChatTemplate
from megatron_ssft.tokenizers.control_tokens import ControlTokens, TextEncoder, without_marks
from megatron_ssft.tokenizers.rendered_parts import RenderedParts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython", "model")


@dataclass(frozen=True)
class PromptRules:
    """What is settled about prompts beyond the tokenizer's own files."""

    template_date: str | None = None
    """Today, to a chat template that asks; YYYY-MM-DD."""
    control_tokens: str = "refuse"
    """What a control token in a verbatim prompt is: `control`, `text`, or refused."""


DEFAULT_RULES = PromptRules()


class DataText:
    """Plain text of the data. Control tokens in it are text: special tokens, those with a name, and the tags."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, tags: Iterable[str]) -> None:
        added = tokenizer.added_tokens_decoder.values()
        contents = {token.content for token in added}
        special = {token.content for token in added if token.special}
        self.control = ControlTokens((special | {*tokenizer.all_special_tokens} | {*tags}) & contents)
        self._tokenizer = tokenizer
        self._encoders: dict[tuple[str, ...], TextEncoder] = {}
        splits = bool(getattr(tokenizer, "split_special_tokens", False))
        self.kept = frozenset(special if splits else ())
        """Control tokens that the tokenizer reads as text everywhere, in templates too."""
        normalizes = tokenizer.is_fast and tokenizer.backend_tokenizer.normalizer is not None
        self.hidden = normalizes and any(token.normalized and token.content in self.control.tokens for token in added)
        """Whether a text may become a control token that it does not spell, by its normalization."""

    def encode(self, text: str) -> list[int]:
        """Ids of the characters. Raises UserError for a text that cannot be encoded so."""
        if self.control.find(text) or self.hidden:
            return self.encoder(self.control).encode(text)
        return self.encode_as_is(text)

    def encode_as_is(self, text: str) -> list[int]:
        """Ids that the tokenizer itself gives, control tokens among them."""
        # verbose=False: lengths are checked against --seq-length, not against the folder's own limit.
        return self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def encoder(self, tokens: ControlTokens) -> TextEncoder:
        """The encoder to which `tokens` are text; made when it is first needed, as it takes as long as a tokenizer."""
        if not self._tokenizer.is_fast:
            raise UserError(
                "the data spells a control token, which a tokenizer without tokenizer.json cannot read as text"
            )
        if tokens.tokens not in self._encoders:
            self._encoders[tokens.tokens] = TextEncoder(self._tokenizer.backend_tokenizer, tokens)
        return self._encoders[tokens.tokens]


class Conversations:
    """Conversations in ids. What the data spells is text, what the template writes may be control tokens.

    In the turns of others than the assistant, added tokens that the template writes are text as well, special or not:
    some tokenizers mark turns with ordinary entries. To the assistant such entries (`</think>`) are vocabulary.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, data_text: DataText, date: str | None) -> None:
        self._tokenizer, self._text, self._date = tokenizer, data_text, date
        self._templates: dict[str, tuple[ChatTemplate, RenderedParts, ControlTokens]] = {}

    @property
    def asks_for_the_date(self) -> bool:
        """Whether a template may write today's date."""
        return "strftime_now" in str(self._tokenizer.chat_template)

    def render(self, messages: Sequence[Message], tools: Sequence[Json] | None) -> list[int] | None:
        """Ids with the generation prompt; None without a template. Raises UserError where the template refuses."""
        if self._tokenizer.chat_template is None:
            return None
        template, parts, framing = self._template(tools)
        control = self._text.control
        spelled = False
        marked: list[Message] = []
        for turn in messages:
            tokens = control if turn["role"] == "assistant" else framing
            spelled |= bool(tokens.find_in(cast(Json, turn)))
            marked.append(cast(Message, tokens.mark(cast(Json, turn))))
        spelled |= bool(framing.find_in(list(tools or ())))
        text = template.render(marked, cast("list[Json]", framing.mark(list(tools or ()))))
        for turn in messages:
            self._check_role(turn["role"], framing, template.template, text)
        parts.check(messages, tools, without_marks(text))
        if not spelled and not self._text.hidden:
            return self._text.encode_as_is(text)
        return self._text.encoder(framing).encode_rendered(text, self._text.kept)

    def spelled(self, messages: Sequence[Message], tools: Sequence[Json] | None) -> int:
        """Control tokens that the conversation spells. Raises UserError as `render`."""
        if self._tokenizer.chat_template is None:
            return len(self._text.control.find_in(cast(Json, list(messages))))
        _, _, framing = self._template(tools)
        found = framing.find_in(list(tools or ()))
        for turn in messages:
            tokens = self._text.control if turn["role"] == "assistant" else framing
            found += tokens.find_in(cast(Json, turn))
        return len(found)

    def _template(self, tools: Sequence[Json] | None) -> tuple[ChatTemplate, RenderedParts, ControlTokens]:
        try:
            text = self._tokenizer.get_chat_template(None, cast("list[dict]", tools) or None)
        except ValueError as error:  # several templates, none of them the default
            reason = " ".join(str(error).split())
            raise UserError(f"the tokenizer's chat template refuses the messages: {reason}") from error
        if text not in self._templates:
            names = {name: str(token) for name, token in self._tokenizer.special_tokens_map.items()}
            template = ChatTemplate(text, names, self._date)
            added = (token.content for token in self._tokenizer.added_tokens_decoder.values())
            written = {token for token in added if token.strip() and token in text}
            framing = ControlTokens({*self._text.control.tokens, *written})
            self._templates[text] = template, RenderedParts(template.render), framing
        return self._templates[text]

    def _check_role(self, role: str, framing: ControlTokens, template: str, text: str) -> None:
        """Templates that build a token around the role make any token of a role. Raises UserError.

        `text`: what was rendered.
        """
        if role in _ROLES:
            return
        for token in framing.tokens:
            if role in token and role != token and token in text and token not in template:
                raise UserError(f"role {role!r} becomes the control token {token!r}; use user, assistant or system")
