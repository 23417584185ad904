"""The norm of decoders: torch's layer, with the arithmetic of `rowwise.kernels.rms_norm`."""

from torch import Tensor, nn

from rowwise.kernels.rms_norm import rms_norm


class RMSNorm(nn.RMSNorm):
    """An RMS norm over the last dim, (..., n) to (..., n). It keeps its input and a number a row for the backward."""

    eps: float

    def __init__(self, size: int, eps: float):
        super().__init__(size, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)
