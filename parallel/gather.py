"""Weights gathered with fewer bytes (Wang et al., *ZeRO++*), in place of FSDP2's own all-gather.

*qwZ*, `parallel.quantize_gather=int8`: matrices cross as 8-bit codes with a scale for every 256 numbers of a row
(`kernels.row_codes`), vectors as they are. What computes is the rounded weight, a function of the logical weight in the dtype that
computes; so it is the same on every layout, and ranks that gather nothing round as well. What is stepped and saved is exact.

*hpZ*, `parallel.inner_shard=N`, at stage 3: once the state ranks have gathered a part in a step, each keeps 1/N of it, in the
dtype that computes, and what is gathered again in that step (in the backward, in other micro-batches) is gathered from its N
neighbours. Exact. Copies are made after a step has begun and dropped where it ends, so none is there when weights change.

With M bytes of weights in the dtype that computes, of b bytes a number, over the state ranks W = N x outer, per step and rank:

| | received from all state ranks | from the N neighbours | kept |
|---|---|---|---|
| none | 2 M accumulate | 0 | 0 |
| qwZ | 2 M accumulate (1 + 4/256) / b | 0 | 0 |
| hpZ | M | M (2 accumulate - 1) | M / N |
| both | M (1 + 4/256) / b | M (2 accumulate - 1) | M / N |

each times (ranks - 1) / ranks. (What stays gathered between forward and backward, the last part, is gathered less.)
"""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rowwise.conf.refusal import Refusal, Refusals
from rowwise.kernels.row_codes import rounded_rows
from rowwise.parallel.config import ParallelConfig, divisors
from rowwise.parallel.mesh import Levels, Mesh
from rowwise.parallel.row_messages import RowMessages
from rowwise.parallel.torch_c10d import all_gather_flat
from rowwise.parallel.torch_fsdp import fsdp_params, padded_shapes, transform_alone

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule

_HANDLE = "gathers"


def _inner_choices(parallel: ParallelConfig) -> list[int]:
    return divisors(parallel.state_degree)[:-1]


GATHERED: Refusals = (
    Refusal(
        ("parallel.inner_shard", "parallel.zero"),
        lambda run: run.parallel.inner_shard and run.parallel.zero != 3,
        "parallel.inner_shard={parallel.inner_shard} with parallel.zero={parallel.zero}: below stage 3 weights are gathered once a "
        "step, so that a copy would serve nothing; give parallel.zero=3, or parallel.inner_shard=0",
    ),
    Refusal(
        ("parallel.inner_shard", "parallel.shard", "parallel.ring", "parallel.ulysses"),
        lambda run: run.parallel.inner_shard and run.parallel.inner_shard not in _inner_choices(run.parallel),
        lambda run: (
            f"parallel.inner_shard={run.parallel.inner_shard}, of shard x ring x ulysses = {run.parallel.state_degree} ranks that "
            f"split states: possible are {_inner_choices(run.parallel) or 'none'}, such as the ranks of a machine, or 0"
        ),
    ),
    Refusal(
        ("parallel.quantize_gather", "memory.offload_params", "parallel.shard", "parallel.ring", "parallel.ulysses"),
        lambda run: (
            run.parallel.quantize_gather != "none"
            and run.memory.offload_params != "none"
            and run.parallel.state_degree == 1
        ),
        "parallel.quantize_gather={parallel.quantize_gather} with memory.offload_params={memory.offload_params} on one rank: its rows "
        "come to the device exact, and nothing is gathered; give parallel.quantize_gather=none, or parallel.shard above 1",
    ),
    Refusal(
        ("parallel.quantize_gather", "sparsity.name"),
        lambda run: run.parallel.quantize_gather != "none" and run.sparsity.name == "nm",
        "parallel.quantize_gather={parallel.quantize_gather} with sparsity=nm: masks would be those of rounded weights, among which "
        "many are equal; give parallel.quantize_gather=none, or another sparsity",
    ),
)


class Gather:
    """What FSDP2 calls to gather the parameters of one module. `shapes`: what each rank has of each, padded to be alike;
    `quantise`: matrices cross as codes; `levels`: whose inner ranks keep copies."""

    def __init__(self, shapes: Sequence[torch.Size], quantise: bool, levels: Levels | None):
        self._shapes, self._quantise, self._levels = shapes, quantise, levels
        self._keeps = False
        self._copy: Tensor | None = None

    def keep_copies(self, keep: bool) -> None:
        """Says whether what is gathered from now on is kept among neighbours; what was kept before is dropped."""
        self._keeps, self._copy = keep and self._levels is not None, None

    @property
    def copy(self) -> Tensor | None:
        """What this rank keeps, flat; None: nothing."""
        return self._copy

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Gives FSDP2 room for a flat buffer."""
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> None:
        """Fills output (W n) with every state rank's input (n), in the dtype that computes; or with what neighbours kept."""
        assert not async_op, "FSDP2 gathers on streams of its own"
        if self._copy is not None:
            assert self._levels is not None
            all_gather_flat(output_tensor, self._copy, self._levels.inner.group)
            return
        if self._quantise:
            self._gather_codes(output_tensor, input_tensor, group)
        else:
            all_gather_flat(output_tensor, input_tensor, group)
        if self._keeps:
            assert self._levels is not None
            inner = self._levels.inner
            self._copy = output_tensor.view(inner.size, -1)[inner.rank].clone()

    def _gather_codes(self, output: Tensor, own: Tensor, group: dist.ProcessGroup) -> None:
        form = RowMessages(self._shapes, own.dtype, bits=8)
        assert form.numbers == own.numel()
        mine = own.new_empty(1, form.bytes, dtype=torch.uint8)
        form.pack_(own[None], mine)
        everyone = own.new_empty(group.size(), form.bytes, dtype=torch.uint8)
        all_gather_flat(everyone.view(-1), mine.view(-1), group)
        form.unpack_(everyone, output.view(group.size(), -1))


def gather_by(model: nn.Module, modules: Iterable["FSDPModule"], config: ParallelConfig, mesh: Mesh) -> None:
    """Has FSDP2 gather `modules`, those of `model` that it holds, each once, as `config` says. Their parameters must exist."""
    quantise, gathers = config.quantize_gather != "none", []
    if not quantise and mesh.levels is None:
        return
    for module in modules:
        if mesh.states["shard"].size() == 1:
            for param in fsdp_params(module):
                transform_alone(param, rounded)
        else:
            gathers.append(Gather(padded_shapes(module), quantise, mesh.levels))
            module.set_custom_all_gather(cast(Any, gathers[-1]))  # an AllGather by its methods
    setattr(model, _HANDLE, gathers)


def copies_of(model: nn.Module) -> list[Tensor]:
    """Lists what this rank keeps now of what `model` has gathered."""
    copies = (gather.copy for gather in getattr(model, _HANDLE, ()))
    return [copy for copy in copies if copy is not None]


def rounded(rows: Tensor) -> Tensor:
    """Gives a parameter as other ranks would have it: a matrix rounded, a vector as it is."""
    return rounded_rows(rows) if rows.ndim == 2 else rows


def keep_copies(model: nn.Module, keep: bool) -> None:
    """Says that a step of `model` begins, in which weights do not change and neighbours keep what they gather, or that it is over."""
    for gather in getattr(model, _HANDLE, ()):
        gather.keep_copies(keep)
