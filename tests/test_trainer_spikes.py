"""Spikes: what is one, and laws 2 and 3 where updates are skipped or the run is rolled back. The spike is real: one step reads
samples of a token that was rare before."""

import math
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch

import parity
from parity import (
    TOLERANCE,
    in_micro_batches,
    plain_model,
    relative_error,
    run_plain,
    small_config,
    with_layout,
    write_tokens,
)
from ranks import RankFailure
from rowwise.launch.worker import _reason
from rowwise.parallel.shard import gradients
from rowwise.trainer import spike
from rowwise.trainer.data.open import open_data
from rowwise.trainer.data.order import sample_indices
from rowwise.trainer.engine import WholeModel
from rowwise.trainer.manifest import begin, commit, complete_checkpoints, prune, read_manifest, set_aside, step_of
from rowwise.trainer.metrics import read_metrics
from rowwise.trainer.resume import find_resume
from rowwise.trainer.spike import (
    Rollback,
    SpikeConfig,
    Spikes,
    TooManySpikes,
    after_step,
    in_words,
    newest_anchor,
    require_few,
    score,
    spike_of,
    told_of,
)
from rowwise.trainer.starts import read_starts
from rowwise.trainer.state import TrainState
from runs import assert_same_run, final_tensors, manifest_at, named, records, run_train, run_until

AT, STEPS, ANCHOR = 11, 14, 8  # the poisoned step; the last; the checkpoint before it
SIZE = 12  # sequences of a step
BASE = [
    f"steps={STEPS}",
    f"batch.global_size={SIZE}",
    "spike.window=20",
    f"checkpoint.every={ANCHOR}",
    "checkpoint.keep=1",
    "optim.lr=0.003",
    "eval.every=7",
]
LAYOUTS = {
    "1": (1, {}),
    "3, stage 3": (3, {"zero": 3}),
    "stages, updates taken back": (4, {"pipeline": 2, "pipeline_schedule": "zb_h1", "zero": 2,
                                       "post_validation": True}),
    "2 x 2 of a sequence": (4, {"ring": 2, "replicate": 2, "zero": 1}),
}  # fmt: skip


def now_and_in_full(*now: str):
    """The layouts, of which all others than these are tested in full alone."""
    return [pytest.param(name, marks=[] if name in now else pytest.mark.full) for name in LAYOUTS]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("spikes")


def config_of(folder: Path, *overrides: str):
    """A run whose step `AT` is a spike."""
    new = not (folder / "tokens.bin").exists()
    if new:
        write_tokens(folder, 10_000)
    config = small_config(folder, *BASE, *overrides)
    if new:
        poison(config, folder / "tokens.bin")
    return config


def on(config, world: int, **degrees):
    """On a layout, with a micro-batch a stage."""
    return in_micro_batches(with_layout(config, world, **degrees), degrees.get("pipeline", 1))


def run_early(workers, config, run=run_train, *given):
    """A run in which half a window of 20 is enough to ask: that no fewer steps are is the law of numbers alone, below."""
    with mock.patch.object(spike, "FEWEST", 10):
        return run(workers, config, *given)


def until(ranks, world: int, config, stop_at: int):
    return ranks.run(run_early, world, config, run_until, stop_at)


def poison(config, tokens: Path) -> None:
    data, size, length = (
        open_data(config.data, 13, config.model.vocab_size),
        config.batch.global_size,
        config.batch.seq_len,
    )
    stream = np.fromfile(tokens, dtype=np.uint16)
    for index in sample_indices((AT - 1) * size, size, data.train.samples, f"train/{config.seed}"):
        stream[int(index) * length : (int(index) + 1) * length + 1] = 1
    stream.tofile(tokens)


def spikes_in(config) -> dict[int, str]:
    """What was done, by step."""
    return {record["step"]: record["spike"] for record in read_metrics(Path(config.run_dir)) if "spike" in record}


def assert_is(config, trace) -> None:
    """Law 2: the records, and the weights at the end, are those of the textbook."""
    made = read_metrics(Path(config.run_dir))
    np.testing.assert_allclose([record["loss"] for record in made], trace.losses, rtol=TOLERANCE)
    np.testing.assert_allclose([record["grad_norm"] for record in made], trace.norms, rtol=TOLERANCE)
    ours = final_tensors(config.run_dir)
    for name, p in plain_model(config).named_parameters():
        weights = p.detach() + sum(updates[name] for updates in trace.updates)
        assert relative_error(ours[f"model.{name}"], weights) <= TOLERANCE, name


def assert_tracked_once(config) -> None:
    """The tracker was opened once, and has every step as the records have it, none of them twice."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (file,) = (Path(config.run_dir) / "tensorboard").iterdir()
    shown = [(event.step, event.value) for event in EventAccumulator(str(file)).Reload().Scalars("loss")]
    made = [(record["step"], record["loss"]) for record in read_metrics(Path(config.run_dir))]
    assert shown == [(step, pytest.approx(loss, rel=1e-6)) for step, loss in made]


def test_a_score_is_in_spreads():
    rng = np.random.default_rng(0)
    before = rng.normal(3, 0.1, 64).tolist()
    middle = float(np.median(before))
    spread = 1.4826 * float(np.median(np.abs(np.array(before) - middle)))
    assert score(before, 4.0, "median") == pytest.approx((4 - middle) / spread)
    assert score(before, 2.0, "median") < 0  # which is no spike
    # OLMo-core's SkipStepOptimizer makes the step where this holds, on one side alone.
    std, mean = torch.std_mean(torch.tensor(before, dtype=torch.float64))
    for x in (4.0, 3.4, 2.0, -50.0):
        for sigmas in (1, 3, 6):
            made = bool((x - mean) <= sigmas * std)
            assert (score(before, x, "mean") <= sigmas) == made
    assert score(before, 2.0, "mean") == pytest.approx(float((2.0 - mean) / std))
    assert score(before, math.nan, "median") == score(before, math.inf, "mean") == math.inf
    # A spike among them moves the median's rule by little, and blinds the other.
    assert score([*before, 50.0], 4.0, "median") == pytest.approx(score(before, 4.0, "median"), rel=0.1)
    assert score([*before, 50.0], 4.0, "mean") < 1
    # A loss that does not move has no spread: a thousandth of it counts as one.
    assert score([2.0] * 30, 2.001, "median") == pytest.approx(0.5)
    assert score([2.0] * 30, 2.0, "mean") == 0.0
    assert score([2.0] * 30, 2.1, "mean") == math.inf


@pytest.mark.parametrize(
    ("window", "first"), [(60, 30), (20, 20)]
)  # OLMo-core too begins with the 30th of a window of 60
def test_a_spike_is_one_of_the_loss_or_of_the_norm_once_enough_is_known(window, first):
    config, seen = SpikeConfig(window=window), Spikes()
    rng = np.random.default_rng(1)
    for step in range(1, 100):
        assert (spike_of(seen, 9.0, 1.0, config) is not None) == (step >= first)
        assert (spike_of(seen, 3.0, 9.0, config) is not None) == (step >= first)
        assert spike_of(seen, 3.0, 1.0, config) is None
        assert spike_of(seen, math.nan, 0.0, config) is None  # no valid token
        assert spike_of(seen, 3.0, math.inf, config) == math.inf
        loss, norm = rng.normal(3, 0.1), rng.normal(1, 0.1)
        seen = after_step(seen, loss, norm, False, config)
        assert len(seen.losses) == len(seen.norms) == min(step, window)
    assert after_step(seen, math.nan, 0.0, False, config) == seen


def test_what_stays_high_is_no_spike_for_long():
    """A spike stands in the window: after half of it, the new level is the middle."""
    config, seen = SpikeConfig(window=40, most=40), Spikes([3.0] * 40, [1.0] * 40)
    skipped = 0
    while spike_of(seen, 5.0, 1.0, config) is not None:
        seen, skipped = after_step(seen, 5.0, 1.0, True, config), skipped + 1
    assert skipped == 20


def test_there_is_an_end_to_skips_and_rollbacks():
    config = SpikeConfig(most=2)
    seen = after_step(after_step(Spikes(), 9.0, 9.0, True, config), 9.0, math.inf, True, config)
    assert seen.skipped == 2
    assert after_step(seen, 1.0, 1.0, False, config).skipped == 0
    assert in_words(9, math.inf) == "step 9 is a spike (no number)"
    assert told_of(Rollback(9, 5, 10, 2000, 6.25)) == (
        "step 9 is a spike (6.2 spreads above the steps before): rolled back to step 5, and past samples 10 to 1,999"
    )
    with pytest.raises(
        TooManySpikes, match=r"2 steps in a row were skipped \(spike.most\), and the next has a loss of 9"
    ):
        after_step(seen, 9.0, 9.0, True, config)
    assert _reason(TooManySpikes("spikes: so many"), Path("run")) == "spikes: so many"  # the run's one line
    back = Rollback(9, 5, 10, 20, None)
    require_few(Spikes(rollbacks=[back]), 9, config)
    with pytest.raises(TooManySpikes, match=r"step 12 is one, and the run was rolled back 2 times \(spike.most\)"):
        require_few(Spikes(rollbacks=[back, back]), 12, config)


def test_a_checkpoint_to_go_back_to_stays_and_those_beyond_are_put_aside(tmp_path):
    checkpoints = tmp_path / "checkpoints"
    for step in (10, 20, 23, 25):
        commit(begin(checkpoints, step), {**manifest_at(step), "files": {}})
    assert newest_anchor(checkpoints, lambda step: step % 10 == 0) == 20
    assert newest_anchor(checkpoints, lambda step: step % 7 == 0) is None
    prune(checkpoints, 1, lambda step: step % 10 == 0)
    assert [step_of(checkpoint) for checkpoint in complete_checkpoints(checkpoints)] == [25, 20]
    set_aside(checkpoints, beyond=20, why="rolled-back")
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step-00000020", "step-00000025.rolled-back"]


def test_the_state_is_read_as_it_was_written_and_an_earlier_one_has_no_window():
    state = TrainState(step=3, spikes=Spikes([1.5], [2.5], 1, [Rollback(9, 5, 10, 20, None)]))
    assert TrainState.from_tree(state.to_tree()) == state
    tree = state.to_tree()
    del tree["spikes"]
    assert TrainState.from_tree(tree) == replace(state, spikes=Spikes())


@pytest.mark.parametrize("layout", now_and_in_full("stages, updates taken back"))
def test_a_skipped_update_is_none_on_every_layout(ranks, folder, monkeypatch, layout):
    world, degrees = LAYOUTS[layout]
    options = ("on_spike=skip", f"log.norms_every={AT}")
    config = named(on(config_of(folder, *options), world, **degrees), folder, f"skip-{layout}")
    states = ranks.run(run_early, world, config)
    assert all(state == states[0] for state in states)
    assert (states[0].updates, states[0].position) == (STEPS - 1, STEPS * SIZE)
    assert spikes_in(config) == {AT: "skipped"}
    held = read_metrics(Path(config.run_dir))[AT - 1]
    assert held["grad_norm"] > config.clip_norm, "nothing is clipped"
    assert math.hypot(*held["gradient_norms"].values()) == pytest.approx(held["grad_norm"], rel=TOLERANCE)
    assert set(held["update_norms"].values()) == {0.0}
    textbook = parity.textbook_update

    def update(config, params, states, t, lr):
        if t != AT:
            textbook(config, params, states, t - (t > AT), lr)

    monkeypatch.setattr(parity, "textbook_update", update)
    assert_is(config, run_plain(config, STEPS))


@pytest.mark.parametrize("layout", now_and_in_full("3, stage 3"))
def test_a_rollback_goes_past_what_was_read_on_every_layout(ranks, folder, monkeypatch, layout):
    world, degrees = LAYOUTS[layout]
    options = ("on_spike=rollback", "tracker=tensorboard")
    config = named(on(config_of(folder, *options), world, **degrees), folder, f"back-{layout}")
    states = ranks.run(run_early, world, config)
    assert all(state == states[0] for state in states)
    assert (states[0].updates, states[0].position) == (STEPS, (STEPS + AT - ANCHOR) * SIZE)
    (back,) = states[0].spikes.rollbacks
    assert (back.step, back.to, back.first, back.after) == (AT, ANCHOR, ANCHOR * SIZE, AT * SIZE)
    manifest = read_manifest(complete_checkpoints(Path(config.run_dir) / "checkpoints")[0])
    assert TrainState.from_tree(manifest["state"]) == states[0]
    assert spikes_in(config) == {ANCHOR + 1: "rolled back"}
    assert [record["step"] for record in read_metrics(Path(config.run_dir))] == list(range(1, STEPS + 1))
    assert len(read_starts(Path(config.run_dir))) == 1  # a rollback is none
    assert_tracked_once(config)
    batch = parity.global_batch
    monkeypatch.setattr(parity, "global_batch", lambda c, d, s: batch(c, d, s + (AT - ANCHOR) * (s >= ANCHOR)))
    assert_is(config, run_plain(config, STEPS))


@pytest.mark.parametrize(
    "stops",
    [
        pytest.param((ANCHOR + 1, AT + 2), marks=pytest.mark.slow),
        *(pytest.param(stops, marks=pytest.mark.full) for stops in [(AT - 1, AT, AT + 1), (AT + 1,), (STEPS + 1,)]),
    ],
    ids=str,
)
def test_a_rolled_back_run_that_was_stopped_is_the_same_to_the_last_bit(ranks, folder, stops):
    """Stopped before the spike, where a later checkpoint than that of `checkpoint.every` is there, in it, and after."""
    base = on(config_of(folder, "on_spike=rollback"), 2, zero=2)
    whole, stopped = named(base, folder, "back-whole"), named(base, folder, f"back-stopped-{stops}")
    ranks.run(run_early, 2, whole)
    for stop_at in stops:
        assert until(ranks, 2, stopped, stop_at)[0].step < STEPS
    ranks.run(run_early, 2, stopped)
    assert records(stopped.run_dir) == records(whole.run_dir)
    assert spikes_in(stopped) == spikes_in(whole) == {ANCHOR + 1: "rolled back"}
    theirs = final_tensors(whole.run_dir)
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in final_tensors(stopped.run_dir).items())


def stopped_while(workers, config, calling):
    """A run that is asked to stop while it goes back: as it calls `calling` of train.py for the last time."""
    from rowwise.trainer import train

    original, calls = getattr(train, calling), iter(range(2))

    def called(*arguments):
        if next(calls) == (calling == "resume"):
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*arguments)

    setattr(train, calling, called)
    try:
        return run_early(workers, config)
    finally:
        setattr(train, calling, original)


@pytest.mark.parametrize("calling", ["go_back", "resume"])
def test_a_run_that_is_asked_to_stop_while_it_goes_back_stops(ranks, folder, calling):
    config = named(on(config_of(folder, "on_spike=rollback"), 1), folder, f"stopped-in-{calling}")
    (state,) = ranks.run(stopped_while, 1, config, calling)
    assert state.step == ANCHOR + 1
    assert [back.step for back in state.spikes.rollbacks] == [AT]


def test_a_run_that_was_given_its_own_checkpoint_goes_back_beyond_it(ranks, folder):
    """Which is gone then: the same command goes on."""
    config = named(on(config_of(folder, "on_spike=rollback"), 1), folder, "own")
    until(ranks, 1, config, ANCHOR + 1)
    given = replace(config, resume=f"{config.run_dir}/checkpoints/step-{ANCHOR + 1:08}")
    (state,) = ranks.run(stopped_while, 1, given, "resume")
    assert (state.step, Path(given.resume).exists()) == (ANCHOR + 1, True)  # by the same name again
    ranks.run(run_early, 1, given)
    assert spikes_in(config) == {ANCHOR + 1: "rolled back"}
    checkpoints = Path(config.run_dir) / "checkpoints"
    for beyond in complete_checkpoints(checkpoints):
        if step_of(beyond) > ANCHOR:
            shutil.rmtree(beyond)  # as where it was killed before it saved
    assert find_resume(given, "data")[0].name == f"step-{ANCHOR:08}"
    with pytest.raises(ValueError, match=r"resume=.*step-00000007: no checkpoint there"):
        find_resume(replace(given, resume=f"{checkpoints}/step-00000007"), "data")


@pytest.mark.parametrize("what", [pytest.param("skip", marks=pytest.mark.full), "rollback"])
def test_a_run_of_spikes_goes_on_on_another_layout(ranks, folder, what):
    """With a sparse optimizer's masks, which a spike leaves as they are."""
    masks = ("sparsity=rigl", "sparsity.update_every=4", "sparsity.density=0.5")
    base = config_of(folder, f"on_spike={what}", "model.dim=32", "model.heads=4", *masks)
    whole, moved = (named(base, folder, f"{what}-{name}") for name in ("unmoved", "moved"))
    ranks.run(run_early, 1, on(whole, 1))
    for world, degrees, stop_at in (
        (2, {"zero": 3}, 6),
        (2, {"pipeline": 2}, AT - 1),
        (2, {"ulysses": 2}, 99),
    ):
        until(ranks, world, on(moved, world, **degrees), stop_at)
    assert_same_run(moved.run_dir, whole.run_dir)
    assert spikes_in(moved) == spikes_in(whole) != {}


@pytest.mark.full
def test_a_run_that_is_told_to_record_records(ranks, folder):
    config = named(on(config_of(folder), 2), folder, "recorded")
    (state, _) = ranks.run(run_early, 2, config)
    assert state.updates == STEPS
    assert spikes_in(config) == {AT: "recorded"}
    assert next(r for r in read_metrics(Path(config.run_dir)) if "spike" in r)["spike_score"] > 6


@pytest.mark.full
def test_before_the_first_checkpoint_a_rollback_is_a_skip(ranks, folder):
    config = config_of(folder, "on_spike=rollback", f"checkpoint.every={AT + 2}")
    config = named(on(config, 2), folder, "early")
    ranks.run(run_early, 2, config)
    assert spikes_in(config) == {AT: "skipped"}


def test_a_run_in_the_backward_is_rolled_back(ranks, folder):
    inside = ("optim.in_backward=true", "clip_norm=0", f"batch.micro_size={SIZE // 2}", "on_spike=rollback")
    config = named(with_layout(config_of(folder, *inside), 2, zero=3), folder, "inside")
    outside = named(on(config_of(folder, "clip_norm=0", "on_spike=rollback"), 1), folder, "outside")
    for world, each in ((2, config), (1, outside)):
        ranks.run(run_early, world, each)
        assert spikes_in(each) == {ANCHOR + 1: "rolled back"}
    assert_same_run(config.run_dir, outside.run_dir)


def spoilt_gradient(workers, config, bad):
    """A run in which gradients of the steps `bad`, counted as they are made, are no numbers, on the last rank."""
    original, made = WholeModel.forward_backward, iter(range(1, 1000))

    def forward_backward(self, *given):
        totals = original(self, *given)
        if next(made) in bad and workers.rank == workers.world_size - 1:
            gradients(self.model)[0].view(-1)[0] = math.nan
        return totals

    WholeModel.forward_backward = forward_backward
    try:
        return run_early(workers, config)
    finally:
        WholeModel.forward_backward = original


def test_gradients_that_are_no_numbers_are_spikes_and_not_for_ever(ranks, folder):
    base = config_of(folder, "on_spike=skip", "spike.most=2", "steps=6", "spike.threshold=1e9")
    config = named(on(base, 2), folder, "nan")
    states = ranks.run(spoilt_gradient, 2, config, {1, 2})
    told = (folder / "nan/train.log").read_text()
    assert "warning: step 1 is a spike (no number): its update is skipped" in told
    assert spikes_in(config) == {1: "skipped", 2: "skipped"}
    assert states[0].updates == 4 and all(t.isfinite().all() for t in final_tensors(config.run_dir).values())
    with pytest.raises(RankFailure, match=r"TooManySpikes: spikes: 2 steps in a row were skipped"):
        ranks.run(spoilt_gradient, 2, named(config, folder, "nans"), {1, 2, 3})
