"""The daemon and the simulator as processes: deliveries, confirms, and what the operator sees."""

import itertools
import json
import random
import signal
import sqlite3
import threading
import time
from collections import Counter
from functools import partial

import pytest

from tests import shapes
from tests.polling import until
from tests.processes import SECRET_ID, SECRET_KEY, HeldPort, ServiceManager, bodies_of, canonical, differences
from tests.receiver import Answer, Receiver, running_receiver
from vodpoller import daemon as daemon_module
from vodpoller import service as service_module
from vodpoller.config.load import load
from vodpoller.logs import CATALOGUE, LINE_MAX_BYTES, make_logger

ALL_FAULTS = "reset=0.02,http_5xx=0.02,internal_error=0.02,limit=0.02,truncated=0.02,lost=0.02,slow=0.005"
VERIFYING = {"secret_id": SECRET_ID, "secret_key": SECRET_KEY}


def hook_sink(url, more="timeout_secs = 1"):
    return f'[sinks.hook]\ntype = "webhook"\nurl = "{url}"\n{more}\n'


def numbered(number):
    return json.dumps({"EventType": "Numbered", "NumberedEvent": {"TaskId": f"task-{number}-", "Number": number}})


def stored(system):
    """Rows of the journal by (sink, state, reason)."""
    with sqlite3.connect(f"file:{system.journal}?mode=ro", uri=True) as journal:
        rows = journal.execute("SELECT sink, state, reason FROM letters").fetchall()
    journal.close()
    return Counter(rows)


def held_by_the_journal(system, sink):
    with sqlite3.connect(f"file:{system.journal}?mode=ro", uri=True) as journal:
        rows = journal.execute("SELECT body FROM letters WHERE sink = ? AND state = 'pending'", (sink,)).fetchall()
    journal.close()
    return [body for (body,) in rows]


def assert_all_arrived_once(system, simulator):
    assert differences(bodies_of(simulator.ledger(bodies=True)), system.lines_of_all_files()) == ([], [])


# --- what arrives -----------------------------------------------------------------------------------------------------


def test_events_of_every_documented_shape_arrive_once_and_json_equal(system):
    fed = shapes.bodies(2900)
    assert len(set(map(canonical, fed))) == len(fed)
    events_file = system.folder / "events"
    events_file.write_bytes(b"\n".join(fed))
    simulator = system.simulator(events_file=events_file, visibility_secs=30)
    system.configure(simulator.url, lease_secs=30)
    daemon = system.daemon()

    system.await_archived(simulator, secs=60)
    assert daemon.terminate()[0] == 0

    assert differences(fed, system.lines()) == ([], [])
    assert daemon.problems() == []
    assert len(daemon.log("event.settled")) == len(fed)


def test_an_unreadable_event_is_a_dead_letter_and_affects_no_other(system):
    good = shapes.bodies(200)
    fed = [*good, *shapes.BROKEN, *shapes.NO_EVENTS]
    random.Random(7).shuffle(fed)
    events_file = system.folder / "events"
    events_file.write_bytes(b"\n".join(fed))
    simulator = system.simulator(events_file=events_file, visibility_secs=2)
    system.configure(simulator.url, lease_secs=2)
    daemon = system.daemon()

    until(lambda: simulator.stats()["confirmed"] == len(good) + len(shapes.BROKEN), secs=30)
    until(lambda: simulator.stats()["redeliveries"] >= 2 * len(shapes.NO_EVENTS))
    until(lambda: len(system.lines()) >= len(good))
    assert daemon.terminate()[0] == 0

    assert differences(good, system.lines()) == ([], [])
    assert stored(system) == {("", "dead", "malformed"): len(shapes.BROKEN)}
    counts = Counter(line["has_handle"] for line in daemon.log("event.malformed"))
    assert counts == {True: len(shapes.BROKEN), False: len(shapes.NO_EVENTS)}


def test_with_all_faults_events_arrive_once_and_are_confirmed(system):
    simulator = system.simulator(rate=300, feed=1500, faults=ALL_FAULTS, slow_secs=1.5, requests_per_sec=100)
    system.configure(simulator.url, api="")
    daemon = system.daemon()

    system.await_archived(simulator, secs=60)
    assert daemon.terminate()[0] == 0

    assert sum(simulator.stats()["faults"].values()) >= 5
    assert_all_arrived_once(system, simulator)
    assert stored(system) == {}


def test_all_events_arrive_once_across_ten_kills_under_load(system):
    chance = random.Random()
    simulator = system.simulator(events=2000, rtt_secs=0.02, visibility_secs=2)
    system.configure(simulator.url, lease_secs=2, api="requests_per_sec = 100")

    for _ in range(10):
        enough = simulator.stats()["confirmed"] + chance.randrange(16, 160)
        daemon = system.daemon(started=False)
        until(lambda enough=enough: simulator.stats()["confirmed"] >= enough, secs=30, every_secs=0.005)
        daemon.kill()
    assert not simulator.all_confirmed()
    daemon = system.daemon()
    system.await_archived(simulator, secs=60)

    assert simulator.stats()["redeliveries"] > 0
    assert_all_arrived_once(system, simulator)


# --- stopping ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rtt_secs", [0.0, 0.05, 0.2])
def test_sigterm_under_load_confirms_all_that_was_pulled(system, rtt_secs):
    simulator = system.simulator(events=4000, rtt_secs=rtt_secs, requests_per_sec=100, visibility_secs=4)
    system.configure(simulator.url, lease_secs=4, api="", more="[daemon]\nshutdown_secs = 10")
    daemon = system.daemon()
    until(lambda: simulator.stats()["confirmed"] >= 500, secs=30, every_secs=0.01)

    code, took_secs = daemon.terminate()

    assert code == 0
    assert took_secs < 10
    ledger = simulator.ledger(bodies=True)
    pulled = [row for row in ledger if row["times_delivered"]]
    assert len(ledger) - len(pulled) >= 500
    assert all(row["confirmed"] for row in pulled)
    assert differences(bodies_of(pulled), system.lines() + held_by_the_journal(system, "archive")) == ([], [])


def test_sigterm_awaits_the_outstanding_pull_and_delivers_its_events(system):
    simulator = system.simulator(poll_secs=3)
    system.configure(simulator.url)
    daemon = system.daemon()
    until(lambda: simulator.stats()["pulls_hanging_now"] == 1)

    daemon.signal(signal.SIGTERM)
    daemon.await_log("daemon.stopping")
    simulator.feed(*map(numbered, range(16)))

    assert daemon.process.wait(10) == 0
    stats = simulator.stats()
    assert (stats["confirmed"], stats["pulls_abandoned"]) == (16, 0)
    fed = bodies_of(simulator.ledger(bodies=True))
    assert differences(fed, system.lines() + held_by_the_journal(system, "archive")) == ([], [])


def test_a_second_sigterm_ends_the_process_at_once_with_143(system):
    simulator = system.simulator(poll_secs=8)
    system.configure(simulator.url)
    daemon = system.daemon()
    until(lambda: simulator.stats()["pulls_hanging_now"] == 1)
    daemon.signal(signal.SIGTERM)
    daemon.await_log("daemon.stopping")

    code, took_secs = daemon.terminate()

    assert code == 143
    assert took_secs < 1


def test_sigterm_while_a_webhook_hangs_stores_unaccepted_events(system):
    with running_receiver() as receiver:
        receiver.answer = Answer(hangs=True)
        simulator = system.simulator(events=40, visibility_secs=30)
        sinks = system.archive_sink + hook_sink(receiver.url, "timeout_secs = 20")
        system.configure(simulator.url, sinks=sinks, lease_secs=30, more="[daemon]\nshutdown_secs = 7")
        daemon = system.daemon()
        until(lambda: len(receiver.received) >= 8 and len(system.lines()) == 40)

        code, took_secs = daemon.terminate()

        assert code == 0
        assert took_secs < 9
        assert simulator.all_confirmed()
        assert sum(stored(system).values()) == 40
        receiver.answer = Answer()
        system.daemon()
        until(lambda: len(receiver.accepted) >= 40, secs=30)
    assert len({received.headers["webhook-id"] for received in receiver.accepted}) == 40
    assert_all_arrived_once(system, simulator)


# --- two sinks --------------------------------------------------------------------------------------------------------


class PickyReceiver(Receiver):
    """Answers 500 to each body that contains `poison`."""

    poison = b"\x00"

    def answer_to(self, received):
        return Answer(status=500) if self.poison in received.body else super().answer_to(received)


def feed_one_by_one(system, simulator, numbers, *, within_secs=2.0):
    """Feed events; each must be in the file within `within_secs`, whatever another sink does."""
    for number in numbers:
        before = len(system.lines())
        simulator.feed(numbered(number))
        until(lambda before=before: len(system.lines()) == before + 1, secs=within_secs, every_secs=0.01)


def assert_each_accepted_once(receiver, simulator):
    assert differences(bodies_of(simulator.ledger(bodies=True)), [each.body for each in receiver.accepted]) == ([], [])
    ids = Counter(received.headers["webhook-id"] for received in receiver.accepted)
    assert set(ids.values()) == {1}


@pytest.mark.parametrize("outage", ["refuses", "hangs"])
def test_a_webhook_that_was_down_gets_each_event_once_and_delays_none(system, outage):
    simulator = system.simulator(visibility_secs=8)
    with HeldPort() as port:
        system.configure(simulator.url, lease_secs=8, sinks=system.archive_sink + hook_sink(port.url))
        daemon = system.daemon()
        if outage == "refuses":
            feed_one_by_one(system, simulator, range(60))
            until(simulator.all_confirmed)
            receiver = Receiver(("127.0.0.1", port.number))
        else:
            receiver = Receiver(("127.0.0.1", port.number))
            receiver.answer = Answer(hangs=True)
        with running_receiver(receiver):
            if outage == "hangs":
                feed_one_by_one(system, simulator, range(60))
                until(simulator.all_confirmed)
                receiver.answer = Answer()
            until(lambda: len(receiver.accepted) >= 60, secs=45, what=daemon.tail)
            feed_one_by_one(system, simulator, range(60, 80))
            until(lambda: len(receiver.accepted) >= 80)
            until(lambda: system.has_delivered_all(simulator))
            assert daemon.terminate()[0] == 0

            assert_each_accepted_once(receiver, simulator)
    assert_all_arrived_once(system, simulator)
    assert simulator.stats()["redeliveries"] == 0
    assert stored(system) == {}
    assert [line["event"] for line in daemon.problems()] == ["delivery.failed", "breaker.opened"]
    assert len(daemon.log("breaker.closed")) == 1


def test_an_event_that_a_webhook_refuses_delays_no_other(system):
    simulator = system.simulator()
    receiver = PickyReceiver()
    receiver.poison = b"task-5-"
    with running_receiver(receiver):
        system.configure(simulator.url, sinks=system.archive_sink + hook_sink(receiver.url))
        daemon = system.daemon()

        feed_one_by_one(system, simulator, range(5))
        simulator.feed(*map(numbered, range(5, 100)))
        until(lambda: len(receiver.accepted) == 99)
        until(simulator.all_confirmed)
        until(lambda: stored(system) == {("hook", "pending", "sink_failed"): 1})

        receiver.poison = b"\x00"
        until(lambda: len(receiver.accepted) == 100, secs=60)
        assert daemon.terminate()[0] == 0
    assert_each_accepted_once(receiver, simulator)
    assert_all_arrived_once(system, simulator)
    assert simulator.stats()["redeliveries"] == 0
    assert daemon.log("breaker.opened") == []


# --- VOD refuses or cannot be reached ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("wrong_at", "quiet_secs", "max_requests"), [("daemon", 6, 4), ("vod", 1.5, 2)])
def test_a_wrong_key_is_logged_with_a_remedy_and_needs_few_requests(system, wrong_at, quiet_secs, max_requests):
    simulator = system.simulator(
        events=40, secret_id=SECRET_ID, secret_key=SECRET_KEY if wrong_at == "daemon" else "a-former-key"
    )
    system.configure(simulator.url, secret_key="a-mistyped-key" if wrong_at == "daemon" else SECRET_KEY)
    daemon = system.daemon()
    (line,) = daemon.await_log("pull.failed")
    time.sleep(quiet_secs)

    assert daemon.process.poll() is None
    assert simulator.requests <= max_requests
    assert line["level"] == "error"
    assert line["error_code"] == "AuthFailure.SignatureFailure"
    assert line["request_id"]
    assert "secret_key does not belong to secret_id" in line["error_message"]
    if wrong_at == "daemon":
        system.key_path.write_text(SECRET_KEY)
    else:
        simulator.control(**VERIFYING)
    daemon.signal(signal.SIGHUP)
    until(simulator.all_confirmed, secs=3)
    assert len(daemon.log("pull.failed")) == 1


def test_a_reload_that_does_not_help_logs_the_error_again(system):
    simulator = system.simulator(events=1, **VERIFYING)
    system.configure(simulator.url, secret_key="a-mistyped-key")
    daemon = system.daemon()
    daemon.await_log("pull.failed")

    system.key_path.write_text("another-mistyped-key")
    daemon.signal(signal.SIGHUP)

    daemon.await_log("daemon.reloaded")
    daemon.await_log("pull.failed", number=2, secs=3)


def test_a_closed_endpoint_is_logged_and_tried_seldom(system):
    with HeldPort() as port:
        system.configure(port.url, more='[log]\nlevel = "debug"')
        daemon = system.daemon()
        (line,) = daemon.await_log("pull.failed")
        time.sleep(6)

        assert daemon.process.poll() is None
        assert 2 <= len(daemon.log("api.answered")) <= 5
        assert "is api.endpoint right" in line["error_message"]
        simulator = system.simulator(port=port.number, events=40)
        daemon.signal(signal.SIGHUP)
        until(simulator.all_confirmed, secs=3)
        daemon.await_log("pull.recovered")
        assert len(daemon.log("pull.failed")) == 1


@pytest.mark.parametrize("skew_secs", [600, -600])
def test_a_clock_ten_minutes_off_is_corrected_and_logged(system, skew_secs):
    simulator = system.simulator(events=40, clock_skew_secs=skew_secs, **VERIFYING)
    system.configure(simulator.url)
    daemon = system.daemon()

    until(simulator.all_confirmed, secs=5)

    (line,) = daemon.problems()
    assert (line["event"], line["level"]) == ("clock.corrected", "warning")
    assert line["skew_secs"] == pytest.approx(skew_secs, abs=5)
    assert simulator.stats()["errors"] == {"AuthFailure.SignatureExpire": 1}


def test_an_idle_daemon_has_one_pull_outstanding_and_logs_nothing(system):
    simulator = system.simulator(poll_secs=5, empty="mixed")
    system.configure(simulator.url)
    daemon = system.daemon()
    until(lambda: simulator.stats()["pulls_hanging_now"] == 1)
    before = simulator.requests

    ends_at = time.monotonic() + 11
    hanging = Counter()
    while time.monotonic() < ends_at:
        hanging[simulator.stats()["pulls_hanging_now"]] += 1
        time.sleep(0.1)

    assert 2 <= simulator.requests - before <= 3
    assert set(hanging) <= {0, 1}  # none for the moment between two of them
    assert hanging[0] <= 3
    assert [line["event"] for line in daemon.log()] == ["daemon.started"]


# --- what an operator sees --------------------------------------------------------------------------------------------


def test_debug_logs_have_no_secret_and_only_events_of_the_catalogue(system):
    secrets = {
        "wrong key": "wrong+key/with=odd:characters",
        "key": "right+key/with=odd:characters",
        "token": "a-temporary-token-of-the-account",
        "hook secret": "whsec_c2lnbmluZ3NlY3JldG9mdGhld2ViaG9va3Rlc3Q=",
        "header": "Bearer header-of-the-webhook",
    }
    account = {"secret_id": SECRET_ID, "secret_key": secrets["key"], "token": secrets["token"]}
    simulator = system.simulator(events=300, faults=ALL_FAULTS, slow_secs=0.5, **account)
    (system.folder / "token").write_text(secrets["token"])
    (system.folder / "hook_secret").write_text(secrets["hook secret"] + "\n")
    headers = f'headers = {{ Authorization = "{secrets["header"]}" }}\nsecret_file = "hook_secret"\n'
    echo = " ".join(secret for name, secret in secrets.items() if name != "wrong key").encode()
    with running_receiver() as receiver:
        receiver.answer = Answer(status=400, body=echo)
        sinks = system.archive_sink + hook_sink(receiver.url, headers)
        system.configure(simulator.url, sinks=sinks, secret_key=secrets["wrong key"], more='[log]\nlevel = "debug"')
        text = system.config_path.read_text().replace("[[sources]]", 'token_file = "token"\n[[sources]]', 1)
        system.config_path.write_text(text)
        daemon = system.daemon()
        daemon.await_log("pull.failed", where=lambda line: line.get("error_code", "").startswith("AuthFailure"))
        system.key_path.write_text(secrets["key"])
        daemon.signal(signal.SIGHUP)
        until(simulator.all_confirmed, secs=40, what=daemon.tail)
        until(lambda: receiver.received)
        receiver.answer = Answer(status=302, headers={"Location": "/?" + secrets["key"]})
        simulator.feed(*map(numbered, range(20)))
        until(simulator.all_confirmed, secs=40, what=daemon.tail)
        assert daemon.terminate()[0] == 0

    raw = daemon.log_path.read_text()
    assert "api.answered" in raw
    assert [name for name, secret in secrets.items() if secret in raw] == []
    assert "Signature=" not in raw
    for line in raw.splitlines():
        parsed = json.loads(line)
        assert isinstance(parsed, dict)
        assert parsed["event"] in CATALOGUE, line
        assert parsed["level"] in ("debug", "info", "warning", "error"), line
        assert parsed["timestamp"].endswith("Z"), line
        assert len(line.encode()) <= LINE_MAX_BYTES
    sent = receiver.received[0].headers
    assert sent["Authorization"] == secrets["header"]
    assert sent["webhook-signature"].startswith("v1,")


def test_each_event_has_one_line_with_its_ids_and_its_fate(system):
    simulator = system.simulator()
    system.configure(simulator.url)
    daemon = system.daemon()
    body = shapes.documented_snapshot(3)
    simulator.feed(body)
    (line,) = daemon.await_log("event.settled")

    payload = json.loads(body)["SnapshotByTimeOffsetCompleteEvent"]
    assert line["event_type"] == "CreateSnapshotByTimeOffsetComplete"
    assert (line["task_id"], line["file_id"]) == (payload["TaskId"], payload["FileId"])
    assert (line["sinks"], line["settlement"], line["confirmed"]) == (
        {"archive": {"outcome": "delivered", "reason": "delivered"}},
        "confirm",
        True,
    )
    assert 0 < line["lease_left_secs"] <= 3
    assert (line["level"], line["source"], line["redelivered"]) == ("info", "main", False)


@pytest.mark.parametrize(("events", "refused"), [(10, 3), (40, 1)])
def test_redelivered_events_of_refused_confirms_are_delivered_once(system, events, refused):
    simulator = system.simulator(events=events, forget_confirms=refused, visibility_secs=2)
    system.configure(simulator.url, lease_secs=2)
    daemon = system.daemon()

    until(lambda: system.has_delivered_all(simulator))

    assert len(system.lines()) == events
    settled = daemon.await_log("event.settled", number=events + refused)
    assert [line["confirm_result"] for line in settled if not line["confirmed"]] == ["refused"] * refused
    assert sum(line["redelivered"] for line in settled) == simulator.stats()["redeliveries"] == refused


def test_sighup_after_a_rename_loses_and_doubles_no_line(system):
    simulator = system.simulator(rate=200, feed=600)
    system.configure(simulator.url)
    daemon = system.daemon()
    rotated = []

    for number in range(3):
        simulator.feed(numbered(number))
        until(
            lambda: len(system.lines()) >= 50 or (not simulator.stats()["feeding"] and system.lines()), every_secs=0.01
        )
        rotated.append(system.archive.rename(system.folder / f"events.jsonl.{number + 1}"))
        daemon.signal(signal.SIGHUP)
        daemon.await_log("daemon.reloaded", number=number + 1)
        until(system.archive.exists)
        before = [path.stat().st_size for path in rotated]
    simulator.feed(numbered("last"))
    system.await_archived(simulator)

    assert [path.stat().st_size for path in rotated] == before
    assert all(path.read_bytes().count(b"\n") for path in [*rotated, system.archive])
    assert_all_arrived_once(system, simulator)


def test_a_kill_between_rename_and_sighup_doubles_nothing(system):
    simulator = system.simulator(rate=200, feed=600, visibility_secs=2)
    system.configure(simulator.url, lease_secs=2)
    daemon = system.daemon()
    until(lambda: len(system.lines()) >= 100, every_secs=0.01)

    system.archive.rename(system.folder / "events.jsonl.1")
    daemon.kill()
    system.daemon()
    system.await_archived(simulator)

    assert_all_arrived_once(system, simulator)


# --- the service manager ----------------------------------------------------------------------------------------------


def test_systemd_is_notified_of_start_watchdog_problems_and_stop(system):
    simulator = system.simulator(**VERIFYING)
    system.configure(simulator.url, secret_key="a-mistyped-key")
    with ServiceManager(system.folder / "notify") as manager:
        daemon = system.daemon(NOTIFY_SOCKET=manager.path)
        until(lambda: any("cannot pull" in message for message in manager.messages("STATUS=")), secs=12)
        until(lambda: len(manager.messages("WATCHDOG=1")) >= 2)
        assert daemon.terminate()[0] == 0
        until(lambda: manager.messages("STOPPING=1"))

    messages = [message for _, message in manager.received]
    assert messages[0] == "READY=1"
    assert messages[-1] == "STOPPING=1"
    assert "AuthFailure.SignatureFailure" in next(message for message in messages if "cannot pull" in message)
    assert SECRET_KEY not in "".join(messages)


NEVER = '''
import threading
from typing import Literal
from vodpoller.sinks import Sink, SinkConfig

RELEASED = threading.Event()


class NeverConfig(SinkConfig):
    type: Literal["never"]


class NeverSink(Sink):
    """Does not keep to its time limit."""

    Config = NeverConfig

    def __init__(self, name, config, context):
        self.timeout_secs = 0.1

    def deliver(self, events, timeout_secs):
        RELEASED.wait()
'''


@pytest.fixture
def plugin(tmp_path):
    """A folder with a plug-in package whose sink never returns from `deliver`."""
    folder = tmp_path / "plugin"
    (folder / "vodpoller_never-1.0.dist-info").mkdir(parents=True)
    (folder / "vodpoller_never.py").write_text(NEVER)
    info = folder / "vodpoller_never-1.0.dist-info"
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: vodpoller-never\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[vodpoller.sinks]\nnever = vodpoller_never:NeverSink\n")
    return folder


def test_a_sink_that_hangs_delays_neither_other_sinks_nor_the_stop(system, plugin):
    simulator = system.simulator(events=100, visibility_secs=2)
    sinks = system.archive_sink + '[sinks.never]\ntype = "never"\n'
    system.configure(simulator.url, lease_secs=2, sinks=sinks, more="[daemon]\nshutdown_secs = 6")
    with_plugin = f"{plugin}:{system.config_path.parent}"
    daemon = system.daemon(PYTHONPATH=f"{with_plugin}:{shapes.__file__.rsplit('/', 2)[0]}")

    system.await_archived(simulator)
    code, took_secs = daemon.terminate()

    assert code == 0
    assert took_secs < 8
    assert [line["sink"] for line in daemon.log("sink.stuck")] == ["never"]
    assert {sink for sink, _, _ in stored(system)} == {"never"}
    assert sum(stored(system).values()) == 100
    assert simulator.stats()["redeliveries"] == 0
    assert_all_arrived_once(system, simulator)


class Manager:
    """A notifier that records what the service reports."""

    def __init__(self):
        self.fed = itertools.count()
        self.feedings = 0
        self.statuses = []
        self.watchdog_secs = None

    def ready(self):
        pass

    def stopping(self):
        pass

    def status(self, text):
        self.statuses.append(text)

    def alive(self):
        self.feedings = next(self.fed) + 1


def test_the_watchdog_is_fed_only_while_no_thread_hangs(system, plugin, monkeypatch):
    monkeypatch.syspath_prepend(plugin)
    monkeypatch.setattr(service_module, "HEARTBEAT_SECS", 0.05)
    monkeypatch.setattr(daemon_module, "OVERDUE_SECS", 0.5)
    simulator = system.simulator()
    system.configure(simulator.url, sinks='[sinks.never]\ntype = "never"\n', more="[daemon]\nshutdown_secs = 6")
    manager, over = Manager(), threading.Event()
    with (system.folder / "in-process.log").open("w") as log_file:
        read = partial(load, system.config_path, env={})
        service = service_module.Service(
            read(), read=read, make_log=lambda _: make_logger(log_file, log_format="json"), notifier=manager
        )
        thread = threading.Thread(target=service.run, kwargs={"until": over.is_set})
        thread.start()
        try:
            until(lambda: manager.feedings >= 5)
            simulator.feed(numbered(1))

            def has_stopped():
                before = manager.feedings
                time.sleep(0.5)
                return manager.feedings == before

            until(has_stopped)
            assert "thread.overdue" in (system.folder / "in-process.log").read_text()
        finally:
            __import__("vodpoller_never").RELEASED.set()
        try:
            stopped_at = manager.feedings
            until(lambda: manager.feedings > stopped_at)
        finally:
            over.set()
            thread.join()
