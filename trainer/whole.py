"""The model of a run whole in one process: for export, for text, for a loss on other data, for a notebook.

A checkpoint holds logical tensors by name, so whatever layout wrote it (stages of a pipeline, rows of ZeRO) is none of the
reader's business. The process holds the weights once, in the precision in which the run computed.
"""

import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from rowwise.kernels.coded_rows import RowForm
from rowwise.kernels.nm import nm_mask
from rowwise.kernels.spec import Specs
from rowwise.kernels.wide import wide_dtype
from rowwise.optim.average import PREFIX as AVERAGE
from rowwise.optim.sparse.config import NM, sparse_layers
from rowwise.parallel.precision import DTYPES
from rowwise.trainer.adapters.bits import NAMED
from rowwise.trainer.adapters.config import LqLora, NoAdapter
from rowwise.trainer.adapters.frozen import KEPT, decoded
from rowwise.trainer.adapters.merge import adapter_of, merged
from rowwise.trainer.files import behind
from rowwise.trainer.manifest_form import Manifest
from rowwise.trainer.metadata import Reader, read_metadata
from rowwise.trainer.models.config import ModelConfig, model_of
from rowwise.trainer.models.decoder import Decoder, check_model, parameter_specs
from rowwise.trainer.same_code import told_of_code


@dataclass(frozen=True)
class Source:
    """A sound checkpoint, its manifest, and which of its weights are meant: the average where it has one, or the `last` step's. `own`:
    the code of its model, where the command names some."""

    checkpoint: Path
    manifest: Manifest
    last: bool = False
    own: str | None = None

    @property
    def config(self) -> Mapping[str, Any]:
        """The configuration of the run that wrote the checkpoint."""
        return self.manifest["config"]

    @property
    def model(self) -> ModelConfig:
        """The shape of the model. Raises ValueError for one of another release, or that no machine holds, and for one of code that the
        command does not name: the word of a checkpoint runs none."""
        if (own := self.config["model"].get("own")) is not None and self.own is None:
            raise ValueError(
                f"{self.checkpoint} is of a model of somebody's own code, {own}, which runs by the word of a command alone: look at "
                f"that code, and give model={own} where the command has that key"
            )
        if own is None and self.own is not None:
            raise ValueError(f"model={self.own}: {self.checkpoint} is of no model of one's own; leave it out")
        try:
            model = model_of({**self.config["model"], "own": self.own})
        except (KeyError, TypeError) as error:
            raise ValueError(f"the run is of another release of Rowwise ({error}); use that one for it") from None
        check_model(model)
        return model

    @property
    def precision(self) -> torch.dtype:
        """What the run computed in."""
        return DTYPES[self.config["precision"]["name"]]

    @property
    def tf32(self) -> bool:
        """Whether products of the run on a GPU were in TF32."""
        return self.config["precision"]["name"] == "fp32" and self.config["precision"].get("tf32", True)

    @property
    def fused_loss(self) -> bool:
        """Whether it made its loss without logits; a release that had no such choice made them."""
        return self.config.get("memory", {}).get("fused_loss", False)

    def read_(self) -> Callable[[dict[str, Tensor]], None]:
        """Returns what fills tensors (our parameters by name) with the weights that are meant: in the average are those that learn."""
        there = {} if self.last else read_metadata(self.checkpoint).state_dict_metadata

        def fill_(tensors: dict[str, Tensor]) -> None:
            keys = {name: f"{AVERAGE}{name}" if f"{AVERAGE}{name}" in there else f"model.{name}" for name in tensors}
            read_tensors(self.checkpoint, {keys[name]: tensor for name, tensor in tensors.items()})

        return fill_


def device_named(name: str | None) -> torch.device:
    """Returns the device of that name; None: a GPU where there is one. Raises ValueError where it is not there."""
    gpus = torch.cuda.device_count()
    possible = ["cpu", *(["cuda"] if gpus else []), *(f"cuda:{n}" for n in range(gpus))]
    if name is None:
        name = "cuda" if gpus else "cpu"
    if name not in possible:
        raise ValueError(f"device={name}: possible are {', '.join(possible)}")
    return torch.device(name)


def load_model(source: Source, device: torch.device, dtype: torch.dtype | None = None) -> Decoder:
    """Loads the model of a checkpoint, whole, on `device`, to be evaluated and not to learn: its weights in `dtype`, by default
    that in which the run computed. Raises ValueError where the checkpoint cannot be read, or the device has not
    the memory."""
    with torch.device("meta"):
        model = Decoder(source.model, fused_loss=source.fused_loss).to(dtype or source.precision)
    _require_room(model, device)
    model = model.to_empty(device=device).requires_grad_(False).eval()
    fill_(model, source)
    return model


def _require_room(model: Decoder, device: torch.device) -> None:
    needed = sum(p.nbytes for p in model.parameters())
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    if needed > free:
        raise ValueError(
            f"device={device}: the weights take {needed / 1e9:,.1f} GB, and {free / 1e9:,.1f} GB are free; give another device="
        )


def fill_(model: Decoder, source: Source) -> None:
    """Gives a whole model the weights of a checkpoint of its shape. Says where its code is not what the checkpoint was saved with.
    Raises ValueError where that cannot be read."""
    read_metadata(source.checkpoint)  # whose refusals torch would wrap
    reader(source, parameter_specs(source.model))({name: p.detach() for name, p in model.named_parameters()})
    for line in told_of_code(source.manifest, source.own):
        print(line, file=sys.stderr)


def read_tensors(checkpoint: Path, tensors: dict[str, Tensor]) -> None:
    """Fills `tensors` (by their names in the checkpoint) in their dtype; reads nothing else. One process is
    enough, whatever layout wrote it. Raises ValueError where it is gone, which may be as the run goes on and keeps few."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*single process")
        try:
            dcp.load(
                dict(tensors),
                storage_reader=Reader(checkpoint),
                no_dist=True,
            )
        except CheckpointException as error:
            missing = [one for one in behind(error) if isinstance(one, OSError)]
            if not missing:
                raise
            raise ValueError(f"{checkpoint} cannot be read ({missing[0].strerror}); give another step") from None


def coded_in(source: Source, specs: Specs) -> dict[str, tuple[RowForm, int]]:
    """Finds which matrices a checkpoint holds as rows of bytes: the form of each, and how many numbers a row has."""
    adapter = adapter_of(source.config)
    if isinstance(adapter, LqLora):
        assert adapter.forms is not None
        return {name: (NAMED[form], specs[name].shape[1]) for name, form in adapter.forms.items()}
    form = KEPT.get(source.config["model"].get("frozen_dtype"))
    if not isinstance(form, RowForm):
        return {}
    held = read_metadata(source.checkpoint).state_dict_metadata
    tensors = {name: told for name in specs if isinstance(told := held.get(f"model.{name}"), TensorStorageMetadata)}
    coded = [name for name, told in tensors.items() if told.properties.dtype == torch.uint8]
    return {name: (form, specs[name].shape[1]) for name in coded}


def reader(source: Source, specs: Specs) -> Callable[[dict[str, Tensor]], None]:
    """Returns a function that fills tensors (our parameters by name) with what the run computed with. After sparsity=nm that is
    its matrices pruned, chosen in the run's own precision; a checkpoint has the dense ones, which learn. Of a run with an adapter it
    is the matrices that its layers stand for. `specs`: of the plain model."""
    read_ = decoded(source.read_(), coded_in(source, specs))
    if not isinstance(adapter := adapter_of(source.config), NoAdapter):
        return merged(adapter, specs, source.precision, read_)
    sparsity, own = source.config.get("sparsity", {"name": "none"}), source.precision
    pruned: set[str] = set()
    if sparsity["name"] == "nm":
        pruned = set(sparse_layers(NM(layers=sparsity["layers"]), specs))

    def fill_(tensors: dict[str, Tensor]) -> None:
        if as_they_are := {name: tensor for name, tensor in tensors.items() if name not in pruned}:
            read_(as_they_are)
        for name in tensors.keys() & pruned:
            w = torch.empty(specs[name].shape, dtype=wide_dtype(own))
            read_({name: w})
            kept = nm_mask(w.to(own), sparsity["n"], sparsity["m"])
            tensors[name].copy_(w.masked_fill_(~kept, 0))

    return fill_
