"""The cross entropy of a linear head whose logits (N, V) never exist: N tokens, D the model dim, V words of a vocabulary.

    z = x w^T        lse_i = log sum over v of exp(z_iv)        loss_i = lse_i - z_i,label, and 0 where there is no label
    dz = g (exp(z - lse) - [v = label])        dx = dz w        dw = dz^T x        g: what the loss is multiplied by

Logits may be scaled and capped after the product (`kernels.logit_form`), and dz has their slope beside g. z is made in tiles, its
product rounded to the dtype of x as the whole one would be; all else is at least float32. There are two orders of the tiles, with the
same numbers but for the order of sums:

- later (Wijmans et al., *Cut Your Losses in Large-Vocabulary Language Models*): the forward leaves lse alone, and the backward
  makes each tile again. It goes through the vocabulary: a word's row of dw is complete with its tile and rounded once, and dx is
  added up in float32. Four products of 2 N D V operations. (Their kernel leaves out gradients that 16 bits would round away; here
  none is left out.)
- at once (Hsu et al., *Liger Kernel*), where the forward is told g: it goes through the tokens, and makes a tile's gradients
  before the next. Three products, but dw is a sum over tiles, so that in 16 bits it would take 4 V D bytes more, and the time to
  read and write them for each tile; it is for 32 and 64 bits.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from rowwise.kernels.dispatch import use_triton
from rowwise.kernels.logit_form import AS_THEY_ARE, LogitForm
from rowwise.kernels.portions import row_portions
from rowwise.kernels.products import add_product_
from rowwise.kernels.wide import wide, wide_dtype


class Tiles(NamedTuple):
    """How large a tile is: `elements` of logits; `most`: tokens of one of some words; `least`: tokens of one of all words."""

    elements: int
    most: int
    least: int


# On a CPU a tile stays in the cache and is worth the call of a product; on a GPU it fills the device.
TILES = {"cpu": Tiles(1 << 20, 2048, 128), "cuda": Tiles(1 << 23, 8192, 256)}


class Loss(NamedTuple):
    """`total`: the sum over tokens, at least float32; `tokens`: how many have a label; `each` (N,): the loss of each, which
    gives no gradient."""

    total: Tensor
    tokens: Tensor
    each: Tensor


def linear_cross_entropy(
    x_ND: Tensor, w_VD: Tensor, labels_N: Tensor, scale: float | Tensor | None = None, form: LogitForm = AS_THEY_ARE
) -> Loss:
    """Computes the cross entropy of the logits that `form` makes of x w^T, without them. A negative label is none.

    `scale`: what the backward will multiply the loss by, where that is known, and not 0. It is for speed: gradients are right
    whatever the loss is multiplied by then. A label of V or above makes the loss NaN, or is an error of torch's. Bytes:
    `loss_bytes`. Communicates nothing.
    """
    learns = [t.requires_grad and torch.is_grad_enabled() for t in (x_ND, w_VD)]
    if not any(learns):
        each_N = _losses(*sum_and_label(x_ND, w_VD, labels_N, form), labels_N)
        return Loss(each_N.sum(), (labels_N >= 0).sum(), each_N)
    order = _AtOnce if scale is not None and x_ND.itemsize >= 4 and all(learns) else _Later
    total, each_N = order.apply(x_ND, w_VD, labels_N, scale, form)
    return Loss(total, (labels_N >= 0).sum(), each_N)


def cross_entropy(p_NV: Tensor, labels_N: Tensor, form: LogitForm = AS_THEY_ARE) -> Loss:
    """Computes the cross entropy of the logits that `form` makes of whole products: the plain form."""
    each_N = F.cross_entropy(form.of(wide(p_NV)), labels_N, reduction="none")
    return Loss(each_N.sum(), (labels_N >= 0).sum(), each_N.detach())


def loss_bytes(
    tokens: int,
    dim: int,
    words: int,
    itemsize: int,
    at_once: bool = False,
    device: str = "cuda",
    capped: bool = False,
    learns: bool = True,
) -> int:
    """Counts what `linear_cross_entropy` holds at its height, beside its arguments and dw: dx, which of 16 bits is made of float32, a
    tile, and the float32 that the tile's rows of dw are made of, where w `learns`."""
    (elements, most, least), dx = TILES[device], tokens * dim * max(itemsize, 4)
    if at_once and itemsize >= 4:
        return dx + min(tokens, max(least, elements // words)) * words * itemsize * (1 + capped)
    rows = min(tokens, most)
    columns = min(words, max(1, elements // rows))
    tile = rows * columns * itemsize + columns * dim * max(itemsize, 4) * learns
    slopes = rows * columns * max(itemsize, 4) if capped and device != "cuda" else 0
    if itemsize >= 4:
        return dx + tile + slopes
    copies = 0 if device == "cuda" else 4 * rows * columns + 4 * dim * max(rows, columns)
    return dx + max(tile + copies, tokens * dim * itemsize)


def sums_bytes(tokens: int, words: int, itemsize: int, device: str = "cuda") -> int:
    """Counts what the losses alone take at their height: a tile of logits, of 16 bits beside the same in float32. A GPU's kernel adds
    them up as they come."""
    if device == "cuda":
        return 0
    elements, most, _ = TILES[device]
    rows = min(tokens, most)
    return rows * min(words, max(1, elements // rows)) * (itemsize + 4 * (itemsize < 4))


class _Later(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w: Tensor, labels: Tensor, scale: float | Tensor | None, form: LogitForm
    ) -> tuple[Tensor, Tensor]:
        lse, at_label = sum_and_label(x, w, labels, form)
        each = _losses(lse, at_label, labels)
        ctx.save_for_backward(x, w, labels, lse)
        ctx.form = form
        ctx.mark_non_differentiable(each)
        return each.sum(), each

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        x, w, labels, lse = ctx.saved_tensors
        return *gradients(x, w, labels, lse, g, ctx.needs_input_grad[:2], ctx.form), None, None, None


class _AtOnce(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w: Tensor, labels: Tensor, scale: float | Tensor, form: LogitForm
    ) -> tuple[Tensor, Tensor]:
        ctx.scale = scale.to(x.dtype) if isinstance(scale, Tensor) else scale
        each, dx, dw = gradients_at_once(x, w, labels, ctx.scale, form)
        ctx.save_for_backward(dx, dw)
        ctx.mark_non_differentiable(each)
        return each.sum(), each

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        dx, dw = ctx.saved_tensors
        factor = g / ctx.scale  # 1, but where the forward was told otherwise
        return dx.mul_(factor), dw.mul_(factor), None, None, None


def _losses(lse_N: Tensor, at_label_N: Tensor, labels_N: Tensor) -> Tensor:
    return torch.where(labels_N >= 0, lse_N - at_label_N, 0.0)


def sum_and_label(x_ND: Tensor, w_VD: Tensor, labels_N: Tensor, form: LogitForm = AS_THEY_ARE) -> tuple[Tensor, Tensor]:
    """Computes (lse, the logit of the label), both (N,) and at least float32. Where there is no label, lse is infinite, so that
    exp(z - lse) is 0; where there is no such word, NaN."""
    if x_ND.dtype != torch.float64 and use_triton(x_ND.device):
        from rowwise.kernels.cross_entropy_triton import sum_and_label_triton

        lse, at_label = sum_and_label_triton(x_ND, w_VD, labels_N, form)
    else:
        lse, at_label = sum_and_label_reference(x_ND, w_VD, labels_N, form)
    lse.masked_fill_(labels_N < 0, torch.inf).masked_fill_(labels_N >= w_VD.size(0), torch.nan)
    return lse, at_label


def sum_and_label_reference(
    x_ND: Tensor, w_VD: Tensor, labels_N: Tensor, form: LogitForm = AS_THEY_ARE
) -> tuple[Tensor, Tensor]:
    """Computes `sum_and_label` in plain torch."""
    rows, columns = _tiles(x_ND, w_VD)
    at_label = x_ND.new_zeros(x_ND.size(0), dtype=wide_dtype(x_ND.dtype))
    sums = at_label.new_empty(len(columns), x_ND.size(0))
    for tile, words in enumerate(columns):
        for part in rows:
            sums[tile, part], here = _of_tile(x_ND[part], w_VD[words], labels_N[part] - words.start, form)
            at_label[part] += here
    return sums.logsumexp(0), at_label


def _of_tile(x_RD: Tensor, w_CD: Tensor, labels_R: Tensor, form: LogitForm) -> tuple[Tensor, Tensor]:
    """(lse over the words of a tile, the logit of the label or 0)."""
    z = form.formed_(wide(x_RD @ w_CD.t()))
    place, inside = _places(labels_R, w_CD.size(0))
    at_label, top = z.gather(1, place).squeeze(1) * inside, z.amax(1, keepdim=True)
    return z.sub_(top).exp_().sum(1).log_().add_(top.squeeze(1)), at_label


def gradients(
    x_ND: Tensor,
    w_VD: Tensor,
    labels_N: Tensor,
    lse_N: Tensor,
    g: Tensor,
    wanted: tuple[bool, bool] = (True, True),
    form: LogitForm = AS_THEY_ARE,
) -> tuple[Tensor | None, Tensor | None]:
    """Computes (dx, dw) in the dtypes of x and w, as far as `wanted`: each tile of logits is made again."""
    dx = torch.zeros_like(x_ND, dtype=lse_N.dtype) if wanted[0] else None
    dw = torch.empty_like(w_VD) if wanted[1] else None
    rows, columns = _tiles(x_ND, w_VD)
    for words in columns:
        w = w_VD[words]
        of_words = torch.zeros_like(w, dtype=lse_N.dtype) if dw is not None else None
        for part in rows:
            dz = logit_gradient(x_ND[part], w, labels_N[part] - words.start, lse_N[part], g, form)
            if dx is not None:
                add_product_(dx[part], dz, w)
            if of_words is not None:
                add_product_(of_words, dz.t(), x_ND[part])
            del dz  # before the next is made
        if dw is not None and of_words is not None:
            dw[words] = of_words
        del of_words
    return None if dx is None else dx.to(x_ND.dtype), dw


def logit_gradient(
    x_RD: Tensor, w_CD: Tensor, labels_R: Tensor, lse_R: Tensor, g: Tensor, form: LogitForm = AS_THEY_ARE
) -> Tensor:
    """Makes dz (R, C) of a tile, in the dtype of x. Labels count from the first word of the tile; of a token that has none, lse
    is infinite."""
    if x_RD.dtype != torch.float64 and use_triton(x_RD.device):
        from rowwise.kernels.cross_entropy_triton import logit_gradient_triton

        return logit_gradient_triton(x_RD, w_CD, labels_R, lse_R, g, form)
    return logit_gradient_reference(x_RD, w_CD, labels_R, lse_R, g, form)


def logit_gradient_reference(
    x_RD: Tensor, w_CD: Tensor, labels_R: Tensor, lse_R: Tensor, g: Tensor, form: LogitForm = AS_THEY_ARE
) -> Tensor:
    """Computes `logit_gradient` in plain torch."""
    z = x_RD @ w_CD.t()
    p = form.formed_(z.to(lse_R.dtype))
    slope = form.slope(p)
    p.sub_(lse_R.unsqueeze(1)).exp_()
    place, inside = _places(labels_R, w_CD.size(0))
    p.scatter_add_(1, place, -inside.to(p.dtype).unsqueeze(1)).mul_(g)
    if form != AS_THEY_ARE:
        p.mul_(slope)
    return p if p.dtype == z.dtype else z.copy_(p)


def gradients_at_once(
    x_ND: Tensor, w_VD: Tensor, labels_N: Tensor, scale: float | Tensor, form: LogitForm = AS_THEY_ARE
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes (the loss of each token, dx, dw), a tile of tokens at a time."""
    (tokens, words), size = (x_ND.size(0), w_VD.size(0)), _size_on(x_ND.device)
    each, dx, dw = x_ND.new_empty(tokens), torch.empty_like(x_ND), torch.zeros_like(w_VD)
    for part in row_portions(tokens, 1, max(size.least, size.elements // words)):
        z = x_ND[part] @ w_VD.t()
        each[part] = to_gradient_(z, labels_N[part], scale, form)
        torch.mm(z, w_VD, out=dx[part])
        dw.addmm_(z.t(), x_ND[part])
        del z  # before the next is made
    return each, dx, dw


def to_gradient_(p_RV: Tensor, labels_R: Tensor, scale: float | Tensor, form: LogitForm = AS_THEY_ARE) -> Tensor:
    """Makes of products their gradient, in place; returns the loss of each token."""
    z_RV = form.formed_(p_RV)
    slope = form.slope(z_RV)
    labelled, place = labels_R >= 0, labels_R.clamp_min(0).unsqueeze(1)
    top, at_label = z_RV.amax(1, keepdim=True), z_RV.gather(1, place)
    total = z_RV.sub_(top).exp_().sum(1, keepdim=True)
    factor = labelled.to(z_RV.dtype).unsqueeze(1) * scale
    z_RV.mul_(factor / total).scatter_add_(1, place, -factor)
    if form != AS_THEY_ARE:
        z_RV.mul_(slope)
    return torch.where(labelled, (total.log() + top - at_label).squeeze(1), 0.0)


def _tiles(x_ND: Tensor, w_VD: Tensor) -> tuple[list[slice], list[slice]]:
    """The tokens and the words of the tiles."""
    size = _size_on(x_ND.device)
    rows = list(row_portions(x_ND.size(0), 1, size.most))
    return rows, list(row_portions(w_VD.size(0), min(x_ND.size(0), size.most), size.elements))


def _size_on(device: torch.device) -> Tiles:
    return TILES.get(device.type, TILES["cpu"])


def _places(labels_R: Tensor, words: int) -> tuple[Tensor, Tensor]:
    """(where in a tile of so many words the label of each token is (R, 1), whether it is there at all (R,))."""
    return labels_R.clamp(0, words - 1).unsqueeze(1), (labels_R >= 0) & (labels_R < words)
