"""Calls of Tencent Cloud's APIs, with a stub that verifies each signature by the official SDK's function."""

import json
import time

import pytest
from pydantic import ValidationError

from tests.helpers import FakeClock, event, named, sink_context
from tests.receiver import Answer, black_hole, running_receiver
from tests.tencent_api import SECRET_ID, SECRET_KEY, TencentApi
from vodpoller.errors import ConfigError, NoKeyError, RejectedError, SkippedError, ThrottledError, TransientError
from vodpoller.events.event import restore_event
from vodpoller.sinks.tencent import TencentConfig, TencentSink
from vodpoller.vod.credentials import Credentials

KEY = Credentials(SECRET_ID, SECRET_KEY)


def settings(**more):
    given = {"service": "eb", "version": "2021-04-16", "action": "PutEvents", "params": "{Event: @}"}
    return TencentConfig(**{"type": "tencent", "requests_per_sec": 10_000.0, **given, **more})


@pytest.fixture
def api():
    with running_receiver(TencentApi()) as running:
        yield running


@pytest.fixture
def opened(api, log):
    """Opens the sink with the stub as its endpoint."""
    sinks = []

    def open_it(key=lambda: KEY, clocks=None, sleep=time.sleep, more_context=None, **more):
        context = sink_context(log, credentials=key, **(clocks or {}), **(more_context or {}))
        sinks.append(TencentSink("bus", settings(**{"endpoint": api.endpoint, **more}), context, sleep=sleep))
        return sinks[-1]

    yield open_it
    for sink in sinks:
        sink.close()


@pytest.fixture(autouse=True)
def no_proxies(monkeypatch):
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


def failure_of(sink, sent=None):
    with pytest.raises((TransientError, RejectedError)) as excinfo:
        sink.deliver([sent or event(1)], 5.0)
    return excinfo.value


def sent_to(api):
    return [json.loads(call.body) for call in api.calls]


# --- configuration ---


@pytest.mark.parametrize(
    ("wrong", "expected"),
    [
        ({"service": "EB"}, "service"),
        ({"service": "eb.tencentcloudapi.com"}, "service"),
        ({"version": "20210416"}, "version"),
        ({"action": "put events"}, "action"),
        ({"action": "PutEvents\r\nX: y"}, "action"),
        ({"region": "ap guangzhou"}, "region"),
        ({"params": "{EventBusId: }"}, "is not a JMESPath expression"),
        ({"params": "to_sring(@)"}, 'did you mean "to_string"'),
        ({"endpoint": "eb.tencentcloudapi.com"}, "for example https://eb.tencentcloudapi.com"),
        ({"endpoint": "http://eb.tencentcloudapi.com"}, "is not encrypted"),
        ({"endpoint": "https://eb.tencentcloudapi.com/v3"}, "more than scheme, host and port"),
        ({"requests_per_sec": 0.5}, "requests_per_sec"),
    ],
)
def test_invalid_keys_are_refused(wrong, expected):
    with pytest.raises(ValidationError, match=expected):
        settings(**wrong)


def test_without_an_api_key_the_sink_is_not_made(opened):
    with pytest.raises(
        ConfigError, match=r"^sinks\.bus: the API key that signs its requests is missing .*\[credentials\]"
    ):
        opened(None)


@pytest.mark.parametrize("status", [200, 502])
def test_an_answer_that_echoes_the_token_is_reported_without_it(opened, api, status):
    token = "a-token/with-a-slash"
    answer = {"Response": {"Error": {"Code": "InvalidParameter", "Message": f"not {token}"}}}
    text = json.dumps(answer).replace("/", "\\/") if status == 200 else f"<p>{token}"
    api.answer = Answer(status, body=text.encode())
    error = failure_of(opened(lambda: Credentials(SECRET_ID, SECRET_KEY, token)))
    assert "[secret]" in str(error)
    assert "slash" not in str(error)


def test_a_refused_token_is_reported_and_another_key_awaited(opened, api):
    keys = iter([Credentials(SECRET_ID, SECRET_KEY, "token-1"), Credentials(SECRET_ID, SECRET_KEY, "token-2")])
    refused = []
    sink = opened(lambda: next(keys), more_context={"on_refused_token": refused.append})
    api.key = (SECRET_ID, SECRET_KEY, "token-2")
    error = failure_of(sink)
    assert isinstance(error, NoKeyError)
    assert (error.error_code, error.retry_after_secs) == ("AuthFailure.TokenFailure", 1.0)
    assert refused == ["token-1"]
    sink.deliver([event(1)], 5.0)
    assert len(api.calls) == 1


def test_the_endpoint_is_that_of_the_service_unless_given():
    assert settings(service="scf").url == "https://scf.tencentcloudapi.com/"
    assert settings(endpoint="https://eb.intl.tencentcloudapi.com").url == "https://eb.intl.tencentcloudapi.com/"
    assert settings().place() == "eb.tencentcloudapi.com PutEvents"


def test_more_threads_than_the_quota_can_use_are_not_started(opened):
    sink = opened(requests_per_sec=1.0, timeout_secs=3.0, concurrency=64)
    assert sink.concurrency == 3
    assert sink.timeout_secs == 9.0
    assert opened(requests_per_sec=1.0, timeout_secs=300.0, concurrency=512).timeout_secs == 300.0


# --- what is not sent ---


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ("EventType", "the result is a string, but the parameters of an action are an object"),
        ("[EventType]", "the result is a list"),
        ("`1`", "the result is a number"),
        ("`true`", "the result is a boolean"),
        ("{Sum: sum(EventType)}", "it cannot be evaluated on this event"),
        ("{A: &EventType}", "cannot be written as JSON"),
    ],
)
def test_an_event_without_parameters_is_rejected_and_not_sent(opened, api, params, expected):
    sink = opened(params=params)
    error = failure_of(sink)
    assert isinstance(error, RejectedError)
    with pytest.raises(RejectedError):
        sink.examine(event(1))
    assert str(error).startswith("sinks.bus.params: ")
    assert expected in str(error)
    assert not api.received


def test_nothing_is_sent_if_params_are_null(opened, api):
    sink = opened(params="Nothing")
    with pytest.raises(SkippedError, match="the result is null"):
        sink.examine(event(1))
    assert not api.received


@pytest.mark.parametrize("form", ["callback", "cloudevents"])
def test_an_event_that_cannot_be_read_is_rejected(opened, api, form):
    malformed = restore_event(body=b"{broken", key=b"k", event_type="", source="main", sub_app_id=None)
    assert isinstance(failure_of(opened(format=form), malformed), RejectedError)
    assert not api.received


def test_without_a_slot_of_the_quota_in_time_nothing_is_sent(opened, api):
    sink = opened(requests_per_sec=1.0, timeout_secs=0.1)
    sink.deliver([event(1)], 5.0)
    with pytest.raises(ThrottledError, match=r"PutEvents was not sent: sinks\.bus\.requests_per_sec"):
        sink.deliver([event(2)], 0.2)
    assert len(api.received) == 1


# --- refusals ---


@pytest.mark.parametrize(
    ("code", "kind", "expected"),
    [
        ("InvalidParameter", RejectedError, ""),
        ("InvalidParameterValue.InvalidEvent", RejectedError, ""),
        ("MissingParameter", RejectedError, ""),
        ("UnknownParameter", RejectedError, ""),
        ("RequestSizeLimitExceeded", RejectedError, ""),
        ("RequestLimitExceeded", ThrottledError, ""),
        ("RequestLimitExceeded.UinLimitExceeded", ThrottledError, ""),
        ("InternalError", TransientError, ""),
        ("FailedOperation.ServiceError", TransientError, ""),
        ("LimitExceeded.InsufficientBalance", TransientError, ""),
        ("ResourceNotFound.Function", TransientError, ""),
        ("ResourceUnavailable", TransientError, ""),
        ("InvalidAction", TransientError, ""),
        ("UnsupportedRegion", TransientError, ""),
        ("AuthFailure.UnauthorizedOperation", TransientError, "in CAM, grant eb:PutEvents to the owner of the key"),
        ("UnauthorizedOperation.CamNoAuth", TransientError, "in CAM, grant eb:PutEvents to the owner of the key"),
        ("AuthFailure.TokenFailure", TransientError, "the temporary token is wrong or has ended"),
        ("", TransientError, "an error without a code"),
    ],
)
def test_only_a_refusal_of_the_parameters_rejects_the_event(opened, api, code, kind, expected):
    api.refuse_with = code
    error = failure_of(opened())
    assert type(error) is kind
    assert expected in str(error)
    assert "the stub says so" in str(error)
    assert (error.error_code, error.request_id) == (code, "request-0")


def test_a_refusal_of_a_repeated_request_rejects_nothing(opened, api):
    sink = opened()
    sink.deliver([event(1)], 5.0)
    api.refuse_with = "InvalidParameterValue.Duplicate"
    api.breaks = 1
    assert type(failure_of(sink)) is TransientError
    assert type(failure_of(sink)) is RejectedError


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (Answer(500), "answered 500 Internal Server Error: ''"),
        (Answer(404, body=b"<html>nothing here"), "answered 404 Not Found (is sinks.bus.endpoint right?): '<html>"),
        (Answer(302, {"Location": "https://elsewhere.example/"}), "answered 302 Found (is sinks.bus.endpoint right?)"),
        (Answer(200, body=b"<html>hello"), "the answer cannot be used"),
        (Answer(200, body=b'{"Response": []}'), "the answer cannot be used (it has no Response)"),
        (Answer(200, body=b'{"Response": {"RequestId": "1"'), "the answer cannot be used"),
        (Answer(204), "answered 204 No Content"),
    ],
)
def test_what_is_not_an_answer_of_the_api_accepts_nothing(opened, api, answer, expected):
    api.answer = answer
    error = failure_of(opened())
    assert type(error) is TransientError
    assert expected in str(error)


def test_retry_after_of_an_overloaded_api_is_passed_on(opened, api):
    api.answer = Answer(429, {"Retry-After": "7"})
    assert failure_of(opened()).retry_after_secs == 7


def test_an_answer_that_is_far_too_long_accepts_nothing(opened, api, monkeypatch):
    monkeypatch.setattr("vodpoller.sinks.tencent._ANSWER_MAX_BYTES", 100)
    api.answer = Answer(200, body=b'{"Response": {"RequestId": "1", "Text": "%s"}}' % (b"x" * 100))
    assert "it is longer than 100 bytes" in str(failure_of(opened()))


def test_no_answer_in_time_is_tried_again_and_shows_no_token(opened, api):
    api.answer = Answer(hangs=True)
    error = failure_of(opened(lambda: Credentials(SECRET_ID, SECRET_KEY, "the-token"), timeout_secs=0.2))
    assert type(error).__mro__[1] is TransientError
    assert f"127.0.0.1:{api.server_port}" in str(error)
    assert "the-token" not in str(error)


def test_a_token_that_no_header_can_hold_is_an_error_without_it(opened, api):
    error = failure_of(opened(lambda: Credentials(SECRET_ID, SECRET_KEY, "a\r\ntoken")))
    assert "token" not in str(error).replace("secret_id, token", "")
    assert not api.received


# --- what is sent ---


@pytest.mark.parametrize("service", ["eb", "scf", "vod"])
@pytest.mark.parametrize("token", ["", "a-token/with+all=="])
def test_a_call_is_signed_for_its_service_with_the_present_key(opened, api, service, token):
    api.service, api.key = service, (SECRET_ID, SECRET_KEY, token or None)
    sink = opened(lambda: Credentials(SECRET_ID, SECRET_KEY, token), service=service, region="ap-guangzhou")
    sink.deliver([event(1)], 5.0)
    (call,) = api.calls
    assert (call.method, call.path) == ("POST", "/")
    assert call.headers["X-TC-Action"] == "PutEvents"
    assert call.headers["X-TC-Version"] == "2021-04-16"
    assert call.headers["X-TC-Region"] == "ap-guangzhou"
    assert json.loads(call.body) == {"Event": event(1).content}


def test_a_region_that_is_not_given_is_not_sent(opened, api):
    sink = opened()
    sink.examine(event(1))
    assert not api.received
    sink.deliver([event(1)], 5.0)
    assert "X-TC-Region" not in api.calls[0].headers


def test_a_key_that_is_renewed_is_used_by_the_next_call(opened, api):
    keys = [KEY]
    sink = opened(lambda: keys[-1])
    sink.deliver([event(1)], 5.0)
    api.key = ("AKIDanother", "another-secret-key", "token")
    assert failure_of(sink).error_code == "AuthFailure.SecretIdNotFound"
    keys.append(Credentials(*api.key))
    sink.deliver([event(2)], 5.0)
    assert len(api.calls) == 2


@pytest.mark.parametrize("off_secs", [-7200, 7200])
def test_with_a_wrong_clock_the_server_s_time_is_used(opened, api, lines, off_secs):
    sink = opened(clocks={"wall": lambda: time.time() + off_secs})
    sink.deliver([event(1)], 5.0)
    sink.deliver([event(2)], 5.0)
    assert len(api.calls) == 2
    assert len(api.received) == 3
    (log_line,) = named(lines, "clock.corrected")
    assert log_line["skew_secs"] == pytest.approx(-off_secs, abs=60)


def test_a_signature_refused_at_the_right_time_is_not_sent_again(opened, api):
    api.refuse_with = "AuthFailure.SignatureExpire"
    assert failure_of(opened()).error_code == "AuthFailure.SignatureExpire"
    assert len(api.received) == 1


def test_parameters_keep_every_digit_and_character(opened, api):
    big = {"Id": 18446744073709551616123, "Title": "雪 \ud83c\n", "Ratio": 0.1}
    opened(params="{Own: Id, Text: to_string({Id: Id, Title: Title, Ratio: Ratio})}").deliver([event(1, **big)], 5.0)
    (sent,) = sent_to(api)
    assert sent["Own"] == big["Id"]
    assert json.loads(sent["Text"]) == big


def test_params_can_use_the_key_of_a_cloudevent(opened, api):
    sent = event(1)
    opened(format="cloudevents", params="{Token: id, Type: type, Own: data.EventType}").deliver([sent], 5.0)
    assert sent_to(api) == [{"Token": sent.key.hex(), "Type": f"com.tencent.vod.{sent.type}", "Own": sent.type}]


# --- the quota ---


def paced(opened, rate):
    """A sink and its clock, which advances only while the sink waits for a slot."""
    clock = FakeClock()
    return opened(clocks={"monotonic": clock}, sleep=clock.advance, requests_per_sec=rate), clock


def test_calls_keep_to_the_quota(opened, api):
    sink, clock = paced(opened, 20.0)
    began = clock.now
    for number in range(41):
        sink.deliver([event(number)], 10.0)
    assert 40 / 20 < clock.now - began < 1.1 * 40 / 20


def test_after_a_refusal_for_the_quota_calls_come_slower(opened, api):
    sink, clock = paced(opened, 100.0)
    sink.deliver([event(1)], 10.0)
    api.refuse_with = "RequestLimitExceeded"
    failure_of(sink)
    api.refuse_with = None
    began = clock.now
    for number in range(5):
        sink.deliver([event(number)], 10.0)
    assert clock.now - began > 1.5 * 5 / 100


# --- probe ---


def test_a_probe_connects_and_calls_nothing(api):
    context = sink_context(credentials=lambda: KEY)
    message = TencentSink.probe("bus", settings(endpoint=api.endpoint), context)
    assert message == f"127.0.0.1:{api.server_port} accepts connections"
    assert not api.received


def test_a_probe_says_what_cannot_be_reached():
    with black_hole() as port:
        config = settings(endpoint=f"http://127.0.0.1:{port}", timeout_secs=0.2)
        with pytest.raises(ConfigError, match=r"^sinks\.bus\.endpoint: 127\.0\.0\.1:\d+ "):
            TencentSink.probe("bus", config, sink_context(credentials=lambda: KEY))


def test_a_probe_without_an_api_key_says_so():
    with pytest.raises(ConfigError, match="the API key that signs its requests is missing"):
        TencentSink.probe("bus", settings(), sink_context())
