"""Learning-rate schedules as pure functions: their shape at the points that define them."""

import math
import re
from pathlib import Path

import pytest
import torch
from bare import bare
from transformers import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup, get_wsd_schedule

from rowwise.launch.compose import compose_tree
from rowwise.optim.build import build_optimizer, follow_schedule
from rowwise.optim.lr_schedules import Constant, Cosine, Infinite, Linear, OneCycle, Wsd, check_schedule
from rowwise.trainer.config import config_from_tree

STEPS = 1000
ROOT = Path(__file__).parents[1]


def test_the_documented_factors_are_those_of_the_presets():
    """docs/schedules.md: a row for every file of conf/schedule, and others with options."""
    rows = re.findall(r"^\| `(schedule=[^`]*)` \|(.*)\|$", (ROOT / "docs/schedules.md").read_text(), re.MULTILINE)
    for overrides, cells in rows:
        schedule = config_from_tree(compose_tree([*overrides.split(), f"steps={STEPS}"])).schedule
        check_schedule(schedule, STEPS)
        factors = [schedule.factor(min(step, STEPS - 1), STEPS) for step in (0, 250, 500, 750, 1000)]
        assert [cell.strip() for cell in cells.split("|")] == [f"{factor:.3g}" for factor in factors], overrides
    presets = {f"schedule={path.stem}" for path in (ROOT / "conf/schedule").glob("*.yaml")}
    assert presets <= {overrides for overrides, _ in rows}


def test_no_preset_is_a_constant_or_loses_a_step():
    for path in (ROOT / "conf/schedule").glob("*.yaml"):
        schedule = config_from_tree(compose_tree([f"schedule={path.stem}"])).schedule
        factors = [schedule.factor(step, 200) for step in range(200)]
        assert len(set(factors)) > 1 and min(factors) > 0 and max(factors) == pytest.approx(1, abs=1e-3), path


def theirs(make, *arguments, **options):
    """The factors of one of transformers' schedules."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    return make(optimizer, *arguments, **options).lr_lambdas[0]


def test_decays_are_those_of_transformers():
    warm, rest = 100, range(100, STEPS)
    pairs = [
        (Cosine(warmup_steps=warm, floor=0.0), theirs(get_cosine_schedule_with_warmup, warm, STEPS)),
        (Linear(warmup_steps=warm), theirs(get_linear_schedule_with_warmup, warm, STEPS)),
    ]
    for ours, name in (("linear", "linear"), ("cosine", "cosine"), ("sqrt", "1-sqrt")):
        options = {"num_decay_steps": 200, "num_stable_steps": 700, "decay_type": name, "min_lr_ratio": 0.1}
        pairs.append((Wsd(warmup_steps=warm, decay=ours, floor=0.1), theirs(get_wsd_schedule, warm, **options)))
    for schedule, factor in pairs:
        assert [schedule.factor(t, STEPS) for t in rest] == pytest.approx([factor(t) for t in rest]), schedule


def test_a_phase_is_a_share_of_the_run_or_a_number_of_steps():
    for kind in (Constant, Cosine, Linear, Wsd, Infinite):
        for given in ({"warmup": 0.05}, {"warmup_steps": 50}):
            assert kind(**given).factor(49, STEPS) < 1 == kind(**given).factor(50, STEPS)
        assert kind(warmup_steps=0).factor(0, STEPS) == 1, "as the runs of a first release, which said so"
    assert Wsd(decay_share=0.3).factor(700, STEPS) == 1 > Wsd(decay_share=0.3).factor(701, STEPS)
    assert Infinite(cooldown_share=0.4).factor(419, STEPS) > 0.5 == Infinite(cooldown_share=0.4).factor(420, STEPS)


def test_warm_up_reaches_full_rate_and_never_starts_at_zero():
    for schedule in (Constant(warmup_steps=10), Wsd(warmup_steps=10), Cosine(warmup_steps=10), Linear(warmup_steps=10)):
        assert schedule.factor(0, STEPS) == pytest.approx(1 / 11)
        assert schedule.factor(4, STEPS) == pytest.approx(5 / 11)
        assert schedule.factor(10, STEPS) == pytest.approx(1.0)


def test_cosine_and_linear_end_at_their_floor():
    cosine, linear = Cosine(warmup_steps=100, floor=0.1), Linear(warmup_steps=100, floor=0.2)
    assert (cosine.factor(550, STEPS), cosine.factor(1000, STEPS)) == pytest.approx((0.55, 0.1))
    assert (linear.factor(550, STEPS), linear.factor(1000, STEPS)) == pytest.approx((0.6, 0.2))
    assert linear.factor(999, STEPS) == pytest.approx(0.2 + 0.8 / 900)


def test_one_cycle_climbs_once_and_falls_once():
    factors = [OneCycle(rise=0.3).factor(t, STEPS) for t in range(STEPS)]
    top = factors.index(max(factors))
    assert factors[0] == pytest.approx(1 / 25)
    assert factors[-1] == pytest.approx(1 / 25 / 1e4)
    assert max(factors) == pytest.approx(1.0, abs=1e-4)
    assert top in (299, 300)
    assert factors[: top + 1] == sorted(factors[: top + 1])
    assert factors[top:] == sorted(factors[top:], reverse=True)


def test_one_cycle_and_its_momentum_are_those_of_torch():
    """torch ends the climb at pct_start T - 1; with the pct_start that ends it where ours does, they are the same."""
    ours, p = OneCycle(momentum=[0.95, 0.85]), torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.AdamW([p], lr=1.0, betas=(0.9, 0.99))
    share = (ours.rise * (STEPS - 1) + 1) / STEPS
    theirs = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1.0, total_steps=STEPS, pct_start=share)
    for step in range(STEPS):
        (group,) = optimizer.param_groups
        assert ours.factor(step, STEPS) == pytest.approx(group["lr"], abs=1e-9)
        assert ours.beta1(step, STEPS) == pytest.approx(group["betas"][0], abs=1e-9)
        if step < STEPS - 1:
            optimizer.step()
            theirs.step()


@pytest.mark.parametrize("rule", ["adamw", "lion"])
def test_a_momentum_cycle_steps_as_with_these_betas(rule):
    """Each step is one of an optimizer whose beta1 is the cycle's number; for adamw torch's own."""
    config = config_from_tree(
        compose_tree([f"optim={rule}", "optim.lr=0.01", "schedule.momentum=[0.95,0.5]", "steps=8"])
    )
    torch.manual_seed(0)
    ours = bare(torch.nn.Linear(8, 8, bias=False)).double()
    twin = torch.nn.Linear(8, 8, bias=False).double()
    twin.load_state_dict(ours.state_dict())
    optimizer = build_optimizer(ours, config.optim)
    reference = torch.optim.AdamW(twin.parameters(), betas=(0.9, 0.95), weight_decay=config.optim.weight_decay)
    state = torch.zeros(8, 8, dtype=torch.float64)
    seen = set()
    for step in range(8):
        g = torch.randn(8, 8, dtype=torch.float64)
        lr = follow_schedule(optimizer, config.optim, config.schedule, step, 8)
        beta1 = config.schedule.beta1(step, 8)
        seen.add(round(beta1, 3))
        ours.weight.grad = g.clone()
        optimizer.step()
        if rule == "adamw":
            reference.param_groups[0].update(lr=lr, betas=(beta1, 0.95))
            twin.weight.grad = g.clone()
            reference.step()
        else:
            with torch.no_grad():
                direction = torch.sign(beta1 * state + (1 - beta1) * g)
                twin.weight.sub_(lr * (direction + config.optim.weight_decay * twin.weight))
                state = 0.99 * state + 0.01 * g
        torch.testing.assert_close(ours.weight, twin.weight, rtol=1e-12, atol=1e-14)
    assert len(seen) > 4


@pytest.mark.parametrize(("decay", "halfway"), [("linear", 0.5), ("cosine", 0.5), ("sqrt", 1 - math.sqrt(0.5))])
def test_wsd_is_flat_until_its_decay(decay, halfway):
    schedule = Wsd(warmup_steps=50, decay_steps=200, decay=decay)
    assert {schedule.factor(t, STEPS) for t in range(50, 800)} == {1.0}
    assert schedule.factor(900, STEPS) == pytest.approx(halfway)
    assert schedule.factor(999, STEPS) > 0 == schedule.factor(1000, STEPS)


def test_infinite_holds_for_ever_and_anneals_from_where_it_stands():
    held = Infinite(warmup_steps=10, cooldown_steps=100, constant=0.4)
    assert held.factor(10, STEPS) == pytest.approx(1.0)
    assert held.factor(60, STEPS) == pytest.approx(0.7)
    assert {held.factor(t, STEPS) for t in (110, 500, 10**9)} == {0.4}
    line = Infinite(
        warmup_steps=10, cooldown_steps=100, constant=0.4, anneal_at=500, anneal_steps=100, anneal="linear", floor=0.2
    )
    assert all(line.factor(t, STEPS) == held.factor(t, STEPS) for t in range(501))
    assert line.factor(550, STEPS) == pytest.approx(0.3)
    assert line.factor(600, STEPS) == pytest.approx(0.2), "the floor is a share of optim.lr, not of what was held"
    # Ibrahim et al., appendix: eta_const (eta_min / eta_const)^((t - t_ann) / T_ann), here over what is left of the run.
    annealed = Infinite(constant=0.4, anneal_at=500, floor=0.1)
    assert annealed.factor(750, STEPS) == pytest.approx(0.4 * (0.1 / 0.4) ** 0.5)
    assert annealed.factor(1000, STEPS) == pytest.approx(0.1)


def test_rewarming_climbs_from_where_it_stood_and_cools_again():
    schedule = Infinite(warmup_steps=10, cooldown_steps=100, constant=0.4, rewarm_at=300)
    assert schedule.factor(299, STEPS) == pytest.approx(0.4)
    climb = [schedule.factor(t, STEPS) for t in range(300, 311)]
    assert climb == sorted(climb)
    assert climb[0] == pytest.approx(0.4 + 0.6 / 11)
    assert climb[-1] == pytest.approx(1.0)
    assert schedule.factor(410, STEPS) == pytest.approx(0.4)


def test_a_cosine_warms_again_from_its_end_and_decays_over_what_is_left():
    schedule, first = Cosine(warmup_steps=20, rewarm_at=400), Cosine(warmup_steps=20)
    assert [schedule.factor(t, STEPS) for t in range(400)] == [first.factor(t, 400) for t in range(400)]
    climb = [schedule.factor(t, STEPS) for t in range(400, 421)]
    assert climb[0] == pytest.approx(0.1 + 0.9 / 21) and climb[-1] == 1 and climb == sorted(climb)
    assert [schedule.factor(400 + t, STEPS) for t in range(20, 600)] == [first.factor(t, 600) for t in range(20, 600)]


def test_a_schedule_does_not_depend_on_the_length_where_it_promises_not_to():
    for schedule in (Constant(warmup_steps=5), Infinite(warmup_steps=5, cooldown_steps=20)):
        assert all(schedule.factor(t, 100) == schedule.factor(t, 10**6) for t in range(100))


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        (Wsd(warmup_steps=900, decay_steps=200), "take 1100 steps and the run has 1000"),
        (Cosine(warmup_steps=-1), "warmup_steps=-1"),
        (Cosine(floor=1.5), "floor=1.5"),
        (OneCycle(rise=1.0), "rise lies between 0 and 1"),
        (Infinite(anneal_at=5, anneal_steps=0), "anneal_steps=0: annealing takes at least 1 step"),
        (Infinite(anneal_steps=5), "anneal_steps is given without schedule.anneal_at"),
        (Infinite(anneal_at=1000), "anneal_at=1000: a step after the first, and before the end of the run, steps=1000"),
        (Infinite(anneal_at=5, floor=0.0), "anneal=exponential never reaches schedule.floor=0; .*or anneal=linear"),
        (Infinite(anneal_at=5, floor=0.7), "floor=0.7 is above schedule.constant=0.5"),
        (Wsd(decay="exponential"), "decay=exponential never reaches schedule.floor=0"),
        (
            Wsd(warmup=0.1, warmup_steps=5),
            "warmup=0.1 schedule.warmup_steps=5: a share .* or a number .*one of the two",
        ),
        (Wsd(decay_share=0.1, decay_steps=5), "decay_share=0.1 schedule.decay_steps=5: .*one of the two"),
        (
            Infinite(cooldown_share=0.1, cooldown_steps=5),
            "cooldown_share=0.1 schedule.cooldown_steps=5: .*one of the two",
        ),
        (Linear(warmup=5.0), "warmup=5.0: a share of the run, from 0 to 1; for steps give schedule.warmup_steps"),
        (Wsd(warmup=0.3, decay_share=0.8), "take 1100 steps and the run has 1000"),
        (Cosine(rewarm_at=950, warmup_steps=100), "take 100 steps and the run has 50 after schedule.rewarm_at"),
        (Infinite(anneal_at=5, anneal_steps=5, rewarm_at=9), "comes before schedule.rewarm_at"),
    ],
)
def test_refusals(schedule, message):
    with pytest.raises(ValueError, match=message):
        check_schedule(schedule, STEPS)
