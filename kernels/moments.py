"""Steps of optimizers that keep their moments as 8-bit codes: everything about them but the rule.

A step dequantises the moments, lets the rule change parameters and moments, and quantises the moments again, a
portion of rows at a time, so that no more than a portion ever exists in float32. bfloat16 parameters are computed in
float32 and rounded stochastically; float64 parameters (for proofs) are computed in float64.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rowwise.kernels import torch_lists
from rowwise.kernels.blockwise import BLOCK, blocks_per_row, decode, encode_
from rowwise.kernels.moment_pair import Moment, decode_pair, encode_pair_
from rowwise.kernels.portions import shared_portions
from rowwise.kernels.rounding import Rounding, round_reference_
from rowwise.kernels.wide import wide_dtype

Rule = Callable[..., None]  # rule(params, grads, moments, ...): lists of (rows, n) of one dtype, changed in place


@dataclass(frozen=True)
class Codec:
    """How the moments of a rule are read from their codes, and rounded into them: a portion of rows of all of them at
    once. `encode_` uses the numbers up."""

    decode: Callable[[Sequence[Moment], torch.dtype], Sequence[Tensor]]
    encode_: Callable[[Sequence[Tensor], Sequence[Moment]], None]


def _decode_one(states: Sequence[Moment], dtype: torch.dtype) -> list[Tensor]:
    (state,) = states
    return [decode(*state, True, dtype)]


def _encode_one_(numbers: Sequence[Tensor], states: Sequence[Moment]) -> None:
    (x,), (state,) = numbers, states
    encode_(x, *state, True)


ONE = Codec(_decode_one, _encode_one_)  # a signed moment
PAIR = Codec(decode_pair, encode_pair_)  # a signed one and its second moment


def check_step(
    params: Sequence[Tensor], grads: Sequence[Tensor], moments: Sequence[Sequence[Moment]], rounding: Rounding
) -> None:
    """Asserts that the operands of a step belong together."""
    if params:
        dtypes = {p.dtype for p in params}
        assert len(dtypes) == 1 and dtypes <= {torch.float32, torch.float64, torch.bfloat16}, dtypes
        assert (rounding is not None) == (params[0].dtype == torch.bfloat16), "rounding is for bfloat16, which needs it"
    for p, g in zip(params, grads, strict=True):
        assert p.dim() == 2 and p.shape == g.shape and p.is_contiguous() and g.is_contiguous()
        assert g.dtype in (p.dtype, torch.float32)
    for moment in moments:
        for p, (codes, absmax) in zip(params, moment, strict=True):
            assert codes.shape == p.shape and absmax.shape == (p.size(0), blocks_per_row(p.size(1)))


def step_reference_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    moments: Sequence[Sequence[Moment]],
    codec: Codec,
    rounding: Rounding,
    rule: Rule,
) -> None:
    """Takes one step of `rule` on lists of local tensors (m_i, n_i), in place. moments[j][i] is moment j of parameter i."""
    moments = [[_folded(*state) for state in moment] for moment in moments]
    params, grads = [_fold(p) for p in params], [_fold(g) for g in grads]
    for portion in shared_portions(params):
        rows = [params[i][part] for i, part in portion]
        dtype = wide_dtype(rows[0].dtype)
        x, g = [p.to(dtype) for p in rows], [grads[i][part].to(dtype) for i, part in portion]
        parts = [[(moment[i][0][part], moment[i][1][part]) for i, part in portion] for moment in moments]
        states = [_joined(pieces) for pieces in parts]
        numbers = codec.decode(states, dtype)
        heights = [p.size(0) for p in rows]
        rule(x, g, *(number.split(heights) for number in numbers))
        codec.encode_(numbers, states)
        for pieces, state in zip(parts, states, strict=True):
            _part_(state, pieces)
        if rounding:
            for (i, part), new, out in zip(portion, x, rows, strict=True):
                key, start = rounding[i]
                round_reference_(new, out, key, start + part.start * out.size(1))


def _fold(x: Tensor) -> Tensor:
    """Rows of whole blocks as rows of one block: tensors of many widths can then share a portion."""
    return x.view(-1, BLOCK) if x.size(1) % BLOCK == 0 else x


def _folded(codes: Tensor, absmax: Tensor) -> Moment:
    return _fold(codes), absmax.view(-1, 1) if codes.size(1) % BLOCK == 0 else absmax


def _joined(parts: Sequence[Moment]) -> Moment:
    """The codes of several parts of one width, one below the other; of one part, that part itself."""
    if len(parts) == 1:
        return parts[0]
    codes, absmax = zip(*parts, strict=True)
    return torch.cat(codes), torch.cat(absmax)


def _part_(joined: Moment, parts: Sequence[Moment]) -> None:
    """Puts codes that `_joined` gave back into the parts."""
    if len(parts) == 1:
        return
    heights = [codes.size(0) for codes, _ in parts]
    for whole, some in zip(joined, zip(*parts, strict=True), strict=True):
        torch_lists.copy_(list(some), list(whole.split(heights)))
