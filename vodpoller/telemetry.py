"""Telemetry: the one object that writes log lines, limits repeated ones, counts and measures.

Each part of the daemon gets a `Scope` of it. Counts have the names and labels of the metrics
(`vodpoller/listener/README.md`), so that all code that shows numbers reads them here and counts nothing itself.
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
    """The counters; each with its labels."""

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
    """The measured durations, in seconds; each with its labels."""

    EVENT_SETTLE = "event_settle_duration_seconds"  # source
    SINK_DELIVERY = "sink_delivery_duration_seconds"  # sink
    JOURNAL_COMMIT = "journal_commit_duration_seconds"


class Gauge(StrEnum):
    """The values that are read periodically; each with its labels. A value that cannot be read is absent."""

    QUEUE_EVENTS = "queue_events"  # source
    DEAD_LETTERS = "dead_letters"  # sink, reason
    JOURNAL_SIZE = "journal_size_bytes"


@dataclass(frozen=True, slots=True, kw_only=True)
class Distribution:
    """A distribution of durations.

    Args:
        numbers: The number of durations in each bucket of `BUCKETS_SECS`; the last is that of all longer ones.
        sum_secs: The sum of the durations.
    """

    numbers: Sequence[int] = (0,) * (len(BUCKETS_SECS) + 1)
    sum_secs: float = 0.0

    def quantile_secs(self, share: float) -> float | None:
        """The quantile of the durations, interpolated within its bucket; None if there are no durations.

        Args:
            share: The share of the durations that are shorter, 0 to 1.
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
        """The durations that came after an earlier state."""
        numbers = [now - then for now, then in zip(self.numbers, before.numbers, strict=True)]
        return Distribution(numbers=numbers, sum_secs=self.sum_secs - before.sum_secs)


@dataclass(frozen=True, slots=True, kw_only=True)
class Numbers:
    """All counts and durations: until one moment, or of an interval.

    Args:
        at: The moment, or the end of the interval: monotonic time, in seconds.
        secs: The length of the interval; 0 if it is the state at a moment.
        counts: The numbers, by count and labels.
        durations: The distributions, by duration and labels.
    """

    at: float
    secs: float
    counts: Mapping[tuple[Count, Labels], int]
    durations: Mapping[tuple[Duration, Labels], Distribution]

    def total(self, count: Count, **labels: str) -> int:
        """The sum of a count over all label sets that contain these labels."""
        wanted = set(labels.items())
        return sum(number for (name, found), number in self.counts.items() if name is count and wanted <= set(found))

    def per_sec(self, count: Count, **labels: str) -> float:
        """The same sum per second of the interval."""
        return self.total(count, **labels) / self.secs if self.secs > 0 else 0.0

    def since(self, before: "Numbers") -> "Numbers":
        """The numbers of the interval since an earlier state."""
        nothing = Distribution()
        return Numbers(
            at=self.at,
            secs=self.at - before.at,
            counts={key: number - before.counts.get(key, 0) for key, number in self.counts.items()},
            durations={key: it.since(before.durations.get(key, nothing)) for key, it in self.durations.items()},
        )


def sink_label(sink: str, sinks: Collection[str]) -> str:
    """The label for the sink of a stored event: always one of a closed set.

    Args:
        sink: As it is stored; empty if no route named one.
        sinks: Names of the configured sinks.
    """
    if not sink:
        return NO_SINK
    return sink if sink in sinks else REMOVED_SINK


def _bounded(line: Mapping[str, Any]) -> Mapping[str, Any]:
    """The fields of an event's line, with texts of bounded length and without the list of failed snapshots."""
    texts = ("event_type", "task_id", "file_id")
    if "failed_snapshots" not in line and all(len(line[name]) <= REMEMBERED_CHARS for name in texts):
        return line
    short = {name: line[name][:REMEMBERED_CHARS] for name in texts}
    return {name: value for name, value in line.items() if name != "failed_snapshots"} | short


class _Bins:
    """A distribution to which durations can be added; not thread-safe."""

    __slots__ = ("numbers", "sum_secs")

    def __init__(self) -> None:
        self.numbers = [0] * (len(BUCKETS_SECS) + 1)
        self.sum_secs = 0.0

    def add(self, secs: float, number: int) -> None:
        self.numbers[bisect_left(BUCKETS_SECS, secs)] += number
        self.sum_secs += secs * number


class Telemetry:
    """The log lines and the numbers of the whole process.

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
        """Use another log in the scopes that are made from now on.

        Args:
            log: Destination of log lines.
        """
        self.log = log

    def scope(self) -> "Scope":
        """Make the scope of one part of the daemon, which limits the part's repeated lines separately."""
        return Scope(self, RepeatLimiter(self.log, monotonic=self._monotonic))

    @property
    def dropped_lines(self) -> int:
        """Number of log lines that were dropped so far because the log was not read."""
        # structlog documents this attribute for code that wraps its loggers ("BoundLoggerBase").
        logger = getattr(self.log, "_logger", None)
        return logger.dropped_lines if isinstance(logger, LineLogger) else 0

    def add(self, numbers: Mapping[tuple[Count, Labels], int]) -> None:
        """Add to several counts at once. Labels must be in the order of their names."""
        with self._lock:
            self._counts.update(numbers)

    def measure(self, duration: Duration, labels: Labels, secs: float, number: int = 1) -> None:
        """Add a duration.

        Args:
            duration: The kind of the duration.
            labels: Its labels.
            secs: The duration, in seconds.
            number: How often it is added.
        """
        with self._lock:
            self._bins.setdefault((duration, labels), _Bins()).add(secs, number)

    def set(self, gauge: Gauge, values: Mapping[Labels, float]) -> None:
        """Replace all values of a gauge; label sets that are left out have no value from now on."""
        with self._lock:
            self._gauges[gauge] = values

    def gauge(self, gauge: Gauge) -> Mapping[Labels, float]:
        """The values of a gauge as they were last set; empty if they never were."""
        with self._lock:
            return self._gauges.get(gauge, {})

    def remember(self, at: float, lines: Sequence[Mapping[str, Any]]) -> None:
        """Keep the lines of settled events; the status page shows the last ones.

        Args:
            at: When they were settled, in seconds since 1970.
            lines: The fields of each event's line.
        """
        kept = [(at, _bounded(line)) for line in lines]
        with self._lock:
            self._recent.extend(kept)

    def recent(self) -> Sequence[tuple[float, Mapping[str, Any]]]:
        """The last events that were settled, the latest first, each with its time and the fields of its line."""
        with self._lock:
            return list(reversed(self._recent))

    def numbers(self) -> Numbers:
        """All counts and durations so far."""
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
        """Begin a new interval for `lately`. To be called periodically."""
        self._samples.append(self.numbers())

    def lately(self) -> Numbers:
        """The numbers since the last but one `sample`, or since the start."""
        return self.numbers().since(self._samples[0])

    def counts(self) -> Mapping[tuple[Count, Labels], int]:
        """All counts so far."""
        return self.numbers().counts

    def total(self, count: Count, **labels: str) -> int:
        """The sum of a count over all label sets that contain these labels."""
        return self.numbers().total(count, **labels)


class Scope:
    """The telemetry of one part of the daemon.

    Args:
        telemetry: The telemetry of the process.
        repeats: Limits this part's repeated lines.
    """

    def __init__(self, telemetry: Telemetry, repeats: RepeatLimiter) -> None:
        self._telemetry = telemetry
        self._repeats = repeats
        self.log = telemetry.log

    def settled(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Log the settled events of a batch: rendered together and written in one write.

        Args:
            lines: The fields of each event's line.
        """
        if lines:
            self.log.info("event.settled", **{EACH: lines})

    def stored_delivered(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Log stored events that sinks have accepted, also in one write.

        Args:
            lines: The fields of each event's line.
        """
        if lines:
            self.log.info("pending.delivered", **{EACH: lines})

    def remember(self, at: float, lines: Sequence[Mapping[str, Any]]) -> None:
        """As `Telemetry.remember`."""
        self._telemetry.remember(at, lines)

    def repeated(self, level: Level, event: str, *, cause: str, **fields: Any) -> bool:
        """Log a line that may repeat: once per cause, and after some minutes again, with the number of repetitions.

        Args:
            level: The level of the line.
            event: A name of the catalogue.
            cause: Lines of the same cause are repetitions; it is not part of the line.
            fields: The line's fields.

        Returns:
            Whether a line was written.
        """
        return self._repeats.log_once(level, event, cause=cause, **fields)

    def reset(self, prefix: str = "") -> int | None:
        """Forget the causes that start with `prefix`, by default all, since they are over.

        Returns:
            Number of lines that were suppressed for them; None if no such cause was logged.
        """
        return self._repeats.reset(prefix)

    def count(self, count: Count, number: int = 1, **labels: str) -> None:
        """Add to one count."""
        self._telemetry.add({(count, tuple(sorted(labels.items()))): number})

    def add(self, numbers: Mapping[tuple[Count, Labels], int]) -> None:
        """Add to several counts at once. Labels must be in the order of their names."""
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
