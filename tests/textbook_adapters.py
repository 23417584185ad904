"""Adapters as their papers write them, on whole matrices: a layer multiplies by the one matrix that it stands for.

    LoRA    W + s B A                       s = alpha / r, or alpha / sqrt(r)
    DoRA    size (W + s B A) / norm         norm of its rows, a constant to the gradient

With dropout the adapter's part is multiplied by what is left of x, and W by x: y = x W + d (adapted - W).
"""

import math
from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rowwise.kernels.coded_rows import INT8, NF4, RowForm, decode_rows, encode_rows
from rowwise.kernels.philox import normal, random_words, stream_key
from rowwise.kernels.visible import Documents
from rowwise.trainer.adapters.bits import FORMS, bits_of, choose
from rowwise.trainer.adapters.decompose import first_errors, lq
from rowwise.trainer.config import TrainConfig
from rowwise.trainer.data.batches import MicroBatch
from rowwise.trainer.data.corpus import IGNORE

CPU = torch.device("cpu")
step = {"first": 0}  # the number of the first sequence of the textbook's step


def begin_textbook_step(first: int) -> None:
    step["first"] = first


class Adapted(nn.Module):
    """A linear layer with an adapter; `x` (B, S, n), of which the first sequence is number `step["first"]` of the run."""

    def __init__(
        self, linear: nn.Linear, path: str, config: TrainConfig, forms: dict[str, RowForm], taken: list[Tensor] | None,
        fisher: Tensor | None, own_rank: int | None,
    ):  # fmt: skip
        super().__init__()
        choice, (rows, columns) = config.adapter, linear.weight.shape
        rank = choice.rank if own_rank is None else own_rank
        self.weight, self.scale = linear.weight, choice.alpha / choice.rank
        self.dropout, self.key = choice.dropout, stream_key(config.seed, f"dropout/{path}")
        if choice.name == "adalora":
            self.begin_triplets(path, choice, config.seed)
            return
        if choice.rslora:
            self.scale = choice.alpha / math.sqrt(choice.rank)
        words = random_words(stream_key(config.seed, f"{path}.lora_a"), 0, rank * columns, CPU)
        drawn = (words.double() / 2**31 - 1) / math.sqrt(columns)
        self.lora_a = nn.Parameter(drawn.view(rank, columns))
        self.lora_b = nn.Parameter(torch.zeros(rows, rank, dtype=torch.float64))
        if getattr(choice, "init", "kaiming") == "pissa":
            self.become(*principal(linear.weight.detach(), choice.rank, self.scale))
        if taken is not None:
            self.become(*from_data(linear.weight.detach(), taken, choice, self.scale, rank))
        if choice.name == "lq_lora":
            form, key = forms[path], stream_key(config.seed, f"lq_lora/{path}.weight")
            codes, a, b, _ = lq(linear.weight.detach(), form, choice.rank, self.scale, key, fisher)
            self.become(decode_rows(codes, columns, form, torch.float64), a, b)
        if choice.name == "dora":
            self.magnitude = nn.Parameter(torch.empty(rows, dtype=torch.float64))

    def begin_triplets(self, path: str, choice: Any, seed: int) -> None:
        rows, columns = self.weight.shape
        self.scale = choice.alpha / (choice.rank + 1e-5)
        for key, shape in (("a", (choice.rank, columns)), ("b", (rows, choice.rank))):
            drawn = normal(stream_key(seed, f"{path}.lora_{key}"), 0, math.prod(shape), CPU) * 0.02
            setattr(self, f"lora_{key}", nn.Parameter(drawn.double().view(shape)))
        self.lora_e = nn.Parameter(torch.zeros(choice.rank, 1, dtype=torch.float64))

    def become(self, w: Tensor, a: Tensor, b: Tensor) -> None:
        for p, numbers in ((self.weight, w), (self.lora_a, a), (self.lora_b, b)):
            p.data = numbers

    def forward(self, x: Tensor) -> Tensor:
        a = self.lora_a * self.lora_e if hasattr(self, "lora_e") else self.lora_a
        adapted = self.weight + self.scale * self.lora_b @ a
        if hasattr(self, "magnitude"):
            adapted = (self.magnitude / adapted.detach().square().sum(1).sqrt())[:, None] * adapted
        if not self.dropout:
            return F.linear(x, adapted)
        return F.linear(x, self.weight) + F.linear(self.dropped(x), adapted - self.weight)

    def dropped(self, x: Tensor) -> Tensor:
        """Token k of the run, of n features, has the n words of its layer's stream from 4 ceil(n / 4) k on."""
        (sequences, length, features), whole = x.shape, -(-x.size(2) // 4) * 4
        words = random_words(self.key, step["first"] * length * whole, sequences * length * whole, CPU)
        left = words.view(sequences, length, whole)[:, :, :features] >= self.dropout * 2**32
        left = left.double() / (1 - self.dropout)
        return x * left


class Triplets:
    """AdaLoRA's penalty, importance and choice, over all matrices and in one process, as its authors write them."""

    def __init__(self, config: TrainConfig, params: dict[str, nn.Parameter]):
        self.choice, self.steps = config.adapter, config.steps
        on = config.adapter.name == "adalora"
        self.params = {name: p for name, p in params.items() if ".lora_" in name} if on else {}
        self.avg, self.unc = ({name: torch.zeros_like(p) for name, p in self.params.items()} for _ in range(2))

    def penalty(self) -> Tensor | float:
        apart = []
        for name, p in self.params.items():
            if not name.endswith("lora_e"):
                gram = p @ p.T if name.endswith("lora_a") else p.T @ p
                apart.append(torch.norm(gram - torch.eye(len(gram), dtype=gram.dtype)))
        return self.choice.orthogonality * sum(apart) / len(apart) if apart else 0.0

    @torch.no_grad()
    def step(self, step: int) -> None:
        """After the update of `step`, counted from 0."""
        if not self.params:
            return
        c, layers = self.choice, [name.removesuffix("_e") for name in self.params if name.endswith("lora_e")]
        first, last = (t if isinstance(t, int) else round(t * self.steps) for t in (c.start, c.stop))
        for name, p in self.params.items() if step < last else ():
            now = (p * p.grad).abs()
            self.avg[name] = c.betas[0] * self.avg[name] + (1 - c.betas[0]) * now
            self.unc[name] = c.betas[1] * self.unc[name] + (1 - c.betas[1]) * (now - self.avg[name]).abs()
        if step <= first or not (step >= last or step % c.every == 0):
            return
        left = max(0.0, 1 - (step - first) / (last - first))
        count = int(len(layers) * (c.target_rank + (c.rank - c.target_rank) * left**3))
        s = {name: self.avg[name] * self.unc[name] for name in self.params}
        scores = {
            (layer, i): s[f"{layer}_e"][i].sum() + s[f"{layer}_a"][i].mean() + s[f"{layer}_b"][:, i].mean()
            for layer in layers for i in range(c.rank)
        }  # fmt: skip
        for layer, i in sorted(scores, key=lambda one: -scores[one])[count:]:
            self.params[f"{layer}_e"][i] = 0

    def states(self) -> dict[str, Tensor]:
        every = {"avg": self.avg, "unc": self.unc}
        return {f"importance.{name}.{what}": t.clone() for what, part in every.items() for name, t in part.items()}


class WithBone(nn.Module):
    """A linear layer that multiplies by W, to whose column c the column c mod r of P^T is added."""

    def __init__(self, linear: nn.Linear, rank: int):
        super().__init__()
        self.weight = linear.weight
        self.bone = nn.Parameter(torch.zeros(rank, len(linear.weight), dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        columns = torch.arange(self.weight.size(1)) % len(self.bone)
        return F.linear(x, self.weight + self.bone.t()[:, columns])


def adapt(model: nn.Module, config: TrainConfig, batch_of: Callable[[int], MicroBatch]) -> None:
    """Gives a plain model the adapter of a run, with its initial numbers, and freezes what does not learn. `batch_of`: a step of the
    run, counted from 0."""
    choice = config.adapter
    plain = {} if choice.name == "none" else {
        path: module for path, module in model.named_modules()
        if type(module) is nn.Linear and path != "head" and matches(f"{path}.weight", choice.layers)
    }  # fmt: skip
    fishers = {}
    if getattr(choice, "fisher", False):
        fishers = squared_gradients(model, plain, map(batch_of, range(choice.init_batches)))
    forms = forms_of(plain, config, fishers) if choice.name == "lq_lora" else {}
    looks = getattr(choice, "init", None) in ("eva", "corda")
    taken = (
        taken_of(model, plain, map(batch_of, range(choice.init_batches)), config.model.frozen_dtype) if looks else {}
    )
    ranks = ranks_of(taken, choice) if getattr(choice, "init", None) == "eva" else {}
    for path, module in plain.items():
        if ranks.get(path) == 0:
            continue
        layer = (
            WithBone(module, choice.rank)
            if choice.name == "bone"
            else Adapted(module, path, config, forms, taken.get(path), fishers.get(path), ranks.get(path))
        )
        model.set_submodule(path, layer)
    for name, p in model.named_parameters():
        first = next((one.rule for one in config.optim.assign if fnmatchcase(name, one.match)), "own")
        added = name.endswith(("lora_a", "lora_b", "lora_e", "magnitude", ".bone"))
        learns = choice.name == "none" or added or matches(name, choice.train)
        p.requires_grad_(learns and first != "frozen")
        if not p.requires_grad and "blocks." in name and p.ndim == 2:
            p.data = as_kept(p.data, config.model.frozen_dtype)
    for module in model.modules():
        if hasattr(module, "magnitude"):  # of what the layer multiplies by, so that it begins as that
            module.magnitude.data = module.weight.square().sum(1).sqrt()


def principal(w: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """(W without its principal part, A, B), as PiSSA's authors write it."""
    u, s, vt = torch.linalg.svd(w, full_matrices=False)
    root = torch.diag((s[:rank] / scale).sqrt())
    a, b = root @ vt[:rank], u[:, :rank] @ root
    return w - scale * b @ a, a, b


@torch.no_grad()
def taken_of(
    model: nn.Module, layers: dict[str, nn.Linear], batches: Iterable[MicroBatch], frozen_dtype: str | None
) -> dict[str, list[Tensor]]:
    """What each layer takes for the tokens of each sequence that have a label, (tokens, n), sequence by sequence, in a model of
    matrices as they are kept."""
    exact = {path: layer.weight.detach() for path, layer in layers.items()}
    for path, layer in layers.items():
        layer.weight.data = as_kept(exact[path], frozen_dtype)
    taken: dict[str, list[Tensor]] = {path: [] for path in layers}
    has = torch.empty(0)

    def keep(path: str) -> Callable[..., None]:
        return lambda module, given: taken[path].extend(x[some] for x, some in zip(*given, has, strict=True))

    hooks = [layer.register_forward_pre_hook(keep(path)) for path, layer in layers.items()]
    for batch in batches:
        has = batch.labels >= 0
        model(batch.inputs, batch.positions, batch.documents)
    for hook, (path, layer) in zip(hooks, layers.items(), strict=True):
        hook.remove()
        layer.weight.data = exact[path]
    return taken


def ranks_of(taken: dict[str, list[Tensor]], choice: Any) -> dict[str, int]:
    """EVA's ranks: layers take turns, and each takes the direction that explains most of what is left, until all are given away."""
    shares = {}
    for path, some in taken.items():
        squares = torch.linalg.svdvals(torch.cat(some) - torch.cat(some).mean(0)).square()
        shares[path] = (squares / squares.sum()).round(decimals=9).tolist()[: round(choice.eva_rho * choice.rank)]
    ranks = dict.fromkeys(shares, 0)
    for _ in range(choice.rank * len(shares)):
        left = {path: own[ranks[path]] for path, own in shares.items() if ranks[path] < len(own)}
        ranks[max(left, key=left.__getitem__)] += 1
    return ranks


def from_data(w: Tensor, taken: list[Tensor], choice: Any, scale: float, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """(what is left of W, A, B) of EVA and CorDA, as their authors write them."""
    if choice.init == "eva":
        x = torch.cat(taken)
        a = torch.linalg.svd(x - x.mean(0), full_matrices=False).Vh[:rank]
        return w, a * a.gather(1, a.abs().argmax(1, keepdim=True)).sign(), w.new_zeros(len(w), rank)
    covariance = sum((x / x.max().abs()).T @ (x / x.max().abs()) for x in taken if len(x)) / len(taken)
    eye = torch.eye(len(covariance), dtype=torch.float64)
    covariance = covariance + eye * covariance.diagonal().mean() * 0.01
    inverse = torch.linalg.inv(covariance)
    assert torch.dist(covariance @ inverse, eye) < 0.05
    u, s, vt = torch.linalg.svd(w @ covariance, full_matrices=False)
    few = {"instruction": slice(None, choice.rank), "knowledge": slice(-choice.rank, None)}[choice.corda_mode]
    signs = vt[few].gather(1, vt[few].abs().argmax(1, keepdim=True)).sign().flatten()
    u, root, v = u[:, few] * signs, torch.diag((s[few] / scale).sqrt()), vt[few] * signs[:, None] @ inverse
    return w - scale * u @ root @ root @ v, root @ v, u @ root


def squared_gradients(
    model: nn.Module, layers: dict[str, nn.Linear], batches: Iterable[MicroBatch]
) -> dict[str, Tensor]:
    """LQ-LoRA's compute_empirical_Fisher: squares of the gradients of sequences' mean losses, each sequence by itself."""
    squares = {path: torch.zeros_like(layer.weight) for path, layer in layers.items()}
    for batch in batches:
        for one in range(len(batch.inputs)):
            documents = None if batch.documents is None else Documents(batch.documents.begins[one : one + 1])
            logits = model(batch.inputs[one : one + 1], batch.positions[one : one + 1], documents)
            loss = F.cross_entropy(logits.flatten(0, 1), batch.labels[one], ignore_index=IGNORE)
            weights = [layer.weight for layer in layers.values()]
            for path, gradient in zip(layers, torch.autograd.grad(loss, weights), strict=True):
                squares[path] += gradient.square()
    return squares


def forms_of(layers: dict[str, nn.Linear], config: TrainConfig, fishers: dict[str, Tensor]) -> dict[str, RowForm]:
    """The forms of all matrices, whole and in one process."""
    rank, errors, bits = config.adapter.rank, [], []
    for path, layer in layers.items():
        key = stream_key(config.seed, f"lq_lora/{path}.weight")
        errors.append(first_errors(layer.weight.detach(), FORMS, rank, key, fishers.get(path)))
        bits.append([float(bits_of(layer.weight.shape, form)) for form in FORMS])
    budget = config.adapter.bits * sum(layer.weight.numel() for layer in layers.values())
    chosen = choose(torch.tensor(errors, dtype=torch.float64), torch.tensor(bits, dtype=torch.float64), budget)
    assert len(set(chosen)) > 1, "all have one form: nothing is shared out"
    return {path: FORMS[form] for path, form in zip(layers, chosen, strict=True)}


def as_kept(w: Tensor, frozen_dtype: str | None) -> Tensor:
    """What a matrix is once it was kept in fewer bits."""
    if frozen_dtype is None:
        return w
    if frozen_dtype == "bf16":
        return w.bfloat16().double()
    form = {"nf4": NF4, "int8": INT8}[frozen_dtype]
    return decode_rows(encode_rows(w.float(), form), w.size(1), form, torch.float64)


def matches(name: str, patterns: list[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
