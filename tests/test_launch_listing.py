"""`rowwise runs`: how every run and sweep below a folder stands."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from commands import await_steps, overrides_of, start
from parity import small_config, with_layout
from rowwise.launch import cli, listing
from rowwise.launch.outcome import Outcome, write_outcome
from rowwise.launch.standing import Standing, of_run, standings, state_of
from rowwise.launch.sweep.config import keep_asked, keep_command
from rowwise.trainer import screen
from rowwise.trainer.files import to_json
from rowwise.trainer.lock import lock_run
from rowwise.trainer.manifest import begin, commit
from rowwise.trainer.metrics import last_number, last_records
from runs import manifest_at, run_train, run_until
from terminals import Terminal

RECORD = {"loss": 2.5, "grad_norm": 1.0, "lr": 1e-3, "tokens_per_second": 1000.0, "step_seconds": 2.0}


def make_run(folder: Path, step: int = 0, steps: int = 10, saved: tuple[int, ...] = (), **more: float) -> Path:
    """The folder that a run leaves."""
    folder.mkdir(parents=True)
    (folder / ".job").touch()
    (folder / "config.yaml").write_text(f"name: {folder.name}\nsteps: {steps}\neval:\n  every: 2\n")
    lines = [json.dumps({"step": at, **RECORD, **more}) for at in range(1, step + 1)]
    (folder / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines))
    for at in saved:
        commit(begin(folder / "checkpoints", at), {**manifest_at(at), "files": {}})
    return folder


HOLD = """
import sys, time
from pathlib import Path
from rowwise.trainer.lock import lock_run
lock = lock_run(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(600)
"""


def hold(folder: Path) -> subprocess.Popen:
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == b"held\n"
    return process


def test_a_run_under_way_that_is_killed(tmp_path):
    folder = make_run(tmp_path / "run", step=4, saved=(2,), eval_loss=1.25)
    holder = hold(folder)
    try:
        found = of_run(folder)
        assert (found.state, found.step, found.steps, found.loss, found.eval_loss) == ("running", 4, 10, 2.5, 1.25)
        assert (found.seconds_left, found.tokens_per_second, found.goes_on) == (12.0, 1000.0, None)
        later = of_run(folder, now=time.time() + 3600)
        assert (later.state, later.reason) == ("silent", "no sign of life for 60 minutes")
    finally:
        holder.kill()
        holder.wait()
    found = of_run(folder)
    assert (found.state, found.reason) == ("killed", "it left no word after step 4; saved at 2")
    assert (found.seconds_left, found.goes_on) == (None, f"rowwise train resume={folder}")


def test_time_left_is_of_evaluations_as_far_apart_as_they_are(tmp_path):
    """Every 200 steps, of which the last 50 have one, or none."""
    folder = make_run(tmp_path / "run", steps=2000)
    lines = [RECORD | {"step": at} | ({"eval_seconds": 100.0} if at % 200 == 0 else {}) for at in range(1, 1191)]
    holder = hold(folder)
    try:
        for made in (1000, 1190):
            (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines[:made]))
            assert of_run(folder).seconds_left == pytest.approx((2000 - made) * (2.0 + 0.5))
    finally:
        holder.kill()
        holder.wait()


def test_who_looks_whether_a_run_is_under_way_is_in_no_run_s_way(tmp_path, monkeypatch):
    """The run that begins just then waits for the look to end, and others may look at the same time."""
    import fcntl
    import threading

    (tmp_path / ".lock").touch()
    file = os.open(tmp_path / ".lock", os.O_RDONLY)
    fcntl.flock(file, fcntl.LOCK_SH)
    threading.Timer(0.05, os.close, (file,)).start()
    lock_run(tmp_path).release()


ENDED = {
    "complete": (Outcome("complete", None, 10), 10, (10,), ("complete", None), "rowwise train resume={} steps=20"),
    "stopped": (Outcome("stopped", "asked to stop", 4), 4, (4,), ("stopped", None), "rowwise train resume={}"),
    "failed": (
        Outcome("failed", "out of memory: 3 TB", 4), 4, (2,), ("failed", "out of memory: 3 TB"), "rowwise train resume={}"
    ),
    "failed before it saved": (
        Outcome("failed", "not a number: a", 4), 4, (), ("failed", "not a number: a"), "rowwise train config={}/config.yaml"
    ),
    "refused": (Outcome("refused", "batch.x=1: no", 0), 0, (), ("refused", "batch.x=1: no"), "rowwise train config={}/config.yaml"),
    "complete under torchrun, which writes no outcome": (None, 10, (5, 10), ("complete", None), "rowwise train resume={} steps=20"),
    "stopped under torchrun": (None, 4, (4,), ("stopped", None), "rowwise train resume={}"),
    "begun": (None, 0, (), ("not begun", None), "rowwise train config={}/config.yaml"),
    "killed before it saved": (
        None, 3, (), ("killed", "it left no word after step 3; nothing was saved"), "rowwise train config={}/config.yaml"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", ENDED)
def test_how_a_run_ended(tmp_path, case):
    outcome, step, saved, ended, command = ENDED[case]
    folder = make_run(tmp_path / "run", step=step, saved=saved)
    if outcome is not None:
        write_outcome(folder, outcome)
    found = of_run(folder)
    assert (found.state, found.reason) == ended
    assert found.goes_on == command.format(folder)
    assert found.bytes == sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize(("saved", "command"), [((4,), "resume={}"), ((), "config={}/config.yaml")])
def test_a_run_of_ones_own_model_goes_on_with_its_code(tmp_path, saved, command):
    """And with nothing where a file names what no command would."""
    folder = make_run(tmp_path / "run", step=4, saved=saved)
    plain, command = (folder / "config.yaml").read_text(), f"rowwise train {command.format(folder)}"
    for own, told in (
        (None, None),
        ("mixers.py:Mixer", "mixers.py:Mixer"),
        ("package.it:B", "package.it:B"),
        ("$(rm -r x)", None),
    ):
        tree = {
            "name": "run",
            "model": {"name": "tiny", "rope_scaling": {"factor": 2.0}, "own": own, "settings": {"own": "a.b:C"}},
        }
        (folder / "config.yaml").write_text(plain + yaml.safe_dump(tree, sort_keys=False))
        assert of_run(folder).goes_on == command + (f" model={told}" if told else "")


def test_signs_of_life_are_expected_in_the_time_of_steps():
    assert state_of(True, None, 3, 10, None, quiet_seconds=119, step_seconds=0.1)[0] == "running"
    assert state_of(True, None, 3, 10, None, quiet_seconds=121, step_seconds=0.1)[0] == "silent"
    assert state_of(True, None, 3, 10, None, quiet_seconds=1000, step_seconds=60)[0] == "running"
    assert state_of(True, Outcome("failed", "before"), 3, 10, None, 1, 1)[0] == "running", "the lock is of now"


def spoil(folder: Path, name: str, content: bytes) -> None:
    (folder / name).write_bytes(content)


DAMAGE = {
    "records": ("metrics.jsonl", b"\xff\x00{\n" * 50, "not begun"),
    "a record cut off": ("metrics.jsonl", b'{"step": 1, "loss": 2.0}\n{"step": 2, "lo', "killed"),
    "records of other types": (
        "metrics.jsonl",
        b'{"step": 3, "loss": "x", "step_seconds": [], "eval_loss": {}}\n',
        "killed",
    ),
    "settings": ("config.yaml", b"\xff\xfe steps: [", "killed"),
    "a number of steps that is none": ("config.yaml", b"steps: " + b"9" * 5000, "killed"),
    "an outcome": ("outcome.json", b"{", "failed"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_in_one_run_ends_no_list(tmp_path, case):
    name, content, state = DAMAGE[case]
    spoil(make_run(tmp_path / "b", step=4), name, content)
    make_run(tmp_path / "a", step=4)
    make_run(tmp_path / "c", step=4)
    found = list(standings([tmp_path]))
    assert [one.folder.name for one in found] == ["a", "b", "c"]
    assert [one.state for one in found] == ["killed", state, "killed"]
    assert listing.listed(found, 80)


def test_what_cannot_be_read_is_named(tmp_path, monkeypatch):
    make_run(tmp_path / "a")
    monkeypatch.setattr("rowwise.launch.standing._of_run", lambda folder, now: 1 / 0)
    (found,) = standings([tmp_path])
    assert (found.state, found.reason) == ("unreadable", "division by zero")
    (tmp_path / "loop").mkdir()
    (tmp_path / "loop/again").symlink_to(tmp_path)
    assert len(list(standings([tmp_path]))) == 1


def test_a_sweep_stands_before_its_trials(tmp_path, capsys):
    folder = tmp_path / "sweeps/first one"
    trials = [{"optim.lr": str(n)} for n in range(12)]
    folder.mkdir(parents=True)
    (folder / "sweep.json").write_text(to_json({"trials": trials}))
    for number in range(11):
        make_run(folder / f"trial-{number}", step=10, saved=(10,), eval_loss=2.0 - number / 10)
        write_outcome(folder / f"trial-{number}", Outcome("complete", None, 10))
    write_outcome(folder / "trial-3", Outcome("failed", "not a number: b", 4))
    write_outcome(folder / "trial-9", Outcome("stopped", "asked to stop", 4))
    (folder / "sweep.csv").write_text("trial,state\n8,complete\n9,pruned\n")
    keep_command(folder, ["sweep.name=first one", "optim.lr=1,2"], anew=True)
    found = list(standings([tmp_path]))
    sweep, last = found[0], found[-1]
    assert (sweep.state, sweep.step, sweep.steps, sweep.trials, sweep.eval_loss) == ("stopped", 11, 12, 11, 1.0)
    assert sweep.reason == "9 complete, 1 failed, 1 pruned; best trial-10"
    assert sweep.goes_on == "rowwise sweep 'sweep.name=first one' optim.lr=1,2"
    assert [one.folder.name for one in found[1:]] == [f"trial-{n}" for n in range(11)], "2 comes before 10"
    assert last.sweep == folder and found[10].state == "pruned"
    assert not any(one.goes_on for one in found[1:]), "the sweep's own command goes on with them"
    assert cli.main(["runs", str(tmp_path), "json=true"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert len(told) == 12 and told[0]["goes_on"] == sweep.goes_on and told[1]["sweep"] == str(folder)
    holder = hold(folder / "trial-9")
    try:
        assert next(standings([tmp_path])).state == "running"
    finally:
        holder.kill()
        holder.wait()


def test_a_sweep_s_command_is_not_lost_to_another(tmp_path):
    keep_command(tmp_path, ["optim.lr=1,2"], anew=False)
    (tmp_path / "sweep.json").write_text("{}")
    keep_command(tmp_path, ["optim.lr=3,4"], anew=False)
    assert (tmp_path / "command.txt").read_text() == "rowwise sweep optim.lr=1,2\n"


def test_a_search_is_complete_when_it_has_all_the_trials_it_was_asked_for(tmp_path):
    """Its plan does not say how many: more are no other search."""
    (tmp_path / "sweep.json").write_text(to_json({"search": "tpe", "goal": "loss"}))
    keep_command(tmp_path, ["sweep.search=tpe"], anew=True)
    for number, loss in enumerate((2.5, 1.5)):
        folder = make_run(tmp_path / f"trial-{number}", step=10, saved=(10,), loss=loss, eval_loss=2.0 + number)
        write_outcome(folder, Outcome("complete", None, 10))
    for asked, state, goes_on in ((None, "stopped", True), (3, "stopped", True), (2, "complete", False)):
        if asked is not None:
            keep_asked(tmp_path, asked, "loss")
        found = next(standings([tmp_path]))
        assert (found.state, found.step, found.steps, found.goes_on is not None) == (state, 2, asked, goes_on)
    assert found.reason == "2 complete; best trial-1" and (found.loss, found.eval_loss) == (1.5, 3.0)


def test_a_sweep_s_command_tells_no_password(tmp_path):
    keep_command(tmp_path, ["sweep.storage=postgresql://me:hidden@host/db"], anew=True)
    told = "rowwise sweep 'sweep.storage=postgresql://me:***@host/db'"
    assert (tmp_path / "command.txt").read_text() == f"{told}\n"
    (tmp_path / "command.txt").write_text("rowwise sweep sweep.storage=postgresql://me:hidden@host/db\n")  # of before
    (tmp_path / "sweep.json").write_text("{}")
    assert next(standings([tmp_path])).goes_on == told.replace("'", "")


FOUND = [
    Standing(Path("runs/tiny"), "running", None, 123, 200, 1.6543, 1.7025, 2099.4, 194.0, 10_700_000),
    Standing(Path("runs/漢字漢字 of a name that is much longer than its column"), "failed", "out of memory: " + "too much, " * 12,
             12_345, 1_000_000, 12.3456, 11.2345, 1_234_567.0, None, 8, "rowwise train resume=runs/x"),
    Standing(Path("sweeps/a"), "stopped", "3 complete", 3, 4, None, 1.5, None, None, 9, "rowwise sweep optim.lr=1,2", 4),
    Standing(Path("sweeps/a/trial-0"), "complete", None, 9, 9, 2.5, 1.5, 5.0, None, 9, None, None, Path("sweeps/a")),
    Standing(Path("a\x1b[2Jb\nc"), "not begun"),
]  # fmt: skip


@pytest.mark.parametrize("width", [80, 200, None])
def test_nothing_of_the_list_is_cut(width):
    lines = listing.listed(FOUND, width).split("\n")
    text = "\n".join(lines)
    assert all(screen.columns(line) <= (width or 10**6) for line in lines)
    for one in FOUND[:-1]:
        assert (one.folder.name if one.sweep else str(one.folder)) in text
        for said in (one.goes_on, one.reason):
            assert said is None or " ".join(said.split()) in " ".join(text.split())
    assert "a?[2Jb?c" in text and "\x1b" not in text
    assert len(lines) == {80: 12, 200: 8, None: 6}[width]
    (first,) = [line for line in lines if line.startswith("runs/tiny")]
    assert first.split() == ["runs/tiny", "running", "123/200", "1.6543", "1.7025", "2,099", "3:14", "10.7", "MB"]
    state = re.compile("(?:running|stopped|complete|failed|not begun) ")
    starts = {
        screen.columns(line[: found.start()]) for line in lines if "bytes" in line and (found := state.search(line))
    }
    assert len(starts) == 1, "columns stand below each other, also behind wide characters"


def test_the_list_on_a_terminal_and_watched(tmp_path):
    make_run(tmp_path / "runs/done", step=10, saved=(10,), eval_loss=1.5)
    going = make_run(tmp_path / "runs/going", step=4, steps=100)
    holder = hold(going)
    try:
        with Terminal(80, rows=12) as terminal:
            listed = terminal.wait(terminal.start("-m", "rowwise.launch.listing", folder=tmp_path))
        with Terminal(80, rows=12) as terminal:
            process = terminal.start("-m", "rowwise.launch.listing", "watch=true", folder=tmp_path)
            terminal.until(lambda lines: any("4/100" in line for line in lines))
            with (going / "metrics.jsonl").open("a") as file:
                file.write(json.dumps({"step": 5, **RECORD}) + "\n")
            watched = terminal.until(lambda lines: any("5/100" in line for line in lines))
            process.send_signal(signal.SIGINT)
            terminal.wait(process)
    finally:
        holder.kill()
        holder.wait()
    assert process.returncode == 0
    assert [line.split()[:3] for line in listed] == [
        ["run", "state", "step"], ["runs/done", "complete", "10/10"], ["rowwise", "train", "resume=runs/done"],
        ["runs/going", "running", "4/100"],
    ]  # fmt: skip
    assert [line.split()[0] for line in watched] == ["run", "runs/going", "runs/done", "rowwise"], "what runs is first"


def test_a_folder_without_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["runs"]) == 2
    assert capsys.readouterr().err == (
        "refused: there is no folder runs or sweeps here; give one that has runs below it\n"
    )
    (tmp_path / "runs").mkdir()
    assert cli.main(["runs"]) == 0
    assert capsys.readouterr().out == "no runs below runs\n"


def test_the_end_of_long_records_is_read(tmp_path):
    """By its last lines alone, however long they are, and with what came long before."""
    lines = [{"step": n, "more": "x" * (50 if n < 9000 else 3000)} for n in range(1, 9101)]
    lines[100]["eval_loss"] = 3.5
    (tmp_path / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines) + '{"step": 91')
    assert [record["step"] for record in last_records(tmp_path, 50)] == list(range(9051, 9101))
    assert last_number(tmp_path, "eval_loss") == 3.5 and last_number(tmp_path, "no_such") is None
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "eval_loss": 2.5}\n')
    assert last_number(tmp_path, "eval_loss") == 2.5 and len(last_records(tmp_path, 50)) == 1
    assert last_records(tmp_path / "no", 50) == [] and last_number(tmp_path / "no", "eval_loss") is None


def test_runs_as_they_are_made(ranks, tmp_path):
    """Without an agent, which would say how they ended."""
    config = with_layout(small_config(tmp_path, "steps=4", "data.holdout=0.2", "eval.every=2"), 1)
    ranks.run(run_until, 1, config, 2)
    (stopped,) = standings([tmp_path])
    assert (stopped.state, stopped.step, stopped.steps) == ("stopped", 2, 4)
    ranks.run(run_train, 1, config)
    (complete,) = standings([tmp_path])
    assert (complete.state, complete.step, complete.steps) == ("complete", 4, 4)
    assert complete.loss and complete.eval_loss and complete.tokens_per_second


@pytest.mark.full
def test_a_real_run_that_is_killed(tmp_path):
    overrides = overrides_of(tmp_path, "steps=1000000", "schedule=constant", "checkpoint.every=0")
    job = start(tmp_path, [sys.executable, "-m", "rowwise.launch.train", *overrides])
    await_steps(tmp_path, 3, job)
    (found,) = standings([tmp_path])
    assert (found.state, found.steps) == ("running", 1_000_000) and found.seconds_left
    job.kill()
    job.wait()
    (found,) = standings([tmp_path])
    assert found.state == "killed" and found.goes_on is not None
