"""Every layout and choice of memory options that a run may have, counted roughly: operations over all ranks, the bubble by its
formula, states and activations as shares."""

import itertools
from collections.abc import Iterator, Set
from dataclasses import dataclass, replace
from typing import Any

from rowwise.parallel.activations.offload import LEAVING
from rowwise.parallel.config import divisors
from rowwise.trainer.activations import kept_of, results_of, tokens_of
from rowwise.trainer.check import check_layout
from rowwise.trainer.config import TrainConfig
from rowwise.trainer.models.decoder import parameter_count
from rowwise.trainer.plan.clock import Clock, Pass
from rowwise.trainer.plan.devices import Device
from rowwise.trainer.plan.states import Place, optimizer_bytes, widths_of
from rowwise.trainer.plan.traffic import NOTHING, Traffic, rows, update

PIPELINES = (1, 2, 4, 8, 16, 32)
SCHEDULES = (("1f1b", 1), ("zb_h1", 1), ("interleaved_1f1b", 2), ("zb_v", 2))
SHARING = (1, 2, 4, 8)
LONG = 16_384  # tokens of a sequence from which it is shared
MICRO_SIZES = (1, 2, 4, 8, 16)
RECOMPUTE = ("none", "selective", 0.5, 0.25, "full")
COMPRESS = ("none", "int8")
PLACES = ("none", "cpu")  # a folder only where the user names one


@dataclass(frozen=True)
class Candidate:
    """A run that may be, as overrides and checked, and its rough seconds and bytes."""

    words: tuple[str, ...]
    config: TrainConfig
    seconds: float
    size: float


@dataclass(frozen=True)
class MicroBatch:
    """A micro-batch of all layers: its forward and its backward, what moves beside them, and the bytes that are kept on the device."""

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
    for kept in set(layers):  # of layers that keep the same, one is looked at
        layer, share = layers.index(kept), layers.count(kept)
        f, i, w = clock.layer(layer)
        forward, backward = forward + f.times(share), backward + (i + w).times(share)
        leaves, returns = clock.traffic(layer, 0.0)
        there, back = there + leaves.times(share), back + returns.times(share)
        size += (table.bytes_kept(kept, width, coded) if table is not None else 0) * share
    if memory.offload_activations != "none":
        size *= min(1, LEAVING / len(layers))
    shared = Pass(elementwise=clock.sharing() * len(layers))
    return MicroBatch(forward + shared, backward + shared.times(2), there, back, size * tokens_of(config))


class Search:
    """The combinations of a search, roughly counted."""

    def __init__(self, config: TrainConfig, world_size: int, device: Device, given: Set[str]):
        self._config, self._world, self._device, self._given = config, world_size, device, given
        self.refused = ""
        self._known: dict[Any, MicroBatch] = {}
        self._states = optimizer_bytes(config, range(config.model.layers), Place(0, 0, 1, 1))

    def candidates(self) -> Iterator[Candidate]:
        """Makes every combination that can be."""
        for words in self._combinations():
            try:
                config = check_layout(with_words(self._config, words), self._world)
            except ValueError as refusal:
                self.refused = str(refusal)
                continue
            shown = tuple(f"{key}={value}" for key, value in words.items() if key not in self._given)
            yield Candidate(shown, config, *self._roughly(config))

    def _choices(self, key: str, values: Any) -> list[Any]:
        """The values of a key: the user's own where it was given."""
        group, _, name = key.partition(".")
        return [getattr(getattr(self._config, group), name)] if key in self._given else list(values)

    def _combinations(self) -> Iterator[dict[str, Any]]:
        layers, world, machine = self._config.model.layers, self._world, self._device.per_machine
        pipelines = [p for p in PIPELINES if p <= layers and world % p == 0]
        # Ranks share sequences where these are long, or fewer than ranks.
        shares = self._config.batch.seq_len >= LONG or self._config.batch.global_size < world
        shared = [u for u in SHARING if world % u == 0 and u <= machine] if shares else [1]
        rings = [r for r in SHARING if world % r == 0] if self._config.batch.seq_len >= LONG else [1]
        for pipeline, ulysses, ring in itertools.product(
            self._choices("parallel.pipeline", pipelines),
            self._choices("parallel.ulysses", shared),
            self._choices("parallel.ring", rings),
        ):
            if world % (pipeline * ulysses * ring):
                continue
            data = world // (pipeline * ulysses * ring)
            copies = {1, data // machine if data > machine and data % machine == 0 else 1}
            for replicate, zero, micro, recompute, compress, place, (schedule, stages) in itertools.product(
                self._choices("parallel.replicate", sorted(copies)),
                self._choices("parallel.zero", self._stages(pipeline)),
                self._choices("batch.micro_size", [m for m in MICRO_SIZES if m in divisors_of(self._config, data)]),
                self._choices("memory.recompute", RECOMPUTE),
                self._choices("memory.compress", COMPRESS),
                self._choices("memory.offload_activations", PLACES),
                self._orders(pipeline),
            ):
                words = {"parallel.zero": zero, "batch.micro_size": micro, "memory.recompute": recompute}
                kept = {"memory.compress": compress, "memory.offload_activations": place}
                words |= {key: value for key, value in kept.items() if value != "none"}
                degrees = {"pipeline": pipeline, "ulysses": ulysses, "ring": ring, "replicate": replicate}
                words |= {f"parallel.{key}": degree for key, degree in degrees.items() if degree > 1}
                if pipeline > 1:
                    words |= {"parallel.pipeline_schedule": schedule, "parallel.virtual_stages": stages}
                yield words

    def _stages(self, pipeline: int) -> tuple[int, ...]:
        """The stages of ZeRO that differ. A pipeline adds gradients up whole at stage 2 as at stage 1; a rank that has all rows
        gathers nothing, but in 16 bits computes in copies, of a layer at a time at stage 3."""
        if self._world > pipeline:
            return (1, 3) if pipeline > 1 else (1, 2, 3)
        return (0, 3) if widths_of(self._config).compute == 2 else (0,)

    def _orders(self, pipeline: int) -> list[tuple[str, int]]:
        if pipeline == 1:
            return [("1f1b", 1)]
        own = self._config.parallel
        if "parallel.pipeline_schedule" in self._given:
            return [(own.pipeline_schedule, own.virtual_stages)]
        return [
            one for one in SCHEDULES if "parallel.virtual_stages" not in self._given or one[1] == own.virtual_stages
        ]

    def _roughly(self, config: TrainConfig) -> tuple[float, float]:
        """(seconds, bytes) of a run that are hardly more than it will take."""
        parallel, device = config.parallel, self._device
        key = config.batch.micro_size, config.memory, parallel.ulysses, parallel.ring
        if key not in self._known:
            self._known[key] = micro_batch(config, device)
        work, stages, count = self._known[key], parallel.pipeline, config.micro_batches
        shards = parallel.state_degree if parallel.zero else 1
        numbers = parameter_count(config.model)[0] / shards
        gathered, reduced = rows(config, device, numbers)
        optimizer, beside = update(config, device, numbers, self._states / shards)
        forward = work.forward.waiting(work.there + gathered, device).total
        backward = work.backward.waiting(work.back + reduced, device).total
        last = work.backward.waiting(work.back + reduced + beside, device).total
        # Of a pipeline that waits as 1F1B does; split backwards wait a third of that.
        waits = (stages - 1) / parallel.virtual_stages / (3 if parallel.pipeline_schedule.startswith("zb") else 1)
        passes = (forward + backward) * (count - 1 + (waits if stages > 1 else 0)) + forward + last
        return (passes + optimizer) / stages, self._bytes(config, work.kept)

    def _bytes(self, config: TrainConfig, kept: float) -> float:
        parallel, model, widths = config.parallel, config.model, widths_of(config)
        numbers, shards = parameter_count(model)[0] / parallel.pipeline, parallel.state_degree if parallel.zero else 1
        states = (numbers * widths.parameter + self._states / parallel.pipeline) / shards
        layer = numbers / model.layers * parallel.pipeline
        gathered = (
            0.0 if shards == 1 and widths.compute > 2 else (layer if parallel.zero == 3 else numbers) * widths.compute
        )
        whole = parallel.zero < 2 or parallel.pipeline > 1
        gradients = numbers * (widths.reduce if whole else widths.parameter / shards)
        if config.optim.in_backward:
            gradients = 0.0
        if config.memory.offload_activations == "none":  # else so many layers, whichever
            kept *= min(config.micro_batches, parallel.pipeline) / parallel.pipeline
        # The gradients of a single micro-batch come as what its layers kept goes.
        return states + gathered + (max(gradients, kept) if config.micro_batches == 1 else gradients + kept)


def divisors_of(config: TrainConfig, data_degree: int) -> list[int]:
    """Lists the sizes that a rank's share of a batch divides into."""
    mine, rest = divmod(config.batch.global_size, data_degree)
    return [] if rest or not mine else divisors(mine)


def with_words(config: TrainConfig, words: dict[str, Any]) -> TrainConfig:
    """Gives a run these keys, each `group.key`."""
    for key, value in words.items():
        group, _, name = key.partition(".")
        config = replace(config, **{group: replace(getattr(config, group), **{name: value})})
    return config
