"""Adam's moments in 8 bits: no step is larger than 32-bit AdamW's on the same gradients, whatever they are; the codes
against a search, Triton against torch. (Law 1.)"""

import math

import pytest
import torch

from interpreter import interpreted
from rowwise.kernels.adamw8bit import adamw8bit_reference_
from rowwise.kernels.blockwise import BLOCK, blocks_per_row, code_book, dequantise, quantise
from rowwise.kernels.moment_pair import dequantise_pair, quantise_pair_, quantise_pair_reference_

SHAPES = [(0, 300), (3, 1), (1, 255), (2, 256), (5, 257), (2, 704), (1, 1000)]
ALLOWED = 1.05  # times the largest change that the 32-bit rule makes


def rounded(m, v, quantiser=quantise_pair_):
    """[(codes, absmax) of m, of v]."""
    shape, per_row = m.shape, (m.size(0), blocks_per_row(m.size(1)))
    states = [(torch.zeros(shape, dtype=torch.uint8), torch.zeros(per_row)) for _ in range(2)]
    quantiser(m, v, *states)
    return states


def random_pair(shape, seed=0):
    """Moments with ratios up to 1, over many decades."""
    draw = torch.Generator().manual_seed(seed)
    scale = 10 ** (-8 * torch.rand(shape, generator=draw, dtype=torch.float64))
    present = torch.rand(shape, generator=draw) < 0.9
    v = torch.randn(shape, generator=draw, dtype=torch.float64).square() * scale * present
    return (2 * torch.rand(shape, generator=draw, dtype=torch.float64) - 1) * v.sqrt(), v


def ratios(m, v):
    return torch.where(v > 0, m.abs() / v.sqrt(), 0.0)


def by_search(m, v):
    """The numbers that one block (m, v), each (n,), becomes: the definition, a number at a time."""
    most, books = ratios(m, v).max().item(), [code_book(signed).tolist() for signed in (True, False)]
    top = torch.tensor(v.max().item()).item() if v.dtype == torch.float32 else v.max().float().item()
    kept, held = [], []
    for x, second in zip(m.tolist(), v.tolist(), strict=True):
        code = min(range(256), key=lambda c: abs(books[1][c] - second / top)) if second else 0
        ratio = abs(x) / math.sqrt(second) if second else 0.0
        if second and books[1][code] * top * (1 + 1 / 64) < second and (ratio > 0.9 * most or code == 0):
            code += 1
        kept.append(books[1][code] * top)
        limit = most * math.sqrt(kept[-1]) * (1 + 2**-16)
        held.append((max(-limit, min(limit, x)), limit))
    top = max(torch.tensor(abs(x)).item() for x, _ in held)
    first = []
    for x, limit in held:
        code = min(range(256), key=lambda c: abs(books[0][c] - x / top))
        if abs(books[0][code] * top) > limit:
            code += 1 if code < 127 else -1
        first.append(books[0][code] * top)
    return first, kept


@pytest.mark.parametrize("columns", [1, 40, 256])
def test_the_codes_are_those_of_the_definition(columns):
    m, v = random_pair((3, columns), seed=columns)
    v[:, 0] = 1.0  # a row of zeros alone has no largest number
    m[:, 0] = torch.tensor([0.3, -0.9, 1.0])
    first, second = dequantise_pair(*rounded(m, v), torch.float64)
    for row in range(3):
        expected = by_search(m[row], v[row])
        torch.testing.assert_close(first[row].tolist(), expected[0], rtol=1e-6, atol=0)
        torch.testing.assert_close(second[row].tolist(), expected[1], rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
def test_rounding_raises_no_largest_ratio_and_loses_no_second_moment(shape, dtype):
    m, v = (x.to(dtype) for x in random_pair(shape))
    first, second = dequantise_pair(*rounded(m, v), dtype)
    assert ((second > 0) == (v > 0)).all() and (first[v == 0] == 0).all()
    for block in range(blocks_per_row(shape[1])):
        part = slice(block * BLOCK, (block + 1) * BLOCK)
        before, after = (ratios(*x).amax(1) for x in ((m[:, part], v[:, part]), (first[:, part], second[:, part])))
        assert (after <= before * (1 + 2**-15)).all()


def test_numbers_with_small_ratios_have_their_nearest_codes():
    """What most of a block is: its codes are those of the paper, so their errors have no sign."""
    m, v = random_pair((4, 512))
    m, v = 0.3 * m, v.clamp_min(1e-6)
    m[:, ::256] = v[:, ::256].sqrt()  # sets the largest ratio of each block
    m[:, 1::256], v[:, 1::256] = 0.9, 1.0
    (first, _), (second, _) = rounded(m, v)
    calm = (ratios(m, v) < 0.3) & (m.abs() > 1e-3)
    assert calm.sum() > 500
    assert torch.equal(second[calm], quantise(v, False)[0][calm])
    assert torch.equal(first[calm], quantise(m, True)[0][calm])


def test_a_pair_that_is_read_and_rounded_again_stays():
    """As at every step without a gradient, where both moments only shrink: nothing drifts."""
    state = rounded(*random_pair((4, 700), seed=3))
    m, v = dequantise_pair(*state)
    m[:, ::256] = m[:, ::256].abs()
    state = rounded(m, v)
    for _ in range(3):  # -1 has no code: let the maxima settle
        state = rounded(*dequantise_pair(*state))
    before = dequantise_pair(*state)
    m, v = dequantise_pair(*rounded(0.9 * before[0], 0.95 * before[1]))
    positive = before[0] > 0
    torch.testing.assert_close(v, 0.95 * before[1], rtol=1e-5, atol=0)
    assert ((m / before[0])[positive] < 0.9 * (1 + 1e-5)).all()


def test_codes_of_before_that_say_zero_and_not_zero_read_as_zero():
    """Rounded one by one, as they were, v is lost where m is not."""
    m, v = torch.tensor([[1.0, 1e-4]]), torch.tensor([[1.0, 1e-8]])
    first, second = quantise(m, True), quantise(v, False)
    assert dequantise(*second, False)[0, 1] == 0 and dequantise(*first, True)[0, 1] > 0
    assert dequantise_pair(first, second)[0].tolist() == [[1.0, 0.0]]
    x = torch.zeros(1, 2)
    adamw8bit_reference_([x], [torch.zeros(1, 2)], [first], [second], 9, 1.0, 0.9, 0.95, 1e-8, 0.0)
    assert 0.5 < x[0, 0].abs() < 2 and x[0, 1] == 0


def sequences(steps, rows, seed):
    """Kinds of gradients (steps, rows, 256), each a hard one: zero, tiny, large, absent, growing, dying."""
    draw = torch.Generator().manual_seed(seed)
    shape = (steps, rows, 256)

    def share(*lengths):
        return torch.rand(*lengths, generator=draw)

    def decades(count, *lengths):
        return 10 ** (-count * share(*lengths))

    noise, once = torch.randn(shape, generator=draw), torch.randn(shape[1:], generator=draw)
    scales = torch.tensor([0, 0, 1e-12, 1e-8, 1e-6, 1e-4, 1e-2, 1, 1e4])
    step = torch.arange(steps)[:, None, None]
    phases = (noise * decades(4, *shape))[::8].repeat_interleave(8, 0)[:steps]
    walk = torch.cumsum(0.3 * torch.randn(shape, generator=draw), 0).exp()
    return {
        "one gradient": noise * 1e-2 * (step == 0),
        "half of them": noise * 1e-2 * (step < steps // 2),
        "steps of any scale": noise * scales[(9 * share(steps, 1, 1)).long()],
        "rows of any scale": noise * scales[(9 * share(steps, rows, 1)).long()],
        "weights of any scale at a time": noise * scales[(9 * share(*shape)).long()],
        "weights of any scale": noise * decades(6, *shape[1:]),
        "steps without tokens": noise * decades(6, *shape[1:]) * (share(steps, 1, 1) < 0.2),
        "absent tokens": noise * (share(steps, rows, 1) < 0.1),
        "absent weights": noise * decades(3, *shape[1:]) * (share(*shape) < 0.1),
        "always the same": (once * decades(3, *shape[1:])).expand(shape),
        "the same for a while": phases,
        "wandering": once.sign() * walk,
        "wandering noise": noise * walk,
        "dying": once * torch.exp(-0.3 * step * share(*shape[1:])),
        "growing": once * torch.exp(0.3 * step * (share(*shape[1:]) - 0.7)),
        "about eps": noise * 1e-6 * decades(6, *shape[1:]) * (share(steps, 1, 1) < 0.5),
        "late": noise * decades(4, *shape) * (step > steps // 4),
    }


def changes(gradients, betas, eps, bits):
    """The largest change of a weight in units of lr, of every matrix and step: (steps, matrices). 16 rows a matrix."""
    _, rows, n = gradients.shape
    moments = [torch.zeros(rows, n) for _ in range(2)]
    states = rounded(*moments)
    largest = []
    for step, g in enumerate(gradients, 1):
        if bits == 8:
            moments = dequantise_pair(*states)
        m, v = moments
        m.lerp_(g, 1 - betas[0])
        v.mul_(betas[1]).addcmul_(g, g, value=1 - betas[1])
        direction = (m / (1 - betas[0] ** step)) / ((v / (1 - betas[1] ** step)).sqrt() + eps)
        largest.append(direction.view(-1, 16, n).abs().amax((1, 2)))
        if bits == 8:
            quantise_pair_(m, v, *states)
    return torch.stack(largest)


@pytest.mark.parametrize("betas", [(0.9, 0.95), (0.9, 0.999), (0.95, 0.98)])
def test_no_weight_moves_further_than_with_32_bits(betas):
    """At any step, the largest change so far is at most 1.05 times that of 32-bit AdamW so far."""
    for kind, gradients in sequences(24, 32, seed=1).items():
        ours, plain = (changes(gradients, betas, 1e-8, bits).cummax(0).values for bits in (8, 32))
        assert plain[-1].min() > 0, kind
        assert (ours <= ALLOWED * plain).all(), (kind, (ours / plain).max())


def test_a_step_without_a_gradient_moves_as_with_32_bits():
    """64 x 128, g = 1e-2 randn, then 0: of its second step 32-bit AdamW makes 0.68 lr, and so does this."""
    torch.manual_seed(0)
    g = 1e-2 * torch.randn(64, 128)
    x, state = torch.zeros(64, 128), rounded(torch.zeros(64, 128), torch.zeros(64, 128))
    first, second = ([moment] for moment in state)
    for step, factor in ((1, 1.0), (2, 0.0), (3, 0.0)):
        before = x.clone()
        adamw8bit_reference_([x], [factor * g], first, second, step, 1.0, 0.9, 0.95, 1e-8, 0.0)
        assert (x - before).abs().max() <= (1.0, 0.6791, 0.5312)[step - 1] * 1.001


def agree():
    """In the interpreter: every code and maximum, to the last bit; and the property, on the kernel."""
    from rowwise.kernels.moment_pair_triton import quantise_pair_triton_

    for seed, shape in enumerate(SHAPES):
        pair = [x.float() for x in random_pair(shape, seed)]
        for some in (pair, [torch.zeros(shape), torch.zeros(shape)], [pair[0] * 1e-12, pair[1] * 1e-24]):
            ours, reference = (rounded(*some, form) for form in (quantise_pair_triton_, quantise_pair_reference_))
            for one, other in zip(ours, reference, strict=True):
                assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])
    g = 1e-2 * torch.randn(4, 256)
    m, v = 0.1 * g, 0.05 * g * g
    for _ in range(2):
        before = ratios(m, v).amax(1)
        first, second = dequantise_pair(*rounded(m, v, quantise_pair_triton_))
        assert (ratios(first, second).amax(1) <= before * (1 + 2**-15)).all()
        m, v = 0.9 * first, 0.95 * second


def test_triton_and_torch_give_the_same_bits():
    interpreted("test_kernels_moment_pair", "agree")
