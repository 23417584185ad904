"""Attention over shared sequences: one layer on two ranks against torch's own attention on one, and against peers.

    python benchmarks/sequence.py                     writes results/sequence.json
    python benchmarks/sequence.py --lengths 2048      shorter

`layer`    forward and backward of one decoder layer: seconds in turns, the most bytes held, bytes sent. One rank attends
           with torch's scaled_dot_product_attention, with documents by a dense mask, which is torch's own way.
`peers`    torch's context_parallel and yunchang (USP), where they run: the forward of attention alone. What keeps one from
           running is written down. (yunchang: pip install yunchang.)
`balance`  scores that each rank of a ring computes: the largest over the mean, and of the time, if every rank waits for the
           slowest at each step of the ring, what `contiguous` takes over what the order does. Counted, for 2 to 64 ranks.
"""

import argparse
import random
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from processes import on_ranks
from record import RESULTS, write_record
from torch import Tensor

from rowwise.kernels.attention import Attend
from rowwise.kernels.visible import Documents, visible_areas
from rowwise.parallel.config import RING_ORDER, ParallelConfig
from rowwise.parallel.mesh import Mesh, SequenceAxes, Workers, make_mesh
from rowwise.parallel.sequence import SequenceAttention, positions_of, runs_of
from rowwise.trainer.models.blocks import Block
from rowwise.trainer.models.config import ModelConfig
from rowwise.trainer.models.rope import rope_tables

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from live_bytes import LiveBytes
from messages import Messages

RANKS = 2
MODEL = ModelConfig(dim=256, heads=8, kv_heads=4, ffn_dim=704)
ORDERS: tuple[RING_ORDER, ...] = ("contiguous", "zigzag", "striped")


def some_documents(length: int, count: int) -> Documents:
    chance = random.Random(count)
    return Documents(((0, *sorted(chance.sample(range(1, length), count - 1))),))


def torchs_attention(length: int, documents: Documents | None) -> Attend:
    """As one would write it: one call, with a mask made beforehand where there are documents."""
    mask = None
    if documents is not None:
        owner = torch.bucketize(torch.arange(length), torch.tensor(documents.begins[0]), right=True)
        mask = (owner.unsqueeze(1) == owner).tril()

    def attend(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=True).transpose(1, 2)

    return attend


def layer_step(attend: Attend, positions: Tensor, documents: Documents | None) -> Callable[[], None]:
    """Forward and backward of a layer over the tokens at `positions` of one sequence."""
    torch.manual_seed(0)
    block = Block(MODEL)
    x = torch.randn(1, len(positions), MODEL.dim, requires_grad=True)
    cos, sin = rope_tables(positions.unsqueeze(0), MODEL.rope, torch.float32)
    return lambda: block(x, cos, sin, documents, attend).sum().backward()


def meshes(rank: int, ranks: int, port: int) -> dict[str, SequenceAxes]:
    """`ulysses` and `ring` on all ranks. (One process group of the world serves both.)"""
    store = dist.TCPStore("localhost", port)
    mesh: Mesh = make_mesh(ParallelConfig(shard=1, ring=ranks), Workers(rank, ranks, rank, ranks, store))
    assert mesh.sequence is not None
    ring, alone = mesh.sequence.ring, mesh.sequence.ulysses
    return {"ulysses": SequenceAxes(alone, ring, "contiguous"), "ring": mesh.sequence}


def contestants(
    axes: dict[str, SequenceAxes], length: int, documents: Documents | None
) -> dict[str, Callable[[], None]]:
    shares = {"ulysses": axes["ulysses"]} | {f"ring, {order}": replace(axes["ring"], order=order) for order in ORDERS}
    steps = {
        name: layer_step(SequenceAttention(share), positions_of(share, length), documents)
        for name, share in shares.items()
    }
    one_rank = layer_step(torchs_attention(length, documents), torch.arange(length), documents)
    return {"torch, one rank": one_rank if dist.get_rank() == 0 else lambda: None} | steps


def time_layers(rank: int, ranks: int, port: int, lengths: list[int], rounds: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    axes = meshes(rank, ranks, port)
    found: dict[str, Any] = {}
    for length in lengths:
        for label, documents in (("one document", None), ("16 documents", some_documents(length, 16))):
            steps = contestants(axes, length, documents)
            seconds: dict[str, list[float]] = {name: [] for name in steps}
            for _ in range(rounds + 1):
                for name, step in steps.items():
                    dist.barrier()
                    began = time.perf_counter()
                    step()
                    dist.barrier()
                    seconds[name].append(time.perf_counter() - began)
            rows = {name: {"seconds": values[1:], **bytes_of(steps[name])} for name, values in seconds.items()}
            found[f"{length} tokens, {label}"] = rows
    dist.destroy_process_group()
    return found


def bytes_of(step: Callable[[], None]) -> dict[str, int]:
    """The most bytes that a step made and held, and what it sent, on the rank where that is most."""
    with Messages() as messages, LiveBytes() as live:
        step()
        sent = messages.bytes["send"] + messages.bytes["alltoall_base_"] * (RANKS - 1) // RANKS
    totals = torch.tensor([live.peak, sent])
    dist.all_reduce(totals, dist.ReduceOp.MAX)
    peak, sent = totals.tolist()
    return {"peak_bytes": peak, "sent_bytes": sent}


def summarise(found: dict[str, Any]) -> dict[str, Any]:
    """Medians, and how many times faster than torch on one rank, turn by turn."""
    for rows in found.values():
        base = rows["torch, one rank"]
        for row in rows.values():
            ratios = [b / a for a, b in zip(row["seconds"], base["seconds"], strict=True)]
            low, middle, high = quantiles(ratios, n=4)
            row |= {"faster": middle, "quartiles": [low, high], "bytes_ratio": row["peak_bytes"] / base["peak_bytes"]}
        for row in rows.values():
            row["seconds"] = median(row["seconds"])
    return found


def peers(rank: int, ranks: int, port: int, length: int, rounds: int) -> dict[str, Any]:
    """Peer -> seconds of its forward and of ours beside it, or why it does not run here."""
    torch.set_num_threads(1)
    axes = meshes(rank, ranks, port)
    torch.manual_seed(0)
    # Equal heads: neither peer is asked for groups.
    whole = [torch.randn(1, length, MODEL.heads, MODEL.head_size) for _ in range(3)]
    found: dict[str, Any] = {}
    for name, share, make in (
        ("torch context_parallel", axes["ring"], lambda parts: torch_context_parallel(whole)),
        ("yunchang, ulysses", axes["ulysses"], lambda parts: yunchang(ranks, 1, parts)),
        ("yunchang, ring", replace(axes["ring"], order="contiguous"), lambda parts: yunchang(1, ranks, parts)),
    ):
        positions = positions_of(share, length)
        q, k, v = parts = [t[:, positions] for t in whole]
        ours, theirs = (lambda s=share, q=q, k=k, v=v: SequenceAttention(s)(q, k, v)), make(parts)
        try:
            expected, given = ours(), theirs()
            error = float((expected - given).abs().max())
            seconds: dict[str, list[float]] = {"ours": [], "theirs": []}
            for _ in range(rounds):
                for label, forward in (("ours", ours), ("theirs", theirs)):
                    dist.barrier()
                    began = time.perf_counter()
                    forward()
                    dist.barrier()
                    seconds[label].append(time.perf_counter() - began)
            found[name] = {label: median(values) for label, values in seconds.items()} | {"largest_difference": error}
        except Exception as error:
            found[name] = {"does_not_run": f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"}
    dist.destroy_process_group()
    return found


def torch_context_parallel(whole: list[Tensor]) -> Callable[[], Tensor]:
    """It splits whole sequences itself, as `zigzag` does."""

    def forward() -> Tensor:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor.experimental import context_parallel

        buffers = [t.transpose(1, 2).clone() for t in whole]
        with context_parallel(init_device_mesh("cpu", (RANKS,)), buffers=buffers, buffer_seq_dims=[2, 2, 2]):
            return F.scaled_dot_product_attention(*buffers, is_causal=True).transpose(1, 2)

    return forward


def yunchang(ulysses: int, ring: int, parts: list[Tensor]) -> Callable[[], Tensor]:
    def forward() -> Tensor:
        from yunchang import LongContextAttention, set_seq_parallel_pg  # pyright: ignore[reportMissingImports]
        from yunchang.kernels import AttnType  # pyright: ignore[reportMissingImports]

        if (ulysses, ring) not in _made:
            set_seq_parallel_pg(ulysses, ring, dist.get_rank(), dist.get_world_size())
            # Its other kinds call operators that a CPU does not have.
            _made[ulysses, ring] = LongContextAttention(ring_impl_type="basic", attn_type=AttnType.TORCH_MATH)
        return _made[ulysses, ring](*parts, causal=True)

    return forward


_made: dict[tuple[int, int], Any] = {}


def balance(length: int = 1 << 14) -> dict[str, Any]:
    rows: dict[str, Any] = {}
    for ring in (2, 4, 8, 16, 64):
        steps = {order: scores_by_step(order, ring, length) for order in ORDERS}
        slowest = {order: sum(max(step) for step in zip(*work, strict=True)) for order, work in steps.items()}
        for order, work in steps.items():
            totals = [sum(rank) for rank in work]
            rows.setdefault(str(ring), {})[order] = {
                "max_over_mean": max(totals) * ring / sum(totals),
                "faster_than_contiguous": slowest["contiguous"] / slowest[order],
            }
    return {"length": length, "rings": rows}


def scores_by_step(order: RING_ORDER, ring: int, length: int) -> list[list[int]]:
    """For each rank, the scores that it computes at each step of the ring, a head and sequence."""
    held = [runs_of(order, rank, ring, length) for rank in range(ring)]
    return [
        [sum(a.pairs for a in visible_areas(held[rank], held[(rank - step) % ring])) for step in range(ring)]
        for rank in range(ring)
    ]


def show(measured: dict[str, Any]) -> str:
    lines = []
    for case, rows in measured["layer"].items():
        lines.append(
            f"\n{case:<32}{'seconds':>9}{'times faster':>14}{'quartiles':>16}{'MB held':>9}{'ratio':>7}{'MB sent':>9}"
        )
        for name, row in rows.items():
            low, high = row["quartiles"]
            lines.append(
                f"{name:<32}{row['seconds']:>9.3f}{row['faster']:>14.2f}{low:>9.2f}-{high:<6.2f}{row['peak_bytes'] / 1e6:>9.1f}"
                f"{row['bytes_ratio']:>7.2f}{row['sent_bytes'] / 1e6:>9.2f}"
            )
    lines += ["", *(f"{name}: {row}" for name, row in measured["peers"].items())]
    lines.append(f"\n{'ring':<6}{'order':<12}{'max / mean':>11}{'times faster than contiguous':>30}")
    for ring, orders in measured["balance"]["rings"].items():
        for order, row in orders.items():
            lines.append(f"{ring:<6}{order:<12}{row['max_over_mean']:>11.4f}{row['faster_than_contiguous']:>30.2f}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", nargs="+", type=int, default=[2048, 8192])
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    measured = {
        "ranks": RANKS,
        "rounds": options.rounds,
        "layer": summarise(on_ranks(time_layers, RANKS, options.lengths, options.rounds)),
        "peers": on_ranks(peers, RANKS, options.lengths[0], options.rounds),
        "balance": balance(),
    }
    print(show(measured), flush=True)
    print(f"\nwritten: {write_record('sequence', measured).relative_to(RESULTS.parents[1])}")


if __name__ == "__main__":
    main()
