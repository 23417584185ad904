"""The k largest over ranks are those that a sort of the whole finds, ties by logical position, however rows are split. (Law 7.)"""

import pytest
import torch

from live_bytes import LiveBytes
from messages import Messages
from rowwise.kernels.portions import portion_elements
from rowwise.optim.select import BINS, Candidates, Problem, key_bits, magnitude_keys, magnitude_of, next_below, select

HOST = torch.device("cpu")
NUMBER = 8  # bytes of a count


def numbers(kind: str, dtype: torch.dtype) -> torch.Tensor:
    torch.manual_seed(3)
    x = torch.randn(13, 7, dtype=dtype)
    if kind == "ties":
        x = (x * 2).round() / 2  # a few magnitudes, both signs, zeros of both signs
    elif kind == "equal":
        x = torch.full_like(x, -0.25)
    elif kind == "zero":
        x = torch.zeros_like(x)
    elif kind == "tiny":
        x = x * torch.finfo(dtype).smallest_normal / 4  # subnormal
    return x


def largest(x: torch.Tensor, k: int) -> torch.Tensor:
    """The mask of the k largest |x|, of equals the first."""
    order = sorted(range(x.numel()), key=lambda i: (-abs(x.flatten()[i].item()), i))
    mask = torch.zeros(x.numel(), dtype=torch.bool)
    mask[order[:k]] = True
    return mask.view_as(x)


def rows_of(x: torch.Tensor, rank: int, world: int) -> tuple[int, int]:
    chunk = -(-x.size(0) // world)
    return min(rank * chunk, x.size(0)), min((rank + 1) * chunk, x.size(0))


def candidates_of(x: torch.Tensor, start: int, before: int) -> Candidates:
    return Candidates(x, before + start * x.size(1), lambda rows: magnitude_keys(x[rows]))


def choose(workers, cases):
    """For each case (matrices, ks, together): this rank's rows of every mask."""
    torch.distributed.init_process_group("gloo", store=workers.store, rank=workers.rank, world_size=workers.world_size)
    group, found = torch.distributed.group.WORLD, []
    for matrices, ks, together in cases:
        parts, before = [], 0
        for x in matrices:
            start, stop = rows_of(x, workers.rank, workers.world_size)
            parts.append(candidates_of(x[start:stop], start, before))
            before += x.numel()
        problems = [Problem(ks[0], before, parts)] if together else [
            Problem(k, before, [part]) for k, part in zip(ks, parts, strict=True)
        ]  # fmt: skip
        cuts = select(problems, key_bits(matrices[0].dtype), [group], HOST)
        found.append([taken(part, cuts[0 if together else i], x.size(1))
                      for i, (part, x) in enumerate(zip(parts, matrices, strict=True))])  # fmt: skip
    return found


def taken(part: Candidates, cut, columns: int) -> torch.Tensor:
    masks = [cut.takes(part, rows, keys) for rows, keys in part.portions()]
    return torch.cat(masks) if masks else torch.zeros(0, columns, dtype=torch.bool)


@pytest.mark.parametrize("world", [1, 3, 8])
def test_chosen_are_the_largest_of_a_sort(ranks, world, full):
    """On several ranks, unless in full, each dtype and kind of numbers with one number to choose in turn."""
    cases = []
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        for kind in ("distinct", "ties", "equal", "zero", "tiny"):
            x = numbers(kind, dtype)
            cases += [([x, x[:2], x.T.contiguous()], ks, False) for ks in ([40, 1, 90], [0, 14, 91], [1, 7, 2])]
            cases += [([x, x[:2], x.T.contiguous()], [k], True) for k in (1, 100, 196)]
    if world > 1 and not full:
        cases = [cases[6 * i + (i + i // 5 + world) % 6] for i in range(len(cases) // 6)]
    found = ranks.run(choose, world, cases)
    for i, (matrices, ks, together) in enumerate(cases):
        masks = [torch.cat([rank[i][j] for rank in found]) for j in range(len(matrices))]
        if together:
            flat = torch.cat([x.flatten() for x in matrices]).view(1, -1)
            assert torch.equal(torch.cat([m.flatten() for m in masks]), largest(flat, ks[0]).flatten())
        else:
            assert all(torch.equal(m, largest(x, k)) for m, x, k in zip(masks, matrices, ks, strict=True))


def test_what_is_no_candidate_is_not_chosen():
    x = numbers("ties", torch.float32)
    allowed = x > 0
    part = Candidates(x, 0, lambda rows: magnitude_keys(x[rows]).masked_fill_(~allowed[rows], -1))
    (cut,) = select([Problem(9, x.numel(), [part])], 32, [], HOST)
    assert torch.equal(taken(part, cut, 7), largest(x * allowed, 9))
    few = int(allowed.sum())
    with pytest.raises(ValueError, match=rf"{few + 1} are to be chosen, and there are {few} candidates"):
        select([Problem(few + 1, x.numel(), [part])], 32, [], HOST)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_cut_knows_its_magnitude(dtype):
    x = numbers("distinct", dtype)
    (cut,) = select([Problem(20, x.numel(), [candidates_of(x, 0, 0)])], key_bits(dtype), [], HOST)
    assert magnitude_of(cut.bits, dtype) == x.abs().flatten().sort(descending=True).values[19].item()


@pytest.mark.parametrize("kind", ["distinct", "ties", "equal"])
def test_the_next_below_a_cut(kind):
    x = numbers(kind, torch.float32)
    problem = Problem(20, x.numel(), [candidates_of(x, 0, 0)])
    cuts = select([problem], 32, [], HOST)
    (bits,) = next_below([problem], cuts, [], HOST)
    ordered = x.abs().flatten().sort(descending=True).values
    smaller = ordered[ordered < ordered[19]]
    assert (magnitude_of(bits, torch.float32) == smaller[0].item()) if len(smaller) else bits == -1


def test_large_float64_are_told_apart_and_nan_is_above_infinity():
    x = torch.tensor([[1.5, -3e300, float("inf"), float("nan"), 2.0, -1e308]], dtype=torch.float64)
    for k, expected in ((1, [3]), (2, [2, 3]), (4, [1, 2, 3, 5])):
        part = candidates_of(x, 0, 0)
        (cut,) = select([Problem(k, 6, [part])], 64, [], HOST)
        assert taken(part, cut, 6).nonzero()[:, 1].tolist() == expected


def count_messages(workers, rows, dtype, kind):
    torch.distributed.init_process_group("gloo", store=workers.store, rank=workers.rank, world_size=workers.world_size)
    torch.manual_seed(workers.rank)
    x = (torch.ones if kind == "equal" else torch.randn)(rows, 16, dtype=dtype)
    parts = [candidates_of(x, workers.rank * rows, i * 2 * x.numel()) for i in range(5)]
    size = 5 * 2 * x.numel()
    with Messages() as messages:
        select([Problem(7, size, [p]) for p in parts], key_bits(dtype), [torch.distributed.group.WORLD], HOST)
    return dict(messages.calls), messages.bytes["allreduce_"]


@pytest.mark.parametrize("dtype, digits", [(torch.float32, 4), (torch.float64, 8)])
def test_bytes_are_those_of_the_counts_whatever_the_size(ranks, dtype, digits):
    for rows in (8, 512):
        for calls, sent in ranks.run(count_messages, 2, rows, dtype, "random"):
            assert calls == {"allreduce_": digits}
            assert sent == digits * 5 * BINS * NUMBER


def test_ties_cost_as_many_more_messages_as_positions_have_bytes(ranks):
    for rows, bytes_of_a_position in ((8, 2), (512, 3)):  # 1,280 and 81,920 weights
        for calls, sent in ranks.run(count_messages, 2, rows, torch.float32, "equal"):
            assert calls == {"allreduce_": 4 + bytes_of_a_position}
            assert sent == (4 + bytes_of_a_position) * 5 * BINS * NUMBER


def test_memory_is_that_of_a_portion():
    portion = portion_elements()
    for size in (4, 16):
        x = torch.randn(size * portion // 256, 256)
        with LiveBytes() as live:
            select([Problem(x.numel() // 3, x.numel(), [candidates_of(x, 0, 0)])], 32, [], HOST)
        assert live.peak <= 64 * portion, f"{live.peak / portion} bytes for each number of a portion"
