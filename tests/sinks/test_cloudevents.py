"""Documents of `format = "cloudevents"`, read with the CloudEvents project's own library."""

import json
from pathlib import Path

import pytest
from cloudevents.core.bindings import http
from cloudevents.core.formats.json import JSONFormat
from cloudevents.core.v1.event import CloudEvent
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers import sink_context
from tests.receiver import running_receiver
from vodpoller.events.codec import decode_json
from vodpoller.events.event import make_event, restore_event
from vodpoller.sinks.exec import ExecConfig, ExecSink
from vodpoller.sinks.file.sink import FileConfig, FileSink
from vodpoller.sinks.formats import cloudevent_key, content_type, encode
from vodpoller.sinks.stdout import StdoutConfig, StdoutSink
from vodpoller.sinks.webhook.config import WebhookConfig
from vodpoller.sinks.webhook.sink import WebhookSink

SAMPLES = Path(__file__).parents[1] / "samples"


def event(number=1, *, sub_app_id=None, **more):
    content = {"EventType": "NewFileUpload", "FileUploadEvent": {"FileId": str(number)}, **more}
    return make_event(content, source="main", sub_app_id=sub_app_id)


def read(document):
    return JSONFormat().read(CloudEvent, document)


def attributes(document):
    return {name: value for name, value in read(document).get_attributes().items() if name != "time"}


def malformed(body):
    return restore_event(body=body, key=bytes(range(32)), event_type="", source="main", sub_app_id=None)


# --- one document ---


def test_the_attributes_are_those_that_are_documented():
    sent = event(387702307091793695, sub_app_id=1500000001)
    assert attributes(encode(sent, "cloudevents")) == {
        "specversion": "1.0",
        "id": sent.key.hex(),
        "source": "//vod.tencentcloudapi.com/1500000001",
        "type": "com.tencent.vod.NewFileUpload",
        "subject": "387702307091793695",
        "datacontenttype": "application/json",
    }


def test_missing_fields_are_left_out_or_marked_as_unknown():
    found = attributes(
        encode(make_event({"ComposeMediaCompleteEvent": None}, source="m", sub_app_id=None), "cloudevents")
    )
    assert (found["type"], found["source"]) == ("com.tencent.vod.Unknown", "//vod.tencentcloudapi.com/0")
    assert "subject" not in found


@pytest.mark.parametrize(
    "more",
    [
        {"FileId": 18446744073709551616123, "Ratio": 0.1, "Nothing": None},
        {"Title": "half a pair: \ud83c"},
        {"Title": 'quotes " and \\ and \0 and \u2028 and 雪'},
        {"data": {"id": "1"}, "id": "x", "specversion": "9"},
        {"Deep": [[[[{}]]]]},
    ],
)
def test_the_data_is_the_body_byte_for_byte(more):
    sent = event(**more)
    document = encode(sent, "cloudevents")
    assert b'"data":' + sent.body + b"}" in document
    assert document.startswith(b'{"specversion":"1.0","id":"' + sent.key.hex().encode())
    assert decode_json(document.decode())["data"] == sent.content
    assert read(document).get_data() == sent.content
    assert b"\n" not in document


@pytest.mark.parametrize(
    ("event_type", "wanted"),
    [
        ("a\nb\0c\x7fd\x85e", "a\ufffdb\ufffdc\ufffdd\ufffde"),
        ("half \ud83c pair", "half \ufffd pair"),
        ("no \ufdd0 character \uffff \U0010fffe", "no \ufffd character \ufffd \ufffd"),
        ('"quoted" 雪 \U0001f3bf', '"quoted" 雪 \U0001f3bf'),
    ],
)
def test_characters_that_no_attribute_may_hold_are_replaced(event_type, wanted):
    sent = event(EventType=event_type, FileUploadEvent={"FileId": event_type})
    document = encode(sent, "cloudevents")
    assert read(document).get_type() == f"com.tencent.vod.{wanted}"
    assert read(document).get_subject() == wanted
    assert decode_json(document.decode())["data"] == sent.content


@given(st.text(st.characters(exclude_categories=())), st.text(st.characters(exclude_categories=())))
def test_any_text_makes_valid_attributes(event_type, file_id):
    sent = event(EventType=event_type, FileUploadEvent={"FileId": file_id})
    document = encode(sent, "cloudevents")
    for name, value in attributes(document).items():
        assert value
        value.encode()  # no lone surrogate
        assert not any(ord(c) < 32 or 127 <= ord(c) < 160 for c in value), name
        assert not any(0xFDD0 <= ord(c) <= 0xFDEF or ord(c) & 0xFFFE == 0xFFFE for c in value), name
    assert cloudevent_key(decode_json(document.decode())) == sent.key


@pytest.mark.parametrize("body", [b'{"EventType": "cut of', b"\xff\xfe", b"", b'"},"id":"forged', b"NaN", b"{}]"])
def test_a_body_that_is_not_json_is_carried_as_bytes(body):
    document = encode(malformed(body), "cloudevents")
    assert read(document).get_data() == body
    assert read(document).get_id() == bytes(range(32)).hex()
    assert read(document).get_datacontenttype() == "application/octet-stream"


def test_an_empty_body_that_is_json_is_data():
    document = encode(malformed(b"{}"), "cloudevents")
    assert json.loads(document)["data"] == {}
    assert read(document).get_datacontenttype() == "application/json"


@pytest.mark.parametrize(
    ("body_format", "wanted"), [("callback", "application/json"), ("cloudevents", JSONFormat().get_content_type())]
)
def test_the_media_type_is_that_of_the_format(body_format, wanted):
    assert content_type(body_format) == wanted


@pytest.mark.parametrize(
    "change",
    [
        {"specversion": "0.3"},
        {"specversion": None},
        {"id": "not hex"},
        {"id": "ab" * 31},
        {"id": "AB" * 32},
        {"id": 5},
        {"source": ""},
        {"type": None},
    ],
)
def test_a_foreign_or_invalid_cloudevent_has_no_key(change):
    document = json.loads(encode(event(), "cloudevents"))
    assert cloudevent_key(document) == event().key
    assert cloudevent_key({**document, **change}) is None


# --- as each sink writes it ---


def by_file(tmp_path, sent):
    sink = FileSink(
        "it", FileConfig(type="file", path=str(tmp_path / "events.jsonl"), format="cloudevents"), sink_context()
    )
    sink.deliver([sent], 10.0)
    sink.close()
    return (tmp_path / "events.jsonl").read_bytes()


def by_stdout(tmp_path, sent):
    with (tmp_path / "stdout").open("wb") as stream:
        StdoutSink("it", StdoutConfig(type="stdout", format="cloudevents"), sink_context(), stream=stream).deliver(
            [sent], 10.0
        )
    return (tmp_path / "stdout").read_bytes()


def by_exec(tmp_path, sent):
    command = ["sh", "-c", 'cat >"$1"', "sh", str(tmp_path / "body")]
    ExecSink("it", ExecConfig(type="exec", command=command, format="cloudevents"), sink_context()).deliver([sent], 10.0)
    return (tmp_path / "body").read_bytes()


def by_webhook(tmp_path, sent):
    with running_receiver() as receiver:
        sink = WebhookSink("it", WebhookConfig(type="webhook", url=receiver.url, format="cloudevents"), sink_context())
        sink.deliver([sent], 10.0)
        sink.close()
        (received,) = receiver.received
    assert received.headers["Content-Type"] == "application/cloudevents+json"
    found = http.from_http_event(http.HTTPMessage(headers=received.headers, body=received.body))
    assert (found.get_id(), found.get_data()) == (sent.key.hex(), sent.content)
    return received.body


@pytest.mark.parametrize("by", [by_exec, by_file, by_stdout, by_webhook])
def test_every_sink_writes_an_event_that_the_library_reads(tmp_path, monkeypatch, by):
    for name in ("http_proxy", "all_proxy", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    sent = event(7, sub_app_id=1500000001, Title="雪 \0")
    found = read(by(tmp_path, sent))
    assert (found.get_id(), found.get_specversion()) == (sent.key.hex(), "1.0")
    assert (found.get_source(), found.get_subject()) == ("//vod.tencentcloudapi.com/1500000001", "7")
    assert (found.get_type(), found.get_datacontenttype()) == ("com.tencent.vod.NewFileUpload", "application/json")
    assert found.get_data() == sent.content


# --- a file's recovery ---


def recovered(path, body_format="cloudevents", sub_app_ids=(None, 1500000001)):
    sink = FileSink("it", FileConfig(type="file", path=str(path), format=body_format), sink_context())
    try:
        return [key for portion in sink.recover(None, sub_app_ids) for key in portion.keys]
    finally:
        sink.close()


def test_recovery_takes_keys_from_the_ids_for_any_sub_app_id(tmp_path):
    path = tmp_path / "events.jsonl"
    sent = [event(number, sub_app_id=number * 1000) for number in range(1, 4)]
    path.write_bytes(b"".join(encode(each, "cloudevents") + b"\n" for each in sent) + b'{"specversion":"1.0","id')
    assert recovered(path) == [each.key for each in sent]
    assert path.read_bytes().count(b"\n") == 3


def test_lines_that_are_not_a_cloudevent_are_skipped_and_kept(tmp_path):
    path = tmp_path / "events.jsonl"
    good = encode(event(), "cloudevents")
    strange = [
        event(2).body,
        b"[1]",
        b"not json",
        b"{}",
        good.replace(b'"specversion":"1.0"', b'"specversion":"0.3"'),
        good.replace(event().key.hex().encode(), b"my-own-id"),
    ]
    content = b"".join(line + b"\n" for line in [good, *strange, encode(event(3), "cloudevents")])
    path.write_bytes(content)
    assert recovered(path) == [event().key, event(3).key]
    assert path.read_bytes() == content


def test_the_key_of_a_body_that_is_not_json_is_recovered(tmp_path):
    by_file(tmp_path, malformed(b'{\n"broken'))
    assert recovered(tmp_path / "events.jsonl") == [bytes(range(32))]


def test_positions_include_the_envelopes(tmp_path):
    sink = FileSink(
        "it", FileConfig(type="file", path=str(tmp_path / "events.jsonl"), format="cloudevents"), sink_context()
    )
    sink.deliver([event(1), event(2)], 10.0)
    position = sink.position()
    sink.close()
    assert position.offset_bytes == (tmp_path / "events.jsonl").stat().st_size
    assert position.offset_bytes > 2 * len(event(1).body)
