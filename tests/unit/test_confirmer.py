import gc
import threading
import time
import weakref
from collections import Counter
from functools import partial
from itertools import pairwise

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.helpers import named
from tests.polling import until
from vodpoller.errors import (
    NoKeyError,
    OperatorError,
    RefusedHandlesError,
    StoppingError,
    ThrottledError,
    TransientError,
)
from vodpoller.events.event import Lease
from vodpoller.liveness import Liveness
from vodpoller.telemetry import Telemetry
from vodpoller.vod.confirmer import Confirmer
from vodpoller.vod.limiter import RateLimiter

HANDLES = [f"h{number}" for number in range(16)]


class FakeVod:
    """VOD on a fake clock; each call takes `call_secs`.

    A call raises the next error of `script`. If that is None, or the script is used up, it refuses stale handles.
    """

    def __init__(self, clock, *, stale=(), script=(), call_secs=0.01):
        self.clock = clock
        self.stale = set(stale)
        self.script = list(script)
        self.call_secs = call_secs
        self.calls = []
        self.called_at = []
        self.timeouts = []
        self.sub_app_ids = set()

    def await_confirm_slot(self, timeout_secs):
        return True

    def confirm(self, sub_app_id, handles, timeout_secs=None):
        self.calls.append(list(handles))
        self.called_at.append(self.clock())
        self.timeouts.append(timeout_secs)
        self.sub_app_ids.add(sub_app_id)
        self.clock.advance(self.call_secs)
        error = self.script.pop(0) if self.script else None
        if error is not None:
            raise error
        if self.stale & set(handles):
            raise refusal()
        return f"r-{len(self.calls)}"


def refusal():
    return RefusedHandlesError("some handle is stale", error_code="InvalidParameterValue", request_id="r-9")


def make_confirmer(vod, log, clock):
    return Confirmer(
        vod=vod,
        telemetry=Telemetry(log),
        liveness=Liveness(),
        reserve_secs=5.0,
        monotonic=clock,
        sleep=clock.advance,
        trial_secs=0.0,
    )


@pytest.fixture
def confirming(clock, log):
    """A function that confirms handles; returns the client and the handles that were confirmed."""
    confirmers = {}

    def confirm(handles=HANDLES, *, vod=None, lease_left_secs=25.0, source="main", on_acknowledged=None, **more):
        vod = vod or FakeVod(clock, **more)
        confirmer = confirmers.setdefault(id(vod), make_confirmer(vod, log, clock))
        lease = Lease(starts_at=clock() - 30.0 + lease_left_secs, secs=30.0)
        confirmations = confirmer.confirm(
            source, 1500000001, handles, lease, on_acknowledged=on_acknowledged or (lambda _handles: None)
        )
        assert list(confirmations) == list(handles)
        vod.results = {handle: it.result.value for handle, it in confirmations.items()}
        return vod, frozenset(it for it, result in vod.results.items() if result == "confirmed")

    return confirm


@pytest.mark.parametrize("stale", HANDLES)
def test_one_stale_handle_of_sixteen_is_isolated_in_nine_calls(confirming, lines, stale):
    vod, confirmed = confirming(stale=[stale])
    assert confirmed == frozenset(HANDLES) - {stale}
    assert len(vod.calls) == 9
    (line,) = named(lines, "confirm.failed")
    assert (line["level"], line["unconfirmed"], line["handles"]) == ("warning", 1, 16)
    assert (line["error_code"], line["request_id"]) == ("InvalidParameterValue", "r-9")


@pytest.mark.parametrize("stale", [["h0", "h7", "h15"], ["h0", "h1", "h2"], ["h1", "h2", "h3"], HANDLES[::2]])
def test_every_fresh_handle_is_confirmed_among_several_stale_ones(confirming, stale):
    vod, confirmed = confirming(stale=stale)
    assert confirmed == frozenset(HANDLES) - set(stale)
    # Handles that nine calls left undecided are not mixed again.
    assert all(set(later) < set(HANDLES) for later in vod.calls[1:])


@pytest.mark.parametrize("stale", [HANDLES, HANDLES[:6]])
def test_a_set_is_refused_if_nine_calls_confirm_none_of_it(confirming, stale):
    vod, confirmed = confirming(stale=stale)
    assert (len(vod.calls), confirmed) == (9, frozenset())
    assert set(vod.results.values()) == {"refused"}


def test_without_handles_no_call_is_made(confirming):
    vod, confirmed = confirming([])
    assert (vod.calls, confirmed) == ([], frozenset())


def test_all_handles_of_a_pull_go_in_one_call(confirming, lines):
    vod, confirmed = confirming()
    assert vod.calls == [HANDLES]
    assert vod.sub_app_ids == {1500000001}
    assert confirmed == frozenset(HANDLES)
    assert lines == []


def test_no_call_holds_more_handles_than_vod_accepts(confirming):
    handles = [f"h{number}" for number in range(40)]
    vod, confirmed = confirming(handles)
    assert [len(call) for call in vod.calls] == [16, 16, 8]
    assert confirmed == frozenset(handles)


def test_a_stale_handle_does_not_block_the_next_sixteen(confirming):
    handles = [f"h{number}" for number in range(32)]
    _, confirmed = confirming(handles, stale=["h3"])
    assert confirmed == frozenset(handles) - {"h3"}


@pytest.mark.parametrize(
    ("more", "reported"),
    [
        ({}, [HANDLES]),
        ({"stale": ["h3"]}, [HANDLES[8:], HANDLES[4:8], HANDLES[:2], ["h2"]]),
        ({"stale": HANDLES}, []),
        ({"script": [TransientError("lost"), refusal()]}, [HANDLES]),
        ({"script": [ThrottledError("slower"), OperatorError("no right")]}, []),
    ],
)
def test_acknowledged_handles_are_reported_before_the_next_call(confirming, clock, more, reported):
    vod = FakeVod(clock, **more)
    calls = []
    confirming(vod=vod, on_acknowledged=lambda handles: calls.append((len(vod.calls), handles)))
    assert sorted(handles for _, handles in calls) == sorted(reported)
    assert all(vod.calls[number - 1] == handles for number, handles in calls)


def test_a_call_lasts_no_longer_than_the_first_of_its_leases(confirming, clock):
    """If a lease ended during the call, what VOD did with the handle could only be guessed."""
    vod, _ = confirming(lease_left_secs=4.0)
    assert vod.timeouts == [4.0]


def test_transient_errors_repeat_the_same_set(confirming, lines):
    vod, confirmed = confirming(script=[TransientError("lost"), TransientError("lost"), TransientError("lost")])
    assert vod.calls == [HANDLES] * 4
    assert confirmed == frozenset(HANDLES)
    assert lines == []


@pytest.mark.parametrize("error", [TransientError("lost"), ThrottledError("slow down")])
def test_transient_errors_are_repeated_only_until_the_lease_ends(confirming, clock, lines, error):
    started = clock()
    vod, confirmed = confirming(script=[error] * 1000, lease_left_secs=12.0)
    assert confirmed == frozenset()
    assert len(vod.calls) > 5
    assert vod.called_at[-1] < started + 12.0
    assert vod.called_at[-1] > started + 8.0
    assert named(lines, "confirm.failed")


def test_no_call_is_made_without_a_lease(confirming, lines):
    vod, confirmed = confirming(lease_left_secs=0.0)
    assert (vod.calls, confirmed) == ([], frozenset())
    assert "lease ended" in named(lines, "confirm.failed")[0]["error_message"]


def test_a_split_ends_with_the_lease(confirming, clock):
    started = clock()
    vod, confirmed = confirming(stale=["h0"], call_secs=1.0, lease_left_secs=3.5)
    assert len(vod.calls) == 4
    assert max(vod.called_at) < started + 3.5
    assert confirmed == frozenset()


def test_each_call_may_take_what_is_left_of_the_lease(confirming):
    vod, _ = confirming(script=[TransientError("lost")], call_secs=2.0, lease_left_secs=10.0)
    assert vod.timeouts[0] == pytest.approx(10.0)
    assert vod.timeouts[1] < 8.0


def test_a_set_refused_after_a_lost_answer_is_not_split(confirming, lines):
    """The call whose answer was lost probably confirmed the set."""
    vod, confirmed = confirming(script=[TransientError("lost"), refusal()])
    assert vod.calls == [HANDLES] * 2
    assert confirmed == frozenset()
    assert "probably confirmed" in named(lines, "confirm.failed")[0]["error_message"]


class LateSlots(FakeVod):
    """The slot for the second attempt comes when the lease is over."""

    def __init__(self, clock, **more):
        super().__init__(clock, **more)
        self.waits_secs = [0.0, 30.0]

    def await_confirm_slot(self, timeout_secs):
        self.clock.advance(self.waits_secs.pop(0))
        return True


def test_a_slot_that_comes_after_the_lease_is_not_used(confirming, clock):
    vod, confirmed = confirming(vod=LateSlots(clock, script=[TransientError("lost")]))
    assert (vod.calls, confirmed) == ([HANDLES], frozenset())
    assert set(vod.results.values()) == {"no_answer"}


def test_a_set_refused_after_throttling_is_split(confirming):
    """A call that is throttled confirms nothing."""
    vod, confirmed = confirming(stale=["h5"], script=[ThrottledError("slow down")])
    assert confirmed == frozenset(HANDLES) - {"h5"}
    assert len(vod.calls) == 10


def test_a_set_refused_after_a_refused_token_is_split(confirming):
    """A call whose token is refused confirms nothing."""
    vod, confirmed = confirming(stale=["h5"], script=[NoKeyError("the token was refused")])
    assert confirmed == frozenset(HANDLES) - {"h5"}
    assert len(vod.calls) == 10


def test_throttling_does_not_cancel_an_earlier_lost_answer(confirming):
    script = [TransientError("lost"), ThrottledError("slow down"), refusal()]
    vod, confirmed = confirming(script=script)
    assert len(vod.calls) == 3
    assert confirmed == frozenset()


def test_a_lost_answer_in_one_half_does_not_affect_the_other_half(confirming):
    # The whole set is refused. The first half's answer is lost, then that half is refused. The second half is fresh.
    vod, confirmed = confirming(stale=["h0"], script=[None, TransientError("lost"), None])
    assert confirmed == frozenset(HANDLES[8:])
    assert len(vod.calls) == 4


def test_an_operator_error_is_logged_as_error_and_not_repeated(confirming, lines):
    vod, confirmed = confirming(script=[OperatorError("no right to confirm", error_code="UnauthorizedOperation")])
    assert (len(vod.calls), confirmed) == (1, frozenset())
    (line,) = named(lines, "confirm.failed")
    assert (line["level"], line["error_code"]) == ("error", "UnauthorizedOperation")


def refused(confirming, clock, times, **more):
    vod = FakeVod(clock, stale=HANDLES)
    for _ in range(times):
        confirming(vod=vod, **more)
    return vod


def test_repeated_refusals_of_fresh_handles_hint_at_the_sub_app_id(confirming, clock, lines):
    refused(confirming, clock, 2)
    assert named(lines, "confirm.refused") == []
    refused(confirming, clock, 5)
    (line,) = named(lines, "confirm.refused")
    assert line["level"] == "error"
    assert "sub_app_id" in line["hint"]


def test_refusals_at_the_end_of_the_lease_give_no_hint(confirming, clock, lines):
    refused(confirming, clock, 5, lease_left_secs=1.0)
    assert named(lines, "confirm.refused") == []


def test_a_confirm_that_works_ends_the_suspicion(confirming, clock, lines):
    vod = refused(confirming, clock, 2)
    vod.stale = set()
    confirming(vod=vod)
    vod.stale = set(HANDLES)
    confirming(vod=vod)
    confirming(vod=vod)
    assert named(lines, "confirm.refused") == []


def test_refusals_are_counted_per_source(confirming, clock, lines):
    vod = refused(confirming, clock, 2)
    confirming(vod=vod, source="other")
    assert named(lines, "confirm.refused") == []


def test_the_same_failure_is_logged_once(confirming, clock, lines):
    vod = FakeVod(clock, script=[OperatorError("no right")] * 10)
    for _ in range(10):
        confirming(vod=vod)
    assert len(named(lines, "confirm.failed")) == 1


# --- the result of each handle ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({}, {"confirmed"}),
        ({"stale": ["h3"]}, {"confirmed", "refused"}),
        ({"stale": HANDLES[::2]}, {"confirmed", "refused"}),
        ({"script": [TransientError("lost"), refusal()]}, {"refused_after_lost"}),
        ({"script": [TransientError("lost")] * 1000}, {"no_answer"}),
        ({"script": [ThrottledError("slower")] * 1000}, {"throttled"}),
        ({"script": [OperatorError("no right")]}, {"not_allowed"}),
        ({"script": [StoppingError("stopping")]}, {"stopping"}),
        ({"script": [ValueError("a bug")]}, {"no_answer"}),
        ({"lease_left_secs": 0.0}, {"lease_ended"}),
    ],
)
def test_every_handle_ends_with_a_result(confirming, more, expected):
    vod, _ = confirming(**more)
    assert set(vod.results) == set(HANDLES)
    assert set(vod.results.values()) == expected


def test_an_error_in_the_middle_leaves_no_handle_without_a_result(confirming, lines):
    vod, confirmed = confirming(stale=["h0"], script=[None, None, ValueError("a bug")])
    assert set(vod.results) == set(HANDLES)
    assert confirmed <= frozenset(HANDLES) - {"h0"}
    (line,) = named(lines, "confirm.failed")
    assert (line["level"], str(line["exc_info"])) == ("error", "a bug")


# --- one queue for several pullers ------------------------------------------------------------------------------------


class Vod:
    """VOD's confirms in real time: a quota, stale handles, calls that are slow or hang."""

    def __init__(self, *, slots_per_sec=1000.0, stale=(), call_secs=0.0):
        self.limiter = RateLimiter(slots_per_sec)
        self.has_slots = threading.Event()
        self.has_slots.set()
        self.slots_awaited = 0
        self.stale = set(stale)
        self.call_secs = call_secs
        self.refusal = None
        self.refusals = {}  # functions that make the errors, by SubAppId
        self.hanging = set()
        self.released = threading.Event()
        self.lock = threading.Lock()
        self.calls = []
        self.called_at = []
        self.sub_app_ids = []

    def await_confirm_slot(self, timeout_secs):
        with self.lock:
            self.slots_awaited += 1
        assert self.has_slots.wait(20)
        return self.limiter.acquire(timeout_secs)

    def confirm(self, sub_app_id, handles, timeout_secs=None):
        with self.lock:
            self.calls.append([*map(str, handles)])
            self.called_at.append(time.monotonic())
            self.sub_app_ids.append(sub_app_id)
        if self.hanging & set(handles):
            self.released.wait(min(timeout_secs, 20))
            raise TransientError("it hung")
        time.sleep(self.call_secs)
        error = self.refusals[sub_app_id]() if sub_app_id in self.refusals else self.refusal
        if error is not None:
            raise error
        if self.stale & set(handles):
            raise refusal()
        return "r"


class Pullers:
    """Threads that each confirm a batch."""

    def __init__(self, vod, log, *, reserve_secs=0.0, **more):
        self.vod = vod
        self.confirmer = Confirmer(
            vod=vod, telemetry=Telemetry(log), liveness=Liveness(), reserve_secs=reserve_secs, **more
        )
        self.results = {}
        self.took_secs = {}
        self.ended_at = {}
        self.threads = []

    def confirm(self, *handles, lease_left_secs=20.0, source="main"):
        lease = Lease(starts_at=time.monotonic() + lease_left_secs - 30.0, secs=30.0)

        def run():
            started = time.monotonic()
            confirmations = self.confirmer.confirm(source, None, handles, lease)
            self.results |= {handle: it.result.value for handle, it in confirmations.items()}
            self.ended_at |= dict.fromkeys(handles, time.monotonic())
            self.took_secs |= dict.fromkeys(handles, time.monotonic() - started)

        thread = threading.Thread(target=run, daemon=True)
        self.threads.append(thread)
        thread.start()
        return thread

    def join(self, secs=20.0):
        ends_at = time.monotonic() + secs
        for thread in self.threads:
            thread.join(max(ends_at - time.monotonic(), 0))
        assert not any(thread.is_alive() for thread in self.threads), "a puller waits for ever"
        return self.results


@pytest.fixture
def pullers(log):
    made = []

    def make(vod, **more):
        made.append(Pullers(vod, log, **more))
        return made[-1]

    yield make
    for one in made:
        one.vod.hanging = set()
        one.vod.released.set()
        one.join()


def confirm_17_at_once(pullers, vod):
    """Confirm h0 to h16, each of a pull of its own: no call is made before all of them wait."""
    group = pullers(vod)
    vod.has_slots.clear()
    for number in range(17):
        group.confirm(f"h{number}")
    until(lambda: vod.slots_awaited == 2)  # one call takes 16
    vod.has_slots.set()
    return group.join()


def test_handles_of_pulls_that_wait_for_a_slot_share_calls(pullers):
    vod = Vod()
    assert set(confirm_17_at_once(pullers, vod).values()) == {"confirmed"}
    assert sorted(map(len, vod.calls)) == [1, 16]


def test_handles_whose_lease_is_nearly_over_mix_with_no_other_pull(pullers):
    vod = Vod(slots_per_sec=10)
    vod.limiter.acquire()
    group = pullers(vod, reserve_secs=10.0)
    for number in range(4):
        group.confirm(f"a{number}", f"b{number}", lease_left_secs=5.0 + number)
    group.confirm("c", lease_left_secs=20.0)
    assert set(group.join().values()) == {"confirmed"}
    assert sorted(map(sorted, vod.calls)) == [["a0", "b0"], ["a1", "b1"], ["a2", "b2"], ["a3", "b3"], ["c"]]


@pytest.mark.system
@pytest.mark.parametrize("position", [0, 7, 15])
def test_a_stale_handle_does_not_affect_handles_of_other_pulls(pullers, position):
    stale = f"h{position}"
    vod = Vod(stale=[stale])
    results = confirm_17_at_once(pullers, vod)
    assert {handle for handle, result in results.items() if result != "confirmed"} == {stale}
    sent_together = set(HANDLES)
    assert sent_together in map(set, vod.calls)
    assert sum(set(call) <= sent_together for call in vod.calls) <= 9


@pytest.mark.system
@pytest.mark.parametrize("stale", [["h0", "h1", "h2"], ["h0", "h7", "h15"], ["h4", "h20", "h39"]])
def test_three_stale_handles_let_no_lease_of_other_pulls_end(pullers, stale):
    vod = Vod(slots_per_sec=40, stale=stale)
    vod.limiter.acquire()
    group = pullers(vod)
    for number in range(0, 40, 4):
        group.confirm(*(f"h{number + index}" for index in range(4)), lease_left_secs=8.0)
    results = group.join()
    assert {handle for handle, result in results.items() if result != "confirmed"} == set(stale)
    assert {results[handle] for handle in stale} == {"refused"}
    assert max(group.took_secs.values()) < 8.0


@pytest.mark.parametrize("stale", [["h0", "h1", "h2"], ["h1", "h4", "h7"]])
def test_handles_left_undecided_are_not_mixed_with_other_pulls(pullers, stale):
    vod = Vod(stale=stale)
    group = pullers(vod)
    is_other_waiting, are_both_waiting = threading.Event(), threading.Event()
    confirm = vod.confirm

    def confirm_while_another_waits(*args):
        if len(vod.calls) == 8:
            group.confirm("x0", "x1")
            assert is_other_waiting.wait(10)
        return confirm(*args)

    def await_confirm_slot(timeout_secs):
        if threading.current_thread() is group.threads[0]:
            if is_other_waiting.is_set():
                are_both_waiting.set()
        else:
            is_other_waiting.set()
            are_both_waiting.wait(2)
        return True

    vod.confirm, vod.await_confirm_slot = confirm_while_another_waits, await_confirm_slot
    group.confirm(*HANDLES).join(10)
    results = group.join()
    assert {handle for handle, result in results.items() if result != "confirmed"} == set(stale)
    assert ["x0", "x1"] in vod.calls


@pytest.mark.system
@pytest.mark.parametrize("lease_left_secs", [0.6, 1.0])
def test_a_handle_that_no_call_takes_ends_with_its_own_lease(pullers, lease_left_secs):
    vod = Vod(slots_per_sec=0.4)
    vod.limiter.acquire()
    group = pullers(vod)
    is_awaited = threading.Event()
    wait = vod.await_confirm_slot
    vod.await_confirm_slot = lambda timeout_secs: is_awaited.set() or wait(timeout_secs)
    group.confirm("caller")
    assert is_awaited.wait(10)
    with Lateness() as lateness:
        for thread in [group.confirm(f"h{number}", lease_left_secs=lease_left_secs) for number in range(3)]:
            thread.join(10)
    assert {group.results[f"h{number}"] for number in range(3)} == {"lease_ended"}
    assert max(group.took_secs.values()) < lease_left_secs + lateness.allowed_secs


@pytest.mark.system
def test_a_lease_that_ends_during_a_call_affects_no_other_handle(pullers):
    vod = Vod(slots_per_sec=4)
    vod.limiter.acquire()
    answered, lost = vod.confirm, []

    def confirm(sub_app_id, handles, timeout_secs=None):
        if not lost:
            lost.append(list(handles))
            time.sleep(1.2)
            raise TransientError("the answer was lost")
        return answered(sub_app_id, handles, timeout_secs)

    vod.confirm = confirm
    group = pullers(vod)
    group.confirm("short", lease_left_secs=1.0)
    group.confirm("long")
    results = group.join()
    assert results["long"] == "confirmed"
    assert results["short"] in ("no_answer", "lease_ended")
    assert vod.calls == [["long"]]


def test_a_call_that_hangs_delays_only_its_own_handles(pullers):
    vod = Vod()
    vod.hanging = {"h0"}
    group = pullers(vod)
    hung = group.confirm("h0")
    until(lambda: vod.calls)
    others = [group.confirm(f"h{number}") for number in range(1, 9)]
    for thread in others:
        thread.join(10)
    assert {group.results[f"h{number}"] for number in range(1, 9)} == {"confirmed"}
    assert hung.is_alive()


@pytest.mark.system
@pytest.mark.parametrize(
    ("error", "result", "calls_before"),
    [
        (OperatorError("no right", error_code="UnauthorizedOperation"), "not_allowed", 1),
        (RefusedHandlesError("what is that", error_code="InvalidParameterValue"), "refused", 3),
    ],
)
def test_a_source_whose_confirms_are_refused_calls_rarely(pullers, error, result, calls_before):
    vod = Vod()
    vod.refusal = error
    group = pullers(vod, trial_secs=0.5)
    for number in range(calls_before):
        group.confirm(f"first{number}").join(10)
    before = len(vod.calls)
    for number in range(6):
        group.confirm(f"h{number}", f"i{number}", lease_left_secs=2.0)
    results = group.join()
    assert set(results.values()) == {result}
    after = vod.called_at[before:]
    assert 1 <= len(after) <= 5
    assert all(later - earlier >= 0.45 for earlier, later in pairwise(after))
    assert all(len(call) == 1 for call in vod.calls[before:])
    assert min(group.took_secs[f"h{number}"] for number in range(6)) <= 2.5


@pytest.mark.system
def test_the_pause_between_two_tries_begins_at_the_first_answer(pullers):
    vod = Vod()
    vod.refusal = RefusedHandlesError("what is that", error_code="InvalidParameterValue")
    group = pullers(vod, trial_secs=0.5)
    for number in range(3):
        group.confirm(f"first{number}").join(10)
    before = len(vod.calls)
    vod.call_secs = 0.3
    for number in range(6):  # their leases are nearly over, so a refusal of them is not a hint about the source
        group.confirm(f"h{number}", lease_left_secs=3.0)
    group.join()
    after = vod.called_at[before:]
    assert len(after) >= 2
    assert all(later - earlier >= 0.8 for earlier, later in pairwise(after))


def test_a_source_that_is_allowed_again_goes_on_at_once(pullers):
    vod = Vod()
    vod.refusal = OperatorError("no right")
    group = pullers(vod, trial_secs=0.2)
    group.confirm("first").join(10)
    vod.refusal = None
    for number in range(20):
        group.confirm(f"h{number}")
    results = group.join()
    assert {results[f"h{number}"] for number in range(20)} == {"confirmed"}


class Handle(str):
    """A handle to which weak references are possible: they show when it is released."""

    __slots__ = ("__weakref__",)


class Source:
    """Pullers of one source that confirm batch after batch until `end` is called.

    Args:
        confirmer: Shared by the sources of an account.
        number: The source's SubAppId.
        lease_secs: The length of each batch's lease.
    """

    THREADS = 16

    def __init__(self, confirmer, *, number, lease_secs):
        self.confirmer = confirmer
        self.number = number
        self.lease_secs = lease_secs
        self.results = Counter()
        self.batches = 0
        self.handles = weakref.WeakSet()
        self.most_handles = 0
        self.lock = threading.Lock()
        self.over = threading.Event()
        self.threads = [threading.Thread(target=self._run) for _ in range(self.THREADS)]
        for thread in self.threads:
            thread.start()

    def _run(self):
        while not self.over.is_set():
            self._confirm_a_batch()

    def _confirm_a_batch(self):
        with self.lock:
            self.batches += 1
            handles = [Handle(f"{self.number}-{self.batches}-{index}") for index in range(16)]
            self.handles |= set(handles)
            self.most_handles = max(self.most_handles, len(self.handles))
        lease = Lease(starts_at=time.monotonic(), secs=self.lease_secs)
        confirmations = self.confirmer.confirm(f"s{self.number}", self.number, handles, lease)
        with self.lock:
            self.results.update(it.result.value for it in confirmations.values())

    def end(self):
        self.over.set()
        for thread in self.threads:
            thread.join(20)
        assert not any(thread.is_alive() for thread in self.threads), "a puller waits for ever"


@pytest.mark.system
@pytest.mark.parametrize(
    ("error", "result"),
    [
        (partial(OperatorError, "no right", error_code="UnauthorizedOperation"), "not_allowed"),
        (partial(RefusedHandlesError, "what is that", error_code="InvalidParameterValue"), "refused"),
    ],
)
def test_a_source_that_is_refused_comes_to_rest_and_delays_no_other(log, lines, error, result):
    vod = Vod(slots_per_sec=40)
    vod.refusals[1] = error
    confirmer = Confirmer(vod=vod, telemetry=Telemetry(log), liveness=Liveness(), reserve_secs=0.0)
    broken = Source(confirmer, number=1, lease_secs=3.0)
    other = Source(confirmer, number=2, lease_secs=20.0)
    try:
        until(lambda: named(lines, "confirm.failed" if result == "not_allowed" else "confirm.refused"))
        # Wait until the calls that were under way then have ended, with the splitting of refused sets.
        until(lambda: time.monotonic() - vod.called_at[-1 - vod.sub_app_ids[::-1].index(1)] > 1.0, secs=30)
        began, calls, batches = time.monotonic(), len(vod.calls), broken.batches
        time.sleep(6.0)
        secs, calls_of = time.monotonic() - began, vod.sub_app_ids[calls:]
        new_batches = broken.batches - batches
    finally:
        confirmer.stop(time.monotonic() + 1.0)
        broken.end()
        other.end()

    tries = [at for at, number in zip(vod.called_at, vod.sub_app_ids, strict=True) if number == 1 and at > began]
    assert 1 <= len(tries) <= secs / 2 + 1
    assert all(later - earlier > 1.95 for earlier, later in pairwise(tries))
    assert calls_of.count(2) >= 0.8 * 0.97 * 40 * secs
    assert broken.results[result] > 0
    assert not broken.results["confirmed"]
    assert set(other.results) <= {"confirmed", "stopping", "throttled"}  # the last two because of the stop
    # At most one batch per thread and lease; handles of ended leases are not kept.
    assert new_batches <= Source.THREADS * (secs // 3.0 + 1)
    assert broken.most_handles <= 3 * 16 * Source.THREADS
    gc.collect()
    assert not broken.handles


@pytest.mark.system
def test_a_stop_ends_the_waits(pullers):
    vod = Vod(slots_per_sec=0.4)
    vod.limiter.acquire()
    vod.hanging = {"taken"}
    group = pullers(vod)
    for number in range(4):
        group.confirm(f"h{number}")
    started = time.monotonic()
    group.confirmer.stop(time.monotonic() + 1.5)
    results = group.join()
    assert set(results.values()) <= {"stopping", "throttled"}
    assert "stopping" in results.values()
    assert vod.calls == []
    assert time.monotonic() - started < 10


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("a bug")])
def test_an_error_in_waiting_for_a_slot_affects_one_puller_only(pullers, lines, error):
    vod = Vod(slots_per_sec=10)
    wait, failures = vod.await_confirm_slot, [error]

    def broken(timeout_secs):
        if failures:
            raise failures.pop()
        return wait(timeout_secs)

    vod.await_confirm_slot = broken
    group = pullers(vod)
    for number in range(4):
        group.confirm(f"h{number}")
    assert sorted(group.join().values()) == ["confirmed"] * 3 + ["no_answer"]
    assert [line["exc_info"] for line in named(lines, "confirm.failed")] == [error]


class Lateness:
    """A context manager: measures the worst delay with which this machine resumes a thread, for bounds on real time."""

    def __enter__(self):
        self.worst_secs = 0.0
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_exception):
        self._stopped.set()
        self._thread.join()

    def _watch(self):
        while not self._stopped.is_set():
            began = time.monotonic()
            time.sleep(0.01)
            self.worst_secs = max(self.worst_secs, time.monotonic() - began - 0.01)

    @property
    def allowed_secs(self):
        return 0.3 + 4 * self.worst_secs


class UnreliableVod(Vod):
    """Lets some callers that wait for a slot give up or fail; records which threads waited."""

    def __init__(self, behaviours, **more):
        super().__init__(**more)
        self.behaviours = list(behaviours)
        self.callers = set()

    def await_confirm_slot(self, timeout_secs):
        with self.lock:
            self.callers.add(threading.get_ident())
            behaviour = self.behaviours.pop() if self.behaviours else "waits"
        if behaviour == "fails":
            raise MemoryError
        return behaviour == "waits" and super().await_confirm_slot(timeout_secs)


BATCH = st.tuples(
    st.sampled_from([1, 5, 16, 20]),
    st.sampled_from([0.6, 1.0, 2.0]),
    st.sampled_from(["all fresh"] * 4 + ["one is stale", "three are stale", "one hangs"]),
    st.sampled_from([0.0, 0.0, 0.1, 0.4]),
)


@pytest.mark.system
@settings(  # each example takes a second or more
    max_examples=settings().max_examples // 6, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    slots_per_sec=st.sampled_from([5, 5, 20, 100]),
    reserve_secs=st.sampled_from([0.0, 0.3]),
    behaviours=st.lists(st.sampled_from(["waits", "waits", "waits", "gives up", "fails"]), max_size=12),
    batches=st.lists(BATCH, min_size=1, max_size=16),
)
def test_no_handle_waits_past_its_lease_and_no_puller_for_ever(log, slots_per_sec, reserve_secs, behaviours, batches):
    vod = UnreliableVod(behaviours, slots_per_sec=slots_per_sec)
    group = Pullers(vod, log, reserve_secs=reserve_secs)
    pullers = {}
    with Lateness() as lateness:
        for number, (size, lease_secs, kind, pause_secs) in enumerate(batches):
            handles = [f"h{number}-{index}" for index in range(size)]
            vod.stale |= set(handles[: {"one is stale": 1, "three are stale": 3}.get(kind, 0)])
            vod.hanging |= set(handles[:1] if kind == "one hangs" else [])
            time.sleep(pause_secs)
            pullers[group.confirm(*handles, lease_left_secs=lease_secs)] = (handles, time.monotonic() + lease_secs)
        results = group.join()

    assert set(results) == {handle for handles, _ in pullers.values() for handle in handles}
    confirmed = {handle for handle, result in results.items() if result == "confirmed"}
    assert not confirmed & (vod.stale | vod.hanging)
    accepted = Counter(handle for call in vod.calls if not set(call) & (vod.stale | vod.hanging) for handle in call)
    assert set(accepted) == confirmed
    assert set(accepted.values()) <= {1}
    sent = {handle for call in vod.calls for handle in call}
    last_end = max(ends_at for _, ends_at in pullers.values())
    end_of = {handle: ends_at for handles, ends_at in pullers.values() for handle in handles}
    for call, called_at in zip(vod.calls, vod.called_at, strict=True):
        assert called_at <= min(end_of[handle] for handle in call) + lateness.allowed_secs
    for thread, (handles, ends_at) in pullers.items():
        # A puller that waits for a slot, or whose handles share a call, may go on until the last lease of all ends.
        waits_only = thread.ident not in vod.callers and not sent & set(handles)
        assert group.ended_at[handles[0]] <= (ends_at if waits_only else last_end) + lateness.allowed_secs
