"""How hidden matrices that do not learn are kept, `model.frozen_dtype`: in fewer bits than they multiply with.

    bf16    2 bytes a number
    int8    1, and a scale of 4 for every 256 of a row
    nf4     1/2, and a scale of 1 for every 64 of a row, and 8 a row (Dettmers et al., *QLoRA*): `kernels.coded_rows`

A matrix of int8 or nf4 is a parameter of bytes (rows, bytes of a row), under its own name. It is split by rows as the matrix would be,
gathered as bytes, saved as bytes, and decoded where it multiplies; what it stands for is the same on every layout, for no row's
bytes depend on another row.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn

from rowwise.conf.refusal import Refusal, Refusals
from rowwise.kernels.coded_linear import coded_linear, stored_weight
from rowwise.kernels.coded_rows import INT8, NF4, RowForm, decode_rows, encode_rows
from rowwise.kernels.portions import device_portions
from rowwise.kernels.spec import ParameterSpec, Specs
from rowwise.optim.build import FROZEN
from rowwise.parallel.mesh import Mesh
from rowwise.trainer.config import TrainConfig
from rowwise.trainer.models.decoder import Decoder

FrozenDtype = Literal["bf16", "int8", "nf4"]
KEPT: dict[FrozenDtype, RowForm | torch.dtype] = {"bf16": torch.bfloat16, "int8": INT8, "nf4": NF4}
FROZEN_DTYPE: Refusals = (
    Refusal(
        ("model.frozen_dtype", "adapter.name", "optim.assign"),
        lambda run: (
            run.model.frozen_dtype is not None
            and run.adapter.name == "none"
            and not any(one.rule == FROZEN for one in run.optim.assign)
        ),
        "model.frozen_dtype={model.frozen_dtype}: nothing is frozen; give an adapter, such as adapter=lora, or freeze matrices with "
        "optim.assign, or model.frozen_dtype=null",
    ),
    Refusal(
        ("model.frozen_dtype", "parallel.quantize_gather"),
        lambda run: run.model.frozen_dtype is not None and run.parallel.quantize_gather != "none",
        "model.frozen_dtype={model.frozen_dtype} with parallel.quantize_gather={parallel.quantize_gather}: what is frozen crosses in "
        "few bits already, and its bytes are no numbers to round; give parallel.quantize_gather=none, or model.frozen_dtype=null",
    ),
    Refusal(
        ("model.frozen_dtype", "optim.param_dtype"),
        lambda run: run.model.frozen_dtype == "bf16" and run.optim.param_dtype == "bf16",
        "model.frozen_dtype=bf16 with optim.param_dtype=bf16: every parameter is in 16 bits; give model.frozen_dtype=null",
    ),
)
Fill = Callable[[str, Tensor, int, int], None]


def is_kept(name: str, spec: ParameterSpec) -> bool:
    """Says whether a parameter is a matrix of a linear layer that does not learn."""
    return spec.frozen and spec.role == "hidden" and len(spec.shape) == 2 and name.endswith(".weight")


def with_kept(specs: Specs, choice: FrozenDtype | None) -> Specs:
    """Returns the specs of a run, or of some of its parameters, with how those that do not learn are kept."""
    if choice is None:
        return specs
    return {n: replace(spec, kept=KEPT[choice]) if is_kept(n, spec) else spec for n, spec in specs.items()}


class FrozenLinear(nn.Linear):
    """A linear layer whose weight does not learn: itself, in any dtype, or rows of bytes of `form`. Its weight and bias are those of
    the layer that it stands in for."""

    form: RowForm | None = None

    def __init__(self, linear: nn.Linear):
        with torch.device("meta"):  # so that nothing is made for it
            super().__init__(linear.in_features, linear.out_features, linear.bias is not None)
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, input: Tensor) -> Tensor:
        return self.base(input, self.bias)

    def base(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """What the layer gives without what learns beside it: (..., n) to (..., m)."""
        return coded_linear(x, self.weight, self.form, bias)

    def matrix(self, dtype: torch.dtype) -> Tensor:
        """What its weight stands for, (m, n)."""
        return stored_weight(self.weight, self.in_features, self.form, dtype)

    def keep(self, kept: RowForm | torch.dtype) -> None:
        """Makes its weight one that is kept so, without its numbers."""
        columns = kept.row_bytes(self.in_features) if isinstance(kept, RowForm) else self.in_features
        self.form, dtype = (kept, torch.uint8) if isinstance(kept, RowForm) else (None, kept)
        rows = self.weight.new_empty(self.out_features, columns, dtype=dtype)
        self.weight = nn.Parameter(rows, requires_grad=False)


def keep_frozen(stages: list[Decoder], config: TrainConfig, mesh: Mesh) -> None:
    """Makes the matrices of `stages`, on the meta device, what their specs say that they are kept as, in place."""
    for stage in stages:
        kept = {name: spec.kept for name, spec in stage.parameter_specs().items() if spec.kept is not None}
        for path, module in list(stage.named_modules()) if kept else ():
            if (form := kept.get(f"{path}.weight")) is None:
                continue
            if type(module) is nn.Linear:
                module = FrozenLinear(module)
                stage.set_submodule(path, module)
            assert isinstance(module, FrozenLinear)
            module.keep(form)


def coded_as_filled(fill_: Fill, specs: Specs) -> Fill:
    """Returns what fills parameters as `fill_` does, and those that are kept as codes with the codes of that."""

    def coded_(name: str, rows: Tensor, start: int, size: int) -> None:
        spec = specs[name]
        if not isinstance(spec.kept, RowForm):
            fill_(name, rows, start, size)
            return
        columns = spec.shape[1]
        for some in device_portions(rows, columns):
            numbers = torch.empty(some.stop - some.start, columns, dtype=torch.float32, device=rows.device)
            fill_(name, numbers, start + some.start, size)
            rows[some] = encode_rows(numbers, spec.kept)

    return coded_


def decoded(
    read_: Callable[[dict[str, Tensor]], None], coded: Mapping[str, tuple[RowForm, int]]
) -> Callable[..., None]:
    """Returns what fills parameters, by name, as `read_` does, and those that it has as rows of bytes with the numbers behind these.
    `coded`: the form of each and the numbers of a row."""

    def fill_(tensors: dict[str, Tensor]) -> None:
        if as_they_are := {name: t for name, t in tensors.items() if name not in coded}:
            read_(as_they_are)
        for name in tensors.keys() & coded.keys():  # one at a time
            form, columns = coded[name]
            packed = torch.empty(tensors[name].size(0), form.row_bytes(columns), dtype=torch.uint8)
            read_({name: packed})
            tensors[name].copy_(decode_rows(packed, columns, form, tensors[name].dtype))

    return fill_
