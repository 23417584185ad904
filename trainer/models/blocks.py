"""The layers of a decoder: what one is, and that of Llama and the families beside it.

Shapes: B sequences, S tokens, D model dim, H query heads, K key/value heads, E head dim, F feed-forward dim.
"""

from collections.abc import Callable, Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from rowwise.kernels.attention import Attend
from rowwise.kernels.glu import glu
from rowwise.kernels.visible import Documents
from rowwise.parallel.activations.results import LayerResults, LayerWork, Make, Sharing, make_plainly
from rowwise.trainer.models.attention import Attention, attention_count
from rowwise.trainer.models.block_work import block_results, block_work
from rowwise.trainer.models.config import ModelConfig
from rowwise.trainer.models.norm import norm_of
from rowwise.trainer.models.specs import LAYER, Entry

OF_A_BLOCK = frozenset(("norms", "activation", "mlp_bias", "residual_scale"))


class Layer(nn.Module):
    """A layer of a decoder, made of its configuration: (B, S, D) to (B, S, D). `TABLE`: what its parameters are, by name. `READS`:
    of the keys of `OF_A_BLOCK`, which it goes by; a model of it has the others as they are by default. `making`: of the input of a
    forward, what that forward makes its results with (`parallel.activations.results`)."""

    TABLE: ClassVar[Mapping[str, Entry]]
    READS: ClassVar[frozenset[str]] = frozenset()
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


class FeedForward(nn.Module):
    """A gated feed-forward (Shazeer, *GLU Variants Improve Transformer*): w2(activation(w1 x) * w3 x)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.activation = config.activation
        self.w1 = nn.Linear(config.dim, config.ffn_dim, bias=config.mlp_bias)
        self.w3 = nn.Linear(config.dim, config.ffn_dim, bias=config.mlp_bias)
        self.w2 = nn.Linear(config.ffn_dim, config.dim, bias=config.mlp_bias)

    def forward(self, x_BSD: Tensor) -> Tensor:
        return self.w2(self.gate(*self.widen(x_BSD)))

    def widen(self, x_BSD: Tensor) -> tuple[Tensor, Tensor]:
        """The gate and what it lets through, (B, S, F) each."""
        return self.w1(x_BSD), self.w3(x_BSD)

    def gate(self, gate_BSF: Tensor, up_BSF: Tensor) -> Tensor:
        """What the gate lets through of it."""
        return glu(gate_BSF, up_BSF, self.activation)


class Block(Layer):
    """The layer of Llama: h = x + attention(norm(x)), then h + feed_forward(norm(h)); with norms after these, or before and after
    (`model.norms`): x + norm(attention(x)), x + norm(attention(norm(x))). What is added may be scaled. Its results:

    n1 = norm(x)      qkv, qk: what attention takes      y: what it sees      h = x + wo(y), or a = wo(y), h = x + norm(a)
    n2 = norm(h)      gate_up = w1(n2), w3(n2)           s = glu(gate_up)     out = h + w2(s), or f = w2(s), out = h + norm(f)
    """

    TABLE = LAYER
    READS = OF_A_BLOCK

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        before, after, self.scale = config.norms != "after", config.norms != "before", config.residual_scale
        self.attention_norm = norm_of(config) if before else None
        self.attention = Attention(config)
        self.attention_post_norm = norm_of(config) if after else None
        self.feed_forward_norm = norm_of(config) if before else None
        self.feed_forward = FeedForward(config)
        self.feed_forward_post_norm = norm_of(config) if after else None

    def forward(
        self, x_BSD: Tensor, cos_BSE: Tensor, sin_BSE: Tensor, documents: Documents | None, attend: Attend
    ) -> Tensor:
        make = self.making(x_BSD)
        look, feed = self.attention.look, self.feed_forward
        # One inside the other, so that without gradients each is freed when it has been used.
        seen = look(self.normed(make, "n1", x_BSD), cos_BSE, sin_BSE, documents, attend, make)
        if self.attention_post_norm is None:
            h_BSD = make("h", self.add_seen, x_BSD, seen)
        else:
            h_BSD = make("h", self.add_normed_seen, x_BSD, make("a", self.attention.mix, seen))
        del seen
        s_BSF = make("s", feed.gate, *make("gate_up", feed.widen, self.normed(make, "n2", h_BSD)))
        if self.feed_forward_post_norm is None:
            return make("out", self.add_fed, h_BSD, s_BSF)
        return make("out", self.add_normed_fed, h_BSD, make("f", feed.w2, s_BSF))

    def normed(self, make: Make, name: str, x_BSD: Tensor) -> Tensor:
        """What attention (n1) or the feed-forward (n2) is given."""
        norm = self.attention_norm if name == "n1" else self.feed_forward_norm
        return x_BSD if norm is None else make(name, norm, x_BSD)

    def add_seen(self, x_BSD: Tensor, y_BSHE: Tensor) -> Tensor:
        """h, of what is seen."""
        return torch.add(x_BSD, self.attention.mix(y_BSHE), alpha=self.scale)

    def add_normed_seen(self, x_BSD: Tensor, a_BSD: Tensor) -> Tensor:
        """h, of what attention gives."""
        assert self.attention_post_norm is not None
        return torch.add(x_BSD, self.attention_post_norm(a_BSD), alpha=self.scale)

    def add_fed(self, h_BSD: Tensor, s_BSF: Tensor) -> Tensor:
        """What the layer gives."""
        return torch.add(h_BSD, self.feed_forward.w2(s_BSF), alpha=self.scale)

    def add_normed_fed(self, h_BSD: Tensor, f_BSD: Tensor) -> Tensor:
        """What the layer gives, of what the feed-forward does."""
        assert self.feed_forward_post_norm is not None
        return torch.add(h_BSD, self.feed_forward_post_norm(f_BSD), alpha=self.scale)

    @staticmethod
    def count(config: ModelConfig) -> int:
        norms = (4 if config.norms == "both" else 2) * config.dim
        biases = (2 * config.ffn_dim + config.dim) * config.mlp_bias
        return attention_count(config) + 3 * config.dim * config.ffn_dim + norms + biases

    @staticmethod
    def results(config: ModelConfig, sharing: Sharing) -> LayerResults:
        return block_results(config, sharing)

    @staticmethod
    def work(config: ModelConfig, width: int, gpu: bool) -> LayerWork | None:
        return block_work(config, width, gpu)
