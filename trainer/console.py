"""What a person sees of a run: a progress bar at the foot of a terminal, plain lines elsewhere, and both kept in train.log.

What is said goes to standard output, what is wrong to standard error. Own lines and no library's bar: they are two, each change is
one write (other processes have the same terminal), and both streams may be that terminal, in which their order is kept.
"""

import sys
import threading
import time
from pathlib import Path
from typing import Any

from rowwise.trainer.metrics import number
from rowwise.trainer.pace import Pace
from rowwise.trainer.runlog import keep_said
from rowwise.trainer.screen import (
    CLEAR,
    FALLBACK_COLUMNS,
    Foot,
    boxed,
    byte_count,
    clock,
    columns,
    flowed,
    holds,
    is_terminal,
    same_file,
    take_foot,
    width_of,
    wrapped,
)

PAINT_SECONDS = 0.1  # between two paintings of the bar, at least
PLAIN_SECONDS = 60.0  # between two plain lines, at most, however long steps take
FORECAST_SECONDS, FORECAST_STEPS = 10.0, 10  # whichever comes first, and then it is known how long the run takes
LEAST_BAR = 6
WIDEST_BOX = 100


class Console:
    """Shows the steps of a run that goes on after `step`, and keeps what it says in its folder. Only rank 0 has one."""

    def __init__(self, run_dir: Path, step: int, steps: int, log_every: int, workers: int = 1):
        self._run_dir, self._steps, self._log_every, self._workers = run_dir, steps, log_every, workers
        self._pace, self._lock, self._began = Pace(), threading.RLock(), time.monotonic()
        self._painted, self._told = self._began, (self._began, step)
        self._forecast = steps - step <= 2 * FORECAST_STEPS  # too few for one
        self.last: dict[str, Any] = {"step": step}  # the last record, with the last held-out loss
        self._prefix, self._foot = "", None
        if is_terminal(sys.stdout):
            if take_foot(sys.stdout):
                self._foot = Foot(sys.stdout)
            else:  # another run has it
                self._prefix = f"{run_dir.name}: "

    @property
    def seconds(self) -> float:
        """The seconds since the console was opened."""
        return time.monotonic() - self._began

    def step(self, record: dict[str, Any]) -> None:
        """Shows one record: the bar moves on, and every `log_every` steps, or every minute, a line is said."""
        now, step = time.monotonic(), record["step"]
        self._pace.add(record)
        self.last = {**{key: self.last[key] for key in ("eval_loss",) if key in self.last}, **record}
        if self._foot is not None and (now - self._painted > PAINT_SECONDS or step == self._steps):
            self._painted = now
            with self._lock:
                self._foot.paint(self._bar())
        if step % self._log_every == 0 or step in (1, self._steps) or now - self._told[0] > PLAIN_SECONDS:
            self._tell_step(shown=self._foot is None)
        if "eval_loss" in record:
            told = _number(record["eval_loss"], "{:.4f} nats per token", "none (no valid token)")
            self.say(f"step {step}/{self._steps}  held-out loss {told}")
        if not self._forecast and (self._pace.made >= FORECAST_STEPS or (self.seconds > FORECAST_SECONDS)):
            self._forecast = True
            if (line := forecast(self._pace, self._steps - step)) is not None:
                self.header([line])

    def say(self, text: str, wrong: bool = False) -> None:
        """Says a line of its own, or several; above the bar where there is one. `wrong`: on standard error."""
        with self._lock:
            keep_said(self._run_dir, text)
            self._show(text, wrong)

    def header(self, lines: list[str]) -> None:
        """Says what the run is: a label and what it says in each line, which is wrapped on a terminal, below its beginning."""
        with self._lock:
            keep_said(self._run_dir, "\n".join(lines))
            self._show("\n".join(self._wrapped(lines)))

    def end(self, title: str, lines: list[str]) -> None:
        """Draws the box at the end of a run. Its lines are not wrapped: a terminal that breaks a command by itself still copies it
        whole."""
        name, rule = f"{self._run_dir.name}: {title}", "─" if holds(sys.stdout, "─") else "-"
        with self._lock:
            keep_said(self._run_dir, boxed(name, lines, FALLBACK_COLUMNS))
            self._show(boxed(name, lines, min(self._width, WIDEST_BOX), rule))

    def close(self) -> None:
        """Takes the bar away, and says a line of the step at which it stood."""
        with self._lock:
            if self._foot is not None:
                self._foot.paint([])
            if self.last["step"] != self._told[1]:
                self._tell_step(shown=True)

    def _tell_step(self, shown: bool) -> None:
        fields = plain_fields(self.last, self._pace, self._steps, self._workers)
        self._told = time.monotonic(), self.last["step"]
        with self._lock:
            keep_said(self._run_dir, "  ".join(fields))
            if shown:
                self._show(
                    "\n".join(flowed(fields, self._width, hanging=2)) if is_terminal(sys.stdout) else "  ".join(fields)
                )

    @property
    def _width(self) -> int:
        """Of a line: in its last column a terminal waits with the cursor, and is not to be left there."""
        return width_of(sys.stdout) - 1 - columns(self._prefix)

    def _bar(self) -> list[str]:
        return bar_lines(self.last, self._pace, self._steps, self._workers, self._width, holds(sys.stdout, "█"))

    def _wrapped(self, lines: list[str]) -> list[str]:
        if not is_terminal(sys.stdout):
            return lines
        return [part for line in lines for part in wrapped(line, self._width, hanging=LABEL)]

    def _show(self, text: str, wrong: bool = False) -> None:
        stream = sys.stderr if wrong and not same_file(sys.stdout, sys.stderr) else sys.stdout
        text = "\n".join(f"{self._prefix}{line}" for line in text.splitlines())
        if self._foot is not None and stream is sys.stdout:
            self._foot.say(text)
        else:
            print(f"{CLEAR * bool(self._prefix)}{text}", file=stream, flush=True)


LABEL = 11  # columns of the labels of the header


def labelled(label: str, text: str) -> str:
    """Returns a line of the header."""
    return f"{label:<{LABEL}}{text}"


def forecast(pace: Pace, steps: int) -> str | None:
    """Says how long `steps` more take; None where no step was timed."""
    left = pace.seconds_for(steps)
    return None if left is None else labelled("time", f"about {clock(left)} for {steps:,} more steps")


def plain_fields(record: dict[str, Any], pace: Pace, steps: int, workers: int) -> list[str]:
    """Returns the fields of a step, where nothing is painted."""
    return [
        f"step {record['step']}/{steps}", f"loss {_loss(record)}", _norm(record), f"lr {record['lr']:.2e}",
        *_speed(pace, workers), *_left(record, pace, steps),
    ]  # fmt: skip


def bar_lines(
    record: dict[str, Any], pace: Pace, steps: int, workers: int, width: int, blocks: bool = True
) -> list[str]:
    """Returns the step, a bar, losses and the time left; below them the speed, the memory, the rate and the norm: in as many lines
    as they need, and nothing of them is cut. `blocks`: whether the terminal has characters for the bar."""
    done = f"step {record['step']}/{steps}"
    fields = [f"{record['step'] / max(1, steps):4.0%}", f"loss {_loss(record)}"]
    if "eval_loss" in record:
        fields.append(f"held-out {_number(record['eval_loss'], '{:.4f}', 'none')}")
    fields += _left(record, pace, steps)
    memory = number(record.get("peak_memory_bytes"))
    below = [*_speed(pace, workers), *([byte_count(memory)] if memory else []), f"lr {record['lr']:.2e}", _norm(record)]
    upper = flowed([done, *fields], width)
    if (room := width - columns(upper[0]) - 2) >= LEAST_BAR:
        upper[0] = upper[0].replace(done, f"{done}  {_bar(record['step'] / max(1, steps), room, blocks)}", 1)
    return upper + flowed(below, width)


def _bar(share: float, width: int, blocks: bool) -> str:
    full = min(width, int(share * width))
    return ("█" if blocks else "#") * full + ("░" if blocks else ".") * (width - full)


def _speed(pace: Pace, workers: int) -> list[str]:
    speed, mfu = pace.mean("tokens_per_second"), pace.mean("mfu")
    told = [] if speed is None else [f"{speed:,.0f} tokens/s{' per worker' * (workers > 1)}"]
    return told if mfu is None else [*told, f"MFU {mfu:.1%}"]


def _left(record: dict[str, Any], pace: Pace, steps: int) -> list[str]:
    left = pace.seconds_for(steps - record["step"])
    return [] if left is None else [f"{clock(left)} left"]


def _norm(record: dict[str, Any]) -> str:
    return f"grad norm {_number(record['grad_norm'], '{:.3f}', 'overflow')}"


def _loss(record: dict[str, Any]) -> str:
    """A step that overflowed has none; nor has one without a valid token, whose gradient is zero."""
    return _number(record["loss"], "{:.4f}", "overflow" if record["grad_norm"] is None else "none (no valid token)")


def _number(value: float | None, form: str, absent: str) -> str:
    return absent if value is None else form.format(value)
