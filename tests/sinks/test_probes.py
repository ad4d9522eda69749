"""The results of `probe` for sinks of the package; a probe changes nothing."""

import errno
import os
import re
import socket
import ssl
import subprocess
import sys
import threading
import time
from contextlib import closing, contextmanager

import pytest

from tests.helpers import sink_context
from tests.polling import until
from tests.processes import needs
from vodpoller.errors import ConfigError
from vodpoller.sinks.contract import Sink
from vodpoller.sinks.file.sink import FileConfig, FileSink
from vodpoller.sinks.stdout import StdoutConfig, StdoutSink
from vodpoller.sinks.webhook.config import WebhookConfig
from vodpoller.sinks.webhook.sink import WebhookSink

SLACK_SECS = 1.5


def problem_of(sink_class, config):
    with pytest.raises(ConfigError) as excinfo:
        sink_class.probe("it", config, sink_context())
    (problem,) = excinfo.value.problems
    assert "\n" not in problem
    return problem


def tree(folder):
    return sorted((str(path), path.stat().st_mtime_ns, path.stat().st_size) for path in folder.rglob("*"))


@pytest.fixture(autouse=True)
def no_proxies(monkeypatch):
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


def test_a_sink_without_a_probe_of_its_own_has_nothing_to_reach():
    assert "probe" not in vars(StdoutSink)
    assert (
        StdoutSink.probe("it", StdoutConfig(type="stdout"), sink_context())
        == Sink.probe("it", None, sink_context())
        == "nothing to reach"
    )


# --- file ---


def file_config(path):
    return FileConfig(type="file", path=str(path))


@pytest.fixture
def used(tmp_path):
    """A file and its lock, as a sink leaves them."""
    path = tmp_path / "events.jsonl"
    FileSink("it", file_config(path), sink_context()).close()
    return path


@contextmanager
def another_process(path):
    code = (
        "import sys\n"
        "import structlog\n"
        "from vodpoller.sinks.contract import SinkContext\n"
        "from vodpoller.sinks.file.sink import FileConfig, FileSink\n"
        "context = SinkContext(log=structlog.get_logger())\n"
        "sink = FileSink('it', FileConfig(type='file', path=sys.argv[1]), context)\n"
        "print('open', flush=True)\n"
        "sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout.readline() == b"open\n"
        yield


def test_an_existing_file_can_be_written_and_still_be_opened(used, tmp_path):
    before = tree(tmp_path)
    assert FileSink.probe("it", file_config(used), sink_context()) == f"{used} can be written"
    assert tree(tmp_path) == before
    FileSink("it", file_config(used), sink_context()).close()


def test_a_missing_file_is_not_created(tmp_path):
    for path in (tmp_path / "events.jsonl", tmp_path / "one" / "two" / "events.jsonl"):
        assert FileSink.probe("it", file_config(path), sink_context()) == f"{path} can be created"
    assert tree(tmp_path) == []


def test_a_file_in_use_by_another_process_is_not_a_problem(used):
    with another_process(used):
        text = FileSink.probe("it", file_config(used), sink_context())
    assert text == f"{used} is in use by another process (the running daemon?)"
    assert FileSink.probe("it", file_config(used), sink_context()) == f"{used} can be written"


def test_a_link_is_followed(used, tmp_path):
    (tmp_path / "link").symlink_to(used)
    assert FileSink.probe("it", file_config(tmp_path / "link"), sink_context()) == f"{used} can be written"


def test_a_file_at_the_path_of_a_folder_is_a_problem(used):
    problem = problem_of(FileSink, file_config(used / "sub" / "events.jsonl"))
    assert problem == (
        f"sinks.it.path: {used} cannot be written: Not a directory (a part of the path is a file, not a folder)"
    )


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo])
def test_a_path_that_is_not_a_regular_file_is_a_problem(tmp_path, make):
    make(tmp_path / "events.jsonl")
    assert "it is not a regular file (give the path" in problem_of(FileSink, file_config(tmp_path / "events.jsonl"))


def forbid(monkeypatch, path, mode):
    allowed = os.access
    monkeypatch.setattr(
        os, "access", lambda at, wanted: not (str(at) == str(path) and wanted & mode) and allowed(at, wanted)
    )


@pytest.mark.parametrize(
    ("place", "mode"),
    [
        ("events.jsonl", os.W_OK),
        ("events.jsonl", os.R_OK),
        ("events.jsonl.lock", os.W_OK),
        (".", os.R_OK),
        (".", os.X_OK),
    ],
)
def test_a_missing_right_is_a_problem_that_names_the_user(used, tmp_path, monkeypatch, place, mode):
    forbidden = tmp_path / place
    forbid(monkeypatch, forbidden, mode)
    assert problem_of(FileSink, file_config(used)) == (
        f"sinks.it.path: {forbidden} cannot be written: {os.strerror(errno.EACCES)}"
        " (the user that runs vodpoller needs the right to write there)"
    )


@pytest.mark.parametrize("missing", ["events.jsonl", "events.jsonl.lock"])
def test_the_folder_must_be_writable_only_for_missing_files(used, tmp_path, monkeypatch, missing):
    forbid(monkeypatch, tmp_path, os.W_OK)
    assert FileSink.probe("it", file_config(used), sink_context()) == f"{used} can be written"
    (tmp_path / missing).unlink()
    assert f"{tmp_path} cannot be written" in problem_of(FileSink, file_config(used))


def test_the_nearest_folder_that_exists_must_be_writable(tmp_path, monkeypatch):
    forbid(monkeypatch, tmp_path, os.W_OK)
    path = tmp_path / "one" / "two" / "events.jsonl"
    assert f"{tmp_path} cannot be written" in problem_of(FileSink, file_config(path))


def test_a_disk_that_is_mounted_read_only_is_reported_as_such(used, tmp_path, monkeypatch):
    class ReadOnly:
        f_flag = os.ST_RDONLY

    forbid(monkeypatch, used, os.W_OK)
    monkeypatch.setattr(os, "statvfs", lambda path: ReadOnly)
    assert "that disk is mounted read-only" in problem_of(FileSink, file_config(used))


# --- webhook ---


def hook(url, **more):
    return WebhookConfig(type="webhook", url=url, **more)


@contextmanager
def listening():
    """A server that records what it receives on one connection: b"" when it opens, its data, None when it closes."""
    received = []
    with closing(socket.create_server(("127.0.0.1", 0))) as server:

        def serve():
            connection, _ = server.accept()
            with connection:
                received.append(b"")
                while data := connection.recv(4096):
                    received.append(data)
            received.append(None)

        thread = threading.Thread(target=serve)
        thread.start()
        yield server.getsockname()[1], received
        thread.join(5)
        assert not thread.is_alive()


def test_a_receiver_that_listens_gets_a_connection_and_no_byte():
    with listening() as (port, received):
        assert WebhookSink.probe("it", hook(f"http://127.0.0.1:{port}/?token=hunter2"), sink_context()) == (
            f"127.0.0.1:{port} accepts connections"
        )
        until(lambda: None in received)
    assert received == [b"", None]


def test_an_address_where_nothing_listens_is_a_problem():
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        port = server.getsockname()[1]
    assert problem_of(WebhookSink, hook(f"http://127.0.0.1:{port}/?token=hunter2")) == (
        f"sinks.it.url: 127.0.0.1:{port} refused the connection (is anything running there?)"
    )


def test_a_name_that_does_not_exist_is_a_problem(monkeypatch):
    def look_up(*args, **kwargs):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    assert "unknown.example:443 cannot be found" in problem_of(WebhookSink, hook("https://unknown.example/"))


def test_a_missing_tls_handshake_fails_at_the_time_limit():
    with listening() as (port, _):
        began = time.monotonic()
        problem = problem_of(WebhookSink, hook(f"https://127.0.0.1:{port}/", timeout_secs=0.3))
        assert 0.2 < time.monotonic() - began < 0.3 + SLACK_SECS
    assert problem.startswith(f"sinks.it.url: 127.0.0.1:{port} ")
    assert "within 0.3 s" in problem


def test_plain_http_where_tls_is_expected_is_a_problem(receiver):
    assert "failed at TLS" in problem_of(WebhookSink, hook(receiver.url.replace("http:", "https:")))


@pytest.fixture
def tls_receiver(receiver, tmp_path):
    needs("openssl")
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=receiver"
    subprocess.run(
        [*command.split(), "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate)],
        check=True,
        capture_output=True,
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    receiver.socket = context.wrap_socket(receiver.socket, server_side=True)
    return receiver


def test_a_certificate_of_an_unknown_ca_is_a_problem(tls_receiver):
    problem = problem_of(WebhookSink, hook(tls_receiver.url.replace("http:", "https:")))
    assert "cannot be trusted: self" in problem


def test_a_certificate_of_the_environments_ca_bundle_is_trusted(tls_receiver, tmp_path, monkeypatch):
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(tmp_path / "cert.pem"))
    text = WebhookSink.probe("it", hook(tls_receiver.url.replace("http:", "https:")), sink_context())
    expected = f"127.0.0.1:{tls_receiver.server_port} accepts connections, its certificate is trusted, and valid until "
    assert re.fullmatch(re.escape(expected) + r"20\d\d-\d\d-\d\d \(1 day\)", text)
    assert tls_receiver.received == []


def test_a_ca_bundle_that_does_not_exist_is_a_problem(tmp_path, monkeypatch):
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(tmp_path / "none.pem"))
    assert "which does not exist" in problem_of(WebhookSink, hook("https://127.0.0.1/"))


@pytest.mark.parametrize("url", ["http://app.invalid/", "https://app.invalid/"])
@pytest.mark.parametrize("spelled", ["http://user:hunter2@127.0.0.1:{}", "127.0.0.1:{}"])
def test_behind_a_proxy_only_the_proxy_is_reached(monkeypatch, url, spelled):
    with listening() as (port, received):
        monkeypatch.setenv("all_proxy", spelled.format(port))
        text = WebhookSink.probe("it", hook(url), sink_context())
        until(lambda: None in received)
    assert text == f"the proxy 127.0.0.1:{port} accepts connections (the server behind it was not tried)"
    assert received == [b"", None]


def test_a_proxy_that_does_not_run_is_a_problem(monkeypatch):
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        port = server.getsockname()[1]
    monkeypatch.setenv("https_proxy", f"http://user:hunter2@127.0.0.1:{port}")
    problem = problem_of(WebhookSink, hook("https://app.invalid/"))
    assert problem.startswith(f"sinks.it.url: the proxy 127.0.0.1:{port} refused the connection")
    assert "hunter2" not in problem
