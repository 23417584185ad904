"""Laws 2 and 3 for every rule: gradients, updates and the states themselves, against the textbook in one process."""

import functools
from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
import torch
from bare import bare
from torch import nn
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from parity import (
    TOLERANCE,
    Trace,
    assemble,
    assert_all_same,
    assert_same_codes,
    in_micro_batches,
    piece_of,
    relative_error,
    run_layout,
    run_plain,
    run_together,
    small_config,
    with_layout,
)
from rowwise.launch.compose import compose_tree
from rowwise.optim import optimizer as module
from rowwise.optim.build import build_optimizer, named_state, set_step
from rowwise.trainer.config import config_from_tree
from runs import final_tensors, records, run_train
from textbook import textbook_step

# Matrices of exactly 4,096 elements (wq) and of 600 columns (w2); 8-bit moments of rank 8 for w1, 32-bit for others.
SHAPES = ("model.layers=1", "model.dim=64", "model.heads=2", "model.kv_heads=1", "model.ffn_dim=600")
LOW = ("optim.rank=8", "optim.refresh_every=2")
RULES = {
    "adamw": (),
    "lion": (),
    "lion l2": ("optim.kappa=l2",),
    "lion rows": ("optim.kappa=rows",),
    "lion huber": ("optim.kappa=huber", "optim.delta=0.01"),
    "lion nuclear": ("optim.kappa=nuclear",),
    "adafactor": (),
    "muon": (),
    "adamw8bit": (),
    "lion8bit": (),
    "galore": LOW,
    "dct": LOW,
    "fira": LOW,
    "apollo": LOW,
    "apollo_mini": LOW[1:],
    "galore 8-bit": (*LOW, "optim.state_bits=8"),
    "dct 8-bit": (*LOW, "optim.state_bits=8"),
    "fira 8-bit": (*LOW, "optim.state_bits=8"),
    "apollo 8-bit": (*LOW, "optim.state_bits=8"),
}

# What a layout sees as it sees the rules above.
VARIANTS = {
    "fira paper": (*LOW, "optim.form=paper"),
    "apollo unlimited": (*LOW, "optim.growth=null"),
    "apollo_mini unlimited": (*LOW[1:], "optim.growth=null"),
}
# Wide matrices turned: their states are split by columns of the weight.
SHORT = {
    **{f"{name} short": (*LOW, "optim.side=short") for name in ("galore", "dct", "fira", "apollo")},
    "apollo_mini short": (*LOW[1:], "optim.side=short"),
    "dct short 8-bit": (*LOW, "optim.side=short", "optim.state_bits=8"),
}
ALL = RULES | VARIANTS | SHORT


def steps_of(rule):
    """The second step sees that the update of the first arrived, and the basis that it chose; the third chooses a new one."""
    return 3 if any("refresh_every" in option for option in ALL[rule]) else 2


# Every rule, and 8-bit moments once: the four keep them alike.
KAPPAS = [rule for rule in RULES if rule.startswith("lion ")]  # what Lion and muon do, apart from a sum for l2
MOVED = [rule for rule in RULES if not rule.endswith("8-bit") and rule not in KAPPAS]
MOVED += ["dct 8-bit", "fira short", "dct short 8-bit"]
# Of the rules, each kind of message once: what is elementwise sees of replicas what tests/test_parallel_shard.py has for AdamW.
SENT = ("adafactor", "muon", "fira", "dct short 8-bit")
REPLICATED = (*RULES, *(rule for rule in SHORT if rule in MOVED))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("rules")


@pytest.fixture(scope="module")
def plain(folder):
    """rule -> its trace, made once."""
    made: dict[str, Trace] = {}

    def trace_of(rule: str) -> Trace:
        if rule not in made:
            made[rule] = run_plain(rule_config(folder, rule), steps_of(rule))
        return made[rule]

    return trace_of


def rule_config(folder, rule, *overrides):
    choice = f"optim={rule.split()[0]}"
    return small_config(folder, choice, *SHAPES, "optim.lr=0.01", *ALL[rule], *overrides)


# Of the model's own gradients a rule sees what tests/test_parallel_shard.py has for AdamW at every stage; of any, on four ranks, what
# `test_shapes_that_straddle_every_edge` has for every rule. Beside those here: at stage 3 each rule whose update is not another's in
# 8 bits, at stage 0, where a rule has whole tensors as in one process, one of each kind of state, and at 1 and 2 one that sends.
WHOLE = ("adamw8bit", "adafactor", "muon", "fira")
BETWEEN = {("dct", 1), ("muon", 2)}
ELSEWHERE = (
    "adamw", "lion", "lion huber", "lion rows", "lion nuclear", "lion8bit", "galore 8-bit", "fira 8-bit", "apollo 8-bit",
)  # fmt: skip
NOW = [
    (rule, zero)
    for rule in RULES
    for zero in (0, 1, 2, 3)
    if (zero == 3 and rule not in ELSEWHERE) or (zero == 0 and rule in WHOLE) or (rule, zero) in BETWEEN
] + [("dct short", 3)]
STAGES = [*((rule, zero) for rule in RULES for zero in (0, 1, 2, 3)), *((rule, 3) for rule in SHORT)]


@pytest.fixture(scope="module")
def traces(ranks, folder, full):
    """(rule, stage) on three ranks, and (rule, "hybrid") on two times two -> what each rank returned."""
    configs = {2: {}, 3: {}}  # by their steps
    for rule, zero in STAGES if full else NOW:
        config = with_layout(rule_config(folder, rule), 3, zero=zero)
        configs[steps_of(rule)][rule, zero] = in_micro_batches(config, 1)
    for rule in REPLICATED if full else SENT:
        config = with_layout(rule_config(folder, rule), 4, zero=3, replicate=2, shard=2)
        configs[steps_of(rule)][rule, "hybrid"] = in_micro_batches(config, 1)
    return run_together(ranks, configs[2], 2) | run_together(ranks, configs[3], 3)


@pytest.mark.parametrize(
    ("rule", "zero"), [pytest.param(*c, marks=[] if c in NOW else pytest.mark.full) for c in STAGES]
)
def test_steps_equal_those_of_the_textbook(traces, plain, rule, zero):
    assert_all_same(traces[rule, zero], plain(rule))


@pytest.mark.parametrize("rule", [pytest.param(r, marks=[] if r in SENT else pytest.mark.full) for r in REPLICATED])
def test_hybrid_sharding(traces, plain, rule):
    assert_all_same(traces[rule, "hybrid"], plain(rule))


@pytest.mark.parametrize("rule", ["adamw", "galore"])
def test_a_momentum_cycle_is_the_same_on_every_layout(ranks, folder, rule):
    flat = (
        "schedule=one_cycle",
        "schedule.start_div=1",
        "schedule.end_div=1",
    )  # small rates have few digits of an update
    config = rule_config(folder, rule, *flat, "schedule.momentum=[0.95,0.5]")
    ranks_of_it = in_micro_batches(with_layout(config, 3, zero=3), 1)
    assert_all_same(ranks.run(run_layout, 3, ranks_of_it), run_plain(config))


# Just below and at 4,096 elements, columns around a block, fewer rows than ranks, one column, one row.
EDGES = [(63, 65), (64, 64), (2, 2100), (3, 1365), (16, 257), (40, 255), (9, 600), (5000, 1), (1, 5000), (70, 3), (7,)]


class Edges(nn.Module):
    def __init__(self, shapes):
        super().__init__()
        for i, shape in enumerate(shapes):
            self.register_parameter(f"w{i}", nn.Parameter(random(shape, 0, i)))


def random(shape, step, i):
    return drawn(shape, step, i).clone()


@functools.cache
def drawn(shape, step, i):
    generator = torch.Generator().manual_seed(1000 * step + i)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def edge_shapes(rule):
    return [
        s for s in EDGES if rule.split()[0] not in ("galore", "dct", "fira", "apollo") or min(s) >= 8 or len(s) == 1
    ]


@functools.cache
def optim_config(rule):
    return config_from_tree(compose_tree([f"optim={rule.split()[0]}", *ALL[rule], "optim.lr=0.01"])).optim


def run_edges(workers, configs):
    """For each rule, this rank's pieces of parameters and states after steps with random gradients; a few tensors at a time."""
    line = line_of(workers)
    with mock.patch.object(module, "PORTION_BYTES", 40_000):
        return [step_all(line, config, edge_shapes(rule), random, steps_of(rule)) for rule, config in configs.items()]


def line_of(workers):
    torch.distributed.init_process_group("gloo", store=workers.store, rank=workers.rank, world_size=workers.world_size)
    return torch.distributed.init_device_mesh("cpu", (workers.world_size,))


def on_line(line, tensor):
    """Its rows on this rank; every rank has the whole."""
    return distribute_tensor(tensor, line, [Shard(0)], src_data_rank=None)


def step_all(line, config, shapes, gradient, steps):
    model = bare(Edges(shapes))
    for name, p in list(model.named_parameters()):
        setattr(model, name, nn.Parameter(on_line(line, p.data)))
    optimizer = build_optimizer(model, config, seed=5)
    for step in range(1, steps + 1):
        for i, p in enumerate(model.parameters()):
            p.grad = on_line(line, gradient(shapes[i], step, i))
        optimizer.step()
    assert all(isinstance(p, DTensor) for p in model.parameters())
    pieces = {name: piece_of(p) for name, p in model.named_parameters()}
    for name, state in named_state(model, optimizer).items():
        pieces |= {f"{name}.{key}": piece_of(t) for key, t in state.items()}
    return pieces


def textbook_all(rule, shapes, gradient, steps):
    config = optim_config(rule)
    xs = {f"w{i}": random(shape, 0, i) for i, shape in enumerate(shapes)}
    states = {name: {} for name in xs}
    for step in range(1, steps + 1):
        for i, name in enumerate(xs):
            xs[name] = textbook_step(name, states[name], xs[name], gradient(shapes[i], step, i), step, 0.01, config, 5)
    return xs, {f"{n}.{key}": t for n, state in states.items() for key, t in state.items()}


AT_EDGES = [*RULES, *VARIANTS, "fira short", "apollo_mini short", "dct short 8-bit"]


def together(ranks, run, world, rules):
    """rule -> what the ranks have together, in one call."""
    everyone = ranks.run(run, world, {rule: optim_config(rule) for rule in rules})
    return {
        rule: {key: assemble([part[key] for part in parts]) for key in parts[0]}
        for rule, parts in zip(rules, zip(*everyone, strict=True), strict=True)
    }


@pytest.fixture(scope="module")
def edges(ranks):
    """world -> rule -> what the ranks have together."""
    return functools.cache(lambda world: together(ranks, run_edges, world, AT_EDGES))


@pytest.mark.parametrize("rule", AT_EDGES)
def test_shapes_that_straddle_every_edge(edges, rule):
    xs, states = textbook_all(rule, edge_shapes(rule), random, steps_of(rule))
    for world in (1, 3):
        assert_same(edges(world)[rule], xs, states)


def assert_same(ours, xs, states):
    ours = dict(ours)
    for name, x in xs.items():
        assert relative_error(ours.pop(name), x) <= TOLERANCE, name
    assert_same_states(ours, states)


def few_tokens(g, step):
    """Has three directions, other ones at every step."""
    return g[:, :3] @ g[:3]


def few_rows(g, step):
    return torch.where(torch.arange(len(g))[:, None] < 5, g, 0)


def few_columns(g, step):
    return few_rows(g.T, step).T


def nothing_at_first(g, step):
    return g if step > 1 else torch.zeros_like(g)


def ever_fainter(g, step):
    u, s, vt = torch.linalg.svd(g, full_matrices=False)
    return u * 0.1 ** torch.arange(len(s)) @ vt


def one_cosine(g, step):
    """Is one DCT column at every second step."""
    n = g.size(1)
    return g if step % 2 == 0 else g[:, :1] * torch.cos(torch.pi * 3 * (2 * torch.arange(n).double() + 1) / (2 * n))


KINDS = (few_tokens, one_cosine, few_rows, few_columns, nothing_at_first, ever_fainter)


def few_shapes(rule):
    """A tall, a square and a wide matrix of each kind; with 8 bits two that are large enough for them."""
    if "8-bit" in rule:
        return [(512, 12)] * 2
    return [shape for shape in ((40, 16), (24, 24), (20, 60)) for _ in KINDS]


def few_directions(shape, step, i):
    return 100 * KINDS[i % len(KINDS)](random(shape, step, i), step)


FEW = ["galore", "galore short", "fira", "fira paper", "fira 8-bit", "dct", "dct 8-bit"]


def run_few(workers, configs):
    line = line_of(workers)
    return [step_all(line, config, few_shapes(rule), few_directions, 3) for rule, config in configs.items()]


@pytest.fixture(scope="module")
def few(ranks):
    """rule -> what two ranks have together."""
    return together(ranks, run_few, 2, FEW)


@pytest.mark.parametrize("rule", FEW)
def test_gradients_with_fewer_directions_than_the_rank(few, rule):
    """Roundings, of which every layout has its own, choose nothing: what they leave of the other directions is 0."""
    xs, states = textbook_all(rule, few_shapes(rule), few_directions, steps=3)
    nothing = {name for name, state in states.items() if not state.any()}  # limits that are none
    assert all(name.endswith("limit") and not few[rule][name].any() for name in nothing)
    some = {name: t for name, t in few[rule].items() if name not in nothing}
    assert_same(some, xs, {name: state for name, state in states.items() if name not in nothing})


def run_rule(ranks, folder, rule, name, world, resume="never", **degrees):
    """The folder of a run of three steps that saves after two, or goes on from there, with one micro-batch a rank."""
    config = rule_config(folder, rule, "checkpoint.every=2")
    config = replace(config, run_dir=str(folder / rule.replace(" ", "-") / name), resume=resume)
    ranks.run(run_train, world, in_micro_batches(with_layout(config, world, **degrees), 1))
    return config.run_dir


def half_way(run_dir):
    return f"{run_dir}/checkpoints/step-00000002"


# A rule whose states are of the kind of another's stands for it: moments by element, in 32 bits and in 8; a basis and what it has.
ALIKE = ("adamw", "lion", "lion8bit", "galore", "dct", "dct 8-bit", "apollo", "apollo_mini", "fira short")


@pytest.mark.parametrize("rule", [pytest.param(r, marks=pytest.mark.full if r in ALIKE else []) for r in MOVED])
def test_saved_on_two_ranks_and_resumed_on_three_and_on_one(ranks, folder, rule, full):
    """On one, unless in full, some: what is put together again are rows, whatever the rule."""
    reference = run_rule(ranks, folder, rule, "on-2", 2, zero=3)
    expected = final_tensors(reference)
    for after in (3, 1) if full or rule in ("adamw8bit", "dct short 8-bit") else (3,):
        moved = run_rule(ranks, folder, rule, f"on-{after}", after, half_way(reference), zero=2)
        np.testing.assert_allclose(np.array(records(moved)), np.array(records(reference)[2:]), rtol=TOLERANCE)
        assert_same_states(final_tensors(moved), expected)


@pytest.mark.parametrize(
    "rule", ["adamw8bit", *(pytest.param(rule, marks=pytest.mark.full) for rule in ("fira", "adafactor", "dct"))]
)
def test_saved_whole_and_resumed_split(ranks, folder, rule):
    """At stage 0 states are plain tensors, at stage 3 rows of them."""
    reference = run_rule(ranks, folder, rule, "whole", 2, zero=0)
    moved = run_rule(ranks, folder, rule, "split", 3, half_way(reference), zero=3)
    assert_same_states(final_tensors(moved), final_tensors(reference))


def run_16_bit(workers, configs, steps=3):
    """For each rule, pieces of bf16 parameters after steps with the same gradients; the optimizer is rebuilt and told where it
    is half-way."""
    line = line_of(workers)
    return [step_16_bit(line, config, steps) for config in configs]


def step_16_bit(line, config, steps):
    model, shapes = bare(Edges(EDGES)), EDGES
    for name, p in list(model.named_parameters()):
        setattr(model, name, nn.Parameter(on_line(line, p.data.bfloat16())))
    optimizer = build_optimizer(model, config, seed=5)
    for step in range(1, steps + 1):
        if step == 2:
            again = build_optimizer(model, config, seed=5)
            for p, state in optimizer.state.items():
                for key, t in state.items():
                    again.state[p][key].copy_(t)
            set_step(again, step - 1)
            optimizer = again
        for i, p in enumerate(model.parameters()):
            p.grad = on_line(line, random(shapes[i], step, i).bfloat16())
        optimizer.step()
    return {name: piece_of(p.float()) for name, p in model.named_parameters()}


def test_stochastic_rounding_is_the_same_on_every_layout(ranks):
    """To the last bit: these rules are elementwise, and the random bits belong to the logical element and the step."""
    rules = ["adamw", "lion", "adamw8bit", "lion8bit"]
    configs = [optim_config(rule) for rule in rules]
    (alone,), everyone = ranks.run(run_16_bit, 1, configs), ranks.run(run_16_bit, 3, configs)
    for rule, right, *parts in zip(rules, alone, *everyone, strict=True):
        for name, piece in right.items():
            assert torch.equal(assemble([part[name] for part in parts]), assemble([piece])), (rule, name)


def assert_same_states(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name in theirs:
        if theirs[name].is_floating_point():
            bound = 2**-23 if theirs[name].dtype == torch.float32 else TOLERANCE
            assert relative_error(ours[name], theirs[name]) <= bound, name
    assert_same_codes(ours, theirs)
