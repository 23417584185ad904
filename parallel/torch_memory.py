"""What is used of torch's CUDA allocator beyond what torch documents as stable: all of it is here. Its notes on memory explain both.

`_record_memory_history`    the allocator notes every block that it gives and takes back, and where from
`_dump_snapshot`            writes that, for https://pytorch.org/memory_viz
"""

from pathlib import Path

import torch


def record_history(records: bool) -> None:
    """Begins or ends the notes of this process's allocator."""
    torch.cuda.memory._record_memory_history("all" if records else None)


def write_snapshot(path: Path) -> None:
    """Writes what was noted."""
    torch.cuda.memory._dump_snapshot(str(path))
