"""benchmarks/gpu.py: what one check does is not the next one's, and all that is known is kept after each."""

from pathlib import Path

CHECKS = """
import os, time
from gpu_place import NotPossibleHere
def dies(place): os._exit(3)
def hangs(place): print("so far", flush=True); time.sleep(60)
def lacks(place): raise NotPossibleHere("a second GPU")
def fails(place): raise ValueError("a device-side assert")
def passes(place): return {"passed": place.rehearsal}
"""


def test_a_check_that_dies_hangs_or_fails_costs_itself_alone(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "some_checks.py").write_text(CHECKS)
    from gpu import Check, Place, run_checks

    budgets = {"dies": 60, "lacks": 60, "fails": 60, "passes": 60}
    kept: list[list[str]] = []
    checks = [Check(name, f"some_checks:{name}", seconds) for name, seconds in budgets.items()]
    found = run_checks(checks, Place(rehearsal=True), lambda so_far: kept.append(list(so_far)), 600)
    assert kept == [list(budgets)[: n + 1] for n in range(4)]
    assert "exit code 3" in found["dies"]["error"]
    assert found["lacks"]["not_possible"] == "a second GPU"
    assert "a device-side assert" in found["fails"]["error"]
    assert found["passes"]["passed"] is True


def test_a_check_that_hangs_is_given_up(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "some_checks.py").write_text(CHECKS)
    from gpu import Check, Place, Worker

    worker = Worker(Place(rehearsal=True))
    worker.run(Check("passes", "some_checks:passes", 60), 60)
    found = worker.run(Check("hangs", "some_checks:hangs", 1), 1)
    worker.close()
    assert found["passed"] is False and "no end after 1 s" in found["error"] and "so far" in found["said"]


def test_every_check_exists_and_the_first_answer_comes_within_a_minute(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    import importlib

    from gpu import CHECKS as checks

    assert checks[0].seconds <= 60
    for check in checks:
        module, _, name = check.function.partition(":")
        assert getattr(importlib.import_module(module), name).__doc__, check.name
