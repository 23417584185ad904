"""What is read out of a checkpoint of DeepSpeed, in whichever of its forms, before any number of it is asked for."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rowwise.parallel.precision import Fp16, LossScale, PrecisionConfig, initial_loss_scale
from rowwise.trainer.convert.pickles import DynamicScaler, Scaler

MASTER = "fp32"  # what DeepSpeed calls a parameter in full precision; its other states have the optimizer's names
Pieces = Mapping[str, list[Tensor]]  # state -> flat pieces of it, in order, mapped from the files


def key_of(name: str, state: str) -> str:
    """Names a state of a parameter of ours in a checkpoint of ours."""
    return f"model.{name}" if state == MASTER else f"optim.{name}.{state}"


@dataclass(frozen=True)
class Group:
    """A group of parameters, by their names, and its settings (`lr`, `betas`, ...)."""

    names: frozenset[str]
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class Counts:
    """`steps`: made, of which `skipped` overflowed. `updates`: that the optimizer counted. `samples`: read."""

    steps: int
    skipped: int
    updates: int
    samples: int


@dataclass(frozen=True)
class Foreign:
    """A checkpoint of DeepSpeed: the `place` that it was read from, parameters by their names in it, their logical shapes, and
    the settings of its script."""

    place: Path
    parameters: Mapping[str, Pieces]
    shapes: Mapping[str, torch.Size]
    groups: list[Group]
    counts: Counts
    scaler: Scaler | None
    clip_norm: float | None

    def numel(self, name: str, state: str) -> int:
        return sum(piece.numel() for piece in self.parameters[name][state])

    def whole(self, name: str, state: str) -> Tensor:
        """Returns a state of a parameter, flat: this one alone is in memory."""
        return torch.cat([piece.reshape(-1) for piece in self.parameters[name][state]])

    def loss_scale(self, precision: PrecisionConfig) -> LossScale:
        """Returns the scale that a run of ours goes on with. DeepSpeed doubles at every `scale_window`th good step after the first
        since an overflow; ours does so at the same ones where `precision.growth_every` is that."""
        scaler = self.scaler
        if not isinstance(precision, Fp16) or not isinstance(scaler, DynamicScaler):
            begins = initial_loss_scale(precision)
            return LossScale(begins.scale, 0, self.counts.skipped)
        with as_written_by_deepspeed(self.place):
            since = int(scaler.cur_iter) - int(scaler.last_overflow_iter) - 1
            good = max(0, since - 1) % int(scaler.scale_window)
            return LossScale(float(scaler.cur_scale), good, self.counts.skipped)


@contextmanager
def as_written_by_deepspeed(path: Path) -> Iterator[None]:
    """Raises ValueError, naming `path`, where what is read inside has not the form that DeepSpeed gives it."""
    try:
        yield
    except (KeyError, TypeError, AttributeError, IndexError, ValueError, ArithmeticError) as error:
        said = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{path} is not as DeepSpeed writes it ({said})") from None


def counts_of(model_states: Mapping[str, Any], updates: Any) -> Counts:
    """Reads how far a run of DeepSpeed came. `updates`: what its optimizer counted; None where it counts none."""
    steps, skipped = int(model_states["global_steps"]), int(model_states["skipped_steps"])
    samples = model_states.get("global_samples")
    if samples is None:
        raise KeyError("global_samples")
    counted = steps - skipped if updates is None else int(updates)
    if not (0 <= skipped <= steps and counted >= 0 and int(samples) >= 0):
        raise TypeError(f"{steps} steps, {skipped} skipped, {counted} updates, {samples} samples")
    return Counts(steps, skipped, counted, int(samples))
