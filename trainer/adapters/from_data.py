"""What adapters begin with that hangs on what layers take in the first batches of a run: found layer by layer, each by one rank."""

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from itertools import chain, islice
from typing import Literal, NamedTuple, TypeVar

from torch import Tensor

from rowwise.parallel.activations.saved import open_stores
from rowwise.parallel.mesh import Mesh
from rowwise.parallel.objects import from_every_rank
from rowwise.trainer.adapters.config import Lora, Mode
from rowwise.trainer.adapters.decompose import corda
from rowwise.trainer.adapters.inputs import in_passes, sums_of
from rowwise.trainer.assemble import Assembled, assemble
from rowwise.trainer.config import TrainConfig
from rowwise.trainer.data.batches import MicroBatch
from rowwise.trainer.engine import Engine

Batches = Callable[[], Iterator[list[MicroBatch]]]  # of this rank, step by step from the first
PARTS: dict[Mode, Literal["most", "least"]] = {"instruction": "most", "knowledge": "least"}
Found = TypeVar("Found")


class Unbegun(ValueError):
    """The data does not say what an adapter begins with."""


class Part(NamedTuple):
    """A (r, n) and B (m, r) of a layer."""

    a: Tensor
    b: Tensor


def found_in_data(
    config: TrainConfig, mesh: Mesh, engine: Engine, batches: Batches, columns: Mapping[str, int],
    find: Callable[[str, Tensor], Found],
) -> dict[str, Found]:  # fmt: skip
    """Returns what `find` finds in the sums (`inputs`) of every `mesh.world_size`-th layer, from that of the rank's number on; it is
    given the layer and its sums, and may raise ValueError. `columns`: how many numbers each layer takes for a token. All ranks call
    it. Raises Unbegun, on every rank."""
    adapter = config.adapter
    assert isinstance(adapter, Lora)
    owners = {layer: number % mesh.world_size for number, layer in enumerate(columns)}
    found, complaints = dict[str, Found](), list[str]()
    for some in in_passes({layer: 8 * (n + 1) ** 2 for layer, n in columns.items()}):
        first = chain.from_iterable(islice(batches(), adapter.init_batches))
        sums = sums_of(
            engine, mesh, {layer: columns[layer] for layer in some}, {layer: owners[layer] for layer in some}, first,
            divided=adapter.init == "corda", compiled=config.compile,
        )  # fmt: skip
        for layer in [*sums]:
            try:
                found[layer] = find(layer, sums.pop(layer))
            except ValueError as refusal:
                complaints.append(f"{layer}: {refusal}")
    require_none(complaints, mesh, f"adapter.init={adapter.init}", adapter.init_batches, "adapter.init=kaiming")
    return found


def part_of(config: TrainConfig, w: Tensor, sums: Tensor) -> Part:
    """Returns CorDA's A and B of a layer with the weight w (m, n), of the mean of its sums over sequences, whose size says how much of
    a singular value is A's, and how much B's. Raises ValueError where there is none."""
    adapter = config.adapter
    assert isinstance(adapter, Lora)
    mean = sums[:-1, :-1] / (adapter.init_batches * config.batch.global_size)
    _, a, b = corda(w, mean, adapter.rank, adapter.scale, PARTS[adapter.corda_mode])
    return Part(a, b)


def looked_at(config: TrainConfig, mesh: Mesh, look: Callable[[Assembled], Found]) -> Found:
    """Makes the model of a run, without an average, for a look at data alone, and lets it go. Returns what `look` finds with it."""
    built = assemble(replace(config, average=replace(config.average, ema=None)), mesh)
    with open_stores(built.model), closing(built):
        found = look(built)
    del built
    gc.collect()  # a model and its hooks are in circles, and there is no room for two
    return found


def require_none(complaints: Sequence[str], mesh: Mesh, what: str, batches: int, instead: str) -> None:
    """Refuses the run, on all ranks, where one of them complains. Raises Unbegun."""
    if told := [one for part in from_every_rank(complaints, mesh.save_group) for one in part]:
        raise Unbegun(
            f"{what}: {told[0]}; give more than adapter.init_batches={batches}, data in which more has a label, or {instead}"
        )
