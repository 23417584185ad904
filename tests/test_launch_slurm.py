"""The batch script, without Slurm: its text, what it refuses, and what it does with an srun and a scontrol of paper.

With a real Slurm: `make test-slurm`."""

import os
import re
import shlex
import signal
import subprocess
import time
from dataclasses import fields, replace
from pathlib import Path
from random import Random

import pytest

from rowwise.launch.slurm import PROGRAMS, SlurmConfig, compose_slurm, limit_seconds, main, resolve, script

SRUN = """#!/bin/bash
trap 'echo USR1 >> "$FOLDER/heard"; exit ${CODE:-0}' USR1
printf '%s\\n' "$@" > "$FOLDER/arguments"
printf '%s\\0' "$@" > "$FOLDER/given"
printf '%s' "$ROWWISE_TOKEN" > "$FOLDER/token"
sleep ${SECONDS_OF_SRUN:-0} & wait $!
exit ${CODE:-0}
"""
SCONTROL = """#!/bin/bash
echo "$@" >> "$FOLDER/scontrol"
if [[ $1 == show ]]; then echo "   PreemptEligibleTime=2026-01-01 PreemptTime=${PREEMPTED:-None}"; fi
"""


@pytest.fixture
def slurm(tmp_path):
    """Starts a script with the commands of a cluster that are only paper; its process."""
    (tmp_path / "bin").mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    jobs = {"SLURM_JOB_ID": "70", "SLURM_ARRAY_JOB_ID": "70", "SLURM_ARRAY_TASK_ID": "3"}
    path = f"{tmp_path}/bin:{os.environ['PATH']}"

    def start(text: str, **environment: str) -> subprocess.Popen:
        environment = {**os.environ, "PATH": path, "FOLDER": str(tmp_path), **jobs, **environment}
        return subprocess.Popen(["bash"], stdin=_file(tmp_path / "job.sh", text), env=environment, cwd=tmp_path)

    return start


def _file(path: Path, text: str):
    path.write_text(text)
    return path.open()


def text_of(*words: str, command: tuple[str, ...] = ("python", "-P", "-m", "it")) -> str:
    return script(replace(compose_slurm(list(words)), name="a run", log="log-%j"), list(command))


def said(folder: Path, name: str) -> list[str]:
    return (folder / name).read_text().splitlines() if (folder / name).exists() else []


def await_both(job: subprocess.Popen, folder: Path) -> None:
    """Until the script and srun have set their traps."""
    deadline, caught = time.monotonic() + 300, 0
    while not (caught >> signal.SIGUSR1 - 1 & 1 and said(folder, "arguments")):
        status = Path(f"/proc/{job.pid}/status").read_text()
        caught = int(status.split("SigCgt:")[1].split()[0], 16)
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_the_script_of_a_run(capsys):
    words = ["nproc=8", "batch.global_size=128", "slurm.python=python", "slurm.nodes=2", "slurm.time=1-00:00:00"]
    assert main(["train", *words, "slurm.gpus_per_node=8", "slurm.mem=0", "slurm.setup=[module load cuda]"]) == 0
    text = capsys.readouterr().out
    head, _, rest = text.partition("\n\n")
    assert head.splitlines() == [
        "#!/bin/bash",
        "#SBATCH --job-name=tiny",
        "#SBATCH --nodes=2",
        "#SBATCH --ntasks-per-node=1",
        "#SBATCH --gpus-per-node=8",
        "#SBATCH --mem=0",
        "#SBATCH --time=1-00:00:00",
        "#SBATCH --output=tiny-%j.log",
        "#SBATCH --open-mode=append",
        "#SBATCH --signal=B:USR1@300",
        "#SBATCH --requeue",
    ]
    assert rest.startswith("set -e\nmodule load cuda\n")
    assert "\n    python -P -m rowwise.launch.start \\\n    nproc=8 \\\n    batch.global_size=128 &\n" in text
    assert text.endswith("\nexit $code\n")


def test_a_node_has_as_many_workers_as_gpus():
    config = compose_slurm(["slurm.gpus_per_node=2"])
    assert resolve("train", [], config)[1][-1] == "nproc=2"
    assert resolve("train", ["nproc=1"], config)[1][-1] == "nproc=1"


def test_the_jobs_of_a_search():
    words = ["sweep.name=lr", "sweep.search=tpe", "sweep.parallel=2", "optim.lr=interval(1e-4,1e-2)"]
    config, command = resolve("sweep", words, compose_slurm(["slurm.workers=3", "slurm.gpus_per_node=4"]))
    assert command[1:] == ["-P", "-m", PROGRAMS["sweep"], *words, "nproc=2"]
    assert (config.name, config.log) == ("lr", "lr-%A_%a.log")
    assert "#SBATCH --array=1-3\n" in script(config, command)


OTHER = {
    "nodes": "2", "gpus_per_node": "4", "cpus_per_task": "8", "mem": "64G", "time": "10:00:00", "partition": "7",
    "account": "us", "qos": "high", "constraint": "'a100|h100'", "signal_seconds": "60", "requeue": "false", "workers": "2",
    "extra": "['--gres=gpu:a100:4']", "setup": "[module load cuda]",
}  # fmt: skip


def test_every_key_changes_the_script_and_bash_reads_it(tmp_path):
    resolved = {"name", "python", "log"}
    assert OTHER.keys() == {field.name for field in fields(SlurmConfig)} - resolved
    plain = text_of()
    for key, value in OTHER.items():
        text = text_of(f"slurm.{key}={value}")
        assert text != plain and value.strip("[]'") in text + "false", key
        assert subprocess.run(["bash", "-n"], input=text, text=True, check=False).returncode == 0
    config = compose_slurm(["slurm.name=b", "slurm.python=p", "slurm.log=l"])
    resolved_config, command = resolve("train", ["nproc=1"], config)
    assert (resolved_config.name, resolved_config.log, command[0]) == ("b", "l", "p")


def test_overrides_arrive_as_they_were_given(slurm, tmp_path):
    odd = ["name=two words", "sample.prompt='it''s \"$HOME\" `pwd` \\\\ *'", "data.files=[a,b]", "x=a#b;c&d|e"]
    assert slurm(text_of("slurm.cpus_per_task=8", command=("python", "-P", "-m", "it", *odd))).wait(20) == 0
    arguments = said(tmp_path, "arguments")
    assert arguments == [
        "--ntasks-per-node=1",
        "--kill-on-bad-exit=1",
        "--cpus-per-task=8",
        "python",
        "-P",
        "-m",
        "it",
        *odd,
    ]
    assert "#SBATCH --job-name='a run'\n" in text_of()


def test_what_bash_is_given_is_what_was_given(slurm, tmp_path):
    """1,000 random strings, read back from srun; names and files too."""
    draw, special = Random(7), "'\"\\$`!#&;|<>(){}[]*?~^%=, \t\n-/.a7é漢🙂"
    words = ["".join(draw.choices(special, k=draw.randrange(1, 40))) for _ in range(1000)]
    config = replace(compose_slurm(["slurm.nodes=2"]), name="it's $(touch ran) `touch ran`", log="a 'b' $HOME")
    assert slurm(script(config, ["py thon'", "-P", "-m", "it", *words])).wait(60) == 0
    given = (tmp_path / "given").read_bytes().decode().split("\0")[:-1]
    assert given[2:] == ["py thon'", "-P", "-m", "it", *words]
    assert not (tmp_path / "ran").exists()


def test_the_nodes_of_a_job_know_a_token_that_its_script_does_not_say(slurm, tmp_path):
    tokens = []
    for nodes in (2, 2, 1):
        text = text_of(f"slurm.nodes={nodes}")
        assert slurm(text).wait(20) == 0
        tokens.append((tmp_path / "token").read_text())
        assert tokens[-1] not in text or nodes == 1
    assert re.fullmatch(r"[0-9a-f]{64}", tokens[0]) and tokens[0] != tokens[1] and tokens[2] == ""


@pytest.mark.parametrize("code", [0, 2, 138])
def test_the_job_ends_as_its_run_ends(slurm, tmp_path, code):
    assert slurm(text_of(), CODE=str(code)).wait(20) == code
    assert said(tmp_path, "scontrol") == ["show job 70"]


@pytest.mark.parametrize(("code", "again"), [(0, True), (138, True), (1, False)])
def test_the_signal_reaches_the_run_and_queues_it_again_unless_it_failed(slurm, tmp_path, code, again):
    job = slurm(text_of(), CODE=str(code), SECONDS_OF_SRUN="60")
    await_both(job, tmp_path)
    job.send_signal(signal.SIGUSR1)
    assert job.wait(20) == code
    assert said(tmp_path, "heard") == ["USR1"]
    assert said(tmp_path, "scontrol") == ["requeue 70"] * again


def test_a_run_whose_nodes_are_wanted_queues_again(slurm, tmp_path):
    assert slurm(text_of("slurm.workers=4"), PREEMPTED="2026-01-01T00:00:00").wait(20) == 0
    assert said(tmp_path, "scontrol") == ["show job 70_3", "requeue 70_3"]


def test_without_requeue_it_only_leaves(slurm, tmp_path):
    assert slurm(text_of("slurm.requeue=false"), PREEMPTED="2026-01-01T00:00:00").wait(20) == 0
    assert not (tmp_path / "scontrol").exists()


def test_nothing_starts_where_the_setup_fails(slurm, tmp_path):
    assert slurm(text_of("slurm.setup=[cd /nowhere]")).wait(20) == 1
    assert not (tmp_path / "arguments").exists()


REFUSED = {
    "unknown key": (["slurm.node=2"], r"unknown key slurm.node: slurm has account, .*did you mean slurm.nodes\?"),
    "added key": (["+slurm.array=2"], r"unknown key slurm.array"),
    "wrong type": (["slurm.nodes=many"], r"slurm.nodes='many': give a whole number"),
    "not a list": (["slurm.setup=module load cuda"], r"slurm.setup='module load cuda': .*(array|list)"),
    "no nodes": (["slurm.nodes=0"], r"slurm.nodes=0: it is at least 1"),
    "minutes": (["slurm.time=90"], r"slurm.time=90: give D-HH:MM:SS or HH:MM:SS, such as 1-12:00:00"),
    "no time": (
        ["slurm.time=00:05:00"],
        r"slurm.time=00:05:00 is not above slurm.signal_seconds=300: .*give more time",
    ),
    "signal": (["slurm.signal_seconds=0"], r"slurm.signal_seconds=0: Slurm takes 1 to 65535"),
    "memory": (["slurm.mem=64 gigabytes"], r"slurm.mem=64 gigabytes: give a whole number with K, M, G or T"),
    "an option that is none": (["slurm.extra=[exclusive]"], r"slurm.extra: 'exclusive' is no option of sbatch"),
    "two lines": (
        ['slurm.name="a\nb"'],
        r"slurm.name=.* holds a control character \(U\+000A\); give a string of one line",
    ),
    "not an override": (["slurm.setup=[a"], r"slurm.setup|no viable alternative"),
    "no workers": (["nproc=null"], r"nproc is not given, .*give nproc, .*or slurm.gpus_per_node"),
    "more workers than GPUs": (
        ["slurm.gpus_per_node=1", "nproc=2"],
        r"nproc=2 with slurm.gpus_per_node=1: .*give fewer workers",
    ),
    "jobs of a run": (["slurm.workers=2"], r"slurm.workers=2: jobs join a sweep, not a run; give slurm.nodes"),
    "what the run refuses": (["optim.lrr=3"], r"unknown key optim.lrr: .*did you mean optim.lr\?"),
    "what its workers refuse": (["slurm.nodes=3"], r"does not divide into 3 data-parallel ranks"),
    "where to": (["to="], r"to=: give to=FILE and submit=true, each once"),
    "nowhere": (["to=/nowhere/job.sh"], r"/nowhere/job.sh"),
    "perhaps": (["submit=maybe"], r"submit=maybe: give to=FILE and submit=true"),
    "no cluster": (["submit=true"], r"sbatch is not on this machine; .*give to=FILE"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name, capsys, monkeypatch, tmp_path):
    words, message = REFUSED[name]
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["train", "nproc=1", *words]) == 2
    printed = capsys.readouterr()
    assert re.fullmatch(rf"refused: .*({message}).*\n", printed.err), printed.err
    assert not printed.out


REFUSED_SWEEPS = {
    "nodes": (["slurm.nodes=2"], r"slurm.nodes=2: a trial has one node; give slurm.workers=2"),
    "jobs without a search": (["slurm.workers=2"], r"slurm.workers=2: jobs join a search; give sweep.search=grid"),
    "unknown key": (["sweep.serch=tpe"], r"unknown key sweep.serch: .*did you mean sweep.search\?"),
    "one of its values": (["batch.micro_size=8,7"], r"batch.global_size=16 does not divide into .*batch.micro_size=7"),
    "a password": (
        ["sweep.search=tpe", "sweep.storage=postgresql://me:a/se@cret@x/db"],
        r"^refused: sweep.storage=postgresql://me:\*\*\*@x/db: .* give sweep.storage='\$\{oc.env:NAME\}'",
    ),
    "a password of a tracker": (
        ["tracker=mlflow", "tracker.uri=http://me:hunter2@x/"],
        r"^refused: tracker.uri=http://me:\*\*\*@x/: .* slurm.setup give the URI as MLFLOW_TRACKING_URI",
    ),
    "more workers than GPUs": (
        ["sweep.search=grid", "sweep.parallel=2", "slurm.gpus_per_node=1"],
        r"nproc=1 and sweep.parallel=2 with slurm.gpus_per_node=1: .*or more GPUs",
    ),
}


@pytest.mark.parametrize("name", REFUSED_SWEEPS)
def test_what_is_refused_of_a_sweep(name, capsys):
    words, message = REFUSED_SWEEPS[name]
    assert main(["sweep", "nproc=1", "optim.lr=1e-3,3e-3", *words]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_jobs_of_a_sweep_have_choices_of_a_folder(tmp_path, capsys):
    (tmp_path / "optim").mkdir()
    (tmp_path / "optim/mine.yaml").write_text("name: adamw\nlr: 0.002\n")
    words = ["nproc=1", "optim=mine,lion", "--config-dir", str(tmp_path)]
    assert main(["sweep", *words]) == 0
    text = capsys.readouterr().out
    assert f"hydra.searchpath=['file://{tmp_path}']" in " ".join(shlex.split(text.split("srun --", 1)[1].split("&")[0]))
    assert main(["sweep", *words, "hydra/launcher=slurm"]) == 2
    assert "leave Hydra's launcher out" in capsys.readouterr().err


def test_the_script_is_written_and_submitted(capsys, monkeypatch, tmp_path):
    sbatch = tmp_path / "sbatch"
    sbatch.write_text(f'#!/bin/sh\n/bin/cat > "{tmp_path}/given"; echo 4711\n')
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["train", "nproc=1", f"to={tmp_path}/job.sh"]) == 0
    assert capsys.readouterr().out == f"written; submit it with: sbatch {tmp_path}/job.sh\n"
    assert main(["train", "nproc=1", "submit=true"]) == 0
    assert capsys.readouterr().out == "4711\n"
    assert (tmp_path / "given").read_text() == (tmp_path / "job.sh").read_text()
    sbatch.write_text("#!/bin/sh\necho 'sbatch: error: invalid partition' >&2; exit 1\n")
    assert main(["train", "nproc=1", "submit=true"]) == 2
    assert capsys.readouterr().err == "refused: sbatch: error: invalid partition\n"


def test_limits():
    assert [limit_seconds(text) for text in ("00:01:00", "36:00:00", "1-12:00:30")] == [60, 129600, 129630]
