"""What every test shares: the pool of ranks, a world that is left as it was found, and no GPU unless --nccl."""

import os
import sys
import threading

# Before torch looks, and for every process that a test starts: a test means the same on any machine.
if "--nccl" not in sys.argv:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

import pytest
import torch
import torch.distributed as dist

from ranks import RankPools

# One thread in this process as in every rank: on busy cores torch's own threads wait for one another.
torch.set_num_threads(1)


def pytest_addoption(parser):
    parser.addoption(
        "--full", action="store_true", help="whole products of cases, where a share of them stands for all"
    )
    parser.addoption("--slow", action="store_true", help="cases that train for minutes: `make test-slow`")
    parser.addoption(
        "--nccl", action="store_true", help="leaves GPUs visible; worlds for which there are enough of them run on NCCL"
    )


def pytest_configure(config):
    if config.getoption("--nccl") and "--nccl" not in sys.argv:
        raise pytest.UsageError("--nccl was read too late to leave GPUs visible; give it on the command line")
    config.addinivalue_line("markers", "full: a case for which another stands, unless --full")
    config.addinivalue_line("markers", "slow: a case that trains for minutes, unless --slow")


def pytest_collection_modifyitems(config, items):
    hidden = {mark for mark in ("full", "slow") if not config.getoption(f"--{mark}")}
    left = [item for item in items if any(mark.name in hidden for mark in item.iter_markers())]
    config.hook.pytest_deselected(items=left)
    items[:] = [item for item in items if item not in left]


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
    left = {t.name for t in set(threading.enumerate()) - threads if not t.daemon or t.name == "prefetch"}
    os.environ.clear()
    os.environ.update(environment)
    assert not left, f"the test left threads behind: {left}"
