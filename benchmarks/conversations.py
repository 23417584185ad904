"""Conversations out of real text: what a function of the standard library is to do, from its docstring, and the function.

Each is JSON of one line, {"messages": [{"role": "user", ...}, {"role": "assistant", ...}]}. Conversations are made of one half of the
library's files, by the hash of their paths; a model that is to be fine-tuned reads the other half first. One function in ten, by the
hash of its text, is held out. The tokenizer, which knows the turns of ChatML, is learned from the half that is read first.
"""

import ast
import hashlib
import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

END, START, STOP = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}"
    "{% else %}{{ message['content'] + '<|im_end|>\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def sources(to_read: bool) -> list[Path]:
    """Lists one half of the standard library's files, without its tests and without packages that were installed beside it."""
    root = Path(sysconfig.get_paths()["stdlib"])
    passed_over = {"site-packages", "test", "tests", "idlelib", "lib2to3"}
    found = sorted(path for path in root.rglob("*.py") if not passed_over & set(path.relative_to(root).parts))
    return [path for path in found if _byte(str(path.relative_to(root))) % 2 == to_read]


def _byte(text: str) -> int:
    return hashlib.sha256(text.encode()).digest()[0]


def conversations(most: int) -> Iterator[dict[str, list[dict[str, str]]]]:
    """Yields one for every function with a docstring whose code, without it, has at most `most` characters."""
    for path in sources(to_read=False):
        try:
            text = path.read_text(encoding="utf-8")
            tree = ast.parse(text)
        except (UnicodeDecodeError, SyntaxError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and (said := ast.get_docstring(node)) and len(node.body) > 1:
                node.body = node.body[1:]
                code, asked = ast.unparse(node), said.strip().splitlines()[0]
                if len(code) <= most and len(asked) >= 12:
                    yield {
                        "messages": [
                            {"role": "user", "content": f"{node.name}: {asked}"},
                            {"role": "assistant", "content": code},
                        ]
                    }


def write_conversations(folder: Path, most: int = 900) -> tuple[Path, Path]:
    """Writes those to train on and those held out, one file each, every conversation once."""
    files = {False: folder / "train.jsonl", True: folder / "held_out.jsonl"}
    seen = {json.dumps(one) for one in conversations(most)}
    for held_out, path in files.items():
        lines = (line for line in sorted(seen) if (_byte(line) < 26) == held_out)
        path.write_text("".join(f"{line}\n" for line in lines))
    return files[False], files[True]


def write_tokenizer(folder: Path, vocab_size: int) -> None:
    """Writes tokenizer.json, tokenizer_config.json and chat_template.jinja."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = [END, START, STOP]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train([str(path) for path in sources(to_read=True)], trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": STOP, "pad_token": END}, indent=1)
    )
    (folder / "chat_template.jinja").write_text(TEMPLATE)
