"""What adapters begin with that hangs on data, against PEFT's own numbers: the same model, weights, and sequences."""

import dataclasses
import functools
import sys
from unittest import mock

import pytest
import torch
from test_trainer_models_decoder import transformers_model

from parity import global_batch, relative_error, small_config, whole, with_layout
from rowwise.parallel.mesh import Workers, make_mesh
from rowwise.trainer.adapters import inputs
from rowwise.trainer.adapters.begin import begin_adapter, with_choices_made
from rowwise.trainer.assemble import assemble
from rowwise.trainer.config import TrainConfig
from rowwise.trainer.data.open import open_data
from rowwise.trainer.feed import train_batches
from rowwise.trainer.models.decoder import parameter_specs
from rowwise.trainer.models.huggingface import rows_from

peft = pytest.importorskip("peft")
BATCHES, TOLERANCE = 2, 1e-4
# PEFT's principal components are sketches of twice the rank, which is every feature here.
OPTIONS = (
    "adapter=lora", "adapter.rank=12", "adapter.alpha=7", f"adapter.init_batches={BATCHES}", "adapter.layers=[*.wq.*, *.wo.*, *.w1.*]",
    "precision=fp32", "data.mask_documents=false", "model.dim=24", "batch.global_size=24", "batch.micro_size=6",
)  # fmt: skip


def begun(workers: Workers, config: TrainConfig, pass_bytes: int = inputs.PASS_BYTES) -> dict[str, torch.Tensor]:
    """What a run begins with; sums of a pass take so many bytes."""
    with mock.patch.object(inputs, "PASS_BYTES", pass_bytes):
        return _begun(workers, config)


def _begun(workers: Workers, config: TrainConfig) -> dict[str, torch.Tensor]:
    mesh = make_mesh(config.parallel, workers)
    data = open_data(config.data, config.batch.seq_len, config.model.vocab_size)
    batches = functools.partial(train_batches, config, mesh, data, 0)
    config, known = with_choices_made(config, mesh, data.train.fingerprint, batches)
    built = assemble(config, mesh)
    begin_adapter(config, mesh, built.engine, batches, known)
    return {name: whole(p) for name, p in built.model.named_parameters()}


@pytest.fixture
def base(tmp_path):
    """transformers' model in a folder, and the sequences of the first batches of a run that begins with it."""
    config = small_config(tmp_path, *OPTIONS)
    model = transformers_model(config.model).eval()
    model.save_pretrained(tmp_path / "base")
    data = open_data(config.data, config.batch.seq_len, config.model.vocab_size)
    batches = [global_batch(config, data, step) for step in range(BATCHES)]
    assert all((batch.labels >= 0).all() for batch in batches)
    return model, tmp_path / "base", [batch.inputs for batch in batches]


PROJECTIONS = {"wq": "q_proj", "wk": "k_proj", "wv": "v_proj", "wo": "o_proj", "w1": "gate_proj"}


def layers_of(config: TrainConfig, theirs, which=("wq", "wo", "w1")) -> dict:
    """Our name of a layer -> PEFT's layer."""
    specs, modules = parameter_specs(config.model), dict(theirs.named_modules())
    names = [name for name in specs if name.endswith(tuple(f"{one}.weight" for one in which))]
    return {
        name.removesuffix(".weight"): modules[f"base_model.model.{specs[name].theirs.removesuffix('.weight')}"]
        for name in names
    }


def lora_config(init: str, **more):
    given = {"r": 12, "lora_alpha": 7, "target_modules": ["q_proj", "o_proj", "gate_proj"]} | more
    return peft.LoraConfig(init_lora_weights=init, **given)


# Of each: rank, rho, and the projections that have the adapter.
SHARED_OUT = [(12, 1.0, ["wq", "wo", "w1"]), (6, 2.0, [*PROJECTIONS]), (8, 1.5, [*PROJECTIONS])]


@pytest.mark.parametrize(("rank", "rho", "which"), SHARED_OUT)
def test_eva_is_that_of_peft(ranks, tmp_path, base, rank, rho, which):
    """A, and how many directions each layer has. Queries, keys and values take the same: the last direction of these goes to queries,
    and to which of the others PEFT's sort leaves open."""
    from peft.tuners.lora.config import EvaConfig

    model, folder, sequences = base
    targets = [PROJECTIONS[one] for one in which]
    eva = EvaConfig(rho=rho, tau=0.9999)
    theirs = peft.get_peft_model(model, lora_config("eva", eva_config=eva, r=rank, target_modules=targets))
    together = [{"input_ids": torch.cat(sequences)}]
    peft.initialize_lora_eva_weights(theirs, together, show_progress_bar=False)
    layers = f"adapter.layers=[{','.join(f'*.{one}.*' for one in which)}]"
    words = ("adapter.init=eva", f"adapter.rank={rank}", f"adapter.eva_rho={rho}", layers)
    config = with_layout(small_config(tmp_path, *OPTIONS, f"model.init_from={folder}", *words), 1)
    (ours,) = ranks.run(begun, 1, config)
    found, expected = {}, {}
    for layer, their in layers_of(config, theirs, which).items():
        a = their.lora_A["default"].weight.detach() if hasattr(their, "lora_A") else torch.empty(0, 24)
        mine = ours.get(f"{layer}.lora_a", a[:0])
        found[layer], expected[layer] = len(mine), len(a)
        both = min(len(a), len(mine))
        assert relative_error(mine[:both], a[:both]) <= TOLERANCE if both else layer
        assert not ours.get(f"{layer}.lora_b", a[:0]).any()
        assert torch.equal(ours[f"{layer}.weight"], getattr(their, "base_layer", their).weight)
    for block in ("blocks.0", "blocks.1"):
        for names in (("wk", "wv"), ("wq",), ("wo",)):
            of = [f"{block}.attention.{name}" for name in names if name in which]
            assert sorted(found[layer] for layer in of) == sorted(expected[layer] for layer in of)
        assert found[f"{block}.feed_forward.w1"] == expected[f"{block}.feed_forward.w1"]
    assert sum(found.values()) == rank * len(found) and (len(set(found.values())) > 1) == (rho > 1)


@pytest.mark.parametrize(("mode", "method"), [("instruction", "ipm"), ("knowledge", "kpm")])
def test_corda_is_that_of_peft(ranks, tmp_path, base, mode, method, monkeypatch):
    monkeypatch.setitem(sys.modules, "attr", dataclasses)  # PEFT takes `dataclass` from there, and does not require it
    from peft.tuners.lora.config import CordaConfig
    from peft.tuners.lora.corda import preprocess_corda

    model, folder, sequences = base
    corda_config = lora_config("corda", corda_config=CordaConfig(corda_method=method))

    @torch.no_grad()
    def run_model():
        for one in torch.cat(sequences):
            model(one[None])

    preprocess_corda(model, corda_config, run_model=run_model)
    theirs = peft.get_peft_model(model, corda_config)
    words = ("adapter.init=corda", f"adapter.corda_mode={mode}")
    config = with_layout(small_config(tmp_path, *OPTIONS, f"model.init_from={folder}", *words), 1)
    plain = rows_from(folder, parameter_specs(config.model))
    (ours,) = ranks.run(begun, 1, config)
    for layer, their in layers_of(config, theirs).items():
        a, b = their.lora_A["default"].weight.detach(), their.lora_B["default"].weight.detach()
        mine_a, mine_b = ours[f"{layer}.lora_a"], ours[f"{layer}.lora_b"]
        assert relative_error(mine_b @ mine_a, b @ a) <= TOLERANCE, layer
        assert relative_error(mine_a.norm(dim=1), a.norm(dim=1)) <= TOLERANCE, (
            layer
        )  # of a part, A and B have the same share
        assert relative_error(mine_b.norm(dim=0), b.norm(dim=0)) <= TOLERANCE, layer
        assert relative_error(ours[f"{layer}.weight"], their.base_layer.weight.detach()) <= TOLERANCE, layer
        w = torch.empty_like(ours[f"{layer}.weight"])
        plain(f"{layer}.weight", w, 0, len(w))
        assert relative_error(ours[f"{layer}.weight"], w) > 0.1, layer


def test_layers_are_looked_at_in_passes_that_change_nothing(ranks, tmp_path):
    """Six layers of 24 features: 5,000 bytes each, two of them in a pass."""
    with mock.patch.object(inputs, "PASS_BYTES", 10_000):
        assert inputs.in_passes(dict.fromkeys("abc", 5_000)) == [["a", "b"], ["c"]]
        assert inputs.in_passes({"a": 5_000, "b": 80_000, "c": 5_000, "d": 5_000}) == [["a"], ["b"], ["c", "d"]]
    config = with_layout(small_config(tmp_path, *OPTIONS, "adapter.init=corda", "adapter.dropout=0.5"), 1)
    ((one,), (several,)) = (ranks.run(begun, 1, config, most) for most in (inputs.PASS_BYTES, 10_000))
    assert one.keys() == several.keys() and all(torch.equal(t, several[name]) for name, t in one.items())


KEPT = {
    "made again": ("memory.recompute=full",),
    "in 8 bits": ("memory.recompute=selective", "memory.compress=int8"),
    "on the host": ("memory.offload_activations=cpu", "parallel.zero=3"),
    "rows in files": ("memory.offload_params=/FOLDER", "memory.offload_states=cpu", "parallel.zero=3"),
    "compiled": ("compile=true",),
}


@pytest.mark.parametrize("how", [pytest.param(how, marks=pytest.mark.full) for how in KEPT])
def test_layers_take_the_same_however_results_and_rows_are_kept(ranks, tmp_path, how):
    """A pass without a backward keeps nothing; what is compiled is not, while it is looked at."""
    options = (*OPTIONS, "adapter.init=corda", "model.layers=1")
    words = [word.replace("/FOLDER", str(tmp_path)) for word in KEPT[how]]
    plain, kept = (
        ranks.run(begun, 1, with_layout(small_config(tmp_path, *options, *more), 1))[0] for more in ((), words)
    )
    assert all(torch.equal(kept[name], t) for name, t in plain.items())
