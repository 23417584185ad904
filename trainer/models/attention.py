"""Attention as the layers of a decoder have it: projections, norms of queries and keys, rotary positions, and one look.

Shapes: B sequences, S tokens, D model dim, H query heads, K key/value heads, E head dim.
"""

import math

from torch import Tensor, nn

from rowwise.kernels.attention import Attend
from rowwise.kernels.look import Look
from rowwise.kernels.visible import Documents
from rowwise.parallel.activations.results import INPUT, Make, Result, Sharing, plainly
from rowwise.trainer.models.config import ModelConfig
from rowwise.trainer.models.norm import norm_of
from rowwise.trainer.models.rope import rotate

# Operations a number of what is elementwise: a norm's square, sum, and two products; RoPE's two products and sum; a gate's
# exponential, sum, quotient and two products.
NORM, TURN, GATE = 4, 3, 5


class Attention(nn.Module):
    """Causal grouped-query attention with rotary positions and optional RMS-normalised queries and keys, each head by itself or all
    together. `looks`: how its queries look at keys."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        heads, kv_heads, size = config.heads, config.kv_heads, config.head_size
        self.head_size, self.qk_norm, self.whole_norm = size, config.qk_norm, config.qk_norm_over == "all"
        self.looks = Look(config.attention_scale, config.window, config.attention_cap)
        self.wq = nn.Linear(config.dim, heads * size, bias=config.qkv_bias)
        self.wk = nn.Linear(config.dim, kv_heads * size, bias=config.qkv_bias)
        self.wv = nn.Linear(config.dim, kv_heads * size, bias=config.qkv_bias)
        self.wo = nn.Linear(heads * size, config.dim, bias=config.out_bias)
        q, k = (heads * size, kv_heads * size) if self.whole_norm else (size, size)
        self.q_norm = norm_of(config, q) if config.qk_norm else nn.Identity()
        self.k_norm = norm_of(config, k) if config.qk_norm else nn.Identity()

    def forward(
        self, x_BSD: Tensor, cos_BSE: Tensor, sin_BSE: Tensor, documents: Documents | None, attend: Attend
    ) -> Tensor:
        return self.mix(self.look(x_BSD, cos_BSE, sin_BSE, documents, attend))

    def look(
        self,
        x_BSD: Tensor,
        cos_BSE: Tensor,
        sin_BSE: Tensor,
        documents: Documents | None,
        attend: Attend,
        make: Make = plainly,
    ) -> Tensor:
        """What each head sees, (B, S, H, E)."""
        if self.qk_norm:  # whose backward needs what came before it too
            q, k, v = make("qkv", self.project, x_BSD)
            q, k = make("qk", self.turn, q, k, cos_BSE, sin_BSE)
        else:
            q, k, v = make("qkv", self.project_and_turn, x_BSD, cos_BSE, sin_BSE)
        return make("y", attend, q, k, v, documents, self.looks)

    def project(self, x_BSD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values before they are normed and turned."""
        q, k, v = (w(x_BSD).unflatten(-1, (-1, self.head_size)) for w in (self.wq, self.wk, self.wv))
        return q, k, v

    def turn(self, q_BSHE: Tensor, k_BSKE: Tensor, cos_BSE: Tensor, sin_BSE: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys at their positions."""
        if self.whole_norm:
            q_BSHE, k_BSKE = (
                norm(t.flatten(2)).view_as(t) for norm, t in ((self.q_norm, q_BSHE), (self.k_norm, k_BSKE))
            )
        else:
            q_BSHE, k_BSKE = self.q_norm(q_BSHE), self.k_norm(k_BSKE)
        return rotate(q_BSHE, cos_BSE, sin_BSE), rotate(k_BSKE, cos_BSE, sin_BSE)

    def project_and_turn(self, x_BSD: Tensor, cos_BSE: Tensor, sin_BSE: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values as attention takes them."""
        q, k, v = self.project(x_BSD)
        return *self.turn(q, k, cos_BSE, sin_BSE), v

    def mix(self, y_BSHE: Tensor) -> Tensor:
        """All heads together, (B, S, D)."""
        return self.wo(y_BSHE.flatten(2))


def attention_count(config: ModelConfig) -> int:
    """Counts the parameters of `Attention`, by arithmetic alone."""
    size, heads, kv_heads = config.head_size, config.heads, config.kv_heads
    normed = heads + kv_heads if config.qk_norm_over == "all" else 2
    biases = size * (heads + 2 * kv_heads) * config.qkv_bias + config.dim * config.out_bias
    return 2 * config.dim * size * (heads + kv_heads) + normed * size * config.qk_norm + biases


def attention_results(config: ModelConfig, sharing: Sharing) -> tuple[Result, ...]:
    """What `Attention.look` makes. Where ranks share sequences, attention keeps what messages brought it: heads after an
    all-to-all, and keys and values as one block round a ring; with Ulysses it gives its own output back in another order."""
    size, normed, given = config.head_size, config.qk_norm, "n1" if config.norms != "after" else INPUT
    norms = 2 if config.qk_norm_over == "all" else config.heads + config.kv_heads
    q, k = config.heads * size, config.kv_heads * size
    products, turning = 2 * config.dim * (q + 2 * k), (TURN + NORM * normed) * (q + k)
    brought = 2 * math.lcm(config.kv_heads, sharing.ulysses) * size  # keys and values
    # Queries, and keys with values, as attention takes them, which its backward needs as they are.
    q_kept = 0 if sharing.ulysses > 1 else q
    k_kept, v_kept = (0, 0) if sharing.communicates else (k, k)
    made = (
        (
            Result("qkv", q + k + v_kept, products, dear=True, heads=size, of=(given,)),
            Result("qk", q_kept + k_kept, turning, wide=norms, heads=size, of=("qkv",)),
        )
        if normed
        else (Result("qkv", q_kept + k_kept + v_kept, products + turning, dear=True, heads=size, of=(given,)),)
    )
    looks_at = tuple(result.name for result in made)
    if not sharing.communicates:
        return *made, Result("y", q, 0, pairs=4 * q, wide=config.heads, dear=True, heads=size, of=looks_at)
    fixed = brought + q + (2 * q if sharing.ulysses > 1 else 0)
    return *made, Result("y", 0, 0, pairs=4 * q, wide=config.heads, fixed=fixed, dear=True, heads=size, of=looks_at)
