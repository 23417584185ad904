"""ZeRO 0 to 3 and hybrid sharding (Rajbhandari et al., *ZeRO*), on FSDP2 wherever something is split.

Parameters are split by rows (dim 0) over the `shard` axis of the mesh and repeated over `replicate`. With N ranks
on the shard axis and `accumulate` micro-batches a step, per step and parameter:

| stage | gathered | gradients | crosses the shard axis (numbers per parameter and rank) |
|---|---|---|---|
| 0 | nothing: `parallel.replicate` | whole, reduced once | nothing; all-reduce over all ranks, 1 x |
| 1 | all, from the first forward to the last backward | whole, reduce-scattered once | gather 1 x, reduce-scatter 1 x |
| 2 | as 1 | split, reduce-scattered each micro-batch | gather 1 x, reduce-scatter accumulate x |
| 3 | one part at a time, twice a micro-batch | as 2 | gather 2 accumulate x, reduce-scatter accumulate x |

Where the shard axis has one rank nothing is split, whatever the stage. In 16-bit precision, which computes in a copy of
the parameters, FSDP2 makes that copy, also where nothing is split; so it does where weights compute rounded (`parallel.gather`),
and where rows wait off the device (`parallel.away`) it brings them there one part at a time, from one rank too.

With `replicate` > 1 the split gradients are all-reduced over it once a step. Gradients are *sums* over ranks:
the step divides by the number of valid tokens of the global batch, which no rank knows on its own.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from rowwise.kernels import torch_lists
from rowwise.kernels.later import Later
from rowwise.kernels.rows import local, row_offset
from rowwise.kernels.spec import specs_of
from rowwise.kernels.wide import wide_dtype
from rowwise.parallel.away import away_of, in_memory, scale_in_file
from rowwise.parallel.gather import keep_copies
from rowwise.parallel.mesh import Mesh
from rowwise.parallel.precision import DTYPES, Bf16, Fp16, PrecisionConfig
from rowwise.parallel.reduce import reductions_of
from rowwise.parallel.replicate import buckets_of, in_buckets
from rowwise.parallel.row_file import RowFile
from rowwise.parallel.torch_fsdp import (
    accumulate_wide,
    begin_reduction,
    end_backward,
    fsdp_group,
    fsdp_params,
)

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, OffloadPolicy

fsdp = Later("torch.distributed.fsdp")


def policy(config: PrecisionConfig) -> "MixedPrecisionPolicy":
    """Returns the dtype in which FSDP2 computes and the one in which it reduces; both None where it computes in what it keeps."""
    if isinstance(config, Bf16 | Fp16):
        reduce = config.reduce if isinstance(config, Bf16) else "fp32"
        return fsdp.MixedPrecisionPolicy(param_dtype=DTYPES[config.name], reduce_dtype=DTYPES[reduce])
    return fsdp.MixedPrecisionPolicy()


def offload_policy(pinned: bool) -> "OffloadPolicy":
    """Returns what has FSDP2 keep rows and gradients in host memory; `pinned`: so that copies go beside what is computed."""
    return fsdp.CPUOffloadPolicy(pin_memory=pinned)


def is_split(mesh: Mesh, policy: "MixedPrecisionPolicy", away: bool = False, rounds: bool = False) -> bool:
    """Says whether FSDP2 holds the parameters: rows are split, or wait `away` from the device, or a copy in another dtype computes or
    accumulates, or one that is rounded (`rounds`)."""
    return mesh.states["shard"].size() > 1 or policy.param_dtype is not None or away or rounds


def shard_model(
    model: nn.Module,
    parts: list[list[nn.Module]],
    mesh: Mesh,
    zero: int,
    policy: "MixedPrecisionPolicy",
    away: "OffloadPolicy | None" = None,
) -> None:
    """Splits `model` in place. `parts`, in forward order, are gathered and reduced as one each; what they leave of
    the model is one more. What is used last in the forward is used first in the backward and stays gathered between.
    `away`: where rows wait off the device."""
    states = mesh.states if mesh.states.size(0) > 1 else mesh.states["shard"]
    given = {"mesh": states, "mp_policy": policy} | ({} if away is None else {"offload_policy": away})
    for part in parts if len(parts) > 1 else []:  # one part is everything: the root's
        keep = zero < 3 or part is parts[-1]
        fsdp.fully_shard(part if len(part) > 1 else part[0], **given, reshard_after_forward=not keep)
    fsdp.fully_shard(model, **given, reshard_after_forward=False)
    sum_over_ranks(model)


def sum_over_ranks(model: nn.Module) -> None:
    """Has FSDP2 add up gradients over ranks, where it would take their mean."""
    for module in sharded_modules(model):
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)


def merge_parts(parts: list[list[nn.Module]], zero: int) -> list[list[nn.Module]]:
    """Puts neighbouring parts together at stages 0 and 1 until each has BUCKET_BYTES: fewer, larger messages, and whole
    gradients are held anyway. At stages 2 and 3 a part is what is whole at once, so they stay as they are."""
    if zero >= 2:
        return parts
    return [[module for part in bucket for module in part] for bucket in in_buckets(parts, _bytes)]


def _bytes(modules: list[nn.Module]) -> int:
    return sum(p.numel() * p.itemsize for module in modules for p in module.parameters())


def sharded_modules(model: nn.Module) -> Iterator["FSDPModule"]:
    """Yields the modules of `model` that FSDP2 gathers, the root first."""
    return (module for module in model.modules() if isinstance(module, fsdp.FSDPModule))


def sharded_parts(models: Iterable[nn.Module]) -> list["FSDPModule"]:
    """Lists of `models` what FSDP2 gathers parameters with, each group of modules that are gathered as one once."""
    modules = [module for model in models for module in sharded_modules(model) if fsdp_params(module)]
    return list({id(fsdp_group(module)): module for module in modules}.values())


def materialize(model: nn.Module, device: torch.device, fill_: Callable[[str, Tensor, int, int], None]) -> None:
    """Gives a model built on the meta device memory for this rank's shards only and fills them.

    `fill_(name, local, start, size)` writes rows [start, start + local.size(0)) of the parameter `name`, whose
    logical dim 0 is `size`, into `local`.
    """
    model.to_empty(device=device)
    with torch.no_grad():
        for name, param in model.named_parameters():
            fill_(name, local(param), row_offset(param), param.size(0))


def begin_pass(model: nn.Module) -> None:
    """Begins a forward of any kind, before which parameters may have changed."""
    if (away := away_of(model)) is not None:
        away.begin_pass()


def begin_step(model: nn.Module, first: int) -> None:
    """Says that a step of `model` begins, with sequence `first` of the run on this rank: until `finish_backward` or
    `forget_forwards` its weights do not change."""
    keep_copies(model, True)
    for reduction in reductions_of(model):
        reduction.begin_step(first)


def begin_micro_batch(model: nn.Module, zero: int, last: bool) -> None:
    """Says whether the coming backward is the last of the step, so that gradients cross ranks when the stage says."""
    if (buckets := buckets_of(model)) is not None:
        buckets.begin_micro_batch(last)
    if not isinstance(model, fsdp.FSDPModule):
        return
    model.set_is_last_backward(last)
    if zero <= 1:
        model.set_requires_gradient_sync(last)
    else:
        model.set_requires_all_reduce(last)
    model.set_reshard_after_backward(last or zero == 3)


def finish_backward(model: nn.Module) -> None:
    """Sums every gradient over ranks, after the last backward of a step."""
    keep_copies(model, False)
    if (buckets := buckets_of(model)) is not None:
        buckets.finish()
    if (away := away_of(model)) is not None:
        away.finish_gradients()


def hold_gradients(model: nn.Module, release_after_backward: bool) -> None:
    """Has the backwards of a pipeline stage, from before its first forward of a step, add to whole gradients, until
    `reduce_gradients`. `release_after_backward`: gathered parameters are freed after each backward."""
    if (buckets := buckets_of(model)) is not None:
        buckets.begin_micro_batch(last=False)
        buckets.zero()
    if isinstance(model, fsdp.FSDPModule):
        model.set_is_last_backward(False)
        model.set_requires_gradient_sync(False)
        model.set_reshard_after_backward(release_after_backward)


def add_up_gradients(model: nn.Module) -> None:
    """Moves 16-bit gradients of one micro-batch from `.grad` to where FSDP2 adds gradients up, in 32 bits: a sum over
    micro-batches is not rounded to 16 bits each time, whatever the dtype in which ranks reduce it."""
    for module in sharded_modules(model):
        for param in fsdp_params(module):
            accumulate_wide(param)


def reduce_gradients(model: nn.Module) -> None:
    """Starts to sum the gradients of a stage over its data-parallel ranks, and frees its gathered parameters."""
    if (buckets := buckets_of(model)) is not None:
        buckets.launch()
    if not isinstance(model, fsdp.FSDPModule):
        return
    model.set_is_last_backward(True)
    model.set_requires_gradient_sync(True)
    model.set_reshard_after_backward(True)
    for module in reversed(list(sharded_modules(model))):
        begin_reduction(module)


def wait_for_gradients(model: nn.Module) -> None:
    """Returns when the gradients that `reduce_gradients` sums are there."""
    if isinstance(model, fsdp.FSDPModule):
        end_backward(model)
    finish_backward(model)


def forget_forwards(model: nn.Module) -> None:
    """Forgets forwards of a stage that will have no backward: FSDP2 waits for none, and gathered parameters are freed."""
    keep_copies(model, False)
    if isinstance(model, fsdp.FSDPModule):
        model.set_is_last_backward(True)
        end_backward(model)
        release_gathered(model)


def prefetch_within(model: nn.Module) -> None:
    """Makes the backward of a stage gather ahead what is used next in it, and nothing at its end: FSDP2 by itself would
    gather what was used before in the forward, which may be another micro-batch's."""
    ordered = sharded_parts([model])
    for before, module in zip(ordered[:1] + ordered, ordered, strict=False):
        module.set_modules_to_backward_prefetch([before])


def keep_gathered(model: nn.Module, keep: bool) -> None:
    """Says whether the coming forward or backward of a stage leaves its parameters gathered."""
    if isinstance(model, fsdp.FSDPModule):
        model.set_reshard_after_forward(not keep)
        model.set_reshard_after_backward(not keep)


def release_gathered(model: nn.Module) -> None:
    """Frees the gathered parameters that a forward without backward leaves behind; `model.parameters()` are the
    shards again."""
    for module in sharded_modules(model):
        module.reshard()


def gradients(model: nn.Module) -> list[Tensor]:
    """Returns the local gradient shards, in the order of the parameters; a rank's empty shards are left out."""
    grads = (local(p.grad) for p in model.parameters() if p.grad is not None)
    return [g for g in grads if g.numel()]


def gradient_squares(model: nn.Module) -> dict[str, Tensor]:
    """Sums the squares of this rank's gradient rows, by the view of the mesh that they are laid over."""
    specs, by_view = specs_of(model), defaultdict[str, list[Tensor]](list)
    for name, p in model.named_parameters():
        if p.grad is not None and (rows := local(p.grad)).numel():
            by_view[specs[name].view].append(rows)
    file = gradient_file(model)
    return {view: squared_norm(rows, file) for view, rows in by_view.items()}


def squared_norm(tensors: list[Tensor], file: RowFile | None = None) -> Tensor:
    """Returns the sum of squares over all of this rank's tensors, a float64 scalar. `file`: in which they lie; one at a time is in
    memory, and the next."""
    if not tensors:
        return torch.zeros((), dtype=torch.float64)
    # 16-bit gradients have no 16-bit norm: it would depend on how they are split.
    wide = wide_dtype(tensors[0].dtype)
    some = [tensors] if file is None else ([here] for _, here in in_memory(file, tensors))
    return torch.stack([norm for few in some for norm in torch_lists.norm(few, 2, wide)]).double().square().sum()


def scale_(shards: list[Tensor], file: RowFile | None, *factors: float) -> None:
    """Multiplies gradient rows, which lie in `file` where there is one, by each factor in turn, in place."""
    changing = [factor for factor in factors if factor != 1]
    if file is not None:
        scale_in_file(file, shards, changing)
        return
    for factor in changing if shards else ():
        torch_lists.mul_(shards, factor)


def gradient_file(model: nn.Module) -> RowFile | None:
    """Returns the file that the gradients of a model wait in; None where they are in memory."""
    away = away_of(model)
    return None if away is None else away.files.gradients


def clip_factor(norm: float, clip_norm: float) -> float:
    """Returns the factor that brings a gradient of global norm `norm` to at most `clip_norm` (0 = off)."""
    return min(1.0, clip_norm / norm) if clip_norm > 0 and norm > 0 and math.isfinite(norm) else 1.0
