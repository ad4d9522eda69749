"""Reading of a callback's body and signature, and the networks that may send callbacks."""

import hashlib
import json
from contextlib import suppress
from dataclasses import dataclass
from ipaddress import ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vodpoller.callback.reading import is_allowed, read_callback
from vodpoller.callback.refusal import BAD_SIGNATURE, NO_EVENT, NOT_JSON, OLD_AND_UNSIGNED, RefusedError
from vodpoller.events.event import Malformed, make_event
from vodpoller.secret import Secret

NOW = 1_800_000_000
KEY = "the-key-that-is-set-at-vod"
EVENT = {"EventType": "NewFileUpload", "FileUploadEvent": {"FileId": "387702292285462759"}}


@dataclass(frozen=True)
class Source:
    name: str = "pushed"
    sub_app_id: int | None = 7
    sign_key: Secret | None = None
    allow_from: tuple | None = None
    forwarded_from: tuple | None = None


SIGNED = Source(sign_key=Secret(value=KEY))


def signed(content, *, key=KEY, expires=NOW + 600):
    return {**content, "Sign": hashlib.md5(f"{key}{expires}".encode()).hexdigest(), "T": expires}


def read(content, source=Source(), now=NOW):
    return read_callback(content if isinstance(content, bytes) else json.dumps(content).encode(), "1", source, now=now)


def refusal_of(content, source=Source()):
    with pytest.raises(RefusedError) as caught:
        read(content, source)
    return caught.value.refusal


# --- the signature ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    [
        EVENT,
        {**signed(EVENT), "Sign": "0" * 32},
        {**signed(EVENT), "Sign": ""},
        {**signed(EVENT), "Sign": None},
        {**signed(EVENT), "T": NOW + 601},
        {**signed(EVENT), "T": None},
        {**signed(EVENT), "T": True},
        {**signed(EVENT), "Sign": "é" * 32},
        {name: value for name, value in signed(EVENT).items() if name != "T"},
        signed(EVENT, key="another-key"),
        signed({"Garbage": 1}, key="another-key"),
    ],
)
def test_with_a_key_a_body_that_is_not_signed_with_it_is_refused(content):
    assert refusal_of(content, SIGNED) is BAD_SIGNATURE


def test_with_a_key_an_unreadable_body_is_refused():
    assert refusal_of(b'{"EventType": "NewFileUpload"', SIGNED) is NOT_JSON


def test_with_a_key_the_old_format_is_refused_with_its_remedy():
    refusal = refusal_of({"version": "4.0", "eventType": "ClipComplete", "data": {}}, SIGNED)
    assert refusal is OLD_AND_UNSIGNED
    assert "set the callback format to 3.0" in refusal.hint


@pytest.mark.parametrize("form", [int, str])
def test_a_valid_signature_is_removed_from_the_event(form):
    content = signed(EVENT)
    callback = read({**content, "T": form(content["T"])}, SIGNED)
    assert callback.event.event == make_event(EVENT, source="pushed", sub_app_id=7)
    assert callback.expired_secs == 0


def test_a_signature_in_capitals_is_valid():
    content = signed(EVENT)
    assert read({**content, "Sign": content["Sign"].upper()}, SIGNED).event.event.content == EVENT


def test_an_expired_signature_is_reported_and_the_event_is_read():
    callback = read(signed(EVENT, expires=NOW - 60), SIGNED)
    assert (callback.expired_secs, callback.event.event.content) == (60, EVENT)


def test_without_a_key_the_signature_is_removed_too():
    callback = read(signed(EVENT, key="whatever", expires=1))
    assert (callback.event.event.content, callback.expired_secs) == (EVENT, 0)


@pytest.mark.parametrize(
    "more",
    [{"Sign": "0" * 32}, {"T": 1_800_000_000}, {"Sign": "short", "T": 1}, {"Sign": "0" * 32, "T": "soon"}],
)
def test_what_does_not_look_like_a_signature_belongs_to_the_event(more):
    assert read({**EVENT, **more}).event.event.content == {**EVENT, **more}


# --- kinds of bodies --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [b"", b"GET / HTTP/1.1", b"\xff\xfe", b"[" * 100_000, b'{"a": NaN}'])
def test_what_is_not_json_is_refused(content):
    assert refusal_of(content) is NOT_JSON


@pytest.mark.parametrize("content", [[], "EventType", 7, None, {}, {"a": 1}, {"EventType": 7}, [EVENT]])
def test_json_that_is_not_an_event_is_refused(content):
    assert refusal_of(content) is NO_EVENT


@pytest.mark.parametrize(
    "content", [EVENT, {"EventType": "Unknown"}, {"EditMediaComplete": {"TaskId": "1"}}, {"EventType": None, "X": {}}]
)
def test_an_event_may_lack_its_type_or_its_payload(content):
    assert read(content).event.event.content == content


def test_numbers_keep_every_digit():
    body = b'{"EventType":"NewFileUpload","FileUploadEvent":{"FileId":38770229228546275912}}'
    assert read(body).event.event.body == body


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b'{"EventType": "NewFileUpload", "FileUploadEvent": {', "Expecting"),
        (b'{"EventType": "NewFileUpload", "FileUploadEvent": {"FileId": "\xff"}}', "utf-8"),
        (b'{"EventType": "X", "Y": ' + b"[" * 600 + b"]" * 600 + b"}", "nested more than 512 levels"),
    ],
)
def test_a_damaged_event_is_kept_unchanged(body, reason):
    broken = read(body).event
    assert isinstance(broken, Malformed)
    assert (broken.handle, broken.event.body) == ("1", body)
    assert reason in broken.why


@pytest.mark.parametrize("version", ["4.0", 4, 4.0])
def test_the_old_format_is_kept_as_malformed_with_its_remedy(version):
    broken = read(signed({"version": version, "eventType": "ClipComplete", "data": {"status": 0}}), SIGNED).event
    assert isinstance(broken, Malformed)
    assert "set the callback format to 3.0" in broken.why
    assert json.loads(broken.event.body) == {"version": version, "eventType": "ClipComplete", "data": {"status": 0}}


def too_deep(content):
    return json.dumps(content).encode()[:-1] + b', "Y": ' + b"[" * 600 + b"]" * 600 + b"}"


def test_an_unreadable_event_keeps_its_key_under_other_signatures():
    first, second = (read(too_deep(signed(EVENT, expires=NOW + secs)), SIGNED).event.event for secs in (600, 605))
    assert first.key == second.key
    assert signed(EVENT)["Sign"] not in first.body.decode()


def test_a_body_of_the_old_format_that_is_too_deep_is_kept():
    broken = read(too_deep({"version": "4.0", "eventType": "ClipComplete"})).event
    assert isinstance(broken, Malformed)
    assert "nested more than 512 levels" in broken.why


@given(st.binary(max_size=200))
def test_any_body_is_read_or_refused(data):
    with suppress(RefusedError):
        read(data)


# --- the sender's address ---------------------------------------------------------------------------------------------

OURS = Source(allow_from=(ip_network("203.0.113.0/24"),), forwarded_from=(ip_network("10.0.0.0/8"),))


@pytest.mark.parametrize(
    ("peer", "forwarded_for"),
    [
        ("198.51.100.1", ""),
        ("198.51.100.1", "203.0.113.7"),  # the header counts only if one of our proxies sent it
        ("10.0.0.1", ""),
        ("10.0.0.1", "198.51.100.1"),
        ("10.0.0.1", "203.0.113.7, 198.51.100.1"),
        ("10.0.0.1", "203.0.113.7, nonsense"),
        ("10.0.0.1", "203.0.113.7,"),
        ("fe80::1%eth0", ""),
    ],
)
def test_an_address_outside_the_networks_is_not_allowed(peer, forwarded_for):
    assert not is_allowed(OURS, peer, forwarded_for)


@pytest.mark.parametrize(
    ("peer", "forwarded_for"),
    [
        ("203.0.113.7", ""),
        ("::ffff:203.0.113.7", ""),
        ("203.0.113.7", "198.51.100.1"),
        ("10.0.0.1", "203.0.113.7"),
        ("10.0.0.1", "198.51.100.1, 203.0.113.7"),
        ("10.0.0.1", "203.0.113.7, 10.9.9.9"),
        ("::ffff:10.0.0.1", "203.0.113.7 , ::ffff:10.9.9.9"),
    ],
)
def test_an_address_in_the_networks_is_allowed(peer, forwarded_for):
    assert is_allowed(OURS, peer, forwarded_for)


def test_without_networks_every_address_is_allowed():
    assert is_allowed(Source(), "198.51.100.1", "")
