"""The renewal of a role's temporary key, on a fake clock."""

from dataclasses import replace

import pytest

from tests.helpers import FakeClock, log_into, named
from vodpoller.errors import NoKeyError, OperatorError, TransientError
from vodpoller.logs import CATALOGUE
from vodpoller.telemetry import Count, Telemetry
from vodpoller.vod.credentials import Credentials, IssuedKey, IssuedKeys
from vodpoller.vod.refresher import RENEWAL_MIN_SECS, Refresher, renewal_secs

LIFE_SECS = 600.0


class Bench:
    """A refresher, its clock, and an issuer that the test controls."""

    def __init__(self, keys=None):
        self.clock = FakeClock()
        self.lines = []
        self.telemetry = Telemetry(log_into(self.lines), monotonic=self.clock)
        self.keys = keys or IssuedKeys()
        self.problem = None
        self.life_secs = LIFE_SECS
        self.is_stuck = False  # the issuer returns the same key again
        self.asked_at = []
        self.recoveries = 0
        self.reread = 0
        self.refresher = Refresher(
            self,
            provider="cvm_role",
            keys=self.keys,
            telemetry=self.telemetry,
            on_operator_error=self.count_reread,
            on_recovered=self.count_recovery,
            monotonic=self.clock,
            wall=self.clock,
            draw=lambda: 0.0,
        )

    def __call__(self):
        self.asked_at.append(self.clock.now)
        if self.problem is not None:
            raise self.problem
        if self.is_stuck:
            ends_at = self.keys.in_use.ends_at
            return replace(self.keys.in_use, life_secs=ends_at - self.clock.now)
        return key(len(self.asked_at), life_secs=self.life_secs, ends_at=self.clock.now + self.life_secs)

    def close(self):
        pass

    def reopen(self):
        pass

    def count_recovery(self):
        self.recoveries += 1

    def count_reread(self):
        self.reread += 1

    def pass_secs(self, secs):
        """Advance the clock, and run each step of the refresher that becomes due."""
        ends_at = self.clock.now + secs
        while True:
            wait_secs = self.refresher.step()
            if self.clock.now + wait_secs > ends_at:
                self.clock.now = ends_at
                return
            self.clock.advance(max(wait_secs, 0.001))

    def refreshes(self, result):
        return self.telemetry.total(Count.CREDENTIALS_REFRESHES, result=result)

    def logged(self, event):
        return named(self.lines, event)


def key(number, *, life_secs=LIFE_SECS, ends_at=1600.0):
    credentials = Credentials(f"tmp-id-{number:04}", f"tmp-key-{number:04}", f"tmp-token-{number:04}")
    return IssuedKey(credentials=credentials, role="role r", life_secs=life_secs, ends_at=ends_at)


@pytest.fixture
def bench():
    made = Bench()
    yield made
    assert {line["event"] for line in made.lines} <= set(CATALOGUE)


PROBLEMS = [
    TransientError("the metadata service m:80 did not answer within 2 s"),
    OperatorError("STS refused AssumeRole", advice="trust the account", error_code="UnauthorizedOperation"),
    KeyError("tmp-key-0001"),  # unexpected: its text may be a secret
]


@pytest.mark.parametrize("problem", PROBLEMS, ids=["transient", "operator", "unexpected"])
def test_the_last_good_key_is_used_until_it_ends(bench, problem):
    bench.refresher.step()
    bench.problem = problem
    bench.pass_secs(LIFE_SECS - 1)
    assert bench.refresher() == key(1).credentials
    bench.clock.advance(1)
    with pytest.raises(NoKeyError, match="the temporary key has ended, and no new one was issued"):
        bench.refresher()


def test_requests_without_a_key_always_name_the_same_cause(bench):
    messages = set()
    for number in range(3):
        bench.problem = TransientError(f"its key ended {number} s ago")
        bench.pass_secs(100)
        with pytest.raises(NoKeyError) as caught:
            bench.refresher()
        messages.add(str(caught.value))
    assert len(messages) == 1


@pytest.mark.parametrize("problem", PROBLEMS, ids=["transient", "operator", "unexpected"])
def test_a_failure_is_logged_once_and_ends_within_a_minute(bench, problem):
    bench.refresher.step()
    bench.problem = problem
    bench.pass_secs(2 * LIFE_SECS / 3 + 250)
    assert len(bench.logged("credentials.failed")) == 1
    assert bench.refreshes("failed") > 5
    assert "tmp-key" not in str(bench.logged("credentials.failed"))
    bench.problem = None
    bench.pass_secs(60)
    assert bench.refresher() != key(1).credentials
    assert len(bench.logged("credentials.refreshed")) == 2


def test_each_cause_of_a_failure_has_its_line(bench):
    bench.refresher.step()
    for text in ("its key ended 5 s ago", "its key ended 6 s ago", "it is not JSON", "it is not JSON"):
        bench.problem = TransientError(text)
        bench.clock.advance(LIFE_SECS if len(bench.asked_at) == 1 else 61)
        bench.refresher.step()
    assert [line["error_message"] for line in bench.logged("credentials.failed")] == [
        "its key ended 5 s ago",
        "it is not JSON",
    ]


def test_failing_attempts_are_one_to_sixty_seconds_apart(bench):
    bench.problem = PROBLEMS[0]
    bench.pass_secs(1000)
    gaps = [after - before for before, after in zip(bench.asked_at, bench.asked_at[1:], strict=False)]
    assert 0.5 <= gaps[0] <= 1
    assert all(gap <= 60 for gap in gaps)
    assert all(gap >= 30 for gap in gaps[7:])


def test_a_key_that_ends_soon_is_logged_once_as_an_error(bench):
    bench.refresher.step()
    bench.problem = PROBLEMS[0]
    bench.pass_secs(LIFE_SECS * 5 / 6 - 2)
    assert bench.logged("credentials.expiring") == []
    bench.pass_secs(LIFE_SECS)
    (line,) = bench.logged("credentials.expiring")
    assert line["level"] == "error"
    assert LIFE_SECS / 6 - 2 < line["left_secs"] <= LIFE_SECS / 6


def test_a_first_attempt_that_fails_is_not_repeated_by_requests(bench):
    bench.problem = PROBLEMS[0]
    for _ in range(5):
        with pytest.raises(NoKeyError, match="no temporary key was issued yet"):
            bench.refresher()
    assert len(bench.asked_at) == 1


def test_requests_go_on_as_soon_as_there_is_a_key_again(bench):
    bench.problem = PROBLEMS[0]
    bench.pass_secs(100)
    assert bench.recoveries == 0
    bench.problem = None
    bench.pass_secs(60)
    assert bench.recoveries == 1
    bench.pass_secs(10 * LIFE_SECS)
    assert bench.recoveries == 1


def test_an_operator_error_rereads_the_permanent_key(bench):
    bench.problem = PROBLEMS[1]
    bench.refresher.step()
    assert bench.reread == 1
    assert bench.logged("credentials.failed")[0]["level"] == "error"


def test_a_reload_renews_the_key_at_once(bench):
    bench.refresher.step()
    bench.pass_secs(10)
    bench.refresher.wake()
    bench.pass_secs(0)
    assert bench.asked_at == [1000.0, 1010.0]


# --- refused by VOD ---------------------------------------------------------------------------------------------------


def test_a_refused_token_is_renewed_at_once_and_only_once(bench):
    bench.refresher.step()
    for _ in range(16):
        bench.refresher.refused(key(1).credentials.token)
    bench.pass_secs(1)
    assert len(bench.asked_at) == 2
    assert bench.recoveries == 1


def test_a_refused_token_that_was_replaced_renews_nothing(bench):
    bench.refresher.step()
    bench.pass_secs(LIFE_SECS)
    asked = len(bench.asked_at)
    bench.refresher.refused(key(1).credentials.token)
    bench.pass_secs(1)
    assert len(bench.asked_at) == asked


def test_issuing_the_refused_key_again_is_a_failure(bench):
    bench.refresher.step()
    bench.is_stuck = True
    bench.refresher.refused(key(1).credentials.token)
    bench.pass_secs(30)
    assert 1 < len(bench.asked_at) < 10
    assert "still the one that VOD refuses" in bench.logged("credentials.failed")[0]["error_message"]
    bench.is_stuck = False
    bench.pass_secs(60)
    assert bench.recoveries == 1


def test_refused_keys_do_not_cause_a_tight_loop_of_requests(bench):
    bench.refresher.step()
    for _ in range(600):
        bench.refresher.refused(bench.refresher().token)
        bench.pass_secs(1)
    assert len(bench.asked_at) < 30


# --- normal operation -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("draw", "share"), [(0.0, 2 / 3), (1.0, 2 / 3 - 0.1)])
def test_a_key_is_renewed_at_two_thirds_of_its_life(draw, share):
    assert renewal_secs(7200, draw) == pytest.approx(7200 * share)


def test_a_key_near_its_end_is_not_renewed_in_a_tight_loop():
    assert renewal_secs(0.001, 0.5) == RENEWAL_MIN_SECS


def test_no_request_fails_over_twenty_lives_of_a_key(bench):
    while bench.clock.now < 1000 + 20 * LIFE_SECS:
        bench.pass_secs(7)
        bench.refresher()
    assert bench.refreshes("ok") == pytest.approx(30, abs=1)
    assert bench.refreshes("failed") == bench.recoveries == 0


def test_a_service_that_repeats_its_key_is_asked_more_often(bench):
    bench.refresher.step()
    bench.is_stuck = True
    bench.pass_secs(LIFE_SECS - 1)
    assert 2 < len(bench.asked_at) < 12
    assert len(bench.logged("credentials.refreshed")) == len(bench.asked_at)
    assert [line["level"] for line in bench.logged("credentials.refreshed")].count("info") == 1


def test_the_key_from_before_a_reload_is_still_used(bench):
    bench.refresher.step()
    after = Bench(bench.keys)
    assert after.refresher() == key(1).credentials
    assert after.asked_at == []
    after.pass_secs(0)
    assert after.refresher() == key(1).credentials


def test_former_keys_are_still_known_for_redaction(bench):
    for _ in range(5):
        bench.refresher.step()
        bench.clock.advance(LIFE_SECS)
    known = bench.keys.known()
    assert known[:3] == ["tmp-id-0005", "tmp-key-0005", "tmp-token-0005"]
    assert known[-3:] == ["tmp-id-0001", "tmp-key-0001", "tmp-token-0001"]


def test_a_key_that_comes_after_the_stop_is_not_used(bench):
    bench.refresher.step()
    bench.pass_secs(LIFE_SECS / 2)
    bench.refresher.stop()
    bench.refresher.step()
    bench.pass_secs(LIFE_SECS / 3)
    assert bench.refresher() == key(1).credentials


def test_the_status_has_role_end_and_failure(bench):
    assert bench.refresher.status().expires_at is None
    bench.refresher.step()
    status = bench.refresher.status()
    assert (status.role, status.expires_at, status.error) == ("role r", 1000 + LIFE_SECS, "")
    bench.problem = PROBLEMS[1]
    bench.pass_secs(LIFE_SECS)
    status = bench.refresher.status()
    assert (status.is_usable, status.error, status.remedy) == (False, "STS refused AssumeRole", "trust the account")
    assert status.failing_since == pytest.approx(1000 + LIFE_SECS * 2 / 3)
