"""`data=chat`: conversations, of which what the assistant says is learned."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar, Literal

from rowwise.conf.option import Ask, MayChange
from rowwise.trainer.data.chat.packing import Packing
from rowwise.trainer.data.chat.tokenizer import ChatTokenizer, open_chat_tokenizer
from rowwise.trainer.data.kinds import check_conversations
from rowwise.trainer.data.source import TextSource

Value = str | bool | int | float


@dataclass(frozen=True)
class Chat(TextSource):
    """Conversations, of which what the assistant says is learned: rows of `messages`, of ShareGPT, of a prompt and its
    completion, of Alpaca. `files`: .jsonl, .jsonl.gz, .jsonl.zst, .json, .parquet or .arrow files, folders of them, or globs.
    `tokenizer`: the folder of a tokenizer.json and its chat template. `template`: the path of another Jinja template; null:
    the folder's. `template_values`: what the template finds beside a conversation, such as {enable_thinking: false}; null:
    its defaults. `packing`: how whole conversations share a sample, which do not see each other: `best_fit`, the longest
    first, or `in_order`. `too_long`: what is done about one that is longer than batch.seq_len + 1: `cut` its end off, `skip`
    it, or `refuse` it. `bad_rows`: what is done about a row that is no conversation that can be learned: `refuse` it, or
    `skip` and count it. `holdout`: the share of the conversations that is held out, 0 to below 1. `cache_dir`: where its
    tokens are kept; null: the user's cache folder."""

    ENDINGS = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".json", ".parquet", ".arrow")
    AS_LARGE = False
    end_of_text: ClassVar[None] = None  # type: ignore[misc]
    mask_documents: ClassVar[bool] = True  # type: ignore[misc]
    name: MayChange[Literal["chat"]] = "chat"
    files: MayChange[str | list[str]] = field(default_factory=list)
    tokenizer: MayChange[str] = ""
    template: MayChange[str | None] = None
    template_values: MayChange[dict[str, Value] | None] = None
    packing: Ask[Packing] = "best_fit"
    too_long: Ask[Literal["cut", "skip", "refuse"]] = "cut"
    bad_rows: MayChange[Literal["refuse", "skip"]] = "refuse"
    holdout: MayChange[float] = 0.02
    cache_dir: MayChange[str | None] = None

    def check(self, path: Path) -> None:
        check_conversations(path)

    def open_tokenizer(self) -> ChatTokenizer:
        return open_chat_tokenizer(self.tokenizer, self.template, self.template_values or {})

    def reading(self) -> str:
        """What is packed, and how, is seen when the tokens are there; the template is in the fingerprint of the tokenizer."""
        usual = replace(self, packing="best_fit", too_long="cut", template=None, template_values=None)
        return super(Chat, usual).reading()
