"""The parts of the process: signals, status socket, watchdog, log and counters; and the daemon that it runs.

A reload replaces the daemon: start reading at `Service._reload`.
"""

import gc
import math
import signal
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Final, NoReturn, Protocol, TypeVar

from vodpoller import __version__
from vodpoller.callback.sockets import CallbackSockets
from vodpoller.clock import SteadyClock
from vodpoller.config.model import Config
from vodpoller.daemon import Daemon
from vodpoller.errors import ConfigError, StoppingError, VodpollerError
from vodpoller.handover import Handover, execute_anew
from vodpoller.listener.view import Access, View
from vodpoller.listening import Listening
from vodpoller.logs import Logger, cleared, searched_for
from vodpoller.opened_sinks import end_if_stopping
from vodpoller.process import Signals
from vodpoller.reload import check_successor, problems_of_journal
from vodpoller.status import ReloadStatus, Status
from vodpoller.status_socket import StatusSocket, WaitingClient, socket_path
from vodpoller.systemd import Notifier
from vodpoller.telemetry import Count, Telemetry

HEARTBEAT_SECS: Final = 5.0
BEATS_PER_WATCHDOG: Final = 3  # heartbeats in its period, so that one of them may be late
TASK_BEAT_SECS: Final = 0.5  # maximum delay of a signal while a task runs in another thread
BEYOND_STOP_SECS: Final = 2.0  # time for closing files after a stop; after that, closing counts as hung

T = TypeVar("T")


class Build(Protocol):
    """Opens what a configuration describes; `Daemon` is the one in use."""

    def __call__(
        self,
        config: Config,
        *,
        telemetry: Telemetry,
        notifier: Notifier,
        signals: Signals,
        clock: SteadyClock,
        sockets: Mapping[str, socket.socket],
    ) -> Daemon:
        """A daemon that is open and not started."""


class Service:
    """The process, open and ready to run.

    The thread that runs it writes all of its fields, with one exception: the thread of the status socket adds waiting
    clients. The threads of the status socket and of the listener read what they need for an answer: the daemon, or the
    last status of a stopped one, and the result of the last reload.

    Args:
        config: Valid.
        read: Reads the configuration again; raises the same errors as `config.load.load`.
        make_log: Makes the log that a configuration describes. All logs write to one destination.
        notifier: The service manager, if there is one.
        signals: The signals that ask for the end or for a reload, maybe before there is a daemon; None for its own,
            caught when it runs.
        build: Opens the daemon.
        handover: What the process passed on when it executed itself anew.
        execute: Executes the process anew.
        passed: Sockets that the service manager has opened.

    Raises:
        ConfigError, JournalError, StorageError, StoppingError: The daemon cannot be opened; see `Daemon`.
    """

    def __init__(
        self,
        config: Config,
        *,
        read: Callable[[], Config],
        make_log: Callable[[Config], Logger],
        notifier: Notifier,
        signals: Signals | None = None,
        build: Build = Daemon,
        handover: Handover | None = None,
        execute: Callable[[Handover, Signals], NoReturn] = execute_anew,
        passed: Sequence[socket.socket] = (),
    ) -> None:
        handover = handover or Handover()
        self._stuck_before = handover.stuck
        self._inherited = handover.listeners()
        self._problems_left = list(problems_of_journal(config, Path(handover.journal))) if handover.journal else []
        if self._problems_left:
            config = replace(config, journal=config.journal.model_copy(update={"path": Path(handover.journal)}))
        self._config = config
        self._read = read
        self._make_log = make_log
        self._log = make_log(config)
        self._telemetry = Telemetry(self._log)
        self._notifier = notifier
        self._signals = signals or Signals()
        self._clock = SteadyClock()
        self._build, self._execute = build, execute
        self._beat_secs = min(HEARTBEAT_SECS, (notifier.watchdog_secs or math.inf) / BEATS_PER_WATCHDOG)
        self._exit_code = 0
        self._end_reason = "a signal asked for the end meanwhile"
        self._status_socket: StatusSocket | None = None
        self._listening = Listening(
            lambda: self._view() if self._is_built else None, telemetry=self._telemetry, inherited=self._inherited
        )
        self._sockets = CallbackSockets(inherited=self._inherited, passed=passed, passed_before=handover.passed)
        self._is_built = self._is_ready = False
        self._clients_lock = threading.Lock()
        self._clients = [WaitingClient(connection) for connection in handover.clients()]
        self._reloaded = ReloadStatus()
        # Building can take minutes, if a sink's file is read after a crash: the listener answers probes meanwhile.
        self._listening.follow(config.listener.address)
        try:
            self._daemon: Daemon | None = self._built(config)
        except BaseException:
            self._listening.close()
            self._sockets.close()
            raise
        self._started_at = self._clock()
        self._last_status = self._of_process(self._daemon.known_status())  # later: of the daemon stopped last
        self._is_built = True

    # --- running ------------------------------------------------------------------------------------------------------

    def run(self, *, until: Callable[[], bool] | None = None) -> int:
        """Run until a signal asks for the end.

        Args:
            until: Called every tenth of a second; True ends the run without a signal.

        Returns:
            The exit code.
        """
        self._signals.catch()
        if self._daemon is not None:
            self._begin(self._daemon)
        longest_secs = self._beat_secs if until is None else 0.1
        next_beat = 0.0
        while self._daemon is not None and (until is None or not until()):
            if time.monotonic() >= next_beat:
                self._beat(self._daemon)
                next_beat = time.monotonic() + self._beat_secs
            received = self._signals.next(min(max(next_beat - time.monotonic(), 0), longest_secs))
            if received is signal.SIGHUP:
                self._reload(self._daemon)
                next_beat = 0.0  # so that `systemctl status` shows the result at once
            elif received is not None:
                self._log.info("daemon.stopping", signal=received.name)
                break
        return self._end()

    def _begin(self, daemon: Daemon) -> None:
        """Start what the constructor has opened."""
        self._open_status_socket()
        self._listening.follow(self._config.listener.address)
        self._sockets.keep(self._config.callback_addresses)
        while self._inherited:
            self._inherited.popitem()[1].close()  # those that the configuration does not use
        daemon.start()
        self._started_at = self._clock()
        self._reloaded = ReloadStatus(last_success_at=self._started_at)
        self._is_ready = True
        self._notifier.ready()
        if self._stuck_before:
            problems = self._problems_left
            answer = self._refused(problems) if problems else self._done(changed=True, stuck=self._stuck_before)
            for client in self._taken_clients():
                client.answer(answer)

    def _beat(self, daemon: Daemon) -> None:
        step_secs = self._clock.adopt()
        if step_secs:
            daemon.shift(step_secs)  # first of all: until stored times are moved, their ages are wrong by the jump
            self._started_at += step_secs
            self._log.warning("clock.stepped", step_secs=round(step_secs, 1))
        daemon.note_times()
        if daemon.is_alive():
            self._notifier.alive()
        self._notifier.status(self._cleared(self._of_process(daemon.known_status()).as_line()))

    def _end(self) -> int:
        self._notifier.stopping()
        self._is_ready = False
        if self._daemon is not None:
            self._detach(self._daemon).stop()
        for client in self._taken_clients():
            client.answer({"result": "ended", "problems": [self._end_reason]})
        if self._status_socket is not None:
            self._status_socket.close()
        self._listening.close()
        self._sockets.close()
        self._log.info("daemon.stopped", events=self._telemetry.total(Count.EVENTS_SETTLED))
        return self._exit_code

    # --- reload -------------------------------------------------------------------------------------------------------

    def _reload(self, daemon: Daemon) -> None:
        """Take the present content of the configuration file, or report why not; read files and secrets in any case."""
        clients = self._taken_clients()
        self._notifier.reloading()
        self._reloaded = replace(self._reloaded, under_way=True)
        daemon.refresh()
        try:
            changed = self._renew(daemon, clients)
        except StoppingError:
            self._give_back(clients)
            return
        except ConfigError as error:
            answer = self._refused(error.problems)
        else:
            answer = self._done(changed=changed)
        if self._daemon is not None:
            self._notifier.ready()
        for client in clients:
            client.answer(answer)

    def _renew(self, daemon: Daemon, clients: Sequence[WaitingClient]) -> bool:
        """Replace the running daemon by one with the configuration in the file.

        Args:
            daemon: The running daemon.
            clients: The clients that wait for this reload; they are passed on if the process executes itself anew.

        Returns:
            Whether the configuration has changed.

        Raises:
            ConfigError: It cannot be used. The former configuration runs, or nothing if that cannot be opened again.
            StoppingError: A signal asked for the end.
        """
        check = partial(self._read_and_check, daemon)
        new = self._run_with_beat(check, name="reload", beat=lambda: self._beat_unless_stopping(daemon))
        former = self._config
        if new == former:
            return False
        self._stop(daemon, clients)
        try:
            self._follow(former, new)
        except StoppingError:
            raise
        except Exception as error:
            self._run_again(former)
            raise ConfigError(_problems_in(error)) from error
        self._collect_garbage()
        return True

    def _read_and_check(self, daemon: Daemon) -> Config:
        try:
            new = self._read()
            if new != self._config:
                check_successor(
                    new,
                    self._config,
                    self._log,
                    trouble=daemon.known_status().journal.error,
                    of_sockets=self._sockets.problems(new.callback_addresses),
                )
        except ConfigError:
            raise
        except Exception as error:
            self._log.error("task.failed", task="reload", exc_info=True)
            raise ConfigError(_problems_in(error)) from error
        return new

    def _follow(self, former: Config, new: Config) -> None:
        end_if_stopping(self._signals)
        new = new.keeping(former)
        if problems := list(problems_of_journal(new, former.journal.path)):  # the stop may have stored events
            raise ConfigError(problems)
        self._run(new)

    def _stop(self, daemon: Daemon, clients: Sequence[WaitingClient]) -> None:
        """Stop the running daemon. If a thread does not end, the process executes itself anew."""
        ends_at = time.monotonic() + self._config.daemon.shutdown_secs + BEYOND_STOP_SECS
        self._detach(daemon)

        def beat() -> None:
            self._notifier.alive()
            if time.monotonic() > ends_at:
                self._execute_anew(["closing the journal"], clients)

        if stuck := self._run_with_beat(daemon.stop, name="stop", beat=beat):
            self._execute_anew(stuck, clients)

    def _detach(self, daemon: Daemon) -> Daemon:
        """Keep the daemon's last status, and let no thread use the daemon from now on."""
        self._last_status = self._of_process(daemon.known_status())
        self._daemon = None
        return daemon

    def _execute_anew(self, stuck: Sequence[str], clients: Sequence[WaitingClient]) -> NoReturn:
        listening = self._listening.handed_over() | self._sockets.handed_over()
        if self._status_socket is not None:
            listening[str(self._status_socket.path)] = self._status_socket.fileno()
        with self._clients_lock:
            asking = [client.fileno() for client in (*clients, *self._clients)]
        try:
            journal = str(self._config.journal.path)
            passed = self._sockets.passed
            handover = Handover(stuck=stuck, journal=journal, asking=asking, listening=listening, passed=passed)
            self._execute(handover, self._signals)
        except OSError as error:
            self._exit_code = 1
            self._end_reason = f"{', '.join(stuck)}: a thread hung, and the program cannot be executed anew: {error}"
            self._log.error("reload.failed", problems=[self._end_reason])
            raise StoppingError(self._end_reason) from error

    def _run(self, config: Config) -> None:
        """Build and start the daemon of a configuration.

        Raises:
            Exception: It cannot be built or started; nothing of it is left open.
        """
        self._telemetry.log_to(self._make_log(config))
        self._notifier.alive()
        daemon = self._built(config)
        try:
            daemon.start()
        except BaseException:
            daemon.stop()
            raise
        self._config, self._log, self._daemon = config, self._telemetry.log, daemon
        self._open_status_socket()
        self._listening.follow(config.listener.address)
        self._sockets.keep(config.callback_addresses)

    def _run_again(self, former: Config) -> None:
        """After a configuration could not be built: run the former one again, or end."""
        try:
            self._run(former)
        except StoppingError:
            raise
        except VodpollerError as error:
            self._exit_code = 1
            self._log.error("reload.failed", problems=["the former configuration: " + it for it in _problems_in(error)])

    def _built(self, config: Config) -> Daemon:
        return self._build(
            config,
            telemetry=self._telemetry,
            notifier=self._notifier,
            signals=self._signals,
            clock=self._clock,
            sockets=self._sockets.open(config.callback_addresses),
        )

    def _done(self, *, changed: bool, stuck: Sequence[str] = ()) -> Mapping[str, Any]:
        """Record and log that a reload is done. Returns the answer for the waiting clients."""
        now = self._clock()
        self._reloaded = ReloadStatus(at=now, last_success_at=now)
        self._log.info("daemon.reloaded", changed=changed, **({"executed_anew_for": list(stuck)} if stuck else {}))
        return {"result": "done", "changed": changed, "stuck": list(stuck), "problems": []}

    def _refused(self, problems: Sequence[str]) -> Mapping[str, Any]:
        """Record and log that a reload was refused, and why. Returns the answer for the waiting clients."""
        self._reloaded = replace(
            self._reloaded, successful=False, at=self._clock(), under_way=False, problems=tuple(problems)
        )
        self._log.error("reload.failed", problems=list(problems))
        answer: Mapping[str, Any] = self._cleared(
            {"result": "ended" if self._daemon is None else "refused", "problems": list(problems)}
        )
        return answer

    # --- tasks in another thread --------------------------------------------------------------------------------------

    def _run_with_beat(self, task: Callable[[], T], *, name: str, beat: Callable[[], None]) -> T:
        """Run a task in a thread of its own, and call `beat` repeatedly meanwhile.

        Args:
            task: A function that may take seconds.
            name: Name of the thread.
            beat: If it raises an exception, this ends the wait for the task.

        Returns:
            The result of the task; if the task raises, so does this method.
        """
        thread = ThreadPoolExecutor(1, thread_name_prefix=name)
        try:
            future = thread.submit(task)
            while not wait([future], min(self._beat_secs, TASK_BEAT_SECS)).done:
                beat()
            return future.result()
        finally:
            thread.shutdown(wait=False)

    def _beat_unless_stopping(self, daemon: Daemon) -> None:
        end_if_stopping(self._signals)
        self._beat(daemon)

    def _collect_garbage(self) -> None:
        """Free the memory of the former configuration, and exempt the new one's from further garbage collection."""
        gc.unfreeze()
        gc.collect()
        gc.freeze()

    # --- the status socket --------------------------------------------------------------------------------------------

    def _open_status_socket(self) -> None:
        """Open the status socket at the configured path, if it is not open there already."""
        path = socket_path(self._config.journal.path)
        if self._status_socket is not None:
            if self._status_socket.path == path:
                return
            self._status_socket.close()
            self._status_socket = None
        try:
            self._status_socket = self._status_socket_at(path)
        except (OSError, RuntimeError) as error:  # RuntimeError: the system allows no more threads
            self._log.warning("status.unavailable", path=str(path), error_message=str(error))

    def _status_socket_at(self, path: Path) -> StatusSocket:
        return StatusSocket(
            path,
            self._answer,
            later={"reload": self._ask_for_reload},
            listening=self._inherited.pop(str(path), None),
            log=lambda: self._log,
        )

    def _answer(self, request: Mapping[str, Any]) -> Mapping[str, Any]:
        if request.get("command") != "status":
            return {"error": f"this vodpoller ({__version__}) does not know the command {request.get('command')!r}"}
        answer: Mapping[str, Any] = self._cleared(self._status().as_json(strict=bool(request.get("strict"))))
        return answer

    def _view(self) -> View:
        """What the listener shows; called in its threads."""
        daemon, settings = self._daemon, self._config.listener
        return View(
            access=Access(hosts=settings.known_hosts(), password=settings.password_file),
            telemetry=self._telemetry,
            journal_path=self._config.journal.path,
            is_ready=lambda: daemon is not None and self._is_ready,
            overdue=lambda: {} if daemon is None else daemon.overdue(),
            known=lambda: self._last_status if daemon is None else self._of_process(daemon.known_status()),
            report=lambda: self._answer({"command": "status"}),
            cleared=self._cleared,
            clock_offset_secs=lambda: None if daemon is None else daemon.clock_offset_secs,
        )

    def _status(self) -> Status:
        daemon = self._daemon
        try:
            status = None if daemon is None else self._of_process(daemon.status())
        except Exception:
            if self._daemon is daemon:
                raise
            status = None
        if status is None or self._daemon is not daemon:  # it was stopped, maybe while it made its status
            return replace(self._last_status, at=self._clock())
        return status

    def _of_process(self, status: Status) -> Status:
        """The status with what only the process knows: its start, and its reloads."""
        reloaded = replace(self._reloaded, built_at=status.started_at)
        return replace(status, started_at=self._started_at, reload=reloaded)

    def _cleared(self, value: Any) -> Any:
        """The value without secrets: errors of receivers and of VOD may quote them."""
        return cleared(value, searched_for(self._config.hidden()))

    def _ask_for_reload(self, client: WaitingClient) -> None:
        with self._clients_lock:
            self._clients.append(client)
        self._signals.reload()

    def _taken_clients(self) -> list[WaitingClient]:
        with self._clients_lock:
            clients, self._clients = self._clients, []
        return clients

    def _give_back(self, clients: Sequence[WaitingClient]) -> None:
        with self._clients_lock:
            self._clients += clients


def _problems_in(error: Exception) -> Sequence[str]:
    return error.problems if isinstance(error, ConfigError) else (str(error) or repr(error),)
