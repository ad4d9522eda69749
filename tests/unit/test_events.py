"""Reading of VOD's answers: each event is kept, whatever its shape, and a broken element affects no other."""

import json
import time
from itertools import islice, pairwise
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from vodpoller.events.codec import DEPTH_MAX, UnreadableError, decode_json, encode_json
from vodpoller.events.event import (
    Event,
    Lease,
    Malformed,
    PulledEvent,
    event_key,
    make_event,
    read_event,
    restore_event,
)
from vodpoller.events.salvage import is_whole, salvage_events
from vodpoller.events.snapshots import Snapshot, file_id_of, payload_of, snapshots_of, task_id_of

SAMPLES = Path(__file__).parents[1] / "samples"

strings = st.text(st.characters(codec="utf-8"))
texts = st.one_of(strings, st.text(st.characters()))  # the latter with lone surrogates
numbers = st.one_of(st.integers(), st.floats(allow_nan=False, allow_infinity=False))
json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), numbers, texts),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(texts, inner, max_size=4)),
    max_leaves=12,
)
contents = st.dictionaries(texts.filter(lambda name: name != "EventHandle"), json_values, max_size=6)
handles = st.text(st.characters(codec="utf-8"), min_size=1)


def read(item, *, sub_app_id=None):
    return read_event(item, source="main", sub_app_id=sub_app_id)


def read_whole(item, *, sub_app_id=None):
    pulled = read(item, sub_app_id=sub_app_id)
    assert isinstance(pulled, PulledEvent)
    return pulled


def event_of(content):
    return make_event(content, source="main", sub_app_id=None)


def salvage(text, *, cut=False, sub_app_id=None):
    return list(salvage_events(text, cut=cut, source="main", sub_app_id=sub_app_id))


def answer_of(*elements):
    """An answer with the given elements, each a text that is inserted unchanged."""
    return '{"Response":{"EventSet":[' + ",".join(elements) + '],"RequestId":"r"}}'


def element(number, **members):
    return json.dumps({"EventHandle": f"h{number}", "EventType": "FileDeleted", "N": number, **members})


def nested(depth):
    return "[" * depth + "]" * depth


def sample(name):
    return decode_json((SAMPLES / f"{name}.json").read_text(encoding="utf-8"))


# --- unreadable -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    ["", "{", "nope", '{"a":NaN}', '{"a":Infinity}', '{"a":-Infinity}', '{"a":1e400}', '{"a":1} {}', nested(100_000)],
)
def test_what_is_not_json_is_unreadable(text):
    with pytest.raises(UnreadableError):
        decode_json(text)


def test_an_integer_that_is_too_long_for_python_is_unreadable():
    with pytest.raises(UnreadableError):
        decode_json("9" * 5000)


@pytest.mark.parametrize(
    "item",
    [
        None,
        7,
        "text",
        [],
        {},
        {"EventType": "FileDeleted"},
        {"EventHandle": None},
        {"EventHandle": ""},
        {"EventHandle": True},
        {"EventHandle": 1.5},
        {"EventHandle": ["h"]},
    ],
)
def test_an_item_without_a_handle_is_malformed_and_kept_unchanged(item):
    malformed = read(item, sub_app_id=7)
    assert isinstance(malformed, Malformed)
    assert malformed.handle is None
    assert malformed.why
    assert json.loads(malformed.event.body) == item
    assert malformed.event.sub_app_id == 7


@given(json_values)
def test_no_json_value_in_an_events_place_breaks_the_reader(item):
    assert isinstance(read(item), PulledEvent | Malformed)


@pytest.mark.parametrize(
    "depth", [253, 254, 255, DEPTH_MAX - 1, DEPTH_MAX, DEPTH_MAX + 1, 900, 990, 1400, 5000, 50_000]
)
@pytest.mark.parametrize("brackets", ["[]", '{"a":}'])
@pytest.mark.parametrize("leaf", ["1", str(2**70)])
def test_deep_nesting_is_an_event_or_malformed_by_its_depth_alone(depth, brackets, leaf):
    opening, closing = brackets[:-1], brackets[-1]
    deep = opening * (depth - 1) + leaf + closing * (depth - 1)
    text = answer_of(element(0), f'{{"EventHandle":"deep","Deep":{deep}}}', element(2))
    try:
        read_items = [read(item) for item in decode_json(text)["Response"]["EventSet"]]
    except UnreadableError:
        read_items = salvage(text)
    assert [item.handle for item in read_items] == ["h0", "deep", "h2"]
    assert deep.encode() in read_items[1].event.body
    assert isinstance(read_items[1], PulledEvent if depth <= DEPTH_MAX else Malformed)


@pytest.mark.parametrize("depth", [DEPTH_MAX, 3000])
def test_a_stored_body_that_is_too_deep_has_no_content(depth):
    body = f'{{"Deep":{nested(depth)}}}'.encode()
    assert restore_event(body=body, key=b"k", event_type="", source="main", sub_app_id=None).content == {}


# --- content and identity ---------------------------------------------------------------------------------------------


@given(contents, handles)
def test_the_body_is_json_equal_to_the_content_in_its_order(content, handle):
    pulled = read_whole({"EventHandle": handle, **content})
    assert pulled.handle == handle
    assert pulled.event.content == content
    back = json.loads(pulled.event.body)
    assert back == content
    assert list(back) == list(content)


@given(contents, handles, handles)
def test_the_key_does_not_depend_on_the_handle(content, one, other):
    assert (
        read_whole({"EventHandle": one, **content}).event.key == read_whole({**content, "EventHandle": other}).event.key
    )


@given(contents, st.randoms(use_true_random=False))
def test_the_key_does_not_depend_on_the_order_of_members(content, random):
    shuffled = list(content.items())
    random.shuffle(shuffled)
    assert event_key(dict(shuffled), None) == event_key(content, None)


@given(contents, st.lists(strings, max_size=3))
def test_the_key_does_not_depend_on_top_level_nulls(content, names):
    nulls = {name: None for name in names if name not in content}
    assert event_key({**content, **nulls}, None) == event_key(content, None)


@given(contents, st.integers(0, 2**64), st.integers(0, 2**64))
def test_the_key_depends_on_the_sub_app_id(content, one, other):
    assume(one != other)
    assert event_key(content, one) != event_key(content, other)


@given(contents, contents)
def test_the_key_depends_on_the_content(one, other):
    def meaningful(content):
        return json.dumps({name: value for name, value in content.items() if value is not None}, sort_keys=True)

    assume(meaningful(one) != meaningful(other))
    assert event_key(one, None) != event_key(other, None)


@given(contents)
def test_the_key_is_the_same_after_a_round_trip_through_the_body(content):
    event = make_event(content, source="main", sub_app_id=7)
    assert event_key(decode_json(event.body.decode()), 7) == event.key


def test_no_sub_app_and_sub_app_0_are_the_same_application():
    assert event_key({"EventType": "x"}, None) == event_key({"EventType": "x"}, 0)


def test_a_null_below_the_top_level_counts():
    assert event_key({"E": {"a": None}}, None) != event_key({"E": {}}, None)


@pytest.mark.parametrize(
    "digits",
    [
        "9007199254740993",
        "14508071098244929440",
        "18446744073709551615",
        "18446744073709551616",
        "-9223372036854775809",
    ],
)
def test_integers_stay_digit_for_digit(digits):
    item = decode_json(f'{{"EventHandle":"h","E":{{"FileId":{digits}}}}}')
    event = read_whole(item).event
    assert event.body == b'{"E":{"FileId":%s}}' % digits.encode()
    assert file_id_of(event) == digits


def test_neighbouring_large_integers_are_different_events():
    assert event_key({"Id": 2**64 + 1}, None) != event_key({"Id": 2**64}, None)


def test_lone_surrogates_are_escaped_and_come_back():
    event = read_whole(decode_json(r'{"EventHandle":"h","Name":"\ud83d!"}')).event
    assert event.body == rb'{"Name":"\ud83d!"}'
    assert json.loads(event.body) == {"Name": "\ud83d!"}


def test_unicode_stays_unescaped():
    assert encode_json({"名": "\U0001f4a1"}) == '{"名":"\U0001f4a1"}'.encode()
    assert encode_json({"名": 2**70}) == f'{{"名":{2**70}}}'.encode()


def test_raw_tabs_and_escaped_slashes_are_read():
    assert decode_json('{"a":"x\ty","b":"http:\\/\\/h"}') == {"a": "x\ty", "b": "http://h"}


def test_the_last_of_two_members_with_the_same_name_counts():
    pulled = read_whole(decode_json('{"EventHandle":"old","A":1,"A":2,"EventHandle":"new"}'))
    assert pulled.handle == "new"
    assert pulled.event.body == b'{"A":2}'


@pytest.mark.parametrize(("handle", "text"), [(12345, "12345"), (2**70, str(2**70)), (0, "0"), ("007", "007")])
def test_a_handle_of_digits_is_a_handle(handle, text):
    assert read_whole({"EventHandle": handle}).handle == text


@pytest.mark.parametrize(
    ("content", "event_type"), [({}, ""), ({"EventType": None}, ""), ({"EventType": 3}, ""), ({"EventType": "X"}, "X")]
)
def test_the_type_is_the_given_one_or_empty(content, event_type):
    assert event_of(content).type == event_type


def test_a_stored_event_is_restored():
    event = make_event({"EventType": "X", "N": 2**70}, source="main", sub_app_id=7)
    restored = restore_event(body=event.body, key=event.key, event_type="X", source="main", sub_app_id=7)
    assert restored == event


@pytest.mark.parametrize("body", [b"\xff", b"{", b""])
def test_a_stored_event_that_never_could_be_read_has_no_content(body):
    restored = restore_event(body=body, key=b"k", event_type="", source="main", sub_app_id=None)
    assert restored == Event(source="main", sub_app_id=None, type="", key=b"k", body=body, content={})


def test_a_lease_ends_its_seconds_after_it_started():
    assert Lease(starts_at=100.5, secs=30.0).ends_at == 130.5


def test_leases_end_in_the_order_in_which_they_started():
    ends = [Lease(starts_at=at, secs=30.0).ends_at for at in (1.0, 2.5, 1e6)]
    assert all(one < other for one, other in pairwise(ends))


# --- salvage ----------------------------------------------------------------------------------------------------------

BROKEN = {
    "NaN": '{"EventHandle":"bad","EventType":"T","E":{"N":NaN}}',
    "1e400": '{"EventHandle":"bad","EventType":"T","E":{"N":1e400}}',
    "missing value": '{"EventHandle":"bad","EventType":"T","E":{"N":}}',
    "missing comma": '{"EventHandle":"bad","EventType":"T","E":{"N":1 "M":2}}',
    "trailing comma": '{"EventHandle":"bad","EventType":"T","E":{"N":[1,]},}',
    "single quotes": """{"EventHandle":"bad","EventType":"T","E":'x'}""",
    "bad escape": r'{"EventHandle":"bad","EventType":"T","E":"\x"}',
    "brackets in a string": r'{"EventHandle":"bad","EventType":"T","E":"}]{[\"",}',
    "not UTF-8": b'{"EventHandle":"bad","EventType":"T","E":"\xff"}'.decode(errors="surrogateescape"),
    "too deep": f'{{"EventHandle":"bad","EventType":"T","E":{nested(5000)}}}',
    "an integer too long": '{"EventHandle":"bad","EventType":"T","E":' + "9" * 5000 + "}",
    "a bracket too few": '{"EventHandle":"bad","EventType":"T","E":{"N":1}',
    "unclosed string": '{"EventHandle":"bad","EventType":"T","E":"x}',
}


@pytest.mark.parametrize("at", [0, 1, 2])
@pytest.mark.parametrize("broken", BROKEN.values(), ids=BROKEN)
def test_one_broken_element_loses_no_other_event(broken, at):
    elements = [element(0), element(1)]
    elements.insert(at, broken)
    items = salvage(answer_of(*elements))
    events = [item.handle for item in items if isinstance(item, PulledEvent)]
    assert events == ["h0", "h1"]
    assert [item.handle for item in items].index("bad") == at
    malformed = items[at]
    assert malformed.event.type == "T"
    assert malformed.event.content == {}
    assert malformed.event.body.startswith(b'{"EventHandle":"bad"')


@pytest.mark.parametrize("junk", ["null", "7", '"text"', "[]", "nope", "{}", "}", "'x'"])
@pytest.mark.parametrize("at", [0, 1, 2])
def test_junk_between_elements_loses_no_event(junk, at):
    elements = [element(0), element(1)]
    elements.insert(at, junk)
    items = salvage(answer_of(*elements))
    assert [item.handle for item in items if isinstance(item, PulledEvent)] == ["h0", "h1"]


def test_a_broken_element_with_a_numeric_handle_keeps_it():
    items = salvage(answer_of('{"EventHandle":123,"N":NaN}', '{"N":NaN}'))
    assert [item.handle for item in items] == ["123", None]


def test_a_broken_elements_key_depends_on_sub_app_but_not_on_handle():
    def key(handle, sub_app_id=None):
        (item,) = salvage(answer_of(f'{{"EventHandle":"{handle}","N":NaN}}'), sub_app_id=sub_app_id)
        return item.event.key

    assert key("one") == key("other")
    assert key("one", 1) != key("one", 2)


def test_a_cut_at_any_byte_leaves_exactly_the_whole_events():
    elements = [element(number, Name="ü\U0001f4a1", E={"FileId": 2**65}) for number in range(3)]
    whole = answer_of(*elements)
    data = whole.encode()
    ends = [len(whole[: whole.index(one) + len(one)].encode()) for one in elements]
    for cut in range(len(data)):
        items = salvage(data[:cut].decode(errors="surrogateescape"), cut=True)
        events = [item for item in items if isinstance(item, PulledEvent)]
        assert [item.handle for item in events] == [f"h{n}" for n, end in enumerate(ends) if end <= cut], cut
        assert [item.event.body for item in events] == [
            read_whole(json.loads(one)).event.body for one, end in zip(elements, ends, strict=True) if end <= cut
        ]
        assert all(item.handle is None for item in items if isinstance(item, Malformed)), cut


def test_an_answer_that_is_cut_anywhere_is_not_whole():
    whole = answer_of(*(element(number, E={"A": [{"B": {}}, "}}"]}) for number in range(3)))

    assert is_whole(whole)
    assert not any(is_whole(whole[:cut]) for cut in range(len(whole)))


@pytest.mark.parametrize("broken", ['"N":oops', '"N":"unclosed', '"N":{', '"N":]', '"N":"\\x"', '"N":NaN'])
def test_an_answer_with_a_broken_element_is_whole_if_its_end_has_come(broken):
    assert is_whole(answer_of(element(0), f'{{"EventHandle":"h",{broken}}}'))


@given(st.lists(contents, max_size=4), st.data())
def test_a_cut_answer_of_any_content_gives_its_first_events(batch, data):
    texts_of = [json.dumps({"EventHandle": f"h{n}", **content}) for n, content in enumerate(batch)]
    whole = answer_of(*texts_of)
    cut = data.draw(st.integers(0, len(whole) - 1))
    items = salvage(whole[:cut], cut=True)
    events = [item for item in items if isinstance(item, PulledEvent)]
    assert [item.event.content for item in events] == batch[: len(events)]
    assert all(item.handle is None for item in items if isinstance(item, Malformed))


@given(st.lists(contents, max_size=4))
def test_salvaging_a_whole_answer_gives_what_reading_it_gives(batch):
    texts_of = [json.dumps({"EventHandle": f"h{n}", **content}) for n, content in enumerate(batch)]
    assert salvage(answer_of(*texts_of)) == [read(json.loads(text)) for text in texts_of]


@given(contents, st.sampled_from([None, 0, 2]), st.integers(0, 10_000), st.sampled_from('[]{},:"\\ 0e-.t\n'))
def test_what_is_json_is_salvaged_as_it_would_be_read(content, indent, at, char):
    text = json.dumps({"EventHandle": "h", **content}, indent=indent)
    at %= len(text)
    for edited in (text, text[:at] + char + text[at:], text[:at] + text[at + 1 :]):
        try:
            expected = read(decode_json(edited))
        except UnreadableError:
            expected = None
        first = salvage(answer_of(edited))[0] if edited.lstrip(" \t\n,").startswith("{") else expected
        assert expected is None or first == expected


@given(st.text())
def test_salvage_takes_any_text(text):
    assert salvage(text, cut=True) == [] or "EventSet" in text
    for item in salvage('{"Response":{"EventSet":[' + text):
        assert isinstance(item, PulledEvent | Malformed)


@pytest.mark.parametrize("text", ["", "<html>", '{"Response":{"Error":{"Code":"x', '{"Response":{"EventSet":null'])
def test_without_an_event_set_there_is_nothing_to_salvage(text):
    assert salvage(text, cut=True) == []


# Functions of a length: texts that would be slow for a reader that scans them repeatedly.
HOSTILE = {
    "closing brackets": lambda size: "}" * size,
    "opening brackets": lambda size: "[" * size,
    "opening braces": lambda size: '{"EventHandle":"h","a":' * (size // 23),
    "openings that look like elements": lambda size: '{"EventHandle":"h","a":[{}, ' * (size // 28),
    "openings with mistakes": lambda size: '{"EventHandle":"h","a":[NaN,{}, ' * (size // 32),
    "objects in an open list": lambda size: '{"EventHandle":"h","a":[' + '}, {"x"' * (size // 7),
    "empty strings": lambda size: '{"EventHandle":"h","a":[' + '"",' * (size // 3) + "NaN]}",
    "lists": lambda size: '{"EventHandle":"h","a":[' + "[[]]," * (size // 5) + "NaN]}",
    "deep lists": lambda size: '{"EventHandle":"h","a":[' + ("[" * 90 + "]" * 90 + ",") * (size // 181) + "NaN]}",
    "open strings": lambda size: '{"EventHandle":"h","E":"x,' * (size // 26),
    "escaped quotes": lambda size: '{"EventHandle":"h","E":"' + '\\"' * (size // 2),
    "blanks": lambda size: '"EventHandle"' + " " * size,
    "no brackets": lambda size: "x" * size,
    "ends of answers": lambda size: '"RequestId": 1}} ' * (size // 17),
}


@pytest.mark.system
@pytest.mark.parametrize("make", HOSTILE.values(), ids=HOSTILE)
def test_salvage_takes_time_in_proportion_to_the_text(make):
    def secs(size):
        text = '{"Response":{"EventSet":[' + make(size)
        began = time.thread_time()
        list(islice(salvage_events(text, cut=False, source="main", sub_app_id=None), 1000))
        return time.thread_time() - began

    small = min(secs(10_000) for _ in range(3))

    # The text is 20 times as long; quadratic time would be 400 times as long.
    assert secs(200_000) < 100 * small + 0.1


# --- typed views ------------------------------------------------------------------------------------------------------


def test_the_documented_snapshot_event_is_typed():
    (item,) = sample("reliable-callback")["Response"]["EventSet"]
    event = read_whole(item).event
    assert event.type == "CreateSnapshotByTimeOffsetComplete"
    taken = snapshots_of(event)
    assert taken is not None
    assert taken.task_id == task_id_of(event) == "CreateSnapshotByTimeOffset-1edb7eb88a599d05abe451cfc541cfbd"
    assert taken.file_id == file_id_of(event) == "14508071098244929440"
    assert taken.definition == 10
    assert [shot.time_offset_ms for shot in taken.snapshots] == [10_000, 20_000]
    assert taken.snapshots[0].url == "http://125676836723.vod2.myqcloud.com/xxx/xxx/1.png"
    assert taken.failed == ()


def test_a_reliable_callback_without_handle_is_the_normal_callback():
    (item,) = sample("reliable-callback")["Response"]["EventSet"]
    assert json.loads(read_whole(item).event.body) == sample("normal-callback")
    assert read_whole(item).event.key == event_of(sample("normal-callback")).key


def test_one_snapshot_can_fail_among_others():
    images = [{"ErrCode": 0, "TimeOffset": 1, "Url": "u"}, {"ErrCode": 70_000, "TimeOffset": 2}, {"ErrCode": "0"}]
    taken = snapshots_of(event_of({"SnapshotByTimeOffsetCompleteEvent": {"SnapshotInfoSet": images}}))
    assert taken is not None
    assert taken.failed == (Snapshot(time_offset_ms=2, url="", err_code=70_000),)


@pytest.mark.parametrize(
    "payload",
    [
        {},
        {"SnapshotInfoSet": None},
        {"SnapshotInfoSet": "x"},
        {"SnapshotInfoSet": [None, 3]},
        {"Definition": "10", "TaskId": None, "FileId": [], "SnapshotInfoSet": []},
    ],
)
def test_a_snapshot_event_of_undocumented_shape_is_still_one(payload):
    taken = snapshots_of(event_of({"SnapshotByTimeOffsetCompleteEvent": payload}))
    assert taken is not None
    assert (taken.task_id, taken.file_id, taken.definition, taken.snapshots) == ("", "", None, ())


@pytest.mark.parametrize(
    "image", [{}, {"ErrCode": None, "TimeOffset": "1", "Url": None}, {"TimeOffset": 1.5, "Url": 3, "ErrCode": []}]
)
def test_a_snapshot_of_undocumented_shape_has_empty_fields(image):
    taken = snapshots_of(event_of({"SnapshotByTimeOffsetCompleteEvent": {"SnapshotInfoSet": [image]}}))
    assert taken is not None
    assert taken.snapshots == (Snapshot(time_offset_ms=None, url="", err_code=0),)


@pytest.mark.parametrize("content", [{}, {"SnapshotByTimeOffsetCompleteEvent": None}, {"FileDeleteEvent": {}}])
def test_other_events_have_no_snapshots(content):
    assert snapshots_of(event_of(content)) is None


@given(json_values)
def test_typed_views_take_any_payload(payload):
    event = event_of({"SnapshotByTimeOffsetCompleteEvent": payload, "EventType": "x"})
    assert isinstance(task_id_of(event) + file_id_of(event), str)
    assert (snapshots_of(event) is not None) == isinstance(payload, dict)


def test_the_payload_is_the_first_object_whatever_its_name():
    assert payload_of({"EventType": "X", "A": None, "WechatPublishComplete": {"TaskId": "t"}}) == {"TaskId": "t"}
    assert payload_of({"EventType": "X"}) == {}


@pytest.mark.parametrize(
    ("content", "task_id"),
    [
        ({"E": {"TaskId": "t"}}, "t"),
        ({"E": {"TaskId": 7}}, "7"),
        ({"E": {"TaskId": True}}, ""),
        ({"E": {"Inner": {"TaskId": "t"}}}, "t"),
        ({"TaskId": "t"}, "t"),
        ({"TaskId": "outer", "E": {"TaskId": "t"}}, "t"),
        ({"TaskId": "outer", "E": {"TaskId": ""}}, "outer"),
        ({}, ""),
    ],
)
def test_ids_are_found_where_samples_have_them(content, task_id):
    assert task_id_of(event_of(content)) == task_id
