"""The files that a rank writes of a checkpoint: one of what changes, and one of what is frozen, which later checkpoints link.

`__R_0.distcp` holds what rank R saves of parameters that learn, states and masks, `__R_frozen_0.distcp` what it saves of frozen ones.
A hard link is one more name of the same bytes, which stay as long as any name does: every checkpoint is whole by itself, whichever
others go. Nothing writes into a file that has a name in a checkpoint.
"""

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from rowwise.kernels.portions import row_portions
from rowwise.kernels.rows import local
from rowwise.trainer.files import writing
from rowwise.trainer.manifest import FileFacts, file_facts
from rowwise.trainer.torch_checkpoint import with_prefix

ON_GPU = 1 << 20  # words that are weighed at a time there


@dataclass(frozen=True)
class FrozenFile:
    """A rank's file of frozen tensors, in a checkpoint that this process wrote. `bits`: see `bits_of`. `places`: what torch keeps of
    where each lies in it."""

    path: Path
    facts: FileFacts
    bits: Mapping[str, int]
    places: tuple[WriteResult, ...]

    def holds(self, items: list[WriteItem]) -> bool:
        """Says whether it has these and no others, and is as it was written: it is read, and hashed."""
        if {item.index for item in items} != {place.index for place in self.places}:
            return False
        try:
            return file_facts(self.path) == self.facts
        except OSError:
            return False


@dataclass(frozen=True)
class Frozen:
    """What of a save is frozen: `bits_of` those tensors, by their names, and the file before that has them, if one is to be linked."""

    bits: Mapping[str, int] = field(default_factory=dict)
    before: FrozenFile | None = None


class Writer(dcp.FileSystemWriter):
    """Writes into `folder` what a rank saves, and what is `frozen` into a file of its own; that is a link where the one before holds
    the same, and the file system has links. Says that the disk is full as long as that is known: what the ranks are then sent is the
    last error alone. `frozen_file`: afterwards, that of this checkpoint; None where this rank saves nothing frozen."""

    def __init__(self, folder: Path, frozen: Frozen | None = None, single_file_per_rank: bool = True):
        super().__init__(folder, single_file_per_rank=single_file_per_rank)
        self._folder, self._frozen = folder, frozen or Frozen()
        self.frozen_file: FrozenFile | None = None

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Any:
        still = [item for item in plan.items if item.index.fqn in self._frozen.bits]
        changing = [item for item in plan.items if item.index.fqn not in self._frozen.bits]
        with writing(self._folder):
            written = super().write_data(dataclasses.replace(plan, items=changing), planner)
            if not still:
                return written
            own = with_prefix(plan, "frozen_", still)
            self.frozen_file = self._linked(still) or self._write_frozen(own, planner)
        both: Future[list[WriteResult]] = Future()
        both.set_result([*written.wait(), *self.frozen_file.places])
        return both

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        with writing(self._folder):
            super().finish(metadata, results)

    def _linked(self, items: list[WriteItem]) -> FrozenFile | None:
        """Links the file before; None where that cannot be."""
        before = self._frozen.before
        if before is None or not before.holds(items):
            return None
        path = self._folder / before.path.name
        try:
            os.link(before.path.resolve(), path)  # not one more name of a symbolic link that was put in its place
        except OSError:
            path.unlink(missing_ok=True)  # made all the same, by a server whose answer was lost: not to be written into
            return None
        return dataclasses.replace(before, path=path)

    def _write_frozen(self, plan: SavePlan, planner: SavePlanner) -> FrozenFile:
        places = tuple(super().write_data(plan, planner).wait())
        path = self._folder / places[0].storage_data.relative_path
        return FrozenFile(path, file_facts(path), self._frozen.bits, places)


def bits_of(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Returns a number for each tensor's rows here, which is another if one of them is, or if they stand in another order:
    sum_i (2 i + 1) m(w_i) modulo 2^64 over the 64-bit words w_i of their memory, m(w) = w xor (w >> 29). One wait for the device."""
    if not tensors:
        return {}
    return dict(zip(tensors, torch.stack([_weighed(local(t)) for t in tensors.values()]).tolist(), strict=True))


@torch.no_grad()
def _weighed(rows: Tensor) -> Tensor:
    flat = rows.reshape(-1).view(torch.uint8)
    flat = flat if flat.storage_offset() % 8 == 0 else flat.clone()
    whole = flat.numel() // 8 * 8
    last = torch.zeros(8, dtype=torch.uint8, device=rows.device)
    last[: flat.numel() - whole] = flat[whole:]
    words = flat[:whole].view(torch.int64)
    found = _mixed(last.view(torch.int64)).sum() * (2 * words.numel() + 1)
    for some in row_portions(words.numel(), 1, ON_GPU if rows.device.type == "cuda" else None):
        part = _mixed(words[some])
        weights = torch.arange(2 * some.start + 1, 2 * some.stop, 2, device=rows.device)
        found += part.mul_(weights).sum()
    return found


def _mixed(words: Tensor) -> Tensor:
    """Brings high bits down: of words that differ in those alone, as numbers do in their signs, some multiples would be the same."""
    return (words >> 29).bitwise_and_(2**35 - 1).bitwise_xor_(words)
