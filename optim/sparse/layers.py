"""The sparse matrices of a model, as one rank has them, and the choice of the largest among their weights."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rowwise.kernels.rows import local, row_offset
from rowwise.optim.rule import rows_like, shard_group
from rowwise.optim.select import Candidates, Cut, Groups, Keys, Problem, select
from rowwise.optim.sparse.masks import count, fill_, join, pack, packed_columns


@dataclass(frozen=True)
class Layer:
    """One sparse matrix. `index`: its place among all sparse matrices of the model; `origin`: the logical position of its
    first weight among all their weights; `row`: of this rank's first row. `mask` is packed and laid like the rows of `p`;
    `first`: the mask that overlaps are counted with; `last`: the mask when it was last counted."""

    name: str
    index: int
    p: nn.Parameter
    origin: int
    row: int
    mask: Tensor
    first: Tensor
    last: Tensor

    @property
    def columns(self) -> int:
        return self.p.size(1)

    @property
    def before(self) -> int:
        """The weights of the matrix that stand before this rank's."""
        return self.row * self.columns

    @property
    def weight(self) -> Tensor:
        """This rank's rows of the matrix."""
        return local(self.p.detach())

    @property
    def bits(self) -> Tensor:
        """This rank's rows of the mask."""
        return local(self.mask)

    @property
    def local_first(self) -> Tensor:
        return local(self.first)

    @property
    def local_last(self) -> Tensor:
        return local(self.last)

    def gradient(self) -> Tensor:
        """Returns this rank's rows of the gradient; none where it has none."""
        return torch.zeros_like(self.weight) if self.p.grad is None else local(self.p.grad)


@dataclass(frozen=True)
class Layers:
    """The sparse matrices of the model, of which `mine` are on this rank. `rows`: the groups that hold the other rows of them;
    `model`: those over which all matrices are spread. `names` and `shapes`: of all."""

    mine: list[Layer]
    names: list[str]
    shapes: list[torch.Size]
    rows: Groups
    model: Groups
    device: torch.device
    dtype: torch.dtype

    @property
    def stages(self) -> Groups:
        """The groups that hold other matrices of the model than this rank's."""
        return self.model[len(self.rows) :]

    @property
    def size(self) -> int:
        """The weights of all sparse matrices."""
        return sum(shape.numel() for shape in self.shapes)

    def choose(self, keys: Sequence[Keys], ks: Sequence[int], bits: int) -> list[Tensor]:
        """Chooses the mask of the k largest keys of every matrix, each on its own. `keys` and `ks` go round `mine`, more than once
        where several choices share their messages. Communicates over `rows`: see `optim.select`."""
        parts = [candidates(self.mine[i % len(self.mine)], key) for i, key in enumerate(keys)]
        problems = [Problem(k, self.size, [part]) for k, part in zip(ks, parts, strict=True)]
        cuts = select(problems, bits, self.rows, self.device)
        return [self.taken(part, cut) for part, cut in zip(parts, cuts, strict=True)]

    def choose_together(self, keys: Sequence[Keys], k: int, bits: int) -> list[Tensor]:
        """Chooses the masks of the k largest keys of all matrices together. Communicates over `model`."""
        parts = [candidates(layer, key) for layer, key in zip(self.mine, keys, strict=True)]
        cut = select([Problem(k, self.size, parts)], bits, self.model, self.device)[0]
        return [self.taken(part, cut) for part in parts]

    def taken(self, part: Candidates, cut: Cut) -> Tensor:
        """Returns the packed mask of what a cut takes."""
        masks = [pack(cut.takes(part, rows, keys)) for rows, keys in part.portions()]
        return join(masks, part.like.size(1), self.device)

    def named_masks(self) -> dict[str, Tensor]:
        """Returns what a checkpoint holds of the masks."""
        return {f"{layer.name}.{key}": getattr(layer, key) for layer in self.mine for key in ("mask", "first", "last")}

    def extra_masks(self) -> dict[str, Tensor]:
        """Makes one more mask for every matrix of this rank, empty, by name."""
        return {layer.name: rows_like(layer.p, packed_columns(layer.columns), torch.uint8) for layer in self.mine}

    def counts(self, masks: Sequence[Tensor], groups: Groups) -> list[int]:
        """Counts how many weights each mask of `mine` has, over all ranks of `groups`; a number for every matrix of the model, 0
        for those that are not there. One all-reduce of as many numbers for each group."""
        counts = self.zeros()
        for layer, mask in zip(self.mine, masks, strict=True):
            counts[layer.index] = count(mask, layer.columns)
        return self.sum(counts, groups)

    def zeros(self, *shape: int) -> Tensor:
        """Makes whole numbers of zero, a row for every matrix of the model."""
        return torch.zeros(len(self.names), *shape, dtype=torch.int64, device=self.device)

    def sum(self, numbers: Tensor, groups: Groups) -> list[Any]:
        """Returns the sum over all ranks of `groups`."""
        for group in groups:
            dist.all_reduce(numbers, group=group)
        return numbers.tolist()


def candidates(layer: Layer, keys: Keys) -> Candidates:
    """Returns the weights of a layer, with ties in their logical order."""
    return Candidates(layer.weight, layer.origin + layer.before, keys)


def find_layers(
    model: nn.Module, names: list[str], shapes: list[torch.Size], stages: dist.ProcessGroup | None
) -> Layers:
    """Finds the sparse matrices `names` of the whole model, those of them that this rank has with full masks. `stages`: the ranks
    that hold the other stages of a pipeline."""
    params = dict(model.named_parameters())
    mine, before = [], 0
    for index, (name, shape) in enumerate(zip(names, shapes, strict=True)):
        if name in params:
            p = params[name]
            masks = [rows_like(p, packed_columns(shape[1]), torch.uint8) for _ in range(3)]
            for mask in masks:
                fill_(local(mask), shape[1])
            mine.append(Layer(name, index, p, before, row_offset(p), *masks))
        before += shape.numel()
    anything = next(iter(params.values()))
    rows = shard_group(anything)
    row_groups = () if rows is None else (rows,)
    everyone = row_groups if stages is None else (*row_groups, stages)
    return Layers(mine, names, shapes, row_groups, everyone, anything.device, anything.dtype)
