"""Events as JSON lines in a file. Rotation is left to logrotate: it renames the file, then sends SIGHUP.

A line counts once it is written and synced. Whatever goes wrong on the way is cut off again, so that the file holds
whole lines only, each of them once.
"""

import errno
import fcntl
import os
import re
import stat
import threading
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, assert_never

from pydantic import Field, field_validator

from vodpoller.delivery import Position, Sink
from vodpoller.errors import ConfigError, RejectedError, TransientError
from vodpoller.events import Event, decode_json, event_key
from vodpoller.sinks import SinkConfig, cloudevent_key, encode

_BATCH_EVENTS = 1024
_BLOCK_BYTES = 1 << 16
# Far beyond any event: what is longer was not written here, and must not be read into memory.
_LINE_MAX_BYTES = 1 << 26
_CLOSE_WAIT_SECS = 1.0
# A file that is renamed this often while it is looked for is not logrotate's.
_RENAMES_MAX = 3
# What logrotate puts behind a name, with and without dateext.
_ROTATED = re.compile(r"[.-]\d+")
# A rotated file that was compressed has a new inode: it can neither be recognised nor read.
_NEVER_RELATIVES = (".lock", ".gz", ".bz2", ".xz", ".zst")

_PASSING = (errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE, errno.ENOMEM)
_HINTS = {
    errno.EACCES: "the user that runs vodpoller needs the right to write there",
    errno.EPERM: "the user that runs vodpoller needs the right to write there",
    errno.EISDIR: "give the path of a file, not of a folder",
    errno.ENOTDIR: "a part of the path is a file, not a folder",
    errno.ENOSPC: "free space on that disk",
    errno.EDQUOT: "free space, or raise the quota",
    errno.EROFS: "that disk is mounted read-only; under systemd see ReadWritePaths= and StateDirectory=",
    errno.EIO: "the disk fails: see dmesg",
    errno.ENXIO: "give the path of a regular file",
}


class FileConfig(SinkConfig):
    """A file of JSON lines."""

    type: Literal["file"] = Field(description="Events are appended to a file, one JSON document a line.")
    path: Annotated[str, Field(min_length=1, max_length=4096)] = Field(
        description="The file; relative to the working directory where it is not absolute. Missing folders are made.",
        examples=["/var/lib/vodpoller/events.jsonl"],
    )

    @field_validator("path")
    @classmethod
    def _names_a_file(cls, value: str) -> str:
        if "\0" in value:
            raise ValueError("a path cannot hold a NUL character")
        if value.endswith("/"):
            raise ValueError(f"{value} names a folder (add the name of the file)")
        return value

    def claims(self) -> frozenset[str]:
        """The file, however it is spelled."""
        return frozenset({"file:" + os.path.realpath(self.path)})


class Files:
    """What the sink does to the file system, so that tests can let each step fail or record it."""

    def make_folder(self, path: Path) -> None:
        """Make a folder of mode 0750, less the umask; somebody else may just have made it."""
        path.mkdir(0o750, exist_ok=True)

    def sync_folder(self, path: Path) -> None:
        """Make the names in a folder survive a loss of power."""
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def open(self, path: Path, flags: int) -> int:
        """As os.open; a new file gets mode 0640, less the umask."""
        return os.open(path, flags | os.O_CLOEXEC, 0o640)

    def write(self, fd: int, data: memoryview) -> int:
        """As os.write: the number of bytes written may be less than all."""
        return os.write(fd, data)

    def fdatasync(self, fd: int) -> None:
        """As os.fdatasync."""
        os.fdatasync(fd)

    def ftruncate(self, fd: int, length_bytes: int) -> None:
        """As os.ftruncate."""
        os.ftruncate(fd, length_bytes)


class _OpenFile:
    """A file open for appending, that grows by whole, synced appends only.

    Args:
        path: Created where it does not exist.
        files: The file system.

    Raises:
        OSError: It cannot be opened, or is no regular file.
    """

    def __init__(self, path: Path, files: Files) -> None:
        self._path = path
        self._files = files
        # O_NONBLOCK: opening a named pipe must fail, not wait for a reader.
        self._fd = files.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK | os.O_NOCTTY)
        try:
            status = _regular(self._fd, path)
            # Always, not only for a new file: whoever created it may have died before this step.
            files.sync_folder(path.parent)
        except BaseException:
            os.close(self._fd)
            raise
        self.identity = (status.st_dev, status.st_ino)
        self.inode = status.st_ino
        self.end_bytes = status.st_size
        self._dirty = False

    @property
    def unlinked(self) -> bool:
        """Whether somebody removed the file: what is written to it is lost."""
        return os.fstat(self._fd).st_nlink == 0

    def append(self, data: bytes) -> None:
        """Write and sync, or leave the file as it was.

        Args:
            data: Whole lines.

        Raises:
            OSError: Nothing was appended. A tail that could not be cut off is cut off before the next append.
        """
        self.cut_back()
        # Asked each time: an operator may have emptied the file, and cutting back must not fill it up with zeros.
        self.end_bytes = os.fstat(self._fd).st_size
        self._dirty = True
        try:
            self._write(memoryview(data))
            # After a failed sync the kernel takes the pages for clean, and a second sync would succeed without having
            # written them. So the lines are cut off as well, and written anew by the retry.
            self._files.fdatasync(self._fd)
        except OSError:
            with suppress(OSError):
                self.cut_back()
            raise
        self._dirty = False
        self.end_bytes += len(data)

    def _write(self, rest: memoryview) -> None:
        while rest:
            written = self._files.write(self._fd, rest)
            if written <= 0:
                raise OSError(errno.EIO, os.strerror(errno.EIO), str(self._path))
            rest = rest[written:]

    def cut_back(self) -> None:
        """Cut off what a failed append left behind."""
        if self._dirty:
            self._files.ftruncate(self._fd, min(self.end_bytes, os.fstat(self._fd).st_size))
            self._dirty = False

    def cut_torn_tail(self, floor_bytes: int | None) -> None:
        """Cut off what a crash left behind: bytes after the last newline, zeros, a last line that holds zeros.

        Args:
            floor_bytes: What lies before is known to be whole; None where nothing is known of the file.

        Raises:
            OSError: It cannot be cut off, or nothing in the file can be from here.
        """
        size = os.fstat(self._fd).st_size
        end = _end_of_sound_lines(self._fd, size, floor_bytes)
        if not end and not _may_be_ours(self._fd):
            raise OSError(
                errno.EINVAL, "it holds something else than JSON lines, and is left as it is", str(self._path)
            )
        if end < size:
            self._files.ftruncate(self._fd, end)
            self._files.fdatasync(self._fd)
        self.end_bytes = end

    def sync(self) -> None:
        """Make all that is in the file survive a loss of power."""
        self._files.fdatasync(self._fd)

    def close(self) -> None:
        """Close it."""
        os.close(self._fd)


@dataclass(frozen=True, slots=True)
class _Stretch:
    """The lines of one file from an offset on; by inode, since a rename can come at any time."""

    inode: int
    start_bytes: int


@dataclass(frozen=True, slots=True)
class _Relative:
    """The file itself, or what may be a rotated one: `x.jsonl.1`, `x.jsonl-20261123`."""

    path: str
    changed_at_ns: int


class FileSink(Sink):
    """Appends events to a file.

    A lock file beside it keeps other processes out. The file is found by its real path at the start: a symbolic link
    that is changed later is not followed.

    Args:
        name: Of the sink.
        config: Its settings.
        files: The file system.

    Raises:
        ConfigError: The file cannot be opened, or another process has it.
        TransientError: The disk is full or failing.
    """

    Config = FileConfig

    def __init__(self, name: str, config: FileConfig, *, files: Files | None = None) -> None:
        self.concurrency = 1
        self.batch_events = _BATCH_EVENTS
        self.timeout_secs = 10.0
        self._name = name
        self._format = config.format
        self._path = Path(os.path.realpath(config.path))
        self._files = files or Files()
        self._lock = threading.Lock()
        self._reopen_wanted = False
        self._tail_checked = False
        self._closed = False
        try:
            self._make_folders()
            self._lock_fd = self._keep_others_out()
            try:
                self._file = _OpenFile(self._path, self._files)
            except BaseException:
                os.close(self._lock_fd)
                raise
        except OSError as error:
            raise self._failure(error, "cannot be opened") from error
        self._position = self._end()

    @classmethod
    def probe(cls, name: str, config: Any) -> str:
        """Whether the file can be written, or made, and whether another process has it."""
        path = Path(os.path.realpath(config.path))
        try:
            return _look_at(path, Path(f"{path}.lock"))
        except OSError as error:
            problem = f"{_place(error, path)} cannot be written: {_why(error)}"
            raise ConfigError([f"sinks.{name}.path: {problem}"]) from error

    def deliver(self, events: Sequence[Event], timeout_secs: float) -> None:  # noqa: ARG002 - see below
        """Append the events: one write, one sync.

        The time limit cannot be kept: Linux has no way to give up a write to a disk that does not answer.
        """
        data = b"".join(map(self._line, events))
        with self._lock:
            try:
                self._writable_file().append(data)
            except OSError as error:
                raise TransientError(f"{self._path}: nothing was written: {_why(error)}") from error
            self._position = self._end()
            self._reopen_if_wanted()

    def reopen(self) -> None:
        """Open the path again, at once or, where an append is running, after it."""
        self._reopen_wanted = True
        if self._lock.acquire(blocking=False):
            try:
                self._reopen_if_wanted()
            finally:
                self._lock.release()

    def close(self) -> None:
        """Close the file and let others have it. A write that hangs is not waited for."""
        if not self._lock.acquire(timeout=_CLOSE_WAIT_SECS):
            return
        try:
            if not self._closed:
                self._closed = True
                self._file.close()
                os.close(self._lock_fd)
        finally:
            self._lock.release()

    def position(self) -> Position:
        """Where the last accepted line ends, and in which file; after `recover`, where the file ends."""
        return self._position

    def recover(self, mark: Position | None, sub_app_ids: Collection[int | None]) -> Iterable[bytes]:
        """Repair the file's end, and name what lies beyond the mark.

        The repair is done by the call, the reading while the keys are taken. All that the keys are taken from is
        synced first, since a process that was killed may have left lines that no disk holds yet.

        Raises:
            ConfigError: The files cannot be read or repaired.
            TransientError: The disk is full or failing.
        """
        try:
            with self._lock:
                stretches = self._beyond(mark)
                starts = {found.inode: found.start_bytes for found in stretches}
                self._file.cut_torn_tail(_floor(mark, self._file.inode, starts))
                self._tail_checked = True
                self._file.sync()
                self._position = self._end()
                self._repair_rotated(mark, starts)
        except OSError as error:
            raise self._failure(error, "cannot be read and repaired") from error
        return self._keys(stretches, tuple(sub_app_ids))

    # --- opening ---

    def _make_folders(self) -> None:
        missing = []
        folder = self._path.parent
        while not folder.is_dir():
            missing.append(folder)
            folder = folder.parent
        for new in reversed(missing):
            self._files.make_folder(new)
            self._files.sync_folder(new.parent)

    def _keep_others_out(self) -> int:
        lock_path = f"{self._path}.lock"
        fd = os.open(lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            raise self._config_error(
                f"another process writes to {self._path} (stop it, or give each its own file;"
                f" `fuser -v {lock_path}` shows which process it is)"
            ) from None
        except BaseException:
            os.close(fd)
            raise
        return fd

    def _reopen_if_wanted(self) -> None:
        """Reopen where that was asked for; what fails is tried again, and reported, by the next append."""
        if self._reopen_wanted and not self._closed:
            with suppress(OSError):
                self._reopen_now()

    def _reopen_now(self) -> None:
        # Taken down first: a request that comes while this runs must not be lost.
        self._reopen_wanted = False
        try:
            self._file.cut_back()
            self._make_folders()
            # Opened before the old one is closed, so that the new file cannot get the inode that the mark may name.
            fresh = _OpenFile(self._path, self._files)
            if fresh.identity == self._file.identity:
                fresh.close()
                return
            try:
                fresh.cut_torn_tail(None)
            except BaseException:
                fresh.close()
                raise
            self._file.close()
            self._file = fresh
        except BaseException:
            self._reopen_wanted = True
            raise

    def _writable_file(self) -> _OpenFile:
        if self._closed:
            raise TransientError(f"{self._path}: the sink is closed")
        if not self._tail_checked:
            self._file.cut_torn_tail(None)
            self._tail_checked = True
        if self._reopen_wanted or self._file.unlinked:
            self._reopen_now()
        return self._file

    def _end(self) -> Position:
        return Position(inode=self._file.inode, offset_bytes=self._file.end_bytes)

    def _line(self, event: Event) -> bytes:
        body = encode(event, self._format)
        if b"\n" in body:
            raise RejectedError("the body holds a raw newline, so it is no JSON line")
        return body + b"\n"

    # --- what was written and never reached the ledger ---

    def _beyond(self, mark: Position | None) -> list[_Stretch]:
        """What to read, oldest first."""
        current = _Stretch(self._file.inode, 0)
        if mark is None:
            return [current]
        start_bytes = self._start_after(mark)
        if mark.inode == current.inode:
            return [_Stretch(mark.inode, start_bytes)]
        relatives = self._relatives()
        marked = relatives.pop(mark.inode, None)
        if marked is None:
            return [current]
        # Rotated more than once: whatever was last written to after the marked file is read whole. A file too many
        # does no harm.
        relatives.pop(current.inode, None)
        times = {inode: relative.changed_at_ns for inode, relative in relatives.items()}
        younger = [inode for inode in sorted(times, key=times.__getitem__) if times[inode] >= marked.changed_at_ns]
        return [_Stretch(mark.inode, start_bytes), *(_Stretch(inode, 0) for inode in younger), current]

    def _start_after(self, mark: Position) -> int:
        """Where the unknown lines start: at the mark, or at 0 where the file cannot be the one that was marked.

        A mark stands at the end of a line. A file that is shorter, or has no line end there, was emptied or replaced.
        """
        fd = self._open_inode(mark.inode)
        if fd is None:
            return 0
        try:
            known = mark.offset_bytes > 0 and os.pread(fd, 1, mark.offset_bytes - 1) == b"\n"
        finally:
            os.close(fd)
        return mark.offset_bytes if known else 0

    def _relatives(self) -> dict[int, _Relative]:
        """The files that may hold our lines, by inode."""
        name = self._path.name
        found = {}
        with os.scandir(self._path.parent) as entries:
            for entry in entries:
                if entry.name.startswith(name) and not entry.name.endswith(_NEVER_RELATIVES):
                    with suppress(FileNotFoundError):  # renamed or removed a moment ago
                        status = entry.stat(follow_symlinks=False)
                        if stat.S_ISREG(status.st_mode):
                            found[status.st_ino] = _Relative(entry.path, status.st_mtime_ns)
        return found

    def _open_inode(self, inode: int, flags: int = os.O_RDONLY) -> int | None:
        """A descriptor for a file, whatever it is called by now; None where it is gone."""
        for _ in range(_RENAMES_MAX):
            relative = self._relatives().get(inode)
            if relative is None:
                return None
            with suppress(FileNotFoundError):
                fd = os.open(relative.path, flags | os.O_CLOEXEC)
                if os.fstat(fd).st_ino == inode:
                    return fd
                os.close(fd)
        return None

    def _repair_rotated(self, mark: Position | None, starts: Mapping[int, int]) -> None:
        """Sync the files that were rotated away, and cut off what is torn: it may have been renamed after the crash."""
        relatives = self._relatives()
        for inode in starts:
            fd = None if inode == self._file.inode else self._open_inode(inode)
            if fd is not None:
                try:
                    is_marked = mark is not None and inode == mark.inode
                    if is_marked or (inode in relatives and _is_rotated(self._path, relatives[inode].path)):
                        self._cut_rotated(fd, _floor(mark, inode, starts))
                    self._files.fdatasync(fd)
                finally:
                    os.close(fd)

    def _cut_rotated(self, readable_fd: int, floor_bytes: int | None) -> None:
        status = os.fstat(readable_fd)
        end = _end_of_sound_lines(readable_fd, status.st_size, floor_bytes)
        if end == status.st_size or not _may_be_ours(readable_fd):
            return
        # Whoever rotated it may have taken the right to write away: a torn line in it is no reason not to start.
        with suppress(PermissionError):
            fd = self._open_inode(status.st_ino, os.O_RDWR)
            if fd is not None:
                try:
                    self._files.ftruncate(fd, end)
                finally:
                    os.close(fd)

    def _keys(self, stretches: Iterable[_Stretch], sub_app_ids: Sequence[int | None]) -> Iterator[bytes]:
        try:
            for stretch in stretches:
                fd = self._open_inode(stretch.inode)
                if fd is not None:
                    for line in _lines_from(fd, stretch.start_bytes):
                        yield from self._keys_of_line(line, sub_app_ids)
        except OSError as error:
            raise self._failure(error, "cannot be read and repaired") from error

    def _keys_of_line(self, line: bytes, sub_app_ids: Iterable[int | None]) -> Iterator[bytes]:
        if b"\0" in line:  # zeros that a crash left; the reader of JSON would let them pass inside a string
            return
        try:
            content = decode_json(line.decode())
        except ValueError:
            return
        if not isinstance(content, dict):
            return
        match self._format:
            case "callback":
                for sub_app_id in sub_app_ids:
                    yield event_key(content, sub_app_id)
            case "cloudevents":
                if (key := cloudevent_key(content)) is not None:
                    yield key
            case _:
                assert_never(self._format)

    # --- saying what is wrong ---

    def _config_error(self, problem: str) -> ConfigError:
        return ConfigError([f"sinks.{self._name}.path: {problem}"])

    def _failure(self, error: OSError, what: str) -> ConfigError | TransientError:
        """What stopped the start: a mistake that stays until somebody mends it, or a disk's trouble that may pass."""
        problem = f"{_place(error, self._path)} {what}: {_why(error)}"
        if error.errno in _PASSING:
            return TransientError(f"sinks.{self._name}.path: {problem}")
        return self._config_error(problem)


def _regular(fd: int, path: Path) -> os.stat_result:
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.ENXIO, "it is not a regular file", str(path))
    return status


def _look_at(path: Path, lock_path: Path) -> str:
    """What would come of opening the file, without doing it."""
    folder = _existing_folder(path)
    exists, lock_exists = path.exists(), lock_path.exists()
    # It must be readable, too: opening it is how it is synced.
    _allow(folder, os.R_OK | os.X_OK | (0 if exists and lock_exists else os.W_OK))
    if exists:
        if not path.is_file():
            raise OSError(errno.ENXIO, "it is not a regular file", str(path))
        _allow(path, os.R_OK | os.W_OK)
    if lock_exists and _is_locked(lock_path):
        return f"{path} is in use by another process (the running daemon?)"
    return f"{path} can be {'written' if exists else 'made'}"


def _existing_folder(path: Path) -> Path:
    """The nearest one above the path."""
    folder = path.parent
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir():
        raise OSError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder))
    return folder


def _allow(path: Path, mode: int) -> None:
    """Raise the OSError that this user would get."""
    if not os.access(path, mode):
        read_only = bool(os.statvfs(path).f_flag & os.ST_RDONLY)
        number = errno.EROFS if read_only else errno.EACCES
        raise OSError(number, os.strerror(number), str(path))


def _is_locked(lock_path: Path) -> bool:
    """Whether another process has the lock. It is taken for a moment to find out, shared with others who look."""
    _allow(lock_path, os.R_OK | os.W_OK)
    fd = os.open(lock_path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


def _place(error: OSError, path: Path) -> str:
    return str(error.filename or path)


def _why(error: OSError) -> str:
    why = error.strerror or str(error)
    hint = _HINTS.get(error.errno or 0)
    return f"{why} ({hint})" if hint else why


def _lines_from(fd: int, start_bytes: int) -> Iterator[bytes]:
    """The whole lines from an offset on, one at a time; closes the descriptor."""
    with open(fd, "rb") as file:
        file.seek(start_bytes)
        skipping = False
        while line := file.readline(_LINE_MAX_BYTES):
            ends = line.endswith(b"\n")
            if ends and not skipping:
                yield line
            skipping = not ends


def _may_be_ours(fd: int) -> bool:
    """Whether a file starts as ours do, or as one that a crash has left."""
    return os.pread(fd, 1, 0) in (b"{", b"\0", b"")


def _is_rotated(path: Path, relative: str) -> bool:
    """Whether a name is one that logrotate gives, and not that of a copy somebody made."""
    return _ROTATED.fullmatch(Path(relative).name.removeprefix(path.name)) is not None


def _floor(mark: Position | None, inode: int, starts: Mapping[int, int]) -> int | None:
    """Up to where a file is known to be whole; None where nothing is known of it."""
    is_marked = mark is not None and mark.inode == inode and mark.offset_bytes == starts.get(inode)
    return starts[inode] if is_marked else None


def _end_of_sound_lines(fd: int, size: int, floor: int | None) -> int:
    """Where the lines end that a crash left whole.

    Blocks that were not synced reach the disk in any order, so zeros may lie before whole lines. Those were not synced
    either, hence nobody took them for accepted, and they are cut off as well: their events come again. Where nothing is
    known of the file, older lines may stand there, and only its end is looked at.
    """
    known = min(floor or 0, size)
    end = _end_of_whole_lines(fd, size, known)
    return end if floor is None else _end_before_zeros(fd, known, end)


def _end_before_zeros(fd: int, start: int, end: int) -> int:
    """Where the first line begins that holds zeros; `end` where none does."""
    at = start
    while at < end and (block := os.pread(fd, min(_BLOCK_BYTES, end - at), at)):
        found = block.find(b"\0")
        if found >= 0:
            return _after_last_newline(fd, at + found, start)
        at += len(block)
    return end


def _end_of_whole_lines(fd: int, end: int, floor: int) -> int:
    """Where the last whole line ends that holds no zeros; a file system may show zeros where a crash lost data."""
    while True:
        end = _after_last_newline(fd, _before_zeros(fd, end, floor), floor)
        start = _after_last_newline(fd, end - 1, floor)
        if not any(b"\0" in block for _, block in _blocks_backwards(fd, end, start)):
            return end
        end = start


def _before_zeros(fd: int, end: int, floor: int) -> int:
    for start, block in _blocks_backwards(fd, end, floor):
        kept_bytes = len(block.rstrip(b"\0"))
        if kept_bytes:
            return start + kept_bytes
    return floor


def _after_last_newline(fd: int, end: int, floor: int) -> int:
    for start, block in _blocks_backwards(fd, end, floor):
        found = block.rfind(b"\n")
        if found >= 0:
            return start + found + 1
    return floor


def _blocks_backwards(fd: int, end: int, floor: int) -> Iterator[tuple[int, bytes]]:
    while end > floor:
        start = max(floor, end - _BLOCK_BYTES)
        yield start, os.pread(fd, end - start, start)
        end = start
