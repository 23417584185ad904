"""Counts a run roughly: operations over all ranks, the bubble by its formula, states and activations as shares."""

from dataclasses import dataclass
from typing import Any

from rowwise.parallel.activations.offload import LEAVING
from rowwise.trainer.activations import kept_of, results_of, tokens_of
from rowwise.trainer.config import TrainConfig
from rowwise.trainer.plan.beside import where
from rowwise.trainer.plan.clock import Clock, Pass
from rowwise.trainer.plan.devices import Device
from rowwise.trainer.plan.ledger import FILE, HOST
from rowwise.trainer.plan.load import Load, total_load
from rowwise.trainer.plan.states import Place, optimizer_bytes, widths_of
from rowwise.trainer.plan.traffic import NOTHING, Traffic, rows, update


@dataclass(frozen=True)
class MicroBatch:
    """A micro-batch of all layers: its forward and its backward, what moves beside them, and the bytes that are kept."""

    forward: Pass
    backward: Pass
    there: Traffic
    back: Traffic
    kept: float


def micro_batch(config: TrainConfig, device: Device) -> MicroBatch:
    """Counts a micro-batch, but for messages that are hidden and for rows."""
    clock, table, memory = Clock(config, device), results_of(config), config.memory
    width, coded = widths_of(config).compute, memory.compress != "none"
    layers = kept_of(config) if table is not None else (frozenset[str](),) * config.model.layers
    head, inputs, weights = clock.head()
    forward, backward, there, back, size = head, inputs + weights, NOTHING, NOTHING, 0.0
    alike = dict[tuple[frozenset[str], Load], list[int]]()
    for layer, one in enumerate(zip(layers, clock.loads[1:-1], strict=True)):
        alike.setdefault(one, []).append(layer)
    for (kept, _), (layer, *others) in alike.items():  # of layers that are alike one is looked at
        share = 1 + len(others)
        f, i, w = clock.layer(layer)
        forward, backward = forward + f.times(share), backward + (i + w).times(share)
        leaves, returns = clock.traffic(layer, Load(returns=1), 1)
        there, back = there + leaves.times(share), back + returns.times(share)
        size += (table.bytes_kept(kept, width, coded) if table is not None else 0) * share
    shared = Pass(elementwise=clock.sharing() * len(layers))
    return MicroBatch(forward + shared, backward + shared.times(2), there, back, size * tokens_of(config))


class Rough:
    """Rough seconds and bytes of runs that differ from `config` in their layouts and memory options, on a device."""

    def __init__(self, config: TrainConfig, device: Device):
        self._device = device
        self._known: dict[Any, MicroBatch] = {}
        self._load = total_load(config, range(config.model.layers))
        self._states = optimizer_bytes(config, range(config.model.layers), Place(0, 0, 1, 1))

    def micro_batch(self, config: TrainConfig) -> MicroBatch:
        """Counts a micro-batch of all layers, or remembers it."""
        parallel, memory = config.parallel, config.memory
        options = memory.recompute, memory.compress, memory.offload_activations, memory.fused_loss
        key = config.batch.micro_size, options, parallel.ulysses, parallel.ring
        if key not in self._known:
            self._known[key] = micro_batch(config, self._device)
        return self._known[key]

    def seconds(self, config: TrainConfig) -> float:
        """Estimates a step that is hardly faster than it will be."""
        parallel, device, work = config.parallel, self._device, self.micro_batch(config)
        stages, count, shards = parallel.pipeline, config.micro_batches, shards_of(config)
        gradients = self._load.learning / shards
        width = widths_of(config).parameter
        gathered, reduced = rows(config, device, self._load.kept / shards, gradients * width)
        optimizer, beside = update(config, device, gradients, self._states / shards)
        forward = work.forward.waiting(work.there + gathered, device).total
        backward = work.backward.waiting(work.back + reduced, device).total
        last = work.backward.waiting(work.back + reduced + beside, device).total
        # Of a pipeline that waits as 1F1B does; split backwards wait a third of that.
        waits = (stages - 1) / parallel.virtual_stages / (3 if parallel.pipeline_schedule.startswith("zb") else 1)
        passes = (forward + backward) * (count - 1 + (waits if stages > 1 else 0)) + forward + last
        return (passes + optimizer) / stages

    def bytes(self, config: TrainConfig) -> dict[str, float]:
        """Counts what a rank needs at least: of its `device`, of its host's memory and of files."""
        parallel, model, memory, widths = config.parallel, config.model, config.memory, widths_of(config)
        shards, stages = shards_of(config), parallel.pipeline
        gathered, learning = self._load.gathered / stages, self._load.learning / stages
        held = {"device": 0.0, HOST: 0.0, FILE: 0.0}
        rows_size, gradient_rows = self._load.kept / stages / shards, learning * widths.parameter / shards
        held[self._where(memory.offload_params)] += rows_size
        held[self._where(memory.offload_states)] += self._states / stages / shards
        inner = parallel.inner_shard
        held["device"] += gathered / inner if inner else 0
        share = stages / model.layers  # of a stage, that is a layer
        copies = shards > 1 or widths.compute == 2 or memory.offload_params != "none"
        held["device"] += gathered * (share if parallel.zero == 3 else 1) * copies
        gradients = learning * widths.reduce if parallel.zero < 2 or stages > 1 else gradient_rows
        if config.optim.in_backward:
            gradients = 0.0
        elif memory.offload_params != "none":
            waits = memory.offload_gradients if memory.offload_gradients != "none" else "cpu"
            held[self._where(waits)] += gradient_rows
            gradients = learning * share * widths.reduce if stages == 1 else gradients
        kept = self.micro_batch(config).kept * min(config.micro_batches, stages) / stages
        if memory.offload_activations != "none":
            held[HOST] += kept if memory.offload_activations == "cpu" else 0
            kept = self.micro_batch(config).kept * min(1, LEAVING / model.layers)  # of so many layers, whichever
        # The gradients of a single micro-batch come as what its layers kept goes.
        held["device"] += max(gradients, kept) if config.micro_batches == 1 else gradients + kept
        return held

    def _where(self, place: str) -> str:
        return where("device", place, self._device.cuda)


def shards_of(config: TrainConfig) -> int:
    """Counts the ranks that a state is split over."""
    return config.parallel.state_degree if config.parallel.zero else 1
