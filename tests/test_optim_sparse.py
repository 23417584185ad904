"""How many weights are kept, of what and when; masks in bits; what an update sends; what is counted. (Law 7.)"""

import math
import random
from fractions import Fraction
from itertools import pairwise

import pytest
import torch
from bare import bare
from torch import nn
from torch.distributed.tensor import Shard, distribute_tensor

from messages import Messages
from rowwise.kernels.nm import nm_mask
from rowwise.kernels.spec import specs_of
from rowwise.launch.compose import compose_tree
from rowwise.optim.build import build_optimizer
from rowwise.optim.select import BINS
from rowwise.optim.sparse.account import weights_multiplied
from rowwise.optim.sparse.budget import budgets, densities, fallen, gradual_density, is_due, share_out, share_replaced
from rowwise.optim.sparse.build import build_sparsity
from rowwise.optim.sparse.masks import count, fill_, pack, packed_columns, unpack, zero_outside_
from rowwise.optim.sparse.soft import group_thresholds, soft_mask, soft_mask_slope, soft_row_mask, through_row_mask
from rowwise.trainer.config import config_from_tree

SHAPES = [torch.Size(shape) for shape in [(256, 256), (128, 256), (704, 256), (256, 704), (10, 3), (1, 1)]]
NUMBER = 8  # bytes of a count


@pytest.mark.parametrize("distribution", ["uniform", "er", "erk", "global"])
@pytest.mark.parametrize("density", [0.01, 0.1, 0.5, 0.9, 1.0])
def test_budgets_add_up_to_the_density_and_fit(distribution, density):
    found = budgets(SHAPES, density, distribution)
    assert sum(found) == round(density * sum(shape.numel() for shape in SHAPES))
    assert all(0 <= n <= shape.numel() for n, shape in zip(found, SHAPES, strict=True))


def test_er_gives_each_matrix_as_many_weights_per_row_and_column():
    found = densities(SHAPES, Fraction(1, 5), "er")
    free = [(d, shape) for d, shape in zip(found, SHAPES, strict=True) if d < 1]
    assert len(free) == 4
    scales = [d * shape.numel() / sum(shape) for d, shape in free]
    assert len(set(scales)) == 1
    full = [sum(shape) / shape.numel() * scales[0] for d, shape in zip(found, SHAPES, strict=True) if d == 1]
    assert len(full) == 2 and all(raw >= 1 for raw in full)


def test_sharing_out_is_exact_near_and_within_the_room():
    draw = random.Random(5)
    for _ in range(300):
        room = [draw.randrange(0, 40) for _ in range(draw.randrange(1, 7))]
        total = draw.randrange(0, sum(room) + 1)
        weights = [draw.random() + 0.01 for _ in room]
        wanted = [Fraction(total * w / sum(weights)) for w in weights]
        shares = share_out(total, wanted, room)
        assert sum(shares) == total and all(0 <= s <= r for s, r in zip(shares, room, strict=True))
        if all(w <= r for w, r in zip(wanted, room, strict=True)):
            assert all(abs(s - w) < 1 for s, w in zip(shares, wanted, strict=True))
    with pytest.raises(ValueError, match="9 do not fit into 8"):
        share_out(9, [Fraction(9)], [8])


def test_the_share_replaced_goes_from_the_first_to_nothing():
    assert share_replaced(0, 0.3, 100) == 0.3
    assert share_replaced(50, 0.3, 100) == pytest.approx(0.15)
    assert share_replaced(100, 0.3, 100) == share_replaced(120, 0.3, 100) == 0


def test_the_density_falls_with_a_cube():
    found = [gradual_density(t, 0.1, 10, 50) for t in range(60)]
    assert found[:11] == [1.0] * 11 and found[50:] == [0.1] * 10
    assert found[30] == pytest.approx(0.1 + 0.9 / 8)
    assert all(a > b for a, b in pairwise(found[10:51]))


def test_each_matrix_of_pdp_goes_along_a_line_to_its_own_end():
    """0.015 of the way an epoch, as the paper's 100 epochs have it from the 16th on; exact in total at every step."""
    sizes, ends = [600, 300, 100], [30, 160, 0]
    for t in range(120):
        way = min(1, Fraction(15, 1000) * max(0, t - 16))
        found = fallen(3 * t, sizes, ends, 3 * 16, 3 * 16 + 200)
        wanted = [n - way * (n - k) for n, k in zip(sizes, ends, strict=True)]
        assert sum(found) == round(sum(wanted)) and all(abs(n - w) < 1 for n, w in zip(found, wanted, strict=True))


def paper_mask(size, threshold, temperature):
    """m(w) of PDP: the second of a softmax over t^2 / tau and w^2 / tau."""
    return (torch.stack([threshold.expand_as(size) ** 2, size**2]) / temperature).softmax(0)[1]


def test_soft_masks_are_the_papers_and_so_are_their_gradients():
    torch.manual_seed(3)
    w, g, tau = torch.randn(6, 16, dtype=torch.float64, requires_grad=True), torch.randn(6, 16).double(), 0.4
    dense, t = w.detach(), torch.tensor(0.7, dtype=torch.float64)
    ours = soft_mask(dense, 0.7, tau) * dense, g * soft_mask_slope(dense, 0.7, tau)
    assert_close(ours, w, paper_mask(w, t, tau) * w, g)
    # Groups of 4: between the second and the third of each.
    ordered = dense.abs().view(-1, 4).sort(dim=1).values
    t = ((ordered[:, 1] + ordered[:, 2]) / 2).repeat_interleave(4).view_as(dense)
    assert torch.equal(group_thresholds(dense, 2, 4), t)
    ours = soft_mask(dense, t, tau) * dense, g * soft_mask_slope(dense, t, tau)
    assert_close(ours, w, paper_mask(w, t, tau) * w, g)
    assert torch.equal(soft_mask(dense, t, tau) > 0.5, nm_mask(dense, 2, 4))
    # Rows: of their norms.
    t = torch.tensor(3.8, dtype=torch.float64)
    ours = soft_row_mask(dense, 3.8, tau) * dense, through_row_mask(g, dense, 3.8, tau)
    assert_close(ours, w, paper_mask(w.norm(dim=1, keepdim=True), t, tau) * w, g)
    assert 0 < int((soft_row_mask(dense, 3.8, tau) > 0.5).sum()) < 6


def assert_close(ours, w, theirs, g):
    right = theirs.detach(), torch.autograd.grad(theirs, w, g)[0]
    torch.testing.assert_close(ours, right, rtol=1e-12, atol=1e-14)


def test_times_are_shares_of_the_run_or_steps():
    """As the papers have them: gradual prunes what has learned something, st3 from 5 % to 50 %, pdp 16 to 83 epochs of 100."""
    times = {"gradual": (20, 150), "st3": (10, 100), "pdp": (32, 166), "pdp_nm": (32, 166), "rigl": (0, 150)}
    for method, expected in times.items():
        assert times_of(f"sparsity={method}") == expected
    assert times_of("sparsity=st3", "sparsity.start=0.25", "sparsity.stop_at=77") == (50, 77)
    assert times_of("sparsity=st3", "sparsity.start_at=3", "sparsity.stop=1") == (3, 200)


def times_of(*overrides):
    config = config_from_tree(compose_tree(list(overrides))).sparsity
    return config.first_step(200), config.last_step(200)


def test_updates_are_due_from_the_start_on_and_at_the_stop():
    assert [t for t in range(30) if is_due(t, 5, 3, 17)] == [3, 8, 13, 17]


@pytest.mark.parametrize("columns", [1, 7, 8, 9, 64, 601])
def test_masks_come_back_from_their_bits(columns):
    torch.manual_seed(columns)
    mask = torch.rand(5, columns) < 0.4
    packed = pack(mask)
    assert packed.shape == (5, packed_columns(columns)) and packed.dtype == torch.uint8
    assert torch.equal(unpack(packed, columns), mask)
    assert int(count(packed, columns)) == int(mask.sum())
    for column in range(columns):  # the layout that checkpoints hold
        assert torch.equal(packed[:, column // 8] >> (column % 8) & 1, mask[:, column].to(torch.uint8))
    full = torch.zeros_like(packed)
    fill_(full, columns)
    assert torch.equal(full, pack(torch.ones_like(mask))) and count(full, columns) == 5 * columns
    assert unpack(packed[:0], columns).shape == (0, columns)


def test_what_is_outside_of_a_mask_counts_for_nothing():
    x = torch.tensor([[1.0, math.nan, 3.0], [math.inf, 5.0, -6.0]])
    zero_outside_(x, pack(torch.tensor([[True, False, True], [False, False, True]])))
    assert x.tolist() == [[1, 0, 3], [0, 0, -6]]


def sent_by_updates(workers, methods, sizes):
    torch.distributed.init_process_group("gloo", store=workers.store, rank=workers.rank, world_size=workers.world_size)
    line = torch.distributed.init_device_mesh("cpu", (workers.world_size,))
    return {(method, rows): sent_by_update(line, method, rows) for method in methods for rows in sizes}


def sent_by_update(line, method, rows):
    """(calls, bytes) of the step of a first update, over 3 matrices, without those of the optimizer."""
    every = [] if method in ("nm", "pdp_nm") else ["sparsity.update_every=1"]
    model, shapes = bare(nn.Module()), {f"w{i}": torch.Size((rows, 24 + 8 * i)) for i in range(3)}
    torch.manual_seed(1)
    for name, shape in shapes.items():
        model.register_parameter(name, nn.Parameter(on_line(line, torch.randn(shape))))
    config = config_from_tree(compose_tree([*UPDATES[method][0], *every, "steps=8"]))
    optimizer = build_optimizer(model, config.optim)
    sparsity = build_sparsity(model, config.sparsity, specs_of(model), 0, config.steps, None, torch.float32)
    for p in model.parameters():
        p.grad = on_line(line, torch.randn(p.shape))
    with Messages() as messages:
        sparsity.filter_gradients(1)
        sparsity.step(optimizer, 1, True)
    assert sparsity.account is not None
    return dict(messages.calls), messages.bytes["allreduce_"]


def on_line(line, tensor):
    """Its rows on this rank; every rank has the whole."""
    return distribute_tensor(tensor, line, [Shard(0)], src_data_rank=None)


# What an update of 3 matrices reduces: problems of 4 (or, at random, 5) digits; and numbers of single matrices.
UPDATES = {
    "set": (["sparsity=set"], 6 * 5 * BINS, 3),
    "rigl": (["sparsity=rigl"], 6 * 4 * BINS, 3),
    "rigl redistribute": (["sparsity=rigl", "sparsity.redistribute=true"], 4 * 4 * BINS, 6),
    # The second count of each row's salient weights goes up to 7, of a fan-in of 8 without ablation.
    "srigl": (["sparsity=srigl"], 9 * 4 * BINS, 3 * (1 + 8 + 1)),
    "gradual": (["sparsity=gradual", "sparsity.stop_at=1"], 3 * 4 * BINS, 0),
    "st3": (["sparsity=st3", "sparsity.stop_at=1"], 4 * BINS, 1),
    "st3 by matrix": (["sparsity=st3", "sparsity.stop_at=1", "sparsity.distribution=er"], 3 * 4 * BINS, 3),
    # Of all matrices together once, and of each of three; and how many each of them is to keep.
    "pdp": (["sparsity=pdp", "sparsity.stop_at=1"], (1 + 3) * 4 * BINS, 3 + 3),
    "pdp by matrix": (["sparsity=pdp", "sparsity.stop_at=1", "sparsity.distribution=er"], 3 * 4 * BINS, 3),
    "pdp_rows": (["sparsity=pdp_rows", "sparsity.stop_at=1"], 3 * 4 * BINS, 3),
    "pdp_nm": (["sparsity=pdp_nm", "sparsity.stop_at=1"], 0, 0),
    "nm": (["sparsity=nm", "sparsity.account_every=1"], 0, 0),
}


@pytest.fixture(scope="module")
def sent_by(ranks):
    """Of each rank, (method, rows) -> what its update sends; in one call, for DTensor learns the mesh of each anew."""
    return ranks.run(sent_by_updates, 2, list(UPDATES), (16, 1024))


@pytest.mark.parametrize("method", UPDATES)
def test_an_update_sends_counts_that_do_not_grow_with_the_model(sent_by, method):
    _, histograms, numbers = UPDATES[method]
    for rows in (16, 1024):
        account = 5 * 3
        for calls, sent in (rank[method, rows] for rank in sent_by):
            assert set(calls) == {"allreduce_"}
            assert sent == NUMBER * (histograms + numbers + account)


# The living rows of 256 after updates 1, 11, 21, ... of the authors' own class (calgaryml/condensed-sparsity at 3052bb8,
# RigLConstFanScheduler with dynamic ablation, gamma 0.95, uniform, density 0.1, an update every 2 of 120 steps of AdamW,
# T_end 160), from the start and on the data below.
AUTHORS_LIVING = (101, 102, 102, 102, 102, 102)


def test_as_many_rows_live_as_with_the_authors_class():
    """59 updates: the fan-in that rows are judged by does not grow as others die."""
    shape, generator = torch.Size((256, 256)), torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator, dtype=torch.float64) / 16
    first = torch.rand(shape, generator=generator, dtype=torch.float64).argsort(1)[:, :25]
    rows = torch.linspace(0.25, 2, 256, dtype=torch.float64)[:, None]
    teacher = torch.randn(shape, generator=generator, dtype=torch.float64) / 16 * rows
    mask = torch.zeros(shape, dtype=torch.bool).scatter_(1, first, True)
    model = bare(nn.Module())
    model.register_parameter("blocks", nn.Parameter(weight * mask))
    overrides = ["sparsity=srigl", "sparsity.density=0.1", "sparsity.update_every=2", "sparsity.stop_at=160"]
    optim = ["optim=adamw", "optim.lr=0.003", "optim.weight_decay=0", "steps=200"]
    config = config_from_tree(compose_tree([*overrides, *optim]))
    optimizer = build_optimizer(model, config.optim)
    sparsity = build_sparsity(model, config.sparsity, specs_of(model), 0, config.steps, None, torch.float64)
    sparsity.named_state()["blocks.mask"].copy_(pack(mask))
    living = []
    with torch.no_grad():
        model.blocks.copy_(weight * mask)
    for step in range(1, 120):
        x = torch.randn(64, 256, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        model.blocks.grad = (x @ (model.blocks.detach() - teacher).T).T @ x / 64
        sparsity.filter_gradients(step)
        sparsity.step(optimizer, step, True)
        if step % 2 == 0:
            living.append(256 - sparsity.account.dead[0])
    assert len(living) == 59
    assert all(abs(ours - theirs) <= 0.1 * theirs for ours, theirs in zip(living[::10], AUTHORS_LIVING, strict=True))


def flops(overrides, step, active=20, size=100, steps=100):
    return weights_multiplied(config_from_tree(compose_tree(overrides)).sparsity, [active], [size], step, steps)


def test_weights_multiplied_are_those_of_each_method():
    assert flops(["sparsity=static"], 5) == (20, 40)
    assert flops(["sparsity=set"], 5) == (20, 40)
    assert flops(["sparsity=rigl", "sparsity.update_every=4"], 5) == (20, 20 + (3 * 20 + 100) / 4)
    assert flops(["sparsity=rigl"], 75) == (20, 40)  # no more updates
    assert flops(["sparsity=st3"], 5) == (20, 120)
    assert flops(["sparsity=nm"], 5) == (20, 120)
    for form in ("pdp", "pdp_rows", "pdp_nm"):
        assert flops([f"sparsity={form}"], 16) == (100, 200)  # soft
        assert flops([f"sparsity={form}"], 84) == (20, 40)
