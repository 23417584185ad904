"""Sparse training as its papers write it, on whole matrices in float64, by sorting all there is; with nothing of the
product but the numbers of its configuration and the counter-based random words. `textbook_sparsity` makes what a plain
training loop calls: `filter_gradients(t)` after the backward, and `step(t, optimise, states, usable)`.

Wherever numbers are equal, the one at the smaller logical position is the larger: matrix after matrix in the order of
the model, row by row.
"""

import math
from collections.abc import Callable
from fnmatch import fnmatchcase
from fractions import Fraction
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from rowwise.kernels.blockwise import code_book
from rowwise.kernels.philox import random_words, stream_key

Tensors = dict[str, Tensor]
States = dict[str, Tensors]


def sparse_matrices(config: Any, params: Tensors) -> Tensors:
    """The hidden matrices that a pattern names, in the order of the model."""
    patterns = getattr(config, "layers", [])
    hidden = {n: p for n, p in params.items() if p.ndim == 2 and n.split(".")[0] not in ("embed", "head")}
    return {n: p for n, p in hidden.items() if any(fnmatchcase(n, pattern) for pattern in patterns)}


# How many weights are kept


def densities(shapes: list[torch.Size], density: Fraction, distribution: str) -> list[Fraction]:
    """er and erk: e (m + n) / (m n) of each, with the fewest matrices full for which e leaves no other above 1."""
    if distribution in ("uniform", "global"):
        return [density] * len(shapes)
    sizes = [m * n for m, n in shapes]
    raw = [Fraction(m + n, m * n) for m, n in shapes]
    order = sorted(range(len(shapes)), key=lambda i: -raw[i])
    for dense in range(len(shapes) + 1):
        rest = order[dense:]
        left = density * sum(sizes) - sum(sizes[i] for i in order[:dense])
        scale = left / sum(raw[i] * sizes[i] for i in rest) if rest else Fraction(0)
        if all(raw[i] * scale <= 1 for i in rest):
            return [raw[i] * scale if i in rest else Fraction(1) for i in range(len(shapes))]
    raise AssertionError("all full is always possible")


def shared_out(total: int, wanted: list[Fraction], room: list[int]) -> list[int]:
    """Whole numbers that add up to `total`: rounded down, and then one by one to whom most is missing."""
    shares = [min(math.floor(w), r) for w, r in zip(wanted, room, strict=True)]
    while sum(shares) < total:
        free = [i for i in range(len(shares)) if shares[i] < room[i]]
        shares[max(free, key=lambda i: (wanted[i] - shares[i], -i))] += 1
    assert sum(shares) == total
    return shares


def budgets(shapes: list[torch.Size], density: Fraction, distribution: str) -> list[int]:
    sizes = [m * n for m, n in shapes]
    wanted = [d * size for d, size in zip(densities(shapes, density, distribution), sizes, strict=True)]
    return shared_out(round(density * sum(sizes)), wanted, sizes)


def cooled(t: int, density: Fraction, start: int, stop: int) -> Fraction:
    """Zhu & Gupta: with a cube from 1 at `start` to `density` at `stop`."""
    if t >= stop:
        return density
    return density + (1 - density) * (1 - Fraction(max(0, t - start), stop - start)) ** 3


def fallen(t: int, sizes: list[int], ends: list[int], start: int, stop: int) -> list[int]:
    """PDP: along a line from everything at `start` to `ends` at `stop`."""
    way = Fraction(1) if t >= stop else Fraction(max(0, t - start), stop - start)
    wanted = [size - way * (size - end) for size, end in zip(sizes, ends, strict=True)]
    return shared_out(round(sum(wanted)), wanted, sizes)


# Shares of the run, as the papers' schedules are.
TIMES = {"gradual": (0.1, 0.75), "st3": (0.05, 0.5)} | dict.fromkeys(("pdp", "pdp_rows", "pdp_nm"), (0.16, 0.83))


def start_of(config: Any, steps: int) -> int:
    if getattr(config, "start_at", None) is not None:
        return config.start_at
    share = getattr(config, "start", None)
    return round(steps * (TIMES.get(config.name, (0.0, 0.75))[0] if share is None else share))


def stop_of(config: Any, steps: int) -> int:
    if config.stop_at is not None:
        return config.stop_at
    return max(1, round(steps * (TIMES.get(config.name, (0.0, 0.75))[1] if config.stop is None else config.stop)))


# The largest of numbers


def largest(keys: Tensor, k: int, among: Tensor | None = None) -> Tensor:
    """The mask of the k largest of all keys, or of those `among`."""
    among = torch.ones_like(keys, dtype=torch.bool) if among is None else among
    assert 0 <= k <= int(among.sum())
    places = among.flatten().nonzero().flatten()
    chosen = places[keys.flatten()[places].sort(descending=True, stable=True).indices[:k]]
    return torch.zeros(keys.numel(), dtype=torch.bool).index_fill(0, chosen, True).view(keys.shape)


def largest_of_all(keys: Tensors, k: int, among: Tensors | None = None) -> Tensors:
    """The same among the numbers of all matrices."""
    flat = torch.cat([key.flatten() for key in keys.values()])
    chosen = largest(flat, k, None if among is None else torch.cat([mask.flatten() for mask in among.values()]))
    parts = chosen.split([key.numel() for key in keys.values()])
    return {name: part.view(keys[name].shape) for name, part in zip(keys, parts, strict=True)}


def magnitudes(tensors: Tensors) -> Tensors:
    return {name: t.detach().abs() for name, t in tensors.items()}


def words(seed: int, name: str, purpose: str, shape: torch.Size) -> Tensor:
    key = stream_key(seed, f"sparse/{name}/{purpose}")
    return random_words(key, 0, shape.numel(), torch.device("cpu")).view(shape)


def clear(state: Tensors, where: Tensor) -> None:
    """Zero in every state that has a number for each weight; its code, in 8 bits."""
    for key, t in state.items():
        if key.endswith(".codes") and t.shape == where.shape:
            zero = int((code_book(key.startswith("exp_avg.")) == 0).nonzero())
            state[key] = t.masked_fill(where, zero)
        elif t.is_floating_point() and t.shape == where.shape:
            state[key] = t.masked_fill(where, 0.0)


class Dense:
    """Nothing is sparse."""

    def __init__(self, config: Any, params: Tensors, seed: int, steps: int):
        self.config, self.params, self.seed, self.steps = config, sparse_matrices(config, params), seed, steps
        self.shapes = [p.shape for p in self.params.values()]
        self.masks = {name: torch.ones(p.shape, dtype=torch.bool) for name, p in self.params.items()}

    def extra_states(self) -> Tensors:
        """What is kept beside the optimizer's states."""
        return {}

    def filter_gradients(self, t: int) -> None:
        pass

    def step(self, t: int, optimise: Callable[[], None], states: States, usable: bool = True) -> None:
        if usable:
            optimise()

    def budget(self, density: Fraction) -> dict[str, int]:
        return dict(zip(self.params, budgets(self.shapes, density, self.config.distribution), strict=True))

    def cut(self) -> None:
        with torch.no_grad():
            for name, mask in self.masks.items():
                self.params[name].masked_fill_(~mask, 0.0)

    def cut_gradients(self) -> None:
        for name, mask in self.masks.items():
            self.params[name].grad.masked_fill_(~mask, 0.0)


class Masked(Dense):
    """static, set, rigl, srigl and gradual."""

    def __init__(self, config: Any, params: Tensors, seed: int, steps: int):
        super().__init__(config, params, seed, steps)
        self.budgets = self.budget(Fraction(str(config.density)))
        self.start = start_of(config, steps)
        if config.name == "gradual" or self.start > 0:
            self.fired = self.masks
            return
        for name, p in self.params.items():
            numbers = words(seed, name, "start", p.shape)
            self.masks[name] = self.rows_or_all(name, numbers)
        self.fired = dict(self.masks)
        self.cut()

    def rows_or_all(self, name: str, keys: Tensor) -> Tensor:
        """The budget's largest; for srigl as many in every row."""
        rows, columns = keys.shape
        if self.config.name == "srigl":
            return torch.stack([largest(row, min(columns, self.budgets[name] // rows)) for row in keys])
        return largest(keys, self.budgets[name])

    def filter_gradients(self, t: int) -> None:
        self.gradients = {name: p.grad.clone() for name, p in self.params.items()}
        self.cut_gradients()

    def step(self, t: int, optimise: Callable[[], None], states: States, usable: bool = True) -> None:
        super().step(t, optimise, states, usable)
        if usable:
            self.cut()
        if (after := self.masks_after(t, usable)) is None:
            return
        for name, mask in after.items():
            clear(states[name], mask ^ self.masks[name])
        self.masks = after
        self.fired = {name: self.fired[name] | mask for name, mask in after.items()}
        self.cut()

    def masks_after(self, t: int, usable: bool) -> Tensors | None:
        """The masks of an update; None where none is due, or where it needs gradients that cannot be used."""
        c = self.config
        if c.name == "static":
            return None
        stop = stop_of(c, self.steps)
        if c.name == "gradual":
            due = self.start <= t <= stop and ((t - self.start) % c.update_every == 0 or t == stop)
            return self.pruned(t, stop) if due else None
        if t == self.start:
            return {name: self.rows_or_all(name, w) for name, w in magnitudes(self.params).items()}
        if not self.start <= t <= stop - 1 or (t - self.start) % c.update_every or (c.name != "set" and not usable):
            return None
        share = c.replace / 2 * (1 + math.cos(math.pi * t / stop))
        if c.name == "srigl":
            return {name: self.equal_rows(name, share) for name in self.params}
        return self.redistributed(t, share) if c.redistribute else self.replaced(t, share)

    def pruned(self, t: int, stop: int) -> Tensors:
        budget = self.budget(cooled(t, Fraction(str(self.config.density)), self.start, stop))
        sizes = magnitudes(self.params)
        if self.config.distribution == "global":
            return largest_of_all(sizes, sum(budget.values()))
        return {name: largest(sizes[name], k) for name, k in budget.items()}

    def growth(self, name: str, t: int) -> Tensor:
        if self.config.name != "set":
            return self.gradients[name].abs()
        numbers = words(self.seed, name, f"grow/{t}", self.params[name].shape)
        return numbers + (1 << 32) * ~self.fired[name] if self.config.growth == "unfired" else numbers

    def replaced(self, t: int, share: float) -> Tensors:
        """The k smallest of every matrix, by k others."""
        after = {}
        for name, mask in self.masks.items():
            active = int(mask.sum())
            k = min(int(share * active), mask.numel() - active)
            kept = largest(self.params[name].detach().abs(), active - k, mask)
            after[name] = kept | largest(self.growth(name, t), k, ~mask)
        return after

    def redistributed(self, t: int, share: float) -> Tensors:
        """The k smallest of all; each matrix grows in proportion to what it has left."""
        active = {name: int(mask.sum()) for name, mask in self.masks.items()}
        free = {name: mask.numel() - active[name] for name, mask in self.masks.items()}
        total = sum(active.values())
        k = min(int(share * total), sum(free.values()))
        kept = largest_of_all(magnitudes(self.params), total - k, self.masks)
        wanted = [Fraction(k * int(mask.sum()), total - k) for mask in kept.values()]
        grown = dict(zip(kept, shared_out(k, wanted, list(free.values())), strict=True))
        return {name: kept[name] | largest(self.growth(name, t), grown[name], ~self.masks[name]) for name in kept}

    def equal_rows(self, name: str, share: float) -> Tensor:
        """SRigL as its authors' class does it: rows are judged by the fan-in before any ablation, and so many live that
        their columns could hold more than the budget."""
        w, g, mask = self.params[name].detach().abs(), self.gradients[name].abs(), self.masks[name]
        (rows, columns), budget, active = mask.shape, self.budgets[name], int(mask.sum())
        k = int(share * active)
        salient = (largest(w, active - k, mask) | largest(g, k)).sum(1)
        gamma = self.config.ablate_below
        bound = max(1, int(gamma * (budget // rows))) if gamma else 0
        bound = min(bound, int(salient.sort(descending=True).values[min(budget // columns, rows - 1)]))
        alive = salient >= bound
        kept = largest(w, min(active - k, int(mask[alive].sum())), mask & alive[:, None])
        fan_in = min(columns, budget // int(alive.sum()))
        after = torch.zeros_like(mask)
        for i in alive.nonzero().flatten().tolist():
            first = [j for j in range(columns) if kept[i, j]]
            first.sort(key=lambda j: (-float(w[i, j]), j))
            then = [j for j in range(columns) if not kept[i, j]]
            then.sort(key=lambda j: (-float(g[i, j]), j))
            after[i, (first + then)[:fan_in]] = True
        return after


class Behind(Dense):
    """st3 and the forms of pdp: dense weights behind the parameters."""

    def __init__(self, config: Any, params: Tensors, seed: int, steps: int):
        super().__init__(config, params, seed, steps)
        self.dense = {name: p.detach().clone() for name, p in self.params.items()}
        self.edges: dict[str, tuple[float, float]] = {}  # the least that is kept, and the largest that is not
        self.ends: list[int] = []  # of pdp: how many of each matrix are kept at the end
        self.start, self.stop = start_of(config, steps), stop_of(config, steps)

    def extra_states(self) -> Tensors:
        return {f"{name}.dense": w.clone() for name, w in self.dense.items()}

    def is_hard(self, t: int) -> bool:
        return self.config.name != "st3" and t > self.stop

    def soft(self, name: str, w: Tensor) -> Tensor:
        """z w as the paper writes it, z a two-way softmax over t^2 / tau and w^2 / tau; of rows, over their norms."""
        if self.config.name == "pdp_rows":
            size, threshold = w.norm(dim=1, keepdim=True), torch.tensor(sum(self.edges[name]) / 2, dtype=torch.float64)
        elif self.config.name == "pdp_nm":
            ordered = w.detach().abs().reshape(-1, self.config.m).sort(dim=1, descending=True).values
            halfway = (ordered[:, self.config.n - 1] + ordered[:, self.config.n]) / 2
            size, threshold = w, halfway.repeat_interleave(self.config.m).view(w.shape)
        else:
            size, threshold = w, torch.tensor(sum(self.edges[name]) / 2, dtype=torch.float64)
        pair = torch.stack([threshold.expand_as(size) ** 2, size**2]) / self.config.temperature
        return pair.softmax(0)[1] * w

    def filter_gradients(self, t: int) -> None:
        if self.is_hard(t):
            self.cut_gradients()
        elif self.config.name != "st3":
            for name in self.edges:
                w = self.dense[name].clone().requires_grad_()
                (self.params[name].grad,) = torch.autograd.grad(self.soft(name, w), w, self.params[name].grad)

    @torch.no_grad()
    def step(self, t: int, optimise: Callable[[], None], states: States, usable: bool = True) -> None:
        if self.is_hard(t):
            super().step(t, optimise, states, usable)
            self.cut()
            self.dense = {name: p.detach().clone() for name, p in self.params.items()}
            return
        for name, p in self.params.items():
            p.copy_(self.dense[name])
        super().step(t, optimise, states, usable)
        self.dense = {name: p.detach().clone() for name, p in self.params.items()}
        every = getattr(self.config, "update_every", 1)
        if t >= self.start and ((t - self.start) % every == 0 or t == self.stop):
            self.find_masks(t)
        for name, p in self.params.items():
            p.copy_(self.computing(name))
        if self.is_hard(t + 1):
            for name, p in self.params.items():
                p.copy_(self.dense[name])
                clear(states[name], ~self.masks[name])
            self.cut()

    def find_masks(self, t: int) -> None:
        c, sizes, times = self.config, magnitudes(self.dense), (self.start, self.stop)
        if c.name == "st3":
            self.largest_masks(
                sizes, self.budget(cooled(t, Fraction(str(c.density)), *times)), c.distribution == "global"
            )
        elif c.name == "pdp_nm":
            self.masks = {name: group_mask(w, c.n, c.m) for name, w in self.dense.items()}
            self.edges = dict.fromkeys(self.dense, (0.0, 0.0))  # each group has its own
        elif c.name == "pdp_rows":
            rows = [torch.Size((shape[0], 1)) for shape in self.shapes]
            counts = fallen(t, [m for m, _ in rows], budgets(rows, Fraction(str(c.density)), "uniform"), *times)
            norms = {name: w.norm(dim=1, keepdim=True) for name, w in self.dense.items()}
            self.largest_masks(norms, dict(zip(norms, counts, strict=True)), False)
            self.masks = {name: mask.expand(self.dense[name].shape).clone() for name, mask in self.masks.items()}
        else:
            if not self.ends:
                budget = self.budget(Fraction(str(c.density)))
                last = largest_of_all(sizes, sum(budget.values())) if c.distribution == "global" else {}
                self.ends = [int(last[name].sum()) for name in last] or list(budget.values())
            counts = fallen(t, [size.numel() for size in sizes.values()], self.ends, *times)
            self.largest_masks(sizes, dict(zip(sizes, counts, strict=True)), False)

    def largest_masks(self, sizes: Tensors, counts: dict[str, int], together: bool) -> None:
        if together:
            k = sum(counts.values())
            self.masks = largest_of_all(sizes, k)
            edges = edges_of(torch.cat([size.flatten() for size in sizes.values()]), k)
            self.edges = dict.fromkeys(sizes, edges) if edges else {}
        else:
            self.masks = {name: largest(sizes[name], k) for name, k in counts.items()}
            found = {name: edges_of(sizes[name].flatten(), k) for name, k in counts.items()}
            self.edges = {name: edges for name, edges in found.items() if edges}

    def computing(self, name: str) -> Tensor:
        w = self.dense[name]
        if name not in self.edges:
            return w
        if self.config.name != "st3":
            return self.soft(name, w)
        soft = self.masks[name] * w.sign() * torch.clamp(w.abs() - self.edges[name][1], min=0)
        return torch.stack([row * self.scale(*pair) for row, *pair in zip(soft, w, self.masks[name], strict=True)])

    def scale(self, w: Tensor, mask: Tensor) -> float:
        """What one row of st3 grows by."""
        if not self.config.rescale:
            return 1.0
        share = (float(w[mask].abs().sum()) / len(w) + 1e-6) / (float(w.abs().sum()) / len(w) + 1e-6)
        return 1.01 / (share + 0.01)


def edges_of(sizes: Tensor, k: int) -> tuple[float, float] | None:
    """The k-th largest and the largest that is smaller, or 0; None where all are kept, the largest twice where none is."""
    ordered = sizes.sort(descending=True).values.tolist()
    if k == 0:
        return ordered[0], ordered[0]
    last = ordered[k - 1]
    return (last, max((size for size in ordered if size < last), default=0.0)) if k < len(ordered) else None


class Grouped(Dense):
    """nm: what is pruned in the forward fades."""

    def __init__(self, config: Any, params: Tensors, seed: int, steps: int):
        super().__init__(config, params, seed, steps)
        self.masks = self.kept()

    def kept(self) -> Tensors:
        return {name: group_mask(p.detach(), self.config.n, self.config.m) for name, p in self.params.items()}

    def step(self, t: int, optimise: Callable[[], None], states: States, usable: bool = True) -> None:
        for name, mask in self.kept().items():
            self.params[name].grad += self.config.decay * self.params[name].detach() * ~mask
        super().step(t, optimise, states, usable)
        self.masks = self.kept()


def group_mask(w: Tensor, n: int, m: int) -> Tensor:
    """The n largest of every m neighbours in a row."""
    groups = w.abs().reshape(-1, m)
    first = groups.sort(dim=1, descending=True, stable=True).indices[:, :n]
    return torch.zeros_like(groups, dtype=torch.bool).scatter(1, first, True).view(w.shape)


def group_linear(weight: Tensor, config: Any, x: Tensor) -> Tensor:
    """Three products: the value of the first, the gradient of x from the second, that of the weight from the third."""
    n, m = config.n, config.m
    w = weight.detach()
    along_rows = w * group_mask(w, n, m)
    backward = along_rows if config.backward == "row" else w * group_mask(w.T.contiguous(), n, m).T
    of_x, of_w = x @ backward.T, x.detach() @ weight.T
    return (x @ along_rows.T).detach() + of_x - of_x.detach() + of_w - of_w.detach()


def prune_forwards(model: nn.Module, config: Any) -> None:
    """Makes the linear layers that `nm` names multiply so."""
    if config.name != "nm":
        return
    names = sparse_matrices(config, dict(model.named_parameters()))
    for path, module in model.named_modules():
        if f"{path}.weight" in names:
            module.forward = partial(group_linear, module.weight, config)


def textbook_sparsity(config: Any, params: Tensors, seed: int, steps: int) -> Dense:
    """What the loop calls, for the whole parameters `params` in the order of the model. Cuts the first weights."""
    kind = {"none": Dense, "nm": Grouped} | dict.fromkeys(("st3", "pdp", "pdp_rows", "pdp_nm"), Behind)
    return kind.get(config.name, Masked)(config, params, seed, steps)
