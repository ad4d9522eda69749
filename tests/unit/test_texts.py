"""Events in a text that the operator gives to a command."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vodpoller.events.event import PulledEvent, make_event, read_event
from vodpoller.events.texts import events_in

SAMPLES = Path(__file__).parents[1] / "samples"
UPLOAD = {"EventType": "NewFileUpload", "FileUploadEvent": {"FileId": "5285890784246869930"}}


def found_in(text):
    return list(events_in(text, source="main", sub_app_id=7))


def with_handle(content, handle="h1"):
    return {"EventHandle": handle, **content}


@pytest.mark.parametrize(
    "text", ["", " \n\n", "[", '{"EventType": "A"', "[1,]", '{\n  "EventType": "A",\n  "B": {},\n}', "NaN", "no JSON"]
)
def test_text_that_is_not_json_is_one_unreadable_event(text):
    (found,) = found_in(text)
    assert found.event is None
    assert found.why
    assert found.place == ""


@pytest.mark.parametrize("value", [3, "a", None, True])
def test_a_value_that_is_not_an_object_is_not_an_event(value):
    for text, places in ((json.dumps(value), [""]), (json.dumps([value, value]), ["event 1", "event 2"])):
        found = found_in(text)
        assert [it.place for it in found] == places
        assert {it.why for it in found} == {"an event is a JSON object, and this is another value"}


def test_a_broken_line_does_not_affect_the_others():
    lines = [json.dumps(UPLOAD), '{"EventType":', "", json.dumps(with_handle({"EventType": "B"})), "7"]
    found = found_in("\n".join(lines) + "\n")
    assert [it.place for it in found] == ["line 1", "line 2", "line 4", "line 5"]
    assert [it.event.type if it.event else None for it in found] == ["NewFileUpload", None, "B", None]


def test_an_element_without_a_usable_handle_is_not_an_event():
    answer = {"Response": {"EventSet": [UPLOAD, with_handle(UPLOAD), with_handle(UPLOAD, "")], "RequestId": "r"}}
    found = found_in(json.dumps(answer))
    assert [it.why for it in found] == ["it has no usable EventHandle", "", "it has no usable EventHandle"]


def test_an_event_that_is_nested_too_deep_is_named():
    deep = '{"EventType":"A","B":' + "[" * 600 + "]" * 600 + "}"
    (found,) = found_in(deep)
    assert "levels deep" in found.why


@pytest.mark.parametrize("events", [None, [], "left out"])
@pytest.mark.parametrize("form", ["of VOD", "of an SDK"])
def test_an_answer_without_events_has_none(events, form):
    inner = {"RequestId": "r"} if events == "left out" else {"EventSet": events, "RequestId": "r"}
    if form == "of VOD":
        assert found_in(json.dumps({"Response": inner})) == []
    elif events != "left out":
        assert found_in(json.dumps(inner)) == []


def test_an_error_of_vod_has_no_event():
    assert found_in('{"Response": {"Error": {"Code": "ResourceNotFound", "Message": "no event"}}}') == []


@given(st.lists(st.sampled_from(["A", "FileDeleted", "CreateSnapshotByTimeOffsetComplete"]), min_size=1, max_size=5))
def test_every_form_of_the_same_events_is_read_as_the_daemon_reads_it(types):
    contents = [{"EventType": name, "E": {"FileId": 387702299774251236}} for name in types]
    wanted = [make_event(content, source="main", sub_app_id=7) for content in contents]
    pulled = [read_event(with_handle(content), source="main", sub_app_id=7) for content in contents]
    assert [item.event for item in pulled if isinstance(item, PulledEvent)] == wanted
    answer = {"EventSet": [with_handle(content) for content in contents], "RequestId": "r"}
    for text in (
        json.dumps({"Response": answer}),
        json.dumps(answer, indent=2),
        json.dumps(contents),
        json.dumps([with_handle(content) for content in contents]),
        "\n".join(json.dumps(content) for content in contents),
    ):
        found = found_in(text)
        assert [it.event for it in found] == wanted


@pytest.mark.parametrize("name", ["normal-callback.json", "reliable-callback.json"])
def test_the_documented_samples_are_read(name):
    (found,) = found_in((SAMPLES / name).read_text())
    assert found.event.type == "CreateSnapshotByTimeOffsetComplete"
