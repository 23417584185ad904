"""What is used of FSDP2 (torch.distributed.fsdp) beyond what torch documents: all of it is here.

`_get_fsdp_state`, `_fsdp_param_group`, `fsdp_params`    which parameters are gathered with a module: a pipeline reduces their
                                                         gradients itself, and their bytes are measured
`_unsharded_param`                                       the whole parameter, and its gradient before ranks have summed it
`unsharded_accumulated_grad`, `reduce_dtype`             where micro-batches add up, in 32 bits, and the dtype ranks sum in
`post_backward`, `_root_post_backward_final_callback`    sums are begun and awaited when a pipeline's schedule says, not when
                                                         the backward of a whole model ends
`_partial_reduce_output`                                 where split gradients wait for those of replicas
`_sharded_param_data`, `_local_tensor`,                   rows that wait off the device lie where they are put, padded as FSDP2 pads
`_setattr_on_modules`, `padded_sharded_param_size`        them, and it gathers from there
`all_gather_inputs`, `sharded_state`                      rows in a file are read into memory before they are gathered
`comm_ctx`, `_all_gather_result`                         the flat buffers of messages under way, whose bytes are measured
                                                         (and what each rank has of a parameter in those buffers)
`_sharded_local_tensor`, `param_dtype`                   what is gathered of a parameter that one rank has whole, and in which dtype
"""

import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule


def fsdp_state(module: "FSDPModule") -> Any:
    """Gives FSDP2's state of a module; modules that are gathered as one share it."""
    return module._get_fsdp_state()


def fsdp_group(module: "FSDPModule") -> Any:
    """Gives what FSDP2 keeps of the parameters that it gathers with `module`; None where there are none."""
    return fsdp_state(module)._fsdp_param_group


def fsdp_params(module: "FSDPModule") -> list[Any]:
    """Lists what FSDP2 keeps of each parameter that it gathers with `module`."""
    group = fsdp_group(module)
    return [] if group is None else group.fsdp_params


def padded_shapes(module: "FSDPModule") -> list[torch.Size]:
    """Lists what every rank has of each parameter that is gathered with `module`, padded to be alike, in the order of a message."""
    return [param.padded_sharded_param_size for param in fsdp_params(module)]


def learning_shapes(module: "FSDPModule") -> list[torch.Size]:
    """Lists what every rank has of each parameter that has a gradient, as `padded_shapes` does."""
    return [param.padded_sharded_param_size for param in fsdp_params(module) if param.sharded_param.requires_grad]


def transform_alone(param: Any, transform: Callable[[Tensor], Tensor]) -> None:
    """Has FSDP2 compute with `transform` of a parameter that one rank has whole, which is given to it in the dtype that computes. (On
    more ranks what gathers does that.) FSDP2 asks the parameter's own tensor, so this holds as long as that does."""
    mine = weakref.ref(param)  # the tensor is the parameter's, and would keep it

    def before(mesh: Any) -> tuple[tuple[Tensor], None]:
        whole = mine()
        assert whole is not None
        rows = whole._sharded_param_data.view(whole.padded_sharded_param_size)
        return (transform(rows.to(whole.param_dtype or rows.dtype)),), None

    def after(outputs: tuple[Tensor], metadata: None, dtype: torch.dtype, out: Tensor | None = None) -> Any:
        return (outputs[0], ()) if out is None else None

    param._sharded_local_tensor.fsdp_pre_all_gather = before
    param._sharded_local_tensor.fsdp_post_all_gather = after


def gathered(param: Any) -> Tensor | None:
    """Gives the whole parameter, whose storage is empty while it is not gathered; None before the first time."""
    return getattr(param, "_unsharded_param", None)


def accumulated(param: Any) -> Tensor | None:
    """Gives the sum of the whole gradients of micro-batches, where there is one."""
    return param.unsharded_accumulated_grad


def accumulate_wide(param: Any) -> None:
    """Moves a 16-bit gradient of one micro-batch from `.grad` to where FSDP2 adds gradients up, in 32 bits."""
    whole = gathered(param)
    if whole is None or whole.grad is None or whole.grad.itemsize > 2:
        return
    if param.unsharded_accumulated_grad is None:
        param.unsharded_accumulated_grad = whole.grad.float()
    else:
        param.unsharded_accumulated_grad += whole.grad
    whole.grad = None


def lay_rows(param: Any, room: Callable[[torch.Size, torch.dtype], Tensor]) -> Tensor:
    """Puts the rows of a parameter on the meta device where `room` makes room for them; their numbers are anything. Returns what of it
    is gathered, of one dimension: the rows, padded to as many as other ranks have."""
    meta = param.sharded_param
    padded = room(param.padded_sharded_param_size, meta.dtype)
    rows = padded[: meta._local_tensor.size(0)]
    param.sharded_param = nn.Parameter(param.to_sharded_dtensor(rows), requires_grad=meta.requires_grad)
    param._sharded_param_data = padded.view(-1)
    param._setattr_on_modules(param.sharded_param)
    gathered_from: Tensor = param._sharded_param_data
    return gathered_from


def read_rows_by(module: "FSDPModule", read: Callable[[], list[Tensor]]) -> None:
    """Has FSDP2 gather the rows of a module's parameters from what `read` gives each time, a tensor for each, and not from where they
    lie."""
    params = fsdp_params(module)
    plain: type = type(params[0])
    given: dict[Any, Tensor] = {}

    def inputs(param: Any) -> Any:
        if param.sharded_state.name != "SHARDED":  # it gathers from a copy of its own
            return plain.all_gather_inputs.fget(param)  # type: ignore[attr-defined]
        if not given:
            given.update(zip(params, read(), strict=True))
        there, param._sharded_param_data = param._sharded_param_data, given.pop(param)
        try:
            return plain.all_gather_inputs.fget(param)  # type: ignore[attr-defined]
        finally:
            param._sharded_param_data = there

    for param in params:
        param.__class__ = type(plain.__name__, (plain,), {"all_gather_inputs": property(inputs)})


def begin_reduction(module: "FSDPModule") -> None:
    """Starts to sum the gradients of a module's parameters over their ranks, as the end of its backward would."""
    for param in fsdp_params(module):
        # FSDP2 says None where ranks reduce in the dtype that computes.
        if param.unsharded_accumulated_grad is not None and param.reduce_dtype is None:
            param.unsharded_accumulated_grad = param.unsharded_accumulated_grad.to(param._unsharded_param.dtype)
    if (group := fsdp_group(module)) is not None:
        group.post_backward()


def end_backward(root: "FSDPModule") -> None:
    """Waits for the sums of gradients that are under way, as the end of the whole model's backward would."""
    fsdp_state(root)._root_post_backward_final_callback()


def flat_buffers(module: "FSDPModule") -> list[Tensor]:
    """Lists what FSDP2 gathers into and reduces from, while it does. (Its names differ between torch 2.11 and 2.13.)"""
    group = fsdp_group(module)
    if group is None:
        return []
    context = group.comm_ctx
    gathers = [group._all_gather_result, getattr(getattr(context, "all_gather_state", None), "all_gather_result", None)]
    reduces = getattr(context, "reduce_scatter_states", None) or [getattr(context, "reduce_scatter_state", None)]
    return [g.all_gather_output for g in gathers if g is not None] + [
        r.reduce_scatter_input for r in reduces if r is not None
    ]


def partial_sum(module: "FSDPModule") -> Tensor | None:
    """Gives the sum of a module's split gradients that replicas have not added up yet, where there is one."""
    group = fsdp_group(module)
    partial: Tensor | None = None if group is None else group._partial_reduce_output
    return partial
