"""What is used of torch's compiler beyond what torch documents: all of it is here."""

import torch

# What a compiled block leaves to Python. (`torch.compiler.disable` would import the compiler at once, and not when a
# function is first called; every worker would wait for that.)
left_to_python = torch._disable_dynamo
