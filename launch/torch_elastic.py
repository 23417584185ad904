"""What is used of torch.distributed.elastic beyond what torch documents: all of it is here.

`DynamicRendezvousHandler` and what it takes     torch's agents meet by it, with a store of ours behind it
`_RendezvousState`, `_NodeDesc`                  what it keeps in that store: torch pickles it, `launch.rendezvous_backend` writes JSON
"""

from torch.distributed.elastic.rendezvous.dynamic_rendezvous import (
    DynamicRendezvousHandler,
    RendezvousBackend,
    RendezvousTimeout,
    _NodeDesc,
    _RendezvousState,
)

NodeDesc = _NodeDesc
RendezvousState = _RendezvousState

__all__ = ["DynamicRendezvousHandler", "NodeDesc", "RendezvousBackend", "RendezvousState", "RendezvousTimeout"]
