"""What a run asks of DeepSpeed, and what does not go together with Accelerate's engines."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Literal

from rowwise.conf.option import MayChange
from rowwise.conf.refusal import Refusal, Refusals

ENGINE = Literal["deepspeed", "fsdp2"]


@dataclass(frozen=True)
class DeepSpeedConfig:
    """`offload_optimizer`: where optimizer states and float32 parameters live and are updated: null, on the device; `cpu`; the path
    of a folder on every machine, in files (ZeRO-Infinity, stage 3). `offload_params`: likewise, where a rank's part of the
    parameters lives (stage 3). `hpz`: ranks among which a second copy of the parameters is split, for the backward's gather (1:
    none). `qwz`: weights cross in 8 bits. `qgz`: gradients cross in 4 bits. The last three are ZeRO++'s, of stage 3."""

    offload_optimizer: MayChange[str | None] = None
    offload_params: MayChange[str | None] = None
    hpz: MayChange[int] = 1
    qwz: MayChange[bool] = False
    qgz: MayChange[bool] = False


_PLAIN = DeepSpeedConfig()


def accelerated(run: Any) -> bool:
    """Says whether Accelerate's engines carry the run out."""
    return run.parallel.backend == "accelerate"


def by_deepspeed(run: Any) -> bool:
    """Says whether DeepSpeed carries the run out."""
    return accelerated(run) and run.parallel.accelerate == "deepspeed"


def _only(option: str, holds: Callable[[Any], Any], why: str, change: str) -> Refusal:
    """Refuses an option beside Accelerate's engines, whichever it is."""
    return Refusal(
        (option, "parallel.backend"),
        lambda run: accelerated(run) and holds(run),
        f"{option}={{{option}}} with parallel.backend=accelerate: {why}; give {change}, or parallel.backend=torch",
    )


def _degree(key: str) -> Refusal:
    return _only(
        f"parallel.{key}",
        lambda run: getattr(run.parallel, key) > 1,
        "it splits states over all ranks and knows no other axis",
        f"parallel.{key}=1",
    )


def _needs_deepspeed(key: str) -> Refusal:
    return Refusal(
        (f"parallel.deepspeed.{key}", "parallel.backend", "parallel.accelerate"),
        lambda run: getattr(run.parallel.deepspeed, key) != getattr(_PLAIN, key) and not by_deepspeed(run),
        f"parallel.deepspeed.{key}={{parallel.deepspeed.{key}}} with parallel.backend={{parallel.backend}}, where no DeepSpeed "
        "runs; give parallel.backend=accelerate parallel.accelerate=deepspeed, or leave it out",
    )


def _needs_stage_3(key: str, holds: Callable[[Any], Any]) -> Refusal:
    return Refusal(
        (f"parallel.deepspeed.{key}", "parallel.zero"),
        lambda run: by_deepspeed(run) and holds(run.parallel.deepspeed) and run.parallel.zero != 3,
        f"parallel.deepspeed.{key}={{parallel.deepspeed.{key}}} with parallel.zero={{parallel.zero}}: DeepSpeed has it at stage 3; "
        "give parallel.zero=3",
    )


# Rules that change every number by itself: of a flat piece of many parameters, that begins and ends anywhere.
FLAT_RULES = ("adamw", "lion")

ACCELERATED: Refusals = (
    Refusal(
        ("parallel.accelerate", "parallel.backend"),
        lambda run: not accelerated(run) and run.parallel.accelerate != "deepspeed",
        "parallel.accelerate={parallel.accelerate} with parallel.backend={parallel.backend}: it says what Accelerate drives; give "
        "parallel.backend=accelerate, or leave it out",
    ),
    Refusal(
        ("parallel.accelerate_config", "parallel.backend"),
        lambda run: not accelerated(run) and run.parallel.accelerate_config is not None,
        "parallel.accelerate_config={parallel.accelerate_config} with parallel.backend={parallel.backend}: nothing would read it; "
        "give parallel.backend=accelerate, or leave it null",
    ),
    *(_needs_deepspeed(field.name) for field in fields(DeepSpeedConfig)),
    *map(_degree, ("pipeline", "replicate", "ring", "ulysses")),
    _only(
        "parallel.zero", lambda run: run.parallel.zero == 0, "without ZeRO nothing is split", "parallel.zero=1, 2 or 3"
    ),
    _only(
        "parallel.quantize_gather",
        lambda run: run.parallel.quantize_gather != "none",
        "its engine gathers by itself (DeepSpeed in 8 bits by parallel.deepspeed.qwz=true)",
        "parallel.quantize_gather=none",
    ),
    _only(
        "parallel.quantize_reduce",
        lambda run: run.parallel.quantize_reduce != "none",
        "its engine sums by itself (DeepSpeed in 4 bits by parallel.deepspeed.qgz=true)",
        "parallel.quantize_reduce=none",
    ),
    _only(
        "parallel.inner_shard",
        lambda run: run.parallel.inner_shard,
        "its engine gathers by itself (DeepSpeed from a copy by parallel.deepspeed.hpz)",
        "parallel.inner_shard=0",
    ),
    _only(
        "parallel.post_validation",
        lambda run: run.parallel.post_validation,
        "a step waits for its norm there",
        "parallel.post_validation=false",
    ),
    _only(
        "optim.in_backward",
        lambda run: run.optim.in_backward,
        "its optimizer steps when the backward is over",
        "optim.in_backward=false",
    ),
    _only(
        "memory.offload_params",
        lambda run: run.memory.offload_params != "none",
        "it keeps rows where its own engines do",
        "memory.offload_params=none",
    ),
    _only(
        "sparsity.name",
        lambda run: run.sparsity.name != "none",
        "masks are of the rows of matrices, which it does not hold",
        "sparsity=none",
    ),
    _only(
        "compile",
        lambda run: run.compile,
        "its hooks gather inside what would be one graph",
        "compile=false",
    ),
    Refusal(
        ("precision.name", "parallel.backend"),
        lambda run: by_deepspeed(run) and run.precision.name == "fp64",
        "precision={precision.name} with parallel.backend=accelerate: DeepSpeed keeps masters of 32 bits; give precision=fp32 or "
        "bf16, parallel.accelerate=fsdp2, or parallel.backend=torch",
    ),
    Refusal(
        ("optim.name", "parallel.backend"),
        lambda run: by_deepspeed(run) and run.optim.name not in FLAT_RULES,
        "optim={optim.name} with parallel.backend=accelerate: DeepSpeed cuts parameters into flat pieces that end inside rows, and "
        f"this rule needs rows or blocks of them whole; possible are {', '.join(FLAT_RULES)}, parallel.accelerate=fsdp2, or "
        "parallel.backend=torch",
    ),
    Refusal(
        ("optim.assign", "parallel.backend"),
        lambda run: by_deepspeed(run) and any(one.rule not in (*FLAT_RULES, "own") for one in run.optim.assign),
        f"optim.assign with parallel.backend=accelerate: of DeepSpeed's flat pieces the rules {', '.join(FLAT_RULES)} can be; give "
        "these, parallel.accelerate=fsdp2, or parallel.backend=torch",
    ),
    Refusal(
        ("optim.kappa", "parallel.backend"),
        lambda run: by_deepspeed(run) and run.optim.name == "lion" and run.optim.kappa != "l1",
        "optim.kappa={optim.kappa} with parallel.backend=accelerate: its norm is of whole rows or matrices, and DeepSpeed has flat "
        "pieces; give optim.kappa=l1, parallel.accelerate=fsdp2, or parallel.backend=torch",
    ),
    Refusal(
        ("optim.param_dtype", "parallel.backend"),
        lambda run: accelerated(run) and run.optim.param_dtype is not None,
        "optim.param_dtype={optim.param_dtype} with parallel.backend=accelerate: it keeps masters of 32 bits; give "
        "optim.param_dtype=null, or parallel.backend=torch",
    ),
    Refusal(
        ("average.ema", "parallel.backend"),
        lambda run: by_deepspeed(run) and run.average.ema is not None,
        "average.ema={average.ema} with parallel.backend=accelerate: DeepSpeed has the weights in flat pieces that no average here is "
        "of; give average.ema=null, parallel.accelerate=fsdp2, or parallel.backend=torch",
    ),
    Refusal(
        ("on_spike", "parallel.backend"),
        lambda run: by_deepspeed(run) and run.on_spike != "record",
        "on_spike={on_spike} with parallel.backend=accelerate: DeepSpeed has stepped when the norm is known; give on_spike=record, or "
        "parallel.backend=torch",
    ),
    Refusal(
        ("log.norms_every", "parallel.backend"),
        lambda run: by_deepspeed(run) and run.log.norms_every not in (0, "0"),
        "log.norms_every={log.norms_every} with parallel.backend=accelerate: DeepSpeed has used and dropped the gradients when a step "
        "is over; give log.norms_every=0, or parallel.backend=torch",
    ),
    Refusal(
        ("profile.memory_step", "parallel.backend"),
        lambda run: accelerated(run) and run.profile.memory_step,
        "profile.memory_step={profile.memory_step} with parallel.backend=accelerate: what it holds is not told apart; give "
        "profile.memory_step=0, or parallel.backend=torch",
    ),
    _only(
        "memory.offload_states",
        lambda run: run.memory.offload_states != "none",
        "the engine holds the states; DeepSpeed's own is parallel.deepspeed.offload_optimizer, cpu or at stage 3 a folder",
        "memory.offload_states=none",
    ),
    Refusal(
        ("memory.compress", "parallel.backend", "parallel.zero"),
        lambda run: by_deepspeed(run) and run.parallel.zero == 3 and run.memory.compress != "none",
        "memory.compress={memory.compress} with parallel.backend=accelerate parallel.zero=3: DeepSpeed wraps what layers hand on, so "
        "one result would be rounded more than once; give memory.compress=none, parallel.zero=1 or 2, parallel.accelerate=fsdp2, or "
        "parallel.backend=torch",
    ),
    _needs_stage_3("offload_params", lambda ds: ds.offload_params is not None),
    _needs_stage_3("offload_optimizer", lambda ds: ds.offload_optimizer not in (None, "cpu")),
    _needs_stage_3("hpz", lambda ds: ds.hpz > 1),
    _needs_stage_3("qwz", lambda ds: ds.qwz),
    _needs_stage_3("qgz", lambda ds: ds.qgz),
    Refusal(
        ("parallel.deepspeed.hpz",),
        lambda run: (
            by_deepspeed(run) and (run.parallel.deepspeed.hpz < 1 or run.parallel.shard % run.parallel.deepspeed.hpz)
        ),
        "parallel.deepspeed.hpz={parallel.deepspeed.hpz}: it divides the {parallel.shard} workers",
    ),
)
