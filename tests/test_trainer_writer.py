"""What is frozen is written twice by a run, and then linked; every checkpoint is whole, and no damage is in both copies. (Law 6.)"""

import errno
import os
import shutil
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import Shard, distribute_tensor

from parity import TOLERANCE, small_config, with_layout
from rowwise.kernels.rows import local
from rowwise.parallel.config import ParallelConfig, resolve_degrees
from rowwise.parallel.mesh import make_mesh
from rowwise.trainer.checkpoint import Saver, load
from rowwise.trainer.manifest import complete_checkpoints, damage, read_manifest, step_folder
from rowwise.trainer.staging import Staging
from rowwise.trainer.writer import bits_of
from runs import assert_survives_kills, run_said, run_train, tensors_in

LORA = ("adapter=lora", "adapter.rank=2", "adapter.alpha=4")
WORLD = 2


def frozen_files(checkpoint: Path) -> list[Path]:
    return sorted(checkpoint.glob("__*_frozen_0.distcp"))


@pytest.fixture(scope="module")
def run(ranks, tmp_path_factory):
    """A fine-tuning of five steps, each saved and kept."""
    folder = tmp_path_factory.mktemp("frozen")
    options = (*LORA, "model.layers=1", "steps=5", "checkpoint.every=1", "checkpoint.keep=0", "batch.micro_size=6")
    config = small_config(folder, *options)
    ranks.run(run_train, WORLD, with_layout(config, WORLD, zero=3))
    return config


def test_what_is_frozen_is_written_twice_and_then_linked(run):
    """Counted in the bytes of files that are new: the frozen part of every later checkpoint takes none."""
    saved, seen = complete_checkpoints(Path(run.run_dir) / "checkpoints")[::-1], set()
    for number, checkpoint in enumerate(saved):
        new = [path for path in checkpoint.iterdir() if path.stat().st_ino not in seen]
        seen |= {path.stat().st_ino for path in new}
        frozen = frozen_files(checkpoint)
        assert len(frozen) == WORLD and all(path.stat().st_size > 50_000 for path in frozen)
        learning = {"manifest.json", ".metadata", *(f"__{rank}_0.distcp" for rank in range(WORLD))}
        assert {path.name for path in new} == learning | ({path.name for path in frozen} if number < 2 else set())
        for file in frozen:
            assert [file.samefile(other / file.name) for other in saved] == [n % 2 == number % 2 for n in range(5)]
        assert not damage(checkpoint, read_manifest(checkpoint)["files"].items())


def test_every_checkpoint_is_whole_by_itself(ranks, run, tmp_path):
    """The others may go; the run ends as it does when nothing was removed, on another layout too."""
    for world in (WORLD, 1):
        folder = tmp_path / str(world)
        shutil.copytree(run.run_dir, folder)
        for checkpoint in complete_checkpoints(folder / "checkpoints"):
            if checkpoint.name != step_folder(folder, 3).name:
                shutil.rmtree(checkpoint)
        config = replace(with_layout(run, world, zero=3), run_dir=str(folder))
        assert "resumed from" in ranks.run(run_said, world, config)[0]
        ours, theirs = (tensors_in(step_folder(Path(c.run_dir) / "checkpoints", 5)) for c in (config, run))
        tolerance = 0 if world == WORLD else TOLERANCE
        for name in theirs:
            torch.testing.assert_close(ours[name], theirs[name], rtol=tolerance, atol=tolerance)


def test_a_frozen_file_that_goes_bad_is_passed_over_for_the_other_copy(ranks, run, tmp_path):
    """The bad bytes are in every checkpoint that links them, and in none between."""
    shutil.copytree(run.run_dir, tmp_path / "run")
    newest, *others = complete_checkpoints(tmp_path / "run/checkpoints")
    for other in others[1::2]:  # as the links of `newest` are
        for file in frozen_files(other):
            file.unlink()
            os.link(newest / file.name, file)
    file = frozen_files(newest)[1]
    with file.open("r+b") as bytes_:
        bytes_.seek(file.stat().st_size // 2)
        bytes_.write(b"\xff\x00\xff")
    said = ranks.run(run_said, WORLD, replace(with_layout(run, WORLD, zero=3), run_dir=str(tmp_path / "run")))[0]
    assert f"{newest} is damaged: {file.name} differs from its checksum; passed over" in said
    assert f"resumed from {others[0]}" in said


def saved_by_hand(workers, folder, how):
    """What of six saves was linked to what, and whether each reads as it was."""
    mesh = make_mesh(resolve_degrees(ParallelConfig(zero=3), workers.world_size), workers)
    still = {
        name: distribute_tensor(torch.randn(rows, 6).to(dtype), mesh.states["shard"], [Shard(0)])
        for name, rows, dtype in [("a", 7, torch.float32), ("b", 1, torch.bfloat16)]
    } | {"c": torch.arange(5, dtype=torch.uint8)}
    learning = {"d": distribute_tensor(torch.randn(9, 3), mesh.states["shard"], [Shard(0)])}
    copied, staging = [], Staging.copy
    failure = {"no links": lambda *_: refuse(), "a lost answer": lost_answer}.get(how, os.link)
    with (
        mock.patch.object(os, "link", failure),
        mock.patch.object(Staging, "copy", lambda self, given: copied.append(sorted(given)) or staging(self, given)),
        Saver(folder, mesh, keep=1 if how == "one alone" else 0, background=True, frozen=frozenset(still)) as saver,
    ):
        expected = []
        for step in range(1, 7):
            local(learning["d"]).add_(1)
            if how == "it changes" and step == 4:
                local(still["a"]).mul_(2)
            if how == "damage" and step == 4:
                saver.wait()
                dist.barrier(mesh.save_group)
                for file in [
                    file for file in frozen_files(step_folder(folder, 2)) if file.name.startswith(f"__{mesh.rank}_")
                ]:
                    file.write_bytes(file.read_bytes()[:-1] + b"?")
            if how == "moved elsewhere" and step == 4:
                saver.wait()
                dist.barrier(mesh.save_group)
                file = step_folder(folder, 2) / f"__{mesh.rank}_frozen_0.distcp"
                file.symlink_to(file.rename(folder / file.name))
            saver.save(step, still | learning, {"step": step})
            expected.append({name: local(t).clone() for name, t in (still | learning).items()})
        saver.wait()
    dist.barrier(mesh.save_group)
    sound = []
    for step, there in enumerate(expected, 1):
        if step_folder(folder, step).exists():
            into = {name: torch.zeros_like(t) for name, t in (still | learning).items()}
            load(step_folder(folder, step), into, mesh)
            sound.append(all(torch.equal(local(into[name]), there[name]) for name in there))
    return sound, copied


def refuse():
    raise OSError(errno.EPERM, os.strerror(errno.EPERM))


def lost_answer(source, target, _link=os.link):
    """As a server does that makes the link, is asked again, and says that it is there."""
    _link(source, target)
    raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))


# How -> of six saves, the number of the one in which the frozen bytes of each were written.
WRITTEN = {
    "as it should be": [1, 2, 1, 2, 1, 2],
    "no links": [1, 2, 3, 4, 5, 6],
    "a lost answer": [1, 2, 3, 4, 5, 6],
    "it changes": [1, 2, 1, 4, 5, 4],
    "damage": [1, 2, 1, 4, 1, 4],
    "moved elsewhere": [1, 2, 1, 2, 1, 2],
    "one alone": [1],
}


@pytest.mark.parametrize("how", WRITTEN)
def test_a_link_is_made_where_that_is_sound_and_a_file_where_not(ranks, tmp_path, how):
    """With a file system that has no links, a server's answer that is lost, a tensor that changes all the same, and bytes that go bad,
    which never spread into another checkpoint."""
    for sound, copied in ranks.run(saved_by_hand, WORLD, tmp_path, how):
        assert sound == [True] * len(WRITTEN[how]) if how != "damage" else sound[2:] == [True] * 4
        linked = [step for step, given in enumerate(copied, 1) if given == ["d"]]
        assert linked == ([2, 3, 4, 5, 6] if how == "one alone" else [3, 6] if how == "it changes" else [3, 4, 5, 6])
    saved = complete_checkpoints(tmp_path)[::-1]
    for name in ("__0_frozen_0.distcp", "__1_frozen_0.distcp"):
        if not all((checkpoint / name).exists() for checkpoint in saved):
            continue
        written = [next(n for n, other in enumerate(saved, 1) if (at / name).samefile(other / name)) for at in saved]
        assert written == WRITTEN[how] and not any((at / name).is_symlink() for at in saved[2:])
    assert frozen_files(saved[0])


def test_bits_differ_where_one_bit_does():
    """Of odd sizes, each dtype, parts of larger tensors, equal numbers, and exchanged ones."""
    chance = torch.Generator().manual_seed(5)
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.uint8):
        whole = (torch.rand(75, 129, generator=chance) * 200).to(dtype)
        part = whole[3:, 1:64]
        first = bits_of({"x": part, "none": whole[:0]})
        assert first == bits_of({"x": part.clone(), "none": whole[:0]}) and first["none"] == 0
        for at in (0, 17, -1):
            changed = part.clone()
            changed.view(-1).view(torch.uint8)[at] ^= 1
            assert bits_of({"x": changed})["x"] != first["x"]
    ones = torch.ones(4096, 512)
    assert bits_of({"x": ones}) != bits_of({"x": 2 * ones})
    assert bits_of({"x": torch.arange(600)}) != bits_of({"x": torch.arange(599, -1, -1)})
    signs = torch.randn(70, 2048, dtype=torch.float64, generator=chance).sign()
    for rows in (signs, signs.float(), torch.randn(70, 2048, generator=chance)):  # in another order
        assert len({bits_of({"x": x})["x"] for x in (rows, rows.roll(1, 0), rows.flip(0), rows.roll(2, 1), -rows)}) == 5
    assert bits_of({}) == {}


@pytest.mark.full
@pytest.mark.parametrize("keep", [1, 2])
def test_killed_at_random_instants(ranks, tmp_path, keep):
    """Also while files are linked: with `keep=1` the second save links."""
    small = small_config(
        tmp_path, *LORA, "steps=1000000", "checkpoint.every=4", f"checkpoint.keep={keep}", "batch.micro_size=6",
        "schedule.warmup_steps=0",
    )  # fmt: skip
    assert_survives_kills(ranks, tmp_path, with_layout(small, 2, zero=3), 6)
