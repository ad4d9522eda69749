"""A call ends within its time limit, whichever of its steps hangs; connections are used again only if that is safe."""

import logging
import socket
import struct
import threading
import time
from contextlib import closing, nullcontext
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest
import requests
from urllib3.exceptions import HTTPError

from tests.polling import until
from tests.receiver import (
    Answer,
    Receiver,
    black_hole,
    drip,
    never_reads,
    raw_server,
    read_request,
    reads_slowly,
    running_receiver,
)
from vodpoller.httpclient.address import Environment, environment_of, host_header, shown_url
from vodpoller.httpclient.transport import CALL_ERRORS, DeadlineAdapter, was_repeated
from vodpoller.httpclient.words import ForbiddenAddressError, causes, failure_text, retry_after_secs

SLACK_SECS = 1.5
BARE = Environment(proxy="")
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


@pytest.fixture(autouse=True)
def no_proxies(monkeypatch):
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


def call(adapter, url, timeout_secs=5.0, *, body=None, environment=BARE, **more):
    request = requests.Request("POST", url, data=body).prepare()
    with closing(adapter.send_within(request, environment, timeout_secs, **more)) as response:
        return response.raw.read()


def failure_of(adapter, url, timeout_secs=0.3, **more):
    """The text for the operator of a call that fails; checks that it fails within its time limit."""
    began = time.monotonic()
    with pytest.raises(CALL_ERRORS) as excinfo:
        call(adapter, url, timeout_secs, **more)
    assert time.monotonic() - began < timeout_secs + SLACK_SECS
    return failure_text(excinfo.value, timeout_secs)


def answers(data=OK, times=1):
    def serve(connection, stopping):
        for _ in range(times):
            connection.recv(65_536)
            connection.sendall(data)
        stopping.wait(20)

    return serve


class Script:
    """Answers each request, on any connection, with the next of its answers; None closes the connection."""

    def __init__(self, *answers, wrap=lambda connection: connection):
        self.answers = list(answers)
        self.requests = []
        self.connections = 0
        self.wrap = wrap

    def __call__(self, connection, stopping):
        self.connections += 1
        with self.wrap(connection) as wrapped:
            while request := read_request(wrapped):
                self.requests.append(request)
                assert self.answers, f"more requests than answers: {self.requests}"
                answer = self.answers.pop(0)
                if answer is None:
                    return
                if callable(answer):
                    answer(wrapped, stopping)
                    return
                wrapped.sendall(answer)


def resets(connection, stopping):
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def breaks_off(connection, stopping):
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Le")


def ends_with_a_line(connection, stopping):
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n")


def is_silent(connection, stopping):
    stopping.wait(20)


def answer(status, body=b"", *headers):
    head = [f"HTTP/1.1 {status} X", f"Content-Length: {len(body)}", *headers]
    return "\r\n".join(head).encode() + b"\r\n\r\n" + body


def status_of(adapter, url, timeout_secs=5.0):
    """The status and the body, and whether the request was sent twice."""
    request = requests.Request("POST", url).prepare()
    with closing(adapter.send_within(request, BARE, timeout_secs)) as response:
        return response.status_code, response.raw.read(), was_repeated(response)


class Resolver:
    """Replaces socket.getaddrinfo: knows the given names; records each look-up, and if the main thread made it."""

    def __init__(self, **addresses):
        self.addresses = addresses
        self.lookups = []

    def __call__(self, host, port, **kwargs):
        self.lookups.append((host, threading.current_thread() is threading.main_thread()))
        return [entry(address, port) for address in self.addresses.get(host.partition(".")[0], [host])]


def entry(address, port):
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    return (family, socket.SOCK_STREAM, 6, "", (address, port))


# --- the time limit ---


@pytest.mark.system
@pytest.mark.parametrize(
    "serve",
    [
        drip(b"", b"H"),
        drip(b"HTTP/1.1 200 OK\r\nX: ", b"x"),
        drip(b"HTTP/1.1 200 OK\r\n", b"X: y\r\n"),
        drip(b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
        drip(b"HTTP/1.1 200 OK\r\nContent-Length: 60000\r\n\r\n", b"x"),
        drip(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\nx\r\n"),
        drip(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n", b"X: y\r\n"),
        drip(b"HTTP/1.0 200 OK\r\n\r\n", b"x"),
        never_reads,
        reads_slowly,
    ],
    ids=["status", "header", "headers", "continue", "body", "chunks", "trailers", "no length", "unread", "slow"],
)
def test_the_time_limit_ends_a_call_to_an_endlessly_slow_server(adapter_of, serve):
    with raw_server(serve) as url:
        body = b"x" * 20_000_000 if serve in (never_reads, reads_slowly) else b""
        assert failure_of(adapter_of(), url, body=body) == "did not answer within 0.3 s"


def test_an_endless_head_is_not_read_to_its_end(adapter_of):
    def serve(connection, stopping):
        connection.recv(65_536)
        connection.sendall(b"HTTP/1.1 200 OK\r\n")
        while not stopping.is_set():
            connection.sendall(b"X: y\r\n" * 1000)

    with raw_server(serve) as url:
        text = failure_of(adapter_of(), url, 10.0)
    assert text == "answered with a head that is too long to be read"


def test_the_time_limit_ends_an_endless_tls_handshake(adapter_of):
    with raw_server(drip(b"", b"\x16")) as url:
        failure_of(adapter_of(), url.replace("http:", "https:"))
    with raw_server(never_reads) as url:
        text = failure_of(adapter_of(), url.replace("http:", "https:"))
    assert text == "did not answer within 0.3 s"


def test_the_time_limit_ends_a_tunnel_that_never_opens(adapter_of):
    with raw_server(drip(b"HTTP/1.1 200 OK\r\n", b"X: y\r\n")) as proxy:
        environment = Environment(proxy=proxy)
        assert failure_of(adapter_of(), "https://app.example/", environment=environment)


def test_the_time_limit_ends_a_connect_whose_packets_are_dropped(adapter_of):
    with black_hole() as port:
        text = failure_of(adapter_of(), f"http://127.0.0.1:{port}/")
    assert text == "could not be reached within 0.3 s (is a firewall in between?)"


def test_connecting_can_have_less_time_than_the_whole_call(adapter_of):
    with black_hole() as port:
        began = time.monotonic()
        with pytest.raises(requests.ConnectTimeout):
            call(adapter_of(), f"http://127.0.0.1:{port}/", 20.0, connect_secs=0.2)
        assert time.monotonic() - began < 0.2 + SLACK_SECS


def test_an_address_that_drops_packets_leaves_time_for_the_next_one(adapter_of):
    with black_hole() as port, running_receiver() as receiver:
        addresses = [entry("127.0.0.1", port), entry("127.0.0.1", receiver.server_port)]
        call(adapter_of(resolve=lambda *args, **kwargs: addresses), "http://app.example/", 1.0)
        assert len(receiver.accepted) == 1


def test_the_time_limit_ends_a_lookup_that_hangs(adapter_of):
    released, ended = threading.Event(), threading.Event()

    def resolve(*args, **kwargs):
        released.wait(20)
        ended.set()
        return []

    text = failure_of(adapter_of(resolve=resolve), "http://app.example/")
    assert text.startswith("could not be reached within 0.3 s")
    released.set()
    until(ended.is_set)


@pytest.mark.system
def test_all_steps_of_a_call_share_one_time_limit(adapter_of):
    def serve(connection, stopping):
        connection.recv(65_536)
        stopping.wait(0.2)
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n")
        stopping.wait(0.2)
        connection.sendall(b"o")
        stopping.wait(5)

    def resolve(host, port, **kwargs):
        time.sleep(0.2)
        return [entry("127.0.0.1", port)]

    with raw_server(serve) as url:
        began = time.monotonic()
        with pytest.raises(HTTPError):
            call(adapter_of(resolve=resolve), url.replace("127.0.0.1", "app.example"), 0.8)
        assert 0.75 < time.monotonic() - began < 1.3


# --- lookups and connections ---


def test_a_name_is_looked_up_in_another_thread_once_for_a_connection(adapter_of):
    resolver = Resolver(app=["127.0.0.1"])
    with raw_server(answers(times=3)) as url:
        adapter = adapter_of(resolve=resolver)
        for _ in range(3):
            assert call(adapter, url.replace("127.0.0.1", "app.example")) == b"ok"
    assert resolver.lookups == [("app.example", False)]


@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]"])
def test_an_address_needs_no_thread(adapter_of, host):
    resolver = Resolver()
    failure_of(adapter_of(resolve=resolver), f"http://{host}:1/")
    assert resolver.lookups == [(host.strip("[]"), True)]


def test_a_name_that_does_not_exist_is_reported(adapter_of):
    def resolve(*args, **kwargs):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    text = failure_of(adapter_of(resolve=resolve), "http://unknown.example/")
    assert text == "cannot be found: Name or service not known (is the name right, does DNS work?)"


def test_a_name_without_an_address_is_reported(adapter_of):
    text = failure_of(adapter_of(resolve=lambda *args, **kwargs: []), "http://unknown.example/")
    assert text == "cannot be reached: it has no address"


def test_no_connection_is_made_to_an_address_that_is_not_permitted(adapter_of):
    checked = []
    with running_receiver() as receiver:
        adapter = adapter_of(resolve=Resolver(app=["127.0.0.1"]), permits=checked.append)
        with pytest.raises(requests.RequestException) as excinfo:
            call(adapter, receiver.url.replace("127.0.0.1", "app.example"))
        assert receiver.connections == []
    assert checked == ["127.0.0.1"]
    assert any(isinstance(cause, ForbiddenAddressError) for cause in causes(excinfo.value))
    assert failure_text(excinfo.value, 5.0) == "is at 127.0.0.1, to which no connection may be made"


def test_only_the_permitted_of_several_addresses_are_used(adapter_of):
    with running_receiver() as receiver:
        resolver = Resolver(app=["127.0.0.2", "127.0.0.1"])
        adapter = adapter_of(resolve=resolver, permits=lambda address: address == "127.0.0.1")
        call(adapter, receiver.url.replace("127.0.0.1", "app.example"))
        assert len(receiver.connections) == 1


def test_the_address_of_a_proxy_needs_no_permission(adapter_of):
    with running_receiver() as proxy:
        address = f"http://127.0.0.1:{proxy.server_port}"
        environment = Environment(proxy=address)
        call(adapter_of(permits=lambda address: False), "http://app.invalid/", environment=environment)
        assert proxy.received[0].path == "http://app.invalid/"


def test_an_answer_that_ends_the_connection_is_read_to_its_end(adapter_of):
    body = b"x" * 500_000
    with raw_server(answers(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 500000\r\n\r\n" + body)) as url:
        assert call(adapter_of(), url) == body


def test_a_large_request_arrives_whole(adapter_of):
    with running_receiver() as receiver:
        call(adapter_of(), receiver.url, body=bytes(range(256)) * 20_000)
        assert receiver.received[0].body == bytes(range(256)) * 20_000


@pytest.mark.system
def test_tls_carries_large_requests_and_answers(adapter_of, certificate):
    with running_receiver() as receiver:
        url = certificate.serve(receiver)
        adapter = adapter_of(ca_file=certificate.path)
        call(adapter, url, body=b"x" * 1_000_000)
        call(adapter, url, body=b"y")
        assert [len(received.body) for received in receiver.received] == [1_000_000, 1]
        assert len({received.peer for received in receiver.received}) == 1
        adapter.connect_within(url, BARE, 5.0)


def test_connecting_alone_sends_nothing(adapter_of):
    seen = []

    def serve(connection, stopping):
        seen.append(connection.recv(65_536))

    with raw_server(serve) as url:
        adapter_of().connect_within(url, BARE, 5.0)
        until(lambda: seen)
    assert seen == [b""]


def test_connecting_alone_keeps_to_the_time_limit(adapter_of):
    with black_hole() as port:
        began = time.monotonic()
        with pytest.raises(HTTPError) as excinfo:
            adapter_of().connect_within(f"http://127.0.0.1:{port}/", BARE, 0.3)
        assert time.monotonic() - began < 0.3 + SLACK_SECS
    assert failure_text(excinfo.value, 0.3).startswith("could not be reached within 0.3 s")


# --- request and answer belong together ---


@pytest.mark.parametrize(
    "interim",
    [
        b"HTTP/1.1 100 Continue\r\n\r\n",
        b"HTTP/1.1 103 Early Hints\r\nLink: </a.css>; rel=preload\r\n\r\n",
        b"HTTP/1.1 102 Processing\r\n\r\n" * 5,
        b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nContent-Length: 5\r\n\r\n",
        b"HTTP/1.1 199 Never Heard Of\r\n\r\n",
    ],
)
def test_an_interim_answer_is_not_the_answer(adapter_of, interim):
    script = Script(interim + answer(503, b"no"), answer(200, b"yes"), interim + answer(200, b"again"))
    with raw_server(script) as url:
        adapter = adapter_of()
        assert [status_of(adapter, url)[:2] for _ in range(3)] == [(503, b"no"), (200, b"yes"), (200, b"again")]
        adapter.close()
    assert script.connections == 1


@pytest.mark.parametrize(
    ("interim", "text"),
    [
        (b"HTTP/1.1 103 Early Hints\r\n\r\n" * 21, "sent more than 20 interim answers (1xx)"),
        (b"HTTP/1.1 100 Continue\r\nX: y\r\n\r\n" * 1000, "sent more than 20 interim answers (1xx)"),
        (b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: h2c\r\n\r\n", "wants to switch to another protocol (101)"),
    ],
)
def test_interim_answers_without_end_and_a_switch_end_the_connection(adapter_of, interim, text):
    script = Script(interim + OK, OK)
    with raw_server(script) as url:
        adapter = adapter_of()
        assert failure_of(adapter, url, 5.0).startswith(text)
        assert call(adapter, url) == b"ok"
        adapter.close()
    assert script.connections == 2


def test_an_interim_answer_of_a_proxy_is_not_its_answer(adapter_of):
    script = Script(b"HTTP/1.1 103 Early Hints\r\n\r\nHTTP/1.1 407 Login\r\nContent-Length: 0\r\n\r\n")
    with raw_server(script) as proxy:
        environment = Environment(proxy=proxy)
        text = failure_of(adapter_of(), "https://app.example/", 5.0, environment=environment)
    assert text.startswith("is behind a proxy that answered 407 Proxy Authentication Required (it requires a login")


def padded(extra):
    """An answer that exactly fills the buffer that it is read into, and extra data after it."""
    head = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nX: "
    end = b"\r\n\r\nok"
    return head + b"x" * (8192 - len(head) - len(end)) + end + extra


@pytest.mark.parametrize(
    "unforeseen",
    [
        OK + answer(503),
        OK + b"\r\n",
        OK + b"x" * 20_000,
        padded(b"more"),
        b"HTTP/1.1 204 No Content\r\nContent-Length: 2\r\n\r\nok",
        b"HTTP/1.1 204 No Content\r\nContent-Length: 2\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 2\r\n\r\nok",
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nTransfer-Encoding: gzip, chunked\r\n\r\nok",
        b"HTTP/1.1 200 OK\r\nContent-Length: +2\r\n\r\nok",
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nno header at all\r\n\r\nok",
    ],
)
@pytest.mark.parametrize("secure", [False, True])
def test_after_something_unforeseen_the_connection_is_not_used_again(adapter_of, certificate, unforeseen, secure):
    context = certificate.context()
    script = Script(
        unforeseen,
        answer(200, b"right"),
        wrap=(lambda connection: context.wrap_socket(connection, server_side=True)) if secure else nullcontext,
    )
    with raw_server(script) as url:
        adapter = adapter_of(ca_file=certificate.path)
        target = url.replace("http:", "https:") if secure else url
        status_of(adapter, target)
        assert status_of(adapter, target) == (200, b"right", False)
        adapter.close()
    assert script.connections == 2


@pytest.mark.parametrize("size", [b"-5", b"-1"])
def test_a_chunk_of_negative_length_is_reported(adapter_of, size):
    with raw_server(answers(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + size + b"\r\nok\r\n")) as url:
        assert failure_of(adapter_of(), url, 5.0) == f"sent a chunk of {size.decode()} bytes"


@pytest.mark.parametrize(
    "headers",
    [
        ["Set-Cookie: a=b; expires=Wed, 01 Jan 99999 00:00:00 GMT"],
        ["Content-Type: text/html; charset"],
        ["Content-Type: multipart/mixed"],
        ["Date: " + "9" * 5000],
    ],
)
def test_a_strange_header_makes_no_answer_fail(adapter_of, headers):
    with raw_server(answers(answer(200, b"ok", *headers))) as url:
        assert call(adapter_of(), url) == b"ok"


def socks_server(script):
    """A SOCKS server (RFC 1928) without login: accepts CONNECT, then answers from a script."""

    def serve(connection, stopping):
        version, methods = connection.recv(2)
        connection.recv(methods)
        connection.sendall(bytes([version, 0]))
        connection.recv(65_536)
        connection.sendall(bytes([version, 0, 0, 1, 0, 0, 0, 0, 0, 0]))
        script(connection, stopping)

    return serve


@pytest.mark.system
@pytest.mark.parametrize("unforeseen", [OK + answer(503), b"HTTP/1.1 103 Early Hints\r\n\r\n" + OK + OK])
def test_connections_through_a_socks_proxy_are_reused_as_safely(adapter_of, monkeypatch, unforeseen):
    script = Script(unforeseen, answer(200, b"right"), None, answer(200, b"again"), drip(b"HTTP/1.1 200", b" "))
    with raw_server(socks_server(script)) as url:
        monkeypatch.setenv("http_proxy", url.replace("http:", "socks5h:").rstrip("/"))
        environment = environment_of("http://app.example/")
        adapter = adapter_of()
        found = [call(adapter, "http://app.example/", environment=environment) for _ in range(3)]
        assert found == [b"ok", b"right", b"again"]
        assert failure_of(adapter, "http://app.example/", environment=environment) == "did not answer within 0.3 s"
        adapter.close()
    assert script.connections == 3


# --- connections that were idle ---


@pytest.mark.parametrize(("idle_secs", "connections"), [(29.0, 1), (31.0, 2), (3600.0, 2)])
def test_a_connection_that_was_idle_for_long_is_not_used(adapter_of, clock, idle_secs, connections):
    script = Script(OK, OK)
    with raw_server(script) as url:
        adapter = adapter_of(monotonic=clock)
        call(adapter, url)
        clock.advance(idle_secs)
        assert status_of(adapter, url) == (200, b"ok", False)
        adapter.close()
    assert script.connections == connections


@pytest.mark.parametrize("failure", [None, resets])
@pytest.mark.parametrize("size", [0, 5_000_000])
def test_a_request_on_a_broken_idle_connection_is_sent_again(adapter_of, failure, size):
    script = Script(OK, failure, OK)
    with raw_server(script) as url:
        adapter = adapter_of()
        call(adapter, url)
        request = requests.Request("POST", url, data=b"x" * size).prepare()
        with closing(adapter.send_within(request, BARE, 5.0)) as response:
            assert response.raw.read() == b"ok"
            assert was_repeated(response)
        adapter.close()
    assert script.connections == 2
    assert script.requests[1] == script.requests[2]


def test_a_request_that_is_sent_again_has_its_own_connect_time(adapter_of):
    def resets_late(connection, stopping):
        stopping.wait(0.4)
        resets(connection, stopping)

    script = Script(OK, resets_late, OK)
    with raw_server(script) as url:
        adapter = adapter_of()
        call(adapter, url)
        request = requests.Request("POST", url).prepare()
        with closing(adapter.send_within(request, BARE, 10.0, connect_secs=0.3)) as response:
            assert was_repeated(response)
        adapter.close()


def test_each_idle_connection_that_breaks_takes_one_try(adapter_of):
    broken = threading.Event()

    class Breaking(Receiver):
        def answer_to(self, received):
            return Answer(204, hangs=broken.is_set() and received.peer in first)

    first = set()
    with running_receiver(Breaking()) as receiver:
        adapter = DeadlineAdapter(connections=8)
        barrier = threading.Barrier(8)

        def post(statuses):
            barrier.wait(10)
            statuses.append(status_of(adapter, receiver.url))

        for statuses in ([], []):
            if receiver.received:
                first = {received.peer for received in receiver.received}
                broken.set()
                receiver.released.set()
            threads = [threading.Thread(target=post, args=(statuses,)) for _ in range(8)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert [status for status, _, _ in statuses] == [204] * 8
        adapter.close()


@pytest.mark.parametrize(
    ("answered", "text"),
    [
        ([None], "closed the connection without a whole answer"),
        ([OK, breaks_off], "closed the connection without a whole answer"),
        ([OK, ends_with_a_line], "closed the connection without a whole answer"),
        ([OK, b"HTTP/1.1 103 Early Hints\r\n\r\n", None], "did not answer within 0.3 s"),
        ([OK, is_silent], "did not answer within 0.3 s"),
    ],
)
def test_a_request_that_may_have_arrived_is_not_sent_again(adapter_of, answered, text):
    script = Script(*answered, OK)
    with raw_server(script) as url:
        adapter = adapter_of()
        if len(answered) > 1:
            call(adapter, url)
        assert failure_of(adapter, url, 0.3) == text
        adapter.close()
    assert len(script.requests) == len(answered[:2])


@pytest.mark.system
def test_a_dead_idle_connection_leaves_time_for_a_new_one(adapter_of):
    kept = []

    def serve(connection, stopping):
        if not kept:
            read_request(connection)
            connection.sendall(OK)
            kept.append(connection.dup())  # stays open, but nothing reads from it
        else:
            read_request(connection)
            connection.sendall(OK)

    with raw_server(serve) as url:
        adapter = adapter_of()
        call(adapter, url)
        began = time.monotonic()
        assert call(adapter, url, 4.0, body=b"x" * 20_000_000) == b"ok"
        assert time.monotonic() - began < 4.0 + SLACK_SECS
        adapter.close()
    for connection in kept:
        connection.close()


# --- what libraries log ---


@pytest.mark.parametrize("line", [b"", b"no header at all hunter2\r\n"])
@pytest.mark.parametrize("query", ["?token=hunter2", "?a=b&sign=hunter2%2F"])
def test_no_line_of_a_library_shows_the_query(adapter_of, caplog, line, query):
    caplog.set_level(logging.DEBUG)
    with raw_server(answers(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n" + line + b"\r\nok")) as url:
        call(adapter_of(), f"{url}hook{query}")
    assert "Starting new HTTP connection" in caplog.text
    assert "hunter2" not in caplog.text


# --- the environment ---


def test_the_proxy_depends_on_the_url(monkeypatch):
    monkeypatch.setenv("https_proxy", "http://proxy.example:3128")
    monkeypatch.setenv("no_proxy", "near.example")
    far = environment_of("https://far.example/")
    assert (far.proxy, far.problem) == ("http://proxy.example:3128", "")
    assert environment_of("https://near.example/").proxy == ""
    assert environment_of("http://far.example/").proxy == ""


@pytest.mark.parametrize(
    "proxy",
    [
        "http://user:hunter2#x@proxy.example:3128",
        "http://user:hunter2@:3128",
        "http://hunter2@[::1",
        "http://hunter2@x:0",
    ],
)
def test_an_unusable_proxy_is_a_problem_that_does_not_show_its_url(adapter_of, monkeypatch, proxy):
    monkeypatch.setenv("https_proxy", proxy)
    environment = environment_of("https://app.example/")
    assert "$https_proxy" in environment.problem
    assert "http://user:password@proxy.example:3128" in environment.problem
    assert "hunter2" not in environment.problem
    with pytest.raises(OSError, match="https_proxy") as excinfo:
        call(adapter_of(), "https://app.example/", environment=environment)
    assert failure_text(excinfo.value, 1.0) == f"cannot be called: {environment.problem}"


# --- texts and headers ---


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("https://user:hunter2@app.example:8080/a/b?sign=hunter2#hunter2", "https://app.example:8080/a/b"),
        ("http://[::1]/x", "http://[::1]/x"),
        ("http://[::1", "an address that cannot be read"),
        ("http://app.example:port/", "an address that cannot be read"),
    ],
)
def test_a_url_is_shown_without_what_may_be_secret(url, shown):
    assert shown_url(url) == shown


def test_the_text_of_a_failure_holds_nothing_of_the_url(adapter_of):
    with closing(socket.create_server(("127.0.0.1", 0))) as listening:
        port = listening.getsockname()[1]
    text = failure_of(adapter_of(), f"http://127.0.0.1:{port}/hook?token=hunter2")
    assert text == "refused the connection (is anything running there?)"


@pytest.mark.parametrize(
    ("text", "secs"),
    [
        ("7", 7.0),
        ("99999999999999999999", 86_400.0),
        (format_datetime(datetime.fromtimestamp(1_700_000_060, UTC), usegmt=True), 60.0),
        (format_datetime(datetime.fromtimestamp(1_700_000_000, UTC) - timedelta(days=1), usegmt=True), 0.0),
        ("soon", None),
        ("-5", None),
        ("", None),
    ],
)
def test_retry_after_is_read_as_seconds_or_a_date(text, secs):
    assert retry_after_secs({"Retry-After": text}, 1_700_000_000.0) == secs


def test_an_error_of_an_unknown_kind_is_named():
    assert failure_text(ZeroDivisionError("x"), 1.0) == "could not be called: ZeroDivisionError"


@pytest.mark.parametrize(
    ("url", "header"),
    [
        ("https://vod.example/", "vod.example"),
        ("https://vod.example:443/", "vod.example"),
        ("http://vod.example:443/", "vod.example:443"),
        ("http://[::1]:8080/", "[::1]:8080"),
        ("http://[::1]/", "[::1]"),
    ],
)
def test_the_host_header_has_a_port_unless_it_is_the_schemes_own(url, header):
    assert host_header(url) == header
