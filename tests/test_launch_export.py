"""`python -m rowwise.launch.export`: from a checkpoint of a real run to a folder that transformers opens."""

import json
import os
import shutil
import subprocess
import sys
import weakref
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from test_trainer_models_decoder import TOLERANCE, our_logits, some_tokens, their_logits
from torch import Tensor

from parity import relative_error, small_config, with_layout
from rowwise.launch.compose import compose_tree
from rowwise.launch.export import ExportConfig, main
from rowwise.launch.settings import free_folder
from rowwise.parallel.mesh import Workers
from rowwise.trainer import whole as reading
from rowwise.trainer.config import TrainConfig, config_from_tree
from rowwise.trainer.data.config import Text
from rowwise.trainer.data.tokenizer import ByteTokenizer
from rowwise.trainer.models.decoder import Decoder, ModelConfig, parameter_specs
from rowwise.trainer.models.huggingface import INDEX, check_source, rows_from
from rowwise.trainer.prepare import examine
from rowwise.trainer.train import train

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # the tests' own reading

MODELS = {
    "llama": [
        "model.tie_embeddings=true",
        "model.rope_scaling={factor:4.0,low_freq_factor:1.0,high_freq_factor:4.0,original_length:32}",
    ],
    "qwen3": ["model.qk_norm=true", "model.heads=4", "model.kv_heads=2", "model.head_dim=10", "model.norm_eps=1e-6"],
}


def run_training(workers: Workers, config: TrainConfig) -> int:
    return train(config, workers).step


@pytest.fixture(scope="module")
def run_of(ranks, tmp_path_factory):
    """run_of(model): the configuration of a finished run of two steps on two ranks, ZeRO 3, each step saved."""
    made: dict[str, TrainConfig] = {}

    def run(model: str) -> TrainConfig:
        if model not in made:
            folder = tmp_path_factory.mktemp("runs")
            overrides = ["precision=fp32", "steps=2", "checkpoint.every=1", *MODELS[model]]
            config = with_layout(small_config(folder, *overrides), 2, zero=3)
            Path(config.run_dir).mkdir()
            assert ranks.run(run_training, 2, config) == [2, 2]
            made[model] = config
        return made[model]

    return run


@pytest.fixture
def run_copy(run_of, tmp_path) -> Path:
    """A run to damage."""
    return Path(shutil.copytree(run_of("llama").run_dir, tmp_path / "run"))


def step(run: Path | str, number: int) -> Path:
    return Path(run) / "checkpoints" / f"step-{number:08d}"


def parameters_of(checkpoint: Path, model: ModelConfig) -> dict[str, Tensor]:
    """Read by torch alone."""
    tensors = {f"model.{name}": torch.empty(spec.shape) for name, spec in parameter_specs(model).items()}
    dcp.load(tensors, storage_reader=dcp.FileSystemReader(checkpoint), no_dist=True)
    return {name.removeprefix("model."): tensor for name, tensor in tensors.items()}


def trained(config: TrainConfig) -> Decoder:
    model = Decoder(config.model)
    model.load_state_dict(parameters_of(step(config.run_dir, 2), config.model))
    return model


@pytest.mark.parametrize("max_file_bytes", ["5e9", "12000"])
@pytest.mark.parametrize("model", MODELS)
def test_an_exported_run_has_its_logits_in_transformers(run_of, tmp_path, capsys, model, max_file_bytes):
    from transformers import AutoModelForCausalLM

    config, to = run_of(model), tmp_path / "to"
    assert main([f"run={config.run_dir}", f"to={to}", f"max_file_bytes={max_file_bytes}"]) == 0
    assert capsys.readouterr().out.startswith(f"{step(config.run_dir, 2)} -> {to}: ")
    assert (to / INDEX).exists() == (max_file_bytes == "12000")
    theirs = AutoModelForCausalLM.from_pretrained(to)
    assert theirs.config.model_type == model and theirs.config.tie_word_embeddings == config.model.tie_embeddings
    assert theirs.config.bos_token_id is None and theirs.config.eos_token_id == 0  # data.separator
    tokens = some_tokens(config.model)
    ours = trained(config)
    assert relative_error(their_logits(theirs, tokens), our_logits(ours, tokens)) <= TOLERANCE

    check_source(to, config.model)
    fill_ = rows_from(to, parameter_specs(config.model))
    for name, p in ours.named_parameters():
        fill_(name, back := torch.empty_like(p), 0, p.size(0))
        assert torch.equal(back, p), f"{name} is not bit-equal after the round trip"


@pytest.mark.parametrize("model", MODELS)
def test_a_run_begins_from_an_export_with_no_word_of_its_shape(run_of, tmp_path, model):
    config, to = run_of(model), tmp_path / "to"
    assert main([f"run={config.run_dir}", f"to={to}"]) == 0
    words = [
        f"model.init_from={to}",
        "data=tokens",
        f"data.files={config.data.files[0]}",
        "sample.tokens=0",
        "eval.every=0",
    ]
    begun = examine(config_from_tree(compose_tree([*words, f"run_dir={tmp_path}/run"])), 1)
    assert begun.name == "to"
    assert replace(begun.model, name="", init_from=None) == replace(config.model, name="", init_std=0.02)


@pytest.mark.parametrize(("dtype", "torch_dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_half_precision_is_the_rounded_checkpoint(run_of, tmp_path, dtype, torch_dtype):
    from transformers import AutoModelForCausalLM

    config, to = run_of("qwen3"), tmp_path / "to"
    assert main([f"run={config.run_dir}", f"to={to}", f"dtype={dtype}"]) == 0
    theirs = AutoModelForCausalLM.from_pretrained(to)
    assert theirs.dtype == torch_dtype
    ours = parameters_of(step(config.run_dir, 2), config.model)
    assert torch.equal(
        theirs.model.layers[1].mlp.up_proj.weight, ours["blocks.1.feed_forward.w3.weight"].to(torch_dtype)
    )


def test_the_checkpoint_is_read_one_file_at_a_time(run_of, tmp_path, monkeypatch):
    alive: list[weakref.ref] = []
    asked: list[dict[str, int]] = []
    load = dcp.load

    def spy(tensors: dict[str, Tensor], **options) -> None:
        assert not [reference for reference in alive if reference() is not None], "the file before is still in memory"
        alive[:] = [weakref.ref(tensor) for tensor in tensors.values()]
        asked.append({name: tensor.nbytes for name, tensor in tensors.items()})
        load(tensors, **options)

    monkeypatch.setattr(reading.dcp, "load", spy)
    config = run_of("qwen3")
    assert main([f"run={config.run_dir}", f"to={tmp_path / 'to'}", "max_file_bytes=12000"]) == 0
    assert len(asked) == len(list((tmp_path / "to").glob("*.safetensors"))) > 3
    assert max(sum(sizes.values()) for sizes in asked) <= 12_000
    assert [name for sizes in asked for name in sizes] == [f"model.{name}" for name in parameter_specs(config.model)]


def embedding(folder: Path) -> Tensor:
    return load_file(folder / "model.safetensors")["model.embed_tokens.weight"]


def test_a_step_or_a_path_chooses_the_checkpoint(run_of, tmp_path):
    config = run_of("llama")
    run, first = f"run={config.run_dir}", step(config.run_dir, 1)
    for name, settings in {
        "newest": [run],
        "step": [run, "checkpoint=1"],
        "path": [run, f"checkpoint={first}"],
        "alone": [f"run={first}"],
    }.items():
        assert main([*settings, f"to={tmp_path / name}"]) == 0
        chosen = step(config.run_dir, 2 if name == "newest" else 1)
        assert torch.equal(embedding(tmp_path / name), parameters_of(chosen, config.model)["embed.weight"]), name
    assert not torch.equal(embedding(tmp_path / "newest"), embedding(tmp_path / "step"))


def flip_a_byte(checkpoint: Path) -> None:
    path = checkpoint / "__1_0.distcp"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_a_damaged_checkpoint_is_named_and_passed_over(run_copy, tmp_path, capsys):
    flip_a_byte(step(run_copy, 2))
    assert main([f"run={run_copy}", f"to={tmp_path / 'to'}"]) == 0
    told = capsys.readouterr()
    assert told.err == f"{step(run_copy, 2)} is damaged: __1_0.distcp differs from its checksum; passed over\n"
    assert told.out.startswith(f"{step(run_copy, 1)} -> ")


def test_no_damaged_checkpoint_is_exported(run_copy, tmp_path, capsys):
    flip_a_byte(step(run_copy, 2))
    assert main([f"run={run_copy}", f"to={tmp_path / 'to'}", "checkpoint=2"]) == 2
    refusal = capsys.readouterr().err
    assert refusal.startswith(f"refused: {step(run_copy, 2)} is damaged: __1_0.distcp") and refusal.count("\n") == 1
    (step(run_copy, 1) / "manifest.json").write_text("{}")
    assert main([f"run={run_copy}", f"to={tmp_path / 'to'}"]) == 2
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 2 and told[1].startswith("refused: ") and "no sound checkpoint is left" in told[1]
    assert not (tmp_path / "to").exists()


def test_refusals_say_what_was_given_and_what_is_possible(run_of, tmp_path, capsys):
    run, to = f"run={run_of('llama').run_dir}", f"to={tmp_path / 'to'}"
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    (tmp_path / "plain").touch()
    for settings, parts in {
        (run, to, "dtyp=bf16"): ["unknown key dtyp", "did you mean dtype?"],
        (run, to, "bf16"): ["unknown key bf16", "dtype"],
        (run,): ["to= is missing"],
        (to,): ["run= is missing"],
        (run, run, to): ["once"],
        (run, to, "dtype="): ["give dtype=VALUE"],
        (run, to, "dtype=fp8"): ["dtype=fp8", "fp32, bf16, fp16"],
        (run, to, "max_file_bytes=0"): ["max_file_bytes=0", "at least 1"],
        (run, to, "max_file_bytes=5GB"): ["max_file_bytes=5GB", "5e9"],
        (run, to, "max_file_bytes=inf"): ["max_file_bytes=inf"],
        (run + "x", to): [f"{run}x", "there is no checkpoint", f"possible are {run[4:]}"],
        (f"run={tmp_path / 'plain'}", to): ["there is no checkpoint", "a folder that a training run wrote"],
        (f"run={tmp_path / 'no' / 'run'}", to): ["there is no checkpoint"],
        (run, to, "checkpoint=7"): ["checkpoint=7", "possible are step-00000002, step-00000001"],
        (run, to, "checkpoint=newest"): ["checkpoint=newest", "step-00000002"],
        (run, f"to={tmp_path / 'full'}"): ["exists and is not empty"],
        (run, f"to={tmp_path / 'plain'}"): ["exists and is not empty"],
        (run, f"to={tmp_path / 'plain' / 'in'}"): ["cannot be written"],
        (run, to, f"tokenizer={tmp_path / 'none.json'}"): ["none.json: no such file", "tokenizer=none"],
    }.items():  # fmt: skip
        assert main(list(settings)) == 2, settings
        refusal = capsys.readouterr().err
        assert refusal.startswith("refused: ") and refusal.count("\n") == 1, refusal
        assert all(part in refusal for part in parts), refusal
    assert not (tmp_path / "to").exists() and not list(tmp_path.glob("*.incomplete"))


def test_an_empty_destination_is_taken(run_of, tmp_path):
    (tmp_path / "to").mkdir()
    assert main([f"run={run_of('llama').run_dir}", f"to={tmp_path / 'to'}"]) == 0
    assert (tmp_path / "to" / "config.json").exists()


def test_an_interrupted_export_leaves_no_folder(run_of, tmp_path, monkeypatch):
    arguments = [f"run={run_of('llama').run_dir}", f"to={tmp_path / 'to'}", "max_file_bytes=12000"]
    load, calls = dcp.load, iter("12")

    def break_the_second(*positional, **options) -> None:
        if next(calls) == "2":
            raise OSError("the disk is full")
        load(*positional, **options)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="the disk is full"):
        patch.setattr(reading.dcp, "load", break_the_second)
        main(arguments)
    assert not list(tmp_path.iterdir())

    stale = tmp_path / "to.incomplete"  # of an export that was killed
    stale.mkdir()
    (stale / "model-00009-of-00009.safetensors").touch()
    assert main(arguments) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["to"]
    assert not (tmp_path / "to" / "model-00009-of-00009.safetensors").exists()


TEXT = "Rows are split, rows are summed; no rank ever holds the whole of a weight.\n" * 40


@pytest.fixture(scope="module")
def text_run(ranks, tmp_path_factory) -> TrainConfig:
    """A run over text with a tokenizer.json of its own and a token that ends a document."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    folder = tmp_path_factory.mktemp("text")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=290, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "text.txt").write_text(TEXT)
    config = small_config(folder, "model.vocab_size=301", "precision=fp32", "steps=1", "batch.global_size=4")
    data = Text(files=[str(folder)], tokenizer=f"{folder}/tokenizer.json", end_of_text="<|end|>", holdout=0.0)
    config = with_layout(replace(config, data=data), 2)
    Path(config.run_dir).mkdir()
    ranks.run(run_training, 2, config)
    return config


def test_the_tokenizer_goes_with_the_model(text_run, tmp_path):
    from tokenizers import Tokenizer
    from transformers import AutoModelForCausalLM, AutoTokenizer

    to = tmp_path / "to"
    assert main([f"run={text_run.run_dir}", f"to={to}"]) == 0
    source = Path(text_run.data.tokenizer)
    assert (to / "tokenizer.json").read_bytes() == source.read_bytes()
    ours, theirs = Tokenizer.from_file(str(source)), AutoTokenizer.from_pretrained(to)
    end = ours.token_to_id("<|end|>")
    assert theirs.eos_token_id == end == AutoModelForCausalLM.from_pretrained(to).generation_config.eos_token_id
    for text in (TEXT, "  1234 rows,\n\tand é — 行<|end|>x"):
        assert theirs(text)["input_ids"] == ours.encode(text).ids
        assert theirs.decode(theirs(text)["input_ids"], skip_special_tokens=True) == text.replace("<|end|>", "")


def test_a_tokenizer_that_has_changed_since_is_not_given_out(text_run, tmp_path, capsys):
    source, to = Path(text_run.data.tokenizer), tmp_path / "to"
    content = source.read_text()
    tree = json.loads(content)
    vocabulary = tree["model"]["vocab"]
    vocabulary["t"], vocabulary["e"] = vocabulary["e"], vocabulary["t"]
    source.write_text(json.dumps(tree))
    try:
        assert main([f"run={text_run.run_dir}", f"to={to}"]) == 2
        assert f"{source} has changed since the run wrote step 1" in capsys.readouterr().err
        assert not to.exists()
        assert main([f"run={text_run.run_dir}", f"to={to}", f"tokenizer={source}"]) == 0
    finally:
        source.write_text(content)


@pytest.fixture(scope="module")
def byte_run(ranks, tmp_path_factory) -> TrainConfig:
    """A run over the bytes of text, with a few tokens that no byte has."""
    folder = tmp_path_factory.mktemp("bytes")
    (folder / "text.txt").write_text(TEXT)
    config = small_config(folder, "model.vocab_size=259", "precision=fp32", "steps=1", "batch.global_size=4")
    config = with_layout(replace(config, data=Text(files=[str(folder)], holdout=0.0)), 2)
    Path(config.run_dir).mkdir()
    ranks.run(run_training, 2, config)
    return config


def test_the_tokenizer_of_bytes_goes_with_the_model(byte_run, tmp_path):
    """In transformers: every byte is its own token, and what is no UTF-8 is written as it is here."""
    from transformers import AutoTokenizer

    assert main([f"run={byte_run.run_dir}", f"to={tmp_path / 'to'}"]) == 0
    ours, theirs = ByteTokenizer(), AutoTokenizer.from_pretrained(tmp_path / "to")
    random = Random(5)
    texts = [TEXT, "", " ", "\0\r\n\t  two  spaces ", "é — 行 \U0001f600\u00ad\ufeff", "".join(map(chr, range(0x2800)))]
    texts += ["".join(chr(random.randrange(0xD800)) for _ in range(200)) for _ in range(20)]
    for text in texts:
        assert theirs(text)["input_ids"] == list(text.encode()) == ours.encode_prompt(text)
        assert theirs.decode(list(text.encode())) == text
    for _ in range(50):
        tokens = list(random.randbytes(120))
        assert theirs.decode(tokens) == ours.decode(tokens)
    assert theirs.decode([*b"past", 256, 258]) == ours.decode([*b"past", 256, 258]) == "past"
    assert all(theirs.decode([b]) == ours.decode([b]) for b in range(256))


def test_bytes_are_chosen_or_left_out(run_of, byte_run, tmp_path, capsys):
    for settings, there in {(): True, ("tokenizer=bytes",): True, ("tokenizer=none",): False}.items():
        to = tmp_path / f"to{len(list(tmp_path.iterdir()))}"
        assert main([f"run={byte_run.run_dir}", f"to={to}", *settings]) == 0
        assert (to / "tokenizer.json").exists() == (to / "tokenizer_config.json").exists() == there
    assert main([f"run={run_of('llama').run_dir}", f"to={tmp_path / 'to'}", "tokenizer=bytes"]) == 2
    assert "bytes has tokens up to 255, and the model's vocab_size is 61" in capsys.readouterr().err


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600), (0o027, 0o640)])
def test_files_are_as_the_umask_says(byte_run, tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        assert main([f"run={byte_run.run_dir}", f"to={tmp_path / 'to'}", "max_file_bytes=12000"]) == 0
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "to").iterdir()}
    assert len(modes) > 5 and set(modes.values()) == {mode}, modes


def test_a_tokenizer_that_moved_must_be_named_or_left_out(text_run, tmp_path, capsys):
    run = Path(shutil.copytree(text_run.run_dir, tmp_path / "run"))
    source = Path(text_run.data.tokenizer)
    moved = source.rename(tmp_path / "moved.json")
    try:
        assert main([f"run={run}", f"to={tmp_path / 'to'}"]) == 2
        assert f"the run's data.tokenizer={source}: no such file" in capsys.readouterr().err
        assert main([f"run={run}", f"to={tmp_path / 'without'}", "tokenizer=none"]) == 0
        assert not (tmp_path / "without" / "tokenizer.json").exists()
        assert main([f"run={run}", f"to={tmp_path / 'to'}", f"tokenizer={moved}"]) == 0
        assert (tmp_path / "to" / "tokenizer.json").read_bytes() == moved.read_bytes()
    finally:
        moved.rename(source)


def test_the_tokenizer_of_a_larger_vocabulary_is_refused(run_of, text_run, tmp_path, capsys):
    arguments = [f"run={run_of('llama').run_dir}", f"to={tmp_path / 'to'}", f"tokenizer={text_run.data.tokenizer}"]
    assert main(arguments) == 2
    assert "tokens up to 289, and the model's vocab_size is 61" in capsys.readouterr().err


def test_a_model_is_told_the_positions_that_it_has_seen(run_of, text_run, tmp_path):
    for name, config, positions in (("scaled", run_of("llama"), 128), ("plain", text_run, 13)):
        assert main([f"run={config.run_dir}", f"to={tmp_path / name}"]) == 0
        assert json.loads((tmp_path / name / "config.json").read_text())["max_position_embeddings"] == positions


def test_the_command_needs_no_transformers_and_no_workers(run_of, tmp_path):
    arguments = ["export", f"run={run_of('llama').run_dir}", "to=to"]
    program = (
        "import atexit, runpy, sys, torch.distributed as dist\n"
        "atexit.register(lambda: print('transformers' in sys.modules, dist.is_initialized()))\n"
        f"sys.argv = {arguments}\n"
        "runpy.run_module('rowwise.launch.export', run_name='__main__')"
    )
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert done.stdout.splitlines()[1] == "False False"
    assert sorted(path.name for path in (tmp_path / "to").iterdir()) == ["config.json", "model.safetensors"]


def test_help_names_every_key(capsys):
    with pytest.raises(SystemExit) as leaving:
        main(["--help"])
    assert leaving.value.code == 0
    told = capsys.readouterr().out
    assert all(f"{field}=" in told for field in ExportConfig.__dataclass_fields__)


def test_an_export_to_a_link_makes_what_it_leads_to(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to("disk")
    assert free_folder(tmp_path / "link") == (tmp_path / "disk").resolve()
    (tmp_path / "lost").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"to=\S+/lost is a link to \S+/nowhere, which is not there; make that folder"):
        free_folder(tmp_path / "lost")
    (tmp_path / "disk/full").touch()
    with pytest.raises(ValueError, match="exists and is not empty"):
        free_folder(tmp_path / "link")
