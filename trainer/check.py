"""Every rule that crosses rooms, in one place: what does not compose is refused before a run starts."""

import math
from dataclasses import replace
from typing import Any

from rowwise.optim.build import CYCLED, ELEMENTWISE, assigned, check_optimizer, is_elementwise
from rowwise.optim.lengths import read_length
from rowwise.optim.lion import LionConfig
from rowwise.optim.schedules import LrRange, OneCycle, check_schedule
from rowwise.optim.sparse.check import check_sparsity
from rowwise.optim.sparse.config import NM, starts_at_random
from rowwise.parallel.mesh import ParallelConfig, resolve_degrees
from rowwise.parallel.precision import check_precision
from rowwise.parallel.sequence import check_heads
from rowwise.trainer.config import TrainConfig, tree_of
from rowwise.trainer.data.batches import check_batch
from rowwise.trainer.keys import check_folder_name
from rowwise.trainer.manifest import check_checkpoint
from rowwise.trainer.models.decoder import check_model, parameter_shapes
from rowwise.trainer.run_length import MOST_STEPS
from rowwise.trainer.spike import check_spike, check_way_back
from rowwise.trainer.stages import check_pipeline, splits_backward
from rowwise.trainer.tracker import check_tracker
from rowwise.trainer.watching import check_profile

MOST_WORKERS = 1024  # of a machine
MOST_SAMPLED = 1_000_000
A_YEAR = 365 * 24 * 3600


def check(config: TrainConfig, world_size: int) -> TrainConfig:
    """Refuses what does not compose on `world_size` workers, and returns the configuration with the degrees of the mesh
    filled in. Needs no process group. Raises ValueError."""
    _refuse_non_numbers(tree_of(config), "")
    _check_numbers(config)
    check_folder_name("name", config.name)
    if not config.run_dir:
        raise ValueError("run_dir is empty: give the folder of the run, such as runs/NAME")
    check_model(config.model)
    check_optimizer(config.optim, parameter_shapes(config.model))
    _check_stable_embedding(config)
    check_schedule(config.schedule, config.known_steps)
    _check_momentum(config)
    _check_range_test(config)
    check_precision(config.precision)
    check_sparsity(config.sparsity, parameter_shapes(config.model), config.known_steps)
    check_checkpoint(config.checkpoint)
    _check_eval(config)
    parallel = resolve_degrees(config.parallel, world_size)
    check_batch(config.batch, parallel.data_degree)
    check_heads(config.model.heads, parallel.ulysses)
    micro_batches = config.batch.global_size // config.batch.micro_size // parallel.data_degree
    check_pipeline(parallel, config.model.layers, micro_batches, config.steps)
    _check_compile(config, parallel, micro_batches)
    _check_post_validation(config, parallel)
    _check_param_dtype(config, parallel, micro_batches)
    _check_in_backward(config, parallel, micro_batches)
    range_test = isinstance(config.schedule, LrRange)
    check_spike(config.on_spike, config.spike, config.optim.in_backward, range_test)
    if config.on_spike == "rollback":
        check_way_back(config.checkpoint.every, config.length if config.known_steps else None)
    _check_sparsity(config, parallel)
    check_profile(config.profile, config.known_steps, world_size)
    check_tracker(config.tracker)
    return replace(config, parallel=parallel)


def _check_numbers(config: TrainConfig) -> None:
    if not 1 <= config.steps <= MOST_STEPS:
        raise ValueError(f"steps={config.steps}: a run has at least 1 step, and at most {MOST_STEPS:,}")
    if config.clip_norm < 0:
        raise ValueError(f"clip_norm={config.clip_norm}: the largest gradient norm, or 0 for off")
    if config.nproc is not None and not 1 <= config.nproc <= MOST_WORKERS:
        raise ValueError(f"nproc={config.nproc}: a machine has 1 to {MOST_WORKERS} workers; null is one a GPU, or one")
    if not 1 <= config.parallel.timeout_seconds <= A_YEAR:
        raise ValueError(f"parallel.timeout_seconds={config.parallel.timeout_seconds}: give 1 to {A_YEAR}, a year")
    if not config.log_every:
        raise ValueError("log_every=0: it is at least 1 step")
    if config.peak_flops is not None and config.peak_flops <= 0:
        raise ValueError(f"peak_flops={config.peak_flops}: FLOP/s of one device, 989e12 say; null: by its name")


def _refuse_non_numbers(tree: dict[str, Any], path: str) -> None:
    for key, value in tree.items():
        if isinstance(value, dict):
            _refuse_non_numbers(value, f"{path}{key}.")
        elif isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{path}{key}={value}: give a finite number")


def _check_param_dtype(config: TrainConfig, parallel: ParallelConfig, micro_batches: int) -> None:
    if config.optim.param_dtype is None:
        return
    if config.precision.name != "bf16":
        raise ValueError(
            f"optim.param_dtype=bf16 with precision={config.precision.name}: parameters kept in bf16 compute in bf16; "
            "give precision=bf16, or leave optim.param_dtype=null"
        )
    # A pipeline adds up whole gradients in 32 bits and splits them once.
    if parallel.zero >= 2 and micro_batches > 1 and parallel.pipeline == 1:
        raise ValueError(
            f"optim.param_dtype=bf16 with parallel.zero={parallel.zero} and {micro_batches} micro-batches a step: "
            "split gradients would be added up in bf16; give parallel.zero=1, or "
            f"batch.micro_size={config.batch.micro_size * micro_batches}"
        )


def _check_compile(config: TrainConfig, parallel: ParallelConfig, micro_batches: int) -> None:
    if config.compile and parallel.pipeline > 1 and splits_backward(parallel, micro_batches):
        raise ValueError(
            f"compile=true with parallel.pipeline_schedule={parallel.pipeline_schedule}: a compiled block computes its "
            "input and weight gradients together; give compile=false, or gpipe, 1f1b or interleaved_1f1b"
        )


def _check_post_validation(config: TrainConfig, parallel: ParallelConfig) -> None:
    if parallel.post_validation and not is_elementwise(config.optim):
        kappa = f" optim.kappa={config.optim.kappa}" if isinstance(config.optim, LionConfig) else ""
        raise ValueError(
            f"parallel.post_validation with optim={config.optim.name}{kappa}: its step exchanges messages or draws on a basis "
            f"that one rank cannot take back alone; possible are {', '.join(ELEMENTWISE)} (lion with optim.kappa=l1, rows or "
            "huber), or parallel.post_validation=false"
        )


def _check_in_backward(config: TrainConfig, parallel: ParallelConfig, micro_batches: int) -> None:
    if not config.optim.in_backward:
        return
    if read_length("log.norms_every", config.log.norms_every).amount:
        raise ValueError(
            f"log.norms_every={config.log.norms_every} with optim.in_backward: no gradient is left when the step is over; give "
            "log.norms_every=0, or optim.in_backward=false"
        )
    if parallel.pipeline > 1:
        raise ValueError(
            f"optim.in_backward with parallel.pipeline={parallel.pipeline}: a stage's gradient is complete only after the "
            "last of many micro-batches; give parallel.pipeline=1, or optim.in_backward=false"
        )
    if config.clip_norm:
        raise ValueError(
            f"optim.in_backward with clip_norm={config.clip_norm}: the global norm is known only when every gradient "
            "has been used; give clip_norm=0, or optim.in_backward=false"
        )
    if micro_batches > 1:
        needed = config.batch.global_size // micro_batches
        raise ValueError(
            f"optim.in_backward with {micro_batches} micro-batches a step: the second would meet changed parameters; "
            f"give batch.micro_size={config.batch.micro_size * micro_batches} or batch.global_size={needed}, "
            "or optim.in_backward=false"
        )
    if config.precision.name == "fp16":
        raise ValueError(
            "optim.in_backward with precision=fp16: an overflow is known only when parameters have changed; "
            "give precision=bf16, or optim.in_backward=false"
        )
    split = parallel.state_degree if parallel.zero > 0 else 1
    copies = config.precision.name == "bf16"  # FSDP2 holds the parameters, and the sums over replicas until the end
    if parallel.replicate * parallel.state_degree > split and (split > 1 or copies):
        raise ValueError(
            f"optim.in_backward with parallel.replicate={parallel.replicate} parallel.zero={parallel.zero}: gradients "
            "that FSDP2 sums over replicas stay until the backward ends; give parallel.replicate=1 and parallel.zero=1 "
            "to 3, or optim.in_backward=false"
        )


def _check_sparsity(config: TrainConfig, parallel: ParallelConfig) -> None:
    name = config.sparsity.name
    if name == "none":
        return
    if config.optim.in_backward:
        raise ValueError(
            f"optim.in_backward with sparsity={name}: masks cut every gradient before the step; give optim.in_backward=false"
        )
    if parallel.post_validation:
        raise ValueError(
            f"parallel.post_validation with sparsity={name}: a change of masks is not undone; give "
            "parallel.post_validation=false"
        )
    if config.model.init_from is not None and starts_at_random(config.sparsity, config.steps):
        raise ValueError(
            f"sparsity={name} with model.init_from={config.model.init_from}: a random mask would throw away most of what it "
            "learned; give sparsity.start_at=1 or later, which keeps the largest weights, or gradual, st3, pdp, pdp_rows, "
            "pdp_nm or nm"
        )
    if (
        isinstance(config.sparsity, NM)
        and config.sparsity.semi_structured
        and config.precision.name not in ("bf16", "fp16")
    ):
        raise ValueError(
            f"sparsity.semi_structured with precision={config.precision.name}: the hardware multiplies 16-bit numbers; give "
            "precision=bf16 or fp16, or sparsity.semi_structured=false"
        )


def _check_momentum(config: TrainConfig) -> None:
    cycle = config.schedule.momentum if isinstance(config.schedule, OneCycle) else None
    if cycle is not None and config.optim.name not in CYCLED:
        raise ValueError(
            f"schedule.momentum={cycle} with optim={config.optim.name}: its matrices have no beta1 to cycle; possible are "
            f"{', '.join(CYCLED)}, or schedule.momentum=null"
        )


def _check_range_test(config: TrainConfig) -> None:
    if isinstance(config.schedule, LrRange) and config.parallel.post_validation:
        raise ValueError(
            "schedule=lr_range with parallel.post_validation: a test ends after a step whose loss blew up, when the next has "
            "begun; give parallel.post_validation=false"
        )


def _check_stable_embedding(config: TrainConfig) -> None:
    rule = assigned("embed.weight", config.optim)
    if config.model.stable_embedding and rule.endswith("8bit"):
        raise ValueError(
            f"model.stable_embedding=true keeps the embedding's states in 32 bits, and optim.assign gives it {rule}; "
            f"give it {rule.removesuffix('8bit')} or own, or model.stable_embedding=false"
        )


def _check_eval(config: TrainConfig) -> None:
    if config.eval.batches < 1:
        raise ValueError(f"eval.batches={config.eval.batches}: evaluate over at least 1 batch; eval.every=0 is off")
    if config.eval.every and config.data.holdout == 0:
        raise ValueError(
            "eval.every is on and data.holdout=0 holds nothing out; give data.holdout a share, or eval.every=0"
        )
    if (config.sample.tokens or 0) < 0 or config.sample.temperature < 0:
        raise ValueError("sample.tokens and sample.temperature are at least 0")
    if (config.sample.tokens or 0) > MOST_SAMPLED:
        raise ValueError(f"sample.tokens={config.sample.tokens}: each takes a forward; give at most {MOST_SAMPLED:,}")
