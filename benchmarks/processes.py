"""Ranks for a benchmark."""

import multiprocessing
from typing import Any

import torch.distributed as dist


def on_ranks(function: Any, ranks: int, *arguments: Any) -> Any:
    """What `function(rank, ranks, port, *arguments)` gives on rank 0 of so many processes."""
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    workers = [
        context.Process(target=_answer, args=(results, function, rank, ranks, store.port, *arguments))
        for rank in range(ranks)
    ]
    for worker in workers:
        worker.start()
    found = results.get(timeout=3000)
    for worker in workers:
        worker.join()
    return found


def _answer(results: Any, function: Any, rank: int, *arguments: Any) -> None:
    found = function(rank, *arguments)
    if rank == 0:
        results.put(found)
