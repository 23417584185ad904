"""What layers keep as 8-bit codes, on the host, in files: the same forward to the last bit, the same codes and gradients on every
layout, counted bytes. (Laws 2 and 4.)"""

import contextlib
import gc
import os
import weakref
from pathlib import Path
from unittest import mock

import pytest
import torch
from codes import SHARED, all_codes, run_seen, seen_alone

from live_bytes import LiveBytes
from parity import TOLERANCE, relative_error, run_layout, small_config, with_layout
from rowwise.kernels.activation_codes import code_bytes
from rowwise.kernels.attention import causal_attention
from rowwise.kernels.visible import Documents
from rowwise.parallel.activations.compress import Coding, Tokens, named_attention
from rowwise.parallel.activations.offload import LEAVING, Folder, Memory, Offload, Parcel
from rowwise.parallel.activations.recompute import Keeping
from rowwise.parallel.activations.results import Sharing
from rowwise.parallel.activations.saved import Keeper, Stored, attach, begin_sequences
from rowwise.parallel.defer import WeightGradients, deferred
from rowwise.parallel.device import GpuCopies, Host, HostCopies, Moment
from rowwise.trainer.models.blocks import Block
from rowwise.trainer.models.config import ModelConfig
from rowwise.trainer.models.decoder import Decoder

INT8 = "memory.compress=int8"


# Law 2: the same codes, and with them the same gradients, on every layout.

LAYOUTS = {
    "data ranks, smaller micro-batches": (4, {"zero": 3, "replicate": 2}, ("batch.micro_size=1",)),
    "stages, split backwards, half made again": (
        4,
        {"zero": 3, "pipeline": 2},
        ("parallel.pipeline_schedule=zb_h1", "memory.recompute=0.5"),
    ),
    "heads and tokens shared": (4, {"zero": 3, "ulysses": 2, "ring": 2}, ()),
    "more ranks than key heads, whole sequences": (2, {"zero": 1, "ulysses": 2}, ("data.mask_documents=false",)),
}


@pytest.fixture(scope="module")
def alone(ranks, tmp_path_factory):
    """A step of one process, by what else is asked for."""
    folder = tmp_path_factory.mktemp("forms")
    return folder, seen_alone(ranks, folder, 1)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_codes_and_gradients_are_those_of_one_process(ranks, alone, layout):
    folder, run = alone
    world, degrees, words = LAYOUTS[layout]
    same = tuple(word for word in words if word.startswith(("data.", "memory.")))
    reference, codes = run(INT8, *same)
    everyone = ranks.run(run_seen, world, with_layout(small_config(folder, *SHARED, INT8, *words), world, **degrees), 1)
    assert all_codes(everyone) == codes and len(codes) > 1000
    one = everyone[0][0]
    assert abs(one.losses[0] - reference.losses[0]) <= TOLERANCE
    for name, gradient in reference.gradients[0].items():
        assert relative_error(one.gradients[0][name], gradient) <= TOLERANCE, name


def test_the_forward_is_exact_and_gradients_are_near(alone):
    """To the last bit; and the codes are no decoration."""
    _, run = alone
    (exact, none), (coded, codes) = run(), run(INT8)
    assert coded.losses == exact.losses and codes and not none
    errors = [relative_error(coded.gradients[0][name], g) for name, g in exact.gradients[0].items()]
    assert 1e-4 < max(errors) < 0.1


def test_where_sums_are_in_one_order_float32_is_the_same_to_the_last_bit(ranks, tmp_path):
    """On the stages of a pipeline, where each micro-batch is one of one process's. (The fused loss has an order of its own there.)"""
    words = ("precision=fp32", "model.layers=4", "batch.global_size=8", "memory.fused_loss=false", INT8)
    one = ranks.run(run_layout, 1, with_layout(small_config(tmp_path, *words), 1, zero=0), 1)[0]
    four = ranks.run(run_layout, 4, with_layout(small_config(tmp_path, *words), 4, zero=0, pipeline=4), 1)[0]
    assert four.losses == one.losses
    for name, gradient in one.gradients[0].items():
        assert torch.equal(four.gradients[0][name], gradient), name


AWAY = {
    "cpu, whole": ("cpu", 4, {"zero": 3}, ()),
    "files, split backwards, half made again": (
        "FOLDER",
        4,
        {"zero": 3, "pipeline": 2},
        ("parallel.pipeline_schedule=zb_h1", "memory.recompute=0.5"),
    ),
    "half of it in files, some made again": (
        "FOLDER",
        2,
        {"zero": 3, "pipeline": 2},
        ("parallel.pipeline_schedule=zb_h1", "memory.recompute=0.7", "memory.offload_share=0.5"),
    ),
    "files, sequences shared, as codes": ("FOLDER", 4, {"zero": 3, "ulysses": 2, "ring": 2}, (INT8,)),
}


@pytest.mark.parametrize("where", AWAY)
def test_what_was_away_is_what_it_was(ranks, alone, where):
    """Documents, ZeRO 3: what is offloaded changes nothing, in float64."""
    folder, run = alone
    place, world, degrees, words = AWAY[where]
    away = f"memory.offload_activations={place.replace('FOLDER', str(folder))}"
    config = with_layout(small_config(folder, *SHARED, away, *words), world, **degrees)
    trace = ranks.run(run_layout, world, config, 1)[0]
    reference, _ = run(*(word for word in words if word == INT8))
    for name, gradient in reference.gradients[0].items():
        assert relative_error(trace.gradients[0][name], gradient) <= TOLERANCE, name


# Law 4: what waits for the backward.

SMALL = ModelConfig(layers=6, dim=64, heads=4, kv_heads=2, ffn_dim=96, vocab_size=61)
TOKENS, SEQUENCES = 32, 2


def kept_model(keeper: Keeper, config: ModelConfig = SMALL) -> Decoder:
    torch.manual_seed(0)
    model = Decoder(config)
    attach(keeper, model, list(model.blocks.items()))
    model.attend = named_attention(keeper, causal_attention, config.kv_heads)
    return model


def coding_keeper(**more) -> Keeper:
    places = torch.arange(TOKENS)
    tokens = Tokens(TOKENS, places, places)
    return Keeper(lambda layer, first, x: Coding(0, tokens, layer, first, x), **more)


def batch(documents: bool = False):
    tokens = torch.randint(0, 61, (SEQUENCES, TOKENS), generator=torch.Generator().manual_seed(1))
    marks = Documents(((0, 5), (0, 11))) if documents else None
    return tokens, torch.arange(TOKENS).expand_as(tokens), marks


@pytest.fixture
def files(tmp_path):
    """A store in files."""
    store = Offload(HostCopies(), Folder(tmp_path, Host()))
    yield store
    store.close()


def gradients(model: Decoder, documents: bool = False, **how) -> dict[str, torch.Tensor]:
    model.zero_grad()
    begin_sequences(model, 3)
    model(*batch(documents), **how).square().mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def held(model: Decoder, of: slice = slice(None)) -> int:
    """Bytes that live after a forward and would not without gradients."""
    with LiveBytes() as live:
        begin_sequences(model, 0)
        x = torch.randn(SEQUENCES, TOKENS, SMALL.dim, requires_grad=True)
        cos, sin = torch.ones(SEQUENCES, TOKENS, 16), torch.zeros(SEQUENCES, TOKENS, 16)
        given = live.now()
        for block in list(model.blocks.values())[of]:
            x = block(x, cos, sin, None, model.attend)
        gc.collect()
        found = live.now() - given - x.nbytes
        x.sum().backward()
    return found


def bytes_of_codes(config: ModelConfig) -> int:
    """Of a token in a block, by hand: x, n1, h, n2; queries and outcome; keys and values; gate, up and product."""
    wide, size = code_bytes(config.dim), config.head_size
    heads, keys = (code_bytes(n * size, size) for n in (config.heads, config.kv_heads))
    return 4 * wide + 2 * heads + 2 * keys + 3 * code_bytes(config.ffn_dim)


def test_codes_take_the_bytes_of_the_formula():
    few = 4 * (2 + SMALL.heads)  # two reciprocal roots and the log-sum-exp of a token, in float32
    blocks, tokens = SMALL.layers, SEQUENCES * TOKENS
    # The first block's input is the caller's, and stays beside its codes.
    assert held(kept_model(coding_keeper())) == blocks * tokens * (bytes_of_codes(SMALL) + few)


@pytest.mark.parametrize("documents", [False, True])
def test_forms_and_places_go_together(documents, files):
    """As they are, as codes, on the host, in files; and what is coded is coded alike wherever it waits."""
    exact = gradients(kept_model(Keeper()), documents)
    stores = [None, Offload(HostCopies(), Memory()), files]
    coded = [gradients(kept_model(coding_keeper(store=store)), documents) for store in stores]
    away = [gradients(kept_model(Keeper(store=store)), documents) for store in stores[1:]]
    for name, gradient in exact.items():
        assert all(torch.equal(found[name], gradient) for found in away)
        assert all(torch.equal(found[name], coded[0][name]) for found in coded)
        assert 0 < relative_error(coded[0][name], gradient) < 0.1 or name in ("norm.weight", "head.weight"), name


def split_backward(keeper: Keeper) -> tuple[int, list[torch.Tensor]]:
    """I, then W, of a block that keeps its results with `keeper`: bytes held between them beside gradients, and the gradients."""
    model = kept_model(keeper, ModelConfig(layers=1, dim=64, heads=4, kv_heads=2, ffn_dim=96, vocab_size=61))
    block, later = model.blocks["0"], WeightGradients(keeper.read.hold)
    chance = torch.Generator().manual_seed(2)
    x = torch.randn(SEQUENCES, TOKENS, 64, generator=chance, requires_grad=True)
    cos, sin = torch.ones(SEQUENCES, TOKENS, 16), torch.zeros(SEQUENCES, TOKENS, 16)
    with LiveBytes() as live:
        given = live.now()
        with deferred(later):
            y = block(x, cos, sin, None, model.attend)
        y.backward(torch.ones_like(y))
        del y
        gc.collect()
        between = live.now() - given - sum(t.grad.nbytes for t in (x, *block.parameters()) if t.grad is not None)
    later.run()
    return between, [x.grad, *(p.grad for p in block.parameters())]


def test_between_the_two_backwards_codes_stay_codes(files):
    """W needs the inputs of linear layers and the gradients of their outputs, and nothing is wider for having been read in I."""
    exact, gradients_exact = split_backward(Keeper())
    coded, gradients_coded = split_backward(coding_keeper())
    away, gradients_away = split_backward(coding_keeper(store=files))
    tokens, inputs = SEQUENCES * TOKENS, 3 * 64 + 96  # n1, the outcome of attention, n2, the product
    assert exact - coded == tokens * (4 * inputs - 2 * code_bytes(64) - code_bytes(64, 16) - code_bytes(96))
    assert away <= coded
    for ours, theirs, right in zip(gradients_away, gradients_coded, gradients_exact, strict=True):
        assert torch.equal(ours, theirs) and 0 < relative_error(theirs, right) < 0.1


def test_between_the_two_backwards_what_the_block_was_given_is_gone():
    """No weight's gradient needs it, and what they need does not know how it was made."""
    model = kept_model(Keeper())
    block, later = model.blocks["0"], WeightGradients()
    x = torch.randn(SEQUENCES, TOKENS, SMALL.dim, requires_grad=True)
    with deferred(later):
        y = block(x, torch.ones(SEQUENCES, TOKENS, 16), torch.zeros(SEQUENCES, TOKENS, 16), None, model.attend)
    y.sum().backward()
    given = weakref.ref(x)
    del x, y
    gc.collect()
    assert given() is None
    later.run()
    assert block.attention.wq.weight.grad is not None


@pytest.mark.parametrize("place", [None, Memory])
def test_what_was_kept_goes_with_the_backward(place):
    """And not when Python looks for circles, which may be many steps later. Nor does a forward without a backward leave any."""
    model = kept_model(coding_keeper(store=Offload(HostCopies(), place()) if place else None))
    gc.collect()
    gc.disable()
    try:
        gradients(model)
        begin_sequences(model, 0)
        model(*batch())
        assert not [one for one in gc.get_objects() if type(one) in (Stored, Parcel)]
    finally:
        gc.enable()


# What is away.


def test_files_have_no_name_and_are_gone_when_the_backward_is(files, tmp_path):
    """So nothing is left of a run that is killed."""
    model = kept_model(Keeper(store=files))
    begin_sequences(model, 0)
    loss = model(*batch()).square().mean()
    finish(files)
    (file,) = open_in(tmp_path)
    assert file.st_nlink == 0 and file.st_size > 4 * SMALL.layers * SEQUENCES * TOKENS * 600
    assert not list(tmp_path.iterdir())
    loss.backward()
    del loss
    begin_sequences(model, 0)  # the next forward has a file of its own
    finish(files)
    assert not open_in(tmp_path)


def finish(files: Offload) -> None:
    """Waits until its threads have nothing to do: each does one thing after the other."""
    for pool in (files._shelf._writer, files._shelf._reader):
        pool.submit(int).result()


def open_in(folder: Path) -> list[os.stat_result]:
    """The files of a folder that this process has open, whether they have a name or not."""
    found = []
    for descriptor in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):  # closed meanwhile
            if str(descriptor.readlink()).startswith(str(folder)):
                found.append(descriptor.stat())
    return found


def test_a_folder_that_is_gone_is_named(tmp_path):
    store = Offload(HostCopies(), Folder(tmp_path / "gone", Host()))
    with pytest.raises(
        OSError, match=r"memory.offload_activations=\S+gone cannot be written .*; give another"
    ) as raised:
        gradients(kept_model(Keeper(store=store)))
    assert raised.value.filename == str(tmp_path / "gone")  # by which one line tells it
    store.close()


def test_threads_of_files_have_their_device(tmp_path):
    """What a thread asks of another GPU than its own makes a context there."""
    asked = mock.Mock(pins=False)
    store = Offload(HostCopies(), Folder(tmp_path, asked))
    gradients(kept_model(Keeper(store=store)))
    store.close()
    assert asked.own_stream.call_count == 2  # one writes, one reads


class Counted:
    """A store that counts what is put there."""

    def __init__(self):
        self.bytes = 0

    def begin_forward(self): ...

    def begin_block(self): ...

    def put(self, tensors):
        self.bytes += sum(t.nbytes for t in tensors)
        return lambda: tensors


@pytest.mark.parametrize("leaves", [frozenset(), frozenset({"y", "gate_up"})])
def test_what_is_not_to_leave_stays(leaves):
    """The input of a layer leaves whatever is chosen; with what attention gives goes its log-sum-exp."""
    for make in (Keeper, coding_keeper):
        keeper = make(store=Counted())
        model, names = kept_model(keeper), Block.results(SMALL, Sharing()).names
        for block in model.blocks.values():
            block.making = Keeping(names, keeper, leaves=leaves)
        whole, found = gradients(kept_model(make())), gradients(model)
        assert all(torch.equal(found[name], gradient) for name, gradient in whole.items())
        numbers = SMALL.dim + (2 * SMALL.ffn_dim + SMALL.dim + SMALL.heads if leaves else 0)
        codes = code_bytes(SMALL.dim) + (2 * code_bytes(SMALL.ffn_dim) + code_bytes(SMALL.dim, 16) if leaves else 0)
        of_a_token = 4 * numbers if make is Keeper else codes + 4 * SMALL.heads * bool(leaves)
        assert keeper.store.bytes == SMALL.layers * SEQUENCES * TOKENS * of_a_token


def test_of_what_is_in_files_the_device_holds_two_blocks(files):
    """However many there are."""
    block = held(kept_model(Keeper()), slice(1)) + SEQUENCES * TOKENS * SMALL.dim * 4
    away = held(kept_model(Keeper(store=files)))
    # Two blocks that are leaving, and their copies on the way to the file.
    assert away <= 2 * LEAVING * block < SMALL.layers * block


class SlowCopies(HostCopies):
    """A device whose copies are done only when somebody waits for them; until then the host has garbage."""

    def __init__(self):
        self.done: dict[int, list] = {}
        self.away_bytes, self.most, self.order = 0, 0, []

    def away(self, t):
        here, mark = torch.full_like(t, 111), Moment(len(self.done))
        self.done[id(mark)] = [here, t, mark]
        self.away_bytes += t.nbytes
        self.most = max(self.most, self.away_bytes)
        return here, mark

    def back(self, here):
        t, mark = torch.full_like(here, 111), Moment(0)
        self.done[id(mark)] = [t, here, mark]
        return t, mark

    def join(self, t, mark):
        into, source, _ = self.done.pop(id(mark))
        into.copy_(source)
        self.away_bytes -= into.nbytes if t is source else 0


def test_nothing_is_let_go_of_or_used_before_its_copy_is_done():
    """A device that takes its time: numbers are right, and what is leaving is bounded."""
    copies = SlowCopies()
    exact, away = gradients(kept_model(Keeper())), gradients(kept_model(Keeper(store=Offload(copies, Memory()))))
    for name, gradient in exact.items():
        assert torch.equal(away[name], gradient), name
    total = held(kept_model(Keeper())) + SEQUENCES * TOKENS * SMALL.dim * 4
    assert 0 < copies.most <= total * (LEAVING + 1) / SMALL.layers


class Stream:
    """A stream of CUDA that writes down whom it waits for."""

    def __init__(self, said: list[str], name: str):
        self.said, self.name = said, name

    def wait_stream(self, other):
        self.said.append(f"{self.name} waits for {other.name}")

    def wait_event(self, event):
        self.said.append(f"{self.name} waits for {event}")

    def record_event(self):
        return f"an event of {self.name}"


def test_a_gpu_copies_what_is_computed_and_computes_with_what_is_copied(monkeypatch):
    said: list[str] = []
    names, now = iter(("out", "back")), Stream(said, "computation")
    empty_like = torch.empty_like
    monkeypatch.setattr(torch.cuda, "Stream", lambda _: Stream(said, next(names)))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: now)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext(said.append(f"in {stream.name}")))
    monkeypatch.setattr(torch, "empty_like", lambda t, **_: empty_like(t))  # pinned only where there is a GPU
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda t, stream: said.append(f"used by {stream.name}"))
    copies, t = GpuCopies(torch.device("cpu")), torch.arange(5.0)
    here, left = copies.away(t)
    copies.join(t, left)
    again, came = copies.back(here)
    copies.join(again, came)
    assert torch.equal(again, t)
    assert said == [
        "out waits for computation", "in out", "computation waits for an event of out", "used by computation",
        "back waits for out", "in back", "computation waits for an event of back", "used by computation",
    ]  # fmt: skip
