"""Whether what Accelerate runs is what was asked for: it leaves an engine out without a word."""

from typing import Any


class EngineUnfit(RuntimeError):
    """What runs is not the engine that was asked for. The message is one line."""


def require_kind(accelerator: Any, kind: str, name: str) -> None:
    """Raises EngineUnfit where an Accelerator runs another kind than `kind`, its own word for what is called `name`."""
    runs = str(accelerator.distributed_type).rpartition(".")[2]
    if runs != kind:
        raise EngineUnfit(
            f"parallel.backend=accelerate: Accelerate runs {runs} and not {name}, as where ACCELERATE_USE_CPU is set; unset what "
            "begins with ACCELERATE_"
        )
