"""What every rule sends, counted while it steps, against the table of the design: nothing, or numbers that do not grow
with the rows of a matrix. No rule ever sends a gradient or a weight. (Law 4.)"""

import pytest
import torch
from bare import bare
from torch import nn
from torch.distributed.tensor import Shard, distribute_tensor

from messages import Messages
from rowwise.kernels.torch_dispatch import TorchDispatchMode
from rowwise.launch.compose import compose_tree
from rowwise.optim.build import build_optimizer
from rowwise.optim.transpose import splits, transpose
from rowwise.trainer.config import config_from_tree
from rowwise.trainer.plan.on_paper import OnPaper

RANK, EXTRA, WORLD = 8, 8, 4
SHAPES = [(64, 80), (90, 60), (48, 48)]
N = [n for _, n in SHAPES]
BYTES = 4

# rule -> (numbers all-reduced at a refresh, at every other step), over all matrices
REDUCED = {
    "adamw": (0, 0),
    "lion": (0, 0),
    "lion l2": (len(SHAPES), len(SHAPES)),
    "lion rows": (0, 0),
    "lion nuclear": (sum(min(shape) ** 2 for shape in SHAPES), sum(min(shape) ** 2 for shape in SHAPES)),
    "adamw8bit": (0, 0),
    "lion8bit": (0, 0),
    "apollo": (len(SHAPES), len(SHAPES)),
    "apollo optim.growth=null": (0, 0),
    "apollo_mini": (3 * len(SHAPES), 3 * len(SHAPES)),
    "apollo_mini optim.growth=null": (2 * len(SHAPES), 2 * len(SHAPES)),
    "adafactor": (sum(N) + len(SHAPES), sum(N) + len(SHAPES)),
    "galore": (sum(n * (RANK + EXTRA) + 2 * (RANK + EXTRA) ** 2 for n in N), 0),
    "fira": (sum(n * (RANK + EXTRA) + 2 * (RANK + EXTRA) ** 2 for n in N) + len(SHAPES), len(SHAPES)),
    "dct": (sum(N), 0),
    "dct optim.side=short": (sum(map(min, SHAPES)), 0),
    "apollo optim.side=short": (len(SHAPES), len(SHAPES)),
    "muon": (sum(min(shape) ** 2 for shape in SHAPES), sum(min(shape) ** 2 for shape in SHAPES)),
}


def count_all(workers, configs):
    torch.distributed.init_process_group("gloo", store=workers.store, rank=workers.rank, world_size=workers.world_size)
    line = torch.distributed.init_device_mesh("cpu", (workers.world_size,))
    return [count(line, config) for config in configs]


def drawn(shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def on_line(line, tensor):
    """Its rows on this rank; every rank has the whole."""
    return distribute_tensor(tensor, line, [Shard(0)], src_data_rank=None)


def count(line, config):
    """(numbers all-reduced, bytes of all-to-all) of this rank in steps 1, 2 and 3, with a refresh at 1 and 3."""
    model = bare(nn.Module())
    for i, shape in enumerate(SHAPES):
        model.register_parameter(f"w{i}", nn.Parameter(on_line(line, drawn(shape, i))))
    optimizer = build_optimizer(model, config)
    counted = []
    for step in range(3):
        for i, p in enumerate(model.parameters()):
            p.grad = on_line(line, drawn(SHAPES[i], 10 * step + i))
        with Messages() as messages:
            optimizer.step()
        assert set(messages.calls) <= {"allreduce_", "alltoall_base_", "reduce_", "broadcast_"}, messages.calls
        assert messages.bytes["reduce_"] == messages.bytes["broadcast_"], "what one rank makes of sums goes back to all"
        summed = messages.bytes["allreduce_"] + messages.bytes["reduce_"]
        calls = messages.calls["allreduce_"] + messages.calls["reduce_"]
        counted.append((summed // BYTES, messages.bytes["alltoall_base_"], calls))
    return counted


def config_of(rule):
    name, *options = rule.split()
    low = ["optim.refresh_every=2"] if name in ("galore", "fira", "dct", "apollo", "apollo_mini") else []
    rank = [f"optim.rank={RANK}"] if low and name != "apollo_mini" else []
    kappas = [option if "=" in option else f"optim.kappa={option}" for option in options]
    return config_from_tree(compose_tree([f"optim={name}", *low, *rank, *kappas])).optim


@pytest.fixture(scope="module")
def counted_of(ranks):
    """rule -> what each rank counted; in one call, for DTensor learns the mesh of each anew."""
    everyone = ranks.run(count_all, WORLD, [config_of(rule) for rule in REDUCED])
    return dict(zip(REDUCED, zip(*everyone, strict=True), strict=True))


@pytest.mark.parametrize("rule", REDUCED)
def test_numbers_sent_are_those_of_the_table(counted_of, rule):
    refresh, ordinary = REDUCED[rule]
    for counted in counted_of[rule]:
        assert [reduced for reduced, _, _ in counted] == [refresh, ordinary, refresh]
        assert all(calls <= 3 for _, _, calls in counted), "messages are for all matrices together"


@pytest.mark.parametrize("rule", ["muon", "dct optim.side=short", "apollo optim.side=short"])
def test_wide_matrices_go_twice_by_all_to_all_and_the_others_not_at_all(counted_of, rule):
    wide = [(m, n) for m, n in SHAPES if m < n]
    for rank, counted in enumerate(counted_of[rule]):
        for _, sent, _ in counted:
            there = sum(held(m, rank) * n for m, n in wide)
            back = sum(m * held(n, rank) for m, n in wide)
            assert sent == BYTES * (there + back)


class CountCalls(TorchDispatchMode):
    """Counts operations."""

    calls = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls += 1
        return function(*args, **(kwargs or {}))


UNEVEN = [[(8, 16), (4, 12)], [(7, 16)], [(8, 15)], [(3, 9), (5, 8)], [(2, 16)], [(8, 16), (5, 7)]]


def turned(workers, batches):
    """Whether this rank's rows of the transposes are those, and what goes back is what came."""
    torch.distributed.init_process_group("gloo", store=workers.store, rank=workers.rank, world_size=workers.world_size)
    found = []
    for shapes in batches:
        whole = [torch.arange(m * n).view(m, n) for m, n in shapes]
        mine, theirs = (
            [t.split(splits(len(t), WORLD))[workers.rank] for t in ts] for ts in (whole, [t.T for t in whole])
        )
        there = transpose(mine, [t.shape for t in whole], torch.distributed.group.WORLD)
        back = transpose(there, [t.T.shape for t in whole], torch.distributed.group.WORLD)
        every = zip([*there, *back], [*theirs, *mine], strict=True)
        found.append(all(torch.equal(t, expected) and t.is_contiguous() for t, expected in every))
    return found


def test_rows_become_columns_however_many_a_rank_has(ranks):
    assert ranks.run(turned, WORLD, UNEVEN) == [[True] * len(UNEVEN)] * WORLD


def test_a_transpose_takes_as_many_operations_among_many_ranks():
    """Where rows and columns divide: at 1,024 ranks a step of muon would be a million small copies."""
    operations = []
    for degree in (2, 64):
        with CountCalls() as counted:
            transpose([torch.ones(128 // degree, 256)], [torch.Size((128, 256))], OnPaper(0, degree, lambda _: None))
        operations.append(counted.calls)
    assert operations[0] == operations[1]


def held(size, rank):
    chunk = -(-size // WORLD)
    return max(0, min(chunk, size - rank * chunk))
