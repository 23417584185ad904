"""Names outside ASCII, whatever the locale says."""

import os
import sys


def insist_on_utf8() -> None:
    """Begins this process again in Python's UTF-8 mode where the locale has names of files in another encoding.

    A name of a run would then be refused, or written otherwise than elsewhere. What it starts inherits the mode. Once: Python
    may have been told not to listen (-E, -X utf8=0).
    """
    if sys.getfilesystemencoding().lower() != "utf-8" and os.environ.get("PYTHONUTF8") != "1":
        os.environ["PYTHONUTF8"] = "1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
