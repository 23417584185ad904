"""Which characters of a conversation the assistant says, of a template without marks: found by rendering it otherwise.

A turn of the assistant begins where the text of all before it ends, as the template writes that for a model to go on
(`add_generation_prompt`). Where the whole text does not begin with that one (Mistral puts the system's message into the last turn of a
user), the turn begins behind what such a text has after the last message, if the same stands there; or where the two part
(DeepSeek-R1 prompts for a thought, and takes it out afterwards), if what the assistant says begins there. It ends behind the special
token that follows its content. Where a content begins and ends is found by adding a character to it that stands nowhere else:
all behind that character is as it was. Everything is compared with the text, and where one of the comparisons does not hold
the turn is not known: that is refused, nothing is guessed.
"""

import re
from collections.abc import Sequence
from itertools import pairwise
from os.path import commonprefix
from typing import Any

from rowwise.trainer.data.chat.forms import Message
from rowwise.trainer.data.chat.template import ChatTemplate

_PRIVATE = range(0xE000, 0xF900)


class NotExact(ValueError):
    """What the assistant says does not stand in the text as it can be found."""


def spans_of(
    template: ChatTemplate, messages: Sequence[Message], tools: Sequence[Any] | None, text: str, special: Sequence[str]
) -> list[tuple[int, int]]:
    """Returns [start, end) of each message of the assistant in `text`, which the template made of `messages`. `special`: tokens that
    may end one. Raises NotExact, and whatever the template can."""
    conversation = _Told(template, messages, tools, text, special)
    spans = [conversation.span(n) for n, message in enumerate(messages) if message["role"] == "assistant"]
    if any(end > start for (_, end), (start, _) in pairwise(spans)):
        raise NotExact("messages of the assistant overlap in the text")
    return spans


class _Told:
    def __init__(
        self, template: ChatTemplate, messages: Sequence[Message], tools: Any, text: str, special: Sequence[str]
    ):
        self._template, self._messages, self._tools, self._text = template, list(messages), tools, text
        # Of two that begin alike the longer.
        self._special = re.compile(
            "|".join(re.escape(token) for token in sorted(special, key=len, reverse=True)) or "$^"
        )
        self._ending = re.compile(rf"\s*(?:{self._special.pattern})")
        self._sign = next((chr(code) for code in _PRIVATE if chr(code) not in text), None)

    def span(self, number: int) -> tuple[int, int]:
        start = self._start(number)
        end = self._end(number, start)
        if not 0 <= start < end <= len(self._text):
            raise NotExact(f"message {number + 1} has no text of its own")
        return start, end

    def _render(self, messages: list[Message], prompt: bool = False) -> str:
        return self._template.render(messages, self._tools, prompt).text

    def _start(self, number: int) -> int:
        prompt = self._render(self._messages[:number], prompt=True)
        if self._text.startswith(prompt):
            return len(prompt)
        if number == 0:
            raise NotExact("it writes something before the first message only where there is one")
        here = self._messages[:number]
        _, asked = self._around_sign(here, number - 1, at_end=True, prompt=True)
        _, behind = self._around_sign(self._messages, number - 1, at_end=True)
        if self._text.endswith(behind):
            start = len(self._text) - len(behind) + len(commonprefix((asked, behind)))  # noqa: RUF071 - of text
            if behind.startswith(asked):
                return start
            before, _ = self._around_sign(self._messages, number, at_end=False)
            if before == self._text[:start]:
                return start
        raise NotExact(f"the text before message {number + 1} is another without it")

    def _end(self, number: int, start: int) -> int:
        if not self._messages[number].get("tool_calls"):
            _, behind = self._around_sign(self._messages, number, at_end=True)
            if not self._text.endswith(behind):
                raise NotExact(f"the text behind message {number + 1} depends on what it says")
            end = len(self._text) - len(behind)
            if (ending := self._ending.match(self._text, end)) is not None:
                return ending.end()
        whole = self._render(self._messages[: number + 1])
        *_, last = (None, *self._special.finditer(whole))
        ended = whole if last is None or whole[last.end() :].strip() else whole[: last.end()]
        if self._text.startswith(whole):
            return len(ended)
        # It may begin otherwise where it is the last (Qwen3's empty thought): then it is to end alike.
        end = self._text.find(last.group(), start) + len(last.group()) if last is not None else start
        if end <= start or not ended.endswith(self._text[start:end]):
            raise NotExact(f"the text up to message {number + 1} is another without those behind it")
        return end

    def _around_sign(self, messages: list[Message], number: int, at_end: bool, prompt: bool = False) -> tuple[str, str]:
        """What stands before and behind a sign that is put at the end or the beginning of one of `messages`."""
        content = messages[number]["content"]
        if self._sign is None or not content:
            raise NotExact(f"message {number + 1} cannot be told from the rest of the text")
        signed = {"content": content + self._sign if at_end else self._sign + content}
        changed = [*messages[:number], {**messages[number], **signed}, *messages[number + 1 :]]
        parts = self._render(changed, prompt).split(self._sign)
        if len(parts) != 2:
            raise NotExact(f"message {number + 1} stands {len(parts) - 1} times in the text")
        return parts[0], parts[1]
