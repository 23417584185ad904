"""What the layers of a run keep between forward and backward: `memory.*`, applied where the model is made parallel."""

import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from rowwise.conf.refusal import Refusal, Refusals
from rowwise.parallel.activations.choose import kept_results
from rowwise.parallel.activations.compress import Coding, named_attention, tokens_on
from rowwise.parallel.activations.offload import store_on
from rowwise.parallel.activations.ranges import RunningRanges
from rowwise.parallel.activations.recompute import Keeping, recompute_whole
from rowwise.parallel.activations.results import LayerResults, Sharing
from rowwise.parallel.activations.saved import Keeper, attach, keeper_of
from rowwise.parallel.mesh import Mesh
from rowwise.parallel.precision import compute_dtype
from rowwise.trainer.config import TrainConfig
from rowwise.trainer.models.blocks import Layer
from rowwise.trainer.models.decoder import BLOCKS, Decoder

OWN_LAYERS: Refusals = (
    Refusal(
        ("memory.offload_activations", "compile", "model.block"),
        lambda run: run.memory.offload_activations != "none" and run.compile and results_of(run) is None,
        "memory.offload_activations={memory.offload_activations} with compile=true model.block={model.block}: its layers make no "
        "results by name, which could be compiled one by one; give compile=false, memory.offload_activations=none, or the block a "
        "table of its results (docs/memory.md)",
    ),
    Refusal(
        ("memory.recompute", "model.block"),
        lambda run: run.memory.recompute not in ("none", "full") and results_of(run) is None,
        "memory.recompute={memory.recompute} with model.block={model.block}: its layers make no results by name, of which some "
        "could be kept; give memory.recompute=none or full, or the block a table of its results (docs/memory.md)",
    ),
    Refusal(
        ("memory.recompute", "model.block", "parallel.ulysses", "parallel.ring"),
        lambda run: run.memory.recompute != "none" and results_of(run) is None and sharing_of(run).communicates,
        "memory.recompute={memory.recompute} with model.block={model.block} parallel.ulysses={parallel.ulysses} "
        "parallel.ring={parallel.ring}: its layers would send the messages of attention twice; give memory.recompute=none, or the "
        "block a table of its results (docs/memory.md)",
    ),
)


PROBE_BYTES = 32 << 20  # what is written to find out how fast a folder is


def check_folder(config: TrainConfig) -> None:
    """Refuses a folder for activations that is none, that cannot be written, that has less room than a rank needs, or that is so
    slow that other ranks would give up waiting: measured, on this machine. Raises ValueError."""
    where = config.memory.offload_activations
    if where in ("none", "cpu"):
        return
    given, folder = f"memory.offload_activations={where}", Path(where).expanduser()
    if not where or not folder.is_dir():
        raise ValueError(
            f"{given}: there is no such folder; possible are none, cpu, or the path of a folder, which you make"
        )
    needed, free = micro_batch_bytes(config), shutil.disk_usage(folder).free
    if needed > free:
        raise ValueError(
            f"{given}: a rank keeps {needed / 1e9:,.1f} GB of a micro-batch there, and it has {free / 1e9:,.1f} GB free; give "
            "another folder, a smaller batch.micro_size, memory.compress=int8 or memory.recompute"
        )
    try:
        seconds = needed / write_speed(folder, min(PROBE_BYTES, needed or PROBE_BYTES))
    except OSError as error:
        raise ValueError(f"{given} cannot be written ({error.strerror}); give another folder") from None
    if seconds > config.parallel.timeout_seconds:
        raise ValueError(
            f"{given}: {needed / 1e9:,.1f} GB of a micro-batch take {seconds:,.0f} s to be written there, at "
            f"{needed / seconds / 1e6:,.1f} MB/s, and ranks wait parallel.timeout_seconds={config.parallel.timeout_seconds} for each "
            "other; give a faster folder, or a smaller batch.micro_size"
        )


def micro_batch_bytes(config: TrainConfig) -> int:
    """Counts the bytes that the layers of a rank keep of one micro-batch, 0 where they make nothing by name. The degrees of the mesh
    must be resolved."""
    results = results_of(config)
    if results is None:
        return 0
    tokens = config.batch.micro_size * config.batch.seq_len // sharing_of(config).size
    itemsize, coded = compute_dtype(config.precision).itemsize, config.memory.compress != "none"
    every = sum(results.bytes_kept(names, itemsize, coded) for names in kept_of(config))
    return tokens * every // config.parallel.pipeline


def write_speed(folder: Path, size: int) -> float:
    """Measures the bytes a second that reach a folder's device. Raises OSError where it cannot be written."""
    with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
        started = time.perf_counter()
        file.write(bytes(size))
        os.fsync(file.fileno())
        return size / (time.perf_counter() - started)


def sharing_of(run: Any) -> Sharing:
    """Tells how many ranks share each sequence of a run, whose degrees are known."""
    return Sharing(run.parallel.ulysses, run.parallel.ring)


def results_of(run: Any) -> LayerResults | None:
    """Lists what a layer of a run makes by name; None: nothing."""
    return BLOCKS[run.model.block].results(run.model, sharing_of(run))


def kept_of(config: TrainConfig) -> list[frozenset[str]]:
    """Names, for each layer of the whole model, the results that it keeps."""
    results = results_of(config)
    assert results is not None
    itemsize = compute_dtype(config.precision).itemsize
    return kept_results(config.memory, results, config.model.layers, itemsize, (config.batch.seq_len + 1) / 2)


def keep_results(stages: Sequence[Decoder], config: TrainConfig, mesh: Mesh) -> None:
    """Makes the layers of each stage keep what the run says, in the form and at the place that it says, in place."""
    keeper = keeper_on(config, mesh, [layer for stage in stages for layer in stage.blocks])
    if one_by_one(config):
        recompute(stages, config, keeper)
    for stage in stages if keeper is not None else ():
        assert keeper is not None
        attach(keeper, stage, list(stage.blocks.items()))
        if config.memory.compress != "none":
            stage.attend = named_attention(keeper, stage.attend, config.model.kv_heads)


def one_by_one(config: TrainConfig) -> bool:
    """Says whether layers make their results one by one: some are made again, or compiled layers are to keep theirs off the device,
    which whole ones would not."""
    memory = config.memory
    return memory.recompute != "none" or (config.compile and memory.offload_activations != "none")


def keeper_on(config: TrainConfig, mesh: Mesh, layers: Sequence[str]) -> Keeper | None:
    """Makes what keeps the results of this rank's layers in another form or at another place; None: they stay as they are."""
    memory = config.memory
    if memory.compress == memory.offload_activations == "none":
        return None
    tokens = tokens_on(mesh, config.batch.seq_len)
    running = RunningRanges(layers, mesh.states.get_all_groups()) if memory.ranges == "running" else None
    coding = partial(Coding, config.seed, tokens, running=running) if memory.compress != "none" else None
    store = store_on(mesh.device, memory.offload_activations) if memory.offload_activations != "none" else None
    return Keeper(coding, store, running)


def ranges_of(model: nn.Module) -> RunningRanges | None:
    """Finds the running ranges of what the layers of `model`, or of its stages on this rank, keep; None: there are none."""
    keepers = (keeper_of(module) for module in model.modules())
    return next((keeper.ranges for keeper in keepers if keeper is not None), None)


def recompute(stages: Iterable[Decoder], config: TrainConfig, keeper: Keeper | None) -> None:
    """Makes the layers of each stage make again what the run says, in place. The functions that make their results are compiled
    one by one where the run is, but for attention, which messages or unequal documents go through."""
    results = results_of(config)
    blocks = [item for stage in stages for item in stage.blocks.items()]
    if results is None:
        for _, block in blocks:
            recompute_whole(block)
            if config.compile:
                block.compile()
        return
    kept = kept_of(config)
    looks = {result.name for result in results.results if result.pairs}
    compiled = results.names | {"out"} if config.compile else frozenset()
    for number, block in blocks:
        assert isinstance(block, Layer)
        block.making = Keeping(kept[int(number)], keeper, compiled - looks)
