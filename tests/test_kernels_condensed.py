"""Layers of constant fan-in: condensed and expanded again, multiplied as dense ones are, Triton as torch. (Law 1.)"""

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

from interpreter import interpreted
from rowwise.kernels import condensed as module
from rowwise.kernels.condensed import condense, condensed, condensed_linear, csr_multiplies, expand
from rowwise.trainer.models.condensed import CondensedLinear

# out, in, non-zeros of a row, ablated rows
LAYERS = [(1, 1, 1, 0), (1, 9, 1, 0), (5, 7, 3, 0), (33, 65, 17, 9), (17, 300, 300, 1), (130, 257, 26, 40)]
BATCHES = [(), (1,), (2,), (3, 5), (0, 4), (1, 17), (65,), (2, 67)]  # from one vector to three bags
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# Of the norm: sums of one order or another in float32, and rounded once.
TOLERANCE = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}


def constant_fan_in(rows: int, columns: int, k: int, ablated: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A weight whose rows have k non-zeros, but for `ablated` of them, which have none."""
    torch.manual_seed(rows + columns + k)
    w = torch.zeros(rows, columns, dtype=torch.float64)
    for row in torch.randperm(rows)[ablated:]:
        w[row, torch.randperm(columns)[:k]] = torch.rand(k, dtype=torch.float64) + 0.5
    return (w * torch.randn(rows, 1, dtype=torch.float64).sign()).to(dtype)


def relative(found: Tensor, expected: Tensor) -> float:
    return ((found.double() - expected).norm() / expected.norm().clamp_min(1e-300)).item()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layer", LAYERS)
def test_condensed_and_expanded_is_the_same(layer, dtype):
    w = constant_fan_in(*layer, dtype)
    c = condense(w)
    assert c.values.shape == c.columns.shape == (layer[0] - layer[3], layer[2])
    assert (c.rows is None) == (layer[3] == 0) and c.columns.dtype == torch.int32 and c.values.dtype == dtype
    assert (c.columns.diff(dim=1) > 0).all()
    assert torch.equal(expand(c), w)
    again = condensed(c.values, c.columns.long(), None if c.rows is None else c.rows.long(), c.shape)
    assert torch.equal(expand(again), w) and torch.equal(again.starts, c.starts)


@pytest.mark.parametrize("way", ["mkl", "no mkl"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layer", LAYERS)
def test_the_formula(layer, dtype, way, monkeypatch):
    if way == "no mkl":
        monkeypatch.setattr(module, "csr_multiplies", lambda: False)
    elif not csr_multiplies():
        pytest.skip("this torch has no MKL")
    w = constant_fan_in(*layer, dtype)
    c = condense(w)
    for batch in BATCHES:
        x = torch.randn(*batch, layer[1], dtype=torch.float64).to(dtype)
        y, expected = condensed_linear(x, c), x.double() @ w.double().t()
        assert y.shape == (*batch, layer[0]) and y.dtype == dtype
        assert relative(y, expected) <= TOLERANCE[dtype], batch
        assert (y[..., (w == 0).all(1)] == 0).all()


def test_inputs_in_any_layout():
    w = constant_fan_in(33, 65, 17, 9)
    for batch in (1, 5, 70):
        x = torch.randn(65, 2 * batch).t()[::2]
        assert relative(condensed_linear(x, condense(w)), x.double() @ w.double().t()) <= 1e-6
        wide = torch.randn(batch, 130)[:, ::2]
        assert relative(condensed_linear(wide, condense(w)), wide.double() @ w.double().t()) <= 1e-6


def test_a_row_with_fewer_non_zeros_is_filled_with_zeros_of_its_own():
    w = constant_fan_in(12, 40, 8, 3)
    live = w.count_nonzero(dim=1).nonzero().view(-1)
    w[live[0], w[live[0]].nonzero().view(-1)[2:5]] = 0
    w[live[4], w[live[4]].nonzero().view(-1)[:7]] = -0.0
    c = condense(w)
    assert c.values.shape == (9, 8) and (c.values == 0).sum() == 10
    assert all(len(row.unique()) == 8 for row in c.columns)
    assert torch.equal(expand(c), w)
    for batch in (1, 3, 20):
        x = torch.randn(batch, 40)
        assert relative(condensed_linear(x, c), x.double() @ w.double().t()) <= 1e-6


def test_a_matrix_of_zeros():
    c = condense(torch.zeros(5, 7))
    assert c.values.shape == (0, 0) and len(c.rows) == 0
    assert torch.equal(expand(c), torch.zeros(5, 7))
    for batch in ((), (1,), (2, 30)):
        assert torch.equal(condensed_linear(torch.randn(*batch, 7), c), torch.zeros(*batch, 5))


def test_many_rows_go_in_portions(monkeypatch):
    monkeypatch.setattr("rowwise.kernels.portions.ELEMENTS", 100)
    monkeypatch.setattr(module, "csr_multiplies", lambda: False)
    w, x = constant_fan_in(130, 257, 26, 40), torch.randn(257)
    assert torch.equal(expand(condense(w)), w)
    assert relative(condensed_linear(x, condense(w)), x.double() @ w.double().t()) <= 1e-6


def test_refusals():
    uneven = torch.triu(torch.ones(9, 9))
    with pytest.raises(ValueError, match=r"from 1 to 9 non-zeros, 5\.0 on average.*constant fan-in.*sparsity=srigl"):
        condense(uneven)
    c = condense(constant_fan_in(5, 7, 3, 2))
    for x in (torch.randn(3, 8), torch.randn(7, dtype=torch.float64)):
        with pytest.raises(ValueError, match=r"the layer has 7 inputs in torch\.float32"):
            condensed_linear(x, c)
    x = torch.randn(2, 7, requires_grad=True)
    with pytest.raises(ValueError, match="for inference"):
        condensed_linear(x, c)
    with torch.inference_mode():
        assert condensed_linear(x, c).shape == (2, 5)
    with pytest.raises(ValueError, match="reach from 0 to 7; possible are 0 to 6"):
        condensed(torch.ones(5, 2), torch.tensor([[0, 7]] * 5), None, torch.Size((5, 7)))
    with pytest.raises(ValueError, match=r"columns \(4, 2\), and 5 rows"):
        condensed(torch.ones(5, 2), torch.zeros(4, 2, dtype=torch.int32), None, torch.Size((5, 7)))
    with pytest.raises(ValueError, match="rows do not ascend"):
        condensed(torch.ones(2, 2), torch.zeros(2, 2, dtype=torch.int32), torch.tensor([3, 1]), torch.Size((5, 7)))


def small_model() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(65, 33), nn.SiLU(), nn.Linear(33, 12, bias=False), nn.Linear(12, 3))
    model[0].weight.data = constant_fan_in(33, 65, 17, 9)
    model[2].weight.data = constant_fan_in(12, 33, 5, 0)
    return model


def condense_(model: nn.Sequential) -> None:
    for i in (0, 2):
        bias = model[i].bias
        model[i] = CondensedLinear(condense(model[i].weight.detach()), None if bias is None else bias.detach())


def test_a_condensed_model_gives_the_same():
    model, x = small_model(), torch.randn(4, 6, 65)
    expected = model.double()(x.double())
    condense_(model.float())
    assert [isinstance(model[i], CondensedLinear) for i in (0, 2, 3)] == [True, True, False]
    assert "in_features=65, out_features=33, fan_in=17, ablated=9, bias=True" in repr(model)
    assert relative(model(x), expected) <= 1e-6
    fresh = small_model()
    condense_(fresh)
    state = model.state_dict()
    assert {"0.values", "0.columns", "0.rows", "0.bias", "2.values", "2.columns"} <= state.keys()
    fresh.load_state_dict({name: torch.zeros_like(t) for name, t in state.items()})
    assert not fresh(x).any()
    fresh.load_state_dict(state)
    assert torch.equal(fresh(x), model(x))
    assert relative(model.bfloat16()(x.bfloat16()), expected) <= 2e-2


@pytest.mark.parametrize("batch", [1, 3, 40])
def test_a_layer_multiplies_by_the_buffers_that_it_has_now(batch):
    """Whatever it keeps of them from one call to the next."""
    torch.manual_seed(0)
    one, other = constant_fan_in(33, 65, 17, 9), constant_fan_in(33, 65, 17, 9).roll(1, 0)
    layers = [CondensedLinear(condense(w), None) for w in (one, other)]
    layer, x = layers[0], torch.randn(batch, 65)
    with torch.inference_mode():
        assert relative(layer(x), x.double() @ one.double().t()) <= 1e-6
    twin = copy.deepcopy(layer)
    layer.load_state_dict(layers[1].state_dict())
    assert relative(layer(x), x.double() @ other.double().t()) <= 1e-6
    assert relative(twin(x), x.double() @ one.double().t()) <= 1e-6
    twin.load_state_dict(layers[1].state_dict(), assign=True)
    assert relative(twin(x), x.double() @ other.double().t()) <= 1e-6
    assert relative(twin.double()(x.double()), x.double() @ other.double().t()) <= 1e-14
    assert relative(pickle.loads(pickle.dumps(layer))(x), x.double() @ other.double().t()) <= 1e-6


def agree():
    from rowwise.kernels.condensed_triton import condensed_linear_triton

    for layer in LAYERS:
        for dtype in (torch.float32, torch.bfloat16):
            w = constant_fan_in(*layer, dtype)
            for batch in (1, 2, 65):
                x = torch.randn(batch, layer[1]).to(dtype)
                y = condensed_linear_triton(x, condense(w))
                assert y.shape == (batch, layer[0]) and y.dtype == dtype
                tolerance = 2 * TOLERANCE[dtype]  # the interpreter cuts bfloat16 off where a GPU rounds it
                assert relative(y, x.double() @ w.double().t()) <= tolerance, (layer, dtype, batch)


def test_triton_agrees_with_torch():
    interpreted("test_kernels_condensed", "agree")
