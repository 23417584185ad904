"""docs/extending.md does what it says: its files and entries, laid into a copy of the package, pass the tests beside them."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "extending.md"
ROOMS = ("conf", "kernels", "launch", "optim", "parallel", "trainer")


class Block(NamedTuple):
    """A block of the page: of a new file the text, of one that is there the change."""

    path: str
    kind: str
    text: str


BLOCKS = [
    Block(*found) for found in re.findall(r"^`([\w./]+)`:\n\n```(\w+)\n(.*?)^```$", PAGE.read_text(), re.M | re.S)
]
EXERCISES = PAGE.read_text().count("\nThe entry:\n")


def changed(text: str, change: str) -> str:
    """`text` with a diff in it: what begins with a space or - is there once, what begins with + comes behind it."""
    lines = text.splitlines()
    at = -1
    for line in change.splitlines():
        if line == "...":
            continue
        sign, rest = line[:1], line[1:]
        if sign == "+":
            at += 1
            lines.insert(at, rest)
            continue
        assert lines.count(rest) == 1, f"{rest!r} stands {lines.count(rest)} times where the page says once"
        at = lines.index(rest)
        if sign == "-":
            del lines[at]
            at -= 1
    return "\n".join(lines) + "\n"


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    """The package, with all that the page adds; tests stand beside it."""
    folder = tmp_path_factory.mktemp("extended")
    for room in ROOMS:
        shutil.copytree(ROOT / room, folder / "rowwise" / room, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(
        ROOT / "src/rowwise/__init__.py", folder / "rowwise"
    )  # else it comes after the package that is installed
    (folder / "tests").mkdir()
    shutil.copy(ROOT / "tests/conftest.py", folder / "tests")
    for block in BLOCKS:
        path = folder / block.path if block.path.startswith("tests/") else folder / "rowwise" / block.path
        if block.kind == "diff":
            path.write_text(changed(path.read_text(), block.text))
        else:
            assert not path.exists(), f"{block.path} is not new"
            path.write_text(block.text)
    return folder


def test_each_exercise_is_one_file_and_one_entry():
    """A file of Python, the YAML of a choice where there is one, a change of one file; and a test."""
    kinds = [("test" if block.path.startswith("tests/") else block.kind) for block in BLOCKS]
    assert [kinds.count(kind) for kind in ("python", "diff", "test")] == [EXERCISES] * 3
    assert all(block.path.startswith("conf/") for block in BLOCKS if block.kind == "yaml")


@pytest.mark.slow
def test_the_tests_of_the_page_pass_in_a_copy_of_the_package(copy):
    environment = os.environ | {"PYTHONPATH": f"{copy}{os.pathsep}{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    guard = "import rowwise.optim.build as own, pytest, sys; print(own.__file__); sys.exit(pytest.main(sys.argv[1:]))"
    options = ["-q", "-p", "no:cacheprovider", "--import-mode=importlib", f"--rootdir={copy}", "-c", "/dev/null"]
    done = subprocess.run([sys.executable, "-c", guard, *options, str(copy / "tests")], env=environment, cwd=copy,
                          capture_output=True, text=True, timeout=600)  # fmt: skip
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    assert said.startswith(str(copy)), f"another package was tested: {said[:200]}"
    written = sum(block.text.count("\ndef test_") for block in BLOCKS if block.path.startswith("tests/"))
    assert f"{written} passed" in said


def test_what_the_page_shows_is_in_our_style(copy):
    new = [block.path for block in BLOCKS if block.kind == "python"]
    paths = [str(copy / path) if path.startswith("tests/") else str(copy / "rowwise" / path) for path in new]
    for command in (["check", "-q"], ["format", "--check", "-q"]):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *command, "--no-cache", "--config", str(ROOT / "pyproject.toml"), *paths],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr
