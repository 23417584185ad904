"""A pool of workers kept for the whole test run, so that a distributed test costs milliseconds, not process starts.

    def check(workers, x): ...                  # in a test module; runs on every rank
    results = ranks.run(check, 4, x)            # a list, one result a rank

The function gets a `Workers` whose store is its own; it makes its mesh with `make_mesh` (or calls `train`) and may
leave the process group behind. A rank's exception is raised here, with that rank's traceback; where the others do not
end soon, since they wait for the one that failed, the pool is started anew.

Ranks see no GPU and use gloo. Where pytest is given --nccl, those of a world for which there are enough GPUs have one each.
"""

import functools
import gc
import importlib.util
import inspect
import itertools
import multiprocessing
import os
import pickle
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

TIMEOUT_SECONDS = 600  # that nothing here takes on the busiest machine: it hangs
PATIENCE_SECONDS = 5  # with the others, once a rank has failed

DEAD = "the worker died"


class RankFailure(AssertionError):
    """A rank raised; the message is its traceback."""


class RankPools:
    """Runs each world on ranks that see GPUs, where there are enough of the `gpus` of this machine, or else on ranks that see
    none."""

    def __init__(self, gpus: int = 0) -> None:
        self._gpus, self._seeing, self._blind = gpus, RankPool(sees_gpus=True), RankPool()

    def run(self, function: Callable[..., Any], world_size: int, *arguments: Any) -> list[Any]:
        """Runs `function(workers, *arguments)` on `world_size` ranks and returns what each gave back."""
        pool = self._seeing if world_size <= self._gpus else self._blind
        return pool.run(function, world_size, *arguments)

    def close(self) -> None:
        self._seeing.close()
        self._blind.close()


class RankPool:
    def __init__(self, sees_gpus: bool = False) -> None:
        self._sees_gpus = sees_gpus
        self._calls = itertools.count()
        self._processes: list[multiprocessing.process.BaseProcess] = []
        self._pipes: list[Connection] = []
        self._store: Any = None

    def run(self, function: Callable[..., Any], world_size: int, *arguments: Any) -> list[Any]:
        """Runs `function(workers, *arguments)` on `world_size` ranks and returns what each gave back."""
        self._grow(world_size)
        call = next(self._calls)
        for rank in range(world_size):
            order = (inspect.getfile(function), function.__qualname__, rank, world_size, call, arguments)
            self._pipes[rank].send_bytes(pickle.dumps(order))
        results: dict[int, Any] = {}
        failure = None
        while len(results) < world_size:
            patience = TIMEOUT_SECONDS if failure is None else PATIENCE_SECONDS
            ready = wait([self._pipes[r] for r in range(world_size) if r not in results], patience)
            if not ready:
                self.close()
                raise failure or RankFailure(
                    f"{function.__qualname__}: no answer for {TIMEOUT_SECONDS} s; only {sorted(results)} are done"
                )
            for pipe in ready:
                rank = self._pipes.index(pipe)
                good, results[rank] = self._receive(rank)
                if not good and failure is None:
                    failure = RankFailure(f"rank {rank} of {function.__qualname__}:\n{results[rank]}")
        if failure is not None:
            if any(value is DEAD for value in results.values()):
                self.close()
            raise failure
        return [results[rank] for rank in range(world_size)]

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()
        for pipe in self._pipes:
            pipe.close()
        self._processes, self._pipes, self._store = [], [], None

    def _receive(self, rank: int) -> tuple[bool, Any]:
        try:
            return pickle.loads(self._pipes[rank].recv_bytes())
        except EOFError:
            return False, DEAD

    def _grow(self, world_size: int) -> None:
        from torch.distributed import TCPStore

        if self._store is None:
            self._store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
        context = quick_start()
        for _ in range(len(self._processes), world_size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs, self._store.port, self._sees_gpus), daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)


def quick_start() -> Any:
    """Starts processes as forks of a server that has torch and the product loaded: a start costs a tenth of a second."""
    context = multiprocessing.get_context("forkserver")
    # Our own modules cannot be named: in Python 3.11 the server does not know our sys.path.
    context.set_forkserver_preload(
        [
            "rowwise.trainer.train",
            "rowwise.trainer.prepare",
            "rowwise.launch.sweep.search",
            "torch.distributed.checkpoint",
            "torch._dynamo",  # which whatever splits parameters imports: a second in each rank
            "pytest",  # which every test module imports
        ]
    )
    return context


def _work(pipe: Connection, port: int, sees_gpus: bool) -> None:
    """The life of a worker: orders in, results out."""
    if not sees_gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    import torch
    import torch.distributed as dist

    from rowwise.parallel.mesh import Workers
    from rowwise.trainer.models import init

    torch.set_num_threads(1)
    os.fsync = lambda file: None  # no test of the pool cuts the power, and each run would wait for a disk a dozen times
    init.normal = functools.lru_cache(10_000)(
        init.normal
    )  # models of one seed begin with the same numbers again and again
    _learn_shapes_once()
    gc.freeze()  # what the server loaded stays, on pages that all its forks share until one looks through them
    store = dist.TCPStore("localhost", port)
    modules = 0
    while True:
        try:
            file, name, rank, world_size, call, arguments = pickle.loads(pipe.recv_bytes())
        except EOFError:
            return
        try:
            workers = Workers(rank, world_size, rank, world_size, dist.PrefixStore(f"call{call}", store))
            answer = True, _load(file, name)(workers, *arguments)
        except BaseException:
            answer = False, traceback.format_exc()
        if dist.is_initialized():
            dist.destroy_process_group()
        _forget_groups()
        if len(sys.modules) > modules:
            # Modules stay: a look through all of torch's after every call would take longer than many a call.
            gc.freeze()
            modules = len(sys.modules)
        pipe.send_bytes(pickle.dumps(answer))


def _learn_shapes_once() -> None:
    """Has DTensor find out once what shapes an operation makes of what shapes, in which no mesh is, and not anew for every mesh:
    it would run the operation on tensors without memory, which takes as long as a layer's forward."""
    import torch
    from torch.distributed.tensor._dtensor_spec import DTensorSpec
    from torch.distributed.tensor._sharding_prop import OpSchema, ShardingPropagator

    known: dict[Any, Any] = {}
    find = ShardingPropagator._propagate_tensor_meta_non_cached

    def found(propagator: ShardingPropagator, schema: OpSchema) -> Any:
        given = [*schema.args_schema, *itertools.chain(*schema.kwargs_schema.items())]
        if not all(isinstance(value, DTensorSpec | str | int | float | torch.dtype | None) for value in given):
            return find(propagator, schema)
        key = schema.op, *(v.tensor_meta if isinstance(v, DTensorSpec) else (type(v), v) for v in given)
        if key not in known:
            known[key] = find(propagator, schema)
        return known[key]

    ShardingPropagator._propagate_tensor_meta_non_cached = found


def _forget_groups() -> None:
    """A group that is kept has threads that take turns for ever: DTensor's caches hold the meshes that operators first met,
    and models and meshes are in circles."""
    from torch.distributed.tensor import _collective_utils, _redistribute
    from torch.distributed.tensor.debug import _clear_sharding_prop_cache

    _clear_sharding_prop_cache()
    _redistribute.clear_redistribute_planner_cache()
    _redistribute._gen_transform_infos.cache_clear()
    _collective_utils.MeshTopoInfo.build_from_mesh.cache_clear()
    gc.collect()


def _load(file: str, name: str) -> Callable[..., Any]:
    """The function `name` of a test module, which is not importable by name."""
    module_name = Path(file).stem
    if module_name not in sys.modules:
        spec = importlib.util.spec_from_file_location(module_name, file)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[module_name] = module
        spec.loader.exec_module(module)
    found: Any = sys.modules[module_name]
    for part in name.split("."):
        found = getattr(found, part)
    return found
