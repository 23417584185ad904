"""What 8-bit activations cost and change: bytes of a token in a block, errors of gradients, losses over 1,000 steps.

    python benchmarks/activation_codes.py                  on 2 cores about ten minutes
    python benchmarks/activation_codes.py --steps 200 --seeds 0 1

Bytes are those of the layers' tables (tests hold them against what is counted), in bf16; beside them stands what torch's own
operators keep of the same layer, which is silu(gate) more. Errors are |g - exact| / |exact| of the gradients of one batch, by
kind of layer, in the model that the first seed's exact run has made. Losses are of the product's own runs, on the `stdlib`
corpus, byte by byte, of the same seeds with and without codes; a seed is that of the weights, of the order of the data and of
the rounding.
"""

import argparse
import contextlib
import io
import statistics
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from record import write_record

from rowwise.kernels.attention import causal_attention
from rowwise.launch.checkpoints import choose_sound
from rowwise.launch.compose import compose_tree
from rowwise.parallel.activations.compress import Coding, Tokens, named_attention
from rowwise.parallel.activations.ranges import RunningRanges
from rowwise.parallel.activations.results import Sharing
from rowwise.parallel.activations.saved import Keeper, attach, begin_sequences
from rowwise.trainer.config import config_from_tree
from rowwise.trainer.data.batches import micro_batches
from rowwise.trainer.data.open import open_data
from rowwise.trainer.metrics import read_metrics
from rowwise.trainer.models.blocks import Block
from rowwise.trainer.models.config import model_of
from rowwise.trainer.prepare import prepare
from rowwise.trainer.train import train
from rowwise.trainer.whole import Source, load_model

PRESETS = ("llama_1b", "llama3_8b")
SMALL = [
    "model=tiny", "model.layers=2", "model.dim=64", "model.ffn_dim=176", "data=stdlib", "batch.seq_len=32",
    "batch.global_size=8", "batch.micro_size=8", "sample.tokens=0", "report=never", "eval.batches=8",
]  # fmt: skip
EVALUATIONS = 10
BATCHES = 20  # of which running ranges are


def bytes_of(preset: str) -> dict[str, float]:
    """Bytes of a token that wait for the backward of one block of a preset: as torch keeps them, as they are, as codes."""
    config = model_of(compose_tree([f"model={preset}"])["model"])
    layer = Block.results(config, Sharing())
    exact, coded = (layer.bytes_kept(layer.names, 2, coded) for coded in (False, True))
    plain = exact + 2 * config.ffn_dim
    return {"torch": plain, "exact": exact, "int8": coded, "of_exact": coded / exact, "of_torch": coded / plain}


def run(folder: Path, seed: int, steps: int, compress: str) -> dict[str, Any]:
    """A run of the product: held-out losses on the way, and seconds."""
    own = [f"run_dir={folder}/{compress}-{seed}", f"seed={seed}", f"steps={steps}", f"memory.compress={compress}",
           f"eval.every={steps // EVALUATIONS}", f"checkpoint.every={steps}"]  # fmt: skip
    config = prepare(config_from_tree(compose_tree([*SMALL, *own])), 1)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        train(config)
    records = read_metrics(Path(config.run_dir))
    losses = [record["eval_loss"] for record in records if "eval_loss" in record]
    return {"losses": losses, "seconds_a_step": statistics.median(record["step_seconds"] for record in records)}


def gradients(source: Source, ranges: str | None) -> dict[str, torch.Tensor]:
    """Of one batch, in float32, of the model that a run has made; with codes in `ranges`, of a token or running ones, which have seen
    BATCHES others."""
    model = load_model(source, torch.device("cpu"), torch.float32).requires_grad_().train()
    config = config_from_tree(dict(source.config))
    length, running = config.batch.seq_len, RunningRanges(list(model.blocks)) if ranges == "running" else None
    if ranges is not None:
        tokens = Tokens(length, torch.arange(length), torch.arange(length))
        keeper = Keeper(lambda layer, first, x: Coding(0, tokens, layer, first, x, running), ranges=running)
        attach(keeper, model, list(model.blocks.items()))
        model.attend = named_attention(keeper, causal_attention, config.model.kv_heads)
    data = open_data(config.data, length, config.model.vocab_size)
    for number in range(BATCHES, -1, -1) if running is not None else (0,):
        begin_sequences(model, 32 * number)
        (batch,) = micro_batches(range(32 * number, 32 * (number + 1)), data.train, 32)
        model.zero_grad()
        logits = model(batch.inputs, batch.positions, batch.documents)
        F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten()).backward()
        if running is not None:
            running.move()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def errors(source: Source, ranges: str) -> dict[str, float]:
    """|g - exact| / |exact| by kind of layer, the largest of all layers."""
    exact, coded = gradients(source, None), gradients(source, ranges)
    found: dict[str, float] = defaultdict(float)
    for name, g in exact.items():
        kind = ".".join(part for part in name.split(".") if part not in ("blocks", "weight") and not part.isdigit())
        found[kind] = max(found[kind], float((coded[name] - g).norm() / g.norm()))
    return dict(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    torch.set_num_threads(1)
    runs: dict[str, list[dict[str, Any]]] = {"none": [], "int8": []}
    with tempfile.TemporaryDirectory() as folder:
        for seed in options.seeds:
            for compress, made in runs.items():
                made.append(run(Path(folder), seed, options.steps, compress))
                print(f"seed {seed} {compress:4} {made[-1]['losses'][-1]:.4f}", flush=True)
        sound = choose_sound(Path(folder) / f"none-{options.seeds[0]}", None)
        source = Source(sound.path, sound.manifest)
        by_kind, of_running = errors(source, "token"), errors(source, "running")
    sizes = {preset: bytes_of(preset) for preset in PRESETS}
    last = {compress: [made["losses"][-1] for made in of] for compress, of in runs.items()}
    differences = [a - b for a, b in zip(last["int8"], last["none"], strict=True)]
    print_tables(sizes, by_kind, of_running, last, differences)
    path = write_record("activation_codes", {
        "steps": options.steps, "settings": SMALL, "bytes_of_a_token_in_a_block": sizes, "gradient_errors": by_kind,
        "gradient_errors_of_running_ranges": of_running,
        "runs": runs, "minus_exact": {"mean": statistics.mean(differences), "each": differences},
        "deviation_of_seeds": statistics.stdev(last["none"]) if len(options.seeds) > 1 else None,
    })  # fmt: skip
    print(f"\nwritten: {path}")


def print_tables(
    sizes: dict[str, dict[str, float]],
    by_kind: dict[str, float],
    of_running: dict[str, float],
    last: dict[str, list[float]],
    differences: list[float],
) -> None:
    print(
        "\n| a block of | torch's operators | as it is | int8 | of as it is | of torch's |\n|---|---|---|---|---|---|"
    )
    for preset, row in sizes.items():
        print(
            f"| {preset} | {row['torch']:,} | {row['exact']:,} | {row['int8']:,} | {row['of_exact']:.1%} | {row['of_torch']:.1%} |"
        )
    print("\n| gradient of | relative error | with running ranges |\n|---|---|---|")
    for kind, error in by_kind.items():
        print(f"| {kind} | {error:.2e} | {of_running[kind]:.2e} |")
    print("\n| seed | exact | int8 | difference |\n|---|---|---|---|")
    for seed, (exact, coded, difference) in enumerate(zip(last["none"], last["int8"], differences, strict=True)):
        print(f"| {seed} | {exact:.4f} | {coded:.4f} | {difference:+.4f} |")


if __name__ == "__main__":
    main()
