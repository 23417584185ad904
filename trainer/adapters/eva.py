"""Which directions EVA gives each layer: of what layers take in the first batches of a run, those in which it varies most.

    shares of a layer    variances along its principal components, over the sum of all
    ranks                of the shares of all layers the largest, as many as `rank` for each; of one layer at most rho `rank`
    A of a layer         as many of its principal components; B = 0          (Paischer et al., *EVA*, and PEFT)

The parameters of a run hang on the ranks. So a model is made for this alone, and let go: the run's, with `rank` at every matrix, whose
B is 0, so that layers take what they do without an adapter. It takes the memory and the messages of forward passes.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from rowwise.kernels.wide import wide_dtype
from rowwise.parallel.mesh import Mesh
from rowwise.parallel.objects import from_every_rank
from rowwise.trainer.adapters.config import Lora
from rowwise.trainer.adapters.decompose import Principal, principal, shared_out
from rowwise.trainer.adapters.from_data import Batches, found_in_data, looked_at, require_none
from rowwise.trainer.assemble import Assembled
from rowwise.trainer.config import TrainConfig
from rowwise.trainer.parallelize import parameter_dtype

Told = Mapping[str, tuple[float, list[float]]]  # of each layer: for how many tokens, and its shares


def directions_of(
    config: TrainConfig, mesh: Mesh, batches: Batches, columns: Mapping[str, int]
) -> tuple[dict[str, int], dict[str, Tensor]]:
    """Returns the rank of every matrix, and A of each `mesh.world_size`-th, from that of the rank's number on, by its layer, on the
    host. `columns`: how many numbers each layer takes for a token. All ranks call it. Raises Unbegun, on every rank."""
    adapter = config.adapter
    assert isinstance(adapter, Lora)
    found = _found(config, mesh, batches, columns)
    mine = {layer: (one.tokens, one.shares.tolist()) for layer, one in found.items()}
    everyone = from_every_rank(mine, mesh.save_group)
    told = {layer: one for part in everyone for layer, one in part.items()}
    if (ranks := adapter.ranks) is None:
        given = shared_out([torch.tensor(told[layer][1]) for layer in columns], adapter.rank, most_of(adapter))
        ranks = {f"{layer}.weight": rank for layer, rank in zip(columns, given, strict=True)}
    complaints = [*_lacking(adapter, ranks, told, columns)]
    require_none(complaints, mesh, "adapter.init=eva", adapter.init_batches, "adapter.init=kaiming")
    return ranks, {layer: one.rows[: ranks[f"{layer}.weight"]] for layer, one in found.items()}


def most_of(adapter: Lora) -> int:
    """Returns how many directions a layer may have."""
    return max(round(adapter.eva_rho * adapter.rank), *(adapter.ranks or {"": 0}).values())


def _found(config: TrainConfig, mesh: Mesh, batches: Batches, columns: Mapping[str, int]) -> dict[str, Principal]:
    adapter = config.adapter
    assert isinstance(adapter, Lora)
    dtype, most = wide_dtype(parameter_dtype(config)), most_of(adapter)
    look = replace(config, adapter=replace(adapter, init="kaiming", ranks=None))

    def find(built: Assembled) -> dict[str, Principal]:
        return found_in_data(config, mesh, built.engine, batches, columns, lambda _, sums: principal(sums, most, dtype))

    return looked_at(look, mesh, find)


def _lacking(adapter: Lora, ranks: Mapping[str, int], told: Told, layers: Mapping[str, int]) -> Iterator[str]:
    """Says of layers that what they take varies in fewer directions than they are to have, or than all need on the mean."""
    few = adapter.ranks is None and sum(ranks.values()) < adapter.rank * len(ranks)
    for layer in layers:
        tokens, shares = told[layer]
        wanted = adapter.rank if few else ranks[f"{layer}.weight"]
        if len(shares) < wanted:
            yield f"{layer}: what it takes for {tokens:.0f} tokens varies in {len(shares)} directions, and adapter.rank={wanted}"
