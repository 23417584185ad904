"""What layers keep between forward and backward: chosen as a knapsack, counted to the byte, and the same numbers. (Laws 2, 4, 5.)"""

import functools
import itertools
import math
import random
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import TypeVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from live_bytes import LiveBytes
from messages import Messages
from parity import (
    VOCABULARY,
    Trace,
    assert_all_same,
    engine_on,
    in_micro_batches,
    run_layouts,
    run_plain,
    small_config,
    with_layout,
)
from rowwise.kernels.attention import causal_attention
from rowwise.kernels.visible import Documents
from rowwise.launch.compose import compose_tree
from rowwise.parallel.activations import saved
from rowwise.parallel.activations.choose import fill, kept_results
from rowwise.parallel.activations.config import MemoryConfig
from rowwise.parallel.activations.recompute import Keeping, recompute_whole
from rowwise.parallel.activations.results import Sharing
from rowwise.parallel.defer import WeightGradients, deferred
from rowwise.parallel.mesh import Mesh, make_mesh
from rowwise.parallel.sequence import attention_on
from rowwise.trainer.activations import kept_of, results_of
from rowwise.trainer.config import TrainConfig
from rowwise.trainer.data.open import open_data
from rowwise.trainer.feed import train_batches
from rowwise.trainer.models.blocks import Block, Layer
from rowwise.trainer.models.config import ModelConfig, model_of
from rowwise.trainer.models.decoder import BLOCKS
from rowwise.trainer.models.rope import rope_tables

Watch = TypeVar("Watch", Messages, LiveBytes)
SMALL = ModelConfig(layers=1, dim=24, heads=4, kv_heads=2, head_dim=6, ffn_dim=20, vocab_size=61)
ALONE = Sharing()


@functools.cache
def preset(name: str) -> ModelConfig:
    return model_of(compose_tree([f"model={name}"])["model"])


# What is chosen.


def best_by_trying(sizes: list[int], gains: list[float], copies: int, room: int) -> float:
    every = itertools.product(range(copies + 1), repeat=len(sizes))
    fits = (c for c in every if sum(n * size for n, size in zip(c, sizes, strict=True)) <= room)
    return max((sum(n * gain for n, gain in zip(c, gains, strict=True)) for c in fits), default=0.0)


@pytest.mark.parametrize("seed", range(40))
def test_no_other_choice_gains_more(seed):
    chance = random.Random(seed)
    kinds, copies = chance.randint(1, 5), chance.randint(1, 4)
    sizes, gains = ([chance.randint(1, 30) for _ in range(kinds)] for _ in range(2))
    room = chance.randint(0, copies * sum(sizes) + 3)
    counts = fill(sizes, gains, copies, room)
    assert all(0 <= n <= copies for n in counts)
    assert sum(n * size for n, size in zip(counts, sizes, strict=True)) <= room
    gained = sum(n * gain for n, gain in zip(counts, gains, strict=True))
    assert gained == best_by_trying(sizes, gains, copies, room)


@pytest.mark.parametrize("share", [0, 0.1, 0.3, 0.55, 0.8, 1])
def test_a_share_of_the_bytes_stays_and_what_stays_is_spread_over_layers(share):
    config, itemsize, seen = preset("llama3_8b"), 2, 4096.5
    layer = Block.results(config, ALONE)
    kept = kept_results(MemoryConfig(share), layer, config.layers, itemsize, seen)
    held = sum(layer.bytes_kept(names, itemsize) for names in kept)
    everything = config.layers * layer.bytes_kept(layer.names, itemsize)
    least = config.layers * layer.bytes_kept(frozenset(), itemsize)
    assert held <= max(share * everything, least)
    assert held > share * everything - 14336 * itemsize, "another result of one layer would have had room"
    of_stages = [sum(layer.bytes_kept(names, itemsize) for names in kept[n : n + 8]) for n in range(0, 32, 8)]
    assert max(of_stages) - min(of_stages) <= layer.bytes_kept(layer.names, itemsize), "stages do not hold alike"


def test_more_room_never_computes_more_again():
    config, layer = preset("llama_1b"), Block.results(preset("llama_1b"), ALONE)
    again = []
    for percent in range(0, 101, 4):
        kept = kept_results(MemoryConfig(percent / 100), layer, config.layers, 2, 1024.5)
        again.append(sum(layer.operations_again(names, 1024.5) for names in kept))
    assert again == sorted(again, reverse=True) and again[-1] == 0
    assert again[0] == config.layers * layer.operations_again(frozenset(), 1024.5)
    # What is elementwise goes first: three tenths of the bytes for less than a hundredth of the operations.
    assert 0 < again[round(25 * 0.72)] < 0.01 * again[0]


def test_selective_keeps_what_products_and_attention_make():
    layer = Block.results(replace(SMALL, qk_norm=True), ALONE)
    (kept,) = kept_results(MemoryConfig("selective"), layer, 1, 4, 8.0)
    assert kept == {"qkv", "y", "h", "gate_up"}
    (kept,) = kept_results(MemoryConfig("full"), Block.results(SMALL, Sharing(ulysses=2)), 1, 4, 8.0)
    assert kept == {"qkv", "y"}, "what messages have brought is not to be made again"


# What is kept.


def made(config: ModelConfig, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Block:
    """A layer with numbers of its own, the same each time."""
    with torch.device(device):
        block = Block(config).to(dtype)
    chance = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in block.parameters() if device == "cpu" else ():
            p.copy_(torch.randn(p.shape, generator=chance, dtype=torch.float64) * 0.3)
    return block


def given(config: ModelConfig, dtype: torch.dtype = torch.float32, device: str = "cpu", tokens: int = 8) -> list:
    """What its forward takes: two sequences."""
    positions = torch.arange(tokens, device=device).expand(2, tokens)
    x = torch.randn(2, tokens, config.dim, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    x = x.to(dtype) if device == "cpu" else torch.empty(x.shape, dtype=dtype, device=device)
    return [x.requires_grad_(), *rope_tables(positions, config.rope, dtype), None, causal_attention]


def bytes_waiting(block: Block, arguments: list) -> int:
    """Of all that waits for the backward, each storage once."""
    with LiveBytes() as live:
        y = block(*arguments)
        beside = arguments[0].untyped_storage().nbytes() - y.untyped_storage().nbytes()
        return live.now() + beside


MODELS, DTYPES = ("llama_1b", "llama3_8b", "qwen3_8b"), (torch.bfloat16, torch.float32, torch.float64)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        pytest.param(name, dtype, marks=[] if MODELS.index(name) == DTYPES.index(dtype) else pytest.mark.full)
        for name, dtype in itertools.product(MODELS, DTYPES)
    ],
    ids=str,
)
def test_the_bytes_of_a_block_are_those_of_its_table(name, dtype):
    """On the meta device, for none, selective, full and several shares, two sequences of 128 tokens."""
    config, tokens = preset(name), 128
    layer = Block.results(config, ALONE)
    block, counted = made(config, dtype, "meta"), {}
    counted["none"] = bytes_waiting(block, given(config, dtype, "meta", tokens)), layer.names
    for recompute in ("selective", "full", 0.2, 0.4, 0.6, 0.8):
        (kept,) = kept_results(MemoryConfig(recompute), layer, 1, dtype.itemsize, (tokens + 1) / 2)
        block.making = Keeping(kept)
        counted[recompute] = bytes_waiting(block, given(config, dtype, "meta", tokens)), kept
    for recompute, (bytes_, kept) in counted.items():
        assert bytes_ == 2 * tokens * layer.bytes_kept(kept, dtype.itemsize), recompute
    assert counted["none"][0] > counted["selective"][0] > counted[0.2][0] > counted["full"][0]


def waiting_on(workers, config: TrainConfig) -> list[tuple[int, int]]:
    """Where ranks share sequences, of several choices: (bytes counted, bytes by the table) of this rank."""
    mesh, model, found = make_mesh(config.parallel, workers), config.model, []
    layer, block = Block.results(model, Sharing(config.parallel.ulysses, config.parallel.ring)), made(model)
    x, *tables, _, _ = given(model, tokens=8)
    for recompute in ("none", "selective", 0.5, "full"):
        (kept,) = kept_results(MemoryConfig(recompute), layer, 1, 4, 8.0)
        block.making = Keeping(kept)
        waiting = bytes_waiting(block, [x, *tables, None, attention_on(mesh)])
        found.append((waiting, 2 * 8 * layer.bytes_kept(kept, 4)))
    return found


@pytest.mark.parametrize("degrees", [{"ulysses": 2}, {"ring": 2}, {"ulysses": 2, "ring": 2}], ids=str)
@pytest.mark.parametrize("normed", [False, True], ids=["", "qk_norm"])
def test_what_messages_have_brought_is_in_the_table(ranks, tmp_path, degrees, normed):
    config = small_config(
        tmp_path, "model.heads=4", "model.kv_heads=2", "model.head_dim=8", f"model.qk_norm={str(normed).lower()}"
    )
    world = math.prod(degrees.values())
    for rank in ranks.run(waiting_on, world, with_layout(config, world, **degrees)):
        assert all(counted == told for counted, told in rank), rank
        assert rank[0][0] > rank[1][0] > rank[3][0]


def backward(block: Block, arguments: list, split: bool = False) -> list[Tensor]:
    """What it gives, and all gradients; `split`: I, and then W."""
    later = WeightGradients()
    with deferred(later) if split else nullcontext():
        y = block(*arguments)
    y.backward(torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y))
    later.run()
    found = [y.detach(), arguments[0].grad, *(p.grad for p in block.parameters())]
    block.zero_grad()
    return found


@pytest.mark.parametrize(
    ("normed", "split"),
    [(False, True), (True, False), *(pytest.param(*(same, same), marks=pytest.mark.full) for same in (False, True))],
)
def test_whatever_is_kept_the_numbers_are_the_same_to_the_last_bit(normed, split):
    """Each choice of what a layer can keep, with documents and without, in one backward and in two."""
    config = replace(SMALL, qk_norm=normed)
    names, block = sorted(Block.results(config, ALONE).names), made(config)
    documents = Documents(((0, 3), (0, 1, 6)))
    plain = {with_: backward(block, with_documents(given(config), with_), split) for with_ in (None, documents)}
    assert all(float(t.abs().max()) > 0 for t in plain[None])
    for n, kept in enumerate(itertools.chain(*(itertools.combinations(names, n) for n in range(len(names) + 1)))):
        block.making = Keeping(frozenset(kept))
        with_ = (None, documents)[n % 2]
        again = backward(block, with_documents(given(config), with_), split)
        assert all(map(torch.equal, again, plain[with_])), kept


def with_documents(arguments: list, documents: Documents | None) -> list:
    return [*arguments[:3], documents, arguments[4]]


class Recorded:
    """A store that keeps copies, and writes down what it is given and asked."""

    def __init__(self):
        self.stored, self.asked = [], []

    def begin_forward(self): ...

    def begin_block(self): ...

    def close(self): ...

    def put(self, tensors):
        number, copies = len(self.stored), tuple(t.clone() for t in tensors)
        self.stored.append(number)

        def back():
            self.asked.append(number)
            return copies

        return back


def stored_block(kept: frozenset[str], monkeypatch) -> tuple[Block, Recorded]:
    """A layer all of whose kept tensors, however small, are stored."""
    monkeypatch.setattr(saved, "LEAST_BYTES", 0)
    block, store = made(SMALL), Recorded()
    keeper = saved.Keeper(store=store)
    block.making = Keeping(kept, keeper)
    keeper.around("0", block)
    return block, store


@pytest.mark.parametrize(
    "kept", [frozenset(), frozenset({"qkv", "y", "h"}), Block.results(SMALL, ALONE).names], ids=len
)
def test_each_result_is_stored_once_and_asked_for_once(kept, monkeypatch):
    """Whatever number of operators take it, and what is made again of it. And the log-sum-exp, and the norms' reciprocals."""
    plain = backward(made(SMALL), given(SMALL))
    block, store = stored_block(kept, monkeypatch)
    assert all(map(torch.equal, backward(block, given(SMALL)), plain))
    tensors = sum({"qkv": 3, "gate_up": 2}.get(name, 1) for name in kept)
    assert len(store.stored) == 1 + tensors + 3 and sorted(store.asked) == store.stored


def test_a_pass_without_gradients_keeps_nothing(monkeypatch):
    block, store = stored_block(frozenset({"y"}), monkeypatch)
    with torch.no_grad():
        block(*given(SMALL))
    assert store.stored == []


def test_a_second_backward_through_the_same_graph_is_the_first():
    block = made(SMALL)
    block.making = Keeping(frozenset({"y"}))
    arguments = given(SMALL)
    y = block(*arguments)
    first, second = (torch.autograd.grad(y.sum(), arguments[0], retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


# Law 2.


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("activations")


STEPS = 2
SHORT = ("batch.global_size=8",)


@functools.cache
def reference(folder: Path, overrides: tuple[str, ...]) -> Trace:
    return run_plain(small_config(folder, *SHORT, *overrides), STEPS)


RIGL = ("sparsity=rigl", "sparsity.update_every=1", "sparsity.stop_at=2")
GROUPS = ("model.dim=32", "model.heads=4", "model.kv_heads=2", "model.ffn_dim=36")
TWO_FOUR = (*GROUPS, "sparsity=nm", "sparsity.account_every=1")
HEADS = ("model.heads=4", "model.kv_heads=2", "model.head_dim=8")
NORMED, EIGHT_BITS = ("model.qk_norm=true",), ("optim=adamw8bit",)
OTHERS = ((), NORMED, RIGL, TWO_FOUR, EIGHT_BITS)
FORMS = ("selective", "full", 0.4)
Case = tuple[str | float, tuple[str, ...]]  # of memory.recompute, and what else is asked for


@pytest.fixture
def law_2(ranks, folder, full):
    """Whether each case on the layout is as one process computes that knows of no recomputation; in full, every form with all
    else that any layout is tried with."""

    def hold(world: int, cases: list[Case], beside: tuple[str, ...] = (), **layout) -> None:
        if full:
            cases = list(itertools.product(FORMS, OTHERS))
        configs = [
            with_layout(small_config(folder, *SHORT, *beside, *options, f"memory.recompute={form}"), world, **layout)
            for form, options in cases
        ]
        configs = [in_micro_batches(config, 4 if "pipeline" in layout else 2) for config in configs]
        everyone = ranks.run(run_layouts, world, configs, STEPS)
        for number, (_, options) in enumerate(cases):
            assert_all_same([traces[number] for traces in everyone], reference(folder, (*beside, *options)))

    return hold


def test_layers_made_again_are_those_of_one_process(law_2):
    law_2(1, [("full", ()), (0.4, NORMED), ("selective", TWO_FOUR)])
    law_2(2, [("full", NORMED), (0.4, RIGL), ("selective", EIGHT_BITS)], zero=3)
    law_2(2, [("full", TWO_FOUR)], zero=2)


def test_layers_made_again_where_ranks_share_sequences(law_2):
    law_2(4, [("full", ()), (0.5, RIGL)], HEADS, ulysses=2, ring=2, zero=3)
    law_2(2, [(0.3, NORMED)], ring=2, zero=1)


SCHEDULES = {  # each with its form, and what else it is tried with
    ("gpipe", 1, 0): ("selective", ()),
    ("1f1b", 1, 3): ("full", EIGHT_BITS),
    ("interleaved_1f1b", 2, 2): (0.4, ()),
    ("zb_h1", 1, 1): (0.4, RIGL),
    ("zb_h2", 1, 3): ("selective", ()),
    ("zb_v", 2, 3): ("full", TWO_FOUR),
    ("blockwise", 2, 3): (0.25, ()),
}
STAGES = ("model.layers=4", "batch.micro_size=1")
ALIKE = ("gpipe", "zb_h2")  # to what is made again, as 1f1b and zb_h1


@pytest.mark.parametrize(
    "name, chunks, zero", [pytest.param(*c, marks=pytest.mark.full) if c[0] in ALIKE else c for c in SCHEDULES]
)
def test_layers_made_again_in_pipelines(law_2, name, chunks, zero):
    layout = {"pipeline": 2, "pipeline_schedule": name, "virtual_stages": chunks, "zero": zero}
    law_2(4 if zero else 2, [SCHEDULES[name, chunks, zero]], STAGES, **layout)


# Messages, and bytes of a run.


def forward_backward(mesh: Mesh, config: TrainConfig, watch: Watch) -> Watch:
    """One forward and backward of a step's micro-batches, under the eyes of `watch`."""
    engine = engine_on(mesh, config)
    batches = next(train_batches(config, mesh, open_data(config.data, config.batch.seq_len, VOCABULARY), 0))
    with watch:
        engine.forward_backward(batches, 1.0)
    return watch


def sent(workers, configs: list[TrainConfig]) -> list[tuple[Counter[str], Counter[str]]]:
    """Of each run, how many messages this rank sends in a step, and of how many bytes."""
    mesh = make_mesh(configs[0].parallel, workers)
    seen = [forward_backward(mesh, config, Messages()) for config in configs]
    return [(messages.calls, messages.bytes) for messages in seen]


def peaks(workers, configs: list[TrainConfig]) -> list[int]:
    """Of each run, the most bytes at once that operations of a step made."""
    mesh = make_mesh(configs[0].parallel, workers)
    return [forward_backward(mesh, config, LiveBytes()).peak for config in configs]


@pytest.mark.parametrize(
    "world, layout",
    [
        (4, {"ulysses": 2, "ring": 2, "zero": 3}),
        (2, {"zero": 3}),
        (4, {"pipeline": 2, "pipeline_schedule": "zb_h1", "zero": 3}),
    ],
    ids=["ulysses 2 x ring 2", "zero 3", "zb_h1"],
)
def test_no_message_is_sent_twice(ranks, folder, world, layout, full):
    """All-to-alls, rings, gathers: as many, of as many bytes, whatever is made again."""
    base = small_config(
        folder, "model.heads=4", "model.kv_heads=2", "model.head_dim=8", "batch.global_size=8", "batch.micro_size=1"
    )
    configs = [
        in_micro_batches(
            with_layout(replace(base, memory=MemoryConfig(recompute)), world, **layout),
            2 if "pipeline" in layout else 1,
        )
        for recompute in ("none", "full", *([0.5] if full or "ulysses" in layout else []))
    ]
    for plain, *others in ranks.run(sent, world, configs):
        assert plain[0] and others == [plain] * (len(configs) - 1)


def test_the_peak_of_a_run_falls_by_what_the_table_says(ranks, folder):
    """Bytes at the height of a step, one process, four layers: what the layers below the one under way keep less."""
    base = small_config(
        folder, "precision=fp32", "model.layers=4", "model.dim=32", "model.heads=4", "model.kv_heads=2", "model.ffn_dim=96",
        "batch.seq_len=64", "batch.global_size=4", "batch.micro_size=4", "parallel.zero=0",
    )  # fmt: skip
    forms = ("none", "selective", 0.4, "full")
    configs = [with_layout(replace(base, memory=MemoryConfig(form)), 1) for form in forms]
    most, *others = ranks.run(peaks, 1, configs)[0]
    tokens, layer = 4 * 64, results_of(configs[0])
    everything = 4 * layer.bytes_kept(layer.names, 4)
    for config, peak in zip(configs[1:], others, strict=True):
        less = everything - sum(layer.bytes_kept(kept, 4) for kept in kept_of(config))
        one = tokens * layer.bytes_kept(layer.names, 4)  # of the layer under way everything is there
        assert tokens * less - one <= most - peak <= tokens * less, config.memory.recompute
        assert peak < most


# Layers of one's own.


class InPlace(Layer):
    """A layer that changes a result which its backward needs."""

    def forward(self, x: Tensor) -> Tensor:
        make = self.making(x)
        return make("out", torch.Tensor.mul_, make("gate", torch.sigmoid, x), 2)


@pytest.mark.parametrize("kept", [None, frozenset(), frozenset({"gate", "out"})])
def test_what_is_changed_in_place_is_refused(kept):
    """As torch refuses it where no hooks are."""
    layer = InPlace(SMALL)
    if kept is None:
        saved.attach(saved.Keeper(), layer, [("0", layer)])
    else:
        layer.making = Keeping(kept)
    with pytest.raises(RuntimeError, match="was changed in place after it was kept"):
        layer(torch.ones(2, requires_grad=True)).sum().backward()


class Own(Layer):
    """Makes nothing by name, and draws numbers."""

    TABLE = MappingProxyType({f"inner.{name}": entry for name, entry in Block.TABLE.items()})
    count = staticmethod(Block.count)

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        self.inner = Block(config)

    def forward(self, x, cos, sin, documents, attend):
        return F.dropout(self.inner(x, cos, sin, documents, attend), 0.5, self.training)


@pytest.mark.parametrize("split", [False, True], ids=["", "split"])
def test_a_layer_that_makes_nothing_by_name_is_made_again_whole(split):
    with torch.device("cpu"):
        layer = Own(SMALL)
    layer.inner.load_state_dict(made(SMALL).state_dict())
    torch.manual_seed(1)
    plain = backward(layer, given(SMALL), split)
    recompute_whole(layer)
    torch.manual_seed(1)
    assert all(map(torch.equal, backward(layer, given(SMALL), split), plain))
    assert bytes_waiting(layer, given(SMALL)) == 2 * 8 * SMALL.dim * 4


@pytest.mark.full
def test_it_may_be_compiled():
    layer = Own(SMALL)
    layer.inner.load_state_dict(made(SMALL).state_dict())
    layer.eval()
    plain = backward(layer, given(SMALL))
    recompute_whole(layer)
    layer.compile(backend="aot_eager")
    assert all(map(torch.equal, backward(layer, given(SMALL)), plain))


@pytest.mark.parametrize(
    "options, said",
    [
        (
            ["memory.recompute=selective"],
            r"memory.recompute=selective with model.block=own: .*give memory.recompute=none or full",
        ),
        (["memory.recompute=0.5"], r"memory.recompute=0.5 with model.block=own: .*give memory.recompute=none or full"),
        (
            ["memory.recompute=full", "parallel.ring=2"],
            r"memory.recompute=full with model.block=own .*messages .*twice; give",
        ),
    ],
)
def test_what_it_cannot_do_is_refused(tmp_path, monkeypatch, options, said):
    monkeypatch.setitem(BLOCKS, "own", Own)
    with_layout(small_config(tmp_path, "model.block=own", "memory.recompute=full"), 2)
    with pytest.raises(ValueError, match=said):
        with_layout(small_config(tmp_path, "model.block=own", *options), 2)
