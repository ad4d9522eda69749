"""What belongs to the process: signals, the status socket, the watchdog, log, counts; and the daemon that it runs."""

import math
import signal
import time
from collections.abc import Callable, Mapping
from typing import Any, Final, Protocol

from vodpoller import __version__
from vodpoller.clock import SteadyClock
from vodpoller.config.model import Config
from vodpoller.daemon import Daemon
from vodpoller.logs import Logger
from vodpoller.process import Signals
from vodpoller.status_socket import StatusSocket, socket_path
from vodpoller.systemd import Notifier
from vodpoller.telemetry import Telemetry

HEARTBEAT_SECS: Final = 5.0
BEATS_A_WATCHDOG: Final = 3  # in its period, so that one that comes late is not one too few


class Build(Protocol):
    """Opens what a configuration describes; see `Daemon`, which is the one that is used."""

    def __call__(
        self, config: Config, *, telemetry: Telemetry, notifier: Notifier, signals: Signals, clock: SteadyClock
    ) -> Daemon:
        """A daemon that is open and not started."""


class Service:
    """The process, open and ready to run.

    Args:
        config: Valid.
        log: Destination of log lines.
        notifier: The service manager, if there is one.
        signals: What asks for the end or for a reload, maybe before there is a daemon; None for its own, caught when
            it runs.
        build: Opens the daemon.

    Raises:
        ConfigError, JournalError, StorageError, StoppingError: As of the daemon, which cannot be opened.
    """

    def __init__(
        self,
        config: Config,
        *,
        log: Logger,
        notifier: Notifier,
        signals: Signals | None = None,
        build: Build = Daemon,
    ) -> None:
        self._config = config
        self._log = log
        self._telemetry = Telemetry(log)
        self._notifier = notifier
        self._signals = signals or Signals()
        self._clock = SteadyClock()
        self._build = build
        self._status_socket: StatusSocket | None = None
        self._daemon = self._built(config)

    def _built(self, config: Config) -> Daemon:
        return self._build(
            config,
            telemetry=self._telemetry,
            notifier=self._notifier,
            signals=self._signals,
            clock=self._clock,
        )

    # --- running ------------------------------------------------------------------------------------------------------

    def run(self, *, until: Callable[[], bool] | None = None) -> int:
        """Run until a signal asks for the end.

        Args:
            until: Asked every tenth of a second: whether to end without a signal.

        Returns:
            The exit code.
        """
        self._signals.catch()
        self._open_status_socket()
        self._daemon.start()
        self._notifier.ready()
        beat_secs = min(HEARTBEAT_SECS, (self._notifier.watchdog_secs or math.inf) / BEATS_A_WATCHDOG)
        longest_secs = beat_secs if until is None else 0.1
        next_beat = 0.0
        while until is None or not until():
            if time.monotonic() >= next_beat:
                self._beat()
                next_beat = time.monotonic() + beat_secs
            received = self._signals.next(min(max(next_beat - time.monotonic(), 0), longest_secs))
            if received is signal.SIGHUP:
                self._reload()
            elif received is not None:
                self._log.info("daemon.stopping", signal=received.name)
                break
        return self._stop()

    def _beat(self) -> None:
        self._notice_clock_step()
        self._daemon.mark()
        if self._daemon.is_alive():
            self._notifier.alive()
        self._notifier.status(self._daemon.cleared(self._daemon.known_status().as_line()))

    def _notice_clock_step(self) -> None:
        step_secs = self._clock.adopt()
        if step_secs:
            self._log.warning("clock.stepped", step_secs=round(step_secs, 1))
            self._daemon.shift(step_secs)

    def _reload(self) -> None:
        self._daemon.refresh()
        self._log.info("daemon.reloaded")

    def _stop(self) -> int:
        self._notifier.stopping()
        self._daemon.stop()
        if self._status_socket is not None:
            self._status_socket.close()
        self._log.info("daemon.stopped", events=self._daemon.settled_events)
        return 0

    # --- the status socket --------------------------------------------------------------------------------------------

    def _open_status_socket(self) -> None:
        path = socket_path(self._config.journal.path)
        try:
            self._status_socket = StatusSocket(path, self._answer, log=self._log)
        except (OSError, RuntimeError) as error:  # RuntimeError: the system has no more threads
            self._log.warning("status.unavailable", path=str(path), error_message=str(error))

    def _answer(self, request: Mapping[str, Any]) -> Mapping[str, Any]:
        if request.get("command") != "status":
            return {"error": f"this vodpoller ({__version__}) knows no command {request.get('command')!r}"}
        strict = bool(request.get("strict"))
        answer: Mapping[str, Any] = self._daemon.cleared(self._daemon.status().as_json(strict=strict))
        return answer
