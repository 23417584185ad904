"""Files of other kinds than a source reads: known by their first bytes and refused; what says itself how it is to be read is.
(Law 5.)"""

import bz2
import gzip
import io
import json
import lzma
import os
import pickle
import sqlite3
import struct
import sys
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file

from parity import small_config
from rowwise.trainer.check import check
from rowwise.trainer.data.config import Hf, Text, Tokens
from rowwise.trainer.data.kinds import check_tokens, kind_of
from rowwise.trainer.data.open import data_in_words, open_data, told_of_data
from rowwise.trainer.prepare import examine

TEXTS = [f"to be or not to be, {n}; that is the question\n" for n in range(60)]
TEXT = "".join(TEXTS).encode()
ROWS = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()
TABLE = pa.table({"text": TEXTS})
TOKENS = np.arange(1000, dtype=np.uint16) % 256


def write_with(write) -> bytes:
    """What a writer of files writes."""
    write(stream := io.BytesIO())
    return stream.getvalue()


def zipped(stream: io.BytesIO) -> None:
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("text.txt", TEXT)


def tarred(stream: io.BytesIO) -> None:
    with tarfile.open(fileobj=stream, mode="w") as archive:
        entry = tarfile.TarInfo("text.txt")
        entry.size = len(TEXT)
        archive.addfile(entry, io.BytesIO(TEXT))


def arrow(stream: io.BytesIO, new=pa.ipc.new_file) -> None:
    with new(stream, TABLE.schema) as writer:
        writer.write_table(TABLE, max_chunksize=7)


def llm_c(magic: int = 20240520, version: int = 1, dtype: str = "<u2", count: int = 1000) -> bytes:
    return struct.pack("<3i", magic, version, count).ljust(1024, b"\0") + TOKENS.astype(dtype).tobytes()


def index(code: int, lengths: list[int], borders: list[int] | None = None, itemsize: int = 4) -> bytes:
    """Megatron's, of sequences of these lengths; each is a document, or as `borders` have it."""
    begins = np.concatenate(([0], np.cumsum(lengths)))[:-1] * itemsize
    borders = list(range(len(lengths) + 1)) if borders is None else borders
    head = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, code, len(lengths), len(borders))
    return (
        head + np.array(lengths, "<i4").tobytes() + begins.astype("<i8").tobytes() + np.array(borders, "<i8").tobytes()
    )


def torch_saved(zip_: bool) -> bytes:
    return write_with(lambda s: torch.save({"w": torch.ones(3)}, s, _use_new_zipfile_serialization=zip_))


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 12345\n"
# name -> (content, the sources that read it, what else is said to do)
KINDS: dict[str, tuple[bytes, tuple[str, ...], str]] = {
    "a.npy": (write_with(lambda s: np.save(s, TOKENS)), ("tokens",), "give data=tokens"),
    "a.parquet": (write_with(lambda s: pq.write_table(TABLE, s)), ("hf",), "give data=hf"),
    "file.arrow": (write_with(arrow), ("hf",), "give data=hf"),
    "stream.arrow": (write_with(lambda s: arrow(s, pa.ipc.new_stream)), ("hf",), "give data=hf"),
    "a.jsonl": (ROWS, ("hf", "text"), "give data=text, or data=hf where it holds JSON lines"),
    "a.jsonl.gz": (gzip.compress(ROWS), ("hf",), "give data=hf where it holds JSON lines, or unpack it"),
    "a.txt": (TEXT, ("text",), "give data=text"),
    "marked.txt": (b"\xef\xbb\xbf" + TEXT, ("text",), "give data=text"),
    "gpt2.bin": (llm_c(), ("tokens",), "give data=tokens"),
    "llama3.bin": (llm_c(20240801, 7, "<u4"), ("tokens",), "give data=tokens"),
    "bare.bin": (TOKENS.tobytes(), ("tokens",), "give data=tokens with its data.dtype"),
    "a.npz": (write_with(lambda s: np.savez(s, TOKENS)), (), "numpy.save"),
    "a.pt": (torch_saved(True), (), "numpy.save"),
    "old.pt": (torch_saved(False), (), "give the text or the tokens"),
    "a.pkl": (pickle.dumps(TOKENS), (), "numpy.save"),
    "a.zip": (write_with(zipped), (), ".txt"),
    "a.tar": (write_with(tarred), (), "unpack it"),
    "a.bz2": (bz2.compress(TEXT), (), "unpack it"),
    "a.xz": (lzma.compress(TEXT), (), "unpack it"),
    "a.jsonl.zst": (pa.compress(ROWS, codec="zstd", asbytes=True), ("hf",), "give data=hf where it holds JSON lines, or unpack it"),
    "a.lz4": (pa.compress(TEXT, codec="lz4", asbytes=True), (), "unpack it"),
    "program": (Path(sys.executable).read_bytes()[:9000], (), "give text or tokens"),
    "a.png": (b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 20, (), "give text or tokens"),
    "a.jpg": (b"\xff\xd8\xff\xe0\0\x10JFIF" + bytes(range(256)) * 20, (), "give text or tokens"),
    "a.pdf": (b"%PDF-1.7\n" + TEXT, (), "write its text as .txt"),
    "a.h5": (b"\x89HDF\r\n\x1a\n" + bytes(2000), (), "numpy.save"),
    "a.idx": (b"MMIDIDX\0\0" + struct.pack("<QB", 1, 8) + bytes(400), (), "give the .bin file beside it"),
    "a.gguf": (b"GGUF" + bytes(2000), (), "give the text or the tokens"),
    "pointer": (POINTER, (), "git lfs pull"),
    "utf16.txt": (TEXT.decode().encode("utf-16"), (), "UTF-8"),
    "utf16be.txt": (TEXT.decode().encode("utf-16-be"), (), "UTF-8"),
    "utf32.txt": (TEXT.decode().encode("utf-32"), (), "UTF-8"),
}  # fmt: skip
# Bare tokens cannot be told from everything: what these are as tokens is for data.vocab_size to see.
UNKNOWN = {("bare.bin", "tokens"), *((f"{name}.txt", "tokens") for name in ("utf16", "utf16be", "utf32"))}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A file of each kind."""
    folder = tmp_path_factory.mktemp("kinds")
    for name, (content, _, _) in KINDS.items():
        (folder / name).write_bytes(content)
    save_file({"w": torch.ones(64)}, folder / "a.safetensors")
    with sqlite3.connect(folder / "a.db") as base:
        base.execute("create table texts (text)")
    KINDS["a.safetensors"] = b"", (), "give the text or the tokens"
    KINDS["a.db"] = b"", (), "JSON lines"
    return folder


def source(name: str, path: Path, **more):
    made = {"text": Text, "hf": Hf, "tokens": Tokens}[name]
    return made(files=str(path), holdout=0.2, **({"cache_dir": f"{path}.cache"} if name != "tokens" else {}), **more)


@pytest.mark.parametrize("name", [*KINDS, "a.safetensors", "a.db"])
def test_a_file_is_read_as_what_it_is_or_refused(folder, name):
    """By every source: the tokens that were written, or a line that says what it is and what reads it."""
    _, readers, advice = KINDS[name]
    for reader in ("text", "hf", "tokens"):
        config = source(reader, folder / name)
        if reader in readers:
            data = open_data(config, 16, 65_536)
            if reader == "tokens":
                assert np.array_equal(whole(data), TOKENS), "other tokens"
            else:
                assert data.tokens == len(ROWS if (name, reader) == ("a.jsonl", "text") else TEXT)
        elif (name, reader) not in UNKNOWN:
            with pytest.raises(ValueError) as refusal:
                open_data(config, 16, 65_536)
            said = str(refusal.value)
            assert str(folder / name) in said and "\n" not in said and len(said) < 400, said
            not_json = reader == "hf" and "text" in readers
            assert ("not JSON" in said and "data=text" in said) if not_json else advice in said, said
            if not not_json:
                assert f"which data={reader} does not read; " in said


def whole(data) -> np.ndarray:
    """The tokens of a corpus of one stream, put together again."""
    (train,), (held,) = data.train.streams, data.holdout.streams
    assert train.tokens[-1] == held.tokens[0]
    return np.concatenate([train.tokens, held.tokens[1:]])


def test_what_is_refused_leaves_no_cache(tmp_path):
    (tmp_path / "a.txt").write_bytes(TEXT)
    (tmp_path / "b.txt").write_bytes(gzip.compress(TEXT))
    config = Text(files=str(tmp_path), cache_dir=str(tmp_path / "cache"))
    with pytest.raises(
        ValueError, match=r"b.txt is compressed by gzip, which data=text does not read; give data=hf where"
    ):
        open_data(config, 16, 256)
    assert not [path for path in (tmp_path / "cache").iterdir() if path.suffix != ".lock"]


def test_bare_tokens_are_taken_for_nothing_else(tmp_path):
    """Whatever they begin with: drawn evenly, as words are, in 16 and 32 bits; and the first bytes of gzip and of a pickle."""
    random, path = np.random.default_rng(1), tmp_path / "tokens.bin"
    streams = [random.integers(0, 65_536, 256).astype("<u2") for _ in range(150)]
    streams += [(random.zipf(1.3, 256) % 50_000).astype("<u2") for _ in range(150)]
    streams += [random.integers(0, 128_000, 256).astype("<u4") for _ in range(150)]
    starts = [
        b"\x1f\x8b\x08\x00",
        b"\x80\x04\x95\x01",
        b"\xff\xff\xff\xff",
        b"\xff\xd8\xff\xff",
        b"BZh9",
        b"Rar!",
        b"\xff\xfe",
    ]
    streams += [np.frombuffer(start + streams[0].tobytes()[len(start) :], "<u2") for start in starts]
    streams += [np.zeros(256, "<u2"), np.full(256, 0x2020, "<u2")[:31], np.full(256, 65_535, "<u2")]
    for stream in streams:
        path.write_bytes(stream.tobytes())
        assert kind_of(path) is check_tokens(path, 2) is None


def test_bytes_are_tokens_of_bytes(tmp_path):
    """Text is refused as tokens of 16 bits, and is what tokens of a byte are."""
    (tmp_path / "text.bin").write_bytes(TEXT)
    with pytest.raises(ValueError, match=r"text.bin is text, which data=tokens does not read; give data=text"):
        open_data(Tokens(files=str(tmp_path)), 16, 65_536)
    assert open_data(Tokens(files=str(tmp_path), dtype="uint8"), 16, 256).tokens == len(TEXT)
    (tmp_path / "odd.txt").write_bytes(TEXT[:40] + b"\0" + TEXT)
    with pytest.raises(
        ValueError, match=r"odd.txt is binary \(it holds zero bytes\), .*uint8 takes every byte as a token"
    ):
        open_data(Text(files=str(tmp_path), cache_dir=str(tmp_path / "cache")), 16, 256)


class Explosive:
    """A pickle of it makes a folder where it is loaded."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def header(text: str) -> bytes:
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode()


def saved(array) -> bytes:
    return write_with(lambda s: np.save(s, array, allow_pickle=True))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            saved(TOKENS.reshape(10, 100)),
            r"is an array of uint16 of shape \(10, 100\), and tokens are 1-D .*reshape\(-1\)",
        ),
        (saved(np.ones(100)), "an array of float64"),
        (saved(np.ones(100, bool)), "an array of bool"),
        (saved(np.zeros(100, [("a", "u2")])), "are 1-D integers"),
        (saved(np.uint16(3)), r"of shape \(\)"),
        (saved(TOKENS[:0]), "cannot be read as .npy|has no tokens"),
        (saved(TOKENS)[:-10], "cannot be read as .npy"),
        (saved(TOKENS)[:20], "cannot be read as .npy"),
        (b"\x93NUMPY\x09\x00", "cannot be read as .npy"),
        (header("{'descr': '<u2', 'fortran_order': False, 'shape': (-4,)}\n"), "cannot be read as .npy"),
        (header("{'descr': '<u2', 'fortran_order': False, 'shape': (10**40,)}\n"), "cannot be read as .npy"),
        (header(f"{{'descr': '<u2', 'fortran_order': False, 'shape': ({10**40},)}}\n"), "cannot be read as .npy"),
        (header("__import__('os').mkdir('here')\n"), "cannot be read as .npy"),
        (header("((" * 5000), "cannot be read as .npy"),
        (saved(-TOKENS.astype(np.int32)), "holds the token -255"),
        (saved(TOKENS.astype(np.int64) + 2**40), "go up to 1099511628031, but model.vocab_size=256"),
    ],
)
def test_a_hostile_array_is_one_line_and_runs_nothing(tmp_path, monkeypatch, content, message):
    monkeypatch.chdir(tmp_path)
    Path("a.npy").write_bytes(content)
    with pytest.raises(ValueError, match=message) as refusal:
        open_data(Tokens(files="a.npy"), 16, 256)
    assert "\n" not in str(refusal.value)
    assert [path.name for path in Path().iterdir()] == ["a.npy"]


@pytest.mark.parametrize("name", ["a.npy", "a.bin", "a.txt"])
def test_no_object_is_loaded(tmp_path, name):
    bomb = np.array([Explosive(tmp_path / "gone off")], dtype=object)
    (tmp_path / name).write_bytes(saved(bomb))
    (tmp_path / f"pickled-{name}").write_bytes(pickle.dumps([Explosive(tmp_path / "gone off")] * 50))
    for path in (tmp_path / name, tmp_path / f"pickled-{name}"):
        for reader in ("tokens", "text", "hf"):
            with pytest.raises(ValueError):
                open_data(source(reader, path), 16, 65_536)
    assert not (tmp_path / "gone off").exists()


@pytest.mark.parametrize("dtype", ["u1", "<u2", ">u2", "<i4", ">u4", "<i8", "<u8"])
def test_arrays_of_every_integer(tmp_path, dtype):
    np.save(tmp_path / "a.npy", TOKENS.astype(dtype))
    data = open_data(Tokens(files=str(tmp_path), separator=255, mask_documents=True, holdout=0.1), 16, 256)
    assert np.array_equal(whole(data), TOKENS)
    assert data.train.streams[0].documents.tolist() == [0, 256, 512, 768]
    assert data.train.sample(3).inputs.dtype == np.int64


def test_documents_are_as_megatrons_index_has_them(tmp_path):
    """Of several sequences each, some empty; and a separator says more than the index."""
    TOKENS.astype(np.int32).tofile(tmp_path / "a.bin")
    (tmp_path / "a.idx").write_bytes(index(4, [100, 0, 200, 300, 0, 400], [0, 1, 3, 4, 4, 5, 6]))
    config = Tokens(files=str(tmp_path / "a.bin"), mask_documents=True, holdout=0)
    data = open_data(config, 16, 256)
    assert data.train.streams[0].documents.tolist() == [0, 100, 300, 600]
    assert set(data.read) == {str(tmp_path / "a.bin"), str(tmp_path / "a.idx")}
    sample = data.train.sample(6)  # tokens 96 to 112
    assert sample.documents.tolist() == [0] * 4 + [1] * 12
    assert sample.positions.tolist() == [0, 1, 2, 3, *range(12)]
    assert (sample.labels == -100).nonzero()[0].tolist() == [3]
    separated = open_data(replace(config, separator=255), 16, 256)
    assert separated.train.streams[0].documents.tolist() == [0, 256, 512, 768]
    (tmp_path / "a.idx").write_bytes(index(4, [500, 500]))
    assert open_data(config, 16, 256).train.fingerprint != data.train.fingerprint


WRONG_INDICES = {
    "short": (index(4, [100, 900])[:60], "a.idx is cut short: it has not what it says of 2 sequences"),
    "of others": (index(4, [100, 800]), "a.idx is of 900 tokens, and .*a.bin has 1,000"),
    "overlapping": (index(4, [100, 900], itemsize=2), "its sequences do not stand one behind another in"),
    "less than nothing": (index(4, [1100, -100]), "its sequences do not stand one behind another in"),
    "no end": (index(4, [100, 900], [0, 1]), "its documents do not go from the first sequence to the last"),
    "backwards": (index(4, [100, 900], [0, 2, 1, 2]), "its documents do not go from the first sequence to the last"),
    "beyond": (index(4, [100, 900], [0, 9, 2]), "its documents do not go from the first sequence to the last"),
}


@pytest.mark.parametrize("name", WRONG_INDICES)
def test_an_index_that_is_not_of_its_tokens_is_refused(tmp_path, name):
    TOKENS.astype(np.int32).tofile(tmp_path / "a.bin")
    content, says = WRONG_INDICES[name]
    (tmp_path / "a.idx").write_bytes(content)
    with pytest.raises(ValueError, match=says) as refusal:
        open_data(Tokens(files=str(tmp_path / "a.bin"), mask_documents=True, holdout=0), 16, 256)
    assert "\n" not in str(refusal.value)


def test_a_dtype_that_the_file_contradicts_is_refused(tmp_path):
    """Said by the header of an array, of llm.c, or by Megatron's index beside the tokens; else it is data.dtype that says it."""
    np.save(tmp_path / "a.npy", TOKENS.astype(np.int32))
    (tmp_path / "b.bin").write_bytes(llm_c())
    TOKENS.astype(np.int32).tofile(tmp_path / "c.bin")
    (tmp_path / "c.idx").write_bytes(index(4, [1000]))
    TOKENS.astype(np.int32).tofile(tmp_path / "d.bin")
    for name, held in {"a.npy": "int32", "b.bin": "uint16", "c.bin": "int32"}.items():
        config = Tokens(files=str(tmp_path / name), holdout=0.1)
        assert np.array_equal(whole(open_data(config, 16, 256)), TOKENS)
        assert open_data(replace(config, dtype=held), 16, 256).tokens == 1000
        with pytest.raises(ValueError, match=rf"data.dtype=int64, but .*{name} holds {held}, .*leave data.dtype=null"):
            open_data(replace(config, dtype="int64"), 16, 256)
    config = Tokens(files=str(tmp_path / "d.bin"), holdout=0.1)
    assert open_data(config, 16, 256).tokens == 2000  # as uint16, which is the default
    assert np.array_equal(whole(open_data(replace(config, dtype="int32"), 16, 256)), TOKENS)
    (tmp_path / "d.idx").write_bytes(b"MMIDIDX\0\0" + struct.pack("<QB", 1, 7) + bytes(400))
    with pytest.raises(ValueError, match=r"d.idx names the dtype 7, possible are"):
        open_data(config, 16, 256)
    (tmp_path / "b.bin").write_bytes(llm_c(count=1001))
    with pytest.raises(ValueError, match=r"b.bin has 1000 tokens, and its header says 1001"):
        open_data(Tokens(files=str(tmp_path / "b.bin")), 16, 256)


def test_a_corpus_folder_is_opened_whole_and_never_by_its_parts(tmp_path):
    """Its files are no bare tokens, and what it held out is not to train on."""
    (tmp_path / "text.txt").write_bytes(TEXT * 200)
    open_data(Text(files=str(tmp_path), holdout=0.2, cache_dir=str(tmp_path / "cache")), 16, 256)
    (corpus,) = (path for path in (tmp_path / "cache").iterdir() if path.is_dir())
    np.save(tmp_path / "more.npy", TOKENS)
    data = open_data(Tokens(files=[str(tmp_path / "more.npy"), str(corpus)], holdout=0.1), 16, 256)
    assert data.tokens == len(TEXT) * 200 + 1000 and len(data.train.streams) == 2
    for part in (corpus / "train.bin", corpus / "holdout.bin", tmp_path / "cache"):
        with pytest.raises(ValueError, match=r"is a part of a corpus folder; give data.files=.*/text-"):
            open_data(Tokens(files=str(part)), 16, 256)
    (tmp_path / "tokens").mkdir()
    (tmp_path / "tokens/meta.json").write_text("[]")  # of somebody else
    TOKENS.tofile(tmp_path / "tokens/a.bin")
    data = open_data(Tokens(files=str(tmp_path / "tokens")), 16, 256)
    assert data.tokens == 1000 and data.found.passed_over == {".json": 1}
    for key, value in {"dtype": "uint16", "separator": 0}.items():
        with pytest.raises(ValueError, match=rf"data.{key}={value} with .*, a corpus folder, .*leave data.{key}=null"):
            open_data(replace(Tokens(files=str(corpus)), **{key: value}), 16, 256)


@pytest.mark.parametrize("kind", ["a.parquet", "file.arrow", "stream.arrow", "a.jsonl.gz"])
@pytest.mark.parametrize("damage", ["cut short", "overwritten"])
def test_damaged_files_of_a_dataset_are_one_line(tmp_path, kind, damage):
    content = KINDS[kind][0]
    broken = (
        content[: len(content) * 2 // 3] if damage == "cut short" else content[:60] + b"\x00\xff" * 300 + content[660:]
    )
    (tmp_path / kind).write_bytes(broken)
    with pytest.raises(ValueError, match=rf"{kind} (cannot be read as|is binary)") as refusal:
        open_data(source("hf", tmp_path / kind), 16, 256)
    assert "\n" not in str(refusal.value)


def test_rows_are_read_by_their_content_whatever_the_name(tmp_path):
    for name in ("a.parquet", "file.arrow", "a.jsonl.gz", "a.jsonl"):
        (tmp_path / "anything").write_bytes(KINDS[name][0])
        assert open_data(source("hf", tmp_path / "anything"), 16, 256).tokens == len(TEXT)
    (tmp_path / "anything").write_bytes(b"\xef\xbb\xbf" + ROWS)
    assert open_data(source("hf", tmp_path / "anything"), 16, 256).tokens == len(TEXT)
    (tmp_path / "anything").write_bytes(ROWS.replace(b"question", b"qu\xe9stion"))
    with pytest.raises(ValueError, match=r"anything, line 1: not UTF-8 \(the byte 0xe9\); write it again as UTF-8"):
        open_data(source("hf", tmp_path / "anything"), 16, 256)


def test_the_corpus_is_told_and_what_was_passed_over(tmp_path):
    (tmp_path / "sub").mkdir()
    for n in range(4):
        (tmp_path / f"sub/{n}.bin").write_bytes(TOKENS.tobytes())
    for name in ("a.json", "b.json", "README", "c.idx"):
        (tmp_path / name).write_text("something")
    (tmp_path / "short.npy").write_bytes(saved(TOKENS[:16]))
    config = Tokens(files=str(tmp_path), holdout=0.1)
    data = open_data(config, 16, 256)
    assert data_in_words(config, data) == "tokens: 4,016 tokens, 5 files"
    assert told_of_data(config, data) == [
        "4 files passed over (2 .json, 1 README, 1 .idx): out of a folder data=tokens takes .bin, .npy",
        "1 of 5 files hold less than batch.seq_len + 1 = 17 tokens: no sample",
    ]
    config = Tokens(files=[str(tmp_path / "sub/0.bin"), str(tmp_path / "sub/*.bin")], holdout=0.1)
    assert len(open_data(config, 16, 256).found.files) == 4
    assert told_of_data(config, open_data(config, 16, 256)) == []


@pytest.mark.parametrize(("files", "tokens"), [(1, 4000), (4, 1000), (40, 100), (200, 20)])
def test_the_share_held_out_is_of_all_files_together(tmp_path, files, tokens):
    """Many short files give their share, none of it all."""
    for n in range(files):
        np.zeros(tokens, np.uint16).tofile(tmp_path / f"{n}.bin")
    samples = files * ((tokens - 1) // 16)
    for share in (0.001, 0.05, 0.3, 0.9):
        data = open_data(Tokens(files=str(tmp_path), holdout=share), 16, 256)
        at_least = int(tokens > 32)  # where a file has two samples
        assert data.holdout.samples == max(at_least, round(samples * share))
        assert data.train.samples + data.holdout.samples == samples


def test_too_little_data_is_told_in_the_numbers_that_were_meant(tmp_path):
    """All tokens, the share that is held out, and what is left; of several files, that each is too short."""
    np.zeros(40_002, np.uint16).tofile(tmp_path / "a.bin")
    one = Tokens(files=str(tmp_path / "a.bin"), holdout=0.9)
    with pytest.raises(ValueError) as refusal:
        open_data(one, 40_000, 256)
    assert str(refusal.value) == (
        "data=tokens has 40,002 tokens, and data.holdout=0.9 leaves 1 of them to train on, where one sample takes batch.seq_len "
        "+ 1 = 40001; give data.holdout=0 (with eval.every=0), more data or a smaller batch.seq_len"
    )
    assert open_data(replace(one, holdout=0.005), 40_000, 256).train.samples == 1
    run = small_config(
        tmp_path, f"data.files=[{tmp_path}/a.bin]", "data.holdout=0.005", "eval.every=1", "batch.seq_len=40000"
    )
    with pytest.raises(
        ValueError, match=r"holdout=0.005 holds out less than one sample of 40,002 tokens, .* makes 1 samples"
    ):
        examine(check(run, 1), 1)
    with pytest.raises(
        ValueError, match=r"data=tokens has 40,002 tokens, and one sample takes batch.seq_len \+ 1 = 50001; "
    ):
        open_data(one, 50_000, 256)
    for n in range(3):
        np.zeros(30, np.uint16).tofile(tmp_path / f"{n}.npz.bin")
    short = Tokens(files=str(tmp_path / "*.npz.bin"))
    with pytest.raises(
        ValueError, match=r"has 90 tokens in 3 files, none of which has a whole sample, and one sample takes"
    ):
        open_data(short, 50, 256)
    (tmp_path / "a.txt").write_bytes(b"x" * 80)
    text = Text(files=str(tmp_path / "a.txt"), holdout=0.0, cache_dir=str(tmp_path / "cache"))
    with pytest.raises(
        ValueError, match=r"data=text has 80 tokens, and one sample takes batch.seq_len \+ 1 = 257; give more"
    ):
        open_data(text, 256, 256)
    documents = tmp_path / "documents"
    documents.mkdir()
    for n in range(40):
        (documents / f"{n}.txt").write_bytes(b"%d, " % n * 2)
    held = replace(text, files=str(documents), holdout=0.9)
    with pytest.raises(
        ValueError, match=r"has 300 tokens, and data.holdout=0.9 leaves \d+ of them to train on, where one sa"
    ):
        open_data(held, 200, 256)
