import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from vodpoller.errors import RejectedError
from vodpoller.events.codec import decode_json
from vodpoller.events.event import make_event, restore_event
from vodpoller.expressions import EvaluationError, Expression, ExpressionText, check_expression, encode_found

BEYOND_64_BITS = 123456789012345678901234567890


class Keys(BaseModel):
    body: ExpressionText | None = None


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Definition == 10", 'column 15: "10" is not valid here'),
        ("a ==", "column 5: it ends too early"),
        ("a == 'b", "column 6: unclosed ' delimiter"),
        (
            "{\n  msgtype: 'text',\n  text: {content: 7}\n}",
            '"  text: {content: 7}" is not a JMESPath expression: line 3',
        ),
        ("{\n  msgtype: 'text',\n  text: {content: 7}\n}", "line 3, column 19: "),
        ("{a: b", "column 6: it ends too early"),
        ("", "is empty"),
        ("[" * 3000, "is empty or nested too deeply"),
        ("a || !contians(b, 'c')", 'no function contians (did you mean "contains"?'),
    ],
)
def test_error_names_its_place_and_its_cause(text, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        check_expression(text)


def test_key_of_a_model_is_named_with_the_error():
    with pytest.raises(ValidationError) as failure:
        Keys(body="a ==")
    (error,) = failure.value.errors()
    assert error["loc"] == ("body",)
    assert "column 5: it ends too early" in error["msg"]


def test_key_of_a_model_keeps_the_text():
    assert Keys(body="a == `1`").body == "a == `1`"


def test_expression_may_have_several_lines():
    found = Expression(check_expression("{\n  a: b,\r\n\tc: 'd'\n}")).search({"b": 1})
    assert found == {"a": 1, "c": "d"}


# --- evaluating -------------------------------------------------------------------------------------------------------


def event_of(body):
    return make_event(decode_json(body), source="main", sub_app_id=None)


def test_event_that_cannot_be_evaluated_is_rejected_with_the_key():
    with pytest.raises(RejectedError, match=r"sinks\.robot\.body: it cannot be evaluated on this event: .*length"):
        Expression("length(Missing)").shape(event_of('{"EventType":"A"}'), "sinks.robot.body")


def test_event_that_was_never_readable_is_rejected():
    unreadable = restore_event(body=b'{"EventType', key=b"k" * 32, event_type="", source="main", sub_app_id=None)
    with pytest.raises(RejectedError, match=r"sinks\.robot\.body: the event could not be read"):
        Expression("'text'").shape(unreadable, "sinks.robot.body")


@pytest.mark.parametrize("text", ["Missing", "`null`", "[?a] | [0]", "Sibling"])
def test_null_means_that_nothing_is_sent(text):
    assert Expression(text).shape(event_of('{"EventType":"A","Sibling":null}'), "body") is None


@pytest.mark.parametrize(
    ("text", "holds"),
    [
        ("Missing", False),
        ("`false`", False),
        ("''", False),
        ("`[]`", False),
        ("`{}`", False),
        ("`0`", True),
        ("errcode == `0`", True),
        ("errcode == `false`", False),
        ("@ == 'ok'", False),
    ],
)
def test_truth_is_that_of_jmespath(text, holds):
    assert Expression(text).holds({"errcode": 0}) is holds


def test_expression_that_fails_on_an_answer_names_the_cause():
    with pytest.raises(EvaluationError, match="contains"):
        Expression("contains(errmsg, 'x')").holds({"errcode": 0})


def test_last_of_two_members_with_the_same_name_counts():
    assert Expression("a").search(decode_json('{"a":1,"b":2,"a":3}')) == 3


# --- numbers and texts as JSON ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ("n", str(BEYOND_64_BITS)),
        (f"`{BEYOND_64_BITS}`", str(BEYOND_64_BITS)),
        (f"to_number('{BEYOND_64_BITS}')", str(BEYOND_64_BITS)),
        ("to_string(n)", f'"{BEYOND_64_BITS}"'),
        ("sum([n, `1`])", str(BEYOND_64_BITS + 1)),
        ("max([n, `1`])", str(BEYOND_64_BITS)),
        ("{id: n, f: f}", f'{{"id":{BEYOND_64_BITS},"f":0.1}}'),
    ],
)
def test_integers_keep_every_digit(text, written):
    content = decode_json(f'{{"n":{BEYOND_64_BITS},"f":0.1}}')
    assert encode_found(Expression(text).search(content)) == written.encode()


def test_integers_that_differ_in_the_last_digit_differ():
    content = decode_json('{"n":12345678901234567891}')
    assert not Expression("n == `12345678901234567890`").holds(content)
    assert Expression("n > `12345678901234567890`").holds(content)


@pytest.mark.parametrize("text", ["to_number('nan')", "to_number('1e999')", "&a", "[&a]"])
def test_value_without_a_form_in_json_is_an_error(text):
    with pytest.raises(EvaluationError, match="cannot be written as JSON"):
        encode_found(Expression(text).search({"a": 1}))


def test_half_of_a_surrogate_pair_is_escaped():
    assert encode_found(Expression("a").search(decode_json(r'{"a":"\ud83d中"}'))) == rb'"\ud83d\u4e2d"'


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    )
)
def test_value_that_is_written_reads_back_equal(value):
    assert json.loads(encode_found(Expression("@").search(value))) == value
