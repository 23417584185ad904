"""Hands a model to DeepSpeed through Accelerate, in the place of `trainer.parallelize`, and tells what really runs."""

import hashlib
import logging
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rowwise.kernels.later import Later
from rowwise.optim.build import Assignments, assignments, build_optimizer
from rowwise.optim.flat import FlatOptimizer, on_the_host
from rowwise.optim.optimizer import Optimizer
from rowwise.parallel.accelerate.deepspeed_json import Json
from rowwise.parallel.accelerate.files import settings_of
from rowwise.parallel.mesh import Mesh
from rowwise.parallel.precision import compute_dtype
from rowwise.parallel.shard import materialize
from rowwise.trainer.accelerate.engine import DeepSpeedEngine
from rowwise.trainer.accelerate.fit import EngineUnfit, require_kind
from rowwise.trainer.accelerate.states import DeepSpeedStates
from rowwise.trainer.activations import keep_results
from rowwise.trainer.config import TrainConfig
from rowwise.trainer.files import to_json, write_whole
from rowwise.trainer.models.decoder import Decoder, parameter_specs
from rowwise.trainer.offloading import leaving_share
from rowwise.trainer.parallelize import initial_rows

deepspeed, ops, accelerate_ = Later("deepspeed"), Later("deepspeed.ops"), Later("accelerate")
USED = "deepspeed.json"  # in the folder of the run: what DeepSpeed really used


def on_deepspeed(
    model: Decoder, config: TrainConfig, mesh: Mesh
) -> tuple[DeepSpeedEngine, FlatOptimizer, DeepSpeedStates, Assignments]:
    """Hands `model`, on the meta device, to DeepSpeed through Accelerate, and gives it its numbers. At stage 3 a rank holds one layer
    whole at a time, below it the whole model. All ranks call it. Raises EngineUnfit."""
    warnings.filterwarnings(
        "ignore", r".torch\.distributed\.\w+. is deprecated", FutureWarning
    )  # of DeepSpeed's own calls
    planned = build_optimizer(model, config.optim, config.seed)  # on the meta device: it takes no memory
    told = assignments(model, planned)
    keys = {name: list(planned.state[p]) for name, p in model.named_parameters()}
    settings = _settings(config, mesh)
    accelerator = _accelerator(settings)  # it comes first: what splits a model asks it who else is there
    keep_results([model], config, mesh, leaving_share(config, mesh))
    fill_, dtype = initial_rows(config), compute_dtype(config.precision)
    if config.parallel.zero == 3:
        _split_as_it_is_made(model, mesh, settings, fill_, dtype)
    else:
        materialize(model, mesh.device, fill_)
    optimizer = _optimizer(planned, model, config)
    engine = _prepared(accelerator, model, optimizer, config, dtype)
    states = DeepSpeedStates(engine, optimizer, keys, mesh)
    states.fill(fill_)
    if mesh.rank == 0:
        write_whole(Path(config.run_dir) / USED, to_json(_used(engine, settings), indent=1) + "\n")
    return DeepSpeedEngine(engine, optimizer, mesh.device), optimizer, states, told


def _settings(config: TrainConfig, mesh: Mesh) -> Json:
    """DeepSpeed's configuration, whose files are in a folder of this rank. Buffers have the size of the largest parameter, unless a
    file says another: DeepSpeed's own take 2 GB a rank whatever the model."""
    settings = settings_of(config)
    folder = swap_folder(config.run_dir, mesh.rank)
    largest = max(spec.shape.numel() for spec in parameter_specs(config.model).values())
    for kind in ("offload_optimizer", "offload_param"):
        place = settings["zero_optimization"][kind]
        if place["device"] != "none":
            place.setdefault("pin_memory", mesh.device.type == "cuda")
        if place["device"] == "nvme" and kind == "offload_param":
            place.setdefault("buffer_size", largest)
        if place["device"] == "nvme":
            place["nvme_path"] = str(Path(place["nvme_path"]).expanduser() / folder)
            shutil.rmtree(place["nvme_path"], ignore_errors=True)  # of a start that was killed
            Path(place["nvme_path"]).mkdir(parents=True)
    return settings


def swap_folder(run_dir: str, rank: int) -> Path:
    """Names the folder of a rank's files, below the one that a run names for them."""
    return Path(f"rowwise-{hashlib.sha256(str(Path(run_dir).resolve()).encode()).hexdigest()[:16]}", f"rank-{rank}")


def remove_files(config: TrainConfig, rank: int) -> None:
    """Removes what a rank has on files for DeepSpeed."""
    asked = config.parallel.deepspeed
    for where in {asked.offload_optimizer, asked.offload_params} - {None, "cpu"}:
        folder = Path(str(where)).expanduser() / swap_folder(config.run_dir, rank)
        shutil.rmtree(folder, ignore_errors=True)
        if folder.parent.is_dir() and not any(folder.parent.iterdir()):
            shutil.rmtree(folder.parent, ignore_errors=True)


def _split_as_it_is_made(
    model: Decoder, mesh: Mesh, settings: Json, fill_: Callable[[str, Tensor, int, int], None], dtype: torch.dtype
) -> None:
    """Gives memory, in `dtype`, to one module with parameters of its own after another, and splits each before the next."""
    # From the innermost on: what a module is asked to split has its numbers, below it too. Ranks that share a second copy are made
    # by the first of them: DeepSpeed makes them once.
    second_copy = None
    for prefix, module in reversed(list(model.named_modules())):
        own = dict(module.named_parameters(recurse=False))
        for name, p in own.items():
            numbers = torch.empty(p.shape, device=mesh.device)
            fill_(f"{prefix}.{name}", numbers, 0, p.size(0))
            setattr(module, name, nn.Parameter(numbers.to(dtype)))
        if own:
            split = deepspeed.zero.Init(
                module=module, config_dict_or_path=settings, zero_param_parallel_group=second_copy
            )
            second_copy = split.zero_param_process_group


def _optimizer(planned: Optimizer, model: nn.Module, config: TrainConfig) -> FlatOptimizer:
    if config.parallel.deepspeed.offload_optimizer is not None:
        for group in planned.param_groups:
            group["rule"] = on_the_host(group["rule"])
    return FlatOptimizer(planned, dict(model.named_parameters()))


def _accelerator(settings: Json) -> Any:
    """An Accelerator that drives DeepSpeed. Raises EngineUnfit where it does not. Ranks on processors exchange over gloo, as they do
    without it: messages of its own for them would be compiled at the first start, a minute, and leave shared memory behind them."""
    ops.__compatible_ops__["deepspeed_shm_comm"] = False
    plugin = accelerate_.DeepSpeedPlugin(hf_ds_config=settings)
    micro_batches = settings["gradient_accumulation_steps"]
    accelerator = accelerate_.Accelerator(deepspeed_plugin=plugin, gradient_accumulation_steps=micro_batches)
    require_kind(accelerator, "DEEPSPEED", "DeepSpeed")
    return accelerator


def _new_to_the_reader(said: logging.LogRecord) -> bool:
    """Passes over two warnings of DeepSpeed's: of an optimizer that is not its own, where the rules that it may call are checked here,
    and of a step without a norm, which the run tells of itself."""
    return not any(words in said.getMessage() for words in ("untested optimizer", "OVERFLOW! Skipping step"))


def _prepared(
    accelerator: Any, model: nn.Module, optimizer: FlatOptimizer, config: TrainConfig, dtype: torch.dtype
) -> Any:
    """DeepSpeed's engine, made by Accelerate. Raises EngineUnfit where it is another."""
    logging.getLogger("DeepSpeed").addFilter(_new_to_the_reader)
    engine, _ = accelerator.prepare(model, optimizer)
    if not isinstance(engine, deepspeed.DeepSpeedEngine):
        raise EngineUnfit(f"parallel.backend=accelerate: {type(engine).__name__} runs and not DeepSpeed's engine")
    stage, dtypes = engine.zero_optimization_stage(), {p.dtype for p in engine.module.parameters()}
    if stage != config.parallel.zero or dtypes != {dtype}:
        raise EngineUnfit(
            f"parallel.backend=accelerate: DeepSpeed runs stage {stage} in {', '.join(map(str, dtypes))}, and parallel.zero="
            f"{config.parallel.zero} in {dtype} was asked for"
        )
    return engine


def _used(engine: Any, settings: Json) -> Json:
    """What DeepSpeed really uses, as far as it tells."""
    return {
        "deepspeed": deepspeed.__version__,
        "engine": type(engine).__name__,
        "optimizer": type(engine.optimizer).__name__,
        "rules": sorted({type(group["rule"]).__name__ for group in engine.basic_optimizer.param_groups}),
        "stage": int(engine.zero_optimization_stage()),
        "offload_optimizer": str(engine.zero_offload_optimizer()),
        "offload_param": str(engine.zero_offload_param()),
        "clip": engine.gradient_clipping(),
        "accumulation": engine.gradient_accumulation_steps(),
        "dtypes": [str(dtype) for dtype in engine.get_data_types()],
        "given": settings,
    }
