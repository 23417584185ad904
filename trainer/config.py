"""TrainConfig, composed from the dataclasses of the rooms, and what makes one of a plain tree and back."""

import copy
import functools
import json
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError

from rowwise.conf.option import Apart, Ask, MayChange
from rowwise.conf.refusal import Refusal, Refusals
from rowwise.optim.average import AverageConfig
from rowwise.optim.build import OptimConfig
from rowwise.optim.lengths import RunLength
from rowwise.optim.lr_schedules import ScheduleConfig
from rowwise.optim.rates import SHARES, rate_of_size
from rowwise.optim.sparse.config import SparsityConfig
from rowwise.parallel.activations.config import MemoryConfig
from rowwise.parallel.config import ParallelConfig
from rowwise.parallel.precision import PrecisionConfig
from rowwise.trainer.adapters.config import AdapterConfig
from rowwise.trainer.data.batches import BatchConfig
from rowwise.trainer.data.config import DataConfig
from rowwise.trainer.evaluate import EvalConfig
from rowwise.trainer.files import full_path
from rowwise.trainer.keys import as_lists, path_to, refuse_control_characters, told_of_type, unknown_key
from rowwise.trainer.manifest import CheckpointConfig
from rowwise.trainer.models.config import ModelConfig
from rowwise.trainer.models.decoder import check_model, parameter_count
from rowwise.trainer.run_length import MOST_STEPS, settle
from rowwise.trainer.sample import SampleConfig
from rowwise.trainer.spike import OnSpike, SpikeConfig
from rowwise.trainer.starts import Report
from rowwise.trainer.tracker import TrackerConfig
from rowwise.trainer.watching import LogConfig, ProfileConfig

_BY_NAME = Field(discriminator="name")


@dataclass(frozen=True)
class TrainConfig:
    """A run. Every key is read by the room whose dataclass it stands in.

    `name`: of the run; the model's where nothing is said. `run_dir`: the folder that it leaves. `nproc`: workers a machine,
    for what starts them (`rowwise train`, a sweep); null: one a GPU, or one; more than a CPU's cores take turns, with a
    warning. `seed`: of the initial parameters, the order of the data and all else that is drawn. `steps`: how long the run
    is, or one of the next two in its place. `tokens`: all that the run reads, such as 2e9 or 2B, as many whole steps as
    read no more; null where steps were asked for. `epochs`: times that it reads the data, likewise. `clip_norm`: the
    largest global gradient norm; 0: off. `resume`: `auto` goes on with the newest checkpoint of the run's folder, `never`
    does not, and the path of a run or checkpoint begins there (then data and seed may differ); that of a run alone brings
    its whole configuration. `compile`: torch.compile each block. `log_every`: how often a line is said where there is no
    terminal (an interval). `report`: when a run that has ended leaves its report.html; a sweep's trials only where they
    failed, unless it is given. `peak_flops`: dense 16-bit FLOP/s of a device, what `mfu` is a share of; null: known by the
    GPU's name. `on_spike`: what is done about a loss or gradient norm far above those before: `record` it, `skip` the
    update, or `rollback` to the newest checkpoint of `checkpoint.every` and past the data since (before the first, it
    skips; with `optim.in_backward` it records); the same on every rank and layout."""

    name: Apart[str]
    run_dir: Apart[str]
    nproc: Apart[int | None]
    seed: Ask[int]
    steps: MayChange[int]
    tokens: MayChange[int | None]
    epochs: MayChange[float | None]
    clip_norm: MayChange[float]
    resume: Apart[str]
    compile: MayChange[bool]
    log_every: MayChange[int | float | str]
    report: Apart[Report]
    peak_flops: MayChange[float | None]
    on_spike: MayChange[OnSpike]
    batch: BatchConfig
    spike: SpikeConfig
    log: LogConfig
    profile: ProfileConfig
    eval: EvalConfig
    sample: SampleConfig
    model: ModelConfig
    data: Annotated[DataConfig, _BY_NAME]
    optim: Annotated[OptimConfig, _BY_NAME]
    schedule: Annotated[ScheduleConfig, _BY_NAME]
    parallel: ParallelConfig
    precision: Annotated[PrecisionConfig, _BY_NAME]
    memory: MemoryConfig
    sparsity: Annotated[SparsityConfig, _BY_NAME]
    adapter: Annotated[AdapterConfig, _BY_NAME]
    average: AverageConfig
    checkpoint: CheckpointConfig
    tracker: Annotated[TrackerConfig, _BY_NAME]

    @property
    def known_steps(self) -> int | None:
        """The steps, None where they were asked in epochs and the data is not opened yet: it is checked as the longest run there
        is."""
        return None if self.epochs is not None and self.steps == MOST_STEPS else self.steps

    @property
    def length(self) -> RunLength:
        """What shares of the run and intervals in tokens are of."""
        return RunLength(self.steps, self.batch.global_size * self.batch.seq_len)

    @property
    def micro_batches(self) -> int:
        """The micro-batches of a rank in a step. The degrees of the mesh must be resolved."""
        return self.batch.global_size // self.batch.micro_size // self.parallel.data_degree


MOST_WORKERS = 1024  # of a machine
LENGTH: Refusals = (
    Refusal(
        ("steps",),
        lambda run: not 1 <= run.steps <= MOST_STEPS,
        f"steps={{steps}}: a run has at least 1 step, and at most {MOST_STEPS:,}",
    ),
    Refusal(
        ("clip_norm",),
        lambda run: run.clip_norm < 0,
        "clip_norm={clip_norm}: the largest gradient norm, or 0 for off",
    ),
    Refusal(
        ("nproc",),
        lambda run: run.nproc is not None and not 1 <= run.nproc <= MOST_WORKERS,
        f"nproc={{nproc}}: a machine has 1 to {MOST_WORKERS} workers; null is one a GPU, or one",
    ),
)
LINES: Refusals = (
    Refusal(("log_every",), lambda run: not run.log_every, "log_every=0: it is at least 1 step"),
    Refusal(
        ("peak_flops",),
        lambda run: run.peak_flops is not None and run.peak_flops <= 0,
        "peak_flops={peak_flops}: FLOP/s of one device, 989e12 say; null: by its name",
    ),
)
FOLDER: Refusals = (
    Refusal(
        ("run_dir",), lambda run: not run.run_dir, "run_dir is empty: give the folder of the run, such as runs/NAME"
    ),
)

_ADAPTER = TypeAdapter(TrainConfig)
_SCHEDULES: TypeAdapter[ScheduleConfig] = TypeAdapter(Annotated[ScheduleConfig, _BY_NAME])


def config_from_tree(tree: dict[str, Any]) -> TrainConfig:
    """Returns the typed configuration of a composed tree, strictly, with the learning rate that the model's size asks for where
    `optim.lr` is null, the steps that `tokens` come to (those of `epochs` once the data is opened), and the home folder for the
    `~` of `run_dir`. Raises ValueError for an unknown key, a missing one or a wrong type, and names it; and for a string of
    more than a line."""
    refuse_control_characters(tree)
    tree = settle(tree)
    by_size = isinstance(tree.get("optim"), dict) and tree["optim"].get("lr", 0) is None
    if by_size:
        tree = {**tree, "optim": {**tree["optim"], "lr": 1.0}}
    try:
        # As JSON, because strict validation of Python objects would ask for instances instead of trees.
        config = _validated(tree)
    except ValidationError as error:
        raise ValueError(_explain(error, tree)) from None
    _refuse_unknown(tree, asdict(config), "")
    if config.run_dir.startswith("~"):
        config = replace(config, run_dir=str(full_path(config.run_dir, "run_dir")))
    return _with_rate_of_size(config) if by_size else config


def _with_rate_of_size(config: TrainConfig) -> TrainConfig:
    if config.optim.name not in SHARES:
        raise ValueError(
            f"optim.lr=null with optim={config.optim.name}: its rate does not follow from the model's size; give a number"
        )
    check_model(config.model)
    parameters, _ = parameter_count(config.model)
    return replace(config, optim=replace(config.optim, lr=rate_of_size(config.optim.name, parameters)))


def tree_of(config: TrainConfig) -> dict[str, Any]:
    """Returns the plain tree of a configuration: what `config_from_tree` reads back."""
    return as_lists(asdict(config)) | {"steps": config.known_steps}


def schedule_of(tree: dict[str, Any]) -> ScheduleConfig:
    """Returns the schedule of a plain tree, of this release or an earlier one. Raises ValueError."""
    return _SCHEDULES.validate_python(tree)


def _refuse_unknown(tree: dict[str, Any], known: dict[str, Any], path: str) -> None:
    for key, value in tree.items():
        if key not in known:
            raise ValueError(unknown_key(f"{path}{key}", list(known)))
        pairs = [(value, known[key], f"{path}{key}.")]
        if isinstance(value, list) and isinstance(known[key], list):
            pairs = [(v, k, f"{path}{key}[{i}].") for i, (v, k) in enumerate(zip(value, known[key], strict=True))]
        for inner, inner_known, inner_path in pairs:
            if isinstance(inner, dict) and isinstance(inner_known, dict):
                _refuse_unknown(inner, inner_known, inner_path)


def _validated(tree: dict[str, Any]) -> TrainConfig:
    """As the types have it: 10.0 for a whole number is 10, and a name of digits is text."""
    try:
        return _ADAPTER.validate_json(json.dumps(tree), strict=True)
    except ValidationError as error:
        meant = copy.deepcopy(tree)
        for one in error.errors(include_url=False):
            if not (keys := path_to(one, tree)):
                continue
            *path, last = keys
            node: Any = functools.reduce(lambda inner, part: inner[part], path, meant)
            given = one["input"]
            if one["type"] == "int_type" and isinstance(given, float) and given.is_integer():
                node[last] = int(given)
            elif one["type"] == "string_type" and type(given) is int:
                node[last] = str(given)
        return _ADAPTER.validate_json(json.dumps(meant), strict=True)


def _explain(error: ValidationError, tree: dict[str, Any]) -> str:
    first, *others = error.errors(include_url=False)
    path = ".".join(map(str, path_to(first, tree)))
    if first["type"] == "union_tag_invalid":
        key = "kind" if path == "model.rope_scaling" else "name"
        return f"{path}.{key}={first['ctx']['tag']!r}: possible are {first['ctx']['expected_tags']}"
    if first["type"] == "union_tag_not_found" and path == "model.rope_scaling":
        return f"{path}={first['input']!r}: give a table, such as {{kind: linear, factor: 4.0}}, or null"
    if first["type"] in ("missing", "union_tag_not_found"):
        return f"{path}{'' if first['type'] == 'missing' else '.name'} is missing"
    number = any(one["type"] == "float_type" and path_to(one, tree) == path_to(first, tree) for one in others)
    return f"{path}={first['input']!r}: {told_of_type(first)}{', or a number' * (first['type'] == 'literal_error' and number)}"
