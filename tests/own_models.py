"""Models of one's own that tests train: one that looks by `attend`, and ones that keep to the protocol in all but one thing."""

from dataclasses import replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rowwise.kernels.spec import Constant, Normal, ParameterSpec
from rowwise.trainer.models.model import Model


class Side(nn.Module):
    """x + w_out [attention, gelu] of one norm of x, side by side as in GPT-J and PaLM, without positions. The matrices that give
    queries, keys, values and the inner width are rows of one."""

    def __init__(self, dim: int, heads: int, kv_heads: int, ffn_dim: int):
        super().__init__()
        self.size = dim // heads
        self.sizes = [heads * self.size, kv_heads * self.size, kv_heads * self.size, ffn_dim]
        self.norm = nn.LayerNorm(dim)
        self.w_in = nn.Linear(dim, sum(self.sizes))
        self.out = nn.Parameter(torch.empty(dim, heads * self.size + ffn_dim))

    def forward(self, x, positions, documents, attend):
        q, k, v, f = self.w_in(self.norm(x)).split(self.sizes, dim=-1)
        q, k, v = (t.unflatten(-1, (-1, self.size)) for t in (q, k, v))
        seen = attend(q, k, v, documents, self.look())
        return x + F.linear(torch.cat((seen.flatten(2), F.gelu(f)), -1), self.out)

    def look(self):
        from rowwise.kernels.look import Look

        return Look(scale=0.3)


class Learned(nn.Embedding):
    """Tokens and their positions, which are learned too."""

    def __init__(self, vocab_size: int, dim: int, positions: int):
        super().__init__(vocab_size, dim)
        self.places = nn.Parameter(torch.empty(positions, dim))

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(tokens) + self.places[positions]


class SideBySide(Model):
    """Layers of `Side`, with learned positions."""

    SEES = "attend"
    READS: ClassVar[frozenset[str]] = frozenset(("ffn_dim",))

    def embed(self) -> nn.Module:
        return Learned(self.config.vocab_size, self.config.dim, 64)

    def embedded(self, embed, tokens, positions):
        return embed(tokens, positions)

    def block(self, layer: int) -> nn.Module:
        return Side(self.config.dim, self.config.heads, self.config.kv_heads, self.config.ffn_dim)

    def norm(self) -> nn.Module:
        return nn.Identity()

    def specs(self) -> dict[str, ParameterSpec]:
        config = self.config
        V, D, Q = config.vocab_size, config.dim, config.heads * config.head_size
        rows = Q + 2 * config.kv_heads * config.head_size + config.ffn_dim
        normal = Normal(config.init_std)
        told = {
            "embed.weight": ParameterSpec(torch.Size((V, D)), "embedding", normal),
            "embed.places": ParameterSpec(torch.Size((64, D)), "embedding", normal),
            "blocks.*.norm.weight": ParameterSpec(torch.Size((D,)), "vector", Constant(1)),
            "blocks.*.norm.bias": ParameterSpec(torch.Size((D,)), "vector", Constant(0)),
            "blocks.*.w_in.weight": ParameterSpec(torch.Size((rows, D)), "hidden", normal),
            "blocks.*.w_in.bias": ParameterSpec(torch.Size((rows,)), "vector", Constant(0)),
            "blocks.*.out": ParameterSpec(torch.Size((D, Q + config.ffn_dim)), "hidden", normal),
        }
        head = {"head.weight": ParameterSpec(torch.Size((V, D)), "head", normal)}
        return told | ({} if config.tie_embeddings else head)


class Plain(Model):
    """A linear layer for each token, between plain ends: what the others change one thing of."""

    LAYER: ClassVar[Any] = None

    def block(self, layer: int) -> nn.Module:
        return self.LAYER(self.config.dim)

    def specs(self) -> dict[str, ParameterSpec]:
        V, D, normal = self.config.vocab_size, self.config.dim, Normal(0.1)
        return {
            "embed.weight": ParameterSpec(torch.Size((V, D)), "embedding", normal),
            "blocks.*.w.weight": ParameterSpec(torch.Size((D, D)), "hidden", normal),
            "norm.weight": ParameterSpec(torch.Size((D,)), "vector", Constant(1)),
            "head.weight": ParameterSpec(torch.Size((V, D)), "head", normal),
        }


class Each(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.w = nn.Linear(dim, dim, bias=False)

    def forward(self, x, positions, documents, attend):
        return x + self.w(x)


class Wide(Each):
    def forward(self, x, positions, documents, attend):
        return torch.cat((x, self.w(x)), -1)


class Double(Each):
    def forward(self, x, positions, documents, attend):
        return x + self.w(x).double()


class Breaks(Each):
    def forward(self, x, positions, documents, attend):
        return x + self.v(x)


class Ahead(Each):
    def forward(self, x, positions, documents, attend):
        return x + self.w(x).mean(1, keepdim=True)


class Before(Each):
    def forward(self, x, positions, documents, attend):
        return x + self.w(x).cumsum(1)


class Looks(Each):
    def forward(self, x, positions, documents, attend):
        q = self.w(x).unflatten(-1, (2, -1))
        return x + attend(q, q, q, documents, self.look()).flatten(2)

    look = Side.look


class Forgets(Looks):
    def forward(self, x, positions, documents, attend):
        q = self.w(x).unflatten(-1, (2, -1))
        return x + attend(q, q, q, None, self.look()).flatten(2)


class Both(Looks):
    def forward(self, x, positions, documents, attend):
        return super().forward(x + F.pad(x[:, :-1], (0, 0, 1, 0)), positions, documents, attend)


class Buffer(Each):
    def __init__(self, dim: int):
        super().__init__(dim)
        self.register_buffer("mean", torch.zeros(dim))


class Loose(Each):
    def __init__(self, dim: int):
        super().__init__(dim)
        self.shift = torch.zeros(dim)


class Drops(Each):
    def __init__(self, dim: int):
        super().__init__(dim)
        self.drop = nn.Dropout(0.1)


class More(Each):
    def __init__(self, dim: int):
        super().__init__(dim)
        self.bias = nn.Parameter(torch.zeros(dim))


class Scalar(Each):
    def __init__(self, dim: int):
        super().__init__(dim)
        self.scale = nn.Parameter(torch.ones(()))


def _of(layer: type, sees: str = "sequence") -> type[Plain]:
    return type(f"Of{layer.__name__}", (Plain,), {"LAYER": layer, "SEES": sees})


OfEach, OfWide, OfDouble, OfBreaks, OfAhead, OfBuffer, OfLoose, OfDrops, OfMore, OfScalar, OfBefore = (
    _of(layer) for layer in (Each, Wide, Double, Breaks, Ahead, Buffer, Loose, Drops, More, Scalar, Before)
)
Within, Unsaid = _of(Before, "documents"), _of(Looks)
OfLooks, OfForgets, OfBoth = (_of(layer, "attend") for layer in (Looks, Forgets, Both))


class Misnamed(OfEach):
    def specs(self):
        return super().specs() | {"blocks.*.v.weight": super().specs()["blocks.*.w.weight"]}


class Misshapen(OfEach):
    def specs(self):
        told = super().specs()
        spec = told["blocks.*.w.weight"]
        return told | {"blocks.*.w.weight": replace(spec, shape=torch.Size((1, 2)))}


class Rolled(OfEach):
    def specs(self):
        told = super().specs()
        return told | {"norm.weight": replace(told["norm.weight"], role="hidden")}


class Unbegun(OfEach):
    def specs(self):
        told = super().specs()
        return told | {"norm.weight": replace(told["norm.weight"], init=None)}


class Shares(OfEach):
    def norm(self):
        norm = super().norm()
        norm.again = self._embedding.weight if hasattr(self, "_embedding") else None
        return norm

    def embed(self):
        self._embedding = super().embed()
        return self._embedding


class Headless(OfEach):
    def head(self, fused):
        return nn.Linear(self.config.dim, 3, bias=False)

    def specs(self):
        told = super().specs()
        return told | {"head.weight": replace(told["head.weight"], shape=torch.Size((3, self.config.dim)))}


class Empty(Model):
    pass


def number():
    return 1


class Fails(OfEach):
    def block(self, layer):
        raise IndexError("no such layer")
