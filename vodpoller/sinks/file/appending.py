"""Appending whole, synced lines to a file that other processes may write to as well."""

import errno
import os
from contextlib import suppress
from pathlib import Path

from vodpoller.durable import Folders, make_folder, sync_folder
from vodpoller.sinks.file.damage import end_of_intact_part, may_be_ours
from vodpoller.sinks.file.lines import after_last_newline, is_object
from vodpoller.sinks.file.probing import check_kind


class Files:
    """The file system operations of the sink, in one place so that tests can record each or make it fail."""

    def make_folder(self, path: Path) -> None:
        """As durable.make_folder."""
        make_folder(path)

    def sync_folder(self, path: Path) -> None:
        """As durable.sync_folder."""
        sync_folder(path)

    def open(self, path: Path, flags: int) -> int:
        """As os.open; a new file gets mode 0640, less the umask."""
        return os.open(path, flags | os.O_CLOEXEC, 0o640)

    def write(self, fd: int, data: memoryview) -> int:
        """As os.write: fewer bytes than given may be written; returns their number."""
        return os.write(fd, data)

    def fdatasync(self, fd: int) -> None:
        """As os.fdatasync."""
        os.fdatasync(fd)

    def ftruncate(self, fd: int, length_bytes: int) -> None:
        """As os.ftruncate."""
        os.ftruncate(fd, length_bytes)

    def rename(self, path: Path, target: Path) -> None:
        """As os.rename."""
        path.rename(target)


class OpenFile:
    """A file open for appending, to which we append whole, synced lines only.

    Other processes may write to it at any time. Our lines always start at the beginning of a line, and bytes of other
    processes are never cut off. In one case lines of ours may be there twice: if another process writes in the short
    time between a failed append of ours and the moment when the failed lines are cut off.

    Args:
        path: The file, created if it does not exist.
        files: The file system.
        folders: Syncs the folder, so that the file's name is durable.

    Raises:
        OSError: The file cannot be opened, or is not a regular file.
    """

    def __init__(self, path: Path, files: Files, folders: Folders) -> None:
        self._path = path
        self._files = files
        # O_NONBLOCK: opening a named pipe must fail, not wait for a reader.
        self._fd = files.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK | os.O_NOCTTY)
        try:
            status = os.fstat(self._fd)
            check_kind(status.st_mode, path)
            # Always, not only for a new file: the process that created it may have died before this step.
            folders.sync(path.parent)
        except BaseException:
            os.close(self._fd)
            raise
        self.identity = (status.st_dev, status.st_ino)
        self.inode = status.st_ino
        self.changed_at = status.st_mtime
        self.end_bytes = status.st_size
        self._dirty = False

    @property
    def unlinked(self) -> bool:
        """Whether another process removed the file, so that lines written to it are lost."""
        return os.fstat(self._fd).st_nlink == 0

    def is_at(self, path: Path) -> bool:
        """Whether a path names this file; False if it names another file or none."""
        with suppress(FileNotFoundError):
            status = path.stat()
            return (status.st_dev, status.st_ino) == self.identity
        return False

    def prepare_append(self) -> int:
        """Read the size of the file, and cut off what a failed append left behind.

        Returns:
            Number of bytes that other processes have added since the last append; negative if they removed some.

        Raises:
            OSError: What a failed append left behind could not be cut off.
        """
        self.cut_back()
        size = os.fstat(self._fd).st_size
        by_others, self.end_bytes = size - self.end_bytes, size
        # From here on the file offset is the end of our last write. O_APPEND writes to the end of the file anyway.
        os.lseek(self._fd, size, os.SEEK_SET)
        return by_others

    def append(self, data: bytes) -> None:
        """Write and sync the lines, or leave the file as it was after `prepare_append`.

        Args:
            data: Whole lines.

        Raises:
            OSError: Nothing was appended. If a part of it could not be cut off, the next append tries again.
        """
        if not self._is_line_start(self.end_bytes):
            data = b"\n" + data
        self._dirty = True
        try:
            self._write(memoryview(data))
            start = os.lseek(self._fd, 0, os.SEEK_CUR) - len(data)
            if start != self.end_bytes and data[:1] != b"\n" and not self._is_line_start(start):
                # Another process has just written an unfinished line, and our first line continues it: write it again.
                self._write(memoryview(b"\n" + data[: data.index(b"\n") + 1]))
            # After a failed sync the kernel marks the pages as clean, and a second sync would succeed without writing
            # them. So the lines are cut off in this case, too, and the retry writes them anew.
            self._files.fdatasync(self._fd)
        except OSError:
            with suppress(OSError):
                self.cut_back()
            raise
        self._dirty = False
        self.end_bytes = os.lseek(self._fd, 0, os.SEEK_CUR)

    def _is_line_start(self, at: int) -> bool:
        return at == 0 or os.pread(self._fd, 1, at - 1) == b"\n"

    def _write(self, rest: memoryview) -> None:
        while rest:
            written = self._files.write(self._fd, rest)
            if written <= 0:
                raise OSError(errno.EIO, os.strerror(errno.EIO), str(self._path))
            rest = rest[written:]

    def cut_back(self) -> None:
        """Cut off what a failed append left behind, unless another process has written something after it."""
        if self._dirty:
            size = os.fstat(self._fd).st_size
            if size <= os.lseek(self._fd, 0, os.SEEK_CUR):
                # Another process may have emptied the file; ftruncate must not extend it with zeros.
                self._files.ftruncate(self._fd, min(self.end_bytes, size))
            self._dirty = False

    def repair_end(self, floor_bytes: int | None, *, was_ours: bool) -> int:
        """Cut off what a crash left of an unfinished line of ours; give any other unfinished last line a line end.

        Args:
            floor_bytes: All bytes before this offset are known to be intact; None if nothing is known of the file.
            was_ours: This sink has written to this path before.

        Returns:
            The length in bytes of an unfinished last line that is not one of ours; 0 if there was none.

        Raises:
            OSError: The file cannot be repaired, or it cannot be a file of this sink.
        """
        size = os.fstat(self._fd).st_size
        end = end_of_intact_part(self._fd, size, floor_bytes)
        start = after_last_newline(self._fd, end, min(floor_bytes or 0, end))
        if start < end and not start and not was_ours and not may_be_ours(self._fd):
            raise OSError(errno.EINVAL, "its content is not JSON lines, so it is not changed", str(self._path))
        if end < size:
            self._files.ftruncate(self._fd, end)
        is_foreign = start < end and not is_object(self._fd, start, end)
        if start < end:
            end += self._files.write(self._fd, memoryview(b"\n"))
        self._files.fdatasync(self._fd)
        self.end_bytes = end
        return end - 1 - start if is_foreign else 0

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)
