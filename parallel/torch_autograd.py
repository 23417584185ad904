"""What is used of autograd's engine beyond what torch documents.

`_current_graph_task_id`    whether a backward is under way: what is made in it is counted apart from what a forward makes
"""

import torch


def in_backward() -> bool:
    """Tells whether autograd is carrying a backward out on this thread."""
    return bool(torch._C._current_graph_task_id() != -1)
