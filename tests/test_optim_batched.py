"""A parameter that is a batch of matrices follows every rule as so many matrices would, on one rank and split over two. (Law 2.)"""

import functools
import re

import pytest
import torch
from bare import bare
from torch import Tensor, nn
from torch.distributed.tensor import Shard, distribute_tensor

from parity import TOLERANCE, relative_error, whole
from rowwise.kernels.spec import Normal, ParameterSpec
from rowwise.launch.compose import compose_tree
from rowwise.optim.build import assignment_table, assignments, build_optimizer, check_optimizer, named_state
from rowwise.optim.sparse.check import check_sparsity
from rowwise.trainer.config import config_from_tree
from rowwise.trainer.models.init import random_rows

EXPERTS, SHAPES, STEPS = 3, {"tall": (72, 64), "wide": (64, 80)}, 3
LOW = ["optim.rank=8", "optim.refresh_every=2"]
RULES = {
    "adamw": [], "adamw8bit": [], "lion": [], "lion8bit": [], "adafactor": [], "muon": [], "galore": LOW, "fira": LOW,
    "dct": [*LOW, "optim.side=short"], "apollo": [*LOW, "optim.state_bits=8"], "apollo_mini": ["optim.refresh_every=2"],
    "lion optim.kappa=nuclear": [], "adamw optim.param_dtype=bf16": [],
}  # fmt: skip


@functools.cache
def optim(rule: str):
    return config_from_tree(compose_tree([*f"optim={rule}".split(), *RULES.get(rule, [])])).optim


class Experts(nn.Module):
    """Batches of matrices, and of biases."""

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype
        for name, spec in self.parameter_specs().items():
            p = torch.empty(spec.shape, dtype=dtype)
            random_rows(self.parameter_specs(), 0)(name, p, 0, EXPERTS)
            self.register_parameter(name, nn.Parameter(p))

    @staticmethod
    def parameter_specs() -> dict[str, ParameterSpec]:
        matrices = {
            name: ParameterSpec(torch.Size((EXPERTS, *shape)), "hidden", Normal(0.02), batched=True)
            for name, shape in SHAPES.items()
        }
        bias = ParameterSpec(torch.Size((EXPERTS, 80)), "vector", Normal(0.02), batched=True)
        return matrices | {"bias": bias}


class Singles(nn.Module):
    """The same, a parameter each."""

    def __init__(self, experts: Experts):
        super().__init__()
        for name, p in experts.named_parameters():
            for i in range(EXPERTS):
                self.register_parameter(f"{name}[{i}]", nn.Parameter(p.detach()[i].clone()))


def gradient(name: str, step: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(10 * step + len(name))
    shape = Experts.parameter_specs()[name].shape
    return torch.randn(shape, dtype=dtype, generator=generator) / (1 + step)


def after(model: nn.Module, gradients, rule: str) -> dict[str, Tensor]:
    """Parameters and states, whole, after a few steps."""
    optimizer = build_optimizer(model, optim(rule), seed=3)
    for step in range(STEPS):
        for name, p in model.named_parameters():
            p.grad = gradients(name, step)
        optimizer.step()
    states = {f"{n}.{key}": t for n, state in named_state(model, optimizer).items() for key, t in state.items()}
    return {name: whole(t) for name, t in (dict(model.named_parameters()) | states).items()}


def dtype_of(rule: str) -> torch.dtype:
    return torch.bfloat16 if "bf16" in rule else torch.float64


def as_batches(rule: str) -> dict[str, Tensor]:
    dtype = dtype_of(rule)
    return after(Experts(dtype), lambda name, step: gradient(name, step, dtype), rule)


def as_singles(rule: str) -> dict[str, Tensor]:
    """Stacked, to be compared."""
    dtype = dtype_of(rule)

    def gradients(name: str, step: int) -> Tensor:
        stem, index = name.rstrip("]").split("[")
        return gradient(stem, step, dtype)[int(index)].clone()

    found = after(bare(Singles(Experts(dtype))), gradients, rule)
    stacked: dict[str, list[Tensor]] = {}
    for name, t in found.items():
        stacked.setdefault(re.sub(r"\[\d+\]", "", name), []).append(t)
    return {name: torch.stack(parts) for name, parts in stacked.items()}


def split(workers, rules: list[str]) -> list[dict[str, Tensor]]:
    """What `as_batches` gives, of experts that are split unevenly over the ranks."""
    torch.distributed.init_process_group("gloo", store=workers.store, rank=workers.rank, world_size=workers.world_size)
    line = torch.distributed.init_device_mesh("cpu", (workers.world_size,))
    found = []
    for rule in rules:
        dtype = dtype_of(rule)
        model = Experts(dtype)
        for name, p in list(model.named_parameters()):
            setattr(model, name, nn.Parameter(on_line(line, p.detach())))
        found.append(after(model, lambda name, step, dtype=dtype: on_line(line, gradient(name, step, dtype)), rule))
    return found


def on_line(line, tensor: Tensor) -> Tensor:
    """Its rows on this rank; every rank has the whole."""
    return distribute_tensor(tensor, line, [Shard(0)], src_data_rank=None)


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float) -> None:
    assert ours.keys() == theirs.keys()
    for name, t in theirs.items():
        if tolerance and t.is_floating_point() and t.any():
            assert relative_error(ours[name].double(), t.double()) <= tolerance, name
        else:
            assert torch.equal(ours[name], t), name


@pytest.mark.parametrize("rule", RULES)
def test_a_batch_of_matrices_is_as_many_matrices(rule):
    ours, begun = as_batches(rule), dict(Experts(dtype_of(rule)).named_parameters())
    assert_same(ours, as_singles(rule), 0.0)
    assert all((ours[name] != p).any() for name, p in begun.items()), "nothing moves"


def test_ranks_that_share_a_batch_change_it_as_one_does(ranks):
    """Each has whole matrices, so that nothing but the order in which products are summed may differ."""
    for found in ranks.run(split, 2, list(RULES)):
        for rule, ours in zip(RULES, found, strict=True):
            assert_same(ours, as_batches(rule), 0.0 if "bf16" in rule else TOLERANCE)


def test_what_is_decided_of_a_matrix_is_decided_of_one_of_a_batch():
    """Its rank, whether 8 bits are enough for it, and decay, which vectors do not have however many stand together."""
    model = Experts(torch.float32)
    optimizer = build_optimizer(model, optim("galore"))
    table = assignment_table(assignments(model, optimizer)).splitlines()
    (tall,) = (line.split("  ") for line in table if line.startswith("tall"))
    # Moments of 72 x 8 and a basis of 64 x 8, each of 4 bytes, for 72 x 64 weights.
    assert {"3 x 72 x 64", "hidden", "galore, rank 8"} <= {cell.strip() for cell in tall}
    assert tall[-1].strip() == f"{4 * (2 * 72 * 8 + 64 * 8) / (72 * 64):.2f}"
    decays = {name: group["weight_decay"] for group in optimizer.param_groups for name in group["names"]}
    assert decays["bias"] == 0
    specs = {"few": ParameterSpec(torch.Size((100, 8, 8)), "hidden", batched=True)}
    with pytest.raises(ValueError, match=r"optim.rank=9 is above the narrow side of few, \(8, 8\); give at most 8"):
        check_optimizer(config_from_tree(compose_tree(["optim=galore", "optim.rank=9"])).optim, specs)


def test_rows_of_a_batch_begin_as_the_whole_does():
    fill_, part = random_rows(Experts(torch.float32).parameter_specs(), 0), torch.empty(2, *SHAPES["tall"])
    fill_("tall", part, 1, EXPERTS)
    assert torch.equal(part, Experts(torch.float32).tall[1:])


def test_what_nothing_is_said_of_is_refused_by_name():
    with pytest.raises(ValueError, match=r"Linear does not say what its parameters are; .* parameter_specs\(\), which"):
        build_optimizer(nn.Linear(2, 3), optim("adamw"))
    model = Experts(torch.float32)
    model.register_parameter("router", nn.Parameter(torch.zeros(3, 4)))
    with pytest.raises(ValueError, match=r"router is not among the model's parameter_specs\(\)"):
        build_optimizer(model, optim("adamw"))
    sparsity = config_from_tree(compose_tree(["sparsity=rigl"])).sparsity
    with pytest.raises(ValueError, match=r"sparsity.layers: tall, \(3, 72, 64\), is a batch of matrices, .*; leave it"):
        check_sparsity(sparsity, Experts(torch.float32).parameter_specs(), 10)
    with pytest.raises(ValueError, match="the spec of w does not say what it begins as"):
        random_rows({"w": ParameterSpec(torch.Size((2, 2)), "hidden")}, 0)("w", torch.empty(2, 2), 0, 2)
