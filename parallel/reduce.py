"""Gradients summed with fewer bytes (qgZ of Wang et al., *ZeRO++*), in place of FSDP2's own reduce-scatter. **Outside law 2**: a sum
of rounded parts depends on how many parts there are. On one layout a run is repeated to the last bit.

`parallel.quantize_reduce=int8|int4`: gradients of matrices cross the ranks that split states as codes (`kernels.row_codes`)
rounded at random, so that what comes out is their sum on the mean; vectors cross as they are. A rank's gradient has W slices, of which
slice r is to be rank r's sum:

    one level                 each slice in codes to its owner, who decodes and adds W up
    two (`inner_shard=N`)     slices of all owners that are in place k of their machine, to the neighbour in place k, who decodes
                              and adds N up in float32; each sum in codes anew to its owner, who adds W / N up

The random bits are those of a stream for the run's seed, the rank, the part of the model, the sequence that the step begins with and
the reduction within the step: a run that goes on draws what it would have drawn. Sums over replicas follow as ever.

Error of an element, with s = max |.| / q of its block, q = 127 (int8) or 7 (int4): less than the sum of the W gradients' s, and
on two levels of those of the W / N sums; its variance is at most a quarter of the sum of their squares.

Bytes that a rank sends of n numbers a slice, in codes of b = 1 or 1/2 bytes a number and 4 for 256, b' = b + 4/256: on one level
(W - 1) n b'; on two (W - W/N) n b' to neighbours and (W/N - 1) n b' between machines. FSDP2's own: (W - 1) n times a number's.
"""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rowwise.conf.refusal import Refusal, Refusals
from rowwise.kernels.philox import stream_key
from rowwise.parallel.config import ParallelConfig
from rowwise.parallel.mesh import Levels, Mesh
from rowwise.parallel.row_messages import RowMessages
from rowwise.parallel.torch_fsdp import learning_shapes

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule

_HANDLE = "reductions"
BITS = {"int8": 8, "int4": 4}


def _reduces(run: Any) -> bool:
    return run.parallel.quantize_reduce != "none"


REDUCED: Refusals = (
    Refusal(
        ("parallel.quantize_reduce", "parallel.zero", "parallel.shard", "parallel.ring", "parallel.ulysses"),
        lambda run: _reduces(run) and (run.parallel.zero == 0 or run.parallel.state_degree == 1),
        lambda run: (
            f"parallel.quantize_reduce={run.parallel.quantize_reduce} with parallel.zero={run.parallel.zero} over shard x ring x "
            f"ulysses = {run.parallel.state_degree}: no gradient is split and sent to its owner; give parallel.zero=1 to 3 "
            "over more ranks, or parallel.quantize_reduce=none"
        ),
    ),
    Refusal(
        ("parallel.quantize_reduce", "precision.name"),
        lambda run: _reduces(run) and run.precision.name == "fp64",
        "parallel.quantize_reduce={parallel.quantize_reduce} with precision=fp64: 64 bits are for numbers that are the same on every "
        "layout, and sums of rounded gradients are not; give parallel.quantize_reduce=none, or precision=fp32, bf16 or fp16",
    ),
)


class Reduce:
    """What FSDP2 calls to sum the gradients of one module. `shapes`: what each rank owns of each, padded to be alike; `levels`: how
    ranks lie in machines, or None; `seed` and `stream`: of its random bits, which no other has."""

    def __init__(self, shapes: Sequence[torch.Size], bits: int, levels: Levels | None, seed: int, stream: str):
        self._shapes, self._bits, self._levels, self._seed, self._stream = shapes, bits, levels, seed, stream
        self._first, self._made = 0, 0

    def begin_step(self, first: int) -> None:
        """Begins a step whose first sequence, of this rank's, is number `first` of the run."""
        self._first, self._made = first, 0

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Gives FSDP2 room for a flat buffer."""
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, op: Any, async_op: bool = False
    ) -> None:
        """Puts into output (n) the sum over ranks of their inputs (W n), of the slice that this rank owns."""
        assert not async_op and op == dist.ReduceOp.SUM
        self._made += 1
        slices = input_tensor.view(group.size(), -1)
        if self._levels is None:
            total = self._exchange(slices[:, None], group, "all")
        else:
            inner, outer = self._levels.inner, self._levels.outer
            by_place = slices.view(outer.size, inner.size, -1).transpose(0, 1)
            sums = self._exchange(by_place, inner.group, "inner")
            total = self._exchange(sums[:, None], outer.group, "outer")
        output_tensor.copy_(total[0])

    def _exchange(self, parts: Tensor, group: dist.ProcessGroup, level: str) -> Tensor:
        """Sends parts[i] (S, n) to the i-th rank of a group, and returns the sum (S, n) of those that come, in float32."""
        form = RowMessages(self._shapes, parts.dtype, self._bits)
        assert form.numbers == parts.size(2), "some parameters have no gradient"
        key = stream_key(self._seed, f"{self._stream}/{self._first}/{self._made}/{level}")
        sent = torch.empty(*parts.shape[:2], form.bytes, dtype=torch.uint8, device=parts.device)
        for i, part in enumerate(parts):
            form.pack_(part, sent[i], key, first=i * part.numel())
        came = torch.empty_like(sent)
        dist.all_to_all_single(came, sent, group=group)
        total = torch.zeros(parts.shape[1:], dtype=torch.float32, device=parts.device)
        for message in came:
            form.unpack_(message, total, add=True)
        return total


def reduce_by(
    model: nn.Module, modules: Sequence["FSDPModule"], config: ParallelConfig, mesh: Mesh, seed: int, stage: int
) -> None:
    """Has FSDP2 sum the gradients of `modules`, those of `model` that it holds, each once, as `config` says. `stage`: which of this
    rank's stages the model is."""
    if config.quantize_reduce == "none":
        return
    reductions = []
    for part, module in enumerate(modules):
        stream = f"reduce/{mesh.rank}/{stage}/{part}"
        reductions.append(Reduce(learning_shapes(module), BITS[config.quantize_reduce], mesh.levels, seed, stream))
        module.set_custom_reduce_scatter(cast(Any, reductions[-1]))  # a ReduceScatter by its methods
    setattr(model, _HANDLE, reductions)


def reductions_of(model: nn.Module) -> Iterable[Reduce]:
    """Returns what sums the gradients of a model in codes; nothing where they are summed as they are."""
    return getattr(model, _HANDLE, ())
