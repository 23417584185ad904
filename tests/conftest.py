"""What every test shares: the pool of ranks, a world that is left as it was found, no GPU unless --nccl, and the seconds of
each file, printed at the end."""

import contextlib
import gc
import itertools
import os
import sys
import threading
from collections import Counter
from pathlib import Path

# Before torch looks, and for every process that a test starts: a test means the same on any machine.
if "--nccl" not in sys.argv:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

# What is compiled for the host is kept beside the code, for all processes of this test run and of later ones.
os.environ.setdefault("NUMBA_CACHE_DIR", str(Path(__file__).resolve().parents[1] / "build" / "numba"))

import psutil
import pytest
import torch
import torch.distributed as dist

from ranks import RankPools

# One thread in this process as in every rank: on busy cores torch's own threads wait for one another.
torch.set_num_threads(1)


# What takes longest begins first, so that no process is left alone with it at the end; see docs/testing.md.
FIRST = (
    "test_launch_sweep", "test_trainer_sparsity", "test_optim_rules", "test_composition", "test_trainer_pipeline",
    "test_trainer_sequence", "test_parallel_pipeline", "test_launch_report", "test_kernels_triton", "test_trainer_sparsity_runs",
    "test_trainer_spikes", "test_parallel_sequence", "test_launch_train", "test_trainer_train", "test_parallel_activations",
    "test_launch_start", "test_trainer_crash", "test_trainer_config", "test_parallel_pipeline_counts",
    "test_optim_in_backward", "test_trainer_plan", "test_parallel_shard", "test_optim_build", "test_house", "test_trainer_clock",
    "test_parallel_pipeline_schedule_search", "test_trainer_offload_states", "test_parallel_away", "test_parallel_gather",
)  # fmt: skip


def pytest_addoption(parser):
    parser.addoption(
        "--full", action="store_true", help="whole products of cases, where a share of them stands for all"
    )
    parser.addoption(
        "--slow", action="store_true", help="a browser, Slurm, the last kills and whole runs: `make test-slow`"
    )
    parser.addoption("--long", action="store_true", help="every preset, and attacks: `make test-long`")
    parser.addoption(
        "--nccl", action="store_true", help="leaves GPUs visible; worlds for which there are enough of them run on NCCL"
    )


def pytest_configure(config):
    if config.getoption("--nccl") and "--nccl" not in sys.argv:
        raise pytest.UsageError(
            "--nccl was read too late to leave GPUs visible; give it on the command line, without -n"
        )
    config.addinivalue_line("markers", "full: a case for which another stands, unless --full")
    config.addinivalue_line(
        "markers", "slow: a case of a browser, of Slurm, of many kills or of one more whole run, unless --slow"
    )
    config.addinivalue_line("markers", "long: a case that trains for minutes or attacks for minutes, unless --long")
    config.pluginmanager.register(FileSeconds())


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """What is imported for the tests stays, and is not looked through for what does not, again and again."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def pytest_collection_modifyitems(config, items):
    hidden = {mark for mark in ("full", "slow", "long") if not config.getoption(f"--{mark}")}
    left = {item: None for item in items if any(mark.name in hidden for mark in item.iter_markers())}
    for file in {item.path for item in items if item.get_closest_marker("slow")}:
        if file.parent.name == "tests" and "mark.slow" not in file.read_text():
            raise pytest.UsageError(
                f"{file.name} has slow cases and does not say mark.slow, by which make test-slow finds it"
            )
    config.hook.pytest_deselected(items=[*left])
    items[:] = [item for item in items if item not in left]
    turns = {name: turn for turn, name in enumerate(FIRST)}
    items.sort(key=lambda item: turns.get(item.path.stem, len(turns)))


class FileSeconds:
    """Prints what each file took: its seconds, and those that processors computed for it, in pytest's process and all below.

    A file that computes less than it takes waits: beside it, another may compute. The figures travel with the reports of
    tests, so that they arrive from pytest-xdist's workers too."""

    COMPUTED = "seconds computed for this file"

    def pytest_collection_finish(self):
        self.computed = computed_seconds()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_teardown(self, item, nextitem):
        try:
            return (yield)
        finally:
            if nextitem is None or nextitem.path != item.path:
                before, self.computed = self.computed, computed_seconds()
                item.user_properties.append((self.COMPUTED, self.computed - before))

    def pytest_terminal_summary(self, terminalreporter):
        took, computed = Counter(), Counter()
        for report in itertools.chain(*terminalreporter.stats.values()):
            if isinstance(report, pytest.TestReport):
                file = report.nodeid.partition("::")[0]
                took[file] += report.duration
                computed[file] += dict(report.user_properties).get(self.COMPUTED, 0) if report.when == "teardown" else 0
        if not took:
            return
        terminalreporter.section("seconds of each file, and those computed")
        for file, seconds in took.most_common():
            terminalreporter.write_line(f"{seconds:8.1f} {computed[file]:8.1f}  {file}")


def computed_seconds() -> float:
    """The processor seconds of this process and all below it, those that have ended included."""
    seconds = 0.0
    for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
        with contextlib.suppress(psutil.Error):
            seconds += sum(process.cpu_times()[:4])  # user, system, and both of its children
    return seconds


@pytest.fixture(scope="session")
def full(request):
    return request.config.getoption("--full")


@pytest.fixture(scope="session")
def ranks(request):
    pools = RankPools(torch.cuda.device_count() if request.config.getoption("--nccl") else 0)
    yield pools
    pools.close()


@pytest.fixture(scope="session", autouse=True)
def shared_cache(tmp_path_factory):
    """Corpora are cached in a folder of this test run, never in the user's."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))
    yield
    del os.environ["XDG_CACHE_HOME"]


@pytest.fixture(autouse=True)
def clean_world():
    """No test leaves a process group, a thread or a changed environment behind."""
    environment, threads = dict(os.environ), set(threading.enumerate())
    yield
    assert not dist.is_initialized(), "the test left a process group behind"
    begun = [t for t in set(threading.enumerate()) - threads if not t.daemon or t.name == "prefetch"]
    for thread in begun:
        thread.join(5.0)  # transformers tells its own to leave when it has read a model, and waits for none
    left = {thread.name for thread in begun if thread.is_alive()}
    os.environ.clear()
    os.environ.update(environment)
    assert not left, f"the test left threads behind: {left}"
