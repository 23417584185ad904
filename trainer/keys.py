"""What is said of a key that does not exist, of a string that no file can hold, and of a name that names no folder. Needs no
torch: what is mistyped is refused without waiting for it."""

import difflib
import os
import re
import unicodedata
from collections.abc import Mapping
from typing import Any

LONGEST_NAME = 200  # bytes: file systems take 255, of which a log's number, or `.incomplete`, needs some


def unknown_key(path: str, possible: list[str]) -> str:
    """Returns the message for a key that does not exist: what is possible, and the nearest."""
    parent, _, key = path.rpartition(".")
    near = difflib.get_close_matches(key, possible, n=1)
    where = f"{parent}" if parent else "the configuration"
    hint = f"; did you mean {parent + '.' if parent else ''}{near[0]}?" if near else ""
    return f"unknown key {path}: {where} has {', '.join(sorted(possible))}{hint}"


_WANTED = {
    "int_type": "give a whole number",
    "int_parsing": "give a whole number",
    "int_from_float": "give a whole number",
    "float_type": "give a number",
    "float_parsing": "give a number",
    "bool_type": "give true or false",
    "bool_parsing": "give true or false",
    "string_type": "give text, in quotes of its own where it looks like something else",
    "list_type": "give a list, such as [a,b]",
    "tuple_type": "give a list, such as [a,b]",
    "dict_type": "give a table, such as {{a: 1}}",
    "dataclass_type": "give a table, such as {{a: 1}}",
    "finite_number": "give a finite number",
    "greater_than": "give more than {gt}",
    "greater_than_equal": "give at least {ge}",
    "less_than": "give less than {lt}",
    "less_than_equal": "give at most {le}",
}


def told_of_type(error: Mapping[str, Any]) -> str:
    """Returns what is said of a value of the wrong type, from how its validation went."""
    if error["type"] == "literal_error":
        return f"possible are {error['ctx']['expected']}"
    wanted = _WANTED.get(error["type"], "a value of another kind stands there")
    return wanted.format_map(error.get("ctx", {}))


def path_to(error: Mapping[str, Any], tree: Mapping[str, Any]) -> list[Any]:
    """Returns the keys that lead to what is wrong in a tree, from how its validation went: a union's choice stands in the location as
    if it were one."""
    path: list[Any] = []
    node: Any = tree
    for part in error["loc"]:
        inside = part in node if isinstance(node, Mapping) else isinstance(node, list) and isinstance(part, int)
        if inside:
            path.append(part)
            node = node[part]
    return [*path, error["loc"][-1]] if error["type"] == "missing" else path


def refuse_control_characters(tree: Any, path: str = "") -> None:
    """Raises ValueError where a key or a string of a plain tree holds a control character or a line break: names go into batch
    scripts, records and terminals, line by line; or half a character (of bytes that are no UTF-8), which no file can hold."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            refuse_control_characters(str(key), f"a key of {path or 'the configuration'}")
            refuse_control_characters(value, f"{path}.{key}" if path else str(key))
    elif isinstance(tree, list):
        for number, value in enumerate(tree):
            refuse_control_characters(value, f"{path}[{number}]")
    elif isinstance(tree, str):
        bad = next((one for one in tree if unicodedata.category(one) in ("Cc", "Cs", "Zl", "Zp")), None)
        if bad is not None:
            what = "half a character" if unicodedata.category(bad) == "Cs" else "a control character"
            raise ValueError(
                f"{path}={_told(tree)} holds {what} (U+{ord(bad):04X}); give a string of one line without it"
            )


def flat(tree: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """Returns key -> value of a plain tree, with keys such as `optim.lr`."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= flat(value, f"{path}{key}.") if isinstance(value, dict) else {f"{path}{key}": value}
    return found


def as_lists(tree: Any) -> Any:
    """Returns a plain tree as JSON gives it back: its tuples are lists."""
    if isinstance(tree, dict):
        return {key: as_lists(value) for key, value in tree.items()}
    return [as_lists(value) for value in tree] if isinstance(tree, list | tuple) else tree


def told_apart(one: Any, other: Any) -> tuple[str, str]:
    """Returns two values that differ as short texts that do: of long ones what stands where they part, of trees what is another."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        one, other = (
            {key: value for key, value in this.items() if key not in that or that[key] != value}
            for this, that in ((one, other), (other, one))
        )
    texts = str(one), str(other)
    same = next((n for n, (a, b) in enumerate(zip(*texts, strict=False)) if a != b), min(map(len, texts)))
    first = max(same - 24, 0) if same >= 12 else 0

    def short(text: str) -> str:
        if len(text) <= 24:
            return text
        last = first + 12 if same < 12 else same + 12
        return ("..." if first else "") + text[first:last] + ("..." if last < len(text) else "")

    return short(texts[0]), short(texts[1])


def without_password(text: str) -> str:
    """Returns the text with stars for the password of every URL in it."""
    hidden = re.sub(
        r"(://[^:/?#@\s]*:)\S*@", r"\1***@", text
    )  # whatever is before the last @: databases take any there
    return re.sub(r"(?i)([?&;](?:password|passwd|pwd|token)=)[^&;#\s]*", r"\1***", hidden)


def _told(text: str) -> str:
    text = without_password(text)
    return ascii(text if len(text) <= 60 else f"{text[:57]}...")


def check_folder_name(key: str, name: str) -> None:
    """Refuses a name by which a run or a sweep cannot be called. Raises ValueError."""
    if name in ("", ".", "..") or "/" in name:
        raise ValueError(f"{key}={name!r}: a run name is the name of a folder, and holds no '/'")
    if (size := len(os.fsencode(name))) > LONGEST_NAME:
        raise ValueError(f"{key}={_told(name)} has {size} bytes: a run name has at most {LONGEST_NAME}")
