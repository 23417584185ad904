"""A pipeline schedule is data: for every rank, the order in which it works.

One unit of work is an `Action` (stage, kind, micro-batch). Kinds: F forward; I the gradient of the input; W the gradient
of the weights; B is I and W together. Stages count along the model; a rank holds one or more of them.

A schedule is written as CSV in torch's format (`torch.distributed.pipelining`): a row a rank, a cell an action such as
`2F0` (stage 2, forward, micro-batch 0); an empty cell means nothing and is left out.
"""

import csv
import re
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

KINDS = ("F", "I", "W", "B")
Key = tuple[bool, int, int]  # of a message: forward, the stage that takes it, micro-batch
_CELL = re.compile(r"(\d+)([FIWB])(\d+)")


class Action(NamedTuple):
    """One unit of work."""

    stage: int
    kind: str
    micro_batch: int

    def __str__(self) -> str:
        return f"{self.stage}{self.kind}{self.micro_batch}"


@dataclass(frozen=True)
class Schedule:
    """Who does what in which order: `ranks[r]` is the order of rank r. `source` names it in messages; `lines[r]` is where its
    order stands in a file."""

    ranks: tuple[tuple[Action, ...], ...]
    source: str = ""
    lines: tuple[int, ...] = field(default=(), compare=False)

    @cached_property
    def rank_of(self) -> dict[int, int]:
        """Stage -> the rank that holds it: the first on which it appears."""
        placed: dict[int, int] = {}
        for rank, actions in enumerate(self.ranks):
            for action in actions:
                placed.setdefault(action.stage, rank)
        return placed

    @cached_property
    def stages(self) -> int:
        return max(self.rank_of) + 1

    @cached_property
    def micro_batches(self) -> int:
        return 1 + max(action.micro_batch for actions in self.ranks for action in actions)

    @cached_property
    def splits_backward(self) -> bool:
        """Whether weight gradients are ever computed apart from input gradients."""
        return any(action.kind == "I" for actions in self.ranks for action in actions)

    @cached_property
    def messages(self) -> list[tuple[int, int, Key]]:
        """(sender, receiver, key) of every message between stages, those of one rank too, in each sender's order."""
        return [
            (sender, self.rank_of[target], (action.kind == "F", target, action.micro_batch))
            for sender, actions in enumerate(self.ranks)
            for action in actions
            if action.kind != "W" and 0 <= (target := action.stage + (1 if action.kind == "F" else -1)) < self.stages
        ]

    @cached_property
    def _backward(self) -> dict[tuple[int, int], Action]:
        """(stage, micro-batch) -> its I or B."""
        return {(a.stage, a.micro_batch): a for actions in self.ranks for a in actions if a.kind in "IB"}

    def maker(self, action: Action) -> Action | None:
        """Returns the action whose message this one takes; None: it takes none."""
        if action.kind == "F":
            return action._replace(stage=action.stage - 1) if action.stage else None
        takes = action.kind != "W" and action.stage + 1 < self.stages
        return self._backward[action.stage + 1, action.micro_batch] if takes else None

    def stages_of(self, rank: int) -> list[int]:
        """Returns the stages that `rank` holds, ascending."""
        return sorted(stage for stage, holder in self.rank_of.items() if holder == rank)

    def forward_only(self, micro_batches: int) -> "Schedule":
        """Returns the schedule of a forward alone, of these stages on these ranks: every micro-batch through one stage, then the
        next."""
        return Schedule(
            tuple(
                tuple(Action(stage, "F", i) for stage in self.stages_of(rank) for i in range(micro_batches))
                for rank in range(len(self.ranks))
            )
        )


def leading_forwards(schedule: Schedule) -> list[int]:
    """Counts how many of each rank's first actions are forwards that need nothing but each other: what can be done before any
    backward, on any rank, begins."""
    lengths = [next((n for n, a in enumerate(actions) if a.kind != "F"), len(actions)) for actions in schedule.ranks]
    while True:
        done = {a for actions, length in zip(schedule.ranks, lengths, strict=True) for a in actions[:length]}
        shorter = [
            next(
                (n for n, a in enumerate(actions[:length]) if a.stage and a._replace(stage=a.stage - 1) not in done),
                length,
            )
            for actions, length in zip(schedule.ranks, lengths, strict=True)
        ]
        if shorter == lengths:
            return lengths
        lengths = shorter


def early_messages(schedule: Schedule, rank: int) -> set[int]:
    """Returns the positions in a rank's order whose message can arrive while the action before is under way: all but those whose
    message other ranks make of what that action makes. A receive posted ahead for one of those would gain nothing, and a wait
    for the whole device during that action (an allocator's, say) would wait for it without end."""
    actions = schedule.ranks[rank]
    followed = _followed(schedule, rank)
    makers = [schedule.maker(action) for action in actions]
    return {n for n, maker in enumerate(makers) if maker is not None and followed[maker] < n}


def _followed(schedule: Schedule, rank: int) -> dict[Action, int]:
    """For every action that makes a message, how many of `rank`'s are done before it can end."""
    followed: dict[Action, int] = {}
    at, reached = [0] * len(schedule.ranks), [0] * len(schedule.ranks)
    waiting: dict[Action, int] = {}  # for an action -> the rank that does
    runnable = list(range(len(schedule.ranks)))
    while runnable:
        here = runnable.pop()
        while at[here] < len(schedule.ranks[here]):
            action = schedule.ranks[here][at[here]]
            maker = schedule.maker(action)
            if maker is not None and maker not in followed:
                waiting[maker] = here
                break
            at[here] += 1
            before = 0 if maker is None else followed[maker]
            reached[here] = at[here] if here == rank else max(reached[here], before)
            followed[action] = reached[here]
            if action in waiting:
                runnable.append(waiting.pop(action))
    return followed


def loop_placement(ranks: int, chunks: int) -> list[list[int]]:
    """Gives rank r the stages r, r + p, r + 2 p, ... of p ranks."""
    return [[rank + chunk * ranks for chunk in range(chunks)] for rank in range(ranks)]


def v_placement(ranks: int) -> list[list[int]]:
    """Gives rank r the stages r and 2 p - 1 - r of p ranks: down and up again."""
    return [[rank, 2 * ranks - 1 - rank] for rank in range(ranks)]


def read_csv(path: Path) -> Schedule:
    """Reads the schedule in `path`. Raises ValueError for a cell that is no action, and names the line."""
    ranks, lines = [], []
    try:
        with path.open(newline="") as file:
            reader = csv.reader(file)
            for row in reader:
                cells = [cell.strip() for cell in row]
                if any(cells) or row:
                    ranks.append(tuple(_parse(cell, path, reader.line_num) for cell in cells if cell))
                    lines.append(reader.line_num)
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"parallel.pipeline_schedule={path}: {error}; give a name or a CSV file that exists") from None
    if not any(ranks):
        raise ValueError(f"{path} holds no actions; a line holds those of one rank, such as 0F0,0F1,0B0,0B1")
    return Schedule(tuple(ranks), str(path), tuple(lines))


def _parse(cell: str, path: Path, line: int) -> Action:
    try:
        return parse_action(cell)
    except ValueError as error:
        raise ValueError(
            f"{path}, line {line}: {error} (messages and gathers follow from the order and are not written)"
        ) from None


def parse_action(text: str) -> Action:
    """Reads the action that `text` writes. Raises ValueError."""
    match = _CELL.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is no action; write stage, one of {', '.join(KINDS)}, micro-batch, such as 2F0")
    return Action(int(match[1]), match[2], int(match[3]))


def write_csv(schedule: Schedule, path: Path) -> None:
    """Writes `schedule` as `read_csv`, and torch, read it."""
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([[str(action) for action in actions] for actions in schedule.ranks])
