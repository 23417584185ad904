"""The tokenizer of conversations: a folder's tokenizer.json, with its chat template, and which tokens stand for what is learned."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from rowwise.trainer.data.chat.forms import BadRow, conversation_of
from rowwise.trainer.data.chat.renderer import Renderer, Template
from rowwise.trainer.data.tokenizer import FileTokenizer, tokenizer_file

_NEEDED = ("bos_token", "eos_token", "unk_token")
_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class ChatTokenizer(FileTokenizer):
    """`template`: what makes a text of a conversation. `named`: the tokens that the folder names, such as bos_token. `end`: the token
    that ends all text, where it names one."""

    def __init__(
        self, path: Path, named: Mapping[str, str], added: Mapping[int, str], template: tuple[str, str], values: Any
    ):
        super().__init__(path, None)
        source, where = template
        vocabulary = self._library.get_vocab(with_added_tokens=True)
        for name, token in [*named.items(), *((f"token {number}", token) for number, token in added.items())]:
            if token not in vocabulary and (name in _NEEDED or token in source):
                raise ValueError(
                    f"{path.parent / 'tokenizer_config.json'} names {token!r} as {name}, and {path.name} beside it has no such "
                    "token; give data.tokenizer a folder whose files belong together"
                )
        named = {name: token for name, token in named.items() if token in vocabulary}
        self.named = named
        special = {one.content for one in self._library.get_added_tokens_decoder().values() if one.special}
        self.template = Template(source, where, {**named, **values}, tuple(sorted(special | set(named.values()))))
        told = json.dumps({**asdict(self.template), "where": None}, sort_keys=True)
        self.fingerprint = self.fingerprint.split("/")[0] + "/" + hashlib.sha256(told.encode()).hexdigest()
        self.end = [vocabulary[named["eos_token"]]] if "eos_token" in named else []
        # Offsets as they are: what comes behind a byte-level tokenizer cuts the spaces off them.
        tree = json.loads(self._library.to_str())
        self._plain = type(self._library).from_str(json.dumps(tree | {"post_processor": None}))

    def encode_learned(
        self, texts: Sequence[str], spans: Sequence[Sequence[tuple[int, int]]]
    ) -> list[tuple[list[int], np.ndarray]]:
        """Returns the tokens of each text, and of each token whether a character of `spans` is in it: uint8 (n,). Raises ValueError
        where the library cannot tokenize."""
        with self._told():
            encodings = self._plain.encode_batch(list(texts), add_special_tokens=False)
        self.count_unknown(texts)
        return [
            (one.ids, learned_tokens(np.array(one.offsets, dtype=np.int64).reshape(-1, 2), of_one))
            for one, of_one in zip(encodings, spans, strict=True)
        ]

    def end_of_turn(self, renderer: Renderer) -> int | None:
        """Returns the token that ends what the assistant says, as the template ends it, or else all text; None where neither does.
        Raises ValueError where the template does not take a question and its answer."""
        turns = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
        (said,) = renderer.conversations([conversation_of(turns)])
        if isinstance(said, BadRow):
            raise said
        ((ids, learned),) = self.encode_learned([said.text], [said.spans])
        last = ids[int(np.flatnonzero(learned)[-1])]
        added = self._library.get_added_tokens_decoder()
        return last if last in added and added[last].special else next(iter(self.end), None)


def learned_tokens(offsets: np.ndarray, spans: Sequence[tuple[int, int]]) -> np.ndarray:
    """Says of each token, whose characters are [start, end) in `offsets` (n, 2), whether one of them is in a span: uint8 (n,). A
    token without a character is where it stands."""
    learned = np.zeros(len(offsets), dtype=bool)
    first, behind = offsets[:, 0], offsets[:, 1]
    for start, end in spans:
        inside = (first < end) & (behind > start)
        learned |= inside | ((first == behind) & (start <= first) & (first < end))
    return learned.astype(np.uint8)


def open_chat_tokenizer(choice: str, template: str | None, values: Mapping[str, Any]) -> ChatTokenizer:
    """Opens the tokenizer and the chat template of a folder; `template`: the file of another. Raises ValueError."""
    if not choice or choice == "bytes":
        raise ValueError(
            f"data.tokenizer={choice}: conversations need the folder of a tokenizer with its chat template (tokenizer.json, "
            "tokenizer_config.json, chat_template.jinja); give data.tokenizer=FOLDER"
        )
    path = tokenizer_file(choice)
    settings = _settings(path.parent / "tokenizer_config.json")
    mapped = _settings(path.parent / "special_tokens_map.json")
    named = {name: _token(found) for name in _NAMED if (found := settings.get(name) or mapped.get(name))}
    added = {
        int(number): _token(one)
        for number, one in (settings.get("added_tokens_decoder") or {}).items()
        if str(number).isdecimal()
    }
    return ChatTokenizer(path, named, added, _template(path.parent, settings, template), values)


def _settings(path: Path) -> dict[str, Any]:
    """The JSON object of a file; nothing where there is none."""
    try:
        tree = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read as JSON ({str(error).splitlines()[0]}); write it again") from None
    if not isinstance(tree, dict):
        raise ValueError(f"{path} is no JSON object; write it again")
    return tree


def _token(found: object) -> str:
    """The text of a token, alone or with its properties."""
    return str(found.get("content", "")) if isinstance(found, dict) else str(found)


def _template(folder: Path, settings: Mapping[str, Any], choice: str | None) -> tuple[str, str]:
    """(the text of the template, where it stands)."""
    file = folder / "chat_template.jinja" if choice is None else Path(choice).expanduser()
    if choice is not None or file.is_file():
        try:
            return file.read_text(encoding="utf-8"), str(file)
        except (OSError, UnicodeDecodeError) as error:
            told = getattr(error, "strerror", None) or "it is not UTF-8"
            raise ValueError(
                f"data.template={file}: cannot be read ({told}); give the path of a Jinja template"
            ) from None
    found, where = settings.get("chat_template"), f"{folder / 'tokenizer_config.json'}"
    if isinstance(found, list):  # of several, each with a name
        named = {one.get("name"): one.get("template") for one in found if isinstance(one, dict)}
        found = named.get("default")
    if not isinstance(found, str):
        raise ValueError(
            f"data.tokenizer={folder}: no chat template in it (chat_template.jinja, or in tokenizer_config.json); give "
            "data.template=PATH of one"
        )
    return found, where
