"""Parameters in different views of one mesh: each has ranks of its own that split and repeat its rows, and what is summed over
all of them counts every row once. (Law 2.)"""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from parity import TOLERANCE, relative_error, whole
from rowwise.kernels.spec import DENSE, ParameterSpec
from rowwise.launch.compose import compose_tree
from rowwise.optim.build import build_optimizer, named_state
from rowwise.optim.in_backward import InBackward
from rowwise.parallel.config import resolve_degrees
from rowwise.parallel.mesh import View, make_mesh
from rowwise.parallel.shard import gradient_squares
from rowwise.parallel.state_bytes import count_parts
from rowwise.trainer.config import config_from_tree

WORLD, STEPS = 4, 3
SPECS = {
    "a": ParameterSpec(torch.Size((70, 66)), "hidden"),
    "experts": ParameterSpec(torch.Size((3, 64, 72)), "hidden", batched=True, view="pairs"),
    "b": ParameterSpec(torch.Size((67, 80)), "hidden", view="pairs"),
    "scale": ParameterSpec(torch.Size((7,)), "vector", view="pairs"),
}
RULES = {"muon": [], "adamw8bit": [], "apollo": ["optim.rank=8", "optim.refresh_every=2"]}


def drawn(name: str, key: int) -> Tensor:
    torch.manual_seed(100 * key + len(name))
    return torch.randn(SPECS[name].shape, dtype=torch.float64)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        for name in SPECS:
            self.register_parameter(name, nn.Parameter(drawn(name, 0)))

    def parameter_specs(self) -> dict[str, ParameterSpec]:
        return SPECS


def stepped(model: nn.Module, rule: str, lay) -> dict[str, Tensor]:
    optimizer = build_optimizer(model, config_from_tree(compose_tree([f"optim={rule}", *RULES[rule]])).optim, seed=3)
    for step in range(1, STEPS + 1):
        for name, p in model.named_parameters():
            p.grad = lay(name, drawn(name, step))
        optimizer.step()
    states = {f"{n}.{key}": t for n, state in named_state(model, optimizer).items() for key, t in state.items()}
    return {name: whole(t) for name, t in (dict(model.named_parameters()) | states).items()}


def on_a_rank(workers):
    """(the squared norm of all gradients, the same in the backward, what each rule makes, the bytes of the parts)."""
    config = resolve_degrees(config_from_tree(compose_tree([])).parallel, workers.world_size)
    mesh = make_mesh(config, workers)
    pairs = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    mesh = replace(mesh, views=mesh.views | {"pairs": View(pairs)})
    assert [view.replicas for view in mesh.views.values()] == [1, 2]

    def lay(name: str, t: Tensor) -> Tensor:
        if SPECS[name].view == DENSE:
            return distribute_tensor(t, mesh.states["shard"], [Shard(0)])
        return distribute_tensor(t, pairs, [Replicate(), Shard(0)])

    def laid() -> Model:
        model = Model()
        for name, p in list(model.named_parameters()):
            setattr(model, name, nn.Parameter(lay(name, p.detach())))
        return model

    model = laid()
    for name, p in model.named_parameters():
        p.grad = lay(name, drawn(name, 1))
    squares = mesh.share(gradient_squares(model))
    dist.all_reduce(squares)
    model = laid()
    in_backward = InBackward(build_optimizer(model, config_from_tree(compose_tree([])).optim), lambda gradient: None)
    in_backward.begin()
    for name, p in model.named_parameters():
        (p * lay(name, drawn(name, 1))).sum().backward()
    later = mesh.share(in_backward.squares())
    dist.all_reduce(later)
    (part,) = count_parts([[model]])
    return float(squares), float(later), {rule: stepped(laid(), rule, lay) for rule in RULES}, part


@pytest.fixture(scope="module")
def found(ranks):
    return ranks.run(on_a_rank, WORLD)


def test_the_norm_of_all_gradients_counts_every_row_once(found):
    expected = float(sum(drawn(name, 1).square().sum() for name in SPECS))
    for squares, later, _, _ in found:
        assert squares == pytest.approx(expected, rel=1e-12)
        assert later == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("rule", RULES)
def test_rules_sum_over_the_ranks_of_a_parameters_own_view(found, rule):
    expected = stepped(Model(), rule, lambda name, t: t)
    for _, _, made, _ in found:
        assert made[rule].keys() == expected.keys()
        for name, t in expected.items():
            if t.is_floating_point() and t.any():
                bound = 2**-23 if t.dtype == torch.float32 else TOLERANCE
                assert relative_error(made[rule][name].double(), t.double()) <= bound, name
            else:
                assert torch.equal(made[rule][name], t), name


def test_the_rows_of_a_part_are_counted_where_they_are(found):
    """In float64: over 4 ranks 70 rows are padded to 72; over 2 ranks 3 matrices to 4, 67 rows to 68, 7 numbers to 8."""
    padded = 8 * (72 * 66 + 4 * 64 * 72 + 68 * 80 + 8)
    held = [8 * (a * 66 + e * 64 * 72 + b * 80 + s) for a, e, b, s in ((18, 2, 34, 4), (18, 1, 33, 3)) * 2]
    held[3] -= 8 * 2 * 66  # the last of four has 16 of the 70 rows
    assert [part.padded for *_, part in found] == [padded] * WORLD
    assert [part.shard for *_, part in found] == held
