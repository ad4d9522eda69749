"""Open the daemon, for the commands that run it."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, Final

from vodpoller.cli.configuration import load_config
from vodpoller.cli.exits import EXIT_CONFIG, EXIT_FAILURE, end
from vodpoller.cli.failure import fail
from vodpoller.cli.output import make_log
from vodpoller.config.load import load
from vodpoller.config.model import Config
from vodpoller.daemon import Daemon
from vodpoller.errors import ConfigError, JournalError, StoppingError, StorageError, UnusableJournalError
from vodpoller.handover import Handover
from vodpoller.journal.schema import SCHEMA_VERSION
from vodpoller.logs import LineLogger
from vodpoller.process import Signals
from vodpoller.service import Service
from vodpoller.systemd import Notifier, passed_sockets
from vodpoller.telemetry import Telemetry

_COPIES: Final = tuple(f".v{version}" for version in range(1, SCHEMA_VERSION))  # of journals of earlier versions


def open_service(path: Path, signals: Signals) -> Service:
    """Open the daemon as a service. Exit with a message if that fails, or without one if a signal asks for it.

    Args:
        path: The configuration file.
        signals: The signals that were received.
    """
    handover = Handover.of(os.environ)
    passed = passed_sockets(os.environ)
    lines = LineLogger(sys.stderr)
    with _exit_if_it_fails(exit_code_if_stopped=0):
        return Service(
            load_config(path),
            read=partial(load, path, env=os.environ),
            make_log=partial(make_log, lines=lines),
            notifier=Notifier.of(os.environ),
            signals=signals,
            build=_build,
            handover=handover,
            passed=passed,
        )


def _build(config: Config, **parts: Any) -> Daemon:
    with _given_to_owner(config):
        return Daemon(config, **parts)


def open_daemon(config: Config, *, signals: Signals | None = None, quiet: bool = False) -> Daemon:
    """Open the daemon for one round. Exit with a message if that fails, or without one if a signal asks for it.

    Args:
        config: Valid.
        signals: The signals that were received; None if the command does not handle signals.
        quiet: As for `make_log`.
    """
    with _exit_if_it_fails(exit_code_if_stopped=EXIT_FAILURE), _given_to_owner(config):
        telemetry = Telemetry(make_log(config, quiet=quiet))
        return Daemon(config, telemetry=telemetry, notifier=Notifier.of(os.environ), signals=signals)


@contextmanager
def _exit_if_it_fails(*, exit_code_if_stopped: int) -> Iterator[None]:
    try:
        yield
    except StoppingError:
        end(exit_code_if_stopped)
    except ConfigError as error:
        fail(error.problems, EXIT_CONFIG)
    except UnusableJournalError as error:
        fail([str(error)], EXIT_CONFIG)
    except (JournalError, StorageError) as error:
        fail([str(error)], EXIT_FAILURE)


@contextmanager
def _given_to_owner(config: Config) -> Iterator[None]:
    """Make the owner of each folder the owner of the files that root creates in it: the daemon runs as another user."""
    try:
        yield
    finally:
        _give_to_owner(config)


def _give_to_owner(config: Config) -> None:
    if os.geteuid() != 0:
        return
    claimed = {claim.partition(":")[2] for sink in config.sinks.values() for claim in sink.claims() | sink.shares()}
    for name in [str(config.journal.path), *claimed]:
        for path in (Path(f"{name}{ending}") for ending in ("", ".lock", "-wal", "-shm", *_COPIES)):
            with suppress(OSError):
                folder, file = path.parent.stat(), path.lstat()
                if file.st_uid == 0 and folder.st_uid != 0:
                    os.chown(path, folder.st_uid, folder.st_gid, follow_symlinks=False)
