"""The layers of a decoder: what one is, and that of Llama and Qwen3.

Shapes: B sequences, S tokens, D model dim, H query heads, K key/value heads, E head dim, F feed-forward dim.
"""

import math
from collections.abc import Callable, Mapping
from typing import ClassVar

from torch import Tensor, nn

from rowwise.kernels.attention import Attend
from rowwise.kernels.glu import glu
from rowwise.kernels.look import Look
from rowwise.kernels.visible import Documents
from rowwise.parallel.activations.results import (
    INPUT,
    BackwardPiece,
    LayerResults,
    LayerWork,
    Make,
    Result,
    Sharing,
    make_plainly,
    plainly,
)
from rowwise.trainer.models.config import ModelConfig
from rowwise.trainer.models.norm import RMSNorm
from rowwise.trainer.models.rope import rotate
from rowwise.trainer.models.specs import LAYER, Entry


class Layer(nn.Module):
    """A layer of a decoder, made of its configuration: (B, S, D) to (B, S, D). `TABLE`: what its parameters are, by name.
    `making`: of the input of a forward, what that forward makes its results with (`parallel.activations.results`)."""

    TABLE: ClassVar[Mapping[str, Entry]]
    making: Callable[[Tensor], Make]

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.making = make_plainly

    @staticmethod
    def count(config: ModelConfig) -> int:
        """Counts its parameters, by arithmetic alone."""
        raise NotImplementedError

    @staticmethod
    def results(config: ModelConfig, sharing: Sharing) -> LayerResults | None:
        """Lists what it makes by name and its backward needs; None where it makes nothing by name."""
        return None

    @staticmethod
    def work(config: ModelConfig, width: int, gpu: bool) -> LayerWork | None:
        """Tells what its forward and its backward have at once, of numbers of `width` bytes; None: nobody knows, and no run of it is
        forecast."""
        return None


class Attention(nn.Module):
    """Causal grouped-query attention with rotary positions and optional RMS-normalised queries and keys."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        heads, kv_heads, size = config.heads, config.kv_heads, config.head_size
        self.head_size, self.qk_norm, self.looks = size, config.qk_norm, Look()
        self.wq = nn.Linear(config.dim, heads * size, bias=False)
        self.wk = nn.Linear(config.dim, kv_heads * size, bias=False)
        self.wv = nn.Linear(config.dim, kv_heads * size, bias=False)
        self.wo = nn.Linear(heads * size, config.dim, bias=False)
        self.q_norm = RMSNorm(size, eps=config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(size, eps=config.norm_eps) if config.qk_norm else nn.Identity()

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
        return rotate(self.q_norm(q_BSHE), cos_BSE, sin_BSE), rotate(self.k_norm(k_BSKE), cos_BSE, sin_BSE)

    def project_and_turn(self, x_BSD: Tensor, cos_BSE: Tensor, sin_BSE: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values as attention takes them."""
        q, k, v = self.project(x_BSD)
        return *self.turn(q, k, cos_BSE, sin_BSE), v

    def mix(self, y_BSHE: Tensor) -> Tensor:
        """All heads together, (B, S, D)."""
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
        return self.w2(glu(*self.widen(x_BSD)))

    def widen(self, x_BSD: Tensor) -> tuple[Tensor, Tensor]:
        """The gate and what it lets through, (B, S, F) each."""
        return self.w1(x_BSD), self.w3(x_BSD)


class Block(Layer):
    """The layer of Llama and Qwen3: h = x + attention(norm(x)), then h + feed_forward(norm(h)). Its results:

    n1 = norm(x)      qkv, qk: what attention takes      y: what it sees      h = x + wo(y)
    n2 = norm(h)      gate_up = w1(n2), w3(n2)           s = glu(gate_up)     out = h + w2(s)
    """

    TABLE = LAYER

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        self.attention_norm = RMSNorm(config.dim, eps=config.norm_eps)
        self.attention = Attention(config)
        self.feed_forward_norm = RMSNorm(config.dim, eps=config.norm_eps)
        self.feed_forward = FeedForward(config)

    def forward(
        self, x_BSD: Tensor, cos_BSE: Tensor, sin_BSE: Tensor, documents: Documents | None, attend: Attend
    ) -> Tensor:
        make = self.making(x_BSD)
        look, widen = self.attention.look, self.feed_forward.widen
        # One inside the other, so that without gradients each is freed when it has been used.
        seen = look(make("n1", self.attention_norm, x_BSD), cos_BSE, sin_BSE, documents, attend, make)
        h_BSD = make("h", self.add_seen, x_BSD, seen)
        del seen
        s_BSF = make("s", glu, *make("gate_up", widen, make("n2", self.feed_forward_norm, h_BSD)))
        return make("out", self.add_fed, h_BSD, s_BSF)

    def add_seen(self, x_BSD: Tensor, y_BSHE: Tensor) -> Tensor:
        """h, of what is seen."""
        return x_BSD + self.attention.mix(y_BSHE)

    def add_fed(self, h_BSD: Tensor, s_BSF: Tensor) -> Tensor:
        """What the layer gives."""
        return h_BSD + self.feed_forward.w2(s_BSF)

    @staticmethod
    def count(config: ModelConfig) -> int:
        return attention_count(config) + 3 * config.dim * config.ffn_dim + 2 * config.dim

    @staticmethod
    def results(config: ModelConfig, sharing: Sharing) -> LayerResults:
        dim, wide = config.dim, config.ffn_dim
        seen = config.heads * config.head_size
        return LayerResults(
            dim,
            (
                Result("n1", dim, NORM * dim, wide=1),
                *attention_results(config, sharing),
                Result("h", dim, 2 * seen * dim + dim, dear=True, of=(INPUT, "y")),
                Result("n2", dim, NORM * dim, wide=1, of=("h",)),
                Result("gate_up", 2 * wide, 4 * dim * wide, dear=True, tensors=2, of=("n2",)),
                Result("s", wide, GATE * wide, of=("gate_up",)),
            ),
        )

    @staticmethod
    def work(config: ModelConfig, width: int, gpu: bool) -> LayerWork:
        """A `gpu` makes the gradient of a norm in one operator, and adds the gradients of queries up in float32."""
        c, w = width, max(4, width)
        d, f, q, k = (
            n * c
            for n in (config.dim, config.ffn_dim, config.heads * config.head_size, config.kv_heads * config.head_size)
        )
        # Of a norm: x / r, the gradient, its product with the weight, one more product.
        norm = d if gpu else (3 if c == w else 4) * config.dim * w
        turned = max(3 * q, 0 if gpu or not config.qk_norm else 4 * q // c * w)
        sums = q // c * w if gpu and c < w else 0
        looked, turned_of = ("y", "qkv", *(("qk",) if config.qk_norm else ())), ("qkv",) if config.qk_norm else ()
        backward = (
            BackwardPiece(("s",), d + f, 0, d, f, ("s",)),
            BackwardPiece(("gate_up",), d + 3 * f, 1, f, 2 * f),
            BackwardPiece(("gate_up",), d + 3 * f, 1, f, f),
            BackwardPiece(("n2",), max(2 * d + 2 * f, 3 * d + f), 1, 0, 2 * d, ("n2",)),
            BackwardPiece(("h",), 2 * d + norm, 3, d, d + norm),
            BackwardPiece(("y",), d + q, 4, 0, q, ("y",)),
            BackwardPiece(looked, d + 2 * q + 2 * k + sums, 5, k, 2 * q + k + sums),
            BackwardPiece(turned_of, d + q + 2 * k + turned, 5, q + k, turned),
            BackwardPiece(("n1",), 3 * d + q + 2 * k, 5, 0, 2 * d, ("n1",)),
            BackwardPiece((INPUT,), 2 * d + norm, 10, 0, d + norm),
        )
        return LayerWork(max(f, 2 * d), 2 * d + max(3 * f, 2 * d + f), backward)


# Operations a number of what is elementwise: a norm's square, sum, and two products; RoPE's two products and sum; a gate's
# exponential, sum, quotient and two products.
NORM, TURN, GATE = 4, 3, 5


def attention_results(config: ModelConfig, sharing: Sharing) -> tuple[Result, ...]:
    """What `Attention.look` makes. Where ranks share sequences, attention keeps what messages brought it: heads after an
    all-to-all, and keys and values as one block round a ring; with Ulysses it gives its own output back in another order."""
    size, normed = config.head_size, config.qk_norm
    q, k = config.heads * size, config.kv_heads * size
    products, turning = 2 * config.dim * (q + 2 * k), (TURN + NORM * normed) * (q + k)
    brought = 2 * math.lcm(config.kv_heads, sharing.ulysses) * size  # keys and values
    # Queries, and keys with values, as attention takes them, which its backward needs as they are.
    q_kept = 0 if sharing.ulysses > 1 else q
    k_kept, v_kept = (0, 0) if sharing.communicates else (k, k)
    made = (
        (
            Result("qkv", q + k + v_kept, products, dear=True, heads=size, of=("n1",)),
            Result("qk", q_kept + k_kept, turning, wide=config.heads + config.kv_heads, heads=size, of=("qkv",)),
        )
        if normed
        else (Result("qkv", q_kept + k_kept + v_kept, products + turning, dear=True, heads=size, of=("n1",)),)
    )
    looks_at = tuple(result.name for result in made)
    if not sharing.communicates:
        return *made, Result("y", q, 0, pairs=4 * q, wide=config.heads, dear=True, heads=size, of=looks_at)
    fixed = brought + q + (2 * q if sharing.ulysses > 1 else 0)
    return *made, Result("y", 0, 0, pairs=4 * q, wide=config.heads, fixed=fixed, dear=True, heads=size, of=looks_at)
