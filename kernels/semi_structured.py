"""2:4 matrices on the tensor cores that skip their zeros, by torch's own compressed form (cuSPARSELt).

    y = x S^T + b        S (out, in): at most two of every four neighbours in a row are not 0

S is stored as its non-zeros and two bits for the place of each. Only S may be sparse, and only along the rows in which it
is multiplied: to multiply by a matrix that is 2:4 along its columns, give its transpose. Where the hardware is not there
this is refused, never emulated. (Mishra et al., *Accelerating Sparse Deep Neural Networks*.)
"""

import statistics
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.sparse import to_sparse_semi_structured

from rowwise.kernels import torch_sparse

DTYPES = (torch.bfloat16, torch.float16)
ROUNDS, CALLS = 7, 10


def semi_structured_problem(
    device: torch.device, dtype: torch.dtype, n: int, m: int, shape: tuple[int, ...] | None = None
) -> str | None:
    """Says why n:m matrices of that dtype (and shape, where one is given) are not multiplied as semi-structured on `device`;
    None where they are. Whether they are faster there, `measure_semi_structured` says."""
    if problem := sparsity_problem(n, m):
        return problem
    if dtype not in DTYPES:
        return f"dtype {dtype}: the hardware's 2:4 products are of bfloat16 and float16; give precision=bf16 or fp16"
    step = torch_sparse.cusparselt_step(dtype)
    if shape is not None and (len(shape) != 2 or any(size < step or size % step for size in shape)):
        return f"shape {tuple(shape)}: both sizes of a semi-structured matrix are multiples of {step}"
    return _device_problem(torch.device(device))


def sparsity_problem(n: int, m: int) -> str | None:
    """Returns what of `semi_structured_problem` needs no device."""
    if (n, m) == (2, 4):
        return None
    return f"sparsity {n}:{m}: the hardware has 2:4 alone; give n=2 and m=4, or no semi_structured"


def _device_problem(device: torch.device) -> str | None:
    if device.type != "cuda" or torch.version.hip or not torch.cuda.is_available():
        return f"device {device}: 2:4 products need an NVIDIA GPU; leave semi_structured off here"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return f"device {device} has compute capability {major}.{minor}: 2:4 products need 8.0 (Ampere) or newer"
    if not torch.backends.cusparselt.is_available():
        return "this torch is built without cuSPARSELt, which multiplies 2:4 matrices; take a build that has it"
    return None


def semi_structured_linear(x: Tensor, pruned: Tensor, bias: Tensor | None = None) -> Tensor:
    """Computes y (..., out) of x (..., in) and `pruned` (out, in), which is 2:4 along its rows, and bias (out,), all of one dtype.

    Compresses `pruned` at every call: it is another at every step. Raises ValueError where the hardware, the dtype or the
    shape does not allow it. Gives no gradient. Communicates nothing.
    """
    return _linear(x, pruned, bias)


# An operator of its own: torch.compile need not look into torch's sparse tensors.
@torch.library.custom_op("rowwise::semi_structured_linear", mutates_args=())
def _linear(x: Tensor, pruned: Tensor, bias: Tensor | None) -> Tensor:
    if problem := semi_structured_problem(pruned.device, pruned.dtype, 2, 4, pruned.shape):
        raise ValueError(f"semi_structured: {problem}")
    rows = x.reshape(-1, x.size(-1)).contiguous()
    sparse_t = to_sparse_semi_structured(pruned.contiguous()).t()
    y = rows @ sparse_t if bias is None else torch.addmm(bias, rows, sparse_t)
    return y.reshape(*x.shape[:-1], pruned.size(0)).contiguous()  # cuSPARSELt may give the transpose of a transpose


@_linear.register_fake
def _(x: Tensor, pruned: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], pruned.size(0))


def measure_semi_structured(
    shape: tuple[int, ...], tokens: int, dtype: torch.dtype, device: torch.device, backward: str = "column"
) -> float:
    """Returns the time of a dense forward and input gradient over the semi-structured ones' of a matrix `shape` (out, in) for
    `tokens` rows: above 1, they win on this device. Compressing counts, pruning does not: both ways prune. With `backward`
    "row" only the forward is semi-structured (see `kernels/nm.py`).

    The median of some rounds in turns. Raises ValueError where semi-structured products are not possible.
    """
    if problem := semi_structured_problem(device, dtype, 2, 4, shape):
        raise ValueError(f"semi_structured: {problem}")
    out, in_ = shape
    row = torch.randn(out, in_, dtype=dtype, device=device)
    column = row.clone()
    row.view(out, -1, 4)[:, :, 2:] = 0
    column.view(-1, 4, in_)[:, 2:] = 0
    x = torch.randn(tokens, in_, dtype=dtype, device=device)
    dy = torch.randn(tokens, out, dtype=dtype, device=device)

    def dense() -> None:
        F.linear(x, row)
        torch.mm(dy, column)

    def sparse() -> None:
        semi_structured_linear(x, row)
        if backward == "column":
            semi_structured_linear(dy, column.t().contiguous())
        else:
            torch.mm(dy, column)

    for product in (dense, sparse):
        _milliseconds(product)  # the first calls choose kernels
    return statistics.median(_milliseconds(dense) / _milliseconds(sparse) for _ in range(ROUNDS))


def _milliseconds(product: Callable[[], None]) -> float:
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    began.record()
    for _ in range(CALLS):
        product()
    ended.record()
    ended.synchronize()
    return began.elapsed_time(ended)
