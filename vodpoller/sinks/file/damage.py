"""What a crash leaves of our lines, and how it is told from what other processes wrote."""

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

# What no line of ours holds: control characters, which JSON escapes, and bytes that UTF-8 does not have.
_NEVER_OURS = re.compile(rb"[\x01-\x1f\xc0\xc1\xf5-\xff]")
# What is outside of texts in the beginning of a JSON object as `encode` writes it, without blanks.
_SKELETON = re.compile(rb"[\[\]{}:,+.0-9eE-]*(?:t|tr|tru|f|fa|fal|fals|n|nu|nul)?")


def may_be_ours(fd: int) -> bool:
    """Whether a file starts as ours do, or as one that a crash has left."""
    return os.pread(fd, 1, 0) in (b"{", b"\0", b"")


def end_of_sound(fd: int, size: int, floor: int | None) -> int:
    """Where the part ends that a crash left whole. What lies beyond is torn lines of ours.

    Blocks that were not synced reach the disk in any order, so zeros may lie before whole lines. Those were not synced
    either, hence they were never taken for accepted, and are cut off as well: their events come again. If nothing is
    known of the file, older lines may stand there, and only its end is looked at.
    """
    known = min(floor or 0, size)
    end = _before_torn_lines(fd, size, known)
    return end if floor is None else _before_damage(fd, known, end)


def _before_torn_lines(fd: int, end: int, floor: int) -> int:
    """Without the lines at the end that a crash left torn or with zeros in them."""
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
    """Whether what follows the last whole line is the beginning of a line of ours, with or without zeros.

    A JSON object that lacks nothing but its line's end is ours if it is an event. If it is not known for one, it stays.
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
    for _, block in blocks_backwards(fd, end, start):
        if _NEVER_OURS.search(block):
            return False
        has_zeros = has_zeros or b"\0" in block
    return has_zeros


def _before_damage(fd: int, start: int, end: int) -> int:
    """Where the first damaged line begins; `end` if there is none."""
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
