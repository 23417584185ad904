"""Law 2 on GPUs: layouts over NCCL, rules and precisions on one rank, against one plain process on the CPU in float64.

Every case has an outcome of its own, and the pool of ranks is kept between them: a rank that dies or hangs costs its
case alone. In a rehearsal the same over gloo.
"""

import functools
import shutil
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gpu_place import Place

import ranks
from parity import TOLERANCE, Trace, assert_all_same, run_on, run_plain, small_config, step_input, with_layout
from ranks import RankPool
from rowwise.kernels.philox import normal_reference
from rowwise.optim.build import build_optimizer
from rowwise.optim.lowrank import projection
from rowwise.parallel.mesh import Workers, make_mesh
from rowwise.trainer.build import build_model
from rowwise.trainer.config import TrainConfig
from rowwise.trainer.data.open import open_data
from rowwise.trainer.feed import train_batches
from rowwise.trainer.metrics import read_metrics
from rowwise.trainer.models import init
from rowwise.trainer.parallelize import parallelize
from rowwise.trainer.prepare import make_writable
from rowwise.trainer.train import train
from rowwise.trainer.update import make_update

STEPS = 3
TIMEOUT_SECONDS = 60  # of NCCL, whose watchdog ends a rank that waits longer
MODEL = ("model.dim=12", "model.heads=4", "model.kv_heads=2", "model.head_dim=6", "model.ffn_dim=9", "model.layers=4",
         "batch.global_size=8", "batch.micro_size=1")  # fmt: skip
TIED = (*MODEL, "model.tie_embeddings=true")
Case = tuple[str, tuple[str, ...], dict[str, Any]]  # its name, overrides, the layout

ZERO: list[Case] = [
    *((f"zero={zero}", MODEL, {"zero": zero}) for zero in range(4)),
    *((f"replicas, zero={zero}", MODEL, {"zero": zero, "replicate": 2}) for zero in (0, 3)),
    ("muon, zero=1", (*MODEL, "optim=muon", "optim.lr=0.01"), {"zero": 1}),
    ("adafactor, zero=2", (*MODEL, "optim=adafactor", "optim.lr=0.01"), {"zero": 2}),
    ("rigl, zero=3", (*MODEL, "sparsity=rigl", "sparsity.update_every=1", "sparsity.density=0.5"), {"zero": 3}),
]
SEQUENCE: list[Case] = [
    ("ulysses", MODEL, {"ulysses": 2}),
    *((f"ring, {order}", MODEL, {"ring": 2, "ring_order": order}) for order in ("contiguous", "zigzag", "striped")),
    ("ring, zero=3", MODEL, {"ring": 2, "zero": 3}),
]
PIPELINE: list[Case] = [
    *((f"{name}, {chunks} a rank", overrides,
       {"pipeline": 2, "pipeline_schedule": name, "virtual_stages": chunks, "zero": zero})
      for name, chunks, overrides, zero in (
          ("gpipe", 1, TIED, 1), ("1f1b", 1, TIED, 3), ("interleaved_1f1b", 2, MODEL, 1), ("zb_h1", 1, TIED, 0),
          ("zb_h2", 1, MODEL, 1), ("zb_v", 2, TIED, 3), ("blockwise", 1, MODEL, 0), ("blockwise", 2, TIED, 3))),
]  # fmt: skip
LATE: list[Case] = [
    ("post-validation, kept", (*TIED, "clip_norm=1e9"),
     {"pipeline": 2, "pipeline_schedule": "zb_h1", "post_validation": True}),
    ("post-validation, undone", (*MODEL, "clip_norm=0.5"),
     {"pipeline": 2, "pipeline_schedule": "zb_v", "virtual_stages": 2, "zero": 3, "post_validation": True}),
]  # fmt: skip
IN_BACKWARD = (*MODEL, "optim.in_backward=true", "clip_norm=0")
# Runs of which a step is traced.
TRACED: list[Case] = [
    (f"{name}, {chunks} a rank", (*TIED, "eval.every=3", "checkpoint.every=2", "parallel.pipeline_trace=2"),
     {"pipeline": 2, "pipeline_schedule": name, "virtual_stages": chunks, "zero": 1})
    for name, chunks in (("zb_v", 2), ("blockwise", 2), ("auto", 1), ("1f1b", 1), ("interleaved_1f1b", 2))
]  # fmt: skip
# On one rank: every rule and every sparse method.
LOW = ("optim.rank=4", "optim.refresh_every=2")
RULES: list[Case] = [
    *((f"zero={zero}", (), {"zero": zero}) for zero in (0, 3)),
    *((rule, (f"optim={rule}", "optim.lr=0.01", *(LOW if low else ())), {"zero": 3})
      for rule, low in (("adamw8bit", False), ("lion", False), ("lion8bit", False), ("adafactor", False), ("muon", False),
                        ("galore", True), ("dct", True), ("fira", True), ("apollo", True))),
    ("apollo_mini", ("optim=apollo_mini", "optim.lr=0.01"), {}),
    *((method, (f"sparsity={method}", "sparsity.update_every=1", "sparsity.density=0.5"), {})
      for method in ("set", "rigl", "gradual", "st3")),
    ("srigl", ("sparsity=srigl", "sparsity.update_every=1", "sparsity.replace=0.6"), {}),
]  # fmt: skip


@functools.cache
def pool() -> RankPool:
    """The ranks of this process's checks."""
    return RankPool(sees_gpus=torch.cuda.is_available())


def check_first(place: Place) -> dict[str, Any]:
    """Stage 3, the default and 8-bit states, on one rank."""
    return law(1, RULES[:3])


def check_rules(place: Place) -> dict[str, Any]:
    """The other rules and sparse methods on one rank, and the step inside the backward."""
    in_backward = law(1, [("in_backward", (*IN_BACKWARD, "batch.micro_size=8"), {"zero": 3})], reported_steps)
    others = law(1, share(place, RULES[3:]))
    return {
        "passed": in_backward["passed"] and others["passed"],
        "ranks": 1,
        "cases": in_backward["cases"] | others["cases"],
    }


def check_zero(place: Place) -> dict[str, Any]:
    """Stages of ZeRO, replicas, rules that exchange messages."""
    return law(place.two_ranks(), share(place, ZERO))


def check_sequence(place: Place) -> dict[str, Any]:
    """Ulysses, and rings in three orders."""
    return law(place.two_ranks(), share(place, SEQUENCE))


def check_pipeline(place: Place) -> dict[str, Any]:
    """Every schedule."""
    return law(place.two_ranks(), share(place, PIPELINE))


def check_late(place: Place) -> dict[str, Any]:
    """Steps that do not wait for the norm, and those inside the backward: what they report."""
    halves = (*IN_BACKWARD, "batch.micro_size=4")
    in_backward: list[Case] = [(f"in_backward, zero={zero}", halves, {"zero": zero}) for zero in (0, 3)]
    return law(place.two_ranks(), share(place, LATE + in_backward), reported_steps)


def check_traces(place: Place) -> dict[str, Any]:
    """Runs that evaluate, save and trace a step; `auto` plans from what it measures."""
    return law(place.two_ranks(), share(place, TRACED), traced_run)


def share(place: Place, cases: list[Case]) -> list[Case]:
    """In a rehearsal every third case, the last among them."""
    return cases[::-3][::-1] if place.rehearsal else cases


def law(world: int, cases: list[Case], steps: Any = None) -> dict[str, Any]:
    """Each case on `world` ranks. `passed` where all hold; of the others what was said. Printed as they come, for a check
    that is given up."""
    outcomes: dict[str, Any] = {}
    if torch.cuda.is_available():  # there a case takes seconds
        ranks.TIMEOUT_SECONDS = 40
    with tempfile.TemporaryDirectory() as folder:
        for name, overrides, layout in cases:
            began = time.perf_counter()
            try:
                config = small_config(Path(folder), *overrides, f"parallel.timeout_seconds={TIMEOUT_SECONDS}")
                config = with_layout(config, world, **layout)
                shutil.rmtree(config.run_dir, ignore_errors=True)
                holds(pool().run(steps or traced_steps, world, config), plain(config))
                outcome = "holds"
            except Exception as error:
                outcome = f"{type(error).__name__}: {str(error)[-1500:]}"
            outcomes[name] = {"outcome": outcome, "seconds": round(time.perf_counter() - began, 2)}
            print(name, outcomes[name], flush=True)
    return {
        "passed": all(found["outcome"] == "holds" for found in outcomes.values()),
        "ranks": world,
        "cases": outcomes,
    }


def plain(config: TrainConfig) -> Trace:
    """One process on the CPU, as a textbook writes it."""
    return run_plain(config, STEPS)


def holds(answers: list[Any], reference: Trace) -> None:
    """Raises AssertionError where what the ranks have differs from the reference."""
    if isinstance(answers[0], Trace):
        assert_all_same(answers, reference)
        return
    for losses, norms in answers:
        np.testing.assert_allclose(losses, reference.losses, rtol=TOLERANCE)
        np.testing.assert_allclose(norms, reference.norms, rtol=TOLERANCE)


def traced_steps(workers: Workers, config: TrainConfig) -> Trace:
    """On every rank: the harness of the tests."""
    return run_on(make_mesh(config.parallel, here(workers)), config, STEPS)


def reported_steps(workers: Workers, config: TrainConfig) -> tuple[list[float], list[float]]:
    """On every rank: losses and gradient norms of steps as a run makes them, each begun before the last is known to be good
    where that may be."""
    mesh = make_mesh(config.parallel, here(workers))
    engine, sparsity = parallelize(build_model(config, mesh), config, mesh)
    optimizer = build_optimizer(engine.model, config.optim, config.seed)
    update = make_update(config, mesh, engine, optimizer, sparsity)
    stream = train_batches(config, mesh, open_data(config.data, config.batch.seq_len, config.model.vocab_size), 0)
    batches, reports = [next(stream) for _ in range(STEPS)], []
    for step in range(STEPS):
        ahead = batches[step + 1] if config.parallel.post_validation and step + 1 < STEPS else None
        reports.append(update(step_input(config, step + 1, batches[step], ahead=ahead)))
        optimizer.zero_grad()
    return [report.loss for report in reports], [report.grad_norm for report in reports]


def traced_run(workers: Workers, config: TrainConfig) -> tuple[list[float], list[float]]:
    """On every rank: a whole run, one step of which is traced; losses and gradient norms."""
    if workers.rank == 0:
        make_writable(Path(config.run_dir))
    train(config, here(workers))
    assert (Path(config.run_dir) / "pipeline/trace.json").exists(), "no step was traced"
    records = read_metrics(Path(config.run_dir))
    return [record["loss"] for record in records], [record["grad_norm"] for record in records]


def here(workers: Workers) -> Workers:
    """With a GPU that exists, and the normal numbers of the CPU, which differ from a GPU's in the last place."""

    def drawn(key: int, start: int, count: int, device: torch.device) -> torch.Tensor:
        return normal_reference(key, start, count, torch.device("cpu")).to(device)

    init.normal = projection.normal = drawn  # type: ignore[assignment]
    gpus = torch.cuda.device_count()
    return replace(workers, local_rank=workers.rank % gpus) if gpus else workers
