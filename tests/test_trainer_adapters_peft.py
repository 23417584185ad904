"""LoRA and DoRA are PEFT's: logits, gradients, three updates, and folders both ways."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_trainer_models_decoder import CASES, some_tokens, transformers_model

from parity import relative_error, small_config, with_layout
from rowwise.kernels.spec import Specs
from rowwise.launch.export import ExportConfig, export
from rowwise.parallel.activations.compress import Tokens
from rowwise.parallel.activations.saved import begin_without_backward
from rowwise.trainer.adapters.allocate import Allocation
from rowwise.trainer.adapters.config import AdaLora, Dora, Lora
from rowwise.trainer.adapters.convert import adapt
from rowwise.trainer.adapters.initial import with_adapter_rows
from rowwise.trainer.adapters.peft import (
    CONFIG,
    WEIGHTS,
    check_adapter_source,
    name_in_folder,
    with_ranks_of_folder,
    write_adapter,
)
from rowwise.trainer.adapters.specs import with_adapter
from rowwise.trainer.models.decoder import Decoder, parameter_specs
from rowwise.trainer.models.huggingface import rows_from
from runs import run_train

TOLERANCE = 1e-5
ADAPTERS = {
    "lora": Lora(rank=3, alpha=7.0),
    "rslora of some, norms beside it": Lora(
        rank=4, rslora=True, layers=["*.attention.*", "*.1.*.w2.*"], train=["*norm.weight"]
    ),
    "dora": Dora(rank=3, alpha=5.0),
    "ranks of their own": Lora(
        rank=2, alpha=5.0, layers=["*.attention.w?.weight"],
        ranks={f"blocks.{i}.attention.w{what}.weight": (i + n) % 4 for i in (0, 1) for n, what in enumerate("qkvo")},
    ),
}  # fmt: skip
OTHERS = {"pissa": Lora(rank=3, alpha=7.0, init="pissa"), "pissa, rslora": Lora(rank=2, rslora=True, init="pissa"),
    "corda": Lora(rank=3, alpha=7.0, init="corda", init_batches=1, corda_mode="knowledge"),
    "eva": Lora(rank=2, rslora=True, init="eva", init_batches=1),
    "adalora": AdaLora(rank=3, target_rank=2, alpha=5.0, start=0, stop=2, every=1),
}  # fmt: skip


def peft_model(case: str, adapter: Lora | Dora):
    """PEFT's model of it, whose B are random too, so that everything has a gradient."""
    import peft

    base, specs = transformers_model(CASES[case]), parameter_specs(CASES[case])
    found = with_adapter(specs, adapter)
    layers = [name.removesuffix(".lora_a") for name in found if name.endswith(".lora_a")]
    trained = [name for name, spec in found.items() if name in specs and not spec.frozen]
    theirs = [specs[f"{layer}.weight"].theirs.removesuffix(".weight") for layer in layers]
    own = getattr(adapter, "ranks", None) or {}
    shares = {their: own.get(f"{layer}.weight", adapter.rank) for layer, their in zip(layers, theirs, strict=True)}
    config = peft.LoraConfig(
        r=adapter.rank, lora_alpha=adapter.alpha, use_rslora=adapter.rslora, use_dora=isinstance(adapter, Dora),
        target_modules=theirs, lora_dropout=0.0, task_type="CAUSAL_LM",
        rank_pattern={their: rank for their, rank in shares.items() if rank != adapter.rank},
        alpha_pattern={their: adapter.alpha * rank / adapter.rank for their, rank in shares.items() if rank != adapter.rank},
        modules_to_save=[specs[name].theirs.removesuffix(".weight") for name in trained] or None,
    )  # fmt: skip
    torch.manual_seed(3)
    model = peft.get_peft_model(base, config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(0.0, 0.1)
    return model


def our_model(folder, base, case: str, adapter: Lora | Dora) -> Decoder:
    """Ours, of PEFT's folder and transformers'."""
    specs: Specs = parameter_specs(CASES[case])
    given, adapter = adapter, replace(adapter, init_from=str(folder))
    if isinstance(adapter, Lora):  # its ranks are read in the folder
        adapter = with_ranks_of_folder(replace(adapter, ranks=None), specs)
        assert isinstance(adapter, Lora) and isinstance(given, Lora) and adapter.ranks == given.ranks
    check_adapter_source(adapter, specs)
    model = adapt(Decoder(CASES[case]), adapter, with_adapter(specs, adapter), 0, Tokens(9, *[torch.arange(9)] * 2))
    fill_ = with_adapter_rows(rows_from(base, specs), no_draw, with_adapter(specs, adapter), adapter)
    with torch.no_grad():
        for name, p in model.named_parameters():
            fill_(name, p, 0, p.size(0))
    return model


ODD = {
    "another number": ({"alpha_pattern": {}}, r"gives model.layers.0.self_attn.\w_proj rank \d and lora_alpha 5.0, and the run"),
    "another rank": ({"rank_pattern": {"q_proj": 7}}, r"gives model.layers.0.self_attn.\w_proj rank \d and lora_alpha \d.*, and the"),
    "a regular expression": ({"rank_pattern": {".*q_proj": 7}}, r"; '.\*q_proj' is read as a name, not as a regular expression"),
    "a list": ({"rank_pattern": ["q_proj"]}, r"rank_pattern=\['q_proj'\], and possible are names of layers with a number each"),
    "text": ({"alpha_pattern": {"q_proj": "7"}}, r"alpha_pattern=\{'q_proj': '7'\}, and possible are names of layers with a number"),
}  # fmt: skip


@pytest.mark.parametrize("name", ODD)
def test_a_folder_with_other_patterns_is_refused(tmp_path, name):
    adapter, specs = ADAPTERS["ranks of their own"], parameter_specs(CASES["llama"])
    peft_model("llama", adapter).save_pretrained(tmp_path)
    said = json.loads((tmp_path / CONFIG).read_text())
    given = replace(adapter, init_from=str(tmp_path))
    for whole in ("", "^"):  # as PEFT's own documents spell names that are no ends
        own = {
            key: {f"{whole}{layer}": n for layer, n in said[key].items()} for key in ("rank_pattern", "alpha_pattern")
        }
        (tmp_path / CONFIG).write_text(json.dumps(said | own))
        check_adapter_source(given, specs)
    other, message = ODD[name]
    (tmp_path / CONFIG).write_text(json.dumps(said | other))
    with pytest.raises(ValueError, match=message):
        check_adapter_source(given, specs)


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.tensor(1.0), r"lora_A.weight is \(\), and possible is a matrix"),
        (torch.ones(0, 30).char(), "I8, possible are F64"),
    ],
)
def test_a_tensor_that_is_no_matrix_of_numbers_is_refused(tmp_path, tensor, message):
    adapter, specs = ADAPTERS["ranks of their own"], parameter_specs(CASES["llama"])
    peft_model("llama", adapter).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    name = next(name for name in tensors if "lora_A" in name)
    save_file(
        tensors | {name: torch.ones_like(tensors[name]).to(tensor.dtype) if tensor.dim() else tensor},
        tmp_path / WEIGHTS,
    )
    with pytest.raises(ValueError, match=message):
        unread = replace(adapter, ranks=None, init_from=str(tmp_path))
        check_adapter_source(with_ranks_of_folder(unread, specs), specs)


def test_dora_has_one_rank(tmp_path):
    adapter, specs = ADAPTERS["dora"], parameter_specs(CASES["llama"])
    peft_model("llama", adapter).save_pretrained(tmp_path)
    said = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps(said | {"rank_pattern": {"q_proj": 2}}))
    with pytest.raises(ValueError, match=r"rank 2 .*: adapter=dora gives every layer the same"):
        check_adapter_source(replace(adapter, init_from=str(tmp_path)), specs)


def test_a_matrix_that_lost_its_pair_is_not_one_without_an_adapter(tmp_path):
    adapter, specs = ADAPTERS["ranks of their own"], parameter_specs(CASES["llama"])
    peft_model("llama", adapter).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    lost = name_in_folder("blocks.1.attention.wq.lora_a", specs)
    save_file({name: t for name, t in tensors.items() if lost.rpartition(".lora_A")[0] not in name}, tmp_path / WEIGHTS)
    unread = replace(adapter, ranks=None, init_from=str(tmp_path))
    with pytest.raises(ValueError, match=f"it has no tensor {lost}, and its {CONFIG} has the layer in target_modules"):
        with_ranks_of_folder(unread, specs)


def no_draw(*given):
    raise AssertionError("the folder has everything")


@pytest.mark.parametrize("case", ["llama", pytest.param("qwen3 tied", marks=pytest.mark.full)])
@pytest.mark.parametrize("name", ADAPTERS)
def test_logits_gradients_and_updates_equal_those_of_peft(tmp_path, name, case):
    adapter = ADAPTERS[name]
    theirs = peft_model(case, adapter)
    theirs.save_pretrained(tmp_path / "adapter")
    theirs.get_base_model().save_pretrained(tmp_path / "base", state_dict=transformers_model(CASES[case]).state_dict())
    ours, specs = our_model(tmp_path / "adapter", tmp_path / "base", case, adapter), parameter_specs(CASES[case])
    learns = {n: p for n, p in ours.named_parameters() if p.requires_grad}
    of_theirs = {in_state(n): p for n, p in theirs.named_parameters() if p.requires_grad}
    pairs = {n: (p, of_theirs.pop(name_in_folder(n, specs))) for n, p in learns.items()}
    assert not of_theirs
    rules = [torch.optim.AdamW([pair[i] for pair in pairs.values()], lr=0.01) for i in (0, 1)]
    tokens = some_tokens(CASES[case])
    positions = torch.arange(tokens.size(1)).expand_as(tokens)
    begin_without_backward()
    for _ in range(3):
        (logits := ours(tokens, positions)).square().mean().backward()
        (reference := theirs(tokens).logits).square().mean().backward()
        assert relative_error(logits.detach(), reference.detach()) <= TOLERANCE
        for n, (mine, their) in pairs.items():
            assert relative_error(mine.grad, their.grad) <= 20 * TOLERANCE, n
        before = {n: mine.detach().clone() for n, (mine, _) in pairs.items()}
        for rule in rules:
            rule.step()
            rule.zero_grad()
        for n, (mine, their) in pairs.items():
            assert (mine - before[n]).abs().max() > 0.001, n
            assert relative_error(mine.detach(), their.detach()) <= 20 * TOLERANCE, n


def test_a_tied_embedding_that_learns_is_the_head_too(tmp_path):
    """PEFT opens our folder so, and we open PEFT's; one in which it is not is refused."""
    import peft

    case, adapter = "qwen3 tied", Lora(rank=2, train=["embed.weight"])
    specs, folder, draw = parameter_specs(CASES[case]), tmp_path / "ours", torch.Generator().manual_seed(4)

    def read_(tensors):
        for tensor in tensors.values():
            tensor.normal_(0.0, 0.2, generator=draw)

    folder.mkdir()
    write_adapter(folder, adapter, specs, read_, torch.float32)
    transformers_model(CASES[case]).save_pretrained(tmp_path / "base")
    theirs = peft.PeftModel.from_pretrained(transformers_model(CASES[case]), folder).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    tokens = some_tokens(CASES[case])
    begin_without_backward()
    for source in (folder, tmp_path / "theirs"):
        ours = our_model(source, tmp_path / "base", case, adapter)
        with torch.no_grad():
            logits = ours(tokens, torch.arange(tokens.size(1)).expand_as(tokens))
            assert relative_error(logits, theirs(tokens).logits) <= TOLERANCE
    tensors = load_file(folder / WEIGHTS)
    other = {copy: tensors.pop(copy) + 1 for copy in ["base_model.model.lm_head.weight"]}
    for changed, said in (({}, "no base_model.model.lm_head.weight: that did not learn"), (other, "differs from")):
        save_file(tensors | changed, folder / WEIGHTS)
        with pytest.raises(ValueError, match=said):
            check_adapter_source(replace(adapter, init_from=str(folder)), specs)


def in_state(name: str) -> str:
    """The name that a parameter of PEFT's has in its folder."""
    name = name.replace(".default.weight", ".weight").replace(".default", "").replace(".modules_to_save", "")
    return name.removesuffix(".weight") if name.endswith("lora_magnitude_vector.weight") else name


EXPORTED = ["dora"]
LATER = [pytest.param(name, marks=pytest.mark.full) for name in (*[*ADAPTERS][:2], *OTHERS)]


@pytest.mark.parametrize("name", [*EXPORTED, *LATER])
def test_peft_opens_what_a_run_exports(ranks, tmp_path, name):
    """Merged too, which computes the same; what began as a part of the matrices, beside all of them."""
    import peft
    import transformers

    choice = (ADAPTERS | OTHERS)[name]
    words = [
        f"adapter={choice.name}",
        *(
            f"adapter.{key}={json.dumps(getattr(choice, key))}"
            for key in (
                "rank",
                "alpha",
                "rslora",
                "layers",
                "train",
                "init",
                "init_batches",
                "corda_mode",
                "target_rank",
                "start",
                "stop",
                "every",
            )
            if key in vars(choice) and (key == "init" or getattr(choice, key) != getattr(Lora, key, None))
        ),
    ]
    config = small_config(tmp_path, *words, "precision=fp32", "model.init_std=0.3", "optim.lr=0.05", "steps=2")
    ranks.run(run_train, 2, with_layout(config, 2, zero=3))
    begun = small_config(
        tmp_path, "precision=fp32", "model.init_std=0.3", "steps=1", "optim.lr=1e-30", f"run_dir={tmp_path}/base"
    )
    ranks.run(run_train, 1, with_layout(begun, 1))
    for to, run, more in (("base", begun, {}), ("merged", config, {}), ("adapter", config, {"adapter_only": True})):
        export(ExportConfig(run.run_dir, str(tmp_path / f"{to}-out"), **more))
    open_ = transformers.AutoModelForCausalLM.from_pretrained
    adapted = peft.PeftModel.from_pretrained(open_(tmp_path / "base-out"), tmp_path / "adapter-out").eval()
    merged, plain, tokens = open_(tmp_path / "merged-out"), open_(tmp_path / "base-out"), torch.arange(1, 12)[None]
    with torch.no_grad():
        reference, ours, before = merged(tokens).logits, adapted(tokens).logits, plain(tokens).logits
    assert relative_error(ours, reference) <= 1e-4 < relative_error(before, reference)


def test_updates_and_triplets_of_adalora_are_those_of_peft():
    """Ten updates: loss with penalty, gradients, importance, and which triplets go and which stay."""
    import peft

    case, rank, steps = CASES["llama"], 4, 10
    ours_config = AdaLora(rank=rank, target_rank=2, alpha=7.0, start=1, stop=7, every=2, orthogonality=0.5)
    base, specs = transformers_model(case), parameter_specs(case)
    found = with_adapter(specs, ours_config)
    layers = [name.removesuffix(".lora_a") for name in found if name.endswith(".lora_a")]
    names = {layer: specs[f"{layer}.weight"].theirs.removesuffix(".weight") for layer in layers}
    ours = adapt(Decoder(case), ours_config, found, 0, Tokens(9, *[torch.arange(9)] * 2))
    ours.load_state_dict({n: base.state_dict()[specs[n].theirs] for n in specs}, strict=False)
    theirs = peft.get_peft_model(
        base,
        peft.AdaLoraConfig(
            init_r=rank, target_r=2, tinit=1, tfinal=3, deltaT=2, total_step=steps, lora_alpha=7, lora_dropout=0.0,
            orth_reg_weight=0.5, target_modules=list(names.values()), task_type="CAUSAL_LM",
        ),
    )  # fmt: skip
    their_params = {n.replace(".default", ""): p for n, p in theirs.named_parameters()}
    pairs = {}
    for layer, their_name in names.items():
        for key in "abe":
            mine = ours.get_parameter(f"{layer}.lora_{key}")
            pairs[f"{layer}.lora_{key}"] = mine, their_params[f"base_model.model.{their_name}.lora_{key.upper()}"]
    with torch.no_grad():
        for mine, their in pairs.values():
            mine.copy_(their)
    allocation = Allocation(ours, ours_config, found, steps, None)
    rules = [torch.optim.AdamW([pair[i] for pair in pairs.values()], lr=0.01) for i in (0, 1)]
    tokens, gone = some_tokens(case), []
    positions = torch.arange(tokens.size(1)).expand_as(tokens)
    begin_without_backward()
    for step in range(steps):
        logits = ours(tokens, positions)
        torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
        allocation.add_penalty_(torch.ones(()))
        theirs(tokens, labels=tokens).loss.backward()
        for n, (mine, their) in pairs.items():
            assert relative_error(mine.grad, their.grad) <= 1e-3, (step, n)
        for rule in rules:
            rule.step()
        allocation.step(step + 1)
        theirs.base_model.update_and_allocate(step)
        for rule in rules:
            rule.zero_grad()
        for n, (mine, their) in pairs.items():
            torch.testing.assert_close(
                mine, their, rtol=1e-3, atol=1e-4, msg=lambda m, n=n, s=step: f"{n}, step {s}: {m}"
            )
        gone.append(sum(int((mine == 0).sum()) for n, (mine, _) in pairs.items() if n.endswith("lora_e")))
        assert gone[-1] == sum(int((their == 0).sum()) for n, (_, their) in pairs.items() if n.endswith("lora_e"))
    assert gone[-1] == gone[-3] == 2 * len(layers) > gone[0]
