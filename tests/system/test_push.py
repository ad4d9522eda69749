"""Short runs of the trials with normal callbacks; `python -m tests.push_soak` runs them at full size."""

import pytest

from tests.push_soak import both_modes, burst, kills, strangers

pytestmark = pytest.mark.long


def test_pushes_with_faults_and_kills_deliver_each_event_once(tmp_path):
    # More tries than VOD's and more time for each: the result must not depend on the speed of the machine.
    result = kills(
        tmp_path,
        events=900,
        rate=150,
        times=2,
        every_secs=(0.5, 1.0),
        faults="push.reset=0.05",
        limit_secs=20.0,
        tries=5,
    )
    assert result.is_clean, result
    assert (result.events, result.kills) == (900, 2)
    assert result.repeated > 0, "no fault and no kill caused a repeated push"


def test_pushed_and_then_pulled_an_event_is_delivered_once(tmp_path):
    result = both_modes(tmp_path, events=100)
    assert result.is_clean, result


def test_a_burst_to_a_slow_sink_is_answered_and_delivered(tmp_path):
    result = burst(tmp_path, events=60, concurrency=64, source="max_events_in_flight = 40", limit_secs=20.0)
    assert result.is_clean, result


def test_strangers_need_few_resources_and_delay_no_event(tmp_path):
    result = strangers(tmp_path, secs=6.0, clients=1)
    assert result.is_clean, result
