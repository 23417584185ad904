"""What the parameters of a decoder are, as a table: role, what they begin as, and the name of each in a folder of Hugging Face, by
Llama's names (those of other families: `families.table`), where those of layer n begin with `model.layers.n.`

Initialisation: every matrix is normal with standard deviation `init_std`; those that write into the residual stream are
smaller by sqrt(2 layers), so that its variance does not grow with depth (Radford et al., *GPT-2*). Norms multiply by 1, and what
they and biases add is 0. A stable embedding is uniform in +-sqrt(6 / (vocab_size + dim)) (Glorot & Bengio).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch

from rowwise.conf.refusal import Refusal, Refusals
from rowwise.kernels.spec import Constant, Normal, ParameterSpec, Role, Uniform
from rowwise.optim.build import assigned
from rowwise.trainer.models.config import ModelConfig, plain_of
from rowwise.trainer.models.families.keys import family_of
from rowwise.trainer.models.families.table import FAMILIES

Begins = Literal["normal", "residual", "embedding", "ones", "zeros"]


@dataclass(frozen=True)
class Entry:
    """One parameter, or one of every layer; `begins`: which of the initialisations above."""

    role: Role
    begins: Begins
    theirs: str | None


EMBEDDING = "embed.weight"
FIRST = {
    EMBEDDING: Entry("embedding", "embedding", "model.embed_tokens.weight"),
    "embed.norm.weight": Entry("vector", "ones", None),
    "embed.norm.bias": Entry("vector", "zeros", None),
}
LAYER = {
    "attention_norm.weight": Entry("vector", "ones", "input_layernorm.weight"),
    "attention.wq.weight": Entry("hidden", "normal", "self_attn.q_proj.weight"),
    "attention.wq.bias": Entry("vector", "zeros", "self_attn.q_proj.bias"),
    "attention.wk.weight": Entry("hidden", "normal", "self_attn.k_proj.weight"),
    "attention.wk.bias": Entry("vector", "zeros", "self_attn.k_proj.bias"),
    "attention.wv.weight": Entry("hidden", "normal", "self_attn.v_proj.weight"),
    "attention.wv.bias": Entry("vector", "zeros", "self_attn.v_proj.bias"),
    "attention.wo.weight": Entry("hidden", "residual", "self_attn.o_proj.weight"),
    "attention.wo.bias": Entry("vector", "zeros", "self_attn.o_proj.bias"),
    "attention.q_norm.weight": Entry("vector", "ones", "self_attn.q_norm.weight"),
    "attention.k_norm.weight": Entry("vector", "ones", "self_attn.k_norm.weight"),
    "attention_post_norm.weight": Entry("vector", "ones", None),
    "feed_forward_norm.weight": Entry("vector", "ones", "post_attention_layernorm.weight"),
    "feed_forward.w1.weight": Entry("hidden", "normal", "mlp.gate_proj.weight"),
    "feed_forward.w1.bias": Entry("vector", "zeros", "mlp.gate_proj.bias"),
    "feed_forward.w3.weight": Entry("hidden", "normal", "mlp.up_proj.weight"),
    "feed_forward.w3.bias": Entry("vector", "zeros", "mlp.up_proj.bias"),
    "feed_forward.w2.weight": Entry("hidden", "residual", "mlp.down_proj.weight"),
    "feed_forward.w2.bias": Entry("vector", "zeros", "mlp.down_proj.bias"),
    "feed_forward_post_norm.weight": Entry("vector", "ones", None),
}
TIED = "lm_head.weight"  # which a folder may hold beside the embedding that it is
HEAD = "head.weight"
LAST = {
    "norm.weight": Entry("vector", "ones", "model.norm.weight"),
    HEAD: Entry("head", "normal", TIED),
}
STABLE_EMBEDDING: Refusals = (
    Refusal(
        ("model.stable_embedding", "optim.assign"),
        lambda run: run.model.stable_embedding and assigned(EMBEDDING, run.optim).endswith("8bit"),
        lambda run: (
            "model.stable_embedding=true keeps the embedding's states in 32 bits, and optim.assign gives it "
            f"{assigned(EMBEDDING, run.optim)}; give it {assigned(EMBEDDING, run.optim).removesuffix('8bit')} or own, or "
            "model.stable_embedding=false"
        ),
    ),
)


def decoder_specs(
    config: ModelConfig, table: Mapping[str, Entry], shapes: dict[str, torch.Size]
) -> dict[str, ParameterSpec]:
    """Makes the table of a decoder, by name and in order. `table`: of its layers. `shapes`: of the parameters of one that has
    a single layer."""
    begins = _initialisations(config)

    def some(table: Mapping[str, Entry], path: str = "") -> dict[str, ParameterSpec]:
        return {
            name: ParameterSpec(shapes[path + name], entry.role, begins[entry.begins], theirs=entry.theirs)
            for name, entry in table.items()
            if path + name in shapes
        }

    first, layer, last = some(FIRST), some(table, "blocks.0."), some(LAST)
    told = {*first, *(f"blocks.0.{name}" for name in layer), *last}
    if missing := shapes.keys() - told:
        raise ValueError(f"the table of specs lacks {', '.join(sorted(missing))}; say there what it is")
    if config.tie_embeddings:
        first[EMBEDDING] = replace(first[EMBEDDING], copies=(TIED,))
    layer = in_family(layer, config)
    layers = {
        f"blocks.{n}.{name}": replace(spec, theirs=spec.theirs and f"model.layers.{n}.{spec.theirs}")
        for n in range(config.layers)
        for name, spec in layer.items()
    }
    return first | layers | last


def in_family(layer: dict[str, ParameterSpec], config: ModelConfig) -> dict[str, ParameterSpec]:
    """Gives the specs of a layer the names of the family that the model is of; none where it is of none."""
    if all(spec.theirs is None for spec in layer.values()):
        return layer
    try:
        family = FAMILIES[family_of(plain_of(config) | {"stable_embedding": False})]
    except ValueError:
        return {name: replace(spec, theirs=None) for name, spec in layer.items()}
    named = {name: replace(spec, theirs=family.names.get(name, spec.theirs)) for name, spec in layer.items()}
    for theirs, parts in family.fused.items():
        rows = [layer[name].shape[0] for name in parts]
        for n, name in enumerate(parts):
            named[name] = replace(named[name], theirs=theirs, their_row=sum(rows[:n]), their_rows=sum(rows))
    return named


def _initialisations(config: ModelConfig) -> dict[Begins, Normal | Uniform | Constant]:
    normal = Normal(config.init_std)
    return {
        "normal": normal,
        "residual": Normal(config.init_std / math.sqrt(2 * config.layers)),
        "embedding": Uniform(math.sqrt(6 / (config.vocab_size + config.dim))) if config.stable_embedding else normal,
        "ones": Constant(1.0 - config.norm_offset),
        "zeros": Constant(0.0),
    }
