"""`rowwise doctor`: what is amiss is found, told with what mends it, and is the exit code."""

import functools
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rowwise.launch import backends, cli, doctor, health
from rowwise.launch.warm import warmed

GB = 1 << 30
AMISS = {
    "an old Python": health.of_python((3, 10, 4), "CPython 3.10.4"),
    "a package": health.of_packages({"torch": "2.13", "numpy": None})[1],
    "a full disk": health.of_disk("here", GB, 100 * GB, "ext4"),
    "a container's shared memory": health.of_shared_memory(64 << 20, 64 << 20, gpus=8),
    "no shared memory": health.of_shared_memory(None, 0, gpus=2),
    "little memory": health.of_memory(64 * GB, GB, None),
    "a bound on memory": health.of_memory(64 * GB, 60 * GB, GB),
    "few files": health.of_open_files(256, 512),
    "no compiler for a GPU": health.of_compilers({"gcc": None}, headers=True, gpus=1)[0],
    "no headers for a GPU": health.of_compilers({"gcc": "12.2"}, headers=False, gpus=1)[1],
    "a torch without CUDA": health.of_devices(0, [], "550.54", None)[0],
    "GPUs that torch does not see": health.of_devices(0, [], "470.1", "13.0")[0],
    "locks that lock nothing": health.of_locks("here", "nfs", False),
    "no locks": health.of_locks("here", "fuse", None, "No locks available"),
    "ranks that do not meet": health.of_collective("gloo", None, 0, "connection refused"),
}
WELL = {
    "this Python": health.of_python((3, 12, 1), "CPython 3.12.1"),
    "a disk": health.of_disk("here", 50 * GB, 100 * GB, "ext4"),
    "shared memory": health.of_shared_memory(8 * GB, 8 * GB, gpus=8),
    "memory": health.of_memory(64 * GB, 60 * GB, 32 * GB),
    "files without number": health.of_open_files(1024, -1),
    "no GPU": health.of_devices(0, [], None, "13.0")[0],
    "ranks": health.of_collective("gloo", 0.004, 4 << 20),
}


@pytest.mark.parametrize("case", AMISS)
def test_what_would_stop_a_run_is_amiss_and_can_be_mended(case):
    assert AMISS[case].state == "amiss" and AMISS[case].mend
    *lines, last = health.report([WELL["memory"], AMISS[case]])
    assert last == f"amiss: {AMISS[case].what}"
    assert lines[1].startswith(f"  ! {AMISS[case].what}") and lines[2].strip() == f"mend: {AMISS[case].mend}"


@pytest.mark.parametrize("case", WELL)
def test_what_is_well_is_said_to_be(case):
    assert WELL[case].state == "ok"
    assert health.report([WELL[case]])[-1] == "nothing that stops a run"


def test_what_only_stops_an_option_is_a_note():
    for one in (
        health.of_shared_memory(64 << 20, 64 << 20, gpus=0),
        health.of_compilers({"g++": None}, headers=True, gpus=0)[0],
        health.of_address_space(8 * GB),
    ):
        assert one is not None and one.state == "note" and one.mend
        assert health.report([one])[-1] == "nothing that stops a run"
    assert health.of_address_space(-1) is None


def test_locks_are_tried(tmp_path, monkeypatch):
    assert doctor.try_locks(tmp_path).state == "ok"
    assert not list(tmp_path.iterdir())
    assert "no lock can be had" in doctor.try_locks(Path("/proc")).text
    monkeypatch.setattr(doctor, "TAKEN", "")  # as where locks exclude nobody
    assert "keeps nobody out" in doctor.try_locks(tmp_path).text


def test_a_disk_that_is_full_is_found(tmp_path):
    """Really, where this user may make one."""
    (tmp_path / "small").mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "small", tmp_path / "small"], capture_output=True, check=False
    )
    if made.returncode:
        pytest.skip("only root mounts")
    try:
        here = next(one for one in doctor.disks(tmp_path / "small") if one.text.startswith("here"))
    finally:
        subprocess.run(["umount", tmp_path / "small"], check=True)
    assert here.state == "amiss" and here.text.endswith("of 1.05 MB free (tmpfs)")


def test_a_package_that_is_missing_is_found(monkeypatch):
    monkeypatch.setattr(
        doctor.importlib.metadata, "requires", lambda name: ["torch>=2", "no-such-thing[x]>=1; x == 'y'"]
    )
    found = doctor.required_packages()
    assert found["torch"] and found["no-such-thing"] is None
    *_, missing = health.of_packages(found)
    assert (missing.state, missing.mend) == ("amiss", "python -m pip install no-such-thing")


def test_ranks_meet_or_it_is_said_why_not(monkeypatch):
    with warmed(beforehand=()) as warm:
        assert backends.try_backend(warm, "gloo").text.startswith("two ranks add up 4.19 MB in ")
        monkeypatch.setattr(backends, "interfaces", lambda: {"GLOO_SOCKET_IFNAME": "nowhere7"})
        failed = backends.try_backend(warm, "gloo")
    assert failed.state == "amiss" and "nowhere7" in failed.text


def test_the_whole_of_it_on_a_machine_where_something_is_amiss(tmp_path):
    """With fewer files than a run opens; and it tells no names."""

    def few() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (512, 512))

    command = [sys.executable, "-m", "rowwise.launch.cli", "doctor", "to=told.txt"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, preexec_fn=few, check=False)
    assert done.returncode == 1, done.stderr
    assert "  ! limits     512 open files, 512 at most\n" in done.stdout
    assert done.stdout.splitlines()[-1] == "amiss: limits"
    for what in ("torch", "devices", "gcc", "memory", "disk", "shared", "locks", "gloo", "nccl"):
        assert f" {what} " in done.stdout
    assert (tmp_path / "told.txt").read_text() == done.stdout
    assert platform.node() not in done.stdout.replace("localhost", "")
    assert [path.name for path in tmp_path.iterdir()] == ["told.txt"]


def test_a_file_that_cannot_be_written_is_refused_at_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(doctor, "examined", lambda folder: pytest.fail("it has looked before"))
    for to in (tmp_path / "nowhere/told.txt", tmp_path):
        assert doctor.main([f"to={to}"]) == 2
        assert capsys.readouterr().err.startswith(f"refused: to={to}: give the name of a file, in a folder")


def test_devices_that_never_answer_are_amiss(tmp_path, monkeypatch):
    """Here a rank whose other never comes."""
    monkeypatch.setattr(doctor, "PATIENCE_SECONDS", 0.2)
    with warmed(beforehand=()) as warm:
        ask, store = warm.ask, str(tmp_path / "store")
        alone = functools.partial(ask, "rowwise.launch.patient:exchange", 0, "gloo", store)
        monkeypatch.setattr(warm, "ask", lambda call, seconds: alone(seconds=seconds))
        (found,), gpus = doctor.of_torch(warm, 0.0)
        began = time.monotonic()
    assert found.text.startswith("no word of it and its devices in 0 s: a driver hangs")
    assert (found.state, gpus) == ("amiss", 0) and found.mend
    assert time.monotonic() - began < 10, "nobody waits for what hangs"


def test_a_home_is_not_told():
    assert health.without_home("/home/ann/x /home/anna /home/ann", "/home/ann") == "~/x /home/anna ~"
    assert health.without_home("/x", "/") == "/x"


def test_versions_are_told_at_once(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("rowwise ")
    loaded = "import sys; from rowwise.launch import cli; cli.main(['--version']); print('torch' in sys.modules)"
    told = subprocess.run([sys.executable, "-c", loaded], capture_output=True, text=True, check=True).stdout
    assert told.endswith(f"Python {platform.python_version()}\nFalse\n")
