"""Whole runs on pipelines: moved between layouts, evaluated, sampled, traced, planned by measurement, validated late. (Law 3.)"""

import json
import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from parity import engine_on, in_micro_batches, plain_engine, small_config, step_input, with_layout
from rowwise.kernels.spec import specs_of
from rowwise.launch.schedule import show
from rowwise.optim.build import build_optimizer, named_state
from rowwise.parallel.mesh import make_mesh
from rowwise.parallel.pipeline_schedule.generate import Shape, gpipe
from rowwise.parallel.pipeline_schedule.trace import read_trace
from rowwise.parallel.precision import Bf16
from rowwise.parallel.shard import sharded_modules
from rowwise.parallel.torch_fsdp import fsdp_params, gathered
from rowwise.trainer.data.open import open_data
from rowwise.trainer.evaluate import evaluate
from rowwise.trainer.feed import eval_batches, train_batches
from rowwise.trainer.models.decoder import Decoder
from rowwise.trainer.pipeline import StagedDecoder, made_for
from rowwise.trainer.sample import generate
from rowwise.trainer.update import make_update
from runs import assert_resumes_to_the_last_bit, assert_same_run, named, records, run_train, run_until

STEPS = 5
MODEL = ("model.layers=4", "model.tie_embeddings=true")
OVERRIDES = (*MODEL, f"steps={STEPS}", "eval.every=2", "eval.batches=2", "batch.micro_size=1", "batch.global_size=8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("pipeline-runs")


@pytest.fixture(scope="module")
def uninterrupted(ranks, folder):
    """Never stopped, on one process, in one micro-batch a step."""
    config = named(in_micro_batches(with_layout(small_config(folder, *OVERRIDES), 1), 1), folder, "uninterrupted")
    ranks.run(run_train, 1, config)
    return config


def test_a_run_moves_from_four_stages_to_one_process_and_back(ranks, folder, uninterrupted):
    base = named(small_config(folder, *OVERRIDES), folder, "moved")
    four = {"pipeline": 4, "pipeline_schedule": "zb_h2"}
    stops = [(4, four, 2, 8), (1, {}, 3, 1), (4, {**four, "pipeline_schedule": "1f1b"}, 4, 4)]
    for world, degrees, stop_at, count in stops:
        states = ranks.run(run_until, world, in_micro_batches(with_layout(base, world, **degrees), count), stop_at)
        assert states[0].step == stop_at
    last = with_layout(base, 4, pipeline=2, pipeline_schedule="zb_v", virtual_stages=2, zero=3)
    ranks.run(run_train, 4, last)
    assert_same_run(base.run_dir, uninterrupted.run_dir)


def test_stopped_and_resumed_is_the_same_to_the_last_bit(ranks, folder):
    layout = {"pipeline": 2, "pipeline_schedule": "zb_v", "virtual_stages": 2, "zero": 2}
    config = with_layout(small_config(folder, *OVERRIDES, "steps=3", "batch.global_size=6"), 4, **layout)
    assert_resumes_to_the_last_bit(ranks, 4, config, folder, stop_at=2)


def test_stages_say_of_their_parameters_what_the_whole_model_says(tmp_path):
    config = small_config(tmp_path, *MODEL).model
    with torch.device("meta"):
        stages = StagedDecoder({3: Decoder(config, range(2, 4))}, gpipe(Shape(4, 1, 4)))
    assert specs_of(stages) == specs_of(Decoder(config))
    assert "head.weight" not in dict(stages.named_parameters())  # the copy is the first stage's


def sample(workers, config):
    mesh = make_mesh(config.parallel, workers)
    return generate(engine_on(mesh, config), [1, 2, 3], 12, 0.0, config.batch.seq_len, 0, mesh)


def sample_plainly(workers, config):
    mesh = make_mesh(config.parallel, workers)
    return generate(plain_engine(mesh, config), [1, 2, 3], 12, 0.0, config.batch.seq_len, 0, mesh)


def test_a_pipeline_writes_what_one_process_writes(ranks, folder):
    config = small_config(folder, *OVERRIDES)
    (alone,) = ranks.run(sample_plainly, 1, with_layout(config, 1))
    for zero in (0, 3):
        layout = with_layout(config, 4, pipeline=2, pipeline_schedule="zb_v", virtual_stages=2, zero=zero)
        assert ranks.run(sample, 4, layout) == [alone] * 4


def gradients_of(workers, config):
    """Name -> this rank's gradient after one step's micro-batches, in the dtype in which they are kept."""
    mesh = make_mesh(config.parallel, workers)
    engine = engine_on(mesh, config)
    batches = train_batches(config, mesh, open_data(config.data, config.batch.seq_len, config.model.vocab_size), 0)
    engine.forward_backward(next(batches), 0.01)
    return {name: p.grad.full_tensor().clone() for name, p in engine.model.named_parameters()}


def test_16_bit_sums_stay_in_32_bits_where_ranks_reduce_in_16(ranks, folder):
    """Micro-batches are added up in 32 bits and rounded once: one rank's gradients are those of `reduce=fp32`, rounded."""
    config = small_config(folder, *OVERRIDES, "precision=bf16", "model.tie_embeddings=false")
    layout = {"pipeline": 2, "pipeline_schedule": "zb_v", "virtual_stages": 2, "zero": 3}
    wide = ranks.run(gradients_of, 2, with_layout(config, 2, **layout))
    narrow = ranks.run(gradients_of, 2, with_layout(replace(config, precision=Bf16(reduce="bf16")), 2, **layout))
    for part, rounded in zip(wide, narrow, strict=True):
        for key, gradient in part.items():
            assert torch.equal(gradient.bfloat16(), rounded[key].bfloat16()), key


@pytest.fixture(scope="module")
def narrow_alone(ranks, folder):
    """A configuration in 16 bits, and its gradients on one process."""
    config = small_config(folder, *OVERRIDES, "precision=bf16", "model.tie_embeddings=false")
    return config, ranks.run(gradients_of, 1, with_layout(config, 1, zero=1))[0]


@pytest.mark.parametrize("name, chunks", [("1f1b", 1), ("zb_h1", 1), ("zb_v", 2)])
def test_16_bit_gradients_are_added_up_in_32_bits(ranks, narrow_alone, name, chunks):
    """To the last bit what one process adds up, also where weight gradients are computed apart."""
    config, alone = narrow_alone
    layout = with_layout(config, 2, pipeline=2, pipeline_schedule=name, virtual_stages=chunks, zero=1)
    for part in ranks.run(gradients_of, 2, layout):
        for key, gradient in part.items():
            assert gradient.dtype == torch.float32
            assert torch.equal(gradient, alone[key]), key


def some_updates(workers, configs):
    """For each of some configurations of one mesh, (reports, this rank's rows of every parameter and state) after its steps,
    the next one begun where that may be."""
    mesh = make_mesh(configs[0].parallel, workers)
    return [some_updates_on(mesh, config) for config in configs]


def some_updates_on(mesh, config):
    """The next step is begun or not while one is judged; in fp16 it overflows or does not."""
    engine = engine_on(mesh, config)
    model = engine.model
    optimizer = build_optimizer(model, config.optim, config.seed)
    update = make_update(config, mesh, engine, optimizer, None)
    stream = train_batches(config, mesh, open_data(config.data, config.batch.seq_len, config.model.vocab_size), 0)
    scales = [1.0, 2.0**60, 1.0, 2.0**60] if config.precision.name == "fp16" else [1.0] * 3
    batches = [next(stream) for _ in scales]
    reports = []
    for step, scale in enumerate(scales):
        ahead = batches[step + 1] if config.parallel.post_validation and step in (0, 1) else None
        reports.append(update(step_input(config, step + 1, batches[step], loss_scale=scale, ahead=ahead)))
        optimizer.zero_grad()
    tensors = {name: p.detach() for name, p in model.named_parameters()}
    for name, state in named_state(model, optimizer).items():
        tensors |= {f"{name}.{key}": t for key, t in state.items()}
    kept = {name: t.to_local() if hasattr(t, "to_local") else t for name, t in tensors.items()}
    return reports, {name: t.clone() for name, t in kept.items()}


AT_ONCE = [
    ("interleaved_1f1b", 2, 0, ("clip_norm=0",)),
    ("zb_h1", 1, 2, ("clip_norm=0.5", "optim=adamw8bit")),
    ("zb_v", 2, 3, ("precision=fp16", "clip_norm=0.5")),
    ("zb_h1", 1, 1, ("precision=fp16", "clip_norm=1e9")),
    ("zb_h1", 1, 3, ("precision=bf16", "optim.param_dtype=bf16", "clip_norm=0.5")),
]
# Stage 1, zb_v and what is not clipped are those of fp16 above, what is clipped at stage 0 is at the others; lion8bit's states are of
# the kind of adamw8bit's, and lion's of adamw's.
IN_FULL = [
    ("interleaved_1f1b", 2, 0, ("clip_norm=1e-3", "optim=lion")),
    ("zb_h1", 1, 1, ("clip_norm=0.5",)),
    ("zb_v", 2, 3, ("clip_norm=0.5",)),
    ("zb_v", 2, 3, ("clip_norm=1e9",)),
    ("zb_v", 2, 3, ("clip_norm=0.5", "optim=lion8bit")),
]


def at_once_config(folder, schedule, chunks, zero, options, post_validation=False):
    fewest = 3 if schedule == "zb_v" else 2  # micro-batches, of each of two data-parallel ranks
    sizes = (f"model.layers={2 * chunks}", f"batch.global_size={2 * fewest}")
    config = small_config(folder, *OVERRIDES, *sizes, *options)
    layout = {"pipeline": 2, "pipeline_schedule": schedule, "virtual_stages": chunks, "zero": zero}
    return with_layout(config, 4, **layout, post_validation=post_validation)


@pytest.fixture(scope="module")
def at_once_and_not(ranks, folder, full):
    """case -> of every rank the ordinary updates and those at once; those of a mesh in one call."""
    found = {}
    for whole in (True, False):
        cases = [case for case in [*AT_ONCE, *IN_FULL * full] if (case[2] == 0) == whole]
        configs = [at_once_config(folder, *case, at_once) for case in cases for at_once in (False, True)]
        everyone = ranks.run(some_updates, 4, configs)
        found |= {case: [updates[2 * i : 2 * i + 2] for updates in everyone] for i, case in enumerate(cases)}
    return found


@pytest.mark.parametrize(
    "case",
    [*AT_ONCE, *(pytest.param(case, marks=pytest.mark.full) for case in IN_FULL)],
    ids=lambda case: " ".join(map(str, (*case[:3], *case[3]))),
)
def test_a_step_at_once_is_the_ordinary_step_to_the_last_bit(at_once_and_not, folder, case):
    """Clipped or not, and where gradients overflow; with the next step begun before that is known, and without."""
    config, options, found = at_once_config(folder, *case), case[3], at_once_and_not[case]
    for (reports, tensors), (reports_at_once, tensors_at_once) in found:
        assert reports == reports_at_once
        assert all(torch.equal(tensor, tensors_at_once[name]) for name, tensor in tensors.items())
    ordinary = found[0][0][0]
    finite = [report.finite for report in ordinary]
    assert finite == ([True, False, True, False] if "precision=fp16" in options else [True] * 3)
    clipped = [report.finite and report.grad_norm > config.clip_norm > 0 for report in ordinary]
    assert any(clipped) == ("clip_norm=1e9" not in options and "clip_norm=0" not in options)


@pytest.mark.parametrize("chunks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_auto_measures_plans_and_keeps_its_plan(ranks, folder, uninterrupted, chunks):
    recompute = "none" if chunks == 1 else "0.4"  # whose making again is measured too
    base = named(small_config(folder, *OVERRIDES, f"memory.recompute={recompute}"), folder, f"auto-{chunks}")
    config = in_micro_batches(with_layout(base, 2, pipeline=2, pipeline_schedule="auto", virtual_stages=chunks), 4)
    ranks.run(run_until, 2, config, 3)
    kept = Path(config.run_dir) / "pipeline"
    plan, times = (kept / "plan.json").read_text(), (kept / "times.json").read_text()
    assert sum(map(len, json.loads(plan)["schedule"])) >= 4 * 2 * 2 * chunks
    assert json.loads(times)["layer"]["forward"] > 0
    old = json.loads(plan)
    del old["made_for"]["model"]["block"]  # which earlier releases did not know
    (kept / "plan.json").write_text(plan := json.dumps(old))
    ranks.run(run_train, 2, config)
    assert (kept / "plan.json").read_text() == plan and (kept / "times.json").read_text() == times
    assert_same_run(config.run_dir, uninterrupted.run_dir)


def test_a_plan_holds_for_what_it_was_measured_with(folder):
    config = with_layout(small_config(folder, *OVERRIDES), 2, pipeline=2, pipeline_schedule="auto")
    plain = made_for(config, 4)
    assert plain.keys() == {"parallel", "model", "micro_batches"}, "as earlier releases wrote it"
    for option in ({"recompute": "full"}, {"compress": "int8"}, {"offload_activations": "cpu"}, {"fused_loss": False}):
        assert made_for(replace(config, memory=replace(config.memory, **option)), 4) == plain | option


def test_a_run_that_validates_late_is_the_same_run(ranks, folder, uninterrupted):
    """Stopped on the way, while the next step has begun."""
    layout = {"pipeline": 2, "pipeline_schedule": "zb_v", "virtual_stages": 2, "zero": 3, "post_validation": True}
    config = in_micro_batches(with_layout(named(small_config(folder, *OVERRIDES), folder, "late"), 2, **layout), 4)
    states = ranks.run(run_until, 2, config, 3)
    assert states[0].step < STEPS
    ranks.run(run_train, 2, config)
    assert_same_run(config.run_dir, uninterrupted.run_dir)


@pytest.fixture(scope="module")
def planned(ranks, folder):
    """A run that planned by what it measured, stopped after its first step."""
    base = named(small_config(folder, *OVERRIDES, "steps=2", "eval.every=0"), folder, "planned")
    config = in_micro_batches(with_layout(base, 2, pipeline=2, pipeline_schedule="auto"), 4)
    ranks.run(run_until, 2, config, 1)
    return config


@pytest.mark.parametrize("damage", ["", pytest.param("{", marks=pytest.mark.full), "cut", "other"])
def test_a_damaged_plan_is_made_anew(ranks, folder, planned, damage):
    config = named(planned, folder, f"damaged-{damage or 'empty'}")
    shutil.copytree(planned.run_dir, config.run_dir)
    file = Path(config.run_dir) / "pipeline/plan.json"
    plan = json.loads(file.read_text())
    if damage == "cut":  # half of the micro-batches, a sound schedule of another step
        plan["schedule"] = [[a for a in row if int(a.lstrip("0123456789")[1:]) < 2] for row in plan["schedule"]]
    if damage == "other":
        plan["layers"] = [[0, 1], [1, 2]]
    file.write_text(json.dumps(plan) if damage in ("cut", "other") else damage)
    ranks.run(run_train, 2, config)
    assert sum(map(len, json.loads(file.read_text())["schedule"])) >= 4 * 2 * 2


def test_a_traced_step_beside_a_save(ranks, folder):
    """The messages of the loop and those of the thread that saves do not mix; the slower rank shows it."""
    options = ("steps=4", "eval.every=0", "checkpoint.every=1", "checkpoint.background=true")
    base = named(small_config(folder, *OVERRIDES, *options), folder, "traced-and-saved")
    config = with_layout(base, 2, pipeline=2, pipeline_schedule="zb_h1", pipeline_trace=2)
    ranks.run(slow_saves, 2, config)
    assert read_trace(folder / "traced-and-saved/pipeline/trace.json").schedule.micro_batches == 8
    assert len(records(config.run_dir)) == 4


def slow_saves(workers, config):
    from rowwise.trainer import checkpoint

    quick = checkpoint.file_facts

    def slow(path):
        time.sleep(0.15 * (workers.rank % 2))
        return quick(path)

    checkpoint.file_facts = slow
    try:
        return run_train(workers, config)
    finally:
        checkpoint.file_facts = quick


def gathered_after_evaluation(workers, config):
    mesh = make_mesh(config.parallel, workers)
    engine = engine_on(mesh, config)
    data = open_data(config.data, config.batch.seq_len, config.model.vocab_size)
    evaluate(engine, eval_batches(config, mesh, data))
    return [p.numel() for module in sharded_modules(engine.model) for param in fsdp_params(module)
            if (p := gathered(param)) is not None and p.untyped_storage().size()]  # fmt: skip


@pytest.mark.parametrize("zero", [1, 3])
def test_nothing_stays_gathered_after_an_evaluation(ranks, folder, zero):
    layout = {"pipeline": 2, "pipeline_schedule": "blockwise", "virtual_stages": 2, "zero": zero}
    config = with_layout(small_config(folder, *OVERRIDES, "eval.batches=3"), 4, **layout)
    assert ranks.run(gathered_after_evaluation, 4, config) == [[]] * 4


def test_auto_takes_times_from_a_file(ranks, folder):
    part = {"forward": 1.0, "input": 1.0, "weight": 1.0}
    nothing = dict.fromkeys(part, 0.0)
    file = folder / "times.json"
    file.write_text(json.dumps({"before": nothing, "layer": part, "after": nothing, "send": 0.0, "gather": 0.0}))
    base = named(small_config(folder, *OVERRIDES, "steps=1", "eval.every=0"), folder, "auto-file")
    layout = {"pipeline": 2, "pipeline_schedule": "auto", "pipeline_costs": str(file), "pipeline_memory": 1.5}
    ranks.run(run_train, 2, with_layout(base, 2, **layout))
    assert json.loads((folder / "auto-file/pipeline/times.json").read_text()) == json.loads(file.read_text())


def test_a_traced_step_is_the_schedule_and_has_a_picture(ranks, folder):
    base = named(small_config(folder, *OVERRIDES, "steps=2", "eval.every=0"), folder, "traced")
    config = with_layout(base, 4, pipeline=2, pipeline_schedule="zb_v", virtual_stages=2, zero=3, pipeline_trace=2)
    ranks.run(run_train, 4, config)
    timeline = read_trace(folder / "traced/pipeline/trace.json")
    assert timeline.schedule.micro_batches == 4 and timeline.schedule.splits_backward
    assert len(timeline.schedule.ranks) == 2 and all(len(actions) == 24 for actions in timeline.schedule.ranks)
    table = show(f"run={config.run_dir}", f"to={folder}/traced.png")
    assert "predicted" in table and "measured" in table
    assert (folder / "traced.png").read_bytes().startswith(b"\x89PNG")
