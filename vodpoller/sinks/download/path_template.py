"""The path of an image, made of a template and of values that are not trusted."""

import hashlib
import os
import re
import string
from collections.abc import Mapping
from pathlib import Path
from typing import Final
from urllib.parse import unquote, urlsplit

# The fields of `path`, and the maximum length of their values: a longer value is replaced.
FIELDS: Final = {
    "file_id": 100,
    "task_id": 100,
    "time_offset_ms": 20,
    "definition": 20,
    "index": 10,
    "ext": 5,
    "key": 64,
}
_EVENT_FIELDS: Final = ("file_id", "task_id", "key")
_IMAGE_FIELDS: Final = ("time_offset_ms", "index")
_NAME_MAX_BYTES: Final = 255
_SAFE_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_DIGEST_CHARACTERS: Final = 16

EXTENSIONS: Final = {
    "image/avif": "avif",
    "image/bmp": "bmp",
    "image/gif": "gif",
    "image/heic": "heic",
    "image/jpeg": "jpg",
    "image/png": "png",
    "image/tiff": "tiff",
    "image/webp": "webp",
}
_KNOWN_EXTENSIONS: Final = frozenset({*EXTENSIONS.values(), "jpeg", "tif"})
OTHER_EXTENSION: Final = "bin"


class PathTemplate:
    """The template of the images' paths.

    Args:
        template: The path, with fields.

    Raises:
        ValueError: The template cannot be used; the text says why.
    """

    def __init__(self, template: str) -> None:
        self._template = template
        if "\0" in template:
            raise ValueError("a path cannot hold a NUL character (leave it out)")
        try:
            pieces = list(string.Formatter().parse(template))
        except ValueError:
            raise ValueError("its braces do not match (write {{ and }} for braces themselves)") from None
        self.fields = {name for _, name, _, _ in pieces if name is not None}
        there_are = ", ".join(f"{{{name}}}" for name in FIELDS)
        for _, name, spec, conversion in pieces:
            if name is not None and (name not in FIELDS or spec or conversion):
                raise ValueError(f"the field {{{name}}} does not exist (there are: {there_are})")
        for wanted, what in ((_EVENT_FIELDS, "events"), (_IMAGE_FIELDS, "images of an event")):
            if self.fields.isdisjoint(wanted):
                fields = " or ".join(f"{{{name}}}" for name in wanted)
                raise ValueError(f"all {what} would go to the same file (it needs {fields}; there are: {there_are})")
        self._folder, slash, _ = pieces[0][0].rpartition("/")
        if not self._folder or not slash:
            raise ValueError(
                "it needs a folder before the first field (such as /srv/snapshots/{file_id}-{index}.{ext})"
            )
        longest = self.below_root({name: "x" * most for name, most in FIELDS.items()})
        if any(part in ("", ".", "..") for part in longest):
            raise ValueError("after the first field, no part of it may be empty, . or .. (leave it out)")
        if any(len(os.fsencode(part)) > _NAME_MAX_BYTES for part in longest):
            raise ValueError(f"a name in it can be longer than {_NAME_MAX_BYTES} bytes (put a / between the fields)")

    @property
    def root(self) -> Path:
        """The folder outside of which nothing is written."""
        return Path(os.path.realpath(self._folder))

    def below_root(self, values: Mapping[str, object]) -> list[str]:
        """The folders below the root, and the file name.

        Args:
            values: The values of all fields.
        """
        return self._template.format(**values)[len(self._folder) + 1 :].split("/")


def safe_name(value: str, max_characters: int) -> str:
    """The value, if it is safe as a part of a file name; else a name that is made of its SHA-256.

    Args:
        value: Any text.
        max_characters: Maximum length of the result; for a unique name at least 17.
    """
    if len(value) <= max_characters and _SAFE_NAME.fullmatch(value) and ".." not in value:
        return value
    digest = hashlib.sha256(value.encode(errors="surrogatepass")).hexdigest()
    return f"_{digest[: min(_DIGEST_CHARACTERS, max_characters - 1)]}"


def extension_in(url: str) -> str:
    """The extension in the path of a URL, if it is one of an image; else empty."""
    try:
        name = unquote(urlsplit(url).path)
    except ValueError:
        return ""
    extension = name.rpartition(".")[2].lower()
    return extension if extension in _KNOWN_EXTENSIONS else ""
