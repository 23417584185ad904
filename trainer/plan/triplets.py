"""What AdaLoRA holds beside its matrices A, E and B (`trainer.adapters.allocate`): averages of importance, which stay; and in a step
the penalty that keeps them orthogonal, which the gradients take, and the scores by which triplets are chosen.

    averages    2 w a number of A, E and B                                           w: 4 bytes, or 8 where parameters have them
    penalty     w sum (r n + r r) whole, twice where ranks split rows and sum it; beside it, of one matrix, what its gradients take
    scores      8 r a matrix; with them, of one matrix, three copies of its rows in 64 bits
"""

from collections.abc import Iterable, Iterator

from rowwise.kernels.spec import ParameterSpec, Specs
from rowwise.trainer.adapters.config import AdaLora
from rowwise.trainer.config import TrainConfig
from rowwise.trainer.plan.states import Place, local_numbers, owned, wide_of, widths_of
from rowwise.trainer.plan.update import NONE, StepBytes

KEYS = ("lora_a", "lora_e", "lora_b")


def importance_bytes(config: TrainConfig, layers: range, place: Place) -> int:
    """Counts the averages of a rank's rows."""
    numbers = (local_numbers(spec, place) for triplet in _triplets(config, [layers]) for spec in triplet)
    return 2 * wide_of(config).itemsize * sum(numbers)


def penalty_bytes(config: TrainConfig, stages: Iterable[range], place: Place) -> StepBytes:
    """Counts what the penalty holds at most."""
    wide, narrow = wide_of(config).itemsize, widths_of(config).parameter == 2
    whole = most = 0
    for a, _, b in _triplets(config, stages):
        rank = a.shape[0]
        whole += (a.shape.numel() + rank * rank) * wide
        mine_a, mine_b = local_numbers(a, place), local_numbers(b, place)
        # What is apart of both, and of A or of B the product, that times a factor, and in 16 bits.
        added = max(mine_a * (2 * wide + 2 * narrow), mine_b * ((2 + narrow) * wide + 2 * narrow))
        most = max(most, 2 * rank * rank * wide + added)
    messages = whole * (place.shards > 1)
    return NONE if not whole else StepBytes(whole + max(most, messages), messages)


def choice_bytes(config: TrainConfig, stages: Iterable[range], place: Place) -> int:
    """Counts what is held at most where importance is moved and triplets are chosen."""
    wide, scores, most = wide_of(config).itemsize, 0, 0
    for triplet in _triplets(config, stages):
        sizes = [local_numbers(spec, place) for spec in triplet]
        scores += 8 * triplet[0].shape[0]
        most = max(most, 8 * (sum(sizes) + 2 * max(sizes)), 2 * wide * max(sizes))
    return scores + most


def _triplets(config: TrainConfig, stages: Iterable[range]) -> Iterator[list[ParameterSpec]]:
    """A, E and B of each matrix of these layers that has them."""
    if isinstance(config.adapter, AdaLora):
        for layers in stages:
            specs: Specs = owned(config, layers)
            for layer in dict.fromkeys(name.rpartition(".")[0] for name in specs):
                if f"{layer}.{KEYS[0]}" in specs:
                    yield [specs[f"{layer}.{key}"] for key in KEYS]
