"""A chat template: a stranger's Jinja, rendered in a sandbox, with the marks around what the model generates.

The environment is the one that transformers gives templates (`ImmutableSandboxedEnvironment`, `raise_exception`, `tojson`, loop
controls), so that a template says the same here and there; but the day of `strftime_now` is fixed, since what a run reads is a
function of its files. Runs in a process of its own (`child.py`), which bounds time and memory. Needs Jinja alone.
"""

import json
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from rowwise.trainer.data.chat.forms import Message

TODAY = date(2024, 7, 26)  # Llama 3.1's own, where it is told of none
MOST_CHARACTERS = 64 << 20  # of a text
MOST_POWER = 64
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True)
class Rendered:
    """A text, and the spans [start, end) of its characters that the template marks as generated."""

    text: str
    marks: tuple[tuple[int, int], ...]


class ChatTemplate:
    """`source`, compiled. `values`: what it finds beside the conversation, such as bos_token. `marked`: whether it says what is
    generated. Raises jinja2's TemplateError."""

    def __init__(self, source: str, values: Mapping[str, Any]):
        # Nobody can foretell these, so no conversation holds one of them.
        secret = secrets.token_hex(16)
        self._begin, self._end = f"\x02{secret}\x02", f"\x03{secret}\x03"
        self._border = re.compile(f"({self._begin}|{self._end})")
        environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
        environment.filters["tojson"] = _to_json
        environment.globals |= {
            "raise_exception": _raise,
            "strftime_now": TODAY.strftime,
            "dict": lambda *given, **named: dict(*given, **named),
            "namespace": _Namespace,
            "generated": lambda text: f"{self._begin}{text}{self._end}",
        }
        self._template, self._values = environment.from_string(source), dict(values)
        self.marked = _GENERATION.search(source) is not None

    def render(
        self, messages: Sequence[Message], tools: Sequence[Any] | None = None, add_generation_prompt: bool = False
    ) -> Rendered:
        """Raises whatever a template can."""
        told = {"tools": tools, "documents": None, "add_generation_prompt": add_generation_prompt}
        parts, size = [], 0
        for part in self._template.generate(**self._values, **told, messages=list(messages)):
            parts.append(part)
            if (size := size + len(part)) > MOST_CHARACTERS:
                raise SecurityError(f"it makes a text of more than {MOST_CHARACTERS:,} characters")
        return self._without_borders("".join(parts))

    def _without_borders(self, text: str) -> Rendered:
        pieces: list[str] = []
        marks: list[tuple[int, int]] = []
        at, depth, start = 0, 0, 0
        for piece in self._border.split(text):
            if piece == self._begin:
                start = at if depth == 0 else start
                depth += 1
            elif piece == self._end:
                depth -= 1
                if depth == 0 and at > start:
                    marks.append((start, at))
            else:
                pieces.append(piece)
                at += len(piece)
        if depth:
            raise TemplateError("it cuts a part off that it marks as generated")
        return Rendered("".join(pieces), tuple(marks))


class _Sandbox(ImmutableSandboxedEnvironment):
    """Refuses what would take memory before anyone could ask how much."""

    intercepted_binops = frozenset(("*", "**"))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "**" and not (isinstance(right, int | float) and abs(right) <= MOST_POWER):
            raise SecurityError(f"it raises to a power above {MOST_POWER}")
        if operator == "*":
            for several, times in ((left, right), (right, left)):
                if isinstance(several, str | list | tuple) and len(several) * int(times) > MOST_CHARACTERS:
                    raise SecurityError(f"it repeats what then has more than {MOST_CHARACTERS:,} parts")
        return super().call_binop(context, operator, left, right)


class _Namespace(Namespace):
    """Jinja's, without names of Python's own: what it holds answers for its attributes."""

    def __init__(*given: Any, **named: Any) -> None:  # `self` may be one of the names
        self, *values = given
        held = dict(*values, **named)
        for name in held:
            _refuse_private(name)
        Namespace.__init__(self, held)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_private(name)
        super().__setitem__(name, value)


def _refuse_private(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"it keeps a value as {name!r}, a name of Python's own")


class _Generation(Extension):
    """`{% generation %} ... {% endgeneration %}`: what stands between is what the model is to say."""

    tags = {"generation"}  # noqa: RUF012 - Jinja's own way

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Macro) -> str:
        generated: Any = self.environment.globals["generated"]
        return generated(caller())


def _raise(message: object) -> None:
    raise TemplateError(str(message))


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """Without HTML's escapes, which Jinja's own writes."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
