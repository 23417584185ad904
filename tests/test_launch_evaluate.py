"""`rowwise evaluate`: a run's checkpoints on the text that it held out, and on others."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_launch_export_forms import random_weights, saved_run

from parity import TOLERANCE, small_config, with_layout
from rowwise.launch.evaluate import EvaluateConfig, Row, evaluate, main
from rowwise.launch.runs import open_run
from rowwise.trainer.config import TrainConfig
from rowwise.trainer.data.config import Text
from rowwise.trainer.data.tokenizer import ByteTokenizer, FileTokenizer
from rowwise.trainer.metrics import read_metrics
from rowwise.trainer.models.decoder import Decoder, ModelConfig
from runs import run_train

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # the tests' own saving

BYTES = ModelConfig(layers=1, dim=16, heads=2, kv_heads=1, ffn_dim=24, vocab_size=300)
TEXT = "Rows are split, rows are summed; é — 行: no rank ever holds the whole of a weight.\n"
RUNS = {
    "stages": ([], {"pipeline": 2}),
    "ZeRO 3": (["model.tie_embeddings=true"], {"zero": 3}),
    "a ring": (["model.stable_embedding=true"], {"ring": 2}),
    "n:m": (["sparsity=nm", "model.dim=32", "model.ffn_dim=48", "model.heads=4"], {"zero": 2}),
    "cooled": (["sparsity=pdp", "sparsity.density=0.5"], {"zero": 1}),
}


@pytest.mark.parametrize("case", RUNS)
def test_the_loss_is_the_recorded_one(ranks, tmp_path, case):
    """In float64, of every checkpoint, whatever layout evaluated itself."""
    words, degrees = RUNS[case]
    more = [
        "steps=2",
        "eval.every=1",
        "eval.batches=1",
        "checkpoint.every=1",
        "checkpoint.keep=0",
        "batch.global_size=8",
    ]
    config = with_layout(small_config(tmp_path, *more, *words), 2, **degrees)
    ranks.run(run_train, 2, config)
    rows = evaluate(EvaluateConfig(run=config.run_dir, steps="all"))
    recorded = [record["eval_loss"] for record in read_metrics(Path(config.run_dir))]
    assert [row.step for row in rows] == [1, 2] and len(set(recorded)) == 2
    np.testing.assert_allclose([row.loss for row in rows], recorded, rtol=TOLERANCE)
    assert [row.recorded_loss for row in rows] == recorded
    for row in rows:
        assert row.perplexity == pytest.approx(math.exp(row.loss)) and row.bits_per_byte is None


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_loss_of_one_process_is_recorded_to_the_last_bit(ranks, tmp_path, precision):
    """The whole model computes as the run did, which in bf16 held a copy in float32."""
    config = small_config(tmp_path, f"precision={precision}", "steps=2", "eval.every=1", "eval.batches=1")
    ranks.run(run_train, 1, with_layout(config, 1))
    (row,) = evaluate(EvaluateConfig(run=config.run_dir))
    assert row.loss == row.recorded_loss == read_metrics(Path(config.run_dir))[1]["eval_loss"]


@pytest.fixture(scope="module")
def file_tokenizer(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer_json(path)
    return path


def tokenizer_json(path: Path, normalizer=None, decoder=None, prefix: bool = False, alphabet: bool = True) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    tokenizer.decoder = decoder or decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet() if alphabet else []
    trainer = trainers.BpeTrainer(
        vocab_size=290, special_tokens=["<|end|>"], initial_alphabet=letters, show_progress=False
    )
    tokenizer.train_from_iterator([TEXT * 20], trainer)
    tokenizer.add_tokens(["weights and more"])
    tokenizer.save(str(path))


def test_tokens_stand_for_the_bytes_of_their_text(file_tokenizer):
    tokenizer = FileTokenizer(file_tokenizer, "<|end|>")
    for text in (TEXT, "🙂 \x00\t weights and more  rows", "plain"):
        for one in (tokenizer, ByteTokenizer()):
            sizes = one.text_bytes()
            assert sum(sizes[token] for token in one.encode([text.encode()])[0]) == len(text.encode())
    assert tokenizer.text_bytes()[tokenizer.end[0]] == 0


@pytest.mark.parametrize("what", ["lower case", "a space in front", "another decoder", "not every byte"])
def test_where_tokens_do_not_say_their_bytes_none_are_counted(tmp_path, what):
    from tokenizers import decoders, normalizers

    tokenizer_json(
        tmp_path / "tokenizer.json",
        normalizers.Lowercase() if what == "lower case" else None,
        decoders.Metaspace() if what == "another decoder" else None,
        prefix=what == "a space in front",
        alphabet=what != "not every byte",
    )
    with pytest.raises(ValueError, match="no token alone says how many bytes"):
        FileTokenizer(tmp_path / "tokenizer.json", None).text_bytes()


@pytest.fixture(scope="module")
def text_run(ranks, tmp_path_factory, file_tokenizer) -> TrainConfig:
    """A run over text with a tokenizer.json and a token that ends a document, in float64; each of two steps saved."""
    folder = tmp_path_factory.mktemp("text")
    (folder / "texts").mkdir()
    for n in range(12):
        (folder / "texts" / f"{n}.txt").write_text(TEXT * (n + 1))
    words = ["model.vocab_size=300", "steps=2", "checkpoint.every=1", "batch.global_size=4", "eval.every=1"]
    data = Text(files=[str(folder / "texts")], tokenizer=str(file_tokenizer), end_of_text="<|end|>", holdout=0.3)
    config = with_layout(replace(small_config(folder, *words), data=data), 2, zero=3)
    ranks.run(run_train, 2, config)
    return config


def plain_figures(model: Decoder, documents: list[str], tokenizer: FileTokenizer, seq_len: int) -> tuple[float, float]:
    """(nats a token, bits a byte), window by window."""
    stream = [token for text in documents for token in (*tokenizer.encode([text.encode()])[0], tokenizer.end[0])]
    nats, text_nats, text = [], [], b""
    for start in range(0, (len(stream) - 1) // seq_len * seq_len, seq_len):
        window = torch.tensor([stream[start : start + seq_len + 1]])
        logits = model(window[:, :-1], torch.arange(seq_len)[None])
        losses = F.cross_entropy(logits[0], window[0, 1:], reduction="none").tolist()
        nats += losses
        labels = window[0, 1:].tolist()
        text_nats += [loss for loss, label in zip(losses, labels, strict=True) if label != tokenizer.end[0]]
        spelt = "".join(tokenizer._library.id_to_token(label) for label in labels if label != tokenizer.end[0])
        text += spelt.replace("weights and more", "w" * 16).encode("utf-32-le")[::4]  # a character a byte
    return sum(nats) / len(nats), sum(text_nats) / math.log(2) / len(text)


def test_another_text_has_the_figures_of_a_plain_loop(text_run, tmp_path, file_tokenizer, capsys):
    """All of it, with the run's own tokenizer and end of a document; bits are of bytes, which marks have none of."""
    documents = [TEXT * 3, "weights and more" + TEXT, "short", TEXT * 2]
    for n, text in enumerate(documents):
        (tmp_path / f"{n}.txt").write_text(text)
    to = tmp_path / "table.json"
    words = ["data=text", f"data.files={tmp_path}", "seq_len=11", "micro_size=3", f"to={to}"]
    assert main([f"run={text_run.run_dir}", "steps=1,2", *words]) == 0
    told, table = capsys.readouterr().out.splitlines(), json.loads(to.read_text())
    assert table["data"]["tokenizer"] == str(file_tokenizer) and table["data"]["end_of_text"] == "<|end|>"
    for row, line in zip(table["checkpoints"], told[2:4], strict=True):
        model = open_run(text_run.run_dir).model(row["step"], "cpu")
        loss, bits = plain_figures(model, documents, FileTokenizer(file_tokenizer, "<|end|>"), 11)
        np.testing.assert_allclose([row["loss"], row["bits_per_byte"]], [loss, bits], rtol=TOLERANCE)
        assert row["recorded_loss"] is None
        assert line.split() == [str(row["step"]), f"{loss:.6f}", f"{math.exp(loss):,.4g}", f"{bits:.6f}", "-"]
    assert table["tokens"] == 11 * table["samples"] and 0 < table["text_bytes"] <= sum(
        len(d.encode()) for d in documents
    )


def test_a_share_of_another_text_is_what_a_run_would_hold_out(text_run, capsys):
    """The run's own files, named again, with its own share."""
    own = evaluate(EvaluateConfig(run=text_run.run_dir, batches="all"))
    files = [f"data.files={text_run.data.files[0]}", "data.holdout=0.3"]
    assert evaluate(EvaluateConfig(run=text_run.run_dir), files) == own
    told = capsys.readouterr().out
    assert told.count("data=text, held out: ") == 2
    assert own[0].bits_per_byte > 0 and own[0].recorded_loss is None
    with_records = evaluate(EvaluateConfig(run=text_run.run_dir))
    assert with_records[0].recorded_loss == pytest.approx(with_records[0].loss, rel=TOLERANCE)


def test_all_of_a_corpus_folder_is_both_of_its_splits(text_run, tmp_path, capsys):
    data = replace(text_run.data, cache_dir=str(tmp_path))
    words = [f"data.files={data.files[0]}", f"data.cache_dir={tmp_path}"]
    whole = evaluate(EvaluateConfig(run=text_run.run_dir), words)
    (tmp_path / "x").mkdir()
    words = [*words[:1], f"data.cache_dir={tmp_path / 'x'}", "data.holdout=0.3"]
    held = evaluate(EvaluateConfig(run=text_run.run_dir), words)
    (folder,) = (path.parent for path in (tmp_path / "x").rglob("meta.json"))
    capsys.readouterr()
    both = evaluate(EvaluateConfig(run=text_run.run_dir), ["data=tokens", f"data.files={folder}"])
    told = capsys.readouterr().out
    assert "no bits per byte: files of tokens do not say" in told
    assert both[0].loss != held[0].loss and both[0].loss == pytest.approx(whole[0].loss, rel=0.05)


def test_damage_is_named_and_passed_over(text_run, tmp_path, capsys):
    run = Path(shutil.copytree(text_run.run_dir, tmp_path / "run"))
    newest = run / "checkpoints" / "step-00000002"
    (newest / "__0_0.distcp").write_bytes(b"")
    assert [row.step for row in evaluate(EvaluateConfig(run=str(run), steps="all"))] == [1]
    assert capsys.readouterr().err.startswith(f"{newest} is damaged: __0_0.distcp has 0 bytes")
    assert main([f"run={run}", "steps=1,2"]) == 2
    assert capsys.readouterr().err.startswith(f"refused: {newest} is damaged")


def test_a_loss_that_is_no_number_is_said_to_be(tmp_path, capsys):
    weights = random_weights(BYTES)
    weights["norm.weight"][0] = torch.nan
    (tmp_path / "text.txt").write_text(TEXT)
    run = saved_run(tmp_path, BYTES, weights)
    assert main([f"run={run}", "data=text", f"data.files={tmp_path / 'text.txt'}", f"to={tmp_path / 'a.json'}"]) == 1
    told = capsys.readouterr()
    assert told.err == "failed: the loss of step 1 is not a number\n"
    assert json.loads((tmp_path / "a.json").read_text())["checkpoints"] == [Row(1, None, None, None, None).__dict__]


def test_data_that_has_changed_since_is_said_to_have(ranks, tmp_path, capsys):
    for n in range(12):
        (tmp_path / f"{n}.txt").write_text(f"{n} {TEXT * 3}")
    words = ["model.vocab_size=256", "steps=1", "batch.global_size=4", "eval.every=1"]
    config = with_layout(replace(small_config(tmp_path, *words), data=Text(files=[str(tmp_path)], holdout=0.3)), 1)
    ranks.run(run_train, 1, config)
    (tmp_path / "12.txt").write_text(TEXT * 20)
    assert evaluate(EvaluateConfig(run=config.run_dir))[0].recorded_loss is None
    assert "the data has changed since the run read it" in capsys.readouterr().out


def test_refusals_say_what_was_given_and_what_is_possible(text_run, tmp_path, capsys):
    run, files = f"run={text_run.run_dir}", f"data.files={tmp_path / 'text.txt'}"
    (tmp_path / "text.txt").write_text(TEXT)
    np.arange(400, dtype=np.uint16).tofile(tmp_path / "other.bin")
    bare = f"run={saved_run(tmp_path, replace(BYTES, vocab_size=61), random_weights(replace(BYTES, vocab_size=61)))}"
    for settings, parts in {
        ("steps=1",): ["run= is missing; give run=runs/NAME"],
        (run, "step=1"): ["unknown key step", "did you mean steps?", "data"],
        (run, "steps=7"): ["steps=7: not one of run=", "possible are step-00000002, step-00000001"],
        (run, "steps=1,7"): ["steps=7: not one of run="],
        (run, "steps=last"): ["steps=last: give steps with commas between, such as 10,20, or all"],
        (run, "seq_len=0"): ["seq_len=0", "give at least 1"],
        (run, "batches=few"): ["batches=few"],
        (run, "device=tpu"): ["device=tpu: possible are cpu"],
        (run, "to=table.txt"): ["to=table.txt", ".json"],
        (run, "to=/nowhere/table.json"): ["to=/nowhere/table.json", "a folder that is there"],
        (run, "data=test"): ["test"],
        (run, "data=text", "data.file=x"): ["unknown key data.file", "did you mean data.files?"],
        (run, "data=text", "data.files=/nowhere"): ["data.files: /nowhere names no file"],
        (run, "data=text", files, "data.holdout=much"): ["data.holdout=much", "number"],
        (run, "data=text", "data.files=3"): ["data.files=3: give text"],
        (run, "data=text", files, "seq_len=5000"): ["has 44 tokens", "a smaller seq_len"],
        (run, "data=text", files, "data.tokenizer=bytes"): ["data.tokenizer=bytes is not the tokenizer of this run"],
        (run, "data=tokens", f"data.files={tmp_path / 'other.bin'}"): ["go up to 399", "vocab_size is 300"],
        (run + "x",): ["there is no checkpoint"],
        (bare, "seq_len=5000"): ["data.holdout=0.1 holds out no sample of 5000 tokens", "a smaller seq_len"],
    }.items():  # fmt: skip
        assert main(list(settings)) == 2, settings
        refusal = capsys.readouterr().err
        assert refusal.startswith("refused: ") and refusal.count("\n") == 1, refusal
        assert all(part in refusal for part in parts), (parts, refusal)
