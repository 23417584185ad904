"""Saving and loading a run: torch distributed checkpoint, in the background, on any layout.

The state is one flat tree of tensors, `model.<parameter>`, `optim.<parameter>.<state>`, `sparsity.<parameter>.<state>` and
`average.<parameter>`, each a DTensor split like its parameter, and `ranges.<layer>.<result>`, which are whole;
torch.distributed.checkpoint reads whatever rows a rank needs out of whatever files hold them. The few numbers of `TrainState` are
in the manifest.
"""

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from rowwise.optim.average import PREFIX as AVERAGE
from rowwise.parallel.activations.ranges import RunningRanges
from rowwise.parallel.device import Mark, device_of
from rowwise.parallel.mesh import Mesh
from rowwise.parallel.objects import from_every_rank
from rowwise.parallel.row_file import RowFile
from rowwise.trainer.files import behind, writing
from rowwise.trainer.finite import NotFinite, not_finite, of_any_rank, told
from rowwise.trainer.manifest import (
    Manifest,
    begin,
    commit,
    damage,
    file_facts,
    incomplete_folder,
    prune,
    read_manifest,
    step_folder,
)
from rowwise.trainer.metadata import Reader, read_metadata
from rowwise.trainer.resume import none_left
from rowwise.trainer.staging import Staging
from rowwise.trainer.writer import Frozen, FrozenFile, Writer, bits_of

RANGES = "ranges."


def range_tensors(ranges: RunningRanges | None) -> dict[str, Tensor]:
    """Returns what a checkpoint holds of the running ranges of 8-bit codes, by its name in it."""
    return {f"{RANGES}{name}": t for name, t in ranges.named_state().items()} if ranges is not None else {}


class Saver:
    """Writes checkpoints of one run; at most one save is under way.

    `save` asks for a copy of the shards in host memory and returns; a thread with a stream of its own waits for it, writes,
    hashes and commits, and training's stream is never waited for. The thread's messages (plans and checksums, kilobytes)
    go over `mesh.save_group`. An error in the thread is raised by the next `save`, `poll` or
    `wait`. Weights that are not finite are not saved: that is NotFinite, or, where `spoilt_ends` is false, no error.
    `is_anchor`: see `manifest.prune`. `ranges`: kept in every checkpoint too. `files`: some of the shards lie in them, and are copied
    to files beside them. `frozen`: the names of what does not change. Its files are written twice by each Saver, and then linked,
    each from the checkpoint before the newest: two copies stand, and no byte that goes bad is in both. (With `keep=1` there is one
    checkpoint, and one copy.) What is linked is neither copied nor staged. As a context, it is closed.
    """

    def __init__(
        self,
        checkpoints: Path,
        mesh: Mesh,
        keep: int,
        background: bool,
        spoilt_ends: bool = True,
        is_anchor: Callable[[int], bool] = lambda step: False,
        ranges: RunningRanges | None = None,
        files: Sequence[RowFile] = (),
        frozen: frozenset[str] = frozenset(),
    ):
        self._checkpoints, self._mesh, self._keep, self._background = checkpoints, mesh, keep, background
        self._spoilt_ends, self._is_anchor, self._ranges = spoilt_ends, is_anchor, ranges
        self._frozen, self._frozen_files = frozen, tuple[FrozenFile, ...]()
        device = device_of(mesh.device)
        self._staging = Staging(device, files)
        # torch's writer waits for the current stream once a tensor: training's, if the thread had none of its own.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint", initializer=device.own_stream)
        self._under_way: Future[None] | None = None

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def save(self, step: int, tensors: dict[str, Tensor], manifest: dict[str, Any]) -> None:
        """Saves `tensors`, and the ranges of codes, as the checkpoint of `step`. All ranks must call it. Waits for the save before."""
        self.wait()
        tensors = tensors | range_tensors(self._ranges)
        frozen = self._frozen_of(tensors)
        if not self._background:
            self._write(step, tensors, None, manifest, frozen)
            return
        there = frozen.bits if frozen.before is not None else {}
        copies, copied = self._staging.copy({name: t for name, t in tensors.items() if name not in there})
        self._under_way = self._thread.submit(self._write, step, tensors | copies, copied, manifest, frozen)

    def _frozen_of(self, tensors: dict[str, Tensor]) -> Frozen:
        """Says what is frozen, and which file is linked: of the checkpoint before the newest or, where one alone is kept, of that."""
        bits = bits_of({name: t for name, t in tensors.items() if name in self._frozen})
        wanted = 1 if self._keep == 1 else 2
        before = self._frozen_files[-wanted] if len(self._frozen_files) >= wanted else None
        return Frozen(bits, before if before is not None and before.bits == bits else None)

    def poll(self) -> None:
        """Raises what a finished save raised."""
        if self._under_way is not None and self._under_way.done():
            self.wait()

    def wait(self) -> None:
        """Returns when nothing is under way."""
        under_way, self._under_way = self._under_way, None
        if under_way is not None:
            under_way.result()

    def close(self) -> None:
        """Ends the thread, once what it is at is done."""
        self._thread.shutdown(wait=False)

    def _write(
        self, step: int, tensors: dict[str, Tensor], copied: Mark | None, manifest: dict[str, Any], frozen: Frozen
    ) -> None:
        """`copied`: when the tensors are there."""
        if copied is not None:
            copied.synchronize()
        if spoilt := of_any_rank(not_finite(tensors), self._mesh):
            if self._spoilt_ends:
                raise NotFinite(f"after step {step} {told(spoilt)}; that step is not saved")
            return
        group = self._mesh.save_group
        folder = incomplete_folder(self._checkpoints, step)
        if self._mesh.rank == 0:
            begin(self._checkpoints, step)
        dist.barrier(group=group)
        writer = Writer(folder, frozen)
        with writing(folder):
            dcp.save(dict(tensors), storage_writer=writer, process_group=group)
        file = writer.frozen_file
        known = {} if file is None else {file.path.name: file.facts}
        mine = [path for path in folder.iterdir() if self._is_mine(path) and path.name not in known]
        facts = known | {path.name: file_facts(path) for path in mine}
        everyone = from_every_rank(facts, group)
        if self._mesh.rank == 0:
            files = {name: value for part in everyone for name, value in sorted(part.items())}
            with writing(folder):
                commit(folder, {**manifest, "files": files})
            prune(self._checkpoints, self._keep, self._is_anchor)
        if file is not None:
            there = step_folder(self._checkpoints, step) / file.path.name
            self._frozen_files = (*self._frozen_files[-1:], replace(file, path=there))

    def _is_mine(self, path: Path) -> bool:
        if path.suffix == ".distcp":
            return path.name.startswith(f"__{self._mesh.rank}_")
        return self._mesh.rank == 0


class NoneSound(Exception):
    """No checkpoint of a run can be gone on from."""


def load_first_sound(
    candidates: list[Path], tensors: dict[str, Tensor], mesh: Mesh
) -> tuple[Path, Manifest, list[str]]:
    """Fills `tensors` from the first checkpoint that is sound and can be read to its end. Returns it, its manifest, and what
    was passed over and why. All ranks must call it. Raises NoneSound."""
    complaints: list[str] = []
    for checkpoint in candidates:
        manifest, found = examined(checkpoint, mesh)
        if manifest is not None and not found:
            try:
                load(checkpoint, tensors, mesh)
                return checkpoint, manifest, complaints
            except CheckpointException as error:  # the same on every rank
                found = [f"it cannot be read ({one.strerror})" for one in behind(error) if isinstance(one, OSError)]
                if not found:
                    raise
        complaints.append(f"{checkpoint} is damaged: {'; '.join(found)}")
    raise NoneSound(none_left(complaints))


def load(checkpoint: Path, tensors: dict[str, Tensor], mesh: Mesh) -> None:
    """Reads a checkpoint into `tensors`, in place: each rank its own rows, whatever layout wrote them. An average that it lacks is
    left as it is."""
    wanted = dict(tensors)
    for name in lacking_averages(checkpoint, tensors):
        del wanted[name]
    dcp.load(wanted, storage_reader=Reader(checkpoint), process_group=mesh.save_group)


def lacking_averages(checkpoint: Path, names: Iterable[str]) -> list[str]:
    """Returns which of `names` are tensors of an average that a checkpoint does not have."""
    wanted = [name for name in names if name.startswith(AVERAGE)]
    there = read_metadata(checkpoint).state_dict_metadata if wanted else {}
    return [name for name in wanted if name not in there]


def load_ranges(checkpoint: Path, ranges: RunningRanges, mesh: Mesh) -> bool:
    """Goes on from what a checkpoint holds of the running ranges of 8-bit codes, which alone says how large that is; says whether it
    holds any. All ranks must call it."""
    tensors = {
        name: torch.empty(told.size, device=mesh.device)
        for name, told in read_metadata(checkpoint).state_dict_metadata.items()
        if name.startswith(RANGES) and isinstance(told, TensorStorageMetadata)
    }
    if not tensors:
        return False
    load(checkpoint, tensors, mesh)
    ranges.load({name.removeprefix(RANGES): tensor for name, tensor in tensors.items()})
    return True


def examined(checkpoint: Path, mesh: Mesh) -> tuple[Manifest | None, list[str]]:
    """Returns the manifest of a checkpoint, and what any rank finds wrong with it or its files: they share the reading."""
    manifest: Manifest | None = None
    try:
        manifest = read_manifest(checkpoint)
        found = damage(checkpoint, sorted(manifest["files"].items())[mesh.rank :: mesh.world_size])
    except ValueError as error:
        found = [str(error)]
    everyone = from_every_rank(found, mesh.save_group)
    return manifest, list(dict.fromkeys(phrase for part in everyone for phrase in part))
