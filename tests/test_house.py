"""The architecture: imports run one way, the namespace stays clean, a worker's import stays light."""

import ast
import functools
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
BELOW = {
    "launch": {"trainer", "parallel", "optim", "kernels", "conf"},
    "trainer": {"parallel", "optim", "kernels", "conf"},
    "parallel": {"kernels", "conf"},
    "optim": {"kernels", "conf"},
    "kernels": set(),
    "conf": set(),
}
FILES = sorted(path for room in BELOW for path in (ROOT / room).rglob("*.py"))


@functools.cache
def nodes_of(source: str) -> list[ast.AST]:
    """What a file is made of, read once for all that looks at it."""
    return list(ast.walk(ast.parse(source)))


def imports_of(path: Path) -> set[str]:
    names = set()
    for node in nodes_of(path.read_text()):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            names.add(node.module or "")
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_room_imports_only_rooms_below_it(path):
    room = path.relative_to(ROOT).parts[0]
    for name in imports_of(path):
        parts = name.split(".")
        assert parts[0] not in BELOW, f"{path}: bare import of {name}"
        if parts[0] == "rowwise":
            assert parts[1] == room or parts[1] in BELOW[room], f"{path}: {room} imports {name}"


LONGEST_FILE, LONGEST_FUNCTION = 300, 60  # lines


def too_long(path: Path) -> list[str]:
    """A file, or functions in it, that nobody reads in one go."""
    functions = [node for node in nodes_of(path.read_text()) if isinstance(node, ast.FunctionDef)]
    file = [path.name] if path.read_text().count("\n") > LONGEST_FILE else []
    return [*file, *(f.name for f in functions if (f.end_lineno or 0) - f.lineno >= LONGEST_FUNCTION)]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_and_functions_are_read_in_one_go(path):
    assert not too_long(path), "split it by what it is of, so that its name says what is in it; or make it smaller"


def test_what_is_too_long_is_found(tmp_path):
    (path := tmp_path / "some.py").write_text("def fits():\n" + "    pass\n" * 59 + "\n" * 240)
    assert too_long(path) == []
    path.write_text("def fits():\n" + "    pass\n" * 59 + "def long():\n" + "    pass\n" * 60 + "\n" * 180)
    assert too_long(path) == ["some.py", "long"]


# What a model calls its parts. Its own files name them; all others read what a parameter is in its spec.
PART = re.compile(
    r"(^|[.*])(embed(_\w+)?|head|norm|(q|k|attention|feed_forward)_norm|blocks|feed_forward|lm_head|\w+_proj|w[qkvo123]|bias)([.*]|$)"
)
# Where `head` is a role, which rule it has, and whose step in the backward is within the loss; `bias` is a key of PEFT's files.
OTHERWISE = {
    **{path: frozenset({"head"}) for path in ("kernels/spec.py", "optim/build.py", "trainer/plan/memory.py")},
    "trainer/adapters/peft.py": frozenset({"bias"}),
}


def parts_named(source: str) -> list[str]:
    """Strings in code that name, or begin or end to name, a parameter: `embed`, `.head.weight`, `*.w1.*`."""
    strings = [n.value for n in nodes_of(source) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
    return [text for text in strings if re.fullmatch(r"[\w.*]+", text) and PART.search(text)]


def test_what_a_parameter_is_is_read_in_its_spec_and_not_in_its_name():
    others = [path.relative_to(ROOT) for path in FILES if ROOT / "trainer/models" not in path.parents]
    named = {path.as_posix(): parts_named((ROOT / path).read_text()) for path in others if path.parts[0] != "launch"}
    found = {path: set(parts) - OTHERWISE.get(path, frozenset()) for path, parts in named.items()}
    assert len(found) > 100 and not any(found.values()), {path: parts for path, parts in found.items() if parts}


@pytest.mark.parametrize(
    "guess",
    [
        'name.split(".")[0] == "embed"',
        '"norm" in name',
        'name.endswith((".bias", "wo.weight"))',
        'match(name, "*.w1.*")',
    ],
)
def test_a_guess_from_a_name_would_be_found(guess):
    assert parts_named(guess)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_hydra_and_the_environment_stay_in_launch(path):
    room = path.relative_to(ROOT).parts[0]
    if room == "launch":
        return
    assert not {name.split(".")[0] for name in imports_of(path)} & {"hydra"}
    if path.name != "dispatch.py":  # ROWWISE_KERNELS is for debugging kernels, not an argument of a run
        assert not re.search(r"\benviron\b|\bgetenv\b", path.read_text())


# Of other libraries, not of torch's: os._exit leaves no handler to run, pickle's in Python can be looked at; the rest are
# documented (NamedTuple's _replace, hydra's _target_) or say which trial it is (optuna's).
ELSEWHERE = {"_exit", "_Pickler", "_Unpickler", "_replace", "_target_", "_trial_id"}
# By its name alone: what a worker would import for itself is imported beforehand.
NAMED = {("local.py", "torch._dynamo")}
WITHOUT_UNDERSCORE = {"distributed_c10d", "unsharded_accumulated_grad", "post_backward", "comm_ctx"}


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__")


def is_name(node: ast.AST, *names: str) -> bool:
    return isinstance(node, ast.Name) and node.id in names


def private_uses(path: Path) -> set[str]:
    """The private names of others that a file uses: of torch's modules and, since nobody sees whose an object is, every
    private attribute that the file does not itself define."""
    nodes = nodes_of(path.read_text())
    own = {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Attribute):
            of_itself = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
            of_its_base = isinstance(node.value, ast.Call) and is_name(node.value.func, "super")
            used = {node.attr} - own if not (of_itself or of_its_base) else set()
        elif isinstance(node, ast.ImportFrom):
            used = {*(node.module or "").split("."), *(alias.name for alias in node.names)}
        elif isinstance(node, ast.Import):
            used = {part for alias in node.names for part in alias.name.split(".")}
        elif isinstance(node, ast.Call) and is_name(node.func, "getattr", "hasattr", "setattr"):
            used = {ast.literal_eval(node.args[1])} if isinstance(node.args[1], ast.Constant) else set()
        elif isinstance(node, ast.Constant) and re.fullmatch(r"torch(\.\w+)+", str(node.value)):
            used = set() if (path.name, node.value) in NAMED else set(node.value.split("."))
        else:
            continue
        found |= {name for name in used if is_private(name) or name in WITHOUT_UNDERSCORE}
    return found - ELSEWHERE


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_private_parts_of_torch_stand_in_one_file_each(path):
    if not path.name.startswith(("torch_", "deepspeed_")):
        said = f"{path}: move it into a file torch_<part>.py or deepspeed_<part>.py of the room, with the reason"
        assert private_uses(path) == set(), said


def test_what_is_private_is_found(tmp_path):
    """However it is come by; and each part of torch has one file."""
    (path := tmp_path / "some.py").write_text(
        "import torch._dynamo\nfrom torch.utils._pytree import tree_map\nfrom torch.x import _y\n"
        "torch._foreach_add_([], 1)\nparam._spec\nhasattr(param, '_unsharded_param')\nLater('torch.distributed._utils')\n"
        "dist.distributed_c10d\nself._ours\nsuper()._ours\n"
    )
    theirs = {"_dynamo", "_pytree", "_y", "_foreach_add_", "_spec", "_unsharded_param", "_utils", "distributed_c10d"}
    assert private_uses(path) == theirs
    files = [path.name for path in FILES if path.name.startswith("torch_")]
    assert len(files) == len(set(files))
    assert all(private_uses(path) for path in FILES if path.name.startswith("torch_"))


def in_a_process(program: str, *arguments: str) -> str:
    command = [sys.executable, "-c", program, *arguments]
    return subprocess.run(command, cwd="/", capture_output=True, text=True, check=True).stdout


IMPORTED = """
import importlib, json, os, pathlib, sys
import rowwise.launch.warm
os.environ.pop("OMP_NUM_THREADS", None)
os.environ.update(rowwise.launch.warm.QUIET)
from rowwise.launch.compose import compose_tree
from rowwise.trainer.check import check
from rowwise.trainer.config import config_from_tree
import torch
touched = []
for name in ("is_available", "device_count", "current_device", "get_device_properties", "_lazy_init", "init"):
    setattr(torch.cuda, name, lambda *given, name=name: touched.append(name))
check(config_from_tree(compose_tree(["parallel.zero=3"])), 2)
from rowwise.kernels.torch_compiler import left_to_python
from rowwise.parallel.lifetimes import Lifetimes
with Lifetimes([], []):
    left_to_python(torch.add)(torch.ones(2), 1)
told = {"checked": [*sys.modules]}
import rowwise.launch.worker
told["worker"] = [*sys.modules]
import rowwise.launch.local
for module in rowwise.launch.warm.BEFOREHAND + rowwise.launch.local.NEEDED_TO_SPLIT:
    importlib.import_module(module)
told["touched"] = touched
told["threads"] = [line for line in pathlib.Path("/proc/self/status").read_text().splitlines() if line.startswith("Threads:")]
print(json.dumps(told))
"""


@pytest.fixture(scope="module")
def imported() -> dict[str, list[str]]:
    """What one process has imported that looks at a run, then a worker's modules, then what a warm process has."""
    return json.loads(in_a_process(IMPORTED))


def test_a_workers_import_is_light(imported):
    """And no room is importable under its bare name, which would hide packages of that name."""
    modules = set(imported["worker"])
    assert not modules & {
        "deepspeed",
        "transformers",
        "wandb",
        "matplotlib",
        "accelerate",
        "pyarrow",
        "tokenizers",
        "scipy",
        "numba",
    }
    assert not modules & set(BELOW)


REFUSED_AT_ONCE = {
    "rowwise": [["trian"]],
    "train": [
        ["--lr", "3"],
        ["optim=adam"],
        ["steps=ten"],
        ["config=/nowhere.yaml"],
        ["-x"],
        ["optim.lrr=3"],
        ["--cfg", "optim.lrr=3"],
        ["model.init_from=/nowhere"],
    ],
    "check": [["optim.lrr=3"], ["world_sise=3"], ["world_size=0"], ["picture=perhaps"]],
    "plan": [
        ["device=h101"],
        ["device=here"],
        ["device.hots=3"],
        ["device.host=-1"],
        ["worldsize=3"],
        ["optim.lrr=3"],
        ["world_size=0"],
        ["to=plan.gif"],
    ],
    "measure": [["folders=here"], ["folder=/nowhere"], ["gigabytes=0"], ["to=here.txt"]],
    "doctor": [["too=here"], ["to="]],
    "sweep": [["sweep.serch=tpe"], ["optim.lrr=1,2"], ["steps=2"], ["optim.lr=1e-3,3e-3", "model.init_from=/nowhere"]],
    "slurm": [["train", "slurm.node=2"], ["train", "optim.lrr=3"], ["sweep", "optim.lrr=1,2"]],
    "runs": [["/nowhere"], ["wacth=true"], ["watch=yes"], ["watch=true", "json=true"]],
    "report": [["runn=here"], ["run=/nowhere"], ["run=/nowhere/*"]],
    "export": [["runn=here"], ["run=/nowhere", "to=here"], ["run=/nowhere", "to=here", "dtype=fp8"]],
    "average": [["runn=here"], ["run=/nowhere"]],
    "tokenize": [["too=here"], ["data=text", "to=/nowhere/there"]],
    "convert": [
        ["fromm=here"],
        ["from=/nowhere", "to=here"],
        ["from=tests", "to=here"],
        ["from=/nowhere", "to=here", "names=ours"],
        ["from=/nowhere"],
    ],
    "generate": [["runn=here"], ["run=/nowhere", "prompt=a"], ["run=/nowhere", "prompt=a", "top_p=2"]],
    "evaluate": [["runn=here"], ["run=/nowhere"], ["run=/nowhere", "seq_len=0"], ["run=/nowhere", "data=text"]],
    "schedule": [["zbv"], ["zb_v", "rank=4"], ["run=/nowhere"]],
}
HELP_AND_REFUSALS = """
import contextlib, io, json, sys
from rowwise.launch import cli, train

def went(command, words):
    before = set(sys.modules)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as said:
        try:
            code = (train.main if command is train else cli.main)(words)
        except SystemExit as end:
            code = end.code
    return code, said.getvalue(), sorted({name.partition(".")[0] for name in sys.modules.keys() - before})

told = {"worker": [went(train, ["--help"])]}  # which tells the others of a refusal, and has torch for that
for command, refused in json.loads(sys.argv[1]).items():
    name = [] if command == "rowwise" else [command]
    told[command] = [went(command, [*name, *words]) for words in (["--help"], *refused)]
print(json.dumps({"commands": list(cli.COMMANDS), "told": told}))
"""
SLOW_TO_IMPORT = {"torch", "matplotlib", "transformers", "deepspeed", "accelerate", "wandb", "optuna", "scipy"}


@pytest.fixture(scope="module")
def helped() -> dict[str, Any]:
    return json.loads(in_a_process(HELP_AND_REFUSALS, json.dumps(REFUSED_AT_ONCE)))


def test_every_command_is_asked_for_help(helped):
    assert ["rowwise", *helped["commands"]] == sorted(REFUSED_AT_ONCE, key=["rowwise", *helped["commands"]].index)


@pytest.mark.parametrize("command", [*REFUSED_AT_ONCE, "worker"])
def test_help_and_what_is_refused_at_once_wait_for_no_large_import(helped, command):
    """Nor is a refusal more than a line."""
    (code, said, imported), *refused = helped["told"][command]
    assert (code, said) == (0, "") and not SLOW_TO_IMPORT & set(imported)
    for code, said, imported in refused:
        assert code == 2 and said.startswith("refused: ") and said.count("\n") == 1, said
        assert not SLOW_TO_IMPORT & set(imported), said


def test_schedules_need_no_torch():
    assert in_a_process("import rowwise.optim.lr_schedules, sys; print('torch' in sys.modules)").strip() == "False"


def test_what_refuses_a_run_waits_for_no_compiler_and_no_sharding(imported):
    """They take as long to import as torch itself, and only a run needs them: what looks at operations does not, nor what
    is left to Python of a block that is not compiled."""
    modules = set(imported["checked"])
    assert "torch" in modules and not modules & {
        "torch._dynamo",
        "torch.distributed.tensor",
        "torch.distributed.fsdp",
        "sympy",
    }


def test_what_a_warm_process_imports_touches_no_device_and_starts_no_thread(imported):
    """A fork of it could use neither."""
    assert (imported["touched"], imported["threads"]) == ([], ["Threads:\t1"])


def test_no_path_of_a_machine_and_no_registry_host_in_the_repository():
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, tracked.split("\0")):
        if (ROOT / name).is_symlink():  # to a room, in src/rowwise
            continue
        text = (ROOT / name).read_text(errors="ignore")
        for word in ("pypi" + ".org", "download.pytorch" + ".org", "/ro" + "ot/", "/wo" + "rk/"):
            assert word not in text, f"{name} names {word}"
