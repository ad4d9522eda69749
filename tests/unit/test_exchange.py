"""One request and its answer: what is sent, over which connection or proxy, and how it fails."""

import socket
import threading
from contextlib import closing, contextmanager, nullcontext, suppress

import pytest
import requests

from tests.polling import until
from tests.receiver import black_hole, never_reads, raw_server, read_request, running_receiver
from vodpoller.httpclient.address import Environment
from vodpoller.httpclient.connection import PIECE_BYTES, BoundedConnection
from vodpoller.httpclient.transport import was_repeated
from vodpoller.httpclient.words import failure_text

DIRECT = Environment(proxy="")
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


def prepared(url, body=b"", headers=(), method="POST"):
    return requests.Request(method, url, data=body, headers=dict(headers)).prepare()


def call(adapter, request, environment=DIRECT, timeout_secs=5.0, **more):
    """Send the request; return the status, and whether the request was sent twice."""
    with closing(adapter.send_within(request, environment, timeout_secs, **more)) as response:
        response.raw.read()
        return response.status_code, was_repeated(response)


def scripted(*answers, seen=None):
    """Answers each request, on any connection, with the next of `answers`; adds the requests to the list `seen`."""
    left = list(answers)

    def serve(connection, _stopping):
        while left and (request := read_request(connection)):
            if seen is not None:
                seen.append(request)
            connection.sendall(left.pop(0))

    return serve


# --- what is sent ---


@pytest.mark.parametrize("name", ["X-Token", "Authorization"])
@pytest.mark.parametrize("value", ["a\nb", "a\r\nHost: b", "a\rb", "a\r\n b", "a\0b", "a\x7fb", "密钥", "\ud800"])
def test_a_header_that_cannot_be_sent_is_an_error_before_connecting(adapter_of, name, value):
    with running_receiver() as receiver:
        request = prepared(receiver.url)
        request.headers[name] = value
        with pytest.raises(ValueError, match="cannot be sent"):
            call(adapter_of(), request)
        assert receiver.connections == []


@pytest.mark.parametrize("name", ["", "X Y", "X:", "X\r\nHost", "ü"])
def test_a_headers_name_that_cannot_be_sent_is_an_error(adapter_of, name):
    with running_receiver() as receiver:
        request = prepared(receiver.url)
        request.headers[name] = "a"
        with pytest.raises(ValueError, match="cannot be sent"):
            call(adapter_of(), request)
        assert receiver.connections == []


@pytest.mark.parametrize("method", ["GET / HTTP/1.1\r\nHost: a\r\n\r\nGET", "GET ", "get", ""])
def test_a_method_that_cannot_be_sent_is_an_error(adapter_of, method):
    with running_receiver() as receiver:
        request = prepared(receiver.url)
        request.method = method
        with pytest.raises(ValueError, match="cannot be sent"):
            call(adapter_of(), request)
        assert receiver.connections == []


def test_a_body_that_is_text_is_an_error(adapter_of):
    with running_receiver() as receiver, pytest.raises(TypeError, match="bytes, not str"):
        call(adapter_of(), prepared(receiver.url, "text"))


@pytest.mark.parametrize(
    ("given", "host", "encoding"),
    [
        ({}, "127.0.0.1:{}", "identity"),
        ({"host": "app.example"}, "app.example", "identity"),
        ({"HOST": "app.example", "accept-encoding": "gzip"}, "app.example", "gzip"),
    ],
)
def test_host_and_encoding_are_sent_once(adapter_of, given, host, encoding):
    seen = []
    with raw_server(scripted(OK, seen=seen)) as url:
        call(adapter_of(), prepared(f"{url}a%20b?c=d#e", b"body", given))
    lines = seen[0].decode().lower().split("\r\n")
    assert lines[0] == "post /a%20b?c=d http/1.1"
    port = url.rstrip("/").rpartition(":")[2]
    assert [line for line in lines if line.startswith("host:")] == [f"host: {host.format(port)}"]
    assert [line for line in lines if line.startswith("accept-encoding:")] == [f"accept-encoding: {encoding}"]
    assert [line for line in lines if line.startswith("content-length:")] == ["content-length: 4"]
    assert lines[-2:] == ["", "body"]


def test_a_body_is_never_sent_without_its_length(adapter_of):
    with running_receiver() as receiver:
        request = prepared(receiver.url, b"body")
        del request.headers["Content-Length"]
        assert call(adapter_of(), request) == (204, False)
        assert receiver.received[0].body == b"body"


@pytest.mark.parametrize(("size", "sends"), [(0, 1), (1, 1), (10_000, 1), (PIECE_BYTES, 2)])
def test_head_and_body_are_one_send_if_they_fit_into_a_piece(adapter_of, monkeypatch, size, sends):
    sent = []
    send = BoundedConnection.send

    def counted(self, data):
        sent.append(bytes(data))
        send(self, data)

    monkeypatch.setattr(BoundedConnection, "send", counted)
    with running_receiver() as receiver:
        call(adapter_of(), prepared(receiver.url, b"x" * size))
        assert len(receiver.received[0].body) == size
    assert len(sent) == sends


# --- connections ---


def test_a_closed_idle_connection_is_replaced_silently(adapter_of):
    closed = threading.Event()

    def serve(connection, _stopping):
        read_request(connection)
        connection.sendall(OK)
        connection.shutdown(socket.SHUT_RDWR)
        closed.set()

    with raw_server(serve) as url:
        adapter = adapter_of()
        for _ in range(2):
            assert call(adapter, prepared(url)) == (200, False)
            assert closed.wait(10)
            closed.clear()


@pytest.mark.parametrize("secure", [False, True])
def test_data_on_an_idle_connection_ends_it(adapter_of, certificate, secure):
    """Data that answers no request would be taken for the answer to the next one."""
    context = certificate.context()
    is_idle, has_come = threading.Event(), threading.Event()
    connections = []

    def serve(connection, stopping):
        with context.wrap_socket(connection, server_side=True) if secure else nullcontext(connection) as wrapped:
            connections.append(wrapped)
            read_request(wrapped)
            wrapped.sendall(OK)
            if len(connections) == 1:
                is_idle.wait(10)
                wrapped.sendall(OK.replace(b"200", b"500"))
                has_come.set()

    with raw_server(serve) as url:
        adapter = adapter_of(ca_file=certificate.path)
        request = prepared(url.replace("http:", "https:") if secure else url)
        assert call(adapter, request) == (200, False)
        is_idle.set()
        assert has_come.wait(10)
        assert call(adapter, request) == (200, False)
    assert len(connections) == 2


def test_closing_ends_idle_connections(adapter_of):
    ended = []

    def serve(connection, _stopping):
        read_request(connection)
        connection.sendall(OK)
        ended.append(connection.recv(1))

    with raw_server(serve) as url:
        adapter = adapter_of()
        call(adapter, prepared(url))
        assert ended == []
        adapter.close()
        until(lambda: ended == [b""])


@pytest.mark.parametrize("release", [lambda response: response.close(), lambda response: response.raw.release_conn()])
def test_an_answer_that_is_not_read_ends_its_connection(adapter_of, release):
    connections = []
    script = scripted(OK, OK)

    def serve(connection, stopping):
        connections.append(connection)
        script(connection, stopping)

    with raw_server(serve) as url:
        adapter = adapter_of()
        release(adapter.send_within(prepared(url), DIRECT, 5.0))
        assert call(adapter, prepared(url)) == (200, False)
        adapter.close()
    assert len(connections) == 2


# --- proxies ---


def pump(source, target):
    with suppress(OSError):
        while data := source.recv(65_536):
            target.sendall(data)
    with suppress(OSError):
        target.shutdown(socket.SHUT_RDWR)


@contextmanager
def tunnelling(seen, wrap):
    """A proxy that connects to any address and adds the requests to the list `seen`; yields its URL."""

    def serve(connection, _stopping):
        with wrap(connection) as client:
            request = read_request(client)
            seen.append(request)
            host, _, port = request.split()[1].decode().rpartition(":")
            with socket.create_connection((host, int(port)), timeout=5) as target:
                client.sendall(b"HTTP/1.1 103 Early Hints\r\n\r\nHTTP/1.1 200 Connected\r\nX: y\r\n\r\n")
                back = threading.Thread(target=pump, args=(target, client))
                back.start()
                pump(client, target)
                back.join()

    with raw_server(serve) as url:
        yield url.rstrip("/")


@pytest.mark.parametrize("secure", [False, True])
def test_a_tunnel_of_a_proxy_serves_several_requests(adapter_of, certificate, secure):
    context = certificate.context()
    seen = []
    wrap = (lambda connection: context.wrap_socket(connection, server_side=True)) if secure else nullcontext
    with running_receiver() as receiver:
        url = certificate.serve(receiver)
        with tunnelling(seen, wrap) as proxy:
            address = proxy.replace("http://", f"http{'s' if secure else ''}://user:p%40ss@")
            adapter = adapter_of(ca_file=certificate.path)
            for _ in range(2):
                assert call(adapter, prepared(url, b"x"), Environment(proxy=address)) == (204, False)
            adapter.close()
    assert [received.body for received in receiver.received] == [b"x", b"x"]
    assert all("proxy-authorization" not in map(str.lower, received.headers) for received in receiver.received)
    (request,) = seen
    assert request.startswith(b"CONNECT 127.0.0.1:%d HTTP/1." % receiver.server_port)
    assert b"authorization: basic dxnlcjpwqhnz\r\n" in request.lower()


@pytest.mark.parametrize("secure", [False, True])
@pytest.mark.parametrize("scheme", ["", "http://"])
def test_a_proxy_gets_the_whole_url_and_its_login(adapter_of, certificate, secure, scheme):
    context = certificate.context()
    seen = []
    script = scripted(OK, OK, seen=seen)

    def serve(connection, stopping):
        with context.wrap_socket(connection, server_side=True) if secure else nullcontext(connection) as wrapped:
            script(wrapped, stopping)

    with raw_server(serve) as url:
        address = url.rstrip("/").removeprefix("http://")
        proxy = f"{'https://' if secure else scheme}user:p%40ss@{address}"
        adapter = adapter_of(ca_file=certificate.path)
        for _ in range(2):
            assert call(adapter, prepared("http://app.invalid:81/a?b=c"), Environment(proxy=proxy)) == (200, False)
        adapter.close()
    first, second = seen
    assert first == second
    assert first.startswith(b"POST http://app.invalid:81/a?b=c HTTP/1.1\r\nHost: app.invalid:81\r\n")
    assert b"authorization: basic dxnlcjpwqhnz\r\n" in first.lower()


# --- failures ---


def assert_failure(kind, adapter, request, text, **more):
    with pytest.raises(requests.RequestException) as caught:
        call(adapter, request, **more)
    assert type(caught.value) is kind
    assert caught.value.request is request
    assert failure_text(caught.value, 0.3).startswith(text)


def test_a_connection_that_is_refused_is_a_connection_error(adapter_of):
    with closing(socket.create_server(("127.0.0.1", 0))) as listening:
        port = listening.getsockname()[1]
    request = prepared(f"http://127.0.0.1:{port}/")
    assert_failure(requests.ConnectionError, adapter_of(), request, "refused the connection")
    proxied = prepared("http://app.invalid/")
    environment = Environment(proxy=f"http://127.0.0.1:{port}")
    assert_failure(requests.ConnectionError, adapter_of(), proxied, "refused the connection", environment=environment)


def test_an_address_that_drops_packets_is_a_connect_timeout(adapter_of):
    with black_hole() as port:
        request = prepared(f"http://127.0.0.1:{port}/")
        more = {"timeout_secs": 5.0, "connect_secs": 0.3}
        assert_failure(requests.ConnectTimeout, adapter_of(), request, "could not be reached within 0.3 s", **more)


@pytest.mark.parametrize("size", [0, 20_000_000])
def test_silence_is_a_read_timeout_whether_all_was_sent_or_not(adapter_of, size):
    with raw_server(never_reads) as url:
        request = prepared(url, b"x" * size)
        assert_failure(requests.ReadTimeout, adapter_of(), request, "did not answer within 0.3 s", timeout_secs=0.3)


@pytest.mark.parametrize(
    ("data", "kind", "text"),
    [
        (b"nope\r\n\r\n", requests.ConnectionError, "sent an answer that is not HTTP"),
        (b"", requests.ConnectionError, "closed the connection"),
        (OK.replace(b": 2", b": 2, 3"), requests.exceptions.InvalidHeader, "answered with several lengths"),
    ],
)
def test_an_invalid_answer_is_the_error_that_requests_raises(adapter_of, data, kind, text):
    with raw_server(scripted(data)) as url:
        assert_failure(kind, adapter_of(), prepared(url), text)


def test_a_certificate_of_an_unknown_ca_is_an_ssl_error(adapter_of, certificate):
    with running_receiver() as receiver:
        request = prepared(certificate.serve(receiver))
        assert_failure(requests.exceptions.SSLError, adapter_of(), request, "cannot be trusted")


def test_an_address_of_another_scheme_is_an_invalid_url(adapter_of):
    assert_failure(requests.exceptions.InvalidURL, adapter_of(), prepared("ftp://app.example/"), "could not be called")
