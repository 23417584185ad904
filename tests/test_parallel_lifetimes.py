"""What a step holds is told of every storage, though little is asked of each operation. (Law 4.)"""

import pytest
import torch
from torch import nn

from rowwise.parallel import lifetimes
from rowwise.parallel.lifetimes import Lifetimes

unsafe_view = torch.ops.aten._unsafe_view.default  # its schema does not say that it gives a view


def test_what_gives_its_arguments_or_views_of_them_makes_nothing():
    before = torch.ones(4, 4)
    with Lifetimes([], []) as lives:
        made = before + 1
        views = [unsafe_view(before, [16]), unsafe_view(made, [16]), before.t(), made.view(16), *made.split(2)]
        made.add_(1), torch.add(made, 1, out=before), torch._foreach_mul_([made], 2)
        one, other = torch.aminmax(made)
    assert len(views) == 6 and one < other + 1
    assert sorted(lives.at_the_peak()) == [("working", "aten::add.Tensor", 64, 1), ("working", "aten::aminmax", 8, 2)]
    assert lives.peaks()[0]["working"] == lives.peaks()[1] == 72


def test_a_gradient_that_a_hook_lets_go_at_once_was_one():
    p = nn.Parameter(torch.ones(8, 8))
    p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    with Lifetimes([], [p]) as lives:
        (p * torch.ones(8, 8)).sum().backward()
    assert lives.peaks()[0]["gradients"] == p.nbytes
    (p * 2).sum().backward()
    assert p.grad is None and lives.peaks()[0]["gradients"] == p.nbytes, "it looks no longer"


def test_a_put_off_gradient_that_is_widened_at_once_was_one(monkeypatch):
    """As a pipeline's W leaves the last weight's in 16 bits: it is set outside a backward, and gone with the next operation."""
    whole = nn.Parameter(torch.ones(8, 4))
    for name, value in {"sharded_modules": [whole], "fsdp_state": None, "fsdp_params": [whole], "gathered": whole,
                        "accumulated": None, "partial_sum": None}.items():  # fmt: skip
        monkeypatch.setattr(lifetimes, name, lambda _, value=value: value)
    with Lifetimes([nn.Linear(1, 1)], []) as lives:
        left, right = torch.ones(8, 8), torch.ones(8, 4)
        with torch.no_grad():
            whole.grad = left @ right
        wide = whole.grad.double()
        whole.grad = None
        torch.ones(1)
    assert wide.sum() and lives.peaks()[0]["gradients"] == whole.nbytes
    assert lives.peaks()[0]["gathered"] == whole.nbytes


def test_categories_have_their_own_peaks_and_all_together_theirs():
    with Lifetimes([], []) as lives:
        x = torch.ones(4, requires_grad=True)
        y = x * 2
        loss = (y * y).sum()  # kept for the backward: y
        loss.backward()
        del x, y, loss
        torch.ones(100)
    peaks, most = lives.peaks()
    assert peaks["working"] == most == 400 and 32 <= peaks["activations"] < 64
    assert sum(size for *_, size, _ in lives.at_the_peak()) == most


@pytest.mark.parametrize("error", [None, ValueError])
def test_no_hook_stays(error):
    p = nn.Parameter(torch.ones(2))
    try:
        with Lifetimes([], [p]):
            if error is not None:
                raise error
    except ValueError:
        pass
    assert not p._post_accumulate_grad_hooks
