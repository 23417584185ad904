"""What a run is forecast to hold is what it holds, by category (law 4); how long it takes, and what fits."""

import json
import random
from dataclasses import replace

import pytest
import torch
from cases import case_config, read_cases, write_times
from forecasts import bounds_of, draw, errors, forecast_config, held_in_a_step, off

from parity import small_config, with_layout
from rowwise.kernels.attention import causal_attention
from rowwise.launch.compose import compose_tree
from rowwise.parallel.activations.results import INPUT, Sharing
from rowwise.trainer.check import check
from rowwise.trainer.config import config_from_tree
from rowwise.trainer.models.blocks import Block, Layer
from rowwise.trainer.models.decoder import BLOCKS, Decoder, parameter_specs, stage_parts
from rowwise.trainer.plan.away import Keeping
from rowwise.trainer.plan.devices import DEVICES, device_named
from rowwise.trainer.plan.fit import find_fit
from rowwise.trainer.plan.forecast import Forecast, forecast, plan_for
from rowwise.trainer.plan.layer import ALL, Kept, Moment, moments, weight_gradients
from rowwise.trainer.plan.ledger import CATEGORIES, Ledger
from rowwise.trainer.plan.memory import Memory, memory_of
from rowwise.trainer.plan.require import require_fit
from rowwise.trainer.plan.reserve import room_of
from rowwise.trainer.plan.sharded import Sharded
from rowwise.trainer.plan.states import Group, Widths
from rowwise.trainer.plan.update import StepBytes
from rowwise.trainer.plan.works import Work
from runs import named, run_watched

# Few operations each, and between them every way in which parameters, gradients and activations come and go.
RUNS = {
    "buckets": (1, ["memory.fused_loss=false", "batch.global_size=4", "optim=galore"]),
    "zero 3, recomputed": (2, ["parallel.zero=3", "memory.recompute=full", "optim=adamw8bit", "batch.global_size=8",
                               "average.ema=0.9"]),
    "16 bits, replicas": (2, ["parallel.zero=2", "parallel.replicate=2", "precision=bf16", "batch.seq_len=32",
                             "memory.compress=int8"]),
    "shared sequences": (2, ["parallel.ulysses=2", "parallel.zero=2", "sparsity=static", "batch.global_size=2",
                             "memory.offload_activations=cpu", "model.layers=3"]),
    "split backwards": (2, ["parallel.pipeline=2", "parallel.pipeline_schedule=zb_v", "model.layers=4", "parallel.virtual_stages=2",
                            "memory.recompute=selective", "memory.compress=int8", "batch.global_size=6"]),
    "a rule that exchanges": (2, ["parallel.zero=3", "optim=muon", "batch.seq_len=16", "batch.micro_size=1",
                                 "batch.global_size=2"]),
    "in the backward": (2, ["optim.in_backward=true", "clip_norm=0", "parallel.zero=3", "average.ema=0.9",
                            "average.dtype=bf16", "batch.global_size=4",
                            "model.tie_embeddings=true", "optim=adafactor"]),
    "in files": (2, ["parallel.zero=3", "memory.offload_states=FOLDER", "memory.offload_params=FOLDER",
                     "memory.offload_gradients=FOLDER", "batch.global_size=8", "optim=adamw8bit"]),
    "stages in files": (2, ["parallel.pipeline=2", "parallel.pipeline_schedule=gpipe", "model.layers=4", "model.tie_embeddings=true",
                            "parallel.zero=3", "memory.recompute=0.3", "memory.offload_activations=cpu",
                            "memory.offload_states=FOLDER", "memory.offload_params=FOLDER", "memory.offload_gradients=FOLDER"]),
    "on the host, one rank": (1, ["parallel.zero=3", "memory.offload_states=cpu", "memory.offload_params=cpu", "optim=lion",
                                  "batch.global_size=4"]),
    "codes and copies": (2, ["parallel.zero=3", "parallel.quantize_gather=int8", "parallel.inner_shard=1", "batch.global_size=8",
                             "precision=bf16", "batch.seq_len=32"]),
    "windows and caps": (2, ["parallel.ring=2", "parallel.zero=1", "model.window=24", "model.window_layers=[true,false]",
                             "model.attention_cap=30", "model.logit_cap=30"]),
    "sums in codes": (2, ["parallel.zero=2", "parallel.quantize_reduce=int4", "batch.global_size=8"]),
    "adapters": (2, ["parallel.zero=3", "adapter=lora", "adapter.rank=16", "adapter.train=[head.weight]", "batch.global_size=4",
                     "model.frozen_dtype=nf4"]),
    "adapters that drop": (1, ["parallel.zero=0", "adapter=dora", "adapter.rank=64", "adapter.dropout=0.1", "batch.global_size=4",
                               "model.frozen_dtype=int8"]),
    "adapters, split backwards": (2, ["parallel.pipeline=2", "parallel.pipeline_schedule=zb_v", "parallel.virtual_stages=2",
                                      "model.layers=4", "adapter=lora", "adapter.rank=64", "batch.global_size=6",
                                      "model.frozen_dtype=bf16"]),
    "triplets": (2, ["parallel.zero=1", "adapter=adalora", "adapter.rank=128", "batch.seq_len=16", "batch.micro_size=1",
                     "batch.global_size=2", "data.mask_documents=false"]),
    "bits of each": (1, ["adapter=lq_lora", "adapter.bits=3.3", "adapter.train=[head.weight]", "batch.global_size=2"]),
    "bone, made again": (2, ["parallel.zero=3", "adapter=bone", "adapter.rank=256", "memory.recompute=full", "model.norms=after",
                             "batch.global_size=8"]),
    "layers that are frozen, and tiles": (1, ["model.attention_cap=30", "data.mask_documents=false", "batch.global_size=4",
                      "optim.assign=[{match: 'embed.*', rule: frozen}, {match: 'blocks.0.*', rule: frozen}, "
                      "{match: 'blocks.1.attention*', rule: frozen}]"]),
    "what is frozen": (2, ["parallel.zero=2", "batch.global_size=4",
                          "optim.assign=[{match: 'embed.*', rule: frozen}, {match: 'head.*', rule: frozen}]"]),
    "whole parameters, in the backward": (1, ["optim.in_backward=true", "clip_norm=0", "batch.micro_size=4", "batch.global_size=4",
                                             "parallel.zero=0", "optim=muon"]),
}  # fmt: skip


@pytest.mark.parametrize("run", RUNS)
def test_a_rank_holds_what_it_is_said_to(ranks, tmp_path, run):
    world_size, words = RUNS[run]
    words = [word.replace("FOLDER", str(tmp_path)) for word in words]
    config = forecast_config(tmp_path, world_size, "batch.seq_len=64", "model.layers=2", *words)
    for measured, predicted, moment in ranks.run(held_in_a_step, world_size, config):
        found = errors(measured, predicted, bounds_of(config))
        assert not off(found), (off(found), measured, predicted, moment)
        assert len(found) >= 5, "categories are large enough to be looked at"


@pytest.mark.full
@pytest.mark.parametrize("number", range(60))
def test_what_is_drawn_holds_what_it_is_said_to(ranks, tmp_path, number):
    drawn = draw(tmp_path, random.Random(number))
    for measured, predicted, moment in ranks.run(held_in_a_step, drawn.world_size, drawn.config):
        found = off(errors(measured, predicted, bounds_of(drawn.config)))
        assert not found, (found, measured, predicted, moment, drawn.words)


def test_gradients_that_are_added_up_in_32_bits_are_there_one_by_one():
    """Those of the embedding come before the layer's, whose weights' are put off, and both are of one group."""
    ledger = Ledger()
    group = Group((0, 1), ((0, "embedding", 1000), (1, "layer", 3000)), 4000, 4000, True, True, True)
    stage = Sharded(ledger, [group], Widths(4, 2, 2, 4), 1, (1, 1), sums=True)
    stage.begin(False)
    for piece in (0, 1, 1):
        stage.add_gradients(piece, ALL)
        stage.add_up()
    assert ledger.now["gradients"] == 4 * 4000 and ledger.peaks["gradients"] == 4 * 4000 + 2 * 3000


def test_a_step_in_the_backward_is_made_of_each_group_beside_its_gradients():
    ledger, steps = Ledger(), {"first": StepBytes(100, 40), "second": StepBytes(7000, 0)}
    numbers = {"first": 8000, "second": 1000}
    groups = [
        Group((n, n), ((n, name, count),), count, count // 2, False, False, False)
        for n, (name, count) in enumerate(numbers.items())
    ]
    weights = Sharded(ledger, groups, Widths(4, 4, 4, 4), 3, (2, 1), updates=steps)
    weights.begin(True)
    for piece in (0, 1):
        weights.enter(piece)
        weights.leave(piece)
    weights.end_forward()
    for piece in (1, 0):
        weights.enter_back(piece)
        weights.add_gradients(piece, ALL)
        weights.leave_back(piece)
    weights.end_backward()
    # The first group's gradients, whole and this rank's rows, what it was reduced from, and its own parameter's step.
    assert ledger.most == 4 * (8000 + 4000 + 8000) + 100 and ledger.now["gradients"] == 0
    assert ledger.peaks["working"] == 7000


def test_weights_gradients_that_come_later_let_go_of_what_they_used():
    """Those of a feed-forward's two inner weights are there together, when both their outputs' gradients have been."""
    backward = [
        Moment(0, 0, deferred, parameters) for deferred, parameters in ((3, 0), (5, 1), (9, 1), (9, 3), (9, ALL))
    ]
    assert list(weight_gradients(backward)) == [(0, 0), (1, 3), (1, 3), (3, 9), (ALL, 9)]


def test_what_was_away_comes_back_ahead_of_its_backward_or_as_it_is_read():
    """A stage of two layers, of which nothing is left: its last comes one result at a time, the other while that is differentiated."""
    ledger, results = Ledger(), (60, 40)
    ends = Moment(sum(results), 0, 0, ALL)
    work = Work("", 100, 0, (Moment(0, 0, 0, 0, *results), Moment(60, 0, 0, 0, 40), ends), away=100)
    keeping = Keeping(ledger, files=True, returns=True)
    first, last, *_ = visits = [keeping.begin(work) for _ in range(4)]
    assert [visit.here for visit in visits] == [0, 0, 100, 100]

    def there(visit):
        return [keeping.read(visit, visit.here, moment) or ledger.now["working"] for moment in work.backward]

    keeping.approach([first, last])
    assert there(last) == [100 + 60, 100 + 40, 100]
    keeping.end(last, 0)
    keeping.approach([first])
    assert there(first) == [100, 40, 0] and ledger.peaks["activations"] == 200


@pytest.mark.parametrize("coded", [False, True])
def test_all_that_a_layer_keeps_is_read_or_read_later(tmp_path, coded):
    config = forecast_config(tmp_path, 1, "model.qk_norm=true", f"memory.compress={'int8' if coded else 'none'}")
    table = BLOCKS["llama"].results(config.model, Sharing())
    work, kept = BLOCKS["llama"].work(config.model, 4, False), Kept(table.names, 4, coded)
    every = moments(table, kept, work, split=True)
    assert every[0].read + every[0].unread == table.bytes_kept(table.names, 4, coded)
    assert every[-1].read == every[-1].unread == 0
    assert any(moment.decoding for moment in every) == coded


def test_a_prediction_that_is_off_is_found():
    held = {"parameters": 2_000_000, "loss": 10, "total": 10_000_000}
    assert off(errors(held, {**held, "parameters": 2_200_000}))
    assert off(errors(held, {**held, "total": 10_300_000}))
    assert not off(errors(held, {**held, "loss": 1_000}))
    assert off(errors(held, {**held, "loss": 2_000_000}))


def one_step(workers, config):
    from rowwise.parallel.lifetimes import Lifetimes

    seen = []
    original = Lifetimes.__enter__
    Lifetimes.__enter__ = lambda self: seen.append(self) or original(self)
    try:
        state = run_watched(workers, config)
    finally:
        Lifetimes.__enter__ = original
    return state.step, len(seen)


def test_every_run_keeps_both_and_its_numbers_are_the_same(ranks, tmp_path):
    """memory.json of every rank; and the records of a run whose first step is watched are those of one that is compiled, or not
    watched at all: a resumed one's, whose first step is another."""
    config = small_config(tmp_path, "precision=fp32", "steps=2", "checkpoint.every=1")
    whole = named(with_layout(config, 2, zero=3), tmp_path, "whole")
    assert ranks.run(one_step, 2, whole) == [(2, 1)] * 2, "one step is watched"
    document = json.loads((tmp_path / "whole" / "memory.json").read_text())
    for rank in document["ranks"]:
        assert rank["measured"].keys() == rank["predicted"].keys() >= {"parameters", "activations", "loss", "total"}
        for key in ("parameters", "optimizer", "gathered", "gradients", "activations"):
            assert rank["predicted"][key] == pytest.approx(rank["measured"][key], rel=0.05), key
        assert rank["moment"]
    first = named(replace(with_layout(config, 2, zero=3), steps=1), tmp_path, "parts")
    ranks.run(one_step, 2, first)
    ranks.run(one_step, 2, replace(first, steps=2))
    records = [
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("whole", "parts")
    ]
    assert [r["loss"] for r in records[0]] == [r["loss"] for r in records[1]]
    assert [r["grad_norm"] for r in records[0]] == [r["grad_norm"] for r in records[1]]


class Silent(Block):
    """A layer with a table of results that does not tell what its backward holds."""

    work = Layer.work


class Own(Block):
    """A layer whose backward holds ten times as much on the way."""

    @staticmethod
    def work(config, width, gpu):
        known = Block.work(config, width, gpu)
        pieces = (replace(piece, during=10 * piece.during, linears=()) for piece in known.backward)
        return replace(known, backward=tuple(pieces))


UNKNOWN = {
    (
        "adapter=lora",
        "model.block=own",
    ): r"model\.block=own: its layers do not say which linear layers their backward goes through",
}


def test_a_layer_of_ones_own_is_forecast_by_what_it_says(tmp_path, monkeypatch):
    monkeypatch.setitem(BLOCKS, "silent", Silent)
    monkeypatch.setitem(BLOCKS, "own", Own)
    plain, silent, own = (forecast_config(tmp_path, 1, f"model.block={name}") for name in ("llama", "silent", "own"))
    with pytest.raises(ValueError, match=r"model\.block=silent: its layers do not say what their backward holds; give"):
        memory_of(silent, 0, False, None)
    some = forecast_config(tmp_path, 1, "memory.offload_activations=cpu", "memory.offload_share=0.5")
    with pytest.raises(
        ValueError, match=r"memory\.offload_share=0\.5: which results then stay on the device is not forecast"
    ):
        memory_of(some, 0, False, None)
    for words, why in UNKNOWN.items():
        with pytest.raises(ValueError, match=why):
            memory_of(forecast_config(tmp_path, 1, *words), 0, False, None)
    before, after = (memory_of(config, 0, False, None).peaks for config in (plain, own))
    assert after["working"] > 5 * before["working"] and after["activations"] == before["activations"]


@pytest.mark.parametrize("qk_norm", [False, True])
def test_the_table_of_a_layer_says_what_each_result_is_made_of(tmp_path, qk_norm):
    config = replace(small_config(tmp_path).model, qk_norm=qk_norm)
    block, x = Block(config), torch.randn(1, 4, config.dim)
    storages, found = {x.untyped_storage().data_ptr(): INPUT}, {}

    def making(given):
        return make

    def make(name, function, *given):
        tensors = [t for t in given if isinstance(t, torch.Tensor)]
        found[name] = {storages[key] for t in tensors if (key := t.untyped_storage().data_ptr()) in storages}
        made = function(*given)
        for t in [made] if isinstance(made, torch.Tensor) else made:
            storages.setdefault(t.untyped_storage().data_ptr(), name)
            kept.append(t)  # or its place would be another's
        return made

    kept, block.making = [], making
    cos, sin = torch.ones(1, 4, config.head_size), torch.zeros(1, 4, config.head_size)
    block(x, cos, sin, None, causal_attention)
    for result in Block.results(config, Sharing()).results:
        assert set(result.of) == found[result.name], result.name


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("layers", [range(4), range(2), range(1, 3), range(2, 4)])
def test_the_parts_of_a_stage_are_those_of_its_decoder(tmp_path, tied, layers):
    config = replace(small_config(tmp_path).model, layers=4, tie_embeddings=tied, stable_embedding=True)
    with torch.device("meta"):
        model = Decoder(config, layers)
    parts, rest = stage_parts(config, layers)
    names = {id(p): name for name, p in model.named_parameters()}
    built = [[names[id(p)] for module in part for p in module.parameters()] for part in model.parts()]
    assert [list(part) for part in parts] == built
    left = [name for name in names.values() if not any(name in part for part in built)]
    assert sorted(rest) == sorted(left)
    shapes = {name: p.shape for name, p in model.named_parameters()}
    assert {name: spec.shape for part in [*parts, rest] for name, spec in part.items()} == shapes
    assert all(name in parameter_specs(config) or name == "head.weight" for name in shapes)


def planned(*words: str, world_size: int = 8, device: str = "h100"):
    base = ["precision=bf16", "eval.every=0", "batch.seq_len=4096"]
    return forecast(check(config_from_tree(compose_tree([*base, *words])), world_size), DEVICES[device])


def test_bits_that_are_not_chosen_yet_are_those_that_there_are():
    """Of LQ-LoRA: the same matrices in four bits take more by what the others have less."""
    peaks = {
        bits: planned(
            "model=llama3_8b", "adapter=lq_lora", f"adapter.bits={bits}", "batch.micro_size=1", world_size=1
        ).worst.peaks
        for bits in (3.4, 4.0)
    }
    numbers = 32 * (2 * 4096 * 4096 + 2 * 1024 * 4096 + 3 * 14336 * 4096)
    more = peaks[4.0]["parameters"] - peaks[3.4]["parameters"]
    assert more == pytest.approx(0.6 / 8 * numbers, rel=0.01)


def test_what_is_split_or_made_again_is_not_held():
    """8B on 8 devices: each option takes what it is said to, and costs what it must."""
    plain = planned("model=llama3_8b", "batch.global_size=64", "batch.micro_size=2", "parallel.zero=3")
    full = planned(
        "model=llama3_8b", "batch.global_size=64", "batch.micro_size=2", "parallel.zero=3", "memory.recompute=full"
    )
    layer = 2 * 4096 * 2 * 4096  # tokens x bytes x width: what goes into a layer
    assert plain.worst.peaks["parameters"] == pytest.approx(4 * 8.03e9 / 8, rel=0.01)
    assert plain.worst.peaks["optimizer"] == pytest.approx(8 * 8.03e9 / 8, rel=0.01)
    assert full.worst.peaks["activations"] == pytest.approx(32 * layer, rel=0.1)
    assert plain.worst.peaks["activations"] > 8 * full.worst.peaks["activations"]
    assert 1.1 < full.seconds.step / plain.seconds.step < 1.5, "a forward more"
    assert 0.3 < plain.seconds.mfu < 0.65
    eight = planned(
        "model=llama3_8b", "batch.global_size=64", "batch.micro_size=2", "parallel.zero=3", "optim=adamw8bit"
    )
    assert eight.worst.peaks["optimizer"] < 0.4 * plain.worst.peaks["optimizer"]


def test_the_last_stage_of_a_pipeline_holds_less_activations_than_the_first():
    found = planned("model=llama3_8b", "batch.global_size=16", "batch.micro_size=1", "parallel.pipeline=4",
                    "parallel.pipeline_schedule=1f1b", world_size=4)  # fmt: skip
    activations = [memory.peaks["activations"] for memory in found.memories]
    assert activations == sorted(activations, reverse=True) and activations[0] > 3 * activations[-1]
    assert found.seconds.bubble / found.seconds.step == pytest.approx(3 / 19, abs=0.06), "(p - 1) / (m + p - 1)"


@pytest.mark.full
def test_the_largest_model_is_fitted_in_seconds():
    """70B on 1,024 devices: what is found fits, and its words lead to the same forecast."""
    words = ["model=llama3_70b", "precision=bf16", "batch.global_size=1024", "batch.seq_len=8192", "eval.every=0"]
    config = config_from_tree(compose_tree(words))
    found = find_fit(config, 1024, DEVICES["h100"], {word.partition("=")[0] for word in words})
    assert found.best is not None and found.best.room.fits and found.others and found.changes
    again = forecast(check(config_from_tree(compose_tree([*words, *found.words])), 1024), DEVICES["h100"])
    assert again.worst == found.best.worst and again.seconds == found.best.seconds
    best = told_seconds(found.best), found.best.room.needed
    assert all((told_seconds(other.forecast), other.forecast.room.needed) >= best for other in found.others)


@pytest.mark.parametrize("limit", ["93e9", "103e9"])
def test_what_fits_is_found_whatever_is_faster_and_seems_to_fit(monkeypatch, limit):
    words = ["model=llama3_8b", "precision=bf16", "optim=adamw8bit", "batch.global_size=4", "batch.seq_len=4096",
             "memory.offload_activations=none", "memory.compress=none", f"memory.limit={limit}"]  # fmt: skip
    monkeypatch.setattr("rowwise.trainer.plan.fit.FORECASTS", 4)
    config, given = config_from_tree(compose_tree(words)), {word.partition("=")[0] for word in words}
    found = find_fit(config, 1, DEVICES["h200"], given)
    assert found.best is not None and found.best.room.fits


def told_seconds(found: Forecast) -> float:
    return float(f"{found.seconds.step:.3g}")


def test_one_device_computes_in_copies_of_a_layer_at_a_time_where_those_of_all_do_not_fit(monkeypatch):
    """In 16 bits, as stage 3 does; and of runs that are told to be as fast the one that needs least is taken."""
    monkeypatch.setattr("rowwise.trainer.plan.fit.FORECASTS", 8)
    words = ["model=llama3_8b", "precision=bf16", "optim=adamw8bit", "optim.param_dtype=bf16", "optim.in_backward=true",
             "clip_norm=0", "batch.global_size=1", "batch.seq_len=4096"]  # fmt: skip
    found = find_fit(
        config_from_tree(compose_tree(words)), 1, DEVICES["h100"], {word.partition("=")[0] for word in words}
    )
    assert found.best is not None and "parallel.zero=3" in found.words
    assert found.best.worst.peaks["gathered"] < 0.1 * found.best.worst.peaks["parameters"]
    as_fast = [one.forecast for one in found.others if told_seconds(one.forecast) == told_seconds(found.best)]
    assert as_fast and all(one.room.needed >= found.best.room.needed for one in as_fast)


def test_what_fits_nowhere_is_told(monkeypatch):
    monkeypatch.setattr("rowwise.trainer.plan.fit.FORECASTS", 4)
    config = config_from_tree(
        compose_tree(["model=llama3_70b", "precision=bf16", "batch.global_size=8", "eval.every=0"])
    )
    given = {
        "batch.micro_size",
        "memory.compress",
        "memory.offload_activations",
    }  # few are looked at, each of 80 layers
    found = find_fit(config, 1, DEVICES["rtx3090"], given)
    assert found.best is None and found.closest is not None and not found.closest.forecast.room.fits


def test_a_run_that_does_not_fit_is_refused_with_what_would(tmp_path):
    device = device_named("cpu")
    config = forecast_config(tmp_path, 1, "memory.fused_loss=false", "batch.global_size=4")
    needed = forecast(config, device).room.needed

    def limited(limit: float, **more):
        return replace(config, memory=replace(config.memory, limit=limit, **more))

    require_fit(limited(1.01 * needed), device)
    require_fit(config, device)  # a CPU has swap, and nobody has set a limit
    with pytest.raises(ValueError, match=r"memory.limit is .* less; give \S+=\S+, with which it fits"):
        require_fit(limited(0.9 * needed), device)
    with pytest.raises(ValueError, match="no single option saves as much"):
        require_fit(limited(1e6), device)
    require_fit(limited(1e6, fit=False), device)


def test_a_host_is_not_filled():
    """With activations: there are the workers themselves, what they read, and the system."""
    device = DEVICES["h100"]
    peaks = {"host": int(0.8 * device.ram), "file": 0}
    memory = Memory(0, peaks, 1, {}, "")
    assert room_of(memory, device).fits
    peaks["host"] = int(0.9 * device.ram)
    assert not room_of(memory, device).fits


def test_a_device_of_ones_own(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("memory: 48e9\nflops: 1e14\nbandwidth: 1e12\nlink: 3e10\nnetwork: 1e9\nhost: 3e10\n")
    assert device_named(str(path)).name == "mine" and device_named(str(path)).memory == 48e9
    for content, why in (
        ("memory: 48e9\n", "is missing"),
        ("memory: much\nflops: 1\nbandwidth: 1\nlink: 1\nnetwork: 1\nhost: 1\n", "memory="),
        ("memory: -1\nflops: 1\nbandwidth: 1\nlink: 1\nnetwork: 1\nhost: 1\n", "above 0"),
        ("memroy: 1\n", "did you mean memory?"),
        ("- 1\n", "KEY: VALUE"),
    ):
        path.write_text(content)
        with pytest.raises(ValueError, match=why):
            device_named(str(path))
    with pytest.raises(ValueError, match="possible are h100"):
        device_named("h101")


def test_every_option_is_forecast(tmp_path, full):
    """Every rank of cases of options that go together; unless in full, with one schedule that is searched for, which takes long."""
    write_times(tmp_path)
    device, told = device_named("cpu"), 0
    cases = read_cases()[:: 1 if full else 24]
    late = [case for case in cases if "auto" in case][1:]
    for case in cases if full else [case for case in cases if case not in late]:
        config, world_size = case_config(case, tmp_path)
        plan = plan_for(config, device)
        for rank in range(world_size):
            memory = memory_of(config, rank, False, plan)
            assert memory.most >= max(memory.peaks[category] for category in CATEGORIES) > 0, case  # on the device
        told += 1
    assert told > 5
