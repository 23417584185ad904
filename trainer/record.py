"""The line of metrics.jsonl that a step leaves.

Where a run's time goes: `step_seconds` is the step, with its `data_seconds` of waiting for data. Beside it, `eval_seconds`
is there in steps that evaluate, and `save_seconds` in the step after one that saves: the seconds that the save after the
step before took from the loop (a checkpoint counts on the record of its step, which is on disk before the save begins).
Where they are absent they are zero. The last save of a run is in no record.
"""

import math
from collections.abc import Sequence
from typing import Any

from rowwise.optim.sparse.account import weights_multiplied
from rowwise.optim.sparse.build import Sparsity
from rowwise.parallel.mesh import Mesh
from rowwise.trainer.config import TrainConfig
from rowwise.trainer.data.open import Data
from rowwise.trainer.feed import Fed
from rowwise.trainer.models.decoder import flops_per_token
from rowwise.trainer.peaks import model_flops_utilization, peak_memory_bytes
from rowwise.trainer.plan.load import operations_of
from rowwise.trainer.state import TrainState
from rowwise.trainer.step import StepReport


def step_record(
    config: TrainConfig,
    mesh: Mesh,
    state: TrainState,
    report: StepReport,
    loss_scale: float,
    fed: Fed,
    data: Data,
) -> dict[str, Any]:
    """Returns what every step has. `tokens_per_second` is per worker; `mfu` counts of attention the pairs that documents let see
    each other, and no gradients of what is frozen; what is not a number is null; `loss_scale` is kept in fp16."""
    tokens, seconds = config.batch.positions, fed.seconds()
    flops_per_second = operations_of(config, tokens, report.pairs) / seconds / mesh.world_size
    record = {
        "step": state.step,
        "loss": number_or_none(report.loss),
        "grad_norm": number_or_none(report.grad_norm),
        "lr": report.lr,
        "tokens": state.tokens,
        "tokens_per_second": tokens / seconds / mesh.world_size,
        "mfu": model_flops_utilization(flops_per_second, mesh.device, config.peak_flops),
        "step_seconds": seconds,
        "data_seconds": fed.data_seconds,
        "peak_memory_bytes": peak_memory_bytes(mesh.device),
    }
    if config.precision.name == "fp16":
        record |= {"loss_scale": loss_scale, "skipped_steps": state.loss_scale.skipped}
    return record | source_record("loss", data, report.by_source)


def number_or_none(value: float) -> float | None:
    """Returns what JSON can hold: a step that overflowed, or had no valid token, has no loss."""
    return value if math.isfinite(value) else None


def source_record(key: str, data: Data, losses: Sequence[float]) -> dict[str, Any]:
    """Returns what a mixture adds to the record of a loss `key`: that of each source that was read."""
    found = {label: loss for label, loss in zip(data.train.labels, losses, strict=True) if math.isfinite(loss)}
    return {f"{key}_by_source": found} if data.train.labels else {}


def sparsity_record(sparsity: Sparsity | None, config: TrainConfig, step: int) -> dict[str, Any]:
    """Returns what sparse training adds: the density, and, where masks were counted, what they do. Floating-point operations per
    token are those that are left where zeros cost nothing."""
    if sparsity is None:
        return {}
    account = sparsity.account
    if account is None:
        return {"density": sparsity.density}
    forward, backward = weights_multiplied(config.sparsity, account.active, account.sizes, step, config.steps)
    dense, weights = flops_per_token(config.model, config.batch.seq_len), sum(account.sizes)
    flops = dense / 3 - 2 * (weights - forward), dense * 2 / 3 - 2 * (2 * weights - backward)
    return {
        "density": account.density,
        "flops_per_token_forward": flops[0],
        "flops_per_token_backward": flops[1],
        "flops_of_dense": sum(flops) / dense,
        **account.record(),
    }
