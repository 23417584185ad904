"""How queries look at keys: how far back, and what stands between their products and the softmax."""

from dataclasses import dataclass, replace

from rowwise.kernels.logit_form import LogitForm


@dataclass(frozen=True)
class Look:
    """How a layer's queries look at keys. `scale`: of their products; None: 1 / sqrt(E) of heads of E. `window`: how many tokens of
    its document a token sees, the last of them itself; None: all. `cap`: c, of scores s that are c tanh(s / c); None: none."""

    scale: float | None = None
    window: int | None = None
    cap: float | None = None

    def form(self, head_size: int) -> LogitForm:
        """Gives what scores are made by of products of queries and keys of `head_size`."""
        return LogitForm(head_size**-0.5 if self.scale is None else self.scale, self.cap)

    def at(self, length: int) -> "Look":
        """Gives the look at sequences of `length`, in which a window as long is none."""
        return replace(self, window=None) if self.window is not None and self.window >= length else self


PLAINLY = Look()
