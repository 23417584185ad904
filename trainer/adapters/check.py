"""What an adapter cannot be for the matrices of a model, and what it does not go with."""

import math
from dataclasses import replace

from rowwise.conf.refusal import Refusal, Refusals
from rowwise.kernels.spec import Specs
from rowwise.optim.build import FROZEN, fold
from rowwise.trainer.adapters.bits import FORMS, NAMED, bits_of
from rowwise.trainer.adapters.config import (
    FROM_DATA,
    OUT_OF_W,
    AdaLora,
    AdapterConfig,
    Bone,
    Lora,
    LoraBase,
    LowRankBase,
    LqLora,
    NoAdapter,
)
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
    Refusal(
        ("adapter.init", "adapter.init_from"),
        lambda run: getattr(run.adapter, "init", "kaiming") != "kaiming" and run.adapter.init_from is not None,
        "adapter.init={adapter.init} with adapter.init_from={adapter.init_from}: the folder says what A and B begin as; give "
        "adapter.init=kaiming, or adapter.init_from=null",
    ),
    Refusal(
        ("adapter.init_batches", "adapter.init"),
        lambda run: (
            run.adapter.name == "lora" and run.adapter.init not in FROM_DATA and _says(run.adapter, "init_batches")
        ),
        "adapter.init_batches={adapter.init_batches} with adapter.init={adapter.init}, which looks at no data; give adapter.init=eva "
        "or corda, or leave adapter.init_batches out",
    ),
    Refusal(
        ("adapter.init_batches", "adapter.fisher"),
        lambda run: run.adapter.name == "lq_lora" and not run.adapter.fisher and _says(run.adapter, "init_batches"),
        "adapter.init_batches={adapter.init_batches} with adapter.fisher=false, which looks at no data; give adapter.fisher=true, or "
        "leave adapter.init_batches out",
    ),
    Refusal(
        ("adapter.corda_mode", "adapter.init"),
        lambda run: run.adapter.name == "lora" and run.adapter.init != "corda" and _says(run.adapter, "corda_mode"),
        "adapter.corda_mode={adapter.corda_mode} with adapter.init={adapter.init}; give adapter.init=corda, or leave "
        "adapter.corda_mode out",
    ),
    Refusal(
        ("adapter.eva_rho", "adapter.init"),
        lambda run: run.adapter.name == "lora" and run.adapter.init != "eva" and _says(run.adapter, "eva_rho"),
        "adapter.eva_rho={adapter.eva_rho} with adapter.init={adapter.init}; give adapter.init=eva, or leave adapter.eva_rho out",
    ),
    Refusal(
        ("adapter.eva_rho",),
        lambda run: run.adapter.name == "lora" and not 1 <= run.adapter.eva_rho < math.inf,
        "adapter.eva_rho={adapter.eva_rho}: a matrix has at most so many times adapter.rank, at least 1, which shares nothing out",
    ),
    Refusal(
        ("adapter.ranks", "adapter.init"),
        lambda run: run.adapter.name == "lora" and run.adapter.init in OUT_OF_W and run.adapter.ranks is not None,
        "adapter.ranks with adapter.init={adapter.init}, which gives each matrix as much; give adapter.init=eva or kaiming, or "
        "adapter.ranks=null",
    ),
    Refusal(
        ("adapter.init_batches",),
        lambda run: getattr(run.adapter, "init_batches", 1) < 1,
        "adapter.init_batches={adapter.init_batches}: global batches that are looked at, at least 1",
    ),
    Refusal(
        ("adapter.name", "model.frozen_dtype"),
        lambda run: run.adapter.name == "lq_lora" and run.model.frozen_dtype is not None,
        "adapter=lq_lora with model.frozen_dtype={model.frozen_dtype}: its matrices are kept in the bits that adapter.bits asks for; "
        "give model.frozen_dtype=null, or adapter=lora",
    ),
    Refusal(
        ("adapter.name", "parallel.quantize_gather"),
        lambda run: run.adapter.name == "lq_lora" and run.parallel.quantize_gather != "none",
        "adapter=lq_lora with parallel.quantize_gather={parallel.quantize_gather}: what is frozen crosses in few bits already, and "
        "its bytes are no numbers to round; give parallel.quantize_gather=none, or adapter=lora",
    ),
    Refusal(
        ("adapter.start", "adapter.stop", "steps"),
        lambda run: run.adapter.name == "adalora" and not _in_order(run.adapter, run.steps),
        lambda run: (
            f"adapter.start={run.adapter.start} adapter.stop={run.adapter.stop} with steps={run.steps}: triplets go after step "
            f"{run.adapter.times(run.steps)[0]} and stay from step {run.adapter.times(run.steps)[1]} on; give steps or shares of "
            "the run with start below stop, and stop within the run"
        ),
    ),
    Refusal(
        ("adapter.name", "optim.in_backward"),
        lambda run: run.adapter.name == "adalora" and run.optim.in_backward,
        "adapter=adalora with optim.in_backward: importance needs gradients when all weights have taken them; give "
        "optim.in_backward=false, or adapter=lora",
    ),
    Refusal(
        ("adapter.name", "parallel.post_validation"),
        lambda run: run.adapter.name == "adalora" and run.parallel.post_validation,
        "adapter=adalora with parallel.post_validation: which triplets stay is chosen by all ranks, which one cannot take back alone; "
        "give parallel.post_validation=false, or adapter=lora",
    ),
    Refusal(
        ("adapter.name", "memory.offload_params"),
        lambda run: run.adapter.name == "adalora" and run.memory.offload_params != "none",
        "adapter=adalora with memory.offload_params={memory.offload_params}: importance is found where weights and gradients are both "
        "on the device; give memory.offload_params=none, or adapter=lora",
    ),
)


def _says(adapter: Lora | LqLora, key: str) -> bool:
    """Whether a key is otherwise than where nothing is said."""
    return bool(getattr(adapter, key) != getattr(type(adapter), key))


def _in_order(config: AdaLora, steps: int) -> bool:
    start, stop = config.times(steps)
    return 0 <= start < stop <= steps


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
    if isinstance(config, LowRankBase):
        _check_low_rank(config, specs)
    if isinstance(config, Lora) and config.ranks is not None:
        _check_ranks(config, specs)
    if isinstance(config, LoraBase) and config.b_lr_ratio <= 0:
        raise ValueError(f"adapter.b_lr_ratio={config.b_lr_ratio}: it is above 0; 1 is the learning rate of A")
    if isinstance(config, AdaLora):
        _check_adalora(config)
    if isinstance(config, LqLora):
        _check_lq(config, specs)
    if isinstance(config, Bone):
        _check_bone(config, specs)


def _check_bone(config: Bone, specs: Specs) -> None:
    for name, spec in specs.items():
        if is_adapted(name, spec, config) and not 1 <= config.rank <= spec.shape[1]:
            raise ValueError(
                f"adapter.rank={config.rank}: it is at least 1, and at most the columns of {name}, {tuple(spec.shape)}; give 1 to "
                f"{spec.shape[1]}, or leave it out of adapter.layers"
            )


def _check_low_rank(config: LowRankBase, specs: Specs) -> None:
    for name, spec in specs.items():
        if is_adapted(name, spec, config) and not 1 <= config.rank <= min(spec.shape):
            raise ValueError(
                f"adapter.rank={config.rank}: it is at least 1, and at most the narrow side of {name}, {tuple(spec.shape)}; give "
                f"1 to {min(spec.shape)}, or leave it out of adapter.layers"
            )
    if config.alpha <= 0:
        raise ValueError(f"adapter.alpha={config.alpha}: it is above 0 (alpha=rank multiplies by 1)")
    if not 0 <= config.dropout < 1:
        raise ValueError(f"adapter.dropout={config.dropout}: the share that is dropped, at least 0 and below 1")


def _check_ranks(config: Lora, specs: Specs) -> None:
    ranks, plain = config.ranks or {}, replace(config, ranks=None)
    shapes = {name: spec.shape for name, spec in specs.items() if is_adapted(name, spec, plain)}
    if apart := sorted(ranks.keys() ^ shapes.keys()):
        raise ValueError(
            f"adapter.ranks and adapter.layers say otherwise of {apart[0]}; give each matrix of adapter.layers a rank, or null"
        )
    for name, rank in ranks.items():
        if not 0 <= rank <= shapes[name][1]:
            raise ValueError(
                f"adapter.ranks: {name}, {tuple(shapes[name])}, has {rank}; give 0 (it has no adapter) to {shapes[name][1]}"
            )
    if not any(ranks.values()):
        raise ValueError("adapter.ranks: no matrix has any; give one of them 1 or more, or adapter=none")
    if config.init == "eva" and sum(ranks.values()) != config.rank * len(ranks):
        raise ValueError(
            f"adapter.ranks has {sum(ranks.values())} directions in all, and eva shares out adapter.rank={config.rank} for each of "
            f"{len(ranks)} matrices; give adapter.ranks=null to have them shared out anew"
        )


def _check_adalora(config: AdaLora) -> None:
    if not 1 <= config.target_rank <= config.rank:
        raise ValueError(
            f"adapter.target_rank={config.target_rank}: triplets of a matrix that are left, at least 1 and at most "
            f"adapter.rank={config.rank}"
        )
    if config.every < 1:
        raise ValueError(f"adapter.every={config.every}: steps between two choices of triplets, at least 1")
    if len(config.betas) != 2 or not all(0 < beta < 1 for beta in config.betas):
        raise ValueError(f"adapter.betas={config.betas}: two numbers between 0 and 1, such as [0.85, 0.85]")
    if config.orthogonality < 0:
        raise ValueError(f"adapter.orthogonality={config.orthogonality}: the weight of a penalty, at least 0")


def _check_lq(config: LqLora, specs: Specs) -> None:
    shapes = {name: spec.shape for name, spec in specs.items() if is_adapted(name, spec, config)}
    fewest = sum(min(bits_of(shape, form) for form in FORMS) for shape in shapes.values())
    fewest_of_each = fewest / sum(shape.numel() for shape in shapes.values())
    if config.bits < fewest_of_each:
        raise ValueError(
            f"adapter.bits={config.bits}: the forms of fewest bits take {math.ceil(fewest_of_each * 100) / 100} a number of these "
            "matrices, scales among them; give as many or more"
        )
    if config.forms is None:
        return
    if wrong := next((form for form in config.forms.values() if form not in NAMED), None):
        raise ValueError(f"adapter.forms: {wrong!r} is no form; possible are {', '.join(NAMED)}")
    if apart := sorted(config.forms.keys() ^ shapes.keys()):
        raise ValueError(
            f"adapter.forms and adapter.layers say otherwise of {apart[0]}; give each matrix of adapter.layers a form, or null"
        )
