"""Events as JSON lines in a file. Rotation is left to logrotate: it renames the file, then sends SIGHUP.

A line counts once it is written and synced. Whatever goes wrong on the way is cut off again, so that the file holds
whole lines only, each of them once. What another process writes to it is kept, and is never on a line of ours.
"""

import errno
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

from vodpoller.durable import (
    Folders,
    is_locked,
    kind_of_file,
    make_folder,
    may_pass,
    sync_folder,
    take_lock,
    why,
)
from vodpoller.errors import ConfigError, RejectedError, TransientError
from vodpoller.events import Event, decode_json, event_key
from vodpoller.identity import has_own_id
from vodpoller.journal.contract import Portion, Position
from vodpoller.logs import Repeats, SinkLog
from vodpoller.sinks.contract import Sink, SinkConfig
from vodpoller.sinks.formats import cloudevent_key, encode

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

# What no line of ours holds: control characters, which JSON escapes, and bytes that UTF-8 does not have.
_NEVER_OURS = re.compile(rb"[\x01-\x1f\xc0\xc1\xf5-\xff]")
# What is outside of texts in the beginning of a JSON object as `encode` writes it, without blanks.
_SKELETON = re.compile(rb"[\[\]{}:,+.0-9eE-]*(?:t|tr|tru|f|fa|fal|fals|n|nu|nul)?")

# What a portion of recovery holds at most: a third of a second's work, and a few MB of memory.
_PORTION_KEYS = 10_000
_PORTION_BYTES = 1 << 24

_STREAMS = re.compile(r"/dev/(stdin|stdout|stderr|fd/.*)|/proc/(self|thread-self|\d+)/(task/\d+/)?fd/.*")
_INSTEAD = {
    "a named pipe": 'use a sink of type "exec" with a program that writes to it, or type "stdout"',
    "a socket": 'use a sink of type "webhook" or "exec"',
    "a device": 'for standard output a sink of type "stdout"',
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
        if _STREAMS.fullmatch(os.path.normpath(value)) or _STREAMS.fullmatch(os.path.realpath(value)):
            raise ValueError(
                f'{value} is a stream, and what is in it cannot be synced (for standard output write type = "stdout"'
                " and no path; standard error is the log's)"
            )
        return value

    def claims(self) -> frozenset[str]:
        """The file, however it is spelled."""
        return frozenset({"file:" + os.path.realpath(self.path)})


class Files:
    """What the sink does to the file system, so that tests can let each step fail or record it."""

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
        """As os.write: the number of bytes written may be less than all."""
        return os.write(fd, data)

    def fdatasync(self, fd: int) -> None:
        """As os.fdatasync."""
        os.fdatasync(fd)

    def ftruncate(self, fd: int, length_bytes: int) -> None:
        """As os.ftruncate."""
        os.ftruncate(fd, length_bytes)


class _OpenFile:
    """A file open for appending, to which we add whole, synced lines only.

    Other processes may write to it at any time. All that we write starts at the beginning of a line, and of what they
    wrote nothing is cut off, with one exception: what they write between a failed append and its being cut off, which
    is at once, may be between lines of ours that then come twice.

    Args:
        path: Created where it does not exist.
        files: The file system.
        folders: Syncs the file's name.

    Raises:
        OSError: It cannot be opened, or is no regular file.
    """

    def __init__(self, path: Path, files: Files, folders: Folders) -> None:
        self._path = path
        self._files = files
        # O_NONBLOCK: opening a named pipe must fail, not wait for a reader.
        self._fd = files.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK | os.O_NOCTTY)
        try:
            status = os.fstat(self._fd)
            _check_kind(status.st_mode, path)
            # Always, not only for a new file: whoever created it may have died before this step.
            folders.sync(path.parent)
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

    def look(self) -> int:
        """Look at the file before an append, and cut off what a failed one left behind.

        Returns:
            How many bytes other processes have added since the last append; negative if they took some away.

        Raises:
            OSError: The tail could not be cut off.
        """
        self.cut_back()
        size = os.fstat(self._fd).st_size
        by_others, self.end_bytes = size - self.end_bytes, size
        # From here on it says where our last write ended: the kernel appends wherever it stands.
        os.lseek(self._fd, size, os.SEEK_SET)
        return by_others

    def append(self, data: bytes) -> None:
        """Write and sync, or leave the file as it was at the last `look`.

        Args:
            data: Whole lines.

        Raises:
            OSError: Nothing was appended. A tail that could not be cut off is cut off before the next append.
        """
        if not self._is_line_start(self.end_bytes):
            data = b"\n" + data
        self._dirty = True
        try:
            self._write(memoryview(data))
            start = os.lseek(self._fd, 0, os.SEEK_CUR) - len(data)
            if start != self.end_bytes and data[:1] != b"\n" and not self._is_line_start(start):
                # Another process wrote a piece of a line just now, and our first line stands behind it: once more.
                self._write(memoryview(b"\n" + data[: data.index(b"\n") + 1]))
            # After a failed sync the kernel takes the pages for clean, and a second sync would succeed without having
            # written them. So the lines are cut off as well, and written anew by the retry.
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
        """Cut off what a failed append left behind, unless another process has written something behind that."""
        if self._dirty:
            size = os.fstat(self._fd).st_size
            if size <= os.lseek(self._fd, 0, os.SEEK_CUR):
                # It may have been emptied, and must not be filled up with zeros.
                self._files.ftruncate(self._fd, min(self.end_bytes, size))
            self._dirty = False

    def repair_end(self, floor_bytes: int | None, *, was_ours: bool) -> int:
        """Cut off what a crash left behind of a line of ours, and let everything else end with its line.

        Args:
            floor_bytes: What lies before is known to be whole; None where nothing is known of the file.
            was_ours: This path has been written to by this sink before.

        Returns:
            The length of a last line that was not finished and is none of ours, in bytes; 0 if there was none.

        Raises:
            OSError: It cannot be repaired, or nothing in the file can be from here.
        """
        size = os.fstat(self._fd).st_size
        end = _end_of_sound(self._fd, size, floor_bytes)
        start = _after_last_newline(self._fd, end, min(floor_bytes or 0, end))
        if start < end and not start and not was_ours and not _may_be_ours(self._fd):
            raise OSError(
                errno.EINVAL, "it holds something else than JSON lines, and is left as it is", str(self._path)
            )
        if end < size:
            self._files.ftruncate(self._fd, end)
        is_foreign = start < end and not _is_object(self._fd, start, end)
        if start < end:
            end += self._files.write(self._fd, memoryview(b"\n"))
        self._files.fdatasync(self._fd)
        self.end_bytes = end
        return end - 1 - start if is_foreign else 0

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


class _Lock:
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
        """For recovery: to which size, at the least, others cut a file; None if they did not."""
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
        self._folders = Folders(self._warn, make=self._files.make_folder, sync=self._files.sync_folder)
        self._log = SinkLog(__name__)
        self._repeats = Repeats(self._log)
        self._lock = threading.Lock()
        self._reopen_wanted = False
        self._tail_checked = False
        self._closed = False
        try:
            _refuse_what_is_no_file(self._path)
            self._folders.make(self._path.parent)
            self._others = self._keep_others_out()
            try:
                self._file = self._open()
            except BaseException:
                self._others.close()
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
            problem = f"{_place(error, path)} cannot be written: {why(error)}"
            raise ConfigError([f"sinks.{name}.path: {problem}"]) from error

    def deliver(self, events: Sequence[Event], timeout_secs: float) -> None:  # noqa: ARG002 - see below
        """Append the events: one write, one sync.

        The time limit cannot be kept: Linux has no way to give up a write to a disk that does not answer.
        """
        data = b"".join(map(self._line, events))
        with self._lock:
            try:
                file = self._writable_file()
                self._notice(file, file.look())
                file.append(data)
            except OSError as error:
                raise TransientError(f"{self._path}: nothing was written: {why(error)}") from error
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
                self._others.close()
        finally:
            self._lock.release()

    def position(self) -> Position:
        """Where the last accepted line ends, and in which file; after `recover`, where the file ends."""
        return self._position

    def recover(self, mark: Position | None, sub_app_ids: Collection[int | None]) -> Iterable[Portion]:
        """Repair the file's end, and name what lies beyond the mark.

        The repair is done by the call, the reading while the portions are taken. All that the keys are taken from is
        synced first, since a process that was killed may have left lines that no disk holds yet.

        A last line without its end is cut off if it looks like the beginning of one of ours; its event comes again.
        Any other gets its end and stays.

        Raises:
            ConfigError: The files cannot be read or repaired.
            TransientError: The disk is full or failing.
        """
        try:
            with self._lock:
                stretches = self._beyond(mark, None if mark is None else self._others.recall(mark.inode))
                starts = {found.inode: found.start_bytes for found in stretches}
                unfinished_bytes = self._file.repair_end(
                    _floor(mark, self._file.inode, starts), was_ours=mark is not None
                )
                self._tail_checked = True
                self._position = self._end()
                self._repair_rotated(mark, starts)
        except OSError as error:
            raise self._failure(error, "cannot be read and repaired") from error
        is_told = self._say_added(unfinished_bytes)
        return self._portions(stretches, tuple(sub_app_ids), end=self._position, is_told=is_told)

    # --- opening ---

    def _open(self) -> _OpenFile:
        return _OpenFile(self._path, self._files, self._folders)

    def _keep_others_out(self) -> _Lock:
        lock_path = f"{self._path}.lock"
        try:
            return _Lock(Path(lock_path))
        except BlockingIOError:
            raise self._config_error(
                f"another process writes to {self._path} (stop it, or give each its own file;"
                f" `fuser -v {lock_path}` shows which process it is)"
            ) from None

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
            self._folders.make(self._path.parent)
            # Opened before the old one is closed, so that the new file cannot get the inode that the mark may name.
            fresh = self._open()
            if fresh.identity == self._file.identity:
                fresh.close()
                return
            self._file.close()
            self._file = fresh
        except BaseException:
            self._reopen_wanted = True
            raise

    def _writable_file(self) -> _OpenFile:
        if self._closed:
            raise TransientError(f"{self._path}: the sink is closed")
        if not self._tail_checked:
            self._say_added(self._file.repair_end(None, was_ours=False))
            self._tail_checked = True
        if self._reopen_wanted or self._file.unlinked:
            self._reopen_now()
        return self._file

    def _notice(self, file: _OpenFile, by_others_bytes: int) -> None:
        """Say what other processes did to the file since the last append; before the next one."""
        self._others.forget()
        if by_others_bytes < 0:
            self._others.note(file.inode, file.end_bytes)
            self._say_changed(
                "cut", f"another process cut {-by_others_bytes} bytes off it", "is it rotated with copytruncate?"
            )
        else:
            self._say_added(by_others_bytes)

    def _say_added(self, added_bytes: int) -> bool:
        if added_bytes:
            self._say_changed(
                "added",
                f"another process wrote {added_bytes} bytes to it, which are kept",
                "give each program a file of its own",
            )
        return bool(added_bytes)

    def _say_changed(self, cause: str, what: str, hint: str) -> None:
        self._repeats.say(
            "warning", "file.changed", cause=cause, sink=self._name, path=str(self._path), message=what, hint=hint
        )

    def _end(self) -> Position:
        return Position(inode=self._file.inode, offset_bytes=self._file.end_bytes)

    def _line(self, event: Event) -> bytes:
        body = encode(event, self._format)
        if b"\n" in body:
            raise RejectedError("the body holds a raw newline, so it is no JSON line")
        return body + b"\n"

    # --- what was written and never reached the ledger ---

    def _beyond(self, mark: Position | None, cut_to: int | None) -> list[_Stretch]:
        """What to read, oldest first.

        Args:
            mark: As for `recover`.
            cut_to: To which size others cut the marked file since, if they did.
        """
        current = _Stretch(self._file.inode, 0)
        if mark is None:
            return [current]
        start_bytes = self._start_after(mark)
        if cut_to is not None:
            start_bytes = min(start_bytes, cut_to)
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
        """Sync the files that were rotated away, and mend their ends: they may have been renamed after the crash."""
        relatives = self._relatives()
        for inode in starts:
            fd = None if inode == self._file.inode else self._open_inode(inode)
            if fd is not None:
                try:
                    is_marked = mark is not None and inode == mark.inode
                    if is_marked or (inode in relatives and _is_rotated(self._path, relatives[inode].path)):
                        self._mend_rotated(fd, _floor(mark, inode, starts))
                    self._files.fdatasync(fd)
                finally:
                    os.close(fd)

    def _mend_rotated(self, readable_fd: int, floor_bytes: int | None) -> None:
        status = os.fstat(readable_fd)
        end = _end_of_sound(readable_fd, status.st_size, floor_bytes)
        start = _after_last_newline(readable_fd, end, min(floor_bytes or 0, end))
        lacks_its_end = start < end and _is_object(readable_fd, start, end)
        if (end == status.st_size and not lacks_its_end) or not _may_be_ours(readable_fd):
            return
        # The right to write may have been taken away when it was rotated: that is no reason not to start.
        with suppress(PermissionError):
            fd = self._open_inode(status.st_ino, os.O_RDWR | os.O_APPEND)
            if fd is not None:
                try:
                    if end < status.st_size:
                        self._files.ftruncate(fd, end)
                    if lacks_its_end:
                        self._files.write(fd, memoryview(b"\n"))
                finally:
                    os.close(fd)

    def _portions(
        self,
        stretches: Sequence[_Stretch],
        sub_app_ids: Sequence[int | None],
        *,
        end: Position,
        is_told: bool,
    ) -> Iterator[Portion]:
        """Read the stretches, a portion at a time.

        Args:
            stretches: What to read, oldest first.
            sub_app_ids: As for `recover`.
            end: Where the last portion ends.
            is_told: It has been said that another process wrote to the file.
        """
        keys: list[bytes] = []
        content_keys: list[list[bytes]] = []  # of lines that do not say which event they are of
        total_bytes = read_bytes = portion_bytes = foreign_bytes = 0
        try:
            total_bytes = sum(map(self._unread_bytes, stretches))
            for stretch in stretches:
                fd = self._open_inode(stretch.inode)
                at = stretch.start_bytes
                for line in _pieces_from(fd, at) if fd is not None else ():
                    at += len(line)
                    read_bytes += len(line)
                    portion_bytes += len(line)
                    content = _object(line)
                    if content is None and line.strip():  # an empty one is what we put between us and another process
                        foreign_bytes += len(line)
                    elif content is not None and self._format == "callback" and not has_own_id(content):
                        content_keys.append([event_key(content, sub_app_id) for sub_app_id in sub_app_ids])
                    elif content is not None:
                        keys += self._keys_in(content, sub_app_ids)
                    if (
                        len(keys) + len(content_keys) >= _PORTION_KEYS or portion_bytes >= _PORTION_BYTES
                    ) and line.endswith(b"\n"):
                        position = Position(inode=stretch.inode, offset_bytes=at)
                        read = min(read_bytes / max(total_bytes, 1), 1.0)
                        yield Portion(keys=keys, content_keys=content_keys, position=position, read=read)
                        keys, content_keys, portion_bytes = [], [], 0
        except OSError as error:
            raise self._failure(error, "cannot be read and repaired") from error
        if not is_told:
            self._say_added(foreign_bytes)
        if keys or content_keys:
            yield Portion(keys=keys, content_keys=content_keys, position=end, read=1.0)

    def _unread_bytes(self, stretch: _Stretch) -> int:
        fd = self._open_inode(stretch.inode)
        if fd is None:
            return 0
        try:
            return max(os.fstat(fd).st_size - stretch.start_bytes, 0)
        finally:
            os.close(fd)

    def _keys_in(self, content: Mapping[str, Any], sub_app_ids: Iterable[int | None]) -> list[bytes]:
        """The keys that the event of a line may have, of which any is as good as the right one."""
        match self._format:
            case "callback":
                return [event_key(content, sub_app_id) for sub_app_id in sub_app_ids]
            case "cloudevents":
                key = cloudevent_key(content)
                return [] if key is None else [key]
            case _:
                assert_never(self._format)

    # --- saying what is wrong ---

    def _warn(self, problem: str) -> None:
        self._log.warning("config.warning", message=f"sinks.{self._name}.path: {problem}")

    def _config_error(self, problem: str) -> ConfigError:
        return ConfigError([f"sinks.{self._name}.path: {problem}"])

    def _failure(self, error: OSError, what: str) -> ConfigError | TransientError:
        """What stopped the start: a mistake that stays until somebody mends it, or a disk's trouble that may pass."""
        problem = f"{_place(error, self._path)} {what}: {why(error)}"
        if may_pass(error):
            return TransientError(f"sinks.{self._name}.path: {problem}")
        return self._config_error(problem)


def _check_kind(mode: int, path: Path) -> None:
    """Raise an OSError that says what to use instead, if it is no regular file."""
    if not stat.S_ISREG(mode):
        kind = kind_of_file(mode)
        instead = f", or {_INSTEAD[kind]}" if kind in _INSTEAD else ""
        text = f"it is not a regular file (give the path of a regular file{instead}: this is {kind})"
        raise OSError(errno.ENXIO, text, str(path))


def _refuse_what_is_no_file(path: Path) -> None:
    """Raise the OSError of opening it, before anything is made beside it."""
    with suppress(FileNotFoundError):
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        _check_kind(mode, path)


def _look_at(path: Path, lock_path: Path) -> str:
    """What would come of opening the file, without doing it."""
    folder = _existing_folder(path)
    exists, lock_exists = path.exists(), lock_path.exists()
    # It must be readable, too: opening it is how it is synced.
    _allow(folder, os.R_OK | os.X_OK | (0 if exists and lock_exists else os.W_OK))
    if exists:
        _check_kind(path.stat().st_mode, path)
        _allow(path, os.R_OK | os.W_OK)
    if lock_exists:
        _allow(lock_path, os.R_OK | os.W_OK)
    if is_locked(lock_path):
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


def _place(error: OSError, path: Path) -> str:
    return str(error.filename or path)


def _note_in(text: bytes) -> tuple[int, int] | None:
    found = re.fullmatch(rb"(\d+) (\d+)\n", text)
    return (int(found[1]), int(found[2])) if found else None


def _pieces_from(fd: int, start_bytes: int) -> Iterator[bytes]:
    """The lines from an offset on, one at a time, one that is far too long in pieces; closes the descriptor."""
    with open(fd, "rb") as file:
        file.seek(start_bytes)
        is_rest = False
        while piece := file.readline(_LINE_MAX_BYTES):
            is_whole = piece.endswith(b"\n") or len(piece) < _LINE_MAX_BYTES
            # No piece of a line may look like one.
            yield b"\0" * (len(piece) - 1) + piece[-1:] if is_rest or not is_whole else piece
            is_rest = not piece.endswith(b"\n")


def _object(line: bytes) -> dict[str, Any] | None:
    """The JSON object that a line holds; None if it holds something else."""
    # Zeros that a crash left: the reader of JSON would let them pass inside a text.
    if not line.startswith(b"{") or b"\0" in line:
        return None
    try:
        content = decode_json(line.decode())
    except ValueError:
        return None
    return content if isinstance(content, dict) else None


def _is_object(fd: int, start: int, end: int) -> bool:
    return end - start <= _LINE_MAX_BYTES and _object(_read(fd, start, end)) is not None


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


def _end_of_sound(fd: int, size: int, floor: int | None) -> int:
    """Where the part ends that a crash left whole. What lies beyond is torn lines of ours.

    Blocks that were not synced reach the disk in any order, so zeros may lie before whole lines. Those were not synced
    either, hence nobody took them for accepted, and they are cut off as well: their events come again. Where nothing is
    known of the file, older lines may stand there, and only its end is looked at.
    """
    known = min(floor or 0, size)
    end = _before_torn_lines(fd, size, known)
    return end if floor is None else _before_damage(fd, known, end)


def _before_torn_lines(fd: int, end: int, floor: int) -> int:
    """Without the lines at the end that a crash left torn or with zeros in them."""
    start = _after_last_newline(fd, end, floor)
    if start < end and not _is_torn(fd, start, end):
        return end
    end = start
    while end > floor:
        start = _after_last_newline(fd, end - 1, floor)
        if not _is_damaged(fd, start, end - 1, is_whole=True):
            break
        end = start
    return end


def _is_torn(fd: int, start: int, end: int) -> bool:
    """Whether what follows the last whole line is the beginning of a line of ours, with or without zeros.

    A JSON object that lacks nothing but its line's end is ours if it is an event. If it is not known for one, it stays.
    """
    if _is_damaged(fd, start, end, is_whole=False):
        return True
    if end - start > _LINE_MAX_BYTES:
        return False
    text = _read(fd, start, end)
    content = _object(text)
    if content is None:
        return _begins_like_ours(text)
    return "EventType" in content or cloudevent_key(content) is not None


def _begins_like_ours(text: bytes) -> bool:
    """Whether a text can be the beginning of a line of ours. In linear passes that take little memory."""
    if text[:2] not in (b"{", b'{"', b"{}") or _NEVER_OURS.search(text):
        return False
    outside = b"".join(text.replace(rb"\\", b"").replace(rb"\"", b"").split(b'"')[::2])
    for word in (b"true", b"false", b"null"):
        outside = outside.replace(word, b"")
    return _SKELETON.fullmatch(outside) is not None


def _is_damaged(fd: int, start: int, end: int, *, is_whole: bool) -> bool:
    """Whether a line, without its end, is one of ours in which a crash left zeros: file systems show lost blocks so.

    A line of another process may hold zeros as well. It is kept, unless it looks like one of ours.

    Args:
        fd: Of the file.
        start: Where the line starts.
        end: Where it ends.
        is_whole: Whether its end is there.
    """
    if os.pread(fd, 1, start) not in (b"{", b"\0") or (is_whole and os.pread(fd, 1, end - 1) not in (b"}", b"\0")):
        return False
    has_zeros = False
    for _, block in _blocks_backwards(fd, end, start):
        if _NEVER_OURS.search(block):
            return False
        has_zeros = has_zeros or b"\0" in block
    return has_zeros


def _before_damage(fd: int, start: int, end: int) -> int:
    """Where the first damaged line begins; `end` if there is none."""
    at = start
    while at < end and (block := os.pread(fd, min(_BLOCK_BYTES, end - at), at)):
        found = block.find(b"\0")
        if found < 0:
            at += len(block)
            continue
        line_start = _after_last_newline(fd, at + found, start)
        line_end = _next_newline(fd, at + found, end)
        if _is_damaged(fd, line_start, line_end, is_whole=line_end < end):
            return line_start
        at = line_end + 1
    return end


def _read(fd: int, start: int, end: int) -> bytes:
    return b"".join(block for _, block in reversed(list(_blocks_backwards(fd, end, start))))


def _next_newline(fd: int, at: int, end: int) -> int:
    """Where the line ends that an offset is in; `end` if it has no end before."""
    while at < end and (block := os.pread(fd, min(_BLOCK_BYTES, end - at), at)):
        found = block.find(b"\n")
        if found >= 0:
            return at + found
        at += len(block)
    return end


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
