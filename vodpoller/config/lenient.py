"""Read what is needed to find the daemon that runs with a configuration file, even if the file cannot be used."""

import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from vodpoller.config.draft import Problems
from vodpoller.config.reading import replace_variables
from vodpoller.config.tables import Daemon, Journal

Table = TypeVar("Table", bound=BaseModel)


def read_leniently(path: Path, *, env: Mapping[str, str]) -> tuple[Journal, Daemon]:
    """Read the tables `[journal]` and `[daemon]`. A table that cannot be read has its defaults.

    Args:
        path: The TOML file.
        env: The environment, for `${VAR}`.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError):
        text = ""
    data = {name: _table_in(text, name) for name in ("journal", "daemon")}
    tables = replace_variables(data, env=env, problems=Problems())
    return _valid(Journal, tables["journal"]), _valid(Daemon, tables["daemon"])


def _table_in(text: str, name: str) -> Any:
    """One table of a text whose other parts may not be TOML."""
    table = re.search(rf"^[ \t]*\[{name}\].*\n(?:(?![ \t]*\[).*\n?)*", text, re.MULTILINE)
    for part in (text, table[0] if table else ""):
        try:
            return tomllib.loads(part).get(name, {})
        except (ValueError, RecursionError):
            continue
    return {}


def _valid(model: type[Table], data: Any) -> Table:
    try:
        return model.model_validate(data)
    except ValidationError:
        return model()
