"""Refuses a run that is forecast not to fit its devices, and says the cheapest change with which it would."""

import math
from dataclasses import replace

import torch

from rowwise.parallel.mesh import pick_device
from rowwise.trainer.config import TrainConfig
from rowwise.trainer.peaks import device_name
from rowwise.trainer.plan.changes import tried_changes
from rowwise.trainer.plan.devices import Device, device_here, device_named, kept_device
from rowwise.trainer.plan.forecast import Forecast, forecast
from rowwise.trainer.plan.works import unknown
from rowwise.trainer.screen import byte_count

OFFLOADS = ("offload_activations", "offload_states", "offload_params", "offload_gradients")


def own_device() -> Device:
    """Gives the figures of what this machine computes on, as `rowwise measure` timed it where it did."""
    device, kept = pick_device(0), kept_device()
    if kept is not None and kept.cuda == (device.type == "cuda"):
        return kept
    return untimed_device(device)


def untimed_device(device: torch.device) -> Device:
    """Gives the figures of a device of this machine that are known of its kind."""
    if device.type != "cuda":
        return device_named("cpu")
    return device_here(device_name(device), torch.cuda.mem_get_info(device)[1], torch.cuda.device_count())


def forecast_in_words(config: TrainConfig) -> str | None:
    """Tells what a rank is forecast to hold here, at most; None where that is not known."""
    if not is_known(config):
        return None
    found = forecast(config, own_device())
    worst = found.worst
    of = f" of {byte_count(found.room.limit)}" if limit_of(config, found.device) is not None else ""
    return f"about {byte_count(worst.most)}{of} a rank at most, on rank {worst.rank} in {worst.moment}"


def is_known(config: TrainConfig) -> bool:
    """Says whether it is known what layers keep, and the order of a pipeline does not follow from times that are not measured yet."""
    return unknown(config) is None and config.parallel.pipeline_schedule != "auto"


def limit_of(config: TrainConfig, device: Device) -> float | None:
    """Gives the bytes that a run may take of a device: what the user says, or all of a GPU's."""
    return config.memory.limit if config.memory.limit is not None or not device.cuda else device.memory


def require_fit(config: TrainConfig, device: Device) -> None:
    """Refuses a run that does not fit, unless `memory.fit=false`. `config`: checked. Raises ValueError."""
    if not config.memory.fit or limit_of(config, device) is None or not is_known(config):
        return
    # What waits in files has its room from the beginning, which says whether there is enough.
    found = forecast(config, replace(device, memory=limit_of(config, device) or 0.0, disk_room=math.inf))
    room = found.room
    if room.fits:
        return
    if room.needed <= room.limit:
        raise ValueError(
            f"{_away(config)}: {byte_count(room.host)} would wait on the host on rank {found.worst.rank}, where "
            f"{byte_count(room.ram)} a device may; {_advice(found)}, or memory.fit=false, "
            "which goes on regardless"
        )
    raise ValueError(
        f"the run is forecast to take {byte_count(room.needed)} of a device on rank {found.worst.rank}, in {found.worst.moment}, and "
        f"{'memory.limit is' if config.memory.limit is not None else f'{device.name} has'} {byte_count(room.limit)}, "
        f"{byte_count(room.needed - room.limit)} less; {_advice(found)}, or memory.fit=false, which goes on regardless"
    )


def _away(config: TrainConfig) -> str:
    """Names what of a run waits off its device."""
    places = {key: getattr(config.memory, key) for key in OFFLOADS}
    return " ".join(f"memory.{key}={place}" for key, place in places.items() if place != "none")


def _advice(found: Forecast) -> str:
    changes = tried_changes(found)
    fitting = [(one.seconds.step, words) for words, one in changes if one.room.fits]
    if fitting:
        seconds, words = min(fitting)
        slower = seconds / found.seconds.step - 1
        return (
            f"give {words}, with which it fits and a step takes {abs(slower):.0%} {'more' if slower >= 0 else 'less'}"
        )
    if changes:
        least, words = min((one.room.needed, words) for words, one in changes)
        return f"no single option saves as much ({words} comes to {byte_count(least)}); give more devices or a smaller model"
    return "give more devices or a smaller model"
