"""What the models are made of that a configuration names: our decoder, by `model.block`, or a user's own, by `model.own`."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from rowwise.kernels.logit_form import LogitForm
from rowwise.kernels.spec import ParameterSpec
from rowwise.trainer.models.blocks import Block, Layer
from rowwise.trainer.models.code import load_code, telling
from rowwise.trainer.models.config import ModelConfig
from rowwise.trainer.models.ends import Head, StableEmbedding, initial_table, scaled
from rowwise.trainer.models.model import Model
from rowwise.trainer.models.rope import Rope, rope_tables
from rowwise.trainer.models.specs import decoder_specs

BLOCKS: dict[str, type[Layer]] = {"llama": Block}  # by `model.block`


class Families(Model):
    """The decoder of Llama and the families beside it (docs/models.md), whose layers are those of `model.block`."""

    SEES = "attend"

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        self._ropes: dict[int, Rope] = {}  # of layers that were asked for: `beside` is called in every forward

    def embed(self) -> nn.Module:
        embedding = StableEmbedding if self.config.stable_embedding else nn.Embedding
        return embedding(self.config.vocab_size, self.config.dim, _weight=initial_table(self.config))

    def embedded(self, embed: nn.Module, tokens: Tensor, positions: Tensor) -> Tensor:
        return scaled(embed(tokens), self.config.embed_scale)

    def block(self, layer: int) -> Layer:
        return BLOCKS[self.config.block](self.config.at(layer))

    def beside(self, layers: Sequence[int], x: Tensor, positions: Tensor) -> list[tuple[Tensor, ...]]:
        for layer in layers:
            if layer not in self._ropes:
                self._ropes[layer] = self.config.at(layer).rope
        ropes = [self._ropes[layer] for layer in layers]
        tables = {rope: rope_tables(positions, rope, x.dtype) for rope in dict.fromkeys(ropes)}
        return [tables[rope] for rope in ropes]

    def head(self, fused: bool) -> Head:
        return Head(self.config.dim, self.config.vocab_size, fused, form_of(self.config))

    def specs(self) -> dict[str, ParameterSpec]:
        """Without building all of the model: layers are alike, and to build a thousand takes seconds."""
        ends: dict[str, Callable[[], nn.Module]] = {
            "embed": self.embed,
            "blocks.0": lambda: self.block(0),
            "norm": self.norm,
        }
        if not self.config.tie_embeddings:
            ends["head"] = lambda: self.head(True)
        with torch.device("meta"):
            parts = {path: make() for path, make in ends.items()}
        shapes = {f"{path}.{name}": p.shape for path, part in parts.items() for name, p in part.named_parameters()}
        return decoder_specs(self.config, BLOCKS[self.config.block].TABLE, shapes)


def form_of(config: ModelConfig) -> LogitForm:
    """Tells of what form the logits of a model are."""
    return LogitForm(config.logit_scale, config.logit_cap)


def made_of(config: ModelConfig) -> Model:
    """Tells what a model is made of. Raises ValueError for code of one's own that makes none."""
    if config.own is None:
        return Families(config)
    made = load_code(config.own)
    if not (isinstance(made, type) and issubclass(made, Model)):
        raise ValueError(f"model.own={config.own}: it is no class below rowwise.trainer.models.model.Model")
    with telling(config.own, "making it"):
        return made(config)


def sees(config: ModelConfig) -> str:
    """Tells how the layers of a model look at other tokens: see `Model`."""
    return made_of(config).SEES
