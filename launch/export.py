"""A run's checkpoint as a Hugging Face folder, which transformers opens.

    python -m rowwise.launch.export run=runs/NAME to=DIR

    run=PATH             the run, or one checkpoint of it
    to=DIR               the folder to make; it must not exist, or be empty
    checkpoint=STEP      the checkpoint, by step or path; default: the newest whose checksums are right
    dtype=fp32           fp32 (as trained, unless in fp64), bf16 (half the size) or fp16
    max_file_bytes=5e9   of a safetensors file; the export holds one of them in memory, and a shard of one tensor
    tokenizer=PATH       the tokenizer.json to put beside the weights, bytes (a token is a byte), or none; default: the run's
                         own, and none where it read tokens
    form=dense           of the hidden weights of a sparse run: dense, which transformers opens; condensed (of constant
                         fan-in, sparsity=srigl) or semi_structured (2:4, sparsity=nm), which
                         rowwise.trainer.models.forms.open_exported opens for inference

Exit code 0: DIR is complete; 2: refused, and there is no DIR. It gets its name last: what a killed export leaves behind
is DIR.incomplete, which the next one removes.
"""

import argparse
import json
import shutil
import sys
import warnings
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from rowwise.kernels.nm import nm_mask
from rowwise.optim.sparse.config import NM, sparse_layers
from rowwise.parallel.precision import DTYPES
from rowwise.trainer.data.tokenizer import byte_tokenizer_json, open_tokenizer
from rowwise.trainer.keys import unknown_key
from rowwise.trainer.manifest import damage, find_checkpoints, read_manifest, step_folder
from rowwise.trainer.metadata import Reader, read_metadata
from rowwise.trainer.models.decoder import ModelConfig, parameter_shapes
from rowwise.trainer.models.forms import FORMS, SEMI_STRUCTURED_DTYPES, form_config, in_form
from rowwise.trainer.models.huggingface import their_config, their_name, write_folder
from rowwise.trainer.models.rope import RopeScaling

POSSIBLE_DTYPES = ("fp32", "bf16", "fp16")


@dataclass(frozen=True)
class ExportConfig:
    """The keys, as they were given."""

    run: str
    to: str
    checkpoint: str | None = None
    dtype: str = "fp32"
    max_file_bytes: str = "5e9"
    tokenizer: str | None = None
    form: str = "dense"


def main(arguments: list[str] | None = None) -> int:
    """Exports. Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="rowwise.launch.export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE")
    try:
        print(export(parse(parser.parse_args(arguments).settings)))
    except ValueError as refusal:
        print(f"refused: {refusal}", file=sys.stderr)
        return 2
    return 0


def parse(settings: list[str]) -> ExportConfig:
    """`key=value` arguments, strictly. Raises ValueError."""
    known = [field.name for field in fields(ExportConfig)]
    given: dict[str, str] = {}
    for setting in settings:
        key, _, value = setting.partition("=")
        if key not in known:
            raise ValueError(unknown_key(key, known))
        if not value or key in given:
            raise ValueError(f"{setting}: give {key}=VALUE, once")
        given[key] = value
    for field in fields(ExportConfig):
        if field.default is MISSING and field.name not in given:
            raise ValueError(f"{field.name}= is missing; give run=runs/NAME to=DIR")
    return ExportConfig(**given)


def export(config: ExportConfig) -> str:
    """Writes the folder and returns what it did, in a line. Raises ValueError before anything is written, or for
    numbers that `dtype` or `form` cannot hold."""
    _check_choices(config)
    max_file_bytes = _bytes(config.max_file_bytes)
    final = _free(Path(config.to).expanduser())
    checkpoint, manifest = choose(config)
    model, seq_len = model_of(manifest), manifest["config"]["batch"]["seq_len"]
    if model.stable_embedding:
        raise ValueError(
            f"run={config.run} has model.stable_embedding=true, and no model of transformers has a norm after its embedding; "
            "possible are runs with model.stable_embedding=false: train one"
        )
    tokenizer, end_token = tokenizer_of(manifest["config"]["data"], config.tokenizer, model.vocab_size)

    dtype, shapes = DTYPES[config.dtype], parameter_shapes(model)
    scaling = model.rope_scaling
    positions = seq_len if scaling is None else max(seq_len, round(scaling.original_length * scaling.factor))
    config_json = form_config(their_config(model, dtype, positions, end_token), config.form)
    changed: list[str] = []

    def form(name: str, tensor: Tensor) -> dict[str, Tensor]:
        tensors = in_form(config.form, name, tensor)
        changed.extend([name] if their_name(name) not in tensors else [])
        return tensors

    partial = _begin(final)
    try:
        read = reader(checkpoint, manifest["config"], shapes)
        files = write_folder(partial, config_json, shapes, read, dtype, max_file_bytes, form)
        if config.form != "dense" and not changed:
            raise ValueError(f"form={config.form}: every hidden weight would be larger than dense; give form=dense")
        for name, content in tokenizer.items():
            (partial / name).write_bytes(content)
        partial.rename(final)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    parameters = sum(shape.numel() for shape in shapes.values())
    told = f"{checkpoint} -> {final}: {parameters:,} parameters in {config.dtype}, files: {len(files)}"
    return f"{told}, {config.form} matrices: {len(changed)}" if changed else told


def _check_choices(config: ExportConfig) -> None:
    if config.dtype not in POSSIBLE_DTYPES:
        raise ValueError(f"dtype={config.dtype}: possible are {', '.join(POSSIBLE_DTYPES)}")
    if config.form not in FORMS:
        raise ValueError(f"form={config.form}: possible are {', '.join(FORMS)}")
    if config.form == "semi_structured" and DTYPES[config.dtype] not in SEMI_STRUCTURED_DTYPES:
        raise ValueError(
            f"dtype={config.dtype}: form=semi_structured has 16-bit numbers; give dtype=bf16 or dtype=fp16"
        )


def choose(config: ExportConfig) -> tuple[Path, dict[str, Any]]:
    """The checkpoint to export and its manifest. Says what it passes over. Raises ValueError where none is sound."""
    candidates, complaints = _candidates(config), []
    for checkpoint in candidates:
        try:
            manifest = read_manifest(checkpoint)
            found = damage(checkpoint, manifest["files"].items())
        except ValueError as error:
            found = [str(error)]
        if not found:
            read_metadata(checkpoint)
            return checkpoint, manifest
        complaints.append(f"{checkpoint} is damaged: {'; '.join(found)}")
        if checkpoint != candidates[-1]:
            print(f"{complaints[-1]}; passed over", file=sys.stderr)
    raise ValueError(f"{complaints[-1]}; no sound checkpoint is left, give another checkpoint= or run=")


def _candidates(config: ExportConfig) -> list[Path]:
    run = Path(config.run).expanduser()
    found = find_checkpoints(run)
    if not found:
        others = sorted(str(p) for p in run.parent.iterdir() if find_checkpoints(p)) if run.parent.is_dir() else []
        hint = f"possible are {', '.join(others)}" if others else "give a folder that a training run wrote"
        raise ValueError(f"run={config.run}: there is no checkpoint; {hint}")
    if config.checkpoint is None:
        return found
    if config.checkpoint.isdigit():
        name = step_folder(run, int(config.checkpoint)).name
        chosen = [checkpoint for checkpoint in found if checkpoint.name == name]
    else:
        path = Path(config.checkpoint).expanduser().resolve()
        chosen = [checkpoint for checkpoint in found if checkpoint.resolve() == path]
    if not chosen:
        possible = ", ".join(checkpoint.name for checkpoint in found)
        raise ValueError(f"checkpoint={config.checkpoint}: not one of run={config.run}; possible are {possible}")
    return chosen


def model_of(manifest: dict[str, Any]) -> ModelConfig:
    """The shape of the model that a checkpoint holds. Raises ValueError for one of another release."""
    keys = dict(manifest["config"]["model"])
    try:
        scaling = keys.pop("rope_scaling")
        return ModelConfig(**keys, rope_scaling=None if scaling is None else RopeScaling(**scaling))
    except (KeyError, TypeError) as error:
        raise ValueError(f"the run is of another release of Rowwise ({error}); export it with that one") from None


def tokenizer_of(data: dict[str, Any], choice: str | None, vocab_size: int) -> tuple[dict[str, bytes], int | None]:
    """The tokenizer's files to put beside the weights, by name, and the token that ends a document; none and None where
    there is none. Raises ValueError."""
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
        separator = int(tokenizer.encode([b""])[0][-1])  # what an empty document becomes ends in its end
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


def reader(
    checkpoint: Path, config: dict[str, Any], shapes: dict[str, torch.Size]
) -> Callable[[dict[str, Tensor]], None]:
    """A function that fills tensors (our parameters by name) with what the run computed with. After sparsity=nm that is
    its matrices pruned, chosen in the run's own precision; a checkpoint has the dense ones, which learn."""
    sparsity, own = config.get("sparsity", {"name": "none"}), DTYPES[config["precision"]["name"]]
    pruned: set[str] = set()
    if sparsity["name"] == "nm":
        pruned = set(sparse_layers(NM(layers=sparsity["layers"]), shapes))

    def fill_(tensors: dict[str, Tensor]) -> None:
        if as_they_are := {name: tensor for name, tensor in tensors.items() if name not in pruned}:
            read_(checkpoint, as_they_are)
        for name in tensors.keys() & pruned:
            w = torch.empty(shapes[name], dtype=torch.promote_types(own, torch.float32))
            read_(checkpoint, {name: w})
            kept = nm_mask(w.to(own), sparsity["n"], sparsity["m"])
            tensors[name].copy_(w.masked_fill_(~kept, 0))

    return fill_


def _bytes(text: str) -> int:
    try:
        number = int(float(text))
    except (ValueError, OverflowError):
        number = 0
    if number < 1:
        raise ValueError(f"max_file_bytes={text}: a number of bytes of at least 1, such as 5e9")
    return number


def _free(final: Path) -> Path:
    if final.exists() and not (final.is_dir() and not any(final.iterdir())):
        raise ValueError(f"to={final} exists and is not empty; give a new folder, or remove it")
    return final


def _begin(final: Path) -> Path:
    """An empty folder beside `final`, to be renamed. What an interrupted export left is removed."""
    partial = final.with_name(final.name + ".incomplete")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    except OSError as error:
        raise ValueError(f"to={final} cannot be written ({error.strerror}); give another folder") from None
    return partial


if __name__ == "__main__":
    sys.exit(main())
