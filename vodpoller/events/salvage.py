"""Reads single events from an answer that cannot be read as a whole, so that one invalid event affects no other.

The sender may not be VOD. So all functions take time in proportion to the length of the text, whatever it holds, and
keep only the current element in memory.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from vodpoller.events.codec import DEPTH_MAX, UnreadableError, decode_json
from vodpoller.events.event import Malformed, PulledEvent, make_malformed, read_event

# Quantifiers are possessive, without backtracking, so no text is scanned repeatedly.
_GAP: Final = r"[ \t\n\r]*+"
_STRING: Final = r'"(?:[^"\\]++|\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4}))*+"'
_NUMBER: Final = r"-?+(?:0|[1-9][0-9]*+)(?:\.[0-9]++)?+(?:[eE][-+]?+[0-9]++)?+"
_SCALAR: Final = rf"(?:{_STRING}|{_NUMBER}|true|false|null)"
_KEY: Final = rf"{_STRING}{_GAP}:{_GAP}"
_FLAT_LIST: Final = rf"\[{_GAP}(?:{_SCALAR}{_GAP}(?:,{_GAP}{_SCALAR}{_GAP})*+)?+\]"
_FLAT_OBJECT: Final = rf"\{{{_GAP}(?:{_KEY}{_SCALAR}{_GAP}(?:,{_GAP}{_KEY}{_SCALAR}{_GAP})*+)?+\}}"
_SIMPLE: Final = rf"(?:{_SCALAR}|{_FLAT_LIST}|{_FLAT_OBJECT})"

_VALUE: Final = rf"(?:{_SIMPLE}|(?P<opens>(?:\[{_GAP}(?=\[))++|[\[{{])){_GAP}"
# What can follow in a list and in an object, by the bracket that closes it: `_PASSED` matches values with at most two
# levels, `_NEXT` the value after them, which is the last one or opens further levels.
_PASSED: Final = {
    "]": re.compile(rf"(?:{_SIMPLE}{_GAP},{_GAP})*+"),
    "}": re.compile(rf"(?:{_KEY}{_SIMPLE}{_GAP},{_GAP})*+"),
}
_NEXT: Final = {"]": re.compile(_VALUE), "}": re.compile(_KEY + _VALUE)}
_CLOSED: Final = re.compile(rf"(?:[\]}}]{_GAP})*+")
_SPACE: Final = re.compile(_GAP)
_COMMA: Final = re.compile(rf",{_GAP}")
_CLOSING: Final = str.maketrans("[{", "]}", " \t\n\r")

_EVENT_SET: Final = re.compile(r'"EventSet"\s*+:\s*+\[')
_BETWEEN: Final = re.compile(r"[\s,]*+")
_NEXT_ITEM: Final = re.compile(r'\}\s*+,\s*+(?=\{\s*+"(?:EventHandle|EventType)")')
_BARE: Final = re.compile(r"[^\[\]{},]++")

# A string, recognised by its quotes only, with any escapes; at the end of a text that was cut off, also without the
# second quote.
_QUOTED: Final = r'"(?:[^"\\]++|\\.)*+(?:"|\\?\Z)'
_NO_BRACKET: Final = rf'(?:[^"\[\]{{}}]++|{_QUOTED})*+'
# The next brackets in one direction, after pairs that hold no other brackets. It matches at every position: otherwise
# the search would try each following character.
_BRACKETS: Final = re.compile(
    rf'(?:[^"\[\]{{}}]++|{_QUOTED}|\[{_NO_BRACKET}\]|\{{{_NO_BRACKET}\}})*+(?P<run>[\[{{]++|[\]}}]++|\Z)', re.DOTALL
)
_END: Final = re.compile(rf'"RequestId"\s*+:\s*+(?:{_QUOTED}|[0-9]++|null)\s*+\}}\s*+\}}\s*+\Z', re.DOTALL)


def is_whole(text: str) -> bool:
    """Whether an answer that is not valid JSON is complete: it closes all brackets, or ends as VOD's answers do.

    A bracket at the end alone proves nothing: an answer can be cut off after any bracket.

    Args:
        text: The answer.
    """
    if _END.search(text):
        return True
    depth = 0
    for found in _BRACKETS.finditer(text):
        depth += _levels(found["run"])
    return depth == 0 and text.rstrip().endswith("}")


def salvage_events(text: str, *, cut: bool, source: str, sub_app_id: int | None) -> Iterator[PulledEvent | Malformed]:
    """Read an answer event by event, so that one invalid event affects no other.

    Args:
        text: An answer that is cut off, or is not JSON in some place. Bytes that are not UTF-8 are surrogate escapes.
        cut: Whether the answer's end is known to be lost. VOD still has the complete form of an event that was cut off.
            So such an event gets no handle here: it must be pulled again and must not become a dead letter.
        source: Name of the source that pulled it.
        sub_app_id: The SubAppId of the source.
    """
    found = _EVENT_SET.search(text)
    if found is None:
        return
    cutter = _Cutter(text)
    at = found.end()
    while (at := _after(_BETWEEN, text, at)) < len(text) and text[at] != "]":
        end, why = cutter.element(at)
        piece = text[at:end]
        at = end
        if not why:
            try:
                piece.encode()
                yield read_event(decode_json(piece), source=source, sub_app_id=sub_app_id)
                continue
            except UnicodeEncodeError:
                why = "it holds bytes that are not UTF-8"
            except UnreadableError as error:
                why = str(error)
        cut_off = end >= len(text) and (cut or not is_whole(text))
        if cut_off:
            why = "the answer was cut off inside it"
        yield make_malformed(piece, why=why, has_handle=not cut_off, source=source, sub_app_id=sub_app_id)


@dataclass(slots=True)
class _Cutter:
    """Finds the ends of elements, from the first to the last.

    Args:
        text: The answer.
    """

    text: str
    _next_item: re.Match[str] | None = None
    _searched_to: int = 0

    def element(self, at: int) -> tuple[int, str]:
        """The end of the element that starts at `at`, and why it cannot be used; empty if it is JSON.

        An element that is not JSON ends with its last bracket, or before the text that looks like the next element:
        if a quote or bracket is missing, the brackets after it prove nothing.
        """
        end, problem = _scan(self.text, at)
        if not problem:
            return end, ""
        broken_at = end
        # Before its error it is JSON: text in that part that looks like an element belongs to it. A string that is not
        # closed ends with the first quote of the next element, just after the closing bracket of this element.
        limit = self._before_next_item(max(self.text.rfind("}", at, broken_at), at))
        return _balanced_end(self.text, at, limit), f"it is not JSON: {problem} at character {broken_at - at + 1}"

    def _before_next_item(self, start: int) -> int:
        """The end of the element before the first one that seems to begin at `start` or later."""
        if start >= self._searched_to:
            self._next_item = _NEXT_ITEM.search(self.text, start)
            self._searched_to = len(self.text) if self._next_item is None else self._next_item.start() + 1
        return len(self.text) if self._next_item is None else self._next_item.start() + 1


def _scan(text: str, at: int) -> tuple[int, str]:
    """The end of one JSON value, and an empty text; or the place where it is not JSON, and what is wrong there.

    Python's own decoder is not used for two reasons: its maximum depth depends on the version of Python, and it does
    not always report the position of an error.
    """
    to_close = ""  # the innermost first
    value = _NEXT["]"].match(text, at)
    while value is not None:
        at = value.end()
        if value["opens"] is None:
            at, to_close = _close(text, at, to_close)
            if not to_close:
                return at, ""
            comma = _COMMA.match(text, at)
            if comma is None:
                return at, f"neither a comma nor {to_close[0]}"
            at = comma.end()
        else:
            to_close = value["opens"].translate(_CLOSING) + to_close
            if len(to_close) > DEPTH_MAX:
                return at, f"more than {DEPTH_MAX} levels"
        at = _after(_PASSED[to_close[0]], text, at)
        value = _NEXT[to_close[0]].match(text, at)
    return at, "no member" if to_close.startswith("}") else "no value"


def _close(text: str, at: int, to_close: str) -> tuple[int, str]:
    """Skip closing brackets that match `to_close`; returns the place after them, and the brackets still to close."""
    run = _CLOSED.match(text, at)
    if run is not None and len(run[0]) < len(to_close) and to_close.startswith(run[0]):
        return run.end(), to_close[len(run[0]) :]
    while to_close and text.startswith(to_close[0], at):
        to_close = to_close[1:]
        at = _after(_SPACE, text, at + 1) if to_close else at + 1
    return at, to_close


def _balanced_end(text: str, at: int, limit: int) -> int:
    """The end of a text that is not JSON: after the bracket that closes its first one, but at most `limit`."""
    bare = _BARE.match(text, at)
    if bare is not None:
        return bare.end()
    if text[at] == "}":
        return at + 1
    depth = 1
    for found in _BRACKETS.finditer(text, at + 1, limit):
        levels = _levels(found["run"])
        if depth + levels <= 0:
            last = found.start("run") + depth - 1
            return last + 1 if text[last] == "}" else last
        depth += levels
    return limit


def _levels(run: str) -> int:
    """The number of levels by which brackets of one direction change the depth."""
    return len(run) if run.startswith(("[", "{")) else -len(run)


def _after(pattern: re.Pattern[str], text: str, at: int) -> int:
    found = pattern.match(text, at)
    return found.end() if found else at
