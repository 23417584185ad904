"""What is used of torch's dispatcher beyond what torch documents: all of it is here. torch's notes on extending it explain
`TorchDispatchMode`, by which every operation is looked at, and give it no other home than this."""

from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["TorchDispatchMode"]
