"""What an optimizer's step holds beside what it changes: found by making it, on the meta device, where nothing takes memory.

A rule is given as many parameters at a time as the optimizer gives it (`optim.optimizer`), with this rank's rows, and sends what it
sends to ranks that are not there (`OnPaper`).
"""

import functools
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from rowwise.kernels.dispatch import is_compiled
from rowwise.kernels.portions import cut_row, portion_elements, row_unit
from rowwise.kernels.rounding import random_16
from rowwise.kernels.spec import ParameterSpec
from rowwise.optim.build import new_rule, rank_of, rule_name
from rowwise.optim.home import PORTION_BYTES
from rowwise.optim.lowrank.projection import OVERSAMPLE
from rowwise.optim.rule import Batch, Rule
from rowwise.optim.transpose import is_wide
from rowwise.parallel.lifetimes import Lifetimes
from rowwise.trainer.adapters.specs import run_specs
from rowwise.trainer.config import TrainConfig
from rowwise.trainer.plan.on_paper import OnPaper
from rowwise.trainer.plan.states import Place, local_numbers, owned, rows_of, state_bytes, unsplit, wide_of, widths_of

Entry = tuple[str, ParameterSpec]
FEW = 4  # portions, of which no three hold more than those of all


class StepBytes(NamedTuple):
    """Bytes of an optimizer's step: at most, and of `messages` at most."""

    most: int
    messages: int

    def or_more(self, *others: "StepBytes") -> "StepBytes":
        """Gives the most of each of these steps, one of which is made at a time."""
        return StepBytes(*map(max, zip(self, *others, strict=True)))


NONE = StepBytes(0, 0)
Updates = Mapping[str, StepBytes]  # of the step of each parameter by itself, by name
_known: dict[
    Any, StepBytes
] = {}  # bytes of steps that were made: a run asks for them again, and a search for many layouts


class Portion(NamedTuple):
    """What a rule is given at once: rows of these entries at a `place`, so many `numbers` of them with so many bytes of `states`,
    which are so many `tensors`."""

    rule: Rule
    entries: list[Entry]
    place: Place
    numbers: int
    states: float
    tensors: int


def update_bytes(config: TrainConfig, stages: Iterable[range], place: Place, gpu: bool) -> StepBytes:
    """Counts what the step of all stages of a rank holds at most."""
    entries = [entry for layers in stages for entry in owned(config, layers).items()]
    return _most(portions_of(entries, config, place), config, gpu)


def update_bytes_of_each(config: TrainConfig, layers: range, place: Place, gpu: bool) -> Updates:
    """Counts what the step of each parameter of a stage by itself holds, by name."""
    entries = owned(config, layers).items()
    return {name: _most(portions_of([(name, spec)], config, place), config, gpu) for name, spec in entries}


def portions_of(entries: Iterable[Entry], config: TrainConfig, place: Place) -> Iterator[Portion]:
    """Yields the portions in which a step goes through parameters."""
    rank, dtype = rank_of(config.optim, run_specs(config)), wide_of(config)
    groups: dict[tuple[str, bool, int, bool], list[Entry]] = {}
    for name, spec in entries:
        key = rule_name(name, spec, config.optim), spec.role == "vector", len(spec.matrix), spec.batched
        groups.setdefault(key, []).append((name, spec))
    for (name, *_, batched), group in groups.items():
        rule = new_rule(name, config.optim, rank)
        if config.memory.offload_states != "none" and rule.by_rows and not batched:
            parts, where = list(_cut(group, place)), Place(0, 0, 1, 1)
        else:
            parts, where = list(_portions(rule, group, config, place)), place
        alike = {spec.shape: spec for _, spec in group}  # of a group those of one shape are one
        sizes = {
            shape: (local_numbers(spec, place), state_bytes(rule, spec, dtype, place)) for shape, spec in alike.items()
        }
        whole = {name: sizes[spec.shape] for name, spec in group}
        for part in parts:
            counts = {name: local_numbers(spec, where) for name, spec in part}
            states = sum(whole[name][1] * count / max(1, whole[name][0]) for name, count in counts.items())
            tensors = sum(_state_tensors(rule, spec, dtype) for _, spec in part)
            yield Portion(rule, list(part), where, sum(counts.values()), states, tensors)


def _state_tensors(rule: Rule, spec: ParameterSpec, dtype: torch.dtype) -> int:
    return len(rule.new_state(torch.empty(spec.matrix, dtype=dtype, device="meta")))


def _cut(entries: Iterable[Entry], place: Place) -> Iterator[list[Entry]]:
    """Cuts a rank's rows into portions as `optim.home.cut` does; of parameters that are alike no more than fill FEW."""
    portion, free = list[Entry](), PORTION_BYTES // 4
    seen = Counter[torch.Size]()
    for name, spec in entries:
        columns, left = spec.shape[1:].numel(), FEW * PORTION_BYTES // 4 - seen[spec.shape]
        first, rows = 0, min(rows_of(spec.shape[0], place), -(-max(0, left) // columns))
        seen[spec.shape] += rows * columns
        while first < rows:
            last = cut_row(first, rows, columns, free)
            if last == first and not portion:
                last = min(first + row_unit(columns), rows)
            if last > first:
                portion.append((name, replace(spec, shape=torch.Size((last - first, *spec.shape[1:])))))
                free -= (last - first) * columns
                first = last
            if first < rows:
                yield portion
                portion, free = [], PORTION_BYTES // 4
    if portion:
        yield portion


def _most(portions: Iterable[Portion], config: TrainConfig, gpu: bool) -> StepBytes:
    rank = rank_of(config.optim, run_specs(config))
    return NONE.or_more(*(_portion_bytes(one.rule, rank, one.entries, config, one.place, gpu) for one in portions))


def _portion_bytes(
    rule: Rule, rank: int, portion: list[Entry], config: TrainConfig, place: Place, gpu: bool
) -> StepBytes:
    shapes = tuple((spec.shape, spec.batched) for _, spec in portion)
    alike = repr(config.optim), rank, widths_of(config), place.shard, place.shards, gpu, rule.name, shapes
    if alike not in _known:
        _known[alike] = _step_bytes(rule, portion, config, place, gpu)
    return _known[alike]


def _portions(rule: Rule, entries: list[Entry], config: TrainConfig, place: Place) -> Iterable[list[Entry]]:
    """As `optim.optimizer` gives a rule its parameters."""
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


def _step_bytes(rule: Rule, entries: list[Entry], config: TrainConfig, place: Place, gpu: bool) -> StepBytes:
    """Makes a step of these parameters, and counts. What no rule rounds to 16 bits is copied into 32, with its gradient, and rounded
    behind the rule."""
    widths = widths_of(config)
    narrow = widths.parameter == 2
    numbers = [local_numbers(spec, place) for _, spec in entries]
    alone = (
        rule.rounds_on_host and not gpu and widths.wide < 8 and is_compiled(sum(numbers))
    )  # in one pass, a block at a time
    copied = numbers if narrow and not (rule.rounds or alone) else []
    drawn = [] if gpu else [count for count in copied if not is_compiled(count)]
    copies, rounding = 8 * sum(copied), _rounding_bytes(max(drawn)) if drawn else 0
    if rule.fused or alone:  # it needs nothing beside its operands
        return StepBytes(copies + rounding, 0)
    lives = Lifetimes([], [])
    batch = _batch(rule, entries, config, place, lives)
    if not batch.names:
        return NONE  # this rank has none of a batch of matrices
    with torch.no_grad(), lives:
        rule.step_(batch)
    peaks, most = lives.peaks()
    renewed = (
        _renewal(batch, place, getattr(config.optim, "side", "") == "short") if "basis" in batch.states[0] else NONE
    )
    return StepBytes(max(most, renewed.most, rounding) + copies, max(peaks["messages"], renewed.messages))


def _batch(rule: Rule, entries: list[Entry], config: TrainConfig, place: Place, lives: Lifetimes) -> Batch:
    """Makes what a rule is given of these parameters in a step, of this rank's rows; `lives` is told what it sends."""
    widths = widths_of(config)
    wide = wide_of(config)
    whole, dtype = unsplit(rule, wide), torch.bfloat16 if widths.parameter == 2 and rule.rounds else wide

    def rows(t: torch.Tensor, batched: bool) -> torch.Size:
        return t.shape if batched else torch.Size((rows_of(t.size(0), place), *t.shape[1:]))

    exchanges = place.shards > 1 and not entries[0][1].batched
    group: Any = OnPaper(place.shard, place.shards, lives.note_message) if exchanges else None
    # Most is held where a projection is renewed; but to renew a basis looks at numbers.
    step = 2 if "basis" in whole else 1
    batch = Batch([], [], [], [], [], [], group, step, 1e-3, 0.1, 0)
    for name, spec in entries:
        logical = torch.empty(spec.matrix, dtype=wide, device="meta")
        for _ in range(rows_of(spec.shape[0], place) if spec.batched else 1):
            state = {
                key: torch.empty(t.shape if key in whole else rows(t, spec.batched), dtype=t.dtype, device="meta")
                for key, t in rule.new_state(logical).items()
            }
            batch.names.append(name)
            batch.params.append(torch.empty(rows(logical, spec.batched), dtype=dtype, device="meta"))
            batch.grads.append(torch.empty_like(batch.params[-1]))
            batch.states.append(state)
            batch.shapes.append(spec.matrix)
            batch.offsets.append(0)
    return batch


@functools.cache
def _rounding_bytes(numbers: int) -> int:
    """What a CPU holds to draw the bits by which so many numbers are rounded, which is more than to round them: of those of a portion
    (`kernels.rounding`)."""
    with torch.no_grad(), Lifetimes([], []) as lives:
        random_16(0, 0, min(numbers, portion_elements()), torch.device("meta"))
    return lives.peaks()[1]


def _renewal(batch: Batch, place: Place, turns: bool) -> StepBytes:
    """What the renewal of bases (n, r) holds when the last is found: of all matrices the directions that they began with, P, Y, what
    is made of it, the gram matrix and the basis; and of one beside that Q, its vectors, their sizes, and R and two like it
    (`optim.lowrank.projection.subspace_bases`). Y and the gram matrices are sent. `turns`: wide matrices are turned round, and
    what they become is there."""
    every, most, sent = 0, 0, 0
    for state, g, shape in zip(batch.states, batch.grads, batch.shapes, strict=True):
        basis = state["basis"]
        columns, rank = basis.shape
        turned = turns and is_wide(shape)
        rows = rows_of(shape[1], place) if turned else g.size(0)
        wider = rank + min(OVERSAMPLE, min(shape) - rank)
        held = (3 * columns + rows + wider) * wider + columns * rank + turned * rows * columns
        every += held * basis.itemsize
        most = max(most, ((columns + 3 * wider) * wider + 2 * columns * rank) * basis.itemsize)
        sent += (columns + wider) * wider * basis.itemsize
    return StepBytes(every + most, sent if batch.group is not None else 0)
