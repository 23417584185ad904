"""What an adapter cannot be for the matrices of a model, and what it does not go with."""

from rowwise.conf.refusal import Refusal, Refusals
from rowwise.kernels.spec import Specs
from rowwise.optim.build import FROZEN, fold
from rowwise.trainer.adapters.config import AdapterConfig, Bone, Dora, Lora, NoAdapter
from rowwise.trainer.adapters.specs import is_adapted, matching

ADAPTED: Refusals = (
    Refusal(
        ("adapter.name", "parallel.backend"),
        lambda run: run.adapter.name != "none" and run.parallel.backend != "torch",
        "adapter={adapter.name} with parallel.backend={parallel.backend}: its engine knows no adapters; give parallel.backend=torch, "
        "or adapter=none",
    ),
    Refusal(
        ("optim.assign", "parallel.backend"),
        lambda run: run.parallel.backend != "torch" and any(one.rule == FROZEN for one in run.optim.assign),
        "optim.assign freezes parameters with parallel.backend={parallel.backend}, whose engine has all of them learn; give "
        "parallel.backend=torch, or freeze none",
    ),
)


def check_adapter(config: AdapterConfig, specs: Specs) -> None:
    """Refuses numbers that no adapter can have, and patterns that match nothing of a model with these specs. Raises ValueError."""
    if isinstance(config, NoAdapter):
        return
    hidden = [name for name, spec in specs.items() if spec.role == "hidden"]
    for pattern in config.layers:
        if not any(matching([pattern])(name) for name in hidden):
            raise ValueError(
                f"adapter.layers: no hidden matrix matches {pattern!r}; there are {', '.join(sorted(fold(hidden)))}"
            )
    if not config.layers:
        raise ValueError('adapter.layers is empty; give patterns such as ["*.attention.*"], or adapter=none')
    for pattern in config.train:
        found = [name for name in specs if matching([pattern])(name)]
        if not found:
            raise ValueError(
                f"adapter.train: no parameter matches {pattern!r}; there are {', '.join(sorted(fold(specs)))}"
            )
        if both := [name for name in found if is_adapted(name, specs[name], config)]:
            raise ValueError(
                f"adapter.train: {both[0]} has the adapter beside it, and learns by that alone; leave it out of adapter.train, or "
                "out of adapter.layers"
            )
    for name, spec in specs.items():
        if is_adapted(name, spec, config) and len(spec.shape) != 2:
            raise ValueError(
                f"adapter.layers: {name}, {tuple(spec.shape)}, is no matrix of a linear layer; leave it out of adapter.layers"
            )
    if isinstance(config, Lora | Dora):
        _check_lora(config, specs)
    if isinstance(config, Bone):
        _check_bone(config, specs)


def _check_bone(config: Bone, specs: Specs) -> None:
    for name, spec in specs.items():
        if is_adapted(name, spec, config) and not 1 <= config.rank <= spec.shape[1]:
            raise ValueError(
                f"adapter.rank={config.rank}: it is at least 1, and at most the columns of {name}, {tuple(spec.shape)}; give 1 to "
                f"{spec.shape[1]}, or leave it out of adapter.layers"
            )


def _check_lora(config: Lora | Dora, specs: Specs) -> None:
    for name, spec in specs.items():
        if is_adapted(name, spec, config) and not 1 <= config.rank <= min(spec.shape):
            raise ValueError(
                f"adapter.rank={config.rank}: it is at least 1, and at most the narrow side of {name}, {tuple(spec.shape)}; give "
                f"1 to {min(spec.shape)}, or leave it out of adapter.layers"
            )
    if config.alpha <= 0 or config.b_lr_ratio <= 0:
        raise ValueError(
            f"adapter.alpha={config.alpha} adapter.b_lr_ratio={config.b_lr_ratio}: both are above 0 (alpha=rank multiplies by 1)"
        )
    if not 0 <= config.dropout < 1:
        raise ValueError(f"adapter.dropout={config.dropout}: the share that is dropped, at least 0 and below 1")
