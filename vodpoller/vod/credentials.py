"""The API key: what a request is signed with, and where that comes from.

A provider is a callable that returns the `Credentials` of this moment. It is called for each request, so it must not
block: id, key and token are one value, which is renewed elsewhere and swapped as one.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from vodpoller.secret import Secret


@dataclass(frozen=True, slots=True)
class Credentials:
    """What identifies an account, as of one moment.

    Args:
        secret_id: Names the key; not secret.
        secret_key: Signs; never sent.
        token: Goes with a temporary key; empty for a permanent one.
    """

    secret_id: str
    secret_key: str = field(repr=False)
    token: str = field(default="", repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class StaticCredentials:
    """The provider of a key that the configuration, a file or the environment holds.

    Args:
        secret_id: Tencent's SecretId.
        secret_key: Its SecretKey.
        token: Of a temporary key, None for a lasting one.
        origins: Where each of them was found, for a person, by its name.
    """

    secret_id: Secret
    secret_key: Secret
    token: Secret | None
    origins: Mapping[str, str] = field(default_factory=dict)

    def __call__(self) -> Credentials:
        """What the secrets were when they were last read."""
        return Credentials(
            secret_id=self.secret_id.get(),
            secret_key=self.secret_key.get(),
            token=self.token.get() if self.token else "",
        )

    def secrets(self) -> tuple[Secret, ...]:
        """Those that there are: what must not be shown, and what is read again."""
        return tuple(secret for secret in (self.secret_id, self.secret_key, self.token) if secret is not None)
