"""What manifest.json holds, as types that a manifest is held against when it is read."""

from typing import Any, NotRequired

from pydantic import ConfigDict
from typing_extensions import TypedDict

VERSION = 1  # of this form; what was written before it had one is read as this


class FileFacts(TypedDict):
    bytes: int
    sha256: str


class ScaleForm(TypedDict):
    scale: float
    good_steps: int
    skipped: int


class RollbackForm(TypedDict):
    """What a manifest keeps of a `spike.Rollback`."""

    step: int
    to: int
    first: int
    after: int
    score: float | None


class SpikesForm(TypedDict):
    """What a manifest keeps of `spike.Spikes`."""

    losses: list[float]
    norms: list[float]
    skipped: int
    rollbacks: list[RollbackForm]


class StateForm(TypedDict):
    """What a manifest keeps of a `state.TrainState`."""

    step: int
    position: int
    tokens: int
    updates: int
    loss_scale: ScaleForm
    spikes: NotRequired[SpikesForm]


class ConfigForm(TypedDict):
    """What of a configuration is read again. Other releases may have other keys in it."""

    __pydantic_config__ = ConfigDict(extra="allow")  # type: ignore[misc]

    resume: str
    steps: int
    batch: dict[str, Any]
    data: dict[str, Any]
    model: dict[str, Any]
    optim: dict[str, Any]
    precision: dict[str, Any]
    schedule: dict[str, Any]


class RecordsForm(TypedDict):
    """What a manifest keeps of `metrics.Recorded`."""

    began: int | None
    sha256: str | None


class ClockForm(TypedDict):
    """What a manifest keeps of a `clock.Clock`, where a time says when the run evaluates."""

    evaluated_seconds_ago: float


class PrintsForm(TypedDict):
    """Fingerprints of the data. `tokenizer`: of the one that made the text into tokens, where there was one; `code`: of a model of
    one's own."""

    config: str
    data: str
    tokenizer: NotRequired[str]
    code: NotRequired[str]


class Manifest(TypedDict):
    """What manifest.json holds beside its own checksum; nothing else. Earlier releases had not all of it."""

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True)  # type: ignore[misc]

    version: NotRequired[int]
    step: int
    tokens: int
    state: StateForm
    precision: str
    model: dict[str, Any]
    states: NotRequired[dict[str, Any]]
    data: dict[str, Any]
    fingerprint: PrintsForm
    layout: dict[str, Any]
    config: ConfigForm
    records: NotRequired[RecordsForm]
    clock: NotRequired[ClockForm]
    files: dict[str, FileFacts]
