"""Messages between a warm process and its clients: JSON of any length, each in a file in memory whose descriptor is sent."""

import contextlib
import json
import os
import socket
from typing import Any

MESSAGE, CLIENT = b"message", b"client"  # what a file descriptor that is sent leads to
NO_MORE = (BrokenPipeError, ConnectionResetError)


def send(to: socket.socket, message: dict[str, Any]) -> None:
    """Sends a message. Not through the socket itself, which takes 200 kB at most: an environment and a list of files are more."""
    with os.fdopen(os.memfd_create("message"), "wb") as file:
        file.write(json.dumps(message).encode())
        file.flush()
        socket.send_fds(to, [MESSAGE], [file.fileno()])


def tell(client: socket.socket, message: dict[str, Any]) -> None:
    """Sends a message to a client, who may be gone."""
    with contextlib.suppress(*NO_MORE):
        send(client, message)


def received(word: bytes, fds: list[int]) -> dict[str, Any]:
    """Reads a message. Raises ConnectionResetError where nobody is there to send."""
    if not word:
        raise ConnectionResetError
    with os.fdopen(fds[0], "rb") as file:
        file.seek(0)
        return json.load(file)
