"""What of the activations a run keeps, as it is configured."""

from dataclasses import dataclass
from typing import Literal

from rowwise.conf.option import MayChange
from rowwise.conf.refusal import Refusal, Refusals


@dataclass(frozen=True)
class MemoryConfig:
    """`recompute`: what layers keep for the backward; the rest is computed again in it, the numbers are the same. `none`: everything
    stays; `selective`: what a product or attention makes; `full`: what goes into a layer; a number from 0 to 1: the share of
    a layer's bytes that may stay (never less than `full`), chosen so that the fewest operations are made again.
    `compress`: in which form what layers keep waits: `none`, as it is; `int8`, as 8-bit codes rounded at random, so that the
    backward computes with numbers that are right on the mean, and the same on every layout; the forward is the same.
    `ranges`: of those codes: `token`, each token has its own, of a head or of 256 channels; `running`, all tokens have one,
    which is a running mean over steps.
    `offload_activations`: where what layers keep waits: `none`, on the device; `cpu`, in pinned host memory; the path of a folder
    on every machine, in files without a name; the numbers are the same.
    `offload_share`: how much of it leaves: `all`; a number from 0 to 1, that share of its bytes, of the results that take the most
    operations a byte; `auto`, the share that goes away beside the forward, measured on every machine. The rest stays.
    `offload_states`: where the optimizer's states wait, and its rules step: `none`, on the device; `cpu`, in host memory, on the host;
    the path of a folder on every machine, in files without a name, on the host too; the numbers are the same.
    `offload_params`: where a rank's rows of parameters and of gradients wait: as above. `offload_gradients`: the path of a folder
    takes gradients on to files.
    `fused_loss`: the loss and its gradients are made a tile of logits at a time (`kernels.cross_entropy`); false: all logits of a
    micro-batch stand in memory, several times. `limit`: bytes of a device that the run may take; null: all of a GPU's. `fit`: a
    run that is forecast to take more is refused; false: it goes on regardless."""

    recompute: MayChange[Literal["none", "selective", "full"] | float] = "none"
    compress: MayChange[Literal["none", "int8"]] = "none"
    ranges: MayChange[Literal["token", "running"]] = "token"
    offload_activations: MayChange[str] = "none"
    offload_share: MayChange[Literal["all", "auto"] | float] = "all"
    offload_states: MayChange[str] = "none"
    offload_params: MayChange[str] = "none"
    offload_gradients: MayChange[str] = "none"
    fused_loss: MayChange[bool] = True
    limit: MayChange[float | None] = None
    fit: MayChange[bool] = True


def is_folder(where: str) -> bool:
    """Says whether what waits off the device waits in files."""
    return where not in ("none", "cpu")


RECOMPUTE: Refusals = (
    Refusal(
        ("memory.recompute",),
        lambda run: not isinstance(run.memory.recompute, str) and not 0 <= run.memory.recompute <= 1,
        "memory.recompute={memory.recompute}: none, selective, full, or the share of the activations that may stay, from 0 to 1",
    ),
    Refusal(
        ("memory.offload_share",),
        lambda run: not isinstance(run.memory.offload_share, str) and not 0 <= run.memory.offload_share <= 1,
        "memory.offload_share={memory.offload_share}: all, auto, or the share of what layers keep that leaves the device, from 0 to 1",
    ),
    Refusal(
        ("memory.offload_share", "memory.offload_activations"),
        lambda run: run.memory.offload_share != "all" and run.memory.offload_activations == "none",
        "memory.offload_share={memory.offload_share} with memory.offload_activations=none: nothing leaves the device; give "
        "memory.offload_activations=cpu or a folder, or memory.offload_share=all",
    ),
    Refusal(
        ("memory.offload_params", "memory.offload_states"),
        lambda run: run.memory.offload_params != "none" and run.memory.offload_states == "none",
        "memory.offload_params={memory.offload_params} with memory.offload_states=none: parameters that wait off the device change "
        "where their states are; give memory.offload_states=cpu or a folder, or memory.offload_params=none",
    ),
    Refusal(
        ("memory.offload_params", "parallel.zero"),
        lambda run: run.memory.offload_params != "none" and run.parallel.zero != 3,
        "memory.offload_params={memory.offload_params} with parallel.zero={parallel.zero}: what is gathered for a whole step would "
        "save nothing; give parallel.zero=3, whose layers come one by one, on one rank too, or memory.offload_params=none",
    ),
    Refusal(
        ("memory.offload_gradients", "memory.offload_params"),
        lambda run: run.memory.offload_gradients != "none" and run.memory.offload_params == "none",
        "memory.offload_gradients={memory.offload_gradients} with memory.offload_params=none: gradients wait where the parameters "
        "do; give memory.offload_params=cpu or a folder, or memory.offload_gradients=none",
    ),
    Refusal(
        ("memory.offload_gradients", "optim.in_backward"),
        lambda run: run.memory.offload_gradients != "none" and run.optim.in_backward,
        "memory.offload_gradients={memory.offload_gradients} with optim.in_backward: gradients are used as they come, and none waits; "
        "give memory.offload_gradients=none, or optim.in_backward=false",
    ),
    Refusal(
        ("memory.offload_states", "parallel.post_validation"),
        lambda run: run.memory.offload_states != "none" and run.parallel.post_validation,
        "memory.offload_states={memory.offload_states} with parallel.post_validation: a step that may be undone needs a copy of all "
        "states in memory; give parallel.post_validation=false, or memory.offload_states=none",
    ),
    Refusal(
        ("memory.limit",),
        lambda run: run.memory.limit is not None and run.memory.limit <= 0,
        "memory.limit={memory.limit}: the bytes of a device that the run may take, 70e9 say; null: all of a GPU's",
    ),
)
