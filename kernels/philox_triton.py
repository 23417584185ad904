"""The Triton form of `rowwise.kernels.philox.normal`; the formula stands there."""

import torch
import triton
import triton.language as tl
from torch import Tensor

COUNTERS_PER_PROGRAM = 256


@triton.jit
def _uniform(words):
    return ((words >> 9) * 2 + 1).to(tl.float32) * (2.0**-24)


@triton.jit
def normal_kernel(out, key, start, count, COUNTERS: tl.constexpr):
    """Writes out[j] = element start + j of the stream: one Philox call for four elements, one write of each."""
    counter = start // 4 + tl.program_id(0).to(tl.int64) * COUNTERS + tl.arange(0, COUNTERS)
    low, high = counter.to(tl.uint32), (counter >> 32).to(tl.uint32)
    zero = low * 0
    w0, w1, w2, w3 = tl.philox(key, low, high, zero, zero)
    radius_01, radius_23 = tl.sqrt(-2 * tl.log(_uniform(w0))), tl.sqrt(-2 * tl.log(_uniform(w2)))
    angle_01, angle_23 = 6.283185307179586 * _uniform(w1), 6.283185307179586 * _uniform(w3)
    place = counter * 4 - start
    tl.store(out + place, radius_01 * tl.cos(angle_01), mask=(place >= 0) & (place < count))
    tl.store(out + place + 1, radius_01 * tl.sin(angle_01), mask=(place + 1 >= 0) & (place + 1 < count))
    tl.store(out + place + 2, radius_23 * tl.cos(angle_23), mask=(place + 2 >= 0) & (place + 2 < count))
    tl.store(out + place + 3, radius_23 * tl.sin(angle_23), mask=(place + 3 >= 0) & (place + 3 < count))


def signed_64(key: int) -> int:
    """Returns a 64-bit key as Triton passes Python integers: signed."""
    return key - (1 << 64) if key >= 1 << 63 else key


def normal_triton(key: int, start: int, count: int, device: torch.device) -> Tensor:
    out = torch.empty(count, dtype=torch.float32, device=device)
    counters = -(-(start + count) // 4) - start // 4
    if counters:
        grid = (triton.cdiv(counters, COUNTERS_PER_PROGRAM),)
        normal_kernel[grid](out, signed_64(key), start, count, COUNTERS=COUNTERS_PER_PROGRAM)
    return out
