"""Which options go together: what a user chooses from, and the cases in which each pair of them is tried together.

A case is a run of some of the options, one of each group, written as a line of their names. `tests/test_composition.py` runs every
case on its layout and on one process; `tests/composition.py` draws the lines and makes docs/composition.md of them.
"""

import copy
import functools
import json
import random
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from tokenizers import Tokenizer, models

from rowwise.launch.compose import compose_tree
from rowwise.trainer.check import check
from rowwise.trainer.config import TrainConfig, config_from_tree
from rowwise.trainer.models.config_json import their_config
from rowwise.trainer.models.decoder import ModelConfig, parameter_specs
from rowwise.trainer.models.huggingface import check_source, write_folder

STEPS = 3


@dataclass(frozen=True)
class Option:
    """`overrides`: what the user gives, KEY=VALUE or GROUP=CHOICE; `needs`: what must stand beside it, unless another option
    says otherwise, and where the choice of a group has it."""

    name: str
    group: str
    overrides: tuple[str, ...]
    needs: tuple[str, ...] = ()

    @property
    def keys(self) -> set[str]:
        """The options of the configuration that it sets."""
        return self._keys_of(self.overrides)

    @property
    def needed(self) -> set[str]:
        """Those that must stand beside it."""
        return self._keys_of(self.needs)

    @staticmethod
    def _keys_of(words: Iterable[str]) -> set[str]:
        keys = {word.partition("=")[0] for word in words}
        return {f"{key}.name" if key in CHOSEN else key for key in keys}


CHOSEN = ("optim", "sparsity", "precision", "schedule", "adapter", "data")
TWO_STAGES = ("parallel.pipeline=2",)
LOW_RANK = ("optim.rank=8", "optim.refresh_every=2")
EVOLVING = ("sparsity.update_every=1", "sparsity.stop_at=2")
FREEZING = ("{match: embed.weight, rule: frozen}", "{match: '*norm.weight', rule: frozen}")
LORA = ("adapter=lora", "adapter.rank=4")
TRIPLETS = ("adapter.rank=4", "adapter.target_rank=2", "adapter.start=0", f"adapter.stop={STEPS}", "adapter.every=1")
FALLING = ("sparsity.update_every=1", "sparsity.start_at=1", "sparsity.stop_at=2")


def _options() -> Iterable[Option]:
    for zero in range(4):
        yield Option(f"zero={zero}", "ZeRO stage", (f"parallel.zero={zero}",))
    yield Option("replicate", "replicas", ("parallel.replicate=2",))
    for name in ("gpipe", "1f1b", "interleaved_1f1b", "zb_h1", "zb_h2", "zb_v", "blockwise", "auto"):
        chunks = (
            ("parallel.virtual_stages=2", "model.layers=4") if name in ("interleaved_1f1b", "zb_v", "blockwise") else ()
        )
        times = ("parallel.pipeline_costs=/FOLDER/times.json",) if name == "auto" else ()
        yield Option(name, "pipeline", (*TWO_STAGES, f"parallel.pipeline_schedule={name}"), (*chunks, *times))
    for name in ("micro_batch", "run"):
        needs = (*TWO_STAGES, "parallel.zero=3")
        yield Option(f"gather={name}", "gathering", (f"parallel.pipeline_gather={name}",), needs)
    yield Option("post_validation", "post-validation", ("parallel.post_validation=true",), TWO_STAGES)
    yield Option("ulysses", "ulysses", ("parallel.ulysses=2",))
    for name in ("contiguous", "zigzag", "striped"):
        yield Option(f"ring={name}", "ring", ("parallel.ring=2", f"parallel.ring_order={name}"))
    yield Option("qwz", "weights", ("parallel.quantize_gather=int8",))
    yield Option("hpz", "copies", ("parallel.inner_shard=1",), ("parallel.zero=3",))
    for name in ("fp64", "fp32", "bf16", "fp16"):
        yield Option(name, "precision", (f"precision={name}",))
    yield Option("reduce=bf16", "reduction", ("precision.reduce=bf16",), ("precision=bf16",))
    yield Option("param_dtype", "parameters", ("optim.param_dtype=bf16",), ("precision=bf16",))
    yield Option("compile", "compilation", ("compile=true",))
    for name, value in (("fused_loss", "true"), ("plain_loss", "false")):
        yield Option(name, "loss", (f"memory.fused_loss={value}",))
    for form in ("selective", "full", "0.4"):
        yield Option(f"recompute={form}", "recomputation", (f"memory.recompute={form}",))
    yield Option("int8", "compression", ("memory.compress=int8",))
    for name, place in (("host", "cpu"), ("files", "/FOLDER")):
        yield Option(f"offload={name}", "offloading", (f"memory.offload_activations={place}",))
    beside = ("parallel.zero=3", "memory.offload_states=/FOLDER", "memory.offload_params=/FOLDER")
    for name, place in (("host", "cpu"), ("files", "/FOLDER")):
        yield Option(f"states={name}", "states", (f"memory.offload_states={place}",))
        yield Option(f"rows={name}", "rows", (f"memory.offload_params={place}",), beside[:2])
    yield Option("gradients=files", "gradients", ("memory.offload_gradients=/FOLDER",), beside)
    yield Option("in_backward", "in backward", ("optim.in_backward=true",))
    for name in ("adamw", "adamw8bit", "lion", "lion8bit", "adafactor", "muon"):
        yield Option(name, "optimizer", (f"optim={name}",))
    for name in ("l2", "nuclear"):
        yield Option(f"lion {name}".replace(" ", "-"), "optimizer", ("optim=lion", f"optim.kappa={name}"))
    for name in ("galore", "dct", "fira", "apollo", "apollo_mini"):
        yield Option(name, "optimizer", (f"optim={name}",), LOW_RANK)
    yield Option("state_bits=8", "low-rank states", ("optim.state_bits=8",), ("optim=dct", *LOW_RANK))
    yield Option("side=short", "low-rank side", ("optim.side=short",), ("optim=dct", *LOW_RANK))
    yield Option("assign", "assignment", ("optim.assign=[{match: embed.weight, rule: adamw8bit}]",))
    yield Option("frozen", "assignment", (f"optim.assign=[{', '.join(FREEZING)}]",))
    yield Option("static", "sparsity", ("sparsity=static",))
    for name in ("set", "rigl", "srigl"):
        yield Option(name, "sparsity", (f"sparsity={name}",), EVOLVING)
    for name in ("gradual", "st3", "pdp", "pdp_rows", "pdp_nm"):
        warm = ("sparsity.temperature=0.01",) if name.startswith("pdp") else ()
        yield Option(name, "sparsity", (f"sparsity={name}",), (*FALLING, *warm))
    yield Option("nm", "sparsity", ("sparsity=nm",), ("sparsity.decay=0.3",))
    for key in ("tie_embeddings", "qk_norm", "stable_embedding"):
        yield Option(key, key.replace("_", " "), (f"model.{key}=true",))
    yield Option("window", "window", ("model.window=5",))
    yield Option("caps", "soft caps", ("model.attention_cap=2", "model.logit_cap=4"))
    yield from _fine_tuning()
    yield Option("init_from", "initial weights", ("model.init_from=/FOLDER/source",))
    yield Option("mask_documents", "documents", ("data.mask_documents=true",))
    yield Option("accumulation", "micro-batches", ("batch.micro_size=several",))
    yield Option("clip_norm", "clipping", ("clip_norm=0.5",))
    for name in ("constant", "linear", "cosine", "wsd", "infinite", "one_cycle", "lr_range"):
        yield Option(f"lr={name}", "learning rate", (f"schedule={name}",))
    yield Option("momentum-cycle", "learning rate", ("schedule=one_cycle", "schedule.momentum=[0.95,0.5]"))
    yield Option("on_spike=skip", "spikes", ("on_spike=skip",))
    yield Option("on_spike=rollback", "spikes", ("on_spike=rollback",), ("checkpoint.every=1",))
    yield Option("average", "average", ("average.ema=0.6",))
    yield Option("norms", "norms", ("log.norms_every=2",))
    yield Option("moved", "another layout", ())


def _fine_tuning() -> Iterable[Option]:
    for name in ("lora", "dora", "bone"):
        yield Option(name, "adapter", (f"adapter={name}",), ("adapter.rank=4",))
    yield Option("adalora", "adapter", ("adapter=adalora",), TRIPLETS)
    yield Option("lq_lora", "adapter", ("adapter=lq_lora",), ("adapter.rank=4", "adapter.bits=4.5"))
    yield Option("pissa", "adapter's start", ("adapter.init=pissa",), LORA)
    for name in ("eva", "corda"):
        yield Option(name, "adapter's start", (f"adapter.init={name}",), (*LORA, "adapter.init_batches=2"))
    few = ("adapter=lq_lora", "adapter.rank=4", "adapter.bits=4.5", "adapter.init_batches=2")
    yield Option("fisher", "adapter's start", ("adapter.fisher=true",), few)
    yield Option("dropout", "dropout", ("adapter.dropout=0.3",), LORA)
    for name in ("bf16", "int8", "nf4"):
        yield Option(f"frozen={name}", "frozen numbers", (f"model.frozen_dtype={name}",), LORA)
    tokens = "name: tokens, files: /FOLDER/tokens.bin, holdout: 0.1"
    sources = f"[{{{tokens}, separator: 0, mask_documents: true, weight: 3}}, {{{tokens}, label: old, weight: 1}}]"
    yield Option("mixture", "data", ("data=mixture", f"data.sources={sources}"))
    chat = ("data=chat", "data.files=/FOLDER/rows.jsonl", "data.tokenizer=/FOLDER/tokenizer")
    yield Option("chat", "data", (*chat, "data.cache_dir=/FOLDER/cache", "data.holdout=0.3"))


OPTIONS = {option.name: option for option in _options()}
GROUPS = list(dict.fromkeys(option.group for option in OPTIONS.values()))
NEAR = {"fp32", "bf16", "fp16", "reduce=bf16", "param_dtype"}  # with these, layouts differ by roundings
LAYOUT = {  # groups of options that say how a run is carried out, which is nothing to its numbers
    "ZeRO stage", "replicas", "pipeline", "gathering", "post-validation", "ulysses", "ring", "copies", "compilation", "loss",
    "recomputation", "offloading", "states", "rows", "gradients", "in backward", "micro-batches", "another layout",
}  # fmt: skip
DRAWN = Path(__file__).with_name("cases.txt")
# Of the cases those that try most pairs for the time that they take, 716 of 5,042: the others are run in full alone.
NOW = (3, 196, 290, 301, 357)

SMALL = (
    "name=case", "run_dir=/FOLDER/case", f"steps={STEPS}", "log_every=1000", "report=never", "resume=auto",
    "model.layers=2", "model.dim=64", "model.heads=4", "model.kv_heads=2", "model.ffn_dim=76", "model.init_std=0.2",
    "model.vocab_size=67", "data=tokens", "data.files=[/FOLDER/tokens.bin]", "data.separator=0", "data.holdout=0.1",
    "batch.global_size=16", "batch.seq_len=13", "precision=fp64", "schedule=constant", "optim.lr=0.01", "clip_norm=0",
    "eval.every=3", "eval.batches=1", "sample.tokens=0", "checkpoint.every=0",
)  # fmt: skip


@functools.cache
def _composed(*overrides: str) -> dict[str, Any]:
    return compose_tree(list(overrides))


def case_tree(names: Iterable[str], folder: Path, zero: int = 1) -> tuple[dict[str, Any], int]:
    """The tree of a run of these options, and how many workers it takes: two a degree, and two shards where there would be
    nothing to split otherwise. `zero`: of those that do not say."""
    names = list(names)
    chosen = [OPTIONS[name] for name in names]
    wanted, needed = (
        [_split(word) for option in chosen for word in getattr(option, kind)] for kind in ("overrides", "needs")
    )
    tree = copy.deepcopy(_composed(*SMALL))
    for group, choice in {key: value for key, value in needed + wanted if key in CHOSEN}.items():
        if tree[group]["name"] != choice:
            rate = {"lr": 0.01} if group == "optim" else {}
            tree[group] = copy.deepcopy(_composed(f"{group}={choice}")[group]) | rate
    tree["parallel"]["zero"] = zero
    for hard, words in ((False, needed), (True, wanted)):
        for key, value in words:
            *path, last = key.split(".")
            node = functools.reduce(lambda inner, part: inner[part], path, tree)
            if key not in CHOSEN and (hard or last in node):  # what is needed of another choice is not
                node[last] = value
    layout = tree["parallel"]
    sharers, others = layout["ring"] * layout["ulysses"], layout["pipeline"] * layout["replicate"]
    layout["shard"] = 2 if sharers == 1 and (layout["zero"] > 0 or others == 1) else 1
    several = 4 if {"zb_h2", "zb_v"} & set(names) else 2 if layout["pipeline"] > 1 or "accumulation" in names else 1
    tree["batch"]["micro_size"] = 16 // (layout["replicate"] * layout["shard"]) // several
    return json.loads(json.dumps(tree).replace("/FOLDER", str(folder))), others * sharers * layout["shard"]


def _split(word: str) -> tuple[str, Any]:
    key, _, value = word.partition("=")
    return key, yaml.safe_load(value)


def case_config(names: Iterable[str], folder: Path, zero: int = 1) -> tuple[TrainConfig, int]:
    """The checked configuration of a run of these options, and how many workers it takes. Raises ValueError."""
    tree, workers = case_tree(names, folder, zero)
    return _checked(tree, workers, folder), workers


def alone_config(names: list[str], folder: Path, exact: bool = False) -> TrainConfig:
    """The same run on one process, in one micro-batch and step by step; `exact`: in 64 bits. (What is made again of codes is another
    number than what is kept.)"""
    layout = LAYOUT - {"recomputation"} if "int8" in names else LAYOUT
    kept = [name for name in names if OPTIONS[name].group not in layout and not (exact and name in NEAR)]
    tree, _ = case_tree(kept, folder)
    tree["model"]["layers"] = case_tree(names, folder)[0]["model"]["layers"]  # of which a pipeline may need more
    tree["parallel"] |= {"shard": 1}
    tree["batch"]["micro_size"] = tree["batch"]["global_size"]
    return _checked(tree, 1, folder)


def _checked(tree: dict[str, Any], workers: int, folder: Path) -> TrainConfig:
    config = check(config_from_tree(tree), workers)
    if config.model.init_from is not None:
        source = _source(config.model, folder)
        check_source(source, config.model)
        config = replace(config, model=replace(config.model, init_from=str(source)))
    return config


def _source(model: ModelConfig, folder: Path) -> Path:
    """A Hugging Face folder of a model of this shape, as far as there is one."""
    kind = f"{'-tied' * model.tie_embeddings}{'-normed' * model.qk_norm}{'-windowed' * (model.window is not None)}"
    source = folder / f"source-{model.layers}{kind}"
    if not source.exists():
        source.mkdir()
        plain = replace(model, stable_embedding=False, attention_cap=None, logit_cap=None)
        random = torch.Generator().manual_seed(5)

        def fill_(tensors: dict[str, torch.Tensor]) -> None:
            for tensor in tensors.values():
                tensor.normal_(0.0, 0.2, generator=random)

        said = their_config(plain, torch.float32, 128, None)
        write_folder(source, said, parameter_specs(plain), fill_, torch.float32, 10**9)
    return source


def read_cases() -> list[list[str]]:
    """The cases, each the names of its options."""
    return [line.split() for line in DRAWN.read_text().splitlines()] if DRAWN.exists() else []


def write_chat(folder: Path) -> None:
    """Conversations of a few letters, each a token, and their tokenizer."""
    letters, marks = "abcdefghij", ("<u>", "<a>", "<e>")
    library = Tokenizer(models.BPE(vocab={letter: n for n, letter in enumerate(letters)}, merges=[]))
    library.add_special_tokens(list(marks))
    (folder / "tokenizer").mkdir()
    library.save(str(folder / "tokenizer/tokenizer.json"))
    (folder / "tokenizer/chat_template.jinja").write_text(
        "{% for m in messages %}{% if m.role == 'user' %}<u>{{ m.content }}{% else %}<a>{% generation %}{{ m.content }}<e>"
        "{% endgeneration %}{% endif %}{% endfor %}"
    )
    draw = random.Random(3)
    with (folder / "rows.jsonl").open("w") as rows:
        for _ in range(300):
            said = {role: "".join(draw.choices(letters, k=draw.randint(1, 6))) for role in ("prompt", "completion")}
            rows.write(f"{json.dumps(said)}\n")


def write_times(folder: Path) -> None:
    """What `auto` plans by: measured times, as a file."""
    part = {"forward": 1.0, "input": 1.0, "weight": 1.0}
    nothing = dict.fromkeys(part, 0.0)
    times = {"before": nothing, "layer": part, "after": nothing, "send": 0.0, "gather": 0.0}
    (folder / "times.json").write_text(json.dumps(times))
