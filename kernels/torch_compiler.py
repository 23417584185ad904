"""What is used of torch's compiler beyond what torch documents: all of it is here.

`_disable_dynamo`   what a compiled block leaves to Python; `torch.compiler.disable` would import the compiler at once, and this does
                    when a function is first called, for which every worker would wait, a second of one that compiles nothing
"""

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
T = TypeVar("T")


def left_to_python(function: Callable[P, T]) -> Callable[P, T]:
    """Makes of a function one that a compiled block leaves to Python."""
    left = torch._disable_dynamo(function)

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        return left(*args, **kwargs) if torch.compiler.is_compiling() else function(*args, **kwargs)

    return call
