"""A backlog of stored events that a sink gets when it is back, across kills and stops, byte for byte."""

import json
import sqlite3
import threading
from collections import Counter
from contextlib import closing

import pytest

from tests.helpers import log_into
from tests.polling import until
from tests.receiver import Answer, Receiver, running_receiver
from vodpoller.events.event import event_key, restore_event
from vodpoller.journal.contract import Letter
from vodpoller.journal.sqlite import SqliteJournal
from vodpoller.telemetry import Telemetry

EVENTS = 400
# A body that changes if a JSON library reads and writes it.
ODD = b'{"EventType":"NewFileUpload",  "FileUploadEvent":{"FileId":"%d","Size":1e2,"Big":%d,"Name":"\\u00e9/\\/"}}'


PLAIN = b'{"EventType":"NewFileUpload","FileUploadEvent":{"FileId":"%d","Big":%d}}'


def store(system, sink, number=EVENTS, *, template=ODD):
    """Store events for a sink, all of them due.

    Returns:
        Their bodies, by their keys.
    """
    bodies = {}
    for it in range(number):
        body = template % (it, 10**40 + it)
        bodies[event_key(json.loads(body), None)] = body
    journal = SqliteJournal(system.journal, max_bytes=10**9, ledger_days=14, telemetry=Telemetry(log_into([])))
    journal.store(
        [
            Letter(
                event=restore_event(body=body, key=key, event_type="NewFileUpload", source="main", sub_app_id=None),
                sink=sink,
                dead=False,
                reason="sink_failed",
            )
            for key, body in bodies.items()
        ]
    )
    journal.close()
    return bodies


def rows(system, sql):
    with closing(sqlite3.connect(f"{system.journal.as_uri()}?mode=ro", uri=True, timeout=10)) as db:
        return db.execute(sql).fetchall()


def pending(system):
    return {key for (key,) in rows(system, "SELECT key FROM letters WHERE state = 'pending'")}


def configure(system, sinks):
    # VOD cannot be reached: only stored events are delivered.
    system.configure("http://127.0.0.1:9", sinks=sinks)


def hook(url, more=""):
    return f'[sinks.hook]\ntype = "webhook"\nurl = "{url}"\nconcurrency = 4\ntimeout_secs = 10\n{more}'


def keys_at(receiver):
    return [bytes.fromhex(received.headers["webhook-id"]) for received in list(receiver.accepted)]


def is_at_rest():
    """Whether the receiver has handled all requests of a process that died."""
    return not any("process_request_thread" in thread.name for thread in threading.enumerate())


def assert_all_arrived_unchanged(receiver, bodies):
    received_bodies = {bytes.fromhex(received.headers["webhook-id"]): received.body for received in receiver.accepted}
    assert received_bodies == bodies


@pytest.mark.parametrize(
    "failpoints",
    [
        ["claim:before:3", "claim:after:2", "claim:after:3"],
        ["results:before:2", "ledger:before:1", "ledger:before:2"],
        ["ledger:after:1", "forget:before:3", "results:after:2", "forget:after:4"],
    ],
    ids=lambda failpoints: "-".join(failpoints).replace(":", "_"),
)
@pytest.mark.long
def test_killed_at_each_step_only_events_in_flight_are_sent_twice(system, receiver, failpoints):
    bodies = store(system, "hook")
    configure(system, hook(receiver.url))
    may_be_repeated = Counter()
    for failpoint in failpoints:
        system.daemon(started=False, failpoint=failpoint).await_failpoint()
        until(is_at_rest)
        may_be_repeated.update(pending(system).intersection(keys_at(receiver)))
    daemon = system.daemon()
    until(lambda: not pending(system), secs=60, what=daemon.tail)
    assert daemon.terminate()[0] == 0
    assert_all_arrived_unchanged(receiver, bodies)
    again = Counter(keys_at(receiver)) - Counter(bodies.keys())
    assert again - may_be_repeated == Counter()


@pytest.mark.long
@pytest.mark.parametrize(
    "failpoints",
    [
        ["claim:after:1", "write:before:1", "write:amid:1", "recover:before:1"],
        ["sync:after:1", "ledger:before:1", "recover:after:1", "ledger:after:1"],
        ["results:before:2", "forget:before:1", "forget:after:1"],
    ],
    ids=lambda failpoints: "-".join(failpoints).replace(":", "_"),
)
def test_killed_at_each_step_a_file_has_each_event_once(system, failpoints):
    bodies = store(system, "archive", 4 * EVENTS, template=PLAIN)  # a torn line must look like the sink's own
    configure(system, system.archive_sink)
    for failpoint in failpoints:
        system.daemon(started=False, failpoint=failpoint).await_failpoint()
    daemon = system.daemon()
    until(lambda: not pending(system), secs=60, what=daemon.tail)
    assert daemon.terminate()[0] == 0
    assert sorted(system.lines()) == sorted(bodies.values())


class RejectsSome(Receiver):
    """Rejects one of three events, and accepts the others."""

    def answer_to(self, received):
        return Answer(status=422) if int(received.headers["webhook-id"], 16) % 3 == 0 else self.answer


def test_killed_around_a_rejection_each_event_is_one_dead_letter(system):
    with running_receiver(RejectsSome()) as receiver:
        bodies = store(system, "hook")
        configure(system, hook(receiver.url, "breaker_failures = 1000\n"))
        for failpoint in ("mark_dead:before:1", "mark_dead:after:1", "mark_dead:before:2"):
            system.daemon(started=False, failpoint=failpoint).await_failpoint()
        daemon = system.daemon()
        until(lambda: not pending(system), secs=60, what=daemon.tail)
        assert daemon.terminate()[0] == 0
    rejected = {key for key in bodies if int.from_bytes(key, "big") % 3 == 0}
    assert sorted(rows(system, "SELECT key, reason FROM letters")) == sorted((key, "rejected") for key in rejected)
    assert set(keys_at(receiver)) == bodies.keys() - rejected


@pytest.mark.long
def test_a_stop_during_a_backlog_writes_the_results(system, receiver):
    bodies = store(system, "hook", 5 * EVENTS)
    configure(system, hook(receiver.url))
    for number in (1, 2):
        daemon = system.daemon()
        until(lambda number=number: len(keys_at(receiver)) > number * EVENTS, secs=60, what=daemon.tail)
        exit_code, took_secs = daemon.terminate()
        assert exit_code == 0
        assert took_secs < 15, "it does not wait for `shutdown_secs`"
        assert pending(system) == bodies.keys() - set(keys_at(receiver))
        assert daemon.log("worker.failed") == daemon.log("task.failed") == []
    assert pending(system)
    daemon = system.daemon()
    until(lambda: not pending(system), secs=60, what=daemon.tail)
    assert Counter(keys_at(receiver)) == Counter(bodies.keys())


@pytest.mark.long
def test_a_hanging_receiver_does_not_block_the_backlog_of_others(system, receiver):
    bodies = store(system, "hook")
    system.journal.rename(system.folder / "hook.db")
    others = store(system, "archive", 2 * EVENTS)
    with closing(sqlite3.connect(system.journal, isolation_level=None)) as db:
        db.execute("ATTACH ? AS hook", (str(system.folder / "hook.db"),))
        columns = "key, sink, state, reason, error, attempts, stored_at, due_at, run, source, event_type, body"
        db.execute(f"INSERT INTO main.letters ({columns}) SELECT {columns} FROM hook.letters")
    receiver.answer = Answer(hangs=True)
    configure(system, hook(receiver.url) + system.archive_sink)
    daemon = system.daemon()
    until(lambda: len(system.lines()) == len(others), secs=60, what=daemon.tail)
    until(lambda: len(pending(system)) == len(bodies), what=daemon.tail)
    assert receiver.accepted == []
    receiver.answer = Answer()
    receiver.released.set()
    until(lambda: not pending(system), secs=90, what=daemon.tail)
    assert_all_arrived_unchanged(receiver, bodies)
