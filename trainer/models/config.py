"""The shape of a model, as it is configured."""

from dataclasses import asdict, dataclass, field, replace
from math import lcm
from typing import Any, Literal

from rowwise.conf.option import Fixed, MayChange
from rowwise.kernels.visible import document_pairs
from rowwise.trainer.keys import as_lists
from rowwise.trainer.models.rope import Rope, RopeScaling, scaling_of

Norms = Literal["before", "after", "both"]
Activation = Literal["silu", "gelu_tanh"]


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a decoder, by default Llama's. `name`: of the model. `block`: what a layer is, by its name in
    `trainer/models/decoder.py`. `layers`: how many of them. `dim`: the width. `heads`: of queries. `kv_heads`: of keys and
    values; it divides `heads`. `head_dim`: the width of a head; null: dim / heads. `ffn_dim`: the inner width of the
    feed-forward. `vocab_size`: how many tokens there are. `tie_embeddings`: the head is the embedding's own matrix.
    `stable_embedding`: a layer norm after the embedding, which starts Xavier-uniform and keeps 32-bit states. `qk_norm`: queries
    and keys are RMS-normalised. `norm_eps`: of the norms. `rope_theta`: the base of the rotary frequencies. `rope_scaling`: how
    these are stretched, by `kind`: `llama3` with `factor`, `low_freq_factor`, `high_freq_factor` and `original_length`,
    `linear` with `factor`, `yarn` with `factor`, `original_length`, `attention_factor`, `beta_fast` and `beta_slow`, `longrope`
    with `short_factors`, `long_factors`, `original_length`, `factor` and `attention_factor`; null: not.
    `init_std`: of the initial matrices. `init_from`: a Hugging Face folder to start from, which says the model's shape and
    name; null: none. `qkv_bias`, `out_bias`, `mlp_bias`: queries, keys and values, attention's output, and the matrices
    of the feed-forward have biases. `qk_norm_over`: a norm of queries and keys is over a `head`, or over `all` of them (OLMo
    2). `norms`: `before` attention and the feed-forward (Llama), `after` them (OLMo 2) or `both` (Gemma). `norm_offset`: what
    is added to the weights of norms, 0, or 1 (Gemma). `activation`: of the gate of the feed-forward. `embed_scale`,
    `residual_scale`, `logit_scale`: what embeddings, what layers add, and logits are multiplied by. `attention_scale`: what
    products of queries and keys are; null: 1 / sqrt(head_dim). `attention_cap`, `logit_cap`: these, and logits, become cap x tanh(x
    / cap); null: they do not. `window`: how many tokens a token sees, itself among them; null: all before it.
    `window_layers`: in which layers it does, a list that goes round. `rope_layers`: which layers turn queries and keys at all,
    likewise (SmolLM3). `rope_local_theta`: the base in layers with a window, which are not stretched; null: `rope_theta`.
    `rope_long`: of a longrope, whether `long_factors` are used; null: where batch.seq_len is above `original_length`.
    `rope_share`: of each head, what turns (Phi-4-mini). `family`: as which of the families of docs/models.md it is read and
    written in folders of Hugging Face; null: the first that has its shape. `frozen_dtype`: in which hidden matrices that do not
    learn are kept; they multiply in the run's precision (`int8` and `nf4`: as codes, in blocks of 256 and of 64 in a row); null: in
    that in which those that learn are. `own`: a model of one's own code, FILE.py:NAME or package.module:NAME
    (docs/own-model.md), which the command line alone may name; null: this decoder. `settings`: the keys that such code has of
    its own, as a table."""

    name: MayChange[str] = "tiny"
    layers: Fixed[int] = 4
    dim: Fixed[int] = 256
    heads: Fixed[int] = 4
    kv_heads: Fixed[int] = 2
    head_dim: Fixed[int | None] = None
    ffn_dim: Fixed[int] = 704
    vocab_size: Fixed[int] = 256
    tie_embeddings: Fixed[bool] = False
    stable_embedding: Fixed[bool] = False
    qk_norm: Fixed[bool] = False
    norm_eps: Fixed[float] = 1e-5
    rope_theta: Fixed[float] = 10_000.0
    rope_scaling: Fixed[RopeScaling | None] = None
    init_std: MayChange[float] = 0.02
    init_from: MayChange[str | None] = None  # to null alone: `trainer.resume` refuses another source
    block: Fixed[str] = "llama"
    qkv_bias: Fixed[bool] = False
    out_bias: Fixed[bool] = False
    mlp_bias: Fixed[bool] = False
    qk_norm_over: Fixed[Literal["head", "all"]] = "head"
    norms: Fixed[Norms] = "before"
    norm_offset: Fixed[float] = 0.0
    activation: Fixed[Activation] = "silu"
    embed_scale: Fixed[float] = 1.0
    residual_scale: Fixed[float] = 1.0
    attention_scale: Fixed[float | None] = None
    attention_cap: Fixed[float | None] = None
    logit_scale: Fixed[float] = 1.0
    logit_cap: Fixed[float | None] = None
    window: Fixed[int | None] = None
    window_layers: Fixed[tuple[bool, ...]] = (True,)
    rope_layers: Fixed[tuple[bool, ...]] = (True,)
    rope_local_theta: Fixed[float | None] = None
    rope_long: MayChange[bool | None] = None
    rope_share: Fixed[float] = 1.0
    family: MayChange[str | None] = None
    frozen_dtype: Fixed[Literal["bf16", "int8", "nf4"] | None] = None
    own: MayChange[str | None] = None  # the code moves; `trainer.resume` looks at what it makes
    # A dict has no hash.
    settings: Fixed[dict[str, bool | int | float | str | None] | None] = field(default=None, hash=False)

    @property
    def code(self) -> str:
        """Names the key that says what its layers are."""
        return f"model.block={self.block}" if self.own is None else f"model.own={self.own}"

    @property
    def head_size(self) -> int:
        return self.head_dim if self.head_dim is not None else self.dim // self.heads

    @property
    def rope_size(self) -> int:
        """How many numbers of a head turn, where they do."""
        return int(self.head_size * self.rope_share)

    def pairs(self, length: int) -> float:
        """Counts the pairs of a token and one that it sees in a document of `length`, on the mean of the layers."""
        every = document_pairs(length)
        if self.window is None:
            return every
        rounds, rest = divmod(self.layers, len(self.window_layers))
        windowed = rounds * sum(self.window_layers) + sum(self.window_layers[:rest])
        return every - (every - document_pairs(length, self.window)) * windowed / self.layers

    def seen(self, length: int) -> float:
        """Counts the tokens that one sees in a document of `length`, on the mean of the tokens and of the layers."""
        return self.pairs(length) / length

    @property
    def period(self) -> int:
        """After how many layers kinds of layers come again."""
        return lcm(len(self.window_layers), len(self.rope_layers))

    def at(self, layer: int) -> "ModelConfig":
        """Gives the configuration of a model all of whose layers are as that one."""
        window = self.window if self.window_layers[layer % len(self.window_layers)] else None
        turns = self.rope_layers[layer % len(self.rope_layers)]
        return replace(self, window=window, window_layers=(True,), rope_layers=(turns,))

    @property
    def rope(self) -> Rope:
        """The rotary positions of a layer, where all are alike."""
        if not self.rope_layers[0]:
            return Rope(0, self.rope_theta)
        if self.window is not None and self.rope_local_theta is not None:
            return Rope(self.rope_size, self.rope_local_theta)
        return Rope(self.rope_size, self.rope_theta, self.rope_scaling, bool(self.rope_long))


def model_of(keys: dict[str, Any]) -> ModelConfig:
    """Returns the configuration of plain model.* keys. Raises KeyError or TypeError for those of another release."""
    plain: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in keys.items()}
    return ModelConfig(**plain | {"rope_scaling": scaling_of(keys.get("rope_scaling"))})


def plain_of(config: ModelConfig) -> dict[str, Any]:
    """Returns the plain model.* keys of a configuration: what JSON gives back."""
    plain: dict[str, Any] = as_lists(asdict(config))
    return plain
