"""What a person sees of a run: a progress bar on a terminal, plain lines elsewhere."""

import sys
from typing import Any

from tqdm import tqdm


class Console:
    """Shows the steps of a run on stderr. Only rank 0 has one."""

    def __init__(self, step: int, steps: int, log_every: int):
        self._steps, self._log_every = steps, log_every
        self._bar = tqdm(total=steps, initial=step, unit="step", dynamic_ncols=True) if sys.stderr.isatty() else None

    def step(self, record: dict[str, Any]) -> None:
        """One record: the bar moves on, or every `log_every` steps a line."""
        if self._bar is not None:
            self._bar.set_postfix_str(
                f"loss {_loss(record)}, {record['tokens_per_second']:,.0f} tokens/s per worker",
                refresh=False,
            )
            self._bar.update()
        elif record["step"] % self._log_every == 0 or record["step"] in (1, self._steps):
            left = (self._steps - record["step"]) * record["step_seconds"]
            self.say(
                f"step {record['step']}/{self._steps}  loss {_loss(record)}  "
                f"grad norm {_number(record['grad_norm'], '{:.3f}', 'overflow')}  "
                f"lr {record['lr']:.2e}  {record['tokens_per_second']:,.0f} tokens/s per worker  {clock(left)} left"
            )
        if "eval_loss" in record:
            told = _number(record["eval_loss"], "{:.4f} nats per token", "none (no valid token)")
            self.say(f"step {record['step']}/{self._steps}  held-out loss {told}")

    def say(self, text: str) -> None:
        """A line of its own, above the bar where there is one."""
        if self._bar is not None:
            self._bar.write(text, file=sys.stderr)
        else:
            print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def _loss(record: dict[str, Any]) -> str:
    """A step that overflowed has none; nor has one without a valid token, whose gradient is zero."""
    return _number(record["loss"], "{:.4f}", "overflow" if record["grad_norm"] is None else "none (no valid token)")


def _number(value: float | None, form: str, absent: str) -> str:
    return absent if value is None else form.format(value)


def clock(seconds: float) -> str:
    """Such as 3:07 or 1:02:07."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
