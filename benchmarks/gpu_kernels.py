"""Every Triton kernel on the device against its reference on the CPU, and how fast they are.

In a rehearsal Triton interprets them on the CPU (TRITON_INTERPRET=1), at small shapes.
"""

import itertools
import time
from typing import Any

import torch
from gpu_place import Place
from torch import Tensor

from rowwise.kernels.adamw8bit import adamw8bit_reference_
from rowwise.kernels.adamw8bit_triton import adamw8bit_triton_
from rowwise.kernels.blockwise import dequantise_reference_, quantise, quantise_reference_
from rowwise.kernels.blockwise_triton import dequantise_triton_, quantise_triton_
from rowwise.kernels.coded_rows import RowForm, encode_rows
from rowwise.kernels.coded_rows import decode_reference_ as decode_coded_reference_
from rowwise.kernels.coded_rows_triton import decode_triton_ as decode_coded_triton_
from rowwise.kernels.dct import column_squares_reference, dct_columns_reference
from rowwise.kernels.dct_triton import column_squares_triton, dct_columns_triton
from rowwise.kernels.glu import gate_gradients_reference, gated_reference
from rowwise.kernels.glu_triton import gate_gradients_triton, gated_triton
from rowwise.kernels.lion8bit import lion8bit_reference_
from rowwise.kernels.lion8bit_triton import lion8bit_triton_
from rowwise.kernels.philox import normal_reference, stream_key
from rowwise.kernels.philox_triton import normal_triton
from rowwise.kernels.rms_norm import norm_gradients_reference, normed_reference
from rowwise.kernels.rms_norm_triton import norm_gradients_triton, normed_triton
from rowwise.kernels.rounding import round_reference_
from rowwise.kernels.rounding_triton import round_triton_
from rowwise.kernels.row_codes import Draws, blocks_of, code_bytes, encode_reference_
from rowwise.kernels.row_codes import decode_reference_ as decode_rows_reference_
from rowwise.kernels.row_codes_triton import decode_triton_ as decode_rows_triton_
from rowwise.kernels.row_codes_triton import encode_triton_
from rowwise.kernels.row_scale import scale_rows_reference
from rowwise.kernels.row_scale_triton import scale_rows_triton

CPU = torch.device("cpu")


def shapes(place: Place) -> list[tuple[int, int]]:
    """Of matrices: nothing to share out, rows that end in the middle of a block, and real ones."""
    small = [(1, 1), (3, 255), (5, 1000)]
    return small if place.rehearsal else [*small, (70, 768), (1024, 5461), (4096, 4096)]


def many(place: Place, count: int) -> int:
    """How many numbers of a stream."""
    return min(count, 1 << 12) if place.rehearsal else count


def check_philox(place: Place) -> dict[str, Any]:
    """Words are the same; Box-Muller differs by the device's log, cos and sin."""
    worst = 0.0
    for start, count in [(0, 1), (3, 5), (1, 4097), (2**34 + 1, 1 << 20)]:
        key = stream_key(7, "w")
        ours = normal_triton(key, start, many(place, count), place.device).cpu()
        worst = max(worst, float((ours - normal_reference(key, start, many(place, count), CPU)).abs().max()))
    return {"largest_difference": worst, "passed": worst < 1e-4}


def check_blockwise(place: Place) -> dict[str, Any]:
    """Codes, maxima and the numbers behind them: the same bits."""
    apart = 0
    for shape, dtype, signed in itertools.product(shapes(place), (torch.float32, torch.bfloat16), (True, False)):
        x = torch.randn(shape).mul_(0.01)
        x = (x if signed else x.square()).to(dtype)
        reference, ours = quantise(x, signed), moved(quantise(torch.zeros(shape), signed), place.device)
        quantise_reference_(x, *reference, signed)
        quantise_triton_(x.to(place.device), *ours, signed)
        numbers, our_numbers = torch.empty(shape), torch.empty(shape, device=place.device)
        dequantise_reference_(*reference, signed, numbers)
        dequantise_triton_(*ours, signed, our_numbers)
        pairs = zip((*reference, numbers), (*ours, our_numbers), strict=True)
        apart += sum(int((a != b.cpu()).sum()) for a, b in pairs)
    return {"numbers_apart": apart, "passed": apart == 0}


def check_adamw8bit(place: Place) -> dict[str, Any]:
    """One step of 8-bit AdamW."""
    return check_step(place, adamw8bit_triton_, adamw8bit_reference_, (True, False), (5, 1e-2, 0.9, 0.95, 1e-8, 0.1))


def check_lion8bit(place: Place) -> dict[str, Any]:
    """One step of 8-bit Lion."""
    return check_step(place, lion8bit_triton_, lion8bit_reference_, (True,), (1e-2, 0.9, 0.99, 0.1))


def check_step(place: Place, triton_, reference_, signed: tuple[bool, ...], hyper: tuple) -> dict[str, Any]:
    """One step on moments of some age. The order of the arithmetic differs in the last place, so a number in ten
    thousand may have a code beside the other's, and one in a thousand be rounded to the bfloat16 beside it."""
    largest = {"codes": 0, "codes_share": 0.0, "float32": 0.0, "bfloat16_share": 0.0}
    for shape, dtype in itertools.product(shapes(place), (torch.float32, torch.bfloat16)):
        p, g = torch.randn(shape).to(dtype), torch.randn(shape).mul_(0.1).to(dtype)
        states = [quantise(torch.randn(shape).mul_(0.03) if s else torch.rand(shape) * 1e-2, s) for s in signed]
        rounding = [(2**63 + 7, 9)] if dtype == torch.bfloat16 else None
        ours = moved((p, g, states), place.device)
        triton_([ours[0]], [ours[1]], *([state] for state in ours[2]), *hyper, rounding)
        reference_([p], [g], *([state] for state in states), *hyper, rounding)
        for ours_, state in zip(ours[2], states, strict=True):
            apart = (ours_[0].cpu().int() - state[0].int()).abs()
            largest["codes"] = max(largest["codes"], int(apart.max()))
            largest["codes_share"] = max(largest["codes_share"], (int(apart.sum()) - 1) / p.numel())
        beside = ours[0].cpu()
        if dtype == torch.float32:  # where Lion's direction is 0 to the last place, its sign may differ
            off = (beside - p).abs().flatten()
            largest["float32"] = max(largest["float32"], float(off.kthvalue(max(1, int(0.99999 * p.numel()))).values))
        else:
            largest["bfloat16_share"] = max(largest["bfloat16_share"], (int((beside != p).sum()) - 1) / p.numel())
    close = largest["codes_share"] <= 1e-4 and largest["float32"] <= 1e-5 and largest["bfloat16_share"] <= 1e-3
    return {**largest, "passed": close and largest["codes"] <= 1}


def check_rounding(place: Place) -> dict[str, Any]:
    """The same bits from any start, of every kind of number."""
    apart, special = 0, torch.tensor([0.0, -0.0, 1e-40, 3.4e38, -3.4e38, torch.inf, -torch.inf])
    for start, count in [(0, 7), (3, 5), (1, 4097), (2**34 + 1, 1 << 22)]:
        count = many(place, count)
        x = torch.randn(count)
        x[: min(count, 7)] = special[: min(count, 7)]
        reference, ours = (torch.empty(count, dtype=torch.bfloat16, device=device) for device in (CPU, place.device))
        round_reference_(x, reference, 7, start)
        round_triton_(x.to(place.device), ours, 7, start)
        apart += int((reference.view(torch.int16) != ours.cpu().view(torch.int16)).sum())
    return {"numbers_apart": apart, "passed": apart == 0}


def check_row_codes(place: Place) -> dict[str, Any]:
    """Codes of rows on their way to other ranks, their scales and what comes of them: the same bits, to nearest and at random."""
    apart = 0
    for (m, n), bits, draws in itertools.product(shapes(place), (8, 4), (None, Draws(stream_key(7, "w"), 5))):
        x = torch.randn(2, m, n)
        right, ours = (
            (
                torch.empty(2, m, code_bytes(n, bits), dtype=torch.uint8, device=device),
                torch.empty(2, m, blocks_of(n), device=device),
                torch.empty(2, m, n, dtype=torch.bfloat16, device=device),
            )
            for device in (CPU, place.device)
        )
        encode_reference_(x, *right[:2], bits, draws)
        encode_triton_(x.to(place.device), *ours[:2], bits, draws)
        decode_rows_reference_(*right, bits)
        decode_rows_triton_(*ours, bits)
        apart += sum(int((a != b.cpu()).sum()) for a, b in zip(right, ours, strict=True))
    return {"numbers_apart": apart, "passed": apart == 0}


def check_coded_rows(place: Place) -> dict[str, Any]:
    """Numbers behind the codes of weights that are frozen, of every width and kind of scale: the same bits."""
    whole = RowForm(2, 64, scales="whole", top="bf16")
    apart = 0
    for (m, n), form in itertools.product(
        shapes(place), [RowForm(8, 64, "linear"), RowForm(4, 64), RowForm(3, 64), whole]
    ):
        packed = encode_rows(torch.randn(m, n), form)
        right, ours = (torch.empty(m, n, dtype=torch.bfloat16, device=device) for device in (CPU, place.device))
        decode_coded_reference_(packed, right, form)
        decode_coded_triton_(packed.to(place.device), ours, form)
        apart += int((right != ours.cpu()).sum())
    return {"numbers_apart": apart, "passed": apart == 0}


def check_row_scale(place: Place) -> dict[str, Any]:
    """Rows and the sum of their squares; a row of zeros stays one."""
    worst = 0.0
    for (m, n), dtype in itertools.product(shapes(place), (torch.float32, torch.bfloat16)):
        low_rank = torch.randn(2, m, max(1, n // 4))
        low_rank[1, 0] = 0
        x = torch.randn(m, n).to(dtype)
        ours = scale_rows_triton(*moved((*low_rank, x), place.device))
        worst = max(worst, *map(relative, ours, scale_rows_reference(*low_rank, x)))
    return {"largest_relative_difference": worst, "passed": worst < 1e-5}


def check_elementwise(place: Place) -> dict[str, Any]:
    """The RMS norm and SwiGLU, forward and backward; in bf16 to a last place."""
    worst = {}
    for dtype, bits in ((torch.float32, 2.0**-18), (torch.bfloat16, 2.0**-7)):
        apart = 0.0
        for m, n in shapes(place):
            x, other, dy, w = (torch.randn(*size).to(dtype) for size in ((m, n), (m, n), (m, n), (n,)))
            here = moved((x, other, dy, w), place.device)
            y, r = normed_reference(x, w, 1e-5)
            ours = [*normed_triton(here[0], here[3], 1e-5), *norm_gradients_triton(here[2], here[0], here[3], r.to(place.device)),
                    gated_triton(*here[:2]), *gate_gradients_triton(here[2], *here[:2])]  # fmt: skip
            right = [y, r, *norm_gradients_reference(dy, x, w, r), gated_reference(x, other),
                     *gate_gradients_reference(dy, x, other)]  # fmt: skip
            apart = max(apart, *(relative(a, b) for a, b in zip(ours, right, strict=True)))
        worst[str(dtype).removeprefix("torch.")] = apart / bits
    return {"largest_difference_over_what_may_be": worst, "passed": max(worst.values()) <= 1}


def check_dct(place: Place) -> dict[str, Any]:
    """Columns of the matrix, and the squares that columns are ranked by."""
    columns = squares = 0.0
    for m, n in shapes(place):
        k, g = torch.randperm(n)[: max(1, n // 4)], torch.randn(m, n)
        ours = dct_columns_triton(n, k.to(place.device), torch.float32, place.device)
        columns = max(columns, relative(ours, dct_columns_reference(n, k, torch.float32, CPU)))
        squares = max(squares, relative(column_squares_triton(g.to(place.device)), column_squares_reference(g)))
    passed = columns < 1e-6 and squares < 1e-4
    return {"columns_largest_difference": columns, "squares_largest_difference": squares, "passed": passed}


def relative(ours: Tensor, reference: Tensor) -> float:
    """The largest difference, in units of the largest entry."""
    return float((ours.cpu() - reference).abs().max() / reference.abs().max().clamp_min(1e-30))


def moved(tree: Any, device: torch.device) -> Any:
    """Copies of the tensors of nested lists and tuples."""
    return tree.to(device, copy=True) if isinstance(tree, Tensor) else type(tree)(moved(item, device) for item in tree)


def time_philox(place: Place) -> dict[str, Any]:
    """Gigabytes of float32 normals a second: the Triton kernel, and torch's own generator for comparison."""
    count, results = many(place, 1 << 28), {}
    for name, draw in (
        ("philox_triton", lambda: normal_triton(1, 0, count, place.device)),
        ("torch_randn", lambda: torch.randn(count, device=place.device)),
    ):
        draw()
        place.wait()
        started = time.perf_counter()
        for _ in range(10):
            draw()
        place.wait()
        results[f"{name}_gigabytes_per_second"] = 10 * count * 4 / (time.perf_counter() - started) / 1e9
    return {"passed": True, **results}
