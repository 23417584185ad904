"""`rowwise measure` times this machine, keeps what it found, and `rowwise plan` takes it."""

import subprocess
import sys
from dataclasses import asdict, replace

import pytest
import torch
import yaml

from rowwise.launch import measure, plan
from rowwise.trainer import machine
from rowwise.trainer.plan.devices import DEVICES, device_named, kept_device, kept_file, with_figures
from rowwise.trainer.plan.forecast import forecast
from rowwise.trainer.plan.require import own_device

FOUND = {
    "flops": 8e10,
    "wide": 1.0,
    "bandwidth": 2e10,
    "step": 1.2e9,
    "step_8bit": 6e8,
    "link": 4e8,
    "ranks": 2,
    "threads": 2,
}
OF_DISK = {"disk": 5e8, "disk_read": 1e9, "disk_room": 4e10, "direct": True}
PLANNED = ["batch.global_size=8", "world_size=1"]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_what_was_timed_is_kept_and_planned_with(cache, tmp_path, monkeypatch, capsys):
    known = device_named("cpu")
    timed = iter([FOUND | OF_DISK, FOUND])
    monkeypatch.setattr(measure, "timed", lambda settings: (measure.device_of(known, 2, found := next(timed)), found))
    assert own_device() == known, "nothing is kept yet"
    assert plan.main([*PLANNED, "device=here"]) == 2
    assert "this machine was not timed yet; `rowwise measure` does it" in capsys.readouterr().err
    for to in ([], [f"to={tmp_path / 'mine.yaml'}"]):
        assert measure.main(to) == 0
        kept = kept_device()
        # The host's cores and the disk are shared by what computes; a disk is remembered.
        assert (kept.flops, kept.link, kept.host, kept.per_machine) == (8e10, 4e8, 2e10, 2)
        assert (kept.step, kept.step_8bit, kept.disk, kept.disk_read, kept.disk_room) == (6e8, 3e8, 2.5e8, 5e8, 2e10)
        assert kept.measured and not kept.cuda
    said = capsys.readouterr().out
    assert "adamw8bit" in said and "600 M/s  numbers that 2 threads of the host step" in said
    assert yaml.safe_load((tmp_path / "mine.yaml").read_text()) == asdict(kept) == asdict(own_device())
    assert plan.main([*PLANNED, "device=here"]) == 0
    assert "of the products that it reaches" in capsys.readouterr().out


def test_what_is_kept_and_is_not_whole_is_passed_over(cache):
    kept_file().parent.mkdir(parents=True)
    kept_file().write_text("memory: 1\nflops: [")
    assert kept_device() is None and own_device().name == "cpu"


def test_measured_figures_are_reached_and_peaks_are_not(tmp_path):
    from forecasts import forecast_config

    config, peaks = forecast_config(tmp_path, 1), device_named("cpu")
    reached = forecast(config, replace(peaks, measured=True)).seconds
    assert reached.products == pytest.approx(forecast(config, peaks).seconds.products * 0.55 / 0.8)


def test_figures_of_a_device_are_given_singly(capsys):
    h100 = DEVICES["h100"]
    assert with_figures(h100, ["device.host_bandwidth=25e9", "device.disk=7e9"]) == replace(h100, host=25e9, disk=7e9)
    words = ["model=llama3_8b", "batch.global_size=64", "world_size=8", "precision=bf16", "device=h100"]
    said = []
    for figures in ([], ["device.flops=1e13", "device.memory=400e9"]):
        plan.main([*words, *figures])
        said.append(capsys.readouterr().out)
    assert "of 84.9 GB a h100" in said[0] and "of 400 GB a h100" in said[1]
    for wrong, why in (
        ("device.hots=3", "unknown key device.hots: device has .*did you mean device.host"),
        ("device.host=0", "device.host=0.0: give a number above 0"),
        ("device.host=fast", "device.host='fast': give a number"),
    ):
        with pytest.raises(ValueError, match=why):
            with_figures(h100, [wrong])


def test_a_disk_is_written_read_and_left_as_it_was(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "BLOCK", 64 << 10)
    found = machine.disk_speed(tmp_path, 1 << 20)
    assert found.write > 0 and found.read > 0 and not list(tmp_path.iterdir())


def test_a_disk_that_is_slow_is_written_for_so_long(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "BLOCK", 64 << 10)
    monkeypatch.setattr(machine, "LONGEST", 0.0)
    sizes = []
    monkeypatch.setattr(machine, "_read", lambda file: sizes.append(file.seek(0, 2)) or sizes[-1])
    machine.disk_speed(tmp_path, 1 << 20)
    assert sizes == [64 << 10] * machine.FILES


def gathered(workers):
    from rowwise.parallel.config import ParallelConfig, resolve_degrees
    from rowwise.parallel.mesh import make_mesh

    torch.set_num_threads(1)
    machine.MOVED, machine.STEPPED, moved = 1 << 20, 1 << 16, (machine.MOVED, machine.STEPPED)
    try:
        mesh = make_mesh(resolve_degrees(ParallelConfig(), workers.world_size), workers)
        figures = machine.compute_figures(mesh.device) if mesh.rank == 0 else {}
        steps = {figure: machine.step_speed(figure) for figure in machine.RULES} if mesh.rank == 0 else {}
        return figures | steps | {"link": machine.gather_speed(mesh.device)}
    finally:
        machine.MOVED, machine.STEPPED = moved


def test_ranks_time_what_they_do(ranks):
    first, second = ranks.run(gathered, 2)
    assert first.keys() >= {"flops", "wide", "bandwidth", "step", "step_8bit", "link"}
    assert all(value > 0 for value in first.values()) and second["link"] == first["link"], "the slowest counts for all"


@pytest.mark.full
def test_this_machine_is_timed(cache, tmp_path):
    command = [sys.executable, "-m", "rowwise.launch.cli", "measure", f"folder={tmp_path}", "gigabytes=0.1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "that each of 2 ranks takes in" in done.stdout or "NCCL" in done.stdout or kept_device().cuda
    assert kept_device().measured and kept_device().disk != device_named("cpu").disk
