"""What a rank keeps of the forwards of its pieces until their backwards, and where: on the device, or on the host and in files
(`parallel.activations.offload`).

What leaves stays on the device until two more layers have begun, and comes back while the layer after it is differentiated. The host
holds all of it, or where it goes on to files that of two layers on their way there and of one on its way back. On a CPU `cpu` is the
memory that the backward reads, and nothing comes back.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from rowwise.parallel.activations.offload import LEAVING
from rowwise.trainer.plan.ledger import Ledger
from rowwise.trainer.plan.works import Work


@dataclass(eq=False)
class Visit:
    """A forward of a piece, in bytes: what is `here`, on the device, of which `moves` may still leave, and on the `host`. `left`: that
    has left; `back`: it is there again."""

    work: Work
    here: int = 0
    moves: int = 0
    host: int = 0
    left: bool = False
    back: bool = False

    @property
    def readable(self) -> bool:
        """Says whether what the backward lets go of is on the device."""
        return self.back or not self.left


class Keeping:
    """What a rank keeps. `files`: what leaves goes on to a folder; `returns`: what comes back takes memory of the device."""

    def __init__(self, ledger: Ledger, files: bool, returns: bool):
        self._ledger, self._files, self._returns = ledger, files, returns
        self._leaving: deque[Visit] = deque()

    def begin(self, work: Work) -> Visit:
        """Begins the forward of a piece."""
        visit = Visit(work, moves=work.away - work.stays)
        if work.away:
            self._leaving.append(visit)
            if len(self._leaving) > LEAVING:
                self._leave(self._leaving.popleft())
            self._on_host(visit, work.away)
        self.hold(visit, work.kept)
        return visit

    def approach(self, visits: Sequence[Visit]) -> None:
        """Brings the backward to the last of these pieces: what it keeps is there, what the one before keeps sets out, and that of the
        one before that comes from its file."""
        for distance, visit in enumerate(reversed(visits[-3:])):
            if not visit.left or visit.back or not self._returns:
                continue
            if distance < 2:
                self._on_host(visit, 0 if self._files else visit.host)
                self.hold(visit, visit.here + visit.work.away)
                visit.back = True
            elif self._files:
                self._on_host(visit, visit.work.away)

    def end(self, visit: Visit, deferred: int) -> None:
        """Ends the backward of a piece, but for weights' gradients: `deferred` bytes wait for them, and what they need of what was
        kept."""
        rest = visit.work.rest
        visit.moves = 0 if visit.left else rest
        self.hold(visit, deferred + visit.moves)
        self._on_host(visit, min(visit.host, rest))

    def drop(self, visit: Visit) -> None:
        """Drops what nothing needs any more."""
        visit.moves = 0
        self.hold(visit, 0)
        self._on_host(visit, 0)

    def hold(self, visit: Visit, size: int) -> None:
        """Holds so many bytes of a piece on the device from now on."""
        self._ledger.change("activations", size - visit.here)
        visit.here = size

    def _on_host(self, visit: Visit, size: int) -> None:
        self._ledger.change("host", size - visit.host)
        visit.host = size

    def _leave(self, visit: Visit) -> None:
        self.hold(visit, visit.here - visit.moves)
        visit.moves, visit.left = 0, True
        if self._files:
            self._on_host(visit, 0)
