"""The N global forking tokens as token-id sequences (paper, section 2.1), in two forms."""

from __future__ import annotations

from megatron_ssft.errors import UserError
from megatron_ssft.records import ForkingTokens
from megatron_ssft.tokenizers.tokenizer import Tokenizer

_SPECIAL_TEMPLATE = "<think{i}>"
_TURN_START = "<|im_start|>"


def build_forking_tokens(tokenizer: Tokenizer, num_tags: int, format: str, template: str | None) -> ForkingTokens:
    """The tags `template` with {i} = 1..num_tags under `tokenizer`.

    `special`: one id each; strings that the tokenizer knows as one token keep that id, the others get
    `tokenizer.vocab_size`, `vocab_size + 1`, ... in order. `text`: each string encoded as ordinary text. Raises
    UserError where a tag is empty, or is the same as or the beginning of another: such tags could not be told apart.
    """
    assert format in ("special", "text") and num_tags >= 0, (format, num_tags)
    if template is None:
        starts_turn = format == "text" and tokenizer.token_to_id(_TURN_START) is not None
        template = (_TURN_START if starts_turn else "") + _SPECIAL_TEMPLATE + ("\n" if format == "text" else "")
    # str.replace, not str.format: a template may hold other braces.
    strings = tuple(template.replace("{i}", str(i)) for i in range(1, num_tags + 1))
    if format == "text":
        ids = tuple(tuple(tokenizer.encode(string)) for string in strings)
    else:
        ids = _special_ids(tokenizer, strings)
    _check_distinct(template, strings, ids)
    return ForkingTokens(strings=strings, ids=ids, format=format)


def reserve_tags(tokenizer: Tokenizer, tags: ForkingTokens) -> None:
    """See to it that no text of the data becomes a tag, where the tokenizer has entries for the tags.

    Tags of format `text` may have them too: `<think1>` of a folder that was exported with special tags.
    """
    tokenizer.reserve({*tags.strings, *(string.strip() for string in tags.strings)})


def vocab_size_with_tags(tokenizer: Tokenizer, tags: ForkingTokens) -> int:
    """Vocabulary entries including the ids that the tags add."""
    return max([tokenizer.vocab_size, *(1 + max(ids) for ids in tags.ids)])


def _special_ids(tokenizer: Tokenizer, strings: tuple[str, ...]) -> tuple[tuple[int, ...], ...]:
    ids, next_id = [], tokenizer.vocab_size
    for string in strings:
        token_id = tokenizer.token_to_id(string)
        if token_id is None:
            token_id, next_id = next_id, next_id + 1
        ids.append((token_id,))
    return tuple(ids)


def _check_distinct(template: str, strings: tuple[str, ...], ids: tuple[tuple[int, ...], ...]) -> None:
    flag = f"--forking-token-template {template!r}"
    for string, sequence in zip(strings, ids):
        if not sequence:
            raise UserError(f"{flag}: the tokenizer makes no token of {string!r}; choose another template")
    # In sorted order a sequence stands directly before those that it is the beginning of.
    order = sorted(range(len(ids)), key=lambda i: ids[i])
    for shorter, longer in zip(order, order[1:]):
        if ids[longer][: len(ids[shorter])] == ids[shorter]:
            raise UserError(
                f"{flag}: in tokens {strings[shorter]!r} is the beginning of {strings[longer]!r} or equal to it, so "
                "they cannot be told apart; close the number with another character, as in <think{i}>"
            )
