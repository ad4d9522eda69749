"""Events as JSON lines on standard output."""

import os
import select
import stat
import time
from collections.abc import Callable, Sequence
from typing import Literal, Protocol

from pydantic import Field

from vodpoller.delivery import Sink
from vodpoller.errors import ConfigError, PartialFailureError, TransientError
from vodpoller.events import Event
from vodpoller.sinks import SinkConfig, encode

_STDOUT_FD = 1
_BATCH_EVENTS = 1024


class _Stream(Protocol):
    def fileno(self) -> int: ...


class StdoutConfig(SinkConfig):
    """Standard output."""

    type: Literal["stdout"] = Field(description="Events are written to standard output, one JSON document a line.")

    def claims(self) -> frozenset[str]:
        """There is one standard output."""
        return frozenset({"stdout"})


class StdoutSink(Sink):
    """Writes events to standard output, which it never closes.

    What is accepted is with the reader's pipe or file; whether it survives a loss of power is up to the reader.

    Args:
        name: Of the sink.
        config: Its settings.
        stream: In place of standard output. Its descriptor is written directly.
        monotonic: The clock, in seconds.

    Raises:
        ConfigError: Standard output is closed.
    """

    Config = StdoutConfig

    def __init__(
        self,
        name: str,
        config: StdoutConfig,
        *,
        stream: _Stream | None = None,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self.concurrency = 1
        self.batch_events = _BATCH_EVENTS
        self.timeout_secs = 10.0
        self._format = config.format
        self._monotonic = monotonic
        self._closed = False
        self._torn = b""
        try:
            self._fd = _STDOUT_FD if stream is None else stream.fileno()
            regular = stat.S_ISREG(os.fstat(self._fd).st_mode)
        except (OSError, ValueError) as error:
            raise ConfigError(
                [f"sinks.{name}: standard output is closed (connect it, or use a sink of type file)"]
            ) from error
        # A write of more than what a pipe takes at once would wait for a reader that may never read.
        self._piece_bytes: int | None = None if regular else select.PIPE_BUF

    def deliver(self, events: Sequence[Event], timeout_secs: float) -> None:
        """Write the events.

        A reader that stops in the middle has got some of them: those are accepted. The line that it was in is
        completed before anything else is written, so that each line stays whole; its event comes again.
        """
        if self._closed:
            raise TransientError("standard output: the sink is closed")
        lines = [encode(event, self._format) + b"\n" for event in events]
        data = self._torn + b"".join(lines)
        torn_bytes = len(self._torn)
        written_bytes, error = self._write(data, self._monotonic() + timeout_secs)
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
        """Accept nothing more. Standard output stays open: it is not the sink's."""
        self._closed = True

    def _write(self, data: bytes, ends_at: float) -> tuple[int, TransientError | None]:
        """How many bytes got out, and why not all of them did."""
        poller = select.poll()
        poller.register(self._fd, select.POLLOUT)
        rest = memoryview(data)
        error = None
        while rest and error is None:
            left_secs = ends_at - self._monotonic()
            try:
                if left_secs <= 0 or not poller.poll(left_secs * 1000):
                    error = TransientError(
                        "standard output: its reader does not read (is the program behind it stuck?)"
                    )
                else:
                    rest = rest[os.write(self._fd, rest[: self._piece_bytes]) :]
            except BlockingIOError:
                continue
            except OSError as failed:
                error = TransientError(f"standard output: the write failed: {failed.strerror} (has its reader ended?)")
        return len(data) - len(rest), error


def _rest_of_line(data: bytes, written_bytes: int, line_ends: Sequence[int]) -> bytes:
    """What is missing of the line that was begun; empty where the last byte out was the end of one."""
    if written_bytes == 0 or written_bytes in line_ends:
        # Nothing of this call's data is out, so what was missing before is missing still.
        return data[: line_ends[0]] if written_bytes == 0 else b""
    return data[written_bytes : next(end for end in line_ends if end > written_bytes)]
