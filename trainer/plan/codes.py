"""What it takes to code and to decode on a CPU, where that is done in portions in many operators; a GPU's kernel takes nothing beside
what it gives. Found by doing it on the meta device, where nothing takes memory."""

import functools

import torch

from rowwise.kernels.activation_codes import Codes, channel_groups, decode_reference_, encode
from rowwise.kernels.portions import portion_elements
from rowwise.parallel.activations.results import LayerResults
from rowwise.parallel.lifetimes import Lifetimes


def coding_bytes(table: LayerResults, tokens: int) -> int:
    """Counts the bytes at most beside what a layer's results are coded from and to."""
    return max(_bytes(_rows(tokens, columns), columns, portion_elements())[0] for columns in _columns(table))


def decoding_bytes(table: LayerResults, tokens: int) -> int:
    """Counts the bytes at most beside what a layer's results are decoded from and to."""
    return max(_bytes(_rows(tokens, columns), columns, portion_elements())[1] for columns in _columns(table))


def _columns(table: LayerResults) -> set[int]:
    return {table.input, *(result.numbers // result.tensors for result in table.results if result.numbers)}


def _rows(tokens: int, columns: int) -> int:
    """Of a portion: all are alike."""
    return min(tokens, max(1, portion_elements() // columns))


@functools.cache
def _bytes(rows: int, columns: int, portion: int) -> tuple[int, int]:
    """(coding, decoding) of a portion."""
    x = torch.empty(rows, columns, device="meta")
    tokens, groups = torch.empty(rows, dtype=torch.int64, device="meta"), channel_groups(columns)
    with Lifetimes([], []) as lives:
        made = encode(x, groups, 0, tokens)
    coding = lives.peaks()[1] - sum(t.nbytes for t in made)
    with Lifetimes([], []) as lives:
        decode_reference_(Codes(*made), groups.width, x)
    return coding, lives.peaks()[1]
