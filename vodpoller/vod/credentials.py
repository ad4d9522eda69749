"""The API key: what a request is signed with, and where that comes from.

A provider is a callable that returns the `Credentials` of this moment. It is called for each request, so it must not
block: id, key and token are one value, which is renewed elsewhere (`refresher`) and swapped as one.
"""

import errno
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from vodpoller.secret import FORMER_MAX, Secret

REREADINGS_MAX: Final = 10


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


@dataclass(slots=True, kw_only=True)
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
    _current: Credentials = field(init=False, repr=False, compare=False)
    _rereading: threading.Lock = field(init=False, repr=False, compare=False, default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self._swap([secret.get() for secret in self.secrets()])

    def __call__(self) -> Credentials:
        """What the secrets were when they were last read."""
        return self._current

    def secrets(self) -> tuple[Secret, ...]:
        """Those that there are: what must not be shown, and what is read again."""
        return tuple(secret for secret in (self.secret_id, self.secret_key, self.token) if secret is not None)

    def reread(self) -> None:
        """Read the files again, as one: all of them are taken, or none.

        Several files may be swapped between the reading of one and of the next, as Kubernetes does with the symbolic
        link of their folder. So they are read until they hold the same twice in a row.

        Raises:
            OSError: One cannot be read, is empty, holds what no key has, or they go on changing.
            UnicodeDecodeError: One is not UTF-8.
        """
        with self._rereading:
            before: list[str] = []
            for _ in range(REREADINGS_MAX):
                values = [secret.read() for secret in self.secrets()]
                if values == before:
                    self._swap(values)
                    return
                before = values
        raise OSError(errno.EAGAIN, "the files of the API key go on changing while they are read")

    def _swap(self, values: Sequence[str]) -> None:
        for secret, value in zip(self.secrets(), values, strict=True):
            secret.take(value)  # first of all: from now on it is hidden in log lines
        self._current = Credentials(*values)


@dataclass(frozen=True, slots=True, kw_only=True)
class CvmRole:
    """The role that is bound to this machine, a CVM: its metadata service hands out temporary keys.

    Args:
        role: Its name; empty if the metadata service is asked for it.
        metadata_endpoint: URL of the metadata service, without a path.
    """

    role: str
    metadata_endpoint: str

    def __str__(self) -> str:
        name = f"role {self.role}" if self.role else "the role"
        return f"{name} of this machine, from {self.metadata_endpoint}"


@dataclass(frozen=True, slots=True, kw_only=True)
class AssumedRole:
    """A role that a lasting key may assume: STS hands out temporary keys.

    Args:
        role_arn: `qcs::cam::uin/ACCOUNT:roleName/NAME`.
        role_session_name: What the account's audit shows.
        duration_secs: The life of a temporary key.
        external_id: What the role's trust may ask for; empty for none.
        sts_endpoint: URL of STS, without a path.
        sts_region: `X-TC-Region` of its requests.
    """

    role_arn: str
    role_session_name: str
    duration_secs: int
    external_id: str
    sts_endpoint: str
    sts_region: str

    def __str__(self) -> str:
        return f"role {self.role_arn}, from {self.sts_endpoint}"


Role = CvmRole | AssumedRole


@dataclass(frozen=True, slots=True, kw_only=True)
class IssuedKey:
    """A temporary key, as it was handed out.

    Args:
        credentials: The key.
        role: Of what it is, for a person.
        life_secs: For how long it is good, by the clock of its issuer. More than 0.
        ends_at: Monotonic time of its end.
    """

    credentials: Credentials
    role: str
    life_secs: float
    ends_at: float


class IssuedKeys:
    """The temporary keys of a role: the one in use, and the last ones before it, which must not be shown either.

    They belong to the process: a reload that keeps the role keeps them. The thread that renews is the only writer.

    Attributes:
        in_use: The last one; None if none was handed out yet.
    """

    def __init__(self) -> None:
        self._known: tuple[Credentials, ...] = ()
        self.in_use: IssuedKey | None = None

    def take(self, key: IssuedKey) -> None:
        """Use another key from now on."""
        if key.credentials not in self._known:
            self._known = (key.credentials, *self._known[:FORMER_MAX])  # hidden before it is used
        self.in_use = key

    def known(self) -> list[str]:
        """All that must not be shown."""
        return [text for key in self._known for text in (key.secret_id, key.secret_key, key.token)]
