"""How queries look at keys: what stands between their products and the softmax. No torch."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Look:
    """How a layer's queries look at keys: s = `scale` q k, by default 1 / sqrt(E) of heads of E numbers."""

    scale: float | None = None

    def scale_of(self, head_size: int) -> float:
        """Gives what products of queries and keys of `head_size` are multiplied by."""
        return head_size**-0.5 if self.scale is None else self.scale


PLAINLY = Look()
