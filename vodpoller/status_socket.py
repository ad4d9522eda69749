"""The socket on which a running daemon says how it is: `<journal.path>.sock`, for its own user and root only.

One request, one answer, each a line of JSON; then the connection ends.
"""

import json
import os
import selectors
import socket
import stat
import struct
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from vodpoller.logs import Logger

REQUEST_MAX_BYTES: Final = 4096
ANSWER_MAX_BYTES: Final = 16 * 1024 * 1024
CLIENT_SECS: Final = 2.0
_PATH_MAX_BYTES: Final = 107  # sockaddr_un(7)
_ENDING: Final = ".sock"
_MODE: Final = 0o600
_UCRED: Final = "3i"  # struct ucred: process, user, group
_LISTENS: Final = 0x10000  # __SO_ACCEPTCON of the kernel's net.h, in the flags of /proc/net/unix


def socket_path(journal_path: Path) -> Path:
    """Where the daemon with this journal listens."""
    return journal_path.with_name(journal_path.name + _ENDING)


def socket_of_process(pid: int) -> Path | None:
    """Where the daemon listens that is this process; None if it does not, or at a relative path.

    What a process has open (/proc/PID/fd) is hidden from the sandbox in which a unit's ExecReload= runs. So each socket
    that may be the one is connected to, and the kernel says who listens there (unix(7), SO_PEERCRED).

    Args:
        pid: Its number.
    """
    try:
        lines = Path("/proc/net/unix").read_text(errors="surrogateescape").splitlines()[1:]
    except OSError:
        return None
    for line in lines:
        _, _, _, flags, _, _, _, *name = line.split(maxsplit=7)
        if name and int(flags, 16) & _LISTENS and _listener_at(Path(name[0])) == pid:
            return Path(name[0])
    return None


def _listener_at(path: Path) -> int | None:
    """The process that listens at a path; None if it is not a status socket, or may not be asked."""
    try:
        if path.suffix != _ENDING or not path.is_absolute() or stat.S_IMODE(path.stat().st_mode) != _MODE:
            return None
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as connection:
            connection.settimeout(CLIENT_SECS)
            connection.connect(os.fspath(path))
            peer = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize(_UCRED))
    except OSError:
        return None
    return int(struct.unpack(_UCRED, peer)[0])


class StatusSocket:
    """Answers requests, one at a time, in a thread of its own.

    Args:
        path: Where; a socket that an earlier process left there is replaced.
        answer: Makes the answer to a request.
        later: By the command that a request names: what takes the client whose answer takes long, and answers it.
        listening: The socket that listens there already; None to make it.
        log: The destination of log lines, asked at each: another configuration may have another.

    Attributes:
        path: Where.

    Raises:
        OSError: The socket cannot be made there.
    """

    def __init__(
        self,
        path: Path,
        answer: Callable[[Mapping[str, Any]], Mapping[str, Any]],
        *,
        later: Mapping[str, Callable[["Asker"], None]] = MappingProxyType({}),
        listening: socket.socket | None = None,
        log: Callable[[], Logger],
    ) -> None:
        self.path = path
        self._answer = answer
        self._later = later
        self._log = log
        self._listening = listening or _listen_at(path)
        self._listening.setblocking(False)  # noqa: FBT003 - its only argument
        self._wake, self._woken = socket.socketpair()
        self._selector = selectors.DefaultSelector()
        for each in (self._listening, self._woken):
            self._selector.register(each, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._serve, name="status", daemon=True)
        self._thread.start()

    def fileno(self) -> int:
        """The descriptor of the socket that listens."""
        return self._listening.fileno()

    def close(self) -> None:
        """Answer nothing more. An answer that is under way is awaited, but not for long."""
        with suppress(OSError):
            self.path.unlink()
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
                with ExitStack() as serving:
                    serving.enter_context(connection)
                    if self._serve_one(connection):
                        serving.pop_all()
            except OSError:  # the client went away or sends nothing, or there are no more descriptors
                time.sleep(0.05)
            except Exception:  # noqa: BLE001 - the next request may do better
                self._log().error("task.failed", task="status", exc_info=True)

    def _serve_one(self, connection: socket.socket) -> bool:
        """Answer one request. Returns whether it is kept, to be answered later."""
        request = _line_from(connection, REQUEST_MAX_BYTES, CLIENT_SECS)
        try:
            wanted = json.loads(request)
        except ValueError:
            wanted = None
        if isinstance(wanted, dict) and (take := self._later.get(str(wanted.get("command")))):
            take(Asker(connection))
            return True
        answer = self._answer(wanted) if isinstance(wanted, dict) else {"error": "the request is not a JSON object"}
        _send(connection, answer)
        return False


class Asker:
    """A client whose request takes long: it is answered later, from any thread, and holds up no other client.

    Args:
        connection: To the client.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection

    def fileno(self) -> int:
        """The descriptor of the connection."""
        return self._connection.fileno()

    def answer(self, answer: Mapping[str, Any]) -> None:
        """Answer, and close the connection. A client that has gone away is not a reason to fail."""
        with self._connection, suppress(OSError):
            _send(self._connection, answer)


def _send(connection: socket.socket, answer: Mapping[str, Any]) -> None:
    connection.settimeout(CLIENT_SECS)
    connection.sendall(json.dumps(answer).encode() + b"\n")


def _listen_at(path: Path) -> socket.socket:
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        with suppress(FileNotFoundError):
            path.unlink()
        os.fchmod(listening.fileno(), _MODE)  # before it has a name: Linux gives the name this mode
        with _address(path) as address:
            listening.bind(address)
        listening.listen(8)
    except OSError:
        listening.close()
        raise
    return listening


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
