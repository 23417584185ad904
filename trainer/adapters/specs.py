"""What the parameters of a run are: those of its model, those of its adapter, and which of them learn.

The parameters of an adapter stand in the layer of the matrix that they are beside, behind its own:

    blocks.0.attention.wq.weight    frozen
    blocks.0.attention.wq.lora_a    learns
    blocks.0.attention.wq.lora_b    learns
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from fnmatch import fnmatchcase

from rowwise.kernels.spec import ParameterSpec, Specs
from rowwise.optim.build import frozen_by
from rowwise.trainer.adapters.bits import NAMED, even, name_of, spread
from rowwise.trainer.adapters.config import ADDED, AdapterBase, AdapterConfig, LqLora, NoAdapter
from rowwise.trainer.adapters.frozen import with_kept
from rowwise.trainer.config import TrainConfig
from rowwise.trainer.models.decoder import parameter_specs, stage_parts
from rowwise.trainer.models.specs import EMBEDDING, HEAD


def run_specs(config: TrainConfig) -> Specs:
    """Gives the spec of every parameter of a run, by name and in order."""
    return _of_run(parameter_specs(config.model), config)


def _of_run(specs: Specs, config: TrainConfig) -> Specs:
    adapter = config.adapter
    found = with_kept(frozen_by(with_adapter(specs, adapter), config.optim), config.model.frozen_dtype)
    return with_forms(found, adapter) if isinstance(adapter, LqLora) else found


def with_forms(specs: Specs, adapter: LqLora) -> Specs:
    """Returns specs in which matrices of LQ-LoRA are kept in their forms; while these are not chosen, as if all had as many bits."""
    found = dict(specs)
    for name, spec in specs.items():
        if is_adapted(name, spec, adapter):
            form = even(spec.shape, adapter.bits) if adapter.forms is None else NAMED[adapter.forms[name]]
            found[name] = replace(spec, kept=form)
    return found


def with_likely_forms(config: TrainConfig) -> TrainConfig:
    """Returns a run whose matrices of LQ-LoRA have forms that together take the bits that there are, where none are chosen yet."""
    adapter = config.adapter
    if not isinstance(adapter, LqLora) or adapter.forms is not None:
        return config
    specs = parameter_specs(config.model)
    names = [name for name, spec in specs.items() if is_adapted(name, spec, adapter)]
    forms = map(name_of, spread((specs[name].shape for name in names), adapter.bits))
    return replace(config, adapter=replace(adapter, forms=dict(zip(names, forms, strict=True))))


def run_parts(config: TrainConfig, layers: range) -> tuple[list[Specs], Specs]:
    """Reads what `Decoder.parts` of these layers of a run hold, and what they leave, in specs: see `stage_parts`."""
    parts, rest = stage_parts(config.model, layers)
    copy_learns = not run_specs(config)[EMBEDDING].frozen

    def of_run(part: Specs) -> Specs:
        found = _of_run(part, config)
        if config.model.tie_embeddings and HEAD in found:  # the copy of another stage's embedding
            return {**found, HEAD: replace(found[HEAD], frozen=not copy_learns)}
        return found

    return [of_run(part) for part in parts], of_run(rest)


def with_adapter(specs: Specs, adapter: AdapterConfig) -> Specs:
    """Returns the specs of a model, or of some of its parameters, with those of its adapter; all else is frozen, but for what is
    trained whole."""
    if isinstance(adapter, NoAdapter):
        return specs
    trained = matching(adapter.train)
    found: dict[str, ParameterSpec] = {}
    for layer, members in _by_layer(specs):
        found |= {name: replace(spec, frozen=not trained(name)) for name, spec in members.items()}
        weight = f"{layer}.weight"
        if weight in members and is_adapted(weight, members[weight], adapter):
            found |= {f"{layer}.{name}": spec for name, spec in adapter.at(weight).added(members[weight].shape).items()}
    return found


def adapted_layers(specs: Specs, adapter: AdapterConfig) -> list[str]:
    """Names the linear layers that have the adapter, in the order of the model."""
    return [name.removesuffix(".weight") for name, spec in specs.items() if is_adapted(name, spec, adapter)]


def is_adapted(name: str, spec: ParameterSpec, adapter: NoAdapter | AdapterBase) -> bool:
    """Says whether a parameter is a matrix that the adapter stands beside."""
    if isinstance(adapter, NoAdapter) or spec.role != "hidden":
        return False
    return name.endswith(".weight") and matching(adapter.layers)(name) and not adapter.leaves_out(name)


def is_added(name: str) -> bool:
    """Says whether a parameter is an adapter's and not the model's own."""
    return name.rpartition(".")[2] in ADDED


def matching(patterns: list[str]) -> Callable[[str], bool]:
    """Returns what says whether a name matches one of the shell patterns."""
    return lambda name: any(fnmatchcase(name, pattern) for pattern in patterns)


def _by_layer(specs: Specs) -> Iterator[tuple[str, dict[str, ParameterSpec]]]:
    """The parameters of each module, by the name of the module."""
    for layer, members in itertools.groupby(specs.items(), key=lambda item: item[0].rpartition(".")[0]):
        yield layer, dict(members)
