"""What installs is what stands in the rooms: the source distribution, and the wheel that is built from it."""

import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "rowwise"
ROOMS = {"conf", "kernels", "launch", "optim", "parallel", "trainer"}
BUILT = """
import os, shutil, sys
from setuptools import build_meta
folder = sys.argv[1]
archive = os.path.join(folder, build_meta.build_sdist(folder))
shutil.unpack_archive(archive, folder, filter="data")
os.chdir(archive.removesuffix(".tar.gz"))
build_meta.build_wheel(folder)
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A folder with both, built from a copy of what stands here, committed or not."""
    source, built = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("built")
    for name in ("pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("src", *ROOMS):
        shutil.copytree(
            ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("*.egg-info", "__pycache__")
        )
    command = [sys.executable, "-c", BUILT, str(built)]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return built


def on_disk() -> set[str]:
    rooms = (path for room in ROOMS for path in (ROOT / room).rglob("*") if path.is_file())
    paths = {path.relative_to(ROOT) for path in rooms if path.parent.name != "__pycache__"}
    return {f"rowwise/{path}" for path in paths | {Path("__init__.py"), Path("py.typed")}}


def test_the_package_links_to_every_room_and_holds_nothing_else():
    links = {path.name: path.readlink() for path in PACKAGE.iterdir() if path.is_symlink()}
    assert links == {room: Path("../..") / room for room in ROOMS}
    assert {path.name for path in PACKAGE.iterdir()} - {"__pycache__"} == {*ROOMS, "__init__.py", "py.typed"}


def test_the_source_distribution_has_what_is_on_disk_and_no_link(built):
    with tarfile.open(next(built.glob("*.tar.gz"))) as archive:
        members = archive.getmembers()
    assert all(member.isfile() or member.isdir() for member in members)
    names = {member.name.partition("/")[2] for member in members if member.isfile()}
    assert {name.removeprefix("src/") for name in names if name.startswith("src/rowwise/")} == on_disk()
    assert {"README.md", "LICENSE", "pyproject.toml"} <= names and not any(name.startswith("tests/") for name in names)


def test_the_wheel_has_what_is_on_disk(built):
    with zipfile.ZipFile(next(built.glob("*.whl"))) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert names == on_disk()
    assert len(names) > 300 and {"rowwise/conf/train.yaml", "rowwise/launch/pages/page.py"} < names
