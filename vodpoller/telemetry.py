"""Telemetry: the one object that writes log lines, limits those that repeat, counts and measures.

Each part of the daemon gets a `Scope` of it. What is counted has the names and labels of the metrics
(`vodpoller/listener/README.md`), so that whatever shows numbers reads them here and counts nothing itself.
"""

import threading
import time
from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

from vodpoller.logs import EACH, Level, LineLogger, Logger, RepeatLimiter

Labels = tuple[tuple[str, str], ...]
"""Names and values, in the order of the names."""

BUCKETS_SECS: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 30.0)
RECENT_EVENTS: Final = 100
REMEMBERED_CHARS: Final = 200  # of each text that an event brings
NO_SINK: Final = "(none)"
REMOVED_SINK: Final = "(removed)"


class Count(StrEnum):
    """What is counted; each with its labels."""

    PULLS = "pulls_total"  # source, result = events | empty | failed
    PULL_ERRORS = "pull_errors_total"  # source, code = one of `vod.answers.PULL_ERROR_CODES`
    EVENTS_RECEIVED = "events_received_total"  # source, event_type = a documented one, or "other"
    EVENTS_REDELIVERED = "events_redelivered_total"  # source
    EVENTS_SETTLED = "events_settled_total"  # source, settlement, reason
    CONFIRMS = "confirms_total"  # source, result = a ConfirmResult
    LEASES_EXPIRED = "leases_expired_total"  # source
    SINK_DELIVERIES = "sink_deliveries_total"  # sink, outcome = delivered | rejected | stored | left | known
    SINK_ATTEMPTS = "sink_attempts_total"  # sink, result = accepted | rejected | failed
    DEAD_LETTERS_CREATED = "dead_letters_created_total"  # sink, reason
    JOURNAL_ERRORS = "journal_errors_total"
    CREDENTIALS_REFRESHES = "credentials_refreshes_total"  # result = ok | failed
    CALLBACKS = "callbacks_total"  # source, result = a CallbackResult


class Duration(StrEnum):
    """What is measured in seconds; each with its labels."""

    EVENT_SETTLE = "event_settle_duration_seconds"  # source
    SINK_DELIVERY = "sink_delivery_duration_seconds"  # sink
    JOURNAL_COMMIT = "journal_commit_duration_seconds"


class Gauge(StrEnum):
    """What is asked for now and then; each with its labels. What cannot be known has no value."""

    QUEUE_EVENTS = "queue_events"  # source
    DEAD_LETTERS = "dead_letters"  # sink, reason
    JOURNAL_SIZE = "journal_size_bytes"


@dataclass(frozen=True, slots=True, kw_only=True)
class Distribution:
    """How long something took, each time.

    Args:
        numbers: How often, by the bounds of `BUCKETS_SECS` that were not passed; the last is what passed them all.
        sum_secs: All together.
    """

    numbers: Sequence[int] = (0,) * (len(BUCKETS_SECS) + 1)
    sum_secs: float = 0.0

    def quantile_secs(self, share: float) -> float | None:
        """The time within which that share of them ended, as far as the bounds tell; None if there are none.

        Args:
            share: 0 to 1.
        """
        left = share * sum(self.numbers)
        lower = 0.0
        for number, upper in zip(self.numbers, BUCKETS_SECS, strict=False):
            if number and left <= number:
                return lower + (upper - lower) * left / number
            left -= number
            lower = upper
        return lower if any(self.numbers) else None

    def since(self, before: "Distribution") -> "Distribution":
        """What came after an earlier state of it."""
        numbers = [now - then for now, then in zip(self.numbers, before.numbers, strict=True)]
        return Distribution(numbers=numbers, sum_secs=self.sum_secs - before.sum_secs)


@dataclass(frozen=True, slots=True, kw_only=True)
class Numbers:
    """What was counted and measured: until one moment, or between two.

    Args:
        at: The moment at which it ends: monotonic time, in seconds.
        secs: The time that it is of.
        counts: By what was counted, and its labels.
        durations: By what was measured, and its labels.
    """

    at: float
    secs: float
    counts: Mapping[tuple[Count, Labels], int]
    durations: Mapping[tuple[Duration, Labels], Distribution]

    def total(self, count: Count, **labels: str) -> int:
        """The sum of what was counted under these labels, whatever the others are."""
        wanted = set(labels.items())
        return sum(number for (name, found), number in self.counts.items() if name is count and wanted <= set(found))

    def per_sec(self, count: Count, **labels: str) -> float:
        """The same, for each second of the time."""
        return self.total(count, **labels) / self.secs if self.secs > 0 else 0.0

    def since(self, before: "Numbers") -> "Numbers":
        """What came after an earlier state."""
        nothing = Distribution()
        return Numbers(
            at=self.at,
            secs=self.at - before.at,
            counts={key: number - before.counts.get(key, 0) for key, number in self.counts.items()},
            durations={key: it.since(before.durations.get(key, nothing)) for key, it in self.durations.items()},
        )


def sink_label(sink: str, sinks: Collection[str]) -> str:
    """The label of a sink that a stored event names: always one of a closed set.

    Args:
        sink: As it is stored; empty if no route named one.
        sinks: Names of the configured sinks.
    """
    if not sink:
        return NO_SINK
    return sink if sink in sinks else REMOVED_SINK


def _without_what_is_long(line: Mapping[str, Any]) -> Mapping[str, Any]:
    """The fields of an event's line, with texts of bounded length."""
    texts = ("event_type", "task_id", "file_id")
    if "failed_snapshots" not in line and all(len(line[name]) <= REMEMBERED_CHARS for name in texts):
        return line
    short = {name: line[name][:REMEMBERED_CHARS] for name in texts}
    return {name: value for name, value in line.items() if name != "failed_snapshots"} | short


class _Bins:
    """A distribution that grows; not safe for threads."""

    __slots__ = ("numbers", "sum_secs")

    def __init__(self) -> None:
        self.numbers = [0] * (len(BUCKETS_SECS) + 1)
        self.sum_secs = 0.0

    def add(self, secs: float, number: int) -> None:
        self.numbers[bisect_left(BUCKETS_SECS, secs)] += number
        self.sum_secs += secs * number


class Telemetry:
    """Lines and numbers of the whole process.

    Args:
        log: Destination of log lines.
        monotonic: The clock of the limit on repeated lines, in seconds.
    """

    def __init__(self, log: Logger, *, monotonic: Callable[[], float] = time.monotonic) -> None:
        self.log = log
        self._monotonic = monotonic
        self._lock = threading.Lock()
        self._counts: Counter[tuple[Count, Labels]] = Counter()
        self._bins: dict[tuple[Duration, Labels], _Bins] = {}
        self._gauges: dict[Gauge, Mapping[Labels, float]] = {}
        self._recent: deque[tuple[float, Mapping[str, Any]]] = deque(maxlen=RECENT_EVENTS)
        self._samples: deque[Numbers] = deque([self.numbers()], maxlen=2)

    def log_to(self, log: Logger) -> None:
        """Have what gets its scope from now on write to another log.

        Args:
            log: Where to.
        """
        self.log = log

    def scope(self) -> "Scope":
        """The view of one part of the daemon: its causes of repeated lines are its own."""
        return Scope(self, RepeatLimiter(self.log, monotonic=self._monotonic))

    @property
    def dropped_lines(self) -> int:
        """Number of log lines that were dropped so far because the log was not read."""
        # structlog documents this attribute for code that wraps its loggers ("BoundLoggerBase").
        logger = getattr(self.log, "_logger", None)
        return logger.dropped_lines if isinstance(logger, LineLogger) else 0

    def add(self, numbers: Mapping[tuple[Count, Labels], int]) -> None:
        """Count several things at once."""
        with self._lock:
            self._counts.update(numbers)

    def measure(self, duration: Duration, labels: Labels, secs: float, number: int = 1) -> None:
        """Note how long something took.

        Args:
            duration: What.
            labels: Its labels.
            secs: How long.
            number: Of things that took so long.
        """
        with self._lock:
            self._bins.setdefault((duration, labels), _Bins()).add(secs, number)

    def set(self, gauge: Gauge, values: Mapping[Labels, float]) -> None:
        """Replace all values of a gauge; what is left out is not known any more."""
        with self._lock:
            self._gauges[gauge] = values

    def gauge(self, gauge: Gauge) -> Mapping[Labels, float]:
        """The values of a gauge, as they were set last; nothing if they never were."""
        with self._lock:
            return self._gauges.get(gauge, {})

    def remember(self, at: float, lines: Sequence[Mapping[str, Any]]) -> None:
        """Keep the fates of events, for those who look at the last ones.

        Args:
            at: When they were settled, in seconds since 1970.
            lines: The fields of each event's line.
        """
        kept = [(at, _without_what_is_long(line)) for line in lines]
        with self._lock:
            self._recent.extend(kept)

    def recent(self) -> Sequence[tuple[float, Mapping[str, Any]]]:
        """The last events that were settled, the latest first, each with its time and the fields of its line."""
        with self._lock:
            return list(reversed(self._recent))

    def numbers(self) -> Numbers:
        """All that was counted and measured so far."""
        with self._lock:
            return Numbers(
                at=self._monotonic(),
                secs=0.0,
                counts=dict(self._counts),
                durations={
                    key: Distribution(numbers=tuple(bins.numbers), sum_secs=bins.sum_secs)
                    for key, bins in self._bins.items()
                },
            )

    def sample(self) -> None:
        """Begin another interval for `lately`: to be called now and then."""
        self._samples.append(self.numbers())

    def lately(self) -> Numbers:
        """What came since the last `sample` but one, or since the start."""
        return self.numbers().since(self._samples[0])

    def counts(self) -> Mapping[tuple[Count, Labels], int]:
        """All that was counted so far."""
        return self.numbers().counts

    def total(self, count: Count, **labels: str) -> int:
        """The sum of what was counted under these labels, whatever the others are."""
        return self.numbers().total(count, **labels)


class Scope:
    """What one part of the daemon says and counts.

    Args:
        telemetry: Of the process.
        repeats: Limits this part's repeated lines.
    """

    def __init__(self, telemetry: Telemetry, repeats: RepeatLimiter) -> None:
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

    def stored_delivered(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Log stored events that sinks have accepted, the same way.

        Args:
            lines: The fields of each event's line.
        """
        if lines:
            self.log.info("pending.delivered", **{EACH: lines})

    def remember(self, at: float, lines: Sequence[Mapping[str, Any]]) -> None:
        """As `Telemetry.remember`."""
        self._telemetry.remember(at, lines)

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
        return self._repeats.log_once(level, event, cause=cause, **fields)

    def reset(self, prefix: str = "") -> int | None:
        """The causes that begin so are over; all of them unless told otherwise.

        Returns:
            Number of lines that were not written for them; None if none was written at all.
        """
        return self._repeats.reset(prefix)

    def count(self, count: Count, number: int = 1, **labels: str) -> None:
        """Count something."""
        self._telemetry.add({(count, tuple(sorted(labels.items()))): number})

    def add(self, numbers: Mapping[tuple[Count, Labels], int]) -> None:
        """Count several things at once, as a batch does; labels in the order of their names."""
        self._telemetry.add(numbers)

    def measure(self, duration: Duration, labels: Labels, secs: float, number: int = 1) -> None:
        """As `Telemetry.measure`."""
        self._telemetry.measure(duration, labels, secs, number)

    def set(self, gauge: Gauge, values: Mapping[Labels, float]) -> None:
        """As `Telemetry.set`."""
        self._telemetry.set(gauge, values)

    def sample(self) -> None:
        """As `Telemetry.sample`."""
        self._telemetry.sample()
