import base64
import socket
import threading
import time
from contextlib import closing
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from urllib.parse import urlsplit

import pytest
from pydantic import ValidationError
from standardwebhooks.webhooks import Webhook, WebhookVerificationError

from tests.certificates import make_certificate
from tests.helpers import sink_context
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
from vodpoller import __version__
from vodpoller.errors import ConfigError, RejectedError, TransientError
from vodpoller.events.event import make_event
from vodpoller.secret import Secret
from vodpoller.sinks.webhook.config import WebhookConfig
from vodpoller.sinks.webhook.sink import WebhookSink

SECRET = "whsec_" + base64.b64encode(bytes(range(32))).decode()
OTHER_SECRET = "whsec_" + base64.b64encode(bytes(range(100, 132))).decode()
SLACK_SECS = 1.5


def event(number=1, **more):
    return make_event({"EventType": "NewFileUpload", "Number": number, **more}, source="main", sub_app_id=None)


@pytest.fixture(autouse=True)
def no_proxies(monkeypatch):
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    for name in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def opened():
    sinks = []

    def open_it(url, **more):
        times = {name: more.pop(name) for name in ("wall", "monotonic") if name in more}
        sinks.append(WebhookSink("hook", WebhookConfig(type="webhook", url=url, **more), sink_context(**times)))
        return sinks[-1]

    yield open_it
    for sink in sinks:
        sink.close()


def failure_of(sink, kind=TransientError, timeout_secs=5.0):
    with pytest.raises(kind) as excinfo:
        sink.deliver([event()], timeout_secs)
    return excinfo.value


# --- configuration ---


@pytest.mark.parametrize(
    "url",
    [
        "",
        "app.example/callback",
        "ftp://app.example/",
        "http://",
        "http:///path",
        "http://app.example:99999/",
        "http://app.example:port/",
        "http://app example/",
        "http://app.example/\npath",
        "http://[::1/",
        "http://.example:80/",
    ],
)
def test_a_url_that_is_not_http_is_refused(url):
    with pytest.raises(ValidationError) as excinfo:
        WebhookConfig(type="webhook", url=url)
    assert [error["loc"] for error in excinfo.value.errors()] == [("url",)]


def test_credentials_in_the_url_are_refused_without_being_shown():
    with pytest.raises(ValidationError) as excinfo:
        WebhookConfig(type="webhook", url="https://user:hunter2@app.example/")
    (error,) = excinfo.value.errors()
    assert "headers" in error["msg"]
    assert "hunter2" not in error["msg"]


@pytest.mark.parametrize(
    "secret",
    [
        "whsec_",
        "hunter2!",
        "whsec_not base64 at all, of any length",
        base64.b64encode(bytes(23)).decode(),
        base64.b64encode(bytes(65)).decode(),
        base64.b64encode(b"\xff" * 32).decode().replace("/", "_"),
    ],
)
def test_a_secret_that_cannot_sign_is_refused_with_a_remedy(secret):
    with pytest.raises(ValidationError) as excinfo:
        WebhookConfig(type="webhook", url="https://app.example/", secret=secret)
    (error,) = excinfo.value.errors()
    assert error["loc"] == ("secret",)
    assert "openssl rand -base64 32" in error["msg"]
    assert secret not in error["msg"].replace("whsec_ and base64", "")


@pytest.mark.parametrize(
    "headers",
    [
        {"Content-Length": "5"},
        {"content-type": "text/plain"},
        {"Transfer-Encoding": "chunked"},
        {"Connection": "close"},
        {"Webhook-Id": "mine"},
        {"webhook-anything": "mine"},
        {"": "empty"},
        {"X Y": "blank"},
        {"X:": "colon"},
        {"X": ""},
        {"X": " blank"},
        {"X": "blank "},
        {"X": "a\r\nInjected: yes"},
        {"X": "雪"},
        {"X": "1", "x": "2"},
    ],
)
def test_headers_that_cannot_be_set_are_refused(headers):
    with pytest.raises(ValidationError) as excinfo:
        WebhookConfig(type="webhook", url="https://app.example/", headers=headers)
    assert [error["loc"] for error in excinfo.value.errors()] == [("headers",)]


@pytest.mark.parametrize(
    ("key", "value"),
    [("timeout_secs", 0.09), ("timeout_secs", 301), ("concurrency", 0), ("concurrency", 513), ("retries", 3)],
)
def test_values_out_of_bounds_are_refused(key, value):
    with pytest.raises(ValidationError):
        WebhookConfig(type="webhook", url="https://app.example/", **{key: value})


def test_the_config_shows_neither_secret_nor_header_values():
    config = WebhookConfig(type="webhook", url="https://app.example/", secret=SECRET, headers={"X-Token": "hunter2"})
    assert "hunter2" not in repr(config)
    assert SECRET not in repr(config)


def test_a_ca_bundle_that_does_not_exist_is_a_config_error(opened, monkeypatch, tmp_path):
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(tmp_path / "nothing.pem"))
    with pytest.raises(ConfigError, match=r"nothing\.pem, which does not exist"):
        opened("https://app.example/")


# --- the request ---


def test_the_request_is_the_body_with_its_identity(opened, receiver):
    sink = opened(receiver.url + "?a=b", headers={"Authorization": "Bearer of-tidings"}, wall=lambda: 1_700_000_000.9)
    sink.deliver([event()], 5.0)
    (received,) = receiver.received
    assert (received.method, received.path, received.body) == ("POST", "/callback?a=b", event().body)
    headers = {name.lower(): value for name, value in received.headers.items()}
    assert headers.pop("host") == f"127.0.0.1:{receiver.server_port}"
    assert headers == {
        "accept-encoding": "identity",
        "authorization": "Bearer of-tidings",
        "content-length": str(len(event().body)),
        "content-type": "application/json",
        "user-agent": f"vodpoller/{__version__}",
        "webhook-id": event().key.hex(),
        "webhook-timestamp": "1700000000",
    }


@pytest.mark.parametrize("secret", [SECRET, SECRET.removeprefix("whsec_"), SECRET.rstrip("=")])
def test_the_signature_is_what_standard_webhooks_verifies(opened, receiver, secret):
    opened(receiver.url, secret=secret).deliver([event(Title="雪")], 5.0)
    (received,) = receiver.received
    assert Webhook(SECRET).verify(received.body, received.headers) == event(Title="雪").content
    with pytest.raises(WebhookVerificationError):
        Webhook(OTHER_SECRET).verify(received.body, received.headers)
    with pytest.raises(WebhookVerificationError):
        Webhook(SECRET).verify(received.body + b" ", received.headers)


def test_a_secret_that_was_read_again_signs_the_next_call(opened, receiver, tmp_path):
    path = tmp_path / "hook_secret"
    path.write_text(SECRET + "\n")
    secret = Secret(path=path)
    sink = opened(receiver.url, secret=secret)
    sink.deliver([event(1)], 5.0)
    path.write_text(OTHER_SECRET + "\n")
    secret.reread()
    sink.deliver([event(2)], 5.0)
    for signed_by, received in zip((SECRET, OTHER_SECRET), receiver.received, strict=True):
        Webhook(signed_by).verify(received.body, received.headers)


def test_a_secret_that_was_read_again_and_cannot_sign_sends_nothing(opened, receiver, tmp_path):
    path = tmp_path / "hook_secret"
    path.write_text(SECRET)
    secret = Secret(path=path)
    sink = opened(receiver.url, secret=secret)
    path.write_text("hunter2")
    secret.reread()
    error = failure_of(sink)
    assert "openssl rand -base64 32" in str(error)
    assert "hunter2" not in str(error)
    assert receiver.received == []


def test_connections_are_kept(opened, receiver):
    sink = opened(receiver.url)
    receiver.answer = Answer(200, body=b"thanks")
    for number in range(3):
        sink.deliver([event(number)], 5.0)
    assert len({received.peer for received in receiver.received}) == 1


def test_cookies_are_not_kept(opened, receiver):
    sink = opened(receiver.url)
    receiver.answer = Answer(204, {"Set-Cookie": "session=1; Path=/"})
    sink.deliver([event(1)], 5.0)
    sink.deliver([event(2)], 5.0)
    assert not any("Cookie" in received.headers for received in receiver.received)


def test_the_environments_proxy_is_used_and_looked_up_once(opened, receiver, monkeypatch):
    monkeypatch.setenv("http_proxy", f"http://user:hunter2@127.0.0.1:{receiver.server_port}")
    sink = opened("http://app.invalid/callback")
    monkeypatch.delenv("http_proxy")
    sink.deliver([event()], 5.0)
    (received,) = receiver.received
    assert received.path == "http://app.invalid/callback"
    assert received.headers["Proxy-Authorization"].startswith("Basic ")
    receiver.answer = Answer(503)
    error = failure_of(sink)
    assert str(error) == "app.invalid:80 (through the proxy 127.0.0.1) answered 503 Service Unavailable"


# --- the answer ---


@pytest.mark.parametrize("status", [200, 201, 202, 204, 299])
def test_a_success_status_accepts_the_event(opened, receiver, status):
    receiver.answer = Answer(status)
    opened(receiver.url).deliver([event()], 5.0)


@pytest.mark.parametrize("status", [400, 413, 415, 422])
def test_a_permanent_refusal_rejects_with_the_text_of_the_answer(opened, receiver, status):
    receiver.answer = Answer(status, body=b"no such\n  field: " + "雪".encode() * 300)
    error = failure_of(opened(receiver.url), RejectedError)
    assert f" answered {status} " in str(error)
    assert str(error).endswith(": no such field: " + "雪" * 185)


@pytest.mark.parametrize("status", [401, 403, 404, 405, 408, 409, 410, 425, 429, 499, 500, 502, 503, 504, 599])
def test_any_other_answer_is_transient(opened, receiver, status):
    receiver.answer = Answer(status)
    error = failure_of(opened(receiver.url))
    assert f"127.0.0.1:{receiver.server_port} answered {status}" in str(error)
    assert error.retry_after_secs is None


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_reported_and_not_followed(opened, receiver, status):
    receiver.answer = Answer(status, {"Location": "/new/place?token=hunter2"}, b"x" * 100_000)
    error = failure_of(opened(receiver.url))
    assert f"points to http://127.0.0.1:{receiver.server_port}/new/place:" in str(error)
    assert "sinks.hook.url" in str(error)
    assert "hunter2" not in str(error)
    assert len(receiver.received) == 1


@pytest.mark.parametrize("location", ["http://[::1", "http://app.example:port/", "\\\\", "http://user:hunter2@x/"])
def test_a_redirect_to_an_invalid_url_is_a_transient_error(opened, receiver, location):
    receiver.answer = Answer(302, {"Location": location})
    assert "hunter2" not in str(failure_of(opened(receiver.url)))


@pytest.mark.parametrize(
    ("text", "secs"),
    [
        ("7", 7.0),
        ("0", 0.0),
        (" 120 ", 120.0),
        ("99999999999999999999", 86_400.0),
        (format_datetime(datetime.fromtimestamp(1_700_000_060, UTC), usegmt=True), 60.0),
        (format_datetime(datetime.fromtimestamp(1_700_000_000, UTC) - timedelta(days=1), usegmt=True), 0.0),
        ("Tue, 14 Nov 2023 22:14:20 -0000", 60.0),
        ("Fri, 31 Dec 9999 23:59:59 GMT", 86_400.0),
        ("Fri, 31 Dec 99999999999 23:59:59 GMT", None),
        ("Fri, 31 Dec 2023 23:59:99999999999999999999 GMT", None),
        ("9" * 5000, 86_400.0),
        ("soon", None),
        ("-5", None),
        ("1.5", None),
        ("nan", None),
        ("", None),
        ("Tue, 99 Nov 2023 22:14:20 GMT", None),
    ],
)
@pytest.mark.parametrize("status", [429, 503])
def test_retry_after_is_passed_on(opened, receiver, status, text, secs):
    receiver.answer = Answer(status, {"Retry-After": text})
    assert failure_of(opened(receiver.url, wall=lambda: 1_700_000_000.0)).retry_after_secs == secs


def test_an_echo_of_secret_and_headers_is_not_passed_on(opened, receiver):
    receiver.answer = Answer(400, body=f"x{'y' * 190} hunter2-hunter2 {SECRET}".encode())
    sink = opened(receiver.url, secret=SECRET, headers={"Authorization": "hunter2-hunter2"})
    assert "hunter2" not in str(failure_of(sink, RejectedError))
    receiver.answer = Answer(422, body=f"hunter2-hunter2 {SECRET}".encode())
    assert str(failure_of(sink, RejectedError)).endswith(": *** ***")


TOKEN = "ab/cdefgh"
BASIC = base64.b64encode(b"user:hunter2-hunter2").decode()


@pytest.mark.parametrize(
    ("more", "echo"),
    [
        ({"headers": {"Authorization": f"Bearer {TOKEN}"}}, TOKEN),
        ({"headers": {"Authorization": f"Bearer {TOKEN}"}}, TOKEN.replace("/", "\\/")),
        ({"headers": {"Authorization": f'Token token="{TOKEN}"'}}, TOKEN),
        ({"headers": {"Authorization": f"Basic {BASIC}"}}, BASIC),
        ({"headers": {"Authorization": f"Basic {BASIC}"}}, "hunter2-hunter2"),
        ({"secret": SECRET}, SECRET.removeprefix("whsec_")),
        ({"query": "?key=693a91f6-7xxx"}, "693a91f6-7xxx"),
        ({"query": "?key=a%2Fb%2Fc%2Fd%2Fe"}, "a/b/c/d/e"),
        ({"query": "/hook/0123456789abcdef01234567"}, "0123456789abcdef01234567"),
    ],
)
@pytest.mark.parametrize("kind", ["body", "status line", "redirect"])
def test_an_echo_of_a_part_of_a_secret_is_not_passed_on(opened, more, echo, kind):
    data = {
        "body": b"HTTP/1.1 400 No\r\n\r\nwhat is %b for?",
        "status line": b"what is %b for?\r\n",
        "redirect": b"HTTP/1.1 302 Found\r\nContent-Length: 0\r\nLocation: /%b\r\n\r\n",
    }[kind]

    def serve(connection, stopping):
        read_request(connection)
        connection.sendall(data % echo.encode())

    with raw_server(serve) as url:
        sink = opened(url.rstrip("/") + more.get("query", "/"), **{k: v for k, v in more.items() if k != "query"})
        message = str(failure_of(sink, RejectedError if kind == "body" else TransientError))
    assert echo not in message
    assert ("***" in message) == (kind != "status line")


def test_a_short_value_is_not_hidden(opened, receiver):
    receiver.answer = Answer(400, body=b"no 1 of these 7 fields")
    sink = opened(receiver.url + "?v=1", headers={"X-Version": "7"})
    assert str(failure_of(sink, RejectedError)).endswith(": no 1 of these 7 fields")


def test_an_endless_answer_is_read_up_to_a_limit(opened):
    def serve(connection, stopping):
        connection.recv(65_536)
        connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
        while not stopping.is_set():
            connection.sendall(bytes(65_536))

    with raw_server(serve) as url:
        sink = opened(url)
        sink.deliver([event()], 10.0)
        sink.close()


NO_HTTP = "sent an answer that is not HTTP (is the port right?)"
NOT_WHOLE = "closed the connection without a whole answer"
TOO_LONG = "answered with a head that is too long to be read"


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (b"", NOT_WHOLE),
        (b"HTTP/1.1", NOT_WHOLE),
        (b"HTTP/1.1 abc\r\n\r\n", NO_HTTP),
        (b"SSH-2.0-OpenSSH_9.6\r\n", NO_HTTP),
        (b"220 mail.example ESMTP\r\n", NO_HTTP),
        (b"\x15\x03\x01\x00\x02\x02\x46", "sent an answer that is not HTTP (it speaks TLS"),
        (b"HTTP/2.0 200\r\n\r\n", "answered with a version of HTTP other than 1"),
        (b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 200, TOO_LONG),
        (b"HTTP/1.1 200 " + b"x" * 70_000, TOO_LONG),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 5, 6\r\n\r\n", "answered with several lengths that contradict"),
    ],
)
def test_an_invalid_answer_is_a_transient_error_that_describes_it(opened, answer, expected):
    def serve(connection, stopping):
        read_request(connection)
        connection.sendall(answer)

    with raw_server(serve) as url:
        assert f":{urlsplit(url).port} {expected}" in str(failure_of(opened(url)))


@pytest.mark.parametrize(
    "interim", [b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n", b"HTTP/1.1 102 Processing\r\n\r\n" * 3]
)
def test_an_event_is_accepted_by_its_own_answer_only(opened, interim):
    finals = [b"503 No", b"200 Yes"] * 4

    def serve(connection, stopping):
        while read_request(connection):
            connection.sendall(interim)
            stopping.wait(0.02)
            connection.sendall(b"HTTP/1.1 %b\r\nContent-Length: 0\r\n\r\n" % finals.pop(0))

    with raw_server(serve) as url:
        sink = opened(url)
        for number in range(4):
            with pytest.raises(TransientError, match="answered 503"):
                sink.deliver([event(number)], 5.0)
            sink.deliver([event(number)], 5.0)
        sink.close()


def test_a_request_on_a_closed_idle_connection_is_repeated(opened):
    requests = []

    def serve(connection, stopping):
        while request := read_request(connection):
            requests.append(request)
            if len(requests) == 2:
                return
            connection.sendall(b"HTTP/1.1 204 Yes\r\n\r\n")

    with raw_server(serve) as url:
        sink = opened(url)
        sink.deliver([event(1)], 5.0)
        sink.deliver([event(2)], 5.0)
        sink.close()
    assert requests[1] == requests[2]
    assert b"webhook-id: " + event(2).key.hex().encode() in requests[2]


@pytest.mark.parametrize(
    "proxy", ["http://user:hunter2#x@proxy.example:3128", "http://user:hunter2@proxy.example:99999"]
)
def test_an_unusable_proxy_is_an_error_that_hides_its_password(opened, monkeypatch, proxy):
    monkeypatch.setenv("https_proxy", proxy)
    with pytest.raises(ConfigError, match=r"sinks\.hook\.url: the proxy in the environment") as excinfo:
        opened("https://app.example/")
    assert "hunter2" not in str(excinfo.value)


# --- the time limit ---


@pytest.mark.parametrize("serve", [drip(b"HTTP/1.1 200 OK\r\nX: ", b"x"), drip(b"", b"H"), never_reads, reads_slowly])
def test_an_endlessly_slow_receiver_fails_at_the_time_limit(opened, serve):
    with raw_server(serve) as url:
        sink = opened(url)
        began = time.monotonic()
        with pytest.raises(TransientError, match=r"did not answer within 0\.3 s"):
            sink.deliver([event(Text="x" * 20_000_000)] if serve in (never_reads, reads_slowly) else [event()], 0.3)
        assert time.monotonic() - began < 0.3 + SLACK_SECS


def test_an_endless_body_after_a_success_status_is_accepted(opened):
    with raw_server(drip(b"HTTP/1.1 200 OK\r\nContent-Length: 60000\r\n\r\n", b"x")) as url:
        began = time.monotonic()
        opened(url).deliver([event()], 0.3)
        assert time.monotonic() - began < 0.3 + SLACK_SECS


def test_a_host_that_drops_packets_fails_at_the_time_limit(opened):
    with black_hole() as port:
        sink = opened(f"http://127.0.0.1:{port}/")
        began = time.monotonic()
        error = failure_of(sink, timeout_secs=0.3)
        assert time.monotonic() - began < 0.3 + SLACK_SECS
        assert str(error).startswith(f"127.0.0.1:{port} could not be reached within 0.3 s")


def test_an_address_that_drops_packets_leaves_time_for_the_next_one(opened, receiver, monkeypatch):
    with black_hole() as port:
        addresses = [
            (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", number))
            for number in (port, receiver.server_port)
        ]
        monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: addresses)
        opened("http://app.example/").deliver([event()], 1.0)
    assert len(receiver.accepted) == 1


def test_a_silent_name_server_fails_at_the_time_limit(opened, monkeypatch):
    released = threading.Event()
    ended = threading.Event()

    def look_up(*args, **kwargs):
        released.wait(20)
        ended.set()
        return []

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    sink = opened("http://app.example/")
    began = time.monotonic()
    error = failure_of(sink, timeout_secs=0.3)
    assert time.monotonic() - began < 0.3 + SLACK_SECS
    assert "app.example:80 could not be reached within 0.3 s" in str(error)
    released.set()
    until(ended.is_set)


# --- connections that fail ---


def test_a_refused_connection_names_host_and_port(opened):
    with closing(socket.create_server(("127.0.0.1", 0))) as listening:
        port = listening.getsockname()[1]
    error = failure_of(opened(f"http://127.0.0.1:{port}/hook?token=hunter2"))
    assert str(error) == f"127.0.0.1:{port} refused the connection (is anything running there?)"


def test_a_host_name_that_does_not_exist_is_reported(opened, monkeypatch):
    def look_up(*args, **kwargs):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    assert "unknown.example:443 cannot be found: Name or service" in str(failure_of(opened("https://unknown.example/")))


def test_a_restarted_receiver_gets_events_again(opened):
    with running_receiver() as first:
        port = first.server_port
        sink = opened(first.url)
        sink.deliver([event(1)], 5.0)
    failure_of(sink, timeout_secs=1.0)
    second = Receiver(("127.0.0.1", port))
    thread = threading.Thread(target=second.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        sink.deliver([event(2)], 5.0)
        assert [received.body for received in second.accepted] == [event(2).body]
    finally:
        second.shutdown()
        thread.join()
        second.server_close()


def test_plain_http_where_tls_is_expected_is_a_tls_error(opened, receiver):
    error = failure_of(opened(receiver.url.replace("http:", "https:")))
    assert "failed at TLS" in str(error)


def test_a_certificate_of_an_unknown_ca_is_refused_with_a_remedy(opened, receiver, certificate):
    error = failure_of(opened(certificate.serve(receiver)))
    assert "cannot be trusted: self" in str(error)
    assert "in ca_file" in str(error)
    assert receiver.received == []


@pytest.mark.parametrize("variable", ["SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"])
def test_a_certificate_of_the_environments_ca_bundle_is_accepted(opened, receiver, certificate, monkeypatch, variable):
    monkeypatch.setenv(variable, str(certificate.path))
    sink = opened(certificate.serve(receiver))
    sink.deliver([event(1)], 5.0)
    sink.deliver([event(2, Text="x" * 1_000_000)], 5.0)
    assert [received.body for received in receiver.accepted] == [event(1).body, event(2, Text="x" * 1_000_000).body]


def test_ca_file_is_read_again_at_reopen(opened, receiver, certificate, tmp_path):
    (tmp_path / "other").mkdir()
    trusted = tmp_path / "trusted.pem"
    trusted.write_bytes(make_certificate(tmp_path / "other").path.read_bytes())
    sink = opened(certificate.serve(receiver), ca_file=str(trusted))
    assert "cannot be trusted" in str(failure_of(sink))
    trusted.write_bytes(certificate.path.read_bytes())
    sink.reopen()
    sink.deliver([event(1)], 5.0)
    trusted.unlink()
    with pytest.raises(ConfigError, match=r"sinks\.hook\.ca_file: .*does not exist; what was read before stays in use"):
        sink.reopen()
    sink.deliver([event(2)], 5.0)
    assert len(receiver.accepted) == 2


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "does not exist"),
        (b"", "holds no certificate"),
        (b"\x30\x82\x01\x0a", "holds no certificate"),
        (b"-----BEGIN CERTIFICATE-----\nMII=\n-----END CERTIFICATE-----\n", "holds a certificate that cannot be read"),
    ],
)
def test_a_ca_file_that_cannot_be_used_is_refused(tmp_path, content, expected):
    path = tmp_path / "ca.pem"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValidationError) as excinfo:
        WebhookConfig(type="webhook", url="https://app.example/", ca_file=str(path))
    (error,) = excinfo.value.errors()
    assert error["loc"] == ("ca_file",)
    assert expected in error["msg"]


# --- closing ---


def test_closing_does_not_wait_for_a_call_that_hangs(opened, receiver):
    receiver.answer = Answer(hangs=True)
    sink = opened(receiver.url)
    errors = []

    def deliver():
        try:
            sink.deliver([event()], 5.0)
        except TransientError as error:
            errors.append(error)

    delivering = threading.Thread(target=deliver)
    delivering.start()
    until(lambda: receiver.received)
    sink.close()
    assert delivering.is_alive()
    receiver.released.set()
    delivering.join()
    assert len(errors) == 1
