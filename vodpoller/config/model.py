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

    Two configurations are equal if they have the same settings. The content of the files that they name, and the
    warnings, are not compared.

    Args:
        api: As in the file, as are `journal`, `log`, `daemon`, `listener`.
        credentials: The given API key; an empty one if `role` needs none, or if no key is given and nothing uses one.
        role: The role whose temporary keys are used instead; None if `credentials` itself signs requests.
        issued: The temporary keys of the role.
        earlier: Secrets of earlier configurations. They may still appear in a text, and must stay hidden.
        sources: At least one.
        routes: At least one; they name existing sources and sinks only.
        sinks: The configuration of each sink by its name: an instance of `Config` of the class of the sink.
        sink_classes: The class of each sink by its name; called with name and configuration, it returns the sink.
        coverage: For each source, by its name: whether the routes take all its events. If not, it has `unrouted`.
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
        """The addresses at which callbacks are received, without repetitions."""
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
        why = "it is too short to be found and hidden in log lines (use a secret of 8 characters or more)"
        return [*self.warnings, *(f"{key}: {why}" for key in short)]

    def secrets(self) -> tuple[Secret, ...]:
        """All secrets: they must not be shown, and SIGHUP reads them again."""
        of_sinks = (secret for sink in self.sinks.values() for secret in sink.secrets())
        of_sources = (secret for source in self.callbacks for secret in source.secrets())
        return (*self.credentials.secrets(), *of_sources, *of_sinks, *self.listener.secrets())

    def hidden(self) -> list[str]:
        """The texts that must not appear in a log line or an answer: present and former values of the secrets."""
        own = [value for secret in self.secrets() for value in secret.known()]
        return [*own, *self.issued.known(), *self.earlier]

    def keeping(self, former: "Config") -> "Config":
        """A copy with what must survive a reload: temporary keys, if the role is the same, and texts to hide.

        Args:
            former: The configuration that was in use until now.
        """
        is_same = (self.role, self.credentials) == (former.role, former.credentials)
        hidden = dict.fromkeys(former.hidden())
        return replace(self, issued=former.issued if is_same else self.issued, earlier=tuple(hidden)[:EARLIER_MAX])
