"""Where each run stands, on top of the page: running, complete, stopped, or failed and why."""

from collections.abc import Sequence

from rowwise.launch.outcome import read_outcome
from rowwise.launch.pages.draw import name_of
from rowwise.launch.pages.markup import duration, text
from rowwise.launch.pages.records import Run
from rowwise.launch.standing import Standing, of_run

COLOURED = {  # the class of its bar
    "failed": "bad", "refused": "bad", "unreadable": "bad", "stopped": "halted", "killed": "halted", "silent": "halted",
    "running": "running", "complete": "complete",
}  # fmt: skip


def told_of(run: Run, standing: Standing) -> str:
    """Returns the state of a run, and why, or how far it is."""
    told, reason = standing.state, standing.reason
    outcome = read_outcome(run.folder)
    if standing.state in ("running", "silent"):
        told += f": step {run.last_step:,}"
        told += f" of {standing.steps:,}" if standing.steps else ""
        told += f", about {duration(standing.seconds_left)} left" if standing.seconds_left else ""
    elif standing.state in ("failed", "stopped") and outcome is not None:
        told += f" at step {outcome.step:,}" if outcome.step or run.last_step else " before the first step"
        reason = outcome.reason
    told += f": {reason}" if reason else ""
    if outcome is not None and run.last_step > outcome.step:
        told += f"; the records reach step {run.last_step:,}"
    return told


def banner(runs: Sequence[Run]) -> str:
    """Returns a line a run, with a bar of a colour for its state, and the command that goes on with it. Of several runs, those that
    are not complete."""
    standings = [(run, of_run(run.folder)) for run in runs]
    return "".join(
        f'<p class="state {COLOURED.get(standing.state, "other")}">{_line(run, standing, runs)}</p>'
        for run, standing in standings
        if len(runs) == 1 or standing.state != "complete"
    )


def _line(run: Run, standing: Standing, runs: Sequence[Run]) -> str:
    named = f"{name_of(run)}: " if len(runs) > 1 else ""
    rest = told_of(run, standing).removeprefix(standing.state)
    onward = standing.goes_on if standing.state != "complete" else None
    command = f"<br>to go on: <code>{text(onward)}</code>" if onward else ""
    return f"{named}<strong>{text(standing.state)}</strong>{text(rest)}{command}"
