"""Read a TOML file, and replace the variables and the `~` in its texts."""

import os
import pwd
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from vodpoller.config.draft import Location, Problems
from vodpoller.config.wording import quoted, toml_problem
from vodpoller.errors import ConfigError

_DOLLAR: Final = re.compile(r"\$\$\{|\$\{|\$(?P<name>[A-Za-z_][A-Za-z0-9_]*)?")
_VARIABLE: Final = re.compile(r"\$\$\{|\$\{(?P<name>[^{}]*)\}?")


def read_file(path: Path) -> dict[str, Any]:
    """The tables of a TOML file, before variables are replaced.

    Args:
        path: The file.

    Raises:
        ConfigError: It cannot be read, or is not TOML.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(
            [f"{path}: the file does not exist (copy config.example.toml there and edit it, or name a file with -c)"]
        ) from None
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise ConfigError([f"{path}: line {line}: this is not UTF-8 text (save the file as UTF-8)"]) from None
    except OSError as error:
        raise ConfigError(
            [f"{path}: cannot be read: {error.strerror or error} (make it readable for this user)"]
        ) from None
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError([f"{path}: {toml_problem(error, text)}"]) from None


def replace_variables(data: Mapping[str, Any], *, env: Mapping[str, str], problems: Problems) -> dict[str, Any]:
    """The same tables, with `${VAR}` replaced in texts and `~` replaced in paths.

    Args:
        data: The tables.
        env: The variables.
        problems: Receives a problem for each text that cannot be replaced; such a text is not changed.
    """
    replacement = _Replacement(env, problems)
    return {key: replacement.value(value, (key,)) for key, value in data.items()}


class _Replacement:
    """Replaces the variables of one file."""

    def __init__(self, env: Mapping[str, str], problems: Problems) -> None:
        self._env = env
        self._problems = problems

    def value(self, value: Any, where: Location) -> Any:
        """Replace the variables in a value and in everything that it contains."""
        match value:
            case str() if _is_path(where):
                return self._path(value, where)
            case str():
                return _VARIABLE.sub(lambda found: self._variable(found, where), value)
            case list() | tuple():
                return [self.value(item, (*where, at)) for at, item in enumerate(value)]
            case Mapping():
                return {key: self.value(item, (*where, key)) for key, item in value.items()}
            case _:
                return value

    def _path(self, text: str, where: Location) -> str:
        """A path with its variables replaced and its `~` expanded, as a shell would do it."""
        for found in _DOLLAR.finditer(text):
            if "{" not in found[0]:
                self._problems.add(
                    where,
                    f'has a "$" without a variable (write ${{{found["name"] or "NAME"}}}; if the path itself'
                    ' contains a "$", put the path into a variable)',
                )
                return text
        replaced = _VARIABLE.sub(lambda found: self._variable(found, where), text)
        if not text.startswith("~"):
            return replaced
        user, slash, rest = replaced.partition("/")
        try:
            home = (user == "~" and self._env.get("HOME")) or _home_of(user[1:])
        except KeyError:
            whose = f"the user {quoted(user[1:])} does not exist" if user != "~" else "this user has no home"
            self._problems.add(
                where, f"begins with a ~, but {whose} (write the whole path; or ./~ if the name itself begins with ~)"
            )
            return text
        return f"{home.rstrip('/')}{slash}{rest}" or "/"

    def _variable(self, found: re.Match[str], where: Location) -> str:
        if found[0] == "$${":
            return "${"
        name = found["name"]
        if name is None or not found[0].endswith("}") or not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            self._problems.add(where, 'has a "${" without a variable (write ${NAME}; or $${ for the text "${")')
        elif name not in self._env:
            self._problems.add(
                where,
                f"the environment has no variable {name} (set it where the daemon is started;"
                ' or write $${ for the text "${")',
            )
        else:
            return self._env[name]
        return found[0]


def _is_path(where: Location) -> bool:
    """Whether the value at a place is a path, by its key. Sinks of other packages should use such names."""
    match where:
        case ("sources" | "routes", _, str(key)):
            return key.endswith("_file")
        case ("sinks", _, str(key)) | (_, str(key)):
            return key in ("path", "cwd") or key.endswith("_file")
        case _:
            return False


def _home_of(user: str) -> str:
    """The home folder of a user; an empty name means the user that runs this process.

    Raises:
        KeyError: This user does not exist.
    """
    return (pwd.getpwnam(user) if user else pwd.getpwuid(os.getuid())).pw_dir
