"""What the pieces of a stage hold while they compute, and between forward and backward: one micro-batch on one rank."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from rowwise.parallel.activations.results import INPUT, LayerResults, LayerWork, Result
from rowwise.trainer.activations import kept_of, results_of, tokens_of
from rowwise.trainer.adapters.config import NoAdapter
from rowwise.trainer.adapters.specs import run_specs
from rowwise.trainer.config import TrainConfig
from rowwise.trainer.models.decoder import layer_work
from rowwise.trainer.models.specs import FIRST
from rowwise.trainer.plan.adapted import Adapted, LayerForm, adapt, form_of, path_in_layer, with_extras
from rowwise.trainer.plan.codes import coding_bytes
from rowwise.trainer.plan.layer import ALL, Kept, Moment, later, moments, results_by_name, stored, waits
from rowwise.trainer.plan.loss import LossWork, loss_work
from rowwise.trainer.plan.states import pieces_of, widths_of
from rowwise.trainer.plan.tiles import with_tiles
from rowwise.trainer.stages import splits_backward

NOTHING = (Moment(0, 0, 0, ALL),)  # of a backward


@dataclass(frozen=True)
class Work:
    """Bytes of a piece beside parameters and gradients. `kept`: activations, from its forward to its backward, its input among them;
    of these `away` wait elsewhere, and `stays` of those here too; `forward`: what comes and goes meanwhile, at most; `backward`: from
    moment to moment; `rest`: what of what was kept weights' gradients need, and `decoded`: of that at once; `messages`: of attention,
    at most in the forward and in the backward; `loss`: what the loss holds (None: it is none); `returns`: a gradient comes back to
    it, since something of it, or before it, learns; `takes`: it keeps what it is given."""

    name: str
    kept: int
    forward: int
    backward: tuple[Moment, ...]
    away: int = 0
    stays: int = 0
    rest: int = 0
    decoded: int = 0
    messages: tuple[int, int] = (0, 0)
    loss: LossWork | None = None
    returns: bool = True
    takes: bool = True


def unknown(config: TrainConfig) -> str | None:
    """Says why nobody knows what the layers of a run keep on the device; None where it is known."""
    if config.parallel.backend != "torch":
        return (
            f"parallel.backend={config.parallel.backend}: what its engine holds beside the layers is not forecast; give "
            "parallel.backend=torch to see what a run holds that splits the same states"
        )
    if config.model.own is not None:
        return f"{config.model.code}: nobody knows what its layers keep; a run says in memory.json what it held"
    if results_of(config) is None:
        return (
            f"model.block={config.model.block}: its layers do not say what they make, so that nobody knows what they keep; give the "
            "block a table of its results (docs/memory.md)"
        )
    work = layer_work(config.model, widths_of(config).compute, False)
    if work is None:
        return (
            f"model.block={config.model.block}: its layers do not say what their backward holds; give the block a method `work` "
            "beside its table of results (docs/memory.md)"
        )
    if problem := unknown_of_frozen(config, work):
        return problem
    if config.memory.offload_share != "all":
        return (
            f"memory.offload_share={config.memory.offload_share}: which results then stay on the device is not forecast; give "
            "memory.offload_share=all to see what a run holds when everything leaves"
        )
    return None


def unknown_of_frozen(config: TrainConfig, work: LayerWork) -> str | None:
    """Says why nobody knows what layers hold of which some is frozen, or has an adapter; None where it is known."""
    specs = run_specs(config)
    hidden = {name for name, spec in specs.items() if spec.role == "hidden"}
    if isinstance(config.adapter, NoAdapter) and not any(specs[name].frozen for name in hidden):
        return None
    if not {path_in_layer(name) for name in hidden} <= {path for piece in work.backward for path in piece.linears}:
        return (
            f"model.block={config.model.block}: its layers do not say which linear layers their backward goes through, so that what "
            "is frozen of them is not forecast; name them in its method `work` (docs/memory.md)"
        )
    split = config.parallel.pipeline > 1 and splits_backward(config.parallel, config.micro_batches)
    if split and any(not specs[name].frozen for name in hidden):
        return (
            f"parallel.pipeline_schedule={config.parallel.pipeline_schedule} with some hidden matrices frozen and others not: what "
            "waits for weights' gradients that come later is not forecast; give gpipe, 1f1b or interleaved_1f1b to see what those hold"
        )
    return None


def works_of(config: TrainConfig, layers: range, split: bool, gpu: bool) -> list[Work]:
    """Lists the work of each piece of a stage. `split`: its backward is in two."""
    tokens, width, model = tokens_of(config), widths_of(config).compute, config.model
    works = layer_works(config, layers, split, gpu)
    ropes = {model.at(layer).rope for layer in layers[: model.period]}
    tables = sum(2 * rope.size * width * tokens for rope in ropes)  # which all layers of a stage that are alike share
    memory = config.memory
    # What a stage was given it holds itself, beside what its first layer keeps of that, not while that computes alone.
    given = tokens * model.dim * width if layers.start > 0 else 0
    apart = memory.compress != "none" or not works[0].takes
    beside, stays = (given, 0) if apart else (0, min(given, works[0].away))
    works[0] = replace(works[0], kept=works[0].kept + tables + beside, stays=stays, forward=works[0].forward - beside)
    if layers.start == 0:
        works.insert(0, embedding_work(config, tokens, width))
    if layers.stop == model.layers:
        works.append(head_work(config, tokens, width, split, gpu))
    return works


def embedding_work(config: TrainConfig, tokens: int, width: int) -> Work:
    """Counts what the embedding holds: its output is counted with the first layer."""
    size, learns = tokens * config.model.dim, embedding_learns(config)
    if not config.model.stable_embedding:
        return Work("the embedding", 0, 0, NOTHING, returns=learns)
    wide = max(4, width)
    kept = size * wide + 2 * tokens * wide  # what the layer norm takes, its mean and its scale
    during = size * (2 * wide + width)
    if not learns:
        return Work("the embedding", 0, during, NOTHING, returns=False)
    return Work("the embedding", kept, during, (Moment(0, during, 0, 0), Moment(kept, size * width, 0, ALL)))


def embedding_learns(config: TrainConfig) -> bool:
    """Says whether anything before the layers learns."""
    return any(not spec.frozen for name, spec in run_specs(config).items() if name in FIRST)


def layer_works(config: TrainConfig, layers: range, split: bool, gpu: bool) -> list[Work]:
    """Counts what each layer holds."""
    tokens, width, model, table = tokens_of(config), widths_of(config).compute, config.model, results_of(config)
    if problem := unknown(config):
        raise ValueError(problem)
    assert table is not None
    work = layer_work(model, width, gpu)
    assert work is not None
    policy, pieces = kept_of(config), pieces_of(config, layers)[layers.start == 0 :]
    begins = layers.start == 0 and not embedding_learns(config)  # nothing before a layer learns
    known: dict[tuple[frozenset[str], LayerForm], Work] = {}
    works = []
    for layer, piece in zip(layers, pieces, strict=False):
        kept = Kept(policy[layer], width, config.memory.compress != "none")
        form = form_of(config, piece, work, begins)
        begins = begins and form.first == -1
        if (kept.names, form) not in known:
            adapted = with_tiles(config, adapt(config, form, table, work, kept, split, gpu), gpu)
            known[kept.names, form] = (
                Work("", 0, max(work.alone, _again(table, work, kept)) * tokens, NOTHING, returns=False)
                if form.first == -1
                else adapted_work(config, adapted, kept, split, gpu)
            )
        works.append(replace(known[kept.names, form], name=f"layer {layer}"))
    return works


def _again(table: LayerResults, work: LayerWork, kept: Kept) -> int:
    """Counts the bytes a token of what would be made again, which is there until the forward is over, and what that makes last."""
    again = sum(result.numbers for result in table.results if result.name not in kept.names)
    return (again * kept.width + work.last) * (again > 0)


def adapted_work(config: TrainConfig, adapted: Adapted, kept: Kept, split: bool, gpu: bool) -> Work:
    """Counts what a layer holds that keeps these of its results."""
    tokens, width, table, work = tokens_of(config), kept.width, adapted.table, adapted.work
    # Beside results and codes a GPU's kernels take nothing.
    taken = {n: (0, 0) if gpu else coding_bytes(n, tokens) for n in columns_of(table, kept) if kept.coded}
    decoding = max((size for _, size in taken.values()), default=0)
    stays, everything = (table.bytes_kept(names, width, kept.coded) for names in (kept.names, table.names))
    during = (everything - stays + work.last) * tokens  # until the forward is over all results are there
    if kept.coded:
        coding = {columns: size for columns, (size, _) in taken.items()}
        during = forward_in_codes(table, kept, work, tokens, coding)
    during = max(during, adapted.most - stays * tokens)
    back = tuple(scaled(one, tokens, decoding) for one in moments(table, kept, work, split))
    waiting = waits(table, work) if split else frozenset[str]()
    decoded = max((r.numbers * width for r in table.results if r.name in waiting & kept.names), default=0) * kept.coded
    beside, rest = (sum(getattr(one, key) for one in adapted.extras) for key in ("kept", "rest"))
    holds = stays * tokens + beside
    return Work(
        "", holds, during, with_extras(back, adapted.extras), holds * (config.memory.offload_activations != "none"),
        rest=later(table, kept, waiting) * tokens + rest, decoded=decoded * tokens + decoding * split,
        messages=messages_of(config, tokens, width), takes=table.input > 0,
    )  # fmt: skip


def columns_of(table: LayerResults, kept: Kept) -> set[int]:
    """Finds how many numbers a token the tensors have that a layer keeps, its input among them."""
    return {
        result.columns for name, result in results_by_name(table).items() if name in stored(kept) and result.numbers
    }


def forward_in_codes(table: LayerResults, kept: Kept, work: LayerWork, tokens: int, coding: Mapping[int, int]) -> int:
    """Counts what the forward of a layer holds whose results are coded: each is as it is until the first result that takes it is
    there, and then coded, which takes the bytes of `coding`; what is made again stays as it is until the forward is over."""
    known = results_by_name(table)
    waits = {name: result for name, result in known.items() if name in stored(kept) and result.numbers}  # to be coded
    there, most = table.input * kept.width, work.alone * tokens

    def code(result: Result, beside: int) -> int:
        mine = result.numbers * kept.width * (result.name != INPUT)
        return (beside + mine) * tokens + coding[result.columns]

    for result in table.results:
        size = result.numbers * kept.width
        taken = [waits.pop(name) for name in result.of if name in waits]
        most = max([most, *(code(one, there + size) for one in taken)])
        there += 0 if result.name in kept.names else size
    return max([most, (there + work.last) * tokens, *(code(result, there) for result in waits.values())])


def head_work(config: TrainConfig, tokens: int, width: int, split: bool, gpu: bool) -> Work:
    """Counts what the last norm, the head and the loss hold."""
    dim, wide = config.model.dim * width, max(4, width)
    loss = loss_work(config, tokens, width, split, gpu)
    kept = (2 if loss.needs_input else 1) * tokens * dim + tokens * wide
    norm = dim if gpu else (3 if width == wide else 4) * config.model.dim * wide
    waits = tokens * dim if loss.deferred else 0
    back = (
        Moment(0, tokens * dim, 0, 0),
        Moment(tokens * dim * loss.needs_input, tokens * (dim + norm), waits, ALL),
        Moment(kept, tokens * dim, waits, ALL),
    )
    return Work("the head and the loss", kept, tokens * norm, back, loss=loss)


def messages_of(config: TrainConfig, tokens: int, width: int) -> tuple[int, int]:
    """Counts the bytes of a layer's messages that are under way at once, in its forward and in its backward: what goes and what
    comes of an all-to-all; round a ring the keys and values of one rank, or of the next one too where there is a third, and in the
    backward three times their gradients: those at work, and those of the block before, which go and come."""
    parallel, model = config.parallel, config.model
    if parallel.ulysses * parallel.ring == 1:
        return 0, 0
    keys = math.lcm(model.kv_heads, parallel.ulysses) * model.head_size
    queries = model.heads * model.head_size
    exchanged = 2 * (queries + 2 * keys) * width if parallel.ulysses > 1 else 0
    blocks = min(2, parallel.ring - 1) * 2 * keys * width
    gradients = 3 * 2 * keys * max(4, width) if parallel.ring > 1 else 0
    return tokens * max(exchanged, blocks), tokens * max(exchanged, blocks + gradients)


def scaled(moment: Moment, tokens: int, beside: int) -> Moment:
    """Gives a moment of so many tokens; `beside`: bytes that it takes to decode its results however many these are."""
    return replace(
        moment,
        released=moment.released * tokens,
        working=max(moment.working * tokens, (moment.decoding * tokens + beside) * (moment.decoding > 0)),
        deferred=moment.deferred * tokens,
        read=moment.read * tokens,
        unread=moment.unread * tokens,
        given=moment.given * tokens,
        gone=moment.gone * tokens,
    )
