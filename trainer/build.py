"""The model of a run, as plain modules without memory: `trainer.parallelize` puts it on the mesh."""

import torch

from rowwise.parallel.mesh import Mesh
from rowwise.parallel.sequence import attention_on
from rowwise.trainer.config import TrainConfig
from rowwise.trainer.models.decoder import Decoder
from rowwise.trainer.pipeline import StagedDecoder, make_plan


def build_model(config: TrainConfig, mesh: Mesh) -> Decoder | StagedDecoder:
    """Builds the decoder, or this rank's stages of it, on the meta device."""
    attend, axis = attention_on(mesh), mesh.pipeline
    if axis is None:
        with torch.device("meta"):
            return Decoder(config.model, attend=attend, fused_loss=config.memory.fused_loss)
    plan = make_plan(config, mesh)
    with torch.device("meta"):
        mine = plan.schedule.stages_of(axis.rank)
        fused = config.memory.fused_loss
        decoders = {stage: Decoder(config.model, plan.layers[stage], attend, fused) for stage in mine}
        return StagedDecoder(decoders, plan.schedule)
