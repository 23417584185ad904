"""What an optimizer's step holds beside what it changes: found by making it, on the meta device, where nothing takes memory.

A rule is given as many parameters at a time as the optimizer gives it (`optim.optimizer`), with this rank's rows. What ranks exchange
for it is not made, and not counted.
"""

import functools
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch

from rowwise.kernels.portions import portion_elements
from rowwise.kernels.rounding import random_16
from rowwise.kernels.spec import ParameterSpec
from rowwise.optim.build import new_rule, rank_of, rule_name
from rowwise.optim.lowrank.projection import OVERSAMPLE
from rowwise.optim.optimizer import PORTION_BYTES
from rowwise.optim.rule import Batch, Rule
from rowwise.optim.transpose import is_wide, tall_shape
from rowwise.parallel.lifetimes import Lifetimes
from rowwise.trainer.config import TrainConfig
from rowwise.trainer.models.decoder import parameter_specs
from rowwise.trainer.plan.states import Place, owned, rows_of, unsplit, widths_of

Entry = tuple[str, ParameterSpec]
_known: dict[Any, int] = {}  # bytes of steps that were made: a run asks for them again, and a search for many layouts


def update_bytes(
    config: TrainConfig,
    stages: Iterable[range],
    place: Place,
    gpu: bool,
    one_by_one: bool = False,
    role: str | None = None,
) -> int:
    """Counts what the step of all stages of a rank holds at most. `one_by_one`: it is made of each parameter by itself, `role`: of
    those that have it alone."""
    rank = rank_of(config.optim, parameter_specs(config.model))
    groups: dict[tuple[str, bool, int, bool], list[Entry]] = {}
    for name, spec in (entry for layers in stages for entry in owned(config, layers).items()):
        if role is not None and spec.role != role:
            continue
        key = rule_name(name, spec, config.optim), spec.role == "vector", len(spec.matrix), spec.batched
        groups.setdefault(key, []).append((name, spec))
    most = 0
    for (name, *_), entries in groups.items():
        rule = new_rule(name, config.optim, rank)
        for portion in _portions(rule, entries, config, place, one_by_one):
            shapes = tuple((spec.shape, spec.batched) for _, spec in portion)
            alike = repr(config.optim), rank, widths_of(config), place.shard, place.shards, gpu, name, shapes
            if alike not in _known:
                _known[alike] = _step_bytes(rule, portion, config, place, gpu)
            most = max(most, _known[alike])
    return most


def _portions(
    rule: Rule, entries: list[Entry], config: TrainConfig, place: Place, one_by_one: bool
) -> Iterable[list[Entry]]:
    """As `optim.optimizer` gives a rule its parameters."""
    if one_by_one:
        return [[entry] for entry in entries]
    if rule.fused and (rule.rounds or widths_of(config).parameter > 2):
        return [entries]
    least, portions, held = place.shards if rule.shared else 1, list[list[Entry]]([[]]), 0
    for name, spec in entries:
        size = 4 * spec.shape.numel()
        if len(portions[-1]) >= least and held + size > PORTION_BYTES:
            portions, held = [*portions, []], 0
        portions[-1].append((name, spec))
        held += size
    return portions


def _step_bytes(rule: Rule, entries: list[Entry], config: TrainConfig, place: Place, gpu: bool) -> int:
    """Makes a step of these parameters, and counts. What no rule rounds to 16 bits is copied into 32, with its gradient, and rounded
    behind the rule."""
    widths = widths_of(config)
    narrow = widths.parameter == 2
    copied = entries if narrow and not rule.rounds else []
    numbers = [rows_of(spec.shape[0], place) * spec.shape[1:].numel() for _, spec in copied]
    copies, rounding = 8 * sum(numbers), 0 if gpu or not copied else _rounding_bytes(max(numbers))
    if rule.fused:  # it needs nothing beside its operands
        return copies + rounding
    wide = torch.float64 if widths.wide == 8 else torch.float32
    whole = unsplit(rule, wide)
    dtype = torch.bfloat16 if narrow and rule.rounds else wide

    def empty(shape: Iterable[int], dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(tuple(shape), dtype=dtype, device="meta")

    # Most is held where a projection is renewed; but to renew a basis looks at numbers.
    step = 2 if "basis" in whole else 1
    batch = Batch([], [], [], [], [], [], None, step, 1e-3, 0.1, 0)
    for name, spec in entries:
        # A wide matrix that its rule turns round is split by its columns then, and its states with it.
        matrix = (
            tall_shape(spec.matrix)
            if getattr(config.optim, "side", "") == "short" and not spec.batched
            else spec.matrix
        )
        mine = matrix if spec.batched else torch.Size((rows_of(matrix[0], place), *matrix[1:]))
        if not mine.numel():
            continue
        state = {
            key: empty(t.shape if key in whole or spec.batched else (rows_of(t.size(0), place), *t.shape[1:]), t.dtype)
            for key, t in rule.new_state(empty(matrix, wide)).items()
        }
        batch.names.append(name)
        batch.params.append(empty(mine, dtype))
        batch.grads.append(empty(mine, dtype))
        batch.states.append(state)
        batch.shapes.append(matrix)
        batch.offsets.append(0)
    if not batch.names:
        return 0  # this rank has no rows of them
    made = _share(batch, place.shards) if rule.shared else batch
    with torch.no_grad(), Lifetimes([], []) as lives:
        rule.step_(made)
    renewing = [_renewal(state, p) for state, p in zip(batch.states, batch.params, strict=True) if "basis" in state]
    renewed = sum(all_ for all_, _ in renewing) + max((one for _, one in renewing), default=0)
    # What is mixed of gradients and momenta, and what comes of it, are there of all matrices.
    others = 2 * (_bytes(batch.params) - _bytes(made.params))
    if getattr(config.optim, "side", "") == "short":  # what is turned is there lying, too
        others += sum(p.nbytes for p, (_, spec) in zip(batch.params, entries, strict=False) if is_wide(spec.matrix))
    return max(lives.peaks()[1] + others, renewed, rounding) + copies


@functools.cache
def _rounding_bytes(numbers: int) -> int:
    """What a CPU holds to draw the bits by which so many numbers are rounded, which is more than to round them: of those of a portion
    (`kernels.rounding`)."""
    with torch.no_grad(), Lifetimes([], []) as lives:
        random_16(0, 0, min(numbers, portion_elements()), torch.device("meta"))
    return lives.peaks()[1]


def _bytes(tensors: list[torch.Tensor]) -> int:
    return sum(t.nbytes for t in tensors)


def _share(batch: Batch, ranks: int) -> Batch:
    """The matrices of a batch that one of so many ranks works on for all."""
    count = -(-len(batch.names) // ranks)
    lists = ("names", "params", "grads", "states", "shapes", "offsets")
    return replace(batch, **{key: getattr(batch, key)[:count] for key in lists})


def _renewal(state: dict[str, torch.Tensor], p: torch.Tensor) -> tuple[int, int]:
    """What the renewal of a basis (n, r) holds of a matrix when the last is found: of all matrices the directions that it began with,
    P, Y, what is made of it, the gram matrix and the basis; and of one beside that Q, its vectors, their sizes, and R and two like
    it (`optim.lowrank.projection.subspace_bases`)."""
    columns, rank = state["basis"].shape
    wider = rank + min(OVERSAMPLE, columns - rank, p.size(0))
    every = (3 * columns + p.size(0) + wider) * wider + columns * rank
    one = (columns + 3 * wider) * wider + 2 * columns * rank
    return every * state["basis"].itemsize, one * state["basis"].itemsize
