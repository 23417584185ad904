"""What a rank keeps of its layers' parameters: which are gathered as one, its rows of them, of their states and of their masks."""

from dataclasses import dataclass, replace
from typing import Any

import torch

from rowwise.kernels.spec import ParameterSpec, Specs, learning
from rowwise.optim.average import average_dtype
from rowwise.optim.build import new_rule, rank_of, rule_name
from rowwise.optim.rule import Rule
from rowwise.optim.sparse.config import SET, ST3, NoSparsity, PDPBase, sparse_layers
from rowwise.optim.sparse.masks import packed_columns
from rowwise.parallel.config import ParallelConfig
from rowwise.parallel.precision import Bf16, Fp16, Fp64, compute_dtype
from rowwise.parallel.reduce import BITS
from rowwise.parallel.replicate import in_buckets
from rowwise.parallel.row_file import BLOCK
from rowwise.parallel.row_messages import RowMessages
from rowwise.trainer.adapters.specs import run_parts, run_specs
from rowwise.trainer.config import TrainConfig
from rowwise.trainer.plan.codes import message_bytes

_known: dict[Any, int] = {}  # bytes of states that were counted


@dataclass(frozen=True)
class Widths:
    """Bytes of a number of a parameter as it is kept, as it computes, and as ranks sum its gradient; of one that is neither
    parameter nor activation (`wide`)."""

    parameter: int
    compute: int
    reduce: int
    wide: int

    @property
    def mixed(self) -> bool:
        """Says whether parameters compute in a copy."""
        return self.parameter != self.compute


def widths_of(config: TrainConfig) -> Widths:
    """Reads the precision of a run."""
    kept = 8 if isinstance(config.precision, Fp64) else 4
    wide = kept
    if config.optim.param_dtype == "bf16":
        kept = 2
    if isinstance(config.precision, Bf16 | Fp16):
        reduce = 2 if isinstance(config.precision, Bf16) and config.precision.reduce == "bf16" else 4
        return Widths(kept, 2, reduce, wide)
    return Widths(kept, kept, kept, wide)


@dataclass(frozen=True)
class Place:
    """Where a rank is: on the pipeline, and among the ranks that hold the other rows (`shard` of `shards`), of which there are
    `replicas` sets."""

    pipeline: int
    shard: int
    shards: int
    replicas: int


def place_of(rank: int, parallel: ParallelConfig) -> Place:
    """Finds the place of a rank; `parallel` must be resolved."""
    a_stage = parallel.data_degree * parallel.ring * parallel.ulysses
    shards = parallel.state_degree if parallel.zero else 1
    return Place(rank // a_stage, rank % shards, shards, a_stage // shards)


def rows_of(rows: int, place: Place) -> int:
    """Counts the rows of a matrix that a rank has: all have as many, but for the last ones."""
    each = -(-rows // place.shards)
    return max(0, min(each, rows - each * place.shard))


def padded_rows(spec: ParameterSpec, place: Place) -> int:
    """Counts the rows of a parameter that FSDP2 has on every rank."""
    return -(-spec.shape[0] // place.shards)


@dataclass(frozen=True)
class Group:
    """Parameters that are gathered and reduced as one. `pieces`: the first and the last of the stage that they are of; `tensors`:
    the piece, the name and the numbers of each; `padded`: the numbers of all, with rows made up to as many on each rank, and `shard`
    a rank's. `root`: they are what all others leave; `kept`: they stay gathered from the forward to the backward; `late`: nothing
    tells when their backward is over, so that they are reduced when all is; `coded`: a rank's bytes where they are gathered as
    8-bit codes, else 0; `sums`: where gradients cross as codes, of each level the bytes that go and come, and of the sums that are
    there meanwhile; `frozen`: those without gradients, and `learning`: `padded` and `shard` of the others (None: of all); `as_kept`:
    of what computes as it is kept, whatever others do, a rank's numbers and their bytes."""

    pieces: tuple[int, int]
    tensors: tuple[tuple[int, str, int], ...]
    padded: int
    shard: int
    root: bool
    kept: bool
    late: bool
    coded: int = 0
    sums: tuple[tuple[int, int], ...] = ()
    frozen: frozenset[str] = frozenset()
    learning: tuple[int, int] | None = None
    as_kept: tuple[int, int] = (0, 0)

    def shard_bytes(self, width: int) -> int:
        """Counts the bytes of a rank's rows, of `width` bytes a number but for what is kept otherwise."""
        numbers, size = self.as_kept
        return (self.shard - numbers) * width + size

    @property
    def reduced(self) -> tuple[int, int]:
        """The numbers of what has gradients, made up to as many rows on each rank, and a rank's."""
        return (self.padded, self.shard) if self.learning is None else self.learning


def pieces_of(config: TrainConfig, layers: range) -> list[Specs]:
    """Lists the parameters of each piece of a stage: the embedding where it has one, its layers, the norm and the head. A tied matrix
    is the embedding's: its gradient is complete when that is."""
    parts, rest = run_parts(config, layers)
    if not rest:
        return parts
    untied = replace(config, model=replace(config.model, tie_embeddings=False))
    before = run_parts(untied, range(1))[0][0]
    return [before, *parts, {name: spec for name, spec in rest.items() if name not in before}]


def groups_of(config: TrainConfig, layers: range, place: Place) -> list[Group]:
    """Lists which parameters of these layers FSDP2 gathers as one (see `parallel.shard.shard_model`), in forward order, the root's
    first."""
    groups = _merged(config, layers, place)
    parallel = config.parallel
    if parallel.quantize_gather == parallel.quantize_reduce == "none":
        return groups
    shapes = {name: spec.shape for piece in pieces_of(config, layers) for name, spec in piece.items()}
    rows = {name: torch.Size((-(-shape[0] // place.shards), *shape[1:])) for name, shape in shapes.items()}

    def as_messages(group: Group) -> Group:
        mine = [rows[name] for _, name, _ in group.tensors]
        sent = [rows[name] for _, name, _ in group.tensors if name not in group.frozen]
        coded = RowMessages(mine, compute_dtype(config.precision), 8).bytes if parallel.quantize_gather != "none" else 0
        summed = parallel.quantize_reduce != "none" and bool(sent)
        return replace(group, coded=coded, sums=_sums(config, sent, place) if summed else ())

    return [as_messages(group) for group in groups]


def _sums(config: TrainConfig, shapes: list[torch.Size], place: Place) -> tuple[tuple[int, int], ...]:
    """Of each level on which gradients of these shapes are summed in codes (`parallel.reduce`): the bytes that go and come, and those
    of its float32 sums, beside the ones of the level before."""
    inner, bits = config.parallel.inner_shard, BITS[config.parallel.quantize_reduce]
    dtype = torch.bfloat16 if widths_of(config).reduce == 2 else torch.float32
    form, again = RowMessages(shapes, dtype, bits), RowMessages(shapes, torch.float32, bits)
    coding, decoding = message_bytes(shapes, bits)
    one = 4 * form.numbers

    def level(message: int, before: int, sums: int) -> tuple[int, int]:
        """Of so many bytes each way: what is coded beside the sums of the level before, or decoded beside its own too."""
        return 2 * message, max(before + sums + decoding, before + coding - message)

    if not inner:
        return (level(place.shards * form.bytes, 0, one),)
    outer = place.shards // inner
    return level(place.shards * form.bytes, 0, outer * one), level(outer * again.bytes, outer * one, one)


def _merged(config: TrainConfig, layers: range, place: Place) -> list[Group]:
    pieces, (parts, rest) = pieces_of(config, layers), run_parts(config, layers)
    zero, first, width = config.parallel.zero, layers.start == 0, widths_of(config).parameter
    placed = list(enumerate(parts, 1 if rest else 0))

    def bytes_of(one: tuple[int, Specs]) -> int:
        return sum(spec.shape[0] * spec.row_bytes(width) for spec in one[1].values())

    last = len(placed) if rest else len(placed) - 1
    merged = [[one] for one in placed] if zero >= 2 else in_buckets(placed, bytes_of)
    late = {at for at in range(last + 1) if first and not any(map(learning, pieces[:at]))}  # given what has no gradient
    of_rest = [(0, pieces[0]), (last, pieces[-1])] if rest else []
    if len(merged) == 1:
        return [_group(merged[0] + of_rest, (0, last), place, root=True, stays=True, late=first)]
    root = [_group(of_rest, (0, last), place, root=True, stays=True, late=True)] if rest else []
    return root + [
        _group(some, (some[0][0], some[-1][0]), place, False, zero < 3 or some is merged[-1], some[0][0] in late)
        for some in merged
    ]


def _group(
    parts: list[tuple[int, Specs]], pieces: tuple[int, int], place: Place, root: bool, stays: bool, late: bool
) -> Group:
    specs = {name: spec for _, part in parts for name, spec in part.items()}

    def rows(specs: Specs) -> int:
        return sum(padded_rows(spec, place) * spec.shape[1:].numel() for spec in specs.values())

    shard, frozen, learns = rows(specs), frozenset(specs.keys() - learning(specs).keys()), rows(learning(specs))
    kept = {name: spec for name, spec in specs.items() if spec.kept is not None}
    as_kept = rows(kept), sum(padded_rows(spec, place) * spec.row_bytes(0) for spec in kept.values())
    tensors = tuple((piece, name, spec.shape.numel()) for piece, part in parts for name, spec in part.items())
    reduced = (learns * place.shards, learns) if frozen else None
    return Group(pieces, tensors, shard * place.shards, shard, root, stays, late, 0, (), frozen, reduced, as_kept)


def owned(config: TrainConfig, layers: range) -> Specs:
    """Lists the parameters of these layers whose optimizer states are kept there: what learns, but a tied copy."""
    parts, rest = run_parts(config, layers)
    held = {name: spec for part in [*parts, rest] for name, spec in part.items()}
    known = run_specs(config)
    return {name: spec for name, spec in learning(held).items() if name in known}


def optimizer_bytes(config: TrainConfig, layers: range, place: Place) -> int:
    """Counts the states of a rank's rows, by asking each rule what it keeps of a parameter of that shape; remembers it, for a search
    asks again and again."""
    asked = repr((config.optim, config.adapter)), config.model, layers, place, widths_of(config).wide
    if asked not in _known:
        _known[asked] = _count_states(config, layers, place)
    return _known[asked]


def _count_states(config: TrainConfig, layers: range, place: Place) -> int:
    dtype, rank = wide_of(config), rank_of(config.optim, run_specs(config))
    found: dict[tuple[str, torch.Size, bool], int] = {}
    total = 0
    for name, spec in owned(config, layers).items():
        key = rule_name(name, spec, config.optim), spec.shape, spec.batched
        if key not in found:
            rule = new_rule(key[0], config.optim, rank)
            found[key] = state_bytes(rule, spec, dtype, place)
        total += found[key]
    return total


def state_bytes(rule: Rule, spec: ParameterSpec, dtype: torch.dtype, place: Place) -> int:
    """Counts the states that a rule keeps of a rank's rows of a parameter, in `dtype` where not in fewer bits."""
    state = rule.new_state(torch.empty(spec.matrix, dtype=dtype, device="meta"))
    if spec.batched:
        return rows_of(spec.shape[0], place) * sum(t.nbytes for t in state.values())
    whole = unsplit(rule, dtype)
    return sum(
        t.nbytes if key in whole else rows_of(t.size(0), place) * t[0].numel() * t.itemsize for key, t in state.items()
    )


def wide_of(config: TrainConfig) -> torch.dtype:
    """Gives the dtype of what is neither parameter nor activation."""
    return torch.float64 if widths_of(config).wide == 8 else torch.float32


def local_numbers(spec: ParameterSpec, place: Place) -> int:
    """Counts the numbers of a rank's rows of a parameter."""
    return rows_of(spec.shape[0], place) * spec.shape[1:].numel()


def unsplit(rule: Rule, dtype: torch.dtype) -> set[str]:
    """Finds which states of a rule are the same on every rank: those that do not have the rows of the matrix, here one that is
    not wide, and so is never turned."""
    rows = 8209  # a prime: nothing else of the state has that size
    state = rule.new_state(torch.empty(rows, 64, dtype=dtype, device="meta"))
    return {key for key, t in state.items() if t.size(0) != rows}


def parameter_bytes(config: TrainConfig, layers: range, place: Place, held_by_fsdp: bool) -> int:
    """Counts a rank's rows; FSDP2 makes them up to as many on each rank. On the host each parameter has room to begin where a file's
    blocks would."""
    parts, rest = run_parts(config, layers)
    width = widths_of(config).parameter
    total = BLOCK * (config.memory.offload_params == "cpu") * sum(map(len, (*parts, rest)))
    for part in [*parts, rest]:
        for spec in part.values():
            rows = padded_rows(spec, place) if held_by_fsdp else rows_of(spec.shape[0], place)
            total += rows * spec.row_bytes(width)
    return total


def mask_bytes(config: TrainConfig, layers: range, place: Place) -> int:
    """Counts the masks of a rank's rows (the one in use, that of the first count and that of the last), and what a method keeps
    beside them: where each weight has ever been, or the dense weights."""
    choice = config.sparsity
    if isinstance(choice, NoSparsity):
        return 0
    masks = 4 if isinstance(choice, SET) and choice.growth == "unfired" else 3
    dense = widths_of(config).parameter if isinstance(choice, ST3 | PDPBase) else 0
    held = owned(config, layers)
    shapes = [held[name].shape for name in sparse_layers(choice, run_specs(config)) if name in held]
    return sum(rows_of(m, place) * (masks * packed_columns(n) + dense * n) for m, n in shapes)


def average_bytes(config: TrainConfig, layers: range, place: Place) -> int:
    """Counts the average of a rank's rows."""
    if config.average.ema is None:
        return 0
    width = average_dtype(config.average, wide_of(config)).itemsize
    return width * sum(local_numbers(spec, place) for spec in owned(config, layers).values())


def numbers_of(specs: Specs) -> int:
    """Counts the numbers of parameters."""
    return sum(spec.shape.numel() for spec in specs.values())
