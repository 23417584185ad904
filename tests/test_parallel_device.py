"""A device is asked what it needs to say, and never waited for as a whole while messages are awaited."""

import datetime
import functools
import itertools
import re
import types
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gpus import Network, Stuck
from rowwise.parallel import channels, defer, device, pipeline
from rowwise.parallel.lanes import Axis
from rowwise.parallel.pipeline import Pipeline, Trace
from rowwise.parallel.pipeline_schedule.generate import GENERATORS, Shape, make_schedule
from rowwise.parallel.pipeline_schedule.order import early_messages
from rowwise.parallel.pipeline_schedule.simulate import simulate, uniform_costs
from rowwise.parallel.pipeline_schedule.trace import align

ROOT = Path(__file__).parents[1]
GPU = torch.device("cuda", 0)
FORWARD, INPUT, WEIGHT = 2.0, 3.0, 1.0


class Work(torch.autograd.Function):
    """Takes FORWARD seconds, and in the backward as many as it is told."""

    @staticmethod
    def forward(ctx, x, network, seconds):
        ctx.network, ctx.seconds = network, seconds
        network.spend(FORWARD)
        return x.clone()

    @staticmethod
    def backward(ctx, dy):
        ctx.network.spend(ctx.seconds)
        return dy, None, None


@pytest.fixture
def gpus(monkeypatch):
    """`gpus(n)`: a network of n ranks, each with a GPU of which torch speaks."""

    def made(size: int) -> Network:
        network = Network(size)
        monkeypatch.setattr(torch.cuda, "synchronize", network.synchronize)
        monkeypatch.setattr(torch.cuda, "Event", network.event)
        monkeypatch.setattr(device, "time", types.SimpleNamespace(time=lambda: 100.0))
        monkeypatch.setattr(pipeline, "open_lanes", lambda *_: {})
        monkeypatch.setattr(channels, "send_to", network.send_to)
        monkeypatch.setattr(channels, "receive_from", network.receive_from)
        monkeypatch.setattr(defer, "add_weight_gradient_", lambda *_: network.spend(WEIGHT))
        return network

    return made


def step_of(network, schedule, trace_of=Trace):
    """One traced step on every rank of the network: the spans of each."""
    split = {action[::2] for actions in schedule.ranks for action in actions if action.kind == "I"}
    weight, spans = nn.Parameter(torch.eye(2)), [[] for _ in schedule.ranks]

    def forward(stage, i, x):
        seconds = INPUT if (stage, i) in split else INPUT + WEIGHT
        y = F.linear(Work.apply(torch.zeros(1, 2, requires_grad=True) if x is None else x, network, seconds), weight)
        return y.sum() if stage == schedule.stages - 1 else y

    def one_rank(rank):
        axis = Axis(tuple(range(len(schedule.ranks))), rank, None, datetime.timedelta(seconds=1))
        modules = {stage: nn.Identity() for stage in schedule.stages_of(rank)}
        trace = trace_of(GPU)
        step = Pipeline(modules, schedule, axis, "none", GPU)
        step.forward_backward(forward, lambda: torch.empty(1, 2), 1.0, trace)
        spans[rank] = trace.spans()

    network.run(one_rank)
    return spans


CASES = [(name, 2 if generator.chunks[0] == 2 else 1) for name, generator in GENERATORS.items()] + [("blockwise", 2)]


@pytest.mark.parametrize("size", [2, 4, 8])
@pytest.mark.parametrize("name, chunks", CASES)
def test_a_traced_step_ends_and_says_what_is_computed(gpus, name, chunks, size):
    """Its timeline is the simulated one to the last second: what an action waits for is not in its time."""
    schedule = make_schedule(name, Shape(size, chunks, 2 * size, size))
    measured = align(step_of(gpus(size), schedule))
    expected = simulate(schedule, uniform_costs(schedule.stages, FORWARD, INPUT, WEIGHT))
    assert measured.schedule.ranks == schedule.ranks
    for found, right in zip([*measured.starts, *measured.ends], [*expected.starts, *expected.ends], strict=True):
        assert found == pytest.approx(right, abs=1e-9)


class WaitsForAll(Trace):
    """What a trace must not do."""

    def __init__(self, where):
        super().__init__(where)
        ask = self.clock.mark
        self.clock.mark = lambda: (torch.cuda.synchronize(), ask())[1]


@pytest.mark.parametrize("name, chunks", [("1f1b", 1), ("interleaved_1f1b", 2), ("zb_v", 2), ("blockwise", 2)])
def test_waiting_for_the_whole_device_would_hang(gpus, name, chunks):
    """Else the test above would show nothing."""
    with pytest.raises(Stuck):
        step_of(gpus(4), make_schedule(name, Shape(4, chunks, 8, 4)), WaitsForAll)


class WaitsOnce(WaitsForAll):
    """What an allocator, a library or a profiler may do at any moment: here at the beginning of one action of one rank."""

    def __init__(self, where, rank, position, network):
        super().__init__(where)
        both, marks = self.clock.mark, itertools.count()
        ask = Trace(where).clock.mark
        self.clock.mark = lambda: both() if (network.rank, next(marks)) == (rank, 2 * position) else ask()


@pytest.mark.parametrize("size, micro_batches", [(4, 8), (5, 15)])
def test_one_wait_for_the_whole_device_hangs_nowhere(gpus, size, micro_batches):
    """Before its last forward of a unit, a rank of `blockwise` would be next to take a gradient that is made of what this
    forward makes."""
    schedule = make_schedule("blockwise", Shape(size, 1, micro_batches, size))
    for rank, actions in enumerate(schedule.ranks):
        turns = [n for n, (a, b) in enumerate(itertools.pairwise(actions)) if (a.kind, b.kind) == ("F", "I")]
        assert turns
        for position in turns:
            network = gpus(size)
            step_of(network, schedule, functools.partial(WaitsOnce, rank=rank, position=position, network=network))


@pytest.mark.parametrize("name, chunks", CASES)
def test_what_is_received_ahead_is_not_made_of_the_action_before(name, chunks):
    """Every rank stops for ever after any action: what it is to receive ahead during that still comes."""
    schedule = make_schedule(name, Shape(4, chunks, 8, 4))
    for rank, actions in enumerate(schedule.ranks):
        early = early_messages(schedule, rank)
        for position in range(1, len(actions)):
            maker = schedule.maker(actions[position])
            if maker is not None:
                assert (maker in done_without(schedule, rank, position - 1)) == (position in early)


def done_without(schedule, rank, stop):
    """All that can be done where `rank` stops before its action number `stop`."""
    done, at, before = set(), [0] * len(schedule.ranks), None
    ends = [stop if r == rank else len(actions) for r, actions in enumerate(schedule.ranks)]
    while at != before:
        before = list(at)
        for r, actions in enumerate(schedule.ranks):
            while at[r] < ends[r] and (schedule.maker(actions[at[r]]) or actions[0]) in done | {actions[0]}:
                done.add(actions[at[r]])
                at[r] += 1
    return done


@pytest.mark.parametrize("room", ["launch", "trainer", "parallel", "optim", "kernels"])
def test_no_room_waits_for_a_whole_device(room):
    """`torch.cuda.synchronize` waits for every stream, and with it for messages that other ranks have yet to send."""
    calls = re.compile(r"(cuda|accelerator)\.synchronize\(")
    assert [str(path) for path in (ROOT / room).rglob("*.py") if calls.search(path.read_text())] == []
