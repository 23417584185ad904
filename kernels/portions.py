"""Rows in portions that stay in a core's cache: how the plain-torch references walk through memory.

A reference makes a dozen passes over its data. Over a whole weight each of them would go to main memory; over a
portion of rows only the first and the last do. Small tensors of one width share a portion, so that each of them does
not pay for a dozen operators of its own.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

ELEMENTS = 1 << 16  # a thread: six float32 temporaries of this size are 1.5 MiB

ON_GPU = 1 << 23  # elements of a portion there


def portion_elements() -> int:
    """Counts the elements of one portion over all of torch's threads: each works in its own cache."""
    return ELEMENTS * torch.get_num_threads()


def row_portions(rows: int, columns: int, elements: int | None = None) -> Iterator[slice]:
    """Yields the rows of a matrix (rows, columns), a portion at a time (null: what stays in cache)."""
    height = max(1, (elements or portion_elements()) // max(1, columns))
    for first in range(0, rows, height):
        yield slice(first, min(first + height, rows))


def device_portions(x: Tensor, columns: int) -> Iterator[slice]:
    """Yields the rows of `x`, `columns` numbers each, for what must not take the memory of a whole matrix on a GPU either, where
    launches cost more than caches save."""
    return row_portions(x.size(0), columns, ON_GPU if x.device.type == "cuda" else None)


def shared_portions(tensors: Sequence[Tensor]) -> Iterator[list[tuple[int, slice]]]:
    """Yields the rows of all tensors (m_i, n_i) in portions; a portion is a list of (i, rows of tensor i).

    Tensors that share a portion have the same width and dtype. Every row is in exactly one portion.
    """
    alike: dict[tuple[int, torch.dtype], list[int]] = {}
    for i, tensor in enumerate(tensors):
        alike.setdefault((tensor.size(1), tensor.dtype), []).append(i)
    for (columns, _), members in alike.items():
        height = max(1, portion_elements() // max(1, columns))
        portion, free = [], height
        for i in members:
            first, rows = 0, tensors[i].size(0)
            while first < rows:
                last = min(first + free, rows)
                portion.append((i, slice(first, last)))
                free -= last - first
                first = last
                if not free:
                    yield portion
                    portion, free = [], height
        if portion:
            yield portion
