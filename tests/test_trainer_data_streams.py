"""Text of any size in bounded memory: the same tokens as at once; and what of a text cannot be read is named."""

import gzip
import io
import json
import random
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from rowwise.trainer.data import documents, pieces, store
from rowwise.trainer.data.config import Hf, Text
from rowwise.trainer.data.long_lines import LongLine, encoded
from rowwise.trainer.data.open import open_data, told_of_data
from rowwise.trainer.data.pieces import Document, border, whole_characters
from rowwise.trainer.data.tokenizer import open_tokenizer

WORDS = ["to", "be", " or", "not", "\n", " ", "\n\n", ".\n", "é", "語", "😀", "12", "'s", "\t", "\r\n"]


def prose(size: int, seed: int = 0) -> str:
    """Text of many scripts and line breaks."""
    draw = random.Random(seed)
    return "".join(draw.choices(WORDS, weights=[8, 8, 6, 6, 2, 9, 1, 2, 1, 1, 1, 1, 1, 1, 1], k=size))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    """One like GPT-2's: all bytes, and pairs that it learned."""
    library = Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<end>"], initial_alphabet=alphabet, show_progress=False
    )
    library.train_from_iterator([prose(3000, 1)], trainer)
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    library.save(str(path))
    return path


@pytest.fixture
def small(monkeypatch):
    """As if a few hundred bytes were much."""
    for module, name, size in (
        (pieces, "PIECE_BYTES", 300), (pieces, "LONG_BYTES", 700), (documents, "LONG_BYTES", 700),
        (documents, "_LINE_BYTES", 900), (store, "_BATCH_BYTES", 500),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, size)
    monkeypatch.setattr("rowwise.trainer.data.long_lines.BLOCK_BYTES", 37)


def tokens_of(config, split: str = "train") -> tuple[list[int], list[int]]:
    data = open_data(config, 8, 65_536)
    (stream,) = (data.train if split == "train" else data.holdout).streams
    return stream.tokens.tolist(), stream.documents.tolist()


@pytest.mark.parametrize("holdout", [0.0, 0.2])
def test_pieces_have_the_tokens_of_the_whole(tmp_path, tokenizer, small, holdout):
    """By bytes always, and by byte-level tokenizers; the end of the text comes once, and a document is one."""
    texts = [prose(size, size) for size in (10, 400, 3000)]
    for n, text in enumerate(texts):
        (tmp_path / f"{n}.txt").write_bytes(text.encode())
    library = Tokenizer.from_file(str(tokenizer))
    end = library.token_to_id("<end>")
    expected: dict[str, list[list[int]]] = {"train": [], "holdout": []}
    spelt: dict[str, bytes] = {"train": b"", "holdout": b""}
    for text in texts:
        content = text.encode()
        cut = len(content)
        if holdout and cut >= 700:
            cut = content.rfind(b"\n", 0, round(cut * (1 - holdout))) + 1
        parts = {"train": content[:cut], "holdout": content[cut:]}
        if holdout and cut == len(content) and pieces.is_held_out(Document("", content), holdout):
            parts = {"holdout": content}
        for split, part in parts.items():
            if part:
                expected[split].append([*library.encode(part.decode()).ids, end])
                spelt[split] += part
    for split in ("train", "holdout") if holdout else ("train",):
        config = Text(
            files=str(tmp_path),
            tokenizer=str(tokenizer),
            end_of_text="<end>",
            holdout=holdout,
            cache_dir=str(tmp_path / "cache"),
        )
        tokens, starts = tokens_of(config, split)
        assert tokens == [token for document in expected[split] for token in document]
        assert starts == np.cumsum([0, *map(len, expected[split])]).tolist()[:-1]
        tokens, _ = tokens_of(Text(files=str(tmp_path), holdout=holdout, cache_dir=str(tmp_path / "cache")), split)
        assert bytes(tokens) == spelt[split]


def test_where_a_text_is_cut():
    for text, expected in [
        (b"one\ntwo\nthree", 8), (b"one\ntwo\n three", 4), (b"one\n two\n", 9), (b"one two", 4), (b"\xc3\xa9\xe8\xaa\x9e\xe8\xaa", 5),
        (b"\xf0\x9f\x98\x80\xf0\x9f\x98", 4), (b"abc", 3), (b"ab\xc3", 2),
    ]:  # fmt: skip
        assert border(text) == expected, text
    for text in ("é語😀a", "\x7f"):
        content = text.encode()
        for stop in range(1, len(content) + 1):
            content[: whole_characters(content[:stop])].decode()
            assert stop - whole_characters(content[:stop]) < 4


ROWS = [
    {"text": prose(900, 1)}, {"n": -1.5e3, "text": prose(900, 2), "more": None}, {"text": "short"},
    {"long": prose(700), "deep": [{"a": [1, "x" * 950, []], "b": {}}, True], "text": 'quote " backslash \\ tab \t ' * 60},
    {"text": "😀" * 400}, {"text": ""},
]  # fmt: skip


@pytest.mark.parametrize("ascii_", [True, False])
@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "parquet"])
def test_rows_of_any_length_give_their_texts(tmp_path, small, kind, ascii_):
    path = tmp_path / f"rows.{kind}"
    lines = "".join(json.dumps(row, ensure_ascii=ascii_, separators=(" , ", " : ")) + "\n" for row in ROWS).encode()
    if kind == "parquet":
        pq.write_table(pa.table({"text": [row["text"] for row in ROWS]}), path)
    else:
        path.write_bytes(gzip.compress(lines) if kind == "jsonl.gz" else lines)
    config = Hf(files=str(path), holdout=0.0, cache_dir=str(tmp_path / "cache"))
    tokens, starts = tokens_of(config)
    assert bytes(tokens).decode() == "".join(row["text"] for row in ROWS)
    assert len(starts) == 5
    folder = next(p for p in (tmp_path / "cache").iterdir() if p.is_dir())
    assert len(list(folder.iterdir())) == 5, "nothing that passed through is left"


@pytest.mark.parametrize("size", [3, 5, 17, 4096])
def test_a_long_line_is_read_as_json_reads_it(monkeypatch, size):
    monkeypatch.setattr("rowwise.trainer.data.long_lines.BLOCK_BYTES", size)
    draw = random.Random(size)
    values = ['a"b\\c/\n\t\u20ac\U0001f600', 1, -2.5e-3, True, None, [], {}, [1, [2, {"x": "}"}]], {"text": "not this"}]
    for _ in range(60):
        row = {f"k{n}": draw.choice(values) for n in range(draw.randrange(4))}
        row["text"] = "".join(draw.choices('ab"\\\n\u20ac\U0001f600\x7f', k=draw.randrange(40)))
        row |= {f"l{n}": draw.choice(values) for n in range(draw.randrange(4))}
        line = json.dumps(row, ensure_ascii=draw.random() < 0.5, indent=None).encode() + b"\n"
        begun = draw.randrange(1, len(line))
        found: list[bytes] = []
        assert LongLine(line[:begun], io.BytesIO(line[begun:])).text("text", found.append)
        assert b"".join(found).decode() == row["text"]


@pytest.mark.parametrize(
    "line",
    [b"[1]", b'{"text": "a', b'{"text": "a"', b'{"text": "a"} x', b'{"text" "a"}', b'{"text": "\\x"}', b'{"text": "a\\u12"}',
     b'{"text": "\x01"}', b'{"text": "\xff"}', b'{"text": "\\ud800"}', b'{"n": 01, "text": "a"}', b'{"n": nul, "text": "a"}',
     b'{"n": [1 2], "text": "a"}', b'{"text": "a", "text": "b"}', b'{"n": ' + b"[" * 5000, b'{"text": "a",}', b"{1: 2}", b""],
)  # fmt: skip
def test_a_long_line_that_is_no_json_is_refused(line):
    with pytest.raises(ValueError):
        LongLine(line[:2], io.BytesIO(line[2:])).text("text", lambda piece: None)


def test_memory_is_bounded_whatever_the_size(tmp_path):
    """Of a long file, and of one line in gzip; measured on gigabytes in tests/attack."""
    line = "to be or not to be; that is the question "
    (tmp_path / "a.txt").write_text(line * 1_000_000)
    with gzip.open(tmp_path / "a.jsonl.gz", "wb", compresslevel=1) as file:
        file.write(json.dumps({"text": line * 1_000_000}).encode() + b"\n")
    for config in (
        Text(files=str(tmp_path / "a.txt"), holdout=0.1),
        Hf(files=str(tmp_path / "a.jsonl.gz"), holdout=0.1),
    ):
        tracemalloc.start()
        data = open_data(config, 128, 256)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert data.tokens == 1_000_000 * len(line)
        assert peak < 20e6, f"{peak / 1e6:.0f} MB for a text of {data.tokens / 1e6:.0f} MB"


def test_progress_is_told(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(store, "_SAY_SECONDS", 0.0)
    (tmp_path / "a.txt").write_text("to be or not to be\n" * 100_000)
    open_data(Text(files=str(tmp_path / "a.txt"), cache_dir=str(tmp_path / "cache")), 16, 256)
    said = capsys.readouterr().err.splitlines()
    assert said and all(line.startswith("data=text: ") and " of 2 MB of text tokenized in " in line for line in said)


def test_what_is_not_utf8_is_named_with_its_line(tmp_path, tokenizer, small):
    lines = [b"to be or not to be\n"] * 200
    lines[150] = b"caf\xe9\n"
    (tmp_path / "a.txt").write_bytes(b"".join(lines))
    for holdout in (0.0, 0.9):
        config = Text(
            files=str(tmp_path / "a.txt"), tokenizer=str(tokenizer), holdout=holdout, cache_dir=str(tmp_path / "cache")
        )
        with pytest.raises(
            ValueError, match=r"a.txt, line 151: not UTF-8 \(the byte 0xe9\); write it again as UTF-8, or give data"
        ):
            open_data(config, 8, 400)
    assert open_data(Text(files=str(tmp_path / "a.txt"), cache_dir=str(tmp_path / "cache")), 8, 256).tokens
    rows = [
        b'{"text": "fine"}\n',
        b'{"text": "caf\xe9"}\n',
        b'{"text": "' + b"x" * 2000 + b'\xe9"}\n',
        b'{"text": "\\ud800"}\n',
    ]
    for bad, message in (
        (1, "line 2: not UTF-8"),
        (2, "line 2: not UTF-8"),
        (3, "line 2: it holds half of a surrogate pair"),
    ):
        (tmp_path / "a.jsonl").write_bytes(rows[0] + rows[bad])
        with pytest.raises(ValueError, match=rf"a.jsonl, {message}"):
            open_data(Hf(files=str(tmp_path / "a.jsonl"), cache_dir=str(tmp_path / "cache")), 8, 256)
    with pytest.raises(ValueError, match="half of a surrogate"):
        encoded("\udc00")


def test_gzip_cut_short_anywhere_is_named(tmp_path):
    whole = gzip.compress("".join(json.dumps({"text": prose(40, n)}) + "\n" for n in range(30)).encode())
    path = tmp_path / "a.jsonl.gz"
    for size in (*range(3, 30), *range(30, len(whole), 97), *range(len(whole) - 9, len(whole))):
        path.write_bytes(whole[:size])
        with pytest.raises(
            ValueError, match=r"a.jsonl.gz (cannot be read as JSON lines beyond line \d+|is binary)"
        ) as refusal:
            open_data(Hf(files=str(path), cache_dir=str(tmp_path / "cache")), 8, 256)
        assert "\n" not in str(refusal.value)


def test_zstd_cut_short_anywhere_is_named(tmp_path):
    lines = "".join(json.dumps({"text": prose(40, n)}) + "\n" for n in range(30)).encode()
    whole, path = pa.compress(lines, codec="zstd", asbytes=True), tmp_path / "a.jsonl.zst"
    for size in (*range(4, 30), *range(30, len(whole), 97), *range(len(whole) - 9, len(whole))):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"a.jsonl.zst cannot be read as JSON lines beyond line \d+") as refusal:
            open_data(Hf(files=str(path), cache_dir=str(tmp_path / "cache")), 8, 256)
        assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("by_bytes", [False, True])
def test_characters_that_a_tokenizer_leaves_out_are_counted_and_its_tokens_are_the_librarys(tmp_path, by_bytes):
    """Byte-pair encoding without an unknown token says nothing of them, and merges what stood around them."""
    library = Tokenizer(models.BPE(vocab={"a": 0, "b": 1, "ab": 2, "c": 3}, merges=[("a", "b")]))
    if by_bytes:
        library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.save(str(tmp_path / "tokenizer.json"))
    text = "a\u00e9bcab\u754cab\u00e9c" * 20
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    (tmp_path / "b.txt").write_text("abc" * 30)
    config = Text(
        files=str(tmp_path), tokenizer=str(tmp_path / "tokenizer.json"), holdout=0, cache_dir=str(tmp_path / "cache")
    )
    for data in (open_data(config, 16, 256), open_data(config, 16, 256)):  # made, and found
        assert data.left_out == {"\u00e9": 40, "\u754c": 20}
        (told,) = [line for line in told_of_data(config, data) if "left out" in line]
        assert told.startswith(
            r"60 characters of the text have no token and are left out ('\xe9' 40 times, '\u754c' 20 times);"
        )
    tokens = [*library.encode(text).ids, *library.encode("abc" * 30).ids]
    assert data.train.streams[0].tokens.tolist() == tokens
    if not by_bytes:
        assert tokens[:3] == [2, 3, 2]


def test_a_tokenizer_that_leaves_out_nothing_is_not_asked_twice(tmp_path, tokenizer):
    assert open_tokenizer(str(tokenizer))._marking is None
    vocab = {f"<0x{byte:02X}>": byte for byte in range(256)}
    Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True)).save(str(tmp_path / "fallback.json"))
    assert open_tokenizer(str(tmp_path / "fallback.json"))._marking is None
    Tokenizer(models.BPE(vocab={"a": 0, "?": 1}, merges=[], unk_token="?")).save(str(tmp_path / "unknown.json"))
    assert open_tokenizer(str(tmp_path / "unknown.json"))._marking is None


def test_a_tokenizer_that_cannot_tokenize_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("to be or not to be")
    cases = {
        "unknown": (models.WordLevel({"to": 0, "be": 1}, unk_token="[UNK]"), r"cannot tokenize this text .*; add its unknown token"),
        "empty": (models.BPE(), r"its vocabulary is empty"),
    }  # fmt: skip
    for name, (model, message) in cases.items():
        library = Tokenizer(model)
        library.pre_tokenizer = pre_tokenizers.Whitespace()
        library.save(str(tmp_path / f"{name}.json"))
        config = Text(
            files=str(tmp_path / "a.txt"), tokenizer=str(tmp_path / f"{name}.json"), cache_dir=str(tmp_path / "cache")
        )
        with pytest.raises(ValueError, match=message) as refusal:
            open_data(config, 4, 256)
        assert "\n" not in str(refusal.value)


def test_a_folder_that_links_to_itself_is_walked_once(tmp_path):
    """By a path, and by `**`."""
    (tmp_path / "texts" / "sub").mkdir(parents=True)
    for name in ("texts/a.txt", "texts/sub/b.txt"):
        (tmp_path / name).write_text("to be or not to be, that is the question")
    for link in ("again", "and again", "and once more"):
        (tmp_path / "texts" / "sub" / link).symlink_to(tmp_path / "texts")
    (tmp_path / "texts" / "other.txt").symlink_to(tmp_path / "texts" / "a.txt")
    for files in (str(tmp_path / "texts"), str(tmp_path / "texts" / "**" / "*.txt"), str(tmp_path / "**")):
        found = documents.find_files(files, (".txt",)).files
        assert [path.name for path in found] == ["a.txt", "b.txt"], files
