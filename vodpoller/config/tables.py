"""The tables of the file: their keys, defaults and bounds, one model for each table."""

import math
import re
from collections.abc import Iterator, Mapping
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Any, Final, Literal, cast
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from vodpoller.config.wording import NAME_MAX_LENGTH, NAME_PATTERN, missing_modules, quoted, quoted_all
from vodpoller.expressions import ExpressionText
from vodpoller.httpclient.trust import CaFile
from vodpoller.logs import Level
from vodpoller.secret import HasSecrets, Secret, SecretFile
from vodpoller.sinks.contract import SinkConfig
from vodpoller.vod.endpoint import bare_endpoint, is_loopback

_STRICT: Final = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

_HOST: Final = re.compile(r"[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\]")

# VOD's lease is 30 s. If the lease of a simulator is shorter, the two defaults that must fit into it shrink with it.
LEASE_SECS: Final = 30.0
_RESERVE_SECS: Final = 5.0
_CONFIRM_TIMEOUT_SECS: Final = 2.0

LISTENER_MODULES: Final = ("waitress", "prometheus_client", "jinja2")
_PASSWORD_MIN_CHARACTERS: Final = 8

# The maximum length is not in the pattern, and the pattern has no \w: pydantic's engine takes 10 MB for `\w{1,128}`.
Name = Annotated[str, Field(pattern=NAME_PATTERN, max_length=NAME_MAX_LENGTH)]


def _default_reserve_secs(data: dict[str, Any]) -> float:
    return min(_RESERVE_SECS, cast("float", data.get("lease_secs", LEASE_SECS)) * _RESERVE_SECS / LEASE_SECS)


def _default_confirm_timeout_secs(data: dict[str, Any]) -> float:
    reserve_secs = cast("float", data.get("confirm_reserve_secs", _RESERVE_SECS))
    return min(_CONFIRM_TIMEOUT_SECS, reserve_secs * _CONFIRM_TIMEOUT_SECS / _RESERVE_SECS)


class Api(BaseModel):
    """`[api]`: how Tencent Cloud's VOD API is reached, and its limits."""

    model_config = _STRICT

    endpoint: str = Field(
        default="https://vod.tencentcloudapi.com",
        description="The URL of the API, without a path. Plain http only on this machine, for the simulator.",
    )
    region: Annotated[str, Field(pattern=r"^[a-z0-9-]+$")] | None = Field(
        default=None,
        description="The region in requests; VOD needs none. Left out: $TENCENTCLOUD_REGION, if set.",
        examples=["ap-guangzhou"],
    )
    ca_file: CaFile | None = Field(
        default=None,
        description="A PEM file with the CA certificates for the API, in place of the public CAs. Left out:"
        " $SSL_CERT_FILE and $SSL_CERT_DIR, then $REQUESTS_CA_BUNDLE, then the public CAs. Read again at SIGHUP.",
        examples=["/etc/vodpoller/ca.pem"],
    )
    timeout_secs: Annotated[float, Field(ge=1, le=300)] = Field(
        default=10.0,
        description="The time limit of a pull. VOD answers an empty pull after 5 s, so less than 6 is too short.",
    )
    lease_secs: Annotated[float, Field(ge=0.1, le=3600)] = Field(
        default=LEASE_SECS,
        description="Number of seconds for which VOD reserves pulled events for this client. VOD: 30; only a simulator"
        " has another value.",
    )
    confirm_reserve_secs: Annotated[float, Field(gt=0, le=3600)] = Field(
        default_factory=_default_reserve_secs,
        description="The last part of the lease, reserved for confirming: deliveries stop when it begins. Less than"
        " `lease_secs`. Left out with a `lease_secs` below 30: a sixth of `lease_secs`.",
        json_schema_extra={"default": _RESERVE_SECS},
    )
    confirm_timeout_secs: Annotated[float, Field(gt=0, le=60)] = Field(
        default_factory=_default_confirm_timeout_secs,
        description="The time limit of one attempt to confirm; at most `confirm_reserve_secs`."
        " Left out with a `confirm_reserve_secs` below 5: two fifths of it.",
        json_schema_extra={"default": _CONFIRM_TIMEOUT_SECS},
    )
    requests_per_sec: Annotated[float, Field(ge=1, le=10_000)] = Field(
        default=100.0,
        description="The maximum number of requests per second of each API action, over all sources: the"
        " quota of the account.",
    )

    @field_validator("endpoint")
    @classmethod
    def _is_bare_url(cls, value: str) -> str:
        return bare_endpoint(value, "https://vod.tencentcloudapi.com")

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
    """`[credentials]`: the API key. Each secret is given directly or, better, as the name of a file that holds it."""

    model_config = _STRICT

    provider: Literal["static", "cvm_role", "assume_role"] = Field(
        default="static",
        description="The origin of the key: `static`, a key that is given here, in files or in the environment;"
        " `cvm_role`, a temporary key of this machine's role; `assume_role`, a temporary key of a role that a given key"
        " may assume. Temporary keys are renewed automatically.",
    )
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
        description="The file that holds the token. Left out: searched where the SecretKey was found,"
        " as `token` beside it or as $TENCENTCLOUD_TOKEN.",
        examples=["token"],
    )
    role: Annotated[str, Field(pattern=r"^[A-Za-z0-9_+=,.@-]+$", max_length=128)] | None = Field(
        default=None,
        description="`cvm_role`: the name of the role. Left out: the metadata service is asked for it.",
        examples=["vodpoller"],
    )
    metadata_endpoint: str = Field(
        default="http://metadata.tencentyun.com",
        description="`cvm_role`: the URL of the metadata service. No proxy is used for it.",
    )
    role_arn: Annotated[str, Field(pattern=r"^qcs::cam::[A-Za-z0-9_/:+=,.@-]+$", max_length=512)] | None = Field(
        default=None,
        description="`assume_role`: the role. Left out: $TENCENTCLOUD_ROLE_ARN.",
        examples=["qcs::cam::uin/100000000001:roleName/vodpoller"],
    )
    role_session_name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_+=,.@-]+$", min_length=2, max_length=128)] = Field(
        default="vodpoller", description="`assume_role`: the name that the account's audit shows."
    )
    duration_secs: Annotated[int, Field(ge=900, le=43200)] = Field(
        default=7200, description="`assume_role`: the life of a temporary key; the role may allow less."
    )
    external_id: Annotated[str, Field(pattern=r"^[A-Za-z0-9_+=,.@:/-]+$", min_length=2, max_length=128)] | None = Field(
        default=None,
        description="`assume_role`: the external id that the trust of the role requires.",
        examples=["partner-42"],
    )
    sts_endpoint: str = Field(
        default="https://sts.tencentcloudapi.com",
        description="`assume_role`: the URL of STS. `api.ca_file` is used for it, too.",
    )
    sts_region: Annotated[str, Field(pattern=r"^[a-z0-9-]+$")] = Field(
        default="ap-guangzhou", description="`assume_role`: the region in requests to STS."
    )

    @field_validator("metadata_endpoint")
    @classmethod
    def _is_metadata_service(cls, value: str) -> str:
        return bare_endpoint(value, "http://metadata.tencentyun.com", may_be_plain=True)

    @field_validator("sts_endpoint")
    @classmethod
    def _is_sts(cls, value: str) -> str:
        return bare_endpoint(value, "https://sts.tencentcloudapi.com")


class AnySource(BaseModel):
    """`[[sources]]`: one VOD application whose events come here, pulled or received."""

    model_config = _STRICT

    name: Name = Field(description="The name of the source in logs and routes.", examples=["main"])
    type: Literal["pull", "callback"] = Field(
        default="pull",
        description="How its events arrive. `pull`: vodpoller asks VOD for them (reliable callback); `callback`: VOD"
        " sends them (normal callback).",
    )
    sub_app_id: Annotated[int, Field(ge=1, le=2**63 - 1)] | None = Field(
        default=None,
        description="The SubAppId of the VOD application. Accounts opened since 2023-12-25 must give it.",
        examples=[1500000001],
    )
    on_failure: Literal["store", "leave"] = Field(
        default="store",
        description="What happens to an event that a sink did not accept in time: `store` keeps it in the journal,"
        " `leave` lets VOD deliver it again (for machines whose disk is not kept; pulled events only).",
    )
    unrouted: Literal["dead_letter", "confirm", "leave"] | None = Field(
        default=None,
        description="What happens to an event that no route takes: `dead_letter` keeps it for a person, `confirm` drops"
        " it, `leave` leaves it with VOD, which delivers it again and again (pulled events only). Required if the"
        " routes do not take all events.",
        examples=["dead_letter"],
    )


class Source(AnySource):
    """`[[sources]]` with `type = "pull"`: one event queue of VOD."""

    interval_secs: Annotated[float, Field(ge=0.1, le=3600)] = Field(
        default=1.0, description="The interval of the checks whether a pull is running."
    )
    long_poll: bool = Field(
        default=True,
        description="Whether the next pull starts as soon as an empty one has ended; if not, at the next interval.",
    )
    max_concurrent_pulls: Annotated[int, Field(ge=1, le=128)] = Field(
        default=16, description="The maximum number of pulls, with their deliveries, at the same time."
    )


class Route(BaseModel):
    """`[[routes]]`: which events go to which sinks. Every route that matches applies; a sink gets an event once."""

    model_config = _STRICT

    name: Name = Field(description="The name of the route in logs.", examples=["snapshots"])
    event_types: Annotated[tuple[str, ...], Field(strict=False, min_length=1)] | None = Field(
        default=None,
        description="Patterns of event types that it takes, with `*`, `?` and `[abc]`, case-sensitive. Left out: all.",
        examples=[["CreateSnapshotByTimeOffsetComplete"]],
    )
    sources: Annotated[tuple[str, ...], Field(strict=False, min_length=1)] | None = Field(
        default=None, description="The sources whose events it takes. Left out: all.", examples=[["main"]]
    )
    where: ExpressionText | None = Field(
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


class Journal(BaseModel):
    """`[journal]`: the file that remembers delivered events and stores those that could not be delivered."""

    model_config = _STRICT

    path: Annotated[Path, Field(strict=False)] = Field(
        default=Path("/var/lib/vodpoller/journal.db"),
        description="The journal's file; its folder is made if it is missing.",
    )
    max_bytes: Annotated[int, Field(ge=2**20, le=2**50)] = Field(
        default=2**30,
        description="The maximum size of stored events; dead letters may take half. Beyond it, events stay with VOD.",
    )
    ledger_days: Annotated[float, Field(ge=4, le=3650)] = Field(
        default=5.0,
        description="Number of days for which an unconfirmed event is remembered as delivered. VOD keeps events for 4"
        " days.",
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
    """`[log]`: the lines on stderr."""

    model_config = _STRICT

    level: Level = Field(default="info", description="The lowest level that is written.")
    format: Literal["json", "console"] | None = Field(
        default=None,
        description="`json` for programs, `console` for people. Left out: `console` on a terminal, else `json`.",
        examples=["json"],
    )


class Daemon(BaseModel):
    """`[daemon]`: the process."""

    model_config = _STRICT

    shutdown_secs: Annotated[float, Field(ge=1, le=3600)] = Field(
        default=25.0, description="The time limit of a stop; less than systemd's TimeoutStopSec."
    )


class Listener(HasSecrets):
    """`[listener]`: metrics, probes and the status page over HTTP; needs `pip install 'vodpoller[listener]'`."""

    model_config = _STRICT

    address: str | None = Field(
        default=None,
        description="The address to listen on: HOST:PORT, an IPv6 address in square brackets. Left out: no listener.",
        examples=["127.0.0.1:9464"],
    )
    password_file: SecretFile | None = Field(
        default=None,
        description="The file whose first line is the password, at least 8 characters; the user name is `vodpoller`."
        " The two probes need no password. Left out: no request needs one, and the page shows no bodies.",
        examples=["listener_password"],
    )
    unauthenticated: bool = Field(
        default=False,
        description="Whether other machines may send requests without a password. Must be true for an `address` that"
        " they can reach, unless there is a `password_file`.",
    )
    hosts: Annotated[tuple[str, ...], Field(strict=False, min_length=1)] | None = Field(
        default=None,
        description="The host names and addresses, without ports, that requests may name; the two probes accept any."
        " Left out: the host of `address`, `localhost`, `127.0.0.1` and `[::1]`.",
        examples=[["vod.example"]],
    )

    @field_validator("address")
    @classmethod
    def _is_address(cls, value: str | None) -> str | None:
        if value is None:
            return None
        if problem := problem_in_address(value, "127.0.0.1:9464 or [::1]:9464"):
            raise ValueError(problem)
        if missing := missing_modules(LISTENER_MODULES):
            raise ValueError(
                f"needs packages that are not installed: {quoted_all(missing)} (pip install 'vodpoller[listener]')"
            )
        return value

    @field_validator("password_file")
    @classmethod
    def _is_long_enough(cls, value: Secret | None) -> Secret | None:
        if value is not None and (problem := value.restrict(_problem_in_password)):
            raise ValueError(f"{value.path} {problem}")
        return value

    @field_validator("hosts")
    @classmethod
    def _are_hosts(cls, value: tuple[str, ...] | None) -> tuple[str, ...] | None:
        for host in value or ():
            if not _HOST.fullmatch(host):
                raise ValueError(f'{quoted(host)} is not a host without a port (for example "vod.example" or "[::1]")')
        return value

    @classmethod
    def secret_file_keys(cls) -> Iterator[str]:
        """The field that names a file with a secret."""
        return iter(("password_file",))

    @property
    def is_exposed(self) -> bool:
        """Whether other machines can reach it although no password is set and `unauthenticated` is false."""
        is_open = self.password_file is None and not self.unauthenticated
        return self.address is not None and is_open and not is_loopback(host_of(self.address))

    @property
    def is_wildcard(self) -> bool:
        """Whether it listens at every address of this machine."""
        return self.address is not None and _is_unspecified(host_of(self.address))

    def known_hosts(self) -> frozenset[str]:
        """The hosts that requests may name, as a browser writes them, in lower case."""
        own = host_of(self.address or "")
        default = (f"[{own}]" if ":" in own else own, "localhost", "127.0.0.1", "[::1]")
        return frozenset(host.lower() for host in self.hosts or default)


TABLES: Final[Mapping[str, type[BaseModel]]] = {
    "api": Api,
    "credentials": CredentialsTable,
    "sources": Source,
    "routes": Route,
    "sinks": SinkConfig,
    "journal": Journal,
    "log": Log,
    "daemon": Daemon,
    "listener": Listener,
}


def host_of(address: str) -> str:
    """The host of an address with a port; of IPv6, without square brackets."""
    return urlsplit(f"//{address}").hostname or ""


def port_of(address: str) -> int:
    """The port of an address with a port."""
    return urlsplit(f"//{address}").port or 0


def problem_in_address(address: str, example: str) -> str:
    """What is wrong with an address that must have a host and a port; empty if nothing is wrong.

    Args:
        address: The address, as in the configuration.
        example: A correct address, for the message.
    """
    try:
        parts = urlsplit(f"//{address}")
        host, port = parts.hostname, parts.port
    except ValueError:
        host, port = None, None
    if host and port and parts.netloc == address and "@" not in address and not address.endswith(":"):
        return ""
    return f"is not an address with a port from 1 to 65535 (for example {example})"


def _is_unspecified(host: str) -> bool:
    try:
        return ip_address(host).is_unspecified
    except ValueError:
        return False


def _problem_in_password(password: str) -> str:
    if len(password) >= _PASSWORD_MIN_CHARACTERS:
        return ""
    return f"has a first line of less than {_PASSWORD_MIN_CHARACTERS} characters (write a longer password)"


def _has_open_bracket(glob: str) -> bool:
    """Whether a "[" has no "]", so that fnmatch takes it for the character itself."""
    at = 0
    while (at := glob.find("[", at)) >= 0:
        # A "]" directly after "[" or "[!" is one of the characters.
        start = at + 2 if glob[at + 1 : at + 2] == "!" else at + 1
        end = glob.find("]", start + 1)
        if end < 0:
            return True
        at = end
    return False
