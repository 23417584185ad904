"""How much errors of a matrix's numbers cost, by which LQ-LoRA weighs them: the Fisher information of the first batches of a run.

    F (m, n)  =  sum over sequences of G * G        G (m, n)  =  (sum over its tokens of dy x^T) / its tokens that have a label

x (n,) is what the layer takes for a token and dy (m,) the gradient of its sequence's loss by what it gives: G is the gradient of a
sequence's mean loss (Guo et al., *LQ-LoRA*, section 3.4, and their code, which takes sequences one by one). A sequence without
labels counts nothing.

Matrices of a run with an adapter have no gradients, and those of LQ-LoRA no numbers before they have a form. So a model is made for
this alone, and let go: the run's, of LoRA, whose matrices are as the run begins with them and whose B is 0, so that it computes as
they do. It takes the memory and the messages of LoRA's steps. Matrices are looked at in groups, as in `inputs`, each in a pass of its
own, forward and backward, with 8 m n bytes a matrix of them; ranks that share sequences sum each G, 4 m n bytes a sequence, and one
rank has the F of a matrix in the end, 8 m n bytes from every rank.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import islice

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rowwise.kernels.wide import wide, wide_dtype
from rowwise.parallel.activations.saved import sequences_of_forward
from rowwise.parallel.mesh import Mesh
from rowwise.parallel.precision import initial_loss_scale
from rowwise.trainer.adapters.config import Lora, LqLora
from rowwise.trainer.adapters.from_data import Batches, looked_at, require_none
from rowwise.trainer.adapters.inputs import in_passes, modules_of
from rowwise.trainer.assemble import Assembled
from rowwise.trainer.config import TrainConfig
from rowwise.trainer.data.batches import MicroBatch
from rowwise.trainer.data.corpus import IGNORE
from rowwise.trainer.parallelize import parameter_dtype

Look = Callable[[int, Tensor, Tensor], None]  # at the first sequence's number, x (B, S, n) and dy (B, S, m)
Counts = Mapping[int, Sequence[float]]  # of the labels of each sequence of a micro-batch, by the number of its first


def fisher_of(config: TrainConfig, mesh: Mesh, batches: Batches, shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    """Returns F of every `mesh.world_size`-th matrix, from that of the rank's number on, on the host. `shapes`: of each matrix, by its
    layer. All ranks call it. Raises Unbegun, on every rank."""
    adapter = config.adapter
    assert isinstance(adapter, LqLora)
    owners = {layer: number % mesh.world_size for number, layer in enumerate(shapes)}
    dtype, found, complaints = wide_dtype(parameter_dtype(config)), dict[str, Tensor](), list[str]()

    def look(built: Assembled) -> None:
        for some in in_passes({layer: 8 * shape.numel() for layer, shape in shapes.items()}):
            sums = {layer: torch.zeros(shapes[layer], dtype=torch.float64, device=mesh.device) for layer in some}
            for step in islice(batches(), adapter.init_batches):
                add_step_(sums, config, mesh, built, step)
            for layer in some:
                dist.reduce(sums[layer], owners[layer])
                if owners[layer] == mesh.rank:
                    found[layer] = sums[layer].to("cpu", dtype)
                    if not (found[layer].isfinite().all() and found[layer].any()):
                        complaints.append(f"{layer}: its gradients are zero, or not finite")
                del sums[layer]

    looked_at(as_lora(config, adapter), mesh, look)
    require_none(complaints, mesh, "adapter.fisher", adapter.init_batches, "adapter.fisher=false")
    return found


def as_lora(config: TrainConfig, adapter: LqLora) -> TrainConfig:
    """Returns the run with LoRA in the place of LQ-LoRA, without what needs more than gradients: a schedule, or compiling."""
    plain = Lora(layers=adapter.layers, train=adapter.train, rank=adapter.rank, alpha=adapter.alpha)
    parallel = config.parallel
    if parallel.pipeline > 1:
        parallel = replace(parallel, pipeline_schedule="1f1b", virtual_stages=1, post_validation=False)
    optim = replace(config.optim, in_backward=False)
    return replace(config, adapter=plain, parallel=parallel, optim=optim, compile=False)


def add_step_(
    sums: Mapping[str, Tensor], config: TrainConfig, mesh: Mesh, built: Assembled, batches: list[MicroBatch]
) -> None:
    """Adds to the sums, by layer, what this rank sees of a global batch."""
    counts, scale = counted(batches, mesh), initial_loss_scale(config.precision).scale / config.batch.positions
    looks = {layer: partial(add_, squares, counts, mesh, scale) for layer, squares in sums.items()}
    with shown(built.model, looks):
        built.engine.forward_backward(batches, scale)
    built.optimizer.zero_grad()


def counted(batches: Sequence[MicroBatch], mesh: Mesh) -> Counts:
    """Counts the labels of each sequence, on every rank that has a part of it."""
    counts = torch.stack([(batch.labels != IGNORE).sum(1) for batch in batches]).to(mesh.device, torch.float64)
    _sum_of_sequence(counts, mesh)
    return {batch.first: some for batch, some in zip(batches, counts.tolist(), strict=True)}


def add_(squares: Tensor, counts: Counts, mesh: Mesh, scale: float, first: int, x: Tensor, dy: Tensor) -> None:
    """Adds G * G of each sequence, whose loss is a sum over tokens times `scale`: on the first of the ranks that share it."""
    shares = mesh.sequence
    adds = shares is None or shares.ring.rank == shares.ulysses.rank == 0
    for count, x_sn, dy_sm in zip(counts[first], x, dy, strict=True):
        if count:
            g = wide(dy_sm).T @ wide(x_sn)
            _sum_of_sequence(g, mesh)
            if adds:
                squares += (g.double() / (count * scale)).square_()


def _sum_of_sequence(t: Tensor, mesh: Mesh) -> None:
    for axis in () if mesh.sequence is None else (mesh.sequence.ring, mesh.sequence.ulysses):
        dist.all_reduce(t, group=axis.group)


@contextmanager
def shown(model: nn.Module, looks: Mapping[str, Look]) -> Iterator[None]:
    """Gives each look what its layer takes and the gradient of what it gives, of those that this rank has, in every backward."""
    modules = modules_of(model)
    handles = [
        modules[layer].register_forward_hook(partial(_watch, look)) for layer, look in looks.items() if layer in modules
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _watch(look: Look, _: nn.Module, given: tuple[Tensor], y: Tensor) -> None:
    if y.requires_grad and (first := sequences_of_forward()) is not None:  # what is made again in a backward has none
        y.register_hook(partial(look, first, given[0].detach()))
