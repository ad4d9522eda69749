"""One request and one answer, whatever the answer contains."""

import gzip
import json
import socket
import sys
import threading
import time
import tracemalloc
from contextlib import contextmanager, suppress
from email.utils import formatdate
from itertools import pairwise
from pathlib import Path

import pytest
import requests
import responses
import structlog
from hypothesis import given
from hypothesis import strategies as st
from requests.adapters import HTTPAdapter

from tests.certificates import make_certificate
from tests.helpers import FakeClock
from tests.receiver import Answer, Receiver, running_receiver
from vodpoller import __version__
from vodpoller.errors import (
    ConfigError,
    ForeignAnswerError,
    NoKeyError,
    OperatorError,
    RefusedHandlesError,
    ThrottledError,
    TransientError,
    VodpollerError,
)
from vodpoller.httpclient.transport import DeadlineAdapter
from vodpoller.logs import CATALOGUE
from vodpoller.simulator.options import SimulatorOptions
from vodpoller.simulator.service import Simulator
from vodpoller.vod.answers import PULL_ERROR_CODES, Pull, is_missing_right, pull_error_code
from vodpoller.vod.application import EventConfig
from vodpoller.vod.client import VodClient
from vodpoller.vod.credentials import Credentials
from vodpoller.vod.limiter import RateLimiter

URL = "https://vod.tencentcloudapi.com/"
SAMPLE = (Path(__file__).parents[1] / "samples" / "reliable-callback.json").read_bytes()
KEYS = Credentials("AKIDexample", "the-secret-key", "the-token")
PROXY_VARIABLES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch):
    for name in (*PROXY_VARIABLES, *map(str.upper, PROXY_VARIABLES), "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def lines():
    return []


class Canned:
    """A transport whose requests `responses` answers, because `responses` replaces the adapters of requests."""

    def send_within(self, request, environment, timeout_secs, *, connect_secs=None):
        return HTTPAdapter().send(request, stream=True, timeout=(connect_secs, timeout_secs))

    def close(self):
        pass


@pytest.fixture
def client_of(lines, request):
    """Makes clients that log into `lines`, and closes them. With the fixture `vod`, `responses` answers them."""
    transport = Canned() if "vod" in request.fixturenames else None
    clients = []

    def keep(_logger, level, line):
        lines.append({**line, "level": level})
        raise structlog.DropEvent

    def make(endpoint=URL, **settings):
        log = structlog.wrap_logger(
            None, processors=[keep], wrapper_class=structlog.make_filtering_bound_logger("debug")
        )
        defaults = {"credentials": lambda: KEYS, "requests_per_sec": 1e6, "log": log, "transport": transport}
        clients.append(VodClient(endpoint=endpoint, **{**defaults, **settings}))
        return clients[-1]

    yield make
    for client in clients:
        client.close()
    assert {line["event"] for line in lines} <= set(CATALOGUE)


@pytest.fixture
def vod():
    with responses.RequestsMock(assert_all_requests_are_fired=False) as mocked:
        yield mocked


def response_of(**members):
    return {"Response": {"RequestId": "r-1", **members}}


def error_of(code, message="it is wrong"):
    return response_of(Error={"Code": code, "Message": message})


def element(number, text="x"):
    return json.dumps({"EventHandle": f"h{number}", "EventType": "FileDeleted", "E": {"Text": text}})


def answer_of(*elements):
    return ('{"Response":{"RequestId":"r-1","EventSet":[' + ",".join(elements) + "]}}").encode()


def handles_of(pull):
    return [event.handle for event in pull.events]


def events_named(lines, event):
    return [line for line in lines if line["event"] == event]


# --- a server of raw sockets ------------------------------------------------------------------------------------------


class Loopback:
    """Answers each request with the next of its replies, and repeats the last one.

    A reply writes to the socket and returns True if the connection stays open.
    """

    def __init__(self, *replies):
        self.replies = list(replies)
        self.requests = []
        self.connections = 0
        self.broken_off = threading.Event()
        self._threads = []
        self._sockets = []
        self._lock = threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._start(self._accept)

    def _start(self, target, *args):
        thread = threading.Thread(target=target, args=args)
        self._threads.append(thread)
        thread.start()

    def _accept(self):
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            self._sockets.append(connection)
            self._start(self._serve, connection)

    def _serve(self, connection):
        with connection, connection.makefile("rb") as stream:
            try:
                while (request := self.read(stream)) is not None:
                    with self._lock:
                        self.requests.append(request)
                        reply = self.replies.pop(0) if len(self.replies) > 1 else self.replies[0]
                    if not reply(connection):
                        connection.shutdown(socket.SHUT_RDWR)
                        return
            except OSError:
                pass
            finally:
                self.broken_off.set()

    @staticmethod
    def read(stream):
        first = stream.readline()
        if not first:
            return None
        headers = {}
        while (line := stream.readline().strip()) != b"":
            name, _, value = line.decode().partition(": ")
            headers[name.lower()] = value
        body = stream.read(int(headers["content-length"]))
        return first.decode().strip(), headers, body

    def close(self):
        # Closing alone does not end a blocking accept.
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._threads[0].join(10)
        for connection in self._sockets:
            with connection, suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(10)
        assert not any(thread.is_alive() for thread in self._threads)


@contextmanager
def serving(*replies):
    server = Loopback(*replies)
    try:
        yield server
    finally:
        server.close()


def sends(body, *headers, status="200 OK", length=None, keep=True):
    """A reply with Content-Length, the true one unless `length` is given."""
    head = [f"HTTP/1.1 {status}", f"Content-Length: {len(body) if length is None else length}", *headers]

    def reply(connection):
        connection.sendall("\r\n".join(head).encode() + b"\r\n\r\n" + body)
        return keep

    return reply


def sends_raw(data):
    def reply(connection):
        connection.sendall(data)
        return False

    return reply


def sends_chunks(*chunks, ended=True):
    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    data = head + b"".join(b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in chunks)
    whole = sends_raw(data + b"0\r\n\r\n")

    def keeping(connection):
        whole(connection)
        return True

    return keeping if ended else sends_raw(data)


def drips(body, *, length, each_secs=0.02):
    """The body, then a space every `each_secs` until the client disconnects or `length` is reached."""

    def reply(connection):
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (length, body))
        for _ in range(length - len(body)):
            time.sleep(each_secs)
            connection.sendall(b" ")
        return True

    return reply


# --- answers that are errors ------------------------------------------------------------------------------------------

PULL_ERRORS = [
    ("RequestLimitExceeded", ThrottledError),
    ("RequestLimitExceeded.UinLimitExceeded", ThrottledError),
    ("InternalError", TransientError),
    ("InternalError.DBError", TransientError),
    ("FailedOperation", TransientError),
    ("FailedOperation.SomethingNew", TransientError),
    ("LimitExceeded", TransientError),
    ("ServiceUnavailable", TransientError),
    ("NeverSeenBefore", TransientError),
    ("", TransientError),
    ("AuthFailure", OperatorError),
    ("AuthFailure.SecretIdNotFound", OperatorError),
    ("AuthFailure.SignatureFailure", OperatorError),
    ("AuthFailure.SignatureExpire", OperatorError),
    ("AuthFailure.TokenFailure", OperatorError),
    ("AuthFailure.UnauthorizedOperation", OperatorError),
    ("UnauthorizedOperation", OperatorError),
    ("UnauthorizedOperation.CamNoAuth", OperatorError),
    ("ResourceNotFound", OperatorError),
    ("ResourceNotFound.UserNotExist", OperatorError),
    ("FailedOperation.InvalidVodUser", OperatorError),
    ("FailedOperation.InvalidAccount", OperatorError),
    ("InvalidParameter", OperatorError),
    ("InvalidParameterValue.SubAppId", OperatorError),
    ("MissingParameter", OperatorError),
    ("UnknownParameter", OperatorError),
    ("UnsupportedOperation", OperatorError),
    ("UnsupportedRegion", OperatorError),
    ("NoSuchVersion", OperatorError),
    ("InvalidAction", OperatorError),
]

CONFIRM_ERRORS = [
    ("InvalidParameter", "it is wrong", RefusedHandlesError),
    ("InvalidParameterValue", "it is wrong", RefusedHandlesError),
    ("InvalidParameterValue.EventHandles", "", RefusedHandlesError),
    ("InvalidParameterValue.EventHandles", "EventHandles are not of this SubAppId", RefusedHandlesError),
    ("FailedOperation.InvalidEventHandle", "", RefusedHandlesError),
    ("FailedOperation", "the event handle has expired", RefusedHandlesError),
    ("ResourceNotFound", "no such event", RefusedHandlesError),
    ("4000", "parameter error", RefusedHandlesError),
    (4000, "parameter error", RefusedHandlesError),
    ("InvalidParameterValue.SubAppId", "it is wrong", OperatorError),
    ("InvalidParameter", "SubAppId does not exist", OperatorError),
    ("MissingParameter", "SubAppId", OperatorError),
    ("FailedOperation.InvalidVodUser", "", OperatorError),
    ("AuthFailure.SignatureFailure", "", OperatorError),
    ("UnauthorizedOperation", "", OperatorError),
    ("FailedOperation", "try later", TransientError),
    ("InternalError", "", TransientError),
    ("RequestLimitExceeded", "", ThrottledError),
]


@pytest.mark.parametrize(("code", "kind"), PULL_ERRORS)
def test_an_error_code_of_a_pull_has_its_exception(vod, client_of, code, kind):
    vod.post(URL, json=error_of(code))
    with pytest.raises(kind) as caught:
        client_of().pull("main", None)
    assert type(caught.value) is kind
    assert caught.value.error_code == code
    assert caught.value.request_id == "r-1"
    assert "it is wrong" in str(caught.value)


@pytest.mark.parametrize(("code", "message", "kind"), CONFIRM_ERRORS)
def test_an_error_code_of_a_confirm_has_its_exception(vod, client_of, code, message, kind):
    vod.post(URL, json=error_of(code, message))
    with pytest.raises(kind) as caught:
        client_of().confirm(7, ["h1"])
    assert type(caught.value) is kind
    assert caught.value.error_code == str(code)
    assert caught.value.request_id == "r-1"
    assert len(vod.calls) == 1


def test_a_refused_token_of_a_renewed_key_is_reported(vod, client_of):
    vod.post(URL, json=error_of("AuthFailure.TokenFailure"))
    refused_tokens = []
    client = client_of(on_refused_token=refused_tokens.append)
    for call in (lambda: client.pull("main", None), lambda: client.confirm(None, ["h"])):
        with pytest.raises(NoKeyError) as caught:
            call()
        assert (caught.value.error_code, caught.value.request_id) == ("AuthFailure.TokenFailure", "r-1")
        assert pull_error_code(caught.value) == "auth"
    assert refused_tokens == [KEYS.token] * 2


def test_without_a_key_nothing_is_sent(vod, client_of):
    def no_key():
        raise NoKeyError("the temporary key has ended")

    client = client_of(credentials=no_key)
    with pytest.raises(NoKeyError) as caught:
        client.pull("main", None)
    assert pull_error_code(caught.value) == "auth"
    assert len(vod.calls) == 0


@pytest.mark.parametrize("code", ["SignatureFailure", "SecretIdNotFound", "InvalidSecretId", "TokenFailure", "New"])
@pytest.mark.parametrize("renewal", ["send SIGHUP", "restart the service"])
def test_the_error_for_a_wrong_key_names_how_to_read_it_again(vod, client_of, code, renewal):
    vod.post(URL, json=error_of(f"AuthFailure.{code}"))
    client = client_of(key_renewal=renewal)
    for call in (lambda: client.pull("main", None), lambda: client.confirm(None, ["h"])):
        with pytest.raises(OperatorError) as caught:
            call()
        assert str(caught.value).endswith(f", then {renewal}")


@pytest.mark.parametrize(
    ("code", "message", "advice"),
    [
        ("AuthFailure.SecretIdNotFound", "", "secret_id"),
        ("AuthFailure.SignatureFailure", "", "secret_key"),
        ("AuthFailure.SignatureExpire", "", "NTP"),
        ("AuthFailure.TokenFailure", "", "token"),
        ("AuthFailure.UnauthorizedOperation", "", "vod:PullEvents"),
        ("UnauthorizedOperation.X", "", "vod:ConfirmEvents"),
        ("FailedOperation.InvalidVodUser", "", "activate"),
        ("ResourceNotFound.UserNotExist", "", "activate"),
        ("InvalidParameterValue.SubAppId", "", "sub_app_id"),
        ("MissingParameter", "", "sub_app_id"),
        ("UnauthorizedOperation", "no right on SubAppId 7", "sub_app_id"),
        ("UnsupportedRegion", "", "api.region"),
        ("NoSuchVersion", "", "api.endpoint"),
    ],
)
def test_an_operator_error_names_the_remedy(vod, client_of, code, message, advice):
    vod.post(URL, json=error_of(code, message))
    with pytest.raises(OperatorError, match=advice):
        client_of().pull("main", None)


@pytest.mark.parametrize("error", ["broken", [], 3, {}, {"Code": None}])
def test_an_error_of_another_shape_is_transient(vod, client_of, error):
    vod.post(URL, json=response_of(Error=error, EventSet=[]))
    with pytest.raises(TransientError):
        client_of().pull("main", None)


@pytest.mark.parametrize("content_type", ["text/html", "application/json;charset=utf-8", "application/octet-stream"])
@pytest.mark.parametrize("status", [200, 400, 403, 500])
def test_an_error_counts_whatever_its_content_type_and_status(vod, client_of, content_type, status):
    body = json.dumps(error_of("AuthFailure.SecretIdNotFound"))
    vod.post(URL, body=body, status=status, content_type=content_type)
    with pytest.raises(OperatorError) as caught:
        client_of().pull("main", None)
    assert caught.value.error_code == "AuthFailure.SecretIdNotFound"


def test_an_error_takes_precedence_over_the_events_beside_it(vod, client_of):
    vod.post(URL, json=response_of(Error={"Code": "InternalError", "Message": ""}, EventSet=[{"EventHandle": "h"}]))
    with pytest.raises(TransientError):
        client_of().pull("main", None)


@pytest.mark.parametrize(
    ("status", "kind", "phrase"),
    [
        (500, ForeignAnswerError, "fault"),
        (502, ForeignAnswerError, "fault"),
        (503, ForeignAnswerError, "fault"),
        (429, ThrottledError, "limits the number of requests"),
        (403, ForeignAnswerError, "firewall"),
        (407, ForeignAnswerError, "login"),
        (404, ForeignAnswerError, "api.endpoint"),
        (204, ForeignAnswerError, "api.endpoint"),
        (301, ForeignAnswerError, "redirects"),
    ],
)
@pytest.mark.parametrize("body", [b"", b"<html>teapot</html>", b'{"Response":{}}', answer_of(element(1))])
def test_another_status_without_an_error_is_transient_and_readable(vod, client_of, status, kind, phrase, body):
    vod.post(URL, body=body, status=status)
    client = client_of()
    for call in (lambda: client.pull("main", None), lambda: client.confirm(None, ["h"])):
        with pytest.raises(kind, match=phrase) as caught:
            call()
        assert type(caught.value) is kind
        assert str(status) in str(caught.value)


@pytest.mark.parametrize(
    ("retry_after", "secs"),
    [
        ("7", 7.0),
        ("0", 0.0),
        (formatdate(1_700_000_030, usegmt=True), 30.0),
        (formatdate(1_600_000_000, usegmt=True), 0.0),
        ("", None),
        ("soon", None),
        ("-3", None),
        ("1e5", None),
        ("9" * 400, 86_400.0),
        ("Fri, 31 Dec 9999 23:59:59 GMT", 86_400.0),
        ("Fri, 31 Dec 99999999999 23:59:59 GMT", None),
        ("nan", None),
        ("²", None),
    ],
)
@pytest.mark.parametrize("status", [429, 503])
def test_retry_after_is_passed_on(client_of, retry_after, secs, status):
    date = f"Date: {formatdate(1_700_000_000, usegmt=True)}"
    reply = sends(b"", date, f"Retry-After: {retry_after}", status=f"{status} Slow")
    with serving(reply) as server:
        client = client_of(server.url)
        with pytest.raises(TransientError) as caught:
            client.pull("main", None)
        assert caught.value.retry_after_secs == secs
        client.close()


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"null",
        b"[]",
        b"7",
        b"{}",
        b'{"Response":null}',
        b'{"Response":[]}',
        b'{"EventSet":[]}',
        b'{"code":4000,"message":"x"}',
        b"<html>login</html>",
        b'{"Response":{"Error":{"Code":"AuthF',
        b"\xff\xfe",
    ],
)
def test_an_answer_that_is_not_of_vod_is_transient(vod, client_of, body):
    vod.post(URL, body=body)
    client = client_of()
    for call in (lambda: client.pull("main", None), lambda: client.confirm(None, ["h"])):
        with pytest.raises(TransientError, match="cannot be used") as caught:
            call()
        assert pull_error_code(caught.value) == "unusable"


@pytest.mark.parametrize(
    ("answer", "counted"),
    [
        ({"json": error_of("RequestLimitExceeded.UinLimitExceeded")}, "request_limit"),
        ({"status": 429}, "request_limit"),
        ({"json": error_of("AuthFailure.SignatureExpire")}, "clock"),
        ({"json": error_of("AuthFailure.SignatureFailure")}, "auth"),
        ({"json": error_of("AuthFailure.UnauthorizedOperation")}, "unauthorized"),
        ({"json": error_of("UnauthorizedOperation")}, "unauthorized"),
        ({"json": error_of("ResourceNotFound.UserNotExist")}, "not_found"),
        ({"json": error_of("FailedOperation.InvalidVodUser")}, "not_found"),
        ({"json": error_of("InvalidParameterValue.SubAppId")}, "parameter"),
        ({"json": error_of("MissingParameter")}, "parameter"),
        ({"json": error_of("InternalError")}, "internal"),
        ({"json": error_of("SomethingNew")}, "internal"),
        ({"status": 502, "body": "<html>"}, "http"),
        ({"status": 302}, "http"),
        ({"body": requests.ConnectionError("reset")}, "connection"),
        ({"body": requests.ReadTimeout("late")}, "connection"),
        ({"body": "x" * 9_000_000}, "unusable"),
        ({"body": "no JSON"}, "unusable"),
    ],
)
def test_each_failed_pull_has_a_code_of_a_closed_set(vod, client_of, answer, counted):
    vod.post(URL, **answer)
    with pytest.raises(VodpollerError) as caught:
        client_of().pull("main", None)
    assert pull_error_code(caught.value) == counted
    assert counted in PULL_ERROR_CODES


def test_an_unexpected_error_of_a_pull_has_a_code_too():
    assert pull_error_code(ValueError("a bug")) == "unusable"


@pytest.mark.parametrize("event_set", [{}, {"EventHandle": "h"}, "text", 7, True])
def test_an_event_set_that_is_not_a_list_is_transient(vod, client_of, event_set):
    vod.post(URL, json=response_of(EventSet=event_set))
    with pytest.raises(TransientError, match="EventSet"):
        client_of().pull("main", None)


def test_a_message_quotes_an_excerpt_and_not_the_whole_body(vod, client_of):
    vod.post(URL, body="é" * 100_000)
    with pytest.raises(TransientError) as caught:
        client_of().pull("main", None)
    assert str(caught.value).count("é") == 100


def test_a_long_message_is_cut(vod, client_of):
    vod.post(URL, json=error_of("InternalError", "x" * 100_000))
    with pytest.raises(TransientError) as caught:
        client_of().pull("main", None)
    assert len(str(caught.value)) < 500


# --- answers that are empty or hold events ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "answer",
    [
        response_of(EventSet=None),
        response_of(EventSet=[]),
        response_of(),
        response_of(EventSet=None, Error=None),
        {"Response": {}},
        error_of("ResourceNotFound", "no event"),
        error_of("ResourceNotFound", "No Event."),
        error_of("ResourceNotFound", ""),
    ],
)
def test_every_form_of_an_empty_queue_is_an_empty_pull(vod, client_of, lines, answer):
    vod.post(URL, json=answer)
    pull = client_of().pull("main", None)
    assert pull.events == pull.malformed == ()
    assert pull.request_id == answer["Response"].get("RequestId", "")
    assert [line["level"] for line in lines] == ["debug"]


def test_the_documented_answer_is_pulled(vod, client_of):
    vod.post(URL, body=SAMPLE)
    now = iter(range(100, 200))
    pull = client_of(monotonic=lambda: float(next(now)), lease_secs=30.0, timeout_secs=50.0).pull("main", 7)
    assert isinstance(pull, Pull)
    assert handles_of(pull) == ["EventHandle.N"]
    event = pull.events[0].event
    assert (event.source, event.sub_app_id, event.type) == ("main", 7, "CreateSnapshotByTimeOffsetComplete")
    assert pull.request_id == "335bdaa3-db0e-46ce-9946-51941d9cb0f5"
    assert pull.lease.secs == 30.0
    assert pull.hung_secs > 0


def test_an_element_that_is_not_an_event_affects_no_other(vod, client_of):
    vod.post(URL, body=answer_of(element(0), "null", '"x"', '{"EventType":"T"}', element(1)))
    pull = client_of().pull("main", None)
    assert handles_of(pull) == ["h0", "h1"]
    assert [item.handle for item in pull.malformed] == [None, None, None]


@pytest.mark.parametrize(
    ("broken", "handle"),
    [
        ('{"EventHandle":"bad","N":NaN}', "bad"),
        ('{"N":NaN}', None),
        ('{"EventHandle":"bad","N":' + "9" * 5000 + "}", "bad"),
        ('{"EventHandle":"bad","N":' + "[" * 5000 + "]" * 5000 + "}", "bad"),
    ],
)
def test_an_element_that_is_not_json_affects_no_other(vod, client_of, lines, broken, handle):
    vod.post(URL, body=answer_of(element(0), broken, element(1)))
    pull = client_of().pull("main", None)
    assert handles_of(pull) == ["h0", "h1"]
    assert [item.handle for item in pull.malformed] == [handle]
    (line,) = events_named(lines, "answer.salvaged")
    assert (line["level"], line["events"], line["malformed"], line["source"]) == ("warning", 2, 1, "main")


def test_an_element_of_any_depth_affects_no_other(vod, client_of):
    # Near the interpreter's recursion limit, some depths can be read but not be written again.
    for depth in range(900, 1000, 3):
        deep = '{"EventHandle":"deep","N":' + "[" * depth + "]" * depth + "}"
        vod.upsert("POST", URL, body=answer_of(element(0), deep, element(1)))
        pull = client_of().pull("main", None)
        handles = {*handles_of(pull), *(item.handle for item in pull.malformed)}
        assert handles == {"h0", "deep", "h1"}, depth


def test_a_pull_may_have_only_malformed_elements_with_a_handle(vod, client_of):
    vod.post(URL, body=answer_of('{"EventHandle":"bad","N":NaN}'))
    pull = client_of().pull("main", None)
    assert pull.events == ()
    assert [item.handle for item in pull.malformed] == ["bad"]


# --- requests ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("sub_app_id", "body"), [(None, {}), (0, {"SubAppId": 0}), (15, {"SubAppId": 15})])
def test_a_pull_is_one_signed_request(vod, client_of, sub_app_id, body):
    vod.post(URL, json=response_of())
    client_of(region="ap-guangzhou").pull("main", sub_app_id)
    (call,) = vod.calls
    headers = call.request.headers
    assert json.loads(call.request.body) == body
    assert headers["X-TC-Action"] == "PullEvents"
    assert headers["X-TC-Version"] == "2018-07-17"
    assert headers["X-TC-Region"] == "ap-guangzhou"
    assert headers["X-TC-Token"] == "the-token"
    assert headers["Content-Type"] == "application/json"
    assert headers["Content-Length"] == str(len(call.request.body))
    assert headers["User-Agent"] == f"vodpoller/{__version__}"
    assert headers["Authorization"].startswith("TC3-HMAC-SHA256 Credential=AKIDexample/")


def test_a_confirm_is_one_signed_request(vod, client_of):
    vod.post(URL, json=response_of())
    assert client_of().confirm(15, ("h1", "ü", "\ud800")) == "r-1"
    (call,) = vod.calls
    assert json.loads(call.request.body) == {"EventHandles": ["h1", "ü", "\ud800"], "SubAppId": 15}
    assert call.request.headers["X-TC-Action"] == "ConfirmEvents"
    assert "X-TC-Region" not in call.request.headers


def test_a_confirm_without_sub_app_id_has_none(vod, client_of):
    vod.post(URL, json=response_of())
    client_of().confirm(None, ["h1"])
    assert json.loads(vod.calls[0].request.body) == {"EventHandles": ["h1"]}


# --- queries about an application -------------------------------------------------------------------------------------

QUERIES = {
    "DescribeEventConfig": lambda client: client.event_config(15),
    "DescribeEventsState": lambda client: client.waiting_events(15),
}


@pytest.mark.parametrize(
    "code", ["UnauthorizedOperation", "AuthFailure.UnauthorizedOperation", "UnauthorizedOperation.X"]
)
@pytest.mark.parametrize("action", QUERIES)
def test_the_error_of_a_query_without_its_right_names_the_right(vod, client_of, action, code):
    vod.post(URL, json=error_of(code))
    with pytest.raises(OperatorError) as caught:
        QUERIES[action](client_of())
    assert is_missing_right(caught.value)
    assert caught.value.advice == f"in CAM, grant vod:{action} to the owner of the key"


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        ("AuthFailure.SignatureFailure", OperatorError),
        ("InternalError", TransientError),
        ("RequestLimitExceeded", ThrottledError),
    ],
)
@pytest.mark.parametrize("action", QUERIES)
def test_another_error_of_a_query_is_not_a_missing_right(vod, client_of, action, code, kind):
    vod.post(URL, json=error_of(code))
    with pytest.raises(kind) as caught:
        QUERIES[action](client_of())
    assert not is_missing_right(caught.value)
    assert caught.value.request_id == "r-1"


@pytest.mark.parametrize("number", [None, "5", -1, True, 1.5])
def test_a_backlog_that_is_not_a_number_is_transient(vod, client_of, number):
    vod.post(URL, json=response_of(CountOfEventsToPull=number))
    with pytest.raises(TransientError, match="CountOfEventsToPull is not a number of events"):
        client_of().waiting_events(None)


@pytest.mark.parametrize(
    "members", [{}, {"Mode": None, "NotificationUrl": None, "DeleteMediaCompleteEventSwitch": None}]
)
def test_a_switch_that_an_answer_leaves_out_is_not_off(vod, client_of, members):
    vod.post(URL, json=response_of(**members))
    assert client_of().event_config(None) == EventConfig(mode="", notification_url="", off=(), request_id="r-1")


@pytest.mark.parametrize("action", QUERIES)
def test_a_query_is_one_signed_request(vod, client_of, action):
    vod.post(URL, json=response_of(CountOfEventsToPull=3))
    QUERIES[action](client_of())
    (call,) = vod.calls
    assert json.loads(call.request.body) == {"SubAppId": 15}
    assert call.request.headers["X-TC-Action"] == action
    assert call.request.headers["Authorization"].startswith("TC3-HMAC-SHA256 Credential=AKIDexample/")


def test_backlog_queries_keep_to_their_quota(client_of):
    clock = FakeClock()
    with Simulator(SimulatorOptions(requests_per_sec=0, mode="PUSH", events_off=["FileDeleted"])) as simulator:
        client = client_of(simulator.url, requests_per_sec=100, monotonic=clock, sleep=clock.advance)
        began = clock.now
        assert {client.waiting_events(None) for _ in range(41)} == {0}
        assert clock.now - began == pytest.approx(2.0, abs=0.15)
        config = client.event_config(None)
        assert (config.mode, config.off) == ("PUSH", ("FileDeleted",))


# --- credentials, TLS and proxies -------------------------------------------------------------------------------------


def test_credentials_are_read_at_each_request(vod, client_of):
    vod.post(URL, json=response_of())
    keys = Credentials("first", "key")
    client = client_of(credentials=lambda: keys)
    client.pull("main", None)
    keys = Credentials("second", "key")
    client.pull("main", None)
    assert ["second" in call.request.headers["Authorization"] for call in vod.calls] == [False, True]


@pytest.mark.parametrize("bad", ["line\nbreak", "密钥"])
def test_an_invalid_token_is_an_operator_error_that_hides_it(client_of, bad):
    with serving(sends(answer_of())) as server:
        client = client_of(server.url, credentials=lambda: Credentials("id", "key", bad))
        with pytest.raises(OperatorError, match="header") as caught:
            client.pull("main", None)
        assert bad not in str(caught.value)
        assert caught.value.__cause__ is None
        assert caught.value.__suppress_context__
        client.close()
        assert server.requests == []


def test_no_secret_is_in_any_log_line_or_error(client_of, lines):
    with serving(sends(b"nope"), sends(answer_of(element(1)))) as server:
        client = client_of(server.url)
        with pytest.raises(TransientError) as caught:
            client.pull("main", None)
        client.pull("main", None)
        client.close()
    texts = json.dumps([*lines, str(caught.value)])
    for secret in ("the-secret-key", "the-token", "Signature="):
        assert secret not in texts


@pytest.mark.parametrize("variable", ["SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", None])
def test_tls_is_verified_by_ca_file_or_the_environment(client_of, monkeypatch, certificate, variable):
    vod = Receiver()
    vod.answer = Answer(200, body=answer_of(element(1)))
    with running_receiver(vod):
        url = certificate.serve(vod).removesuffix("/callback")
        with pytest.raises(TransientError, match=r"cannot be trusted: self-signed certificate .* in ca_file"):
            client_of(url).pull("main", None)
        assert vod.received == []
        if variable:
            monkeypatch.setenv(variable, str(certificate.path))
        client = client_of(url, ca_file=None if variable else certificate.path)
        if variable:
            monkeypatch.delenv(variable)
        assert handles_of(client.pull("main", None)) == ["h1"]


def test_ca_file_is_read_again_at_reopen(client_of, certificate, tmp_path):
    vod = Receiver()
    vod.answer = Answer(200, body=answer_of(element(1)))
    trusted = tmp_path / "trusted.pem"
    trusted.write_bytes(make_certificate(tmp_path).path.read_bytes())
    with running_receiver(vod):
        client = client_of(certificate.serve(vod).removesuffix("/callback"), ca_file=trusted)
        with pytest.raises(TransientError, match="cannot be trusted"):
            client.pull("main", None)
        trusted.write_bytes(certificate.path.read_bytes())
        client.reopen()
        assert handles_of(client.pull("main", None)) == ["h1"]
        trusted.write_text("")
        with pytest.raises(ConfigError, match=r"api\.ca_file: .* holds no certificate .*; what was read before stays"):
            client.reopen()
        assert handles_of(client.pull("main", None)) == ["h1"]


@pytest.mark.parametrize("variable", ["REQUESTS_CA_BUNDLE", "SSL_CERT_FILE", "SSL_CERT_DIR"])
def test_a_missing_ca_bundle_is_an_operator_error(client_of, monkeypatch, variable):
    monkeypatch.setenv(variable, "/nowhere/own.pem")
    with pytest.raises(OperatorError, match=rf"\${variable} is /nowhere/own\.pem, which does not exist"):
        client_of("https://127.0.0.1:1").pull("main", None)


@pytest.mark.parametrize("variable", ["http_proxy", "HTTP_PROXY", "all_proxy"])
def test_the_environments_proxy_gets_the_whole_url(client_of, monkeypatch, variable):
    with serving(sends(answer_of(element(1)))) as proxy:
        monkeypatch.setenv(variable, f"http://user:secret@127.0.0.1:{proxy.port}")
        client = client_of("http://vod.example:8080")
        monkeypatch.delenv(variable)
        for _ in range(2):
            assert handles_of(client.pull("main", None)) == ["h1"]
        client.close()
    line, headers, _ = proxy.requests[1]
    assert line == "POST http://vod.example:8080/ HTTP/1.1"
    assert headers["host"] == "vod.example:8080"
    assert headers["proxy-authorization"].startswith("Basic ")
    assert proxy.connections == 1


def test_no_proxy_is_respected(client_of, monkeypatch):
    with serving(sends(answer_of(element(1)))) as server:
        monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        client = client_of(server.url)
        assert handles_of(client.pull("main", None)) == ["h1"]
        client.close()
    assert server.requests[0][0] == "POST / HTTP/1.1"


def test_a_proxy_that_refuses_the_tunnel_is_transient_and_readable(client_of, monkeypatch):
    def refuses(connection):
        connection.sendall(b"HTTP/1.1 407 Proxy Authentication Required\r\nContent-Length: 0\r\n\r\n")
        return False

    with serving(refuses) as proxy:
        proxy.read = lambda stream: stream.readline() or None  # CONNECT has no body
        monkeypatch.setenv("https_proxy", proxy.url)
        client = client_of("https://vod.example")
        with pytest.raises(TransientError, match="407"):
            client.pull("main", None)
        client.close()


@pytest.mark.parametrize("proxy", ["socks5://127.0.0.1:1", "http://"])
def test_a_proxy_that_cannot_be_used_is_an_operator_error(client_of, monkeypatch, proxy):
    monkeypatch.setitem(sys.modules, "socks", None)  # as if PySocks were not installed
    monkeypatch.setenv("https_proxy", proxy)
    with pytest.raises(OperatorError, match="proxy"):
        client_of().pull("main", None)


# --- connections ------------------------------------------------------------------------------------------------------


def test_one_connection_serves_many_calls(client_of):
    answer = answer_of(element(1))
    replies = [
        sends(answer),
        sends_chunks(answer[:9], answer[9:]),
        sends(gzip.compress(answer), "Content-Encoding: gzip"),
    ]
    with serving(*replies * 3) as server:
        client = client_of(server.url)
        for _ in range(9):
            assert handles_of(client.pull("main", None)) == ["h1"]
        client.confirm(None, ["h1"])
        client.close()
    assert server.connections == 1
    assert len(server.requests) == 10


REFUSED = json.dumps(error_of("InvalidParameterValue", "handle")).encode()


def test_a_confirm_on_a_connection_that_broke_is_sent_again(client_of):
    with serving(sends(answer_of(element(1))), sends_raw(b""), sends(json.dumps(response_of()).encode())) as server:
        client = client_of(server.url)
        client.pull("main", None)
        client.confirm(None, ["h1"])
        client.close()
    assert (len(server.requests), server.connections) == (3, 2)
    assert server.requests[1] == server.requests[2]


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        ("InvalidParameterValue", RefusedHandlesError),
        ("RequestLimitExceeded", ThrottledError),
        ("AuthFailure.SecretIdNotFound", OperatorError),
    ],
)
def test_a_refusal_of_a_repeated_confirm_leaves_its_result_open(client_of, code, kind):
    refused = sends(json.dumps(error_of(code)).encode())
    with serving(sends(answer_of(element(1))), sends_raw(b""), refused) as server:
        client = client_of(server.url)
        client.pull("main", None)
        with pytest.raises(TransientError, match="the first one may have been carried out") as caught:
            client.confirm(7, ["h1"])
        assert type(caught.value) is TransientError
        assert caught.value.error_code == code
        with pytest.raises(kind):
            client.confirm(7, ["h1"])
        client.close()


@pytest.mark.parametrize("code", ["RequestLimitExceeded", "AuthFailure.SecretIdNotFound"])
def test_a_refusal_of_a_repeated_pull_leaves_its_result_open(client_of, code):
    refused = sends(json.dumps(error_of(code)).encode())
    with serving(sends(answer_of(element(1))), sends_raw(b""), refused) as server:
        client = client_of(server.url)
        client.pull("main", None)
        with pytest.raises(TransientError, match="the first one may have been carried out") as caught:
            client.pull("main", None)
        assert type(caught.value) is TransientError
        client.close()


@pytest.mark.parametrize("interim", [b"HTTP/1.1 103 Early Hints\r\n\r\n", b"HTTP/1.1 102 Processing\r\nX: y\r\n\r\n"])
def test_an_interim_answer_is_not_the_answer(client_of, interim):
    def replies(body):
        reply = sends(body)

        def both(connection):
            connection.sendall(interim)
            return reply(connection)

        return both

    with serving(replies(answer_of(element(1))), replies(answer_of(element(2)))) as server:
        client = client_of(server.url)
        assert [handles_of(client.pull("main", None)) for _ in range(2)] == [["h1"], ["h2"]]
        client.close()
    assert server.connections == 1


def test_errors_and_other_statuses_keep_the_connection(client_of):
    replies = [sends(b"nope", status="503 Busy"), sends(b"{}"), sends(json.dumps(error_of("InternalError")).encode())]
    with serving(*replies) as server:
        client = client_of(server.url)
        for _ in range(3):
            with pytest.raises(TransientError):
                client.pull("main", None)
        client.close()
    assert server.connections == 1


def test_a_redirect_is_not_followed(client_of):
    with serving(sends(answer_of(element(1)))) as other:
        for status in ("301 Moved", "302 Found", "307 Temporary", "308 Permanent"):
            with serving(sends(b"", f"Location: {other.url}/", status=status)) as server:
                client = client_of(server.url)
                with pytest.raises(TransientError, match=f"redirects.*{status[:3]}|{status[:3]}.*redirects"):
                    client.pull("main", None)
                client.close()
                assert len(server.requests) == 1
    assert other.requests == []


def test_cookies_are_not_kept(client_of):
    with serving(sends(answer_of(), "Set-Cookie: a=b; Path=/")) as server:
        client = client_of(server.url)
        for _ in range(2):
            client.pull("main", None)
        client.close()
    assert all("cookie" not in headers for _, headers, _ in server.requests)


def test_a_refused_connection_is_transient(client_of):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(TransientError, match="refused"):
        client_of(f"http://127.0.0.1:{port}").pull("main", None)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"nope\r\n\r\n",
        b"HTTP/1.1 ",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5, 6\r\n\r\nabcdef",
        b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 200 + b"\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 4\r\n\r\nabcd",
        b"HTTP/1.1 200 OK\r\nContent-Encoding: deflate\r\nContent-Length: 4\r\n\r\nabcd",
        b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n",
    ],
)
def test_broken_http_is_transient(client_of, data):
    with serving(sends_raw(data)) as server:
        client = client_of(server.url)
        for call in (lambda: client.pull("main", None), lambda: client.confirm(None, ["h"])):
            with pytest.raises(TransientError):
                call()
            assert server.broken_off.wait(10)  # otherwise the next call might use a connection that is closing
        client.close()
        assert len(server.requests) == 2


ANSWER = answer_of(*(element(n, "ü\U0001f4a1") for n in range(4)))
CUT_AT = ANSWER.index(b'"h2"') + 20  # inside the third event


@pytest.mark.parametrize(
    "reply",
    [
        sends(ANSWER[:CUT_AT], length=len(ANSWER), keep=False),
        sends_chunks(ANSWER[:90], ANSWER[90:CUT_AT], ended=False),
        sends_raw(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n%b" % (len(ANSWER), ANSWER[:CUT_AT])),
        sends_raw(b"HTTP/1.0 200 OK\r\n\r\n" + ANSWER[:CUT_AT]),
        sends(ANSWER[:CUT_AT]),
    ],
    ids=["content-length", "chunked", "inside a chunk", "until close", "length of the cut text"],
)
def test_the_whole_events_of_a_cut_answer_are_pulled(client_of, lines, reply):
    with serving(reply) as server:
        client = client_of(server.url)
        pull = client.pull("main", None)
        client.close()
    assert handles_of(pull) == ["h0", "h1"]
    assert pull.may_lack_events
    assert [item.handle for item in pull.malformed] == [None]  # it comes again, so it must not become a dead letter
    (line,) = events_named(lines, "answer.salvaged")
    assert (line["events"], line["malformed"]) == (2, 1)


def test_the_whole_events_of_a_cut_compressed_answer_are_pulled(client_of):
    # Text without redundancy, so that the decoder has returned most of what it has read.
    answer = answer_of(*(element(n, "".join(chr(0x4E00 + i * 7 % 9973) for i in range(n, 9000 + n))) for n in range(4)))
    packed = gzip.compress(answer)
    with serving(sends(packed[: len(packed) // 2], "Content-Encoding: gzip", length=len(packed), keep=False)) as server:
        client = client_of(server.url)
        pull = client.pull("main", None)
        client.close()
    handles = handles_of(pull)
    assert handles == ["h0", "h1", "h2", "h3"][: len(handles)]
    assert handles


def test_a_cut_after_the_last_byte_of_json_causes_no_warning(client_of, lines):
    with serving(sends_chunks(ANSWER, ended=False)) as server:
        client = client_of(server.url)
        pull = client.pull("main", None)
        client.close()
    assert handles_of(pull) == ["h0", "h1", "h2", "h3"]
    assert not pull.may_lack_events
    assert events_named(lines, "answer.salvaged") == []


def test_a_cut_before_the_first_whole_event_is_transient(client_of):
    cut = ANSWER[: ANSWER.index(b'"h0"') + 20]
    with serving(sends(cut, length=len(ANSWER), keep=False)) as server:
        client = client_of(server.url)
        with pytest.raises(TransientError, match="closed the connection without a whole answer"):
            client.pull("main", None)
        client.close()


def test_the_whole_events_of_an_answer_beyond_the_deadline_are_kept(client_of):
    with serving(drips(ANSWER[:CUT_AT], length=5000), sends(answer_of())) as server:
        client = client_of(server.url, timeout_secs=0.3)
        began = time.monotonic()
        pull = client.pull("main", None)
        assert time.monotonic() - began < 3
        assert handles_of(pull) == ["h0", "h1"]
        assert server.broken_off.wait(10)
        client.pull("main", None)
        client.close()
    assert server.connections == 2


@pytest.mark.system
@pytest.mark.parametrize("sent", [b"", b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n", None])
def test_silence_is_transient_within_the_timeout(client_of, sent):
    done = threading.Event()

    def reply(connection):
        connection.sendall(sent or b"")
        done.wait(10)
        return False

    drip = drips(b"", length=5000)
    with serving(drip if sent is None else reply) as server:
        client = client_of(server.url, timeout_secs=0.2, confirm_timeout_secs=0.2)
        for call in (lambda: client.pull("main", None), lambda: client.confirm(None, ["h"])):
            began = time.monotonic()
            with pytest.raises(TransientError):
                call()
            assert 0.15 < time.monotonic() - began < 3
        client.close()
        done.set()


def sends_its_head_slowly(connection):
    for piece in [b"HTTP/1.1 200 OK\r\nX: "] + [b"x"] * 500:
        time.sleep(0.02)
        connection.sendall(piece)
    return False


def test_a_slow_head_is_transient_within_the_timeout(client_of):
    with serving(sends_its_head_slowly) as server:
        client = client_of(server.url, timeout_secs=0.2, confirm_timeout_secs=0.2)
        for call in (lambda: client.pull("main", None), lambda: client.confirm(None, ["h"])):
            began = time.monotonic()
            with pytest.raises(TransientError, match="no answer within"):
                call()
            assert 0.15 < time.monotonic() - began < 3
        client.close()


def test_a_hanging_lookup_is_transient_within_the_timeout(client_of):
    released = threading.Event()
    transport = DeadlineAdapter(connections=1, resolve=lambda *args, **kwargs: released.wait(20) and [])
    client = client_of("http://vod.example", timeout_secs=0.2, transport=transport)
    began = time.monotonic()
    with pytest.raises(TransientError, match="no answer within"):
        client.pull("main", None)
    assert 0.15 < time.monotonic() - began < 3
    released.set()


@pytest.mark.parametrize(
    ("confirm_timeout_secs", "timeout_secs", "expected"), [(2.0, None, 2.0), (2.0, 9.0, 2.0), (2.0, 0.5, 0.5)]
)
def test_a_confirm_takes_no_longer_than_its_limit_and_the_lease(
    vod, client_of, confirm_timeout_secs, timeout_secs, expected
):
    vod.post(URL, json=response_of())
    client = client_of(confirm_timeout_secs=confirm_timeout_secs, monotonic=lambda: 100.0)
    client.confirm(None, ["h"], timeout_secs)
    assert vod.calls[0].request.req_kwargs["timeout"] == pytest.approx((5.0, expected))


def test_a_pull_may_hang_longer_than_a_connection_takes(vod, client_of):
    vod.post(URL, json=response_of())
    client_of(timeout_secs=10.0).pull("main", None)
    assert vod.calls[0].request.req_kwargs["timeout"] == pytest.approx((5.0, 10.0))


@pytest.mark.parametrize("left_secs", [0.0, -1.0])
def test_a_confirm_after_the_lease_is_not_sent(vod, client_of, left_secs):
    vod.post(URL, json=response_of())
    with pytest.raises(TransientError, match="not sent"):
        client_of().confirm(None, ["h"], left_secs)
    assert len(vod.calls) == 0


def bomb():
    return gzip.compress(b'{"Response":{"EventSet":[' + element(1).encode() + b"," + b" " * 8_000_000)


def test_a_gzip_bomb_is_not_unpacked_beyond_the_bound(client_of):
    with serving(sends(bomb(), "Content-Encoding: gzip")) as server:
        client = client_of(server.url, answer_max_bytes=100_000)
        tracemalloc.start()
        pull = client.pull("main", None)
        _, peak_bytes = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        client.close()
    assert handles_of(pull) == ["h1"]  # it was complete before the bound
    assert peak_bytes < 2_000_000


@pytest.mark.parametrize(
    "reply",
    [drips(b" " * 200_000, length=10**6), sends_chunks(*[b" " * 50_000] * 20)],
    ids=["content-length", "chunks"],
)
def test_an_answer_beyond_the_bound_closes_its_connection(client_of, reply):
    with serving(reply, sends(answer_of())) as server:
        client = client_of(server.url, answer_max_bytes=100_000)
        with pytest.raises(OperatorError, match=r"longer than 100000 bytes.*api\.endpoint") as caught:
            client.pull("main", None)
        assert caught.value.error_code == "AnswerTooLarge"
        client.pull("main", None)
        client.close()
    assert server.connections == 2


@pytest.mark.parametrize("extra", [element(2)[:-1], " " * 100_000], ids=["an event", "blanks"])
def test_the_whole_events_before_the_bound_are_pulled_with_an_error(client_of, lines, extra):
    body = answer_of(element(1), extra + "x" * 100_000)
    with serving(sends(body)) as server:
        client = client_of(server.url, answer_max_bytes=len(element(1)) + 200)
        assert handles_of(client.pull("main", None)) == ["h1"]
        client.close()
    (line,) = events_named(lines, "answer.salvaged")
    assert (line["level"], line["error_code"]) == ("error", "AnswerTooLarge")


def test_an_answer_of_vod_takes_8_mib_at_most(client_of):
    with serving(sends(b" " * (8 * 2**20 + 1)), sends(answer_of().ljust(8 * 2**20))) as server:
        client = client_of(server.url, timeout_secs=60)
        with pytest.raises(OperatorError):
            client.pull("main", None)
        assert client.pull("main", None).events == ()
        client.close()


def test_a_confirms_answer_beyond_the_bound_is_transient(client_of):
    with serving(sends(b'{"Response":' + b" " * 200_000)) as server:
        client = client_of(server.url, answer_max_bytes=50)
        with pytest.raises(TransientError, match="longer than 50 bytes"):
            client.confirm(None, ["h"])
        client.close()


@pytest.mark.parametrize(
    "elements",
    [
        ['{"EventType":"FileDeleted"}'],
        ["{}", "null", "7"],
        ['{"EventHandle":""}'] * 16,
        ['{"EventHandle":NaN}', "{}"],
        [json.dumps({"EventHandle": "h" * 100_000})],
        ['{"EventHandle":"' + "h" * 100_000 + '","N":NaN}'],
    ],
)
def test_an_answer_without_any_usable_handle_is_a_failed_pull(vod, client_of, elements):
    vod.post(URL, body=answer_of(*elements))
    with pytest.raises(TransientError, match="cannot be used"):
        client_of().pull("main", None)


def test_an_element_without_a_handle_beside_others_is_malformed(vod, client_of):
    vod.post(URL, body=answer_of("{}", element(1)))
    pull = client_of().pull("main", None)
    assert handles_of(pull) == ["h1"]
    assert [item.handle for item in pull.malformed] == [None]


@pytest.mark.parametrize("handle", ['"same"', "12345"])
def test_two_elements_with_one_handle_are_two_events(vod, client_of, handle):
    elements = [f'{{"EventHandle":{handle},"N":{number}}}' for number in range(2)]
    vod.post(URL, body=answer_of(*elements))
    vod.post(URL, body=answer_of(*elements, f'{{"EventHandle":{handle},"N":NaN}}'))
    client = client_of()
    whole, broken = client.pull("main", None), client.pull("main", None)
    assert handles_of(whole) == handles_of(broken) == [handle.strip('"')] * 2
    assert [event.event.content["N"] for event in whole.events] == [0, 1]
    assert [item.handle for item in broken.malformed] == [handle.strip('"')]


HOSTILE_ANSWERS = {
    "a code": b'{"Response":{"Error":{"Code":"%b","Message":"m"},"RequestId":"r"}}',
    "a message": b'{"Response":{"Error":{"Code":"C","Message":"%b"},"RequestId":"r"}}',
    "no object": b'{"Response":{"Error":"%b"}}',
    "a RequestId": b'{"Response":{"Error":{"Code":"C","Message":"m"},"RequestId":"%b"}}',
}


@pytest.mark.parametrize("form", HOSTILE_ANSWERS.values(), ids=HOSTILE_ANSWERS)
def test_an_error_quotes_only_a_short_part_of_an_answer(vod, client_of, form):
    vod.post(URL, body=form % (b"x" * 1_000_000))
    with pytest.raises(TransientError) as caught:
        client_of().pull("main", None)
    assert sum(map(len, caught.value.fields().values())) < 1000


@pytest.mark.system
@pytest.mark.parametrize("unit", ['"",', "[],", '{"a":1},', "1,", "[[[1]]],"])
@pytest.mark.long
def test_an_answer_of_millions_of_values_is_not_turned_into_objects(vod, client_of, unit):
    inside = (unit * (1_100_000 // sum(map(unit.count, "[{:,"))))[:-1]
    vod.post(URL, body=answer_of(element(1), f'{{"EventHandle":"h2","E":[{inside}]}}', element(3)))
    pull = client_of().pull("main", None)
    assert handles_of(pull) == ["h1", "h3"]
    assert [(item.handle, item.why) for item in pull.malformed] == [("h2", "it holds more than 1,000,000 values")]


def test_an_answer_within_the_bound_is_read(client_of):
    with serving(sends(ANSWER)) as server:
        client = client_of(server.url, answer_max_bytes=len(ANSWER))
        assert len(client.pull("main", None).events) == 4
        client.close()


def test_many_threads_share_one_client(client_of):
    with serving(sends(answer_of(element(1)))) as server:
        client = client_of(server.url)
        pulls = []
        threads = [
            threading.Thread(target=lambda: pulls.extend(client.pull("main", n) for n in range(10))) for _ in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        client.close()
    assert [handles_of(pull) for pull in pulls] == [["h1"]] * 80
    assert server.connections <= 8


# --- clock, lease, pacing ---------------------------------------------------------------------------------------------


def expired(server_time):
    return {"json": error_of("AuthFailure.SignatureExpire"), "headers": {"Date": formatdate(server_time, usegmt=True)}}


def timestamps(vod):
    return [int(call.request.headers["X-TC-Timestamp"]) for call in vod.calls]


@pytest.mark.parametrize("skew_secs", [-3600, 400, 10**8])
def test_a_wrong_clock_is_corrected_by_the_servers_and_logged_once(vod, client_of, lines, skew_secs):
    now = 1_700_000_000
    vod.post(URL, **expired(now))
    vod.post(URL, json=response_of())
    client = client_of(wall=lambda: float(now - skew_secs))
    client.pull("main", None)
    client.confirm(None, ["h"])
    assert timestamps(vod) == [now - skew_secs, now, now]
    (line,) = events_named(lines, "clock.corrected")
    assert (line["level"], line["skew_secs"]) == ("warning", skew_secs)


def test_a_corrected_clock_is_corrected_again_when_it_steps(vod, client_of, lines):
    now = 1_700_000_000
    local = now - 3600
    client = client_of(wall=lambda: float(local))
    vod.post(URL, **expired(now))
    vod.post(URL, json=response_of())
    client.pull("main", None)
    local = now  # an operator set it right
    vod.reset()
    vod.post(URL, **expired(now))
    vod.post(URL, json=response_of())
    client.pull("main", None)
    assert timestamps(vod) == [now + 3600, now]
    assert [line["skew_secs"] for line in events_named(lines, "clock.corrected")] == [3600, 0]


@pytest.mark.parametrize("headers", [{}, {"Date": "yesterday"}, {"Date": formatdate(1_700_000_030, usegmt=True)}])
def test_an_expired_signature_with_a_right_clock_is_an_operator_error(vod, client_of, headers):
    vod.post(URL, json=error_of("AuthFailure.SignatureExpire"), headers=headers)
    with pytest.raises(OperatorError, match="NTP"):
        client_of(wall=lambda: 1_700_000_000.0).pull("main", None)
    assert len(vod.calls) == 1


def test_a_signature_that_stays_expired_is_sent_twice_at_most(vod, client_of):
    vod.post(URL, **expired(1_700_000_000))
    with pytest.raises(OperatorError):
        client_of(wall=lambda: 0.0).pull("main", None)
    assert len(vod.calls) == 2


def test_two_threads_that_correct_the_clock_log_it_once(vod, client_of, lines):
    now = 1_700_000_000
    client = client_of(wall=lambda: float(now - 3600))
    barrier = threading.Barrier(2, timeout=10)

    def answer(request):
        if int(request.headers["X-TC-Timestamp"]) == now:
            return 200, {}, json.dumps(response_of())
        barrier.wait()
        return 200, {"Date": formatdate(now, usegmt=True)}, json.dumps(error_of("AuthFailure.SignatureExpire"))

    vod.add_callback("POST", URL, callback=answer)
    failures = []

    def pull():
        try:
            client.pull("main", None)
        except Exception as error:  # noqa: BLE001 - shown by the assertion below
            failures.append(error)

    threads = [threading.Thread(target=pull) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert len(events_named(lines, "clock.corrected")) == 1


class Clock:
    def __init__(self):
        self.now = 1000.0
        self.waits = []

    def monotonic(self):
        return self.now

    def sleep(self, secs):
        self.waits.append(secs)
        self.now += secs


def test_the_lease_starts_when_the_pull_is_sent_after_its_slot_came(vod, client_of):
    clock = Clock()

    def answer(_request):
        clock.now += 3.0
        return 200, {}, json.dumps(response_of())

    vod.add_callback("POST", URL, callback=answer)
    client = client_of(requests_per_sec=0.2, monotonic=clock.monotonic, sleep=clock.sleep)
    client.pull("main", None)
    second = client.pull("main", None)
    (waited,) = clock.waits
    assert waited > 1
    assert second.lease.starts_at == pytest.approx(1003.0 + waited)
    assert second.lease.ends_at == pytest.approx(second.lease.starts_at + 30)
    assert second.hung_secs == pytest.approx(3.0)


def test_pulls_and_confirms_have_a_quota_each(vod, client_of):
    clock = Clock()
    vod.post(URL, json=response_of())
    client = client_of(requests_per_sec=1, monotonic=clock.monotonic, sleep=clock.sleep)
    client.pull("main", 1)
    client.confirm(1, ["h"])
    assert clock.waits == []
    client.pull("other", 2)
    assert len(clock.waits) == 1


def test_confirms_that_have_fallen_behind_pulls_catch_up(client_of):
    clock = Clock()
    client = client_of(requests_per_sec=100, monotonic=clock.monotonic, sleep=clock.sleep)
    for _ in range(3):
        client.await_confirm_slot(1.0)
    waits = []
    for number in range(1, 101):
        clock.now = 1000.0 + number / 97  # a batch for each slot of the pulls
        clock.waits.clear()
        client.await_confirm_slot(1.0)
        waits.append(sum(clock.waits))
    assert waits[0] > 0.005
    assert waits[-10:] == [0] * 10


def test_a_slot_after_the_end_of_the_lease_is_not_waited_for(client_of):
    clock = Clock()
    client = client_of(requests_per_sec=0.5, monotonic=clock.monotonic, sleep=clock.sleep)
    assert client.await_confirm_slot(1.0) is True
    assert client.await_confirm_slot(1.0) is False
    assert clock.waits == []
    assert client.await_confirm_slot(5.0) is True
    assert len(clock.waits) == 1


def test_a_confirm_without_time_left_is_not_sent(vod, client_of):
    vod.post(URL, json=response_of())
    with pytest.raises(ThrottledError, match="not sent"):
        client_of().confirm(None, ["h"], 0.0)
    assert len(vod.calls) == 0


@pytest.mark.parametrize("answer", [{"json": error_of("RequestLimitExceeded")}, {"body": b"", "status": 429}])
def test_a_throttled_request_halves_the_rate_of_its_action(vod, client_of, answer):
    clock = Clock()
    client = client_of(requests_per_sec=10, monotonic=clock.monotonic, sleep=clock.sleep)
    vod.post(URL, **answer)
    with pytest.raises(ThrottledError):
        client.pull("main", None)
    clock.now += 0.5
    for _ in range(3):
        with pytest.raises(ThrottledError):
            client.pull("main", None)
    assert clock.waits[-1] == pytest.approx(1 / 5.8, rel=0.1)


def test_each_call_is_one_debug_line(vod, client_of, lines):
    vod.post(URL, json=error_of("InternalError"))
    client = client_of()
    with pytest.raises(TransientError):
        client.pull("main", None)
    (line,) = lines
    assert line["event"] == "api.answered"
    assert (line["action"], line["request_id"], line["status"]) == ("PullEvents", "r-1", 200)
    assert line["error_code"] == "InternalError"
    assert line["duration_secs"] >= 0


def test_a_call_without_an_answer_is_one_debug_line(vod, client_of, lines):
    vod.post(URL, body=requests.ConnectionError(OSError(5, "cable")))
    with pytest.raises(TransientError):
        client_of().confirm(None, ["h"])
    (line,) = lines
    assert (line["event"], line["action"]) == ("api.answered", "ConfirmEvents")
    assert "cable" in line["error_message"]


# --- the limiter alone ------------------------------------------------------------------------------------------------


class Arrivals:
    """Many threads simulated in one: a wait only sets when its thread sends, and does not delay the others."""

    def __init__(self, quota, **more):
        self.now = 0.0
        self.wait = 0.0
        self.limiter = RateLimiter(quota, **more, monotonic=lambda: self.now, sleep=self._sleep)

    def _sleep(self, secs):
        self.wait = secs

    def send_at(self, now):
        self.now, self.wait = now, 0.0
        assert self.limiter.acquire()
        return now + self.wait


@given(st.integers(1, 300), st.sampled_from([0.02, 0.03]), st.lists(st.floats(0, 0.5), min_size=1, max_size=400))
def test_no_second_holds_more_requests_than_the_quota(quota, spare, gaps):
    arrivals = Arrivals(quota, spare=spare)
    now, sent = 0.0, []
    for gap in [*gaps, *[0.0] * 2 * quota]:
        now += gap
        sent.append(arrivals.send_at(now))
    sent.sort()
    for first, later in zip(sent, sent[quota:], strict=False):
        assert later - first >= 1 - 1e-9


@pytest.mark.parametrize("quota", [1, 10, 100, 1000])
def test_many_threads_get_97_percent_of_the_quota(quota):
    arrivals = Arrivals(quota)
    last = [arrivals.send_at(0.0) for _ in range(20 * quota)][-1]
    assert 20 * quota / last == pytest.approx(0.97 * quota, rel=0.06)


def test_slots_are_evenly_spaced():
    arrivals = Arrivals(100)
    sent = [arrivals.send_at(0.0) for _ in range(100)][3:]
    assert [later - first for first, later in pairwise(sent)] == pytest.approx([1 / 97] * 96)


def test_late_wake_ups_lose_no_capacity():
    clock = Clock()
    late = iter([0.004, 0.011, 0.0, 0.016] * 1000)

    def sleep(secs):
        clock.sleep(secs + next(late))

    limiter = RateLimiter(100, monotonic=clock.monotonic, sleep=sleep)
    began = clock.now
    for _ in range(970):
        limiter.acquire()
    assert clock.now - began < 10.05


def test_a_slot_that_comes_too_late_is_not_used_up():
    clock = Clock()
    limiter = RateLimiter(1, monotonic=clock.monotonic, sleep=clock.sleep)
    assert limiter.acquire(0)
    for _ in range(5):
        assert not limiter.acquire(0.5)
    assert clock.waits == []
    assert limiter.acquire(1.1)
    assert clock.waits == [pytest.approx(1.0, abs=0.03)]


def rate_of(arrivals, now):
    """The current rate of the limiter, computed from two future slots."""
    *_, first, later = [arrivals.send_at(now) for _ in range(5)]
    return 1 / (0.97 * (later - first))


def test_a_refusal_halves_the_rate_once_per_second_until_it_recovers():
    arrivals = Arrivals(100)
    for _ in range(10):  # reported by ten threads
        arrivals.limiter.throttled()
    assert rate_of(arrivals, 0.0) == pytest.approx(50)
    arrivals.now = 0.9
    arrivals.limiter.throttled()
    assert rate_of(arrivals, 0.9) == pytest.approx(63.5)
    arrivals.now = 2.0
    arrivals.limiter.throttled()
    assert rate_of(arrivals, 2.0) == pytest.approx(40)
    assert rate_of(arrivals, 4.0) == pytest.approx(70)
    assert rate_of(arrivals, 100.0) == pytest.approx(100)


def test_the_rate_never_falls_below_one_per_second():
    arrivals = Arrivals(2)
    for now in range(0, 100, 2):
        arrivals.now = float(now)
        arrivals.limiter.throttled()
    assert rate_of(arrivals, 98.0) == pytest.approx(1)


def test_a_quota_below_one_per_second_is_not_reduced():
    arrivals = Arrivals(0.5)
    arrivals.limiter.throttled()
    assert rate_of(arrivals, 0.0) == pytest.approx(0.5)


def test_threads_never_share_a_slot():
    waits = []
    limiter = RateLimiter(100, monotonic=lambda: 0.0, sleep=waits.append)
    threads = [threading.Thread(target=lambda: [limiter.acquire() for _ in range(50)]) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    waits.sort()
    assert len(waits) >= 397
    assert min(later - first for first, later in pairwise(waits)) == pytest.approx(1 / 97)
