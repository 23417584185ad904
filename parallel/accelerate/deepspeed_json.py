"""The configuration that DeepSpeed is given: what the run says, and what a file of one's own adds to it.

What both say must agree; what neither says is DeepSpeed's own default.
"""

from collections.abc import Mapping
from typing import Any

Json = dict[str, Any]

# What a file may add to, beside what the run says itself: each group is DeepSpeed's own and changes how, not what, it computes.
OPEN_GROUPS = ("zero_optimization", "bf16", "fp16", "aio", "data_types", "comms_logger")
OPEN_KEYS = (
    "steps_per_print", "wall_clock_breakdown", "memory_breakdown", "dump_state", "communication_data_type", "prescale_gradients",
    "gradient_predivide_factor", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "disable_allgather",
)  # fmt: skip
# What a group may hold beside that; a group that is not here may hold anything, since it only watches. Not round_robin_gradients: what
# DeepSpeed then tells of where a parameter stands in a flat piece is of another one.
OPEN_IN = {
    "zero_optimization": (
        "contiguous_gradients", "reduce_scatter", "reduce_bucket_size", "use_multi_rank_bucket_allreduce", "allgather_partitions",
        "allgather_bucket_size", "overlap_comm", "sub_group_size",
        "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold", "stage3_model_persistence_threshold",
        "stage3_max_live_parameters", "stage3_max_reuse_distance", "stage3_module_granularity_threshold",
        "stage3_use_all_reduce_for_fetch_params", "stage3_allgather_sequential", "stage3_gather_16bit_weights_on_model_save",
        "memory_efficient_linear", "log_trace_cache_warnings", "enable_sanity_checks",
    ),
    "zero_optimization.offload_optimizer": ("nvme_path", "buffer_count", "pin_memory", "pipeline_read", "pipeline_write", "fast_init"),
    "zero_optimization.offload_param": ("nvme_path", "buffer_count", "buffer_size", "max_in_cpu", "pin_memory"),
    "bf16": ("check_grad_overflow",),
    "fp16": ("loss_scale",),
    "data_types": (),
}  # fmt: skip
# Whose word stands in the run instead.
OURS = {
    "optimizer": "optim=...",
    "scheduler": "schedule=...",
    "amp": "precision=...",
    "torch_autocast": "precision=...",
    "activation_checkpointing": "memory.recompute=...",
    "compile": "compile=...",
    "tensorboard": "tracker=tensorboard",
    "wandb": "tracker=wandb",
    "comet": "tracker=...",
    "csv_monitor": "the run's metrics.jsonl",
    "flops_profiler": "profile.steps=[FIRST,LAST]",
    "checkpoint": "checkpoint.every=...",
}


def deepspeed_json(run: Any) -> Json:
    """Returns DeepSpeed's configuration of a run, whose degrees are resolved: batches, clipping, precision, stage, where states live.
    Gradients are added up and cross ranks in 32 bits, as they do without DeepSpeed, but for `precision.reduce`."""
    asked = run.parallel.deepspeed
    zero: Json = {
        "stage": run.parallel.zero,
        "offload_optimizer": _place(asked.offload_optimizer),
        "offload_param": _place(asked.offload_params),
        "zero_hpz_partition_size": asked.hpz,
        "zero_quantized_weights": asked.qwz,
        "zero_quantized_gradients": asked.qgz,
    }
    name = run.precision.name
    return {
        "train_micro_batch_size_per_gpu": run.batch.micro_size,
        "gradient_accumulation_steps": run.micro_batches,
        "train_batch_size": run.batch.global_size,
        "gradient_clipping": float(run.clip_norm),
        "zero_optimization": zero,
        "bf16": {"enabled": name == "bf16"} | ({"check_grad_overflow": True} if name == "bf16" else {}),
        # A scale that stands still: the run moves it, as it does without DeepSpeed, and keeps it in its checkpoints.
        "fp16": {"enabled": name == "fp16"} | ({"loss_scale": run.precision.initial_scale} if name == "fp16" else {}),
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": getattr(run.precision, "reduce", "fp32"),
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 1 << 30,
    }


def _place(where: str | None) -> Json:
    """Where a kind of state lives, as DeepSpeed names it."""
    if where is None:
        return {"device": "none"}
    return {"device": "cpu"} if where == "cpu" else {"device": "nvme", "nvme_path": where}


# Where a key of a file says what an option of the run says.
OPTION = {
    "train_micro_batch_size_per_gpu": "batch.micro_size",
    "gradient_accumulation_steps": "batch.global_size / batch.micro_size / workers",
    "train_batch_size": "batch.global_size",
    "gradient_clipping": "clip_norm",
    "zero_optimization.stage": "parallel.zero",
    "zero_optimization.offload_optimizer.device": "parallel.deepspeed.offload_optimizer",
    "zero_optimization.offload_optimizer.nvme_path": "parallel.deepspeed.offload_optimizer",
    "zero_optimization.offload_param.device": "parallel.deepspeed.offload_params",
    "zero_optimization.offload_param.nvme_path": "parallel.deepspeed.offload_params",
    "zero_optimization.zero_hpz_partition_size": "parallel.deepspeed.hpz",
    "zero_optimization.zero_quantized_weights": "parallel.deepspeed.qwz",
    "zero_optimization.zero_quantized_gradients": "parallel.deepspeed.qgz",
    "bf16.enabled": "precision",
    "fp16.enabled": "precision",
    "fp16.loss_scale": "precision.initial_scale",
    "communication_data_type": "precision.reduce",
}
# Of a loss scale that the run moves itself.
SCALE = ("initial_scale_power", "loss_scale_window", "hysteresis", "min_loss_scale", "consecutive_hysteresis")


def merged(ours: Json, theirs: Mapping[str, Any], file: str) -> Json:
    """Returns `ours` with what a DeepSpeed configuration of one's own adds. `auto` stands for what the run says. Raises ValueError
    for what contradicts the run, and for what would not be read."""
    for key in theirs:
        if key in OURS:
            raise ValueError(
                f"{file}: {key!r} is not read from there; give {OURS[key]} and leave {key!r} out of the file"
            )
        if key not in ours and key not in (*OPEN_GROUPS, *OPEN_KEYS):
            known = sorted({*ours, *OPEN_GROUPS, *OPEN_KEYS})
            raise ValueError(f"{file}: unknown key {key!r}; possible are {', '.join(known)}")
    return _merged(ours, theirs, file, "")


def _merged(ours: Json, theirs: Mapping[str, Any], file: str, path: str) -> Json:
    result = dict(ours)
    for key, value in theirs.items():
        name, said = f"{path}{key}", ours.get(key)
        if value == "auto":
            continue
        if name.startswith("fp16.") and key in SCALE:
            raise ValueError(
                f"{file}: {name} is not read from there; give precision.initial_scale and leave it out of the file"
            )
        known = OPEN_IN.get(path.rstrip("."))
        if known is not None and key not in known and key not in ours:
            possible = ", ".join(sorted({*known, *ours}))
            raise ValueError(
                f"{file}: {name}={value} would not be read, or would change what is computed; possible are {possible}"
            )
        if isinstance(value, Mapping) and (said is None or isinstance(said, Mapping)):
            result[key] = _merged(dict(said or {}), value, file, f"{name}.")
        elif key in ours and value != said and name != "steps_per_print":
            option = OPTION.get(name)
            change = (
                f"; change one of the two, or give 'auto' there ({option})" if option else "; leave it out of the file"
            )
            raise ValueError(f"{file}: {name}={value} contradicts the run, which says {said}{change}")
        else:
            result[key] = value
    return result
