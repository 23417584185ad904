"""One block of attention, by the fastest operator of the device that gives the log-sum-exp too.

| device | dtype | operator |
|---|---|---|
| CPU | float64, float32, bfloat16, float16 | torch's FlashAttention for CPUs |
| CUDA from sm_80 on | bfloat16, float16, heads of up to 256 | FlashAttention-2 |
| CUDA | float32, float16, and bfloat16 from sm_80 on | memory-efficient attention (Rabe & Staats) |
| CUDA | capped scores of those dtypes, heads of up to 256 | our own (`kernels.attention_triton`), which takes many areas |
| any | any other, float64 above all | plain torch, whole scores of a block |

Shapes: queries (B, S, H, E), keys and values (B, T, K, E), lse (B, H, S); H is a multiple of K. `causal`: as many keys as
queries, and the n-th query sees the first n. `form`: the scale and the cap of scores (`kernels.logit_form`).
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from rowwise.kernels import torch_attention
from rowwise.kernels.dispatch import use_triton
from rowwise.kernels.logit_form import AS_THEY_ARE, LogitForm
from rowwise.kernels.wide import wide_dtype


class Attended(NamedTuple):
    """Queries, keys and values, and what came of it. `out` and `lse` may be over more keys than these: with those of all keys
    that the queries see, gradients are a sum over blocks."""

    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    lse: Tensor


Gradients = tuple[Tensor, Tensor, Tensor]  # of q, k and v

LARGEST_HEAD = 256  # of FlashAttention-2, and of our own kernel


def block_forward(q: Tensor, k: Tensor, v: Tensor, causal: bool, form: LogitForm) -> tuple[Tensor, Tensor]:
    """Computes out in the dtype of `q`, and lse in float32, or float64 for float64."""
    operator = operator_of(q, form)
    if operator in ("plain", "capped"):  # our own takes packed areas alone
        return plain_forward(q, k, v, causal, form)
    size, scale = q.size(-1), form.scale
    q, k, v = (_heads_first(t, operator) for t in (q, k, v))
    if operator == "cpu":
        out, lse = torch_attention.cpu_forward(q, k, v, 0.0, causal, scale=scale)
    elif operator == "flash":
        out, lse, *_ = torch_attention.flash_forward(q, k, v, 0.0, causal, False, scale=scale)
    else:
        k, v = (repeat_heads(t, q.size(1)) for t in (k, v))
        out, lse, *_ = torch_attention.efficient_forward(q, k, v, None, True, 0.0, causal, scale=scale)
    # Some operators pad the queries of lse.
    return out.transpose(1, 2)[..., :size], lse[..., : q.size(2)]


def block_backward(d_out: Tensor, attended: Attended, causal: bool, form: LogitForm) -> Gradients:
    """Returns what this block of keys gives of the gradients."""
    q, k, v, out, lse = attended
    operator = operator_of(q, form)
    if operator in ("plain", "capped"):  # our own takes packed areas alone
        return plain_backward(d_out, attended, causal, form)
    size, groups, scale = q.size(-1), k.size(2), form.scale
    d_out, q, k, v, out = (_heads_first(t, operator) for t in (d_out, q, k, v, out))
    if operator == "cpu":
        gradients = torch_attention.cpu_backward(d_out, q, k, v, out, lse, 0.0, causal, scale=scale)
    else:
        # Of dropout, which there is none of.
        seed, offset = (torch.zeros((), dtype=torch.int64, device=q.device) for _ in range(2))
        if operator == "flash":
            gradients = torch_attention.flash_backward(
                d_out, q, k, v, out, lse, None, None, q.size(2), k.size(2), 0.0, causal, seed, offset, scale=scale
            )
        else:
            k, v = (repeat_heads(t, q.size(1)) for t in (k, v))
            asked = [True, True, True, False]
            lse = F.pad(lse, (0, -lse.size(2) % 32), value=torch.inf)  # its kernel reads 32 queries at a time
            d_q, d_k, d_v, _ = torch_attention.efficient_backward(
                d_out, q, k, v, None, out, lse, seed, offset, 0.0, asked, causal, scale=scale
            )
            gradients = d_q, _summed(d_k, groups, dim=1), _summed(d_v, groups, dim=1)
    d_q, d_k, d_v = (gradient.transpose(1, 2)[..., :size] for gradient in gradients)
    return d_q, d_k, d_v


def plain_forward(q: Tensor, k: Tensor, v: Tensor, causal: bool, form: LogitForm) -> tuple[Tensor, Tensor]:
    """Computes `block_forward` in plain torch: the reference."""
    scores = form.of(_products(q, k))
    if causal:
        scores = scores.masked_fill(_later(scores), -torch.inf)
    lse = scores.logsumexp(-1)
    weights = (scores - lse.unsqueeze(-1)).exp()
    out = torch.einsum("bhst,bthe->bshe", weights, repeat_heads(v, q.size(2), dim=2).to(weights.dtype))
    return out.to(q.dtype), lse


def plain_backward(d_out: Tensor, attended: Attended, causal: bool, form: LogitForm) -> Gradients:
    """Computes `block_backward` in plain torch: the reference.

    P = exp(S - lse),  dV = P^T dO,  dS = P (dO V^T - rowsum(dO out)),  dQ = t dS K,  dK = t dS^T Q,  t: the slope of S.
    """
    q, k, v, out, lse = attended
    heads, groups, wide = q.size(2), k.size(2), lse.dtype
    scores = form.formed_(_products(q, k))
    slope = form.slope(scores)
    weights = scores.sub_(lse.unsqueeze(-1)).exp_()
    if causal:
        weights.masked_fill_(_later(weights), 0.0)
    d_out, out, q_wide, k_wide, v_wide = (repeat_heads(t, heads, dim=2).to(wide) for t in (d_out, out, q, k, v))
    d_v = torch.einsum("bhst,bshe->bthe", weights, d_out)
    d_weights = torch.einsum("bshe,bthe->bhst", d_out, v_wide)
    d_scores = d_weights.sub_((d_out * out).sum(-1).transpose(1, 2).unsqueeze(-1)).mul_(weights).mul_(slope)
    d_q = torch.einsum("bhst,bthe->bshe", d_scores, k_wide)
    d_k = torch.einsum("bhst,bshe->bthe", d_scores, q_wide)
    return d_q.to(q.dtype), _summed(d_k, groups, dim=2).to(q.dtype), _summed(d_v, groups, dim=2).to(q.dtype)


def operator_of(q: Tensor, form: LogitForm = AS_THEY_ARE) -> str:
    """Says which operator takes queries like `q`, by the table above: cpu, flash, efficient, capped or plain."""
    if form.cap is not None:
        return "capped" if kernel_caps(q.dtype, q.size(-1)) and use_triton(q.device) else "plain"
    if q.device.type == "cpu":
        return "cpu"
    if q.device.type != "cuda" or q.dtype == torch.float64:
        return "plain"
    ampere = torch.cuda.get_device_capability(q.device) >= (8, 0)
    if ampere and q.dtype != torch.float32 and q.size(-1) <= LARGEST_HEAD:
        return "flash"
    return "efficient" if ampere or q.dtype != torch.bfloat16 else "plain"


def kernel_caps(dtype: torch.dtype, head_size: int) -> bool:
    """Says whether our own kernel takes capped scores of such heads, where there is one."""
    return dtype != torch.float64 and head_size <= LARGEST_HEAD


def _heads_first(t_BSHE: Tensor, operator: str) -> Tensor:
    """Gives (B, H, S, E), with heads of a size that the operator takes: zeros behind change no score."""
    pad = 0 if operator == "cpu" else -t_BSHE.size(-1) % 8
    if pad:
        t_BSHE = F.pad(t_BSHE, (0, pad))
    elif t_BSHE.stride(-1) != 1:  # the operators read a head's numbers as if they lay side by side
        t_BSHE = t_BSHE.contiguous()
    return t_BSHE.transpose(1, 2)


def _products(q: Tensor, k: Tensor) -> Tensor:
    wide = wide_dtype(q.dtype)
    return torch.einsum("bshe,bthe->bhst", q.to(wide), repeat_heads(k, q.size(2), dim=2).to(wide))


def _later(scores_BHST: Tensor) -> Tensor:
    """The keys that the n-th query does not see, which are behind the n-th."""
    return torch.ones(scores_BHST.shape[2:], dtype=torch.bool, device=scores_BHST.device).triu(1)


def repeat_heads(t: Tensor, heads: int, dim: int = 1) -> Tensor:
    """Repeats key heads, each as often as query heads look at it."""
    return t if t.size(dim) == heads else t.repeat_interleave(heads // t.size(dim), dim)


def _summed(t: Tensor, groups: int, dim: int) -> Tensor:
    return t if t.size(dim) == groups else t.unflatten(dim, (groups, -1)).sum(dim + 1)
