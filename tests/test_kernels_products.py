"""Products in parts that have no more bits than TF32, and why Muon's polynomial needs them."""

import pytest
import torch

from parity import relative_error
from rowwise.kernels import products
from rowwise.kernels.products import float32_products, product, three_products, to_tf32
from rowwise.optim.muon import newton_schulz_polynomial
from rowwise.parallel.precision import Bf16, Fp32, product_precision


def test_what_is_rounded_is_the_nearest_number_of_11_bits():
    x = torch.tensor([1.0, 1 + 2**-11, 1 + 3 * 2**-11, -(1 + 2**-10 + 2**-12), 0.0, 2.0**-130])
    assert to_tf32(x).tolist() == [1.0, 1.0, 1 + 2**-9, -(1 + 2**-10), 0.0, 2.0**-130]
    torch.manual_seed(0)
    x = torch.randn(1000)
    assert float(((to_tf32(x) - x) / x).abs().max()) <= 2**-11
    assert torch.equal(to_tf32(to_tf32(x)), to_tf32(x))


def test_parts_have_all_but_two_of_the_bits():
    torch.manual_seed(0)
    a, b = torch.randn(3, 40, 70), torch.randn(3, 70, 50)
    exact = a.double() @ b.double()
    assert relative_error(three_products(a, b).double(), exact) < 2**-21
    assert relative_error((to_tf32(a) @ to_tf32(b)).double(), exact) > 2**-14, "one TF32 product has not"


def spread(rows, columns, decades):
    """A matrix whose singular values are spread evenly over so many powers of ten."""
    torch.manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(n, columns, dtype=torch.float64)).Q for n in (rows, columns))
    return left @ torch.diag(10 ** -torch.linspace(0, decades, columns, dtype=torch.float64)) @ right.T


def test_the_polynomial_is_as_good_as_in_float32_and_not_by_one_tf32_product(monkeypatch):
    """As a GPU would compute it: each product in TF32, of the parts or of the operands themselves."""
    x = spread(300, 100, 6)
    exact = x @ newton_schulz_polynomial(x.T @ x)

    def error(multiply):
        monkeypatch.setattr("rowwise.optim.muon.product", multiply)
        wide = x.float()
        return relative_error(multiply(wide, newton_schulz_polynomial(multiply(wide.T, wide))).double(), exact)

    in_full = error(torch.matmul)
    assert in_full < 5e-4
    assert error(three_products) < 2 * in_full
    assert error(lambda a, b: to_tf32(a) @ to_tf32(b)) > 50 * in_full


def test_float32_on_a_gpu_multiplies_by_tensor_cores_unless_told_not_to(monkeypatch):
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    assert product_precision(Fp32(), gpu) == "high" and product_precision(Fp32(), cpu) == "highest"
    assert product_precision(Fp32(tf32=False), gpu) == "highest" and product_precision(Bf16(), gpu) == "highest"
    with float32_products("high"):
        assert torch.get_float32_matmul_precision() == "high"
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float32])
def test_elsewhere_a_product_is_torchs_own(dtype, monkeypatch):
    monkeypatch.setattr(products, "three_products", None)
    a, b = torch.ones(2, 3, dtype=dtype), torch.ones(3, 4, dtype=dtype)
    assert torch.equal(product(a, b), a @ b)
