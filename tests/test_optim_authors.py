"""The low-rank rules beside their authors' own classes, on tall, square and wide matrices: whole updates with `side=short`,
their size with `side=right`.

What is taken away first, so that the rest can be compared: gradients have rank r + 8, which subspace iteration finds as
exactly as their SVD; a singular vector's sign, which SVD leaves open, is ours in their projectors; their random projections
are handed ours. What stays apart: their SVD is of float32 numbers (1e-4), eps is added before bias correction, and 1e-8 to
quotients of norms (1e-6).

DCTAdamW stands for `dct` with sim_type=makhoul, whose basis is our DCT-II (the default, matmul, takes its transpose). It ranks
columns by sums of absolute values and we by sums of squares, so gradients have columns that both rank alike; it renews them at
the first step and at those that its gap divides, we at the first and every gap later, so they are renewed at all steps or at
one. Its cosines are made float64, and moments that move along with columns are no longer multiplied in place, where it reads
what it has overwritten.
"""

import contextlib
import importlib.util
import io
import sys

import pytest
import torch
from bare import bare
from torch import nn

from parity import relative_error
from rowwise.launch.compose import compose_tree
from rowwise.optim.build import build_optimizer
from rowwise.optim.lowrank.projection import random_projection
from rowwise.trainer.config import config_from_tree

RANK, REFRESH, STEPS, SEED, RATE = 4, 3, 7, 5, 0.01
SHAPES = {"tall": (60, 20), "square": (32, 32), "wide": (20, 60)}
ALL = list(SHAPES.values())
RULES = ("galore", "fira", "apollo", "apollo_mini")
BOUNDS = {"galore": 1e-4, "fira": 1e-4, "apollo": 1e-6, "apollo_mini": 1e-6}
SCALES = {"galore": {"scale": 0.25}, "fira": {"alpha": 0.25}, "apollo": {"scale": 1.0}, "apollo_mini": {"scale": 128.0}}


def gradient(shape, step, i, rank=RANK + 8):
    """With gaps between its singular values, and larger in every other step, so that limiters have something to do."""
    torch.manual_seed(100 * step + i)
    left, right = (torch.randn(size, rank, dtype=torch.float64) for size in shape)
    return 3 ** (step % 2) * left @ torch.diag(0.7 ** torch.arange(rank, dtype=torch.float64)) @ right.T


def flat_gradient(shape, step, i):
    torch.manual_seed(100 * step + i)
    return torch.randn(shape, dtype=torch.float64)


def updates_of(optimizer, weights, gradient_of, steps):
    """What every step subtracts from each weight, divided by the learning rate."""
    found = []
    for step in range(1, steps + 1):
        before = [w.detach().clone() for w in weights]
        for i, w in enumerate(weights):
            w.grad = gradient_of(w.shape, step, i)
        optimizer.step()
        found.append([(b - w.detach()) / RATE for b, w in zip(before, weights, strict=True)])
    return found


def ours(rule, *overrides, shapes=ALL, gradient_of=gradient, steps=STEPS):
    rank = [] if rule == "apollo_mini" else [f"optim.rank={RANK}"]
    choices = [f"optim={rule}", f"optim.lr={RATE}", f"optim.refresh_every={REFRESH}", *rank, *overrides]
    model = bare(nn.Module())
    for i, shape in enumerate(shapes):
        model.register_parameter(f"w{i}", nn.Parameter(torch.zeros(shape, dtype=torch.float64)))
    optimizer = build_optimizer(model, config_from_tree(compose_tree(choices)).optim, SEED)
    return updates_of(optimizer, list(model.parameters()), gradient_of, steps)


def theirs(rule, shapes=ALL, gradient_of=gradient, steps=STEPS):
    group = {"rank": RANK, "update_proj_gap": REFRESH, "proj_type": "std", **SCALES[rule]}
    if rule == "galore":
        package = module_of("galore_torch", "adamw")
    elif rule == "fira":
        package = module_of("fira", "fira_adamw")
    else:
        package = module_of("apollo_torch", "apollo")
        mini = {"rank": 1, "scale_type": "tensor"} if rule == "apollo_mini" else {"scale_type": "channel"}
        group |= {"proj": "random", **mini}
    weights = [nn.Parameter(torch.zeros(shape, dtype=torch.float64)) for shape in shapes]
    numbers = {"lr": RATE, "betas": (0.9, 0.95), "eps": 1e-8, "no_deprecation_warning": True}
    return updates_of(package.AdamW([{"params": weights, **group}], **numbers), weights, gradient_of, steps)


def module_of(package, name):
    """A module of a package whose `__init__`, which wants bitsandbytes to load, is left aside."""
    if package not in sys.modules:
        found = importlib.util.find_spec(package)
        if found is None:
            pytest.skip(f"{package} is not installed: make setup installs it")
        sys.modules[package] = importlib.util.module_from_spec(found)  # not executed
    return importlib.import_module(f"{package}.{name}")


@pytest.fixture
def as_ours(monkeypatch):
    """rule -> its authors' projector gives every singular vector our sign, the largest entry positive, or draws our
    projection, in their shape."""

    def patch(rule):
        if rule in ("galore", "fira"):
            places = {"galore": ("galore_torch", "galore_projector"), "fira": ("fira", "gradient_projection")}
            module = module_of(*places[rule])
            projector = module.GaLoreProjector if rule == "galore" else module.GradientProjector
            decompose = projector.get_orthogonal_matrix

            def matrix(self, weights, rank, type):
                found = decompose(self, weights, rank, type)
                vectors = found.T if type == "right" else found
                vectors = vectors * vectors.gather(0, vectors.abs().argmax(0, keepdim=True)).sign()
                return vectors.T if type == "right" else vectors
        else:
            projector = module_of("apollo_torch", "random_projector").GradientProjector

            def matrix(self, weights, rank, type, seed):
                # Their first seed is the number of the parameter, from 1.
                self.first_seed, self.drawn = getattr(self, "first_seed", seed), getattr(self, "drawn", -1) + 1
                name = f"w{self.first_seed - 1}"
                q = random_projection(SEED, name, self.drawn, min(weights.shape), rank, weights)
                return q.T if type == "right" else q

        monkeypatch.setattr(projector, "get_orthogonal_matrix", matrix)

    return patch


@pytest.mark.parametrize("rule", RULES)
def test_whole_updates_are_the_authors(rule, as_ours):
    as_ours(rule)
    for step, (us, vs) in enumerate(zip(ours(rule, "optim.side=short"), theirs(rule), strict=True), 1):
        for name, u, v in zip(SHAPES, us, vs, strict=True):
            assert relative_error(u, v) < BOUNDS[rule], f"{name}, step {step}"


def dct_gradient(shape, step, i):
    """Of 20 or 32 frequencies along the narrow side, each 0.6 times the one before it, in another order at every step."""
    torch.manual_seed(100 * step + i)
    n = min(shape)
    g = torch.randn(max(shape), n, dtype=torch.float64) * 0.6 ** torch.randperm(n).double() @ cosines(n)
    return g if shape[0] >= shape[1] else g.T


def cosines(n, *_):
    """The orthogonal DCT-III matrix, a frequency a row: DCT-II's transpose."""
    k = torch.arange(n, dtype=torch.float64)[:, None]
    return torch.cos(torch.pi * k * (2 * k.T + 1) / (2 * n)) * torch.where(k == 0, 1.0, 2.0).div(n).sqrt()


@pytest.fixture
def as_meant(monkeypatch):
    """Their DCTAdamW in float64, and with its one fault mended."""
    package = module_of("ista_daslab_optimizers", "fft_low_rank.dct_adamw")
    monkeypatch.setattr(package, "dct3_matrix", cosines)

    def moved_along(self, rotation, moment):
        moment.copy_(moment @ rotation if self.is_right_proj else rotation @ moment)

    monkeypatch.setattr(package.FFTLowRankProjector, "rotate_subspace", moved_along)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)  # of what they multiply a Fourier transform by
    yield
    torch.set_default_dtype(before)


def their_dct(refresh):
    package = module_of("ista_daslab_optimizers", "fft_low_rank.dct_adamw")
    settings = {"rank": RANK, "proj": "dct", "sim_type": "makhoul", "rotate_subspace": True, "update_proj_gap": refresh}
    numbers = {"lr": RATE, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.0}
    found = []
    for i, shape in enumerate(ALL):  # each by itself: it has one matrix of cosines, of the first narrow side it meets
        weight = nn.Parameter(torch.zeros(shape, dtype=torch.float64))
        with contextlib.redirect_stdout(io.StringIO()):
            optimizer = package.DCTAdamW([weight], **settings, **numbers)
            found.append(
                updates_of(optimizer, [weight], lambda shape, step, _, i=i: dct_gradient(shape, step, i), STEPS)
            )
    return [[update for (update,) in of_step] for of_step in zip(*found, strict=True)]


@pytest.mark.parametrize("refresh", [1, 100])
def test_whole_updates_on_cosines_are_the_authors(refresh, as_meant):
    every = f"optim.refresh_every={refresh}"
    mine = ours("dct", "optim.side=short", every, gradient_of=dct_gradient)
    for step, (us, vs) in enumerate(zip(mine, their_dct(refresh), strict=True), 1):
        for name, u, v in zip(SHAPES, us, vs, strict=True):
            # Their rotation leaves 1e-16 of other columns where a column is new.
            assert relative_error(u, v) < 1e-6, f"{name}, step {step}"


@pytest.mark.parametrize("rule", RULES)
def test_projected_on_the_right_tall_and_square_updates_are_the_authors_and_wide_ones_have_their_size(rule, as_ours):
    as_ours(rule)
    for us, vs in zip(ours(rule, "optim.side=right"), theirs(rule), strict=True):
        for name, u, v in zip(SHAPES, us, vs, strict=True):
            if name != "wide":
                assert relative_error(u, v) < BOUNDS[rule]
            elif rule in ("galore", "fira"):  # without the factor sqrt(60 / 20) 0.58 of theirs
                assert 0.85 < float(u.norm() / v.norm()) < 1.15


@pytest.mark.parametrize("rule", ["apollo", "apollo_mini"])
def test_randomly_projected_on_the_right_wide_updates_have_the_size_of_the_authors(rule):
    """Over 40 matrices, since a single projection may lie well or badly; theirs are drawn by their generator."""
    task = {"shapes": [SHAPES["wide"]] * 40, "gradient_of": flat_gradient, "steps": 2}
    for us, vs in zip(ours(rule, "optim.side=right", **task), theirs(rule, **task), strict=True):
        ours_norm, their_norm = (torch.stack([x.norm() for x in xs]).median() for xs in (us, vs))
        assert 0.85 < float(ours_norm / their_norm) < 1.15


@pytest.mark.parametrize("rule", ["fira", "apollo", "apollo_mini"])
def test_the_limiter_has_something_to_do(rule):
    limited, free = ours(rule), ours(rule, "optim.growth=null")
    for matrix in range(len(SHAPES)):
        assert any(float(u[matrix].norm() / v[matrix].norm()) < 0.9 for u, v in zip(limited, free, strict=True))
