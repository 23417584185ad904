"""Rotary position embedding (Su et al., *RoFormer*), in the half-rotated form of Llama, and the ways to stretch it.

Pair i of the first E numbers of a head turns at theta_i = base^(-2i/E): position p rotates (x_i, x_(i + E/2)) by p theta_i. What
comes after these E stays as it is: all of a head where E is 0.
"""

import math
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from pydantic import Discriminator, Tag
from torch import Tensor


class OfLength:
    """A stretch that says how long sequences were before it."""

    factor: float
    original_length: int

    @property
    def longest(self) -> int:
        """How long the sequences are that it was made for; 0: it does not say."""
        return round(self.original_length * self.factor)


class Amplified(OfLength):
    """One that makes cos and sin larger too."""

    attention_factor: float

    @property
    def amplitude(self) -> float:
        return self.attention_factor


@dataclass(frozen=True)
class Llama3Scaling(OfLength):
    """Llama 3's stretch: wavelengths above `original_length / low_freq_factor` are `factor` times longer, those below
    `original_length / high_freq_factor` stay, and those between are mixed linearly in frequency."""

    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_length: int = 8192
    kind: Literal["llama3"] = "llama3"

    amplitude = 1.0  # of cos and sin

    def check(self) -> None:
        """Raises ValueError."""
        if not (self.factor >= 1 and 0 < self.low_freq_factor < self.high_freq_factor and self.original_length >= 1):
            raise ValueError("model.rope_scaling: factor is at least 1, and low_freq_factor below high_freq_factor")

    def stretched(self, frequencies: Tensor, rope: "Rope") -> Tensor:
        """Scales each frequency by its wavelength."""
        turns = self.original_length * frequencies / (2 * math.pi)
        mix = ((turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)).clamp(0, 1)
        return (1 - mix) * frequencies / self.factor + mix * frequencies


@dataclass(frozen=True)
class LinearScaling:
    """Every wavelength is `factor` times longer (Chen et al., *Extending Context Window via Positional Interpolation*)."""

    factor: float
    kind: Literal["linear"] = "linear"

    amplitude = 1.0
    longest = 0

    def check(self) -> None:
        """Raises ValueError."""
        if self.factor < 1:
            raise ValueError(f"model.rope_scaling: factor={self.factor}, and it is at least 1")

    def stretched(self, frequencies: Tensor, rope: "Rope") -> Tensor:
        """Divides each frequency."""
        return frequencies / self.factor


@dataclass(frozen=True)
class YarnScaling(Amplified):
    """YaRN (Peng et al., section 3.2): pairs that turn more than `beta_fast` times in `original_length` stay, those that turn less
    than `beta_slow` times are `factor` times longer, those between are mixed linearly in their number; cos and sin are multiplied by
    `attention_factor`, 0.1 ln(factor) + 1 there."""

    factor: float
    original_length: int
    attention_factor: float
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    kind: Literal["yarn"] = "yarn"

    def check(self) -> None:
        """Raises ValueError."""
        if not (self.factor >= 1 and 0 < self.beta_slow < self.beta_fast and self.original_length >= 1):
            raise ValueError("model.rope_scaling: factor is at least 1, and beta_slow below beta_fast")

    def stretched(self, frequencies: Tensor, rope: "Rope") -> Tensor:
        """Scales each frequency by how often its pair turns; the bounds are whole pairs."""
        pairs = len(frequencies)

        def pair_that_turns(times: float) -> float:
            return 2 * pairs * math.log(self.original_length / (2 * math.pi * times)) / (2 * math.log(rope.theta))

        first = max(math.floor(pair_that_turns(self.beta_fast)), 0)
        last = min(math.ceil(pair_that_turns(self.beta_slow)), 2 * pairs - 1)
        steps = torch.arange(pairs, dtype=torch.float32, device=frequencies.device)
        mix = ((steps - first) / max(last - first, 0.001)).clamp(0, 1)
        return frequencies / self.factor * mix + frequencies * (1 - mix)


@dataclass(frozen=True)
class LongRopeScaling(Amplified):
    """LongRoPE (Ding et al.), as Phi-3 has it: each wavelength is longer by a factor of its own, one of `short_factors` in sequences
    up to `original_length` and of `long_factors` in longer ones, up to `factor` times that, which a run says of all its sequences; cos
    and sin are multiplied by `attention_factor`."""

    short_factors: tuple[float, ...]
    long_factors: tuple[float, ...]
    original_length: int
    factor: float
    attention_factor: float
    kind: Literal["longrope"] = "longrope"

    def check(self) -> None:
        """Raises ValueError."""
        factors = (*self.short_factors, *self.long_factors)
        if len(self.short_factors) != len(self.long_factors) or min(factors, default=0) <= 0:
            raise ValueError("model.rope_scaling: short_factors and long_factors are as many, and each is above 0")

    def stretched(self, frequencies: Tensor, rope: "Rope") -> Tensor:
        """Multiplies each wavelength by its own factor, in which order its authors round."""
        factors = self.long_factors if rope.long else self.short_factors
        device = frequencies.device
        return 1.0 / (torch.tensor(factors, dtype=torch.float32, device=device) * _powers(rope, device))


def _kind(scaling: Any) -> str | None:
    """Of a tree or a scaling, None for what is neither; before there were kinds, all was Llama 3's."""
    return str(scaling.get("kind", "llama3")) if isinstance(scaling, dict) else getattr(scaling, "kind", None)


RopeScaling = Annotated[
    Annotated[Llama3Scaling, Tag("llama3")]
    | Annotated[LinearScaling, Tag("linear")]
    | Annotated[YarnScaling, Tag("yarn")]
    | Annotated[LongRopeScaling, Tag("longrope")],
    Discriminator(_kind),
]
_KINDS = {"llama3": Llama3Scaling, "linear": LinearScaling, "yarn": YarnScaling, "longrope": LongRopeScaling}


def scaling_of(tree: dict[str, Any] | None) -> RopeScaling | None:
    """Makes a scaling of its plain tree, whose lists are those of JSON. Raises KeyError or TypeError for that of another release."""
    if tree is None:
        return None
    plain = {key: tuple(value) if isinstance(value, list) else value for key, value in tree.items()}
    return _KINDS[tree.get("kind", "llama3")](**plain)


@dataclass(frozen=True)
class Rope:
    """The rotary positions of a layer: `size` numbers of each head turn, 0 for none; `theta`: the base; `long`: sequences are longer
    than the stretch's original length."""

    size: int
    theta: float
    scaling: RopeScaling | None = None
    long: bool = False


def _powers(rope: Rope, device: torch.device) -> Tensor:
    """Returns 1 / theta_i, not scaled: float32 (E/2,)."""
    return rope.theta ** (torch.arange(0, rope.size, 2, dtype=torch.float32, device=device) / max(rope.size, 1))


def rope_frequencies(rope: Rope, device: torch.device) -> Tensor:
    """Returns theta_i, scaled: float32 (E/2,)."""
    frequencies = 1.0 / _powers(rope, device)
    return frequencies if rope.scaling is None else rope.scaling.stretched(frequencies, rope)


def rope_tables(positions_BS: Tensor, rope: Rope, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Computes cos and sin of every position and pair, each pair twice: two (B, S, E), computed in at least float32."""
    angles_BSE = positions_BS.unsqueeze(-1).float() * rope_frequencies(rope, positions_BS.device)
    angles_BSE = torch.cat((angles_BSE, angles_BSE), dim=-1)
    cos_BSE, sin_BSE = angles_BSE.cos(), angles_BSE.sin()
    if rope.scaling is not None and rope.scaling.amplitude != 1:
        cos_BSE, sin_BSE = cos_BSE * rope.scaling.amplitude, sin_BSE * rope.scaling.amplitude
    return cos_BSE.to(dtype), sin_BSE.to(dtype)


def rotate(x_BSHE: Tensor, cos_BSE: Tensor, sin_BSE: Tensor) -> Tensor:
    """Turns every pair of every head by its position's angle; tables of fewer numbers than a head's turn its first ones."""
    if cos_BSE.size(-1) < x_BSHE.size(-1):
        if not cos_BSE.size(-1):
            return x_BSHE
        turning, still = x_BSHE.split([cos_BSE.size(-1), x_BSHE.size(-1) - cos_BSE.size(-1)], dim=-1)
        return torch.cat((rotate(turning, cos_BSE, sin_BSE), still), dim=-1)
    first, second = x_BSHE.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return x_BSHE * cos_BSE.unsqueeze(2) + turned * sin_BSE.unsqueeze(2)
