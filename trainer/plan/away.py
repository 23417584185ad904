"""What a rank keeps of the forwards of its pieces until their backwards, and where: on the device, or on the host and in files
(`parallel.activations.offload`).

What leaves stays on the device until two more layers have begun. It comes back while the layer after it in the stage is
differentiated, all of it, and of a stage's last layer as it is read, one result at a time; nothing of it outlasts the backward. The
host holds all of it, or where it goes on to files that of two layers on their way there and of one on its way back. On a CPU `cpu` is
the memory that the backward reads, and nothing comes back.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from rowwise.parallel.activations.offload import LEAVING
from rowwise.trainer.plan.layer import Moment
from rowwise.trainer.plan.ledger import Ledger
from rowwise.trainer.plan.works import Work


@dataclass(eq=False)
class Visit:
    """A forward of a piece, in bytes: what is `here`, on the device, of which `moves` may still leave, what `came` back, and what is
    on the `host`. `left`: that has left; `ahead`: it came back before its backward began."""

    work: Work
    here: int = 0
    moves: int = 0
    came: int = 0
    host: int = 0
    left: bool = False
    ahead: bool = False


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
        """Brings the backward to the last of these pieces: what the one before keeps sets out, and that of the one before that comes
        from its file."""
        if not (self._returns and visits[-1].work.away):
            return
        for distance, visit in enumerate(reversed(visits[-3:-1]), 1):
            if not visit.left or visit.ahead:
                continue
            if distance == 1:
                self._on_host(visit, 0 if self._files else visit.host)
                self._bring(visit, visit.work.away)
                visit.ahead = True
            elif self._files:
                self._on_host(visit, visit.work.away)

    def read(self, visit: Visit, there: int, moment: Moment) -> None:
        """Reads what the backward of a piece needs at a moment, of which `there` were on the device when it began."""
        self.hold(visit, there - moment.released * (not visit.left) + moment.deferred)
        if visit.left and self._returns:
            self._bring(visit, moment.read + moment.unread * visit.ahead)

    def end(self, visit: Visit, deferred: int) -> None:
        """Ends the backward of a piece, but for weights' gradients: `deferred` bytes wait for them, and what they need of what was
        kept."""
        rest = visit.work.rest
        visit.moves = 0 if visit.left else rest
        self.hold(visit, deferred + visit.moves)
        self._bring(visit, 0)
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

    def _bring(self, visit: Visit, size: int) -> None:
        self._ledger.change("working", size - visit.came)
        visit.came = size

    def _on_host(self, visit: Visit, size: int) -> None:
        self._ledger.change("host", size - visit.host)
        visit.host = size

    def _leave(self, visit: Visit) -> None:
        self.hold(visit, visit.here - visit.moves)
        visit.moves, visit.left = 0, True
        if self._files:
            self._on_host(visit, 0)
