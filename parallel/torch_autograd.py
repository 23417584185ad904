"""What is used of autograd's engine beyond what torch documents.

`_current_graph_task_id`            whether a backward is under way: what is made in it is counted apart from what a forward makes
`RemovableHandle.hooks_dict_ref`    a parameter's hooks, which are called in the order in which this dictionary got them
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

_task = torch._C._current_graph_task_id


def in_backward() -> bool:
    """Tells whether autograd is carrying a backward out on this thread."""
    return _task() != -1


def tell_first(p: Tensor, hook: Callable[[Tensor], None]) -> RemovableHandle:
    """Has `hook` called with a parameter whenever its gradient has been added to, before all other hooks that are told so."""
    handle = p.register_post_accumulate_grad_hook(hook)
    hooks = handle.hooks_dict_ref()
    others = {key: other for key, other in hooks.items() if key != handle.id}
    for key in others:
        del hooks[key]
    hooks.update(others)
    return handle
