"""Sparse layers on one device: right, against the references on the CPU, and how fast; and the exact selection."""

import itertools
import time
from typing import Any

import torch
import torch.nn.functional as F
from gpu_place import NotPossibleHere, Place

from rowwise.kernels.condensed import condense, condensed_linear, condensed_linear_reference
from rowwise.kernels.nm import nm_linear, prune_nm, prune_nm_reference
from rowwise.kernels.semi_structured import measure_semi_structured, semi_structured_problem
from rowwise.optim.select import Candidates, Problem, key_bits, magnitude_keys, select
from rowwise.optim.sparse.masks import pack, unpack

SHAPES = [(8, 16), (64, 48), (1024, 4096), (4096, 1024)]
TIMED = [(2048, 2048), (4096, 4096), (8192, 2048), (2048, 8192), (11008, 4096)]
TOKENS = 8192


def shapes_of(place: Place) -> list[tuple[int, int]]:
    """The small ones in a rehearsal."""
    return SHAPES[:2] if place.rehearsal else SHAPES


def check_nm(place: Place) -> dict[str, Any]:
    """Pruned by the kernel and by the reference: the same bits; then the layer against its formula in float64."""
    apart, worst = 0, 0.0
    shapes = shapes_of(place)
    sizes = itertools.product(shapes, ((2, 4), (1, 4), (4, 8)), (torch.float32, torch.bfloat16), (0, 1))
    for shape, (n, m), dtype, dim in sizes:
        w = (torch.randn(shape) * 4).round().div(4).to(dtype)  # with ties
        apart += int((prune_nm(w.to(place.device), n, m, dim).cpu() != prune_nm_reference(w, n, m, dim)).sum())
    for shape in shapes:
        w, x = torch.randn(shape, dtype=torch.float64), torch.randn(32, shape[1], dtype=torch.float64)
        dy = torch.randn(32, shape[0], dtype=torch.float64)
        here, there = (t.to(place.device).requires_grad_() for t in (x, w))
        y = nm_linear(here, there, None, 2, 4, "column")
        y.backward(dy.to(place.device))
        assert here.grad is not None and there.grad is not None
        expected = (x @ prune_nm_reference(w, 2, 4, 1).T, dy @ prune_nm_reference(w, 2, 4, 0), dy.T @ x)
        for ours, theirs in zip((y.detach(), here.grad, there.grad), expected, strict=True):
            worst = max(worst, float((ours.cpu() - theirs).abs().max() / theirs.abs().max()))
    return {"numbers_apart": apart, "largest_relative_difference": worst, "passed": apart == 0 and worst < 1e-11}


def check_semi_structured(place: Place) -> dict[str, Any]:
    """The 2:4 form of the hardware against the dense product with the same pruned weights, both backwards."""
    if problem := semi_structured_problem(place.device, torch.bfloat16, 2, 4):
        raise NotPossibleHere(problem)
    worst = 0.0
    for shape, backward in itertools.product([(1024, 2048), (2048, 512)], ("row", "column")):
        w, x = (torch.randn(s, device=place.device, dtype=torch.bfloat16) for s in (shape, (256, shape[1])))
        dy = torch.randn(256, shape[0], device=place.device, dtype=torch.bfloat16)
        results = []
        for fast in (False, True):
            here, there = x.clone().requires_grad_(), w.clone().requires_grad_()
            y = nm_linear(here, there, None, 2, 4, backward, fast)  # type: ignore[arg-type]
            y.backward(dy)
            results.append((y.detach(), here.grad, there.grad))
        for ours, theirs in zip(*results, strict=True):
            worst = max(worst, float((ours - theirs).abs().max() / theirs.abs().max()))
    return {"largest_relative_difference": worst, "passed": worst < 2e-2}


def check_condensed(place: Place) -> dict[str, Any]:
    """The Triton kernel against the reference on the CPU in float64, with rows left out."""
    worst: dict[str, float] = {}
    for shape, dtype, batch in itertools.product(shapes_of(place), (torch.float32, torch.bfloat16), (1, 7, 64)):
        w = torch.randn(shape)
        w.masked_fill_(w.abs().argsort(1).argsort(1) < shape[1] * 9 // 10, 0)[:3] = 0
        x, name = torch.randn(batch, shape[1]).to(dtype), str(dtype)
        ours = condensed_linear(x.to(place.device), condense(w.to(dtype).to(place.device))).cpu().double()
        theirs = condensed_linear_reference(x.double(), condense(w.to(dtype).double()))
        worst[name] = max(worst.get(name, 0.0), float((ours - theirs).abs().max() / theirs.abs().max()))
    limits = {"torch.float32": 1e-5, "torch.bfloat16": 2e-2}
    return {"largest_relative_difference": worst, "passed": all(worst[name] < limits[name] for name in limits)}


def check_select(place: Place) -> dict[str, Any]:
    """The k largest, and masks as bits: the same as on the CPU, ties included."""
    apart, (rows, columns, k) = 0, (77, 101, 1000) if place.rehearsal else (777, 1001, 100_000)
    for dtype, ties in itertools.product((torch.float64, torch.float32, torch.bfloat16), (False, True)):
        x = torch.randn(rows, columns)
        x = ((x * 3).round() if ties else x).to(dtype)
        masks = []
        for here in (x, x.to(place.device)):
            part = Candidates(here, 0, lambda some, here=here: magnitude_keys(here[some]))
            (cut,) = select([Problem(k, x.numel(), [part])], key_bits(dtype), [], here.device)
            mask = torch.cat([cut.takes(part, some, keys) for some, keys in part.portions()])
            masks.append(unpack(pack(mask), columns).cpu())
        apart += int((masks[0] != masks[1]).sum()) + abs(int(masks[0].sum()) - k)
    return {"weights_apart": apart, "passed": apart == 0}


def time_sparse(place: Place) -> dict[str, Any]:
    """Of bf16 layers by shape: dense over 2:4, forward and input gradient with compressing; dense over condensed at density
    0.1, one vector and 64."""
    measured: dict[str, Any] = {}
    for shape in TIMED[:1] if place.rehearsal else TIMED:
        row: dict[str, Any] = {}
        if semi_structured_problem(place.device, torch.bfloat16, 2, 4, shape) is None:
            row["dense_over_semi_structured"] = measure_semi_structured(shape, TOKENS, torch.bfloat16, place.device)
        w = torch.randn(shape, device=place.device, dtype=torch.bfloat16)
        w.masked_fill_(w.abs().argsort(1).argsort(1) < shape[1] * 9 // 10, 0)
        short = condense(w)
        for batch in (1, 64):
            x = torch.randn(batch, shape[1], device=place.device, dtype=torch.bfloat16)
            dense, sparse = (
                seconds_of(lambda x=x, w=w: F.linear(x, w), place),
                seconds_of(lambda x=x, short=short: condensed_linear(x, short), place),
            )
            row[f"dense_over_condensed_batch_{batch}"] = dense / sparse
        measured["x".join(map(str, shape))] = row
    return {"passed": True, "ratios": measured}


def seconds_of(way: Any, place: Place) -> float:
    """The mean of some calls."""
    calls = 2 if place.rehearsal else 50
    for _ in range(5):
        way()
    place.wait()
    began = time.perf_counter()
    for _ in range(calls):
        way()
    place.wait()
    return (time.perf_counter() - began) / calls
