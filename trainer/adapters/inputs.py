"""What layers take while the model runs over the first batches of its data, as sums that are the same on every layout.

    sums  =  sum_x [c x, 1]^T [c x, 1]        (n + 1, n + 1), float64; x (n,): what a layer takes for a token that has a label

so that the last row has the sum of c x, and how many x there are. c is 1, or what its sequence is divided by in CorDA: the size of the
largest number that the layer takes for it, as its authors have it.

Layers are looked at in groups, each in a pass of its own, whose sums take at most `PASS_BYTES` together, or are one layer's. A rank
sums what it sees; then one rank has the sum over all, 8 (n + 1)^2 bytes of each layer from every rank. For c, ranks that share
sequences tell each other a number of each, layer by layer.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rowwise.kernels.wide import wide
from rowwise.parallel.mesh import Mesh, SequenceAxes
from rowwise.trainer.data.batches import MicroBatch
from rowwise.trainer.data.corpus import IGNORE
from rowwise.trainer.engine import Engine
from rowwise.trainer.pipeline import StagedDecoder

PASS_BYTES = 2 << 30  # of the sums of a pass
Divisor = Callable[[Tensor, Tensor], Tensor]  # of x (B, S, n), of which some have a label (B, S): (B,)


def in_passes(sizes: Mapping[str, int]) -> list[list[str]]:
    """Returns the layers, by how many bytes the sums of each take, in groups in their order."""
    groups, filled = list[list[str]](), 0
    for layer, size in sizes.items():
        if not groups or filled + size > PASS_BYTES:
            groups, filled = [*groups, []], 0
        groups[-1].append(layer)
        filled += size
    return groups


@torch.no_grad()
def sums_of(
    engine: Engine, mesh: Mesh, columns: Mapping[str, int], owners: Mapping[str, int], batches: Iterable[MicroBatch],
    divided: bool, compiled: bool = False,
) -> dict[str, Tensor]:  # fmt: skip
    """Runs the model over all ranks' `batches` and returns the sums over all ranks of the layers that this rank owns. `divided`: x is
    divided by `largest` of its sequence. All ranks call it."""
    found = {layer: torch.zeros(n + 1, n + 1, dtype=torch.float64, device=mesh.device) for layer, n in columns.items()}
    divisor = partial(largest, mesh.sequence) if divided else None
    # What is compiled would have what looks on compiled too.
    with torch.compiler.set_stance("force_eager") if compiled else nullcontext():
        for batch in batches:
            has_label = (batch.labels != IGNORE).to(mesh.device)
            with looking_on(
                engine.model, {layer: partial(add_, sums, has_label, divisor) for layer, sums in found.items()}
            ):
                engine.losses([batch])
    for layer, owner in owners.items():
        dist.reduce(found[layer], owner)
    return {layer: sums for layer, sums in found.items() if owners[layer] == mesh.rank}


def add_(sums: Tensor, has_label: Tensor, divisor: Divisor | None, x: Tensor) -> None:
    """Adds what a layer takes, x (B, S, n), for the tokens of it that have a label (B, S); products are in 32 bits or more."""
    x = wide(x.detach())
    if divisor is not None:
        x = x / divisor(x, has_label)[:, None, None]
    rows = x[has_label]
    rows = torch.cat([rows, rows.new_ones(len(rows), 1)], dim=1)
    sums += rows.T @ rows


def largest(sequence: SequenceAxes | None, x: Tensor, has_label: Tensor) -> Tensor:
    """Returns the size of the largest number of each sequence (B,), of x (B, S, n) on every rank that has a part of it."""
    most = x.masked_fill(~has_label[..., None], -torch.inf).amax((1, 2))
    for axis in () if sequence is None else (sequence.ring, sequence.ulysses):
        dist.all_reduce(most, dist.ReduceOp.MAX, group=axis.group)
    return most.abs()


@contextmanager
def looking_on(model: nn.Module, looks: Mapping[str, Callable[[Tensor], None]]) -> Iterator[None]:
    """Gives each look what its layer takes, of those that this rank has, while the model runs."""
    modules = modules_of(model)
    with ExitStack() as stack:
        for layer, look in looks.items():
            if (module := modules.get(layer)) is not None:  # it may be another stage's
                stack.callback(module.register_forward_pre_hook(partial(_shown, look)).remove)
        yield


def _shown(look: Callable[[Tensor], None], _: nn.Module, given: tuple[Tensor]) -> None:
    look(given[0])


def modules_of(model: nn.Module) -> dict[str, nn.Module]:
    """Returns the modules of a model, or of this rank's stages of it, by the names that they have in the whole of it."""
    parts = model.decoders.values() if isinstance(model, StagedDecoder) else [model]
    return {name: module for part in parts for name, module in part.named_modules()}
