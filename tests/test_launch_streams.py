"""A run goes on whatever becomes of the streams it prints to."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from rowwise.launch import streams
from rowwise.launch.streams import PatientStream, patient_streams


@pytest.fixture
def pipe():
    read, write = os.pipe()
    yield read, os.fdopen(write, "w")
    os.close(read)


def read_until(read: int, end: bytes) -> bytes:
    said = b""
    while not said.endswith(end):
        said += os.read(read, 1 << 20)
    return said


def test_what_is_printed_arrives_in_its_order(pipe):
    read, stream = pipe
    patient = PatientStream(stream)
    for number in range(2000):
        print(number, "ü\udc80", file=patient, flush=True)
    patient.drain()
    assert os.read(read, 1 << 16).decode() == "".join(f"{number} ü\\udc80\n" for number in range(2000))
    assert patient.fileno() == stream.fileno() and not patient.isatty()


def test_a_line_is_written_in_one_piece(pipe, monkeypatch):
    """What other workers write to the same terminal stands between lines, not in them; a bar has no end of a line."""
    read, stream = pipe
    patient, pieces, write = PatientStream(stream), [], os.write
    monkeypatch.setattr(streams.os, "write", lambda fd, data: pieces.append(data) or write(fd, data))
    for number in range(20):
        print("a line of", number, "words", file=patient)
        patient.drain()
    with pytest.raises(TypeError):
        patient.write(b"no text")
    patient.write("\ra bar")
    patient.write(" of two")
    patient.drain()
    assert pieces == [*(f"a line of {n} words\n".encode() for n in range(20)), b"\ra bar", b" of two"]
    assert read_until(read, b"two") == b"".join(pieces)


def test_a_full_pipe_that_nobody_reads_is_given_up(pipe, monkeypatch):
    monkeypatch.setattr(streams, "PATIENCE_SECONDS", 0.2)
    read, stream = pipe
    patient, began = PatientStream(stream), time.monotonic()
    for _ in range(3 * streams.WAITING):
        patient.write("x" * 99 + "\n")
    patient.drain()
    assert time.monotonic() - began < 5
    print("how it ended", file=patient)
    said = read_until(read, b"how it ended\n")  # a reader that comes back finds what came last
    assert len(said) <= (streams.WAITING + 1) * 100 + (1 << 16)


def test_a_pipe_that_another_program_has_set_not_to_block_is_waited_for(pipe):
    read, stream = pipe
    os.set_blocking(stream.fileno(), False)
    patient = PatientStream(stream)
    for number in range(3000):
        patient.write(f"{number:>99}\n")
    assert [int(line) for line in read_until(read, b"2999\n").split()] == list(range(3000))


def test_a_handler_of_signals_may_print_while_something_is_printed(pipe):
    read, stream = pipe
    patient = PatientStream(stream)
    reader = threading.Thread(target=read_until, args=(read, b"the end\n"))
    reader.start()
    handled: list[int] = []

    def handle(number, frame):
        handled.append(patient.write("a signal\n"))

    before = signal.signal(signal.SIGALRM, handle)
    signal.setitimer(signal.ITIMER_REAL, 0.0002, 0.0002)
    try:
        while len(handled) < 500:
            patient.write("a line\n")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    print("the end", file=patient)
    reader.join()


def test_a_reader_that_leaves_is_no_error():
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as stream:
        patient = PatientStream(stream)
        for _ in range(10):
            print("a line", file=patient, flush=True)
            patient.drain()
        assert patient._gone


CLOSED = """
import contextlib, os, subprocess, sys
from rowwise.launch.streams import patient_streams
with patient_streams():
    print("out"); print("err", file=sys.stderr)
    assert not sys.stderr.isatty()
    assert os.open("file", os.O_CREAT | os.O_WRONLY) > 2, "no file takes the place of a stream"
    with contextlib.suppress(OSError):
        os.write(2, b"what a library says")
    subprocess.run([sys.executable, "-c", "import os; os.fstat(0), os.fstat(1), os.fstat(2)"], check=True)
assert os.stat("file").st_size == 0
open("done", "w").close()
"""


@pytest.mark.parametrize(
    "how", ["<&- >&- 2>&-", ">&-", "2>&-", "2>/dev/full >/dev/full", "| head -0", "2>&1 | head -0"]
)
def test_streams_that_are_closed_full_or_left(tmp_path, how):
    (tmp_path / "program.py").write_text(CLOSED)
    command = f"{sys.executable} -I program.py {how}"
    subprocess.run(["bash", "-c", f"set -o pipefail; {command}"], cwd=tmp_path, timeout=60, check=True)
    assert (tmp_path / "done").exists()


def test_streams_that_are_no_files_stay(capsys):
    before = sys.stdout, sys.stderr
    with patient_streams():
        print("a word")
    assert (sys.stdout, sys.stderr) == before
    assert capsys.readouterr().out == "a word\n"
