"""What the README, docs/ and the commands' own help tell people to type is what would run."""

import importlib
import re
import shlex
import shutil
from pathlib import Path

import pytest

from rowwise.launch.cli import COMMANDS, EXAMPLES
from rowwise.launch.compose import compose_tree
from rowwise.launch.given import gather
from rowwise.launch.slurm import compose_slurm
from rowwise.launch.slurm import resolve as resolve_script
from rowwise.launch.start import parse
from rowwise.launch.sweep.config import resolve as resolve_sweep
from rowwise.trainer.check import check
from rowwise.trainer.config import config_from_tree

ROOT = Path(__file__).parents[1]
TEXTS = {
    "README.md": (ROOT / "README.md").read_text(),
    **{f"docs/{page.name}": page.read_text() for page in sorted((ROOT / "docs").glob("*.md"))},
    "rowwise --help": EXAMPLES,
    **{
        f"rowwise {name} --help": importlib.import_module(module).__doc__ or ""
        for name, (module, _) in COMMANDS.items()
    },
}


def commands_of(text: str) -> list[str]:
    """Its command lines, without what is said of them two spaces further on."""
    joined = re.sub(r"\\\n\s*", "", text)
    begins = r"rowwise|torchrun(?= [^\n]*-m rowwise)|python -m rowwise\.launch\.train"
    lines = re.findall(rf"^ *(?:srun [^\n]*?)?((?:{begins}) [^\n]*)$", joined, re.M)
    return [re.split(r" {2,}", line)[0] for line in lines]


CASES = [
    (where, line)
    for where, text in TEXTS.items()
    for line in commands_of(text)
    if not any(placeholder in line for placeholder in ("...", "KEY", "FOLDER", "FILE.py"))
]


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Those that the examples name."""
    (tmp_path / "my.yaml").write_text("optim: lion\n")
    (tmp_path / "DIR" / "optim").mkdir(parents=True)
    (tmp_path / "DIR" / "optim" / "mine.yaml").write_text("defaults: [lion]\nlr: 1e-4\n")
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    (tmp_path / "my_package").mkdir()
    ours = (ROOT / "examples" / "gated_conv.py").read_text()
    (tmp_path / "my_package" / "mixers.py").write_text(ours.replace("GatedConv", "Mixer"))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(("where", "line"), CASES, ids=[f"{where}: {line}" for where, line in CASES])
def test_an_example_is_not_refused(where, line, files):
    program, *words = shlex.split(line)
    if program == "rowwise":
        command, *words = words
        if command == "sweep":
            here = [] if any(word.startswith("nproc=") for word in words) else ["nproc=1"]
            resolve_sweep(gather([*words, *here], "sweep"), here=False)
        elif command == "slurm":
            ours = [word for word in words if word.startswith("slurm.")]
            rest = [word for word in words[1:] if word not in ours and not word.startswith(("to=", "submit="))]
            resolve_script(words[0], rest, compose_slurm(ours))
        elif command == "train":
            options = parse(words)
            config = config_from_tree(compose_tree(gather(options.overrides)))
            for nodes in (options.nodes or "1").split(":"):
                check(config, int(nodes) * (config.nproc or 1))
        return
    workers = int(words[words.index("--nproc-per-node") + 1]) if "--nproc-per-node" in words else 1
    check(config_from_tree(compose_tree([word for word in words if "=" in word and not word.startswith("-")])), workers)


def test_there_are_examples():
    assert len(CASES) >= 25
    assert {where for where, _ in CASES} >= {"README.md", "docs/launching.md", "rowwise --help"}
    assert {f"rowwise {name} --help" for name in ("train", "sweep", "slurm")} <= {where for where, _ in CASES}
