"""Rows of a matrix as codes: what is kept of weights that do not change (Dettmers et al., *QLoRA: Efficient Finetuning of Quantized
LLMs*; Guo et al., *LQ-LoRA: Low-rank plus Quantized Matrix Decomposition*).

    s = max |x| over a block          c_i = argmin_c |q_c - x_i / s|          x^_i = q_(c_i) s^

A block is some neighbours in a row (the last of a row may be shorter), and so is a group of scales: a row's bytes depend on no other
row, however rows are spread over ranks. (The authors' blocks run on from row to row; where whole groups fill a row they are these.)
Of k bits the numbers q are *normal floats*: 2^k quantiles of a normal distribution, from that of 1 - f to that of f = 0.9677083,
2^(k-1) - 1 below zero, zero, and 2^(k-1) above it, over the last. (NF4's are bitsandbytes' sixteen to the last bit.) Or they are
*linear*: c - 128, with s = max |x| / 127.

The scales s^ are themselves codes. In a group, and with a shift that a row has once:

    dynamic (QLoRA)    s^ = shift + t book(d)            shift: the mean of the row's scales; t = max |s - shift| over the group;
                                                         d = argmin |book(d) - (s - shift) / t|, 8 bits (`kernels.blockwise`)
    whole (LQ-LoRA)    s^ = shift + d t / (2^b - 1)      shift: the least scale of the matrix; t = max (s - shift), rounded to 16
                                                         bits or kept in 32; x is divided by s^, not s
    exact              s^ = s, in 32 bits

A row of bytes, W of them, a multiple of 4: the shift and each t; then d of every block; then the codes: k bits a number, without
gaps, the first in the highest bits. Arithmetic is in float32, and what comes back of 64 bits are float32 numbers.
"""

import functools
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

import torch
from torch import Tensor

from rowwise.kernels import blockwise
from rowwise.kernels.dispatch import use_triton
from rowwise.kernels.portions import device_portions, row_portions

ENDS = 0.9677083  # the probability below the last normal float
SMALLEST = 1e-38  # of what a block is divided by, as in bitsandbytes
NEGLIGIBLE = (
    2.0**-24
)  # of the largest of whole scales, above the shift: below it they are the shift (pytorch-quantization)
_CPU = torch.device("cpu")

Numbers = Literal["normal", "linear"]
Scales = Literal["dynamic", "whole", "exact"]
Top = Literal["fp32", "bf16", "fp16"]
TOPS: dict[Top, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class RowForm:
    """How rows are coded: `bits` a number, of `numbers`; a scale for every `block` of them; `scales` in `scale_bits`, with one t in
    `top` for every `group`."""

    bits: int
    block: int
    numbers: Numbers = "normal"
    scales: Scales = "dynamic"
    scale_bits: int = 8
    group: int = 256
    top: Top = "fp32"

    def __post_init__(self) -> None:
        assert 2 <= self.bits <= 8 and self.block % 8 == 0
        assert self.numbers == "normal" or self.bits == 8
        assert self.scales == "whole" or (self.scale_bits == 8 and self.group == blockwise.BLOCK)

    def blocks(self, columns: int) -> int:
        """Counts the scales of a row."""
        return -(-columns // self.block)

    def groups(self, columns: int) -> int:
        """Counts the t of a row."""
        return 0 if self.scales == "exact" else -(-self.blocks(columns) // self.group)

    def row_bytes(self, columns: int) -> int:
        """Counts the bytes of a row."""
        return -(-(self._codes_at(columns) + _packed(columns, self.bits)) // 4) * 4

    def _scales_at(self, columns: int) -> int:
        return 0 if self.scales == "exact" else 4 + -(-self.groups(columns) * TOPS[self.top].itemsize // 4) * 4

    def _codes_at(self, columns: int) -> int:
        bits = 32 if self.scales == "exact" else self.scale_bits
        return self._scales_at(columns) + _packed(self.blocks(columns), bits)

    def parts(self, packed: Tensor, columns: int) -> "Parts":
        """Views the parts of rows of bytes (R, W) for rows of so many numbers."""
        scales_at, codes_at = self._scales_at(columns), self._codes_at(columns)
        groups, end = self.groups(columns), codes_at + _packed(columns, self.bits)
        size = TOPS[self.top].itemsize
        shift = packed[:, :4].view(torch.float32) if groups else None
        tops = packed[:, 4 : 4 + groups * size].view(TOPS[self.top])
        return Parts(self.blocks(columns), shift, tops, packed[:, scales_at:codes_at], packed[:, codes_at:end])


@dataclass(frozen=True)
class Parts:
    """What rows of bytes hold, views: the shift (R, 1), t (R, groups), codes of scales, or the scales themselves, and codes of
    numbers. `blocks`: scales of a row."""

    blocks: int
    shift: Tensor | None
    tops: Tensor
    scales: Tensor
    codes: Tensor


NF4 = RowForm(4, 64)
INT8 = RowForm(8, 256, "linear", "exact")


@functools.cache
def numbers_of(numbers: Numbers, bits: int, device: torch.device = _CPU) -> Tensor:
    """Returns the numbers behind the codes, (2^bits,) float32, ascending."""
    if numbers == "linear":
        return torch.arange(-128.0, 128.0, device=device)
    half = 2 ** (bits - 1)
    below, above = _quantiles(half - 1), _quantiles(half)
    ascending = torch.cat([-below, torch.zeros(1, device=_CPU), above.flip(0)])
    return (ascending / ascending[-1]).to(device)


def _quantiles(count: int) -> Tensor:
    """Those above zero, the largest first: of probabilities that are evenly spaced in float32, as scipy and torch space them."""
    probabilities = blockwise.parted(ENDS, 0.5, count)[:-1].tolist()
    return torch.tensor([NormalDist().inv_cdf(p) for p in probabilities], dtype=torch.float32, device=_CPU)


def encode_rows(x: Tensor, form: RowForm, shift: Tensor | None = None) -> Tensor:
    """Codes x (R, C), of any floating dtype, as rows of bytes (R, W). `shift`: of whole scales, where x is not all of its matrix.
    Communicates nothing."""
    rows, columns = x.shape
    packed = torch.zeros(rows, form.row_bytes(columns), dtype=torch.uint8, device=x.device)
    if form.scales == "whole" and shift is None:
        shift = least_scale(x, form)
    for some in device_portions(x, columns):
        _encode(x[some].float(), form, form.parts(packed[some], columns), shift)
    return packed


def least_scale(x: Tensor, form: RowForm) -> Tensor:
    """Gives the least scale of a matrix: the shift of all its rows, where scales are whole."""
    return torch.stack([_scales(x[some].float(), form).amin() for some in row_portions(*x.shape)]).amin()


def decode_rows(packed: Tensor, columns: int, form: RowForm, dtype: torch.dtype = torch.float32) -> Tensor:
    """Gives x^ (R, C), rounded to `dtype`, of rows of bytes (R, W). Communicates nothing."""
    out = torch.empty(packed.size(0), columns, dtype=dtype, device=packed.device)
    if dtype != torch.float64 and use_triton(packed.device):
        from rowwise.kernels.coded_rows_triton import decode_triton_

        decode_triton_(packed, out, form)
    else:
        decode_reference_(packed, out, form)
    return out


def decode_reference_(packed: Tensor, out: Tensor, form: RowForm) -> None:
    """Computes `decode_rows` in plain torch, into `out`."""
    columns = out.size(1)
    for some in row_portions(*out.shape):
        parts = form.parts(packed[some], columns)
        x = _numbers(parts.codes, form, columns)
        for block, scale in _blocks(x, scales_of(parts, form), form.block):
            block.mul_(scale)
        out[some] = x


def scales_of(parts: Parts, form: RowForm) -> Tensor:
    """Gives s^ (R, blocks) float32: the scale of every block."""
    if parts.shift is None:
        return parts.scales.view(torch.float32)
    tops = _spread(parts, form)
    if form.scales == "whole":
        steps = _unpack(parts.scales, form.scale_bits)[:, : parts.blocks]
        return _whole_scales(steps, tops, form) + parts.shift
    book = blockwise.code_book(True, parts.codes.device)
    return book.index_select(0, parts.scales.flatten().int()).view_as(tops) * tops + parts.shift


def _spread(parts: Parts, form: RowForm) -> Tensor:
    """t (R, blocks) float32 of the group of every block."""
    return parts.tops.float().repeat_interleave(form.group, 1)[:, : parts.blocks]


def _whole_scales(steps: Tensor, tops: Tensor, form: RowForm) -> Tensor:
    """d t / (2^b - 1), as what multiplied it is divided by; 0 where t is negligible."""
    factor = (2**form.scale_bits - 1) / tops.clamp_min(NEGLIGIBLE)
    return (steps / factor).where(tops > NEGLIGIBLE, 0.0)


def _encode(x: Tensor, form: RowForm, into: Parts, shift: Tensor | None) -> None:
    """Codes one portion of rows, float32."""
    scales = _scales(x, form)
    used = _encode_scales(scales, form, into, shift)
    y = x.clone()
    for block, scale in _blocks(y, used, form.block):
        block.mul_((1.0 / scale.clamp_min(SMALLEST)).where(scale != 0, 0.0))
    if form.numbers == "linear":
        codes = y.round_().clamp_(-127, 127).add_(128)
    else:
        book = numbers_of(form.numbers, form.bits, x.device)
        codes = torch.bucketize(y, (book[:-1] + book[1:]) / 2, out_int32=True)
    into.codes.copy_(_pack(codes.to(torch.uint8), form.bits))


def _scales(x: Tensor, form: RowForm) -> Tensor:
    """s (R, blocks)."""
    missing = -x.size(1) % form.block
    filled = torch.nn.functional.pad(x, (0, missing)) if missing else x
    largest = filled.unflatten(1, (-1, form.block)).abs().amax(2)
    return largest / 127 if form.numbers == "linear" else largest


def _encode_scales(scales: Tensor, form: RowForm, into: Parts, shift: Tensor | None) -> Tensor:
    """Codes the scales of one portion; returns by what its blocks are divided."""
    if into.shift is None:
        into.scales.view(torch.float32).copy_(scales)
        return scales
    if form.scales == "dynamic":
        # In 64 bits, where the sum of float32 numbers of one size is exact: it is the same however many rows there are.
        into.shift.copy_(scales.double().mean(1, keepdim=True))
        codes, tops = blockwise.quantise(scales - into.shift, signed=True)
        into.scales.copy_(codes)
        into.tops.copy_(tops)
        return scales
    assert shift is not None
    into.shift.copy_(shift.expand(scales.size(0), 1))
    above = scales - into.shift
    filled = torch.nn.functional.pad(above, (0, -above.size(1) % form.group))
    into.tops.copy_(filled.unflatten(1, (-1, form.group)).amax(2))
    tops, most = _spread(into, form), 2**form.scale_bits - 1
    steps = (above * (most / tops.clamp_min(NEGLIGIBLE))).round_().clamp_(0, most)
    into.scales.copy_(_pack(steps.to(torch.uint8), form.scale_bits))
    return _whole_scales(steps, tops, form) + into.shift


def _blocks(x: Tensor, scales: Tensor, width: int) -> list[tuple[Tensor, Tensor]]:
    """Views the blocks of x (R, C) beside their scales: (R, full, width) and (R, full, 1), and the short last ones."""
    full = x.size(1) // width
    whole = (x[:, : full * width].unflatten(1, (full, width)), scales[:, :full, None]) if full else None
    rest = (x[:, None, full * width :], scales[:, full:, None]) if x.size(1) % width else None
    return [views for views in (whole, rest) if views is not None]


def _numbers(codes: Tensor, form: RowForm, columns: int) -> Tensor:
    """The numbers (R, C) float32 behind packed codes."""
    if 8 % form.bits:
        book = numbers_of(form.numbers, form.bits, codes.device)
        found = book.index_select(0, _unpack(codes, form.bits).flatten().int())
    else:
        found = _numbers_of_bytes(form.numbers, form.bits, codes.device).index_select(0, codes.flatten().int())
    return found.view(codes.size(0), -1)[:, :columns]


@functools.cache
def _numbers_of_bytes(numbers: Numbers, bits: int, device: torch.device) -> Tensor:
    """(256, 8 / bits): the numbers behind the codes in a byte."""
    every = torch.arange(256, device=device)[:, None]
    shifts = torch.arange(8 - bits, -1, -bits, device=device)
    return numbers_of(numbers, bits, device)[every >> shifts & (1 << bits) - 1]


def _packed(count: int, bits: int) -> int:
    """Counts the bytes of so many codes."""
    return -(-count * bits // 8)


def _pack(numbers: Tensor, bits: int) -> Tensor:
    """(R, bytes) of (R, n) uint8: each 8 numbers as one of 8 `bits` bits."""
    if bits == 8:
        return numbers
    filled = torch.nn.functional.pad(numbers, (0, -numbers.size(1) % 8)).unflatten(1, (-1, 8))
    together = (filled.long() << _ends(8, bits, numbers.device)).sum(2, keepdim=True)
    every = (together >> _ends(bits, 8, numbers.device) & 255).to(torch.uint8).flatten(1)
    return every[:, : _packed(numbers.size(1), bits)]


def _unpack(codes: Tensor, bits: int) -> Tensor:
    """(R, n) of (R, bytes): what `_pack` packed, and what fills it up to a multiple of 8."""
    if bits == 8:
        return codes
    filled = torch.nn.functional.pad(codes, (0, -codes.size(1) % bits)).unflatten(1, (-1, bits))
    together = (filled.long() << _ends(bits, 8, codes.device)).sum(2, keepdim=True)
    return (together >> _ends(8, bits, codes.device) & (1 << bits) - 1).flatten(1)


def _ends(count: int, bits: int, device: torch.device) -> Tensor:
    """Where each of `count` numbers of `bits` bits ends in the whole number that they are, the first highest."""
    return torch.arange((count - 1) * bits, -1, -bits, device=device)
