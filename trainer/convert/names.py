"""Parameters of ours by the names that they have in a checkpoint of DeepSpeed: our own, or those of transformers."""

import re
from collections.abc import Iterable

from rowwise.kernels.spec import Specs

_WRAPPERS = re.compile(r"^(?:(?:module|_orig_mod)\.)+")  # of engines, of DistributedDataParallel, of torch.compile


def theirs_by_ours(specs: Specs, found: Iterable[str], place: object) -> dict[str, str]:
    """Returns our name -> the name in the checkpoint, of every parameter. Raises ValueError, by name, where one is missing or
    superfluous."""
    bare = {_WRAPPERS.sub("", name): name for name in found}
    tables: list[dict[str, tuple[str, ...]]] = [
        {name: (name,) for name in specs},
        {name: (spec.theirs or name, *spec.copies) for name, spec in specs.items()},
    ]
    table = max(tables, key=lambda one: len({name for names in one.values() for name in names} & bare.keys()))
    if table is tables[1]:
        refuse_rows(specs, f"{place} has the names of transformers")
    chosen = {ours: next((name for name in names if name in bare), None) for ours, names in table.items()}
    missing = [table[ours][0] for ours, name in chosen.items() if name is None]
    more = sorted(bare.keys() - set(chosen.values()))
    if missing or more:
        told = [f"has no {_some(missing)}, which the model needs"] if missing else []
        told += [f"has {_some(more)}, which the model does not have"] if more else []
        raise ValueError(f"{place} {', and '.join(told)}; give model= and model.KEY= of the model that it is of")
    return {ours: bare[name] for ours, name in chosen.items() if name is not None}


def refuse_rows(specs: Specs, what: str) -> None:
    """Raises ValueError for a model several of whose parameters are rows of one in transformers: states would be cut, or joined."""
    if several := next((spec.theirs for spec in specs.values() if spec.their_rows is not None), None):
        raise ValueError(
            f"{what}, and there {several} is several matrices of ours, whose states are not put apart or together; possible are the "
            "names of ours, and model.init_from of exported weights alone"
        )


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
