"""What is used of torch.distributed's process groups (c10d) beyond what torch documents, or under names that differ: all of it is
here.

`_get_default_group`                    the group of all ranks is connected as the others are, by messages through it
`_world.pg_map`, `_set_pg_timeout`      a device mesh makes its groups with torch's own bound on waiting, whatever is asked for
"""

import datetime

import torch.distributed as dist
from torch import Tensor


def default_group() -> dist.ProcessGroup:
    """Gives the group of all ranks."""
    return dist.distributed_c10d._get_default_group()


def all_groups() -> list[dist.ProcessGroup]:
    """Lists every group that this process is in."""
    return list(dist.distributed_c10d._world.pg_map)


def bound_waits(timeout: datetime.timedelta) -> None:
    """Sets how long every group that there is waits for a rank."""
    for group in all_groups():
        dist.distributed_c10d._set_pg_timeout(timeout, group)


def all_gather_flat(everyone: Tensor, mine: Tensor, group: dist.ProcessGroup) -> None:
    """Fills `everyone` (n size) with what each rank of the group has in `mine` (n). (Torch 2.13 renamed it, and warns.)"""
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gather(everyone, mine, group=group)
