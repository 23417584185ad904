"""memory.json: what every rank holds, by category, once its first step is made."""

from dataclasses import asdict, dataclass
from pathlib import Path

from torch import Tensor, nn

from rowwise.kernels.rows import local
from rowwise.optim.optimizer import Optimizer
from rowwise.parallel.mesh import Mesh
from rowwise.parallel.objects import from_every_rank
from rowwise.parallel.state_bytes import measure
from rowwise.trainer.files import to_json, write_whole
from rowwise.trainer.peaks import peak_memory_bytes


@dataclass(frozen=True)
class RankMemory:
    """Bytes of one rank before the gradients of a step are let go: its rows of the parameters and whole ones beside them;
    gradients; optimizer states; masks; and the most that the process has held (see `metrics.peak_memory_bytes`)."""

    parameters: int
    gradients: int
    optimizer: int
    masks: int
    peak: int


def keep_memory(run_dir: Path, mesh: Mesh, model: nn.Module, optimizer: Optimizer, tensors: dict[str, Tensor]) -> None:
    """Measures on every rank; rank 0 writes. One message of a few numbers a rank, over `mesh.save_group`."""
    held = measure(model, optimizer)
    masks = [local(tensor) for name, tensor in tensors.items() if name.startswith("sparsity.")]
    ours = RankMemory(
        parameters=held.shards + held.gathered,
        gradients=held.gradients,
        optimizer=held.optimizer,
        masks=sum(mask.numel() * mask.itemsize for mask in masks),
        peak=peak_memory_bytes(mesh.device),
    )
    everyone = from_every_rank(asdict(ours), mesh.save_group)
    if mesh.rank == 0:
        document = {"device": mesh.device.type, "ranks": everyone}
        write_whole(run_dir / "memory.json", to_json(document) + "\n")
