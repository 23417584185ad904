"""What is used of torch.distributed.checkpoint and torch.serialization beyond what torch documents: all of it is here.

torch's `.metadata` is a pickle. `trainer.metadata` reads it without running it, and so has to know every class that torch
writes into one, the two private ones and the look-up of a layout by its name too. `trainer.writer` names a second file of a rank.
"""

import dataclasses

import torch
from torch.distributed.checkpoint import filesystem, metadata
from torch.distributed.checkpoint.planner import SavePlan, WriteItem

MemoryFormat = metadata._MEM_FORMAT_ENCODING
StoragePlace = filesystem._StorageInfo
GET_LAYOUT = ("torch.serialization", "_get_layout")
get_layout = torch.serialization._get_layout


def with_prefix(plan: SavePlan, more: str, items: list[WriteItem]) -> SavePlan:
    """Returns a rank's plan to write these items into files whose names begin with `more`, behind what they begin with."""
    prefix = filesystem._StoragePrefix(plan.storage_data.prefix + more)
    return dataclasses.replace(plan, items=items, storage_data=prefix)
