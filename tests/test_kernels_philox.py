"""Law 1 for the normal stream: the reference against published words and numpy's, the Triton kernel against it."""

import numpy as np
import pytest
import torch

from interpreter import interpreted
from rowwise.kernels.philox import normal, normal_reference, philox_words, stream_key

CPU = torch.device("cpu")


def test_words_are_those_of_numpys_philox():
    """numpy's Philox is 4x64; its 4x32 form is checked against the known answers of Random123 instead."""
    zero = [int(word) for word in philox_words(0, torch.zeros(1, dtype=torch.int64))]
    assert zero == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


def textbook_philox(counter: list[int], key: list[int]) -> list[int]:
    """Philox-4x32-10 with Python's whole numbers, as the paper prints it."""
    c, k = list(counter), list(key)
    for _ in range(10):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(b >> 32) ^ c[1] ^ k[0], b & 0xFFFFFFFF, (a >> 32) ^ c[3] ^ k[1], a & 0xFFFFFFFF]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c


@pytest.mark.parametrize("counter", [0, 1, 12345, 2**32 - 1, 2**32, 2**45 + 7])
def test_words_are_those_of_the_paper(counter):
    key = stream_key(3, "blocks.0.attention.wq.weight")
    words = [int(word) for word in philox_words(key, torch.tensor([counter]))]
    assert words == textbook_philox([counter & 0xFFFFFFFF, counter >> 32, 0, 0], [key & 0xFFFFFFFF, key >> 32])


def test_any_slice_is_a_slice_of_the_whole():
    key = stream_key(1, "w")
    whole = normal(key, 0, 4099, CPU)
    for start, count in [(0, 1), (1, 2), (3, 5), (4, 4), (7, 4092), (4098, 1), (100, 0)]:
        assert torch.equal(normal(key, start, count, CPU), whole[start : start + count])


def test_slices_across_chunks_and_beyond_32_bits():
    key = stream_key(1, "w")
    far = 2**34 + 3
    whole = normal(key, far, (1 << 20) + 50, CPU)
    assert torch.equal(whole[1 << 20 :], normal(key, far + (1 << 20), 50, CPU))


def test_numbers_are_standard_normal():
    numbers = normal(stream_key(0, "x"), 0, 1_000_000, CPU).double()
    assert abs(numbers.mean()) < 4e-3
    assert abs(numbers.var() - 1) < 6e-3
    assert abs((numbers**4).mean() - 3) < 3e-2
    shares = [(numbers.abs() < z).double().mean().item() for z in (1, 2, 3)]
    np.testing.assert_allclose(shares, [0.68269, 0.95450, 0.99730], atol=2e-3)
    assert abs((numbers[1:] * numbers[:-1]).mean()) < 4e-3
    assert numbers.isfinite().all()


def test_streams_differ():
    keys = {stream_key(seed, name) for seed in range(50) for name in ("a", "b")}
    assert len(keys) == 100


def agree():
    from rowwise.kernels.philox_triton import normal_triton

    for seed in (0, 5):
        for start, count in [(0, 1), (0, 1024), (3, 5), (1, 4097), (2**34 + 1, 777), (8, 0)]:
            key = stream_key(seed, "w")
            ours, reference = normal_triton(key, start, count, CPU), normal_reference(key, start, count, CPU)
            assert ours.shape == reference.shape == (count,)
            # The same words; float32 Box-Muller through other log, cos and sin.
            torch.testing.assert_close(ours, reference, rtol=2e-5, atol=2e-6)


def test_the_triton_kernel_agrees_with_the_reference():
    interpreted("test_kernels_philox", "agree")


def test_the_choice_of_kernels(monkeypatch):
    from rowwise.kernels.dispatch import use_triton

    assert not use_triton(CPU)
    assert use_triton(torch.device("cuda"))
    monkeypatch.setenv("ROWWISE_KERNELS", "reference")
    assert not use_triton(torch.device("cuda"))
    monkeypatch.setenv("ROWWISE_KERNELS", "fastest")
    with pytest.raises(ValueError, match="ROWWISE_KERNELS='fastest': possible are 'auto' and 'reference'"):
        use_triton(CPU)
    assert normal_reference(1, 0, 3, CPU).dtype == torch.float32
