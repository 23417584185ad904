"""How long a step takes, roughly, from counted operations, bytes of memory traffic and bytes of messages: `forecast_seconds`.

    products      2 operations a weight and token forward, 4 backward, and what is made again
    attention     4 H E a pair of a token and one that it sees forward, 2.5 times that backward
    elementwise   bytes that norms, rotations, gates and sums read and write, twice as many backward, and those of codes
    messages      what the computation beside them does not hide, by the bandwidth of the links that they cross; so do
                  activations that wait elsewhere, on their way there and back
    bubble        what ranks of a pipeline wait for each other (`pipeline_schedule.simulate`)

Devices reach a share of their peaks (`Device.reached`), such that 8B models on 8 H100 come to what is published of them, 35 to 46 %
of the peak; they are not measured here. All tokens are taken to see all before them: documents make attention cheaper than told.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from rowwise.parallel.pipeline_schedule.simulate import Costs, period
from rowwise.parallel.precision import Fp64
from rowwise.trainer.activations import kept_of, results_of, tokens_of
from rowwise.trainer.config import TrainConfig
from rowwise.trainer.measure import PartTimes, Times
from rowwise.trainer.models.decoder import flops_of, layer_flops
from rowwise.trainer.plan.devices import Device
from rowwise.trainer.plan.links import Links
from rowwise.trainer.plan.loss import loss_work
from rowwise.trainer.plan.states import Place, numbers_of, optimizer_bytes, pieces_of, place_of, widths_of
from rowwise.trainer.stages import Plan, gathering

BACKWARD_OF_ATTENTION = 2.5


@dataclass(frozen=True)
class Seconds:
    """Of a step, of the rank that has the most to do: its parts, their sum `step`, the share of the device's peak that the model's
    own operations are (`mfu`), and tokens a second and device."""

    products: float
    attention: float
    elementwise: float
    messages: float
    optimizer: float
    bubble: float
    step: float
    mfu: float
    tokens_per_second: float


@dataclass(frozen=True)
class Pass:
    """Seconds of a forward or a backward of a micro-batch, or of a part of it."""

    products: float = 0.0
    attention: float = 0.0
    elementwise: float = 0.0

    @property
    def total(self) -> float:
        return self.products + self.attention + self.elementwise

    def __add__(self, other: "Pass") -> "Pass":
        return Pass(
            self.products + other.products, self.attention + other.attention, self.elementwise + other.elementwise
        )

    def times(self, factor: float) -> "Pass":
        return Pass(self.products * factor, self.attention * factor, self.elementwise * factor)


class Clock:
    """The seconds of the parts of a run on a device."""

    def __init__(self, config: TrainConfig, device: Device):
        self.config, self.device, self.links = config, device, Links(device)
        self.widths, self.tokens = widths_of(config), tokens_of(config)
        slower = device.wide * (8 if isinstance(config.precision, Fp64) else 1) if self.widths.compute > 2 else 1.0
        self.rate = device.flops / slower

    def layer(self, layer: int) -> tuple[Pass, Pass, Pass]:
        """Estimates the forward of a layer, its input gradients with what is made again, and its weights' gradients."""
        model, tokens = self.config.model, self.tokens
        _, forward, _ = layer_flops(model, self.config.batch.seq_len)
        attention = 2.0 * model.heads * model.head_size * (self.config.batch.seq_len + 1)
        products = Pass(products=(forward - attention) * tokens / self.rate / self.device.reached("products"))
        looked = Pass(attention=attention * tokens / self.rate / self.device.reached("attention"))
        moved = Pass(elementwise=self._traffic() * tokens / self.device.bandwidth / self.device.reached("memory"))
        again = Pass(products=self._again(layer) * tokens / self.rate / self.device.reached("products"))
        codes = Pass(elementwise=self._coded(layer) * tokens / self.device.bandwidth / self.device.reached("memory"))
        back = products + looked.times(BACKWARD_OF_ATTENTION) + moved.times(2) + again + codes
        return products + looked + moved + codes, back, products

    def head(self) -> tuple[Pass, Pass, Pass]:
        """Estimates the forward, the input gradients and the weights' gradients of the head and the loss."""
        words, width = self.config.model.vocab_size, self.widths.compute
        _, _, forward = layer_flops(self.config.model, self.config.batch.seq_len)
        products = Pass(products=forward * self.tokens / self.rate / self.device.reached("products"))
        passes = 2.0 * (width + max(4, width)) * words * (1 if self.config.memory.fused_loss else 3)
        moved = Pass(elementwise=passes * self.tokens / self.device.bandwidth / self.device.reached("memory"))
        made = loss_work(self.config, self.tokens, width, split=False, gpu=self.device.cuda).makes
        again = products if made == "backward" else Pass()  # tiles of logits are made a second time
        return products + moved, products + moved + again, products

    def part_times(self) -> PartTimes:
        """Estimates what comes before the layers, a layer, and what comes after, as a run measures them for `auto`."""
        layer, head = (Times(*(part.total for part in parts)) for parts in (self.layer(0), self.head()))
        parallel, model = self.config.parallel, self.config.model
        size = self.tokens * model.dim * self.widths.compute
        stride = parallel.data_degree * parallel.ring * parallel.ulysses
        numbers = numbers_of(pieces_of(self.config, range(1))[1])
        place = place_of(0, parallel)
        gather = self.links.collective(numbers * self.widths.compute, 1, place.shards) if parallel.zero == 3 else 0.0
        return PartTimes(Times(0.0, 0.0, 0.0), layer, head, self.links.message(size, stride), gather)

    def _traffic(self) -> float:
        """Bytes a token that a layer's elementwise operations move: two norms and two sums of D, rotations, the gate."""
        model = self.config.model
        turned = 3 * model.head_size * (model.heads + model.kv_heads)
        return float(self.widths.compute * (10 * model.dim + turned + 5 * model.ffn_dim))

    def _again(self, layer: int) -> float:
        table = results_of(self.config)
        if table is None:
            return 0.0
        return table.operations_again(self._kept[layer], (self.config.batch.seq_len + 1) / 2)

    def _coded(self, layer: int) -> float:
        """Bytes a token that are read and written where a layer's results are coded, and again where they are decoded."""
        table = results_of(self.config)
        if table is None or self.config.memory.compress == "none":
            return 0.0
        return sum(table.bytes_kept(self._kept[layer], self.widths.compute, coded) for coded in (False, True))

    def leaving(self, layer: int) -> float:
        """Estimates the seconds that what a layer keeps takes to leave the device; as many again to come back."""
        table, memory = results_of(self.config), self.config.memory
        if table is None or memory.offload_activations == "none":
            return 0.0
        size = self.tokens * table.bytes_kept(self._kept[layer], self.widths.compute, memory.compress != "none")
        speed = self.device.host if memory.offload_activations == "cpu" else min(self.device.host, self.device.disk)
        return size / speed / self.device.reached("links")

    @cached_property
    def _kept(self) -> Sequence[frozenset[str]]:
        return kept_of(self.config)

    def sharing(self) -> float:
        """Estimates the seconds that the messages of a layer's attention take in its forward; its backward sends as many again."""
        parallel, model = self.config.parallel, self.config.model
        heads, keys = model.heads * model.head_size, model.kv_heads * model.head_size
        size = self.tokens * self.widths.compute
        seconds = 0.0
        if parallel.ulysses > 1:
            seconds += self.links.exchange(size * (2 * heads + 2 * keys), 1, parallel.ulysses)
        if parallel.ring > 1:  # hidden behind the blocks that are looked at meanwhile, or longer than they are
            looked = (
                2.0
                * heads
                * (self.config.batch.seq_len + 1)
                * self.tokens
                / self.rate
                / self.device.reached("attention")
            )
            block = self.links.message(size * 2 * keys, parallel.ulysses)
            seconds += max(0.0, (parallel.ring - 1) * block - looked)
        return seconds


def forecast_seconds(config: TrainConfig, device: Device, plan: Plan | None) -> Seconds:
    """Estimates a step of a checked run."""
    clock = Clock(config, device)
    place = place_of(0, config.parallel)
    if plan is None:
        return _whole(clock, place)
    return _pipelined(clock, place, plan)


def _whole(clock: Clock, place: Place) -> Seconds:
    config, parallel = clock.config, clock.config.parallel
    count, zero = config.micro_batches, parallel.zero
    layers = range(config.model.layers)
    forward = backward = Pass()
    exposed = 0.0
    states = 1, place.shards
    pieces = [numbers_of(piece) for piece in pieces_of(config, layers)]
    for layer, numbers in zip(layers, pieces[1:-1], strict=True):
        f, i, w = clock.layer(layer)
        forward, backward = forward + f, backward + i + w
        away = clock.leaving(layer)
        exposed += count * (3 * clock.sharing() + max(0.0, away - f.total) + max(0.0, away - i.total - w.total))
        if zero == 3:
            gather = clock.links.collective(numbers * clock.widths.compute, *states)
            reduce = clock.links.collective(numbers * clock.widths.reduce, *states)
            exposed += count * (max(0.0, gather - f.total) + max(0.0, gather + reduce - i.total - w.total))
        elif zero == 2:
            reduce = clock.links.collective(numbers * clock.widths.reduce, *states)
            exposed += count * max(0.0, reduce - i.total - w.total)
    f, i, w = clock.head()
    forward, backward = forward + f, backward + i + w
    exposed += _once(clock, place, sum(pieces), zero, backward.total)
    spent = (forward + backward).times(count)
    optimizer = _optimizer(clock, layers, place)
    return _summed(clock, spent, exposed, optimizer, 0.0)


def _once(clock: Clock, place: Place, numbers: int, zero: int, hidden: float) -> float:
    """Seconds of the messages that cross once a step, beside those of a backward that hide them: parameters below stage 3, whole
    gradients below stage 2, and the sums over replicas."""
    links, widths = clock.links, clock.widths
    seconds = links.collective(numbers * widths.compute, 1, place.shards) if zero in (1, 2) else 0.0
    reduced = links.collective(numbers * widths.reduce, 1, place.shards) if zero <= 1 else 0.0
    share = numbers / place.shards * widths.reduce
    reduced += 2 * links.collective(share, place.shards, place.replicas)
    return seconds + max(0.0, reduced - hidden)


def _optimizer(clock: Clock, layers: range, place: Place) -> float:
    """Seconds of the update: parameters and states are read and written, gradients read."""
    numbers = sum(numbers_of(piece) for piece in pieces_of(clock.config, layers)) / place.shards
    moved = numbers * 3 * clock.widths.parameter + 2 * optimizer_bytes(clock.config, layers, place)
    return moved / clock.device.bandwidth / clock.device.reached("memory")


def _pipelined(clock: Clock, place: Place, plan: Plan) -> Seconds:
    config, parallel = clock.config, clock.config.parallel
    stages = [_stage(clock, layers) for layers in plan.layers]
    forward, inputs, weights = (tuple(stage[n].total for stage in stages) for n in range(3))
    numbers = [sum(numbers_of(piece) for piece in pieces_of(config, layers)) for layers in plan.layers]
    gather = tuple(clock.links.collective(n * clock.widths.compute, 1, place.shards) for n in numbers)
    ones = (1.0,) * len(stages)
    size = clock.tokens * config.model.dim * clock.widths.compute
    send = clock.links.message(size, parallel.data_degree * parallel.ring * parallel.ulysses)
    costs = Costs(forward, inputs, weights, gather, ones, ones, send)
    seconds, _ = period(plan.schedule, costs, not parallel.post_validation, gathering(parallel))
    busiest = max(
        range(parallel.pipeline), key=lambda rank: sum(stages[s][0].total for s in plan.schedule.stages_of(rank))
    )
    mine = plan.schedule.stages_of(busiest)
    spent = Pass()
    for stage in mine:
        spent = spent + (stages[stage][0] + stages[stage][1] + stages[stage][2]).times(config.micro_batches)
    held = sum(numbers[stage] for stage in mine)
    exposed = _once(clock, place, held, min(parallel.zero, 1) if parallel.zero < 3 else 0, 0.0)
    optimizer = max(_optimizer(clock, plan.layers[stage], place) for stage in mine) * len(mine)
    return _summed(clock, spent, exposed, optimizer, max(0.0, seconds - spent.total))


def _stage(clock: Clock, layers: range) -> tuple[Pass, Pass, Pass]:
    """The forward of a stage, its input gradients and its weights' gradients."""
    parts = [clock.layer(layer) for layer in layers]
    if layers.stop == clock.config.model.layers:
        parts.append(clock.head())
    forward, inputs, weights = (sum((part[n] for part in parts), Pass()) for n in range(3))
    shared, away = len(layers) * clock.sharing(), sum(clock.leaving(layer) for layer in layers)
    there, back = max(0.0, away - forward.total), max(0.0, away - inputs.total - weights.total)
    return forward + Pass(elementwise=shared + there), inputs + Pass(elementwise=2 * shared + back), weights


def _summed(clock: Clock, spent: Pass, exposed: float, optimizer: float, bubble: float) -> Seconds:
    config = clock.config
    step = spent.total + exposed + optimizer + bubble
    tokens = config.batch.positions
    operations = flops_of(config.model, tokens, tokens * (config.batch.seq_len + 1) / 2)
    devices = config.parallel.world_size
    mfu = operations / step / devices / clock.device.flops
    return Seconds(
        spent.products,
        spent.attention,
        spent.elementwise,
        exposed,
        optimizer,
        bubble,
        step,
        mfu,
        tokens / step / devices,
    )
