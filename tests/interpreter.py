"""Triton's interpreter: the tests of each kernel run it on the CPU, in processes of their own.

Triton reads its environment as it is imported, so nothing here may import it. One process, which has, and torch beside it, forks for
every call."""

import functools
import gc
import importlib
import multiprocessing
import os
import traceback
from multiprocessing.connection import Connection
from types import SimpleNamespace
from typing import Any


def interpreted(module: str, function: str, *arguments: Any) -> None:
    """Calls a function of a test module where Triton runs on the CPU."""
    interpreter = _interpreter()
    interpreter.send((module, function, arguments))
    failure = interpreter.recv()
    assert failure is None, failure


@functools.cache
def _interpreter() -> Connection:
    context = multiprocessing.get_context("spawn")  # what forks ranks has imported torch's compiler, and Triton with it
    ours, theirs = context.Pipe()
    context.Process(target=_serve, args=(theirs,), name="interpreter", daemon=True).start()
    theirs.close()
    return ours


def _serve(calls: Connection) -> None:
    os.environ["TRITON_INTERPRET"] = "1"
    import torch
    import torch.distributed.tensor  # which assert_close imports
    import triton

    assert triton.knobs.runtime.interpret
    _patch_language_once()
    torch.set_num_threads(1)
    gc.freeze()  # what is imported stays, on pages that all forks share until one looks through them
    while True:
        try:
            call = calls.recv()
        except EOFError:  # nobody asks any more
            return
        child = os.fork()
        if child == 0:
            calls.send(_failure(*call))
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if status:
            calls.send(f"{call[:2]} ended with {os.waitstatus_to_exitcode(status)}")


def _patch_language_once() -> None:
    """Has Triton put its interpreter's operations in the place of the language's once, and not anew in every call of a function,
    which takes as long as a dozen of them."""
    from triton import language
    from triton.runtime import interpreter

    names = SimpleNamespace(__globals__={"tl": language, "core": language.core})
    interpreter._patch_lang(names)
    interpreter._patch_lang = lambda function: interpreter._LangPatchScope()


def _failure(module: str, function: str, arguments: tuple[Any, ...]) -> str | None:
    """Makes the call. Returns what went wrong in it."""
    try:
        getattr(importlib.import_module(module), function)(*arguments)
    except BaseException:
        return traceback.format_exc()[-3000:]
    return None
