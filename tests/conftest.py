"""What every test shares: the pool of ranks, and a world that is left as it was found."""

import os
import threading

import pytest
import torch
import torch.distributed as dist

from ranks import RankPool

# One thread in this process as in every rank: on busy cores torch's own threads wait for one another.
torch.set_num_threads(1)


def pytest_addoption(parser):
    parser.addoption(
        "--full", action="store_true", help="whole products of cases, where a share of them stands for all"
    )


def pytest_configure(config):
    config.addinivalue_line("markers", "full: a case for which another stands, unless --full")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--full"):
        config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("full")])
        items[:] = [item for item in items if not item.get_closest_marker("full")]


@pytest.fixture(scope="session")
def full(request):
    return request.config.getoption("--full")


@pytest.fixture(scope="session")
def ranks():
    pool = RankPool()
    yield pool
    pool.close()


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
