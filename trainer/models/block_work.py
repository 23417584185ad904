"""What a layer of `blocks.Block` makes by name, and what its backward holds at once, in bytes: see `parallel.activations.results`."""

from rowwise.parallel.activations.results import INPUT, BackwardPiece, LayerResults, LayerWork, Result, Sharing
from rowwise.trainer.models.attention import GATE, NORM, attention_results
from rowwise.trainer.models.config import ModelConfig

WIDENING, PROJECTING = ("feed_forward.w1", "feed_forward.w3"), ("attention.wq", "attention.wk", "attention.wv")


def block_results(config: ModelConfig, sharing: Sharing) -> LayerResults:
    """Lists the results of a layer."""
    dim, wide, seen = config.dim, config.ffn_dim, config.heads * config.head_size
    before, after = config.norms != "after", config.norms != "before"
    n1, n2 = Result("n1", dim, NORM * dim, wide=1), Result("n2", dim, NORM * dim, wide=1, of=("h",))
    mixed, narrowed = 2 * seen * dim, 2 * wide * dim
    h: tuple[Result, ...] = (Result("h", dim, mixed + dim, dear=True, of=(INPUT, "y")),)
    out: tuple[Result, ...] = ()
    if after:
        a = Result("a", dim, mixed, dear=True, of=("y",))
        h = (a, Result("h", dim, (NORM + 1) * dim, wide=1, of=(INPUT, "a")))
        f = Result("f", dim, narrowed, dear=True, of=("s",))
        out = (f, Result("out", 0, (NORM + 1) * dim, wide=1, of=("h", "f")))
    return LayerResults(
        dim,
        (
            *((n1,) if before else ()),
            *attention_results(config, sharing),
            *h,
            *((n2,) if before else ()),
            Result("gate_up", 2 * wide, 4 * dim * wide, dear=True, tensors=2, of=("n2" if before else "h",)),
            Result("s", wide, GATE * wide, of=("gate_up",)),
            *out,
        ),
    )


def block_work(config: ModelConfig, width: int, gpu: bool) -> LayerWork:
    """Tells what a layer has at once, of numbers of `width` bytes. A `gpu` makes the gradient of a norm in one operator, and adds the
    gradients of queries up in float32."""
    c, w = width, max(4, width)
    before, after = config.norms != "after", config.norms != "before"
    d, f, q, k = (
        n * c for n in (config.dim, config.ffn_dim, config.heads * config.head_size, config.kv_heads * config.head_size)
    )
    # Of a norm: x / r, the gradient, its product with the weight, one more product.
    norm = d if gpu else (3 if c == w else 4) * config.dim * w
    # The gradient of what is added is another than that of what it is added to, where it is normed or scaled.
    scaled = d * (config.residual_scale != 1)
    apart = d if after else scaled
    turned = max(3 * q, 0 if gpu or not config.qk_norm else 4 * q // c * w)
    sums = q // c * w if gpu and c < w else 0
    looked, turned_of = ("y", "qkv", *(("qk",) if config.qk_norm else ())), ("qkv",) if config.qk_norm else ()
    n1, n2 = ("n1", "n2") if before else (INPUT, "h")
    # Parameters with their gradients, as the backward passes by: after w2, w1 and w3, the norms around them, wo, and the rest.
    of_w2 = after + 1 + config.mlp_bias
    of_widening = of_w2 + 2 * (1 + config.mlp_bias)
    of_h = of_widening + before
    of_a = of_h + after
    of_wo = of_a + 1 + config.out_bias
    of_qkv = of_wo + 3 * (1 + config.qkv_bias) + 2 * config.qk_norm
    normed_f = BackwardPiece(("f", "out"), 2 * d + scaled + norm, 0, 0, 2 * d + scaled + norm)
    normed_a = BackwardPiece(("a",), 2 * d + scaled + norm, of_h, 0, 2 * d + scaled + norm)
    waits_h = 0 if after else d  # the gradient of h is that of wo's output
    normed_h = BackwardPiece(("h",), 2 * d + norm, of_widening, waits_h, 2 * d - waits_h + norm)
    backward = (
        *((normed_f,) if after else ()),
        BackwardPiece(("s",), d + apart + f, after, d, apart + f, ("s",), ("feed_forward.w2",)),
        BackwardPiece(("gate_up",), d + apart + 3 * f, of_w2, f, apart + 2 * f),
        BackwardPiece(("gate_up",), d + apart + 3 * f, of_w2, f, apart + f),
        BackwardPiece((n2,), max(2 * d + 2 * f, 3 * d + f), of_w2, 0, apart + 2 * d, (n2,), WIDENING),
        *((normed_h,) if before else ()),
        *((normed_a,) if after else ()),
        BackwardPiece(("y",), d + apart + q, of_a, d if after else 0, apart + q, ("y",), ("attention.wo",)),
        BackwardPiece(looked, d + 2 * q + 2 * k + sums, of_wo, k, apart + 2 * q + k + sums),
        BackwardPiece(turned_of, d + q + 2 * k + turned, of_wo, q + k, apart + turned),
        BackwardPiece((n1,), 3 * d + q + 2 * k, of_wo, 0, apart + 2 * d, (n1,), PROJECTING),
        *((BackwardPiece((INPUT,), 2 * d + norm, of_qkv, 0, apart + d + norm),) if before else ()),
    )
    last = max(f, 2 * d, 2 * config.dim * w + d if after else 0)
    return LayerWork(last, 2 * d + max(3 * f, 2 * d + f), backward)
