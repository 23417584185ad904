"""To and from Hugging Face folders: a config.json (`config_json`) and safetensors in one or many files.

The two forms differ in names only (the rotary halves stand in the same order), and where a tensor of theirs is several of ours, in
which rows of it these are. So a row of ours is a row of theirs: loading reads just the rows of a shard, exporting holds one output
file at a time.
"""

import json
import stat
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from rowwise.kernels.spec import ParameterSpec, Specs
from rowwise.trainer.models.config import ModelConfig, plain_of
from rowwise.trainer.models.config_json import our_keys, read_config, read_object, refuse_other_shape, refusing
from rowwise.trainer.models.decoder import parameter_specs
from rowwise.trainer.models.families.keys import family_of, normal
from rowwise.trainer.models.families.table import name_in_family

FLOATS = ("F64", "F32", "F16", "BF16")
_ROWS_AT_A_TIME = 4096
Read = Callable[[dict[str, Tensor]], None]  # fills tensors, by our names
Form = Callable[[str, Tensor], dict[str, Tensor]]  # our name and tensor -> tensors by their names
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


def their_name(name: str, spec: ParameterSpec) -> str:
    """Gives the name of our parameter `name` in a folder. Raises ValueError for one that no folder has."""
    if spec.theirs is None:
        raise ValueError(f"{name} has no counterpart in a folder of Hugging Face")
    return spec.theirs


def their_shape(spec: ParameterSpec) -> torch.Size:
    """Gives the shape of the tensor of a folder that a parameter of ours is, or is rows of."""
    return spec.shape if spec.their_rows is None else torch.Size((spec.their_rows, *spec.shape[1:]))


def check_source(folder: Path, config: ModelConfig) -> None:
    """Refuses a folder that does not hold the model that `config` describes, each tensor in its shape.

    Reads config.json and the headers of the safetensors files; of the numbers, only those of a head that ought to be
    the embedding. Raises ValueError.
    """
    with refusing(folder):
        theirs, ours = our_keys(read_config(folder)), normal(plain_of(config))
    refuse_other_shape(folder, {key: (theirs[key], ours[key]) for key in theirs if key != "family"})
    with refusing(folder):
        families = family_of(theirs), family_of(ours)
    refuse_other_shape(folder, {"family": families})
    with refusing(folder):
        _check_tensors(folder, config)


def _check_tensors(folder: Path, config: ModelConfig) -> None:
    specs = parameter_specs(config)
    shapes = {their_name(name, spec): their_shape(spec) for name, spec in specs.items()}
    copies = {copy: their_name(name, spec) for name, spec in specs.items() for copy in spec.copies}
    files = stored_tensors(folder)
    for name in shapes:
        if name not in files:
            raise ValueError(f"it has no tensor {name}, which the model needs")
    names_of_files = defaultdict(list)
    for name, stored in files.items():
        # Releases before 2024 hold the frequencies of RoPE.
        if name not in shapes and name not in copies and not name.endswith("rotary_emb.inv_freq"):
            raise ValueError(f"it has a tensor {name}, which the model does not have")
        names_of_files[stored.path].append(name)
    for path, names in names_of_files.items():
        with opened(path) as file:
            for name in shapes.keys() & names:
                _sliced(file, files[name], shapes[name])
    for copy, name in copies.items():
        if copy in files:
            _check_tied(files, copy, name, shapes[name])


def _check_tied(files: "dict[str, Stored]", copy: str, name: str, shape: torch.Size) -> None:
    with opened(files[name].path) as embed_file, opened(files[copy].path) as head_file:
        embed = _sliced(embed_file, files[name], shape)
        head = _sliced(head_file, files[copy], shape)
        for start in range(0, shape[0], _ROWS_AT_A_TIME):
            rows = slice(start, start + _ROWS_AT_A_TIME)
            if (embed[rows] != head[rows]).any():
                raise ValueError(f"its config.json ties the embeddings, but {copy} differs from {name}")


def rows_from(folder: Path, specs: Specs) -> Callable[[str, Tensor, int, int], None]:
    """Returns a function that fills rows of a parameter from the folder's safetensors and reads no others; see
    `parallel.shard.materialize`. Raises ValueError for a tensor that `check_source` would have refused."""
    files = stored_tensors(folder)
    open_ = cache(opened)

    def fill_(name: str, rows: Tensor, start: int, size: int) -> None:
        theirs = their_name(name, specs[name])
        if theirs not in files:
            raise ValueError(f"{folder} has no tensor {theirs}, which the model needs")
        spec = specs[name]
        whole = torch.Size((spec.their_rows or size, *rows.shape[1:]))
        stored, first = files[theirs], spec.their_row + start
        source = _sliced(open_(stored.path), stored, whole)
        if rows.numel():
            rows.copy_(source[first : first + rows.size(0)])

    return fill_


class Stored(NamedTuple):
    """Where a tensor is: the file, and what it is called there."""

    path: Path
    name: str


def stored_tensors(folder: Path) -> dict[str, Stored]:
    """Returns where the tensors of a folder's model of text are, by the names that its family has for them."""
    kind = read_config(folder).get("model_type", "")
    files = weight_files(folder)
    named = {name: name_in_family(kind, name) for name in files}
    return {own: Stored(files[name], name) for name, own in named.items() if own is not None}


def weight_files(folder: Path) -> dict[str, Path]:
    """Returns tensor name -> file: of a single one where there is an index too, as transformers does."""
    path = folder / SINGLE
    if not path.is_file() and (folder / INDEX).is_file():
        weight_map = read_object(folder / INDEX)["weight_map"]
        if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
            raise ValueError(f"weight_map in {INDEX} is not possible: it must give the name of each tensor's file")
        return {name: folder / file for name, file in weight_map.items()}
    if not path.is_file():
        raise ValueError(f"no {INDEX} and no {path.name} in it")
    with opened(path) as file:
        return dict.fromkeys(file.keys(), path)


def opened(path: Path) -> Any:
    """Returns a safetensors file, mapped: the header is read and checked against the length, the numbers when asked for."""
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} cannot be read as safetensors ({error})") from None


def _sliced(file: Any, stored: Stored, shape: torch.Size) -> Any:
    """A tensor of a file, to be read by rows. Raises ValueError where its shape or dtype is not the model's."""
    path, name = stored
    source = file.get_slice(name)
    if tuple(source.get_shape()) != tuple(shape):
        raise ValueError(f"{path}: {name} has the shape {source.get_shape()}, and the model needs {list(shape)}")
    if source.get_dtype() not in FLOATS:
        raise ValueError(f"{path}: {name} is of dtype {source.get_dtype()}, possible are {', '.join(FLOATS)}")
    return source


def write_folder(
    folder: Path,
    config_json: dict[str, Any],
    specs: Specs,
    read_: Read,
    dtype: torch.dtype,
    max_file_bytes: int,
    form: Form | None = None,
) -> list[Path]:
    """Writes config.json and the safetensors files, one at a time, into an existing folder. Returns the latter.

    `specs` are those of our parameters; `read_(tensors)` fills those of one file, by our names, in place; `form` gives
    the tensors to write for one of them (None: itself). Raises ValueError for numbers that `dtype` cannot hold.
    """
    form = form or (lambda name, tensor: {their_name(name, specs[name]): tensor})
    groups = list(_pack(specs, dtype.itemsize, max_file_bytes))
    (folder / "config.json").write_text(json.dumps(config_json, indent=1))
    weight_map: dict[str, str] = {}
    total = 0
    for number, names in enumerate(groups, 1):
        file = SINGLE if len(groups) == 1 else f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        written = _write_file(folder / file, {name: specs[name] for name in names}, read_, dtype, form)
        weight_map |= dict.fromkeys(written, file)
        total += sum(written.values())
    if len(groups) > 1:
        (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=1))
    files = [folder / file for file in dict.fromkeys(weight_map.values())]
    for path in files:
        # safetensors makes files that their owner alone may read; a file of ours is as the umask and the folder say.
        path.chmod(stat.S_IMODE((folder / "config.json").stat().st_mode))
    return files


def _write_file(path: Path, specs: Specs, read_: Read, dtype: torch.dtype, form: Form) -> dict[str, int]:
    """Everything a file holds lives in this call, and nowhere after it. Returns the bytes of every tensor."""
    written: dict[str, Tensor] = {}
    tensors: dict[str, Tensor] = {}
    for name, spec in specs.items():
        if spec.their_rows is None:
            tensors[name] = torch.empty(spec.shape, dtype=dtype)
            continue
        theirs = their_name(name, spec)
        if theirs not in written:
            written[theirs] = torch.empty(their_shape(spec), dtype=dtype)
        tensors[name] = written[theirs][spec.their_row : spec.their_row + spec.shape[0]]
    read_(tensors)
    for name, tensor in tensors.items():
        smallest, largest = torch.aminmax(tensor)  # isfinite would make copies of it
        if not (smallest.isfinite() and largest.isfinite()):
            raise ValueError(f"{name} has numbers that are infinite or undefined in {dtype}; give a wider dtype")
    for name, spec in specs.items():
        tensor = tensors.pop(name)
        written |= form(name, tensor) if spec.their_rows is None else {}
    save_file(written, path, metadata={"format": "pt"})
    return {name: tensor.nbytes for name, tensor in written.items()}


def _pack(specs: Specs, itemsize: int, max_bytes: int) -> Iterator[list[str]]:
    """Names in order, those of one tensor of theirs together, in groups of at most `max_bytes` (of a larger tensor: by itself)."""
    tensors: dict[str, list[str]] = {}
    for name, spec in specs.items():
        tensors.setdefault(their_name(name, spec) if spec.their_rows is not None else name, []).append(name)
    group: list[str] = []
    held = 0
    for names in tensors.values():
        size = sum(specs[name].shape.numel() for name in names) * itemsize
        if group and held + size > max_bytes:
            yield group
            group, held = [], 0
        group += names
        held += size
    if group:
        yield group
