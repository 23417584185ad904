"""FSDP2 as Accelerate sets it up: its choice of what is gathered together, and all else as without it: every rule, every precision,
and checkpoints of the same rows."""

from typing import Any

from rowwise.kernels.later import Later
from rowwise.parallel.mesh import Mesh
from rowwise.parallel.shard import materialize, policy, sharded_modules, sum_over_ranks
from rowwise.trainer.accelerate.fit import EngineUnfit, require_kind
from rowwise.trainer.activations import keep_results
from rowwise.trainer.config import TrainConfig
from rowwise.trainer.engine import WholeModel
from rowwise.trainer.models.decoder import Decoder
from rowwise.trainer.offloading import leaving_share
from rowwise.trainer.parallelize import initial_rows, parameter_dtype

accelerate, utilities = Later("accelerate"), Later("accelerate.utils")


def on_fsdp2(model: Decoder, config: TrainConfig, mesh: Mesh) -> WholeModel:
    """Has Accelerate split `model`, on the meta device, over all ranks, and gives each its rows of the numbers. All ranks call it.
    Raises EngineUnfit."""
    model.to(parameter_dtype(config))
    keep_results([model], config, mesh, leaving_share(config, mesh))
    plugin = accelerate.FullyShardedDataParallelPlugin(
        fsdp_version=2,
        reshard_after_forward=config.parallel.zero == 3,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=sorted({type(block).__name__ for block in model.blocks.values()}),
        mixed_precision_policy=policy(config.precision),
        cpu_ram_efficient_loading=False,  # every rank makes its own rows
    )
    accelerator = _accelerator(plugin, mesh)
    utilities.fsdp2_prepare_model(accelerator, model)
    if len(list(sharded_modules(model))) <= config.model.layers:
        raise EngineUnfit("parallel.backend=accelerate: Accelerate has not split every layer by itself")
    sum_over_ranks(model)
    materialize(model, mesh.device, initial_rows(config))
    return WholeModel(model, mesh.device, config.parallel.zero, mesh.states["replicate"].get_group())


def _accelerator(plugin: Any, mesh: Mesh) -> Any:
    """An Accelerator with this plugin. Accelerate keeps FSDP for GPUs and the like: on processors it would run without a word of it,
    so there the plugin is handed to what splits the model. Raises EngineUnfit."""
    if mesh.device.type == "cpu":
        accelerator = accelerate.Accelerator(cpu=True)
        accelerator.state.fsdp_plugin = plugin
        return accelerator
    accelerator = accelerate.Accelerator(fsdp_plugin=plugin)
    require_kind(accelerator, "FSDP", "FSDP")
    return accelerator
