"""What can be cut out of an answer that as a whole cannot be read, so that one broken event costs no other.

Everything here takes time in proportion to the text, whatever it holds, and keeps nothing but the element in hand: what
answers may not be VOD.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from vodpoller.events.codec import DEPTH_MAX, UnreadableError, decode_json
from vodpoller.events.event import Malformed, PulledEvent, make_malformed, read_event

# Quantifiers are possessive: what was taken is never given back, so that no text is looked at again and again.
_GAP: Final = r"[ \t\n\r]*+"
_STRING: Final = r'"(?:[^"\\]++|\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4}))*+"'
_NUMBER: Final = r"-?+(?:0|[1-9][0-9]*+)(?:\.[0-9]++)?+(?:[eE][-+]?+[0-9]++)?+"
_SCALAR: Final = rf"(?:{_STRING}|{_NUMBER}|true|false|null)"
_KEY: Final = rf"{_STRING}{_GAP}:{_GAP}"
_FLAT_LIST: Final = rf"\[{_GAP}(?:{_SCALAR}{_GAP}(?:,{_GAP}{_SCALAR}{_GAP})*+)?+\]"
_FLAT_OBJECT: Final = rf"\{{{_GAP}(?:{_KEY}{_SCALAR}{_GAP}(?:,{_GAP}{_KEY}{_SCALAR}{_GAP})*+)?+\}}"
_SIMPLE: Final = rf"(?:{_SCALAR}|{_FLAT_LIST}|{_FLAT_OBJECT})"

_VALUE: Final = rf"(?:{_SIMPLE}|(?P<opens>(?:\[{_GAP}(?=\[))++|[\[{{])){_GAP}"
# What can follow in a list and in an object, by the bracket that closes it: values that hold no more than two levels,
# then one that is the last or opens further levels.
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

# A string by its quotes alone, whatever is escaped in it; one that was cut off holds no bracket either.
_QUOTED: Final = r'"(?:[^"\\]++|\\.)*+(?:"|\\?\Z)'
_NO_BRACKET: Final = rf'(?:[^"\[\]{{}}]++|{_QUOTED})*+'
# The brackets that come next, in one direction, after pairs that hold no others. It matches everywhere: else it would
# be tried at each character anew.
_BRACKETS: Final = re.compile(
    rf'(?:[^"\[\]{{}}]++|{_QUOTED}|\[{_NO_BRACKET}\]|\{{{_NO_BRACKET}\}})*+(?P<run>[\[{{]++|[\]}}]++|\Z)', re.DOTALL
)
_END: Final = re.compile(rf'"RequestId"\s*+:\s*+(?:{_QUOTED}|[0-9]++|null)\s*+\}}\s*+\}}\s*+\Z', re.DOTALL)


def is_whole(text: str) -> bool:
    """Whether an answer that is not JSON has come to its end: it closes all that it opens, or ends as VOD's answers do.

    A last bracket alone says nothing: an answer can be cut off behind any of them.

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
    """Read an answer event by event, so that one that is broken costs no other.

    Args:
        text: An answer that is cut off, or not JSON in some place. Bytes that are not UTF-8 are surrogate escapes.
        cut: Whether the answer's end is known to be lost. An event that was cut off is whole at VOD, so it gets no
            handle here: it must come again, not become a dead letter.
        source: Name of the source that pulled it.
        sub_app_id: Its SubAppId.
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
        """Where the element that starts at `at` ends, and why it cannot be used; empty where it is JSON.

        One that is not JSON ends with its last bracket, or before what looks like the next element: after a quote or
        bracket that is missing, the brackets say nothing.
        """
        end, problem = _scan(self.text, at)
        if not problem:
            return end, ""
        broken_at = end
        # Up to its mistake it is JSON: what looks like an element in there is a part of it. A string that is not closed
        # ends with the first quote of the next element, just behind the bracket of its own.
        limit = self._before_next_item(max(self.text.rfind("}", at, broken_at), at))
        return _balanced_end(self.text, at, limit), f"it is not JSON: {problem} at character {broken_at - at + 1}"

    def _before_next_item(self, start: int) -> int:
        """The end of the last element before the first that seems to begin at `start` or later."""
        if start >= self._searched_to:
            self._next_item = _NEXT_ITEM.search(self.text, start)
            self._searched_to = len(self.text) if self._next_item is None else self._next_item.start() + 1
        return len(self.text) if self._next_item is None else self._next_item.start() + 1


def _scan(text: str, at: int) -> tuple[int, str]:
    """Where one JSON value ends, and an empty text; or where it stops being JSON, and what is wrong there.

    Python's own decoder would do, but for two things: how deep it goes depends on the version of Python, and it does
    not always say how far it has come.
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
    """Pass the brackets that close what is open: to where, and what is then left to be closed."""
    run = _CLOSED.match(text, at)
    if run is not None and len(run[0]) < len(to_close) and to_close.startswith(run[0]):
        return run.end(), to_close[len(run[0]) :]
    while to_close and text.startswith(to_close[0], at):
        to_close = to_close[1:]
        at = _after(_SPACE, text, at + 1) if to_close else at + 1
    return at, to_close


def _balanced_end(text: str, at: int, limit: int) -> int:
    """The end of what is not JSON: behind the bracket that closes what it opens, `limit` at most."""
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
    """By how much brackets of one direction change the depth."""
    return len(run) if run.startswith(("[", "{")) else -len(run)


def _after(pattern: re.Pattern[str], text: str, at: int) -> int:
    found = pattern.match(text, at)
    return found.end() if found else at
