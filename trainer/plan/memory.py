"""What a rank of a run holds, by category, before anything of it is started.

Ranks that hold the same part of the model differ in their rows alone, and the first of them has the most; so a run holds at most what
the first rank of each place of the pipeline does.
"""

from dataclasses import dataclass

from rowwise.parallel.activations.config import is_folder
from rowwise.trainer.activations import tokens_of
from rowwise.trainer.adapters.specs import run_specs
from rowwise.trainer.config import TrainConfig
from rowwise.trainer.models.specs import EMBEDDING
from rowwise.trainer.plan.away import Keeping
from rowwise.trainer.plan.beside import backlog_bytes, read_bytes, scaling_bytes, step_bytes, ways_of, where
from rowwise.trainer.plan.ledger import FILE, HOST, Ledger
from rowwise.trainer.plan.sharded import Sharded
from rowwise.trainer.plan.states import (
    Place,
    average_bytes,
    groups_of,
    mask_bytes,
    optimizer_bytes,
    owned,
    parameter_bytes,
    pieces_of,
    place_of,
    rows_of,
    widths_of,
)
from rowwise.trainer.plan.step import Crossing, PipelineRank, Stage, walk_whole
from rowwise.trainer.plan.triplets import choice_bytes, importance_bytes, penalty_bytes
from rowwise.trainer.plan.update import NONE, Updates, portions_of, update_bytes, update_bytes_of_each
from rowwise.trainer.plan.weights import Replicated, Weights
from rowwise.trainer.plan.works import works_of
from rowwise.trainer.stages import Plan, gathering


@dataclass(frozen=True)
class Memory:
    """Bytes of a rank: the most of each category, in a step; the most of all together on the device, what it is made of, and when that
    is."""

    rank: int
    peaks: dict[str, int]
    most: int
    then: dict[str, int]
    moment: str

    @property
    def host(self) -> int:
        """Counts the bytes of the host's memory that are taken beside the device, at most."""
        return self.peaks[HOST]

    @property
    def files(self) -> int:
        """Counts the bytes of files that rows wait in."""
        return self.peaks[FILE]


def worst(memories: list[Memory]) -> Memory:
    """Finds the rank that holds the most."""
    return max(memories, key=lambda memory: memory.most)


def memory_of(config: TrainConfig, rank: int, gpu: bool, plan: Plan | None) -> Memory:
    """Counts what one rank holds."""
    place, ledger = place_of(rank, config.parallel), Ledger()
    if plan is None:
        stages = {0: range(config.model.layers)}
    else:
        stages = {stage: plan.layers[stage] for stage in plan.schedule.stages_of(place.pipeline)}
    widths = widths_of(config)
    kept = config.memory
    copied = config.precision.name in ("bf16", "fp16") or config.parallel.quantize_gather != "none"
    sharded = place.shards > 1 or copied or kept.offload_params != "none"
    ledger.at = "the start"
    for layers in stages.values():
        ledger.take(where("parameters", kept.offload_params, gpu), parameter_bytes(config, layers, place, sharded))
        ledger.take(where("optimizer", kept.offload_states, gpu), optimizer_bytes(config, layers, place))
        ledger.take("optimizer", importance_bytes(config, layers, place))
        ledger.take("masks", mask_bytes(config, layers, place))
        ledger.take(place_of_average(config, gpu), average_bytes(config, layers, place))
    ledger.take(HOST, read_bytes(config, (g for layers in stages.values() for g in groups_of(config, layers, place))))
    entries = [entry for layers in stages.values() for entry in owned(config, layers).items()]
    ledger.take(where("gradients", "cpu", gpu), backlog_bytes(config, entries, place))
    if config.optim.in_backward:
        alike = {spec.shape: (name, spec) for name, spec in entries}.values()
        each = (step_bytes(config, portions_of([entry], config, place), gpu) for entry in alike)
        ledger.take(HOST, max(each, default=0))
    keeping = Keeping(ledger, is_folder(kept.offload_activations), gpu or kept.offload_activations != "cpu")
    walked = {}
    for stage, layers in stages.items():
        split = plan is not None and any(
            a.kind == "I" and a.stage == stage for a in plan.schedule.ranks[place.pipeline]
        )
        works = works_of(config, layers, split, gpu)
        updates = update_bytes_of_each(config, layers, place, gpu) if config.optim.in_backward else None
        weights = weights_of(config, layers, place, ledger, sharded, updates, gpu)
        heads = [name for name, spec in owned(config, layers).items() if spec.role == "head"]
        of_head = NONE.or_more(*(updates[name] for name in heads)) if updates is not None else NONE
        walked[stage] = Stage(ledger, keeping, weights, works, of_head)
    if plan is None:
        walk_whole(walked[0], config.micro_batches)
    else:
        size = tokens_of(config) * config.model.dim * widths.compute
        crossing = Crossing(size, tied_bytes(config, place), not gpu)
        PipelineRank(walked, plan.schedule, place.pipeline, gathering(config.parallel), crossing, ledger).walk()
    ledger.at = "the penalty of triplets"
    ledger.use("working", *penalty_bytes(config, stages.values(), place))
    ledger.at = "the optimizer's step"
    ledger.use(HOST, scaling_bytes(config, [spec for _, spec in entries], place))
    if not config.optim.in_backward:
        most, messages = update_bytes(config, stages.values(), place, gpu)
        on_host = gpu and kept.offload_states != "none"
        ledger.use(HOST, step_bytes(config, portions_of(entries, config, place), gpu) + (most - messages) * on_host)
        ledger.use("working", messages if on_host else most, messages)
    ledger.at = "the choice of triplets"
    ledger.use("working", choice_bytes(config, stages.values(), place))
    return Memory(rank, ledger.peaks, ledger.most, ledger.then, ledger.moment)


def place_of_average(config: TrainConfig, gpu: bool) -> str:
    """Names the category that counts the average: it is in memory, where the rows are, or on the host."""
    away = config.average.offload == "cpu" or config.memory.offload_params != "none"
    return HOST if gpu and away else "average"


def tied_bytes(config: TrainConfig, place: Place) -> int:
    """Counts what a tied matrix's rows take, whose gradient goes from the last stage to the first; 0 where none is tied."""
    model = config.model
    moves = model.tie_embeddings and not run_specs(config)[EMBEDDING].frozen
    rows = rows_of(model.vocab_size, place) if moves else 0
    return rows * model.dim * widths_of(config).parameter


def weights_of(
    config: TrainConfig,
    layers: range,
    place: Place,
    ledger: Ledger,
    sharded: bool,
    updates: Updates | None,
    gpu: bool,
) -> Weights:
    """Chooses how parameters and gradients of a stage come and go."""
    widths, zero, pipelined = widths_of(config), config.parallel.zero, config.parallel.pipeline > 1
    if not sharded:
        pieces = pieces_of(config, layers)
        tensors = [{name: spec.shape.numel() for name, spec in piece.items()} for piece in pieces]
        frozen = {name for piece in pieces for name, spec in piece.items() if spec.frozen}
        return Replicated(ledger, tensors, widths.parameter, pipelined, updates, frozen)
    ranks = place.shards, place.replicas
    return Sharded(
        ledger, groups_of(config, layers, place), widths, zero, ranks, ways_of(config, gpu), pipelined, updates
    )
