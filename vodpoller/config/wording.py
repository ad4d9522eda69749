"""Errors of pydantic and TOML in plain words, for a person who writes a configuration."""

import difflib
import json
import re
import unicodedata
from collections.abc import Collection, Iterable, Mapping
from importlib.util import find_spec
from typing import Any, Final, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails, PydanticUndefined

NAME_PATTERN: Final = r"^[A-Za-z0-9_.-]+$"
NAME_MAX_LENGTH: Final = 64
NAME_RULE: Final = 'letters, digits, ".", "_" and "-", 64 at most'
LISTS: Final = ("sources", "routes")
_SHOWN_LENGTH: Final = 120

_WANTED: Final[Mapping[str, str]] = {
    "bool_type": "true or false",
    "dict_type": "a table",
    "float_type": "a number",
    "int_from_float": "a whole number",
    "int_type": "a whole number",
    "list_type": "a list in square brackets",
    "model_type": "a table",
    "path_type": "text in quotes",
    "string_type": "text in quotes",
    "tuple_type": "a list in square brackets",
}
_KINDS: Final[Mapping[type, str]] = {
    bool: "true or false",  # before int, which it is too
    int: "a whole number",
    float: "a number with a fraction",
    str: "text",
    list: "a list",
    tuple: "a list",
    Mapping: "a table",
}
_RENAMED: Final[Mapping[str, str]] = {"max_lanes": "max_concurrent_pulls"}
_BOUNDS: Final[Mapping[str, str]] = {"ge": "at least", "gt": "more than", "le": "at most", "lt": "less than"}


def in_words(  # noqa: C901, PLR0911, PLR0912 - flat: one case for each kind of mistake
    detail: ErrorDetails, model: type[BaseModel], *, tables: Mapping[str, type[BaseModel]]
) -> str:
    """The problem at one place. Shows a value only if it is a number or should be one of a few words.

    Args:
        detail: The error of pydantic.
        model: The model of the table.
        tables: The other tables, for the hint where an unknown key belongs. Empty for a sink: its type has the keys.
    """
    kind, context, value = detail["type"], detail.get("ctx", {}), detail["input"]
    place = detail["loc"]
    names = [part for part in place if isinstance(part, str)]
    name = names[-1] if names else ""
    info = model.model_fields.get(name) if len(names) == 1 else None
    match kind:
        case "vodpoller":
            return str(context["why"])
        case "value_error" | "assertion_error":
            return str(context["error"])
        case "extra_forbidden":
            known = model.model_fields if len(place) == 1 else {}
            return unknown_key(name, known, tables)
        case "missing":
            return _missing(name, info)
        case "literal_error":
            allowed = _words_of(info) or str(context.get("expected", ""))
            if not isinstance(value, str):
                return f"is {kind_of(value)} (one of {allowed})"
            near = suggestion(value, re.findall(r'"([^"]*)"', allowed))
            return f"{quoted(value)} is not known ({near}one of {allowed})"
        case "greater_than" | "greater_than_equal" | "less_than" | "less_than_equal":
            extent = "small" if kind.startswith("greater") else "large"
            return f"{value} is too {extent} ({_bounds(info, context)})"
        case "finite_number":
            return f"{value} is not a number that can be used{_example(name, info)}"
        case "string_pattern_mismatch" if context.get("pattern") == NAME_PATTERN:
            return f"has characters that names may not have ({NAME_RULE})"
        case "string_pattern_mismatch":
            return f"has characters that do not belong here{_example(name, info)}"
        case "string_too_short" | "too_short":
            return f"{'is empty' if context.get('min_length') == 1 else 'is too short'}{_example(name, info)}"
        case "string_too_long" | "too_long":
            return f"is too long (at most {context.get('max_length')})"
        case _ if kind in _WANTED:
            quotes = " without quotes" if isinstance(value, str) and "list" not in _WANTED[kind] else ""
            return f"must be {_WANTED[kind]}{quotes}, but is {kind_of(value)}{_example(name, info)}"
        case _:
            return detail["msg"][:1].lower() + detail["msg"][1:]


def _missing(name: str, info: FieldInfo | None) -> str:
    if info is None:
        return "is missing"
    example = _example(name, info) or (f" ({info.description})" if info.description else "")
    return f"is missing{example}"


def _example(name: str, info: FieldInfo | None) -> str:
    if info is None:
        return ""
    value = info.get_default()
    if value is None or value is PydanticUndefined:
        value = info.examples[0] if info.examples else None
    return "" if value is None else f" (for example: {name} = {_toml(value)})"


def _toml(value: Any) -> str:
    match value:
        case bool():
            return str(value).lower()
        case int():
            return str(value)
        case float():
            return f"{value:g}"
        case list() | tuple():
            return f"[{', '.join(_toml(item) for item in value)}]"
        case _:
            return quoted(str(value))


def _bounds(info: FieldInfo | None, context: Mapping[str, Any]) -> str:
    limits = {
        name: getattr(item, name) for item in (info.metadata if info else ()) for name in _BOUNDS if hasattr(item, name)
    } or {name: context[name] for name in _BOUNDS if name in context}
    return ", ".join(f"{words} {_toml(limits[name])}" for name, words in _BOUNDS.items() if name in limits)


def _words_of(info: FieldInfo | None) -> str:
    """The values that a field may have, if they are a few words; else empty."""
    found: list[Any] = [info.annotation] if info else []
    words: list[str] = []
    while found:
        part = found.pop(0)
        if isinstance(part, str):
            words.append(part)
        else:
            found.extend(get_args(part))
    return quoted_all(words)


def missing_modules(names: Iterable[str]) -> list[str]:
    """Those of the modules that are not installed; none of them is imported."""
    return [name for name in names if find_spec(name) is None]


def unknown_key(key: str, known: Collection[str], elsewhere: Mapping[str, type[BaseModel]]) -> str:
    """The message for a key that a table does not have, with a hint about the key that may be meant.

    Args:
        key: As it was written.
        known: The keys of the table.
        elsewhere: The other tables.
    """
    headers = {"sinks": "[sinks.NAME]"} | {name: f"[[{name}]]" for name in LISTS}
    owners = [
        headers.get(name, name if name.startswith("[") else f"[{name}]")
        for name, model in elsewhere.items()
        if key in model.model_fields
    ]
    if (renamed := _RENAMED.get(key)) in known:
        hint = f"it is now called {renamed}"
    elif owners:
        hint = f"it belongs under {' or '.join(owners)}"
    elif near := _nearest(key, known):
        hint = f"did you mean {near}?"
    else:
        hint = f"keys of this table: {', '.join(known)}" if known else "delete it"
    return f"this key does not exist here ({hint})"


def _nearest(word: str, known: Iterable[str]) -> str | None:
    near = difflib.get_close_matches(word.lower(), list(known), n=1)
    return near[0] if near else None


def suggestion(word: str, known: Iterable[str]) -> str:
    """The nearest known word, as the beginning of a hint; empty if none is near."""
    near = _nearest(word, known)
    return f"did you mean {quoted(near)}? " if near else ""


def problem_in_key(value: str) -> str:
    """Find what cannot be part of an API key: Tencent's keys and tokens hold ASCII letters, digits and marks only.

    Args:
        value: The key, without the line ends around it.

    Returns:
        The problem, without any part of the key; empty if there is none.
    """
    if value.startswith("\ufeff"):
        return "begins with a byte order mark"
    if _ASSIGNMENT.match(value):
        return "has a name before the key"
    lines = re.split(r"[\r\n]+", value)
    if len(lines) > 1:
        return f"holds {len(lines)} lines"
    found = _NOT_OF_A_KEY.search(value)
    if found is None:
        return ""
    return f"has {_character(found[0])} at character {found.start() + 1} of {len(value)}"


_ASSIGNMENT: Final = re.compile(
    r"""\s*["']?(?:export\s+)?\w*(?:secret|key|token|id)\w*["']?\s*[:=]\s*[^\s=]""", re.IGNORECASE | re.ASCII
)
_NOT_OF_A_KEY: Final = re.compile(r"""[^!-~]|["'`]""")
_CHARACTERS: Final[Mapping[str, str]] = {" ": "a blank", "\t": "a tab", '"': "a quote", "'": "a quote", "`": "a quote"}


def _character(char: str) -> str:
    """The name of a character, since the character itself may be invisible."""
    if char in _CHARACTERS:
        return _CHARACTERS[char]
    kind = (
        "a control character" if unicodedata.category(char) == "Cc" else unicodedata.name(char, "a character").lower()
    )
    return f"{kind} (U+{ord(char):04X})"


def kind_of(value: Any) -> str:
    """The kind of a value, in the words of TOML."""
    return next((words for kind, words in _KINDS.items() if isinstance(value, kind)), "a date or time")


def quoted(text: str) -> str:
    """A text in quotes, shortened if it is long."""
    short = text if len(text) <= _SHOWN_LENGTH else text[:_SHOWN_LENGTH] + "…"
    return json.dumps(short, ensure_ascii=False)


def quoted_all(texts: Iterable[str]) -> str:
    """Several texts in quotes, separated by commas."""
    return ", ".join(quoted(text) for text in texts)


def toml_problem(error: ValueError | RecursionError, text: str) -> str:
    """The problem with its line and column, in words for a person who writes TOML for the first time.

    Args:
        error: The error of tomllib.
        text: The file.
    """
    found = _TOML_MESSAGE.fullmatch(str(error))
    if found is None:
        return "this is not TOML (a number is too long, or brackets are nested too deeply)"
    lines = text.split("\n")
    line, column = (int(found["line"]), int(found["column"])) if found["line"] else (len(lines), len(lines[-1]) + 1)
    message = found["message"]
    for start, (what, right) in _TOML_WORDS.items():
        if message.startswith(start):
            return f"line {line}, column {column}: {what} ({right})"
    return f"line {line}, column {column}: {message[:1].lower()}{message[1:]} (see https://toml.io)"


_TOML_MESSAGE: Final = re.compile(
    r"(?P<message>.*) \(at (?:line (?P<line>\d+), column (?P<column>\d+)|end of document)\)", re.DOTALL
)
_TOML_WORDS: Final[Mapping[str, tuple[str, str]]] = {
    "Invalid value": ("this is not a value", 'write text in quotes; numbers, true and false without: name = "main"'),
    "Cannot overwrite": ("a key is given twice", "delete one of the two lines"),
    "Cannot declare": ("this table begins for the second time", "put its keys together, or write [[…]] for a list"),
    "Illegal character '\\n'": ("a text is not closed on its line", 'end it with "'),
    'Expected "\'"': ("a text is not closed", "end it with '"),
    "Expected '\"'": ("a text is not closed", 'end it with "'),
    "Unescaped '\\'": ("a backslash in a text", "write \\\\, or 'single quotes' around the text"),
    "Expected '=' after": ("a key has no =", "key = value"),
    "Expected newline": ("there is more text after the value", "one key = value on each line; text in quotes"),
    "Expected ']' at": ("the name of a table is not closed", "[table] or [[list of tables]]"),
    "Invalid statement": ("this is not a key", "key = value, with letters, digits, _ and - in the key"),
    "Unclosed array": ("a list is not closed", "end it with ]"),
    "Unclosed inline table": ("a table in { } is not closed on its line", "end it with }"),
}
