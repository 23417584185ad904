"""Damage to what a run reads: named and mended before it begins, and while it runs on every rank, whichever rank has it. (Law 6.)"""

import json
import re
import shutil
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch.distributed as dist

from parity import small_config, with_layout
from rowwise.launch.outcome import Failed
from rowwise.launch.worker import told_of_known_ends
from rowwise.parallel.mesh import Workers
from rowwise.trainer import train as training
from rowwise.trainer.checkpoint import Saver
from rowwise.trainer.data import integrity, watch
from rowwise.trainer.data.batches import Prefetch
from rowwise.trainer.data.config import Text, Tokens
from rowwise.trainer.data.corpus import Corpus
from rowwise.trainer.data.integrity import FILES, META, DataDamaged
from rowwise.trainer.data.open import open_data, told_of_data
from rowwise.trainer.data.watch import Watch
from rowwise.trainer.files import fingerprint
from runs import named, run_train


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) * 2 // 3] ^= 0x10
    path.write_bytes(content)


def zeros(path: Path) -> None:
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[: size // 2] + bytes(size - size // 2))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def halve(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def lengthen(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def swap(path: Path) -> None:
    other = path.with_name(path.name.replace("holdout", "TRAIN").replace("train", "holdout").replace("TRAIN", "train"))
    (path.parent / "kept").write_bytes(path.read_bytes())
    shutil.copy(other, path)
    (path.parent / "kept").rename(other)


def another_version(path: Path) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | {"version": 99}))


def of_a_stranger(path: Path) -> None:
    """Its own hash is right, and the rest is not."""
    tree = {"version": 1, "dtype": "uint8", "files": {"../../train.bin": {"bytes": 1, "sha256": []}}}
    path.write_text(json.dumps(tree | {"sha256": fingerprint(tree)}))


def not_json(path: Path) -> None:
    path.write_text("{" * 100_000)


ANY = (flip, zeros, cut, halve, empty, lengthen, Path.unlink)
DAMAGE = [(name, damage) for name in FILES for damage in (*ANY, swap)]
DAMAGE += [(META, damage) for damage in (*ANY[:5], Path.unlink, another_version, of_a_stranger, not_json)]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """A folder that Rowwise wrote, with more than one document on either side."""
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "text").mkdir()
    for n in range(40):
        (folder / "text" / f"{n}.txt").write_text(f"to be or not to be, {n}; that is the question\n" * (n + 1))
    open_data(text_of(folder), 16, 256)
    return folder


def text_of(folder: Path) -> Text:
    return Text(files=str(folder / "text"), holdout=0.3, cache_dir=str(folder / "cache"))


def store_of(folder: Path) -> Path:
    (found,) = (path for path in (folder / "cache").iterdir() if path.is_dir())
    return found


def copy_of(corpus: Path, to: Path) -> Path:
    """A copy whose text files are as old as the original's."""
    shutil.copytree(corpus, to, copy_function=shutil.copy2)
    return to


@pytest.mark.parametrize(("name", "damage"), DAMAGE, ids=[f"{d.__name__} {n}" for n, d in DAMAGE])
def test_a_damaged_corpus_is_made_anew_where_it_is_a_cache_and_refused_where_it_is_given(
    corpus, tmp_path, capsys, name, damage
):
    whole = open_data(text_of(corpus), 16, 256).train
    tokens = np.array(whole.streams[0].tokens)
    given, cache = tmp_path / "given", store_of(corpus)
    shutil.copytree(cache, given)
    damage(given / name)
    with pytest.raises(ValueError) as refusal:
        open_data(Tokens(files=str(given)), 16, 256)
    assert str(given) in str(refusal.value) and "\n" not in str(refusal.value) and len(str(refusal.value)) < 400
    damage(cache / name)
    again = open_data(text_of(corpus), 16, 256).train
    assert np.array_equal(again.streams[0].tokens, tokens)
    assert again.fingerprint == whole.fingerprint
    assert (said := capsys.readouterr().err).count("\n") == 1 and "is made anew" in said and str(cache) in said
    open_data(text_of(corpus), 16, 256)
    assert not capsys.readouterr().err, "what was mended is whole"


def test_tokens_beyond_the_vocabulary_that_the_record_states_are_refused(corpus, tmp_path):
    given = tmp_path / "given"
    shutil.copytree(store_of(corpus), given)
    tree = json.loads((given / META).read_text()) | {"vocab_size": 100}
    del tree["sha256"]
    (given / META).write_text(json.dumps(tree | {"sha256": fingerprint(tree)}))
    with pytest.raises(ValueError, match=r"given holds the token 11\d, and its record says that there are 100; give"):
        open_data(Tokens(files=str(given)), 16, 256)


@pytest.fixture
def of_an_earlier_release(corpus, tmp_path) -> Path:
    """A corpus folder as the first releases wrote it."""
    given = tmp_path / "given"
    shutil.copytree(store_of(corpus), given)
    tree = json.loads((given / META).read_text())
    (given / META).write_text(json.dumps({key: tree[key] for key in ("dtype", "vocab_size", "fingerprint", "tokens")}))
    return given


def test_a_corpus_of_an_earlier_release_is_read_and_gets_hashes(corpus, of_an_earlier_release, capsys):
    config = Tokens(files=str(of_an_earlier_release))
    now = open_data(Tokens(files=str(store_of(corpus))), 16, 256)
    first, again = open_data(config, 16, 256), open_data(config, 16, 256)
    assert (of_an_earlier_release / META).read_text() == (store_of(corpus) / META).read_text()
    assert first.train.fingerprint == again.train.fingerprint == now.train.fingerprint
    assert list(first.read.values()) == list(now.read.values()) and not first.unhashed
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and f"{of_an_earlier_release} is of an earlier release" in said
    flip(of_an_earlier_release / "train.bin")
    with pytest.raises(ValueError, match=r"train\.bin is damaged: bytes 0 to"):
        open_data(config, 16, 256)


@pytest.mark.parametrize(
    ("name", "damage"),
    [(name, damage) for name in FILES for damage in (*ANY, swap) if damage is not lengthen or name.endswith(".bin")],
)
def test_damage_to_a_corpus_of_an_earlier_release_gets_no_hashes(of_an_earlier_release, name, damage):
    before = (of_an_earlier_release / META).read_bytes()
    damage(of_an_earlier_release / name)
    with pytest.raises(ValueError) as refusal:
        open_data(Tokens(files=str(of_an_earlier_release)), 16, 256)
    assert str(of_an_earlier_release) in str(refusal.value) and "\n" not in str(refusal.value)
    assert (of_an_earlier_release / META).read_bytes() == before


def test_a_corpus_of_an_earlier_release_that_cannot_be_written_is_read_and_said_to_be(
    of_an_earlier_release, monkeypatch, capsys
):
    monkeypatch.setattr("os.access", lambda path, mode: False)
    before, config = (of_an_earlier_release / META).read_bytes(), Tokens(files=str(of_an_earlier_release))
    data = open_data(config, 16, 256)
    assert data.unhashed == (of_an_earlier_release,) and (of_an_earlier_release / META).read_bytes() == before
    (told,) = [line for line in told_of_data(config, data) if "without hashes" in line]
    assert told.startswith(f"{of_an_earlier_release} is of an earlier release") and not capsys.readouterr().err


def watched(data, seconds: float = 5.0) -> str | None:
    """What the watch of `data` finds within some seconds."""
    with data.watch:
        deadline = time.monotonic() + seconds
        while data.watch.complaint is None and data.watch._thread.is_alive() and time.monotonic() < deadline:
            time.sleep(0.005)
    return data.watch.complaint


def test_a_large_cache_is_compared_in_the_background_and_then_made_anew(corpus, monkeypatch, capsys):
    monkeypatch.setattr(integrity, "AT_ONCE_BYTES", 0)
    monkeypatch.setattr(integrity, "PIECE_BYTES", 1000)
    shutil.rmtree(corpus / "cache")
    whole = open_data(text_of(corpus), 16, 256)
    assert watched(whole, 0.2) is None and whole.watch.unread() is None
    path, tokens = store_of(corpus) / "train.bin", np.array(whole.train.streams[0].tokens)
    flip(path)
    data = open_data(text_of(corpus), 16, 256)
    assert (found := watched(data)) is not None
    place = path.stat().st_size * 2 // 3 // 1000 * 1000
    assert f"{path} is damaged: bytes {place:,} to" in found and "start the same command again" in found
    assert data.read != whole.read, "what was read is what is told to other ranks"
    again = open_data(text_of(corpus), 16, 256)
    assert "is made anew" in capsys.readouterr().err
    assert np.array_equal(again.train.streams[0].tokens, tokens)
    shutil.rmtree(corpus / "cache")
    monkeypatch.undo()
    open_data(text_of(corpus), 16, 256)


def test_ranks_of_a_machine_share_the_reading(corpus, monkeypatch):
    monkeypatch.setattr(integrity, "AT_ONCE_BYTES", 0)
    monkeypatch.setattr(integrity, "PIECE_BYTES", 1000)
    whole = open_data(text_of(corpus), 16, 256).watch._pieces
    watches = [open_data(text_of(corpus), 16, 256).watch for _ in range(3)]
    for rank, each in enumerate(watches):
        each.share(rank, 3)
    shares = [each._pieces for each in watches]
    assert sorted(whole, key=str) == sorted((piece for share in shares for piece in share), key=str)
    assert max(map(len, shares)) - min(map(len, shares)) <= 1 and len(whole) > 9


def test_a_cache_that_is_removed_under_way_is_no_damage(corpus, tmp_path, monkeypatch):
    """Whoever has it mapped keeps it."""
    monkeypatch.setattr(integrity, "AT_ONCE_BYTES", 0)
    monkeypatch.setattr(watch, "POLL_SECONDS", 0.01)
    config = replace(text_of(corpus), cache_dir=str(tmp_path / "cache"))
    data = open_data(config, 16, 256)
    shutil.rmtree(tmp_path / "cache")
    assert watched(data, 0.1) is None
    assert data.watch.unread() == (
        "the data's content was compared with its hashes to 0% when the run ended: no damage so far"
    )


def test_a_disk_may_call_the_same_file_otherwise_later(tmp_path, monkeypatch):
    """Inode numbers of network disks are not kept for ever."""
    monkeypatch.setattr(watch, "POLL_SECONDS", 0.01)
    np.arange(20_000, dtype=np.uint16).tofile(tmp_path / "a.bin")
    data = open_data(Tokens(files=str(tmp_path)), 16, 20_000)
    shutil.copy2(tmp_path / "a.bin", tmp_path / "copy")
    (tmp_path / "copy").rename(tmp_path / "a.bin")
    assert watched(data, 0.1) is None


def test_what_was_not_compared_in_time_is_said(corpus, monkeypatch):
    monkeypatch.setattr(integrity, "AT_ONCE_BYTES", 0)
    monkeypatch.setattr(watch, "BYTES_A_SECOND", 1.0)
    data = open_data(text_of(corpus), 16, 256)
    assert watched(data, 0.1) is None
    assert data.watch.unread() == (
        "the data's content was compared with its hashes to 25% when the run ended: no damage so far"
    )


@pytest.mark.parametrize("change", [flip, halve, lengthen, Path.unlink])
def test_files_that_are_written_to_under_way_are_named(tmp_path, monkeypatch, change):
    monkeypatch.setattr(watch, "POLL_SECONDS", 0.01)
    for name in ("a.bin", "b.bin"):
        np.arange(20_000, dtype=np.uint16).tofile(tmp_path / name)
    data = open_data(Tokens(files=str(tmp_path)), 16, 20_000)
    change(tmp_path / "b.bin")
    found = watched(data)
    assert found is not None and f"{tmp_path}/b.bin " in found and "give the files as they were" in found
    assert data.train.sample(data.train.streams[0].windows(16) - 1).inputs[0] == 16 * (
        data.train.streams[0].windows(16) - 1
    )


def test_another_run_may_make_a_cache_anew_that_this_one_reads(corpus, monkeypatch):
    monkeypatch.setattr(watch, "POLL_SECONDS", 0.01)
    data = open_data(text_of(corpus), 16, 256)
    first = data.train.sample(0).inputs
    cut(store_of(corpus) / META)
    open_data(text_of(corpus), 16, 256)
    assert watched(data, 0.2) is None
    assert np.array_equal(data.train.sample(0).inputs, first)


def test_a_file_cut_short_under_way_is_padding_and_a_complaint_and_no_bus_error(tmp_path):
    np.arange(20_000, dtype=np.uint16).tofile(tmp_path / "a.bin")
    data = open_data(Tokens(files=str(tmp_path)), 16, 20_000)
    halve(tmp_path / "a.bin")
    sample = data.holdout.sample(0)
    assert (sample.labels == -100).all()
    assert data.watch.complaint is not None and "a.bin has been cut short to 20,000 bytes" in data.watch.complaint
    flipped = replace(data.train, vocab_size=100, watch=None)
    with pytest.raises(DataDamaged, match=r"a.bin has been cut short"):
        flipped.sample(0)
    np.arange(20_000, dtype=np.uint16).tofile(tmp_path / "a.bin")
    with pytest.raises(DataDamaged, match=r"a.bin holds the token 1\d\d, and model.vocab_size=100"):
        flipped.sample(6)


def given_to(workers: Workers, config, damage: str):
    """A run whose rank 1 has a copy of the corpus, damaged; what it raised on this rank."""
    source = Path(config.data.files[0])
    copy = source.with_name(f"copy of {source.name} for {damage}")
    if workers.rank == 1:
        shutil.copytree(source, copy) if source.is_dir() else shutil.copy(source, copy)
        config = replace(config, data=replace(config.data, files=[str(copy)]))
    before, watch.POLL_SECONDS, original = watch.POLL_SECONDS, 0.01, (Prefetch.__next__, Corpus._sound)
    calls = iter(range(1, 1000))
    if damage == "before":
        workers.rank == 1 and flip(copy / "train.bin")
    elif damage == "written to" and workers.rank == 1:

        def drawn(self):
            if next(calls) == 4:
                halve(copy)
            return original[0](self)

        Prefetch.__next__ = drawn
    elif damage == "other tokens" and workers.rank == 1:

        def other(self, stream, start):
            sample = original[1](self, stream, start)
            return replace(sample, inputs=(sample.inputs + (next(calls) > 40)) % 61)

        Corpus._sound = other
    try:
        run_train(workers, config)
    except DataDamaged as error:
        return str(error)
    finally:
        watch.POLL_SECONDS = before
        Prefetch.__next__, Corpus._sound = original
        if dist.is_initialized():
            dist.destroy_process_group()
    return None


ENDS = {
    "before": r"rank 1: .*train.bin is damaged: bytes 0 to",
    "written to": r"damaged data: rank 1 \(.*\): .*has been (written to|cut short).* may have learned from it",
    "other tokens": r"damaged data: ranks \[1\] \(.*\) read other tokens than the others in step \d+; compare the files",
}
IN_BACKWARD = ("optim.in_backward=true", "clip_norm=0", "batch.micro_size=12")


@pytest.mark.parametrize(
    ("damage", "options"), [*((damage, ()) for damage in ENDS), ("other tokens", IN_BACKWARD)], ids=str
)
def test_damage_on_one_rank_ends_the_run_on_all_with_one_line(ranks, corpus, tmp_path, damage, options):
    """And nothing is saved."""
    config = small_config(tmp_path, "steps=400", "checkpoint.every=399", *options)
    if damage == "before":
        tree = store_of(corpus)
        data = Tokens(files=[str(tree)], holdout=0.1)
        config = replace(config, data=data, model=replace(config.model, vocab_size=256))
    config = named(with_layout(config, 2, **({"zero": 1} if options else {})), tmp_path, damage)
    said = ranks.run(given_to, 2, config, damage)
    assert said[0] == said[1] and said[0] is not None and "\n" not in said[0]

    assert re.search(ENDS[damage], said[0]), said[0]
    assert not list(Path(config.run_dir).glob("checkpoints/step-*"))
    assert "watch" not in {thread.name for thread in threading.enumerate()}


def found_late(workers: Workers, config, when: str) -> str:
    """A run whose rank 1 finds damage in or after its last step; what it raised on this rank."""
    watches, before = [], (Watch.__enter__, training.advance, Saver.save)
    Watch.__enter__ = lambda self: (watches.append(self), before[0](self))[1]

    def complaining(original):
        def with_a_complaint(*given):
            original(*given)
            if workers.rank == 1:
                watches[0].complain("a.bin is damaged")

        return with_a_complaint

    if when == "in the last step":
        training.advance = complaining(before[1])
    else:
        Saver.save = complaining(before[2])
    try:
        run_train(workers, config)
    except DataDamaged as error:
        return str(error)
    finally:
        Watch.__enter__, training.advance, Saver.save = before
        dist.destroy_process_group()
    raise AssertionError("it was not told")


@pytest.mark.parametrize(
    ("when", "said", "saved"),
    [
        ("in the last step", "The run ends without saving; steps 1 to 1 of", 0),
        ("as it is saved", "The run ends, and step 1 is saved; steps 1 to 1 of", 1),
    ],
)
def test_damage_that_is_found_at_the_end_says_whether_the_end_was_saved(ranks, tmp_path, when, said, saved):
    config = named(with_layout(small_config(tmp_path, "steps=1"), 2), tmp_path, when)
    told = ranks.run(found_late, 2, config, when)
    assert (
        told[0] == told[1] and re.match(r"damaged data: rank 1 \(.*\): a.bin is damaged", told[0]) and said in told[0]
    )
    assert len(list(Path(config.run_dir).glob("checkpoints/step-*"))) == saved


def test_damage_is_one_line_of_a_worker(tmp_path):
    with pytest.raises(Failed, match=r"^a.bin is damaged$"), told_of_known_ends(tmp_path, Workers()):
        raise DataDamaged("a.bin is damaged")
