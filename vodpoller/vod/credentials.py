"""The API key with which requests are signed, and its providers.

A provider is a callable that returns the current `Credentials`. It is called for each request, so it must not block:
id, key and token are one value, which `refresher` renews in another thread and replaces as one.
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
    """The API key of an account at one moment.

    Args:
        secret_id: Identifies the key; not secret.
        secret_key: Signs requests; never sent.
        token: The token of a temporary key; empty for a permanent key.
    """

    secret_id: str
    secret_key: str = field(repr=False)
    token: str = field(default="", repr=False)


@dataclass(slots=True, kw_only=True)
class StaticCredentials:
    """The provider of a key from the configuration, from files or from the environment.

    Args:
        secret_id: Tencent's SecretId.
        secret_key: The SecretKey that belongs to it.
        token: The token of a temporary key; None for a permanent key.
        origins: For messages: the place where each of them was found, by its name.
    """

    secret_id: Secret
    secret_key: Secret
    token: Secret | None
    origins: Mapping[str, str] = field(default_factory=dict)
    _current: Credentials = field(init=False, repr=False, compare=False)
    _reread_lock: threading.Lock = field(init=False, repr=False, compare=False, default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self._swap([secret.get() for secret in self.secrets()])

    def __call__(self) -> Credentials:
        """The key as it was last read."""
        return self._current

    def secrets(self) -> tuple[Secret, ...]:
        """The secrets that are set. They must not be shown, and `reread` reads them again."""
        return tuple(secret for secret in (self.secret_id, self.secret_key, self.token) if secret is not None)

    def reread(self) -> None:
        """Read the files again. Either all new values are used, or none.

        The files may be replaced between the reading of one and the next, as Kubernetes does with the symbolic link of
        their folder. So all are read until two readings in a row give the same values.

        Raises:
            OSError: A file cannot be read, is empty or holds characters that no key has, or the files keep changing.
            UnicodeDecodeError: A file is not UTF-8.
        """
        with self._reread_lock:
            before: list[str] = []
            for _ in range(REREADINGS_MAX):
                values = [secret.read() for secret in self.secrets()]
                if values == before:
                    self._swap(values)
                    return
                before = values
        raise OSError(errno.EAGAIN, "the files of the API key keep changing while they are read")

    def _swap(self, values: Sequence[str]) -> None:
        for secret, value in zip(self.secrets(), values, strict=True):
            secret.take(value)  # before it is used: from now on log lines hide it
        self._current = Credentials(*values)


@dataclass(frozen=True, slots=True, kw_only=True)
class CvmRole:
    """The role that is bound to this machine, a CVM. The metadata service issues its temporary keys.

    Args:
        role: The role's name; empty: the metadata service is asked for it.
        metadata_endpoint: URL of the metadata service, without a path.
    """

    role: str
    metadata_endpoint: str

    def __str__(self) -> str:
        name = f"role {self.role}" if self.role else "the role"
        return f"{name} of this machine, from {self.metadata_endpoint}"


@dataclass(frozen=True, slots=True, kw_only=True)
class AssumedRole:
    """A role that a permanent key may assume. STS issues its temporary keys.

    Args:
        role_arn: `qcs::cam::uin/ACCOUNT:roleName/NAME`.
        role_session_name: The name of the session in the account's audit log.
        duration_secs: The lifetime of a temporary key.
        external_id: The external id that the role's trust policy may require; empty for none.
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
    """A temporary key that was issued.

    Args:
        credentials: The key.
        role: The role that it belongs to, for messages.
        life_secs: The time for which it is valid, by the clock of its issuer. More than 0.
        ends_at: Monotonic time of its end.
    """

    credentials: Credentials
    role: str
    life_secs: float
    ends_at: float


class IssuedKeys:
    """The temporary keys of a role: the one in use, and the last ones before it, which must not be shown either.

    They belong to the process: a reload that keeps the role keeps them. Only the thread that renews keys writes here.

    Attributes:
        in_use: The last key that was issued; None if there is none yet.
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
        """All texts that must not be shown."""
        return [text for key in self._known for text in (key.secret_id, key.secret_key, key.token)]
