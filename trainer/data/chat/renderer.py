"""Renders conversations in a process of their own, so that a template can neither hang nor fill the memory of a run.

What is asked and answered crosses as JSON (see `child.py`, which bounds itself). Where the child gives no answer in time, or
ends, it is started anew and asked for each conversation alone, so that the one that does it is named.
"""

import json
import select
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rowwise.trainer.data.chat.forms import BadRow, Conversation, Message

SECONDS = 10.0  # of the processor, for a conversation
MEMORY_BYTES = 2 << 30  # of the child
PATIENCE_SECONDS = 60.0  # with the answer for one, where that bound does not help
START_SECONDS = 120.0  # on the busiest machine
_NO_ANSWER = {"error": "it gives no answer, or ends its process", "kind": "limit"}
_REASONS = {
    "limit": "the template passes its limits",
    "template": "the template fails",
    "not exact": "what the assistant says is not found exactly",
}


@dataclass(frozen=True)
class Template:
    """A chat template: its text, where that stands, what it finds beside a conversation, and the tokens that may end a message."""

    source: str
    where: str
    values: dict[str, Any]
    special: tuple[str, ...]


@dataclass(frozen=True)
class Said:
    """The text of a conversation, and the spans [start, end) of its characters that are learned."""

    text: str
    spans: tuple[tuple[int, int], ...]


class Renderer:
    """Use as a context: leaving it ends the child. Entering raises ValueError for what is no template. `marked`: whether it says
    itself what is generated."""

    def __init__(
        self,
        template: Template,
        seconds: float = SECONDS,
        patience_seconds: float = PATIENCE_SECONDS,
        memory_bytes: int = MEMORY_BYTES,
    ):
        self._template, self._patience = template, patience_seconds
        self._seconds, self._memory_bytes = seconds, memory_bytes
        self._child: subprocess.Popen[bytes] | None = None
        self.marked = False

    def __enter__(self) -> "Renderer":
        self._start()
        return self

    def __exit__(self, *error: object) -> None:
        self._end()

    def conversations(self, several: Sequence[Conversation]) -> list[Said | BadRow]:
        """Returns, of each, its text and what of it is learned, or why that is not known."""
        asked = [
            {"messages": one.messages, "tools": one.tools, "learned": one.learned, "prompt": False} for one in several
        ]
        return [_said(answer) for answer in self._ask(asked)]

    def prompt(self, messages: Sequence[Message]) -> str:
        """Returns the text of a conversation that the assistant is to go on with. Raises BadRow."""
        (answer,) = self._ask([{"messages": list(messages), "tools": None, "learned": [], "prompt": True}])
        said = _said(answer)
        if isinstance(said, BadRow):
            raise said
        return said.text

    def _ask(self, several: list[dict[str, Any]]) -> list[dict[str, Any]]:
        answers = self._exchange(several, self._patience + self._seconds * len(several))
        if answers is not None:
            return answers
        self._restart()
        alone: list[dict[str, Any]] = []
        for one in several:
            answer = self._exchange([one], self._patience)
            if answer is None:
                self._restart()
            alone += answer or [_NO_ANSWER]
        return alone

    def _restart(self) -> None:
        self._end()
        self._start()

    def _start(self) -> None:
        # -P: nothing of the working directory is imported.
        command = [sys.executable, "-P", "-m", "rowwise.trainer.data.chat.child"]
        self._child = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        given = {
            "source": self._template.source,
            "values": self._template.values,
            "special": self._template.special,
            "seconds": self._seconds,
            "memory_bytes": self._memory_bytes,
        }
        answer: dict[str, Any] = self._exchange(given, START_SECONDS) or dict(_NO_ANSWER)
        if "error" in answer:
            self._end()
            raise ValueError(
                f"{self._template.where}: no template that can be used: {answer['error']}; give data.template=PATH"
            )
        self.marked = answer["marked"]

    def _end(self) -> None:
        if self._child is not None:
            self._child.kill()
            self._child.communicate()
            self._child = None

    def _exchange(self, what: Any, seconds: float) -> Any:
        """The child's answer; None where there is none in time."""
        assert self._child is not None and self._child.stdin is not None and self._child.stdout is not None
        try:
            self._child.stdin.write(json.dumps(what, default=_unknown).encode() + b"\n")
            self._child.stdin.flush()
            if not select.select([self._child.stdout], [], [], seconds)[0]:
                return None
            line = self._child.stdout.readline()
        except OSError:
            return None
        return json.loads(line) if line.endswith(b"\n") else None


def _unknown(value: object) -> str:
    """What stands for a value that JSON has none of, such as a day of a table: a template sees only what is inert."""
    return f"<{type(value).__name__}>"


def _said(answer: dict[str, Any]) -> Said | BadRow:
    if "error" in answer:
        first = str(answer["error"]).splitlines() or [""]
        return BadRow(_REASONS[answer["kind"]], first[0][:300])
    return Said(answer["text"], tuple((start, end) for start, end in answer["spans"]))
