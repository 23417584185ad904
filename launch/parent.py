"""A process that ends when the one that started it is gone. Needs no torch."""

import os
import signal
import threading
import time

_WATCH_SECONDS = 1.0


def follow(parent: int, patience_seconds: float | None = None) -> None:
    """Asks this process to stop, as SIGTERM does, once `parent` is no longer its parent: torchrun was killed, and would
    leave workers behind that go on for ever. After `patience_seconds` the process ends whatever it waits for."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_WATCH_SECONDS)
        if patience_seconds != 0:
            os.kill(os.getpid(), signal.SIGTERM)
        if patience_seconds is not None:
            time.sleep(patience_seconds)
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
