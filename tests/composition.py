"""Makes docs/composition.md: for every pair of options, the case that proves it or the words that refuse it.

python tests/composition.py           writes the page
python tests/composition.py --draw    draws cases for the pairs that none tries yet, and writes those too
"""

import functools
import itertools
import random
import re
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from cases import DRAWN, GROUPS, NEAR, NOW, OPTIONS, case_config, read_cases, write_times

from rowwise.conf.option import options_of
from rowwise.trainer.config import TrainConfig

Pair = frozenset[str]
MOST_WORKERS = 4
PAGE = Path(__file__).parents[1] / "docs/composition.md"


def pairs() -> Iterator[Pair]:
    """Every two options that are not two choices of one."""
    for one, other in itertools.combinations(OPTIONS, 2):
        if OPTIONS[one].group != OPTIONS[other].group:
            yield frozenset((one, other))


def tried(case: Iterable[str]) -> set[Pair]:
    """The pairs that a case proves. In fewer bits than 64 it proves what rounding leaves to see, so only of the options that round."""
    found = {frozenset(two) for two in itertools.combinations(case, 2)}
    return {pair for pair in found if pair & NEAR} if set(case) & NEAR else found


@functools.cache
def refusal(pair: Pair, folder: Path) -> str | None:
    """What is said of a run of these two, whatever ZeRO splits; None: it can be."""
    said = None
    for zero in (1, 0, 3):
        try:
            case_config(ordered(pair), folder, zero)
            return None
        except ValueError as error:
            said = said or error
    require_about(pair, said)
    return str(said).replace(str(folder), "FOLDER")


def require_about(pair: Pair, said: Exception) -> None:
    """A refusal of only one of them, or of neither, says nothing of the pair: then its run is made wrongly."""
    words = set(re.findall(r"[a-z_]+(?:\.[a-z_]+)*", str(said)))
    concerned = set(getattr(said, "options", ())) or words | {f"{word}.name" for word in words}
    for name in pair:
        assert concerned & (OPTIONS[name].keys | OPTIONS[name].needed), (
            f"{set(pair)} are refused for another reason: {said}"
        )


def ordered(names: Iterable[str]) -> list[str]:
    """In the order of the options."""
    return sorted(names, key=list(OPTIONS).index)


def possible(case: Iterable[str], folder: Path, most: int) -> bool:
    """Whether the options can be one run, on at most so many workers."""
    try:
        return case_config(ordered(case), folder)[1] <= most
    except ValueError:
        return False


def draw(folder: Path) -> list[list[str]]:
    """Cases that try every pair that is not refused: those there are, as far as they are possible, and more where they leave a
    pair out. Greedily: the best of a few candidates, each from a pair that is left and grown by whatever tries the most."""
    allowed = {pair for pair in pairs() if refusal(pair, folder) is None}
    cases = [case for case in read_cases() if possible(case, folder, 8)]
    left = allowed - set().union(*map(tried, cases), set())
    chance = random.Random(len(cases))
    while left:
        first = sorted(map(ordered, left), key=lambda pair: [list(OPTIONS).index(name) for name in pair])
        candidates = [_grown(set(chance.choice(first)), left, allowed, folder, chance) for _ in range(12)]
        best = max(candidates, key=lambda case: len(tried(case) & left))
        assert tried(best) & left, f"no case tries {first[0]}"
        cases.append(ordered(best))
        left -= tried(best)
        print(len(cases), len(left), *cases[-1], flush=True)
    return cases


def _grown(case: set[str], left: set[Pair], allowed: set[Pair], folder: Path, chance: random.Random) -> set[str]:
    if not case & NEAR and "fp64" not in case and not any(OPTIONS[name].group == "precision" for name in case):
        case = case | {"fp64"}
    most = MOST_WORKERS if possible(case, folder, MOST_WORKERS) else 2 * MOST_WORKERS
    if not possible(case, folder, most):
        # What its own needs or ZeRO's default do not allow: another stage may.
        case = next((case | {f"zero={z}"} for z in (0, 1, 3, 2) if possible(case | {f"zero={z}"}, folder, most)), case)
    groups = [group for group in GROUPS if not any(OPTIONS[name].group == group for name in case)]
    chance.shuffle(groups)
    for group in groups:
        choices = [name for name, option in OPTIONS.items() if option.group == group]
        choices = [name for name in choices if all(frozenset((name, other)) in allowed for other in case)]
        chance.shuffle(choices)
        gains = {name: len(tried(case | {name}) & left) - len(tried(case) & left) for name in choices}
        for name in sorted(choices, key=lambda name: -gains[name]):
            if gains[name] > 0 and possible(case | {name}, folder, most):
                case = case | {name}
                break
    return case


FAMILIES = {
    "Layout": ("ZeRO stage", "replicas", "pipeline", "gathering", "post-validation", "ulysses", "ring", "weights", "copies"),
    "Numbers": ("precision", "reduction", "parameters", "compilation", "in backward"),
    "Memory": ("loss", "recomputation", "compression", "offloading", "states", "rows", "gradients"),
    "Optimizer": ("optimizer", "low-rank states", "low-rank side", "assignment"),
    "Sparsity": ("sparsity",),
    "Model and batch": (
        "tie embeddings", "qk norm", "stable embedding", "window", "soft caps", "initial weights", "documents", "micro-batches",
        "clipping",
    ),
    "Fine-tuning": ("adapter", "adapter's start", "dropout", "frozen numbers", "data"),
    "Run": ("learning rate", "spikes", "average", "norms", "another layout"),
}  # fmt: skip
HEAD = """# What goes with what

Made by `python tests/composition.py`, by asking the cases of the tests and the refusals of the product; a test keeps it current.

A number is a case, the line of `tests/cases.txt` that has both options: `tests/test_composition.py` runs it on its layout and on
one process, and losses, gradient norms, held-out losses, parameters, states and masks are the same to 1e-9 in 64 bits. `~`: one of
the two rounds to fewer bits, and the losses are as near to those of 64 bits as one process's are. `r` and a number: the run is
refused before it starts, in the words below. A dash: the two are choices of one. Of the cases {now}
run in `make test`, the others with `pytest --full`.

`fused_loss` and `plain_loss` are the two values of `memory.fused_loss`, `int8` is `memory.compress=int8`, `offload=files`
`memory.offload_activations=FOLDER`, `states`, `rows` and `gradients` are what `memory.offload_states`, `memory.offload_params` and
`memory.offload_gradients` say where they wait, on the `host` or in `files`, `accumulation` is several micro-batches a step, `assign`
8-bit states for the embedding by `optim.assign`, `frozen` embeddings and norms that do not learn, `frozen=nf4`
`model.frozen_dtype=nf4`, `caps` are `model.attention_cap` and `model.logit_cap`, `lora`, `dora`, `bone`,
`adalora` and `lq_lora` are `adapter=...`, `pissa`, `eva` and `corda` `adapter.init=...`, `fisher` `adapter.fisher` of `lq_lora`,
`dropout` `adapter.dropout`, `mixture` and `chat` `data=...`, the one of two sources, `average` is `average.ema`, `norms`
`log.norms_every`, `moved` a run that began on one process and went on on this layout; with `on_spike` one step is a spike. `qwz` is
`parallel.quantize_gather=int8`, `hpz` `parallel.inner_shard=1`.
Not here: `sparsity.semi_structured`, which needs a GPU (`benchmarks/gpu.py`), and `parallel.quantize_reduce`, the one option that is
another run on another layout ([quantised-messages.md](quantised-messages.md)).
"""
RESUMED = {
    "fixed": "a checkpoint must agree in it",
    "fixed as steps": "a checkpoint must agree in the steps that it came to; `update_every` only where it was said as a share",
    "ask": "`resume=auto` refuses another value, and says how to go on with it on purpose: by the path of the checkpoint",
    "may change": "has its new value from there on, and the run says so",
    "apart": "how a run is found and started; nothing is said",
}


def page(folder: Path) -> str:
    """The page. Raises ValueError where a pair is neither tried nor refused."""
    proved: dict[Pair, str] = {}
    for number, case in enumerate(read_cases(), 1):
        _require_possible(tuple(case), folder)
        for pair in tried(case):
            proved.setdefault(pair, f"~{number}" if pair & NEAR else f"{number}")
        for name in case:
            proved.setdefault(frozenset((name,)), f"{number}")
    refused = {pair: refusal(pair, folder) for pair in pairs() if pair not in proved}
    if open_ := [" with ".join(ordered(pair)) for pair, said in refused.items() if said is None]:
        raise ValueError(
            f"neither tried nor refused: {', '.join(open_)}; python tests/composition.py --draw draws cases"
        )
    words = list(dict.fromkeys(said for said in refused.values() if said is not None))
    cells = proved | {pair: f"r{words.index(said) + 1}" for pair, said in refused.items() if said is not None}
    lines = [HEAD.format(now=", ".join(map(str, NOW)))]
    rows = list(OPTIONS)
    for family, groups in FAMILIES.items():
        columns = [name for name, option in OPTIONS.items() if option.group in groups]
        lines += [f"## {family}", "", _row(["", *(f"`{name}`" for name in columns)]), "|---" * (len(columns) + 1) + "|"]
        lines += [_row([f"`{row}`", *(cells.get(frozenset((row, column)), "–") for column in columns)]) for row in rows]
        lines += [""]
        rows = [name for name in rows if name not in columns]
    lines += ["## Refusals", "", *(f"- r{number}: {said}" for number, said in enumerate(words, 1)), ""]
    lines += ["## What a resumed run may change", ""]
    for word, meaning in RESUMED.items():
        keys = dict.fromkeys(f"`{key}`" for key, said in options_of(TrainConfig) if said == word)
        lines += [f"- *{word}*: {meaning}: {', '.join(keys)}."]
    return "\n".join(lines) + "\n"


@functools.cache
def _require_possible(case: tuple[str, ...], folder: Path) -> None:
    """A case that is refused proves nothing. Raises ValueError."""
    case_config(case, folder)


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def main(arguments: list[str]) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_times(folder)
        if "--draw" in arguments:
            cases = draw(folder)
            DRAWN.write_text("".join(f"{' '.join(case)}\n" for case in cases))
        PAGE.write_text(page(folder))


if __name__ == "__main__":
    main(sys.argv[1:])
