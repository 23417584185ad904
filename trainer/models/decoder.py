"""A decoder-only transformer: an embedding, layers of one kind, a norm, a head, and the loss of it.

Shapes: B sequences, S tokens, D model dim, E head dim, V vocabulary.
"""

import functools
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rowwise.kernels.attention import Attend, causal_attention
from rowwise.kernels.cross_entropy import Loss, cross_entropy, linear_cross_entropy
from rowwise.kernels.logit_form import AS_THEY_ARE, LogitForm
from rowwise.kernels.spec import ParameterSpec, Specs
from rowwise.kernels.visible import Documents
from rowwise.kernels.wide import wide, wide_dtype
from rowwise.trainer.models.blocks import OF_A_BLOCK, Block, Layer
from rowwise.trainer.models.config import ModelConfig
from rowwise.trainer.models.form import check_form
from rowwise.trainer.models.norm import norm_of
from rowwise.trainer.models.rope import rope_tables
from rowwise.trainer.models.specs import EMBEDDING, HEAD, decoder_specs

BLOCKS: dict[str, type[Layer]] = {"llama": Block}  # by `model.block`

# Far beyond every model there is, and small enough that what loops over layers or heads ends at once.
LARGEST = {
    "layers": 10_000,
    "dim": 1 << 20,
    "heads": 1 << 16,
    "kv_heads": 1 << 16,
    "head_dim": 1 << 16,
    "ffn_dim": 1 << 24,
    "vocab_size": 1 << 28,
}
MOST_PARAMETERS = 10**13


def check_model(config: ModelConfig) -> None:
    """Refuses shapes that are no decoder, and sizes that no machine holds: by arithmetic. Raises ValueError."""
    if config.block not in BLOCKS:
        raise ValueError(f"model.block={config.block}: possible are {', '.join(BLOCKS)}")
    if config.block != "llama" and config.init_from is not None:
        raise ValueError(
            f"model.init_from={config.init_from} with model.block={config.block}: folders hold layers like Llama's; give "
            "model.block=llama, or model.init_from=null"
        )
    for key in sorted(OF_A_BLOCK - BLOCKS[config.block].READS):
        if (value := getattr(config, key)) != getattr(ModelConfig, key):
            raise ValueError(
                f"model.{key}={value} with model.block={config.block}: its layers have {getattr(ModelConfig, key)}; leave it out, or "
                "give model.block=llama"
            )
    for key, most in LARGEST.items():
        size = getattr(config, key)
        if size is not None and not 1 <= size <= most:
            raise ValueError(f"model.{key}={size}: it is at least 1, and at most {most:,}")
    if config.head_dim is None and config.dim % config.heads:
        raise ValueError(
            f"model.dim={config.dim} is not divisible by model.heads={config.heads}; "
            f"give a multiple of {config.heads}, or model.head_dim"
        )
    if config.heads % config.kv_heads:
        raise ValueError(
            f"model.heads={config.heads} is not divisible by model.kv_heads={config.kv_heads}; "
            f"possible for kv_heads are {[k for k in range(1, config.heads + 1) if config.heads % k == 0]}"
        )
    check_form(config)
    parameters, _ = parameter_count(config)
    if parameters > MOST_PARAMETERS:
        raise ValueError(
            f"model.layers={config.layers} model.dim={config.dim} model.ffn_dim={config.ffn_dim} model.vocab_size="
            f"{config.vocab_size}: {parameters:,} parameters, {4 * parameters / 1e12:,.0f} TB in 32 bits; at most "
            f"{MOST_PARAMETERS:,} are possible; give a smaller model"
        )


def scaled(x_BSD: Tensor, scale: float) -> Tensor:
    """Multiplies embeddings by a number that is rounded to their dtype first, as Gemma does."""
    return x_BSD if scale == 1 else x_BSD * torch.full((), scale, dtype=x_BSD.dtype, device=x_BSD.device)


class StableEmbedding(nn.Embedding):
    """An embedding with a layer norm after it, so that rare and frequent tokens come alike into the model and their
    gradients vary less (Dettmers et al., *8-bit Optimizers via Block-wise Quantization*, section 2.3).

    y = weight (e - mean(e)) / sqrt(var(e) + 1e-5) + bias, in float32 or wider, given in the embedding's own dtype. A head
    that is tied to it multiplies by the matrix alone.
    """

    def __init__(self, vocab_size: int, dim: int, _weight: Tensor | None = None):
        super().__init__(vocab_size, dim, _weight=_weight)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        e_BSD = super().forward(x)
        wide = wide_dtype(e_BSD.dtype)
        scale, shift = self.norm.weight.to(wide), self.norm.bias.to(wide)
        return F.layer_norm(e_BSD.to(wide), self.norm.normalized_shape, scale, shift, self.norm.eps).to(e_BSD.dtype)


@dataclass(frozen=True)
class Target:
    """What a model is to predict: `labels` (B, S), negative where there is none; `scale`: what its loss will be multiplied by in the
    backward, where that is known."""

    labels: Tensor
    scale: float | Tensor | None = None


class Head(nn.Linear):
    """Logits of `form`, or their loss; `fused`: that of the logits without the logits (`kernels.cross_entropy`)."""

    def __init__(self, dim: int, vocab_size: int, fused: bool = True, form: LogitForm = AS_THEY_ARE):
        super().__init__(dim, vocab_size, bias=False)
        self.fused, self.form = fused, form

    def forward(self, x: Tensor, target: Target | None = None) -> Tensor | Loss:  # type: ignore[override]
        return apply_head(x, self.weight, target, self.fused, self.form)


def apply_head(
    x_BSD: Tensor, w_VD: Tensor, target: Target | None, fused: bool, form: LogitForm = AS_THEY_ARE
) -> Tensor | Loss:
    """Gives the logits (B, S, V), or with a target the loss of them."""
    if target is None:
        products = F.linear(x_BSD, w_VD)
        return products if form == AS_THEY_ARE else form.of(wide(products)).to(products.dtype)
    x_ND, labels_N = x_BSD.flatten(0, 1), target.labels.flatten()
    if fused:
        return linear_cross_entropy(x_ND, w_VD, labels_N, target.scale, form)
    return cross_entropy(F.linear(x_ND, w_VD), labels_N, form)


class Decoder(nn.Module):
    """Tokens to logits or their loss, or a stage of that: the embedding before the first layer, `layers` of the model's, the norm and
    the head after the last. What is not in the stage is None.

    A tied head is the embedding's own matrix; in a stage that has no embedding it is a copy (`tied_copy`). `attend` is
    all that looks at other tokens. `fused_loss`: a loss is made without logits. `specs`: of every parameter of the whole model,
    where they are others than its configuration alone says.
    """

    specs: Specs | None = None

    def __init__(
        self,
        config: ModelConfig,
        layers: range | None = None,
        attend: Attend = causal_attention,
        fused_loss: bool = True,
    ):
        super().__init__()
        layers = range(config.layers) if layers is None else layers
        self.config, self.attend, self.fused_loss = config, attend, fused_loss
        first, last = layers.start == 0, layers.stop == config.layers
        embedding = StableEmbedding if config.stable_embedding else nn.Embedding
        self.embed = embedding(config.vocab_size, config.dim, _weight=_normal(config)) if first else None
        own = {layer: config.at(layer) for layer in layers}
        self.blocks = nn.ModuleDict({str(layer): BLOCKS[config.block](one) for layer, one in own.items()})
        self.ropes = [one.rope for one in own.values()]
        self.form = LogitForm(config.logit_scale, config.logit_cap)
        self.norm = norm_of(config) if last else None
        needs_head = last and not (first and config.tie_embeddings)
        self.head = Head(config.dim, config.vocab_size, fused_loss, self.form) if needs_head else None

    @property
    def tied_copy(self) -> Tensor | None:
        """The copy of another stage's embedding that this one has for a head."""
        return self.head.weight if self.config.tie_embeddings and self.head is not None else None

    def forward(
        self, x: Tensor, positions_BS: Tensor, documents: Documents | None = None, target: Target | None = None
    ) -> Tensor | Loss:
        """Takes tokens (B, S), or what the stage before gave (B, S, D), to what the next one takes, or to logits (B, S, V), or with
        a target to the loss. `positions` count from 0 inside a document; with `documents` a token attends only inside its own."""
        x_BSD = x if self.embed is None else scaled(self.embed(x), self.config.embed_scale)
        tables = {rope: rope_tables(positions_BS, rope, x_BSD.dtype) for rope in dict.fromkeys(self.ropes)}
        for block, rope in zip(self.blocks.values(), self.ropes, strict=True):
            x_BSD = block(x_BSD, *tables[rope], documents, self.attend)
        if self.norm is None:
            return x_BSD
        x_BSD = self.norm(x_BSD)
        if self.head is not None:
            return self.head(x_BSD, target)
        assert self.embed is not None
        return apply_head(x_BSD, self.embed.weight, target, self.fused_loss, self.form)

    def parameter_specs(self) -> Specs:
        """Gives the spec of every parameter of the whole model, whichever stage of it this is."""
        return parameter_specs(self.config) if self.specs is None else self.specs

    def parts(self) -> list[list[nn.Module]]:
        """What is used together, in forward order. An embedding that is used first and last belongs to the whole."""
        tied = self.embed is not None and self.norm is not None and self.head is None
        ends: list[list[nn.Module]] = [
            [] if tied or module is None else [module] for module in (self.embed, self.norm, self.head)
        ]
        blocks: list[list[nn.Module]] = [[block] for block in self.blocks.values()]
        return [part for part in [ends[0], *blocks, [] if tied else [*ends[1], *ends[2]]] if part]


def _normal(config: ModelConfig) -> Tensor:
    """What torch's embedding begins with. On the meta device it would import the compiler for that, which takes a second."""
    weight = torch.empty(config.vocab_size, config.dim)
    return weight if weight.is_meta else nn.init.normal_(weight)


@functools.cache
def parameter_specs(config: ModelConfig) -> dict[str, ParameterSpec]:
    """Gives the spec of every parameter, by name and in order, without building the model: layers are alike, and to build a
    thousand takes seconds."""
    with torch.device("meta"):
        one = Decoder(replace(config, layers=1))
    return decoder_specs(config, BLOCKS[config.block].TABLE, {name: p.shape for name, p in one.named_parameters()})


def stage_parts(config: ModelConfig, layers: range) -> tuple[list[Specs], Specs]:
    """Reads what `Decoder.parts` of these layers hold, and what they leave of the decoder, in specs: nothing is built."""
    by_module, tied = _specs_by_module(config), config.tie_embeddings
    first, last = layers.start == 0, layers.stop == config.layers
    before = by_module["embed"] if first else {}
    after = by_module["norm"] | by_module.get("head", {}) if last else {}
    if tied and last and not first:
        after = after | {HEAD: replace(by_module["embed"][EMBEDDING], role="head")}
    blocks: list[Specs] = [by_module[f"blocks.{layer}"] for layer in layers]
    if tied and first and last:
        return blocks, before | after
    return [part for part in [before, *blocks, after] if part], {}


@functools.cache
def _specs_by_module(config: ModelConfig) -> dict[str, dict[str, ParameterSpec]]:
    """`parameter_specs`, by what they are of: the embedding, a layer, the norm or the head."""
    found: dict[str, dict[str, ParameterSpec]] = {}
    for name, spec in parameter_specs(config).items():
        module, *path = name.split(".")
        found.setdefault(f"{module}.{path[0]}" if path[0].isdecimal() else module, {})[name] = spec
    return found


def parameter_count(config: ModelConfig) -> tuple[int, int]:
    """(all parameters, those of a matrix that multiplies every token), by arithmetic alone."""
    dim, table = config.dim, config.vocab_size * config.dim
    ends = table * (1 if config.tie_embeddings else 2) + dim + 2 * dim * config.stable_embedding
    total = config.layers * BLOCKS[config.block].count(config) + ends
    return total, total - (0 if config.tie_embeddings else table)


def flops_per_token(config: ModelConfig, seq_len: int) -> float:
    """`flops_of` a token of a sequence of `seq_len` that is one document."""
    return flops_of(config, 1, config.seen(seq_len))


def flops_of(config: ModelConfig, tokens: int, pairs: float) -> float:
    """Forward and backward: 6 per multiplying parameter and token, and 12 layers H E per pair of a token and one that a layer sees
    (Chowdhery et al., *PaLM*, appendix B, where every token is counted as seen by every other)."""
    _, multiplying = parameter_count(config)
    return 6 * multiplying * tokens + 12 * config.layers * config.heads * config.head_size * pairs


def layer_flops(config: ModelConfig, seq_len: int) -> tuple[float, float, float]:
    """Forward operations per token of (what comes before the layers, one layer, what comes after): 2 per weight of a
    matrix, and attention as in `flops_per_token`. A look-up costs none."""
    one = parameter_specs(replace(config, layers=1)).values()
    layer = sum(spec.shape.numel() for spec in one if spec.role == "hidden")
    attention = 4 * config.heads * config.head_size * config.seen(seq_len)
    return 0.0, 2.0 * layer + attention, 2.0 * config.vocab_size * config.dim
