"""The program that renders chat templates, in a process of its own: a template is code from a folder of files.

It imports nothing of this package. Requests and answers are lines of JSON. The first request holds `template`,
`variables`, `date`, `memory_bytes`, `cpu_seconds` and `characters`; each further one `messages` and `tools`. An answer
holds `text`, or `error` in one line. What exceeds the memory is an error; what exceeds the time ends the process. So
does half a minute without a request.

The environment is transformers' one, but for three things. The date is fixed. Nothing is drawn at random. Values that
a template reads are plain JSON.
"""

from __future__ import annotations

import datetime
import json
import os
import resource
import select
import sys
from collections.abc import Iterator
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox

_IDLE_SECONDS = 30.0
NO_DATE = "no date"
"""Answer of a template that asks for today's date where none was fixed."""
# Whatever a wrong template can raise; the errors of jinja2 itself are TemplateErrors.
_FAULTS = (
    *(jinja2.TemplateError, ArithmeticError, LookupError, TypeError, ValueError, AttributeError, AssertionError),
    *(RecursionError, MemoryError, NotImplementedError, RuntimeError),
)


class _Generation(jinja2.ext.Extension):
    """`{% generation %}`, by which templates mark what an assistant writes: rendered as it stands."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body).set_lineno(line)


class _NoDateError(jinja2.TemplateError):
    pass


def _environment(date: str | None) -> jinja2.Environment:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )

    def strftime_now(format: str) -> str:
        if date is None:
            raise _NoDateError(NO_DATE)
        return datetime.datetime.fromisoformat(date).strftime(format)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(
        value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment.globals.update(strftime_now=strftime_now, raise_exception=raise_exception)
    environment.filters["tojson"] = tojson
    del environment.globals["lipsum"], environment.filters["random"]
    return environment


def _lines() -> Iterator[bytes]:
    """Lines of standard input, until it ends or nothing comes for a while."""
    buffer = b""
    while select.select([0], [], [], _IDLE_SECONDS)[0]:
        block = os.read(0, 1 << 20)
        if not block:
            return
        buffer += block
        while b"\n" in buffer:
            line, _, buffer = buffer.partition(b"\n")
            yield line


def _answer(answer: dict[str, str]) -> None:
    sys.stdout.buffer.write(json.dumps(answer).encode("ascii") + b"\n")
    sys.stdout.buffer.flush()


def _explain(error: BaseException) -> dict[str, str]:
    if isinstance(error, _NoDateError):
        return {"error": NO_DATE}
    text = " ".join(str(error).split())[:300]
    if isinstance(error, jinja2.TemplateError):
        line = getattr(error, "lineno", None)
        return {"error": (text or type(error).__name__) + (f" (line {line} of the template)" if line else "")}
    if isinstance(error, MemoryError):
        return {"error": "it takes more memory than a template may have"}
    return {"error": f"{type(error).__name__}{': ' if text else ''}{text}"}


def _limit_time(seconds: int) -> None:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    used = int(usage.ru_utime + usage.ru_stime)
    resource.setrlimit(resource.RLIMIT_CPU, (used + 1 + seconds, resource.getrlimit(resource.RLIMIT_CPU)[1]))


def main() -> None:
    """Answer requests until there are no more."""
    lines = _lines()
    setup = json.loads(next(lines, b"null"))
    if setup is None:
        return
    allowed = resource.getrlimit(resource.RLIMIT_AS)[1]
    memory = setup["memory_bytes"] if allowed == resource.RLIM_INFINITY else min(setup["memory_bytes"], allowed)
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _limit_time(setup["cpu_seconds"])
    template: jinja2.Template | None = None
    try:
        template = _environment(setup["date"]).from_string(setup["template"])
        fault = {"error": ""}
    except _FAULTS as error:
        fault = _explain(error)
    for line in lines:
        request = json.loads(line)
        if template is None:
            _answer(fault)
            continue
        _limit_time(setup["cpu_seconds"])
        try:
            text = template.render(
                messages=request["messages"],
                tools=request["tools"],
                documents=None,
                add_generation_prompt=True,
                **setup["variables"],
            )
            if len(text) > setup["characters"]:
                _answer({"error": f"it renders {len(text)} characters, more than {setup['characters']}"})
            else:
                _answer({"text": text})
        except _FAULTS as error:
            _answer(_explain(error))


if __name__ == "__main__":
    main()
