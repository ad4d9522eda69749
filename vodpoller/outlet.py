"""Writing to a descriptor that other processes share, with a limit on the wait for its reader."""

import os
import select
import socket
import stat
import time
import weakref
from typing import Final

_PAUSE_SECS: Final = 0.001


class Outlet:
    """Writes to an inherited descriptor so that a reader that does not read blocks nothing.

    O_NONBLOCK belongs to the open file description (open(2)), which all processes that inherited it share: if it were
    set here, the shell or another program would get EAGAIN. So it is never set on an inherited descriptor. A pipe or a
    terminal is opened again; on a socket each call has MSG_DONTWAIT. A pipe that cannot be opened again (another
    user's) gets pieces that fit into the room that poll(2) has found; such a write can wait only if another writer
    takes this room in between.

    Args:
        fd: Open for writing. It stays open, and it may be replaced by another file (dup2(2)).

    Raises:
        OSError: It is not open.
    """

    def __init__(self, fd: int) -> None:
        mode = os.fstat(fd).st_mode
        self._fd = fd
        self._socket: socket.socket | None = None
        self._waits = stat.S_ISFIFO(mode) or os.isatty(fd)
        self._own_fd: int | None = None
        self._own_file: tuple[int, int] | None = None
        if stat.S_ISSOCK(mode):
            self._socket = socket.socket(fileno=os.dup(fd))
            weakref.finalize(self, self._socket.close)
        self._poll = select.poll()
        self._poll.register(fd, select.POLLOUT)

    def await_room(self, timeout_secs: float | None = None) -> bool:
        """Wait until something can be written, or until writing fails at once.

        Args:
            timeout_secs: The longest wait; None for no limit.

        Returns:
            False if the time was over before.
        """
        return bool(self._poll.poll(None if timeout_secs is None else max(timeout_secs, 0) * 1000))

    def write_some(self, data: bytes | memoryview, timeout_secs: float) -> int:
        """Write as much as there is room for.

        Args:
            data: At least one byte.
            timeout_secs: The longest wait for room.

        Returns:
            The number of bytes that were written: 0 if there was no room in time.

        Raises:
            OSError: The write failed: the reader is gone, the disk is full.
        """
        if not self.await_room(timeout_secs):
            return 0
        try:
            if self._socket is not None:
                return self._socket.send(data, socket.MSG_DONTWAIT)
            if self._waits and not self._open_again():
                return os.write(self._fd, data[: select.PIPE_BUF])
            return os.write(self._fd if self._own_fd is None else self._own_fd, data)
        except BlockingIOError:  # another writer took the room, or O_NONBLOCK was set on the inherited descriptor
            time.sleep(_PAUSE_SECS)
            return 0

    def _open_again(self) -> bool:
        """Open the file of the descriptor again, so that O_NONBLOCK can be set. Returns whether that is done."""
        status = os.fstat(self._fd)
        if self._own_file == (status.st_dev, status.st_ino):
            return True
        if not (stat.S_ISFIFO(status.st_mode) or stat.S_ISCHR(status.st_mode)):
            return False  # a regular file that is opened again would be written from its beginning
        try:
            fd = os.open(f"/proc/self/fd/{self._fd}", os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY)
        except OSError:
            return False
        self._own_file = (status.st_dev, status.st_ino)
        if self._own_fd is None:
            self._own_fd = fd
            weakref.finalize(self, os.close, fd)
        else:
            os.dup2(fd, self._own_fd, inheritable=False)
            os.close(fd)
        return True
