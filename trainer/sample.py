"""A short text from the model, to see what it has learned."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from rowwise.conf.option import MayChange
from rowwise.conf.refusal import Refusal, Refusals
from rowwise.parallel.mesh import Mesh
from rowwise.parallel.sequence import positions_on
from rowwise.trainer.data.batches import MicroBatch
from rowwise.trainer.engine import Engine

SAMPLED = 160  # tokens, where nothing is said


@dataclass(frozen=True)
class SampleConfig:
    """What the model writes at the end of a run. `tokens`: how many (0: off; null: 160, and 0 where the data has no
    tokenizer). `prompt`: what it begins with, or where it learns conversations what a user says that it answers.
    `temperature`: of the draw; 0 takes the likeliest."""

    tokens: MayChange[int | None] = None
    prompt: MayChange[str] = "\n"
    temperature: MayChange[float] = 0.7


MOST_SAMPLED = 1_000_000
SAMPLES: Refusals = (
    Refusal(
        ("sample.tokens", "sample.temperature"),
        lambda run: (run.sample.tokens or 0) < 0 or run.sample.temperature < 0,
        "sample.tokens and sample.temperature are at least 0",
    ),
    Refusal(
        ("sample.tokens",),
        lambda run: (run.sample.tokens or 0) > MOST_SAMPLED,
        f"sample.tokens={{sample.tokens}}: each takes a forward; give at most {MOST_SAMPLED:,}",
    ),
)


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen: `temperature` 0 takes the likeliest, else it is drawn, among the `top_k` likeliest (0: all)
    and among the fewest that have the share `top_p` of the probability, with the numbers of `seed`."""

    temperature: float = 0.7
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0


def drawn(logits_V: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """Returns a token drawn from softmax(logits / temperature), cut to `top_k` and then to `top_p` (Holtzman et al., *The Curious
    Case of Neural Text Degeneration*); of equals the first. `logits` are finite."""
    if sampling.temperature == 0:
        return int(logits_V.argmax())
    return int(torch.multinomial(shares(logits_V, sampling), 1, generator=generator))


def shares(logits_V: Tensor, sampling: Sampling) -> Tensor:
    """Returns the probability of each token, in the dtype of the logits."""
    # From the largest, 0, down: no temperature is so small that a quotient is not finite.
    scaled = (logits_V - logits_V.max()) / sampling.temperature
    if 0 < sampling.top_k < len(scaled):
        scaled = scaled.masked_fill(scaled < scaled.topk(sampling.top_k).values[-1], -torch.inf)
    shares = scaled.softmax(0)
    if sampling.top_p < 1:
        ordered, tokens = shares.sort(descending=True, stable=True)
        shares[tokens[ordered.cumsum(0) - ordered >= sampling.top_p]] = 0  # what comes before has the share already
    return shares


@torch.no_grad()
def generate(
    engine: Engine,
    prompt: list[int],
    tokens: int,
    temperature: float,
    context: int,
    seed: int,
    mesh: Mesh,
    end: int | None = None,
) -> list[int]:
    """Returns `prompt` and `tokens` tokens after it, each drawn from softmax(logits / temperature) (0 = the likeliest); fewer where
    one of them is `end`, the last.

    Every rank must call it with the same arguments: a sharded model is gathered for each token. It keeps no cache of
    keys and values; it is meant for a few hundred tokens (`trainer.generate` has one, for a whole model). It ends where
    logits are not finite.
    """
    generator, sampling = torch.Generator().manual_seed(seed), Sampling(temperature)
    written = list(prompt)
    for _ in range(tokens):
        logits = next_logits(engine, written[-context:], mesh, refresh=len(written) == len(prompt)).cpu()
        if not logits.isfinite().all():
            break
        written.append(drawn(logits, sampling, generator))
        if written[-1] == end:
            break
    engine.release()
    return written


def next_logits(engine: Engine, tokens: list[int], mesh: Mesh, refresh: bool) -> Tensor:
    """Returns the logits (V) of what follows `tokens`, float64, on every rank; each attends with its part of them. `refresh`:
    weights have changed since the last pass. Bytes: 8 V to every rank where the model or the sequence is split."""
    window = torch.tensor([tokens])
    batch = MicroBatch(window, window, torch.arange(len(tokens)).unsqueeze(0), None)
    place: int | None = len(tokens) - 1
    positions = positions_on(mesh, len(tokens))
    if positions is not None:
        batch, place = batch.at(positions), _find(positions, len(tokens) - 1)
    logits = engine.logits(batch, place, refresh)
    for axis in (mesh.sequence.ring, mesh.sequence.ulysses) if mesh.sequence is not None else ():
        dist.all_reduce(logits, group=axis.group)
    return logits


def _find(positions: Tensor, place: int) -> int | None:
    found = positions.eq(place).nonzero()
    return int(found) if found.numel() else None
