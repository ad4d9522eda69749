"""Test support for authors of sinks: a conformance suite for every sink, and VOD's simulator as a fixture.

    from vodpoller.testing import SinkHarness, sink_conformance, vod_simulator

    class RowsHarness(SinkHarness):
        ...

    TestRows = sink_conformance(RowsHarness)

Stable from 1.0 on. pytest is imported here and nowhere else in vodpoller.
"""

import json
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Final, get_args

import pytest
import structlog

from vodpoller.errors import PartialFailureError, RejectedError, TransientError
from vodpoller.events.codec import decode_json
from vodpoller.events.event import Event, make_event
from vodpoller.simulator.service import Simulator
from vodpoller.sinks.contract import Recoverable, Sink, SinkConfig, SinkContext
from vodpoller.sinks.registry import available_sinks

__all__ = ["Simulator", "SinkConformance", "SinkHarness", "event", "sink_conformance", "vod_simulator"]

_TESTS_BY_ABILITY: Final[Mapping[str, str]] = {
    "hang": "test_a_receiver_that_hangs_costs_no_more_than_the_time_limit",
    "refuse": "test_of_a_call_with_a_refused_event_the_others_are_accepted",
    "reject": "test_a_rejected_event_is_an_error_of_its_own_and_harms_no_other",
}
SLACK_SECS: Final = 1.5  # a call on a busy machine may exceed its time limit by this


def event(number: int = 0, **more: Any) -> Event:
    """Make an event about a file.

    Args:
        number: The id of the file; events with different numbers are different events.
        more: Further members of the event's content.
    """
    content = {"EventType": "NewFileUpload", "FileUploadEvent": {"FileId": str(number)}, **more}
    return make_event(content, source="main", sub_app_id=None)


class SinkHarness(ABC):
    """Makes the sink under test, and simulates its receiver. Each test has its own harness.

    Args:
        tmp_path: An empty folder for this test.

    Attributes:
        sink_type: The name of the sink's entry point.
        cannot: Those of "hang", "refuse" and "reject" that cannot happen to such a sink, each with the reason. The
            suite then has no tests of them. For example, "refuse" needs a sink that takes several events in one call.
    """

    sink_type: str
    cannot: ClassVar[Mapping[str, str]] = MappingProxyType({})

    def __init__(self, tmp_path: Path) -> None:
        self.tmp_path = tmp_path

    @property
    def sink_class(self) -> type[Sink[Any]]:
        """The class that the entry point names."""
        loaded: type[Sink[Any]] = available_sinks()[self.sink_type].load()
        return loaded

    @abstractmethod
    def build(self, context: SinkContext) -> Sink[Any]:
        """Make the sink. At first, the receiver accepts all events."""

    @abstractmethod
    def accept(self) -> None:
        """From now on, the receiver accepts all events, also those that it has refused before."""

    @abstractmethod
    def fail(self) -> None:
        """From now on, the receiver answers every event with a failure that may pass."""

    def reject(self) -> None:
        """From now on, the receiver answers that it will never accept any event."""
        raise NotImplementedError

    def refuse(self, event: Event) -> None:
        """From now on, the receiver answers that it will never accept this event. It accepts all others."""
        raise NotImplementedError

    def hang(self) -> None:
        """From now on, the receiver does not answer."""
        raise NotImplementedError

    @abstractmethod
    def delivered(self, count: int) -> Sequence[bytes]:
        """The bodies that the receiver holds, in the order of their arrival.

        Args:
            count: The number of bodies that the test expects. A receiver that gets them after `deliver` has returned
                waits for them.
        """

    def close(self) -> None:  # noqa: B027 - not abstract: a receiver that is a file needs no end
        """End the receiver."""


def sink_conformance(harness_class: type[SinkHarness]) -> type["SinkConformance"]:
    """Make the conformance suite of one sink.

    Args:
        harness_class: Makes the sink and simulates its receiver.

    Returns:
        A class of tests. Assign it to a name that pytest collects: `TestRows = sink_conformance(RowsHarness)`.
    """

    class Conformance(SinkConformance):
        @pytest.fixture
        def harness(self, tmp_path: Path) -> Iterator[SinkHarness]:
            made = harness_class(tmp_path)
            yield made
            made.close()

    for ability in harness_class.cannot:
        setattr(Conformance, _TESTS_BY_ABILITY[ability], None)  # so that pytest does not collect the test
    return Conformance


def _deliver(sink: Sink[Any], events: Sequence[Event], timeout_secs: float = 10.0) -> None:
    """Deliver like a worker: in calls of at most `batch_events` events."""
    for start in range(0, len(events), sink.batch_events):
        sink.deliver(events[start : start + sink.batch_events], timeout_secs)


class SinkConformance:
    """The tests that every sink must pass. A subclass has a fixture `harness`; `sink_conformance` makes a subclass."""

    @pytest.fixture
    def harness(self) -> SinkHarness:
        """The harness of the sink under test."""
        raise NotImplementedError("override the fixture harness, or use sink_conformance()")

    @pytest.fixture
    def sink(self, harness: SinkHarness) -> Iterator[Sink[Any]]:
        """The sink under test, open and, if it is `Recoverable`, recovered."""
        made = harness.build(SinkContext(log=structlog.get_logger()))
        if isinstance(made, Recoverable):
            assert list(made.recover(None, [None])) == []
        yield made
        made.close()

    def test_the_class_and_its_config_keep_to_the_contract(self, harness: SinkHarness) -> None:
        sink_class = harness.sink_class
        assert issubclass(sink_class, Sink)
        assert issubclass(sink_class.Config, SinkConfig)
        fields = sink_class.Config.model_fields
        assert get_args(fields["type"].annotation) == (harness.sink_type,), "type must be Literal[its entry point]"
        assert [name for name, field in fields.items() if not field.description] == [], "keys without a description"

    def test_the_limits_that_it_asks_for_are_usable(self, sink: Sink[Any]) -> None:
        assert 1 <= sink.concurrency <= 512
        assert 1 <= sink.batch_events <= 10_000
        assert 0.1 <= sink.timeout_secs <= 300
        assert sink.max_per_minute is None or sink.max_per_minute >= 1

    def test_a_failure_accepts_nothing_and_the_retry_delivers_once(self, harness: SinkHarness, sink: Sink[Any]) -> None:
        harness.fail()
        with pytest.raises(TransientError):
            sink.deliver([event(1)], 5.0)
        harness.accept()
        sink.deliver([event(1)], 5.0)
        assert harness.delivered(1) == [event(1).body]

    def test_a_rejected_event_is_an_error_of_its_own_and_harms_no_other(
        self, harness: SinkHarness, sink: Sink[Any]
    ) -> None:
        harness.reject()
        with pytest.raises(RejectedError):
            sink.deliver([event(1)], 5.0)
        harness.accept()
        sink.deliver([event(2)], 5.0)
        assert harness.delivered(1) == [event(2).body]

    def test_of_a_call_with_a_refused_event_the_others_are_accepted(
        self, harness: SinkHarness, sink: Sink[Any]
    ) -> None:
        assert sink.batch_events > 1, 'the sink takes one event per call: put "refuse" into the harness\'s "cannot"'
        harness.refuse(event(1))
        with pytest.raises(PartialFailureError) as raised:
            sink.deliver([event(0), event(1), event(2)][: sink.batch_events], 5.0)
        assert set(raised.value.failures) == {1}
        assert isinstance(raised.value.failures[1], RejectedError)
        accepted = [event(0).body, event(2).body][: sink.batch_events - 1]
        assert harness.delivered(len(accepted)) == accepted

    def test_a_receiver_that_hangs_costs_no_more_than_the_time_limit(
        self, harness: SinkHarness, sink: Sink[Any]
    ) -> None:
        harness.hang()
        began = time.monotonic()
        with pytest.raises(TransientError):
            sink.deliver([event(1)], 0.3)
        assert 0.2 < time.monotonic() - began < 0.3 + SLACK_SECS
        harness.accept()
        sink.deliver([event(1)], 5.0)
        assert harness.delivered(1) == [event(1).body]

    def test_after_close_nothing_is_accepted_and_closing_again_does_no_harm(
        self, harness: SinkHarness, sink: Sink[Any]
    ) -> None:
        sink.deliver([event(1)], 5.0)
        sink.close()
        with pytest.raises(TransientError):
            sink.deliver([event(2)], 5.0)
        sink.close()
        assert harness.delivered(1) == [event(1).body]

    @pytest.mark.parametrize(
        "more",
        [
            {},
            {"Title": "雪の結晶 ❄ \U0001f3bf"},
            {"Title": "half a pair: \ud83c"},
            {"Title": "a line\nand another\r\n\u2028 end \0 of it"},
            {"FileId": 18446744073709551616123, "Ratio": 0.1, "Nothing": None},
            {"Deep": [[[{"a": {"b": [1, 2, {"c": []}]}}]]]},
        ],
        ids=["plain", "unicode", "lone surrogate", "line ends", "big numbers", "nested"],
    )
    def test_a_body_arrives_once_and_json_equal(
        self, harness: SinkHarness, sink: Sink[Any], more: dict[str, Any]
    ) -> None:
        sent = event(1, **more)
        sink.deliver([sent], 10.0)
        assert [decode_json(body.decode()) for body in harness.delivered(1)] == [sent.content]

    def test_a_body_of_5_megabytes_arrives_whole(self, harness: SinkHarness, sink: Sink[Any]) -> None:
        sent = event(1, Text="0123456789abcdef" * (5 * 65_536))
        sink.deliver([sent], 20.0)
        assert harness.delivered(1) == [sent.body]

    def test_events_arrive_in_the_order_of_the_call(self, harness: SinkHarness, sink: Sink[Any]) -> None:
        sent = [event(number) for number in range(50)]
        _deliver(sink, sent)
        assert harness.delivered(50) == [each.body for each in sent]

    def test_as_many_threads_as_it_asks_for_deliver_at_once(self, harness: SinkHarness, sink: Sink[Any]) -> None:
        sent = [[event(thread * 100 + number) for number in range(25)] for thread in range(sink.concurrency)]
        with ThreadPoolExecutor(sink.concurrency) as threads:
            list(threads.map(lambda events: _deliver(sink, events), sent))
        bodies = [each.body for events in sent for each in events]
        assert sorted(harness.delivered(len(bodies))) == sorted(bodies)

    def test_reopening_while_it_delivers_loses_and_repeats_nothing(self, harness: SinkHarness, sink: Sink[Any]) -> None:
        done = threading.Event()

        def reopen() -> None:
            while not done.wait(0.001):
                sink.reopen()

        reopening = threading.Thread(target=reopen)
        reopening.start()
        try:
            for number in range(40):
                sink.deliver([event(number)], 10.0)
        finally:
            done.set()
            reopening.join()
        numbers = [json.loads(body)["FileUploadEvent"]["FileId"] for body in harness.delivered(40)]
        assert numbers == list(map(str, range(40)))

    def test_the_position_of_a_file_is_the_end_of_what_was_accepted(self, sink: Sink[Any]) -> None:
        if not isinstance(sink, Recoverable):
            # A sink with only one of the two methods would not count as `Recoverable`.
            assert not hasattr(sink, "position")
            assert not hasattr(sink, "recover")
            return
        before = sink.position()
        sink.deliver([event(1)], 5.0)
        after = sink.position()
        assert (after.inode, after.offset_bytes) == (before.inode, before.offset_bytes + len(event(1).body) + 1)


@pytest.fixture
def vod_simulator() -> Iterator[Simulator]:
    """VOD's event API at `vod_simulator.url`, with an empty queue; `vod_simulator.feed([body])` adds events.

    It runs in a thread of this process, and accepts every API key.
    """
    with Simulator() as simulator:
        yield simulator
