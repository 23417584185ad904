"""The host waits for a GPU once a step: on every layout, under every rule."""

import pytest
import torch

from host_waits import HostWaits
from parity import run_layout, small_config, step_input, with_layout
from rowwise.optim.build import build_optimizer
from rowwise.parallel.mesh import make_mesh
from rowwise.trainer.build import build_model
from rowwise.trainer.data.open import open_data
from rowwise.trainer.evaluate import evaluate
from rowwise.trainer.feed import eval_batches, train_batches
from rowwise.trainer.parallelize import parallelize
from rowwise.trainer.update import make_update

MODEL = ("model.dim=12", "model.heads=4", "model.kv_heads=2", "model.head_dim=6", "model.ffn_dim=9", "model.layers=2",
         "batch.global_size=8", "steps=12")  # fmt: skip
LOW = ("optim.rank=4", "optim.refresh_every=2")
PRUNED = ("sparsity.update_every=2", "sparsity.density=0.5")
PIPELINE = {"pipeline": 2, "pipeline_schedule": "zb_h1"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("waits")


def waits_of_steps(workers, configs):
    """Of each configuration, the waits of steps 1 and 2 and of an evaluation."""
    mesh, found = make_mesh(configs[0].parallel, workers), []
    for config in configs:
        engine, sparsity = parallelize(build_model(config, mesh), config, mesh)
        optimizer = build_optimizer(engine.model, config.optim, config.seed)
        update = make_update(config, mesh, engine, optimizer, sparsity)
        data = open_data(config.data, config.batch.seq_len, config.model.vocab_size)
        stream = train_batches(config, mesh, data, 0)
        kept = {} if sparsity is None else sparsity.named_state()
        host = [t for name, t in kept.items() if name.endswith(".threshold")]
        entries = []
        for step in (1, 2):
            batches = next(stream)
            with HostWaits(host) as waits:
                update(step_input(config, step, batches))
                optimizer.zero_grad()
            entries.append(waits.sites)
        held_out = list(eval_batches(config, mesh, data))
        with HostWaits() as waits:
            evaluate(engine, held_out)
        found.append([*entries, waits.sites])
    return found


# Steps 1 and 2: what they wait for; None for those that find new directions or masks.
RULES = {
    "plain": ((), (1, 1)),
    "one micro-batch": (("batch.micro_size=8",), (1, 1)),
    "not clipped": (("clip_norm=0",), (1, 1)),
    "fp16": (("precision=fp16",), (1, 1)),
    "bf16": (("precision=bf16",), (1, 1)),
    "in_backward": (("optim.in_backward=true", "clip_norm=0", "batch.micro_size=8"), (1, 1)),
    **{
        rule: ((f"optim={rule}",), (1, 1))
        for rule in ("lion", "adamw8bit", "lion8bit", "adafactor", "muon", "apollo_mini")
    },
    **{rule: ((f"optim={rule}", *LOW), (1, 1)) for rule in ("dct", "apollo")},
    **{rule: ((f"optim={rule}", *LOW), (None, 1)) for rule in ("galore", "fira")},
    **{rule: ((f"sparsity={rule}", *PRUNED), (1, None)) for rule in ("set", "rigl")},
    "gradual": (("sparsity=gradual", *PRUNED, "sparsity.start_at=2"), (1, None)),
}


@pytest.mark.parametrize(
    ("world", "layout", "cases"),
    [
        (1, {}, RULES),
        (2, {"zero": 0}, {"in_backward": (("optim.in_backward=true", "clip_norm=0", "batch.micro_size=4"), (1, 1))}),
        (2, {"zero": 3}, {name: RULES[name] for name in ("plain", "fp16", "muon", "adafactor")}),
        (2, PIPELINE, {"plain": RULES["plain"]}),
        # The second: whether this rank's own gradients may be used.
        (2, PIPELINE | {"post_validation": True}, {"plain": ((), (2, 2))}),
    ],
    ids=["alone", "replicas", "shards", "pipeline", "post-validation"],
)
def test_a_step_waits_once(ranks, folder, world, layout, cases):
    two = f"batch.micro_size={8 // world // 2 if 'pipeline' not in layout else 2}"  # micro-batches, and four under a pipeline
    configs = [
        with_layout(small_config(folder, *MODEL, two, *options), world, **layout) for options, _ in cases.values()
    ]
    for found in ranks.run(waits_of_steps, world, configs):
        for (name, (_, expected)), (*steps, evaluation) in zip(cases.items(), found, strict=True):
            for step, (sites, count) in enumerate(zip(steps, expected, strict=True), 1):
                assert count is None or len(sites) == count, f"{name}, step {step}: {sites}"
            assert len(evaluation) == 1, f"{name}: {evaluation}"


def reads_of_the_harness(workers, config):
    """What the harness of law 2 takes to be the host's that is not."""
    with HostWaits() as waits:
        run_layout(workers, config, steps=1)
    return [site for site in waits.sites if site.endswith("numpy")]


def test_the_harness_copies_what_it_reads(ranks, folder):
    """It runs on GPUs too."""
    config = small_config(folder, *MODEL, *PRUNED, "sparsity=set")
    assert ranks.run(reads_of_the_harness, 1, with_layout(config, 1)) == [[]]


def test_what_waits_is_counted():
    """Each way to look at a number, once; what only asks the device for more, not at all."""
    x = torch.arange(4.0)
    looks = [
        lambda: x.sum().item(), lambda: float(x[0]), lambda: int(x[1]), lambda: bool(x.any()), lambda: x.tolist(),
        lambda: x.cpu(), lambda: x.numpy(), lambda: x.nonzero(), lambda: x[x > 1], lambda: x.to("cpu"),
        lambda: torch.tensor([1.0], device="cpu"), lambda: torch.equal(x, x), lambda: torch.linalg.eigh(torch.eye(2)),
    ]  # fmt: skip
    for number, look in enumerate(looks):
        with HostWaits() as waits:
            look()
        assert len(waits.sites) == 1, f"look {number}: {waits.sites}"
    with HostWaits() as waits:
        x.mul(2).add_(1).masked_fill_(x > 1, 0).to("cpu", non_blocking=True)[1:3].double().topk(1)
        torch.where(x > 1, x, torch.zeros((), device="cpu"))
    assert waits.sites == []
    with HostWaits(host=[x]) as waits:
        x.tolist()
    assert waits.sites == []
