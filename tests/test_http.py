"""A call ends in time, whatever it is that does not."""

import os
import shutil
import socket
import ssl
import subprocess
import threading
import time
from contextlib import closing
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest
import requests
from urllib3.exceptions import HTTPError

from tests.receiver import black_hole, drip, never_reads, raw_server, reads_slowly, running_receiver, until
from vodpoller.http import (
    DeadlineAdapter,
    Environment,
    ForbiddenAddressError,
    causes,
    environment_of,
    failure_text,
    retry_after_secs,
    shown_url,
)

SLACK_SECS = 1.5
BARE = Environment(proxies={}, verify=True, proxy="")
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


@pytest.fixture(autouse=True)
def no_proxies(monkeypatch):
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.fixture
def adapter_of():
    adapters = []

    def make(**more):
        adapters.append(DeadlineAdapter(connections=2, **more))
        return adapters[-1]

    yield make
    for adapter in adapters:
        adapter.close()


def call(adapter, url, timeout_secs=5.0, *, body=None, environment=BARE, **more):
    request = requests.Request("POST", url, data=body).prepare()
    with closing(adapter.send_within(request, environment, timeout_secs, **more)) as response:
        return response.raw.read()


def failure_of(adapter, url, timeout_secs=0.3, **more):
    """What a person is told of a call that fails, and within its time."""
    began = time.monotonic()
    with pytest.raises((requests.RequestException, HTTPError)) as excinfo:
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


class Resolver:
    """In place of socket.getaddrinfo: knows the names that it was told, and remembers who asked in which thread."""

    def __init__(self, **addresses):
        self.addresses = addresses
        self.asked = []

    def __call__(self, host, port, **kwargs):
        self.asked.append((host, threading.current_thread() is threading.main_thread()))
        return [entry(address, port) for address in self.addresses.get(host.partition(".")[0], [host])]


def entry(address, port):
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    return (family, socket.SOCK_STREAM, 6, "", (address, port))


# --- the time limit ---


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
    ids=["status", "header", "headers", "continue", "body", "chunks", "trailers", "no length", "deaf", "slow"],
)
def test_whoever_goes_on_slowly_forever_costs_no_more_than_the_time_limit(adapter_of, serve):
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
        said = failure_of(adapter_of(), url, 10.0)
    assert said == "closed the connection without a whole answer"


def test_a_tls_handshake_that_never_ends_costs_no_more_than_the_time_limit(adapter_of):
    with raw_server(drip(b"", b"\x16")) as url:
        failure_of(adapter_of(), url.replace("http:", "https:"))
    with raw_server(never_reads) as url:
        said = failure_of(adapter_of(), url.replace("http:", "https:"))
    assert said == "did not answer within 0.3 s"


def test_a_tunnel_that_never_opens_costs_no_more_than_the_time_limit(adapter_of):
    with raw_server(drip(b"HTTP/1.1 200 OK\r\n", b"X: y\r\n")) as proxy:
        environment = Environment(proxies={"https": proxy}, verify=True, proxy=proxy)
        assert failure_of(adapter_of(), "https://app.example/", environment=environment)


def test_an_address_that_swallows_packets_costs_no_more_than_the_time_limit(adapter_of):
    with black_hole() as port:
        said = failure_of(adapter_of(), f"http://127.0.0.1:{port}/")
    assert said == "could not be reached within 0.3 s (is a firewall in between?)"


def test_connecting_can_have_less_time_than_the_whole_call(adapter_of):
    with black_hole() as port:
        began = time.monotonic()
        with pytest.raises(requests.ConnectTimeout):
            call(adapter_of(), f"http://127.0.0.1:{port}/", 20.0, connect_secs=0.2)
        assert time.monotonic() - began < 0.2 + SLACK_SECS


def test_an_address_that_swallows_packets_leaves_time_for_the_next_one(adapter_of):
    with black_hole() as port, running_receiver() as receiver:
        addresses = [entry("127.0.0.1", port), entry("127.0.0.1", receiver.server_port)]
        call(adapter_of(resolve=lambda *args, **kwargs: addresses), "http://app.example/", 1.0)
        assert len(receiver.accepted) == 1


def test_a_lookup_that_hangs_costs_no_more_than_the_time_limit(adapter_of):
    released, ended = threading.Event(), threading.Event()

    def resolve(*args, **kwargs):
        released.wait(20)
        ended.set()
        return []

    said = failure_of(adapter_of(resolve=resolve), "http://app.example/")
    assert said.startswith("could not be reached within 0.3 s")
    released.set()
    until(ended.is_set)


def test_what_is_left_of_the_time_shrinks_from_step_to_step(adapter_of):
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
    assert resolver.asked == [("app.example", False)]


@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]"])
def test_an_address_needs_no_thread(adapter_of, host):
    resolver = Resolver()
    failure_of(adapter_of(resolve=resolver), f"http://{host}:1/")
    assert resolver.asked == [(host.strip("[]"), True)]


def test_a_name_that_does_not_exist_is_told(adapter_of):
    def resolve(*args, **kwargs):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    said = failure_of(adapter_of(resolve=resolve), "http://nobody.example/")
    assert said == "cannot be found: Name or service not known (is the name right, does DNS work?)"


def test_a_name_without_an_address_is_told(adapter_of):
    assert "cannot be reached" in failure_of(adapter_of(resolve=lambda *args, **kwargs: []), "http://nobody.example/")


def test_no_connection_is_made_to_an_address_that_is_not_permitted(adapter_of):
    asked = []
    with running_receiver() as receiver:
        adapter = adapter_of(resolve=Resolver(app=["127.0.0.1"]), permits=asked.append)
        with pytest.raises(requests.RequestException) as excinfo:
            call(adapter, receiver.url.replace("127.0.0.1", "app.example"))
        assert receiver.connections == []
    assert asked == ["127.0.0.1"]
    assert any(isinstance(cause, ForbiddenAddressError) for cause in causes(excinfo.value))
    assert failure_text(excinfo.value, 5.0) == "is at 127.0.0.1, to which no connection may be made"


def test_of_several_addresses_the_permitted_ones_are_used(adapter_of):
    with running_receiver() as receiver:
        resolver = Resolver(app=["127.0.0.2", "127.0.0.1"])
        adapter = adapter_of(resolve=resolver, permits=lambda address: address == "127.0.0.1")
        call(adapter, receiver.url.replace("127.0.0.1", "app.example"))
        assert len(receiver.connections) == 1


def test_the_address_of_a_proxy_is_not_asked_for(adapter_of):
    with running_receiver() as proxy:
        address = f"http://127.0.0.1:{proxy.server_port}"
        environment = Environment(proxies={"http": address}, verify=True, proxy=address)
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


def test_tls_carries_large_requests_and_answers(adapter_of, tmp_path):
    if shutil.which("openssl") is None and "CI" not in os.environ:
        pytest.skip("openssl is not installed")
    pem, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=receiver"
    names = ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(pem), "-out", str(certificate)]
    subprocess.run([*command.split(), *names], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, pem)
    with running_receiver() as receiver:
        receiver.socket = context.wrap_socket(receiver.socket, server_side=True)
        url = receiver.url.replace("http:", "https:")
        environment = Environment(proxies={}, verify=str(certificate), proxy="")
        adapter = adapter_of()
        call(adapter, url, body=b"x" * 1_000_000, environment=environment)
        call(adapter, url, body=b"y", environment=environment)
        assert [len(received.body) for received in receiver.received] == [1_000_000, 1]
        assert len({received.peer for received in receiver.received}) == 1
        adapter.connect_within(url, environment, 5.0)
        assert "cannot be trusted" in failure_of(adapter_of(), url, 5.0)


def test_a_connection_alone_sends_nothing(adapter_of):
    seen = []

    def serve(connection, stopping):
        seen.append(connection.recv(65_536))

    with raw_server(serve) as url:
        adapter_of().connect_within(url, BARE, 5.0)
        until(lambda: seen)
    assert seen == [b""]


def test_a_connection_alone_keeps_to_the_time_limit(adapter_of):
    with black_hole() as port:
        began = time.monotonic()
        with pytest.raises(HTTPError) as excinfo:
            adapter_of().connect_within(f"http://127.0.0.1:{port}/", BARE, 0.3)
        assert time.monotonic() - began < 0.3 + SLACK_SECS
    assert failure_text(excinfo.value, 0.3).startswith("could not be reached within 0.3 s")


# --- the environment ---


def test_the_environment_is_that_of_the_url(monkeypatch, tmp_path):
    monkeypatch.setenv("https_proxy", "http://proxy.example:3128")
    monkeypatch.setenv("no_proxy", "near.example")
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(tmp_path))
    far = environment_of("https://far.example/")
    assert (far.proxy, far.verify, far.problem) == ("http://proxy.example:3128", str(tmp_path), "")
    assert environment_of("https://near.example/").proxy == ""
    assert environment_of("http://far.example/").proxy == ""


def test_a_ca_bundle_that_does_not_exist_is_a_problem(monkeypatch, tmp_path):
    assert environment_of("https://app.example/").problem == ""
    monkeypatch.setenv("CURL_CA_BUNDLE", str(tmp_path / "nothing.pem"))
    assert "nothing.pem, which does not exist" in environment_of("https://app.example/").problem


# --- words ---


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


def test_what_is_told_of_a_failure_holds_nothing_of_the_url(adapter_of):
    with closing(socket.create_server(("127.0.0.1", 0))) as listening:
        port = listening.getsockname()[1]
    said = failure_of(adapter_of(), f"http://127.0.0.1:{port}/hook?token=hunter2")
    assert said == "refused the connection (is the receiver running?)"


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


def test_an_error_of_no_known_kind_is_named():
    assert failure_text(ZeroDivisionError("x"), 1.0) == "cannot be reached: ZeroDivisionError"
