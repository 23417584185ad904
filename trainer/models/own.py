"""What a user's own model must keep to, looked at before a run of it starts: each refusal is a line, and names the part.

Names, shapes and roles are looked at on the meta device, where nothing takes memory. Every part is called once on a short sequence;
there too where the model is large, for it takes seconds until torch can. What a layer sees of other tokens is looked at in numbers,
in float64 on the host, of one layer of each kind, where it is small.
"""

from collections.abc import Callable, Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from rowwise.kernels.attention import Attend, causal_attention
from rowwise.kernels.look import PLAINLY, Look
from rowwise.kernels.spec import Constant, ParameterSpec, Role, Specs
from rowwise.kernels.visible import Documents
from rowwise.trainer.models.code import Unkept, telling
from rowwise.trainer.models.config import ModelConfig
from rowwise.trainer.models.ends import Head
from rowwise.trainer.models.model import Model
from rowwise.trainer.models.specs import EMBEDDING

EVERY = frozenset(
    ("name", "layers", "dim", "vocab_size", "tie_embeddings", "norm_eps", "init_std", "own", "settings", "frozen_dtype")
)
HEADS = frozenset(("heads", "kv_heads", "head_dim"))
LARGEST_CALLED = 1 << 24  # numbers of a model that is called on the host
LARGEST_PROBED = 1 << 22  # of a layer that is looked at in numbers
TOKENS, BORDER, NEARNESS = 8, 5, 1e-9
DROPOUT = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
MATRICES: tuple[Role, ...] = ("hidden", "embedding", "head")


def check_keys(made: Model, config: ModelConfig) -> None:
    """Refuses keys that the model does not go by, and those that no model of one's own has. Raises ValueError."""
    if config.init_from is not None:
        raise ValueError(
            f"model.init_from={config.init_from} with model.own={config.own}: a folder of Hugging Face holds no such model; leave one "
            "of them out"
        )
    read = EVERY | made.READS | (HEADS if made.SEES == "attend" else frozenset())
    for key in sorted(vars(config).keys() - read):
        if (value := getattr(config, key)) != (default := getattr(ModelConfig, key)):
            raise ValueError(
                f"model.{key}={value} with model.own={config.own}: it does not go by that key; give model.{key}={default}, or name it "
                f"in READS of {type(made).__name__}"
            )


def own_specs(made: Model, whole: nn.Module) -> dict[str, ParameterSpec]:
    """Returns what the model tells of its parameters, in their order, of every layer. `whole`: it, on the meta device. Raises
    ValueError where that is not what it has."""
    own = made.config.own
    assert own is not None
    with telling(own, "its specs"):
        told = dict(made.specs())
    for name, spec in told.items():
        if not isinstance(spec, ParameterSpec):
            raise _refusal(made, f"specs() gives {type(spec).__name__} for {name}; give a kernels.spec.ParameterSpec")
    found: dict[str, ParameterSpec] = {}
    used: set[str] = set()
    for name, p in whole.named_parameters():
        key = next((key for key in (name, *told) if key in told and fnmatchcase(name, key)), None)
        if key is None:
            raise _refusal(made, f"specs() lacks {name}, of shape {tuple(p.shape)}; tell there what it is")
        _check_spec(made, name, p, told[key])
        found[name], used = told[key], used | {key}
    if more := sorted(told.keys() - used):
        raise _refusal(
            made, f"specs() tells {more[0]}, which no parameter is called; there are {', '.join(_some(found))}"
        )
    return found


def _check_spec(made: Model, name: str, p: Tensor, spec: ParameterSpec) -> None:
    if torch.Size(spec.shape) != p.shape:
        raise _refusal(made, f"specs() says {tuple(spec.shape)} of {name}, whose shape is {tuple(p.shape)}")
    if spec.role in MATRICES and len(spec.matrix) != 2:
        raise _refusal(
            made, f"{name}, {tuple(p.shape)}, is no matrix and has the role {spec.role}; give it the role vector"
        )
    if spec.role not in (*MATRICES, "vector"):
        raise _refusal(made, f"{name} has the role {spec.role}; possible are {', '.join(MATRICES)} and vector")
    if spec.init is None:
        raise _refusal(made, f"specs() does not say what {name} begins as; give init=")


def check_modules(made: Model, whole: nn.Module) -> None:
    """Refuses what no layout would keep the same: parameters outside of parts, shared by parts or without rows, buffers, tensors that
    are neither, and dropout. `whole`: the model on the meta device. Raises ValueError."""
    every = list(whole.named_parameters(remove_duplicate=False))
    once = {name for name, _ in whole.named_parameters()}
    table = dict(every).get(EMBEDDING)
    if made.config.tie_embeddings and (table is None or table.shape != (made.config.vocab_size, made.config.dim)):
        raise _refusal(
            made, f"model.tie_embeddings=true, and there is no {EMBEDDING} of (model.vocab_size, model.dim) to tie to"
        )
    for name, p in every:
        if not p.ndim:
            raise _refusal(made, f"{name} is a single number without rows; give it the shape (1,)")
        if not p.is_floating_point():
            raise _refusal(made, f"{name} is of {p.dtype}; parameters are floating-point numbers")
        if name not in once:
            other = next(n for n, q in every if q is p)
            raise _refusal(
                made,
                f"{other} and {name} are one parameter; a head is tied to the embedding by model.tie_embeddings=true",
            )
    for name, _ in whole.named_buffers():
        raise _refusal(
            made, f"{name} is a buffer, which nothing splits or saves; make it a parameter, or where it is used"
        )
    for path, module in whole.named_modules():
        if isinstance(module, DROPOUT) and module.p:
            raise _refusal(made, f"{path} drops numbers at random, others on every layout; leave it out")
        if loose := [key for key, value in vars(module).items() if isinstance(value, Tensor)]:
            raise _refusal(made, f"{path}.{loose[0]} is a tensor and no parameter; make it where it is used")


@torch.no_grad()
def check_parts(made: Model, stage: Any) -> None:
    """Calls every part on a short sequence, and refuses one that gives another shape or dtype. `stage`: the whole decoder, on any
    device. Raises ValueError."""
    config, own = made.config, str(made.config.own)
    tokens = torch.zeros(1, TOKENS, dtype=torch.int64, device=next(stage.parameters()).device)
    seen = Witness(made)
    with telling(own, "embed"):
        x = made.embedded(stage.embed, tokens, tokens)
    _require_x(made, "embed", x, config.dim)
    layers = [int(layer) for layer in stage.blocks]
    with telling(own, "beside"):
        beside = made.beside(layers, x, tokens)
    if len(beside) != len(layers):
        raise _refusal(made, f"beside() gives {len(beside)} tuples for {len(layers)} layers")
    documents = Documents(((0, BORDER),)) if made.SEES != "sequence" else None
    for (layer, block), given in zip(stage.blocks.items(), beside, strict=True):
        seen.layer, seen.documents = layer, documents
        with telling(own, f"block {layer}"):
            x = block(x, *given, documents, seen)
        _require_x(made, f"block {layer}", x, config.dim)
    with telling(own, "norm"):
        x = stage.norm(x)
    _require_x(made, "norm", x, config.dim)
    if stage.head is not None and not isinstance(stage.head, Head):
        with telling(own, "head"):
            x = stage.head(x)
        _require_x(made, "head", x, config.vocab_size)


class Witness:
    """An `Attend` without numbers, which looks at how it is called. `layer`: by which; `documents`: what that was given."""

    def __init__(self, made: Model):
        self._made = made
        self.layer = ""
        self.documents: Documents | None = None

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, documents: Documents | None = None, look: Look = PLAINLY
    ) -> Tensor:
        made, config, where = self._made, self._made.config, f"block {self.layer} calls attend"
        if made.SEES != "attend":
            raise _refusal(made, f"{where}, and SEES is {made.SEES!r}; it is 'attend' where layers look by that alone")
        if documents is not self.documents:
            raise _refusal(made, f"{where} without the documents that it was given")
        if q.ndim != 4 or (q.size(2), k.size(2), v.size(2)) != (config.heads, config.kv_heads, config.kv_heads):
            raise _refusal(
                made,
                f"{where} with {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}; give (B, S, model.heads={config.heads}, E), "
                f"and of keys and values (B, S, model.kv_heads={config.kv_heads}, E)",
            )
        return torch.empty_like(q)


def _require_x(made: Model, part: str, x: Any, last: int) -> None:
    if not isinstance(x, Tensor) or x.shape != (1, TOKENS, last):
        what = f"the shape {tuple(x.shape)}" if isinstance(x, Tensor) else f"no tensor but {type(x).__name__}"
        raise _refusal(made, f"{part} gives {what}; it is (B, S, {last}), here {(1, TOKENS, last)}")
    if x.dtype != torch.get_default_dtype():
        raise _refusal(
            made, f"{part} makes {x.dtype} of {torch.get_default_dtype()}; a part keeps the dtype of what it is given"
        )


def check_sight(made: Model, stage: Any, specs: Specs) -> None:
    """Refuses a layer that looks at later tokens, or at others in another way than `SEES` says: one of each kind, in numbers that
    are drawn for it. `stage`: the whole decoder on the meta device. Raises ValueError."""
    kinds: dict[type, str] = {}
    for layer, block in stage.blocks.items():
        if sum(p.numel() for p in block.parameters()) <= LARGEST_PROBED:
            kinds.setdefault(type(block), layer)
    for layer in kinds.values():
        _check_layer(made, layer, specs)


def _unseen(q: Tensor, k: Tensor, v: Tensor, documents: Documents | None = None, look: Look = PLAINLY) -> Tensor:
    """An `Attend` by which a token sees nothing of others."""
    return q * 0


@torch.no_grad()
def _check_layer(made: Model, layer: str, specs: Specs) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.device("cpu"):
        block = made.block(int(layer)).double()
    for name, p in block.named_parameters():
        init = specs[f"blocks.{layer}.{name}"].init
        begins = init.value if isinstance(init, Constant) else 0.0
        scale = p[0].numel() ** -0.5 if p.ndim > 1 else 0.1
        p.copy_(begins + scale * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    x = torch.randn(1, TOKENS, made.config.dim, generator=generator, dtype=torch.float64)
    other = torch.randn(x.shape, generator=generator, dtype=torch.float64)

    def changes(kept: Callable[[int], bool], begins: tuple[int, ...], attend: Attend) -> Iterator[int]:
        """The tokens of which something changes where x changes at those that are not kept."""
        positions = torch.tensor([[n - max(b for b in begins if b <= n) for n in range(TOKENS)]])
        documents = Documents((begins,)) if len(begins) > 1 else None
        changed = torch.stack([x[0, n] if kept(n) else other[0, n] for n in range(TOKENS)])[None]
        with telling(str(made.config.own), f"block {layer}"):
            one, two = (block(t, *made.beside([int(layer)], t, positions)[0], documents, attend) for t in (x, changed))
        far = (one - two).abs().amax(-1)[0] > NEARNESS * one.abs().max()
        return (n for n in range(TOKENS) if far[n])

    if any(n < BORDER for n in changes(lambda n: n < BORDER, (0,), causal_attention)):
        raise _refusal(
            made, f"block {layer} gives a token something else when later tokens change; a decoder sees none of them"
        )
    if made.SEES == "attend" and any(n != 2 for n in changes(lambda n: n != 2, (0,), _unseen)):
        raise _refusal(made, f"block {layer} looks at other tokens without attend, and SEES is 'attend'")
    if made.SEES != "sequence" and any(
        n >= BORDER for n in changes(lambda n: n >= BORDER, (0, BORDER), causal_attention)
    ):
        raise _refusal(made, f"block {layer} looks beyond the document that a token is in, and SEES is {made.SEES!r}")


def linear_weights(whole: nn.Module) -> frozenset[str]:
    """Names the weights of plain linear layers: what conversions put others in the place of."""
    return frozenset(f"{path}.weight" for path, module in whole.named_modules() if type(module) is nn.Linear)


def _refusal(made: Model, said: str) -> Unkept:
    return Unkept(f"model.own={made.config.own}: {said}")


def _some(names: Mapping[str, Any]) -> list[str]:
    return [*list(names)[:4], "..."] if len(names) > 5 else list(names)
