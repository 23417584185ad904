"""Lengths as people say them: steps, shares, tokens, time; what they come to, on every layout and after every resume. (Law 3.)"""

import random
import re
import subprocess
import sys
from dataclasses import replace
from decimal import Decimal
from pathlib import Path

import pytest

from parity import small_config
from rowwise.launch import agent
from rowwise.launch.compose import compose_tree
from rowwise.optim.curves import length as phase_length
from rowwise.optim.lengths import A_YEAR, UNITS, Length, RunLength, plain, read_count, read_length
from rowwise.optim.sparse.config import every
from rowwise.trainer import resume
from rowwise.trainer.check import check
from rowwise.trainer.config import TrainConfig, config_from_tree, tree_of
from rowwise.trainer.data.open import open_data
from rowwise.trainer.data.order import sample_indices
from rowwise.trainer.metrics import read_metrics
from rowwise.trainer.prepare import prepare
from rowwise.trainer.run_length import MOST_STEPS, choose, settle, steps_of_epochs, steps_of_tokens
from runs import final_tensors, named, records, run_said, run_train

SAID = {
    "100": (100, "steps"),
    100.0: (100, "steps"),
    1: (1, "steps"),
    "1.0": (1, "steps"),
    "1e3 steps": (1000, "steps"),
    0.1: ("0.1", "share"),
    ".25": ("0.25", "share"),
    "10%": ("0.1", "share"),
    "100 %": (1, "share"),
    "2e6 tokens": (2_000_000, "tokens"),
    "50Mtokens": (50_000_000, "tokens"),
    "1.5 B tokens": (1_500_000_000, "tokens"),
    "1_000_000 tokens": (1_000_000, "tokens"),
    "1 token": (1, "tokens"),
    "90s": (90, "time"),
    "20min": (1200, "time"),
    "2m": (120, "time"),
    "1h30m": (5400, "time"),
    "1 day 2 hours 3 minutes 4.5 seconds": (93784.5, "time"),
}
NONE = [-1, 2.5, "2.5 steps", "0.1 steps", "0%", "101%", "0 tokens", "0s", "30m1h", "h", "", " ", "ten", "1h30", "1:30", True,
        False, float("nan"), float("inf"), "1e9999 tokens", "9e18", "400d", "1e5%", "5 tokens 1h", "1__s"]  # fmt: skip


@pytest.mark.parametrize("said", SAID, ids=repr)
def test_what_lengths_mean(said):
    amount, unit = SAID[said]
    assert read_length("key", said) == Length(Decimal(str(amount)), unit)


@pytest.mark.parametrize("said", NONE, ids=repr)
def test_what_is_no_length_is_refused(said):
    with pytest.raises(ValueError, match=re.escape(f"eval.every={said}: give steps (100), a share of the run")):
        read_length("eval.every", said)


def test_lengths_read_back_what_was_written():
    """Whatever is written in the grammar means what was written, and is written again the same."""
    draw = random.Random(3)
    for _ in range(400):
        days, hours, minutes, seconds = (draw.choice([0, 0, draw.randrange(1, 60)]) for _ in range(4))
        gap = draw.choice(["", " "])
        parts = [(days, "d"), (hours, "h"), (minutes, draw.choice(["m", "min"])), (seconds, draw.choice(["s", "sec"]))]
        text = gap.join(f"{n}{gap}{unit}" for n, unit in parts if n)
        whole = ((days * 24 + hours) * 60 + minutes) * 60 + seconds
        if 0 < whole <= A_YEAR:
            assert read_length("key", text) == Length(Decimal(whole), "time"), text
        steps, tokens, share = draw.randrange(10**12), draw.randrange(1, 10**12), draw.randrange(1, 10**6) / 10**6
        assert read_length("key", draw.choice([steps, float(steps), str(steps), f"{steps} steps"])).amount == steps
        assert read_length("key", draw.choice([f"{tokens} tokens", f"{tokens / 1000}k tokens"])).amount == tokens
        assert read_length("key", draw.choice([share, str(share), f"{Decimal(str(share)) * 100}%"])).amount == Decimal(
            str(share)
        )
        for said in (text, steps, share, f"{tokens} tokens", f"{tokens}tokens"):
            if said:
                once = plain(read_length("key", said), said)
                assert (
                    read_length("key", once) == read_length("key", said)
                    and plain(read_length("key", once), once) == once
                )


def test_any_words_are_a_length_or_one_line():
    draw = random.Random(5)
    for _ in range(3000):
        said = "".join(draw.choice("0123456789.eE+-%_ kmbtdhs\ntokensminsteps") for _ in range(draw.randrange(12)))
        try:
            length = read_length("key", said)
        except ValueError as refusal:
            assert str(refusal).startswith("key=")
        else:
            assert length.unit in UNITS and length.amount >= 0 and (length.amount > 0 or length.unit == "steps")


def test_shares_follow_the_rule_of_the_schedules():
    draw = random.Random(7)
    for _ in range(500):
        steps, share = draw.randrange(1, 10_000), draw.randrange(1, 1000) / 1000
        run, ours = RunLength(steps, 4096), read_length("eval.every", share)
        assert run.in_steps(ours) == max(1, phase_length(share, None, 0.0, steps))
        every = run.in_steps(ours)
        assert [step for step in range(1, 50) if run.due(share, step)] == [s for s in range(1, 50) if s % every == 0]


def test_intervals_of_tokens_are_the_nearest_whole_steps():
    run = RunLength(1000, 4096)
    assert [run.in_steps(read_length("key", f"{n} tokens")) for n in (4096, 6143, 6145, 40_960)] == [1, 1, 2, 10]
    assert not any(run.due("20min", step) or run.due(0, step) for step in range(1, 100)), "no step alone says so"


@pytest.mark.parametrize(
    ("said", "count"), [(2e9, 2 * 10**9), ("2B", 2 * 10**9), ("1.5M tokens", 1_500_000), (7, 7), ("2e6", 2_000_000)]
)
def test_counts(said, count):
    assert read_count("tokens", said, "tokens") == count
    for wrong in (0, -1, 1.5, "2h", True, "1e99999999999", float("nan"), "M"):
        with pytest.raises(ValueError, match=r"tokens=.*: give a whole number of tokens, such as"):
            read_count("tokens", wrong, "tokens")


def test_a_run_reads_no_more_than_it_was_asked_to():
    draw = random.Random(11)
    for _ in range(300):
        size, length, tokens = draw.randrange(1, 64), draw.randrange(1, 64), draw.randrange(1, 100_000)
        if tokens >= size * length:
            steps = steps_of_tokens(tokens, size, length)
            assert steps * size * length <= tokens < (steps + 1) * size * length
        samples, tenths = draw.randrange(1, 1000), draw.randrange(1, 50)
        if tenths * samples >= 10 * size:
            steps = steps_of_epochs(tenths / 10, samples, size)
            assert steps * size * 10 <= tenths * samples < (steps + 1) * size * 10, "a decimal is what was written"


def composed(*overrides: str) -> TrainConfig:
    return config_from_tree(compose_tree(list(overrides)))


def test_tokens_in_the_place_of_steps():
    config = composed("tokens=2e6", "eval.every=5%", "checkpoint.every=1e2")
    assert (config.steps, config.tokens, config.epochs) == (488, 2_000_000, None)
    assert (config.eval.every, config.checkpoint.every) == (0.05, 100)
    assert config_from_tree(tree_of(config)) == config, "as the other ranks are told"
    assert composed("tokens=2B", "experiment=quick").steps == 2 * 10**9 // (16 * 128), "over a file's steps"
    assert composed("batch.global_tokens=8192").batch.global_size == 32
    assert composed("batch.global_tokens=8192", "tokens=1M").steps == 122


def test_phases_and_masks_by_tokens_and_shares():
    """Tokens become steps where a number of steps stands, shares stay shares; nothing of it goes by a clock."""
    config = composed(
        "schedule=wsd", "schedule.warmup=5%", "schedule.decay_steps=40960 tokens", "sparsity=rigl", "sparsity.stop=.5",
        "sparsity.start_at=8ktokens", "sparsity.update_every=10%", "steps=100",
    )  # fmt: skip
    assert (config.schedule.warmup, config.schedule.decay_steps) == (0.05, 10)
    assert (config.sparsity.start_at, config.sparsity.stop, config.sparsity.update_every) == (2, 0.5, 0.1)
    assert [every(config.sparsity.update_every, steps) for steps in (100, 300, 3)] == [10, 30, 1], (
        "it moves with the run"
    )
    check(config, 1)
    assert config_from_tree(tree_of(config)) == config
    assert composed("sparsity=st3", "sparsity.update_every=8192 tokens").sparsity.update_every == 2
    assert composed("optim=galore", "optim.refresh_every=1e2").optim.refresh_every == 100


def test_masks_by_a_share_of_the_run_are_those_by_steps(ranks, tmp_path):
    """Law 2 and 3 hold, for it is the same run."""
    options = ("sparsity=rigl", "steps=10", "sparsity.start_at=2", "eval.every=50%", "eval.batches=1")
    runs = []
    for name, said in (("steps", "2"), ("share", "0.2"), ("tokens", f"{2 * 24 * 13} tokens")):
        config = named(small_config(tmp_path, *options, f"sparsity.update_every={said}"), tmp_path, name)
        ranks.run(run_train, 1, prepare(replace(config, batch=replace(config.batch, micro_size=24)), 1))
        runs.append((records(config.run_dir), [r["density"] for r in read_metrics(Path(config.run_dir))]))
    assert runs[0] == runs[1] == runs[2] and len(set(runs[0][1])) > 1


def test_what_was_given_wins_over_what_a_file_says():
    whole = tree_of(composed("tokens=2e6", "batch.global_tokens=8192"))
    assert settle(choose(whole, [])) == whole, "a run's own config.yaml"
    longer = settle(choose({**whole, "steps": 400}, ["steps"]))
    assert (longer["steps"], longer["tokens"]) == (400, None)
    again = settle(choose({**whole, "epochs": 2.0}, ["epochs"]))
    assert (again["steps"], again["tokens"], again["epochs"]) == (MOST_STEPS, None, 2.0)
    larger = {**whole, "batch": {**whole["batch"], "global_size": 64}}
    assert settle(choose(larger, ["batch.global_size"]))["batch"]["global_tokens"] is None


def test_an_epoch_is_every_sample_once(tmp_path):
    base = small_config(tmp_path)
    data = open_data(base.data, base.batch.seq_len, base.model.vocab_size)
    asked = config_from_tree({**tree_of(base), "steps": None, "epochs": 1})
    assert asked.known_steps is None and tree_of(asked)["steps"] is None
    config = prepare(asked, 1)
    samples, read = data.train.samples, config.steps * config.batch.global_size
    assert read <= samples < read + config.batch.global_size
    assert len({*sample_indices(0, read, samples, f"train/{config.seed}").tolist()}) == read, "none twice"
    assert prepare(replace(asked, epochs=2.5, steps=MOST_STEPS), 1).steps == 5 * samples // 2 // 24
    assert config_from_tree(tree_of(config)) == config
    with pytest.raises(ValueError, match=rf"epochs=0.001: less than a step: the data has {samples} samples"):
        prepare(replace(asked, epochs=0.001), 1)
    late = config_from_tree({**tree_of(asked), "schedule": {"name": "constant", "warmup_steps": 1000}})
    check(late, 1)  # as long as the data may be
    with pytest.raises(ValueError, match=rf"warm-up and decay take 1000 steps and the run has {config.steps}"):
        prepare(late, 1)


@pytest.mark.parametrize(
    ("options", "shorter"),
    [
        (("sparsity=rigl", "sparsity.start=0.1", "sparsity.stop_at=100", "sparsity.update_every=10"), 99),
        (("sparsity=rigl", "sparsity.update_every=5%", "sparsity.stop_at=100"), 99),
        (("schedule=cosine", "schedule.rewarm_at=50", "schedule.warmup=0.02"), 50),
        (("schedule=wsd", "schedule.decay_share=0.99", "schedule.warmup_steps=2"), 100),
    ],
    ids=["start", "gap", "rewarmed", "decay"],
)
def test_shares_and_steps_go_together_in_a_run_of_epochs(options, shorter):
    """What they come to is known, and refused where it is nothing, once the data is opened."""
    config = check(composed("epochs=1", "schedule=constant", *options), 1)
    assert config.known_steps is None
    check(replace(config, steps=200), 1)
    with pytest.raises(ValueError, match=r"^(schedule|sparsity)[.=]"):
        check(replace(config, steps=shorter), 1)


def test_resumed_with_other_tokens_as_with_other_steps(ranks, tmp_path):
    base = tree_of(small_config(tmp_path, "eval.every=25%", "batch.micro_size=12"))
    step = 24 * 13
    asked = check(config_from_tree({**base, "tokens": 5 * step - 1}), 1)
    assert asked.steps == 4
    ranks.run(run_train, 1, prepare(asked, 1))
    assert "steps: 4\ntokens: 1559\n" in (tmp_path / "run/config.yaml").read_text()
    longer = check(config_from_tree({**base, "tokens": 6 * step}), 1)
    said = ranks.run(run_said, 1, prepare(longer, 1))[0]
    assert "changed since: steps 4 -> 6, tokens 1559 -> 1872" in said
    whole = named(check(config_from_tree({**base, "steps": 6}), 1), tmp_path, "whole")
    ranks.run(run_train, 1, prepare(whole, 1))
    assert records(tmp_path / "run") == records(whole.run_dir)
    theirs = final_tensors(whole.run_dir)
    assert all(tensor.equal(theirs[name]) for name, tensor in final_tensors(tmp_path / "run").items())
    other = {**base, "tokens": 9 * step, "batch": {**base["batch"], "global_size": 12}}
    with pytest.raises(
        ValueError, match=r"tokens=2808, and the steps before .* were not of batch.global_size=12 .*steps=12$"
    ):
        prepare(config_from_tree(other), 1)
    elsewhere = {
        **base,
        "epochs": 9,
        "steps": None,
        "seed": 3,
        "resume": f"{tmp_path}/run",
        "run_dir": f"{tmp_path}/new",
    }
    config = config_from_tree({**elsewhere, "data": {**base["data"], "holdout": 0.2}})
    with pytest.raises(ValueError, match=r"epochs=9.0, and checkpoint .* read other data before; give steps"):
        prepare(config, 1)


def test_data_that_a_rollback_passed_over_is_no_other_batch(tmp_path, monkeypatch):
    config = config_from_tree({**tree_of(small_config(tmp_path)), "tokens": 9 * 24 * 13})
    state = {"step": 4, "position": 5 * 24, "tokens": 4 * 24 * 13}
    monkeypatch.setattr(resume, "read_manifest", lambda path: {"state": state, "data": {}})
    resume.refuse_other_steps(config, [tmp_path], "any")
    with pytest.raises(ValueError, match="tokens=2808, and the steps before"):
        state["tokens"] -= 1
        resume.refuse_other_steps(config, [tmp_path], "any")


def test_how_a_run_of_epochs_ended_is_known(tmp_path, monkeypatch):
    (tmp_path / "config.yaml").write_text("steps: 7\nepochs: 1.0\n")
    monkeypatch.setattr(agent, "newest_sound", lambda folder: tmp_path)
    for step, state in ((7, "complete"), (6, "stopped")):
        monkeypatch.setattr(agent, "read_manifest", lambda path, step=step: {"step": step})
        assert agent._outcome(agent.Job((), tmp_path, None, 1), None, True).state == state


def test_lengths_wait_for_no_torch():
    code = (
        "import sys; from rowwise.launch.compose import compose_tree\n"
        "try: compose_tree(['tokens=2e9', 'steps=3'])\n"
        "except ValueError as refusal: print(refusal)\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path("/"))
    assert "steps=3 tokens=2000000000.0" in done.stdout, done.stderr
