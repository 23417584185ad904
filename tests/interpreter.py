"""Triton's interpreter: the tests of each kernel run it on the CPU, in a process of their own.

Triton reads its environment as it is imported, so nothing here may import it."""

import importlib
import multiprocessing
import os
import traceback
from multiprocessing.connection import Connection
from typing import Any


def interpreted(module: str, function: str, *arguments: Any) -> None:
    """Calls a function of a test module where Triton runs on the CPU."""
    context = multiprocessing.get_context("spawn")  # what forks ranks has imported torch's compiler, and Triton with it
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_call, args=(theirs, module, function, arguments))
    process.start()
    theirs.close()
    with ours:
        failure = ours.recv()
    process.join()
    assert failure is None, failure


def _call(tell: Connection, module: str, function: str, arguments: tuple[Any, ...]) -> None:
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        getattr(importlib.import_module(module), function)(*arguments)
        import triton

        assert triton.knobs.runtime.interpret
        tell.send(None)
    except BaseException:
        tell.send(traceback.format_exc()[-3000:])
