"""The forms in which hidden weights are exported, and folders of every form opened for inference.

    dense              NAME.weight (out, in), as transformers reads them
    condensed          NAME.values (r, k) and int32 NAME.columns (r, k) of the rows that are not all zero, and int32
                       NAME.rows (r,) where some are: see `rowwise.kernels.condensed`
    semi_structured    2:4 along rows, NAME.values (out, in / 2) and int16 NAME.meta (out, in / 16), in the order in which
                       torch's CUTLASS kernels read them (torch.sparse.SparseSemiStructuredTensorCUTLASS)

All but hidden weights stay NAME.weight, and so do hidden ones that would become larger. The config.json says which
form it is (`config_json.with_form`).
"""

from collections import defaultdict
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.sparse import SparseSemiStructuredTensorCUTLASS

from rowwise.kernels.condensed import condense, condensed
from rowwise.kernels.spec import ParameterSpec
from rowwise.kernels.torch_sparse import cutlass_from_dense
from rowwise.trainer.models.condensed import CondensedLinear
from rowwise.trainer.models.config import model_of
from rowwise.trainer.models.config_json import FORM, FORMS, our_keys, read_config, without_form
from rowwise.trainer.models.decoder import Decoder
from rowwise.trainer.models.huggingface import opened, their_name, weight_files

_ROWS, _COLUMNS = 32, 64  # of which 2:4 matrices of 16-bit numbers are multiples


def in_form(form: str, name: str, spec: ParameterSpec, w: Tensor) -> dict[str, Tensor]:
    """Returns the tensors that stand for our parameter `name`, by their names: one where it stays dense.

    Raises ValueError for a hidden weight that is sparse enough for `form` but has not its pattern or shape.
    """
    theirs = their_name(name, spec)
    stem, dense = theirs.removesuffix("weight"), {theirs: w}
    if form == "dense" or spec.role != "hidden":
        return dense
    nonzeros = int(w.count_nonzero())
    if form == "semi_structured":
        return dense if nonzeros > w.numel() / 2 else {stem + part: t for part, t in _semi_structured(name, w).items()}
    if nonzeros * (w.itemsize + 4) > w.nbytes:
        return dense
    try:
        c = condense(w)
    except ValueError as error:
        raise ValueError(f"{name} cannot be condensed: {error}") from None
    if c.values.nbytes + c.columns.nbytes > w.nbytes:  # rows of fewer weights are padded
        return dense
    parts = {"values": c.values, "columns": c.columns, "rows": c.rows}
    return {stem + part: t for part, t in parts.items() if t is not None}


def _semi_structured(name: str, w: Tensor) -> dict[str, Tensor]:
    """Its values and their places."""
    rows, columns = w.shape
    if rows % _ROWS or columns % _COLUMNS:
        raise ValueError(
            f"{name} is {rows} x {columns}, and 2:4 matrices are multiples of {_ROWS} x {_COLUMNS}; give form=dense or "
            "form=condensed"
        )
    full = int((w.view(-1, 4).count_nonzero(dim=1) > 2).sum())
    if full:
        raise ValueError(
            f"{name} is not 2:4 along its rows: {full:,} of its {w.numel() // 4:,} groups of four have more than two "
            "non-zeros; train it with sparsity=nm or pdp_nm, or give form=dense or form=condensed"
        )
    values, meta = cutlass_from_dense(w)
    return {"values": values, "meta": meta}


def semi_structured_weight(values: Tensor, meta: Tensor) -> Tensor:
    """Returns the 2:4 matrix (out, in) of `values` and `meta`, which F.linear multiplies on CUDA."""
    shape = torch.Size((values.size(0), 2 * values.size(1)))
    return SparseSemiStructuredTensorCUTLASS(
        shape, packed=values, meta=meta, packed_t=None, meta_t=None, compressed_swizzled_bitmask=None
    )


def open_exported(folder: str | Path, device: str | torch.device = "cpu") -> Decoder:
    """Opens the model of a folder that `rowwise.launch.export` wrote, for inference: condensed weights as `CondensedLinear`, 2:4
    ones on CUDA from compute capability 8.0 on. Raises ValueError for other folders and devices."""
    folder, device = Path(folder).expanduser(), torch.device(device)
    try:
        config_json, form = without_form(read_config(folder))
        _check_form(form, device)
        with torch.device("meta"):
            model = Decoder(model_of(our_keys(config_json)))
        _fill(model, folder, device)
    except KeyError as error:
        raise ValueError(f"{folder}: its config.json has no key {error}; export it again") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder}: {error}") from None
    return model.requires_grad_(False).eval()


def _check_form(form: str, device: torch.device) -> None:
    if form not in FORMS:
        raise ValueError(f"{FORM} is {form!r}, possible are {', '.join(FORMS)}")
    if form != "semi_structured":
        return
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0):
        raise ValueError(
            f"2:4 weights are multiplied on CUDA from compute capability 8.0 on, and the device is {device}; open it there, "
            "or export the run with form=dense"
        )


def _fill(model: Decoder, folder: Path, device: torch.device) -> None:
    """Gives every module of `model` its parts from the files."""
    parts: dict[str, dict[str, Tensor]] = defaultdict(
        dict
    )  # those of a bias, of which there is one form, by its own name
    files = weight_files(folder)
    for path in dict.fromkeys(files.values()):
        with opened(path) as file:
            for name in file.keys():  # noqa: SIM118 - a safetensors file is no dict
                stem, _, part = name.rpartition(".")
                parts[name if part == "bias" else stem][part] = file.get_tensor(name).to(device)
    specs, used = model.parameter_specs(), set[str]()
    for name, p in list(model.named_parameters()):
        spec, theirs = specs[name], their_name(name, specs[name])
        stem = theirs.removesuffix(".weight")
        if stem not in parts:
            raise ValueError(f"it has no tensor of {stem}, which the model needs; export it again")
        used.add(stem)
        found = parts[stem]
        if spec.their_rows is not None and found.keys() == {"weight"}:
            found = {"weight": found["weight"][spec.their_row : spec.their_row + p.size(0)]}
        _set(model, name, p.shape, found)
    parts = {stem: found for stem, found in parts.items() if stem not in used}
    if parts:
        raise ValueError(f"it has tensors of {', '.join(parts)}, which the model does not have; export it again")


def _set(model: Decoder, name: str, shape: torch.Size, parts: dict[str, Tensor]) -> None:
    """Gives the model its parameter `name`, whatever form it has."""
    name, _, last = name.rpartition(".")
    if parts.keys() == {last} == {"bias"} and parts["bias"].shape == shape:
        model.get_submodule(name).bias = nn.Parameter(parts["bias"], requires_grad=False)
        return
    if parts.keys() == {"weight"} and parts["weight"].shape == shape:
        weight = parts["weight"]
    elif parts.keys() == {"values", "meta"} and parts["values"].shape == (shape[0], shape[1] // 2):
        weight = semi_structured_weight(parts["values"], parts["meta"])
    elif parts.keys() - {"rows"} == {"values", "columns"}:
        try:
            linear = condensed(parts["values"], parts["columns"], parts.get("rows"), shape)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        model.set_submodule(name, CondensedLinear(linear))
        return
    else:
        found = ", ".join(f"{part} {tuple(t.shape)}" for part, t in parts.items())
        raise ValueError(f"of {name} {tuple(shape)} it has {found}, which is no form of it; export it again")
    model.get_submodule(name).weight = nn.Parameter(weight, requires_grad=False)
