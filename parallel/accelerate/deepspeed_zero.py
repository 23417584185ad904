"""What is used of DeepSpeed's ZeRO beyond what it documents: its flat pieces, as whole parameters. All of it is here.

`_hp_mapping`, `get_full_hp_param`, ...        which numbers of a parameter stand where in a rank's flat piece; documented as
                                               `safe_get_full_fp32_param` and its like, which all of this is what they call
`_lazy_init_hp_params_optimizer_state`         the same for optimizer states, before the first step
`update_lp_params`                             parameters from their masters
`fp16_groups`, `fp32_partitioned_groups_flat`  the sub-groups of stage 3, whose states are read from files once each, where the
                                               documented way reads all of a sub-group for every parameter in it
`grad_position`                                where a parameter stands in its sub-group
`_optimizer_states_and_gradient_swap_in`, ...  a sub-group's states, from their files and back
`_reassign_or_swap_out_partitioned_parameters` parameters from their masters, as a step does it
`invalidate_secondary_tensor`                  drops the second copy of parameters, which is of what they were before
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

# Parameter, state (None: the parameter itself), all of its numbers.
Whole = tuple[str, str | None, Tensor]
States = dict[str | None, Tensor]


class FlatStates(Protocol):
    """The optimizer that DeepSpeed calls on its pieces."""

    def state_of(self, piece: Tensor, group: int) -> dict[str, Tensor]:
        """Returns the states of a piece of a group of parameters, and makes them where there are none."""


def shape_of(p: Tensor) -> torch.Size:
    """Returns the logical shape of a parameter, wherever its numbers are."""
    return torch.Size(getattr(p, "ds_shape", p.shape))


@torch.no_grad()
def read(engine: Any, optimizer: FlatStates) -> Iterator[Whole]:
    """Yields every parameter's master and states, whole, one after another, on every rank. Crosses the ranks: every number, a
    parameter or one of its states at a time."""
    zero, names = engine.optimizer, _names(engine)
    if engine.zero_optimization_stage() == 3:
        for group, params in enumerate(zero.fp16_groups):
            with _at_hand(zero, optimizer, group, changed=False) as states:
                for p in params:
                    for key, flat in states.items():
                        yield names[p], key, _gathered(zero, p, _piece(zero, p, flat))
        return
    for p, keys in _linked(zero, optimizer):
        for key in keys:
            yield names[p], key, p.get_full_hp_param(key)


@torch.no_grad()
def write(engine: Any, optimizer: FlatStates, whole: Callable[[str, str | None], Tensor]) -> None:
    """Sets every parameter's master and states to what `whole(parameter, state)` gives, the same on every rank, and parameters to
    their masters. It is asked in the same order on all ranks, for one at a time."""
    zero, names = engine.optimizer, _names(engine)
    if engine.zero_optimization_stage() < 3:
        for p, keys in _linked(zero, optimizer):
            for key in keys:
                p.set_full_hp_param(whole(names[p], key), key)
        zero.update_lp_params()
        return
    zero._partition_all_parameters()
    for group, params in enumerate(zero.fp16_groups):
        with _at_hand(zero, optimizer, group, changed=True) as states:
            for p in params:
                for key, flat in states.items():
                    _take(_piece(zero, p, flat), whole(names[p], key).flatten(), zero._get_param_partition_rank(p))
            zero._reassign_or_swap_out_partitioned_parameters(group)
    zero.invalidate_secondary_tensor()
    if zero.persistent_parameters:
        zero.persistent_parameters[0].all_gather(zero.persistent_parameters)


def held(engine: Any, states: dict[Any, dict[str, Any]]) -> tuple[int, int, int]:
    """Counts the bytes of (parameters in the dtype that computes, masters, optimizer states) that this rank has in memory now."""
    parameters = [getattr(p, "ds_tensor", p) for p in engine.module.parameters()]
    kept = [t for state in states.values() for t in state.values()]
    return _bytes(parameters), _bytes(_pieces(engine.optimizer)), _bytes(kept)


def _names(engine: Any) -> dict[Tensor, str]:
    return {p: name for name, p in engine.module.named_parameters()}


def _pieces(zero: Any) -> list[Tensor]:
    """This rank's masters: a flat piece of each group of parameters, or of each sub-group."""
    for name in ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition"):
        if hasattr(zero, name):
            return list(getattr(zero, name))
    raise AssertionError(f"{type(zero).__name__} has no flat pieces that are known here")


def _linked(zero: Any, optimizer: FlatStates) -> Iterator[tuple[Any, list[str | None]]]:
    """Yields the parameters of stages 1 and 2, each with what can be asked of it."""
    groups = zero.bit16_groups if hasattr(zero, "bit16_groups") else zero.bf16_groups
    keys = [[None, *optimizer.state_of(piece, number)] for number, piece in enumerate(_pieces(zero))]
    zero._lazy_init_hp_params_optimizer_state()
    for params, asked in zip(groups, keys, strict=True):
        for p in params:
            yield p, asked


@contextmanager
def _at_hand(zero: Any, optimizer: FlatStates, group: int, changed: bool) -> Iterator[States]:
    """Has the masters and states of a sub-group in memory, from their files where that is where they live, and writes them back."""
    swapped, piece = zero._swappable_optimizer_subgroup(group), zero.fp32_partitioned_groups_flat[group]
    if swapped:
        zero._optimizer_states_and_gradient_swap_in(group)
    states: States = {None: piece}
    states.update(optimizer.state_of(piece, zero.sub_group_to_group_id[group]))
    yield states
    if swapped and changed:
        zero._optimizer_states_and_gradient_swap_out(group)
    elif swapped:
        zero._release_swap_buffers(group)


def _piece(zero: Any, p: Any, flat: Tensor) -> Tensor:
    """What this rank has of a parameter in the flat piece of its sub-group."""
    _, start, size = zero.grad_position[zero.get_param_id(p)]
    return flat.detach().narrow(0, start, size)


def _gathered(zero: Any, p: Any, piece: Tensor) -> Tensor:
    group = zero._get_param_partition_group(p)
    mine = piece.to(p.device)
    whole = torch.empty(dist.get_world_size(group) * mine.numel(), dtype=mine.dtype, device=mine.device)
    dist.all_gather_into_tensor(whole, mine, group=group)
    return whole[: p.ds_numel].view(p.ds_shape)


def _take(piece: Tensor, whole: Tensor, rank: int) -> None:
    """Copies the numbers of a rank out of all of them; the last ranks' pieces are longer than what is left for them."""
    start = min(piece.numel() * rank, whole.numel())
    mine = whole[start : start + piece.numel()]
    piece[: mine.numel()].copy_(mine)


def _bytes(tensors: Any) -> int:
    return sum(t.numel() * t.itemsize for t in tensors if isinstance(t, Tensor))
