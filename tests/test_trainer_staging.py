"""A save in the background: one copy of every tensor, in memory that is kept, and never a wait for training's stream."""

import contextlib
import threading
import types
from unittest import mock

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import filesystem
from torch.distributed.tensor import Shard, distribute_tensor

from rowwise.kernels.rows import local
from rowwise.kernels.torch_dispatch import TorchDispatchMode
from rowwise.parallel.config import ParallelConfig, resolve_degrees
from rowwise.parallel.mesh import make_mesh
from rowwise.trainer import checkpoint
from rowwise.trainer.checkpoint import Saver, load
from rowwise.trainer.staging import Staging


class FakeGpu:
    """A GPU whose streams only count who waits for them. `pins`: as one does; False: as the CPU."""

    def __init__(self, pins: bool = True):
        self.pins, self.pinned, self.training = pins, [], Stream()
        self._threads = threading.local()

    def mark(self):
        return types.SimpleNamespace(synchronize=lambda: None)

    def own_stream(self):
        self._threads.stream = Stream()

    def pin(self, memory):
        self.pinned.append(memory.nbytes)

    def current_stream(self):
        return getattr(self._threads, "stream", self.training)

    def stream(self, stream):
        return contextlib.nullcontext()


class Stream:
    def __init__(self):
        self.waits = 0

    def synchronize(self):
        self.waits += 1

    def wait_stream(self, other): ...


class Copies(TorchDispatchMode):
    """Counts the bytes that are copied, by whatever operator."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        name = function._schema.name.removeprefix("aten::")
        if name in ("copy_", "clone", "_to_copy", "_pin_memory"):
            self.bytes += made.nbytes
        return made


def state(mesh) -> dict[str, torch.Tensor]:
    """Whole tensors and split ones, uneven, of several dtypes, one without rows here and one without numbers."""
    random = torch.Generator().manual_seed(3)
    split = {name: distribute_tensor(torch.randn(rows, 6, generator=random).to(dtype), mesh.states["shard"], [Shard(0)])
             for name, rows, dtype in [("a", 7, torch.float32), ("b", 5, torch.bfloat16), ("c", 1, torch.float64)]}  # fmt: skip
    return {**split, "d": torch.arange(5, dtype=torch.uint8), "e": torch.tensor(2.5), "f": torch.empty(0, 3)}


def two_copies(workers, pins):
    """What staging twice copies, pins and gives; in between the tensors change."""
    mesh = make_mesh(resolve_degrees(ParallelConfig(zero=3), workers.world_size), workers)
    tensors, gpu = state(mesh), FakeGpu(pins)
    before = {name: local(t).clone() for name, t in tensors.items()}
    staging = Staging(gpu)
    with Copies() as copies:
        first, _ = staging.copy(tensors)
    same = all(torch.equal(local(first[name]), before[name]) for name in before)
    layout = all(first[name].shape == t.shape and type(first[name]) is type(t) for name, t in tensors.items())
    exact = all(local(t).untyped_storage().nbytes() == local(t).nbytes for t in first.values())
    where = {name: local(t).data_ptr() for name, t in first.items()}
    tensors["d"] += 1
    second, _ = staging.copy(tensors)
    assert torch.equal(second["d"], tensors["d"])
    again = {name: local(t).data_ptr() for name, t in second.items()} == where
    grown, _ = staging.copy({**tensors, "g": torch.ones(3)})
    assert torch.equal(grown["g"], torch.ones(3)) and torch.equal(grown["d"], tensors["d"])
    return copies.bytes, sum(local(t).nbytes for t in tensors.values()), same and layout and exact, again, gpu.pinned


def test_a_gpus_copy_is_made_once_into_memory_that_is_pinned_once_and_kept(ranks):
    for copied, whole, right, again, pinned in ranks.run(two_copies, 2, True):
        assert copied == whole
        assert right and again
        assert len(pinned) == 2 and whole <= pinned[0] < pinned[1], "anew only where something has another shape"


def test_the_cpus_copy_is_made_once_and_given_back(ranks):
    for copied, whole, right, again, pinned in ranks.run(two_copies, 2, False):
        assert copied == whole
        assert right and not again and not pinned


def saved_beside_training(workers, folder, background):
    """How often training's stream was waited for, and whether what was saved is what was to be saved."""
    mesh = make_mesh(resolve_degrees(ParallelConfig(zero=3), workers.world_size), workers)
    gpu = FakeGpu()
    tensors = {**state(mesh), **{f"w{i}": torch.full((700_000,), float(i)) for i in range(6)}}  # 2.8 MB each
    expected = {name: local(t).clone() for name, t in tensors.items()}
    # As torch's writer looks for a GPU.
    with (
        mock.patch.object(checkpoint, "device_of", lambda _: gpu),
        mock.patch.object(filesystem, "_get_available_device_type", lambda: "cuda"),
        mock.patch.object(filesystem, "_get_device_module", lambda _: gpu),
        mock.patch.object(torch.cuda, "is_available", lambda: True),
    ):
        saver = Saver(folder, mesh, keep=1, background=background)
        for step in (1, 2):
            saver.save(step, tensors, {})
            saver.wait()
        saver.close()
    for tensor in tensors.values():
        local(tensor).zero_()
    dist.barrier(mesh.save_group)  # rank 0 has given it its name
    load(folder / "step-00000002", tensors, mesh)
    return gpu.training.waits, all(torch.equal(local(t), expected[name]) for name, t in tensors.items()), gpu.pinned


def test_a_save_in_the_background_never_waits_for_trainings_stream(ranks, tmp_path):
    for waits, right, pinned in ranks.run(saved_beside_training, 2, tmp_path / "background", True):
        assert waits == 0
        assert right and len(pinned) == 1, "the second save's copy lies where the first's did"
    for waits, right, pinned in ranks.run(saved_beside_training, 2, tmp_path / "foreground", False):
        assert waits > 0, "torch's writer no longer asks for the current stream: what is above shows nothing"
        assert right and not pinned
