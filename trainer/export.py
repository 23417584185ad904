"""A run's checkpoint, written as a Hugging Face folder; see `rowwise.launch.export` for the command."""

import json
import shutil
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from rowwise.kernels.nm import nm_mask
from rowwise.optim.sparse.config import NM, sparse_layers
from rowwise.parallel.precision import DTYPES
from rowwise.trainer.data.tokenizer import byte_tokenizer_json, open_tokenizer
from rowwise.trainer.metadata import Reader, read_metadata
from rowwise.trainer.models.config_json import their_config, with_form
from rowwise.trainer.models.decoder import ModelConfig, model_of, parameter_shapes
from rowwise.trainer.models.forms import in_form
from rowwise.trainer.models.huggingface import their_name, write_folder


@dataclass(frozen=True)
class Source:
    """A sound checkpoint, and the configuration of the run that wrote it, as its manifest holds it. `tokenizer`: the
    fingerprint of the run's; None where it had none, or an earlier release wrote it."""

    checkpoint: Path
    config: Mapping[str, Any]
    tokenizer: str | None

    @property
    def model(self) -> ModelConfig:
        """The shape of the model. Raises ValueError for one of another release, or that transformers does not have."""
        try:
            model = model_of(self.config["model"])
        except (KeyError, TypeError) as error:
            raise ValueError(f"the run is of another release of Rowwise ({error}); export it with that one") from None
        if model.stable_embedding:
            raise ValueError(
                f"{self.checkpoint} has model.stable_embedding=true, and no model of transformers has a norm after its "
                "embedding; possible are runs with model.stable_embedding=false: train one"
            )
        return model


@dataclass(frozen=True)
class Target:
    """The folder to make; the dtype's and the form's names; the most bytes of a file; the tokenizer that was asked for."""

    folder: Path
    dtype: str
    form: str
    max_file_bytes: int
    tokenizer: str | None


def write(source: Source, target: Target) -> str:
    """Writes the folder and returns what it did, in a line. Raises ValueError before anything is written, or for
    numbers that the dtype or the form cannot hold."""
    read_metadata(source.checkpoint)
    model, dtype = source.model, DTYPES[target.dtype]
    shapes, scaling, seq_len = parameter_shapes(model), model.rope_scaling, source.config["batch"]["seq_len"]
    tokenizer, end_token = tokenizer_of(source, target.tokenizer, model.vocab_size)
    positions = seq_len if scaling is None else max(seq_len, round(scaling.original_length * scaling.factor))
    config_json = with_form(their_config(model, dtype, positions, end_token), target.form)
    changed: list[str] = []

    def form(name: str, tensor: Tensor) -> dict[str, Tensor]:
        tensors = in_form(target.form, name, tensor)
        changed.extend([name] if their_name(name) not in tensors else [])
        return tensors

    partial = _begin(target.folder)
    try:
        read = reader(source, shapes)
        files = write_folder(partial, config_json, shapes, read, dtype, target.max_file_bytes, form)
        if target.form != "dense" and not changed:
            raise ValueError(f"form={target.form}: every hidden weight would be larger than dense; give form=dense")
        for name, content in tokenizer.items():
            (partial / name).write_bytes(content)
        partial.rename(target.folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    parameters = sum(shape.numel() for shape in shapes.values())
    told = f"{source.checkpoint} -> {target.folder}: {parameters:,} parameters in {target.dtype}, files: {len(files)}"
    return f"{told}, {target.form} matrices: {len(changed)}" if changed else told


def tokenizer_of(source: Source, choice: str | None, vocab_size: int) -> tuple[dict[str, bytes], int | None]:
    """The tokenizer's files to put beside the weights, by name, and the token that ends a document; none and None where
    there is none. Raises ValueError, also where the run's own file is not any more what the run read."""
    data = source.config["data"]
    # What read tokens alone has no tokenizer, whatever made them.
    of_run, separator = data.get("tokenizer", "none" if data["name"] == "tokens" else "bytes"), data.get("separator")
    given = choice or of_run
    if given == "none":
        return {}, separator
    end_of_text, path = data.get("end_of_text") if given != "bytes" else None, Path(given).expanduser()
    if given != "bytes" and not path.is_file():
        origin = "tokenizer" if choice else "the run's data.tokenizer"
        raise ValueError(f"{origin}={path}: no such file; give tokenizer=PATH of the tokenizer.json, or tokenizer=none")
    tokenizer = open_tokenizer(given, end_of_text)
    if choice is None and source.tokenizer not in (None, tokenizer.fingerprint):
        raise ValueError(
            f"the run's data.tokenizer={path} has changed since the run wrote {source.checkpoint.name}; put back the file "
            f"that it read, or give tokenizer={path} to take this one"
        )
    if tokenizer.vocab_size > vocab_size:
        raise ValueError(
            f"{given} has tokens up to {tokenizer.vocab_size - 1}, and the model's vocab_size is {vocab_size}: it is "
            "not the tokenizer of this run; give tokenizer=PATH of that, or tokenizer=none"
        )
    # The word to transformers to take it as it is: it would rebuild a Llama's from the vocabulary with rules of its own.
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    content = byte_tokenizer_json().encode() if given == "bytes" else path.read_bytes()
    if end_of_text is not None:
        settings["eos_token"] = end_of_text
        separator = tokenizer.end[0]
    return {"tokenizer.json": content, "tokenizer_config.json": json.dumps(settings, indent=1).encode()}, separator


def read_(checkpoint: Path, tensors: dict[str, Tensor]) -> None:
    """Fills `tensors` (our parameters by name) from the checkpoint, in their dtype; reads nothing else. One process is
    enough, whatever layout wrote it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*single process")
        dcp.load(
            {f"model.{name}": tensor for name, tensor in tensors.items()},
            storage_reader=Reader(checkpoint),
            no_dist=True,
        )


def reader(source: Source, shapes: dict[str, torch.Size]) -> Callable[[dict[str, Tensor]], None]:
    """A function that fills tensors (our parameters by name) with what the run computed with. After sparsity=nm that is
    its matrices pruned, chosen in the run's own precision; a checkpoint has the dense ones, which learn."""
    sparsity, own = source.config.get("sparsity", {"name": "none"}), DTYPES[source.config["precision"]["name"]]
    pruned: set[str] = set()
    if sparsity["name"] == "nm":
        pruned = set(sparse_layers(NM(layers=sparsity["layers"]), shapes))

    def fill_(tensors: dict[str, Tensor]) -> None:
        if as_they_are := {name: tensor for name, tensor in tensors.items() if name not in pruned}:
            read_(source.checkpoint, as_they_are)
        for name in tensors.keys() & pruned:
            w = torch.empty(shapes[name], dtype=torch.promote_types(own, torch.float32))
            read_(source.checkpoint, {name: w})
            kept = nm_mask(w.to(own), sparsity["n"], sparsity["m"])
            tensors[name].copy_(w.masked_fill_(~kept, 0))

    return fill_


def _begin(final: Path) -> Path:
    """An empty folder beside `final`, to be renamed. What an interrupted export left is removed."""
    partial = final.with_name(final.name + ".incomplete")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    except OSError as error:
        raise ValueError(f"to={final} cannot be written ({error.strerror}); give another folder") from None
    return partial
