"""Reading the lines of a file forwards, backwards and around an offset, with bounded memory."""

import os
from collections.abc import Iterator
from typing import Any

from vodpoller.events.codec import decode_json

BLOCK_BYTES = 1 << 16
# Far more than any event has: a longer line is not one of ours, and must not be read into memory.
LINE_MAX_BYTES = 1 << 26


def pieces_from(fd: int, start_bytes: int) -> Iterator[bytes]:
    """The lines from an offset on, one at a time; a line over the maximum in pieces. Closes the descriptor."""
    with open(fd, "rb") as file:
        file.seek(start_bytes)
        is_rest = False
        while piece := file.readline(LINE_MAX_BYTES):
            is_whole = piece.endswith(b"\n") or len(piece) < LINE_MAX_BYTES
            # Zeros: a piece of a line must not look like a whole line.
            yield b"\0" * (len(piece) - 1) + piece[-1:] if is_rest or not is_whole else piece
            is_rest = not piece.endswith(b"\n")


def object_in(line: bytes) -> dict[str, Any] | None:
    """The JSON object that a line holds; None if it holds something else."""
    # A crash may leave zeros, and the JSON parser accepts them inside a string.
    if not line.startswith(b"{") or b"\0" in line:
        return None
    try:
        content = decode_json(line.decode())
    except ValueError:
        return None
    return content if isinstance(content, dict) else None


def is_object(fd: int, start: int, end: int) -> bool:
    """Whether a part of a file is a JSON object, as `object_in` reads it."""
    return end - start <= LINE_MAX_BYTES and object_in(read(fd, start, end)) is not None


def read(fd: int, start: int, end: int) -> bytes:
    """A part of a file as bytes."""
    return b"".join(block for _, block in reversed(list(blocks_backwards(fd, end, start))))


def next_newline(fd: int, at: int, end: int) -> int:
    """The end of the line that contains an offset; `end` if the line does not end before it."""
    while at < end and (block := os.pread(fd, min(BLOCK_BYTES, end - at), at)):
        found = block.find(b"\n")
        if found >= 0:
            return at + found
        at += len(block)
    return end


def after_last_newline(fd: int, end: int, floor: int) -> int:
    """The start of the last line before an offset, finished or not; `floor` if no line starts after `floor`."""
    for start, block in blocks_backwards(fd, end, floor):
        found = block.rfind(b"\n")
        if found >= 0:
            return start + found + 1
    return floor


def blocks_backwards(fd: int, end: int, floor: int) -> Iterator[tuple[int, bytes]]:
    """The blocks of a part of a file, each with its offset, the last one first."""
    while end > floor:
        start = max(floor, end - BLOCK_BYTES)
        yield start, os.pread(fd, end - start, start)
        end = start
