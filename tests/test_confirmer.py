import pytest

from tests.helpers import named
from vodpoller.confirmer import Confirmer
from vodpoller.errors import OperatorError, RefusedHandlesError, StoppingError, ThrottledError, TransientError
from vodpoller.events import Lease

HANDLES = [f"h{number}" for number in range(16)]


class FakeVod:
    """Refuses calls that hold a stale handle, after what its script says; each call takes a while."""

    def __init__(self, clock, *, stale=(), script=(), call_secs=0.01):
        self.clock = clock
        self.stale = set(stale)
        self.script = list(script)
        self.call_secs = call_secs
        self.calls = []
        self.called_at = []
        self.timeouts = []
        self.sub_app_ids = set()

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


@pytest.fixture
def confirming(clock, log):
    """Makes a client and confirms with it: (the client, what was confirmed)."""
    confirmers = {}

    def confirm(handles=HANDLES, *, vod=None, lease_left_secs=25.0, source="main", **more):
        vod = vod or FakeVod(clock, **more)
        confirmer = confirmers.setdefault(id(vod), Confirmer(vod=vod, log=log, monotonic=clock, sleep=clock.advance))
        lease = Lease(starts_at=clock() - 30.0 + lease_left_secs, secs=30.0)
        confirmations = confirmer.confirm(source, 1500000001, handles, lease)
        assert list(confirmations) == list(handles)
        vod.results = {handle: it.result.value for handle, it in confirmations.items()}
        return vod, frozenset(it for it, result in vod.results.items() if result == "confirmed")

    return confirm


@pytest.mark.parametrize("stale", HANDLES)
def test_one_stale_handle_of_sixteen_costs_at_most_nine_calls_and_none_of_its_mates(confirming, lines, stale):
    vod, confirmed = confirming(stale=[stale])
    assert confirmed == frozenset(HANDLES) - {stale}
    assert len(vod.calls) == 9
    (line,) = named(lines, "confirm.failed")
    assert (line["level"], line["unconfirmed"], line["handles"]) == ("warning", 1, 16)
    assert (line["error_code"], line["request_id"]) == ("InvalidParameterValue", "r-9")


def test_many_stale_handles_cost_no_more_than_nine_calls(confirming):
    vod, confirmed = confirming(stale=HANDLES[::2])
    assert len(vod.calls) == 9
    assert confirmed <= frozenset(HANDLES[1::2])


def test_nothing_is_called_where_there_is_nothing_to_confirm(confirming):
    vod, confirmed = confirming([])
    assert (vod.calls, confirmed) == ([], frozenset())


def test_all_handles_of_a_pull_go_in_one_call(confirming, lines):
    vod, confirmed = confirming()
    assert vod.calls == [HANDLES]
    assert vod.sub_app_ids == {1500000001}
    assert confirmed == frozenset(HANDLES)
    assert lines == []


def test_no_call_holds_more_handles_than_vod_takes(confirming):
    handles = [f"h{number}" for number in range(40)]
    vod, confirmed = confirming(handles)
    assert [len(call) for call in vod.calls] == [16, 16, 8]
    assert confirmed == frozenset(handles)


def test_a_stale_handle_does_not_keep_the_next_sixteen_from_being_confirmed(confirming):
    handles = [f"h{number}" for number in range(32)]
    _, confirmed = confirming(handles, stale=["h3"])
    assert confirmed == frozenset(handles) - {"h3"}


def test_transient_errors_repeat_the_same_set(confirming, lines):
    vod, confirmed = confirming(script=[TransientError("lost"), TransientError("lost"), TransientError("lost")])
    assert vod.calls == [HANDLES] * 4
    assert confirmed == frozenset(HANDLES)
    assert lines == []


@pytest.mark.parametrize("error", [TransientError("lost"), ThrottledError("slow down")])
def test_transient_errors_are_repeated_until_the_lease_ends_and_no_longer(confirming, clock, lines, error):
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


def test_a_refusal_after_a_lost_answer_is_not_split_since_the_lost_one_probably_worked(confirming, lines):
    vod, confirmed = confirming(script=[TransientError("lost"), refusal()])
    assert vod.calls == [HANDLES] * 2
    assert confirmed == frozenset()
    assert "probably confirmed" in named(lines, "confirm.failed")[0]["error_message"]


def test_a_refusal_after_throttling_is_split_since_nothing_was_carried_out(confirming):
    vod, confirmed = confirming(stale=["h5"], script=[ThrottledError("slow down")])
    assert confirmed == frozenset(HANDLES) - {"h5"}
    assert len(vod.calls) == 10


def test_throttling_after_a_lost_answer_does_not_make_it_forgotten(confirming):
    script = [TransientError("lost"), ThrottledError("slow down"), refusal()]
    vod, confirmed = confirming(script=script)
    assert len(vod.calls) == 3
    assert confirmed == frozenset()


def test_a_lost_answer_in_one_half_leaves_the_other_half_its_chance(confirming):
    # The whole is refused; of the first half the answer is lost, then it is refused; the second half is fresh.
    vod, confirmed = confirming(stale=["h0"], script=[None, TransientError("lost"), None])
    assert confirmed == frozenset(HANDLES[8:])
    assert len(vod.calls) == 4


def test_an_operator_error_is_loud_and_ends_it(confirming, lines):
    vod, confirmed = confirming(script=[OperatorError("no right to confirm", error_code="UnauthorizedOperation")])
    assert (len(vod.calls), confirmed) == (1, frozenset())
    (line,) = named(lines, "confirm.failed")
    assert (line["level"], line["error_code"]) == ("error", "UnauthorizedOperation")


def refused(confirming, clock, times, **more):
    vod = FakeVod(clock, stale=HANDLES)
    for _ in range(times):
        confirming(vod=vod, **more)
    return vod


def test_fresh_handles_that_are_refused_again_and_again_hint_at_the_sub_app_id(confirming, clock, lines):
    refused(confirming, clock, 2)
    assert named(lines, "confirm.refused") == []
    refused(confirming, clock, 5)
    (line,) = named(lines, "confirm.refused")
    assert line["level"] == "error"
    assert "sub_app_id" in line["hint"]


def test_handles_that_are_refused_at_the_end_of_their_lease_hint_at_nothing(confirming, clock, lines):
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


def test_the_suspicion_is_of_one_source(confirming, clock, lines):
    vod = refused(confirming, clock, 2)
    confirming(vod=vod, source="other")
    assert named(lines, "confirm.refused") == []


def test_the_same_failure_is_said_once(confirming, clock, lines):
    vod = FakeVod(clock, script=[OperatorError("no right")] * 10)
    for _ in range(10):
        confirming(vod=vod)
    assert len(named(lines, "confirm.failed")) == 1


# --- what each handle came to -----------------------------------------------------------------------------------------


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


def test_what_nine_calls_leave_undecided_is_refused_like_what_they_found(confirming):
    vod, confirmed = confirming(stale=HANDLES[::2])
    undecided = set(HANDLES[1::2]) - confirmed
    assert {vod.results[handle] for handle in undecided} == {"refused"}


def test_an_error_in_the_middle_leaves_no_handle_without_a_result(confirming, lines):
    vod, confirmed = confirming(stale=["h0"], script=[None, None, ValueError("a bug")])
    assert set(vod.results) == set(HANDLES)
    assert confirmed <= frozenset(HANDLES) - {"h0"}
    (line,) = named(lines, "confirm.failed")
    assert (line["level"], str(line["exc_info"])) == ("error", "a bug")
