"""A forecast in words: a table of bytes by category, and a line about time."""

from rowwise.trainer.config import TrainConfig
from rowwise.trainer.console import labelled
from rowwise.trainer.models.decoder import parameter_count
from rowwise.trainer.plan.fit import Fit
from rowwise.trainer.plan.forecast import Forecast
from rowwise.trainer.plan.ledger import CATEGORIES, FILE, HOST
from rowwise.trainer.screen import byte_count, count
from rowwise.trainer.summary import batch_in_words, layout_in_words

MEANINGS = {
    "parameters": "this rank's rows",
    "gathered": "whole parameters beside them",
    "gradients": "whole ones and this rank's rows",
    "optimizer": "the states of this rank's rows",
    "masks": "and what sparse methods keep beside them",
    "average": "the average of this rank's rows",
    "activations": "what layers keep for the backward",
    "loss": "the loss, its logits and gradients",
    "messages": "buffers of what crosses ranks",
    "working": "what operations make on the way",
    HOST: "on the host, beside the device: what waits there, and comes and goes",
    FILE: "in files of this rank",
}
FILES_OR_HOST = {HOST: "the host", FILE: "files"}


def told(forecast: Forecast) -> list[str]:
    """Tells a forecast: what is planned, its table, the ranks of a pipeline, its time."""
    config, worst = forecast.config, forecast.worst
    model, parallel = config.model, config.parallel
    return [
        labelled("model", f"{model.name}: {count(parameter_count(model)[0])} parameters, {config.optim.name}"),
        labelled("layout", layout_in_words(parallel, parallel.world_size, forecast.device.name)),
        labelled("batch", batch_in_words(config)),
        labelled("memory", in_words(forecast)),
        labelled(
            "most",
            f"on rank {worst.rank}, in {worst.moment}" if worst.moment != "the start" else f"on rank {worst.rank}",
        ),
        "",
        *_table(forecast),
        *_stages(forecast),
        "",
        *time_in_words(forecast),
    ]


def in_words(forecast: Forecast) -> str:
    """Tells what the fullest rank needs, and of what, in a line."""
    room = forecast.room
    if room.fits:
        verdict = "fits"
    elif room.needed > room.limit:
        verdict = f"does not fit, by {byte_count(room.needed - room.limit)}"
    elif room.host > room.ram:
        verdict = f"does not fit: {byte_count(room.host)} wait on the host, where {byte_count(room.ram)} a device may"
    else:
        verdict = f"does not fit: {byte_count(room.files)} wait in files, where {byte_count(room.disk)} a device may"
    return (
        f"{byte_count(room.needed)} of {byte_count(room.limit)} a {forecast.device.name}: {byte_count(room.held)} at most and "
        f"{byte_count(room.reserve)} for libraries and fragmentation; {verdict}"
    )


def _table(forecast: Forecast) -> list[str]:
    worst = forecast.worst
    rows = [("category", "at most", "at the peak", "")]
    rows += [
        (name, byte_count(peak), byte_count(worst.then[name]), MEANINGS[name])
        for name, peak in worst.peaks.items()
        if peak
    ]
    rows.append(
        ("together", byte_count(worst.most), byte_count(sum(worst.then[category] for category in CATEGORIES)), "")
    )
    rows.append(("reserve", byte_count(forecast.room.reserve), "", "for libraries and fragmentation"))
    widths = [max(len(row[n]) for row in rows) for n in range(3)]
    return [f"{a:<{widths[0]}}  {b:>{widths[1]}}  {c:>{widths[2]}}  {d}".rstrip() for a, b, c, d in rows]


def _stages(forecast: Forecast) -> list[str]:
    """A line a place of the pipeline: its layers, how many micro-batches are open at once, and what it holds."""
    plan = forecast.plan
    if plan is None:
        return []
    lines = ["", "rank  layers, and micro-batches in flight"]
    for place, memory in enumerate(forecast.memories):
        layers = ", ".join(
            f"{own.start}-{own.stop - 1}" for stage in plan.schedule.stages_of(place) if (own := plan.layers[stage])
        )
        lines.append(
            f"{memory.rank:>4}  {layers}; {in_flight(forecast, place)}; {byte_count(memory.most)} at most, "
            f"{byte_count(memory.peaks['activations'])} of activations"
        )
    return lines


def in_flight(forecast: Forecast, place: int) -> int:
    """Counts the micro-batches that a place of the pipeline holds between forward and backward, at most."""
    assert forecast.plan is not None
    now = most = 0
    stages = len(forecast.plan.schedule.stages_of(place))
    for action in forecast.plan.schedule.ranks[place]:
        now += {"F": 1, "B": -1, "I": -1}.get(action.kind, 0)
        most = max(most, now)
    return -(-most // stages)


def time_in_words(forecast: Forecast) -> list[str]:
    """Tells what a step takes, and of what."""
    seconds = forecast.seconds
    parts = {
        "products": seconds.products,
        "attention": seconds.attention,
        "elementwise": seconds.elementwise,
        "messages": seconds.messages,
        "offload": seconds.offload,
        "optimizer": seconds.optimizer,
        "bubble": seconds.bubble,
    }
    told = ", ".join(
        f"{name} {part / seconds.step:.0%}" for name, part in parts.items() if part / seconds.step >= 0.005
    )
    peak = "the products that it reaches" if forecast.device.measured else "its 16-bit peak"
    return [
        labelled("step", f"about {seconds.step:.3g} s: {told}"),
        labelled(
            "speed",
            f"about {seconds.tokens_per_second:,.0f} tokens a second and device, {seconds.mfu:.0%} of {peak}",
        ),
    ]


def told_of_fit(fit: Fit, config: TrainConfig) -> list[str]:
    """Tells what a search found: the best as overrides to paste, the runners-up, and what each option costs and saves."""
    if fit.best is None:
        closest = fit.closest
        if closest is None:
            return [f"none of {fit.tried} layouts can be: {fit.refused}"]
        return [
            f"nothing fits: of {fit.tried} layouts the closest is {' '.join(closest.words)}",
            labelled("memory", in_words(closest.forecast)),
        ]
    lines = [*told(fit.best), "", f"the fastest of {fit.tried} that fits; as overrides:", f"  {' '.join(fit.words)}"]
    if fit.others:
        lines += ["", "runners-up:"]
        lines += [f"  {_line(one.forecast)}  {' '.join(one.words)}" for one in fit.others]
    if fit.changes:
        lines += ["", "what each option costs and saves, by itself:"]
        for word, changed in fit.changes:
            lines.append(f"  {word:<38} {_difference(fit.best, changed)}")
    return lines


def _line(forecast: Forecast) -> str:
    return f"{forecast.seconds.step:8.3g} s {byte_count(forecast.room.needed):>9}"


def _difference(best: Forecast, changed: Forecast) -> str:
    seconds = changed.seconds.step / best.seconds.step - 1
    rows = [("", changed.room.needed - best.room.needed)]
    rows += [(f" of {FILES_OR_HOST[key]}", changed.worst.peaks[key] - best.worst.peaks[key]) for key in FILES_OR_HOST]
    said = [f"{'+' if size >= 0 else '-'}{byte_count(abs(size))}{what}" for what, size in rows if size or not what]
    return ", ".join([f"{seconds:+.1%} time", *said]) + ("" if changed.room.fits else ", does not fit")
