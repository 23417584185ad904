"""The 8-bit codes that runs make, by their logical place."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

from parity import Trace, run_on, small_config, with_layout
from ranks import RankPools
from rowwise.parallel.activations import compress
from rowwise.parallel.mesh import Workers, make_mesh
from rowwise.trainer.config import TrainConfig

SHARED = ("model.dim=32", "model.heads=4", "batch.global_size=8")  # heads that two ranks can share, and few sequences
Coded = dict[tuple[int, int, int], bytes]  # (stream, token, group) -> codes and range


@contextlib.contextmanager
def codes_seen(seen: Coded) -> Iterator[None]:
    """While entered, puts all codes that are made into `seen`, by their logical place."""
    made = compress.encode

    def encode(x, groups, key, tokens, within=None):
        kept = made(x, groups, key, tokens, within)
        codes, ranges = kept.codes.split(groups.width, 1), kept.ranges.unbind(1)
        for j, (part, its) in enumerate(zip(codes, ranges, strict=True)):
            group = (groups.first + j) // groups.repeat
            for token, row, range_ in zip(tokens.tolist(), part.numpy(), its.numpy(), strict=True):
                found = row.tobytes() + range_.tobytes()
                if token >= 0:  # no padding
                    assert seen.setdefault((key, token, group), found) == found
        return kept

    with mock.patch.object(compress, "encode", encode):
        yield


def run_seen(workers: Workers, config: TrainConfig, steps: int) -> tuple[Trace, Coded]:
    """A run, and the codes that this rank made."""
    seen: Coded = {}
    mesh = make_mesh(config.parallel, workers)
    with codes_seen(seen):
        trace = run_on(mesh, config, steps)
    return trace, seen


def all_codes(everyone: list[tuple[Trace, Coded]]) -> Coded:
    """Those of all ranks, which agree where two have the same."""
    found: Coded = {}
    for _, seen in everyone:
        for place, codes in seen.items():
            assert found.setdefault(place, codes) == codes
    return found


def seen_alone(ranks: RankPools, folder: Path, steps: int) -> Callable[..., tuple[Trace, Coded]]:
    """Steps of one process, by what else is asked for, each made once."""
    made: dict[tuple[str, ...], tuple[Trace, Coded]] = {}

    def run(*words: str) -> tuple[Trace, Coded]:
        if words not in made:
            config = with_layout(small_config(folder, *SHARED, *words), 1)
            made[words] = ranks.run(run_seen, 1, config, steps)[0]
        return made[words]

    return run
