"""Trackers: a run is one run there over all resumes, and what is sent again is sent under the same step."""

import time
from pathlib import Path

import pytest

from rowwise.trainer import tracker as trackers
from rowwise.trainer.tracker import (
    PACKAGES,
    Mlflow,
    NoTracker,
    TensorBoard,
    Trackio,
    Wandb,
    check_tracker,
    open_tracker,
)

TREE = {"steps": 4, "optim": {"name": "adamw", "lr": 0.1}, "data": {"files": ["a", "b"]}}
STARTS = [[1, 2, 3], [3, 4]]  # the steps of each start: step 3 was made again


def record_of(step: int, start: int) -> dict:
    return {
        "step": step,
        "loss": 1 / step + start,
        "mfu": None,
        "spike": "skipped",
        "density_by_layer": {"a.b": step / 4},
    }


def send(config, run_dir, tree=TREE) -> None:
    """The records of all starts of a run, each with a tracker of its own."""
    for start, steps in enumerate(STARTS):
        tracker = open_tracker(config, run_dir, "run", {**tree, "steps": 4 + start}, steps[0] - 1)
        for step in steps:
            tracker.log(record_of(step, start))
        tracker.close()


def go_back(config, run_dir) -> None:
    """The same records from one tracker, which a rollback took back."""
    tracker = open_tracker(config, run_dir, "run", TREE, STARTS[0][0] - 1)
    for start, steps in enumerate(STARTS):
        if start:
            tracker.go_back(steps[0] - 1)
        for step in steps:
            tracker.log(record_of(step, start))
    tracker.close()


def test_a_package_that_is_not_there_is_named_with_the_command_that_gets_it(monkeypatch):
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    for config in (Wandb(), Mlflow(), Trackio(), TensorBoard()):
        with pytest.raises(
            ValueError, match=rf"tracker={config.name}: .* run pip install {PACKAGES[config.name]}, or give"
        ):
            check_tracker(config)
    check_tracker(NoTracker())


def test_no_password_gets_into_the_files_of_a_run():
    with pytest.raises(
        ValueError, match=r"^tracker.uri=http://me:\*\*\*@host/: .* MLFLOW_TRACKING_URI, which MLflow reads$"
    ):
        check_tracker(Mlflow(uri="http://me:hidden@host/"))


def pieces_of(content: bytes):
    """The records of a LevelDB log behind wandb's 7 bytes, in blocks of 32 KiB: a checksum (4), a length (2), and whether the
    piece is whole (1), a first (2), a middle (3) or a last one (4)."""
    place, whole = 7, b""
    while place + 7 <= len(content):
        if (room := 32768 - place % 32768) < 7:
            place += room
            continue
        length, kind = int.from_bytes(content[place + 4 : place + 6], "little"), content[place + 6]
        if place + 7 + length > len(content):
            return  # it is being written
        whole, place = whole + content[place + 7 : place + 7 + length], place + 7 + length
        if kind in (1, 4):
            yield whole
            whole = b""


def wandb_records(run_dir: Path) -> list:
    """What stands in the files of all starts."""
    from wandb.proto.wandb_internal_pb2 import Record

    files = sorted(run_dir.glob("wandb/offline-run-*/*.wandb"))
    return [Record.FromString(data) for file in files for data in pieces_of(file.read_bytes())]


def test_wandb_has_one_run_in_which_every_record_is(tmp_path):
    send(Wandb(mode="offline"), tmp_path)
    sent = sorted((s, 1 / s + start) for start, steps in enumerate(STARTS) for s in steps)
    made, found, deadline = [], [], time.monotonic() + 20
    while len(made) < len(sent) and time.monotonic() < deadline:  # wandb writes on once it has finished
        found = wandb_records(tmp_path)
        items = [{item.key or item.nested_key[0]: item.value_json for item in one.history.item} for one in found]
        made = sorted((int(item["step"]), float(item["loss"])) for item in items if "loss" in item)
    assert made == sent
    assert {one.run.run_id for one in found} - {""} == {(tmp_path / "wandb_id").read_text()}
    assert {one.metric.step_metric for one in found} - {""} == {"step"}


def test_mlflow_has_one_run_over_resumes(tmp_path, monkeypatch):
    pytest.importorskip("mlflow")
    from mlflow.tracking import MlflowClient  # pyright: ignore[reportMissingImports]

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # a database takes ten seconds to make
    config = Mlflow(uri=f"file:{tmp_path / 'mlruns'}", experiment="tests", group="sweep")
    send(config, tmp_path, TREE | {f"key{n}": "x" * 9999 for n in range(150)})
    client = MlflowClient(config.uri)
    (run,) = client.search_runs([client.get_experiment_by_name("tests").experiment_id])
    assert (run.info.run_name, run.info.status, run.data.tags["group"]) == ("run", "FINISHED", "sweep")
    assert run.data.params["optim.lr"] == "0.1" and run.data.params["steps"] == "4" and len(run.data.params) == 4 + 150
    losses = [(one.step, one.value) for one in client.get_metric_history(run.info.run_id, "loss")]
    assert losses == [(s, 1 / s + start) for start, steps in enumerate(STARTS) for s in steps]
    assert [one.value for one in client.get_metric_history(run.info.run_id, "density_by_layer/a.b")][-1] == 1.0
    assert "mfu" not in run.data.metrics and "spike" not in run.data.metrics


def test_a_tracker_that_is_gone_ends_no_run(tmp_path, monkeypatch, capsys):
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    tracker = open_tracker(Mlflow(uri=f"file:{tmp_path / 'mlruns'}"), tmp_path, "run", TREE, 0)

    def gone(*arguments, **options):
        raise ConnectionError("the server is gone")

    monkeypatch.setattr(tracker._client, "log_batch", gone)
    tracker.log(record_of(1, 0))
    tracker.close()
    assert capsys.readouterr().err.endswith("warning: MLflow did not take all records: the server is gone\n")


def test_trackio_has_one_run_over_resumes(tmp_path, monkeypatch):
    pytest.importorskip("trackio")
    from trackio import sqlite_storage, utils  # pyright: ignore[reportMissingImports]

    for module in (utils, sqlite_storage):
        monkeypatch.setattr(module, "TRACKIO_DIR", tmp_path / "trackio")
    send(Trackio(), tmp_path)
    name = f"run-{(tmp_path / 'trackio_id').read_text()}"
    assert sqlite_storage.SQLiteStorage.get_runs("rowwise") == [name]
    found = [one for one in sqlite_storage.SQLiteStorage.get_logs("rowwise", name) if "loss" in one]
    assert [(one["step"], one["loss"]) for one in found] == [
        (s, 1 / s + start) for start, steps in enumerate(STARTS) for s in steps
    ]
    assert found[-1]["density_by_layer/a.b"] == 1.0


@pytest.mark.parametrize(("logged", "files"), [(send, 2), (go_back, 1)], ids=["resumed", "rolled back"])
def test_tensorboard_drops_what_is_made_again(tmp_path, logged, files):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logged(TensorBoard(), tmp_path)
    assert len(list((tmp_path / "tensorboard").iterdir())) == files
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4]
    losses = {event.step: event.value for event in events.Scalars("loss")}
    assert losses == pytest.approx({1: 1.0, 2: 0.5, 3: 1 / 3 + 1, 4: 1.25})
    assert "spike" not in events.Tags()["scalars"]
