"""What was given: a command line and the files it names, as one list of overrides KEY=VALUE, of which the last wins.

    steps=10    --steps=10    --steps 10           are one and the same; --compile is compile=true
    config=my.yaml                                 a YAML of KEY: VALUE, or a run's config.yaml; several, in order
    resume=runs/NAME                               alone: what that run was started with, in its folder
    --config-dir DIR                               more choices of the groups: DIR/optim/mine.yaml is optim=mine

Nothing here needs torch, and nothing of a file is run: no tag of YAML, no resolver.
"""

import argparse
import math
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Override, OverrideType, QuotedString
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from rowwise.launch.choices import GROUPS, choices_of, sections
from rowwise.trainer.keys import refuse_control_characters, without_password
from rowwise.trainer.run_length import ALTERNATIVES

SEARCHPATH = "hydra.searchpath"  # how --config-dir stands in a list of overrides
WHOLE = {"name", "run_dir", "steps", "batch", "model", "data", "optim", "schedule", "parallel", "precision"}
OF_A_TRIAL = ("name", "run_dir")
LARGEST_BYTES = 1_000_000  # of a file of settings
_KEY = re.compile(r"[A-Za-z_][\w.]*")
_PLAIN = re.compile(r"""(?!=)[^\[\]{}()'"$,\\]*""")  # no character that means something in a value


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
    for word in words:
        override = parse(word)
        if override.key_or_group == "config":
            for number, path in enumerate(_paths(override)):
                items += _of_file(path, f"{len(items)}.{number}", of)
        else:
            items.append(_Item(_key(override), spelt(override), None))
    if of != "sweep" and (run := _run_of(items)) is not None:
        items = [*_of_run(run, of), *(item for item in items if item.key != "resume")]
    whole = [item for item in items if item.file is not None and item.whole]
    if whole and any(item.key == "experiment" for item in items):
        raise ValueError(
            f"experiment= beside {whole[0].path}, which has every key: an experiment stands before those, and would change "
            "nothing; leave one of them out"
        )
    return [item.text for item in _lasting(items)]


@dataclass(frozen=True)
class _Item:
    """An override, and the file that it is from."""

    key: str
    text: str
    file: str | None
    path: str = ""
    whole: bool = False


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


def parse(word: str) -> Override:
    """Reads an override as Hydra reads it; text that Hydra's grammar has no room for, such as ~/folder, is text. Raises
    ValueError."""
    key, equals, value = word.partition("=")
    refuse_control_characters({key: value})
    bare, told = key.lstrip("+"), without_password(word)
    if key.startswith("~"):
        raise ValueError(f"{told}: no key can be taken away; leave it as it is, or give it another value")
    if not equals:
        raise ValueError(_no_pair(word))
    if not re.fullmatch(r"[A-Za-z_][\w./-]*", bare):
        raise ValueError(f"{told}: {bare or 'nothing'} is no key; give KEY=VALUE, such as optim.lr=1e-3")
    parser = OverridesParser.create()
    for text in (value, quoted(value)) if _PLAIN.fullmatch(value) else (value,):
        try:
            override = parser.parse_override(f"{bare}={text}")
            override.value()
            return override
        except HydraException:
            continue
    raise ValueError(
        f"{told}: the value cannot be read; a list is [a,b], a table {{a: 1}}, and text that holds one of []{{}}()'\"$, stands "
        f"in quotes of its own: \"{bare}='...'\""
    )


def as_typed(words: Sequence[str]) -> list[str]:
    """Returns the words of a command line, --config-dir as it is written there."""
    found: list[str] = []
    for word in words:
        if not word.startswith(f"{SEARCHPATH}=["):
            found.append(word)
            continue
        folders: Any = parse(word).value()
        for folder in folders:
            found += ["--config-dir", str(folder).removeprefix("file://")]
    return found


def _no_pair(word: str) -> str:
    if word.endswith((".yaml", ".yml", ".json")):
        return f"{word}: an argument is KEY=VALUE; give config={word}"
    group = next((group for group in GROUPS if word in choices_of(group)), None)
    example = f"{group}={word}" if group else f"{word}=VALUE" if _KEY.fullmatch(word) else "optim.lr=1e-3"
    return f"{word}: an argument is KEY=VALUE, such as {example}"


def _key(override: Override) -> str:
    return str(override.key_or_group)


def spelt(override: Override) -> str:
    """Returns an override that was read, as a word."""
    assert override.type == OverrideType.CHANGE and override.input_line is not None
    return override.input_line


def quoted(value: str, interpolate: bool = False) -> str:
    """Quotes text as the value of an override that means these characters and nothing else, but for ${KEY} where `interpolate`."""
    escaped = re.sub(r"(\\*)('|$)", lambda found: 2 * found[1] + ("\\'" if found[2] else ""), value)
    return "'" + (escaped if interpolate else escaped.replace("${", "\\${")) + "'"


# Files.


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
    return [_Item(key, text, number, f"config={path}", whole) for key, text in _flat(tree, f"config={path}", not whole)]


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
    return [_Item(key, text, "run", str(path), True) for key, text in _flat(started, str(path), False)]


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


def read_settings(path: Path, what: str) -> dict[str, Any]:
    """Reads a YAML file (or JSON, which is one) of keys and values, as plain data. Raises ValueError."""
    try:
        if path.stat().st_size > LARGEST_BYTES:
            raise ValueError(f"{what}: the file has more than {LARGEST_BYTES:,} bytes, as no configuration has")
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text in UTF-8"
        raise ValueError(f"{what} cannot be read: {reason}") from None
    try:
        for token in yaml.scan(text, yaml.SafeLoader):
            if isinstance(token, yaml.TagToken | yaml.AliasToken | yaml.AnchorToken):
                told = "a tag" if isinstance(token, yaml.TagToken) else "an anchor"
                raise ValueError(
                    f"{what}, line {token.start_mark.line + 1}: {told} of YAML is not read; write the value out"
                )
        root = yaml.compose(text, yaml.SafeLoader)
        if not isinstance(root, yaml.MappingNode | None):
            raise ValueError(f"{what} holds no KEY: VALUE, such as `optim.lr: 1e-3`")
        # Of this loader 1e-3 is a number, which it is not to YAML 1.1, and a key that stands there twice is an error.
        tree = OmegaConf.to_container(OmegaConf.create(text), resolve=False) if root else {}
    except yaml.YAMLError as error:
        raise ValueError(f"{what} is no YAML{_place(error)}") from None
    except (OmegaConfBaseException, RecursionError, AttributeError, TypeError):
        raise ValueError(f"{what} is no YAML of KEY: VALUE, such as `optim.lr: 1e-3`") from None
    assert isinstance(tree, dict)
    return {str(key): value for key, value in tree.items()}


def _place(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None)
    where = f": line {mark.line + 1}, column {mark.column + 1}" if mark is not None else ""
    return f"{where}: {problem}" if where and problem else where


def _flat(tree: dict[str, Any], what: str, interpolate: bool) -> Iterable[tuple[str, str]]:
    """Key -> word. A group's value is the name of a choice, or a table whose `name` chooses and whose other keys are set."""
    if "defaults" in tree:
        raise ValueError(f"{what}: `defaults` is of Hydra's own files; write `optim: adamw8bit` for a choice")
    for key, value in tree.items():
        if not _KEY.fullmatch(key) or key == "config":
            raise ValueError(f"{what}: {key!r} is no key; write KEY: VALUE, such as `optim.lr: 1e-3`")
        for full, leaf in _leaves(key, value, what):
            choice = full in GROUPS and isinstance(leaf, str) and re.fullmatch(r"[\w.-]+", leaf)
            yield full, f"{full}={leaf if choice else text_of(leaf, f'{what}: {full}', interpolate)}"


def _leaves(key: str, value: Any, what: str) -> Iterable[tuple[str, Any]]:
    if not isinstance(value, dict):
        yield key, value
        return
    if not all(isinstance(inner, str) and _KEY.fullmatch(inner) for inner in value):
        raise ValueError(f"{what}: the keys of {key} are no names; write KEY: VALUE")
    _refuse_code(value, f"{what}: {key}")
    name = value.get("name")
    chooses = key in GROUPS and isinstance(name, str) and name in choices_of(key)
    if chooses:
        yield key, name
    for inner, leaf in value.items():
        if isinstance(leaf, dict) and key.partition(".")[0] not in sections():
            yield from _leaves(f"{key}.{inner}", leaf, what)
        elif not (chooses and inner == "name"):
            yield f"{key}.{inner}", leaf


def _refuse_code(table: dict[Any, Any], what: str) -> None:
    if "_target_" in table:
        raise ValueError(f"{what} names code by _target_, and none is run from a file; leave it out")


def text_of(value: Any, what: str, interpolate: bool = False) -> str:
    """Returns a value of a file as the value of an override. Raises ValueError."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, int | float):
        return repr(value) if math.isfinite(value) else str(value)
    if isinstance(value, str):
        if interpolate and re.search(r"\$\{[^}]*:", value):
            raise ValueError(
                f"{what}={value}: a file looks nothing up but keys of the configuration; give it on the command line"
            )
        return quoted(value, interpolate)
    if isinstance(value, list):
        return "[" + ",".join(text_of(one, what, interpolate) for one in value) + "]"
    if isinstance(value, dict):
        _refuse_code(value, what)
        if not all(isinstance(key, str) and _KEY.fullmatch(key) for key in value):
            raise ValueError(f"{what}: its keys are no names")
        return "{" + ",".join(f"{key}: {text_of(one, what, interpolate)}" for key, one in value.items()) + "}"
    raise ValueError(
        f"{what}: {type(value).__name__} is no value here; give text, a number, true, false, null or a list"
    )
