"""What the loss of a micro-batch holds, with its logits or without, in bytes. N tokens, V words, c the width of computation and w that
of sums, at least 32 bits.

Whole logits: in the forward z, a wide copy where that is another, and its log-softmax, which stays; in the backward that, and the
gradients of both, 3 w N V; with a cap its tanh, which stays too. Without them see `kernels.cross_entropy.loss_bytes`: the gradient of
the head, and that of its input, are made in the forward where the loss is told what it will be multiplied by, and in the backward
elsewhere.
"""

from dataclasses import dataclass
from typing import Literal

from rowwise.kernels.cross_entropy import loss_bytes, sums_bytes
from rowwise.kernels.spec import ParameterSpec
from rowwise.trainer.adapters.specs import run_specs
from rowwise.trainer.config import TrainConfig
from rowwise.trainer.models.specs import EMBEDDING, HEAD


@dataclass(frozen=True)
class LossWork:
    """Bytes at most in the `forward`, `kept` from there to the backward, at most in the `backward`, and `deferred` for the head's
    gradient, which takes `head` bytes and is made where `makes` says, within the loss or after it, where other gradients take
    `after`. `needs_input`: the backward needs what the head takes, `input` bytes; `tied`: the head is the embedding, whose gradient is
    complete when that of the look-up is added."""

    forward: int
    kept: int
    backward: int
    deferred: int
    head: int
    makes: Literal["forward", "backward", "after"]
    needs_input: bool
    tied: bool
    after: int = 0
    input: int = 0


def head_spec(config: TrainConfig) -> ParameterSpec:
    """Gives the spec of the matrix that makes logits."""
    return run_specs(config)[EMBEDDING if config.model.tie_embeddings else HEAD]


def loss_work(config: TrainConfig, tokens: int, width: int, split: bool, gpu: bool) -> LossWork:
    """Counts what the loss of so many tokens holds."""
    model, wide, pipelined = config.model, max(4, width), config.parallel.pipeline > 1
    tied, learns = model.tie_embeddings and not pipelined, not head_spec(config).frozen
    head, capped = model.vocab_size * model.dim * width * learns, model.logit_cap is not None
    given = tokens * model.dim * width
    if not config.memory.fused_loss:
        numbers = tokens * model.vocab_size
        made = 3 if capped else 1 + (width < wide)  # of wide numbers, beside what the head gives
        deferred = numbers * width * split * learns
        after = numbers * width + given
        forward, kept, backward = (
            numbers * (width + made * wide),
            (1 + capped) * numbers * wide,
            (3 + capped) * numbers * wide,
        )
        return LossWork(forward, kept, backward, deferred, head, "after", learns, tied, after, given)
    at_once = width >= 4 and not pipelined and learns
    device = "cuda" if gpu else "cpu"
    most = loss_bytes(tokens, model.dim, model.vocab_size, width, at_once, device, capped, learns)
    if at_once:
        return LossWork(most, given, given, 0, head, "forward", False, tied, input=given)
    sums = sums_bytes(tokens, model.vocab_size, width, device)
    return LossWork(sums, tokens * wide, most, 0, head, "backward", True, tied, input=given)
