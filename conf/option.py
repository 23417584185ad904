"""What an option says of itself, beside the dataclass field that it is: what a resume may do with it.

    lr: MayChange[float] = 1e-3

A field that is a dataclass, or one of several, says nothing: its own fields do. Imports nothing of the rooms, which all import it.
"""

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Annotated, Any, Literal, TypeVar, get_args, get_type_hints

T = TypeVar("T")

Resume = Literal["fixed", "fixed as steps", "ask", "may change", "apart"]

Fixed = Annotated[T, "fixed"]
"""A checkpoint must agree in it."""
FixedAsSteps = Annotated[T, "fixed as steps"]
"""A time that may be a share of the run: a checkpoint must agree in what it came to."""
Ask = Annotated[T, "ask"]
"""A run that goes on by itself must agree in it; one that is given a checkpoint by its path need not."""
MayChange = Annotated[T, "may change"]
"""A resumed run has the new value from there on, and says so."""
Apart = Annotated[T, "apart"]
"""How a run is found and started, not what it does: nothing is said of it."""


def resume_of(kind: Any) -> dict[str, Resume | None]:
    """Returns what each field of the dataclass `kind` lets a resume do with it; None: it does not say."""
    hints = get_type_hints(kind, include_extras=True)
    return {field.name: _said(hints[field.name]) for field in fields(kind)}


def options_of(kind: Any, key: str = "") -> Iterator[tuple[str, Resume | None]]:
    """Lists every option below the dataclass `kind` or a union of them, such as `optim.lr`, and what it lets a resume do; an option
    of several choices comes once for each."""
    hints = get_type_hints(kind, include_extras=True)
    for name, said in resume_of(kind).items():
        inner = [] if said else [one for one in _parts(hints[name]) if is_dataclass(one)]
        if not inner:
            yield f"{key}{name}", said
        for one in inner:
            yield from options_of(one, f"{key}{name}.")


def keys_that(say: Resume, config: Any) -> list[str]:
    """Returns the fields of the dataclass `config` that say so, the name of its choice first."""
    keys = [key for key, said in resume_of(type(config)).items() if said == say]
    return sorted(keys, key=lambda key: key != "name")


def _said(hint: Any) -> Resume | None:
    return next((said for said in getattr(hint, "__metadata__", ()) if said in get_args(Resume)), None)


def _parts(hint: Any) -> list[Any]:
    """The types that a hint is of: those of a union, each."""
    if hasattr(hint, "__metadata__"):
        return _parts(hint.__origin__)
    return [part for one in get_args(hint) for part in _parts(one)] if get_args(hint) else [hint]
