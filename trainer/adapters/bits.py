"""How many bits each matrix gets, under a budget for all: LQ-LoRA's integer programme (Guo et al., section 3.3).

    minimise  sum c_ij x_ij        where  sum_j x_ij = 1,   sum b_ij x_ij <= B,   x_ij in {0, 1}

Matrix i in form j has b_ij bits, and c_ij is the square of the error that is left of it.
"""

from collections.abc import Iterable
from functools import partial

import numpy as np
import torch
from torch import Tensor

from rowwise.kernels.coded_rows import RowForm

# The authors' grid has 432 forms: tops of 32 bits, and scales of 2 and 3, beside these.
FORMS = tuple(
    RowForm(bits, block, scales="whole", scale_bits=scale_bits, group=256, top="bf16")
    for bits in (2, 3, 4, 8)
    for scale_bits in (4, 8)
    for block in (16, 32, 64)
)


def name_of(form: RowForm) -> str:
    """Names a form of `FORMS`: bits of a number/numbers of a block/bits of a scale."""
    return f"{form.bits}/{form.block}/{form.scale_bits}"


NAMED = {name_of(form): form for form in FORMS}


def even(shape: torch.Size, bits: float) -> RowForm:
    """Returns the form of most bits that a matrix may have where each has at most so many a number; of the fewest, where none has."""
    return spread([shape], bits)[0]


def spread(shapes: Iterable[torch.Size], bits: float) -> list[RowForm]:
    """Returns forms of matrices that together take no more than so many bits a number, and hardly fewer: each the largest that
    those before leave room for, of the fewest where they leave none."""
    found, left = list[RowForm](), 0.0
    for shape in shapes:
        left += bits * shape.numel()
        allowed = [form for form in FORMS if bits_of(shape, form) <= left]
        found.append(max(allowed, key=partial(bits_of, shape)) if allowed else min(FORMS, key=partial(bits_of, shape)))
        left -= bits_of(shape, found[-1])
    return found


def bits_of(shape: torch.Size, form: RowForm) -> int:
    """Counts the bits of a matrix (rows, columns) in a form."""
    return shape[0] * form.row_bytes(shape[1]) * 8


def choose(costs: Tensor, bits: Tensor, budget: float) -> list[int]:
    """Chooses a form (a column) for each matrix (a row) of `costs` and `bits`, so that all their bits are at most `budget` and the sum
    of costs is least. Raises ValueError where the least that there is takes more."""
    from scipy.optimize import Bounds, LinearConstraint, milp  # nothing else needs it, and it takes a tenth of a second

    least = bits.amin(1).sum().item()
    if least > budget:
        raise ValueError(f"the forms of fewest bits take {least:,.0f} bits, and there are {budget:,.0f}; give more")
    count, forms = costs.shape
    # Of one size, so that the solver's tolerances are of the answer's.
    c = (costs.double() / costs.double().norm().clamp_min(1e-300) * 1000).flatten().numpy()
    b = (bits.double() / budget).flatten().numpy()
    one_each = np.repeat(np.eye(count), forms, axis=1)
    found = milp(
        c,
        constraints=[LinearConstraint(b[None], 0, 1), LinearConstraint(one_each, 1, 1)],
        integrality=np.ones_like(c),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": 0},
    )
    assert found.x is not None, found.message
    chosen = found.x.reshape(count, forms).argmax(1).tolist()
    assert sum(bits[i, j].item() for i, j in enumerate(chosen)) <= budget * (1 + 1e-6)
    return chosen
