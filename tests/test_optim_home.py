"""States that wait in host memory or in files: the same numbers to the last bit, of every rule, and few bytes at a time."""

import os
import threading
from contextlib import contextmanager, nullcontext
from pathlib import Path
from unittest import mock

import pytest
import torch
from bare import bare
from test_optim_rules import ALL, Edges, edge_shapes, line_of, on_line, optim_config, random
from torch import nn

from parity import piece_of
from rowwise.optim import in_backward as inside
from rowwise.optim import optimizer as module
from rowwise.optim.build import build_optimizer, named_state
from rowwise.optim.in_backward import InBackward
from rowwise.parallel.host_rows import HostRows
from rowwise.parallel.row_file import RowFile

CPU = torch.device("cpu")
SMALL = 40_000  # bytes of a portion: matrices are cut within


@contextmanager
def home_at(where):
    """A home in host memory, or in a file of this folder."""
    file = RowFile(Path(where), f"memory.offload_states={where}") if where != "cpu" else None
    try:
        yield HostRows(CPU, [] if file is None else [file], file)
    finally:
        if file is not None:
            file.close()


def steps_of(config, shapes, dtype, where=None, line=None, inside_backward=False, steps=3):
    """Every number after steps with random gradients: parameters and states, this rank's pieces of them."""
    model = bare(Edges(shapes))
    for name, p in list(model.named_parameters()):
        whole = p.data.to(dtype)
        setattr(model, name, nn.Parameter(whole if line is None else on_line(line, whole)))
    with home_at(where) if where is not None else nullcontext() as home:
        optimizer = build_optimizer(model, config, seed=5, home=home)
        hooks = InBackward(optimizer, lambda gradient: None) if inside_backward else None
        for step in range(1, steps + 1):
            grads = [random(shape, step, i).to(dtype) for i, shape in enumerate(shapes)]
            grads = grads if line is None else [on_line(line, g) for g in grads]
            if hooks is not None:
                hooks.begin()
                torch.autograd.backward(list(model.parameters()), grads)
                hooks.end()
                assert all(p.grad is None for p in model.parameters())
                continue
            for p, g in zip(model.parameters(), grads, strict=True):
                p.grad = g
            optimizer.step()
        pieces = {name: piece_of(p) for name, p in model.named_parameters()}
        for name, state in named_state(model, optimizer).items():
            pieces |= {f"{name}.{key}": piece_of(t) for key, t in state.items()}
    return pieces


def assert_same_bits(ours, theirs):
    assert ours.keys() == theirs.keys()
    for key, (shape, offset, numbers) in theirs.items():
        assert ours[key][:2] == (shape, offset), key
        assert numbers.tobytes() == ours[key][2].tobytes(), key


@pytest.fixture
def in_small_portions(monkeypatch):
    monkeypatch.setattr(module, "PORTION_BYTES", SMALL)


CUT = ("adamw", "lion", "adamw8bit", "lion8bit")  # by rows
CASES = [*((rule, torch.float32) for rule in ALL), *((rule, torch.float64) for rule in (*CUT, "fira")),
         *((rule, torch.bfloat16) for rule in (*CUT, "dct 8-bit"))]  # fmt: skip


@pytest.mark.parametrize(("rule", "dtype"), CASES)
def test_every_rule_steps_to_the_same_bits(rule, dtype, tmp_path, in_small_portions):
    config, shapes = optim_config(rule), edge_shapes(rule)
    there = steps_of(config, shapes, dtype)
    assert_same_bits(steps_of(config, shapes, dtype, tmp_path), there)
    if rule in CUT:
        assert_same_bits(steps_of(config, shapes, dtype, "cpu"), there)


@pytest.mark.parametrize("rule", ["adamw", "adamw8bit", "lion", "muon"])
def test_in_the_backward_too(rule, tmp_path, in_small_portions):
    config, shapes = optim_config(rule), edge_shapes(rule)
    there = steps_of(config, shapes, torch.float32)
    assert_same_bits(steps_of(config, shapes, torch.float32, tmp_path, inside_backward=True), there)


def run_on_line(workers, configs, where):
    line = line_of(workers)
    with mock.patch.object(module, "PORTION_BYTES", SMALL):
        for rule, config in configs.items():
            shapes = edge_shapes(rule)
            there = steps_of(config, shapes, torch.float32, line=line)
            assert_same_bits(steps_of(config, shapes, torch.float32, where, line=line), there)


SENDING = ("adafactor", "muon", "lion l2", "lion nuclear", "fira", "apollo_mini", "dct short 8-bit", "adamw8bit")


def test_on_several_ranks(ranks, tmp_path):
    """Whose rules send each other messages, in the same order."""
    ranks.run(run_on_line, 3, {rule: optim_config(rule) for rule in SENDING}, tmp_path)


class Counted:
    """A home that counts the bytes that are on their way, or here."""

    def __init__(self, home):
        self.home, self.held, self.most, self.ahead = home, 0, 0, []
        self.lay = home.lay

    def fetch(self, there):
        size = sum(t.nbytes for t in there if self.home._file_of(t) is not None)
        self.held += size
        self.most = max(self.most, self.held)
        self.ahead.append(size)
        return self.home.fetch(there)

    def put(self, here, there):
        leave = self.home.put(here, there)
        size = sum(t.nbytes for mine, t in zip(here, there, strict=True) if mine is not t)

        def left():
            leave()
            self.held -= size

        return left


def test_three_portions_are_here_at_most(tmp_path, in_small_portions):
    """Of matrices that are larger than all of them together."""
    config, shapes = optim_config("adamw"), [(400, 300), (30, 4000), (500,)]
    model = bare(Edges(shapes))
    with home_at(tmp_path) as home:
        counted = Counted(home)
        optimizer = build_optimizer(model, config, home=counted)
        states = sum(t.nbytes for state in optimizer.state.values() for t in state.values())
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
    portion = 2 * 2 * SMALL  # two moments, in float64
    assert counted.held == 0 and max(counted.ahead) <= portion * 1.01 and len(counted.ahead) > 20
    assert portion < counted.most <= 3 * portion * 1.01 < states / 7


def test_states_are_laid_down_one_parameter_at_a_time(tmp_path, monkeypatch):
    """All of them never stand in memory."""
    model = bare(Edges([(100, 1000)] * 8))
    held, most = [0], [0]
    zeros = torch.zeros_like

    def counted(t, **given):
        made = zeros(t, **given)
        held[0] += made.nbytes
        most[0] = max(most[0], held[0])
        return made

    monkeypatch.setattr(torch, "zeros_like", counted)
    with home_at(tmp_path) as home:
        lay = home.lay

        def laid(t):
            held[0] -= t.nbytes
            return lay(t)

        home.lay = laid
        build_optimizer(model, optim_config("adamw"), home=home)
    assert held[0] == 0 and most[0] == 2 * 100 * 1000 * 8


def test_few_gradients_wait_for_their_steps(monkeypatch):
    """Where steps are slow the backward waits."""
    monkeypatch.setattr(inside, "BACKLOG_BYTES", 100)
    apart, go, made = inside.StepsApart(lambda: None), threading.Event(), []

    def step():
        go.wait()
        made.append(1)

    for _ in range(2):
        apart.make_room(50)
        apart.begin(step, 50)
    assert not made
    threading.Timer(0.05, go.set).start()
    apart.make_room(60)
    assert len(made) >= 2
    apart.wait()


@pytest.mark.parametrize("inside_backward", [False, True])
@pytest.mark.parametrize("call", ["preadv", "pwritev"])
def test_an_error_of_the_disk_ends_the_step(tmp_path, monkeypatch, call, inside_backward, in_small_portions):
    """Wherever in it, by name."""
    real, left = getattr(os, call), [40 if call == "preadv" else 30]

    def fails(*given):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(5, "Input/output error")
        return real(*given)

    monkeypatch.setattr(os, call, fails)
    with pytest.raises(
        OSError, match=r"memory.offload_states=\S+ cannot be (read|written) \(Input/output error\); give another"
    ):
        steps_of(optim_config("adamw"), edge_shapes("adamw"), torch.float32, tmp_path, inside_backward=inside_backward)
    assert left[0] < 0


class Marked:
    """Copies of a device, whose ends are waited for one by one."""

    def __init__(self):
        self.log = []

    def away(self, t):
        self.log.append("away")
        return torch.full(t.shape, 2.0), self

    def over(self, here, t):
        self.log.append("over")
        return self

    def synchronize(self):
        self.log.append("waited")


def test_rows_of_a_device_come_and_go(tmp_path):
    """What is there is copied, here and back, and each copy waited for; what is in memory or in a file is not."""
    with home_at(tmp_path) as home:
        home._copies = Marked()
        there = [torch.empty(3, 4, device="meta"), torch.ones(2), home.lay(torch.arange(5.0))]
        bring = home.fetch(there)
        assert home._copies.log == ["away"]
        here = bring()
        assert [t.sum().item() for t in here] == [24, 2, 10] and here[1] is there[1]
        leave = home.put([here[0], here[1], here[2] + 1], there)
        assert home._copies.log == ["away", "waited", "over"]
        leave()
        assert home._copies.log[3:] == ["waited"] and there[2].sum() == 15
