"""The optimizer inside the backward: the same run, with gradients that do not stay. (Law 2.)"""

import functools
from contextlib import nullcontext

import pytest
import torch

from parity import TOLERANCE, engine_on, relative_error, run_plain, small_config, step_input, whole, with_layout
from rowwise.optim.build import build_optimizer, named_state
from rowwise.parallel.mesh import make_mesh
from rowwise.parallel.state_bytes import PeakStates
from rowwise.trainer.data.open import open_data
from rowwise.trainer.feed import train_batches
from rowwise.trainer.update import make_update

RULES = ("adamw", "adamw8bit", "fira", "muon")


def config_of(folder, rule, *overrides):
    low = ("optim.rank=8", "optim.refresh_every=1") if rule in ("galore", "fira") else ()
    shapes = ("model.dim=64", "model.heads=2", "model.kv_heads=1", "model.ffn_dim=600")
    return small_config(folder, f"optim={rule}", *low, *shapes, "clip_norm=0", "optim.lr=0.01", *overrides)


def run(workers, config, steps=2, watch=False):
    """Losses, norms, parameters and states of a run through the function that the trainer calls; and, where they are
    watched, its peak of bytes."""
    mesh = make_mesh(config.parallel, workers)
    data = open_data(config.data, config.batch.seq_len, config.model.vocab_size)
    engine = engine_on(mesh, config)
    model = engine.model
    optimizer = build_optimizer(model, config.optim, config.seed)
    update = make_update(config, mesh, engine, optimizer, None)
    batches = train_batches(config, mesh, data, position=0)
    losses, norms, parameters = [], [], []
    states = PeakStates(model, optimizer)
    with states if watch else nullcontext():
        for step in range(steps):
            report = update(step_input(config, step + 1, next(batches)))
            optimizer.zero_grad()
            losses.append(report.loss)
            norms.append(report.grad_norm)
            parameters.append({name: whole(p) for name, p in model.named_parameters()})
    assert all(p.grad is None for p in model.parameters())
    kept = {f"{n}.{k}": whole(t) for n, state in named_state(model, optimizer).items() for k, t in state.items()}
    return losses, norms, parameters, kept, states.peak


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("in-backward")


@functools.cache
def plain(folder, rule):
    return run_plain(config_of(folder, rule), steps=2)


# Rules take turns with the layouts, which see of a rule whether it exchanges messages: fira and muon do.
TURNS = {(1, 1): ("adamw8bit", "muon"), (3, 0): ("adamw", "fira"), (3, 3): ("adamw8bit", "muon")}
CASES = [
    pytest.param(*layout, rule, marks=[] if rule in TURNS[layout] else pytest.mark.full)
    for layout in ((1, 1), (3, 0), (3, 3))
    for rule in RULES
]


@pytest.mark.parametrize(("world", "zero", "rule"), CASES)
def test_it_is_the_same_run(ranks, folder, rule, world, zero):
    config = config_of(folder, rule, f"batch.micro_size={24 // world}", "optim.in_backward=true")
    reference = plain(folder, rule)
    start = None
    for losses, norms, parameters, kept, _ in ranks.run(run, world, with_layout(config, world, zero=zero)):
        assert losses == pytest.approx(reference.losses, rel=TOLERANCE)
        assert norms == pytest.approx(reference.norms, rel=TOLERANCE)
        for name, update in reference.updates[1].items():
            assert relative_error(parameters[1][name] - parameters[0][name], update) <= 1e3 * TOLERANCE, name
        for key, state in reference.states[-1].items():
            if state.is_floating_point() and state.dtype == torch.float64:
                assert relative_error(kept[key], state) <= TOLERANCE, key
        start = start or parameters[-1]
        assert all(torch.equal(start[name], parameters[-1][name]) for name in start)


@pytest.mark.parametrize("zero", [0, 3])
def test_gradients_do_not_stay(ranks, tmp_path, zero):
    """At most a part's gradients live at once; without it, all do."""
    layers = ("model.layers=4", "batch.micro_size=12", "precision=fp32", "data.mask_documents=false")
    peaks = {}
    for inside in ("true", "false"):
        config = with_layout(config_of(tmp_path, "adamw", *layers, f"optim.in_backward={inside}"), 2, zero=zero)
        peaks[inside] = ranks.run(run, 2, config, 1, True)[0][4].gradients
    assert peaks["true"] < 0.4 * peaks["false"], peaks


def test_bytes_of_everything_with_16_bit_parameters(ranks, tmp_path):
    """Parameters 2, 8-bit states 2.04, and the gradients of one part: at most 5.1 bytes a parameter."""
    overrides = (
        "optim.param_dtype=bf16",
        "precision=bf16",
        "optim.in_backward=true",
        "data.mask_documents=false",
        "batch.global_size=4",
        "batch.micro_size=4",
    )
    big = ("model.dim=256", "model.ffn_dim=256", "model.layers=8", "model.heads=4", "model.kv_heads=4")
    config = with_layout(config_of(tmp_path, "adamw8bit", *big, *overrides), 1, zero=3)
    ((_, _, parameters, _, peak),) = ranks.run(run, 1, config, 1, True)
    count = sum(p.numel() for p in parameters[0].values())
    assert peak.total / count <= 5.1, peak
    assert all(p.dtype == torch.bfloat16 for p in parameters[0].values())
