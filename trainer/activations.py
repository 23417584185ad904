"""What the layers of a run keep between forward and backward: `memory.*`, applied where the model is made parallel."""

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

from torch import nn

from rowwise.conf.refusal import Refusal, Refusals
from rowwise.parallel.activations.choose import kept_results, leaving_results
from rowwise.parallel.activations.compress import Coding, named_attention, tokens_on
from rowwise.parallel.activations.offload import store_on
from rowwise.parallel.activations.ranges import RunningRanges
from rowwise.parallel.activations.recompute import Keeping, recompute_whole
from rowwise.parallel.activations.results import LayerResults, Sharing
from rowwise.parallel.activations.saved import Keeper, attach, keeper_of
from rowwise.parallel.mesh import Mesh
from rowwise.parallel.precision import compute_dtype
from rowwise.parallel.sequence import padded_length
from rowwise.trainer.config import TrainConfig
from rowwise.trainer.models.blocks import Layer
from rowwise.trainer.models.decoder import Decoder, layer_results

OWN_LAYERS: Refusals = (
    Refusal(
        ("memory.offload_activations", "compile", "model.block"),
        lambda run: run.memory.offload_activations != "none" and run.compile and results_of(run) is None,
        "memory.offload_activations={memory.offload_activations} with compile=true {model.code}: its layers make no "
        "results by name, which could be compiled one by one; give compile=false, memory.offload_activations=none, or the block a "
        "table of its results (docs/memory.md)",
    ),
    Refusal(
        ("memory.offload_share", "model.block"),
        lambda run: run.memory.offload_share != "all" and results_of(run) is None,
        "memory.offload_share={memory.offload_share} with {model.code}: its layers make no results by name, of "
        "which some could leave; give memory.offload_share=all, or the block a table of its results (docs/memory.md)",
    ),
    Refusal(
        ("memory.recompute", "model.block"),
        lambda run: run.memory.recompute not in ("none", "full") and results_of(run) is None,
        "memory.recompute={memory.recompute} with {model.code}: its layers make no results by name, of which some "
        "could be kept; give memory.recompute=none or full, or the block a table of its results (docs/memory.md)",
    ),
    Refusal(
        ("memory.recompute", "model.block", "parallel.ulysses", "parallel.ring"),
        lambda run: run.memory.recompute != "none" and results_of(run) is None and sharing_of(run).communicates,
        "memory.recompute={memory.recompute} with {model.code} parallel.ulysses={parallel.ulysses} "
        "parallel.ring={parallel.ring}: its layers would send the messages of attention twice; give memory.recompute=none, or the "
        "block a table of its results (docs/memory.md)",
    ),
)


def micro_batch_bytes(config: TrainConfig) -> int:
    """Counts the bytes that the layers of a rank keep of one micro-batch, 0 where they make nothing by name. The degrees of the mesh
    must be resolved."""
    results = results_of(config)
    if results is None:
        return 0
    itemsize, coded, _ = stored_as(config)
    every = sum(results.bytes_kept(names, itemsize, coded) for names in kept_of(config))
    return tokens_of(config) * every // config.parallel.pipeline


def tokens_of(config: TrainConfig) -> int:
    """Counts the tokens that a rank has of a micro-batch, with those that fill sequences up so that ranks share them alike."""
    parallel = config.parallel
    length = padded_length(config.batch.seq_len, parallel.ring_order or "zigzag", parallel.ring, parallel.ulysses)
    return config.batch.micro_size * length // sharing_of(config).size


def sharing_of(run: Any) -> Sharing:
    """Tells how many ranks share each sequence of a run, whose degrees are known."""
    return Sharing(run.parallel.ulysses, run.parallel.ring)


def results_of(run: Any) -> LayerResults | None:
    """Lists what a layer of a run makes by name; None: nothing."""
    return layer_results(run.model, sharing_of(run))


def kept_of(config: TrainConfig) -> list[frozenset[str]]:
    """Names, for each layer of the whole model, the results that it keeps."""
    results = results_of(config)
    assert results is not None
    itemsize, _, seen = stored_as(config)
    return kept_results(config.memory, results, config.model.layers, itemsize, seen)


def keep_results(stages: Sequence[Decoder], config: TrainConfig, mesh: Mesh, share: float = 1.0) -> None:
    """Makes the layers of each stage keep what the run says, in the form and at the place that it says, in place. `share`: of its
    bytes, what leaves the device, where that is asked for."""
    keeper = keeper_on(config, mesh, [layer for stage in stages for layer in stage.blocks])
    if one_by_one(config):
        recompute(stages, config, keeper, share)
    for stage in stages if keeper is not None else ():
        assert keeper is not None
        attach(keeper, stage, list(stage.blocks.items()))
        if config.memory.compress != "none":
            stage.attend = named_attention(keeper, stage.attend, config.model.kv_heads)


def one_by_one(config: TrainConfig) -> bool:
    """Says whether layers make their results one by one: some are made again, or leave and others stay, or compiled layers are to
    keep theirs off the device, which whole ones would not."""
    memory = config.memory
    leave = memory.offload_activations != "none" and (config.compile or memory.offload_share != "all")
    return memory.recompute != "none" or leave


def keeper_on(config: TrainConfig, mesh: Mesh, layers: Sequence[str]) -> Keeper | None:
    """Makes what keeps the results of this rank's layers in another form or at another place; None: they stay as they are."""
    memory = config.memory
    if memory.compress == memory.offload_activations == "none":
        return None
    tokens = tokens_on(mesh, config.batch.seq_len)
    running = RunningRanges(layers, mesh.states.get_all_groups()) if memory.ranges == "running" else None
    coding = partial(Coding, config.seed, tokens, running=running) if memory.compress != "none" else None
    store = store_on(mesh.device, memory.offload_activations) if memory.offload_activations != "none" else None
    return Keeper(coding, store, running)


def keeper_in(model: nn.Module) -> Keeper | None:
    """Finds what keeps the results of the layers of `model`, or of its stages on this rank; None: they stay as they are."""
    keepers = (keeper_of(module) for module in model.modules())
    return next((keeper for keeper in keepers if keeper is not None), None)


def ranges_of(model: nn.Module) -> RunningRanges | None:
    """Finds the running ranges of what the layers of `model` keep; None: there are none."""
    keeper = keeper_in(model)
    return None if keeper is None else keeper.ranges


def recompute(stages: Iterable[Decoder], config: TrainConfig, keeper: Keeper | None, share: float = 1.0) -> None:
    """Makes the layers of each stage make again what the run says, in place, and of what they keep let a `share` leave. The
    functions that make their results are compiled one by one where the run is, but for attention, which messages or unequal
    documents go through."""
    results = results_of(config)
    blocks = [item for stage in stages for item in stage.blocks.items()]
    if results is None:
        for _, block in blocks:
            recompute_whole(block)
            if config.compile:
                block.compile()
        return
    every = kept_of(config)
    kept = [every[int(number)] for number, _ in blocks]
    leaves: Sequence[frozenset[str] | None] = [None] * len(kept)
    if config.memory.offload_share != "all":
        leaves = leaving_results(share, results, kept, *stored_as(config))
        if keeper is not None:
            keeper.told = offload_in_words(config, share, results, leaves)
    looks = {result.name for result in results.results if result.pairs}
    compiled = results.names | {"out"} if config.compile else frozenset()
    for (_, block), names, leave in zip(blocks, kept, leaves, strict=True):
        assert isinstance(block, Layer)
        block.making = Keeping(names, keeper, compiled - looks, leave)


def stored_as(config: TrainConfig) -> tuple[int, bool, float]:
    """Returns what the bytes of results and the operations behind them depend on: the bytes of a number, whether they are codes,
    and how many tokens one sees on the mean."""
    seen = config.model.seen(config.batch.seq_len)
    return compute_dtype(config.precision).itemsize, config.memory.compress != "none", seen


def offload_in_words(
    config: TrainConfig, share: float, results: LayerResults, leaves: Sequence[frozenset[str] | None]
) -> str:
    """Says which results of a rank's layers leave the device."""
    where = f"memory.offload_activations={config.memory.offload_activations}"
    if share >= 1:
        return f"{where} takes all of what layers keep away"
    counts = {result.name: sum(result.name in (names or ()) for names in leaves) for result in results.results}
    some = ", ".join(f"{name} of {count}" for name, count in counts.items() if count)
    return (
        f"{where} takes {share:.0%} of what layers keep away: what goes into each, and of {len(leaves)} layers "
        f"{some or 'nothing else'}; the rest stays on the device"
    )
