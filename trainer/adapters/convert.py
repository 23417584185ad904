"""Puts the layers of an adapter in the place of a model's, and freezes what does not learn."""

from collections.abc import Callable
from typing import Any

from torch import nn

from rowwise.kernels.philox import stream_key
from rowwise.kernels.spec import Specs
from rowwise.parallel.activations.compress import Tokens
from rowwise.trainer.adapters.bone import BoneLinear
from rowwise.trainer.adapters.config import AdaLora, AdapterConfig, Bone, Dora, Lora, LowRankBase, LqLora, NoAdapter
from rowwise.trainer.adapters.dropout import Dropout
from rowwise.trainer.adapters.lora import AdaLoraLinear, DoraLinear, LoraLinear
from rowwise.trainer.adapters.specs import adapted_layers
from rowwise.trainer.models.decoder import Decoder
from rowwise.trainer.models.specs import EMBEDDING

# What makes of a linear layer one that has the adapter, with the very same parameters beside its own.
LAYERS: dict[type, Callable[[nn.Linear, Any], nn.Linear]] = {
    Lora: LoraLinear, LqLora: LoraLinear, AdaLora: AdaLoraLinear, Dora: DoraLinear, Bone: BoneLinear,
}  # fmt: skip


def adapt(model: Decoder, adapter: AdapterConfig, specs: Specs, seed: int, tokens: Tokens) -> Decoder:
    """Makes of a plain model, or a stage of it, one whose parameters are those of `specs`, in place: before anything else takes hold
    of its layers. `seed`: of dropout; `tokens`: those of each sequence that this rank has."""
    modules = dict(model.named_modules())
    for path in adapted_layers(specs, adapter):
        if (layer := modules.get(path)) is not None:  # it may be another stage's
            assert type(layer) is nn.Linear and not isinstance(adapter, NoAdapter)
            adapted = LAYERS[type(adapter)](layer, adapter.at(f"{path}.weight"))
            if isinstance(adapted, LoraLinear):
                adapted.dropout = dropout_of(path, adapter, seed, tokens)
            model.set_submodule(path, adapted)
    for name, p in model.named_parameters():
        p.requires_grad_(not specs[EMBEDDING if p is model.tied_copy else name].frozen)
    model.specs = specs
    return model


def dropout_of(path: str, adapter: AdapterConfig, seed: int, tokens: Tokens) -> Dropout | None:
    """Gives the dropout of the layer `path`; None: nothing is dropped."""
    if not isinstance(adapter, LowRankBase) or not adapter.dropout:
        return None
    return Dropout(adapter.dropout, stream_key(seed, f"dropout/{path}"), tokens)
