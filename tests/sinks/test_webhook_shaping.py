"""Requests in the form that the receiver needs, and answers whose content decides the outcome."""

import base64
import gzip
import hashlib
import hmac
import json
import re
from urllib.parse import parse_qs, urlsplit

import pytest
from pydantic import ValidationError

from tests.helpers import event, sink_context
from tests.receiver import Answer, raw_server, read_request, running_receiver
from vodpoller.errors import ConfigError, RejectedError, SkippedError, TransientError
from vodpoller.events.event import make_event
from vodpoller.secret import ConfigContext, Secret
from vodpoller.sinks.webhook.config import WebhookConfig
from vodpoller.sinks.webhook.sink import WebhookSink

SECRET = "whsec_" + base64.b64encode(bytes(range(32))).decode()
NOW = 1_700_000_000.75
WITH_TOKEN = "https://robot.example/hook/0123456789"


@pytest.fixture(autouse=True)
def no_proxies(monkeypatch):
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.fixture
def receiver():
    with running_receiver() as receiver:
        receiver.answer = Answer(200)
        yield receiver


@pytest.fixture
def opened(receiver):
    sinks = []

    def open_it(*, base=None, **keys):
        given = {"url": receiver.url} if "url_file" not in keys else {}
        config = WebhookConfig.model_validate(
            {"type": "webhook", **given, **keys}, context=ConfigContext(base=base) if base else None
        )
        sinks.append(WebhookSink("hook", config, sink_context(wall=lambda: NOW)))
        return sinks[-1]

    yield open_it
    for sink in sinks:
        sink.close()


def deliver(sink, *events):
    """Examine and deliver each event, as the worker does."""
    for each in events or (event(1),):
        sink.examine(each)
        sink.deliver([each], 5.0)


def problem_of(**keys):
    with pytest.raises(ValidationError) as failure:
        WebhookConfig(type="webhook", **keys)
    (error,) = failure.value.errors()
    return (error.get("ctx", {}).get("key") or error["loc"][0]), error["msg"]


# --- configuration ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["body", "accept_when", "reject_when"])
def test_an_expression_that_does_not_compile_names_key_and_position(key):
    named, message = problem_of(url=WITH_TOKEN, **{key: "{a: b,\n c 7}"})
    assert named == key
    assert '" c 7}" is not a JMESPath expression: line 2, column 4: "7" is not valid here' in message


@pytest.mark.parametrize(
    ("keys", "key", "expected"),
    [
        ({}, "url", "is missing (for example: url ="),
        ({"url": WITH_TOKEN, "url_file": Secret(value=WITH_TOKEN)}, "url_file", "is given together with url"),
        ({"url_file": Secret(value="robot.example/hook")}, "url_file", "not an http or https address"),
        ({"url_file": Secret(value="https://me:hunter2@robot.example/")}, "url_file", "it holds credentials"),
        ({"url_file": Secret(value="https://robot.example/" + "a" * 2048)}, "url_file", "longer than 2048 characters"),
        ({"url": WITH_TOKEN, "sign": "dingtalk"}, "sign", '"dingtalk" needs a secret (add secret_file)'),
        ({"url": WITH_TOKEN, "sign": "feishu", "secret": "x" * 22}, "sign", "add body, which makes the message"),
        ({"url": WITH_TOKEN, "sign": "dingtalk", "secret": SECRET}, "secret", "it does not begin with SEC"),
        ({"url": WITH_TOKEN, "sign": "feishu", "secret": SECRET}, "secret", "it is not the secret of a Feishu bot"),
        ({"url": WITH_TOKEN, "sign": "standard", "secret": "SEC" + "0" * 7}, "secret", "whsec_ and base64 of 24"),
        ({"url": WITH_TOKEN, "body": "@", "format": "cloudevents"}, "format", "has no effect together with body"),
        ({"url": WITH_TOKEN, "method": "GET"}, "method", "Input should be 'POST', 'PUT' or 'PATCH'"),
        ({"url": WITH_TOKEN, "max_per_minute": 0}, "max_per_minute", "greater than or equal to 1"),
        ({"url": WITH_TOKEN, "max_per_minute": 60_001}, "max_per_minute", "less than or equal to 60000"),
    ],
)
def test_keys_that_do_not_fit_together_are_refused(keys, key, expected):
    named, message = problem_of(**keys)
    assert named == key
    assert expected in message
    assert "hunter2" not in message


def test_max_per_minute_is_left_to_the_worker(opened):
    assert opened(max_per_minute=20).max_per_minute == 20
    assert opened().max_per_minute is None


# --- the request ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["length(Missing)", "to_number('nan')", "&EventType", "join(' ', [`1`])"])
def test_an_event_that_body_cannot_shape_is_rejected_and_nothing_sent(opened, receiver, text):
    sink = opened(body=text)
    with pytest.raises(RejectedError, match=r"^sinks\.hook\.body: "):
        sink.examine(event(1))
    with pytest.raises(RejectedError):
        sink.deliver([event(1)], 5.0)
    assert receiver.received == []


def test_nothing_is_sent_if_body_is_null(opened, receiver):
    sink = opened(body="Missing.{text: EventType}")
    with pytest.raises(SkippedError):
        sink.examine(event(1))
    assert receiver.received == []


def test_without_body_the_event_itself_is_sent(opened, receiver):
    deliver(opened())
    assert receiver.received[0].body == event(1).body


@pytest.mark.parametrize("text", ["`false`", "`0`", "''", "`[]`", "`{}`"])
def test_any_body_that_is_not_null_is_sent(opened, receiver, text):
    deliver(opened(body=text))
    assert json.loads(receiver.received[0].body) == json.loads(text.strip("`").replace("'", '"'))


def test_the_shaped_body_is_json_with_every_digit(opened, receiver):
    sent = make_event({"EventType": "雪", "FileId": 18446744073709551616123}, source="main", sub_app_id=None)
    deliver(opened(body="{type: EventType, id: FileId}", method="PUT"), sent)
    (received,) = receiver.received
    assert received.method == "PUT"
    assert received.headers["Content-Type"] == "application/json"
    assert received.body == '{"type":"雪","id":18446744073709551616123}'.encode()
    assert received.headers["webhook-id"] == sent.key.hex()


def test_the_shaped_body_is_signed(opened, receiver):
    deliver(opened(body="{type: EventType}", secret=SECRET))
    (received,) = receiver.received
    signed = f"{event(1).key.hex()}.{int(NOW)}.".encode() + received.body
    digest = hmac.digest(bytes(range(32)), signed, hashlib.sha256)
    assert received.headers["webhook-signature"] == f"v1,{base64.b64encode(digest).decode()}"


@pytest.mark.parametrize("query", ["", "?access_token=abc"])
def test_the_signature_for_dingtalk_is_in_the_query(opened, receiver, query):
    secret = "SEC" + "0123456789abcdef" * 4
    deliver(opened(url=receiver.url + query, sign="dingtalk", secret=secret, body="{msgtype: 'text'}"))
    (received,) = receiver.received
    found = parse_qs(urlsplit(received.path).query)
    digest = hmac.digest(secret.encode(), f"1700000000750\n{secret}".encode(), hashlib.sha256)
    assert found.pop("timestamp") == ["1700000000750"]
    assert found.pop("sign") == [base64.b64encode(digest).decode()]
    assert found == ({"access_token": ["abc"]} if query else {})
    assert "webhook-signature" not in received.headers


def test_the_signature_for_feishu_is_in_the_message(opened, receiver):
    deliver(opened(sign="feishu", secret="feishu-secret", body="{msg_type: 'text'}"))
    (received,) = receiver.received
    digest = hmac.digest(b"1700000000\nfeishu-secret", b"", hashlib.sha256)
    signature = base64.b64encode(digest).decode()
    assert json.loads(received.body) == {"msg_type": "text", "timestamp": "1700000000", "sign": signature}


def test_a_message_without_place_for_feishus_signature_is_rejected(opened):
    with pytest.raises(RejectedError, match="the result is not an object"):
        opened(sign="feishu", secret="feishu-secret", body="'text'").examine(event(1))


def test_a_url_in_a_file_is_read_again_at_reopen(opened, receiver, tmp_path):
    file = tmp_path / "robot_url"
    file.write_text(f"{receiver.url}/first-token\n")
    sink = opened(base=tmp_path, url_file="robot_url")
    deliver(sink)
    file.write_text(f"{receiver.url}/second-token\n")
    sink.config.url_file.reread()
    deliver(sink)
    sink.reopen()
    deliver(sink)
    assert [received.path for received in receiver.received] == [
        "/callback/first-token",
        "/callback/first-token",
        "/callback/second-token",
    ]


def test_an_invalid_new_url_keeps_the_last_one(opened, receiver, tmp_path):
    file = tmp_path / "robot_url"
    file.write_text(receiver.url)
    sink = opened(base=tmp_path, url_file="robot_url")
    file.write_text("robot.example/hook/0123456789")
    with pytest.raises(OSError, match="not an http or https address") as failure:
        sink.config.url_file.reread()
    assert "0123456789" not in str(failure.value)
    sink.reopen()
    deliver(sink)
    assert len(receiver.received) == 1


def test_only_the_host_of_a_url_in_a_file_is_shown(opened, receiver, tmp_path):
    (tmp_path / "robot_url").write_text(f"{receiver.url}/t0ken?key=hunter2&v=1")
    sink = opened(base=tmp_path, url_file="robot_url")
    receiver.answer = Answer(400, body=b"POST /callback/t0ken?key=hunter2&v=1 is not good")
    with pytest.raises(RejectedError, match=r"400 Bad Request: POST \*\*\*") as failure:
        deliver(sink)
    assert "t0ken" not in str(failure.value) + repr(sink.config)
    assert "hunter2" not in str(failure.value) + repr(sink.config)
    assert sink.config.place() == f"127.0.0.1:{receiver.server_port}"
    assert list(sink.config.secrets()) == [sink.config.url_file]
    assert set(sink.config.secret_file_keys()) == {"url_file", "secret_file"}


def test_advice_names_the_key_that_has_the_url(opened, receiver, tmp_path):
    (tmp_path / "robot_url").write_text(receiver.url)
    receiver.answer = Answer(404)
    with pytest.raises(TransientError, match=r"is sinks\.hook\.url_file the right address for PATCH\?"):
        deliver(opened(base=tmp_path, url_file="robot_url", method="PATCH"))


def test_a_proxy_that_cannot_be_used_names_the_key_that_has_the_url(opened, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://")
    with pytest.raises(ConfigError, match=r"^sinks\.hook\.url_file: the proxy"):
        opened(url_file=Secret(value="http://robot.example/"))


# --- the answer -------------------------------------------------------------------------------------------------------

ROBOT = {"accept_when": "errcode == `0`", "reject_when": "errcode == `45002`"}


@pytest.mark.parametrize(
    "body",
    [
        b'{"errcode":45009,"errmsg":"api freq out of limit"}',
        b'{"errcode":-1}',
        b'{"errcode":"0"}',
        b'{"errcode":false}',
        b'{"errcode":null}',
        b"{}",
        b"[]",
        b"null",
        b"0",
        b"ok",
        b"",
        b"<html>errcode: 0</html>",
        b'{"errcode":0',
        b'{"errcode":0,"errcode":45009}',
    ],
)
def test_a_refusal_with_status_200_is_not_accepted(opened, receiver, body):
    receiver.answer = Answer(200, body=body)
    with pytest.raises(TransientError, match=r"answered 200 OK, but sinks\.hook\.accept_when does not hold") as failure:
        deliver(opened(**ROBOT))
    assert body.decode() in str(failure.value)


@pytest.mark.parametrize("body", [b'{"errcode":0,"errmsg":"ok"}', b' {"errcode": 0}\n', b'\t{"errcode":0.0}'])
def test_an_answer_that_fulfils_accept_when_accepts(opened, receiver, body):
    receiver.answer = Answer(200, body=body)
    deliver(opened(**ROBOT))


@pytest.mark.parametrize("status", [200, 400, 403, 429, 500])
def test_reject_when_rejects_at_any_status(opened, receiver, status):
    receiver.answer = Answer(status, body=b'{"errcode":45002,"errmsg":"content exceed max length"}')
    with pytest.raises(RejectedError, match=rf"answered {status} .*: .*content exceed max length"):
        deliver(opened(**ROBOT))


def test_reject_when_wins_over_accept_when(opened, receiver):
    receiver.answer = Answer(200, body=b'{"errcode":0,"bad":true}')
    with pytest.raises(RejectedError):
        deliver(opened(accept_when="errcode == `0`", reject_when="bad"))


@pytest.mark.parametrize(("status", "kind"), [(400, TransientError), (413, RejectedError), (422, RejectedError)])
def test_with_reject_when_400_alone_rejects_nothing(opened, receiver, status, kind):
    receiver.answer = Answer(status, body=b'{"errcode":45009}')
    with pytest.raises(kind):
        deliver(opened(**ROBOT))


def test_without_reject_when_400_rejects(opened, receiver):
    receiver.answer = Answer(400, body=b'{"errcode":45009}')
    with pytest.raises(RejectedError):
        deliver(opened(accept_when="errcode == `0`"))


@pytest.mark.parametrize("key", ["accept_when", "reject_when"])
def test_an_answer_that_cannot_be_evaluated_accepts_nothing(opened, receiver, key):
    receiver.answer = Answer(200, body=b'{"errcode":0}')
    expected = rf"answered 200 OK, but sinks\.hook\.{key} cannot be evaluated on the answer: .*contains"
    with pytest.raises(TransientError, match=expected):
        deliver(opened(**{key: "contains(errmsg, 'ok')"}))


def test_a_failed_status_counts_if_the_answer_cannot_be_evaluated(opened, receiver):
    receiver.answer = Answer(503, {"Retry-After": "7"}, body=b"{}")
    with pytest.raises(TransientError, match=r"answered 503 Service Unavailable$") as failure:
        deliver(opened(reject_when="contains(errmsg, 'ok')"))
    assert failure.value.retry_after_secs == 7.0


def test_retry_after_counts_with_status_200_too(opened, receiver):
    receiver.answer = Answer(200, {"Retry-After": "30"}, b'{"errcode":45009}')
    with pytest.raises(TransientError) as failure:
        deliver(opened(**ROBOT))
    assert failure.value.retry_after_secs == 30.0


def test_a_text_is_evaluated_as_a_text(opened, receiver):
    sink = opened(accept_when="@ == 'ok'", reject_when="contains(['no_text'], @)")
    receiver.answer = Answer(200, body=b"ok\n")
    deliver(sink)
    receiver.answer = Answer(400, body=b"no_text")
    with pytest.raises(RejectedError):
        deliver(sink)


def test_an_unrequested_compressed_answer_is_evaluated(opened, receiver):
    receiver.answer = Answer(200, {"Content-Encoding": "gzip"}, gzip.compress(b'{"errcode":0}'))
    deliver(opened(**ROBOT))


def test_an_answer_that_is_too_long_to_evaluate_accepts_nothing(opened, receiver):
    receiver.answer = Answer(200, body=b'{"errcode":0,"more":"' + b"x" * 70_000 + b'"}')
    with pytest.raises(TransientError, match="cannot be evaluated on an answer of over 65536 bytes"):
        deliver(opened(**ROBOT))


@pytest.mark.parametrize("answer", [b"HTTP/1.1 200 OK\r\nContent-Length: 40\r\n\r\n" + b'{"errcode":0}', b""])
def test_an_incomplete_answer_accepts_nothing(opened, answer):
    def serve(connection, stopping):
        read_request(connection)
        connection.sendall(answer)

    with raw_server(serve) as url, pytest.raises(TransientError, match="closed the connection without a whole answer"):
        deliver(opened(url=url, **ROBOT))


def test_an_echo_of_the_secret_in_an_answer_is_hidden(opened, receiver):
    secret = "SEC" + "0123456789abcdef" * 4
    receiver.answer = Answer(200, body=json.dumps({"errcode": 310000, "errmsg": f"sign of {secret}"}).encode())
    with pytest.raises(TransientError, match=re.escape('"errmsg": "sign of ***"')):
        deliver(opened(sign="dingtalk", secret=secret, **ROBOT))


def test_a_plain_success_makes_no_status_text(opened, receiver, monkeypatch):
    monkeypatch.setattr("vodpoller.sinks.webhook.sink.status_text", lambda status: pytest.fail("this text is not read"))
    opened().deliver([event(1)], 5.0)
    assert len(receiver.received) == 1
