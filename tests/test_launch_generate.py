"""`rowwise generate`: text from a run's model, whole on one process."""

import io
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_launch_export_forms import random_weights, saved_run
from test_trainer_models_decoder import CASES

from parity import small_config, with_layout
from rowwise.kernels.attention import causal_attention
from rowwise.launch import generate as generating
from rowwise.launch.api import train
from rowwise.launch.export import main as export
from rowwise.launch.generate import main
from rowwise.launch.runs import open_run
from rowwise.launch.talk import harmless
from rowwise.parallel.precision import DTYPES
from rowwise.trainer import generate as writing
from rowwise.trainer.config import TrainConfig
from rowwise.trainer.data.config import Text
from rowwise.trainer.data.tokenizer import ByteTokenizer, FileTokenizer
from rowwise.trainer.files import fingerprint
from rowwise.trainer.generate import Writer, pieces
from rowwise.trainer.models.decoder import Decoder, ModelConfig
from rowwise.trainer.sample import Sampling, shares
from runs import run_train

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # the tests' own saving

GREEDY = Sampling(temperature=0)
TEXT = "Rows are split, rows are summed; no rank ever holds the whole of a weight.\n" * 40
BYTES = ModelConfig(layers=2, dim=32, heads=2, kv_heads=1, ffn_dim=40, vocab_size=259)


def writer_of(config: ModelConfig, context: int, end_token: int | None = None) -> Writer:
    torch.manual_seed(3)
    model = Decoder(config).double().requires_grad_(False)
    for p in model.parameters():
        p.copy_(torch.randn_like(p) / 4)
    return Writer(model, ByteTokenizer(), context, end_token)


def plain_logits(model: Decoder, tokens: list[int]) -> torch.Tensor:
    return model(torch.tensor([tokens]), torch.arange(len(tokens)).unsqueeze(0))[0, -1]


@pytest.mark.parametrize("chunk", [5, 512])
@pytest.mark.parametrize("case", CASES)
def test_every_token_is_chosen_by_the_logits_of_a_plain_forward(monkeypatch, case, chunk):
    """Of the last tokens, before and after the context is full; a prompt goes through the model whole or in parts."""
    writer, prompt, seen = writer_of(CASES[case], context=16), [5, 1, 44, 20, 7, 3, 9, 9], list[torch.Tensor]()

    def another(logits: torch.Tensor, sampling: Sampling, generator: torch.Generator) -> int:
        seen.append(logits)
        return 17 * len(seen) % 61

    with monkeypatch.context() as patch:
        patch.setattr(writing, "CHUNK", chunk)
        patch.setattr(writing, "drawn", another)
        written = [*prompt, *writer.tokens(prompt, 20, GREEDY)]
    for place, logits in enumerate(seen, len(prompt)):
        expected = plain_logits(writer.model, written[max(0, place - 16) : place])
        torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-12)
    assert len(written) == 28 and writer.model.attend is causal_attention
    greedy = [*prompt, *writer.tokens(prompt, 12, GREEDY)]
    assert greedy[8:] == [int(plain_logits(writer.model, greedy[max(0, n - 16) : n]).argmax()) for n in range(8, 20)]


def test_what_is_drawn_follows_the_seed_and_ends_at_the_end_of_a_document():
    writer = writer_of(CASES["llama scaled"], context=16)
    draw = [list(writer.tokens([1, 2], 12, Sampling(1.0, seed=seed))) for seed in (1, 1, 2)]
    assert draw[0] == draw[1] != draw[2]
    ended = replace(writer, end_token=draw[0][5])
    assert list(ended.tokens([1, 2], 12, Sampling(1.0, seed=1))) == draw[0][: draw[0].index(draw[0][5])]


@pytest.mark.parametrize(
    ("top_k", "top_p"), [(0, 1.0), (5, 1.0), (0, 0.6), (7, 0.3), (1, 1.0), (0, 1e-6), (500, 0.999)]
)
def test_probabilities_are_those_of_transformers(top_k, top_p):
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    torch.manual_seed(4)
    logits = torch.randn(90, dtype=torch.float64) * 3
    theirs = TemperatureLogitsWarper(0.8)(None, logits[None])
    theirs = TopKLogitsWarper(top_k)(None, theirs) if top_k else theirs
    theirs = TopPLogitsWarper(top_p)(None, theirs) if top_p < 1 else theirs
    ours = shares(logits, Sampling(0.8, top_k, top_p))
    torch.testing.assert_close(ours / ours.sum(), theirs.softmax(-1)[0], rtol=1e-12, atol=0)


@pytest.fixture(scope="module")
def file_tokenizer(tmp_path_factory) -> Path:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.save(str(path))
    return path


def test_pieces_together_are_the_text_of_all_tokens(file_tokenizer):
    """Of characters of several tokens, of bytes that are none, and of tokens that have no text."""
    ours, random = FileTokenizer(file_tokenizer, "<|end|>"), torch.Generator().manual_seed(5)
    text = "Rows é — 行 are 🙂 split"
    for tokenizer, top in ((ByteTokenizer(), 259), (ours, ours.vocab_size)):
        prompt, tokens = tokenizer.encode_prompt("é: "), tokenizer.encode_prompt(text)
        drawn = torch.randint(top, (300,), generator=random).tolist()
        for after in (tokens, drawn, [*tokens, 255], []):
            came = list(pieces(tokenizer, prompt, iter(after)))
            assert tokenizer.decode(prompt) + "".join(came) == tokenizer.decode([*prompt, *after])
        assert len(list(pieces(tokenizer, prompt, iter(tokens)))) > 10


@pytest.fixture(scope="module")
def staged_run(ranks, tmp_path_factory) -> TrainConfig:
    """A run over the bytes of text, on two pipeline stages, each of two steps saved."""
    folder = tmp_path_factory.mktemp("staged")
    (folder / "text.txt").write_text(TEXT)
    words = ["model.vocab_size=259", "precision=fp32", "steps=2", "checkpoint.every=1", "batch.global_size=8"]
    config = small_config(folder, *words, "batch.seq_len=48", "parallel.pipeline=2", "parallel.zero=1")
    config = with_layout(replace(config, data=Text(files=[str(folder)], holdout=0.0)), 2)
    ranks.run(run_train, 2, config)
    return config


def said(capsys, *settings: str) -> str:
    assert main(list(settings)) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def test_a_staged_run_writes_as_its_export_does_in_transformers(staged_run, tmp_path, capsys):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run, prompt = f"run={staged_run.run_dir}", "Rows are"
    assert export([run, f"to={tmp_path / 'to'}"]) == 0
    capsys.readouterr()
    ours = said(capsys, run, f"prompt={prompt}", "temperature=0", "max_tokens=36")
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(tmp_path / "to"),
        AutoTokenizer.from_pretrained(tmp_path / "to"),
    )
    theirs = model.generate(**tokenizer(prompt, return_tensors="pt"), max_new_tokens=36, do_sample=False)[0]
    assert ours == tokenizer.decode(theirs) + "\n"
    assert said(capsys, run, f"prompt={prompt}", "temperature=0", "max_tokens=36", "step=2") == ours
    assert said(capsys, run, f"prompt={prompt}", "temperature=0", "max_tokens=36", "step=1").startswith(prompt)


def test_it_writes_what_the_run_wrote_at_its_end(tmp_path, capsys):
    """The same numbers are drawn, before and after the context is full."""
    (tmp_path / "text.txt").write_text(TEXT)
    words = [
        "model.vocab_size=259",
        "steps=1",
        "sample.tokens=40",
        "sample.prompt=Rows",
        "sample.temperature=0.9",
        "seed=5",
    ]
    config = replace(
        small_config(tmp_path, *words, "batch.global_size=4"), data=Text(files=[str(tmp_path)], holdout=0.0)
    )
    train(config)
    capsys.readouterr()
    common = (f"run={config.run_dir}", "prompt=Rows", "max_tokens=40", "temperature=0.9")
    log = (Path(config.run_dir) / "train.log").read_text(errors="replace")
    text = said(capsys, *common, "seed=5")
    assert _letters(text) in _letters(log) and _letters(said(capsys, *common, "seed=6")) not in _letters(log)


def _letters(text: str) -> str:
    """However a line was broken or marked."""
    return "".join(c for c in text if c.isascii() and c.isalnum())


def test_a_prompt_comes_from_a_file_or_standard_input(staged_run, tmp_path, capsys, monkeypatch):
    common = (f"run={staged_run.run_dir}", "temperature=0", "max_tokens=5")
    expected = said(capsys, *common, "prompt=Rows")
    (tmp_path / "prompt.txt").write_text("Rows\n")
    assert said(capsys, *common, f"prompt_file={tmp_path / 'prompt.txt'}") == expected
    assert (
        said(capsys, "--run", staged_run.run_dir, "--temperature=0", "--max-tokens", "5", "--prompt", "Rows")
        == expected
    )
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"Rows\n")))
    assert said(capsys, *common) == expected


def test_a_person_is_asked_for_prompt_after_prompt(staged_run, capsys, monkeypatch):
    common = (f"run={staged_run.run_dir}", "temperature=0", "max_tokens=5")
    expected = [said(capsys, *common, f"prompt={p}").removeprefix(p) for p in ("Rows", "a weight")]
    lines = iter(["Rows", "", "a weight"])

    def typed(mark: str) -> str:
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr(generating.sys, "stdin", type("Terminal", (), {"isatty": lambda self: True})())
    monkeypatch.setattr("builtins.input", typed)
    assert said(capsys, *common) == "".join(expected) + "\n"


def test_a_terminal_is_told_nothing_that_it_would_obey():
    assert (
        harmless("a\x1b[2Jb\r\x07\n\té")
        == "a\N{REPLACEMENT CHARACTER}[2Jb\N{REPLACEMENT CHARACTER}\N{REPLACEMENT CHARACTER}\n\té"
    )


def test_a_shape_that_no_machine_holds_is_refused_before_it_is_built(tmp_path, capsys):
    run = saved_run(tmp_path, BYTES, random_weights(BYTES))
    manifest = run / "checkpoints" / "step-00000001" / "manifest.json"
    tree = json.loads(manifest.read_text())
    tree["config"]["model"]["layers"] = 10**9
    del tree["checksum"]
    manifest.write_text(json.dumps({**tree, "checksum": fingerprint(tree)}))
    assert main([f"run={run}", "prompt=a", "tokenizer=bytes"]) == 2
    assert "refused: model.layers=1000000000: it is at least 1" in capsys.readouterr().err


def test_a_model_that_the_memory_does_not_hold_is_refused(staged_run, monkeypatch, capsys):
    monkeypatch.setattr("psutil.virtual_memory", lambda: type("Memory", (), {"available": 1000})())
    assert main([f"run={staged_run.run_dir}", "prompt=a", "device=cpu"]) == 2
    assert "device=cpu: the weights take 0.0 GB, and 0.0 GB are free; give another device" in capsys.readouterr().err


def test_the_name_of_a_run_alone_is_answered_with_its_folder(staged_run, tmp_path, monkeypatch, capsys):
    shutil.copytree(staged_run.run_dir, tmp_path / "runs" / "first")
    monkeypatch.chdir(tmp_path)
    assert main(["run=first", "prompt=a"]) == 2
    assert capsys.readouterr().err == "refused: run=first: there is no checkpoint; possible are runs/first\n"
    assert main(["run=runs", "prompt=a"]) == 2, "a sweep, say"
    assert capsys.readouterr().err == "refused: run=runs: there is no checkpoint; possible are runs/first\n"
    for n in range(12):
        (tmp_path / "runs" / "first" / "checkpoints" / f"step-{100 + n:08d}").mkdir()
    assert main(["run=runs/first", "prompt=a", "step=7"]) == 2
    assert capsys.readouterr().err.endswith("step-00000103, step-00000102 and 4 more\n")


def test_a_prompt_longer_than_the_context_is_said_to_be(staged_run, capsys):
    assert main([f"run={staged_run.run_dir}", f"prompt={TEXT[:60]}", "max_tokens=1"]) == 0
    assert "the prompt has 60 tokens, and the model looks back 48 (batch.seq_len)" in capsys.readouterr().err


def test_a_damaged_checkpoint_is_named_and_passed_over(staged_run, tmp_path, capsys):
    run = Path(shutil.copytree(staged_run.run_dir, tmp_path / "run"))
    newest = run / "checkpoints" / "step-00000002"
    (newest / "__0_0.distcp").write_bytes(b"")
    assert main([f"run={run}", "prompt=a", "max_tokens=1"]) == 0
    assert capsys.readouterr().err.startswith(f"{newest} is damaged: __0_0.distcp has 0 bytes")
    assert main([f"run={run}", "prompt=a", "step=2"]) == 2
    assert capsys.readouterr().err.startswith(f"refused: {newest} is damaged: __0_0.distcp has 0 bytes")


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_weights_that_prune_as_they_compute_write_pruned(tmp_path, precision):
    """n:m, chosen in the precision of the run; and a tokenizer for a run over tokens."""
    weights = random_weights(BYTES)
    run = saved_run(tmp_path, BYTES, weights, precision, name="nm", n=2, m=4, layers=["blocks.*"])
    model = open_run(run).model(device="cpu", dtype=torch.float32)
    w = model.blocks["1"].feed_forward.w1.weight
    assert int((w.view(-1, 4) != 0).sum(1).max()) == 2 and torch.equal(
        w[w != 0], weights["blocks.1.feed_forward.w1.weight"][w != 0]
    )
    assert torch.equal(model.head.weight, weights["head.weight"])
    writer = open_run(run).writer(tokenizer="bytes", device="cpu")
    assert writer.model.head.weight.dtype == DTYPES[precision]
    text = "".join(writer.write("a row", 8, GREEDY))
    assert text == "".join(writer.write("a row", 8, GREEDY)) and text


def test_numbers_that_are_not_finite_are_said_to_be(tmp_path, capsys):
    weights = random_weights(BYTES)
    weights["blocks.0.attention.wq.weight"][0, 0] = torch.nan
    run = saved_run(tmp_path, BYTES, weights)
    assert main([f"run={run}", "prompt=a row", "tokenizer=bytes"]) == 1
    told = capsys.readouterr()
    assert (
        told.out == "a row"
        and "failed: the model's logits after 5 tokens are not finite; give another step=" in told.err
    )


def test_refusals_say_what_was_given_and_what_is_possible(staged_run, tmp_path, capsys, monkeypatch):
    run, prompt = f"run={staged_run.run_dir}", "prompt=a"
    tokens = f"run={saved_run(tmp_path, BYTES, random_weights(BYTES))}"
    (tmp_path / "empty.txt").touch()
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "metrics.jsonl").touch()
    for settings, parts in {
        (prompt,): ["run= is missing", "prompt=TEXT"],
        (staged_run.run_dir, prompt): ["unknown key", f"; give run={staged_run.run_dir}"],
        (run, "a row"): ["unknown key a row", "; an argument is KEY=VALUE"],
        (run, "--promt", "a"): ["unknown key promt", "did you mean prompt?"],
        (run, "--prompt"): ["prompt=: give prompt=VALUE"],
        (run, prompt, "temprature=0"): ["unknown key temprature", "did you mean temperature?"],
        (run, prompt, "temperature=hot"): ["temperature=hot", "give a number"],
        (run, prompt, "temperature=-1"): ["temperature=-1", "give at least 0"],
        (run, prompt, "temperature=nan"): ["temperature=nan", "finite"],
        (run, prompt, "max_tokens=0"): ["max_tokens=0", "give at least 1"],
        (run, prompt, "max_tokens=1.5"): ["max_tokens=1.5", "give a whole number"],
        (run, prompt, "top_p=0"): ["top_p=0", "give more than 0"],
        (run, prompt, "top_k=-1"): ["top_k=-1"],
        (run, prompt, "seed=x"): ["seed=x", "give a whole number"],
        (run, prompt, "step=7"): ["step=7: not one of run=", "possible are step-00000002, step-00000001"],
        (run, prompt, "device=tpu"): ["device=tpu: possible are cpu"],
        (run, prompt, "prompt_file=x"): ["prompt= and prompt_file= are both given"],
        (run, f"prompt_file={tmp_path / 'none.txt'}"): ["none.txt cannot be read (No such file"],
        (run, f"prompt_file={tmp_path / 'empty.txt'}"): ["empty.txt is empty"],
        (run, f"prompt_file={tmp_path / 'latin.txt'}"): ["latin.txt is no UTF-8"],
        (run + "x", prompt): ["there is no checkpoint", f"possible are {run[4:]}"],
        (f"run={tmp_path / 'begun'}", prompt): ["begun: there is no checkpoint", f"possible are {tokens[4:]}"],
        (tokens, prompt): ["the run has no tokenizer to write with (data=tokens)", "tokenizer=bytes"],
        (tokens, prompt, f"tokenizer={tmp_path / 'none.json'}"): ["none.json: no such file"],
    }.items():  # fmt: skip
        assert main(list(settings)) == 2, settings
        refusal = capsys.readouterr().err
        assert refusal.startswith("refused: ") and refusal.count("\n") == 1, refusal
        assert all(part in refusal for part in parts), refusal


def test_no_standard_input_is_an_empty_one(monkeypatch):
    """As `<&-` leaves it."""
    monkeypatch.setattr("sys.stdin", None)
    with pytest.raises(ValueError, match=r"^standard input is empty; give prompt=TEXT$"):
        generating.given_prompt(generating.GenerateConfig("runs/a"))
