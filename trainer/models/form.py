"""What the form of a decoder must be: the keys in which families differ, each by itself and beside the others."""

from dataclasses import replace

from rowwise.trainer.models.config import ModelConfig
from rowwise.trainer.models.families.table import FAMILIES
from rowwise.trainer.models.rope import LongRopeScaling

_ABOVE_0 = (
    "norm_eps", "rope_theta", "init_std", "rope_local_theta", "attention_scale", "attention_cap", "logit_cap", "embed_scale",
    "residual_scale", "logit_scale",
)  # fmt: skip
MOST_WINDOW = 1 << 30


def with_length(config: ModelConfig, seq_len: int) -> ModelConfig:
    """Returns the model of a run of sequences of `seq_len`, with which factors of a longrope these have. Raises ValueError where
    others were asked for."""
    if not isinstance(config.rope_scaling, LongRopeScaling):
        return config
    length = config.rope_scaling.original_length
    if config.rope_long not in (None, seq_len > length):
        raise ValueError(
            f"model.rope_long={config.rope_long} with batch.seq_len={seq_len} and model.rope_scaling.original_length={length}: as the "
            "model was made, its long factors are for sequences above that; leave model.rope_long out"
        )
    return replace(config, rope_long=seq_len > length)


def check_form(config: ModelConfig) -> None:
    """Refuses forms that are no decoder. Raises ValueError."""
    for key in _ABOVE_0:
        if (value := getattr(config, key)) is not None and not 0 < value < float("inf"):
            raise ValueError(f"model.{key}={value}: it is above 0")
    if config.norm_offset not in (0, 1):
        raise ValueError(f"model.norm_offset={config.norm_offset}: possible are 0, and 1, which Gemma adds to weights")
    if config.family is not None and config.family not in FAMILIES:
        raise ValueError(f"model.family={config.family}: possible are {', '.join(FAMILIES)}, or null")
    _check_layers(config)
    _check_rope(config)


def _check_layers(config: ModelConfig) -> None:
    for key in ("window_layers", "rope_layers"):
        if not 1 <= len(getattr(config, key)) <= config.layers:
            raise ValueError(
                f"model.{key} says it of {len(getattr(config, key))} layers, possible are 1 to {config.layers}"
            )
    if config.window is not None and not 1 <= config.window <= MOST_WINDOW:
        raise ValueError(f"model.window={config.window}: at least 1 token, itself, and at most {MOST_WINDOW:,}")
    for key in ("window_layers", "rope_local_theta"):
        if config.window is None and getattr(config, key) != getattr(ModelConfig, key):
            raise ValueError(f"model.{key}={getattr(config, key)} without a window; give model.window, or leave it out")
    if config.qk_norm_over == "all" and not config.qk_norm:
        raise ValueError(
            "model.qk_norm_over=all without norms of queries and keys; give model.qk_norm=true, or leave it out"
        )


def _check_rope(config: ModelConfig) -> None:
    if config.rope_size < 2 or config.rope_size % 2:
        what = "the head dim" if config.rope_share == 1 else f"model.rope_share={config.rope_share} of the head dim"
        raise ValueError(f"{what} is {config.rope_size}: RoPE turns pairs, so it must be even and above 0")
    scaling = config.rope_scaling
    if config.rope_long is not None and not isinstance(scaling, LongRopeScaling):
        raise ValueError(
            f"model.rope_long={config.rope_long} without a model.rope_scaling of kind longrope; leave it out"
        )
    if scaling is None:
        return
    scaling.check()
    if isinstance(scaling, LongRopeScaling) and 2 * len(scaling.short_factors) != config.rope_size:
        raise ValueError(
            f"model.rope_scaling has {len(scaling.short_factors)} factors, and {config.rope_size // 2} pairs of a head turn"
        )
