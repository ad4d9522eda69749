import threading
import time
from dataclasses import dataclass
from itertools import pairwise
from queue import Queue

import pytest

from tests.helpers import FakeClock, named
from tests.polling import until
from vodpoller.delivery.in_flight import WaitEnd
from vodpoller.errors import NoAnswerError, NoKeyError, OperatorError, StoppingError, ThrottledError, TransientError
from vodpoller.events.event import Lease
from vodpoller.liveness import Liveness
from vodpoller.poller import Poller
from vodpoller.telemetry import Count, Telemetry
from vodpoller.vod.answers import Pull


@dataclass(frozen=True)
class Source:
    name: str = "main"
    sub_app_id: int | None = None
    on_failure: str = "store"
    unrouted: str | None = "dead_letter"
    long_poll: bool = True
    max_concurrent_pulls: int = 3


class FakePipeline:
    """Client and pipeline: each pull waits until the test answers it; then its batch waits until `finish`."""

    def __init__(self, clock=time.monotonic):
        self.clock = clock
        self.answers = Queue()
        self.lock = threading.Lock()
        self.per_thread = threading.local()
        self.pulls_at = []
        self.pulling = 0
        self.delivering = []
        self.interrupted = []
        self.batches = []
        self.most_pulling = 0
        self.automatic = None
        self.min_wait_secs = 0.02

    def pull(self, source, sub_app_id):
        asked_at = self.clock()
        with self.lock:
            self.pulls_at.append(asked_at)
            self.pulling += 1
            self.most_pulling = max(self.most_pulling, self.pulling)
        answer = self.automatic() if self.automatic else self.answers.get(timeout=30)
        with self.lock:
            self.pulling -= 1
        if isinstance(answer, BaseException):
            raise answer
        events, hung_secs, self.per_thread.after, may_lack_events = answer
        return Pull(
            events=("event",) * events,
            malformed=(),
            lease=Lease(starts_at=asked_at, secs=30.0),
            hung_secs=hung_secs,
            request_id="r",
            may_lack_events=may_lack_events,
        )

    def process(self, batch, wait):
        with self.lock:
            self.batches.append(batch)
        if isinstance(self.per_thread.after, Exception):
            raise self.per_thread.after
        if self.per_thread.after:
            wait.min_wait_secs = self.min_wait_secs
            wait.add(1)
            with self.lock:
                self.delivering.append(wait)
            ended = wait.wait(30)
            with self.lock:
                self.delivering.remove(wait)
                if ended is not WaitEnd.COMPLETE:
                    self.interrupted.append(wait)

    def answer(self, events=0, *, hung_secs=5.0, after="wait", may_lack_events=False):
        self.answers.put((events, hung_secs, after, may_lack_events))

    def feed_until_pulling(self, number):
        """Give full answers, one at a time, until this number of pulls is outstanding.

        Pulls grow if an answer finds a free puller. On a busy machine, several answers in a row may find none.
        """

        def is_reached():
            if self.answers.empty():
                if self.pulling == number:
                    return True
                self.answer(16, hung_secs=0.0, after=None)
            return False

        until(is_reached, what=lambda: f"pulls outstanding: {self.pulling}, not {number}")

    def fail(self, error):
        self.answers.put(error)

    def finish(self, index=0):
        self.delivering[index].count_down()


class Pulls:
    """In place of the journal: records what is reported about pulls."""

    def __init__(self):
        self.reports = []

    def answered_empty(self, pulled):
        self.reports.append(("empty", pulled.source, pulled.lease_secs))

    def answer_lost(self, source, *, sent_ago_secs):
        assert sent_ago_secs >= 0
        self.reports.append(("lost", source))


class Bench:
    def __init__(self, log):
        self.log = log
        self.telemetry = Telemetry(log)
        self.liveness = Liveness()
        self.may_pull = True
        self.operator_errors = 0
        self.pulls = Pulls()
        self.pollers = []

    def poller(self, pipeline=None, *, clock=time.monotonic, start=True, wait=threading.Condition.wait, **settings):
        pipeline = pipeline or FakePipeline(clock)

        def on_operator_error():
            self.operator_errors += 1

        poller = Poller(
            Source(**settings),
            vod=pipeline,
            pipeline=pipeline,
            journal=self.pulls,
            may_pull=lambda: self.may_pull,
            on_operator_error=on_operator_error,
            cycle_secs=50.0,
            telemetry=self.telemetry,
            liveness=self.liveness,
            monotonic=clock,
            wait=wait,
        )
        self.pollers.append((poller, pipeline))
        if start:
            poller.tick()
        return poller, pipeline

    def close(self):
        for poller, pipeline in self.pollers:
            poller.stop()
            pipeline.automatic = lambda: StoppingError("stopping")
            for _ in range(10):
                pipeline.fail(StoppingError("stopping"))
            poller.end_waits()
            assert poller.join(10)


@pytest.fixture
def bench(log):
    bench = Bench(log)
    yield bench
    bench.close()


def settles(condition, value, *, secs=0.05):
    """Wait until the condition has kept this value for `secs`; it may have other values before."""
    steady_since = None

    def is_steady():
        nonlocal steady_since
        if condition() != value:
            steady_since = None
            return False
        steady_since = steady_since or time.monotonic()
        return time.monotonic() - steady_since >= secs

    until(is_steady, what=lambda: f"it is {condition()}, not {value}")
    return True


# --- idle -------------------------------------------------------------------------------------------------------------


def test_idle_is_one_outstanding_pull(bench):
    poller, pipeline = bench.poller()
    for number in range(1, 6):
        until(lambda number=number: len(pipeline.pulls_at) == number)
        poller.tick()
        pipeline.answer()
    assert settles(lambda: pipeline.pulling, 1)
    assert pipeline.most_pulling == 1


def test_the_events_of_a_pull_are_processed_as_one_batch(bench):
    poller, pipeline = bench.poller()
    pipeline.answer(3, after=None)
    pipeline.answer()
    until(lambda: len(pipeline.pulls_at) == 3)
    (batch,) = pipeline.batches
    assert (batch.source.name, len(batch.events), batch.request_id) == ("main", 3, "r")
    assert batch.lease.starts_at <= batch.received_at
    assert poller.last_pull_at > 0


def test_without_long_poll_each_tick_is_one_pull(bench):
    poller, pipeline = bench.poller(long_poll=False)
    pipeline.answer()
    assert settles(lambda: (len(pipeline.pulls_at), pipeline.pulling), (1, 0))
    poller.tick()
    poller.tick()
    assert settles(lambda: (len(pipeline.pulls_at), pipeline.pulling), (2, 1))


def test_without_long_poll_a_backlog_is_still_drained(bench):
    _, pipeline = bench.poller(long_poll=False)
    for _ in range(3):
        pipeline.answer(16, hung_secs=0.0, after=None)
    until(lambda: len(pipeline.pulls_at) >= 4)


def test_pulls_with_quick_empty_answers_start_a_second_apart(bench):
    clock = FakeClock()
    pipeline = FakePipeline(clock)
    pipeline.automatic = lambda: (0, 0.01, None, False)
    bench.poller(pipeline, clock=clock, wait=waiting_on(clock))
    until(lambda: len(pipeline.pulls_at) >= 10)
    assert all(later - earlier >= 1.0 for earlier, later in pairwise(pipeline.pulls_at))


def waiting_on(clock):
    """A `wait` that advances the fake clock and takes no real time."""

    def wait(condition, secs):
        clock.advance(secs)
        condition.wait(0.0005)  # releases the lock for a moment

    return wait


# --- backlog ----------------------------------------------------------------------------------------------------------


def test_another_puller_pulls_before_a_puller_delivers(bench):
    _, pipeline = bench.poller()
    pipeline.answer(16, hung_secs=3.0)
    assert settles(lambda: (len(pipeline.delivering), pipeline.pulling), (1, 1))


def test_pulls_grow_with_the_backlog_up_to_max_concurrent_pulls(bench):
    poller, pipeline = bench.poller(max_concurrent_pulls=4)
    pipeline.feed_until_pulling(4)
    for _ in range(40):
        pipeline.answer(16, hung_secs=0.0, after=None)
    assert settles(lambda: (pipeline.answers.empty(), pipeline.pulling), (True, 4))
    assert pipeline.most_pulling == 4
    assert sum(thread.name.startswith(f"puller-{poller.name}-") for thread in threading.enumerate()) == 4


def test_pulls_shrink_to_one_when_the_backlog_is_gone(bench):
    _, pipeline = bench.poller(max_concurrent_pulls=4)
    pipeline.feed_until_pulling(4)
    for _ in range(3):
        pipeline.answer()
    assert settles(lambda: pipeline.pulling, 1)
    pipeline.answer()
    assert settles(lambda: pipeline.pulling, 1)


def test_an_answer_that_hung_adds_no_pull(bench):
    _, pipeline = bench.poller(max_concurrent_pulls=4)
    for number in range(5):
        pipeline.answer(1, hung_secs=2.0, after=None)
        until(lambda number=number: len(pipeline.pulls_at) == number + 2)
    assert settles(lambda: pipeline.pulling, 1)
    assert pipeline.most_pulling == 1


def test_a_source_with_one_puller_pulls_one_at_a_time(bench):
    _, pipeline = bench.poller(max_concurrent_pulls=1)
    for _ in range(20):
        pipeline.answer(16, hung_secs=0.0, after=None)
    until(lambda: len(pipeline.pulls_at) == 21)
    assert pipeline.most_pulling == 1


def test_if_all_pullers_wait_for_sinks_the_longest_waiting_goes_on(bench):
    _, pipeline = bench.poller(max_concurrent_pulls=2)
    pipeline.answer(16, hung_secs=3.0)
    until(lambda: pipeline.delivering)
    first = pipeline.delivering[0]
    until(lambda: first.has_waited_enough)
    pipeline.min_wait_secs = 20
    pipeline.answer(16, hung_secs=3.0)
    until(lambda: pipeline.interrupted)
    assert pipeline.interrupted == [first]
    assert settles(lambda: (pipeline.pulling, len(pipeline.delivering)), (1, 1))


def test_no_wait_is_interrupted_while_another_puller_is_free(bench):
    _, pipeline = bench.poller(max_concurrent_pulls=3)
    pipeline.answer(16, hung_secs=3.0)
    until(lambda: pipeline.delivering)
    assert settles(lambda: (len(pipeline.delivering), pipeline.interrupted), (1, []), secs=0.1)


def test_without_new_threads_the_existing_pullers_go_on(bench, monkeypatch):
    poller, pipeline = bench.poller(max_concurrent_pulls=4)

    def refuse(thread):
        raise RuntimeError("can't start new thread")

    until(lambda: pipeline.pulling == 1)
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", refuse)
        pipeline.answer(16, hung_secs=0.0, after=None)
        until(lambda: len(pipeline.pulls_at) == 2)
    assert poller.join(0) is False
    assert pipeline.pulling == 1


def test_without_a_first_thread_the_next_tick_tries_again(bench, monkeypatch):
    poller, pipeline = bench.poller(start=False)

    def refuse(thread):
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", refuse)
        for _ in range(3):
            poller.tick()
    assert pipeline.pulls_at == []
    poller.tick()
    until(lambda: pipeline.pulling == 1)


# --- failures ---------------------------------------------------------------------------------------------------------


def failing(bench, error, *, number=12, max_concurrent_pulls=3):
    """A poller whose pulls always fail, and the start of each pull in seconds after the first."""
    clock = FakeClock()
    pipeline = FakePipeline(clock)
    pipeline.automatic = lambda: error
    poller, _ = bench.poller(pipeline, clock=clock, wait=waiting_on(clock), max_concurrent_pulls=max_concurrent_pulls)
    until(lambda: len(pipeline.pulls_at) >= number)
    return poller, [at - pipeline.pulls_at[0] for at in pipeline.pulls_at[:number]]


@pytest.mark.parametrize("attempt", range(5))  # the waits are random: test several of them
def test_pulls_that_always_fail_back_off_to_a_minute(bench, attempt):
    _, after = failing(bench, TransientError("down"))
    assert sum(at < 8.0 for at in after) <= 5
    assert after[1] <= 0.2
    gaps = [later - earlier for earlier, later in pairwise(after)]
    assert max(gaps) <= 60.001
    assert min(gaps[7:]) >= 30


def test_an_operator_error_backs_off_longer_and_rereads_credentials(bench, lines):
    poller, after = failing(bench, OperatorError("no such key", error_code="AuthFailure.SecretIdNotFound"), number=6)
    assert sum(at < 8.0 for at in after) <= 4
    assert bench.operator_errors >= 5
    assert isinstance(poller.problem, OperatorError)
    line = named(lines, "pull.failed")[0]
    assert (line["level"], line["error_code"]) == ("error", "AuthFailure.SecretIdNotFound")


@pytest.mark.parametrize(
    ("error", "cause", "remedy"),
    [
        (OperatorError("no such key", advice="compare secret_id"), "no such key", "compare secret_id"),
        (OperatorError("no such | SubAppId", advice="see sub_app_id"), "no such | SubAppId", "see sub_app_id"),
        (OperatorError("no request can be sent: see api.ca_file"), "no request can be sent: see api.ca_file", "Remove"),
        (TransientError("no answer within 10 s"), "no answer within 10 s", ""),
    ],
)
def test_the_status_separates_cause_and_remedy(bench, error, cause, remedy):
    poller, _ = failing(bench, error, number=1)
    status = poller.status()
    assert status.error == cause
    assert status.remedy.startswith(remedy)
    assert bool(status.remedy) == bool(remedy)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (NoAnswerError("refused the connection"), "connection"),
        (OperatorError("no such key", error_code="AuthFailure.SecretIdNotFound", request_id="r-7"), "auth"),
    ],
)
def test_a_failed_pull_is_counted_and_remembered(bench, error, code):
    poller, pipeline = bench.poller(clock=FakeClock())
    pipeline.fail(error)
    until(lambda: poller.problem)
    poller.wake()
    pipeline.answer()
    until(lambda: poller.problem is None)
    last = poller.status().last_error
    assert (last.message, last.error_code, last.request_id) == (str(error), error.error_code, error.request_id)
    assert bench.telemetry.total(Count.PULL_ERRORS, source="main", code=code) == 1
    assert bench.telemetry.total(Count.PULL_ERRORS) == 1


def test_retry_after_delays_the_next_pull(bench):
    _, after = failing(bench, TransientError("busy", retry_after_secs=50.0), number=4)
    assert all(later - earlier >= 50.0 for earlier, later in pairwise(after))


def test_an_unexpected_error_in_a_pull_backs_off_and_is_logged(bench, lines):
    error = ValueError("a bug")
    poller, after = failing(bench, error, number=5)
    assert sum(at < 8.0 for at in after) <= 5
    assert "a bug" in str(poller.problem)
    line = named(lines, "pull.failed")[0]
    assert (line["level"], line["exc_info"]) == ("error", error)


def test_a_repeated_failure_makes_few_lines(bench, lines):
    failing(bench, TransientError("down"), number=7)
    assert len(named(lines, "pull.failed")) <= 2


def test_pulls_that_fail_together_count_as_one_failure(bench, lines):
    clock = FakeClock()  # so that they fail at the same time on a busy machine too
    _, pipeline = bench.poller(FakePipeline(clock), clock=clock, wait=waiting_on(clock), max_concurrent_pulls=4)
    pipeline.feed_until_pulling(4)
    for _ in range(4):
        pipeline.fail(TransientError("down"))
    assert settles(lambda: pipeline.pulling, 1)
    pipeline.fail(TransientError("down"))
    pipeline.answer()
    until(lambda: named(lines, "pull.recovered"))
    assert named(lines, "pull.recovered")[0]["failures"] == 2, "one for the four together, and one for the later pull"


def test_a_source_that_recovers_pulls_again_and_logs_it(bench, lines):
    poller, pipeline = bench.poller()
    pipeline.fail(TransientError("down"))
    until(lambda: len(pipeline.pulls_at) == 2)
    assert isinstance(poller.problem, TransientError)
    pipeline.fail(TransientError("down"))
    until(lambda: poller.status().next_pull_at is not None)
    poller.wake()
    until(lambda: len(pipeline.pulls_at) == 3)
    pipeline.answer(1, hung_secs=2.0, after=None)
    until(lambda: poller.problem is None)
    until(lambda: named(lines, "pull.recovered"))
    assert settles(lambda: pipeline.pulling, 1)


@pytest.mark.parametrize(
    ("error", "reports"),
    [
        (TransientError("no answer"), [("lost", "main")]),
        (TransientError("500", error_code="InternalError.Db"), [("lost", "main")]),
        (RuntimeError("unforeseen"), [("lost", "main")]),
        (TransientError("100 MB", error_code="AnswerTooLarge"), [("lost", "main")]),
        (ThrottledError("slower", error_code="RequestLimitExceeded"), []),
        (NoKeyError("the token was refused"), []),
        (OperatorError("no such key", error_code="AuthFailure.SecretIdNotFound"), []),
    ],
)
def test_a_pull_whose_answer_may_be_lost_is_reported_as_lost(bench, error, reports):
    poller, pipeline = bench.poller()
    pipeline.fail(error)
    until(lambda: poller.problem is not None)
    assert bench.pulls.reports == reports


def test_an_empty_answer_is_reported_before_the_next_pull(bench):
    _, pipeline = bench.poller()
    pipeline.answer(0)
    until(lambda: len(pipeline.pulls_at) == 2)
    assert bench.pulls.reports == [("empty", "main", 30.0)]


@pytest.mark.parametrize(("number", "reports"), [(0, [("lost", "main")]), (3, [("lost", "main")])])
def test_an_answer_that_may_lack_events_is_reported_as_lost(bench, number, reports):
    _, pipeline = bench.poller()
    pipeline.answer(number, after=None, may_lack_events=True)
    until(lambda: len(pipeline.pulls_at) == 2)
    assert bench.pulls.reports == reports


def test_an_answer_with_events_is_not_reported(bench):
    _, pipeline = bench.poller()
    pipeline.answer(3, after=None)
    until(lambda: len(pipeline.pulls_at) == 2)
    assert bench.pulls.reports == []


@pytest.mark.parametrize("end", [Poller.wake, Poller.end_back_off])
def test_a_wake_ends_the_back_off(bench, end):
    poller, pipeline = bench.poller()
    pipeline.fail(NoKeyError("down", retry_after_secs=1000.0))
    until(lambda: poller.problem)
    assert settles(lambda: len(pipeline.pulls_at), 1)
    poller.tick()
    assert settles(lambda: len(pipeline.pulls_at), 1)
    end(poller)
    until(lambda: len(pipeline.pulls_at) == 2)


def test_a_puller_survives_a_batch_whose_processing_fails(bench, lines):
    poller, pipeline = bench.poller(max_concurrent_pulls=2)
    for number in range(5):
        pipeline.answer(16, hung_secs=2.0, after=RuntimeError("a bug"))
        until(lambda number=number: len(pipeline.pulls_at) == number + 2)
    until(lambda: len(named(lines, "puller.failed")) == 5)
    assert settles(lambda: pipeline.pulling, 1)
    assert poller.problem is None


# --- while pulling is not allowed -------------------------------------------------------------------------------------


def test_no_pull_starts_while_pulling_is_not_allowed(bench):
    bench.may_pull = False
    poller, pipeline = bench.poller()
    poller.tick()
    assert settles(lambda: pipeline.pulls_at, [])
    bench.may_pull = True
    poller.wake()
    until(lambda: pipeline.pulling == 1)


def test_pulling_continues_by_itself_when_it_is_allowed_again(bench):
    bench.may_pull = False
    _, pipeline = bench.poller()
    bench.may_pull = True
    until(lambda: pipeline.pulling == 1, secs=3)


def test_a_puller_in_its_back_off_is_not_overdue(bench):
    poller, pipeline = bench.poller()
    until(lambda: bench.liveness.overdue(-100))
    pipeline.fail(TransientError("down", retry_after_secs=1000.0))
    until(lambda: poller.problem)
    until(lambda: not bench.liveness.overdue(-100))


# --- stopping ---------------------------------------------------------------------------------------------------------


def test_a_stop_waits_for_the_outstanding_pull_and_its_events(bench):
    poller, pipeline = bench.poller()
    until(lambda: pipeline.pulling == 1)
    poller.stop()
    assert poller.join(0.02) is False
    pipeline.answer(16, hung_secs=0.0)
    until(lambda: pipeline.delivering)
    assert poller.join(0.02) is False
    pipeline.finish()
    assert poller.join(10) is True
    poller.tick()
    assert settles(lambda: (len(pipeline.pulls_at), pipeline.pulling), (1, 0))


def test_a_stop_ends_pullers_that_wait(bench):
    poller, pipeline = bench.poller()
    pipeline.fail(TransientError("down", retry_after_secs=1000.0))
    until(lambda: poller.problem)
    poller.stop()
    assert poller.join(10) is True
    assert len(pipeline.pulls_at) == 1


def test_a_pull_that_a_stop_prevents_is_not_a_failure(bench, lines):
    poller, pipeline = bench.poller()
    until(lambda: pipeline.pulling == 1)
    poller.stop()
    pipeline.fail(StoppingError("stopping"))
    assert poller.join(10) is True
    assert poller.problem is None
    assert lines == []


def test_interrupting_the_poller_ends_every_wait_for_sinks(bench):
    poller, pipeline = bench.poller()
    pipeline.answer(16, hung_secs=2.0)
    pipeline.answer(16, hung_secs=2.0)
    until(lambda: len(pipeline.delivering) == 2)
    poller.end_waits()
    until(lambda: len(pipeline.interrupted) == 2)


def test_interrupting_the_poller_ends_the_waits_of_later_batches_too(bench):
    poller, pipeline = bench.poller()
    until(lambda: pipeline.pulling == 1)
    poller.stop()
    poller.end_waits()
    pipeline.answer(16, hung_secs=2.0)
    until(lambda: pipeline.interrupted)
    assert poller.join(10)


def test_a_poller_that_never_ran_stops_at_once(bench):
    poller, _ = bench.poller(start=False)
    poller.stop()
    assert poller.join(0) is True
    assert poller.name == "main"
