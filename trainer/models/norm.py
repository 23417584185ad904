"""The norm of decoders: torch's layer, with the arithmetic of `rowwise.kernels.rms_norm`."""

from torch import Tensor, nn

from rowwise.kernels.rms_norm import rms_norm
from rowwise.trainer.models.config import ModelConfig


def norm_of(config: ModelConfig, size: int | None = None) -> "RMSNorm":
    """Makes a norm of a model, by default over its width."""
    return RMSNorm(config.dim if size is None else size, config.norm_eps, config.norm_offset)


class RMSNorm(nn.RMSNorm):
    """An RMS norm over the last dim, (..., n) to (..., n), multiplied by `offset` + its weight. It keeps its input and a number a row
    for the backward."""

    eps: float

    def __init__(self, size: int, eps: float, offset: float = 0.0):
        super().__init__(size, eps=eps)
        self.offset = offset

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps, self.offset)
