"""The parity harness: a configuration on its layout against one process, in float64.

`run_layout` drives the product's own pieces on a mesh and records, for every step, the loss, every parameter's
gradient and every parameter's update, gathered. `run_plain` does the same in one process with nothing of the product
but the model, its initial numbers and the data: torch's autograd, a textbook's attention, AdamW and masks, one batch, no
shards.
"""

import functools
import itertools
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from rowwise.kernels.rows import local, row_offset
from rowwise.launch.compose import compose_tree
from rowwise.optim.average import PREFIX as AVERAGE
from rowwise.optim.build import named_state
from rowwise.optim.lr_schedules import OneCycle
from rowwise.optim.sparse.build import Sparsity
from rowwise.optim.sparse.masks import unpack
from rowwise.parallel.config import DEGREES, resolve_degrees
from rowwise.parallel.mesh import Mesh, Workers, make_mesh
from rowwise.trainer import parallelize as onto_mesh
from rowwise.trainer.adapters.begin import begin_adapter, with_choices_made
from rowwise.trainer.assemble import assemble as assemble_run
from rowwise.trainer.build import build_model
from rowwise.trainer.check import check
from rowwise.trainer.config import TrainConfig, config_from_tree
from rowwise.trainer.data.batches import MicroBatch, micro_batches
from rowwise.trainer.data.open import Data, open_data
from rowwise.trainer.engine import Engine, WholeModel
from rowwise.trainer.feed import train_batches
from rowwise.trainer.models.decoder import Decoder, parameter_specs
from rowwise.trainer.models.init import random_rows
from rowwise.trainer.parallelize import parallelize
from rowwise.trainer.step import StepInput, StepReport
from rowwise.trainer.update import accept, make_update
from textbook import attention, textbook_step
from textbook_adapters import Triplets, adapt, begin_textbook_step
from textbook_sparse import prune_forwards, textbook_sparsity

TOLERANCE = 1e-9
VOCABULARY = 61
UNSAID = (24, 3)  # sequences of a step and of a micro-batch, in a configuration that says nothing of either
Key = TypeVar("Key", bound=Hashable)


@dataclass
class Trace:
    """What law 2 compares: a list entry a step. `masks` and `weights`: of sparse matrices, after it."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    gradients: list[dict[str, Tensor]] = field(default_factory=list)
    updates: list[dict[str, Tensor]] = field(default_factory=list)
    states: list[dict[str, Tensor]] = field(default_factory=list)
    valid_tokens: list[int] = field(default_factory=list)
    masks: list[dict[str, Tensor]] = field(default_factory=list)
    weights: list[dict[str, Tensor]] = field(default_factory=list)


Piece = tuple[torch.Size, int, np.ndarray]  # logical shape, logical row of the first, the rows that a rank holds
Offsets = dict[tuple[Any, ...], int]  # shape, placements and mesh -> logical row of the first


def write_tokens(folder: Path, tokens: int = 6000) -> Path:
    """A raw token file whose documents are short in one half and long in the other, so that ranks get unequal numbers
    of valid tokens."""
    random = np.random.default_rng(7)
    stream = random.integers(1, VOCABULARY, tokens)
    # Some structure, so that there is something to learn.
    stream[1::2] = (stream[::2] * 7 + 3) % (VOCABULARY - 1) + 1
    ends = random.random(tokens) < np.where(np.arange(tokens) < tokens // 2, 0.2, 0.01)
    stream[ends] = 0
    path = folder / "tokens.bin"
    stream.astype(np.uint16).tofile(path)
    return path


def small_config(folder: Path, *overrides: str) -> TrainConfig:
    """A float64 run of a small model with uneven rows everywhere (61, 37, 30, 10), unequal token masks and accumulation: what a
    rank has is two micro-batches a step (`with_layout`), unless `overrides` say how large they are."""
    tokens = folder / "tokens.bin"
    if not tokens.exists():
        write_tokens(folder)
    base = [
        f"run_dir={folder}/run", "name=parity", "precision=fp64", "steps=3", "log_every=1000",
        "model.layers=2", "model.dim=30", "model.heads=3", "model.kv_heads=1", "model.ffn_dim=37", "model.init_std=0.2",
        f"model.vocab_size={VOCABULARY}", "data=tokens", f"data.files=[{tokens}]", "data.separator=0",
        "data.mask_documents=true", "data.holdout=0.1", "batch.global_size=24", "batch.seq_len=13",
        "schedule=constant", "optim.lr=0.01", "clip_norm=0.5", "eval.every=0", "sample.tokens=0", "checkpoint.every=0",
        f"batch.micro_size={2 if any('batch.global_size=' in word for word in overrides) else UNSAID[1]}",
    ]  # fmt: skip
    return config_from_tree(compose_tree(base + list(overrides)))


def with_beta1(config: TrainConfig, step: int) -> TrainConfig:
    """`config` with the first of `optim.betas` that a momentum cycle has at this step."""
    beta1 = config.schedule.beta1(step, config.steps) if isinstance(config.schedule, OneCycle) else None
    return (
        config if beta1 is None else replace(config, optim=replace(config.optim, betas=[beta1, config.optim.betas[1]]))
    )


def with_layout(config: TrainConfig, world_size: int, **degrees: int) -> TrainConfig:
    """`config` on a layout, checked; in two micro-batches a rank and step, where it does not say how large they are."""
    parallel = resolve_degrees(replace(config.parallel, **degrees), world_size)
    config = replace(config, parallel=parallel)
    unsaid = (config.batch.global_size, config.batch.micro_size) == UNSAID
    return check(in_micro_batches(config, 2) if unsaid else config, world_size)


def in_micro_batches(config: TrainConfig, count: int) -> TrainConfig:
    """`config`, on its layout, with so many micro-batches a rank and step: small ones cost as much as large ones."""
    mine = config.batch.global_size // config.parallel.data_degree
    return replace(config, batch=replace(config.batch, micro_size=mine // count))


def run_layout(workers: Workers, config: TrainConfig, steps: int = 3) -> Trace:
    """Runs `config` on its mesh. Every rank returns its numbers; rank 0 also the tensors, put together."""
    return run_on(make_mesh(config.parallel, workers), config, steps)


def run_layouts(workers: Workers, configs: list[TrainConfig], steps: int = 3, coarse: bool = False) -> list[Trace]:
    """The same for many configurations of one mesh: a mesh costs more than a few steps."""
    mesh = make_mesh(configs[0].parallel, workers)
    return [run_on(mesh, config, steps, coarse) for config in configs]


def run_together(ranks: Any, configs: Mapping[Key, TrainConfig], steps: int = 3) -> dict[Key, list[Trace]]:
    """Runs each on the ranks of its layout; what every rank returned. Those of one mesh are one call, of at most so many that a
    busy machine answers in time."""
    alike = defaultdict[tuple, list[Key]](list)
    for key, config in configs.items():
        parallel = config.parallel
        degrees = tuple(getattr(parallel, degree) for degree in DEGREES)
        alike[degrees, parallel.zero > 0, parallel.ring_order, parallel.inner_shard].append(key)
    found: dict[Key, list[Trace]] = {}
    for keys in alike.values():
        for some in (keys[first : first + 30] for first in range(0, len(keys), 30)):
            world = configs[some[0]].parallel.world_size
            everyone = ranks.run(run_layouts, world, [configs[key] for key in some], steps)
            found |= {key: list(traces) for key, traces in zip(some, zip(*everyone, strict=True), strict=True)}
    return found


def assert_every_layout(ranks: Any, config: TrainConfig, configs: Mapping[Any, TrainConfig]) -> None:
    """Holds a run on each of its layouts against one process."""
    reference = run_plain(config)
    for traces in run_together(ranks, configs).values():
        assert_all_same(traces, reference)


def run_on(mesh: Mesh, config: TrainConfig, steps: int, coarse: bool = False) -> Trace:
    """`coarse`: see `coarsen_`."""
    data = open_data(config.data, config.batch.seq_len, config.model.vocab_size)
    begin = functools.partial(train_batches, config, mesh, data, 0)
    config, known = with_choices_made(config, mesh, data.train.fingerprint, begin)
    with mock.patch.object(onto_mesh, "initial_rows", coarse_rows) if coarse else nullcontext():
        built = assemble_run(config, mesh)
    begin_adapter(config, mesh, built.engine, begin, known)
    model, optimizer, sparsity = built.model, built.optimizer, built.sparsity

    def keep_gradients(report: StepReport) -> StepReport:
        """Before the update, in which masks may change them."""
        for name, p in model.named_parameters():
            if p.requires_grad and not config.optim.in_backward:  # which leaves none
                pieces["gradients", len(trace.losses), name] = piece_of(p.grad, offsets)
        return report

    at_once = config.parallel.post_validation  # they are clipped after they were judged
    judge = accept if at_once else keep_gradients
    update = make_update(config, mesh, built.engine, optimizer, sparsity, judge, built.average, built.allocation)
    batches = train_batches(config, mesh, data, position=0)
    trace = Trace()
    pieces: dict[tuple[str, int, str], Piece] = {}
    offsets: Offsets = {}
    for step in range(steps):
        # Of rows, not of what DTensor makes of them: it would learn each operation anew for every mesh.
        before = {name: local(p).detach().clone() for name, p in model.named_parameters()}
        report = update(step_input(config, step + 1, next(batches)))
        if at_once:
            keep_gradients(report)
        optimizer.zero_grad()
        for name, p in model.named_parameters():
            shape, offset, after = piece_of(p, offsets)
            pieces["updates", step, name] = shape, offset, after - numbers_of(before[name])
        for name, state in named_state(model, optimizer).items():
            pieces |= {("states", step, f"{name}.{key}"): piece_of(t, offsets) for key, t in state.items()}
        for kept in (built.average, built.allocation):
            averages = {} if kept is None else kept.named_state()
            pieces |= {("states", step, name): piece_of(t, offsets) for name, t in averages.items()}
        pieces |= sparse_pieces(sparsity, dict(model.named_parameters()), step, offsets)
        trace.losses.append(report.loss)
        trace.norms.append(report.grad_norm)
        trace.valid_tokens.append(report.valid_tokens)
    built.close()
    everyone: list[dict[tuple[str, int, str], Piece]] | None = [{}] * mesh.world_size if mesh.rank == 0 else None
    dist.gather_object(pieces, everyone)
    for kind, step, name in dict.fromkeys(key for part in everyone or [] for key in part):
        entries = getattr(trace, kind)
        entries += [{} for _ in range(step + 1 - len(entries))]
        entries[step][name] = assemble(
            [part[kind, step, name] for part in everyone or [] if (kind, step, name) in part]
        )
    trace.masks = [{n: unpack(mask, w[n].size(1)) for n, mask in masks.items()}
                   for masks, w in zip(trace.masks, trace.weights, strict=True)]  # fmt: skip
    return trace


def sparse_pieces(
    sparsity: Sparsity | None, params: dict[str, Tensor], step: int, offsets: "Offsets"
) -> dict[tuple[str, int, str], "Piece"]:
    """Packed masks, the weights under them, and dense weights behind them, which are states as others are."""
    pieces = {}
    for key, t in sparsity.named_state().items() if sparsity is not None else ():
        name, _, what = key.rpartition(".")
        if what == "mask":
            pieces["masks", step, name] = piece_of(t, offsets)
            pieces["weights", step, name] = piece_of(params[name].detach(), offsets)
        elif what == "dense":
            pieces["states", step, key] = piece_of(t, offsets)
    return pieces


def coarse_rows(config: TrainConfig) -> Callable[[str, Tensor, int, int], None]:
    """Initial numbers of which many are equal: see `coarsen_`."""
    fill_ = random_rows(parameter_specs(config.model), config.seed)

    def coarse(name: str, rows: Tensor, start: int, size: int) -> None:
        fill_(name, rows, start, size)
        coarsen_([rows])

    return coarse


def engine_on(mesh: Mesh, config: TrainConfig) -> Engine:
    """What runs the model of `config` on its mesh, as in a run."""
    engine, _ = parallelize(build_model(config, mesh), config, mesh)
    return engine


def plain_engine(mesh: Mesh, config: TrainConfig) -> Engine:
    """What runs the whole model in one process."""
    return WholeModel(plain_model(config), mesh.device, 0, mesh.states["replicate"].get_group())


def step_input(config: TrainConfig, step: int, batches: list[MicroBatch], **more: Any) -> StepInput:
    """What step t (counted from 1) of a run takes."""
    return StepInput(step, batches, config.batch.positions, config.clip_norm, **more)


def coarsen_(tensors: Sequence[Tensor]) -> None:
    """Every weight of a matrix becomes 1/16 or 1/8 in magnitude: many are equal, and stay so under Lion with lr 1/16."""
    for w in tensors:
        if w.ndim == 2:
            w.copy_(torch.where(w.abs() > 0.2, 2, 1) * torch.where(w < 0, -1, 1) / 16)


def piece_of(tensor: Tensor, offsets: "Offsets | None" = None) -> "Piece":
    """What this rank has of `tensor`; no tensors, which take far longer to send. `offsets`: of those that lie alike, which DTensor
    takes as long to say as an update takes."""
    offset = 0
    if isinstance(tensor, DTensor):
        place = tensor.shape, tensor.placements, id(tensor.device_mesh)
        offsets = {} if offsets is None else offsets
        if place not in offsets:
            offsets[place] = row_offset(tensor)
        offset = offsets[place]
    return tensor.shape, offset, numbers_of(local(tensor).detach()).copy()


def numbers_of(rows: Tensor) -> np.ndarray:
    """The same numbers in numpy, which has no bf16."""
    return (rows.float() if rows.dtype == torch.bfloat16 else rows).cpu().numpy()


def assemble(pieces: list["Piece"]) -> Tensor:
    """The logical tensor. Ranks that hold the same rows must hold the same numbers, to the last bit."""
    shape = pieces[0][0]
    rows: dict[int, Tensor] = {}
    for _, offset, held in pieces:
        rows_here = torch.from_numpy(held)
        if rows_here.numel():
            first = rows.setdefault(offset, rows_here)
            assert torch.equal(first, rows_here), "ranks hold different numbers for the same rows"
    tensor = torch.cat([rows[offset] for offset in sorted(rows)]) if shape else rows[0]
    assert tensor.shape == shape, f"the rows {sorted(rows)} do not make {tuple(shape)}"
    return tensor


def run_plain(config: TrainConfig, steps: int = 3, coarse: bool = False) -> Trace:
    """The same in one process, written as a textbook would."""
    data = open_data(config.data, config.batch.seq_len, config.model.vocab_size)
    model = plain_model(config)
    adapt(model, config, lambda step: global_batch(config, data, step))
    if coarse:
        coarsen_([p.detach() for p in model.parameters()])
    every = dict(model.named_parameters())
    params = {name: p for name, p in every.items() if p.requires_grad}
    states: dict[str, dict[str, Tensor]] = {name: {} for name in params}
    prune_forwards(model, config.sparsity)
    sparsity = textbook_sparsity(config.sparsity, params, config.seed, config.steps)
    triplets = Triplets(config, params)
    means = {f"{AVERAGE}{name}": p.detach().clone() for name, p in params.items()}
    trace = Trace()
    for step in range(steps):
        batch = global_batch(config, data, step)
        lr = config.optim.lr * config.schedule.factor(step, config.steps)
        begin_textbook_step(step * config.batch.global_size)
        with rounded_weights(params, config.parallel.quantize_gather):
            logits = model(batch.inputs, batch.positions, batch.documents)
            loss = F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), reduction="mean")
            (loss + triplets.penalty()).backward()
        sparsity.filter_gradients(step + 1)
        norm = torch.sqrt(sum((p.grad**2).sum() for p in params.values()))
        for p in params.values():
            p.grad *= min(1.0, config.clip_norm / float(norm)) if config.clip_norm else 1.0
        trace.gradients.append({name: p.grad.clone() for name, p in params.items()})
        before = {name: p.detach().clone() for name, p in params.items()}
        optimise = functools.partial(textbook_update, with_beta1(config, step), params, states, step + 1, lr)
        sparsity.step(step + 1, optimise, states)
        triplets.step(step)
        model.zero_grad()
        unchanged = {name: torch.zeros_like(p) for name, p in every.items() if name not in params}
        trace.updates.append(unchanged | {name: p.detach() - before[name] for name, p in params.items()})
        kept = {f"{n}.{key}": t.clone() for n, state in states.items() for key, t in state.items()}
        if config.average.ema is not None:
            take_in(means, params, step, config)
            kept |= {name: mean.clone() for name, mean in means.items()}
        trace.states.append(kept | sparsity.extra_states() | triplets.states())
        trace.masks.append(dict(sparsity.masks))
        trace.weights.append({name: params[name].detach().clone() for name in sparsity.masks})
        trace.losses.append(loss.item())
        trace.norms.append(float(norm))
        trace.valid_tokens.append(int((batch.labels >= 0).sum()))
    return trace


def take_in(means: dict[str, Tensor], params: dict[str, Tensor], made: int, config: TrainConfig) -> None:
    """The average of the weights, after as many updates as were made before, and one more."""
    kept = config.average.ema
    if config.average.warmup:
        kept = min(kept, (1 + made) / (10 + made))
    for name, p in params.items():
        means[f"{AVERAGE}{name}"].mul_(kept).add_((1 - kept) * p.detach())


@contextmanager
def rounded_weights(params: dict[str, nn.Parameter], form: str) -> Iterator[None]:
    """Matrices are their 8-bit codes times scales, of 256 numbers of a row, and afterwards what they were."""
    exact = {name: p.detach().clone() for name, p in params.items() if form == "int8" and p.ndim == 2}
    for name, w in exact.items():
        for row, x in itertools.product(range(w.size(0)), range(0, w.size(1), 256)):
            block = w[row, x : x + 256]
            scale = block.abs().max() / 127
            params[name].data[row, x : x + 256] = (block / scale).round() * scale if scale else 0.0
    yield
    for name, w in exact.items():
        params[name].data.copy_(w)


@torch.no_grad()
def textbook_update(
    config: TrainConfig, params: dict[str, Tensor], states: dict[str, dict[str, Tensor]], t: int, lr: float
) -> None:
    """Update t of all parameters."""
    for name, p in params.items():
        rate = lr * (getattr(config.adapter, "b_lr_ratio", 1.0) if name.endswith(".lora_b") else 1.0)
        p.copy_(textbook_step(name, states[name], p, p.grad, t, rate, config.optim, config.seed))


def plain_model(config: TrainConfig) -> Decoder:
    """The whole model on one process, in float64, with the run's initial numbers."""
    model = Decoder(config.model, attend=attention).double()
    fill_ = random_rows(model.parameter_specs(), config.seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            fill_(name, p, 0, p.size(0))
    return model


def global_batch(config: TrainConfig, data: Data, step: int) -> MicroBatch:
    """All sequences of a step in one batch."""
    size = config.batch.global_size
    indices = data.train.drawn(step * size, size, f"train/{config.seed}")
    return micro_batches(indices, data.train, size)[0]


def whole(tensor: Any) -> Tensor:
    """The logical tensor, on every rank."""
    return tensor.full_tensor().detach().clone() if isinstance(tensor, DTensor) else tensor.detach().clone()


def assert_all_same(traces: list[Trace], reference: Trace, tolerance: float = TOLERANCE) -> None:
    """Law 2: what the ranks have together (rank 0 put it together) is what the reference has."""
    assert all(trace.losses == traces[0].losses and trace.norms == traces[0].norms for trace in traces)
    assert_same(traces[0], reference, tolerance)


def assert_same(layout: Trace, reference: Trace, tolerance: float = TOLERANCE) -> None:
    """Law 2, with the guards that make it mean something."""
    assert all(norm > 0 for norm in reference.norms), "the gradient is zero: the test would see nothing"
    assert len(set(reference.losses)) == len(reference.losses), "the loss does not move"
    assert layout.valid_tokens == reference.valid_tokens
    np.testing.assert_allclose(layout.losses, reference.losses, rtol=tolerance)
    np.testing.assert_allclose(layout.norms, reference.norms, rtol=tolerance)
    for kind in ("gradients", "updates", "states"):
        for step, (ours, theirs) in enumerate(zip(getattr(layout, kind), getattr(reference, kind), strict=True)):
            assert ours.keys() == theirs.keys()
            learns = reference.gradients[step] if reference.gradients else theirs
            still = {name for name in theirs if kind == "updates" and name not in learns}
            if kind == "updates":  # all triplets of a matrix are gone
                still |= {name for name in theirs if name.endswith(".lora_e") and not theirs[name].any()}
            if step == 0:  # a product whose other matrix begins at 0
                still |= {name for name in theirs if ".lora_a" in name and not theirs[name].any()}
            assert not any(ours[name].any() for name in still), f"step {step}, {kind}: what is still has changed"
            floats = [name for name in theirs if theirs[name].is_floating_point() and name not in still]
            for name in floats:
                error = relative_error(ours[name], theirs[name])
                # Absolute maxima are kept in float32, whose last place a rounding may turn.
                bound = 2**-23 if theirs[name].dtype == torch.float32 else tolerance
                assert error <= bound, f"step {step}, {kind} of {name}: relative error {error:.2e}"
            assert_same_codes(ours, theirs)
    assert_same_masks(layout, reference)


def assert_same_masks(layout: Trace, reference: Trace) -> None:
    """After every step, in every place."""
    assert len(layout.masks) == sum(1 for masks in reference.masks if masks)
    for step, (ours, theirs) in enumerate(zip(layout.masks, reference.masks, strict=False)):
        assert ours.keys() == theirs.keys()
        different = {name: int((ours[name] ^ mask).sum()) for name, mask in theirs.items()}
        assert not any(different.values()), f"step {step}: so many positions of masks differ: {different}"


def assert_same_codes(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    """8-bit codes, and indices, are equal but for boundary cases: at most one in a million, each to the next code."""
    integers = [name for name in theirs if not theirs[name].is_floating_point()]
    different = {name: (ours[name].long() - theirs[name].long()).abs() for name in integers}
    counted = sum(int((d > 0).sum()) for d in different.values())
    entries = sum(d.numel() for d in different.values())
    assert counted <= entries * 1e-6, f"{counted} of {entries} codes differ"
    assert all(int(d.max()) <= 1 for d in different.values() if d.numel())


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference over the largest entry."""
    assert ours.shape == theirs.shape, f"{tuple(ours.shape)} and {tuple(theirs.shape)}"
    scale = theirs.abs().max()
    assert scale > 0, "the reference is all zero"
    return float((ours - theirs).abs().max() / scale)
