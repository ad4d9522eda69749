"""The images of snapshot events as files.

What an event says is not trusted: neither the hosts that it names, nor where those redirect to or what they resolve to,
nor the sizes that they announce, nor the ids from which file names are made.
"""

import errno
import fcntl
import hashlib
import ipaddress
import logging
import os
import re
import secrets
import stat
import string
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from http import HTTPStatus
from pathlib import Path
from typing import Annotated, Any, Final, Literal
from urllib.parse import unquote, urljoin, urlsplit

import requests
from pydantic import Field, field_validator

from vodpoller import __version__
from vodpoller.durable import HINTS, Folders, may_pass, why
from vodpoller.errors import ConfigError, RejectedError, TransientError
from vodpoller.events import Event, Snapshot, SnapshotsTaken, snapshots_of
from vodpoller.httpclient.address import environment_of, shown_url
from vodpoller.httpclient.transport import CALL_ERRORS, DeadlineAdapter
from vodpoller.httpclient.trust import CaFile, RootsError
from vodpoller.httpclient.words import ForbiddenAddressError, causes, failure_text, retry_after_secs, status_text
from vodpoller.logs import Repeats, SinkLog
from vodpoller.sinks.contract import Sink, SinkConfig

_logger = logging.getLogger(__name__)

_REDIRECTS: Final = 3
_GONE: Final = frozenset({HTTPStatus.NOT_FOUND, HTTPStatus.GONE})
_CHUNK_BYTES: Final = 1 << 16
_SHOWN_CHARACTERS: Final = 200
_SHOWN_FAILURES: Final = 3
_REMEMBERED: Final = 1000
_NAT64: Final = ipaddress.IPv6Network("64:ff9b::/96")  # RFC 6052

# The fields of `path`, and how long their values get at most: what is longer is replaced.
_FIELDS: Final = {
    "file_id": 100,
    "task_id": 100,
    "time_offset_ms": 20,
    "definition": 20,
    "index": 10,
    "ext": 5,
    "key": 64,
}
_OF_EVENT: Final = ("file_id", "task_id", "key")
_OF_IMAGE: Final = ("time_offset_ms", "index")
_NAME_MAX_BYTES: Final = 255
_PLAIN: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_REPLACED_CHARACTERS: Final = 16

_EXTENSIONS: Final = {
    "image/avif": "avif",
    "image/bmp": "bmp",
    "image/gif": "gif",
    "image/heic": "heic",
    "image/jpeg": "jpg",
    "image/png": "png",
    "image/tiff": "tiff",
    "image/webp": "webp",
}
_KNOWN_EXTENSIONS: Final = frozenset({*_EXTENSIONS.values(), "jpeg", "tif"})
_OTHER_EXTENSION: Final = "bin"
_PAGES: Final = frozenset({"text/html", "application/xhtml+xml"})

_TEMPORARY: Final = re.compile(r"\.vodpoller-[0-9a-f]{16}\.part")

# Below the root, links are not followed.
_HINTS: Final = {**HINTS, errno.ENOTDIR: "a part of the path is a file or a symbolic link, which is not followed"}

# An image's file says of which event it is, if its file system can hold that (xattr(7)).
_OWNER: Final = "user.vodpoller.key"


class DownloadConfig(SinkConfig):
    """A folder of images."""

    type: Literal["download"] = Field(description="The images of a snapshot event are fetched and saved as files.")
    path: Annotated[str, Field(min_length=1, max_length=2048)] = Field(
        description="Where an image goes. Fields: {file_id}, {task_id}, {key} (at least one of them), {time_offset_ms},"
        " {index} (at least one), {definition}, {ext}. An image whose file exists is not fetched, even if the file is"
        " another event's: with {definition} and {task_id}, each has a file of its own. Nothing is written outside the"
        " folder before the first field.",
        examples=["/srv/snapshots/{file_id}/{definition}-{time_offset_ms}-{task_id}.{ext}"],
    )
    hosts: Annotated[tuple[str, ...], Field(strict=False, min_length=1)] = Field(
        description="The hosts that images are fetched from, redirects included, as globs.",
        examples=[["*.vod2.myqcloud.com"]],
    )
    allow_private: bool = Field(
        default=False,
        description="Whether these hosts may have addresses that are not public. Where the environment names a proxy,"
        " it is the proxy that connects, and addresses are not looked at.",
    )
    max_bytes: Annotated[int, Field(ge=1, le=1 << 34)] = Field(
        default=20 << 20, description="How long an image may be; an event with a longer one is rejected."
    )
    ca_file: CaFile | None = Field(
        default=None,
        description="PEM with the certificates that vouch for these hosts', in place of the public CAs'. Left out:"
        " $SSL_CERT_FILE and $SSL_CERT_DIR, then $REQUESTS_CA_BUNDLE, then the public CAs. Read again at SIGHUP.",
        examples=["/etc/vodpoller/ca.pem"],
    )
    timeout_secs: Annotated[float, Field(ge=0.1, le=300)] = Field(
        default=60.0, description="How long fetching may take for all images of an event together."
    )
    concurrency: Annotated[int, Field(ge=1, le=64)] = Field(
        default=4, description="For how many events at once images are fetched."
    )

    @field_validator("path")
    @classmethod
    def _names_each_image(cls, value: str) -> str:
        _Places(value)
        return value

    @field_validator("hosts")
    @classmethod
    def _are_hosts(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for host in value:
            if not re.fullmatch(r"[!-.0-9;-~]+|\[?[0-9A-Fa-f:.*?]+\]?", host):
                raise ValueError(f"{host!r} is not the name of a host (such as *.vod2.myqcloud.com, without https://)")
        return tuple(host.lower().strip("[]") if ":" in host else host.lower() for host in value)


class _Places:
    """Where images go: one path for each.

    Args:
        template: The path, with fields.

    Raises:
        ValueError: Says what is wrong with it.
    """

    def __init__(self, template: str) -> None:
        self._template = template
        if "\0" in template:
            raise ValueError("a path cannot hold a NUL character (leave it out)")
        try:
            pieces = list(string.Formatter().parse(template))
        except ValueError:
            raise ValueError("its braces do not match (write {{ and }} for braces themselves)") from None
        self.fields = {name for _, name, _, _ in pieces if name is not None}
        there_are = ", ".join(f"{{{name}}}" for name in _FIELDS)
        for _, name, spec, conversion in pieces:
            if name is not None and (name not in _FIELDS or spec or conversion):
                raise ValueError(f"there is no field {{{name}}} (there are: {there_are})")
        for wanted, what in ((_OF_EVENT, "events"), (_OF_IMAGE, "images of an event")):
            if self.fields.isdisjoint(wanted):
                fields = " or ".join(f"{{{name}}}" for name in wanted)
                raise ValueError(f"all {what} would go to the same file (it needs {fields}; there are: {there_are})")
        self._folder, slash, _ = pieces[0][0].rpartition("/")
        if not self._folder or not slash:
            raise ValueError(
                "it needs a folder before the first field (such as /srv/snapshots/{file_id}-{index}.{ext})"
            )
        longest = self.below_root({name: "x" * most for name, most in _FIELDS.items()})
        if any(part in ("", ".", "..") for part in longest):
            raise ValueError("behind the first field, no part of it may be empty, . or .. (leave it out)")
        if any(len(os.fsencode(part)) > _NAME_MAX_BYTES for part in longest):
            raise ValueError(f"a name in it can get longer than {_NAME_MAX_BYTES} bytes (put a / between the fields)")

    @property
    def root(self) -> Path:
        """The folder that nothing leaves."""
        return Path(os.path.realpath(self._folder))

    def below_root(self, values: Mapping[str, object]) -> list[str]:
        """The folders below the root, and the name.

        Args:
            values: For all fields.
        """
        return self._template.format(**values)[len(self._folder) + 1 :].split("/")


class DownloadSink(Sink):
    """Saves the images of snapshot events.

    An event is accepted when each image that VOD could take is a file, synced. A file appears under its name only when
    it is whole, so one that exists is not fetched again; if it is another event's, that is logged. One image that fails
    does not keep the others from being saved. Images that VOD could not take, and events without images, are logged and
    accepted.

    Neither cookies nor credentials are sent. A name is looked up once for each connection, and it is the address that
    is connected to which must be public.

    Args:
        name: Of the sink.
        config: Its settings.
        resolve: In place of `socket.getaddrinfo`.
        write: In place of `os.write`.
        wall: Unix time, in seconds.
        monotonic: The clock of the time limit, in seconds.

    Raises:
        ConfigError: The folder cannot be made or written, or what the environment says of proxies or certificates
            cannot be used.
        TransientError: The disk is full or failing.
    """

    Config = DownloadConfig

    def __init__(
        self,
        name: str,
        config: DownloadConfig,
        *,
        resolve: Callable[..., list[Any]] | None = None,
        write: Callable[[int, memoryview], int] = os.write,
        wall: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self.concurrency = config.concurrency
        self.batch_events = 1
        self.timeout_secs = config.timeout_secs
        self._name = name
        self._config = config
        self._write = write
        self._wall = wall
        self._monotonic = monotonic
        self._places = _Places(config.path)
        self._root = self._places.root
        self._closed = False
        self._log = SinkLog(__name__)
        self._repeats = Repeats(self._log)
        self._folders = Folders(lambda text: self._log.warning("config.warning", message=f"sinks.{name}.path: {text}"))
        # Held while a file gets its name: of two events with the same name for their images, one is the first.
        self._naming = threading.Lock()
        self._owners: dict[tuple[str, ...], str] = {}
        self._tidied: set[tuple[str, ...]] = set()
        self._unfit_types: set[str] = set()
        problem = environment_of("https://localhost/").problem
        if problem:
            raise ConfigError([f"sinks.{name}.hosts: {problem}"])
        self._adapter = DeadlineAdapter(
            connections=config.concurrency,
            ca_file=config.ca_file,
            resolve=resolve,
            permits=lambda address: config.allow_private or is_public(address),
            monotonic=monotonic,
        )
        try:
            self._adapter.check_roots()
        except RootsError as error:
            raise ConfigError([f"sinks.{name}.hosts: {error}"]) from None
        try:
            self._folders.make(self._root)
            _allow_writing(self._root)
        except OSError as error:
            problem = f"sinks.{name}.path: {error.filename or self._root}: {why(error)}"
            raise (TransientError(problem) if may_pass(error) else ConfigError([problem])) from error

    @classmethod
    def probe(cls, name: str, config: Any) -> str:
        """Whether the folder can be written, or made. No host is asked: which ones there are, only events say."""
        place = root = _Places(config.path).root
        try:
            while not place.exists():
                place = place.parent
            _allow_writing(place)
        except OSError as error:
            raise ConfigError([f"sinks.{name}.path: {place}: {why(error)}"]) from error
        return f"{root} can be {'written' if place == root else 'made'}"

    def deliver(self, events: Sequence[Event], timeout_secs: float) -> None:
        """Save the images of one event. The time limit is that of fetching; writing to a disk cannot be given up."""
        (event,) = events
        if self._closed:
            raise TransientError(f"{self._root}: the sink is closed")
        taken = snapshots_of(event)
        if taken is None:
            self._say_unfit(event)
            return
        fetching = _Fetching(timeout_secs=timeout_secs, ends_at=self._monotonic() + timeout_secs, urls={})
        failed_at_vod = frozenset(taken.failed)
        failures: list[RejectedError | TransientError] = []
        for index, snapshot in enumerate(taken.snapshots):
            if snapshot in failed_at_vod:
                _logger.warning("event %s: %s", event.key.hex(), _failed_at_vod(snapshot))
                continue
            try:
                self._save(snapshot.url, self._values(event, taken, index, snapshot), fetching)
            except (RejectedError, TransientError) as error:
                failures.append(error)
        if not taken.snapshots:
            _logger.warning("event %s: it names no image, so there is nothing to download", event.key.hex())
        if failures:
            raise _summary(failures, len(taken.snapshots))

    def reopen(self) -> None:
        """Read what vouches for certificates again.

        Raises:
            ConfigError: It cannot be read; what was read before stays in use.
        """
        try:
            self._adapter.reread_roots()
        except RootsError as error:
            raise ConfigError([f"sinks.{self._name}.ca_file: {error}; what was read before stays in use"]) from None

    def close(self) -> None:
        """Close the idle connections; those in use are closed when their image is in."""
        self._closed = True
        self._adapter.close()

    def _say_unfit(self, event: Event) -> None:
        shown = event.type[:_SHOWN_CHARACTERS]
        if shown not in self._unfit_types and len(self._unfit_types) < _REMEMBERED:
            self._unfit_types.add(shown)
            _logger.warning(
                "sinks.%s: events of type %r hold no snapshots: nothing is done for them (does the route need"
                " event_types?)",
                self._name,
                shown,
            )

    # --- one image ---

    @staticmethod
    def _values(event: Event, taken: SnapshotsTaken, index: int, snapshot: Snapshot) -> dict[str, str]:
        """What is known for the fields; all but `ext`, which the answer may have to say."""
        values = {
            "file_id": taken.file_id,
            "task_id": taken.task_id,
            "time_offset_ms": "" if snapshot.time_offset_ms is None else str(snapshot.time_offset_ms),
            "definition": "" if taken.definition is None else str(taken.definition),
            "index": str(index),
            "key": event.key.hex(),
        }
        return {name: safe_name(value, _FIELDS[name]) for name, value in values.items()}

    def _save(self, url: str, values: dict[str, str], fetching: "_Fetching") -> None:
        extension = _extension_in(url)
        if extension or "ext" not in self._places.fields:
            parts = self._parts(values, extension, url, fetching)
            if self._is_there(parts, values["key"]):
                return
        with closing(self._fetch(url, fetching)) as response:
            self._check(response)
            if not extension:
                extension = _EXTENSIONS.get(_content_type(response), _OTHER_EXTENSION)
                parts = self._parts(values, extension, url, fetching)
                if self._is_there(parts, values["key"]):
                    return
            try:
                self._store(parts, self._body(response, fetching), values["key"])
            except OSError as error:
                place = self._root.joinpath(*parts)
                raise TransientError(f"{place} was not saved: {why(error, _HINTS)}") from error

    def _parts(self, values: dict[str, str], extension: str, url: str, fetching: "_Fetching") -> tuple[str, ...]:
        """The path below the root.

        Raises:
            RejectedError: Another image of the event goes there.
        """
        parts = tuple(self._places.below_root({**values, "ext": extension}))
        if fetching.urls.setdefault(parts, url) != url:
            place = self._root.joinpath(*parts)
            raise RejectedError(
                f"two images of the event would go to {place} (put {{index}} into sinks.{self._name}.path)"
            )
        return parts

    # --- fetching ---

    def _fetch(self, url: str, fetching: "_Fetching") -> requests.Response:
        """The answer that is no redirect, its body not read."""
        for _ in range(1 + _REDIRECTS):
            request = self._request(url)
            where = str(request.url)
            try:
                response = self._adapter.send_within(request, environment_of(where), self._left_secs(fetching, where))
            # Not chained: the texts of these exceptions hold the whole URL, whose query may be a signature.
            except CALL_ERRORS as error:
                said = f"{_shown(where)} {failure_text(error, fetching.timeout_secs)}"
                if any(isinstance(cause, ForbiddenAddressError) for cause in causes(error)):
                    hint = f"not a public address; sinks.{self._name}.allow_private = true would let it"
                    raise RejectedError(f"{said} ({hint})") from None
                raise TransientError(said) from None
            if not response.is_redirect:
                return response
            response.close()
            try:
                url = urljoin(where, response.headers["Location"])
            except ValueError:
                raise RejectedError(f"{_shown(where)} redirects to an address that cannot be read") from None
        raise TransientError(f"{_shown(where)} redirects once more than the {_REDIRECTS} times that are followed")

    def _request(self, url: str) -> requests.PreparedRequest:
        """The request for an image.

        Raises:
            RejectedError: There is none to be sent to such a URL.
        """
        headers = {"User-Agent": f"vodpoller/{__version__}", "Accept": "image/*", "Accept-Encoding": "identity"}
        try:
            # What is looked at is what requests makes of it: that is where it connects to.
            request = requests.Request("GET", url, headers=headers).prepare()
            parts = urlsplit(str(request.url))
            host, _ = parts.hostname or "", parts.port
        except (requests.RequestException, ValueError):
            raise RejectedError(f"{_shown(url)!r} is not an address of http or https") from None
        if parts.scheme not in ("http", "https") or not host:
            raise RejectedError(f"{_shown(url)!r} is not an address of http or https")
        if "@" in parts.netloc:
            raise RejectedError(f"{_shown(url)} comes with credentials, which are not used")
        if not any(fnmatchcase(host.rstrip("."), glob) for glob in self._config.hosts):
            raise RejectedError(f"{_shown(url)} is at a host that sinks.{self._name}.hosts does not name")
        return request

    def _left_secs(self, fetching: "_Fetching", where: str) -> float:
        left_secs = fetching.ends_at - self._monotonic()
        if left_secs <= 0:
            raise TransientError(
                f"{_shown(where)} was not fetched: the {fetching.timeout_secs:g} s for the event are over"
                f" (more of them: sinks.{self._name}.timeout_secs)"
            )
        return left_secs

    def _check(self, response: requests.Response) -> None:
        """Raise what the answer's head says of an image that cannot be had."""
        status = response.status_code
        where = _shown(str(response.url))
        if status != HTTPStatus.OK:
            said = f"{where} answered {status_text(status)}"
            if status in _GONE:
                raise RejectedError(f"{said}: the image is not there (any more)")
            raise TransientError(said, retry_after_secs=retry_after_secs(response.headers, self._wall()))
        if _content_type(response) in _PAGES:
            raise RejectedError(f"{where} is a page ({_content_type(response)}), not an image")
        encoding = response.headers.get("Content-Encoding", "identity").strip().lower()
        if encoding != "identity":
            raise TransientError(f"{where} came compressed, which nobody asked for")
        announced = response.headers.get("Content-Length", "")
        # Through a float: Python makes no integer of more than 4300 digits.
        if re.fullmatch("[0-9]+", announced) and float(announced) > self._config.max_bytes:
            raise self._too_long(where)

    def _too_long(self, where: str) -> RejectedError:
        return RejectedError(f"{where} is longer than sinks.{self._name}.max_bytes = {self._config.max_bytes}")

    def _body(self, response: requests.Response, fetching: "_Fetching") -> Iterator[bytes]:
        where = _shown(str(response.url))
        taken_bytes = 0
        try:
            while chunk := response.raw.read(_CHUNK_BYTES, decode_content=False):
                taken_bytes += len(chunk)
                if taken_bytes > self._config.max_bytes:
                    raise self._too_long(where)
                yield chunk
        except CALL_ERRORS as error:
            raise TransientError(f"{where} {failure_text(error, fetching.timeout_secs)}") from None
        if not taken_bytes:
            raise TransientError(f"{where} answered with nothing")

    # --- saving ---

    def _is_there(self, parts: tuple[str, ...], key: str) -> bool:
        """Whether a file has an image's name; says so if it is not known to be of the same event."""
        try:
            with self._folder(parts[:-1], make=False) as folder:
                owner = self._owner(folder, parts)
        except OSError:  # it will be said by the step that writes
            return False
        if owner is not None:
            self._say_skipped(parts, key, owner)
        return owner is not None

    def _owner(self, folder: int, parts: tuple[str, ...]) -> str | None:
        """The key of the event whose image a file is; empty if that is not known, None if there is no file."""
        try:
            status = os.stat(parts[-1], dir_fd=folder, follow_symlinks=False)
        except FileNotFoundError:
            return None
        if not stat.S_ISREG(status.st_mode):
            return None
        with suppress(OSError):  # it has no such attribute, or its file system has none, or it may not be read
            fd = os.open(parts[-1], os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
            try:
                return os.getxattr(fd, _OWNER).decode("ascii", "replace")
            finally:
                os.close(fd)
        return self._owners.get(parts, "")

    def _say_skipped(self, parts: tuple[str, ...], key: str, owner: str) -> None:
        if owner == key or "key" in self._places.fields:
            return
        place = str(self._root.joinpath(*parts))
        self._repeats.say(
            "warning",
            "image.skipped",
            cause=f"{key} {place}",
            sink=self._name,
            key=key,
            path=place,
            held_by=owner or "unknown",
            hint=f"the file is kept; {{definition}} and {{task_id}} in sinks.{self._name}.path give each event its own",
        )

    def _store(self, parts: tuple[str, ...], body: Iterator[bytes], key: str) -> None:
        """Write to a temporary file, sync it, give it its name, sync the name."""
        with self._folder(parts[:-1], make=True) as folder:
            self._tidy(folder, parts[:-1])
            temporary = f".vodpoller-{secrets.token_hex(8)}.part"
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            fd = os.open(temporary, flags, 0o640, dir_fd=folder)
            try:
                with suppress(OSError):  # a file system without locks: what is left behind stays
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)  # tells those who tidy up that it is in use
                for chunk in body:
                    rest = memoryview(chunk)
                    while rest:
                        rest = rest[self._write(fd, rest) :]
                with suppress(OSError):  # a file system without attributes: see _owners
                    os.setxattr(fd, _OWNER, key.encode())
                os.fsync(fd)
                with self._naming:
                    owner = self._owner(folder, parts)
                    if owner is None:
                        os.rename(temporary, parts[-1], src_dir_fd=folder, dst_dir_fd=folder)
                        self._remember(parts, key)
                if owner is not None:
                    os.unlink(temporary, dir_fd=folder)
                    self._say_skipped(parts, key, owner)
                self._folders.sync(self._root.joinpath(*parts[:-1]), folder)
            except BaseException:
                with suppress(FileNotFoundError):
                    os.unlink(temporary, dir_fd=folder)
                raise
            finally:
                os.close(fd)

    def _remember(self, parts: tuple[str, ...], key: str) -> None:
        """Whose image a file is, for file systems that cannot hold it: its event may come again soon."""
        if len(self._owners) >= _REMEMBERED:
            del self._owners[next(iter(self._owners))]
        self._owners[parts] = key

    @contextmanager
    def _folder(self, names: Sequence[str], *, make: bool) -> Iterator[int]:
        """A folder below the root, found name by name without following a symbolic link."""
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
        fd = os.open(self._root, flags)
        place = self._root
        try:
            for name in names:
                if make:
                    with suppress(FileExistsError):
                        os.mkdir(name, 0o750, dir_fd=fd)
                    self._folders.sync(place, fd)  # always: whoever made it may not have come to this step
                place /= name
                outer, fd = fd, os.open(name, flags | os.O_NOFOLLOW, dir_fd=fd)
                os.close(outer)
            yield fd
        finally:
            os.close(fd)

    def _tidy(self, folder: int, names: tuple[str, ...]) -> None:
        """Remove what a run that was killed left in the folder, when it is first used."""
        if names in self._tidied:
            return
        if len(self._tidied) >= _REMEMBERED:
            self._tidied.clear()
        self._tidied.add(names)
        for name in filter(_TEMPORARY.fullmatch, os.listdir(folder)):
            with suppress(OSError):  # removed by another, or in use, or nobody can tell without locks: it may stay
                fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    os.unlink(name, dir_fd=folder)
                finally:
                    os.close(fd)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Fetching:
    """Fetching the images of one event.

    Args:
        timeout_secs: How long it may take in all.
        ends_at: Monotonic time, in seconds.
        urls: What went where, by the path below the root.
    """

    timeout_secs: float
    ends_at: float
    urls: dict[tuple[str, ...], str]


def safe_name(value: str, max_characters: int) -> str:
    """The value where it can be a part of a file's name as it is, else a name that only this value has.

    Args:
        value: Anything.
        max_characters: Of the result; 17 at least.
    """
    if len(value) <= max_characters and _PLAIN.fullmatch(value) and ".." not in value:
        return value
    digest = hashlib.sha256(value.encode(errors="surrogatepass")).hexdigest()
    return f"_{digest[: min(_REPLACED_CHARACTERS, max_characters - 1)]}"


def is_public(address: str) -> bool:
    """Whether an address is one of the Internet: not of this machine, of a private network, or a special one.

    Args:
        address: As getaddrinfo has it.
    """
    ip = ipaddress.ip_address(address)
    if isinstance(ip, ipaddress.IPv6Address):
        # Addresses of IPv6 behind which there is one of IPv4.
        inner = (
            ip.ipv4_mapped or ip.sixtofour or (ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF) if ip in _NAT64 else None)
        )
        if inner is None:
            return ip.is_global and not (ip.is_multicast or ip.is_reserved or ip.is_site_local)
        ip = inner
    return ip.is_global and not (ip.is_multicast or ip.is_reserved)


def _extension_in(url: str) -> str:
    """How the URL's path ends, where that is an image's extension; else nothing."""
    try:
        name = unquote(urlsplit(url).path)
    except ValueError:
        return ""
    extension = name.rpartition(".")[2].lower()
    return extension if extension in _KNOWN_EXTENSIONS else ""


def _content_type(response: requests.Response) -> str:
    return response.headers.get("Content-Type", "").partition(";")[0].strip().lower()


def _shown(url: str) -> str:
    """A URL for a line of a log: without its query, which may be a signature."""
    return "".join(letter if letter.isprintable() else "?" for letter in shown_url(url)[:_SHOWN_CHARACTERS])


def _failed_at_vod(snapshot: Snapshot) -> str:
    code = str(snapshot.err_code)[:_SHOWN_CHARACTERS]
    return (
        f"VOD could not take the image at {snapshot.time_offset_ms} ms (ErrCode {code}): there is nothing to download"
    )


def _summary(failures: Sequence[RejectedError | TransientError], images: int) -> RejectedError | TransientError:
    """One error for the event: what may pass comes first, so that it is tried again before the rest is given up."""
    transient = [error for error in failures if isinstance(error, TransientError)]
    shown = transient or failures
    text = "; ".join(str(error) for error in shown[:_SHOWN_FAILURES])
    if images > 1:
        text = f"{len(failures)} of {images} images were not saved: {text}"
    if not transient:
        return RejectedError(text)
    return TransientError(
        text, retry_after_secs=max((e.retry_after_secs for e in transient if e.retry_after_secs), default=None)
    )


def _allow_writing(folder: Path) -> None:
    """Raise the OSError that this user would get."""
    if not folder.is_dir():
        raise OSError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder))
    if not os.access(folder, os.R_OK | os.W_OK | os.X_OK):
        read_only = bool(os.statvfs(folder).f_flag & os.ST_RDONLY)
        number = errno.EROFS if read_only else errno.EACCES
        raise OSError(number, os.strerror(number), str(folder))
