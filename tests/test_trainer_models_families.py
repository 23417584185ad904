"""Families of models against transformers' own on the same random weights: logits, gradients, folders both ways, what is generated."""

import copy
import json
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_trainer_models_decoder import TOLERANCE, our_logits, some_tokens, their_logits
from torch import Tensor
from torch.overrides import TorchFunctionMode

from parity import relative_error, small_config
from rowwise.launch.compose import compose_tree
from rowwise.trainer.check import check
from rowwise.trainer.config import config_from_tree, tree_of
from rowwise.trainer.convert.names import theirs_by_ours
from rowwise.trainer.keys import as_lists, flat
from rowwise.trainer.models.config import ModelConfig, plain_of
from rowwise.trainer.models.config_json import their_config
from rowwise.trainer.models.decoder import Decoder, check_model, parameter_count, parameter_specs
from rowwise.trainer.models.families.keys import family_of
from rowwise.trainer.models.families.table import FAMILIES
from rowwise.trainer.models.huggingface import check_source, rows_from, write_folder
from rowwise.trainer.models.rope import LinearScaling, Llama3Scaling, LongRopeScaling, YarnScaling
from rowwise.trainer.resume import completed, model_facts

# Sizes that no power of two divides; three layers, so that patterns go round unevenly.
ODD = {"layers": 3, "dim": 30, "heads": 3, "kv_heads": 1, "ffn_dim": 37, "vocab_size": 61}
THEIRS = {
    "num_hidden_layers": 3, "hidden_size": 30, "num_attention_heads": 3, "num_key_value_heads": 1, "intermediate_size": 37,
    "vocab_size": 61, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None, "max_position_embeddings": 64,
}  # fmt: skip
SHORT, LONG = (1.0, 1.5, 2.0, 2.5, 3.0), (2.0, 4.0, 6.0, 8.0, 10.0)
NORMED_AFTER = {"norms": "after", "qk_norm": True, "qk_norm_over": "all"}
GEMMA = {"head_dim": 14}
OUR_GEMMA = {
    "head_dim": 14, "norms": "both", "norm_offset": 1.0, "activation": "gelu_tanh", "embed_scale": 30**0.5, "tie_embeddings": True,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 1e4}
LONGROPE = {
    "rope_type": "longrope", "short_factor": list(SHORT), "long_factor": list(LONG), "rope_theta": 1e4,
    "original_max_position_embeddings": 56,
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A model: its class in transformers, what its configuration has beside THEIRS, written down by hand; what ours has beside
    ODD."""

    kind: str
    theirs: dict[str, Any]
    ours: dict[str, Any] = field(default_factory=dict)

    @property
    def config(self) -> ModelConfig:
        return ModelConfig(**ODD | {"norm_eps": 1e-6} | self.ours)


def longrope(**keys: Any) -> LongRopeScaling:
    return LongRopeScaling(SHORT, LONG, attention_factor=(1 + keys.pop("log") / 4.02535169073515) ** 0.5, **keys)


CASES = {
    "llama biased": Case("Llama", {"attention_bias": True, "mlp_bias": True}, {"qkv_bias": True, "out_bias": True, "mlp_bias": True}),
    "llama linear": Case(
        "Llama",
        {"rope_parameters": {"rope_type": "linear", "factor": 2.5, "rope_theta": 1e4}, "tie_word_embeddings": True},
        {"rope_scaling": LinearScaling(2.5), "tie_embeddings": True},
    ),
    "llama yarn": Case(
        "Llama", {"rope_parameters": YARN}, {"rope_scaling": YarnScaling(4.0, 16, 0.1 * 1.3862943611198906 + 1)}
    ),
    "mistral without a window": Case("Mistral", {"sliding_window": None, "head_dim": 14}, {"family": "mistral", "head_dim": 14}),
    "qwen2": Case("Qwen2", {}, {"qkv_bias": True}),
    "qwen2 tied": Case("Qwen2", {"tie_word_embeddings": True}, {"qkv_bias": True, "tie_embeddings": True}),
    "qwen3 biased": Case("Qwen3", {"attention_bias": True, "head_dim": 10}, {"qk_norm": True, "qkv_bias": True, "out_bias": True}),
    "olmo2": Case("Olmo2", {"rms_norm_eps": 1e-5}, NORMED_AFTER | {"norm_eps": 1e-5}),
    "olmo2 biased": Case(
        "Olmo2",
        {"attention_bias": True, "num_key_value_heads": 3},
        NORMED_AFTER | {"qkv_bias": True, "out_bias": True, "kv_heads": 3, "norm_eps": 1e-5},
    ),
    "granite": Case(
        "Granite",
        {
            "embedding_multiplier": 12.0, "residual_multiplier": 0.22, "attention_multiplier": 0.4, "logits_scaling": 8.0,
            "tie_word_embeddings": True,
        },
        {
            "embed_scale": 12.0, "residual_scale": 0.22, "attention_scale": 0.4, "logit_scale": 0.125, "tie_embeddings": True,
        },
    ),
    "granite biased": Case(
        "Granite",
        {"attention_bias": True, "mlp_bias": True, "logits_scaling": 3.0, "attention_multiplier": 0.5},
        {"logit_scale": 1 / 3, "attention_scale": 0.5, "qkv_bias": True, "out_bias": True, "mlp_bias": True},
    ),
    "smollm3": Case(
        "SmolLM3",
        {"no_rope_layer_interval": 2, "rope_parameters": {"rope_type": "default", "rope_theta": 2e6}},
        {"rope_layers": (True, False), "rope_theta": 2e6, "tie_embeddings": True},
    ),
    "smollm3 biased": Case(
        "SmolLM3",
        {"no_rope_layers": [0, 1, 1], "mlp_bias": True, "attention_bias": True, "tie_word_embeddings": False},
        {"rope_layers": (False, True, True), "rope_theta": 2e6, "qkv_bias": True, "out_bias": True, "mlp_bias": True},
    ),
    "smollm3 windowed": Case(
        "SmolLM3",
        {"use_sliding_window": True, "sliding_window": 6, "no_rope_layer_interval": 2},
        {
            "rope_layers": (True, False), "window_layers": (False, True), "window": 6, "rope_theta": 2e6, "tie_embeddings": True,
        },
    ),
    "mistral": Case("Mistral", {"sliding_window": 7}, {"window": 7}),
    "mistral with a wide window": Case(
        "Mistral", {"sliding_window": 70, "tie_word_embeddings": True}, {"window": 70, "tie_embeddings": True}
    ),
    "qwen2 windowed": Case(
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": 11, "max_window_layers": 1},
        {"qkv_bias": True, "window": 11, "window_layers": (False, True, True)},
    ),
    "gemma2": Case(
        "Gemma2",
        GEMMA | {"sliding_window": 9, "query_pre_attn_scalar": 22, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0},
        OUR_GEMMA | {
            "window": 9, "window_layers": (True, False), "attention_scale": 22**-0.5, "attention_cap": 5.0, "logit_cap": 3.0,
        },
    ),
    "gemma2 of a wide window, biased": Case(
        "Gemma2",
        GEMMA | {
            "sliding_window": 51, "query_pre_attn_scalar": 14, "attn_logit_softcapping": None, "final_logit_softcapping": None,
            "attention_bias": True, "tie_word_embeddings": False,
        },
        OUR_GEMMA | {
            "window": 51, "window_layers": (True, False), "qkv_bias": True, "out_bias": True, "tie_embeddings": False,
            
        },
    ),
    "gemma3": Case(
        "Gemma3",
        GEMMA | {"sliding_window": 5, "query_pre_attn_scalar": 14, "sliding_window_pattern": 2, "final_logit_softcapping": 4.0},
        OUR_GEMMA | {
            "qk_norm": True, "window": 5, "window_layers": (True, False), "logit_cap": 4.0, "rope_theta": 1e6,
            "rope_local_theta": 1e4,
        },
    ),
    "gemma3 stretched": Case(
        "Gemma3",
        GEMMA | {
            "sliding_window": 5, "query_pre_attn_scalar": 20, "layer_types": ["full_attention", *["sliding_attention"] * 2],
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 2e4},
            },
        },
        OUR_GEMMA | {
            "qk_norm": True, "window": 5, "window_layers": (False, True, True), "attention_scale": 20**-0.5, "rope_theta": 1e6,
            "rope_local_theta": 2e4, "rope_scaling": LinearScaling(8.0),
        },
    ),
    "phi3 windowed": Case(
        "Phi3",
        {"num_key_value_heads": 3, "sliding_window": 8},
        {"kv_heads": 3, "window": 8, "norm_eps": 1e-5, "family": "phi3"},
    ),
    "phi3": Case("Phi3", {"num_key_value_heads": 3}, {"family": "phi3", "kv_heads": 3, "norm_eps": 1e-5}),
    "phi3 longrope": Case(
        "Phi3",
        {"rope_parameters": dict(LONGROPE), "original_max_position_embeddings": 56},
        {
            "norm_eps": 1e-5, "family": "phi3",
            "rope_scaling": longrope(original_length=56, factor=64 / 56, log=0.13353139262452257),
        },
    ),
    "phi3 longrope, long and partial": Case(
        "Phi3",
        {
            "rope_parameters": LONGROPE
            | {"short_factor": [1.0, 2.0], "long_factor": [3.0, 5.0], "partial_rotary_factor": 0.4, "attention_factor": 1.2},
            "original_max_position_embeddings": 20,
        },
        {
            "norm_eps": 1e-5, "rope_share": 0.4, "rope_long": True,
            "rope_scaling": LongRopeScaling((1.0, 2.0), (3.0, 5.0), 20, 3.2, 1.2),
        },
    ),
}  # fmt: skip


class InFloat64(TorchFunctionMode):
    """transformers' arithmetic, which asks for float32 in norms and softmaxes whatever a model's dtype is, in float64 of float64."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if args and isinstance(args[0], Tensor) and args[0].dtype == torch.float64:
            if func is Tensor.float:
                return args[0]
            args = tuple(torch.float64 if given is torch.float32 else given for given in args)
            kwargs |= {"dtype": torch.float64} if kwargs.get("dtype") is torch.float32 else {}
        return func(*args, **kwargs)


def transformers_model(case: Case, seed: int = 0) -> Any:
    """transformers' own model in float64, every number random and one of float32. What a norm multiplies by is about 1: were it 2,
    Gemma's softmaxes would be so steep that float32 leaves 2e-5 of a gradient open."""
    import transformers

    made = getattr(transformers, f"{case.kind}{'Text' * (case.kind == 'Gemma3')}Config")(
        **json.loads(json.dumps(THEIRS | case.theirs))
    )
    made._attn_implementation = "eager"
    torch.set_default_dtype(torch.float64)
    try:
        model = getattr(transformers, f"{case.kind}ForCausalLM")(made).eval()
    finally:
        torch.set_default_dtype(torch.float32)
    random, middle = torch.Generator().manual_seed(seed), 1 - case.config.norm_offset
    with torch.no_grad():
        for name, p in model.named_parameters():
            numbers = torch.randn(p.shape, generator=random, dtype=torch.float32) * 0.2
            p.copy_(numbers + middle * (p.ndim == 1 and "norm" in name))
    return model


def loaded(folder: Path, config: ModelConfig) -> Decoder:
    """Our whole model, from a folder that was checked."""
    check_source(folder, config)
    model, fill_ = Decoder(config), rows_from(folder, parameter_specs(config))
    with torch.no_grad():
        for name, p in model.named_parameters():
            for start in range(0, p.size(0), 7):  # as a rank reads its rows
                fill_(name, p[start : start + 7].fill_(torch.nan), start, p.size(0))
    return model


def write(folder: Path, model: Decoder) -> None:
    parameters = dict(model.named_parameters())

    def read_(tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            tensor.copy_(parameters[name].detach())

    values = their_config(model.config, torch.float32, 64, None)
    write_folder(folder, values, parameter_specs(model.config), read_, torch.float32, 12_000)


def our_next(model: Decoder, tokens: Tensor, most: int) -> Tensor:
    """What the model says is likeliest, token by token."""
    for _ in range(most):
        tokens = torch.cat((tokens, our_logits(model, tokens)[:, -1:].argmax(-1)), dim=1)
    return tokens


def assert_same_logits_and_gradients(ours: Decoder, theirs: Any, tokens: Tensor, tolerance: float) -> None:
    """Of the mean of squared logits; every number of theirs is of one tensor of ours."""
    config, specs, names = ours.config, parameter_specs(ours.config), dict(theirs.named_parameters())
    logits, reference = ours(tokens, torch.arange(tokens.size(1)).expand_as(tokens)), theirs(tokens).logits
    assert relative_error(logits.detach(), reference.detach()) <= tolerance
    logits.square().mean().backward()
    reference.square().mean().backward()
    seen, largest = dict.fromkeys(names, 0), max(float(p.grad.abs().max()) for p in names.values())
    for ours_name, p in ours.named_parameters():
        spec = specs[ours_name]
        gradient = names[spec.theirs].grad[spec.their_row : spec.their_row + p.size(0)]
        if ours_name.endswith("wk.bias") and not config.at(int(ours_name.split(".")[1])).rope.size:
            # What all keys have alike moves no softmax.
            assert max(p.grad.abs().max(), gradient.abs().max()) <= tolerance / 10 * largest
        else:
            assert relative_error(p.grad, gradient) <= tolerance, ours_name
        seen[spec.theirs] += p.numel()
    assert seen == {name: p.numel() for name, p in names.items()}


@pytest.mark.parametrize("name", CASES)
def test_a_family_is_that_of_transformers(tmp_path, name):
    """A folder that transformers wrote says the shape, gives the logits and the gradients, in float32 and all but exactly in float64;
    what is written of it opens there, as the same model with the same numbers, and says the same."""
    from transformers import AutoModelForCausalLM

    case = CASES[name]
    exact = transformers_model(case)
    theirs = copy.deepcopy(exact).float()
    theirs.save_pretrained(tmp_path / "theirs")
    source = tmp_path / "theirs"
    words = [f"model.init_from={source}", *(["model.rope_long=true"] if case.config.rope_long else [])]
    read = config_from_tree(compose_tree(words)).model
    assert replace(read, name="tiny", init_from=None) == case.config
    check_model(case.config)
    ours = loaded(source, case.config)
    assert parameter_count(case.config)[0] == sum(p.numel() for p in ours.parameters())

    tokens = some_tokens(case.config)
    assert_same_logits_and_gradients(ours, theirs, tokens, TOLERANCE)
    with InFloat64():
        assert_same_logits_and_gradients(copy.deepcopy(ours).double(), exact, tokens[:1], 1e-9)

    (tmp_path / "ours").mkdir()
    write(tmp_path / "ours", ours)
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", attn_implementation="eager")
    assert type(back) is type(theirs)
    for (their_name, p), q in zip(theirs.named_parameters(), back.parameters(), strict=True):
        assert torch.equal(p, q), their_name
    assert torch.equal(their_logits(back, tokens), their_logits(theirs, tokens))
    said = back.generate(tokens[:1, :40], max_new_tokens=6, do_sample=False)
    assert torch.equal(our_next(ours, tokens[:1, :40], 6), said)


@pytest.mark.parametrize("name", CASES)
def test_a_model_is_of_one_family(name):
    """What says it is what it was made of; another family has another shape, or the same."""
    keys = plain_of(CASES[name].config)
    kind = family_of(keys)
    assert FAMILIES[kind].architecture == f"{CASES[name].kind}ForCausalLM"
    assert as_lists(keys) == keys


def test_the_text_model_of_one_with_images_is_read_alone(tmp_path):
    """Of Gemma 3, whose config.json may leave out what is as in its class."""
    import transformers

    text = THEIRS | GEMMA | {"sliding_window": 5, "query_pre_attn_scalar": 14}
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    whole = transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    theirs = transformers.Gemma3ForConditionalGeneration(whole).eval()
    theirs.save_pretrained(tmp_path)
    model = config_from_tree(compose_tree([f"model={tmp_path}"])).model
    assert family_of(plain_of(model)) == "gemma3_text" and model.window_layers == (True,)
    tokens = some_tokens(model)
    assert relative_error(our_logits(loaded(tmp_path, model), tokens), their_logits(theirs, tokens)) <= TOLERANCE
    said = json.loads((tmp_path / "config.json").read_text())
    for key in ("num_attention_heads", "num_key_value_heads", "vocab_size"):
        said["text_config"].pop(key)
    (tmp_path / "config.json").write_text(json.dumps(said))
    with pytest.raises(
        ValueError, match=r"model.heads=8 there and 3 here, .*model.vocab_size=262208 there and 61 here"
    ):
        check_source(tmp_path, model)


def test_a_folder_is_a_model(tmp_path):
    """`model=FOLDER`; and the name of a model on the hub is refused with what downloads it."""
    (tmp_path / "ours").mkdir()
    write(tmp_path / "ours", Decoder(CASES["qwen2"].config))
    composed = compose_tree([f"model={tmp_path / 'ours'}"])
    assert composed == compose_tree([f"model.init_from={tmp_path / 'ours'}"]) and composed["model"]["qkv_bias"]
    with pytest.raises(
        ValueError, match=r"^model=Qwen/Qwen2.5-7B: .*hf download Qwen/Qwen2.5-7B --local-dir Qwen2.5-7B"
    ):
        compose_tree(["model=Qwen/Qwen2.5-7B"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"model.init_from=.*empty: .*config.json"):
        compose_tree([f"model={tmp_path / 'empty'}"])


def test_states_of_several_matrices_in_one_are_not_converted():
    specs = parameter_specs(CASES["phi3 longrope"].config)
    names = [f"module.{spec.theirs}" for spec in specs.values()]
    with pytest.raises(
        ValueError, match=r"^a has the names .* there model.layers.0.self_attn.qkv_proj.weight is several matrices"
    ):
        theirs_by_ours(specs, names, "a")
    assert theirs_by_ours(specs, specs, "a") == {name: name for name in specs}


def test_a_shape_of_no_family_is_refused_with_what_it_lacks():
    config = replace(CASES["olmo2"].config, residual_scale=0.5)
    with pytest.raises(
        ValueError, match=r"^no family of .*: olmo2, the nearest, has model.residual_scale=1.0 and not 0.5$"
    ):
        their_config(config, torch.float32, 64, None)
    assert {spec.theirs for name, spec in parameter_specs(config).items() if name.startswith("blocks.")} == {None}


FORMS = {
    "offset": ({"norm_offset": 0.5}, "model.norm_offset=0.5: possible are 0, and 1"),
    "family": ({"family": "gpt2"}, "model.family=gpt2: possible are llama"),
    "cap": ({"attention_cap": 0.0}, "model.attention_cap=0.0: it is above 0"),
    "window": ({"window": 0}, "model.window=0: at least 1 token"),
    "layers without a window": ({"window_layers": (True, False)}, "without a window"),
    "more layers than there are": ({"rope_layers": (True,) * 4}, "model.rope_layers says it of 4 layers, possible are 1 to 3"),
    "a norm over none": ({"qk_norm_over": "all"}, "model.qk_norm_over=all without norms"),
    "a third of a pair": ({"rope_share": 0.3}, "model.rope_share=0.3 of the head dim is 3: RoPE turns pairs"),
    "factors": ({"rope_scaling": longrope(original_length=9, factor=2, log=1.0), "rope_share": 0.4}, "has 5 factors, and 2 pairs"),
    "beta": ({"rope_scaling": YarnScaling(4.0, 16, 1.0, 1.0, 32.0)}, "beta_slow below beta_fast"),
    "long": ({"rope_long": True}, "model.rope_long=True without a model.rope_scaling of kind longrope"),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_forms_that_are_no_decoder_are_refused(form):
    keys, named = FORMS[form]
    with pytest.raises(ValueError, match=named):
        check_model(ModelConfig(**ODD | keys))


def test_the_length_of_sequences_says_which_factors_a_longrope_has(tmp_path):
    config = small_config(tmp_path)
    scaling = longrope(original_length=20, factor=2, log=0.7)
    model = replace(config.model, rope_scaling=scaling)
    for length, long in ((20, False), (21, True)):
        run = check(replace(config, model=model, batch=replace(config.batch, seq_len=length)), 1)
        assert run.model.rope_long is long
        with pytest.raises(ValueError, match=f"model.rope_long={not long} with batch.seq_len={length}"):
            check(replace(run, model=replace(model, rope_long=not long)), 1)


def test_a_run_of_before_there_were_families_goes_on(tmp_path):
    """What its manifest did not know of its model was as it is by default."""
    config = small_config(tmp_path)
    config = replace(config, model=replace(config.model, rope_scaling=Llama3Scaling()))
    names = [one.name for one in fields(ModelConfig)]
    new = {f"model.{name}" for name in names[names.index("block") + 1 :]}
    assert {"model.window", "model.qkv_bias", "model.family"} <= new
    facts, told = model_facts(config), flat(tree_of(config))
    before = {key: value for key, value in facts.items() if key not in new}
    before["model.rope_scaling"] = {key: value for key, value in before["model.rope_scaling"].items() if key != "kind"}
    found = completed(before, config)
    assert len(before) == 14 and {key: found[key] for key in facts} == facts
    old = {key: value for key, value in told.items() if key not in new and key != "model.rope_scaling.kind"}
    found = completed(old, config)
    assert {key: found[key] for key in told} == told
