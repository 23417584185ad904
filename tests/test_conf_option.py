"""What every option says of itself: what a resume may do with it, and that resuming reads it there."""

from dataclasses import dataclass
from typing import get_args

from rowwise.conf.option import Fixed, Resume, options_of
from rowwise.launch.compose import compose_tree
from rowwise.trainer.config import TrainConfig, config_from_tree
from rowwise.trainer.resume import data_facts, model_facts, state_facts

OPTIONS = dict(options_of(TrainConfig))
# Where `trainer.resume` reads them: a word that nothing reads would be ignored.
READ = {
    "fixed": {"model", "optim", "sparsity", "adapter"},
    "fixed as steps": {"sparsity", "adapter"},
    "ask": {"", "batch", "data", "optim"},
    "apart": {""},
}


def test_every_option_says_what_a_resume_may_do_with_it():
    silent = [key for key, said in OPTIONS.items() if said is None]
    assert not silent, f"{silent} say nothing: give each its word of rowwise.conf.option"
    assert len(OPTIONS) > 140 and set(OPTIONS.values()) == set(get_args(Resume))


def test_an_option_of_several_choices_says_the_same_in_each():
    for key, said in options_of(TrainConfig):
        assert said == OPTIONS[key], f"{key} is {said} in one choice and {OPTIONS[key]} in another"


@dataclass
class Inner:
    lr: Fixed[float]
    betas: list[float]


@dataclass
class Outer:
    name: Fixed[str]
    inner: Inner | None
    rope: Fixed[Inner | None]


def test_a_field_that_does_not_say_is_found():
    assert dict(options_of(Outer)) == {"name": "fixed", "inner.lr": "fixed", "inner.betas": None, "rope": "fixed"}


def test_every_word_is_read():
    for key, said in OPTIONS.items():
        assert key.rpartition(".")[0] in READ.get(said, {key.rpartition(".")[0]}), f"nothing reads that {key} is {said}"


def test_what_a_manifest_holds_is_what_it_held():
    """Keys and their order are on disk."""
    config = config_from_tree(compose_tree(["optim=galore", "sparsity=set", "sparsity.update_every=0.1", "steps=90"]))
    assert [*model_facts(config)] == [
        f"model.{key}"
        for key in ("layers", "dim", "heads", "kv_heads", "head_dim", "ffn_dim", "vocab_size", "tie_embeddings",
                    "stable_embedding", "qk_norm", "norm_eps", "rope_theta", "rope_scaling", "block",
                    "qkv_bias", "out_bias", "mlp_bias", "qk_norm_over", "norms", "norm_offset", "activation", "embed_scale",
                    "residual_scale", "attention_scale", "attention_cap", "logit_scale", "logit_cap", "window", "window_layers",
                    "rope_layers", "rope_local_theta", "rope_share", "frozen_dtype", "settings")
    ]  # fmt: skip
    assert state_facts(config) == {
        "optim.name": "galore", "optim.rank": None, "optim.state_bits": 32, "optim.assign": [],
        "sparsity.name": "set", "sparsity.layers": ["*"], "sparsity.density": 0.2, "sparsity.distribution": "erk",
        "sparsity.growth": "random", "adapter.name": "none", "sparsity.start_at": 0, "sparsity.stop_at": 68,
        "sparsity.update_every": 9,
    }  # fmt: skip
    assert list(state_facts(config))[:4] == ["optim.name", "optim.rank", "optim.state_bits", "optim.assign"]
    groups = config_from_tree(compose_tree(["sparsity=nm"]))
    assert list(state_facts(groups)) == [
        "optim.name",
        "optim.assign",
        *(f"sparsity.{k}" for k in ("name", "layers", "n", "m")),
        "adapter.name",
    ]
    assert list(data_facts(config, "x")) == ["seed", "batch.seq_len", "data.mask_documents", "the data"]
