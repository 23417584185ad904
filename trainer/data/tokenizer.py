"""Text to tokens and back: bytes, or a tokenizer.json through the `tokenizers` library."""

import contextlib
import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Library


class Tokenizer(Protocol):
    vocab_size: int
    fingerprint: str
    end: list[int]  # what follows a document
    left_out: Counter[str]  # characters of all documents so far that have no token, and how often they stood there

    def encode(self, texts: Sequence[bytes]) -> list[list[int]] | list[bytes]:
        """Returns the tokens of documents, or of pieces of them. Raises UnicodeDecodeError for what is not UTF-8, where that
        matters."""
        ...

    def encode_prompt(self, text: str) -> list[int]:
        """Returns the tokens of a text that is to go on."""
        ...

    def decode(self, tokens: Sequence[int]) -> str: ...

    def text_bytes(self) -> list[int]:
        """Says for how many bytes of text each token stands; 0: it is a mark, and no text. Raises ValueError where a token alone
        does not say."""
        ...


class ByteTokenizer:
    """A token is a byte."""

    vocab_size = 256
    fingerprint = "bytes"

    def __init__(self) -> None:
        self.end, self.left_out = list[int](), Counter[str]()

    def encode(self, texts: Sequence[bytes]) -> list[bytes]:
        return list(texts)

    def encode_prompt(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, tokens: Sequence[int]) -> str:
        return bytes(token for token in tokens if token < 256).decode("utf-8", errors="replace")

    def text_bytes(self) -> list[int]:
        return [1] * 256


def byte_alphabet() -> dict[str, int]:
    """Returns the printable character as which a tokenizer.json spells each byte: the printable ones of Latin-1 as themselves, the
    others, in their order, as what follows U+00FF."""
    spelt = {b: chr(b) for b in (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))}
    spelt |= {b: chr(0x100 + place) for place, b in enumerate(b for b in range(256) if b not in spelt)}
    return {spelt[b]: b for b in range(256)}


def byte_tokenizer_json() -> str:
    """Writes `ByteTokenizer` as a tokenizer.json: byte b is token b, nothing is merged, nothing is added. Where tokens
    are no UTF-8, both decode to U+FFFD."""
    from tokenizers import Tokenizer as Library
    from tokenizers import decoders, models, pre_tokenizers

    library = Library(models.BPE(vocab=byte_alphabet(), merges=[]))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    library.decoder = decoders.ByteLevel()
    return library.to_str(pretty=True)


class FileTokenizer:
    """A tokenizer.json. Documents get no special tokens but `end_of_text`, where it is given, at their
    end."""

    def __init__(self, path: Path, end_of_text: str | None):
        from tokenizers import Tokenizer as Library

        if not path.is_file():
            raise ValueError(f"data.tokenizer={path}: no such file; give the path of a tokenizer.json, or 'bytes'")
        try:
            self._library = Library.from_file(str(path))
        except Exception as error:  # the library raises bare Exceptions
            raise ValueError(f"data.tokenizer={path}: not a tokenizer.json ({error})") from None
        # A tokenizer.json may carry what some model wanted of its inputs; a corpus is neither cut off nor filled up.
        self._library.no_truncation()
        self._library.no_padding()
        vocabulary = self._library.get_vocab(with_added_tokens=True)
        if not vocabulary:
            raise ValueError(f"data.tokenizer={path}: its vocabulary is empty; give another tokenizer.json, or 'bytes'")
        self._path, self.vocab_size = path, max(vocabulary.values()) + 1
        self._marking = marking(self._library, self.vocab_size)
        self.left_out = Counter[str]()
        self.fingerprint = hashlib.sha256(path.read_bytes()).hexdigest() + f"/{end_of_text}"
        self.end: list[int] = []
        if end_of_text is not None:
            token = self._library.token_to_id(end_of_text)
            if token is None:
                raise ValueError(f"data.end_of_text={end_of_text!r}: {path} has no such token")
            self.end = [token]

    def encode(self, texts: Sequence[bytes]) -> list[list[int]]:
        decoded = [text.decode() for text in texts]
        with self._told():
            if self._marking is not None:
                marked = [one.ids for one in self._marking.encode_batch_fast(decoded, add_special_tokens=False)]
                if not any(self.vocab_size in ids for ids in marked):
                    return marked
                self.count_unknown(decoded)
            return [encoding.ids for encoding in self._library.encode_batch_fast(decoded, add_special_tokens=False)]

    def count_unknown(self, texts: Sequence[str]) -> None:
        """Counts in `left_out` the characters of texts that have no token."""
        if self._marking is None:
            return
        for text, encoding in zip(
            texts, self._marking.encode_batch(list(texts), add_special_tokens=False), strict=True
        ):
            pairs = zip(encoding.ids, encoding.offsets, strict=True)
            # Several bytes of a character may be unknown.
            for start, end in {place for token, place in pairs if token == self.vocab_size}:
                self.left_out[text[start:end]] += 1

    def encode_prompt(self, text: str) -> list[int]:
        with self._told():
            return self._library.encode(text, add_special_tokens=False).ids

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """Raises ValueError where the library cannot tokenize: it has no token for what it does not know."""
        try:
            yield
        except Exception as error:  # the library raises bare Exceptions
            raise ValueError(
                f"data.tokenizer={self._path} cannot tokenize this text ({str(error).splitlines()[0]}); add its unknown token to "
                "its vocabulary, or give another tokenizer"
            ) from None

    def decode(self, tokens: Sequence[int]) -> str:
        return self._library.decode(list(tokens))

    def text_bytes(self) -> list[int]:
        """Counts the bytes of text of each token of a byte-level tokenizer, whose tokens are spelt with a character a byte; where it
        normalizes to NFC, of that text."""
        tree = json.loads(self._library.to_str())
        normalizer, decoder = (tree[part] and tree[part]["type"] for part in ("normalizer", "decoder"))
        alphabet = byte_alphabet()
        exact = (
            decoder == "ByteLevel" and normalizer in (None, "NFC") and alphabet.keys() <= tree["model"]["vocab"].keys()
        )
        if not exact or '"add_prefix_space": true' in json.dumps(tree["pre_tokenizer"]):
            raise ValueError(f"of {self._path} no token alone says how many bytes of text it stands for")
        added = {one["id"]: 0 if one["special"] else len(one["content"].encode()) for one in tree["added_tokens"]}
        sizes = [0] * self.vocab_size
        for text, token in self._library.get_vocab(with_added_tokens=True).items():
            sizes[token] = added.get(token, len(text) if set(text) <= alphabet.keys() else 0)
        return sizes


def marking(library: "Library", mark: int) -> "Library | None":
    """Returns this tokenizer with the token `mark` for each character (or byte of one) that it has no token for and leaves out
    without a word: such is byte-pair encoding without an unknown token. None where it leaves out nothing."""
    from tokenizers import Tokenizer as Library
    from tokenizers import models, pre_tokenizers

    model = library.model
    if not isinstance(model, models.BPE) or model.unk_token is not None:
        return None
    vocabulary, first = library.get_vocab(), (library.normalizer, library.pre_tokenizer)
    if any(b'"ByteLevel"' in part.__getstate__() for part in first if part is not None):
        whole = vocabulary.keys() >= set(pre_tokenizers.ByteLevel.alphabet())
    else:
        whole = model.byte_fallback and vocabulary.keys() >= {f"<0x{byte:02X}>" for byte in range(256)}
    if whole:
        return None
    tree = json.loads(library.to_str())
    tree["model"] |= {"unk_token": "\0unknown", "fuse_unk": False}
    tree["model"]["vocab"]["\0unknown"] = mark
    return Library.from_str(json.dumps(tree))


def tokenizer_file(choice: str) -> Path:
    """Returns the tokenizer.json at a path: that, or the one in that folder."""
    path = Path(choice).expanduser()
    return path / "tokenizer.json" if path.is_dir() else path


def open_tokenizer(choice: str, end_of_text: str | None = None) -> Tokenizer:
    """Opens `bytes`, or the tokenizer.json at that path or in that folder. Raises ValueError where there is none."""
    if choice == "bytes":
        if end_of_text is not None:
            raise ValueError(f"data.end_of_text={end_of_text!r}: data.tokenizer=bytes has no such token; leave it out")
        return ByteTokenizer()
    return FileTokenizer(tokenizer_file(choice), end_of_text)
