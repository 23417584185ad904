"""A decoder: an embedding, layers, a norm, a head, and the loss of it, whole or a stage of a pipeline; and what is counted of it.

Of what it is made a `Model` says: `Families` by `model.block`, or a user's own by `model.own`.
Shapes: B sequences, S tokens, D model dim, V vocabulary.
"""

import functools
from dataclasses import replace

import torch
from torch import Tensor, nn

from rowwise.kernels.attention import Attend, causal_attention
from rowwise.kernels.cross_entropy import Loss
from rowwise.kernels.spec import ParameterSpec, Specs
from rowwise.kernels.visible import Documents
from rowwise.parallel.activations.results import LayerResults, LayerWork, Sharing
from rowwise.trainer.models.blocks import OF_A_BLOCK
from rowwise.trainer.models.code import telling
from rowwise.trainer.models.config import ModelConfig
from rowwise.trainer.models.ends import Head, Target, apply_head, loss_of_head
from rowwise.trainer.models.form import check_form
from rowwise.trainer.models.made import BLOCKS, form_of, made_of, sees
from rowwise.trainer.models.own import LARGEST_CALLED, check_keys, check_modules, check_parts, check_sight, own_specs
from rowwise.trainer.models.specs import EMBEDDING, HEAD

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
    if config.own is not None:
        check_keys(made_of(config), config)
    if sees(config) == "attend":
        _check_heads(config)
    if config.own is None:
        check_form(config)
    parameters, _ = parameter_count(config)
    if parameters > MOST_PARAMETERS:
        raise ValueError(
            f"model.layers={config.layers} model.dim={config.dim} model.ffn_dim={config.ffn_dim} model.vocab_size="
            f"{config.vocab_size}: {parameters:,} parameters, {4 * parameters / 1e12:,.0f} TB in 32 bits; at most "
            f"{MOST_PARAMETERS:,} are possible; give a smaller model"
        )
    if config.own is not None:
        _check_calls(config)


@functools.cache
def _check_calls(config: ModelConfig) -> None:
    """Refuses a model of one's own whose parts do not do what the protocol says."""
    made, specs = made_of(config), parameter_specs(config)
    with torch.device("cpu" if parameter_count(config)[0] <= LARGEST_CALLED else "meta"):
        whole = Decoder(config)
    with torch.device("cpu"):  # whoever asks may be making a model on another
        check_parts(made, whole)
        check_sight(made, whole, specs)


def _check_heads(config: ModelConfig) -> None:
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
        self.layers = range(config.layers) if layers is None else layers
        self.config, self.attend, self.fused_loss, self.made = config, attend, fused_loss, made_of(config)
        first, last = self.layers.start == 0, self.layers.stop == config.layers
        self.embed = self.made.embed() if first else None
        self.blocks = nn.ModuleDict({str(layer): self.made.block(layer) for layer in self.layers})
        self.norm = self.made.norm() if last else None
        self.head: nn.Module | None = None
        if last and not config.tie_embeddings:
            self.head = self.made.head(fused_loss)
        elif last and not first:
            self.head = Head(config.dim, config.vocab_size, fused_loss, form_of(config))

    @property
    def table(self) -> Tensor | None:
        """The matrix of the embedding, where this stage has it."""
        weight = None if self.embed is None else self.embed.weight
        assert weight is None or isinstance(weight, Tensor)
        return weight

    @property
    def tied_copy(self) -> Tensor | None:
        """The copy of another stage's embedding that this one has for a head."""
        if not self.config.tie_embeddings or self.head is None:
            return None
        assert isinstance(self.head, Head)
        return self.head.weight

    def forward(
        self, x: Tensor, positions_BS: Tensor, documents: Documents | None = None, target: Target | None = None
    ) -> Tensor | Loss:
        """Takes tokens (B, S), or what the stage before gave (B, S, D), to what the next one takes, or to logits (B, S, V), or with
        a target to the loss. `positions` count from 0 inside a document; with `documents` a token attends only inside its own."""
        x_BSD = x if self.embed is None else self.made.embedded(self.embed, x, positions_BS)
        beside = self.made.beside(self.layers, x_BSD, positions_BS)
        for block, given in zip(self.blocks.values(), beside, strict=True):
            x_BSD = block(x_BSD, *given, documents, self.attend)
        if self.norm is None:
            return x_BSD
        x_BSD = self.norm(x_BSD)
        if self.head is not None:
            return loss_of_head(self.head, x_BSD, target)
        assert self.table is not None
        return apply_head(x_BSD, self.table, target, self.fused_loss, form_of(self.config))

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


def on_meta(config: ModelConfig) -> Decoder:
    """Builds a whole model on the meta device."""
    with torch.device("meta"):
        return Decoder(config)


@functools.cache
def parameter_specs(config: ModelConfig) -> dict[str, ParameterSpec]:
    """Gives the spec of every parameter, by name and in order. Raises ValueError for a model of one's own that does not keep to the
    protocol."""
    made = made_of(config)
    if config.own is None:
        return dict(made.specs())
    with telling(config.own, "making its parts"):
        whole = on_meta(config)
    check_modules(made, whole)
    return own_specs(made, whole)


def stage_parts(config: ModelConfig, layers: range) -> tuple[list[Specs], Specs]:
    """Reads what `Decoder.parts` of these layers hold, and what they leave of the decoder, in specs: nothing is built."""
    by_module, tied = _specs_by_module(config), config.tie_embeddings
    first, last = layers.start == 0, layers.stop == config.layers
    before = by_module.get("embed", {}) if first else {}
    after = by_module.get("norm", {}) | by_module.get("head", {}) if last else {}
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
    """(all parameters, those of a matrix that multiplies every token), by arithmetic alone but of a model of one's own."""
    if config.own is not None:
        specs = parameter_specs(config).values()
        once = sum(spec.shape.numel() for spec in specs if spec.role in ("hidden", "head"))
        looked_up = config.vocab_size * config.dim if config.tie_embeddings else 0
        return sum(spec.shape.numel() for spec in specs), once + looked_up
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
    attention = config.heads * config.head_size if sees(config) == "attend" else 0
    return 6 * multiplying * tokens + 12 * config.layers * attention * pairs


def layer_flops(config: ModelConfig, seq_len: int) -> tuple[float, float, float]:
    """Forward operations per token of (what comes before the layers, one layer, what comes after): 2 per weight of a
    matrix, and attention as in `flops_per_token`. A look-up costs none."""
    layers = 1 if config.own is None else config.layers
    some = parameter_specs(replace(config, layers=layers)).values()
    layer = sum(spec.shape.numel() for spec in some if spec.role == "hidden") / layers
    attention = 4 * config.heads * config.head_size * config.seen(seq_len) if sees(config) == "attend" else 0.0
    return 0.0, 2.0 * layer + attention, 2.0 * config.vocab_size * config.dim


def layer_results(config: ModelConfig, sharing: Sharing) -> LayerResults | None:
    """Lists what a layer of a model makes by name; None: nothing, as layers of one's own."""
    return BLOCKS[config.block].results(config, sharing) if config.own is None else None


def layer_work(config: ModelConfig, width: int, gpu: bool) -> LayerWork | None:
    """Tells what a layer's forward and backward have at once (`Layer.work`); None: nobody knows, as of layers of one's own."""
    return BLOCKS[config.block].work(config, width, gpu) if config.own is None else None
