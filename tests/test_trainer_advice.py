"""What is said before the first step: rates that follow from the size, vocabularies that no data fills, odd dimensions."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from parity import small_config, with_layout
from rowwise.launch.compose import compose_tree
from rowwise.optim.rates import rate_of_size
from rowwise.trainer import advice
from rowwise.trainer.advice import matrix_sizes, warnings
from rowwise.trainer.config import config_from_tree, tree_of
from rowwise.trainer.data.open import open_data
from rowwise.trainer.prepare import examine
from rowwise.trainer.resume import changes
from runs import run_said

CPU, GPU = torch.device("cpu"), torch.device("cuda")
CONF = Path(__file__).parents[1] / "conf"


def config(*overrides):
    return config_from_tree(compose_tree(list(overrides)))


@pytest.mark.parametrize(
    ("model", "rate"),
    [
        ("tiny", 3e-3),
        ("llama_60m", 1.5e-3),
        ("llama_130m", 1.2e-3),
        ("llama_350m", 8.4e-4),
        ("llama_1b", 5.4e-4),
        ("llama3_8b", 3e-4),  # of Llama 3: 3e-4 at 8 billion
        ("llama3_70b", 1.5e-4),  # and 1.5e-4 at 70
    ],
)
def test_the_rate_follows_from_the_size(model, rate):
    assert config(f"model={model}").optim.lr == rate
    assert config(f"model={model}", "optim=lion8bit").optim.lr == pytest.approx(rate / 3, rel=0.04)


def test_the_rate_of_the_largest_published_model():
    assert rate_of_size("adamw", 405_000_000_000) == pytest.approx(8e-5, rel=0.02)  # Llama 3: 8e-5


def test_the_number_is_kept_with_the_run():
    assert config("model=llama3_8b", "optim.lr=1e-3").optim.lr == 1e-3
    kept = tree_of(config("model=llama3_8b"))
    assert kept["optim"]["lr"] == 3e-4
    assert config_from_tree(kept).optim.lr == 3e-4


def test_decay_of_lion_is_that_of_adamw_in_product():
    """Chen et al.: 3 to 10 times the decay with 3 to 10 times less rate."""
    for rule in ("lion", "lion8bit"):
        lion, adamw = config(f"optim={rule}").optim, config().optim
        assert lion.lr * lion.weight_decay == pytest.approx(adamw.lr * adamw.weight_decay)
        assert 3 <= round(lion.weight_decay / adamw.weight_decay, 6) <= 10


@pytest.mark.parametrize("path", sorted(CONF.glob("model/*.yaml")), ids=lambda path: path.stem)
def test_presets_have_dimensions_that_tensor_cores_take(path):
    fewer = {
        # 1376, 2736 and 5464 of ffn_dim, all near their papers'; heads of 96, and 49,159 tokens, as their authors have them.
        **dict.fromkeys(("llama_60m", "llama_350m", "llama_1b"), 8), "phi3_mini": 32, "granite3_3_2b": 1,
    }  # fmt: skip
    for key, size in matrix_sizes(config(f"model={path.stem}").model).items():
        assert size % fewer.get(path.stem, 64) == 0, f"{key}={size}"


@pytest.mark.parametrize("path", sorted(CONF.glob("experiment/*.yaml")), ids=lambda path: path.stem)
def test_experiments_have_dimensions_that_tensor_cores_take(path):
    sizes = matrix_sizes(config(f"experiment={path.stem}").model)
    assert all(size % 8 == 0 for size in sizes.values()), sizes


def said(run, device=CPU):
    return warnings(run, open_data(run.data, run.batch.seq_len, run.model.vocab_size), device)


def test_a_rate_far_off_is_said_and_one_near_is_not():
    run = config("model=llama3_8b", "model.vocab_size=256")
    assert said(run) == []
    for factor in (0.21, 4.9):
        assert said(replace(run, optim=replace(run.optim, lr=run.optim.lr * factor))) == []
    (high,) = said(replace(run, optim=replace(run.optim, lr=3e-3)))
    assert "optim.lr=0.003 is 9.68 times what 6,981,685,248 parameters ask for with optim=adamw, 0.00031;" in high
    (low,) = said(replace(run, optim=replace(run.optim, lr=1e-5)))
    assert "optim.lr=1e-05 is 1/31 of what" in low
    assert said(config("optim=galore", "optim.lr=1.0")) == [], "low-rank rules have rates of their own"


def test_a_vocabulary_that_no_data_fills_is_said():
    (line,) = said(config("model=llama3_8b"))
    assert line.startswith("warning: model.vocab_size=128256 and data=stdlib has 256 tokens")
    assert line.endswith("or model.vocab_size=256")
    assert said(config("model.vocab_size=512")) == []


def test_dimensions_that_tensor_cores_do_not_take_are_said_on_a_gpu():
    run = config("model.ffn_dim=5461", "model.vocab_size=300")
    assert said(run, CPU) == []
    lines = said(run, GPU)
    assert [line.split(" is ")[0] for line in lines] == ["warning: model.ffn_dim=5461", "warning: model.vocab_size=300"]
    assert lines[0].endswith("give model.ffn_dim=5464")


def test_sampling_is_on_where_there_is_a_tokenizer(tmp_path):
    text = ["data=stdlib", "model.vocab_size=256"]
    for overrides, tokens in (
        (["sample.tokens=null"], 0),
        (["sample.tokens=null", *text], 160),
        (["sample.tokens=7", *text], 7),
    ):
        run = (
            config(*overrides, f"run_dir={tmp_path}/text")
            if text[0] in overrides
            else small_config(tmp_path, *overrides)
        )
        assert examine(run, 1).sample.tokens == tokens


def test_a_run_says_it_once(ranks, tmp_path):
    first, second = ranks.run(run_said, 2, with_layout(small_config(tmp_path, "optim.lr=0.1", "steps=1"), 2))
    assert first.count("warning: optim.lr=0.1 is 33.3 times what") == 1
    assert not second


def changed(before, now, step):
    return changes({"config": json.loads(json.dumps(tree_of(before))), "step": step}, now)


def test_what_a_resume_changes_is_told_with_both_rates(tmp_path):
    """Steps 4 to 8 under a cosine that had ended: the rate climbs again."""
    base = ("schedule=cosine", "schedule.warmup_steps=0", "schedule.floor=0.1", "optim.lr=1e-2")
    short, long = small_config(tmp_path, *base, "steps=4"), small_config(tmp_path, *base, "steps=8")
    told = changed(short, long, 4)
    assert told == [
        "changed since: steps 4 -> 8",
        "the learning rate goes from 0.00232 at step 4 to 0.0055 at step 5",
    ]
    assert changed(short, short, 2) == []
    tree = tree_of(short)
    for new in ("on_spike", "spike", "log", "profile", "tokens", "epochs", "peak_flops"):
        del tree[new]
    del tree["parallel"]["ring_order"], tree["memory"]["recompute"]
    assert changes({"config": tree, "step": 2}, short) == [], "what an earlier release did not know is as it was"
    spiky = replace(short, on_spike="skip", spike=replace(short.spike, window=64))
    assert (
        changes({"config": tree, "step": 2}, spiky)[0]
        == "changed since: on_spike record -> skip, spike.window 128 -> 64"
    )
    assert changed(short, replace(short, name="other", run_dir="/there", resume="runs/x", nproc=3), 2) == []
    assert changed(long, short, 4) == ["changed since: steps 8 -> 4"], "no step is left"


def test_every_key_that_a_resume_changes_is_told(tmp_path):
    before = small_config(tmp_path, "steps=8", "batch.micro_size=2")
    now = small_config(
        tmp_path,
        "steps=8",
        "optim.lr=0.03",
        "optim.betas=[0.8,0.9]",
        "schedule=wsd",
        "clip_norm=2",
        "batch.micro_size=4",
    )
    told, rates = changed(before, now, 4)
    for words in (
        "clip_norm 0.5 -> 2.0", "batch.micro_size 2 -> 4", "optim.lr 0.01 -> 0.03", "optim.betas [0.9, 0.95] -> [0.8, 0.9]",
        "schedule.name constant -> wsd", "schedule.decay None -> sqrt",
    ):  # fmt: skip
        assert words in told
    assert rates == "the learning rate goes from 0.01 at step 4 to 0.03 at step 5"


def test_a_run_of_the_first_release_is_understood(tmp_path):
    """Its schedules knew `warmup_steps` alone, and annealing took a number."""
    now = small_config(tmp_path, "steps=100", "schedule=cosine", "schedule.warmup_steps=4")
    old = tree_of(now)
    old["schedule"] = {"name": "cosine", "warmup_steps": 4, "floor": 0.1}
    assert changes({"config": old, "step": 10}, now) == []
    old["schedule"] = {"name": "triangle"}
    assert "goes from an unknown one at step 10" in changes({"config": old, "step": 10}, now)[1]


def test_a_resumed_run_says_what_changed_before_its_first_step(ranks, tmp_path):
    base = ("schedule=cosine", "checkpoint.every=2")
    ranks.run(run_said, 1, with_layout(small_config(tmp_path, *base, "steps=2"), 1))
    (said,) = ranks.run(run_said, 1, with_layout(small_config(tmp_path, *base, "steps=4", "log_every=1"), 1))
    assert said.index("changed since: steps 2 -> 4, log_every 1000 -> 1") < said.index("step 3/4")


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["optim=adamw8bit"], True),
        (["optim=lion"], True),
        (["precision=bf16", "optim.param_dtype=bf16"], True),
        (["optim=adamw8bit", "precision=fp64"], False),
        ([], False),  # torch's own operator
    ],
)
def test_a_step_on_the_host_without_numba_is_told_of(overrides, told, monkeypatch):
    monkeypatch.setattr(advice, "host_kernels", lambda: "numba is not there: pip install 'rowwise[host]'")
    given = config("memory.offload_states=cpu", *overrides)
    found = [line for line in said(given, GPU) if "numba" in line]
    assert len(found) == told
    if told:
        assert found[0].startswith(
            "warning: memory.offload_states=cpu steps on the host in plain torch, for numba is not there"
        )
    assert not any("numba" in line for line in said(config(*overrides), GPU))
    monkeypatch.setattr(advice, "host_kernels", lambda: None)
    assert not any("numba" in line for line in said(given, GPU))
