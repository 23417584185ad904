"""Mixtures: what is read, on every layout and after every resume, and the loss of each source. (Laws 2, 3.)"""

import functools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer as Library
from tokenizers import models

from parity import (
    VOCABULARY,
    assert_every_layout,
    global_batch,
    in_micro_batches,
    plain_model,
    small_config,
    with_layout,
    write_tokens,
)
from rowwise.launch.compose import compose_tree
from rowwise.trainer.config import TrainConfig, config_from_tree, tree_of
from rowwise.trainer.data.config import Change, Mixture, Part, Stdlib, Text, Tokens
from rowwise.trainer.data.mixture import require_enough, sources_in_words
from rowwise.trainer.data.open import open_data
from rowwise.trainer.data.tokenizer import byte_alphabet
from rowwise.trainer.export import of_one_tokenizer
from rowwise.trainer.metrics import read_metrics
from rowwise.trainer.prepare import prepare
from runs import assert_same_run, named, run_train, run_until

# Steps of 24 samples of 13 tokens: weights move from the 2nd to the 3rd step, and the shortest source ends in the first.
STEP = 24 * 13


def sources(folder: Path) -> list[Part]:
    """Documents apart in one source and not in another, of other lengths, and a few tokens of a third."""
    found = []
    for label, weight, tokens in (("long", 5.0, 3000), ("other", 3.0, 2000), ("few", 2.0, 100)):
        (folder / label).mkdir(exist_ok=True)
        path = write_tokens(folder / label, tokens)
        if label == "other":
            np.flip(np.fromfile(path, np.uint16)).tofile(path)
        data = Tokens(files=str(path), separator=0, mask_documents=label != "other", holdout=0.1 * (label != "few"))
        found.append(Part(data, weight, label))
    return found


def mixed_config(folder: Path, *overrides: str, when_short: str = "repeat") -> TrainConfig:
    changes = [Change(f"{STEP} tokens", {"long": 1.0, "few": 0.5}, 2.0, f"{STEP} tokens")]
    return replace(small_config(folder, *overrides), data=Mixture("mixture", sources(folder), 1.0, changes, when_short))


WIDTHS = ("model.layers=4", "model.dim=32", "model.heads=4", "model.kv_heads=2", "batch.micro_size=4")
LAYOUTS = {
    "one, in micro-batches": (1, {}),
    "split": (2, {"zero": 3}),
    "ring x ulysses": (4, {"zero": 3, "ring": 2, "ulysses": 2, "ring_order": "zigzag"}),
    "split backward": (4, {"pipeline": 2, "pipeline_schedule": "zb_v", "virtual_stages": 2, "zero": 1}),
}


def test_every_layout_reads_and_learns_the_same(ranks, tmp_path, full):
    config = mixed_config(tmp_path, *WIDTHS)
    some = LAYOUTS if full else {name: LAYOUTS[name] for name in ("ring x ulysses",)}
    configs = {name: with_layout(config, world, **degrees) for name, (world, degrees) in some.items()}
    assert_every_layout(ranks, config, configs)


def test_records_say_the_loss_of_each_source_on_every_layout_and_after_every_resume(ranks, tmp_path, full):
    words = ("steps=4", "eval.every=2", "eval.batches=2", "checkpoint.every=2", "checkpoint.keep=9", "report=never")
    config = mixed_config(tmp_path, *words, *WIDTHS)
    runs = {
        name: named(with_layout(config, world, **layout), tmp_path, name) for name, (world, layout) in LAYOUTS.items()
    }
    ranks.run(run_train, 1, in_micro_batches(runs["one, in micro-batches"], 2))
    others = ["split backward", "ring x ulysses"][: 1 + full]
    for name in others:
        ranks.run(run_until, 4, runs[name], 3)  # in the middle of everything
        ranks.run(run_train, 1, named(in_micro_batches(with_layout(config, 1), 1), tmp_path, name))
    one = runs["one, in micro-batches"].run_dir
    expected = [(r["loss_by_source"], r.get("eval_loss_by_source", {})) for r in read_metrics(Path(one))]
    assert [set(losses) for losses, _ in expected] == [{"long", "other", "few"}] * 4
    assert [set(held) for _, held in expected] == 2 * [set(), {"long", "other"}]
    for name in others:
        assert_same_run(runs[name].run_dir, one)
        for record, (losses, held) in zip(read_metrics(Path(runs[name].run_dir)), expected, strict=True):
            assert record["loss_by_source"] == pytest.approx(losses, rel=1e-9)
            assert record.get("eval_loss_by_source", {}) == pytest.approx(held, rel=1e-9)
    assert expected[0][0] == pytest.approx(losses_of_first_step(config), rel=1e-9)


def losses_of_first_step(config: TrainConfig) -> dict[str, float]:
    """As a textbook would: every sequence by itself."""
    data = open_data(config.data, config.batch.seq_len, config.model.vocab_size)
    indices = data.train.drawn(0, config.batch.global_size, f"train/{config.seed}")
    batch = global_batch(config, data, 0)
    logits = plain_model(config)(batch.inputs, batch.positions, batch.documents).detach()
    each = F.cross_entropy(logits.transpose(1, 2), batch.labels, reduction="none")
    found, begin = {}, 0
    for label, corpus in zip(data.train.labels, data.train.corpora, strict=True):
        its = torch.from_numpy((indices >= begin) & (indices < begin + corpus.samples))
        found[label] = (each[its].sum() / (batch.labels[its] >= 0).sum()).item()
        begin += corpus.samples
    return found


@pytest.mark.parametrize(
    "words",
    [("parallel.backend=torch", "optim.in_backward=true", "clip_norm=0", "batch.micro_size=24"),
     ("parallel.pipeline=1", "precision=fp32", "memory.fused_loss=true")],
    ids=["in the backward", "fused"],
)  # fmt: skip
def test_other_forms_of_the_step_say_the_same_of_sources(ranks, tmp_path, words):
    config = mixed_config(tmp_path, *words, "steps=2", "report=never")
    ranks.run(run_train, 1, with_layout(config, 1))
    (first, _) = read_metrics(Path(config.run_dir))
    assert first["loss_by_source"] == pytest.approx(losses_of_first_step(config), rel=1e-5)


def test_a_source_by_itself_is_read_in_its_own_order(tmp_path):
    config = mixed_config(tmp_path)
    data = open_data(config.data, 13, VOCABULARY)
    alone = open_data(config.data.sources[0].data, 13, VOCABULARY).train
    drawn = data.train.drawn(0, 2000, "train/0")
    its = drawn[data.train.source_of(drawn) == 0]
    assert np.array_equal(its, alone.drawn(0, len(its), "train/0"))
    assert len(its) > 2 * alone.samples  # into its third epoch
    assert np.array_equal(np.concatenate([data.train.drawn(k, 1, "train/0") for k in range(300, 420)]), drawn[300:420])
    for index in drawn[:50]:
        source = int(data.train.source_of(np.array([index]))[0])
        masked = bool(data.train.sample(int(index)).documents.any())
        assert not masked or source != 1  # its documents are not kept apart


def test_what_is_held_out_comes_once(tmp_path):
    holdout = open_data(mixed_config(tmp_path).data, 13, VOCABULARY).holdout
    drawn = holdout.drawn(0, holdout.samples, "holdout")
    assert sorted(drawn) == list(range(holdout.samples))
    assert [corpus.samples > 0 for corpus in holdout.corpora] == [True, True, False]


def test_a_source_that_ends(tmp_path):
    configs = {kind: mixed_config(tmp_path, when_short=kind) for kind in ("repeat", "stop", "refuse")}
    corpora = {kind: open_data(config.data, 13, VOCABULARY).train for kind, config in configs.items()}
    few = corpora["stop"].corpora[2].samples
    assert corpora["repeat"].counts(300, "train/0")[2] > few == corpora["stop"].counts(300, "train/0")[2]
    assert "few: 7 samples of the run" in sources_in_words(corpora["stop"], 300, 0)[2]
    for kind, corpus in corpora.items():
        require = functools.partial(require_enough, configs[kind].data, corpus, seed=0)
        if kind == "repeat":
            require(10**9)
        elif kind == "stop":
            require(corpus.samples)
            with pytest.raises(
                ValueError, match=r"when_short=stop: the sources have \d+ samples in all, and the run reads"
            ):
                require(corpus.samples + 1)
        else:
            require(30)
            with pytest.raises(
                ValueError, match=r"the run reads \d+ samples of other, which has 138; give it less weight"
            ):
                require(300)


def test_runs_that_have_the_order_go_on_and_others_are_refused(ranks, tmp_path):
    config = with_layout(mixed_config(tmp_path, "steps=2", "checkpoint.every=1", "report=never"), 1)
    ranks.run(run_train, 1, config)
    longer = replace(config, steps=3)
    prepare(longer, 1)
    weights = [replace(part, weight=part.weight + 1) for part in config.data.sources]
    with pytest.raises(ValueError, match=r"read other data: the data=.* there and .* here"):
        prepare(replace(longer, data=replace(config.data, sources=weights)), 1)
    with pytest.raises(ValueError, match=r"read other data: data.temperature=1.0 there and 3.0 here"):
        prepare(replace(longer, data=replace(config.data, temperature=3.0)), 1)


def composed(*words: str) -> TrainConfig:
    return config_from_tree(compose_tree(["data=mixture", *words]))


def test_sources_are_written_as_lists_of_keys_and_read_back():
    said = "data.sources=[{name: text, files: wiki, weight: 3}, {name: stdlib, weight: 1, label: code}]"
    config = composed(
        said, "steps=50", "data.changes=[{at: 80%, weights: {code: 9}, over: 5}, {at: 1e6 tokens, temperature: 2}]"
    )
    assert config.data.sources == [Part(Text(files="wiki"), 3.0), Part(Stdlib(), 1.0, "code")]
    assert config.data.changes == [
        Change(f"{40 * 4096} tokens", {"code": 9.0}, None, f"{5 * 4096} tokens"), Change("1e6 tokens", {}, 2.0)
    ]  # fmt: skip
    assert config_from_tree(tree_of(config)) == config
    assert of_one_tokenizer(tree_of(config)["data"])["files"] == "wiki"
    with pytest.raises(ValueError, match=r"unknown key data.sources\[0\].data.fils: .* did you mean .*files"):
        composed("data.sources=[{name: text, fils: wiki}]")
    with pytest.raises(ValueError, match=r"data.sources.0.data.name='csv': possible are .*'tokens'"):
        composed("data.sources=[{name: csv}]")
    with pytest.raises(
        ValueError, match=r"data.changes.at=80% with epochs: a share of a run of steps or tokens; give tokens"
    ):
        composed(said, "epochs=1", "data.changes=[{at: 80%, temperature: 2}]")


WRONG = {
    "none": ("data.sources=[]", r"data.sources is empty; give a list of sources"),
    "two of a name": ("data.sources=[{name: stdlib}, {name: stdlib}]", r"several are called 'stdlib'; give each a label"),
    "half weighed": (
        "data.sources=[{name: stdlib, weight: 1}, {name: text}]",
        r"text has no weight, and others have one; give each a weight, or none",
    ),
    "nothing": ("data.sources=[{name: stdlib, weight: 0}]", r"weights \[0.0\] are at least 0, and one of them above"),
    "who": (
        "data.sources=[{name: stdlib, weight: 1}] data.changes=[{at: 5, weights: {wiki: 1}}]",
        r"no source is called 'wiki'; they are stdlib",
    ),
    "cold": ("data.sources=[{name: stdlib}] data.temperature=0", r"data.temperature=0.0: it is above 0"),
    "a source's own": ("data.sources=[{name: text, files: /nowhere}]", r"data.sources, text: data.files: /nowhere names no file"),
    "by size": (
        "data.sources=[{name: stdlib}] data.changes=[{at: 5, weights: {}}] data.temperature=-1",
        r"data.temperature=-1.0: it is above 0",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_mixtures_that_say_nothing_are_refused(name):
    words, says = WRONG[name]
    parts = [f"data.{word}" for word in words.removeprefix("data.").split(" data.")]
    with pytest.raises(ValueError, match=says):
        open_data(composed(*parts).data, 64, 300)


def test_changes_in_the_wrong_order_and_other_tokenizers_are_refused(tmp_path):
    config = mixed_config(tmp_path).data
    changes = [Change("500 tokens", {}, 2.0, "300 tokens"), Change("600 tokens", {}, 1.0)]
    with pytest.raises(ValueError, match=r"the one at 600 tokens begins before the one before it is over"):
        open_data(replace(config, changes=changes), 13, VOCABULARY)
    bare = Part(Tokens(files=str(tmp_path / "few" / "tokens.bin"), dtype="int64"), 1.0)
    with pytest.raises(
        ValueError, match=r"data.sources, tokens: the tokens of data=tokens go up to \d+, but model.vocab_size=61"
    ):
        open_data(replace(config, sources=[*config.sources, bare]), 13, VOCABULARY)
    (tmp_path / "a.txt").write_text("a few words " * 40)
    library = Library(models.BPE(vocab=byte_alphabet(), merges=[]))
    library.save(str(tmp_path / "tokenizer.json"))
    texts = [Text(files=str(tmp_path / "a.txt"), cache_dir=str(tmp_path), tokenizer=one, holdout=0)
             for one in ("bytes", str(tmp_path / "tokenizer.json"))]  # fmt: skip
    parts = [Part(text, 1.0, label) for text, label in zip(texts, ("raw", "made"), strict=True)]
    with pytest.raises(ValueError, match=r"raw and made have tokenizers that differ, .* give each the same tokenizer"):
        open_data(Mixture(sources=parts), 13, 300)
