"""What this trainer costs over plain PyTorch, and what others cost: the same model, data, rule and ranks for all.

    python benchmarks/overhead.py                                 the default model, 2 workers
    python benchmarks/overhead.py --rounds 9 --steps 60 model=llama_60m batch.micro_size=2

Each round starts every contestant once, in turn, as a torchrun job of its own:

| contestant | what runs |
|---|---|
| bare | DistributedDataParallel, fused AdamW, `no_sync`, `clip_grad_norm_`: a loop of ten lines |
| accelerate | the same loop through Accelerate |
| transformers | the transformers Trainer |
| rowwise zero N | `rowwise.launch.train.main`: the product's own entry, parallel.zero=N |

One clock for all: a hook after every optimizer step of the process. Tokens per second are those of all ranks between
the ends of step `warmup` and of step `warmup + steps`, on the slowest rank, so everything that an iteration does is in
it: data, logging, the host's waiting. `cpu_seconds` are processor seconds of all ranks over the same steps, which other
work on the machine disturbs less; a race beside which other work took more than `--others` of the processors is run
again. All start from the same numbers and read the same samples, so their last losses agree: they did the same work.
The others know only their own rank's loss at each step; ours reduces it over all ranks, and writes a record a step.

Then the saves, on one state in one job: how long the loop is blocked by a save in the background, by one that is not,
and by a plain torch.distributed.checkpoint.save of the same tensors.
"""

import argparse
import json
import os
import pickle
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from record import write_record
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

# Every contestant imports what it needs and nothing of the others', because imports are part of its start.

FIXED = ["resume=never", "eval.every=0", "sample.tokens=0", "checkpoint.every=0", "schedule=constant"]
ADJUSTABLE = ("model", "batch.", "optim.", "seed=")  # what every contestant obeys
STEPS_BESIDE = 4  # after each save: long enough to write beside
LARGE = [
    "model.layers=8", "model.dim=512", "model.heads=8", "model.kv_heads=4", "model.ffn_dim=1408", "batch.micro_size=1",
]  # fmt: skip


@dataclass(frozen=True)
class Job:
    """What a contestant is told. `model`, `batch`, `data` and `optim` are the configurations of those names."""

    overrides: list[str]
    model: Any
    batch: Any
    data: Any
    optim: Any
    clip_norm: float
    seed: int
    warmup: int
    steps: int
    workers: int

    @property
    def last_step(self) -> int:
        return self.warmup + self.steps

    @property
    def accumulate(self) -> int:
        """Micro-batches of a rank in a step."""
        return self.batch.global_size // self.workers // self.batch.micro_size


class Clock:
    """The wall clock, this process's processor seconds and the most memory that it has held so far, at the ends of
    steps 1, `warmup` and the last."""

    def __init__(self, job: Job):
        self.steps = 0
        self.wall: list[float] = []
        self.cpu: list[float] = []
        self.peak_bytes: list[int] = []
        self._marks = {1, job.warmup, job.last_step}
        register_optimizer_step_post_hook(self._tick)

    def _tick(self, *_: Any) -> None:
        self.steps += 1
        if self.steps in self._marks:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.wall.append(time.time())
            self.cpu.append(time.process_time())
            self.peak_bytes.append(peak_memory_bytes())


def peak_memory_bytes() -> int:
    """The most this rank has held."""
    from rowwise.trainer.metrics import peak_memory_bytes as of

    return of(torch.device("cuda" if torch.cuda.is_available() else "cpu"))


class Samples(torch.utils.data.Dataset):
    """The samples of the run in our order, read a micro-batch at a time."""

    def __init__(self, job: Job):
        from rowwise.trainer.data.open import open_data
        from rowwise.trainer.data.order import sample_indices

        self.corpus = open_data(job.data, job.batch.seq_len, job.model.vocab_size).train
        count = job.last_step * job.batch.global_size
        self.order = sample_indices(0, count, self.corpus.samples, f"train/{job.seed}")

    def __len__(self) -> int:
        return len(self.order)

    def __getitems__(self, places: list[int]) -> dict[str, Tensor]:
        from rowwise.trainer.data.batches import micro_batches

        batch = micro_batches(self.order[places], self.corpus, len(places), pin=False)[0]
        return {"inputs": batch.inputs, "labels": batch.labels, "positions": batch.positions}


def as_it_is(batch: Any) -> Any:
    """The collation of what is a batch already."""
    return batch


def loader_options() -> dict[str, Any]:
    """On the CPU the ranks have the cores; a GPU leaves some to read ahead."""
    cuda = torch.cuda.is_available()
    return {"num_workers": 2 if cuda else 0, "pin_memory": cuda}


class Objective(nn.Module):
    """Our decoder from our initial numbers, and the mean cross entropy on it. Keeps the last loss."""

    def __init__(self, job: Job):
        from rowwise.trainer.models.decoder import Decoder
        from rowwise.trainer.models.init import random_rows

        super().__init__()
        with torch.device("meta"):
            self.decoder = Decoder(job.model)
        self.decoder.to_empty(device="cpu")
        fill_ = random_rows(job.model, job.seed)
        with torch.no_grad():
            for name, p in self.decoder.named_parameters():
                fill_(name, p, 0, p.size(0))
        self.last_loss = torch.zeros(())

    def forward(self, inputs: Tensor, labels: Tensor, positions: Tensor) -> dict[str, Tensor]:
        logits = self.decoder(inputs, positions)
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        self.last_loss = loss.detach()
        return {"loss": loss}


def fused_adamw(model: nn.Module, job: Job) -> torch.optim.AdamW:
    """torch's, with our rule: matrices decay, norms do not."""
    o = job.optim
    groups = [
        {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": o.weight_decay},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=o.lr, betas=tuple(o.betas), eps=o.eps, fused=True)


def bare(job: Job, folder: Path) -> float:
    """The loop of someone who knows PyTorch well and needs nothing else."""
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    model = nn.parallel.DistributedDataParallel(Objective(job).to(device), gradient_as_bucket_view=True)
    optimizer = fused_adamw(model, job)
    samples = Samples(job)
    sampler: torch.utils.data.DistributedSampler = torch.utils.data.DistributedSampler(samples, shuffle=False)
    loader = torch.utils.data.DataLoader(
        samples, job.batch.micro_size, sampler=sampler, collate_fn=as_it_is, **loader_options()
    )
    for number, batch in enumerate(loader, 1):
        last = number % job.accumulate == 0
        batch = {key: tensor.to(device, non_blocking=True) for key, tensor in batch.items()}
        with nullcontext() if last else model.no_sync():
            loss = model(**batch)["loss"]
            (loss / job.accumulate).backward()
        if last:
            nn.utils.clip_grad_norm_(model.parameters(), job.clip_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            seen = loss.item()
    dist.destroy_process_group()
    return seen


def accelerate(job: Job, folder: Path) -> float:
    """The same loop as Accelerate's own guide writes it."""
    from accelerate import Accelerator
    from accelerate.utils import DistributedDataParallelKwargs

    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(),
        gradient_accumulation_steps=job.accumulate,
        kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
    )
    objective, samples = Objective(job), Samples(job)
    loader = torch.utils.data.DataLoader(samples, job.batch.micro_size, collate_fn=as_it_is, **loader_options())
    model, optimizer, loader = accelerator.prepare(objective, fused_adamw(objective, job), loader)
    assert isinstance(model, nn.parallel.DistributedDataParallel) or job.workers == 1
    for batch in loader:
        with accelerator.accumulate(model):
            loss = model(**batch)["loss"]
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), job.clip_norm)
            optimizer.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients:
            seen = loss.item()
    accelerator.end_training()
    return seen


def transformers(job: Job, folder: Path) -> float:
    """The transformers Trainer. It looks at the loss every tenth step."""
    from transformers import Trainer, TrainingArguments

    o, cuda, loader = job.optim, torch.cuda.is_available(), loader_options()
    arguments = TrainingArguments(
        output_dir=str(folder / "transformers"),
        max_steps=job.last_step,
        per_device_train_batch_size=job.batch.micro_size,
        gradient_accumulation_steps=job.accumulate,
        max_grad_norm=job.clip_norm,
        optim="adamw_torch_fused",
        learning_rate=o.lr, adam_beta1=o.betas[0], adam_beta2=o.betas[1], adam_epsilon=o.eps,
        weight_decay=o.weight_decay, lr_scheduler_type="constant", train_sampling_strategy="sequential",
        use_cpu=not cuda, ddp_backend="nccl" if cuda else "gloo", ddp_find_unused_parameters=False,
        dataloader_num_workers=loader["num_workers"], dataloader_pin_memory=loader["pin_memory"],
        remove_unused_columns=False, report_to=[], save_strategy="no", logging_steps=10, disable_tqdm=True,
    )  # fmt: skip
    objective = Objective(job)
    Trainer(objective, arguments, data_collator=as_it_is, train_dataset=Samples(job)).train()
    dist.destroy_process_group()
    return objective.last_loss.item()


def rowwise(job: Job, folder: Path) -> float | None:
    """This trainer, from its command line on. Rank 0 knows the loss."""
    from rowwise.launch.train import main

    run_dir = folder / "run"
    code = main([*job.overrides, f"run_dir={run_dir}", f"steps={job.last_step}"])
    if code != 0:
        raise SystemExit(code)
    if os.environ["RANK"] != "0":
        return None
    *_, last = (run_dir / "metrics.jsonl").read_text().splitlines()
    return json.loads(last)["loss"]


def saves(job: Job, folder: Path, repeats: int = 5) -> dict[str, Any]:
    """How long each way to save blocks the loop, on the slowest rank, and how much longer the steps beside it take."""
    from rowwise.launch.compose import compose_tree
    from rowwise.launch.workers import workers_from_environment
    from rowwise.optim.build import build_optimizer
    from rowwise.parallel.mesh import make_mesh
    from rowwise.trainer.checkpoint import Saver, tensors_of
    from rowwise.trainer.config import check, config_from_tree
    from rowwise.trainer.data.open import open_data
    from rowwise.trainer.step import compute_gradients
    from rowwise.trainer.train import build_model, train_batches

    config = check(config_from_tree(compose_tree([*job.overrides, f"run_dir={folder}"])), job.workers)
    mesh = make_mesh(config.parallel, workers_from_environment())
    data = open_data(config.data, config.batch.seq_len, config.model.vocab_size)
    model = build_model(config, mesh)
    optimizer = build_optimizer(model, config.optim)
    tensors, batches = (tensors_of(model, optimizer), train_batches(config, mesh, data, position=0))
    places = config.batch.global_size * config.batch.seq_len

    def step() -> None:
        compute_gradients(model, next(batches), mesh, config.parallel.zero, places, config.clip_norm)
        optimizer.step()
        optimizer.zero_grad()

    savers = {
        "background": Saver(folder / "background", mesh, keep=1, background=True),
        "foreground": Saver(folder / "foreground", mesh, keep=1, background=False),
        "plain": PlainSaver(folder / "plain"),
    }
    step()
    measured = measure_saves(savers, step, tensors, mesh.device, repeats)
    state_bytes = torch.tensor(local_bytes(tensors), device=mesh.device)
    dist.all_reduce(state_bytes)
    dist.destroy_process_group()
    return {"state_bytes": int(state_bytes), "repeats": repeats, **measured}


class PlainSaver:
    """torch.distributed.checkpoint and nothing else: no checksums, no manifest, no commit."""

    def __init__(self, folder: Path):
        self._folder = folder

    def save(self, step: int, tensors: dict[str, Tensor], manifest: dict[str, Any]) -> None:
        import torch.distributed.checkpoint as dcp

        dcp.save(dict(tensors), storage_writer=dcp.FileSystemWriter(self._folder / str(step)))

    def wait(self) -> None: ...


def local_bytes(tensors: dict[str, Any]) -> int:
    """Of this rank's shards."""
    return sum(t.to_local().numel() * t.element_size() for t in tensors.values())


def measure_saves(
    savers: dict[str, Any], step: Callable[[], None], tensors: dict[str, Tensor], device: torch.device, repeats: int
) -> dict[str, Any]:
    """Medians over `repeats`, the ways in turn. `blocked_seconds`: until `save` returns. `steps_seconds`: of
    STEPS_BESIDE steps after it, and of waiting for what is not written then; `idle` has them with no save at all."""
    seconds: dict[str, list[list[float]]] = {way: [] for way in ("idle", *savers)}
    for repeat in range(repeats):
        for way in seconds:
            marks = torch.zeros(2, dtype=torch.float64, device=device)
            dist.barrier()
            started = time.perf_counter()
            if way in savers:
                savers[way].save(repeat, tensors, {})
            marks[0] = time.perf_counter() - started
            for _ in range(STEPS_BESIDE):
                step()
            if way in savers:
                savers[way].wait()
            marks[1] = time.perf_counter() - started - marks[0]
            dist.all_reduce(marks, dist.ReduceOp.MAX)
            seconds[way].append(marks.tolist())
    names = ("blocked_seconds", "steps_seconds")
    return {way: dict(zip(names, map(statistics.median, zip(*rows, strict=True)), strict=True)) | {"all": rows}
            for way, rows in seconds.items()}  # fmt: skip


CONTESTANTS: dict[str, Callable[[Job, Path], float | None]] = {
    "bare": bare,
    "accelerate": accelerate,
    "transformers": transformers,
    "rowwise zero 0": rowwise,
    "rowwise zero 1": rowwise,
}


def work(contestant: str, folder: Path) -> None:
    """One rank of a job that `launch` started."""
    with (folder / "job.pickle").open("rb") as file:
        job = pickle.load(file)
    if contestant == "saves":
        answer = saves(job, folder)
    else:
        clock = Clock(job)
        loss = CONTESTANTS[contestant](job, folder)
        assert clock.steps == job.last_step, f"{contestant} made {clock.steps} steps instead of {job.last_step}"
        answer = {"wall": clock.wall, "cpu": clock.cpu, "peak_bytes": clock.peak_bytes, "loss": loss}
    (folder / f"rank{os.environ['RANK']}.json").write_text(json.dumps(answer))


def launch(contestant: str, job: Job) -> tuple[float, list[dict[str, Any]]]:
    """Runs a contestant under torchrun. Returns when it was started, and what each rank says."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "job.pickle").write_bytes(pickle.dumps(job))
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(job.workers),
                   __file__, "--contestant", contestant, "--folder", name]  # fmt: skip
        threads = {} if torch.cuda.is_available() else {"OMP_NUM_THREADS": "1"}
        started = time.time()
        done = subprocess.run(command, env=os.environ | threads, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{contestant} failed:\n{done.stdout}{done.stderr}")
        return started, [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(job.workers)]


def busy_seconds() -> tuple[float, float]:
    """Processor seconds of the machine since it started, and of our jobs that have ended; zeros where no /proc is."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return 0.0, 0.0
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, stat.read_text().split()[1:9])
    machine = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
    jobs = resource.getrusage(resource.RUSAGE_CHILDREN)
    return machine, jobs.ru_utime + jobs.ru_stime


def calm_race(contestant: str, job: Job, options: argparse.Namespace) -> dict[str, float]:
    """A race beside which other work took at most `--others` of the processors; of 1 + `--patience` tries the calmest."""
    tries: list[dict[str, float]] = []
    while len(tries) <= options.patience:
        (machine, jobs), started = busy_seconds(), time.time()
        figures = race(contestant, job)
        machine_now, jobs_now = busy_seconds()
        others = (machine_now - machine) - (jobs_now - jobs)
        figures["others_share"] = max(0.0, others) / (time.time() - started) / (os.cpu_count() or 1)
        tries.append(figures)
        if figures["others_share"] <= options.others:
            break
    return min(tries, key=lambda figures: figures["others_share"]) | {"tries": len(tries)}


def race(contestant: str, job: Job) -> dict[str, float]:
    """One run of a contestant, in figures."""
    started, ranks = launch(contestant, job)
    tokens = job.steps * job.batch.global_size * job.batch.seq_len
    losses = [rank["loss"] for rank in ranks if rank["loss"] is not None]
    return {
        "tokens_per_second": tokens / max(rank["wall"][2] - rank["wall"][1] for rank in ranks),
        "first_step_seconds": max(rank["wall"][0] for rank in ranks) - started,
        "cpu_seconds": sum(rank["cpu"][2] - rank["cpu"][1] for rank in ranks),
        "peak_memory_bytes": max(rank["peak_bytes"][2] for rank in ranks),
        "last_loss": sum(losses) / len(losses),
    }


def make_job(options: argparse.Namespace) -> Job:
    """The job of this command line. Builds the corpus, which is nobody's start."""
    from rowwise.launch.compose import compose_tree
    from rowwise.trainer.config import check, config_from_tree
    from rowwise.trainer.data.open import open_data

    overrides = ["name=overhead", *FIXED, *options.overrides]
    config = check(config_from_tree(compose_tree(overrides)), options.workers)
    open_data(config.data, config.batch.seq_len, config.model.vocab_size)
    return Job(
        overrides, config.model, config.batch, config.data, config.optim, config.clip_norm, config.seed,
        options.warmup, options.steps, options.workers,
    )  # fmt: skip


def with_overrides(job: Job, *more: str) -> Job:
    return replace(job, overrides=[*job.overrides, *more])


def run_rounds(job: Job, options: argparse.Namespace) -> dict[str, list[dict[str, float]]]:
    """contestant -> its figures, one a round."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in CONTESTANTS}
    for number in range(1, options.rounds + 1):
        for name in CONTESTANTS:
            zero = name.removeprefix("rowwise zero ")
            own = with_overrides(job, f"parallel.zero={zero}") if zero.isdigit() else job
            found[name].append(figures := calm_race(name, own, options))
            print(f"round {number}/{options.rounds}  {name:<15} {figures['tokens_per_second']:9,.0f} tokens/s  "
                  f"others took {figures['others_share']:.0%}, try {figures['tries']:.0f}", flush=True)  # fmt: skip
    return found


def run_saves(job: Job) -> dict[str, dict[str, Any]]:
    """The saves of the model of the race, and of a larger one."""
    large = with_overrides(job, *LARGE, f"batch.global_size={job.workers}")
    return {name: launch("saves", which)[1][0] for name, which in (("raced", job), ("large", large))}


def spread(values: list[float]) -> dict[str, Any]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "all": values}


def ratios(found: dict[str, list[dict[str, float]]]) -> dict[str, dict[str, dict[str, Any]]]:
    """ours -> theirs -> how many times faster ours was, round by round; and the same in processor seconds."""
    ours = [name for name in found if name.startswith("rowwise")]
    return {
        mine: {
            other: {
                "speed": spread([a["tokens_per_second"] / b["tokens_per_second"] for a, b in pairs]),
                "cpu": spread([b["cpu_seconds"] / a["cpu_seconds"] for a, b in pairs]),
            }
            for other in found
            if other not in ours and (pairs := list(zip(found[mine], found[other], strict=True)))
        }
        for mine in ours
    }


def print_tables(found: dict, compared: dict, saved: dict) -> None:
    """Medians; of the ratios, their range too."""
    print("\n| contestant | tokens/s | seconds to first step | cpu seconds | peak memory MB | last loss |")
    print("|---|---|---|---|---|---|")
    keys = ("tokens_per_second", "first_step_seconds", "cpu_seconds", "peak_memory_bytes", "last_loss")
    for name, rows in found.items():
        tokens, first, cpu, peak, loss = (statistics.median(row[key] for row in rows) for key in keys)
        print(f"| {name} | {tokens:,.0f} | {first:.2f} | {cpu:.2f} | {peak / 1e6:,.0f} | {loss:.5f} |")
    print("\n| ours / theirs | tokens/s | least | most | by cpu seconds |\n|---|---|---|---|---|")
    for mine, others in compared.items():
        for other, ratio in others.items():
            speed = ratio["speed"]
            print(f"| {mine} / {other} | {speed['median']:.3f} | {speed['min']:.3f} | {speed['max']:.3f} "
                  f"| {ratio['cpu']['median']:.3f} |")  # fmt: skip
    print(f"\n| state | save | blocks the loop, s | {STEPS_BESIDE} steps after it, s |\n|---|---|---|---|")
    for name, ways in saved.items():
        for way in ("idle", "background", "foreground", "plain"):
            row = ways[way]
            print(f"| {name}, {ways['state_bytes'] / 1e6:,.0f} MB | {way} | {row['blocked_seconds']:.3f} "
                  f"| {row['steps_seconds']:.2f} |")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=40, help="steps that are timed")
    parser.add_argument("--warmup", type=int, default=4, help="steps before them")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--others", type=float, default=0.1, help="share of the processors that other work may take")
    parser.add_argument("--patience", type=int, default=3, help="how often to run again what others disturbed")
    parser.add_argument("--contestant", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help=f"of {', '.join(ADJUSTABLE)}")
    options = parser.parse_args()
    if options.contestant:
        return work(options.contestant, options.folder)
    if refused := [text for text in options.overrides if not text.startswith(ADJUSTABLE)]:
        parser.error(f"{refused}: possible are {', '.join(ADJUSTABLE)}, which every contestant obeys")
    if options.warmup < 2 or min(options.rounds, options.steps, options.workers) < 1:
        parser.error("--warmup is at least 2, the others at least 1")
    job = make_job(options)
    found = run_rounds(job, options)
    compared, saved = ratios(found), run_saves(job)
    print_tables(found, compared, saved)
    keys = ("rounds", "steps", "warmup", "workers", "others", "patience", "overrides")
    setting = {key: getattr(options, key) for key in keys}
    path = write_record("overhead", {"setting": setting, "contestants": found, "ratios": compared, "saves": saved})
    print(f"\nwritten: {path}")
    return None


if __name__ == "__main__":
    main()
