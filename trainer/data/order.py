"""The order of samples: a pseudo-random permutation of any size in constant memory.

Sample k of a run is element k mod n of the permutation of epoch k div n. The permutation of [0, n) is a Feistel
network on the smallest even number of bits that holds n, with cycle walking: what falls outside [0, n) is sent
through again (Black & Rogaway, *Ciphers with Arbitrary Finite Domains*). At most three walks are expected per
element, whatever n. The order depends on the seed alone, on no layout and no batch size.
"""

import hashlib

import numpy as np

_ROUNDS = 8
LARGEST = 1 << 62


class Permutation:
    """The permutation of [0, size) named by `key`."""

    def __init__(self, size: int, key: str):
        if not 1 <= size <= LARGEST:
            raise ValueError(f"a permutation of {size} elements: possible are 1 to 2^62")
        self.size = size
        self._half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
        digest = hashlib.sha512(key.encode()).digest()
        self._keys = np.frombuffer(digest, dtype=np.uint64)[:_ROUNDS]

    def __call__(self, places: np.ndarray) -> np.ndarray:
        """Returns the elements at `places` (n,), as int64."""
        values = places.astype(np.uint64)
        outside = np.ones(values.shape, dtype=bool)
        while outside.any():
            values[outside] = self._feistel(values[outside])
            outside = values >= self.size
        return values.astype(np.int64)

    def _feistel(self, values: np.ndarray) -> np.ndarray:
        shift, mask = np.uint64(self._half_bits), np.uint64((1 << self._half_bits) - 1)
        left, right = values >> shift, values & mask
        for key in self._keys:
            left, right = right, left ^ (_mix(right + key) & mask)
        return (left << shift) | right


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele et al., 2014): every input bit reaches every output bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def sample_indices(first: int, count: int, size: int, key: str) -> np.ndarray:
    """Says which of `size` samples are number `first`, ..., `first + count - 1` of the run: int64 (count,)."""
    numbers = np.arange(first, first + count, dtype=np.int64)
    epochs = numbers // size
    indices = np.empty(count, dtype=np.int64)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        indices[here] = Permutation(size, f"{key}/{epoch}")(numbers[here] % size)
    return indices
