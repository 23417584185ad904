"""Rows that wait off the device: the same run, to the last bit, as with rows that do not; two blocks in memory. (Laws 2 and 4.)"""

import weakref
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import replace
from unittest import mock

import numpy as np
import psutil
import pytest
import torch

from parity import TOLERANCE, relative_error, run_layouts, run_plain, small_config, step_input, with_layout
from rowwise.kernels.rows import local
from rowwise.kernels.torch_dtensor import laid_out_as
from rowwise.launch.workers import keep_freed_memory
from rowwise.optim import optimizer as optimizing
from rowwise.optim.rule import rows_like, zeros_of
from rowwise.optim.transpose import transposed_like
from rowwise.parallel import away as waiting
from rowwise.parallel import read_ahead, row_file
from rowwise.parallel.mesh import make_mesh
from rowwise.parallel.read_ahead import ReadAhead
from rowwise.trainer.assemble import assemble
from rowwise.trainer.data.open import open_data
from rowwise.trainer.feed import train_batches
from rowwise.trainer.update import make_update

TENSORS = ("gradients", "updates", "states", "masks")
WIDE = ("model.dim=64", "model.heads=2", "model.kv_heads=1", "model.ffn_dim=76")
SPARSE = ("sparsity.update_every=1", "sparsity.stop_at=2")
TWO, HOST = ("parallel.pipeline=2",), ("memory.offload_params=cpu", "memory.offload_states=cpu")
# What meets what: each option is under rows in files, and gradients in files where they wait, on a layout that has them in its own
# way; layouts, rules and forms of numbers in turn. name -> (workers, options).
CASES: dict[str, tuple[int, tuple[str, ...]]] = {
    "one rank": (1, ("optim=adamw8bit", *WIDE)),
    "in the backward": (2, ("optim.in_backward=true", "batch.micro_size=12", "clip_norm=0")),
    "in the backward, one rank": (1, ("optim.in_backward=true", "batch.micro_size=24", "clip_norm=0", "optim=lion")),
    "more ranks than rows": (4, ("optim=adafactor", "model.dim=2", "model.heads=1", "model.kv_heads=1", "model.ffn_dim=3")),
    "replicas": (4, ("parallel.replicate=2", "optim=muon")),
    "replicas of whole rows": (2, ("parallel.replicate=2",)),
    "1f1b": (4, (*TWO, "model.tie_embeddings=true", "optim=fira", "optim.rank=8", "optim.refresh_every=2", *WIDE)),
    "whole rows in stages": (2, (*TWO, *HOST, "parallel.pipeline_schedule=zb_h1", "parallel.pipeline_gather=run")),
    "undone": (2, (*TWO, "parallel.pipeline_schedule=zb_h1", "parallel.post_validation=true", "clip_norm=1e-3")),
    "chunks": (2, (*TWO, "parallel.pipeline_schedule=zb_v", "parallel.virtual_stages=2", "model.layers=4", "batch.micro_size=6")),
    "ulysses": (2, ("parallel.ulysses=2", "model.heads=2", "model.kv_heads=2", "model.dim=32", "model.tie_embeddings=true")),
    "ring": (2, ("parallel.ring=2", "parallel.ring_order=zigzag", "memory.recompute=full")),
    "codes": (2, ("parallel.quantize_gather=int8", *WIDE)),
    "copies among neighbours": (4, ("parallel.inner_shard=2",)),
    "rigl": (2, ("sparsity=rigl", *SPARSE, "memory.recompute=selective")),
    "2:4": (2, ("sparsity=nm", "sparsity.decay=0.3", *WIDE)),
    "16 bits": (2, ("precision=bf16", "optim=adamw8bit", *WIDE)),
    "parameters of 16 bits": (2, ("precision=bf16", "optim.param_dtype=bf16", "batch.micro_size=12", "memory.compress=int8", *WIDE)),
    "16 bits, one rank": (1, ("precision=bf16", "optim=lion8bit", "memory.offload_activations=cpu", *WIDE)),
    "fp16": (2, ("precision=fp16", "optim=lion")),
}  # fmt: skip

# For these others stand: as many layouts, rules and forms of numbers are met without them.
FULL = (
    "in the backward, one rank",
    "replicas of whole rows",
    "whole rows in stages",
    "undone",
    "ring",
    "2:4",
    "16 bits, one rank",
    "fp16",
    "replicas",
    "copies among neighbours",
    "16 bits",
    "codes",
)


def config_of(folder, *overrides):
    return small_config(folder, "optim=adamw", "parallel.zero=3", "parallel.timeout_seconds=60", *overrides)


def away(config, params, gradients="none"):
    gradients = "none" if config.optim.in_backward else gradients
    memory = replace(config.memory, offload_states="cpu", offload_params=str(params), offload_gradients=str(gradients))
    return replace(config, memory=memory)


def assert_equal(first, other):
    assert (first.losses, first.norms) == (other.losses, other.norms)
    for kind in TENSORS:
        for mine, theirs in zip(getattr(first, kind), getattr(other, kind), strict=True):
            assert mine.keys() == theirs.keys()
            assert all(torch.equal(t, theirs[name]) for name, t in mine.items()), kind


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=pytest.mark.full) if case in FULL else case for case in CASES]
)
def test_rows_in_files_change_no_bit(ranks, tmp_path, case):
    world, overrides = CASES[case]
    given = with_layout(config_of(tmp_path, *overrides), world)
    plain = replace(given, memory=replace(given.memory, offload_states="none", offload_params="none"))
    first, other = ranks.run(run_layouts, world, [plain, away(plain, tmp_path, tmp_path)], 2)[0]
    assert first.losses[0] != first.losses[1]
    assert_equal(first, other)


@pytest.mark.parametrize("world", [3, pytest.param(1, marks=pytest.mark.full)])
def test_rows_in_host_memory_change_no_bit(ranks, tmp_path, world):
    plain = with_layout(config_of(tmp_path), world)
    places = [("cpu", "none"), (tmp_path, "none"), ("cpu", tmp_path)]
    first, *others = ranks.run(run_layouts, world, [plain, *(away(plain, *place) for place in places)], 2)[0]
    for other in others:
        assert_equal(first, other)


def test_it_is_the_run_of_one_process(ranks, tmp_path):
    config = config_of(tmp_path)
    reference, (trace, *_) = (
        run_plain(config),
        ranks.run(run_layouts, 2, [away(with_layout(config, 2), tmp_path, tmp_path)])[0],
    )
    assert trace.losses == pytest.approx(reference.losses, rel=TOLERANCE)
    assert trace.norms == pytest.approx(reference.norms, rel=TOLERANCE)
    for kind in ("gradients", "updates", "states"):
        for mine, theirs in zip(getattr(trace, kind), getattr(reference, kind), strict=True):
            assert all(relative_error(mine[name], t) <= TOLERANCE for name, t in theirs.items()), kind


class Reads:
    """A file that says what it is asked to read."""

    def __init__(self):
        self.asked = []

    def span(self, block):
        return 1

    def fetch(self, block, memory):
        self.asked.append(block)
        done = Future()
        done.set_result(block)
        return done


def test_the_block_that_follows_is_read_before_it_is_asked_for():
    file, forward, there_and_back = Reads(), "abcd", "abcdcba"
    reads = ReadAhead(file, forward)
    passes = (
        (there_and_back, there_and_back),
        (there_and_back, there_and_back),
        (forward, "abcdc"),  # the backward that came before
        (forward, forward),
        (there_and_back, there_and_back),
    )
    for number, (asked, read) in enumerate(passes):
        reads.begin()
        file.asked.clear()
        for place, block in enumerate(asked):
            assert reads.rows(forward.index(block)) == block
            if number == 1:
                assert "".join(file.asked) == read[: place + 2]
        assert "".join(file.asked) == read


def test_what_is_read_ahead_is_not_used_in_another_pass():
    file = Reads()
    reads = ReadAhead(file, "abc")
    for _ in range(2):
        reads.begin()
        reads.rows(0), reads.rows(1), reads.rows(2)
    reads.begin()
    reads.rows(0)  # b is read ahead
    reads.begin()
    file.asked.clear()
    reads.rows(1)
    assert file.asked == ["b"]


def peak_of_memory(workers, config, steps):
    """The most bytes that rows from files and for files took at once in each step, and those of each block."""
    live, peaks = 0, []

    def counted(size):
        nonlocal live
        memory = np.empty(size + row_file.BLOCK, dtype=np.uint8)

        def gone():
            nonlocal live
            live -= size

        weakref.finalize(memory, gone)
        live, peaks[-1] = live + size, max(peaks[-1], live + size)
        return torch.from_numpy(memory)[-memory.ctypes.data % row_file.BLOCK :][:size]

    with ExitStack() as stack:
        for module in (row_file, read_ahead, waiting):
            stack.enter_context(mock.patch.object(module, "aligned_memory", counted))
        # Of a step, whose portions are counted elsewhere, few.
        stack.enter_context(mock.patch.object(optimizing, "PORTION_BYTES", 40_000))
        peaks.append(0)
        mesh, data = (
            make_mesh(config.parallel, workers),
            open_data(config.data, config.batch.seq_len, config.model.vocab_size),
        )
        built = assemble(config, mesh)
        update = make_update(config, mesh, built.engine, built.optimizer, None)
        for step, batches in zip(range(steps), train_batches(config, mesh, data, position=0), strict=False):
            peaks.append(live)
            update(step_input(config, step + 1, batches))
            built.optimizer.zero_grad()
    return peaks, [sum(local(p).nbytes for m in part for p in m.parameters()) for part in built.model.parts()]


def test_two_blocks_are_in_memory_and_no_more(ranks, tmp_path, monkeypatch):
    layers = (
        "model.layers=6",
        "precision=fp32",
        "model.dim=64",
        "model.heads=2",
        "model.kv_heads=2",
        "model.ffn_dim=176",
    )
    config = away(with_layout(config_of(tmp_path, *layers), 1), tmp_path, tmp_path)
    (peaks, blocks) = ranks.run(peak_of_memory, 1, config, 3)[0]
    block, slack = max(blocks), 32 * row_file.BLOCK  # what is read is whole blocks of the disk
    assert sum(blocks) > 6 * block
    assert all(peak <= 4 * block + slack for peak in peaks), (peaks, blocks)
    assert peaks[1] > block


def devices_of_states(workers, config):
    """Where masks and states of a parameter lie whose rows are not on the device of the mesh."""
    mesh = make_mesh(config.parallel, workers)
    weight = assemble(config, mesh).model.head.weight
    elsewhere = laid_out_as(weight, torch.empty(local(weight).shape, device="meta"))
    kept = (zeros_of(elsewhere, torch.float32), rows_like(elsewhere, 3, torch.uint8), transposed_like(elsewhere))
    return {local(t).device.type for t in kept}


def test_what_is_kept_of_rows_lies_where_they_do(ranks, tmp_path):
    config = with_layout(config_of(tmp_path), 2)
    assert ranks.run(devices_of_states, 2, config) == [{"meta"}] * 2


def kept_memory(workers):
    """The bytes that a process keeps of tensors it has let go of: as its launcher has it, and with rows in files."""
    kept = []
    for told in (keep_freed_memory, waiting.give_memory_back):
        told()
        before = psutil.Process().memory_info().rss
        tensors = [torch.ones(4 << 20) for _ in range(6)]
        del tensors[::2], tensors
        kept.append(psutil.Process().memory_info().rss - before)
    return kept


def test_memory_that_is_let_go_of_is_given_back(ranks):
    ((_, kept),) = ranks.run(kept_memory, 1)
    assert kept < 16 << 20
