"""The processes that are measured: each is started with a simulator's URL and ends with its context."""

import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar
from urllib.parse import urlsplit

from tests.processes import environment


@contextmanager
def started(*command, errors_path, **env):
    """A process with its stderr in a file."""
    with errors_path.open("ab") as errors:
        process = subprocess.Popen(
            [*map(str, command)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=environment(**env),
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def program(name, *args, errors_path):
    """Start one of the programs in this package."""
    return started(sys.executable, "-m", f"tests.benchmarks.{name}", *args, errors_path=errors_path)


@contextmanager
def webhook_receiver(folder, *, answer_secs):
    """Run a webhook's receiver in its own process; yields its URL."""
    with program("receiver", "--answer-secs", answer_secs, errors_path=folder / "receiver.err") as process:
        yield process.stdout.readline().strip()


@dataclass(frozen=True, kw_only=True)
class Vodpoller:
    """`vodpoller run`.

    Args:
        requests_per_sec: Its `api.requests_per_sec`.
        max_concurrent_pulls: Of its only source; None for the default. Another version may have another name for it.
        sinks: The tables of its sinks; `{archive}` is replaced by the table of the file sink.
        more: Further tables.
        label: Its name in the report.
        program: The `vodpoller` of another checkout's environment; None for this one.
    """

    requests_per_sec: float = 100.0
    max_concurrent_pulls: int | None = None
    sinks: str = "{archive}"
    more: str = ""
    label: str = "vodpoller"
    program: Path | None = None

    @contextmanager
    def running(self, system, url):
        system.configure(
            url,
            lease_secs=30.0,
            api=f"requests_per_sec = {self.requests_per_sec}",
            source="\n".join(
                [
                    'unrouted = "dead_letter"',
                    *([f"max_concurrent_pulls = {pulls}"] if (pulls := self.max_concurrent_pulls) else []),
                ]
            ),
            sinks=self.sinks.replace("{archive}", system.archive_sink),
            more=self.more,
        )
        if self.program is None:
            daemon = system.daemon(started=False)  # recovery runs before the first pull and may be slow
            try:
                yield daemon.process
            finally:
                daemon.kill()
            return
        # PYTHONPATH does not contain this checkout: the other program must import its own modules.
        command = (self.program, "run", "-c", system.config_path)
        with started(*command, errors_path=system.folder / "daemon1.log", PYTHONPATH="") as process:
            yield process

    def command(self, *args):
        """Run one of its commands; returns the run time in seconds.

        Args:
            args: Arguments of the command line.
        """
        program = [sys.executable, "-m", "vodpoller"] if self.program is None else [self.program]
        path = {} if self.program is None else {"PYTHONPATH": ""}
        began = time.monotonic()
        ended = subprocess.run(
            [*map(str, (*program, *args))],
            check=False,  # `status` exits with 1 if there is a problem
            timeout=600,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(**path),
        )
        assert not ended.stderr, ended.stderr
        return time.monotonic() - began


@dataclass(frozen=True, kw_only=True)
class SdkLoop:
    """The loop around the official SDK.

    Args:
        threads: Number of threads; each has its own client.
        webhook: The URL that gets the events; None for the file.
    """

    threads: int
    webhook: str | None = None

    @property
    def label(self):
        return "SDK loop" if self.threads == 1 else f"SDK loop, {self.threads} threads"

    @contextmanager
    def running(self, system, url):
        to = ("--path", system.archive) if self.webhook is None else ("--url", self.webhook)
        where = ("--endpoint", urlsplit(url).netloc, *to)
        with program("sdk_loop", *where, "--threads", self.threads, errors_path=system.folder / "loop.err") as process:
            yield process


@dataclass(frozen=True, kw_only=True)
class SqlLoop:
    """The loop with PostgreSQL: one INSERT and COMMIT for each event.

    Args:
        dsn: Address of a database that has the table.
    """

    dsn: str
    label: ClassVar = "SDK loop, INSERT and COMMIT for each event"

    @contextmanager
    def running(self, system, url):
        where = ("--endpoint", urlsplit(url).netloc, "--dsn", self.dsn)
        with program("sql_loop", *where, errors_path=system.folder / "loop.err") as process:
            yield process


class RawClient:
    """The client in `raw_client.py`: shows the maximum throughput of the simulator."""

    label: ClassVar = "raw sockets"

    @contextmanager
    def running(self, system, url):
        endpoint = urlsplit(url).netloc
        with program("raw_client", "--endpoint", endpoint, errors_path=system.folder / "raw.err") as process:
            yield process
