"""The model of a run on its mesh, and what keeps it sparse."""

import logging
from pathlib import Path

import torch
import torch.distributed as dist

from rowwise.kernels.semi_structured import measure_semi_structured, semi_structured_problem
from rowwise.optim.sparse.build import Sparsity, build_sparsity
from rowwise.optim.sparse.config import NM, sparse_layers
from rowwise.parallel.mesh import Mesh
from rowwise.parallel.precision import compute_dtype, master_dtype, policy
from rowwise.parallel.replicate import replicate_model
from rowwise.parallel.sequence import attention_on
from rowwise.parallel.shard import is_split, materialize, merge_parts, shard_model
from rowwise.trainer.config import TrainConfig
from rowwise.trainer.models.decoder import Decoder, parameter_shapes
from rowwise.trainer.models.huggingface import rows_from
from rowwise.trainer.models.init import random_rows
from rowwise.trainer.models.nm import use_nm
from rowwise.trainer.pipeline import StagedDecoder, connect_stages, make_plan

log = logging.getLogger(__name__)


def build_model(config: TrainConfig, mesh: Mesh) -> Decoder | StagedDecoder:
    """The decoder, or this rank's stages of it, split over the mesh and filled: each rank makes its own rows and no
    others."""
    axis, dtype, folder = mesh.pipeline, compute_dtype(config.precision), Path(config.run_dir) / "pipeline"
    plan = None if axis is None else make_plan(config.parallel, config.model, config.batch, dtype, folder, mesh)
    attend = attention_on(mesh)
    with torch.device("meta"):
        if axis is None or plan is None:
            model: Decoder | StagedDecoder = Decoder(config.model, attend=attend)
        else:
            mine = plan.schedule.stages_of(axis.rank)
            model = StagedDecoder({stage: Decoder(config.model, plan.layers[stage], attend) for stage in mine})
    model.to(torch.bfloat16 if config.optim.param_dtype == "bf16" else master_dtype(config.precision))
    stages = [model] if isinstance(model, Decoder) else list(model.decoders.values())
    prune_groups(stages, config, mesh)
    zero, mixed = config.parallel.zero, policy(config.precision)
    split = is_split(mesh, mixed)
    for stage in stages:
        for block in stage.blocks.values() if config.compile else []:
            block.compile()
        if split:
            shard_model(stage, merge_parts(stage.parts(), zero), mesh, zero, mixed)
    source = config.model.init_from
    rows = random_rows(config.model, config.seed) if source is None else rows_from(Path(source).expanduser())
    materialize(model, mesh.device, rows)
    for stage in stages if not split and not config.optim.in_backward else []:
        replicate_model(stage, mesh)
    if isinstance(model, StagedDecoder):
        assert plan is not None
        connect_stages(model, plan.schedule, config.parallel, dtype, mesh)
    return model


def build_masks(config: TrainConfig, mesh: Mesh, model: Decoder | StagedDecoder) -> Sparsity | None:
    """What keeps the weights of `model` sparse; None where none are."""
    stages = None if mesh.pipeline is None else mesh.pipeline.group
    shapes, dtype = parameter_shapes(config.model), compute_dtype(config.precision)
    return build_sparsity(model, config.sparsity, shapes, config.seed, config.steps, stages, dtype)


def prune_groups(stages: list[Decoder], config: TrainConfig, mesh: Mesh) -> None:
    """Makes the layers that N:M sparsity names prune their weights as they compute. Raises ValueError where they are to
    be multiplied in the hardware's form and this device has none."""
    choice, shapes = config.sparsity, parameter_shapes(config.model)
    if not isinstance(choice, NM):
        return
    names = sparse_layers(choice, shapes)
    fast = faster_shapes(config, {shapes[name] for name in names}, mesh) if choice.semi_structured else set()
    for semi_structured in (False, True):
        some = {name for name in names if (shapes[name] in fast) == semi_structured}
        for stage in stages:
            use_nm(stage, some, choice.n, choice.m, choice.backward, semi_structured)


def faster_shapes(config: TrainConfig, shapes: set[torch.Size], mesh: Mesh) -> set[torch.Size]:
    """Those of `shapes` whose products rank 0 measures to be faster in the hardware's 2:4 form than dense; the same on all
    ranks. Raises ValueError where the device cannot."""
    assert isinstance(config.sparsity, NM)
    dtype, tokens = compute_dtype(config.precision), config.batch.micro_size * config.batch.seq_len // mesh.sharers
    for shape in shapes:
        if problem := semi_structured_problem(mesh.device, dtype, config.sparsity.n, config.sparsity.m, shape):
            raise ValueError(f"sparsity.semi_structured: {problem}; give sparsity.semi_structured=false")
    found: list[set[torch.Size]] = [set()]
    if mesh.rank == 0:
        backward = config.sparsity.backward
        gains = {
            shape: measure_semi_structured(shape, tokens, dtype, mesh.device, backward) for shape in sorted(shapes)
        }
        for shape, gain in gains.items():
            log.warning("2:4 form of %s: %.2f x dense, %s", tuple(shape), gain, "used" if gain > 1 else "not used")
        found = [{shape for shape, gain in gains.items() if gain > 1}]
    dist.broadcast_object_list(found, src=0, group=mesh.save_group)
    return found[0]
