"""Fine-tuning that works: a small model is trained on text first, then taught conversations by each method, at equal tokens.

    python benchmarks/fine_tuning.py FOLDER                    all of it: half an hour of two cores; what is finished there stays

| run | what it is |
|---|---|
| base | 2.6 million parameters, byte-pair tokens of one half of the standard library's files |
| whole, galore | all parameters learn, by AdamW or by GaLore |
| lora, dora, pissa, eva, corda | adapters of rank 8 beside every hidden matrix, which is frozen |
| nf4 | LoRA beside matrices of 4 bits |
| adalora, bone | adapters as their choices have them: 12 triplets of which 8 stay, and blocks of 16 |
| lq_lora, lq_lora_3 | codes and adapters that begin as W together, at 4 bits a number and at 3 |
| lq_lora_3_fisher | at 3, and errors count by squared gradients |
| replay 0.05, 0.25 | whole, where that share of the samples is of the text that the base was trained on |

Conversations (`conversations.py`): what a function is to do, and the function, of the other half. Whole training and LoRA run at two
learning rates, the others at one that their like do well with. Told are the loss of what the assistant says in conversations that were
held out, in nats per token, and the loss of held-out text of the first half, which says what was forgotten; both before and after.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from conversations import END, sources, write_conversations, write_tokenizer
from record import write_record

MODEL = [
    "model.vocab_size=2048",
    "model.dim=192",
    "model.layers=4",
    "model.heads=4",
    "model.kv_heads=2",
    "model.ffn_dim=512",
]
RATES = {"whole": (3e-4, 1e-3), "galore": (1e-3,), "lora": (1e-3, 4e-3), "dora": (4e-3,), "pissa": (4e-3,),
         "eva": (4e-3,), "corda": (5e-4, 4e-3), "adalora": (4e-3,), "bone": (4e-3,), "nf4": (4e-3,), "lq_lora": (4e-3,),
         "lq_lora_3": (4e-3,), "lq_lora_3_fisher": (4e-3,)}  # fmt: skip
METHODS = {
    "whole": ["optim=adamw"],
    "galore": ["optim=galore", "optim.rank=48"],
    "lora": ["optim=adamw", "adapter=lora"],
    "dora": ["optim=adamw", "adapter=dora"],
    "pissa": ["optim=adamw", "adapter=lora", "adapter.init=pissa"],
    "eva": ["optim=adamw", "adapter=lora", "adapter.init=eva"],
    "corda": ["optim=adamw", "adapter=lora", "adapter.init=corda"],
    "adalora": ["optim=adamw", "adapter=adalora"],
    "bone": ["optim=adamw", "adapter=bone"],
    "lq_lora": ["optim=adamw", "adapter=lq_lora", "adapter.bits=4.0"],
    "lq_lora_3": ["optim=adamw", "adapter=lq_lora", "adapter.bits=3.0"],
    "lq_lora_3_fisher": ["optim=adamw", "adapter=lq_lora", "adapter.bits=3.0", "adapter.fisher=true"],
    "nf4": ["optim=adamw", "adapter=lora", "model.frozen_dtype=nf4"],
}
REPLAYS = (0.05, 0.25)  # at the first rate of whole
STEPS, BATCH, LENGTH = 130, 8, 256


def rowwise(*words: str) -> None:
    """Carries out a command on one core. Raises CalledProcessError."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-P", "-m", "rowwise.launch.cli", *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)[:300]}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")


def listed(paths: list[Path]) -> str:
    return f"data.files=[{','.join(map(str, paths))}]"


class Place:
    """Where everything lies, and what the runs have in common."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.tokenizer, self.base = folder / "tokenizer", folder / "base"
        self.chat, self.held_out = folder / "train.jsonl", folder / "held_out.jsonl"
        self.text = sources(to_read=True)
        self.text_keys = [
            f"data.tokenizer={self.tokenizer / 'tokenizer.json'}",
            f'data.end_of_text="{END}"',
            "data.mask_documents=true",
        ]

    def make(self) -> None:
        """Makes conversations, the tokenizer, and the base, as a folder of Hugging Face."""
        if not self.held_out.exists():
            write_tokenizer(self.tokenizer, 2048)
            write_conversations(self.folder)
        if not (self.base / "config.json").exists():
            data = ["data=text", listed(self.text), *self.text_keys, f"batch.seq_len={LENGTH}"]
            rowwise(
                "train",
                *data,
                *MODEL,
                "steps=600",
                "optim.lr=3e-3",
                "name=base",
                f"run_dir={self.folder}/runs/base",
                "nproc=1",
            )
            rowwise("export", f"run={self.folder}/runs/base", f"to={self.base}")

    def data(self, replay: float) -> list[str]:
        """The words of what a run reads."""
        chat = {"name": "chat", "files": str(self.chat), "tokenizer": str(self.tokenizer), "holdout": 0}
        if not replay:
            return ["data=chat", *(f"data.{key}={value}" for key, value in chat.items() if key != "name")]
        text = {"name": "text", "files": list(map(str, self.text)), "tokenizer": str(self.tokenizer / "tokenizer.json"),
                "end_of_text": END, "mask_documents": True}  # fmt: skip
        config = self.folder / f"replay_{replay}.yaml"
        config.write_text(json.dumps({"data": {"sources": [chat | {"weight": 1 - replay}, text | {"weight": replay}]}}))
        return ["data=mixture", f"config={config}"]

    def train(self, name: str, method: str, lr: float, replay: float = 0.0) -> dict[str, Any]:
        """Teaches the base, and returns what came of it."""
        run = self.folder / "runs" / name
        if not (run / "figures.json").exists():
            shape = [
                f"batch.global_size={BATCH}",
                f"batch.micro_size={BATCH}",
                f"batch.seq_len={LENGTH}",
                f"steps={STEPS}",
            ]
            plain = ["schedule=cosine", "optim.weight_decay=0", "eval.every=0", "sample.tokens=0", "nproc=1"]
            words = [*self.data(replay), *METHODS[method], f"optim.lr={lr}", *shape, *plain]
            rowwise("train", f"model={self.base}", *words, f"run_dir={run}", f"name={name}")
            (run / "figures.json").write_text(
                json.dumps({"lr": lr, "replay": replay, "method": method} | self.losses(run))
            )
        return json.loads((run / "figures.json").read_text())

    def losses(self, run: Path) -> dict[str, float]:
        """Evaluates the newest checkpoint of a run."""
        found = {}
        talk = ["data=chat", f"data.files={self.held_out}", f"data.tokenizer={self.tokenizer}", "data.holdout=0"]
        text = ["data=text", listed(self.text), *self.text_keys, "data.holdout=0.02"]
        for kind, words in (("conversations", talk), ("text", text)):
            to = run / f"{kind}.json"
            rowwise("evaluate", f"run={run}", *words, f"seq_len={LENGTH}", "batches=all", f"to={to}")
            found[kind] = json.loads(to.read_text())["checkpoints"][-1]["loss"]
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    place = Place(options.folder)
    place.make()
    runs = [(f"{method}_{lr:g}", method, lr, 0.0) for method, rates in RATES.items() for lr in rates]
    runs += [(f"replay_{share}", "whole", RATES["whole"][0], share) for share in REPLAYS]
    with ThreadPoolExecutor(options.processes) as pool:
        before = pool.submit(place.losses, options.folder / "runs/base")
        figures = dict(zip([name for name, *_ in runs], pool.map(lambda run: place.train(*run), runs), strict=True))
    told = {"base": before.result(), "tokens": STEPS * BATCH * LENGTH, "runs": figures}
    print("| run | learning rate | conversations | text |\n|---|---|---|---|")
    for name, one in itertools.chain([("base", told["base"])], figures.items()):
        print(f"| {name} | {one.get('lr', '')} | {one['conversations']:.3f} | {one['text']:.3f} |")
    print(write_record("fine_tuning", told))


if __name__ == "__main__":
    main()
