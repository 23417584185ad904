"""memory.json: what every rank holds in its first step, by category: predicted, and measured.

On a CPU every operation of the step is watched (`parallel.lifetimes`), and each category has its own peak; the step takes longer, and
its numbers are the same. A GPU's allocator counts no categories: states are measured when the gradients are there, and what its peak
has beside them is told as `rest`. So is a compiled run, which is not watched.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from rowwise.kernels.cross_entropy import Loss
from rowwise.kernels.rows import local
from rowwise.optim.average import PREFIX as AVERAGE
from rowwise.parallel.away import away_of
from rowwise.parallel.lifetimes import Lifetimes
from rowwise.parallel.mesh import Mesh
from rowwise.parallel.objects import from_every_rank
from rowwise.parallel.row_file import RowFile
from rowwise.parallel.state_bytes import StateBytes, measure
from rowwise.parallel.torch_memory import record_history, write_snapshot
from rowwise.trainer.activations import keeper_in
from rowwise.trainer.adapters.allocate import PREFIX as IMPORTANCE
from rowwise.trainer.config import TrainConfig
from rowwise.trainer.files import to_json, write_whole, writing
from rowwise.trainer.models.decoder import Decoder
from rowwise.trainer.peaks import peak_memory_bytes
from rowwise.trainer.pipeline import StagedDecoder
from rowwise.trainer.plan.memory import memory_of
from rowwise.trainer.plan.works import unknown
from rowwise.trainer.profile import FOLDER
from rowwise.trainer.stages import Plan
from rowwise.trainer.states import States

Bytes = dict[str, int]


@dataclass
class Watch:
    """What is seen of a step: `seen` is None where its operations are not watched. `first`: it is the first of this start."""

    seen: Lifetimes | None
    first: bool


@contextmanager
def _snapshot(config: TrainConfig, mesh: Mesh, step: int, watch: Watch) -> Iterator[None]:
    """Writes what is held in `profile.memory_step`, which is made inside, of the ranks that `profile.ranks` names. Raises DiskFull."""
    choice = config.profile
    if step != choice.memory_step or (choice.ranks is not None and mesh.rank not in choice.ranks):
        yield
        return
    folder = Path(config.run_dir) / FOLDER
    if mesh.device.type != "cuda":
        yield
        assert watch.seen is not None
        heads = ("category", "operation", "bytes", "storages")
        peak = [dict(zip(heads, one, strict=True)) for one in watch.seen.at_the_peak()]
        folder.mkdir(exist_ok=True)
        write_whole(folder / f"rank-{mesh.rank}.memory.json", to_json({"step": step, "peak": peak}, indent=1) + "\n")
        return
    record_history(True)
    try:
        yield
        folder.mkdir(exist_ok=True)
        with writing(path := folder / f"rank-{mesh.rank}.memory.pickle"):
            write_snapshot(path)
    finally:
        record_history(False)


@contextmanager
def watching(
    config: TrainConfig,
    mesh: Mesh,
    model: Decoder | StagedDecoder,
    step: int,
    first: bool,
    files: Sequence[RowFile] = (),
) -> Iterator[Watch]:
    """Watches the step that is made inside, where it is the `first` of this start or `profile.memory_step`; raises DiskFull where
    what is written of that does not fit. `files`: in which some of this rank's rows lie."""
    watches = first or step == config.profile.memory_step
    with _seen(config, mesh, model, watches, first, files) as watch, _snapshot(config, mesh, step, watch):
        yield watch


@contextmanager
def _seen(
    config: TrainConfig,
    mesh: Mesh,
    model: Decoder | StagedDecoder,
    watches: bool,
    first: bool,
    files: Sequence[RowFile],
) -> Iterator[Watch]:
    """Sees every operation, if it `watches` and can: not compiled, of torch itself, and on a CPU."""
    if not watches or config.compile or config.parallel.backend != "torch" or mesh.device.type != "cpu":
        yield Watch(None, first)
        return
    stages = list(model.decoders.values()) if isinstance(model, StagedDecoder) else [model]
    parameters = [p for stage in stages for p in stage.parameters()]
    seen = Lifetimes(stages, parameters, None if mesh.pipeline is None else mesh.pipeline.group)
    handles = [handle for stage in stages if stage.norm is not None for handle in _tell(seen, stage, stage.norm)]
    keeper = keeper_in(model)
    store = None if keeper is None else keeper.store
    if store is not None:
        store.witness = seen
    for file in files:
        file.witness = seen.note_host
    try:
        with seen:
            yield Watch(seen, first)
    finally:
        for handle in handles:
            handle.remove()
        if store is not None:
            store.witness = None
        for file in files:
            file.witness = None


def _tell(seen: Lifetimes, stage: Decoder, norm: nn.Module) -> list[RemovableHandle]:
    """Tells where the loss begins and ends, forward and backward: at the last norm's output and at the loss itself."""

    def begins(module: nn.Module, given: Any, output: Tensor) -> None:
        if output.requires_grad:
            seen.note_loss(True)
            output.register_hook(lambda gradient: seen.note_loss(False))

    def ends(module: nn.Module, given: Any, output: Any) -> None:
        if isinstance(output, Loss) and output.total.requires_grad:
            seen.note_loss(False)
            output.total.register_hook(lambda gradient: seen.note_loss(True))

    return [norm.register_forward_hook(begins), stage.register_forward_hook(ends)]


def measured_bytes(
    watch: Watch, model: nn.Module, optimizer: torch.optim.Optimizer, beside: Bytes, device: torch.device
) -> tuple[Bytes, StateBytes]:
    """Counts what a rank held in the step, by category, and `total`; and what it holds now, when its gradients are there. `beside`:
    what it has beside parameters and optimizer states for good (`bytes_beside`)."""
    now = measure(model, optimizer, device)
    if watch.seen is None:
        return {}, now
    peaks, most = watch.seen.peaks()
    stays = {"parameters": watch.seen.parameter_bytes, **beside, "optimizer": now.optimizer + beside["optimizer"]}
    away = away_of(model)
    host, file = peaks["host"], now.file
    if away is not None:
        host, file = host + away.memory_bytes, file + away.spare_bytes
    return {**stays, **peaks, "host": host, "file": file, "total": most + sum(stays.values())}, now


def bytes_beside(tensors: dict[str, Tensor], device: torch.device) -> Bytes:
    """Counts what masks, with what is kept beside them, the average, and averages of importance, which are states beside the
    optimizer's own, take on a device, among the tensors of a run."""
    rows = {name: local(t) for name, t in tensors.items()}

    def of(prefix: str) -> int:
        return sum(t.nbytes for name, t in rows.items() if name.startswith(prefix) and t.device.type == device.type)

    return {"masks": of("sparsity."), "average": of(AVERAGE), "optimizer": of(IMPORTANCE)}


def plan_made(model: StagedDecoder) -> Plan:
    """Finds the plan that a rank's stages were made by, as far as the rank knows it: its own layers."""
    layers = [range(0)] * model.schedule.stages
    for stage, decoder in model.decoders.items():
        numbers = [int(layer) for layer in decoder.blocks]
        layers[stage] = range(numbers[0], numbers[-1] + 1)
    return Plan(model.schedule, layers)


def keep_memory(
    config: TrainConfig,
    mesh: Mesh,
    model: Decoder | StagedDecoder,
    optimizer: torch.optim.Optimizer,
    states: States,
    watch: Watch,
) -> None:
    """Measures on every rank, after the first step; rank 0 writes. One message of a few numbers a rank, over `mesh.save_group`."""
    if not watch.first:
        return
    by_torch = config.parallel.backend == "torch"
    beside = bytes_beside(states.read() if by_torch else {}, mesh.device)
    measured, now = measured_bytes(watch, model, optimizer, beside, mesh.device) if by_torch else ({}, states.held())
    plan = plan_made(model) if isinstance(model, StagedDecoder) else None
    known = unknown(config) is None
    predicted = memory_of(config, mesh.rank, mesh.device.type == "cuda", plan) if known else None
    ours = {
        "parameters": now.shards + now.gathered,
        "gradients": now.gradients,
        **beside,
        "optimizer": now.optimizer + beside["optimizer"],
        "host": now.host,
        "file": now.file,
        "peak": peak_memory_bytes(mesh.device),
        "measured": measured,
        "predicted": {} if predicted is None else {**predicted.peaks, "total": predicted.most},
        "moment": "" if predicted is None else predicted.moment,
    }
    everyone = from_every_rank(ours, mesh.save_group)
    if mesh.rank == 0:
        document = {"device": mesh.device.type, "ranks": everyone}
        write_whole(Path(config.run_dir) / "memory.json", to_json(document) + "\n")
