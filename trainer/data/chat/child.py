"""The process that renders conversations: `python -m rowwise.trainer.data.chat.child`, started by `renderer.py`.

Reads lines of JSON, {"source", "values", "special"} first, then lists of conversations, and answers each with a line. It has
a bounded memory, writes no file, and a conversation has a bounded time of the processor.
"""

import json
import resource
import signal
import sys
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError

from rowwise.trainer.data.chat.spans import NotExact, spans_of
from rowwise.trainer.data.chat.template import ChatTemplate


class TimeIsUp(BaseException):
    """A conversation took too long: nothing in a template can catch it."""


def main() -> None:
    """Serves until its input ends."""
    given = json.loads(sys.stdin.readline())
    resource.setrlimit(resource.RLIMIT_AS, (given["memory_bytes"],) * 2)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGVTALRM, _time_is_up)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal's is for who asks
    seconds, special = given["seconds"], given["special"]
    template: ChatTemplate | None = None

    def begin() -> dict[str, Any]:
        nonlocal template
        template = ChatTemplate(given["source"], given["values"])
        return {"marked": template.marked}

    _answer(_bounded(seconds, begin))
    for line in sys.stdin:
        assert template is not None
        asked = json.loads(line)
        _answer([_bounded(seconds, lambda one=one: _rendered(template, one, special)) for one in asked])


def _rendered(template: ChatTemplate, asked: dict[str, Any], special: list[str]) -> dict[str, Any]:
    """The text of a conversation and what the assistant says in it, or the prompt for its next message."""
    messages, tools = asked["messages"], asked["tools"]
    if asked["prompt"]:
        return {"text": template.render(messages, tools, add_generation_prompt=True).text, "spans": []}
    rendered = template.render(messages, tools)
    turns = [n for n, message in enumerate(messages) if message["role"] == "assistant"]
    spans = list(rendered.marks)
    if not template.marked:
        spans = spans_of(template, messages, tools, rendered.text, special)
    elif not spans:
        raise NotExact("it marks nothing of the conversation as generated")
    learned = set(asked["learned"])
    if learned != set(turns):
        if len(spans) != len(turns):
            raise NotExact(
                f"it marks {len(spans)} spans for {len(turns)} messages of the assistant, not all of which are learned"
            )
        spans = [span for span, turn in zip(spans, turns, strict=True) if turn in learned]
    return {"text": rendered.text, "spans": spans}


def _bounded(seconds: float, work: Any) -> dict[str, Any]:
    """What `work` answers within its time, or {"error", "kind"}."""
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        return work()
    except TimeIsUp:
        return {"error": f"it takes more than {seconds:g} seconds", "kind": "limit"}
    except MemoryError:
        return {"error": "it takes more memory than a conversation may", "kind": "limit"}
    except NotExact as error:
        return {"error": str(error), "kind": "not exact"}
    except TemplateSyntaxError as error:
        return {"error": f"line {error.lineno}: {error.message}", "kind": "template"}
    except TemplateError as error:
        return {"error": error.message or type(error).__name__, "kind": "template"}
    except Exception as error:  # whatever a stranger's template raises
        return {"error": f"{type(error).__name__}: {error}", "kind": "template"}
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)


def _time_is_up(*_: object) -> None:
    raise TimeIsUp


def _answer(what: object) -> None:
    sys.stdout.write(json.dumps(what) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
