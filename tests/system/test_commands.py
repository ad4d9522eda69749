"""The operator's commands as processes, with and without a daemon, and their errors."""

import base64
import fcntl
import json
import os
import re
import select
import signal
import sqlite3
import struct
import subprocess
import sys
import tempfile
import termios
import tomllib
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from tests.as_nobody import NOBODY
from tests.helpers import event, log_into
from tests.polling import until
from tests.processes import (
    ROOT,
    SECRET_ID,
    SECRET_KEY,
    HeldPort,
    cannot_run,
    canonical,
    environment,
    run_command,
    running_system,
)
from tests.receiver import Answer, Receiver, running_receiver
from vodpoller.journal.contract import Letter
from vodpoller.journal.schema import SCHEMA_VERSION
from vodpoller.journal.sqlite import SqliteJournal
from vodpoller.telemetry import Telemetry

EX_CONFIG = 78

MANY = 10_000
MEMORY_MAX_KB = 100 * 1024


def hook_sink(url):
    return f'[sinks.hook]\ntype = "webhook"\nurl = "{url}"\n'


def letter(number, sink="archive", **more):
    task_id = more.pop("task_id", None)
    of_event = event(
        number, event_type=more.pop("event_type", "NewFileUpload"), **({"TaskId": task_id} if task_id else {})
    )
    return Letter(event=of_event, sink=sink, **{"dead": True, "reason": "rejected", "error": "HTTP status 422", **more})


def store(system, *letters):
    """Store letters in the journal, as a daemon does; returns their bodies."""
    journal = SqliteJournal(system.journal, max_bytes=10**9, ledger_days=5, telemetry=Telemetry(log_into([])))
    journal.store(letters)
    journal.close()
    return [stored.event.body for stored in letters]


def prepared(system, *letters):
    """Write a configuration with a file sink, and store letters; no other file exists yet."""
    system.configure("http://127.0.0.1:9")
    return store(system, *letters)


def letters_command(system, name, *args, **more):
    return run_command("deadletters", name, *args, "-c", system.config_path, **more)


def listed(system, *args):
    done = letters_command(system, "list", "--json", *args)
    assert (done.returncode, done.stderr) == (0, "")
    return [json.loads(line) for line in done.stdout.splitlines()]


def assert_fails(done, code, *phrases):
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert SECRET_KEY not in done.stdout + done.stderr
    for phrase in phrases:
        assert phrase in done.stderr


def assert_arrived_once(system, bodies):
    assert sorted(system.lines()) == sorted(bodies)


def tree(folder):
    return sorted((str(path), path.stat().st_mtime_ns, path.stat().st_size) for path in folder.rglob("*"))


# --- mistakes of the operator -----------------------------------------------------------------------------------------

READERS = [["status"], ["deadletters", "list"], ["deadletters", "show", "1"], ["deadletters", "export"]]
WRITERS = [["deadletters", "replay"], ["deadletters", "purge", "--yes"]]


@pytest.mark.parametrize("command", READERS + WRITERS, ids=" ".join)
def test_without_a_journal_the_error_says_when_it_is_created(system, command):
    path = system.configure("http://127.0.0.1:9")

    assert_fails(run_command(*command, "-c", path), 1, str(system.journal), "makes it when it first runs")
    assert not system.journal.exists()


@pytest.mark.parametrize("command", [*READERS, *WRITERS, ["once"], ["check", "--connect"]], ids=" ".join)
def test_commands_without_a_configuration_end_with_78(tmp_path, command):
    path = tmp_path / "nowhere.toml"

    assert_fails(run_command(*command, "-c", path), EX_CONFIG, f"{path}: the file does not exist")


@pytest.mark.parametrize("command", READERS + WRITERS, ids=" ".join)
def test_a_journal_of_a_later_version_is_refused(system, command):
    prepared(system, letter(1))
    with closing(sqlite3.connect(system.journal)) as db:
        db.execute("PRAGMA user_version = 99")

    assert_fails(run_command(*command, "-c", system.config_path), EX_CONFIG, "version 99", "knows versions up to")


@pytest.mark.parametrize("command", READERS + WRITERS, ids=" ".join)
@pytest.mark.parametrize("at", ["file is not a database", "malformed"])
def test_a_corrupt_journal_ends_with_78_and_a_remedy(system, command, at):
    prepared(system, *(letter(number) for number in range(200)))
    content = bytearray(system.journal.read_bytes())
    start = 0 if at == "file is not a database" else 4096
    content[start:] = b"\x5a" * (len(content) - start)
    system.journal.write_bytes(content)

    assert_fails(
        run_command(*command, "-c", system.config_path), EX_CONFIG, "corrupt", at, ".recover", "delivered twice"
    )


@pytest.mark.parametrize("place", ["folder", "/dev/null"])
@pytest.mark.parametrize("command", [*READERS, ["run"], ["once"]], ids=" ".join)
def test_a_journal_that_is_not_a_file_ends_with_78(system, command, place):
    system.journal = system.folder / "folder" if place == "folder" else Path(place)
    (system.folder / "folder").mkdir()
    path = system.configure("http://127.0.0.1:9")

    assert_fails(run_command(*command, "-c", path), EX_CONFIG, f"{system.journal}: this is", "set journal.path")


@pytest.mark.parametrize(
    ("args", "phrase"),
    [
        (["list", "--since", "yesterday"], "neither a time (2026-11-23T08:00) nor an age (90m, 12h, 3d)"),
        (["list", "--since", "²d"], "neither a time"),
        (["list", "--since", "5"], "neither a time"),
        (["list", "--reason", "reject"], "rejected"),
        (["list", "--limit", "0"], "--limit"),
        (["show"], "Missing argument 'ID'"),
        (["show", "first"], "'first' is not a valid integer"),
        (["show", "0"], "ID"),
        (["purge", "--yes", "9" * 20], "ID"),
        (["replay", "--state", "dead"], "No such option"),
        (["replay", "--to", "hok"], "the configuration has no sink 'hok' (its sinks: archive)"),
        (["replay", "--pending", "--to", ""], "its sinks: archive"),
        (["list", "--reason", "sink_failed"], "dead letters never have the reason 'sink_failed'"),
        (["purge", "--yes", "--pending", "--reason", "malformed"], "never have the reason 'malformed'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_usage_ends_with_2_and_a_remedy(system, args, phrase):
    prepared(system, letter(1))

    assert_fails(letters_command(system, *args), 2, phrase)
    assert len(listed(system)) == 1


@pytest.mark.parametrize("options", [[], ["--pending"]], ids=str)
@pytest.mark.parametrize("command", ["show", "replay", "purge", "export"])
def test_an_unknown_id_is_named(system, command, options):
    prepared(system, letter(1))

    done = letters_command(system, command, "77", *options, *(["--yes"] if command == "purge" else []))

    assert_fails(done, 1, "77", "vodpoller deadletters list")
    assert len(listed(system)) == 1


@pytest.mark.parametrize("command", ["replay", "purge", "export"])
def test_an_id_of_the_other_state_is_reported_as_such(system, command):
    prepared(system, letter(1), letter(2, dead=False, reason="sink_failed"))
    yes = ["--yes"] if command == "purge" else []

    assert_fails(letters_command(system, command, "--pending", "1", *yes), 1, "1 is a dead letter, not a pending event")
    if command != "replay":
        assert_fails(letters_command(system, command, "2", *yes), 1, "2 is a pending event, not a dead letter")
        assert len(listed(system, "--pending")) == 1
    assert len(listed(system)) == 1


@pytest.mark.parametrize("command", READERS + WRITERS, ids=" ".join)
@pytest.mark.parametrize("of", ["file", "folder"])
def test_without_rights_the_error_names_the_user_that_has_them(outsider, command, of):
    prepared(outsider, letter(1))
    private = outsider.folder / "private"
    private.mkdir(0o700)
    if of == "folder":
        outsider.journal.rename(private / "journal.db")
        outsider.journal.symlink_to(private / "journal.db")  # as with DynamicUser=
    else:
        outsider.journal.chmod(0o600)

    done = as_nobody(outsider, *command)

    assert_fails(done, 1, str(outsider.journal), "rights of the user that runs vodpoller")


# --- list and show ----------------------------------------------------------------------------------------------------


def test_list_has_a_table_for_people_and_lines_for_programs(system):
    prepared(
        system,
        letter(1),
        letter(2, "", reason="no_route", event_type="FileDeleted", error="x" * 300),
        letter(3, dead=False, reason="sink_failed", error="timed out"),
    )

    table = letters_command(system, "list")
    assert (table.returncode, table.stderr) == (0, "")
    for phrase in ("NewFileUpload", "rejected", "HTTP status 422", "(none)", "FileDeleted", "…", "2 in all\n"):
        assert phrase in table.stdout
    assert "timed out" not in table.stdout
    assert max(map(len, table.stdout.splitlines())) <= 200

    first, second = listed(system)
    assert (first["id"], first["sink"], first["reason"], first["error"]) == (
        1,
        "archive",
        "rejected",
        "HTTP status 422",
    )
    assert (second["id"], second["sink"], second["error"]) == (2, "", "x" * 300)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", first["stored_at"])
    assert [row["error"] for row in listed(system, "--pending")] == ["timed out"]
    assert (first["state"], first["due_at"]) == ("dead", None)
    (row,) = listed(system, "--pending")
    assert (row["state"], row["due_at"]) == ("pending", row["stored_at"])


def test_the_list_shows_ids_of_tencent_and_the_next_try(system):
    prepared(
        system,
        letter(1, task_id="125-Snapshot-42e4"),
        letter(13996416126956185761, dead=False, reason="sink_failed", task_id="125-Snapshot-77", due_in_secs=600),
    )

    table = letters_command(system, "list").stdout
    assert "125-Snapshot-42e4" in table
    assert "next try" not in table
    table = letters_command(system, "list", "--pending").stdout
    assert "125-Snapshot-77" in table
    assert "13996416126956185761" in table
    (row,) = listed(system, "--pending")
    assert (row["file_id"], row["task_id"]) == ("13996416126956185761", "125-Snapshot-77")
    assert row["due_at"] > row["stored_at"]
    assert "next try" in table
    assert row["due_at"] in table


@pytest.mark.parametrize(
    ("args", "found"),
    [
        (["--sink", "hook"], [2]),
        (["--type", "*Complete"], [3]),
        (["--reason", "gave_up"], [2]),
        (["--since", "1h"], [1, 2, 3]),
        (["--since", "2001-01-01"], [1, 2, 3]),
        (["--since", "2999-01-01T00:00Z"], []),
        (["--sink", "archive", "--type", "NewFileUpload"], [1]),
        (["--file-id", "3"], [3]),
        (["--file-id", "2", "--sink", "archive"], []),
        (["--task-id", "125-t"], [2]),
        (["--task-id", "125"], []),
    ],
    ids=lambda value: " ".join(map(str, value)),
)
def test_list_takes_filters(system, args, found):
    prepared(
        system,
        letter(1),
        letter(2, "hook", reason="gave_up", task_id="125-t"),
        letter(3, event_type="TranscodeComplete"),
    )

    assert [row["id"] for row in listed(system, *args)] == found
    exported = letters_command(system, "export", *args).stdout.splitlines()
    assert [json.loads(line)["id"] for line in exported] == found


def test_the_table_shows_its_limit(system):
    prepared(system, *(letter(number) for number in range(120)))

    assert "120 in all, 100 shown (--limit)" in letters_command(system, "list").stdout
    assert "120 in all, 3 shown (--limit)" in letters_command(system, "list", "--limit", "3").stdout
    assert len(listed(system)) == 120


def test_a_narrow_terminal_cuts_nothing_off(system):
    prepared(system, letter(1, event_type="CreateSnapshotByTimeOffsetComplete"))
    leader, follower = os.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))

    with subprocess.Popen(
        [sys.executable, "-m", "vodpoller", "deadletters", "list", "-c", str(system.config_path)],
        stdout=follower,
        env=environment(TERM="dumb"),
    ) as process:
        process.wait(15)
    os.close(follower)
    output = os.read(leader, 65536).decode()
    os.close(leader)

    assert "…" not in output
    assert re.search(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", output)
    assert max(map(len, output.splitlines())) <= 80
    parts = [line.split("│")[4].strip() for line in output.splitlines() if line.startswith("│")]
    assert "".join(parts) == "CreateSnapshotByTimeOffsetComplete"


HOSTILE = "\x1b]52;c;aGk=\x07 \x9b2J \x1b[31m"


@pytest.mark.parametrize("command", [["list"], ["show", "1"], ["show", "2"], ["export"]], ids=" ".join)
def test_control_characters_of_an_event_do_not_reach_a_terminal(system, command):
    broken = replace(event(2), body=b"{" + HOSTILE.encode() + b"\n\x00\x1bc")
    prepared(
        system,
        letter(1, event_type=f"Evil{HOSTILE}", error=HOSTILE),
        Letter(event=broken, sink="", dead=True, reason="malformed", error=HOSTILE),
    )

    done = letters_command(system, *command)

    assert done.returncode == 0, done.stderr
    assert [c for c in done.stdout if not c.isprintable() and c != "\n"] == []
    if command[0] != "export":
        assert "\\u001b]52;c;aGk=\\u0007" in done.stdout


def test_an_empty_journal_has_an_empty_list(system):
    prepared(system)

    assert letters_command(system, "list").stdout == "0 in all\n"
    assert listed(system) == []


def test_a_closed_output_pipe_is_not_a_traceback(system):
    prepared(system, *(letter(number, error="x" * 500) for number in range(1000)))

    done = subprocess.run(
        [
            "bash",
            "-c",
            '"$0" -m vodpoller deadletters list --json -c "$1" | head -n 1',
            sys.executable,
            system.config_path,
        ],
        capture_output=True,
        text=True,
        check=True,
        env=environment(),
    )

    assert json.loads(done.stdout)["id"] == 1
    assert done.stderr == ""


def test_show_prints_the_body_unchanged(system):
    (body,) = prepared(system, letter(1))

    for_people = letters_command(system, "show", "1")
    assert for_people.returncode == 0
    assert for_people.stdout.endswith(f"\n\n{body.decode()}\n")
    assert re.search(r"^reason: +rejected$", for_people.stdout, re.MULTILINE)

    shown = json.loads(letters_command(system, "show", "1", "--json").stdout)
    assert shown == {**listed(system)[0], "body": body.decode()}


def test_show_finds_pending_events_too(system):
    (body,) = prepared(system, letter(1, dead=False, reason="sink_failed"))

    assert json.loads(letters_command(system, "show", "1", "--json").stdout)["body"] == body.decode()


def test_show_with_pending_finds_only_pending_events(system):
    prepared(system, letter(1), letter(2, dead=False, reason="sink_failed"))

    assert json.loads(letters_command(system, "show", "2", "--pending", "--json").stdout)["state"] == "pending"
    assert_fails(letters_command(system, "show", "1", "--pending"), 1, "the pending event 1 does not exist")


# --- export -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["utf-8", "gbk", "ascii"])
def test_export_has_reason_and_body_in_each_line_under_any_locale(system, encoding):
    exact = replace(event(1), body=b'{"FileId":52858907843634305432,"Rate":1.10,"Name":"\xf0\x9f\x98\x80"}')
    broken = replace(event(2), body=b'{"EventType": "\xff')
    prepared(
        system,
        Letter(event=exact, sink="archive", dead=True, reason="rejected", error="no \U0001f600"),
        Letter(event=broken, sink="", dead=True, reason="malformed", error="it is not JSON"),
        letter(3, dead=False, reason="sink_failed"),
    )

    done = letters_command(system, "export", PYTHONIOENCODING=encoding)

    assert (done.returncode, done.stderr) == (0, "")
    first, second = done.stdout.splitlines()
    assert '"body": {"FileId":52858907843634305432,"Rate":1.10,' in first
    row = json.loads(first)
    assert (row["reason"], row["error"], row["body"]["Name"]) == ("rejected", "no \U0001f600", "\U0001f600")
    assert "body_base64" not in row
    row = json.loads(second)
    assert (row["reason"], base64.b64decode(row["body_base64"])) == ("malformed", broken.body)
    assert "body" not in row
    assert [json.loads(line)["id"] for line in letters_command(system, "export", "--pending").stdout.splitlines()] == [
        3
    ]
    assert [json.loads(line)["id"] for line in letters_command(system, "export", "2").stdout.splitlines()] == [2]


# --- replay -----------------------------------------------------------------------------------------------------------


def test_replay_without_a_daemon_delivers_with_progress(system):
    bodies = prepared(system, *(letter(number) for number in range(30)))

    done = letters_command(system, "replay")

    assert done.returncode == 0, done.stderr
    assert done.stdout == "30 to be delivered again\n30 delivered\n"
    assert "100%" in done.stderr
    assert "pending.delivered" not in done.stderr
    assert_arrived_once(system, bodies)
    assert listed(system) == listed(system, "--pending") == []

    again = letters_command(system, "replay")
    assert (again.returncode, again.stdout) == (0, "0 to be delivered again\n")
    assert_arrived_once(system, bodies)


def test_replay_takes_ids_and_filters(system):
    bodies = prepared(system, *(letter(number) for number in range(4)), letter(9, event_type="FileDeleted"))

    assert letters_command(system, "replay", "2", "3").stdout == "2 to be delivered again\n2 delivered\n"
    assert letters_command(system, "replay", "--type", "File*").stdout == "1 to be delivered again\n1 delivered\n"

    assert_arrived_once(system, [bodies[1], bodies[2], bodies[4]])
    assert [row["id"] for row in listed(system)] == [1, 4]


def test_replay_reports_what_it_cannot_deliver_and_delivers_others(system):
    bodies = prepared(system, letter(1), letter(2, "gone"), letter(3, "", reason="malformed"))

    done = letters_command(system, "replay")

    assert_fails(done, 1, "2 cannot be delivered: unreadable, without a route, or of a sink that no longer exists")
    assert done.stdout == "1 to be delivered again\n1 delivered\n"
    assert_arrived_once(system, bodies[:1])
    assert [row["id"] for row in listed(system)] == [2, 3]


def test_replay_routes_unrouted_events_again(system):
    bodies = prepared(system, letter(1, "", reason="no_route", error="no route takes it"))

    assert letters_command(system, "replay").returncode == 0

    assert_arrived_once(system, bodies)
    assert listed(system) == []


def test_a_second_rejection_is_a_dead_letter_with_the_new_error(system, receiver):
    receiver.answer = Answer(status=422, body=b"no such customer")
    system.configure("http://127.0.0.1:9", sinks=hook_sink(receiver.url))
    store(system, *(letter(number, "hook", error="the first error") for number in range(3)))

    done = letters_command(system, "replay")

    assert_fails(done, 1, "3 are dead letters again")
    assert "0 delivered\n" in done.stdout
    assert [(row["reason"], row["attempts"]) for row in listed(system)] == [("rejected", 1)] * 3
    assert all("no such customer" in row["error"] for row in listed(system))


def test_an_event_that_fails_again_stays_pending_with_the_new_error(system):
    with HeldPort() as port:
        system.configure("http://127.0.0.1:9", sinks=hook_sink(port.url))
        store(system, letter(1, "hook", error="the first error"))

        done = letters_command(system, "replay")

    assert_fails(done, 1, "still pending: see `vodpoller deadletters list --pending`")
    assert listed(system) == []
    (row,) = listed(system, "--pending")
    assert row["attempts"] == 1
    assert "refused" in row["error"]


def test_replay_through_the_running_daemon(system):
    simulator = system.simulator()
    system.configure(simulator.url)
    bodies = store(system, *(letter(number) for number in range(50)))
    daemon = system.daemon()

    done = letters_command(system, "replay")

    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("50 to be delivered again\nThe running daemon delivers them")
    until(lambda: len(system.lines()) == 50)
    until(lambda: not listed(system, "--pending"))
    assert daemon.terminate()[0] == 0
    assert_arrived_once(system, bodies)


def test_a_replay_of_nothing_prints_only_that(system):
    simulator = system.simulator()
    system.configure(simulator.url)
    daemon = system.daemon()

    done = letters_command(system, "replay")

    assert (done.returncode, done.stdout) == (0, "0 to be delivered again\n")
    assert daemon.terminate()[0] == 0


@pytest.mark.parametrize("state", ["pending", "dead"])
def test_events_of_a_removed_sink_can_be_moved_to_another(system, state):
    options = ["--pending"] if state == "pending" else []
    given = [letter(number, "gone", dead=state == "dead") for number in range(3)]
    bodies = prepared(system, *given, letter(9, "gone", dead=state != "dead"))

    done = letters_command(system, "replay", *options, "--sink", "gone", "--to", "archive")

    assert done.stdout.startswith("3 to be delivered again\n3 delivered\n")
    assert_arrived_once(system, bodies[:3])
    assert len(listed(system)) + len(listed(system, "--pending")) == 1


def test_events_moved_beside_a_running_daemon_arrive_once(system, receiver):
    """The daemon is delivering to the old sink, which fails, while the events are moved."""
    simulator = system.simulator()
    receiver.answer = Answer(status=503)
    path = system.configure(simulator.url, sinks=system.archive_sink + hook_sink(receiver.url))
    bodies = store(system, *(letter(number, "hook", dead=False, reason="sink_failed") for number in range(200)))
    daemon = system.daemon()
    until(lambda: receiver.received)

    done = run_command("deadletters", "replay", "--pending", "--to", "archive", "-c", path)

    assert done.returncode == 0, done.stderr
    until(lambda: len(system.lines()) == 200)
    until(lambda: not listed(system, "--pending"))
    assert listed(system) == []
    assert daemon.terminate()[0] == 0
    assert_arrived_once(system, bodies)


@pytest.mark.long
def test_purge_of_pending_events_beside_a_running_daemon(system, receiver):
    simulator = system.simulator()
    receiver.answer = Answer(status=503)
    system.configure(simulator.url, sinks=system.archive_sink + hook_sink(receiver.url))
    store(system, *(letter(number, "hook", dead=False, reason="sink_failed") for number in range(200)))
    daemon = system.daemon()
    until(lambda: receiver.received)

    assert purge(system, "--yes", "--pending", "--sink", "hook").stdout == "200 deleted\n"

    receiver.answer = Answer()
    simulator.feed('{"EventType": "FileDeleted"}')
    until(simulator.all_confirmed)
    until(lambda: not listed(system, "--pending"), secs=40)
    assert listed(system) == []
    assert daemon.log("task.failed") == daemon.log("worker.failed") == []
    assert daemon.terminate()[0] == 0


# --- ten thousand -----------------------------------------------------------------------------------------------------


def many(system):
    """Store `MANY` dead letters of the file sink; returns their bodies."""
    return prepared(system, *(letter(number) for number in range(MANY)))


def start_replay(system, **options):
    return subprocess.Popen(
        [sys.executable, "-m", "vodpoller", "deadletters", "replay", "-c", str(system.config_path)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment(),
        **options,
    )


def peak_memory_kb(process):
    """The peak memory of a process so far; 0 if it has ended."""
    found = re.search(r"^VmHWM:\s+(\d+) kB", Path(f"/proc/{process.pid}/status").read_text(), re.MULTILINE)
    return int(found[1]) if found else 0


def watch(process, *, until_lines, system, secs=60):
    """Wait until the archive has a number of lines; returns the peak memory of the process."""
    memory = [0]

    def has_them():
        memory.append(peak_memory_kb(process))
        return process.poll() is not None or len(system.lines()) >= until_lines

    until(has_them, secs=secs, every_secs=0.01)
    return max(memory)


@pytest.mark.long
def test_ten_thousand_dead_letters_replayed_across_kills_arrive_once(system):
    bodies = many(system)

    for part in (1, 3000, 6000):
        with start_replay(system) as process:
            watch(process, until_lines=part, system=system)
            assert process.poll() is None, "the replay ended before it could be killed"
            process.kill()
    survived = len(system.lines())
    assert 6000 <= survived < MANY
    with start_replay(system) as process:
        memory_kb = watch(process, until_lines=MANY, system=system)
        output, _ = process.communicate(timeout=30)

    assert process.returncode == 0, output
    assert 0 < memory_kb < MEMORY_MAX_KB
    assert_arrived_once(system, bodies)
    assert listed(system) == listed(system, "--pending") == []


@pytest.mark.long
def test_ten_thousand_dead_letters_survive_a_kill_during_marking(system):
    bodies = many(system)

    with start_replay(system) as process, closing(sqlite3.connect(system.journal)) as db:
        until(lambda: db.execute("SELECT count(*) FROM letters WHERE state = 'pending'").fetchone()[0], every_secs=0)
        process.kill()
        process.wait()
        (marked,) = db.execute("SELECT count(*) FROM letters WHERE state = 'pending'").fetchone()
    assert 0 < marked < MANY
    assert system.lines() == []

    done = letters_command(system, "replay", timeout_secs=60)

    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{MANY - marked:,} to be delivered again\n{MANY:,} delivered\n"
    assert_arrived_once(system, bodies)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.long
def test_an_interrupted_replay_ends_cleanly_and_can_be_continued(system, number):
    bodies = many(system)

    with start_replay(system) as process:
        watch(process, until_lines=500, system=system)
        process.send_signal(number)
        output, _ = process.communicate(timeout=30)
    left = MANY - len(system.lines())

    assert process.returncode == 1, output
    assert "Traceback" not in output
    assert "still pending" in output
    assert 0 < left <= MANY - 500
    again = letters_command(system, "replay", timeout_secs=60)
    assert again.returncode == 0, again.stderr
    assert again.stdout == f"0 to be delivered again\n{left:,} delivered\n"
    assert_arrived_once(system, bodies)


@pytest.mark.long
def test_a_daemon_replays_ten_thousand_dead_letters_across_a_kill(system):
    simulator = system.simulator()
    system.configure(simulator.url)
    bodies = store(system, *(letter(number) for number in range(MANY)))
    daemon = system.daemon()

    done = letters_command(system, "replay", timeout_secs=60)
    assert done.returncode == 0, done.stderr
    until(lambda: len(system.lines()) >= 1000)
    daemon.kill()
    assert len(system.lines()) < MANY
    daemon = system.daemon()
    memory_kb = watch(daemon.process, until_lines=MANY, system=system, secs=90)
    until(lambda: not listed(system, "--pending"))

    assert 0 < max(memory_kb, peak_memory_kb(daemon.process)) < MEMORY_MAX_KB
    assert daemon.terminate()[0] == 0
    assert_arrived_once(system, bodies)


def test_dead_letters_of_a_script_go_to_the_file_that_replaces_it(system):
    """End to end: pulled, rejected, dead; then another sink has the name."""
    simulator = system.simulator(events=30)
    script = '[sinks.archive]\ntype = "exec"\ncommand = ["false"]\nbreaker_failures = 1000\n'
    system.configure(simulator.url, sinks=script)
    daemon = system.daemon()
    until(lambda: len(listed(system)) == 30, secs=30)
    assert daemon.terminate()[0] == 0
    assert {(row["sink"], row["reason"]) for row in listed(system)} == {("archive", "rejected")}

    system.configure(simulator.url)
    done = letters_command(system, "replay")

    assert done.returncode == 0, done.stderr
    fed = [row["body"] for row in simulator.ledger(bodies=True)]
    assert sorted(map(canonical, system.lines())) == sorted(map(canonical, fed))


# --- purge ------------------------------------------------------------------------------------------------------------


def purge(system, *args, answer=""):
    return run_command("deadletters", "purge", "-c", system.config_path, *args, answer=answer)


@pytest.mark.parametrize("answer", ["n\n", "\n", ""])
def test_purge_asks_and_deletes_nothing_without_a_yes(system, answer):
    prepared(system, letter(1), letter(2))

    done = purge(system, answer=answer)

    assert_fails(done, 1, "Aborted!")
    assert "Delete 2 dead letters permanently?" in done.stdout
    assert len(listed(system)) == 2


@pytest.mark.parametrize(("args", "answer"), [([], "y\n"), (["--yes"], "")])
def test_purge_deletes_the_selected_dead_letters(system, args, answer):
    prepared(system, letter(1), letter(2, "hook"), letter(3, dead=False, reason="sink_failed"))

    done = purge(system, "--sink", "archive", *args, answer=answer)

    assert done.returncode == 0
    assert done.stdout.endswith("1 deleted\n")
    assert [row["id"] for row in listed(system)] == [2]
    assert [row["id"] for row in listed(system, "--pending")] == [3]


def test_purge_deletes_pending_events_with_the_option_pending(system):
    prepared(
        system,
        letter(1),
        letter(2, "gone", dead=False, reason="sink_failed"),
        letter(3, dead=False, reason="sink_failed"),
    )

    done = purge(system, "--pending", "--sink", "gone", answer="y\n")

    assert "Delete 1 pending events permanently?" in done.stdout
    assert done.stdout.endswith("1 deleted\n")
    assert [row["id"] for row in listed(system)] == [1]
    assert [row["id"] for row in listed(system, "--pending")] == [3]


def test_purge_does_not_ask_if_there_is_nothing(system):
    prepared(system)

    done = purge(system)

    assert (done.returncode, done.stdout) == (0, "0 deleted\n")


def test_dead_letters_stored_while_purge_asks_are_kept(system):
    prepared(system, letter(1))

    with subprocess.Popen(
        [sys.executable, "-u", "-m", "vodpoller", "deadletters", "purge", "-c", str(system.config_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment(),
    ) as process:
        assert select.select([process.stdout], [], [], 15)[0]
        store(system, letter(2))
        output, _ = process.communicate(b"y\n", timeout=15)

    assert output.endswith(b"1 deleted\n")
    assert [row["id"] for row in listed(system)] == [2]


def test_purge_beside_a_running_daemon(system):
    simulator = system.simulator()
    system.configure(simulator.url)
    store(system, *(letter(number) for number in range(500)))
    daemon = system.daemon()

    assert purge(system, "--yes").stdout == "500 deleted\n"

    simulator.feed('{"EventType": "FileDeleted"}')
    until(simulator.all_confirmed)
    assert daemon.problems() == []
    assert daemon.terminate()[0] == 0


# --- status -----------------------------------------------------------------------------------------------------------


def status_of(system, *args):
    done = run_command("status", "--json", *args, "-c", system.config_path)
    found = json.loads(done.stdout)
    assert (done.returncode, done.stderr) == (1 if found["problems"] else 0, "")
    return found


def test_status_of_an_empty_journal(system):
    prepared(system)

    done = run_command("status", "-c", system.config_path)

    assert done.returncode == 1
    assert done.stdout.startswith("PROBLEM daemon: no daemon runs with this journal\n")
    assert "last pull: never\n" in done.stdout
    assert "last confirm never\n" in done.stdout
    assert "Nothing is stored" in done.stdout
    assert status_of(system)["stored"] == []


def test_status_counts_stored_events_by_sink(system):
    prepared(system, letter(1), letter(2, "", reason="no_route"), letter(3, dead=False, reason="sink_failed"))

    status = status_of(system)
    assert [(row["sink"], row["state"], row["events"]) for row in status["stored"]] == [
        ("archive", "pending", 1),
        ("", "dead", 1),
        ("archive", "dead", 1),
    ]
    table = run_command("status", "-c", system.config_path).stdout
    assert re.search(r"archive +│ pending +│ 1 +│ \d{4}-", table)
    assert re.search(r"\(none\) +│ dead +│ 1 ", table)


def test_status_shows_if_a_daemon_runs_and_when_vod_last_answered(system):
    simulator = system.simulator(events=3)
    system.configure(simulator.url)
    daemon = system.daemon()
    until(simulator.all_confirmed)

    status = status_of(system)
    assert (status["running"], status["pid"]) == (True, daemon.process.pid)
    assert status["sources"][0]["last_pull_at"] <= status["at"]
    assert f", process {daemon.process.pid}\n" in run_command("status", "-c", system.config_path).stdout

    assert daemon.terminate()[0] == 0
    status = status_of(system)
    assert (status["running"], status["pid"]) == (False, None)
    assert status["started_at"] <= status["last_pull_at"]
    assert status["started_at"] <= status["journal"]["last_confirm_at"]


@pytest.mark.parametrize("args", [["status"], ["status", "--json"]], ids=" ".join)
def test_another_user_may_not_ask_for_the_status(outsider, args):
    simulator = outsider.simulator()
    outsider.configure(simulator.url)
    daemon = outsider.daemon()

    assert_fails(as_nobody(outsider, *args), 1, f"{outsider.journal}.sock: only root and the user that runs vodpoller")
    assert daemon.terminate()[0] == 0


# --- once -------------------------------------------------------------------------------------------------------------


def test_once_delivers_all_waiting_events_and_ends_with_0(system):
    simulator = system.simulator(events=50)
    path = system.configure(simulator.url)

    done = run_command("once", "-c", path)

    assert done.returncode == 0, done.stderr
    assert simulator.all_confirmed()
    assert len(system.lines()) == 50
    assert run_command("once", "-c", path).returncode == 0


def test_once_ends_with_1_until_a_dead_sink_is_back(system, receiver):
    receiver.answer = Answer(status=503)
    simulator = system.simulator(events=20)
    path = system.configure(simulator.url, sinks=system.archive_sink + hook_sink(receiver.url))

    assert run_command("once", "-c", path).returncode == 1
    assert simulator.all_confirmed()  # the journal has them
    assert len(system.lines()) == 20
    assert len(listed(system, "--pending")) == 20

    receiver.answer = Answer()
    with closing(sqlite3.connect(system.journal)) as db, db:
        db.execute("UPDATE letters SET due_at = 0")  # as if the back-off were over
    done = run_command("once", "-c", path)

    assert done.returncode == 0, done.stderr
    assert {request.headers["webhook-id"] for request in receiver.accepted} == {
        row["webhook-id"] for row in (request.headers for request in receiver.received)
    }
    assert len(receiver.accepted) == 20
    assert len(system.lines()) == 20


def test_once_ends_in_time_if_events_never_end(system):
    simulator = system.simulator(events=100, rate=200)
    path = system.configure(simulator.url)

    done = run_command("once", "--max-secs", "1", "-c", path)

    assert done.returncode == 1  # the queue was not emptied
    assert len(system.lines()) > 0
    stats = simulator.stats()
    assert len(system.lines()) == stats["confirmed"]


def test_once_says_why_vod_cannot_be_reached(system):
    with HeldPort() as port:
        path = system.configure(port.url)
        done = run_command("once", "-c", path)

    assert_fails(done, 1, "pull.failed", "refused")


def test_once_with_a_wrong_key_does_not_try_for_long(system):
    simulator = system.simulator(secret_id=SECRET_ID, secret_key="another", events=1)
    path = system.configure(simulator.url)

    done = run_command("once", "-c", path)

    assert_fails(done, 1, "AuthFailure.SignatureFailure")
    assert simulator.requests == 1


def test_once_beside_a_running_daemon_says_that_there_is_one(system):
    simulator = system.simulator()
    path = system.configure(simulator.url)
    daemon = system.daemon()

    assert_fails(run_command("once", "-c", path), 1, "already running")

    assert daemon.terminate()[0] == 0


@pytest.mark.parametrize("value", ["0", "-1", "soon"])
def test_once_refuses_a_max_secs_below_one(system, value):
    path = system.configure("http://127.0.0.1:9")

    assert_fails(run_command("once", "--max-secs", value, "-c", path), 2, "--max-secs")


# --- files that root creates ------------------------------------------------------------------------------------------


@pytest.fixture
def outsider():
    """A system in a folder that another user may enter; pytest's own folders forbid that."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        with running_system(Path(folder)) as running:
            yield running


def as_nobody(system, *args, key_mode=0o644, **env):
    if os.geteuid() != 0:
        cannot_run("only root can act as another user")
    system.config_path.chmod(0o644)
    system.key_path.chmod(key_mode)
    return run_command(*args, "-c", system.config_path, module="tests.as_nobody", **env)


@pytest.mark.parametrize("command", ["run", "check"])
def test_a_secret_that_the_user_may_not_read_ends_with_78(outsider, command):
    path = outsider.configure("http://127.0.0.1:9")
    if os.geteuid() == 0:
        done = as_nobody(outsider, command, key_mode=0o600)
    else:
        outsider.key_path.chmod(0)
        done = run_command(command, "-c", path)
    assert_fails(done, 78, str(outsider.key_path), "Permission denied")
    assert "Traceback" not in done.stderr


def owners(folder):
    return {path.name: (path.stat().st_uid, path.stat().st_gid) for path in folder.iterdir()}


@contextmanager
def state_folder(system):
    """A state folder of the service's user, as systemd makes it, for the journal and the archive."""
    folder = system.folder / "state"
    folder.mkdir(0o755)
    os.chown(folder, NOBODY, NOBODY)
    system.journal, system.archive = folder / "journal.db", folder / "events.jsonl"
    yield folder


@pytest.mark.parametrize("command", ["once", "replay"])
def test_files_that_root_makes_belong_to_the_owner_of_the_folder(outsider, command):
    simulator = outsider.simulator(events=5)
    with state_folder(outsider) as folder:
        outsider.configure(simulator.url)
        if command == "replay":
            store(outsider, letter(1))
            done = letters_command(outsider, "replay")
        else:
            done = run_command("once", "-c", outsider.config_path)

        assert done.returncode == 0, done.stderr
        assert {"journal.db", "journal.db.lock", "events.jsonl", "events.jsonl.lock"} <= set(owners(folder))
        assert set(owners(folder).values()) == {(NOBODY, NOBODY)}
        simulator.feed('{"EventType": "FileDeleted"}')
        assert as_nobody(outsider, "once").returncode == 0


def test_the_copy_of_an_older_journal_belongs_to_the_owner_too(outsider):
    simulator = outsider.simulator()
    with state_folder(outsider) as folder:
        outsider.configure(simulator.url)
        assert run_command("once", "-c", outsider.config_path).returncode == 0
        with closing(sqlite3.connect(outsider.journal)) as db, db:
            db.execute(f"PRAGMA user_version = {SCHEMA_VERSION - 1}")
        assert run_command("once", "-c", outsider.config_path).returncode == 0
        assert owners(folder)[f"journal.db.v{SCHEMA_VERSION - 1}"] == (NOBODY, NOBODY)


def test_files_of_a_killed_root_process_belong_to_the_owner_too(outsider):
    simulator = outsider.simulator(rate=50)
    with state_folder(outsider) as folder:
        path = outsider.configure(simulator.url)
        with subprocess.Popen(
            [sys.executable, "-m", "vodpoller", "once", "-c", str(path)], stderr=subprocess.DEVNULL, env=environment()
        ) as process:
            until(lambda: len(outsider.lines()) > 5)
            process.kill()

        assert (folder / "journal.db-wal").exists()
        assert set(owners(folder).values()) == {(NOBODY, NOBODY)}
        done = as_nobody(outsider, "once", "--max-secs", "1")
        assert "daemon.stopped" in done.stderr
        assert "journal.failed" not in done.stderr
        assert "Traceback" not in done.stderr


def test_commands_by_root_leave_no_file_the_daemon_cannot_write(outsider):
    with state_folder(outsider) as folder:
        outsider.configure("http://127.0.0.1:9")
        store(outsider, letter(1))
        for path in folder.iterdir():
            os.chown(path, NOBODY, NOBODY)

        for command in (*READERS, ["deadletters", "purge", "--yes"]):
            done = run_command(*command, "-c", outsider.config_path)
            assert done.returncode == (1 if command[0] == "status" else 0)  # no daemon runs

        assert set(owners(folder).values()) == {(NOBODY, NOBODY)}


# --- check --connect --------------------------------------------------------------------------------------------------


def findings(done):
    """The rows of the table: verdict and text, by what was checked."""
    assert "Traceback" not in done.stderr
    assert SECRET_KEY not in done.stdout + done.stderr
    found = {}
    what = ""
    for line in done.stdout.splitlines():
        if line.startswith("│"):
            cells = [cell.strip() for cell in line.strip("│").split("│")]
            what = cells[0] or what
            verdict, text = found.get(what, ("", ""))
            found[what] = (verdict or cells[1], f"{text} {cells[2]}".strip())
    return found


def connect(system, code, **env):
    done = run_command("check", "--connect", "-c", system.config_path, **env)
    assert done.returncode == code, done.stdout + done.stderr
    found = findings(done)
    assert ("PROBLEM" in [verdict for verdict, _ in found.values()]) == (code == 1)
    return found


def test_check_connect_consumes_and_writes_nothing_if_all_is_well(system, receiver):
    simulator = system.simulator(events=5, secret_id=SECRET_ID, secret_key=SECRET_KEY)
    script = '[sinks.script]\ntype = "exec"\ncommand = ["true"]\n'
    system.configure(simulator.url, sinks=system.archive_sink + hook_sink(receiver.url) + script)
    store(system, letter(1))
    before, folder = simulator.stats(), tree(system.folder)

    found = connect(system, 0)

    checked = ["source main", "callback of main", "queue of main", "clock"]
    assert {*found} == {
        *checked,
        "sink archive",
        "sink hook",
        "sink script",
        "journal",
        "files",
        f"disk of {system.folder}",
    }
    assert {what: verdict for what, (verdict, _) in found.items() if verdict != "OK"} == {
        "queue of main": "note",
        "callback of main": "note",
    }
    assert "5 events wait at VOD" in found["queue of main"][1]
    assert "RequestId" in found["source main"][1]
    after = simulator.stats()
    assert (after["pulls"], after["confirmed"], after["visible"]) == (0, 0, before["visible"])
    assert set(after["requests"]) == {"ConfirmEvents", "DescribeEventConfig", "DescribeEventsState"}
    assert tree(system.folder) == folder
    assert receiver.received == []


def test_check_connect_works_beside_a_running_daemon(system):
    simulator = system.simulator()
    system.configure(simulator.url)
    daemon = system.daemon()

    done = run_command("check", "--connect", "-c", system.config_path)
    found = findings(done)

    assert found["source main"][0] == found["journal"][0] == "OK"
    assert simulator.feed('{"EventType": "FileDeleted"}') == 1
    until(simulator.all_confirmed)
    assert daemon.terminate()[0] == 0


@pytest.mark.parametrize(("secret_key", "warns"), [("y", True), ("1234567", True), ("12345678", False)])
def test_a_secret_too_short_to_be_hidden_is_a_warning(system, secret_key, warns):
    path = system.configure("http://127.0.0.1:9", secret_key=secret_key)

    done = run_command("check", "-c", path)

    assert done.returncode == 0
    assert (f"{path}: warning: credentials.secret_key: it is too short" in done.stderr) is warns


def test_a_wrong_key_and_a_wrong_id_are_distinguished(system):
    simulator = system.simulator(secret_id=SECRET_ID, secret_key="another")
    system.configure(simulator.url)

    verdict, text = connect(system, 1)["source main"]
    assert verdict == "PROBLEM"
    assert "AuthFailure.SignatureFailure" in text
    assert "RequestId" in text

    simulator.control(secret_id="AKIDanother")
    assert "AuthFailure.SecretIdNotFound" in connect(system, 1)["source main"][1]


def test_a_key_without_rights_is_reported_with_the_rights_it_needs(system):
    refusal = {
        "Error": {"Code": "UnauthorizedOperation", "Message": "you may not (vod:ConfirmEvents)"},
        "RequestId": "of-the-refusal",
    }
    vod = Receiver()
    vod.answer = Answer(status=200, body=json.dumps({"Response": refusal}).encode())
    with running_receiver(vod):
        system.configure(f"http://127.0.0.1:{vod.server_port}")
        verdict, text = connect(system, 1)["source main"]

    assert verdict == "PROBLEM"
    for phrase in ("UnauthorizedOperation", "vod:ConfirmEvents", "RequestId of-the-refusal"):
        assert phrase in text


def test_an_unknown_sub_app_id_is_reported(system):
    simulator = system.simulator(sub_app_id=1500000001)
    system.configure(simulator.url, source='unrouted = "confirm"\nsub_app_id = 42')

    verdict, text = connect(system, 1)["source main"]

    assert verdict == "PROBLEM"
    assert "sub_app_id" in text


@pytest.mark.parametrize(("skew_secs", "side"), [(7200, "behind"), (-7200, "ahead of")])
def test_a_wrong_clock_is_measured_and_does_not_invalidate_the_key(system, skew_secs, side):
    simulator = system.simulator(secret_id=SECRET_ID, secret_key=SECRET_KEY, clock_skew_secs=skew_secs)
    system.configure(simulator.url)

    found = connect(system, 0)

    assert found["source main"][0] == "OK"
    verdict, text = found["clock"]
    assert verdict == "warning"
    assert abs(int(re.search(rf"is (\d+) s {side} VOD's", text)[1]) - 7200) <= 2
    assert "NTP" in text


def test_an_unreachable_endpoint_is_reported(system):
    with HeldPort() as port:
        system.configure(port.url)
        found = connect(system, 1)

    assert (found["source main"][0], found["clock"][0]) == ("PROBLEM", "warning")
    assert not {"callback of main", "queue of main"} & {*found}
    assert "is api.endpoint right, and this machine online?" in found["source main"][1]
    assert "VOD did not answer" in found["clock"][1]
    assert found["sink archive"][0] == found["journal"][0] == "OK"


def test_unreachable_sinks_are_each_reported(system):
    simulator = system.simulator()
    system.archive.mkdir()
    with HeldPort() as port:
        script = '[sinks.script]\ntype = "exec"\ncommand = ["no-such-program"]\n'
        system.configure(simulator.url, sinks=system.archive_sink + hook_sink(port.url) + script)
        found = connect(system, 1)

    assert [found[f"sink {name}"][0] for name in ("archive", "hook", "script")] == ["PROBLEM"] * 3
    assert "give the path of a regular file" in found["sink archive"][1]
    assert "refused" in found["sink hook"][1]
    assert "no-such-program" in found["sink script"][1]
    assert found["source main"][0] == found["journal"][0] == "OK"


@pytest.mark.parametrize(("state", "option"), [("pending", "--pending "), ("dead", "")])
def test_stored_events_of_a_removed_sink_are_reported_with_commands(system, state, option):
    simulator = system.simulator()
    system.configure(simulator.url)
    store(
        system,
        letter(1, "gone", dead=state == "dead"),
        letter(2, dead=state == "dead"),
        letter(3, "", reason="no_route"),
    )

    verdict, text = connect(system, 1 if state == "pending" else 0)["stored events"]

    assert verdict == ("PROBLEM" if state == "pending" else "warning")
    assert text.startswith("1 ")
    assert f"vodpoller deadletters replay {option}--sink gone --to SINK" in text
    assert f"vodpoller deadletters purge {option}--sink gone" in text


@pytest.mark.parametrize("fault", ["corrupt", "of a later version", "a device"])
def test_check_connect_reports_a_journal_that_cannot_be_used(system, fault):
    simulator = system.simulator()
    if fault == "a device":
        system.journal = Path("/dev/null")
    system.configure(simulator.url)
    if fault == "corrupt":
        system.journal.write_bytes(b"this is not a database" * 1000)
    elif fault == "of a later version":
        store(system, letter(1))
        with closing(sqlite3.connect(system.journal)) as db:
            db.execute("PRAGMA user_version = 99")

    found = connect(system, 1)

    expected = {"corrupt": ".recover", "of a later version": "version 99", "a device": "this is a device"}[fault]
    assert [verdict for verdict, text in found.values() if expected in text] == ["PROBLEM"] * (
        2 if fault == "a device" else 1
    )


def test_places_that_this_user_may_not_write_to_are_named(outsider):
    simulator = outsider.simulator()
    outsider.configure(simulator.url)
    folder = tree(outsider.folder)

    done = as_nobody(outsider, "check", "--connect")

    found = findings(done)
    assert done.returncode == 1
    assert found["source main"][0] == "OK"
    assert found["sink archive"][0] == found["journal"][0] == "PROBLEM"
    assert "the user that runs vodpoller needs the right to write there" in found["sink archive"][1]
    assert f"{outsider.folder} cannot be written by this user" in found["journal"][1]
    assert tree(outsider.folder) == folder


@pytest.mark.parametrize("place", ["in a folder that may not be entered", "read-only", "in a folder that is read-only"])
def test_a_journal_that_this_user_may_not_write_to_is_named(outsider, place):
    simulator = outsider.simulator()
    with state_folder(outsider) as folder:
        outsider.configure(simulator.url)
        store(outsider, letter(1))
        os.chown(outsider.journal, *((0, 0) if place == "read-only" else (NOBODY, NOBODY)))
        if place != "read-only":
            os.chown(folder, 0, 0)
        if place == "in a folder that may not be entered":
            folder.chmod(0o700)

        done = as_nobody(outsider, "check", "--connect")

        assert done.returncode == 1
        verdict, text = findings(done)["journal"]
        assert verdict == "PROBLEM"
        assert str(outsider.journal if place == "read-only" else folder) in text


# --- schema and completion --------------------------------------------------------------------------------------------


KINDS = {"object": dict, "array": list, "string": str, "boolean": bool, "integer": int, "number": (int, float)}


def problems_of(value, schema, whole, place=""):
    """The errors of a value, for the part of JSON Schema that the configuration's schema uses."""
    if "$ref" in schema:
        return problems_of(value, whole["$defs"][schema["$ref"].removeprefix("#/$defs/")], whole, place)
    found = []
    for part in (*schema.get("allOf", ()), *([schema] if "if" in schema else ())):
        branch = "else" if problems_of(value, part["if"], whole, place) else "then"
        found += problems_of(value, part.get(branch, {}), whole, place)
    if "anyOf" in schema and all(problems_of(value, choice, whole, place) for choice in schema["anyOf"]):
        found.append(f"{place}: none of the choices")
    if "const" in schema and value != schema["const"]:
        found.append(f"{place}: not {schema['const']!r}")
    if "enum" in schema and value not in schema["enum"]:
        found.append(f"{place}: not of {schema['enum']}")
    if "type" in schema and not isinstance(value, KINDS.get(schema["type"], type(None))):
        found.append(f"{place}: not of type {schema['type']}")
    return found + problems_inside(value, schema, whole, place)


def problems_inside(value, schema, whole, place):
    found = []
    if isinstance(value, dict):
        found += [f"{place}: lacks {name}" for name in schema.get("required", ()) if name not in value]
        for name, inner in value.items():
            known = schema.get("properties", {}).get(name, schema.get("additionalProperties", {}))
            if known is False:
                found.append(f"{place}.{name}: unknown")
            else:
                found += problems_of(inner, known, whole, f"{place}.{name}")
    if isinstance(value, list):
        for index, inner in enumerate(value):
            found += problems_of(inner, schema.get("items", {}), whole, f"{place}[{index}]")
    return found


@pytest.fixture(scope="module")
def schema():
    done = run_command("schema")
    assert (done.returncode, done.stderr) == (0, "")
    return json.loads(done.stdout)


def uncommented(text):
    """The example with all commented settings switched on."""
    return re.sub(r"^# (?=\[|[a-z_]+ = )", "", text, flags=re.MULTILINE)


@pytest.mark.parametrize("change", [str, uncommented], ids=["as it stands", "with everything switched on"])
def test_the_example_is_valid_by_the_schema(schema, change):
    example = tomllib.loads(change((ROOT / "config.example.toml").read_text()))

    assert problems_of(example, schema, schema) == []


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ('name = "main"', 'nam = "main"'),
        ('name = "main"', "name = 5"),
        ('unrouted = "dead_letter"', 'unrouted = "drop"'),
        ('name = "main"', 'name = "main"\ntype = "callback"'),
        ('name = "main"', 'name = "main"\ntype = "callbacks"'),
        ('type = "file"', 'type = "fiel"'),
        ('path = "/var/lib/vodpoller/events.jsonl"', ""),
        ("[journal]", "[jurnal]"),
    ],
)
def test_mistakes_are_invalid_by_the_schema_too(schema, right, wrong):
    text = (ROOT / "config.example.toml").read_text()
    assert right in text

    assert problems_of(tomllib.loads(text.replace(right, wrong, 1)), schema, schema)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_each_shell_gets_its_completion(shell):
    done = subprocess.run(
        [sys.executable, "-c", "from vodpoller.cli.app import main; main(prog_name='vodpoller')"],
        capture_output=True,
        text=True,
        check=False,
        env=environment(_VODPOLLER_COMPLETE=f"{shell}_source"),
    )

    assert done.returncode == 0, done.stderr
    assert "_vodpoller_completion" in done.stdout
    assert f"_VODPOLLER_COMPLETE={shell}_complete" in done.stdout


@pytest.mark.long
def test_completion_knows_commands_and_options():
    def completed(words):
        done = subprocess.run(
            [sys.executable, "-c", "from vodpoller.cli.app import main; main(prog_name='vodpoller')"],
            capture_output=True,
            text=True,
            check=True,
            env=environment(
                _VODPOLLER_COMPLETE="bash_complete", COMP_WORDS=words, COMP_CWORD=str(len(words.split(" ")) - 1)
            ),
        )
        return {line.partition(",")[2] for line in done.stdout.splitlines()}

    assert {"list", "show", "replay", "purge", "export"} == completed("vodpoller deadletters ")
    assert "deadletters" in completed("vodpoller d")
    assert {"--since", "--sink"} <= completed("vodpoller deadletters list --s")
    assert {"rejected", "gave_up"} <= completed("vodpoller deadletters list --reason ")


# --- warnings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("event_type", ["CreateSnapshotByTimeOffsetCompleted", "FileUploadEvent"])
def test_check_warns_of_unknown_types_and_fails_with_strict(system, event_type):
    path = system.configure("http://127.0.0.1:9")
    good = run_command("check", "--strict", "-c", path)
    assert (good.returncode, good.stderr) == (0, "")

    path.write_text(path.read_text().replace("[[routes]]", f'[[routes]]\nevent_types = ["{event_type}"]'))
    lenient, strict = run_command("check", "-c", path), run_command("check", "--strict", "-c", path)

    assert (lenient.returncode, strict.returncode) == (0, EX_CONFIG)
    for done in (lenient, strict):
        assert f"{path}: valid" in done.stdout
        (line,) = done.stderr.splitlines()
        assert re.match(rf'{path}: warning: routes\.\w+\.event_types: "{event_type}" matches no event type', line)


@pytest.mark.parametrize("command", ["run", "once"])
def test_warnings_are_logged_at_the_start(system, command):
    simulator = system.simulator(poll_secs=0.1)
    path = system.configure(simulator.url)
    path.write_text(path.read_text().replace("[[routes]]", '[[routes]]\nevent_types = ["FileDelete"]'))

    if command == "once":
        lines = [json.loads(line) for line in run_command("once", "-c", path).stderr.splitlines()]
    else:
        lines = system.daemon().log()

    (warning,) = [line for line in lines if line["event"] == "config.warning"]
    assert warning["level"] == "warning"
    assert 'did you mean "FileDeleted"?' in warning["message"]


# --- addresses in the output of check ---------------------------------------------------------------------------------


def test_check_shows_where_events_go_and_where_the_key_is(system, tmp_path):
    sinks = (
        '[sinks.hook]\ntype = "webhook"\nurl = "https://app.example:8443/secret-path?token=hunter2"\n'
        '[sinks.script]\ntype = "exec"\ncommand = ["/bin/true", "--quiet"]\n'
        f'[sinks.images]\ntype = "download"\nhosts = ["*"]\npath = "{tmp_path}/{{file_id}}/{{index}}"\n'
    )
    path = system.configure("http://127.0.0.1:9", sinks=system.archive_sink + sinks)
    done = run_command("check", "-c", path)
    assert done.returncode == 0
    assert f"  sink archive: file, {system.archive}\n" in done.stdout
    assert "  sink hook: webhook, app.example:8443\n" in done.stdout
    assert "  sink script: exec, /bin/true\n" in done.stdout
    assert f"  sink images: download, {tmp_path}/{{file_id}}/{{index}}\n" in done.stdout
    key = f"secret_id from the configuration, secret_key from {system.key_path}"
    assert f"  key: {key}; after a change of it, restart the daemon\n" in done.stdout
    assert "hunter2" not in done.stdout


def test_check_warns_of_a_lease_beyond_vod_s(system):
    path = system.configure("https://vod.tencentcloudapi.com", lease_secs=60)
    lenient, strict = run_command("check", "-c", path), run_command("check", "--strict", "-c", path)
    assert (lenient.returncode, strict.returncode) == (0, EX_CONFIG)
    assert f"{path}: warning: api.lease_secs: 60 is more than the 30 s" in lenient.stderr


@pytest.mark.parametrize("command", [["check"], ["run"], ["check", "--connect"]])
@pytest.mark.parametrize("place", ["/dev/stdout", "/dev/stderr", "pipe", "folder"])
def test_a_sink_path_that_is_not_a_file_ends_with_78(system, tmp_path, command, place):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    path = system.configure("http://127.0.0.1:9")
    full = place if place.startswith("/") else str(tmp_path / place)
    path.write_text(path.read_text().replace(str(system.archive), full))
    done = run_command(*command, "-c", path)
    assert "Traceback" not in done.stderr + done.stdout
    if place.startswith("/"):
        assert done.returncode == EX_CONFIG
        assert 'write type = "stdout"' in done.stderr
    elif command == ["run"]:
        assert done.returncode == EX_CONFIG
        assert re.search("named pipe|not of a folder", done.stderr)
    elif command == ["check"]:
        assert done.returncode == 0
    else:
        assert done.returncode == 1
        assert "not a regular file" in done.stdout
    assert not Path(f"{full}.lock").exists()
