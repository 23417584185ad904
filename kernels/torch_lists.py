"""What is used of torch's operators on lists of tensors beyond what torch documents: all of it is here.

One call for a list of tensors takes one launch on a GPU, or a few, where a loop takes one for every tensor. torch's own
optimizers are written in them; its manual lists those of one operand alone.
"""

import torch

add, add_ = torch._foreach_add, torch._foreach_add_
addcmul_ = torch._foreach_addcmul_
copy_ = torch._foreach_copy_
div, div_ = torch._foreach_div, torch._foreach_div_
lerp, lerp_ = torch._foreach_lerp, torch._foreach_lerp_
mul_ = torch._foreach_mul_
norm = torch._foreach_norm
sign_ = torch._foreach_sign_
sqrt = torch._foreach_sqrt
sub = torch._foreach_sub

fused_adamw_ = torch._fused_adamw_
