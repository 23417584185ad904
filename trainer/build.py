"""The model of a run on its mesh, and what keeps it sparse."""

from pathlib import Path

import torch

from rowwise.optim.sparse.build import Sparsity, build_sparsity
from rowwise.parallel.mesh import Mesh
from rowwise.parallel.precision import compute_dtype, master_dtype
from rowwise.parallel.replicate import replicate_model
from rowwise.parallel.sequence import attention_on
from rowwise.parallel.shard import is_split, materialize, merge_parts, policy, shard_model
from rowwise.trainer.config import TrainConfig
from rowwise.trainer.models.decoder import Decoder, parameter_specs
from rowwise.trainer.models.huggingface import rows_from
from rowwise.trainer.models.init import random_rows
from rowwise.trainer.pipeline import StagedDecoder, connect_stages, make_plan
from rowwise.trainer.pruned import prune_groups


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
    source, specs = config.model.init_from, parameter_specs(config.model)
    rows = random_rows(specs, config.seed) if source is None else rows_from(Path(source).expanduser(), specs)
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
    specs, dtype = parameter_specs(config.model), compute_dtype(config.precision)
    return build_sparsity(model, config.sparsity, specs, config.seed, config.steps, stages, dtype)
