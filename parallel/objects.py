"""What ranks tell each other beside tensors: small Python objects, as pickles, which only ranks of one run may exchange.

Over a group on the CPU such as `Mesh.save_group`, and never while a save in the background has messages there under way.
"""

from typing import TypeVar

import torch.distributed as dist

T = TypeVar("T")


def from_every_rank(mine: T, group: dist.ProcessGroup) -> list[T]:
    """Returns what each rank of `group` gave, in the order of ranks, on all of them. A rank receives the pickles of all."""
    everyone: list[T] = [mine] * dist.get_world_size(group)
    dist.all_gather_object(everyone, mine, group=group)
    return everyone


def from_rank_0(mine: T, group: dist.ProcessGroup) -> T:
    """Returns what the world's rank 0 gave, on all ranks of `group`; what the others give is not looked at. One pickle."""
    told = [mine]
    dist.broadcast_object_list(told, src=0, group=group)
    return told[0]
