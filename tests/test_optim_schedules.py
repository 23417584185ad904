"""Learning-rate schedules as pure functions: their shape at the points that define them."""

import math

import pytest

from rowwise.optim.schedules import Constant, Cosine, Infinite, Linear, OneCycle, Wsd, check_schedule

STEPS = 1000


def test_warm_up_reaches_full_rate_and_never_starts_at_zero():
    for schedule in (Constant(warmup_steps=10), Wsd(warmup_steps=10), Cosine(warmup_steps=10), Linear(warmup_steps=10)):
        assert schedule.factor(0, STEPS) == pytest.approx(1 / 11)
        assert schedule.factor(4, STEPS) == pytest.approx(5 / 11)
        assert schedule.factor(10, STEPS) == pytest.approx(1.0)


def test_cosine_and_linear_end_at_their_floor():
    cosine, linear = Cosine(warmup_steps=100, floor=0.1), Linear(warmup_steps=100, floor=0.2)
    middle = 100 + 899 / 2
    assert cosine.factor(999, STEPS) == pytest.approx(0.1)
    assert linear.factor(999, STEPS) == pytest.approx(0.2)
    assert (cosine.factor(math.floor(middle), STEPS) + cosine.factor(math.ceil(middle), STEPS)) / 2 == pytest.approx(
        0.55
    )
    assert (linear.factor(math.floor(middle), STEPS) + linear.factor(math.ceil(middle), STEPS)) / 2 == pytest.approx(
        0.6
    )


def test_one_cycle_climbs_once_and_falls_once():
    factors = [OneCycle(rise=0.3).factor(t, STEPS) for t in range(STEPS)]
    top = factors.index(max(factors))
    assert factors[0] == pytest.approx(1 / 25)
    assert factors[-1] == pytest.approx(1 / 25 / 1e4)
    assert max(factors) == pytest.approx(1.0, abs=1e-4)
    assert top in (299, 300)
    assert factors[: top + 1] == sorted(factors[: top + 1])
    assert factors[top:] == sorted(factors[top:], reverse=True)


@pytest.mark.parametrize(("decay", "halfway"), [("linear", 0.5), ("cosine", 0.5), ("sqrt", 1 - math.sqrt(0.5))])
def test_wsd_is_flat_until_its_decay(decay, halfway):
    schedule = Wsd(warmup_steps=50, decay_steps=200, decay=decay)
    assert {schedule.factor(t, STEPS) for t in range(50, 800)} == {1.0}
    assert schedule.factor(899, STEPS) == pytest.approx(halfway)
    assert schedule.factor(999, STEPS) == pytest.approx(0.0)


def test_infinite_holds_for_ever_and_anneals_from_where_it_stands():
    held = Infinite(warmup_steps=10, cooldown_steps=100, constant=0.4)
    assert held.factor(10, STEPS) == pytest.approx(1.0)
    assert held.factor(60, STEPS) == pytest.approx(0.7)
    assert {held.factor(t, STEPS) for t in (110, 500, 10**9)} == {0.4}
    annealed = Infinite(warmup_steps=10, cooldown_steps=100, constant=0.4, anneal_at=500, anneal_steps=100, floor=0.0)
    assert all(annealed.factor(t, STEPS) == held.factor(t, STEPS) for t in range(500))
    assert annealed.factor(549, STEPS) == pytest.approx(0.2)
    assert annealed.factor(599, STEPS) == pytest.approx(0.0)


def test_rewarming_climbs_from_where_it_stood_and_cools_again():
    schedule = Infinite(warmup_steps=10, cooldown_steps=100, constant=0.4, rewarm_at=300)
    assert schedule.factor(299, STEPS) == pytest.approx(0.4)
    climb = [schedule.factor(t, STEPS) for t in range(300, 311)]
    assert climb == sorted(climb)
    assert climb[0] == pytest.approx(0.4 + 0.6 / 11)
    assert climb[-1] == pytest.approx(1.0)
    assert schedule.factor(410, STEPS) == pytest.approx(0.4)


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
        (Infinite(anneal_at=5), "anneal_steps must be at least 1"),
        (Infinite(anneal_at=5, anneal_steps=5, rewarm_at=9), "comes before schedule.rewarm_at"),
    ],
)
def test_refusals(schedule, message):
    with pytest.raises(ValueError, match=message):
        check_schedule(schedule, STEPS)
