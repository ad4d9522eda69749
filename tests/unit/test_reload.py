"""The checks of a new configuration before a reload, and how the command finds the daemon if the file is broken."""

import socket
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from tests.helpers import log_into
from vodpoller import reload as reload_module
from vodpoller.cli import reload as reload_command
from vodpoller.cli.app import main
from vodpoller.config.lenient import read_leniently
from vodpoller.config.load import from_dict, load
from vodpoller.config.tables import Daemon, Journal, Listener
from vodpoller.errors import ConfigError
from vodpoller.reload import check_successor
from vodpoller.secret import Secret
from vodpoller.sinks.contract import Sink, SinkConfig
from vodpoller.status_socket import StatusSocket, socket_path

LOG = log_into([])


class ProbedSink(Sink):
    Config = SinkConfig

    def deliver(self, events, timeout_secs):
        pass


def config_with(folder, probes):
    """A configuration with a sink for each of the probes."""
    data = {
        "credentials": {"secret_id": "an-id-of-a-key", "secret_key": "the-key-of-the-id"},
        "sources": [{"name": "main"}],
        "routes": [{"name": "all", "sinks": [*probes]}],
        "sinks": {name: {"type": "exec", "command": ["/bin/true"]} for name in probes},
        "journal": {"path": str(folder / "journal.db")},
    }
    classes = {name: type("It", (ProbedSink,), {"probe": staticmethod(probe)}) for name, probe in probes.items()}
    return replace(from_dict(data, where="config.toml", base=folder, env={}), sink_classes=classes)


def fails(error):
    def probe(*_arguments):
        raise error

    return probe


def works(*_arguments):
    return "it is there"


# --- the sinks --------------------------------------------------------------------------------------------------------


def test_the_errors_of_all_probes_are_reported(tmp_path):
    errors = [ConfigError(["sinks.a: closed", "sinks.a: empty"]), OSError(13, "Permission denied"), ValueError()]
    probes = {name: fails(error) for name, error in zip("abc", errors, strict=True)}
    config = config_with(tmp_path, {**probes, "d": works})
    with pytest.raises(ConfigError) as refused:
        check_successor(config, config, LOG)
    assert refused.value.problems == (
        "sinks.a: closed",
        "sinks.a: empty",
        "sinks.b: [Errno 13] Permission denied",
        "sinks.c: ValueError()",
    )


def test_a_hanging_probe_is_reported_after_its_time_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(reload_module, "PROBES_SECS", 0.2)
    over = threading.Event()
    config = config_with(tmp_path, {"slow": lambda *_arguments: over.wait(60), "quick": works})
    try:
        with pytest.raises(ConfigError, match=r"^sinks\.slow: whether it can be reached is not known after 0\.2 s$"):
            check_successor(config, config, LOG)
    finally:
        over.set()


def test_probes_run_at_the_same_time(tmp_path):
    meeting = threading.Barrier(20, timeout=15)
    config = config_with(tmp_path, {f"s{number}": lambda *_arguments: meeting.wait() for number in range(20)})
    check_successor(config, config, LOG)


# --- the journal ------------------------------------------------------------------------------------------------------


def test_another_spelling_of_the_path_is_the_same_journal(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path)
    running = config_with(tmp_path, {"a": works})
    new = replace(running, journal=Journal(path=tmp_path / "link" / "journal.db"))
    check_successor(new, running, LOG)


def test_a_journal_that_cannot_be_written_refuses_the_reload(tmp_path):
    running = config_with(tmp_path, {"a": works})
    with pytest.raises(ConfigError, match=r"^journal\.path: .* cannot be written: the disk is full"):
        check_successor(running, running, LOG, trouble="the disk is full")


# --- the listener -----------------------------------------------------------------------------------------------------


def test_an_address_in_use_is_refused_and_a_free_one_is_not(tmp_path):
    running = config_with(tmp_path, {"a": works})
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        new = replace(running, listener=Listener(address=address))
        with pytest.raises(
            ConfigError, match=f"^listener.address: {address} cannot be listened at: Address already in"
        ):
            check_successor(new, running, LOG)
        check_successor(new, new, LOG)  # this process itself listens there
    check_successor(new, running, LOG)


# --- the same or another configuration --------------------------------------------------------------------------------

TEXT = """
[credentials]
secret_id = "an-id-of-a-key"
secret_key_file = "key"
[[sources]]
name = "main"
[[routes]]
name = "all"
sinks = ["hook"]
[sinks.hook]
type = "webhook"
url = "https://a.example/"
secret = "whsec_c2lnbmluZ3NlY3JldG9mdGhld2ViaG9va3Rlc3Q="
"""


def loaded(folder, text=TEXT, key="the-key-of-the-id"):
    (folder / "key").write_text(key)
    path = folder / "config.toml"
    path.write_text(text)
    return load(path, env={})


def test_a_changed_secret_file_is_not_another_configuration(tmp_path):
    assert loaded(tmp_path) == loaded(tmp_path, key="another-key-of-the-id")


@pytest.mark.parametrize(
    ("was", "is_now"),
    [
        ('"main"', '"other"'),
        ("whsec_c2ln", "whsec_c2lo"),
        ('"key"', '"./other"'),
        ("a.example", "b.example"),
        ('name = "all"', 'name = "all"\nsources = ["main"]'),
        ('type = "webhook"', 'type = "webhook"\nconcurrency = 3'),
        ("[[sources]]", "[log]\nlevel = 'debug'\n[[sources]]"),
    ],
)
def test_any_other_change_is_another_configuration(tmp_path, was, is_now):
    (tmp_path / "other").write_text("the-key-of-the-id")
    assert loaded(tmp_path) != loaded(tmp_path, TEXT.replace(was, is_now))


def test_equal_secrets_have_the_same_hash(tmp_path):
    (tmp_path / "key").write_text("a")
    first = Secret(path=tmp_path / "key")
    (tmp_path / "key").write_text("b")
    assert len({first, Secret(path=tmp_path / "key"), Secret(value="b"), Secret(value="b")}) == 2


# --- finding the daemon -----------------------------------------------------------------------------------------------

JOURNAL = '[journal]\npath = "${WHERE}/j.db"\n'
FOUND = Path("/x/j.db")
DEFAULT = Journal().path


@pytest.mark.parametrize(
    ("text", "path", "shutdown_secs"),
    [
        (f"{JOURNAL}[daemon]\nshutdown_secs = 3\n", FOUND, 3),
        (f"[api\n{JOURNAL}  [daemon]\nshutdown_secs = 3\n[[sources]\n", FOUND, 3),
        (f"{JOURNAL}[daemon]\nshutdown_secs = 'soon'\n", FOUND, Daemon().shutdown_secs),
        (f'x = "\n{JOURNAL}', FOUND, Daemon().shutdown_secs),
        ('[journal]\npath = "half\n', DEFAULT, Daemon().shutdown_secs),
        ("journal = 3\n", DEFAULT, Daemon().shutdown_secs),
        ("", DEFAULT, Daemon().shutdown_secs),
        (None, DEFAULT, Daemon().shutdown_secs),
    ],
)
def test_the_journal_path_is_found_even_in_a_broken_file(tmp_path, text, path, shutdown_secs):
    file = tmp_path / "config.toml"
    if text is not None:
        file.write_text(text)
    journal, daemon = read_leniently(file, env={"WHERE": "/x"})
    assert (journal.path, daemon.shutdown_secs) == (path, shutdown_secs)


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def command(tmp_path, log):
    """Runs the command while a daemon gives this answer, or none if it is None."""
    path = tmp_path / "config.toml"
    path.write_text(f'[journal]\npath = "{tmp_path}/j.db"\n[daemon]\nshutdown_secs = 1.0\n')

    def run(answer):
        askers = []

        def take(asker):
            askers.append(asker)
            if answer is not None:
                asker.answer(answer)

        listening = StatusSocket(socket_path(tmp_path / "j.db"), dict, later={"reload": take}, log=lambda: log)
        try:
            return CliRunner().invoke(main, ["reload", "-c", str(path)])
        finally:
            listening.close()
            for asker in askers:
                asker.answer({})

    return run


@pytest.mark.parametrize(
    ("answer", "exit_code", "expected"),
    [
        ({"result": "refused", "problems": ["a: b", "c: d"]}, 78, ["a: b", "c: d", "continues with the former"]),
        ({"result": "ended", "problems": ["a: b"]}, 1, ["a: b"]),
        ({"error": "this vodpoller (0.1.0) does not know the command 'reload'"}, 1, ["does not know the command"]),
        ({"result": "done", "changed": True, "stuck": []}, 0, ["uses the new configuration"]),
        ({"result": "done", "changed": False, "stuck": []}, 0, ["the configuration has not changed"]),
        ({"result": "done", "changed": True, "stuck": ["sink a"]}, 0, ["executed itself again", "sink a"]),
    ],
)
def test_the_command_prints_the_answer_of_the_daemon(command, answer, exit_code, expected):
    done = command(answer)
    assert done.exit_code == exit_code
    assert [words for words in expected if words not in done.output] == []


def test_without_an_answer_in_time_the_command_ends_with_1(command, monkeypatch):
    monkeypatch.setattr(reload_command, "BEYOND_STOP_SECS", -0.9)
    done = command(None)
    assert done.exit_code == 1
    assert "did not report the result" in done.output
