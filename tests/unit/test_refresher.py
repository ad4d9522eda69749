"""Renewing the temporary key of a role, on a clock that stands still."""

from dataclasses import replace

import pytest

from tests.helpers import FakeClock, log_into, named
from vodpoller.errors import NoKeyError, OperatorError, TransientError
from vodpoller.logs import CATALOGUE
from vodpoller.telemetry import Count, Telemetry
from vodpoller.vod.credentials import Credentials, IssuedKey, IssuedKeys
from vodpoller.vod.refresher import RENEWAL_MIN_SECS, Refresher, renewal_secs

LIFE_SECS = 600.0


class Machine:
    """A refresher, its clock, and an issuer that does what a test says."""

    def __init__(self, keys=None):
        self.clock = FakeClock()
        self.lines = []
        self.telemetry = Telemetry(log_into(self.lines), monotonic=self.clock)
        self.keys = keys or IssuedKeys()
        self.problem = None
        self.life_secs = LIFE_SECS
        self.is_stuck = False  # the issuer hands out the same key again
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
        """Let time pass, and the refresher's thread do what is due in it."""
        ends_at = self.clock.now + secs
        while True:
            wait_secs = self.refresher.step()
            if self.clock.now + wait_secs > ends_at:
                self.clock.now = ends_at
                return
            self.clock.advance(max(wait_secs, 0.001))

    def refreshes(self, result):
        return self.telemetry.total(Count.CREDENTIALS_REFRESHES, result=result)

    def said(self, event):
        return named(self.lines, event)


def key(number, *, life_secs=LIFE_SECS, ends_at=1600.0):
    credentials = Credentials(f"tmp-id-{number:04}", f"tmp-key-{number:04}", f"tmp-token-{number:04}")
    return IssuedKey(credentials=credentials, role="role r", life_secs=life_secs, ends_at=ends_at)


@pytest.fixture
def machine():
    made = Machine()
    yield made
    assert {line["event"] for line in made.lines} <= set(CATALOGUE)


PROBLEMS = [
    TransientError("the metadata service m:80 did not answer within 2 s"),
    OperatorError("STS refused AssumeRole", advice="trust the account", error_code="UnauthorizedOperation"),
    KeyError("tmp-key-0001"),  # unforeseen: its text may be a secret
]


@pytest.mark.parametrize("problem", PROBLEMS, ids=["transient", "operator", "unforeseen"])
def test_the_last_good_key_is_used_until_it_ends(machine, problem):
    machine.refresher.step()
    machine.problem = problem
    machine.pass_secs(LIFE_SECS - 1)
    assert machine.refresher() == key(1).credentials
    machine.clock.advance(1)
    with pytest.raises(NoKeyError, match="the temporary key has ended, and no new one was issued"):
        machine.refresher()


def test_a_request_without_a_key_names_one_cause_whatever_the_attempts_say(machine):
    said = set()
    for number in range(3):
        machine.problem = TransientError(f"its key ended {number} s ago")
        machine.pass_secs(100)
        with pytest.raises(NoKeyError) as caught:
            machine.refresher()
        said.add(str(caught.value))
    assert len(said) == 1


@pytest.mark.parametrize("problem", PROBLEMS, ids=["transient", "operator", "unforeseen"])
def test_a_failure_is_said_once_and_over_within_a_minute(machine, problem):
    machine.refresher.step()
    machine.problem = problem
    machine.pass_secs(2 * LIFE_SECS / 3 + 250)
    assert len(machine.said("credentials.failed")) == 1
    assert machine.refreshes("failed") > 5
    assert "tmp-key" not in str(machine.said("credentials.failed"))
    machine.problem = None
    machine.pass_secs(60)
    assert machine.refresher() != key(1).credentials
    assert len(machine.said("credentials.refreshed")) == 2


def test_each_cause_of_a_failure_has_its_line(machine):
    machine.refresher.step()
    for text in ("its key ended 5 s ago", "its key ended 6 s ago", "it is not JSON", "it is not JSON"):
        machine.problem = TransientError(text)
        machine.clock.advance(LIFE_SECS if len(machine.asked_at) == 1 else 61)
        machine.refresher.step()
    assert [line["error_message"] for line in machine.said("credentials.failed")] == [
        "its key ended 5 s ago",
        "it is not JSON",
    ]


def test_failing_attempts_are_one_to_sixty_seconds_apart(machine):
    machine.problem = PROBLEMS[0]
    machine.pass_secs(1000)
    gaps = [after - before for before, after in zip(machine.asked_at, machine.asked_at[1:], strict=False)]
    assert 0.5 <= gaps[0] <= 1
    assert all(gap <= 60 for gap in gaps)
    assert all(gap >= 30 for gap in gaps[7:])


def test_a_key_that_ends_soon_is_said_once_as_an_error(machine):
    machine.refresher.step()
    machine.problem = PROBLEMS[0]
    machine.pass_secs(LIFE_SECS * 5 / 6 - 2)
    assert machine.said("credentials.expiring") == []
    machine.pass_secs(LIFE_SECS)
    (line,) = machine.said("credentials.expiring")
    assert line["level"] == "error"
    assert LIFE_SECS / 6 - 2 < line["left_secs"] <= LIFE_SECS / 6


def test_a_first_attempt_that_fails_is_not_repeated_by_requests(machine):
    machine.problem = PROBLEMS[0]
    for _ in range(5):
        with pytest.raises(NoKeyError, match="there is no temporary key yet"):
            machine.refresher()
    assert len(machine.asked_at) == 1


def test_requests_go_on_as_soon_as_there_is_a_key_again(machine):
    machine.problem = PROBLEMS[0]
    machine.pass_secs(100)
    assert machine.recoveries == 0
    machine.problem = None
    machine.pass_secs(60)
    assert machine.recoveries == 1
    machine.pass_secs(10 * LIFE_SECS)
    assert machine.recoveries == 1


def test_what_only_a_person_can_mend_has_the_lasting_key_read_again(machine):
    machine.problem = PROBLEMS[1]
    machine.refresher.step()
    assert machine.reread == 1
    assert machine.said("credentials.failed")[0]["level"] == "error"


def test_a_reload_renews_at_once(machine):
    machine.refresher.step()
    machine.pass_secs(10)
    machine.refresher.wake()
    machine.pass_secs(0)
    assert machine.asked_at == [1000.0, 1010.0]


# --- refused by VOD ---------------------------------------------------------------------------------------------------


def test_a_refused_token_is_renewed_at_once_and_only_once(machine):
    machine.refresher.step()
    for _ in range(16):
        machine.refresher.refused(key(1).credentials.token)
    machine.pass_secs(1)
    assert len(machine.asked_at) == 2
    assert machine.recoveries == 1


def test_a_token_that_was_replaced_meanwhile_renews_nothing(machine):
    machine.refresher.step()
    machine.pass_secs(LIFE_SECS)
    asked = len(machine.asked_at)
    machine.refresher.refused(key(1).credentials.token)
    machine.pass_secs(1)
    assert len(machine.asked_at) == asked


def test_the_refused_key_handed_out_again_is_a_failure(machine):
    machine.refresher.step()
    machine.is_stuck = True
    machine.refresher.refused(key(1).credentials.token)
    machine.pass_secs(30)
    assert 1 < len(machine.asked_at) < 10
    assert "still the one that VOD refuses" in machine.said("credentials.failed")[0]["error_message"]
    machine.is_stuck = False
    machine.pass_secs(60)
    assert machine.recoveries == 1


def test_keys_that_are_all_refused_are_not_asked_for_in_a_tight_loop(machine):
    machine.refresher.step()
    for _ in range(600):
        machine.refresher.refused(machine.refresher().token)
        machine.pass_secs(1)
    assert len(machine.asked_at) < 30


# --- when all is well -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("draw", "share"), [(0.0, 2 / 3), (1.0, 2 / 3 - 0.1)])
def test_a_key_is_renewed_at_two_thirds_of_its_life(draw, share):
    assert renewal_secs(7200, draw) == pytest.approx(7200 * share)


def test_a_life_that_is_nearly_over_is_not_renewed_in_a_tight_loop():
    assert renewal_secs(0.001, 0.5) == RENEWAL_MIN_SECS


def test_no_request_fails_over_twenty_lives_of_a_key(machine):
    while machine.clock.now < 1000 + 20 * LIFE_SECS:
        machine.pass_secs(7)
        machine.refresher()
    assert machine.refreshes("ok") == pytest.approx(30, abs=1)
    assert machine.refreshes("failed") == machine.recoveries == 0


def test_a_service_that_hands_out_the_same_key_is_asked_more_often(machine):
    machine.refresher.step()
    machine.is_stuck = True
    machine.pass_secs(LIFE_SECS - 1)
    assert 2 < len(machine.asked_at) < 12
    assert len(machine.said("credentials.refreshed")) == len(machine.asked_at)
    assert [line["level"] for line in machine.said("credentials.refreshed")].count("info") == 1


def test_the_key_of_the_time_before_a_reload_is_good(machine):
    machine.refresher.step()
    after = Machine(machine.keys)
    assert after.refresher() == key(1).credentials
    assert after.asked_at == []
    after.pass_secs(0)
    assert after.refresher() == key(1).credentials


def test_former_keys_stay_hidden_for_a_while(machine):
    for _ in range(5):
        machine.refresher.step()
        machine.clock.advance(LIFE_SECS)
    known = machine.keys.known()
    assert known[:3] == ["tmp-id-0005", "tmp-key-0005", "tmp-token-0005"]
    assert known[-3:] == ["tmp-id-0001", "tmp-key-0001", "tmp-token-0001"]


def test_what_comes_after_the_stop_is_not_used(machine):
    machine.refresher.step()
    machine.pass_secs(LIFE_SECS / 2)
    machine.refresher.stop()
    machine.refresher.step()
    machine.pass_secs(LIFE_SECS / 3)
    assert machine.refresher() == key(1).credentials


def test_the_status_tells_role_end_and_failure(machine):
    assert machine.refresher.status().expires_at is None
    machine.refresher.step()
    status = machine.refresher.status()
    assert (status.role, status.expires_at, status.error) == ("role r", 1000 + LIFE_SECS, "")
    machine.problem = PROBLEMS[1]
    machine.pass_secs(LIFE_SECS)
    status = machine.refresher.status()
    assert (status.is_usable, status.error, status.remedy) == (False, "STS refused AssumeRole", "trust the account")
    assert status.failing_since == pytest.approx(1000 + LIFE_SECS * 2 / 3)
