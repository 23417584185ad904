"""What a person sees of a run, on terminals of several widths, in a file, and beside another run."""

import io
import os
import re
import sys
import textwrap
from pathlib import Path

import pytest

from rowwise.launch.cli import COMMANDS
from rowwise.launch.compose import compose_tree
from rowwise.trainer import console as consoles
from rowwise.trainer import screen
from rowwise.trainer.check import check
from rowwise.trainer.config import config_from_tree
from rowwise.trainer.console import Console, bar_lines, forecast
from rowwise.trainer.next_steps import next_steps, setting
from rowwise.trainer.pace import Pace
from rowwise.trainer.runlog import TRAIN_LOG, keep_said
from rowwise.trainer.summary import header, layout_in_words
from terminals import Terminal

RECORD = {
    "step": 1, "loss": 2.5, "grad_norm": 1.0, "lr": 1e-3, "tokens": 1234, "tokens_per_second": 1234.5, "mfu": None,
    "step_seconds": 0.5, "data_seconds": 0.1, "peak_memory_bytes": 1_234_000_000,
}  # fmt: skip
LARGE = RECORD | {
    "step": 123_456, "loss": 12.3456, "eval_loss": 11.2345, "grad_norm": 1234.567, "tokens_per_second": 1_234_567.0, "mfu": 0.417
}  # fmt: skip


def log_of(run_dir: Path) -> list[str]:
    """The log without its times."""
    lines = (run_dir / TRAIN_LOG).read_text().splitlines()
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d  | {21}", line) for line in lines)
    return [line[21:] for line in lines]


def test_plain_lines_where_there_is_no_terminal(tmp_path, capsys):
    console = Console(tmp_path, 0, 10, log_every=4)
    for step in range(1, 11):
        console.step({**RECORD, "step": step, **({"eval_loss": 1.5} if step == 10 else {})})
    console.say("warning: a thing", wrong=True)
    console.close()
    said = capsys.readouterr()
    lines = said.out.splitlines()
    assert [line.split()[1] for line in lines] == ["1/10", "4/10", "8/10", "10/10", "10/10"]
    assert lines[1] == "step 4/10  loss 2.5000  grad norm 1.000  lr 1.00e-03  1,234 tokens/s  0:03 left"
    assert "held-out loss 1.5000" in lines[-1]
    assert said.err == "warning: a thing\n", "what is wrong, and nothing else"
    assert log_of(tmp_path) == [*lines, "warning: a thing"]
    Console(tmp_path, 10, 20, log_every=4).say("goes on")
    assert log_of(tmp_path)[-1] == "goes on", "appended over resumes"


def test_a_line_a_minute_where_steps_are_long(tmp_path, monkeypatch, capsys):
    now = iter(range(0, 100_000, 25))
    monkeypatch.setattr(consoles.time, "monotonic", lambda: next(now))
    console = Console(tmp_path, 0, 1000, log_every=500)
    for step in range(1, 20):
        console.step({**RECORD, "step": step})
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step")]
    assert 4 < len(told) < 15


def test_an_overflow_and_a_step_without_valid_tokens(tmp_path, capsys):
    console = Console(tmp_path, 0, 3, log_every=1)
    console.step({**RECORD, "loss": None, "grad_norm": None})
    console.step({**RECORD, "step": 2, "loss": None, "grad_norm": 0.0, "eval_loss": None})
    console.close()
    lines = capsys.readouterr().out.splitlines()
    assert "loss overflow  grad norm overflow" in lines[0]
    assert "loss none (no valid token)  grad norm 0.000" in lines[1]
    assert lines[2] == "step 2/3  held-out loss none (no valid token)"


HEADERS = {
    "the default": (["nproc=2"], 2, "cpu", 7),
    "as many words as there may be": (
        ["model=llama3_8b", "batch.global_size=256", "batch.seq_len=8192", "parallel.pipeline=4", "parallel.virtual_stages=2",
         "parallel.pipeline_schedule=interleaved_1f1b", "parallel.ring=2", "parallel.ulysses=2", "parallel.replicate=2",
         "parallel.zero=2", "batch.micro_size=4", "optim=adamw8bit", "precision=bf16", "steps=1000000"], 128, "H100 80GB HBM3", 8,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", HEADERS)
def test_the_header_has_at_most_eight_lines(case):
    """With the forecast, in 80 columns."""
    words, workers, device, lines = HEADERS[case]
    config = check(config_from_tree(compose_tree(words)), workers)
    told = header(config, workers, device, "text: 345 B tokens, 12,345 files", 0.00988, 2_160_000_000)
    told.append(forecast(Pace([RECORD]), config.steps) or "")
    shown = [part for line in told for part in screen.wrapped(line, 79, hanging=consoles.LABEL)]
    assert len(shown) <= lines and all(screen.columns(line) <= 79 for line in shown)
    said = "\n".join(told)
    batch, model = config.batch, config.model
    for word in (f"{batch.global_size * batch.seq_len:,} tokens a step", model.name, f"precision {config.precision.name}", device,
                 f"{config.optim.name} keeps", " bytes a parameter", config.run_dir, f"{config.steps:,} steps = 0.00988 epochs",
                 "time       about "):  # fmt: skip
        assert word in said
    assert layout_in_words(config.parallel, workers, device) in said


def test_speed_and_time_left_are_moving_means():
    """A slow first step and one slow step among others do not turn "0:32 left" into "18:24 left"."""
    pace = Pace([RECORD | {"step_seconds": 30.0, "tokens_per_second": 10.0}])
    assert pace.seconds_for(10) == 300 and pace.mean("tokens_per_second") == 10
    for _ in range(100):
        pace.add(RECORD | {"step_seconds": 0.1, "tokens_per_second": 1000.0})
    assert pace.seconds_for(100) == pytest.approx(10), "the first is not counted"
    pace.add(RECORD | {"step_seconds": 5.1, "tokens_per_second": 1000.0})
    assert pace.seconds_for(100) == pytest.approx(20), "50 steps took 10 seconds"
    assert pace.mean("tokens_per_second") == pytest.approx(1000)
    pace.add(RECORD | {"step_seconds": 0.1, "eval_seconds": 9.3, "save_seconds": 1.0})
    assert pace.seconds_for(103) == pytest.approx(103 * 0.2 + 10.3), "evaluations and saves come again"
    for _ in range(2):
        for step in range(1, 201):
            pace.add(RECORD | {"step_seconds": 0.1} | ({"eval_seconds": 10.0} if step == 200 else {}))
    for _ in range(150):
        pace.add(RECORD | {"step_seconds": 0.1})
    assert pace.seconds_for(200) == pytest.approx(20 + 10 + 200 / 550), "every 200 steps, and one save in 550"
    assert Pace().seconds_for(1) is None and pace.mean("mfu") is None
    assert Pace([{"step": 1, "step_seconds": "x", "eval_seconds": None}]).seconds_for(3) is None


@pytest.mark.parametrize("width", [79, 199])
def test_nothing_of_the_bar_is_cut(width):
    """The numbers are the longest that runs have; rate and norm stand below the step."""
    lines = bar_lines(LARGE, Pace([LARGE]), 1_000_000, 64, width)
    assert len(lines) == (2 if width > 100 else 3) and all(screen.columns(line) <= width for line in lines)
    words = " ".join(lines)
    for figure in ("123456/1000000", "12%", "loss 12.3456", "held-out 11.2345", "5 d 01:44 left", "1,234,567 tokens/s per worker",
                   "MFU 41.7%", "1.23 GB", "lr 1.00e-03", "grad norm 1234.567"):  # fmt: skip
        assert figure in words
    assert "lr" not in lines[0] and "grad" not in lines[0]
    small = bar_lines(RECORD | {"eval_loss": 2.4}, Pace([RECORD]), 200, 2, 79)
    assert len(small) == 2 and "░" in small[0] and len(small[0]) == 79


@pytest.mark.parametrize("width", range(1, 79, 6))
def test_a_narrow_terminal_gets_more_lines(width):
    lines = bar_lines(LARGE, Pace([LARGE]), 1_000_000, 64, width, blocks=False)
    assert all(screen.columns(line) <= width for line in lines)
    if width > 40:
        assert "grad norm 1234.567" in " ".join(lines)


def test_wide_characters_and_marks_take_their_columns():
    assert [screen.columns(text) for text in ("abc", "漢字", "é", "e\u0301", "\u200b")] == [3, 4, 1, 1, 0]
    assert (
        screen.cut("漢字漢字", 5) == "漢字"
        and screen.padded("漢", 4) == "漢  "
        and screen.padded("漢", 4, True) == "  漢"
    )
    text = "files      runs/漢字漢字漢字: metrics.jsonl, train.log, and a/" + "long/" * 9
    lines = screen.wrapped(text, 30, hanging=11)
    assert " ".join(line.strip() for line in lines) == text
    assert all(screen.columns(line) <= 30 or len(line.split()) == 1 for line in lines)
    assert all(line.startswith(" " * 11) for line in lines[1:])


def test_numbers_as_people_read_them():
    assert [screen.clock(s) for s in (0, 187, 3727, 200_000)] == ["0:00", "3:07", "1:02:07", "2 d 07:33"]
    assert [screen.byte_count(n) for n in (850, 999_900, 12_345_678, 2e15)] == [
        "850 bytes",
        "1 MB",
        "12.3 MB",
        "2,000 TB",
    ]
    assert [screen.count(n) for n in (435_328, 7_612_345, 999_600_000, 1.4e13)] == ["435,328", "7.61 M", "1 B", "14 T"]


@pytest.mark.parametrize("path", ["runs/tiny", "runs/it's ${here}", "runs/漢 字", "a=b,c"])
def test_the_commands_of_the_box_mean_what_they_say(path):
    """A shell and Hydra read them back as they were meant."""
    import shlex

    assert compose_tree(shlex.split(setting("resume", path)))["resume"] == path
    for what, command in next_steps(path, 200, writes=True, saved=True):
        words = shlex.split(command)
        assert words[0] == "rowwise" and words[1] in COMMANDS and (what != "go on" or words[3:] == ["steps=400"])
        assert what == "go on" or words[2] == f"run={path}"


def test_a_full_disk_ends_no_run_because_of_what_is_said(tmp_path):
    keep_said(tmp_path / "gone", "a word")
    (tmp_path / TRAIN_LOG).symlink_to("/dev/full")
    keep_said(tmp_path, "a word")


PROGRAM = """
import contextlib, sys, time
from pathlib import Path
from rowwise.launch.streams import patient_streams
from rowwise.trainer.console import Console, labelled
folder, steps, pause, patient = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), len(sys.argv) > 4
folder.mkdir(exist_ok=True)
with patient_streams() if patient else contextlib.nullcontext():
    console = Console(folder, 0, 200, 20, 2)
    console.header([labelled("model", "tiny: 2.95 M parameters, 4 layers of width 256, and more words than 80 columns hold")])
    for step in range(1, steps + 1):
        record = {"step": step, "loss": 2.1234, "grad_norm": 1.5, "lr": 3e-4, "tokens_per_second": 12345.6, "mfu": 0.41,
                  "step_seconds": 0.6, "peak_memory_bytes": 12.3e9}
        console.step(record | ({"eval_loss": 1.9876} if step == 5 else {}))
        if step == 7:
            console.say("warning: something is wrong", wrong=True)
        time.sleep(pause)
    console.close()
    console.end(f"complete at step {steps}", [labelled("result", "loss 2.1234"), labelled("go on", "rowwise train resume=runs/x")])
"""


@pytest.fixture
def program(tmp_path):
    path = tmp_path / "program.py"
    path.write_text(textwrap.dedent(PROGRAM))
    return str(path)


def is_bar(line: str) -> bool:
    return line.startswith("step ") and "░" in line


@pytest.mark.parametrize(("columns", "patient"), [(80, True), (80, False), (200, True), (46, True)])
def test_the_screen_of_a_run(tmp_path, program, columns, patient):
    with Terminal(columns) as terminal:
        run = terminal.start(program, str(tmp_path / "run"), "14", "0.12", *["patient"] * patient, folder=tmp_path)
        under_way = terminal.until(lambda lines: "held-out 1.9876" in (said := "\n".join(lines)) and "wrong" in said)
        at_the_end = terminal.wait(run)
    assert run.returncode == 0
    (top,) = [
        at for at, line in enumerate(under_way) if re.match(r"step \d+/200  ", line) and "held-out loss" not in line
    ]
    bar = under_way[top:]
    assert len(bar) == (2 if columns >= 80 else 4), "the bar stands last, once"
    for figure in ("loss 2.1234", "held-out 1.9876", "left", "12,346 tokens/s per worker", "MFU 41.0%", "12.3 GB", "lr 3.00e-04",
                   "grad norm 1.500"):  # fmt: skip
        assert sum(line.count(figure) for line in bar) == 1, "\n".join(under_way)
    if columns >= 80:
        assert is_bar(bar[0]) and "grad norm" in bar[1] and "lr" in bar[1]
    assert not any("░" in line for line in at_the_end), "at the end no bar is left"
    words = "\n".join(at_the_end)
    assert words.count("warning: something is wrong") == words.count("step 5/200  held-out loss 1.9876") == 1
    assert len([line for line in at_the_end if line.startswith("step 14/200  loss 2.1234")]) == 1
    rules = [at for at, line in enumerate(at_the_end) if line.startswith("──")]
    assert len(rules) == 2 and rules[1] == len(at_the_end) - 1 and "complete at step 14" in at_the_end[rules[0]]
    assert at_the_end[rules[0] + 2] == "go on      rowwise train resume=runs/x"
    assert not re.search(rb"\x1b\[[\d;]*m", terminal.raw), "no colours, with NO_COLOR and without"
    log = log_of(tmp_path / "run")
    assert (
        len([line for line in log if line.startswith("step 1/200  loss")]) == 1 and "warning: something is wrong" in log
    )
    assert not any("\x1b" in line or "░" in line for line in log)


def test_a_command_is_copied_whole(tmp_path):
    """Also one that is longer than the terminal: a line break in it would start half of it."""
    with (
        Terminal(40) as terminal,
        os.fdopen(os.dup(terminal.slave), "w") as stream,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr(sys, "stdout", stream)
        Console(tmp_path, 0, 1, 1).end(
            "complete", ["go on      " + "rowwise train resume=" + "long/" * 20 + " steps=9"]
        )
        terminal.read(0.2)
    assert f"go on      rowwise train resume={'long/' * 20} steps=9\r\n" in terminal.raw.decode()


def test_two_runs_in_one_terminal(tmp_path, program):
    """The first has the bar; the other says lines with its name, and neither spoils a line of the other."""
    with Terminal(80) as terminal:
        first = terminal.start(program, str(tmp_path / "one"), "16", "0.15", "patient", folder=tmp_path)
        terminal.until(lambda lines: any(is_bar(line) for line in lines))
        second = terminal.start(program, str(tmp_path / "other"), "6", "0.05", "patient", folder=tmp_path)
        under_way = terminal.until(lambda lines: any("other: step 5/200" in line for line in lines))
        terminal.wait(second)
        at_the_end = terminal.wait(first)
    assert (first.returncode, second.returncode) == (0, 0)
    assert any(line.startswith("other: step 1/200  loss") for line in under_way)
    assert sum(is_bar(line) for line in under_way) <= 1
    assert not any("░" in line for line in at_the_end)
    others = [line for line in at_the_end if line.startswith("other: ")]
    assert sum("go on" in line for line in others) == 1
    whole = [line for line in at_the_end if re.match("(other: )?(step|──|go on|result|model|time|warning|  )", line)]
    assert whole == at_the_end


def test_a_terminal_that_cannot_paint_gets_lines(tmp_path, program):
    with Terminal(80) as terminal:
        lines = terminal.wait(
            terminal.start(program, str(tmp_path / "run"), "3", "0", "patient", folder=tmp_path, TERM="dumb")
        )
    assert (
        b"\x1b" not in terminal.raw
        and b"\r" not in terminal.raw.replace(b"\r\n", b"\n")
        and any(line.startswith("step 1/200  loss") for line in lines)
    )


def test_a_terminal_without_the_characters_of_the_bar(tmp_path, program):
    with Terminal(80) as terminal:
        environment = {"PYTHONIOENCODING": "ascii:backslashreplace", "PYTHONUTF8": "0"}
        run = terminal.start(program, str(tmp_path / "run"), "4", "0.12", folder=tmp_path, **environment)
        terminal.until(lambda lines: any("[" in line or "...." in line for line in lines), [run])
        lines = terminal.wait(run)
    assert b"...." in terminal.raw and "\\u" not in "\n".join(lines) and lines[-1].startswith("-----")


def test_words_go_where_they_belong_when_streams_are_apart(tmp_path, monkeypatch):
    """A bar on standard output, and errors in a file."""

    class Screen(io.StringIO):
        def isatty(self):
            return True

    out, err = Screen(), io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    console = Console(tmp_path, 3, 10, log_every=1)
    monkeypatch.setattr(consoles, "PAINT_SECONDS", 0)
    console.step({**RECORD, "step": 4, "loss": None, "grad_norm": None})
    console.say("a word")
    console.say("warning: a wrong", wrong=True)
    console.close()
    assert "step 4/10" in out.getvalue() and "loss overflow" in out.getvalue() and "a word" in out.getvalue()
    assert err.getvalue() == "warning: a wrong\n"
