"""Law 4: what a rank is said to hold by category, against what it held, of configurations drawn at random.

python tests/forecasts.py 60 SEED            draws and measures so many, and prints the worst and the median
"""

import random
import statistics
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from parity import step_input, write_tokens
from rowwise.launch.compose import compose_tree
from rowwise.optim.average import Average
from rowwise.optim.build import build_optimizer
from rowwise.parallel.activations.config import is_folder
from rowwise.parallel.mesh import Workers, make_mesh
from rowwise.trainer.adapters.specs import with_likely_forms
from rowwise.trainer.assemble import allocation_of, home_of
from rowwise.trainer.build import build_model
from rowwise.trainer.check import check
from rowwise.trainer.config import TrainConfig, config_from_tree
from rowwise.trainer.data.open import open_data
from rowwise.trainer.feed import train_batches
from rowwise.trainer.memory import bytes_beside, measured_bytes, watching
from rowwise.trainer.parallelize import parallelize
from rowwise.trainer.plan.devices import device_named
from rowwise.trainer.plan.forecast import plan_for
from rowwise.trainer.plan.memory import memory_of
from rowwise.trainer.plan.works import unknown
from rowwise.trainer.states import tensors_of
from rowwise.trainer.update import make_update

WORTH = 1_000_000  # bytes: of smaller categories nothing is asked
CATEGORY, TOTAL = 0.05, 0.02
OF_ALL = "adamw", "lion", "adafactor", "adamw8bit", "lion8bit"
OPTIMIZERS = (
    *OF_ALL,
    "muon",
    "galore",
    "dct",
    "fira",
    "apollo",
    "apollo_mini",
)  # the others are of hidden matrices that learn
MASKS = ("static", "set", "rigl", "srigl", "st3", "pdp", "pdp_rows", "pdp_nm", "gradual", "nm")
STAGED = (("1f1b", 1), ("gpipe", 1), ("zb_h1", 1), ("zb_h2", 1), ("zb_v", 2), ("interleaved_1f1b", 2), ("blockwise", 2))


@dataclass(frozen=True)
class Drawn:
    """A run that can be: its words, its ranks and its configuration."""

    words: tuple[str, ...]
    world_size: int
    config: TrainConfig


FORMS = (  # of layers: those of families
    ("model.norms=both", "model.norm_offset=1", "model.activation=gelu_tanh", "model.embed_scale=2"),
    ("model.norms=after", "model.qk_norm=true", "model.qk_norm_over=all"),
    ("model.norms=after", "model.residual_scale=0.5", "model.qkv_bias=true"),
    ("model.residual_scale=0.5", "model.attention_scale=0.2", "model.embed_scale=2"),
    ("model.qkv_bias=true", "model.out_bias=true", "model.mlp_bias=true"),
)

RANKS = ",".join(
    f"blocks.{n}.{what}.weight:{(5 * n + i) % 11}"
    for n in range(4)
    for i, what in enumerate(("attention.wq", "feed_forward.w2"))
)
FROZEN = (  # what of a model does not learn, and what does beside it
    ("adapter=lora", "adapter.rank=16"),
    ("adapter=lora", "adapter.rank=16", "adapter.dropout=0.1"),
    ("adapter=lora", 'adapter.layers=["*.attention.*"]', "adapter.train=[head.weight]"),
    ("adapter=lora", "adapter.rank=8", 'adapter.layers=["*.wq.*", "*.w2.*"]', f"adapter.ranks={{{RANKS}}}"),
    ("adapter=dora", "adapter.rank=8"),
    ("adapter=dora", "adapter.rank=8", "adapter.dropout=0.1"),
    ("adapter=bone", "adapter.rank=24"),
    ("adapter=adalora", "adapter.rank=16"),
    ("adapter=lq_lora", "adapter.rank=16", "adapter.bits=4.5"),
    ("optim.assign=[{match: 'embed.*', rule: frozen}, {match: 'blocks.0.*', rule: frozen}]",),
    ("optim.assign=[{match: 'blocks.*.w*', rule: frozen}]",),
)
LOOKS = (("model.window=40", "model.window_layers=[true,false]"), ("model.attention_cap=30", "model.logit_cap=30"))


def forecast_config(folder: Path, world_size: int, *words: str) -> TrainConfig:
    """A run whose parameters, activations and loss take more than WORTH each, in few operations."""
    tokens = folder / "tokens.bin"
    if not tokens.exists():
        write_tokens(folder, 20_000)
    base = [
        f"run_dir={folder}/run", "name=forecast", "steps=8", "model.layers=4", "model.dim=256", "model.heads=4",
        "model.kv_heads=2", "model.ffn_dim=640", "model.vocab_size=1152", "data=tokens", f"data.files=[{tokens}]",
        "data.separator=0", "data.mask_documents=false", "batch.global_size=8", "batch.micro_size=2", "batch.seq_len=128",
        "schedule=constant", "eval.every=0", "sample.tokens=0", "checkpoint.every=0",
    ]  # fmt: skip
    return with_likely_forms(check(config_from_tree(compose_tree([*base, *words])), world_size))


def draw(folder: Path, chance: random.Random) -> Drawn:
    """Draws a run; what is refused, or not forecast, is drawn anew."""
    while True:
        words, world_size = _words(chance)
        try:
            config = forecast_config(folder, world_size, *words)
        except ValueError:
            continue
        if unknown(config) is None:
            return Drawn(tuple(words), world_size, config)


def _words(chance: random.Random) -> tuple[list[str], int]:
    pick = chance.choice
    world_size, narrow = pick((1, 2, 2, 2, 2, 4)), chance.random() < 0.3
    frozen = pick(FROZEN) if chance.random() < 0.4 else ()
    words = [f"parallel.zero={pick((0, 1, 2, 3))}", f"optim={pick(OF_ALL if frozen else OPTIMIZERS)}"]
    words += [f"memory.recompute={pick(('none', 'none', 'selective', 'full', 0.3, 0.7))}"]
    words += [f"memory.fused_loss={pick(('true', 'true', 'false'))}", f"data.mask_documents={pick(('true', 'false'))}"]
    words += [f"model.tie_embeddings={pick(('false', 'false', 'true'))}", f"model.qk_norm={pick(('false', 'true'))}"]
    if narrow:  # 16-bit products are slow on a CPU
        words += ["precision=bf16", "batch.seq_len=64", f"precision.reduce={pick(('fp32', 'bf16'))}"]
        words += ["optim.param_dtype=bf16"] * (chance.random() < 0.4)
    else:
        words += [f"precision={pick(('fp32', 'fp32', 'fp64'))}"]
    words += [f"batch.micro_size={pick((1, 2))}", f"batch.global_size={pick((4, 8))}"]
    layout = pick(("split", "split", "pipeline", "pipeline", "sequence", "replicas")) if world_size > 1 else "split"
    if layout == "pipeline":
        schedule, stages = pick(STAGED)
        words += ["parallel.pipeline=2", f"parallel.pipeline_schedule={schedule}", f"parallel.virtual_stages={stages}"]
    elif layout == "sequence":
        words += [f"parallel.{pick(('ulysses', 'ring'))}=2"]
    elif layout == "replicas":
        words += ["parallel.replicate=2"]
    if not frozen and chance.random() < 0.4:
        words += [f"sparsity={(name := pick(MASKS))}"]
        words += ["sparsity.update_every=2"] * (name in ("set", "rigl", "srigl", "gradual"))
    if chance.random() < 0.35:
        words += ["memory.compress=int8"]
    if chance.random() < 0.35:
        words += [f"memory.offload_activations={pick(('cpu', 'cpu', tempfile.gettempdir()))}"]
    if chance.random() < 0.35:
        folder = tempfile.gettempdir()
        words += [f"memory.offload_states={pick(('cpu', folder, folder))}"]
        if "parallel.zero=3" in words and chance.random() < 0.7:
            words += [
                f"memory.offload_params={pick(('cpu', folder))}",
                f"memory.offload_gradients={pick(('none', folder))}",
            ]
    if world_size > 1 and chance.random() < 0.3:
        words += [f"parallel.quantize_gather={pick(('none', 'int8'))}"]
        words += [f"parallel.inner_shard={pick((1, world_size // 2))}"] * ("parallel.zero=3" in words)
        words += [f"parallel.quantize_reduce={pick(('none', 'int8', 'int4'))}"]
    if chance.random() < 0.25:
        words += ["average.ema=0.9", f"average.dtype={pick(('fp32', 'bf16'))}"]
    if chance.random() < 0.15:
        words += ["optim.in_backward=true", "clip_norm=0", "batch.micro_size=4", "batch.global_size=4"]
    if chance.random() < 0.5:
        words += pick(FORMS)
    if frozen:
        words += frozen
        keeps = frozen[0] != "adapter=lq_lora" and "parallel.quantize_gather=int8" not in words
        wide = "optim.param_dtype=bf16" not in words
        words += [f"model.frozen_dtype={pick(('null', 'int8', 'nf4', *(('bf16',) if wide else ())))}"] * keeps
    if chance.random() < 0.4:
        words += pick(LOOKS)
    return words, world_size


def held_in_a_step(workers: Workers, config: TrainConfig) -> tuple[dict[str, int], dict[str, int], str]:
    """(measured, predicted) by category on this rank, and when the most is held."""
    torch.set_num_threads(1)
    mesh = make_mesh(config.parallel, workers)
    data = open_data(config.data, config.batch.seq_len, config.model.vocab_size)
    model = build_model(config, mesh)
    engine, sparsity = parallelize(model, config, mesh)
    home = home_of(config, model, mesh.device)
    optimizer = build_optimizer(model, config.optim, config.seed, home)
    average = None if config.average.ema is None else Average(model, config.average, config.seed)
    allocation = allocation_of(config, model, mesh)
    update = make_update(config, mesh, engine, optimizer, sparsity, average=average, allocation=allocation)
    batches = next(train_batches(config, mesh, data, position=0))
    with watching(config, mesh, model, 1, True, [] if home is None else home.files) as watch:
        update(step_input(config, 1, batches))
    tensors = tensors_of(model, optimizer, sparsity, average, allocation)
    measured, _ = measured_bytes(watch, model, optimizer, bytes_beside(tensors, mesh.device), mesh.device)
    predicted = memory_of(config, mesh.rank, False, plan_for(config, device_named("cpu")))
    return measured, {**predicted.peaks, "total": predicted.most}, predicted.moment


def errors(measured: dict[str, int], predicted: dict[str, int], bounds: tuple[str, ...] = ()) -> dict[str, float]:
    """How far the prediction is off, as a share of what was measured, for each category that is large enough, and for the total. What
    comes and goes inside an operation's neighbours, `working`, is asked for in the total alone. `bounds`: of these it is told how
    much there may be at most."""
    return {
        key: max(0.0, size / max(1, predicted[key]) - 1) if key in bounds else predicted[key] / max(1, size) - 1
        for key, size in measured.items()
        if key == "total" or (key != "working" and max(size, predicted[key]) > WORTH)
    }


def bounds_of(config: TrainConfig) -> tuple[str, ...]:
    """What is on the host's way to files, which depends on how fast they are written; and gradients that wait for steps beside the
    backward, with the total that they are in; and that where tiles of capped scores are no larger than documents."""
    memory = config.memory
    waits = ("gradients", "total") if memory.offload_states != "none" and config.optim.in_backward else ()
    if config.model.attention_cap is not None and config.data.mask_documents:
        waits = (*waits, "total")
    places = (memory.offload_activations, memory.offload_states, memory.offload_params, memory.offload_gradients)
    return (*waits, *(("host",) if any(map(is_folder, places)) else ()))


def off(found: dict[str, float]) -> dict[str, float]:
    """Those that the law does not allow."""
    return {key: error for key, error in found.items() if abs(error) > (TOTAL if key == "total" else CATEGORY)}


def main(count: int, seed: int) -> int:
    """Draws, measures, and prints. Returns the exit code."""
    from ranks import RankPool

    chance, pool, every, wrong = random.Random(seed), RankPool(), {}, 0
    with tempfile.TemporaryDirectory() as name:
        for number in range(count):
            drawn = draw(Path(name), chance)
            for rank, (measured, predicted, moment) in enumerate(
                pool.run(held_in_a_step, drawn.world_size, drawn.config)
            ):
                found = errors(measured, predicted, bounds_of(drawn.config))
                for key, error in found.items():
                    every.setdefault(key, []).append((abs(error), error, number))
                if amiss := off(found):
                    wrong += 1
                    told = ", ".join(
                        f"{k} {e:+.1%} ({predicted[k]:,} said, {measured[k]:,} held)" for k, e in amiss.items()
                    )
                    print(
                        f"{number} rank {rank} of {drawn.world_size}: {told}; {' '.join(drawn.words)}; {moment}",
                        flush=True,
                    )
    pool.close()
    for key, found in every.items():
        print(
            f"{key:<12} {len(found):>4} ranks, worst {max(found)[1]:+.2%}, median {statistics.median(e for e, *_ in found):.3%}"
        )
    print(f"{count} runs of seed {seed}, {wrong} ranks beyond the law")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2])))
