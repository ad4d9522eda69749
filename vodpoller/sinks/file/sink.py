"""Events as JSON lines in a file. Logrotate renames it before it sends SIGHUP, or the sink does so each day or hour.

A line counts as accepted when it is written and synced. After a failure the unfinished part is cut off, so that the
file holds whole lines only, each of them once. Bytes of another process are kept, and never share a line with ours.
"""

import os
import re
import threading
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator

from vodpoller.durable import Folders, may_pass, why
from vodpoller.errors import ConfigError, RejectedError, TransientError
from vodpoller.events.event import Event
from vodpoller.journal.contract import Portion, Position
from vodpoller.logs import RepeatLimiter
from vodpoller.sinks.contract import Sink, SinkConfig, SinkContext
from vodpoller.sinks.file.appending import Files, OpenFile
from vodpoller.sinks.file.candidates import CandidateFiles
from vodpoller.sinks.file.lock import LockFile
from vodpoller.sinks.file.probing import check_is_file, check_path, path_of
from vodpoller.sinks.file.recovery import Recovery, UnreadPart, floor_of
from vodpoller.sinks.file.rotation import Rotate, Rotation, zone
from vodpoller.sinks.formats import encode

_BATCH_EVENTS = 1024
_CLOSE_WAIT_SECS = 1.0

_STREAMS = re.compile(r"/dev/(stdin|stdout|stderr|fd/.*)|/proc/(self|thread-self|\d+)/(task/\d+/)?fd/.*")


class FileConfig(SinkConfig):
    """The settings of a file of JSON lines."""

    type: Literal["file"] = Field(description="Events are appended to a file, one JSON document per line.")
    path: Annotated[str, Field(min_length=1, max_length=4096)] = Field(
        description="The file. A relative path starts at the working directory. Missing folders are created.",
        examples=["/var/lib/vodpoller/events.jsonl"],
    )
    rotate: Rotate = Field(
        default="none",
        description="`daily`, `hourly`: before the first line of another day or hour, the file is renamed to"
        " NAME-YYYYMMDD or NAME-YYYYMMDDHH, the time of its last line. `none`: the sink does not rename the file;"
        " logrotate may.",
    )
    time_zone: str = Field(
        default="UTC",
        description="The time zone of the days and hours of `rotate`, by its IANA name.",
        examples=["Asia/Shanghai"],
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
                f'{value} is a stream, which cannot be synced (for standard output write type = "stdout"'
                " and no path; standard error belongs to the log)"
            )
        return value

    @field_validator("time_zone")
    @classmethod
    def _names_a_time_zone(cls, value: str) -> str:
        zone(value)
        return value

    def claims(self) -> frozenset[str]:
        """The file, by its real path."""
        return frozenset({"file:" + os.path.realpath(self.path)})


class FileSink(Sink[FileConfig]):
    """Appends events to a file.

    A lock file beside it keeps other processes of vodpoller out. The real path of the file is found at the start: if a
    symbolic link is changed later, the new target is not used.

    Args:
        name: Name of the sink.
        config: Its settings.
        context: The log and the clocks.
        files: The file system.

    Raises:
        ConfigError: The file cannot be opened, or another process holds its lock.
        TransientError: The disk is full or failing.
    """

    Config = FileConfig

    def __init__(self, name: str, config: FileConfig, context: SinkContext, *, files: Files | None = None) -> None:
        super().__init__(name, config, context)
        self.concurrency = 1
        self.batch_events = _BATCH_EVENTS
        self.timeout_secs = 10.0
        self._format = config.format
        self._path = Path(os.path.realpath(config.path))
        self._files = files or Files()
        self._folders = Folders(self._warn, make=self._files.make_folder, sync=self._files.sync_folder)
        self._recovery = Recovery(CandidateFiles(self._path), self._files, config.format)
        self._rotation = Rotation(self._path, self._files, rotate=config.rotate, time_zone=config.time_zone)
        self._repeats = RepeatLimiter(context.log, monotonic=context.monotonic)
        self._lock = threading.Lock()
        self._reopen_wanted = False
        self._tail_checked = False
        self._closed = False
        try:
            check_is_file(self._path)
            self._folders.make(self._path.parent)
            self._lock_file = self._take_lock_file()
            try:
                self._file = self._open()
                self._rotation.begin(self._file)
            except BaseException:
                self._lock_file.close()
                raise
        except OSError as error:
            raise self._failure(error, "cannot be opened") from error
        self._position = self._end_position()

    @classmethod
    def probe(cls, name: str, config: FileConfig, context: SinkContext) -> str:
        """Check that the file can be written or created, and report whether another process holds its lock."""
        path = Path(os.path.realpath(config.path))
        try:
            return check_path(path, Path(f"{path}.lock"))
        except OSError as error:
            problem = f"{path_of(error, path)} cannot be written: {why(error)}"
            raise ConfigError([f"sinks.{name}.path: {problem}"]) from error

    def examine(self, event: Event) -> None:
        """Reject an event whose body is not one line."""
        if b"\n" in event.body and b"\n" in encode(event, self._format):
            raise RejectedError("the body holds a raw line break, so it is not a JSON line")

    def deliver(self, events: Sequence[Event], timeout_secs: float) -> None:
        """Append the events: one write, one sync.

        The time limit cannot be kept: on Linux, a write to a disk that does not respond cannot be cancelled.
        """
        data = b"".join(map(self._line, events))
        with self._lock:
            at = self.context.wall()
            try:
                file = self._writable_file(at)
                self._report_foreign_changes(file, file.prepare_append())
                file.append(data)
            except OSError as error:
                raise TransientError(f"{self._path}: nothing was written: {why(error)}") from error
            self._rotation.wrote(at)
            self._position = self._end_position()
            self._reopen_if_wanted()

    def reopen(self) -> None:
        """Open the path again: now or, if an append is running, after it."""
        self._reopen_wanted = True
        if self._lock.acquire(blocking=False):
            try:
                self._reopen_if_wanted()
            finally:
                self._lock.release()

    def close(self) -> None:
        """Close the file and release its lock. A write that hangs is not waited for."""
        if not self._lock.acquire(timeout=_CLOSE_WAIT_SECS):
            return
        try:
            if not self._closed:
                self._closed = True
                self._file.close()
                self._lock_file.close()
        finally:
            self._lock.release()

    def position(self) -> Position:
        """The end of the last accepted line, and its file; after `recover`, the end of the file."""
        return self._position

    def recover(self, mark: Position | None, sub_app_ids: Collection[int | None]) -> Iterable[Portion]:
        """Repair the end of the file, and return the lines after the mark.

        The call itself repairs the file; the lines are read while the portions are taken. All files that are read are
        synced first, since a process that was killed may have left lines that are not on the disk yet.

        A last line without a line end is cut off if it looks like the beginning of a line of ours; its event comes
        again. Any other last line gets a line end and stays.

        Raises:
            ConfigError: The files cannot be read or repaired.
            TransientError: The disk is full or failing.
        """
        try:
            with self._lock:
                inode = self._file.inode
                cut_to = None if mark is None else self._lock_file.recorded_cut(mark.inode)
                parts = self._recovery.unread_parts(mark, cut_to, current_inode=inode)
                starts = {part.inode: part.start_bytes for part in parts}
                unfinished_bytes = self._file.repair_end(floor_of(mark, inode, starts), was_ours=mark is not None)
                self._tail_checked = True
                self._position = self._end_position()
                self._recovery.repair_rotated(mark, starts, current_inode=inode)
        except OSError as error:
            raise self._failure(error, "cannot be read and repaired") from error
        is_logged = self._log_added(unfinished_bytes)
        return self._portions(parts, tuple(sub_app_ids), end=self._position, is_logged=is_logged)

    # --- opening ---

    def _open(self) -> OpenFile:
        return OpenFile(self._path, self._files, self._folders)

    def _take_lock_file(self) -> LockFile:
        lock_path = f"{self._path}.lock"
        try:
            return LockFile(Path(lock_path))
        except BlockingIOError:
            raise self._config_error(
                f"another process writes to {self._path} (stop it, or give each process its own file;"
                f" `fuser -v {lock_path}` shows which process it is)"
            ) from None

    def _reopen_if_wanted(self) -> None:
        """Reopen if `reopen` was called. After a failure, the next append tries again and reports the error."""
        if self._reopen_wanted and not self._closed:
            with suppress(OSError):
                self._reopen_now(self.context.wall())

    def _reopen_now(self, at: float) -> None:
        """Open the path again, as a new file if the old one is due to be renamed.

        Args:
            at: The time, in seconds since 1970.
        """
        # Cleared first: a call of `reopen` while this runs must not be lost.
        self._reopen_wanted = False
        try:
            self._file.cut_back()
            self._rename_if_due(at)
            self._folders.make(self._path.parent)
            # Opened before the old one is closed, so that the new file cannot get the inode that the mark may hold.
            new_file = self._open()
            if new_file.identity == self._file.identity:
                new_file.close()
                return
            self._file.close()
            self._file = new_file
            self._rotation.begin(new_file)
        except BaseException:
            self._reopen_wanted = True
            raise

    def _rename_if_due(self, at: float) -> None:
        """Rename the file to its day or hour, if that is over. If that fails, further lines go to the same file."""
        target = self._rotation.due(at)
        if target is None or not self._file.is_at(self._path):
            return
        try:
            self._rotation.rename(target)
        except OSError as error:
            self._repeats.log_once(
                "warning",
                "file.unrotated",
                cause=why(error),
                path=str(self._path),
                message=f"the file could not be renamed to {target}: {why(error)}. It keeps its name",
            )
        else:
            self.context.log.info("file.rotated", path=str(self._path), renamed_to=str(target))
            # Before another file gets the old name: a loss of power must not leave this file without any name.
            self._folders.sync(self._path.parent)

    def _writable_file(self, at: float) -> OpenFile:
        if self._closed:
            raise TransientError(f"{self._path}: the sink is closed")
        if not self._tail_checked:
            self._log_added(self._file.repair_end(None, was_ours=False))
            self._tail_checked = True
        if self._reopen_wanted or self._file.unlinked or self._rotation.due(at):
            self._reopen_now(at)
        return self._file

    def _report_foreign_changes(self, file: OpenFile, by_others_bytes: int) -> None:
        """Before an append, log what other processes did to the file since the last one; record a cut."""
        self._lock_file.clear_recorded_cut()
        if by_others_bytes < 0:
            self._lock_file.record_cut(file.inode, file.end_bytes)
            self._log_changed(
                "cut",
                f"another process cut {-by_others_bytes} bytes off the file",
                "does logrotate use copytruncate?",
            )
        else:
            self._log_added(by_others_bytes)

    def _log_added(self, added_bytes: int) -> bool:
        if added_bytes:
            self._log_changed(
                "added",
                f"another process wrote {added_bytes} bytes to the file, which are kept",
                "give each program a file of its own",
            )
        return bool(added_bytes)

    def _log_changed(self, cause: str, what: str, hint: str) -> None:
        self._repeats.log_once("warning", "file.changed", cause=cause, path=str(self._path), message=what, hint=hint)

    def _end_position(self) -> Position:
        return Position(inode=self._file.inode, offset_bytes=self._file.end_bytes)

    def _line(self, event: Event) -> bytes:
        self.examine(event)
        return encode(event, self._format) + b"\n"

    def _portions(
        self, parts: Sequence[UnreadPart], sub_app_ids: Sequence[int | None], *, end: Position, is_logged: bool
    ) -> Iterator[Portion]:
        """Read the parts, one portion at a time.

        Args:
            parts: The parts to read, oldest first.
            sub_app_ids: As for `recover`.
            end: The end of the last portion.
            is_logged: Whether it has been logged that another process wrote to the file.
        """

        def report_foreign(foreign_bytes: int) -> None:
            if not is_logged:
                self._log_added(foreign_bytes)

        try:
            yield from self._recovery.portions(parts, sub_app_ids, end=end, report_foreign=report_foreign)
        except OSError as error:
            raise self._failure(error, "cannot be read and repaired") from error

    # --- problems ---

    def _warn(self, problem: str) -> None:
        self.context.log.warning("config.warning", message=f"sinks.{self.name}.path: {problem}")

    def _config_error(self, problem: str) -> ConfigError:
        return ConfigError([f"sinks.{self.name}.path: {problem}"])

    def _failure(self, error: OSError, what: str) -> ConfigError | TransientError:
        """The error for a failed start: a mistake that the operator must correct, or a disk problem that may pass."""
        problem = f"{path_of(error, self._path)} {what}: {why(error)}"
        if may_pass(error):
            return TransientError(f"sinks.{self.name}.path: {problem}")
        return self._config_error(problem)
