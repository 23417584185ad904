"""Linear layers of constant fan-in for inference: see `rowwise.kernels.condensed`."""

from torch import Tensor, nn

from rowwise.kernels.condensed import Condensed, condensed_linear


class CondensedLinear(nn.Module):
    """y = W x + bias from the condensed form of W (out, in). Its parts are buffers; it does not learn."""

    values: Tensor
    columns: Tensor
    rows: Tensor | None
    starts: Tensor
    bias: Tensor | None

    def __init__(self, weight: Condensed, bias: Tensor | None = None):
        super().__init__()
        self.shape = weight.shape
        self.register_buffer("values", weight.values)
        self.register_buffer("columns", weight.columns)
        self.register_buffer("rows", weight.rows)
        self.register_buffer("starts", weight.starts)
        self.register_buffer("bias", bias)
        self._weight = weight

    @property
    def weight(self) -> Condensed:
        """The condensed matrix of the buffers as they are: `to` and `load_state_dict(assign=True)` put others in their place."""
        kept, now = self._weight, self._buffers
        if (
            kept.values is not now["values"]
            or kept.columns is not now["columns"]
            or kept.rows is not now["rows"]
            or kept.starts is not now["starts"]
        ):
            self._weight = Condensed(self.values, self.columns, self.rows, self.starts, self.shape)
        return self._weight

    def forward(self, x: Tensor) -> Tensor:
        """Multiplies x (..., in), to (..., out). Raises ValueError where a gradient would be needed."""
        y = condensed_linear(x, self.weight)
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        ablated = self.shape[0] - len(self.values)
        return (
            f"in_features={self.shape[1]}, out_features={self.shape[0]}, fan_in={self.values.size(1)}, "
            f"ablated={ablated}, bias={self.bias is not None}"
        )
