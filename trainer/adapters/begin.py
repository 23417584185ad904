"""What an adapter begins with that hangs on whole matrices (`decompose`), found once, before the first step.

    lora, init=pissa    A, B and what is left of W
    lora, init=corda    the same, of W and of what its layer takes (`inputs`)
    lora, init=eva      A, of what its layer takes
    lq_lora             the form of every W, then its codes, A and B; with adapter.fisher, of W and of its gradients (`fisher`)

Of as many matrices as there are ranks each rank makes one, whole, and takes it apart; then every rank takes its rows of each. So all
ranks have rows of the same numbers, and these hang on the weights and the data alone, not on the layout. A rank holds one matrix
beside its rows, and as many numbers as the model has cross to every rank, once; of `eva` A alone. What is found in data is found of
all layers before anything changes: until then B is 0, and layers take what they would without an adapter. A resumed run reads what
there is in its checkpoint.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from rowwise.kernels.coded_rows import RowForm, encode_rows
from rowwise.kernels.philox import stream_key
from rowwise.kernels.rows import local, row_offset
from rowwise.kernels.spec import ParameterSpec
from rowwise.kernels.wide import wide_dtype
from rowwise.parallel.mesh import Mesh
from rowwise.parallel.objects import from_every_rank, from_rank_0
from rowwise.trainer.adapters.bits import FORMS, bits_of, choose, name_of
from rowwise.trainer.adapters.config import OUT_OF_W, AdapterConfig, Lora, LqLora
from rowwise.trainer.adapters.decompose import first_errors, lq, pissa, without
from rowwise.trainer.adapters.eva import directions_of
from rowwise.trainer.adapters.fisher import fisher_of
from rowwise.trainer.adapters.from_data import Batches, Part, found_in_data, part_of
from rowwise.trainer.adapters.initial import Fill
from rowwise.trainer.adapters.merge import adapter_of
from rowwise.trainer.adapters.specs import adapted_layers, run_specs
from rowwise.trainer.config import TrainConfig
from rowwise.trainer.engine import Engine
from rowwise.trainer.manifest import read_manifest
from rowwise.trainer.models.decoder import parameter_specs
from rowwise.trainer.models.init import model_rows
from rowwise.trainer.parallelize import parameter_dtype
from rowwise.trainer.resume import find_resume


def with_choices_made(
    config: TrainConfig, mesh: Mesh, data_fingerprint: str, batches: Batches
) -> tuple[TrainConfig, dict[str, Tensor]]:
    """Returns the run with the forms of LQ-LoRA's matrices, or the ranks of EVA's: those of the checkpoint that it goes on from, or
    those that are chosen. And what `begin_adapter` needs of what was found meanwhile, where the run begins, for this rank's share of
    the layers: by what errors of LQ-LoRA count, where they do not all alike, and A of EVA. `batches`: those of this rank. All ranks
    call it. Raises ValueError, and Unbegun, on every rank."""
    adapter = config.adapter
    of_lq = isinstance(adapter, LqLora) and (adapter.forms is None or adapter.fisher)
    if not of_lq and not (isinstance(adapter, Lora) and (adapter.init == "eva" or adapter.ranks is None)):
        return config, {}
    there = from_rank_0(_adapter_there(config, data_fingerprint) if mesh.rank == 0 else None, mesh.save_group)
    if isinstance(adapter, LqLora):
        forms, known = (there.forms, {}) if isinstance(there, LqLora) else _forms(config, mesh, batches)
        return replace(config, adapter=replace(adapter, forms=forms)), known
    assert isinstance(adapter, Lora)
    if there is None and adapter.init != "eva":
        return config, {}
    ranks, known = (there.ranks, {}) if isinstance(there, Lora) else _ranks(config, mesh, batches)
    return replace(config, adapter=replace(adapter, ranks=ranks)), known


def _adapter_there(config: TrainConfig, data_fingerprint: str) -> AdapterConfig | None:
    """That in the newest checkpoint that a run goes on from; None: it begins."""
    for checkpoint in find_resume(config, data_fingerprint):
        with contextlib.suppress(ValueError):
            return adapter_of(read_manifest(checkpoint)["config"])
    return None


def _ranks(config: TrainConfig, mesh: Mesh, batches: Batches) -> tuple[dict[str, int], dict[str, Tensor]]:
    """The ranks of EVA, and A of this rank's share of the layers."""
    specs, adapter = parameter_specs(config.model), config.adapter
    assert isinstance(adapter, Lora)
    layers = adapted_layers(specs, replace(adapter, ranks=None))
    return directions_of(config, mesh, batches, {layer: specs[f"{layer}.weight"].shape[1] for layer in layers})


def _forms(config: TrainConfig, mesh: Mesh, batches: Batches) -> tuple[dict[str, str], dict[str, Tensor]]:
    """The forms that the integer programme chooses for LQ-LoRA, by the errors of one turn, and by what errors count."""
    adapter, specs = config.adapter, parameter_specs(config.model)
    assert isinstance(adapter, LqLora)
    shapes = {layer: specs[f"{layer}.weight"].shape for layer in adapted_layers(specs, adapter)}
    importance = fisher_of(config, mesh, batches, shapes) if adapter.fisher else {}
    if adapter.forms is not None:
        return adapter.forms, importance
    mine = {layer: _errors(config, mesh, layer, importance) for layer in [*shapes][mesh.rank :: mesh.world_size]}
    everyone = from_every_rank(mine, mesh.save_group)
    errors = {layer: found for part in everyone for layer, found in part.items()}
    chosen = _chosen(config, {f"{layer}.weight": errors[layer] for layer in shapes}) if mesh.rank == 0 else {}
    return from_rank_0(chosen, mesh.save_group), importance


def _errors(config: TrainConfig, mesh: Mesh, layer: str, importance: Mapping[str, Tensor]) -> list[float]:
    """What a turn of LQ-LoRA leaves of a layer's matrix in each form."""
    adapter, name = config.adapter, f"{layer}.weight"
    assert isinstance(adapter, LqLora)
    w = _whole(config, model_rows(config.model, config.seed), mesh.device, name)
    counts = importance[layer].to(mesh.device) if layer in importance else None
    return first_errors(w, FORMS, adapter.rank, _key(config, name), counts)


def _chosen(config: TrainConfig, errors: Mapping[str, list[float]]) -> dict[str, str]:
    adapter, specs = config.adapter, parameter_specs(config.model)
    assert isinstance(adapter, LqLora)
    shapes = [specs[name].shape for name in errors]
    bits = torch.tensor([[bits_of(shape, form) for form in FORMS] for shape in shapes], dtype=torch.float64)
    budget = adapter.bits * sum(shape.numel() for shape in shapes)
    chosen = choose(torch.tensor(list(errors.values()), dtype=torch.float64), bits, budget)
    return {name: name_of(FORMS[form]) for name, form in zip(errors, chosen, strict=True)}


@torch.no_grad()
def begin_adapter(config: TrainConfig, mesh: Mesh, engine: Engine, batches: Batches, known: dict[str, Tensor]) -> bool:
    """Gives what hangs on whole matrices its numbers in the model of `engine`, which has all others; says whether anything does.
    `batches`: those of this rank; `known`: see `with_choices_made`, from which it is taken. All ranks call it. Raises Unbegun, on
    every rank."""
    adapter = config.adapter
    if not isinstance(adapter, LqLora) and not (isinstance(adapter, Lora) and adapter.init != "kaiming"):
        return False
    specs, params = run_specs(config), {name: p.detach() for name, p in engine.model.named_parameters()}
    layers = adapted_layers(specs, replace(adapter, ranks=None) if isinstance(adapter, Lora) else adapter)
    whole, parts = partial(_whole, config, model_rows(config.model, config.seed), mesh.device), dict[str, Part]()
    if isinstance(adapter, Lora) and adapter.init == "corda":
        columns = {layer: specs[f"{layer}.weight"].shape[1] for layer in layers}
        parts = found_in_data(
            config, mesh, engine, batches, columns, lambda layer, sums: part_of(config, whole(f"{layer}.weight"), sums)
        )
    for first in range(0, len(layers), mesh.world_size):
        some = layers[first : first + mesh.world_size]
        mine = dict[str, Tensor]()
        if mesh.rank < len(some):
            name = f"{(layer := some[mesh.rank])}.weight"
            told = known.pop(layer).to(mesh.device) if layer in known else None
            mine = _begun(config, name, specs[name], whole, parts.pop(layer, None), told)
        for owner, layer in enumerate(some):
            for key, room in _rooms(config, layer, specs[f"{layer}.weight"], mesh.device):
                it = mine.pop(key).contiguous() if owner == mesh.rank else room
                dist.broadcast(it, owner)
                if (name := f"{layer}.{key}") in params:  # it may be another stage's
                    _place_(params[name], specs[name], it)
    return True


def _begun(
    config: TrainConfig, name: str, weight: ParameterSpec, whole: Callable[[str], Tensor], part: Part | None,
    known: Tensor | None,
) -> dict[str, Tensor]:  # fmt: skip
    """What of the parameters of a layer is not what it would be without an adapter, or at random: whole. `name`: its weight's, which
    `whole` makes; `part`: the A and B that go out of it, where they are found in data; `known`: see `with_choices_made`."""
    adapter = config.adapter
    if isinstance(adapter, LqLora):
        assert isinstance(weight.kept, RowForm)
        packed, a, b, _ = lq(whole(name), weight.kept, adapter.rank, adapter.scale, _key(config, name), known)
        return {"weight": packed, "lora_a": a, "lora_b": b}
    assert isinstance(adapter, Lora)
    if adapter.init == "eva":
        assert known is not None
        return {"lora_a": known}
    w = whole(name)
    rest, a, b = pissa(w, adapter.rank, adapter.scale) if part is None else without(w, *part, adapter.scale)
    return {"weight": rest, "lora_a": a, "lora_b": b}


def _rooms(
    config: TrainConfig, layer: str, weight: ParameterSpec, device: torch.device
) -> Iterator[tuple[str, Tensor]]:
    """(what it is, room for it) of each thing that `_begun` gives and that changes."""
    adapter, dtype = config.adapter, wide_dtype(parameter_dtype(config))
    assert isinstance(adapter, Lora | LqLora)
    (rows, columns), rank = weight.shape, adapter.at(f"{layer}.weight").rank
    if rank:
        yield "lora_a", torch.empty(rank, columns, dtype=dtype, device=device)
    if isinstance(adapter, Lora) and adapter.init not in OUT_OF_W:
        return
    yield "lora_b", torch.empty(rows, rank, dtype=dtype, device=device)
    if isinstance(adapter, LqLora):
        assert isinstance(weight.kept, RowForm)
        yield "weight", torch.empty(rows, weight.kept.row_bytes(columns), dtype=torch.uint8, device=device)
    else:
        yield "weight", torch.empty(rows, columns, dtype=dtype, device=device)


def _place_(p: Tensor, spec: ParameterSpec, whole: Tensor) -> None:
    """Gives this rank's rows of a parameter those of the whole of it."""
    rows, start = local(p), row_offset(p)
    own = whole[start : start + rows.size(0)]
    if isinstance(spec.kept, RowForm) and own.dtype != torch.uint8:
        own = encode_rows(own, spec.kept)
    rows.copy_(own)


def _whole(config: TrainConfig, fill_: Fill, device: torch.device, name: str) -> Tensor:
    """A matrix as the run would begin with it, by what fills its rows; in 32 bits or more."""
    shape, dtype = parameter_specs(config.model)[name].shape, wide_dtype(parameter_dtype(config))
    w = torch.empty(shape, dtype=dtype, device=device)
    fill_(name, w, 0, w.size(0))
    return w


def _key(config: TrainConfig, name: str) -> int:
    return stream_key(config.seed, f"lq_lora/{name}")
