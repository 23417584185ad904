"""Rows as codes: bitsandbytes' bytes, LQ-LoRA's formula as its authors write it, rows alone and together, Triton against torch, and
the linear layer that decodes where it multiplies. (Law 1.)"""

import itertools

import pytest
import torch

from interpreter import interpreted
from rowwise.kernels.coded_linear import coded_linear
from rowwise.kernels.coded_rows import INT8, NF4, RowForm, decode_reference_, decode_rows, encode_rows, numbers_of
from rowwise.kernels.row_codes import rounded_rows

# bitsandbytes 0.50.2: get_4bit_type("nf4")
SIXTEEN = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip
# Its quantize_4bit(x, blocksize=64, compress_statistics=True, quant_type="nf4") of `theirs`, on the CPU.
CODES = bytes.fromhex(
    "07827b57e6717937c57e7817a47d67f7827a47d6707937b57e6817937c67f7827a47d6707927b57e6817937c57f7817a47d6707827b57e6717937c57e7817"
    "a47d67f7827a47d6707937b57e6817937c67f7827a47d6707927b57e6817937c57f"
)
LQ = [
    RowForm(bits, block, scales="whole", scale_bits=scale_bits, group=group, top=top)
    for bits, block, scale_bits, group, top in [
        (3, 16, 8, 16, "fp32"), (2, 64, 4, 16, "bf16"), (4, 32, 3, 64, "fp16"), (8, 16, 2, 16, "bf16"), (5, 32, 8, 64, "fp32"),
    ]
]  # fmt: skip
FORMS = [NF4, INT8, *LQ]


def matrix(rows, columns, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.02


def theirs():
    x = (((torch.arange(192) * 37) % 101 - 50).float() / 50) ** 3
    return x * torch.tensor([1.0, 0.25, 0.6]).repeat_interleave(64)


def test_the_sixteen_numbers_are_those_of_bitsandbytes():
    assert numbers_of("normal", 4).tolist() == SIXTEEN


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_numbers_are_quantiles(bits):
    """LQ-LoRA's create_normal_float_scheme: icdf of 2^(bits-1) probabilities up to a half, and of as many and one more from it."""
    half, ends = 2 ** (bits - 1), 0.9677083
    below, above = torch.linspace(1 - ends, 0.5, half).double(), torch.linspace(0.5, ends, half + 1).double()
    quantiles = torch.special.ndtri(torch.cat([below[:-1], above]))
    assert len(quantiles) == 2**bits
    torch.testing.assert_close(numbers_of("normal", bits).double(), quantiles / quantiles[-1], rtol=1e-5, atol=1e-6)


def test_bytes_are_those_of_bitsandbytes():
    x = theirs()[None]
    parts = NF4.parts(encode_rows(x, NF4), 192)
    assert bytes(parts.codes[0].tolist()) == CODES
    assert parts.scales.tolist() == [[255, 3, 84]]
    assert parts.shift.item() == 0.6166666746139526
    out = decode_rows(encode_rows(x, NF4), 192, NF4).double()
    assert out.sum().item() == pytest.approx(0.2916346862912178, rel=1e-6)
    assert out.square().sum().item() == pytest.approx(14.459658630502517, rel=1e-7)


def test_linear_numbers_are_those_that_cross_ranks():
    """`kernels.row_codes` in 8 bits, where a quotient is not rounded first."""
    x = matrix(5, 300)
    out, right = decode_rows(encode_rows(x, INT8), 300, INT8), rounded_rows(x)
    assert ((out - right).abs() > 1e-7).float().mean() < 0.01
    torch.testing.assert_close(out, right, rtol=0, atol=x.abs().max().item() / 126)


def as_the_authors_write_it(a, form):
    """LQ-LoRA's blockwise_absmax and quantize_with_scheme_2, of a matrix whose blocks and groups fill its rows."""
    blocks = a.view(-1, form.group, form.block)
    first = blocks.abs().amax(2, keepdim=True)
    offset = first.min()
    above = first - offset
    tops = above.amax(1, keepdim=True).to(
        {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[form.top]
    )
    factor = (2**form.scale_bits - 1) / tops.float()
    scales = (above * factor).round().clamp(0, 2**form.scale_bits - 1) / factor + offset
    book = numbers_of("normal", form.bits)
    edges = torch.cat([torch.tensor([-torch.inf]), (book[1:] + book[:-1]) / 2, torch.tensor([torch.inf])])
    return (book[torch.bucketize(blocks / scales, edges) - 1] * scales).reshape(a.shape)


@pytest.mark.parametrize("form", LQ, ids=str)
def test_whole_scales_are_those_of_the_authors(form):
    x = matrix(6, 2 * form.block * form.group)
    out, right = decode_rows(encode_rows(x, form), x.size(1), form), as_the_authors_write_it(x, form)
    off = (out - right).abs() > 1e-6
    assert off.float().mean() < 1e-4  # where a product with a reciprocal is on the other side of a midpoint


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("columns", [1, 7, 64, 300])
def test_rows_have_the_bytes_that_they_have_within_the_whole(form, columns):
    x = matrix(9, columns)
    shift = None if form.scales != "whole" else encode_rows(x, form)[:, :4].view(torch.float32)[:1]
    whole = encode_rows(x, form)
    assert whole.shape == (9, form.row_bytes(columns))
    parts = [encode_rows(x[rows], form, shift) for rows in (slice(0, 1), slice(1, 5), slice(5, 9), slice(9, 9))]
    assert torch.equal(torch.cat(parts), whole)
    out = decode_rows(whole, columns, form)
    assert torch.equal(decode_rows(whole[3:5], columns, form), out[3:5])
    assert torch.equal(decode_rows(whole, columns, form, torch.float64), out.double())
    if columns == 300:
        error = (out - x).norm() / x.norm()
        cut_off = 0 if form.scale_bits == 8 else 0.1  # numbers of blocks whose scale is rounded down
        assert 0.3 * 2.0**-form.bits < error < 3 * 2.0**-form.bits + cut_off


def test_a_weight_of_4096_columns_takes_a_little_more_than_four_bits():
    assert NF4.row_bytes(4096) * 8 / 4096 == 4 + 8 / 64 + 64 / 4096
    assert INT8.row_bytes(4096) * 8 / 4096 == 8 + 32 / 256


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_zeros_stay_and_what_is_not_finite_says_so(form):
    x = matrix(4, 600)
    x[0], x[1, 20:60] = 0, 0
    out = decode_rows(encode_rows(x, form), 600, form)
    assert not out[0].any() and not out[1, 20:60].any() and out[1].any()
    for bad in (torch.nan, torch.inf):
        x[2, 3] = bad
        assert not decode_rows(encode_rows(x, form), 600, form)[2, 3].isfinite()


def test_triton_gives_what_torch_gives():
    interpreted("test_kernels_coded_rows", "triton_is_torch")


def triton_is_torch():
    from rowwise.kernels.coded_rows_triton import decode_triton_

    for form, (rows, columns), dtype in itertools.product(FORMS, [(3, 300), (1, 7)], [torch.float32, torch.bfloat16]):
        packed = encode_rows(matrix(rows, columns), form)
        out, right = (torch.full((rows, columns), torch.nan, dtype=dtype) for _ in range(2))
        decode_triton_(packed, out, form)
        decode_reference_(packed, right, form)
        assert torch.equal(out, right), (form, rows, columns)


@pytest.mark.parametrize("form", [NF4, INT8, None], ids=["nf4", "int8", "bf16"])
def test_a_linear_layer_is_that_of_the_decoded_weight(form):
    w, x = matrix(5, 70), matrix(12, 70, seed=1).view(3, 4, 70).double().requires_grad_()
    kept = w.bfloat16() if form is None else encode_rows(w, form)
    right = kept.double() if form is None else decode_rows(kept, 70, form, torch.float64)
    y = coded_linear(x, kept, form)
    dy = matrix(12, 5, seed=2).view(3, 4, 5).double()
    (dx,) = torch.autograd.grad(y, x, dy)
    assert torch.equal(y, x @ right.T)
    assert torch.equal(dx, dy @ right)


def test_what_waits_for_the_backward_is_the_codes():
    kept, saved = encode_rows(matrix(64, 64), NF4), []
    x = torch.ones(2, 64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        coded_linear(x, kept, NF4)
    assert [t.data_ptr() for t in saved] == [kept.data_ptr()]
