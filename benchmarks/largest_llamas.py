"""What fits where, by forecast: the largest Llama that trains whole on one GPU and on 8, 8B on one, 70B on 64.

python benchmarks/largest_llamas.py      a few minutes on one core, without a GPU; nothing is trained. README.md and docs/planning.md
                                         are told the answers
python benchmarks/largest_llamas.py --known      in seconds: forecasts the answers that are known again, and looks for no others

All parameters train (no adapters). A Llama has the form of Llama 3's: heads of 128, 8 of keys and values, 3.5 times its width in the
feed-forward, 128,256 words. Of each width, a multiple of 1,024, as many layers are taken as fit; the answer is that of the width
whose layers are nearest width / 128, as 8B's are. Found by bisection over what holds least (`LEAST`): with one layer more that does
not fit. The layout is the fastest that `rowwise plan fit=true` then finds for it.
"""

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from record import RESULTS, write_record

from rowwise.launch.compose import compose_tree, key_of
from rowwise.parallel.config import divisors
from rowwise.trainer.check import check
from rowwise.trainer.config import TrainConfig, config_from_tree
from rowwise.trainer.models.decoder import parameter_count
from rowwise.trainer.plan.combinations import with_words
from rowwise.trainer.plan.devices import DEVICES
from rowwise.trainer.plan.fit import Fit, find_fit
from rowwise.trainer.plan.forecast import Forecast, forecast

ROOT = Path(__file__).parents[1]
BEGINS, ENDS = "<!-- Written by `python benchmarks/largest_llamas.py`. -->\n", "\n<!-- So far. -->"
CARDS = {"rtx4090": "24 GB", "h100": "80 GB", "h200": "141 GB"}
IN_FULL = ("optim=adamw",)
# The least that AdamW takes with both its moments; the optimizer steps in the backward of a step's one micro-batch.
LEAN = ("optim=adamw8bit", "optim.param_dtype=bf16", "optim.in_backward=true", "clip_norm=0")
# With micro-batches of any size.
LEAST = {"parallel.zero": 3, "memory.recompute": "full", "memory.offload_activations": "cpu"}


@dataclass(frozen=True)
class Question:
    """A run that is asked for: its words, and what it is to run on. `largest`: the model is to be the largest."""

    asked: str
    words: tuple[str, ...]
    world_size: int
    device: str
    largest: bool = False

    def config(self) -> TrainConfig:
        """Composes it; it is not checked."""
        return config_from_tree(compose_tree(list(self.words)))

    def fit(self, config: TrainConfig) -> Fit:
        """Searches for the fastest that fits. `config`: of these words, and of any model."""
        return find_fit(config, self.world_size, DEVICES[self.device], set(map(key_of, self.words)))


def questions() -> list[Question]:
    """Lists them, in the order in which they are told."""
    common = "precision=bf16", "memory.compress=none"  # gradients are exact
    base = ("model=llama3_8b", *common, "batch.seq_len=4096")
    found = [
        Question(f"the largest on {n} x {CARDS[device]}{told}", (*base, f"batch.global_size={size(n)}", *words), n, device, True)
        for told, words, size in ((", AdamW in 32 bits", IN_FULL, lambda n: 16), (", the leanest AdamW", LEAN, lambda n: n))
        for n in (1, 8)
        for device in CARDS
    ]  # fmt: skip
    eight, seventy = ("model=llama3_8b", *common), ("model=llama3_70b", *common, *IN_FULL)
    return [
        *found,
        Question("8B on 1 x 80 GB", (*eight, "batch.seq_len=8192", "batch.global_size=1", *LEAN), 1, "h100"),
        Question("70B at 8k on 64 x 80 GB", (*seventy, "batch.seq_len=8192", "batch.global_size=128"), 64, "h100"),
        # The host's memory would be filled, for no speed.
        Question(
            "70B at 131k on 64 x 80 GB",
            (*seventy, "memory.offload_activations=none", "batch.seq_len=131072", "batch.global_size=8"),
            64,
            "h100",
        ),
    ]


def shape(width: int, layers: int) -> dict[str, int]:
    """Gives the form of Llama 3's at a width."""
    return {"dim": width, "heads": width // 128, "kv_heads": 8, "ffn_dim": width * 7 // 2, "layers": layers}


def least(config: TrainConfig, world_size: int) -> list[TrainConfig]:
    """Lists the runs of a configuration, not checked yet, that hold least: one for each size of a micro-batch."""
    sizes = divisors(config.batch.global_size // world_size)
    return [check(with_words(config, LEAST | {"batch.micro_size": size}), world_size) for size in sizes]


def fit_at_least(configs: Sequence[TrainConfig], of: dict[str, int], device: str) -> bool:
    """Says whether one of these fits, with a model of such a form."""
    models = (replace(config, model=replace(config.model, **of)) for config in configs)
    return any(forecast(config, DEVICES[device]).room.fits for config in models)


def largest_shape(question: Question) -> tuple[int, int]:
    """(width, layers) of the largest Llama that fits as `LEAST` says."""
    configs = least(question.config(), question.world_size)

    def fits(width: int, layers: int) -> bool:
        return fit_at_least(configs, shape(width, layers), question.device)

    def most(width: int) -> int:
        """The most layers of a width, 0 where not even one fits."""
        low, high = 0, 1
        while fits(width, high):
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(width, middle) else (low, middle)
        return low

    def off(width: int, layers: int) -> float:
        """How far its layers are from a 128th of its width."""
        return abs(math.log(128 * layers / width)) if layers else math.inf

    width, layers = 1024, most(1024)
    while layers > width / 128 and off(width + 1024, wider := most(width + 1024)) < off(width, layers):
        width, layers = width + 1024, wider
    return width, layers


def answer(question: Question) -> dict[str, Any]:
    """Finds the words to paste behind `rowwise train`, and what is forecast of them."""
    config, changed = question.config(), list[str]()
    if question.largest:
        of = shape(*largest_shape(question))
        changed = [f"model.{key}={value}" for key, value in of.items() if value != getattr(config.model, key)]
        config = replace(config, model=replace(config.model, **of))
    found = question.fit(config)
    assert found.best is not None, question
    return told(question.asked, [*question.words, *changed, *found.words], found.best)


def again(known: dict[str, Any]) -> dict[str, Any]:
    """Forecasts an answer again."""
    config = check(config_from_tree(compose_tree(known["words"])), known["world_size"])
    return told(known["asked"], known["words"], forecast(config, DEVICES[known["device"]]))


def told(asked: str, words: list[str], best: Forecast) -> dict[str, Any]:
    """Tells an answer as the results file has it."""
    assert best.room.fits, asked
    return {
        "asked": asked,
        "world_size": best.config.parallel.world_size,
        "device": best.device.name,
        "parameters": parameter_count(best.config.model)[0],
        "words": words,
        "held_bytes": best.worst.most,
        "needed_bytes": best.room.needed,
        "limit_bytes": int(best.room.limit),
        "host_bytes": best.room.host,
        "categories": best.worst.peaks,
        "moment": best.worst.moment,
        "seconds": asdict(best.seconds),
    }


def size(answer: dict[str, Any]) -> str:
    """Tells a model's parameters."""
    return f"{answer['parameters'] / 1e9:.1f} B"


def needs(answer: dict[str, Any]) -> str:
    """Tells what the fullest rank needs of its GPU, with what is reserved, and of its host, and how fast it is about."""
    speed = float(f"{answer['seconds']['tokens_per_second']:.2g}")
    host = f" and {answer['host_bytes'] / 1e9:.0f} of the host" if answer["host_bytes"] else ""
    return f"{answer['needed_bytes'] / 1e9:.1f} GB{host}, {speed:,.0f} tokens/s"


def commands(answers: Sequence[dict[str, Any]]) -> str:
    """The lines to paste, each behind its forecast, for docs/planning.md."""
    lines = []
    for one in answers:
        machines, here = -(-one["world_size"] // 8), min(8, one["world_size"])
        meet = f"--nodes {machines} --rendezvous host1:29400 --token FILE " if machines > 1 else ""
        lines += [f"# {one['asked']} ({one['device']}): {size(one)}, {needs(one)} a GPU",
                  f"rowwise train {meet}nproc={here} {' '.join(one['words'])}"]  # fmt: skip
    return "\n".join(["```", *lines, "```"])


def table(answers: Sequence[dict[str, Any]]) -> str:
    """The answers in short, for README.md."""
    known = {one["asked"]: one for one in answers}
    heads = " | ".join(f"{card} ({device})" for device, card in CARDS.items())
    lines = [f"| | {heads} |", "|---" * (1 + len(CARDS)) + "|"]
    for told in ("AdamW in 32 bits", "the leanest AdamW"):
        for n, gpus in ((1, "one GPU"), (8, "eight")):
            own = [known[f"the largest on {n} x {card}, {told}"] for card in CARDS.values()]
            lines.append(f"| {gpus}, {told} | {' | '.join(f'**{size(one)}**: {needs(one)}' for one in own)} |")
    rest = [f"{asked}: {needs(one)}" for asked, one in known.items() if not asked.startswith("the largest")]
    return "\n".join([*lines, "", f"{'; '.join(rest)}."])


PAGES = {"README.md": table, "docs/planning.md": commands}


def write_pages(answers: Sequence[dict[str, Any]]) -> None:
    """Puts the answers where they are told."""
    for name, text in PAGES.items():
        before, _, rest = (ROOT / name).read_text().partition(BEGINS)
        (ROOT / name).write_text(before + BEGINS + text(answers) + ENDS + rest.partition(ENDS)[2])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--known", action="store_true")
    known = json.loads((RESULTS / "largest_llamas.json").read_text())["answers"] if parser.parse_args().known else []
    answers = []
    for one in map(again, known) if known else map(answer, questions()):
        answers.append(one)
        print(f"{one['asked']:45} {size(one):>8}: {needs(one)}; {' '.join(one['words'])}", flush=True)
    print(write_record("largest_llamas", {"forecast": True, "answers": answers}))
    write_pages(answers)


if __name__ == "__main__":
    main()
