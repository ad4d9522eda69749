"""Reading back what was written and never reached the ledger: after a crash, and after a rotation."""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, assert_never

from vodpoller.events.event import event_key
from vodpoller.events.identity import has_own_id
from vodpoller.journal.contract import Portion, Position
from vodpoller.sinks.file.appending import Files
from vodpoller.sinks.file.damage import end_of_sound, may_be_ours
from vodpoller.sinks.file.lines import after_last_newline, is_object, object_in, pieces_from
from vodpoller.sinks.file.relatives import Relatives
from vodpoller.sinks.formats import Format, cloudevent_key

# What a portion of recovery holds at most: a third of a second's work, and a few MB of memory.
PORTION_KEYS = 10_000
PORTION_BYTES = 1 << 24


@dataclass(frozen=True, slots=True)
class Stretch:
    """The lines of one file from an offset on; by inode, since a rename can come at any time."""

    inode: int
    start_bytes: int


class Recovery:
    """Finds, repairs and reads the lines beyond a mark.

    Args:
        relatives: The files that may hold them.
        files: The file system.
        body_format: Of the lines.
    """

    def __init__(self, relatives: Relatives, files: Files, body_format: Format) -> None:
        self._relatives = relatives
        self._files = files
        self._format = body_format

    def beyond(self, mark: Position | None, cut_to: int | None, *, current_inode: int) -> list[Stretch]:
        """What to read, oldest first.

        Args:
            mark: The position that the ledger knows, if it knows one.
            cut_to: To which size others cut the marked file since, if they did.
            current_inode: Of the file that is written to now.

        Raises:
            OSError: A file cannot be read.
        """
        current = Stretch(current_inode, 0)
        if mark is None:
            return [current]
        start_bytes = self._start_after(mark)
        if cut_to is not None:
            start_bytes = min(start_bytes, cut_to)
        if mark.inode == current.inode:
            return [Stretch(mark.inode, start_bytes)]
        relatives = self._relatives.found()
        marked = relatives.pop(mark.inode, None)
        if marked is None:
            return [current]
        # Rotated more than once: whatever was last written to after the marked file is read whole. A file too many
        # does no harm.
        relatives.pop(current.inode, None)
        younger = [inode for inode, relative in relatives.items() if relative.is_younger_than(marked)]
        younger.sort(key=lambda inode: relatives[inode].changed_at_ns)
        return [Stretch(mark.inode, start_bytes), *(Stretch(inode, 0) for inode in younger), current]

    def _start_after(self, mark: Position) -> int:
        """Where the unknown lines start: at the mark, or at 0 if the file cannot be the one that was marked.

        A mark stands at the end of a line. A file that is shorter, or has no line end there, was emptied or replaced.
        """
        fd = self._relatives.open(mark.inode)
        if fd is None:
            return 0
        try:
            known = mark.offset_bytes > 0 and os.pread(fd, 1, mark.offset_bytes - 1) == b"\n"
        finally:
            os.close(fd)
        return mark.offset_bytes if known else 0

    def repair_rotated(self, mark: Position | None, starts: Mapping[int, int], *, current_inode: int) -> None:
        """Sync the files that were rotated away, and mend their ends: they may have been renamed after the crash.

        Args:
            mark: As for `beyond`.
            starts: Where the unknown lines start, by inode, as `beyond` found them.
            current_inode: As for `beyond`.

        Raises:
            OSError: A file cannot be read or mended.
        """
        relatives = self._relatives.found()
        for inode in starts:
            fd = None if inode == current_inode else self._relatives.open(inode)
            if fd is not None:
                try:
                    is_marked = mark is not None and inode == mark.inode
                    if is_marked or (inode in relatives and relatives[inode].is_rotated):
                        self._mend_rotated(fd, floor_of(mark, inode, starts))
                    self._files.fdatasync(fd)
                finally:
                    os.close(fd)

    def _mend_rotated(self, readable_fd: int, floor_bytes: int | None) -> None:
        status = os.fstat(readable_fd)
        end = end_of_sound(readable_fd, status.st_size, floor_bytes)
        start = after_last_newline(readable_fd, end, min(floor_bytes or 0, end))
        lacks_its_end = start < end and is_object(readable_fd, start, end)
        if (end == status.st_size and not lacks_its_end) or not may_be_ours(readable_fd):
            return
        # The right to write may have been taken away when it was rotated: the start must not fail for it.
        with suppress(PermissionError):
            fd = self._relatives.open(status.st_ino, os.O_RDWR | os.O_APPEND)
            if fd is not None:
                try:
                    if end < status.st_size:
                        self._files.ftruncate(fd, end)
                    if lacks_its_end:
                        self._files.write(fd, memoryview(b"\n"))
                finally:
                    os.close(fd)

    def portions(
        self,
        stretches: Sequence[Stretch],
        sub_app_ids: Sequence[int | None],
        *,
        end: Position,
        say_foreign: Callable[[int], object],
    ) -> Iterator[Portion]:
        """Read the stretches, a portion at a time.

        Args:
            stretches: What to read, oldest first.
            sub_app_ids: The SubAppIds whose events may be in the lines.
            end: Where the last portion ends.
            say_foreign: Told at the end, before the last portion, the number of bytes that other processes wrote.

        Raises:
            OSError: A file cannot be read.
        """
        keys: list[bytes] = []
        content_keys: list[list[bytes]] = []  # of lines that do not say which event they are of
        read_bytes = portion_bytes = foreign_bytes = 0
        total_bytes = sum(map(self._unread_bytes, stretches))
        for stretch in stretches:
            fd = self._relatives.open(stretch.inode)
            at = stretch.start_bytes
            for line in pieces_from(fd, at) if fd is not None else ():
                at += len(line)
                read_bytes += len(line)
                portion_bytes += len(line)
                content = object_in(line)
                if content is None and line.strip():  # an empty one is what we put between us and another process
                    foreign_bytes += len(line)
                elif content is not None and self._format == "callback" and not has_own_id(content):
                    content_keys.append([event_key(content, sub_app_id) for sub_app_id in sub_app_ids])
                elif content is not None:
                    keys += self._keys_in(content, sub_app_ids)
                if (len(keys) + len(content_keys) >= PORTION_KEYS or portion_bytes >= PORTION_BYTES) and line.endswith(
                    b"\n"
                ):
                    position = Position(inode=stretch.inode, offset_bytes=at)
                    read = min(read_bytes / max(total_bytes, 1), 1.0)
                    yield Portion(keys=keys, content_keys=content_keys, position=position, read=read)
                    keys, content_keys, portion_bytes = [], [], 0
        say_foreign(foreign_bytes)
        if keys or content_keys:
            yield Portion(keys=keys, content_keys=content_keys, position=end, read=1.0)

    def _unread_bytes(self, stretch: Stretch) -> int:
        fd = self._relatives.open(stretch.inode)
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


def floor_of(mark: Position | None, inode: int, starts: Mapping[int, int]) -> int | None:
    """Up to where a file is known to be whole; None if nothing is known of it."""
    is_marked = mark is not None and mark.inode == inode and mark.offset_bytes == starts.get(inode)
    return starts[inode] if is_marked else None
