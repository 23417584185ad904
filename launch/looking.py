"""What `rowwise check` shows: the run that a tree is, examined for so many workers."""

from dataclasses import dataclass
from typing import Any

import torch

from rowwise.launch.ranks import default_nproc, require_ranks
from rowwise.parallel.mesh import pick_device
from rowwise.trainer.config import config_from_tree
from rowwise.trainer.data.open import open_data
from rowwise.trainer.peaks import device_name
from rowwise.trainer.prepare import examine
from rowwise.trainer.preview import parameter_table, pipeline_picture, preview, rate_picture


@dataclass(frozen=True)
class Shown:
    """The lines of the header, of the table of parameters, of pictures, and what is to be known."""

    header: list[str]
    table: list[str]
    pictures: list[str]
    remarks: list[str]


def looked(tree: dict[str, Any], world_size: int | None, picture: bool, width: int, blocks: bool) -> Shown:
    """Returns the run of `tree` on `world_size` workers (None: as `rowwise train` starts it here). Raises ValueError."""
    config = config_from_tree(tree)
    nproc = config.nproc or default_nproc()
    here = world_size in (None, nproc)
    if here:
        require_ranks(nproc)
    world_size = world_size or nproc
    config = examine(config, world_size, here)
    data = open_data(config.data, config.batch.seq_len, config.model.vocab_size)
    # Elsewhere are GPUs: of what is known of them here, only that rows of odd lengths are slow.
    device, name = (pick_device(0), device_name(pick_device(0))) if here else (torch.device("cuda"), "workers")
    header, remarks = preview(config, world_size, data, device, name)
    pictures = ["", *rate_picture(config, width, blocks), *pipeline_picture(config, width)] if picture else []
    return Shown(header, parameter_table(config), pictures, remarks)
