"""What Accelerate's engines need, asked on rank 0 before anything is started."""

import importlib.metadata
import shutil
from pathlib import Path

from rowwise.parallel.accelerate.config import accelerated, by_deepspeed
from rowwise.parallel.accelerate.files import check_file
from rowwise.trainer.config import TrainConfig
from rowwise.trainer.models.decoder import parameter_count


def check_engine(config: TrainConfig) -> None:
    """Refuses a run through Accelerate for which a package is missing, or whose own file contradicts it. Raises ValueError."""
    if not accelerated(config):
        return
    for package in ("accelerate", *(["deepspeed"] if by_deepspeed(config) else [])):
        try:
            importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            raise ValueError(
                f"parallel.backend=accelerate: {package} is not installed; pip install {package}, or give parallel.backend=torch"
            ) from None
    check_file(config)


def check_engine_here(config: TrainConfig, device: str) -> None:
    """Refuses what this machine cannot do of it: folders that are not there or too small, and kernels for GPUs. Raises ValueError."""
    if not by_deepspeed(config):
        return
    asked = config.parallel.deepspeed
    for key in ("qwz", "qgz"):
        if getattr(asked, key) and device == "cpu":
            raise ValueError(
                f"parallel.deepspeed.{key}=true: DeepSpeed's 8- and 4-bit messages are kernels for GPUs, and this machine has none; "
                f"give parallel.deepspeed.{key}=false"
            )
    if config.precision.name == "fp16" and device == "cpu":
        raise ValueError(
            "precision=fp16 with parallel.backend=accelerate: DeepSpeed has 16-bit floats with a loss scale on GPUs, and this machine "
            "has none; give precision=bf16, or parallel.backend=torch"
        )
    parameters, _ = parameter_count(config.model)
    mine = parameters // config.parallel.shard
    places = {"offload_optimizer": 12 * mine, "offload_params": 4 * mine}
    for key, needed in places.items():
        where = getattr(asked, key)
        if where not in (None, "cpu"):
            _check_folder(f"parallel.deepspeed.{key}={where}", where, needed)


def _check_folder(given: str, where: str, needed: int) -> None:
    folder = Path(where).expanduser()
    if not where or not folder.is_dir():
        raise ValueError(
            f"{given}: there is no such folder; possible are null, cpu, or the path of a folder, which you make"
        )
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ValueError(
            f"{given}: a rank keeps {needed / 1e9:,.1f} GB there, and it has {free / 1e9:,.1f} GB free; give another folder, or more "
            "workers"
        )
