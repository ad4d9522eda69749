"""A short soak; `python -m tests.soak` runs it at full size."""

import pytest

from tests.soak import soak

pytestmark = pytest.mark.long


@pytest.mark.parametrize("slow_sink", [False, True], ids=["a file", "and a slow sink"])
def test_faults_and_kills_lose_double_tear_and_leave_nothing(tmp_path, slow_sink):
    result = soak(
        tmp_path,
        seed=20261123,
        events=3000,
        rate=600,
        kills=3,
        every_secs=(1.0, 1.8),
        slow_sink=slow_sink,
        give_up_secs=90,
    )
    assert result.is_clean, f"\n{result}"
    assert (result.events, result.kills) == (3000, 3), f"\n{result}"
    assert result.redelivered > 0, "no kill and no fault caused a redelivery"
