"""Trusted root certificates: from a CA file of the configuration, from the environment, or those of the public CAs."""

import os
import ssl
import threading
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Final

from pydantic import AfterValidator, Field

_DAY_SECS: Final = 86_400
_NO_PEM: Final = "NO_CERTIFICATE_OR_CRL_FOUND"
_PEM_HELP: Final = (
    "it must hold certificates in PEM, each between BEGIN CERTIFICATE and END CERTIFICATE;"
    " `openssl x509 -inform der -in FILE` converts DER to PEM"
)


class RootsError(OSError):
    """The root certificates cannot be read, so no https call can be made; the text gives the reason."""


class Roots:
    """The root certificates of one client, read when they are first needed.

    The first of these that is set replaces all others (the order of curl and OpenSSL): the configured file;
    `$SSL_CERT_FILE` and `$SSL_CERT_DIR` (both are used if both are set); `$REQUESTS_CA_BUNDLE` or `$CURL_CA_BUNDLE` (a
    file or a folder); the public CAs of certifi.

    Args:
        ca_file: The configured file; None if there is none.
        env: The environment; None: `os.environ`.
    """

    def __init__(self, ca_file: Path | None = None, *, env: Mapping[str, str] | None = None) -> None:
        self._ca_file = ca_file
        self._env = dict(os.environ if env is None else env)
        self._lock = threading.Lock()
        self._context: ssl.SSLContext | None = None

    def context(self) -> ssl.SSLContext:
        """The TLS context of the client; the same object until `reread`.

        Raises:
            RootsError: A file cannot be used.
        """
        with self._lock:
            if self._context is None:
                self._context = self._read()
            return self._context

    def reread(self) -> None:
        """Read the files again, if they have been read before. If that fails, the previous certificates stay in use.

        Raises:
            RootsError: A file cannot be used.
        """
        with self._lock:
            if self._context is not None:
                self._context = self._read()

    def _read(self) -> ssl.SSLContext:
        from urllib3.util.ssl_ import create_urllib3_context  # noqa: PLC0415 - `vodpoller check` can do without it

        context: ssl.SSLContext = create_urllib3_context()
        if self._ca_file is not None:
            _load_file(context, str(self._ca_file), "")
            return context
        file, folder = self._env.get("SSL_CERT_FILE"), self._env.get("SSL_CERT_DIR")
        if file or folder:
            if file:
                _load_file(context, file, "$SSL_CERT_FILE is ")
            if folder:
                _load_folders(context, folder, "$SSL_CERT_DIR is ")
            return context
        for name in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"):
            if bundle := self._env.get(name):
                load = _load_folders if os.path.isdir(bundle) else _load_file  # noqa: PTH112 - it may hold any text
                load(context, bundle, f"${name} is ")
                return context
        from requests.utils import DEFAULT_CA_BUNDLE_PATH  # noqa: PLC0415 - as above

        _load_file(context, DEFAULT_CA_BUNDLE_PATH, "the list of public CAs is ")
        return context


def days_until(ends_at: float, now: float) -> int:
    """The number of whole days from `now` to `ends_at`, both in seconds since 1970; negative if the end has passed."""
    return int((ends_at - now) // _DAY_SECS)


def validity(ends_at: float, now: float) -> str:
    """Part of a sentence: the date until which a certificate is valid. Both times are in seconds since 1970."""
    days = days_until(ends_at, now)
    return f"valid until {datetime.fromtimestamp(ends_at, UTC).date()} ({days} day{'' if days == 1 else 's'})"


def _load_file(context: ssl.SSLContext, path: str, prefix: str) -> None:
    """Add a file's certificates.

    Args:
        context: The TLS context to which they are added.
        path: The path of the file.
        prefix: The beginning of the error message, before the path.

    Raises:
        RootsError: The file cannot be read, or holds no valid certificate.
    """
    try:
        with open(path, "rb") as file:  # noqa: PTH123 - OpenSSL's errors do not contain why a file cannot be read
            file.read(1)
        context.load_verify_locations(cafile=path)
    except FileNotFoundError:
        raise RootsError(f"{prefix}{path}, which does not exist") from None
    except ssl.SSLError as error:
        why = "holds no certificate" if error.reason == _NO_PEM else "holds a certificate that cannot be read"
        raise RootsError(f"{prefix}{path}, which {why} ({_PEM_HELP})") from None
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise RootsError(f"{prefix}{path}, which cannot be read: {why}") from None
    if not context.cert_store_stats()["x509"]:
        raise RootsError(f"{prefix}{path}, which holds no certificate ({_PEM_HELP})")


def _load_folders(context: ssl.SSLContext, paths: str, prefix: str) -> None:
    """Add folders with one certificate per file, whose names are those that `openssl rehash` makes.

    Args:
        context: The TLS context to which the certificates are added.
        paths: The paths of the folders, separated by colons.
        prefix: The beginning of the error message, before the paths.

    Raises:
        RootsError: None of them is a folder.
    """
    if not any(os.path.isdir(path) for path in paths.split(os.pathsep)):  # noqa: PTH112 - they may hold any text
        raise RootsError(f"{prefix}{paths}, which does not exist or is not a folder")
    context.load_verify_locations(capath=paths)


def _checked(value: Path) -> Path:
    try:
        _load_file(ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), str(value), "is ")
    except RootsError as error:
        raise ValueError(str(error)) from None
    return value


CaFile = Annotated[Path, Field(strict=False), AfterValidator(_checked)]
"""The configuration key `ca_file`: its validation reads the certificates in the file."""
