"""A step of one rank, walked through: what it holds at every moment, by category.

Forwards and backwards are walked piece by piece (the embedding, each layer, the norm with the head and the loss), in the order in
which this rank does them: a micro-batch after the other, of which three are walked, or as its pipeline's schedule says. What a piece
holds while it computes is its `Work`; how parameters and gradients come and go is in `weights`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from rowwise.parallel.pipeline import last_uses
from rowwise.parallel.pipeline_schedule.order import Action, Schedule, early_messages
from rowwise.parallel.pipeline_schedule.simulate import Gathering
from rowwise.trainer.plan.away import Keeping, Visit
from rowwise.trainer.plan.layer import weight_gradients
from rowwise.trainer.plan.ledger import Ledger
from rowwise.trainer.plan.loss import LossWork
from rowwise.trainer.plan.update import NONE, StepBytes
from rowwise.trainer.plan.weights import Weights
from rowwise.trainer.plan.works import Work


@dataclass(frozen=True)
class Crossing:
    """Bytes of what crosses from stage to stage, and of a tied matrix's gradient (0: none is). `stay`: what was sent is held until
    the step is over (gloo)."""

    size: int
    tied: int
    stay: bool


class Stage:
    """The pieces of a stage, walked on a ledger. `keeping`: what this rank keeps of its forwards; `update`: of the optimizer's step of
    the head, where it is made in the backward, within the loss."""

    def __init__(
        self,
        ledger: Ledger,
        keeping: Keeping,
        weights: Weights,
        works: Sequence[Work],
        update: StepBytes = NONE,
    ):
        self.ledger, self.keeping, self.weights, self.works, self._update = ledger, keeping, weights, works, update
        self._visits: dict[int, list[Visit]] = {}  # by micro-batch
        self._head: tuple[str, int] | None = None  # the head's gradient, where the loss has made it: category and bytes

    def forward(self, micro_batch: int, last: bool, told: str) -> None:
        """Walks the forward of a micro-batch."""
        ledger, weights = self.ledger, self.weights
        weights.begin(last)
        visits = self._visits[micro_batch] = []
        for piece, work in enumerate(self.works):
            ledger.at = f"the forward of {work.name}{told}"
            weights.enter(piece)
            visits.append(self.keeping.begin(work))
            ledger.use("working", work.forward)
            ledger.use("messages", work.messages[0])
            if (loss := work.loss) is not None:
                self._make_head_gradient(piece, loss, "forward")
                given = 0 if loss.needs_input else loss.input
                ledger.take("working", given)
                ledger.use("loss", loss.forward)
                ledger.give("working", given)
                ledger.take("loss", loss.kept)
            weights.leave(piece)
        weights.end_forward()

    def backward(self, micro_batch: int, told: str, split: bool = False, received: int = 0) -> None:
        """Walks the backward of a micro-batch; `split`: the weights' gradients come later, by `rest`; `received`: the bytes of the
        gradient that another stage sent, which autograd is given and holds."""
        ledger, weights, visits = self.ledger, self.weights, self._visits[micro_batch]
        for piece in reversed(range(len(self.works))):
            work, visit = self.works[piece], visits[piece]
            ledger.at = f"the backward of {work.name}{told}"
            if work.returns:
                weights.enter_back(piece)
            if (loss := work.loss) is not None:
                self._make_head_gradient(piece, loss, "backward")
                ledger.use("loss", max(0, loss.backward - loss.kept))
                ledger.use("loss", *self._update)
                ledger.give("loss", loss.kept)
                again = loss.makes == "after" and not loss.deferred and (loss.tied or weights.holds(piece))
                ledger.use("loss", loss.after + loss.head * again)
                ledger.take("loss", loss.deferred)
                self._make_head_gradient(piece, loss, "after")
                self._take_head_gradient(piece, loss)
            ledger.use("messages", work.messages[1])
            self.keeping.approach(visits[: piece + 1])
            there, deferred = visit.here, work.backward[-1].deferred
            for moment in work.backward:
                self.keeping.read(visit, there, moment)
                if not (split and deferred):
                    ledger.take("working", moment.given)
                    weights.add_gradients(piece, moment.parameters, moment.gone)
                    ledger.give("working", moment.given)
                ledger.use("working", moment.working)
            self.keeping.end(visit, deferred)
            if visit is visits[-1]:  # whose layer counts it as a gradient of its own
                ledger.take("activations", received)
            if piece == 0:
                self._add_tied_gradient()
            weights.leave_back(piece)
        ledger.give("activations", received)
        weights.end_backward()

    def _make_head_gradient(self, piece: int, loss: LossWork, where: str) -> None:
        """It is the loss's where it is only added to what is there. Made after the loss it comes with the norm's, unless it waits for
        the embedding's."""
        if loss.makes == where and (where != "after" or loss.tied):
            self._head = ("loss" if loss.tied or self.weights.holds(piece) else "gradients"), loss.head
            self.ledger.take(*self._head)

    def _take_head_gradient(self, piece: int, loss: LossWork) -> None:
        if self._head is not None and not loss.tied:
            self.ledger.give(*self._head)
            self._head = None
            self.weights.add_gradients(piece, 1)

    def _add_tied_gradient(self) -> None:
        """What the head gave of the embedding's gradient, to what the look-up gives, in one that is new."""
        if self._head is not None:
            self.ledger.use("working", self._head[1])
            self.ledger.give(*self._head)
            self._head = None

    def rest(self, micro_batch: int, told: str) -> None:
        """Walks the weights' gradients of a micro-batch."""
        for piece, visit in reversed(list(enumerate(self._visits[micro_batch]))):
            self.ledger.at = f"the weights' gradients of {visit.work.name}{told}"
            if visit.work.backward[-1].deferred:
                there = visit.here
                for parameters, used in weight_gradients(visit.work.backward):
                    self.weights.add_gradients(piece, parameters)
                    self.keeping.hold(visit, there - used)
                self.ledger.use("working", visit.work.decoded)
                self.keeping.drop(visit)
            if (loss := visit.work.loss) is not None:
                self.ledger.give("loss", loss.deferred)


def walk_whole(stage: Stage, micro_batches: int) -> None:
    """Walks a step whose micro-batches go one after the other through a whole model."""
    walked = min(micro_batches, 3)
    for number in range(1, walked + 1):
        last = number == walked
        told = f" of micro-batch {micro_batches if last else number}" if micro_batches > 1 else ""
        stage.forward(number, last, told)
        stage.backward(number, told)


@dataclass
class PipelineRank:
    """A rank of a pipeline, whose actions are walked: what it receives is there before it is needed, and what it sends until it is
    gone."""

    stages: dict[int, Stage]
    schedule: Schedule
    rank: int
    gathering: Gathering
    crossing: Crossing
    ledger: Ledger

    def walk(self) -> None:
        """Walks a step."""
        actions, ledger = self.schedule.ranks[self.rank], self.ledger
        left = {stage: sum(a.stage == stage and a.kind in "WB" for a in actions) for stage in self.stages}
        self._split = {(stage, i) for stage, kind, i in actions if kind == "I"}
        early, expected = early_messages(self.schedule, self.rank), set[int]()
        released = last_uses(actions) if self.gathering == "run" else None
        self._sent = 0
        for position, action in enumerate(actions):
            if not self.crossing.stay:
                self._let_go()
            for ahead in {position, position + (position + 1 in early)} - expected:
                expected.add(ahead)
                self._expect(actions[ahead])
            if released is not None and action.kind != "W":
                self.stages[action.stage].weights.keep(position not in released)
            self._do(action)
            if action.kind != "F":
                self.stages[action.stage].weights.add_up()
            if action.kind in "WB":
                left[action.stage] -= 1
                if not left[action.stage]:
                    ledger.at = f"the sums of gradients of stage {action.stage}"
                    self.stages[action.stage].weights.reduce()
        for stage in self.stages.values():
            stage.weights.close()
        if 0 in self.stages:
            ledger.at = "the sum of the tied matrix's gradients"
            ledger.use("working" if self.schedule.stages - 1 in self.stages else "messages", self.crossing.tied)
        self._let_go()

    def _do(self, action: Action) -> None:
        stage, kind, i = action
        mine, told = self.stages[stage], f" of micro-batch {i + 1} on stage {stage}"
        takes = self.schedule.maker(action) is not None
        if kind == "F":
            if takes:  # so is this, with the first
                self.ledger.give("activations", self.crossing.size)
            mine.forward(i, False, told)
        elif kind == "W":
            mine.rest(i, told)
        else:
            if takes:
                self.ledger.give("activations", self.crossing.size)
            mine.backward(i, told, kind == "I", self.crossing.size * takes)
        target = stage + (1 if kind == "F" else -1)
        if kind != "W" and 0 <= target < self.schedule.stages:
            self._send(target)

    def _expect(self, action: Action) -> None:
        maker = self.schedule.maker(action)
        if maker is not None and self.schedule.rank_of[maker.stage] != self.rank:
            self.ledger.take("activations", self.crossing.size)

    def _send(self, target: int) -> None:
        here = self.schedule.rank_of[target] == self.rank
        self.ledger.take("activations" if here else "messages", self.crossing.size)
        self._sent += 0 if here else self.crossing.size

    def _let_go(self) -> None:
        self.ledger.give("messages", self._sent)
        self._sent = 0
