"""The same small Llama trained by this trainer and by others: DeepSpeed, Accelerate, the transformers Trainer, Lightning.

    python benchmarks/peers.py                      3 rounds of all, about 4 minutes each
    python benchmarks/peers.py --rounds 1 --only 'native;Lightning'

Each contestant is what its user would write, a file of benchmarks/peers/ that is run as it stands; ours is a YAML. All read one
Hugging Face folder for the weights, the same tokens in the same order, 16 sequences of 256 a step on 2 ranks over gloo, in float32,
with one thread a rank; AdamW with the same numbers, and a whole training state saved every 8th step. All write the mean loss over
ranks at each step. The first loss of all must agree to 1e-5, and all models have as many parameters, or this fails.

A round starts every contestant by torchrun, one after another while those that have started sleep: seconds to the first step. Then
they take turns of 4 steps, so that they are compared within seconds of each other: every second turn begins with a save, of which
are told the seconds in which the loop stands, and how much longer than the others such a turn takes. Speed is that of the other
turns. Peak bytes are the most that a rank's process had resident, with what it imported. Lines are those that a user writes,
without imports and blank ones. The load of the machine, before the first round and after each, is recorded: of this alone it is 2.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, suppress
from multiprocessing.connection import Connection, Listener
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from peer_rank import CONTESTANTS, RANKS, SEQ_LEN, SEQUENCES, STEPS, TURN, TURNS
from record import write_record

TOLERANCE = 1e-5
CLEAN, SAVING = range(0, TURNS, 2), range(1, TURNS, 2)
Figures = dict[str, Any]


class Entrant:
    """A contestant's job, started under torchrun; it has made its warm-up steps and sleeps when this returns."""

    def __init__(self, name: str, common: Path, stack: ExitStack):
        self.name, self._folder = name, Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="peer-")))
        for path in common.iterdir():
            (self._folder / path.name).symlink_to(path)
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS),
                   str(Path(__file__).with_name("peer_rank.py")), name, str(self._folder)]  # fmt: skip
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
        began = time.time()
        with Listener(str(self._folder / "race"), backlog=RANKS) as listener:
            with (self._folder / "log").open("w") as log:
                self._process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
            stack.callback(self._end)
            listener._listener._socket.settimeout(300)  # type: ignore[attr-defined]
            self._ranks: list[Connection] = [self._accept(listener) for _ in range(RANKS)]
        self.first_step_seconds = max(found["first_step_at"] for found in self._hear()) - began
        self._hear()

    def turn(self) -> Figures:
        for rank in self._ranks:
            rank.send(None)
        ranks = self._hear()
        return {key: (sum if key == "cpu" else max)(rank[key] for rank in ranks) for key in ranks[0]}

    def losses(self) -> list[float]:
        """Those of all steps, once it has ended, or does not within two minutes: DDP of torch 2.13 may stop there, all done."""
        with suppress(subprocess.TimeoutExpired):
            if self._process.wait(120):
                self._fail()
        found = CONTESTANTS[self.name].losses(self._folder)
        assert len(found) == STEPS, f"{self.name} tells of {len(found)} steps instead of {STEPS}"
        return found

    def _accept(self, listener: Listener) -> Connection:
        try:
            return listener.accept()
        except TimeoutError:
            self._fail()

    def _hear(self) -> list[dict[str, float]]:
        try:
            return [rank.recv() for rank in self._ranks]
        except EOFError:
            self._fail()

    def _fail(self) -> NoReturn:
        self._process.wait(60)
        sys.exit(f"{self.name} failed:\n{(self._folder / 'log').read_text()[-5000:]}")

    def _end(self) -> None:
        self._process.terminate()  # torchrun ends its workers
        self._process.wait()


def make_round(names: list[str], common: Path) -> dict[str, Figures]:
    """Contestant -> its seconds to the first step, its turns and its losses."""
    with ExitStack() as stack:
        entrants = [Entrant(name, common, stack) for name in names]
        found: dict[str, Figures] = {one.name: {"first_step": one.first_step_seconds, "turns": []} for one in entrants}
        for number in range(TURNS):
            for one in entrants:
                found[one.name]["turns"].append(one.turn())
                if number + 1 == TURNS:
                    # Waits for its end, which would be beside the next one's turn.
                    found[one.name]["losses"] = one.losses()
            print(f"turn {number + 1}/{TURNS}  " + "  ".join(
                f"{name} {speed(figures['turns'][-1]):,.0f}" for name, figures in found.items()), flush=True)  # fmt: skip
        return found


def speed(turn: Figures) -> float:
    """Tokens a second, of all ranks."""
    return TURN * SEQUENCES * SEQ_LEN / turn["wall"]


def make_common(folder: Path) -> int:
    """Writes what all read: `model`, a Hugging Face folder; `tokens.bin`, for ours; `rows.bin`, the samples that ours reads, in its
    order. Returns the number of parameters, which ours must have too."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from rowwise.launch.compose import compose_tree
    from rowwise.trainer.config import config_from_tree
    from rowwise.trainer.data.open import open_data
    from rowwise.trainer.data.order import sample_indices
    from rowwise.trainer.models.decoder import parameter_specs

    text = b"".join(path.read_bytes() for path in sorted(Path(os.__file__).parent.glob("*.py")))
    np.frombuffer(text, np.uint8)[: 2 * STEPS * SEQUENCES * SEQ_LEN].astype(np.uint16).tofile(folder / "tokens.bin")
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=256, hidden_size=256, intermediate_size=704, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, rms_norm_eps=1e-5, max_position_embeddings=SEQ_LEN, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(shape)
    model.save_pretrained(folder / "model")

    given = ["data=tokens", f"data.files=[{folder / 'tokens.bin'}]", f"model.init_from={folder / 'model'}"]
    config = config_from_tree(compose_tree(given))
    corpus = open_data(config.data, config.batch.seq_len, config.model.vocab_size).train
    order = sample_indices(0, STEPS * SEQUENCES, corpus.samples, f"train/{config.seed}")
    samples = [corpus.sample(int(place)) for place in order]
    rows = np.stack([np.append(sample.inputs, sample.labels[-1]) for sample in samples])
    rows.astype(np.uint16).tofile(folder / "rows.bin")
    theirs = sum(p.numel() for p in model.parameters())
    ours = sum(spec.shape.numel() for spec in parameter_specs(config.model).values())
    assert ours == theirs, f"ours has {ours} parameters, theirs {theirs}"
    return theirs


def check_losses(found: dict[str, Figures]) -> None:
    """All began from the same weights with the same samples, or nothing here is a comparison."""
    first = {name: figures["losses"][0] for name, figures in found.items()}
    middle = statistics.median(first.values())
    if apart := {name: loss for name, loss in first.items() if abs(loss - middle) > TOLERANCE * middle}:
        sys.exit(f"the first losses are {first}: {', '.join(apart)} computes something else")


def summary(rounds: list[dict[str, Figures]], name: str) -> Figures:
    """Medians over rounds and turns, and as many times those of the contestant that it stands beside: turn by turn, round by round."""
    contestant = CONTESTANTS[name]
    beside = contestant.beside if contestant.beside in rounds[0] else name
    pairs = [(found[name], found[beside]) for found in rounds]
    measures = {
        "tokens_per_second": [tuple(speed(one["turns"][n]) for one in pair) for pair in pairs for n in CLEAN],
        "cpu_seconds": [tuple(one["turns"][n]["cpu"] for one in pair) for pair in pairs for n in CLEAN],
        "peak_bytes": [tuple(one["turns"][-1]["peak_bytes"] for one in pair) for pair in pairs],
        "first_step_seconds": [tuple(one["first_step"] for one in pair) for pair in pairs],
        "save_blocks_seconds": [tuple(one["turns"][n]["blocked"] for one in pair) for pair in pairs for n in SAVING],
        "turn_with_save_seconds": [tuple(one["turns"][n]["wall"] for one in pair) for pair in pairs for n in SAVING],
    }
    return {
        "lines": contestant.lines(),
        "beside": beside,
        **{key: middles(values) for key, values in measures.items()},
        "last_loss": rounds[-1][name]["losses"][-1],
    }


def middles(pairs: list[tuple[float, ...]]) -> Figures:
    """The median of what a contestant has, and the median, least and most of how many times the other's it is."""
    ratios = [mine / other for mine, other in pairs]
    return {"median": statistics.median(mine for mine, _ in pairs), "ratio": statistics.median(ratios),
            "least_ratio": min(ratios), "most_ratio": max(ratios)}  # fmt: skip


def table(summaries: dict[str, Figures]) -> str:
    """In Markdown: each figure, and how many times that of the native run that splits as much it is."""
    rows = [
        "| | beside | tokens/s | processor s a step | peak MB a rank | s to the first step | a save blocks, s | lines |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, figures in summaries.items():
        cells = [
            f"{figures[key]['median'] * scale:,.{digits}f} ({figures[key]['ratio']:.2f})"
            for key, scale, digits in (
                ("tokens_per_second", 1, 0), ("cpu_seconds", 1 / TURN, 2), ("peak_bytes", 1e-6, 0),
                ("first_step_seconds", 1, 1), ("save_blocks_seconds", 1, 3),
            )
        ]  # fmt: skip
        rows.append(f"| {name} | {figures['beside']} | {' | '.join(cells)} | {figures['lines']} |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", help="of the contestants, these, with ; between them; nothing is recorded")
    options = parser.parse_args()
    names = options.only.split(";") if options.only else list(CONTESTANTS)
    if unknown := set(names) - set(CONTESTANTS):
        parser.error(f"{sorted(unknown)}: possible are {list(CONTESTANTS)}")
    rounds: list[dict[str, Figures]] = []
    loads = [os.getloadavg()[0]]
    with tempfile.TemporaryDirectory(prefix="peers-") as folder:
        parameters = make_common(Path(folder))
        setting = {"ranks": RANKS, "sequences": SEQUENCES, "seq_len": SEQ_LEN, "steps": STEPS, "parameters": parameters}
        for number in range(options.rounds):
            first = number * len(names) // options.rounds  # each round begins with another
            rounds.append(make_round([*names[first:], *names[:first]], Path(folder)))
            check_losses(rounds[-1])
            loads.append(os.getloadavg()[0])
            summaries = {name: summary(rounds, name) for name in names}
            print(f"\nround {number + 1}/{options.rounds}, load {loads[-1]:.1f}\n\n{table(summaries)}\n", flush=True)
            if not options.only:
                measured = {"setting": setting, "load": loads, "contestants": summaries, "rounds": rounds}
                print(f"written: {write_record('peers', measured)}", flush=True)


if __name__ == "__main__":
    main()
