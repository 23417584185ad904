"""What `rowwise plan` shows: the run that a tree is, forecast on so many devices."""

from pathlib import Path
from typing import Any

from rowwise.launch.compose import key_of
from rowwise.launch.ranks import default_nproc
from rowwise.trainer.check import check
from rowwise.trainer.config import config_from_tree
from rowwise.trainer.plan.devices import device_named, with_figures
from rowwise.trainer.plan.fit import find_fit
from rowwise.trainer.plan.forecast import forecast
from rowwise.trainer.plan.require import own_device
from rowwise.trainer.plan.told import told, told_of_fit


def planned(
    tree: dict[str, Any],
    overrides: list[str],
    world_size: int | None,
    device: tuple[str | None, list[str]],
    fit: bool,
    to: str | None,
) -> tuple[list[str], bool]:
    """(what is printed, whether it fits). `device`: its name, and other figures of it. Raises ValueError."""
    config = config_from_tree(tree)
    world_size = world_size or config.nproc or default_nproc()
    name, figures = device
    on = with_figures(device_named(name) if name is not None else own_device(), figures)
    if fit:
        found = find_fit(config, world_size, on, set(map(key_of, overrides)))
        lines, best = told_of_fit(found, config), found.best
    else:
        best = forecast(check(config, world_size), on)
        lines = told(best)
    if to is not None and best is not None:
        from rowwise.launch.plan_picture import draw_plan  # matplotlib, which takes a second and nothing else needs

        draw_plan(best, Path(to).expanduser())
        lines = [*lines, f"drawn in {to}"]
    return lines, best is not None and best.room.fits
