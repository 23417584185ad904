"""The layers of a run that prune their weights n:m as they compute, and which of them multiply in the hardware's form."""

import logging
from collections.abc import Callable
from pathlib import Path

import torch

from rowwise.kernels.semi_structured import measure_semi_structured, semi_structured_problem
from rowwise.optim.sparse.config import NM, sparse_layers
from rowwise.parallel.mesh import Mesh
from rowwise.parallel.objects import from_rank_0
from rowwise.parallel.precision import compute_dtype
from rowwise.trainer.config import TrainConfig
from rowwise.trainer.files import from_json, to_json, write_whole
from rowwise.trainer.models.decoder import Decoder, parameter_specs
from rowwise.trainer.models.nm import use_nm

GAINS_FILE = "semi_structured.json"
Gain = tuple[torch.Size, float]  # of a matrix of that shape: how many times faster
log = logging.getLogger(__name__)


def prune_groups(stages: list[Decoder], config: TrainConfig, mesh: Mesh) -> None:
    """Makes the layers that N:M sparsity names prune their weights as they compute."""
    choice, specs = config.sparsity, parameter_specs(config.model)
    if not isinstance(choice, NM):
        return
    names = sparse_layers(choice, specs)
    fast = faster_shapes(config, mesh) if choice.semi_structured else set()
    for semi_structured in (False, True):
        some = {name for name in names if (specs[name].shape in fast) == semi_structured}
        for stage in stages:
            use_nm(stage, some, choice.n, choice.m, choice.backward, semi_structured)


def check_semi_structured(config: TrainConfig, device: torch.device) -> None:
    """Refuses the hardware's 2:4 form where this device has none of it for a shape. Raises ValueError."""
    choice = config.sparsity
    if isinstance(choice, NM) and choice.semi_structured:
        for shape in shapes_of(config):
            if problem := semi_structured_problem(device, compute_dtype(config.precision), choice.n, choice.m, shape):
                raise ValueError(f"sparsity.semi_structured: {problem}; give sparsity.semi_structured=false")


def shapes_of(config: TrainConfig) -> list[torch.Size]:
    """Lists the shapes of the sparse matrices, each once."""
    specs = parameter_specs(config.model)
    return sorted({specs[name].shape for name in sparse_layers(config.sparsity, specs)})


def faster_shapes(config: TrainConfig, mesh: Mesh) -> set[torch.Size]:
    """Returns the shapes whose products rank 0 measures to be faster in the hardware's form than dense; the same on all ranks. What
    is measured once stays in the run directory, so that a resumed run computes as it did."""
    found: set[torch.Size] = set()
    if mesh.rank == 0:
        gains = kept_gains(Path(config.run_dir) / GAINS_FILE, lambda: measured_gains(config, mesh))
        for shape, gain in gains:
            log.warning("2:4 form of %s: %.2f times faster, %s", tuple(shape), gain, "used" if gain > 1 else "not used")
        found = {shape for shape, gain in gains if gain > 1}
    return from_rank_0(found, mesh.save_group)


def kept_gains(path: Path, measure: Callable[[], list[Gain]]) -> list[Gain]:
    """Returns what stands in the file; where nothing does, or it is damaged, which is said, what is measured now and kept there."""
    try:
        return [(torch.Size(shape), float(gain)) for shape, gain in from_json(path.read_bytes())]
    except FileNotFoundError:
        pass
    except (ValueError, TypeError) as error:
        log.warning("%s is damaged (%s): measured anew", path, error)
    gains = measure()
    write_whole(path, to_json(gains))
    return gains


def measured_gains(config: TrainConfig, mesh: Mesh) -> list[Gain]:
    """Measures (shape, how many times faster) for the tokens of this run's micro-batch."""
    assert isinstance(config.sparsity, NM)
    dtype, tokens = (
        compute_dtype(config.precision),
        config.batch.micro_size * config.batch.seq_len // mesh.sequence_degree,
    )
    measure = (tokens, dtype, mesh.device, config.sparsity.backward)
    return [(shape, measure_semi_structured(shape, *measure)) for shape in shapes_of(config)]
