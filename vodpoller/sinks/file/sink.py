"""Events as JSON lines in a file, which logrotate renames before it sends SIGHUP, or the sink itself each day or hour.

A line counts once it is written and synced. Whatever goes wrong on the way is cut off again, so that the file holds
whole lines only, each of them once. What another process writes to it is kept, and is never on a line of ours.
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
from vodpoller.sinks.file.lock import Lock
from vodpoller.sinks.file.probing import look_at, place_of, refuse_what_is_not_a_file
from vodpoller.sinks.file.recovery import Recovery, Stretch, floor_of
from vodpoller.sinks.file.relatives import Relatives
from vodpoller.sinks.file.rotation import Rotate, Rotation, zone
from vodpoller.sinks.formats import encode

_BATCH_EVENTS = 1024
_CLOSE_WAIT_SECS = 1.0

_STREAMS = re.compile(r"/dev/(stdin|stdout|stderr|fd/.*)|/proc/(self|thread-self|\d+)/(task/\d+/)?fd/.*")


class FileConfig(SinkConfig):
    """A file of JSON lines."""

    type: Literal["file"] = Field(description="Events are appended to a file, one JSON document a line.")
    path: Annotated[str, Field(min_length=1, max_length=4096)] = Field(
        description="The file; relative to the working directory if it is not absolute. Missing folders are made.",
        examples=["/var/lib/vodpoller/events.jsonl"],
    )
    rotate: Rotate = Field(
        default="none",
        description="`daily`, `hourly`: before the first line of another day or hour, the file is renamed to"
        " NAME-YYYYMMDD or NAME-YYYYMMDDHH, the time of its last line. `none`: logrotate may do that.",
    )
    time_zone: str = Field(
        default="UTC",
        description="The time zone of these days and hours, by its IANA name.",
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
                f'{value} is a stream, and what is in it cannot be synced (for standard output write type = "stdout"'
                " and no path; standard error is the log's)"
            )
        return value

    @field_validator("time_zone")
    @classmethod
    def _names_a_time_zone(cls, value: str) -> str:
        zone(value)
        return value

    def claims(self) -> frozenset[str]:
        """The file, however it is spelled."""
        return frozenset({"file:" + os.path.realpath(self.path)})


class FileSink(Sink[FileConfig]):
    """Appends events to a file.

    A lock file beside it keeps other processes out. The file is found by its real path at the start: a symbolic link
    that is changed later is not followed.

    Args:
        name: Of the sink.
        config: Its settings.
        context: The log and the clocks.
        files: The file system.

    Raises:
        ConfigError: The file cannot be opened, or another process has it.
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
        self._recovery = Recovery(Relatives(self._path), self._files, config.format)
        self._rotation = Rotation(self._path, self._files, rotate=config.rotate, time_zone=config.time_zone)
        self._repeats = RepeatLimiter(context.log, monotonic=context.monotonic)
        self._lock = threading.Lock()
        self._reopen_wanted = False
        self._tail_checked = False
        self._closed = False
        try:
            refuse_what_is_not_a_file(self._path)
            self._folders.make(self._path.parent)
            self._others = self._keep_others_out()
            try:
                self._file = self._open()
                self._rotation.begin(self._file)
            except BaseException:
                self._others.close()
                raise
        except OSError as error:
            raise self._failure(error, "cannot be opened") from error
        self._position = self._end()

    @classmethod
    def probe(cls, name: str, config: FileConfig, context: SinkContext) -> str:
        """Whether the file can be written, or made, and whether another process has it."""
        path = Path(os.path.realpath(config.path))
        try:
            return look_at(path, Path(f"{path}.lock"))
        except OSError as error:
            problem = f"{place_of(error, path)} cannot be written: {why(error)}"
            raise ConfigError([f"sinks.{name}.path: {problem}"]) from error

    def examine(self, event: Event) -> None:
        """Whether it can be a line."""
        if b"\n" in event.body and b"\n" in encode(event, self._format):
            raise RejectedError("the body holds a raw newline, so it is not a JSON line")

    def deliver(self, events: Sequence[Event], timeout_secs: float) -> None:
        """Append the events: one write, one sync.

        The time limit cannot be kept: Linux has no way to give up a write to a disk that does not answer.
        """
        data = b"".join(map(self._line, events))
        with self._lock:
            at = self.context.wall()
            try:
                file = self._writable_file(at)
                self._notice(file, file.look())
                file.append(data)
            except OSError as error:
                raise TransientError(f"{self._path}: nothing was written: {why(error)}") from error
            self._rotation.wrote(at)
            self._position = self._end()
            self._reopen_if_wanted()

    def reopen(self) -> None:
        """Open the path again, at once or, if an append is running, after it."""
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
                inode = self._file.inode
                cut_to = None if mark is None else self._others.recall(mark.inode)
                stretches = self._recovery.beyond(mark, cut_to, current_inode=inode)
                starts = {found.inode: found.start_bytes for found in stretches}
                unfinished_bytes = self._file.repair_end(floor_of(mark, inode, starts), was_ours=mark is not None)
                self._tail_checked = True
                self._position = self._end()
                self._recovery.repair_rotated(mark, starts, current_inode=inode)
        except OSError as error:
            raise self._failure(error, "cannot be read and repaired") from error
        is_told = self._say_added(unfinished_bytes)
        return self._portions(stretches, tuple(sub_app_ids), end=self._position, is_told=is_told)

    # --- opening ---

    def _open(self) -> OpenFile:
        return OpenFile(self._path, self._files, self._folders)

    def _keep_others_out(self) -> Lock:
        lock_path = f"{self._path}.lock"
        try:
            return Lock(Path(lock_path))
        except BlockingIOError:
            raise self._config_error(
                f"another process writes to {self._path} (stop it, or give each its own file;"
                f" `fuser -v {lock_path}` shows which process it is)"
            ) from None

    def _reopen_if_wanted(self) -> None:
        """Reopen if that was asked for; what fails is tried again, and reported, by the next append."""
        if self._reopen_wanted and not self._closed:
            with suppress(OSError):
                self._reopen_now(self.context.wall())

    def _reopen_now(self, at: float) -> None:
        """Open the path again, as a new file if what it names is renamed now.

        Args:
            at: The time, in seconds since 1970.
        """
        # Taken down first: a request that comes while this runs must not be lost.
        self._reopen_wanted = False
        try:
            self._file.cut_back()
            self._rename_if_due(at)
            self._folders.make(self._path.parent)
            # Opened before the old one is closed, so that the new file cannot get the inode that the mark may name.
            fresh = self._open()
            if fresh.identity == self._file.identity:
                fresh.close()
                return
            self._file.close()
            self._file = fresh
            self._rotation.begin(fresh)
        except BaseException:
            self._reopen_wanted = True
            raise

    def _rename_if_due(self, at: float) -> None:
        """Give the file the name of its day or hour if that is over. If that fails, its lines go on in it."""
        target = self._rotation.due(at)
        if target is None or not self._file.is_called(self._path):
            return
        try:
            self._rotation.rename(target)
        except OSError as error:
            self._repeats.log_once(
                "warning",
                "file.unrotated",
                cause=why(error),
                path=str(self._path),
                message=f"it could not be renamed to {target}: {why(error)}. It goes on under its own name",
            )
        else:
            self.context.log.info("file.rotated", path=str(self._path), renamed_to=str(target))
            # Before its own name is another file's: a loss of power must not leave it without one.
            self._folders.sync(self._path.parent)

    def _writable_file(self, at: float) -> OpenFile:
        if self._closed:
            raise TransientError(f"{self._path}: the sink is closed")
        if not self._tail_checked:
            self._say_added(self._file.repair_end(None, was_ours=False))
            self._tail_checked = True
        if self._reopen_wanted or self._file.unlinked or self._rotation.due(at):
            self._reopen_now(at)
        return self._file

    def _notice(self, file: OpenFile, by_others_bytes: int) -> None:
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
        self._repeats.log_once("warning", "file.changed", cause=cause, path=str(self._path), message=what, hint=hint)

    def _end(self) -> Position:
        return Position(inode=self._file.inode, offset_bytes=self._file.end_bytes)

    def _line(self, event: Event) -> bytes:
        self.examine(event)
        return encode(event, self._format) + b"\n"

    def _portions(
        self, stretches: Sequence[Stretch], sub_app_ids: Sequence[int | None], *, end: Position, is_told: bool
    ) -> Iterator[Portion]:
        """Read the stretches, a portion at a time.

        Args:
            stretches: What to read, oldest first.
            sub_app_ids: As for `recover`.
            end: Where the last portion ends.
            is_told: It has been said that another process wrote to the file.
        """

        def say_foreign(foreign_bytes: int) -> None:
            if not is_told:
                self._say_added(foreign_bytes)

        try:
            yield from self._recovery.portions(stretches, sub_app_ids, end=end, say_foreign=say_foreign)
        except OSError as error:
            raise self._failure(error, "cannot be read and repaired") from error

    # --- saying what is wrong ---

    def _warn(self, problem: str) -> None:
        self.context.log.warning("config.warning", message=f"sinks.{self.name}.path: {problem}")

    def _config_error(self, problem: str) -> ConfigError:
        return ConfigError([f"sinks.{self.name}.path: {problem}"])

    def _failure(self, error: OSError, what: str) -> ConfigError | TransientError:
        """What stopped the start: a mistake that the operator must correct, or a disk's trouble that may pass."""
        problem = f"{place_of(error, self._path)} {what}: {why(error)}"
        if may_pass(error):
            return TransientError(f"sinks.{self.name}.path: {problem}")
        return self._config_error(problem)
