"""Threads of kernels on the host: as many as torch has, on pieces of tensors.

They are Python's, made for one call and gone with it: a compiled piece runs without Python's lock. So a step may be made from
any thread, from several at once, and in a fork, which numba's own threads do not all allow; and where ranks share a machine,
each has as many as torch was given.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from rowwise.kernels.blockwise import BLOCK, blocks_per_row

PIECE_BLOCKS = 2048  # of 256 numbers: some milliseconds
Piece = tuple[int, int, int]  # of tensor i the blocks, or elements, [first, last)


def block_pieces(tensors: Sequence[Tensor]) -> list[Piece]:
    """Cuts the blocks of 256 of all tensors (m_i, n_i) into pieces that threads take one by one."""
    counts = [t.size(0) * blocks_per_row(t.size(1)) for t in tensors]
    return [
        (i, first, min(first + PIECE_BLOCKS, count))
        for i, count in enumerate(counts)
        for first in range(0, count, PIECE_BLOCKS)
    ]


def flat_pieces(tensors: Sequence[Tensor]) -> list[Piece]:
    """Cuts the elements of all tensors into such pieces, whatever their shapes: of tensor i the elements [first, last)."""
    size = PIECE_BLOCKS * BLOCK
    return [
        (i, first, min(first + size, t.numel())) for i, t in enumerate(tensors) for first in range(0, t.numel(), size)
    ]


def over_threads(run: Callable[[Piece], None], pieces: Sequence[Piece]) -> None:
    """Runs every piece, on as many threads as torch has here; whichever is free takes the next."""
    threads = min(torch.get_num_threads(), len(pieces))
    if threads <= 1:
        for piece in pieces:
            run(piece)
        return
    with ThreadPoolExecutor(threads, "host-kernel") as pool:
        for _ in pool.map(run, pieces):
            pass
