"""The report that a run leaves when it ends, and the one that is written again while it goes on."""

import os
import re
import signal
import sys
import threading
import time
from dataclasses import replace

import pytest
from filelock import FileLock

from parity import small_config
from rowwise.launch import leaving
from rowwise.launch import report as reports
from rowwise.launch.leaving import end_told, leave_report, leave_report_as_told
from rowwise.launch.outcome import Failed, Outcome, read_outcome, write_outcome
from rowwise.trainer.files import to_json


def write_records(folder, steps):
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_text(
        "".join(to_json({"step": s, "loss": 2.0}) + "\n" for s in range(1, steps + 1))
    )


@pytest.fixture
def run(tmp_path):
    write_records(tmp_path / "a, run", 3)
    write_outcome(tmp_path / "a, run", Outcome("failed", "not a number: step 4", 3))
    return tmp_path / "a, run"


def test_a_run_that_failed_leaves_its_reason(run, capfd):
    leave_report(run, "failed", "failed")
    said = capfd.readouterr()
    assert (said.out, said.err) == ("", ""), "where all goes well nothing is said"
    page = (run / "report.html").read_text()
    assert re.search('<p class="state bad"><strong>failed</strong> at step 3: not a number: step 4<', page)
    assert "http-equiv" not in page


@pytest.mark.parametrize(
    ("asked", "state"), [("never", "failed"), ("failed", "complete"), ("failed", "stopped"), ("always", "refused")]
)
def test_a_run_leaves_none_where_none_is_asked_for(run, asked, state, monkeypatch):
    monkeypatch.setattr(leaving, "WRITER", ("no such program",))
    leave_report(run, asked, state)
    leave_report(run / "nowhere", "always", "failed")


@pytest.mark.parametrize(
    ("program", "told"),
    [
        ("import sys; sys.exit('first\\n\\nrefused: the page is a file')", "refused: the page is a file"),
        ("raise KeyError('x')", "KeyError: 'x'"),
        ("import sys; sys.exit('more than a pipe holds\\n' * 9000 + 'why')", "why"),
        ("import os; os._exit(3)", "it ended with 3"),
        ("import time; time.sleep(60)", "it took more than 1 seconds"),
        (None, "No such file or directory"),
    ],
)
def test_what_goes_wrong_with_a_report_is_a_line(run, program, told, monkeypatch, capfd):
    monkeypatch.setattr(
        leaving, "WRITER", ("/no such program",) if program is None else (sys.executable, "-S", "-c", program)
    )
    monkeypatch.setattr(leaving, "PATIENCE_SECONDS", 1.0 if "sleep" in str(program) else 60.0)
    began = time.monotonic()
    leave_report(run, "always", "failed")
    assert capfd.readouterr().err == f"warning: no report.html: {told}; `rowwise report run={run}` makes it\n"
    assert time.monotonic() - began < 30


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_ends_the_wait_and_not_the_run(run, number, monkeypatch, capfd):
    """What a scheduler sends to a run that has just ended does not make a failure of it."""
    monkeypatch.setattr(leaving, "WRITER", (sys.executable, "-S", "-c", "import time; time.sleep(60)"))
    threading.Timer(0.3, os.kill, (os.getpid(), number)).start()
    leave_report(run, "always", "complete")
    assert "no report.html: it was interrupted" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("steps", "error", "outcome"),
    [
        (3, None, Outcome("complete", None, 3)),
        (2, None, Outcome("stopped", "asked to stop", 2)),
        (2, Failed("disk full: /"), Outcome("failed", "disk full: /", 2)),
        (2, FloatingPointError("step 3"), Outcome("failed", "not a number: step 3", 2)),
        (0, RuntimeError("no"), Outcome("failed", "RuntimeError: no", 0)),
        (2, KeyboardInterrupt(), Outcome("stopped", leaving.AT_ONCE, 2)),
    ],
)
def test_rank_0_tells_the_end_where_nobody_else_does(steps, error, outcome, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(leaving, "leave_report", lambda run_dir, *words: asked.append(words))
    config = replace(small_config(tmp_path, "steps=3"), run_dir=str(tmp_path / "run"))
    with pytest.raises(type(error)) if error else end_told(config):
        write_records(tmp_path / "run", steps)
        if error:
            with end_told(config):
                raise error
    assert read_outcome(tmp_path / "run") == outcome
    leave_report_as_told(config)
    assert asked == ([] if isinstance(error, KeyboardInterrupt) else [("always", outcome.state)])


def test_a_page_that_is_watched_is_written_until_the_run_ends(tmp_path, monkeypatch, capsys):
    """It waits for the first record, reloads itself while the run goes on, and stays as it is at the end."""
    run, pages = tmp_path / "run", []
    run.mkdir()
    (run / "config.yaml").write_text("steps: 9\n")
    lock, written = FileLock(run / ".lock"), reports.report
    lock.acquire()

    def follow(settings, reload_seconds=None):
        if not (run / "metrics.jsonl").exists():
            write_records(run, 2)
            raise ValueError("the run has no records yet")
        told = written(settings, reload_seconds)
        pages.append((run / "report.html").read_text())
        write_records(run, len(pages) + 2)
        if len(pages) == 2:
            write_outcome(run, Outcome("complete", None, 9))
            lock.release()
        return told

    monkeypatch.setattr(reports, "report", follow)
    monkeypatch.setattr(reports, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(reports, "RELOAD_SECONDS", 0)
    monkeypatch.setattr(reports, "SHARE", 0)
    assert reports.main([f"run={run}", "watch=true"]) == 0
    assert ["http-equiv" in page for page in pages] == [True, True, False]
    assert "running: step 3 of 9" in re.sub("<.*?>", "", pages[1]) and "running:" not in re.sub("<.*?>", "", pages[2])
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 2 and said[0].endswith("written again while the run goes on, Ctrl-C ends that")


def test_a_run_that_is_over_is_not_waited_for(run, monkeypatch, capsys):
    monkeypatch.setattr(reports, "POLL_SECONDS", 1000)
    (run / "outcome.json").unlink()  # cut off
    assert reports.main([f"run={run}", "watch=true"]) == 0
    assert reports.main([f"run={run}", "watch=maybe"]) == 2
    assert "watch=maybe: give watch=true or watch=false" in capsys.readouterr().err
