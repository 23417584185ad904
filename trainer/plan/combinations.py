"""Every layout and choice of memory options that a run may have, counted roughly (`plan.rough`)."""

import itertools
import math
from collections.abc import Iterator, Set
from dataclasses import dataclass, replace
from typing import Any

from rowwise.parallel.config import divisors
from rowwise.trainer.check import check_layout
from rowwise.trainer.config import TrainConfig
from rowwise.trainer.plan import reserve
from rowwise.trainer.plan.devices import Device
from rowwise.trainer.plan.ledger import FILE, HOST
from rowwise.trainer.plan.rough import Rough
from rowwise.trainer.plan.states import widths_of
from rowwise.trainer.plan.trade import traded_share
from rowwise.trainer.stages import check_pipeline

PIPELINES = (1, 2, 4, 8, 16, 32)
SCHEDULES = (("1f1b", 1), ("zb_h1", 1), ("interleaved_1f1b", 2), ("zb_v", 2))
SHARING = (1, 2, 4, 8)
LONG = 16_384  # tokens of a sequence from which it is shared
MICRO_SIZES = (1, 2, 4, 8, 16)
RECOMPUTE = ("none", "selective", 0.5, 0.25, "full")
COMPRESS = ("none", "int8")
HOMES = {"memory.offload_states", "memory.offload_params"}
PLACES = ("none", "cpu")  # a folder only where the user names one


@dataclass(frozen=True)
class Candidate:
    """A run that may be, as overrides and checked; its rough seconds and bytes, and whether what waits `beside` the device has
    room."""

    words: tuple[str, ...]
    config: TrainConfig
    seconds: float
    size: float
    beside: bool


class Search:
    """The combinations of a search, roughly counted."""

    def __init__(self, config: TrainConfig, world_size: int, device: Device, given: Set[str]):
        self._config, self._world, self._device, self._given = config, world_size, device, given
        self.refused = ""
        self._rough, self._shares = Rough(config, device), dict[Any, float | None]()
        self._filled = dict[tuple[int, str, int, int], bool]()

    def candidates(self) -> Iterator[Candidate]:
        """Makes every combination that can be."""
        roomy = set[Any]()  # of what leaves a device half empty nothing has to leave
        for words in self._combinations():
            if (here := tuple(item for item in words.items() if item[0] not in HOMES)) in roomy:
                continue
            try:
                config = check_layout(with_words(self._config, words), self._world)
            except ValueError as refusal:
                self.refused = str(refusal)
                continue
            shown = tuple(f"{key}={value}" for key, value in words.items() if key not in self._given)
            held = self._rough.bytes(config)
            if held["device"] < self._device.memory / 2 and not HOMES & self._given:
                roomy.add(here)
            yield Candidate(shown, config, self._rough.seconds(config), held["device"], self._has_room(held))

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
            for replicate, zero, inner, micro, compress, place, (states, params), (
                schedule,
                stages,
            ) in itertools.product(
                self._choices("parallel.replicate", sorted(copies)),
                self._choices("parallel.zero", self._stages(pipeline)),
                self._choices("parallel.inner_shard", (0, machine)),
                self._choices("batch.micro_size", [m for m in MICRO_SIZES if m in divisors_of(self._config, data)]),
                self._choices("memory.compress", COMPRESS),
                self._choices("memory.offload_activations", PLACES),
                self._homes(),
                self._orders(pipeline),
            ):
                # Neighbours keep copies where those who split a state are on several machines.
                outer = world // pipeline // replicate
                if ((params != "none" or inner) and zero < 3) or (inner and (outer <= inner or outer % inner)):
                    continue
                if pipeline > 1 and not self._fills(
                    pipeline, schedule, stages, self._config.batch.global_size // data // micro
                ):
                    continue
                words = {"parallel.zero": zero, "batch.micro_size": micro, "memory.recompute": "none"}
                kept = {"memory.compress": compress, "memory.offload_activations": place}
                kept |= {"memory.offload_states": states, "memory.offload_params": params}
                words |= {key: value for key, value in kept.items() if value != "none"}
                degrees = {"pipeline": pipeline, "ulysses": ulysses, "ring": ring, "replicate": replicate}
                words |= {f"parallel.{key}": degree for key, degree in degrees.items() if degree > 1}
                words |= {"parallel.inner_shard": inner} if inner else {}
                if pipeline > 1:
                    words |= {"parallel.pipeline_schedule": schedule, "parallel.virtual_stages": stages}
                for recompute in self._choices("memory.recompute", (*RECOMPUTE, *self._traded(words))):
                    yield words | {"memory.recompute": recompute}

    def _fills(self, pipeline: int, schedule: str, stages: int, micro_batches: int) -> bool:
        """Says whether a pipeline has as many micro-batches as its schedule needs: asked once, of all memory options."""
        order = pipeline, schedule, stages, micro_batches
        if order not in self._filled:
            parallel = replace(
                self._config.parallel, pipeline=pipeline, pipeline_schedule=schedule, virtual_stages=stages
            )
            try:
                check_pipeline(parallel, micro_batches)
                self._filled[order] = True
            except ValueError as refusal:
                self.refused, self._filled[order] = str(refusal), False
        return self._filled[order]

    def _homes(self) -> list[tuple[str, str]]:
        """Where states and parameters wait: on a CPU there is no other memory."""
        states, params = (self._choices(f"memory.offload_{what}", PLACES) for what in ("states", "params"))
        every = [
            (state, rows) for state, rows in itertools.product(states, params) if state != "none" or rows == "none"
        ]
        return every if self._device.cuda or HOMES & self._given else [("none", "none")]

    def _traded(self, words: dict[str, Any]) -> list[float]:
        """The share of what layers could keep that is worth its way, of a combination whose layers' results leave."""
        if words.get("memory.offload_activations", "none") == "none" or "memory.recompute" in self._given:
            return []
        key = tuple(
            value for name, value in words.items() if not name.startswith(("parallel.pipeline_", "parallel.virtual"))
        )
        if key not in self._shares:
            try:
                config = check_layout(with_words(self._config, words), self._world)
            except ValueError:
                return []
            self._shares[key] = traded_share(
                config, self._rough.seconds, lambda run: self._has_room(self._rough.bytes(run))
            )
        share = self._shares[key]
        return [] if share is None else [share]

    def _has_room(self, held: dict[str, float]) -> bool:
        ram = math.inf if not self._device.cuda else (1 - reserve.HOST) * self._device.ram
        return held[HOST] <= ram and held[FILE] <= self._device.disk_room

    def _stages(self, pipeline: int) -> tuple[int, ...]:
        """The stages of ZeRO that differ. A pipeline adds gradients up whole at stage 2 as at stage 1; a rank that has all rows
        gathers nothing, but in 16 bits computes in copies, of a layer at a time at stage 3."""
        if self._world > pipeline:
            return (1, 3) if pipeline > 1 else (1, 2, 3)
        return (0, 3) if widths_of(self._config).compute == 2 or self._device.cuda else (0,)

    def _orders(self, pipeline: int) -> list[tuple[str, int]]:
        if pipeline == 1:
            return [("1f1b", 1)]
        own = self._config.parallel
        if "parallel.pipeline_schedule" in self._given:
            return [(own.pipeline_schedule, own.virtual_stages)]
        return [
            one for one in SCHEDULES if "parallel.virtual_stages" not in self._given or one[1] == own.virtual_stages
        ]


def divisors_of(config: TrainConfig, data_degree: int) -> list[int]:
    """Lists the sizes that a rank's share of a batch divides into."""
    mine, rest = divmod(config.batch.global_size, data_degree)
    return [] if rest or not mine else divisors(mine)


def with_words(config: TrainConfig, words: dict[str, Any]) -> TrainConfig:
    """Gives a run these keys, each `group.key`."""
    groups: dict[str, dict[str, Any]] = {}
    for key, value in words.items():
        group, _, name = key.partition(".")
        groups.setdefault(group, {})[name] = value
    return replace(config, **{group: replace(getattr(config, group), **given) for group, given in groups.items()})
