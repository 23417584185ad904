"""A run on this machine, as the agent that starts its workers sees it. Needs no torch."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rowwise.launch.rendezvous import Rendezvous
from rowwise.trainer.starts import Report


@dataclass(frozen=True)
class Job:
    """A run on this machine: its overrides, its folder, its last step (None: its workers find it), its workers.

    `name`: jobs of the same wait until the other has left the folder; `log_dir`: what each worker says goes to files there,
    and not to this one's streams; `timeout_seconds`: how long other machines are waited for; `gpus`: what this machine has;
    `report`: when the run leaves one; `command`: what was typed, where the overrides are more than that (files were read);
    `tree`: what the overrides compose to, where that is known.
    """

    overrides: tuple[str, ...]
    run_dir: Path
    steps: int | None
    nproc: int
    rendezvous: Rendezvous | None = None
    name: str | None = None
    timeout_seconds: float = 1800
    max_restarts: int = 0
    log_dir: Path | None = None
    gpus: int = 0
    report: Report = "never"
    command: str | None = None
    tree: dict[str, Any] | None = None

    @property
    def arguments(self) -> list[str]:
        """The arguments of each worker's `rowwise.launch.train`."""
        return ["--agent", *([] if self.command is None else ["--command", self.command]), *self.overrides]
