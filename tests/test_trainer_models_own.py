"""Models of one's own (docs/own-model.md): they train as ours on every layout, and what does not keep to the protocol is refused."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from own_models import SideBySide
from parity import assert_same, run_layout, run_plain, small_config, with_layout
from rowwise.launch.compose import compose_tree
from rowwise.launch.export import ExportConfig, export
from rowwise.launch.given import gather
from rowwise.launch.runs import open_run
from rowwise.trainer.config import TrainConfig, config_from_tree
from rowwise.trainer.data.open import open_data
from rowwise.trainer.data.tokenizer import ByteTokenizer
from rowwise.trainer.generate import Writer
from rowwise.trainer.models.config import ModelConfig
from rowwise.trainer.models.decoder import check_model, flops_of, layer_flops, parameter_count, parameter_specs
from rowwise.trainer.plan.works import unknown
from rowwise.trainer.resume import find_resume
from rowwise.trainer.sample import Sampling
from runs import assert_same_run, named, run_train, run_until

EXAMPLE = Path(__file__).parents[1] / "examples" / "gated_conv.py"
OWN = Path(__file__).parent / "own_models.py"
CONV = (f"model.own={EXAMPLE}:GatedConv", "model.heads=4", "model.kv_heads=2", "model.settings={taps: 3}")
SIDE = (f"model.own={OWN}:SideBySide", "model.heads=6", "model.kv_heads=2")
ZB_V = {"pipeline": 2, "pipeline_schedule": "zb_v", "virtual_stages": 2}
TIED, SMALL = "model.tie_embeddings=true", ("batch.micro_size=1", "batch.global_size=8")
ALL_AT_ONCE = ("batch.micro_size=12", "batch.global_size=24")
# What it is made of, its workers and layout, and other words. The textbook decays by shape, and these by role.
CASES = {
    "conv on one": (CONV, 1, {}, (TIED,)),
    "conv under zero 2": (CONV, 2, {"zero": 2}, ()),
    "conv under zero 3, made again": (CONV, 4, {"zero": 3}, ("memory.recompute=full", TIED)),
    "conv, in codes": (
        CONV, 2, {"zero": 0}, ("memory.fused_loss=false", "memory.compress=int8", "optim=adamw8bit"),
    ),
    "conv in 1f1b": (CONV, 2, {"pipeline": 2, "pipeline_schedule": "1f1b"}, ("model.layers=3",)),
    "conv in zb_v": (CONV, 4, {**ZB_V, "zero": 3}, ("model.layers=5", TIED, *SMALL)),
    "conv, in backward": (CONV, 2, {"zero": 3}, ("optim.in_backward=true", "clip_norm=0", *ALL_AT_ONCE)),
    "conv, low rank": (CONV, 2, {"zero": 3}, ("optim=galore", "optim.rank=4", "optim.refresh_every=2")),
    "conv, muon": (CONV, 2, {"zero": 2}, ("optim=muon",)),
    "conv, sparse in stages": (CONV, 4, {"zero": 3, "pipeline": 2}, ("sparsity=rigl", "sparsity.update_every=1")),
    "side by side, ring": (SIDE, 2, {"zero": 0, "ring": 2, "ring_order": "striped"}, ()),
    "side by side, ring x ulysses": (SIDE, 4, {"zero": 3, "ring": 2, "ulysses": 2, "ring_order": "zigzag"}, (TIED,)),
    "side by side, zb_v": (SIDE, 4, {**ZB_V, "zero": 2}, ("model.layers=4", *SMALL)),
    "side by side, lora": (SIDE, 2, {"zero": 3}, ("adapter=lora", "adapter.rank=3", "adapter.layers=[*.w_in.*]")),
}  # fmt: skip
NOW = ("conv in zb_v", "conv, low rank", "side by side, ring x ulysses")
DRAWN = [pytest.param(case, marks=[] if case in NOW else pytest.mark.full) for case in CASES]
# What the textbook has not, or not for these: there one process of ours is what all layouts are.
OURS = ("optim=", "optim.in_backward", "adapter=", "memory.compress=", "sparsity=")


@pytest.mark.parametrize("case", DRAWN)
def test_steps_equal_those_of_one_process(ranks, tmp_path, case):
    model, world, degrees, words = CASES[case]
    textbook = not any(word.startswith(OURS) for word in words)
    decay = ("optim.weight_decay=0",) if textbook else ()
    config = with_layout(small_config(tmp_path, *model, *decay, *words), world, **degrees)
    once = ("batch.micro_size=24",) if set(ALL_AT_ONCE) <= set(words) else ()
    alone = with_layout(small_config(tmp_path, *model, *decay, *words, *once), 1)
    reference = run_plain(config) if textbook else ranks.run(run_layout, 1, alone)[0]
    assert_same(ranks.run(run_layout, world, config)[0], reference)


@pytest.mark.full
def test_what_four_ranks_saved_goes_on_on_one(ranks, tmp_path):
    words = ("steps=4", "eval.every=2", "eval.batches=1", "model.layers=4", *SMALL)
    config = named(small_config(tmp_path, *CONV, *words), tmp_path, "moved")
    alone = named(config, tmp_path, "alone")
    ranks.run(run_until, 4, with_layout(config, 4, **ZB_V, zero=3), 2)
    ranks.run(run_train, 1, with_layout(config, 1))
    ranks.run(run_train, 1, with_layout(alone, 1))
    assert_same_run(config.run_dir, alone.run_dir)


@pytest.fixture(scope="module")
def trained(ranks, tmp_path_factory):
    """A run of the example."""
    folder = tmp_path_factory.mktemp("own")
    config = with_layout(small_config(folder, *CONV, "steps=1", *SMALL), 1)
    ranks.run(run_train, 1, config)
    return config


def test_its_model_opens_where_the_command_names_its_code(trained):
    """And gives each token logits that are those of the tokens before it alone, whose documents it keeps apart."""
    with pytest.raises(
        ValueError, match=r"step-00000001 is of a model of somebody's own code, .*give model=.*:GatedConv where"
    ):
        open_run(trained.run_dir).model()
    model = open_run(trained.run_dir, trained.model.own).model()
    tokens, positions = torch.tensor([[5, 1, 44, 20, 7, 3]]), torch.arange(6)[None]
    logits = model(tokens, positions)
    assert torch.allclose(logits[:, :4], model(tokens[:, :4], positions[:, :4]))
    apart = model(tokens, torch.tensor([[0, 1, 2, 0, 1, 2]]))
    assert torch.allclose(apart[:, 3:], model(tokens[:, 3:], positions[:, :3]))
    assert not torch.allclose(apart[:, 3:], logits[:, 3:])


def test_it_writes(trained):
    """Token by token what a forward of all tokens says, before and after the context is full."""
    model = open_run(trained.run_dir, trained.model.own).model()
    writer, prompt = Writer(model, ByteTokenizer(), context=6), [5, 1, 44]
    written = list(prompt)
    for token in writer.tokens(prompt, 6, Sampling(temperature=0)):
        window = torch.tensor([written[-6:]])
        assert token == model(window, torch.arange(window.size(1))[None])[0, -1].argmax()
        written.append(token)
    assert len(written) == 9


def test_its_export_is_refused_and_runs_nothing(trained, tmp_path):
    with pytest.raises(
        ValueError, match=r"has model.own=.*GatedConv, and no folder of Hugging Face holds such a model"
    ):
        export(ExportConfig(run=trained.run_dir, to=str(tmp_path / "to")))


def found(config: TrainConfig) -> list[Path]:
    """The checkpoints that a run would go on with."""
    return find_resume(config, open_data(config.data, config.batch.seq_len, 61).train.fingerprint)


def test_a_resume_looks_at_what_the_code_makes_and_not_where_it_lies(trained, tmp_path):
    moved = tmp_path / "another.py"
    moved.write_text(EXAMPLE.read_text())
    there = replace(trained, model=replace(trained.model, own=f"{moved}:GatedConv"))
    assert found(there)
    moved = tmp_path / "changed.py"
    moved.write_text(
        EXAMPLE.read_text().replace("3 * dim", "4 * dim").replace("3 * D", "4 * D").replace("chunk(3", "chunk(4")
    )
    changed = replace(trained, model=replace(trained.model, own=f"{moved}:GatedConv"))
    with pytest.raises(
        ValueError, match=r"w_in.weight is \(90, 30\) there and \(120, 30\) as model.own=.*changed.py:GatedConv"
    ):
        found(changed)
    ours = replace(trained, model=replace(trained.model, own=None, settings=None))
    with pytest.raises(ValueError, match=r"model.settings=.*there and None here"):
        found(ours)


def own(name: str, **keys) -> ModelConfig:
    return ModelConfig(layers=2, dim=12, vocab_size=61, own=f"{OWN}:{name}", **keys)


KEPT = ("OfEach", "OfBefore", "OfLooks")
UNKEPT = {
    "Empty": r"making its parts failed \(NotImplementedError: it has no method block\(layer\)",
    "Fails": r"Fails, line \d+: making its parts failed \(IndexError: no such layer\)",
    "OfBreaks": r"OfBreaks, line \d+: block 0 failed \(AttributeError: 'Breaks' object has no attribute 'v'\)",
    "Nobody": r"own_models.py has no Nobody",
    "number": r"number: it is no class below rowwise.trainer.models.model.Model",
    "Misnamed": r"specs\(\) tells blocks.\*.v.weight, which no parameter is called; there are embed.weight",
    "OfMore": r"specs\(\) lacks blocks.0.bias, of shape \(12,\); tell there what it is",
    "Misshapen": r"specs\(\) says \(1, 2\) of blocks.0.w.weight, whose shape is \(12, 12\)",
    "Rolled": r"norm.weight, \(12,\), is no matrix and has the role hidden",
    "Unbegun": r"specs\(\) does not say what norm.weight begins as",
    "OfScalar": r"blocks.0.scale is a single number without rows; give it the shape \(1,\)",
    "OfBuffer": r"blocks.0.mean is a buffer",
    "OfLoose": r"blocks.0.shift is a tensor and no parameter",
    "OfDrops": r"blocks.0.drop drops numbers at random",
    "Shares": r"embed.weight and norm.again are one parameter",
    "OfWide": r"block 0 gives the shape \(1, 8, 24\); it is \(B, S, 12\)",
    "OfDouble": r"block 0 makes torch.float64 of torch.float32",
    "Headless": r"head gives the shape \(1, 8, 3\); it is \(B, S, 61\)",
    "OfAhead": r"block 0 gives a token something else when later tokens change",
    "Within": r"block 0 looks beyond the document that a token is in, and SEES is 'documents'",
    "OfBoth": r"block 0 looks at other tokens without attend, and SEES is 'attend'",
    "OfForgets": r"block 0 calls attend without the documents that it was given",
    "Unsaid": r"block 0 calls attend, and SEES is 'sequence'",
}  # fmt: skip


@pytest.mark.parametrize("name", KEPT)
def test_what_keeps_to_the_protocol_is_a_model(name):
    check_model(own(name, **({"heads": 2} if name == "OfLooks" else {})))


def test_it_is_looked_at_wherever_a_model_is_made():
    """As a checkpoint's is, which is opened on the meta device."""
    with torch.device("meta"):
        check_model(own("OfBefore", norm_eps=2e-5))
        with pytest.raises(ValueError, match="when later tokens change"):
            check_model(own("OfAhead", norm_eps=2e-5))


@pytest.mark.parametrize("name", UNKEPT)
def test_what_does_not_is_told_precisely(name):
    heads = {"heads": 2} if name in ("OfBoth", "OfForgets") else {}
    with pytest.raises(ValueError, match=UNKEPT[name]) as refused:
        check_model(own(name, **heads))
    assert str(refused.value).startswith("model.own=") and "\n" not in str(refused.value)


def test_a_large_model_is_looked_at_without_memory():
    """Of a billion numbers in each layer, and of other shapes than it says."""
    with pytest.raises(ValueError, match=r"OfWide: block 0 gives the shape \(1, 8, 65536\); it is \(B, S, 32768\)"):
        check_model(replace(own("OfWide"), dim=1 << 15))


def test_heads_are_those_that_attend_is_called_with():
    with pytest.raises(
        ValueError, match=r"block 0 calls attend with \(1, 8, 2, 6\), .*give \(B, S, model.heads=4, E\)"
    ):
        check_model(own("OfLooks"))


def test_it_is_counted():
    config = ModelConfig(layers=3, dim=12, heads=6, ffn_dim=20, vocab_size=61, own=f"{OWN}:{SideBySide.__name__}")
    sizes = {name: spec.shape.numel() for name, spec in parameter_specs(config).items()}
    hidden = sum(size for name, size in sizes.items() if name.endswith((".w_in.weight", ".out")))
    assert parameter_count(config) == (sum(sizes.values()), hidden + 61 * 12)
    assert flops_of(config, 1, 5) == 6 * (hidden + 61 * 12) + 12 * 3 * 12 * 5
    assert layer_flops(config, 9)[1] == 2 * hidden / 3 + 4 * 12 * 5
    assert flops_of(own("OfEach"), 1, 5) == 6 * parameter_count(own("OfEach"))[1]


REFUSED = {
    "no form": (("model.own=mixer.py",), r"model.own='mixer.py': give FILE.py:NAME, or package.module:NAME"),
    "no file": (("model=no.py:Mixer",), r"model.own=no.py:Mixer: there is no file no.py"),
    "no package": (("model=no_such.mixer:Mixer",), r"importing it failed \(ModuleNotFoundError: No module named 'no_such'\)"),
    "a ring": ((*CONV, "parallel.ring=2"), r"parallel.ring=2: its layers look at other tokens by other means than attend"),
    "documents": (
        (f"model.own={OWN}:OfEach", "model.heads=4", "model.kv_heads=2", "model.ffn_dim=704"),
        r"with data=tokens, whose documents are kept apart: its layers look across them \(SEES\)",
    ),
    "an engine": ((*CONV, "parallel.backend=accelerate", "precision=fp32"), r"parallel.backend=accelerate: that is not tried with"),
    "a folder": ((*CONV, "model.init_from=llama"), r"model.init_from=llama|llama"),
    "an idle key": ((*CONV, "model.qk_norm=true"), r"model.qk_norm=True with model.own=.*: it does not go by that key"),
    "idle heads": ((*CONV, "model.heads=2"), r"model.heads=2 with model.own=.*give model.heads=4, or name it in READS of GatedConv"),
    "no such setting": (
        (*CONV[:3], "model.settings={tap: 3}"), r"unknown key model.settings.tap: .*did you mean model.settings.taps",
    ),
    "a setting of text": ((*CONV[:3], "model.settings={taps: a}"), r"model.settings.taps='a': give a whole number"),
    "settings of none": ((*SIDE, "model.settings={a: 3}"), r"SideBySide has no keys of its own"),
    "n:m of no layer": (
        (*SIDE, "model.ffn_dim=38", "sparsity=nm", "sparsity.backward=row", "sparsity.layers=[*.out]"),
        r"blocks.0.out of model.own=.* is not the weight of an nn.Linear",
    ),
    "results by name": (
        (*CONV, "memory.recompute=selective"), r"memory.recompute=selective with model.own=.*make no results by name",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_it_cannot_have_is_refused_before_it_starts(tmp_path, case):
    words, said = REFUSED[case]
    with pytest.raises(ValueError, match=said):
        with_layout(small_config(tmp_path, *words), 2)


def test_it_is_not_forecast(tmp_path):
    assert "nobody knows what its layers keep" in str(unknown(with_layout(small_config(tmp_path, *CONV), 1)))


def composed(*words: str) -> TrainConfig:
    return config_from_tree(compose_tree(gather(list(words))))


def test_no_file_names_code_by_itself(tmp_path, trained):
    """A file of settings, a run that goes on, an experiment: each is refused until the command names the code, which then holds."""
    told = r"names code of somebody's own, model.own=.*, which runs by the word of a command alone: .* give model.own="
    (settings := tmp_path / "mine.yaml").write_text(f"model.own: '{OWN}:OfFails'\n")
    (short := tmp_path / "short.yaml").write_text(f"model: '{OWN}:OfFails'\n")
    tree = compose_tree([f"run_dir={tmp_path}/run", *CONV])
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(json.dumps(tree))
    for word in (f"config={settings}", f"config={short}", f"resume={run}"):
        with pytest.raises(ValueError, match=told):
            composed(word)
        assert composed(f"model={EXAMPLE}:GatedConv", word).model.own == f"{EXAMPLE}:GatedConv"
    (folder := tmp_path / "own" / "model").mkdir(parents=True)
    tiny = (EXAMPLE.parents[1] / "conf/model/tiny.yaml").read_text()
    (folder / "mine.yaml").write_text(tiny.replace("own: null", f"own: '{OWN}:OfFails'"))
    searched = f"hydra.searchpath=[file://{tmp_path}/own]"
    with pytest.raises(ValueError, match="a choice or an experiment " + told):
        composed(searched, "model=mine")
    assert composed(searched, "model=mine", f"model.own={EXAMPLE}:GatedConv").model.own == f"{EXAMPLE}:GatedConv"
    tree["optim"]["lr"] = None
    (run / "config.yaml").write_text(json.dumps(tree))
    with pytest.raises(ValueError, match=r"optim.lr=null with model.own=.*its code is not run for a rate"):
        open_run(run).config  # noqa: B018
