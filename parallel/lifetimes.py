"""What a step holds on this rank, storage by storage: when each is made, when it is let go, and what it was for.

Every operation is seen on its way to the device (a dispatch mode), and nothing of it is changed. What each was for is decided when
the step is over (`parallel.life`). Parameters, optimizer states and masks are there from the beginning and stay.
"""

import itertools
from collections import Counter, defaultdict
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from rowwise.kernels.torch_dispatch import Births, storages, told_of
from rowwise.kernels.torch_dtensor import rows_of
from rowwise.parallel.gather import copies_of
from rowwise.parallel.life import MOVING, Life, held, on_device
from rowwise.parallel.replicate import buckets_of
from rowwise.parallel.row_file import is_mapped
from rowwise.parallel.shard import sharded_modules
from rowwise.parallel.torch_autograd import in_backward, tell_first
from rowwise.parallel.torch_fsdp import accumulated, fsdp_params, fsdp_state, gathered, partial_sum


class Lifetimes(Births[Life]):
    """While entered, notes the life of every storage that operations make. `models`: the modules of this rank, as they were
    parallelized; `parameters`: theirs, before they are gathered; `stages`: the ranks that hold the others of a pipeline, to which
    what is sent waits to be gone, and is not kept.

    A step of a tiny model is thousands of operations that take a few microseconds each, so little is asked at each of them: what
    gives only its arguments and views of them makes nothing, gradients are looked at where they can be new, and of the parameters that
    are gathered as one the last stands for all.
    """

    def __init__(
        self, models: Iterable[nn.Module], parameters: Iterable[Tensor], stages: dist.ProcessGroup | None = None
    ):
        super().__init__()
        self._stages = None if stages is None else stages.group_name
        self._parameters = list(parameters)
        models = self._models = list(models)
        modules = {id(fsdp_state(module)): module for model in models for module in sharded_modules(model)}
        self._modules = list(modules.values())  # those that are gathered as one, once
        self._params = [params for module in self._modules if (params := fsdp_params(module))]
        self._new = self._params  # those that were never gathered
        # Of the others: their storages, which stay and are empty while they are not gathered, and that of each module which is
        # filled last.
        self._whole: list[torch.UntypedStorage] = []
        self._last: list[torch.UntypedStorage] = []
        self._sizes: list[int] = []
        self._whole_sizes: set[int] = set()
        self._buckets = [
            flat for model in models if (buckets := buckets_of(model)) is not None for flat in buckets.flat
        ]
        self._lives: list[Life] = []
        self._gathered: list[tuple[int, int]] = []
        self._handles: list[RemovableHandle] = []
        self._at, self._since, self._returning, self._late = 0, 0, False, False
        self._looks = False  # for gradients, before the next operation

    def note_loss(self, begins: bool) -> None:
        """Says that what is made from now on belongs to the loss, or no longer does."""
        self._late = begins

    def note_message(self, tensor: Tensor) -> None:
        """Says that a tensor crosses ranks, which no operation says where these are not there."""
        if (life := self._life(tensor)) is not None:
            life.moved = True

    def note_host(self, tensor: Tensor) -> None:
        """Says that a tensor is one that has left the device, or, of a gradient, that it leaves: how long that takes is the disk's."""
        if (life := self._life(tensor)) is None:
            return
        if life.gradient:  # until now
            storage = rows_of(tensor).untyped_storage()
            self.note_death(id(storage))
            self.note_birth(storage, "leaving")
            life = self._lives[-1]
        life.host = True

    def note_return(self, tensor: Tensor) -> None:
        """Says that a tensor is one that has come back to the device, which no operation made where a file was read."""
        self.note_birth(rows_of(tensor).untyped_storage(), "returned")

    def __enter__(self) -> "Lifetimes":
        self._handles = [tell_first(p, self._note_gradient_of) for p in self._parameters if p.requires_grad]
        super().__enter__()
        return self

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._at += 1
        if in_backward() != self._returning:
            self._note_phase()
        if self._looks:
            self._note_gradients()
        result = super().__torch_dispatch__(function, types, args, kwargs)
        told = told_of(function)
        if told.moves:
            self._note_moves(told.name, args, kwargs)
        if self._params:
            self._note_gathered()
        return result

    def _note_phase(self) -> None:
        """Notes that what is there where a backward begins or ends was kept."""
        for _, life in self.there.values():
            life.kept |= life.returning == self._returning
        for copy in itertools.chain(*map(copies_of, self._models)):
            if (found := self._life(copy)) is not None:
                found.sent = True
        self._returning = not self._returning
        self._looks = True

    def begun(self, size: int, operation: str) -> Life:
        life = Life(size, operation, self._at, self._returning, self._late)
        self._lives.append(life)
        if size in self._whole_sizes and not self._returning and not torch.is_grad_enabled():
            self._looks = True  # a weight's gradient that was put off is set outside a backward, as soon as it is made
        return life

    def ended(self, noted: Life) -> None:
        noted.died = self._at

    def _life(self, tensor: Tensor) -> Life | None:
        found = self.there.get(id(rows_of(tensor).untyped_storage()))
        return None if found is None else found[1]

    def _note_moves(self, name: str, args: Any, kwargs: Any) -> None:
        leaves = name.startswith("c10d::send") and dist.ProcessGroup.unbox(args[1]).group_name == self._stages
        gradients = {id(storage) for storage in storages(args[0])} if name.startswith("fsdp::chunk_cat") else ()
        for storage in storages((args, kwargs)):
            if (found := self.there.get(id(storage))) is not None:
                life = found[1]
                life.gradient |= id(storage) in gradients
                # What is summed over ranks may wait for the thread that did it past the end of a backward.
                life.sent |= leaves or name.startswith(("fsdp::", "c10d::allreduce"))
                life.moved = True

    def _note_gradient(self, gradient: Tensor | None) -> None:
        if gradient is not None and (life := self._life(gradient)) is not None:
            life.gradient = True

    def _note_gradient_of(self, p: Tensor) -> None:
        self._note_gradient(p.grad)

    def _note_gradients(self) -> None:
        """Notes those that autograd does not tell of too: weights' that were put off, and what FSDP2 keeps until later micro-batches,
        in 32 bits or split."""
        self._looks = False
        for p in self._parameters:
            self._note_gradient(p.grad)
        for param in itertools.chain(*self._params):
            if (whole := gathered(param)) is not None:
                self._note_gradient(whole.grad)
            self._note_gradient(accumulated(param))
        for module in self._modules:
            self._note_gradient(partial_sum(module))

    def _note_gathered(self) -> None:
        self._since = self._at
        if self._new:
            self._new = [params for params in self._new if not self._begin_whole(params)]
        if (sizes := [storage.nbytes() for storage in self._last]) != self._sizes:
            self._sizes = sizes
            self._gathered.append((self._since, sum(storage.nbytes() for storage in self._whole)))

    def _begin_whole(self, params: list[Any]) -> bool:
        """Returns whether parameters that are gathered as one have been, for the first time."""
        tensors = [whole for param in params if (whole := gathered(param)) is not None]
        if len(tensors) < len(params):
            return False
        wholes = [rows_of(tensor).untyped_storage() for tensor in tensors]
        self._last.append(wholes[-1])
        self._whole += wholes
        self._whole_sizes |= {storage.nbytes() for storage in wholes}
        self._handles += [tell_first(p, self._note_gradient_of) for p in tensors if p.requires_grad]
        for tensor in tensors:
            if (life := self._life(tensor)) is not None:
                life.whole = True
                self._since = min(self._since, life.born)  # it is known when all are, and was there before
        return True

    def __exit__(self, *error: Any) -> Any:
        self._note_gradients()  # those that are left
        for handle in self._handles:
            handle.remove()
        for p in self._parameters:
            if (life := self._life(p)) is not None:
                life.stays = True  # FSDP2 pads rows anew before the first forward
        return super().__exit__(*error)

    @property
    def parameter_bytes(self) -> int:
        """Counts what the rows of the parameters take, as they lie now, but for those in files."""
        rows = [rows_of(p.detach()) for p in self._parameters]
        every = {id(t.untyped_storage()): t.untyped_storage().nbytes() for t in rows if not is_mapped(t)}
        return sum(every.values())

    def peaks(self) -> tuple[dict[str, int], int]:
        """Counts the most bytes of each of MOVING, and of all together on the device."""
        changes = self._changes()
        most = {category: max((size for _, size in held(by)), default=0) for category, by in changes.items()}
        return most, max(size for _, size in held(on_device(changes)))

    def at_the_peak(self) -> list[tuple[str, str, int, int]]:
        """Lists (category, the operation that made it, bytes, how many) of the storages that are there when most is held, the largest
        first; and what FSDP2 holds, which no operation makes: gathered parameters, and gradients in buckets."""
        changes = self._changes()
        peak = max(held(on_device(changes)), key=lambda moment: moment[1])[0]
        found: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0])
        for life in self._lives:
            if life.category is not None and life.born <= peak <= (self._at if life.died is None else life.died):
                entry = found[life.category, life.operation]
                entry[0] += life.size
                entry[1] += 1
        for category, operation in (("gathered", "all_gather"), ("gradients", "bucket")):
            there = sum(change for at, change in changes[category].items() if at <= peak)
            if rest := there - sum(size for (one, _), (size, _) in found.items() if one == category):
                found[category, operation] = [rest, 1]
        every = [(category, operation, size, count) for (category, operation), (size, count) in found.items()]
        return sorted(every, key=lambda one: -one[2])

    def _changes(self) -> dict[str, Counter[int]]:
        """Lists by how many bytes each of MOVING changes, and when."""
        changes = {category: Counter[int]() for category in MOVING}
        changes["gradients"][0] = sum(flat.untyped_storage().nbytes() for flat in self._buckets)
        for life in self._lives:
            if (category := life.category) is not None:
                changes[category][life.born] += life.size
                if life.died is not None:
                    changes[category][life.died + 1] -= life.size
        for (_, before), (at, total) in itertools.pairwise([(0, 0), *self._gathered]):
            changes["gathered"][at] += total - before
        return changes
