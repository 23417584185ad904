"""train(config): build, resume, loop, save."""

import functools
import gc
import time
from contextlib import ExitStack, closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from rowwise.kernels.products import float32_products
from rowwise.optim.average import averaged
from rowwise.optim.build import set_step
from rowwise.optim.lr_schedules import LrRange
from rowwise.parallel.activations.saved import open_stores
from rowwise.parallel.mesh import Mesh, Workers, make_mesh
from rowwise.parallel.pipeline import Trace
from rowwise.parallel.precision import product_precision
from rowwise.trainer.adapters.begin import with_choices_made
from rowwise.trainer.asked import asked_of, text_of
from rowwise.trainer.assemble import Assembled, assemble
from rowwise.trainer.begin import range_test, resume
from rowwise.trainer.checkpoint import Saver
from rowwise.trainer.clock import Clock
from rowwise.trainer.config import TrainConfig, tree_of
from rowwise.trainer.data.open import Data
from rowwise.trainer.evaluate import evaluate
from rowwise.trainer.feed import Fed, Feed, eval_batches, train_batches
from rowwise.trainer.files import DiskFull, fingerprint
from rowwise.trainer.finite import require_usable
from rowwise.trainer.lr_range import RangeTest
from rowwise.trainer.memory import keep_memory, watching
from rowwise.trainer.metrics import Recorded
from rowwise.trainer.models.code import print_of_code
from rowwise.trainer.norms import norms_of_next
from rowwise.trainer.offloading import require_folder
from rowwise.trainer.pipeline import keep_trace
from rowwise.trainer.profile import Profiler
from rowwise.trainer.record import number_or_none, source_record, sparsity_record, step_record
from rowwise.trainer.report import Outlets, Reporter, open_reporter
from rowwise.trainer.resume import data_facts, model_facts, state_facts
from rowwise.trainer.rollback import Rollbacks, go_back, is_anchor, judge
from rowwise.trainer.same_data import require_same_data, require_sound, try_data
from rowwise.trainer.sample import generate
from rowwise.trainer.spike import in_words, spike_record
from rowwise.trainer.starts import Sample, keep_sample
from rowwise.trainer.state import TrainState, advance
from rowwise.trainer.states import name_of
from rowwise.trainer.step import RankStatus, StepInput, StepReport
from rowwise.trainer.stop import StopRequest
from rowwise.trainer.update import Update, make_update


def train(config: TrainConfig, workers: Workers | None = None, command: str | None = None) -> TrainState:
    """Runs `config` to its last step, or until asked to stop, and returns the numbers it ended with. `command`: by which it
    was started, for whoever reads its folder.

    Every worker calls it with the same configuration, checked and resolved by `trainer.prepare` on rank 0. Makes the
    process groups and takes them down. Raises FloatingPointError where the loss is no number, DataDamaged, FolderUnfit,
    and Unbegun.
    """
    # Before the groups exist: where a corpus is built first, they would lose patience.
    opened, workers = try_data(config), workers or Workers()
    mesh = make_mesh(config.parallel, workers)
    data = require_same_data(opened, mesh)
    require_folder(config, mesh)
    batches = functools.partial(train_batches, config, mesh, data, 0)
    config, known = with_choices_made(config, mesh, data.train.fingerprint, batches)
    data.watch.share(workers.local_rank, workers.local_world_size)
    with data.watch, StopRequest() as stop, Outlets(command) as outlets:
        end = _train(config, mesh, data, stop, outlets, [], known)
        while not isinstance(end, TrainState):
            gc.collect()  # a model and its hooks are in circles, and there is no room for two
            end = _train(config, mesh, data, stop, outlets, end, {})
    # Not where it failed: taking down a group can wait for a peer that is gone.
    dist.destroy_process_group()
    return end


def _train(
    config: TrainConfig, mesh: Mesh, data: Data, stop: StopRequest, outlets: Outlets, rollbacks: Rollbacks,
    known: dict[str, Tensor],
) -> TrainState | Rollbacks:  # fmt: skip
    """From where the run stands to its end, or to a spike that it goes back from: what it goes back by is given to the next
    call, which heeds a `stop` that was asked for meanwhile. `known`: see `with_choices_made`."""
    built = assemble(config, mesh)
    model, optimizer, states = built.model, built.optimizer, built.states
    begun = resume(config, mesh, data, built, rollbacks, known)
    state, first, back, saved = begun.state, begun.state.step, Rollbacks(), dict[str, float]()
    update = update_of(config, mesh, built, state)
    products = float32_products(product_precision(config.precision, mesh.device))
    with products, open_stores(model), closing(built), ExitStack() as stack:
        reporter = stack.enter_context(open_reporter(config, mesh, data, begun, built.assignments, outlets))
        outlets.tell_start(config, mesh, first)
        test, saver = range_test(config, mesh, first), stack.enter_context(make_saver(config, mesh, built))
        feed = stack.enter_context(Feed(config, mesh, data, state.position))
        clock, stopping = Clock(config, mesh.rank, begun.manifest), test is not None and test.over
        stop.hear(reporter.say)
        stack.callback(lambda: None if back else stop.close())
        profiler = stack.enter_context(Profiler(config, mesh))
        while state.step < config.steps and not stopping:
            profiler.begin(state.step + 1)
            fed = feed.take(state.step + 1)
            status = RankStatus(stop.requested, data.watch.complaint is not None, fed.digest, *clock.due(), fed.pairs)
            given = input_of(config, mesh, state, fed, status)
            with watching(config, mesh, model, given.step, state.step == first, built.files) as watch:
                report, measured = learn(config, mesh, model, update, given)
            if not report.sound:
                saver.wait()  # an error would end the save under way
                require_sound(data, mesh, first, state.step, fed.digest)
            keep_memory(config, mesh, model, optimizer, states, watch)
            optimizer.zero_grad()
            if report.spike is not None and (back := answer_spike(config, mesh, state, report, saver, reporter)):
                return state if report.stop else back
            if not report.applied:
                saver.wait()  # an error would end the save under way
                require_usable(report, config, state, states, mesh)
            advance(state, report, config)
            record = step_record(config, mesh, state, report, given.loss_scale, fed, data)
            record |= measured | profiler.end(state.step) | sparsity_record(built.sparsity, config, state.step)
            record |= spike_record(state.spikes, state.step, report.spike, "skipped" if report.held else "recorded")
            if report.evaluate or config.eval.due(state.step, config.length):
                record |= eval_record(config, mesh, built, data, clock)
            reporter.step(record | saved)
            stopping = (test is not None and test.add(record)) or report.stop
            saved, started = {}, time.perf_counter()
            saver.poll()
            if stopping or report.save or config.checkpoint.due(state.step, config.length):
                saver.wait()  # its messages are not to meet those of the next line
                require_sound(data, mesh, first, state.step)
                saver.save(
                    state.step, states.read(), manifest_of(config, mesh, data, state, reporter.sync()) | clock.kept()
                )
                clock.saved()
                saved = {"save_seconds": time.perf_counter() - started}
        saver.wait()
        require_sound(data, mesh, first, state.step, saved=True)
        conclude(config, mesh, built, data, state, reporter, test)
        return state


def make_saver(config: TrainConfig, mesh: Mesh, built: Assembled) -> Saver:
    """Makes what saves the checkpoints of the run, and in them the running ranges of what its keeper keeps. A range test may end with
    weights that are no numbers."""
    ranges = None if built.keeper is None else built.keeper.ranges
    choice, checkpoints = config.checkpoint, Path(config.run_dir) / "checkpoints"
    spoilt_ends = not isinstance(config.schedule, LrRange)
    anchor = functools.partial(is_anchor, config)
    frozen = frozenset(name_of(name) for name, p in built.model.named_parameters() if not p.requires_grad)
    return Saver(checkpoints, mesh, choice.keep, choice.background, spoilt_ends, anchor, ranges, built.files, frozen)


def update_of(config: TrainConfig, mesh: Mesh, built: Assembled, state: TrainState) -> Update:
    """Makes what makes the steps of the run after `state`, judged by what that knows of those before."""
    set_step(built.optimizer, state.updates)
    judged = functools.partial(judge, config, state)
    return make_update(
        config, mesh, built.engine, built.optimizer, built.sparsity, judged, built.average, built.allocation
    )


def input_of(config: TrainConfig, mesh: Mesh, state: TrainState, fed: Fed, status: RankStatus) -> StepInput:
    """Returns what the step after `state` takes."""
    step, scale = state.step + 1, state.loss_scale.scale
    trace = Trace(mesh.device) if step == config.parallel.pipeline_trace else None
    return StepInput(step, fed.batches, config.batch.positions, config.clip_norm, scale, status, trace, fed.ahead)


def learn(
    config: TrainConfig, mesh: Mesh, model: nn.Module, update: Update, given: StepInput
) -> tuple[StepReport, dict[str, Any]]:
    """Makes a step. Returns its report, and what was measured of it that goes into its record; its timeline is kept. Its
    gradients are still there."""
    norms = norms_of_next(config, given.step - 1, model)
    report = update(given)
    if not report.sound:
        return report, {}
    if given.trace is not None:
        keep_trace(given.trace, Path(config.run_dir) / "pipeline", mesh)
    return report, norms.measure(model, report, config, mesh) if norms is not None else {}


def answer_spike(
    config: TrainConfig, mesh: Mesh, state: TrainState, report: StepReport, saver: Saver, reporter: Reporter
) -> Rollbacks:
    """Returns what a run goes back by from a spike in the step after `state`; empty where it goes on. Says what is done about it.
    Raises TooManySpikes."""
    assert report.spike is not None
    if config.on_spike == "rollback":
        saver.wait()  # its messages are not to meet those of the next line
        if back := go_back(config, mesh, state, report.spike):
            if report.stop:
                reporter.say(f"asked to stop in a spike: step {back[-1].to} is saved; resume=auto goes on")
            return back
    if report.held:
        reporter.warn(f"{in_words(state.step + 1, report.spike)}: its update is skipped")
    return []


def eval_record(config: TrainConfig, mesh: Mesh, built: Assembled, data: Data, clock: Clock) -> dict[str, Any]:
    """Returns what a step that evaluates adds to its record: the held-out loss, of the average where one is kept, and the seconds
    that it took."""
    started = time.perf_counter()
    with averaged(built.average):
        loss, by_source = evaluate(built.engine, eval_batches(config, mesh, data))
    clock.evaluated()
    found = {"eval_loss": number_or_none(loss), "eval_seconds": time.perf_counter() - started}
    return found | source_record("eval_loss", data, by_source)


def manifest_of(
    config: TrainConfig, mesh: Mesh | Workers, data: Data, state: TrainState, recorded: Recorded
) -> dict[str, Any]:
    """Returns what a checkpoint says of itself, beside its files."""
    tree = tree_of(config)
    prints = {"config": fingerprint(tree), "data": data.train.fingerprint}
    if data.tokenizer is not None:
        prints["tokenizer"] = data.tokenizer.fingerprint
    if config.model.own is not None and (code := print_of_code(config.model.own)) is not None:
        prints["code"] = code
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


def conclude(
    config: TrainConfig,
    mesh: Mesh,
    built: Assembled,
    data: Data,
    state: TrainState,
    reporter: Reporter,
    test: RangeTest | None,
) -> None:
    """Says what came out of a run that makes no more steps."""
    reporter.stand()
    reporter.say(data.watch.unread())
    if test is not None and (test.over or state.step == config.steps):
        reporter.say(test.told())
        return
    reporter.say(sample(config, mesh, built, data, state.step) if state.step >= config.steps else None)
    reporter.end(state, writes=data.tokenizer is not None)


def sample(config: TrainConfig, mesh: Mesh, built: Assembled, data: Data, step: int) -> str | None:
    """Returns what the model writes after the prompt; None where none is asked for."""
    choice = config.sample
    if not choice.tokens or data.tokenizer is None:
        return None
    try:
        asked = asked_of(data.tokenizer, choice.prompt, mesh)
    except ValueError as refusal:
        return f"the model writes nothing after sample.prompt: {refusal}"
    with averaged(built.average):
        tokens = generate(
            built.engine,
            asked.tokens,
            choice.tokens,
            choice.temperature,
            config.batch.seq_len,
            config.seed,
            mesh,
            asked.end,
        )
    text = text_of(data.tokenizer, choice.prompt, asked, tokens)
    written = f"the model writes:\n{text}"
    if mesh.rank == 0:
        try:
            keep_sample(Path(config.run_dir), Sample(step, choice.prompt, text))
        except DiskFull as error:  # all else is saved
            written += f"\nwhich is not kept: {error}"
    if len(tokens) < len(asked.tokens) + choice.tokens and tokens[-1] != asked.end:
        written += "\nand no more: its logits there are not finite"
    return written
