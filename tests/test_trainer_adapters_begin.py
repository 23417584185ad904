"""What adapters begin with, and how AdaLoRA shares ranks: beside PEFT's own, as functions of matrices."""

import dataclasses
import itertools
import sys

import pytest
import torch

from rowwise.kernels.coded_rows import NF4, RowForm, decode_rows, encode_rows
from rowwise.trainer.adapters.bits import FORMS, bits_of, choose
from rowwise.trainer.adapters.bone import BoneLinear, unfolded
from rowwise.trainer.adapters.budget import Budget, kept, move_importance_
from rowwise.trainer.adapters.config import Bone
from rowwise.trainer.adapters.decompose import corda, first_errors, lq, pissa, principal

peft = pytest.importorskip("peft")


def matrix(rows, columns, seed=0, std=0.02):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * std


class Holder(torch.nn.Module):
    """A model of one linear layer, which PEFT can adapt."""

    def __init__(self, w):
        super().__init__()
        self.linear = torch.nn.Linear(w.size(1), w.size(0), bias=False)
        self.linear.weight.data = w.clone()

    def forward(self, x):
        return self.linear(x)


def adapted_by_peft(w, rank, alpha, init, holder=None, **more):
    config = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=["linear"], init_lora_weights=init, **more)
    layer = peft.get_peft_model(holder or Holder(w), config).base_model.model.linear
    return layer.base_layer.weight, layer.lora_A["default"].weight, layer.lora_B["default"].weight


@pytest.mark.parametrize(("shape", "rank"), [((20, 33), 4), ((33, 20), 1)])
def test_pissa_is_that_of_peft(shape, rank):
    w, alpha = matrix(*shape), 6
    ours = pissa(w, rank, alpha / rank)
    for mine, theirs in zip(ours, adapted_by_peft(w, rank, alpha, "pissa"), strict=True):
        torch.testing.assert_close(mine, theirs.data, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(ours.rest + alpha / rank * ours.b @ ours.a, w)


@pytest.mark.parametrize(("part", "method"), [("most", "ipm"), ("least", "kpm")])
def test_corda_is_that_of_peft(part, method, monkeypatch):
    monkeypatch.setitem(sys.modules, "attr", dataclasses)  # PEFT takes `dataclass` from there, and does not require it
    from peft.tuners.lora.config import CordaConfig
    from peft.tuners.lora.corda import preprocess_corda

    w, rank, alpha, x = matrix(20, 33), 4, 8, matrix(200, 33, 1, 1.0) @ matrix(33, 33, 2, 1.0)
    holder, corda_config = Holder(w), CordaConfig(corda_method=method)
    config = peft.LoraConfig(
        r=rank, lora_alpha=alpha, target_modules=["linear"], init_lora_weights="corda", corda_config=corda_config
    )
    preprocess_corda(holder, config, run_model=lambda: holder(x))
    theirs = adapted_by_peft(w, rank, alpha, "corda", holder, corda_config=corda_config)
    scaled = x / x.max().abs()
    ours = corda(w, scaled.T @ scaled, rank, alpha / rank, part)
    assert ours.a.norm() > 0
    torch.testing.assert_close(ours.rest, theirs[0].data, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(ours.b @ ours.a, theirs[2].data @ theirs[1].data, rtol=1e-3, atol=1e-5)


def test_principal_components_are_what_peft_converges_to():
    """PEFT's incremental PCA of all inputs at once, exact: components, their signs, and what each explains."""
    from peft.utils.incremental_pca import IncrementalPCA

    x = (matrix(300, 21, 1, 1.0) @ matrix(21, 21, 2, 1.0) + 3).double()
    theirs = IncrementalPCA(n_components=5, batch_size=300, lowrank=False).fit(x)
    with_one = torch.cat([x, x.new_ones(300, 1)], dim=1)
    ours = principal(with_one.T @ with_one, 5, torch.float64)
    torch.testing.assert_close(ours.rows.abs(), theirs.components_.abs(), rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(ours.shares, theirs.explained_variance_ratio_, rtol=1e-6, atol=1e-8)
    assert ours.tokens == 300 and (ours.rows.gather(1, ours.rows.abs().argmax(1, keepdim=True)) > 0).all()


LQ = RowForm(3, 16, scales="whole", scale_bits=8, group=16, top="bf16")


def lq_as_the_authors_write_it(a, form, ranks, fisher=None, turns=100):
    """LQ-LoRA's lowrank_quantized_sparse_decomposition and weighted_svd_decomposition ("two-sided") without sketches."""
    fisher = torch.ones_like(a) if fisher is None else fisher
    w1, w2 = fisher.mean(dim=1, keepdim=True).sqrt(), fisher.mean(dim=0, keepdim=True).sqrt()
    q, last = torch.zeros_like(a), torch.inf
    for _ in range(turns):
        u, s, vt = torch.linalg.svd(w1 * (a - q) * w2, full_matrices=False)
        root = s.sqrt()
        l1, l2 = (u * root)[:, :ranks] / w1, (vt * root[:, None])[:ranks] / w2
        q = decode_rows(encode_rows(a - l1 @ l2, form), a.size(1), form)
        error = (fisher.sqrt() * (a - (l1 @ l2 + q))).norm()
        if error > last:
            break
        last = error
    return l1 @ l2, q


@pytest.mark.parametrize("weighed", [False, True])
@pytest.mark.parametrize("form", [NF4, LQ], ids=["nf4", "3 bits"])
def test_lq_is_that_of_the_authors(form, weighed):
    """And the errors that forms are chosen by are those of a first turn, of squared gradients of any size."""
    w = matrix(24, 64)
    fisher = matrix(24, 64, 5).square() * torch.linspace(0.1, 4, 24)[:, None] * 1e-20 if weighed else None
    for turns in (1, 3):
        ours = lq(w, form, 4, 2.0, 1, fisher, most=turns)
        product, rest = lq_as_the_authors_write_it(w, form, 4, fisher, turns)
        torch.testing.assert_close(2.0 * ours.b @ ours.a, product, rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(decode_rows(ours.packed, 64, form), rest, rtol=1e-3, atol=1e-6)
        if turns == 1:
            left = (w - product - rest).double().square() * (1 if fisher is None else fisher.double())
            assert first_errors(w, [form], 4, 1, fisher) == pytest.approx([left.sum().item()], rel=1e-3)


def test_numbers_that_count_nothing_leave_lq_finite():
    """A row and a column without a gradient; and none at all is refused."""
    w, fisher = matrix(24, 64), matrix(24, 64, 5).square()
    fisher[3], fisher[:, 9] = 0, 0
    ours = lq(w, LQ, 4, 1.0, 1, fisher)
    assert ours.a.isfinite().all() and ours.b.isfinite().all() and ours.error < 1
    for nothing in (torch.zeros(24, 64), fisher * torch.inf):
        with pytest.raises(ValueError, match="its gradients are zero, or not finite"):
            lq(w, LQ, 4, 1.0, 1, nothing)


def test_lq_leaves_less_than_rounding_alone_also_by_sketches():
    w = matrix(200, 256)
    for form in (NF4, LQ):
        rounded = (decode_rows(encode_rows(w, form), 256, form) - w).norm() / w.norm()
        sketched = lq(w, form, 8, 1.0, 7, most=6)
        assert sketched.error < 0.95 * rounded
        whole = lq_as_the_authors_write_it(w, form, 8, turns=6)
        assert sketched.error == pytest.approx(((w - sum(whole)).norm() / w.norm()).item(), rel=0.02)


def test_forms_are_those_of_least_error_under_the_budget():
    """Against every choice that there is."""
    matrices = [matrix(4, 64, i) * (1 + i) for i in range(3)]
    some = FORMS[::5]
    bits = torch.tensor([[bits_of(w.shape, form) for form in some] for w in matrices])
    costs = torch.stack(
        [torch.stack([(decode_rows(encode_rows(w, f), 64, f) - w).square().sum() for f in some]) for w in matrices]
    )
    for budget in (3.5, 5.0, 6.5):
        most = budget * 3 * 4 * 64
        ways = list(itertools.product(range(len(some)), repeat=3))
        allowed = [way for way in ways if sum(bits[i, j] for i, j in enumerate(way)) <= most]
        best = min(sum(costs[i, j] for i, j in enumerate(way)) for way in allowed)
        assert len(allowed) < len(ways)
        chosen = choose(costs, bits, most)
        assert tuple(chosen) in allowed
        assert sum(costs[i, j] for i, j in enumerate(chosen)) <= best * (1 + 1e-5)
    with pytest.raises(ValueError, match="give more"):
        choose(costs, bits, 1.0 * 3 * 4 * 64)


def test_triplets_are_those_of_peft():
    """PEFT's RankAllocator over twelve steps of random gradients: averages, budgets, and which values are 0."""
    from peft import AdaLoraConfig
    from peft.tuners.adalora.layer import RankAllocator

    torch.manual_seed(3)
    names = ("lora_A", "lora_B", "lora_E")
    model = torch.nn.ModuleDict()
    for layer in ("x", "y"):
        parts = {"lora_A": torch.randn(4, 9), "lora_B": torch.randn(7, 4), "lora_E": torch.randn(4, 1)}
        model[layer] = torch.nn.ModuleDict({name: torch.nn.ParameterDict({"default": p}) for name, p in parts.items()})
    config = AdaLoraConfig(init_r=4, target_r=2, tinit=2, tfinal=3, deltaT=2, total_step=12, beta1=0.8, beta2=0.7)
    theirs = RankAllocator(model, config, "default")
    ours = {name: p.data.clone() for name, p in model.named_parameters()}
    avg, unc = ({name: torch.zeros_like(p) for name, p in ours.items()} for _ in range(2))
    budget = Budget(8, 4, 2, 3, 2, 12)
    for step in range(12):
        for name, p in model.named_parameters():
            p.grad = torch.randn_like(p)
            with torch.no_grad():
                p -= 0.1 * p.grad
            ours[name] -= 0.1 * p.grad
        grads = [p.grad for p in model.parameters()]
        if budget.learns(step):
            move_importance_(list(avg.values()), list(unc.values()), list(ours.values()), grads, 0.8, 0.7)
        count, chosen = budget.at(step)
        assert (count, chosen) == theirs.budget_schedule(step)
        theirs.update_and_allocate(model, step)
        if chosen:
            s = {name: avg[name] * unc[name] for name in avg}
            a, b, e = ([s[f"{layer}.{name}.default"] for layer in ("x", "y")] for name in names)
            scores = torch.cat([e_.flatten() + a_.mean(1) + b_.mean(0) for a_, b_, e_ in zip(a, b, e, strict=True)])
            stay = kept(scores, count)
            assert stay.sum() == count
            for layer, mask in zip(("x", "y"), stay.split(4), strict=True):
                ours[f"{layer}.lora_E.default"].mul_(mask[:, None])
        for name, p in model.named_parameters():
            torch.testing.assert_close(ours[name], p.data)


@pytest.mark.parametrize("rank", [4, 7, 21])
def test_bone_is_that_of_peft(rank):
    """Outputs, gradients of the block, and the merged matrix; 21 columns are no multiple of 4."""
    w, x = matrix(6, 21, std=1.0), matrix(10, 21, 1, 1.0).view(2, 5, 21)
    theirs = peft.get_peft_model(Holder(w), peft.MissConfig(r=rank, target_modules=["linear"])).base_model.model.linear
    ours = BoneLinear(Holder(w).linear, Bone(rank=rank))
    block = matrix(rank, 6, 2, 1.0)
    ours.bone.data, theirs.miss_block["default"].data = block.clone(), block.clone()
    y, right = ours(x), theirs(x)
    torch.testing.assert_close(y, right, rtol=1e-5, atol=1e-5)
    y.square().sum().backward()
    right.square().sum().backward()
    torch.testing.assert_close(ours.bone.grad, theirs.miss_block["default"].grad, rtol=1e-5, atol=1e-4)
    whole = theirs.get_delta_weight_miss("default", w.clone())
    torch.testing.assert_close(w + unfolded(block, 21), whole.data)
