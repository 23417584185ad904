"""What the numba forms of kernels are made of: how they are compiled and kept, and what Python has no word for.

A kernel goes block by block: 256 numbers, held in float32 in a core's first cache while short loops pass over them, each of
which LLVM makes into vector instructions. Numbers that are float32 or bfloat16 come as a pair of arrays, one of them empty, so
that a kernel is compiled once and not for every combination. Products and sums are contracted where `fma` says so and nowhere
else: just where torch's own operators are on processors with AVX2.
"""

import contextlib
import ctypes
import functools
import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numba
import numpy as np
import platformdirs
import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from torch import Tensor

from rowwise.kernels.moment_pair import Moment

Numbers = tuple[np.ndarray, np.ndarray]  # float32 or, the other empty, the bits of bfloat16

INT = ir.IntType(32)
HALF, ONE = np.float32(0.5), np.float32(1)

config: Any = numba.config
compiled: Any = functools.partial(numba.njit, nogil=True, error_model="numpy")
inlined = compiled()  # part of a kernel: compiled with it


def kernel(function: Callable[..., None]) -> Callable[..., None]:
    """Compiles what is called from Python, and keeps it for other processes where a folder can be written."""
    with _cache_folder():
        try:
            return compiled(cache=True)(function)
        except RuntimeError:  # numba found no folder
            return compiled()(function)


@contextlib.contextmanager
def _cache_folder() -> Iterator[None]:
    """Has numba keep what it compiles in NUMBA_CACHE_DIR, or in a folder of this user's, apart for what these files say: it
    looks for changes in the file of a kernel alone, and not in those of its parts."""
    given, room = config.CACHE_DIR, Path(__file__).parent
    sources = [
        room / "blockwise.py",
        room / "moment_pair.py",
        *sorted(room.glob("*_numba.py")),
    ]  # two for their constants
    says = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:16]
    config.CACHE_DIR = str(Path(given or platformdirs.user_cache_path("rowwise") / "numba", says))
    try:
        yield
    finally:
        config.CACHE_DIR = given


def array(t: Tensor, dtype: type[np.generic]) -> np.ndarray:
    """Shares the memory of a contiguous tensor as a flat array, for as long as the tensor is there. (`Tensor.numpy` would say of its
    storage that it is not torch's own, as of one that lies in a file.)"""
    assert t.is_contiguous()
    if not t.numel():
        return np.empty(0, dtype)
    memory = (ctypes.c_ubyte * t.nbytes).from_address(t.data_ptr())
    return np.frombuffer(memoryview(memory), dtype)


def numbers(t: Tensor) -> Numbers:
    """Shares the memory of a contiguous tensor, float32 or bfloat16."""
    if t.dtype == torch.bfloat16:
        return np.empty(0, np.float32), array(t, np.uint16)
    assert t.dtype == torch.float32
    return array(t, np.float32), np.empty(0, np.uint16)


def arrays(moment: Moment) -> tuple[np.ndarray, np.ndarray]:
    """Shares the memory of codes and absolute maxima."""
    codes, absmax = moment
    return array(codes, np.uint8), array(absmax, np.float32)


def float32s(*scalars: float) -> tuple[np.float32, ...]:
    """Rounds what a kernel computes with, as torch does."""
    return tuple(np.float32(scalar) for scalar in scalars)


def in_registers(result: types.Type, *operands: types.Type) -> Callable[[Callable[..., Any]], Any]:
    """Makes an operation out of LLVM's instructions: `build` gets what emits them, and the operands. (On whole numbers numba's
    own are 64 bits wide, of which a vector holds half as many.)"""

    def made(build: Callable[..., Any]) -> Any:
        @functools.wraps(build)  # numba reads how many operands there are
        def operation(context, *given):
            return result(*operands), lambda context, emit, signature, values: build(emit, *values)

        return intrinsic(operation)

    return made


@in_registers(types.float32, types.float32, types.float32, types.float32)
def fma(emit, a, b, c):
    """a b + c, rounded once."""
    return emit.fma(a, b, c)


@in_registers(types.float32, types.int32)
def number(emit, bits):
    """The float32 of these bits."""
    return emit.bitcast(bits, ir.FloatType())


@in_registers(types.float32, types.uint16)
def widened(emit, half):
    """The bfloat16 of these bits, as float32."""
    return emit.bitcast(emit.shl(emit.zext(half, INT), INT(16)), ir.FloatType())


@in_registers(types.int32, types.int32, types.float32)
def larger(emit, most, x):
    """The larger of |x|'s bits and of `most`: as whole numbers floats are in the order of |x|, with NaN above all."""
    magnitude = emit.and_(emit.bitcast(x, INT), INT(0x7FFFFFFF))
    return emit.select(emit.icmp_signed(">", magnitude, most), magnitude, most)


@inlined
def load(source, first, x, n):
    """Reads the numbers from `first` on into x (n,) float32."""
    wide, narrow = source
    if wide.size:
        part = wide[first : first + n]
        for j in range(n):
            x[j] = part[j]
    else:
        half = narrow[first : first + n]
        for j in range(n):
            x[j] = widened(half[j])


@inlined
def lerp(x, end, weight):
    """x + weight (end - x), from the nearer end, as torch's operator."""
    near = weight < HALF
    return fma(weight if near else weight - ONE, end - x, x if near else end)
