"""What answers an override that cannot be taken: how it is called here, and the numbers of this configuration."""

import difflib
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from rowwise.launch.choices import GROUPS, keys_of
from rowwise.launch.words import data, layout, model, records, training
from rowwise.launch.words.choices import CHOICES, MISSING
from rowwise.launch.words.word import Word
from rowwise.trainer.keys import unknown_key, without_password

MOST_ANSWERS = 30  # in the one line of a refusal
WORDS = (*training.WORDS, *layout.WORDS, *model.WORDS, *data.WORDS, *records.WORDS)


def unknown_keys(given: Sequence[tuple[str, str]], tree: Mapping[str, Any]) -> str:
    """Returns what is said of overrides (key, value) whose keys do not exist in the configuration `tree`."""
    told = [_unknown(key, without_password(value), tree) for key, value in given[:MOST_ANSWERS]]
    more = [f"and {len(given) - MOST_ANSWERS} more"] if len(given) > MOST_ANSWERS else []
    return "; ".join([*told, *more])


def _unknown(key: str, value: str, tree: Mapping[str, Any]) -> str:
    if (elsewhere := _choices_with(key)) and key.partition(".")[0] in tree:
        possible = ", ".join(sorted(tree[key.partition(".")[0]]))
        group = key.partition(".")[0]
        return f"unknown key {key}: {group} has {possible}; {key} is of {_of(group, elsewhere)}"
    if (word := _word(key)) is not None and (said := _answer(word, key, value, tree)) is not None:
        return f"unknown key {key}: {said}"
    node: Any = tree
    for part in key.split(".")[:-1]:
        node = node.get(part) if isinstance(node, Mapping) else None
    siblings = [str(name) for name in node] if isinstance(node, Mapping) else ["nothing below it"]
    said = unknown_key(key, siblings)
    if "did you mean" not in said and (near := _elsewhere(key, tree)):
        said += f"; did you mean {near}?"
    return said


def unknown_choice(group: str, name: str, possible: Sequence[str]) -> str:
    """Returns what is said of a choice that a group does not have."""
    said = f"{group}={without_password(name)}: possible are {', '.join(possible)}"
    if (missing := MISSING.get(group, {}).get(_plain(name))) is not None:
        return f"{said}; {missing}"
    if (near := _choice(group, name, possible)) is not None:
        return f"{said}; did you mean {near}?{' (Any other is its Hugging Face folder, model=FOLDER.)' * (group == 'model')}"
    if group == "model":
        said += "; a Hugging Face folder is model=FOLDER, a file of your own --config-dir DIR"
    if group == "data":
        said += "; files of your own are data=text (or tokens, hf) and data.files=PATH"
    return said


def _answer(word: Word, key: str, value: str, tree: Mapping[str, Any]) -> str | None:
    """What to write instead of key=value; None where that is the key itself."""
    if word.group:
        return _answer_of_group(word.group, value)
    plain = value.strip("'\"[] ").lower()
    write = word.values.get(plain) or word.values.get((plain.split() or [""])[0]) or word.write
    if not write and word.values:
        write = " or ".join(dict.fromkeys(filter(None, word.values.values())))
    if not write:
        return word.means
    write = write.format(value=value, **numbers(tree, plain))
    if write.partition("=")[0] == key:
        return None
    means = word.means.format(value=value, **numbers(tree, plain))
    return f"write {write}" + (f" ({means})" if means else "") + _with(write, tree)


def _answer_of_group(group: str, value: str) -> str:
    possible = tuple(keys_of(group))
    plain = value.strip("'\"[] ")
    choice = plain if plain in possible else _choice(group, plain, possible)
    if choice is None:
        return f"write {group}=NAME; {unknown_choice(group, plain, possible)}"
    return f"write {group}={choice}"


def _with(write: str, tree: Mapping[str, Any]) -> str:
    """The choices under which the keys of `write` exist, where the present one is another."""
    words = [part.partition("=")[0] for part in write.split() if "=" in part]
    for key in words:
        group, _, leaf = key.partition(".")
        if group in words or not leaf or not isinstance(tree.get(group), Mapping) or leaf in tree[group]:
            continue
        if elsewhere := _choices_with(key):
            return f"; it is of {_of(group, elsewhere)}, now {group}={tree[group].get('name')}"
    return ""


def _of(group: str, choices: Sequence[str]) -> str:
    *others, last = choices
    return f"{group}={', '.join(others)} or {last}" if others else f"{group}={last}"


def _choices_with(key: str) -> list[str]:
    """The choices of a group that have a key, such as `optim.rank`."""
    group, _, leaf = key.partition(".")
    if group not in GROUPS or group == "experiment" or not leaf:
        return []
    return [name for name, keys in keys_of(group).items() if leaf in keys]


def numbers(tree: Mapping[str, Any], value: str) -> dict[str, str]:
    """Returns what the answers say of this configuration, and of the number `value` in it. Of a layout that is not known the ranks
    are those of `nproc`, or one."""
    batch, optim, parallel = tree["batch"], tree["optim"], tree["parallel"]
    size, micro, length = batch["global_size"], batch["micro_size"], batch["seq_len"]
    ranks = _data_ranks(tree.get("nproc"), parallel)
    number, rate = _number(value), optim.get("lr")
    known = number or 0.0
    beta1, beta2 = (optim.get("betas") or [0.9, 0.95])[:2]
    return {
        "global_size": str(size),
        "micro_size": str(micro),
        "tokens": _counted(size, length),
        "accumulation": _accumulation(size, micro, ranks),
        "size_of_accumulation": _whole(number, lambda n: n * micro * ranks),
        "steps_of_samples": _whole(number, lambda n: math.ceil(n / size)),
        "seconds_of_minutes": _whole(number, lambda n: 60 * n),
        "floor": f"{known / rate:.3g}" if known > 0 and isinstance(rate, float) and rate > 0 else "SHARE",
        "power": f"{2.0**known:.0f}" if 0 < known < 100 else "N",
        "rest": f"{1 - known:.6g}" if 0 < known < 1 else "SHARE",
        "beta1": str(beta1),
        "beta2": str(beta2),
        "heads": str(tree["model"]["heads"]),
        "kv_heads": str(tree["model"]["kv_heads"]),
    }


def _data_ranks(nproc: Any, parallel: Mapping[str, Any]) -> int:
    shared = math.prod(n for key in ("pipeline", "ulysses", "ring") if isinstance(n := parallel[key], int))
    return max(1, nproc // max(1, shared)) if isinstance(nproc, int) else 1


def _accumulation(size: Any, micro: Any, ranks: int) -> str:
    if not all(isinstance(n, int) and n > 0 for n in (size, micro)):
        return "what they are"
    return f"{size} / ({micro} x {ranks}) = {size / (micro * ranks):g}"


def _counted(size: Any, length: Any) -> str:
    return f"{size * length:,}" if isinstance(size, int) and isinstance(length, int) else "global_size x seq_len"


def _whole(number: float | None, of: Any) -> str:
    try:
        return "N" if number is None or number <= 0 else str(int(of(int(number))))
    except (TypeError, ValueError, ZeroDivisionError, OverflowError):
        return "N"


def _number(text: str) -> float | None:
    try:
        number = float(text.replace("_", ""))
    except ValueError:
        return None
    return number if math.isfinite(number) else None


@functools.cache
def _table() -> dict[str, Word]:
    return {name: word for word in WORDS for name in word.names.split()}


def _word(key: str) -> Word | None:
    """What is known of a key, of its last parts, or of its last one."""
    parts = key.lower().replace("-", "_").replace(":", ".").split(".")
    return next((found for i in range(len(parts)) if (found := _table().get(".".join(parts[i:])))), None)


def _plain(name: str) -> str:
    return name.strip("'\" ").lower().rpartition("/")[2]


def _choice(group: str, name: str, possible: Sequence[str]) -> str | None:
    """The choice that is meant by a name from elsewhere, or a mistyped one."""
    plain, table = _plain(name), CHOICES.get(group, {})
    spelt = plain.replace("-", "_").replace(".", "_").replace(" ", "_")
    for one in (plain, spelt):
        if one in table or one in possible:
            return table.get(one, one)
    near = difflib.get_close_matches(spelt, possible, n=1)
    return near[0] if near else None


def _elsewhere(key: str, tree: Mapping[str, Any]) -> str | None:
    """A key of the same last part in another section, or nearly so."""
    leaf = key.rpartition(".")[2]
    keys = [
        f"{name}.{inner}"
        for name, node in tree.items()
        if isinstance(node, Mapping)
        for inner in node
        if inner != "name"
    ]
    same = [one for one in [*tree, *keys] if one.rpartition(".")[2] == leaf]
    if same:
        return same[0]
    near = difflib.get_close_matches(leaf, [one.rpartition(".")[2] for one in keys], n=1, cutoff=0.8)
    return next((one for one in keys if near and one.rpartition(".")[2] == near[0]), None)
