"""The output of `vodpoller status` for a whole daemon, without problems and with each kind of problem."""

import json
import re
import resource
import signal
import sqlite3
from contextlib import closing
from datetime import datetime

import pytest

from tests.helpers import event, log_into
from tests.polling import until
from tests.processes import SECRET_ID, SECRET_KEY, HeldPort, ServiceManager, run_command
from tests.receiver import Answer
from vodpoller.journal.sqlite import Letter, SqliteJournal
from vodpoller.telemetry import Telemetry

MEMBERS = [
    "running",
    "pid",
    "version",
    "started_at",
    "sources",
    "sinks",
    "stored",
    "journal",
    "credentials",
    "reload",
    "problems",
]


def status_of(system, *args):
    """The JSON of the status; the exit code must agree with it."""
    done = run_command("status", "--json", *args, "-c", system.config_path)
    assert done.stdout, done.stderr
    status = json.loads(done.stdout)
    assert done.returncode == (1 if status["problems"] else 0)
    assert set(MEMBERS) <= set(status)
    return status


def first_problem(system, *words, what):
    """Wait for a problem and check the first one, in the JSON and at the top of the table."""
    first = until(lambda: status_of(system)["problems"])[0]
    assert first["what"] == what
    missing = [word for word in words if word not in f"{first['cause']} | {first['remedy']}"]
    assert not missing, first
    done = run_command("status", "-c", system.config_path)
    assert done.returncode == 1
    assert done.stdout.startswith(f"PROBLEM {what}: ")
    output = done.stdout.replace("\n  ", " | ")
    assert not [word for word in words if word not in output], done.stdout


def seconds_between(first, second):
    return (datetime.fromisoformat(second) - datetime.fromisoformat(first)).total_seconds()


def letter(number, sink, *, dead):
    return Letter(
        event=event(number), sink=sink, dead=dead, reason="rejected" if dead else "sink_failed", error="HTTP 500"
    )


def store(system, *letters):
    journal = SqliteJournal(system.journal, max_bytes=10**9, ledger_days=5, telemetry=Telemetry(log_into([])))
    journal.store(letters)
    journal.close()


def test_without_problems_it_is_exit_0_with_a_recent_pull(system):
    simulator = system.simulator(events=3)
    system.configure(simulator.url)
    daemon = system.daemon()
    until(simulator.all_confirmed)
    until(lambda: status_of(system)["settled_events"] == 3)

    status = status_of(system)
    assert status["journal"]["last_confirm_at"]
    assert status["problems"] == []
    assert (status["running"], status["pid"]) == (True, daemon.process.pid)
    (source,), (sink,) = status["sources"], status["sinks"]
    assert seconds_between(source["last_pull_at"], status["at"]) < 10
    assert (source["error"], sink["down_since"]) == ("", None)
    assert status["journal"]["writable"] is True
    assert (status["stored"], status["credentials"]["provider"]) == ([], "static")
    assert seconds_between(status["reload"].pop("built_at"), status["at"]) < 60
    assert status["reload"] == {
        "successful": True,
        "at": None,
        "last_success_at": status["started_at"],
        "under_way": False,
        "problems": [],
    }
    done = run_command("status", "-c", system.config_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "PROBLEM" not in done.stdout
    assert re.search(r"main +│ pull +│ \d{4}-", done.stdout)
    assert re.search(r"archive +│ accepts", done.stdout)

    assert daemon.terminate()[0] == 0
    assert not system.journal.with_name("journal.db.sock").exists()


def test_an_unreachable_api_is_reported_right_after_the_start(system):
    with HeldPort() as port:
        system.configure(port.url)
        system.daemon()
        first_problem(
            system, "since the start", str(port.number), "refused the connection", "check --connect", what="source main"
        )


@pytest.mark.parametrize(
    ("options", "sub_app_id", "words"),
    [
        ({"secret_id": SECRET_ID, "secret_key": "another"}, None, ["AuthFailure.SignatureFailure", "secret_key"]),
        ({"secret_id": "AKIDanother", "secret_key": SECRET_KEY}, None, ["AuthFailure.SecretIdNotFound", "secret_id"]),
        ({"sub_app_id": 7}, 8, ["SubAppId", "check the source's sub_app_id"]),
    ],
    ids=["key", "id", "application"],
)
def test_refusals_by_vod_are_reported_with_a_remedy(system, options, sub_app_id, words):
    simulator = system.simulator(**options)
    system.configure(simulator.url, source=f"sub_app_id = {sub_app_id}" if sub_app_id else "")
    system.daemon()
    first_problem(system, "no pull has succeeded since the start", "RequestId", *words, what="source main")


def refuse(system, receiver, message):
    """Configure a VOD that refuses every request with this message."""
    error = {"Code": "UnauthorizedOperation", "Message": message}
    refusal = {"Response": {"Error": error, "RequestId": "of-the-refusal"}}
    receiver.answer = Answer(status=200, body=json.dumps(refusal).encode())
    system.configure(f"http://127.0.0.1:{receiver.server_port}")


@pytest.mark.parametrize("action", ["PullEvents", "ConfirmEvents"])
def test_a_missing_right_is_reported_by_its_name(system, receiver, action):
    refuse(system, receiver, f"you may not (vod:{action})")
    system.daemon()
    words = [f"(vod:{action})", "RequestId of-the-refusal", "vod:PullEvents", "vod:ConfirmEvents"]
    first_problem(system, *words, what="source main")


def test_a_secret_that_vod_repeats_is_not_shown(system, receiver):
    refuse(system, receiver, f"your key {SECRET_KEY} may not")
    with ServiceManager(system.folder / "notify") as manager:
        system.daemon(NOTIFY_SOCKET=manager.path)
        first_problem(system, "UnauthorizedOperation", "your key [secret] may not", what="source main")
        until(lambda: any("your key [secret] may not" in message for message in manager.messages("STATUS=")))
        assert not any(SECRET_KEY in message for message in manager.messages("STATUS="))


def test_a_full_disk_is_reported_until_it_has_room_again(system):
    simulator = system.simulator()
    system.configure(simulator.url)
    daemon = system.daemon()
    assert until(lambda: status_of(system)["sources"][0]["last_pull_at"])
    limits = resource.prlimit(daemon.process.pid, resource.RLIMIT_FSIZE)

    resource.prlimit(daemon.process.pid, resource.RLIMIT_FSIZE, (1, limits[1]))  # as on a full disk
    first_problem(system, "disk", "Make room on the disk", str(system.journal), what="journal")
    assert status_of(system)["journal"]["writable"] is False

    resource.prlimit(daemon.process.pid, resource.RLIMIT_FSIZE, limits)
    until(lambda: not status_of(system)["problems"])


def test_a_journal_that_was_deleted_is_reported(system):
    simulator = system.simulator()
    system.configure(simulator.url)
    system.daemon()
    system.journal.unlink()
    first_problem(system, "deleted or replaced", "restart vodpoller", what="journal")


@pytest.mark.parametrize("kind", ["refusing", "unreachable"])
def test_a_dead_sink_is_reported_with_time_and_cause(system, receiver, kind):
    receiver.answer = Answer(status=503)
    simulator = system.simulator(events=3)
    with HeldPort() as port:
        url = receiver.url if kind == "refusing" else port.url
        sinks = f'[sinks.hook]\ntype = "webhook"\nurl = "{url}"\nbreaker_failures = 1\n'
        system.configure(simulator.url, sinks=system.archive_sink + sinks)
        system.daemon().await_log("breaker.opened")
        words = ["503"] if kind == "refusing" else ["refused the connection"]
        first_problem(system, "down since 20", *words, "Bring its receiver back", what="sink hook")


def test_stored_events_of_a_removed_sink_are_reported_at_the_start(system):
    store(system, *(letter(number, "gone", dead=False) for number in range(3)))
    simulator = system.simulator()
    system.configure(simulator.url)
    daemon = system.daemon()
    first_problem(system, "3 stored events", "no such sink", "replay --pending --sink gone --to SINK", what="sink gone")
    assert daemon.await_log("pending.stuck")[0]["sink"] == "gone"


@pytest.mark.parametrize("end", ["terminate", "kill"])
def test_a_stopped_daemon_is_reported_with_data_of_the_journal(system, end):
    simulator = system.simulator(events=3)
    system.configure(simulator.url)
    daemon = system.daemon()
    until(lambda: status_of(system)["journal"]["last_confirm_at"])
    getattr(daemon, end)()

    first_problem(system, "no daemon runs", "systemctl status vodpoller", "journalctl -u vodpoller -e", what="daemon")
    status = status_of(system)
    assert (status["running"], status["pid"]) == (False, None)
    assert status["started_at"]


def test_without_a_daemon_a_removed_sink_is_reported_too(system):
    store(system, letter(1, "gone", dead=False), letter(2, "archive", dead=True))
    system.configure("http://127.0.0.1:9")
    assert [found["what"] for found in status_of(system)["problems"]] == ["daemon", "sink gone"]
    assert [found["what"] for found in status_of(system, "--strict")["problems"]] == [
        "daemon",
        "sink gone",
        "sink archive",
    ]


def test_dead_letters_are_problems_only_with_strict(system):
    store(system, letter(1, "archive", dead=True), letter(2, "", dead=True))
    simulator = system.simulator()
    system.configure(simulator.url)
    system.daemon()
    until(lambda: status_of(system)["problems"] == [])
    assert [found["what"] for found in status_of(system, "--strict")["problems"]] == ["dead letters", "sink archive"]


@pytest.mark.long
def test_a_daemon_that_hangs_is_reported(system):
    simulator = system.simulator()
    system.configure(simulator.url)
    daemon = system.daemon()
    until(lambda: not status_of(system)["problems"])
    daemon.signal(signal.SIGSTOP)
    try:
        first_problem(system, "does not answer", "timed out", "journalctl", what="daemon")
        assert status_of(system)["running"] is True
    finally:
        daemon.signal(signal.SIGCONT)


def test_another_process_with_the_journal_is_reported_as_such(system):
    system.configure("http://127.0.0.1:9")
    with closing(SqliteJournal(system.journal, max_bytes=10**9, ledger_days=5, telemetry=Telemetry(log_into([])))):
        first_problem(system, "has the journal open", "starting or stopping", what="daemon")


def test_a_socket_that_cannot_be_made_is_only_a_warning(system):
    simulator = system.simulator(events=3)
    system.configure(simulator.url)
    (system.folder / "journal.db.sock").mkdir()  # a folder is not replaced
    daemon = system.daemon()
    until(simulator.all_confirmed)
    (line,) = daemon.log("status.unavailable")
    assert line["path"] == str(system.folder / "journal.db.sock")
    assert status_of(system)["running"] is True
    assert daemon.terminate()[0] == 0


@pytest.mark.parametrize("command", ["once", "run"])
def test_frequent_status_calls_lose_and_double_nothing(system, command):
    """The status is requested without a pause."""
    simulator = system.simulator(events=200)
    system.configure(simulator.url)
    if command == "run":
        system.daemon()
        while not simulator.all_confirmed():
            assert status_of(system)["running"]
        until(lambda: system.has_delivered_all(simulator))
    else:
        assert run_command("once", "-c", system.config_path).returncode == 0
        assert not (system.folder / "journal.db.sock").exists()
    with closing(sqlite3.connect(system.journal)) as db:
        assert db.execute("SELECT count(*) FROM ledger").fetchone() == (200,)
    assert len(system.lines()) == 200
