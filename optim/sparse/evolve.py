"""What a mask becomes: pure functions of weights, gradients and the mask before, without a word about when.

    set     drop the k smallest active |w|; grow k others at random       (Mocanu et al., *Scalable Training of ANNs with
            Adaptive Sparse Connectivity Inspired by Network Science*)
    rigl    the same, and grow where the dense |g| is largest             (Evci et al., *Rigging the Lottery*)

What grows was inactive before, so that k is really replaced (in the papers what was just dropped may grow again, and the
update takes the place of the optimizer's step, which here comes first). With `redistribute` all matrices compete for what is
dropped, and each grows in proportion to what it has left, so that the total stays (Mostafa & Wang, *Parameter Efficient
Training of Deep CNNs by Dynamic Sparse Reparameterization*).

All are exact on every layout: see `optim.select` for what crosses ranks.
"""

from collections.abc import Callable, Sequence
from fractions import Fraction

from torch import Tensor

from rowwise.kernels.philox import random_words, stream_key
from rowwise.optim.select import Keys, key_bits, magnitude_keys
from rowwise.optim.sparse.budget import share_out
from rowwise.optim.sparse.layers import Layer, Layers
from rowwise.optim.sparse.masks import unpack

RANDOM_BITS = 40  # 32 of the word, and above them whether the weight was never active


def magnitudes(w: Tensor) -> Keys:
    """Returns the keys of |w|."""
    return lambda rows: magnitude_keys(w[rows])


def active_magnitudes(layer: Layer) -> Keys:
    """Returns the keys of |w|, of active weights alone."""
    return only(layer, magnitudes(layer.weight), active=True)


def inactive_gradients(layer: Layer, gradient: Tensor) -> Keys:
    """Returns the keys of |g|, of inactive weights alone."""
    return only(layer, magnitudes(gradient), active=False)


def inactive_at_random(layer: Layer, seed: int, step: int, fired: Tensor | None = None) -> Keys:
    """Returns random keys of inactive weights, a function of the logical position; those that are not in `fired` come first."""
    draw = at_random(layer, seed, f"grow/{step}")

    def keys(rows: slice) -> Tensor:
        words = draw(rows)
        return words if fired is None else words + (~unpack(fired[rows], layer.columns)).long() * (1 << 32)

    return only(layer, keys, active=False)


def at_random(layer: Layer, seed: int, purpose: str) -> Keys:
    """Returns random keys of all weights: element i of the matrix has word i of a stream of its own."""
    key = stream_key(seed, f"sparse/{layer.name}/{purpose}")

    def keys(rows: slice) -> Tensor:
        numbers = (rows.stop - rows.start) * layer.columns
        words = random_words(key, layer.before + rows.start * layer.columns, numbers, layer.weight.device)
        return words.view(-1, layer.columns)

    return keys


def only(layer: Layer, keys: Keys, active: bool) -> Keys:
    """Returns `keys` with no candidate among the weights that are not (in)active."""
    return lambda rows: keys(rows).masked_fill_(unpack(layer.bits[rows], layer.columns) != active, -1)


def random_masks(layers: Layers, budgets: Sequence[int], seed: int) -> list[Tensor]:
    """Draws as many weights of every matrix as its budget says, at random."""
    keys = [at_random(layer, seed, "start") for layer in layers.mine]
    return layers.choose(keys, [budgets[layer.index] for layer in layers.mine], 32)


def largest(layers: Layers, weights: Sequence[Tensor], budgets: Sequence[int], together: bool) -> list[Tensor]:
    """Returns the masks of the largest |w| of every matrix; or of all matrices `together`, as many as all budgets."""
    keys = [magnitudes(w) for w in weights]
    bits = key_bits(layers.dtype)
    if together:
        return layers.choose_together(keys, sum(budgets), bits)
    return layers.choose(keys, [budgets[layer.index] for layer in layers.mine], bits)


Growth = Callable[[Layer], Keys]


def drop_and_grow(layers: Layers, share: float, growth: Growth, bits: int) -> list[Tensor]:
    """Replaces floor(share x active) weights of every matrix, at most as many as are inactive. `growth`: keys of the
    inactive weights, of so many `bits`. What stays and what comes are found in the same messages."""
    active = layers.counts([layer.bits for layer in layers.mine], layers.rows)
    kept, grown = [], []
    for layer in layers.mine:
        free = layers.shapes[layer.index].numel() - active[layer.index]
        replaced = min(int(share * active[layer.index]), free)
        kept.append(active[layer.index] - replaced)
        grown.append(replaced)
    keys = [active_magnitudes(layer) for layer in layers.mine] + [growth(layer) for layer in layers.mine]
    masks = layers.choose(keys, kept + grown, max(bits, key_bits(layers.dtype)))
    return [keep | new for keep, new in zip(masks, masks[len(layers.mine) :], strict=False)]


def redistribute(layers: Layers, share: float, growth: Growth, bits: int) -> list[Tensor]:
    """Drops the floor(share x active) smallest of all matrices together; each grows in proportion to what it has left, as
    far as it has room."""
    active = layers.counts([layer.bits for layer in layers.mine], layers.model)
    total, sizes = sum(active), [shape.numel() for shape in layers.shapes]
    replaced = min(int(share * total), sum(sizes) - total)
    kept = layers.choose_together([active_magnitudes(layer) for layer in layers.mine], total - replaced,
                                  key_bits(layers.dtype))  # fmt: skip
    left = layers.counts(kept, layers.model)
    # What was just dropped does not grow again, so there is room for what was inactive before.
    room = [size - before for size, before in zip(sizes, active, strict=True)]
    wanted = [Fraction(replaced * n, max(1, sum(left))) for n in left]
    grown = share_out(replaced, wanted, room)
    new = layers.choose([growth(layer) for layer in layers.mine], [grown[layer.index] for layer in layers.mine], bits)
    return [keep | more for keep, more in zip(kept, new, strict=True)]
