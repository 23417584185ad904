"""What computes in the place of dense weights: pure functions of whole rows. Nothing crosses ranks; at least float32.

    st3         w' = c mask sign(w) max(|w| - l, 0)      dL/dw = dL/dw'    (Vanderschueren & De Vleeschouwer, *Are Straight-
                c = 1.01 / (r + 0.01) for each row, r the share of its     Through Gradients and Soft-Thresholding All You
                |w| that the mask has; 1 with `rescale=false`              Need for Sparse Training?*)

    pdp         w' = z w,  z = 1 / (1 + exp((t^2 - w^2) / tau))            (Cho et al., *PDP: Parameter-free Differentiable
                dL/dw = dL/dw' (z + 2 w^2 z (1 - z) / tau)                 Pruning is All You Need*)
    pdp_nm      the same with a t for each group of m neighbours: halfway between its n-th and its next largest |w|
    pdp_rows    w' = z w of a row w, z the same function of its norm |w|_2
                dL/dw = z dL/dw' + 2 z (1 - z) / tau (w . dL/dw') w

t is a number to the gradient.
"""

import torch
from torch import Tensor

from rowwise.kernels.wide import wide

STEADY, TINY = 0.01, 1e-6  # as the authors' code has them


def soft_threshold(w: Tensor, threshold: float, mask: Tensor, rescale: bool) -> Tensor:
    """Computes c mask sign(w) max(|w| - l, 0) of rows w (r, n); c = 1 without `rescale`."""
    wide_w = wide(w)
    soft = (wide_w.sign() * (wide_w.abs() - threshold).clamp_min(0)).masked_fill(~mask, 0)
    if not rescale:
        return soft
    kept, whole = ((wide_w.abs() * part).mean(1, keepdim=True) + TINY for part in (mask, 1))
    return soft * ((1 + STEADY) / (kept / whole + STEADY))


def soft_mask(w: Tensor, threshold: float | Tensor, temperature: float) -> Tensor:
    """Computes z of every weight; `threshold`: of all of them, or (r, n) one each."""
    return torch.sigmoid((wide(w).square() - threshold**2) / temperature)


def soft_mask_slope(w: Tensor, threshold: float | Tensor, temperature: float) -> Tensor:
    """Computes d(z w) / dw = z + 2 w^2 z (1 - z) / tau."""
    z = soft_mask(w, threshold, temperature)
    return z + 2 * wide(w).square() * z * (1 - z) / temperature


def group_thresholds(w: Tensor, n: int, m: int) -> Tensor:
    """Computes t of every weight's group (r, columns), for 1 <= n < m and whole groups along the rows of w (r, columns)."""
    groups = wide(w).abs().view(w.size(0), -1, m)
    edges = groups.sort(dim=2, descending=True).values[:, :, n - 1 : n + 1]
    return edges.mean(2, keepdim=True).expand_as(groups).reshape(w.shape)


def row_norms(w: Tensor) -> Tensor:
    """Computes |w|_2 of every row (r, 1), in float64: the order of its sum must not show in who is kept."""
    return w.double().square().sum(1, keepdim=True).sqrt()


def soft_row_mask(w: Tensor, threshold: float, temperature: float) -> Tensor:
    """Computes z of every row (r, 1)."""
    return soft_mask(row_norms(w), threshold, temperature).to(wide(w).dtype)


def through_row_mask(gradient: Tensor, w: Tensor, threshold: float, temperature: float) -> Tensor:
    """Computes dL/dw of rows w (r, n), of the gradient of z w."""
    z, wide_w, g = soft_row_mask(w, threshold, temperature), wide(w), wide(gradient)
    return z * g + 2 * z * (1 - z) / temperature * (wide_w * g).sum(1, keepdim=True) * wide_w
