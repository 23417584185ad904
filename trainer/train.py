"""train(config): build, resume, loop, save."""

import functools
import gc
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from rowwise.kernels.products import float32_products
from rowwise.optim.build import assignments, build_optimizer, set_step
from rowwise.optim.schedules import LrRange
from rowwise.parallel.mesh import Mesh, Workers, make_mesh
from rowwise.parallel.objects import from_rank_0
from rowwise.parallel.pipeline import Trace
from rowwise.parallel.precision import initial_loss_scale, next_loss_scale, product_precision
from rowwise.parallel.sequence import places_on
from rowwise.trainer.advice import warnings
from rowwise.trainer.build import build_model
from rowwise.trainer.checkpoint import Saver, load_first_sound, tensors_of
from rowwise.trainer.clock import Clock
from rowwise.trainer.config import TrainConfig, tree_of
from rowwise.trainer.data.batches import Prefetch, Share, holdout_batches, step_batches, step_digests, visible_pairs
from rowwise.trainer.data.open import Data, told_of_data
from rowwise.trainer.engine import Engine
from rowwise.trainer.evaluate import evaluate
from rowwise.trainer.files import DiskFull
from rowwise.trainer.finite import not_finite, of_any_rank, told
from rowwise.trainer.lr_range import RangeTest, points_of
from rowwise.trainer.manifest import fingerprint, set_aside
from rowwise.trainer.memory import keep_memory
from rowwise.trainer.metrics import Recorded, read_metrics
from rowwise.trainer.models.decoder import parameter_count
from rowwise.trainer.norms import norms_of_next
from rowwise.trainer.parallelize import parallelize
from rowwise.trainer.peaks import device_name
from rowwise.trainer.pipeline import keep_trace, of_every_stage
from rowwise.trainer.profile import Profiler
from rowwise.trainer.record import number_or_none, sparsity_record, step_record
from rowwise.trainer.report import open_reporter
from rowwise.trainer.resume import changes, data_facts, find_resume, model_facts, recorded_by, state_facts, told_of
from rowwise.trainer.rollback import Rollbacks, go_back, is_anchor, judge, pass_over
from rowwise.trainer.same_data import require_same_data, require_sound, try_data
from rowwise.trainer.sample import generate
from rowwise.trainer.spike import after_step, in_words, spike_record
from rowwise.trainer.spike import told_of as told_of_rollback
from rowwise.trainer.starts import Sample, Start, keep_sample, keep_start
from rowwise.trainer.state import TrainState
from rowwise.trainer.step import RankStatus, StepInput, StepReport
from rowwise.trainer.stop import StopRequest
from rowwise.trainer.update import make_update, may_begin_next


def train(config: TrainConfig, workers: Workers | None = None, command: str | None = None) -> TrainState:
    """Runs `config` to its last step, or until asked to stop, and returns the numbers it ended with. `command`: by which it
    was started, for whoever reads its folder.

    Every worker calls it with the same configuration, checked and resolved by `trainer.prepare` on rank 0. Makes the
    process groups and takes them down. Raises FloatingPointError where the loss is no number, and DataDamaged.
    """
    # Before the groups exist: where a corpus is built first, they would lose patience.
    opened, workers = try_data(config), workers or Workers()
    mesh = make_mesh(config.parallel, workers)
    data = require_same_data(opened, mesh)
    data.watch.share(workers.local_rank, workers.local_world_size)
    with data.watch, StopRequest() as stop:
        end = _train(config, mesh, data, [], command, stop)
        while not isinstance(end, TrainState):
            gc.collect()  # a model and its hooks are in circles, and there is no room for two
            end = _train(config, mesh, data, end, command, stop)
    # Not where it failed: taking down a group can wait for a peer that is gone.
    dist.destroy_process_group()
    return end


def _train(
    config: TrainConfig, mesh: Mesh, data: Data, rollbacks: Rollbacks, command: str | None, stop: StopRequest
) -> TrainState | Rollbacks:
    """From where the run stands to its end, or to a spike that it goes back from: what it goes back by is given to the next
    call, which heeds a `stop` that was asked for meanwhile."""
    model = build_model(config, mesh)
    engine, sparsity = parallelize(model, config, mesh)
    optimizer = build_optimizer(model, config.optim, config.seed)
    tensors = tensors_of(model, optimizer, sparsity)
    begun = resume(config, mesh, data, tensors, rollbacks)
    state = begun.state
    set_step(optimizer, state.updates)
    update = make_update(config, mesh, engine, optimizer, sparsity, functools.partial(judge, config, state))

    with ExitStack() as stack:
        stack.enter_context(float32_products(product_precision(config.precision, mesh.device)))
        remarks = told_of_data(config.data, data) + warnings(config, data, mesh.device) + begun.remarks
        parts = of_every_stage(assignments(model, optimizer), mesh)
        reporter = stack.enter_context(open_reporter(config, mesh, state, begun.recorded, data, parts, remarks))
        if not rollbacks:
            tell_start(config, mesh, state.step, command)
        test = range_test(config, mesh, state.step)
        saver = make_saver(config, mesh, spoilt_ends=test is None)
        stack.callback(saver.close)
        digests = step_digests(data.train, config.batch, config.seed, state.position)
        batches = stack.enter_context(
            Prefetch(zip(train_batches(config, mesh, data, state.position), digests, strict=True))
        )
        clock = Clock(config, mesh.rank, begun.manifest)
        back: Rollbacks = []
        stopping, first, ahead = test is not None and test.over, state.step, None
        stop.hear(reporter.say)
        stack.callback(lambda: None if back else stop.close())
        profiler = stack.enter_context(Profiler(config, mesh))
        saved: dict[str, float] = {}
        while state.step < config.steps and not stopping:
            profiler.begin(state.step + 1)
            started = time.perf_counter()
            micro_batches, digest = next(batches) if ahead is None else ahead
            ahead = next(batches) if may_begin_next(config, state.step + 1) else None
            data_seconds = time.perf_counter() - started
            scale_used = state.loss_scale.scale

            trace = Trace(mesh.device) if state.step + 1 == config.parallel.pipeline_trace else None
            pairs = visible_pairs(micro_batches, config.batch.seq_len) * mesh.data_degree / mesh.world_size
            status = RankStatus(stop.requested, data.watch.complaint is not None, digest, *clock.due(), pairs)
            norms = norms_of_next(config, state.step, model)
            report = update(
                StepInput(
                    state.step + 1,
                    micro_batches,
                    config.batch.places,
                    config.clip_norm,
                    scale_used,
                    status,
                    trace,
                    ahead and ahead[0],
                )
            )
            if not report.sound:
                saver.wait()  # an error would end the save under way
                require_sound(data, mesh, first, state.step, digest)
            if state.step == first:
                keep_memory(Path(config.run_dir), mesh, model, optimizer, tensors)
            measured = norms.measure(model, report, config, mesh) if norms is not None else {}
            optimizer.zero_grad()
            if trace is not None:
                keep_trace(trace, Path(config.run_dir) / "pipeline", mesh)
            spike = report.spike
            if spike is not None and config.on_spike == "rollback":
                saver.wait()  # its messages are not to meet those of the next line
                if back := go_back(config, mesh, state, spike):
                    if report.stop:
                        reporter.say(f"asked to stop in a spike: step {back[-1].to} is saved; resume=auto goes on")
                    return state if report.stop else back
            if spike is not None and report.held:
                reporter.warn(f"{in_words(state.step + 1, spike)}: its update is skipped")
            if not report.applied:
                saver.wait()  # an error would end the save under way
                if test is None and not report.finite and not report.held:
                    require_usable(report, config, state, tensors, mesh)
            advance(state, report, config)
            stopping = report.stop

            seconds = time.perf_counter() - started
            measured |= profiler.end(state.step)
            record = step_record(config, mesh, state, report, scale_used, seconds, data_seconds)
            record |= measured | sparsity_record(sparsity, config, state.step)
            record |= spike_record(state.spikes, state.step, spike, "skipped" if report.held else "recorded")
            if report.evaluate or config.eval.due(state.step, config.length):
                record |= eval_record(config, mesh, engine, data)
                clock.evaluated()
            reporter.step(record | saved)
            if test is not None:
                test.add(record)
                stopping |= test.over

            saved, started = {}, time.perf_counter()
            saver.poll()
            if stopping or report.save or config.checkpoint.due(state.step, config.length):
                saver.wait()  # its messages are not to meet those of the next line
                require_sound(data, mesh, first, state.step)
                manifest = manifest_of(config, mesh, data, state, reporter.sync()) | clock.kept()
                saver.save(state.step, tensors, manifest)
                clock.saved()
                saved = {"save_seconds": time.perf_counter() - started}
        saver.wait()
        require_sound(data, mesh, first, state.step, saved=True)
        reporter.stand()
        reporter.say(data.watch.unread())
        if test is not None and (test.over or state.step == config.steps):
            reporter.say(test.told())
        else:
            reporter.say(sample(config, mesh, engine, data, state.step) if state.step >= config.steps else None)
            reporter.end(state, writes=data.tokenizer is not None)
    return state


@dataclass(frozen=True)
class Begun:
    """Where a run starts: its numbers, what is known of the records before, what is to be said, and the manifest that it goes
    on from, if any."""

    state: TrainState
    recorded: Recorded
    remarks: list[str]
    manifest: Mapping[str, Any] = field(default_factory=dict)


def resume(config: TrainConfig, mesh: Mesh, data: Data, tensors: dict[str, Tensor], rollbacks: Rollbacks) -> Begun:
    """Loads the newest sound checkpoint that `config.resume` allows into `tensors`; of a run that was rolled back, its own.
    Says what was passed over as damaged, where it goes on, what changes, and what it was rolled back by."""
    here = find_resume(config, data.train.fingerprint, bool(rollbacks)) if mesh.rank == 0 else []
    found = from_rank_0(here, mesh.save_group)
    if not found:
        return Begun(TrainState(loss_scale=initial_loss_scale(config.precision)), Recorded(), [])
    checkpoint, manifest, complaints = load_first_sound(found, tensors, mesh)
    if mesh.rank == 0:
        set_aside(Path(config.run_dir) / "checkpoints", beyond=manifest["step"])
    state = TrainState.from_tree(manifest["state"])
    if manifest["precision"] != config.precision.name:
        state.loss_scale = initial_loss_scale(config.precision)
    remarks = [f"warning: {complaint}; passed over" for complaint in complaints]
    remarks += [told_of(checkpoint, config), *changes(manifest, config)]
    if rollbacks:
        remarks.append(told_of_rollback(pass_over(state, rollbacks)))
    return Begun(state, recorded_by(checkpoint, manifest, config), remarks, manifest)


def make_saver(config: TrainConfig, mesh: Mesh, spoilt_ends: bool) -> Saver:
    """What saves the checkpoints of the run."""
    choice, checkpoints = config.checkpoint, Path(config.run_dir) / "checkpoints"
    return Saver(checkpoints, mesh, choice.keep, choice.background, spoilt_ends, functools.partial(is_anchor, config))


def tell_start(config: TrainConfig, mesh: Mesh, step: int, command: str | None) -> None:
    """Rank 0 adds a line to starts.jsonl, unless there is nothing left to do. Raises DiskFull."""
    if mesh.rank != 0 or step >= config.steps:
        return
    parameters, _ = parameter_count(config.model)
    keep_start(Path(config.run_dir), Start(step, mesh.world_size, device_name(mesh.device), parameters, command))


def range_test(config: TrainConfig, mesh: Mesh, step: int) -> RangeTest | None:
    """The learning-rate range test that a run is, with what its records up to `step` say; None where it is none. Rank 0 reads
    them for all: ranks that read otherwise would end at different steps."""
    if not isinstance(config.schedule, LrRange):
        return None
    made = read_metrics(Path(config.run_dir)) if mesh.rank == 0 else []
    points = points_of([record for record in made if record["step"] <= step])
    return RangeTest(from_rank_0(points, mesh.save_group))


def share_of(mesh: Mesh, seq_len: int) -> Share:
    """What this rank reads of every global batch."""
    return Share(mesh.data_rank, mesh.data_degree, places_on(mesh, seq_len))


def train_batches(config: TrainConfig, mesh: Mesh, data: Data, position: int):
    """This rank's micro-batches, step by step, from `position` on."""
    share, pin = share_of(mesh, config.batch.seq_len), mesh.device.type == "cuda"
    return step_batches(data.train, config.batch, config.seed, position, share, pin)


def eval_batches(config: TrainConfig, mesh: Mesh, data: Data):
    """This rank's share of the held-out samples."""
    share = share_of(mesh, config.batch.seq_len)
    return holdout_batches(data.holdout, config.batch, config.eval.batches, share)


def eval_record(config: TrainConfig, mesh: Mesh, engine: Engine, data: Data) -> dict[str, float | None]:
    """What a step that evaluates adds to its record: the held-out loss, and the seconds that it took."""
    started = time.perf_counter()
    loss = evaluate(engine, eval_batches(config, mesh, data), mesh)
    return {"eval_loss": number_or_none(loss), "eval_seconds": time.perf_counter() - started}


def require_usable(
    report: StepReport, config: TrainConfig, state: TrainState, tensors: dict[str, Tensor], mesh: Mesh
) -> None:
    """Of a step whose gradient is no number: fp16 passes it over, as long as a smaller loss scale may help; anything
    else stops the run, before it is spoilt where that is possible. Says whether the weights were spoilt already, by the
    update before, whose own loss was a number. Raises FloatingPointError."""
    if config.precision.name == "fp16" and state.loss_scale.scale > 1:
        return
    spoilt = of_any_rank(not_finite(tensors), mesh)
    weights = "the weights are finite, as they were before it"
    if config.optim.in_backward:
        weights = "the weights have taken it (optim.in_backward)"
    elif spoilt:
        weights = f"{told(spoilt)} since the update of step {state.step}"
    raise FloatingPointError(
        f"step {state.step + 1}: the gradient norm is not a number (loss {report.loss}); {weights}. "
        "A smaller optim.lr, a longer warm-up or clip_norm may help"
    )


def advance(state: TrainState, report: StepReport, config: TrainConfig) -> None:
    """Counts the step that was just made."""
    state.step += 1
    state.position += config.batch.global_size
    state.tokens += config.batch.global_size * config.batch.seq_len
    state.updates += report.applied
    state.spikes = after_step(state.spikes, report.loss, report.grad_norm, report.held, config.spike)
    state.loss_scale = next_loss_scale(state.loss_scale, config.precision, overflow=not report.finite)


def manifest_of(config: TrainConfig, mesh: Mesh, data: Data, state: TrainState, recorded: Recorded) -> dict[str, Any]:
    """What a checkpoint says of itself, beside its files."""
    tree = tree_of(config)
    prints = {"config": fingerprint(tree), "data": data.train.fingerprint}
    if data.tokenizer is not None:
        prints["tokenizer"] = data.tokenizer.fingerprint
    return {
        "step": state.step,
        "tokens": state.tokens,
        "state": state.to_tree(),
        "precision": config.precision.name,
        "model": model_facts(config),
        "states": state_facts(config),
        "data": data_facts(config, data.train.fingerprint),
        "fingerprint": prints,
        "layout": {"world_size": mesh.world_size, **asdict(config.parallel)},
        "config": tree,
        "records": asdict(recorded),
    }


def sample(config: TrainConfig, mesh: Mesh, engine: Engine, data: Data, step: int) -> str | None:
    """What the model writes after the prompt; None where none is asked for."""
    choice = config.sample
    if not choice.tokens or data.tokenizer is None:
        return None
    prompt = data.tokenizer.encode_prompt(choice.prompt)
    tokens = generate(engine, prompt, choice.tokens, choice.temperature, config.batch.seq_len, config.seed, mesh)
    text = data.tokenizer.decode(tokens)
    written = f"the model writes:\n{text}"
    if mesh.rank == 0:
        try:
            keep_sample(Path(config.run_dir), Sample(step, choice.prompt, text))
        except DiskFull as error:  # all else is saved
            written += f"\nwhich is not kept: {error}"
    if len(tokens) < len(prompt) + choice.tokens:
        written += "\nand no more: its logits there are not finite"
    return written
