"""A checkpoint as `DeepSpeedEngine.save_checkpoint` writes it under ZeRO 1, 2 and 3, read without DeepSpeed.

    global_step100/mp_rank_00_model_states.pt                           names, shapes and counts (stages 1 and 2)
    global_step100/zero_pp_rank_R_mp_rank_00_model_states.pt            the same, of each rank (stage 3)
    global_step100/[bf16_]zero_pp_rank_R_mp_rank_00_optim_states.pt     rank R's part of every state, flat

Stages 1 and 2 lay the parameters of a group end to end, in the order of `param_shapes` and with what each is filled up by, and give
every rank an equal part. (`param_slice_mappings` says so too, and names the wrong ones where gradients go round robin.) Stage 3 cuts
every parameter by itself into equal parts, the last filled up, and lays a rank's parts end to end.
(deepspeed.runtime.zero.stage_1_and_2 and stage3, and how deepspeed.utils.zero_to_fp32 reads them, of 0.19.8.)
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rowwise.trainer.convert.foreign import MASTER, Foreign, Group, as_written_by_deepspeed, counts_of
from rowwise.trainer.convert.pickles import load

OPTIM_STATES = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
# Of stages 1 and 2, and of 3.
MODEL_STATES = ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt")
Flat = dict[str, Tensor]  # state -> all of it that a rank has of a group


def read_zero(folder: Path) -> Foreign:
    """Reads where everything of a checkpoint stands, and no numbers. Raises ValueError."""
    _refuse_other_cuts(folder)
    model_states, path = read_model_states(folder)
    with as_written_by_deepspeed(path):
        groups = shapes_of(model_states)
        frozen = list(map(str, model_states.get("frozen_param_shapes") or ()))
        shapes = {name: shape for group in groups for name, shape in group.items()}
        pieces: dict[str, dict[str, list[Tensor]]] = {name: {} for name in shapes}
    if frozen:
        raise ValueError(f"{path} has frozen parameters ({', '.join(frozen)}), and a run of ours learns them all")
    optimizer: Mapping[str, Any] = {}
    files, parts = rank_files(folder), list[int]()
    for rank, file in enumerate(files):
        tree = load(file)
        with as_written_by_deepspeed(file):
            optimizer = tree["optimizer_state_dict"]
            ranks = cut_for(optimizer)
        if ranks != {len(files)}:
            raise ValueError(
                f"{folder} is of {' and '.join(map(str, sorted(ranks)))} ranks, and has the states of {len(files)}: it is no whole "
                "checkpoint"
            )
        with as_written_by_deepspeed(file):
            if "fp32_flat_groups" in optimizer:
                mine = _of_stage_3(optimizer, groups, rank, len(files))
            else:
                # The last rank's part is cut to what is filled.
                parts = parts or [flat.numel() for flat in optimizer["single_partition_of_fp32_groups"]]
                mine = _of_stages_1_and_2(optimizer, groups, rank, parts)
            for name, states in mine:
                for state, piece in states.items():
                    pieces[name].setdefault(state, []).append(piece)
    with as_written_by_deepspeed(files[-1]):
        torch_state = _torch_state(optimizer)
        settings = torch_state["param_groups"]
        return Foreign(
            folder,
            pieces,
            shapes,
            grouped(groups, settings),
            counts_of(model_states, _updates(torch_state["state"], settings)),
            optimizer.get("loss_scaler"),
            clip_norm_of(model_states),
        )


def _refuse_other_cuts(folder: Path) -> None:
    """Refuses what was cut otherwise too than by ZeRO. Raises ValueError."""
    others = [path.name for path in folder.glob("*mp_rank_*_model_states.pt") if "mp_rank_00_" not in path.name]
    others = sorted([*others, *(path.name for path in folder.glob("layer_*"))])
    if others:
        raise ValueError(
            f"{folder} is of tensor or pipeline parallelism or of experts ({others[0]}), whose parts have forms of their own; "
            "possible are checkpoints of ZeRO 1 to 3 alone: let DeepSpeed make it universal first"
        )


def read_model_states(folder: Path) -> tuple[Mapping[str, Any], Path]:
    """Reads what a checkpoint says of the model and the run, of any stage. Raises ValueError."""
    path = next((folder / name for name in MODEL_STATES if (folder / name).is_file()), None)
    if path is None:
        raise ValueError(f"{folder} has no {' and no '.join(MODEL_STATES)}: it is no whole checkpoint")
    tree = load(path)
    if not isinstance(tree, dict):
        raise ValueError(f"{path} is not as DeepSpeed writes it (it holds a {type(tree).__name__})")
    return tree, path


def shapes_of(model_states: Mapping[str, Any]) -> list[Mapping[str, torch.Size]]:
    """Returns the shapes of the parameters of each group, in order."""
    return [{str(name): torch.Size(shape) for name, shape in one.items()} for one in model_states["param_shapes"]]


def clip_norm_of(model_states: Mapping[str, Any]) -> float | None:
    """Returns the norm to which gradients were clipped; None where the checkpoint does not say it."""
    said = model_states.get("ds_config", {}).get("gradient_clipping")
    return float(said) if isinstance(said, int | float) else None


def rank_files(folder: Path) -> list[Path]:
    """Returns the files of the optimizer's states, rank by rank. Raises ValueError where one is missing, or there twice."""
    found: dict[int, Path] = {}
    for path in sorted(folder.iterdir()):
        if match := OPTIM_STATES.fullmatch(path.name):
            rank = int(match[1])
            if rank in found:
                raise ValueError(f"{folder} has both {found[rank].name} and {path.name}: it was saved into twice")
            found[rank] = path
    missing = [rank for rank in range(max(found, default=0) + 1) if rank not in found]
    if missing:
        raise ValueError(
            f"{folder} has no *zero_pp_rank_{missing[0]}_mp_rank_00_optim_states.pt: it is no whole checkpoint"
        )
    return [found[rank] for rank in sorted(found)]


def cut_for(optimizer: Mapping[str, Any]) -> set[int]:
    """Returns for how many ranks the states of the groups were cut."""
    partitions = optimizer["partition_count"]
    return set(map(int, partitions if isinstance(partitions, list) else [partitions]))


def _torch_state(optimizer: Mapping[str, Any]) -> Mapping[str, Any]:
    """The state_dict of the optimizer within."""
    return optimizer["optimizer_state_dict" if "fp32_flat_groups" in optimizer else "base_optimizer_state"]


def _of_stages_1_and_2(
    optimizer: Mapping[str, Any], groups: list[Mapping[str, torch.Size]], rank: int, parts: list[int]
) -> Iterator[tuple[str, Flat]]:
    """What a rank has of every parameter, of groups of which each rank has so many numbers (`parts`)."""
    flats = _flats(optimizer, optimizer["single_partition_of_fp32_groups"])
    fills = optimizer.get("param_alignment_paddings") or [[0] * len(group) for group in groups]
    for flat, shapes, fill, part in zip(flats, groups, fills, parts, strict=True):
        begin = -rank * part
        for (name, shape), filled in zip(shapes.items(), fill, strict=True):
            first, last = max(0, begin), max(0, min(part, begin + shape.numel()))
            yield name, {state: _part(tensor, first, max(0, last - first)) for state, tensor in flat.items()}
            begin += shape.numel() + filled


def _of_stage_3(
    optimizer: Mapping[str, Any], groups: list[Mapping[str, torch.Size]], rank: int, ranks: int
) -> Iterator[tuple[str, Flat]]:
    """What a rank has of every parameter, without what it is filled up with."""
    for flat, shapes in zip(_flats(optimizer, optimizer["fp32_flat_groups"]), groups, strict=True):
        start = 0
        for name, shape in shapes.items():
            size = shape.numel()
            part = -(-size // ranks)
            mine = max(0, min(part, size - rank * part))
            yield name, {state: _part(tensor, start, mine) for state, tensor in flat.items()}
            start += part


def _part(flat: Tensor, start: int, size: int) -> Tensor:
    return flat.reshape(-1)[start : start + size]


def _flats(optimizer: Mapping[str, Any], masters: list[Tensor]) -> list[Flat]:
    """The flat tensors of every group. A state that is one number, such as the step, is none of them."""
    states = _torch_state(optimizer)["state"]
    return [
        {MASTER: master, **{k: t for k, t in states.get(i, {}).items() if isinstance(t, Tensor) and t.dim() > 0}}
        for i, master in enumerate(masters)
    ]


def grouped(names: list[Mapping[str, torch.Size]], settings: list[Mapping[str, Any]]) -> list[Group]:
    """Pairs parameters with the settings of their group; stage 3 may have cut a group into several, which are in order."""
    if len(names) == len(settings):
        return [Group(frozenset(one), said) for one, said in zip(names, settings, strict=True)]
    flats = [len(said["params"]) for said in settings]
    cut = iter(names)
    return [
        Group(frozenset(name for _ in range(count) for name in next(cut, {})), said)
        for count, said in zip(flats, settings, strict=True)
    ]


def _updates(states: Mapping[Any, Any], settings: list[Mapping[str, Any]]) -> Any:
    """What the optimizer counted: torch's and DeepSpeed's own keep it with the states, older ones with the groups."""
    counted = [state["step"] for state in states.values() if "step" in state]
    return next(iter([*counted, *(said["step"] for said in settings if "step" in said)]), None)
