"""What `rowwise convert` does with a checkpoint of DeepSpeed: the run of a tree, examined, begins with it."""

from pathlib import Path
from typing import Any

from rowwise.launch.ranks import default_nproc
from rowwise.trainer.config import config_from_tree
from rowwise.trainer.convert.differences import differences
from rowwise.trainer.convert.find import Found
from rowwise.trainer.convert.native import write_run
from rowwise.trainer.convert.universal import read_universal
from rowwise.trainer.convert.zero import read_zero
from rowwise.trainer.data.open import open_data
from rowwise.trainer.files import new_folder
from rowwise.trainer.prepare import examine


def converted(found: Found, tree: dict[str, Any], world_size: int | None, folder: Path) -> tuple[str, list[str]]:
    """Makes `folder` that of the run of `tree`, on `world_size` workers (None: as `rowwise train` starts it here). Returns what was
    done, in a line, and what is to be known. Raises ValueError."""
    foreign = read_universal(found.folder) if found.form == "universal" else read_zero(found.folder)
    config = config_from_tree(tree)
    workers = world_size or config.nproc or default_nproc()
    config = examine(config, workers, here=False)
    data = open_data(config.data, config.batch.seq_len, config.model.vocab_size)
    remarks = differences(foreign, config)
    with new_folder(folder) as partial:
        name = write_run(foreign, config, workers, data, partial)
    counts = foreign.counts
    told = f"{len(foreign.parameters)} parameters, {counts.steps:,} steps, {counts.samples:,} samples"
    return f"{found.folder} -> {folder / 'checkpoints' / name}: {told}", remarks
