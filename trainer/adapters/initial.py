"""What the parameters of an adapter begin as: by their specs, as a folder has them, or by the rows that they stand beside.

A size of DoRA begins as the norm of its row of W: whoever has rows of the sizes needs those rows of W alone.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from rowwise.kernels.coded_rows import RowForm, decode_rows, encode_rows
from rowwise.kernels.spec import ParameterSpec, Specs
from rowwise.kernels.wide import wide_dtype
from rowwise.trainer.adapters.config import MAGNITUDE, AdapterConfig, LoadedBase
from rowwise.trainer.adapters.peft import adapter_rows_from
from rowwise.trainer.adapters.specs import is_added

Fill = Callable[[str, Tensor, int, int], None]  # see `parallel.shard.materialize`


def with_adapter_rows(own_: Fill, drawn_: Fill, specs: Specs, adapter: AdapterConfig) -> Fill:
    """Returns what fills rows of every parameter of a run, `specs`: those of the model by `own_`, and those of its adapter
    by its folder, or else by `drawn_`."""
    plain = {name: spec for name, spec in specs.items() if not is_added(name)}
    rows_from_: Fill | None = None
    if isinstance(adapter, LoadedBase) and adapter.init_from is not None:
        rows_from_ = adapter_rows_from(Path(adapter.init_from).expanduser(), plain)

    def fill_(name: str, rows: Tensor, start: int, size: int) -> None:
        layer, _, what = name.rpartition(".")
        if rows_from_ is not None and not specs[name].frozen:
            rows_from_(name, rows, start, size)
        elif name in plain:
            own_(name, rows, start, size)
        elif what == MAGNITUDE:
            spec = plain[f"{layer}.weight"]
            weight = rows.new_empty(rows.size(0), spec.shape[1])
            own_(f"{layer}.weight", weight, start, size)
            rows.copy_(torch.linalg.vector_norm(as_kept(weight, spec), dim=1, dtype=wide_dtype(weight.dtype)))
        else:
            drawn_(name, rows, start, size)

    return fill_


def as_kept(weight: Tensor, spec: ParameterSpec) -> Tensor:
    """Returns rows of a matrix as they are once they are kept as its spec says."""
    if isinstance(spec.kept, RowForm):
        return decode_rows(encode_rows(weight.float(), spec.kept), weight.size(1), spec.kept, weight.dtype)
    return weight if spec.kept is None else weight.to(spec.kept).to(weight.dtype)
