"""Rows -> conversations: messages of roles, however the row spells them.

    messages               {"messages": [{"role": "user", "content": ...}, ...]}           OpenAI, TRL
    ShareGPT               {"conversations": [{"from": "human", "value": ...}, ...]}       Vicuna
    prompt and completion  {"prompt": ..., "completion": ...}                              texts, or lists of messages
    Alpaca                 {"instruction": ..., "input": ..., "output": ...}

Beside them may stand `system`, a text, and `tools`. A message of the assistant with `"weight": 0` is not learned, nor is one
in a prompt. Needs nothing but Python.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Message = dict[str, Any]

MESSAGES, SHAREGPT, COMPLETION, ALPACA = "messages", "ShareGPT", "prompt and completion", "Alpaca"
COLUMNS = (
    "messages", "conversations", "prompt", "completion", "instruction", "input", "output", "history", "system", "tools",
)  # fmt: skip
_ROLES = ("system", "developer", "user", "assistant", "tool")
_SHAREGPT_ROLES = {
    "human": "user", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant", "observation": "tool",
    "function_response": "tool",
}  # fmt: skip
_AFTER = {  # whom a message of a role may follow; "": none
    "system": ("",),
    "developer": ("",),
    "user": ("", "system", "developer", "assistant", "tool"),
    "assistant": ("user", "tool"),
    "tool": ("assistant", "tool"),
}
_REASONING = ("reasoning_content", "thinking", "reasoning")


class BadRow(ValueError):
    """A row is no conversation that can be learned. `reason`: of which kind it is, to be counted; `detail`: which part of it."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(f"{reason} ({detail})" if detail else reason)
        self.reason = reason


@dataclass(frozen=True)
class Conversation:
    """`messages` have a role and what the template reads; `learned`: which of them are (those of the assistant)."""

    form: str
    messages: list[Message]
    learned: tuple[int, ...]
    tools: list[Any] | None = None


def conversation_of(row: object) -> Conversation:
    """Returns the conversation of a row. Raises BadRow."""
    if not isinstance(row, dict):
        raise BadRow("not an object with a conversation", f"it is a {type(row).__name__}")
    form, messages = _messages(row)
    system = row.get("system")
    if system and messages and messages[0].get("role") not in ("system", "developer"):
        messages.insert(0, {"role": "system", "content": _text(system, "system")})
    plain = [_plain(message, f"message {n}") for n, message in enumerate(messages, 1)]
    _require_order(plain)
    learned = [n for n, message in enumerate(plain) if message.pop("weight", 1) and message["role"] == "assistant"]
    if not learned:
        raise BadRow("no message of an assistant that is learned")
    tools = _parsed(row.get("tools"), "tools")
    return Conversation(form, plain, tuple(learned), tools or None)


def _messages(row: Mapping[str, Any]) -> tuple[str, list[Message]]:
    """(the form of a row, its messages as they stand there)."""
    if row.get("messages") is not None:
        return MESSAGES, _list(row["messages"], "messages")
    if row.get("conversations") is not None:
        messages = _list(row["conversations"], "conversations")
        return (SHAREGPT if any("from" in one for one in messages) else MESSAGES), messages
    if row.get("prompt") is not None and row.get("completion") is not None:
        prompt = [{**one, "weight": 0} for one in _either(row["prompt"], "user", "prompt")]
        return COMPLETION, prompt + _either(row["completion"], "assistant", "completion")
    if row.get("instruction") is not None and row.get("output") is not None:
        return ALPACA, _alpaca(row)
    raise BadRow("no conversation in its columns", ", ".join(map(str, row))[:200])


def _alpaca(row: Mapping[str, Any]) -> list[Message]:
    asked = _text(row["instruction"], "instruction")
    if row.get("input"):
        asked += "\n\n" + _text(row["input"], "input")
    turns = [*_parsed(row.get("history"), "history"), (asked, row["output"])]
    if not all(isinstance(turn, list | tuple) and len(turn) == 2 for turn in turns):
        raise BadRow("history is no list of pairs of texts")
    return [
        {"role": role, "content": said}
        for turn in turns
        for role, said in zip(("user", "assistant"), turn, strict=True)
    ]


def _either(value: object, role: str, column: str) -> list[Message]:
    return [{"role": role, "content": value}] if isinstance(value, str) else _list(value, column)


def _list(value: object, column: str) -> list[Message]:
    messages = _parsed(value, column)
    if not messages or not all(isinstance(one, dict) for one in messages):
        raise BadRow(f"{column} is no list of messages")
    return [dict(one) for one in messages]


def _parsed(value: object, column: str) -> list[Any]:
    """A list, or one that a text holds as JSON, as tables have it."""
    if isinstance(value, str) and value:
        try:
            value = json.loads(value)
        except (json.JSONDecodeError, RecursionError):
            raise BadRow(f"{column} is a text, and not JSON") from None
    if not isinstance(value or [], list):
        raise BadRow(f"{column} is a {type(value).__name__}, and no list")
    return list(value or [])  # type: ignore[call-overload]


def _plain(message: Message, where: str) -> Message:
    """A message as templates read it: without what is null, its text in one piece, what was thought under all its names."""
    given = {key: value for key, value in message.items() if value is not None}
    role = given.pop("role", None) or given.pop("from", None)
    role = _SHAREGPT_ROLES.get(role, role) if isinstance(role, str) else role
    if role not in _ROLES:
        raise BadRow("an unknown role", f"{where}: {role!r}; possible are {', '.join(_ROLES)}")
    content = given.pop("content", None)
    given["content"] = _text(given.pop("value", "") if content is None else content, where)
    if role == "assistant" and not given["content"].strip() and not given.get("tool_calls"):
        raise BadRow("an assistant that says nothing", where)
    if (weight := given.get("weight", 1)) not in (0, 1):
        raise BadRow("a weight that is not 0 or 1", f"{where}: {weight!r}")
    thought = next((given[key] for key in _REASONING if key in given), None)
    if thought is not None:
        given = {"thinking": thought, **given, "reasoning_content": thought}
    return {"role": role, **given}


def _text(value: object, where: str) -> str:
    """A text, or the texts of a list of parts."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in value):
        return "".join(part["text"] for part in value)
    raise BadRow("content that is no text", f"{where}: {type(value).__name__}")


def _require_order(messages: list[Message]) -> None:
    before = ""
    for number, message in enumerate(messages, 1):
        if before not in _AFTER[message["role"]]:
            stands = f"follows the {before}'s" if before else "is the first"
            raise BadRow("roles out of order", f"message {number}, the {message['role']}'s, {stands}")
        before = message["role"]
    if not any(message["role"] == "assistant" for message in messages):
        raise BadRow("no message of an assistant")
