"""Time and memory of one optimizer step on the matrices of a real model: our rules beside others' optimizers.

    python benchmarks/optimizer_step.py                                   llama_130m; on a GPU llama_1b too
    python benchmarks/optimizer_step.py --models llama_1b --record optimizer_step_llama_1b    on a CPU 2 of its 24 layers
    python benchmarks/optimizer_step.py --rules adamw8bit galore --rounds 20

| contestant | what steps |
|---|---|
| torch fused AdamW | torch.optim.AdamW(fused=True): what the ratios are taken against |
| bitsandbytes AdamW8bit, torchao AdamW8bit | as their guides use them: 8 bits for the embedding too |
| galore-torch | GaLoreAdamW on the hidden matrices, AdamW on the rest |
| ours | every rule of conf/optim by its name, with the rank of the GaLore paper |
| adamw8bit, embedding too | ours with 8 bits for the embedding, as those two have it |

The others come with `pip install rowwise[bench]`; one that is not there, or does not run on this device, stands in the
record with the reason. All contestants step the same float32 parameters with the same gradients, each with its own
state, in turns: a round times one step of each, so that a machine whose speed drifts slows all alike, and ratios are
taken round by round. A *refresh* is the same step where it also renews the projection; it is timed in the first rounds.
galore-torch's is its very first step, since one takes minutes. `per_step_seconds` spreads a refresh over 200 steps.
`extra_bytes`: the most that one step holds beside parameters, gradients and states.

Then the refresh alone, from one gradient (n, n) to its basis (n, n / 4): by torch.linalg.svd as galore-torch does it,
by our subspace iteration and by DCT. On a GPU also the bandwidth of a copy, and the share of it that adamw8bit reaches.
"""

import argparse
import gc
import statistics
import sys
from collections.abc import Callable
from typing import Any

import torch
from optimizer_bytes import RULES, model_config, rank_of
from optimizer_contestants import Contestant, find_peers, held_beside, ours, seconds_of, versions
from record import spread, write_record
from torch import Tensor

from rowwise.kernels.adamw8bit import adamw8bit_
from rowwise.kernels.blockwise import quantise
from rowwise.kernels.dct import dct_columns
from rowwise.kernels.spec import specs_of
from rowwise.optim.lowrank.projection import dct_choices, subspace_bases
from rowwise.trainer.models.decoder import Decoder

CPU_LAYERS = {"llama_1b": 2}  # what it is cut down to on a CPU


def make_model(model: str, layers: int | None, device: torch.device) -> Decoder:
    """With random parameters and gradients."""
    if layers is None and device.type == "cpu":
        layers = CPU_LAYERS.get(model)
    with torch.device("meta"):
        decoder = Decoder(model_config(model, *([f"model.layers={layers}"] if layers else [])))
    decoder.to_empty(device=device)
    torch.manual_seed(0)
    for p in decoder.parameters():
        p.data.normal_(0, 0.02)
        p.grad = torch.randn_like(p).mul_(1e-3)
    return decoder


def race_model(model: str, options: argparse.Namespace) -> dict[str, Any]:
    """All contestants on one model: figures of each, ratios, who is missing and why."""
    device = torch.device(options.device)
    decoder = make_model(model, options.layers, device)
    rank = options.rank or rank_of(decoder.config)
    parameters = sum(p.numel() for p in decoder.parameters())
    peers, missing = find_peers(decoder, rank, device)
    times: dict[str, Any] = {}
    heats: list[tuple[list[str], dict[str, list[float]]]] = []
    for first in range(0, len(options.rules), options.together):
        names = options.rules[first : first + options.together]
        racing = {name: ours(name, decoder, rank, device) for name in names} | peers
        marks = {name: len(c.steps) for name, c in racing.items()}
        run_rounds(racing, options.rounds, options.refreshes)
        heats.append((names, {name: c.steps[marks[name] :] for name, c in racing.items()}))
        times |= {name: racing[name].figures(parameters) for name in names}
        del racing
        gc.collect()
    times |= {name: contestant.figures(parameters) for name, contestant in peers.items()}
    setting = {"layers": decoder.config.layers, "rank": rank, "parameters": parameters}
    return {**setting, "contestants": times, "speed_against": ratios(heats, list(peers)), "missing": missing}


def run_rounds(racing: dict[str, Contestant], rounds: int, refreshes: int) -> None:
    for number in range(rounds):
        for contestant in racing.values():
            contestant.ordinary()
        if number < refreshes:
            for contestant in racing.values():
                contestant.refresh()
        print(f"round {number + 1}/{rounds}  " + "  ".join(f"{name} {c.steps[-1]:.4f}" for name, c in racing.items()),
              file=sys.stderr, flush=True)  # fmt: skip


def ratios(heats: list[tuple[list[str], dict[str, list[float]]]], peers: list[str]) -> dict[str, dict[str, Any]]:
    """ours -> theirs -> how many times faster an ordinary step of ours was, round by round."""
    return {
        mine: {other: spread([b / a for a, b in zip(steps[mine], steps[other], strict=True)]) for other in peers}
        for names, steps in heats
        for mine in names
    }


def time_refreshes(n: int, rounds: int, device: torch.device) -> dict[str, Any]:
    """Seconds from a gradient (n, n) to its basis (n, n / 4), three ways in turn, and the bytes each holds for it."""
    g, rank = torch.randn(n, n, device=device), n // 4
    basis = torch.linalg.qr(torch.randn(n, rank, device=device)).Q
    ways: dict[str, Callable[[], Any]] = {
        "svd": lambda: torch.linalg.svd(g, full_matrices=False).Vh[:rank],
        "subspace": lambda: subspace_bases([g], [basis], [g.shape], [0], None),
        "dct": lambda: dct_columns(n, dct_choices([g], [rank], None)[0].long(), g.dtype, device),
    }
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    extra = {way: held_beside(function, device) for way, function in ways.items()}
    for _ in range(rounds):
        for way, function in ways.items():
            seconds[way].append(seconds_of(function, device))
    faster = {way: spread([s / t for s, t in zip(seconds["svd"], seconds[way], strict=True)]) for way in ways}
    found = {way: {"seconds": spread(seconds[way]), "extra_bytes": extra[way], "faster_than_svd": faster[way]}
             for way in ways}  # fmt: skip
    return {"n": n, "rank": rank, **found}


def copied_bytes_per_second(device: torch.device, rounds: int) -> float:
    """What a copy of a GiB moves: it reads and writes it."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return (
        2 * source.nbytes / statistics.median(seconds_of(lambda: target.copy_(source), device) for _ in range(rounds))
    )


def time_bandwidth(model: str, device: torch.device, rounds: int = 20) -> dict[str, Any]:
    """Bytes a second of a copy, and what share of it fused adamw8bit reaches: on one large matrix, where the kernel is
    alone, and on the hidden matrices of the model, where each is a launch of its own."""
    found: dict[str, Any] = {"copy_bytes_per_second": copied_bytes_per_second(device, rounds)}
    whole = make_model(model, None, device)
    specs = specs_of(whole)
    hidden = [p for key, p in whole.named_parameters() if specs[key].role == "hidden"]
    for name, params in (("kernel", [torch.randn(1 << 14, 1 << 14, device=device)]), ("model", hidden)):
        for dtype in (torch.float32, torch.bfloat16):
            moved, seconds = time_adamw8bit([p.detach().to(dtype) for p in params], rounds)
            share = moved / seconds / found["copy_bytes_per_second"]
            key = f"{name}_{str(dtype).removeprefix('torch.')}"
            found[key] = {"moved_bytes": moved, "seconds": seconds, "share_of_copy": share}
    return found


def time_adamw8bit(params: list[Tensor], rounds: int) -> tuple[int, float]:
    """The bytes that a step must move (gradients read, all else read and written), and its seconds."""
    grads = [torch.randn_like(p) for p in params]
    first, second = ([quantise(torch.zeros_like(p), signed) for p in params] for signed in (True, False))
    rounding = [(7, 0)] * len(params) if params[0].dtype == torch.bfloat16 else None

    def step() -> None:
        adamw8bit_(params, grads, first, second, 1, 1e-5, 0.9, 0.95, 1e-8, 0.1, rounding)

    step()
    states = [t for pair in (*first, *second) for t in pair]
    moved = sum(2 * t.nbytes for t in (*params, *states)) + sum(g.nbytes for g in grads)
    return moved, statistics.median(seconds_of(step, params[0].device) for _ in range(rounds))


def measure_steps(options: argparse.Namespace) -> dict[str, Any]:
    """What the record holds."""
    device = torch.device(options.device)
    found: dict[str, Any] = {"setting": {**vars(options), "threads": torch.get_num_threads()}, "peers": versions()}
    found["models"] = {model: race_model(model, options) for model in options.models}
    found["refresh_alone"] = time_refreshes(options.n, options.refreshes + 2, device)
    if device.type == "cuda":
        found["bandwidth"] = {model: time_bandwidth(model, device) for model in options.models}
    return found


def print_tables(found: dict[str, Any]) -> None:
    for model, race in found["models"].items():
        peers = list(next(iter(race["speed_against"].values()), {}))
        print(f"\n{model}, {race['layers']} layers, {race['parameters']:,} parameters, rank {race['rank']}; ms\n")
        print("| contestant | step | quartiles | with refresh | state bytes / parameter | extra MB | "
              + " | ".join(f"x faster than {peer}" for peer in peers) + " |")  # fmt: skip
        print("|---" * (6 + len(peers)) + "|")
        for name, row in race["contestants"].items():
            speeds = race["speed_against"].get(name, {})
            low, high = row["step_seconds"]["quartiles"]
            cells = [name, ms(row["step_seconds"]["median"]), f"{ms(low)} to {ms(high)}",
                     ms(row["refresh_seconds"]["median"]) if "refresh_seconds" in row else "",
                     f"{row['state_bytes_per_parameter']:.3f}", mb(row["extra_bytes"]),
                     *(f"{speeds[peer]['median']:.2f}" if speeds else "" for peer in peers)]  # fmt: skip
            print(f"| {' | '.join(cells)} |")
        for name, reason in race["missing"].items():
            print(f"\n{name} is missing: {reason}")
    alone = found["refresh_alone"]
    print(
        f"\n| refresh, n = {alone['n']}, r = {alone['rank']} | ms | x faster than svd | extra MB |\n|---|---|---|---|"
    )
    for way in ("svd", "subspace", "dct"):
        row = alone[way]
        print(f"| {way} | {ms(row['seconds']['median'])} | {row['faster_than_svd']['median']:.1f} "
              f"| {mb(row['extra_bytes'])} |")  # fmt: skip
    for model, row in found.get("bandwidth", {}).items():
        shares = ", ".join(f"{key} {row[key]['share_of_copy']:.2f}" for key in row if key != "copy_bytes_per_second")
        print(
            f"\n{model}: a copy moves {row['copy_bytes_per_second'] / 1e9:,.0f} GB/s; adamw8bit's share of it: {shares}"
        )


def ms(seconds: float) -> str:
    return f"{seconds * 1e3:,.2f}"


def mb(count: int | None) -> str:
    return "not known" if count is None else f"{count / 1e6:,.0f}"


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Options; those that depend on the device are filled in."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cuda = torch.cuda.is_available()
    parser.add_argument("--models", nargs="+", default=["llama_130m", "llama_1b"] if cuda else ["llama_130m"])
    parser.add_argument("--layers", type=int, help="instead of the model's own number")
    parser.add_argument("--rules", nargs="+", default=[*RULES, "adamw8bit, embedding too"])
    parser.add_argument("--rank", type=int, help="the GaLore paper's for the model otherwise")
    parser.add_argument("--rounds", type=int, default=30 if cuda else 10)
    parser.add_argument("--refreshes", type=int, default=5 if cuda else 3, help="rounds that also time a refresh")
    parser.add_argument("--n", type=int, default=4096 if cuda else 1024, help="width of the refresh alone")
    parser.add_argument("--together", type=int, default=1 if cuda else 99, help="of our rules, in one race in memory")
    parser.add_argument("--record", default="optimizer_step", help="the name of the results file")
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    options = parser.parse_args(arguments)
    if options.rounds < 2 or options.refreshes < 0 or options.together < 1:
        parser.error("--rounds is at least 2, --together at least 1, --refreshes at least 0")
    return options


def main() -> None:
    options = parse()
    found = measure_steps(options)
    print_tables(found)
    print(f"\nwritten: {write_record(options.record, found)}")


if __name__ == "__main__":
    main()
