"""The listener over real sockets: access, the answer of each path, and clients that misbehave."""

import errno
import json
import socket
import threading
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from tests.helpers import named
from tests.listening import Client, Shown, running_listener
from tests.polling import until
from tests.processes import cannot_run
from vodpoller.listener import server as server_module
from vodpoller.listener.server import BODY_MAX_BYTES, HEAD_MAX_BYTES, Listener, listen

PATHS = ["/", "/metrics", "/status.json", "/healthz", "/readyz"]
GUARDED = ["/", "/metrics", "/status.json", "/nothing"]
PROBES = ["/healthz", "/readyz"]
PASSWORD = "correct horse, battery"


@pytest.fixture(autouse=True)
def quick_end(monkeypatch):
    monkeypatch.setattr(server_module, "LOOP_SECS", 0.02)


@pytest.fixture
def shown():
    return Shown()


@pytest.fixture
def client(shown):
    with running_listener(shown) as client:
        yield client


# --- access -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", GUARDED)
@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "localhost.evil.example", "", "127.0.0.1:1@evil"])
def test_a_host_that_is_not_configured_gets_nothing(client, path, host):
    answer = client.get(path, host=host)
    assert (answer.status, b"main" in answer.body) == (421, False)


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST", "localhost:9464", "127.0.0.1:1"])
def test_a_configured_host_is_accepted_with_any_port_and_case(client, host):
    assert client.get("/status.json", host=host).status == 200


def test_an_ipv6_address_is_accepted_as_a_browser_writes_it(shown, client):
    shown.hosts = ("[::1]",)
    assert [client.get("/metrics", host=it).status for it in ("[::1]:9464", "[::1]", "[::2]", "::1")] == [
        200,
        200,
        421,
        421,
    ]


@pytest.mark.parametrize("path", GUARDED)
@pytest.mark.parametrize(
    "given", [None, "", "wrong", PASSWORD + "x", PASSWORD[:-1], f"root:{PASSWORD}", f":{PASSWORD}", "vodpoller:"]
)
def test_without_the_password_nothing_is_shown(shown, client, path, given):
    shown.password = PASSWORD
    answer = client.get(path, password=given)
    assert answer.status == 401
    assert answer.headers["WWW-Authenticate"] == 'Basic realm="vodpoller", charset="UTF-8"'
    assert "there are" not in answer.text


@pytest.mark.parametrize("header", ["Basic", "Basic !!!", "Bearer dm9kcG9sbGVyOnBhc3N3b3Jk", "Basic \xff", "x" * 4000])
def test_an_invalid_authorization_header_is_a_wrong_password(shown, client, header):
    shown.password = PASSWORD
    assert client.get("/metrics", Authorization=header).status == 401


@pytest.mark.parametrize("password", [PASSWORD, "пароль из слов", "with:colons:in it"])
def test_with_the_password_all_paths_answer(shown, client, password):
    shown.password = password
    answers = {path: client.get(path, password=f"vodpoller:{password}").status for path in PATHS}
    assert answers == dict.fromkeys(PATHS, 200)


@pytest.mark.parametrize("path", PROBES)
def test_the_probes_need_neither_host_nor_password(shown, client, path):
    shown.password = PASSWORD
    answer = client.get(path, host="10.0.0.7:9464")
    assert (answer.status, answer.body) == (200, b"ok")


@pytest.mark.parametrize("method", ["POST", "HEAD", "PUT", "DELETE", "OPTIONS", "TRACE"])
@pytest.mark.parametrize("path", ["/", "/healthz"])
def test_only_get_is_answered(client, path, method):
    answer = client.get(path, method=method)
    assert (answer.status, answer.headers["Allow"]) == (405, "GET")


@pytest.mark.parametrize("path", ["/nothing", "/metrics/", "/../metrics", "/%00", "/status.json%0a"])
def test_other_paths_are_not_found(client, path):
    assert client.get(path).status == 404


@pytest.mark.parametrize("path", [*PATHS, "/nothing"])
def test_every_answer_has_strict_security_headers(client, path):
    headers = client.get(path).headers
    assert headers["Content-Security-Policy"].startswith("default-src 'none'; style-src 'sha256-")
    assert "script" not in headers["Content-Security-Policy"]
    assert (headers["X-Content-Type-Options"], headers["Referrer-Policy"], headers["Cache-Control"]) == (
        "nosniff",
        "no-referrer",
        "no-store",
    )
    assert "Server" not in headers


# --- answers ----------------------------------------------------------------------------------------------------------


def test_only_an_overdue_thread_makes_healthz_fail(shown, client):
    shown.report = lambda: 1 / 0  # the state of disk, VOD and sinks does not count
    assert client.get("/healthz").status == 200
    shown.overdue = {"puller main": 31.0}
    answer = client.get("/healthz")
    assert (answer.status, answer.text) == (503, "puller main is overdue by 31 s\n")
    assert client.get("/readyz").status == 200


def test_readyz_succeeds_only_while_the_daemon_is_ready(shown, client):
    assert client.get("/readyz").status == 200
    shown.is_ready = False
    assert (client.get("/readyz").status, client.get("/healthz").status) == (503, 200)


def test_between_two_builds_only_healthz_answers(shown):
    builds = []
    with running_listener(shown, current=lambda: builds[-1] if builds else None) as client:
        assert [client.get(path).status for path in PATHS] == [503, 503, 503, 200, 503]
        builds.append(shown.view())
        assert [client.get(path).status for path in PATHS] == [200] * 5
        other = Shown(password=PASSWORD)
        builds.append(other.view())
        assert [client.get(path).status for path in PATHS] == [401, 401, 401, 200, 200]


def test_the_status_is_that_of_the_command(shown, client):
    answer = client.get("/status.json")
    assert answer.headers["Content-Type"] == "application/json"
    assert json.loads(answer.body) == json.loads(json.dumps(shown.status.as_json()))


def test_an_error_is_logged_and_not_shown_to_the_client(shown, client):
    shown.report = lambda: {}["missing"]
    for _ in range(3):
        answer = client.get("/status.json")
        assert (answer.status, answer.text) == (500, "this request failed; the log says why\n")
    (line,) = named(shown.lines, "task.failed")
    assert (line["task"], type(line["exc_info"])) == ("listener", KeyError)


def test_a_hanging_disk_delays_neither_probes_nor_metrics(shown, client):
    released, reports = threading.Event(), []

    def hang():
        reports.append(1)
        assert released.wait(20)
        return shown.status.as_json()

    shown.report = hang
    hanging = [threading.Thread(target=client.get, args=("/status.json",)) for _ in range(2)]
    for thread in hanging:
        thread.start()
    until(lambda: len(reports) == 2)
    try:
        assert [client.get(path).status for path in ("/", "/status.json")] == [503, 503]
        assert [client.get(path).status for path in (*PROBES, "/metrics")] == [200, 200, 200]
    finally:
        released.set()
        for thread in hanging:
            thread.join(20)
    shown.report = shown.status.as_json
    assert client.get("/status.json").status == 200


# --- clients that misbehave -------------------------------------------------------------------------------------------


def answer_on(connection):
    """All bytes that arrive until the other side closes."""
    received = b""
    while chunk := connection.recv(65536):
        received += chunk
    return received


def test_a_head_beyond_the_limit_ends_the_connection(client):
    with closing(client.connect()) as connection:
        connection.sendall(b"GET /healthz HTTP/1.1\r\nX: ".ljust(HEAD_MAX_BYTES, b"x"))
        assert answer_on(connection).startswith(b"HTTP/1.0 431 ")


@pytest.mark.parametrize(
    "head",
    [
        b"Content-Length: %d\r\n\r\n" % BODY_MAX_BYTES,
        b"Transfer-Encoding: chunked\r\n\r\n%x\r\n" % BODY_MAX_BYTES + b"x" * BODY_MAX_BYTES,
    ],
    ids=["declared", "chunked"],
)
def test_a_body_beyond_the_limit_ends_the_connection(client, head):
    with closing(client.connect()) as connection:
        connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n" + head)
        assert connection.recv(65536).startswith(b"HTTP/1.1 413 ")


def test_a_body_within_the_limit_needs_no_file(client, monkeypatch):
    made = []
    monkeypatch.setattr("tempfile.TemporaryFile", made.append)
    with closing(client.connect()) as connection:
        length = BODY_MAX_BYTES - 1
        connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % length)
        connection.sendall(b"x" * length)
        assert connection.recv(65536).startswith(b"HTTP/1.1 200 ")
    assert made == []


@pytest.mark.parametrize(
    "request_line", [b"nonsense\r\n\r\n", b"GET /healthz\r\n\r\n\x00", b"\x16\x03\x01\x02\x00\r\n\r\n"]
)
def test_an_invalid_request_does_not_harm_the_listener(client, request_line):
    with closing(client.connect()) as connection:
        connection.sendall(request_line)
        connection.recv(65536)
    assert client.get("/healthz").status == 200


@pytest.mark.parametrize(
    "sent", [b"", b"GET /healthz HTTP/1.1\r\nX: ", b"GET / HTTP/1.1\r\nContent-Length: 9\r\n\r\nx"]
)
def test_a_slow_connection_is_closed_at_its_time_limit(shown, sent):
    with running_listener(shown, connection_secs=0.3) as client, closing(client.connect()) as connection:
        connection.sendall(sent)
        connection.settimeout(0.05)

        def is_ended():
            try:
                connection.sendall(b"y" if sent else b"")
                return connection.recv(1) == b""
            except TimeoutError:
                return False
            except ConnectionError:
                return True

        until(is_ended)
        assert client.get("/healthz").status == 200


class Trickling(threading.Thread):
    """Clients that send slowly and never finish."""

    def __init__(self, connections, piece):
        super().__init__()
        self.connections = connections
        self.piece = piece
        self.ended = threading.Event()

    def run(self):
        while not self.ended.wait(0.02):
            for connection in self.connections:
                try:
                    connection.sendall(self.piece)
                except OSError:  # it was refused in the meantime
                    continue


def test_slow_clients_do_not_delay_other_requests(client):
    with ExitStack() as stack:
        heads = [stack.enter_context(closing(client.connect())) for _ in range(40)]
        bodies = [stack.enter_context(closing(client.connect())) for _ in range(10)]
        for connection in heads:
            connection.sendall(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nX-Long: ")
        for connection in bodies:
            connection.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n")
        for thread in (trickling := [Trickling(heads, b"x"), Trickling(bodies, b"400\r\n" + b"x" * 1024 + b"\r\n")]):
            thread.start()
        try:
            assert [client.get(path).status for path in PATHS * 4] == [200] * 20
        finally:
            for thread in trickling:
                thread.ended.set()
                thread.join(20)


# --- addresses --------------------------------------------------------------------------------------------------------


def test_an_address_in_use_is_logged_once_and_tried_again(shown, monkeypatch):
    monkeypatch.setattr("vodpoller.listener.server.RETRY_SECS", 0.02)
    with socket.create_server(("127.0.0.1", 0)) as holder:
        port = holder.getsockname()[1]
        listener = Listener(f"127.0.0.1:{port}", shown.view, telemetry=shown.telemetry)
        (line,) = until(lambda: named(shown.lines, "listener.failed"))
        assert (line["level"], line["address"]) == ("error", f"127.0.0.1:{port}")
    try:
        until(lambda: named(shown.lines, "listener.started"))
        assert Client(port).get("/healthz").status == 200
        assert len(named(shown.lines, "listener.failed")) == 1
    finally:
        listener.close()


def test_a_listener_whose_thread_cannot_start_is_only_logged(shown, monkeypatch):
    def start(thread):
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", start)
        listener = Listener("127.0.0.1:1", shown.view, telemetry=shown.telemetry)
    listener.close()
    (line,) = named(shown.lines, "listener.failed")
    assert line["error_message"] == "can't start new thread"


def test_a_closed_listener_frees_its_address(shown):
    with running_listener(shown) as client, closing(client.connect()):
        assert client.get("/healthz").status == 200
    socket.create_server(("127.0.0.1", client.port)).close()


def test_a_closed_listener_leaves_no_descriptor_open(shown):
    def descriptors():
        return sum(1 for _ in Path("/proc/self/fd").iterdir())

    before = descriptors()
    for _ in range(3):
        with running_listener(shown) as client:
            assert client.get("/healthz").status == 200
    assert descriptors() == before


def test_it_listens_on_ipv6_addresses_too():
    try:
        sock = listen("[::1]:0")
    except OSError as error:
        cannot_run(f"this machine has no IPv6: {error}")
    with sock:
        assert sock.family == socket.AF_INET6


def test_without_descriptors_it_waits_before_it_tries_again(monkeypatch):
    waited = []

    def refuse(_sock):
        raise OSError(errno.EMFILE, "Too many open files")

    with listen("127.0.0.1:0") as sock, monkeypatch.context() as patched:
        patched.setattr(socket.socket, "accept", refuse)
        patched.setattr(server_module.time, "sleep", waited.append)
        with pytest.raises(OSError, match="Too many open files"):
            sock.accept()
    assert waited == [server_module.LOOP_SECS]
