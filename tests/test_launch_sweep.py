"""Sweeps: the grid under a real torchrun agent, searches that are killed and go on, and what is refused before a trial."""

import contextlib
import csv
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
import types
from multiprocessing.context import ForkServerProcess as Process
from pathlib import Path

import optuna
import pytest
from filelock import FileLock

from commands import PATIENCE, overrides_of, run, run_in_pool
from ranks import quick_start
from rowwise.launch.outcome import Outcome, clear_outcome, write_outcome
from rowwise.launch.sweep import search
from rowwise.launch.sweep.__main__ import main
from rowwise.launch.sweep.config import keep_plan, resolve
from rowwise.launch.sweep.halving import Halving
from rowwise.launch.sweep.running import Running, outcome_of
from rowwise.launch.sweep.space import Choice, Interval, parse_space
from rowwise.launch.sweep.trials import Trial, curve, draw, row_of, trial_words, write_table
from rowwise.trainer.metrics import MetricsTail, read_metrics
from rowwise.trainer.starts import read_starts
from rowwise.trainer.tracker import NoTracker, Wandb
from runs import records


def trial_overrides(folder: Path, *more: str) -> list[str]:
    return [word for word in overrides_of(folder, *more) if not word.startswith("run_dir=")]


def rows_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "sweep.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_a_grid_of_two_on_two_ranks_each(ranks, tmp_path):
    """Two runs in two folders, the one of each equal to the same run alone; the table says what they measured."""
    words = trial_overrides(tmp_path, "steps=4", "eval.every=2", "nproc=2", "data.holdout=0.1")
    code, said = run(
        tmp_path,
        [sys.executable, "-m", "rowwise.launch.sweep", "-m", "optim=adamw,lion", "optim.lr=3e-3", *words],
    )
    assert code == 0, said
    folder, rows = tmp_path / "sweeps/default", rows_of(tmp_path / "sweeps/default")
    assert [row["optim"] for row in rows] == ["adamw", "lion"]
    for number, row in enumerate(rows):
        trial = folder / f"trial-{number}"
        measured = read_metrics(trial)
        assert (row["trial"], row["state"], row["folder"]) == (str(number), "complete", str(trial))
        assert float(row["eval_loss"]) == measured[-1]["eval_loss"]
        assert float(row["loss"]) == measured[-1]["loss"]
        assert int(row["step"]) == len(measured) == 4
        alone = [f"optim={row['optim']}", "optim.lr=3e-3", f"run_dir={tmp_path}/alone-{number}", "nproc=null"]
        run_in_pool(ranks, [*overrides_of(tmp_path), *words, *alone])
        assert records(trial) == records(tmp_path / f"alone-{number}")
    assert (folder / "sweep.png").stat().st_size > 10_000
    assert len({row["eval_loss"] for row in rows}) == 2


@pytest.mark.slow
def test_trials_that_fail_are_recorded_and_stop_nothing(tmp_path):
    """One complete, one whose loss is no number; tests/test_launch_start.py has one that runs out of memory. No file of theirs
    tells the password of the storage."""
    words = trial_overrides(tmp_path, "steps=3", "eval.every=3", "nproc=1", "data.holdout=0.1", "report=failed")
    folder = tmp_path / "it's ${x}, [a]=b"  # every character that means something in an override
    folder.mkdir()
    storage = f"sweep.storage=sqlite:///file:{tmp_path}/all.db?uri=true&password="
    sweep = ["sweep.search=grid", "sweep.parallel=2", "optim.lr=1e-3,1e30", f"{storage}hunter2"]
    code, said = run(folder, [sys.executable, "-m", "rowwise.launch.sweep", *sweep, *words])
    assert code == 0, said
    rows = rows_of(folder / "sweeps/default")
    assert [row["state"] for row in rows] == ["complete", "failed"]
    assert [row["reason"][:13] for row in rows] == ["", "not a number:"]
    assert rows[1]["step"] in ("1", "2")
    assert len({row["folder"] for row in rows}) == 2
    trials = [Path(row["folder"]) for row in rows]
    assert [(trial / "report.html").exists() for trial in trials] == [False, True]
    assert re.search("<strong>failed</strong> at step [12]: not a number:", (trials[1] / "report.html").read_text())
    (start,) = read_starts(trials[0])
    assert start.command.startswith("rowwise train model.layers=2 ") and start.step == 0
    assert f"{storage}***" in (folder / "sweeps/default/command.txt").read_text() and (tmp_path / "all.db").exists()
    files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert len(files) > 20 and not [path for path, content in files.items() if b"hunter2" in content]
    assert "hunter2" not in said


REFUSED = {
    "an unknown key": (["optim.lrr=1,2"], "unknown key optim.lrr"),
    "a value that one trial refuses": (["batch.micro_size=2,3"], "the trial batch.micro_size=3: "),
    "a choice that is none": (["optim=adamw,adamww"], "adamww"),
    "a layout for which there are too few": (["parallel.shard=1,2", "nproc=1"], "the trial parallel.shard=2: "),
    "more ranks than a batch has for them": (["seed=1,2", "nproc=512"], "does not divide into 512 data-parallel ranks"),
    "nothing is varied": (["seed=1"], "nothing is varied"),
    "an interval without a search": (["optim.lr=interval(1e-4,1e-2)"], "give some, or a search"),
    "a grid with an interval": (["optim.lr=interval(1e-4,1e-2)", "sweep.search=grid"], "give some, or a search"),
    "an interval that goes down": (["optim.lr=interval(1e-2,1e-4)", "sweep.search=tpe"], "an interval goes upwards"),
    "a logarithm of nothing": (["optim.lr=tag(log,interval(0,1))", "sweep.search=tpe"], "from above 0"),
    "an empty range": (["seed=range(1,0)"], "seed=range(1,0): it has no value; give some"),
    "a range without end": (["seed=range(0,1000000000)"], "it has more than 10,000 values"),
    "a group's choices": (["optim=glob(*)"], "optim=glob(*): what lies in a group is not looked up here; give optim=A,B"),
    "a password": (
        ["seed=1,2", "sweep.search=tpe", "sweep.storage=nowhere://me:secret@x"], "sweep.storage=nowhere://me:***@x: "
    ),
    "a value twice": (["seed=1,1"], "a value stands there twice"),
    "a folder of one's own": (["seed=1,2", "run_dir=here"], "a sweep gives every trial its own"),
    "another sweeper": (["seed=1,2", "hydra/sweeper=basic"], "a sweep sets this itself"),
    "an unknown key of the sweep": (["seed=1,2", "sweep.trails=3"], "did you mean sweep.trials?"),
    "a wrong type": (["seed=1,2", "sweep.search=tpe", "sweep.trials=many"], "sweep.trials='many'"),
    "a key of a search without one": (["seed=1,2", "sweep.parallel=2"], "sweep.parallel is of a search"),
    "as many trials as a grid has not": (["seed=1,2", "sweep.search=grid", "sweep.trials=3"], "leave sweep.trials"),
    "no trial at a time": (["seed=1,2", "sweep.search=tpe", "sweep.parallel=0"], "sweep.parallel=0: give at least 1"),
    "a launcher that a search does not use": (["seed=1,2", "sweep.search=tpe", "hydra/launcher=slurm"], "leave hydra's"),
    "machines whose GPUs are not known": (["seed=1,2", "hydra/launcher=slurm"], "give nproc="),
    "many tasks a machine": (
        ["seed=1,2", "nproc=8", "hydra/launcher=slurm", "hydra.launcher.tasks_per_node=8"], "a trial is one task a machine"
    ),
    "data that is not there": (["seed=1,2", "data=tokens", "data.files=nope.bin"], "nope.bin"),
    "a folder of Hydra's": (["seed=1,2", "hydra.job.chdir=true"], "a sweep sets this itself"),
    "trials that may not go on": (["seed=1,2", "resume=never"], "a sweep goes on with trials that were cut off"),
    "a checkpoint that is not there": (["seed=1,2", "resume=nowhere"], "resume=nowhere"),
    "a goal that is not measured": (["seed=1,2", "eval.every=0"], "nothing is evaluated"),
    "trials that a clock evaluates": (
        ["seed=1,2", "sweep.search=tpe", "eval.every=1min"], "eval.every=1min: trials are compared at the same steps"
    ),
    "trials whose rungs are not known": (["seed=1,2", "sweep.search=tpe", "epochs=1"], "epochs=1 with sweep.pruner=halving"),
    "a length said twice": (["steps=3,4", "tokens=1e6"], "each says how long the run is"),
    "a storage that cannot be opened": (
        ["seed=1,2", "sweep.search=tpe", "sweep.storage=nowhere://x"], "sweep.storage=nowhere://x: "
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_the_first_trial(case, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(search.time, "sleep", lambda seconds: None)  # before a storage is asked again
    words, said = REFUSED[case]
    assert main(words) == 2
    told = capsys.readouterr().err
    assert told.startswith("refused: ")
    assert said in told
    assert not list(tmp_path.glob("sweeps/*/trial-*"))


def test_another_sweep_in_the_same_folder_is_refused(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "sweeps/default"
    folder.mkdir(parents=True)
    (folder / "sweep.json").write_text(json.dumps({"fixed": [], "trials": [{"seed": "7"}]}))
    monkeypatch.chdir(tmp_path)
    for words in (["seed=1,2"], ["seed=1,2", "sweep.search=grid"]):
        assert main(words) == 2
        assert "holds another sweep" in capsys.readouterr().err


def test_a_name_that_another_search_has_in_the_storage_is_refused(tmp_path, monkeypatch, capsys):
    """Here from another folder; the same may be on another layout."""
    words = ["sweep.search=random", f"sweep.storage=sqlite:///{tmp_path}/all.db", "seed=1,2", "sweep.trials=2"]
    for folder, more, refused in (
        ("a", [], False),
        ("b", ["steps=7"], True),
        ("a", ["nproc=1", "sweep.trials=3"], False),
    ):
        (tmp_path / folder).mkdir(exist_ok=True)
        monkeypatch.chdir(tmp_path / folder)
        config, space = resolve([*words, *more])
        with pytest.raises(ValueError, match="another search called default") if refused else contextlib.nullcontext():
            search.Search(config, space)
    assert json.loads((tmp_path / "a/sweeps/default/asked.json").read_text()) == {"trials": 3, "goal": "eval_loss"}


def test_a_journal_that_is_damaged_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(search.time, "sleep", lambda seconds: None)
    config, space = resolve(["sweep.search=random", "seed=1,2", "sweep.trials=2", "nproc=1"])
    journal = search.Search(config, space).folder / "journal.log"
    journal.write_bytes(b"what is no JSON\n" + journal.read_bytes())
    with pytest.raises(ValueError, match=rf"^{journal} cannot be read \(.*\); give another sweep.name, or remove it$"):
        search.Search(config, space)


def test_what_is_varied():
    space = parse_space(["optim=a,b", "steps=5", "model.layers=range(2,7,2)", "optim.lr=tag(log,interval(1e-4,1e-2))"])
    assert space.fixed == ("steps=5",)
    assert space.varied == {
        "optim": Choice(("a", "b")), "model.layers": Choice(("2", "4", "6")), "optim.lr": Interval(1e-4, 1e-2, True)
    }  # fmt: skip
    assert not Interval(1e-4, 1e-2, True).whole
    assert parse_space(["model.layers=interval(2,8)"]).varied["model.layers"] == Interval(2, 8, False)
    assert [tuple(sample.values()) for sample in space.samples()] == [
        ("a", "2", "0.0001"), ("b", "2", "0.0001"), ("a", "4", "0.0001"), ("a", "6", "0.0001"), ("a", "2", "0.01")
    ]  # fmt: skip
    assert list(parse_space(["a=1,2", "b=x,y"]).grid()) == [
        {"a": "1", "b": "x"}, {"a": "1", "b": "y"}, {"a": "2", "b": "x"}, {"a": "2", "b": "y"}
    ]  # fmt: skip


def test_weights_and_biases_groups_the_trials_of_a_sweep():
    words = ["seed=1", "name='lrs-3'", "run_dir='x'", "report=failed"]
    assert trial_words(["seed=1"], Wandb(), "lrs", 3, Path("x")) == [*words, "tracker.group='lrs'"]
    assert trial_words(["seed=1"], Wandb(group="mine"), "lrs", 3, Path("x")) == words
    assert trial_words(["seed=1"], NoTracker(), "lrs", 3, Path("x")) == words
    assert trial_words(["report=never"], NoTracker(), "lrs", 3, Path("x")) == ["report=never", *words[1:3]]


AGENT = """
import json, os, signal, sys, time
folder, value, parent = sys.argv[1], float(sys.argv[2]), os.getppid()
path, stopped = folder + "/metrics.jsonl", []
signal.signal(signal.SIGTERM, lambda *_: stopped.append(True))
done = len(open(path).readlines()) if os.path.exists(path) else 0
while done < 9 and not stopped and os.getppid() == parent:
    done += 1
    loss = (value - 3) ** 2 + 1 / done
    record = {"step": done, "loss": loss, "eval_loss": loss, "tokens_per_second": 1, "step_seconds": 1}
    with open(path, "a") as file:
        file.write(json.dumps(record) + "\\n")
    time.sleep(0.01)
ended = {"state": "complete" if done == 9 else "stopped", "reason": None, "step": done}
open(folder + "/outcome.json", "w").write(json.dumps(ended))
"""


def search_with_small_agents(folder: Path, parallel: int, machine: str = "here", trials: int = 20) -> None:
    """A search whose trials are programs of a few milliseconds, on a machine of that name, where a life is short."""
    os.chdir(folder)
    socket.gethostname = lambda: machine
    search.ALIVE_SECONDS, search.DEAD_SECONDS, search.UNNAMED_SECONDS = 0.5, 3.0, 1.0

    def start_trial(config, space, settings, number, trial, environment, warm):
        clear_outcome(trial)
        (trial / "agent.log").touch()
        return subprocess.Popen([sys.executable, "-S", "-c", AGENT, str(trial), settings["clip_norm"]]), 9

    search.start_trial, search.POLL_SECONDS = start_trial, 0.03
    config, space = resolve([
        "sweep.search=tpe", f"sweep.trials={trials}", f"sweep.parallel={parallel}", "clip_norm=interval(0.0,6.0)",
        "optim.lr=1e-3,1e-2", "eval.every=1", "steps=9", "nproc=1",
    ])  # fmt: skip
    search.search(config, space)


def search_killed_before_a_name(folder: Path, parallel: int) -> None:
    """The same, killed once, when trial 12 is begun and nobody can know by whom."""
    name_machine = optuna.Trial.set_user_attr

    def killed(trial: optuna.Trial, key: str, value: object) -> None:
        if (trial.number, key) == (12, "machine") and not (folder / "killed").exists():
            (folder / "killed").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        name_machine(trial, key, value)

    optuna.Trial.set_user_attr = killed
    search_with_small_agents(folder, parallel)


def trials_of(folder: Path) -> list[optuna.trial.FrozenTrial]:
    backend = optuna.storages.journal.JournalFileBackend(str(folder / "sweeps/default/journal.log"))
    return optuna.load_study(study_name="default", storage=optuna.storages.JournalStorage(backend)).get_trials()


def await_another_trial(folder: Path, search: Process) -> None:
    """Or the end of the search."""

    def begun() -> int:
        return len(list(folder.glob("sweeps/default/trial-*")))

    before = begun()
    while begun() == before and search.is_alive():
        time.sleep(0.002)


@pytest.mark.slow
@pytest.mark.parametrize("parallel", [1, pytest.param(3, marks=pytest.mark.long)])  # several: tests/cluster/search.py
def test_a_search_that_is_killed_goes_on(tmp_path, parallel):
    """SIGKILL at random instants, and where a trial is begun and has no name of a machine. With one trial at a time the trials are
    those of a search never killed, to the digit."""
    random_instants, killed = random.Random(7), 0
    searches = {"whole": search_with_small_agents} if parallel == 1 else {}
    for name, target in (searches | {"killed": search_killed_before_a_name}).items():
        (tmp_path / name).mkdir()
        exit_code = None
        while exit_code is None:
            process = quick_start().Process(target=target, args=(tmp_path / name, parallel))
            process.start()
            if name == "killed" and killed < (8 if parallel == 1 else 4):
                await_another_trial(tmp_path / name, process)
                process.join(random_instants.uniform(0, 0.3))
                process.kill()
                killed += 1
            process.join()
            exit_code = None if process.exitcode == -signal.SIGKILL else process.exitcode
        assert exit_code == 0
    assert killed >= 2 and (tmp_path / "killed/killed").exists()
    found = {name: trials_of(tmp_path / name) for name in (*searches, "killed")}
    for trials in found.values():
        assert len(trials) == 20
        assert {trial.state for trial in trials} == {optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.PRUNED}
    if parallel == 1:
        whole, goes_on = ([(t.params, t.state, t.value) for t in trials] for trials in found.values())
        assert whole == goes_on
    for folder in (tmp_path / "killed/sweeps/default").glob("trial-*"):
        steps = [record["step"] for record in read_metrics(folder)]
        assert steps == list(range(1, len(steps) + 1))


@pytest.mark.parametrize("number", [pytest.param(signal.SIGTERM, marks=pytest.mark.slow), signal.SIGKILL])
def test_a_search_goes_on_on_another_machine(tmp_path, number):
    """Where it was asked to stop at once; where its machine is gone once it has been silent for some time."""
    process = quick_start().Process(target=search_with_small_agents, args=(tmp_path, 2, "there", 12))
    process.start()
    deadline = time.monotonic() + PATIENCE
    while len(list(tmp_path.glob("sweeps/default/trial-*/metrics.jsonl"))) < 11:
        assert time.monotonic() < deadline
        time.sleep(0.002)
    os.kill(process.pid, number)
    process.join()
    assert process.exitcode == (0 if number == signal.SIGTERM else -number)
    assert 10 <= len(trials_of(tmp_path)) <= 12
    process = quick_start().Process(target=search_with_small_agents, args=(tmp_path, 2, "here", 12))
    process.start()
    process.join()
    assert all(trial.state.is_finished() for trial in trials_of(tmp_path))
    assert len(trials_of(tmp_path)) == 12


def test_two_that_search_in_one_folder_share_the_trials(tmp_path):
    given = (tmp_path, 2, "here", 12)
    both = [quick_start().Process(target=search_with_small_agents, args=given) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join()
    assert [process.exitcode for process in both] == [0, 0]
    trials = trials_of(tmp_path)
    assert len(trials) == 12
    assert {trial.state for trial in trials} == {optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.PRUNED}
    for trial in trials:
        steps = [record["step"] for record in read_metrics(tmp_path / f"sweeps/default/trial-{trial.number}")]
        assert steps == list(range(1, len(steps) + 1))


def test_an_agent_that_is_asked_before_it_hears_has_not_failed(tmp_path):
    for code, state in ((-signal.SIGTERM, "stopped"), (-signal.SIGKILL, "failed"), (2, "refused")):
        (tmp_path / "agent.log").write_text("refused: there is no data\n")
        process = subprocess.Popen([sys.executable, "-S", "-c", f"import os; {leaving(code)}"])
        process.wait()
        running = Running(None, tmp_path, 0, process, 9, None, None, 0.0, set())
        assert running.has_ended()
        assert outcome_of(running).state == state
    assert outcome_of(running).reason == "there is no data"
    process = subprocess.Popen([sys.executable, "-S", "-c", leaving(-signal.SIGKILL)])
    process.wait()
    with FileLock(tmp_path / ".lock"):  # its workers are still there
        assert not Running(None, tmp_path, 0, process, 9, None, None, 0.0, set()).has_ended()


def leaving(code: int) -> str:
    return f"import os; os.kill(os.getpid(), {-code})" if code < 0 else f"import sys; sys.exit({code})"


@pytest.mark.parametrize("every", [1, 2])
def test_halving_keeps_the_best_third_at_every_rung(every):
    """Trials one after the other, against the definition; values that stay in order."""
    study, kept = optuna.create_study(pruner=Halving(every, 3)), {1: [], 3: [], 9: []}
    for value in random.Random(5).sample(range(100), 40):
        trial = study.ask()
        for count in range(1, 11):
            trial.report(value - count / 100, count * every)
            expected = False
            if count in kept:
                kept[count].append(value)
                expected = value > sorted(kept[count])[max(1, len(kept[count]) // 3) - 1]
            assert trial.should_prune() == expected
            if expected:
                break
        study.tell(trial, state=optuna.trial.TrialState.PRUNED if expected else optuna.trial.TrialState.COMPLETE,
                   values=None if expected else [value])  # fmt: skip
    assert 3 <= len(kept[9]) < len(kept[3]) < len(kept[1]) == 40


def test_a_search_never_prefers_a_trial_for_a_step_without_a_loss(tmp_path):
    """A step without valid tokens has null: it is reported to no pruner, is no trial's value, and is best of nothing."""
    losses = {0: [3.0, None, 2.5, None], 1: [3.0, 2.0, None, 2.0], 2: [None, None, None, None]}
    for number, values in losses.items():
        (tmp_path / f"trial-{number}").mkdir()
        common = {"tokens": 1, "tokens_per_second": 1.0, "step_seconds": 1.0}
        lines = [{"step": s, "loss": v, "eval_loss": v, **common} for s, v in enumerate(values, 1)]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (tmp_path / f"trial-{number}/metrics.jsonl").write_text(text)
    trials = [Trial(number, {"seed": str(number)}, tmp_path / f"trial-{number}") for number in losses]
    for goal in ("loss", "eval_loss"):
        curves = [curve(trial.folder, goal) for trial in trials]
        assert curves == [[(1, 3.0), (3, 2.5)], [(1, 3.0), (2, 2.0), (4, 2.0)], []]
    rows = [row_of(trial, "loss") for trial in trials]
    assert [(row["eval_loss"], row["best_eval_loss"]) for row in rows] == [(2.5, 2.5), (2.0, 2.0), (None, None)]
    assert draw(trials, tmp_path, "loss").exists()

    study = optuna.create_study(pruner=Halving(1, 3))
    watched = types.SimpleNamespace(config=types.SimpleNamespace(goal="loss"), _decide=lambda running, step: None)
    for trial in trials:
        asked = study.ask()
        tail = MetricsTail(trial.folder)
        running = Running(asked, trial.folder, 0, None, 4, None, tail, 0.0, set())
        search.Search._report(watched, running)
        assert study.trials[-1].intermediate_values == dict(curve(trial.folder, "loss"))
        study.tell(asked, **({"values": measured[-1][1]} if (measured := curve(trial.folder, "loss")) else
                             {"state": optuna.trial.TrialState.FAIL}))  # fmt: skip
    assert study.best_trial.number == 1


DAMAGE = {  # the files of a trial -> its state, the reason and the last evaluation
    "sound": ({}, "complete", "", "2.5"),
    "half an outcome": ({"outcome.json": '{"state": "comp'}, "failed", "outcome.json is damaged (", "2.5"),
    "an outcome of other types": ({"outcome.json": '{"state": 7}'}, "failed", "outcome.json is damaged (", "2.5"),
    "an outcome that is a list": ({"outcome.json": "[1]"}, "failed", "outcome.json is damaged (", "2.5"),
    "no outcome": ({"outcome.json": None}, "running", "", "2.5"),
    "no records": ({"metrics.jsonl": None}, "failed", "it has no eval_loss", ""),
    "no lines": ({"metrics.jsonl": "\0\xff[\n{}\n"}, "failed", "it has no eval_loss", ""),
    "an evaluation that is no number": (
        {"metrics.jsonl": '{"step": 2, "eval_loss": 2.5}\n{"step": 4, "eval_loss": null}\n'},
        "failed", "not a number: eval_loss of step 4", "2.5"),
    "an evaluation of words": (
        {"metrics.jsonl": '{"step": 4, "eval_loss": "low", "tokens_per_second": [], "step_seconds": {}}\n'},
        "failed", "not a number: eval_loss of step 4", ""),
    "an evaluation that is too large": (
        {"metrics.jsonl": f'{{"step": 4, "eval_loss": 1{"0" * 400}, "loss": 1e999}}\n'},
        "failed", "not a number: eval_loss of step 4", ""),
    "an evaluation that is large": ({"metrics.jsonl": '{"step": 4, "eval_loss": 1e308}\n'}, "complete", "", "1e+308"),
}  # fmt: skip


def damaged_trials(folder: Path) -> list[Trial]:
    trials = []
    for number, (files, *_) in enumerate(DAMAGE.values()):
        trial = Trial(number, {"seed": str(number)}, folder / f"trial-{number}")
        trial.folder.mkdir(parents=True)
        write_outcome(trial.folder, Outcome("complete", None, 4))
        (trial.folder / "metrics.jsonl").write_text('{"step": 4, "eval_loss": 2.5, "step_seconds": 1.0}\n')
        for name, content in files.items():
            (trial.folder / name).unlink()
            if content is not None:
                (trial.folder / name).write_text(content, encoding="latin-1")
        trials.append(trial)
    unreadable = Trial(len(trials), {"seed": "x"}, folder / "trial-x")
    (unreadable.folder / "metrics.jsonl").mkdir(parents=True)
    return [*trials, unreadable]


def test_damaged_trials_do_not_end_a_sweep(tmp_path):
    trials = damaged_trials(tmp_path)
    write_table([row_of(trial, "eval_loss") for trial in trials], tmp_path / "sweep.csv")
    assert draw(trials, tmp_path, "eval_loss").stat().st_size > 5_000
    rows = dict(zip(DAMAGE, rows_of(tmp_path), strict=False))
    for what, (_, state, reason, evaluated) in DAMAGE.items():
        row = rows[what]
        assert (row["state"], row["eval_loss"]) == (state, evaluated), what
        assert reason in row["reason"] and bool(reason) == bool(row["reason"]), what
    assert rows_of(tmp_path)[-1]["state"] == "not begun"
    assert not re.search("nan|inf", (tmp_path / "sweep.csv").read_text())


def test_a_plan_that_is_damaged_is_refused_in_a_line(tmp_path):
    for content, said in (('{"fixed": ', "sweep.json is damaged"), ("[1]", "holds another sweep")):
        (tmp_path / "sweep.json").write_text(content)
        with pytest.raises(ValueError, match=said):
            keep_plan(tmp_path, {"fixed": []})
