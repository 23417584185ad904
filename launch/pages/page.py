"""The page: its sections in order, and its style.

A section is a title, the fields of metrics.jsonl that it shows, and a function from the runs to blocks of HTML, none where
it has no data. To add one, write that function and an entry here. A field that no section names stands
in "Other measurements", before LAST.
"""

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from rowwise.launch.pages import (
    learning,
    log,
    lr_range,
    memory,
    others,
    sample,
    settings,
    sparse,
    speed,
    summary,
    timeline,
    watched,
)
from rowwise.launch.pages.markup import paragraph, text
from rowwise.launch.pages.records import Run
from rowwise.launch.pages.state import banner


class Section(NamedTuple):
    title: str
    fields: frozenset[str]
    show: Callable[[Sequence[Run]], list[str]]


SECTIONS = (
    Section("Damaged records", frozenset(), summary.damage),
    Section("Summary", summary.FIELDS, summary.show),
    Section("Learning-rate range test", lr_range.FIELDS, lr_range.show),
    Section("Learning", learning.FIELDS, learning.show),
    Section("Speed", speed.FIELDS, speed.show),
    Section("Spikes", watched.SPIKE_FIELDS, watched.spikes),
    Section("Profile", watched.FIELDS, watched.show),
    Section("Memory", memory.FIELDS, memory.show),
    Section("Pipeline timeline", timeline.FIELDS, timeline.show),
    Section("Sparsity", sparse.FIELDS, sparse.show),
)
LAST = (
    Section("Sample", sample.FIELDS, sample.show),
    Section("Log", log.FIELDS, log.show),
    Section("Configuration", settings.FIELDS, settings.show),
)

# A row becomes a block, with each cell behind the name of its column.
STACKED = """  TABLE, TABLE tbody, TABLE tr, TABLE tbody th, TABLE td { display: block; } TABLE thead { display: none; }
  TABLE tr { padding: 6px 0; border-bottom: 1px solid var(--line); }
  TABLE tbody th, TABLE td { border: 0; padding: 1px 0; max-width: none; overflow-wrap: anywhere; }
  TABLE tbody th { font-weight: 600; } TABLE td { display: flex; justify-content: space-between; gap: 1em; }
  TABLE td::before { content: attr(data-of); flex: 0 0 auto; max-width: 45%; color: var(--soft); text-align: left; }
  TABLE td span { min-width: 0; }
"""
STYLE = """
:root { color-scheme: light; --line: #d8d8d8; --soft: #555; }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 16px; max-width: 1320px; background: #fff; color: #1a1a1a;
  font: 16px/1.45 system-ui, sans-serif; font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; margin: 0 0 .5rem; } h2 { font-size: 1.15rem; margin: 2rem 0 .6rem; }
h3 { font-size: .9375rem; margin: 1rem 0 .2rem; }
.state { margin: 0 0 .5rem; padding: .35rem .7rem; border-left: 5px solid #888; background: #f4f4f4; }
.state.bad { border-color: #b3261e; background: #fdf0ef; } .state.halted { border-color: #b07800; background: #fdf7ea; }
.state.running { border-color: #0072b2; background: #eef6fb; } .state.complete { border-color: #00835f; }
.written { margin: 0 0 .5rem; font-size: .875rem; color: var(--soft); }
nav ul { display: flex; flex-wrap: wrap; gap: .2rem 1rem; margin: 0; padding: 0; list-style: none; }
a { color: #00548a; }
.grid { display: grid; gap: 16px; grid-template-columns: repeat(auto-fill, minmax(min(100%, 340px), 1fr)); }
figure { margin: 0; padding: 10px; border: 1px solid var(--line); border-radius: 6px; min-width: 0; }
.grid figure { display: flex; flex-direction: column; justify-content: space-between; max-width: 460px; }
figcaption { margin-bottom: 6px; font-size: .875rem; color: var(--soft); }
figcaption strong { display: block; font-size: 1rem; color: #1a1a1a; }
.grid figure > svg { width: 100%; height: auto; }
.run { display: block; } .key { display: inline-block; margin-right: .6em; } .swatch { margin-right: .35em; }
dl { display: grid; gap: 0 24px; grid-template-columns: repeat(auto-fit, minmax(min(100%, 340px), 1fr)); margin: 0; }
dl div { display: flex; gap: 1em; padding: 4px 0; border-bottom: 1px solid var(--line); }
dt { flex: 0 0 7.5em; color: var(--soft); } dd { margin: 0; min-width: 0; }
.scroll { overflow-x: auto; max-width: 100%; }
code, pre { font-family: ui-monospace, monospace; } code { font-size: .875em; }
.sample { white-space: pre-wrap; overflow-wrap: anywhere; padding: 10px; border: 1px solid var(--line); border-radius: 6px; }
table { border-collapse: collapse; font-size: .875rem; overflow-wrap: normal; }
th, td { padding: 4px 12px 4px 0; border-bottom: 1px solid var(--line); text-align: right; vertical-align: bottom; }
th:first-child { text-align: left; position: sticky; left: 0; background: #fff; max-width: 22em; overflow-wrap: anywhere; }
td { overflow-wrap: break-word; max-width: 22em; } thead th { font-weight: 500; }
tbody th { font-weight: 400; } thead th { color: var(--soft); min-width: 5em; }
pre { margin: 0; font-size: .8125rem; line-height: 1.35; overflow-wrap: normal; }
summary { cursor: pointer; padding: 4px 0; }
@media print { body { max-width: none; font-size: 11pt; } nav { display: none; } figure, tr { break-inside: avoid; }
  .scroll { overflow: visible; } h2, h3 { break-after: avoid; } }
"""
STYLE += f"@media (max-width: 640px) {{\n{STACKED.replace('TABLE', 'table')}}}\n"
STYLE += f"@media (max-width: 1100px) {{\n{STACKED.replace('TABLE', 'table.broad')}}}\n"


def page(runs: Sequence[Run], reload_seconds: int | None = None) -> str:
    """Returns the runs in one HTML file, which needs nothing else. With `reload_seconds` it reloads itself that often, and says when
    it was written; without, it is the same whenever it is written."""
    shown = frozenset().union(*(section.fields for section in SECTIONS))
    rest = Section("Other measurements", frozenset(), lambda runs: others.show(runs, shown))
    blocks = [(section.title, _blocks(section, runs)) for section in (*SECTIONS, rest, *LAST)]
    there = [(title, found) for title, found in blocks if found]
    name = text(", ".join(run.label for run in runs))
    links = "".join(f'<li><a href="#{_anchor(title)}">{title}</a></li>' for title, _ in there)
    body = "".join(
        f'<section aria-labelledby="{_anchor(title)}"><h2 id="{_anchor(title)}">{title}</h2>{"".join(found)}</section>\n'
        for title, found in there
    )
    reload, written = "", ""
    if reload_seconds is not None:
        reload = f'<meta http-equiv="refresh" content="{reload_seconds}">'
        written = f'<p class="written">Written at {time.strftime("%H:%M:%S")}; this page reloads itself while the run goes on.</p>'
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">{reload}'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{name}</title><style>{STYLE}</style></head>\n"
        f'<body><header><h1>{name}</h1>{banner(runs)}{written}<nav aria-label="Sections"><ul>{links}</ul></nav></header>\n'
        f"<main>{body}</main></body></html>\n"
    )


def _blocks(section: Section, runs: Sequence[Run]) -> list[str]:
    """What is in the files of a run, whoever wrote into them, costs at most its section, not the page."""
    try:
        return [block for block in section.show(runs) if block]
    except Exception as error:
        said = str(error) if isinstance(error, ValueError) else f"{type(error).__name__} ({error})"
        return [paragraph(f"This section cannot be shown: {said}")]


def _anchor(title: str) -> str:
    return title.lower().replace(" ", "-")
