"""The layers of a decoder: what one is, and that of Llama and Qwen3.

Shapes: B sequences, S tokens, D model dim, H query heads, K key/value heads, E head dim, F feed-forward dim.
"""

from collections.abc import Callable, Mapping
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from rowwise.kernels.visible import Documents
from rowwise.trainer.models.config import ModelConfig
from rowwise.trainer.models.rope import rotate
from rowwise.trainer.models.specs import LAYER, Entry

# What looks from queries (B, S, H, E) at keys and values (B, S, K, E), each inside its document: `causal_attention`, or
# what does the same where a sequence is shared.
Attend = Callable[[Tensor, Tensor, Tensor, Documents | None], Tensor]


class Layer(nn.Module):
    """A layer of a decoder, made of its configuration: (B, S, D) to (B, S, D). `TABLE`: what its parameters are, by name."""

    TABLE: ClassVar[Mapping[str, Entry]]

    def __init__(self, config: ModelConfig):
        super().__init__()

    @staticmethod
    def count(config: ModelConfig) -> int:
        """Counts its parameters, by arithmetic alone."""
        raise NotImplementedError


class Attention(nn.Module):
    """Causal grouped-query attention with rotary positions and optional RMS-normalised queries and keys."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        heads, kv_heads, size = config.heads, config.kv_heads, config.head_size
        self.head_size = size
        self.wq = nn.Linear(config.dim, heads * size, bias=False)
        self.wk = nn.Linear(config.dim, kv_heads * size, bias=False)
        self.wv = nn.Linear(config.dim, kv_heads * size, bias=False)
        self.wo = nn.Linear(heads * size, config.dim, bias=False)
        self.q_norm = nn.RMSNorm(size, eps=config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(size, eps=config.norm_eps) if config.qk_norm else nn.Identity()

    def forward(
        self, x_BSD: Tensor, cos_BSE: Tensor, sin_BSE: Tensor, documents: Documents | None, attend: Attend
    ) -> Tensor:
        q_BSHE = self.q_norm(self.wq(x_BSD).unflatten(-1, (-1, self.head_size)))
        k_BSKE = self.k_norm(self.wk(x_BSD).unflatten(-1, (-1, self.head_size)))
        v_BSKE = self.wv(x_BSD).unflatten(-1, (-1, self.head_size))
        y_BSHE = attend(rotate(q_BSHE, cos_BSE, sin_BSE), rotate(k_BSKE, cos_BSE, sin_BSE), v_BSKE, documents)
        return self.wo(y_BSHE.flatten(2))


def attention_count(config: ModelConfig) -> int:
    """Counts the parameters of `Attention`, by arithmetic alone."""
    size = config.head_size
    return 2 * config.dim * size * (config.heads + config.kv_heads) + 2 * size * config.qk_norm


class FeedForward(nn.Module):
    """SwiGLU (Shazeer, *GLU Variants Improve Transformer*): w2(silu(w1 x) * w3 x)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.w1 = nn.Linear(config.dim, config.ffn_dim, bias=False)
        self.w3 = nn.Linear(config.dim, config.ffn_dim, bias=False)
        self.w2 = nn.Linear(config.ffn_dim, config.dim, bias=False)

    def forward(self, x_BSD: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x_BSD)) * self.w3(x_BSD))


class Block(Layer):
    """The layer of Llama and Qwen3: x + attention(norm(x)), then x + feed_forward(norm(x))."""

    TABLE = LAYER

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        self.attention_norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.attention = Attention(config)
        self.feed_forward_norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.feed_forward = FeedForward(config)

    def forward(
        self, x_BSD: Tensor, cos_BSE: Tensor, sin_BSE: Tensor, documents: Documents | None, attend: Attend
    ) -> Tensor:
        x_BSD = x_BSD + self.attention(self.attention_norm(x_BSD), cos_BSE, sin_BSE, documents, attend)
        return x_BSD + self.feed_forward(self.feed_forward_norm(x_BSD))

    @staticmethod
    def count(config: ModelConfig) -> int:
        return attention_count(config) + 3 * config.dim * config.ffn_dim + 2 * config.dim
