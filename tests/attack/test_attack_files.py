"""Damage of every file of a run's folder: the next start names it in one line, or ends as the run that was not damaged. No
traceback, no hang, and no record that is lost in silence. (Law 6.)"""

import contextlib
import io
import os
import random
import shutil
from pathlib import Path

import pytest
import torch

from commands import overrides_of
from rowwise.launch import worker
from rowwise.launch.outcome import Ended, Outcome, write_outcome
from rowwise.trainer.files import remove
from rowwise.trainer.manifest import complete_checkpoints
from rowwise.trainer.metrics import read_metrics
from runs import SAME_EVERYWHERE, final_tensors

pytestmark = [pytest.mark.long, pytest.mark.filterwarnings("ignore:torch.distributed is disabled")]

NEWEST, OLDER = "checkpoints/step-00000006", "checkpoints/step-00000004"
FILES = [
    *(f"{checkpoint}/{name}" for checkpoint in (NEWEST, OLDER) for name in ("manifest.json", ".metadata", "__0_0.distcp")),
    "metrics.jsonl", "config.yaml", "memory.json", "outcome.json", ".lock", ".job", ".saved", NEWEST, "checkpoints",
]  # fmt: skip


def flip(path: Path, chance: random.Random) -> None:
    content = bytearray(path.read_bytes() or b"\0")
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    path.write_bytes(content)


def halve(path: Path, chance: random.Random) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path, chance: random.Random) -> None:
    path.write_bytes(b"")


def zero(path: Path, chance: random.Random) -> None:
    """A block that the disk lost."""
    content = bytearray(path.read_bytes())
    at = chance.randrange(max(1, len(content) - 64))
    content[at : at + 64] = bytes(len(content[at : at + 64]))
    path.write_bytes(content)


def grow(path: Path, chance: random.Random) -> None:
    with path.open("ab") as file:
        file.write(chance.randbytes(50))


def noise(path: Path, chance: random.Random) -> None:
    path.write_bytes(chance.randbytes(path.stat().st_size + 1))


def other_json(path: Path, chance: random.Random) -> None:
    path.write_text(chance.choice(["[]\n", "null\n", '{"step": "x"}\n', '{"state": 1}\n', "[" * 50_000 + "\n"]))


def lose(path: Path, chance: random.Random) -> None:
    remove(path)


def folder(path: Path, chance: random.Random) -> None:
    remove(path)
    path.mkdir()


def file(path: Path, chance: random.Random) -> None:
    remove(path)
    path.write_bytes(b"")


def loop(path: Path, chance: random.Random) -> None:
    remove(path)
    path.symlink_to(path.name)


def dangle(path: Path, chance: random.Random) -> None:
    remove(path)
    path.symlink_to("/nowhere/at/all")


def device(path: Path, chance: random.Random) -> None:
    """Reading is an error of input and output; so is writing."""
    remove(path)
    path.symlink_to("/proc/self/mem")


def swap(path: Path, chance: random.Random) -> None:
    """With what has the same name, or place, in the other checkpoint."""
    run = path.parent if NEWEST not in str(path) and OLDER not in str(path) else path.parents[2]
    other = run / "config.yaml" if path.name != "config.yaml" else run / "metrics.jsonl"
    if "step-" in str(path):
        ours, theirs = (NEWEST, OLDER) if NEWEST in str(path) else (OLDER, NEWEST)
        other = Path(str(path).replace(ours, theirs))
    aside = path.with_name("aside")
    path.rename(aside)
    other.rename(path)
    aside.rename(other)


OF_FILES = [flip, flip, flip, halve, empty, zero, grow, noise, other_json, lose, folder, loop, dangle, device, swap]
OF_FOLDERS = [lose, folder, file, loop, dangle, swap]
CASES = [
    (name, harm, number)
    for name in FILES
    for number, harm in enumerate(OF_FOLDERS if name in (NEWEST, "checkpoints") else OF_FILES)
    if not (name == "checkpoints" and harm is swap)
]
assert len(CASES) >= 150


def told(workers, overrides: list[str]) -> tuple[str, str, str]:
    """One rank of a run: how it ended, why, and what it said."""
    with contextlib.redirect_stdout(io.StringIO()) as said, contextlib.redirect_stderr(said):
        try:
            worker.run(lambda workers: worker.resolve(overrides, workers), workers)
            ended = "complete", ""
        except Ended as end:
            ended = end.state, str(end)
    return *ended, said.getvalue()


def records(run: Path) -> list[tuple]:
    """What every run has the same; None where a damaged record has lost it."""
    return [tuple(record.get(key) for key in SAME_EVERYWHERE) for record in read_metrics(run)]


def words(folder: Path, run: Path, steps: int) -> list[str]:
    model = ["model.dim=8", "model.ffn_dim=8", "model.head_dim=4", "schedule=constant", "schedule.warmup_steps=0"]
    saves = ["checkpoint.every=2", "checkpoint.keep=0", "nproc=1"]
    return overrides_of(folder, *model, *saves, f"steps={steps}", f"run_dir={run}")


@pytest.fixture(scope="module")
def saved(ranks, tmp_path_factory):
    """A run of six steps, the folder to copy, and the same run to its eighth."""
    base = tmp_path_factory.mktemp("files")
    assert ranks.run(told, 1, words(base, base / "run", 6))[0][:2] == ("complete", "")
    write_outcome(base / "run", Outcome("complete", None, 6))
    shutil.copytree(base / "run", base / "whole")
    assert ranks.run(told, 1, words(base, base / "whole", 8))[0][:2] == ("complete", "")
    return base, records(base / "whole"), final_tensors(base / "whole")


@pytest.mark.parametrize(("name", "harm", "number"), CASES, ids=lambda value: getattr(value, "__name__", str(value)))
def test_a_damaged_file(ranks, saved, tmp_path, name, harm, number):
    base, whole, tensors = saved
    run = tmp_path / "run"
    shutil.copytree(base / "run", run)
    before = records(run)
    harm(run / name, random.Random(f"{name} {harm.__name__} {number}"))
    state, reason, said = ranks.run(told, 1, words(base, run, 8))[0]
    assert "Traceback" not in said
    assert "\n" not in reason
    if state != "complete":
        assert Path(name).name in reason or str(run) in reason, f"{reason} does not say what is wrong"
        return
    # Whatever happened to what went before, it goes on to the end, and says what it passed over.
    ours = final_tensors(run)
    assert all(torch.equal(ours[key], value) for key, value in tensors.items())
    assert complete_checkpoints(run / "checkpoints")[0].name == "step-00000008"
    if records(run) != whole:
        assert "metrics.jsonl is damaged" in said and [row for row in records(run) if row in whole], said
        kept = b"".join(path.read_bytes() for path in run.glob("metrics.jsonl.damaged-*") if path.is_file())
        assert kept or not os.path.lexists(run / name) or harm in (lose, empty, folder, loop, dangle, device), (
            "kept aside"
        )
    whole_is_gone = name == NEWEST and harm is lose  # as if it had never been saved: its steps come again
    if NEWEST in name and not whole_is_gone and f"resumed from {run}/{OLDER}" in said:
        assert "step-00000006 is damaged: " in said and "passed over" in said
    assert before[:1] == whole[:1]
