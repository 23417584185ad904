"""`python -m rowwise.launch.report`: what a page shows of real runs and of odd ones, and how a browser lays it out."""

import html
import json
import math
import os
import re
import shutil
import socket
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock
from matplotlib.figure import Figure

from parity import small_config, with_layout
from rowwise.launch.outcome import Outcome, write_outcome
from rowwise.launch.pages.markup import rate, short, size
from rowwise.launch.pages.memory import foretold
from rowwise.launch.pages.page import SECTIONS
from rowwise.launch.pages.page import page as make_page
from rowwise.launch.pages.records import POINTS, Curve, leaves, read_fields, read_run, smooth, stretches, thin
from rowwise.launch.report import main
from rowwise.trainer.metrics import read_metrics
from rowwise.trainer.starts import Sample, Start, keep_sample, keep_start
from runs import named, run_watched

EVERY_PAGE = ["Summary", "Learning", "Speed", "Memory", "Configuration"]
VOID = {"meta", "br", "wbr", "line", "path", "use", "rect"}


class Page(HTMLParser):
    """A page, taken apart; raises AssertionError where its tags do not close each other."""

    def __init__(self, source: str):
        super().__init__()
        self.source, self.open, self.texts = source, [], []
        self.attributes: list[tuple[str, dict[str, str | None]]] = []
        self.headings: dict[str, list[str]] = {}
        self.cells: list[list[str]] = []
        self.feed(source)
        assert not self.open, f"{self.open} are not closed"

    def handle_starttag(self, tag, attributes):
        self.attributes.append((tag, dict(attributes)))
        if tag in ("tr", "dt"):
            self.cells.append([])
        if tag in ("td", "th", "dt", "dd"):
            self.cells[-1].append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.attributes.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> closes another"

    def handle_data(self, data):
        if "style" in self.open:
            return
        self.texts.append(data)
        for kind in ("h1", "h2", "h3", "strong"):
            if kind in self.open:
                self.headings.setdefault(kind, []).append(data)
        if {"td", "th", "dt", "dd"} & set(self.open):
            self.cells[-1][-1] += data

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())

    def row(self, name: str) -> list[str]:
        """The cells behind the first one of that name."""
        return next(row[row.index(name) + 1 :] for row in self.cells if name in row)

    @property
    def state(self) -> str:
        """What stands on top."""
        found = re.search('<p class="state.*?">(.*?)(<br>|</p>)', self.source)
        return html.unescape(re.sub("<.*?>", "", found[1])) if found else ""

    def labels(self) -> list[str]:
        return [str(attributes.get("aria-label")) for tag, attributes in self.attributes if tag == "svg"]


def write_page(*words: str, to: Path) -> Page:
    assert main([*words, f"to={to}"]) == 0
    return checked(to)


def checked(path: Path) -> Page:
    """The page in `path`, which is well formed, reaches for nothing, and whose pictures have their ids for themselves."""
    source = path.read_text()
    page = Page(source)
    assert not re.search(r"https?:|<script|<link|@import|\bsrc=", re.sub(r' xmlns(:\w+)?="[^"]*"', "", source))
    ids = [attributes["id"] for _, attributes in page.attributes if "id" in attributes]
    assert len(ids) == len(set(ids)) > (10 if "<svg" in source else 0)
    used = re.findall(r'url\(#([^)]+)\)|href="#([^"]+)"|aria-labelledby="([^"]+)"', source)
    assert {name for names in used for name in names if name} <= set(ids)
    for picture in re.findall(r"<svg .*?</svg>", source, re.DOTALL):
        own = set(re.findall(r' id="([^"]+)"', picture))
        assert {a or b for a, b in re.findall(r'url\(#([^)]+)\)|href="#([^"]+)"', picture)} <= own
        assert "aria-hidden" in picture or ('role="img"' in picture and "aria-label=" in picture)
    return page


# What a picture is without its drawing: room, and ids of its own.
UNDRAWN = (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 370 230"><defs>'
    + "".join(f'<clipPath id="part-{n}"/>' for n in range(11))
    + "</defs></svg>"
)


@pytest.fixture
def undrawn(monkeypatch):
    """Pictures are painted and not drawn, which is most of what a page takes: of tests that read its words."""
    monkeypatch.setattr(Figure, "savefig", lambda panel, file, format: file.write(UNDRAWN))


def write_run(folder: Path, records: list[dict], config: str = "name: made\nsteps: 100\n") -> Path:
    """A run as files."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(config)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def record(step: int, **more) -> dict:
    return {"step": step, "loss": 5 - step / 100, "grad_norm": 1.0, "lr": 0.01, "tokens": 10 * step,
            "tokens_per_second": 100.0, "mfu": None, "step_seconds": 2.0, "data_seconds": 0.5,
            "peak_memory_bytes": 3 * 2**20, **more}  # fmt: skip


@pytest.fixture(scope="module")
def folder(ranks, tmp_path_factory):
    """Three runs that were trained: `dense` and evaluated, `sparse`, and a traced pipeline on two ranks, `piped`."""
    folder = tmp_path_factory.mktemp("reported-runs")
    eval_ = ("steps=6", "eval.every=2", "eval.batches=2")
    base = small_config(folder, *eval_)
    ranks.run(run_watched, 1, with_layout(named(base, folder, "dense"), 1))
    sparse = small_config(folder, *eval_, "sparsity=rigl", "sparsity.update_every=2", "sparsity.density=0.3")
    ranks.run(run_watched, 1, with_layout(named(sparse, folder, "sparse"), 1))
    many = named(small_config(folder, *eval_, "batch.micro_size=2"), folder, "piped")
    piped = with_layout(many, 2, pipeline=2, pipeline_schedule="zb_h1", pipeline_trace=3)
    ranks.run(run_watched, 2, piped)
    return folder


def test_a_dense_run(folder):
    assert main([f"run={folder}/dense"]) == 0
    page, records = checked(folder / "dense" / "report.html"), read_metrics(folder / "dense")
    assert page.headings["h1"] == ["dense"]
    assert page.headings["h2"] == [*EVERY_PAGE[:-1], "Log", "Configuration"]
    assert page.row("step") == ["6 of 6"] and page.state == "complete"
    for name, field in (("loss", "loss"), ("held-out loss", "eval_loss")):
        assert page.row(name) == [f"{records[-1][field]:.3f} nats per token"]
    assert page.row("peak memory") == [f"{size(records[-1]['peak_memory_bytes'])} on rank 0"]
    assert "per worker" in page.row("speed")[0]
    assert page.row("started")[0].endswith(f"{socket.gethostname()}, 1 x cpu") and "torch 2" in page.row("versions")[0]
    assert page.row("tokens") == [f"{records[-1]['tokens'] / 1000:.3g}k"]
    assert page.row("layout") == ["1 worker, ZeRO 1"]
    for title in (
        "Training loss",
        "Held-out loss",
        "Learning rate",
        "Gradient norm",
        "Throughput",
        "Peak memory",
        "Memory by category",
    ):
        assert title in page.headings["strong"]
    for absent in ("Model FLOPs utilization", "Loss scale of fp16"):
        assert absent not in page.headings["strong"]
    assert "batch:\n  global_size: 24" in page.source


def test_a_sparse_run(folder, tmp_path):
    page = write_page(f"run={folder}/sparse", to=tmp_path / "page.html")
    last = [r for r in read_metrics(folder / "sparse") if "density_by_layer" in r][-1]
    assert page.headings["h2"] == [*EVERY_PAGE[:-1], "Sparsity", "Log", "Configuration"]
    assert page.row("sparsity") == ["rigl, density 0.3"]
    by_layer, step = last["density_by_layer"], last["step"]
    low, high = (choose(by_layer, key=by_layer.__getitem__) for choose in (min, max))
    assert (
        f"at step {step}: from {100 * by_layer[low]:.3g} % ({low}) to {100 * by_layer[high]:.3g} % ({high})"
        in page.text
    )
    assert f"{100 * last['flops_of_dense']:.3g} % at step {step}" in page.text
    for title in (
        "Density",
        "Dead neurons",
        "Overlap with the first mask",
        "Mask replaced",
        "Operations against dense",
    ):
        assert title in page.headings["strong"]


def test_a_traced_pipeline(folder, tmp_path):
    page = write_page(f"run={folder}/piped", to=tmp_path / "page.html")
    assert page.headings["h2"] == [*EVERY_PAGE[:-1], "Pipeline timeline", "Log", "Configuration"]
    assert page.row("layout") == ["2 workers, pipeline 2 (zb_h1), ZeRO 1"]
    assert "piped, step 3" in page.headings["strong"]
    assert all(name in page.texts for name in ("predicted", "measured", "time (seconds)"))
    assert "measured: 2 ranks, 2 stages, 12 micro-batches" in page.text
    shutil.copytree(folder / "piped", tmp_path / "piped")
    (tmp_path / "piped/pipeline/trace.json").write_text("{")
    page = write_page(f"run={tmp_path}/piped", to=tmp_path / "page.html")
    assert "This section cannot be shown: " in page.text and "is no timeline" in page.text
    assert "Configuration" in page.headings["h2"]


@pytest.mark.slow
def test_runs_side_by_side(folder, tmp_path):
    runs = [f"{folder}/{name}" for name in ("dense", "sparse", "piped")]
    page = write_page(*(f"run={run}" for run in runs), to=tmp_path / "page.html")
    assert page.headings["h2"] == [*EVERY_PAGE[:-1], "Pipeline timeline", "Sparsity", "Log", "Configuration"]
    assert page.row("run") == ["dense", "sparse", "piped"] and page.row("state") == ["complete"] * 3
    assert all(cell.count(".") == 1 for cell in page.row("loss (nats per token)"))
    assert page.row("parallel.pipeline") == ["1", "1", "2"]
    assert page.row("sparsity.density") == ["-", "0.3", "-"]
    assert not {"name", "run_dir", "seed", "optim.lr"} & {row[0] for row in page.cells}
    loss = next(label for label in page.labels() if label.startswith("Training loss"))
    assert [name in loss for name in ("dense", "sparse", "piped")] == [True] * 3
    titles = page.headings["strong"]
    assert len(titles) == len(set(titles)), "no two cards bear the same title"
    assert {"Time of a step: dense", "Memory by category: piped", "Density by matrix: sparse"} <= set(titles)
    assert page.source.count("<details>") == 6
    same = write_page(f"run={','.join(runs)}", to=tmp_path / "same.html")
    assert same.source == page.source, "a page depends on nothing but its runs"
    globbed = write_page(f"run={folder}/*", to=tmp_path / "all.html")  # a corpus lies there too
    assert globbed.headings["h1"] == ["dense, piped, sparse"]


def test_where_the_time_goes(tmp_path, undrawn):
    """The whole of a step is step_seconds, evaluation and save; older runs have no evaluation and save."""
    records = [record(1), record(2), record(3, eval_seconds=3.0), record(4, eval_seconds=0.5, save_seconds=0.5)]
    run = write_run(tmp_path / "run", records)
    page = write_page(f"run={run}", to=tmp_path / "page.html")
    assert page.row("time in steps") == ["12 s"]
    row = next(cells for cells in page.cells if cells[0] == "run" and len(cells) == 7)
    found = dict(zip(row[1:], page.cells[page.cells.index(row) + 1][1:], strict=True))
    assert found == {
        "all steps": "12 s", "a step": "3 s", "compute and communication": "1.5 s, 50 %", "data": "500 ms, 16.7 %",
        "evaluation": "875 ms, 29.2 %", "save": "125 ms, 4.17 %",
    }  # fmt: skip


MEMORY = {
    "device": "cuda",
    "ranks": [
        {"parameters": 2**30, "gradients": 2**29, "optimizer": 2**31, "masks": 2**20, "peak": 2**32},
        {"parameters": 2**30, "gradients": 2**29, "optimizer": 2**31, "masks": 0, "peak": 2**32 + 2**30},
    ],
}


def test_memory_by_category(tmp_path, undrawn):
    run = write_run(tmp_path / "run", [record(1)])
    (run / "memory.json").write_text(json.dumps(MEMORY))
    page = write_page(f"run={run}", to=tmp_path / "page.html")
    assert page.row("rank 0") == ["1 GiB", "512 MiB", "2 GiB", "1 MiB", "-", "511 MiB", "4 GiB"]
    assert "activations and the rest 1.5 GiB" in page.text, "of the largest rank"
    cpu = {"parameters": 8 * 2**20, "gradients": 8 * 2**20, "optimizer": 8 * 2**20, "masks": 0, "peak": 697 * 2**20}
    (run / "memory.json").write_text(
        json.dumps({"device": "cpu", "ranks": [cpu], "predicted": None})
    )  # of an earlier release
    page = write_page(f"run={run}", to=tmp_path / "page.html")
    assert page.row("rank 0") == ["8 MiB", "8 MiB", "8 MiB", "0 B", "-", "673 MiB", "697 MiB"]
    assert "activations and the rest 673 MiB" in page.text and "predicted" not in page.text
    for broken in ("{", "[]", '{"ranks": []}', '{"ranks": 3}'):
        (run / "memory.json").write_text(broken)
        page = write_page(f"run={run}", to=tmp_path / "page.html")
        assert "This section cannot be shown: " in page.text and page.headings["h2"] == EVERY_PAGE


def test_what_was_predicted_stands_beside_what_was_measured(tmp_path, undrawn):
    """By rank and category; a GPU measured its total alone, and what was not predicted is no table."""
    run = read_run(write_run(tmp_path / "run", [record(1)]), 0, "run")
    predicted = {"parameters": 2**20, "masks": 0, "activations": 3 * 2**20, "total": 4 * 2**20}
    first = {"predicted": predicted, "measured": {"parameters": 2**20, "activations": 2**21, "total": 3 * 2**20}}
    second = {"predicted": {**predicted, "masks": 2**10}, "measured": {}, "peak": 2**22 + 2**20}
    table = Page(foretold(run, {"ranks": [first, {"predicted": {}}, second]}) or "")
    assert table.cells == [
        ["", "parameters", "masks", "activations", "total"],
        ["rank 0, predicted", "1 MiB", "0 B", "3 MiB", "4 MiB"],
        ["rank 0, measured", "1 MiB", "-", "2 MiB", "3 MiB"],
        ["rank 2, predicted", "1 MiB", "1 KiB", "3 MiB", "4 MiB"],
        ["rank 2, measured", "-", "-", "-", "5 MiB"],
    ]
    assert "predicted and measured" in table.text
    assert "masks" not in (foretold(run, {"ranks": [first]}) or "masks"), "a category that nothing is of"
    for told in (None, {}, 3, {"parameters": "x"}):
        assert foretold(run, {"ranks": [{**first, "predicted": told}]}) is None
    (tmp_path / "run" / "memory.json").write_text(json.dumps({**MEMORY, "ranks": [MEMORY["ranks"][0] | first]}))
    page = write_page(f"run={tmp_path / 'run'}", to=tmp_path / "page.html")
    assert page.row("rank 0, predicted") == ["1 MiB", "3 MiB", "4 MiB"]


def test_nothing_recorded_is_invisible(tmp_path):
    def more(step):
        return {"router_z": 2.0**-step, "load": {"block 1": 0.25, "block 2": 0.75}, "word": "text", "gone": None,
                "counts": [[step, 2], [3, 40]], "many": list(range(20))}  # fmt: skip

    run = write_run(tmp_path / "run", [record(step, **more(step)) for step in range(1, 13)])
    page = write_page(f"run={run}", to=tmp_path / "page.html")
    assert page.headings["h2"] == [*EVERY_PAGE[:-1], "Other measurements", "Configuration"]
    assert {"router_z", "load", "counts", "many"} <= set(page.headings["strong"])
    assert not {"word", "gone", "mfu"} & set(page.headings["strong"])
    for told in (
        "0.000244 at step 12",
        "block 2 0.75",
        "0.0 12",
        "1.1 40",
        "20 entries at step 12: mean 9.5, from 0 to 19",
    ):
        assert told in page.text
    claimed = [name for section in SECTIONS for name in section.fields]
    assert len(claimed) == len(set(claimed)), "each field has one place"


def test_what_the_launcher_says_of_the_end(tmp_path, undrawn):
    run = write_run(tmp_path / "run", [record(step) for step in range(1, 9)])
    for outcome, told in (
        (None, "killed: it left no word after step 8; nothing was saved"),
        ({"state": "stopped", "reason": "SIGTERM", "step": 8}, "stopped at step 8: SIGTERM"),
        ({"state": "failed", "reason": None, "step": 5}, "failed at step 5; the records reach step 8"),
        ({"state": "complete", "reason": None, "step": 8}, "complete"),
    ):
        if outcome:
            (run / "outcome.json").write_text(json.dumps(outcome))
        assert write_page(f"run={run}", to=tmp_path / "page.html").state == told


def test_a_run_that_failed_before_its_first_step_says_why(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    write_outcome(run, Outcome("failed", "out of memory: 3 GiB", 0))
    page = write_page(f"run={run}", to=tmp_path / "page.html")
    assert page.state == "failed before the first step: out of memory: 3 GiB"
    assert "cannot be shown" not in page.text and "None" not in page.text and page.row("folder") == [str(run)]


def test_a_run_under_way_says_how_long_it_takes_yet(tmp_path, undrawn):
    run = write_run(tmp_path / "run", [record(step) for step in range(1, 41)])
    with FileLock(run / ".lock"):
        page = write_page(f"run={run}", to=tmp_path / "page.html")
        assert page.state == "running: step 40 of 100, about 2:00 left"
        for name in ("metrics.jsonl", ".lock"):
            os.utime(run / name, (0, 0))
        page = write_page(f"run={run}", to=tmp_path / "page.html")
        assert re.fullmatch("silent: step 40 of 100, .* left: no sign of life for [0-9]+ days", page.state)


START = Start(0, 2, "cpu", 1234, "rowwise train 'a=<b>'", "2026-11-26T08:09:10+01:00", "host", {"torch": "2.13"})


def test_where_a_run_was_resumed_is_marked(tmp_path):
    run = write_run(tmp_path / "run", [record(step) for step in range(1, 41)])
    plain = write_page(f"run={run}", to=tmp_path / "page.html")
    assert "dotted line" not in plain.text and ["command"] not in [cells[:1] for cells in plain.cells]
    for step in (0, 10, 30, 30, 40):
        keep_start(run, replace(START, step=step))
    (run / "starts.jsonl").open("a").write('{"step": 5}\nno start\n')
    keep_sample(run, Sample(40, "def <", "def <x>:\n  pass"))
    page = write_page(f"run={run}", to=tmp_path / "page.html")
    assert "Resumed: run after step 10 and 30 (a dotted line" in page.text
    marked = [picture for picture in re.findall("<svg .*?</svg>", page.source, re.DOTALL) if "resumed-0-" in picture]
    assert len(marked) == 6 and all(picture.count("-resumed-0-") == 2 for picture in marked)
    assert page.row("command") == [START.command] and page.row("versions") == ["torch 2.13"]
    assert page.row("started") == ["2026-11-26 08:09 on host, 2 x cpu"]
    assert page.row("model")[0].endswith("1.23k parameters")
    assert '<pre class="sample"><b>def &lt;</b>x&gt;:\n  pass</pre>' in page.source


def test_no_password_is_on_a_page(tmp_path, undrawn):
    config = "name: made\nsteps: 100\ntracker:\n  name: mlflow\n  uri: postgresql://me:hunter2@host/\n"
    run = write_run(tmp_path / "run", [record(1)], config)
    keep_start(run, replace(START, command="rowwise train tracker.uri=postgresql://me:hunter2@host/"))
    assert "hunter2" not in (run / "starts.jsonl").read_text()
    (run / "starts.jsonl").write_text((run / "starts.jsonl").read_text().replace("***", "hunter2"))  # of before
    page = write_page(f"run={run}", to=tmp_path / "page.html")
    assert "hunter2" not in page.source and page.source.count("//me:***@host/") == 3


def test_what_a_run_said_last_is_on_its_page(tmp_path, undrawn):
    run = write_run(tmp_path / "run", [record(1)])
    (run / "train.log").write_text("".join(f"line {n} <b>\n" for n in range(20_000)))
    (run / "log").mkdir()
    (run / "log/rank-1.log").write_text("only this, without an end")
    (run / "log/rank-2.log").touch()
    write_outcome(run, Outcome("complete", None, 1))
    assert write_page(f"run={run}", to=tmp_path / "page.html").source.count("<details>") == 3
    write_outcome(run, Outcome("failed", "no", 1))
    page = write_page(f"run={run}", to=tmp_path / "page.html")
    assert page.source.count("<details open>") == 2 and "Log" in page.headings["h2"]
    shown = next(text for text in page.texts if "line 19999 <b>" in text).split("\n")
    assert shown == [f"line {n} <b>" for n in range(19_960, 20_000)]
    assert "only this, without an end" in page.texts and "rank-2" not in page.text


@pytest.mark.parametrize(("number", "told"), [(3e-4, "3e-4"), (0.00031622776601683794, "3.16e-4"), (1e-5, "1e-5"),
                                              (0.01, "0.01"), (0.0015, "1.5e-3"), (0, "0")])  # fmt: skip
def test_a_rate_is_written_as_people_write_it(number, told):
    assert rate(number) == told


def test_settings_that_differ_look_different(tmp_path, undrawn):
    rates = {"a": 0.001, "b": 0.0010004, "c": 0.00031622776601683794}
    runs = [write_run(tmp_path / name, [record(1)], f"optim: {{lr: {lr}}}\n") for name, lr in rates.items()]
    page = write_page(*(f"run={run}" for run in runs), to=tmp_path / "page.html")
    assert page.row("optim.lr") == ["1e-3", "1.0004e-3", "3.16228e-4"]
    many = [write_run(tmp_path / f"many-{n}", [record(1)], f"seed: {n}\n") for n in range(9)]
    page = write_page(*(f"run={run}" for run in many), to=tmp_path / "page.html")
    assert [row[-1] for row in page.cells if row[0].startswith("many-")][:9] == [str(n) for n in range(9)], "rows"
    assert '<table class="broad">' in page.source


@pytest.mark.parametrize(("number", "told"), [(12, "12"), (3.14159, "3.14"), (123_456, "123k"), (2e6, "2M"), (1e-5, "1e-5"),
                                              (0.00024414, "0.000244"), (-0.5, "-0.5"), (1e20, "1e20"), (0, "0")])  # fmt: skip
def test_three_digits_are_enough(number, told):
    assert short(number) == told


@pytest.mark.parametrize("n", [1, 2, 150])
def test_a_run_without_a_single_loss(n, tmp_path, undrawn):
    nulls = {"loss": None, "grad_norm": None, "loss_scale": 2.0, "skipped_steps": 1}
    run = write_run(tmp_path / "run", [record(step, **nulls) for step in range(1, n + 1)])
    page = write_page(f"run={run}", to=tmp_path / "page.html")
    assert f"no step has a loss yet; all {n} overflowed" in page.text
    assert {"Loss scale of fp16", "Steps passed over"} <= set(page.headings["strong"])
    assert "Training loss" not in page.headings["strong"] and "loss" not in {row[0] for row in page.cells}


def test_a_run_under_way_and_without_configuration(tmp_path, undrawn):
    run = write_run(tmp_path / "run", [record(1)], config="")
    (run / "config.yaml").unlink()
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "loss": 4.')
    page = write_page(f"run={run}", to=tmp_path / "page.html")
    assert page.row("step") == ["1 of ?"] and "Configuration" not in page.headings["h2"]


def test_what_comes_from_a_run_is_text(tmp_path):
    evil = "<script>alert('$x_$')</script>&\""
    run = write_run(
        tmp_path / "a <b> $c$ & d", [record(1, **{evil: {evil: 1.0}, "<i>": 2.0})], f"name: {json.dumps(evil)}\n"
    )
    other = write_run(tmp_path / "other", [record(1)], "name: x\n")
    (run / "outcome.json").write_text(json.dumps({"state": evil, "reason": evil, "step": 1}))
    for words in ([f"run={run}"], [f"run={run}", f"run={other}"]):
        page = write_page(*words, to=tmp_path / "page.html")
        assert any(evil in title for title in page.headings["strong"]) and "<i>" in page.headings["strong"]
        assert "a <b> $c$ & d" in page.headings["h1"][0]


def test_thinning_keeps_extremes_and_gaps():
    rng = np.random.default_rng(0)
    for length in (1, POINTS, POINTS + 1, 54_321):
        values = rng.standard_normal(length)
        low, high = rng.integers(length, size=2)
        values[low], values[high] = -100, 100
        curve = Curve(np.arange(length), values)
        thinned = thin(curve)
        assert len(thinned.steps) <= POINTS and (np.diff(thinned.steps) > 0).all()
        assert thinned.values.min() == values.min() and thinned.values.max() == values.max()
        assert (values[thinned.steps] == thinned.values).all()
    values[20_000:30_000] = np.nan
    thinned = thin(Curve(np.arange(length), values))
    inside = (thinned.steps > 20_200) & (thinned.steps < 29_800)
    assert np.isnan(thinned.values[inside]).all() and inside.any() and np.isfinite(thinned.values[~inside]).sum() > 700


def test_smoothing_is_a_mean_around_each_record():
    rng = np.random.default_rng(0)
    values = rng.standard_normal(500)
    values[[7, 8, 300]] = np.nan
    smoothed = smooth(Curve(np.arange(500), values)).values
    for i in range(500):
        window = values[max(0, i - 5) : i + 6]
        np.testing.assert_allclose(smoothed[i], np.nan if np.isnan(values[i]) else np.nanmean(window), atol=1e-12)


def test_stretches_hold_every_step_once():
    steps = np.arange(5, 328)
    edges, (means,) = stretches(steps, [steps.astype(float)], most=80)
    assert edges[0] == 4.5 and edges[-1] == 327.5 and len(edges) == 81
    np.testing.assert_allclose(means, (edges[:-1] + edges[1:]) / 2)


def test_numbers_in_tables_have_a_path():
    assert dict(leaves({"a": [1, 2.5], "b": {"c": True, "d": "word", "e": None}})) == {"a.0": 1, "a.1": 2.5, "b.c": 1}


def test_a_long_run_makes_a_small_page(tmp_path):
    run = write_run(tmp_path / "run", [record(s, by={"a": s, "b": 1}) for s in range(1, 6_001)])
    _, tables, _ = read_fields(run / "metrics.jsonl")
    kept = [step for step, _ in tables["by"].kept]
    assert POINTS / 2 <= len(kept) <= POINTS and len(set(np.diff(kept))) == 1 and kept[-1] > 5_900
    page = write_page(f"run={run}", to=tmp_path / "page.html")
    assert len(page.source) < 400_000


def test_what_strangers_wrote_into_a_run_costs_no_page(tmp_path, capsys):
    """Half lines, strings, numbers that are too large, trees that are too deep, files of other kinds."""
    deep = 1.0
    for _ in range(200):
        deep = {"a": [deep]}
    strange = [
        record(1),
        record(2, loss="x", lr=10**400, by={"a": 10**400, "b": 2}),
        record(3, step_seconds=[], deep=deep),
    ]
    run = write_run(tmp_path / "run", strange, "steps: many\nbatch: [1]\nname: {}\nmodel: 7\n")
    (run / "metrics.jsonl").open("a").write('{"step": 4, "lo\n{"step": 2}\n[1]\n{"step": "5"}\n' + "[" * 100_000 + "\n")
    for name, content in {
        "outcome.json": "[]",
        "memory.json": '{"ranks": [{"peak": "x"}]}',
        "pipeline/trace.json": "{",
    }.items():
        (run / name).parent.mkdir(exist_ok=True)
        (run / name).write_text(content)
    page = write_page(f"run={run}", f"run={write_run(tmp_path / 'good', [record(1)])}", to=tmp_path / "page.html")
    assert "run: metrics.jsonl has no record of a later step in line 4 to 8, which is passed over." in page.text
    lost = write_run(tmp_path / "lost", [])
    (lost / "metrics.jsonl").write_text("{}\n")
    write_page(f"run={run},{lost}", to=tmp_path / "other.html")
    assert f"left out: run={lost}: the run has no records yet" in capsys.readouterr().out


# Of 2^64 numbers: each line is the one before twice.
DOUBLED = "k0: &k0 [1, 1]\n" + "".join(f"k{n}: &k{n} [*k{n - 1}, *k{n - 1}]\n" for n in range(1, 64))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "run= is missing; give run=runs/NAME"),
        (["run="], "run=: give run=VALUE"),
        (["runs=good"], "unknown key runs: .*; did you mean run?"),
        (["run=good", "to=a.html", "to=b.html"], "to=b.html: give to=VALUE, once"),
        (["run=good", "run=good"], "good is given twice; give each run once"),
        (["run=good", "run=other/../good"], "good is given twice"),
        (["run=good,g*"], "good is given twice"),
        (["run=nowhere"], "run=nowhere: there is no run; give a folder that"),
        (["run=none*"], r"run=none\*: no run with records matches"),
        (["run=fresh"], "run=fresh: the run has no records yet; wait for its first step"),
        (["run=cut"], "run=cut: the run has no records yet"),
        (["run=broken"], "run=broken: the run has no records yet; .*; none is in line 1 of broken/metrics.jsonl"),
        (["run=cut,broken"], "run=cut: the run has no records yet; .*; run=broken: the run has no records yet"),
        (["run=good,nowhere"], "run=nowhere: there is no run; give a folder that"),
        (["run=unset"], "unset/config.yaml is no configuration"),
        (["run=endless"], "endless/config.yaml is no configuration"),
        (["run=good", "to=missing/page.html"], "to=missing/page.html: the folder missing does not exist; make it"),
        (["run=good", "to=page.pdf"], "to=page.pdf: the page is a file; give a name that ends in .html"),
    ],
)
def test_refusals_are_one_line_and_nothing_is_written(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    files = {
        "good": ["{}"],
        "broken": ["nonsense"],
        "unset": ["{}"],
        "endless": ["{}"],
        "cut": [],
        "other": [],
    }
    for name, lines in files.items():
        run = write_run(tmp_path / name, [], {"unset": "a: [", "endless": DOUBLED}.get(name, "steps: 3\n"))
        text = "".join(json.dumps(record(1)) + "\n" if line == "{}" else line + "\n" for line in lines)
        (run / "metrics.jsonl").write_text(text or '{"step": 1, "lo')
    (tmp_path / "fresh").mkdir()
    (tmp_path / "fresh" / "config.yaml").write_text("steps: 3\n")
    before = sorted(tmp_path.rglob("*"))
    assert main(words) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and re.fullmatch(rf"refused: .*{message}.*\n", captured.err), captured.err
    assert sorted(tmp_path.rglob("*")) == before


def test_a_page_takes_no_torch_and_a_refusal_no_matplotlib():
    program = (
        "import rowwise.launch.report, sys; print('matplotlib' in sys.modules)\n"
        "import rowwise.launch.pages.page; print('torch' in sys.modules)"
    )
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout
    assert said.split() == ["False", "False"]


WIDTHS = (380, 500, 1280)
# Each page stands in a frame of the width of a screen, which a window cannot be made as narrow as.
MEASURE = """
<body><script>
onload = () => {
  document.body.innerText = JSON.stringify([...document.querySelectorAll("iframe")].map(frame => {
    const page = frame.contentDocument, root = page.documentElement;
    const box = piece => piece.getBoundingClientRect();
    const figures = [...page.querySelectorAll(".grid figure")];
    const text = [...page.querySelectorAll(".grid svg text")];
    const outside = text.filter(t => { const a = box(t), b = box(t.closest("svg"));
      return a.left < b.left - 2 || a.right > b.right + 2 || a.top < b.top - 2 || a.bottom > b.bottom + 2; });
    const wide = [...page.querySelectorAll("body *")].filter(e => box(e).right > root.clientWidth && !e.closest(".scroll"));
    const cut = [...page.querySelectorAll(".scroll")].filter(e => e.scrollWidth > e.clientWidth && e.querySelector("table"));
    return {frame: root.clientWidth, cut: cut.map(e => e.ariaLabel),
      wide: wide.map(e => e.outerHTML.slice(0, 200)), scroll: root.scrollWidth,
      columns: new Set(figures.map(f => Math.round(box(f).left))).size,
      widths: figures.map(f => box(f).width),
      letters: Math.min(...text.map(t => box(t).height)), texts: text.length, outside: outside.map(t => t.textContent)};
  }));
}
</script>FRAMES</body>
"""
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--dump-dom",
]  # fmt: skip


def lay_out(pages: list[str], folder: Path) -> list[dict]:
    """How chromium lays out each page at each of WIDTHS."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    assert browser, "there is no chromium to lay pages out: run `make chromium`, which installs it"
    frames = "".join(f'<iframe width={w} height=900 style="border: 0" srcdoc="{html.escape(page)}"></iframe>'
                     for page in pages for w in WIDTHS)  # fmt: skip
    (folder / "frames.html").write_text(MEASURE.replace("FRAMES", frames))
    command = [browser, *FLAGS, f"--user-data-dir={folder}/profile", f"file://{folder}/frames.html"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    found = re.search(r"<body>(.*)</body>", done.stdout, re.DOTALL)
    assert found, f"{command[0]} made no page: {done.stderr[-2000:]}"
    return json.loads(html.unescape(found[1]))


@pytest.mark.slow
def test_a_browser_lays_it_out(folder, tmp_path):
    """On a phone of 380 pixels one column and no scrolling sideways; on a large screen several columns; no table is cut;
    every letter can be read, and none leaves its picture. Also of a run that failed, and of one that is under way."""
    long = write_run(tmp_path / ("long-name-" * 12), [record(s, loss=math.exp(-s)) for s in range(1, 40)], "name: x\n")
    (long / "memory.json").write_text(json.dumps({**MEMORY, "ranks": MEMORY["ranks"] * 32}))
    failed = write_run(tmp_path / "failed", [record(s, loss=math.exp(s)) for s in range(1, 40)], "name: x\nsteps: 90\n")
    write_outcome(
        failed, Outcome("failed", f"not a number: step 40: the gradient norm is not a number; {'see/' * 40}", 39)
    )
    keep_start(failed, replace(START, command=f"rowwise train {'data.files=/a/long/path/to/some/corpus ' * 5}"))
    going = write_run(tmp_path / "going", [record(s) for s in range(1, 40)], "name: x\nsteps: 90\n")
    choices = [["dense"], ["sparse"], ["piped"], ["dense", "sparse", "piped"]]
    words = [[f"run={folder}/{name}" for name in names] for names in choices] + [[f"run={long}"]]
    pages = [write_page(*some, to=tmp_path / "page.html").source for some in (*words, [f"run={failed}"])]
    with FileLock(going / ".lock"):
        pages.append(make_page([read_run(going, 0, "going")], reload_seconds=3600))
    words += [["failed"], ["going"]]
    assert not any("cannot be shown" in page for page in pages)
    for i, found in enumerate(lay_out(pages, tmp_path)):
        width = WIDTHS[i % len(WIDTHS)]
        assert found["frame"] == width or found["frame"] >= width - 20, "a scroll bar takes the rest"
        assert found["scroll"] <= found["frame"] <= width, f"{words[i // len(WIDTHS)]} at {width}: {found['wide']}"
        assert not found["cut"], f"{words[i // len(WIDTHS)]} at {width}"
        assert (found["columns"] == 1) if width < 700 else (found["columns"] >= 2)
        assert min(found["widths"]) > 300
        assert found["texts"] > 40 and found["letters"] >= 9 and not found["outside"]
