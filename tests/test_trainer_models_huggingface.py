"""Hugging Face folders: read by rows, refused before training where they do not fit, written one file at a time."""

import json
import shutil
import weakref
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_trainer_models_decoder import (
    CASES,
    TOLERANCE,
    our_logits,
    some_tokens,
    their_logits,
    transformers_model,
)
from torch import Tensor

from parity import engine_on, relative_error, small_config, with_layout
from rowwise.kernels.rows import local, row_offset
from rowwise.launch.compose import compose_tree
from rowwise.parallel.mesh import Workers, make_mesh
from rowwise.trainer.config import TrainConfig, config_from_tree
from rowwise.trainer.models import huggingface
from rowwise.trainer.models.config_json import their_config
from rowwise.trainer.models.decoder import Decoder, ModelConfig, parameter_specs
from rowwise.trainer.models.huggingface import (
    INDEX,
    SINGLE,
    check_source,
    rows_from,
    write_folder,
)
from rowwise.trainer.prepare import prepare

FILES = {"one file": "1GB", "several files": "12KB"}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """folder(case, size): a folder that transformers wrote, with its model; each made once."""
    made: dict[tuple[str, str], Any] = {}

    def folder(case: str, size: str = "1GB") -> tuple[Path, Any]:
        if (case, size) not in made:
            path = tmp_path_factory.mktemp("source")
            model = transformers_model(CASES[case])
            model.save_pretrained(path, max_shard_size=size)
            made[case, size] = path, model
        return made[case, size]

    return folder


def loaded(folder: Path, config: ModelConfig) -> Decoder:
    """Our whole model, from a folder that was checked."""
    check_source(folder, config)
    model, fill_ = Decoder(config), rows_from(folder, parameter_specs(config))
    with torch.no_grad():
        for name, p in model.named_parameters():
            fill_(name, p.fill_(torch.nan), 0, p.size(0))
    return model


@pytest.mark.parametrize("files", FILES)
@pytest.mark.parametrize("case", CASES)
def test_a_folder_of_transformers_gives_its_logits(sources, case, files):
    folder, theirs = sources(case, FILES[files])
    assert (folder / INDEX).exists() == (files == "several files")
    tokens = some_tokens(CASES[case])
    assert relative_error(our_logits(loaded(folder, CASES[case]), tokens), their_logits(theirs, tokens)) <= TOLERANCE


safe_open = huggingface.safe_open  # the real one, while a spy stands in its place


class SpiedFile:
    """A safetensors file that gives slices only, and notes which rows are read."""

    def __init__(self, path: Path, read: list):
        self._file, self._read = safe_open(path, framework="pt"), read

    def keys(self) -> list[str]:
        return self._file.keys()

    def get_slice(self, name: str) -> "SpiedSlice":
        return SpiedSlice(name, self._file.get_slice(name), self._read)

    def __enter__(self) -> "SpiedFile":
        return self

    def __exit__(self, *error: object) -> None: ...


class SpiedSlice:
    def __init__(self, name: str, source: Any, read: list):
        self._name, self._source, self._read = name, source, read
        self.get_shape, self.get_dtype = source.get_shape, source.get_dtype

    def __getitem__(self, rows: slice) -> Tensor:
        self._read.append((self._name, rows.start, rows.stop))
        return self._source[rows]


def sharded(workers: Workers, config: TrainConfig, tokens: Tensor) -> tuple[Tensor, list, list]:
    """On a rank: the logits, the rows that were read, and those that are the rank's."""
    mesh = make_mesh(config.parallel, workers)
    read: list[tuple[str, int, int]] = []
    with patch.object(huggingface, "safe_open", lambda path, framework: SpiedFile(path, read)):
        model = engine_on(mesh, config).model
    specs = parameter_specs(config.model)
    mine = [(specs[name].theirs, row_offset(p), row_offset(p) + len(local(p))) for name, p in model.named_parameters()]
    return our_logits(model, tokens), read, mine


@pytest.mark.parametrize("case", CASES)
def test_three_ranks_read_their_own_rows_and_give_the_logits(ranks, sources, tmp_path, case):
    folder, theirs = sources(case, FILES["several files"])
    config = small_config(tmp_path, "precision=fp32")
    config = replace(config, model=replace(CASES[case], init_from=str(folder)))
    tokens = some_tokens(CASES[case])
    reference = their_logits(theirs, tokens)
    rows: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for logits, read, mine in ranks.run(sharded, 3, with_layout(config, 3, zero=3), tokens):
        assert relative_error(logits, reference) <= TOLERANCE
        assert read == [(name, start, stop) for name, start, stop in mine if stop > start]
        for name, start, stop in read:
            rows[name].append((start, stop))
    sizes = {name: p.size(0) for name, p in theirs.named_parameters()}
    assert rows.keys() == sizes.keys()
    for name, ranges in rows.items():
        ends = [0, *(stop for _, stop in sorted(ranges))]
        assert [start for start, _ in sorted(ranges)] == ends[:-1] and ends[-1] == sizes[name], (
            "a gap, or rows read twice"
        )
        assert max(stop - start for start, stop in ranges) == -(-sizes[name] // 3), "a rank read more than its share"


@pytest.mark.parametrize("max_bytes", [10**9, 12_000])
@pytest.mark.parametrize("case", CASES)
def test_what_is_written_comes_back_bit_for_bit_here_and_with_its_logits_there(tmp_path, case, max_bytes):
    from transformers import AutoModelForCausalLM

    config = CASES[case]
    ours = random_model(config)
    files = write(tmp_path, ours, max_file_bytes=max_bytes)
    assert (len(files) > 3) == (max_bytes < 10**9)
    back = loaded(tmp_path, config)
    for (name, p), q in zip(ours.named_parameters(), back.parameters(), strict=True):
        assert torch.equal(p, q), name
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(theirs).__name__ == ("Qwen3ForCausalLM" if config.qk_norm else "LlamaForCausalLM")
    tokens = some_tokens(config)
    assert relative_error(our_logits(ours, tokens), their_logits(theirs, tokens)) <= TOLERANCE
    names = [name for path in files for name in load_file(path)]
    assert sorted(names) == sorted(set(names)) == sorted(name for name, _ in theirs.named_parameters())
    assert ("lm_head.weight" in names) == (not config.tie_embeddings)


def random_model(config: ModelConfig) -> Decoder:
    torch.manual_seed(3)
    model = Decoder(config)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.2).add_(p.ndim == 1)
    return model


def write(folder: Path, model: Decoder, dtype: torch.dtype = torch.float32, max_file_bytes: int = 10**9) -> list[Path]:
    parameters = dict(model.named_parameters())

    def read_(tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            tensor.copy_(parameters[name].detach())

    values = their_config(model.config, dtype, 128, None)
    return write_folder(folder, values, parameter_specs(model.config), read_, dtype, max_file_bytes)


def test_writing_holds_one_file_at_a_time(tmp_path):
    """When the next file is asked for, nothing of the last one is left."""
    limit = 20_000
    alive: list[weakref.ref] = []
    held: list[int] = []

    def read_(tensors: dict[str, Tensor]) -> None:
        assert not [reference for reference in alive if reference() is not None], "the file before is still in memory"
        alive[:] = [weakref.ref(tensor) for tensor in tensors.values()]
        held.append(sum(tensor.nbytes for tensor in tensors.values()))
        for tensor in tensors.values():
            tensor.zero_()

    specs = parameter_specs(CASES["qwen3"])
    files = write_folder(tmp_path, config_of("qwen3"), specs, read_, torch.float32, limit)
    assert len(held) == len(files) > 2
    assert max(held) <= limit
    assert sum(held) == json.loads((tmp_path / INDEX).read_text())["metadata"]["total_size"]


def test_a_tensor_above_the_file_size_is_a_file_of_its_own(tmp_path):
    files = write(tmp_path, random_model(CASES["llama"]), max_file_bytes=1)
    assert len(files) == len(parameter_specs(CASES["llama"])) and all(len(load_file(path)) == 1 for path in files)
    loaded(tmp_path, CASES["llama"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_folders_fill_fp32_parameters(tmp_path, dtype):
    ours = random_model(CASES["llama"])
    write(tmp_path, ours, dtype)
    for p, q in zip(ours.parameters(), loaded(tmp_path, CASES["llama"]).parameters(), strict=True):
        assert q.dtype == torch.float32 and torch.equal(p.to(dtype).float(), q)


def test_numbers_beyond_the_dtype_are_refused(tmp_path):
    model = random_model(CASES["llama"])
    with torch.no_grad():
        model.norm.weight[3] = 7e4
    write(tmp_path, model)
    with pytest.raises(ValueError, match=r"norm\.weight has numbers that are infinite .* in torch\.float16"):
        write(tmp_path, model, torch.float16)


def test_a_tied_folder_may_hold_its_head(sources, tmp_path):
    folder, theirs = sources("llama tied")
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    change_tensors(tmp_path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    tokens = some_tokens(CASES["llama tied"])
    ours = our_logits(loaded(tmp_path, CASES["llama tied"]), tokens)
    assert relative_error(ours, their_logits(theirs, tokens)) <= TOLERANCE


def change_tensors(folder: Path, change) -> None:
    tensors = load_file(folder / SINGLE)
    change(tensors)
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})


def change_config(folder: Path, **values: Any) -> None:
    theirs = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**theirs, **values}))


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def config_of(case: str) -> dict[str, Any]:
    return their_config(CASES[case], torch.float32, 128, None)


WQ, W2 = "model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.down_proj.weight"
DAMAGES = {
    "untied without a head": (
        lambda f: change_tensors(f, lambda t: t.pop("lm_head.weight")),
        "has no tensor lm_head.weight, which the model needs",
    ),
    "a tensor is missing": (lambda f: change_tensors(f, lambda t: t.pop(W2)), f"has no tensor {W2}"),
    "another shape": (
        lambda f: change_tensors(f, lambda t: t.update({WQ: t[WQ][:, 1:].clone()})),
        rf"{WQ} has the shape \[30, 29\], and the model needs \[30, 30\]",
    ),
    "more rows": (
        lambda f: change_tensors(f, lambda t: t.update({WQ: torch.cat((t[WQ], t[WQ]))})),
        rf"{WQ} has the shape \[60, 30\]",
    ),
    "a bias": (
        lambda f: change_tensors(f, lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(30)})),
        "q_proj.bias, which the model does not have",
    ),
    "quantized numbers": (
        lambda f: change_tensors(f, lambda t: t.update({WQ: t[WQ].to(torch.float8_e4m3fn)})),
        f"{WQ} is of dtype F8_E4M3",
    ),
    "cut short": (lambda f: cut_short(f / SINGLE), "model.safetensors cannot be read as safetensors"),
    "no weights": (lambda f: (f / SINGLE).unlink(), "no model.safetensors.index.json and no model.safetensors"),
    "weights that are none": (lambda f: (f / SINGLE).write_bytes(b"x" * 99), "cannot be read as safetensors"),
    "no config.json": (lambda f: (f / "config.json").unlink(), "config.json"),
    "config.json is no JSON": (lambda f: (f / "config.json").write_text("{"), "Expecting"),
    "config.json lacks a key": (
        lambda f: (f / "config.json").write_text('{"model_type": "llama"}'),
        "no key 'num_hidden_layers'",
    ),
    "a size that is text": (lambda f: change_config(f, hidden_size="30"), "hidden_size is '30', possible is a whole number"),
    "no size": (lambda f: change_config(f, vocab_size=None), "vocab_size is None, possible is a whole number"),
    "half a layer": (lambda f: change_config(f, num_hidden_layers=1.5), "num_hidden_layers is 1.5, possible is a whole"),
    "a number that is text": (lambda f: change_config(f, rms_norm_eps="1e-6"), "rms_norm_eps is '1e-6', possible is a number"),
    "another size": (lambda f: change_config(f, intermediate_size=38), "model.ffn_dim=38 there and 37 here"),
    "tied there": (lambda f: change_config(f, tie_word_embeddings=True), "model.tie_embeddings=True there"),
    "another model": (lambda f: change_config(f, model_type="gpt2"), "model_type is 'gpt2', possible are llama"),
    "biases": (lambda f: change_config(f, attention_bias=True), "model.qkv_bias=True there and False here, model.out_bias=True there"),
    "quantized": (lambda f: change_config(f, quantization_config={"bits": 4}), "quantization_config is"),
    "another RoPE": (
        lambda f: change_config(f, rope_parameters={"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}),
        "possible are the rope_type default, linear, llama3, yarn, longrope",
    ),
    "half the head turns": (
        lambda f: change_config(f, partial_rotary_factor=0.5),
        "partial_rotary_factor is 0.5, possible is 1.0",
    ),
    "another base": (
        lambda f: change_config(f, rope_parameters={"rope_type": "default", "rope_theta": 5e5}),
        "model.rope_theta=500000.0 there and 10000.0 here",
    ),
    "another stretch": (
        lambda f: change_config(f, rope_scaling=config_of("llama scaled")["rope_scaling"]),
        r"model.rope_scaling=\{'factor': 4.0.*there and None here",
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_folder_that_does_not_fit_is_refused(sources, tmp_path, damage):
    change, named = DAMAGES[damage]
    shutil.copytree(sources("llama")[0], tmp_path, dirs_exist_ok=True)
    check_source(tmp_path, CASES["llama"])
    change(tmp_path)
    with pytest.raises(ValueError, match=named) as refusal:
        check_source(tmp_path, CASES["llama"])
    assert str(refusal.value).startswith(f"model.init_from={tmp_path}: ") and "\n" not in str(refusal.value)


@pytest.mark.parametrize("case", CASES)
def test_the_folder_says_the_shape(sources, tmp_path, case):
    """Of every kind of model that is read, with no model.* key but init_from; and what is written here says it too."""
    source, _ = sources(case)
    write(tmp_path, random_model(CASES[case]))
    for folder in (source, tmp_path):
        config = config_from_tree(compose_tree([f"model.init_from={folder}", "model.init_std=0.3"]))
        assert config.name == config.model.name == folder.name and config.run_dir == f"runs/{folder.name}"
        assert config.model.init_std == 0.3
        ours = replace(CASES[case], name=folder.name, init_from=str(folder), init_std=0.3)
        assert replace(config.model, head_dim=config.model.head_size) == replace(ours, head_dim=ours.head_size)
        check_source(folder, config.model)


def test_what_is_given_must_agree_with_the_folder(tmp_path):
    """As a key, as a preset, by an experiment's means: the same is taken, another refused; defaults give way."""
    config = replace(ModelConfig(), layers=2, heads=8, kv_heads=4, vocab_size=300, norm_eps=1e-6)
    write(tmp_path, Decoder(config))
    source = f"model.init_from={tmp_path}"
    agreed = [["model.layers=2"], ["model.head_dim=32"], ["model.head_dim=null"], ["model.rope_scaling=null"], ["name=a"],
              ["model.norm_eps=0.000001", "model.rope_theta=10000"], ["model.name=mine"]]  # fmt: skip
    for given in agreed:
        model = config_from_tree(compose_tree([source, *given])).model
        assert replace(model, name="tiny", init_from=None, head_dim=None) == config, given
    assert config_from_tree(compose_tree([source, "model.name=mine"])).run_dir == "runs/mine"
    assert config_from_tree(compose_tree([source, "name=a"])).model.name == tmp_path.name
    contradicted = {
        "model.layers=4": "model.layers=2 there and 4 here",  # also where it is the default's
        "model.head_dim=16": "model.head_dim=None there and 16 here",
        "model.qk_norm=true": "model.qk_norm=False there and True here",
        "model.rope_scaling={factor:4.0,low_freq_factor:1.0,high_freq_factor:4.0,original_length:32}": "there and {'factor'",
        "model=tiny": "model.layers=2 there and 4 here, model.heads=8 there and 4 here",
    }
    for given, message in contradicted.items():
        with pytest.raises(ValueError) as refusal:
            compose_tree([source, given])
        assert message in str(refusal.value) and str(refusal.value).startswith(f"{source}: it is another model, ")
    write_preset = replace(config, layers=4, heads=4, kv_heads=2, vocab_size=256, norm_eps=1e-5)
    write(tmp_path, Decoder(write_preset))
    assert config_from_tree(compose_tree([source, "model=tiny"])).name == "tiny"


@pytest.mark.parametrize(
    "content",
    ["[]", "3", '{"model_type": "llama"}', "{", "[" * 100_000, '{"model_type": "llama", "num_attention_heads": 0}'],
    ids=lambda content: content[:40],
)
def test_a_config_that_says_no_shape_is_one_line(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=rf"model.init_from={tmp_path}: ") as refusal:
        compose_tree([f"model.init_from={tmp_path}"])
    assert "\n" not in str(refusal.value)


def test_damage_in_one_of_several_files_is_refused(sources, tmp_path):
    folder, _ = sources("llama", FILES["several files"])
    weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
    last, first = weight_map["lm_head.weight"], weight_map["model.embed_tokens.weight"]
    assert first != last
    damages = {
        "cut short": (lambda f: cut_short(f / last), f"{last} cannot be read"),
        "missing": (lambda f: (f / last).unlink(), f"{last} cannot be read"),
        "named for another": (lambda f: (f / INDEX).write_text(moved_head(f, first)), "lm_head.weight"),
        "no weight_map": (lambda f: (f / INDEX).write_text("{}"), "no key 'weight_map'"),
        "a list": (
            lambda f: (f / INDEX).write_text('{"weight_map": [1]}'),
            f"weight_map in {INDEX} .* name of each tensor's file",
        ),
        "no file": (lambda f: (f / INDEX).write_text('{"weight_map": {"a": 1}}'), f"weight_map in {INDEX} "),
    }
    for name, (change, named) in damages.items():
        copy = tmp_path / name
        shutil.copytree(folder, copy)
        change(copy)
        with pytest.raises(ValueError, match=named):
            check_source(copy, CASES["llama"])


def test_a_single_file_goes_before_an_index_as_in_transformers(sources, tmp_path):
    """As where a merged model was saved over its base, whose files are there still, or are not."""
    from transformers import AutoModelForCausalLM

    shutil.copytree(sources("llama", FILES["several files"])[0], tmp_path, dirs_exist_ok=True)
    merged = {
        name: tensor * 1.1 for name, tensor in AutoModelForCausalLM.from_pretrained(tmp_path).state_dict().items()
    }
    save_file(merged, tmp_path / SINGLE, metadata={"format": "pt"})
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    for _ in range(2):
        ours = loaded(tmp_path, CASES["llama"]).state_dict()
        assert torch.equal(ours["embed.weight"], merged["model.embed_tokens.weight"])
        assert torch.equal(theirs["model.embed_tokens.weight"], merged["model.embed_tokens.weight"])
        for shard in tmp_path.glob("model-*.safetensors"):
            shard.unlink()


def moved_head(folder: Path, file: str) -> str:
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["lm_head.weight"] = file
    return json.dumps(index)


def test_a_tied_folder_whose_head_differs_is_refused(sources, tmp_path):
    shutil.copytree(sources("qwen3 tied")[0], tmp_path, dirs_exist_ok=True)
    change_tensors(tmp_path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] * 1.01}))
    with pytest.raises(ValueError, match=r"ties the embeddings, but lm_head\.weight differs"):
        check_source(tmp_path, CASES["qwen3 tied"])


def test_the_run_is_refused_before_it_begins(sources, tmp_path):
    shutil.copytree(sources("llama")[0], tmp_path / "source")
    change_tensors(tmp_path / "source", lambda t: t.pop("lm_head.weight"))
    config = small_config(tmp_path)
    with pytest.raises(ValueError, match=r"has no tensor lm_head\.weight"):
        prepare(replace(config, model=replace(CASES["llama"], init_from=str(tmp_path / "source"))), 1)
    assert not Path(config.run_dir).exists()


def test_only_headers_are_read_by_the_check(sources):
    folder, _ = sources("llama", FILES["several files"])
    read: list[tuple[str, int, int]] = []
    with patch.object(huggingface, "safe_open", lambda path, framework: SpiedFile(path, read)):
        check_source(folder, CASES["llama"])
    assert read == []


def test_rows_of_a_tensor_that_does_not_fit_are_not_given(sources, tmp_path):
    """On a rank whose folder is not the one that rank 0 checked."""
    shutil.copytree(sources("llama")[0], tmp_path, dirs_exist_ok=True)
    change_tensors(tmp_path, lambda t: (t.pop("lm_head.weight"), t.update({WQ: torch.cat((t[WQ], t[WQ]))})))
    fill_ = rows_from(tmp_path, parameter_specs(CASES["llama"]))
    with pytest.raises(ValueError, match=r"no tensor lm_head\.weight"):
        fill_("head.weight", torch.empty(5, 30), 10, 61)
    with pytest.raises(ValueError, match=r"has the shape \[60, 30\]"):
        fill_("blocks.0.attention.wq.weight", torch.empty(5, 30), 10, 30)
