"""The records of a run and the checkpoints they belong to, when files of them were lost, damaged or cannot be read: what is
wrong is named, what is sound is gone on with, and nothing begins anew in silence. (Law 6.)"""

import errno
import json
import os
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from parity import small_config
from rowwise.trainer import manifest as manifests
from rowwise.trainer.config import config_from_tree, tree_of
from rowwise.trainer.files import fingerprint, free_name, from_json, full_path, remove, to_json
from rowwise.trainer.lock import is_held, lock_run
from rowwise.trainer.manifest import (
    OtherVersion,
    begin,
    clear_interrupted,
    commit,
    complete_checkpoints,
    damage,
    file_facts,
    find_checkpoints,
    newest_sound,
    prune,
    read_manifest,
    set_aside,
    step_folders,
)
from rowwise.trainer.metrics import MetricsLog, MetricsTail, Recorded, RunMoved, read_metrics
from rowwise.trainer.pruned import kept_gains
from rowwise.trainer.resume import find_resume
from rowwise.trainer.state import TrainState
from runs import manifest_at

LINES = [json.dumps({"step": step, "loss": 1 / step}) for step in range(1, 9)]


def save(checkpoints: Path, step: int, **changed) -> Path:
    checkpoints.parent.mkdir(exist_ok=True)
    folder = begin(checkpoints, step)
    (folder / "__0_0.distcp").write_bytes(bytes([step]) * 100)
    files = {path.name: file_facts(path) for path in folder.iterdir()}
    return commit(folder, {**manifest_at(step), "files": files, **changed})


def write_records(run: Path, lines: list[str], end: str = "") -> None:
    run.mkdir(exist_ok=True)
    (run / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines) + end)


def opened(run: Path, step: int, recorded: Recorded | None = None) -> tuple[list[str], list[str]]:
    """What is in the records after a run has gone on at `step`, and what is said of it."""
    log = MetricsLog(run, step, recorded)
    log.close()
    return (run / "metrics.jsonl").read_text().splitlines(), log.remarks


def digest(run: Path, step: int) -> Recorded:
    write_records(run, LINES[:step])
    log = MetricsLog(run, step)
    recorded = log.sync()
    log.close()
    return recorded


WRONG = {  # lines of steps 1 to 8 -> what stands there, and what is said, at step 6
    "sound": (LINES, None),
    "half a line": ([*LINES[:3], LINES[3][:9], *LINES[4:]], "no record in line 4; step 4 is missing"),
    "no JSON": ([*LINES[:2], "\0\0\0", "[" * 100_000, *LINES[4:]], "no record in line 3 to 4; step 3 to 4 is missing"),
    "other JSON": ([*LINES[:3], '["step", 4]', '{"step": "5"}', '{"step": true}', LINES[5]],
                   "no record in line 4 to 6; step 4 to 5 is missing"),
    "a deleted line": (LINES[:1] + LINES[2:], "step 2 is missing"),
    "the last line": (LINES[:5], "step 6 is missing"),
    "the first line": (LINES[1:], "step 1 is missing"),
    "the file": ([], "step 1 to 6 is missing"),
    "a line twice": ([*LINES[:4], LINES[3], *LINES[4:]], "step 4 stands there again"),
    "lines swapped": ([LINES[1], LINES[0], *LINES[2:]], "the steps are not in their order"),
    "a flipped bit": ([LINES[0].replace("1.0", "1.4"), *LINES[1:]], "a record up to step 6 is not as it was written"),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_damaged_records_are_named_and_kept_aside(tmp_path, what):
    lines, said = WRONG[what]
    recorded = digest(tmp_path, 6)
    write_records(tmp_path, lines, end='{"step": 9, "lo')
    before = (tmp_path / "metrics.jsonl").read_bytes()
    kept, remarks = opened(tmp_path, 6, recorded)
    expected = sorted({line for line in lines if line.startswith('{"step": ') and line.endswith("}")} & set(LINES[:6]))
    if what == "a flipped bit":
        expected = [lines[0], *LINES[1:6]]
    assert kept == expected
    aside = tmp_path / "metrics.jsonl.damaged-1"
    if said is None:
        assert not remarks and not aside.exists()
        return
    assert remarks == [f"{tmp_path}/metrics.jsonl is damaged: {said}; kept as {aside.name}"]
    assert aside.read_bytes() == before, "nothing is lost"
    again = MetricsLog(tmp_path, 6)
    recorded = again.sync()
    again.close()
    assert opened(tmp_path, 6, recorded) == (kept, []), "what the next checkpoint knows is no damage"


def test_records_of_a_run_that_began_from_another(tmp_path):
    write_records(tmp_path, LINES[4:])
    assert opened(tmp_path, 6, Recorded(4)) == (LINES[4:6], [])
    assert opened(tmp_path, 6, Recorded(None)) == (LINES[4:6], []), "an older release did not say"
    write_records(tmp_path, [LINES[2], *LINES[4:]])
    assert "step 3 is of another run" in opened(tmp_path, 6, Recorded(4))[1][0]


def test_records_of_a_run_that_was_cut_off_before_it_first_saved(tmp_path):
    write_records(tmp_path, LINES[:3])
    kept, (said,) = opened(tmp_path, 0)
    assert not kept and "has records up to step 3 of a run that was cut off before it first saved" in said
    assert (tmp_path / "metrics.jsonl.before-1").read_text().splitlines() == LINES[:3]
    assert opened(tmp_path, 0) == ([], [])


def test_what_is_no_record_is_passed_over_by_those_who_read(tmp_path):
    write_records(tmp_path, [LINES[0], '{"st', "7", '{"step": 2, "loss": NaN, "lr": Infinity}'])
    records = [{"step": 1, "loss": 1.0}, {"step": 2, "loss": None, "lr": None}]
    assert read_metrics(tmp_path) == MetricsTail(tmp_path).read() == records
    assert MetricsTail(tmp_path / "nowhere").read() == []


def test_json_has_no_word_for_what_is_no_number(tmp_path):
    tree = {"a": float("nan"), "b": [1.0, float("inf")], "c": {"d": -float("inf")}, "e": (0, "x")}
    assert to_json(tree) == '{"a": null, "b": [1.0, null], "c": {"d": null}, "e": [0, "x"]}'
    log = MetricsLog(tmp_path, 0)
    log.append({"step": 1, **tree})
    log.close()
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()
    with pytest.raises(ValueError, match="nested too deep"):
        from_json(b"[" * 100_000)


def test_what_a_run_measured_once_is_measured_anew_where_its_file_is_damaged(tmp_path, caplog):
    path, gains = tmp_path / "semi_structured.json", [(torch.Size((8, 4)), 1.5), (torch.Size((4, 4)), 0.5)]
    assert kept_gains(path, lambda: gains) == kept_gains(path, list) == gains
    for number, content in enumerate(("", "[[[8, 4], 1.", "[[8, 1.5]]", "7", '[[[8, 4], "x"]]'), 1):
        path.write_text(content)
        assert kept_gains(path, lambda: gains) == gains
        assert len(caplog.messages) == number and f"{path} is damaged" in caplog.messages[-1]


def test_a_run_folder_that_moves_under_way_ends_the_run(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    log = MetricsLog(run, 0)
    log.append({"step": 1})
    run.rename(tmp_path / "elsewhere")
    with pytest.raises(RunMoved, match=f"{run} was moved, removed or replaced under way"):
        log.sync()
    with pytest.raises(FileNotFoundError):
        begin(run / "checkpoints", 1)
    run.mkdir()
    MetricsLog(run, 0).close()
    with pytest.raises(RunMoved):
        log.sync()
    log.close()


FORMS = {  # what is written, and what is said
    "another version": ({"version": 2}, "is of version 2, and this release reads 1: go on with the release that wrote it"),
    "a version that is none": ({"version": "x"}, "is of version x, and this release reads 1"),
    "a key of the future": ({"colour": "red"}, r"is damaged \(colour: Extra"),
    "a missing key": ({"state": None}, r"is damaged \(state: "),
    "a wrong type": ({"tokens": "many"}, r"is damaged \(tokens: "),
    "a state without its position": ({"state": {"step": 4}}, r"is damaged \(state.position: Field required"),
    "files that are numbers": ({"files": {"a": 1}}, r"is damaged \(files.a: "),
    "files elsewhere": ({"files": {"../../x": {"bytes": 1, "sha256": ""}}}, "its files are elsewhere"),
    "a configuration without a model": ({"config": {"resume": "auto"}}, r"is damaged \(config.steps: "),
    "another step": ({"step": 5}, "it is of step 5"),
}  # fmt: skip


@pytest.mark.parametrize("what", FORMS)
def test_a_manifest_of_another_form(tmp_path, what):
    changed, said = FORMS[what]
    checkpoint = save(tmp_path / "checkpoints", 4)
    tree = json.loads((checkpoint / "manifest.json").read_text())
    del tree["checksum"]
    assert tree["version"] == 1
    tree |= changed
    (checkpoint / "manifest.json").write_text(json.dumps({**tree, "checksum": fingerprint(tree)}))
    with pytest.raises(ValueError, match=said) as refusal:
        read_manifest(checkpoint)
    assert isinstance(refusal.value, OtherVersion) == ("version" in what)
    assert newest_sound(tmp_path / "checkpoints") is None


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"7", b"null", b"\xff\xfe", b"{}", b"[" * 100_000, b'{"checksum": 1e999}']
)
def test_a_manifest_that_is_none(tmp_path, content):
    checkpoint = save(tmp_path / "checkpoints", 4)
    (checkpoint / "manifest.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"manifest\.json is damaged"):
        read_manifest(checkpoint)


def test_a_manifest_from_before_there_were_versions(tmp_path):
    checkpoint = save(tmp_path / "checkpoints", 4)
    tree = json.loads((checkpoint / "manifest.json").read_text())
    tree = {key: value for key, value in tree.items() if key not in ("version", "records", "states", "checksum")}
    (checkpoint / "manifest.json").write_text(json.dumps({**tree, "checksum": fingerprint(tree)}))
    assert read_manifest(checkpoint)["step"] == 4


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _loop(path: Path) -> None:
    path.unlink()
    path.symlink_to(path)


def _no_device(path: Path) -> None:
    """Reading this process's memory at 0 is an error of input and output."""
    path.unlink()
    path.symlink_to("/proc/self/mem")


@pytest.mark.parametrize("harm", [_folder, _loop, _no_device])
def test_what_cannot_be_read_is_damage(tmp_path, harm):
    checkpoint = save(tmp_path / "checkpoints", 4)
    older = save(tmp_path / "checkpoints", 2)
    files = read_manifest(checkpoint)["files"]
    harm(checkpoint / "__0_0.distcp")
    assert len(damage(checkpoint, files.items())) == 1
    assert newest_sound(tmp_path / "checkpoints") == older
    harm(checkpoint / "manifest.json")
    with pytest.raises(ValueError, match=r"manifest\.json (cannot be read|is damaged)"):
        read_manifest(checkpoint)


@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES, errno.ESTALE], ids=errno.errorcode.get)
def test_what_a_disk_does_not_give_is_damage(tmp_path, monkeypatch, number):
    checkpoint, original = save(tmp_path / "checkpoints", 4), Path.open

    def fail(self, *words, **more):
        if self.suffix == ".distcp":
            raise OSError(number, os.strerror(number), str(self))
        return original(self, *words, **more)

    files = read_manifest(checkpoint)["files"]
    monkeypatch.setattr(manifests.Path, "open", fail)
    assert damage(checkpoint, files.items()) == [f"__0_0.distcp cannot be read ({os.strerror(number)})"]
    monkeypatch.setattr(manifests.Path, "stat", fail)
    assert damage(checkpoint, files.items()) == [f"__0_0.distcp cannot be read ({os.strerror(number)})"]


def test_files_and_links_among_checkpoints(tmp_path):
    """Where a save, or the next one, would clear a folder: only what is theirs is removed."""
    checkpoints, elsewhere = tmp_path / "checkpoints", tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "keep").touch()
    first = save(checkpoints, 2)
    (checkpoints / "step-00000003.incomplete").write_text("a file")
    (checkpoints / "step-00000004.incomplete").symlink_to(elsewhere)
    (checkpoints / "step-00000005.incomplete").symlink_to(tmp_path / "nowhere")
    clear_interrupted(checkpoints)
    assert list(checkpoints.iterdir()) == [first]
    moved = first.rename(elsewhere / "step-00000002")
    first.symlink_to(moved)
    assert complete_checkpoints(checkpoints) == [first]
    (checkpoints / "step-00000006").write_text("a file where a checkpoint will be")
    second = save(checkpoints, 6)
    prune(checkpoints, 1)
    assert complete_checkpoints(checkpoints) == [second]
    assert {path.name for path in elsewhere.iterdir()} == {"keep", "step-00000002"}
    assert (checkpoints / "step-00000006.damaged").read_text() == "a file where a checkpoint will be"


def test_nothing_that_is_put_aside_takes_the_place_of_another(tmp_path):
    for _ in range(2):
        save(tmp_path / "checkpoints", 4)
        set_aside(tmp_path / "checkpoints", beyond=3)
    names = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert names == {"step-00000004.damaged", "step-00000004.damaged-1"}
    assert free_name(tmp_path / "checkpoints" / "step-00000004.damaged").name.endswith("-2")
    for path in (tmp_path / "checkpoints").iterdir():
        remove(path)
    assert not list((tmp_path / "checkpoints").iterdir())


def _lose_checkpoints(run: Path) -> None:
    remove(run / "checkpoints")


def _lose_mount(run: Path) -> None:
    remove(run / "checkpoints")
    (run / "checkpoints").mkdir()


def _lose_manifests(run: Path) -> None:
    for checkpoint in step_folders(run / "checkpoints"):
        (checkpoint / "manifest.json").unlink()


def _dangling(run: Path) -> None:
    remove(run / "checkpoints")
    (run / "checkpoints").symlink_to("/nowhere/disk")


def _a_file(run: Path) -> None:
    remove(run / "checkpoints")
    (run / "checkpoints").write_text("")


def _other_release(run: Path) -> None:
    save(run / "checkpoints", 8, version=7)


GONE = {
    "all of them": (_lose_checkpoints, "has records up to step 8, and its checkpoints are gone: bring them back, or give"),
    "the disk": (_lose_mount, "has records up to step 8, and its checkpoints are gone"),
    "their manifests": (_lose_manifests, "no sound checkpoint is left: .*step-00000004: manifest.json is missing; mend one, or"),
    "what they are a link to": (_dangling, "checkpoints is a link to /nowhere/disk, which is not there: mount that disk"),
    "the folder": (_a_file, "checkpoints cannot be read .Not a directory"),
    "the release": (_other_release, "step-00000008/manifest.json is of version 7"),
}  # fmt: skip


@pytest.mark.parametrize("resume", ["auto", "never"])
@pytest.mark.parametrize("what", GONE)
def test_lost_checkpoints_stop_a_run_before_a_record_is_touched(tmp_path, what, resume):
    lose, said = GONE[what]
    config = replace(small_config(tmp_path), resume=resume)
    run = Path(config.run_dir)
    write_records(run, LINES)
    save(run / "checkpoints", 4)
    lose(run)
    before = (run / "metrics.jsonl").read_bytes()
    said = (
        said
        if resume == "auto" or "link" in said or "cannot be read" in said
        else "already holds a run, which would be lost"
    )
    with pytest.raises(ValueError, match=said) as refusal:
        find_resume(config, "data")
    assert "\n" not in str(refusal.value)
    assert (run / "metrics.jsonl").read_bytes() == before


def test_a_run_that_never_saved_begins_anew(tmp_path):
    config = small_config(tmp_path)
    write_records(Path(config.run_dir), LINES)
    assert find_resume(config, "data") == []
    assert find_checkpoints(tmp_path / "nowhere") == []


def test_a_lock_that_is_none(tmp_path):
    (tmp_path / ".job").write_bytes(b"\xff\xfe\0")
    lock_run(tmp_path).release()
    (tmp_path / "other").mkdir()
    (tmp_path / "other/.lock").mkdir()
    assert not is_held(tmp_path / "other")


def test_a_home_that_is_none():
    with pytest.raises(ValueError, match="run_dir=~nobody-at-all/x: there is no such user's home"):
        full_path("~nobody-at-all/x", "run_dir")
    assert full_path("~/x", "run_dir") == Path.home() / "x"


def test_the_home_folder_stands_for_its_sign(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    tree = {**tree_of(small_config(tmp_path)), "run_dir": "~/runs/x"}
    assert config_from_tree(tree).run_dir == f"{tmp_path}/runs/x"


def test_the_state_of_a_run_survives_its_manifest(tmp_path):
    checkpoint = save(tmp_path / "checkpoints", 4)
    assert asdict(TrainState.from_tree(read_manifest(checkpoint)["state"])) == manifest_at(4)["state"]
