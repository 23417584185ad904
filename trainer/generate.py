"""Text from a whole model, token by token, with a cache of keys and values; for `sample.py`, which writes on every layout, see there.

The next token is drawn from what the model says after the last `context` tokens, the length that it was trained with. Up to
there a token costs a forward of one token: keys and values of those before are kept, 2 x layers x kv_heads x head_dim numbers
a token. Beyond it every position moves with every token, nothing that was kept is true any more, and a token costs a forward of
`context` tokens.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from rowwise.kernels.attention import nothing_seen, see
from rowwise.kernels.look import PLAINLY, Look
from rowwise.kernels.products import float32_products
from rowwise.kernels.visible import Documents, Run, visible_areas
from rowwise.trainer.data.tokenizer import Tokenizer
from rowwise.trainer.models.decoder import Decoder
from rowwise.trainer.sample import Sampling, drawn

CHUNK = 512  # tokens of a prompt that go through the model at once: logits and scores of all would fill the memory


class KeyValueCache:
    """An `Attend` of one sequence that keeps the keys and values of each layer: what it is given next stands behind them.
    Layers take turns, in their order."""

    def __init__(self, layers: int):
        self._kept: list[tuple[Tensor, Tensor] | None] = [None] * layers
        self._turn = 0

    def __call__(
        self, q_BSHE: Tensor, k_BSKE: Tensor, v_BSKE: Tensor, documents: Documents | None = None, look: Look = PLAINLY
    ) -> Tensor:
        """Computes attention of S new tokens to all T so far: (B, S, H, E)."""
        before = self._kept[self._turn]
        if before is not None:
            k_BSKE, v_BSKE = torch.cat((before[0], k_BSKE), 1), torch.cat((before[1], v_BSKE), 1)
        self._kept[self._turn] = k_BSKE, v_BSKE
        self._turn = (self._turn + 1) % len(self._kept)
        S, T = q_BSHE.size(1), k_BSKE.size(1)
        if (look := look.at(T)).window is not None or look.cap is not None:
            out, lse = nothing_seen(q_BSHE)
            areas = visible_areas((Run(T - S, 1, S),), (Run(0, 1, T),), None, look.window)
            see(q_BSHE, k_BSKE, v_BSKE, areas, out, lse, look)
            return out.to(q_BSHE.dtype)
        seen = None if S == 1 else torch.ones(S, T, dtype=torch.bool, device=q_BSHE.device).tril(T - S)
        y_BHSE = F.scaled_dot_product_attention(
            q_BSHE.transpose(1, 2),
            k_BSKE.transpose(1, 2),
            v_BSKE.transpose(1, 2),
            attn_mask=seen,
            scale=look.scale,
            enable_gqa=q_BSHE.size(2) != k_BSKE.size(2),
        )
        return y_BHSE.transpose(1, 2)


@dataclass(frozen=True)
class Writer:
    """A whole model, its tokenizer, how many tokens it looks back, and the token at which it ends (None: none does).
    `tf32`: its products on a GPU are rounded as the run's were."""

    model: Decoder
    tokenizer: Tokenizer
    context: int
    end_token: int | None = None
    tf32: bool = False

    def encode(self, prompt: str) -> list[int]:
        """Returns the tokens of a prompt. Raises ValueError where it has none."""
        tokens = self.tokenizer.encode_prompt(prompt)
        if not tokens:
            raise ValueError(f"prompt={prompt!r} has no token to go on from; give a longer one")
        return tokens

    def write(self, prompt: str, most: int = 160, sampling: Sampling | None = None) -> Iterator[str]:
        """Yields what stands after `prompt`, at most `most` tokens of it, piece by piece as it comes: all pieces together are what
        the tokenizer makes of all tokens. Raises ValueError for a prompt without a token, and FloatingPointError where the
        model's logits are not finite."""
        tokens = self.encode(prompt)
        return pieces(self.tokenizer, tokens, self.tokens(tokens, most, sampling or Sampling()))

    def tokens(self, prompt: Sequence[int], most: int, sampling: Sampling) -> Iterator[int]:
        """Yields at most `most` tokens after `prompt`, up to the one that ends a document, which is not among them. Raises
        FloatingPointError where logits are not finite."""
        generator, written = torch.Generator().manual_seed(sampling.seed), list(prompt)
        cache, kept = self._new_cache(), 0
        for _ in range(most):
            if len(written) > self.context:
                cache, kept = self._new_cache(), 0
            window = written[-self.context :]
            logits = self._next_logits(cache, window[kept:], kept)
            kept = 0 if cache is None else len(window)
            if not logits.isfinite().all():
                raise FloatingPointError(f"the model's logits after {len(written):,} tokens are not finite")
            token = drawn(logits, sampling, generator)
            if token == self.end_token:
                return
            written.append(token)
            yield token

    def _new_cache(self) -> KeyValueCache | None:
        """None for a model of one's own, whose layers may look at other tokens as they like: each token is then a forward of all."""
        return KeyValueCache(self.model.config.layers) if self.model.config.own is None else None

    @torch.no_grad()
    def _next_logits(self, cache: KeyValueCache | None, tokens: list[int], begin: int) -> Tensor:
        """The logits (V) after `tokens`, which stand from place `begin` on behind those in the cache: float64, on the host."""
        device, before = next(self.model.parameters()).device, self.model.attend
        self.model.attend = before if cache is None else cache
        chunk = len(tokens) if cache is None else CHUNK
        try:
            with float32_products("high" if self.tf32 and device.type == "cuda" else "highest"):
                for start in range(0, len(tokens), chunk):
                    part = torch.tensor([tokens[start : start + chunk]], device=device)
                    positions = torch.arange(begin + start, begin + start + part.size(1), device=device)
                    logits = self.model(part, positions.unsqueeze(0))[0, -1]
            return logits.double().cpu()
        finally:
            self.model.attend = before


def pieces(tokenizer: Tokenizer, prompt: Sequence[int], tokens: Iterator[int]) -> Iterator[str]:
    """Yields the text of `tokens` as they come after `prompt`, each piece as soon as its characters are whole. Only what came since
    the piece before the last is decoded again."""
    before, fresh = list(prompt), list[int]()
    old = tokenizer.decode(before)
    for token in tokens:
        fresh.append(token)
        text = tokenizer.decode(before + fresh)
        if text.endswith("\N{REPLACEMENT CHARACTER}"):  # a part of a character, or what never is one
            continue
        yield text[len(old) :]
        before, fresh = fresh, []
        old = tokenizer.decode(before)
    if fresh:
        yield tokenizer.decode(before + fresh)[len(old) :]
