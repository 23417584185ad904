"""The Triton form of `rowwise.kernels.nm`; the formula stands there. A program takes GROUPS groups.

m may be any number: a group takes WIDTH places, the next power of two, and those past the last are empty. The numbers
come as whole numbers of their width and are only compared and copied, so that one kernel serves every dtype.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from rowwise.kernels.nm import INTEGERS

ELEMENTS = 1024  # of a program: 8 a thread with Triton's four warps


@triton.jit
def nm_kernel(
    w,
    out,
    groups,
    inner,
    keep,
    M: tl.constexpr,
    WIDTH: tl.constexpr,
    GROUPS: tl.constexpr,
    LARGEST: tl.constexpr,
    MASK: tl.constexpr,
):
    """Writes w or 0, with MASK 1 or 0. Group g is at places (g div inner) m inner + g mod inner + j inner, j < m."""
    group = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    lane = tl.arange(0, WIDTH)
    start = (group // inner) * M * inner + group % inner
    place = start[:, None] + (lane * inner)[None, :]
    exists = group < groups
    inside = exists[:, None] & (lane < M)[None, :]
    x = tl.load(w + place, mask=inside, other=0)
    key = x & LARGEST
    behind = tl.zeros([GROUPS, WIDTH], tl.int32)
    for k in range(M):
        other = (tl.load(w + start + k * inner, mask=exists, other=0) & LARGEST)[:, None]
        behind += ((other < key) | ((other == key) & (lane < k)[None, :])).to(tl.int32)
    kept = behind >= M - keep
    if MASK:
        tl.store(out + place, kept.to(tl.int8), mask=inside)
    else:
        tl.store(out + place, tl.where(kept, x, 0), mask=inside)


def prune_nm_triton(w: Tensor, n: int, m: int, dim: int) -> Tensor:
    whole = w.contiguous().view(INTEGERS[w.itemsize])
    out = torch.empty_like(whole)
    _launch(whole, out, n, m, dim, mask=False)
    return out.view(w.dtype)


def nm_mask_triton(w: Tensor, n: int, m: int) -> Tensor:
    whole = w.contiguous().view(INTEGERS[w.itemsize])
    out = torch.empty(w.shape, dtype=torch.int8, device=w.device)
    _launch(whole, out, n, m, dim=1, mask=True)
    return out.view(torch.bool)


def _launch(w: Tensor, out: Tensor, n: int, m: int, dim: int, mask: bool) -> None:
    groups, width = w.numel() // m, triton.next_power_of_2(m)
    if groups:
        at_once = max(1, ELEMENTS // width)
        sizes = {"M": m, "WIDTH": width, "GROUPS": at_once, "LARGEST": torch.iinfo(w.dtype).max}
        grid = (triton.cdiv(groups, at_once),)
        nm_kernel[grid](w, out, groups, 1 if dim == 1 else w.size(1), n, **sizes, MASK=mask)
