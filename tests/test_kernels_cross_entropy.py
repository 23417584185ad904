"""The cross entropy of a head without its logits: against whole logits, in every order, dtype and shape, Triton as torch, and its
bytes. (Laws 1 and 4.)"""

import itertools

import pytest
import torch
import torch.nn.functional as F

from interpreter import interpreted
from live_bytes import LiveBytes
from rowwise.kernels import cross_entropy as module
from rowwise.kernels.cross_entropy import TILES, Tiles, cross_entropy, linear_cross_entropy, loss_bytes
from rowwise.kernels.logit_form import AS_THEY_ARE, LogitForm
from rowwise.kernels.products import add_product_

SHAPES = [(1, 1, 1), (3, 5, 7), (17, 8, 61), (64, 33, 128), (130, 20, 257)]  # tokens, dim, words
SMALL = Tiles(elements=80, most=9, least=4)
SCALES = [None, 0.37, 1.0]  # of which the backward multiplies by the second, whatever it was told
G = 0.37
# Granite's, Gemma 2's, both: of logits far beyond the cap, and far below it.
FORMS = [AS_THEY_ARE, LogitForm(scale=0.125), LogitForm(cap=30.0), LogitForm(scale=1.7, cap=4.0)]


def operands(tokens, dim, words, dtype=torch.float64, device="cpu"):
    torch.manual_seed(tokens + dim + words)
    x, w = torch.randn(tokens, dim, dtype=torch.float64), torch.randn(words, dim, dtype=torch.float64)
    labels = torch.randint(words, (tokens,))
    labels[2::3] = -100
    return (x * 2).to(device, dtype).requires_grad_(), w.to(device, dtype).requires_grad_(), labels.to(device)


def whole(x, w, labels, g=G, form=AS_THEY_ARE):
    """(loss, dx, dw) by way of the logits."""
    z = (x @ w.t()).to(module.wide_dtype(x.dtype)) * form.scale
    z = z if form.cap is None else form.cap * torch.tanh(z / form.cap)
    loss = F.cross_entropy(z, labels, reduction="sum")
    return loss.detach(), *torch.autograd.grad(loss * g, (x, w))


def ours(x, w, labels, scale, g=G, form=AS_THEY_ARE):
    loss = linear_cross_entropy(x, w, labels, scale, form)
    return loss.total.detach(), *torch.autograd.grad(loss.total * g, (x, w))


@pytest.fixture
def small_tiles(monkeypatch):
    """So small that each shape has many, and the last are less than whole."""
    monkeypatch.setitem(TILES, "cpu", SMALL)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_formula(shape, scale, form, small_tiles):
    x, w, labels = operands(*shape)
    for one, other in zip(ours(x, w, labels, scale, G, form), whole(x, w, labels, G, form), strict=True):
        assert (one.dtype == other.dtype and other.abs().max() > 0) or shape[2] == 1
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("form", [FORMS[0], FORMS[3]])
@pytest.mark.parametrize("scale", SCALES[:2])
def test_the_loss_of_each_token_and_the_tokens_with_a_label(scale, form, small_tiles):
    x, w, labels = operands(17, 8, 61)
    each = F.cross_entropy(form.of(x @ w.t()), labels, reduction="none")
    with torch.no_grad():
        evaluated = linear_cross_entropy(x, w, labels, form=form)
    by_logits = cross_entropy(x @ w.t(), labels, form)
    for loss in (linear_cross_entropy(x, w, labels, scale, form), evaluated, by_logits):
        torch.testing.assert_close(loss.each, each, rtol=1e-12, atol=1e-13)
        assert not loss.each.requires_grad and (loss.each[2::3] == 0).all()
        assert loss.tokens == (labels >= 0).sum() and loss.total == loss.each.sum()
    assert not evaluated.total.requires_grad


@pytest.mark.parametrize("scale", SCALES[:2])
def test_without_a_label_nothing_is_learned(scale, small_tiles):
    x, w, labels = operands(17, 8, 61)
    loss, dx, dw = ours(x, w, torch.full_like(labels, -100), scale)
    assert loss == 0 and dx.eq(0).all() and dw.eq(0).all()
    unlabelled = ours(x, w, labels, scale)[1][2::3]
    assert unlabelled.eq(0).all()


@pytest.mark.parametrize("scale", SCALES[:2])
@pytest.mark.parametrize("frozen", [0, 1])
def test_what_does_not_learn_has_no_gradient(scale, frozen, small_tiles):
    x, w, labels = operands(17, 8, 61)
    expected = whole(x, w, labels)[2 - frozen]
    (x, w)[frozen].requires_grad_(False)
    (linear_cross_entropy(x, w, labels, scale).total * G).backward()
    assert (x, w)[frozen].grad is None
    torch.testing.assert_close((w, x)[frozen].grad, expected, rtol=1e-12, atol=1e-13)


def test_a_label_that_is_no_word_is_no_number():
    x, w, labels = operands(17, 8, 61)
    labels[4] = 61
    loss, dx, _ = ours(x, w, labels, None)
    assert loss.isnan() and dx[4].isnan().all()
    with pytest.raises((IndexError, RuntimeError)):
        ours(x, w, labels, G)


@pytest.mark.parametrize("scale", SCALES[:2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", [FORMS[0], FORMS[3]])
def test_fewer_bits_err_no_more_than_by_way_of_the_logits(dtype, scale, form, small_tiles):
    x, w, labels = operands(130, 20, 257, dtype)
    exact = whole(x.double(), w.double(), labels, G, form)
    theirs, mine = whole(x, w, labels, G, form), ours(x, w, labels, scale, G, form)
    # exp(z - lse) has the last bit of a rounded lse, which exp(z - max) / sum has not: 1 of 2^24 of a number like 20.
    last_bit = 1e-6 if dtype == torch.float32 else 1e-7
    for a, b, right in zip(mine, theirs, exact, strict=True):
        assert a.dtype == b.dtype
        assert (a - right).norm() <= 1.1 * (b - right).norm() + last_bit * right.norm()


def test_gradients_are_scaled_before_they_are_rounded():
    """Of half precision, which has no number below 6e-8: what a loss scale is for."""
    x, w, labels = operands(17, 8, 61, torch.float16)
    tiny = 2.0**-26
    for g in (tiny, 1024 * tiny):
        ours_, theirs = ours(x, w, labels, g, g)[2], whole(x, w, labels, g)[2]
        torch.testing.assert_close(ours_, theirs, rtol=0, atol=2.0**-23)
        assert ours_.abs().max() > 0 if g > tiny else True


def test_sixteen_bits_are_added_up_in_thirty_two():
    """A thousand small numbers beside a large one: each would be rounded away."""
    a, b = torch.ones(1, 1, dtype=torch.bfloat16), torch.ones(1, 1, dtype=torch.bfloat16)
    out = torch.full((1, 1), 4096.0)
    for _ in range(1000):
        add_product_(out, a, b)
    assert out == 5096


def agree():
    from rowwise.kernels import cross_entropy_triton as triton

    for (shape, tile, form), dtype in itertools.product(
        [((1, 1, 1), 16, FORMS[2]), ((19, 40, 61), 32, FORMS[3]), ((33, 20, 150), 16, AS_THEY_ARE)],
        (torch.float32, torch.bfloat16, torch.float16),
    ):
        triton.ROWS = triton.COLUMNS = tile
        x, w, labels = (t.detach() for t in operands(*shape, dtype))
        sums = triton.sum_and_label_triton(x, w, labels, form)
        expected = module.sum_and_label_reference(x, w, labels, form)
        # A sum in another order may round a logit of 16 bits to its neighbour.
        near = 1e-5 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
        for one, other in zip(sums, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=near, atol=near)
        lse = expected[0].masked_fill(labels < 0, torch.inf)
        for first in (0, shape[2] // 2):
            given = x, w[first:], labels - first, lse, torch.tensor(G), form
            torch.testing.assert_close(
                triton.logit_gradient_triton(*given), module.logit_gradient_reference(*given), rtol=8 * near, atol=near
            )


def test_triton_agrees_with_torch():
    interpreted("test_kernels_cross_entropy", "agree")


LLAMA3 = 128_256
LATER_16, LATER_32, AT_ONCE_32 = (torch.bfloat16, None), (torch.float32, None), (torch.float32, 1.0)


def height(form, tokens, dim, words, dtype, scale=None, logits=AS_THEY_ARE) -> int:
    """The most bytes that a loss and its gradients hold, beside its arguments and dw; counted where no tensor has memory."""
    x, w = (torch.empty(n, dim, dtype=dtype, device="meta", requires_grad=True) for n in (tokens, words))
    labels = torch.empty(tokens, dtype=torch.int64, device="meta")
    with LiveBytes() as live:
        form(x, w, labels, scale, logits).total.backward()
    return live.peak - w.nbytes


def plain(x, w, labels, scale, _):
    return cross_entropy(x @ w.t(), labels)


@pytest.mark.parametrize(("dtype", "scale"), [LATER_16, LATER_32, AT_ONCE_32])
@pytest.mark.parametrize(("tokens", "dim", "words"), [(8192, 4096, 3000), (4096, 512, 2000), (1024, 256, 256)])
def test_bytes_are_those_of_the_formula(dtype, scale, tokens, dim, words):
    for form in FORMS[:: 1 if tokens == 1024 else 2]:
        measured = height(linear_cross_entropy, tokens, dim, words, dtype, scale, form)
        expected = loss_bytes(tokens, dim, words, dtype.itemsize, scale is not None, "cpu", form.cap is not None)
        assert abs(measured - expected) <= 0.01 * expected + 100 * tokens  # log-sum-exps, labels


@pytest.mark.parametrize("dim", [2048, 4096])
def test_the_loss_of_8192_tokens_and_128256_words_takes_less_than_300_mb(dim, full):
    """And by way of the logits 12 GB. (Counting every tile of 16 bits takes ten seconds: it is left to --full.)"""
    for dtype, scale in (LATER_16, LATER_32, AT_ONCE_32):
        for device in TILES:
            assert loss_bytes(8192, dim, LLAMA3, dtype.itemsize, scale is not None, device) < 300e6
        if full or scale:
            assert height(linear_cross_entropy, 8192, dim, LLAMA3, dtype, scale) < 300e6
    dw = 2 * dim * LLAMA3  # which is not there yet at that height
    assert height(plain, 8192, dim, LLAMA3, torch.bfloat16) + dw > 12e9


def test_a_gpu_holds_what_the_formula_says(monkeypatch):
    """Where a kernel makes the gradient of a tile and tensor cores add up its products, and the tiles are a GPU's."""
    monkeypatch.setitem(TILES, "cpu", TILES["cuda"])
    monkeypatch.setattr(module, "add_product_", lambda out, a, b: None)
    monkeypatch.setattr(module, "logit_gradient", lambda x, w, *_: x.new_empty(len(x), len(w)))
    for tokens, dim, words in ((8192, 4096, 5000), (20_000, 64, 5000)):
        x, w = (torch.empty(n, dim, dtype=torch.bfloat16, device="meta") for n in (tokens, words))
        labels, lse = torch.empty(tokens, dtype=torch.int64, device="meta"), torch.empty(tokens, device="meta")
        with LiveBytes() as live:
            _, dw = module.gradients(x, w, labels, lse, lse[0])
        assert live.peak - dw.nbytes == pytest.approx(loss_bytes(tokens, dim, words, 2), rel=0.02)
