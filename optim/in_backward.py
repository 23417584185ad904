"""The optimizer inside the backward (Lv et al., *LOMO*): each parameter changes as soon as its gradient is complete, and
the gradient is freed, so that never more than a few gradients live at once.

Where states wait off the device (`optim.home`), a rule that sends no messages steps in a thread of its own while the backward goes
on (Liao et al., *Fuyou*): of the gradients that it has not used yet, at most BACKLOG_BYTES stand, or one. Numbers are the same.

A global gradient norm is known only when no gradient is left to clip, and a second micro-batch would meet changed
parameters: these and what else it does not go with are refused by the rules below.
"""

import weakref
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from rowwise.conf.refusal import Refusal, Refusals
from rowwise.kernels.rows import local
from rowwise.optim.home import PORTION_BYTES
from rowwise.optim.lengths import read_length
from rowwise.optim.optimizer import Optimizer

BACKLOG_BYTES = 2 * PORTION_BYTES

IN_BACKWARD: Refusals = (
    Refusal(
        ("optim.in_backward", "log.norms_every"),
        lambda run: run.optim.in_backward and read_length("log.norms_every", run.log.norms_every).amount,
        "log.norms_every={log.norms_every} with optim.in_backward: no gradient is left when the step is over; give "
        "log.norms_every=0, or optim.in_backward=false",
    ),
    Refusal(
        ("optim.in_backward", "parallel.pipeline"),
        lambda run: run.optim.in_backward and run.parallel.pipeline > 1,
        "optim.in_backward with parallel.pipeline={parallel.pipeline}: a stage's gradient is complete only after the "
        "last of many micro-batches; give parallel.pipeline=1, or optim.in_backward=false",
    ),
    Refusal(
        ("optim.in_backward", "clip_norm"),
        lambda run: run.optim.in_backward and run.clip_norm,
        "optim.in_backward with clip_norm={clip_norm}: the global norm is known only when every gradient "
        "has been used; give clip_norm=0, or optim.in_backward=false",
    ),
    Refusal(
        ("optim.in_backward", "batch.global_size", "batch.micro_size"),
        lambda run: run.optim.in_backward and run.micro_batches > 1,
        lambda run: (
            f"optim.in_backward with {run.micro_batches} micro-batches a step: the second would meet changed "
            f"parameters; give batch.micro_size={run.batch.micro_size * run.micro_batches} or "
            f"batch.global_size={run.batch.global_size // run.micro_batches}, or optim.in_backward=false"
        ),
    ),
    Refusal(
        ("optim.in_backward", "precision.name"),
        lambda run: run.optim.in_backward and run.precision.name == "fp16",
        "optim.in_backward with precision=fp16: an overflow is known only when parameters have changed; "
        "give precision=bf16, or optim.in_backward=false",
    ),
    Refusal(
        (
            "optim.in_backward",
            "parallel.zero",
            "parallel.replicate",
            "precision.name",
            "memory.offload_params",
            "parallel.quantize_gather",
        ),
        lambda run: run.optim.in_backward and _sums_at_the_end(run),
        "optim.in_backward with parallel.replicate={parallel.replicate} parallel.zero={parallel.zero}: gradients "
        "that FSDP2 sums over replicas stay until the backward ends; give parallel.replicate=1 and parallel.zero=1 "
        "to 3, or optim.in_backward=false",
    ),
)


def _sums_at_the_end(run: Any) -> bool:
    """Whether FSDP2 holds the parameters, and the sums of their gradients over replicas until the backward is over."""
    parallel = run.parallel
    held = run.precision.name == "bf16" or run.memory.offload_params != "none" or parallel.quantize_gather != "none"
    split = parallel.state_degree if parallel.zero > 0 else 1
    return parallel.replicate * parallel.state_degree > split and (split > 1 or held)


class InBackward:
    """Hooks on every parameter of `optimizer`, for as long as this lives. `complete` makes a gradient that the backward
    has just left final: it sums it over ranks where nothing else has. `own_stream`: gives a thread its device."""

    def __init__(
        self, optimizer: Optimizer, complete: Callable[[Tensor], None], own_stream: Callable[[], None] = lambda: None
    ):
        self._optimizer, self._complete = optimizer, complete
        self._norms: dict[str, list[Tensor]] = {}
        self._apart = StepsApart(own_stream)
        ours = weakref.ref(self)  # a parameter that held its own optimizer would keep it for ever

        def take(p: Tensor) -> None:
            if (optimizer := ours()) is not None:
                optimizer._take(p)

        for group in optimizer.param_groups:
            for p in group["params"]:
                p.register_post_accumulate_grad_hook(take)

    def begin(self) -> None:
        """Begins a step, before its backward."""
        self._norms = {}
        self._optimizer.begin_step()

    def end(self) -> None:
        """Ends a step, after its backward: returns when every parameter has changed. Raises what went wrong in that."""
        self._apart.wait()

    def squares(self) -> dict[str, Tensor]:
        """Sums the squares of this rank's rows of all the gradients that were used, by the view of the mesh that they are laid
        over: float64 scalars."""
        return {view: torch.stack(norms).square().sum() for view, norms in self._norms.items()}

    @torch.no_grad()
    def _take(self, p: Tensor) -> None:
        assert p.grad is not None
        self._complete(p.grad)
        if local(p.grad).numel():
            norm = torch.linalg.vector_norm(local(p.grad), dtype=torch.float64)
            self._norms.setdefault(self._optimizer.view_of(p), []).append(norm)
        self._apart.make_room(local(p.grad).nbytes)
        if (step := self._optimizer.step_one_apart(p)) is not None:
            self._apart.begin(step, local(p.grad).nbytes)
        else:
            self._optimizer.step_one(p)
        p.grad = None


class StepsApart:
    """Steps of single parameters in a thread, in order, with few gradients that wait for theirs. The thread lives from the first of
    them until they are waited for."""

    def __init__(self, own_stream: Callable[[], None]):
        self._own_stream = own_stream
        self._thread: ThreadPoolExecutor | None = None
        self._under_way: deque[tuple[Future[None], int]] = deque()

    def make_room(self, size: int) -> None:
        """Waits until a gradient of so many bytes may stand beside those that wait."""
        while self._under_way and sum(held for _, held in self._under_way) + size > BACKLOG_BYTES:
            self._under_way.popleft()[0].result()

    def begin(self, step: Callable[[], None], size: int) -> None:
        """Begins a step, which holds a gradient of so many bytes until it is made."""
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, "step", self._own_stream)
        self._under_way.append((self._thread.submit(step), size))

    def wait(self) -> None:
        """Returns when all are made, and raises what one of them raised."""
        try:
            while self._under_way:
                self._under_way.popleft()[0].result()
        finally:
            self._under_way.clear()
            if self._thread is not None:
                self._thread.shutdown(cancel_futures=True)
                self._thread = None
