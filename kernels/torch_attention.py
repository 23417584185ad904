"""What is used of torch's attention operators (aten) beyond what torch documents: all of it is here.

`scaled_dot_product_attention` does not give the log-sum-exp, by which blocks are put together, nor takes gradients for one
block of many. What it calls does: an operator for each device, and its gradient. Those of CUDA take packed rows
besides (`packed`): sequences of unequal length behind each other.
"""

import torch

_aten = torch.ops.aten

cpu_forward = _aten._scaled_dot_product_flash_attention_for_cpu
cpu_backward = _aten._scaled_dot_product_flash_attention_for_cpu_backward
flash_forward = _aten._scaled_dot_product_flash_attention
flash_backward = _aten._scaled_dot_product_flash_attention_backward
efficient_forward = _aten._scaled_dot_product_efficient_attention
efficient_backward = _aten._scaled_dot_product_efficient_attention_backward
packed_flash_forward = _aten._flash_attention_forward
packed_flash_backward = _aten._flash_attention_backward
