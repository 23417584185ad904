"""The model of a run, as plain modules without memory: `trainer.parallelize` puts it on the mesh."""

import torch

from rowwise.parallel.activations.compress import tokens_on
from rowwise.parallel.mesh import Mesh
from rowwise.parallel.sequence import attention_on
from rowwise.trainer.adapters.convert import adapt
from rowwise.trainer.adapters.specs import run_specs
from rowwise.trainer.config import TrainConfig
from rowwise.trainer.models.decoder import Decoder
from rowwise.trainer.pipeline import StagedDecoder, make_plan


def build_model(config: TrainConfig, mesh: Mesh) -> Decoder | StagedDecoder:
    """Builds the decoder, or this rank's stages of it, with its adapter, on the meta device."""
    attend, axis, specs = attention_on(mesh), mesh.pipeline, run_specs(config)
    tokens = tokens_on(mesh, config.batch.seq_len)
    if axis is None:
        with torch.device("meta"):
            model = Decoder(config.model, attend=attend, fused_loss=config.memory.fused_loss)
        return adapt(model, config.adapter, specs, config.seed, tokens)
    plan = make_plan(config, mesh)
    with torch.device("meta"):
        mine = plan.schedule.stages_of(axis.rank)
        fused = config.memory.fused_loss
        decoders = {stage: Decoder(config.model, plan.layers[stage], attend, fused) for stage in mine}
    for decoder in decoders.values():
        adapt(decoder, config.adapter, specs, config.seed, tokens)
    return StagedDecoder(decoders, plan.schedule)
