"""The commands with which one goes on from a run, as they are copied into a shell. Needs no torch."""

import contextlib
import re
import shlex
from pathlib import Path

import yaml

from rowwise.trainer.models.code import names_code

_OWN = re.compile(rb"^model:\s*\n(?:  .*\n)*?  own: (.+)$", re.MULTILINE)
_PLAIN = re.compile(r"[\w./~%@+-]+", re.ASCII)


def setting(key: str, value: str | Path) -> str:
    """Writes `key=value` as a word of a shell that Hydra reads as just this."""
    text = str(value)
    if _PLAIN.fullmatch(text):
        return f"{key}={text}"
    escaped = re.sub(r"(\\*)('|$)", lambda found: 2 * found[1] + ("\\'" if found[2] else ""), text)
    return shlex.quote(f"{key}='{escaped.replace('${', chr(92) + '${')}'")


def plain_setting(key: str, value: str | Path) -> str:
    """Writes `key=value` as a word of a shell, for commands that read what stands there."""
    return shlex.quote(f"{key}={value}")


def to_go_on(run_dir: str | Path, steps: int | None = None, own: str | None = None) -> str:
    """Returns the command that resumes a run with everything it was started with, up to `steps` where they are given. `own`: the code
    of its model, which a command has to name."""
    longer = "" if steps is None else f" steps={steps}"
    return f"rowwise train {setting('resume', run_dir)}{_code(own)}{longer}"


def to_begin_again(run_dir: str | Path, own: str | None = None) -> str:
    """Returns the command that begins a run of which nothing was saved once more, as it was started. `own`: as in `to_go_on`."""
    return f"rowwise train {plain_setting('config', Path(run_dir) / 'config.yaml')}{_code(own)}"


def code_in(settings: bytes) -> str | None:
    """Finds the code that the config.yaml of a run names as its model; None: it names none. Nothing is imported by that."""
    found = _OWN.search(settings)
    with contextlib.suppress(yaml.YAMLError, UnicodeDecodeError):
        own = yaml.safe_load(found[1].decode()) if found else None
        return own if isinstance(own, str) and names_code(own) else None
    return None


def _code(own: str | None) -> str:
    return "" if own is None else f" {plain_setting('model', own)}"


def next_steps(
    run_dir: str | Path, complete_at: int | None, writes: bool, saved: bool, own: str | None = None
) -> list[tuple[str, str]]:
    """Returns what is to be done with a run: what for, and the command. `complete_at`: its last step, where it has reached it;
    `writes`: whether text can be generated; `saved`: whether there is a checkpoint; `own`: as in `to_go_on`."""
    run = plain_setting("run", run_dir)
    on = to_go_on(run_dir, complete_at and 2 * complete_at, own) if saved else to_begin_again(run_dir, own)
    found = [("go on" if saved else "again", on), ("look", f"rowwise report {run}")]
    if saved and writes:
        found.append(("write", f"rowwise generate {run}{_code(own)}"))
    if saved and own is None:
        found.append(("export", f"rowwise export {run} {plain_setting('to', Path(run_dir) / 'export')}"))
    return found
