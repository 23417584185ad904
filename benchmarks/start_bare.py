"""The reference of `start.py`: the first step of the default model in a bare torch script, which knows nothing of Rowwise.

python benchmarks/start_bare.py OUT          writes OUT once the step is made
"""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

DIM, LAYERS, HEADS, KV_HEADS, FFN, VOCABULARY = 256, 4, 4, 2, 704, 256
SEQUENCES, MICRO_BATCHES, LENGTH = 8, 2, 256


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        size = DIM // HEADS
        self.q, self.k, self.v = (nn.Linear(DIM, heads * size, bias=False) for heads in (HEADS, KV_HEADS, KV_HEADS))
        self.out = nn.Linear(DIM, DIM, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part(x).unflatten(-1, (-1, DIM // HEADS)).transpose(1, 2) for part in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(turned(q), turned(k), v, is_causal=True, enable_gqa=True)
        return self.out(y.transpose(1, 2).flatten(2))


def turned(x: Tensor) -> Tensor:
    """Rotary positions."""
    half = x.size(-1) // 2
    angles = torch.arange(x.size(-2))[:, None] * 10000.0 ** (-torch.arange(half) / half)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], dim=-1)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.RMSNorm(DIM) for _ in range(2))
        self.attention, self.gate = Attention(), nn.Linear(DIM, FFN, bias=False)
        self.up, self.down = nn.Linear(DIM, FFN, bias=False), nn.Linear(FFN, DIM, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norms[0](x))
        y = self.norms[1](x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


def main() -> None:
    embed, head = nn.Embedding(VOCABULARY, DIM), nn.Linear(DIM, VOCABULARY, bias=False)
    model = nn.Sequential(embed, *(Block() for _ in range(LAYERS)), nn.RMSNorm(DIM), head)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3, (0.9, 0.95), weight_decay=0.1)
    text = torch.frombuffer(bytearray(Path(torch.nn.functional.__file__).read_bytes()), dtype=torch.uint8)
    places = torch.randint(len(text) - LENGTH - 1, (MICRO_BATCHES, SEQUENCES))
    for row in places:
        tokens = torch.stack([text[place : place + LENGTH + 1] for place in row]).long()
        logits = model(tokens[:, :-1])
        (F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()) / MICRO_BATCHES).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    Path(sys.argv[1]).write_text("made")


if __name__ == "__main__":
    main()
