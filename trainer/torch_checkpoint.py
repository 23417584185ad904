"""What is used of torch.distributed.checkpoint and torch.serialization beyond what torch documents: all of it is here.

torch's `.metadata` is a pickle. `trainer.metadata` reads it without running it, and so has to know every class that torch
writes into one, the two private ones and the look-up of a layout by its name too.
"""

import torch
from torch.distributed.checkpoint import filesystem, metadata

MemoryFormat = metadata._MEM_FORMAT_ENCODING
StoragePlace = filesystem._StorageInfo
GET_LAYOUT = ("torch.serialization", "_get_layout")
get_layout = torch.serialization._get_layout
