"""Events as the standard input of a command, which is started for each of them without a shell."""

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
# Linux refuses to start a program with a single variable of more than 128 KiB; the body has the whole value.
_VARIABLE_MAX_BYTES = 4096
_KEPT_BYTES = 4096
_CHUNK_BYTES = 1 << 16
# What a pipe holds at most (fcntl's F_SETPIPE_SZ, without privileges) is read by this many chunks.
_LAST_CHUNKS = 16

_GRACE_MAX_SECS = 2.0
_CLOSE_GRACE_SECS = 0.5
_DEATH_SECS = 1.0
_FIRST_PAUSE_SECS = 0.001
_LONGEST_PAUSE_SECS = 0.05

_TEMPORARY = {
    os.EX_TEMPFAIL: "it asks to be called again later",
    126: "something that it calls cannot be executed",
    127: "something that it calls was not found",
}
_HINTS = {
    errno.EACCES: "is it still executable?",
    errno.ENOEXEC: "a script's first line must be #! and its interpreter",
    errno.ENOENT: "was it removed, or the interpreter that its first line names?",
    errno.EAGAIN: "too many processes; under systemd see TasksMax=",
    errno.ENOMEM: "memory is short; under systemd see MemoryMax=",
}


class ExecConfig(SinkConfig):
    """A command."""

    type: Literal["exec"] = Field(description="A command is started for each event and gets it on its standard input.")
    command: Annotated[tuple[str, ...], Field(strict=False, min_length=1)] = Field(
        description="The program and its arguments; no shell reads them. A name without a slash is looked up on PATH.",
        examples=[["/usr/local/bin/on-vod-event", "--json"]],
    )
    timeout_secs: Annotated[float, Field(ge=0.1, le=3600)] = Field(
        default=30.0,
        description="Time limit of the command. At its end, for a tenth of it but 2 s at most, it is"
        " asked to end (SIGTERM), then killed with all that it started.",
    )
    concurrency: Annotated[int, Field(ge=1, le=64)] = Field(
        default=4, description="Maximum number of commands that run at the same time."
    )
    env: Annotated[dict[str, str], Field(max_length=100)] = Field(
        default_factory=dict,
        repr=False,
        description="Added to its environment, which otherwise has PATH, HOME, LANG, LC_*, TZ, TMPDIR and what is known"
        " of the event. The values are never shown.",
    )
    cwd: Annotated[str, Field(min_length=1, max_length=4096)] | None = Field(
        default=None,
        description="The folder that it runs in. Left out: that of vodpoller.",
        examples=["/var/lib/vodpoller"],
    )

    @field_validator("command")
    @classmethod
    def _can_be_started(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not value[0]:
            raise ValueError('the program is empty (for example command = ["/usr/local/bin/on-vod-event"])')
        if any("\0" in part for part in value):
            raise ValueError("no argument can hold a NUL character (leave it out)")
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

    Exit code 0 accepts. 75 (EX_TEMPFAIL of sysexits.h), 126 and 127 (a shell's "cannot execute" and "not found"), a
    death by a signal and a command that takes too long may pass. Any other exit code says that this event never will be
    taken, and what it wrote to stderr says why. What a command leaves running when it has ended is its own affair.

    Args:
        name: Of the sink.
        config: Its settings.
        context: The log and the clocks.
        environ: The environment that a few variables are inherited from; None for that of this process.

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
        """Whether the program is there; it is not started."""
        _folder(name, config)
        return f"{_program(name, config, os.environ)} can be started"

    def deliver(self, events: Sequence[Event], timeout_secs: float) -> None:
        """Run the command for one event."""
        (event,) = events
        ends_at = self.context.monotonic() + timeout_secs
        # Either closing finds it among those that run, or it is not started any more.
        with self._lock:
            if self._closed:
                raise TransientError(f"{self._program}: the sink is closed")
            run = self._start(event)
            self._running.add(run)
        try:
            in_time = run.await_exit(ends_at - min(timeout_secs / 10, _GRACE_MAX_SECS))
            if not in_time and run.stop():
                run.await_exit(ends_at, silent=True)
            code = run.finish()
        finally:
            run.abandon()
            with self._lock:
                self._running.discard(run)
        self._judge(run, code, None if in_time else timeout_secs)

    def close(self) -> None:
        """End what runs: SIGTERM to each command and all that it started, SIGKILL half a second later."""
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
        about = {
            "KEY": event.key.hex(),
            "EVENT_TYPE": event.type,
            "TASK_ID": task_id_of(event),
            "FILE_ID": file_id_of(event),
            "SOURCE": event.source,
        }
        own = {f"{_OWN_PREFIX}{name}".encode(): _variable(value) for name, value in about.items()}
        try:
            # A file in memory and not a pipe: nothing has to feed it, whatever the command does before it reads, or
            # whether it reads at all.
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
            raise TransientError(f"{error.filename or self._program} cannot be started: {_why(error)}") from error
        longest_bytes = max((len(_bytes(value)) for value in self._hidden), default=0)
        return _Run(process, spare_bytes=longest_bytes, monotonic=self.context.monotonic)

    # --- saying what came of it ---

    def _judge(self, run: "_Run", code: int | None, timeout_secs: float | None) -> None:
        """Raise what the end of the command means.

        Args:
            run: What has ended.
            code: As subprocess.Popen has it; None if it is not known.
            timeout_secs: Time that was waited for it; None if it ended before.
        """
        said = run.said(self._hidden)
        said = f": {said}" if said else ""
        if run.stopped and timeout_secs is not None:
            raise TransientError(f"{self._program} did not end within {timeout_secs:g} s and was killed{said}")
        if run.stopped:
            raise TransientError(f"{self._program} was stopped because the sink is closed")
        if code is None:
            raise TransientError(
                f"{self._program} has ended, and its exit code is lost (was vodpoller started with SIGCHLD ignored?)"
            )
        if code < 0:
            raise TransientError(f"{self._program} was killed by {_signal_name(-code)}{said}")
        if code in _TEMPORARY:
            raise TransientError(f"{self._program} exited with {code} ({_TEMPORARY[code]}){said}")
        if code:
            raise RejectedError(f"{self._program} exited with {code}{said}")


class _Run:
    """One command that runs, and the processes that it started: the group that has its process id for a number.

    The number is the group's for as long as the command is not reaped, even if it has ended. So signals are sent before
    that only, or they might reach another process.

    Args:
        process: Just started, in a session of its own.
        spare_bytes: Amount of stderr that is kept beyond what is shown.
        monotonic: The clock, in seconds.

    Attributes:
        stopped: It was told to end before it had: its exit code says nothing any more.
        ended: Nothing is left to wait for.
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
        self._lost = False
        self._silent = False
        self._tail = b""
        self._cut = False
        self.stopped = False
        self.ended = threading.Event()

    def await_exit(self, ends_at: float, *, silent: bool = False) -> bool:
        """Wait for the command's end, and read what it says meanwhile.

        Args:
            ends_at: Monotonic time, in seconds, at which the waiting ends.
            silent: Wait, too, until no process holds its stderr open any more.

        Returns:
            Whether it has ended.
        """
        # What it leaves running may hold stderr open. So its end is looked for as well, and not only announced there.
        pause_secs = _FIRST_PAUSE_SECS
        while not (exited := self._has_exited()) or (silent and not self._silent):
            left_secs = ends_at - self._monotonic()
            if left_secs <= 0:
                return exited
            moved = self._read(min(pause_secs, left_secs))
            pause_secs = _FIRST_PAUSE_SECS if moved else min(pause_secs * 2, _LONGEST_PAUSE_SECS)
        return True

    def stop(self) -> bool:
        """SIGTERM to the group, unless the command has ended.

        Returns:
            Whether it was sent.
        """
        with self._lock:
            if self._reaped or self._has_exited():
                return False
            self.stopped = True
            self._signal(signal.SIGTERM)
            return True

    def kill(self) -> None:
        """SIGKILL to the group, unless all is over."""
        with self._lock:
            if not self._reaped:
                self._signal(signal.SIGKILL)

    def finish(self) -> int | None:
        """Come to an end: what was told to stop is killed, what was said before that is read, the command is reaped.

        Returns:
            The exit code, as subprocess.Popen has it. None if it is not known: it does not even die when it is
            killed, or another part of this process has reaped it.
        """
        if self.stopped:
            self.kill()
        exited = self.await_exit(self._monotonic() + _DEATH_SECS)
        for _ in range(_LAST_CHUNKS):
            if not self._read(0):
                break
        with self._lock:
            self._reaped = True
            code = self._process.wait() if exited else None
            return None if self._lost else code

    def abandon(self) -> None:
        """Let go of it, whatever happened. Does nothing to what has come to its end."""
        if not self._reaped:
            self.stop()
            self.kill()
        self._stderr.close()
        self.ended.set()

    def said(self, hidden: Sequence[str]) -> str:
        """The last lines of stderr, in one line.

        Args:
            hidden: What must not be shown, longest first.
        """
        text = self._tail.decode(errors="replace")
        for value in hidden:
            text = text.replace(value, "***")
        if self._cut:
            # What is hidden may have been cut in two: the rest of it is in here.
            text = text[self._spare_bytes :]
        lines = text[-_KEPT_BYTES:].splitlines()
        printable = ("".join(character if character.isprintable() else " " for character in line) for line in lines)
        return " | ".join(stripped for line in printable if (stripped := line.strip()))

    def _has_exited(self) -> bool:
        try:
            return os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
        except ChildProcessError:
            # Something else has reaped it: the kernel itself does, if SIGCHLD is ignored. Popen takes that for a 0.
            self._lost = True
            return True

    def _signal(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError, PermissionError):  # all gone, or of a user that may not be signalled
            os.killpg(self._process.pid, number)

    def _read(self, wait_secs: float) -> bool:
        """Read from stderr.

        Returns:
            Whether something came, the end included.
        """
        if self._silent:
            time.sleep(wait_secs)
            return False
        if not self._poll.poll(math.ceil(wait_secs * 1000)):
            return False
        chunk = os.read(self._stderr.fileno(), _CHUNK_BYTES)
        tail = self._tail + chunk
        kept_bytes = _KEPT_BYTES + self._spare_bytes
        self._cut = self._cut or len(tail) > kept_bytes
        self._tail = tail[-kept_bytes:]
        self._silent = not chunk
        return True


def _folder(name: str, config: ExecConfig) -> str | None:
    if config.cwd is None:
        return None
    if not Path(config.cwd).is_dir():
        raise ConfigError([f"sinks.{name}.cwd: {config.cwd} is not a folder (make it, or name one that exists)"])
    if not os.access(config.cwd, os.X_OK):
        raise ConfigError([f"sinks.{name}.cwd: {config.cwd} may not be entered by this user (chmod +x)"])
    return str(Path(config.cwd).absolute())


def _program(name: str, config: ExecConfig, environ: Mapping[str, str]) -> str:
    """The absolute path of what is started.

    Raises:
        ConfigError: It does not exist, or this user may not execute it.
    """
    program = config.command[0]
    if "/" in program:
        # The folder is entered before the program is started.
        path = Path(config.cwd or "", program).absolute()
        if shutil.which(path):
            return str(path)
        right = "make it executable for this user: chmod +x" if path.is_file() else "is the path right?"
        wrong = "cannot be executed" if path.exists() else "does not exist"
        raise ConfigError([f"sinks.{name}.command: {path} {wrong} ({right})"])
    places = config.env.get("PATH", environ.get("PATH", os.defpath))
    if found := shutil.which(program, path=places):
        return str(Path(found).absolute())
    wrong = f"no program {program} that this user may execute is on PATH"
    raise ConfigError([f"sinks.{name}.command: {wrong} (install it, or give its path)"])


def _bytes(text: str) -> bytes:
    """As it is in the environment or in the configuration, whatever the locale."""
    return text.encode(errors="surrogateescape")


def _variable(value: str) -> bytes:
    """The value as an environment can hold it; what it cannot, NUL and lone surrogates, is escaped."""
    data = value.replace("\0", "\\x00").encode(errors="backslashreplace")
    return data[:_VARIABLE_MAX_BYTES].decode(errors="ignore").encode()


def _signal_name(number: int) -> str:
    try:
        name = signal.Signals(number).name
    except ValueError:  # real-time signals have no names
        return f"signal {number}"
    return f"{name} (did memory run out?)" if number == signal.SIGKILL else name


def _why(error: OSError) -> str:
    why = error.strerror or str(error)
    hint = _HINTS.get(error.errno or 0)
    return f"{why} ({hint})" if hint else why
