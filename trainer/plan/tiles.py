"""What attention holds of capped scores, which no operator of torch makes: tiles of them, and what plain torch makes of one, found
by making one on the meta device, where nothing takes memory; on a GPU, what our own kernel gives before it is added up."""

import functools
import math
from dataclasses import replace

import torch

from rowwise.kernels.attention import tile_side
from rowwise.kernels.attention_block import Attended, block_backward, block_forward, kernel_caps
from rowwise.kernels.look import Look
from rowwise.parallel.lifetimes import Lifetimes
from rowwise.parallel.precision import compute_dtype
from rowwise.trainer.activations import tokens_of
from rowwise.trainer.config import TrainConfig
from rowwise.trainer.plan.adapted import Adapted, Extra


def with_tiles(config: TrainConfig, adapted: Adapted, gpu: bool) -> Adapted:
    """Adds what attention holds of capped scores to what a layer does."""
    model, parallel, tokens = config.model, config.parallel, tokens_of(config)
    if model.attention_cap is None:
        return adapted
    # Of an all-to-all each rank has some heads of all tokens.
    shape = (
        config.batch.micro_size, tokens * parallel.ulysses // config.batch.micro_size, model.heads // parallel.ulysses,
        math.lcm(model.kv_heads, parallel.ulysses) // parallel.ulysses, model.head_size,
    )  # fmt: skip
    dtype = compute_dtype(config.precision)
    own = gpu and kernel_caps(dtype, model.head_size)
    forward, backward = (
        kernel_bytes(shape, dtype) if own else tile_bytes(shape, dtype, model.attention_cap, "cuda" if gpu else "cpu")
    )
    looks = next(n for n, result in enumerate(adapted.table.results) if result.pairs)
    made = adapted.table.results[: looks + 1]
    there = model.dim + sum(result.numbers + result.fixed for result in made)
    widened = tokens * model.head_size * 4 * (dtype.itemsize < 4)  # of what is summed in float32
    queries, all_heads = model.heads * widened, (model.heads + 2 * model.kv_heads) * widened
    adapted = replace(adapted, most=max(adapted.most, there * dtype.itemsize * tokens + forward + queries))
    reads = [n for n, piece in enumerate(adapted.work.backward) if made[-1].name in piece.needs]
    if not reads:
        return adapted
    extras = list(adapted.extras)
    extras[reads[-1]] = Extra(working=backward + all_heads)
    return replace(adapted, extras=tuple(extras))


def kernel_bytes(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[int, int]:
    """(forward, backward): counts the bytes of what the kernel gives of all areas at once, (sequences, tokens, heads and key heads of
    a size), of the one that is being added in float32, and of two sums a query."""
    sequences, tokens, heads, key_heads, size = shape
    rows, sums = sequences * tokens * size, 2 * sequences * tokens * heads * 4
    gradients = (heads + 2 * key_heads) * rows * dtype.itemsize
    return heads * rows * (dtype.itemsize + 4) + sums, gradients + max(heads, key_heads) * rows * 4 + sums


@functools.cache
def tile_bytes(shape: tuple[int, ...], dtype: torch.dtype, cap: float, device: str) -> tuple[int, int]:
    """(forward, backward): counts the bytes at most beside queries, keys and values (sequences, tokens, heads and key heads of a
    size), what they come to, and its gradient."""
    sequences, tokens, heads, key_heads, size = shape
    side, form = min(tokens, tile_side(sequences, heads, device)), Look(cap=cap).form(size)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    q, out, d_out = torch.empty(3, sequences, side, heads, size, dtype=dtype, device="meta")
    k, v = torch.empty(2, sequences, side, key_heads, size, dtype=dtype, device="meta")
    lse = torch.empty(sequences, heads, side, dtype=wide, device="meta")
    with torch.no_grad(), Lifetimes([], []) as ahead:
        block_forward(q, k, v, True, form)
    with torch.no_grad(), Lifetimes([], []) as back:
        block_backward(d_out, Attended(q, k, v, out, lse), True, form)
    return ahead.peaks()[1], back.peaks()[1]
