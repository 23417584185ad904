"""`form=` of the export: sparse weights as they are multiplied, and folders of every form opened again."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from test_kernels_condensed import constant_fan_in
from test_trainer_models_decoder import CASES, TOLERANCE, our_logits, some_tokens
from torch import Tensor
from torch.sparse._semi_structured_conversions import sparse_semi_structured_to_dense_cutlass

from parity import relative_error, small_config
from rowwise.kernels.condensed import condensed, expand
from rowwise.launch.export import main
from rowwise.trainer.config import tree_of
from rowwise.trainer.manifest import begin, commit, file_facts
from rowwise.trainer.models.condensed import CondensedLinear
from rowwise.trainer.models.decoder import Decoder, ModelConfig, parameter_specs
from rowwise.trainer.models.forms import open_exported, semi_structured_weight
from rowwise.trainer.models.huggingface import INDEX, check_source
from runs import manifest_at

pytestmark = pytest.mark.filterwarnings(
    "ignore:torch.distributed is disabled",
    "ignore:The PyTorch API of SparseSemiStructuredTensor is in prototype",
)

# Whose hidden matrices are multiples of 32 x 64.
EVEN = ModelConfig(layers=2, dim=64, heads=2, kv_heads=1, ffn_dim=128, vocab_size=61)
Weights = dict[str, Tensor]
THEIRS = {name: str(spec.theirs) for name, spec in parameter_specs(replace(EVEN, qk_norm=True)).items()}


def random_weights(config: ModelConfig) -> Weights:
    torch.manual_seed(1)
    return {name: torch.randn(spec.shape) / 5 for name, spec in parameter_specs(config).items()}


def hidden(weights: Weights) -> list[str]:
    return [name for name, w in weights.items() if w.ndim == 2 and name.startswith("blocks.")]


def srigl_weights(config: ModelConfig) -> Weights:
    """Of constant fan-in, some neurons ablated; the queries stay dense."""
    weights = random_weights(config)
    for i, name in enumerate(n for n in hidden(weights) if "wq" not in n):
        rows, columns = weights[name].shape
        weights[name] = constant_fan_in(rows, columns, columns // 5 + i % 3, rows // 4 * (i % 2))
    return weights


def two_of_four(w: Tensor) -> Tensor:
    """Pruned by sorting; the earlier one of equals is kept."""
    groups = w.view(-1, 4)
    order = groups.abs().argsort(dim=1, descending=True, stable=True)
    return groups.scatter(1, order[:, 2:], 0.0).view_as(w)


def saved_run(folder: Path, model: ModelConfig, weights: Weights, precision: str = "fp32", **sparsity: Any) -> Path:
    """A run with one checkpoint that holds these weights."""
    tree = tree_of(small_config(folder, f"precision={precision}"))
    tree |= {"model": tree["model"] | vars(model), "sparsity": {"name": "none"} | sparsity}
    if model.rope_scaling is not None:
        tree["model"]["rope_scaling"] = vars(model.rope_scaling)
    (folder / "run").mkdir()
    partial = begin(folder / "run" / "checkpoints", 1)
    dcp.save({f"model.{name}": w for name, w in weights.items()}, checkpoint_id=partial, no_dist=True)
    files = {path.name: file_facts(path) for path in partial.iterdir()}
    commit(partial, manifest_at(1) | {"config": tree, "files": files})
    return folder / "run"


def export(run: Path, to: Path, *settings: str) -> Path:
    assert main([f"run={run}", f"to={to}", *settings]) == 0
    return to


def refusal(capsys, run: Path, to: Path, *settings: str) -> str:
    assert main([f"run={run}", f"to={to}", *settings]) == 2
    told = capsys.readouterr().err
    assert told.startswith("refused: ") and told.count("\n") == 1
    assert not to.exists() and not to.with_name(to.name + ".incomplete").exists()
    return told


def decoder(config: ModelConfig, weights: Weights) -> Decoder:
    model = Decoder(config)
    model.load_state_dict(weights)
    return model


def tensors_of(folder: Path) -> Weights:
    return {name: t for path in folder.glob("*.safetensors") for name, t in load_file(path).items()}


@pytest.mark.parametrize("max_file_bytes", ["5e9", "12000"])
@pytest.mark.parametrize("case", ["llama scaled", "qwen3 tied"])
def test_a_condensed_folder_gives_the_logits_of_the_dense_one(tmp_path, capsys, case, max_file_bytes):
    config = CASES[case]
    weights = srigl_weights(config)
    run, files = saved_run(tmp_path, config, weights), f"max_file_bytes={max_file_bytes}"
    dense, short = export(run, tmp_path / "dense", files), export(run, tmp_path / "to", files, "form=condensed")
    assert capsys.readouterr().out.endswith("condensed matrices: 12\n")
    tokens = some_tokens(config)
    expected = our_logits(decoder(config, weights), tokens)
    assert torch.equal(our_logits(open_exported(dense), tokens), expected)
    model = open_exported(short)
    assert sum(isinstance(module, CondensedLinear) for module in model.modules()) == 12
    assert not any(p.requires_grad for p in model.parameters())
    assert relative_error(our_logits(model, tokens), expected) <= TOLERANCE

    found = tensors_of(short)
    for name, w in weights.items():
        stem = THEIRS[name].removesuffix("weight")
        parts = {part: found.pop(stem + part) for part in ("values", "columns", "rows") if stem + part in found}
        if name in hidden(weights) and "wq" not in name:
            assert ("rows" in parts) == bool((w == 0).all(1).any())
            assert {t.dtype for part, t in parts.items() if part != "values"} == {torch.int32}
            assert torch.equal(expand(condensed(parts["values"], parts["columns"], parts.get("rows"), w.shape)), w)
        else:
            assert not parts and torch.equal(found.pop(f"{stem}weight"), w)
    assert not found
    if max_file_bytes != "5e9":
        index = json.loads((short / INDEX).read_text())
        assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors_of(short).values())
        assert index["weight_map"].keys() == tensors_of(short).keys()


@pytest.mark.parametrize(("dtype", "torch_dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_a_condensed_folder_in_half_precision(tmp_path, dtype, torch_dtype):
    config = CASES["llama"]
    weights = srigl_weights(config)
    to = export(saved_run(tmp_path, config, weights), tmp_path / "to", "form=condensed", f"dtype={dtype}")
    model = open_exported(to)
    for name in hidden(weights):
        if "wq" not in name:
            linear = model.get_submodule(name.removesuffix(".weight"))
            assert torch.equal(expand(linear.weight), weights[name].to(torch_dtype)), name
    tokens, rounded = some_tokens(config), {name: w.to(torch_dtype) for name, w in weights.items()}
    same = our_logits(decoder(config, rounded).to(torch_dtype), tokens)
    assert relative_error(our_logits(model, tokens).float(), same.float()) <= 0.03


def test_nobody_opens_a_condensed_folder_as_dense(tmp_path):
    from transformers import AutoModelForCausalLM

    config = CASES["llama"]
    to = export(saved_run(tmp_path, config, srigl_weights(config)), tmp_path / "to", "form=condensed")
    assert json.loads((to / "config.json").read_text())["rowwise_form"] == "condensed"
    with pytest.raises(ValueError, match="rowwise_llama"):
        AutoModelForCausalLM.from_pretrained(to)
    with pytest.raises(ValueError, match="model_type is 'rowwise_llama', possible are llama, qwen3"):
        check_source(to, config)


def test_what_is_not_of_constant_fan_in_is_refused_by_name(tmp_path, capsys):
    config, name = CASES["llama"], "blocks.1.feed_forward.w2.weight"
    weights = srigl_weights(config)
    weights[name] = torch.zeros_like(weights[name])
    weights[name][:, :2] = 1
    weights[name][3, :20] = 1
    told = refusal(capsys, saved_run(tmp_path, config, weights), tmp_path / "to", "form=condensed")
    assert f"{name} cannot be condensed: its rows have from 2 to 20 non-zeros" in told and "keep it dense" in told


@pytest.mark.parametrize("form", ["condensed", "semi_structured"])
def test_a_dense_run_has_no_other_form(tmp_path, capsys, form):
    run = saved_run(tmp_path, EVEN, random_weights(EVEN))
    told = refusal(capsys, run, tmp_path / "to", f"form={form}", "dtype=bf16")
    assert f"form={form}: every hidden weight would be larger" in told and "give form=dense" in told


@pytest.mark.parametrize(("dtype", "torch_dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_semi_structured_weights_expand_to_the_dense_ones(tmp_path, capsys, dtype, torch_dtype):
    weights = random_weights(EVEN)
    for i, name in enumerate(n for n in hidden(weights) if "wq" not in n):
        weights[name] = two_of_four(weights[name])
        weights[name][i, : 4 * i] = 0  # groups with fewer than two
    run = saved_run(tmp_path, EVEN, weights)
    to = export(run, tmp_path / "to", "form=semi_structured", f"dtype={dtype}")
    assert capsys.readouterr().out.endswith("semi_structured matrices: 12\n")
    assert json.loads((to / "config.json").read_text())["rowwise_form"] == "semi_structured"
    found = tensors_of(to)
    for name, w in weights.items():
        stem, rounded = THEIRS[name].removesuffix("weight"), w.to(torch_dtype)
        if name in hidden(weights) and "wq" not in name:
            values, meta = found.pop(f"{stem}values"), found.pop(f"{stem}meta")
            assert values.shape == (w.size(0), w.size(1) // 2) and meta.dtype == torch.int16
            assert torch.equal(sparse_semi_structured_to_dense_cutlass(values, meta), rounded), name
            assert torch.equal(semi_structured_weight(values, meta).to_dense(), rounded)
        else:
            assert torch.equal(found.pop(f"{stem}weight"), rounded)
    assert not found
    with pytest.raises(ValueError, match=r"compute capability 8\.0 on, and the device is cpu"):
        open_exported(to)


def test_refusals_of_semi_structured(tmp_path, capsys):
    weights = random_weights(EVEN)
    name = "blocks.1.attention.wo.weight"
    weights[name] = constant_fan_in(64, 64, 20, 0)
    run = saved_run(tmp_path, EVEN, weights)
    told = refusal(capsys, run, tmp_path / "to", "form=semi_structured", "dtype=bf16")
    assert f"{name} is not 2:4 along its rows" in told and "sparsity=nm" in told
    told = refusal(capsys, run, tmp_path / "to", "form=semi_structured")
    assert "dtype=fp32: form=semi_structured has 16-bit numbers; give dtype=bf16 or dtype=fp16" in told
    told = refusal(capsys, run, tmp_path / "to", "form=csr")
    assert "form=csr: possible are dense, condensed, semi_structured" in told

    (tmp_path / "odd").mkdir()
    odd = saved_run(tmp_path / "odd", CASES["llama"], srigl_weights(CASES["llama"]))
    told = refusal(capsys, odd, tmp_path / "to", "form=semi_structured", "dtype=bf16")
    assert "blocks.0.attention.wk.weight is 10 x 30, and 2:4 matrices are multiples of 32 x 64" in told


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_an_nm_run_is_exported_as_it_computes(tmp_path, precision):
    """Its checkpoint has dense weights; those of a bf16 run are chosen among rounded ones, where more are equal."""
    own = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    weights = random_weights(EVEN)
    # Of these the third and fourth are equal in bf16, and then the earlier is kept.
    weights["blocks.0.feed_forward.w1.weight"][0, :4] = torch.tensor([0.1, 1.0, 0.5, 0.5001])
    run = saved_run(tmp_path, EVEN, weights, precision, name="nm", n=2, m=4, layers=["*w1*", "*wo.weight", "embed*"])
    expected = dict(weights)
    for name in hidden(weights):
        if "w1" in name or "wo" in name:
            expected[name] = w = weights[name] * (two_of_four(weights[name].to(own)) != 0)
            assert (w.view(-1, 4).count_nonzero(1) == 2).all()
    first = expected["blocks.0.feed_forward.w1.weight"][0, :4]
    assert first.nonzero().flatten().tolist() == ([1, 3] if precision == "fp32" else [1, 2])
    dense = tensors_of(export(run, tmp_path / "dense"))
    assert all(torch.equal(dense[THEIRS[name]], w) for name, w in expected.items())
    two_four = tensors_of(export(run, tmp_path / "2of4", "form=semi_structured", "dtype=bf16", "max_file_bytes=9000"))
    assert sum(name.endswith(".meta") for name in two_four) == 4
    for name in (name for name in hidden(weights) if "w1" in name or "wo" in name):
        stem = THEIRS[name].removesuffix("weight")
        back = sparse_semi_structured_to_dense_cutlass(two_four[f"{stem}values"], two_four[f"{stem}meta"])
        assert torch.equal(back, expected[name].bfloat16())


def test_open_exported_refuses_what_is_no_export(tmp_path):
    config = CASES["llama"]
    to = export(saved_run(tmp_path, config, srigl_weights(config)), tmp_path / "to", "form=condensed")
    with pytest.raises(ValueError, match=r"none: .*No such file"):
        open_exported(tmp_path / "none")
    description = json.loads((to / "config.json").read_text())
    weights, path = load_file(to / "model.safetensors"), to / "model.safetensors"
    values = "model.layers.1.mlp.up_proj.values"
    for change, message in {
        lambda t: t.pop(
            values
        ): r"of blocks\.1\.feed_forward\.w3 \(37, 30\) it has .*columns .*, which is no form of it",
        lambda t: t.update({values: t[values][1:]}): r"blocks\.1\.feed_forward\.w3: values are",
        lambda t: t.pop("model.norm.weight"): r"no tensor of model\.norm, which the model needs",
        lambda t: t.update({"model.extra.weight": torch.ones(2)}): r"it has tensors of model\.extra",
        lambda t: t.update({"model.norm.weight": torch.ones(2)}): r"of norm \(30,\) it has weight \(2,\)",
    }.items():
        changed = dict(weights)
        change(changed)
        save_file(changed, path)
        with pytest.raises(ValueError, match=message):
            open_exported(to)
    save_file(weights, path)
    for key, value, message in (
        ("rowwise_form", "csr", "rowwise_form is 'csr', possible are dense, condensed, semi_structured"),
        ("model_type", "rowwise_gpt2", "model_type is 'gpt2'"),
        ("attention_bias", True, "no tensor of model.layers.0.self_attn.q_proj.bias"),
    ):
        (to / "config.json").write_text(json.dumps(description | {key: value}))
        with pytest.raises(ValueError, match=message):
            open_exported(to)
    (to / "config.json").write_text(
        json.dumps({key: value for key, value in description.items() if key != "hidden_size"})
    )
    with pytest.raises(ValueError, match="no key 'hidden_size'"):
        open_exported(to)
    for content in ("[1]", "[" * 100_000):
        (to / "config.json").write_text(content)
        with pytest.raises(ValueError, match=r"to: (config.json holds no JSON object|nested too deep)"):
            open_exported(to)
