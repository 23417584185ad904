"""Block-wise dynamic 8-bit codes: a number in one byte, with one float32 for every 256 of them.

Dettmers et al., *8-bit Optimizers via Block-wise Quantization* (ICLR 2022). A row is cut into blocks of 256 (the last
may be shorter; none crosses a row, so the codes of a row do not depend on how rows are spread over ranks). With the
ascending code book q of 256 numbers in [-1, 1], or [0, 1] for what is never negative,

    a = max |x_i| over the block          c_i = argmin_c |q_c - x_i / a|, ties to the lower c          x_i' = q_(c_i) a

The book is the paper's dynamic tree: seven decades 10^(i-6), i = 0..6, of which decade i holds the midpoints of 2^i
(signed; 2^(i+1) unsigned) equal parts of [0.1, 1], with the negatives if signed, and 0 and 1.

**The nearest code by one lookup.** The upper 16 bits of a float32 (sign, exponent, 7 bits of the mantissa) say in
which of 65,536 intervals x / a lies, and none of those in [-1, 1] holds more than one midpoint of neighbouring codes.
So a table over intervals, to which the lower 16 bits are added, gives the exact nearest code: the sum carries into the
code just where the number lies above the midpoint. See `code_table`.
"""

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from rowwise.kernels.dispatch import use_triton
from rowwise.kernels.portions import row_portions
from rowwise.kernels.wide import wide_dtype

BLOCK = 256
_CPU = torch.device("cpu")
_DECADES = 7
_LOW = 0xFFFF
_SMALLEST = 2.0**-149  # float32's smallest number: divides a block of zeros into zeros


def blocks_per_row(columns: int) -> int:
    """Counts how many absolute maxima a row of `columns` numbers has."""
    return -(-columns // BLOCK)


@functools.cache
def code_book(signed: bool, device: torch.device = _CPU, dtype: torch.dtype = torch.float32) -> Tensor:
    """Returns the numbers behind the codes: (256,), ascending. The float32 numbers are bitsandbytes' to the last bit."""
    numbers = [0.0, 1.0]
    for i in range(_DECADES):
        edges = parted(0.1, 1.0, 2**i if signed else 2 ** (i + 1))
        decade = (10 ** (i - _DECADES + 1) * (edges[:-1] + edges[1:]) / 2).tolist()
        numbers += decade
        if signed:
            numbers += [-number for number in decade]
    return torch.tensor(sorted(numbers), dtype=torch.float32, device=_CPU).to(device, dtype)


def parted(start: float, end: float, parts: int) -> Tensor:
    """Gives torch.linspace(start, end, parts + 1), whose last bits depend on the processor, as those with AVX2 compute it."""
    first, last = torch.tensor([start, end], device=_CPU)
    step = ((last - first) / parts).double()
    i = torch.arange(parts + 1, dtype=torch.float64, device=_CPU)
    return torch.where(i < (parts + 1) // 2, first + step * i, last - step * (parts - i)).float()


@functools.cache
def midpoints(signed: bool, device: torch.device = _CPU) -> Tensor:
    """Returns the exact midpoints of neighbouring codes: (255,) float64. A number above midpoint c has a code above c."""
    book = code_book(signed).double()
    return ((book[:-1] + book[1:]) / 2).to(device)


@functools.cache
def code_table(signed: bool, device: torch.device = _CPU) -> Tensor:
    """Returns (32768,) int32: the code of a float32 z in (-2, 2) is (table[y >> 16] + y) >> 16.

    y = bits ^ (bits >> 31) makes the bits of z a number >= 0: of positive z as they are, below 2^30; of negative z
    inverted, from 2^30 on; both rise with z. In the interval y >> 16 codes are `low` up to the threshold's lower bits
    and low + 1 above them. The entry is 2^16 low + 0xFFFF - threshold - (y & ~0xFFFF): adding y leaves
    2^16 low + 0xFFFF + (lower bits - threshold), which carries just above the threshold.
    """
    interval = torch.arange(1 << 15, dtype=torch.int32, device=_CPU) << 16
    low, high = (_codes_of_keys(signed, y) for y in (interval, interval | _LOW))
    in_use = (interval < _key(_float32(2.0))) | (interval > _key(_float32(-2.0)))
    assert (high - low)[in_use].max() <= 1, "two midpoints in one interval"
    thresholds = _key(_float32_below(midpoints(signed)))
    threshold = torch.where(high > low, thresholds[low.clamp_max(254)] & _LOW, _LOW)
    return ((low << 16) + _LOW - threshold - interval).to(device, torch.int32)


def _key(z: Tensor) -> Tensor:
    """`y` of `code_table`; its own inverse on bits."""
    bits = z.view(torch.int32)
    return bits ^ (bits >> 31)


def _codes_of_keys(signed: bool, key: Tensor) -> Tensor:
    """The codes (int64) of the numbers in (-2, 2) that have these keys."""
    z = torch.where(key < 1 << 30, key, ~key).view(torch.float32)
    return torch.bucketize(z.nan_to_num().double(), midpoints(signed))


def _float32(number: float) -> Tensor:
    return torch.tensor(number, dtype=torch.float32, device=_CPU)


def _float32_below(x: Tensor) -> Tensor:
    """The largest float32 <= x (float64)."""
    near = x.float()
    return torch.where(near.double() > x, near.nextafter(_float32(-torch.inf)), near)


def quantise(x: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """Returns codes (m, n) uint8 and absolute maxima (m, ceil(n / 256)) float32 of x (m, n), float32, bfloat16 or float64.

    Float64 is divided and compared in float64, the others in float32; absmax is rounded to float32 first, and what
    that leaves a little above 1 gets the last code. Unsigned takes x >= 0. A block of zeros has absmax 0; of one that
    holds a NaN or what is infinite in float32, nothing comes back finite. Local: communicates nothing.
    """
    codes = torch.empty(x.shape, dtype=torch.uint8, device=x.device)
    absmax = torch.empty(x.size(0), blocks_per_row(x.size(1)), dtype=torch.float32, device=x.device)
    quantise_(x, codes, absmax, signed)
    return codes, absmax


def quantise_(x: Tensor, codes: Tensor, absmax: Tensor, signed: bool) -> None:
    """Does as `quantise`, into codes (m, n) and absmax (m, ceil(n / 256)) that exist."""
    if x.dtype != torch.float64 and use_triton(x.device):
        from rowwise.kernels.blockwise_triton import quantise_triton_

        quantise_triton_(x, codes, absmax, signed)
    else:
        quantise_reference_(x, codes, absmax, signed)


def quantise_reference_(x: Tensor, codes: Tensor, absmax: Tensor, signed: bool) -> None:
    """Computes `quantise_` in plain torch."""
    dtype = wide_dtype(x.dtype)
    for rows in row_portions(*x.shape):
        encode_(x[rows].to(dtype, copy=True), codes[rows], absmax[rows], signed)


def dequantise(codes: Tensor, absmax: Tensor, signed: bool, dtype: torch.dtype = torch.float32) -> Tensor:
    """Decodes the numbers (m, n) behind codes (m, n) and absmax (m, ceil(n / 256)): computed in float32, float64 in float64."""
    out = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    if dtype != torch.float64 and use_triton(codes.device):
        from rowwise.kernels.blockwise_triton import dequantise_triton_

        dequantise_triton_(codes, absmax, signed, out)
    else:
        dequantise_reference_(codes, absmax, signed, out)
    return out


def dequantise_reference_(codes: Tensor, absmax: Tensor, signed: bool, out: Tensor) -> None:
    """Computes `dequantise` in plain torch, into `out`."""
    dtype = wide_dtype(out.dtype)
    for rows in row_portions(*codes.shape):
        out[rows] = decode(codes[rows], absmax[rows], signed, dtype)


def encode_(x: Tensor, codes: Tensor, absmax: Tensor, signed: bool) -> None:
    """Quantises one portion of rows, float32 or float64; x is used up."""
    for block, top in blocks(x, absmax):
        top.copy_((block.abs() if signed else block).amax(-1, keepdim=True))
        block.div_(top.clamp_min(_SMALLEST))
    _nearest_(x, codes, signed)


def _nearest_(z: Tensor, codes: Tensor, signed: bool) -> None:
    """The nearest codes of z; float32 z is used up."""
    if z.dtype == torch.float64:
        codes.copy_(torch.bucketize(z, midpoints(signed, z.device), out_int32=True))
        return
    bits = z.view(torch.int32)
    bits ^= bits >> 31
    found = lookup(code_table(signed, z.device), (bits >> 16).long())
    found += bits
    found >>= 16
    codes.copy_(found)


def decode(codes: Tensor, absmax: Tensor, signed: bool, dtype: torch.dtype) -> Tensor:
    """Returns the numbers of one portion of rows, in float32 or float64."""
    x = lookup(code_book(signed, codes.device, dtype), codes.long())
    for block, top in blocks(x, absmax):
        block.mul_(top)
    return x


def lookup(table: Tensor, index: Tensor) -> Tensor:
    """Returns table[index] for a table (k,) and an int64 index (m, n): `gather` is three times as fast as indexing."""
    return torch.gather(table.expand(index.size(0), -1), 1, index)


def blocks(x: Tensor, absmax: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Returns views of the blocks of x (m, n) beside their absmax: (m, k, 256) and (m, k, 1), and the short last ones."""
    (m, n), full = x.shape, x.size(1) // BLOCK
    if full:
        yield x[:, : full * BLOCK].view(m, full, BLOCK), absmax[:, :full, None]
    if n % BLOCK:
        yield x[:, None, full * BLOCK :], absmax[:, full:, None]
