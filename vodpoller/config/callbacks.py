"""The keys of `[[sources]]` with `type = "callback"`, and the type of their lists of networks."""

from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network
from typing import Annotated, Any, Final

from pydantic import BeforeValidator, Field, field_validator

from vodpoller.config.tables import AnySource, host_of, problem_in_address
from vodpoller.config.wording import missing_modules, quoted, quoted_all
from vodpoller.secret import HasSecrets, Secret

CALLBACK_MODULES: Final = ("h11",)
_EXAMPLE: Final = "0.0.0.0:8088 or [::]:8088"

Network = IPv4Network | IPv6Network


def _networks(value: Any) -> Any:
    if not isinstance(value, list | tuple) or not all(isinstance(item, str) for item in value):
        return value
    return tuple(map(_network, value))


def _network(text: str) -> Network:
    try:
        return ip_network(text)
    except ValueError as error:
        raise ValueError(
            f'{quoted(text)} is not an address or a network: {error} (for example "10.0.0.0/8" or "192.0.2.7")'
        ) from None


Networks = Annotated[
    tuple[Network, ...],
    BeforeValidator(_networks, json_schema_input_type=list[str]),
    Field(strict=False, min_length=1),
]


class CallbackSource(AnySource, HasSecrets):
    """`[[sources]]` with `type = "callback"`: normal callbacks, which VOD sends here."""

    listen: str = Field(
        description="The IP address and port to listen on; `0.0.0.0` is every IPv4 address, `[::]` every IPv6 address."
        " Sources may share it, each with its own `path`.",
        examples=["127.0.0.1:8088"],
    )
    path: str = Field(
        description="The path of the callback URL that is set at VOD; a query after it is ignored.",
        examples=["/vod/callback"],
    )
    sign_key: Secret | None = Field(
        default=None,
        description="The key that is set at VOD for callbacks. With it, a callback that is not signed is refused.",
    )
    sign_key_file: str | None = Field(
        default=None, description="The file that contains this key, instead of `sign_key`.", examples=["sign_key"]
    )
    allow_from: Networks | None = Field(
        default=None,
        description="The networks that callbacks may come from. Left out: all.",
        examples=[["127.0.0.1"]],
    )
    forwarded_from: Networks | None = Field(
        default=None,
        description="The proxies whose header `X-Forwarded-For` names the origin of a callback.",
        examples=[["127.0.0.1"]],
    )
    max_events_in_flight: Annotated[int, Field(ge=1, le=1024)] = Field(
        default=256,
        description="The maximum number of events that are delivered at the same time. An event beyond it is stored in"
        " the journal without an attempt, and answered.",
    )
    max_connections: Annotated[int, Field(ge=1, le=4096)] = Field(
        default=1024,
        description="The maximum number of connections. Others wait until one has ended. If sources share `listen`, the"
        " largest value applies.",
    )

    @field_validator("listen")
    @classmethod
    def _is_address(cls, value: str) -> str:
        problem = problem_in_address(value, _EXAMPLE)
        if not problem and not _is_ip_address(host_of(value)):
            problem = f"has a name instead of an IP address (for example {_EXAMPLE})"
        if not problem and (missing := missing_modules(CALLBACK_MODULES)):
            problem = (
                f"needs packages that are not installed: {quoted_all(missing)} (pip install 'vodpoller[callback]')"
            )
        if problem:
            raise ValueError(problem)
        return value

    @field_validator("path")
    @classmethod
    def _is_path(cls, value: str) -> str:
        if not value.startswith("/") or not value.isascii() or not value.isprintable() or set(value) & set(' ?#"<>'):
            raise ValueError(
                "is not the path of a URL, which begins with / and has no ?, # or blank (for example /vod/callback)"
            )
        return value

    @field_validator("on_failure", "unrouted")
    @classmethod
    def _is_not_left(cls, value: str | None) -> str | None:
        if value == "leave":
            raise ValueError(
                '"leave" would lose events: VOD sends a normal callback three times within seconds, and never again'
                ' (for on_failure: "store"; for unrouted: "dead_letter" or "confirm")'
            )
        return value


def _is_ip_address(host: str) -> bool:
    try:
        ip_address(host)
    except ValueError:
        return False
    return True
