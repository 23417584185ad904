"""What a run would be, before anything of it is started: pure functions of its configuration and its data."""

from collections.abc import Sequence

import torch

from rowwise.optim.build import Assignments, assignment_table, assignments, build_optimizer, state_bytes
from rowwise.parallel.activations.compress import Tokens
from rowwise.parallel.config import ParallelConfig
from rowwise.parallel.pipeline_schedule.simulate import Timeline, simulate, uniform_costs
from rowwise.parallel.precision import master_dtype
from rowwise.parallel.sequence import padded_length
from rowwise.trainer.adapters.convert import adapt
from rowwise.trainer.adapters.specs import run_specs
from rowwise.trainer.advice import told_of_sources, warnings
from rowwise.trainer.config import TrainConfig
from rowwise.trainer.console import labelled
from rowwise.trainer.data.batches import BatchConfig
from rowwise.trainer.data.open import Data, data_in_words, told_of_data
from rowwise.trainer.models.decoder import Decoder
from rowwise.trainer.resume import find_resume
from rowwise.trainer.stages import plan_pipeline
from rowwise.trainer.summary import header

SHARES = 4  # of the batch that are told one by one
LEVELS = "▁▂▃▄▅▆▇█"
PLAIN_LEVELS = ".:-=+*#@"


def preview(
    config: TrainConfig, world_size: int, data: Data, device: torch.device, name: str
) -> tuple[list[str], list[str]]:
    """Returns (what the run is, what is to be known of it), a line each. `config`: as `trainer.prepare.examine` returns it;
    `device`: the kind that would compute, which is called `name`."""
    rows = assigned_without_memory(config)
    read = data_in_words(config.data, data)
    epochs = config.steps * config.batch.global_size / data.train.samples
    lines = header(config, world_size, name, read, epochs, state_bytes(rows))
    lines += [
        labelled("reads" * (not n), share) for n, share in enumerate(shares_in_words(config.batch, config.parallel))
    ]
    lines.append(labelled("rate", rate_in_words(config)))
    found = find_resume(config, data.train.fingerprint)
    lines.append(labelled("begins", f"where {found[0]} was saved" if found else "anew, at step 1"))
    remarks = told_of_data(config.data, data) + told_of_sources(config, data) + warnings(config, data, device)
    return lines, remarks


def assigned_without_memory(config: TrainConfig) -> Assignments:
    """Says which rule every parameter of the run would follow, and what it keeps: on the meta device, where nothing takes memory."""
    with torch.device("meta"):
        model = Decoder(config.model)
        places = torch.arange(0)
    adapt(model, config.adapter, run_specs(config), config.seed, Tokens(0, places, places))
    model.to(torch.bfloat16 if config.optim.param_dtype == "bf16" else master_dtype(config.precision))
    return assignments(model, build_optimizer(model, config.optim, config.seed))


def parameter_table(config: TrainConfig) -> list[str]:
    """Returns what a run writes to parameters.txt."""
    return assignment_table(assigned_without_memory(config)).splitlines()


def shares_in_words(batch: BatchConfig, parallel: ParallelConfig) -> list[str]:
    """Says which ranks read which sequences of every batch: a line for each of the first shares, and one for all others."""
    degree, sequence_degree = parallel.data_degree, parallel.ring * parallel.ulysses
    mine, lines = batch.global_size // degree, []
    length = padded_length(batch.seq_len, parallel.ring_order or "zigzag", parallel.ring, parallel.ulysses)
    tokens = f", {length // sequence_degree} of {length} tokens of each" if sequence_degree > 1 else ""
    for share in range(min(degree, SHARES)):
        ranks = readers(share, parallel)
        lines.append(f"{_ranks(ranks)}: sequences {share * mine} to {(share + 1) * mine - 1}{tokens}")
    if degree > SHARES:
        lines.append(
            f"... and so on: {degree} shares of {mine} sequences, of which each is read by {len(readers(0, parallel))} ranks"
        )
    return lines


def readers(share: int, parallel: ParallelConfig) -> list[int]:
    """Returns the ranks that read one share of every batch: those that hold its sequences, on each stage (see `Mesh.data_rank`)."""
    sequence_degree = parallel.ring * parallel.ulysses
    return [
        (stage * parallel.data_degree + share) * sequence_degree + place
        for stage in range(parallel.pipeline)
        for place in range(sequence_degree)
    ]


def _ranks(ranks: Sequence[int]) -> str:
    """Such as: rank 3, or ranks 0-3, 8-11."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    told = ", ".join(f"{first}-{last}" if last > first else str(first) for first, last in runs)
    return f"rank{'s' * (len(ranks) > 1)} {told}"


def rate_in_words(config: TrainConfig) -> str:
    """Returns the learning rate at the first step, at its highest and at the last."""
    rates = rates_of(config, min(config.steps, 2000))
    first, last = rates[0], rates[-1]
    return f"{config.schedule.name}: {first:.3g} at first, {max(rates):.3g} at most, {last:.3g} at last"


def rates_of(config: TrainConfig, count: int) -> list[float]:
    """Returns the learning rate of `count` steps, evenly from the first to the last."""
    steps = config.steps
    at = [round(n * (steps - 1) / max(1, count - 1)) for n in range(count)]
    return [config.optim.lr * config.schedule.factor(step, steps) for step in at]


def rate_picture(config: TrainConfig, width: int, blocks: bool) -> list[str]:
    """Returns the learning rate over the run, a character a share of it."""
    rates, levels = rates_of(config, width), LEVELS if blocks else PLAIN_LEVELS
    highest = max(rates) or 1.0
    line = "".join(levels[min(len(levels) - 1, int(max(0.0, rate) / highest * len(levels)))] for rate in rates)
    return [f"learning rate, steps 1 to {config.steps:,}; the highest is {highest:.3g}", line]


def pipeline_picture(config: TrainConfig, width: int) -> list[str]:
    """Returns a step of the pipeline, a line a rank: F forward, B backward, I and W its two halves, . waiting. Every stage is taken
    to be as long as every other; `auto`, whose order follows from measured times, has none before a run."""
    parallel = config.parallel
    if parallel.pipeline == 1:
        return []
    if parallel.pipeline_schedule == "auto":
        return ["pipeline: auto finds its order from times that the run measures: there is no picture before"]
    micro_batches = config.micro_batches
    plan = plan_pipeline(parallel, config.model, config.batch.seq_len, micro_batches, None)
    timeline = simulate(plan.schedule, uniform_costs(plan.schedule.stages))
    head = (
        f"a step of {parallel.pipeline_schedule} with {micro_batches} micro-batches, all stages alike: F forward, B backward, I and W "
        f"its halves, . waiting ({timeline.bubble:.1%})"
    )
    place = plan.schedule.rank_of
    cuts = [f"stage {stage} (pipeline rank {place[stage]}): {_layers(own)}" for stage, own in enumerate(plan.layers)]
    return [head, *drawn(timeline, width), *cuts]


def _layers(layers: range) -> str:
    return (
        "no layer"
        if not layers
        else f"layers {layers.start} to {layers.stop - 1}"
        if len(layers) > 1
        else f"layer {layers.start}"
    )


def drawn(timeline: Timeline, width: int) -> list[str]:
    """Returns a line a rank of at most `width` columns: one for each unit of time where there is room, else an even choice of
    moments."""
    label = len(str(len(timeline.starts) - 1)) + 2
    columns = min(width - label, round(timeline.makespan))
    lines = []
    for rank, (starts, ends, actions) in enumerate(
        zip(timeline.starts, timeline.ends, timeline.schedule.ranks, strict=True)
    ):
        row, position = [], 0
        for column in range(columns):
            moment = (column + 0.5) * timeline.makespan / columns
            while position < len(ends) and ends[position] <= moment:
                position += 1
            works = position < len(ends) and starts[position] <= moment
            row.append(actions[position].kind if works else ".")
        lines.append(f"{rank:>{label - 2}}  {''.join(row)}")
    return lines
