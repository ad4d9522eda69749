"""The socket on which a running daemon says how it is: `<journal.path>.sock`, for its own user and root only.

One request, one answer, each a line of JSON; then the connection ends.
"""

import json
import os
import selectors
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

from vodpoller.logs import Logger

REQUEST_MAX_BYTES: Final = 4096
ANSWER_MAX_BYTES: Final = 16 * 1024 * 1024
CLIENT_SECS: Final = 2.0
_PATH_MAX_BYTES: Final = 107  # sockaddr_un(7)


def socket_path(journal_path: Path) -> Path:
    """Where the daemon with this journal listens."""
    return journal_path.with_name(journal_path.name + ".sock")


class StatusSocket:
    """Answers requests, one at a time, in a thread of its own.

    Args:
        path: Where; a socket that an earlier process left there is replaced.
        answer: Makes the answer to a request.
        log: Destination of log lines.

    Raises:
        OSError: The socket cannot be made there.
    """

    def __init__(self, path: Path, answer: Callable[[Mapping[str, Any]], Mapping[str, Any]], *, log: Logger) -> None:
        self._path = path
        self._answer = answer
        self._log = log
        self._listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            with suppress(FileNotFoundError):
                path.unlink()
            os.fchmod(self._listening.fileno(), 0o600)  # before it has a name: Linux gives the name this mode
            with _address(path) as address:
                self._listening.bind(address)
            self._listening.listen(8)
        except OSError:
            self._listening.close()
            raise
        self._listening.setblocking(False)  # noqa: FBT003 - its only argument
        self._wake, self._woken = socket.socketpair()
        self._selector = selectors.DefaultSelector()
        for each in (self._listening, self._woken):
            self._selector.register(each, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._serve, name="status", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Answer nothing more. An answer that is under way is awaited, but not for long."""
        with suppress(OSError):
            self._path.unlink()
        self._wake.close()
        self._thread.join(CLIENT_SECS)
        if self._thread.is_alive():  # what it still uses the end of the process closes
            return
        self._selector.close()
        self._listening.close()
        self._woken.close()

    def _serve(self) -> None:
        while True:
            ready = {key.fileobj for key, _ in self._selector.select()}
            if self._woken in ready:
                return
            try:
                connection, _ = self._listening.accept()
                with connection:
                    self._serve_one(connection)
            except OSError:  # the client went away or sends nothing, or there are no more descriptors
                time.sleep(0.05)
            except Exception:  # noqa: BLE001 - the next request may do better
                self._log.error("task.failed", task="status", exc_info=True)

    def _serve_one(self, connection: socket.socket) -> None:
        request = _line_from(connection, REQUEST_MAX_BYTES, CLIENT_SECS)
        try:
            wanted = json.loads(request)
        except ValueError:
            wanted = None
        answer = self._answer(wanted) if isinstance(wanted, dict) else {"error": "the request is not a JSON object"}
        connection.settimeout(CLIENT_SECS)
        connection.sendall(json.dumps(answer).encode() + b"\n")


def ask(path: Path, request: Mapping[str, Any], *, timeout_secs: float) -> dict[str, Any] | None:
    """Ask the daemon that listens there.

    Args:
        path: Of its socket.
        request: What to ask.
        timeout_secs: For each step of the exchange.

    Returns:
        Its answer; None if no daemon listens.

    Raises:
        OSError: It listens, and cannot be asked: no right, or no answer in time.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as connection:
        connection.settimeout(timeout_secs)
        try:
            with _address(path) as address:
                connection.connect(address)
        except (FileNotFoundError, NotADirectoryError, ConnectionRefusedError):
            return None
        connection.sendall(json.dumps(request).encode() + b"\n")
        answer = json.loads(_line_from(connection, ANSWER_MAX_BYTES, timeout_secs) or b"null")
    if not isinstance(answer, dict):
        raise ConnectionError("the daemon closed the connection without an answer")
    return answer


def _line_from(connection: socket.socket, max_bytes: int, within_secs: float) -> bytes:
    ends_at = time.monotonic() + within_secs
    line = bytearray()
    while not line.endswith(b"\n") and len(line) < max_bytes:
        connection.settimeout(max(ends_at - time.monotonic(), 0.001))
        chunk = connection.recv(64 * 1024)
        if not chunk:
            break
        line += chunk
    return bytes(line)


@contextmanager
def _address(path: Path) -> Iterator[str]:
    """The path as `bind` and `connect` take it: a long one by way of its folder's descriptor."""
    if len(os.fsencode(path)) <= _PATH_MAX_BYTES:
        yield os.fspath(path)
        return
    folder_fd = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{folder_fd}/{path.name}"
    finally:
        os.close(folder_fd)
