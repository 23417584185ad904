"""How much is swapped and how much made again (Fuyou's trade), what rough counts say of it, and what is offered off the device."""

import itertools
from dataclasses import replace

import pytest

from rowwise.launch.compose import compose_tree
from rowwise.trainer.check import check
from rowwise.trainer.config import config_from_tree
from rowwise.trainer.plan.clock import Clock
from rowwise.trainer.plan.devices import DEVICES
from rowwise.trainer.plan.fit import find_fit
from rowwise.trainer.plan.load import Load
from rowwise.trainer.plan.rough import Rough
from rowwise.trainer.plan.trade import SHARES, least, traded_share
from rowwise.trainer.plan.traffic import Traffic, stepping

LLAMA = ["model=llama3_8b", "batch.seq_len=4096", "precision=bf16", "schedule=constant"]
AWAY = ["parallel.zero=3", "memory.offload_activations=cpu", "memory.offload_states=cpu", "memory.offload_params=cpu"]
ASKED = ["batch.micro_size=4", "memory.recompute=selective", "memory.offload_activations=cpu"]
GIVEN = {"memory.compress", "parallel.pipeline", *(word.partition("=")[0] for word in ASKED)}


def llama(*words):
    return config_from_tree(compose_tree([*LLAMA, *words]))


@pytest.mark.parametrize("best", [0, 1, 7, 19, 20])
def test_the_least_of_a_convex_function_is_found_in_few_looks(best):
    looks = []
    assert least(lambda n: looks.append(n) or (n - best) ** 2, 0, 20) == best and len(looks) <= 10
    assert least(lambda n: max(5, n - best), 0, 20) <= best + 5, "of those that are alike the first"


def test_all_ways_are_used_at_once():
    device = replace(DEVICES["h100"], host=10.0, disk=4.0, disk_read=8.0, measured=True)
    assert Traffic(up=50.0, down=30.0).seconds(device) == 5.0  # both ways of a link at once
    assert Traffic(up=50.0, read=40.0, written=4.0).seconds(device) == 6.0  # a disk reads or writes
    assert Traffic(up=50.0, read=40.0, steps=7.0).seconds(device) == 7.0


def test_a_host_steps_by_the_bytes_that_it_moves():
    run, device = check(llama("batch.global_size=8"), 1), DEVICES["h100"]
    assert stepping(run, device, 1e9, 8e9) == pytest.approx(1e9 / device.step)
    narrow = replace(run, optim=replace(run.optim, param_dtype="bf16"))
    assert stepping(narrow, device, 1e9, 8e9) == pytest.approx(22 / 28 * 1e9 / device.step)
    eight = check(llama("batch.global_size=8", "optim=adamw8bit"), 1)
    assert stepping(eight, replace(device, step_8bit=2e9), 1e9, 2e9) == 0.5


@pytest.mark.parametrize("host", [2e9, 6e9, 64e9])
def test_what_leaves_is_traded_against_what_is_made_again(host):
    """Beside the links of a machine, the share is the one that no other share beats, and a step falls towards it from both sides."""
    run, device = (
        check(llama("batch.global_size=4", "batch.micro_size=4", *AWAY), 1),
        replace(DEVICES["h100"], host=host),
    )
    rough = Rough(run, device)

    def seconds(share):
        return rough.seconds(replace(run, memory=replace(run.memory, recompute=share)))

    every = [seconds(share / SHARES) for share in range(SHARES + 1)]
    share = traded_share(run, rough.seconds, lambda run: True)
    found = SHARES if share is None else round(share * SHARES)
    assert every[found] <= min(every) * 1.002, "layers keep whole results: neighbours may differ by one"
    slack = 0.002 * min(every)
    assert all(b <= a + slack for a, b in itertools.pairwise(every[: found + 1]))
    assert all(b >= a - slack for a, b in itertools.pairwise(every[found:]))
    if host == 2e9:
        assert share is not None and share < 0.5, "a slow link carries little"


def test_a_share_leaves_room_on_the_host():
    run = check(llama("batch.global_size=4", "batch.micro_size=4", *AWAY), 1)
    rough = Rough(run, DEVICES["h100"])
    free = traded_share(run, rough.seconds, lambda run: True) or 1.0
    bounded = traded_share(run, rough.seconds, lambda run: run.memory.recompute < 0.3)
    assert bounded is not None and bounded < 0.3 < free


def test_a_model_that_fits_no_gpu_whole_is_offered_its_host():
    """8B with AdamW in 32 bits on a card of 24 GB, in a machine with the memory for it; not on one with less."""
    run, given = llama("batch.global_size=8", *ASKED), GIVEN
    card = replace(DEVICES["rtx4090"], ram=256e9)
    found = find_fit(run, 1, card, given)
    assert found.best is not None and found.best.room.fits
    assert {"memory.offload_states=cpu", "memory.offload_params=cpu"} <= set(found.words)
    assert found.best.worst.peaks["host"] > 8 * 8e9 and found.best.worst.peaks["optimizer"] == 0
    changes = dict(found.changes)
    assert changes["memory.offload_params=none"].room.needed > found.best.room.needed + 30e9
    assert find_fit(run, 1, DEVICES["rtx4090"], given).best is None
    roomy = find_fit(llama("batch.global_size=32", *ASKED), 8, DEVICES["h100"], given)
    assert not {word for word in roomy.words if "offload_states" in word}, "what fits stays on the device"


def test_a_folder_is_used_where_it_is_given(tmp_path):
    run, given = (
        llama("batch.global_size=8", *ASKED, f"memory.offload_states={tmp_path}"),
        GIVEN | {"memory.offload_states"},
    )
    card = replace(DEVICES["rtx4090"], ram=150e9)
    found = find_fit(run, 1, card, given)
    assert found.best is not None and found.best.worst.peaks["file"] == 8 * 8_030_261_248
    assert find_fit(run, 1, replace(card, disk_room=50e9), given).best is None


def test_codes_and_copies_cross_the_slow_links_as_often_as_they_should():
    """ZeRO++'s count, on two machines of two: of three models of 16 bits that cross between machines, three quarters of one."""
    device = replace(DEVICES["h100"], per_machine=2, network=1e9, measured=True)
    words = ["batch.global_size=32", "parallel.zero=3"]
    plain, coded = (
        Clock(check(llama(*words, *more), 4), device)
        for more in ([], ["parallel.quantize_gather=int8", "parallel.inner_shard=2", "parallel.quantize_reduce=int4"])
    )
    numbers, load = 1e9, Load(gathered=2e9, learning=1e9)
    between = numbers / 2 / 2 / 1e9  # seconds a byte of each number takes over two links of each machine
    first, again = plain.gather(load, 4)
    assert first == again == pytest.approx(2 * between) and plain.reduce(load, 4) == pytest.approx(4 * between)
    first, again = coded.gather(load, 4)
    assert first == pytest.approx((1 + 4 / 256) * between) and again < 0.01 * between
    assert coded.reduce(load, 4) == pytest.approx((0.5 + 4 / 256) * between, rel=0.02)
