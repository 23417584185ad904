"""What a model is made of: the one protocol of models, by which ours are made too, and by which a user's own are (docs/own-model.md).

A model is what is before its layers (`embed`), the layers (`blocks.0`, `blocks.1`, ...), the last norm (`norm`) and the head
(`head`); these are the names that its parameters begin with, and where it is cut: a stage of a pipeline has some layers, what is
gathered together under ZeRO is one layer, or what stands at an end. So it says how each is made, and never makes them all at once.

Shapes: B sequences, S tokens, D model dim, V vocabulary. Between parts x is (B, S, D), of any dtype of
floating-point numbers, which a part keeps.
"""

import json
from collections.abc import Sequence
from dataclasses import fields
from typing import Any, ClassVar, Literal

from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn

from rowwise.kernels.spec import Specs
from rowwise.trainer.keys import told_of_type, unknown_key
from rowwise.trainer.models.code import Unkept
from rowwise.trainer.models.config import ModelConfig
from rowwise.trainer.models.ends import Head, initial_table
from rowwise.trainer.models.norm import norm_of


class Model:
    """How a model is made of its configuration. What a subclass does not say is as here: an embedding, an RMS norm, a head that makes
    its loss without logits. `settings`: of the keys `model.settings`, as `SETTINGS`.

    `SEES`: how its layers look at other tokens of a sequence.
        attend       by the `attend` that they are given alone, with the documents that they are given, and with `model.heads` heads
                     of queries and `model.kv_heads` of keys: ranks may share sequences, and documents are kept apart
        documents    by themselves, and not beyond the document that a token is in, which begins where its position is 0
        sequence     by themselves, whatever document a token is in
    Never at later ones. `READS`: the keys of ModelConfig that it goes by, beside those that every model has and, with `attend`, those
    of heads; others than these stay as they are by default. `SETTINGS`: a dataclass of keys of its own; None: it has none."""

    SEES: ClassVar[Literal["attend", "documents", "sequence"]] = "sequence"
    READS: ClassVar[frozenset[str]] = frozenset()
    SETTINGS: ClassVar[type[Any] | None] = None

    def __init__(self, config: ModelConfig):
        self.config = config
        self.settings: Any = self._settings(config.settings or {})

    def embed(self) -> nn.Module:
        """Makes what gives tokens (B, S) their first x."""
        return nn.Embedding(self.config.vocab_size, self.config.dim, _weight=initial_table(self.config))

    def embedded(self, embed: nn.Module, tokens: Tensor, positions: Tensor) -> Tensor:
        """Calls what `embed` made: on tokens and positions (B, S) alone, say, or scaled."""
        x: Tensor = embed(tokens)
        return x

    def block(self, layer: int) -> nn.Module:
        """Makes a layer. It is called as `block(x, *beside, documents, attend)`; `documents` is None where they are not kept apart."""
        raise NotImplementedError("it has no method block(layer), which makes a layer")

    def beside(self, layers: Sequence[int], x: Tensor, positions: Tensor) -> list[tuple[Tensor, ...]]:
        """Gives what each of these layers is given beside x: the positions (B, S), or tables made of them once for all."""
        return [(positions,)] * len(layers)

    def norm(self) -> nn.Module:
        """Makes what x passes behind the last layer; nn.Identity() is none."""
        return norm_of(self.config)

    def head(self, fused: bool) -> nn.Module:
        """Makes what gives logits (B, S, V) of x. A `Head` makes their loss too, without them if `fused`. With tie_embeddings none is
        made: the head is the matrix of the embedding."""
        return Head(self.config.dim, self.config.vocab_size, fused)

    def specs(self) -> Specs:
        """Tells every parameter by name; `blocks.*.` begins the name of one that every layer has."""
        raise NotImplementedError("it has no method specs(), which tells its parameters")

    def _settings(self, given: dict[str, Any]) -> Any:
        """Raises Unkept for a key that it lacks, or a value of another type."""
        if self.SETTINGS is None:
            if given:
                raise Unkept(f"model.settings={given}: {type(self).__name__} has no keys of its own; leave it out")
            return None
        known = [field.name for field in fields(self.SETTINGS)]
        if unknown := [key for key in given if key not in known]:
            raise Unkept(unknown_key(f"model.settings.{unknown[0]}", known))
        try:
            return TypeAdapter(self.SETTINGS).validate_json(json.dumps(given), strict=True)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            key = ".".join(map(str, first["loc"]))
            raise Unkept(f"model.settings.{key}={first['input']!r}: {told_of_type(first)}") from None
