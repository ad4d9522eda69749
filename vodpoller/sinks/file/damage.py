"""How lines of ours that a crash has damaged are distinguished from lines of other processes."""

import os
import re

from vodpoller.sinks.file.lines import (
    BLOCK_BYTES,
    LINE_MAX_BYTES,
    after_last_newline,
    blocks_backwards,
    next_newline,
    object_in,
    read,
)
from vodpoller.sinks.formats import cloudevent_key

# Bytes that no line of ours contains: control characters, which JSON escapes, and bytes that UTF-8 does not use.
_NEVER_OURS = re.compile(rb"[\x01-\x1f\xc0\xc1\xf5-\xff]")
# What stands outside of strings in the beginning of a JSON object as `encode` writes it, without spaces.
_OUTSIDE_STRINGS = re.compile(rb"[\[\]{}:,+.0-9eE-]*(?:t|tr|tru|f|fa|fal|fals|n|nu|nul)?")


def may_be_ours(fd: int) -> bool:
    """Whether a file starts like one of ours, intact or damaged by a crash."""
    return os.pread(fd, 1, 0) in (b"{", b"\0", b"")


def end_of_intact_part(fd: int, size: int, floor: int | None) -> int:
    """The end of the intact part of a file. Only damaged lines of ours follow it.

    Blocks that were not synced reach the disk in any order, so zeros may stand before whole lines. Those lines were not
    synced either, so they never counted as accepted, and are cut off as well: their events come again. If nothing is
    known of the file (`floor` is None), whole lines may be older ones, and only the end of the file is checked.
    """
    known = min(floor or 0, size)
    end = _end_before_damaged_lines(fd, size, known)
    return end if floor is None else _first_damaged_line(fd, known, end)


def _end_before_damaged_lines(fd: int, end: int, floor: int) -> int:
    """The end of the file without the last lines, if a crash has torn them or left zeros in them."""
    start = after_last_newline(fd, end, floor)
    if start < end and not _is_torn(fd, start, end):
        return end
    end = start
    while end > floor:
        start = after_last_newline(fd, end - 1, floor)
        if not _is_damaged(fd, start, end - 1, is_whole=True):
            break
        end = start
    return end


def _is_torn(fd: int, start: int, end: int) -> bool:
    """Whether the bytes after the last whole line are the beginning of a line of ours, with or without zeros.

    A whole JSON object without a line end is a line of ours if it is an event. Any other object is kept.
    """
    if _is_damaged(fd, start, end, is_whole=False):
        return True
    if end - start > LINE_MAX_BYTES:
        return False
    text = read(fd, start, end)
    content = object_in(text)
    if content is None:
        return _begins_like_ours(text)
    return "EventType" in content or cloudevent_key(content) is not None


def _begins_like_ours(text: bytes) -> bool:
    """Whether a text can be the beginning of a line of ours. Takes linear time and little memory."""
    if text[:2] not in (b"{", b'{"', b"{}") or _NEVER_OURS.search(text):
        return False
    outside = b"".join(text.replace(rb"\\", b"").replace(rb"\"", b"").split(b'"')[::2])
    for word in (b"true", b"false", b"null"):
        outside = outside.replace(word, b"")
    return _OUTSIDE_STRINGS.fullmatch(outside) is not None


def _is_damaged(fd: int, start: int, end: int, *, is_whole: bool) -> bool:
    """Whether a line is one of ours in which a crash left zeros: file systems show lost blocks as zeros.

    A line of another process may hold zeros as well. It is kept, unless it looks like one of ours.

    Args:
        fd: Descriptor of the file.
        start: Offset of the line's first byte.
        end: Offset after its last byte, without the line end.
        is_whole: Whether the line has a line end.
    """
    if os.pread(fd, 1, start) not in (b"{", b"\0") or (is_whole and os.pread(fd, 1, end - 1) not in (b"}", b"\0")):
        return False
    has_zeros = False
    for _, block in blocks_backwards(fd, end, start):
        if _NEVER_OURS.search(block):
            return False
        has_zeros = has_zeros or b"\0" in block
    return has_zeros


def _first_damaged_line(fd: int, start: int, end: int) -> int:
    """The offset of the first damaged line; `end` if there is none."""
    at = start
    while at < end and (block := os.pread(fd, min(BLOCK_BYTES, end - at), at)):
        found = block.find(b"\0")
        if found < 0:
            at += len(block)
            continue
        line_start = after_last_newline(fd, at + found, start)
        line_end = next_newline(fd, at + found, end)
        if _is_damaged(fd, line_start, line_end, is_whole=line_end < end):
            return line_start
        at = line_end + 1
    return end
