"""How long the parts of a run take on a device, computed alone, and what moves beside them."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from rowwise.parallel.precision import Fp64
from rowwise.parallel.reduce import BITS
from rowwise.trainer.activations import kept_of, results_of, tokens_of
from rowwise.trainer.config import TrainConfig
from rowwise.trainer.measure import PartTimes, Times
from rowwise.trainer.plan.devices import Device
from rowwise.trainer.plan.links import Links
from rowwise.trainer.plan.load import Load, loads_of
from rowwise.trainer.plan.loss import head_spec, loss_work
from rowwise.trainer.plan.states import place_of, widths_of
from rowwise.trainer.plan.traffic import Traffic, leaving, rows

BACKWARD_OF_ATTENTION = 2.5
CODED = 1 + 4 / 256  # bytes of a number that crosses in 8 bits, with its share of a scale


@dataclass(frozen=True)
class Pass:
    """Seconds of a forward or a backward of a micro-batch, or of a part of it; `offload`: that it waits for what comes and goes."""

    products: float = 0.0
    attention: float = 0.0
    elementwise: float = 0.0
    offload: float = 0.0

    @property
    def total(self) -> float:
        return self.products + self.attention + self.elementwise + self.offload

    def __add__(self, other: "Pass") -> "Pass":
        return Pass(
            self.products + other.products,
            self.attention + other.attention,
            self.elementwise + other.elementwise,
            self.offload + other.offload,
        )

    def times(self, factor: float) -> "Pass":
        return Pass(factor * self.products, factor * self.attention, factor * self.elementwise, factor * self.offload)

    def waiting(self, traffic: Traffic, device: Device) -> "Pass":
        """Gives it with the seconds by which what moves beside it takes longer."""
        return self + Pass(offload=max(0.0, traffic.seconds(device) - self.total))


class Clock:
    """The seconds of the parts of a run on a device."""

    def __init__(self, config: TrainConfig, device: Device):
        self.config, self.device, self.links = config, device, Links(device)
        self.widths, self.tokens = widths_of(config), tokens_of(config)
        self._table, self._layers = results_of(config), dict[tuple[frozenset[str], Load], tuple[Pass, Pass, Pass]]()
        slower = device.wide * (8 if isinstance(config.precision, Fp64) else 1) if self.widths.compute > 2 else 1.0
        self.rate = device.flops / slower

    def layer(self, layer: int) -> tuple[Pass, Pass, Pass]:
        """Estimates the forward of a layer, its input gradients with what is made again, and its weights' gradients: of layers that
        keep the same and whose parameters do, once."""
        kept = frozenset[str]() if self._table is None else self._kept[layer]
        asked = kept, self.loads[1 + layer]
        if asked not in self._layers:
            self._layers[asked] = self._passes(*asked)
        return self._layers[asked]

    def _passes(self, kept: frozenset[str], load: Load) -> tuple[Pass, Pass, Pass]:
        model, tokens = self.config.model, self.tokens
        attention = 4.0 * model.heads * model.head_size * model.seen(self.config.batch.seq_len)
        products, weights = self._products(load.multiplying), self._products(load.weighed)
        decoded = Pass(elementwise=load.decoded / self.device.bandwidth / self.device.reached("memory"))
        norms = Pass(products=load.norms / self.rate / self.device.reached("products"))
        looked = Pass(attention=attention * tokens / self.rate / self.device.reached("attention"))
        moved = Pass(elementwise=self._traffic() * tokens / self.device.bandwidth / self.device.reached("memory"))
        again = Pass(products=self._again(kept) * tokens / self.rate / self.device.reached("products"))
        codes = Pass(elementwise=self._coded(kept) * tokens / self.device.bandwidth / self.device.reached("memory"))
        forward = products + looked + moved + decoded + norms
        if not load.returns:
            return forward, Pass(), Pass()
        back = products + looked.times(BACKWARD_OF_ATTENTION) + moved.times(2) + again + codes + decoded
        return forward + codes, back, weights

    def _products(self, numbers: float) -> Pass:
        """What it takes to multiply every token by so many numbers."""
        return Pass(products=2.0 * numbers * self.tokens / self.rate / self.device.reached("products"))

    def head(self) -> tuple[Pass, Pass, Pass]:
        """Estimates the forward, the input gradients and the weights' gradients of the head and the loss."""
        words, width = self.config.model.vocab_size, self.widths.compute
        products = self._products(words * self.config.model.dim)
        learns = not head_spec(self.config).frozen
        passes = 2.0 * (width + max(4, width)) * words * (1 if self.config.memory.fused_loss else 3)
        moved = Pass(elementwise=passes * self.tokens / self.device.bandwidth / self.device.reached("memory"))
        made = loss_work(self.config, self.tokens, width, split=False, gpu=self.device.cuda).makes
        again = products if made == "backward" else Pass()  # tiles of logits are made a second time
        return products + moved, products + moved + again, products if learns else Pass()

    def part_times(self) -> PartTimes:
        """Estimates what comes before the layers, a layer, and what comes after, as a run measures them for `auto`."""
        layer, head = (Times(*(part.total for part in parts)) for parts in (self.layer(0), self.head()))
        parallel, model = self.config.parallel, self.config.model
        size = self.tokens * model.dim * self.widths.compute
        stride = parallel.data_degree * parallel.ring * parallel.ulysses
        place = place_of(0, parallel)
        gather = self.gather(self.loads[1], place.shards)[1] if parallel.zero == 3 else 0.0
        return PartTimes(Times(0.0, 0.0, 0.0), layer, head, self.links.message(size, stride), gather)

    def _traffic(self) -> float:
        """Bytes a token that a layer's elementwise operations move: two norms and two sums of D, rotations, the gate."""
        model = self.config.model
        turned = 3 * model.head_size * (model.heads + model.kv_heads)
        return float(self.widths.compute * (10 * model.dim + turned + 5 * model.ffn_dim))

    def _again(self, kept: frozenset[str]) -> float:
        if self._table is None:
            return 0.0
        return self._table.operations_again(kept, self.config.model.seen(self.config.batch.seq_len))

    def _coded(self, kept: frozenset[str]) -> float:
        """Bytes a token that are read and written where a layer's results are coded, and again where they are decoded."""
        if self._table is None or self.config.memory.compress == "none":
            return 0.0
        return sum(self._table.bytes_kept(kept, self.widths.compute, coded) for coded in (False, True))

    def traffic(self, layer: int, load: Load, shards: int) -> tuple[Traffic, Traffic]:
        """Counts what a layer moves beside its forward and beside its backward: of what it keeps, and of this rank's rows of its
        parameters."""
        table, coded = self._table, self.config.memory.compress != "none"
        size = 0 if table is None else table.bytes_kept(self._kept[layer], self.widths.compute, coded)
        (there, back), (forward, backward) = (
            leaving(self.config, self.tokens * size * load.returns),
            rows(self.config, self.device, load.kept / shards, load.learning * self.widths.parameter / shards),
        )
        return there + forward, back + backward

    @cached_property
    def loads(self) -> Sequence[Load]:
        """Of the pieces of the whole model: what is before its layers, these, and what is behind them."""
        return loads_of(self.config, range(self.config.model.layers))

    @cached_property
    def _kept(self) -> Sequence[frozenset[str]]:
        return kept_of(self.config)

    def gather(self, load: Load, shards: int) -> tuple[float, float]:
        """Estimates the seconds in which parameters are gathered over the ranks that split them: the first time in a step, as codes
        where they cross so, and again, from neighbours where these keep copies."""
        parallel = self.config.parallel
        first = load.gathered * (CODED / self.widths.compute if parallel.quantize_gather != "none" else 1)
        seconds = self.links.collective(first, 1, shards)
        if not parallel.inner_shard:
            return seconds, seconds
        return seconds, self.links.collective(load.gathered, 1, parallel.inner_shard)

    def reduce(self, load: Load, shards: int) -> float:
        """Estimates the seconds in which gradients are summed over the ranks that split them; in codes with neighbours first, and then
        between machines what they have summed."""
        parallel, numbers = self.config.parallel, load.learning
        if parallel.quantize_reduce == "none":
            return self.links.collective(numbers * self.widths.reduce, 1, shards)
        size = numbers * (BITS[parallel.quantize_reduce] / 8 + CODED - 1)
        if not parallel.inner_shard:
            return self.links.exchange(size, 1, shards)
        inner = parallel.inner_shard
        return self.links.exchange(size, 1, inner) + self.links.exchange(size / inner, inner, shards // inner)

    def sharing(self) -> float:
        """Estimates the seconds that the messages of a layer's attention take in its forward; its backward sends as many again."""
        parallel, model = self.config.parallel, self.config.model
        heads, keys = model.heads * model.head_size, model.kv_heads * model.head_size
        size = self.tokens * self.widths.compute
        seconds = 0.0
        if parallel.ulysses > 1:
            seconds += self.links.exchange(size * (2 * heads + 2 * keys), 1, parallel.ulysses)
        if parallel.ring > 1:  # hidden behind the blocks that are looked at meanwhile, or longer than they are
            seen = 4.0 * heads * model.seen(self.config.batch.seq_len)
            looked = seen * self.tokens / self.rate / self.device.reached("attention")
            block = self.links.message(size * 2 * keys, parallel.ulysses)
            seconds += max(0.0, (parallel.ring - 1) * block - looked)
        return seconds
