"""What was given: a command line and the files it names, as one list of overrides KEY=VALUE, of which the last wins.

    steps=10    --steps=10    --steps 10           are one and the same; --compile is compile=true
    config=my.yaml                                 a YAML of KEY: VALUE, or a run's config.yaml; several, in order
    resume=runs/NAME                               alone: what that run was started with, in its folder
    --config-dir DIR                               more choices of the groups: DIR/optim/mine.yaml is optim=mine

Nothing here needs torch, and nothing of a file is run: no tag of YAML, no resolver.
"""

import argparse
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from hydra.core.override_parser.types import ChoiceSweep, Override, QuotedString

from rowwise.launch.choices import GROUPS
from rowwise.launch.model_folder import as_code, told_of_named
from rowwise.launch.overrides import SEARCHPATH, parse, quoted, spelt
from rowwise.launch.settings_file import read_settings, words_of
from rowwise.trainer.run_length import ALTERNATIVES

WHOLE = {"name", "run_dir", "steps", "batch", "model", "data", "optim", "schedule", "parallel", "precision"}
OF_A_TRIAL = ("name", "run_dir")


class Arguments(argparse.ArgumentParser):
    """Options of ours, and KEY=VALUE in the ways in which people write it. What it refuses is one line, with exit code 2."""

    def __init__(self, prog: str, description: str | None) -> None:
        super().__init__(
            prog=prog,
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        self.add_argument(
            "--config-dir", action="append", default=[], metavar="DIR", help="with more choices of the groups, as YAML"
        )

    def read(self, arguments: Sequence[str] | None, given: Sequence[str]) -> argparse.Namespace:
        """Reads the options of `arguments`, or else of `given`; `overrides` are KEY=VALUE, --config-dir among them."""
        words = list(given if arguments is None else arguments)
        options = self.parse_intermixed_args(self._rewritten(words))
        for folder in options.config_dir:
            options.overrides.append(f"{SEARCHPATH}=[{quoted('file://' + str(Path(folder).expanduser().absolute()))}]")
        return options

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"refused: {' '.join(message.split())}; --help says what is possible\n")

    def _rewritten(self, words: list[str]) -> list[str]:
        """--KEY=VALUE and --KEY VALUE as KEY=VALUE, where --KEY is no option of ours; --KEY alone as KEY=true."""
        found: list[str] = []
        rest = iter(range(len(words)))
        for number in rest:
            word, following = words[number], words[number + 1 : number + 2]
            name, equals, value = word.partition("=")
            if name in self._option_string_actions:
                found.append(word)
                if not equals and self._option_string_actions[name].nargs is None:
                    found += following
                    next(rest, None)
            elif not re.fullmatch(r"--[A-Za-z][\w.-]*", name):
                found.append(word)
            elif equals:
                found.append(f"{_underscored(name)}={value}")
            elif following and not re.match(r"--?[A-Za-z]|[+~]*[A-Za-z_][\w./@]*=", following[0]):
                found.append(f"{_underscored(name)}={following[0]}")
                next(rest, None)
            else:
                found.append(f"{_underscored(name)}=true")
        return found


def _underscored(option: str) -> str:
    return option.removeprefix("--").replace("-", "_")


def gather(words: Sequence[str], of: str = "train") -> list[str]:
    """Returns the overrides of a command line, files read and put in their places. Raises ValueError.

    `of`: a `sweep` gives every trial a name and a folder of its own, and those of a file are left out; a `worker` was started by
    somebody else, who said how many, and not a run's whole configuration.
    """
    items: list[_Item] = []
    for word in map(as_code, words):
        override = parse(word)
        if override.key_or_group == "config":
            for number, path in enumerate(_paths(override)):
                items += _of_file(path, f"{len(items)}.{number}", of)
        else:
            items.append(_Item(str(override.key_or_group), spelt(override), None))
    if of != "sweep" and (run := _run_of(items)) is not None:
        items = [*_of_run(run, of), *(item for item in items if item.key != "resume")]
    whole = [item for item in items if item.file is not None and item.whole]
    if whole and any(item.key == "experiment" for item in items):
        raise ValueError(
            f"experiment= beside {whole[0].path}, which has every key: an experiment stands before those, and would change "
            "nothing; leave one of them out"
        )
    return [item.text for item in _lasting(_without_code(items))]


@dataclass(frozen=True)
class _Item:
    """An override, and the file that it is from."""

    key: str
    text: str
    file: str | None
    path: str = ""
    whole: bool = False


def _without_code(items: list[_Item]) -> list[_Item]:
    """Without the code that a file names, where a word names some too. Raises ValueError where none does."""
    found, spoken = list[_Item](), any(item.key == "model.own" and item.file is None for item in items)
    for item in items:
        key, _, _ = as_code(item.text).partition("=")
        if key != "model.own" or item.file is None:
            found.append(item)
        elif not spoken and (value := parse(item.text).value()) is not None:
            named = value.text if isinstance(value, QuotedString) else str(value)
            raise ValueError(told_of_named(item.path, named, f"model.own={named}"))
    return found


def _lasting(items: list[_Item]) -> Iterable[_Item]:
    """Without what a file says below a group of which something behind it makes another choice, or by another key that
    something behind it says otherwise (steps, tokens and epochs)."""
    for number, item in enumerate(items):
        same = next((keys for keys in ALTERNATIVES.values() if item.key in keys), ())
        if item.file is not None and any(other.key in same and other.key != item.key for other in items[number + 1 :]):
            continue
        group = item.key.partition(".")[0]
        later = [other for other in items[number + 1 :] if other.key == group and group in GROUPS]
        if item.file is not None and any(other.file != item.file for other in later):
            chosen = next((one.text for one in items if one.file == item.file and one.key == group), None)
            if item.key == group or later[-1].text != chosen:
                continue
        yield item


def _paths(override: Override) -> list[str]:
    """Of config=A, config=[A,B] and config=A,B."""
    value: Any = override.value()
    value = value.list if isinstance(value, ChoiceSweep) else value
    values = value if isinstance(value, list) else [value]
    paths = [path.text if isinstance(path, QuotedString) else path for path in values]
    if not paths or not all(isinstance(path, str) and path for path in paths):
        raise ValueError(f"{override.input_line}: give the path of a YAML file, such as config=my.yaml")
    return paths


def _of_file(path: str, number: str, of: str) -> list[_Item]:
    """The overrides that a file stands for: those of `KEY: VALUE`, or of a run's whole configuration."""
    if Path(path).expanduser().is_dir():
        raise ValueError(
            f"config={path} is a folder; give a YAML file in it, such as config={path.rstrip('/')}/config.yaml"
        )
    tree = read_settings(Path(path).expanduser(), f"config={path}")
    whole = tree.keys() >= WHOLE
    if whole:
        tree = _as_started(tree, of)
    if of == "sweep":
        tree = _of_every_trial(tree, path, whole)
    return [
        _Item(key, text, number, f"config={path}", whole) for key, text in words_of(tree, f"config={path}", not whole)
    ]


def _of_every_trial(tree: dict[str, Any], path: str, whole: bool) -> dict[str, Any]:
    """Without what a trial has of its own, and what a run that is no trial began from; says so of what somebody wrote."""
    own = [key for key in OF_A_TRIAL if key in tree]
    if own and not whole:
        told = f"config={path}: its {' and '.join(own)} {'are' if own[1:] else 'is'} left out"
        print(f"{told}; a sweep gives every trial its own", file=sys.stderr)
    left = {*own, "resume"} if whole or tree.get("resume") == "auto" else {*own}
    return {key: value for key, value in tree.items() if key not in left}


def _run_of(items: list[_Item]) -> Path | None:
    """The run that `resume=runs/NAME` goes on with: no other is named, and it kept what it was started with."""
    values = [parse(item.text).value() for item in items if item.key == "resume"]
    others = {"name", "run_dir", "model", "model.name", "experiment"}
    if not values or not isinstance(values[-1], str) or values[-1] in ("auto", "never"):
        return None
    if any(item.key in others or item.file is not None for item in items):
        return None
    folder = Path(values[-1]).expanduser()
    return folder if (folder / "config.yaml").is_file() else None


def _of_run(folder: Path, of: str) -> list[_Item]:
    path = folder / "config.yaml"
    tree = read_settings(path, f"resume={folder}")
    if not tree.keys() >= WHOLE:
        raise ValueError(f"resume={folder}: {path} is not what a run writes; give name= and all other keys yourself")
    started = _as_started(tree, of) | {"run_dir": str(folder), "name": tree["name"]}
    if started.get("resume") == "never":
        started["resume"] = "auto"
    if Path(str(tree["run_dir"])).expanduser().resolve() == folder.resolve():
        started["run_dir"] = tree["run_dir"]
    return [_Item(key, text, "run", str(path), True) for key, text in words_of(started, str(path), False)]


def _as_started(tree: dict[str, Any], of: str) -> dict[str, Any]:
    """A run's whole configuration without what follows from the rest: how many ranks it had, and a folder of its name."""
    tree = dict(tree)
    if isinstance(tree["parallel"], dict):
        tree["parallel"] = tree["parallel"] | {"shard": -1}
    if tree["run_dir"] == f"runs/{tree['name']}":
        del tree["run_dir"]
    tree = _as_asked(tree)
    if of == "worker":
        tree.pop("nproc", None)
    return tree


def _as_asked(tree: dict[str, Any]) -> dict[str, Any]:
    """Without what a length that was asked in tokens or epochs came to, which stands beside it."""
    for keys in ALTERNATIVES.values():
        section, _, _ = keys[0].rpartition(".")
        node = tree[section] if section else tree
        if not isinstance(node, dict):
            continue
        first, *others = (key.rpartition(".")[2] for key in keys)
        asked = [key for key in others if node.get(key) is not None]
        node = {key: value for key, value in node.items() if key not in (first, *others) or key in (asked or [first])}
        tree = tree | {section: node} if section else node
    return tree
