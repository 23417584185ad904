"""What the parameters of a piece ask of a step's time: which of them multiply tokens, have gradients, and cross ranks, and as what.

    products    2 operations a token of each number forward, 2 for the gradient of what goes in, 2 for that of a weight that learns
    decoding    where a matrix is kept as codes: these read and its numbers written, in the forward and in the backward
    messages    what is frozen is gathered as it is kept, and has no gradient that could cross

Layers before the first that learns, where the embedding does not, have no backward.
"""

from dataclasses import dataclass, fields
from typing import Any

from rowwise.kernels.coded_rows import RowForm
from rowwise.kernels.spec import ParameterSpec, Specs, learning
from rowwise.trainer.adapters.config import Dora
from rowwise.trainer.adapters.specs import is_adapted, run_specs
from rowwise.trainer.config import TrainConfig
from rowwise.trainer.models.decoder import flops_of
from rowwise.trainer.models.specs import EMBEDDING
from rowwise.trainer.plan.loss import head_spec
from rowwise.trainer.plan.states import pieces_of, widths_of

_known: dict[Any, list["Load"]] = {}  # of layers that were asked for: a search asks again and again
_operations: dict[Any, tuple[float, float]] = {}


@dataclass(frozen=True)
class Load:
    """Of some parameters: `multiplying` numbers of layers, each of which multiplies every token, of which `weighed` learn; operations
    `norms` a micro-batch, of whole rows; bytes `decoded` a pass. Bytes `gathered` of all as they cross ranks, and `kept` as rows;
    numbers that are `learning`. `returns`: so many pieces of these have a backward."""

    multiplying: float = 0
    weighed: float = 0
    norms: float = 0
    decoded: float = 0
    gathered: float = 0
    kept: float = 0
    learning: float = 0
    returns: int = 0

    def __add__(self, other: "Load") -> "Load":
        return Load(*(getattr(self, one.name) + getattr(other, one.name) for one in fields(self)))


def loads_of(config: TrainConfig, layers: range) -> list[Load]:
    """Lists the loads of the pieces of a stage, in the order of `pieces_of`."""
    asked = layers, _asked(config)
    if asked not in _known:
        _known[asked] = _loads(config, layers)
    return _known[asked]


def _asked(config: TrainConfig) -> Any:
    """What loads depend on."""
    return repr((config.optim.assign, config.adapter)), config.model, widths_of(config)


def total_load(config: TrainConfig, layers: range) -> Load:
    """Adds up the loads of a stage."""
    return sum(loads_of(config, layers), Load())


def operations_of(config: TrainConfig, tokens: int, pairs: float) -> float:
    """Counts the operations that a run needs for so many tokens, as `flops_of` does where all of a model learns."""
    asked = _asked(config)
    if asked not in _operations:
        _operations[asked] = _operations_of_one(config)
    of_token, of_pair = _operations[asked]
    return of_token * tokens + of_pair * pairs


def _operations_of_one(config: TrainConfig) -> tuple[float, float]:
    """Operations of a token, and beside them of a pair of tokens one of which sees the other."""
    model, specs, silent = config.model, run_specs(config), _silent(config)
    multiply = "hidden", head_spec(config).role
    frozen = sum(spec.shape.numel() for spec in specs.values() if spec.frozen and spec.role in multiply)
    added = sum(spec.shape.numel() for name, spec in specs.items() if _adds_products(name, spec))
    unseen = sum(load.multiplying for load in loads_of(config, range(model.layers))[1 : 1 + silent])
    looked = flops_of(model, 0, 1) * (1 - 2 / 3 * silent / model.layers)
    return flops_of(model, 1, 0) - 2 * frozen + 6 * added - 2 * unseen, looked


def _adds_products(name: str, spec: ParameterSpec) -> bool:
    """Whether a parameter is a matrix of an adapter: AdaLoRA's E is a number a row."""
    return spec.role == "adapter" and not name.endswith("lora_e")


def _silent(config: TrainConfig) -> int:
    """Counts the layers that the backward never comes to."""
    if not run_specs(config)[EMBEDDING].frozen:
        return 0
    layers = range(config.model.layers)
    pieces = pieces_of(config, layers)[1:-1]
    return next((n for n, piece in zip(layers, pieces, strict=True) if learning(piece)), len(layers))


def _loads(config: TrainConfig, layers: range) -> list[Load]:
    pieces = pieces_of(config, layers)
    first = layers.start == 0
    silent, begins = _silent(config), layers.start - first
    return [_load(config, piece, begins + n >= silent) for n, piece in enumerate(pieces)]


def _load(config: TrainConfig, piece: Specs, returns: bool) -> Load:
    return sum((_of_one(config, name, spec) for name, spec in piece.items()), Load(returns=int(returns)))


def _of_one(config: TrainConfig, name: str, spec: ParameterSpec) -> Load:
    adapter, widths, numbers = config.adapter, widths_of(config), spec.shape.numel()
    plain, learns = spec.kept is None, not spec.frozen
    multiplies = spec.role == "hidden" or _adds_products(name, spec)
    times, norms = 1, 0
    if isinstance(adapter, Dora) and is_adapted(name, spec, adapter):
        times, norms = 1 + (adapter.dropout > 0), 2 * numbers * adapter.rank
    rows = spec.shape[0] * spec.row_bytes(widths.parameter)
    return Load(
        multiplying=times * numbers * multiplies,
        weighed=numbers * multiplies * learns,
        norms=norms,
        decoded=(rows + numbers * widths.compute) * isinstance(spec.kept, RowForm),
        gathered=numbers * widths.compute if plain else rows,
        kept=rows,
        learning=numbers * learns,
    )
