"""Attacks on data: files of gigabytes, damage drawn at random."""

import gzip
import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from commands import ENVIRONMENT
from rowwise.trainer.data.config import Text, Tokens
from rowwise.trainer.data.integrity import FILES, META
from rowwise.trainer.data.open import open_data

pytestmark = pytest.mark.long

LINE = b"to be or not to be; that is the question "
# What getrusage calls the peak is never below that of the process that started this one.
MEASURE = """
import re, sys
from pathlib import Path
from rowwise.trainer.data.config import Hf, Text
from rowwise.trainer.data.open import open_data
def megabytes(key):
    return int(re.search(key + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024
source, path, tokenizer, cache = sys.argv[1:]
config = {"text": Text, "hf": Hf}[source](files=path, tokenizer=tokenizer, holdout=0.01, cache_dir=cache)
Path("/proc/self/clear_refs").write_text("5")
before = megabytes("VmRSS")
data = open_data(config, 128, 70_000)
print(data.tokens, before, megabytes("VmHWM") - before)
"""


def lines(size: int, ending: bytes):
    block = (LINE.rstrip() + ending) * 25_000
    for _ in range(size // len(block)):
        yield block


def write_text(path: Path, size: int) -> int:
    with path.open("wb") as file:
        return sum(map(file.write, lines(size, b"\n")))


def write_one_line(path: Path, size: int) -> int:
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(b'{"text": "')
        written = sum(map(file.write, lines(size, b" ")))
        file.write(b'"}\n')
    return written


def write_long_rows(path: Path, size: int) -> int:
    with path.open("wb") as file:
        for _ in range(4):
            file.write(b'{"n": 1, "text": "')
            written = sum(map(file.write, lines(size // 4, b"\\n")))
            file.write(b'"}\n')
    return 4 * (written - written // (len(LINE) + 1))  # a line break is one character of the text


def write_parquet(path: Path, size: int) -> int:
    rows = [b"".join(lines(size // 64, b"\n")).decode() for _ in range(2)]
    schema = pa.schema([("text", pa.string())])
    with pq.ParquetWriter(path, schema, compression="zstd", use_dictionary=False) as writer:
        for _ in range(32):
            writer.write_table(pa.table({"text": rows}, schema))
    return 64 * len(rows[0])


def tokenizer_of(folder: Path) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    library = Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    library.train_from_iterator(
        [LINE.decode()] * 10, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    )
    library.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


# A few hundred MB over what the imports take, whatever the size; Parquet as far as its library allows.
@pytest.mark.parametrize(
    ("source", "write", "gigabytes", "tokenized", "most"),
    [
        ("text", write_text, 2.0, False, 150), ("hf", write_one_line, 1.5, False, 150), ("hf", write_long_rows, 1.0, False, 150),
        ("hf", write_parquet, 1.0, False, 400), ("text", write_text, 0.3, True, 300), ("hf", write_one_line, 0.3, True, 300),
    ],
    ids=["text", "one line in gzip", "long rows", "parquet", "text tokenized", "one line tokenized"],
)  # fmt: skip
def test_memory_does_not_grow_with_the_text(tmp_path, source, write, gigabytes, tokenized, most):
    path = tmp_path / ("a.txt" if source == "text" else "a.data")
    size = write(path, int(gigabytes * 1e9))
    tokenizer = str(tokenizer_of(tmp_path)) if tokenized else "bytes"
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, source, str(path), tokenizer, str(tmp_path / "cache")],
        env={**os.environ, **ENVIRONMENT}, capture_output=True, text=True, timeout=1500, check=True,
    )  # fmt: skip
    seconds = time.monotonic() - began
    tokens, before, grown = map(float, done.stdout.split())
    print(
        f"{size / 1e6:,.0f} MB in {seconds:.0f} s: {before:.0f} MB before, {grown:.0f} MB more at the peak",
        file=sys.stderr,
    )
    assert tokens == size if not tokenized else 0 < tokens < size
    assert grown < most, f"{grown:.0f} MB for a text of {size / 1e6:.0f} MB"


def damaged(draw: random.Random, content: bytes) -> bytes:
    """One of many kinds of damage."""
    kind, size = draw.randrange(7), len(content)
    changed = bytearray(content)
    if kind == 0:
        for place in draw.sample(range(size), max(1, size // 20)):
            changed[place] ^= 1 << draw.randrange(8)
    elif kind == 1:
        changed[draw.randrange(size)] ^= 1 << draw.randrange(8)
    elif kind == 2:
        start = draw.randrange(size)
        changed[start : start + size // 20 + 1] = bytes(len(changed[start : start + size // 20 + 1]))
    elif kind == 3:
        return content[: draw.randrange(size)]
    elif kind == 4:
        return content + draw.randbytes(draw.randrange(1, 100))
    elif kind == 5:
        return draw.randbytes(size)
    else:
        start = draw.randrange(size)
        changed = changed[start:] + changed[:start]
    return bytes(changed)


def test_damage_of_a_tokenizer_is_named_or_makes_other_data(tmp_path):
    """100 times, every other as two numbers that change places: what is no tokenizer any more is refused in one line; other
    tokens never pass for those before."""
    path, text = tokenizer_of(tmp_path), tmp_path / "a.txt"
    text.write_bytes(LINE * 200)
    config = Text(files=str(text), tokenizer=str(path), holdout=0.0, cache_dir=str(tmp_path / "cache"))
    train = open_data(config, 16, 300).train
    whole, fingerprint = np.array(train.streams[0].tokens), train.fingerprint
    content, draw, outcomes = path.read_bytes(), random.Random(6), Counter[str]()
    used = sorted(set(whole.tolist()))
    for round_ in range(100):
        broken = damaged(draw, content)
        if round_ % 2:
            one, other = draw.sample(used, 2)
            swap = {f": {one}".encode(): f": {other}".encode(), f": {other}".encode(): f": {one}".encode()}
            broken = re.sub(rb": \d+\b", lambda found: swap.get(found[0], found[0]), content)  # noqa: B023
        path.write_bytes(broken)
        try:
            train = open_data(config, 16, 300).train
            same = np.array_equal(train.streams[0].tokens, whole)
            assert same == (train.fingerprint == fingerprint)
            outcomes["the same data" if same else "other data"] += 1
        except ValueError as refusal:
            assert "tokenizer" in str(refusal) and "\n" not in str(refusal), refusal
            outcomes["refused"] += 1
    assert outcomes["refused"] > 40 and outcomes["other data"] > 40, outcomes


def test_damage_at_random_is_named_or_harmless(tmp_path):
    """Of every file of a corpus, 300 times: made anew where it is a cache; refused in one line where it is given."""
    (tmp_path / "text").mkdir()
    for n in range(30):
        (tmp_path / "text" / f"{n}.txt").write_bytes(LINE * (n + 1))
    config = Text(files=str(tmp_path / "text"), holdout=0.3, cache_dir=str(tmp_path / "cache"))
    whole = np.array(open_data(config, 16, 256).train.streams[0].tokens)
    (store,) = (path for path in (tmp_path / "cache").iterdir() if path.is_dir())
    draw, names, harmless = random.Random(5), [*FILES, META], 0
    for _ in range(300):
        name = draw.choice(names)
        content = (store / name).read_bytes()
        broken = damaged(draw, content)
        given = tmp_path / "given"
        shutil.rmtree(given, ignore_errors=True)
        shutil.copytree(store, given)
        (given / name).write_bytes(broken)
        try:
            same = open_data(Tokens(files=str(given)), 16, 256)
            # What does not change the meaning of the record, such as white space, is no damage.
            assert broken == content or (name == META and json.loads(broken) == json.loads(content))
            assert np.array_equal(same.train.streams[0].tokens, whole)
            harmless += 1
        except ValueError as refusal:
            assert str(given) in str(refusal) and "\n" not in str(refusal)
        (store / name).write_bytes(broken)
        assert np.array_equal(open_data(config, 16, 256).train.streams[0].tokens, whole)
    assert harmless < 30
