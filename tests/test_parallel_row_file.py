"""Rows in a file: whatever reads the mapping and whatever goes round it see the same numbers."""

import os

import pytest
import torch

from rowwise.parallel import row_file
from rowwise.parallel.row_file import RowFile


@pytest.fixture
def file(tmp_path):
    with_file = RowFile(tmp_path, "memory.offload_states=/disk")
    yield with_file
    with_file.close()


@pytest.mark.parametrize("shape", [(1,), (3, 5), (1000, 1003), (7, 2, 300)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
def test_what_is_laid_down_is_read_by_both_ways(file, shape, dtype):
    before, t, after = (torch.randn(size).mul(50).to(dtype) for size in ((13,), shape, (5, 3)))
    laid = [file.lay(x) for x in (before, t, after)]
    assert all(file.holds(x) and file.holds(x[-1:]) for x in laid) and not file.holds(t)
    for there, x in zip(laid, (before, t, after), strict=True):
        assert torch.equal(there, x)
        assert torch.equal(file.fetch([there]).result()[0], x)


def test_parts_are_read_and_written_by_themselves(file, monkeypatch):
    monkeypatch.setattr(row_file, "PIECE", 8192)
    t = torch.randn(999, 1003)
    laid, other = file.lay(t), file.lay(torch.ones(40))
    laid[5] = 7.0  # through the mapping
    assert (file.fetch([laid[5:9]]).result()[0][0] == 7).all()
    (part,) = file.fetch([laid[100:333]]).result()
    file.put([part * 2, torch.zeros(3)], [laid[100:333], other[30:33]]).result()
    assert torch.equal(laid[100:333], t[100:333] * 2)
    assert torch.equal(laid[333:], t[333:]) and torch.equal(laid[6:100], t[6:100])
    assert other.sum() == 37


def test_a_tensor_without_numbers_takes_no_room(file):
    laid = file.lay(torch.empty(0, 4))
    assert file.size == 0 and not file.holds(laid)
    assert file.fetch([laid]).result()[0].shape == (0, 4)
    file.put([torch.empty(0, 4)], [laid]).result()


def test_an_error_of_the_disk_names_the_option(file, monkeypatch):
    laid = file.lay(torch.ones(10))

    def fails(*given):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "preadv", fails)
    with pytest.raises(
        OSError, match=r"memory.offload_states=/disk cannot be read \(Input/output error\); give another folder, or cpu"
    ):
        file.fetch([laid]).result()
    monkeypatch.setattr(os, "posix_fallocate", fails)
    with pytest.raises(OSError, match=r"memory\.offload_states=/disk cannot be written"):
        file.room((3,), torch.float32)


def test_the_folder_shows_nothing(file, tmp_path):
    file.lay(torch.ones(10))
    assert not list(tmp_path.iterdir())


def test_a_snapshot_stays_as_it_was(file, tmp_path):
    """And lies in a file of its own, in a storage of its own size: the writer of checkpoints copies what has a larger one."""
    ts = [torch.randn(1000, 37), torch.empty(0, 3), torch.arange(7, dtype=torch.uint8)]
    laid = [file.lay(t) for t in ts]
    laid[0][3] = 5.0  # through the mapping
    ts[0][3] = 5.0
    copies = file.snapshot(laid)
    for t in laid:
        t.fill_(9)
    assert all(torch.equal(a, b) for a, b in zip(copies, ts, strict=True))
    assert all(t.untyped_storage().nbytes() == t.nbytes for t in copies)
    assert not any(file.holds(t) for t in copies) and not list(tmp_path.iterdir())


def test_a_snapshot_that_finds_no_room_names_the_option(file, monkeypatch):
    laid = file.lay(torch.ones(10))

    def full(*given):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "copy_file_range", full)
    with pytest.raises(
        OSError, match=r"28\] memory.offload_states=/disk cannot be copied for a save in the background \(No space left"
    ):
        file.snapshot([laid])
    assert torch.equal(laid, torch.ones(10))
