"""Runs on conversations: the same samples from files of every form, packed with each apart; what is bad is named or counted; a run is
the same on every layout, and goes on where it stopped (laws 2 and 3)."""

import gzip
import json
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_trainer_data_chat import messages, write_folder

from chat_templates import CHATML
from parity import assert_all_same, run_plain, run_together, small_config, with_layout
from rowwise.trainer.config import TrainConfig
from rowwise.trainer.data.chat.config import Chat
from rowwise.trainer.data.chat.packing import pack
from rowwise.trainer.data.chat.tokenizer import ChatTokenizer
from rowwise.trainer.data.config import Mixture, Part, Text, Tokens
from rowwise.trainer.data.corpus import IGNORE
from rowwise.trainer.data.open import Data, open_data, told_of_data
from rowwise.trainer.data.own_tokenizer import tokenizer_of_run
from rowwise.trainer.manifest import complete_checkpoints, read_manifest
from rowwise.trainer.metrics import read_metrics
from runs import assert_resumes_to_the_last_bit, assert_same_run, named, run_train, run_until

WORDS = ["Paris", "Madrid", "of", "course.", "é", "🙂", "capital", "thank", "you;", "What", "is", "it?"]


def conversations(count: int = 40, seed: int = 3) -> list[list[dict]]:
    """Of one turn to three, from short ones to long."""
    draw = random.Random(seed)

    def text() -> str:
        return " ".join(draw.choices(WORDS, k=draw.choice((1, 2, 3, 8))))

    return [
        messages(*(("user", text()), ("assistant", f"{number} {text()}")) * draw.choice((1, 1, 2, 3)))
        for number in range(count)
    ]


def chat(folder: Path, rows: list | None = None, **more) -> Chat:
    """A source of conversations, whose file is there."""
    if not (folder / "tokenizer").exists():
        write_folder(folder / "tokenizer", CHATML)
    if rows is not None:
        (folder / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    given = {
        "files": str(folder / "rows.jsonl"),
        "tokenizer": str(folder / "tokenizer"),
        "cache_dir": str(folder / "cache"),
    }
    return Chat(**{"holdout": 0.0, **given, **more})


def rows_of(several: list) -> list[dict]:
    return [{"messages": one} for one in several]


def learned_texts(data: Data) -> Counter[str]:
    """What every conversation of every sample is asked to say, by its labels; and how often."""
    found = Counter[str]()
    for corpus in (data.train, data.holdout):
        for n in range(corpus.samples):
            sample = corpus.sample(n)
            for document in range(sample.documents.max() + 1):
                labels = sample.labels[sample.documents == document]
                if (labels != IGNORE).any():
                    found[data.tokenizer.decode(labels[labels != IGNORE].tolist())] += 1
    return found


@pytest.fixture(scope="module")
def told(tmp_path_factory) -> list[list[dict]]:
    return conversations()


@pytest.mark.parametrize("packing", ["best_fit", "in_order"])
def test_samples_hold_each_conversation_once_and_apart(tmp_path, packing):
    """What labels ask for is what the assistants say, of all conversations; a token is at its place in its own one."""
    several = conversations(60)
    data = open_data(chat(tmp_path, rows_of(several), packing=packing, holdout=0.2), 200, 300)
    said = Counter("".join(m["content"] for m in one if m["role"] == "assistant") for one in several)
    assert learned_texts(data) == said and data.holdout.samples and data.vocab_size <= 300
    sample = data.train.sample(0)
    for document in range(sample.documents.max() + 1):
        here = np.flatnonzero(sample.documents == document)
        assert (np.diff(here) == 1).all() and sample.positions[here].tolist() == list(range(len(here)))
    assert (sample.labels == IGNORE).any() and (sample.labels != IGNORE).any()
    tokens = [data.train.sample(n) for n in range(data.train.samples)]
    start = data.tokenizer.encode_prompt("<|im_start|>user")
    begun = sum(
        int(((s.inputs[:-1] == start[0]) & (s.inputs[1:] == start[1]) & (s.positions[:-1] == 0)).sum()) for s in tokens
    )
    assert begun == len(data.train.streams[0].packed.members) > len(tokens)


def test_best_fit_is_what_it_says():
    """The bin with the least room that is enough, the longest first: as a search over all bins finds it."""
    draw = random.Random(5)
    for room in (1, 7, 64, 1000):
        sizes = np.array([draw.randint(1, room) for _ in range(draw.choice((0, 1, 300)))], dtype=np.int64)
        rooms: list[int] = []
        for size in sorted(sizes.tolist(), reverse=True):
            fitting = [n for n, left in enumerate(rooms) if left >= size]
            if fitting:
                rooms[min(fitting, key=lambda n: rooms[n])] -= size
            else:
                rooms.append(room - size)
        packed = pack(sizes, room, "best_fit")
        filled = sorted(room - int(sizes[packed[n]].sum()) for n in range(len(packed)))
        assert filled == sorted(rooms) and sorted(packed.members.tolist()) == list(range(len(sizes)))
        in_order = pack(sizes, room, "in_order")
        assert in_order.members.tolist() == list(range(len(sizes))) and len(in_order) >= len(packed)
        assert all(sizes[in_order[n]].sum() + sizes[in_order[n + 1]][0] > room for n in range(len(in_order) - 1))


def write_as(kind: str, rows: list[dict], path: Path) -> None:
    lines = "".join(f"{json.dumps(row)}\n" for row in rows).encode()
    table = pa.Table.from_pylist(rows)
    match kind:
        case "jsonl":
            path.write_bytes(b"\xef\xbb\xbf" + lines)
        case "jsonl.gz":
            path.write_bytes(gzip.compress(lines))
        case "jsonl.zst":
            with pa.output_stream(str(path), compression="zstd") as file:
                file.write(lines)
        case "json":
            path.write_text(json.dumps(rows, indent=1))
        case "parquet":
            pq.write_table(table, path, row_group_size=7)
        case "arrow":
            with pa.ipc.new_stream(path, table.schema) as file:
                file.write_table(table)


def test_files_of_every_form_hold_the_same(tmp_path, told):
    found = {}
    for kind in ("jsonl", "jsonl.gz", "jsonl.zst", "json", "parquet", "arrow"):
        write_as(kind, rows_of(told), tmp_path / f"rows.{kind}")
        data = open_data(chat(tmp_path, files=str(tmp_path / f"rows.{kind}")), 64, 300)
        found[kind] = data.train.fingerprint
        assert f"{len(told)} of messages" in told_of_data(chat(tmp_path), data)[0]
    assert len(set(found.values())) == 1


def test_bad_rows_are_refused_with_their_line_or_skipped_and_counted(tmp_path, told):
    rows = rows_of(told)
    lines = [json.dumps(row) for row in rows]
    bad = {
        3: ("{", "not JSON"), 5: (json.dumps({"messages": told[0][:1]}), "no message of an assistant"),
        9: (json.dumps({"messages": told[0][::-1]}), "roles out of order"), 12: (json.dumps({"messages": told[0][:1]}), "no message"),
    }  # fmt: skip
    for number, (line, _) in bad.items():
        lines.insert(number - 1, line)
    path = tmp_path / "rows.jsonl"
    for number in (3, 5, 9):
        good = [line if n == number or n not in bad else "" for n, line in enumerate(lines, 1)]
        path.write_text("\n".join(good))
        with pytest.raises(ValueError, match=rf"rows.jsonl, line {number}: {bad[number][1]}.*data.bad_rows=skip"):
            open_data(chat(tmp_path), 64, 300)
    path.write_text("\n".join(lines))
    data = open_data(config := chat(tmp_path, bad_rows="skip"), 200, 300)
    remarks = told_of_data(config, data)
    assert sum(learned_texts(data).values()) == len(told)
    assert any("1 row skipped: not JSON (the first: " in line and "rows.jsonl, line 3" in line for line in remarks), (
        remarks
    )
    assert any("2 rows skipped: no message of an assistant" in line and "line 5" in line for line in remarks)
    assert told_of_data(config, open_data(config, 200, 300)) == remarks, "out of the cache"
    path.write_text("\n".join(line for line, _ in bad.values()))
    with pytest.raises(ValueError, match=r"no conversation to train on: .*2 skipped: no message of an assistant"):
        open_data(config, 64, 300)


def test_long_conversations_are_cut_skipped_or_refused(tmp_path, told):
    several = [
        *told[:10],
        messages(("user", "What is it?"), ("assistant", "Paris " * 200)),
        messages(("user", "a " * 300), ("assistant", "b")),
    ]
    config = chat(tmp_path, rows_of(several))
    with pytest.raises(
        ValueError, match=r"rows.jsonl, line 11: a conversation of \d+ tokens, of 2 that .*data.too_long=cut or skip"
    ):
        open_data(replace(config, too_long="refuse"), 170, 300)
    cut, skipped = (open_data(replace(config, too_long=how), 170, 300) for how in ("cut", "skip"))
    texts, others = learned_texts(cut), learned_texts(skipped)
    (more,) = texts - others
    assert sum(others.values()) == 10 and more == ("Paris " * 200)[: len(more)] and len(more) > 60
    assert (
        "2 conversations have more than batch.seq_len + 1 = 171 tokens: 1 are cut, 1 skipped"
        in told_of_data(config, cut)[-1]
    )
    assert "0 are cut, 2 skipped" in told_of_data(config, skipped)[-1]
    assert cut.train.fingerprint != skipped.train.fingerprint
    with pytest.raises(ValueError, match=r"data=chat has no conversation to train on"):
        open_data(replace(config, too_long="skip"), 4, 300)


def test_other_tokens_and_other_templates_are_other_data(tmp_path, told):
    config = chat(tmp_path, rows_of(told))
    with pytest.raises(ValueError, match=r"the tokens of data=chat go up to \d+, but model.vocab_size=200"):
        open_data(config, 64, 200)
    before = open_data(config, 64, 300).train.fingerprint
    (tmp_path / "other.jinja").write_text(CHATML.source.replace("<|im_end|>", "<|im_end|> "))
    assert open_data(replace(config, template=str(tmp_path / "other.jinja")), 64, 300).train.fingerprint != before
    assert open_data(config, 64, 300).train.fingerprint == before


def test_its_cache_as_tokens_keeps_what_is_learned(tmp_path, told):
    """Windows of the stream, each label one that is learned."""
    data = open_data(chat(tmp_path, rows_of(told)), 64, 300)
    (folder,) = (path for path in (tmp_path / "cache").iterdir() if path.is_dir())
    whole = open_data(Tokens(files=str(folder), holdout=0.0, mask_documents=True), 64, 300).train
    labels = np.concatenate([whole.sample(n).labels for n in range(whole.samples)])
    learned = data.train.streams[0].stream.learned[1 : len(labels) + 1]
    assert 0.1 < (labels != IGNORE).mean() == learned.mean() < 0.9


SETTINGS = (
    "model.vocab_size=300", "batch.seq_len=60", "batch.global_size=8", "batch.micro_size=2", "steps=6", "eval.every=3",
    "eval.batches=1", "checkpoint.every=3",
)  # fmt: skip


@pytest.fixture(scope="module")
def config(tmp_path_factory, told) -> TrainConfig:
    folder = tmp_path_factory.mktemp("chat-runs")
    return replace(small_config(folder, *SETTINGS), data=chat(folder, rows_of(told), holdout=0.2))


LAYOUTS = {
    "zero 3": (2, {"zero": 3}),
    "zb_h1": (2, {"pipeline": 2, "pipeline_schedule": "zb_h1"}),
    "ring": (2, {"ring": 2, "ring_order": "zigzag"}),
}


def test_conversations_are_the_same_on_every_layout(ranks, config):
    """Law 2, with unequal numbers of learned tokens on ranks and in micro-batches."""
    runs = {name: with_layout(config, world, **degrees) for name, (world, degrees) in LAYOUTS.items()}
    reference = run_plain(with_layout(config, 1))
    assert len(set(reference.valid_tokens)) > 1 and reference.norms[0] > 0
    for traces in run_together(ranks, runs).values():
        assert_all_same(traces, reference)


@pytest.fixture(scope="module")
def replay(config, tmp_path_factory) -> TrainConfig:
    """Conversations, and old text of the same tokenizer, whose samples are one document each."""
    folder, own = tmp_path_factory.mktemp("old"), config.data
    for n in range(12):
        (folder / f"{n}.txt").write_text(f"{n} What is it? Paris, of course; thank you, é 🙂.\n" * 30)
    text = Text(files=str(folder), tokenizer=own.tokenizer, cache_dir=own.cache_dir, holdout=0.2)
    return replace(config, steps=3, data=Mixture(sources=[Part(text, 1.0, "old"), Part(own, 2.0)]))


def test_conversations_beside_old_text_are_the_same_on_every_layout(ranks, replay, tmp_path):
    """Law 2 of a replay: of the one every token is learned, of the other what the assistant says; and the loss of each is told."""
    run = with_layout(replay, 2, zero=3, ring=2, ring_order="zigzag")
    reference = run_plain(with_layout(replay, 1))
    (traces,) = run_together(ranks, {"ring": run}).values()
    assert_all_same(traces, reference)
    data = open_data(replay.data, 60, 300)
    assert isinstance(data.tokenizer, ChatTokenizer)
    first = data.train.drawn(0, 8, f"train/{replay.seed}")
    of_text = [(data.train.sample(int(n)).labels != IGNORE).all() for n in first]
    assert of_text == (data.train.source_of(first) == 0).tolist() and 0 < sum(of_text) < 8
    assert reference.valid_tokens[0] < 8 * 60
    ranks.run(run_train, 2, saved := named(run, tmp_path, "replay"))
    record = read_metrics(Path(saved.run_dir))[-1]
    assert record["loss_by_source"].keys() == record["eval_loss_by_source"].keys() == {"old", "chat"}
    own = tokenizer_of_run(read_manifest(complete_checkpoints(Path(saved.run_dir) / "checkpoints")[0]), None)
    assert isinstance(own.tokenizer, ChatTokenizer)


def test_a_run_goes_on_to_the_last_bit_and_on_another_layout(ranks, config, tmp_path):
    """Law 3."""
    two = with_layout(config, 2, zero=2)
    assert_resumes_to_the_last_bit(ranks, 2, two, tmp_path, stop_at=4)
    moved = named(two, tmp_path, "moved")
    ranks.run(run_until, 2, moved, 4)
    ranks.run(run_train, 1, named(with_layout(config, 1), tmp_path, "moved"))
    assert_same_run(str(tmp_path / "moved"), str(tmp_path / "whole"))
