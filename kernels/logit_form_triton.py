"""The Triton form of `rowwise.kernels.logit_form`; the formulas stand there."""

import triton
import triton.language as tl


@triton.jit
def tanh(x):
    """Computes tanh x, float32, by an exponential that cannot overflow."""
    rest = tl.exp(-2.0 * tl.abs(x))
    return tl.where(x < 0, -1.0, 1.0) * (1.0 - rest) / (1.0 + rest)


@triton.jit
def formed(p, scale, cap, CAPPED: tl.constexpr):
    """Makes z of products p, float32."""
    z = p * scale
    return cap * tanh(z / cap) if CAPPED else z


@triton.jit
def sloped(g, z, scale, cap, CAPPED: tl.constexpr):
    """Makes the gradient of p of that of z, g, float32."""
    g *= scale
    return g * (1.0 - (z / cap) * (z / cap)) if CAPPED else g
