"""Events as the standard input of a command, which is started for each event, without a shell."""

import errno
import math
import os
import select
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator

from vodpoller.errors import ConfigError, RejectedError, TransientError
from vodpoller.events.event import Event
from vodpoller.events.snapshots import file_id_of, task_id_of
from vodpoller.logs import SEARCHED_MIN_CHARACTERS
from vodpoller.sinks.contract import Sink, SinkConfig, SinkContext
from vodpoller.sinks.formats import encode

_INHERITED = frozenset({"PATH", "HOME", "LANG", "TZ", "TMPDIR"})
_OWN_PREFIX = "VODPOLLER_"
# Linux refuses to start a program if one variable is longer than 128 KiB. The body on stdin has the whole value.
_VARIABLE_MAX_BYTES = 4096
_STDERR_SHOWN_BYTES = 4096
_CHUNK_BYTES = 1 << 16
# This number of reads empties a pipe of the maximum size without privileges (fcntl's F_SETPIPE_SZ).
_FINAL_READS = 16

_GRACE_MAX_SECS = 2.0
_CLOSE_GRACE_SECS = 0.5
_KILL_WAIT_SECS = 1.0
_FIRST_PAUSE_SECS = 0.001
_LONGEST_PAUSE_SECS = 0.05

_TEMPORARY = {
    os.EX_TEMPFAIL: "it asks for another attempt later",
    126: "a program that it calls cannot be executed",
    127: "a program that it calls was not found",
}
_HINTS = {
    errno.EACCES: "is it still executable?",
    errno.ENOEXEC: "a script's first line must be #! and its interpreter",
    errno.ENOENT: "was it removed, or the interpreter in its first line?",
    errno.EAGAIN: "too many processes; under systemd see TasksMax=",
    errno.ENOMEM: "not enough memory; under systemd see MemoryMax=",
}


class ExecConfig(SinkConfig):
    """The settings of a command."""

    type: Literal["exec"] = Field(
        description="A command is started for each event and gets the event on its standard input."
    )
    command: Annotated[tuple[str, ...], Field(strict=False, min_length=1)] = Field(
        description="The program and its arguments, without a shell. A name without a slash is looked up on PATH.",
        examples=[["/usr/local/bin/on-vod-event", "--json"]],
    )
    timeout_secs: Annotated[float, Field(ge=0.1, le=3600)] = Field(
        default=30.0,
        description="Time limit of the command. In the last tenth of it (at most 2 s) the command gets SIGTERM; at its"
        " end the command and all processes that it started are killed.",
    )
    concurrency: Annotated[int, Field(ge=1, le=64)] = Field(
        default=4, description="Maximum number of commands that run at the same time."
    )
    env: Annotated[dict[str, str], Field(max_length=100)] = Field(
        default_factory=dict,
        repr=False,
        description="Variables added to the command's environment, which otherwise has PATH, HOME, LANG, LC_*, TZ,"
        " TMPDIR and the VODPOLLER_* variables that describe the event. The values are never shown.",
    )
    cwd: Annotated[str, Field(min_length=1, max_length=4096)] | None = Field(
        default=None,
        description="The working directory of the command. Left out: that of vodpoller.",
        examples=["/var/lib/vodpoller"],
    )

    @field_validator("command")
    @classmethod
    def _can_be_started(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not value[0]:
            raise ValueError('the program is empty (for example command = ["/usr/local/bin/on-vod-event"])')
        if any("\0" in part for part in value):
            raise ValueError("an argument cannot hold a NUL character (leave it out)")
        return value

    @field_validator("env")
    @classmethod
    def _can_be_set(cls, value: dict[str, str]) -> dict[str, str]:
        for name, content in value.items():
            if not name or "=" in name or "\0" in name:
                raise ValueError(f"{name!r} is not the name of a variable (letters, digits and _)")
            if name.startswith(_OWN_PREFIX):
                raise ValueError(f"{name} is set by vodpoller itself (leave it out)")
            if "\0" in content:
                raise ValueError(f"the value of {name} holds a NUL character (leave it out)")
        return value

    @field_validator("cwd")
    @classmethod
    def _is_a_path(cls, value: str | None) -> str | None:
        if value is not None and "\0" in value:
            raise ValueError("a path cannot hold a NUL character (leave it out)")
        return value


class ExecSink(Sink[ExecConfig]):
    """Starts a command for each event.

    Exit code 0 accepts the event. 75 (EX_TEMPFAIL of sysexits.h), 126 and 127 (a shell's "cannot execute" and "not
    found"), an end by a signal and an exceeded time limit are transient failures. Any other exit code rejects the
    event; the command's stderr is the reason. Processes that a command leaves running after its exit are not touched.

    Args:
        name: Name of the sink.
        config: Its settings.
        context: The log and the clocks.
        environ: The environment from which a few variables are inherited; None: that of this process.

    Raises:
        ConfigError: The program or the folder does not exist.
    """

    Config = ExecConfig

    def __init__(
        self,
        name: str,
        config: ExecConfig,
        context: SinkContext,
        *,
        environ: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(name, config, context)
        environ = os.environ if environ is None else environ
        self.concurrency = config.concurrency
        self.batch_events = 1
        self.timeout_secs = config.timeout_secs
        self._format = config.format
        self._cwd = _folder(name, config)
        self._program = _program(name, config, environ)
        kept = {name: value for name, value in environ.items() if name in _INHERITED or name.startswith("LC_")}
        self._environment = {_bytes(name): _bytes(value) for name, value in {**kept, **config.env}.items()}
        self._command = [_bytes(part) for part in config.command]
        self._hidden = sorted(
            {value for value in config.env.values() if len(value) >= SEARCHED_MIN_CHARACTERS}, key=len, reverse=True
        )
        self._lock = threading.Lock()
        self._running: set[_Run] = set()
        self._closed = False

    @classmethod
    def probe(cls, name: str, config: ExecConfig, context: SinkContext) -> str:
        """Check that the program and the folder exist. The program is not started."""
        _folder(name, config)
        return f"{_program(name, config, os.environ)} can be started"

    def deliver(self, events: Sequence[Event], timeout_secs: float) -> None:
        """Run the command for one event."""
        (event,) = events
        ends_at = self.context.monotonic() + timeout_secs
        # Under the lock: either `close` finds this run in `_running`, or nothing is started after `close`.
        with self._lock:
            if self._closed:
                raise TransientError(f"{self._program}: the sink is closed")
            run = self._start(event)
            self._running.add(run)
        try:
            in_time = run.await_exit(ends_at - min(timeout_secs / 10, _GRACE_MAX_SECS))
            if not in_time and run.stop():
                run.await_exit(ends_at, until_stderr_ends=True)
            code = run.finish()
        finally:
            run.abandon()
            with self._lock:
                self._running.discard(run)
        self._raise_for(run, code, None if in_time else timeout_secs)

    def close(self) -> None:
        """End all commands: SIGTERM to each and to the processes that it started, SIGKILL half a second later."""
        with self._lock:
            self._closed = True
            running = tuple(self._running)
        for run in running:
            run.stop()
        ends_at = self.context.monotonic() + _CLOSE_GRACE_SECS
        for run in running:
            run.ended.wait(max(ends_at - self.context.monotonic(), 0))
            run.kill()

    # --- starting ---

    def _start(self, event: Event) -> "_Run":
        values = {
            "KEY": event.key.hex(),
            "EVENT_TYPE": event.type,
            "TASK_ID": task_id_of(event),
            "FILE_ID": file_id_of(event),
            "SOURCE": event.source,
        }
        own = {f"{_OWN_PREFIX}{name}".encode(): _variable(value) for name, value in values.items()}
        try:
            # A file in memory and not a pipe: no thread has to write to it while the command reads late or not at all.
            with open(os.memfd_create("event"), "w+b") as body:  # noqa: PTH123 - a descriptor has no path
                body.write(encode(event, self._format))
                body.seek(0)
                process = subprocess.Popen(  # noqa: S603 - the configured command is what this sink is for
                    self._command,
                    executable=self._program,
                    stdin=body,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.PIPE,
                    bufsize=0,
                    cwd=self._cwd,
                    env={**self._environment, **own},
                    start_new_session=True,
                )
        except OSError as error:
            raise TransientError(
                f"{error.filename or self._program} cannot be started: {_error_text(error)}"
            ) from error
        longest_bytes = max((len(_bytes(value)) for value in self._hidden), default=0)
        return _Run(process, spare_bytes=longest_bytes, monotonic=self.context.monotonic)

    # --- results ---

    def _raise_for(self, run: "_Run", code: int | None, timeout_secs: float | None) -> None:
        """Raise the error that the end of the command means; return if it has accepted the event.

        Args:
            run: The command, which has ended.
            code: The exit code, as subprocess.Popen has it; None if it is not known.
            timeout_secs: The time limit, if the command exceeded it; else None.
        """
        stderr = run.stderr_text(self._hidden)
        stderr = f": {stderr}" if stderr else ""
        if run.stopped and timeout_secs is not None:
            raise TransientError(f"{self._program} did not end within {timeout_secs:g} s and was killed{stderr}")
        if run.stopped:
            raise TransientError(f"{self._program} was stopped because the sink is closed")
        if code is None:
            raise TransientError(
                f"{self._program} has ended, but its exit code is lost (was vodpoller started with SIGCHLD ignored?)"
            )
        if code < 0:
            raise TransientError(f"{self._program} was killed by {_signal_name(-code)}{stderr}")
        if code in _TEMPORARY:
            raise TransientError(f"{self._program} exited with {code} ({_TEMPORARY[code]}){stderr}")
        if code:
            raise RejectedError(f"{self._program} exited with {code}{stderr}")


class _Run:
    """A running command and the processes that it started: the process group whose id is the command's process id.

    The kernel does not use this id again before the command is reaped, even if it has ended. Signals are sent only
    before that, since they might reach another process afterwards.

    Args:
        process: The command, just started in a session of its own.
        spare_bytes: Number of bytes of stderr that are kept in addition to those that are shown.
        monotonic: The clock, in seconds.

    Attributes:
        stopped: A signal was sent before the command had ended, so its exit code means nothing.
        ended: Set when nothing is left to wait for.
    """

    def __init__(self, process: subprocess.Popen[bytes], *, spare_bytes: int, monotonic: Callable[[], float]) -> None:
        if process.stderr is None:
            raise AssertionError("the command was started without a pipe")
        self._process = process
        self._stderr = process.stderr
        os.set_blocking(self._stderr.fileno(), False)
        self._poll = select.poll()
        self._poll.register(self._stderr, select.POLLIN)
        self._spare_bytes = spare_bytes
        self._monotonic = monotonic
        self._lock = threading.Lock()
        self._reaped = False
        self._code_lost = False
        self._stderr_ended = False
        self._tail = b""
        self._tail_is_cut = False
        self.stopped = False
        self.ended = threading.Event()

    def await_exit(self, ends_at: float, *, until_stderr_ends: bool = False) -> bool:
        """Wait for the command's end, and read its stderr meanwhile.

        Args:
            ends_at: Monotonic time, in seconds, at which the waiting ends.
            until_stderr_ends: Also wait until no process holds stderr open any more.

        Returns:
            Whether the command has ended.
        """
        # The exit is polled, since the end of stderr does not show it: a process left behind may hold stderr open.
        pause_secs = _FIRST_PAUSE_SECS
        while not (exited := self._has_exited()) or (until_stderr_ends and not self._stderr_ended):
            left_secs = ends_at - self._monotonic()
            if left_secs <= 0:
                return exited
            has_read = self._read(min(pause_secs, left_secs))
            pause_secs = _FIRST_PAUSE_SECS if has_read else min(pause_secs * 2, _LONGEST_PAUSE_SECS)
        return True

    def stop(self) -> bool:
        """Send SIGTERM to the group, unless the command has ended.

        Returns:
            Whether the signal was sent.
        """
        with self._lock:
            if self._reaped or self._has_exited():
                return False
            self.stopped = True
            self._signal(signal.SIGTERM)
            return True

    def kill(self) -> None:
        """Send SIGKILL to the group, unless the command has been reaped."""
        with self._lock:
            if not self._reaped:
                self._signal(signal.SIGKILL)

    def finish(self) -> int | None:
        """Kill the group if it was told to stop, read the rest of stderr, and reap the command.

        Returns:
            The exit code, as subprocess.Popen has it. None if it is not known: the command has not ended although it
            was killed, or another part of this process has reaped it.
        """
        if self.stopped:
            self.kill()
        exited = self.await_exit(self._monotonic() + _KILL_WAIT_SECS)
        for _ in range(_FINAL_READS):
            if not self._read(0):
                break
        with self._lock:
            self._reaped = True
            code = self._process.wait() if exited else None
            return None if self._code_lost else code

    def abandon(self) -> None:
        """Kill the group if the command was not reaped, and release all resources."""
        if not self._reaped:
            self.stop()
            self.kill()
        self._stderr.close()
        self.ended.set()

    def stderr_text(self, hidden: Sequence[str]) -> str:
        """The last lines of stderr, as one line.

        Args:
            hidden: Texts that must not be shown, longest first.
        """
        text = self._tail.decode(errors="replace")
        for value in hidden:
            text = text.replace(value, "***")
        if self._tail_is_cut:
            # These bytes may begin with the second half of a text that must be hidden.
            text = text[self._spare_bytes :]
        lines = text[-_STDERR_SHOWN_BYTES:].splitlines()
        printable = ("".join(character if character.isprintable() else " " for character in line) for line in lines)
        return " | ".join(stripped for line in printable if (stripped := line.strip()))

    def _has_exited(self) -> bool:
        try:
            return os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
        except ChildProcessError:
            # It was reaped elsewhere: by the kernel itself, if SIGCHLD is ignored. Popen would report exit code 0.
            self._code_lost = True
            return True

    def _signal(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError, PermissionError):  # all have ended, or belong to another user
            os.killpg(self._process.pid, number)

    def _read(self, wait_secs: float) -> bool:
        """Read from stderr.

        Returns:
            Whether data or the end of stderr was read.
        """
        if self._stderr_ended:
            time.sleep(wait_secs)
            return False
        if not self._poll.poll(math.ceil(wait_secs * 1000)):
            return False
        chunk = os.read(self._stderr.fileno(), _CHUNK_BYTES)
        tail = self._tail + chunk
        kept_bytes = _STDERR_SHOWN_BYTES + self._spare_bytes
        self._tail_is_cut = self._tail_is_cut or len(tail) > kept_bytes
        self._tail = tail[-kept_bytes:]
        self._stderr_ended = not chunk
        return True


def _folder(name: str, config: ExecConfig) -> str | None:
    if config.cwd is None:
        return None
    if not Path(config.cwd).is_dir():
        raise ConfigError([f"sinks.{name}.cwd: {config.cwd} is not a folder (make it, or name one that exists)"])
    if not os.access(config.cwd, os.X_OK):
        raise ConfigError([f"sinks.{name}.cwd: {config.cwd} cannot be entered by this user (chmod +x)"])
    return str(Path(config.cwd).absolute())


def _program(name: str, config: ExecConfig, environ: Mapping[str, str]) -> str:
    """The absolute path of the program.

    Raises:
        ConfigError: The program does not exist, or this user may not execute it.
    """
    program = config.command[0]
    if "/" in program:
        # Relative to `cwd`, which is entered before the program is started.
        path = Path(config.cwd or "", program).absolute()
        if shutil.which(path):
            return str(path)
        remedy = "make it executable for this user: chmod +x" if path.is_file() else "is the path right?"
        problem = "cannot be executed" if path.exists() else "does not exist"
        raise ConfigError([f"sinks.{name}.command: {path} {problem} ({remedy})"])
    search_path = config.env.get("PATH", environ.get("PATH", os.defpath))
    if found := shutil.which(program, path=search_path):
        return str(Path(found).absolute())
    problem = f"no program {program} that this user may execute is on PATH"
    raise ConfigError([f"sinks.{name}.command: {problem} (install it, or give its path)"])


def _bytes(text: str) -> bytes:
    """The same bytes as in the environment or in the configuration, in every locale."""
    return text.encode(errors="surrogateescape")


def _variable(value: str) -> bytes:
    """The value for an environment, which cannot hold NUL and lone surrogates: they are escaped."""
    data = value.replace("\0", "\\x00").encode(errors="backslashreplace")
    return data[:_VARIABLE_MAX_BYTES].decode(errors="ignore").encode()


def _signal_name(number: int) -> str:
    try:
        name = signal.Signals(number).name
    except ValueError:  # real-time signals have no name
        return f"signal {number}"
    return f"{name} (did memory run out?)" if number == signal.SIGKILL else name


def _error_text(error: OSError) -> str:
    text = error.strerror or str(error)
    hint = _HINTS.get(error.errno or 0)
    return f"{text} ({hint})" if hint else text
