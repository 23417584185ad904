"""What a run is, in a header of a few lines, and what came of it, in a box at its end: pure functions of what is known then."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rowwise.parallel.config import ParallelConfig
from rowwise.trainer.config import TrainConfig
from rowwise.trainer.console import labelled
from rowwise.trainer.metrics import number
from rowwise.trainer.models.decoder import parameter_count
from rowwise.trainer.next_steps import next_steps
from rowwise.trainer.screen import byte_count, clock, count


def layout_in_words(parallel: ParallelConfig, world_size: int, device: str) -> str:
    """Says which workers share what; degrees must be resolved. Such as: 4 x cpu: batch over 2, sequences over 2 (ring), ZeRO-1 over
    4."""
    parts = [f"pipeline of {parallel.pipeline} ({parallel.pipeline_schedule})"] * (parallel.pipeline > 1)
    parts += [f"{parallel.replicate} replicas"] * (parallel.replicate > 1)
    parts += [f"batch over {parallel.data_degree}"] * (parallel.data_degree > 1)
    shared = [("ring", parallel.ring), ("Ulysses", parallel.ulysses)]
    if told := " x ".join(f"{degree} ({name})" for name, degree in shared if degree > 1):
        parts.append(f"sequences over {told}")
    parts += [f"ZeRO-{parallel.zero} over {parallel.state_degree}"] * (parallel.state_degree > 1)
    return f"{world_size} x {device}" + (f": {', '.join(parts)}" if parts else "")


def rounded_in_words(parallel: ParallelConfig) -> str:
    """Says what of a run depends on its layout."""
    return f"gradients in {parallel.quantize_reduce}, rounded at random: right on the mean, and another run on another layout"


def batch_in_words(config: TrainConfig) -> str:
    """Says how many tokens a step has, and how they come about."""
    batch, ranks = config.batch, config.parallel.data_degree
    passes = batch.global_size // (ranks * batch.micro_size)
    shares = f"{ranks} ranks x " * (ranks > 1) + f"{passes} x {batch.micro_size}"
    tokens = batch.global_size * batch.seq_len
    return f"{tokens:,} tokens a step = {shares} sequences of {batch.seq_len}"


def length_in_words(config: TrainConfig, epochs: float) -> str:
    """Says how long the run is, and what said so; `epochs`: how often it goes through its data."""
    asked = f" (tokens={config.tokens:,})" if config.tokens else f" (epochs={config.epochs:g})" if config.epochs else ""
    return f"{config.steps:,} steps{asked} = {epochs:.3g} epochs"


def header(config: TrainConfig, world_size: int, device: str, data: str, epochs: float, state_bytes: int) -> list[str]:
    """Returns the run in six lines, and one more where it is another on another layout; `config` must be resolved. `data`: what it
    reads, in words, and `epochs` how often; `state_bytes`: what the optimizer keeps, over all ranks."""
    model, (parameters, _) = config.model, parameter_count(config.model)
    shape = f"{model.layers} layers of width {model.dim}"
    return [
        labelled("model", f"{model.name}: {count(parameters)} parameters, {shape}"),
        labelled("layout", layout_in_words(config.parallel, world_size, device)),
        labelled("batch", batch_in_words(config)),
        labelled(
            "numbers",
            f"precision {config.precision.name}; {config.optim.name} keeps {state_bytes / parameters:.2f} bytes a parameter, "
            f"{byte_count(state_bytes)}",
        ),
        *(
            [labelled("messages", rounded_in_words(config.parallel))]
            if config.parallel.quantize_reduce != "none"
            else []
        ),
        labelled("data", f"{data}; {length_in_words(config, epochs)}"),
        labelled("files", f"{config.run_dir} (train.log, parameters.txt)"),
    ]


def ending(
    config: TrainConfig, step: int, last: dict[str, Any], seconds: float, saved: Path | None, writes: bool
) -> tuple[str, list[str]]:
    """Returns the title and the lines of the box at the end of a run that stands at `step`: what came out, and the commands to go on
    with. `last`: its last record, with the last held-out loss; `saved`: its newest checkpoint; `writes`: whether it has a
    tokenizer."""
    done = step >= config.steps
    title = f"complete at step {step}" if done else f"asked to stop: saved step {step} of {config.steps}"
    forms: Sequence[tuple[str, str]] = (("loss", "loss {:.4f}"), ("eval_loss", "held-out loss {:.4f}"))
    results = [form.format(value) for key, form in forms if (value := number(last.get(key))) is not None]
    results.append(f"in {clock(seconds)}")
    if memory := number(last.get("peak_memory_bytes")):
        results.append(f"at most {byte_count(memory)} a rank")
    lines = [labelled("result", ", ".join(results))]
    if saved is not None:
        lines.append(labelled("saved", str(saved)))
    commands = next_steps(config.run_dir, config.steps if done else None, writes, saved is not None, config.model.own)
    return title, lines + [labelled(what, command) for what, command in commands]
