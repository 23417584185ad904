"""A short text from the model, to see what it has learned."""

from dataclasses import dataclass

import torch
from torch import nn

from rowwise.parallel.shard import release_gathered
from rowwise.trainer.data.batches import MicroBatch
from rowwise.trainer.pipeline import StagedDecoder


@dataclass(frozen=True)
class SampleConfig:
    """`tokens`: how many to write at the end of a run (0 = off), after `prompt`."""

    tokens: int = 0
    prompt: str = "\n"
    temperature: float = 0.7


@torch.no_grad()
def generate(
    model: nn.Module, prompt: list[int], tokens: int, temperature: float, context: int, seed: int, device: torch.device
) -> list[int]:
    """`tokens` tokens after `prompt`, each drawn from softmax(logits / temperature) (0 = the likeliest).

    Every rank must call it with the same arguments: a sharded model is gathered for each token. It keeps no cache of
    keys and values; it is meant for a few hundred tokens.
    """
    generator = torch.Generator().manual_seed(seed)
    written = list(prompt)
    for _ in range(tokens):
        window = torch.tensor([written[-context:]], device=device)
        positions = torch.arange(window.size(1), device=device).unsqueeze(0)
        if isinstance(model, StagedDecoder):
            logits = model.last_logits(
                MicroBatch(window, window, positions, None), refresh=len(written) == len(prompt)
            ).cpu()
        else:
            logits = model(window, positions)[0, -1].double().cpu()
        if temperature == 0:
            written.append(int(logits.argmax()))
        else:
            written.append(int(torch.multinomial((logits / temperature).softmax(0), 1, generator=generator)))
    release_gathered(model)
    return written
