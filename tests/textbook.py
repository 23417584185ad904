"""Every rule as its paper writes it, on one whole matrix in float64, with nothing of the product but the code book and
the counter-based random numbers. One function a rule: (state, x, g, t, config) -> x after the step; `state` is a dict of
tensors under the names that the product's checkpoints use."""

import math
from typing import Any

import torch
from torch import Tensor

from rowwise.kernels.blockwise import code_book
from rowwise.kernels.look import PLAINLY
from rowwise.kernels.philox import normal, stream_key

CPU = torch.device("cpu")
NO_STATE: dict[str, Tensor] = {}


def attention(q, k, v, documents, look=PLAINLY):
    """softmax(scale Q K^T) V over whole scores, with a mask made token by token."""
    length, groups = q.size(1), q.size(2) // k.size(2)
    places = torch.arange(length)
    begins = [(0,)] * q.size(0) if documents is None else documents.begins
    own = torch.stack([torch.tensor([sum(b <= int(place) for b in row) for place in places]) for row in begins])
    seen = (own.unsqueeze(2) == own.unsqueeze(1)) & (places.unsqueeze(1) >= places)
    if look.window is not None:
        seen &= places.unsqueeze(1) - places < look.window
    k, v = (t.repeat_interleave(groups, dim=2) for t in (k, v))
    scale = 1 / math.sqrt(q.size(-1)) if look.scale is None else look.scale
    scores = torch.einsum("bshe,bthe->bhst", q, k) * scale
    scores = scores if look.cap is None else look.cap * torch.tanh(scores / look.cap)
    return torch.einsum("bhst,bthe->bshe", scores.masked_fill(~seen.unsqueeze(1), -math.inf).softmax(-1), v)


def quantise(x: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """The nearest of all 256 codes, block by block."""
    book = code_book(signed).double()
    tops = torch.cat([block.abs().amax(1, keepdim=True) for block in x.split(256, dim=1)], 1).float()
    spread = tops.double().repeat_interleave(256, dim=1)[:, : x.size(1)]
    scaled = torch.where(spread > 0, x / spread, x)
    few = max(1, 4096 // x.size(1))  # rows at a time, so that their distances to all codes stay in cache
    codes = [(rows.unsqueeze(2) - book).abs().argmin(2).to(torch.uint8) for rows in scaled.split(few)]
    return torch.cat(codes), tops


def dequantise(codes: Tensor, absmax: Tensor, signed: bool) -> Tensor:
    spread = absmax.double().repeat_interleave(256, dim=1)[:, : codes.size(1)]
    return code_book(signed).double()[codes.long()] * spread


def quantise_pair(m: Tensor, v: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Both of Adam's moments, rounded so that no block's largest |m| / sqrt(v) rises."""
    ratio = torch.where(v > 0, m.abs() / v.sqrt(), 0.0)
    most = torch.cat([part.amax(1, keepdim=True).expand_as(part) for part in ratio.split(256, dim=1)], 1)
    codes, top = quantise(v, False)
    short = dequantise(codes, top, False) * (1 + 1 / 64) < v
    codes = torch.where(short & ((codes == 0) | (ratio > 0.9 * most)), codes + 1, codes)
    second = codes, top
    limit = most * (1 + 2**-16) * dequantise(*second, False).sqrt()
    codes, top = quantise(torch.where(m.abs() > limit, m.sign() * limit, m), True)
    outside = dequantise(codes, top, True).abs() > limit
    inwards = torch.where(codes > 127, codes - 1, codes + (codes < 127))
    return [(torch.where(outside, inwards, codes), top), second]


def load_pair(state: dict[str, Tensor], shape: Any, eight: bool) -> tuple[Tensor, Tensor]:
    """m and v; m is 0 where v is."""
    if not state or not (eight or "exp_avg" in state):
        return torch.zeros(shape).double(), torch.zeros(shape).double()
    m, v = load(state, "exp_avg", True, shape, eight), load(state, "exp_avg_sq", False, shape, eight)
    return torch.where(v == 0, 0.0, m) if eight else m, v


def store_pair(state: dict[str, Tensor], m: Tensor, v: Tensor, eight: bool) -> None:
    if not eight:
        state["exp_avg"], state["exp_avg_sq"] = m, v
        return
    for key, pair in zip(("exp_avg", "exp_avg_sq"), quantise_pair(m, v), strict=True):
        state[f"{key}.codes"], state[f"{key}.absmax"] = pair


def load(state: dict[str, Tensor], key: str, signed: bool, shape: Any, eight: bool) -> Tensor:
    if eight:
        return (
            dequantise(state[f"{key}.codes"], state[f"{key}.absmax"], signed) if state else torch.zeros(shape).double()
        )
    return state[key] if key in state else torch.zeros(shape, dtype=torch.float64)


def store(state: dict[str, Tensor], key: str, signed: bool, value: Tensor, eight: bool) -> None:
    if eight:
        state[f"{key}.codes"], state[f"{key}.absmax"] = quantise(value, signed)
    else:
        state[key] = value


def adam(state: dict[str, Tensor], g: Tensor, t: int, c: Any, eight: bool = False) -> Tensor:
    b1, b2 = c.betas
    m, v = load_pair(state, g.shape, eight)
    m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
    store_pair(state, m, v, eight)
    return (m / (1 - b1**t)) / ((v / (1 - b2**t)).sqrt() + c.eps)


def lion(state: dict[str, Tensor], g: Tensor, t: int, c: Any, eight: bool = False) -> Tensor:
    b1, b2 = c.betas
    m = load(state, "exp_avg", True, g.shape, eight)
    store(state, "exp_avg", True, b2 * m + (1 - b2) * g, eight)
    return (b1 * m + (1 - b1) * g).sign()


def adafactor(state: dict[str, Tensor], g: Tensor, t: int, c: Any) -> Tensor:
    b = 1 - t ** (-c.decay)
    square = g**2 + 1e-30
    if g.ndim == 1:
        state["exp_avg_sq"] = b * state.get("exp_avg_sq", torch.zeros_like(g)) + (1 - b) * square
        u = g / state["exp_avg_sq"].sqrt()
    else:
        state["row"] = b * state.get("row", torch.zeros(g.size(0)).double()) + (1 - b) * square.mean(1)
        state["column"] = b * state.get("column", torch.zeros(g.size(1)).double()) + (1 - b) * square.mean(0)
        u = g / (torch.outer(state["row"], state["column"]) / state["row"].mean()).sqrt()
    return u / max(1.0, float((u**2).mean().sqrt()) / c.clip_threshold)


def muon(state: dict[str, Tensor], g: Tensor, t: int, c: Any) -> Tensor:
    state["momentum"] = c.momentum * state.get("momentum", torch.zeros_like(g)) + g
    return 0.2 * math.sqrt(max(g.shape)) * newton_schulz(g + c.momentum * state["momentum"])


def newton_schulz(x: Tensor) -> Tensor:
    x = x / x.norm()
    turned = x.size(0) > x.size(1)
    x = x.T if turned else x
    for _ in range(5):
        s = x @ x.T
        x = 3.4445 * x + (-4.7750 * s + 2.0315 * s @ s) @ x
    return x.T if turned else x


def lion_kappa(state: dict[str, Tensor], g: Tensor, t: int, c: Any) -> Tensor:
    """Lion with the gradient of a norm in the place of the sign; each as large as signs are, by its root mean square."""
    b1, b2 = c.betas
    m = state.get("exp_avg", torch.zeros_like(g))
    x = b1 * m + (1 - b1) * g
    state["exp_avg"] = b2 * m + (1 - b2) * g
    if c.kappa == "huber":
        return torch.where(x.abs() > c.delta, x.sign(), x / c.delta)
    if c.kappa == "nuclear":
        return newton_schulz(x) * math.sqrt(max(x.shape))
    u = x / (x.norm() if c.kappa == "l2" else x.norm(dim=1, keepdim=True))
    return u / (u**2).mean().sqrt()


def gauss(seed: int, stream: str, rows: int, columns: int) -> Tensor:
    return normal(stream_key(seed, stream), 0, rows * columns, CPU).view(rows, columns).double()


def subspace(state: dict[str, Tensor], g: Tensor, t: int, c: Any, rank: int, name: str, seed: int) -> Tensor:
    """Randomised subspace iteration (Halko, Martinsson & Tropp) from the basis of before, and random directions in the place of
    those that G hardly has."""
    if (t - 1) % c.refresh_every == 0:
        extra = min(8, min(g.shape) - rank)
        fresh = rank + extra if "basis" not in state else extra
        stream = f"subspace/{name}/{t}"
        w = gauss(seed, stream, g.size(1), fresh)
        w = torch.cat([state["basis"], w], 1) if "basis" in state else w
        u, s, _ = torch.linalg.svd(g.T @ torch.linalg.qr(g @ w).Q, full_matrices=False)
        basis = u[:, :rank][:, s[:rank] > 2**-15 * s[0]]
        for column in gauss(seed, stream, g.size(1), rank - basis.size(1)).T:
            for _ in range(2):
                column = column - basis @ (basis.T @ column)
            basis = torch.cat([basis, (column / column.norm()).unsqueeze(1)], 1)
        tops = basis.abs() / basis.abs().amax(0)
        signs = [column[(top > 1 - 2**-20).nonzero()[0]].sign() for column, top in zip(basis.T, tops.T, strict=True)]
        state["basis"] = basis * torch.cat(signs)
    return state["basis"]


def projected(g: Tensor, q: Tensor) -> Tensor:
    """G Q, without what is nothing beside its row."""
    r = g @ q
    return torch.where(r.abs() < 2**-20 * r.abs().amax(1, keepdim=True), 0.0, r)


def low_rank_adam(state: dict[str, Tensor], r: Tensor, t: int, c: Any) -> Tensor:
    eight = getattr(c, "state_bits", 32) == 8 and r.numel() >= 4096
    moments = {k: v for k, v in state.items() if k.startswith("exp")}
    n = adam(moments, r, t, c, eight)
    state.update(moments)
    return n


def limit_growth(state: dict[str, Tensor], u: Tensor, growth: float | None, correction: float = 1.0) -> Tensor:
    """u / correction may grow by a factor of `growth` in its norm (Fira), from a norm that is not 0."""
    if growth is None:
        return u
    u = u / correction
    if 0 < growth * state.get("limit", torch.zeros(1)) < u.norm():
        u = u * (growth * state["limit"] / u.norm())
    state["limit"] = u.norm().reshape(1)
    return u * correction


def bias_correction(t: int, c: Any) -> float:
    return math.sqrt(1 - c.betas[1] ** t) / (1 - c.betas[0] ** t)


def galore(state: dict[str, Tensor], g: Tensor, t: int, c: Any, rank: int, name: str, seed: int) -> Tensor:
    q = subspace(state, g, t, c, rank, name, seed)
    return c.scale * low_rank_adam(state, projected(g, q), t, c) @ q.T


def fira(state: dict[str, Tensor], g: Tensor, t: int, c: Any, rank: int, name: str, seed: int) -> Tensor:
    q = subspace(state, g, t, c, rank, name, seed)
    r = projected(g, q)
    n = low_rank_adam(state, r, t, c)
    phi = torch.where(r.norm(dim=1) > 0, n.norm(dim=1) / r.norm(dim=1), 0.0).unsqueeze(1)
    if c.form == "paper":
        s = phi * (g - r @ q.T)
        s = s if s.norm() > 2**-20 * math.sqrt(r.numel()) else torch.zeros_like(s)
        return c.scale * (n @ q.T + limit_growth(state, s, c.growth))
    return c.scale * n @ q.T + limit_growth(state, phi * (g - c.scale * r @ q.T), c.growth, bias_correction(t, c))


def dct_matrix(n: int) -> Tensor:
    j, k = torch.arange(n).double().unsqueeze(1), torch.arange(n).double()
    d = torch.cos(math.pi * (2 * j + 1) * k / (2 * n)) * math.sqrt(2 / n)
    d[:, 0] /= math.sqrt(2)
    return d


def dct(state: dict[str, Tensor], g: Tensor, t: int, c: Any, rank: int, name: str, seed: int) -> Tensor:
    d = dct_matrix(g.size(1))
    if (t - 1) % c.refresh_every == 0:
        eight = c.state_bits == 8 and g.size(0) * rank >= 4096
        moments = {k: v for k, v in state.items() if k.startswith("exp")}
        sizes = (g @ d).norm(dim=0)
        sizes[sizes <= 2**-20 * sizes.norm()] = 0
        chosen = sorted(sorted(range(len(sizes)), key=lambda k: (-float(sizes[k]), k))[:rank])
        if "columns" in state:
            before = state["columns"].tolist()
            old = load_pair(moments, None, eight)
            new = [torch.zeros_like(number) for number in old]
            for place, column in enumerate(chosen):
                if column in before:
                    for one, other in zip(new, old, strict=True):
                        one[:, place] = other[:, before.index(column)]
            store_pair(moments, *new, eight)
        state.update(moments)
        state["columns"] = torch.tensor(chosen, dtype=torch.int32)
    q = d[:, state["columns"].long()]
    return c.scale * low_rank_adam(state, projected(g, q), t, c) @ q.T


def apollo(state: dict[str, Tensor], g: Tensor, t: int, c: Any, rank: int, name: str, seed: int) -> Tensor:
    omega = gauss(seed, f"projection/{name}/{(t - 1) // c.refresh_every}", g.size(1), rank) / math.sqrt(rank)
    r = g @ omega
    n = low_rank_adam(state, r, t, c)
    rows = (n.norm(dim=1) / r.norm(dim=1)).unsqueeze(1)
    u = (n.norm() / r.norm() if c.name == "apollo_mini" else rows) * g
    return math.sqrt(c.scale) * limit_growth(state, u, c.growth, bias_correction(t, c))


LOW_RANK = {"galore": galore, "dct": dct, "fira": fira, "apollo": apollo, "apollo_mini": apollo}


def low_rank(state: dict[str, Tensor], g: Tensor, t: int, c: Any, name: str, seed: int) -> Tensor:
    """The narrow side is projected, or the columns, whose update then gets the size of the other."""
    m, n = g.shape
    rule, rank = LOW_RANK[c.name], getattr(c, "rank", 1)
    if m < n and c.side == "short":
        return rule(state, g.T, t, c, rank, name, seed).T
    return rule(state, g, t, c, rank, name, seed) * max(1.0, math.sqrt(n / m))


PLAIN = {"adamw": adam, "lion": lion, "adafactor": adafactor, "muon": muon, "lion_kappa": lion_kappa}


def rule_of(name: str, shape: Any, config: Any) -> str:
    """The table of docs/optimizers.md, written once more."""
    special = name.startswith(("embed", "head")) or len(shape) == 1
    eight = len(shape) == 2 and math.prod(shape) >= 4096
    if config.name == "adamw8bit":
        return "adamw8bit" if eight and not name.startswith("embed") else "adamw"
    if config.name == "lion8bit":
        return "lion8bit" if eight and not name.startswith("embed") else "lion"
    if config.name in LOW_RANK or config.name == "muon":
        return "adamw" if special else config.name
    if config.name == "lion" and config.kappa != "l1" and not special:
        return "lion_kappa"
    return config.name


def textbook_step(
    name: str, state: dict[str, Tensor], x: Tensor, g: Tensor, t: int, lr: float, config: Any, seed: int
) -> Tensor:
    """One step of one parameter: x after it; `state` changes."""
    rule = rule_of(name, x.shape, config)
    if rule in LOW_RANK:
        u = low_rank(state, g, t, config, name, seed)
    elif rule.endswith("8bit"):
        u = PLAIN[rule.removesuffix("8bit")](state, g, t, config, True)
    else:
        u = PLAIN[rule](state, g, t, config)
    decay = config.weight_decay if x.ndim > 1 else 0.0
    return x - lr * decay * x - lr * u
