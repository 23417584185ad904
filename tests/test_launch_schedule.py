"""`python -m rowwise.launch.schedule`: the table, the picture, the files; timelines as JSON."""

import json
import random
import re
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.image import imread

from rowwise.launch.schedule import main
from rowwise.parallel.pipeline_schedule.gantt import BUBBLE, COLORS, draw, lighten
from rowwise.parallel.pipeline_schedule.generate import GENERATORS, Shape, make_schedule
from rowwise.parallel.pipeline_schedule.order import Action, read_csv, write_csv
from rowwise.parallel.pipeline_schedule.simulate import Timeline, simulate, uniform_costs
from rowwise.parallel.pipeline_schedule.trace import align, read_trace, write_trace


def timeline_of(name: str, shape: Shape, seed: int = 0) -> Timeline:
    """Its stages take random times, so that no number is round."""
    rng = random.Random(seed)
    stages = shape.ranks * shape.chunks
    times = [tuple(rng.uniform(0.5, 2.0) for _ in range(stages)) for _ in range(3)]
    costs = replace(uniform_costs(stages), forward=times[0], input=times[1], weight=times[2])
    return simulate(make_schedule(name, shape), costs)


def test_the_table_says_what_a_schedule_holds_and_how_long_it_waits(capsys):
    assert main(["blockwise", "ranks=2", "chunks=2", "micro_batches=4", "unit=2", "gathering=run", "gather=1"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "blockwise: 2 ranks, 4 stages, 4 micro-batches",
        "rank  stages  activations   busy  gathers",
        "   0     0,2            6  88.9%        5",
        "   1     1,3            4  88.9%        5",
        "makespan 26",  # from the first start, for which the first gather is waited
        "synchronised:   a step of 27, bubble 11.1%",
        "unsynchronised: a step of 27, bubble 11.1%",
    ]


def test_busy_is_of_the_step_that_is_asked_for(capsys):
    for flag, busy in (("true", "88.9%"), ("false", "100.0%")):
        assert main(["zb_h2", "ranks=4", "micro_batches=8", f"synchronised={flag}"]) == 0
        out = capsys.readouterr().out
        assert out.count(busy) == 4
        assert "synchronised:   a step of 27, bubble 11.1%\nunsynchronised: a step of 24, bubble 0.0%" in out


def test_times_are_taken_for_every_stage(tmp_path, capsys):
    times = ["forward=1", "input=2", "weight=0.5", "send=0.25", "step=3"]
    assert main(["1f1b", "ranks=3", "micro_batches=6", *times, f"to={tmp_path / '1f1b.PNG'}"]) == 0
    assert imread(tmp_path / "1f1b.PNG", "png").ndim == 3
    schedule = make_schedule("1f1b", Shape(3, 1, 6))
    makespan = simulate(schedule, uniform_costs(3, 1.0, 2.0, 0.5, send=0.25)).makespan
    assert f"makespan {makespan:g}\nsynchronised:   a step of {makespan + 3:g}," in capsys.readouterr().out


@pytest.mark.parametrize("name", GENERATORS)
def test_what_it_writes_it_reads(name, tmp_path, capsys):
    path = tmp_path / "schedule.csv"
    assert main([name, "ranks=3", "micro_batches=7", f"csv={path}"]) == 0
    first = capsys.readouterr().out
    assert read_csv(path).ranks == make_schedule(name, Shape(3, GENERATORS[name].chunks[0], 7, 3)).ranks
    assert main([str(path)]) == 0
    assert capsys.readouterr().out == first.replace(name, str(path))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "nothing is no schedule: first comes one of gpipe, "),
        (["zbv"], "zbv is no schedule: first comes one of gpipe, .*; did you mean zb_v"),
        (["ranks=4", "micro_batches=8"], "ranks=4 is no schedule"),
        (["missing.csv"], "missing.csv: .*No such file"),
        (["zb_v", "rank=4"], "unknown key rank: possible are ranks, .*; did you mean ranks"),
        (["zb_v", "ranks=4"], "zb_v is made for ranks= and micro_batches="),
        (["zb_v", "ranks=4", "ranks=4"], "ranks=4: give ranks=VALUE, once"),
        (["zb_v", "ranks="], "ranks=: give ranks=VALUE, once"),
        (["zb_v", "ranks=0", "micro_batches=8"], "ranks=0: give a whole number of at least 1"),
        (["zb_v", "ranks=4", "micro_batches=8.5"], "micro_batches=8.5: give a whole number"),
        (["zb_v", "ranks=4", "micro_batches=3"], "needs at least 7 micro-batches a step and there are 3"),
        (["zb_v", "ranks=4", "micro_batches=8", "chunks=3"], "parallel.virtual_stages=3: possible is 2"),
        (["zb_v", "ranks=4", "micro_batches=8", "unit=4"], "unit=4: units are of blockwise; leave it out for zb_v"),
        (["zb_v", "ranks=4", "micro_batches=8", "send=-1"], "send=-1: give a time of at least 0"),
        (["zb_v", "ranks=4", "micro_batches=8", "send=nan"], "send=nan: give a time"),
        (["zb_v", "ranks=4", "micro_batches=8", "send=soon"], "send=soon: give a time"),
        (["1f1b", "ranks=4", "micro_batches=8", "forward=0", "input=0", "weight=0"], "one of them takes time"),
        (["zb_v", "ranks=4", "micro_batches=8", "gathering=all"], "gathering=all: possible are none, micro_batch, run"),
        (["zb_v", "ranks=4", "micro_batches=8", "gather=1"], "gather=1: with gathering=none nothing is gathered"),
        (["zb_v", "ranks=4", "micro_batches=8", "synchronised=yes"], "synchronised=yes: give true or false"),
        (["zb_v", "ranks=4", "micro_batches=8", "to=zb_v.jpg"], "zb_v.jpg: pictures are .png or .svg"),
        (
            ["zb_v", "ranks=4", "micro_batches=8", "to=no/such/zb_v.png"],
            "No such file or directory: 'no/such/zb_v.png'",
        ),
        (["run=nowhere"], "nowhere/pipeline/trace.json: No such file or directory"),
        (["run=nowhere", "ranks=4", "send=1"], "run=nowhere leaves no choice of ranks, send"),
    ],
)
def test_refusals_are_one_line_and_nothing_is_written(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("refused: ") and captured.err.count("\n") == 1
    assert re.search(message, captured.err)
    assert not list(tmp_path.iterdir())


def test_a_file_is_checked_and_says_its_own_shape(tmp_path, capsys):
    path = tmp_path / "schedule.csv"
    path.write_text("0F0,0B0,0F1,0B1\n1F0,1F1,1B0,1B1\n")
    assert main([str(path)]) == 2
    assert "the ranks wait for each other in a circle" in capsys.readouterr().err
    assert main([str(path), "ranks=2"]) == 2
    assert "leaves no choice of ranks" in capsys.readouterr().err


@pytest.fixture
def run(tmp_path) -> Path:
    """A run that measured what it did, and wrote its plan."""
    folder = tmp_path / "run" / "pipeline"
    folder.mkdir(parents=True)
    schedule = make_schedule("1f1b", Shape(2, 1, 4))
    costs = uniform_costs(2, held=1000.0, kept=10.0)
    write_csv(schedule, folder / "schedule.csv")
    (folder / "costs.json").write_text(json.dumps(asdict(costs)))
    write_trace(simulate(schedule, uniform_costs(2, forward=2.0)), folder / "trace.json")
    return folder.parent


def test_a_run_shows_what_was_predicted_and_what_was_measured(run, capsys):
    assert main([f"run={run}", f"to={run / 'measured.svg'}"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "predicted: 2 ranks, 2 stages, 4 micro-batches",
        "rank  stages  activations   busy  gathers",
        "   0       0         2000  80.0%        0",
        "   1       1         1000  80.0%        0",
        "makespan 15",
        "synchronised:   a step of 15, bubble 20.0%",
        "unsynchronised: a step of 15, bubble 20.0%",
        "",
        "measured: 2 ranks, 2 stages, 4 micro-batches",
        "rank  stages  activations   busy  gathers",
        "   0       0         2000  80.0%        0",
        "   1       1         1000  80.0%        0",
        "makespan 20, bubble 20.0%",
    ]
    assert ElementTree.parse(run / "measured.svg").getroot().tag.endswith("svg")


def test_a_run_without_a_plan_shows_what_was_measured(run, capsys):
    (run / "pipeline" / "costs.json").unlink()
    assert main([f"run={run}"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("measured: ") and out.endswith("makespan 20, bubble 20.0%\n")
    assert "   0       0            2  80.0%        0\n" in out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"send": None}, "send has an entry that is no number of at least 0: null"),
        ({"forward": [1.0]}, "forward is not a list of 2, one a stage, but"),
        ({"send": [1.0]}, r"send is not a number but \[1.0\]"),
        ({"forward": 1.0}, "forward is not a list of 2, one a stage, but 1.0"),
        ({"weight": [1.0, -1.0]}, "weight has an entry that is no number of at least 0"),
        ({"forward": [0, 0], "input": [0, 0], "weight": [0, 0]}, "no forward, input or weight takes time"),
        ({"extra": 1}, "must hold forward, input, .*, and nothing else"),
    ],
)
def test_costs_that_are_none_are_refused(run, change, message, capsys):
    path = run / "pipeline" / "costs.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert main([f"run={run}"]) == 2
    assert re.search(f"costs.json:? {message}", capsys.readouterr().err)


def test_a_plan_of_other_stages_than_were_measured_is_refused(run, capsys):
    write_trace(timeline_of("zb_v", Shape(2, 2, 4)), run / "pipeline" / "trace.json")
    assert main([f"run={run}"]) == 2
    assert "trace.json has other stages on its ranks than schedule.csv" in capsys.readouterr().err


def test_a_timeline_comes_back_as_it_went(tmp_path):
    for name in GENERATORS:
        timeline = timeline_of(name, Shape(3, GENERATORS[name].chunks[0], 6, 3))
        write_trace(timeline, tmp_path / "trace.json")
        again = read_trace(tmp_path / "trace.json")
        assert (again.schedule.ranks, again.starts, again.ends) == (
            timeline.schedule.ranks,
            timeline.starts,
            timeline.ends,
        )
        assert json.loads((tmp_path / "trace.json").read_text())["unit"] == "seconds"


def test_measured_spans_count_from_the_first_start():
    """Whatever the clock says: what it measured of a simulated step is that step."""
    timeline = timeline_of("zb_v", Shape(3, 2, 6))
    spans = [
        [(action, 2.0**20 + start, 2.0**20 + end) for action, start, end in zip(*rank, strict=True)]
        for rank in zip(timeline.schedule.ranks, timeline.starts, timeline.ends, strict=True)
    ]
    measured = align(spans)
    assert measured.schedule.ranks == timeline.schedule.ranks
    assert min(map(min, measured.starts)) == 0.0
    assert measured.makespan == pytest.approx(timeline.makespan, abs=1e-8)
    assert measured.bubble == pytest.approx(timeline.bubble, abs=1e-8)


def test_spans_that_are_no_timeline_are_refused():
    with pytest.raises(ValueError, match="no rank has spans"):
        align([[], []])
    with pytest.raises(ValueError, match=r"rank 1: 1F1 goes from 1 to 2 after 1.5; the spans of a rank follow each"):
        align([[(Action(0, "F", 0), 5.0, 6.0)], [(Action(1, "F", 0), 5.5, 6.5), (Action(1, "F", 1), 6.0, 7.0)]])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "No such file or directory; give a timeline that was written"),
        ("{", "is no timeline: Expecting"),
        ("[]", 'is no timeline: no list "ranks" of a list a rank'),
        ('{"ranks": [1]}', 'no list "ranks" of a list a rank'),
        ('{"ranks": [[], []]}', "no rank did anything"),
        ('{"ranks": [[["0F0", 0, 1]], [["1F0", 1]]]}', r'rank 1: \["1F0", 1\] is not \[action, start, end\]'),
        ('{"ranks": [[["0X0", 0, 1]]]}', r"'0X0' is no action; write stage, one of F, I, W, B"),
        ('{"ranks": [[["0F0", 0, "1"]]]}', r'rank 0: \["0F0", 0, "1"\] is not'),
        ('{"ranks": [[["0F0", 1, 1]]]}', "nothing in it takes time"),
        ('{"ranks": [[["0F0", 1, 0]]]}', "rank 0: 0F0 goes from 1 to 0"),
        ('{"ranks": [[["0F0", 0, NaN]]]}', "rank 0: 0F0 goes from 0 to nan"),
        ('{"ranks": [[["0F0", 0, 2], ["0F1", 1, 3]]]}', "rank 0: 0F1 goes from 1 to 3 after 2"),
    ],
)
def test_files_that_are_no_timeline_are_refused(text, message, tmp_path):
    path = tmp_path / "trace.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=f"{path}.*{message}"):
        read_trace(path)


def test_a_pictures_colours_have_the_shares_of_their_times(tmp_path):
    """Counted in its pixels. Bars are as wide as each other, so that the lines between them take the same from each."""
    timeline = simulate(make_schedule("zb_h1", Shape(8, 1, 20)), uniform_costs(8))
    draw({"zb_h1": timeline}, tmp_path / "zb_h1.png")
    pixels = imread(tmp_path / "zb_h1.png")[..., :3]
    area = {
        name: int((np.abs(pixels - np.array(to_rgb(color), np.float32)).max(axis=2) < 0.02).sum())
        for name, color in {**COLORS, "bubble": BUBBLE}.items()
    }
    assert area["B"] == 0
    assert area["F"] == pytest.approx(area["I"], rel=0.02) == pytest.approx(area["W"], rel=0.02)
    assert area["bubble"] / sum(area.values()) == pytest.approx(timeline.bubble, rel=0.2)


def test_a_picture_takes_timelines_of_other_sizes_and_units(tmp_path):
    tiny = align([[(Action(0, "F", 0), 1e9, 1e9 + 1e-6), (Action(0, "B", 0), 1e9 + 1e-6, 1e9 + 3e-6)], []])
    wide = timeline_of("interleaved_1f1b", Shape(6, 3, 12))
    for timelines in ({"one": tiny}, {"a": wide, "b": timeline_of("gpipe", Shape(2, 1, 2))}):
        for suffix in ("png", "svg"):
            draw(timelines, tmp_path / f"{len(timelines)}.{suffix}", "seconds")
    assert len(list(tmp_path.iterdir())) == 4


def test_a_ranks_later_stages_are_lighter():
    for color in COLORS.values():
        shades = [sum(lighten(color, chunk, 4)) for chunk in range(4)]
        assert shades == sorted(set(shades)) and shades[-1] < 3
        assert lighten(color, 0, 1) == to_rgb(color)


def test_pictures_of_nothing_or_in_another_format_are_refused(tmp_path):
    with pytest.raises(ValueError, match="there is no timeline to draw"):
        draw({}, tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"a.gif: pictures are .png or .svg"):
        draw({"a": timeline_of("gpipe", Shape(2, 1, 2))}, tmp_path / "a.gif")


def test_the_command_needs_no_torch_and_no_pyplot():
    program = "import runpy, sys; sys.argv[1:] = ['zb_v', 'ranks=2']\ntry: runpy.run_module('rowwise.launch.schedule', "
    program += "run_name='__main__')\nfinally: print(*sys.modules)"
    process = subprocess.run([sys.executable, "-c", program], cwd="/", capture_output=True, text=True)
    assert process.returncode == 2 and process.stderr.startswith("refused: zb_v is made for ranks=")
    assert not {"torch", "matplotlib.pyplot"} & set(process.stdout.split())
