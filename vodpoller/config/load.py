"""The settings: one TOML file, read strictly, with all that is wrong in it said at once and in plain words."""

import math
import os
import pwd
import re
import stat
import tomllib
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from importlib.metadata import EntryPoint
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Any, Final, Literal, TypeVar, cast
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator
from pydantic.json_schema import JsonSchemaMode, models_json_schema
from pydantic_core import ErrorDetails

from vodpoller.config.wording import (
    LISTS,
    NAME_PATTERN,
    NAME_RULE,
    check_jmespath,
    in_words,
    kind_of,
    problem_in_key,
    quoted,
    quoted_all,
    suggestion,
    toml_problem,
    unknown_key,
)
from vodpoller.errors import ConfigError
from vodpoller.event_types import matches_documented, nearest_documented
from vodpoller.httpclient.trust import CaFile
from vodpoller.logs import SEARCHED_MIN_CHARACTERS, Level
from vodpoller.secret import HasSecrets, Secret, Surroundings
from vodpoller.sinks.contract import Sink, SinkConfig
from vodpoller.sinks.registry import available_sinks
from vodpoller.vod.credentials import StaticCredentials

_STRICT: Final = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

# VOD's lease is 30 s. Where a simulator's is shorter, the two defaults that must fit into it shrink in proportion.
_LEASE_SECS: Final = 30.0
_RESERVE_SECS: Final = 5.0
_CONFIRM_TIMEOUT_SECS: Final = 2.0

_NAME_LENGTH: Final = 64
Name = Annotated[str, Field(pattern=NAME_PATTERN, max_length=_NAME_LENGTH)]

_DOLLAR: Final = re.compile(r"\$\$\{|\$\{|\$(?P<name>[A-Za-z_][A-Za-z0-9_]*)?")
_UNITS: Final = Path("/etc/systemd/system")
_LOAD_CREDENTIAL: Final = re.compile(r"^\s*LoadCredential(?:Encrypted)?\s*=\s*([^:\s]+)", re.MULTILINE)
_LOADED_CREDENTIALS: Final = frozenset({"secret_id", "secret_key"})  # by the unit that is shipped

# `secret_key`, `token`, the header Authorization, the variable DB_PASSWORD; not Content-Type or LANG, and not
# `secret_id`, which requests show to all.
_SECRET_KEY: Final = re.compile(
    r"secret(?!_id$)|token|passw|authori[sz]ation|cookie|api[-_]?key|access[-_]?key", re.IGNORECASE
)
_VARIABLE: Final = re.compile(r"\$\$\{|\$\{(?P<name>[^{}]*)\}?")

_Model = TypeVar("_Model", bound=BaseModel)
_Location = tuple[str | int, ...]


# --- the tables of the file -------------------------------------------------------------------------------------------


def _default_reserve_secs(data: dict[str, Any]) -> float:
    return min(_RESERVE_SECS, cast("float", data.get("lease_secs", _LEASE_SECS)) * _RESERVE_SECS / _LEASE_SECS)


def _default_confirm_timeout_secs(data: dict[str, Any]) -> float:
    reserve_secs = cast("float", data.get("confirm_reserve_secs", _RESERVE_SECS))
    return min(_CONFIRM_TIMEOUT_SECS, reserve_secs * _CONFIRM_TIMEOUT_SECS / _RESERVE_SECS)


class Api(BaseModel):
    """`[api]`: how Tencent Cloud's VOD API is reached, and its limits."""

    model_config = _STRICT

    endpoint: str = Field(
        default="https://vod.tencentcloudapi.com",
        description="Where the API is: a URL without a path. Plain http only on this machine, for the simulator.",
    )
    region: Annotated[str, Field(pattern=r"^[a-z0-9-]+$")] | None = Field(
        default=None,
        description="The region that requests name; VOD needs none. Left out: $TENCENTCLOUD_REGION, if set.",
        examples=["ap-guangzhou"],
    )
    ca_file: CaFile | None = Field(
        default=None,
        description="PEM with the certificates that vouch for the API's, in place of the public CAs'. Left out:"
        " $SSL_CERT_FILE and $SSL_CERT_DIR, then $REQUESTS_CA_BUNDLE, then the public CAs. Read again at SIGHUP.",
        examples=["/etc/vodpoller/ca.pem"],
    )
    timeout_secs: Annotated[float, Field(ge=1, le=300)] = Field(
        default=10.0,
        description="How long a pull may take. VOD holds an empty one for 5 s, so less than 6 is too short.",
    )
    lease_secs: Annotated[float, Field(ge=0.1, le=3600)] = Field(
        default=_LEASE_SECS,
        description="How long VOD keeps pulled events for us. It is 30 there; only a simulator has another value.",
    )
    confirm_reserve_secs: Annotated[float, Field(gt=0, le=3600)] = Field(
        default_factory=_default_reserve_secs,
        description="The end of the lease that is kept for confirming; deliveries stop there. Less than `lease_secs`."
        " Left out with a `lease_secs` below 30: a sixth of that.",
        json_schema_extra={"default": _RESERVE_SECS},
    )
    confirm_timeout_secs: Annotated[float, Field(gt=0, le=60)] = Field(
        default_factory=_default_confirm_timeout_secs,
        description="How long one attempt to confirm may take; at most `confirm_reserve_secs`."
        " Left out with a reserve below 5: two fifths of that.",
        json_schema_extra={"default": _CONFIRM_TIMEOUT_SECS},
    )
    requests_per_sec: Annotated[float, Field(ge=1, le=10_000)] = Field(
        default=100.0,
        description="How many requests a second each API action gets, over all sources: the quota of the account.",
    )

    @field_validator("endpoint")
    @classmethod
    def _is_bare_url(cls, value: str) -> str:
        example = "for example https://vod.tencentcloudapi.com"
        try:
            parts = urlsplit(value)
            host, _ = parts.hostname, parts.port
        except ValueError:
            host = None
        if not host or parts.scheme not in ("http", "https"):
            raise ValueError(f"is not an http or https address ({example})")
        if parts.path.strip("/") or parts.query or parts.fragment or "@" in parts.netloc:
            raise ValueError(f"has more than scheme, host and port ({example})")
        if parts.scheme == "http" and not _is_loopback(host):
            raise ValueError("is not encrypted (write https://; plain http is for a simulator on this machine only)")
        return f"{parts.scheme}://{parts.netloc}"

    @field_validator("confirm_reserve_secs")
    @classmethod
    def _fits_into_the_lease(cls, value: float, info: ValidationInfo) -> float:
        lease_secs = info.data.get("lease_secs", math.inf)
        if value >= lease_secs:
            raise ValueError(
                f"{value:g} is not less than lease_secs, so that no time is left to deliver (less than {lease_secs:g})"
            )
        return value

    @field_validator("confirm_timeout_secs")
    @classmethod
    def _fits_into_the_reserve(cls, value: float, info: ValidationInfo) -> float:
        reserve_secs = info.data.get("confirm_reserve_secs", math.inf)
        if value > reserve_secs:
            raise ValueError(
                f"{value:g} is more than confirm_reserve_secs, so that one attempt may outlast the lease"
                f" (at most {reserve_secs:g})"
            )
        return value


class CredentialsTable(HasSecrets):
    """`[credentials]`: the API key. Each secret is given as such or, better, as the name of a file that holds it."""

    model_config = _STRICT

    secret_id: Secret | None = Field(default=None, description="The SecretId of the API key.")
    secret_id_file: str | None = Field(
        default=None,
        description="The file that holds the SecretId. Left out: $CREDENTIALS_DIRECTORY/secret_id,"
        " then $TENCENTCLOUD_SECRET_ID.",
        examples=["secret_id"],
    )
    secret_key: Secret | None = Field(default=None, description="The SecretKey of the API key.")
    secret_key_file: str | None = Field(
        default=None,
        description="The file that holds the SecretKey. Left out: $CREDENTIALS_DIRECTORY/secret_key,"
        " then $TENCENTCLOUD_SECRET_KEY.",
        examples=["secret_key"],
    )
    token: Secret | None = Field(default=None, description="The token of a temporary API key.")
    token_file: str | None = Field(
        default=None,
        description="The file that holds the token. Left out: looked for where the SecretKey was found,"
        " as `token` beside it or as $TENCENTCLOUD_TOKEN.",
        examples=["token"],
    )


class Source(BaseModel):
    """`[[sources]]`: one event queue of VOD."""

    model_config = _STRICT

    name: Name = Field(description="What logs and routes call it.", examples=["main"])
    sub_app_id: Annotated[int, Field(ge=1, le=2**63 - 1)] | None = Field(
        default=None,
        description="The SubAppId of the VOD application. Accounts opened since 2023-12-25 must give it.",
        examples=[1500000001],
    )
    interval_secs: Annotated[float, Field(ge=0.1, le=3600)] = Field(
        default=1.0, description="How often it is made sure that a pull is running."
    )
    long_poll: bool = Field(
        default=True,
        description="Whether the next pull starts as soon as one came back empty; if not, at the next interval.",
    )
    max_concurrent_pulls: Annotated[int, Field(ge=1, le=128)] = Field(
        default=16, description="Maximum number of pulls, with their deliveries, that run at once."
    )
    on_failure: Literal["store", "leave"] = Field(
        default="store",
        description="What happens to an event that a sink did not take in time: `store` keeps it in the journal,"
        " `leave` lets VOD bring it again (for machines whose disk does not last).",
    )
    unrouted: Literal["dead_letter", "confirm", "leave"] | None = Field(
        default=None,
        description="What happens to an event that no route takes: `dead_letter` keeps it for a person, `confirm` drops"
        " it, `leave` lets it circle at VOD. Needed where the routes do not cover every event.",
        examples=["dead_letter"],
    )


class Route(BaseModel):
    """`[[routes]]`: which events go to which sinks. Every route that matches applies; a sink gets an event once."""

    model_config = _STRICT

    name: Name = Field(description="What logs call it.", examples=["snapshots"])
    event_types: Annotated[tuple[str, ...], Field(strict=False, min_length=1)] | None = Field(
        default=None,
        description="Patterns of the event types it takes, with `*`, `?` and `[abc]`, case-sensitive. Left out: all.",
        examples=[["CreateSnapshotByTimeOffsetComplete"]],
    )
    sources: Annotated[tuple[str, ...], Field(strict=False, min_length=1)] | None = Field(
        default=None, description="The sources whose events it takes. Left out: all.", examples=[["main"]]
    )
    where: str | None = Field(
        default=None,
        description="A JMESPath expression that an event must satisfy, as in tccli's --filter.",
        examples=["SnapshotByTimeOffsetCompleteEvent.Definition == `10`"],
    )
    sinks: Annotated[tuple[str, ...], Field(strict=False, min_length=1)] = Field(
        description="The sinks that get the events.", examples=[["archive"]]
    )

    @field_validator("event_types")
    @classmethod
    def _are_globs(cls, value: tuple[str, ...] | None) -> tuple[str, ...] | None:
        for glob in value or ():
            if not glob:
                raise ValueError('has an empty pattern ("*" takes every type)')
            if _has_open_bracket(glob):
                raise ValueError(
                    f'the pattern {quoted(glob)} has a "[" without its "]" (for example "*Complete" or "[ab]*")'
                )
        return value

    @field_validator("where")
    @classmethod
    def _is_jmespath(cls, value: str | None) -> str | None:
        if value is not None:
            check_jmespath(value)
        return value


class Journal(BaseModel):
    """`[journal]`: the file that remembers what was delivered and holds what could not be."""

    model_config = _STRICT

    path: Annotated[Path, Field(strict=False)] = Field(
        default=Path("/var/lib/vodpoller/journal.db"),
        description="The journal's file; its folder is made where it is missing.",
    )
    max_bytes: Annotated[int, Field(ge=2**20, le=2**50)] = Field(
        default=2**30,
        description="How much the stored events may take, dead letters half of it. Beyond it, events stay with VOD.",
    )
    ledger_days: Annotated[float, Field(ge=4, le=3650)] = Field(
        default=5.0,
        description="How long an unconfirmed event is remembered as delivered. VOD keeps events for 4 days.",
    )

    @field_validator("path")
    @classmethod
    def _names_a_file(cls, value: Path) -> Path:
        example = "for example /var/lib/vodpoller/journal.db"
        if not value.name or "\0" in str(value):
            raise ValueError(f"names no file ({example})")
        if str(value) == ":memory:" or str(value).lower().startswith("file:"):
            raise ValueError(
                f"is not the path of a file, but what SQLite calls a database in memory or a URI ({example})"
            )
        return value


class Log(BaseModel):
    """`[log]`: what is written to stderr."""

    model_config = _STRICT

    level: Level = Field(default="info", description="The lowest level that is written.")
    format: Literal["json", "console"] | None = Field(
        default=None,
        description="`json` for programs, `console` for people. Left out: `console` on a terminal, `json` elsewhere.",
        examples=["json"],
    )


class Daemon(BaseModel):
    """`[daemon]`: the process."""

    model_config = _STRICT

    shutdown_secs: Annotated[float, Field(ge=1, le=3600)] = Field(
        default=25.0, description="How long stopping may take; less than systemd's TimeoutStopSec."
    )


TABLES: Final[Mapping[str, type[BaseModel]]] = {
    "api": Api,
    "credentials": CredentialsTable,
    "sources": Source,
    "routes": Route,
    "sinks": SinkConfig,
    "journal": Journal,
    "log": Log,
    "daemon": Daemon,
}


# --- what comes of them -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """The whole configuration, valid in itself and in its cross references.

    Args:
        api: As in the file, as are `journal`, `log`, `daemon`.
        credentials: The API key.
        sources: At least one.
        routes: At least one; they name existing sources and sinks only.
        sinks: The configuration of each sink by its name; each is of its class's own `Config`.
        sink_classes: The class of each sink by its name; called with the name, the configuration
            it gives the sink and a `SinkContext`.
        coverage: Of each source by its name, whether the routes take every event of it. Where not, it has `unrouted`.
        key_renewal: What makes the daemon use another API key once that is where the present one was found, for a
            person: "send SIGHUP".
        warnings: What can be used but is probably not meant, one line each: `key: what is wrong (what would be right)`.
    """

    api: Api
    credentials: StaticCredentials
    sources: tuple[Source, ...]
    routes: tuple[Route, ...]
    sinks: Mapping[str, SinkConfig]
    sink_classes: Mapping[str, type[Sink[Any]]]
    journal: Journal
    log: Log
    daemon: Daemon
    coverage: Mapping[str, bool]
    key_renewal: str = "send SIGHUP"
    warnings: tuple[str, ...] = ()

    def all_warnings(self) -> list[str]:
        """`warnings`, and the secrets that are too short to be looked for in log lines."""
        own = self.credentials
        of_api = (("secret_id", own.secret_id), ("secret_key", own.secret_key), ("token", own.token))
        found = [(f"credentials.{key}", secret) for key, secret in of_api if secret is not None]
        for name, sink in self.sinks.items():
            found += [(f"sinks.{name}.{key}", secret) for key, secret in sink.named_secrets()]
        short = [key for key, secret in found if 0 < len(secret.get()) < SEARCHED_MIN_CHARACTERS]
        why = "it is so short that it is not looked for in log lines (use a secret of 8 characters or more)"
        return [*self.warnings, *(f"{key}: {why}" for key in short)]

    def secrets(self) -> tuple[Secret, ...]:
        """Every secret in it: what must not be shown, and what SIGHUP reads again."""
        of_sinks = (secret for sink in self.sinks.values() for secret in sink.secrets())
        return (*self.credentials.secrets(), *of_sinks)


def load(path: Path, *, env: Mapping[str, str], needs_key: bool = True, for_unit: bool = False) -> Config:
    """Read the file.

    Args:
        path: The TOML file.
        env: The environment: `${VAR}` in texts, the API key where the file does not give it, `$CREDENTIALS_DIRECTORY`.
        needs_key: False for those who will not call VOD: a key that is nowhere to be found is empty then.
        for_unit: Whether to warn root of secrets that only root can read: the unit runs as another user.

    Raises:
        ConfigError: It cannot be used. All problems are in it, but a text that is no TOML has one: the first.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(
            [f"{path}: there is no such file (copy config.example.toml there and edit it, or name a file with -c)"]
        ) from None
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise ConfigError([f"{path}: line {line}: this is not UTF-8 text (save the file as UTF-8)"]) from None
    except OSError as error:
        raise ConfigError(
            [f"{path}: cannot be read: {error.strerror or error} (a file that this user may read)"]
        ) from None
    try:
        data = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError([f"{path}: {toml_problem(error, text)}"]) from None
    config = from_dict(data, where=str(path), base=path.parent, env=env, needs_key=needs_key, for_unit=for_unit)
    return replace(config, warnings=(*config.warnings, *_exposed_secrets(path, data)))


def from_dict(
    data: Mapping[str, Any],
    *,
    where: str,
    base: Path,
    env: Mapping[str, str],
    needs_key: bool = True,
    for_unit: bool = False,
) -> Config:
    """Validate what a TOML file would hold.

    Args:
        data: The tables.
        where: What problems start with: the file.
        base: The folder that secret files of relative name lie in, unless `$CREDENTIALS_DIRECTORY` is set.
        env: As for `load`.
        needs_key: As for `load`.
        for_unit: As for `load`.

    Raises:
        ConfigError: It cannot be used. All problems are in it.
    """
    reading = _Reading(data, base=base, env=env, needs_key=needs_key, for_unit=for_unit)
    config = reading.read()
    if config is None:
        raise ConfigError([f"{where}: {problem}" for problem in reading.problems()])
    return config


def json_schema() -> dict[str, Any]:
    """The JSON Schema of the file, for editors; sinks as far as their types are installed and can be loaded."""
    sinks: dict[str, type[SinkConfig]] = {}
    for name, point in available_sinks().items():
        try:
            sinks[name] = _config_of(_loaded(point))
        except _UnusableSinkError:
            continue
    models = [*TABLES.values(), *sinks.values()]
    keys: list[tuple[type[BaseModel], JsonSchemaMode]] = [(model, "validation") for model in models]
    references, definitions = models_json_schema(keys)

    def reference(model: type[BaseModel]) -> dict[str, Any]:
        return dict(references[model, "validation"])

    properties = {
        name: {"type": "array", "minItems": 1, "items": reference(model)} if name in LISTS else reference(model)
        for name, model in TABLES.items()
    }
    alternatives = [
        {"if": {"properties": {"type": {"const": name}}}, "then": reference(model)} for name, model in sinks.items()
    ]
    properties["sinks"] = {
        "type": "object",
        "minProperties": 1,
        "additionalProperties": {
            "type": "object",
            "required": ["type"],
            "properties": {"type": {"enum": sorted(sinks)}},
            "allOf": alternatives,
        },
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "vodpoller",
        "type": "object",
        "additionalProperties": False,
        "required": ["sources", "routes", "sinks"],
        "properties": properties,
        **definitions,
    }


# --- reading ----------------------------------------------------------------------------------------------------------


class _UnusableSinkError(Exception):
    """A sink type that is installed cannot be used; says why."""


@dataclass(slots=True)
class _Problems:
    """What is wrong, with its place in the file, in the order in which it was found."""

    found: list[tuple[_Location, str]] = field(default_factory=list)

    def add(self, where: _Location, what: str) -> None:
        self.found.append((where, what))

    def concern(self, where: _Location) -> bool:
        """Whether something is wrong at the place itself or in it."""
        return any(place[: len(where)] == where for place, _ in self.found)


class _Reading:
    """One reading of a configuration.

    What crosses tables (names, coverage) is looked up in the data as it came and not in the models, so that a mistake
    in one table hides none in another and makes none up.
    """

    def __init__(
        self, data: Mapping[str, Any], *, base: Path, env: Mapping[str, str], needs_key: bool, for_unit: bool
    ) -> None:
        self._env = env
        self._needs_key = needs_key
        self._for_unit = for_unit
        directory = env.get("CREDENTIALS_DIRECTORY")
        self._surroundings = Surroundings(base=base, credentials_directory=Path(directory) if directory else None)
        self._problems = _Problems()
        self._warnings = _Problems()  # what does not keep the configuration from being used
        self._data = {key: self._interpolated(value, (key,)) for key, value in data.items()}

    def problems(self) -> list[str]:
        """Each with the key it is about, and each once."""
        return self._lines(self._problems)

    def _lines(self, problems: _Problems) -> list[str]:
        return list(dict.fromkeys(f"{self._key(where)}: {what}" for where, what in problems.found))

    def read(self) -> Config | None:
        for key in self._data:
            if key not in TABLES:
                self._problems.add((key,), unknown_key(key, TABLES, TABLES))
        api = self._table("api", Api, self._with_region)
        credentials = self._credentials()
        sources = self._items("sources", Source, '[[sources]] with name = "main"')
        routes = self._items("routes", Route, '[[routes]] with name = "all" and sinks = ["archive"]')
        sinks, sink_classes = self._sinks()
        journal = self._table("journal", Journal)
        log = self._table("log", Log)
        daemon = self._table("daemon", Daemon)
        self._check_names()
        self._check_sub_app_ids()
        self._check_references()
        self._check_event_types()
        self._check_claims(sinks, journal)
        self._check_lease(api)
        self._check_readers(sink_classes)
        coverage = self._coverage()
        if self._problems.found:
            return None
        if not (api and credentials and journal and log and daemon):
            raise AssertionError("a table is missing without a problem that says so")
        return Config(
            api=api,
            credentials=credentials,
            sources=tuple(sources),
            routes=tuple(routes),
            sinks=sinks,
            sink_classes=sink_classes,
            journal=journal,
            log=log,
            daemon=daemon,
            coverage=coverage,
            key_renewal=self._key_renewal(credentials),
            warnings=tuple(self._lines(self._warnings)),
        )

    # --- variables

    def _interpolated(self, value: Any, where: _Location) -> Any:
        match value:
            case str() if _is_path(where):
                return self._path(value, where)
            case str():
                return _VARIABLE.sub(lambda found: self._variable(found, where), value)
            case list() | tuple():
                return [self._interpolated(item, (*where, at)) for at, item in enumerate(value)]
            case Mapping():
                return {key: self._interpolated(item, (*where, key)) for key, item in value.items()}
            case _:
                return value

    def _path(self, text: str, where: _Location) -> str:
        """A path with its variables replaced and its `~` expanded; the shell that does so elsewhere is not here."""
        for found in _DOLLAR.finditer(text):
            if "{" not in found[0]:
                self._problems.add(
                    where,
                    f'has a "$" that no variable follows (write ${{{found["name"] or "NAME"}}}; a path that holds the'
                    " character itself can come out of a variable only)",
                )
                return text
        replaced = _VARIABLE.sub(lambda found: self._variable(found, where), text)
        if not text.startswith("~"):
            return replaced
        user, slash, rest = replaced.partition("/")
        try:
            home = (user == "~" and self._env.get("HOME")) or _home_of(user[1:])
        except KeyError:
            whose = f"there is no user {quoted(user[1:])}" if user != "~" else "this user has no home"
            self._problems.add(where, f"begins with a ~, but {whose} (write the whole path, or ./~ for a name)")
            return text
        return f"{home.rstrip('/')}{slash}{rest}" or "/"

    def _variable(self, found: re.Match[str], where: _Location) -> str:
        if found[0] == "$${":
            return "${"
        name = found["name"]
        if name is None or not found[0].endswith("}") or not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            self._problems.add(where, 'has a "${" that no variable follows (write ${NAME}, or $${ for the characters)')
        elif name not in self._env:
            self._problems.add(
                where,
                f"the environment has no variable {name} (set it where the daemon is started,"
                " or write $${ for the characters)",
            )
        else:
            return self._env[name]
        return found[0]

    # --- single tables

    def _with_region(self, table: Mapping[str, Any]) -> dict[str, Any]:
        region = self._env.get("TENCENTCLOUD_REGION")
        return {**({"region": region} if region else {}), **table}

    def _table(
        self, name: str, model: type[_Model], prepare: Callable[[Mapping[str, Any]], dict[str, Any]] = dict
    ) -> _Model | None:
        table = self._data.get(name, {})
        if isinstance(table, dict):
            return self._validated(model, prepare(table), (name,))
        self._problems.add((name,), f"must be a table, but is {kind_of(table)} (write [{name}] on a line of its own)")
        return None

    def _items(self, name: str, model: type[_Model], example: str) -> list[_Model]:
        items = self._data.get(name)
        if not items and isinstance(items, list | None):
            self._problems.add((name,), f"there is none (add at least one: {example})")
        elif not isinstance(items, list):
            self._problems.add((name,), f"must be a list of tables, but is {kind_of(items)} (write [[{name}]])")
        valid: list[_Model] = []
        for at, item in enumerate(items if isinstance(items, list) else []):
            if not isinstance(item, dict):
                self._problems.add((name, at), f"must be a table, but is {kind_of(item)} (write [[{name}]])")
            elif (found := self._validated(model, item, (name, at))) is not None:
                valid.append(found)
        return valid

    def _validated(self, model: type[_Model], table: Mapping[str, Any], where: _Location) -> _Model | None:
        try:
            return model.model_validate(table, context=self._surroundings)
        except ValidationError as error:
            # The input is kept out of it: it may be a secret.
            for detail in error.errors(include_url=False):
                self._add(detail, model, where)
        return None

    def _add(self, detail: ErrorDetails, model: type[BaseModel], where: _Location) -> None:
        place = detail["loc"]
        context = detail.get("ctx", {})
        if context.get("key"):
            place = (*place[:-1], context["key"])
        if detail["type"] != "default_factory_not_called" and not self._problems.concern((*where, *place)):
            self._problems.add((*where, *place), in_words(detail, model, tables={} if where[0] == "sinks" else TABLES))

    def _credentials(self) -> StaticCredentials | None:
        table = self._data.get("credentials", {})
        if not isinstance(table, dict):
            self._table("credentials", CredentialsTable)
            return None
        found = {key: value for key, value in table.items() if value is not None}  # a dict of Python's may hold None
        given = dict(found)
        places = {key: self._find_credential(key, found) for key in ("secret_id", "secret_key")}
        # A token belongs to one key: one that lies about elsewhere would spoil a lasting key.
        token_place = self._find_credential("token", found, only=places["secret_key"])
        if not self._needs_key and None in places.values():
            return StaticCredentials(secret_id=Secret(value=""), secret_key=Secret(value=""), token=None)
        for key, place in places.items():
            if place is None:
                self._problems.add(
                    ("credentials", key),
                    f"is nowhere to be found (set {key}_file in [credentials], or provide $CREDENTIALS_DIRECTORY/{key}"
                    f" as systemd's LoadCredential= does, or set the variable TENCENTCLOUD_{key.upper()})",
                )
        valid = self._validated(CredentialsTable, found, ("credentials",))
        for key, secret in valid.named_secrets() if valid else ():
            self._check_key(key, secret, from_environment=key in found and key not in table)
        if valid is None or valid.secret_id is None or valid.secret_key is None:
            return None
        origins = {
            key: self._origin(key, place, given) for key, place in {**places, "token": token_place}.items() if place
        }
        return StaticCredentials(
            secret_id=valid.secret_id, secret_key=valid.secret_key, token=valid.token, origins=origins
        )

    def _origin(self, key: str, place: str, given: Mapping[str, Any]) -> str:
        """Where a secret of the API key is, for a person."""
        match place:
            case "directory":
                return f"$CREDENTIALS_DIRECTORY/{key} ({self._surroundings.locate(key)})"
            case "env":
                return f"$TENCENTCLOUD_{key.upper()}"
            case _ if isinstance(name := given.get(f"{key}_file"), str):
                return str(self._surroundings.locate(name))
            case _:
                return "the configuration"

    def _check_key(self, key: str, secret: Secret, *, from_environment: bool) -> None:
        if problem := secret.restrict(problem_in_key):
            variable = f"$TENCENTCLOUD_{key.upper()} " if from_environment else ""
            self._problems.add(
                ("credentials", f"{key}_file" if secret.path else key),
                f"{f'{secret.path} ' if secret.path else variable}{problem} (write the key alone, nothing around it)",
            )

    def _key_renewal(self, credentials: StaticCredentials) -> str:
        """What makes the daemon read the key again: it does so itself only where the key is in a file that can change.

        systemd copies what LoadCredential= names when the service starts, and never again (systemd.exec(5)).
        """
        directory = self._surroundings.credentials_directory
        paths = [credentials.secret_id.path, credentials.secret_key.path]
        if credentials.token is not None:
            paths.append(credentials.token.path)
        if directory is not None and any(path and path.is_relative_to(directory.absolute()) for path in paths):
            return "restart the service (systemd copies the files of LoadCredential= only at its start)"
        return "send SIGHUP" if all(paths) else "restart the daemon"

    def _find_credential(self, key: str, table: dict[str, Any], *, only: str | None = None) -> str | None:
        """Enter one secret that the table leaves out, and say where it is: "file", "directory", "env", or nowhere."""
        if key in table or f"{key}_file" in table:
            return "file"
        directory = self._surroundings.credentials_directory
        if only in (None, "directory") and directory is not None and _seems_to_exist(directory / key):
            table[f"{key}_file"] = str(directory / key)
            return "directory"
        if only in (None, "env") and (value := self._env.get(f"TENCENTCLOUD_{key.upper()}")):
            table[key] = value
            return "env"
        return None

    # --- sinks

    def _sinks(self) -> tuple[dict[str, SinkConfig], dict[str, type[Sink[Any]]]]:
        configs: dict[str, SinkConfig] = {}
        classes: dict[str, type[Sink[Any]]] = {}
        tables = self._data.get("sinks", {})
        if not isinstance(tables, dict):
            self._problems.add(("sinks",), f"must hold tables, but is {kind_of(tables)} (write [sinks.archive])")
        elif not tables:
            self._problems.add(("sinks",), 'there is none (add at least one: [sinks.archive] with type = "file")')
        else:
            available = available_sinks()
            for name, table in tables.items():
                if (sink_class := self._sink_class(name, table, available)) is not None:
                    classes[name] = sink_class
                    if (config := self._validated(_config_of(sink_class), table, ("sinks", name))) is not None:
                        configs[name] = config
        return configs, classes

    def _sink_class(self, name: str, table: Any, available: Mapping[str, EntryPoint]) -> type[Sink[Any]] | None:
        where = ("sinks", name)
        if not isinstance(table, dict):
            self._problems.add(
                where, f"must be a table, but is {kind_of(table)} (write [sinks.archive], then its keys)"
            )
            return None
        if not re.fullmatch(NAME_PATTERN, name) or len(name) > _NAME_LENGTH:
            self._problems.add(where, f"is no name for a sink ({NAME_RULE})")
        type_name = table.get("type")
        place = (*where, "type")
        if "type" not in table:
            self._problems.add(place, f"is missing (one of {quoted_all(sorted(available))})")
        elif not isinstance(type_name, str):
            self._problems.add(
                place, f"must be text in quotes, but is {kind_of(type_name)} (one of {quoted_all(sorted(available))})"
            )
        elif type_name in available:
            try:
                return _loaded(available[type_name])
            except _UnusableSinkError as error:
                self._problems.add(place, str(error))
        elif not self._problems.concern(place):
            self._problems.add(
                place,
                f"no sink type {quoted(type_name)} is installed ({suggestion(type_name, available)}"
                f"installed: {quoted_all(sorted(available))})",
            )
        return None

    # --- what crosses tables

    def _raw(self, name: str) -> list[tuple[int, Mapping[str, Any]]]:
        items = self._data.get(name)
        return [
            (at, item) for at, item in enumerate(items if isinstance(items, list) else []) if isinstance(item, dict)
        ]

    def _names(self, name: str) -> dict[str, int]:
        """The names of a list's tables with the first place of each."""
        names: dict[str, int] = {}
        for at, item in self._raw(name):
            if isinstance(item.get("name"), str):
                names.setdefault(item["name"], at)
        return names

    def _check_names(self) -> None:
        for table in LISTS:
            first = self._names(table)
            for at, item in self._raw(table):
                if first.get(str(item.get("name")), at) != at:
                    self._problems.add((table, at, "name"), f"another of the {table} has this name (give each its own)")

    def _check_sub_app_ids(self) -> None:
        first: dict[int | None, int] = {}
        for at, item in self._raw("sources"):
            sub_app_id = item.get("sub_app_id")
            if isinstance(sub_app_id, int | None) and first.setdefault(sub_app_id, at) != at:
                other = self._key(("sources", first[sub_app_id]))
                same = "neither this source nor" if sub_app_id is None else "this is also that of"
                self._problems.add(
                    ("sources", at, "sub_app_id"),
                    f"{same} {other}{' has one' if sub_app_id is None else ''}, and two sources of one queue take"
                    " each other's events (give each its own SubAppId, or keep one source)",
                )

    def _check_references(self) -> None:
        used: set[str] = set()
        sinks = self._data.get("sinks", {})
        for at, route in self._raw("routes"):
            used.update(_texts(route.get("sinks")).values())
            self._check_names_exist(("routes", at, "sources"), route.get("sources"), self._names("sources"))
            if isinstance(sinks, dict):
                self._check_names_exist(("routes", at, "sinks"), route.get("sinks"), sinks)
        for name in sinks if isinstance(sinks, dict) and self._raw("routes") else ():
            if name not in used:
                self._problems.add(
                    ("sinks", name), "no route uses this sink (name it in the sinks of a route, or delete it)"
                )

    def _check_event_types(self) -> None:
        for at, route in self._raw("routes"):
            for glob in _texts(route.get("event_types")).values():
                if matches_documented(glob):
                    continue
                near = nearest_documented(glob)
                hint = f"did you mean {quoted(near)}? " if near else ""
                self._warnings.add(
                    ("routes", at, "event_types"),
                    f"{quoted(glob)} matches no event type that Tencent documents ({hint}case matters; if the type is"
                    " newer than this program, all is well)",
                )

    def _check_names_exist(self, where: _Location, names: Any, known: Collection[str]) -> None:
        kind = str(where[-1])
        for at, name in _texts(names).items():
            if name not in known and not self._problems.concern((*where, at)):
                others = f"there are: {quoted_all(known)}" if known else f"there are no {kind} at all"
                self._problems.add(where, f"there is no {kind[:-1]} {quoted(name)} ({suggestion(name, known)}{others})")

    def _check_claims(self, sinks: Mapping[str, SinkConfig], journal: Journal | None) -> None:
        holders: dict[str, str] = {}
        if journal is not None:
            holders[f"file:{os.path.realpath(journal.path)}"] = "journal"
        for name, sink in sinks.items():
            for claim in sorted(sink.claims()):
                holder = holders.setdefault(claim, f"sinks.{name}")
                if holder != f"sinks.{name}":
                    self._problems.add(
                        ("sinks", name), f"{holder} writes {claim.removeprefix('file:')} too (give each its own)"
                    )

    def _check_lease(self, api: Api | None) -> None:
        if api is not None and api.lease_secs > _LEASE_SECS and not _is_loopback(urlsplit(api.endpoint).hostname or ""):
            self._warnings.add(
                ("api", "lease_secs"),
                f"{api.lease_secs:g} is more than the {_LEASE_SECS:g} s after which VOD hands events out again, which"
                " nothing can extend: a later confirm fails (leave it out; only a simulator has another value)",
            )

    def _check_readers(self, sink_classes: Mapping[str, type[Sink[Any]]]) -> None:
        """Tell root of secrets that the user of the unit cannot read."""
        if not self._for_unit or os.geteuid() != 0:
            return
        tables: dict[_Location, tuple[Any, type[HasSecrets]]] = {
            ("credentials",): (self._data.get("credentials", {}), CredentialsTable)
        }
        for name, sink_class in sink_classes.items():
            tables["sinks", name] = (self._data["sinks"][name], _config_of(sink_class))
        for where, (table, model) in tables.items():
            for key in model.secret_keys():
                place = (*where, f"{key}_file")
                file_name = table.get(place[-1]) if isinstance(table, dict) else None
                if isinstance(file_name, str) and not self._problems.concern(place):
                    self._check_reader(place, file_name)

    def _check_reader(self, where: _Location, name: str) -> None:
        path = self._surroundings.locate(name)
        is_relative = not Path(name).is_absolute()
        if not _is_of_root_only(path) or (is_relative and path.name in _LOADED_CREDENTIALS | _loaded_credentials()):
            return
        here = "" if is_relative else f', and {where[-1]} = "{path.name}" here'
        self._warnings.add(
            where,
            f"only root can read {path}, and the unit runs as another user: it needs LoadCredential={path.name}:{path}"
            f"{here} (systemctl edit vodpoller; or let that user read the file)",
        )

    def _coverage(self) -> dict[str, bool]:
        routes = self._raw("routes")
        coverage = {}
        for at, source in self._raw("sources"):
            name = str(source.get("name"))
            covered = any(_takes_everything(route, name) for _, route in routes)
            coverage[name] = covered
            if routes and not covered and "unrouted" not in source:
                self._problems.add(
                    ("sources", at, "unrouted"),
                    "is missing, and the routes do not take every event of this source (say what happens to the others:"
                    ' "dead_letter" keeps them for a person, "confirm" drops them, "leave" lets them circle at VOD)',
                )
        return coverage

    # --- names of places

    def _key(self, where: _Location) -> str:
        """The place as a person would name it: `sources.main.interval_secs`, or `sources[0]` where it has no name."""
        key = ""
        for depth, part in enumerate(where):
            if isinstance(part, str):
                key += f".{part}" if key else part
                continue
            item = self._data[str(where[0])][part] if depth == 1 and where[0] in LISTS else None
            name = item.get("name") if isinstance(item, dict) else None
            named = isinstance(name, str) and re.fullmatch(NAME_PATTERN, name)
            key += f".{name}" if named else f"[{part}]"
        return key


def _is_path(where: _Location) -> bool:
    """Whether the key at a place names a file or a folder: tables call it so, and those of sinks should."""
    match where:
        case ("sources" | "routes", _, str(key)):
            return key.endswith("_file")
        case ("sinks", _, str(key)) | (_, str(key)):
            return key in ("path", "cwd") or key.endswith("_file")
        case _:
            return False


def _home_of(user: str) -> str:
    """The home folder of a user; of the one that this process runs as if the name is empty.

    Raises:
        KeyError: There is no such user.
    """
    return (pwd.getpwnam(user) if user else pwd.getpwuid(os.getuid())).pw_dir


def _is_of_root_only(path: Path) -> bool:
    try:
        status = path.stat()
    except OSError:
        return False
    is_for_group = status.st_mode & stat.S_IRGRP and status.st_gid != 0
    return status.st_uid == 0 and not (is_for_group or status.st_mode & stat.S_IROTH)


def _loaded_credentials() -> set[str]:
    """What the unit of this machine, with its drop-ins, loads."""
    loaded: set[str] = set()
    for path in (_UNITS / "vodpoller.service", *_UNITS.glob("vodpoller.service.d/*.conf")):
        with suppress(OSError):
            loaded.update(_LOAD_CREDENTIAL.findall(path.read_text(errors="replace")))
    return loaded


def _exposed_secrets(path: Path, data: Mapping[str, Any]) -> list[str]:
    """A line for each secret that stands in a file which every user of the machine may read."""
    try:
        is_exposed = path.stat().st_mode & stat.S_IROTH
    except OSError:
        return []
    found = _secrets_in(data) if is_exposed else ()
    return [
        f"{key}: is a secret in a file that every user of this machine may read (put it into a file of its own and name"
        f" that, as `secret_key_file` does; or take it from the environment, ${{NAME}}; or chmod o= {path})"
        for key in found
    ]


def _secrets_in(tables: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """The keys whose names say that they are secret, and whose values are neither a file's name nor a variable."""
    for key, value in tables.items():
        place = f"{prefix}{key}"
        match value:
            case Mapping():
                yield from _secrets_in(value, f"{place}.")
            case str() if value and _SECRET_KEY.search(key) and not key.endswith("_file") and "${" not in value:
                yield place


def _seems_to_exist(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:
        return True  # reading it will say what is wrong


def _loaded(point: EntryPoint) -> type[Sink[Any]]:
    try:
        sink_class = point.load()
    except Exception as error:  # an installed package may fail in any way
        raise _UnusableSinkError(
            f"the sink type {quoted(point.name)} cannot be loaded: {type(error).__name__}: {error}"
            f" (install what {point.value} needs, or remove the sink)"
        ) from error
    config = getattr(sink_class, "Config", None)
    if not (isinstance(sink_class, type) and issubclass(sink_class, Sink)) or not (
        isinstance(config, type) and issubclass(config, SinkConfig)
    ):
        raise _UnusableSinkError(
            f"the sink type {quoted(point.name)} is no sink: {point.value} must be a vodpoller.sinks.Sink"
            " with a Config (ask those who made the package)"
        )
    return sink_class


def _config_of(sink_class: type[Sink[Any]]) -> type[SinkConfig]:
    config: type[SinkConfig] = sink_class.Config
    return config


def _texts(value: Any) -> dict[int, str]:
    """The texts in what should be a list of texts; a text in its place is meant as the only one."""
    value = [value] if isinstance(value, str) else value
    return {at: item for at, item in enumerate(value if isinstance(value, list) else []) if isinstance(item, str)}


def _takes_everything(route: Mapping[str, Any], source: str) -> bool:
    globs = route.get("event_types", ["*"])
    sources = route.get("sources", [source])
    return (
        "where" not in route
        and source in (sources if isinstance(sources, list) else [])
        and any(set(glob) == {"*"} for glob in _texts(globs).values())
    )


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _has_open_bracket(glob: str) -> bool:
    """Whether fnmatch takes a "[" for the character itself because nothing closes it."""
    at = 0
    while (at := glob.find("[", at)) >= 0:
        # A "]" right at the start, or after "!", is one of the characters.
        start = at + 2 if glob[at + 1 : at + 2] == "!" else at + 1
        end = glob.find("]", start + 1)
        if end < 0:
            return True
        at = end
    return False
