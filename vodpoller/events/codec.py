"""JSON as VOD writes it: read without the loss of a digit, and written again with the same content."""

import json
from math import isfinite
from typing import Any

import orjson

DEPTH_MAX = 512  # levels of an event's objects and lists: half of what the json module of every Python supports
_VALUES_MAX = 1_000_000  # each takes about 100 bytes of memory; 8 MiB of VOD's events hold half of this number
_TOO_DEEP = f"it is nested more than {DEPTH_MAX} levels deep"


class UnreadableError(ValueError):
    """The text is not an answer of VOD; the message gives the reason."""


def _finite(text: str) -> float:
    number = float(text)
    if not isfinite(number):
        raise UnreadableError(f"the number {text[:40]} is too large for JSON readers")
    return number


def _not_json(literal: str) -> Any:
    raise UnreadableError(f"{literal} is not JSON")


# strict=False: documented samples hold raw tabs inside strings. Python's integers keep every digit.
_decoder = json.JSONDecoder(strict=False, parse_float=_finite, parse_constant=_not_json)
_exact = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), check_circular=False)
_exact_ascii = json.JSONEncoder(ensure_ascii=True, separators=(",", ":"), check_circular=False)
_canonical = json.JSONEncoder(ensure_ascii=True, separators=(",", ":"), sort_keys=True, check_circular=False)


def decode_json(text: str) -> Any:
    """Read JSON as VOD writes it.

    The maximum depth depends on the version of Python (at least 990 levels). `check_depth` checks for a limit that is
    the same with all versions; `encode_json` uses it.

    Args:
        text: The whole document.

    Raises:
        UnreadableError: It is not JSON, is nested too deeply, holds a number that is too large for a double, or holds
            more than 1,000,000 values, which would take too much memory.
    """
    if len(text) > _VALUES_MAX and sum(map(text.count, "[{:,")) > _VALUES_MAX:
        raise UnreadableError(f"it holds more than {_VALUES_MAX:,} values")
    try:
        return _decoder.decode(text)
    except RecursionError:
        raise UnreadableError(_TOO_DEEP) from None
    except ValueError as error:
        raise UnreadableError(str(error)) from error


def check_depth(value: Any) -> None:
    """Check how deeply a parsed value is nested.

    Raises:
        UnreadableError: It is nested more than `DEPTH_MAX` levels deep.
    """
    level = _containers([value])
    for _ in range(DEPTH_MAX):
        if not level:
            return
        level = [inner for outer in level for inner in _containers(outer)]
    if level:
        raise UnreadableError(_TOO_DEEP)


def _containers(value: Any) -> list[Any]:
    inside = value.values() if isinstance(value, dict) else value
    return [inner for inner in inside if isinstance(inner, dict | list)]


def encode_json(value: Any) -> bytes:
    """Write equal JSON in UTF-8: integers with all digits, members in their order.

    orjson writes the common case. The json module writes what orjson refuses: integers beyond 64 bits, lone surrogates,
    more than 254 levels.

    Raises:
        UnreadableError: It is nested more than `DEPTH_MAX` levels deep.
    """
    try:
        return orjson.dumps(value)
    except TypeError:
        check_depth(value)
        try:
            return _exact.encode(value).encode()
        except UnicodeEncodeError:
            return _exact_ascii.encode(value).encode()


def canonical_json(value: Any) -> bytes:
    """Write JSON in the canonical form, which is the same for equal values: members sorted, no spaces.

    Raises:
        UnreadableError: It is nested more than `DEPTH_MAX` levels deep.
    """
    try:
        return orjson.dumps(value, option=orjson.OPT_SORT_KEYS)
    except TypeError:
        check_depth(value)
        return _canonical.encode(value).encode()
