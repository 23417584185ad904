"""A model that is no transformer: its layers mix the tokens of a document by short gated convolutions, as Hyena and LFM2 do, and have
neither attention nor rotary positions.

    rowwise train model=examples/gated_conv.py:GatedConv model.settings.taps=4

A token that stands at position p of its document sees min(p + 1, taps) tokens, itself among them, in each layer. What a model is
made of, docs/own-model.md says.

Shapes: B sequences, S tokens, D model dim, F inner dim of the feed-forward, K taps.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rowwise.kernels.attention import Attend
from rowwise.kernels.spec import Constant, Normal, ParameterSpec
from rowwise.kernels.visible import Documents
from rowwise.trainer.models.model import Model


class Convolution(nn.Module):
    """y = w_out(c * conv(b * v)), with b, c, v = w_in(x), and conv(u)_t = sum_j taps_j u_(t - j), channel by channel, inside a
    document: (B, S, D) to (B, S, D)."""

    def __init__(self, dim: int, taps: int):
        super().__init__()
        self.w_in = nn.Linear(dim, 3 * dim, bias=False)
        self.taps = nn.Parameter(torch.empty(dim, taps))
        self.w_out = nn.Linear(dim, dim, bias=False)

    def forward(self, x_BSD: Tensor, positions_BS: Tensor) -> Tensor:
        b_BSD, c_BSD, v_BSD = self.w_in(x_BSD).chunk(3, dim=-1)
        u_BSD = b_BSD * v_BSD
        y_BSD = u_BSD * self.taps[:, 0]
        for j in range(1, min(self.taps.size(1), u_BSD.size(1))):
            before_BSD = F.pad(u_BSD[:, :-j], (0, 0, j, 0))
            y_BSD = y_BSD + before_BSD * self.taps[:, j] * (positions_BS >= j).unsqueeze(-1)
        return self.w_out(c_BSD * y_BSD)


class Layer(nn.Module):
    """h = x + convolution(norm(x)), then h + w2(gelu(w1 norm(h) + bias))."""

    def __init__(self, dim: int, ffn_dim: int, taps: int):
        super().__init__()
        self.mixer_norm, self.mixer = nn.LayerNorm(dim), Convolution(dim, taps)
        self.feed_norm = nn.LayerNorm(dim)
        self.w1, self.w2 = nn.Linear(dim, ffn_dim), nn.Linear(ffn_dim, dim, bias=False)

    def forward(self, x_BSD: Tensor, positions_BS: Tensor, documents: Documents | None, attend: Attend) -> Tensor:
        h_BSD = x_BSD + self.mixer(self.mixer_norm(x_BSD), positions_BS)
        return h_BSD + self.w2(F.gelu(self.w1(self.feed_norm(h_BSD))))


@dataclass(frozen=True)
class Settings:
    """`taps`: how many tokens a convolution sees."""

    taps: int = 4


class GatedConv(Model):
    """Layers of a convolution and a feed-forward, between the embedding and the head that every model has."""

    SEES = "documents"
    READS = frozenset(("ffn_dim",))
    SETTINGS = Settings

    def block(self, layer: int) -> nn.Module:
        return Layer(self.config.dim, self.config.ffn_dim, self.settings.taps)

    def norm(self) -> nn.Module:
        return nn.LayerNorm(self.config.dim)

    def specs(self) -> dict[str, ParameterSpec]:
        V, D, F, K = self.config.vocab_size, self.config.dim, self.config.ffn_dim, self.settings.taps
        wide = Normal(self.config.init_std)
        # Of what writes into the residual stream.
        last = Normal(self.config.init_std / math.sqrt(2 * self.config.layers))

        def matrix(rows: int, columns: int, init: Normal = wide) -> ParameterSpec:
            return ParameterSpec(torch.Size((rows, columns)), "hidden", init)

        def vector(size: int, value: float) -> ParameterSpec:
            return ParameterSpec(torch.Size((size,)), "vector", Constant(value))

        told = {
            "embed.weight": ParameterSpec(torch.Size((V, D)), "embedding", wide),
            "blocks.*.mixer_norm.weight": vector(D, 1),
            "blocks.*.mixer_norm.bias": vector(D, 0),
            "blocks.*.mixer.w_in.weight": matrix(3 * D, D),
            "blocks.*.mixer.taps": ParameterSpec(torch.Size((D, K)), "vector", Normal(1 / math.sqrt(K))),
            "blocks.*.mixer.w_out.weight": matrix(D, D, last),
            "blocks.*.feed_norm.weight": vector(D, 1),
            "blocks.*.feed_norm.bias": vector(D, 0),
            "blocks.*.w1.weight": matrix(F, D),
            "blocks.*.w1.bias": vector(F, 0),
            "blocks.*.w2.weight": matrix(D, F, last),
            "norm.weight": vector(D, 1),
            "norm.bias": vector(D, 0),
        }
        if not self.config.tie_embeddings:
            told["head.weight"] = ParameterSpec(torch.Size((V, D)), "head", wide)
        return told
