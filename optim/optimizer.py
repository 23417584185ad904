"""The optimizer: groups of parameters, each with its rule; hands every rule the local rows of what it has.

A rule works on matrices. A parameter that is a batch of them, split by the batch, is as many as this rank has: each is
there whole, so that its rule has nothing to ask other ranks, whatever it asks for matrices whose rows are split.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from rowwise.kernels import torch_lists
from rowwise.kernels.dispatch import use_numba
from rowwise.kernels.products import float32_products
from rowwise.kernels.rounding import round_bf16_
from rowwise.kernels.rows import local, row_offset
from rowwise.optim.home import PORTION_BYTES, Entry, Home, Portion, cut, laid, step_through
from rowwise.optim.rule import Batch, Rule, each_of, shard_group


class Optimizer(torch.optim.Optimizer):
    """The optimizer of a run. `groups`: dicts of `params`, their `names`, `rule` and `weight_decay`, whether they are `batched`,
    and the `view` of the mesh that they are laid over. State: what the rules keep, tensors only; it waits in `home`, where rules then
    step on the host, a portion at a time, with the same numbers; None: it is where the parameters are.

    The number of updates made is a plain number of each group (`step`), the same for all.
    """

    # torch's own are wrapped in what imports its compiler, 0.6 s of every start; nothing here is ever compiled.
    add_param_group = inspect.unwrap(torch.optim.Optimizer.add_param_group)
    zero_grad = inspect.unwrap(torch.optim.Optimizer.zero_grad)

    def __init__(self, groups: list[dict[str, Any]], lr: float, seed: int, home: Home | None = None):
        super().__init__(groups, {"lr": lr, "step": 0})
        self._seed, self._home = seed, home
        self._places = {
            p: (group, name)
            for group in self.param_groups
            for name, p in zip(group["names"], group["params"], strict=True)
        }
        for group in self.param_groups:
            for p in group["params"]:
                state = _new_state(group, p.detach())
                self.state[p] = state if home is None else laid(home, state)
        # Both stay what they are: a checkpoint is read into the tensors that exist.
        self._offsets = {p: row_offset(p) for p in self._places}
        self._local_states = {p: {key: local(t) for key, t in self.state[p].items()} for p in self._places}

    @torch.no_grad()
    def step(self, closure=None):
        """Changes every parameter that has a gradient."""
        assert closure is None
        self.begin_step()
        self._make(portion for group in self.param_groups for portion in self._portions(group, _live(group)))

    def begin_step(self) -> None:
        """Counts an update; `step` does it itself."""
        for group in self.param_groups:
            group["step"] += 1

    def view_of(self, p: Tensor) -> str:
        """Names the view of the mesh that a parameter is laid over."""
        return self._places[p][0]["view"]

    def step_one(self, p: Tensor) -> None:
        """Changes one parameter, within the update that `begin_step` began."""
        group, name = self._places[p]
        self._make(self._portions(group, [(name, p)]))

    def step_one_apart(self, p: Tensor) -> Callable[[], None] | None:
        """Takes what the step of one parameter needs, and returns what makes it, in any thread and while others compute: its gradient
        may be let go of at once. None where it must be made in line: states are where parameters are, or the rule needs others'
        rows or other products than the model."""
        group, name = self._places[p]
        if self._home is None or not group["rule"].by_rows:
            return None
        entries = self._entries(group, [(name, p)])
        bring = self._home.fetch([entry.grad for entry in entries])

        @torch.no_grad()
        def step() -> None:
            own = [entry._replace(grad=grad) for entry, grad in zip(entries, bring(), strict=True)]
            self._make(Portion(group, None, some) for some in cut(own, PORTION_BYTES // 4))

        return step

    def clear_(self, p: Tensor, rows: slice, where: Tensor) -> None:
        """Sets the states of single weights to zero: of this rank's `rows` of `p` those at `where` (r, n). A state that
        belongs to whole rows, such as a projected moment, has none."""
        group, _ = self._places[p]
        for key, zero in group["rule"].weightwise.items():
            state = self._local_states[p][key]
            state[rows].masked_fill_(where.to(state.device), zero)

    @torch.no_grad()
    def snapshot(self) -> list[Tensor]:
        """Copies of all that a step changes on this rank: its rows of the parameters and of their states."""
        return [t.clone() for t in self._changed()]

    @torch.no_grad()
    def rollback(self, remembered: list[Tensor]) -> None:
        """Takes the last step back, to the last bit. Only where no rank of the shard group keeps it: a rule that exchanges
        messages may not be undone on one rank alone."""
        torch_lists.copy_(self._changed(), remembered)
        for group in self.param_groups:
            group["step"] -= 1

    def _changed(self) -> list[Tensor]:
        return [t for p in self._places for t in (local(p.detach()), *self._local_states[p].values())]

    def _portions(self, group: dict[str, Any], live: list[tuple[str, Tensor]]) -> Iterator[Portion]:
        if self._home is not None and group["rule"].by_rows:
            for some in cut(self._entries(group, live), PORTION_BYTES // 4):
                yield Portion(group, None, some)
            return
        for named in _portions(live, group):
            if entries := self._entries(group, named):  # of a batch of matrices this rank may have none
                yield Portion(group, _exchange_group(group, named[0][1]), entries)

    def _make(self, portions: Iterable[Portion]) -> None:
        if self._home is not None:
            step_through(self._home, portions, self._change)
            return
        for portion in portions:
            self._change(portion)

    def _change(self, portion: Portion) -> None:
        group, rule = portion.group, portion.group["rule"]
        names, params, grads, states, shapes, offsets = map(list, zip(*portion.entries, strict=True))
        rounds = rule.rounds or (rule.rounds_on_host and use_numba(params))
        narrow = params[0].dtype == torch.bfloat16 and not rounds
        batch = Batch(
            names=names,
            params=[p.float() for p in params] if narrow else params,
            grads=[g.float() for g in grads] if narrow else grads,
            states=states,
            shapes=shapes,
            offsets=offsets,
            group=portion.ranks,
            step=group["step"],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            seed=self._seed,
        )
        # Whatever the model multiplies in, which is said for all threads: what is by rows multiplies nothing.
        with nullcontext() if rule.by_rows else float32_products("highest"):
            rule.step_(batch)
        if narrow:
            for p, wide, (key, start) in zip(params, batch.params, batch.rounding(), strict=True):
                round_bf16_(wide, p, key, start)

    def _entries(self, group: dict[str, Any], named: list[tuple[str, Tensor]]) -> list[Entry]:
        states, offsets = self._local_states, self._offsets
        entries = [
            Entry(name, local(p), local(p.grad), states[p], p.shape, offsets[p])
            for name, p in named
            if p.grad is not None
        ]
        return [one for entry in entries for one in _each(entry)] if group["batched"] else entries


def update_count(optimizer: torch.optim.Optimizer) -> int:
    """Returns how many updates have been made; 0 where nothing here learns."""
    return max((group["step"] for group in optimizer.param_groups), default=0)


def _live(group: dict[str, Any]) -> list[tuple[str, Tensor]]:
    return [(name, p) for name, p in zip(group["names"], group["params"], strict=True) if p.grad is not None]


def _each(batch: Entry) -> Iterator[Entry]:
    """The entries of the matrices that a batch has on this rank."""
    for i, (p, grad) in enumerate(zip(batch.param, batch.grad, strict=True)):
        state = {key: t[i] for key, t in batch.state.items()}
        yield Entry(f"{batch.name}[{batch.offset + i}]", p, grad, state, batch.shape[1:], 0)


def _new_state(group: dict[str, Any], p: Tensor) -> dict[str, Tensor]:
    if not group["batched"]:
        return group["rule"].new_state(p)
    one = group["rule"].new_state(local(p).new_empty(p.shape[1:]))
    return {key: each_of(p, t) for key, t in one.items()}


def _exchange_group(group: dict[str, Any], p: Tensor) -> dist.ProcessGroup | None:
    """The ranks over which the rule of `p` sums what it needs of a whole matrix; None where each has whole ones."""
    return None if group["batched"] else shard_group(p)


def _portions(live: list[tuple[str, Tensor]], group: dict[str, Any]) -> Iterable[list[tuple[str, Tensor]]]:
    """PORTION_BYTES at a time, or a larger parameter alone (a `shared` rule: at least as many as ranks hold their rows); all
    at once where that takes no memory.

    Cut by logical sizes, so that all ranks cut alike: rules exchange messages.
    """
    if not live:
        return []
    rule: Rule = group["rule"]
    if rule.fused and (rule.rounds or live[0][1].dtype != torch.bfloat16):
        return [live]
    ranks = _exchange_group(group, live[0][1]) if rule.shared else None
    least = ranks.size() if ranks else 1
    portions: list[list[tuple[str, Tensor]]] = [[]]
    held = 0
    for name, p in live:
        if len(portions[-1]) >= least and held + 4 * p.numel() > PORTION_BYTES:
            portions, held = [*portions, []], 0
        portions[-1].append((name, p))
        held += 4 * p.numel()
    return portions
