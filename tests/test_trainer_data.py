"""Data: the order, the windows, the sources, the cache, the prefetch thread."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from rowwise.trainer.data.batches import (
    BatchConfig,
    Prefetch,
    Share,
    holdout_batches,
    micro_batches,
    step_batches,
)
from rowwise.trainer.data.config import Hf, Stdlib, Text, Tokens
from rowwise.trainer.data.corpus import IGNORE, Corpus, TokenStream, cut, split_stream
from rowwise.trainer.data.open import open_data
from rowwise.trainer.data.order import Permutation, sample_indices
from rowwise.trainer.data.tokenizer import ByteTokenizer, open_tokenizer


def is_held_out(document: bytes, share: float) -> bool:
    """A hash of the bytes below `share`."""
    return int.from_bytes(hashlib.blake2b(document, digest_size=8).digest()) < share * 2**64


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 16, 17, 1000, 4097])
def test_the_order_is_a_permutation(size):
    assert sorted(Permutation(size, "a")(np.arange(size))) == list(range(size))


def test_the_order_of_a_trillion_samples_needs_no_memory():
    size = 10**12 + 39
    order = Permutation(size, "big")
    places = np.concatenate((np.arange(50_000), size - 1 - np.arange(50_000)))
    drawn = order(places)
    assert drawn.min() >= 0
    assert drawn.max() < size
    assert len(np.unique(drawn)) == len(places)
    # As even as chance: 20 bins of 5,000 expected, standard deviation 69.
    counts = np.histogram(drawn, bins=20, range=(0, size))[0]
    assert np.abs(counts - 5000).max() < 350
    assert abs(np.corrcoef(drawn[:-1].astype(float), drawn[1:].astype(float))[0, 1]) < 0.02


def test_epochs_and_seeds_differ_and_every_epoch_sees_every_sample():
    first, second = (sample_indices(epoch * 100, 100, 100, "train/0") for epoch in (0, 1))
    assert sorted(first) == sorted(second) == list(range(100))
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, sample_indices(0, 100, 100, "train/1"))
    across = sample_indices(90, 20, 100, "train/0")
    assert np.array_equal(across, np.concatenate((first[90:], second[:10])))


@pytest.fixture
def stream():
    documents = [0, 4, 5, 11, 30]
    return TokenStream(np.arange(40, dtype=np.uint16), np.array(documents))


def test_windows_overlap_by_one_token_and_predict_each_token_once(stream):
    samples = [cut(stream, start, 5, False) for start in range(0, 35, 5)]
    assert stream.windows(5) == 7
    assert np.array_equal(np.concatenate([s.inputs for s in samples]), np.arange(35))
    assert np.array_equal(np.concatenate([s.labels for s in samples]), np.arange(1, 36))
    assert np.array_equal(samples[3].positions, np.arange(5))


def test_document_masks_restart_positions_and_silence_the_first_token_of_a_document(stream):
    sample = cut(stream, 2, 10, True)
    assert sample.inputs.tolist() == [2, 3, 4, 5, 6, 7, 8, 9, 10, 11]
    assert sample.positions.tolist() == [0, 1, 0, 0, 1, 2, 3, 4, 5, 0]
    assert sample.documents.tolist() == [0, 0, 1, 2, 2, 2, 2, 2, 2, 3]
    assert sample.labels.tolist() == [3, IGNORE, IGNORE, 6, 7, 8, 9, 10, IGNORE, 12]


def test_the_share_held_out_of_a_stream_is_its_end(stream):
    train, holdout = split_stream(stream, 2, 5)
    assert train.windows(5) + holdout.windows(5) == stream.windows(5)
    assert holdout.windows(5) == 2
    assert train.tokens[-1] == holdout.tokens[0] == 25
    assert holdout.documents.tolist() == [0, 5]


def corpus_of(stream, seq_len=5):
    return Corpus((stream, stream), seq_len, True, "fingerprint")


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_the_global_batch_is_the_same_on_every_layout(stream, ranks):
    config = BatchConfig(global_size=8, micro_size=2, seq_len=5)
    whole = next(step_batches(corpus_of(stream), config, 3, 16, Share(), pin=False))
    parts = [
        next(step_batches(corpus_of(stream), config, 3, 16, Share(rank, ranks), pin=False)) for rank in range(ranks)
    ]
    expected = torch.cat([batch.inputs for batch in whole])
    assert torch.equal(torch.cat([batch.inputs for part in parts for batch in part]), expected)
    assert len(parts[0]) == 8 // ranks // 2


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_held_out_samples_are_padded_to_equal_rounds_and_counted_once(stream, ranks):
    config = BatchConfig(global_size=6, micro_size=2, seq_len=5)
    corpus = corpus_of(stream)
    parts = [list(holdout_batches(corpus, config, 99, Share(rank, ranks))) for rank in range(ranks)]
    assert len({len(part) for part in parts}) == 1
    labels = torch.cat([batch.labels for part in parts for batch in part])
    everything = micro_batches(np.arange(corpus.samples), corpus, corpus.samples)[0]
    assert int((labels != IGNORE).sum()) == int((everything.labels != IGNORE).sum())


def test_stdlib_is_real_text_with_whole_documents_held_out(tmp_path):
    data = open_data(Stdlib(cache_dir=str(tmp_path)), 256, 256)
    assert data.train.tokens > 5_000_000
    assert 0.005 < data.holdout.tokens / data.train.tokens < 0.05
    text = data.tokenizer.decode(data.train.sample(1000).inputs)
    assert text.isprintable() or "\n" in text
    folder = next(path for path in tmp_path.iterdir() if path.is_dir())
    built = (folder / "train.bin").stat().st_mtime_ns
    assert open_data(Stdlib(cache_dir=str(tmp_path)), 128, 256).train.fingerprint == data.train.fingerprint
    assert (folder / "train.bin").stat().st_mtime_ns == built, "the cache was built again"


@pytest.fixture
def tokenizer_file(tmp_path) -> Path:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<end>"], show_progress=False)
    tokenizer.train_from_iterator(["to be or not to be, that is the question"] * 20, trainer)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json"


def write_documents(folder: Path, documents: list[str]) -> Path:
    folder.mkdir()
    for n, document in enumerate(documents):
        (folder / f"{n}.txt").write_text(document)
    return folder


DOCUMENTS = [f"to be or not to be, {n}; that is the question" for n in range(60)]


def test_text_through_a_tokenizer_keeps_its_documents(tmp_path, tokenizer_file):
    folder = write_documents(tmp_path / "text", DOCUMENTS)
    config = Text(
        files=str(folder), tokenizer=str(tokenizer_file), end_of_text="<end>", holdout=0.2, mask_documents=True,
        cache_dir=str(tmp_path / "cache"),
    )  # fmt: skip
    data = open_data(config, 8, 400)
    library = Tokenizer.from_file(str(tokenizer_file))
    (stream,), (held,) = data.train.streams, data.holdout.streams
    ends = [*stream.documents[1:], len(stream.tokens)]
    train = [stream.tokens[a:b].tolist() for a, b in zip(stream.documents, ends, strict=True)]
    in_order = [DOCUMENTS[int(path.stem)] for path in sorted(folder.iterdir())]
    expected = [d for d in in_order if not is_held_out(d.encode(), 0.2)]
    assert train == [[*library.encode(d).ids, library.token_to_id("<end>")] for d in expected]
    assert len(held.documents) == len(DOCUMENTS) - len(expected) > 0
    assert data.vocab_size == library.get_vocab_size()


def test_what_a_tokenizer_file_says_of_inputs_does_not_touch_the_corpus(tmp_path, tokenizer_file):
    library = Tokenizer.from_file(str(tokenizer_file))
    plain = open_tokenizer(str(tokenizer_file)).encode([DOCUMENTS[0].encode()])
    library.enable_truncation(4)
    library.enable_padding(length=64)
    library.save(str(tokenizer_file))
    assert open_tokenizer(str(tokenizer_file)).encode([DOCUMENTS[0].encode()]) == plain
    assert len(plain[0]) > 4


def test_a_corpus_in_one_long_file_holds_out_its_end(tmp_path):
    lines = [f"line {n}\n" for n in range(60_000)]
    (tmp_path / "corpus.txt").write_text("".join(lines))
    config = Text(files=str(tmp_path / "corpus.txt"), holdout=0.1, cache_dir=str(tmp_path / "cache"))
    data = open_data(config, 64, 256)
    train, held = (ByteTokenizer().decode(c.streams[0].tokens.tolist()) for c in (data.train, data.holdout))
    assert train + held == "".join(lines)
    assert train.endswith("\n")
    assert len(held) / len(train + held) == pytest.approx(0.1, abs=0.001)


def test_the_cache_notices_a_changed_file(tmp_path):
    folder = write_documents(tmp_path / "text", DOCUMENTS)
    config = Text(files=str(folder), holdout=0.2, cache_dir=str(tmp_path / "cache"))
    before = open_data(config, 8, 256).train
    (folder / "3.txt").write_text("something else entirely, and longer than it was before")
    after = open_data(config, 8, 256).train
    assert after.fingerprint != before.fingerprint
    assert after.tokens != before.tokens


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "jsonl.zst", "parquet", "arrow"])
def test_every_kind_of_dataset_file_gives_the_same_corpus(tmp_path, kind):
    import gzip

    import pyarrow as pa
    import pyarrow.parquet as pq

    folder = tmp_path / kind
    folder.mkdir()
    table = pa.table({"id": list(range(len(DOCUMENTS))), "text": DOCUMENTS})
    lines = "".join(json.dumps(row) + "\n" for row in table.to_pylist())
    path = folder / f"part-0.{kind}"
    if kind == "parquet":
        pq.write_table(table, path, row_group_size=7)
    elif kind == "arrow":
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=7)
    elif kind == "jsonl.gz":
        path.write_bytes(gzip.compress(lines.encode()))
    elif kind == "jsonl.zst":
        halves = lines[: len(lines) // 2], lines[len(lines) // 2 :]  # two frames, as `cat a.zst b.zst` makes
        path.write_bytes(b"".join(pa.compress(half.encode(), codec="zstd", asbytes=True) for half in halves))
    else:
        path.write_text(lines)
    data = open_data(Hf(files=str(folder), holdout=0.2, cache_dir=str(tmp_path / "cache")), 16, 256)
    text = ByteTokenizer().decode(data.train.streams[0].tokens.tolist())
    assert text == "".join(d for d in DOCUMENTS if not is_held_out(d.encode(), 0.2))


def test_token_files_raw_or_written_by_rowwise(tmp_path):
    cached = tmp_path / "cache"
    text = open_data(
        Text(files=str(write_documents(tmp_path / "t", DOCUMENTS)), holdout=0.2, cache_dir=str(cached)), 16, 256
    )
    folder = next(path for path in cached.iterdir() if path.is_dir())
    again = open_data(Tokens(files=str(folder)), 16, 256)
    assert np.array_equal(again.train.streams[0].tokens, text.train.streams[0].tokens)
    np.arange(1000, dtype=np.int32).tofile(tmp_path / "a.bin")
    np.arange(500, dtype=np.int32).tofile(tmp_path / "b.bin")
    raw = Tokens(files=[str(tmp_path / "a.bin"), str(tmp_path / "b.bin")], dtype="int32", holdout=0.1)
    data = open_data(raw, 9, 1000)
    assert data.train.samples + data.holdout.samples == 999 // 9 + 499 // 9
    assert data.train.sample(data.train.streams[0].windows(9)).inputs.tolist() == list(range(9))
    with pytest.raises(ValueError, match=r"go up to 999, but model.vocab_size=500"):
        open_data(raw, 9, 500)
    with pytest.raises(ValueError, match=r"mask_documents=true needs data.separator, .* or Megatron's index beside it"):
        open_data(replace(raw, mask_documents=True), 9, 1000)
    assert open_data(replace(raw, holdout=0.2), 9, 1000).train.fingerprint != data.train.fingerprint
    np.array([1, -5, 3] * 20, dtype=np.int32).tofile(tmp_path / "negative.bin")
    with pytest.raises(ValueError, match="holds the token -5"):
        open_data(replace(raw, files=str(tmp_path / "negative.bin")), 9, 1000)
    (tmp_path / "odd.bin").write_bytes(b"abc")
    with pytest.raises(ValueError, match="3 bytes, which is no number of int32 tokens"):
        open_data(Tokens(files=str(tmp_path / "odd.bin"), dtype="int32"), 9, 1000)


def test_bad_text_sources_are_refused(tmp_path, tokenizer_file):
    folder = write_documents(tmp_path / "empty", ["", ""])
    cache = str(tmp_path / "cache")
    with pytest.raises(ValueError, match="no text to train on"):
        open_data(Text(files=str(folder), cache_dir=cache), 8, 256)
    with pytest.raises(ValueError, match=r"no file in .* ends in .txt, .md"):
        open_data(Text(files=str(write_documents(tmp_path / "none", [])), cache_dir=cache), 8, 256)
    with pytest.raises(ValueError, match="has no such token"):
        open_tokenizer(str(tokenizer_file), "<stop>")
    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    with pytest.raises(ValueError, match=r"bad.jsonl, line 2: not JSON"):
        open_data(Hf(files=str(tmp_path / "bad.jsonl"), cache_dir=cache), 4, 256)
    assert not list(Path(cache).glob("*.incomplete"))


def test_prefetch_hands_over_batches_in_order_and_errors():
    def batches():
        yield from ([n] for n in range(5))
        raise RuntimeError("the disk is gone")

    with Prefetch(batches()) as ahead:
        assert [next(ahead) for _ in range(5)] == [[n] for n in range(5)]
        with pytest.raises(RuntimeError, match="the disk is gone"):
            next(ahead)


def test_leaving_prefetch_early_ends_its_thread():
    def forever():
        while True:
            yield []

    with Prefetch(forever()) as ahead:
        next(ahead)
    assert not ahead._thread.is_alive()
