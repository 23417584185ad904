"""What a file is, by its first bytes: so that no source reads the headers and compressed bytes of another as its own.

Nothing of a file is run, and no more of it unpacked than its first bytes.
"""

import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

_HEAD = 4096  # bytes that are looked at


@dataclass(frozen=True)
class Kind:
    """A kind of file: what it is called, the choices of `data` that read it, and what else to do."""

    what: str
    sources: tuple[str, ...] = ()
    advice: str = ""

    @property
    def change(self) -> str:
        """What to change where a source does not read it."""
        reads = f"give data={' or data='.join(self.sources)}" if self.sources else ""
        return ", or ".join(filter(None, (reads, self.advice)))


_UNPACK = "unpack it, and give what is in it"
NPY = Kind("an array of NumPy (.npy)", ("tokens",))
PARQUET = Kind("a Parquet file", ("hf",))
ARROW = Kind("an Arrow file", ("hf",))
ARROW_STREAM = Kind("an Arrow stream", ("hf",))
ZSTD = Kind("compressed by zstd", (), f"give data=hf where it holds JSON lines, or {_UNPACK}")
GZIP = Kind("compressed by gzip", (), f"give data=hf where it holds JSON lines, or {_UNPACK}")
LLM_C = Kind("tokens behind a header of llm.c", ("tokens",))
_INDEX = Kind("an index of Megatron, which says where tokens are", (), "give the .bin file beside it to data=tokens")
_POINTER = Kind("a pointer of Git LFS in place of the file", (), "fetch the file with git lfs pull")
_MODEL = Kind("a model's weights", (), "give the text or the tokens to train on")
_PICKLE = Kind("a Python pickle, which could run code", (), "save its tokens with numpy.save for data=tokens")
_ZIP = Kind(
    "a zip archive (such as .npz, .pt and .docx)",
    (),
    "save its tokens with numpy.save for data=tokens, or its text as .txt",
)
_PICTURE, _PROGRAM = Kind("a picture", (), "give text or tokens"), Kind("a program", (), "give text or tokens")
_TABLE = Kind("a database of SQLite", (), "write its text as JSON lines for data=hf")
_DOCUMENT = Kind("a PDF document", (), "write its text as .txt for data=text")
_SCIENCE = Kind("an HDF5 file", (), "save its tokens with numpy.save for data=tokens")
_RECORDS = Kind("a file of Avro or ORC", (), "write its text as Parquet or JSON lines for data=hf")
_MEDIA = Kind("sound or video", (), "give text or tokens")
_WIDE = Kind("text in UTF-16 or UTF-32", (), "write it as UTF-8 (iconv -t UTF-8)")
_BINARY = Kind(
    "binary (it holds zero bytes)", (), "give data=tokens with its data.dtype (uint8 takes every byte as a token)"
)
_TEXT = Kind("text", ("text",), "data=hf where it holds JSON lines")

# Where the bytes stand, the bytes, what they say.
_MAGIC: list[tuple[int, bytes, Kind]] = [
    (0, b"\x93NUMPY", NPY),
    (0, b"PAR1", PARQUET),
    (0, b"ARROW1\0\0", ARROW),
    (0, struct.pack("<2i", 20240520, 1), LLM_C),
    (0, struct.pack("<2i", 20240801, 7), LLM_C),
    (0, b"MMIDIDX\0\0", _INDEX),
    (0, b"version https://git-lfs.github.com/spec/", _POINTER),
    (0, b"GGUF", _MODEL),
    (0, b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19", _MODEL),  # torch.save before 1.6
    (0, b"PK\x03\x04", _ZIP),
    (0, b"PK\x05\x06", _ZIP),
    (0, b"\x28\xb5\x2f\xfd", ZSTD),
    (0, b"\xfd7zXZ\0", Kind("compressed by xz", (), _UNPACK)),
    (0, b"\x04\x22\x4d\x18", Kind("compressed by lz4", (), _UNPACK)),
    (0, b"7z\xbc\xaf\x27\x1c", Kind("a 7z archive", (), _UNPACK)),
    (0, b"Rar!\x1a\x07", Kind("a rar archive", (), _UNPACK)),
    (4, b"1AY&SY", Kind("compressed by bzip2", (), _UNPACK)),
    (257, b"ustar", Kind("a tar archive", (), _UNPACK)),
    (0, b"SQLite format 3\0", _TABLE),
    (0, b"\x7fELF", _PROGRAM),
    (0, b"\x89PNG\r\n\x1a\n", _PICTURE),
    (0, b"GIF87a", _PICTURE),
    (0, b"GIF89a", _PICTURE),
    (0, b"\xff\xd8\xff\xe0", _PICTURE),
    (0, b"\xff\xd8\xff\xe1", _PICTURE),
    (0, b"%PDF-", _DOCUMENT),
    (0, b"\x89HDF\r\n\x1a\n", _SCIENCE),
    (0, b"Obj\x01", _RECORDS),
    (0, b"ORC\x03", _RECORDS),
    (0, b"OggS", _MEDIA),
    (0, b"fLaC", _MEDIA),
    (8, b"WAVEfmt ", _MEDIA),
    (4, b"ftyp", _MEDIA),
]


def kind_of(path: Path) -> Kind | None:
    """Returns the kind that the first bytes of a file give away; None of text, bare tokens, and what is not known."""
    head, size = _head(path), path.stat().st_size
    for start, magic, kind in _MAGIC:
        if head.startswith(magic, start):
            return kind
    # Fewer bytes would not do: bare tokens may begin with any two or three.
    if _is_gzip(head):
        return GZIP
    if head.startswith(b"\xff\xff\xff\xff") and 0 < _number(head, 4, 4) < size and _number(head, 8, 4) < 256:
        return ARROW_STREAM
    if head[8:10] == b'{"' and 0 < _number(head, 0, 8) < size:
        return _MODEL  # safetensors
    if head[:1] == b"\x80" and head[1:3] in (b"\x04\x95", b"\x05\x95") and _number(head, 3, 8) < size:
        return _PICKLE
    return None


def check_text(path: Path) -> None:
    """Refuses a file of `data=text` that is no text. Raises ValueError."""
    _refuse(path, kind_of(path) or _no_text(_head(path)), "text")


def check_rows(path: Path) -> Kind | None:
    """Returns the kind of a file of `data=hf`: Parquet, Arrow, gzip, zstd; None of what is to hold JSON lines as they are. Raises
    ValueError for what is none of them."""
    kind = kind_of(path)
    if kind not in (PARQUET, ARROW, ARROW_STREAM, GZIP, ZSTD):
        _refuse(path, kind or _no_text(_head(path)), "hf")
    return kind


def check_conversations(path: Path) -> Kind | None:
    """Returns the kind of a file of `data=chat`: Parquet, Arrow, gzip, zstd; None of what is to hold JSON as it is. Raises ValueError
    for what is none of them."""
    kind = kind_of(path)
    if kind not in (PARQUET, ARROW, ARROW_STREAM, GZIP, ZSTD):
        _refuse(path, kind or _no_text(_head(path)), "chat")
    return kind


def check_tokens(path: Path, bytes_a_token: int) -> Kind | None:
    """Returns the kind of a file of `data=tokens`: `NPY`, `LLM_C`, or None of bare tokens. Raises ValueError for what is none of
    them: also for text, where a token is more than a byte."""
    kind = kind_of(path)
    if kind not in (NPY, LLM_C):
        _refuse(path, kind or (_TEXT if bytes_a_token > 1 and _is_text(_head(path)) else None), "tokens")
    return kind


def _refuse(path: Path, kind: Kind | None, source: str) -> None:
    if kind is not None:
        raise ValueError(f"{path} is {kind.what}, which data={source} does not read; {kind.change}")


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(_HEAD)


def _number(head: bytes, start: int, width: int) -> int:
    return int.from_bytes(head[start : start + width], "little")


def _is_gzip(head: bytes) -> bool:
    if not head.startswith(b"\x1f\x8b\x08"):
        return False
    try:
        zlib.decompressobj(wbits=31).decompress(head, 1024)
    except zlib.error:
        return False
    return True


def _no_text(head: bytes) -> Kind | None:
    """What is neither UTF-8 nor another extension of ASCII."""
    if head.startswith((b"\xff\xfe", b"\xfe\xff", b"\0\0\xfe\xff")):
        return _WIDE
    if b"\0" not in head:
        return None
    # Of most text in 16 bits every other byte is zero.
    wide = any(_printable(head, encoding) for encoding in ("utf-16-le", "utf-16-be"))
    return _WIDE if wide and any(head[0::2]) != any(head[1::2]) else _BINARY


def _is_text(head: bytes) -> bool:
    """Whether these bytes, at least 64, are printable UTF-8: not once in 10^20 are bare tokens of 16 bits so."""
    return len(head) >= 64 and _printable(head, "utf-8")


def _printable(head: bytes, encoding: str) -> bool:
    for cut in range(4):  # a character may be cut off at the end
        try:
            text = head[: len(head) - cut].decode(encoding)
        except UnicodeDecodeError:
            continue
        return all(c.isprintable() or c in "\t\n\r\f\ufeff" for c in text)
    return False
