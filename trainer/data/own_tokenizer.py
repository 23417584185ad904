"""The tokenizer of a run that is to be read again. Needs no torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rowwise.trainer.data.chat.tokenizer import open_chat_tokenizer
from rowwise.trainer.data.tokenizer import Tokenizer, open_tokenizer, tokenizer_file
from rowwise.trainer.manifest_form import Manifest


@dataclass(frozen=True)
class OwnTokenizer:
    """A tokenizer, and the token that ends a document (None: none does). `file`: its tokenizer.json; None for bytes."""

    tokenizer: Tokenizer
    end_token: int | None
    end_of_text: str | None
    file: Path | None


def tokenizer_of_run(
    manifest: Manifest, choice: str | None, or_none: str = "", chat: bool = False
) -> OwnTokenizer | None:
    """Returns the tokenizer of the run that wrote the checkpoint of `manifest`, or the one that `choice` names: `bytes`, or a path.
    None where there is none: what read tokens alone has none, whatever made them. `or_none`: what else a refusal advises. `chat`: it
    is to have a chat template; that of conversations that the run read, or the folder's. Raises ValueError where
    the file is not there, or not the run's, or not any more what the run read."""
    whole, vocab_size = manifest["config"]["data"], manifest["config"]["model"]["vocab_size"]
    data = _of_conversations(whole) or of_one_tokenizer(whole)
    given = choice or data.get("tokenizer", "none" if data["name"] == "tokens" else "bytes")
    if given == "none":
        return None
    end_of_text, path = data.get("end_of_text") if given != "bytes" else None, tokenizer_file(given)
    if given != "bytes" and not path.is_file():
        origin = "tokenizer" if choice else "the run's data.tokenizer"
        raise ValueError(f"{origin}={path}: no such file; give tokenizer=PATH of the tokenizer.json{or_none}")
    tokenizer: Tokenizer
    if choice is None and data["name"] == "chat":
        tokenizer = open_chat_tokenizer(given, data["template"], data["template_values"] or {})
    else:
        tokenizer = open_chat_tokenizer(given, None, {}) if chat else open_tokenizer(given, end_of_text)
    theirs, ours = manifest["fingerprint"].get("tokenizer"), tokenizer.fingerprint
    if theirs is not None and (chat or whole["name"] == "mixture") and whole["name"] != "chat":
        # Behind the / stands what that run made of it.
        theirs, ours = theirs.partition("/")[0], ours.partition("/")[0]
    if choice is None and theirs not in (None, ours):
        raise ValueError(
            f"the run's data.tokenizer={path} has changed since the run wrote step {manifest['step']}; put back the file "
            f"that it read, or give tokenizer={path} to take this one"
        )
    if tokenizer.vocab_size > vocab_size:
        raise ValueError(
            f"{given} has tokens up to {tokenizer.vocab_size - 1}, and the model's vocab_size is {vocab_size}: it is "
            f"not the tokenizer of this run; give tokenizer=PATH of that{or_none}"
        )
    end_token = tokenizer.end[0] if tokenizer.end else data.get("separator")
    return OwnTokenizer(tokenizer, end_token, end_of_text, None if given == "bytes" else path)


def _of_conversations(data: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The source of conversations that a run read, alone or of a mixture."""
    return next(
        (one for one in (data, *(part["data"] for part in data.get("sources", ()))) if one["name"] == "chat"), None
    )


def of_one_tokenizer(data: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns of a mixture, as a plain tree, the first source that has a tokenizer, or else the first: they have the same tokens. Of
    another source, that."""
    sources = [part["data"] for part in data.get("sources", ())]
    return next((one for one in sources if one["name"] != "tokens"), sources[0] if sources else data)
