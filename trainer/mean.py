"""The mean of checkpoints of one run, written as a checkpoint of another; see `rowwise.launch.average` for the command.

    w = sum_i c_i w_i / sum_i c_i        c_i = 1, or max(F_i, 1e-6) / |F_i|        F_i = mean_s (d loss_s / d w_i)^2

F_i is the diagonal of the empirical Fisher information of checkpoint i, over samples s, and |F_i| the norm of all of it (Matena &
Raffel, *Merging Models with Fisher-Weighted Averaging*; floor and norm are those of their code). Then, where it is mixed with a
start w_0 (Wortsman et al., *Robust Fine-Tuning of Zero-Shot Models*): share w + (1 - share) w_0. Sums are in float64.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from omegaconf import OmegaConf
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from rowwise.kernels.products import float32_products
from rowwise.kernels.wide import wide_dtype
from rowwise.optim.average import PREFIX as AVERAGE
from rowwise.trainer.data.batches import MicroBatch
from rowwise.trainer.files import fingerprint, new_folder, to_json, write_whole
from rowwise.trainer.manifest import begin, commit
from rowwise.trainer.metadata import read_metadata
from rowwise.trainer.metrics import Recorded
from rowwise.trainer.models.decoder import parameter_specs
from rowwise.trainer.models.ends import Target
from rowwise.trainer.models.huggingface import check_source, rows_from
from rowwise.trainer.one_by_one import Read, save_one_by_one
from rowwise.trainer.whole import Source, load_model, read_tensors

FLOOR = 1e-6  # of F, the authors'
MODEL = "model."
FISHER_BYTES = (
    36  # a number, while F is summed: weight and gradient in 32 bits, squares, and both sums over checkpoints
)


@dataclass(frozen=True)
class Fisher:
    """What F is the mean over: the samples, each a micro-batch of one, and where they are computed."""

    samples: Sequence[MicroBatch]
    device: torch.device


@dataclass(frozen=True)
class Start:
    """What the mean is mixed with, a checkpoint or a Hugging Face folder, and the mean's share in that."""

    where: Source | Path
    share: float


def write_mean(sources: Sequence[Source], folder: Path, fisher: Fisher | None, start: Start | None) -> str:
    """Writes `folder` as a run whose one checkpoint is the mean of `sources`, the newest last, which gives what is no weight.
    Returns what was done, in a line. Raises ValueError, and then there is no folder."""
    newest = sources[-1]
    tensors = {
        name: torch.empty(told.size, dtype=told.properties.dtype, device="meta")
        for name, told in read_metadata(newest.checkpoint).state_dict_metadata.items()
        if isinstance(told, TensorStorageMetadata) and not name.startswith(AVERAGE)
    }
    weights = [name for name in tensors if name.startswith(MODEL)]
    mean = weighted(sources, tensors, fisher) if fisher is not None else plain(sources, tensors)
    mixed = mean if start is None else toward(start, newest, mean, tensors)

    def read(name: str) -> Tensor:
        return mixed(name) if name in weights else read_one(newest.checkpoint, name, tensors[name])

    steps = [source.manifest["step"] for source in sources]
    about = {"run": str(newest.checkpoint.parent.parent), "steps": steps, "fisher": fisher is not None}
    if start is not None:
        about |= {"start": str(start.where.checkpoint if isinstance(start.where, Source) else start.where)}
        about |= {"share": start.share}
    with new_folder(folder) as partial:
        name = _write_run(newest, partial, folder, tensors, read)
        write_whole(partial / "mean.json", to_json(about, indent=1) + "\n")
    return f"{about['run']}: the mean of steps {', '.join(map(str, steps))} -> {folder / 'checkpoints' / name}"


def _write_run(newest: Source, partial: Path, folder: Path, tensors: Mapping[str, Tensor], read: Read) -> str:
    tree = {**newest.config, "run_dir": str(folder), "name": folder.name, "resume": "auto"}
    write_whole(partial / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(tree)))
    step = newest.manifest["step"]
    files = save_one_by_one(saved := begin(partial / "checkpoints", step), tensors, read)
    manifest: dict[str, Any] = {**newest.manifest, "config": tree, "files": files, "records": asdict(Recorded(step))}
    manifest["fingerprint"] = {**newest.manifest["fingerprint"], "config": fingerprint(tree)}
    return commit(saved, manifest).name


def plain(sources: Sequence[Source], tensors: Mapping[str, Tensor]) -> Read:
    """Returns what gives the mean of a weight, by its name in the checkpoints: two of its tensors are in memory. What is kept as codes
    must be the same in all."""

    def mean(name: str) -> Tensor:
        like = tensors[name]
        if not like.is_floating_point():
            held = [read_one(source.checkpoint, name, like) for source in sources]
            if not all(torch.equal(one, held[0]) for one in held):
                raise ValueError(f"{name} is kept as {like.dtype} codes, which differ: they have no mean")
            return held[0]
        total = torch.zeros(like.shape, dtype=torch.float64)
        for source in sources:
            total += read_one(source.checkpoint, name, like)
        return total.div_(len(sources))

    return mean


def weighted(sources: Sequence[Source], tensors: Mapping[str, Tensor], fisher: Fisher) -> Read:
    """Returns what gives the mean of a weight in which each number counts by its Fisher information. All weights are in memory. Raises
    ValueError where they have no room."""
    numbers = sum(like.numel() for name, like in tensors.items() if name.startswith(MODEL))
    if (needed := FISHER_BYTES * numbers) > (free := psutil.virtual_memory().available):
        raise ValueError(
            f"fisher=true: the sums take {needed / 1e9:,.1f} GB, and {free / 1e9:,.1f} GB are free; give fisher=false"
        )
    above, below = dict[str, Tensor](), dict[str, Tensor]()
    for source in sources:
        squares = fisher_of(source, fisher)
        norm = torch.stack([f.square().sum() for f in squares.values()]).sum().sqrt()
        if not norm > 0:
            raise ValueError(f"fisher=true: the gradients of {source.checkpoint} are zero; give fisher=false")
        for name, f in squares.items():
            share = f.clamp_min_(FLOOR).div_(norm)
            w = read_one(source.checkpoint, MODEL + name, tensors[MODEL + name])
            above[MODEL + name] = share * w + above.get(MODEL + name, 0.0)
            below[MODEL + name] = share + below.get(MODEL + name, 0.0)
    return lambda name: above[name] / below[name]


def fisher_of(source: Source, fisher: Fisher) -> dict[str, Tensor]:
    """Returns F of a checkpoint's weights, float64 on the host, by the parameters' names; a sample's loss is a sum over tokens."""
    model = load_model(source, fisher.device, wide_dtype(source.precision)).requires_grad_(True)
    squares = {name: torch.zeros(p.shape, dtype=torch.float64) for name, p in model.named_parameters()}
    with float32_products("highest"):
        for batch in fisher.samples:
            here = batch.to(fisher.device)
            model(here.inputs, here.positions, here.documents, Target(here.labels)).total.backward()
            for name, p in model.named_parameters():
                assert p.grad is not None
                squares[name] += p.grad.double().square_().cpu()
            model.zero_grad()
    return {name: total.div_(len(fisher.samples)) for name, total in squares.items()}


def toward(start: Start, newest: Source, mean: Read, tensors: Mapping[str, Tensor]) -> Read:
    """Returns what mixes a mean with the start. Raises ValueError where that is of another shape."""
    fill_ = _reader(start.where, newest, tensors)

    def mixed(name: str) -> Tensor:
        begun = torch.empty(tensors[name].shape, dtype=wide_dtype(tensors[name].dtype))
        fill_(name, begun)
        return mean(name).double().mul_(start.share).add_(begun, alpha=1 - start.share)

    return mixed


def _reader(where: Source | Path, newest: Source, tensors: Mapping[str, Tensor]) -> Callable[[str, Tensor], None]:
    if isinstance(where, Path):
        check_source(where, newest.model)
        rows = rows_from(where, parameter_specs(newest.model))
        return lambda name, t: rows(name.removeprefix(MODEL), t, 0, t.size(0))
    there = read_metadata(where.checkpoint).state_dict_metadata
    for name, like in tensors.items():
        size = getattr(there.get(name), "size", None)
        if name.startswith(MODEL) and size != like.shape:
            raise ValueError(
                f"start={where.checkpoint}: its {name.removeprefix(MODEL)} is {size and tuple(size)}, and the run's "
                f"{tuple(like.shape)}; give a start of the same model"
            )
    fill_ = where.read_()
    return lambda name, t: fill_({name.removeprefix(MODEL): t})


def read_one(checkpoint: Path, name: str, like: Tensor) -> Tensor:
    """Reads one tensor of a checkpoint."""
    tensor = torch.empty(like.shape, dtype=like.dtype)
    read_tensors(checkpoint, {name: tensor})
    return tensor
