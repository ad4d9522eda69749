import pytest
from hypothesis import given
from hypothesis import strategies as st

from vodpoller.settlement import (
    ALREADY_DELIVERED,
    ALREADY_STORED,
    DELIVERED,
    Outcome,
    Reason,
    Settlement,
    SinkResult,
    settle,
    settle_malformed,
    settle_unrouted,
)

FAILURES = [
    SinkResult(outcome=Outcome.REJECTED, reason=Reason.REJECTED),
    SinkResult(outcome=Outcome.FAILED, reason=Reason.SINK_FAILED),
    *(
        SinkResult(outcome=Outcome.NOT_ATTEMPTED, reason=reason)
        for reason in (
            Reason.SINK_DOWN,
            Reason.SINK_PAUSED,
            Reason.QUEUE_FULL,
            Reason.OUT_OF_TIME,
            Reason.STOPPING,
            Reason.JOURNAL_FAILED,
        )
    ),
]
SUCCESSES = [DELIVERED, ALREADY_DELIVERED, SinkResult(outcome=Outcome.DELIVERED, reason=Reason.SKIPPED)]


@pytest.mark.parametrize("on_failure", ["store", "leave"])
def test_an_event_without_any_result_is_never_settled(on_failure):
    with pytest.raises(ValueError, match="without any outcome"):
        settle([], on_failure=on_failure)


@given(
    st.lists(st.sampled_from([*FAILURES, *SUCCESSES, ALREADY_STORED]), min_size=1), st.sampled_from(["store", "leave"])
)
def test_only_events_that_sinks_or_the_journal_hold_are_confirmed(results, on_failure):
    verdict = settle(results, on_failure=on_failure)
    if all(result in SUCCESSES for result in results):
        assert verdict.settlement is Settlement.CONFIRM
    elif on_failure == "leave" and set(results) & set(FAILURES):
        assert verdict.settlement is Settlement.LEAVE
    else:
        assert verdict.settlement is Settlement.STORE
    assert verdict.may_confirm == (verdict.settlement is not Settlement.LEAVE)


@given(st.permutations([*FAILURES, *SUCCESSES, ALREADY_STORED]), st.integers(1, 12))
def test_the_reason_of_an_event_is_the_worst_of_its_sinks(results, number):
    some = results[:number]
    ranks = [list(Reason).index(result.reason) for result in some]
    assert settle(some, on_failure="store").reason is list(Reason)[min(ranks)]


@pytest.mark.parametrize(
    ("failure", "reason"),
    [
        (FAILURES[0], Reason.LEFT_BY_CONFIGURATION),
        (FAILURES[2], Reason.LEFT_BY_CONFIGURATION),
        (FAILURES[-1], Reason.JOURNAL_FAILED),
    ],
)
def test_an_event_left_by_configuration_has_that_reason(failure, reason):
    assert settle([DELIVERED, failure], on_failure="leave").reason is reason


@pytest.mark.parametrize(
    ("unrouted", "settlement"),
    [
        ("confirm", Settlement.CONFIRM),
        ("dead_letter", Settlement.STORE),
        (None, Settlement.STORE),
        ("leave", Settlement.LEAVE),
    ],
)
def test_an_unrouted_event_is_settled_as_its_source_says(unrouted, settlement):
    verdict = settle_unrouted(unrouted)
    assert (verdict.settlement, verdict.reason) == (settlement, Reason.NO_ROUTE)


@pytest.mark.parametrize(
    ("on_failure", "settlement", "reason"),
    [
        ("store", Settlement.STORE, Reason.MALFORMED),
        ("leave", Settlement.LEAVE, Reason.LEFT_BY_CONFIGURATION),
    ],
)
def test_a_malformed_event_is_stored_unless_on_failure_is_leave(on_failure, settlement, reason):
    verdict = settle_malformed(on_failure=on_failure)
    assert (verdict.settlement, verdict.reason) == (settlement, reason)
