"""Carries a schedule out: the stages of this rank, in its order, with messages to the ranks of the stages around them.

    F   y = f(x)                     keeps x and the graph of y; sends y on
    I   dx = dy (df/dx)              frees the graph but for what W needs; sends dx back
    W   dw += dy (df/dw)             what I left (`parallel.defer`); needs no weights
    B   I and W in one backward

Every micro-batch's gradients are added up whole on the stage and cross data-parallel ranks once, after its last W or B.
At stage 3 of ZeRO, weights are gathered block by block as they are used, and freed after each micro-batch, or
(`gathering="run"`) kept for all actions up to those of another stage: at most one stage and one block are whole.

Bytes a rank sends for each micro-batch: B S D in the dtype of computation for each stage boundary and direction, unless
both sides are its own; with a tied embedding, its local rows twice a step between the first stage and the last.
"""

import itertools
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from rowwise.kernels.rows import local
from rowwise.parallel.activations.saved import keeper_of
from rowwise.parallel.channels import Channels
from rowwise.parallel.defer import WeightGradients, deferred
from rowwise.parallel.device import Clock, Mark, device_of
from rowwise.parallel.lanes import Axis, open_lanes, receive_from, send_to
from rowwise.parallel.pipeline_schedule.order import Action, Schedule, early_messages, leading_forwards
from rowwise.parallel.pipeline_schedule.simulate import Gathering, gathers
from rowwise.parallel.pipeline_schedule.trace import Span
from rowwise.parallel.shard import (
    add_up_gradients,
    begin_pass,
    forget_forwards,
    hold_gradients,
    keep_gathered,
    prefetch_within,
    reduce_gradients,
    release_gathered,
    wait_for_gradients,
)

Forward = Callable[[int, int, Tensor | None], Tensor]


class Trace:
    """The timeline of one step on this rank: what each action took, without what it waited for other stages. Marks are set
    on the way and read at the end, so that a device is never waited for while messages are awaited. Make it before the
    step begins."""

    def __init__(self, device: torch.device):
        self.clock = Clock(device_of(device))
        self._marked: list[tuple[Action, Mark, Mark]] = []

    def add(self, action: Action, started: Mark, ended: Mark) -> None:
        self._marked.append((action, started, ended))

    def spans(self) -> list[Span]:
        """Returns (action, start, end) of each action, in seconds since the epoch, once the step is made."""
        return [(action, self.clock.seconds(a), self.clock.seconds(b)) for action, a, b in self._marked]


@dataclass
class _Open:
    """A micro-batch on a stage: between F and its backward `input` and the graph's end `output` (without its numbers; None where
    nothing behind it learns; `one` is in its dtype), and from I to W what is left to do."""

    input: Tensor | None
    output: GradientEdge | None
    one: Tensor
    later: WeightGradients | None


@dataclass
class Step:
    """One step under way on this rank: `done` of its actions are, `opened` is held, `trace` takes their times."""

    forward: Forward
    channels: Channels
    trace: Trace | None
    done: int = 0
    opened: dict[tuple[int, int], _Open] = field(default_factory=dict)


@dataclass
class Pipeline:
    """The stages of this rank and where the others are. `stages`: stage number -> module, sharded or replicated.
    `gathering`: `run` or `micro_batch` at ZeRO stage 3, `none` below. `tied`: where embeddings are tied, what this rank
    has of the first stage's embedding and of the last stage's copy."""

    stages: dict[int, nn.Module]
    schedule: Schedule
    axis: Axis
    gathering: Gathering
    device: torch.device
    tied: tuple[Tensor | None, Tensor | None] | None = None

    def __post_init__(self) -> None:
        ends = self.schedule.rank_of[0], self.schedule.rank_of[self.schedule.stages - 1]
        pairs = {(sender, receiver) for sender, receiver, _ in self.schedule.messages}
        pairs |= {ends, ends[::-1]} if self.tied is not None else set()
        self._lanes = open_lanes(self.axis, {pair for pair in pairs if pair[0] != pair[1]}, self.device)
        for module in self.stages.values():
            prefetch_within(module)
        self._actions = self.schedule.ranks[self.axis.rank]
        self._split = {(stage, i) for stage, kind, i in self._actions if kind == "I"}
        self._released = last_uses(self._actions) if self.gathering == "run" else None
        self._leading = leading_forwards(self.schedule)
        self._early = early_messages(self.schedule, self.axis.rank)

    def forward_backward(
        self, forward: Forward, buffer: Callable[[], Tensor], scale: float, trace: Trace | None = None
    ) -> None:
        """Makes one step of the schedule: `begin` and `finish`."""
        self.finish(self.begin(forward, buffer, trace), scale)

    def begin(self, forward: Forward, buffer: Callable[[], Tensor], trace: Trace | None = None) -> Step:
        """Makes the first forwards of a step, as many as need no backward of any rank; no gradient is touched.

        `forward(stage, micro_batch, x)` gives what the next stage takes, or on the last stage the loss, a scalar; x is
        None on the first stage. `buffer()` makes room for what crosses a boundary.
        """
        self._begin_pass()
        self._refresh_tied()
        step = Step(forward, Channels(self.schedule, self.axis, self._lanes, buffer), trace)
        self._go_on(step, self._leading[self.axis.rank])
        return step

    def finish(self, step: Step, scale: float) -> None:
        """Makes the rest of the step. Leaves in every gradient `scale` times the sum over micro-batches and data-parallel ranks."""
        for module in self.stages.values():
            hold_gradients(module, release_after_backward=self.gathering == "micro_batch")
        self._go_on(step, len(self._actions), scale)
        for module in self.stages.values():
            wait_for_gradients(module)
        self._move_tied_gradient()
        step.channels.close()

    def abandon(self, step: Step) -> None:
        """Drops what `begin` did, on all ranks alike: what it sent is received, and parameters are no longer gathered."""
        step.opened.clear()
        leading = zip(self.schedule.ranks, self._leading, strict=True)
        step.channels.drain([action for actions, count in leading for action in actions[:count]])
        for module in self.stages.values():
            forget_forwards(module)

    def _go_on(self, step: Step, until: int, scale: float = 1.0) -> None:
        left = {
            stage: sum(action.stage == stage and action.kind in "WB" for action in self._actions[step.done :])
            for stage in self.stages
        }
        for position in range(step.done, until):
            action = self._actions[position]
            step.channels.free()
            self._expect(step.channels, position, until)
            if self._released is not None and action.kind != "W":
                keep_gathered(self.stages[action.stage], position not in self._released)
            marks = self._do(action, step, scale)
            if step.trace is not None and marks is not None:
                step.trace.add(action, *marks)
            if action.kind != "F":
                add_up_gradients(self.stages[action.stage])
            if action.kind in "WB":
                left[action.stage] -= 1
                if not left[action.stage]:
                    reduce_gradients(self.stages[action.stage])
        step.done = until

    def forward_only(
        self, forward: Forward, buffer: Callable[[], Tensor], micro_batches: int, refresh: bool = True
    ) -> None:
        """Passes every micro-batch through every stage, without gradients. `refresh`: weights have changed since the last pass."""
        schedule = self.schedule.forward_only(micro_batches)
        self._begin_pass()
        if refresh:
            self._refresh_tied()
        channels = Channels(schedule, self.axis, self._lanes, buffer)
        with torch.no_grad():
            for stage, _, i in schedule.ranks[self.axis.rank]:
                channels.free()
                y = forward(stage, i, channels.receive((True, stage, i)) if stage else None)
                if stage + 1 < schedule.stages:
                    channels.send((True, stage + 1, i), y)
        for module in self.stages.values():
            release_gathered(module)
        channels.close()

    def broadcast_from_last(self, tensor: Tensor) -> None:
        """Sends what the last stage's rank has in `tensor`, to every rank of the pipeline."""
        last = self.schedule.rank_of[self.schedule.stages - 1]
        dist.broadcast(tensor, self.axis.ranks[last], group=self.axis.group)

    def _do(self, action: Action, step: Step, scale: float) -> tuple[Mark, Mark] | None:
        """Takes what the action needs, works, sends what it made. Returns where the work begins and ends, if traced."""
        stage, kind, i = action
        given = step.channels.receive((kind == "F", stage, i)) if self.schedule.maker(action) is not None else None
        clock = step.trace.clock if step.trace is not None else None
        started = None if clock is None else clock.mark()
        made = self._forward(action, step, given) if kind == "F" else self._backward(action, step, given, scale)
        ended = None if clock is None else clock.mark()
        if made is not None:
            step.channels.send((kind == "F", stage + 1 if kind == "F" else stage - 1, i), made)
        return None if started is None or ended is None else (started, ended)

    def _forward(self, action: Action, step: Step, x: Tensor | None) -> Tensor | None:
        """F. Returns what goes to the next stage."""
        stage, _, i = action
        keeper = keeper_of(self.stages[stage])
        later = WeightGradients(*([] if keeper is None else [keeper.read.hold])) if (stage, i) in self._split else None
        if x is not None:
            x.requires_grad_()
        with deferred(later) if later is not None else nullcontext():
            y = step.forward(stage, i, x)
        output = get_gradient_edge(y) if y.requires_grad else None
        step.opened[stage, i] = _Open(x, output, y.new_ones(()), later)
        return y.detach() if stage + 1 < self.schedule.stages else None

    def _backward(self, action: Action, step: Step, dy: Tensor | None, scale: float) -> Tensor | None:
        """I, W or B. Returns what goes to the stage before."""
        stage, kind, i = action
        this = step.opened.pop((stage, i))
        if kind == "W":
            assert this.later is not None
            this.later.run()
            return None
        if this.output is not None:
            # The loss is scaled here: what begins a step need not know the scale.
            torch.autograd.backward([this.output], [this.one * scale if dy is None else dy])
        if kind == "I":
            step.opened[stage, i] = _Open(None, None, this.one, this.later)
        if this.input is None:
            return None
        assert this.input.grad is not None
        return this.input.grad

    def _expect(self, channels: Channels, position: int, until: int) -> None:
        """Makes room for the message of the action at `position`, and for the next one's where it may arrive during it."""
        ahead = position + 1 < until and position + 1 in self._early
        for stage, kind, i in self._actions[position : position + 1 + ahead]:
            if self.schedule.maker(Action(stage, kind, i)) is not None:
                channels.expect((kind == "F", stage, i))

    def _begin_pass(self) -> None:
        for module in self.stages.values():
            begin_pass(module)

    def _refresh_tied(self) -> None:
        """The last stage's copy of the embedding gets the first stage's numbers."""
        if self.tied is not None:
            with torch.no_grad():
                own, copy = (None if p is None else local(p) for p in self.tied)
                self._pass(own, copy, 0, self.schedule.stages - 1)

    def _move_tied_gradient(self) -> None:
        """The gradient of the copy is added to the embedding's own, whose optimizer state is the only one."""
        if self.tied is None or not any(p is not None and p.requires_grad for p in self.tied):
            return
        own, copy = self.tied
        moved = None if own is None else torch.empty_like(local(own))
        given = None
        if copy is not None:
            assert copy.grad is not None
            given, copy.grad = local(copy.grad), None
        self._pass(given, moved, self.schedule.stages - 1, 0)
        if own is not None and moved is not None:
            assert own.grad is not None
            local(own.grad).add_(moved)

    def _pass(self, given: Tensor | None, taken: Tensor | None, source: int, target: int) -> None:
        """`given`, where stage `source` is, into `taken`, where `target` is. The device sends, also what waits off it."""
        sender, receiver = self.schedule.rank_of[source], self.schedule.rank_of[target]
        if given is not None and taken is not None:
            taken.copy_(given)
        elif given is not None:
            send_to(receiver, given.contiguous().to(self.device), self.axis, self._lanes).wait()
        elif taken is not None:
            here = taken if taken.device == self.device else torch.empty_like(taken, device=self.device)
            receive_from(sender, here, self.axis, self._lanes).wait()
            if here is not taken:
                taken.copy_(here)


def last_uses(actions: Sequence[Action]) -> set[int]:
    """Returns the positions of a rank's order after which weights are freed: another stage's are used next."""
    begins = set(gathers(actions, "run"))
    uses = [position for position, action in enumerate(actions) if action.kind != "W"]
    return {use for use, following in itertools.pairwise(uses) if following in begins} | {uses[-1]}
