"""Puts the layers of an adapter in the place of a model's, and freezes what does not learn."""

from collections.abc import Callable
from typing import Any

from torch import nn

from rowwise.kernels.spec import Specs
from rowwise.trainer.adapters.bone import BoneLinear
from rowwise.trainer.adapters.config import AdapterConfig, Bone, Lora
from rowwise.trainer.adapters.lora import LoraLinear
from rowwise.trainer.adapters.specs import adapted_layers
from rowwise.trainer.models.decoder import Decoder
from rowwise.trainer.models.specs import EMBEDDING

# What makes of a linear layer one that has the adapter, with the very same parameters beside its own.
LAYERS: dict[type, Callable[[nn.Linear, Any], nn.Linear]] = {Lora: LoraLinear, Bone: BoneLinear}


def adapt(model: Decoder, adapter: AdapterConfig, specs: Specs) -> Decoder:
    """Makes of a plain model, or a stage of it, one whose parameters are those of `specs`, in place: before anything else takes hold
    of its layers."""
    modules = dict(model.named_modules())
    for path in adapted_layers(specs, adapter):
        if (layer := modules.get(path)) is not None:  # it may be another stage's
            assert type(layer) is nn.Linear
            model.set_submodule(path, LAYERS[type(adapter)](layer, adapter))
    for name, p in model.named_parameters():
        p.requires_grad_(not specs[EMBEDDING if p is model.tied_copy else name].frozen)
    model.specs = specs
    return model
