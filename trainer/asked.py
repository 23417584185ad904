"""What the model of a run is asked to go on from at its end: a text, or of conversations what a user says."""

from collections.abc import Sequence
from dataclasses import dataclass

from rowwise.parallel.mesh import Mesh
from rowwise.parallel.objects import from_rank_0
from rowwise.trainer.data.chat.renderer import Renderer
from rowwise.trainer.data.chat.tokenizer import ChatTokenizer
from rowwise.trainer.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class Asked:
    """`tokens` to go on from, and the one at which what is written ends; None: none does."""

    tokens: list[int]
    end: int | None = None


def asked_of(tokenizer: Tokenizer, prompt: str, mesh: Mesh) -> Asked:
    """Returns what a model goes on from: the prompt, or where the run learns conversations what the template makes of a user who says
    it. That rank 0 renders, for all: a template may ask for the date. Raises ValueError, on every rank, where the template does not
    take it."""
    if not isinstance(tokenizer, ChatTokenizer):
        return Asked(tokenizer.encode_prompt(prompt))
    told: Asked | str = ""
    if mesh.rank == 0:
        try:
            with Renderer(tokenizer.template) as renderer:
                text = renderer.prompt([{"role": "user", "content": prompt}])
                told = Asked(tokenizer.encode_prompt(text), tokenizer.end_of_turn(renderer))
        except ValueError as refusal:
            told = str(refusal)
    told = from_rank_0(told, mesh.save_group)
    if isinstance(told, str):
        raise ValueError(told)
    return told


def text_of(tokenizer: Tokenizer, prompt: str, asked: Asked, tokens: Sequence[int]) -> str:
    """Returns the text of what a model was asked and wrote, with the prompt at its beginning: of a conversation without what the
    template puts around."""
    text = tokenizer.decode(tokens)
    if not isinstance(tokenizer, ChatTokenizer):
        return text
    return f"{prompt}\n{text.removeprefix(tokenizer.decode(asked.tokens)).strip()}"
