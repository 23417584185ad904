"""The shape of a model, as it is configured."""

from dataclasses import dataclass
from typing import Any

from rowwise.conf.option import Fixed, MayChange
from rowwise.trainer.models.rope import RopeScaling


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a decoder. `name`: of the model. `block`: what a layer is, by its name in `trainer/models/decoder.py`.
    `layers`: how many of them. `dim`: the width. `heads`: of queries. `kv_heads`: of keys and values; it divides `heads`.
    `head_dim`: the width of a head; null: dim / heads. `ffn_dim`: the inner width of the feed-forward. `vocab_size`: how
    many tokens there are. `tie_embeddings`: the head is the embedding's own matrix. `stable_embedding`: a layer norm after
    the embedding, which starts Xavier-uniform and keeps 32-bit states. `qk_norm`: queries and keys are RMS-normalised.
    `norm_eps`: of the norms. `rope_theta`: the base of the rotary frequencies. `rope_scaling`: Llama 3's, with `factor`,
    `low_freq_factor`, `high_freq_factor` and `original_length`; null: none. `init_std`: of the initial matrices.
    `init_from`: a Hugging Face folder to start from, which says the model's shape and name; null: none."""

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

    @property
    def head_size(self) -> int:
        return self.head_dim if self.head_dim is not None else self.dim // self.heads


def model_of(keys: dict[str, Any]) -> ModelConfig:
    """Returns the configuration of plain model.* keys. Raises KeyError or TypeError for those of another release."""
    scaling = keys["rope_scaling"]
    return ModelConfig(**keys | {"rope_scaling": scaling and RopeScaling(**scaling)})
