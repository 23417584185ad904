"""What adapters begin with that hangs on what layers take: A and B of `adapter.init=eva` and `corda`."""

from collections.abc import Callable, Iterator, Sequence
from itertools import chain, islice
from typing import Literal, NamedTuple

from torch import Tensor

from rowwise.parallel.mesh import Mesh
from rowwise.parallel.objects import from_every_rank
from rowwise.trainer.adapters.config import Lora, Mode
from rowwise.trainer.adapters.decompose import corda, eva
from rowwise.trainer.adapters.inputs import in_passes, sums_of
from rowwise.trainer.config import TrainConfig
from rowwise.trainer.data.batches import MicroBatch
from rowwise.trainer.engine import Engine

Batches = Callable[[], Iterator[list[MicroBatch]]]  # of this rank, step by step from the first
PARTS: dict[Mode, Literal["most", "least"]] = {"instruction": "most", "knowledge": "least"}


class Unbegun(ValueError):
    """The data does not say what an adapter begins with."""


class Found(NamedTuple):
    """A (r, n) and B (m, r) of a layer."""

    a: Tensor
    b: Tensor


def found_in_data(
    config: TrainConfig, mesh: Mesh, engine: Engine, batches: Batches, columns: dict[str, int], whole: Callable[[str], Tensor]
) -> dict[str, Found]:  # fmt: skip
    """Returns A and B of every `mesh.world_size`-th layer, from that of the rank's number on. `columns`: how many numbers each layer
    takes for a token; `whole`: makes a weight by its name, of which EVA needs shape and dtype alone. All ranks call it. Raises
    Unbegun, on every rank."""
    adapter = config.adapter
    assert isinstance(adapter, Lora)
    owners = {layer: number % mesh.world_size for number, layer in enumerate(columns)}
    found, complaints, sequences = dict[str, Found](), list[str](), adapter.init_batches * config.batch.global_size
    for some in in_passes({layer: 8 * (n + 1) ** 2 for layer, n in columns.items()}):
        first = chain.from_iterable(islice(batches(), adapter.init_batches))
        sums = sums_of(
            engine, mesh, {layer: columns[layer] for layer in some}, {layer: owners[layer] for layer in some}, first,
            divided=adapter.init == "corda", compiled=config.compile,
        )  # fmt: skip
        for layer in [*sums]:
            try:
                found[layer] = _of_sums(adapter, whole(f"{layer}.weight"), sums.pop(layer), sequences)
            except ValueError as refusal:
                complaints.append(f"{layer}: {refusal}")
    require_none(complaints, mesh, f"adapter.init={adapter.init}", adapter.init_batches, "adapter.init=kaiming")
    return found


def _of_sums(adapter: Lora, w: Tensor, sums: Tensor, sequences: int) -> Found:
    """A and B of a layer with the weight w (m, n), whose sums (n + 1, n + 1) are over so many sequences. CorDA has the mean over
    sequences: its size says how much of a singular value is A's, and how much B's."""
    squares = sums[:-1, :-1]
    if adapter.init == "eva":
        _, a, b = eva(w, sums[-1, -1].item(), sums[-1, :-1], squares, adapter.rank)
    else:
        _, a, b = corda(w, squares / sequences, adapter.rank, adapter.scale, PARTS[adapter.corda_mode])
    return Found(a, b)


def require_none(complaints: Sequence[str], mesh: Mesh, what: str, batches: int, instead: str) -> None:
    """Refuses the run, on all ranks, where one of them complains. Raises Unbegun."""
    if told := [one for part in from_every_rank(complaints, mesh.save_group) for one in part]:
        raise Unbegun(
            f"{what}: {told[0]}; give more than adapter.init_batches={batches}, data in which more has a label, or {instead}"
        )
