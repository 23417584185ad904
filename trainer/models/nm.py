"""Linear layers that multiply by N:M sparse matrices and keep dense ones; the formulas stand in `rowwise.kernels.nm`."""

import torch
from torch import Tensor, nn

from rowwise.kernels.nm import Backward, nm_linear, nm_problem


class NMLinear(nn.Linear):
    """A linear layer whose forward takes the n largest of every m neighbours in a row of its weight, and whose input
    gradient takes those along the rows too (`backward` "row", SR-STE) or along the columns ("column", BDWP)."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        n: int,
        m: int,
        backward: Backward,
        bias: bool = True,
        semi_structured: bool = False,
    ):
        if problem := nm_problem((out_features, in_features), n, m, backward, semi_structured):
            raise ValueError(problem)
        super().__init__(in_features, out_features, bias)
        self.n, self.m, self.backward, self.semi_structured = n, m, backward, semi_structured

    def forward(self, input: Tensor) -> Tensor:
        return nm_linear(input, self.weight, self.bias, self.n, self.m, self.backward, self.semi_structured)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.n}:{self.m}, backward={self.backward}"


def use_nm(
    model: nn.Module, names: set[str], n: int, m: int, backward: Backward, semi_structured: bool = False
) -> None:
    """Puts an NMLinear in the place of every linear layer of `model` whose weight is among `names`. It holds the very
    same parameters, so that names, optimizers and shards do not notice; names that `model` has not are another stage's.

    Before `torch.compile` and FSDP2 take hold of the layers. Raises ValueError where a name is not a linear layer's
    weight, or its shape has no whole groups.
    """
    for path, module in list(model.named_modules()):
        if f"{path}.weight" not in names:
            continue
        if type(module) is not nn.Linear:
            raise ValueError(f"{path}.weight is a parameter of {type(module).__name__}: only linear layers can be n:m")
        if problem := nm_problem(module.weight.shape, n, m, backward, semi_structured):
            raise ValueError(f"{path}.weight: {problem}")
        model.set_submodule(path, _with_parameters_of(module, n, m, backward, semi_structured))


def _with_parameters_of(linear: nn.Linear, n: int, m: int, backward: Backward, semi_structured: bool) -> NMLinear:
    with torch.device("meta"):  # so that nothing is drawn for it
        layer = NMLinear(linear.in_features, linear.out_features, n, m, backward, False, semi_structured)
    layer.weight, layer.bias = linear.weight, linear.bias
    return layer.train(linear.training)
