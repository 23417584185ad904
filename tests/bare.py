"""Modules that are no model: matrices and vectors, for what works on parameters alone."""

from typing import TypeVar

from torch import nn

from rowwise.kernels.spec import ParameterSpec

M = TypeVar("M", bound=nn.Module)


def bare(module: M) -> M:
    """Makes a module say that its matrices are hidden ones."""
    module.parameter_specs = lambda: {
        name: ParameterSpec(p.shape, "hidden" if p.ndim == 2 else "vector") for name, p in module.named_parameters()
    }
    return module
