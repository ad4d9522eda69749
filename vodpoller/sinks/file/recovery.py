"""Finding the lines that were written and never reached the ledger, after a crash or a rotation."""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, assert_never

from vodpoller.events.event import event_key
from vodpoller.events.identity import has_own_id
from vodpoller.journal.contract import Portion, Position
from vodpoller.sinks.file.appending import Files
from vodpoller.sinks.file.candidates import CandidateFiles
from vodpoller.sinks.file.damage import end_of_intact_part, may_be_ours
from vodpoller.sinks.file.lines import after_last_newline, is_object, object_in, pieces_from
from vodpoller.sinks.formats import Format, cloudevent_key

# Maximum size of a portion of recovery: about 0.3 s of work and a few MB of memory.
PORTION_KEYS = 10_000
PORTION_BYTES = 1 << 24


@dataclass(frozen=True, slots=True)
class UnreadPart:
    """The lines of one file from an offset on. The file is named by its inode, since it may be renamed at any time."""

    inode: int
    start_bytes: int


class Recovery:
    """Finds, repairs and reads the lines after a mark.

    Args:
        candidates: The files that may hold the lines.
        files: The file system.
        body_format: The format of the lines.
    """

    def __init__(self, candidates: CandidateFiles, files: Files, body_format: Format) -> None:
        self._candidates = candidates
        self._files = files
        self._format = body_format

    def unread_parts(self, mark: Position | None, cut_to: int | None, *, current_inode: int) -> list[UnreadPart]:
        """The parts that must be read, oldest first.

        Args:
            mark: The position that the ledger knows; None if it knows none.
            cut_to: The size to which other processes have cut the marked file since; None if they have not.
            current_inode: The inode of the file that is written to now.

        Raises:
            OSError: A file cannot be read.
        """
        current = UnreadPart(current_inode, 0)
        if mark is None:
            return [current]
        start_bytes = self._start_after(mark)
        if cut_to is not None:
            start_bytes = min(start_bytes, cut_to)
        if mark.inode == current.inode:
            return [UnreadPart(mark.inode, start_bytes)]
        candidates = self._candidates.find()
        marked = candidates.pop(mark.inode, None)
        if marked is None:
            return [current]
        # Rotated more than once: each file that was last written to after the marked file is read whole. Reading one
        # file too many does no harm.
        candidates.pop(current.inode, None)
        newer = [inode for inode, candidate in candidates.items() if candidate.is_newer_than(marked)]
        newer.sort(key=lambda inode: candidates[inode].changed_at_ns)
        return [UnreadPart(mark.inode, start_bytes), *(UnreadPart(inode, 0) for inode in newer), current]

    def _start_after(self, mark: Position) -> int:
        """The start of the unread lines: the mark, or 0 if the file cannot be the one that was marked.

        A mark is at the end of a line. A file that is shorter, or has no line end there, was emptied or replaced.
        """
        fd = self._candidates.open(mark.inode)
        if fd is None:
            return 0
        try:
            is_valid = mark.offset_bytes > 0 and os.pread(fd, 1, mark.offset_bytes - 1) == b"\n"
        finally:
            os.close(fd)
        return mark.offset_bytes if is_valid else 0

    def repair_rotated(self, mark: Position | None, starts: Mapping[int, int], *, current_inode: int) -> None:
        """Sync the rotated files, and repair their ends: they may have been renamed after the crash.

        Args:
            mark: As for `unread_parts`.
            starts: The start of the unread lines by inode, as `unread_parts` returned it.
            current_inode: As for `unread_parts`.

        Raises:
            OSError: A file cannot be read or repaired.
        """
        candidates = self._candidates.find()
        for inode in starts:
            fd = None if inode == current_inode else self._candidates.open(inode)
            if fd is not None:
                try:
                    is_marked = mark is not None and inode == mark.inode
                    if is_marked or (inode in candidates and candidates[inode].is_rotated):
                        self._repair_end(fd, floor_of(mark, inode, starts))
                    self._files.fdatasync(fd)
                finally:
                    os.close(fd)

    def _repair_end(self, readable_fd: int, floor_bytes: int | None) -> None:
        status = os.fstat(readable_fd)
        end = end_of_intact_part(readable_fd, status.st_size, floor_bytes)
        start = after_last_newline(readable_fd, end, min(floor_bytes or 0, end))
        lacks_its_end = start < end and is_object(readable_fd, start, end)
        if (end == status.st_size and not lacks_its_end) or not may_be_ours(readable_fd):
            return
        # The rotation may have made the file read-only: the start must not fail because of that.
        with suppress(PermissionError):
            fd = self._candidates.open(status.st_ino, os.O_RDWR | os.O_APPEND)
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
        parts: Sequence[UnreadPart],
        sub_app_ids: Sequence[int | None],
        *,
        end: Position,
        report_foreign: Callable[[int], object],
    ) -> Iterator[Portion]:
        """Read the parts, one portion at a time.

        Args:
            parts: The parts to read, oldest first.
            sub_app_ids: The SubAppIds whose events may be in the lines.
            end: The end of the last portion.
            report_foreign: Called once, before the last portion, with the number of bytes that other processes wrote.

        Raises:
            OSError: A file cannot be read.
        """
        keys: list[bytes] = []
        content_keys: list[list[bytes]] = []  # of lines that do not identify their event
        read_bytes = portion_bytes = foreign_bytes = 0
        total_bytes = sum(map(self._unread_bytes, parts))
        for part in parts:
            fd = self._candidates.open(part.inode)
            at = part.start_bytes
            for line in pieces_from(fd, at) if fd is not None else ():
                at += len(line)
                read_bytes += len(line)
                portion_bytes += len(line)
                content = object_in(line)
                if content is None and line.strip():  # we write an empty line to end a line of another process
                    foreign_bytes += len(line)
                elif content is not None and self._format == "callback" and not has_own_id(content):
                    content_keys.append([event_key(content, sub_app_id) for sub_app_id in sub_app_ids])
                elif content is not None:
                    keys += self._keys_in(content, sub_app_ids)
                if (len(keys) + len(content_keys) >= PORTION_KEYS or portion_bytes >= PORTION_BYTES) and line.endswith(
                    b"\n"
                ):
                    position = Position(inode=part.inode, offset_bytes=at)
                    read = min(read_bytes / max(total_bytes, 1), 1.0)
                    yield Portion(keys=keys, content_keys=content_keys, position=position, read=read)
                    keys, content_keys, portion_bytes = [], [], 0
        report_foreign(foreign_bytes)
        if keys or content_keys:
            yield Portion(keys=keys, content_keys=content_keys, position=end, read=1.0)

    def _unread_bytes(self, part: UnreadPart) -> int:
        fd = self._candidates.open(part.inode)
        if fd is None:
            return 0
        try:
            return max(os.fstat(fd).st_size - part.start_bytes, 0)
        finally:
            os.close(fd)

    def _keys_in(self, content: Mapping[str, Any], sub_app_ids: Iterable[int | None]) -> list[bytes]:
        """All keys that the event of a line may have; it does no harm to record the others, too."""
        match self._format:
            case "callback":
                return [event_key(content, sub_app_id) for sub_app_id in sub_app_ids]
            case "cloudevents":
                key = cloudevent_key(content)
                return [] if key is None else [key]
            case _:
                assert_never(self._format)


def floor_of(mark: Position | None, inode: int, starts: Mapping[int, int]) -> int | None:
    """The offset up to which a file is known to be intact; None if nothing is known of it."""
    is_marked = mark is not None and mark.inode == inode and mark.offset_bytes == starts.get(inode)
    return starts[inode] if is_marked else None
