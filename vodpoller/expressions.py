"""JMESPath expressions over JSON: an event of VOD, an answer of a receiver.

Source: the JMESPath specification (https://jmespath.org/specification.html).

Expressions work on what `vodpoller.events.codec` reads. Integers keep all their digits; a number with a fraction is a
double, as in the event's body; of two members with one name the last one counts. The result of `avg` is a double.
"""

import difflib
import json
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Final

import jmespath
from jmespath.exceptions import JMESPathError, LexerError, ParseError
from jmespath.functions import Functions
from pydantic import AfterValidator

from vodpoller.errors import RejectedError
from vodpoller.events.event import Event

_FALSE: Final[tuple[Any, ...]] = (None, "", [], {})
_SHOWN_CHARACTERS: Final = 120
_exact = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False)
_exact_ascii = json.JSONEncoder(ensure_ascii=True, separators=(",", ":"), allow_nan=False)


class EvaluationError(ValueError):
    """An expression cannot be evaluated on this content, or its result is not JSON; the message says why."""


class Expression:
    """A compiled expression.

    Args:
        text: The expression; `check_expression` accepts it.

    Attributes:
        text: As given.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        self._compiled: Any = jmespath.compile(text)

    def search(self, content: Any) -> Any:
        """The result of the expression.

        Args:
            content: Parsed JSON. It is not changed. The result may be a part of it, so the caller must not change it.

        Raises:
            EvaluationError: It cannot be evaluated on this content.
        """
        try:
            return self._compiled.search(content)
        except Exception as error:  # whatever an expression does with strange content concerns this content only
            raise EvaluationError(str(error) or repr(error)) from error

    def holds(self, content: Any) -> bool:
        """Whether the result is true in JMESPath: everything is, except null, false, "", [] and {}. So 0 is true.

        Args:
            content: Parsed JSON.

        Raises:
            EvaluationError: It cannot be evaluated on this content.
        """
        return is_true(self.search(content))

    def shape(self, event: Event, key: str) -> Any:
        """The result of the expression for an event, which is sent instead of the event.

        Args:
            event: The event.
            key: The key of the configuration that has the expression, for the error.

        Returns:
            Parsed JSON for `encode_found`; None if there is nothing to send. It may be part of the event's content.

        Raises:
            RejectedError: It cannot be evaluated on this event, or the event is malformed. Nothing was sent.
        """
        if not event.content:
            raise RejectedError(f"{key}: the event could not be read when it came, so there is nothing to evaluate on")
        try:
            return self.search(event.content)
        except EvaluationError as error:
            raise RejectedError(f"{key}: it cannot be evaluated on this event: {error}") from error


def is_true(found: Any) -> bool:
    """Whether a value is true in JMESPath.

    Args:
        found: The result of an expression.
    """
    return found not in _FALSE and found is not False


def encode_found(found: Any) -> bytes:
    """The result of an expression as JSON in UTF-8: integers with all their digits, members in their order.

    Args:
        found: What `Expression.search` or `shape` returned.

    Raises:
        EvaluationError: It cannot be written as JSON: it is or contains a reference to an expression (`&name`), NaN or
            an infinite number, such as the result of `to_number('inf')`.
    """
    try:
        return _exact.encode(found).encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can only hold escaped
        return _exact_ascii.encode(found).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise EvaluationError(f"what it finds cannot be written as JSON: {error}") from error


def check_expression(text: str) -> str:
    """Check that an expression compiles and that its functions exist.

    Args:
        text: The expression; it may have several lines.

    Returns:
        The same text.

    Raises:
        ValueError: It cannot be used; the message says where and why.
    """
    try:
        parsed = jmespath.compile(text).parsed
    except LexerError as error:
        raise ValueError(_problem(text, error.lex_position, error.message.lower())) from None
    except ParseError as error:
        what = (
            "it ends too early" if error.token_value is None else f"{_quoted(str(error.token_value))} is not valid here"
        )
        raise ValueError(_problem(text, error.lex_position, what)) from None
    except (JMESPathError, RecursionError):
        raise ValueError("is empty or nested too deeply (leave the key out if it needs no expression)") from None
    for name in _functions_in(parsed):
        if name not in Functions.FUNCTION_TABLE:
            near = difflib.get_close_matches(name.lower(), list(Functions.FUNCTION_TABLE), n=1)
            hint = f'did you mean "{near[0]}"? ' if near else ""
            raise ValueError(
                f"{_quoted(text)}: JMESPath has no function {name} ({hint}its functions: https://jmespath.org)"
            )
    return text


ExpressionText = Annotated[str, AfterValidator(check_expression)]
"""The type of a key of the configuration that holds an expression: the text, checked."""


def _problem(text: str, position: int, what: str) -> str:
    before, lines = text[:position], text.split("\n")
    number, column = before.count("\n") + 1, position - before.rfind("\n")
    place = f"line {number}, column {column}" if len(lines) > 1 else f"column {column}"
    return (
        f"{_quoted(lines[number - 1])} is not a JMESPath expression: {place}: {what}"
        " (write text in 'single quotes' and numbers in `backticks`, as in Definition == `10`)"
    )


def _quoted(text: str) -> str:
    short = text if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS] + "…"
    return json.dumps(short, ensure_ascii=False)


def _functions_in(node: Mapping[str, Any]) -> Iterator[str]:
    nodes: list[Any] = [node]
    while nodes:
        match nodes.pop():
            case {"type": "function_expression", "value": name, "children": children}:
                yield name
                nodes.extend(children)
            case {"children": children}:
                nodes.extend(children)
