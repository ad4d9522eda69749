"""Events as JSON lines on standard output."""

import fcntl
import os
from collections.abc import Sequence
from typing import Literal, Protocol

from pydantic import Field

from vodpoller.errors import ConfigError, PartialFailureError, TransientError
from vodpoller.events.event import Event
from vodpoller.outlet import Outlet
from vodpoller.process import is_stdout_closed
from vodpoller.sinks.contract import Sink, SinkConfig, SinkContext
from vodpoller.sinks.formats import encode

_STDOUT_FD = 1
_BATCH_EVENTS = 1024
_LONGEST_WAIT_SECS = 0.2  # within this time a waiting call notices that the sink is closed


class _Stream(Protocol):
    def fileno(self) -> int: ...


class StdoutConfig(SinkConfig):
    """Standard output."""

    type: Literal["stdout"] = Field(description="Events are written to standard output, one JSON document per line.")

    def claims(self) -> frozenset[str]:
        """The process has only one standard output."""
        return frozenset({"stdout"})


class StdoutSink(Sink[StdoutConfig]):
    """Writes events to standard output, which it never closes.

    An accepted event is in the reader's pipe or file. Whether it survives a loss of power depends on the reader.

    Args:
        name: Name of the sink.
        config: Its settings.
        context: The log and the clocks.
        stream: Used instead of standard output; data is written directly to its descriptor.

    Raises:
        ConfigError: Standard output is closed, or open for reading only.
    """

    Config = StdoutConfig

    def __init__(self, name: str, config: StdoutConfig, context: SinkContext, *, stream: _Stream | None = None) -> None:
        super().__init__(name, config, context)
        self.concurrency = 1
        self.batch_events = _BATCH_EVENTS
        self.timeout_secs = 10.0
        self._format = config.format
        self._torn = b""
        self._outlet: Outlet | None = _outlet(name, stream)

    def deliver(self, events: Sequence[Event], timeout_secs: float) -> None:
        """Write the events.

        If the reader stops in the middle, the events that were written completely are accepted. A line that was written
        in part is completed before anything else is written, so that each line stays whole; its event comes again.
        """
        lines = [encode(event, self._format) + b"\n" for event in events]
        data = self._torn + b"".join(lines)
        torn_bytes = len(self._torn)
        written_bytes, error = self._write(data, self.context.monotonic() + timeout_secs)
        if error is None:
            self._torn = b""
            return
        ends, at = [], torn_bytes
        for line in lines:
            at += len(line)
            ends.append(at)
        self._torn = _rest_of_line(data, written_bytes, [torn_bytes, *ends])
        failed = {index: error for index, end in enumerate(ends) if end > written_bytes}
        if len(failed) == len(lines):
            raise error
        raise PartialFailureError(failed)

    def close(self) -> None:
        """Accept no more events, and end a call that waits for the reader. Standard output stays open."""
        self._outlet = None

    def _write(self, data: bytes, ends_at: float) -> tuple[int, TransientError | None]:
        """Write. Returns the number of bytes that were written, and the error if not all of them were."""
        rest = memoryview(data)
        while rest:
            left_secs = ends_at - self.context.monotonic()
            outlet = self._outlet
            if outlet is None:
                return len(data) - len(rest), TransientError("standard output: the sink is closed")
            if left_secs <= 0:
                error = TransientError("standard output: its reader does not read (is that program stuck?)")
                return len(data) - len(rest), error
            try:
                rest = rest[outlet.write_some(rest, min(left_secs, _LONGEST_WAIT_SECS)) :]
            except OSError as failed:
                why = f"the write failed: {failed.strerror} (has its reader ended?)"
                return len(data) - len(rest), TransientError(f"standard output: {why}")
        return len(data), None


def _outlet(name: str, stream: _Stream | None) -> Outlet:
    """The output to write to.

    Raises:
        ConfigError: It cannot be written: at the start, descriptor 1 was closed, or it is not open for writing.
    """
    wrong = "is closed"
    try:
        if stream is not None or not is_stdout_closed():
            fd = _STDOUT_FD if stream is None else stream.fileno()
            if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDONLY:
                return Outlet(fd)
            wrong = "is open for reading only"
    except (OSError, ValueError):
        pass
    raise ConfigError([f"sinks.{name}: standard output {wrong} (connect it, or use a sink of type file)"])


def _rest_of_line(data: bytes, written_bytes: int, line_ends: Sequence[int]) -> bytes:
    """The unwritten rest of a line; empty if the last byte that was written ends a line."""
    if written_bytes == 0 or written_bytes in line_ends:
        # Nothing of this call's data was written, so an older rest is still missing.
        return data[: line_ends[0]] if written_bytes == 0 else b""
    return data[written_bytes : next(end for end in line_ends if end > written_bytes)]
