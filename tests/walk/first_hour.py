"""docs/first-hour.md, walked: every command as it stands there, from a fresh clone on, and what it prints.

    make test-walk

A line of the page that begins with `$` is typed into one shell; a line `^C` behind it is Ctrl-C, once the run has made steps;
every other line is found in what the command prints, with other numbers in it. `...` stands for whatever comes.
"""

import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from commands import ENVIRONMENT, PATIENCE
from rowwise.trainer.metrics import read_metrics

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "first-hour.md"
CLONED = re.compile(r"(?<=^git clone )\S+")  # an address, which a test does not reach
STEPS_BEFORE_CTRL_C = 5


@dataclass
class Command:
    """A command of the page, whether Ctrl-C follows, and the lines that it is said to print."""

    text: str
    interrupted: bool = False
    printed: list[str] = field(default_factory=list)


def commands(page: str) -> Iterator[Command]:
    """Those of all blocks marked `console`, in order."""
    for block in re.findall(r"^```console\n(.*?)^```$", page, re.MULTILINE | re.DOTALL):
        found: Command | None = None
        for line in block.replace("\\\n", "").splitlines():
            if line.startswith("$ "):
                if found is not None:
                    yield found
                found = Command(line.removeprefix("$ "))
            elif line == "^C":
                assert found is not None
                found.interrupted = True
            elif line.strip() not in ("", "..."):
                assert found is not None
                found.printed.append(line)
        if found is not None:
            yield found


def form(line: str) -> str:
    """A line without its numbers, its bars and its blanks."""
    line = re.sub(r"\d[\w.,:+-]*", "N", line)
    return re.sub(r"\s+", " ", re.sub(r"[\u2580-\u259f#]+", "", line)).strip()


class Shell:
    """One shell: where a command leaves its folder and its environment, the next begins."""

    def __init__(self, home: Path):
        self._state, self._origin, self.folder = home / "state", home / "origin", home
        self._state.write_text("")
        shutil.copytree(
            ROOT, self._origin, symlinks=True, ignore=shutil.ignore_patterns(".git", ".venv*", "runs", "build")
        )
        git = ["git", "-C", str(self._origin), "-c", "user.name=walk", "-c", "user.email=walk"]
        for words in (["init", "--quiet"], ["add", "--all"], ["commit", "--quiet", "--message", "as it stands here"]):
            subprocess.run([*git, *words], check=True)

    def run(self, command: Command) -> tuple[int, str]:
        text = CLONED.sub(str(self._origin), command.text)
        kept = f"code=$?; {{ export -p; echo cd \"'$PWD'\"; }} > {self._state}.new; mv {self._state}.new {self._state}; exit $code"
        script = f"cd {self.folder}; . {self._state}; {text}\n{kept}"
        environment = {name: value for name, value in os.environ.items() if name != "VIRTUAL_ENV"} | ENVIRONMENT
        with subprocess.Popen(
            ["bash", "-c", script], env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, start_new_session=True,
        ) as job:  # fmt: skip
            if command.interrupted:
                self._press_ctrl_c(job, text)
            said, _ = job.communicate(timeout=PATIENCE)
        return job.returncode, said

    def _press_ctrl_c(self, job: subprocess.Popen, text: str) -> None:
        """As a terminal does: to every process of the job."""
        name = re.search(r"\bname=(\S+)", text)
        assert name is not None, f"{text}: a run that is interrupted has a name"
        run, deadline = self.folder / "rowwise" / "runs" / name[1], time.monotonic() + PATIENCE
        while len(read_metrics(run)) < STEPS_BEFORE_CTRL_C:
            assert job.poll() is None and time.monotonic() < deadline, f"{text}: no steps were made"
            time.sleep(0.1)
        os.killpg(job.pid, signal.SIGINT)


def test_the_page_is_true(tmp_path):
    shell, walked = Shell(tmp_path), list(commands(PAGE.read_text()))
    assert len(walked) > 10
    for command in walked:
        began = time.monotonic()
        code, said = shell.run(command)
        print(f"{time.monotonic() - began:6.1f} s  {command.text}")
        assert code == 0, f"{command.text}: exit code {code}\n{said[-3000:]}"
        forms = {form(line) for line in said.replace("\r", "\n").splitlines()}
        missing = [line for line in command.printed if form(line) not in forms]
        assert not missing, f"{command.text}: it does not print {missing[0]!r} but\n{said[-6000:]}"
