"""What ranks tell each other of the data they read, so that damage on one of them stops all, and is named.

At the start they compare what each has opened. In every step each reads one sample more, the same on all, and its digest
goes with the numbers of the step (`step.RankStatus`), as does what `data/watch.py` has found. Only where that is not sound
do they talk of it.
"""

import hashlib
import platform

from rowwise.parallel.mesh import Mesh
from rowwise.parallel.objects import from_every_rank, from_rank_0
from rowwise.trainer.config import TrainConfig
from rowwise.trainer.data.integrity import DataDamaged
from rowwise.trainer.data.open import Data, open_data


def try_data(config: TrainConfig) -> Data | DataDamaged:
    """Returns the data, or why this rank has none: the others are waiting to know."""
    try:
        return open_data(config.data, config.batch.seq_len, config.model.vocab_size)
    except (ValueError, OSError) as error:
        return DataDamaged(str(error))


def require_same_data(data: Data | DataDamaged, mesh: Mesh) -> Data:
    """Returns the data, which all ranks have alike. Raises DataDamaged, on every rank, where one cannot open it, or they read
    different corpora: another Python's library, or another copy of the files. One message of 64 bytes a rank over
    `mesh.save_group`, and where they differ two more."""
    everyone = from_every_rank(_told(data), mesh.save_group)
    for rank, (refusal, _) in enumerate(everyone):
        if refusal is not None:
            raise DataDamaged(f"rank {rank}: {refusal}")
    assert isinstance(data, Data)
    different = [rank for rank, told in enumerate(everyone) if told != everyone[0]]
    if different:
        pairs = zip(data.read.items(), from_rank_0(data.read, mesh.save_group).values(), strict=False)
        other = [path for (path, ours), theirs in pairs if ours != theirs][:1]
        files = from_every_rank(other, mesh.save_group)[different[0]]
        raise DataDamaged(
            f"ranks {different} read other data than rank 0{' (' + files[0] + ')' if files else ''}; every machine needs the "
            "same files"
        )
    return data


def require_sound(data: Data, mesh: Mesh, first: int, step: int, digest: int = 0, saved: bool = False) -> None:
    """Raises DataDamaged, on every rank, where the data of one is damaged or not that of the others, once the steps
    `first` + 1 to `step` are made, and the last is `saved`. `digest`: of the sample that all have read for the next."""
    everyone = from_every_rank((platform.node(), data.watch.complaint, digest), mesh.save_group)
    found = [f"rank {rank} ({node}): {what}" for rank, (node, what, _) in enumerate(everyone) if what is not None]
    digests = [number for _, _, number in everyone]
    usual = max(digests, key=digests.count)
    others = [rank for rank, number in enumerate(digests) if number != usual]
    if others:
        nodes = ", ".join(sorted({everyone[rank][0] for rank in others}))
        found.append(
            f"ranks {others} ({nodes}) read other tokens than the others in step {step + 1}; compare the files of the "
            "machines, and give each the same"
        )
    if found:
        learned = f"steps {first + 1} to {step} of this start may have learned from it"
        end = f"The run ends, and step {step} is saved" if saved else "The run ends without saving"
        raise DataDamaged(f"damaged data: {found[0]}. {end}; {learned if step > first else 'no step was made'}")


def _told(data: Data | DataDamaged) -> tuple[str | None, str | None]:
    """(why there is none, or a hash of what was read): machines may have the same files in different folders."""
    if isinstance(data, DataDamaged):
        return str(data), None
    hashes = [data.train.fingerprint, *data.read.values()]
    return None, hashlib.sha256("\n".join(hashes).encode()).hexdigest()
