"""Running ranges of 8-bit codes (Pan et al., *Mesa*): one range of a head, or of 256 channels, for all tokens.

Of a group with least number l_t and largest h_t over all tokens of step t, on all ranks, range c and shift s are

    c += (1 - 0.9) ((h_t - l_t) - c)        s += (1 - 0.9) (l_t - s)        the first step sets them

in float32, as in the authors' code (ziplab/Mesa, `update_clip_val_shift`), with two differences, without which they would depend
on the layout. There a range moves with each micro-batch that its rank sees; here once a step, by the numbers of the global
batch. And there with the batch that it then codes; here it codes those of the next step, since a step's largest number is
known when all ranks have seen theirs. Tokens of a first step have ranges of their own, as those of a group that has never been
finite.
"""

from collections.abc import Collection, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from rowwise.conf.refusal import Refusal, Refusals
from rowwise.kernels.activation_codes import LARGEST, Groups, extremes

DECAY = 0.9  # the lambda of the paper

RANGES_OF_CODES: Refusals = (
    Refusal(
        ("memory.ranges", "memory.compress"),
        lambda run: run.memory.ranges == "running" and run.memory.compress == "none",
        "memory.ranges=running with memory.compress=none: there are no codes that would lie in them; give memory.compress=int8, or "
        "memory.ranges=token",
    ),
    Refusal(
        ("memory.ranges", "parallel.post_validation"),
        lambda run: run.memory.ranges == "running" and run.parallel.post_validation,
        "memory.ranges=running with parallel.post_validation=true: what a pipeline begins ahead, and may undo, would see its "
        "numbers before the ranges have moved, so that codes would depend on the layout; give memory.ranges=token, or "
        "parallel.post_validation=false",
    ),
)


class RunningRanges:
    """The ranges of the results of a rank's `layers`, by the names of layer and result, "4.q". `groups`: those that together are all
    ranks with the same layers; they agree on what was seen."""

    def __init__(self, layers: Collection[str], groups: Sequence[dist.ProcessGroup] = ()):
        self._layers, self._groups = layers, groups
        self._seen: dict[str, Tensor] = {}  # of this step, as `extremes` gives them
        self._state: dict[str, Tensor] = {}
        self._within: dict[str, Tensor] = {}

    def within(self, name: str, groups: Groups, here: int) -> Tensor | None:
        """Returns the least number and the worth of a code of each of the `here` groups that a rank has of a result, (here, 2);
        None where there are none yet."""
        known = self._within.get(name)
        return None if known is None else known[_places(groups, here, known.device)]

    def see(self, name: str, x: Tensor, groups: Groups, tokens: Tensor) -> None:
        """Takes note of the numbers x (N, C) of a result."""
        found = extremes(x, groups, tokens)
        if name not in self._seen:
            self._seen[name] = found.new_full((groups.count, 2), -torch.inf)
        places = _places(groups, len(found), x.device)[:, None].expand(-1, 2)
        self._seen[name].scatter_reduce_(0, places, found, "amax")

    @torch.no_grad()
    def move(self) -> None:
        """Moves every range by what was seen since the last time; all ranks call it after a step. One all-reduce of maxima over the
        ranks with the same layers, of 8 bytes a group of each result."""
        if not self._seen:
            return
        seen, self._seen = dict(sorted(self._seen.items())), {}
        sizes, flat = [len(part) for part in seen.values()], torch.cat(list(seen.values()))
        for group in self._groups:
            dist.all_reduce(flat, dist.ReduceOp.MAX, group)
        none = flat.new_full((1, 2), torch.nan)
        before = torch.cat(
            [self._state.get(name, none.expand(size, 2)) for name, size in zip(seen, sizes, strict=True)]
        )
        moved = move_ranges(before, flat)
        if seen.keys() - self._state.keys():  # the host looks once whether they are numbers
            sound = moved.isfinite().all(1).split(sizes)
            named = {name for name, each in zip(seen, sound, strict=True) if each.all()}
        else:
            named = set(seen)
        self._set({name: part for name, part in zip(seen, moved.split(sizes), strict=True) if name in named})

    def named_state(self) -> Mapping[str, Tensor]:
        """Returns range and shift of each group, (G, 2), by the name of the result: the same on all ranks that have it."""
        return self._state

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Goes on from what `named_state` gave, on all ranks together."""
        self._set({name: part for name, part in state.items() if name.partition(".")[0] in self._layers})

    def _set(self, state: Mapping[str, Tensor]) -> None:
        self._state |= state
        # Of the codes: the least number, and the worth of one.
        self._within |= {name: torch.stack((s[:, 1], s[:, 0] / LARGEST), dim=1) for name, s in state.items()}


def move_ranges(state: Tensor, seen: Tensor) -> Tensor:
    """Moves range and shift (G, 2), NaN where there are none yet, by what was seen, minus the least number and the largest; not
    where that is no number."""
    least, most = -seen[:, 0], seen[:, 1]
    now = torch.stack((most - least, least), dim=1)
    moved = (state - (1 - DECAY) * (state - now)).where(~state.isnan(), now)
    return moved.where(now.isfinite().all(1, keepdim=True), state)


def _places(groups: Groups, here: int, device: torch.device) -> Tensor:
    """Which of a result's groups those are that a rank has."""
    return (groups.first + torch.arange(here, device=device)) // groups.repeat
