"""Rows in portions that stay in a core's cache: how the plain-torch references walk through memory.

A reference makes a dozen passes over its data. Over a whole weight each of them would go to main memory; over a
portion of rows only the first and the last do. Small tensors of one width share a portion, so that each of them does
not pay for a dozen operators of its own.
"""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

ELEMENTS = 1 << 16  # a thread: six float32 temporaries of this size are 1.5 MiB

ON_GPU = 1 << 23  # elements of a portion there
LANES = 16  # elements that a processor works on at once, at most: what they leave at the end of a tensor it may round otherwise


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


def row_unit(columns: int) -> int:
    """Counts the rows at multiples of which a matrix can be cut and every number of it still comes out the same to the last bit."""
    return LANES // math.gcd(LANES, columns)


def cut_row(first: int, rows: int, columns: int, numbers: int) -> int:
    """Returns where a portion that begins at row `first` of `rows` ends: at the last one, or where so many numbers are full, at a
    multiple of `row_unit`; at `first` where it has no room for that."""
    if (rows - first) * columns <= numbers:
        return rows
    return first + numbers // max(1, columns) // row_unit(columns) * row_unit(columns)


def shared_portions(tensors: Sequence[Tensor]) -> Iterator[list[tuple[int, slice]]]:
    """Yields the rows of all tensors (m_i, n_i) in portions; a portion is a list of (i, rows of tensor i).

    Tensors that share a portion have the same width and dtype. Every row is in exactly one portion, and what is computed of its
    numbers one by one does not depend on in which.
    """
    alike: dict[tuple[int, torch.dtype], list[int]] = {}
    for i, tensor in enumerate(tensors):
        alike.setdefault((tensor.size(1), tensor.dtype), []).append(i)
    for (columns, _), members in alike.items():
        most = max(portion_elements(), row_unit(columns) * columns)
        portion, free = [], most
        for i in members:
            first, rows = 0, tensors[i].size(0)
            while first < rows:
                last = cut_row(first, rows, columns, free)
                if last > first:
                    portion.append((i, slice(first, last)))
                    free -= (last - first) * columns
                    first = last
                if first < rows:
                    yield portion
                    portion, free = [], most
        if portion:
            yield portion
