"""Weights that are exactly zero outside of a mask: `static`, `set`, `rigl`, `srigl` and `gradual`.

Gradients are cut to the mask before their norm is taken, so that what is not there neither clips nor moves anything;
weights are cut again after the optimizer's step, for rules whose update of a weight looks at others. The dense gradient
is kept beside only where a rule grows by it and only in the step after which it does: one copy of this rank's rows.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from rowwise.kernels.rows import local
from rowwise.optim.optimizer import Optimizer
from rowwise.optim.select import Keys, key_bits
from rowwise.optim.sparse import evolve
from rowwise.optim.sparse.account import Account, begin_account, take_account
from rowwise.optim.sparse.budget import budgets, gradual_density, is_due, share_replaced
from rowwise.optim.sparse.config import SET, EvolvingBase, Gradual, RigL, SRigL, Static, every, starts_at_random
from rowwise.optim.sparse.fan_in import evolve_fan_in, largest_fan_in, random_fan_in
from rowwise.optim.sparse.layers import Layer, Layers
from rowwise.optim.sparse.masks import portions, zero_outside_


@dataclass
class SetRigL:
    """The masks of a run under one of those rules. `steps`: of the run."""

    config: Static | SET | RigL | SRigL | Gradual
    layers: Layers
    seed: int
    steps: int
    account: Account | None = None
    _dense: dict[str, Tensor] = field(default_factory=dict)
    _density: float | None = None

    def __post_init__(self) -> None:
        self._budgets = budgets(self.layers.shapes, self.config.density, self.config.distribution)
        unfired = isinstance(self.config, SET) and self.config.growth == "unfired"
        self._fired = self.layers.extra_masks() if unfired else {}
        if not starts_at_random(self.config, self.steps):
            return  # dense, until the first update
        fan_in = isinstance(self.config, SRigL)
        masks = (random_fan_in if fan_in else evolve.random_masks)(self.layers, self._budgets, self.seed)
        for layer, mask in zip(self.layers.mine, masks, strict=True):
            layer.bits.copy_(mask)
            zero_outside_(layer.weight, mask)
            if self._fired:
                local(self._fired[layer.name]).copy_(mask)
        begin_account(self.layers)

    def named_state(self) -> dict[str, Tensor]:
        return self.layers.named_masks() | {f"{name}.fired": mask for name, mask in self._fired.items()}

    @property
    def density(self) -> float:
        """The density of the masks, counted by all ranks where it is not known: masks may have been loaded."""
        if self._density is None:
            counts = self.layers.counts([layer.bits for layer in self.layers.mine], self.layers.model)
            self._density = sum(counts) / self.layers.size
        return self._density

    @torch.no_grad()
    def filter_gradients(self, step: int) -> None:
        """Filters the gradients of step t, after its backward and before their norm."""
        if self._grows_by_gradient(step) and self._due(step):
            self._dense = {layer.name: layer.gradient().clone() for layer in self.layers.mine}
        for layer in self.layers.mine:
            if layer.p.grad is not None:
                zero_outside_(layer.gradient(), layer.bits)

    @torch.no_grad()
    def step(self, optimizer: Optimizer, step: int, usable: bool) -> None:
        """Makes the optimizer's step t, unless its gradients are not `usable`; then the masks change, if they are to."""
        dense, self._dense = self._dense, {}
        if usable:
            optimizer.step()
            for layer in self.layers.mine:
                zero_outside_(layer.weight, layer.bits)
        self.account = None
        # What looks at weights alone happens also where the step is passed over: a density that falls must arrive.
        if self._due(step) and (usable or not self._grows_by_gradient(step)):
            self._change(self._masks_after(step, dense), optimizer)
            if step == self._first_mask_at():
                begin_account(self.layers)
            self.account = take_account(self.layers)
        elif isinstance(self.config, Static) and step == 1:
            self.account = take_account(self.layers)
        if self.account is not None:
            self._density = self.account.density

    def _first_mask_at(self) -> int:
        """The step that gives a model that begins dense its first mask of the final density."""
        if isinstance(self.config, Gradual):
            return self.config.last_step(self.steps)
        return self.config.first_step(self.steps) if isinstance(self.config, EvolvingBase) else 0

    def _grows_by_gradient(self, step: int) -> bool:
        """Not where a dense model is pruned for the first time."""
        return isinstance(self.config, RigL | SRigL) and step != self.config.first_step(self.steps)

    def _due(self, step: int) -> bool:
        config = self.config
        if isinstance(config, Static):
            return False
        start, stop = config.first_step(self.steps), config.last_step(self.steps)
        # The last update of a mask that evolves would replace nothing, unless it is the first.
        last = stop if isinstance(config, Gradual) or start == stop else stop - 1
        return is_due(step, every(config.update_every, self.steps), start, stop) and 0 < step <= last

    def _masks_after(self, step: int, dense: dict[str, Tensor]) -> list[Tensor]:
        config, layers = self.config, self.layers
        assert not isinstance(config, Static)
        start, stop = config.first_step(self.steps), config.last_step(self.steps)
        weights = [layer.weight for layer in layers.mine]
        if isinstance(config, Gradual):
            density = gradual_density(step, config.density, start, stop)
            counts = budgets(layers.shapes, density, config.distribution)
            return evolve.largest(layers, weights, counts, config.distribution == "global")
        if step == start:
            if isinstance(config, SRigL):
                return largest_fan_in(layers, self._budgets)
            return evolve.largest(layers, weights, self._budgets, together=False)
        share = share_replaced(step, config.replace, stop)
        if isinstance(config, SRigL):
            return evolve_fan_in(layers, self._budgets, share, dense, config.ablate_below)
        rule = evolve.redistribute if config.redistribute else evolve.drop_and_grow
        return rule(layers, share, *self._growth(step, dense))

    def _growth(self, step: int, dense: dict[str, Tensor]) -> tuple[evolve.Growth, int]:
        """Keys of what may grow, and how many bits they have."""
        if isinstance(self.config, RigL):
            return lambda layer: evolve.inactive_gradients(layer, dense[layer.name]), key_bits(self.layers.dtype)
        fired = {name: local(mask) for name, mask in self._fired.items()}

        def at_random(layer: Layer) -> Keys:
            return evolve.inactive_at_random(layer, self.seed, step, fired.get(layer.name))

        return at_random, evolve.RANDOM_BITS

    def _change(self, masks: list[Tensor], optimizer: Optimizer) -> None:
        """New masks; what was dropped is zero, and so are the optimizer's states of whatever changed."""
        for layer, mask in zip(self.layers.mine, masks, strict=True):
            changed = layer.bits ^ mask
            layer.bits.copy_(mask)
            zero_outside_(layer.weight, mask)
            for rows, where in portions(changed, layer.columns):
                optimizer.clear_(layer.p, rows, where)
            if self._fired:
                local(self._fired[layer.name]).bitwise_or_(mask)
