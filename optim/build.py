"""Parameter names -> groups -> optimizer."""

import torch
from torch import Tensor, nn

from rowwise.optim.adamw import AdamW, AdamWConfig

OptimConfig = AdamWConfig
OPTIMIZERS: dict[str, type] = {"adamw": AdamWConfig}


def build_optimizer(model: nn.Module, config: OptimConfig) -> AdamW:
    """The optimizer of `config` over the model's (sharded) parameters: matrices decay, the rest does not."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    return AdamW(
        [
            {"params": matrices, "weight_decay": config.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ],
        config,
    )


def check_optimizer(config: OptimConfig) -> None:
    """Refuses numbers that no optimizer can use. Raises ValueError."""
    if config.lr <= 0:
        raise ValueError(f"optim.lr={config.lr}: a learning rate is above 0")
    if len(config.betas) != 2 or not all(0 <= beta < 1 for beta in config.betas):
        raise ValueError(f"optim.betas={list(config.betas)}: two numbers, each from 0 to below 1")
    if config.eps <= 0:
        raise ValueError(f"optim.eps={config.eps}: it is above 0")
    if config.weight_decay < 0:
        raise ValueError(f"optim.weight_decay={config.weight_decay}: it is at least 0")


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Sets the learning rate of every group."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def named_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Tensor]]:
    """parameter name -> state name -> tensor: tensors only, each split like its parameter, so that any layout can
    read what any other wrote."""
    return {name: dict(optimizer.state[p]) for name, p in model.named_parameters()}


def set_step(optimizer: torch.optim.Optimizer, step: int) -> None:
    """Sets how many updates have been made: a resumed optimizer goes on counting."""
    for group in optimizer.param_groups:
        group["step"] = step
