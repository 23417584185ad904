"""Gradients summed in codes: unbiased, within their bound, as many bytes as the formulas say, and runs that go on as if they had never
stopped. (Laws 3 and 4.)"""

from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from messages import Crossed, crossings
from parity import TOLERANCE, relative_error, run_together, small_config, with_layout
from rowwise.kernels.row_codes import WIDTH
from rowwise.parallel.config import ParallelConfig, resolve_degrees
from rowwise.parallel.mesh import Workers, make_mesh
from rowwise.parallel.reduce import BITS, Reduce
from rowwise.parallel.row_messages import RowMessages
from rowwise.trainer.config import TrainConfig
from rowwise.trainer.summary import header
from runs import assert_resumes_to_the_last_bit

DRAWS = 120  # rows of a matrix, all the same, each of which draws for itself
SHAPES = [torch.Size(shape) for shape in ((DRAWS, 300), (5,), (DRAWS, 31))]
NUMBERS = sum(shape.numel() for shape in SHAPES)
ONE_ROW = [torch.Size(shape) for shape in ((1, 300), (5,), (1, 31))]


class Reduced(NamedTuple):
    """What one rank got of a row: the exact sum of its slice, the mean and variance of draws, the bound on each element and on its
    variance; whether every draw was within it, and is drawn again where it should."""

    exact: Tensor
    mean: Tensor
    variance: Tensor
    bound: Tensor
    most: Tensor
    within: bool
    repeated: bool
    crossed: Crossed


def gradient(rank: int, world: int) -> Tensor:
    """One row of each matrix, and the vector, of a rank's gradient (W, n): of other sizes on each."""
    numbers = sum(shape.numel() for shape in ONE_ROW)
    return torch.randn(world, numbers, generator=torch.Generator().manual_seed(rank)) * (1 + rank)


def in_every_row(given: Tensor) -> Tensor:
    """(W, n) of one row -> (W, NUMBERS)."""
    parts = given.split([shape.numel() for shape in ONE_ROW], 1)
    return torch.cat(
        [part.repeat(1, shape.numel() // part.size(1)) for part, shape in zip(parts, SHAPES, strict=True)], 1
    )


def by_row(given: Tensor) -> Tensor:
    """(NUMBERS) -> (DRAWS, n)."""
    parts = zip(given.split([shape.numel() for shape in SHAPES]), ONE_ROW, strict=True)
    return torch.cat([part.view(-1, one.numel()).expand(DRAWS, -1) for part, one in parts], 1)


def reduce_often(workers: Workers, form: str, inner: int) -> Reduced:
    mesh = make_mesh(resolve_degrees(ParallelConfig(zero=3, inner_shard=inner), workers.world_size), workers)
    world, group = workers.world_size, mesh.states["shard"].get_group()
    reduction, q = Reduce(SHAPES, BITS[form], mesh.levels, 3, f"{workers.rank}"), 2 ** (BITS[form] - 1) - 1
    flat = in_every_row(gradient(workers.rank, world)).view(-1)

    def summed() -> Tensor:
        out = torch.empty(NUMBERS)
        reduction(out, flat, group, dist.ReduceOp.SUM)
        return out

    reduction.begin_step(0)
    with crossings(max(inner, 1)) as crossed:
        draws = summed()
    reduction.begin_step(1)
    later = summed()
    reduction.begin_step(0)
    again, second = summed(), summed()
    repeated = torch.equal(again, draws) and not torch.equal(second, again) and not torch.equal(later, again)
    every = torch.stack([gradient(rank, world)[workers.rank] for rank in range(world)]).double()
    scales = torch.stack([worth(one, q) for one in every])
    bound, most = scales.sum(0), scales.square().sum(0) / 4
    if inner:
        # A machine's sum is not far from the exact one, which its rounding is bounded by.
        sums = every.view(world // inner, inner, -1).sum(1)
        outer = torch.stack([worth(one.abs() + worst, q) for one, worst in
                             zip(sums, scales.view(world // inner, inner, -1).sum(1), strict=True)])  # fmt: skip
        bound, most = bound + outer.sum(0), most + outer.square().sum(0) / 4
    drawn = by_row(draws).double()
    within = bool(((drawn - every.sum(0)).abs() <= bound * (1 + 1e-5) + 1e-5).all())
    return Reduced(every.sum(0), drawn.mean(0), drawn.var(0), bound, most, within, repeated, crossed)


def worth(slice_: Tensor, q: int) -> Tensor:
    """Of each number (n) the worth of a code of its block; 0 in vectors."""
    found = torch.zeros_like(slice_)
    start = 0
    for shape in ONE_ROW:
        x, scale = slice_[start : start + shape.numel()].view(shape), found[start : start + shape.numel()].view(shape)
        for c in range(0, shape[-1], WIDTH) if len(shape) == 2 else ():
            scale[:, c : c + WIDTH] = x[:, c : c + WIDTH].abs().amax(1, keepdim=True) / q
        start += shape.numel()
    return found


@pytest.mark.parametrize(
    ("form", "world", "inner"),
    [
        ("int4", 4, 2),
        ("int8", 3, 0),
        *(pytest.param(*case, marks=pytest.mark.full) for case in (("int8", 4, 2), ("int4", 3, 0))),
    ],
)
def test_sums_are_right_on_the_mean_and_within_their_bound(ranks, form, world, inner):
    for reduced in ranks.run(reduce_often, world, form, inner):
        assert reduced.within and reduced.repeated
        deviation = (reduced.variance / DRAWS).sqrt()
        error = (reduced.mean - reduced.exact).abs()
        rounding = reduced.bound * 2.0**-15 + 1e-6 * reduced.exact.abs().max()  # of the bits drawn, and of float32
        # 5 sigma of each number, as the draws measure it, which may be a tenth less than it is; and of their sum.
        assert (error <= 5.5 * deviation + rounding).all()
        assert abs((reduced.mean - reduced.exact).sum()) <= 5 * deviation.square().sum().sqrt() + rounding.sum()
        assert (reduced.variance <= reduced.most * 1.6 + 1e-9).all()
        assert reduced.variance[300:305].max() < 1e-9 and reduced.variance[:300].median() > 0
        message = RowMessages(SHAPES, torch.float32, BITS[form]).bytes
        if inner:
            assert reduced.crossed.reduced_inside == 4 * message and reduced.crossed.reduced_outside == 2 * message
        else:
            assert reduced.crossed.reduced_outside == 3 * message


RUNS = {
    "zero 3, two levels": (
        4,
        {"zero": 3},
        ("precision=bf16", "parallel.inner_shard=2", "parallel.quantize_gather=int8"),
    ),
    "replicas": (4, {"zero": 2, "replicate": 2}, ()),
    "pipeline": (4, {"zero": 1, "pipeline": 2}, ("parallel.pipeline_schedule=zb_h1", "parallel.post_validation=true")),
}


@pytest.mark.parametrize(
    "name", [name if name == "pipeline" else pytest.param(name, marks=pytest.mark.full) for name in RUNS]
)
def test_a_run_goes_on_to_the_last_bit(ranks, tmp_path, name):
    world, degrees, options = RUNS[name]
    config = small_config(
        tmp_path, "precision=fp32", "parallel.quantize_reduce=int4", "checkpoint.every=2", "batch.micro_size=3",
        *options,
    )  # fmt: skip
    assert_resumes_to_the_last_bit(ranks, world, with_layout(config, world, **degrees), tmp_path, stop_at=2)


def test_a_step_is_that_of_exact_sums_but_for_what_rounding_bounds(ranks, tmp_path):
    """Where each micro-batch is summed by itself, and where ranks of a pipeline sum once; a code of int8 is worth 18 times less."""
    shared = ("precision=fp32", "clip_norm=0")
    configs: dict[tuple[str, str], TrainConfig] = {}
    for place, degrees, inner in (("zero 3", {"zero": 3}, 2), ("pipeline", {"zero": 2, "pipeline": 2}, 1)):
        for form in ("none", "int8", "int4"):
            inner_shard = f"parallel.inner_shard={inner}" if degrees["zero"] == 3 else "parallel.inner_shard=0"
            config = small_config(tmp_path, *shared, f"parallel.quantize_reduce={form}", inner_shard)
            configs[place, form] = with_layout(config, 4, **degrees)
    traces = {key: every[0] for key, every in run_together(ranks, configs, 1).items()}
    for place in ("zero 3", "pipeline"):
        exact = traces[place, "none"]
        errors = {}
        for form in ("int8", "int4"):
            drawn = traces[place, form]
            assert drawn.losses == exact.losses
            pairs = [(drawn.gradients[0][name], g) for name, g in exact.gradients[0].items()]
            errors[form] = max(relative_error(ours, theirs) for ours, theirs in pairs if theirs.ndim == 2)
            # What vectors are the sum of crosses as it is.
            assert all(relative_error(ours, theirs) < 1e-5 for ours, theirs in pairs if theirs.ndim == 1)
        # Each of two micro-batches, of up to four ranks and two machines, errs by less than 1 / q of what it has.
        assert TOLERANCE < errors["int8"] < 0.1 and 8 < errors["int4"] / errors["int8"] < 30


def test_it_is_said_as_a_run_begins(tmp_path):
    config = with_layout(small_config(tmp_path, "precision=fp32", "parallel.quantize_reduce=int4"), 2, zero=1)
    lines = header(config, 2, "cpu", "tokens", 1.0, 0)
    assert any("gradients in int4, rounded at random: " in line and "another layout" in line for line in lines)
    plain = with_layout(small_config(Path(tmp_path), "precision=fp32"), 2, zero=1)
    assert len(header(plain, 2, "cpu", "tokens", 1.0, 0)) == len(lines) - 1
