"""Telemetry: the one object that writes log lines, limits those that repeat, and counts.

Each part of the daemon gets a `Scope` of it. What is counted has the names and labels of the metrics ("Metrics" in the
README), so that whatever shows numbers reads them here and counts nothing itself.
"""

import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum
from typing import Any

from vodpoller.logs import EACH, Level, Logger, Repeats

Labels = tuple[tuple[str, str], ...]


class Count(StrEnum):
    """What is counted; each with its labels."""

    PULLS = "pulls_total"  # source, result = events | empty | failed
    EVENTS_RECEIVED = "events_received_total"  # source
    EVENTS_REDELIVERED = "events_redelivered_total"  # source
    EVENTS_SETTLED = "events_settled_total"  # source, settlement, reason
    CONFIRMS = "confirms_total"  # source, result = a ConfirmResult
    SINK_DELIVERIES = "sink_deliveries_total"  # sink, outcome = delivered | rejected | stored | left | known
    SINK_ATTEMPTS = "sink_attempts_total"  # sink, result = accepted | rejected | failed
    DEAD_LETTERS_CREATED = "dead_letters_created_total"  # sink, reason
    JOURNAL_ERRORS = "journal_errors_total"


class Telemetry:
    """Lines and counts of the whole process.

    Args:
        log: Destination of log lines.
        monotonic: The clock of the limit on repeated lines, in seconds.
    """

    def __init__(self, log: Logger, *, monotonic: Callable[[], float] = time.monotonic) -> None:
        self.log = log
        self._monotonic = monotonic
        self._lock = threading.Lock()
        self._counts: Counter[tuple[Count, Labels]] = Counter()

    def log_to(self, log: Logger) -> None:
        """Have what gets its scope from now on write to another log.

        Args:
            log: Where to.
        """
        self.log = log

    def scope(self) -> "Scope":
        """The view of one part of the daemon: its causes of repeated lines are its own."""
        return Scope(self, Repeats(self.log, monotonic=self._monotonic))

    def add(self, numbers: Mapping[tuple[Count, Labels], int]) -> None:
        """Count several things at once."""
        with self._lock:
            self._counts.update(numbers)

    def counts(self) -> dict[tuple[Count, Labels], int]:
        """All that was counted so far."""
        with self._lock:
            return dict(self._counts)

    def total(self, count: Count, **labels: str) -> int:
        """The sum of what was counted under these labels, whatever the others are."""
        wanted = set(labels.items())
        return sum(number for (name, found), number in self.counts().items() if name is count and wanted <= set(found))


class Scope:
    """What one part of the daemon says and counts.

    Args:
        telemetry: Of the process.
        repeats: Limits this part's repeated lines.
    """

    def __init__(self, telemetry: Telemetry, repeats: Repeats) -> None:
        self._telemetry = telemetry
        self._repeats = repeats
        self.log = telemetry.log

    def settled(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Log what became of a batch's events: rendered together and written in one write.

        Args:
            lines: The fields of each event's line.
        """
        if lines:
            self.log.info("event.settled", **{EACH: lines})

    def delivered_at_last(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Log stored events that sinks have accepted, the same way.

        Args:
            lines: The fields of each event's line.
        """
        if lines:
            self.log.info("pending.delivered", **{EACH: lines})

    def repeated(self, level: Level, event: str, *, cause: str, **fields: Any) -> bool:
        """Log what may repeat: once per cause, then again with a number after some minutes.

        Args:
            level: As a logger's method.
            event: A name of the catalogue.
            cause: What makes two lines the same; not part of the line.
            fields: The line's fields.

        Returns:
            Whether a line was written.
        """
        return self._repeats.say(level, event, cause=cause, **fields)

    def reset(self, prefix: str = "") -> int | None:
        """The causes that begin so are over; all of them unless told otherwise.

        Returns:
            Number of lines that were not written for them; None if none was written at all.
        """
        return self._repeats.forget(prefix)

    def count(self, count: Count, number: int = 1, **labels: str) -> None:
        """Count something."""
        self._telemetry.add({(count, tuple(sorted(labels.items()))): number})

    def add(self, numbers: Mapping[tuple[Count, Labels], int]) -> None:
        """Count several things at once, as a batch does; labels in the order of their names."""
        self._telemetry.add(numbers)
