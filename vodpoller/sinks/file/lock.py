"""The lock file beside a file: what keeps other processes out, and what it notes."""

import os
import re
from pathlib import Path

from vodpoller.durable import take_lock


class Lock:
    """The lock file beside the file, which keeps other processes out.

    It also notes that another process cut the file, since a mark of before says nothing of the file as it is then: by
    chance there can be a line's end at the mark again. Between two marks, the note is the only sign of it.

    Args:
        path: The lock file.

    Raises:
        BlockingIOError: Another process has it.
        OSError: It cannot be opened, or its file system has no locks.
    """

    def __init__(self, path: Path) -> None:
        self._fd = take_lock(path)
        self._noted = _note_in(os.pread(self._fd, 100, 0))
        self._is_used = False

    def note(self, inode: int, size_bytes: int) -> None:
        """Note that others cut the file to this size.

        Raises:
            OSError: It cannot be noted.
        """
        if self._noted is not None and not self._is_used and self._noted[0] == inode:
            size_bytes = min(size_bytes, self._noted[1])
        self._write(b"%d %d\n" % (inode, size_bytes))
        self._noted, self._is_used = (inode, size_bytes), False

    def recall(self, inode: int) -> int | None:
        """For recovery: the smallest size to which others cut a file; None if they did not."""
        self._is_used = True
        return self._noted[1] if self._noted is not None and self._noted[0] == inode else None

    def forget(self) -> None:
        """After recovery: what it recalled is done with, for the mark is a new one."""
        if self._is_used and self._noted is not None:
            self._write(b"")
            self._noted = None

    def _write(self, text: bytes) -> None:
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, text, 0)
        os.fdatasync(self._fd)

    def close(self) -> None:
        """Let others have it."""
        os.close(self._fd)


def _note_in(text: bytes) -> tuple[int, int] | None:
    found = re.fullmatch(rb"(\d+) (\d+)\n", text)
    return (int(found[1]), int(found[2])) if found else None
