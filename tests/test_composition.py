"""Law 2 for every two options that go together: each case of `cases.txt` is a run of several of them, and equals one process.

docs/composition.md names for every pair the case that has it, or the words that refuse it; the page is kept current here.
"""

import contextlib
import functools
import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from unittest import mock

import composition
import numpy as np
import pytest
import torch
from cases import GROUPS, LAYOUT, NEAR, NOW, OPTIONS, alone_config, case_config, read_cases, write_chat, write_times
from composition import FAMILIES, PAGE, page

from parity import TOLERANCE, assert_same_codes, relative_error, write_tokens
from rowwise.trainer import rollback
from rowwise.trainer.config import TrainConfig
from rowwise.trainer.metrics import read_metrics
from rowwise.trainer.norms import KINDS
from runs import final_tensors, named, records, run_train, run_until, run_watched

CASES = read_cases()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("composition")
    write_tokens(folder)
    write_chat(folder)
    write_times(folder)
    return folder


def second_step(seen, loss, norm, config):
    """A spike at the second step, once."""
    return 99.0 if len(seen.losses) == 1 and not seen.skipped and not seen.rollbacks else None


def run_quietly(workers, config: TrainConfig, run: Callable[..., object], *arguments: object) -> None:
    """A run, up to a step or to its end; with a spike where something is to be done about it. Compiled blocks are traced as they
    are, and their code is torch's own."""
    compile_ = functools.partialmethod(torch.nn.Module.compile, backend="aot_eager")
    compiled = functools.partial(torch.compile, backend="aot_eager")
    spike = second_step if config.on_spike != "record" else rollback.spike_of
    with (
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
        mock.patch.object(torch.nn.Module, "compile", compile_),
        mock.patch.object(torch, "compile", compiled),
        mock.patch.object(rollback, "spike_of", spike),
    ):
        run(workers, config, *arguments)


NUMBERS = [pytest.param(n, marks=[] if n in NOW else pytest.mark.full, id=f"{n}") for n in range(1, len(CASES) + 1)]


@pytest.mark.parametrize("number", NUMBERS)
def test_a_run_of_these_options_is_the_run_of_one_process(ranks, folder, number):
    """The one's first step is watched, and the other's is not."""
    case = CASES[number - 1]
    config, world = case_config(case, folder)
    shared = named(config, folder, f"shared-{number}")
    alone = named(alone_config(case, folder), folder, f"alone-{number}")
    ranks.run(run_quietly, 1, alone, run_train)
    if "moved" in case:
        ranks.run(run_quietly, 1, replace(alone, run_dir=shared.run_dir), run_until, 1)
    ranks.run(run_quietly, world, shared, run_watched)
    if set(case) & NEAR:
        exact = named(alone_config(case, folder, exact=True), folder, f"exact-{number}")
        ranks.run(run_quietly, 1, exact, run_train)
        assert_near(shared, alone, exact)
    else:
        assert_equal(shared, alone)
    if config.on_spike != "record":
        assert "spike" in Path(shared.run_dir, "metrics.jsonl").read_text(), "nothing was done about the spike"


def assert_equal(shared: TrainConfig, alone: TrainConfig) -> None:
    """Records, evaluations, norms, and every tensor of the last checkpoint."""
    ours, theirs = records(shared.run_dir), records(alone.run_dir)
    assert len(set(ours)) == len(ours) > 1, "the loss does not move"
    np.testing.assert_allclose(np.array(ours), np.array(theirs), rtol=TOLERANCE)
    np.testing.assert_allclose(np.array(watched(shared)), np.array(watched(alone)), rtol=TOLERANCE)
    ours, theirs = final_tensors(shared.run_dir), final_tensors(alone.run_dir)
    assert ours.keys() == theirs.keys()
    assert_same_codes(ours, theirs)
    for key, tensor in theirs.items():
        if tensor.is_floating_point() and not torch.equal(ours[key], tensor):
            # Absolute maxima are kept in float32, whose last place a rounding may turn.
            bound = 2**-23 if tensor.dtype == torch.float32 else TOLERANCE
            assert relative_error(ours[key], tensor) <= bound, key


def assert_near(shared: TrainConfig, alone: TrainConfig, exact: TrainConfig) -> None:
    """Losses differ from those of 64 bits by roundings, and no more than those of one process do. Of masks that roundings choose,
    after one update: from the next on others are chosen."""
    after = 2 if shared.sparsity.name != "none" else None
    ours, theirs, right = (
        np.array([r["loss"] for r in read_metrics(Path(c.run_dir))][:after]) for c in (shared, alone, exact)
    )
    assert 0 < np.abs(ours - right).max() <= max(2 * np.abs(theirs - right).max(), 0.01)


def watched(config: TrainConfig) -> list[float]:
    """Losses of held-out text, and norms where there are any."""
    found = []
    for record in read_metrics(Path(config.run_dir)):
        found += [record["eval_loss"]] if "eval_loss" in record else []
        found += [norm for kind in KINDS for _, norm in sorted(record.get(kind, {}).items())]
    assert found
    return found


def test_the_page_is_current(folder):
    """No cell is empty: it names a case that has the pair, or the words that refuse it."""
    assert PAGE.read_text() == page(folder), "run python tests/composition.py"


def test_a_pair_that_no_case_tries_is_named(folder, monkeypatch):
    kept = [case for case in CASES if not {"muon", "rigl"} <= set(case)]
    monkeypatch.setattr(composition, "read_cases", lambda: kept)
    with pytest.raises(ValueError, match=r"neither tried nor refused: .*muon with rigl[,;]"):
        page(folder)


def test_every_option_stands_in_one_table():
    groups = [group for family in FAMILIES.values() for group in family]
    assert sorted(groups) == sorted(GROUPS) and set(groups) >= LAYOUT
    assert all(set(case) <= set(OPTIONS) for case in CASES)
