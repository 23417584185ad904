"""Ctrl-C is answered at once, whatever the main thread is doing; other signals need no answer."""

import hashlib
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from rowwise.launch import cli
from rowwise.trainer import stop as stopping
from rowwise.trainer.stop import ASKED, ENDED, StopRequest

# A call of C in which, as in a product of matrices, Python's handlers do not run.
BUSY = "hashlib.pbkdf2_hmac('sha256', b'', b'', {})"


def busy(seconds: float) -> None:
    began = time.perf_counter()
    hashlib.pbkdf2_hmac("sha256", b"", b"", 20_000)
    hashlib.pbkdf2_hmac("sha256", b"", b"", int(20_000 * seconds / (time.perf_counter() - began)))


@pytest.mark.parametrize(
    "number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2], ids=lambda n: n.name
)
def test_ctrl_c_is_answered_while_a_step_is_made(number, monkeypatch):
    monkeypatch.setattr(stopping, "PATIENCE_SECONDS", 60.0)
    said: list[tuple[str, float]] = []
    with StopRequest() as stop:
        stop.hear(lambda _: said.append(("to another", 0.0)))
        stop.hear(lambda text: said.append((text, time.monotonic())))
        threading.Timer(0.2, os.kill, (os.getpid(), number)).start()
        busy(1.0 if number == signal.SIGINT else 0.4)
        returned = time.monotonic()
        assert stop.requested
        os.kill(os.getpid(), signal.SIGINT)  # it often comes twice, from a scheduler and through torchrun
        time.sleep(0.1)
    if number == signal.SIGINT:
        assert [text for text, _ in said] == [ASKED]
        assert said[0][1] < returned - 0.3, "before the call came back"
    else:
        assert not said
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert "signals" not in {thread.name for thread in threading.enumerate()}


CTRL_C = f"""
import hashlib, os, signal, sys, threading, time
from rowwise.trainer import stop
stop.PATIENCE_SECONDS = 0.3
for delay in (0.3, 0.4, 1.0):  # the second comes too soon to be meant
    threading.Timer(delay, os.kill, (os.getpid(), signal.SIGINT)).start()
def say(text):
    print(text, file=sys.stderr, flush=True)
with stop.StopRequest() as request:
    request.hear(say)
    {BUSY.format(10**9)}
"""
BEFORE_TRAINING = """
import hashlib, os, signal, sys, threading, time, types
from rowwise.trainer import stop
stop.PATIENCE_SECONDS = 0.3
def work(*given):
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
    %s
sys.modules["rowwise.launch.worker"] = types.SimpleNamespace(work=work)
from rowwise.launch import train
sys.argv[1:] = []
train.run()
"""
NOTHING = "interrupted: no step is under way\n"
PROGRAMS = {
    "again, while a step is made": (CTRL_C, {}, f"{ASKED}\n{ENDED}\n"),
    "while the data are opened": (BEFORE_TRAINING % "time.sleep(60)", {}, NOTHING),
    "while a rank is waited for": (BEFORE_TRAINING % BUSY.format(10**9), {}, NOTHING),
    "on another rank": (BEFORE_TRAINING % "time.sleep(60)", {"RANK": "1"}, ""),
}


@pytest.mark.parametrize("case", PROGRAMS)
def test_ctrl_c_ends_a_process_in_a_line(case):
    program, place, message = PROGRAMS[case]
    words, environment = [sys.executable, "-c", program], {**os.environ, **place}
    ended = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert (ended.returncode, ended.stderr) == (130, message)


def test_nohup_is_heeded():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stopping.hearing(lambda *_: None):
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_ctrl_c_while_a_command_is_loaded(monkeypatch, capsys):
    def interrupted(name):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.importlib, "import_module", interrupted)
    for name in cli.COMMANDS:
        assert cli.main([name]) == 130
        assert capsys.readouterr().err == "interrupted\n"
