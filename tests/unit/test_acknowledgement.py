"""An acknowledgement counts for the next answer at once, even while its confirm call goes on with other handles."""

import threading
import time

import pytest

from tests.helpers import event
from tests.polling import until
from tests.unit.test_pipeline import Bench, Route, Source
from vodpoller.delivery.in_flight import DeliveryWait
from vodpoller.errors import RefusedHandlesError
from vodpoller.events.event import Lease, PulledEvent, make_event
from vodpoller.liveness import Liveness
from vodpoller.pipeline import Batch, Pipeline
from vodpoller.router import Router
from vodpoller.vod.confirmer import Confirmer

LEASE_SECS = 1.0
CAST = {"EventType": "MediaCastStatusChanged", "MediaCastStatusChangedEvent": {"CastId": "7", "Status": "Working"}}
DELETED = {"EventType": "FileDeleted", "FileDeleteEvent": {"FileIdSet": ["5285890784273533167"]}}


class Vod:
    """Refuses a full set because one handle is stale, accepts its first half, and hangs with the second half."""

    def __init__(self):
        self.callers = set()
        self.may_send, self.released = threading.Event(), threading.Event()
        self.calls = []

    def await_confirm_slot(self, timeout_secs):
        self.callers.add(threading.current_thread().name)
        (self.may_send if threading.current_thread().name == "first" else self.released).wait(10)
        return True

    def confirm(self, sub_app_id, handles, timeout_secs=None):
        self.calls.append(list(handles))
        if len(handles) == 16:
            raise RefusedHandlesError("one is stale")
        if "first" not in handles:
            self.released.wait(10)
        return "r"


@pytest.mark.system
@pytest.mark.parametrize("content", [CAST, DELETED])
def test_equal_event_after_a_confirmed_lease_is_new_during_the_call(tmp_path, log, content):
    bench = Bench(tmp_path, log, sinks=("a",))
    vod = Vod()
    pipeline = Pipeline(
        router=Router([Route(sinks=("a",))]),
        workers=bench.workers,
        in_flight=bench.in_flight,
        journal=bench.journal,
        confirmer=Confirmer(vod=vod, telemetry=bench.telemetry, liveness=Liveness(), reserve_secs=0.1),
        confirm_reserve_secs=0.1,
        requests_per_sec=100.0,
        telemetry=bench.telemetry,
    )
    pullers = []

    def process(name, events, lease_secs):
        now = time.monotonic()
        pulled = [PulledEvent(handle=handle, event=event) for handle, event in events]
        lease = Lease(starts_at=now, secs=lease_secs)
        batch = Batch(
            source=Source(), events=pulled, malformed=(), lease=lease, received_at=now, request_id=f"r-{name}"
        )
        pullers.append(threading.Thread(target=pipeline.process, args=(batch, DeliveryWait()), name=name))
        pullers[-1].start()

    equal = make_event(content, source="main", sub_app_id=None)
    try:
        process("first", [("first", equal)], LEASE_SECS)
        until(lambda: vod.callers == {"first"})
        # With "first" these are 17 handles, which need two calls: a second caller shows that they are in the queue.
        process("others", [(f"h{number}", event(number)) for number in range(16)], 30.0)
        until(lambda: vod.callers == {"first", "others"})
        vod.may_send.set()
        until(lambda: len(vod.calls) == 3)
        assert "first" in vod.calls[1]  # VOD accepted its confirm and no longer holds the event
        over_at = time.monotonic() + LEASE_SECS
        until(lambda: time.monotonic() >= over_at)

        process("again", [("again", equal)], 30.0)
        until(lambda: len(bench.sinks["a"].accepted) == 18, secs=3, what="the equal event was swallowed")
    finally:
        vod.released.set()
        for puller in pullers:
            puller.join()
        bench.close()
