"""The command line as a process: the output of each command, its stream, and its exit code."""

import json
import re
import signal
import subprocess
import sys
import time

import pytest

from tests.polling import until
from tests.processes import SECRET_KEY, HeldPort, environment, run_command
from vodpoller import __version__
from vodpoller.cli.app import main
from vodpoller.cli.deadletters import deadletters
from vodpoller.cli.lazy import LazyCommand

EX_CONFIG = 78


def assert_fails(done, code, *phrases):
    assert done.returncode == code, done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert SECRET_KEY not in done.stderr
    for phrase in phrases:
        assert phrase in done.stderr


# --- wrong configurations ---------------------------------------------------------------------------------------------

MISTAKES = {
    "no TOML": ("[api]", "[api", "line 1"),
    "unknown key": (
        "lease_secs",
        "leese_secs",
        "api.leese_secs: this key does not exist here (did you mean lease_secs?)",
    ),
    "wrong type": ('name = "main"', "name = 1", "sources[0].name"),
    "plain http elsewhere": ("127.0.0.1", "vod.example", "api.endpoint"),
    "a route to no sink": ('sinks = ["archive"]', 'sinks = ["archiv"]', "routes"),
    "a type of sink that is not there": ('type = "file"', 'type = "fiel"', "sinks.archive.type"),
    "secret file missing": ('secret_key"', 'secret_kez"', "credentials.secret_key_file"),
    "variable not set": ("AKIDwholedaemon", "${VODPOLLER_NOT_SET}", "VODPOLLER_NOT_SET"),
    "no choice for unrouted events": (
        'unrouted = "dead_letter"\n[[routes]]',
        '[[routes]]\nevent_types = ["A"]',
        "sources.main.unrouted",
    ),
}


@pytest.mark.parametrize("command", ["run", "check"])
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_wrong_configuration_ends_with_78_and_names_the_place(system, command, mistake):
    right, wrong, phrase = MISTAKES[mistake]
    path = system.configure("http://127.0.0.1:9")
    text = path.read_text()
    assert right in text
    path.write_text(text.replace(right, wrong))

    assert_fails(run_command(command, "-c", path), EX_CONFIG, str(path), phrase)
    assert not system.journal.exists()


@pytest.mark.parametrize("command", ["run", "check"])
def test_all_mistakes_are_reported_at_once(system, command):
    path = system.configure("http://127.0.0.1:9")
    path.write_text(path.read_text().replace("lease_secs", "leese_secs").replace('"file"', '"fiel"'))

    assert_fails(run_command(command, "-c", path), EX_CONFIG, "leese_secs", "sinks.archive.type")


@pytest.mark.parametrize("command", ["run", "check"])
def test_a_missing_configuration_ends_with_78(tmp_path, command):
    done = run_command(command, "-c", tmp_path / "nowhere.toml")

    assert_fails(done, EX_CONFIG, f"{tmp_path}/nowhere.toml: the file does not exist")


@pytest.mark.parametrize("command", ["run", "check"])
@pytest.mark.parametrize("content", [None, b"\n", b"\xff\xfe\n"], ids=["folder", "empty", "no text"])
def test_a_secret_file_that_holds_no_secret_ends_with_78(system, command, content):
    path = system.configure("http://127.0.0.1:9")
    system.key_path.unlink()
    if content is None:
        system.key_path.mkdir()
    else:
        system.key_path.write_bytes(content)

    assert_fails(run_command(command, "-c", path), EX_CONFIG, str(system.key_path))


def test_a_sink_that_cannot_be_opened_ends_with_78(system):
    path = system.configure("http://127.0.0.1:9")
    system.archive.mkdir()

    assert_fails(run_command("run", "-c", path), EX_CONFIG, "sinks.archive", str(system.archive))


# --- conflicts with other processes -----------------------------------------------------------------------------------


def test_a_second_daemon_on_a_journal_ends_with_1_and_a_remedy(system):
    simulator = system.simulator()
    path = system.configure(simulator.url)
    daemon = system.daemon()

    assert_fails(run_command("run", "-c", path), 1, str(system.journal), "already running", "another journal.path")

    assert daemon.terminate()[0] == 0


def test_a_second_daemon_on_the_same_file_ends_with_78_and_names_it(system):
    simulator = system.simulator()
    path = system.configure(simulator.url)
    system.daemon()
    path.write_text(path.read_text().replace("journal.db", "other.db"))

    assert_fails(run_command("run", "-c", path), EX_CONFIG, "another process writes to", str(system.archive))


def test_a_corrupt_journal_ends_with_78_and_a_remedy(system):
    path = system.configure("http://127.0.0.1:9")
    system.journal.write_bytes(b"this is not a database" * 1000)

    phrases = ["corrupt", "keep a copy", f"sqlite3 {system.journal} .recover", "delivered twice", "A corrupt journal"]
    assert_fails(run_command("run", "-c", path), 78, str(system.journal), *phrases)


@pytest.mark.parametrize(
    "args",
    [
        ["no-such-command"],
        ["run", "--no-such-option"],
        ["run", "-c"],
        ["simulate", "--port", "many"],
        ["simulate", "--batch", "17"],
        ["simulate", "--faults", "meteor=0.1"],
        ["simulate", "--secret-id", "alone"],
    ],
    ids=" ".join,
)
def test_bad_usage_ends_with_2(args):
    assert_fails(run_command(*args), 2, "Error: ")


# --- success ----------------------------------------------------------------------------------------------------------


def test_check_describes_the_configuration_and_changes_nothing(system):
    path = system.configure("http://127.0.0.1:9")
    before = sorted(system.folder.iterdir())

    done = run_command("check", "-c", path)

    assert done.returncode == 0
    assert done.stdout.startswith(f"{path}: valid\n")
    assert "all events -> archive" in done.stdout
    assert SECRET_KEY not in done.stdout
    assert sorted(system.folder.iterdir()) == before


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The output of the demo, and the lines of its file."""
    folder = tmp_path_factory.mktemp("it's a [red] demo")
    began = time.monotonic()
    done = run_command("demo", "--dir", folder, timeout_secs=40)
    assert done.returncode == 0, done.stdout + done.stderr
    assert time.monotonic() - began < 30
    return done.stdout, (folder / "events.jsonl").read_text().splitlines()


def sentences(output, word):
    """The sentences of the demo's output that begin with a word."""
    return re.findall(rf"^\d\d:\d\d:\d\d  {word} +(.+)$", output, re.MULTILINE)


def test_the_demo_delivers_and_reports_each_snapshot_event_once(demo):
    output, lines = demo
    assert len(lines) == len(set(lines)) > 10
    assert all(json.loads(line)["EventType"] == "CreateSnapshotByTimeOffsetComplete" for line in lines)
    settled, unconfirmed = sentences(output, "settled"), sentences(output, "unconfirmed")
    assert sum("→ archive" in sentence for sentence in settled + unconfirmed) == len(lines)
    assert len(settled) + len(unconfirmed) == 24
    assert not re.search(r"Traceback|: [a-z]+\.[a-z]+ ", output)  # an event for which the demo has no sentence


def test_the_demo_shows_a_redelivery_after_a_refused_confirm(demo):
    output, _ = demo
    (unconfirmed,), (again,) = sentences(output, "unconfirmed"), sentences(output, "again")
    assert "InvalidParameterValue" in unconfirmed
    assert again.partition(":")[0] == unconfirmed.partition(" →")[0]
    assert "confirmed without a second delivery" in again


@pytest.mark.parametrize(
    ("row", "number"),
    [
        ("events that VOD had", 25),
        ("confirmed", 25),
        ("events whose confirm VOD refused at first", 1),
        ("events redelivered, not delivered twice", 1),
        ("dead letters in the journal", 1),
    ],
)
def test_the_demo_prints_the_counts_of_its_events(demo, row, number):
    output, lines = demo
    assert re.search(rf"│ {row} +│ {number} +│", output)
    assert re.search(rf"│ snapshot events in the file +│ {len(lines)} +│", output)


def test_the_demo_reports_each_event_once(demo):
    output, _ = demo
    (dead,) = sentences(output, "dead letter")
    assert "not JSON" in dead
    story = re.findall(r"^\d\d:\d\d:\d\d  .+$", output, re.MULTILINE)
    assert len(story) == 1 + 25 + 1  # the start, each event, and the redelivery


def test_the_commands_that_the_demo_proposes_work(demo, tmp_path):
    output, lines = demo
    outputs = [
        subprocess.run(
            line, shell=True, cwd=tmp_path, env={"PATH": "/usr/bin:/bin"}, capture_output=True, text=True, check=True
        ).stdout
        for line in re.findall(r"^  (.+)$", output.partition("Next")[2], re.MULTILINE)
    ]
    assert [output.splitlines() for output in outputs[:-1]] == [lines]
    assert re.search(r"^reason: +malformed$", outputs[-1], re.MULTILINE)
    assert '{"TaskId":oops}' in outputs[-1]


def test_the_version_is_printed_without_importing_large_packages():
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "vodpoller", "--version"],
        capture_output=True,
        text=True,
        check=True,
        env=environment(),
    )

    assert done.stdout == f"vodpoller, version {__version__}\n"
    imported = set(re.findall(r"\| +([\w.]+)$", done.stderr, re.MULTILINE))
    assert "click" in imported
    assert imported.isdisjoint({"requests", "pydantic", "apscheduler", "sqlite3", "structlog", "asyncio", "rich"})


def test_help_names_every_command():
    done = run_command("--help")

    assert done.returncode == 0
    for command in ("run", "check", "demo", "simulate"):
        assert f"\n  {command} " in done.stdout


@pytest.mark.parametrize("limit", [45, 1000])
def test_the_short_help_of_a_command_begins_its_own_help(limit):
    listed = [*main.commands.values(), *deadletters.commands.values()]
    lazy = [command for command in listed if isinstance(command, LazyCommand)]

    assert len(lazy) > len(main.commands)
    assert {command.name: command.get_short_help_str(limit) for command in lazy} == {
        command.name: command.load().get_short_help_str(limit) for command in lazy
    }


@pytest.mark.parametrize("words", [["--help"], ["--version"]], ids=" ".join)
def test_a_list_of_commands_imports_none_of_them(words):
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "vodpoller", *words],
        capture_output=True,
        text=True,
        check=True,
        env=environment(),
    )

    assert not re.search(r"\| +vodpoller\.(config|daemon|cli\.check)", done.stderr)


def test_the_simulator_prints_its_address_and_ends_with_0(system):
    simulator = system.simulator()
    assert simulator.stats()["fed"] == 0

    simulator.process.send_signal(signal.SIGTERM)

    assert simulator.process.wait(5) == 0


def test_a_simulator_on_a_port_that_is_taken_ends_with_1(system):
    simulator = system.simulator()
    port = simulator.url.rsplit(":", 1)[1]

    assert_fails(run_command("simulate", "--port", port), 1, "the simulator cannot start")


def test_the_key_can_come_from_the_credentials_of_the_service_manager(system):
    simulator = system.simulator(secret_id="from-systemd", secret_key=SECRET_KEY, events=3)
    path = system.configure(simulator.url)
    text = path.read_text()
    start, end = text.index("[credentials]"), text.index("[[sources]]")
    path.write_text(text[:start] + text[end:])
    credentials = system.folder / "credentials"
    credentials.mkdir()
    (credentials / "secret_id").write_text("from-systemd\n")
    (credentials / "secret_key").write_text(SECRET_KEY)

    assert_fails(run_command("run", "-c", path), EX_CONFIG, "secret_id")
    system.daemon(CREDENTIALS_DIRECTORY=str(credentials))

    until(simulator.all_confirmed)


def test_the_key_can_come_from_the_environment(system):
    simulator = system.simulator(secret_id="from-env", secret_key=SECRET_KEY, events=3)
    path = system.configure(simulator.url)
    text = path.read_text()
    start, end = text.index("[credentials]"), text.index("[[sources]]")
    path.write_text(text[:start] + text[end:])

    system.daemon(TENCENTCLOUD_SECRET_ID="from-env", TENCENTCLOUD_SECRET_KEY=SECRET_KEY)

    until(simulator.all_confirmed)


def test_lines_carry_their_priority_if_stderr_is_journald(system):
    with HeldPort() as port:
        system.configure(port.url)
        log_path = system.folder / "daemon1.log"
        log_path.touch()
        status = log_path.stat()
        daemon = system.daemon(started=False, JOURNAL_STREAM=f"{status.st_dev}:{status.st_ino}")
        # The lines come from two threads, in either order.
        until(lambda: all(event in log_path.read_text() for event in ("daemon.started", "pull.failed")))
        daemon.kill()

    text = log_path.read_text()
    assert re.search(r"^<6>\{.*daemon\.started", text, re.MULTILINE)
    assert re.search(r"^<4>\{.*pull\.failed", text, re.MULTILINE)
