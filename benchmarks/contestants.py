"""Who races in `overhead.py`: each function is one rank of a whole training job, from its imports to its last loss.

Every contestant imports what it needs and nothing of the others', because imports are part of its start.
"""

import json
import os
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook


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
    turn: int
    turns: int
    workers: int

    @property
    def last_step(self) -> int:
        return self.warmup + self.turn * self.turns

    @property
    def accumulate(self) -> int:
        """Micro-batches of a rank in a step."""
        return self.batch.global_size // self.workers // self.batch.micro_size


class Clock:
    """Counts optimizer steps and takes turns: after `warmup` steps, and after every `turn` steps from then on, this rank
    tells the race what it measured and waits until it may go on."""

    def __init__(self, job: Job, race: Connection):
        self.steps = 0
        self._job, self._race = job, race
        self._wall = self._cpu = 0.0
        register_optimizer_step_post_hook(self._tick)

    def _tick(self, *_: Any) -> None:
        self.steps += 1
        if self.steps == 1:
            self._say(first_step_at=time.time())
        beyond = self.steps - self._job.warmup
        if beyond < 0 or beyond % self._job.turn:
            return
        self._say(
            wall=time.perf_counter() - self._wall,
            cpu=time.process_time() - self._cpu,
            peak_bytes=peak_memory_bytes(),
        )
        if self.steps < self._job.last_step:
            self._race.recv()
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def _say(self, **measured: float) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self._race.send(measured)


def peak_memory_bytes() -> int:
    """The most this rank has held."""
    from rowwise.trainer.peaks import peak_memory_bytes as of

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

        batch = micro_batches(self.order[places], self.corpus, len(places))[0]
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
        fill_ = random_rows(self.decoder.parameter_specs(), job.seed)
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
    code = main([*job.overrides, f"run_dir={run_dir}", f"steps={job.last_step}", "report=never"])
    if code != 0:
        raise SystemExit(code)
    if os.environ["RANK"] != "0":
        return None
    *_, last = (run_dir / "metrics.jsonl").read_text().splitlines()
    return json.loads(last)["loss"]


CONTESTANTS: dict[str, Callable[[Job, Path], float | None]] = {
    "bare": bare,
    "accelerate": accelerate,
    "transformers": transformers,
    "rowwise zero 0": rowwise,
    "rowwise zero 1": rowwise,
}
