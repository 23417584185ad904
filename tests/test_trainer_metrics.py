"""What a run tells: metrics.jsonl over resumes, the trackers, the console, the sample."""

import json
import math
import types
from typing import Any

import numpy as np
import pytest
import torch

from parity import small_config, with_layout
from rowwise.launch.compose import compose_tree
from rowwise.optim.lengths import RunLength
from rowwise.trainer.check import check
from rowwise.trainer.config import config_from_tree
from rowwise.trainer.engine import WholeModel
from rowwise.trainer.manifest import CheckpointConfig, begin, commit, complete_checkpoints, file_facts, prune, set_aside
from rowwise.trainer.metrics import MetricsLog, MetricsTail, read_metrics
from rowwise.trainer.models.decoder import parameter_count
from rowwise.trainer.peaks import model_flops_utilization, peak_flops
from rowwise.trainer.sample import generate
from runs import named, run_said, run_train, run_until, run_watched

RECORD = {"step": 1, "loss": 2.5, "grad_norm": 1.0, "lr": 1e-3, "tokens_per_second": 1234.0, "step_seconds": 0.5}


def test_opening_the_log_drops_what_a_checkpoint_does_not_cover(tmp_path):
    log = MetricsLog(tmp_path, 0)
    for step in range(1, 8):
        log.append({"step": step})
    log.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "lo')  # cut off by a crash
    assert [r["step"] for r in read_metrics(tmp_path)] == [1, 2, 3, 4, 5, 6, 7]
    log = MetricsLog(tmp_path, 5)
    log.append({"step": 6})
    log.sync()
    log.close()
    assert (tmp_path / "metrics.jsonl").read_text() == "".join(json.dumps({"step": s}) + "\n" for s in range(1, 7))


def test_a_log_under_way_is_read_bit_by_bit(tmp_path):
    tail = MetricsTail(tmp_path)
    assert tail.read() == []
    log = MetricsLog(tmp_path, 0)
    for step in (1, 2):
        log.append({"step": step})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step"')  # in the middle of a record
    assert [r["step"] for r in tail.read()] == [1, 2]
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(": 3}\n")
    assert [r["step"] for r in tail.read()] == [3]
    assert tail.read() == []
    log.close()
    MetricsLog(tmp_path, 1).append({"step": 2})  # resumed: written anew
    assert [r["step"] for r in tail.read()] == [1, 2]


SILENT = ["steps=2", "data.holdout=0.2", "eval.every=2", "tracker=tensorboard"]


@pytest.mark.parametrize(
    ("world", "options", "degrees"),
    [
        (1, (), {}),
        (2, (), {"zero": 3}),
        (2, ("batch.micro_size=12", "optim.in_backward=true", "clip_norm=0"), {}),
        (2, (), {"pipeline": 2}),
        (2, ("parallel.post_validation=true",), {"pipeline": 2}),
    ],
    ids=["one", "zero 3", "in backward", "pipeline", "post-validation"],
)
def test_a_step_without_valid_tokens_has_no_loss(ranks, tmp_path, world, options, degrees):
    """Documents of one token each, in the data and in what is held out of it: null, and not a perfect 0."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    np.zeros(3000, dtype=np.uint16).tofile(tmp_path / "tokens.bin")
    config = with_layout(small_config(tmp_path, *SILENT, *options), world, **degrees)
    said = ranks.run(run_said, world, config)[0]
    assert [(r["loss"], r["grad_norm"]) for r in read_metrics(tmp_path / "run")] == [(None, 0.0)] * 2
    assert read_metrics(tmp_path / "run")[-1]["eval_loss"] is None
    assert "loss none (no valid token)  grad norm 0.000" in said and "held-out loss none (no valid token)" in said
    tags = EventAccumulator(str(tmp_path / "run/tensorboard")).Reload().Tags()["scalars"]
    assert "grad_norm" in tags and not {"loss", "eval_loss"} & set(tags)


def test_a_step_without_valid_tokens_among_others(ranks, tmp_path):
    """The steps around it have the losses of their tokens alone, and its gradient is zero."""
    stream = np.random.default_rng(0).integers(1, 61, 3000)
    stream[: 13 * 115] = 0
    stream.astype(np.uint16).tofile(tmp_path / "tokens.bin")
    options = ["steps=9", "batch.global_size=1", "batch.micro_size=1", "data.holdout=0", "clip_norm=0"]
    ranks.run(run_train, 1, with_layout(small_config(tmp_path, *options), 1))
    losses = [(r["loss"], r["grad_norm"]) for r in read_metrics(tmp_path / "run")]
    silent = [norm for loss, norm in losses if loss is None]
    assert 0 < len(silent) < 9 and set(silent) == {0.0}
    assert all(2 < loss < 7 and norm > 0 for loss, norm in losses if loss is not None)


def test_tensorboard_goes_on_where_the_run_does(ranks, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = with_layout(small_config(tmp_path, "tracker=tensorboard", "steps=6"), 2)
    ranks.run(run_until, 2, config, 3)
    ranks.run(run_train, 2, config)
    events = EventAccumulator(str(tmp_path / "run/tensorboard")).Reload()
    losses = {event.step: event.value for event in events.Scalars("loss")}
    assert losses == pytest.approx({r["step"]: r["loss"] for r in read_metrics(tmp_path / "run")})
    assert "mfu" not in events.Tags()["scalars"]


def test_wandb_offline_keeps_one_run_over_a_resume(ranks, tmp_path):
    config = small_config(tmp_path, "tracker=wandb", "tracker.mode=offline", "steps=6", "checkpoint.every=2")
    ranks.run(run_until, 2, with_layout(config, 2), 3)
    name = (tmp_path / "run/wandb_id").read_text()
    ranks.run(run_train, 2, with_layout(config, 2))
    assert (tmp_path / "run/wandb_id").read_text() == name
    folders = list((tmp_path / "run/wandb").glob(f"offline-run-*-{name}"))
    assert len(folders) >= 1
    assert len(list((tmp_path / "run/wandb").glob("offline-run-*"))) == len(folders)


def test_the_model_writes_a_sample_at_the_end_on_every_layout(ranks, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("to be or not to be, " * 400)
    said = []
    for world, zero in ((1, 1), (2, 3)):
        tree = ["data=text", f"data.files={text}", "data.holdout=0", "data.mask_documents=false", "model.vocab_size=256",
                "sample.tokens=12", "sample.prompt=to", f"run_dir={tmp_path}/{world}", "steps=2"]  # fmt: skip
        base = ["precision=fp64", "schedule=constant", "model.layers=1", "model.dim=16", "model.heads=2", "model.ffn_dim=16",
                "model.kv_heads=1", "batch.global_size=4", "batch.micro_size=2", "batch.seq_len=16", "eval.every=0"]  # fmt: skip
        config = check(config_from_tree(compose_tree([*base, *tree, f"parallel.zero={zero}"])), world)
        outputs = ranks.run(run_said, world, config)
        said.append(outputs[0].split("the model writes:\n")[1].split("\n── ")[0])
        assert not "".join(outputs[1:])
    assert said[0] == said[1]
    assert said[0].startswith("to")


def test_a_checkpoint_exists_once_it_is_complete(tmp_path):
    def save(step: int) -> None:
        folder = begin(tmp_path, step)
        (folder / "data").write_bytes(b"x" * step)
        commit(folder, {"step": step, "files": {"data": file_facts(folder / "data")}})

    save(1)
    begin(tmp_path, 2)  # interrupted
    assert [p.name for p in complete_checkpoints(tmp_path)] == ["step-00000001"]
    (tmp_path / "step-00000009").mkdir()  # no manifest
    save(3)
    save(100_000_000)
    assert [p.name for p in complete_checkpoints(tmp_path)] == ["step-100000000", "step-00000003", "step-00000001"]
    set_aside(tmp_path, beyond=1)  # as if both were damaged, and a run went on from step 1
    assert [p.name for p in complete_checkpoints(tmp_path)] == ["step-00000001"]
    save(3)
    save(100_000_000)
    prune(tmp_path, 2)
    assert [p.name for p in complete_checkpoints(tmp_path)] == ["step-100000000", "step-00000003"]
    assert not (tmp_path / "step-00000002.incomplete").exists()


def test_a_file_that_rank_zero_does_not_see_is_named(tmp_path):
    folder = begin(tmp_path, 1)
    with pytest.raises(RuntimeError, match="run_dir must be on a file system that all machines share"):
        commit(folder, {"files": {"__1_0.distcp": {"bytes": 3, "sha256": ""}}})


def test_when_saves_are_due():
    every, never = CheckpointConfig(every=4), CheckpointConfig(every=0)
    assert [step for step in range(1, 11) if every.due(step, RunLength(10, 1))] == [4, 8, 10]
    assert [step for step in range(1, 11) if never.due(step, RunLength(10, 1))] == [10]


@pytest.mark.parametrize(
    ("name", "peak"),
    [("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA H800", 989e12), ("NVIDIA GH200 480GB", 989e12),
     ("NVIDIA B200", 2250e12), ("NVIDIA GB200", 2500e12), ("NVIDIA A100-SXM4-80GB", 312e12), ("NVIDIA L40S", 362e12),
     ("NVIDIA GeForce RTX 4090", 165e12), ("NVIDIA T4", None)],
)  # fmt: skip
def test_the_peak_of_a_device_is_known_by_its_name(name, peak):
    assert peak_flops(name) == peak


def test_a_peak_that_is_given_counts_on_any_device():
    assert model_flops_utilization(1e12, torch.device("cpu"), 4e12) == 0.25


def test_no_peak_no_mfu():
    assert model_flops_utilization(1e12, torch.device("cpu")) is None


def test_what_every_rank_holds_is_kept(ranks, tmp_path):
    """memory.json, against the sizes: AdamW in float32 at ZeRO 1, 3 and on a pipeline; masks as bits."""
    for name, options, degrees in (
        ("one", (), {"zero": 1}),
        ("three", (), {"zero": 3}),
        ("pipeline", (), {"pipeline": 2, "zero": 1}),
        ("sparse", ("sparsity=static", "sparsity.density=0.5"), {"zero": 1}),
    ):
        config = named(small_config(tmp_path, "precision=fp32", "steps=1", *options), tmp_path, name)
        ranks.run(run_watched, 2, with_layout(config, 2, **degrees))
        document = json.loads((tmp_path / name / "memory.json").read_text())
        held, total = document["ranks"], 4 * parameter_count(config.model)[0]
        assert document["device"] == "cpu"
        assert len(held) == 2
        assert sum(rank["optimizer"] for rank in held) == 2 * total
        assert sum(rank["parameters"] for rank in held) == total  # what was gathered is let go by then
        assert total <= sum(rank["gradients"] for rank in held) <= 2 * total
        assert all(rank["peak"] > 50_000_000 for rank in held)
        assert all((rank["masks"] > 0) == (name == "sparse") for rank in held)


class Logits(torch.nn.Module):
    """Of any tokens the same, or, after three of them, no numbers."""

    def __init__(self, broken: float | None = None):
        super().__init__()
        self.broken = broken

    def forward(self, inputs, positions):
        logits = torch.tensor([1.0, 3.0, 2.0]).expand(1, inputs.shape[1], 3).clone()
        if self.broken is not None and inputs.shape[1] > 3:
            logits[..., 0] = self.broken
        return logits


def test_the_sample_ends_where_logits_are_not_finite():
    mesh: Any = types.SimpleNamespace(sequence=None, device=torch.device("cpu"))

    def written(temperature: float, broken: float | None = None) -> list[int]:
        replicas: Any = None  # which no gradient is summed over
        engine = WholeModel(Logits(broken), mesh.device, 0, replicas)
        return generate(engine, [1], 8, temperature, 16, 0, mesh)

    for temperature in (0.0, 0.7, 1e-320):
        assert len(written(temperature)) == 9
        for broken in (math.nan, math.inf, -math.inf):
            assert len(written(temperature, broken)) == 4
    assert written(1e-320)[1:] == [1] * 8, "the likeliest"
