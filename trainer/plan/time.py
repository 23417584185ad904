"""How long a step takes, roughly, from counted operations, bytes of memory traffic and bytes of messages: `forecast_seconds`.

    products      2 operations a weight and token forward, 4 backward, 2 of one that is frozen, and what is made again (`plan.load`)
    attention     4 H E a pair of a token and one that it sees forward, 2.5 times that backward
    elementwise   bytes that norms, rotations, gates and sums read and write, twice as many backward, and those of all codes
    messages      what the computation beside them does not hide, by the bandwidth of the links that they cross
    offload       what a computation waits for what comes and goes beside it (`plan.traffic`)
    optimizer     what an update reads and writes, or what its way to the host and to files takes, and the host
    bubble        what ranks of a pipeline wait for each other (`pipeline_schedule.simulate`)

Devices reach a share of their peaks (`Device.reached`), such that 8B models on 8 H100 come to what is published of them, 35 to 46 %
of the peak; they are not measured here. All tokens are taken to see all before them: documents make attention cheaper than told.
"""

from dataclasses import dataclass

from rowwise.parallel.pipeline_schedule.simulate import Costs, period
from rowwise.trainer.config import TrainConfig
from rowwise.trainer.plan.clock import Clock, Pass
from rowwise.trainer.plan.devices import Device
from rowwise.trainer.plan.load import Load, operations_of, total_load
from rowwise.trainer.plan.states import Place, optimizer_bytes, place_of
from rowwise.trainer.plan.traffic import NOTHING, Traffic, rows, update
from rowwise.trainer.stages import Plan, gathering


@dataclass(frozen=True)
class Seconds:
    """Of a step, of the rank that has the most to do: its parts, their sum `step`, the share of the device's peak that the model's
    own operations are (`mfu`), and tokens a second and device."""

    products: float
    attention: float
    elementwise: float
    messages: float
    offload: float
    optimizer: float
    bubble: float
    step: float
    mfu: float
    tokens_per_second: float


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
    forward = backward = last = Pass()  # `last`: of the last micro-batch, beside which a step may be made
    exposed = 0.0
    loads, every = clock.loads, total_load(config, layers)
    optimizer, beside = _update(clock, layers, place)
    for layer, load in zip(layers, loads[1:-1], strict=True):
        f, i, w = clock.layer(layer)
        away, back = clock.traffic(layer, load, place.shards)
        exposed += count * (1 + 2 * load.returns) * clock.sharing()
        if zero == 3:
            first, again = clock.gather(load, place.shards)
            reduce = clock.reduce(load, place.shards)
            exposed += max(0.0, first - f.total) + (count - 1) * max(0.0, again - f.total)
            exposed += count * max(0.0, again + reduce - i.total - w.total) * load.returns
        elif zero == 2:
            reduce = clock.reduce(load, place.shards)
            exposed += count * max(0.0, reduce - i.total - w.total)
        stepped = beside.times(load.learning / every.learning)
        forward, backward = forward + f.waiting(away, clock.device), backward + (i + w).waiting(back, clock.device)
        last = last + (i + w).waiting(back + stepped, clock.device)
    f, i, w = clock.head()
    rest = loads[0] + loads[-1]
    size, gradients = rest.kept / place.shards, rest.learning * clock.widths.parameter / place.shards
    away, back = rows(config, clock.device, size, gradients)
    stepped = beside.times(rest.learning / every.learning)
    forward, backward = forward + f.waiting(away, clock.device), backward + (i + w).waiting(back, clock.device)
    last = last + (i + w).waiting(back + stepped, clock.device)
    exposed += _once(clock, place, every, zero, backward.total)
    spent = (forward + backward).times(count - 1) + forward + last
    return _summed(clock, spent, exposed, optimizer, 0.0)


def _once(clock: Clock, place: Place, load: Load, zero: int, hidden: float) -> float:
    """Seconds of the messages that cross once a step, beside those of a backward that hide them: parameters below stage 3, whole
    gradients below stage 2, and the sums over replicas."""
    links, widths = clock.links, clock.widths
    seconds = clock.gather(load, place.shards)[0] if zero in (1, 2) else 0.0
    reduced = clock.reduce(load, place.shards) if zero <= 1 else 0.0
    share = load.learning / place.shards * widths.reduce
    reduced += 2 * links.collective(share, place.shards, place.replicas)
    return seconds + max(0.0, reduced - hidden)


def _update(clock: Clock, layers: range, place: Place) -> tuple[float, Traffic]:
    """The update of a rank's rows of a stage, as `traffic.update` counts it."""
    config, device = clock.config, clock.device
    numbers = total_load(config, layers).learning / place.shards
    return update(config, device, numbers, optimizer_bytes(config, layers, place))


def _pipelined(clock: Clock, place: Place, plan: Plan) -> Seconds:
    config, parallel = clock.config, clock.config.parallel
    stages = [_stage(clock, layers, place) for layers in plan.layers]
    forward, inputs, weights = (tuple(stage[n].total for stage in stages) for n in range(3))
    loads = [total_load(config, layers) for layers in plan.layers]
    gather = tuple(clock.gather(load, place.shards)[1] for load in loads)
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
    held = sum((loads[stage] for stage in mine), Load())
    exposed = _once(clock, place, held, min(parallel.zero, 1) if parallel.zero < 3 else 0, 0.0)
    updates = [_update(clock, plan.layers[stage], place) for stage in mine]
    optimizer = max(seconds + beside.seconds(clock.device) for seconds, beside in updates) * len(mine)
    return _summed(clock, spent, exposed, optimizer, max(0.0, seconds - spent.total))


def _stage(clock: Clock, layers: range, place: Place) -> tuple[Pass, Pass, Pass]:
    """The forward of a stage, its input gradients and its weights' gradients."""
    parts = [clock.layer(layer) for layer in layers]
    if layers.stop == clock.config.model.layers:
        parts.append(clock.head())
    forward, inputs, weights = (sum((part[n] for part in parts), Pass()) for n in range(3))
    shared = len(layers) * clock.sharing()
    traffic = [clock.traffic(layer, clock.loads[1 + layer], place.shards) for layer in layers]
    there, back = (sum((each[n] for each in traffic), NOTHING) for n in range(2))
    forward, inputs = forward + Pass(elementwise=shared), inputs + Pass(elementwise=2 * shared)
    late = (inputs + weights).waiting(back, clock.device).offload
    return forward.waiting(there, clock.device), inputs + Pass(offload=late), weights


def _summed(clock: Clock, spent: Pass, exposed: float, optimizer: float, bubble: float) -> Seconds:
    config = clock.config
    step = spent.total + exposed + optimizer + bubble
    tokens = config.batch.positions
    operations = operations_of(config, tokens, tokens * config.model.seen(config.batch.seq_len))
    devices = config.parallel.world_size
    mfu = operations / step / devices / clock.device.flops
    return Seconds(
        spent.products,
        spent.attention,
        spent.elementwise,
        exposed,
        spent.offload,
        optimizer,
        bubble,
        step,
        mfu,
        tokens / step / devices,
    )
