"""What a worker tells torch of GPUs before it begins."""

import os
from pathlib import Path

import pytest
import torch

from rowwise.launch.workers import gpu_settings, tell_gpu

RUN = Path("/runs/one")
WHOLE = {
    "PYTORCH_ALLOC_CONF": "expandable_segments:True",
    "TORCH_FR_BUFFER_SIZE": "2000",
    "TORCH_FR_DUMP_TEMP_FILE": "/runs/one/collectives-rank-",
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
}


def test_memory_grows_in_place_and_messages_are_kept_for_a_timeout():
    assert gpu_settings(RUN, {}) == WHOLE


@pytest.mark.parametrize(
    ("given", "left_alone"),
    [
        ("PYTORCH_ALLOC_CONF", "PYTORCH_ALLOC_CONF"),
        ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"),
        ("PYTORCH_HIP_ALLOC_CONF", "PYTORCH_ALLOC_CONF"),
        ("TORCH_FR_BUFFER_SIZE", "TORCH_FR_BUFFER_SIZE"),
        ("TORCH_NCCL_TRACE_BUFFER_SIZE", "TORCH_FR_BUFFER_SIZE"),
        ("TORCH_NCCL_DEBUG_INFO_TEMP_FILE", "TORCH_FR_DUMP_TEMP_FILE"),
        ("TORCH_NCCL_DUMP_ON_TIMEOUT", "TORCH_NCCL_DUMP_ON_TIMEOUT"),
    ],
)
def test_what_the_user_says_stays(given, left_alone):
    """By either of its names: torch would read the other first, or warn."""
    assert gpu_settings(RUN, {given: "0"}) == {name: value for name, value in WHOLE.items() if name != left_alone}


def test_only_workers_with_gpus_are_told(monkeypatch, tmp_path):
    for name in WHOLE:
        monkeypatch.delenv(name, raising=False)
    for there in (False, True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        tell_gpu(tmp_path)
        assert (os.environ.get("PYTORCH_ALLOC_CONF") == "expandable_segments:True") is there
