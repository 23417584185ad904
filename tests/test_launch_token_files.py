"""`rowwise tokenize`: files of tokens, the same by any number of processes, whole or not there."""

import json
import os
import signal

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from rowwise.launch import token_files
from rowwise.launch.token_files import TokenizeConfig, tokenize
from rowwise.trainer.data import many
from rowwise.trainer.data.config import Text, Tokens
from rowwise.trainer.data.open import open_data


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two files of text, rows of another, and a tokenizer that has no token for some characters."""
    folder = tmp_path_factory.mktemp("text")
    (folder / "wiki").mkdir()
    lines = [f"line {number}: {'words ' * (number % 7)}and an end, é or not\n" for number in range(30_000)]
    (folder / "wiki" / "long.txt").write_text("".join(lines))
    (folder / "wiki" / "short.txt").write_text("a short one, with a € in it")  # two h and the € have no token
    rows = [json.dumps({"text": f"row {number} " * (1 + number % 9)}) for number in range(500)]
    (folder / "rows.jsonl").write_text("\n".join(rows))
    library = Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.Split("\n", "isolated")
    library.train_from_iterator(
        lines[:3000], trainers.BpeTrainer(vocab_size=400, special_tokens=["<end>"], show_progress=False)
    )
    library.save(str(folder / "tokenizer.json"))
    return folder


def words(folder, *more):
    return ["data=text", f"data.files={folder}/wiki", f"data.tokenizer={folder}/tokenizer.json", "data.end_of_text=<end>",
            "data.holdout=0.1", *more]  # fmt: skip


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_many_processes_write_what_a_run_reads(folder, tmp_path):
    for nproc in (1, 2):
        (told,) = tokenize(TokenizeConfig(str(tmp_path / f"by-{nproc}"), nproc), words(folder))
    assert contents(tmp_path / "by-2") == contents(tmp_path / "by-1")
    source = Text(files=str(folder / "wiki"), tokenizer=str(folder / "tokenizer.json"), end_of_text="<end>", holdout=0.1,
                  cache_dir=str(tmp_path / "cache"))  # fmt: skip
    text, tokens = open_data(source, 32, 500), open_data(Tokens(files=str(tmp_path / "by-2")), 32, 500)
    for ours, theirs in ((tokens.train, text.train), (tokens.holdout, text.holdout)):
        assert np.array_equal(ours.streams[0].tokens, theirs.streams[0].tokens)
        assert np.array_equal(ours.streams[0].documents, theirs.streams[0].documents)
        assert ours.samples > 100
    assert told == (
        f"{tmp_path}/by-2: {tokens.tokens:,} tokens of 2 files, {tokens.holdout.tokens:,} of them held out, uint16, of a vocabulary "
        f"of {tokens.vocab_size}; 3 characters have no token and are left out"
    )


def test_a_mixture_has_a_folder_for_each_source(folder, tmp_path):
    sources = (
        f"data.sources=[{{name: text, files: {folder}/wiki, label: wiki}}, {{name: hf, files: {folder}/rows.jsonl}}]"
    )
    told = tokenize(TokenizeConfig(str(tmp_path / "both"), 1), ["data=mixture", sources])
    assert [line.partition(":")[0] for line in told] == [f"{tmp_path}/both/wiki", f"{tmp_path}/both/hf"]
    each = [open_data(Tokens(files=str(tmp_path / "both" / label)), 32, 256) for label in ("wiki", "hf")]
    assert [len(data.train.streams[0].documents) > 1 for data in each] == [True, True]


def test_what_is_refused_leaves_nothing(folder, tmp_path, capsys, monkeypatch):
    (tmp_path / "bad.jsonl").write_bytes(b'{"text": "good"}\n' * 4000 + b'{"text": "b\xe9d"}\n')
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").touch()
    to = f"to={tmp_path}/made"
    refused = {
        "data=hf": (["data=hf", f"data.files={tmp_path}/bad.jsonl", to, "nproc=2"], "bad.jsonl, line 4001: not UTF-8"),
        "text": ([*words(folder), "data.end_of_text=<stop>", to], "has no such token"),
        "tokens": (["data=tokens", "data.files=x", to], "data=tokens holds tokens already; give a text"),
        "full": ([*words(folder), f"to={tmp_path}/full"], "exists and is not empty"),
        "nproc": ([*words(folder), to, "nproc=0"], "nproc=0: 1 to 1024 processes"),
        "label": (
            ["data=mixture", f"data.sources=[{{name: text, files: {folder}/wiki, label: ..}}]", to],
            "the label '..' is the name of a folder here",
        ),
        "key": ([*words(folder), to, "dat.files=x"], "dat.files"),
        "holdout": ([*words(folder), to, "data.holdout=1"], "a share from 0 to below 1"),
    }
    monkeypatch.setattr(token_files.os, "environ", dict(os.environ))
    for arguments, says in refused.values():
        assert token_files.main(arguments) == 2
        assert says in capsys.readouterr().err
    assert not (tmp_path / "made").exists()
    assert not (tmp_path / "made.incomplete").exists()


def ended(texts):
    """A worker that the system ends."""
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_worker_that_was_ended_is_said_to_be(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(many, "_make", ended)
    with pytest.raises(
        ValueError, match="a worker was ended from outside, perhaps for want of memory; give a smaller nproc"
    ):
        tokenize(TokenizeConfig(str(tmp_path / "made"), 2), words(folder))
    assert list(tmp_path.iterdir()) == []
