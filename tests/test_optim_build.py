"""Which rule every parameter follows, what its state weighs, and what the rules promise beside their formulas."""

import math
import re

import pytest
import torch
from bare import bare
from torch import nn

from parity import small_config, with_layout
from rowwise.launch.compose import compose_tree
from rowwise.optim.build import assignment_table, assignments, build_optimizer, named_state, rule_name
from rowwise.optim.lowrank.projection import subspace_bases
from rowwise.optim.muon import newton_schulz_polynomial
from rowwise.parallel.pipeline_schedule.generate import Shape, gpipe
from rowwise.trainer.config import config_from_tree
from rowwise.trainer.metrics import read_metrics
from rowwise.trainer.models.decoder import Decoder
from rowwise.trainer.pipeline import StagedDecoder
from runs import run_said, run_train


def optim(*overrides):
    return config_from_tree(compose_tree(list(overrides))).optim


def decoder():
    """A hidden matrix of 600 x 64, one of 64 x 600, attention of 64 x 64."""
    overrides = ["model.dim=64", "model.heads=1", "model.kv_heads=1", "model.ffn_dim=600", "model.layers=1"]
    return Decoder(config_from_tree(compose_tree(overrides)).model)


def rules(*overrides):
    config = optim(*overrides)
    return {name: rule_name(name, spec, config) for name, spec in decoder().parameter_specs().items()}


@pytest.mark.parametrize(
    ("name", "hidden", "embedding", "head", "vector"),
    [
        ("adamw", "adamw", "adamw", "adamw", "adamw"),
        ("lion", "lion", "lion", "lion", "lion"),
        ("adafactor", "adafactor", "adafactor", "adafactor", "adafactor"),
        ("muon", "muon", "adamw", "adamw", "adamw"),
        ("adamw8bit", "adamw8bit", "adamw", "adamw8bit", "adamw"),
        ("lion8bit", "lion8bit", "lion", "lion8bit", "lion"),
        ("galore", "galore", "adamw", "adamw", "adamw"),
        ("apollo_mini", "apollo_mini", "adamw", "adamw", "adamw"),
    ],
)
def test_every_kind_has_its_rule(name, hidden, embedding, head, vector):
    found = rules(f"optim={name}")
    assert found["blocks.0.feed_forward.w1.weight"] == found["blocks.0.attention.wo.weight"] == hidden
    assert (found["embed.weight"], found["head.weight"], found["norm.weight"]) == (embedding, head, vector)


def test_the_first_pattern_that_matches_wins():
    patterns = (
        "[{match: '*.w1.*', rule: lion8bit}, {match: 'blocks.*', rule: adamw}, {match: embed.*, rule: adamw8bit}]"
    )
    found = rules("optim=galore", f"optim.assign={patterns}")
    assert found["blocks.0.feed_forward.w1.weight"] == "lion8bit"
    assert found["blocks.0.feed_forward.w2.weight"] == "adamw"
    assert found["embed.weight"] == "adamw8bit"
    assert found["head.weight"] == "adamw"


def test_the_table_names_every_parameter_its_state_and_its_bytes():
    model = decoder()
    table = assignment_table(assignments(model, build_optimizer(model, optim("optim=adamw8bit"))))
    lines = {line.split("  ")[0]: line for line in table.splitlines()}
    w1 = lines["blocks.*.feed_forward.w1.weight"].split()
    # 600 x 64: a code and, per row of 64, one absolute maximum, twice.
    assert w1[-3:] == ["fp32", "1", f"{2 * (1 + 4 / 64):.2f}"]
    assert lines["norm.weight"].split()[-4:] == ["adamw", "fp32", "1", "8.00"]
    assert "bytes per parameter" in table.splitlines()[-1]


@pytest.mark.parametrize("tied", ["true", "false"])
def test_the_stages_of_a_pipeline_follow_the_rules_of_the_whole_model(tied):
    overrides = ["model.dim=64", "model.heads=1", "model.kv_heads=1", "model.layers=3", f"model.tie_embeddings={tied}"]
    config = config_from_tree(compose_tree(overrides)).model
    parts = {stage: Decoder(config, layers) for stage, layers in enumerate((range(1), range(1, 3)))}
    for rule in ("muon", "dct", "adamw8bit"):
        whole, stages = (
            assignments(model, build_optimizer(model, optim(f"optim={rule}")))
            for model in (Decoder(config), StagedDecoder(parts, gpipe(Shape(2, 1, 4))))
        )
        assert stages == whole and {kind for _, _, kind, _, _ in whole} >= {"embedding", "hidden", "vector"}


def test_the_rank_is_a_quarter_of_the_width_and_no_more_than_a_narrow_side():
    shape = ["model.dim=64", "model.heads=8", "model.kv_heads=1", "model.ffn_dim=600", "model.layers=1"]
    model = Decoder(config_from_tree(compose_tree(shape)).model)
    for rank, at_w2, at_wk in (("null", 16, 8), ("6", 6, 6)):
        optimizer = build_optimizer(model, optim("optim=dct", f"optim.rank={rank}"))
        table = assignment_table(assignments(model, optimizer))
        lines = {line.split("  ")[0]: line for line in table.splitlines()}
        assert f"dct, rank {at_w2} " in lines["blocks.*.feed_forward.w2.weight"]
        assert f"dct, rank {at_wk} " in lines["blocks.*.attention.wk.weight"]
        assert optimizer.state[model.blocks["0"].feed_forward.w2.weight]["exp_avg"].shape == (64, at_w2)
    short = build_optimizer(model, optim("optim=dct", "optim.side=short"))
    assert short.state[model.blocks["0"].feed_forward.w2.weight]["exp_avg"].shape == (600, 16)


def test_a_run_keeps_its_table_beside_its_records(ranks, tmp_path):
    said = ranks.run(run_said, 2, with_layout(small_config(tmp_path, "optim=galore", "optim.rank=4", "steps=1"), 2))
    table = (tmp_path / "run/parameters.txt").read_text()
    assert "galore, rank 4" in table and "adamw" in table
    per_parameter = re.fullmatch(r"optimizer state: (.*) bytes per parameter", table.splitlines()[-1])[1]
    assert f"galore keeps {per_parameter} bytes a parameter" in said[0]
    assert not said[1]


def test_state_holds_nothing_but_tensors_and_loads_with_weights_only(tmp_path):
    for name in ("galore", "dct", "fira", "apollo", "adamw8bit", "adafactor", "muon"):
        model = decoder()
        low = ["optim.rank=8"] if name in ("galore", "dct", "fira", "apollo") else []
        optimizer = build_optimizer(model, optim(f"optim={name}", *low))
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        optimizer.step()
        states = named_state(model, optimizer)
        torch.save(states, tmp_path / "state.pt")
        again = torch.load(tmp_path / "state.pt", weights_only=True)
        assert all(torch.equal(again[n][key], t) for n, state in states.items() for key, t in state.items())


# kappa -> the dual norm, and how far the ball goes at weight decay 1
BALLS = {
    "l1": (lambda x: x.abs().max(), 1.0),
    "l2": (lambda x: x.norm(), math.sqrt(64 * 32)),
    "rows": (lambda x: x.norm(dim=1).max(), math.sqrt(32)),
    "huber": (lambda x: x.abs().max(), 1.0),
    "nuclear": (lambda x: torch.linalg.matrix_norm(x, 2), 1.21 * math.sqrt(64)),
}


@pytest.mark.parametrize("kappa", BALLS)
@pytest.mark.parametrize("start", [20.0, 0.95])
def test_lion_goes_into_the_ball_of_its_norm_and_stays(kappa, start):
    """How far x is outside of its ball shrinks by 1 - lr weight_decay a step, whatever the gradients; inside it stays zero.
    `start`: in radii."""
    rate, decay, norm = 0.05, 0.5, BALLS[kappa][0]
    radius = BALLS[kappa][1] / decay
    delta = ["optim.delta=0.01"] if kappa == "huber" else []
    model = bare(nn.Linear(32, 64, bias=False))
    nn.init.ones_(model.weight)
    model.weight.data *= start * radius / norm(model.weight.data)
    choice = [f"optim.kappa={kappa}", *delta, f"optim.lr={rate}", f"optim.weight_decay={decay}"]
    optimizer = build_optimizer(model, optim("optim=lion", *choice))
    torch.manual_seed(0)
    outside = max(0.0, float(norm(model.weight.detach())) - radius)
    for step in range(300):
        model.weight.grad = torch.randn(64, 32) if step % 50 < 10 else torch.full((64, 32), -1.0)
        optimizer.step()
        outside *= 1 - rate * decay
        assert float(norm(model.weight.detach())) <= (radius + outside) * (1 + 1e-5)
    assert float(norm(model.weight.detach())) > 0.5 * radius, "the wall is near, so the test sees it"


@pytest.mark.parametrize("shape", [(40, 24), (24, 40)])
def test_muon_with_decay_is_lion_with_the_nuclear_norm(shape):
    """Chen et al., *Muon Optimizes Under Spectral Norm Constraints*: the same steps, by betas (b^2, b)."""

    def after(*choice):
        model = bare(nn.Linear(shape[1], shape[0], bias=False, dtype=torch.float64))
        nn.init.ones_(model.weight)
        optimizer = build_optimizer(model, optim(*choice))
        for step in range(4):
            torch.manual_seed(step)
            model.weight.grad = torch.randn(shape, dtype=torch.float64)
            optimizer.step()
        return model.weight.detach()

    b = 0.9
    ours = after(
        "optim=lion", "optim.kappa=nuclear", f"optim.betas=[{b**2},{b}]", "optim.lr=0.004", "optim.weight_decay=5"
    )
    theirs = after("optim=muon", f"optim.momentum={b}", "optim.lr=0.02", "optim.weight_decay=1")
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_the_subspace_is_that_of_the_singular_vectors():
    torch.manual_seed(0)
    left, _ = torch.linalg.qr(torch.randn(90, 40, dtype=torch.float64))
    right, _ = torch.linalg.qr(torch.randn(60, 40, dtype=torch.float64))
    g = left @ torch.diag(0.7 ** torch.arange(40, dtype=torch.float64)) @ right.T
    basis = torch.zeros(60, 8, dtype=torch.float64)
    for refresh in range(3):
        (basis,) = subspace_bases([g], [basis], [g.shape], [refresh], None)
    torch.testing.assert_close(basis.T @ basis, torch.eye(8, dtype=torch.float64))
    # Each vector is the singular vector but for its sign.
    torch.testing.assert_close((basis.T @ right[:, :8]).abs(), torch.eye(8, dtype=torch.float64), atol=1e-4, rtol=0)


def test_directions_beside_a_much_larger_one_are_found_in_float32():
    """As gradients with a spike have them: squares of a thousandth of the largest would sink in its rounding."""
    torch.manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(n, 16, dtype=torch.float64)).Q for n in (90, 60))
    g = (left * torch.tensor([1.0, *(1e-3 * 0.8**k for k in range(15))]).double() @ right.T).float()
    (basis,) = subspace_bases([g], [torch.zeros(60, 8)], [g.shape], [0], None)
    found = (basis.double().T @ right[:, :8]).abs()
    torch.testing.assert_close(found, torch.eye(8, dtype=torch.float64), atol=0.01, rtol=0)


def test_muon_brings_every_singular_value_near_one():
    torch.manual_seed(0)
    x = torch.randn(90, 30, dtype=torch.float64)
    values = torch.linalg.svdvals(x @ newton_schulz_polynomial(x.T @ x))
    assert float(values.min()) > 0.6 and float(values.max()) < 1.3
    assert not newton_schulz_polynomial(torch.zeros(3, 3)).isnan().any()


@pytest.mark.parametrize("name", ["adamw", "adamw8bit", "lion", "apollo"])
def test_16_bit_parameters_move_by_less_than_they_can_show(name):
    """Steps a hundred times smaller than the distance to the next bfloat16 add up, since rounding is unbiased; to
    nearest, nothing would ever move."""
    model = bare(nn.Linear(64, 640, bias=False, dtype=torch.bfloat16))
    nn.init.constant_(model.weight, 1.0)
    low = ["optim.rank=8"] if name == "apollo" else []
    config = optim(f"optim={name}", *low, "optim.lr=4e-5", "optim.weight_decay=0", "optim.param_dtype=bf16")
    optimizer = build_optimizer(model, config)
    wide = bare(nn.Linear(64, 640, bias=False))
    nn.init.constant_(wide.weight, 1.0)
    reference = build_optimizer(wide, config)
    for step in range(100):
        torch.manual_seed(step)
        g = torch.randn(640, 64).abs()
        model.weight.grad, wide.weight.grad = g.bfloat16(), g
        optimizer.step()
        reference.step()
    moved, expected = (1 - w.weight.detach().float().mean() for w in (model, wide))
    assert expected > 5e-4
    assert float(moved) == pytest.approx(float(expected), rel=0.05)
    assert model.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("rule", ["adamw8bit", pytest.param("galore", marks=pytest.mark.full)])
def test_a_run_in_16_bits_stays_near_float64(ranks, tmp_path, rule):
    low = ["optim.rank=8"] if rule == "galore" else []
    shape = ["model.dim=64", "model.heads=2", "model.ffn_dim=128", "batch.micro_size=6", "steps=10", "optim.lr=0.003"]

    def losses(name, *choice):
        config = small_config(tmp_path, f"optim={rule}", *low, *shape, *choice, f"run_dir={tmp_path}/{name}")
        ranks.run(run_train, 2, with_layout(config, 2))
        return [record["loss"] for record in read_metrics(tmp_path / name)]

    exact = losses("fp64")
    assert exact[-1] < 0.97 * exact[0]
    for dtype in ("null", "bf16"):
        assert losses(dtype, "precision=bf16", f"optim.param_dtype={dtype}") == pytest.approx(exact, rel=0.01)
