"""Every rule with second moments in 8 bits moves no weight further than with 32, whatever the gradients are."""

import pytest
import torch
from test_kernels_moment_pair import ALLOWED
from torch import nn

from rowwise.kernels.blockwise import code_table
from rowwise.kernels.spec import ParameterSpec
from rowwise.optim.adamw import AdamWConfig
from rowwise.optim.build import build_optimizer
from rowwise.optim.common import Assign
from rowwise.optim.lowrank.config import ApolloConfig, DCTConfig, FiraConfig, GaLoreConfig
from rowwise.optim.quantized import AdamW8bitConfig

LOW = {"rank": 8, "refresh_every": 4}
EMBEDDING = [Assign(match="embed.*", rule="adamw8bit")]
RULES = {
    "adamw8bit": (AdamW8bitConfig(), AdamWConfig()),
    "embedding": (AdamWConfig(assign=EMBEDDING), AdamWConfig()),
    **{
        config.name: (config(state_bits=8, **LOW), config(state_bits=32, **LOW))
        for config in (GaLoreConfig, DCTConfig, FiraConfig, ApolloConfig)
    },
}
ROWS, COLUMNS, STEPS = 512, 16, 16


class Weights(nn.Module):
    """A matrix inside the model and an embedding."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(ROWS, COLUMNS)
        self.hidden = nn.Linear(COLUMNS, ROWS, bias=False)
        for p in self.parameters():
            nn.init.zeros_(p)

    def parameter_specs(self):
        return {
            "embed.weight": ParameterSpec(self.embed.weight.shape, "embedding"),
            "hidden.weight": ParameterSpec(self.hidden.weight.shape, "hidden"),
        }


def kinds(seed):
    """Gradients (steps, rows, columns): what 32 bits forgive and 8 may not."""
    draw = torch.Generator().manual_seed(seed)
    shape, step = (STEPS, ROWS, COLUMNS), torch.arange(STEPS)[:, None, None]
    noise = 1e-2 * torch.randn(shape, generator=draw)
    scales = torch.tensor([0, 0, 1e-12, 1e-8, 1e-4, 1, 1e4])

    def scaled(*lengths):
        return noise * scales[(7 * torch.rand(lengths, generator=draw)).long()]

    return {
        "one gradient": noise * (step == 0),
        "a step without tokens": noise * (step % 5 != 3),
        "absent tokens": noise * (torch.rand(STEPS, ROWS, 1, generator=draw) < 0.2),
        "steps of any scale": scaled(STEPS, 1, 1),
        "rows of any scale": scaled(STEPS, ROWS, 1),
        "columns of any scale": noise * 10 ** (-6 * torch.rand(1, 1, COLUMNS, generator=draw)),
        "weights of any scale": noise * 10 ** (-6 * torch.rand(shape[1:], generator=draw)),
    }


def changes(config, gradients):
    """The largest change of a weight at each step, of all matrices."""
    model, largest = Weights(), []
    optimizer = build_optimizer(model, config)
    for g in gradients:
        before = [p.detach().clone() for p in model.parameters()]
        for p in model.parameters():
            p.grad = g.clone()
        optimizer.step()
        largest.append(max((p.detach() - x).abs().max() for p, x in zip(model.parameters(), before, strict=True)))
    return torch.stack(largest)


@pytest.mark.parametrize("rule", RULES)
def test_eight_bits_move_no_weight_further_than_32(rule):
    eight, plain = RULES[rule]
    assert any(".codes" in key for state in build_optimizer(Weights(), eight).state.values() for key in state)
    for kind, gradients in kinds(seed=5).items():
        ours, theirs = (changes(config, gradients).cummax(0).values for config in (eight, plain))
        assert theirs[-1] > 0 and (ours <= ALLOWED * theirs).all(), (kind, (ours / theirs).max())


def test_no_step_makes_the_tables_that_codes_are_looked_up_in():
    """They stay for the process, and what a step holds is what any step does."""
    code_table.cache_clear()
    model = Weights()
    optimizer = build_optimizer(model, AdamW8bitConfig())
    made = code_table.cache_info().misses
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert made == code_table.cache_info().misses == 2
