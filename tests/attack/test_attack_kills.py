"""A storm of kills: whatever layout a run has when it is killed, and on whatever it goes on, it ends as the one never killed.
(Law 6.)"""

import random
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from parity import TOLERANCE, relative_error, small_config, with_layout
from rowwise.trainer.manifest import complete_checkpoints
from rowwise.trainer.metrics import read_metrics
from runs import Job, await_instant, await_save, final_tensors, records, run_train

pytestmark = [pytest.mark.long, pytest.mark.filterwarnings("ignore:torch.distributed is disabled")]

KILLS, IN_SAVES = 100, 50
LAYOUTS = [
    (1, {}),
    (2, {"zero": 3}),
    (2, {"replicate": 2, "shard": 1, "zero": 1}),
    (2, {"pipeline": 2}),
    (2, {"ring": 2}),
    (3, {"zero": 2}),
]


def test_a_hundred_kills_over_layouts(ranks, tmp_path):
    """Two in three while a checkpoint is being written."""
    small = small_config(
        tmp_path, "steps=1000000", "checkpoint.every=4", "batch.micro_size=4", "schedule.warmup_steps=0"
    )
    chance, log = random.Random(2027), tmp_path / "log"
    kills = kills_in_save = 0
    for attempt in range(3 * KILLS):
        if kills >= KILLS and kills_in_save >= IN_SAVES:
            break
        world, degrees = chance.choice(LAYOUTS)
        config = with_layout(small, world, **degrees)
        job = Job(config, world, log)
        in_save = await_save(job, config, chance.choice([1, 2])) if attempt % 3 else await_instant(job, chance)
        killed = job.kill(chance.randrange(world))
        assert killed, f"the job ended before it was killed: {log.read_text()[-3000:]}"
        kills, kills_in_save = kills + killed, kills_in_save + (killed and in_save)
        time.sleep(chance.uniform(0, 0.2))
        job.end()
    assert kills >= KILLS and kills_in_save >= IN_SAVES
    run = Path(small.run_dir)
    assert complete_checkpoints(run / "checkpoints"), "the kills left nothing to go on from"
    end = replace(with_layout(small, 1), steps=read_metrics(run)[-1]["step"] + 5)
    ranks.run(run_train, 1, end)
    whole = replace(end, run_dir=str(tmp_path / "whole"), checkpoint=replace(end.checkpoint, every=0))
    ranks.run(run_train, 1, whole)
    assert [record[0] for record in records(run)] == list(range(1, end.steps + 1))
    np.testing.assert_allclose(np.array(records(run)), np.array(records(whole.run_dir)), rtol=TOLERANCE)
    ours, theirs = final_tensors(run), final_tensors(whole.run_dir)
    assert all(relative_error(ours[name], tensor) <= TOLERANCE for name, tensor in theirs.items())
    assert not list((run / "checkpoints").glob("*.incomplete")) + list(run.glob("metrics.jsonl.damaged*"))
