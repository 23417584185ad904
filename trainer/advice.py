"""What a run may do but its user may not mean: a line each, said before the first step."""

import torch

from rowwise.kernels.dispatch import host_kernels
from rowwise.optim.lr_schedules import LrRange
from rowwise.optim.rates import SHARES, rate_of_size
from rowwise.trainer.activations import micro_batch_bytes
from rowwise.trainer.config import TrainConfig
from rowwise.trainer.data.mixture import MixedCorpus, sources_in_words
from rowwise.trainer.data.open import Data
from rowwise.trainer.models.config import ModelConfig
from rowwise.trainer.models.decoder import parameter_count
from rowwise.trainer.offloading import folder_speed, state_bytes_of

FAR = 5.0  # times the rate that the size asks for
SPARE = 4  # times the tokens of the data


def warnings(config: TrainConfig, data: Data, device: torch.device) -> list[str]:
    """Returns the lines that fit this run."""
    found = [
        *_rate(config),
        *_vocabulary(config, data),
        *_offloading(config, device),
        *_states(config, device),
        *_kernels(config),
    ]
    found += _dimensions(config.model) if device.type == "cuda" else []
    return [f"warning: {line}" for line in found]


def told_of_sources(config: TrainConfig, data: Data) -> list[str]:
    """Returns a line for each source of a mixture: how much of the run it is, and how often it is read."""
    if not isinstance(data.train, MixedCorpus):
        return []
    return sources_in_words(data.train, config.steps * config.batch.global_size, config.seed)


def _rate(config: TrainConfig) -> list[str]:
    """What was learned already may be changed with a small rate, and a range test is to find one."""
    rule, given = config.optim.name, config.optim.lr
    if rule not in SHARES or config.model.init_from is not None or isinstance(config.schedule, LrRange):
        return []
    parameters, _ = parameter_count(config.model)
    asked = rate_of_size(rule, parameters)
    if asked / FAR <= given <= asked * FAR:
        return []
    ratio = f"{given / asked:.3g} times" if given > asked else f"1/{asked / given:.3g} of"
    return [
        f"optim.lr={given:g} is {ratio} what {parameters:,} parameters ask for with optim={rule}, {asked:g}; optim.lr=null "
        "takes that"
    ]


def _vocabulary(config: TrainConfig, data: Data) -> list[str]:
    size, used = config.model.vocab_size, data.vocab_size
    if not used or size < SPARE * used:
        return []
    return [
        f"model.vocab_size={size} and data={config.data.name} has {used} tokens: the others are never seen, and their rows "
        f"cost memory and time; give data of the model's tokenizer, or model.vocab_size={used}"
    ]


def _offloading(config: TrainConfig, device: torch.device) -> list[str]:
    where = config.memory.offload_activations
    if where == "cpu" and device.type == "cpu":
        return [
            "memory.offload_activations=cpu on a CPU copies what layers keep and saves nothing: there is no other memory; give the "
            "path of a folder, or none"
        ]
    if where in ("none", "cpu") or not (needed := micro_batch_bytes(config)):
        return []
    speed = folder_speed(config, where)
    return [
        f"memory.offload_activations={where} takes {speed / 1e6:,.0f} MB/s: what a rank keeps of a micro-batch, "
        f"{needed / 1e6:,.1f} MB, leaves in {needed / speed:.3g} s, and comes back beside the backward"
    ]


def _states(config: TrainConfig, device: torch.device) -> list[str]:
    where = config.memory.offload_states
    if where == "cpu" and device.type == "cpu":
        return [
            "memory.offload_states=cpu on a CPU saves nothing: there is no other memory; give the path of a folder, or none"
        ]
    if where in ("none", "cpu"):
        return []
    size, speed = state_bytes_of(config), folder_speed(config, where)
    return [
        f"memory.offload_states={where} takes {speed / 1e6:,.0f} MB/s: the optimizer states of a rank, {size / 1e6:,.1f} MB, are read "
        f"and written in every step, the one in {size / speed:.3g} s and the other beside it"
    ]


def _kernels(config: TrainConfig) -> list[str]:
    """Where states wait, rules step on the host, most of them with kernels of ours; a step in 64 bits, and plain AdamW, has none."""
    where, optim = config.memory.offload_states, config.optim
    compiled = optim.name in ("lion", "lion8bit", "adamw8bit") or optim.param_dtype == "bf16"
    if where == "none" or not compiled or config.precision.name == "fp64" or not (reason := host_kernels()):
        return []
    return [
        f"memory.offload_states={where} steps on the host in plain torch, for {reason}; compiled, 8-bit states and 16-bit parameters "
        "take 1/3 to 1/10 of the time"
    ]


def _dimensions(model: ModelConfig) -> list[str]:
    return [
        f"{key}={size} is not divisible by 8: rows that do not begin at 16 bytes keep products off the tensor cores; give "
        f"{key}={-(-size // 8) * 8}"
        for key, size in matrix_sizes(model).items()
        if size % 8
    ]


def matrix_sizes(model: ModelConfig) -> dict[str, int]:
    """Returns the sizes of the model's matrices, by key."""
    sizes = {"dim": model.dim, "head_dim": model.head_size, "ffn_dim": model.ffn_dim, "vocab_size": model.vocab_size}
    return {f"model.{key}": size for key, size in sizes.items()}
