"""Counter-based normal numbers: element i of a stream is a pure function of (key, i).

Philox-4x32-10 (Salmon et al., *Parallel Random Numbers: As Easy as 1, 2, 3*, SC 2011) turns a 128-bit counter
and a 64-bit key into four 32-bit words. Any slice of a stream can be drawn on any rank without drawing the rest,
so that a parameter has the same initial numbers on every layout. Words become normal numbers by Box-Muller:

    u(w) = (2 (w >> 9) + 1) / 2^24                 exact in float32, never 0 or 1
    z_0, z_1 = sqrt(-2 ln u(w_0)) * (cos, sin)(2 pi u(w_1))      likewise z_2, z_3 from w_2, w_3

Element i is z_(i mod 4) of the counter i div 4.
"""

import hashlib
import math

import torch
from torch import Tensor

from rowwise.kernels.dispatch import use_triton

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = 0xFFFFFFFF
_ROUNDS = 10
_REFERENCE_CHUNK = 1 << 18  # counters at a time, so that the int64 temporaries of the reference stay in cache


def stream_key(seed: int, name: str) -> int:
    """Returns the 64-bit key of the stream `name` under `seed` (SHA-256, so that neighbouring seeds share nothing)."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "little")


def normal(key: int, start: int, count: int, device: torch.device) -> Tensor:
    """Returns elements [start, start + count) of the standard normal stream `key`: a float32 tensor (count,).

    Communicates nothing. The Triton kernel and the reference agree in every word and, after Box-Muller, to a few
    units in the last place of float32.
    """
    if use_triton(device):
        from rowwise.kernels.philox_triton import normal_triton

        return normal_triton(key, start, count, device)
    return normal_reference(key, start, count, device)


def normal_reference(key: int, start: int, count: int, device: torch.device) -> Tensor:
    """Computes `normal` in plain torch."""
    first, last = start // 4, -(-(start + count) // 4)
    pieces = []
    for low in range(first, last, _REFERENCE_CHUNK):
        counters = torch.arange(low, min(low + _REFERENCE_CHUNK, last), dtype=torch.int64, device=device)
        pieces.append(_box_muller(philox_words(key, counters)))
    stream = torch.cat(pieces) if pieces else torch.empty(0, device=device)
    return stream[start - 4 * first : start - 4 * first + count]


def random_words(key: int, start: int, count: int, device: torch.device) -> Tensor:
    """Returns elements [start, start + count) of the stream of uniform 32-bit words `key`: an int64 tensor (count,). Word i is
    word i mod 4 of the counter i div 4."""
    first, last = start // 4, -(-(start + count) // 4)
    words = philox_words(key, torch.arange(first, last, dtype=torch.int64, device=device))
    return torch.stack(words, dim=1).flatten()[start - 4 * first : start - 4 * first + count]


def philox_words(key: int, counters: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Computes Philox-4x32-10 of the 64-bit counters (n,): four int64 tensors (n,) that hold unsigned 32-bit words."""
    c0, c1 = counters & _LOW, (counters >> 32) & _LOW
    c2, c3 = torch.zeros_like(c0), torch.zeros_like(c0)
    k0, k1 = key & _LOW, key >> 32
    for _ in range(_ROUNDS):
        # int64 products wrap modulo 2^64, which leaves both 32-bit halves right. Only the lower half of c1 and c3 counts.
        a, b = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1 = _upper(b, c1, k0), b
        c2, c3 = _upper(a, c3, k1), a
        k0, k1 = (k0 + _WEYL[0]) & _LOW, (k1 + _WEYL[1]) & _LOW
    return c0, c1 & _LOW, c2, c3 & _LOW


def _upper(product: Tensor, word: Tensor, key: int) -> Tensor:
    """(product >> 32) ^ word ^ key as an unsigned 32-bit word."""
    return (product >> 32).bitwise_xor_(word).bitwise_xor_(key).bitwise_and_(_LOW)


def _box_muller(words: tuple[Tensor, Tensor, Tensor, Tensor]) -> Tensor:
    u0, u1, u2, u3 = (((w >> 9) * 2 + 1).float() * 2.0**-24 for w in words)
    radius_01, radius_23 = (-2 * u0.log()).sqrt(), (-2 * u2.log()).sqrt()
    angle_01, angle_23 = 2 * math.pi * u1, 2 * math.pi * u3
    z = (radius_01 * angle_01.cos(), radius_01 * angle_01.sin(), radius_23 * angle_23.cos(), radius_23 * angle_23.sin())
    return torch.stack(z, dim=1).flatten()
