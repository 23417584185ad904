"""What a step holds on this rank, storage by storage: when each is made, when it is let go, and what it was for.

Every operation is seen on its way to the device (a dispatch mode), and nothing of it is changed. What a storage was for is known
only when the step is over, so it is decided then, for its whole life:

| category | a storage that |
|---|---|
| gathered | is a whole parameter beside the rank's rows |
| gradients | was a gradient of a parameter, whole or split, or on its way to one |
| messages | crossed ranks, and was not kept for a backward |
| loss | was made between the last norm's output and its gradient, and is none of those before |
| activations | was made by a forward and there when a backward began, or by a backward and there when that ended |
| working | is none of them: it came and went inside a forward, a backward or the optimizer's step |

Parameters, optimizer states and masks are there from the beginning and stay.
"""

import weakref
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rowwise.kernels.torch_dispatch import TorchDispatchMode
from rowwise.kernels.torch_dtensor import rows_of
from rowwise.parallel.replicate import buckets_of
from rowwise.parallel.shard import sharded_modules
from rowwise.parallel.torch_autograd import in_backward
from rowwise.parallel.torch_fsdp import accumulated, fsdp_params, fsdp_state, gathered, partial_sum

MOVING = ("gathered", "gradients", "activations", "loss", "messages", "working")


@dataclass
class Life:
    """Of one storage: its bytes, what made it, the operation that it was born in and the last at which it was there, counted in
    the step, and what was seen of it. `returning`: born in a backward; `late`: born after the last norm."""

    size: int
    operation: str
    born: int
    returning: bool
    late: bool
    died: int | None = None
    stays: bool = False
    whole: bool = False
    gradient: bool = False
    sent: bool = False
    moved: bool = False
    kept: bool = False

    @property
    def category(self) -> str | None:
        """None: not of this step, or counted elsewhere."""
        if self.stays or self.whole:
            return None
        if self.gradient:
            return "gradients"
        if self.sent or self.moved:
            return "activations" if self.kept and not self.sent else "messages"
        if self.late:
            return "loss"
        return "activations" if self.kept else "working"


class Lifetimes(TorchDispatchMode):
    """While entered, notes the life of every storage that operations make. `models`: the modules of this rank, as they were
    parallelized; `parameters`: theirs, before they are gathered; `stages`: the ranks that hold the others of a pipeline, to which
    what is sent waits to be gone, and is not kept."""

    def __init__(
        self, models: Iterable[nn.Module], parameters: Iterable[Tensor], stages: dist.ProcessGroup | None = None
    ):
        super().__init__()
        self._stages = None if stages is None else stages.group_name
        self._parameters = list(parameters)
        models = list(models)
        modules = {id(fsdp_state(module)): module for model in models for module in sharded_modules(model)}
        self._modules = list(modules.values())  # those that are gathered as one, once
        self._params = [param for module in self._modules for param in fsdp_params(module)]
        self._new = self._params  # those that were never gathered
        self._whole: list[
            torch.UntypedStorage
        ] = []  # of the others, whose storage stays and is empty while they are not gathered
        self._buckets = [
            flat for model in models if (buckets := buckets_of(model)) is not None for flat in buckets.flat
        ]
        self._alive: dict[int, tuple[weakref.ref[Any], Life]] = {}
        self._lives: list[Life] = []
        self._gathered: list[tuple[int, int]] = []
        self._seen: dict[int, weakref.ref[Tensor]] = {}  # by place, the gradient that was last there
        self._at, self._returning, self._late = 0, False, False

    def note_loss(self, begins: bool) -> None:
        """Says that what is made from now on belongs to the loss, or no longer does."""
        self._late = begins

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._at += 1
        # A forward leaves gradients as they are.
        if self._note_phase() or self._returning or not torch.is_grad_enabled():
            self._note_gradients()
        result = function(*args, **(kwargs or {}))
        given = {id(storage): storage for storage in storages((args, kwargs))}
        for storage in storages(result):
            if id(storage) not in given:  # else a view, or written in place
                self._note_birth(storage, function.name())
        if function.namespace in ("c10d", "fsdp"):
            self._note_moves(function.name(), args, given.values())
        self._note_gathered()
        return result

    def _note_phase(self) -> bool:
        """Notes that what is there where a backward begins or ends was kept. Returns whether one did."""
        returning = in_backward()
        if returning == self._returning:
            return False
        for _, life in self._alive.values():
            life.kept |= life.returning == self._returning
        self._returning = returning
        return True

    def _note_birth(self, storage: Any, operation: str) -> None:
        if (key := id(storage)) in self._alive:
            return
        life = Life(storage.nbytes(), operation, self._at, self._returning, self._late)
        self._alive[key] = weakref.ref(storage, lambda _: self._note_death(key)), life
        self._lives.append(life)

    def _note_death(self, key: int) -> None:
        _, life = self._alive.pop(key)
        life.died = self._at

    def _life(self, tensor: Tensor) -> Life | None:
        found = self._alive.get(id(rows_of(tensor).untyped_storage()))
        return None if found is None else found[1]

    def _note_moves(self, name: str, args: Any, given: Iterable[Any]) -> None:
        leaves = name.startswith("c10d::send") and dist.ProcessGroup.unbox(args[1]).group_name == self._stages
        gradients = {id(storage) for storage in storages(args[0])} if name.startswith("fsdp::chunk_cat") else ()
        for storage in given:
            if (found := self._alive.get(id(storage))) is not None:
                life = found[1]
                life.gradient |= id(storage) in gradients
                life.sent |= leaves or name.startswith("fsdp::")
                life.moved = True

    def _note_gradients(self) -> None:
        for place, tensor in enumerate(self._gradients()):
            if tensor is None or ((seen := self._seen.get(place)) is not None and seen() is tensor):
                continue
            self._seen[place] = weakref.ref(tensor)
            if (life := self._life(tensor)) is not None:
                life.gradient = True

    def _gradients(self) -> Iterator[Tensor | None]:
        for p in self._parameters:
            yield p.grad
        for param in self._params:
            whole = gathered(param)
            yield None if whole is None else whole.grad
            yield accumulated(param)
        yield from map(partial_sum, self._modules)

    def _note_gathered(self) -> None:
        self._new = [param for param in self._new if not self._begins_whole(gathered(param))]
        total = sum(storage.nbytes() for storage in self._whole)
        if not self._gathered or self._gathered[-1][1] != total:
            self._gathered.append((self._at, total))

    def _begins_whole(self, tensor: Tensor | None) -> bool:
        """Whether a parameter has been gathered, for the first time."""
        if tensor is None:
            return False
        self._whole.append(rows_of(tensor).untyped_storage())
        if (life := self._life(tensor)) is not None:
            life.whole = True
        return True

    def __exit__(self, *error: Any) -> Any:
        self._note_gradients()  # as before every operation: those that the last one left
        for p in self._parameters:
            if (life := self._life(p)) is not None:
                life.stays = True  # FSDP2 pads rows anew before the first forward
        return super().__exit__(*error)

    @property
    def parameter_bytes(self) -> int:
        """What the rows of the parameters take, as they lie now."""
        every = {id(storage): storage.nbytes() for p in self._parameters for storage in storages(p.detach())}
        return sum(every.values())

    def peaks(self) -> tuple[dict[str, int], int]:
        """The most bytes of each of MOVING, and of all together."""
        now = dict.fromkeys(MOVING, 0)
        peaks, most = dict(now), 0
        for _, now in self._moments():
            peaks = {category: max(peaks[category], size) for category, size in now.items()}
            most = max(most, sum(now.values()))
        return peaks, most

    def at_the_peak(self) -> list[tuple[str, str, int, int]]:
        """(category, the operation that made it, bytes, how many) of the storages that are there when most is held, the largest
        first; gathered parameters and buckets of gradients apart."""
        peak = max(self._moments(), key=lambda moment: sum(moment[1].values()), default=(0, {}))[0]
        found: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0])
        for life in self._lives:
            if life.category is not None and life.born <= peak <= (self._at if life.died is None else life.died):
                entry = found[life.category, life.operation]
                entry[0] += life.size
                entry[1] += 1
        every = [(category, operation, size, count) for (category, operation), (size, count) in found.items()]
        return sorted(every, key=lambda one: -one[2])

    def _moments(self) -> Iterator[tuple[int, dict[str, int]]]:
        """(when, bytes of each of MOVING) after each change."""
        changes: dict[int, dict[str, int]] = defaultdict(lambda: defaultdict(int))
        for life in self._lives:
            if (category := life.category) is not None:
                changes[life.born][category] += life.size
                changes[(self._at if life.died is None else life.died) + 1][category] -= life.size
        before = 0
        for at, total in self._gathered:
            changes[at]["gathered"] += total - before
            before = total
        now = dict.fromkeys(MOVING, 0)
        now["gradients"] += sum(flat.untyped_storage().nbytes() for flat in self._buckets)
        yield 0, dict(now)
        for at in sorted(changes):
            for category, change in changes[at].items():
                now[category] += change
            yield at, dict(now)


def storages(tree: Any) -> Iterator[Any]:
    """The storages of all tensors in what an operation takes or gives."""
    if isinstance(tree, Tensor):
        yield rows_of(tree).untyped_storage()
    elif isinstance(tree, list | tuple):
        for one in tree:
            yield from storages(one)
    elif isinstance(tree, dict):
        yield from storages(list(tree.values()))
