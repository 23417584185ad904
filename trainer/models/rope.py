"""Rotary position embedding (Su et al., *RoFormer*), in the half-rotated form of Llama, with Llama 3's scaling.

Pair i of a head of size E turns at theta_i = base^(-2i/E): position p rotates (x_i, x_(i + E/2)) by p theta_i.
"""

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3's stretch: wavelengths above `original_length / low_freq_factor` are `factor` times longer, those below
    `original_length / high_freq_factor` stay, and those between are mixed linearly in frequency."""

    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_length: int = 8192


class RopeConfig(Protocol):
    @property
    def rope_theta(self) -> float: ...
    @property
    def rope_scaling(self) -> RopeScaling | None: ...
    @property
    def head_size(self) -> int: ...


def rope_frequencies(config: RopeConfig, device: torch.device) -> Tensor:
    """Returns theta_i, scaled: float32 (E/2,)."""
    exponents = torch.arange(0, config.head_size, 2, dtype=torch.float32, device=device) / config.head_size
    frequencies = 1.0 / config.rope_theta**exponents
    return frequencies if config.rope_scaling is None else scale_frequencies(frequencies, config.rope_scaling)


def scale_frequencies(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    """Scales each frequency by its wavelength, as Llama 3 does."""
    turns = scaling.original_length * frequencies / (2 * math.pi)
    mix = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    mix = mix.clamp(0, 1)
    return (1 - mix) * frequencies / scaling.factor + mix * frequencies


def rope_tables(positions_BS: Tensor, config: RopeConfig, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Computes cos and sin of every position and pair, each pair twice: two (B, S, E), computed in at least float32."""
    angles_BSE = positions_BS.unsqueeze(-1).float() * rope_frequencies(config, positions_BS.device)
    angles_BSE = torch.cat((angles_BSE, angles_BSE), dim=-1)
    return angles_BSE.cos().to(dtype), angles_BSE.sin().to(dtype)


def rotate(x_BSHE: Tensor, cos_BSE: Tensor, sin_BSE: Tensor) -> Tensor:
    """Turns every pair of every head by its position's angle."""
    first, second = x_BSHE.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return x_BSHE * cos_BSE.unsqueeze(2) + turned * sin_BSE.unsqueeze(2)
