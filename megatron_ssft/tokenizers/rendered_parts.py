"""Whether every part of a conversation reached the text that a chat template made of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence

from megatron_ssft.errors import UserError
from megatron_ssft.records import Json, Message

Render = Callable[[Sequence[Message], Sequence[Json] | None], str]
_PROBE = " probe7b3f"
_ADVICE = "a part that is not rendered is not learned from: change the row, or the template"


class RenderedParts:
    """Checks conversations against one template.

    The content of each turn is looked for in the text. Which turns, reasoning, tool calls and tools the template
    renders at all is tried once for each sequence of roles and fields: each part is changed, and the text must follow.
    """

    def __init__(self, render: Render) -> None:
        self._render = render
        self._tried: set[tuple[object, ...]] = set()

    def check(self, messages: Sequence[Message], tools: Sequence[Json] | None, text: str) -> None:
        """`text`: what the template made of them. Raises UserError that names the part that is missing."""
        for number, turn in enumerate(messages, start=1):
            content = turn.get("content", "").strip()
            if content not in text and json.dumps(content, ensure_ascii=False)[1:-1] not in text:
                raise _missing(f"the content of turn {number} (role {turn['role']!r}) as it stands")
        shape = (
            bool(tools),
            *((turn["role"], *sorted(key for key, value in turn.items() if value)) for turn in messages),
        )
        if shape not in self._tried:
            self._try_parts(messages, tools, text)
            self._tried.add(shape)

    def _try_parts(self, messages: Sequence[Message], tools: Sequence[Json] | None, text: str) -> None:
        if tools and not self._depends(text, messages, None):
            raise _missing("the row's 'tools'")
        for position, turn in enumerate(messages):
            where = f"turn {position + 1} (role {turn['role']!r})"
            if turn.get("content", "").strip():
                changed: Message = {**turn, "content": turn["content"] + _PROBE}
                if _PROBE.strip() not in self._render(_with(messages, position, changed), tools):
                    raise _missing(f"the content of {where}")
            if turn.get("reasoning_content", "").strip():
                changed = {**turn, "reasoning_content": turn["reasoning_content"] + _PROBE}
                if _PROBE.strip() not in self._render(_with(messages, position, changed), tools):
                    raise _missing(f"'reasoning_content' of {where}")
            if turn.get("tool_calls"):
                changed = turn.copy()
                del changed["tool_calls"]
                if not self._depends(text, _with(messages, position, changed), tools):
                    raise _missing(f"'tool_calls' of {where}")

    def _depends(self, text: str, messages: Sequence[Message], tools: Sequence[Json] | None) -> bool:
        """Whether the template makes something else of the changed conversation; a refusal is something else."""
        try:
            return self._render(messages, tools) != text
        except UserError:
            return True


def _with(messages: Sequence[Message], position: int, turn: Message) -> list[Message]:
    return [*messages[:position], turn, *messages[position + 1 :]]


def _missing(part: str) -> UserError:
    return UserError(f"the chat template does not render {part}; {_ADVICE}")
