"""Adds events to the queue: some at the start, others at a rate."""

import asyncio
import time
from collections.abc import Callable

from vodpoller.simulator.bodies import lines_of
from vodpoller.simulator.options import SimulatorOptions
from vodpoller.simulator.queue import EventQueue


class Feeder:
    """Adds events to the queue as the options say, in the running event loop.

    Args:
        options: The options; `events`, `rate`, `feed` and `events_file` are used.
        queue: The queue.
        on_fed: Called each time after the rate has added events.
    """

    def __init__(self, options: SimulatorOptions, queue: EventQueue, *, on_fed: Callable[[], None]) -> None:
        self._options = options
        self._queue = queue
        self._on_fed = on_fed
        self._lines: list[bytes] | None = None
        self._paced = 0
        self._paced_total: float = 0
        self._started_at = 0.0

    @property
    def is_feeding(self) -> bool:
        """Whether the rate still adds events."""
        return self._paced < self._paced_total

    def read_file(self) -> None:
        """Read the events' file, if there is one.

        Raises:
            OSError: The file cannot be read.
        """
        if self._options.events_file is not None:
            self._lines = lines_of(self._options.events_file.read_bytes())

    def start(self) -> None:
        """Add the first events; the event loop then adds the others at the rate."""
        options = self._options
        self._queue.generate(options.events)
        self._started_at = time.monotonic()  # making the first events takes a while if there are many
        if not options.rate:
            self._queue.feed(self._lines or ())
            return
        self._paced_total = options.feed or float("inf")
        if self._lines is not None:
            self._paced_total = min(self._paced_total, len(self._lines))
        self._feed_due()

    def _feed_due(self) -> None:
        """Add the events that are due by now, so that late timers do not change the rate."""
        rate = self._options.rate
        elapsed_secs = time.monotonic() - self._started_at
        due = int(min(elapsed_secs * rate + 1, self._paced_total)) - self._paced
        if due > 0:
            if self._lines is None:
                self._queue.generate(due)
            else:
                self._queue.feed(self._lines[self._paced : self._paced + due])
            self._paced += due
            self._on_fed()
        if self.is_feeding:
            wait_secs = self._started_at + self._paced / rate - time.monotonic()
            asyncio.get_running_loop().call_later(max(wait_secs, 0.001), self._feed_due)
