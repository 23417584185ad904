"""What the layers of a run keep between forward and backward: `memory.*`, applied where the model is made parallel."""

from collections.abc import Iterable
from typing import Any

from rowwise.conf.refusal import Refusal, Refusals
from rowwise.parallel.activations.choose import kept_results
from rowwise.parallel.activations.recompute import Keeping, recompute_whole
from rowwise.parallel.activations.results import LayerResults, Sharing
from rowwise.parallel.precision import compute_dtype
from rowwise.trainer.config import TrainConfig
from rowwise.trainer.models.blocks import Layer
from rowwise.trainer.models.decoder import BLOCKS, Decoder

OWN_LAYERS: Refusals = (
    Refusal(
        ("memory.recompute", "model.block"),
        lambda run: run.memory.recompute not in ("none", "full") and results_of(run) is None,
        "memory.recompute={memory.recompute} with model.block={model.block}: its layers make no results by name, of which some "
        "could be kept; give memory.recompute=none or full, or the block a table of its results (docs/memory.md)",
    ),
    Refusal(
        ("memory.recompute", "model.block", "parallel.ulysses", "parallel.ring"),
        lambda run: run.memory.recompute != "none" and results_of(run) is None and sharing_of(run).communicates,
        "memory.recompute={memory.recompute} with model.block={model.block} parallel.ulysses={parallel.ulysses} "
        "parallel.ring={parallel.ring}: its layers would send the messages of attention twice; give memory.recompute=none, or the "
        "block a table of its results (docs/memory.md)",
    ),
)


def sharing_of(run: Any) -> Sharing:
    """How many ranks share each sequence of a run, whose degrees are known."""
    return Sharing(run.parallel.ulysses, run.parallel.ring)


def results_of(run: Any) -> LayerResults | None:
    """What a layer of a run makes by name; None: nothing."""
    return BLOCKS[run.model.block].results(run.model, sharing_of(run))


def kept_of(config: TrainConfig) -> list[frozenset[str]]:
    """Names, for each layer of the whole model, the results that it keeps."""
    results = results_of(config)
    assert results is not None
    itemsize = compute_dtype(config.precision).itemsize
    return kept_results(config.memory, results, config.model.layers, itemsize, (config.batch.seq_len + 1) / 2)


def keep_results(stages: Iterable[Decoder], config: TrainConfig) -> None:
    """Makes the layers of each stage keep what the run says, in place. The functions that make their results are compiled one by
    one where the run is, but for attention, which messages or unequal documents go through."""
    results = results_of(config)
    blocks = [item for stage in stages for item in stage.blocks.items()]
    if results is None:
        for _, block in blocks:
            recompute_whole(block)
        return
    kept = kept_of(config)
    looks = {result.name for result in results.results if result.pairs}
    compiled = results.names | {"out"} if config.compile else frozenset()
    for number, block in blocks:
        assert isinstance(block, Layer)
        block.making = Keeping(kept[int(number)], compiled=compiled - looks)
