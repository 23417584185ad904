"""What is watched of a run beside its losses: norms of parameters and the operations of a step, alike on every layout. (Law 2.)"""

import contextlib
import functools
import gzip
import json
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from parity import TOLERANCE, global_batch, plain_model, run_plain, small_config, with_layout
from rowwise.kernels.visible import Documents
from rowwise.launch.pages import watched
from rowwise.launch.report import read_runs
from rowwise.trainer.data.batches import MicroBatch, visible_pairs
from rowwise.trainer.data.open import open_data
from rowwise.trainer.memory import watching
from rowwise.trainer.metrics import read_metrics
from rowwise.trainer.models.decoder import ModelConfig, flops_of, flops_per_token, parameter_count
from rowwise.trainer.norms import KINDS
from rowwise.trainer.profile import KINDS as PROFILED
from rowwise.trainer.profile import Event, parts_of, slowest
from rowwise.trainer.update import may_begin_next
from rowwise.trainer.watching import check_watched
from runs import named, run_train, run_watched

LAYOUTS = {
    "1": (1, {}),
    "3, stage 3": (3, {"zero": 3}),
    "stages": (4, {"pipeline": 2, "pipeline_schedule": "zb_h1", "zero": 2, "post_validation": True}),
    "2 x 2 of a sequence": (4, {"ring": 2, "replicate": 2, "zero": 0}),
}
OPTIONS = ["steps=3", "log.norms_every=2", "peak_flops=1e9", "checkpoint.every=0"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("watching")


def made(ranks, folder, layout: str, *overrides: str) -> tuple:
    """(configuration, records) of a run on that layout."""
    world, degrees = LAYOUTS[layout]
    name = f"{layout}-{len(overrides)}"
    config = named(with_layout(small_config(folder, *OPTIONS, *overrides), world, **degrees), folder, name)
    ranks.run(run_train, world, config)
    return config, read_metrics(Path(config.run_dir))


@functools.cache
def textbooks(folder):
    """The same run on any layout."""
    return run_plain(small_config(folder, *OPTIONS))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_record_has_the_textbooks_norms_and_operations_on_every_layout(ranks, folder, layout):
    config, records = made(ranks, folder, layout)
    assert [any(kind in record for kind in KINDS) for record in records] == [False, True, False]
    trace = textbooks(folder)
    initial = {name: p.detach() for name, p in plain_model(config).named_parameters()}
    factor = min(1.0, config.clip_norm / trace.norms[1])
    assert factor < 1, "nothing is clipped: the test would not see it"
    for name, start in initial.items():
        expected = {
            "parameter_norms": (start + trace.updates[0][name] + trace.updates[1][name]).norm(),
            "gradient_norms": trace.gradients[1][name].norm() / factor,
            "update_norms": trace.updates[1][name].norm(),
        }
        for kind, norm in expected.items():
            assert records[1][kind][name] == pytest.approx(float(norm), rel=TOLERANCE), (kind, name)
    assert all(records[1][kind].keys() == initial.keys() for kind in KINDS)
    squares = sum(norm**2 for norm in records[1]["gradient_norms"].values())
    assert squares**0.5 == pytest.approx(records[1]["grad_norm"], rel=TOLERANCE)
    # The pairs of a token and a not later one of its own document, counted one by one.
    data, tokens = open_data(config.data, 13, config.model.vocab_size), 24 * 13
    earlier = torch.ones(13, 13, dtype=torch.bool).tril()
    for step, record in enumerate(records):
        begins = global_batch(config, data, step).documents.begins
        inside = [torch.bincount(torch.tensor(row[1:], dtype=torch.long), minlength=13).cumsum(0) for row in begins]
        pairs = sum(int(((place[:, None] == place) & earlier).sum()) for place in inside)
        assert pairs < 0.9 * 24 * 13 * 14 / 2
        counted = record["mfu"] * config.peak_flops * record["step_seconds"] * LAYOUTS[layout][0]
        assert counted == pytest.approx(flops_of(config.model, tokens, pairs), rel=TOLERANCE)


@pytest.mark.parametrize(
    "options",
    [["optim=dct", "optim.rank=4"], ["sparsity=rigl", "sparsity.update_every=2", "sparsity.stop_at=3"]],
    ids=["low rank", "masks"],
)
def test_norms_of_other_rules_are_the_same_on_every_layout(ranks, folder, options):
    alone, split = (made(ranks, folder, layout, *options)[1][1] for layout in ("1", "3, stage 3"))
    for kind in KINDS:
        assert split[kind] == pytest.approx(alone[kind], rel=TOLERANCE)
        assert all(norm > 0 for norm in alone[kind].values())


def test_a_step_without_an_update_has_no_norm_of_one(ranks, folder):
    """After an overflow of fp16: nothing changed, and the gradient is no number."""
    options = ("precision=fp16", "precision.initial_scale=1e30", "log.norms_every=1", "steps=1")
    _, (record,) = made(ranks, folder, "1", *options)
    assert record["grad_norm"] is None and "gradient_norms" not in record
    assert set(record["update_norms"].values()) == {0.0}
    assert all(record["parameter_norms"].values())


def test_pairs_are_those_that_attention_sees():
    tokens = torch.zeros(2, 5, dtype=torch.long)
    whole = MicroBatch(tokens, tokens, tokens, None)
    assert visible_pairs([whole], 5) == 2 * 15
    packed = MicroBatch(tokens, tokens, tokens, Documents(((0, 2), (0, 1, 4))))
    assert visible_pairs([packed, whole], 5) == (3 + 6) + (1 + 6 + 1) + 30
    # Of five layers three see two tokens, themselves and the one before.
    model = ModelConfig(layers=5, window=2, window_layers=(True, False))
    near = (3 + 5) + (1 + 5 + 1) + 2 * 9
    assert visible_pairs([packed, whole], 5, model.pairs) == pytest.approx(0.6 * near + 0.4 * 47)
    assert replace(model, window=5).pairs(5) == 15 == ModelConfig().pairs(5)


def test_operations_of_a_whole_sequence_are_those_of_its_tokens():
    config = ModelConfig()
    assert flops_of(config, 13, 13 * 14 / 2) == pytest.approx(13 * flops_per_token(config, 13))
    near = replace(config, window=4)
    assert flops_of(config, 13, 4 * 13 - 6) == pytest.approx(13 * flops_per_token(near, 13))
    _, multiplying = parameter_count(config)
    # A token alone: two operations a weight forward, four backward; of attention, q k and p v of one pair, thrice.
    attention = 3 * (2 * 2) * config.layers * config.heads * config.head_size
    assert flops_of(config, 1, 1) == 6 * multiplying + attention


def test_the_seconds_of_a_step_are_parted_by_what_is_at_work():
    def event(name, start, end, device=False):
        return Event(name, start, end, device)

    host = [
        event("aten::mm", 0, 10),
        event("aten::linear", 0, 12),  # around the product
        event("_PackedAttention", 20, 50),
        event("aten::mm", 25, 30),
        event("gloo:all_reduce", 40, 70),
        event("aten::add_", 60, 65),
        event("c10d::allreduce_", 39, 41),  # which hands it over
        event("aten::mul", 95, 130),  # cut at the end
    ]
    parts = {kind: round(1e9 * seconds) for kind, seconds in parts_of(host, 0, 100).items()}
    assert parts == {"products": 10, "attention": 5, "elementwise": 2 + 5 + 5, "messages": 25, "idle": 100 - 52}
    # Where a GPU is at work, what the host does is not counted.
    device = [event("void cutlass_gemm", 5, 25, True), event("flash_fwd_kernel", 20, 40, True),
              event("ncclDevKernel_AllGather_RING_LL(int)", 0, 60, True), event("vectorized_add", 50, 55, True)]  # fmt: skip
    parts = {kind: round(1e9 * seconds) for kind, seconds in parts_of(host + device, 0, 100).items()}
    assert parts == {"attention": 20, "products": 15, "elementwise": 5, "messages": 20, "idle": 40}
    assert set(parts_of([], 0, 7).values()) == {0.0, 7e-9}


def test_a_report_says_what_was_done_about_spikes(tmp_path):
    made = [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 9.0, "spike": "skipped", "spike_score": 7.25},
            {"step": 3, "loss": None, "spike": "skipped", "spike_score": None},
            {"step": 4, "loss": 1.0, "spike": "rolled back", "spike_score": 8.0, "spike_step": 6}]  # fmt: skip
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in made))
    (tmp_path / "config.yaml").write_text("on_spike: rollback\n")
    (run,) = read_runs([tmp_path])[0]
    assert [row[1:] for row in watched.spikes_of(run)] == [
        ["2", "7.2", "its update was not made: there was nothing to go back to yet"],
        ["3", "no number", "its update was not made: there was nothing to go back to yet"],
        ["6", "8.0", "the run went back to step 3"],
    ]
    assert "the run went back to step 3" in watched.spikes([run])[0]


def test_the_slowest_rank_is_named_beside_the_median():
    expected = {"slowest_rank": 2, "slowest_rank_seconds": 5.0, "median_rank_seconds": 1.5}
    assert slowest([1.0, 2.0, 5.0, 1.5]) == expected
    assert slowest([3.0]) == {"slowest_rank": 0, "slowest_rank_seconds": 3.0, "median_rank_seconds": 3.0}


@pytest.mark.parametrize(
    ("option", "begun"),
    [
        ("steps=10", [1, 2, 3, 4, 5, 6, 7, 8, 9]),
        ("profile.steps=[4,6]", [1, 2, 7, 8, 9]),
        ("log.ranks_every=5", [1, 2, 3, 6, 7, 8]),
        ("log.norms_every=5", [1, 2, 3, 6, 7, 8]),
        ("profile.memory_step=5", [1, 2, 3, 6, 7, 8, 9]),
    ],
)
def test_no_step_is_begun_before_one_that_is_watched_or_in_it(tmp_path, option, begun):
    """Whichever ranks profile."""
    layout = {"pipeline": 2, "pipeline_schedule": "zb_h1", "post_validation": True}
    quiet = ("steps=10", "batch.micro_size=4", "eval.every=0", "checkpoint.every=0", "profile.ranks=[1]")
    config = with_layout(small_config(tmp_path, *quiet, option), 2, **layout)
    assert [step for step in range(1, 11) if may_begin_next(config, step)] == begun


@pytest.mark.parametrize(
    ("world", "step", "options"),
    [(1, 2, ("parallel.zero=0",)), (1, 2, ()), (2, 1, ("parallel.zero=3", "profile.ranks=[1]"))],
)
def test_what_is_held_at_the_peak_of_a_step_is_listed(ranks, folder, tmp_path, world, step, options):
    """All of it, as memory.json counts it, by the ranks that are asked for, and of that step alone."""
    options = ("batch.global_size=4", "steps=2", f"profile.memory_step={step}", *options)
    config = with_layout(named(small_config(folder, *options), tmp_path, "run"), world)
    ranks.run(run_watched, world, config)
    assert [path.name for path in (tmp_path / "run/profile").iterdir()] == [f"rank-{world - 1}.memory.json"]
    found = json.loads((tmp_path / f"run/profile/rank-{world - 1}.memory.json").read_text())
    held = json.loads((tmp_path / "run/memory.json").read_text())["ranks"][world - 1]["measured"]
    stays = sum(held[category] for category in ("parameters", "optimizer", "masks"))
    assert found["step"] == step and sum(one["bytes"] for one in found["peak"]) == held["total"] - stays
    sizes = [one["bytes"] for one in found["peak"]]
    assert sizes == sorted(sizes, reverse=True) and all(one["storages"] >= 1 for one in found["peak"])
    made = {one["operation"] for one in found["peak"]}
    assert "aten::mm" in made and ("all_gather" in made) == (world == 2)
    assert {one["category"] for one in found["peak"]} <= held.keys()


@pytest.mark.parametrize("fails", [False, True])
def test_on_a_gpu_it_is_the_snapshot_of_torch(tmp_path, monkeypatch, fails):
    """Of that step and rank alone; and its allocator keeps no notes beyond the step, however that ends."""
    said: list[str] = []
    monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", lambda enabled: said.append(f"notes {enabled}"))
    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", lambda path: said.append(path))
    config = named(small_config(tmp_path, "profile.memory_step=2"), tmp_path, "run")
    (tmp_path / "run").mkdir()
    gpu, other = (SimpleNamespace(device=torch.device("cuda"), rank=rank) for rank in (0, 1))
    for mesh, step in ((gpu, 1), (other, 2), (gpu, 2)):
        with contextlib.suppress(KeyError), watching(config, mesh, torch.nn.Linear(1, 1), step, first=False) as watch:
            assert watch.seen is None
            if fails:
                raise KeyError
    written = [] if fails else [str(tmp_path / "run/profile/rank-0.memory.pickle")]
    assert said == ["notes all", *written, "notes None"]


def test_what_a_compiled_step_holds_is_not_seen_on_a_cpu():
    check_watched(compiled=True, memory_step=0, device="cpu")
    check_watched(compiled=True, memory_step=3, device="cuda")
    check_watched(compiled=False, memory_step=3, device="cpu")
    with pytest.raises(
        ValueError, match=r"profile.memory_step=3 with compile=true: .* give compile=false, or profile.memory_"
    ):
        check_watched(compiled=True, memory_step=3, device="cpu")


def slow_last_rank(workers, config):
    """A run whose last rank takes 0.4 seconds longer for every forward."""
    from rowwise.trainer import engine

    original = engine.summed_loss

    def late(*arguments):
        if workers.rank == workers.world_size - 1:
            time.sleep(0.4)
        return original(*arguments)

    engine.summed_loss = late
    try:
        return run_train(workers, config)
    finally:
        engine.summed_loss = original


@pytest.mark.parametrize("zero", [pytest.param(0, marks=pytest.mark.full), 3])
def test_steps_are_profiled_and_the_slowest_rank_is_found(ranks, folder, zero):
    options = ("steps=4", "profile.steps=[2,3]", "profile.ranks=[1]", "log.ranks_every=1", "batch.micro_size=12")
    config = named(with_layout(small_config(folder, *options), 2, zero=zero), folder, f"profiled-{zero}")
    ranks.run(slow_last_rank, 2, config)
    # Steps 2 and 3 are traced, by rank 1. In the first, each rank begins to profile, which takes a while.
    *others, last = read_metrics(Path(config.run_dir))
    assert ["slowest_rank" in record for record in others] == [True, False, False]
    assert last["slowest_rank"] == 1
    assert 0.25 < last["slowest_rank_seconds"] - last["median_rank_seconds"] < last["step_seconds"]
    kept = Path(config.run_dir) / "profile"
    assert sorted(path.name for path in kept.iterdir()) == ["rank-1.json", "rank-1.trace.json.gz"]
    summary = json.loads((kept / "rank-1.json").read_text())
    assert (summary["rank"], summary["device"], summary["steps"]) == (1, "cpu", [2, 3])
    assert sum(summary["parts"].values()) == pytest.approx(summary["seconds"])
    assert all(summary["parts"][kind] > 0 for kind in PROFILED)
    assert summary["parts"]["idle"] > 0.4  # it sleeps
    names = {
        event["name"]
        for event in json.loads(gzip.decompress((kept / "rank-1.trace.json.gz").read_bytes()))["traceEvents"]
    }
    assert "aten::mm" in names
    content = "".join(watched.show(read_runs([Path(config.run_dir)])[0]))
    assert "Where the time of profiled steps goes" in content and "2 to 3" in content
    assert "was the slowest in" in content and "than the median rank" in content
