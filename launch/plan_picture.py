"""The picture of a plan: a bar for each place of the pipeline, its bytes by category at its peak, under what the device has."""

from pathlib import Path

from matplotlib.figure import Figure

from rowwise.trainer.plan.devices import GIBI
from rowwise.trainer.plan.forecast import Forecast
from rowwise.trainer.plan.ledger import CATEGORIES

# Okabe and Ito's, and greys for what nobody chooses.
COLORS = ("#0072B2", "#56B4E9", "#D55E00", "#009E73", "#882255", "#AA4499", "#E69F00", "#F0E442", "#505050", "#C8C8C8")


def draw_plan(forecast: Forecast, path: Path) -> None:
    """Writes a .png or .svg."""
    memories = forecast.memories
    panel = Figure(figsize=(max(5.0, 1.5 + 0.6 * len(memories)), 4.5), layout="constrained")
    axes = panel.subplots()
    places = range(len(memories))
    below = [0.0] * len(memories)
    for category, color in zip(CATEGORIES, COLORS, strict=True):
        heights = [memory.then[category] / GIBI for memory in memories]
        if any(heights):
            axes.bar(places, heights, bottom=below, color=color, label=category, width=0.8)
        below = [a + b for a, b in zip(below, heights, strict=True)]
    axes.bar(places, [forecast.room.reserve / GIBI] * len(memories), bottom=below, color="none", edgecolor="#808080",
             hatch="//", label="reserve", width=0.8)  # fmt: skip
    axes.axhline(forecast.room.limit / GIBI, color="#000000", linewidth=1)
    axes.text(len(memories) - 0.5, forecast.room.limit / GIBI, f" {forecast.device.name}", va="bottom", ha="right")
    axes.set_xticks(places, [f"rank {memory.rank}" for memory in memories], rotation=45 if len(memories) > 8 else 0)
    axes.set_ylabel("GiB at the peak")
    axes.set_title(f"{forecast.config.model.name}, {forecast.config.parallel.world_size} x {forecast.device.name}")
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    panel.savefig(path, dpi=144)
