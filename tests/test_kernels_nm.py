"""N:M sparsity: pruning against a sort, Triton as torch, the layer's gradients as textbooks write them, now or later. (Law 1.)"""

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.sparse import SparseSemiStructuredTensorCUSPARSELT

from interpreter import interpreted
from rowwise.kernels import semi_structured
from rowwise.kernels.nm import decay_pruned_, nm_linear, nm_mask, prune_nm, prune_nm_reference
from rowwise.kernels.semi_structured import measure_semi_structured, semi_structured_linear, semi_structured_problem
from rowwise.parallel.defer import WeightGradients, deferred
from rowwise.trainer.models.nm import NMLinear, use_nm

SPARSITIES = [(1, 1), (1, 2), (2, 4), (1, 4), (4, 4), (3, 7), (3, 8), (2, 5), (9, 16)]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
LAYERS = [(2, 4, "row"), (2, 4, "column"), (1, 4, "column"), (2, 3, "row"), (1, 2, "column")]


def matrix(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """With ties, zeros of both signs, infinities and numbers that a sum would lose."""
    torch.manual_seed(rows + columns)
    w = torch.randn(rows, columns, dtype=torch.float64)
    w[torch.rand_like(w) < 0.4] = 0.5
    w[torch.rand_like(w) < 0.2] *= -1
    w[torch.rand_like(w) < 0.2] *= 1e-6
    w[torch.rand_like(w) < 0.2] = 0.0
    w[torch.rand_like(w) < 0.1] = -0.0
    w[torch.rand_like(w) < 0.02] = float("inf")
    return w.to(dtype)


def brute_mask(w: Tensor, n: int, m: int) -> Tensor:
    """Along the rows: sorted() is stable, so that the earlier of two equals comes first."""
    mask = []
    for row in w.abs().tolist():
        for first in range(0, len(row), m):
            best = sorted(range(m), key=lambda j, of=row[first : first + m]: -of[j])[:n]
            mask += [j in best for j in range(m)]
    return torch.tensor(mask, dtype=torch.bool).view(w.shape)


def brute_prune(w: Tensor, n: int, m: int, dim: int) -> Tensor:
    return torch.where(brute_mask(w, n, m), w, 0) if dim == 1 else brute_prune(w.t(), n, m, 1).t()


def bits(w: Tensor) -> Tensor:
    return w.clone(memory_format=torch.contiguous_format).view(torch.uint8)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "m"), SPARSITIES)
def test_pruning_is_what_a_sort_says(n, m, dtype):
    for rows, groups in ((0, 3), (1, 1), (3, 5), (7, 32)):
        w = matrix(rows, groups * m, dtype)
        assert torch.equal(bits(prune_nm(w, n, m, dim=1)), bits(brute_prune(w, n, m, 1)))
        assert torch.equal(nm_mask(w, n, m), brute_mask(w, n, m))
        columns = matrix(groups * m, rows, dtype)
        for w in (columns, columns.t().contiguous().t()):
            pruned = prune_nm(w, n, m, dim=0)
            assert pruned.is_contiguous() and torch.equal(bits(pruned), bits(brute_prune(w, n, m, 0)))


def test_many_portions_are_as_one():
    w = matrix(2044, 300, torch.float32)
    for dim in (0, 1):
        whole = prune_nm(w, 2, 4, dim)
        assert torch.equal(whole[1020:1028, 8:16], prune_nm(w[1020:1028, 8:16], 2, 4, dim))
        assert ((whole != 0).view(-1, 4, 300).sum(1) if dim == 0 else (whole != 0).view(-1, 4).sum(1)).max() == 2


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_is_above_all(dtype):
    nan, inf = float("nan"), float("inf")
    w = torch.tensor([[5, nan, 1, 2], [nan, 3, inf, 1], [1, nan, -nan, nan]], dtype=dtype)
    assert nm_mask(w, 2, 4).tolist() == [[1, 1, 0, 0], [1, 0, 1, 0], [0, 1, 1, 0]]


def test_the_decay_draws_what_is_pruned_to_zero():
    w, grad = matrix(6, 20, torch.float64).nan_to_num(posinf=3.0), torch.randn(6, 20, dtype=torch.float64)
    expected = grad + 0.3 * (w - prune_nm(w, 2, 4, 1))
    for rows in (slice(0, 4), slice(4, 6), slice(5, 5)):
        decay_pruned_(grad[rows], w[rows], 2, 4, 0.3)
    torch.testing.assert_close(grad, expected, rtol=0, atol=1e-15)


def test_the_decay_prunes_in_the_dtype_that_multiplies():
    w, grad = torch.tensor([[1.0, 1.0001, 0.0, 0.0]]), torch.zeros(1, 4)
    decay_pruned_(grad, w, 1, 4, 1.0, dtype=torch.bfloat16)
    assert grad.tolist() == [[0.0, w[0, 1].item(), 0.0, 0.0]]


def agree(full: bool):
    """Unless in full, each sparsity and each dtype meets every size, a sparsity and a dtype one of them."""
    from rowwise.kernels.nm_triton import nm_mask_triton, prune_nm_triton

    for i, (n, m) in enumerate(SPARSITIES):
        for j, dtype in enumerate(DTYPES):
            sizes = ((0, m), (3, 5 * m), (m, 7), (4 * m, 19 * m))
            for rows, columns in sizes if full else sizes[(i + j) % 4 :: 4]:
                w = matrix(rows, columns, dtype)
                if w.numel():
                    w[0, 0] = float("nan")
                for dim in (0, 1):
                    if w.size(dim) % m == 0:
                        ours, reference = (prune(w, n, m, dim) for prune in (prune_nm_triton, prune_nm_reference))
                        assert torch.equal(bits(ours), bits(reference)), (n, m, dtype, rows, columns, dim)
                if columns % m == 0:
                    assert torch.equal(nm_mask_triton(w, n, m), nm_mask(w, n, m))


def test_triton_agrees_with_torch(full):
    interpreted("test_kernels_nm", "agree", full)


def textbook(x: Tensor, w: Tensor, b: Tensor, dy: Tensor, n: int, m: int, backward: str) -> tuple[Tensor, ...]:
    """y, dx, dw, db."""
    row = brute_prune(w, n, m, 1)
    dx = torch.einsum("...o,oi->...i", dy, row if backward == "row" else brute_prune(w, n, m, 0))
    dw = torch.einsum("bo,bi->oi", dy.reshape(-1, dy.size(-1)), x.reshape(-1, x.size(-1)))
    return torch.einsum("...i,oi->...o", x, row) + b, dx, dw, dy.reshape(-1, dy.size(-1)).sum(0)


def operands(*leading: int) -> tuple[Tensor, nn.Parameter, nn.Parameter, Tensor]:
    torch.manual_seed(len(leading))
    x, dy = (torch.randn(*leading, size, dtype=torch.float64) for size in (24, 12))
    w, b = (nn.Parameter(torch.randn(*shape, dtype=torch.float64)) for shape in ((12, 24), (12,)))
    return x.requires_grad_(), w, b, dy


@pytest.mark.parametrize("later", [False, True])
@pytest.mark.parametrize("leading", [(1,), (5,), (2, 3), (2, 0), (2, 3, 4)])
@pytest.mark.parametrize(("n", "m", "backward"), LAYERS)
def test_the_layers_gradients(n, m, backward, leading, later):
    x, w, b, dy = operands(*leading)
    work = WeightGradients()
    with deferred(work) if later else nullcontext():
        y = nm_linear(x, w, b, n, m, backward)
    y.backward(dy)
    assert (w.grad is None) == later
    work.run()
    expected = textbook(x.detach(), w.detach(), b.detach(), dy, n, m, backward)
    for ours, its in zip((y, x.grad, w.grad, b.grad), expected, strict=True):
        torch.testing.assert_close(ours, its, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backward", ["row", "column"])
@pytest.mark.parametrize(("frozen", "later"), [("x", False), ("w", False), ("w", True), ("b", False), ("b", True)])
def test_only_the_gradients_that_are_wanted(frozen, backward, later):
    x, w, b, dy = operands(2, 3)
    expected = textbook(x.detach(), w.detach(), b.detach(), dy, 2, 4, backward)[1:]
    {"x": x, "w": w, "b": b}[frozen].requires_grad_(False)
    work = WeightGradients()
    with deferred(work) if later else nullcontext():
        y = nm_linear(x, w, b, 2, 4, backward)
    y.backward(dy)
    work.run()
    for each, its in zip((x, w, b), expected, strict=True):
        assert (each.grad is None) == (not each.requires_grad)
        if each.grad is not None:
            torch.testing.assert_close(each.grad, its, rtol=1e-12, atol=1e-12)


def test_it_takes_one_row_without_a_batch():
    x, w, b, _ = operands(1)
    row, rows = nm_linear(x[0], w, b, 2, 4, "row"), nm_linear(x, w, b, 2, 4, "row")
    for ours, its in zip(*(torch.autograd.grad(y.sum(), (x, w, b)) for y in (row, rows)), strict=True):
        torch.testing.assert_close(ours, its)


def test_it_keeps_no_pruned_copy():
    x, w, b, _ = operands(3)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        nm_linear(x, w, b, 2, 4, "column")
    assert {t.data_ptr() for t in kept} == {x.data_ptr(), w.data_ptr()}


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(8, 8)
        self.first, self.second = nn.Linear(8, 12), nn.Linear(12, 8, bias=False)
        self.last = nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.silu(self.second(F.silu(self.first(self.embed(x))))))


NAMES = {"first.weight", "second.weight", "another.stages.weight"}


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_layers_are_changed_under_their_parameters(device):
    with torch.device(device):
        model = Network().eval()
    before = dict(model.named_parameters())
    use_nm(model, NAMES, 2, 4, "column")
    after = dict(model.named_parameters())
    assert list(after) == list(before) and all(after[name] is before[name] for name in before)
    assert {name for name, module in model.named_modules() if isinstance(module, NMLinear)} == {"first", "second"}
    assert type(model.last) is nn.Linear and not model.first.training and model.second.bias is None
    assert (model.first.n, model.first.m, model.first.backward, model.first.in_features) == (2, 4, "column", 8)
    y = model(torch.zeros(3, dtype=torch.long, device=device))
    assert y.shape == (3, 6) and y.device.type == device


def gradients_of(model: nn.Module, run: nn.Module) -> list[Tensor]:
    model.zero_grad()
    loss = run(torch.arange(8).view(2, 4)).square().mean()
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters())]


def test_torch_compile_changes_nothing():
    torch.manual_seed(0)
    model = Network()
    use_nm(model, NAMES, 2, 4, "column")
    expected = gradients_of(model, model)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for ours, its in zip(gradients_of(model, compiled), expected, strict=True):
        torch.testing.assert_close(ours, its)
    torch.compiler.reset()


def test_refusals():
    w = torch.randn(6, 8)
    for n, m in ((0, 4), (5, 4), (-1, 2), (1, 0)):
        with pytest.raises(ValueError, match=rf"{n}:{m}.*1 <= n <= m"):
            prune_nm(w, n, m, 1)
    for call in (lambda: prune_nm(w, 2, 4, 0), lambda: nm_linear(w, w, None, 2, 4, "column")):
        with pytest.raises(ValueError, match=r"a column of \(6, 8\) has 6 elements"):
            call()
    with pytest.raises(ValueError, match=r"a row of \(6, 8\) has 8 elements"):
        nm_mask(w, 2, 3)
    with pytest.raises(ValueError, match="possible are 'row' and 'column'"):
        nm_linear(w, w, None, 2, 4, "rows")
    with pytest.raises(ValueError, match="not a matrix's"):
        nm_mask(w[0], 2, 4)
    with pytest.raises(ValueError, match="dim=-1"):
        prune_nm(w, 2, 4, -1)
    with pytest.raises(ValueError, match="parameter of Embedding"):
        use_nm(Network(), {"embed.weight"}, 2, 4, "row")
    with pytest.raises(ValueError, match=r"last.weight: a column of \(6, 8\)"):
        use_nm(Network(), {"last.weight"}, 2, 4, "column")
    with pytest.raises(ValueError, match="a row of"):
        NMLinear(6, 8, 2, 4, "row")


def test_hardware_that_is_not_here_is_refused():
    cpu = torch.device("cpu")
    problem = semi_structured_problem(cpu, torch.bfloat16, 2, 4)
    assert problem is not None and "NVIDIA GPU" in problem
    assert "2:4 alone" in semi_structured_problem(cpu, torch.bfloat16, 1, 4)
    assert "precision=bf16" in semi_structured_problem(cpu, torch.float32, 2, 4)
    assert "multiples of 16" in semi_structured_problem(cpu, torch.float16, 2, 4, (64, 40))
    w, x = torch.zeros(32, 64, dtype=torch.bfloat16), torch.zeros(3, 64, dtype=torch.bfloat16)
    for call in (
        lambda: semi_structured_linear(x, w),
        lambda: nm_linear(x, w, None, 2, 4, "row", semi_structured=True),
        lambda: measure_semi_structured((32, 64), 8, torch.bfloat16, cpu),
    ):
        with pytest.raises(ValueError, match=r"semi_structured: device cpu"):
            call()
    for other in (
        lambda: nm_linear(x, w, None, 1, 4, "row", semi_structured=True),
        lambda: use_nm(Network(), NAMES, 1, 2, "row", semi_structured=True),
    ):
        with pytest.raises(ValueError, match="2:4 alone"):
            other()


@pytest.mark.filterwarnings("ignore:The PyTorch API of SparseSemiStructuredTensor")
@pytest.mark.parametrize("backward", ["row", "column"])
def test_what_the_hardware_would_be_asked_to_multiply(backward, monkeypatch):
    """torch's own sparse tensor through torch's own dispatch; only its compression and its product are played here."""
    compressed = []

    def compress(w: Tensor) -> Tensor:
        assert w.is_contiguous() and (w.view(-1, 4) != 0).sum(1).max() <= 2
        compressed.append(tuple(w.shape))
        return SparseSemiStructuredTensorCUSPARSELT(w.shape, w, None, None, None, None)

    def product(
        s: Tensor, dense: Tensor, *, bias: Tensor | None = None, should_transpose_dense: bool = False
    ) -> Tensor:
        assert should_transpose_dense and dense.is_contiguous()
        return F.linear(dense, s.packed, bias)

    monkeypatch.setattr(semi_structured, "to_sparse_semi_structured", compress)
    monkeypatch.setattr(semi_structured, "_device_problem", lambda device: None)
    monkeypatch.setattr(SparseSemiStructuredTensorCUSPARSELT, "_mm", product)
    torch.manual_seed(0)
    x, w, b = (torch.randn(*shape).bfloat16().requires_grad_() for shape in ((2, 3, 64), (32, 64), (32,)))
    for bias in (b, None):
        results = []
        for semi in (False, True):
            y = nm_linear(x, w, bias, 2, 4, backward, semi)
            results.append([y, *torch.autograd.grad(y.square().sum(), (x, w))])
        for dense, sparse in zip(*results, strict=True):
            torch.testing.assert_close(sparse, dense)
    assert compressed == ([(32, 64)] if backward == "row" else [(32, 64), (64, 32)]) * 2


def test_what_torch_is_asked_for_exists():
    assert {torch.bfloat16, torch.float16} <= set(SparseSemiStructuredTensorCUSPARSELT._DTYPE_SHAPE_CONSTRAINTS)
    for name in ("_cslt_compress", "_cslt_sparse_mm"):
        assert hasattr(torch, name)
    assert callable(torch.backends.cusparselt.is_available)
    meta = torch.empty(2, 3, 64, dtype=torch.bfloat16, device="meta")
    assert semi_structured_linear(meta, meta.new_empty(32, 64)).shape == (2, 3, 32)


class Compressed:
    """A matrix that is multiplied as cuSPARSELt does it: the product comes as the transpose of one that is laid row by row."""

    def __init__(self, matrix):
        self.matrix = matrix

    def t(self):
        return Compressed(self.matrix.t())

    def __rmatmul__(self, rows):
        return (self.matrix.t() @ rows.t()).t()


def test_a_semi_structured_product_is_laid_out_as_the_compiler_was_told(monkeypatch):
    """torch.compile takes the strides from the operator's fake form."""
    monkeypatch.setattr(semi_structured, "to_sparse_semi_structured", Compressed)
    monkeypatch.setattr(semi_structured, "semi_structured_problem", lambda *_: None)
    x, pruned = torch.randn(2, 3, 8), torch.randn(5, 8)
    y = semi_structured_linear(x, pruned)
    torch.testing.assert_close(y, x @ pruned.t())
    with torch.device("meta"):
        told = semi_structured_linear(torch.empty(2, 3, 8), torch.empty(5, 8))
    assert y.stride() == told.stride()
