"""Everything that can refuse a run, on rank 0, before any process group exists; and the run directory."""

import os
from dataclasses import replace
from pathlib import Path

import psutil
import torch

from rowwise.parallel.mesh import pick_device
from rowwise.trainer.accelerate.require import check_engine, check_engine_here
from rowwise.trainer.adapters.peft import check_adapter_source, with_ranks_of_folder
from rowwise.trainer.check import check
from rowwise.trainer.config import TrainConfig
from rowwise.trainer.data.batches import batch_bytes
from rowwise.trainer.data.config import Mixture
from rowwise.trainer.data.mixture import MixedCorpus, require_enough
from rowwise.trainer.data.open import open_data
from rowwise.trainer.files import writing
from rowwise.trainer.models.decoder import parameter_count, parameter_specs
from rowwise.trainer.models.huggingface import check_source
from rowwise.trainer.offloading import check_folder
from rowwise.trainer.plan.require import own_device, require_fit
from rowwise.trainer.pruned import check_semi_structured
from rowwise.trainer.resume import find_resume, refuse_other_steps
from rowwise.trainer.run_length import steps_of_epochs
from rowwise.trainer.sample import SAMPLED
from rowwise.trainer.watching import check_watched


def prepare(config: TrainConfig, world_size: int) -> TrainConfig:
    """Examines the run and makes its folder. Raises ValueError."""
    config = examine(config, world_size)
    make_writable(Path(config.run_dir))
    return config


def examine(config: TrainConfig, world_size: int, here: bool = True) -> TrainConfig:
    """Checks the configuration against the world, the data, the files it names and the checkpoints; returns it with
    degrees and defaults filled in. `here`: also against the devices and the memory of this machine. Raises ValueError."""
    config = check(config, world_size)
    check_engine(config)
    if here:
        check_engine_here(config, pick_device(0).type)
        check_semi_structured(config, pick_device(0))
        check_folder(config)
        check_watched(config.compile, config.profile.memory_step, pick_device(0).type)
        check_room(config, *_memory())
    data = open_data(config.data, config.batch.seq_len, config.model.vocab_size)
    if config.epochs is not None:
        steps = steps_of_epochs(config.epochs, data.train.samples, config.batch.global_size)
        config = check(replace(config, steps=steps), world_size)
    if isinstance(config.data, Mixture) and isinstance(data.train, MixedCorpus):
        require_enough(config.data, data.train, config.steps * config.batch.global_size, config.seed)
    if config.eval.every and not data.holdout.samples:
        raise ValueError(
            f"eval.every is on and data.holdout={config.data.holdout} holds out less than one sample of {data.tokens:,} tokens, "
            f"which batch.seq_len={config.batch.seq_len} makes {data.train.samples:,} samples of; raise data.holdout, give a "
            "smaller batch.seq_len, or eval.every=0"
        )
    if config.sample.tokens is None:
        config = replace(config, sample=replace(config.sample, tokens=0 if data.tokenizer is None else SAMPLED))
    if config.sample.tokens and data.tokenizer is None:
        raise ValueError(
            f"sample.tokens is on and data={config.data.name} has no tokenizer to write with; give sample.tokens=0"
        )
    if config.sample.tokens and data.tokenizer is not None and not data.tokenizer.encode_prompt(config.sample.prompt):
        raise ValueError(
            f"sample.prompt={config.sample.prompt!r} has no token to go on from; give one, or sample.tokens=0"
        )
    if config.model.init_from is not None:
        check_source(Path(config.model.init_from).expanduser(), config.model)
    adapter = with_ranks_of_folder(config.adapter, parameter_specs(config.model))
    check_adapter_source(adapter, parameter_specs(config.model))
    config = replace(config, adapter=adapter)
    refuse_other_steps(config, find_resume(config, data.train.fingerprint), data.train.fingerprint)
    if here:
        require_fit(config, own_device())
    return config


def check_room(config: TrainConfig, where: str, device_bytes: int, host_bytes: int) -> None:
    """Refuses what is larger than all the memory of a worker's device, `where`, or of its machine, by what a run cannot do
    without: a rank's parameters, unless they wait elsewhere, and the batches that it keeps on the host. `config` must be checked.
    Raises ValueError."""
    parallel, (parameters, _) = config.parallel, parameter_count(config.model)
    ranks = parallel.pipeline * (parallel.state_degree if parallel.zero else 1)
    width = 2 if config.optim.param_dtype == "bf16" else {"fp64": 8}.get(config.precision.name, 4)
    held, batches = parameters * width // ranks, batch_bytes(config.batch, parallel.data_degree)
    if held > device_bytes and config.memory.offload_params == "none":
        raise ValueError(
            f"{config.model.name} has {parameters:,} parameters, {held / 1e9:,.0f} GB of them on each rank, and {where} has "
            f"{device_bytes / 1e9:,.0f} GB; give a smaller model, or more workers with parallel.zero=1 to 3 or parallel.pipeline"
        )
    if batches > host_bytes:
        raise ValueError(
            f"batch.global_size={config.batch.global_size} batch.seq_len={config.batch.seq_len}: the batches that a rank keeps "
            f"take {batches / 1e9:,.0f} GB, and this machine has {host_bytes / 1e9:,.0f} GB; give a smaller batch, or more workers"
        )


def _memory() -> tuple[str, int, int]:
    """(what a worker computes on, its bytes, the bytes of the machine)."""
    host = psutil.virtual_memory().total
    if not torch.cuda.is_available():
        return "this machine", host, host
    device = torch.cuda.get_device_properties(0)
    return device.name, device.total_memory, host


def make_writable(run_dir: Path) -> None:
    """Makes the run directory. Raises ValueError where it cannot be made or written."""
    try:
        with writing(run_dir):
            run_dir.mkdir(parents=True, exist_ok=True)
            probe = run_dir / f".writable-{os.getpid()}"
            probe.touch()
            probe.unlink()
    except OSError as error:
        raise ValueError(f"run_dir={run_dir} cannot be written ({error.strerror}); give another run_dir") from None
