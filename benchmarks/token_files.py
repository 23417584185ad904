"""`rowwise tokenize` beside `tokenizers` alone with as many threads: tokens a second, and what memory both take.

    python benchmarks/token_files.py --megabytes 200 --rounds 3
    python benchmarks/token_files.py --megabytes 10000 --rounds 1 --alone 0 --tokenizer words --name token_files_large
                                                                how memory goes with the size of the text

Text: the Python files of the standard library and of what is installed beside it, in files of 64 MB, again and again up to the size.
Tokenizer: 32,768 byte-level pairs, or words between spaces, which are faster, trained on the standard library. Alone: the same files,
read in the same pieces, given to `encode_batch_fast` a megabyte at a time; its tokens are counted, and neither made into numbers nor
kept. Ours reads, makes numbers, hashes and writes them. Each is a process of its own, from its start to its end, in turns. Memory is
the sum of proportional set sizes of a process and its children, looked at every half second. On a machine that others use, the seconds
that cores worked say more than those that passed. Writes results/token_files.json.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
from record import spread, write_record
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

FILE_BYTES = 64_000_000
ALONE = """
import os, sys, time
from pathlib import Path
from tokenizers import Tokenizer
from rowwise.trainer.data.documents import whole_file
from rowwise.trainer.data.pieces import pieces
tokenizer, tokens = Tokenizer.from_file(sys.argv[1]), 0
batch, size = [], 0
def count(batch):
    return sum(len(one) for one in tokenizer.encode_batch_fast(batch, add_special_tokens=False))
for path in sorted(Path(sys.argv[2]).iterdir()):
    for piece in pieces(whole_file(path), 0.0):
        batch.append(piece.text.decode())
        size += len(piece.text)
        if size >= 1 << 20:
            tokens += count(batch)
            batch, size = [], 0
print(tokens + count(batch))
"""


def texts() -> Iterator[bytes]:
    """Real text, for ever."""
    paths = sysconfig.get_paths()
    files = sorted({p for root in (paths["stdlib"], paths["purelib"]) for p in Path(root).rglob("*.py")})
    while True:
        for path in files:
            try:
                content = path.read_bytes()
                content.decode()
            except (OSError, UnicodeDecodeError):
                continue
            yield content


def write_corpus(folder: Path, size: int) -> None:
    """Files of text of `size` bytes together."""
    stream, left, number = texts(), size, 0
    while left > 0:
        number += 1
        with (folder / f"{number:04}.txt").open("wb") as file:
            while file.tell() < min(FILE_BYTES, left):
                file.write(next(stream))
            left -= file.tell()


def train_tokenizer(path: Path, kind: str) -> None:
    if kind == "words":
        library = Tokenizer(models.WordLevel(unk_token="<unk>"))
        library.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        trainer = trainers.WordLevelTrainer(vocab_size=32_768, special_tokens=["<unk>"], show_progress=False)
    else:
        library = Tokenizer(models.BPE())
        library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=32_768, initial_alphabet=alphabet, show_progress=False)
    library.train([str(p) for p in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))], trainer)
    library.save(str(path))


def measured(command: list[str], threads: int) -> dict[str, Any]:
    """Seconds, the most bytes at once, and what it wrote last."""
    environment = os.environ | {"RAYON_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "true"}
    began, most, before = time.perf_counter(), 0, cpu_seconds()
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(command, stdout=said, env=environment)
        while process.poll() is None:
            most = max(most, held(process.pid))
            time.sleep(0.5)
        seconds = time.perf_counter() - began
        assert process.returncode == 0, command
        said.seek(0)
        cpu = cpu_seconds() - before
        return {"seconds": seconds, "cpu_seconds": cpu, "most_bytes": most, "said": said.read().strip()}


def cpu_seconds() -> float:
    """What cores have worked for children of this process that are over."""
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    return spent.ru_utime + spent.ru_stime


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def held(pid: int) -> int:
    """The memory of a process and its children, shared pages once."""
    total = 0
    try:
        for one in [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]:
            total += one.memory_full_info().pss
    except psutil.Error:
        pass
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--alone", type=int, default=1, help="0: only ours")
    parser.add_argument("--tokenizer", choices=("pairs", "words"), default="pairs")
    parser.add_argument("--text", help="a folder of text that is there, in place of one that is made")
    parser.add_argument("--name", default="token_files")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as there:
        folder, text, tokenizer = Path(there), Path(given.text or f"{there}/text"), Path(there) / "tokenizer.json"
        if not given.text:
            text.mkdir()
            write_corpus(text, given.megabytes * 1_000_000)
        train_tokenizer(tokenizer, given.tokenizer)
        megabytes = size_of(text) / 1e6
        rounds: dict[str, list[dict[str, Any]]] = {"ours": [], "alone": []}
        for number in range(given.rounds):
            to = folder / f"tokens-{number}"
            words = [f"data.files={text}", f"data.tokenizer={tokenizer}", "data.holdout=0", f"to={to}"]
            ours = [sys.executable, "-m", "rowwise.launch.token_files", "data=text", *words, f"nproc={given.processes}"]
            rounds["ours"].append(measured(ours, given.processes))
            tokens = json.loads((to / "meta.json").read_text())["tokens"]["train"]
            if given.alone:
                alone = [sys.executable, "-c", ALONE, str(tokenizer), str(text)]
                rounds["alone"].append(measured(alone, given.processes))
                assert int(rounds["alone"][-1]["said"]) == tokens
    figures: dict[str, Any] = {
        "megabytes": megabytes,
        "tokenizer": given.tokenizer,
        "processes": given.processes,
        "tokens": tokens,
    }
    for name, every in rounds.items():
        if every:
            rates = [tokens / one["seconds"] for one in every]
            figures[name] = {
                "tokens_per_second": spread(rates) if len(rates) > 1 else rates[0],
                "most_bytes": max(one["most_bytes"] for one in every),
                "seconds": [one["seconds"] for one in every],
                "cpu_seconds": [one["cpu_seconds"] for one in every],
            }
            print(f"{name:6} {sum(rates) / len(rates):12,.0f} tokens/s  {figures[name]['most_bytes'] / 1e6:8,.0f} MB")
    if given.alone:
        for kind in ("seconds", "cpu_seconds"):
            pairs = zip(rounds["alone"], rounds["ours"], strict=True)
            ratios = [alone[kind] / ours[kind] for alone, ours in pairs]
            figures[f"ours_beside_alone_by_{kind}"] = ratios
            print(f"ours beside alone, by {kind}: {', '.join(f'{ratio:.2f}' for ratio in ratios)}")
    print(write_record(given.name, figures))


if __name__ == "__main__":
    main()
