"""The exponential moving average of the weights.

    e = b e + (1 - b) w        after every update; e begins as w, the weights that the run begins or goes on with
    b = min(ema, (1 + n) / (10 + n))        with `warmup`: n moves were made before (TensorFlow's ExponentialMovingAverage)

Each rank has the average of its own rows and nothing crosses ranks. Bytes a parameter: 4, or 2 in bf16, which is rounded
stochastically: what a move adds, (1 - b)(w - e), is too small for it otherwise.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from rowwise.conf.option import MayChange
from rowwise.conf.refusal import Refusal, Refusals
from rowwise.kernels.philox import stream_key
from rowwise.kernels.portions import device_portions
from rowwise.kernels.rounding import round_bf16_
from rowwise.kernels.rows import local, row_offset
from rowwise.kernels.wide import wide_dtype
from rowwise.optim.rule import laid_like, row_length

PREFIX = "average."  # of its tensors in a checkpoint
STILL = ("none", "static", "nm")  # sparse methods under which the mean of weights is as sparse as they are


@dataclass(frozen=True)
class AverageConfig:
    """`ema`: how much of the exponential moving average of the weights each move keeps, such as 0.999; null: there is none. It
    is in the checkpoint; what is evaluated, sampled, generated and exported is the average. `every`: updates from one move to
    the next. `warmup`: keeps less at first, (1 + n) / (10 + n) after n moves. `dtype`: `fp32` is that, or 64 bits where
    parameters have them; `bf16` rounds stochastically. `offload`: `cpu` keeps it on the host, to which the weights go for every
    move."""

    ema: MayChange[float | None] = None
    every: MayChange[int] = 1
    warmup: MayChange[bool] = True
    dtype: MayChange[Literal["fp32", "bf16"]] = "fp32"
    offload: MayChange[Literal["none", "cpu"]] = "none"

    def kept(self, update: int) -> float:
        """Tells how much of itself the average keeps in the move after `update`, counted from 1."""
        assert self.ema is not None
        moves = update // self.every - 1
        return min(self.ema, (1 + moves) / (10 + moves)) if self.warmup else self.ema


_PLAIN = AverageConfig()


def _without_average(key: str) -> Refusal:
    return Refusal(
        (f"average.{key}", "average.ema"),
        lambda run: run.average.ema is None and getattr(run.average, key) != getattr(_PLAIN, key),
        f"average.{key}={{average.{key}}} with average.ema=null, which keeps no average; give average.ema=0.999, or leave it out",
    )


AVERAGES: Refusals = (
    Refusal(
        ("average.ema",),
        lambda run: run.average.ema is not None and not 0 < run.average.ema < 1,
        "average.ema={average.ema}: how much of the average a move keeps, between 0 and 1, such as 0.999; null is none",
    ),
    Refusal(
        ("average.every",),
        lambda run: run.average.every < 1,
        "average.every={average.every}: updates from one move of the average to the next, at least 1",
    ),
    *map(_without_average, ("every", "warmup", "dtype", "offload")),
    Refusal(
        ("average.ema", "sparsity.name"),
        lambda run: run.average.ema is not None and run.sparsity.name not in STILL,
        "average.ema={average.ema} with sparsity={sparsity.name}: its masks move, and a mean of weights has the non-zeros of many; "
        f"possible are {', '.join(f'sparsity={name}' for name in STILL)}, or average.ema=null",
    ),
)


class Average:
    """The average of those parameters of `model` that learn, on this rank; it begins as they are. `seed`: of its rounding."""

    def __init__(self, model: nn.Module, config: AverageConfig, seed: int):
        self._config, self._seed = config, seed
        self._weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._means = {name: _room(p, config) for name, p in self._weights.items()}
        self.begin()

    def named_state(self) -> dict[str, Tensor]:
        """Returns its tensors by their names in a checkpoint, each split as its parameter is."""
        return {f"{PREFIX}{name}": mean for name, mean in self._means.items()}

    @torch.no_grad()
    def begin(self) -> None:
        """Begins anew, with the weights as they are."""
        for _, p, mean in self._rows():
            mean.copy_(p)

    @torch.no_grad()
    def move(self, update: int) -> None:
        """Takes in the weights after `update`, counted from 1, where it is one of those that it moves after."""
        if update % self._config.every:
            return
        share = 1 - self._config.kept(update)
        for name, p, mean in self._rows():
            offset, columns = row_offset(self._weights[name]), row_length(p.shape)
            key = stream_key(self._seed, f"average/{name}/{update}") if mean.dtype == torch.bfloat16 else 0
            for some in device_portions(p, columns):
                wide = mean[some].to(wide_dtype(mean.dtype))
                wide.lerp_(p[some].to(wide.device, wide.dtype), share)
                if mean.dtype == torch.bfloat16:
                    round_bf16_(wide, mean[some], key, (offset + some.start) * columns)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Lets the model compute with the average for as long as this is entered, with no step under way. Takes the memory of this
        rank's rows once more where the average is kept in another dtype, else that of one parameter."""
        rows = [(p, mean, mean if mean.dtype == p.dtype else torch.empty_like(p)) for _, p, mean in self._rows()]
        for p, mean, aside in rows:
            _exchange_(p, mean, aside)
        try:
            yield
        finally:
            for p, mean, aside in rows:
                if aside is mean:
                    _exchange_(p, mean, mean)
                else:
                    p.copy_(aside)

    def _rows(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        """(name, this rank's rows of the parameter, of its mean)."""
        for name, p in self._weights.items():
            yield name, local(p.detach()), local(self._means[name])


@torch.no_grad()
def _exchange_(p: Tensor, source: Tensor, aside: Tensor) -> None:
    """Gives `p` the numbers of `source`, and `aside`, which may be `source`, those that `p` had."""
    kept = p.clone()
    p.copy_(source)
    aside.copy_(kept)


def average_dtype(config: AverageConfig, parameter: torch.dtype) -> torch.dtype:
    """Returns the dtype of the average of a parameter."""
    return torch.bfloat16 if config.dtype == "bf16" else wide_dtype(parameter)


def _room(p: Tensor, config: AverageConfig) -> Tensor:
    rows = local(p.detach())
    device = "cpu" if config.offload == "cpu" else rows.device
    return laid_like(p, torch.empty(rows.shape, dtype=average_dtype(config, p.dtype), device=device))


@contextmanager
def averaged(average: Average | None) -> Iterator[None]:
    """Lets a model compute with its average, where one is kept."""
    if average is None:
        yield
        return
    with average.in_place():
        yield
