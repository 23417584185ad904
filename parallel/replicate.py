"""Data parallelism where nothing is split (Li et al., *PyTorch Distributed*): gradients summed in flat buckets while
the backward goes on.

Every rank holds every parameter whole. Gradients live as views in flat buckets, in the order in which the backward
completes them; a bucket is all-reduced as soon as it is complete, once a step. Bytes a rank: parameters P, gradients P,
and no second copy of anything; each step sends and receives 2 P (n - 1) / n over n ranks.
"""

import weakref
from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist
from torch import Tensor, nn

from rowwise.kernels.rows import tensors
from rowwise.parallel.mesh import Mesh

BUCKET_BYTES = 25 << 20  # large messages cost least; the last bucket is what the backward cannot hide
_HANDLE = "gradient_buckets"
T = TypeVar("T")


class GradientBuckets:
    """The gradients of what learns of one model. Parameters are taken in reverse, since the backward completes the last first."""

    def __init__(self, model: nn.Module, group: dist.ProcessGroup):
        self._group = group
        learning = [p for p in model.parameters() if p.requires_grad][::-1]
        self._buckets = [_Bucket(params) for params in in_buckets(learning, lambda p: p.nbytes) if params]
        self._last = False
        self._launched = 0
        self._under_way: list[dist.Work] = []
        self._bucket_of = {p: bucket for bucket in self._buckets for p in bucket.views}
        ours = weakref.ref(self)  # a parameter that held its model's buckets would keep them, and the group, for ever

        def take(p: nn.Parameter) -> None:
            if (buckets := ours()) is not None:
                buckets._take(p)

        for p in self._bucket_of:
            p.register_post_accumulate_grad_hook(take)

    @property
    def flat(self) -> list[Tensor]:
        """The buckets, one flat tensor each."""
        return [bucket.flat for bucket in self._buckets]

    def begin_micro_batch(self, last: bool) -> None:
        """Says whether the coming backward is the last of the step."""
        self._last = last

    def zero(self) -> None:
        """Makes every gradient, of zeros, so that what is computed outside a backward can be added in place."""
        for bucket in self._buckets:
            for p, view in bucket.views.items():
                p.grad = view.zero_()

    def launch(self) -> None:
        """Starts to sum every bucket that is not under way, after the last backward."""
        for bucket in self._buckets[self._launched :]:
            # A parameter that this rank did not use may have been used by another.
            for p, view in bucket.views.items():
                if p.grad is None:
                    p.grad = view.zero_()
        self._launch(len(self._buckets))

    def finish(self) -> None:
        """Returns when the sums are there (on a GPU: when the stream will wait for them)."""
        self.launch()
        for work in self._under_way:
            work.wait()
        self._under_way, self._launched = [], 0
        for bucket in self._buckets:
            bucket.missing = len(bucket.views)

    def _take(self, p: nn.Parameter) -> None:
        assert p.grad is not None
        bucket = self._bucket_of[p]
        view = bucket.views[p]
        if p.grad.data_ptr() != view.data_ptr():  # the first of the step; later ones are added in place
            p.grad = view.copy_(p.grad)
        if self._last:
            bucket.missing -= 1
            complete = self._launched
            while complete < len(self._buckets) and not self._buckets[complete].missing:
                complete += 1
            self._launch(complete)

    def _launch(self, end: int) -> None:
        """In the order of the buckets, so that all ranks agree on it."""
        for bucket in self._buckets[self._launched : end] if self._group.size() > 1 else []:
            work = dist.all_reduce(bucket.flat, group=self._group, async_op=True)
            assert work is not None
            self._under_way.append(work)
        self._launched = end


class _Bucket:
    def __init__(self, params: list[nn.Parameter]):
        self.flat = params[0].new_empty(sum(p.numel() for p in params))
        pieces = self.flat.split([p.numel() for p in params])
        self.views = {p: piece.view_as(p) for p, piece in zip(params, pieces, strict=True)}
        self.missing = len(params)


def in_buckets(items: list[T], bytes_of: Callable[[T], int]) -> list[list[T]]:
    """Puts neighbours together until each bucket has BUCKET_BYTES."""
    buckets: list[list[T]] = [[]]
    held = 0
    for item in items:
        if held >= BUCKET_BYTES:
            buckets.append([])
            held = 0
        buckets[-1].append(item)
        held += bytes_of(item)
    return buckets


def replicate_model(model: nn.Module, mesh: Mesh) -> None:
    """Puts the gradients of `model`, whose parameters must exist, into buckets that are summed over all replicas."""
    setattr(model, _HANDLE, GradientBuckets(model, mesh.states["replicate"].get_group()))


def gradient_sum(model: nn.Module, group: dist.ProcessGroup) -> Callable[[Tensor], None]:
    """Returns what makes one gradient of `model` final, as the backward leaves it: its sum over `group`, the replicas, one
    all-reduce of its own, where nothing else sums it. (FSDP2 sums those of what it holds.)"""
    if any(isinstance(p, tensors.DTensor) for p in model.parameters()) or group.size() == 1:
        return lambda gradient: None

    def sum_(gradient: Tensor) -> None:
        dist.all_reduce(gradient, group=group)

    return sum_


def buckets_of(model: nn.Module) -> GradientBuckets | None:
    """Returns the buckets of a replicated model; None for one that FSDP2 splits."""
    return getattr(model, _HANDLE, None)
