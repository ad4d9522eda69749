"""Warnings about secrets that every user of this machine can read, or that the user of the unit cannot read."""

import os
import re
import stat
from collections.abc import Iterator, Mapping
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import Any, Final

from vodpoller.config.callbacks import CallbackSource
from vodpoller.config.draft import Draft, Location
from vodpoller.config.sink_types import config_of
from vodpoller.config.tables import CredentialsTable, Listener
from vodpoller.config.wording import LISTS
from vodpoller.secret import HasSecrets
from vodpoller.sinks.contract import Sink

UNITS: Final = Path("/etc/systemd/system")
_LOAD_CREDENTIAL: Final = re.compile(r"^\s*LoadCredential(?:Encrypted)?\s*=\s*([^:\s]+)", re.MULTILINE)
_LOADED_CREDENTIALS: Final = frozenset({"secret_id", "secret_key"})  # by the unit file of this package

# `secret_key`, `token`, the header Authorization, the variable DB_PASSWORD; not Content-Type or LANG, and not
# `secret_id`, which every request contains.
_SECRET_KEY: Final = re.compile(
    r"secret(?!_id$)|token|passw|authori[sz]ation|cookie|(api|access|sign)[-_]?key|^dsn$", re.IGNORECASE
)


def warn_of_readers(draft: Draft, sink_classes: Mapping[str, type[Sink[Any]]]) -> None:
    """Warn root of secret files that the user of the unit cannot read.

    Args:
        draft: The tables, and the warnings.
        sink_classes: The class of each sink, by its name.
    """
    if os.geteuid() != 0:
        return
    tables: dict[Location, tuple[Any, type[HasSecrets]]] = {
        ("credentials",): (draft.data.get("credentials", {}), CredentialsTable),
        ("listener",): (draft.data.get("listener", {}), Listener),
    }
    for at, source in draft.items("sources"):
        if source.get("type") == "callback":
            tables["sources", at] = (source, CallbackSource)
    for name, sink_class in sink_classes.items():
        tables["sinks", name] = (draft.data["sinks"][name], config_of(sink_class))
    for where, (table, model) in tables.items():
        for key in model.secret_file_keys():
            place = (*where, key)
            file_name = table.get(key) if isinstance(table, dict) else None
            if isinstance(file_name, str) and not draft.problems.any_at(place):
                _check_reader(draft, place, file_name)


def _check_reader(draft: Draft, where: Location, name: str) -> None:
    path = draft.context.locate(name)
    is_relative = not Path(name).is_absolute()
    if not _is_of_root_only(path) or (is_relative and path.name in _LOADED_CREDENTIALS | _loaded_credentials()):
        return
    here = "" if is_relative else f', and {where[-1]} = "{path.name}" here'
    draft.warnings.add(
        where,
        f"only root can read {path}, and the unit runs as another user: it needs LoadCredential={path.name}:{path}"
        f"{here} (systemctl edit vodpoller; or let that user read the file)",
    )


def _is_of_root_only(path: Path) -> bool:
    try:
        status = path.stat()
    except OSError:
        return False
    is_for_group = status.st_mode & stat.S_IRGRP and status.st_gid != 0
    return status.st_uid == 0 and not (is_for_group or status.st_mode & stat.S_IROTH)


def _loaded_credentials() -> set[str]:
    """The names that the installed units load with LoadCredential=, instances and drop-ins included."""
    loaded: set[str] = set()
    units = (
        UNITS.glob(f"vodpoller{ending}")
        for ending in (".service", "@*.service", ".service.d/*.conf", "@*.service.d/*.conf")
    )
    for path in chain.from_iterable(units):
        with suppress(OSError):
            loaded.update(_LOAD_CREDENTIAL.findall(path.read_text(errors="replace")))
    return loaded


def exposed_secrets(path: Path, data: Mapping[str, Any]) -> list[str]:
    """One warning for each secret in a configuration file that every user of the machine can read.

    Args:
        path: The file.
        data: Its tables, before variables are replaced.
    """
    try:
        is_exposed = path.stat().st_mode & stat.S_IROTH
    except OSError:
        return []
    found = _secrets_in(data) if is_exposed else ()
    return [
        f"{key}: is a secret in a file that every user of this machine may read (put it into a separate file and name"
        f" that file, as with `secret_key_file`; or take it from the environment, ${{NAME}}; or chmod o= {path})"
        for key in found
    ]


def _secrets_in(tables: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """The keys whose name means a secret and whose value is neither the name of a file nor a variable."""
    for key, value in tables.items():
        place = f"{prefix}{key}"
        match value:
            case Mapping():
                yield from _secrets_in(value, f"{place}.")
            case [*items] if key in LISTS:
                for at, item in enumerate(items):
                    if isinstance(item, Mapping):
                        yield from _secrets_in(item, f"{place}.{item.get('name', at)}.")
            case str() if value and _SECRET_KEY.search(key) and not key.endswith("_file") and "${" not in value:
                yield place
