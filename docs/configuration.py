"""The tables of docs/configuration.md, made from the dataclasses: `python docs/configuration.py` writes them anew.

A key is a field. Its type is the field's, its default what conf/ says, its meaning the clause that its name begins in the
docstring of the dataclass ("`rank`: r of the projected gradient"), or else the comment beside it in conf/, and what a resume does
with it stands in its type (`rowwise.conf.option`).
"""

import re
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import NoneType
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

import yaml

from rowwise.conf.option import resume_of
from rowwise.launch.slurm import SlurmConfig
from rowwise.launch.sweep.config import SweepConfig
from rowwise.trainer.config import TrainConfig

ROOT = Path(__file__).parents[1]
CONF = ROOT / "conf"
PAGE = ROOT / "docs" / "configuration.md"
MARK = "<!-- What follows is written by `python docs/configuration.py`. -->\n"
RESUME = {
    "fixed": "fixed",
    "fixed as steps": "fixed, as steps",
    "ask": "fixed, but for `resume=PATH`",
    "may change": "may change",
    "apart": "-",
}
HEAD = "| key | type | default | meaning | on resume |\n|---|---|---|---|---|\n"


class Option(NamedTuple):
    """A key of one choice of a group. `meaning`: by its docstring; `comment`: by the file of its default."""

    key: str
    kind: str
    default: str
    meaning: str
    comment: str
    resume: str


def page() -> str:
    """The whole page: what was written by hand, and the tables."""
    written = PAGE.read_text().partition(MARK)[0]
    return written + MARK + "\n" + "\n".join(section(*one) for one in sections())


def sections() -> list[tuple[str, str, dict[str, tuple[Any, Path]]]]:
    """(its key, its heading, choice -> its dataclass and its file), in the order of the dataclass of a run."""
    hints, train = get_type_hints(TrainConfig), CONF / "train.yaml"
    found: list[tuple[str, str, dict[str, tuple[Any, Path]]]] = [("", "The run", {"": (TrainConfig, train)})]
    for name, hint in hints.items():
        kinds = [kind for kind in parts(hint) if is_dataclass(kind)]
        files = sorted((CONF / name).glob("*.yaml"))
        if kinds and not files:
            found.append((name, f"`{name}`", {"": (kinds[0], train)}))
        elif len(kinds) == 1:
            choice = {path.stem: (kinds[0], path) for path in files if path.stem in ("default", "tiny")}
            found.append((name, f"`{name}`", choice))
        elif kinds:
            by_name = {get_type_hints(kind)["name"].__args__[0]: kind for kind in kinds}
            found.append((name, f"`{name}`", {path.stem: (by_name[path.stem], path) for path in files}))
    found.append(("sweep", "`sweep`, of `rowwise sweep`", {"": (SweepConfig, CONF / "sweep.yaml")}))
    found.append(("slurm", "`slurm`, of `rowwise slurm`", {"": (SlurmConfig, CONF / "slurm.yaml")}))
    return found


def section(name: str, heading: str, choices: dict[str, tuple[Any, Path]]) -> str:
    """A heading, the choices there are, and a row for each key of any of them."""
    rows: dict[tuple[str, str], dict[str, Option]] = {}
    for choice, (kind, path) in choices.items():
        for option in options(name, kind, path):
            rows.setdefault((option.key, option.kind), {})[choice] = option
    lines = [row(of_choice, len(choices)) for of_choice in rows.values()]
    return f"### {heading}\n\n{introduction(name, choices)}{HEAD}{''.join(lines)}"


def introduction(name: str, choices: dict[str, tuple[Any, Path]]) -> str:
    """The names that a group can be given, and what each is."""
    names = sorted(path.stem for path in (CONF / name).glob("*.yaml")) if name else []
    if len(names) < 2:
        return ""
    if len(choices) == 1:
        return f"Choices: {', '.join(f'`{name}={one}`' for one in names)}; the defaults here are those of `{next(iter(choices))}`.\n\n"
    return f"Choices: {', '.join(f'`{name}={one}`' for one in names)}.\n\n"


def row(options_: dict[str, Option], choices: int) -> str:
    """One key: what most choices say, and after it what others do. Where a docstring speaks, comments are not asked."""
    if not any(option.meaning for option in options_.values()):
        options_ = {choice: option._replace(meaning=option.comment) for choice, option in options_.items()}
    of = "" if len(options_) == choices else f" (of {', '.join(f'`{choice}`' for choice in options_)})"
    first = next(iter(options_.values()))
    cells = [f"`{first.key}`{of}", first.kind]
    for column in ("default", "meaning", "resume"):
        by_value: dict[str, list[str]] = {}
        for choice, option in options_.items():
            if value := getattr(option, column):
                by_value.setdefault(value, []).append(choice)
        most = max(by_value, key=lambda value: len(by_value[value]), default="")
        others = [f"{', '.join(of)}: {value}" for value, of in by_value.items() if value != most]
        cells.append("; ".join([most, *others]))
    return f"| {' | '.join(cells)} |\n"


def options(name: str, kind: Any, path: Path) -> list[Option]:
    """The keys of the dataclass `kind`, whose defaults stand in `path`, at the top or below `name`."""
    tree, comments = yaml.safe_load(path.read_text()), comments_of(path)
    below = bool(name) and path.name in ("train.yaml", "sweep.yaml", "slurm.yaml")
    defaults, before = (tree[name], f"{name}.") if below else (tree, "")
    return _options(name, kind, defaults, before, comments)


def _options(name: str, kind: Any, defaults: dict[str, Any], before: str, comments: dict[str, str]) -> list[Option]:
    hints, resumes, told = get_type_hints(kind), resume_of(kind), meanings(kind)
    found = []
    for field in fields(kind):
        hint = hints[field.name]
        is_group = kind is TrainConfig and any(map(is_dataclass, parts(hint)))
        is_choice = field.name == "name" and get_origin(options_of_type(hint)[0]) is Literal
        if is_group or is_choice:
            continue
        if is_dataclass(hint):
            inner = before + field.name + "."
            found += _options(f"{name}.{field.name}", hint, defaults[field.name], inner, comments)
            continue
        meaning, comment = told.get(field.name, ""), comments.get(before + field.name, "")
        default = f"`{shown(defaults[field.name])}`"
        key = f"{name}.{field.name}" if name else field.name
        resume = RESUME[resumes[field.name] or "apart"]
        found.append(Option(key, told_type(hint), default, meaning, comment, resume))
    return found


def meanings(kind: Any) -> dict[str, str]:
    """Field -> what the docstring of its dataclass, or of the nearest one that has something to say, says of it. A sentence or
    clause that begins with names of fields is of those, with all that follows until the next such."""
    found: dict[str, str] = {}
    for one in reversed(kind.__mro__):
        if not is_dataclass(one) or (one.__doc__ or "").startswith(f"{one.__name__}("):
            continue
        names = "|".join(field.name for field in fields(one))
        begins = rf"((?:`(?:{names})(?:=[^`]*)?`(?:, (?=`)|))+)(:?) "
        text = " ".join((one.__doc__ or "").split())
        pieces = re.split(rf"(?:^|(?<=[.;] )){begins}", text)
        for which, colon, rest in zip(pieces[1::3], pieces[2::3], pieces[3::3], strict=True):
            said = rest.strip().rstrip(".;")
            given = re.findall(r"`([^`]*)`", which)
            for name in given:
                key, _, value = name.partition("=")
                found[key] = said if colon else f"`{value}` {said}" if value else said
    return found


def comments_of(path: Path) -> dict[str, str]:
    """Key, dotted, -> the comment on its line."""
    found, section = {}, ""
    for line in path.read_text().splitlines():
        if match := re.match(r"( *)(\w+):([^#]*)(?:#\s*(.*))?$", line):
            indent, key, value, comment = match.groups()
            if not indent:
                section = key if not value.strip() else ""
            found[f"{section}.{key}" if indent and section else key] = comment or ""
    return found


def shown(value: Any) -> str:
    """A default as a command line has it."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, list):
        return f"[{', '.join(map(shown, value))}]"
    return f"{value:g}" if isinstance(value, float) and not 1e-3 <= value < 1e6 else str(value)


def told_type(hint: Any) -> str:
    """The type of a field in a user's words."""
    words = {int: "whole number", float: "number", str: "text", bool: "true or false", NoneType: "null"}
    told: list[str] = []
    for one in options_of_type(hint):
        if get_origin(one) is Literal:
            told += [f"`{value}`" for value in get_args(one)]
        elif get_origin(one) in (list, tuple):
            told.append(f"list of {told_type(get_args(one)[0])}")
        else:
            told.append(words.get(one, "keys"))
    told = list(dict.fromkeys(told))
    return " or ".join([", ".join(told[:-1]), told[-1]] if told[1:] else told)


def options_of_type(hint: Any) -> list[Any]:
    """The members of a union, without what is said beside them."""
    if hasattr(hint, "__metadata__"):
        return options_of_type(hint.__origin__)
    if get_origin(hint) in (Literal, list, tuple):
        return [hint]
    return [part for one in get_args(hint) for part in options_of_type(one)] or [hint]


def parts(hint: Any) -> list[Any]:
    """The types that a field may have, those of a list too."""
    return [part for one in options_of_type(hint) for part in (map(_bare, get_args(one)) if get_args(one) else [one])]


def _bare(hint: Any) -> Any:
    return getattr(hint, "__origin__", hint)


def main() -> None:
    PAGE.write_text(page())


if __name__ == "__main__":
    main()
