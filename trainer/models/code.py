"""The code of a user's own model, by the name that a command gives it.

    model=FILE.py:NAME             the class NAME of a file
    model=package.module:NAME      of a package that is installed

Code runs by the word of a command alone. A checkpoint, a run's config.yaml, a file of settings and a folder of choices name it too,
and whoever wrote those is not who typed the command: `launch.given`, `launch.compose` and `trainer.whole` refuse their word.
Needs no torch, but for what the code itself imports.
"""

import contextlib
import functools
import hashlib
import importlib
import importlib.util
import inspect
import re
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

_OF_A_FILE = re.compile(r"(.+\.py):([A-Za-z_]\w*)")
_OF_A_PACKAGE = re.compile(r"([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*):([A-Za-z_]\w*)")


def names_code(word: str) -> bool:
    """Says whether a word has the form of such a name."""
    return bool(_OF_A_FILE.fullmatch(word) or _OF_A_PACKAGE.fullmatch(word))


def check_code(own: str) -> None:
    """Refuses a name that is none, and that of a file that is not there: nothing is run. Raises ValueError."""
    if not names_code(own):
        raise ValueError(f"model.own={own!r}: give FILE.py:NAME, or package.module:NAME of a package that is installed")
    if (found := _OF_A_FILE.fullmatch(own)) and not Path(found[1]).expanduser().is_file():
        raise ValueError(f"model.own={own}: there is no file {found[1]}")


def load_code(own: str) -> Any:
    """Imports the code and returns what it calls NAME. A file is imported by itself, so that it finds what is installed and not what
    lies beside it. Raises ValueError, in a line, where it cannot be imported or has no such name."""
    return _loaded(own)[0]


def print_of_code(own: str) -> str | None:
    """Returns a hash of the file in which NAME is written, as it was when it was imported, and not of what that imports; None: it is
    in none. Raises ValueError as `load_code` does."""
    return _loaded(own)[1]


@functools.cache
def _loaded(own: str) -> tuple[Any, str | None]:
    check_code(own)
    place, _, name = own.rpartition(":")
    with telling(own, "importing it"):
        module = (
            _of_file(Path(place).expanduser().resolve()) if place.endswith(".py") else importlib.import_module(place)
        )
    if not hasattr(module, name):
        raise ValueError(f"model.own={own}: {place} has no {name}")
    return (found := getattr(module, name)), _print(found)


def _print(found: Any) -> str | None:
    with contextlib.suppress(TypeError, OSError):  # what is no class or function, or has no file
        return hashlib.sha256(Path(inspect.getfile(found)).read_bytes()).hexdigest()
    return None


def _of_file(path: Path) -> ModuleType:
    # A name that no package has, by which dataclasses and pickle find it again.
    name = f"rowwise_own_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


class Unkept(ValueError):
    """Code that does not keep to the protocol, in a line."""


@contextlib.contextmanager
def telling(own: str, doing: str) -> Iterator[None]:
    """Makes what the code raises a ValueError of one line, with the last line of the code's own that led there."""
    try:
        yield
    except Unkept:
        raise
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        file = Path(own.rpartition(":")[0]).name
        place = next((f", line {frame.lineno}" for frame in reversed(frames) if Path(frame.filename).name == file), "")
        said = " ".join(str(error).split()) or "no more was said"
        raise ValueError(f"model.own={own}{place}: {doing} failed ({type(error).__name__}: {said})") from error
