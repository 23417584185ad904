"""Puts a model on the mesh: each technique from outside, on plain modules, in the order in which they must come."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from rowwise.kernels.spec import DENSE, Specs
from rowwise.optim.sparse.build import Sparsity, build_sparsity
from rowwise.parallel.activations.config import is_folder
from rowwise.parallel.away import Files, RowsAway
from rowwise.parallel.device import device_of
from rowwise.parallel.gather import gather_by
from rowwise.parallel.mesh import Mesh
from rowwise.parallel.precision import compute_dtype, master_dtype
from rowwise.parallel.reduce import reduce_by
from rowwise.parallel.replicate import replicate_model
from rowwise.parallel.row_file import row_file_of
from rowwise.parallel.shard import (
    is_split,
    materialize,
    merge_parts,
    offload_policy,
    policy,
    shard_model,
    sharded_parts,
)
from rowwise.trainer.activations import keep_results, one_by_one
from rowwise.trainer.adapters.frozen import coded_as_filled, keep_frozen
from rowwise.trainer.adapters.initial import with_adapter_rows
from rowwise.trainer.adapters.specs import run_specs
from rowwise.trainer.config import TrainConfig
from rowwise.trainer.engine import Engine, WholeModel
from rowwise.trainer.models.decoder import Decoder
from rowwise.trainer.models.init import model_rows, random_rows
from rowwise.trainer.offloading import leaving_share
from rowwise.trainer.pipeline import StagedDecoder, connect_stages
from rowwise.trainer.pruned import prune_groups

Conversion = Callable[[list[Decoder], TrainConfig, Mesh], None]
# Each puts other layers in the place of those that a configuration names, with the very same parameters; in this order. (What is
# kept otherwise than the model's other parameters becomes so there.)
CONVERSIONS: tuple[Conversion, ...] = (prune_groups, keep_frozen)


def parallelize(model: Decoder | StagedDecoder, config: TrainConfig, mesh: Mesh) -> tuple[Engine, Sparsity | None]:
    """Splits `model`, on the meta device, over the mesh, in place, and gives it its numbers: each rank makes its own rows and no
    others. Returns what runs it, and what keeps it sparse (None: it is dense). All ranks call it."""
    _require_dense(model.parameter_specs())
    stages = list(model.decoders.values()) if isinstance(model, StagedDecoder) else [model]
    # What layers are made of, and what they compute with.
    model.to(parameter_dtype(config))
    for convert in CONVERSIONS:
        convert(stages, config, mesh)
    # What of it waits for the backward, in which form and where; and how they compute it: a compiled block gathers nothing, so it
    # is inside what FSDP2 gathers. Where not everything is kept as it is, its results are compiled one by one.
    keep_results(stages, config, mesh, leaving_share(config, mesh))
    if config.compile and not one_by_one(config):
        compile_blocks(stages)
    # Where the parameters live.
    away = config.memory.offload_params != "none"
    split = is_split(mesh, policy(config.precision), away, rounds=config.parallel.quantize_gather != "none")
    if split:
        shard_stages(stages, config, mesh)
    if away:
        models, pinned = {model, *stages}, copies_aside(config, mesh.device)
        RowsAway(models, sharded_parts(stages), files_of_rows(config), mesh.device, pinned).fill(
            model, initial_rows(config)
        )
    else:
        materialize(model, mesh.device, initial_rows(config))
    for number, stage in enumerate(stages):
        if split:
            parts = sharded_parts([stage])
            gather_by(stage, parts, config.parallel, mesh)
            reduce_by(stage, parts, config.parallel, mesh, config.seed, number)
        elif not config.optim.in_backward:
            replicate_model(stage, mesh)
    # Messages between stages, and masks, are of parameters that have their numbers.
    engine = engine_of(model, config, mesh)
    return engine, masks_of(model, config, mesh)


def _require_dense(specs: Specs) -> None:
    """Raises ValueError for a parameter of another view of the mesh than there is."""
    for name, spec in specs.items():
        if spec.view != DENSE:
            raise ValueError(f"{name} is laid over the view {spec.view!r}; a mesh has {DENSE!r} alone")


def parameter_dtype(config: TrainConfig) -> torch.dtype:
    """Returns the dtype in which parameters are kept."""
    return torch.bfloat16 if config.optim.param_dtype == "bf16" else master_dtype(config.precision)


def compile_blocks(stages: Iterable[Decoder]) -> None:
    """Compiles every layer by itself, when it is first used; layers that are alike are compiled once."""
    for stage in stages:
        for block in stage.blocks.values():
            block.compile()


def shard_stages(stages: Iterable[Decoder], config: TrainConfig, mesh: Mesh) -> None:
    """Hands each stage's parameters to FSDP2."""
    zero, mixed = config.parallel.zero, policy(config.precision)
    away = offload_policy(copies_aside(config, mesh.device)) if config.memory.offload_params != "none" else None
    for stage in stages:
        shard_model(stage, merge_parts(stage.parts(), zero), mesh, zero, mixed, away)


def copies_aside(config: TrainConfig, device: torch.device) -> bool:
    """Says whether rows on the host are pinned, so that a GPU copies them beside what it computes: not where what takes gradients as
    they come would find copies that are still under way, nor where rows lie in a file."""
    memory = config.memory
    taken = config.optim.in_backward or is_folder(memory.offload_gradients)
    return device_of(device).pins and not taken and not is_folder(memory.offload_params)


def files_of_rows(config: TrainConfig) -> Files:
    """Opens the files of a rank's rows, where they wait in some. Raises OSError."""
    memory = config.memory
    return Files(
        row_file_of("memory.offload_params", memory.offload_params),
        row_file_of("memory.offload_gradients", memory.offload_gradients),
    )


def initial_rows(config: TrainConfig) -> Callable[[str, Tensor, int, int], None]:
    """Returns what fills rows of a parameter before the first step."""
    specs = run_specs(config)
    draw_ = random_rows(specs, config.seed)
    return coded_as_filled(
        with_adapter_rows(model_rows(config.model, config.seed), draw_, specs, config.adapter), specs
    )


def engine_of(model: Decoder | StagedDecoder, config: TrainConfig, mesh: Mesh) -> Engine:
    """Returns what runs `model`, once its parameters exist."""
    if isinstance(model, StagedDecoder):
        return connect_stages(model, config.parallel, compute_dtype(config.precision), mesh)
    return WholeModel(model, mesh.device, config.parallel.zero, mesh.states["replicate"].get_group())


def masks_of(model: Decoder | StagedDecoder, config: TrainConfig, mesh: Mesh) -> Sparsity | None:
    """Returns what keeps the weights of `model` sparse; None where none are."""
    stages = None if mesh.pipeline is None else mesh.pipeline.group
    specs, dtype = run_specs(config), compute_dtype(config.precision)
    return build_sparsity(model, config.sparsity, specs, config.seed, config.steps, stages, dtype)
