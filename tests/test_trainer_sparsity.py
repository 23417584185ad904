"""Law 2 for sparse training: every method on every kind of layout equals one process that sorts whole matrices; masks are
the same to the last place after every step, and keep exactly what they are to keep. (Law 7.)"""

import functools
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from bare import bare
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from parity import Trace, assert_all_same, run_layouts, run_plain, small_config, textbook_update, with_layout
from rowwise.kernels.blockwise import code_book
from rowwise.kernels.rows import local
from rowwise.kernels.spec import specs_of
from rowwise.optim.build import build_optimizer
from rowwise.optim.sparse.budget import budgets as product_budgets
from rowwise.optim.sparse.build import build_sparsity
from rowwise.optim.sparse.masks import unpack
from rowwise.trainer.config import TrainConfig
from textbook_sparse import budgets, cooled, fallen, start_of, stop_of, textbook_sparsity

# Heads that ulysses can share, matrices of 12, 6, 30 and 37 rows: on four ranks one has no row of wk.
SMALL = ("model.heads=2", "model.head_dim=6", "batch.global_size=4", "batch.micro_size=1", "batch.seq_len=7", "steps=8")
GROUPS = ("model.dim=32", "model.head_dim=8", "model.ffn_dim=36", "sparsity.decay=0.3", "sparsity.account_every=1")
TWO = "sparsity.update_every=2"
METHODS = {
    "static": ("sparsity=static",),
    "set": ("sparsity=set", TWO),
    "set unfired": ("sparsity=set", TWO, "sparsity.growth=unfired", "sparsity.replace=0.9", "sparsity.density=0.4"),
    "set redistribute": ("sparsity=set", TWO, "sparsity.redistribute=true", "sparsity.distribution=er"),
    "rigl": ("sparsity=rigl", TWO),
    "rigl one layer": ("sparsity=rigl", TWO, "sparsity.layers=[blocks.1.*]", "sparsity.density=0.35"),
    "rigl redistribute": ("sparsity=rigl", TWO, "sparsity.redistribute=true", "sparsity.distribution=uniform"),
    "rigl from dense": ("sparsity=rigl", TWO, "sparsity.start_at=1", "sparsity.stop_at=6"),
    "srigl": ("sparsity=srigl", TWO, "sparsity.ablate_below=0.9", "sparsity.replace=0.6"),
    "srigl from dense": ("sparsity=srigl", TWO, "sparsity.start_at=2", "sparsity.distribution=uniform"),
    "gradual": ("sparsity=gradual", TWO),
    "gradual global": ("sparsity=gradual", TWO, "sparsity.distribution=global", "sparsity.start_at=1"),
    "st3": ("sparsity=st3",),
    "st3 one layer": ("sparsity=st3", "sparsity.layers=[blocks.0.*]"),
    "st3 by layer": ("sparsity=st3", TWO, "sparsity.distribution=erk", "sparsity.stop_at=5"),
    "pdp": ("sparsity=pdp", "sparsity.stop_at=4", "sparsity.temperature=0.003"),
    "pdp by layer": ("sparsity=pdp", TWO, "sparsity.distribution=uniform", "sparsity.stop_at=5", "sparsity.start_at=1"),
    "pdp rows": ("sparsity=pdp_rows", "sparsity.stop_at=5", "sparsity.temperature=0.3"),
    "pdp rows from step 0": ("sparsity=pdp_rows", TWO, "sparsity.start=0", "sparsity.stop=0.5", "sparsity.density=0.6"),
    "pdp nm": ("sparsity=pdp_nm", *GROUPS[:3], "sparsity.stop_at=4", "sparsity.temperature=0.003"),
    "pdp nm 1:8": ("sparsity=pdp_nm", *GROUPS[:2], "model.ffn_dim=40", "sparsity.n=1", "sparsity.m=8", "sparsity.start_at=3"),
    "nm column": ("sparsity=nm", *GROUPS),
    "nm row": ("sparsity=nm", *GROUPS, "sparsity.backward=row", "sparsity.n=1"),
}  # fmt: skip
LAYOUTS = {
    "zero 0": {"zero": 0},
    "zero 3": {"zero": 3},
    "hybrid": {"zero": 2, "replicate": 2, "shard": 2},
    "pipeline": {"zero": 1, "pipeline": 2, "shard": 2, "pipeline_schedule": "zb_h1"},
    "pipeline whole": {"zero": 0, "pipeline": 2, "shard": 2},
    "pipeline split": {"zero": 3, "pipeline": 2, "shard": 2, "pipeline_schedule": "blockwise"},
    "sequence": {"zero": 3, "ulysses": 2, "shard": 2},
}
STEPS = 6
SOFT = ("st3", "pdp", "nm")
# By default each on one layout, so that each family is on a pipeline of shards or elsewhere, most on both. The variants that are
# left out `test_equal_numbers_are_told_apart_alike` has, split by rows; what sees other matrices than its own, or not all, is here.
# `static` and `set` are in tests/cases.txt and tests/test_trainer_sparsity_runs.py, and masks on replicas and over shared sequences.
NOW = {
    "rigl": "zero 3", "rigl redistribute": "pipeline", "srigl": "pipeline", "gradual": "zero 3", "gradual global": "pipeline",
    "st3": "zero 0", "st3 one layer": "pipeline", "pdp": "zero 3", "pdp rows": "pipeline", "pdp nm": "zero 0", "nm column": "pipeline",
}  # fmt: skip
CASES = [
    pytest.param(layout, method, marks=[] if NOW.get(method) == layout else pytest.mark.full)
    for layout in LAYOUTS
    for method in METHODS
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("sparsity")


@functools.cache
def sparse_config(folder: Path, *overrides: str) -> TrainConfig:
    return small_config(folder, *SMALL, *overrides)


@functools.cache
def reference(folder: Path, method: str) -> Trace:
    return run_plain(sparse_config(folder, *METHODS[method]), STEPS)


@pytest.fixture(scope="module")
def traces(ranks, folder, full):
    """(layout, method) -> what each rank returned; all methods of a layout share a mesh."""

    @functools.cache
    def of_layout(layout: str) -> dict[str, list[Trace]]:
        chosen = [method for method in METHODS if full or NOW.get(method) == layout]
        world = 2 if layout in ("zero 0", "zero 3") else 4  # bare parameters, below, have rows that do not divide
        configs = [with_layout(sparse_config(folder, *METHODS[m]), world, **LAYOUTS[layout]) for m in chosen]
        everyone = ranks.run(run_layouts, world, configs, STEPS)
        return {method: [traces[i] for traces in everyone] for i, method in enumerate(chosen)}

    return lambda layout, method: of_layout(layout)[method]


@pytest.mark.parametrize(("layout", "method"), CASES)
def test_six_steps_equal_those_of_one_process(traces, folder, layout, method):
    found = traces(layout, method)
    assert_all_same(found, reference(folder, method))
    if not method.startswith(SOFT):
        assert_zero_outside(found[0])


def assert_zero_outside(trace: Trace) -> None:
    """What a mask leaves out is exactly zero."""
    for masks, weights in zip(trace.masks, trace.weights, strict=True):
        assert not any(weights[name][~mask].any() for name, mask in masks.items())


@pytest.mark.parametrize("method", METHODS)
def test_the_budget_is_kept_to_the_last_weight(traces, folder, method):
    """Law 7: after every step all masks together have exactly round(density x size), the density being that of the last
    update; and by matrix what the largest remainders say, unless matrices compete. srigl: rows that live are equal. Where a
    method is on no layout here, the masks are the reference's, which are the product's in the test of equal numbers."""
    config = sparse_config(folder, *METHODS[method]).sparsity
    trace = traces(NOW[method], method)[0] if method in NOW else reference(folder, method)
    for t, masks in enumerate(trace.masks, start=1):
        counts, shapes = [int(m.sum()) for m in masks.values()], [m.shape for m in masks.values()]
        sizes = [shape.numel() for shape in shapes]
        if method.startswith("nm"):
            assert_groups(masks, config)
            continue
        if method.startswith("pdp"):
            cut, start, stop = last_cut(config, t), start_of(config, 8), stop_of(config, 8)
            if cut is None:
                assert counts == sizes
            elif method.startswith("pdp nm"):
                assert_groups(masks, config)
            elif method.startswith("pdp rows"):
                rows, columns = zip(*shapes, strict=True)
                ends = budgets([torch.Size((n, 1)) for n in rows], Fraction(str(config.density)), "uniform")
                kept = fallen(cut, list(rows), ends, start, stop)
                assert counts == [k * n for k, n in zip(kept, columns, strict=True)]
            else:
                end = round(Fraction(str(config.density)) * sum(sizes))
                assert sum(counts) == sum(fallen(cut, [sum(sizes)], [end], start, stop))
            continue
        density = density_after(config, t)
        expected = budgets(shapes, density, config.distribution) if density < 1 else sizes
        if method.startswith("srigl") and density < 1:
            for mask, most in zip(masks.values(), expected, strict=True):
                (fan_in,) = set(mask.sum(1).tolist()) - {0}
                living = int(mask.any(1).sum())
                assert most - living < fan_in * living <= most
        elif "redistribute" in method or config.distribution == "global":
            assert sum(counts) == sum(expected) == round(density * sum(sizes))
        else:
            assert counts == expected


def assert_groups(masks: dict[str, Tensor], config) -> None:
    assert all((m.view(-1, config.m).sum(1) == config.n).all() for m in masks.values())


def last_cut(config, t: int) -> int | None:
    """The last step up to t at which masks were due; None before the first."""
    start, stop, every = start_of(config, 8), stop_of(config, 8), getattr(config, "update_every", 1)
    due = [u for u in range(max(1, start), t + 1) if (u - start) % every == 0 or u == stop]
    # What is hard stays.
    return (due[-1] if due[-1] < stop else stop) if due else None


def density_after(config, t: int) -> Fraction:
    """Of the masks after step t: 1 where nothing is pruned yet."""
    density, start = Fraction(str(config.density)), start_of(config, 8)
    if config.name in ("static", "set", "rigl", "srigl"):
        return density if t >= start else Fraction(1)
    cut = last_cut(config, t)
    return Fraction(1) if cut is None else cooled(cut, density, start, stop_of(config, 8))


def test_what_the_cases_are_for_happens(folder):
    """Masks move, rows are left out and come back, and matrices take weights from one another."""
    moves = {
        m: sum(int((a[n] ^ b[n]).sum()) for a, b in pairwise(reference(folder, m).masks) for n in a) for m in METHODS
    }
    assert moves.pop("static") == 0 and all(moves.values()), moves
    left_out = [sum(int((~m.any(1)).sum()) for m in masks.values()) for masks in reference(folder, "srigl").masks]
    assert left_out[0] == 0 < left_out[-1]
    for method in ("set redistribute", "rigl redistribute"):
        first, *_, last = reference(folder, method).masks
        assert any(int(first[name].sum()) != int(last[name].sum()) for name in first)


@pytest.mark.parametrize("distribution", ["uniform", "erk"])
def test_budgets_are_those_of_whole_numbers(distribution):
    """Of a density as it is written: 0.1 of 30 is 3."""
    shapes = [
        torch.Size(s) for s in ((12, 30), (6, 30), (6, 30), (30, 12), (37, 30), (30, 37), (37, 30), (64, 600), (5, 7))
    ]
    for thousandth in range(7, 1001):
        density = thousandth / 1000
        assert product_budgets(shapes, density, distribution) == budgets(shapes, Fraction(str(density)), distribution)


# Many equal magnitudes: who is first decides, and who that is must not depend on the layout.

TIED = {
    "set": METHODS["set"],
    "set redistribute": METHODS["set redistribute"],
    "rigl": METHODS["rigl"],
    "srigl": METHODS["srigl"],
    "gradual global": METHODS["gradual global"],
    "st3": (*METHODS["st3"], "sparsity.rescale=false"),
}
LATTICE = ("optim=lion", "optim.lr=0.0625", "optim.weight_decay=0")


@functools.cache
def coarse_reference(folder: Path, method: str) -> Trace:
    return run_plain(sparse_config(folder, *TIED[method], *LATTICE), 4, coarse=True)


@pytest.mark.parametrize("layout", [pytest.param("zero 3", marks=pytest.mark.full), "pipeline"])
def test_a_model_of_few_different_weights(ranks, folder, layout, full):
    """Unless in full, a method that looks at a matrix and one that looks at all; bare parameters are split below."""
    chosen = [*TIED] if full else ["rigl", "gradual global"]
    configs = [with_layout(sparse_config(folder, *TIED[method], *LATTICE), 4, **LAYOUTS[layout]) for method in chosen]
    everyone = ranks.run(run_layouts, 4, configs, 4, True)
    for i, method in enumerate(chosen):
        alone = coarse_reference(folder, method)
        values = torch.cat([w.flatten() for w in alone.weights[-1].values()]).abs().unique()
        assert len(values) < 20, "few weights are equal: the test would see nothing"
        assert_all_same([traces[i] for traces in everyone], alone)


# Fewer rows than ranks, one row, one column, a vector.
SHAPES = [(37, 30), (3, 17), (1, 50), (50, 1), (16, 8), (7,)]


class Edges(nn.Module):
    """Weights on a lattice of 1/16; without the column where every row must keep a weight."""

    def __init__(self, config):
        super().__init__()
        for i, shape in enumerate(s for s in SHAPES if s != (50, 1) or config.sparsity.name != "srigl"):
            self.register_parameter(f"w{i}", nn.Parameter(few_values(shape, 0, i)))


def few_values(shape, step: int, i: int) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * step + i)
    return torch.randint(-2, 3, shape, generator=generator).double() / 16


Steps = list[tuple[dict[str, Tensor], dict[str, Tensor]]]  # masks and weights after each


def edges_on_ranks(workers, cases: list[tuple[TrainConfig, bool, tuple[int, ...]]]) -> list[Steps]:
    """Each case (configuration, gradients of zero, steps that are passed over) of bare parameters, split by rows."""
    dist.init_process_group("gloo", store=workers.store, rank=workers.rank, world_size=workers.world_size)
    line = dist.init_device_mesh("cpu", (workers.world_size,))
    return [split_edges(line, *case) for case in cases]


def split_edges(line, config: TrainConfig, zero: bool, skipped: tuple[int, ...]) -> Steps:
    model, steps = bare(Edges(config)), []
    for name, p in list(model.named_parameters()):
        setattr(model, name, nn.Parameter(split(p.data, line)))
    optimizer = build_optimizer(model, config.optim)
    specs = specs_of(model)
    sparsity = build_sparsity(model, config.sparsity, specs, 0, config.steps, None, torch.float64)
    for t in range(1, STEPS + 1):
        for i, p in enumerate(model.parameters()):
            p.grad = split(torch.zeros(p.shape).double() if zero else few_values(p.shape, t, i), line)
        sparsity.filter_gradients(t)
        sparsity.step(optimizer, t, t not in skipped)
        masks = {n.removesuffix(".mask"): local(m) for n, m in sparsity.named_state().items() if n.endswith(".mask")}
        weights = {name: local(p.detach()).clone() for name, p in model.named_parameters()}
        steps.append(({n: unpack(m, specs[n].shape[1]) for n, m in masks.items()}, weights))
    return steps


def split(whole: Tensor, line) -> DTensor:
    """This rank's rows of what all ranks have, as `distribute_tensor` gives them, which takes ten times as long."""
    rows = [*whole.chunk(line.size()), *[whole[:0]] * line.size()][line.get_rank()]
    return DTensor.from_local(rows.clone(), line, [Shard(0)], run_check=False, shape=whole.shape, stride=whole.stride())


def joined(everyone: list[Steps]) -> Steps:
    """The rows of all ranks, one after the other."""

    def rows(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    return [(rows([m for m, _ in ranks]), rows([w for _, w in ranks])) for ranks in zip(*everyone, strict=True)]


def edges_alone(config: TrainConfig, zero: bool, skipped: tuple[int, ...] = ()) -> Steps:
    params = dict(Edges(config).named_parameters())
    sparsity, updates, steps = textbook_sparsity(config.sparsity, params, 0, config.steps), 0, []
    states: dict[str, dict[str, Tensor]] = {name: {} for name in params}
    for t in range(1, STEPS + 1):
        for i, p in enumerate(params.values()):
            p.grad = torch.zeros_like(p) if zero else few_values(p.shape, t, i)
        sparsity.filter_gradients(t)
        updates += t not in skipped
        optimise = functools.partial(textbook_update, config, params, states, updates, config.optim.lr)
        sparsity.step(t, optimise, states, t not in skipped)
        steps.append((dict(sparsity.masks), {name: p.detach().clone() for name, p in params.items()}))
    return steps


def assert_same_steps(ours: Steps, theirs: Steps) -> None:
    for t, ((masks, weights), (known, right)) in enumerate(zip(ours, theirs, strict=True), start=1):
        different = {name: int((masks[name] ^ mask).sum()) for name, mask in known.items()}
        assert not any(different.values()), f"step {t}: so many places of masks differ: {different}"
        for name, w in right.items():
            torch.testing.assert_close(weights[name], w, rtol=1e-9, atol=1e-12)


BY_MASKS = [method for method in METHODS if not method.startswith(("nm", "pdp nm")) and "one layer" not in method]


# Nothing to drop or to grow, all in one step, everything out.
ODD = {
    "all is kept": ("sparsity=set", TWO, "sparsity.density=1"),
    "little is left to grow": ("sparsity=rigl", TWO, "sparsity.density=0.9", "sparsity.replace=0.9"),
    "little is left to grow anywhere": (*METHODS["set redistribute"], "sparsity.density=0.9", "sparsity.replace=0.9"),
    "once, at the end": ("sparsity=rigl", "sparsity.start_at=4", "sparsity.stop_at=4"),
    "once, at the end, in equal rows": ("sparsity=srigl", "sparsity.start_at=4", "sparsity.stop_at=4"),
    "all at once": ("sparsity=gradual", "sparsity.start_at=3", "sparsity.stop_at=3", "sparsity.distribution=er"),
    "all at once, softly": ("sparsity=st3", "sparsity.start_at=3", "sparsity.stop_at=3"),
    "all at once, for good": (
        "sparsity=pdp",
        "sparsity.start_at=3",
        "sparsity.stop_at=3",
        "sparsity.temperature=0.003",
    ),
    "nothing falls": ("sparsity=pdp", "sparsity.density=1", "sparsity.stop_at=3"),
    "every row is asked for all": (*METHODS["srigl"], "sparsity.ablate_below=1"),
    "no row is left out": (*METHODS["srigl"], "sparsity.ablate_below=0", "sparsity.replace=0.9"),
    "seldom": ("sparsity=st3", "sparsity.update_every=5", "sparsity.distribution=er"),
}
# Gradients matter to what grows by them, and a step that is passed over to all that updates. Variants of a method, which differ
# in how many weights a matrix has and not in which these are, have the two in full alone.
FAMILIES = ("set", "rigl", "srigl", "srigl from dense", "gradual", "gradual global", "st3", "pdp", "pdp rows")
FEW = [(method, "few gradients") for method in (*BY_MASKS, *ODD)]
OTHER_KINDS = [(method, "gradients of zero") for method in BY_MASKS if "rigl" in method]
OTHER_KINDS += [(method, "passed over") for method in BY_MASKS if method != "static"]


def edge_case(folder: Path, method: str, kind: str) -> tuple[TrainConfig, bool, tuple[int, ...]]:
    """Passed over are updates, among them the first, which prunes a dense model, and the last, where a density arrives."""
    config = sparse_config(folder, *(METHODS | ODD)[method], *LATTICE)
    skipped = (start_of(config.sparsity, 8) or 2, 6) if kind == "passed over" else ()
    return config, kind == "gradients of zero", skipped


@pytest.fixture(scope="module")
def edges(ranks, folder, full):
    """world -> (method, kind) -> what the ranks have together, in one call. One rank alone has the cases of few gradients, of one of
    each family unless in full."""

    @functools.cache
    def on(world: int) -> dict[tuple[str, str], Steps]:
        cases = [case for case in FEW if world > 1 or full or case[0] in FAMILIES]
        cases += [case for case in OTHER_KINDS if world > 1 and (full or case[0] in FAMILIES)]
        everyone = ranks.run(edges_on_ranks, world, [edge_case(folder, *case) for case in cases])
        return {case: joined(parts) for case, parts in zip(cases, zip(*everyone, strict=True), strict=True)}

    return on


@pytest.mark.parametrize(
    ("method", "kind"),
    [*FEW, *(pytest.param(*case, marks=[] if case[0] in FAMILIES else pytest.mark.full) for case in OTHER_KINDS)],
)
def test_equal_numbers_are_told_apart_alike(edges, folder, method, kind, full):
    """Weights of a few magnitudes, gradients of a few or none, and steps that are passed over: one rank and three have the
    masks of the reference. Gradients that are not finite move no weight, and no mask that grows by them; what looks at
    weights alone is done."""
    right = edges_alone(*edge_case(folder, method, kind))
    for world in (1, 3) if kind == "few gradients" and (full or method in FAMILIES) else (3,):
        assert_same_steps(edges(world)[method, kind], right)


def test_a_step_that_is_passed_over(edges, folder):
    """rigl stays as it was; a density that falls arrives."""
    for method in ("rigl", "srigl"):
        (first, _), (second, _), *_ = edges(3)[method, "passed over"]
        assert all(torch.equal(second[name], mask) for name, mask in first.items())
    masks, _ = edges(3)["gradual", "passed over"][5]
    density = edge_case(folder, "gradual", "passed over")[0].sparsity.density
    assert sum(int(m.sum()) for m in masks.values()) == round(density * sum(m.numel() for m in masks.values()))


# Matrices of exactly 4,096 elements (wq) and of 600 columns (w2), which have two blocks of 8 bits a row.
WIDE = ("model.layers=1", "model.dim=64", "model.heads=2", "model.kv_heads=1", "model.ffn_dim=600", "batch.seq_len=7",
        "batch.global_size=3", "batch.micro_size=1", "steps=4", "sparsity=rigl", TWO)  # fmt: skip
RULES = {
    "adamw8bit": (),
    "lion8bit": (),
    "muon": (),
    "dct": ("optim.rank=8", "optim.refresh_every=2"),
    "adafactor": (),
    "lion": (),
}


ALIKE = ("lion8bit", "lion")  # whose states are kept as those of adamw8bit, and of what adamw has here everywhere


@pytest.fixture(scope="module")
def rule_traces(ranks, folder, full):
    configs = {
        rule: small_config(folder, *WIDE, f"optim={rule}", *options)
        for rule, options in RULES.items()
        if full or rule not in ALIKE
    }
    everyone = ranks.run(run_layouts, 3, [with_layout(config, 3, zero=3) for config in configs.values()], 3)
    return {rule: (config, [traces[i] for traces in everyone]) for i, (rule, config) in enumerate(configs.items())}


@pytest.mark.parametrize("rule", [pytest.param(r, marks=pytest.mark.full if r in ALIKE else []) for r in RULES])
def test_the_states_of_every_rule_follow(rule_traces, rule):
    """What a mask loses or gains has no past; in 8 bits it has the code of zero."""
    config, found = rule_traces[rule]
    alone = run_plain(config, 3)
    assert_all_same(found, alone)
    if rule.endswith("8bit"):
        zero = int((code_book(True) == 0).nonzero())
        for name, mask in found[0].masks[1].items():
            changed = mask ^ found[0].masks[0][name]
            codes = found[0].states[1].get(f"{name}.exp_avg.codes")
            assert codes is None or (changed.any() and (codes[changed] == zero).all())
