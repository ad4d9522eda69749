"""The result of reading a configuration: frozen, valid by itself and in its cross references."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

from vodpoller.config.callbacks import CallbackSource
from vodpoller.config.tables import AnySource, Api, Daemon, Journal, Listener, Log, Route, Source
from vodpoller.logs import SEARCHED_MIN_CHARACTERS
from vodpoller.secret import Secret
from vodpoller.sinks.contract import Sink, SinkConfig
from vodpoller.vod.credentials import IssuedKeys, Role, StaticCredentials

EARLIER_MAX: Final = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class Routing:
    """The part of a configuration that says where events go.

    Args:
        sources: At least one.
        routes: At least one; they name existing sources and sinks only.
    """

    sources: tuple[AnySource, ...]
    routes: tuple[Route, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """The whole configuration, valid by itself and in its cross references.

    Two are equal if they say the same. What the files hold that they name, and the warnings, do not matter.

    Args:
        api: As in the file, as are `journal`, `log`, `daemon`, `listener`.
        credentials: The API key that is given; an empty one if `role`
            needs none, or if nothing uses it and there is none.
        role: Whose temporary keys are used in its place; None if it is used itself.
        issued: These keys.
        earlier: What configurations before this one hid, which may still appear somewhere.
        sources: At least one.
        routes: At least one; they name existing sources and sinks only.
        sinks: The configuration of each sink by its name; each is of its class's own `Config`.
        sink_classes: The class of each sink by its name; called with the name and the configuration it gives the sink.
        coverage: By the name of each source, whether the routes take every event of it. If not, it has `unrouted`.
        key_renewal: What the operator does after the API key was replaced at its place, in words for a person:
            "send SIGHUP".
        warnings: What can be used but is probably a mistake, one line each: `key: the problem (what would be right)`.
    """

    api: Api
    credentials: StaticCredentials
    sources: tuple[AnySource, ...]
    routes: tuple[Route, ...]
    sinks: Mapping[str, SinkConfig]
    sink_classes: Mapping[str, type[Sink[Any]]]
    journal: Journal
    log: Log
    daemon: Daemon
    listener: Listener
    coverage: Mapping[str, bool]
    key_renewal: str = "send SIGHUP"
    role: Role | None = None
    issued: IssuedKeys = field(default_factory=IssuedKeys, compare=False)
    earlier: tuple[str, ...] = field(default=(), compare=False, repr=False)
    warnings: tuple[str, ...] = field(default=(), compare=False)

    @property
    def pulled(self) -> tuple[Source, ...]:
        """The sources that pull."""
        return tuple(source for source in self.sources if isinstance(source, Source))

    @property
    def callbacks(self) -> tuple[CallbackSource, ...]:
        """The sources that receive callbacks."""
        return tuple(source for source in self.sources if isinstance(source, CallbackSource))

    @property
    def callback_addresses(self) -> tuple[str, ...]:
        """The addresses at which callbacks come in, each once."""
        return tuple(dict.fromkeys(source.listen for source in self.callbacks))

    def all_warnings(self) -> list[str]:
        """`warnings`, and one for each secret that is too short to be hidden in log lines."""
        own = self.credentials
        of_api = (("secret_id", own.secret_id), ("secret_key", own.secret_key), ("token", own.token))
        found = [(f"credentials.{key}", secret) for key, secret in of_api if secret is not None]
        for source in self.callbacks:
            found += [(f"sources.{source.name}.{key}", secret) for key, secret in source.named_secrets()]
        for name, sink in self.sinks.items():
            found += [(f"sinks.{name}.{key}", secret) for key, secret in sink.named_secrets()]
        short = [key for key, secret in found if 0 < len(secret.get()) < SEARCHED_MIN_CHARACTERS]
        why = "it is so short that it is not looked for in log lines (use a secret of 8 characters or more)"
        return [*self.warnings, *(f"{key}: {why}" for key in short)]

    def secrets(self) -> tuple[Secret, ...]:
        """All secrets: they must not be shown, and SIGHUP reads them again."""
        of_sinks = (secret for sink in self.sinks.values() for secret in sink.secrets())
        of_sources = (secret for source in self.callbacks for secret in source.secrets())
        return (*self.credentials.secrets(), *of_sources, *of_sinks, *self.listener.secrets())

    def hidden(self) -> list[str]:
        """What must be in no line and no answer: the secrets' values, and the last ones before these."""
        own = [value for secret in self.secrets() for value in secret.known()]
        return [*own, *self.issued.known(), *self.earlier]

    def keeping(self, former: "Config") -> "Config":
        """The same, with what a configuration that ran so far leaves: its temporary keys if the role is the same.

        Args:
            former: That one.
        """
        is_same = (self.role, self.credentials) == (former.role, former.credentials)
        hidden = dict.fromkeys(former.hidden())
        return replace(self, issued=former.issued if is_same else self.issued, earlier=tuple(hidden)[:EARLIER_MAX])
