"""A short text from the model, to see what it has learned."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rowwise.parallel.mesh import Mesh
from rowwise.parallel.sequence import places_on
from rowwise.parallel.shard import release_gathered
from rowwise.trainer.data.batches import MicroBatch
from rowwise.trainer.pipeline import StagedDecoder

SAMPLED = 160  # tokens, where nothing is said


@dataclass(frozen=True)
class SampleConfig:
    """`tokens`: how many to write at the end of a run (0 = off; null: 160 where the data has a tokenizer), after
    `prompt`."""

    tokens: int | None = None
    prompt: str = "\n"
    temperature: float = 0.7


@torch.no_grad()
def generate(
    model: nn.Module, prompt: list[int], tokens: int, temperature: float, context: int, seed: int, mesh: Mesh
) -> list[int]:
    """`tokens` tokens after `prompt`, each drawn from softmax(logits / temperature) (0 = the likeliest).

    Every rank must call it with the same arguments: a sharded model is gathered for each token. It keeps no cache of
    keys and values; it is meant for a few hundred tokens. It ends where logits are not finite.
    """
    generator = torch.Generator().manual_seed(seed)
    written = list(prompt)
    for _ in range(tokens):
        logits = next_logits(model, written[-context:], mesh, refresh=len(written) == len(prompt)).cpu()
        if not logits.isfinite().all():
            break
        if temperature == 0:
            written.append(int(logits.argmax()))
        else:
            # From the largest, 0, down: no temperature is so small that a quotient is not finite.
            shares = ((logits - logits.max()) / temperature).softmax(0)
            written.append(int(torch.multinomial(shares, 1, generator=generator)))
    release_gathered(model)
    return written


def next_logits(model: nn.Module, tokens: list[int], mesh: Mesh, refresh: bool) -> Tensor:
    """The logits (V) of what follows `tokens`, float64, on every rank; each attends with its part of them. `refresh`:
    weights have changed since the last pass. Bytes: 8 V to every rank where the model or the sequence is split."""
    window = torch.tensor([tokens])
    batch = MicroBatch(window, window, torch.arange(len(tokens)).unsqueeze(0), None)
    place: int | None = len(tokens) - 1
    places = places_on(mesh, len(tokens))
    if places is not None:
        batch, place = batch.at(places), _find(places, len(tokens) - 1)
    batch = batch.to(mesh.device)
    if isinstance(model, StagedDecoder):
        logits = model.logits_at(batch, place, refresh)
    else:
        every = model(batch.inputs, batch.positions)[0]
        logits = every[place].double() if place is not None else every.new_zeros(every.size(-1), dtype=torch.float64)
    for axis in (mesh.sequence.ring, mesh.sequence.ulysses) if mesh.sequence is not None else ():
        dist.all_reduce(logits, group=axis.group)
    return logits


def _find(places: Tensor, place: int) -> int | None:
    found = places.eq(place).nonzero()
    return int(found) if found.numel() else None
