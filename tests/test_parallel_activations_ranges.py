"""Running ranges of 8-bit codes: the authors' numbers, the same codes on every layout, and a run that is stopped. (Laws 2 and 3.)"""

import math

import pytest
import torch
from codes import SHARED, all_codes, run_seen, seen_alone

from parity import TOLERANCE, relative_error, small_config, with_layout
from rowwise.kernels.activation_codes import Groups, decode, encode, extremes
from rowwise.parallel.activations.ranges import RunningRanges, move_ranges
from runs import assert_same_run, final_tensors, named, run_said, run_train, run_until

RUNNING = ("memory.compress=int8", "memory.ranges=running")
STEPS = 2  # the second has the ranges of the first


# The authors' rule.

# What ziplab/Mesa's `update_clip_val_shift` leaves of these numbers, two heads of four, after each batch: range, then shift.
AUTHORS = [
    ([7.769999980926514, 8.139999389648438], [-3.3299999237060547, -3.3299999237060547]),
    ([8.621000289916992, 8.953999519348145], [-3.6629998683929443, -3.6629998683929443]),
    ([10.089900016784668, 10.50059986114502], [-4.2957000732421875, -4.2957000732421875]),
    ([12.336910247802734, 12.70654010772705], [-5.198130130767822, -5.198130130767822]),
]


def batch_of(step: int) -> torch.Tensor:
    """Six tokens of two heads of four numbers."""
    return ((torch.arange(48) * (7 + step) % 23).float() - 9).view(6, 8) * 0.37 * (1 + step)


def test_ranges_move_as_the_authors_do():
    ranges, heads, tokens = RunningRanges(["4"]), Groups(4, 2), torch.arange(6)
    for step, (spread, shift) in enumerate(AUTHORS):
        ranges.see("4.q", batch_of(step)[:2].contiguous(), heads, tokens[:2])  # in two micro-batches
        ranges.see("4.q", batch_of(step)[2:].contiguous(), heads, tokens[2:])
        ranges.move()
        assert torch.equal(ranges.named_state()["4.q"], torch.tensor([spread, shift]).t())
        within = ranges.within("4.q", heads, 2)
        torch.testing.assert_close(within, torch.tensor([shift, [c / 255 for c in spread]]).t(), rtol=2e-7, atol=0)


def test_codes_lie_in_the_range_that_is_given():
    """And what is outside of it gets the nearest; of the rest each comes back as one of the two codes around it."""
    x, within = (
        torch.tensor([[-2.0, 0.0, 0.3, 1.0, 5.0, math.nan, math.inf, -math.inf]]),
        torch.tensor([[0.0, 1 / 255]]),
    )
    kept = encode(x, Groups(8, 1), 5, torch.arange(1), within)
    assert kept.codes[0, [0, 1, 3, 4, 5, 6, 7]].tolist() == [0, 0, 255, 255, 0, 255, 0]
    assert kept.codes[0, 2] in (76, 77) and decode(kept, 8, torch.float32)[0, 2].sub(0.3).abs() < 1 / 255
    x = torch.randn(40, 30, generator=torch.Generator().manual_seed(0))
    least, worth = x.min(), (x.max() - x.min()) / 255
    kept = encode(x, Groups(30, 1), 5, torch.arange(40), torch.stack((least, worth))[None])
    assert ((decode(kept, 30, torch.float32) - x).abs() <= 1.001 * worth).all()


def test_extremes_pass_over_padding_and_tell_what_is_no_number():
    x = torch.tensor([[1.0, -3.0, 7.0], [99.0, 99.0, 99.0], [4.0, 2.0, -1.0]])
    assert extremes(x, Groups(2, 2), torch.tensor([5, -1, 0])).tolist() == [[3.0, 4.0], [1.0, 7.0]]
    assert extremes(x[:0], Groups(2, 2), torch.arange(0)).tolist() == [[-math.inf] * 2] * 2
    x[0, 0] = math.nan
    assert extremes(x, Groups(2, 2), torch.arange(3)).tolist() == [[math.inf] * 2, [1.0, 99.0]]


def test_what_is_no_number_moves_nothing():
    state = torch.tensor([[8.0, -4.0], [math.nan, math.nan]])
    for strange in (math.inf, -math.inf):  # a number that is none, and no token seen
        moved = move_ranges(state, torch.tensor([[4.0, strange], [strange, 1.0]]))
        torch.testing.assert_close(moved, state, equal_nan=True, rtol=0, atol=0)
    ranges, tokens = RunningRanges(["0"]), torch.arange(1)
    ranges.see("0.x", torch.tensor([[1.0, math.inf]]), Groups(2, 1), tokens)
    ranges.see("0.y", torch.tensor([[1.0, 2.0]]), Groups(2, 1), tokens)
    ranges.move()
    assert ranges.within("0.x", Groups(2, 1), 1) is None and ranges.within("0.y", Groups(2, 1), 1) is not None
    ranges.load({"0.z": torch.ones(1, 2), "1.z": torch.ones(1, 2)})  # another rank's layer stays there
    assert ranges.named_state().keys() == {"0.y", "0.z"}


def test_heads_are_known_wherever_they_are():
    """Of three key heads, each given to two ranks: the last rank's."""
    ranges, x = RunningRanges(["0"]), torch.arange(12.0).view(2, 6)
    ranges.see("0.k", x[:, :4].contiguous(), Groups(2, 3), torch.arange(2))
    ranges.see("0.k", x[:, 4:].repeat(1, 2), Groups(2, 3, first=4, repeat=2), torch.arange(2))
    ranges.move()
    assert ranges.named_state()["0.k"].tolist() == [[7.0, 0.0], [7.0, 2.0], [7.0, 4.0]]
    assert ranges.within("0.k", Groups(2, 3, first=3, repeat=2), 3)[:, 0].tolist() == [2.0, 4.0, 4.0]


# Law 2.

LAYOUTS = {
    "data ranks, smaller micro-batches": (4, {"zero": 3, "replicate": 2}, ("batch.micro_size=1",)),
    "stages, split backwards, half made again, in files": (
        4,
        {"zero": 3, "pipeline": 2},
        ("parallel.pipeline_schedule=zb_h1", "memory.recompute=0.5", "memory.offload_activations=FOLDER"),
    ),
    "heads and tokens shared": (4, {"zero": 3, "ulysses": 2, "ring": 2}, ()),
}


@pytest.fixture(scope="module")
def alone(ranks, tmp_path_factory):
    """Steps of one process, by what else is asked for."""
    folder = tmp_path_factory.mktemp("ranges")
    return folder, seen_alone(ranks, folder, STEPS)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_codes_and_gradients_are_those_of_one_process(ranks, alone, layout):
    folder, run = alone
    world, degrees, words = LAYOUTS[layout]
    words = [word.replace("FOLDER", str(folder)) for word in words]
    reference, codes = run(*RUNNING, *(word for word in words if word.startswith("memory.recompute")))
    config = with_layout(small_config(folder, *SHARED, *RUNNING, *words), world, **degrees)
    everyone = ranks.run(run_seen, world, config, STEPS)
    assert all_codes(everyone) == codes and len(codes) > 2000
    trace = everyone[0][0]
    for step in range(STEPS):
        assert abs(trace.losses[step] - reference.losses[step]) <= TOLERANCE
        for name, gradient in reference.gradients[step].items():
            assert relative_error(trace.gradients[step][name], gradient) <= TOLERANCE, name


def test_the_first_step_is_that_of_own_ranges_and_later_ones_are_near(alone):
    """Groups of 256 channels share a range over tokens, whose sizes differ: errors are larger than with a token's own."""
    _, run = alone
    own, running = (run(*words)[0] for words in (RUNNING[:1], RUNNING))
    for name, gradient in own.gradients[0].items():
        assert torch.equal(running.gradients[0][name], gradient)
    errors = [relative_error(running.gradients[1][name], own.gradients[1][name]) for name in own.gradients[1]]
    assert 1e-4 < max(errors) < 0.3 and running.losses[1] == own.losses[1]


# Law 3.


@pytest.fixture(scope="module")
def whole(ranks, tmp_path_factory):
    """A run of three steps on two ranks."""
    folder = tmp_path_factory.mktemp("run")
    config = small_config(folder, *SHARED, *RUNNING, "eval.every=3", "eval.batches=1")
    ranks.run(run_train, 2, with_layout(named(config, folder, "one"), 2, zero=3))
    return folder, config


def test_ranges_are_in_the_checkpoint_and_a_run_goes_on_elsewhere(ranks, whole):
    folder, config = whole
    ranks.run(run_until, 2, with_layout(named(config, folder, "moved"), 2, zero=1, pipeline=2), 2)
    assert sum(name.startswith("ranges.1.") for name in final_tensors(folder / "moved")) > 8
    ranks.run(run_train, 2, with_layout(named(config, folder, "moved"), 2, zero=3, ulysses=2))
    assert_same_run(str(folder / "one"), str(folder / "moved"))


def test_stopped_and_resumed_is_the_same_to_the_last_bit(ranks, whole):
    folder, config = whole
    stopped = with_layout(named(config, folder, "stopped"), 2, zero=3)
    ranks.run(run_until, 2, stopped, 2)
    ranks.run(run_train, 2, stopped)
    ours, theirs = (final_tensors(folder / name) for name in ("stopped", "one"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_of_other_results_ranges_begin_anew(ranks, whole):
    """What is made again is not kept, and the numbers of results are others."""
    folder, config = whole
    ranks.run(run_until, 1, with_layout(named(config, folder, "other"), 1), 2)
    other = small_config(folder, *SHARED, *RUNNING, "memory.recompute=selective")
    said = ranks.run(run_said, 1, with_layout(named(other, folder, "other"), 1))[0]
    assert "memory.ranges=running begins anew: the checkpoint has no ranges of these results" in said
