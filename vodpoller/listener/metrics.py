"""`/metrics`: the counts of telemetry and the values of the daemon's status, read for each request.

Nothing is counted here. Each possible label set exists from the start, so that a rate includes its first event. Labels
come from the configuration or from closed sets, never from an event.
"""

import platform
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Final

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from vodpoller.events.types import DOCUMENTED_EVENT_TYPES, OTHER
from vodpoller.journal.operator import REASONS
from vodpoller.listener.view import View
from vodpoller.settlement import CallbackResult, ConfirmResult, Reason, Settlement
from vodpoller.status import Status
from vodpoller.telemetry import (
    BUCKETS_SECS,
    NO_SINK,
    REMOVED_SINK,
    Count,
    Distribution,
    Duration,
    Gauge,
    Labels,
    Numbers,
    sink_label,
)
from vodpoller.vod.answers import PULL_ERROR_CODES

PREFIX: Final = "vodpoller_"

_SOURCE: Final = "source"
_SINK: Final = "sink"
_PULLED: Final = "source that pulls"  # label `source`
_CALLED: Final = "source of callbacks"  # label `source`
_STORED_SINK: Final = "stored sink"  # label `sink`, also of sinks that the configuration no longer has
_SHOWN: Final[Mapping[str, str]] = {_PULLED: "source", _CALLED: "source", _STORED_SINK: "sink"}
_REASONS_OF_STORED: Final = frozenset({Reason.GAVE_UP, Reason.SINK_REMOVED})

_COUNTS: Final[Mapping[Count, tuple[str, Mapping[str, Sequence[str]]]]] = {
    Count.PULLS: ("Pulls, by their result.", {_PULLED: (), "result": ("events", "empty", "failed")}),
    Count.PULL_ERRORS: ("Pulls that failed, by the kind of failure.", {_PULLED: (), "code": PULL_ERROR_CODES}),
    Count.EVENTS_RECEIVED: (
        "Events that were received by pulls and callbacks.",
        {_SOURCE: (), "event_type": (*sorted(DOCUMENTED_EVENT_TYPES), OTHER)},
    ),
    Count.EVENTS_REDELIVERED: ("Received events that were already known.", {_SOURCE: ()}),
    Count.EVENTS_SETTLED: (
        "Events, by their settlement and its reason.",
        {
            _SOURCE: (),
            "settlement": tuple(it.value for it in Settlement),
            "reason": tuple(it.value for it in Reason if it not in _REASONS_OF_STORED),
        },
    ),
    Count.CONFIRMS: (
        "Handles, by the result of their confirm.",
        {_PULLED: (), "result": tuple(it.value for it in ConfirmResult)},
    ),
    Count.CALLBACKS: (
        "Requests at callback sources, by their result.",
        {_CALLED: (), "result": tuple(it.value for it in CallbackResult)},
    ),
    Count.LEASES_EXPIRED: ("Events whose lease ended before VOD acknowledged their confirm.", {_SOURCE: ()}),
    Count.SINK_DELIVERIES: (
        "Events at sinks, by the outcome, once per arrival of the event.",
        {_SINK: (), "outcome": ("delivered", "rejected", "stored", "left", "known")},
    ),
    Count.SINK_ATTEMPTS: (
        "Attempts to deliver an event to a sink, by their result.",
        {_SINK: (), "result": ("accepted", "rejected", "failed")},
    ),
    Count.DEAD_LETTERS_CREATED: ("Events that became dead letters.", {_STORED_SINK: (), "reason": REASONS["dead"]}),
    Count.JOURNAL_ERRORS: ("Reads and writes of the journal that failed.", {}),
    Count.CREDENTIALS_REFRESHES: ("Renewals of the temporary API key.", {"result": ("ok", "failed")}),
}
_DURATIONS: Final[Mapping[Duration, tuple[str, Sequence[str]]]] = {
    Duration.EVENT_SETTLE: ("Time from the answer with an event until it was settled and confirmed.", (_SOURCE,)),
    Duration.SINK_DELIVERY: ("Time of the calls of a sink.", (_SINK,)),
    Duration.JOURNAL_COMMIT: ("Time of the transactions of the journal.", ()),
}


def exposition(view: View, accept: str) -> tuple[str, bytes]:
    """All metrics, as text.

    Args:
        view: The process and the daemon.
        accept: The header `Accept` of the request, which selects the format.

    Returns:
        The content type, and the content.
    """
    registry = CollectorRegistry(auto_describe=False)
    ProcessCollector(registry=registry)
    registry.register(_Collector(view))
    encoder, content_type = choose_encoder(accept)
    return content_type, encoder(registry)


@dataclass(frozen=True, slots=True)
class _Names:
    """The label values that come from the configuration."""

    pulled: Sequence[str]
    called: Sequence[str]
    sinks: Sequence[str]

    def of(self, label: str) -> Sequence[str]:
        match label:
            case "source":
                return (*self.pulled, *self.called)
            case "source that pulls":
                return self.pulled
            case "source of callbacks":
                return self.called
            case "sink":
                return self.sinks
            case _:
                return (*self.sinks, NO_SINK, REMOVED_SINK)


class _Collector(Collector):
    """Makes the metrics for one request.

    Args:
        view: The process and the daemon.
    """

    def __init__(self, view: View) -> None:
        self._view = view

    def collect(self) -> Iterator[Metric]:
        """The interface of prometheus_client: yields each metric once."""
        status, numbers = self._view.known(), self._view.telemetry.numbers()
        names = _Names(
            [it.name for it in status.sources if it.type == "pull"],
            [it.name for it in status.sources if it.type == "callback"],
            [it.name for it in status.sinks],
        )
        yield from _of_process(status)
        yield from _counters(numbers, names)
        yield from _histograms(numbers, names)
        yield from _of_sources(status)
        yield from _of_sinks(status)
        yield from _of_journal(status)
        yield _of_credentials(status)
        yield from self._gauges(names)

    def _gauges(self, names: _Names) -> Iterator[Metric]:
        telemetry = self._view.telemetry
        yield _gauge(
            Gauge.QUEUE_EVENTS,
            "Events that wait at VOD, up to three minutes late. Absent if the key lacks the right to ask VOD.",
            ("source",),
            {_values(labels, ("source",)): number for labels, number in telemetry.gauge(Gauge.QUEUE_EVENTS).items()},
        )
        found = {
            _values(labels, ("sink", "reason")): number
            for labels, number in telemetry.gauge(Gauge.DEAD_LETTERS).items()
        }
        every = dict.fromkeys(_combinations((names.of(_STORED_SINK), REASONS["dead"])), 0.0)
        yield _gauge(Gauge.DEAD_LETTERS, "Stored events that wait for the operator.", ("sink", "reason"), every | found)
        size = telemetry.gauge(Gauge.JOURNAL_SIZE)
        yield _gauge(Gauge.JOURNAL_SIZE, "The size of the stored events.", (), {(): size.get((), 0.0)})
        offset_secs = self._view.clock_offset_secs()
        yield _gauge(
            "clock_offset_seconds",
            "VOD's time minus this machine's time. Absent until VOD has answered.",
            (),
            {} if offset_secs is None else {(): offset_secs},
        )
        dropped = CounterMetricFamily(
            f"{PREFIX}log_lines_dropped", "Log lines that were dropped because the log was not read."
        )
        dropped.add_metric((), telemetry.dropped_lines)
        yield dropped


def _of_process(status: Status) -> Iterator[Metric]:
    yield _gauge(
        "build_info",
        "Always 1.",
        ("version", "python"),
        {(status.version, platform.python_version()): 1},
    )
    reload = status.reload
    yield _gauge(
        "config_last_reload_successful",
        "1 if the last reload succeeded or there was none.",
        (),
        {(): float(reload.successful)},
    )
    yield _gauge(
        "config_last_reload_success_timestamp_seconds",
        "The time since which the configuration is in use.",
        (),
        {(): reload.last_success_at or status.started_at},
    )


def _of_sources(status: Status) -> Iterator[Metric]:
    pulled = [it for it in status.sources if it.type == "pull"]
    yield _gauge(
        "pull_last_success_timestamp_seconds",
        "The time at which VOD last answered a pull; 0 if it has not done so since the start.",
        ("source",),
        {(it.name,): it.last_pull_at or 0.0 for it in pulled},
    )
    yield _gauge(
        "pulls_in_flight",
        "Outstanding pulls.",
        ("source",),
        {(it.name,): it.pulls_in_flight for it in pulled},
    )


def _of_sinks(status: Status) -> Iterator[Metric]:
    sinks = status.sinks
    for name, text, values in (
        ("sink_up", "0 while the sink is down.", {it.name: float(it.down_since is None) for it in sinks}),
        ("sink_queue_events", "Events that wait for the sink.", {it.name: float(it.queued) for it in sinks}),
        (
            "sink_queue_limit_events",
            "The maximum number of events that may wait for the sink.",
            {it.name: float(it.queue_max_events) for it in sinks},
        ),
        (
            "sink_last_success_timestamp_seconds",
            "The time at which the sink last accepted an event; 0 if it has not done so since the start.",
            {it.name: it.last_success_at or 0.0 for it in sinks},
        ),
    ):
        yield _gauge(name, text, ("sink",), {(sink,): value for sink, value in values.items()})


def _of_journal(status: Status) -> Iterator[Metric]:
    sinks = [it.name for it in status.sinks]
    events = dict.fromkeys(_combinations(((*sinks, REMOVED_SINK),)), 0.0)
    oldest: dict[tuple[str, ...], float] = {}
    for stored in status.stored:
        if stored.state == "pending":
            label = (sink_label(stored.sink, sinks),)
            events[label] = events.get(label, 0.0) + stored.events
            oldest[label] = min(stored.oldest_at, oldest.get(label, stored.oldest_at))
    yield _gauge("pending_events", "Stored events that will be tried again.", ("sink",), events)
    yield _gauge(
        "pending_oldest_timestamp_seconds",
        "The time at which the oldest pending event was stored. Absent if there is none.",
        ("sink",),
        oldest,
    )
    yield _gauge(
        "journal_limit_bytes",
        "The maximum size of the stored events (`journal.max_bytes`).",
        (),
        {(): status.journal.limit_bytes},
    )


def _of_credentials(status: Status) -> Metric:
    expires_at = status.credentials.expires_at
    return _gauge(
        "credentials_expiry_timestamp_seconds",
        "The time at which the temporary API key ends. Absent if there is none.",
        (),
        {} if expires_at is None else {(): expires_at},
    )


def _counters(numbers: Numbers, names: _Names) -> Iterator[Metric]:
    for count, (text, labels) in _COUNTS.items():
        shown = tuple(_SHOWN.get(label, label) for label in labels)
        family = CounterMetricFamily(PREFIX + count.removesuffix("_total"), text, labels=shown)
        values = dict.fromkeys(_combinations(allowed or names.of(label) for label, allowed in labels.items()), 0)
        for (counted, found), number in numbers.counts.items():
            if counted is count:
                values[_values(found, shown)] = number
        for key, number in values.items():
            family.add_metric(key, number)
        yield family


def _histograms(numbers: Numbers, names: _Names) -> Iterator[Metric]:
    for duration, (text, labels) in _DURATIONS.items():
        family = HistogramMetricFamily(PREFIX + duration, text, labels=labels)
        values = dict.fromkeys(_combinations(names.of(label) for label in labels), Distribution())
        for (measured, found), distribution in numbers.durations.items():
            if measured is duration:
                values[_values(found, labels)] = distribution
        for key, distribution in values.items():
            family.add_metric(key, _buckets(distribution), distribution.sum_secs)
        yield family


def _combinations(values: Iterable[Iterable[str]]) -> list[tuple[str, ...]]:
    """All combinations of the values of some labels."""
    return list(product(*values))


def _buckets(distribution: Distribution) -> list[tuple[str, float]]:
    bounds = [*map(str, BUCKETS_SECS), "+Inf"]
    total = 0
    buckets: list[tuple[str, float]] = []
    for bound, number in zip(bounds, distribution.numbers, strict=True):
        total += number
        buckets.append((bound, total))
    return buckets


def _values(labels: Labels, order: Iterable[str]) -> tuple[str, ...]:
    found = dict(labels)
    return tuple(found[name] for name in order)


def _gauge(name: str, text: str, labels: Collection[str], values: Mapping[tuple[str, ...], float]) -> Metric:
    family = GaugeMetricFamily(PREFIX + name, text, labels=tuple(labels))
    for key, value in values.items():
        family.add_metric(key, value)
    return family
