"""The lock file beside a file: it keeps other processes out, and records that the file was cut."""

import os
import re
from pathlib import Path

from vodpoller.durable import take_lock


class LockFile:
    """The lock file beside the file, which keeps other processes out.

    It also records that another process cut the file. An older mark is not valid then, even if by chance a line ends at
    its offset again. Until the next mark, this record is the only sign of the cut.

    Args:
        path: The lock file.

    Raises:
        BlockingIOError: Another process holds the lock.
        OSError: It cannot be opened, or its file system has no locks.
    """

    def __init__(self, path: Path) -> None:
        self._fd = take_lock(path)
        self._cut = _record_in(os.pread(self._fd, 100, 0))
        self._is_used = False

    def record_cut(self, inode: int, size_bytes: int) -> None:
        """Record that another process cut the file to this size.

        Raises:
            OSError: The record cannot be written.
        """
        if self._cut is not None and not self._is_used and self._cut[0] == inode:
            size_bytes = min(size_bytes, self._cut[1])
        self._write(b"%d %d\n" % (inode, size_bytes))
        self._cut, self._is_used = (inode, size_bytes), False

    def recorded_cut(self, inode: int) -> int | None:
        """For recovery: the smallest size to which other processes cut a file; None if they did not."""
        self._is_used = True
        return self._cut[1] if self._cut is not None and self._cut[0] == inode else None

    def clear_recorded_cut(self) -> None:
        """Delete a record that recovery has used: there is a newer mark."""
        if self._is_used and self._cut is not None:
            self._write(b"")
            self._cut = None

    def _write(self, text: bytes) -> None:
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, text, 0)
        os.fdatasync(self._fd)

    def close(self) -> None:
        """Release the lock."""
        os.close(self._fd)


def _record_in(text: bytes) -> tuple[int, int] | None:
    found = re.fullmatch(rb"(\d+) (\d+)\n", text)
    return (int(found[1]), int(found[2])) if found else None
